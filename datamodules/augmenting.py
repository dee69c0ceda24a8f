"""What is done to a batch of images on the device that it is on: views, recipe, mixup and CutMix, normalisation.

Legend: ``N`` images, ``V`` views, ``C`` channels, ``H W`` height and width, ``S`` side of an image, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from .images import Batch, mixed_seed
from .recipes import Recipe, draw_boxes, draw_changes, render


class BatchAugmentation:
    """Makes batches of uint8 images ready for a model: augmented in training, and normalised always.

    What is drawn depends on the training step alone, so that every device makes the same changes, and a run that is
    resumed goes on as it would have.

    Args:
        input_size: Shape ``(C, S, S)`` of an image that is ready.
        num_classes: Number of classes ``K``.
        mean: Mean of each channel, for pixels in 0..1; one channel gets the mean of three numbers.
        std: Standard deviation of each channel, for pixels in 0..1; likewise.
        recipe: Random changes of each view.
        views: Views ``V`` of each training image.
        mixup: Strength alpha of mixup (Zhang et al. 2018); 0 is none.
        cutmix: Strength alpha of CutMix (Yun et al. 2019); with mixup too, each batch gets one or the other.

    Attributes:
        mean: The means, ``(C,)``, on the CPU.
        std: The standard deviations, ``(C,)``, on the CPU.

    Raises:
        ValueError: A number is out of its range, views are to be mixed, or ``mean`` or ``std`` does not fit.
    """

    def __init__(
        self,
        input_size: tuple[int, int, int],
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        recipe: Recipe,
        views: int = 1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        if views < 1:
            raise ValueError(f"expected views of at least 1, got {views}")
        if min(mixup, cutmix) < 0 or (views > 1 and max(mixup, cutmix) > 0):
            raise ValueError(
                f"expected mixup and cutmix of at least 0, and 0 with views={views} above 1, "
                f"got mixup={mixup}, cutmix={cutmix}"
            )
        self.recipe = recipe
        self.views = views
        self._channels, self._size, _ = input_size
        self.normalise(mean, std)
        mixers = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self._mixers: list[Any] = [mixer(alpha=alpha, num_classes=num_classes) for mixer, alpha in mixers if alpha > 0]
        self._generator: torch.Generator | None = None
        self._step: tuple[int, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the generator, which spawned processes cannot be sent; it is made again when it is needed."""
        return {**vars(self), "_generator": None, "_step": None}

    @property
    def augments(self) -> bool:
        """Whether training images differ from those of evaluation, and from one epoch to the next."""
        return self.recipe.changes or self.views > 1 or bool(self._mixers)

    def normalise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise by these means and standard deviations of the channels from now on.

        Raises:
            ValueError: They are not as many as there are channels, or a standard deviation is not positive.
        """
        self.mean = _of_channels("mean", mean, self._channels)
        self.std = _of_channels("std", std, self._channels)

    def restart(self) -> None:
        """Draw from the beginning of the step again, as for a loader that is made anew."""
        self._step = None

    def evaluate(self, images: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` resized if need be, and normalised: ``(N, C, S, S)``."""
        return render(images, self._size, self.mean, self.std)

    def train(self, images: Tensor, labels: Tensor, step: tuple[int, ...], cropped: bool) -> Batch:
        """Images and labels augmented and normalised: ``(N, C, S, S)``, or ``(N, V, C, S, S)`` if there are views.

        Args:
            images: Images ``(N, C, H, W)``, or views of them ``(N, V, C, H, W)``.
            labels: Labels ``(N,)``; mixed ones are shares ``(N, K)``.
            step: Seed of the run, epoch, batch and process: what is drawn depends on them, and on how often this was
                called for the step already.
            cropped: Whether the images are the recipe's random crops already, cut out as their files were decoded.
        """
        generator = self._at(step)
        images = self._augmented(images, cropped, generator)
        return self._mixed(images, labels, generator) if self._mixers else (images, labels)

    def _at(self, step: tuple[int, ...]) -> torch.Generator:
        """The generator of a step; calls for the same one go on drawing from it."""
        if self._generator is None or step != self._step:
            self._step = step
            self._generator = torch.Generator().manual_seed(mixed_seed(*step))
        return self._generator

    def _augmented(self, images: Tensor, cropped: bool, generator: torch.Generator) -> Tensor:
        if images.ndim == 5:
            images = images.flatten(0, 1)
        elif self.views > 1:
            images = images.repeat_interleave(self.views, dim=0)
        count, _, height, width = images.shape
        boxes = draw_boxes(self.recipe, count, height, width, generator) if self.recipe.crops and not cropped else None
        changes = draw_changes(self.recipe, count, generator)
        images = render(images, self._size, self.mean, self.std, boxes, changes)
        return images.view(-1, self.views, *images.shape[1:]) if self.views > 1 else images

    def _mixed(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Batch:
        # torchvision's mixers draw from the global generators alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            mixer = self._mixers[int(torch.randint(len(self._mixers), ()))]
            return mixer(images, labels)


def _of_channels(name: str, values: Sequence[float], channels: int) -> Tensor:
    """Values of the channels; one channel gets the mean of three."""
    if channels == 1 and len(values) == 3:
        values = [sum(values) / 3]
    if len(values) != channels or (name == "std" and min(values) <= 0):
        raise ValueError(f"expected {name} of {channels} {'positive ' * (name == 'std')}numbers, got {list(values)}")
    return torch.tensor(values, dtype=torch.float32)

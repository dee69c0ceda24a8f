"""Augmentation and normalisation of a batch of images on its device: views, recipe, mixup and CutMix.

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
    """Preprocesses batches of uint8 images: augments them in training, and always normalises them.

    The random numbers depend on the training step alone, so that every device makes the same changes, and a resumed run
    continues as if it had not been interrupted.

    Args:
        input_size: Shape ``(C, S, S)`` of a preprocessed image.
        num_classes: Number of classes ``K``.
        mean: Mean of each channel, for pixels in 0..1; one channel gets the mean of three numbers.
        std: Standard deviation of each channel, for pixels in 0..1; likewise.
        recipe: Random changes of each view.
        views: Views ``V`` of each training image.
        mixup: Strength alpha of mixup (Zhang et al. 2018); 0 is none.
        cutmix: Strength alpha of CutMix (Yun et al. 2019); together with mixup each batch gets one of the two.

    Attributes:
        mean: The means, ``(C,)``, on the CPU.
        std: The standard deviations, ``(C,)``, on the CPU.

    Raises:
        ValueError: A number is out of its range, several views with mixup or CutMix, or a ``mean`` or ``std`` that does
            not fit the channels.
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
        """The state without the generator, which cannot be pickled; it is made again when it is needed."""
        return {**vars(self), "_generator": None, "_step": None}

    @property
    def augments(self) -> bool:
        """Whether training images are augmented: they differ from evaluation, and from epoch to epoch."""
        return self.recipe.changes or self.views > 1 or bool(self._mixers)

    def normalise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the means and standard deviations of the normalisation.

        Raises:
            ValueError: Their number is not that of the channels, or a standard deviation is not positive.
        """
        self.mean = _of_channels("mean", mean, self._channels)
        self.std = _of_channels("std", std, self._channels)

    def restart(self) -> None:
        """Draw the random numbers of the step from the beginning again, as for a new loader."""
        self._step = None

    def evaluate(self, images: Tensor) -> Tensor:
        """Images ``(N, C, H, W)``, resized to ``S`` if they differ, and normalised: ``(N, C, S, S)``; also views."""
        flat = render(images.flatten(0, -4), self._size, self.mean, self.std)
        return flat.view(*images.shape[:-3], *flat.shape[1:])

    def train(self, images: Tensor, labels: Tensor, step: tuple[int, ...], cropped: bool) -> Batch:
        """Images and labels augmented and normalised: ``(N, C, S, S)``, or ``(N, V, C, S, S)`` if there are views.

        Args:
            images: Images ``(N, C, H, W)``, or views of them ``(N, V, C, H, W)``.
            labels: Labels ``(N,)``; mixed ones are class probabilities ``(N, K)``.
            step: Seed of the run, epoch, batch and process: the random numbers depend on them, and on the number of
                earlier calls for the step.
            cropped: Whether the images are the recipe's random crops already, made when their files were decoded.
        """
        generator = self._at(step)
        images = self._augmented(images, cropped, generator)
        return self._mixed(images, labels, generator) if self._mixers else (images, labels)

    def _at(self, step: tuple[int, ...]) -> torch.Generator:
        """The generator of a step; repeated calls for the same step return the same generator."""
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
        # torchvision's mixers draw from the CPU's global generator, which is seeded here and restored;
        # torch.manual_seed would seed the generators of accelerators too, which dropout draws from.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            mixer = self._mixers[int(torch.randint(len(self._mixers), ()))]
            return mixer(images, labels)


def _of_channels(name: str, values: Sequence[float], channels: int) -> Tensor:
    """One value per channel; a single channel gets the mean of three values."""
    values = [float(value) for value in values]
    if channels == 1 and len(values) == 3:
        values = [sum(values) / 3]
    if len(values) != channels or (name == "std" and min(values) <= 0):
        raise ValueError(f"expected {name} of {channels} {'positive ' * (name == 'std')}numbers, got {values}")
    return torch.tensor(values, dtype=torch.float32)

"""Datamodules with random access to images: splits, few labels, and the sampling of an epoch.

Legend: ``N`` images, ``C`` channels, ``H W`` height and width, ``K`` classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from .base import ImageDataModule, check_choice, check_numbers
from .images import Batch, FileImages, Labelled, TensorImages
from .loading import EpochSampler, SameSampler
from .splits import absent_classes, split_indices, take_fraction, take_shots

# Fixed, so that no option can move an image from one split to another.
SPLIT_SEED = 0
PARTS = ("train", "val", "test")
_VAL_FRACTION = 0.1
Sampling = Literal["uniform", "balanced"]


class IndexedImages(ImageDataModule, ABC):
    """Images whose labels are known before they are read, so that they can be split and few labels drawn. Abstract.

    Evaluation reads a split in a fixed order in which the classes alternate, so that the first batches
    (``limit_val_batches``, ``overfit_batches``, the sanity check, a limited pass) have the class proportions of all
    images.

    Args:
        num_classes: Number of classes ``K``.
        input_size: Shape ``(C, H, W)`` of an image as it is stored.
        data_mean: Mean of the data's channels, for pixels in 0..1.
        data_std: Standard deviation of the data's channels, for pixels in 0..1.
        shots: Training images per class, drawn with ``seed``; None is all. Fewer shots are a subset of more shots.
        fraction: Share of each class's training images, drawn with ``seed``, in (0, 1]; None is all of them.
        seed: Seed of the images that ``shots`` or ``fraction`` draws.
        val_fraction: Share of each class's training images that is split off for validation, always the same images.
            None is the data set's own validation split, or 0.1 if it has none. A number first joins the data set's own
            validation split to the training images, so that 0 trains on all of them without validation.
        sampling: ``uniform`` trains on each image once per epoch, except for up to world size - 1 images and for a
            last batch of a single image per process, which the epoch drops. ``balanced`` draws the same number of
            images with replacement, each class with training images with the same probability, and uniformly within a
            class; evaluation and `train_plain_dataloader` do not change. Excludes a learner's
            ``class_weight="balanced"``.
        device_cache: Hold all images on the training device.

    Raises:
        ValueError: An argument is out of its range, or contradicts another.
    """

    def __init__(
        self,
        num_classes: int,
        input_size: tuple[int, int, int],
        data_mean: Sequence[float],
        data_std: Sequence[float],
        *,
        shots: int | None = None,
        fraction: float | None = None,
        seed: int = 0,
        val_fraction: float | None = None,
        sampling: Sampling = "uniform",
        device_cache: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, input_size, data_mean, data_std, **kwargs)
        check_numbers(shots=shots)
        _check_shares(fraction, val_fraction)
        if seed < 0:
            raise ValueError(f"expected a seed of at least 0, got {seed}")
        if shots is not None and fraction is not None:
            raise ValueError(f"expected shots or fraction, got both: shots={shots}, fraction={fraction}")
        check_choice("sampling", sampling, Sampling)
        if device_cache and self.num_workers:
            raise ValueError(
                f"expected num_workers of 0 with device_cache, got {self.num_workers}; leave num_workers out"
            )
        self.shots, self.fraction, self.seed = shots, fraction, seed
        self.val_fraction = val_fraction
        self.sampling = sampling
        self.device_cache = device_cache

    def _numbers(self) -> dict[str, Any]:
        drawn = {"seed": self.seed} if self.shots or self.fraction else {}
        return {**super()._numbers(), "sampling": self.sampling, **drawn}

    @abstractmethod
    def parts(self) -> dict[str, Labelled]:
        """The data set's own splits: ``train``, and ``val`` and ``test`` if it has them; sets ``class_names``."""

    def hold(self, part: Labelled) -> Labelled:
        """The part in the form in which it is kept; a subclass may decode its files here.

        The images stay in their order, and ``chosen`` in that of the data set, which predictions have.
        """
        return part

    def _read(self) -> Mapping[str, Labelled]:
        parts = self.parts()
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"expected {self.num_classes} classes, got {len(self.class_names)}; is the data complete?")
        for name, part in parts.items():
            _check_part(name, part, self.num_classes, (self.input_size[0], self._stored_size))
        if self.val_fraction is not None and "val" in parts:
            parts["train"] = parts["train"].join(parts.pop("val"))
        if "val" not in parts:
            share = _VAL_FRACTION if self.val_fraction is None else self.val_fraction
            parts |= self._split(parts["train"], {"val": share})
            if share and not len(parts["val"]):
                rank_zero_info("there is no validation split: no class has more than one image to take one from")
        parts["train"] = self._few_labels(parts["train"])
        for name in set(parts) - {"train"}:
            if len(parts[name]) and (absent := absent_classes(parts[name].own_labels, self.class_names)):
                rank_zero_info(f"there are no {name} images of {absent}")
        return self._held({name: parts[name].balanced() for name in PARTS if name in parts and len(parts[name])})

    def _names(self, part: Labelled) -> list[str] | None:
        """What a part's images are drawn by, see `splits`; None is their place in the data set."""
        return None

    def _split(self, part: Labelled, fractions: dict[str, float]) -> dict[str, Labelled]:
        """The part divided into these shares of each class, and ``train``."""
        cut = split_indices(part.own_labels, fractions, SPLIT_SEED, self._names(part))
        return {name: part.take(indices) for name, indices in cut.items()}

    def _few_labels(self, train: Labelled) -> Labelled:
        labels = train.own_labels
        if self.shots is not None:
            return train.take(take_shots(labels, self.shots, self.seed, self.class_names, self._names(train)))
        if self.fraction is not None:
            return train.take(take_fraction(labels, self.fraction, self.seed, self._names(train)))
        return train

    def _held(self, parts: dict[str, Labelled]) -> dict[str, Labelled]:
        held = {name: self.hold(part) for name, part in parts.items()}
        if not self.device_cache:
            return held
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if device.type == "cpu":
            rank_zero_info("device_cache: the training device is the CPU; images are held in memory, as with in_memory")
        moved = {id(p.images): p.images.to(device) for p in held.values() if isinstance(p.images, Tensor)}
        return {name: replace(part, images=moved[id(part.images)]) for name, part in held.items()}

    def _loader(self, name: str, training: bool = False, as_stored: bool = False) -> DataLoader[Batch]:
        part = self._part(name)
        dataset = self._dataset(part.as_stored() if as_stored else part, training)
        return self._load(dataset, training, **(self._drawn(dataset) if training else self._in_order(dataset)))

    def _dataset(self, part: Labelled, training: bool) -> TensorImages | FileImages:
        if part.in_memory:
            return TensorImages(part)
        if training and self.recipe.crops:
            return FileImages(part, self.input_size[1], self.recipe, self.views, self._run_seed, self.decoding)
        return FileImages(part, self.input_size[1], decoding=self.decoding)

    def _drawn(self, dataset: TensorImages | FileImages) -> dict[str, Any]:
        """Loader options for training batches."""
        labels = dataset.targets if self.sampling == "balanced" else None
        place, taken = self._place(), self._taken(self.batch_size)
        sampler: EpochSampler | SameSampler = EpochSampler(dataset, *place, self._run_seed, taken, labels)
        if getattr(self.trainer, "overfit_batches", 0):
            sampler = SameSampler(dataset, *place, taken)
        # Batch normalisation cannot train on a single image, so that a last batch of one image is dropped.
        drop_last = 1 < self.batch_size < len(sampler) and len(sampler) % self.batch_size == 1
        return {"batch_size": self.batch_size, "sampler": sampler, "drop_last": drop_last}


def _check_part(name: str, part: Labelled, num_classes: int, stored: tuple[int, int]) -> None:
    """Refuse labels out of range, and images of other channels and height than ``input_size`` says."""
    labels = part.own_labels
    if len(outside := labels[(labels < 0) | (labels >= num_classes)]):
        raise ValueError(
            f"expected labels in 0..{num_classes - 1} (num_classes={num_classes}) of the {name} images, got "
            f"{outside[0]}; number the classes from 0, or correct num_classes"
        )
    if isinstance(part.images, Tensor) and part.images.shape[1:3] != stored:
        raise ValueError(
            f"expected {name} images of {stored[0]} channels and {stored[1]} rows, as input_size says, got "
            f"{tuple(part.images.shape[1:])}; give as input_size the shape in which they are stored, and as image_size "
            "the side of images in batches"
        )


def _check_shares(fraction: float | None, val_fraction: float | None) -> None:
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"expected fraction in (0, 1], got {fraction}")
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise ValueError(f"expected val_fraction in [0, 1), got {val_fraction}")

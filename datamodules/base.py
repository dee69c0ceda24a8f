"""What every datamodule shares: options, loaders, and what is done to a batch on its device.

Legend: ``N`` images, ``V`` views, ``C`` channels, ``H W`` height and width, ``S`` side of an image, ``K`` classes.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from .augmenting import BatchAugmentation
from .decoding import Decoding
from .images import Batch, FileImages, Labelled, Part, TensorImages, mixed_seed
from .listing import image_paths
from .loading import EpochLoader, Taken
from .recipes import Augmentation, recipe_for

Normalize = Literal["data", "backbone"]
_MOST_WORKERS = 8


def _of_batches(name: str) -> Any:
    """An attribute that the datamodule shows, and that its `BatchAugmentation` has."""
    return property(
        lambda self: getattr(self._augmentation, name), lambda self, value: setattr(self._augmentation, name, value)
    )


class ImageDataModule(LightningDataModule, ABC):
    """Labelled images, augmented and normalised batch by batch on whatever device the batch is on. Abstract.

    While a Trainer trains, its batches are augmented; in every other stage images are as `train_plain_dataloader` and
    the evaluation loaders give them: resized if need be, and normalised. `train_plain_dataloader` has the training
    images in a fixed order: it is what neural collapse is measured on. Among several processes each image is evaluated
    once, and training shards are equally long. Predictions come in the order of the data set.

    Args:
        num_classes: Number of classes ``K``.
        input_size: Shape ``(C, H, W)`` of an image as it is stored.
        data_mean: Mean of the data's channels, for pixels in 0..1.
        data_std: Standard deviation of the data's channels, for pixels in 0..1.
        batch_size: Images a batch and process.
        num_workers: Worker processes a loader; None is none for images in memory, and else the cores that this
            process has to itself, up to 8.
        augmentation: A recipe's name, or a Recipe. ``plain`` is none; ``standard`` a random resized crop and a flip;
            ``trivial`` adds TrivialAugment; ``simclr`` adds SimCLR's changes of colour and, from 64 pixels on, blur.
        strength: Strength of the recipe: 0 is no augmentation, 1 the published one.
        views: Views ``V`` of each training image; more than one make batches ``(N, V, C, S, S)``.
        mixup: Strength alpha of mixup (Zhang et al. 2018) in training; 0 is none. Labels become shares, ``(N, K)``.
        cutmix: Strength alpha of CutMix (Yun et al. 2019); with mixup too, each batch gets one or the other.
        image_size: Side ``S`` of the images in batches; None is that of the stored images.
        normalize: ``data`` is the data's mean and standard deviation, ``backbone`` those that the model's timm network
            was pre-trained with.
        mean: Mean of each channel, for pixels in 0..1, in place of that of ``normalize``.
        std: Standard deviation of each channel, for pixels in 0..1, in place of that of ``normalize``.

    Attributes:
        class_names: Names of the classes in the order of their labels; the data set's own once it is set up.
        input_size: Shape ``(C, S, S)`` of an image in a batch.
        recipe: What ``augmentation`` is at its strength.
        decoding: How image files are decoded.
        mark_broken: Whether a prediction goes on where an image cannot be read: it comes as zeros labelled -1. The
            command line sets it; otherwise the file is refused by name.

    Raises:
        ValueError: An argument is out of its range, or contradicts another.
    """

    recipe, views, mean, std = map(_of_batches, ("recipe", "views", "mean", "std"))

    def __init__(
        self,
        num_classes: int,
        input_size: tuple[int, int, int],
        data_mean: Sequence[float],
        data_std: Sequence[float],
        batch_size: int = 64,
        num_workers: int | None = None,
        augmentation: Augmentation = "standard",
        strength: float = 1.0,
        views: int = 1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        image_size: int | None = None,
        normalize: Normalize = "data",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_numbers(batch_size=batch_size, image_size=image_size)
        check_choice("normalize", normalize, Normalize)
        self.num_classes = num_classes
        self.class_names = [str(label) for label in range(num_classes)]
        # Share of a stored image's shorter side that evaluation sees.
        self.centre = 1.0
        self._stored_size = input_size[1]
        size = image_size or self._stored_size
        self.input_size = (input_size[0], size, size)
        self.normalize = normalize
        self._given = {"mean": mean, "std": std}
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._augmentation = BatchAugmentation(
            self.input_size,
            num_classes,
            mean or data_mean,
            std or data_std,
            recipe_for(augmentation, strength, size),
            views,
            mixup,
            cutmix,
        )
        self.decoding = Decoding(channels=input_size[0])
        self.mark_broken = False
        self._parts: Mapping[str, Part] = {}
        self._files: FileImages | None = None
        self._run_seed = 0

    @property
    def augments(self) -> bool:
        """Whether training images differ from those of evaluation, and from one epoch to the next."""
        return self._augmentation.augments

    @property
    def class_counts(self) -> np.ndarray | None:
        """Training images of each class, ``(K,)``, after `setup`; None where that takes reading them."""
        labels = getattr(self._parts.get("train"), "own_labels", None)
        return None if labels is None else np.bincount(labels, minlength=self.num_classes)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How evaluation makes images ready, as plain data and in timm's words, once the datamodule is set up.

        Two entries are ours: ``stored_size`` is the side to which a file is decoded before it is brought to
        ``input_size``, and ``value_range`` is that of `Decoding`.
        """
        return {
            "input_size": list(self.input_size),
            "mean": [round(value, 6) for value in self.mean.tolist()],
            "std": [round(value, 6) for value in self.std.tolist()],
            "interpolation": "bilinear",
            "crop_pct": self.centre,
            "crop_mode": "center",
            "stored_size": self._stored_size,
            "value_range": None if self.decoding.value_range is None else list(self.decoding.value_range),
        }

    @abstractmethod
    def parts(self) -> Mapping[str, Part]:
        """The data set's own parts: ``train``, and ``val`` and ``test`` if it has them; sets ``class_names``."""

    @abstractmethod
    def _loader(self, name: str, training: bool = False, as_stored: bool = False) -> DataLoader[Batch]:
        """A loader of a part: for training, in the order of the data set, or in the fixed order of evaluation."""

    def setup(self, stage: str) -> None:
        """Read the parts, once, and log how many images of a class they have."""
        if not self._parts:
            self._parts = self._read()
            counts = (f"{name} {part.describe(self.num_classes)}" for name, part in self._parts.items())
            rank_zero_info(f"{type(self).__name__} images: {', '.join(counts)}")
        if self.normalize == "backbone":
            self._normalize_as_pretrained()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Training images in random order."""
        trainer: Any = self.trainer
        seed = torch.initial_seed() if trainer is None else trainer.strategy.broadcast(torch.initial_seed())
        self._run_seed = mixed_seed(seed)
        self._augmentation.restart()
        return self._loader("train", training=True)

    def train_plain_dataloader(self) -> DataLoader[Batch]:
        """Training images in a fixed order."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Validation images; an empty list if there are none."""
        return self._loader("val") if "val" in self._parts else []

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test images."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Test images in the order of the data set, or those of `predict_files`."""
        if self._files is None:
            loader = self._loader("test", as_stored=True)
        else:
            loader = self._load(self._files, **self._in_order(self._files))
        if hasattr(loader.dataset, "mark_broken"):
            loader.dataset.mark_broken = self.mark_broken
        return loader

    def predict_files(self, folder: str | Path) -> list[str]:
        """Predict the images below a folder from now on, seen as evaluation sees them; returns their paths in order.

        Raises:
            FileNotFoundError: No such folder, or no images in it.
        """
        paths = self._readable(image_paths(folder))
        everything = Labelled.all(paths, [0] * len(paths))
        self._files = FileImages(everything, self._stored_size, decoding=replace(self.decoding, banner=0))
        return paths

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Make uint8 images ready for the model: augmented in training, then normalised."""
        images, labels = batch
        trainer: Any = self.trainer
        if trainer is not None and trainer.training:
            step = self._run_seed, trainer.current_epoch, _batch_of_epoch(trainer), trainer.global_rank
            cropped = not self._parts["train"].in_memory
            images, labels = self._augmentation.train(images, labels, step, cropped)
        else:
            images = self._augmentation.evaluate(images)
        return (images, labels) if trainer is None else trainer.precision_plugin.convert_input((images, labels))

    def _read(self) -> Mapping[str, Part]:
        """The parts as they are used."""
        return self.parts()

    def _readable(self, paths: list[str]) -> list[str]:
        """Those of the files that are predicted."""
        return paths

    def _normalize_as_pretrained(self) -> None:
        """Take mean and std of the first timm network in the model."""
        model: Any = getattr(self.trainer, "lightning_module", None)
        networks = model.modules() if model is not None else ()
        config = next((net.pretrained_cfg for net in networks if hasattr(net, "pretrained_cfg")), None)
        if config is None:
            raise ValueError("normalize=backbone needs a model with a timm network; give mean and std")
        self._augmentation.normalise(self._given["mean"] or config["mean"], self._given["std"] or config["std"])

    def _place(self) -> tuple[int, int]:
        """How many processes there are, and which of them this one is."""
        trainer: Any = self.trainer
        return (trainer.world_size, trainer.global_rank) if trainer else (1, 0)

    def _part(self, name: str) -> Any:
        """A part that has images for each process."""
        if name not in self._parts:
            raise ValueError(f"{type(self).__name__} has no {name} images, only {', '.join(self._parts)}")
        part, (processes, _) = self._parts[name], self._place()
        if len(part) < processes:
            raise ValueError(f"expected at least one {name} image a process, got {len(part)} for {processes}")
        return part

    def _load(
        self, dataset: Dataset[Batch], training: bool = False, workers: int | None = None, **batching: Any
    ) -> DataLoader[Batch]:
        """A loader of a data set; None is as many workers as the user asks for, or as are good."""
        trainer: Any = self.trainer
        if workers is None:
            workers = self.num_workers
        if workers is None:
            workers = 0 if isinstance(dataset, TensorImages) else _free_cores(trainer)
        to_gpu = trainer is not None and trainer.strategy.root_device.type == "cuda"
        there = isinstance(dataset, TensorImages) and dataset.images.is_cuda
        kind = EpochLoader if training else DataLoader
        return kind(
            dataset,
            **batching,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=to_gpu and not there,
            persistent_workers=workers > 0,
            # Its own, so that the workers' seeds take no number from the stream that the model draws from.
            generator=torch.Generator(),
        )

    def _in_order(self, dataset: Any) -> dict[str, Any]:
        """How a loader makes batches of a data set in its order, each sample once among the processes."""
        world_size, rank = self._place()
        several = world_size > 1
        sampler = UnrepeatedDistributedSampler(dataset, world_size, rank, shuffle=False) if several else None
        return {"batch_size": self.batch_size, "sampler": sampler}

    def _taken(self, size: int = 1) -> Callable[[Any], int]:
        """Batches of ``size`` that a run which is resumed has trained on in its epoch, as `Taken` tells them."""
        return Taken(lambda source: size * _batch_of_epoch(self.trainer) if _trains_on(self.trainer, source) else 0)


def _batch_of_epoch(trainer: Any) -> int:
    """Training batches of this epoch that came before the one that is fetched or made ready now."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready


def _trains_on(trainer: Any, source: Any) -> bool:
    """Whether it is from this sampler or stream that the trainer gets its batches, and not somebody else's loader."""
    loaders: Any = getattr(trainer and trainer.fit_loop._combined_loader, "flattened", [])
    return any(source is loader.dataset or source is getattr(loader, "sampler", None) for loader in loaders)


def _as_it_is(batch: Any) -> Any:
    return batch


def _free_cores(trainer: Any) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_WORKERS, cores // max(1, getattr(trainer, "num_devices", 1)))


def check_numbers(**numbers: int | None) -> None:
    """Refuse numbers below 1; None is no number.

    Raises:
        ValueError: One is.
    """
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"expected {name} of at least 1, got {number}")


def check_choice(name: str, value: str, choices: Any) -> None:
    """Refuse a value that is none of those of a ``Literal``.

    Raises:
        ValueError: It is not.
    """
    if value not in get_args(choices):
        raise ValueError(f"expected {name} to be one of {', '.join(get_args(choices))}, got {value!r}")

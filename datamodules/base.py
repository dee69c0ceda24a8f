"""What every datamodule shares: parts, few labels, loaders, and what is done to a batch on its device.

Legend: ``N`` images, ``V`` views, ``C`` channels, ``H W`` height and width, ``S`` side of an image, ``K`` classes.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import v2

from .decoding import Decoding
from .images import Batch, FileImages, Labelled, Part, TensorImages, mixed_seed
from .listing import image_paths
from .loading import EpochLoader, EpochSampler, Taken
from .recipes import Augmentation, draw_boxes, draw_changes, recipe_for, render
from .splits import absent_classes, split_indices, take_fraction, take_shots

# Fixed, so that no choice a user makes can move an image from one part to another.
SPLIT_SEED = 0
_PARTS = ("train", "val", "test")
_VAL_FRACTION = 0.1
_MOST_WORKERS = 8


class ImageDataModule(LightningDataModule, ABC):
    """Labelled images, augmented and normalised batch by batch on whatever device the batch is on. Abstract.

    While a Trainer trains, its batches are augmented; in every other stage images are as `train_plain_dataloader` and
    the evaluation loaders give them: resized if need be, and normalised. `train_plain_dataloader` has the training
    images in a fixed order: it is what neural collapse is measured on. Among several processes each image is evaluated
    once, and training shards are equally long.

    Evaluation goes through a part in a fixed order in which the classes alternate, so that the first batches
    (``limit_val_batches``, ``overfit_batches``, the sanity check, a pass that is cut short) have the classes in the
    shares that all images have them. Predictions come in the order of the data set.

    Args:
        num_classes: Number of classes ``K``.
        input_size: Shape ``(C, H, W)`` of an image as it is stored.
        data_mean: Mean of the data's channels, for pixels in 0..1.
        data_std: Standard deviation of the data's channels, for pixels in 0..1.
        batch_size: Images a batch and process.
        num_workers: Worker processes a loader; None is none for images in memory, and else the cores that this
            process has to itself, up to 8.
        shots: Training images a class, drawn with ``seed``; None is all of them. Fewer shots are among more.
        fraction: Share of each class's training images, drawn with ``seed``, in (0, 1]; None is all of them.
        seed: Which training images ``shots`` or ``fraction`` draws.
        val_fraction: Share of each class's training images that is cut off for validation, always the same images.
            None is the data set's own validation part, or 0.1 if it has none. A number joins an own validation part
            to the training images first, so that 0 trains on all of them and validates on none.
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
        device_cache: Hold all images on the training device.

    Attributes:
        class_names: Names of the classes in the order of their labels; the data set's own once it is set up.
        input_size: Shape ``(C, S, S)`` of an image in a batch.
        decoding: How image files are decoded.
        mark_broken: Whether a prediction goes on where an image cannot be read: it comes as zeros labelled -1. The
            command line sets it; otherwise the file is refused by name.

    Raises:
        ValueError: An argument is out of its range, or contradicts another.
    """

    def __init__(
        self,
        num_classes: int,
        input_size: tuple[int, int, int],
        data_mean: Sequence[float],
        data_std: Sequence[float],
        batch_size: int = 64,
        num_workers: int | None = None,
        shots: int | None = None,
        fraction: float | None = None,
        seed: int = 0,
        val_fraction: float | None = None,
        augmentation: Augmentation = "standard",
        strength: float = 1.0,
        views: int = 1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        image_size: int | None = None,
        normalize: Literal["data", "backbone"] = "data",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device_cache: bool = False,
    ) -> None:
        super().__init__()
        _check_numbers(batch_size=batch_size, views=views, shots=shots, image_size=image_size)
        _check_shares(fraction, val_fraction)
        _check_mixing(mixup, cutmix, views)
        if shots is not None and fraction is not None:
            raise ValueError(f"expected shots or fraction, got both: shots={shots}, fraction={fraction}")
        if device_cache and num_workers:
            raise ValueError(f"expected num_workers of 0 with device_cache, got {num_workers}; leave num_workers out")
        self.num_classes = num_classes
        self.class_names = [str(label) for label in range(num_classes)]
        # Share of a stored image's shorter side that evaluation sees.
        self.centre = 1.0
        self._stored_size = input_size[1]
        size = image_size or self._stored_size
        self.input_size = (input_size[0], size, size)
        self.normalize = normalize
        self.mean = _channels("mean", mean or data_mean, input_size[0])
        self.std = _channels("std", std or data_std, input_size[0])
        self._given = {"mean": mean, "std": std}
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.shots, self.fraction, self.seed = shots, fraction, seed
        self.val_fraction = val_fraction
        self.recipe = recipe_for(augmentation, strength, size)
        self.views = views
        self.device_cache = device_cache
        self._mixers = _mixers(mixup, cutmix, num_classes)
        self.decoding = Decoding(channels=input_size[0])
        self.mark_broken = False
        self._parts: Mapping[str, Part] = {}
        self._files: FileImages | None = None
        self._run_seed = 0
        self._generator: torch.Generator | None = None
        self._step: tuple[int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the generator, which spawned processes cannot be sent; it is made again when it is needed."""
        return {**vars(self), "_generator": None, "_step": None}

    @property
    def augments(self) -> bool:
        """Whether training images differ from those of evaluation, and from one epoch to the next."""
        return self.recipe.changes or self.views > 1 or bool(self._mixers)

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
    def parts(self) -> dict[str, Labelled]:
        """The data set's own parts: ``train``, and ``val`` and ``test`` if it has them; sets ``class_names``."""

    def hold(self, part: Labelled) -> Labelled:
        """The part as it is kept; where files could be decoded once, this is the place."""
        return part

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
            return self._marking(self._loader("test", as_stored=True))
        return self._marking(self._load(self._files, in_memory=False))

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
        training = trainer is not None and trainer.training
        images = self._augment(images) if training else render(images, self.input_size[1], self.mean, self.std)
        if training and self._mixers:
            images, labels = self._mix(images, labels)
        return (images, labels) if trainer is None else trainer.precision_plugin.convert_input((images, labels))

    def _readable(self, paths: list[str]) -> list[str]:
        """Those of the files that are predicted."""
        return paths

    def _marking(self, loader: DataLoader[Batch]) -> DataLoader[Batch]:
        """The loader, whose data set marks images that cannot be read if that is asked for."""
        if hasattr(loader.dataset, "mark_broken"):
            loader.dataset.mark_broken = self.mark_broken
        return loader

    def _read(self) -> Mapping[str, Part]:
        parts = self.parts()
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"expected {self.num_classes} classes, got {len(self.class_names)}; is the data complete?")
        if self.val_fraction is not None and "val" in parts:
            parts["train"] = parts["train"].join(parts.pop("val"))
        if "val" not in parts:
            share = _VAL_FRACTION if self.val_fraction is None else self.val_fraction
            cut = split_indices(parts["train"].own_labels, {"val": share}, SPLIT_SEED)
            parts |= {name: parts["train"].take(indices) for name, indices in cut.items()}
            if share and not len(parts["val"]):
                rank_zero_info("there is no validation part: no class has more than one image to cut it from")
        parts["train"] = self._few_labels(parts["train"])
        for name in set(parts) - {"train"}:
            if len(parts[name]) and (absent := absent_classes(parts[name].own_labels, self.class_names)):
                rank_zero_info(f"there are no {name} images of {absent}")
        return self._held({name: parts[name].balanced() for name in _PARTS if name in parts and len(parts[name])})

    def _few_labels(self, train: Labelled) -> Labelled:
        labels = train.own_labels
        if self.shots is not None:
            return train.take(take_shots(labels, self.shots, self.seed, self.class_names))
        if self.fraction is not None:
            return train.take(take_fraction(labels, self.fraction, self.seed))
        return train

    def _held(self, parts: dict[str, Labelled]) -> dict[str, Labelled]:
        held = {name: self.hold(part) for name, part in parts.items()}
        if not self.device_cache:
            return held
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if device.type == "cpu":
            rank_zero_info("device_cache: the training device is the CPU; images lie in memory, as in_memory has them")
        moved = {id(p.images): p.images.to(device) for p in held.values() if isinstance(p.images, Tensor)}
        return {name: Labelled(moved[id(p.images)], p.labels, p.chosen) for name, p in held.items()}

    def _normalize_as_pretrained(self) -> None:
        """Take mean and std of the first timm network in the model."""
        model: Any = getattr(self.trainer, "lightning_module", None)
        networks = model.modules() if model is not None else ()
        config = next((net.pretrained_cfg for net in networks if hasattr(net, "pretrained_cfg")), None)
        if config is None:
            raise ValueError("normalize=backbone needs a model with a timm network; give mean and std")
        for name in ("mean", "std"):
            setattr(self, name, _channels(name, self._given[name] or config[name], self.input_size[0]))

    def _place(self) -> tuple[int, int]:
        """How many processes there are, and which of them this one is."""
        trainer: Any = self.trainer
        return (trainer.world_size, trainer.global_rank) if trainer else (1, 0)

    def _loader(
        self, name: str, training: bool = False, workers: int | None = None, as_stored: bool = False
    ) -> DataLoader[Batch]:
        """A loader of a part; None is as many workers as the user asks for, or as are good."""
        if name not in self._parts:
            raise ValueError(f"{type(self).__name__} has no {name} images, only {', '.join(self._parts)}")
        part = self._parts[name]
        trainer: Any = self.trainer
        if len(part) < self._place()[0]:
            raise ValueError(f"expected at least one {name} image a process, got {len(part)} for {self._place()[0]}")
        if training:
            seed = torch.initial_seed() if trainer is None else trainer.strategy.broadcast(torch.initial_seed())
            self._run_seed, self._step = mixed_seed(seed), None
        if as_stored:
            part = part.as_stored()
        return self._load(self._dataset(part, training), part.in_memory, training, workers)

    def _load(
        self, dataset: Dataset[Batch], in_memory: bool, training: bool = False, workers: int | None = None
    ) -> DataLoader[Batch]:
        trainer: Any = self.trainer
        if workers is None:
            workers = self.num_workers
        if workers is None:
            workers = 0 if in_memory else _free_cores(trainer)
        on_gpu = trainer is not None and trainer.strategy.root_device.type == "cuda"
        kind = EpochLoader if training else DataLoader
        return kind(
            dataset,
            **self._batching(dataset, training),
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=on_gpu and not self.device_cache,
            persistent_workers=workers > 0,
            # Its own, so that the workers' seeds take no number from the stream that the model draws from.
            generator=torch.Generator(),
        )

    def _batching(self, dataset: Any, training: bool) -> dict[str, Any]:
        """How the loader makes batches; streams make them themselves."""
        if isinstance(dataset, IterableDataset):
            return {"batch_size": None}
        world_size, rank = self._place()
        sampler: Any = None
        if training:
            sampler = EpochSampler(dataset, world_size, rank, self._run_seed, self._taken(self.batch_size))
        elif world_size > 1:
            sampler = UnrepeatedDistributedSampler(dataset, world_size, rank, shuffle=False)
        # Batch normalisation cannot train on a single image: one that is left over is left out of the epoch.
        drop_last = training and self.batch_size > 1 and len(sampler) % self.batch_size == 1
        return {"batch_size": self.batch_size, "sampler": sampler, "drop_last": drop_last}

    def _dataset(self, part: Any, training: bool) -> Dataset[Batch]:
        if part.in_memory:
            return TensorImages(part)
        if training and self.recipe.crops:
            return FileImages(part, self.input_size[1], self.recipe, self.views, self._run_seed, self.decoding)
        return FileImages(part, self.input_size[1], decoding=self.decoding)

    def _augment(self, images: Tensor) -> Tensor:
        """uint8 images augmented and normalised: ``(N, C, S, S)``, or ``(N, V, C, S, S)`` if there are views."""
        generator = self._random()
        cropped = self.recipe.crops and not self._parts["train"].in_memory
        if images.ndim == 5:
            images = images.flatten(0, 1)
        elif self.views > 1:
            images = images.repeat_interleave(self.views, dim=0)
        count, _, height, width = images.shape
        boxes = draw_boxes(self.recipe, count, height, width, generator) if self.recipe.crops and not cropped else None
        changes = draw_changes(self.recipe, count, generator)
        images = render(images, self.input_size[1], self.mean, self.std, boxes, changes)
        return images.view(-1, self.views, *images.shape[1:]) if self.views > 1 else images

    def _mix(self, images: Tensor, labels: Tensor) -> Batch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=self._random())))
            mixer = self._mixers[int(torch.randint(len(self._mixers), ()))]
            return mixer(images, labels)

    def _taken(self, size: int = 1) -> Callable[[Any], int]:
        """Batches of ``size`` that a run which is resumed has trained on in its epoch, as `Taken` tells them."""
        return Taken(lambda source: size * _batch_of_epoch(self.trainer) if _trains_on(self.trainer, source) else 0)

    def _random(self) -> torch.Generator:
        """Of this process, epoch and batch, so that a run that is resumed goes on as it would have."""
        trainer: Any = self.trainer
        step = trainer.current_epoch, _batch_of_epoch(trainer)
        if self._generator is None or step != self._step:
            self._step = step
            self._generator = torch.Generator().manual_seed(mixed_seed(self._run_seed, *step, trainer.global_rank))
        return self._generator


def _batch_of_epoch(trainer: Any) -> int:
    """Training batches of this epoch that came before the one that is fetched or made ready now."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready


def _trains_on(trainer: Any, source: Any) -> bool:
    """Whether it is from this sampler or stream that the trainer gets its batches, and not somebody else's loader."""
    loaders: Any = getattr(trainer and trainer.fit_loop._combined_loader, "flattened", [])
    return any(source is loader.dataset or source is getattr(loader, "sampler", None) for loader in loaders)


def _as_it_is(batch: Any) -> Any:
    return batch


def _mixers(mixup: float, cutmix: float, num_classes: int) -> list[Any]:
    mixers = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
    return [mixer(alpha=alpha, num_classes=num_classes) for mixer, alpha in mixers if alpha > 0]


def _free_cores(trainer: Any) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_WORKERS, cores // max(1, getattr(trainer, "num_devices", 1)))


def _check_numbers(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"expected {name} of at least 1, got {number}")


def _check_shares(fraction: float | None, val_fraction: float | None) -> None:
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"expected fraction in (0, 1], got {fraction}")
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise ValueError(f"expected val_fraction in [0, 1), got {val_fraction}")


def _check_mixing(mixup: float, cutmix: float, views: int) -> None:
    if min(mixup, cutmix) < 0 or (views > 1 and max(mixup, cutmix) > 0):
        raise ValueError(
            f"expected mixup and cutmix of at least 0, and 0 with views={views} above 1, "
            f"got mixup={mixup}, cutmix={cutmix}"
        )


def _channels(name: str, values: Sequence[float], channels: int) -> Tensor:
    """Values of the channels; one channel gets the mean of three."""
    if channels == 1 and len(values) == 3:
        values = [sum(values) / 3]
    if len(values) != channels or (name == "std" and min(values) <= 0):
        raise ValueError(f"expected {name} of {channels} {'positive ' * (name == 'std')}numbers, got {list(values)}")
    return torch.tensor(values, dtype=torch.float32)

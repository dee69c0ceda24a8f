"""The base class of datamodules: options, loaders, and preprocessing of a batch on its device.

Legend: ``N`` images, ``V`` views, ``C`` channels, ``H W`` height and width, ``S`` side of an image, ``K`` classes.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augmenting import BatchAugmentation
from .decoding import CENTRE, Decoding
from .images import Batch, FileImages, Labelled, Part, TensorImages, mixed_seed
from .listing import image_paths
from .loading import EpochLoader, Loader, Taken, end_by_parent
from .recipes import Augmentation, recipe_for

Normalize = Literal["data", "backbone"]
_MOST_WORKERS = 8


def _of_batches(name: str) -> Any:
    """A property of the datamodule that forwards to its `BatchAugmentation`."""
    return property(
        lambda self: getattr(self._augmentation, name), lambda self, value: setattr(self._augmentation, name, value)
    )


class ImageDataModule(LightningDataModule, ABC):
    """Labelled images, augmented and normalised batch by batch on the batch's device. Abstract.

    Only the batches that a Trainer trains on are augmented; in every other stage images are resized if necessary and
    normalised. `train_plain_dataloader` has the training images without augmentation in a fixed order, for measuring
    neural collapse. With several processes each image is evaluated once, and all processes train on the same number of
    images. Predictions are in the order of the data set.

    Args:
        num_classes: Number of classes ``K``.
        input_size: Shape ``(C, H, W)`` of an image as it is stored.
        data_mean: Mean of the data's channels, for pixels in 0..1.
        data_std: Standard deviation of the data's channels, for pixels in 0..1.
        batch_size: Images per batch and process.
        num_workers: Worker processes per loader; None is 0 for images in memory, and otherwise the number of cores per
            process, at most 8: more rarely help, and each costs memory.
        augmentation: A recipe's name, a Recipe, or a Recipe's arguments. ``plain`` is no augmentation; ``standard`` a
            random resized crop and a flip; ``trivial`` adds TrivialAugment; ``simclr`` SimCLR's colour jitter and, from
            64 pixels on, blur.
        strength: Strength of the recipe: 0 is no augmentation, 1 the published one.
        views: Views ``V`` of each training image; more than one make batches ``(N, V, C, S, S)``.
        mixup: Strength alpha of mixup (Zhang et al. 2018) in training; 0 is none. Labels become class probabilities,
            ``(N, K)``.
        cutmix: Strength alpha of CutMix (Yun et al. 2019); together with mixup each batch gets one of the two.
        image_size: Side ``S`` of the images in batches; None is the side of the stored images.
        normalize: ``data`` uses the data's mean and standard deviation, ``backbone`` those of the training of the
            model's timm network: of its pre-training, or of the checkpoint that is tested. None is ``data`` where the
            data's are known; where they are assumed to be ImageNet's, it is ``backbone`` if there is such a network.
        mean: Mean of each channel, for pixels in 0..1; replaces that of ``normalize``.
        std: Standard deviation of each channel, for pixels in 0..1; replaces that of ``normalize``.

    Attributes:
        class_names: Names of the classes in the order of their labels; the data set's own once it is set up. Empty
            where the data only number the classes.
        input_size: Shape ``(C, S, S)`` of an image in a batch.
        recipe: The recipe of ``augmentation`` at its ``strength``.
        decoding: Options for decoding image files.
        predict_part: The part whose images are predicted, unless `predict_files` sets others.
        mark_broken: Whether a prediction continues if an image cannot be read, with zeros labelled -1 in its place. The
            command line sets it; otherwise an error names the file.

    Raises:
        ValueError: An argument is out of its range, or contradicts another.
    """

    recipe, views, mean, std = map(_of_batches, ("recipe", "views", "mean", "std"))
    # Whether data_mean and data_std are of the data, and not assumed.
    knows_statistics: ClassVar[bool] = True

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
        normalize: Normalize | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_numbers(batch_size=batch_size, image_size=image_size)
        if normalize is not None:
            check_choice("normalize", normalize, Normalize)
        self.num_classes = num_classes
        self.class_names = [str(label) for label in range(num_classes)]
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
            data_mean if mean is None else mean,
            data_std if std is None else std,
            recipe_for(augmentation, strength, size),
            views,
            mixup,
            cutmix,
        )
        self.decoding = Decoding(channels=input_size[0], centre=1.0)
        self.predict_part = "test"
        self.mark_broken = False
        self._parts: Mapping[str, Part] = {}
        self._files: list[str] | None = None
        self._seeded = self._run_seed = 0
        self._before: dict[str, Any] = {}

    @property
    def augments(self) -> bool:
        """Whether training images are augmented: they differ from evaluation, and from epoch to epoch."""
        return self._augmentation.augments

    @property
    def follows_network(self) -> bool:
        """Whether mean and std are those of the model's timm network, if it has one, unless they are given."""
        return self.normalize == "backbone" or (self.normalize is None and not self.knows_statistics)

    @property
    def splits(self) -> list[str]:
        """Which of ``train``, ``val`` and ``test`` there are, once the datamodule is set up."""
        return list(self._parts)

    @property
    def class_counts(self) -> np.ndarray | None:
        """Training images per class, ``(K,)``, after `setup`; None if counting requires reading all samples."""
        labels = getattr(self._parts.get("train"), "own_labels", None)
        return None if labels is None else np.bincount(labels, minlength=self.num_classes)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The preprocessing of evaluation, in built-in types under timm's names, once the datamodule is set up.

        Two entries are not timm's: ``stored_size`` is the side to which a file is decoded before it is resized to
        ``input_size``, and ``value_range`` is that of `Decoding`.
        """
        self._follow_network()
        return {
            "input_size": list(self.input_size),
            "mean": _shortest(self.mean),
            "std": _shortest(self.std),
            "interpolation": "bilinear",
            "crop_pct": CENTRE if self.decoding.centre is None else self.decoding.centre,
            "crop_mode": "center",
            "stored_size": self._stored_size,
            "value_range": None if self.decoding.value_range is None else list(self.decoding.value_range),
        }

    @abstractmethod
    def parts(self) -> Mapping[str, Part]:
        """The data set's own splits: ``train``, and ``val`` and ``test`` if it has them; sets ``class_names``."""

    @abstractmethod
    def _loader(self, name: str, training: bool = False, as_stored: bool = False) -> DataLoader[Batch]:
        """A loader of a part: for training, in the order of the data set, or in the fixed order of evaluation."""

    def state_dict(self) -> dict[str, Any]:
        """The numbers that batches depend on, and whether an epoch has begun that is not at its end."""
        within = False
        if self.trainer is not None:
            progress = _batch_progress(self.trainer)
            within = progress.current.ready > 0 and not progress.is_last_batch
        return {**self._numbers(), "within_epoch": within}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the state of an interrupted run, of which a run that goes on with other batches warns."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._before = dict(state_dict)

    def setup(self, stage: str) -> None:
        """Read the parts, once, log their numbers of images per class, and take the seed of rank 0."""
        trainer: Any = self.trainer
        # Here, where all processes are, and not when a loader is made, which one of them may do alone.
        self._take_seed(torch.initial_seed() if trainer is None else trainer.strategy.broadcast(torch.initial_seed()))
        if not self._parts:
            self._parts = self._read()
            counts = (f"{name} {part.describe(self.num_classes)}" for name, part in self._parts.items())
            if self._parts:
                rank_zero_info(f"{type(self).__name__} images: {', '.join(counts)}")
        if self.normalize == "backbone" and not self._follow_network():
            raise ValueError("normalize=backbone needs a model with a timm network; give mean and std")

    def train_dataloader(self) -> DataLoader[Batch]:
        """Training images in random order."""
        if self.trainer is None:
            self._take_seed(torch.initial_seed())
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
        """The images of `predict_part` in the order of the data set, or those of `predict_files`."""
        if self._files is None:
            loader = self._loader(self.predict_part, as_stored=True)
        else:
            # Here, since the data's setup, which may choose the crop, can come after `predict_files`.
            unknown = Labelled.all(self._files, [0] * len(self._files))
            files = FileImages(unknown, self._stored_size, decoding=replace(self.decoding, banner=0))
            loader = self._load(files, **self._in_order(files))
        if hasattr(loader.dataset, "mark_broken"):
            loader.dataset.mark_broken = self.mark_broken
        return loader

    def predict_files(self, images: str | Path | Sequence[str | Path]) -> list[str]:
        """Set the images to predict, with evaluation's preprocessing; returns their paths.

        Args:
            images: A folder, searched recursively, a file, or several.

        Raises:
            FileNotFoundError: No such folder or file, or no images in the folder.
        """
        paths = self._readable(image_paths(images)) if isinstance(images, str | Path) else list(map(str, images))
        self._files = paths
        return paths

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Preprocess uint8 images: augmentation in training, then normalisation."""
        images, labels = batch
        trainer: Any = self.trainer
        if trainer is not None and trainer.training:
            step = self._run_seed, trainer.current_epoch, _batch_progress(trainer).current.ready, trainer.global_rank
            cropped = not self._parts["train"].in_memory
            images, labels = self._augmentation.train(images, labels, step, cropped)
        else:
            images = self._augmentation.evaluate(images)
        return (images, labels) if trainer is None else trainer.precision_plugin.convert_input((images, labels))

    def _take_seed(self, seed: int) -> None:
        self._seeded, self._run_seed = seed, mixed_seed(seed)

    def _read(self) -> Mapping[str, Part]:
        """The parts in use, after all options are applied."""
        return self.parts()

    def _readable(self, paths: list[str]) -> list[str]:
        """The files that are predicted, a subset of ``paths``."""
        return paths

    def _follow_network(self) -> bool:
        """Take mean and std of the first timm network in the model, if they follow it; whether there is one.

        They are taken again for each loader, since a Trainer loads a checkpoint after `setup`.
        """
        model: Any = getattr(self.trainer, "lightning_module", None)
        networks = model.modules() if model is not None and self.follows_network else ()
        config = next((net.pretrained_cfg for net in networks if hasattr(net, "pretrained_cfg")), None)
        if config is not None:
            mean, std = (config[name] if given is None else given for name, given in self._given.items())
            self._augmentation.normalise(mean, std)
        return config is not None

    def _place(self) -> tuple[int, int]:
        """World size and rank."""
        trainer: Any = self.trainer
        return (trainer.world_size, trainer.global_rank) if trainer else (1, 0)

    def _part(self, name: str) -> Any:
        """A part, which must have at least one image per process."""
        if not self._parts:
            raise ValueError(
                f"expected setup() before a loader of {name} images; call it first, or let a Trainer do so"
            )
        if name not in self._parts:
            raise ValueError(
                f"{type(self).__name__} has no {name} images, only {', '.join(self._parts)}; add some, or choose "
                "another part (--split of predict and evaluate)"
            )
        part, (processes, _) = self._parts[name], self._place()
        if len(part) < processes:
            raise ValueError(f"expected at least one {name} image per process, got {len(part)} for {processes}")
        return part

    def _load(
        self, dataset: Dataset[Batch], training: bool = False, workers: int | None = None, **batching: Any
    ) -> DataLoader[Batch]:
        """A loader of a data set; None takes ``num_workers``, or its default."""
        self._follow_network()
        trainer: Any = self.trainer
        if workers is None:
            workers = self.num_workers
        if workers is None:
            workers = 0 if isinstance(dataset, TensorImages) else free_cores(trainer)
        to_gpu = trainer is not None and trainer.strategy.root_device.type == "cuda"
        there = isinstance(dataset, TensorImages) and dataset.images.is_cuda
        kind = EpochLoader if training else Loader
        return kind(
            dataset,
            **batching,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=end_by_parent,
            pin_memory=to_gpu and not there,
            persistent_workers=workers > 0,
            # A separate generator, so that seeding workers draws no number from the global generator of the model.
            generator=torch.Generator(),
        )

    def _in_order(self, dataset: Any) -> dict[str, Any]:
        """Loader options for batches in the order of the data set, each sample once over all processes."""
        world_size, rank = self._place()
        several = world_size > 1
        sampler = UnrepeatedDistributedSampler(dataset, world_size, rank, shuffle=False) if several else None
        return {"batch_size": self.batch_size, "sampler": sampler}

    def _taken(self, size: int = 1) -> Callable[[Any], int]:
        """The number of batches of ``size`` that a resumed run has already trained on in its epoch; see `Taken`."""
        trainer: Any = self.trainer
        fetched = (lambda: _batch_progress(trainer).total.ready) if trainer else (lambda: 0)
        return Taken(lambda source: size * self._taken_batches(source), fetched)

    def _taken_batches(self, source: Any) -> int:
        """The number of the epoch's batches that were trained on, if they come from this sampler or stream."""
        trainer: Any = self.trainer
        if not _trains_on(trainer, source):
            return 0
        batches = _batch_progress(trainer).current.ready
        within = self._before.pop("within_epoch", False)  # once: later epochs begin with their first batch
        # An interrupted epoch has had enough larger batches, perhaps, and begins again; a complete one goes on with
        # smaller batches.
        if within or 0 < batches < trainer.num_training_batches:
            self._warn_of_other_batches()
        return batches if batches < trainer.num_training_batches else 0

    def _warn_of_other_batches(self) -> None:
        now = self._numbers()
        if changed := [name for name, number in now.items() if self._before.get(name, number) != number]:
            before, given = (", ".join(f"{name} {of[name]}" for name in changed) for of in (self._before, now))
            rank_zero_warn(
                f"expected {before} as in the interrupted run, to go on within an epoch, got {given}: the rest of this "
                "epoch has other batches, and some of its images are seen twice and others not at all; give the "
                "numbers as they were, or resume from a checkpoint of an epoch's end"
            )

    def _numbers(self) -> dict[str, Any]:
        """What the batches of an epoch depend on."""
        images = {"images": len(self._parts["train"])} if "train" in self._parts else {}
        return {"batch_size": self.batch_size, "processes": self._place()[0], "seed_everything": self._seeded, **images}


def _batch_progress(trainer: Any) -> Any:
    """The trainer's progress within the epoch; ``current.ready`` is the index of the batch that is being fetched."""
    return trainer.fit_loop.epoch_loop.batch_progress


def _trains_on(trainer: Any, source: Any) -> bool:
    """Whether the trainer's training batches come from this sampler or stream."""
    loaders: Any = getattr(trainer and trainer.fit_loop._combined_loader, "flattened", [])
    return any(source is loader.dataset or source is getattr(loader, "sampler", None) for loader in loaders)


def _as_it_is(batch: Any) -> Any:
    return batch


def free_cores(trainer: Any) -> int:
    """The number of cores per process, which is the default number of workers, at most `_MOST_WORKERS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_WORKERS, cores // max(1, getattr(trainer, "num_devices", 1)))


def check_numbers(**numbers: int | None) -> None:
    """Refuse numbers below 1; None is allowed.

    Raises:
        ValueError: A number is below 1.
    """
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"expected {name} of at least 1, got {number}")


def check_choice(name: str, value: str, choices: Any) -> None:
    """Refuse a value that is not among those of a ``Literal``.

    Raises:
        ValueError: The value is not among them.
    """
    if value not in get_args(choices):
        raise ValueError(f"expected {name} to be one of {', '.join(get_args(choices))}, got {value!r}")


def _shortest(values: Tensor) -> list[float]:
    """Float32 values by the fewest digits that give them back exactly."""
    return [float(str(value)) for value in values.cpu().numpy()]

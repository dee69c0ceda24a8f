"""A cache of the frozen layers' outputs, which then replace the images in training and validation batches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, Subset, default_collate
from torchvision.datasets import DatasetFolder

from ncfinetune.checksums import fingerprint, raw
from ncfinetune.loaders import is_stream, like, whole_set
from ncfinetune.passes import evaluation, on_device, plain_loader, ready_batches
from ncfinetune.samples import is_as_stored
from ncfinetune.split import Split
from ncfinetune.store import Stored, StoredSet, in_memory, on_disk

Place = Literal["none", "memory", "disk"]
# Images that are loaded several times to see whether they change, and images that are run to test a cut.
_SAMPLES, _TRIED = 8, 4
_RANDOM = (
    "the cache stores the frozen layers' output for each training image once, but the images differ each time they are "
    "loaded (random augmentation); train without augmentation, or without the cache"
)


class PrefixCache(Callback):
    """Runs the frozen layers over the images of a datamodule once, and stores their outputs for training.

    During a run the datamodule's training and validation loaders yield `Stored` values, outputs of the prefix of a
    `Split`, in place of images, in the same order and batches. Validation keeps its images if a frozen layer has a
    hook, such as the hook of a callback that measures it. It is a callback so that `on_exception` restores the loaders.

    Args:
        place: ``memory`` or ``disk``; ``none`` stores nothing.
        folder: Folder for the files of ``disk``.
        split: The network, which is cut during a run.
    """

    def __init__(self, place: Place, folder: str, split: Split) -> None:
        self.place = place
        self.folder = Path(folder)
        self._split = split
        self._undo: Callable[[], None] | None = None
        self._train_rows: DataLoader[Any] | None = None

    def fill(self, trainer: Trainer, module: LightningModule, frozen: Mapping[str, Tensor]) -> None:
        """Store the frozen layers' outputs for all images, and replace the datamodule's loaders.

        Raises:
            ValueError: The training images are random, or the network cannot be run from its first tuned layer on.
            OSError: The disk is full.
        """
        if self.place == "none":
            return
        plain = plain_loader(trainer, f"cache={self.place!r}")
        data: Any = getattr(trainer, "datamodule", None)
        refuse_random(trainer, module, data.train_dataloader(), plain)
        loaders = {"train": whole_set(plain)}
        with evaluation(trainer, module):
            images = next(iter(ready_batches(trainer, plain)))[0][:_TRIED]
            start = self._cut(images)
            shape = self._split.prefix(images).shape[1:]
            if trainer.limit_val_batches and is_overridden("val_dataloader", data):
                loaders |= self._validation(data.val_dataloader())
            network = repr(sorted(self._split.backbone.spec.items(), key=str))
            base = (fingerprint(frozen) if self.place == "disk" else "", network, start, trainer.precision)
            stored = {split: self._store(trainer, loader, base, shape) for split, loader in loaders.items()}
        self._say(stored)
        self._train_rows = stored["train"].loader_like(plain)
        self._undo = replace_loaders(data, stored)
        _forget_loaders(trainer)

    def _validation(self, loader: Any) -> dict[str, DataLoader[Any]]:
        """The loader of validation images if stored values can replace them; otherwise logs why they cannot."""
        if not _any_order(loader):
            reason = "come from several loaders, from none or as a stream"
        elif not _samples(loader):
            return {}
        elif self._split.has_foreign_hook():
            reason = "run through all layers, since a frozen layer has a hook"
        else:
            return {"val": whole_set(loader)}
        if loader != []:
            rank_zero_info(f"cache: validation images {reason}, and are not stored")
        return {}

    def train_rows(self, trainer: Trainer, purpose: str) -> DataLoader[Any]:
        """Training images without augmentation in a fixed order; during a run the stored values of them.

        Raises:
            ValueError: The trainer has no datamodule with a ``train_plain_dataloader``.
        """
        return plain_loader(trainer, purpose) if self._train_rows is None else self._train_rows

    def drop(self) -> None:
        """Restore the datamodule's loaders of images, and free the stored values."""
        if self._undo is not None:
            self._undo()
        self._undo = self._train_rows = None
        self._split.join()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the datamodule's loaders of images."""
        self.drop()

    def _cut(self, images: Tensor) -> str:
        try:
            return self._split.cut(images)
        except ValueError as error:
            raise ValueError(f'cache={self.place!r} {error}; use cache="none", or train another layer') from error

    def _store(
        self, trainer: Trainer, loader: DataLoader[Any], base: tuple[str, ...], shape: Sequence[int]
    ) -> StoredSet:
        samples = _samples(loader)

        def rows() -> Iterator[tuple[Tensor, Tensor]]:
            count = 0
            for images, labels in ready_batches(trainer, loader):
                yield self._split.prefix(images).cpu(), labels.cpu()
                count += len(labels)
            if count != samples:
                raise ValueError(f"the cache needs a loader of all {samples} images, in order; it gave {count}")

        if self.place == "memory":
            return in_memory(rows(), samples)
        key = hashlib.sha256(repr((base, data_key(trainer, loader))).encode()).hexdigest()[:16]
        return on_disk(rows, (samples, *shape), self.folder / key, trainer.strategy)

    def _say(self, stored: Mapping[str, StoredSet]) -> None:
        size = sum(part.values.numel() * part.values.element_size() for part in stored.values())
        shape = tuple(next(iter(stored.values())).values.shape[1:])
        where = "memory" if self.place == "memory" else str(self.folder)
        rank_zero_info(f"cache: {sum(map(len, stored.values())):,} images as {shape}, {size / 1e6:,.1f} MB in {where}")


def refuse_random(trainer: Trainer, module: LightningModule, train: Any, plain: Any) -> None:
    """Refuse training images that differ from the plain ones, or from one epoch to the next.

    The datamodule's attribute ``augments`` is read if it has one. Whatever it says, some images, spread over the data
    set, are loaded three times with the preprocessing of training and once with that of evaluation.

    Raises:
        ValueError: They differ, so that one stored value cannot replace an image; or they come as a stream.
    """
    if not (_any_order(train) and _any_order(plain)):
        raise ValueError(
            "the cache needs a DataLoader of single images that can be read in any order, got several loaders, a "
            'stream, or a data set that makes its batches; use cache="none"'
        )
    if _samples(train) != _samples(plain):
        raise ValueError("the cache needs a train_dataloader() over the same images as train_plain_dataloader()")
    if getattr(getattr(trainer, "datamodule", None), "augments", False):
        raise ValueError(_RANDOM)
    with isolate_rng():
        draws = [_sample(trainer, train) for _ in range(3)]
    with evaluation(trainer, module):
        expected = _sample(trainer, plain)
    if not all(_same(draw, expected) for draw in draws):
        raise ValueError(_RANDOM)


def _any_order(loader: Any) -> bool:
    return not is_stream(loader) and loader.batch_sampler is not None


def _sample(trainer: Trainer, loader: DataLoader[Any]) -> Any:
    dataset: Any = loader.dataset
    count = min(_SAMPLES, len(dataset))
    positions = [number * (len(dataset) - 1) // max(1, count - 1) for number in range(count)]
    here: dict[str, Any] = {"num_workers": 0, "multiprocessing_context": None, "persistent_workers": False}
    return on_device(trainer, next(iter(like(loader, positions, batch_size=count, **here))))


def _same(a: Any, b: Any) -> bool:
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(_tensors(a), _tensors(b), strict=True))


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def data_key(trainer: Trainer, loader: DataLoader[Any]) -> str:
    """Fingerprint of a data set and of its preprocessing.

    Where paths and labels are known without loading an image, in torchvision's folders and in data sets with
    ``labelled_files``, it is computed from these and from the files' sizes and modification times, for other data sets
    from every sample; in both cases also from some preprocessed images.
    """
    digest = hashlib.sha256(str(_samples(loader)).encode())
    files = _files(loader.dataset, loader.collate_fn is default_collate)
    if files is None:
        for batch in loader:
            for tensor in _tensors(batch):
                digest.update(raw(tensor))
    else:
        for path, label in files:
            status = os.stat(path)
            digest.update(os.fsencode(f"{path} {status.st_size} {status.st_mtime_ns};"))
            digest.update(raw(torch.as_tensor(label)))
    for tensor in _tensors(_sample(trainer, loader)):
        digest.update(raw(tensor))
    return digest.hexdigest()


def _files(dataset: Any, collated: bool) -> list[tuple[str, Any]] | None:
    """Path and label of each sample; None if a class of others, or a collation that is not torch's, may change labels.

    A data set's attribute ``samples`` alone can hold anything.
    """
    if not is_as_stored(dataset):
        return None
    if isinstance(dataset, Subset):
        inner = _files(dataset.dataset, collated)
        return None if inner is None else [inner[i] for i in dataset.indices]
    if hasattr(dataset, "labelled_files"):
        return dataset.labelled_files
    if collated and isinstance(dataset, DatasetFolder):
        final = dataset.target_transform or int
        return [(path, final(label)) for path, label in dataset.samples]
    return None


def replace_loaders(data: Any, stored: Mapping[str, StoredSet]) -> Callable[[], None]:
    """Make the datamodule's loaders yield stored values of ``train`` and ``val``; returns a function that undoes it.

    The datamodule's batch-transfer hooks then leave stored values unchanged.
    """
    new: dict[str, Any] = {
        f"{split}_dataloader": _constant(split_set.loader_like(getattr(data, f"{split}_dataloader")()))
        for split, split_set in stored.items()
    }
    for name in ("on_before_batch_transfer", "on_after_batch_transfer"):
        new[name] = _for_images(getattr(data, name))
    for name, method in new.items():
        setattr(data, name, method)

    def undo() -> None:
        for name in new:
            vars(data).pop(name, None)

    return undo


def _forget_loaders(trainer: Trainer) -> None:
    """Make a run that has its loaders already, to count its steps for instance, request them again."""
    for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop):
        loop._combined_loader = None


def _samples(loader: DataLoader[Any]) -> int:
    return len(cast(Sized, loader.dataset))


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def _for_images(hook: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
    return lambda batch, dataloader_idx: batch if isinstance(batch[0], Stored) else hook(batch, dataloader_idx)

"""The frozen layers' part of training, done once: what they make of each image stands for the image from then on.

Legend: ``N`` samples, ``d`` width of the penultimate features, ``d_l`` of the skipped layer's.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from ncfinetune.backbone import Backbone
from ncfinetune.checksums import fingerprint, raw
from ncfinetune.passes import evaluation, in_order, like, on_device, plain_loader, ready_batches
from ncfinetune.store import Stored, StoredSet, in_memory, on_disk
from ncfinetune.tail import Tail

Place = Literal["none", "memory", "disk"]
# Images that are drawn again and again to see whether they change, and that are run to try a cut.
_SAMPLES, _TRIED = 8, 4
_RANDOM = (
    "the cache stores what the frozen layers make of each training image once, but these differ each time they are "
    "drawn (random augmentation); train without augmentation, or without the cache"
)


class PrefixCache(Callback):
    """Runs what precedes the tuned layers over the images of a datamodule once, and lets training start from there.

    While a run lasts the datamodule's loaders of training and validation images give `Stored` values in place of
    images, in the same order and batches: what the first tuned layer gets (its network goes on as a `Tail`), or, where
    nothing but the head trains, the features. Validation keeps its images if a frozen layer has a hook, as of a
    callback that measures it. This is a callback itself for the sake of runs that break off.

    Args:
        place: ``memory`` or ``disk``.
        folder: Where files go.
        backbone: The network.
        layers: Its tuned layers and the one that is skipped from; none, if the backbone does not train.
        features: Maps images, and `Stored` values with the help of this object, to what the head gets.
        skip_from: The skipped layer, whose features are stored too where nothing but the head trains.

    Attributes:
        train_rows: While a run lasts, `Stored` values of the training images and their labels, in a fixed order.
    """

    def __init__(
        self,
        place: Place,
        folder: str,
        backbone: Backbone,
        layers: list[nn.Module],
        features: Callable[[Tensor | Stored], tuple[Tensor, ...]],
        skip_from: str | None = None,
    ) -> None:
        self.place = place
        self.folder = Path(folder)
        self._backbone, self._layers, self._features = backbone, layers, features
        self._skip_from = skip_from
        self._shape: tuple[int, ...] = ()
        self._tail: Tail | None = None
        self._undo: Callable[[], None] | None = None
        self.train_rows: DataLoader[Any] | None = None

    def fill(self, trainer: Trainer, module: LightningModule, frozen: Mapping[str, Tensor]) -> None:
        """Store what the frozen layers make of the images, and let the datamodule give that.

        Raises:
            ValueError: The training images are random, or the network can't go on from its tuned layers alone.
            OSError: The disk is full.
        """
        plain = plain_loader(trainer, f"cache={self.place!r}")
        data: Any = getattr(trainer, "datamodule", None)
        refuse_random(trainer, module, data.train_dataloader(), plain)
        loaders = {"train": plain}
        with evaluation(trainer, module):
            start = self._cut(next(iter(ready_batches(trainer, plain)))[0][:_TRIED])
            if trainer.limit_val_batches and is_overridden("val_dataloader", data):
                loaders |= self._validation(module, data.val_dataloader())
            network = repr(sorted(self._backbone.spec.items(), key=str))
            base = (fingerprint(frozen) if self.place == "disk" else "", network, start, trainer.precision)
            stored = {split: self._store(trainer, loader, base) for split, loader in loaders.items()}
        self._say(stored)
        self.train_rows = stored["train"].loader_like(plain)
        self._undo = replace_loaders(data, stored)
        _forget_loaders(trainer)

    def _validation(self, module: LightningModule, loader: Any) -> dict[str, DataLoader[Any]]:
        """The loader of validation images, where what is stored can stand for them; says so where it cannot."""
        if not isinstance(loader, DataLoader):
            reason = "come from several loaders or from none"
        elif self._is_heard(module):
            reason = "run through all layers, since a hook listens to a frozen one"
        else:
            return {"val": in_order(loader)}
        if loader != []:
            rank_zero_info(f"cache: validation images {reason}, and are not stored")
        return {}

    def penultimate(self, value: Tensor) -> Tensor:
        """Penultimate features ``(N, d)`` of a stored value; where nothing is left to run they are its first part."""
        return value[:, : self._backbone.dim] if self._tail is None else self._tail(value)

    def skipped(self, value: Tensor) -> Tensor | None:
        """Features of the skipped layer ``(N, d_l)``, where they are stored themselves."""
        return value[:, self._backbone.dim :] if self._tail is None else None

    def drop(self) -> None:
        """Give the datamodule its images back, and forget what was stored."""
        if self._undo is not None:
            self._undo()
        self._undo = self._tail = self.train_rows = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the datamodule its images back."""
        self.drop()

    def _cut(self, images: Tensor) -> str:
        """Cut the backbone before its first tuned layer, try that this makes no difference, and name the place."""
        start = "features" if self._skip_from is None else f"features and {self._skip_from}"
        try:
            if self._layers:
                start = "its first tuned layer"
                self._tail = Tail(self._backbone, self._layers, images)
                start = next(path for path, m in self._backbone.net.named_modules() if m is self._tail.layer)
            captured = self._captured(images)
            self._shape = tuple(captured.shape[1:])
            whole, part = self._features(images), self._features(Stored(captured))
            if not all(_close(a, b) for a, b in zip(whole, part, strict=True)):
                raise ValueError("what runs after it depends on more than its input")
        except ValueError as error:
            raise ValueError(
                f"cache={self.place!r} cannot go on from {start} of {self._backbone.spec['name']}: {error}; "
                'use cache="none", or train another layer'
            ) from error
        return start

    def _is_heard(self, module: LightningModule) -> bool:
        """Whether a module that will not run has a hook of somebody else's."""
        silent = list(self._backbone.modules()) if self._tail is None else self._tail.left_out()
        hooks = [hook for part in silent for hook in part._forward_hooks.values()]
        return any(getattr(hook, "__self__", None) is not module for hook in hooks)

    def _captured(self, images: Tensor) -> Tensor:
        """What is stored of images."""
        return torch.cat(self._features(images), 1) if self._tail is None else self._tail.capture(images)

    def _store(self, trainer: Trainer, loader: DataLoader[Any], base: tuple[str, ...]) -> StoredSet:
        samples = _samples(loader)

        def rows() -> Iterator[tuple[Tensor, Tensor]]:
            count = 0
            for images, labels in ready_batches(trainer, loader):
                yield self._captured(images).cpu(), labels.cpu()
                count += len(labels)
            if count != samples:
                raise ValueError(f"the cache needs a loader of all {samples} images, in order; it gave {count}")

        if self.place == "memory":
            return in_memory(rows(), samples)
        key = hashlib.sha256(repr((base, data_key(trainer, loader))).encode()).hexdigest()[:16]
        return on_disk(rows, (samples, *self._shape), self.folder / key, trainer.strategy)

    def _say(self, stored: Mapping[str, StoredSet]) -> None:
        size = sum(part.values.numel() * part.values.element_size() for part in stored.values())
        shape = tuple(next(iter(stored.values())).values.shape[1:])
        where = "memory" if self.place == "memory" else str(self.folder)
        rank_zero_info(f"cache: {sum(map(len, stored.values())):,} images as {shape}, {size / 1e6:,.1f} MB in {where}")


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-3 * float(a.abs().max()))


def refuse_random(trainer: Trainer, module: LightningModule, train: Any, plain: DataLoader[Any]) -> None:
    """Refuse training images that differ from the plain ones, or from one epoch to the next.

    The datamodule is asked whether it ``augments``, if it can tell. Whatever it says, some images, spread over the data
    set, are drawn three times as training sees them and once as evaluation does.

    Raises:
        ValueError: They differ, and so one stored value cannot stand for an image.
    """
    if not isinstance(train, DataLoader) or _samples(train) != _samples(plain):
        raise ValueError("the cache needs a train_dataloader() over the same images as train_plain_dataloader()")
    if getattr(getattr(trainer, "datamodule", None), "augments", False):
        raise ValueError(_RANDOM)
    with isolate_rng():
        draws = [_sample(trainer, train) for _ in range(3)]
    with evaluation(trainer, module):
        expected = _sample(trainer, plain)
    if not all(_same(draw, expected) for draw in draws):
        raise ValueError(_RANDOM)


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
    """Fingerprint of a data set and of what is done to its images.

    Of image files the paths, labels, sizes and times of change count (as in the ``samples`` of torchvision's folders),
    of anything else every sample; and in both cases some images as evaluation sees them.
    """
    digest = hashlib.sha256(str(_samples(loader)).encode())
    files = _files(loader.dataset)
    if files is None:
        for batch in loader:
            for tensor in _tensors(batch):
                digest.update(raw(tensor))
    else:
        for path, label in files:
            status = os.stat(path)
            digest.update(f"{path} {label} {status.st_size} {status.st_mtime_ns};".encode())
    for tensor in _tensors(_sample(trainer, loader)):
        digest.update(raw(tensor))
    return digest.hexdigest()


def _files(dataset: Any) -> list[tuple[str, int]] | None:
    if isinstance(dataset, Subset):
        inner = _files(dataset.dataset)
        return None if inner is None else [inner[i] for i in dataset.indices]
    return getattr(dataset, "samples", None)


def replace_loaders(data: Any, stored: Mapping[str, StoredSet]) -> Callable[[], None]:
    """Let the datamodule give what is stored of ``train`` and ``val`` images; returns what undoes it.

    Its treatment of batches on the device is for images only.
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
    """Let a run that has asked for its loaders already, for the number of its steps say, ask again (as tuners do)."""
    for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop):
        loop._combined_loader = None


def _samples(loader: DataLoader[Any]) -> int:
    return len(cast(Sized, loader.dataset))


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def _for_images(hook: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
    return lambda batch, dataloader_idx: batch if isinstance(batch[0], Stored) else hook(batch, dataloader_idx)

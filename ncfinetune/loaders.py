"""Loaders that are made from others, and which samples a loader draws.

A loader is asked by copies of its parts, so that neither it nor the global random generators advance.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)
from torch.utils.data.dataloader import _BaseDataLoaderIter

from ncfinetune.copies import copy_of
from ncfinetune.samples import known_labels, spread

# Packages whose distributed samplers draw all samples, over all processes.
_DISTRIBUTING = ("torch", "lightning", "pytorch_lightning", "ncfinetune")


def is_stream(loader: Any) -> bool:
    """Whether the samples of a loader come as a stream, which the processes may have divided among themselves."""
    return not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset)


def in_order(loader: Any, drawn: Sequence[int] | None = None) -> Any:
    """A loader of the samples that a loader draws, or of given ones, each once, in the order of the data set.

    Loaders of other kinds than torch's are returned as they are.
    """
    if not isinstance(loader, DataLoader):
        return loader
    if drawn is None and not is_stream(loader):
        drawn = drawn_by(loader)
    if drawn is not None and len(drawn) == len(cast(Sized, loader.dataset)):
        drawn = None
    return like(loader, drawn, persistent_workers=False)


def whole_set(loader: DataLoader[Any]) -> Any:
    """A loader of the whole data set of a loader, in its order, whatever that one draws."""
    return in_order(loader, range(len(cast(Sized, loader.dataset))))


def like(loader: DataLoader[Any], indices: Sequence[int] | None, **options: Any) -> DataLoader[Any]:
    """A loader of these samples of the same data set, with the same batch size; None is all, as for a stream."""
    made: dict[str, Any] = {
        "dataset": loader.dataset,
        "batch_size": batch_size_of(loader),
        "sampler": indices,
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "persistent_workers": loader.persistent_workers,
        "generator": torch.Generator(),
    }
    return _of_class(loader, DataLoader(**(made | options)))


def _of_class(loader: DataLoader[Any], made: DataLoader[Any]) -> DataLoader[Any]:
    """Give a new loader the class and attributes of another whose own ``__iter__`` may change the batches.

    A class that repeats one iterator for ever, such as timm's ``MultiEpochsDataLoader``, gives the batches as they are:
    it holds that iterator, or has put an endless sampler in place of its own.

    Raises:
        CopyError: An attribute has an iterator that cannot be copied.
    """
    own = {name: value for name, value in vars(loader).items() if name not in vars(made)}
    replaced = loader.batch_size is not None and type(loader.batch_sampler) is not BatchSampler
    repeats = replaced or any(isinstance(value, _BaseDataLoaderIter) for value in own.values())
    if type(loader).__iter__ is not DataLoader.__iter__ and not repeats:
        vars(made).update(copy_of(own, loader.dataset, shares_uncopyable=True))
        made.__class__ = type(loader)
    return made


def evenly(loader: Any, most: int, part: tuple[int, int] = (1, 1), processes: int = 1) -> Iterable[Any]:
    """Batches with at most ``most`` samples, evenly over the data set in its order; of a stream, the first ones.

    Of these batches part ``i`` of ``n`` has the ``i``-th and every ``n``-th after it, each with the samples that it has
    whatever ``n`` is. Of several ``processes``, all of which must call it, each has the samples that any of them draws.
    """
    index, number = part
    size = batch_size_of(loader)
    if is_stream(loader) or size is None:
        return _EveryNth(loader, index - 1, number, most)
    chosen = spread(drawn_by_all(loader, processes), most, loader.dataset)
    own = range(index * size - size, len(chosen), number * size)
    return like(loader, [sample for start in own for sample in chosen[start : start + size]])


class _EveryNth:
    """Every n-th of a loader's first batches, which have ``most`` samples together, as often as it is asked."""

    def __init__(self, loader: Iterable[Any], start: int, step: int, most: int) -> None:
        self.loader, self.start, self.step, self.most = loader, start, step, most

    def __iter__(self) -> Iterator[Any]:
        samples = 0
        for place, batch in enumerate(self.loader):
            if place % self.step == self.start:
                yield batch
            samples += extract_batch_size(batch)
            if samples >= self.most:
                return


def drawn_labels(loader: Any) -> Any:
    """Integer labels of the samples that a loader draws in an epoch, each once; None if they are unknown.

    Raises:
        CopyError: The loader's sampler cannot be copied.
    """
    labels = known_labels(getattr(loader, "dataset", None))
    if labels is None or is_stream(loader):
        return labels
    if sized_len(loader) is None:  # perhaps infinite
        return None
    return labels[np.asarray(drawn_by(loader), dtype=int)]


def draws_by_weights(loader: Any) -> bool:
    """Whether a loader samples by torch's `WeightedRandomSampler`."""
    return isinstance(loader, DataLoader) and isinstance(_own_sampler(loader), WeightedRandomSampler)


def drawn_by(loader: DataLoader[Any]) -> Sequence[int]:
    """Indices of the samples that a loader draws in an epoch, each once, in increasing order.

    They are drawn by a copy of its sampler, since a sampler may count epochs or have its own generator; the global
    generators are restored. One without a length may be endless: it has drawn all when as many draws as the data set
    has samples gave no new one.
    """
    sampler = _own_sampler(loader)
    if _draws_all(sampler):
        return range(len(sampler.data_source))
    if type(sampler).__iter__ is WeightedRandomSampler.__iter__:
        possible = sampler.weights.nonzero().squeeze(1)
        return range(len(possible)) if len(possible) == len(sampler.weights) else possible.tolist()
    own, of_batches = copy_of(sampler, loader.dataset), sampler is loader.batch_sampler
    with isolate_rng():  # from here on, since a sampler may draw its whole order when it is asked for an iterator
        length = sized_len(sampler)
        drawn: Iterable[Any] = islice(own, length)  # an epoch, since it may go on after it
        drawn = itertools.chain.from_iterable(drawn) if of_batches else drawn
        drawn = (index.item() if isinstance(index, Tensor) else index for index in drawn)  # tensors differ by identity
        most = len(cast(Sized, loader.dataset))
        return sorted(_until_nothing_new(drawn, most) if length is None else set(drawn))


def drawn_by_all(loader: DataLoader[Any], processes: int) -> Sequence[int]:
    """Indices that the samplers of all processes draw, since each may draw its own part; all processes must call it.

    They are exchanged only if they differ. Whether to compare them is decided by what is equal on all processes.
    """
    drawn = drawn_by(loader)
    if processes == 1 or _draws_all(_own_sampler(loader)):
        return drawn
    parts: list[Any] = [None] * processes
    dist.all_gather_object(parts, (len(drawn), hash(tuple(drawn))))
    if len(set(parts)) == 1:
        return drawn
    dist.all_gather_object(parts, drawn)
    return sorted(set(itertools.chain.from_iterable(parts)))


def _until_nothing_new(drawn: Iterable[int], patience: int) -> set[int]:
    """What is drawn until ``patience`` successive draws gave nothing new."""
    found: set[int] = set()
    in_vain = 0
    for index in drawn:
        in_vain = in_vain + 1 if index in found else 0
        found.add(index)
        if in_vain >= patience:
            break
    return found


def _draws_all(sampler: Any) -> bool:
    """Whether a sampler's way to iterate is torch's and draws each sample; a class derived from it may have another."""
    return type(sampler).__iter__ in (SequentialSampler.__iter__, RandomSampler.__iter__)


def _own_sampler(loader: DataLoader[Any]) -> Any:
    """The sampler of samples, not distributed; the batch sampler if batches are not made of samples.

    One that is derived from torch's `DistributedSampler` and iterates in a way of its own stays: it may draw a part.
    """
    sampler: Any = loader.sampler
    if loader.batch_sampler is not None and loader.batch_size is None:
        sampler = getattr(loader.batch_sampler, "sampler", loader.batch_sampler)
    while isinstance(sampler, DistributedSampler):
        # Around the user's own, if there is one: Lightning's, and that of catalyst, which many projects have copied.
        names = () if sampler.dataset is loader.dataset else ("_sampler", "sampler")
        wrapped = [inner for name in names if (inner := getattr(sampler.dataset, name, None)) is not None]
        if not wrapped and type(sampler).__iter__.__module__.split(".")[0] not in _DISTRIBUTING:
            return sampler
        sampler = wrapped[0] if wrapped else SequentialSampler(cast(Sized, loader.dataset))
    return sampler


def batch_size_of(loader: Any) -> int | None:
    """The batch size; None if the data set makes the batches itself, or is unknown."""
    if getattr(loader, "batch_sampler", None) is None or loader.batch_size is not None:
        return getattr(loader, "batch_size", None)
    size = getattr(loader.batch_sampler, "batch_size", None)
    return size or len(next(iter(copy_of(loader.batch_sampler, loader.dataset)), [0]))


def flat(loaders: Any) -> list[Any]:
    """The loaders in the order of their ``dataloader_idx``, from any nesting of lists and mappings."""
    return list(CombinedLoader(loaders, "sequential").flattened)


def new_samples(loader: Any, start: int, size: int) -> int:
    """How many of ``size`` samples from a process's ``start``-th on its sampler has not given to another process too.

    `DistributedSampler` repeats samples so that all processes get equally many; repeated samples come last. Of a
    `CombinedLoader` of several parts all count as new, since it is not known of which part they are.
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return size
    total = len(cast(Sized, sampler.dataset))
    own = len(range(sampler.rank, total, sampler.num_replicas))
    return max(0, min(size, own - start))

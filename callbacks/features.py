"""Features of one layer with their labels: of the last batch, of a pass, and of a second data set.

Legend: ``N`` samples of a batch, ``M`` rows of features, ``K`` classes, ``d`` feature width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from ncfinetune.gathering import numbers_of_all, rows_of_all, rows_of_parts
from ncfinetune.inputs import may_look
from ncfinetune.loaders import evenly, flat, is_stream
from ncfinetune.passes import data_precision, ready_batches

from .adapters import BatchReader
from .observer import LayerObserver


class FeatureSet(NamedTuple):
    """Features ``(M, d)`` and labels: classes ``(M,)``, or class probabilities ``(M, K)``."""

    features: Tensor
    labels: Tensor


def take(
    observer: LayerObserver, reader: BatchReader, loader: Any = None, index: int = 0, shares: bool = False
) -> FeatureSet:
    """Features of an observer's only layer for the last batch; arguments as in `LayerObserver.take`.

    Raises:
        ValueError: The layer did not run.
    """
    taken, labels = observer.take(loader, index, shares, reader)
    if not taken:
        (layer,) = observer.names
        raise ValueError(f"layer {layer!r} did not run in this batch; give {reader.asker} a layer that does")
    (features,) = taken.values()
    return FeatureSet(features, labels)


def gathered(part: FeatureSet, world_size: int) -> FeatureSet:
    """The rows of all processes in the order of the ranks, on every process.

    On an accelerator all must have as many rows, since exchanging their numbers would wait for it in each step.
    """
    if world_size == 1:
        return part
    numbers = numbers_of_all(part.labels) if may_look(part.features) else [len(part.labels)] * world_size
    return FeatureSet(rows_of_all(part.features, numbers), rows_of_all(part.labels, numbers))


def whole_pass(part: FeatureSet, loader: Any, world_size: int, max_samples: int) -> FeatureSet:
    """The rows of a pass on every process, at most so many; of a stream each process has read its own part."""
    if world_size > 1 and is_stream(loader):
        part = FeatureSet(*rows_of_parts(*part))
    return FeatureSet(*(rows[:max_samples] for rows in part))


def read(
    observer: LayerObserver, reader: BatchReader, batches: Iterable[Any], most: int, ignore_index: int | None = None
) -> FeatureSet:
    """Run batches that are on the device, and keep all samples except unlabelled ones and those with nan or inf.

    Batches are read until they have had ``most`` samples.

    Raises:
        ValueError: There are no batches.
    """
    parts: list[FeatureSet] = []
    samples = 0
    for batch in batches:
        observer.run(batch)
        parts.append(take(observer, reader))
        samples += len(parts[-1].labels)
        if samples >= most:
            break
    if not parts:
        raise ValueError(f"{reader.asker} found no batches to measure; the data need training and validation images")
    features, labels = (torch.cat(values) for values in zip(*parts, strict=True))
    finite = features.isfinite().all(1)
    if not finite.all():
        rank_zero_warn(f"{reader.asker} left out {int((~finite).sum())} samples of a pass with nan or inf in features")
    kept = finite if ignore_index is None else finite & (labels != ignore_index)
    return FeatureSet(features[kept], labels[kept])


def prepare(data: LightningDataModule, trainer: Trainer) -> None:
    """Prepare and set up a second data set for a run, without random numbers of the run."""
    with isolate_rng():
        if trainer.local_rank == 0:
            data.prepare_data()
        trainer.strategy.barrier()
        data.trainer = trainer
        data.setup("fit")


def read_second(
    observer: LayerObserver,
    trainer: Trainer,
    data: Any,
    reader: BatchReader,
    max_samples: int,
    ignore_index: int | None = None,
) -> tuple[FeatureSet, list[FeatureSet]]:
    """Features of the training images of a second data set, with other classes, and of each validation loader.

    Args:
        observer: An observer of one layer.
        trainer: The trainer of the run.
        data: The datamodule, whose hooks preprocess batches.
        reader: Reads labels; has the callback's name for messages.
        max_samples: Largest number of images of each split, evenly spread over it.
        ignore_index: Samples with this label are left out.

    Raises:
        ValueError: A split has no batches.
    """
    with data_precision():
        train = getattr(data, "train_plain_dataloader", data.train_dataloader)()
        loaders = [train, *(flat(data.val_dataloader()) or [[]])]
    own = replace(reader, num_classes=None)
    chosen = (evenly(loader, max_samples, processes=trainer.world_size) for loader in loaders)
    batches = (ready_batches(trainer, loader, data) for loader in chosen)
    parts = (read(observer, own, part, max_samples, ignore_index) for part in batches)
    bank, *tested = (
        whole_pass(part, loader, trainer.world_size, max_samples) for part, loader in zip(parts, loaders, strict=True)
    )
    return bank, tested

"""Features of one layer with their labels: of the batch that ran last, of a pass, and of a second data set.

Legend: ``N`` samples of a batch, ``M`` rows of features, ``K`` classes, ``d`` feature width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import move_data_to_device, rank_zero_warn
from torch import Tensor

from ncfinetune.passes import evenly, flat

from .adapters import BatchReader
from .observer import LayerObserver


class FeatureSet(NamedTuple):
    """Features ``(M, d)`` and labels: classes ``(M,)``, or shares of them ``(M, K)``."""

    features: Tensor
    labels: Tensor


def take(
    observer: LayerObserver, reader: BatchReader, batch: Any, loader: Any = None, index: int = 0, shares: bool = False
) -> FeatureSet:
    """What the one layer of an observer gave for the batch that ran last; arguments as of `LayerObserver.take`.

    Raises:
        ValueError: The layer did not run.
    """
    taken, labels = observer.take(batch, loader, index, shares, reader)
    if not taken:
        (layer,) = observer.names
        raise ValueError(f"layer {layer!r} did not run in this batch; give {reader.asker} a layer that does")
    (features,) = taken.values()
    return FeatureSet(features, labels)


def gathered(part: FeatureSet, world_size: int) -> FeatureSet:
    """What all processes have, each as many rows, one behind the other and the same on each."""
    if world_size == 1:
        return part

    def rows_of_all(rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(world_size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    return FeatureSet(rows_of_all(part.features), rows_of_all(part.labels))


def read(
    observer: LayerObserver, reader: BatchReader, batches: Iterable[Any], ignore_index: int | None = None
) -> FeatureSet:
    """Run batches that are ready to run, and keep all samples but those without a label and those with nan or inf.

    Raises:
        ValueError: There are no batches.
    """
    parts: list[FeatureSet] = []
    for batch in batches:
        observer.run(batch)
        parts.append(take(observer, reader, batch))
    if not parts:
        raise ValueError(f"{reader.asker} found no batches to measure; the data need training and validation images")
    features, labels = (torch.cat(values) for values in zip(*parts, strict=True))
    finite = features.isfinite().all(1)
    if not finite.all():
        rank_zero_warn(f"{reader.asker} left out {int((~finite).sum())} samples of a pass with nan or inf in features")
    kept = finite if ignore_index is None else finite & (labels != ignore_index)
    return FeatureSet(features[kept], labels[kept])


def prepare(data: LightningDataModule, trainer: Trainer) -> None:
    """Make a second data set ready to be read beside a run."""
    if trainer.local_rank == 0:
        data.prepare_data()
    trainer.strategy.barrier()
    data.trainer = trainer
    data.setup("fit")


def read_second(
    observer: LayerObserver,
    data: Any,
    reader: BatchReader,
    device: torch.device,
    max_samples: int,
    ignore_index: int | None = None,
) -> tuple[FeatureSet, list[FeatureSet]]:
    """The training images of a second data set, which has classes of its own, and those of each validation loader.

    Args:
        observer: Of one layer.
        data: The datamodule, whose hook makes batches ready to run.
        reader: Reads labels, and says who asks.
        device: Where they run.
        max_samples: Images of each part at most, evenly spread over it.
        ignore_index: Samples with this label are left out.

    Raises:
        ValueError: A part has no batches.
    """

    def ready(loader: Any) -> Iterator[Any]:
        for batch in evenly(loader, max_samples):
            yield data.on_after_batch_transfer(move_data_to_device(batch, device), 0)

    train = getattr(data, "train_plain_dataloader", data.train_dataloader)()
    own = replace(reader, num_classes=None)
    loaders = flat(data.val_dataloader()) or [[]]
    return read(observer, own, ready(train), ignore_index), [
        read(observer, own, ready(loader), ignore_index) for loader in loaders
    ]

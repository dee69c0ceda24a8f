"""What any project feeds its module: the labels and inputs of a batch, and the loaders that the batches come from.

Legend: ``N`` samples of a batch, ``V`` views of a sample.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

_LABEL_KEYS = ("labels", "label", "targets", "target", "y")


def known_num_classes(trainer: Any, module: nn.Module, asker: object) -> int:
    """The number of classes that datamodule, module or its hyper-parameters have as ``num_classes``, for ``asker``.

    Raises:
        ValueError: None of them knows it.
    """
    for owner in (getattr(trainer, "datamodule", None), module, getattr(module, "hparams", None)):
        if isinstance(known := getattr(owner, "num_classes", None), int):
            return known
    name = type(asker).__name__
    raise ValueError(
        f"{name} needs the number of classes, and neither datamodule nor module has num_classes; "
        f"give it {name}(num_classes=...)"
    )


def labels_of(batch: Any) -> Tensor:
    """The labels ``(N,)`` of a batch ``(inputs, labels, ...)``, or of a mapping that has them under a usual key.

    Raises:
        ValueError: There are none; says what the batch looks like.
    """
    labels = None
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
    elif isinstance(batch, Sequence) and len(batch) >= 2:
        labels = batch[1]
    if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point():
        return labels
    raise ValueError(
        "NeuralCollapseTracker found no integer labels (N,) in a batch: expected (inputs, labels) or a mapping with "
        f"one of the keys {', '.join(_LABEL_KEYS)}, got {_sketch(batch)}; "
        "give it NeuralCollapseTracker(batch_to_labels=lambda batch: ...)"
    )


def _sketch(value: Any) -> str:
    """What a batch looks like: types, shapes and keys."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_sketch(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"{type(value).__name__}({', '.join(_sketch(item) for item in value[:6])})"
    return type(value).__name__


def sample_of_row(samples: int, rows: int, batch: Any) -> Tensor:
    """Which sample of a batch each of ``rows`` features is of: several views of a sample are several rows.

    A batch whose inputs are one tensor ``(N, V, ...)`` has the views of a sample beside each other; one whose inputs
    are a list of views has them one view after the other. Rows that no number of views explains are taken one by one.
    """
    order = torch.arange(samples)
    if samples == 0 or rows % samples:
        return torch.arange(rows)
    stacked = isinstance(batch, Sequence) and isinstance(batch[0], Sequence)
    return order.repeat(rows // samples) if stacked else order.repeat_interleave(rows // samples)


def forward(module: nn.Module, batch: Any) -> None:
    """Run a module on the inputs of a batch: those of its ``forward``, or of its only child if it has none of its own.

    Inputs are the first item of a sequence, the mapping's items that ``forward`` takes (labels left out), or a tensor.

    Raises:
        ValueError: The module has no ``forward``, and not one child.
    """
    network = _network(module)
    if isinstance(batch, Mapping):
        known = inspect.signature(network.forward).parameters
        network(**{key: value for key, value in batch.items() if key in known and key not in _LABEL_KEYS})
    else:
        network(batch[0] if isinstance(batch, Sequence) else batch)


def defines(module: nn.Module, method: str) -> bool:
    """Whether a module's author wrote the method, rather than torch or Lightning (either of its two packages)."""
    home = getattr(type(module), method).__module__.split(".")[0]
    return home not in ("torch", "lightning", "pytorch_lightning")


def _network(module: nn.Module) -> nn.Module:
    if defines(module, "forward"):
        return module
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    if len(children) == 1:
        return children[0]
    raise ValueError(
        f"NeuralCollapseTracker cannot run {type(module).__name__} on the training set, since it has no forward and "
        f"{len(children)} children with parameters; give it NeuralCollapseTracker(forward=lambda module, batch: ...), "
        "or train_every_n_epochs=0"
    )


def plain_loader(trainer: Any) -> tuple[Iterable[Any], bool]:
    """A loader of the training set in a fixed order, each sample once over all processes, and whether it is plain.

    Plain is what a datamodule's ``train_plain_dataloader()`` gives: images without augmentation. Otherwise it is the
    training loader's data set as it is; an iterable one keeps its own loader.
    """
    offered = getattr(getattr(trainer, "datamodule", None), "train_plain_dataloader", None)
    loader = offered() if offered is not None else trainer.train_dataloader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, torch.utils.data.IterableDataset):
        return loader, offered is not None
    spread = trainer.world_size > 1 and not isinstance(loader.sampler, DistributedSampler)
    if offered is not None and not spread:
        return loader, True
    sampler = range(trainer.global_rank, len(loader.dataset), trainer.world_size) if spread else None  # type: ignore
    again = DataLoader(
        loader.dataset,
        batch_size=_batch_size(loader),
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        persistent_workers=loader.persistent_workers,
    )
    return again, offered is not None


def _batch_size(loader: DataLoader[Any]) -> int | None:
    """None where the data set makes the batches itself."""
    if loader.batch_sampler is None:
        return None
    return loader.batch_size or getattr(loader.batch_sampler, "batch_size", 1)


def pass_length(trainer: Any, loader: Iterable[Any], most: int | None) -> int | None:
    """Batches of a pass over the training set: no more than ``most``, nor than Lightning's own limit; None is all.

    Raises:
        ValueError: The data may never end: a stream without length in a run without epochs.
    """
    limits = [] if most is None else [most]
    limit = trainer.limit_train_batches  # 1 is a batch, 1.0 is all of them
    limited = isinstance(limit, int) or limit < 1.0 or trainer.overfit_batches
    counted = _has_length(loader)
    if (limited or not counted) and trainer.num_training_batches != float("inf"):
        limits.append(int(trainer.num_training_batches))
    if not limits and not counted and trainer.max_epochs in (None, -1):
        raise ValueError(
            "NeuralCollapseTracker cannot tell whether the training data ever end, since their loader has no length "
            "and the trainer no max_epochs; give it NeuralCollapseTracker(max_train_batches=...)"
        )
    return min(limits, default=None)


def _has_length(loader: Any) -> bool:
    try:
        return len(loader) >= 0
    except TypeError:
        return False


def new_samples(loader: Any, start: int, size: int) -> int:
    """How many of ``size`` samples, a process's ``start``-th and on, its sampler has not given to another too.

    `DistributedSampler` repeats samples so that all processes get as many; the repeated ones come last.
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return size
    total: int = len(sampler.dataset)  # type: ignore[arg-type]
    own = len(range(sampler.rank, total, sampler.num_replicas))
    return max(0, min(size, own - start))

"""What any project feeds its module: the labels and inputs of a batch, and the loaders that the batches come from.

Legend: ``N`` samples of a batch, ``V`` views of a sample.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, cast

import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from ncfinetune.layers import NoTensorError

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

    A batch whose inputs are a tensor ``(N, V, ...)`` has the views of a sample beside each other; one whose inputs are
    a list of views has them one view after the other.

    Raises:
        ValueError: There are not as many rows for each sample.
    """
    if samples == 0 or rows < samples or rows % samples:
        raise ValueError(f"{rows} rows of features for {samples} labels")
    views = rows // samples
    parts = batch.values() if isinstance(batch, Mapping) else batch[:1] if isinstance(batch, Sequence) else ()
    listed = any(isinstance(part, Sequence) and not isinstance(part, str) and len(part) == views for part in parts)
    order = torch.arange(samples)
    return order.repeat(views) if listed else order.repeat_interleave(views)


def forward(module: nn.Module, batch: Any) -> None:
    """Run a module on the inputs of a batch: those of its ``forward``, or of its only child if it has none of its own.

    Inputs are the first item of a sequence, the mapping's items that ``forward`` takes (labels left out), or a tensor.

    Raises:
        ValueError: The module has no ``forward``, and not one child; or it does not take such inputs.
    """
    network = _network(module)
    try:
        if isinstance(batch, Mapping):
            network(**_named_inputs(network, batch))
        else:
            network(batch[0] if isinstance(batch, Sequence) else batch)
    except NoTensorError:
        raise
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(
            f"cannot run {type(network).__name__} on the inputs of {_sketch(batch)} ({type(error).__name__}: {error}); "
            "give NeuralCollapseTracker(forward=lambda module, batch: ...)"
        ) from error


def _named_inputs(network: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    known = inspect.signature(network.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    return {k: v for k, v in batch.items() if (takes_all or k in known) and k not in _LABEL_KEYS}


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


def pass_loader(trainer: Any) -> tuple[Iterable[Any], bool]:
    """A loader of the training set in a fixed order, each sample once over all processes, and whether it is plain.

    Plain is what a datamodule's ``train_plain_dataloader()`` gives: images without augmentation. Otherwise it is what
    the training loader's sampler draws from its data set, as that is, or a stream of its own of an iterable one.

    Raises:
        ValueError: There are several training loaders.
    """
    offered = getattr(getattr(trainer, "datamodule", None), "train_plain_dataloader", None)
    loader = offered() if offered is not None else trainer.train_dataloader
    if isinstance(loader, Mapping | Sequence):
        raise ValueError(
            f"NeuralCollapseTracker cannot choose among {len(loader)} training loaders; give the datamodule a "
            "train_plain_dataloader(), or NeuralCollapseTracker(train_every_n_epochs=0)"
        )
    if not isinstance(loader, DataLoader):
        return loader, offered is not None
    if isinstance(loader.dataset, IterableDataset):
        return loader if offered is not None else _like(loader, None), offered is not None
    shared = trainer.world_size == 1 or isinstance(loader.sampler, DistributedSampler)
    if offered is not None and shared:
        return loader, True
    with isolate_rng():
        indices = _drawn(loader)
    return _like(loader, indices[trainer.global_rank :: trainer.world_size]), offered is not None


def _like(loader: DataLoader[Any], sampler: Sequence[int] | None) -> DataLoader[Any]:
    return DataLoader(
        loader.dataset,
        batch_size=_batch_size(loader),
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        persistent_workers=loader.persistent_workers,
        generator=torch.Generator(),
    )


def _drawn(loader: DataLoader[Any]) -> Sequence[int]:
    """Indices of the samples that a loader draws in an epoch, each once, in their order."""
    sampler: Any = loader.sampler
    if loader.batch_sampler is not None and loader.batch_size is None:
        sampler = getattr(loader.batch_sampler, "sampler", None) or itertools.chain.from_iterable(loader.batch_sampler)
    while isinstance(sampler, DistributedSampler):  # Lightning's, around the user's own if there is one
        sampler = getattr(sampler.dataset, "_sampler", None) or SequentialSampler(cast(Sized, loader.dataset))
    if isinstance(sampler, SequentialSampler | RandomSampler | WeightedRandomSampler):
        return range(len(cast(Sized, loader.dataset)))
    return sorted(set(sampler))


def _batch_size(loader: DataLoader[Any]) -> int | None:
    """None where the data set makes the batches itself."""
    if loader.batch_sampler is None or loader.batch_size is not None:
        return loader.batch_size
    return getattr(loader.batch_sampler, "batch_size", None) or len(next(iter(loader.batch_sampler), [0]))


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
        larger = _sizes_ratio(trainer.train_dataloader, loader)
        limits.append(math.ceil(int(trainer.num_training_batches) * larger))
    if not limits and not counted and trainer.max_epochs in (None, -1):
        raise ValueError(
            "NeuralCollapseTracker cannot tell whether the training data ever end, since their loader has no length "
            "and the trainer no max_epochs; give it NeuralCollapseTracker(max_train_batches=...)"
        )
    return min(limits, default=None)


def _sizes_ratio(training: Any, plain: Any) -> float:
    """How much larger the training loader's batches are than those of the other; 1 where it is not known."""
    theirs, ours = getattr(training, "batch_size", None), getattr(plain, "batch_size", None)
    return theirs / ours if theirs and ours else 1.0


def _has_length(loader: Any) -> bool:
    try:
        return len(loader) >= 0
    except TypeError:
        return False


def flat(loaders: Any) -> list[Any]:
    """The loaders in the order of their ``dataloader_idx``, however a project nests them."""
    return list(CombinedLoader(loaders, "sequential").flattened)


def new_samples(loader: Any, start: int, size: int) -> int:
    """How many of ``size`` samples, a process's ``start``-th and on, its sampler has not given to another too.

    `DistributedSampler` repeats samples so that all processes get as many; the repeated ones come last.
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return size
    total = len(cast(Sized, sampler.dataset))
    own = len(range(sampler.rank, total, sampler.num_replicas))
    return max(0, min(size, own - start))

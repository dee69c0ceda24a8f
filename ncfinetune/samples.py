"""Which samples of a data set: some evenly over its classes, and the labels and files that it knows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import VisionDataset


def spread(indices: Sequence[int], most: int, dataset: Any = None) -> Sequence[int]:
    """At most ``most`` of the indices, evenly spread, and over each class if the labels of the data set are known."""
    if most >= len(indices):
        return indices
    drawn = np.asarray(indices)
    labels = known_labels(dataset)
    order = np.arange(len(drawn)) if labels is None else np.argsort(labels[drawn], kind="stable")
    middles = (np.arange(most) + 0.5) * len(drawn) / most
    return [int(index) for index in drawn[np.sort(order[middles.astype(int)])]]


def known_labels(dataset: Any) -> Any:
    """The integer labels ``(N,)`` of a data set in ``targets`` or ``labels``; None if it has none.

    Torchvision's data sets keep there the labels before their ``target_transform``, which is applied; a class of others
    that changes their samples makes labels unknown.
    """
    if not is_as_stored(dataset):
        return None
    if isinstance(dataset, Subset):
        inner = known_labels(dataset.dataset)
        return None if inner is None else inner[np.asarray(dataset.indices, dtype=int)]
    candidates: list[Any] = list(dataset.tensors[1:]) if isinstance(dataset, TensorDataset) else []
    candidates += [getattr(dataset, name, None) for name in ("targets", "labels")]
    for labels in candidates:
        if isinstance(labels, Tensor | np.ndarray | list | tuple) and len(labels) == len(dataset):
            values = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
            if values.ndim == 1 and values.dtype.kind in "iu":
                return _transformed(values, dataset.target_transform if isinstance(dataset, VisionDataset) else None)
    return None


def is_as_stored(dataset: Any) -> bool:
    """Whether no class of others changes the samples of a torchvision data set, or of a part of any."""
    if not isinstance(dataset, Subset | VisionDataset):
        return True
    ways = [getattr(type(dataset), name, None) for name in ("__getitem__", "__getitems__")]
    return all(way.__module__.split(".")[0] in ("torch", "torchvision") for way in ways if way is not None)


def _transformed(labels: np.ndarray, transform: Callable[[int], Any] | None) -> np.ndarray | None:
    values = labels if transform is None else np.asarray([transform(label) for label in labels.tolist()])
    return values if values.ndim == 1 and values.dtype.kind in "iu" else None


def known_files(dataset: Any) -> list[str] | None:
    """The files of a data set with pairs of path and label in ``samples``, as torchvision's folders have; else None."""
    samples = getattr(dataset, "samples", None)
    if not isinstance(samples, list | tuple) or not all(map(_is_file, samples)):
        return None
    return [os.fspath(path) for path, _ in samples]


def _is_file(sample: Any) -> bool:
    return isinstance(sample, list | tuple) and len(sample) == 2 and isinstance(sample[0], str | os.PathLike)

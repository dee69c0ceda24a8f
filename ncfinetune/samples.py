"""Which samples of a data set: so many of them evenly over its classes, and the labels that it knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Subset, TensorDataset


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
    """The integer labels ``(N,)`` of a data set in ``targets`` or ``labels``; None if it has none."""
    if isinstance(dataset, Subset):
        inner = known_labels(dataset.dataset)
        return None if inner is None else inner[np.asarray(dataset.indices, dtype=int)]
    candidates: list[Any] = list(dataset.tensors[1:]) if isinstance(dataset, TensorDataset) else []
    candidates += [getattr(dataset, name, None) for name in ("targets", "labels")]
    for labels in candidates:
        if isinstance(labels, Tensor | np.ndarray | list | tuple) and len(labels) == len(dataset):
            values = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
            if values.ndim == 1 and values.dtype.kind in "iu":
                return values
    return None

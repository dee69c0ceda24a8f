"""Checks of batches of pooled features and labels.

On a CPU an invalid batch is refused at once. On an accelerator reading values would make the host wait for the device,
so that invalid samples are counted there, and reported when a result is computed.

Legend: ``N`` samples, ``K`` classes, ``d`` feature width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class NonFiniteFeaturesError(ValueError):
    """Features hold nan or inf."""


def may_look(tensor: Tensor) -> bool:
    """Whether the host can read a tensor without waiting for a device: if it is on the CPU."""
    return tensor.device.type == "cpu"


def whole(labels: Tensor) -> Tensor:
    """Integer labels as int64, since torch lacks most operators for uint16 and similar dtypes."""
    return labels if labels.is_floating_point() else labels.long()


def as_indices(labels: Tensor, device: torch.device) -> Tensor:
    """Integer labels as int64 on a device.

    Raises:
        TypeError: Labels that are not integers, which would be cut off.
    """
    if labels.is_floating_point():
        raise TypeError(f"expected integer labels, got {labels.dtype}")
    return labels.to(device).long()


def check_shapes(features: Tensor, labels: Tensor) -> None:
    """Refuse anything but pooled features ``(N, d)`` with labels ``(N,)``.

    Raises:
        ValueError: Wrong shapes.
        TypeError: Labels that are not integers, features that are not floats.
    """
    if features.ndim != 2:
        raise ValueError(
            f"expected features of shape (N, d), got {tuple(features.shape)}; pool spatial or token features "
            "first, such as features.mean((2, 3)) or features[:, 0]"
        )
    if features.shape[1] == 0:
        raise ValueError(f"expected features of width at least 1, got shape {tuple(features.shape)}")
    if not features.is_floating_point():
        raise TypeError(f"expected floating-point features, got {features.dtype}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"expected integer labels, got {labels.dtype}")
    if labels.ndim != 1 or len(labels) != len(features):
        raise ValueError(
            f"expected one label for each of {len(features)} features, got labels of shape {tuple(labels.shape)}"
        )


def check_labels(labels: Tensor, num_classes: int, ignore_index: int | None = None) -> None:
    """Refuse labels ``(N,)`` outside ``0..K-1``; reads the device.

    Raises:
        ValueError: A label is out of range.
    """
    labels = whole(labels)
    if ignore_index is not None:
        labels = labels[labels != ignore_index]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        outside = labels[(labels < 0) | (labels >= num_classes)]
        raise ValueError(
            f"expected labels in 0..{num_classes - 1} (num_classes={num_classes}), "
            f"got {sorted(set(outside.tolist()))[:5]}"
        )


def check_finite(features: Tensor, batch: int) -> None:
    """Refuse features ``(N, d)`` with nan or inf; reads the device.

    Raises:
        NonFiniteFeaturesError: A feature is nan or inf.
    """
    if not math.isfinite(features.sum(dtype=torch.promote_types(features.dtype, torch.float32))):
        bad = int((~features.isfinite()).any(1).sum())
        if bad:
            raise NonFiniteFeaturesError(
                f"expected finite features, got {bad} of {len(features)} samples with nan or inf "
                f"in batch {batch} since the last reset"
            )


def sound_samples(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mask of valid samples, ``(N,)``, and the numbers left out for their labels and for their features, ``(2,)``."""
    known = (labels >= 0) & (labels < num_classes)
    outside = ~known if ignore_index is None else ~known & (labels != ignore_index)
    known = known if ignore_index is None else known & (labels != ignore_index)
    keep = known & features.isfinite().all(1)
    return keep, torch.stack([outside, known ^ keep]).sum(1)


def raise_flags(flags: Tensor, kept: int, num_classes: int, name: str) -> None:
    """Raise if samples were left out on the device; ``flags`` has their numbers by labels and by features.

    Raises:
        ValueError: Labels outside ``0..K-1``.
        NonFiniteFeaturesError: nan or inf.
    """
    outside, broken = flags.tolist()
    total = kept + outside + broken
    if outside:
        raise ValueError(
            f"{name}: expected labels in 0..{num_classes - 1} (num_classes={num_classes}), "
            f"got {outside} of {total} samples with labels out of range since the last reset"
        )
    if broken:
        raise NonFiniteFeaturesError(
            f"{name}: expected finite features, got {broken} of {total} samples with nan or inf since the last reset"
        )

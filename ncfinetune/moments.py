"""Class moments of features, and their accumulation batch by batch in plain tensors.

For each class the accumulator keeps a count, a shift ``c_k`` close to the class mean, and sums of ``z = h - c_k`` and
of ``|z|^2``; for NC1 also one matrix, the sum of ``z z^T`` over all classes. Thanks to the shift nothing cancels,
however far the features lie from the origin and however collapsed they are:
``N Sigma_W = sum z z^T - sum_k n_k delta_k delta_k^T`` and ``mu_k = c_k + delta_k`` with ``delta_k`` the mean of ``z``.

Legend: ``N`` samples, ``K`` classes, ``d`` feature width; ``mu_k`` class means, ``mu_G`` the mean of the class means.
Everything is kept in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

# Numbers in the buffer, 16 MB in float32, and rows of it at most: enough for a product at full speed, few enough for
# float32 to add up.
_BUFFER, _BUFFER_ROWS = 2**22, 2048
# Rows treated at a time in a flush on a CPU, so that what is made of them stays in the processor's cache.
_ROWS = 256


class UndefinedCollapseError(ValueError):
    """There are no samples, or none of a second class, so that nothing lies between classes."""


class NonFiniteFeaturesError(ValueError):
    """Features hold nan or inf."""


@dataclass(frozen=True)
class ClassMoments:
    """First and second moments of features, class by class.

    Args:
        count: Samples a class, ``(K,)``.
        mean: Class means, ``(K, d)``; zero where a class is absent.
        variance: Mean squared distance to the class mean, ``(K,)``.
        within: ``Sigma_W``, the mean over samples of ``(h - mu_k)(h - mu_k)^T``, ``(d, d)``; None if it was not kept.
        scatter: ``Sigma_W`` as an accumulator has it, not written out.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor
    within: Tensor | None
    scatter: ShiftedScatter | None = None

    def to(self, device: torch.device | str) -> ClassMoments:
        """The same on another device, with ``within`` written out."""
        within = self.scatter.written_out() if self.within is None and self.scatter is not None else self.within
        within = None if within is None else within.to(device)
        return ClassMoments(self.count.to(device), self.mean.to(device), self.variance.to(device), within)

    @property
    def present(self) -> Tensor:
        """Which classes have samples, ``(K,)``."""
        return self.count > 0

    @property
    def global_mean(self) -> Tensor:
        """``mu_G``, the mean of the present classes' means, ``(d,)``; of balanced samples, their mean."""
        return self.mean.sum(0) / self.present.sum()  # those of absent classes are zero

    @cached_property
    def centred(self) -> Tensor:
        """Present classes' means less ``mu_G``, ``(P, d)``.

        Raises:
            UndefinedCollapseError: Fewer than two classes are present.
        """
        present = int(self.present.sum())
        if present < 2:
            raise UndefinedCollapseError(
                f"expected samples of at least two classes, got {present}: collapse is undefined"
            )
        return self.mean[self.present].sub_(self.global_mean)

    @cached_property
    def gram(self) -> Tensor:
        """Products of the present classes' centred means with each other, ``(P, P)``."""
        return self.centred @ self.centred.T

    @property
    def between(self) -> Tensor:
        """``Sigma_B``, the mean over present classes of ``(mu_k - mu_G)(mu_k - mu_G)^T``, ``(d, d)``."""
        return self.centred.T @ self.centred / len(self.centred)

    def spread(self, rows: Tensor) -> Tensor:
        """``trace(R Sigma_W R^T)`` of rows ``R``, ``(m, d)``.

        Raises:
            ValueError: The moments are without the covariance within classes.
        """
        if self.scatter is not None:
            return self.scatter.spread(rows)
        if self.within is None:
            raise ValueError("nc1 needs moments with the within-class covariance, got moments with within=None")
        return torch.tensordot(rows @ self.within, rows)


@dataclass(frozen=True)
class ShiftedScatter:
    """``N Sigma_W = sum z z^T - sum_k n_k delta_k delta_k^T`` by its parts.

    Args:
        count: Samples a class, ``(K,)``.
        sums: Sums of ``z`` a class, ``(K, d)``.
        upper: The sum of ``z z^T``, ``(d, d)``; what lies below its diagonal blocks is not read.
    """

    count: Tensor
    sums: Tensor
    upper: Tensor

    def spread(self, rows: Tensor) -> Tensor:
        """``trace(R Sigma_W R^T)`` of rows ``R``, ``(m, d)``."""
        total = -((rows @ self.sums.T).square() / self.count.clamp(min=1)).sum()
        for block in _blocks(len(self.upper)):
            part = rows[:, block]
            products = part @ self.upper[block, block.start :]
            diagonal = torch.tensordot(products[:, : part.shape[1]], part)
            mirrored = torch.tensordot(products, rows[:, block.start :])
            total = total + 2 * mirrored - diagonal
        return (total / self.count.sum()).clamp(min=0)

    def written_out(self) -> Tensor:
        """``Sigma_W``, ``(d, d)``."""
        within = self.upper.clone()
        for rows in _blocks(len(within)):
            within[rows.stop :, rows] = within[rows, rows.stop :].T
        within.addmm_(self.sums.T, self.sums / self.count.clamp(min=1)[:, None], alpha=-1)
        return within.div_(self.count.sum().clamp(min=1))


def class_moments(features: Tensor, labels: Tensor, num_classes: int) -> ClassMoments:
    """Moments of features ``(N, d)`` with labels ``(N,)``, in two passes over them."""
    features = features.double()
    count = torch.zeros(num_classes, dtype=torch.float64, device=features.device)
    count.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    mean = sums / count.clamp(min=1)[:, None]
    residual = features - mean[labels]
    squares = torch.zeros_like(count).index_add_(0, labels, residual.square().sum(1))
    within = residual.T @ residual / max(len(features), 1)
    return ClassMoments(count, mean, squares / count.clamp(min=1), within)


def merge(a: ClassMoments, b: ClassMoments) -> ClassMoments:
    """Moments of the samples of ``a`` and ``b`` together (Chan, Golub, LeVeque 1979, eq. 1.5)."""
    count = a.count + b.count
    share = b.count / count.clamp(min=1)
    step = (b.mean - a.mean) * (a.present & b.present)[:, None]
    mean = torch.where(a.present[:, None], a.mean + share[:, None] * step, b.mean)
    weight = a.count * share
    squares = a.count * a.variance + b.count * b.variance + weight * step.square().sum(1)
    within = None
    if a.within is not None and b.within is not None:
        scatter = a.count.sum() * a.within + b.count.sum() * b.within + (weight[:, None] * step).T @ step
        within = scatter / count.sum().clamp(min=1)
    return ClassMoments(count, mean, squares / count.clamp(min=1), within)


class MomentAccumulator:
    """Class moments of features that come in batches, in memory that does not grow.

    Rows wait as they come in one buffer on the accumulator's device until there are enough of them for one product of
    matrices, so that the moments do not depend on how samples are cut into batches. On an accelerator an update only
    launches: no value is read back to the host. Samples with bad labels or features are then counted on the device and
    left out, and `check` raises; on a CPU they are refused at once.

    Args:
        num_classes: Number of classes ``K``.
        scatter: Keep the ``(d, d)`` matrix that NC1 needs.
        ignore_index: Samples with this label are left out.
    """

    count: Tensor
    squares: Tensor
    shift: Tensor
    sums: Tensor
    scatter: Tensor
    flags: Tensor

    def __init__(self, num_classes: int, scatter: bool = True, ignore_index: int | None = None) -> None:
        self.num_classes = num_classes
        self.keeps_scatter = scatter
        # The tensors that hold everything.
        self.names = ("count", "squares", "shift", "sums", "flags", "rows", "labels", *["scatter"] * scatter)
        self.ignore_index = ignore_index
        self.reset(torch.device("cpu"))

    def reset(self, device: torch.device | None = None) -> None:
        """Forget all samples."""
        device = self.device if device is None else device
        with torch.inference_mode(False):
            self.count = torch.zeros(self.num_classes, dtype=torch.float64, device=device)
            self.squares = self.count.clone()
            self.shift = self.count.new_zeros(self.num_classes, 0)
            self.sums = self.shift.clone()
            if self.keeps_scatter:
                self.scatter = self.count.new_zeros(0, 0)
            # Samples with labels out of range, and samples with features that are not finite.
            self.flags = torch.zeros(2, dtype=torch.int64, device=device)
            self.rows, self.labels = self.count.new_zeros(0, 0, dtype=torch.float32), self.flags.new_zeros(0)
        self.batches = 0

    @property
    def device(self) -> torch.device:
        """Where the state lies."""
        return self.count.device

    @property
    def width(self) -> int:
        """Feature width ``d``, 0 while it is not known."""
        return self.shift.shape[1]

    @property
    def rows(self) -> Tensor:
        """Features of the samples that wait in the buffer, ``(m, d)``."""
        return self._rows if self._waiting == len(self._rows) else self._rows[: self._waiting]

    @rows.setter
    def rows(self, rows: Tensor) -> None:
        self._rows, self._waiting = rows, len(rows)

    @property
    def labels(self) -> Tensor:
        """Labels of the samples that wait in the buffer, ``(m,)``."""
        return self._labels if self._waiting == len(self._labels) else self._labels[: self._waiting]

    @labels.setter
    def labels(self, labels: Tensor) -> None:
        self._labels = labels

    def to(self, device: torch.device | str) -> MomentAccumulator:
        """Move to a device. MPS has no float64, so that the state stays on the CPU there."""
        device = torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)
        for name in self.names:
            setattr(self, name, getattr(self, name).to(device))
        return self

    def state(self) -> dict[str, Tensor]:
        """All samples so far as a dictionary of tensors, those that wait in the buffer included."""
        return {name: getattr(self, name).clone() for name in self.names}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for name in self.names:
            setattr(self, name, state[name].clone())

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add samples.

        Args:
            features: Pooled features, ``(N, d)``, of any floating-point type.
            labels: Integer labels in ``0..K-1``, ``(N,)``.

        Raises:
            ValueError: Wrong shapes, a width that changes; on a CPU also labels outside ``0..K-1``.
            NonFiniteFeaturesError: On a CPU: nan or inf.
            TypeError: Labels that are no integers, features that are no floats.
        """
        self.batches += 1
        check_shapes(features, labels)
        if self.width not in (0, features.shape[1]):
            raise ValueError(f"expected features of width {self.width} as in earlier batches, got {features.shape[1]}")
        with torch.inference_mode(False), torch.no_grad():
            features, labels = features.detach(), labels.detach()
            if may_look(features) or may_look(self.count):
                check_labels(labels, self.num_classes, self.ignore_index)
                check_finite(features, self.batches)
            self._widen(features.shape[1])
            self._wait(features, labels)

    def _widen(self, width: int) -> None:
        """Give the state the width of the features; it starts without."""
        if self.width != width:
            self.shift = self.count.new_zeros(self.num_classes, width)
            self.sums = torch.zeros_like(self.shift)
            if self.keeps_scatter:
                self.scatter = self.count.new_zeros(width, width)

    def _wait(self, features: Tensor, labels: Tensor) -> None:
        """Copy rows into the buffer, and flush it each time that it is full."""
        width = features.shape[1]
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        capacity = max(_ROWS, min(_BUFFER_ROWS, _BUFFER // width))
        if self._rows.dtype != dtype:
            self.flush()
        if len(features) and len(self._rows) < capacity:
            rows, labels_ = self.rows, self.labels
            self._rows = torch.empty(capacity, width, dtype=dtype, device=self.device)
            self._labels = torch.empty(capacity, dtype=torch.int64, device=self.device)
            self._rows[: len(rows)], self._labels[: len(rows)] = rows.view(-1, width), labels_
        start = 0
        while start < len(features):
            stop = min(len(features), start + capacity - self._waiting)
            room = slice(self._waiting, self._waiting + stop - start)
            self._rows[room].copy_(features[start:stop])
            self._labels[room].copy_(labels[start:stop])
            self._waiting, start = room.stop, stop
            if self._waiting == capacity:
                self._add_waiting()

    def flush(self) -> None:
        """Add the samples that wait to the sums, and free the buffer."""
        with torch.inference_mode(False), torch.no_grad():
            self._add_waiting()
            if len(self._rows):
                self._rows, self._labels = self._rows.new_zeros(0, 0), self._labels.new_zeros(0)

    def trim(self) -> None:
        """Free the part of the buffer in which no samples wait."""
        with torch.inference_mode(False):
            self._rows, self._labels = self.rows.clone(), self.labels.clone()

    def __getstate__(self) -> dict[str, Any]:
        self.trim()
        return self.__dict__

    def _add_waiting(self) -> None:
        if self._waiting:
            rows, labels = self.rows, self.labels
            self._waiting = 0
            self._add(rows, labels)

    def _add(self, rows: Tensor, labels: Tensor) -> None:
        labels, keep = self._kept(rows, labels)
        self._choose_shifts(rows, labels, keep)
        ones = torch.ones_like(labels, dtype=torch.float64) if keep is None else keep.double()
        self.count.index_add_(0, labels, ones)
        size = _ROWS if self.device.type == "cpu" else len(rows)
        narrow = self.keeps_scatter and self.device.type == "cpu" and rows.dtype == torch.float32
        for part in (slice(start, start + size) for start in range(0, len(rows), size)):
            z = torch.sub(rows[part], self.shift.index_select(0, labels[part]))
            if keep is not None:
                z = z.where(keep[part, None], 0)
            self.sums.index_add_(0, labels[part], z)
            self.squares.index_add_(0, labels[part], torch.linalg.vecdot(z, z))
            if narrow:
                rows[part] = z
            elif self.keeps_scatter:
                _add_products(self.scatter, z)
        if narrow:
            with full_precision(self.device):
                _add_products(self.scatter, rows)

    def _kept(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Labels that may index, ``(m,)``, and which samples count, or None if all do; raises the flags."""
        if may_look(self.count) and self.ignore_index is None:
            return labels, None
        ignored = (
            torch.zeros_like(labels, dtype=torch.bool) if self.ignore_index is None else labels == self.ignore_index
        )
        outside = ((labels < 0) | (labels >= self.num_classes)) & ~ignored
        broken = ~rows.isfinite().all(1) & ~ignored
        self.flags += torch.stack([outside.sum(), broken.sum()])
        keep = ~(ignored | outside | broken)
        return labels.where(keep, 0), keep

    def _choose_shifts(self, rows: Tensor, labels: Tensor, keep: Tensor | None) -> None:
        """Shift each new class by the mean of all its samples in the buffer.

        The mean is taken of differences to the class's first sample, which it is exactly if all samples are alike.
        """
        new = self.count == 0
        if may_look(self.count) and not new.any():
            return
        index = torch.arange(len(rows), device=self.device)
        first = torch.full_like(self.count, len(rows) - 1, dtype=torch.int64)
        first.scatter_reduce_(0, labels, index if keep is None else index.where(keep, len(rows) - 1), "amin")
        start = rows.index_select(0, first).double()
        steps = rows - start.index_select(0, labels)
        ones = torch.ones_like(labels, dtype=torch.float64)
        if keep is not None:
            steps, ones = steps.where(keep[:, None], 0), keep.double()
        number = torch.zeros_like(self.count).index_add_(0, labels, ones)
        mean = start + torch.zeros_like(self.sums).index_add_(0, labels, steps) / number.clamp(min=1)[:, None]
        self.shift = mean.where((new & (number > 0))[:, None], self.shift)

    def check(self, name: str) -> None:
        """Raise if samples were left out for what they hold; reads the device.

        Args:
            name: What is being measured, for the message.

        Raises:
            ValueError: Labels outside ``0..K-1``.
            NonFiniteFeaturesError: nan or inf.
        """
        raise_flags(self.flags, int(self.count.sum()), self.num_classes, name)

    def moments(self, within: bool = True) -> ClassMoments:
        """The class moments of all samples so far.

        Args:
            within: Write out the matrix within classes. Without it `collapse.nc1` is as exact, faster and smaller.
        """
        self.flush()
        count = self.count.clamp(min=1)
        delta = self.sums / count[:, None]
        variance = (self.squares / count - delta.square().sum(1)).clamp(min=0)
        scatter = ShiftedScatter(self.count, self.sums, self.scatter) if self.keeps_scatter and self.width else None
        written = scatter.written_out() if within and scatter is not None else None
        return ClassMoments(self.count.clone(), delta.add_(self.shift), variance, written, None if within else scatter)

    def merge(self, others: Iterable[MomentAccumulator]) -> None:
        """Add the samples of other accumulators, whatever their shifts.

        Raises:
            ValueError: Features of several widths.
        """
        parts = [part for part in (self, *others) if part.width]
        widths = {part.width for part in parts}
        if len(widths) > 1:
            raise ValueError(f"expected states of features of one width to merge, got widths {sorted(widths)}")
        with torch.inference_mode(False), torch.no_grad():
            if parts:
                moments = [part.moments().to(self.device) for part in parts]
                self.flags = torch.stack([part.flags.to(self.device) for part in parts]).sum(0)
                self._hold(reduce(merge, moments))

    def _hold(self, moments: ClassMoments) -> None:
        """Make the state that of ``moments``."""
        self.count, self.shift, self.sums = moments.count, moments.mean, torch.zeros_like(moments.mean)
        self.squares = moments.count * moments.variance
        if moments.within is not None:
            self.scatter = moments.within * moments.count.sum()

    def reduce(self, all_reduce: Callable[[Tensor], Tensor], device: torch.device | None = None) -> None:
        """Make the state that of all processes together; all of them must call it.

        Moments are moved to the global class means, after which every tensor is a plain sum.

        Args:
            all_reduce: Gives the sum over the processes of a tensor, which it may change in place.
            device: Where the processes reduce; a process that had no samples takes part with zeros there.
        """
        if device is not None:
            self.to(device)
        with torch.inference_mode(False), torch.no_grad():
            self.flush()
            known = torch.cat([self.flags, self.flags.new_tensor([self.width > 0, self.width])])
            known = all_reduce(known)
            self.flags = known[:2]
            processes, widths = known[2:].tolist()
            if processes == 0:
                return
            if widths % processes or self.width not in (0, widths // processes):
                raise ValueError(
                    f"expected features of one width in all processes, got {self.width} here and {widths} in all of "
                    f"{processes}"
                )
            self._widen(widths // processes)
            local = self.moments()
            count = all_reduce(local.count.clone())
            mean = all_reduce(local.count[:, None] * local.mean) / count.clamp(min=1)[:, None]
            step = (local.mean - mean) * local.present[:, None]
            moved = local.count[:, None] * step
            squares = all_reduce(local.count * local.variance + (moved * step).sum(1))
            within = None
            if local.within is not None:
                scatter = all_reduce(local.count.sum() * local.within + moved.T @ step)
                within = scatter / count.sum().clamp(min=1)
            self._hold(ClassMoments(count, mean, squares / count.clamp(min=1), within))


def may_look(tensor: Tensor) -> bool:
    """Whether the host may read values of a tensor at once: on a CPU, where nothing runs behind its back."""
    return tensor.device.type == "cpu"


def check_shapes(features: Tensor, labels: Tensor) -> None:
    """Refuse what is no batch of pooled features ``(N, d)`` with labels ``(N,)``.

    Raises:
        ValueError: Wrong shapes.
        TypeError: Labels that are no integers, features that are no floats.
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
        ValueError: There are such.
    """
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
        NonFiniteFeaturesError: There are such.
    """
    if not math.isfinite(features.sum(dtype=torch.promote_types(features.dtype, torch.float32))):
        bad = int((~features.isfinite()).any(1).sum())
        if bad:
            raise NonFiniteFeaturesError(
                f"expected finite features, got {bad} of {len(features)} samples with nan or inf "
                f"in batch {batch} since the last reset"
            )


def raise_flags(flags: Tensor, kept: int, num_classes: int, name: str) -> None:
    """Raise for samples that were left out on the device: ``flags`` has how many for their labels, and features.

    Raises:
        ValueError: Labels outside ``0..K-1``.
        NonFiniteFeaturesError: nan or inf.
    """
    outside, broken = flags.tolist()
    total = kept + outside + broken
    if outside:
        raise ValueError(
            f"{name}: expected labels in 0..{num_classes - 1} (num_classes={num_classes}), "
            f"got {outside} of {total} samples with others since the last reset"
        )
    if broken:
        raise NonFiniteFeaturesError(
            f"{name}: expected finite features, got {broken} of {total} samples with nan or inf since the last reset"
        )


def _blocks(width: int) -> Iterator[slice]:
    """Blocks of rows of the ``(d, d)`` state: enough to leave out near half of it, each enough for a fast product."""
    size = max(64, width // 8)
    return (slice(start, start + size) for start in range(0, width, size))


def _add_products(scatter: Tensor, z: Tensor) -> None:
    """Add ``z^T z`` to the blocks of the ``(d, d)`` state that lie on and above its diagonal."""
    for rows in _blocks(z.shape[1]):
        if z.dtype == scatter.dtype:
            scatter[rows, rows.start :].addmm_(z[:, rows].T, z[:, rows.start :])
        else:
            scatter[rows, rows.start :] += z[:, rows].T @ z[:, rows.start :]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, and float32 products in float32: neither TF32 nor bfloat16."""
    with _ieee_products(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def _ieee_products() -> Iterator[None]:
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for each backend by itself, and torch refuses to mix the two ways
        backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, value in zip(backends, before, strict=True):
                backend.fp32_precision = value
    else:
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)

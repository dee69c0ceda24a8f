"""Accumulation of class moments batch by batch.

For each class the accumulator keeps a count, a shift ``c_k`` close to the class mean, and sums of ``z = h - c_k`` and
of ``|z|^2``; for NC1 also one matrix, the sum of ``z z^T`` over all classes. Thanks to the shift nothing cancels,
however far the features lie from the origin and however collapsed they are:
``N Sigma_W = sum z z^T - sum_k n_k delta_k delta_k^T`` and ``mu_k = c_k + delta_k`` with ``delta_k`` the mean of ``z``.

Legend: ``N`` samples, ``K`` classes, ``d`` feature width, ``m`` rows in the buffer; ``mu_k`` class means. Sums are kept
in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ncfinetune import accumulator
from ncfinetune.accumulator import Accumulator, spaced
from ncfinetune.inputs import may_look
from ncfinetune.moments import ClassMoments
from ncfinetune.scatter import LARGE, ROUNDING, SMALL, ShiftedScatter, add_float32_products, add_products, float32_error

# Numbers of a buffer processed at a time on a CPU, so that their float64 copy, 2 MB, stays in the processor's cache.
_PIECE = 2**17
# A class's shift is checked again by a buffer with this many times the samples that it was chosen from, and moved
_BETTER = 4
# ... if its squared distance, in variances within the class, exceeds this: that of an outlier does, others do not.
_FAR = 10
# Products are float32 while their estimated relative error of NC1 is below this, a tenth of the promised accuracy.
_ALLOWED = 1e-7
# Fewer features than this are multiplied in float64: their errors are too few to tell what float32 does to them, and
# their products cost little beside the rest.
_FEW = 32
# Number of products after which the precision is chosen anew.
_REVIEWED = {8**power for power in range(20)}
# Precisions of the products: float64, float32, or not decided before the first product.
_WIDE, _NARROW, _TRIAL = 0, 1, 2

_NAMES = ("count", "squares", "shift", "anchors", "sums", "flags", "rows", "labels")
_SCATTER_NAMES = ("scatter", "rounding", "plan")


def _class_means(rows: Tensor, labels: Tensor, keep: Tensor | None, num_classes: int) -> Tensor:
    """Class means ``(K, d)`` of rows ``(m, d)``, of those in ``keep`` only; 0 for classes without rows.

    Computed from differences to the class's first row, so that the mean of identical rows is exact.
    """
    last = len(rows) - 1
    weight = torch.ones_like(labels, dtype=torch.float64) if keep is None else keep.double()
    number = weight.new_zeros(num_classes).index_add_(0, labels, weight)
    index = torch.arange(len(rows), device=rows.device).where(weight > 0, last)
    first = torch.full_like(number, last, dtype=torch.int64).scatter_reduce_(0, labels, index, "amin")
    start = rows.index_select(0, first).double().masked_fill_((number == 0)[:, None], 0)
    sums = torch.zeros_like(start)
    for part, step in _steps(rows, labels, start, keep):
        sums.index_add_(0, labels[part], step)
    return sums.div_(number.clamp(min=1)[:, None]).add_(start)


def _steps(rows: Tensor, labels: Tensor, shift: Tensor, keep: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Rows less the shifts ``(K, d)`` of their classes, in float64; 0 if not kept. All pieces share one buffer."""
    width = rows.shape[1]
    size = max(1, _PIECE // width) if may_look(rows) else len(rows)
    steps, shifts = rows.new_empty(2, min(size, len(rows)), width, dtype=torch.float64)
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        some = labels[part]
        step, mine = steps[: some.shape[0]], shifts[: some.shape[0]]
        step.copy_(rows[part]).sub_(torch.index_select(shift, 0, some, out=mine))
        yield part, step if keep is None else step.masked_fill_(~keep[part, None], 0)


class _Terms:
    """What sums over samples less a shift change by when the shift is moved by ``step``, class by class.

    Args:
        count: Samples per class, ``(K, 1)``.
        sums: Sums of ``z`` per class, ``(K, d)``.
        step: New shifts less the old ones, ``(K, d)``; exact where these are close to each other.
    """

    def __init__(self, count: Tensor, sums: Tensor, step: Tensor) -> None:
        self.before, self.step, self.added = sums, step, count * step

    def sums(self) -> Tensor:
        """The new sums of ``z``, ``(K, d)``."""
        return self.before - self.added

    def squares(self) -> Tensor:
        """Change of the sums of ``|z|^2``, ``(K,)``."""
        return ((self.added - 2 * self.before) * self.step).sum(1)

    def scatter(self) -> Tensor:
        """Change of the sum of ``z z^T``, ``(d, d)``."""
        return self.step.T @ (self.added - self.before) - self.before.T @ self.step

    def rounding(self) -> Tensor:
        """Rounding of that change, ``(d,)``, in the form of `ShiftedScatter`."""
        terms = (self.added.abs() + 2 * self.before.abs()) * self.step.abs()
        return ROUNDING[torch.float64] * terms.sum(0)


class MomentAccumulator(Accumulator):
    """Accumulates class moments of features batch by batch in constant memory.

    Rows are collected in one buffer on the accumulator's device, which is flushed by one matrix product when it is
    full, so that the moments do not depend on how samples are divided into batches. On an accelerator an update does
    not synchronise: invalid samples (labels out of range, nan or inf) are counted on the device and left out, and
    `check` raises. On a CPU they are refused at once.

    Args:
        num_classes: Number of classes ``K``.
        scatter: Keep the ``(d, d)`` matrix that NC1 needs.
        ignore_index: Samples with this label are left out.
    """

    squares: Tensor
    shift: Tensor
    anchors: Tensor
    sums: Tensor
    scatter: Tensor
    rounding: Tensor
    plan: Tensor

    def __init__(self, num_classes: int, scatter: bool = True, ignore_index: int | None = None) -> None:
        self.keeps_scatter = scatter
        self.names = (*_NAMES, *_SCATTER_NAMES) if scatter else _NAMES
        super().__init__(num_classes, ignore_index)

    def _reset(self) -> None:
        self.squares = torch.zeros_like(self.count)
        # Number of samples that each class's shift was chosen from.
        self.anchors = torch.zeros_like(self.count)
        self.shift = self.count.new_zeros(self.num_classes, 0)
        self.sums = self.shift.clone()
        if self.keeps_scatter:
            self.scatter = self.count.new_zeros(0, 0)
            self.rounding = self.count.new_zeros(0)
            # Number of products, counting a trial twice, and the precision of the last.
            self.plan = torch.zeros_like(self.flags)

    @property
    def width(self) -> int:
        """Feature width ``d``, 0 while it is not known."""
        return self.shift.shape[1]

    def _widen(self, width: int) -> None:
        """Allocate the state for the width of the features."""
        if self.width != width:
            self.shift = self.count.new_zeros(self.num_classes, width)
            self.sums = torch.zeros_like(self.shift)
            if self.keeps_scatter:
                self.scatter = self.count.new_zeros(width, width)
                self.rounding = self.count.new_zeros(width)

    def _add(self, rows: Tensor, labels: Tensor, keep: Tensor | None) -> None:
        self._choose_shifts(rows, labels, keep)
        arithmetic = self._arithmetic(rows) if self.keeps_scatter else None
        z, squares, columns = self._shifted(rows, labels, keep, arithmetic)
        self.count.index_add_(0, labels, torch.ones_like(squares) if keep is None else keep.double())
        self.squares.index_add_(0, labels, squares)
        if self.keeps_scatter:
            self._multiply(z, squares, columns, arithmetic)

    def _shifted(
        self, rows: Tensor, labels: Tensor, keep: Tensor | None, arithmetic: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add the shifted rows ``z`` to the sums; returns them, and their sums of squares by row and by column.

        ``z`` overwrites rows that are to be multiplied in float32; sums by column are left 0 where they are not needed.
        """
        columns = self.shift.new_zeros(self.width)
        sums = torch.zeros_like(self.sums)  # apart from what there is, at whose size each term would be rounded
        if not may_look(rows):
            _, z = next(_steps(rows, labels, self.shift, keep))
            self.sums += sums.index_add_(0, labels, z)
            return z, torch.linalg.vector_norm(z, dim=1).square_(), columns
        z = rows if arithmetic == _NARROW else spaced(rows.shape, torch.float64, rows.device)
        squares = torch.empty_like(labels, dtype=torch.float64)
        for part, step in _steps(rows, labels, self.shift, keep):
            sums.index_add_(0, labels[part], step)
            if self.keeps_scatter:
                z[part] = step
            squares[part] = step.square_().sum(1)
            if arithmetic in (_NARROW, _TRIAL):
                columns += step.sum(0)
        self.sums += sums
        return z, squares, columns

    def _multiply(self, z: Tensor, squares: Tensor, columns: Tensor, arithmetic: int | None) -> None:
        """Add the products of shifted rows, as returned by `_shifted`."""
        if arithmetic == _TRIAL:
            self._try_narrow(z, columns)
        elif arithmetic == _WIDE:
            add_products(self.scatter, self.rounding, z, z.dtype)
        elif not SMALL < float(squares.max()) / z.shape[1] < LARGE:
            add_products(self.scatter, self.rounding, z.double(), torch.float32)
        elif not add_float32_products(self.scatter, self.rounding, z, columns):
            self.plan[1] = _WIDE

    def _arithmetic(self, rows: Tensor) -> int:
        """The precision in which to multiply these rows."""
        if not may_look(self.count) or rows.dtype == torch.float64 or self.width < _FEW:
            return _WIDE
        made, arithmetic = self.plan.tolist()
        if made == 0 and rows.shape[0] == accumulator.capacity(rows.shape[1], rows.device) and not self.count.any():
            return _TRIAL
        if made in _REVIEWED:
            arithmetic = _NARROW if self._error_in_float32() < _ALLOWED else _WIDE
        self.plan = self.plan.new_tensor([made + 1, arithmetic])
        return arithmetic

    def _try_narrow(self, z: Tensor, columns: Tensor) -> None:
        """Multiply the first full buffer in float32, and again in float64 if that is not exact enough."""
        narrow = add_float32_products(self.scatter, self.rounding, z.float(), columns)
        narrow = narrow and self._error_in_float32() < _ALLOWED
        if not narrow:
            self.scatter.zero_()
            self.rounding.zero_()
            add_products(self.scatter, self.rounding, z, torch.float64)
        self.plan = self.plan.new_tensor([2, _NARROW if narrow else _WIDE])

    def _error_in_float32(self) -> float:
        return float32_error(self.count, self.shift, self.sums, self.squares, self.scatter)

    def _choose_shifts(self, rows: Tensor, labels: Tensor, keep: Tensor | None) -> None:
        """Set the shift of each new class to its mean in the buffer; on a CPU also of one shifted to an outlier."""
        weight = torch.ones_like(labels, dtype=torch.float64) if keep is None else keep.double()
        number = torch.zeros_like(self.count).index_add_(0, labels, weight)
        if may_look(self.count):
            chosen = (number > _BETTER * self.anchors).nonzero().squeeze(1)
            if len(chosen):
                self._choose_some(rows, labels, keep, chosen, number[chosen])
            return
        new = (self.anchors == 0) & (number > 0)
        mean = _class_means(rows, labels, keep, self.num_classes)
        self.shift = mean.where(new[:, None], self.shift)
        self.anchors = number.where(new, self.anchors)

    def _choose_some(self, rows: Tensor, labels: Tensor, keep: Tensor | None, chosen: Tensor, number: Tensor) -> None:
        """Set the shifts of the classes ``chosen``, ``(C,)``, which have ``number`` samples in the buffer."""
        position = torch.full_like(self.anchors, -1, dtype=torch.int64)
        position[chosen] = torch.arange(len(chosen), device=self.device)
        labels = position[labels]
        kept = (labels >= 0) if keep is None else (labels >= 0) & keep
        if not kept.all():
            rows, labels = rows[kept], labels[kept]
        mean = _class_means(rows, labels, None, len(chosen))
        known = self.count[chosen] > 0
        far = torch.zeros_like(known)
        if known.any():
            variance = torch.zeros_like(number)
            for part, residual in _steps(rows, labels, mean, None):
                variance.index_add_(0, labels[part], residual.square().sum(1))
            step = mean - self.shift[chosen]
            far = known & (step.square().sum(1) > _FAR * variance / number)
            self._move(chosen[far], step[far])
        better = far | ~known
        self.shift[chosen[better]] = mean[better]
        self.anchors[chosen] = number

    def _move(self, moved: Tensor, step: Tensor) -> None:
        """Change the sums of classes ``moved``, ``(C,)``, for shifts that are moved by ``step``, ``(C, d)``."""
        terms = _Terms(self.count[moved, None], self.sums[moved], step)
        self.squares[moved] += terms.squares()
        self.sums[moved] = terms.sums()
        if self.keeps_scatter and len(moved):
            self.scatter += terms.scatter()
            self.rounding += terms.rounding()

    def _about(self, shift: Tensor) -> dict[str, Tensor]:
        """The sums of all samples so far, for these shifts, ``(K, d)``, in place of its own; on the device of them."""
        state = {name: getattr(self, name).to(shift.device) for name in self.names}
        terms = _Terms(state["count"][:, None], state["sums"], shift - state["shift"])
        moved = {"squares": state["squares"] + terms.squares(), "sums": terms.sums()}
        if self.keeps_scatter:
            moved |= {"scatter": state["scatter"] + terms.scatter(), "rounding": state["rounding"] + terms.rounding()}
        return moved

    @property
    def mean(self) -> Tensor:
        """Class means of the samples that are not in the buffer, ``(K, d)``; zero for absent classes."""
        return self.sums / self.count.clamp(min=1)[:, None] + self.shift

    def moments(self, within: bool = True) -> ClassMoments:
        """The class moments of all samples so far.

        Args:
            within: Compute the dense within-class covariance. `collapse.nc1` does not need it, and is faster without.
        """
        self.flush()
        count = self.count.clamp(min=1)
        delta = self.sums / count[:, None]
        variance = (self.squares / count - delta.square().sum(1)).clamp(min=0)
        scatter = None
        if self.keeps_scatter and self.width:
            scatter = ShiftedScatter(self.count, self.sums, self.scatter, self.rounding)
        written = scatter.written_out() if within and scatter is not None else None
        # Shifts that are close to each other have exact differences.
        apart = self.shift - self.shift[self.count.argmax()] + delta
        mean = delta.add_(self.shift)
        return ClassMoments(self.count.clone(), mean, variance, written, scatter, apart)

    def merge(self, others: Iterable[MomentAccumulator]) -> None:
        """Merge other accumulators, which may have other shifts.

        Raises:
            ValueError: Features of several widths, or only some keep the scatter.
        """
        everyone = [self, *others]
        if len({part.keeps_scatter for part in everyone}) > 1:
            raise ValueError("expected accumulators of one kind to merge, got some with scatter and some without")
        parts = [part for part in everyone if part.width]
        widths = {part.width for part in parts}
        if len(widths) > 1:
            raise ValueError(f"expected states of features of one width to merge, got widths {sorted(widths)}")
        with torch.inference_mode(False), torch.no_grad():
            if not parts:
                return
            count, shift = torch.zeros_like(self.count), self.count.new_zeros(self.num_classes, *widths)
            for part in parts:
                part.flush()
                own, mean = part.count.to(self.device), part.mean.to(self.device)
                count = count + own
                shift = shift + (own / count.clamp(min=1))[:, None] * (mean - shift)
            self.flags = torch.stack([part.flags.to(self.device) for part in parts]).sum(0)
            sums = parts[0]._about(shift)
            for part in parts[1:]:
                for name, value in part._about(shift).items():
                    sums[name] += value
            self._hold(count, shift, sums)

    def _hold(self, count: Tensor, shift: Tensor, sums: Mapping[str, Tensor]) -> None:
        """Set the state to these counts, ``(K,)``, shifts ``(K, d)``, and sums of samples less the shifts."""
        self.count, self.shift, self.anchors = count, shift, count.clone()
        for name, value in sums.items():
            setattr(self, name, value)
        if self.keeps_scatter:
            self.plan = torch.zeros_like(self.plan)

    def reduce(self, all_reduce: Callable[[Tensor], Tensor], device: torch.device | None = None) -> None:
        """Set the state to that of all processes; all of them must call it.

        Shifts are moved to the global class means, after which all sums are reduced. Nothing is lost to the rounding of
        the class means, however far from the origin the features lie.

        Args:
            all_reduce: Returns the sum of a tensor over the processes; may change it in place.
            device: Device of the reduction; a process without samples contributes zeros there.
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
            count = all_reduce(self.count.clone())
            shift = all_reduce(self.count[:, None] * self.mean) / count.clamp(min=1)[:, None]
            self._hold(count, shift, {name: all_reduce(value) for name, value in self._about(shift).items()})

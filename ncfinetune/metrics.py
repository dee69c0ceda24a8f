"""Neural-collapse metrics for torchmetrics: exact, streaming, of bounded size whatever the number of samples.

The members that derive from class moments keep one state: for each class a count, a shift ``c_k`` (the mean of the
class's first samples), and sums of ``z = h - c_k`` and of ``|z|^2``; `NC1` also keeps the sum of ``z z^T``. Thanks to
the shift nothing cancels, however far the features lie from the origin and however collapsed they are. Features of
float32 and less are multiplied in float32, those of float64 in float64, once enough of them wait for it to be worth a
product of matrices; everything is accumulated in float64.

Legend: ``N`` samples, ``K`` classes, ``d`` feature width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.distributed import gather_all_tensors

from ncfinetune import collapse
from ncfinetune.collapse import ClassMoments, UndefinedCollapseError

# Numbers that wait to be multiplied together, 16 MB in float32: rows enough for a product at full speed.
_WAITING = 2**22
# Rows that wait at most: few enough for float32 to add up.
_WAITING_ROWS = 2048
# Rows treated at a time before that, so that what is made of them fits in a processor's cache.
_ROWS = 256


class NonFiniteFeaturesError(ValueError):
    """Features hold nan or inf."""


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
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


class _CollapseMetric(Metric, ABC):
    """What the family shares: checked input, float64 states that only ever move between devices.

    Args:
        num_classes: Number of classes ``K``.
        kwargs: What `torchmetrics.Metric` takes.

    Raises:
        ValueError: ``num_classes`` is below 2.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 2:
            raise ValueError(f"expected num_classes of at least 2, got {num_classes}")
        self.num_classes = num_classes
        self._lenient = False

    def add_state(self, name: str, default: list[Any] | Tensor, *args: Any, **kwargs: Any) -> None:
        """Declare a state; one made in inference mode could not be added to outside it."""
        with torch.inference_mode(False):
            super().add_state(name, default.clone() if isinstance(default, Tensor) else default, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add samples, and give the metric of these alone: nan where they do not define it.

        What is refused leaves the earlier samples as they were.
        """
        before, updates = self._copy_state_dict(), self._update_count
        self._lenient = True
        try:
            return super().forward(*args, **kwargs)
        except Exception:
            for name, value in before.items():
                setattr(self, name, value)
            self._update_count, self._computed = updates, None
            self._is_synced, self._to_sync, self._should_unsync = False, self.sync_on_compute, True
            raise
        finally:
            self._lenient = False

    def reset(self) -> None:
        """Forget all samples."""
        with torch.inference_mode(False):
            super().reset()

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        """Move, but never cast: a parent in half precision must not degrade the state. On MPS it stays on the CPU."""

        def move(tensor: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=tensor.device)).device
            return tensor if device.type == "mps" else tensor.to(device)

        with torch.inference_mode(False):
            return super()._apply(move, exclude_state)

    def _copy_state_dict(self) -> dict[str, Any]:
        with torch.inference_mode(False):
            return super()._copy_state_dict()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy that takes samples anywhere, though it be made in inference mode."""
        memo[id(self)] = other = type(self).__new__(type(self))
        with torch.inference_mode(False):
            other.__setstate__(deepcopy(self.__getstate__(), memo))
        return other

    @abstractmethod
    def _merge(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Make the state that of several together."""

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the samples of another metric of this kind, or of its state."""
        super().merge_state(incoming_state)
        self._computed = None  # the base class would give the value from before, or warn that there was no update
        self._update_count += 1

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Merge another state into this one; serves ``forward`` and ``merge_state``."""
        missing = [name for name in self._defaults if name not in incoming_state]
        if missing:
            raise ValueError(f"expected the state of a {type(self).__name__}, got one without {', '.join(missing)}")
        self._merge([self.metric_state, incoming_state])

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        """Make the state that of all processes together: gather all, then merge."""
        tensors = self.metric_state
        gathered = [dist_sync_fn(state, group=process_group or self.process_group) for state in tensors.values()]
        self._merge([dict(zip(tensors, states, strict=True)) for states in zip(*gathered, strict=True)])

    def _checked(self, features: Tensor, labels: Tensor) -> Tensor:
        """``features`` in float32 or float64, on the state's device.

        Raises:
            ValueError, TypeError: The input is not what ``update`` takes.
        """
        self._check_shape(features)
        self._check_labels(features, labels)
        features = features.detach().to(self._state_device)
        features = features if features.dtype == torch.float64 else features.float()
        if not math.isfinite(features.sum()):
            self._check_finite(features)
        return features

    def _check_shape(self, features: Tensor) -> None:
        if features.ndim != 2:
            raise ValueError(
                f"expected features of shape (N, d), got {tuple(features.shape)}; pool spatial or token features "
                "first, such as features.mean((2, 3)) or features[:, 0]"
            )
        if features.shape[1] == 0:
            raise ValueError(f"expected features of width at least 1, got shape {tuple(features.shape)}")
        if not features.is_floating_point():
            raise TypeError(f"expected floating-point features, got {features.dtype}")

    def _check_labels(self, features: Tensor, labels: Tensor) -> None:
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"expected integer labels, got {labels.dtype}")
        if labels.ndim != 1 or len(labels) != len(features):
            raise ValueError(
                f"expected one label for each of {len(features)} features, got labels of shape {tuple(labels.shape)}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            outside = labels[(labels < 0) | (labels >= self.num_classes)]
            raise ValueError(
                f"expected labels in 0..{self.num_classes - 1} (num_classes={self.num_classes}), "
                f"got {sorted(set(outside.tolist()))[:5]}"
            )

    def _check_width(self, features: Tensor, earlier: int) -> None:
        if earlier not in (0, features.shape[1]):
            raise ValueError(f"expected features of width {earlier} as in earlier batches, got {features.shape[1]}")

    def _check_finite(self, features: Tensor) -> None:
        bad = int((~features.isfinite()).any(1).sum())
        if bad:
            raise NonFiniteFeaturesError(
                f"expected finite features, got {bad} of {len(features)} samples with nan or inf "
                f"in batch {self._update_count} since the last reset"
            )

    @property
    def _state_device(self) -> torch.device:
        return torch.device("cpu") if self.device.type == "mps" else self.device


class _MomentMetric(_CollapseMetric):
    """A number of the class moments. ``update(features, labels)`` takes ``(N, d)`` and ``(N,)``; ``d`` is learnt.

    Raises:
        ValueError: In ``update``: wrong shapes, labels outside ``0..K-1``, a width that changes.
        NonFiniteFeaturesError: In ``update``: nan or inf.
        UndefinedCollapseError: In ``compute``: no samples yet, or samples of one class only.
        TypeError: In ``update``: labels that are no integers, features that are no floats.
    """

    _keeps_scatter = False

    count: Tensor
    shift: Tensor
    sums: Tensor
    squares: Tensor
    scatter: Tensor
    weight: Tensor
    waiting: Tensor
    pending: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        per_class = torch.zeros(num_classes, dtype=torch.float64)
        self.add_state("count", per_class, dist_reduce_fx="sum")
        self.add_state("squares", per_class.clone(), dist_reduce_fx="sum")
        self.add_state("sums", per_class.new_zeros(num_classes, 0), dist_reduce_fx="sum")
        self.add_state("shift", per_class.new_zeros(num_classes, 0), dist_reduce_fx="mean")
        self.add_state("weight", per_class.new_zeros(0, 0), dist_reduce_fx="mean")
        if self._keeps_scatter:
            self.add_state("scatter", per_class.new_zeros(0, 0), dist_reduce_fx="sum")
            self.add_state("waiting", torch.zeros(0, 0), dist_reduce_fx="cat")
            self.add_state("pending", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, features: Tensor, labels: Tensor, weight: Tensor | None = None) -> None:
        """Add samples.

        Args:
            features: Pooled features, ``(N, d)``, of any floating-point type.
            labels: Integer labels in ``0..K-1``, ``(N,)``.
            weight: The classifier's weight, ``(K, d)``, which `NC3` compares with the means; the last one counts.
        """
        with torch.inference_mode(False), torch.no_grad():
            features = self._checked(features, labels)
            self._check_width(features, self.shift.shape[1])
            self._check_weight(features.shape[1], weight)
            if weight is not None:
                self.weight = weight.detach().to(self._state_device, torch.float64, copy=True)
            if self.shift.shape[1] == 0:
                self._widen(features.shape[1], features.dtype)
            labels = labels.to(self._state_device, torch.int64)
            for start in range(0, len(features), _ROWS):
                self._add(features[start : start + _ROWS], labels[start : start + _ROWS])

    @abstractmethod
    def _value(self, moments: ClassMoments, state: Mapping[str, Any]) -> Tensor:
        """The metric as a function of the moments without their ``within``, and of the state that they came from."""

    def compute(self) -> Tensor:
        """The metric over all samples since the last reset, float64."""
        state = self.metric_state
        return self._value_of_some(_moments(state), state)

    def moments(self) -> ClassMoments:
        """The class moments of all samples since the last reset: of this process alone, unless synchronised."""
        return _full_moments(self.metric_state)

    @property
    def metric_state(self) -> dict[str, list[Tensor] | Tensor]:
        """The state by name; no samples wait."""
        self._settle()
        return super().metric_state

    def _copy_state_dict(self) -> dict[str, Any]:
        self._settle()
        return super()._copy_state_dict()

    def _value_of_some(self, moments: ClassMoments, state: Mapping[str, Any]) -> Tensor:
        if self._lenient and int(moments.present.sum()) < 2:
            return moments.mean.new_tensor(torch.nan)
        if not moments.present.any():
            raise UndefinedCollapseError(
                f"{type(self).__name__}.compute needs samples; call update(features, labels) first"
            )
        return self._value(moments, state)

    def _check_weight(self, width: int, weight: Tensor | None) -> None:
        if weight is not None and weight.shape != (self.num_classes, width):
            raise ValueError(f"expected weight of shape {(self.num_classes, width)}, got {tuple(weight.shape)}")

    def _widen(self, width: int, dtype: torch.dtype) -> None:
        """Give the states the width of the features, and the shifts their type; they start without."""
        self.sums = self.sums.new_zeros(self.num_classes, width)
        self.shift = torch.zeros_like(self.sums, dtype=dtype)
        if self._keeps_scatter:
            self.scatter = self.scatter.new_zeros(width, width)

    def _add(self, features: Tensor, labels: Tensor) -> None:
        self._choose_shifts(features, labels)
        z = self._room(features) if self._keeps_scatter else torch.empty_like(features)
        torch.sub(features, self.shift.index_select(0, labels), out=z)
        if self._keeps_scatter:
            self.pending.add_(len(z))
        self.count.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        self.sums.index_add_(0, labels, z.double())
        self.squares.index_add_(0, labels, z.square().sum(1).double())

    def _choose_shifts(self, features: Tensor, labels: Tensor) -> None:
        """Shift each new class by the mean of its first samples."""
        new = (self.count[labels] == 0).nonzero().squeeze(1)
        if len(new):
            classes, index, number = torch.unique(labels[new], return_inverse=True, return_counts=True)
            sums = self.sums.new_zeros(len(classes), features.shape[1]).index_add_(0, index, features[new].double())
            self.shift[classes] = (sums / number[:, None]).to(self.shift.dtype)

    def _room(self, features: Tensor) -> Tensor:
        """Memory for as many samples to wait in, until there are enough of them for a product at full speed."""
        if self.waiting.dtype != features.dtype:
            self._settle()
        start, width = int(self.pending), features.shape[1]
        rows = max(_ROWS, min(_WAITING_ROWS, _WAITING // width))
        if start + len(features) > rows:
            self._multiply()
            start = 0
        if len(self.waiting) < rows:
            room = features.new_zeros(rows, width)
            if start:
                room[:start] = self.waiting[:start]
            self.waiting = room
        return self.waiting[start : start + len(features)]

    def _multiply(self) -> None:
        """Add the products ``z z^T`` of the samples that wait."""
        with torch.inference_mode(False), torch.no_grad(), _full_precision(self._state_device):
            _add_products(self.scatter, self.waiting[: int(self.pending)])
            self.pending.zero_()

    def _settle(self) -> None:
        """Let no samples wait, and give back their memory."""
        if self._keeps_scatter and len(self.waiting):
            self._multiply()
            self.waiting = self.waiting.new_zeros(0, 0)

    def _trim(self) -> None:
        """Give back the memory in which no samples wait."""
        if self._keeps_scatter:
            with torch.inference_mode(False):
                self.waiting = self.waiting[: int(self.pending)].clone()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The persistent states; samples that wait go with them."""
        self._trim()
        return super().state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self._trim()
        return super().__getstate__()

    def _hold(self, moments: ClassMoments) -> None:
        """Make the state that of ``moments``."""
        self.count, self.shift, self.sums = moments.count, moments.mean, torch.zeros_like(moments.mean)
        self.squares = moments.count * moments.variance
        if moments.within is not None:
            self.scatter = moments.within * moments.count.sum()

    def _merge(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Make the state that of several together, whatever their shifts."""
        states = [state for state in states if state["shift"].shape[1]]
        widths = {state["shift"].shape[1] for state in states}
        if len(widths) > 1:
            raise ValueError(f"expected states of features of one width to merge, got widths {sorted(widths)}")
        if states:
            with torch.inference_mode(False), torch.no_grad():
                self._hold(reduce(collapse.merge, map(_full_moments, states)))
                self.weight = next((s["weight"] for s in states if len(s["weight"])), self.weight).clone()

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        """Make the state that of all processes together, by one ``all_reduce`` a tensor.

        Moments are moved to the global class means, after which every tensor is a plain sum.
        """
        if dist_sync_fn is not gather_all_tensors:
            super()._sync_dist(dist_sync_fn, process_group)
            return
        with torch.inference_mode(False), torch.no_grad():
            self._sum_over_ranks(process_group or self.process_group)

    def _sum_over_ranks(self, group: Any | None) -> None:
        known = torch.tensor([self.shift.shape[1], len(self.weight) > 0], device=self.count.device)
        dist.all_reduce(known, dist.ReduceOp.MAX, group=group)
        width, weighted = int(known[0]), bool(known[1])
        if width == 0:
            return
        if self.shift.shape[1] == 0:
            self._widen(width, torch.float64)
        local = _full_moments(self.metric_state)
        count = _all_reduce(local.count.clone(), group)
        mean = _all_reduce(local.count[:, None] * local.mean, group) / count.clamp(min=1)[:, None]
        step = (local.mean - mean) * local.present[:, None]
        moved = local.count[:, None] * step
        squares = _all_reduce(local.count * local.variance + (moved * step).sum(1), group)
        within = None
        if local.within is not None:
            scatter = _all_reduce(local.count.sum() * local.within + moved.T @ step, group)
            within = scatter / count.sum().clamp(min=1)
        self._hold(ClassMoments(count, mean, squares / count.clamp(min=1), within))
        if weighted:
            self._average_weight(group)

    def _average_weight(self, group: Any | None) -> None:
        """The weight as the ranks that saw one have it; they agree."""
        seen = len(self.weight) > 0
        holders = _all_reduce(self.count.new_tensor(float(seen)), group)
        weight = self.weight.clone() if seen else torch.zeros_like(self.shift)
        self.weight = _all_reduce(weight, group) / holders


def _all_reduce(tensor: Tensor, group: Any | None) -> Tensor:
    dist.all_reduce(tensor, group=group)
    return tensor


def _blocks(width: int) -> Iterator[slice]:
    """Blocks of rows of the ``(d, d)`` state: enough to leave out near half of it, each enough for a fast product."""
    size = max(64, width // 8)
    return (slice(start, start + size) for start in range(0, width, size))


def _add_products(scatter: Tensor, z: Tensor) -> None:
    """Add ``z^T z`` to the blocks of the ``(d, d)`` state that lie on and above its diagonal."""
    for rows in _blocks(z.shape[1]):
        scatter[rows, rows.start :] += z[:, rows].T @ z[:, rows.start :]


def _moments(state: Mapping[str, Any]) -> ClassMoments:
    """Moments from shifted sums, ``mu_k = c_k + delta_k``, without the covariance within classes."""
    count, sums = state["count"], state["sums"]
    mean = sums / count.clamp(min=1)[:, None]
    squares = state["squares"] - sums.norm(dim=1).square() / count.clamp(min=1)
    variance = squares.clamp(min=0) / count.clamp(min=1)
    return ClassMoments(count.clone(), mean.add_(state["shift"]), variance, None)


def _full_moments(state: Mapping[str, Any]) -> ClassMoments:
    """Moments with it, where the state has it: ``N Sigma_W = sum z z^T - sum_k n_k delta_k delta_k^T``.

    Samples that wait in the state, as in a saved one, are counted in.
    """
    moments = _moments(state)
    if "scatter" not in state:
        return moments
    within, count = state["scatter"].clone(), state["count"]
    with _full_precision(within.device):
        _add_products(within, state["waiting"][: int(state["pending"])])
    for rows in _blocks(len(within)):
        within[rows.stop :, rows] = within[rows, rows.stop :].T
    within.addmm_(state["sums"].T, state["sums"] / count.clamp(min=1)[:, None], alpha=-1)
    return replace(moments, within=within.div_(count.sum().clamp(min=1)))


def _spread(state: Mapping[str, Any], rows: Tensor) -> Tensor:
    """``trace(R Sigma_W R^T)`` of rows ``R``, ``(m, d)``, from shifted sums; ``Sigma_W`` itself is never formed."""
    count, scatter = state["count"], state["scatter"]
    total = -((rows @ state["sums"].T).square() / count.clamp(min=1)).sum()
    for block in _blocks(len(scatter)):
        part = rows[:, block]
        products = part @ scatter[block, block.start :]
        diagonal = torch.tensordot(products[:, : part.shape[1]], part)
        total = total + 2 * torch.tensordot(products, rows[:, block.start :]) - diagonal  # twice for what is mirrored
    return (total / count.sum()).clamp(min=0)


class NC1(_MomentMetric):
    """Within-class variability, `collapse.nc1`: ``trace(Sigma_W Sigma_B^+) / K``; it alone has a ``(d, d)`` state."""

    _keeps_scatter = True

    def _value(self, moments: ClassMoments, state: Mapping[str, Any]) -> Tensor:
        return collapse.nc1_along(moments, partial(_spread, state))


class NC1Ratio(_MomentMetric):
    """Within-class variability by traces, `collapse.nc1_ratio`: ``trace(Sigma_W) / trace(Sigma_B)``."""

    def _value(self, moments: ClassMoments, state: Mapping[str, Any]) -> Tensor:
        return collapse.nc1_ratio(moments)


class CDNV(_MomentMetric):
    """Class-distance normalised variance, `collapse.cdnv`: mean over pairs of classes."""

    def _value(self, moments: ClassMoments, state: Mapping[str, Any]) -> Tensor:
        return collapse.cdnv(moments)


class NC2Equinorm(_MomentMetric):
    """Spread of the norms of the centred class means, `collapse.equinorm`."""

    def _value(self, moments: ClassMoments, state: Mapping[str, Any]) -> Tensor:
        return collapse.equinorm(moments)


class NC2Equiangularity(_MomentMetric):
    """Distance of the class means' cosines from -1/(K-1), `collapse.equiangularity`."""

    def _value(self, moments: ClassMoments, state: Mapping[str, Any]) -> Tensor:
        return collapse.equiangularity(moments)


class NC2ETF(_MomentMetric):
    """Distance of the class means from a simplex equiangular tight frame, `collapse.etf_distance`."""

    def _value(self, moments: ClassMoments, state: Mapping[str, Any]) -> Tensor:
        return collapse.etf_distance(moments)


class NC3(_MomentMetric):
    """Distance of the classifier's rows from the class means, `collapse.self_duality`.

    ``update(features, labels, weight)`` takes the classifier's weight ``(K, d)`` too.
    """

    def _value(self, moments: ClassMoments, state: Mapping[str, Any]) -> Tensor:
        if len(state["weight"]) == 0:
            raise ValueError("NC3 needs the classifier's weight; give it to update(features, labels, weight=...)")
        return collapse.self_duality(moments, state["weight"])


class NC4(_CollapseMetric):
    """Disagreement of the classifier with the nearest class mean, `collapse.disagreement`: a share in 0..1.

    The means are fixed beforehand, which is what lets it stream: those of the training set, say, for a pass over the
    validation set. ``update(features, labels, weight, bias)``; the labels are checked and play no part.

    Args:
        moments: The class moments whose means decide.
        kwargs: What `torchmetrics.Metric` takes.
    """

    differ: Tensor
    total: Tensor

    def __init__(self, moments: ClassMoments, **kwargs: Any) -> None:
        super().__init__(len(moments.count), **kwargs)
        self._moments = moments
        self.add_state("differ", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """Add samples.

        Args:
            features: Features in front of the classifier, ``(N, d)``.
            labels: Integer labels in ``0..K-1``, ``(N,)``.
            weight: The classifier's weight, ``(K, d)``.
            bias: The classifier's bias, ``(K,)``.
        """
        self._check_shape(features)
        shape = tuple(self._moments.mean.shape)
        if tuple(weight.shape) != shape or features.shape[-1] != shape[1]:
            raise ValueError(
                f"expected weight of shape {shape} and features of width {shape[1]} as the class means have them, "
                f"got {tuple(weight.shape)} and {features.shape[-1]}"
            )
        with torch.inference_mode(False), torch.no_grad(), _full_precision(features.device):
            features = self._checked(features, labels)
            if len(features):
                device = features.device
                moved = None if bias is None else bias.to(device)
                share = collapse.disagreement(features, self._moments.to(device), weight.to(device), moved)
                self.differ = self.differ + share * len(features)
                self.total = self.total + len(features)

    def _merge(self, states: Sequence[Mapping[str, Any]]) -> None:
        for name in self._defaults:
            setattr(self, name, sum(state[name] for state in states))

    def compute(self) -> Tensor:
        """The share of samples on which the two disagree, float64."""
        if self.total == 0:
            raise ValueError("NC4.compute needs samples; call update(features, labels, weight, bias) first")
        return self.differ / self.total


class NumericalRank(_CollapseMetric):
    """Mean over present classes of ``|H_k|_F^2 / |H_k|_2^2`` (Li et al. 2022), from a sketch of each class's features.

    The Frobenius norm is exact. The spectral norm is that of a Frequent Directions sketch of ``rows`` rows a class
    (Liberty 2013, arXiv 1206.0594): it never exceeds the true one, and ``|H|_2^2 - |B|_2^2 <= |H|_F^2 / (rows + 1)``.
    So a class of exact rank ``r < rows`` gets at least ``r``, at most ``r / (1 - r / (rows + 1))``; exactly ``r``
    if it has at most ``rows`` samples. Sketches of parts merge under the same bound.

    Args:
        num_classes: Number of classes ``K``.
        rows: Rows of a class's sketch; the state is ``(K, rows, d)`` in float64.
        kwargs: What `torchmetrics.Metric` takes.
    """

    sketch: Tensor
    energy: Tensor
    count: Tensor

    def __init__(self, num_classes: int, rows: int = 32, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        if rows < 1:
            raise ValueError(f"expected rows of at least 1, got {rows}")
        self.rows = rows
        self.add_state("energy", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sketch", torch.zeros(num_classes, rows, 0, dtype=torch.float64), dist_reduce_fx=None)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add samples: features ``(N, d)`` and their labels ``(N,)``."""
        with torch.inference_mode(False), torch.no_grad(), _full_precision(features.device):
            features = self._checked(features, labels).double()
            if self.sketch.shape[2] == 0:
                self.sketch = self.sketch.new_zeros(self.num_classes, self.rows, features.shape[1])
            self._check_width(features, self.sketch.shape[2])
            labels = labels.to(self._state_device, torch.int64)
            self.energy.index_add_(0, labels, features.square().sum(1))
            self.count.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
            for label in sorted(set(labels.tolist())):
                self._add(label, features[labels == label])

    def compute(self) -> Tensor:
        """The mean numerical rank, float64."""
        present = self.count > 0
        if not present.any():
            raise ValueError("NumericalRank.compute needs samples; call update(features, labels) first")
        largest = torch.linalg.matrix_norm(self.sketch[present], 2).square()
        return (self.energy[present] / largest).mean()

    def _add(self, label: int, rows: Tensor) -> None:
        for part in torch.split(rows, 4 * self.rows):
            self.sketch[label] = _shrunk(torch.cat([self.sketch[label], part]), self.rows)

    def _merge(self, states: Sequence[Mapping[str, Any]]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for name in ("energy", "count"):
                setattr(self, name, torch.stack([state[name] for state in states]).sum(0))
            sketches = [state["sketch"] for state in states if state["sketch"].shape[2]]
            if sketches:
                self.sketch = torch.stack([_shrunk(torch.cat(rows), self.rows) for rows in zip(*sketches, strict=True)])


def _shrunk(stack: Tensor, rows: int) -> Tensor:
    """A step of Frequent Directions, ``(m, d)`` to ``(rows, d)``: singular values squared less the largest left out."""
    if len(stack) <= rows:
        return stack
    squares, vectors = torch.linalg.eigh(stack @ stack.T)
    left_out = squares[-rows - 1].clamp(min=0)
    squares, vectors = squares[-rows:], vectors[:, -rows:]
    kept = ((squares - left_out) / squares).clamp(min=0).nan_to_num(0).sqrt()
    return (kept * vectors).T @ stack


# The family by the names under which it is logged; the shared state's largest keeper leads.
MEMBERS: dict[str, type[Any]] = {
    "nc1": NC1,
    "nc1_ratio": NC1Ratio,
    "cdnv": CDNV,
    "nc2_equinorm": NC2Equinorm,
    "nc2_equiangularity": NC2Equiangularity,
    "nc2_etf": NC2ETF,
    "nc3": NC3,
    "numerical_rank": NumericalRank,
}
_DEFAULT_MEMBERS = ("nc1", "nc1_ratio", "cdnv", "nc2_equinorm", "nc2_equiangularity", "nc2_etf")


class CollapseCollection(MetricCollection):
    """A MetricCollection whose members that derive from class moments update and synchronise one state once."""

    def __init__(self, metrics: dict[str, _CollapseMetric], **kwargs: Any) -> None:
        moments = [name for name, metric in metrics.items() if isinstance(metric, _MomentMetric)]
        others = [[name] for name in metrics if name not in moments]
        groups = [sorted(moments, key=lambda name: not metrics[name]._keeps_scatter)] if moments else []
        super().__init__(dict(metrics), compute_groups=[*groups, *others], **kwargs)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add samples to each shared state once; keywords that a member does not take are left out."""
        for group in self.compute_groups.values():
            leader, *_ = members = [getattr(self, name) for name in group]
            leader.update(*args, **leader._filter_kwargs(**kwargs))
            for member in members:
                if member._computed is not None:
                    member._computed = None
        self._state_is_copy = False  # a member that was looked at has a copy of the state from then

    def _compute_groups_create_state_ref(self, copy: bool = False) -> None:
        """Give members the states of their leader that they have too; the base class would give all of them."""
        if not self._state_is_copy:
            for group in self.compute_groups.values():
                leader, *others = [getattr(self, name) for name in group]
                state = leader.metric_state
                for member in others:
                    for name in member._defaults:
                        setattr(member, name, deepcopy(state[name]) if copy else state[name])
                    member._update_count = leader._update_count
        self._state_is_copy = copy

    def compute(self) -> dict[str, Any]:
        """All members, by name; what derives from class moments, from one synchronisation and one set of moments."""
        return self.compute_with_moments()[0]

    def compute_with_moments(self) -> tuple[dict[str, Any], ClassMoments | None]:
        """What ``compute`` gives, and the class moments without ``within``, or None if no member derives from them."""
        values: dict[str, Any] = {}
        moments = None
        for group in self.compute_groups.values():
            leader, *_ = members = [getattr(self, name) for name in group]
            if not isinstance(leader, _MomentMetric):
                values[group[0]] = leader.compute()
                continue
            with leader.sync_context(leader.dist_sync_fn, should_sync=leader._to_sync):
                state = leader.metric_state
            moments = _moments(state)
            for name, member in zip(group, members, strict=True):
                values[name] = member._value_of_some(moments, state)
        return {self._set_name(name): values[name] for name in map(str, self.keys(keep_base=True))}, moments


def neural_collapse(num_classes: int, members: Sequence[str] = _DEFAULT_MEMBERS, **kwargs: Any) -> CollapseCollection:
    """The family as one collection: ``update(features=, labels=)``, and ``weight=`` for ``nc3``.

    Without ``nc1`` there is no ``(d, d)`` state, and an update costs a pass over the batch.

    Args:
        num_classes: Number of classes ``K``.
        members: Which of `MEMBERS`, by name.
        kwargs: What `torchmetrics.MetricCollection` takes, such as ``prefix``.

    Raises:
        ValueError: A name that is no member.
    """
    members = (members,) if isinstance(members, str) else members
    unknown = [name for name in members if name not in MEMBERS]
    if unknown:
        raise ValueError(f"expected members among {', '.join(MEMBERS)}, got {', '.join(unknown)}")
    return CollapseCollection({name: MEMBERS[name](num_classes) for name in members}, **kwargs)

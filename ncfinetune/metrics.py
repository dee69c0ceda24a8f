"""Neural-collapse metrics for torchmetrics: exact, streaming, of bounded size whatever the number of samples.

Metrics of class moments are thin wrappers of a `MomentAccumulator`.

Legend: ``N`` samples, ``K`` classes, ``d`` feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.utilities.distributed import gather_all_tensors

from ncfinetune import collapse
from ncfinetune.inputs import check_finite, check_labels, check_shapes, may_look, raise_flags, sound_samples, whole
from ncfinetune.metric_base import AccumulatorMetric, CollapseMetric, state
from ncfinetune.moment_accumulator import MomentAccumulator
from ncfinetune.moments import ClassMoments, UndefinedCollapseError
from ncfinetune.sketch import ClassSketches


class _MomentMetric(AccumulatorMetric):
    """A metric that is a function of class moments. Abstract.

    Args:
        num_classes: Number of classes ``K``.
        ignore_index: Samples with this label are left out.
        kwargs: What `torchmetrics.Metric` takes.

    Raises:
        UndefinedCollapseError: In ``compute``: no samples yet, or samples of one class only.
    """

    _keeps_scatter = False
    _number: Callable[[ClassMoments], Tensor]

    count, squares, flags = state("count"), state("squares"), state("flags")
    shift, anchors, sums = state("shift"), state("anchors"), state("sums")
    rows, labels = state("rows"), state("labels")

    def __init__(self, num_classes: int, ignore_index: int | None = None, **kwargs: Any) -> None:
        self._ignore_index = ignore_index
        super().__init__(num_classes, **kwargs)
        # A state, so that a MetricCollection does not take metrics that leave out other samples for the same metric.
        none = torch.iinfo(torch.int64).min
        self.add_state("ignored", torch.tensor(none if ignore_index is None else ignore_index), dist_reduce_fx="max")
        self.fixed = ("ignored",)

    def _new_accumulator(self) -> MomentAccumulator:
        return MomentAccumulator(self.num_classes, self._keeps_scatter, self._ignore_index)

    def compute(self) -> Tensor:
        """The metric over all samples since the last reset, float64."""
        return self.value_of(self.checked_moments())

    def moments(self) -> ClassMoments:
        """The class moments of all samples of this process since the last reset; of all processes if synchronised."""
        return self._accumulator.moments()

    def checked_moments(self) -> ClassMoments:
        """The class moments without the dense ``within``, after checking that no sample was invalid.

        Raises:
            ValueError: Labels out of range.
            NonFiniteFeaturesError: nan or inf.
        """
        moments = self._accumulator.moments(within=False)
        self._accumulator.check(type(self).__name__)
        return moments

    def value_of(self, moments: ClassMoments) -> Tensor:
        """The metric as a function of the moments; nan in ``forward`` if they do not define it."""
        if self._lenient and int(moments.present.sum()) < 2:
            return moments.mean.new_tensor(torch.nan)
        if not moments.present.any():
            raise UndefinedCollapseError(
                f"{type(self).__name__}.compute needs samples; call update(features, labels) first"
            )
        return self._number(moments)

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        """Set the state to that of all processes, by one ``all_reduce`` per tensor."""
        if dist_sync_fn is gather_all_tensors:
            self._accumulator.reduce(_summing(process_group or self.process_group))
        else:
            super()._sync_dist(dist_sync_fn, process_group)


def _summing(group: Any | None) -> Callable[[Tensor], Tensor]:
    def all_reduce(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=group)
        return tensor

    return all_reduce


class NC1(_MomentMetric):
    """Within-class variability, `collapse.nc1`: ``trace(Sigma_W Sigma_B^+) / K``; it alone has a ``(d, d)`` state.

    >>> nc1 = NC1(num_classes=2)
    >>> nc1.update(torch.tensor([[-1.1], [-0.9]]), torch.tensor([0, 0]))
    >>> nc1.update(torch.tensor([[0.9], [1.1]]), torch.tensor([1, 1]))
    >>> round(nc1.compute().item(), 6)  # variance 0.01 within the classes, 1 between them, K = 2
    0.005
    """

    _number = staticmethod(collapse.FAMILY["nc1"])
    _keeps_scatter = True
    scatter, rounding, plan = state("scatter"), state("rounding"), state("plan")


class NC1Ratio(_MomentMetric):
    """Within-class variability by traces, `collapse.nc1_ratio`: ``trace(Sigma_W) / trace(Sigma_B)``."""

    _number = staticmethod(collapse.FAMILY["nc1_ratio"])


class CDNV(_MomentMetric):
    """Class-distance normalised variance, `collapse.cdnv`: mean over pairs of classes."""

    _number = staticmethod(collapse.FAMILY["cdnv"])


class NC2Equinorm(_MomentMetric):
    """Spread of the norms of the centred class means, `collapse.equinorm`."""

    _number = staticmethod(collapse.FAMILY["nc2_equinorm"])


class NC2Equiangularity(_MomentMetric):
    """Distance of the class means' cosines from -1/(K-1), `collapse.equiangularity`."""

    _number = staticmethod(collapse.FAMILY["nc2_equiangularity"])


class NC2ETF(_MomentMetric):
    """Distance of the class means from a simplex equiangular tight frame, `collapse.etf_distance`."""

    _number = staticmethod(collapse.FAMILY["nc2_etf"])


class NC3(_MomentMetric):
    """Distance of the classifier's rows from the class means, `collapse.self_duality`.

    ``update(features, labels, weight)`` takes the classifier's weight ``(K, d)`` too.
    """

    weight: Tensor

    def __init__(self, num_classes: int, ignore_index: int | None = None, **kwargs: Any) -> None:
        super().__init__(num_classes, ignore_index, **kwargs)
        self.add_state("weight", torch.zeros(0, 0, dtype=torch.float64), dist_reduce_fx="mean")

    def update(self, features: Tensor, labels: Tensor, weight: Tensor | None = None) -> None:
        """Add samples.

        Args:
            features: Pooled features, ``(N, d)``, of any floating-point type.
            labels: Integer labels in ``0..K-1``, ``(N,)``.
            weight: The classifier's weight, ``(K, d)``; the last one given is used.
        """
        self.check_weight(features, weight)
        super().update(features, labels)
        self.hold_weight(weight)

    def check_weight(self, features: Tensor, weight: Tensor | None) -> None:
        """Refuse a weight whose shape is not ``(K, d)``.

        Raises:
            ValueError: The shape is another.
        """
        width = self._accumulator.width or features.shape[-1]
        expected = (self.num_classes, width)
        sound = features.ndim == 2 and features.shape[1] == width > 0  # other features are refused in update
        if weight is not None and sound and weight.shape != expected:
            raise ValueError(f"expected weight of shape {expected}, got {tuple(weight.shape)}")

    def hold_weight(self, weight: Tensor | None) -> None:
        """Set the weight, ``(K, d)``, to compare with; None keeps the last one."""
        if weight is not None:
            with torch.inference_mode(False), torch.no_grad():
                self.weight = weight.detach().to(self.state_device, torch.float64, copy=True)

    def _number(self, moments: ClassMoments) -> Tensor:
        if len(self.weight) == 0:
            raise ValueError("NC3 needs the classifier's weight; give it to update(features, labels, weight=...)")
        return collapse.self_duality(moments, self.weight)

    def _merge(self, states: Sequence[Mapping[str, Any]]) -> None:
        super()._merge(states)
        self.weight = next((each["weight"] for each in states if len(each["weight"])), self.weight).clone()

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        super()._sync_dist(dist_sync_fn, process_group)
        if dist_sync_fn is gather_all_tensors:
            self.weight = self._common_weight(self.shift.shape[1], process_group or self.process_group)

    @contextmanager
    def common_weight(self, width: int) -> Iterator[None]:
        """Use the weight of the processes that have one, on all processes; all of them must call it.

        Args:
            width: Feature width ``d``, which a process without samples does not know.
        """
        own = self.weight
        self.weight = self._common_weight(width, self.process_group)
        try:
            yield
        finally:
            self.weight = own

    def _common_weight(self, width: int, group: Any | None) -> Tensor:
        all_reduce = _summing(group)
        with torch.inference_mode(False), torch.no_grad():
            seen = len(self.weight) > 0
            holders = all_reduce(self.weight.new_tensor(float(seen)))
            if holders == 0:
                return self.weight
            return all_reduce(self.weight.clone() if seen else self.weight.new_zeros(self.num_classes, width)) / holders


class NC4(CollapseMetric):
    """Disagreement of the classifier with the nearest class mean, `collapse.disagreement`: a share in 0..1.

    The means are fixed beforehand, so that it can be accumulated batch by batch: those of the training set, say, for a
    pass over the validation set. Labels given to ``update(features, labels, weight, bias)`` are checked but not used.

    Args:
        moments: The class moments with the means.
        kwargs: What `torchmetrics.Metric` takes.
    """

    differ: Tensor
    total: Tensor
    flags: Tensor

    def __init__(self, moments: ClassMoments, **kwargs: Any) -> None:
        super().__init__(len(moments.count), **kwargs)
        self._moments = moments
        # For the same reason as `ignored` of the metrics above.
        means = torch.stack([moments.mean.sum(), moments.mean.square().sum(), moments.count.sum()])
        self.add_state("means", means, dist_reduce_fx="max")
        self.fixed = ("means",)
        self.add_state("differ", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("flags", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """Add samples.

        Args:
            features: Features in front of the classifier, ``(N, d)``.
            labels: Integer labels in ``0..K-1``, ``(N,)``.
            weight: The classifier's weight, ``(K, d)``.
            bias: The classifier's bias, ``(K,)``.
        """
        check_shapes(features, labels)
        shape = tuple(self._moments.mean.shape)
        if tuple(weight.shape) != shape or features.shape[-1] != shape[1]:
            raise ValueError(
                f"expected weight of shape {shape} and features of width {shape[1]} as the class means have them, "
                f"got {tuple(weight.shape)} and {features.shape[-1]}"
            )
        with torch.inference_mode(False), torch.no_grad():
            device = self.state_device
            if may_look(features) or may_look(self.total):
                check_labels(labels, self.num_classes)
                check_finite(features, self._update_count)
            if self._moments.mean.device != device:
                self._moments = self._moments.to(device)
            features, labels, weight = (tensor.detach().to(device) for tensor in (features, whole(labels), weight))
            bias = None if bias is None else bias.detach().to(device)
            keep, flags = sound_samples(features, labels, self.num_classes)
            differ = collapse.disagreements(features, self._moments, weight, bias) & keep
            self.differ, self.total = self.differ + differ.sum(), self.total + keep.sum()
            self.flags = self.flags + flags

    def _merge(self, states: Sequence[Mapping[str, Any]]) -> None:
        for name in self._defaults.keys() - set(self.fixed):
            setattr(self, name, sum(each[name] for each in states))

    def compute(self) -> Tensor:
        """The share of samples on which the two disagree, float64."""
        raise_flags(self.flags, int(self.total), self.num_classes, "NC4")
        if self.total == 0:
            raise ValueError("NC4.compute needs samples; call update(features, labels, weight, bias) first")
        return self.differ / self.total


class NumericalRank(AccumulatorMetric):
    """Mean over present classes of ``|H_k|_F^2 / |H_k|_2^2`` (Li et al. 2022), from a sketch of each class's features.

    The Frobenius norm is exact. The spectral norm is that of a Frequent Directions sketch of ``rows`` rows a class
    (Liberty 2013, arXiv 1206.0594): it never exceeds the true one, and ``|H|_2^2 - |B|_2^2 <= |H|_F^2 / (rows + 1)``.
    So a class of exact rank ``r < rows`` gets at least ``r``, at most ``r / (1 - r / (rows + 1))``; exactly ``r``
    if it has at most ``rows`` samples. Sketches of parts merge under the same bound.

    Args:
        num_classes: Number of classes ``K``.
        rows: Rows of a class's sketch; the state is ``(K, rows, d)`` in float64.
        ignore_index: Samples with this label are left out.
        kwargs: What `torchmetrics.Metric` takes.
    """

    sketch, energy, count = state("sketch"), state("energy"), state("count")
    flags, rows, labels = state("flags"), state("rows"), state("labels")

    def __init__(self, num_classes: int, rows: int = 32, ignore_index: int | None = None, **kwargs: Any) -> None:
        if rows < 1:
            raise ValueError(f"expected rows of at least 1, got {rows}")
        self._size, self._ignore_index = rows, ignore_index
        super().__init__(num_classes, **kwargs)

    def _new_accumulator(self) -> ClassSketches:
        return ClassSketches(self.num_classes, self._size, self._ignore_index)

    def compute(self) -> Tensor:
        """The mean numerical rank, float64."""
        self._accumulator.flush()
        self._accumulator.check(type(self).__name__)
        if not self.count.any():
            raise ValueError("NumericalRank.compute needs samples; call update(features, labels) first")
        return self._accumulator.numerical_rank()


# All metrics by log name.
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


class CollapseCollection(MetricCollection):
    """A MetricCollection whose metrics of class moments share one state, updated and synchronised once."""

    def __init__(self, metrics: dict[str, CollapseMetric], **kwargs: Any) -> None:
        alike: dict[Any, list[str]] = {}
        for name, metric in metrics.items():
            key = metric._ignore_index if isinstance(metric, _MomentMetric) else ("alone", name)
            alike.setdefault(key, []).append(name)
        # A group shares its first member's state, which must be one with the (d, d) matrix if there is one.
        for names in alike.values():
            names.sort(key=lambda name: not getattr(metrics[name], "_keeps_scatter", False))
        super().__init__(dict(metrics), compute_groups=[*alike.values()], **kwargs)

    def update(  # type: ignore[override]
        self, features: Tensor, labels: Tensor, weight: Tensor | None = None
    ) -> None:
        """Add samples to each shared state once; ``weight`` is for `NC3`."""
        for group in self.compute_groups.values():
            leader, *_ = members = [getattr(self, name) for name in group]
            duals = [member for member in members if isinstance(member, NC3)]
            for dual in duals:
                dual.check_weight(features, weight)
            leader.update(features, labels)
            for dual in duals:
                dual.hold_weight(weight)
            for member in members:
                if member._computed is not None:
                    member._computed = None
        self._state_is_copy = False  # a member that was accessed has a copy of the state at that time

    def _compute_groups_create_state_ref(self, copy: bool = False) -> None:
        """Share with each member the states of its group's first member that it has too; the base class shares all."""
        if not self._state_is_copy:
            for group in self.compute_groups.values():
                leader, *others = [getattr(self, name) for name in group]
                shared = leader.metric_state
                for member in others:
                    for name in member._defaults.keys() & shared.keys():
                        setattr(member, name, deepcopy(shared[name]) if copy else shared[name])
                    member._update_count = leader._update_count
        self._state_is_copy = copy

    def compute(self) -> dict[str, Any]:
        """All metrics, by name; metrics of class moments use one synchronisation and one computation of the moments."""
        values: dict[str, Any] = {}
        for group in self.compute_groups.values():
            leader, *_ = members = [getattr(self, name) for name in group]
            if not isinstance(leader, _MomentMetric):
                values[group[0]] = leader.compute()
                continue
            with leader.sync_context(leader.dist_sync_fn, should_sync=leader._to_sync):
                moments = leader.checked_moments()
                for name, member in zip(group, members, strict=True):
                    own = isinstance(member, NC3) and leader._is_synced and member is not leader
                    with member.common_weight(moments.mean.shape[1]) if own else nullcontext():
                        values[name] = member.value_of(moments)
        return {self._set_name(name): values[name] for name in map(str, self.keys(keep_base=True))}


def neural_collapse(
    num_classes: int, members: Sequence[str] = tuple(collapse.FAMILY), **kwargs: Any
) -> CollapseCollection:
    """All metrics as one collection: ``update(features=, labels=)``, and ``weight=`` for ``nc3``.

    Without ``nc1`` there is no ``(d, d)`` state, and an update costs a pass over the batch.

        >>> metrics = neural_collapse(num_classes=2, members=["nc1_ratio", "cdnv"], prefix="val/")
        >>> features, labels = torch.tensor([[-1.1], [-0.9], [0.9], [1.1]]), torch.tensor([0, 0, 1, 1])
        >>> metrics.update(features=features, labels=labels)
        >>> {name: round(value.item(), 6) for name, value in metrics.compute().items()}
        {'val/cdnv': 0.0025, 'val/nc1_ratio': 0.01}

    Args:
        num_classes: Number of classes ``K``.
        members: Names among `MEMBERS`.
        kwargs: Arguments of `torchmetrics.MetricCollection`, such as ``prefix``.

    Raises:
        ValueError: A name that is not among `MEMBERS`.
    """
    members = (members,) if isinstance(members, str) else members
    unknown = [name for name in members if name not in MEMBERS]
    if unknown:
        raise ValueError(f"expected members among {', '.join(MEMBERS)}, got {', '.join(unknown)}")
    return CollapseCollection({name: MEMBERS[name](num_classes) for name in members}, **kwargs)

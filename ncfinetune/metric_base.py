"""Base classes of the metrics for torchmetrics: float64 states that are never cast, and merge exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors


class CollapseMetric(Metric, ABC):
    """The base class of all metrics: checked input, and float64 states that are moved but never cast.

    Args:
        num_classes: Number of classes ``K``.
        kwargs: Arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: ``num_classes`` is below 2.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    plot_lower_bound = 0.0

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 2:
            raise ValueError(f"expected num_classes of at least 2, got {num_classes}")
        self.num_classes = num_classes
        # Names of the states that are arguments, which metrics must have in common to be merged.
        self.fixed: tuple[str, ...] = ()
        self._lenient = False

    def add_state(self, name: str, default: list[Any] | Tensor, *args: Any, **kwargs: Any) -> None:
        """Declare a state, outside inference mode: an inference tensor could not be updated in place elsewhere."""
        with torch.inference_mode(False):
            super().add_state(name, default.clone() if isinstance(default, Tensor) else default, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add samples, and return the metric of these alone, or nan if they do not define it.

        Samples that are refused leave the state unchanged.
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
        """Move the state, but never cast it to another precision; for MPS it stays on the CPU."""

        def move(tensor: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=tensor.device)).device
            return tensor if device.type == "mps" else tensor.to(device)

        with torch.inference_mode(False):
            return super()._apply(move, exclude_state)

    def _copy_state_dict(self) -> dict[str, Any]:
        with torch.inference_mode(False):
            return super()._copy_state_dict()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy that can be updated outside inference mode even if it is made inside."""
        memo[id(self)] = other = type(self).__new__(type(self))
        with torch.inference_mode(False):
            other.__setstate__(deepcopy(self.__getstate__(), memo))
        return other

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Figure and axes of a value, of several, or by default of what ``compute`` gives; needs matplotlib."""
        return self._plot(val, ax)

    @abstractmethod
    def _merge(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Make the state that of several together."""

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Merge the state of another metric of this class, or a state dictionary.

        Raises:
            ValueError: The state does not fit, or is of a metric with other arguments.
        """
        given: Mapping[str, Any] = incoming_state.metric_state if isinstance(incoming_state, Metric) else incoming_state
        for name in self.fixed:
            own, other = getattr(self, name), given.get(name)
            if isinstance(other, Tensor) and not torch.equal(other.to(own), own):
                raise ValueError(
                    f"expected the state of a {type(self).__name__} with {name} {own.tolist()}, got one with "
                    f"{other.tolist()}; merge metrics of the same arguments"
                )
        super().merge_state(incoming_state)
        self._computed = None  # the base class would return the cached value, or warn that there was no update
        self._update_count += 1

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Merge another state into this one, for ``forward`` and ``merge_state``."""
        if fault := self._misfit(incoming_state, self.metric_state):
            raise ValueError(fault)
        self._merge([self.metric_state, incoming_state])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load a complete state of the same kind of metric, if there is one; torchmetrics would accept any state."""
        given = {name: state_dict[prefix + name] for name in self._defaults if prefix + name in state_dict}
        fault = self._misfit(given, self._defaults) if given else None
        if fault is not None:
            args[-1].append(fault)
            for name in given:
                del state_dict[prefix + name]
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _misfit(self, state: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
        """Why a state does not fit this metric; None if it does. Sizes of 0 in its own state are still unknown."""
        if missing := [name for name in self._defaults if name not in state]:
            return f"expected the state of a {type(self).__name__}, got one without {', '.join(missing)}"
        for name in self._defaults:
            expected, got = tuple(own[name].shape), tuple(state[name].shape)
            fits = len(got) == len(expected) and all(0 in (a, b) or a == b for a, b in zip(expected, got, strict=True))
            if not fits or own[name].is_floating_point() != state[name].is_floating_point():
                return (
                    f"expected the state of a {type(self).__name__} of {self.num_classes} classes, whose {name} is "
                    f"{own[name].dtype} {expected}, got {state[name].dtype} {got}; use the saved metric's arguments"
                )
        return None

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        """Set the state to that of all processes: gather all, then merge."""
        tensors = self.metric_state
        gathered = [dist_sync_fn(state, group=process_group or self.process_group) for state in tensors.values()]
        self._merge([dict(zip(tensors, states, strict=True)) for states in zip(*gathered, strict=True)])

    @contextmanager
    def sync_context(self, *args: Any, should_unsync: bool = True, **kwargs: Any) -> Iterator[None]:
        """Synchronise, and restore this process's own state afterwards, also after an exception."""
        self.sync(*args, **kwargs)
        try:
            yield
        finally:
            self.unsync(should_unsync=self._is_synced and should_unsync)

    @property
    def state_device(self) -> torch.device:
        """Device of the state: the CPU for MPS, which has no float64."""
        return torch.device("cpu") if self.device.type == "mps" else self.device


def state(name: str) -> Any:
    """A state of the metric that is stored in its accumulator."""

    def get(self: AccumulatorMetric) -> Tensor:
        return getattr(self._accumulator, name)

    def put(self: AccumulatorMetric, value: Tensor) -> None:
        # A copy: a MetricCollection gives the state of one metric to others, and each adds its buffered rows in place.
        with torch.inference_mode(False):
            setattr(self._accumulator, name, value.clone())

    return property(get, put)


class AccumulatorMetric(CollapseMetric):
    """A metric with one accumulator. ``update(features, labels)`` takes ``(N, d)`` and ``(N,)``, for any ``d``.

    Raises:
        ValueError: In ``update``: wrong shapes, labels outside ``0..K-1``, a width that changes.
        NonFiniteFeaturesError: In ``update``: nan or inf. On an accelerator invalid labels and features are reported by
            ``compute``.
        TypeError: In ``update``: labels that are not integers, features that are not floats.
    """

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        self._accumulator = self._new_accumulator()
        for name in self._accumulator.names:
            self.add_state(name, getattr(self._accumulator, name), dist_reduce_fx="sum")

    @abstractmethod
    def _new_accumulator(self) -> Any:
        """An accumulator without samples."""

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add samples.

        Args:
            features: Pooled features, ``(N, d)``, of any floating-point type.
            labels: Integer labels in ``0..K-1``, ``(N,)``.
        """
        self._accumulator.batches = self._update_count - 1
        self._accumulator.update(features, labels)

    @property
    def metric_state(self) -> dict[str, list[Tensor] | Tensor]:
        """The state by name, after flushing the buffer."""
        self._accumulator.flush()
        return super().metric_state

    def _copy_state_dict(self) -> dict[str, Any]:
        self._accumulator.flush()
        return super()._copy_state_dict()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The persistent states, after flushing the buffer."""
        self._accumulator.trim()
        return super().state_dict(*args, **kwargs)

    def _merge(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Make the state that of several together."""
        first, *others = [self._new_accumulator() for _ in states]
        for part, state in zip((first, *others), states, strict=True):
            part.load(state)
        first.merge(others)
        self._accumulator.load(first.state())

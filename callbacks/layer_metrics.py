"""Collapse of several layers over one pass of one data set.

Legend: ``N`` samples of a batch, ``K`` classes, ``P`` of them present, ``d`` feature width, ``M`` samples of a figure.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncfinetune.collapse import EXACT, FAMILY, disagreements, nc1_with_error, rounding_text, self_duality
from ncfinetune.inputs import sound_samples
from ncfinetune.layers import PENULTIMATE
from ncfinetune.metrics import NumericalRank
from ncfinetune.moment_accumulator import MomentAccumulator
from ncfinetune.moments import ClassMoments, NonFiniteFeaturesError, UndefinedCollapseError, UnresolvedCollapseError

# Metrics of the classifier's input only.
OF_CLASSIFIER = ("nc3", "nc4")
METRICS = (*FAMILY, "nc3", "numerical_rank", "nc4")
_KEPT_SAMPLES = 1000

# The classifier's weight ``(K, d)`` and bias ``(K,)``.
Weight = tuple[Tensor, Tensor | None]


@dataclass
class Result:
    """The results of a pass.

    Attributes:
        values: ``{metric: {layer: value}}``; nan where the features do not define it.
        rounding: The possible rounding error of a layer's nc1, in words, if it is relatively above 1e-6.
        moments: The class moments of each layer that has them.
        sample: Some features ``(M, d)`` and labels ``(M,)`` of the last layer on this process, if it has moments.
    """

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    rounding: dict[str, str] = field(default_factory=dict)
    moments: dict[str, ClassMoments] = field(default_factory=dict)
    sample: tuple[Tensor, Tensor] | None = None

    def by_log_name(self, split: str, suffix: str = "") -> dict[str, float]:
        """The values as ``<metric>/<split>/<layer>``, with a suffix that distinguishes several data sets."""
        return {
            f"{metric}/{split}/{layer}{suffix}": value
            for metric, layers in self.values.items()
            for layer, value in layers.items()
        }


class LayerMetrics:
    """Metrics of each layer, batch by batch; features that are not finite make a layer's metrics nan.

    Args:
        layers: The layers' names in depth order.
        num_classes: Number of classes ``K``.
        metrics: Names among `METRICS`; ``nc3`` and ``nc4`` are computed for the layer ``penultimate`` alone.
        ignore_index: Samples with this label are left out.
        means: Moments with the class means for ``nc4``; None leaves it out.
        sample: Keep a sample of the last layer's features for a figure.
        shared: Other processes measure other parts of the set: an error is raised on all of them, in `compute`.
    """

    def __init__(
        self,
        layers: Sequence[str],
        num_classes: int,
        metrics: Sequence[str],
        ignore_index: int | None = None,
        means: ClassMoments | None = None,
        sample: bool = False,
        shared: bool = False,
    ) -> None:
        self.layers = list(layers)
        self._metrics = list(metrics)
        self._num_classes, self._ignore_index = num_classes, ignore_index
        self._accumulators = {
            layer: MomentAccumulator(num_classes, "nc1" in metrics, ignore_index) for layer in self.layers
        }
        ranked = self.layers if "numerical_rank" in metrics else []
        self._ranks = {layer: NumericalRank(num_classes, ignore_index=ignore_index) for layer in ranked}
        self._means = means if "nc4" in metrics else None
        self._decisions: _Decisions | None = None
        self._sample = _Sample(_KEPT_SAMPLES) if sample else None
        self._shared = shared
        self._broken: dict[str, str] = {}
        self._mistake: ValueError | None = None
        self._begun = False
        self._ran: set[str] = set()

    def update(self, features: Mapping[str, Tensor], labels: Tensor, weight: Weight | None = None) -> None:
        """Add a batch.

        Args:
            features: ``{layer: (N, d)}``.
            labels: ``(N,)``.
            weight: Weight and bias of the classifier, if known.

        Raises:
            ValueError: Labels out of range, unless they lie on an accelerator or processes share the set.
        """
        self._begun = True
        for layer, rows in features.items():
            self._ran.add(layer)
            if layer in self._broken or self._mistake is not None:
                continue
            try:
                self._add(layer, rows, labels, weight)
            except NonFiniteFeaturesError as error:
                self._broken[layer] = str(error)
            except ValueError as error:
                if not self._shared:
                    raise
                self._mistake = error
        last = self.layers[-1]
        if self._sample is not None and last in features and last not in self._broken:
            self._sample.add(features[last], labels)

    def _add(self, layer: str, rows: Tensor, labels: Tensor, weight: Weight | None) -> None:
        accumulator = self._accumulators[layer]
        if accumulator.device != rows.device and not accumulator.width:
            accumulator.to(rows.device)
        accumulator.update(rows, labels)
        if layer in self._ranks:
            if self._ranks[layer].device != rows.device:  # moving copies the state, also to where it is
                self._ranks[layer].to(rows.device)
            self._ranks[layer].update(rows, labels)
        if layer == PENULTIMATE and self._means is not None and weight is not None and _fits(weight, self._means):
            if self._decisions is None:
                self._decisions = _Decisions(self._means, weight, self._ignore_index)
            self._decisions.add(rows, labels)

    def compute(self, split: str, strategy: Any, weight: Weight | None = None, has_classifier: bool = False) -> Result:
        """The metrics over all samples of all processes; all of them must call it.

        Args:
            split: Name of the data set, for messages.
            strategy: The trainer's strategy, which sums numbers over the processes.
            weight: Weight and bias of the classifier, if this process can read them.
            has_classifier: Whether there is a classifier.

        Raises:
            ValueError: A layer never ran; labels out of range in any of the processes.
        """
        total = _summing(strategy) if self._shared else lambda tensor: tensor
        own = self._mistake is not None, has_classifier, self._begun
        flags = [[layer in self._broken, layer in self._ran, *own] for layer in self.layers]
        counts = total(torch.tensor(flags, dtype=torch.float32)).T.tolist()
        broken, ran, (mistaken, *_), (has_classifier, *_), (begun, *_) = counts
        if mistaken:
            raise self._mistake or ValueError(f"another process found an error in the {split} set: see its message")
        silent = [layer for layer, processes in zip(self.layers, ran, strict=True) if begun and not processes]
        if silent:
            raise ValueError(
                f"layer {silent[0]!r} never ran in a pass over the {split} set; name layers that the module's forward "
                f"and its {split} step reach, and see that they run before any compiled copy of them"
            )
        result = Result(sample=None if self._sample is None else self._sample.rows())
        undefined: dict[str, str] = {}
        for layer, broken_in in zip(self.layers, broken, strict=True):
            if broken_in:
                undefined[layer] = self._broken.get(layer, "another process has features with nan or inf")
                continue
            device = strategy.root_device if self._shared else None
            try:
                moments = self._measure(result, layer, split, total, device)
                if layer == PENULTIMATE and has_classifier:
                    self._compare_classifier(result, moments, weight, total)
            except (UndefinedCollapseError, NonFiniteFeaturesError) as error:
                undefined[layer] = str(error)
        self._set_nan(result, undefined, split, has_classifier)
        return result

    def _measure(
        self, result: Result, layer: str, split: str, total: Callable[[Tensor], Tensor], device: torch.device | None
    ) -> ClassMoments:
        accumulator = self._accumulators[layer]
        if self._shared:
            accumulator.reduce(total, device)
        accumulator.check(f"layer {layer!r} on the {split} set")
        moments = accumulator.moments(within=False)
        if not moments.present.any():
            raise UndefinedCollapseError(f"no samples in the {split} set")
        for name in self._metrics:
            if name == "nc1":
                _set(result, name, layer, _nc1(result, moments, layer, split))
            elif name in FAMILY:
                _set(result, name, layer, float(FAMILY[name](moments)))
        if layer in self._ranks:
            rank = self._ranks[layer] if device is None else self._ranks[layer].to(device)
            _set(result, "numerical_rank", layer, float(rank.compute()))
        result.moments[layer] = moments
        return moments

    def _compare_classifier(
        self, result: Result, moments: ClassMoments, weight: Weight | None, total: Callable[[Tensor], Tensor]
    ) -> None:
        """Compute ``nc3`` and ``nc4``; a process without batches may not know the classifier's weight."""
        fits = weight is not None and _fits(weight, moments)
        differs = weight is not None and not fits
        if "nc3" in self._metrics:
            own = float(self_duality(moments, weight[0].to(moments.mean.device))) if weight and fits else 0.0
            value, known, left_out = total(torch.tensor([own, fits, differs], dtype=torch.float64)).tolist()
            if not known and not left_out:
                warnings.warn(
                    "nc3 is logged as nan: the weight of the classifier, which is quantised or sharded over "
                    "processes, cannot be read",
                    stacklevel=2,
                )
            if known or not left_out:
                _set(result, "nc3", PENULTIMATE, value / known if known else float("nan"))
        if self._means is not None:
            counts = torch.zeros(2, dtype=torch.float64) if self._decisions is None else self._decisions.counts
            different, samples, left_out = total(torch.cat([counts, counts.new_tensor([differs])])).tolist()
            if samples or not left_out:
                _set(result, "nc4", PENULTIMATE, different / samples if samples else float("nan"))

    def _set_nan(self, result: Result, undefined: Mapping[str, str], split: str, has_classifier: bool) -> None:
        """Set every metric of these layers to nan, with one warning for all of them."""
        for layer in undefined:
            result.moments.pop(layer, None)
            for name in self._metrics:
                of_classifier = layer == PENULTIMATE and has_classifier and (name != "nc4" or self._means is not None)
                if name not in OF_CLASSIFIER or of_classifier:
                    _set(result, name, layer, float("nan"))
        if undefined:
            layers = ", ".join(map(repr, undefined))
            reason = next(iter(undefined.values()))
            warnings.warn(f"the collapse of layer {layers} on the {split} set is logged as nan: {reason}", stacklevel=2)


def _set(result: Result, name: str, layer: str, value: float) -> None:
    result.values.setdefault(name, {})[layer] = value


def _nc1(result: Result, moments: ClassMoments, layer: str, split: str) -> float:
    try:
        value, error = nc1_with_error(moments)
    except UnresolvedCollapseError as refusal:
        warnings.warn(f"nc1 of layer {layer!r} on the {split} set is logged as nan: {refusal}", stacklevel=2)
        return float("nan")
    if error > EXACT:
        result.rounding[layer] = rounding_text(error)
    return float(value)


def _fits(weight: Weight, moments: ClassMoments) -> bool:
    return weight[0].shape == moments.mean.shape


def _summing(strategy: Any) -> Callable[[Tensor], Tensor]:
    """A function that sums a tensor over the processes, on the strategy's device."""
    return lambda tensor: strategy.reduce(tensor.to(strategy.root_device), reduce_op="sum")


class _Decisions:
    """How often the classifier and the nearest class mean decide differently: NC4 of Papyan et al. (2020), fig. 7.

    Args:
        means: Class moments with the means.
        weight: Weight and bias of the classifier.
        ignore_index: Samples with this label do not count.

    Attributes:
        counts: Numbers of samples with different decisions and of all samples, ``(2,)``.
    """

    def __init__(self, means: ClassMoments, weight: Weight, ignore_index: int | None = None) -> None:
        self._means, self._ignore_index = means, ignore_index
        self.counts = torch.zeros(2, dtype=torch.float64, device=means.mean.device)
        self._weight = weight[0].to(self.counts)
        self._bias = None if weight[1] is None else weight[1].to(self.counts)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add samples; samples with a label out of range or with nan or inf do not count."""
        features, labels = features.to(self.counts.device), labels.to(self.counts.device)
        differ = disagreements(features, self._means, self._weight, self._bias)
        counted, _ = sound_samples(features, labels, len(self._weight), self._ignore_index)
        self.counts = self.counts + torch.stack([(differ & counted).sum(), counted.sum()])


class _Sample:
    """A uniform sample of rows, kept on their device (Vitter 1985, algorithm R, with numbers drawn on the host).

    Args:
        size: Largest number of rows.
    """

    def __init__(self, size: int) -> None:
        self._size, self._seen = size, 0
        self._generator = np.random.default_rng(0)
        self._features: Tensor | None = None
        self._labels: Tensor | None = None

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Replace rows by new ones with the probability that keeps the sample uniform."""
        if self._features is None or self._labels is None:
            self._features = features.new_zeros(self._size, features.shape[1], dtype=torch.float32)
            self._labels = labels.new_full((self._size,), -1)
        positions = np.arange(self._seen, self._seen + len(features))
        self._seen += len(features)
        slots = np.where(positions < self._size, positions, self._generator.integers(0, positions + 1))
        taken = {int(slots[row]): int(row) for row in np.flatnonzero(slots < self._size)}  # the last one stays
        if taken:
            index = torch.tensor([list(taken), list(taken.values())])
            to, rows = index.to(features.device, non_blocking=True)
            self._features.index_copy_(0, to, features.index_select(0, rows).float())
            self._labels.index_copy_(0, to, labels.index_select(0, rows))

    def rows(self) -> tuple[Tensor, Tensor] | None:
        """Features ``(M, d)`` and labels ``(M,)`` on the CPU."""
        if self._features is None or self._labels is None:
            return None
        kept = min(self._seen, self._size)
        return self._features[:kept].cpu(), self._labels[:kept].cpu()

"""Collapse of several layers over one pass of one data set.

Legend: ``N`` samples of a batch, ``K`` classes, ``d`` feature width, ``M`` samples kept for a picture.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ncfinetune.collapse import self_duality
from ncfinetune.layers import PENULTIMATE
from ncfinetune.metrics import MEMBERS, NC4, neural_collapse
from ncfinetune.moments import ClassMoments, NonFiniteFeaturesError, UndefinedCollapseError

# What is measured in front of the classifier only.
_OF_CLASSIFIER = ("nc3", "nc4")
METRICS = (*MEMBERS, "nc4")
_KEPT_SAMPLES = 1000


@dataclass
class Result:
    """What a pass found.

    Attributes:
        values: ``{metric: {layer: value}}``; nan where the features do not define it.
        moments: The class moments of each layer that has them.
        sample: Some features ``(M, d)`` and labels ``(M,)`` of this process, of the last layer if it has moments.
    """

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    moments: dict[str, ClassMoments] = field(default_factory=dict)
    sample: tuple[Tensor, Tensor] | None = None


class LayerStatistics:
    """Metrics of each layer, batch by batch; features that are not finite make a layer's metrics nan.

    Args:
        layers: The layers' names in depth order.
        num_classes: Number of classes ``K``.
        metrics: Names among `METRICS`; ``nc3`` and ``nc4`` are of the layer ``penultimate`` alone.
        classifier: What ``nc3`` and ``nc4`` are about; left out where it is None or not as wide as the features.
        means: Moments whose class means decide for ``nc4``; None leaves it out.

    Attributes:
        seen: Samples that the process has been given.
    """

    def __init__(
        self,
        layers: Sequence[str],
        num_classes: int,
        metrics: Sequence[str],
        classifier: nn.Linear | None = None,
        means: ClassMoments | None = None,
    ) -> None:
        self.layers = list(layers)
        self.seen = 0
        members = [name for name in metrics if name not in _OF_CLASSIFIER]
        # The cheapest member has the moments where nothing else is wanted.
        self._collections = {layer: neural_collapse(num_classes, members or ["nc1_ratio"]) for layer in layers}
        self._members = members
        self._classifier = classifier if PENULTIMATE in layers else None
        self._nc4 = NC4(means) if "nc4" in metrics and means is not None and self._fits(means) else None
        self._judged = ["nc3"] if "nc3" in metrics and self._classifier is not None else []
        self._judged += [] if self._nc4 is None else ["nc4"]
        self._broken: dict[str, str] = {}
        self._ran: set[str] = set()
        self._sample: tuple[Tensor, Tensor, Tensor] | None = None
        self._generator = torch.Generator().manual_seed(0)

    def update(self, features: Mapping[str, Tensor], labels: Tensor) -> None:
        """Add a batch: ``{layer: (N, d)}`` and labels ``(N,)``."""
        for layer, rows in features.items():
            self._ran.add(layer)
            if layer in self._broken:
                continue
            try:
                self._collections[layer].to(rows.device).update(rows, labels)
                if layer == PENULTIMATE and self._nc4 is not None and self._classifier is not None:
                    self._nc4.to(rows.device).update(rows, labels, self._classifier.weight, self._classifier.bias)
            except NonFiniteFeaturesError as error:
                self._broken[layer] = str(error)
        last = self.layers[-1]
        if last in self._broken:
            self._sample = None
        elif last in features:
            self._keep(features[last], labels)

    def _fits(self, moments: ClassMoments) -> bool:
        return self._classifier is not None and self._classifier.weight.shape == moments.mean.shape

    def _keep(self, features: Tensor, labels: Tensor) -> None:
        """Keep a uniform sample: the rows that drew the largest numbers so far."""
        draws = torch.rand(len(labels), generator=self._generator)
        new = (draws, features.to("cpu", torch.float32), labels.cpu())
        both = new if self._sample is None else tuple(map(torch.cat, zip(self._sample, new, strict=True)))
        best = both[0].topk(min(_KEPT_SAMPLES, len(both[0]))).indices
        self._sample = (both[0][best], both[1][best], both[2][best])

    def compute(self, split: str, strategy: Any) -> Result:
        """The metrics over all samples of all processes; all of them must call it.

        Args:
            split: Name of the data set, for messages.
            strategy: The trainer's, which adds up numbers over the processes.

        Raises:
            ValueError: A layer never ran.
        """
        flags = torch.tensor(
            [[layer in self._broken, layer in self._ran] for layer in self.layers], dtype=torch.float32
        )
        flags = strategy.reduce(flags.to(strategy.root_device), reduce_op="sum").cpu()
        broken = {layer: bool(flag) for layer, flag in zip(self.layers, flags[:, 0], strict=True)}
        silent = [layer for layer, ran in zip(self.layers, flags[:, 1], strict=True) if not ran]
        if silent:
            raise ValueError(
                f"layer {silent[0]!r} never ran in a pass over the {split} set; name layers that the module's forward "
                f"and its {split} step reach, and see that they run before any compiled copy of them"
            )
        result = Result(sample=None if self._sample is None else self._sample[1:])
        undefined: dict[str, str] = {}
        for layer in self.layers:
            if broken[layer]:
                undefined[layer] = self._broken.get(layer, "another process has features with nan or inf")
                continue
            try:
                self._measure(result, layer, strategy.root_device)  # where a process without batches has none
            except UndefinedCollapseError as error:
                undefined[layer] = str(error)
        self._set_nan(result, undefined, split)
        return result

    def _measure(self, result: Result, layer: str, device: torch.device) -> None:
        values, moments = self._collections[layer].to(device).compute_with_moments()
        assert moments is not None
        self._set(result, layer, values | (self._judge(moments) if layer == PENULTIMATE else {}))
        result.moments[layer] = moments

    def _judge(self, moments: ClassMoments) -> dict[str, Any]:
        """What compares the classifier with the class means."""
        values: dict[str, Any] = {}
        if "nc3" in self._judged and self._classifier is not None and self._fits(moments):
            values["nc3"] = self_duality(moments, self._classifier.weight.detach())
        if self._nc4 is not None:
            values["nc4"] = self._nc4.to(moments.mean.device).compute()
        return values

    def _set(self, result: Result, layer: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name in self._members or name in self._judged:
                result.values.setdefault(name, {})[layer] = float(value)

    def _set_nan(self, result: Result, undefined: Mapping[str, str], split: str) -> None:
        """Make every metric of these layers nan, with one warning for all of them."""
        for layer in undefined:
            names = [*self._members, *(self._judged if layer == PENULTIMATE else [])]
            self._set(result, layer, dict.fromkeys(names, float("nan")))
        if undefined:
            layers = ", ".join(map(repr, undefined))
            reason = next(iter(undefined.values()))
            warnings.warn(f"the collapse of layer {layers} on the {split} set is logged as nan: {reason}", stacklevel=2)

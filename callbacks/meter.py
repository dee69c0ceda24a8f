"""CollapseMeter: measures the collapse of a module's layers in successive passes over data sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from ncfinetune.moments import ClassMoments

from .layer_metrics import LayerMetrics, Result, Weight
from .observer import LayerObserver


class CollapseMeter:
    """Measures an observer's layers in passes over one or several data sets.

    Args:
        observer: Captures the layers' features and the labels of a batch.
        num_classes: Number of classes ``K``.
        metrics: Names among `METRICS`.
        ignore_index: Samples with this label are left out.
        shared: Other processes measure other parts of the sets.

    Attributes:
        observer: The observer.
        num_classes: The number of classes.
    """

    def __init__(
        self,
        observer: LayerObserver,
        num_classes: int,
        metrics: Sequence[str],
        ignore_index: int | None = None,
        shared: bool = False,
    ) -> None:
        self.observer, self.num_classes = observer, num_classes
        self._of_set = partial(LayerMetrics, observer.names, num_classes, metrics, ignore_index, shared=shared)
        self._loaders: Sequence[Any] = []
        self._metrics: list[LayerMetrics] = []
        self._weight: Weight | None = None

    def begin(self, loaders: Sequence[Any], means: ClassMoments | None = None, sample: bool = False) -> None:
        """Begin a pass, and discard the previous one.

        Args:
            loaders: The loader of each data set, in the order of their ``dataloader_idx``.
            means: Moments with the class means for ``nc4``; None leaves it out.
            sample: Keep a sample of the last layer's features for a figure.
        """
        self.observer.restart()
        self._loaders, self._weight = loaders, None
        self._metrics = [self._of_set(means=means, sample=sample) for _ in loaders]

    def update(self, index: int = 0) -> None:
        """Add the last batch, which is of the pass's ``index``-th data set."""
        features, labels = self.observer.take(self._loaders[index], index)
        self._weight = self._weight or self.observer.weight()
        self._metrics[index].update(features, labels, self._weight)

    def run(self, batches: Iterable[Any]) -> None:
        """Run the module on batches of the first data set, which are on the device, and add them."""
        for batch in batches:
            self.observer.run(batch)
            self.update()

    def finish(self, split: str, strategy: Any) -> list[Result]:
        """The results of the pass on each data set; all processes must call it.

        Args:
            split: Name of the data sets, for messages.
            strategy: The trainer's strategy, which sums numbers over the processes.

        Raises:
            ValueError: A layer never ran; labels out of range in any of the processes.
        """
        has_classifier = self.observer.classifier is not None
        results = [metrics.compute(split, strategy, self._weight, has_classifier) for metrics in self._metrics]
        self.observer.close()
        return results

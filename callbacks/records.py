"""All numbers of a tracked run: as a table and as a picture for notebooks.

Records are ``{split: {epochs trained: {metric: {layer: value}}}}``, layers in depth order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import figures

Records = dict[str, dict[int, dict[str, dict[str, float]]]]
COLUMNS = ("epoch", "split", "layer", "metric", "value")


def to_rows(records: Records) -> list[tuple[int, str, str, str, float]]:
    """A row ``(epoch, split, layer, metric, value)`` for each number."""
    return [
        (epoch, split, layer, metric, value)
        for split, passes in records.items()
        for epoch, metrics in passes.items()
        for metric, layers in metrics.items()
        for layer, value in layers.items()
    ]


def to_frame(records: Records) -> Any:
    """The rows as a pandas DataFrame.

    Raises:
        ModuleNotFoundError: pandas is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to_frame() makes a pandas DataFrame: pip install pandas") from error
    return pandas.DataFrame(to_rows(records), columns=list(COLUMNS))


def plot(records: Records, split: str | None = None, metrics: str | Sequence[str] | None = None) -> figures.Shown:
    """A panel for each metric of a split: its value over epochs, a line for each layer.

    Args:
        records: The numbers.
        split: ``train``, ``val`` or ``test``; None is the first that was measured.
        metrics: Names of metrics; None is all.

    Raises:
        ValueError: Nothing was measured, or not that split or metric.
    """
    if not records:
        raise ValueError("there is nothing to plot: nothing was measured yet; fit, validate or test with the tracker")
    split = next(iter(records)) if split is None else split
    if split not in records:
        raise ValueError(f"expected a split among {', '.join(records)}, got {split!r}")
    curves = _curves(records[split])
    wanted = list(curves) if metrics is None else [metrics] if isinstance(metrics, str) else list(metrics)
    if unknown := [name for name in wanted if name not in curves]:
        raise ValueError(f"expected metrics among {', '.join(curves)}, got {unknown[0]!r}")
    return figures.over_epochs({name: curves[name] for name in wanted}, split)


def _curves(passes: Mapping[int, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, dict[int, float]]]:
    """``{metric: {layer: {epoch: value}}}``."""
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for epoch, metrics in passes.items():
        for metric, layers in metrics.items():
            for layer, value in layers.items():
                curves.setdefault(metric, {}).setdefault(layer, {})[epoch] = value
    return curves


def in_words(records: Records) -> str:
    """The last values of the last layer in one line, nc1 first; empty if nothing was measured."""
    texts = []
    for split, passes in records.items():
        epoch = max(passes)
        metric, layers = min(passes[epoch].items(), key=lambda item: item[0] != "nc1")
        layer, value = list(layers.items())[-1]
        texts.append(f"{metric}/{split}/{layer} {value:.3g} (epoch {epoch})")
    return ", ".join(texts)

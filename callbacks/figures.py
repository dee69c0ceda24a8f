"""The tracker's figures: pure functions from numbers to matplotlib figures on white.

Legend: ``M`` samples, ``P`` classes that have samples, ``d`` feature width.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from ncfinetune.collapse import ClassMoments, cosine_matrix

_MAX_NAMED_CLASSES = 30
_LONGEST_NAME = 14
# TensorBoard shows pictures in tiles of 330 to 700 pixels: on a figure of 4 inches a letter of 9 points has 10 pixels
# in the smallest tile, and at 200 dots per inch the picture is sharp in the largest.
_WIDTH, _DPI = 4.0, 200
# Heights of a name over its point, in points: a line of small letters has ten.
_HEIGHTS = [5, *(sign * 10 * line + 5 for line in range(1, 9) for sign in (-1, 1))]


class Shown(Figure):
    """A figure that notebooks show without pyplot."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=100)
        return content.getvalue()


def of_pass(
    history: Mapping[int, Mapping[str, float]],
    moments: Mapping[str, ClassMoments],
    sample: tuple[Tensor, Tensor] | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, Figure]:
    """All figures of a pass, by name: nc1 over depth if it was measured, and the classes in the last layer.

    Args:
        history: ``{epoch: {layer: nc1}}``, layers in depth order.
        moments: ``{layer: class moments}`` of the pass, in depth order.
        sample: Features ``(M, d)`` and labels ``(M,)`` of the last layer.
        names: Names of the classes; None shows their labels.
    """
    pictures = {}
    if len(next(iter(history.values()), {})) > 1:
        pictures["depth"] = depth(history, "nc1")
    if moments:
        layer, last = list(moments.items())[-1]
        pictures[f"cosines_{layer}"] = cosines(last, names)
        pictures[f"spread_{layer}"] = spread(last, names)
        if sample is not None:
            pictures[f"projection_{layer}"] = projection(last, *sample, names)
    return pictures


def depth(history: Mapping[int, Mapping[str, float]], metric: str) -> Figure:
    """A metric over depth, one line for each tracked epoch, light to dark: the layer-wise picture of Li et al. (2022).

    Args:
        history: ``{epoch: {layer: value}}``, layers in depth order.
        metric: Its name.
    """
    figure, axes = _axes()
    colours = _shades(len(history))
    for (epoch, values), colour in zip(history.items(), colours, strict=True):
        labelled = epoch in (min(history), max(history)) or len(history) <= 8
        axes.plot(list(values), list(values.values()), "o-", color=colour, label=str(epoch) if labelled else None)
    axes.set(yscale="log", ylabel=metric, title=f"{metric} over depth")
    _turn(axes)
    axes.grid(alpha=0.3)
    axes.legend(title="epochs", frameon=False, fontsize="small")
    return figure


def cosines(moments: ClassMoments, names: Sequence[str] | None = None) -> Figure:
    """Cosines between the centred class means, as differences from -1/(P-1), their value at full collapse."""
    figure, axes = _axes()
    matrix = cosine_matrix(moments)
    ideal = -1 / (len(matrix) - 1)
    difference = (matrix - ideal).fill_diagonal_(0).cpu().numpy()
    image = axes.imshow(difference, cmap="PuOr", vmin=-1, vmax=1)
    figure.colorbar(image, ax=axes, label=f"cosine less its ideal, {ideal:.3g}")
    axes.set_title("cosines between class means", fontsize="medium")
    if len(matrix) <= _MAX_NAMED_CLASSES:
        shown = _class_names(moments, names)
        size = "small" if len(shown) <= 12 else 4
        axes.set_xticks(range(len(shown)), shown, fontsize=size)
        axes.set_yticks(range(len(shown)), shown, fontsize=size)
        _turn(axes)
    return figure


def spread(moments: ClassMoments, names: Sequence[str] | None = None) -> Figure:
    """Standard deviation within each class against the distance of its mean from the global mean."""
    figure, axes = _axes()
    present = moments.present
    within = moments.variance[present].sqrt().cpu().numpy()
    between = moments.centred.norm(dim=1).cpu().numpy()
    axes.scatter(between, within, s=24, color="#0072B2")
    top = 1.1 * float(max(within.max(), between.max())) or 1.0  # of one image per class, say, before a step
    axes.plot([0, top], [0, top], color="0.7", linewidth=1, zorder=0)
    axes.set(xlim=(0, top), ylim=(0, top), title="spread within and between classes")
    axes.set(xlabel="distance of class mean from global mean", ylabel="standard deviation within class")
    _name(axes, _class_names(moments, names), list(zip(between.tolist(), within.tolist(), strict=True)))
    return figure


def projection(moments: ClassMoments, features: Tensor, labels: Tensor, names: Sequence[str] | None = None) -> Figure:
    """Features ``(M, d)`` and class means on the two directions in which the class means differ most."""
    figure, axes = _axes()
    centred = moments.centred.cpu()
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    if len(directions) < 2:  # one-dimensional features
        directions = torch.cat([directions, torch.zeros_like(directions)])
    points = ((features.double() - moments.global_mean.cpu()) @ directions.T).numpy()
    means = (centred @ directions.T).numpy()
    kinds = moments.present.nonzero().squeeze(1).tolist()
    colours = _shades(len(kinds), "turbo")
    for label, mean, colour in zip(kinds, means, colours, strict=True):
        own = points[(labels == label).numpy()]
        axes.scatter(own[:, 0], own[:, 1], s=6, color=colour, alpha=0.5, linewidths=0)
        axes.scatter(mean[0], mean[1], s=70, marker="X", color=colour, edgecolors="black", linewidths=0.8)
    axes.set(title="features (dots), class means (crosses)")
    axes.set_aspect("equal", "datalim")
    _name(axes, _class_names(moments, names), [(float(x), float(y)) for x, y in means])
    return figure


def _name(axes: Axes, names: Sequence[str], points: Sequence[tuple[float, float]]) -> None:
    """Write names beside points, each at the first place above or below its point where it covers no other name."""
    if len(names) > _MAX_NAMED_CLASSES:
        return
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # finds the places of points in the picture
    line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0}
    taken: list[Any] = []
    for name, point in zip(names, points, strict=True):
        text = axes.annotate(
            name, point, xytext=(5, 5), textcoords="offset points", fontsize="small", arrowprops=line, parse_math=False
        )
        for height in (*_HEIGHTS, _HEIGHTS[0]):  # the first, if none is free
            text.xyann = (5, height)
            text.get_window_extent()  # moves it
            box = Text.get_window_extent(text)  # without the line
            inside = axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def over_epochs(curves: Mapping[str, Mapping[str, Mapping[int, float]]], split: str) -> Shown:
    """A panel for each metric: its value over epochs, a line for each layer, light to dark with depth.

    Args:
        curves: ``{metric: {layer: {epochs trained: value}}}``, layers in depth order.
        split: The measured set, for the title.
    """
    columns = min(len(curves), 3)
    rows = -(-len(curves) // columns)
    figure = Shown(figsize=(_WIDTH * columns, 3 * rows), layout="constrained", facecolor="white", dpi=_DPI)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    lines: dict[str, Any] = {}
    order = list(dict.fromkeys(layer for layers in curves.values() for layer in layers))
    colours = dict(zip(order, _shades(len(order)), strict=True))
    for axes, (metric, layers) in zip(panels, curves.items(), strict=False):
        for layer, values in layers.items():
            (lines[layer],) = axes.plot(list(values), list(values.values()), ".-", color=colours[layer])
        if min((value for values in layers.values() for value in values.values()), default=0) > 0:
            axes.set_yscale("log")
        axes.set(title=metric, xlabel="epochs")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    for axes in panels[len(curves) :]:
        axes.remove()
    figure.legend(lines.values(), lines, loc="outside right upper", title="layers", fontsize="small", frameon=False)
    figure.suptitle(f"{split} images")
    return figure


def _axes() -> tuple[Shown, Axes]:
    figure = Shown(figsize=(_WIDTH, 0.85 * _WIDTH), layout="constrained", facecolor="white", dpi=_DPI)
    return figure, figure.subplots()


def _class_names(moments: ClassMoments, names: Sequence[str] | None) -> list[str]:
    """Short names of the classes that have samples."""
    labels = moments.present.nonzero().squeeze(1).tolist()
    full = [str(label) if names is None else names[label] for label in labels]
    return [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in full]


def _turn(axes: Axes) -> None:
    axes.tick_params(axis="x", rotation=35)
    for text in axes.get_xticklabels():
        text.set(horizontalalignment="right", rotation_mode="anchor")


def _shades(number: int, name: str = "viridis_r") -> list[tuple[float, float, float, float]]:
    from matplotlib import colormaps

    return [colormaps[name](0.05 + 0.9 * i / max(number - 1, 1)) for i in range(number)]

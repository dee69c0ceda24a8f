"""The tracker's figures: pure functions from numbers to matplotlib figures on white.

Legend: ``M`` samples, ``P`` classes that have samples, ``d`` feature width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ncfinetune.collapse import ClassMoments, cosine_matrix

_MAX_NAMED_CLASSES = 30


def of_pass(
    history: Mapping[int, Mapping[str, float]],
    moments: Mapping[str, ClassMoments],
    sample: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Figure]:
    """All figures of a pass, by name: nc1 over depth if it was measured, and the classes in the last layer.

    Args:
        history: ``{epoch: {layer: nc1}}``, layers in depth order.
        moments: ``{layer: class moments}`` of the pass, in depth order.
        sample: Features ``(M, d)`` and labels ``(M,)`` of the last layer.
    """
    pictures = {}
    if len(next(iter(history.values()), {})) > 1:
        pictures["depth"] = depth(history, "nc1")
    if moments:
        layer, last = list(moments.items())[-1]
        pictures[f"cosines_{layer}"] = cosines(last)
        pictures[f"spread_{layer}"] = spread(last)
        if sample is not None:
            pictures[f"projection_{layer}"] = projection(last, *sample)
    return pictures


def depth(history: Mapping[int, Mapping[str, float]], metric: str) -> Figure:
    """A metric over depth, one line for each tracked epoch, light to dark: the layer-wise picture of Li et al. (2022).

    Args:
        history: ``{epoch: {layer: value}}``, layers in depth order.
        metric: Its name.
    """
    figure, axes = _axes(7, 4)
    colours = _shades(len(history))
    for (epoch, values), colour in zip(history.items(), colours, strict=True):
        labelled = epoch in (min(history), max(history)) or len(history) <= 8
        axes.plot(list(values), list(values.values()), "o-", color=colour, label=str(epoch) if labelled else None)
    axes.set(yscale="log", ylabel=metric, title=f"{metric} over depth")
    axes.tick_params(axis="x", rotation=35)
    axes.grid(alpha=0.3)
    axes.legend(title="epochs", frameon=False, fontsize="small")
    return figure


def cosines(moments: ClassMoments) -> Figure:
    """Cosines between the centred class means, as differences from -1/(P-1), their value at full collapse."""
    figure, axes = _axes(5.2, 4.4)
    matrix = cosine_matrix(moments)
    ideal = -1 / (len(matrix) - 1)
    difference = (matrix - ideal).fill_diagonal_(0).cpu().numpy()
    image = axes.imshow(difference, cmap="PuOr", vmin=-1, vmax=1)
    figure.colorbar(image, ax=axes, label=f"cosine less its ideal, {ideal:.3g}")
    axes.set(title="angles between class means", xlabel="class", ylabel="class")
    if len(matrix) <= _MAX_NAMED_CLASSES:
        labels = moments.present.nonzero().squeeze(1).tolist()
        axes.set_xticks(range(len(labels)), labels)
        axes.set_yticks(range(len(labels)), labels)
    return figure


def spread(moments: ClassMoments) -> Figure:
    """Standard deviation within each class against the distance of its mean from the global mean."""
    figure, axes = _axes(5.2, 4.4)
    present = moments.present
    within = moments.variance[present].sqrt().cpu().numpy()
    between = moments.centred.norm(dim=1).cpu().numpy()
    axes.scatter(between, within, s=24, color="#0072B2")
    if len(within) <= _MAX_NAMED_CLASSES:
        for label, x, y in zip(present.nonzero().squeeze(1).tolist(), between, within, strict=True):
            axes.annotate(str(label), (float(x), float(y)), xytext=(4, 4), textcoords="offset points", fontsize="small")
    top = 1.1 * float(max(within.max(), between.max()))
    axes.plot([0, top], [0, top], color="0.7", linewidth=1, zorder=0)
    axes.set(xlim=(0, top), ylim=(0, top), title="spread within classes against between")
    axes.set(xlabel="distance of the class mean from the global mean", ylabel="standard deviation within the class")
    return figure


def projection(moments: ClassMoments, features: Tensor, labels: Tensor) -> Figure:
    """Features ``(M, d)`` and class means on the two directions in which the class means differ most."""
    figure, axes = _axes(5.2, 4.4)
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
        if len(kinds) <= _MAX_NAMED_CLASSES:
            axes.annotate(str(label), (float(mean[0]), float(mean[1])), xytext=(5, 5), textcoords="offset points")
    axes.set(title="features (dots) and class means (crosses)", xlabel="first direction", ylabel="second direction")
    axes.set_aspect("equal", "datalim")
    return figure


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white", dpi=100)
    return figure, figure.subplots()


def _shades(number: int, name: str = "viridis_r") -> list[tuple[float, float, float, float]]:
    from matplotlib import colormaps

    return [colormaps[name](0.05 + 0.9 * i / max(number - 1, 1)) for i in range(number)]

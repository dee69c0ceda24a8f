"""The picture of a report: a row of panels for each task, and one for what is compared across tasks and sources."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from ncfinetune.grouping import Experiment
from ncfinetune.report_table import ACCURACIES
from ncfinetune.runs import Run
from ncfinetune.sample_statistics import spearman, wilson
from ncfinetune.settings import CHECKPOINTS, differences, task_name, told_apart

Panel = Callable[[Axes], None]
_NC1 = "nc1/train/penultimate"
_SHOTS = "data.shots"
# Settings of the network that training starts from.
_START = ("model.backbone", "model.checkpoint")
# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
_GREYS = ("0.8", "0.65", "0.5")
# Inches of one part of a panel's width, and of a row.
_WIDTH, _HEIGHT = 2.2, 4.2


def picture(experiments: Sequence[Experiment]) -> Figure:
    """Panels of whatever there is to compare.

    For each task NC1 over depth, and accuracy against NC1 and against the number of trained parameters; below them
    accuracy against shots, where those alone differ, and against the NC1 of the sources that were fine-tuned.
    """
    tasks = list(dict.fromkeys(experiment.task for experiment in experiments))
    lines = [_of_task([e for e in experiments if e.task == task]) for task in tasks]
    below = [*_by_shots(experiments), *_by_sources(experiments)]
    lines += [[(2, panel) for panel in below[first : first + 3]] for first in range(0, len(below), 3)]
    lines = [line for line in lines if line]
    if not lines:
        figure = Figure(figsize=(3 * _WIDTH, 1))
        figure.text(0.5, 0.5, "no NC1 was logged, and no accuracies to compare", ha="center", va="center")
        return figure
    parts = max(sum(width for width, _ in line) for line in lines)
    figure = Figure(figsize=(_WIDTH * parts, _HEIGHT * len(lines)), layout="constrained")
    grid = figure.add_gridspec(len(lines), parts)
    for row, line in enumerate(lines):
        first = 0
        for width, panel in line:
            panel(figure.add_subplot(grid[row, first : first + width]))
            first += width
    return figure


def _of_task(experiments: Sequence[Experiment]) -> list[tuple[int, Panel]]:
    """The panels of a task and their widths."""
    drawn: list[tuple[int, Panel]] = []
    layers = max(len(experiment.layers()) for experiment in experiments)
    over_depth = 3, lambda axes: _draw_depth(axes, experiments)
    if layers > 1:
        drawn.append(over_depth)
    tag = _compared(experiments)
    if tag is not None:
        points = [_pairs(experiment, _NC1, tag) for experiment in experiments]
        if sum(map(bool, points)) > 1:
            drawn.append((2, lambda axes: _draw_against_nc1(axes, experiments, points, tag)))
        sizes = {e.trained for e in experiments if e.trained and e.values(tag)}
        if len(sizes) > 1:
            drawn.append((2, lambda axes: _draw_against_size(axes, experiments, tag)))
    if layers and not drawn:  # one layer, which says little, and nothing else
        drawn.append(over_depth)
    return [(drawn[0][0], _named(drawn[0][1], experiments[0].task)), *drawn[1:]] if drawn else []


def _named(panel: Panel, task: str) -> Panel:
    """A panel with its task and what its colours are."""

    def draw(axes: Axes) -> None:
        panel(axes)
        axes.set_title(_plain(task), loc="left")
        axes.legend(frameon=False, fontsize="small")

    return draw


def _compared(experiments: Sequence[Experiment]) -> str | None:
    """The tag of the accuracy that several experiments are compared by, None where there is nothing to compare."""
    logged = {tag for experiment in experiments for run in experiment.runs for tag in run.points}
    return next((tag for tag in ACCURACIES if tag in logged), None) if len(experiments) > 1 else None


def _pairs(experiment: Experiment, x: str, tag: str) -> list[tuple[float, float]]:
    """The last values of a tag after training, and an accuracy in %, of each run that has logged both."""
    found = [(run.after(x), run.last(tag)) for run in experiment.runs]
    return [(left, 100 * right) for left, right in found if left is not None and right is not None]


def _draw_depth(axes: Axes, experiments: Sequence[Experiment]) -> None:
    layers = max((experiment.layers() for experiment in experiments), key=len)
    for text, before, grey in zip(*_starts(experiments, layers), itertools.cycle(_GREYS), strict=False):
        axes.plot(range(len(layers)), before, "o-", color=grey, linewidth=5, markersize=9, label=_plain(text))
    for experiment, colour in zip(experiments, itertools.cycle(_COLOURS), strict=False):
        after = [experiment.mean("nc1/train/" + layer, Run.after) for layer in layers]
        axes.plot(range(len(layers)), after, "o-", color=colour, label=_plain(experiment.label), markersize=4)
    axes.set(yscale="log", ylabel="NC1 of the training features\n(lower: more collapsed)")
    axes.set_xticks(range(len(layers)), [*map(_plain, layers)], rotation=30)
    _label_decades(axes, axes.yaxis)


def _starts(experiments: Sequence[Experiment], layers: Sequence[str]) -> tuple[list[str], list[list[float]]]:
    """What the networks were before training: a text and NC1 of the layers for each network that some start from."""
    found: dict[tuple[tuple[str, str], ...], list[float]] = {}
    for experiment in experiments:
        start = tuple((key, word) for key, word in experiment.settings.items() if key.startswith(_START))
        before = [experiment.mean("nc1/train/" + layer, Run.before) for layer in layers]
        if start not in found and any(map(math.isfinite, before)):
            found[start] = before
    texts = differences([dict(start) for start in found])
    return [f"before ({text})" if text else "before" for text in texts], [*found.values()]


def _draw_against_nc1(
    axes: Axes, experiments: Sequence[Experiment], points: Sequence[list[tuple[float, float]]], tag: str
) -> None:
    for experiment, known, colour in zip(experiments, points, itertools.cycle(_COLOURS), strict=False):
        if known:
            axes.plot(*zip(*known, strict=True), "o", color=colour, label=_plain(experiment.label))
    axes.set(xscale="log", xlabel="NC1 of the features that reach the classifier", ylabel=ACCURACIES[tag])
    _label_decades(axes, axes.xaxis)


def _draw_against_size(axes: Axes, experiments: Sequence[Experiment], tag: str) -> None:
    for experiment, colour in zip(experiments, itertools.cycle(_COLOURS), strict=False):
        if experiment.trained and experiment.values(tag):
            _with_bars(axes, [experiment.trained], [experiment], tag, colour, "o", experiment.label)
    axes.set(xscale="log", xlabel="trained parameters", ylabel=_what_bars_are(experiments, tag))
    axes.grid(alpha=0.3)


def _by_shots(experiments: Sequence[Experiment]) -> list[Panel]:
    """Accuracy against images per class: a panel a task, a curve for each experiment at several numbers of shots."""
    families = _families(experiments, [_SHOTS])
    of_task: dict[str, list[list[Experiment]]] = {}
    for family in families:
        at = [e for e in family if _shots(e) is not None]
        if len({_shots(e) for e in at}) > 1:
            of_task.setdefault(task_name(at[0].any_run.part("data"), without=["shots"]), []).append(at)
    panels: list[Panel] = []
    for task, curves in of_task.items():
        tag = _compared([e for curve in curves for e in curve])
        if tag is not None:
            panels.append(partial(_draw_shots, task=task, curves=curves, tag=tag))
    return panels


def _draw_shots(axes: Axes, task: str, curves: Sequence[Sequence[Experiment]], tag: str) -> None:
    for curve, colour in zip(curves, itertools.cycle(_COLOURS), strict=False):
        known = sorted((e for e in curve if e.values(tag)), key=lambda e: _shots(e) or 0)
        if known:
            _with_bars(axes, [_shots(e) or 0 for e in known], known, tag, colour, "o-", known[0].label)
    of_all = [experiment for curve in curves for experiment in curve]
    axes.set(xscale="log", xlabel="images per class", ylabel=_what_bars_are(of_all, tag))
    axes.set_title(_plain(task), loc="left")
    ticks = sorted({_shots(experiment) or 0 for experiment in of_all})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")


def _shots(experiment: Experiment) -> float | None:
    try:
        return float(experiment.settings[_SHOTS])
    except (KeyError, ValueError):
        return None


def _by_sources(experiments: Sequence[Experiment]) -> list[Panel]:
    """Transfer against the collapse of the source: a panel a task, a series for each method on several sources."""
    panels: list[Panel] = []
    for task in dict.fromkeys(e.task for e in experiments):
        families = _families([e for e in experiments if e.task == task], CHECKPOINTS)
        series = [family for family in families if len(family) > 1]
        of_all = [e for family in series for e in family]
        tag = _compared(of_all)
        if tag is None:
            continue
        of_source = all(math.isfinite(_source_nc1(e, True)) for e in of_all)
        points = [[(_source_nc1(e, of_source), 100 * e.mean(tag)) for e in family] for family in series]
        known = [[pair for pair in pairs if all(map(math.isfinite, pair))] for pairs in points]
        named = [(name, pairs) for name, pairs in zip(_names(series), known, strict=True) if len(pairs) > 1]
        if named:
            panels.append(partial(_draw_sources, task=task, series=named, tag=tag, of_source=of_source))
    return panels


def _names(series: Sequence[Sequence[Experiment]]) -> list[str]:
    """The method of each series, and in what it differs from others of the method beside its sources."""
    methods = [family[0].method for family in series]
    rows = [{k: v for k, v in family[0].settings.items() if k not in CHECKPOINTS} for family in series]
    texts = told_apart(methods, rows)
    return [f"{method} ({text})" if text else method for method, text in zip(methods, texts, strict=True)]


def _source_nc1(experiment: Experiment, of_source: bool) -> float:
    """NC1 of the penultimate features of what was fine-tuned, when its own training saved it or before it was tuned."""
    if of_source:
        values = [value for start in experiment.sources if (value := start.last(_NC1)) is not None]
        return float(np.mean(values or np.nan))
    return experiment.mean(_NC1, Run.before)


def _draw_sources(
    axes: Axes, task: str, series: Iterable[tuple[str, list[tuple[float, float]]]], tag: str, of_source: bool
) -> None:
    for (method, points), colour in zip(series, itertools.cycle(_COLOURS), strict=False):
        x, y = zip(*points, strict=True)
        rho, p = spearman(x, y)
        how = "" if math.isnan(rho) else f": Spearman's rho {rho:.2f}, p {p:.2g}"
        axes.plot(x, y, "o", color=colour, label=_plain(method) + how)
    where = "source training features" if of_source else "features before fine-tuning"
    axes.set(xscale="log", xlabel=f"NC1 of the {where}", ylabel=ACCURACIES[tag])
    axes.set_title(_plain(task), loc="left")
    _label_decades(axes, axes.xaxis)
    axes.legend(frameon=False, fontsize="small")


def _families(experiments: Sequence[Experiment], without: Iterable[str]) -> list[list[Experiment]]:
    """Experiments that differ in some settings alone."""
    found: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        found.setdefault(_text(experiment.settings, set(without)), []).append(experiment)
    return list(found.values())


def _text(settings: Mapping[str, str], without: set[str]) -> str:
    return repr(sorted((key, value) for key, value in settings.items() if key not in without))


def _with_bars(
    axes: Axes, x: list[float], experiments: Sequence[Experiment], tag: str, colour: str, form: str, label: str
) -> None:
    """Mean accuracies with bars of a standard deviation over runs, or of one run with its 95 % interval."""
    means = [100 * experiment.mean(tag) for experiment in experiments]
    bars = np.transpose([_bar(experiment, tag) for experiment in experiments])
    axes.errorbar(x, means, bars, fmt=form, color=colour, capsize=3, markersize=5, label=_plain(label))


def _bar(experiment: Experiment, tag: str) -> tuple[float, float]:
    """How far a bar reaches below and above the mean accuracy, in %."""
    values = experiment.values(tag)
    if len(values) > 1:
        deviation = 100 * float(np.std(values, ddof=1))
        return deviation, deviation
    images = experiment.values("test/images") if tag.startswith("test/") else []
    if not images or not 1 <= images[0] < math.inf or not 0 <= values[0] <= 1:
        return 0.0, 0.0
    low, high = wilson(values[0], int(images[0]))
    return 100 * max(0.0, values[0] - low), 100 * max(0.0, high - values[0])


def _what_bars_are(experiments: Iterable[Experiment], tag: str) -> str:
    """The name of an accuracy, with what its bars are."""
    runs = {len(experiment.values(tag)) for experiment in experiments} - {0}
    kinds = ["standard deviation"] if max(runs, default=1) > 1 else []
    if 1 in runs and tag.startswith("test/"):
        kinds.append("95 % interval of one run")
    return ACCURACIES[tag] + (f"\n(bars: {', '.join(kinds)})" if kinds else "")


def _label_decades(axes: Axes, axis: Axis) -> None:
    """Plain numbers at the ticks of a logarithmic axis, which may have few decades, or a single value."""
    low, high = axis.get_view_interval()
    axis.set_minor_formatter(NullFormatter())
    if not 0 < low < high < math.inf:  # of values that are infinite
        return
    decades = math.log10(high / low)
    axis.set_major_locator(MaxNLocator(5) if decades < 1 else LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(alpha=0.3)


def _plain(text: str) -> str:
    r"""Text without formulas in it: what stands between two ``$`` would be one."""
    return text.replace("$", r"\$")

"""The table of a report: one experiment a row."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

from ncfinetune.grouping import Experiment
from ncfinetune.runs import Run
from ncfinetune.sample_statistics import paired, wilson
from ncfinetune.settings import CHECKPOINTS

# How well features or a classifier on them do, by tag; what is compared and drawn is the first that was logged.
ACCURACIES = {
    "test/acc": "test accuracy %",
    "probe/downstream_acc": "downstream probe accuracy %",
    "probe/acc": "probe accuracy %",
}
_PROBE = "linear probe"
_POINTS = "points over baseline"
# What a column says that its name does not.
_LEGEND = {
    "validation accuracy %": "Validation accuracy is that of the last validation, since the best of many is chosen by "
    "the very number that it reports.",
    "95 % interval": "The interval (Wilson 1927) is that of the mean test accuracy for the number of test images: "
    "other test images would give another number within it.",
    "tested at": "Tested at is the step of the checkpoint that was tested, of those tested in a run the one trained "
    "longest, where that is not the end of the training.",
    "NC1 after": "NC1 after is the last measured up to the tested checkpoint, or the first after it.",
    _POINTS: "Points over baseline are differences of runs of the same seed.",
}


def rows(experiments: Sequence[Experiment], baseline: str | None = None) -> list[dict[str, str]]:
    """What the table says of each experiment, by column; a column that none has anything for is left out.

    Args:
        experiments: One for each row.
        baseline: The method that the others of its task are compared with, each with the row of it that has the most
            settings in common, one of the same start if there is one; None is the linear probe, or the first row of a
            task without one.

    Raises:
        ValueError: No experiment is of that method.
    """
    labels = sorted({name for e in experiments for name in (e.method, e.label)})
    if baseline is not None and baseline not in labels:
        raise ValueError(f"no method {baseline!r} to compare with; expected one of {'; '.join(labels)}")
    found = [_row(e, _baseline(e, experiments, baseline)) for e in experiments]
    header = [name for name in found[0] if any(row[name] != "-" for row in found)]
    return [{name: row[name] for name in header} for row in found]


def legend(table: Sequence[dict[str, str]]) -> list[str]:
    """What has to be known to read the columns of a table."""
    spread = ["Numbers are means ± standard deviations (n - 1) over the runs."] if _has(table, "±") else []
    left = ["Unfinished runs are left out of all numbers."] if _has(table, "unfinished") else []
    tested = ["p is that of a paired t-test."] if any(", p " in row.get(_POINTS, "") for row in table) else []
    return [*spread, *(text for name, text in _LEGEND.items() if name in table[0]), *tested, *left]


def _has(table: Sequence[dict[str, str]], word: str) -> bool:
    return any(word in cell for row in table for cell in row.values())


def markdown(table: Sequence[dict[str, str]]) -> str:
    """The table as Markdown."""
    cells = [[*table[0]], *([*row.values()] for row in table)]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def as_html(table: Sequence[dict[str, str]]) -> str:
    """The table as HTML."""
    header = "".join(f"<th>{html.escape(name)}</th>" for name in table[0])
    body = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row.values()) for row in table]
    return "\n".join(["<table>", f"<tr>{header}</tr>", *(f"<tr>{cells}</tr>" for cells in body), "</table>"])


def _row(experiment: Experiment, baseline: Experiment | None) -> dict[str, str]:
    accuracies = {name: _spread(experiment.values(tag), ".1f", 100) for tag, name in ACCURACIES.items()}
    tested = accuracies.pop(ACCURACIES["test/acc"])
    images = sorted({int(value) for value in experiment.values("test/images") if math.isfinite(value)})
    return {
        "task": experiment.task,
        "method": experiment.method,
        "differs in": experiment.differs or "-",
        "runs": str(len(experiment.runs))
        + (f" + {len(experiment.unfinished)} unfinished" if experiment.unfinished else ""),
        "trained parameters": _trained(experiment.runs[0]) if experiment.runs else "-",
        "validation accuracy %": _spread(experiment.values("val/acc"), ".1f", 100),
        ACCURACIES["test/acc"]: tested,
        "95 % interval": _interval(experiment.mean("test/acc"), images),
        "test images": " to ".join(f"{number:,}" for number in _ends(images)) or "-",
        "tested at": _tested_at(experiment.runs),
        _POINTS: _over(experiment, baseline),
        **accuracies,
        "NC1 before": _spread(experiment.values("nc1/train/penultimate", Run.before), ".3g"),
        "NC1 after": _spread(experiment.values("nc1/train/penultimate", Run.after), ".3g"),
    }


def _baseline(experiment: Experiment, experiments: Sequence[Experiment], name: str | None) -> Experiment | None:
    """What an experiment is compared with; itself if that is the baseline, None where its task has nothing else."""
    task = [e for e in experiments if e.task == experiment.task]
    if len(task) < 2:
        return None
    if name is None:  # one that was not tested would leave nothing to compare with
        task = [e for e in task if e.by_seed("test/acc")] or task
    wanted = [e for e in task if (name or _PROBE) in (e.method, e.label)] or ([] if name else task[:1])
    if experiment in wanted:
        return experiment
    return min(wanted, key=lambda e: _distance(e.settings, experiment.settings), default=None)


def _distance(one: Mapping[str, str], other: Mapping[str, str]) -> tuple[bool, int]:
    """Whether two experiments have different starts, and the number of settings in which they differ."""
    return any(one.get(key) != other.get(key) for key in CHECKPOINTS), len(set(one.items()) ^ set(other.items()))


def _over(experiment: Experiment, baseline: Experiment | None) -> str:
    if baseline is None:
        return "-"
    if experiment is baseline:
        return "baseline"
    ours, theirs = experiment.by_seed("test/acc"), baseline.by_seed("test/acc")
    shared = sorted(ours.keys() & theirs.keys())
    if not ours or not theirs:
        return "-"
    if not shared:
        return "no shared seed"
    mean, deviation, p = paired([100 * (ours[seed] - theirs[seed]) for seed in shared])
    words = [f"{mean:+.1f}" if math.isnan(deviation) else f"{mean:+.1f} ± {deviation:.2g}"]
    words += [] if math.isnan(p) else [f"p {p:.2g}"]
    return ", ".join([*words, f"{len(shared)} seed{'s' if len(shared) > 1 else ''}"])


def _interval(accuracy: float, images: Sequence[int]) -> str:
    if len(images) != 1 or images[0] < 1 or not 0 <= accuracy <= 1:
        return "-"
    return " to ".join(f"{100 * end:.1f}" for end in wilson(accuracy, images[0]))


def _tested_at(runs: Sequence[Run]) -> str:
    """The steps of the tested checkpoints, unless all are the ends of their runs."""
    tested = [(step, run.steps) for run in runs if (step := run.tested_at) is not None]
    if all(step >= steps or steps == 1 for step, steps in tested):
        return "-"
    ranges = [sorted({min(step, steps) for step, steps in tested}), sorted({steps for _, steps in tested})]
    return "step " + " of ".join(" to ".join(map(str, _ends(numbers))) for numbers in ranges)


def _ends(numbers: Sequence[int]) -> list[int]:
    """The first and the last of sorted numbers; a single one once."""
    return [*numbers[:1], *numbers[1:][-1:]]


def _trained(run: Run) -> str:
    trained, total = run.last("params/trained"), run.last("params/total")
    if trained is None or not total or not math.isfinite(trained):
        return "-"
    # Event files hold float32, which counts to 2^24 exactly.
    count = f"{int(trained):,}" if trained < 2**24 else f"{trained / 1e6:.1f} M"
    return f"{count} ({100 * trained / total:.3g} %)"


def _spread(values: Sequence[float], form: str, scale: float = 1) -> str:
    if not values:
        return "-"
    scaled = scale * np.asarray(values, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # of values that are infinite
        mean = format(float(scaled.mean()), form)
        return f"{mean} ± {float(scaled.std(ddof=1)):.2g}" if len(scaled) > 1 else mean

"""``ncfinetune report``: logged runs become one table and one picture.

Everything is read from what a run left behind: its ``config.yaml`` and its TensorBoard event files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from ncfinetune.atomic import replacing
from ncfinetune.events import read_scalars

# What differs between the runs of one experiment: where they lie, and their seed.
_NOT_THE_EXPERIMENT = ("seed_everything", "ckpt_path", "model.init_args.checkpoint", "data.init_args.seed")
# How images are fed, rather than which ones.
_NOT_THE_TASK = (
    *("seed", "batch_size", "num_workers", "device_cache", "in_memory", "download", "image_size"),
    *("augmentation", "strength", "views", "mixup", "cutmix", "normalize", "mean", "std", "sampling"),
)
# How well features or a classifier on them do, by tag; what is drawn is the first that was logged.
_ACCURACIES = {
    "test/acc": "test accuracy %",
    "probe/downstream_acc": "downstream probe accuracy %",
    "probe/acc": "probe accuracy %",
}
_LEFT = "restore it, or move its folder away; the run is left out"
# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")


def main(args: Sequence[str] | None = None) -> int:
    """Print the table of the runs under the given folders, and save table and picture.

    Raises:
        FileNotFoundError, ValueError: A folder does not exist, or there is no run.
    """
    parser = argparse.ArgumentParser(
        prog="ncfinetune report",
        description="Make one table and one picture of finished runs, from their event files and configurations.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders in which runs lie, however deep")
    parser.add_argument("--out", type=Path, help="folder for report.md and report.png; the first of RUNS unless given")
    options = parser.parse_args(args)
    experiments = group(find_runs(options.runs))
    out = options.out or options.runs[0]
    text = table(experiments)
    with replacing(out / "report.md") as part:
        part.write_text(text + "\n")
    with replacing(out / "report.png") as part:
        picture(experiments).savefig(part, format="png", dpi=120)
    print(f"{text}\n\ntable:       {out / 'report.md'}\npicture:     {out / 'report.png'}")
    print(f"TensorBoard: {Path(sys.executable).parent / 'tensorboard'} --logdir {options.runs[0]}")
    return 0


@dataclass(frozen=True)
class Run:
    """A folder with the configuration and the event files of one training run."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration.

        Raises:
            ValueError: The file is not one that a run leaves.
        """
        path = self.path / "config.yaml"
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {str(path)!r} ({' '.join(str(error).split())}); {_LEFT}") from error
        if not isinstance(config, dict) or not all(isinstance(config.get(name), dict) for name in ("model", "data")):
            raise ValueError(f"{str(path)!r} is no configuration of a run; {_LEFT}")
        return config

    @cached_property
    def scalars(self) -> dict[str, list[float]]:
        """Logged values by tag, in the order of their steps."""
        values, faults = read_scalars(self.path)
        for fault in faults:
            print(f"warning: {fault}", file=sys.stderr)
        return values

    def last(self, tag: str) -> float | None:
        """The last value logged under a tag, None if there is none."""
        return self.scalars[tag][-1] if tag in self.scalars else None

    def first(self, tag: str) -> float | None:
        """The first value logged under a tag, None if there is none."""
        return self.scalars[tag][0] if tag in self.scalars else None


@dataclass(frozen=True)
class Experiment:
    """Runs that differ in their seed alone."""

    runs: tuple[Run, ...]

    @property
    def method(self) -> str:
        """What was trained, in the words of Li et al. (arXiv 2212.12206) where they have one."""
        return method_name(self.runs[0].config.get("model", {}))

    @property
    def task(self) -> str:
        """What was learned: the datamodule and what selects its images."""
        return task_name(self.runs[0].config.get("data", {}))

    def layers(self) -> list[str]:
        """Layers whose collapse on the training set was logged, in depth order."""
        return [tag.removeprefix("nc1/train/") for tag in self.runs[0].scalars if tag.startswith("nc1/train/")]

    def mean(self, tag: str, pick: Callable[[Run, str], float | None]) -> float:
        """Mean of what ``pick`` takes from a tag over the runs that logged it; nan if none did."""
        known = [value for run in self.runs if (value := pick(run, tag)) is not None]
        return statistics.fmean(known) if known else math.nan


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """Runs below the folders, by path.

    Raises:
        FileNotFoundError: A folder does not exist.
        ValueError: There is no run.
    """
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {str(folder)!r}")
    configs = {config for folder in folders for config in folder.rglob("config.yaml")}
    found = [Run(config.parent) for config in sorted(configs) if any(config.parent.glob("events.out.tfevents.*"))]
    runs = [run for run in found if _has_config(run)]
    if not runs:
        shown = ", ".join(map(str, folders))
        raise ValueError(f"no runs below {shown}; expected folders with a config.yaml and TensorBoard event files")
    return runs


def _has_config(run: Run) -> bool:
    try:
        return run.config is not None
    except ValueError as error:
        print(f"warning: {error}", file=sys.stderr)
        return False


def group(runs: Iterable[Run]) -> list[Experiment]:
    """Runs of the same configuration but for seed and place, in the order of their trained parameters."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_experiment_key(run.config), []).append(run)
    experiments = [Experiment(tuple(members)) for members in groups.values()]
    return sorted(experiments, key=lambda e: (e.task, e.runs[0].last("params/trained") or 0, e.method.lower()))


def _experiment_key(config: dict[str, Any]) -> str:
    kept = json.loads(json.dumps(config, default=str))
    kept.get("trainer", {}).pop("logger", None)
    kept.get("trainer", {}).pop("default_root_dir", None)
    for path in _NOT_THE_EXPERIMENT:
        *parents, name = path.split(".")
        node = kept
        for parent in parents:
            node = node.get(parent) or {}
        node.pop(name, None)
    return json.dumps(kept, sort_keys=True)


def method_name(model: dict[str, Any]) -> str:
    """Name of the method that a model's configuration describes."""
    name = str(model.get("class_path", "?")).rsplit(".", 1)[-1]
    knobs = model.get("init_args") or {}
    return _fine_tuning(knobs) if name == "FineTuner" else ", ".join([name, *_pre_training(knobs)])


def _fine_tuning(knobs: dict[str, Any]) -> str:
    layers, skips = _listed(knobs.get("train") or "none"), _listed(knobs.get("skip_from") or [])
    base = {"none": "linear probe", "all": "full FT"}.get(layers, f"layer FT {layers}")
    name = f"SCL FT {layers}" if skips == layers else f"{base}, skip from {skips}" if skips else base
    words = ["gradient through the skip"] if knobs.get("skip_gradient") == "skip" else []
    words += [f"{knobs['head_init']} start"] if knobs.get("head_init", "default") not in ("default", "zero") else []
    words += [f"{knobs['refit']} refit"] if knobs.get("refit", "none") != "none" else []
    return ", ".join([name, *words])


def _listed(names: str | list[str]) -> str:
    return names if isinstance(names, str) else ", ".join(names)


def _pre_training(knobs: dict[str, Any]) -> list[str]:
    """What sets a pre-training apart: its loss, its head, its adversary."""
    words = ["mse"] if knobs.get("loss") == "mse" else []
    projection = knobs.get("projection", "none")
    words += [f"{projection} head"] if projection != "none" else []
    return words + (["PGD"] if knobs.get("adversary") else [])


def task_name(data: dict[str, Any]) -> str:
    """Name of the task that a datamodule's configuration describes."""
    name = str(data.get("class_path", "?")).rsplit(".", 1)[-1]
    chosen = {k: v for k, v in (data.get("init_args") or {}).items() if v and k not in _NOT_THE_TASK}
    words = [f"{k} {' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in chosen.items()]
    return ", ".join([name, *words])


def table(experiments: Iterable[Experiment]) -> str:
    """Markdown table, one experiment a row: mean and standard deviation (n - 1) over its runs.

    A column that no run has anything for is left out.
    """
    rows = [_row(experiment) for experiment in experiments]
    header = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
    cells = [header, *([row[name] for name in header] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _row(experiment: Experiment) -> dict[str, str]:
    runs = experiment.runs
    return {
        "task": experiment.task,
        "method": experiment.method,
        "runs": str(len(runs)),
        "trained parameters": _trained(runs[0]),
        **{name: _percent(runs, tag) for tag, name in _ACCURACIES.items()},
        "NC1 before": _spread([run.first("nc1/train/penultimate") for run in runs], ".3g"),
        "NC1 after": _spread([run.last("nc1/train/penultimate") for run in runs], ".3g"),
    }


def _percent(runs: Sequence[Run], tag: str) -> str:
    return _spread([None if (value := run.last(tag)) is None else 100 * value for run in runs], ".1f")


def _trained(run: Run) -> str:
    trained, total = run.last("params/trained"), run.last("params/total")
    if trained is None or not total:
        return "-"
    # Event files hold float32, which counts to 2^24 exactly.
    count = f"{int(trained):,}" if trained < 2**24 else f"{trained / 1e6:.1f} M"
    return f"{count} ({100 * trained / total:.3g} %)"


def _spread(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = format(statistics.fmean(known), form)
    return f"{mean} ± {statistics.stdev(known):.2g}" if len(known) > 1 else mean


def picture(experiments: Sequence[Experiment]) -> Figure:
    """NC1 over depth and, where accuracies can be compared, these against NC1: a row of panels for each task."""
    tasks = list(dict.fromkeys(experiment.task for experiment in experiments))
    members = [[experiment for experiment in experiments if experiment.task == task] for task in tasks]
    tags = [_drawn_accuracy(of_task) for of_task in members]
    widths = (3, 2) if any(tags) else (3,)
    figure = Figure(figsize=(2.2 * sum(widths), 4.2 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(widths), squeeze=False, width_ratios=widths)
    for task, of_task, tag, (left, *right) in zip(tasks, members, tags, panels, strict=True):
        left.set_title(task, loc="left")
        _draw_depth(left, of_task)
        for axes in right:
            if tag is None:
                axes.set_axis_off()
            else:
                _draw_accuracy(axes, of_task, tag)
    return figure


def _drawn_accuracy(experiments: Sequence[Experiment]) -> str | None:
    """The tag of the accuracy that several experiments are compared by, None where there is nothing to compare."""
    logged = {tag for experiment in experiments for run in experiment.runs for tag in run.scalars}
    return next((tag for tag in _ACCURACIES if tag in logged), None) if len(experiments) > 1 else None


def _draw_depth(axes: Axes, experiments: Sequence[Experiment]) -> None:
    layers = max((experiment.layers() for experiment in experiments), key=len)
    before = [experiments[0].mean("nc1/train/" + layer, Run.first) for layer in layers]
    axes.plot(layers, before, color="0.8", linewidth=5, label="before")
    for experiment, colour in zip(experiments, itertools.cycle(_COLOURS), strict=False):
        after = [experiment.mean("nc1/train/" + layer, Run.last) for layer in layers]
        axes.plot(layers, after, "o-", color=colour, label=experiment.method, markersize=4)
    axes.set(yscale="log", ylabel="NC1 of the training features\n(lower: more collapsed)")
    axes.tick_params(axis="x", rotation=30)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")


def _draw_accuracy(axes: Axes, experiments: Sequence[Experiment], tag: str) -> None:
    for experiment, colour in zip(experiments, itertools.cycle(_COLOURS), strict=False):
        points = [(run.last("nc1/train/penultimate"), run.last(tag)) for run in experiment.runs]
        known = [(nc1, 100 * accuracy) for nc1, accuracy in points if nc1 is not None and accuracy is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "o", color=colour, label=experiment.method)
    axes.set(xscale="log", xlabel="NC1 of the features that reach the classifier", ylabel=_ACCURACIES[tag])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if _decades(axes) < 2 else (1,)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(alpha=0.3)


def _decades(axes: Axes) -> float:
    low, high = axes.get_xlim()
    return math.log10(high / low)

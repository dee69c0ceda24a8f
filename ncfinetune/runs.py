"""What a training run left behind: its configuration, what it logged, and whether it came to its end."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ncfinetune.csv_metrics import CSV_NAME, read_csv
from ncfinetune.events import Points, event_files, read_events
from ncfinetune.settings import evaluated_images

_LEFT = "restore it, or move its folder away; the run is left out"
# What Lightning's Trainer takes where neither epochs nor steps nor a time are given.
_DEFAULT_EPOCHS = 1000


@dataclass(frozen=True)
class Run:
    """A folder with the configuration of one training run and what it logged, by TensorBoard or as CSV.

    Attributes:
        path: The folder.
        earlier: The run in another folder that this one went on with; of what that one logged, the part before this
            one's first epoch counts.
    """

    path: Path
    earlier: Run | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration.

        Raises:
            ValueError: The file is not one that a run leaves.
        """
        path = self.path / "config.yaml"
        try:
            config = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {str(path)!r} ({' '.join(str(error).split())}); {_LEFT}") from error
        if not isinstance(config, dict) or not all(isinstance(config.get(name), dict) for name in ("model", "data")):
            raise ValueError(f"{str(path)!r} is no configuration of a run; {_LEFT}")
        return config

    @cached_property
    def own(self) -> Points:
        """Steps and values by tag that the fit itself logged in this folder, as they were written.

        Damage is said on stderr. Event files count where `CSVLogger` wrote the same tags beside them.
        """
        return _read(self.path)

    @cached_property
    def logged(self) -> Points:
        """The same with tests of the run's checkpoints, at their steps, by the commands ``test`` and ``evaluate``.

        The former logs to the folder ``test``; of the latter the last on the run's whole test set counts.
        """
        found = {tag: [*points] for tag, points in self.own.items()}
        for tests in (_read(self.path / "test"), self._evaluated()):
            for tag, points in tests.items():
                if _is_of_test(tag):
                    found[tag] = found.get(tag, []) + points
        return found

    def _evaluated(self) -> Points:
        with suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads((self.path / "evaluation" / "test" / "summary.json").read_text(encoding="utf-8"))
            # A file without this flag names the images by all options of the data, as those of training images.
            same = said["images_of"] == evaluated_images(self.part("data"), "train")
            of_test = said.get("data", "test") == "test" and said["part"] is None and said.get("own_images", same)
            if of_test and (broken := said.get("unreadable", 0)):
                left = f"{broken} of them have no prediction; fix or remove them, and evaluate again"
                print(
                    f"warning: {str(self.path)!r} was evaluated on a part of its test images: {left}", file=sys.stderr
                )
            elif of_test:
                numbers = {"test/acc": said["accuracy"], "test/images": said["images"]}
                return {tag: [(int(said["step"]), float(value))] for tag, value in numbers.items()}
        return {}

    @cached_property
    def points(self) -> Points:
        """The same with what the run that this one went on with had logged before."""
        if self.earlier is None:
            return self.logged
        start = _start(self.logged)
        before = {tag: [p for p in points if p[0] < start] for tag, points in self.earlier.points.items()}
        return {tag: before.get(tag, []) + self.logged.get(tag, []) for tag in {**before, **self.logged}}

    def going_on(self, earlier: Run) -> Run:
        """This run as one that went on with another; nothing is read, or said, a second time."""
        joined = Run(self.path, earlier)
        joined.__dict__.update(config=self.config, own=self.own, logged=self.logged)
        return joined

    @property
    def start(self) -> float:
        """The step at which an epoch's numbers were logged first; infinite if never."""
        return _start(self.points)

    @cached_property
    def scalars(self) -> dict[str, list[float]]:
        """Logged values by tag, in the order of their steps; of two at one step the later one, as after a resume."""
        curves = {tag: dict(points) for tag, points in self.points.items()}
        return {tag: [curve[step] for step in sorted(curve)] for tag, curve in curves.items() if curve}

    def last(self, tag: str) -> float | None:
        """The value logged under a tag at its last step; of a test's tag that at `tested_at`. None if there is none."""
        points = self.points.get(tag, [])
        if tag.startswith("test/"):
            points = [point for point in points if point[0] == self.tested_at]
        return max(reversed(points), key=_step)[1] if points else None

    @cached_property
    def tests(self) -> list[int]:
        """The steps of the checkpoints, or of the weights at the end of a fit, that were tested in this folder."""
        return sorted({step for tag, points in self.logged.items() if tag.startswith("test/") for step, _ in points})

    @property
    def tested_at(self) -> int | None:
        """The step of the tested weights that were trained longest, whose numbers count; None without a test."""
        steps = [step for tag, points in self.points.items() if tag.startswith("test/") for step, _ in points]
        return max(steps, default=None)

    @property
    def steps(self) -> int:
        """Steps that were trained, as far as is logged; 0 if nothing was."""
        trained = (points for tag, points in self.points.items() if tag != "epoch" and not _is_of_test(tag))
        return max((max(map(_step, points)) for points in trained if points), default=-1) + 1

    def before(self, tag: str) -> float | None:
        """The value logged under a tag before the first step; None if there is none.

        It is the first that was written at step 0: an epoch of a single batch has its end at step 0 too.
        """
        points = self.points.get(tag)
        return points[0][1] if points and points[0][0] == 0 else None

    def after(self, tag: str) -> float | None:
        """The last value logged under a tag up to the tested checkpoint, or else the first after it.

        None if there is none but that from before the training.
        """
        trained = self._trained(tag)
        steps = math.inf if self.tested_at is None else self.tested_at
        # Weights after k steps are logged at step k - 1 by the fit, and at k by their test.
        tested = [point for point in trained if point[0] < steps] or trained[:1]
        return tested[-1][1] if tested else None

    def at(self, tag: str, steps: int) -> float | None:
        """The value logged under a tag at the end of an epoch that was so many steps into the training, or None."""
        found = [value for step, value in self._trained(tag) if step == steps - 1]
        return found[-1] if found else None

    def end_of(self, epoch: int) -> int | None:
        """How many steps were trained at the end of an epoch, counted from 0; None if it was not logged."""
        # A test after the training is logged with one epoch more, at a step that is none of the training.
        ends = [step + 1 for step, at in self.points.get("epoch", ()) if at == epoch and step < self.steps]
        return max(ends, default=None)

    def _trained(self, tag: str) -> list[tuple[int, float]]:
        """Steps and values that were logged under a tag, without that from before the training."""
        points = sorted(self.points.get(tag, []), key=_step)
        return points[1:] if points and points[0][0] == 0 and (len(points) > 1 or self.epochs) else points

    def part(self, name: str) -> dict[str, Any]:
        """A part of the configuration, empty if it lacks that."""
        part = self.config.get(name)
        return part if isinstance(part, dict) else {}

    def callbacks(self, kind: str) -> list[dict[str, Any]]:
        """Its callbacks of a class of that name, as configured."""
        given = self.part("trainer").get("callbacks")
        listed = given if isinstance(given, list) else [given]
        return [one for one in listed if isinstance(one, dict) and str(one.get("class_path")).endswith(kind)]

    @cached_property
    def began(self) -> tuple[float, str]:
        """When it was begun, in seconds, and its path to tell apart those of one second."""
        files = event_files(self.path)
        stamps = [int(re.findall(r"\d+", file.name)[0]) for file in files if re.search(r"\d", file.name)]
        return float(stamps[0]) if stamps else (self.path / "config.yaml").stat().st_mtime, str(self.path)

    @cached_property
    def lacks(self) -> str | None:
        """What it did not reach of what its configuration asks for; None if it is finished, or does not say.

        A test that the fit logged after the last epoch says that it is finished, however few epochs there were. A run
        that a callback may stop early has no number of epochs to reach but the first, unless it is untested and the
        callback is Lightning's `EarlyStopping`, whose decision can be repeated.
        """
        last = {tag: max(map(_step, points)) for tag, points in self.own.items() if points and "/" in tag}
        ends, tests = [*last.values()], [step for tag, step in last.items() if tag.startswith("test/")]
        if tests and max(tests) == max(ends):
            return None
        progress = self._progress()
        if self.config.get("test_after_fit") is True and (progress or not self.tests):
            return f"{progress or 'it was trained to its end'}, and has no test value"
        if progress is None or not (self._has_time() or self.callbacks("EarlyStopping")) or not self.epochs:
            return progress
        if (
            self.tests
            or self._has_time()
            or any(self._was_stopped(callback) is not False for callback in self.callbacks("EarlyStopping"))
        ):
            return None
        return f"{progress}, and early stopping did not end it"

    @property
    def first_epoch(self) -> float:
        """The epoch whose numbers were logged first, counted from 0; infinite if none."""
        return min((epoch for _, epoch in self.points.get("epoch", ())), default=math.inf)

    @property
    def epochs(self) -> int:
        """Number of epochs that something was logged in, those of a run that this one went on with included."""
        return int(max((epoch for _, epoch in self.points.get("epoch", ()) if math.isfinite(epoch)), default=-1)) + 1

    def _progress(self) -> str | None:
        """How far it came; None if it has the epochs or steps that it was to have."""
        trainer = self.part("trainer")
        epochs, steps = _count(trainer.get("max_epochs")), _count(trainer.get("max_steps"))
        done = self.epochs
        if trainer and trainer.get("max_epochs") is None and steps is None:
            epochs = _DEFAULT_EPOCHS
        if (epochs is not None and done >= epochs) or (steps is not None and self.steps >= steps):
            return None
        if epochs is not None:
            return f"it reached epoch {done} of {epochs}"
        return f"it reached step {self.steps} of {steps}" if steps is not None else None

    def _has_time(self) -> bool:
        """Whether it may run for some time alone."""
        return self.part("trainer").get("max_time") is not None or bool(self.callbacks("Timer"))

    def _was_stopped(self, callback: Mapping[str, Any]) -> bool | None:
        """Whether Lightning's `EarlyStopping` ended it, by the logged values; None where these do not tell.

        Lightning trains the epochs that a run has at least, and ends it then, whatever values come in between.
        """
        options = callback.get("init_args") or {}
        known = callback["class_path"] in ("EarlyStopping", "lightning.pytorch.callbacks.EarlyStopping")
        if not known or not isinstance(options, dict):
            return None
        values, patience = self.scalars.get(str(options.get("monitor"))), options.get("patience", 3)
        others = [options.get(name) for name in ("stopping_threshold", "divergence_threshold")]
        if not values or not isinstance(patience, int) or any(other is not None for other in others):
            return None
        sign = -1 if options.get("mode") == "max" else 1
        best, waited, most = math.inf, 0, 0
        for value in values:
            if not math.isfinite(value):
                return None
            better = sign * value + abs(options.get("min_delta") or 0) < best
            best, waited = (sign * value, 0) if better else (best, waited + 1)
            most = max(most, waited)
        return most >= patience and self.epochs >= (_count(self.part("trainer").get("min_epochs")) or 0)


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """Runs below the folders, by path; what looks like a run and cannot be read is named on stderr.

    Raises:
        FileNotFoundError: A folder does not exist.
        ValueError: There is no run.
    """
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {str(folder)!r}")
    found = [config for folder in folders for config in folder.rglob("config.yaml") if config.is_file()]
    configs = {config.resolve(): config for config in found}
    runs = [run for run in map(Run, sorted(config.parent for config in configs.values())) if _is_readable(run)]
    if not runs:
        shown = ", ".join(map(str, folders))
        raise ValueError(
            f"no runs below {shown}; expected folders with a config.yaml and TensorBoard event files or a {CSV_NAME}"
        )
    return runs


def _read(folder: Path) -> Points:
    (table, faults), (events, more) = read_csv(folder), read_events(folder)
    for fault in (*faults, *more):
        print(f"warning: {fault}", file=sys.stderr)
    return {**events, **table, **events}  # in the order of the event files


def _is_readable(run: Run) -> bool:
    logs = bool(event_files(run.path)) or (run.path / CSV_NAME).is_file()
    try:
        known = bool(run.config)
    except ValueError as error:
        # Other programs leave a config.yaml too; what has logs beside it was a run.
        if logs:
            print(f"warning: {error}", file=sys.stderr)
        return False
    if not logs:
        print(f"warning: no event files and no {CSV_NAME} in {str(run.path)!r}; the run is left out", file=sys.stderr)
    return known and logs


def _start(points: Points) -> float:
    """The first step of what is logged once an epoch or more often; numbers from before the training do not count."""
    return min((step for step, _ in points.get("epoch", ())), default=math.inf)


def _step(point: tuple[int, float]) -> int:
    return point[0]


def _is_of_test(tag: str) -> bool:
    return "test" in tag.split("/")


def _count(value: Any) -> int | None:
    """A number of epochs or steps; None where there is no limit."""
    return value if isinstance(value, int) and value >= 0 else None


# The one in C is ten times as fast, where libyaml is there.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

"""Runs become experiments: what was resumed is one run, and runs that differ in their seed alone are one experiment."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ncfinetune.runs import Run
from ncfinetune.settings import CHECKPOINTS, method_name, settings, task_name, told_apart
from ncfinetune.texts import natural

# Settings of which the pixels depend that a network gets of a test image.
_PIXELS = ("data.image_size", "data.normalize", "data.mean", "data.std")
# That of the run, of its data, and the same of the run that it started from.
Seed = tuple[str, ...]
# Numbers that Lightning's `ModelCheckpoint` writes into a name, as in epoch=3-val_loss=0.25.
_NUMBERS = re.compile(r"(?<==)-?\d+(\.\d+)?")


class Start(NamedTuple):
    """The weights that a run started from, as far as another run left them.

    Attributes:
        setting: The setting that names them.
        run: The run that left them.
        file: Their path in its folder.
    """

    setting: str
    run: Run
    file: str

    @property
    def step(self) -> int | None:
        """After how many steps they were saved, as their name and the run's logs say; None if these don't say it."""
        said = {word: int(number) for word, number in re.findall(r"\b(epoch|step)=(\d+)", self.file)}
        if "step" in said:
            return said["step"]
        if "epoch" in said:
            return self.run.end_of(said["epoch"])
        return self.run.steps if re.fullmatch(r"last(-v\d+)?", Path(self.file).stem) else None

    @property
    def name(self) -> str:
        """Their path, as the runs of one configuration have it in common; other weights have another one.

        Where the run kept single checkpoints alone, each by a `monitor` and told apart by the words of its name, the
        numbers in it are what its seed led to, and do not count. Otherwise they count, but for weights from the end of
        the training, which are ``last.ckpt``. The version that Lightning adds (``best-v1.ckpt``) never counts.
        """
        kept = [one.get("init_args") or {} for one in self.run.callbacks("ModelCheckpoint")]
        single = all(one.get("monitor") and one.get("save_top_k", 1) == 1 for one in kept)
        if kept and single and len({one.get("filename") for one in kept}) == len(kept):
            path = _NUMBERS.sub("*", self.file)
        elif self.step == self.run.steps:
            path = str(Path(self.file).with_stem("last"))
        else:
            path = self.file
        return re.sub(r"-v\d+(?=\.ckpt$)", "", path)

    def last(self, tag: str) -> float | None:
        """What the run logged of these weights under a tag at the end of their epoch; None if it did not."""
        return None if self.step is None else self.run.at(tag, self.step)


@dataclass(frozen=True)
class Experiment:
    """Runs that differ in their seed alone.

    Attributes:
        runs: Those that came to their end.
        unfinished: The others, which no number is taken from.
        seeds: The seeds of the finished ones; see `Folders.seed_of`.
        settings: What makes it this experiment, by dotted name; see `settings.settings`.
        sources: The weights of other runs that these runs started from, as far as they are known.
        differs: What tells it from other experiments of the same task and method; empty if there is none.
    """

    runs: tuple[Run, ...]
    unfinished: tuple[Run, ...]
    seeds: tuple[Seed | None, ...]
    settings: Mapping[str, str]
    sources: tuple[Start, ...] = ()
    differs: str = ""

    @property
    def any_run(self) -> Run:
        """A run to read the configuration from, a finished one if there is one."""
        return (*self.runs, *self.unfinished)[0]

    @property
    def method(self) -> str:
        """What was trained, in the words of Li et al. (arXiv 2212.12206) where they have one."""
        return method_name(self.any_run.part("model"))

    @property
    def label(self) -> str:
        """The method, and what tells it from others of the same name."""
        return f"{self.method} ({self.differs})" if self.differs else self.method

    @property
    def task(self) -> str:
        """What was learned: the datamodule and what selects its images."""
        return task_name(self.any_run.part("data"))

    @property
    def trained(self) -> float:
        """Number of trained parameters; 0 if it was not logged."""
        found = self.any_run.last("params/trained") or 0
        return found if math.isfinite(found) else 0

    def layers(self) -> list[str]:
        """Layers whose collapse on the training set was logged, in depth order."""
        return [tag.removeprefix("nc1/train/") for tag in self.any_run.points if tag.startswith("nc1/train/")]

    def values(self, tag: str, pick: Callable[[Run, str], float | None] = Run.last) -> list[float]:
        """What ``pick`` takes from a tag, of the finished runs that logged it."""
        return [value for run in self.runs if (value := pick(run, tag)) is not None]

    def mean(self, tag: str, pick: Callable[[Run, str], float | None] = Run.last) -> float:
        """Mean of `values`; nan if there is none."""
        return float(np.mean(self.values(tag, pick) or np.nan))

    def by_seed(self, tag: str) -> dict[Seed, float]:
        """The last values of a tag by the seed of their run, without runs that have none."""
        found = [(seed, run.last(tag)) for seed, run in zip(self.seeds, self.runs, strict=True)]
        return {seed: value for seed, value in found if seed is not None and value is not None}


class Folders:
    """Runs by their folders, as configurations name each other's.

    Args:
        runs: All runs of a report.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = {Path(os.path.abspath(run.path)): run for run in runs}
        # The first run of each experiment that others started from, by its settings.
        self._first: dict[str, str] = {}

    def holding(self, file: str, run: Run) -> tuple[Run, str] | None:
        """The run that left the file which another run's configuration names, and where in its folder the file is.

        None if it is none of these. A relative path is one from a folder above the run that names it, the nearest
        first, or else from here.
        """
        parents = [parent for parent in Path(file).parents if parent.parts]
        for base in (*Path(os.path.abspath(run.path)).parents, Path.cwd()):
            for parent in parents:
                found = self.runs.get(Path(os.path.normpath(base / parent)))
                if found is not None and found.path != run.path:
                    return found, str(Path(file).relative_to(parent))
        return None

    def start_of(self, run: Run) -> Start | None:
        """The weights of another run that a run started from; None if they are of none of these."""
        found = settings(run.config)
        for key in CHECKPOINTS:
            if key in found and (held := self.holding(found[key], run)) is not None:
                return Start(key, *held)
        return None

    def identity(self, run: Run, depth: int = 0) -> dict[str, str]:
        """The settings of a run; for the run that it started from stands the first one of the same experiment.

        Which of that run's checkpoints it started from is told by `Start.name`.
        """
        found = settings(run.config)
        start = self.start_of(run)
        # Configurations that name each other in a circle do not end.
        if start is not None and depth <= len(self.runs):
            first = self._first.setdefault(_text(self.identity(start.run, depth + 1)), str(start.run.path))
            found[start.setting] = str(Path(first, start.name))
        return found

    def seed_of(self, run: Run, depth: int = 0) -> Seed | None:
        """The seeds of a run, of its data and of the runs that it started from; None where its own is not fixed.

        A seed of its data alone fixes neither its weights nor its batches. A source whose seed is not fixed is known
        by its folder.
        """
        own = run.config.get("seed_everything")
        if own is None or isinstance(own, bool):
            return None
        data = run.part("data").get("init_args")
        seed = str(own), str(data.get("seed") if isinstance(data, dict) else None)
        start = self.start_of(run)
        if start is None or depth > len(self.runs):  # see `identity`
            return seed
        return *seed, *(self.seed_of(start.run, depth + 1) or [str(start.run.path)])

    def goes_on(self, run: Run, earlier: Run) -> bool:
        """Whether a run was resumed from another of its configuration.

        Its configuration says so; or both have the same seed, and this one's numbers begin at a later step and epoch,
        where two that were both begun anew would begin at the same ones: with more images an epoch has more steps.
        What was resumed within the first epoch begins in it too, but what it goes on with has not come further.
        """
        checkpoint = run.config.get("ckpt_path")
        if isinstance(checkpoint, str) and (held := self.holding(checkpoint, run)) is not None:
            return held[0].path == earlier.path
        seed = self.seed_of(run)
        if seed is None or seed != self.seed_of(earlier) or not earlier.start < run.start < math.inf:
            return False
        return run.first_epoch > earlier.first_epoch or (earlier.epochs <= 1 and earlier.lacks is not None)


def group(runs: Iterable[Run]) -> list[Experiment]:
    """Runs of the same configuration but for seed and place, by task and in the order of their trained parameters.

    What a run started from counts as the same where it is the same checkpoint of the same experiment, of whatever seed.
    """
    folders = Folders(runs)
    members: dict[str, list[Run]] = {}
    for run in folders.runs.values():
        members.setdefault(_text(folders.identity(run)), []).append(run)
    experiments = [_experiment(of_one, folders) for of_one in members.values()]
    experiments.sort(key=lambda e: (natural(e.task), e.trained, e.method.lower()))
    return _with_differences(experiments)


def _text(found: Mapping[str, str]) -> str:
    return repr(sorted(found.items()))


def _experiment(members: Sequence[Run], folders: Folders) -> Experiment:
    """The experiment of runs of one configuration; unfinished runs and repetitions are named on stderr."""
    runs = _once_a_seed(_joined(members, folders), folders)
    tested = any(run.last("test/acc") is not None for run in runs)
    finished: list[Run] = []
    unfinished: list[Run] = []
    for run in runs:
        untested = "it has no test value, and others of its configuration have" if tested else None
        lacks = run.lacks or (untested if run.last("test/acc") is None else None)
        (unfinished if lacks else finished).append(run)
        if lacks:
            _warn(f"{str(run.path)!r} is unfinished: {lacks}; it is left out of all numbers")
    for run in finished:
        if (start := folders.start_of(run)) is not None and start.run.lacks:
            _warn(f"{str(run.path)!r} started from {str(start.run.path)!r}, which is unfinished: {start.run.lacks}")
        if len(run.tests) > 1:
            steps = ", ".join(map(str, run.tests[:-1]))
            _warn(f"{str(run.path)!r} was tested at step {run.tests[-1]}, which counts, and at {steps}")
    sources = dict.fromkeys(start for run in finished if (start := folders.start_of(run)) is not None)
    seeds = tuple(map(folders.seed_of, finished))
    found = folders.identity(members[0])
    return Experiment(tuple(finished), tuple(unfinished), seeds, found, tuple(sources))


def _joined(members: Sequence[Run], folders: Folders) -> list[Run]:
    """Runs of one configuration, each with those in other folders that it went on with as one."""
    ends: list[Run] = []
    for run in sorted(members, key=lambda run: run.began):
        earlier = next((end for end in reversed(ends) if folders.goes_on(run, end)), None)
        if earlier is not None:
            ends.remove(earlier)
        ends.append(run if earlier is None else run.going_on(earlier))
    return ends


def _once_a_seed(runs: Iterable[Run], folders: Folders) -> list[Run]:
    """Of the runs of one configuration and one seed one that is finished, and tested if one is; of several the last."""
    kept: dict[object, Run] = {}
    for run in runs:
        key = folders.seed_of(run) or run.path
        if (other := kept.get(key)) is None:
            kept[key] = run
            continue
        kept[key], left = (other, run) if _worth(other) > _worth(run) else (run, other)
        _warn(f"{str(left.path)!r} has the configuration and seed of {str(kept[key].path)!r}, and is left out")
    return sorted(kept.values(), key=lambda run: run.path)


def _worth(run: Run) -> tuple[bool, bool]:
    return run.lacks is None, run.tested_at is not None


def _with_differences(experiments: Sequence[Experiment]) -> list[Experiment]:
    """The same experiments, each with what tells it from others of its task and method.

    Of others of its task it is told by what makes the pixels, since all of a task are compared with one baseline.
    """
    texts = told_apart([(e.task, e.method) for e in experiments], [e.settings for e in experiments])
    seen = [{key: e.settings[key] for key in _PIXELS if key in e.settings} for e in experiments]
    pixels = told_apart([e.task for e in experiments], seen)
    known = [
        ", ".join(filter(None, [text, "" if own in text else own])) for text, own in zip(texts, pixels, strict=True)
    ]
    return [replace(experiment, differs=text) for experiment, text in zip(experiments, known, strict=True)]


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)

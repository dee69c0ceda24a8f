"""Kill runs of every learner on every kind of data again and again, and compare how they end with runs left alone.

A trial is one run. It is killed up to six times, by SIGKILL or SIGTERM, at a random moment or at a named place, goes
on each time from its last checkpoint (``--ckpt_path last``, or as SIGTERM's message says), and ends. Its weights, the
state of its optimiser and its delta have to be those of the run that nobody killed, bit for bit; its logged numbers the
same to 1e-6, since a mean that is taken up rounds otherwise. An export or a prediction is started again, and its file
must never be there with other bytes.

The processes are forks of one that has imported everything. A trial depends on its number and the seed alone (but for
random moments, which are as exact as the clock); rows are written as trials end, and a soak that is begun again leaves
out those that are there.

    python experiments/benchmarks/soak.py [--kills 250] [--seed 0] [--out experiments/results/soak.csv]
"""

import argparse
import csv
import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import webdataset
from lightning.pytorch import LightningModule
from PIL import Image
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils._pytree import tree_leaves

from ncfinetune import Backbone, delta, predictions, store, trainer_cli, weight_files  # noqa: F401  # trainer_cli: before forks
from ncfinetune.callbacks import tracker
from ncfinetune.cli import main as ncfinetune
from ncfinetune.runs import Run

LIMIT = 600  # seconds after which a process that should take 3 hangs, on a machine that is busy with other things
FEWEST_KILLS, MOST_KILLS, TERMINATED = 2, 6, 128 + signal.SIGTERM
VIT = "{name: test_vit, img_size: 8, patch_size: 4, in_chans: %d, drop_path_rate: 0.2}"
RESNET = "{name: test_resnet, in_chans: %d}"
START = "{root}/start.safetensors"

QUIET = (
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1"),
)
FIT = (
    *("fit", *QUIET, "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1"),
    *(
        "--trainer.limit_val_batches",
        "3",
        "--trainer.logger.init_args.save_dir",
        "{place}",
        "--trainer.logger.init_args.version",
        "run",
    ),
    *("--trainer.callbacks+=NeuralCollapseTracker", "--trainer.callbacks.figures=false"),
    *("--trainer.callbacks+=OnlineProbe", "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"),
)
DIGITS = ("--data", "Digits", "--data.classes", "[1,2,3]", "--data.shots", "12", "--data.batch_size", "6")
FILES = ("--data.image_size", "8", "--data.batch_size", "6", "--data.num_workers", "2")
FOLDER = ("--data", "ImageFolder", "--data.root", "{root}/images", *FILES)
SHARDS = (
    *("--data", "WebDataset", "--data.num_classes", "3", "--data.shuffle", "10", *FILES),
    *("--data.train", "{root}/train-{0..2}.tar", "--data.val", "{root}/val-0.tar"),
)
SUPERVISED = ("--model", "Supervised", "--model.lr_scheduler", "StepLR", "--model.lr_scheduler.step_size", "1")
TUNED = ("--model", "FineTuner", "--model.backbone", VIT % 1, "--model.checkpoint", START)
VIEWS = ("--data.views", "2", "--data.augmentation", "simclr")
PLAIN = ("--data.augmentation", "plain")


def each_steps(steps: int) -> tuple[str, ...]:
    """A checkpoint after so many steps; without this it is one an epoch."""
    return (f"--trainer.callbacks.every_n_train_steps={steps}",)


# Trainings of 3 epochs of 6 steps.
RUNS: dict[str, tuple[str, ...]] = {
    "ce, digits": (*FIT, *SUPERVISED, "--model.backbone", VIT % 1, *DIGITS),
    "ce with PGD, digits, each step": (
        *(*FIT, *each_steps(1), *SUPERVISED, "--model.backbone", VIT % 1, *DIGITS),
        *("--model.adversary", "{radius: 0.03, steps: 1}"),
    ),
    "ce, digits, validation each 4 steps": (
        *(*FIT, *each_steps(1), *SUPERVISED, "--model.backbone", VIT % 1, *DIGITS, "--trainer.val_check_interval", "4"),
    ),
    "mse, digits with mixup, each 2 steps": (
        *(*FIT, *each_steps(2), *SUPERVISED, "--model.backbone", RESNET % 1, "--model.loss", "mse"),
        *(*DIGITS, "--data.mixup", "1.0"),
    ),
    "SupCon, digits, each 3 steps": (
        *(*FIT, *each_steps(3), "--model", "SupCon", "--model.backbone", RESNET % 1, *DIGITS, *VIEWS),
    ),
    "SimCLR, digits, each step": (
        *(*FIT, *each_steps(1), "--model", "SimCLR", "--model.backbone", VIT % 1, *DIGITS, *VIEWS),
    ),
    "linear probe, cache in memory": (
        *(*FIT, *each_steps(1), *TUNED, "--model.cache", "memory", "--model.head_init", "mean", *DIGITS, *PLAIN),
    ),
    "layer, cache on disk": (
        *(*FIT, *each_steps(2), *TUNED, "--model.train", "blocks.1", "--model.cache", "disk"),
        *("--model.cache_dir", "{place}/cache", *DIGITS, *PLAIN),
    ),
    "scl, digits, each step": (
        *(*FIT, *each_steps(1), *TUNED, "--model.train", "blocks.1", "--model.skip_from", "blocks.1", *DIGITS),
    ),
    "full, digits": (*FIT, *TUNED, "--model.train", "all", "--model.head_lr_factor", "10", *DIGITS),
    "ce, folder with 2 workers, each step": (
        *(*FIT, *each_steps(1), *SUPERVISED, "--model.backbone", VIT % 3, *FOLDER),
    ),
    "SupCon, folder with 2 workers": (*FIT, "--model", "SupCon", "--model.backbone", VIT % 3, *FOLDER, *VIEWS),
    "ce, shards with 2 workers, each step": (
        *(*FIT, *each_steps(1), *SUPERVISED, "--model.backbone", VIT % 3, *SHARDS),
    ),
    "SimCLR, shards with 2 workers, each 3 steps": (
        *(*FIT, *each_steps(3), "--model", "SimCLR", "--model.backbone", VIT % 3, *SHARDS, *VIEWS),
    ),
}
# Commands that take a checkpoint and write one file.
WRITERS: dict[str, tuple[str, ...]] = {
    "export": ("export", "{root}/last.ckpt", "{place}/file.safetensors"),
    "predict": (
        *("predict", "--config", "{root}/config.yaml", "--ckpt_path", "{root}/last.ckpt", *QUIET),
        *("--trainer.logger", "false", "--trainer.callbacks", "null", "--trainer.default_root_dir", "{place}"),
        *("--predictions", "{place}/file.csv"),
    ),
}


class Blow:
    """Sends this process a signal at the nth call; counts on."""

    def __init__(self, nth: int, number: int) -> None:
        self.calls, self.nth, self.number = 0, nth, number

    def __call__(self, damage: Callable[[], Any] | None = None) -> None:
        self.calls += 1
        if self.calls == self.nth:
            if damage is not None:
                damage()
            os.kill(os.getpid(), self.number)


Struck = Callable[[Callable[..., Any], Blow], Callable[..., Any]]


def before(original: Callable[..., Any], blow: Blow) -> Callable[..., Any]:
    def struck(*args: Any, **kwargs: Any) -> Any:
        blow()
        return original(*args, **kwargs)

    return struck


def after(original: Callable[..., Any], blow: Blow) -> Callable[..., Any]:
    def struck(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        blow()
        return result

    return struck


def within(original: Callable[..., Any], blow: Blow) -> Callable[..., Any]:
    """Before a batch of a pass is made use of."""

    def struck(*args: Any) -> Iterator[Any]:
        for batch in original(*args):
            blow()
            yield batch

    return struck


def halfway(original: Callable[..., Any], blow: Blow) -> Callable[..., Any]:
    """Of ``original(content, path)``, when half of the file is there."""

    def struck(content: Any, path: Any, *rest: Any) -> None:
        original(content, path, *rest)
        blow(lambda: os.truncate(path, os.path.getsize(path) // 2))

    return struck


def torn(original: Callable[..., Any], blow: Blow) -> Callable[..., Any]:
    """Of an event file, when half of a record is there."""

    def struck(writer: Any, data: bytes) -> None:
        record = io.BytesIO()
        original(RecordWriter(record), data)
        blow(lambda: (writer._writer.write(record.getvalue()[: record.tell() // 2]), writer.flush()))
        original(writer, data)

    return struck


PLACES: dict[str, tuple[Any, str, Struck]] = {
    "training": (LightningModule, "on_train_batch_end", before),
    "optimiser's step": (LightningModule, "optimizer_step", after),
    "validation": (LightningModule, "on_validation_batch_end", before),
    "tracker's pass": (tracker, "ready_batches", within),
    "checkpoint half written": (torch, "save", halfway),
    "before a rename": (Path, "replace", before),
    "after a rename": (Path, "replace", after),
    "cache half written": (store, "raw", before),
    "before the cache's rename": (store, "_put", before),
    "delta half written": (delta, "save_file", halfway),
    "export half written": (weight_files, "save_file", halfway),
    "predictions half written": (predictions.Table, "add", after),
    "event file half written": (RecordWriter, "write", torn),
}
RANDOM = "random moment"


@dataclasses.dataclass(frozen=True)
class Kill:
    """A signal at the nth call of a place, or after a share of the time that the run takes alone."""

    place: str
    number: int
    nth: int = 0
    share: float = 0.0

    def __str__(self) -> str:
        where = f"{self.share:.0%} of the time" if self.place == RANDOM else f"{self.place} {self.nth}"
        return f"{signal.Signals(self.number).name} at {where}"


def install(kill: Kill | None) -> dict[str, Blow]:
    """Let this process die where it should; without a kill, count the calls of every place."""
    blows = {}
    for place, (owner, name, struck) in PLACES.items():
        if kill is None or kill.place == place:
            blows[place] = Blow(0 if kill is None else kill.nth, 0 if kill is None else kill.number)
            setattr(owner, name, struck(getattr(owner, name), blows[place]))
    return blows


def run(words: Sequence[str], log: Path, kill: Kill | None = None, seconds: float = 0.0) -> int | None:
    """The status of a command in a process of its own, or minus the signal that it died of; None if it hangs.

    Args:
        words: The command line.
        log: Where its output goes.
        kill: What happens to it. Without one it leaves ``log.json`` with the calls of each place.
        seconds: How long it takes if left alone.
    """
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        _work(words, log, kill)
    end = time.monotonic() + LIMIT
    when = time.monotonic() + seconds * kill.share if kill is not None and kill.place == RANDOM else end
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return None
        if kill is not None and time.monotonic() > when:
            os.kill(process, kill.number)
            when = end
        time.sleep(0.002)


def _work(words: Sequence[str], log: Path, kill: Kill | None) -> NoReturn:
    status: Any = 1
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        blows = install(kill)
        status = ncfinetune(list(words)) or 0
        if kill is None:
            calls = {place: blow.calls for place, blow in blows.items()}
            log.with_suffix(".json").write_text(json.dumps(calls))
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status if isinstance(status, int) else 1)


def prepare(root: Path) -> None:
    """42 images of 3 classes in folders and in shards, weights to start from, and a run to export and predict with."""
    rng = np.random.default_rng(0)
    shards = {"train": [13, 9, 14], "val": [6]}
    for part, sizes in shards.items():
        for shard, size in enumerate(sizes):
            with webdataset.TarWriter(str(root / f"{part}-{shard}.tar")) as tar:
                for number in range(size):
                    label = number % 3
                    pixels = rng.integers(0, 80, (10, 12, 3), dtype=np.uint8) + np.uint8(70 * label)
                    path = root / "images" / part / "abc"[label] / f"{shard}-{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(path)
                    tar.write({"__key__": path.stem, "png": path.read_bytes(), "cls": label})
    torch.manual_seed(0)
    Backbone.build({"name": "test_vit", "img_size": 8, "patch_size": 4, "in_chans": 1}).save(
        str(root / "start.safetensors")
    )
    # In this process, so that those forked from it find all imported that is imported late, and caches filled.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ncfinetune(filled(RUNS["ce, digits"], root, root))
    shutil.move(last_of(root / "run"), root / "last.ckpt")
    shutil.move(root / "run" / "config.yaml", root / "config.yaml")


def filled(words: Sequence[str], root: Path, place: Path) -> list[str]:
    return [word.replace("{root}", str(root)).replace("{place}", str(place)) for word in words]


def last_of(run: Path) -> Path | None:
    return max((run / "checkpoints").glob("last*.ckpt"), key=os.path.getmtime, default=None)


@dataclasses.dataclass(frozen=True)
class End:
    """What a command leaves: a digest of what has to be the same, numbers by tag, files that should not be there."""

    digest: str
    numbers: dict[str, list[float]]
    left: str

    def numbers_like(self, other: "End") -> bool:
        return self.numbers.keys() == other.numbers.keys() and all(
            np.shape(values) == np.shape(other.numbers[tag])
            and np.allclose(values, other.numbers[tag], rtol=1e-6, atol=1e-9, equal_nan=True)
            for tag, values in self.numbers.items()
        )


def end_of(place: Path) -> End:
    """What a command left in its folder."""
    digest = hashlib.sha256()
    for path in (place / "file.csv", place / "file.safetensors"):
        digest.update(path.read_bytes() if path.exists() else b"")
    folder = place / "run"
    # A cache's are not among them: they are swept a day later, when surely nobody writes to them.
    left = [path.name for path in folder.rglob("*.part*")]
    if (path := last_of(folder)) is not None:
        content = torch.load(path, weights_only=True)
        for leaf in tree_leaves([content[name] for name in ("state_dict", "optimizer_states", "lr_schedulers")]):
            digest.update(leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else repr(leaf).encode())
        for path in (folder / "checkpoints").glob("delta.safetensors"):
            digest.update(path.read_bytes())
        left += [path.name for path in sorted((folder / "checkpoints").glob("last*.ckpt"))[1:]]
    return End(digest.hexdigest(), Run(folder).scalars, " ".join(left))


class Soak:
    """Runs that were left alone, and trials of the same.

    Args:
        root: A folder for everything.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.alone: dict[str, tuple[End, float, dict[str, int]]] = {}
        prepare(root)

    def leave_alone(self, what: str) -> tuple[End, float, dict[str, int]]:
        """How a command ends that nobody kills, the seconds it takes, and the calls of each place."""
        if what not in self.alone:
            place = self.root / f"alone {len(self.alone)}"
            place.mkdir()
            start = time.monotonic()
            status = run(filled({**RUNS, **WRITERS}[what], self.root, place), place / "log")
            seconds = time.monotonic() - start
            if status != 0:
                raise RuntimeError(f"{what} ends with {status}: {(place / 'log').read_text()}")
            calls = json.loads((place / "log.json").read_text())
            self.alone[what] = end_of(place), seconds, {place: count for place, count in calls.items() if count}
        return self.alone[what]

    def plan(self, what: str, rng: random.Random) -> list[Kill]:
        """Two to six kills, most of them at named places."""
        calls = self.leave_alone(what)[2]
        kills = []
        for _ in range(rng.randint(FEWEST_KILLS, MOST_KILLS)):
            number = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
            if rng.random() < 0.4:
                kills.append(Kill(RANDOM, number, share=rng.random()))
                continue
            place = rng.choice(sorted(calls))
            if PLACES[place][2] in (halfway, torn):
                number = signal.SIGKILL
            # Later ones find fewer calls, since those before were made by a run that is dead.
            most = calls[place] if not kills else max(1, calls[place] // 2)
            kills.append(Kill(place, number, rng.randint(1, most)))
        return kills

    def trial(self, number: int, what: str, kills: Sequence[Kill], says: bool) -> dict[str, Any]:
        """Start a command until it ends, and compare how it does.

        Args:
            number: The trial's.
            what: The command.
            kills: What happens to each start but the last.
            says: Go on after SIGTERM with the command that the run says.
        """
        end, seconds, _ = self.leave_alone(what)
        place = Path(tempfile.mkdtemp(prefix=f"{number} ", dir=self.root))
        log, words = place / "log", filled({**RUNS, **WRITERS}[what], self.root, place)
        command, begun, ended, fault = words, time.monotonic(), [], ""
        for kill in [*kills, Kill(RANDOM, signal.SIGKILL, share=math.inf)]:
            status = run(command, log, kill, seconds)
            if status not in (-signal.SIGKILL, -signal.SIGTERM, TERMINATED):
                break
            ended.append(kill)
            if what in WRITERS and (there := end_of(place).digest) not in (hashlib.sha256().hexdigest(), end.digest):
                fault = f"other bytes in the file after {kill}: {there}"
            command = self._next(words, place, log if says and status == TERMINATED else None)
        row = {"trial": number, "what": what, "kills": "; ".join(map(str, ended))}
        if status == 0:
            now = end_of(place)
            same = "equal" if now.digest == end.digest else "other"
            row |= {"end": same, "numbers": "equal" if now.numbers_like(end) else "other", "left": now.left}
        else:
            lines = log.read_text().strip().splitlines() or [""]
            row |= {"end": "lost", "numbers": "", "left": ""}
            fault = f"status {status}: {lines[-1]}"
        row |= {"seconds": f"{time.monotonic() - begun:.1f}", "fault": fault}
        if row["end"] == "equal" and row["numbers"] == "equal" and not fault:
            shutil.rmtree(place)
        return row

    def numbered(self, number: int, seed: int) -> dict[str, Any]:
        """The trial of a number: what it is and what happens in it follow from the number and the seed."""
        rng = random.Random(f"{seed} {number}")
        what = [*RUNS, *WRITERS][number % (len(RUNS) + len(WRITERS))]
        return self.trial(number, what, self.plan(what, rng), rng.random() < 0.5)

    def _next(self, words: list[str], place: Path, log: Path | None) -> list[str]:
        """The command that goes on: the one that the log says, from the last checkpoint, or anew if there is none."""
        if log is not None and (said := re.findall(r"to resume: ncfinetune (fit .*)", log.read_text())):
            config, checkpoint = re.fullmatch(r"fit --config (.*) --ckpt_path (.*)", said[-1]).groups()
            return ["fit", "--config", config, "--ckpt_path", checkpoint]
        return [*words, "--ckpt_path", "last"] if last_of(place / "run") else words


COLUMNS = ("trial", "what", "kills", "end", "numbers", "left", "seconds", "fault")


def rows_of(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def kills_of(row: dict[str, str]) -> list[str]:
    return [kill for kill in row["kills"].split("; ") if kill]


def place_of(kill: str) -> tuple[str, str]:
    """Signal and place of a kill as it is written in a row."""
    name, where = kill.split(" at ")
    return name, RANDOM if where.endswith("of the time") else where.rsplit(" ", 1)[0]


def tables(rows: Sequence[dict[str, str]]) -> str:
    """Kills and ends by what was run, and kills by place."""
    lines = ["| what | runs | kills | ended | bit-equal | numbers equal | lost |", "|---|---|---|---|---|---|---|"]
    for what in (*RUNS, *WRITERS, "all"):
        own = [row for row in rows if what in (row["what"], "all")]
        ends = Counter(row["end"] for row in own)
        numbers = sum(row["numbers"] == "equal" for row in own)
        kills = sum(len(kills_of(row)) for row in own)
        cells = (len(own), kills, len(own) - ends["lost"], ends["equal"], numbers, ends["lost"])
        lines.append(f"| {what} | " + " | ".join(map(str, cells)) + " |")
    places = Counter(place_of(kill) for row in rows for kill in kills_of(row))
    lines += ["", "| place | SIGKILL | SIGTERM |", "|---|---|---|"]
    for place in (RANDOM, *PLACES):
        lines.append(f"| {place} | {places['SIGKILL', place]} | {places['SIGTERM', place]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=250, help="stop after so many, with those in the file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("experiments/results/soak.csv"))
    parser.add_argument("--folder", type=Path, help="where runs that end otherwise stay; a temporary one unless given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = rows_of(options.out)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        root = options.folder or Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        soak = Soak(root)
        with options.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if not rows:
                writer.writeheader()
            while sum(len(kills_of(row)) for row in rows) < options.kills:
                rows.append(soak.numbered(len(rows), options.seed))
                writer.writerow(rows[-1])
                file.flush()
                print(*rows[-1].values(), sep=" | ", flush=True)
    command = f"python experiments/benchmarks/soak.py --kills {options.kills} --seed {options.seed}"
    text = f"`{command}`, torch {torch.__version__}, CPU.\n\n"
    options.out.with_suffix(".md").write_text(text + tables(rows) + "\n")
    print(tables(rows))


if __name__ == "__main__":
    main()

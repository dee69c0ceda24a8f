"""The frame of the benchmarks: options, a table that is written as it comes, ratios, and memory in a fresh process."""

import argparse
import logging
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

RESULTS = Path("experiments/results")
Value = TypeVar("Value")


def options_of(doc: str | None, table: str, repeats: int = 5) -> argparse.ArgumentParser:
    """A parser with ``--repeats``, and with ``--out`` for a table of this name."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--out", type=Path, default=RESULTS / table)
    return parser


def quiet() -> None:
    """One thread, no warnings, and of Lightning only errors."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def written(path: Path) -> Iterator[Callable[[str], None]]:
    """Gives what prints a line and writes it to the file at once, so that a run that is cut short leaves its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:

        def say(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        yield say


def seconds(task: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of a task: of the processor, unless another clock is given. What the task makes is gone by their end."""
    start = clock()
    task()
    return clock() - start


def seconds_and_value(task: Callable[[], Value]) -> tuple[float, Value]:
    """CPU seconds of a task, and what it gives."""
    start = time.process_time()
    value = task()
    return time.process_time() - start, value


def median_and_range(values: Sequence[float], digits: int = 2) -> str:
    """Median, and in brackets the least and the greatest."""
    middle, least, most = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"


def in_a_new_process(measure: Callable[..., float], *arguments: Any) -> float:
    """What a function of a module gives in a process that has run nothing else."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_answered, args=(answer, measure, *arguments))
    process.start()
    value: float = answer.get(timeout=600)
    process.join()
    return value


def _answered(answer: Any, measure: Callable[..., float], *arguments: Any) -> None:
    quiet()
    answer.put(measure(*arguments))


def peak_megabytes(reset: bool = False) -> float:
    """Peak memory of this process in MB, as Linux counts it; since now, if it is reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def plain_supcon(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """L_out of Khosla et al. (2020), equation 2, by masks over the matrix of all similarities."""
    z, y = F.normalize(z.flatten(0, 1), dim=1), labels.repeat_interleave(z.shape[1])
    logits = z @ z.T / temperature
    logits = logits - logits.max(1, keepdim=True).values.detach()
    others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    positives = (y[:, None] == y) & others
    log_share = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    return -((positives * log_share).sum(1) / positives.sum(1)).mean()

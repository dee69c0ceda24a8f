"""Bars for passes over images that take a while, in a run that shows bars."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from tqdm import tqdm

# What is over within these seconds needs no bar.
PATIENCE = 2.0
Item = TypeVar("Item")


def watched(trainer: Trainer, batches: Iterable[Item], what: str) -> Iterator[Item]:
    """The batches, with a bar after two seconds if the trainer shows bars.

    Args:
        trainer: The trainer, which shows bars on rank 0 only.
        batches: The batches; without a length the bar counts them.
        what: What they are, in a word or two.
    """
    shown = getattr(trainer, "progress_bar_callback", None)
    total = sized_len(batches)
    if shown is None or getattr(shown, "is_disabled", False):
        return iter(batches)
    # While rich shows bars, it prints what others write to the terminal as lines: the bar must be one of its own.
    progress = getattr(shown, "progress", None)
    if progress is not None:
        return _in_rich(progress, batches, what, total)
    return iter(tqdm(batches, what, total, leave=False, delay=PATIENCE, dynamic_ncols=True, disable=None))


def _in_rich(progress: Any, batches: Iterable[Item], what: str, total: int | None) -> Iterator[Item]:
    start = time.monotonic()
    task = progress.add_task(what, total=math.inf if total is None else total, visible=False)
    try:
        for batch in batches:
            yield batch
            progress.update(task, advance=1, visible=time.monotonic() - start > PATIENCE)
    finally:
        progress.remove_task(task)

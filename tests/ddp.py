"""Several gloo processes inside a test."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _worker(rank: int, world: int, store: str, task: Callable[[int], Any], results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        results.put((rank, task(rank)))
    finally:
        dist.destroy_process_group()


def run(world: int, folder: Path, task: Callable[[int], Any]) -> list[Any]:
    """What the task returns on each of ``world`` forked processes."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (world, str(folder / "store"), task, results)
    processes = [context.Process(target=_worker, args=(rank, *arguments), daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=600) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return [found[rank] for rank in range(world)]

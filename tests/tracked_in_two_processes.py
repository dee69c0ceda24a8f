"""Run by test_tracker_anywhere.py: what the tracker finds in one process and in two, as JSON on the last line.

A process of its own, since Lightning forks in it.
"""

import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from ncfinetune.callbacks import NeuralCollapseTracker
from ncfinetune.callbacks.meter import CollapseMeter

K = 3


class StandingStill(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, K))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0 * self.model(batch[0]).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.model(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@contextmanager
def counted(calls: list[int]) -> Iterator[None]:
    reduce = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *args, **kwargs: (calls.append(1), reduce(*args, **kwargs))[1]
    try:
        yield
    finally:
        torch.distributed.all_reduce = reduce


class OwnPart(Sampler):
    """Draws a process's own part of the samples, as Lightning is asked to leave to it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[int]:
        rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return iter(range(rank, self.number, processes))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def run(number: int, devices: int, folder: str, own: bool = False) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(number) % K
    images = torch.randn(number, 3, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
    data = TensorDataset(images, labels)
    loader = DataLoader(data, batch_size=8, sampler=OwnPart(number) if own else None)
    torch.manual_seed(0)
    tracker = NeuralCollapseTracker(K, layers=["0", "auto"], metrics="all")
    trainer = Trainer(
        max_epochs=1,
        precision="64-true",  # of float32 features, a batch of another size would round others
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        callbacks=[tracker],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=not own,
        default_root_dir=folder,
    )
    with tempfile.TemporaryDirectory() as out:
        update, calls = CollapseMeter.update, []

        def measured(*args: Any, **kwargs: Any) -> None:
            with counted(calls):
                update(*args, **kwargs)

        finish = tracker.on_fit_end

        def save(trainer: Trainer, module: LightningModule) -> None:
            finish(trainer, module)
            if trainer.is_global_zero:
                torch.save((tracker.values, len(calls)), f"{out}/values.pt")

        tracker.on_fit_end = save  # type: ignore[method-assign]
        with patch.object(CollapseMeter, "update", measured):
            trainer.fit(StandingStill(), loader, loader)
        values, reduced = torch.load(f"{out}/values.pt")
    assert reduced == 0, "an update must not communicate"
    return values


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[Any, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in (51, 33, 18):
            found[number] = [run(number, devices, folder) for devices in (1, 2)]
        found["own part"] = [run(32, devices, folder, own=True) for devices in (1, 2)]
    print(json.dumps(found))

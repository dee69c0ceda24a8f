"""Passes over images as they are evaluated: no augmentation, no gradients, fixed weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

_END = object()


@contextmanager
def evaluation(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Eval mode without gradients; on exit modes, the trainer's stage and the random numbers are as they were."""
    stage = trainer.state.stage
    modes = {part: part.training for part in module.modules()}
    with isolate_rng(), torch.no_grad(), trainer.precision_plugin.forward_context():
        try:
            trainer.validating = True
            module.eval()
            yield
        finally:
            trainer.state.stage = stage
            for part, mode in modes.items():
                part.training = mode


def on_device(trainer: Trainer, batch: Any) -> Any:
    """The batch as a step would get it."""
    with _data_precision():
        return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))


def ready_batches(trainer: Trainer, loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader as a step would get them."""
    batches = iter(loader)
    while True:
        with _data_precision():
            batch = next(batches, _END)
        if batch is _END:
            return
        yield on_device(trainer, batch)


@contextmanager
def _data_precision() -> Iterator[None]:
    """Data are made in single precision, as outside a pass: in one, bf16-true makes bfloat16 the default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def plain_loader(trainer: Trainer, purpose: str) -> DataLoader[Any]:
    """All training images in a fixed order and as they are evaluated, whichever of several processes asks.

    Raises:
        ValueError: The trainer has no datamodule that offers them.
    """
    offered = getattr(getattr(trainer, "datamodule", None), "train_plain_dataloader", None)
    if offered is None:
        raise ValueError(
            f"{purpose} needs the training images in a fixed order and without augmentation; "
            "fit with a datamodule that has a train_plain_dataloader()"
        )
    return in_order(offered())


def in_order(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader of the same data set from its first to its last sample."""
    options: Any = {name: getattr(loader, name) for name in ("batch_size", "collate_fn", "num_workers", "pin_memory")}
    return DataLoader(loader.dataset, **options, generator=torch.Generator())

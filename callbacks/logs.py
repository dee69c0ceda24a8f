"""Logging of the callbacks' numbers: progress bar, monitored values, loggers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import LightningModule, Trainer

from .schedule import is_new


def log_epoch(module: LightningModule, values: Mapping[str, float], prog_bar: bool = False) -> None:
    """Log numbers of an epoch; all processes must call it.

    Args:
        module: The module in training.
        values: Numbers by log name.
        prog_bar: Show ``nc1`` in the progress bar.
    """
    for name, value in values.items():
        shown = prog_bar and name.startswith("nc1/")
        module.log(name, value, prog_bar=shown, on_step=False, on_epoch=True, sync_dist=True, add_dataloader_idx=False)


def log_evaluation(trainer: Trainer, module: LightningModule, values: Mapping[str, float], layer: str) -> None:
    """Log numbers of a test, or of a validation outside training; all processes must call it.

    Lightning prints what is logged there as a table. Only the ``nc1`` of one layer is in it, and in what ``test()``
    returns; monitored values and loggers have the others too.

    Args:
        trainer: The trainer.
        module: The tested module.
        values: Numbers by log name.
        layer: The layer in the table.
    """
    printed = {name: value for name, value in values.items() if name.startswith("nc1/") and of_layer(name) == layer}
    log_epoch(module, printed)
    others = {name: value for name, value in values.items() if name not in printed}
    for name, value in others.items():
        module.log(name, value, logger=False, on_step=False, on_epoch=True, sync_dist=True, add_dataloader_idx=False)
    step = trainer.fit_loop.epoch_loop._batches_that_stepped  # where Lightning logs what it logs of an evaluation
    for logger in trainer.loggers if others else ():
        logger.log_metrics(others, step=step)


def of_layer(name: str) -> str:
    """The layer in a log name of the tracker."""
    return name.split("/", 2)[2].split("/dataloader_idx")[0]


def log_before_training(trainer: Trainer, values: Mapping[str, float], device: torch.device) -> None:
    """Put numbers into ``callback_metrics`` for monitors and, before the first step, into the loggers.

    Args:
        trainer: The trainer.
        values: Numbers by log name.
        device: The module's device.
    """
    for name, value in values.items():
        trainer.callback_metrics[name] = torch.tensor(value, device=device)
    if is_new(trainer):
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=0)

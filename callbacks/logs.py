"""How numbers and pictures of the tracker reach progress bar, monitors, loggers and TensorBoard's pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from . import figures
from .layer_metrics import Result


def log_epoch(module: LightningModule, values: Mapping[str, float], prog_bar: bool = False) -> None:
    """Log numbers of an epoch, which all processes must do together.

    Args:
        module: The module that trains.
        values: Numbers by log name.
        prog_bar: Show those of ``nc1`` in the progress bar.
    """
    for name, value in values.items():
        shown = prog_bar and name.startswith("nc1/")
        module.log(name, value, prog_bar=shown, on_step=False, on_epoch=True, sync_dist=True, add_dataloader_idx=False)


def log_before_training(trainer: Trainer, values: Mapping[str, float], device: torch.device) -> None:
    """Give numbers to whoever monitors them until there are new ones and, before the first step, to the loggers.

    Args:
        trainer: The trainer.
        values: Numbers by log name.
        device: The module's.
    """
    for name, value in values.items():
        trainer.callback_metrics[name] = torch.tensor(value, device=device)
    if trainer.global_step == 0:
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=0)


def log_last_values(trainer: Trainer, values: Mapping[str, float], layer: str) -> None:
    """Put the last values beside the hyper-parameters: those of one layer, and what else the run has logged.

    Args:
        trainer: The trainer.
        values: What the callback has logged, of all layers.
        layer: The layer to show.
    """
    own = {name: v for name, v in values.items() if name.split("/", 2)[2].split("/dataloader_idx")[0] == layer}
    others = {name: float(value) for name, value in trainer.callback_metrics.items() if name not in values}
    first = {name: value for name, value in own.items() if name.startswith("nc1/")}
    metrics = first | others | own  # the page shows the first few unless told otherwise
    for logger in boards(trainer):
        logger.log_hyperparams(dict(logger.hparams), metrics, step=trainer.global_step)


def draw_pass(trainer: Trainer, history: Mapping[int, Mapping[str, float]], result: Result) -> None:
    """Draw a pass over the training set into the loggers that take pictures.

    Args:
        trainer: The trainer.
        history: ``{epochs trained: {layer: nc1}}`` of all passes.
        result: What this pass found.
    """
    if loggers := boards(trainer):
        for name, figure in figures.of_pass(history, result.moments, result.sample).items():
            for logger in loggers:
                logger.experiment.add_figure(f"neural_collapse/{name}", figure, global_step=trainer.global_step)


def boards(trainer: Trainer) -> list[Any]:
    """The loggers that take pictures and hyper-parameters, TensorBoard's way; none but on the first process."""
    loggers: list[Any] = trainer.loggers if trainer.is_global_zero else []
    return [
        logger
        for logger in loggers
        if isinstance(getattr(logger, "hparams", None), Mapping) and hasattr(logger.experiment, "add_figure")
    ]

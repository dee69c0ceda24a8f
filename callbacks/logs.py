"""Logging of the tracker's numbers and figures: progress bar, monitored values, loggers, TensorBoard's pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from . import figures
from .layer_metrics import Result


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


def log_before_training(trainer: Trainer, values: Mapping[str, float], device: torch.device) -> None:
    """Put numbers into ``callback_metrics`` for monitors and, before the first step, into the loggers.

    Args:
        trainer: The trainer.
        values: Numbers by log name.
        device: The module's device.
    """
    for name, value in values.items():
        trainer.callback_metrics[name] = torch.tensor(value, device=device)
    if trainer.global_step == 0:
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=0)


def log_last_values(trainer: Trainer, values: Mapping[str, float], layer: str) -> None:
    """Log the last values as metrics of the hyper-parameters: those of one layer, and the run's other logged numbers.

    Args:
        trainer: The trainer.
        values: The callback's logged numbers, of all layers.
        layer: The layer to show.
    """
    own = {name: v for name, v in values.items() if name.split("/", 2)[2].split("/dataloader_idx")[0] == layer}
    others = {name: float(value) for name, value in trainer.callback_metrics.items() if name not in values}
    first = {name: value for name, value in own.items() if name.startswith("nc1/")}
    metrics = first | others | own  # by default the page shows the first few
    for logger in boards(trainer):
        logger.log_hyperparams(dict(logger.hparams), metrics, step=trainer.global_step)


def draw_pass(trainer: Trainer, history: Mapping[int, Mapping[str, float]], result: Result) -> None:
    """Draw a pass over the training set into the loggers that accept figures.

    Args:
        trainer: The trainer.
        history: ``{epochs trained: {layer: nc1}}`` of all passes.
        result: Results of this pass.
    """
    if loggers := boards(trainer):
        for name, figure in figures.of_pass(history, result.moments, result.sample).items():
            for logger in loggers:
                logger.experiment.add_figure(f"neural_collapse/{name}", figure, global_step=trainer.global_step)


def boards(trainer: Trainer) -> list[Any]:
    """The loggers that accept figures and hyper-parameters as TensorBoard's does; empty except on rank 0."""
    loggers: list[Any] = trainer.loggers if trainer.is_global_zero else []
    return [
        logger
        for logger in loggers
        if isinstance(getattr(logger, "hparams", None), Mapping) and hasattr(logger.experiment, "add_figure")
    ]

"""Pictures for the loggers that accept them: TensorBoard, Weights & Biases, MLflow, and those with their interfaces."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from matplotlib.figure import Figure
from PIL import Image


def log_figures(trainer: Trainer, drawn: Mapping[str, Figure], step: int) -> None:
    """Log figures by name to every logger that accepts pictures; on rank 0 only.

    Args:
        trainer: The trainer.
        drawn: Figures by log name.
        step: The step that they show.
    """
    for log in accepting(trainer):
        for name, figure in drawn.items():
            log(name, figure, step)


def accepting(trainer: Trainer) -> list[Callable[[str, Figure, int], Any]]:
    """For each logger that accepts pictures a function of name, figure and step that logs one; empty except on rank 0.

    Lightning has no interface for pictures that all its loggers share, so that what a logger offers decides.
    """
    loggers: list[Any] = trainer.loggers if trainer.is_global_zero else []
    return [log for logger in loggers if (log := _way(logger)) is not None]


def _way(logger: Any) -> Callable[[str, Figure, int], Any] | None:
    if hasattr(logger, "log_image"):  # WandbLogger
        return lambda name, figure, step: logger.log_image(name, [_pixels(figure)], step=step)
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):  # TensorBoardLogger
        return lambda name, figure, step: experiment.add_figure(name, figure, global_step=step)
    if hasattr(experiment, "log_figure") and hasattr(logger, "run_id"):  # MLFlowLogger, whose pictures are files
        return partial(_as_file, experiment, logger.run_id)
    return None


def _pixels(figure: Figure) -> Image.Image:
    """The figure as an image: all such loggers take one, wandb no subclass of matplotlib's figures."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return Image.open(content)


def _as_file(client: Any, run: str, name: str, figure: Figure, step: int) -> None:
    client.log_figure(run, figure, f"{name}/step_{step:07d}.png")

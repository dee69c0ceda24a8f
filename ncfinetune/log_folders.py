"""Loggers that write to a folder, ``SAVE_DIR/NAME/VERSION``: which they are, and how they go on with what is there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_warn

from ncfinetune.csv_metrics import CSV_NAME, whole_rows

# What names the folder. A logger of Weights & Biases has these too, and its name and version are those of its site.
_FOLDER, _OF_A_SITE = {"save_dir", "name", "version"}, "project"
# Where the rows of a run are while its logger opens its file, and where a file stays that is damaged.
_ASIDE, _DAMAGED = "metrics_before.csv", "metrics_damaged.csv"


def folders(trainer: Any) -> list[Any]:
    """The arguments of each logger that writes to a folder, `TensorBoardLogger` and `CSVLogger` among them.

    Args:
        trainer: The trainer's part of a configuration, with one logger, several, or none.
    """
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    arguments = [logger.init_args for logger in loggers if hasattr(logger, "init_args")]
    return [one for one in arguments if vars(one).keys() >= _FOLDER and _OF_A_SITE not in one]


def keep_rows(trainer: Trainer) -> None:
    """Make each `CSVLogger` of a trainer go on with the rows in its folder; Lightning (2.6) deletes them.

    They are written by the logger itself, as if it had logged them, so that there is one file, whoever reads it. A
    process that is killed meanwhile leaves them in ``metrics_before.csv``, where the next start finds them.
    """
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            # It says that log files in its folder will be deleted.
            warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
            _keep_rows(logger)


def _keep_rows(logger: Any) -> None:
    path = Path(logger.log_dir, CSV_NAME)
    aside = path.with_name(_ASIDE)
    if path.is_file() and not aside.is_file():
        path.rename(aside)
    if not aside.is_file():
        return
    rows, fault = whole_rows(aside)
    logger.experiment.metrics[:0] = rows
    logger.save()
    if fault is None:
        aside.unlink()
        return
    damaged = aside.replace(path.with_name(_DAMAGED))
    rank_zero_warn(f"{path}: {fault}; the {len(rows)} rows before that are kept, and the file as it was is {damaged}")

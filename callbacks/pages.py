"""TensorBoard's pages: the charts of CUSTOM SCALARS, and the columns of HPARAMS."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

# The group of hyper-parameters that names a run in a few words, as ``ncfinetune fit`` logs it.
RUN = "run"
# The folder below a run's that ``ncfinetune test`` logs to.
_TEST = "test"
_SETS = {"train": "training", "val": "validation"}


def boards(trainer: Trainer) -> list[Any]:
    """The loggers that write TensorBoard's files; empty except on rank 0."""
    loggers: list[Any] = trainer.loggers if trainer.is_global_zero else []
    return [
        logger
        for logger in loggers
        if isinstance(getattr(logger, "hparams", None), Mapping) and hasattr(logger.experiment, "add_custom_scalars")
    ]


def lay_out(trainer: Trainer, metrics: Sequence[str]) -> None:
    """Write the layout of the page CUSTOM SCALARS: accuracy and loss first, then all layers of a metric in one chart.

    TensorBoard shows one layout for all runs below its folder. Charts name their curves by pattern, so that runs with
    other layers have the same layout.

    Args:
        trainer: The trainer.
        metrics: The metrics that are logged, in the order of their charts.
    """
    layout = {"accuracy and loss": {"accuracy": ["Multiline", [".*acc"]], "loss": ["Multiline", [".*loss"]]}}
    for split, words in _SETS.items():
        # nc4 is measured against the class means of the training images, and not on these.
        known = [metric for metric in metrics if (metric, split) != ("nc4", "train")]
        charts = {f"{metric}, {words} images": ["Multiline", [f"{metric}/{split}/.*"]] for metric in known}
        layout[f"collapse of the layers, {words} images"] = charts
    for logger in boards(trainer):
        logger.experiment.add_custom_scalars(layout)


def describe(trainer: Trainer, names: Iterable[tuple[str, str]]) -> None:
    """Write the columns of the page HPARAMS, and this run's hyper-parameters.

    The page reads the values of a metric from its curve, so that it can be written before the end of a run. It takes
    the columns from one run for all of them; they are therefore declared without regard to this run's values.

    Args:
        trainer: The trainer.
        names: Log names of the metrics, in the order of their columns, each with the folder below the run's that it is
            read from.
    """
    from tensorboard.plugins.hparams import summary_v2  # its public name, api, needs TensorFlow

    for logger in boards(trainer):
        given = logger.hparams.get(RUN)
        values = dict(_flat(given if isinstance(given, Mapping) else logger.hparams))
        writer = logger.experiment._get_file_writer()
        columns = [summary_v2.HParam(name) for name in values]
        metrics = [summary_v2.Metric(name, folder, display_name=name) for name, folder in names]
        writer.add_summary(summary_v2.hparams_config_pb(columns, metrics))
        # Runs with the same trial would be one row, whose column has room for some 16 letters.
        folder = Path(logger.log_dir)
        known = {name: value for name, value in values.items() if value is not None}
        writer.add_summary(summary_v2.hparams_pb(known, trial_id=f"{folder.name} in {folder.parent}"))
        logger.save()


def metric_columns(own: Iterable[str], others: Iterable[str]) -> list[tuple[str, str]]:
    """Names of metrics for HPARAMS, which shows the first few by default: accuracies, then collapse, then the rest.

    Args:
        own: The tracker's numbers to show.
        others: What else the run logs; each of the validation set has its like of the test set, which comes later: in
            the folder of ``ncfinetune test``, or in the run's own if it is tested after the fit.

    Returns:
        Names with the folder below the run's.
    """
    tests = [re.sub("^val/", "test/", name) for name in others if name.startswith("val/")]
    columns = [*((name, "") for name in own), *((name, _TEST) for name in tests), *((name, "") for name in others)]
    columns += [(name, "") for name in tests]

    def place(column: tuple[str, str]) -> int:
        name, folder = column
        if name in tests and folder != _TEST:
            return 3
        return 0 if "acc" in name else 1 if name.startswith("nc1/") else 2

    return sorted(dict.fromkeys(columns), key=place)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Plain hyper-parameters by their path; others as text, and None as it is."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value if isinstance(value, int | float | str | None) else str(value)

"""What a command on a trained model need not be told: the run of its checkpoint, and the folders that it writes to."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from ncfinetune.checkpoint_io import read_checkpoint
from ncfinetune.log_folders import folders
from ncfinetune.resumed_folder import run_of
from ncfinetune.runs import Run
from ncfinetune.settings import evaluated_images
from ncfinetune.weight_files import DATA

# Commands that write no log, and run on any machine in one process.
ALONE = ("predict", "evaluate")
# What the Trainer of a run may have that another machine has not.
_ANY_MACHINE = {"accelerator": "auto", "devices": "1", "num_nodes": "1", "strategy": "auto"}
# Files that a logger makes before anything is logged.
_OF_LOGGERS = ("events.out.tfevents.*", "hparams.yaml", "metrics.csv")


def complete(words: Sequence[str]) -> list[str]:
    """A command on a checkpoint alone with the configuration of the checkpoint's run, or else with its model.

    ``predict`` and ``evaluate`` do not take the run's devices, since they are for any machine. Other commands, and
    those with a configuration or a model, are returned as they are.

    Args:
        words: The command line's words, from the command on, in which ``--config`` has its long form.

    Raises:
        ValueError: The checkpoint is in no run's folder and is not of a classifier of ours, or ``--images`` is missing.
    """
    command, *rest = words
    checkpoint = _given(rest, "ckpt_path")
    if command == "fit" or checkpoint is None or any(_given(rest, name) for name in ("config", "model")):
        return list(words)
    if run := run_of(checkpoint):
        elsewhere = [word for name, value in _ANY_MACHINE.items() for word in (f"--trainer.{name}", value)]
        return [command, "--config", str(run / "config.yaml"), *(elsewhere if command in ALONE else []), *rest]
    content = read_checkpoint(checkpoint)
    if content is None:  # the command itself says what is wrong with it
        return list(words)
    model = ["--model", json.dumps(_model(checkpoint, content))]
    if _given(rest, "data") is not None:
        return [command, *model, *rest]
    said = content.get(DATA) or {}
    if not said.get("preprocessing") or _given(rest, "images") is None:
        raise ValueError(
            f"{checkpoint!r} is in no folder of a run, which would name the data; give --images FOLDER to predict or "
            "evaluate, or --data, or the run's configuration by --config"
        )
    data = {"class_path": "ncfinetune.datamodules.Unlabelled", "init_args": unlabelled(content)}
    return [command, *model, "--data", json.dumps(data), *rest]


def unlabelled(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The class names and the preprocessing in a checkpoint, as arguments of `datamodules.Unlabelled`."""
    said, classes = checkpoint[DATA], checkpoint.get("hyper_parameters", {}).get("num_classes", 0)
    names = said.get("class_names") or [str(label) for label in range(classes)]
    return {"class_names": names, "preprocessing": said["preprocessing"]}


def _model(path: str, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Class and arguments of a checkpoint's model."""
    saved = dict(checkpoint.get("hyper_parameters", {}))
    # Only the command line saves the class.
    name = saved.get("_class_path") or f"ncfinetune.{'FineTuner' if 'skip_from' in saved else 'Supervised'}"
    if "num_classes" not in saved or not re.fullmatch(r"ncfinetune\.\w+", name):
        raise ValueError(f"{path!r} holds no classifier of ncfinetune; give the run's configuration by --config")
    # The number of classes comes from the data.
    arguments = {key: value for key, value in saved.items() if not key.startswith("_") and key != "num_classes"}
    return {"class_path": name, "init_args": arguments}


def _given(words: Sequence[str], option: str) -> str | None:
    """The value of an option in words of the command line; None if it is not among them."""
    for word, following in zip(words, [*words[1:], ""], strict=False):  # of no words at all there is none
        name, equals, value = word.partition("=")
        if name.lstrip("-") == option and word.startswith("-"):
            return value if equals else following
    return None


def place(command: str, config: Any, checkpoint: str | None, words: Sequence[str]) -> None:
    """Make a command on a run's checkpoint write to the run's folder, in which TensorBoard lists no further run.

    ``predict`` and ``evaluate`` log nothing, so that they have no logger. All loggers of ``validate`` and ``test``
    write to the folder of their name in the run's, unless a logger's option is among the words. A test of other images
    than the run's, or of images that are prepared otherwise, is no test of the run: its folder is another one, as is an
    evaluation's.

    Args:
        command: The command.
        config: The command's configuration; its trainer is changed in place.
        checkpoint: The checkpoint.
        words: The words of the command line.
    """
    # Their Trainer saves no checkpoint.
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    trainer, run = config.trainer, run_of(checkpoint)
    if command in ALONE:
        trainer.logger = False
        if trainer.default_root_dir is None and run is not None:
            trainer.default_root_dir = str(run)
        return
    places = [] if any(word.startswith("--trainer.logger") for word in words) else folders(trainer)
    if run is not None and places:
        split = "val" if command == "validate" else "test"
        limit = f"limit_{split}_batches"
        # 1 is a batch, 1.0 and null are all.
        limits = [1.0 if value is None else value for value in (Run(run).part("trainer").get(limit), trainer[limit])]
        alike = str(limits[0]) == str(limits[1])
        version = own_or_other(command, split, config.data, run, alike, name=command)
        for options in places:
            options.save_dir, options.name, options.version = str(run), "", version


def own_or_other(command: str, split: str, data: Any, run: Path, as_many: bool, name: str) -> str:
    """The name of what a command measures: of other images than its run would, which is said, ``NAME_of_other_images``.

    Args:
        command: The command.
        split: The part of the data that it measures.
        data: The configuration of its data.
        run: The folder of the run.
        as_many: Whether it measures as many of these images as the run would.
        name: The name for the images of the run.
    """
    if as_many and evaluated_images(Run(run).part("data"), split) == evaluated_images(data.as_dict(), split):
        return name
    other = f"{name}_of_other_images"
    rank_zero_info(
        f"{command}: images, or their preparation, other than those of {run}, so that the numbers are called {other} "
        "and are none of the run's in a report"
    )
    return other


class ForgetFailedStart(Callback):
    """Removes the folder of a command that failed before its first batch, which TensorBoard would list as a run.

    Only files that loggers make at the start are removed, and only from a folder that did not exist before.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_new = not folder.exists()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the folder, unless a configuration was saved in it after the first batch."""
        if not (self._is_new and trainer.is_global_zero) or list(self._folder.glob("config*.yaml")):
            return
        for logger in trainer.loggers:
            logger.finalize("failed")  # closes its files
        for pattern in _OF_LOGGERS:
            for path in self._folder.glob(pattern):
                path.unlink(missing_ok=True)
        for folder in (self._folder / "checkpoints", self._folder):
            with suppress(OSError):  # there is none, or it holds something else
                folder.rmdir()

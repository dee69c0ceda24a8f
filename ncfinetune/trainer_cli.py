"""``ncfinetune fit | validate | test | predict | evaluate``: LightningCLI with our classes and one-line errors."""

from __future__ import annotations

import importlib
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ncfinetune import (
    class_help,
    found,
    interruptions,
    log_folders,
    prediction_commands,
    predictions,
    resumed_folder,
    settings,
    summary,
    trained,
)
from ncfinetune.atomic import check_writable
from ncfinetune.checkpoint_io import AtomicCheckpointIO, read_checkpoint
from ncfinetune.classifier import Classifier
from ncfinetune.cli_errors import PlainParser, check_configurations, one_line
from ncfinetune.command_trainer import CommandTrainer
from ncfinetune.conclusion import conclusion
from ncfinetune.launches import check_launched
from ncfinetune.learner import Learner
from ncfinetune.safety import refuse_code
from ncfinetune.saved_config import SaveConfigAfterBatch
from ncfinetune.weight_files import DATA

# Imported for the command line only: an imported class can be selected by its short name.
for _home in ("callbacks", "contrastive", "datamodules", "finetune", "schedule", "supervised"):
    importlib.import_module(f"ncfinetune.{_home}")

_LOGGER: dict[str, Any] = {
    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
    "init_args": {"save_dir": "runs", "name": "", "default_hp_metric": False},
}

# Name of the file with the configuration of a training run.
_CONFIG = "config.yaml"
# Options of predict and of evaluate; those of predict are in the configurations of runs, where they are null.
_OF = {"images": ("predict", "evaluate"), "predictions": ("predict",)}


def main(words: list[str]) -> int | None:
    """Run one of the Trainer's commands, whose words begin with its name.

    With ``--safe`` among them, code from a configuration or a checkpoint is never run.

    Returns:
        The exit status: None, `prediction_commands.BROKEN_IMAGES`, `interruptions.STATUS` after SIGTERM, or
        `INTERRUPTED` after Ctrl-C.

    Raises:
        ValueError: Lightning refuses the configuration, a checkpoint is of another model, or ``--safe`` forbids
            something.
    """
    if (option := class_help.asked(words)) is not None:
        print(class_help.classes(option))
        return None
    return _run(words)


# What the help of a command begins with.
_DESCRIPTIONS = {
    "fit": "Train a model; its checkpoints, logs and configuration are in one folder, RUN.",
    "validate": "Measure a model on the validation images; of a run's checkpoint into RUN/validate.",
    "test": "Measure a model on the test images; of a run's checkpoint into RUN/test.",
    "predict": "Class probabilities of the test images, or of a folder (--images), as a table.",
    "evaluate": "Accuracy with its interval, precision and recall of each class, calibration, confusions, and a sheet "
    "of the most confident mistakes, on the test images or on a folder with a folder for each class (--images).",
}


def _run(words: list[str]) -> int | None:
    safe = "--safe" in words
    words = trained.complete(_files_first([word for word in words if word != "--safe"]))
    if safe:
        refuse_code(words)
    try:
        return (_SafeCLI if safe else NCFinetuneCLI)(
            words[0],
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            trainer_class=CommandTrainer,
            parser_kwargs={words[0]: {"description": _DESCRIPTIONS[words[0]]}},
            seed_everything_default=0,
            trainer_defaults={"logger": _LOGGER, **_launched()},
            parser_class=PlainParser,
            save_config_callback=SaveConfigAfterBatch,
            save_config_kwargs={"overwrite": True, "given": None},
            args=words,
        ).status
    except SIGTERMException:
        return interruptions.STATUS
    except SystemExit as left:  # by Lightning, with status 1
        if isinstance(left.__context__, KeyboardInterrupt):
            return interruptions.INTERRUPTED
        raise
    except (MisconfigurationException, UnpicklingError, RuntimeError) as error:
        if (reason := _reason(error)) is None:
            raise
        raise ValueError(reason) from error


def _files_first(words: list[str]) -> list[str]:
    """The command, its configuration files as ``--config FILE``, and its other options, which count wherever they are.

    Options that come before ``--config`` would be replaced by what the file has of the same name: the ``ckpt_path:
    null`` of a run's configuration, say, would have ``test`` measure a network that was never trained.
    """
    command, *rest = words
    files: list[str] = []
    others: list[str] = []
    left = iter(rest)
    for word in left:
        if word in ("--config", "-c"):
            files += ["--config", *islice(left, 1)]
        elif found := re.fullmatch("(?:--config=|-c=?)(.+)", word, re.DOTALL):
            files += ["--config", found[1]]
        else:
            others.append(word)
    return [command, *files, *others]


def _reason(error: Exception) -> str | None:
    """What a run was refused for, or how it was lost, in a line; None for a fault of the program."""
    if isinstance(error, MisconfigurationException):
        return str(error)
    if isinstance(error, UnpicklingError):
        found = textwrap.shorten(str(error), 200, placeholder=" ...")
        return f"--ckpt_path holds code, which is not run here: {found}"
    if isinstance(error, RuntimeError) and (lost := interruptions.lost_ranks(error)):
        return lost
    if str(error).startswith("Early stopping conditioned on metric"):
        return f"{' '.join(str(error).split())}; without validation images nothing of val/ is logged"
    if "stateful callback of type" in str(error):
        return " ".join(str(error).split())
    if "in loading state_dict" in str(error):
        found = textwrap.shorten(str(error), 300, placeholder=" ...")
        return f"--ckpt_path is a checkpoint of another model: {found}"
    return None


def _keep_chosen(model: Any, checkpoint: Mapping[str, Any]) -> None:
    """Replace ``auto`` by the layers that the run has chosen."""
    chosen = checkpoint.get("hyper_parameters", {})
    if model.init_args.get("train") == "auto":
        model.init_args.train = chosen.get("train", "auto")
    if model.init_args.get("skip_from") == "auto" and chosen.get("skip_from") is not None:
        model.init_args.skip_from, model.init_args.max_skips = chosen["skip_from"], 1


def _name_devices(callbacks: Any) -> None:
    """Replace devices among the arguments of callbacks by their names, since a YAML file cannot hold a device."""
    for callback in callbacks if isinstance(callbacks, list) else ():
        arguments = vars(callback.init_args) if "init_args" in callback else {}
        arguments.update({name: str(value) for name, value in arguments.items() if isinstance(value, torch.device)})


def _log_as_usual(trainer: Any) -> None:
    """Put our logger in the place of Lightning's (``true`` and null), whose folders are not known beforehand."""
    if trainer.logger in (None, True):
        arguments = {f"init_args.{name}": value for name, value in {"version": None, **_LOGGER["init_args"]}.items()}
        trainer.logger = Namespace({"class_path": _LOGGER["class_path"], **arguments})


def _launched() -> dict[str, int]:
    """Numbers of devices and nodes that torchrun has launched processes for, as defaults of the Trainer."""
    if not (torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()):
        return {}
    return {"devices": int(os.environ["LOCAL_WORLD_SIZE"]), "num_nodes": int(os.environ["GROUP_WORLD_SIZE"])}


class NCFinetuneCLI(LightningCLI):
    """LightningCLI that links the number of classes from data to model, and checks folders and files at the start."""

    safe = False
    status: int | None = None
    _arguments: Any = None
    # Step and epoch of the checkpoint.
    _step = _epoch = 0

    def __init__(self, command: str, *args: Any, **kwargs: Any) -> None:
        self._command = command
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning's is static, and knows no command
        """The given command alone, since Lightning builds a parser for each, which takes a third of a second."""
        like = "predict" if self._command == "evaluate" else self._command
        return {self._command: LightningCLI.subcommands()[like]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments of the command, and keep them."""
        self._arguments = args
        check_configurations(args, parser)
        # The base class would warn that it is given words although the process has its own.
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the link from data to model, and the options that are not Lightning's."""
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="After fit, test the last weights on the test set."
        )
        add: Any = parser.add_argument
        text = "With predict and evaluate: a folder of images, or an image to predict, in place of the data's; folders "
        add("--images", type=str | None, default=None, help=f"{text}in it that are named as classes are the true ones.")
        text = "With predict: the .csv or .parquet file to write, in place of RUN/predictions.csv."
        add("--predictions", type=str | None, default=None, help=text)
        if self._command in trained.ALONE:
            add("--split", type=Literal["train", "val", "test"], default="test", help="The part of the data.")
            text = "With predict: write so many most probable classes in place of all; with evaluate: measure the "
            add("--top_k", type=int | None, default=None, help=f"{text}top-k accuracy for this number too.")
        if self._command == "evaluate":
            text = "The folder to write, in place of RUN/evaluation/SPLIT, of RUN/evaluation/SPLIT_of_other_images for "
            text += "other images than the run's, or a part of them, or of RUN/evaluation/images_FOLDER."
            add("--out", type=str | None, default=None, help=text)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would overwrite the configuration by the checkpoint's hyper-parameters.

        A run's configuration is in its ``config.yaml``; a checkpoint that does not fit it is refused when loaded.
        """

    def before_instantiate_classes(self) -> None:
        """Name the configuration of a training run differently from those of later tests in the same folder."""
        self._refuse_of_others()
        checkpoint_path = self._get(self.config, "ckpt_path")
        if self.subcommand != "fit":
            warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks")
            trained.place(str(self.subcommand), self.config[self.subcommand], checkpoint_path, self._arguments)
        if asked := self._get(self.config, "predictions"):
            predictions.check_format(Path(asked))
            _check_folder("predictions'", str(Path(asked).parent), "--predictions", self.parser)
        name = _CONFIG if self.subcommand == "fit" else f"config_{self.subcommand}.yaml"
        self.save_config_kwargs["config_filename"] = name
        self._trust_nothing_remote()
        checkpoint = self._read(checkpoint_path)
        if self.subcommand == "fit":
            _name_devices(self.config.fit.trainer.callbacks)
            _log_as_usual(self.config.fit.trainer)
            self.save_config_kwargs["given"] = self.config.fit.clone()
            self.save_config_kwargs["given"].ckpt_path = None
            self.config.fit.ckpt_path = resumed_folder.place(self.config.fit.trainer, checkpoint_path, self._arguments)
        elif checkpoint is not None:
            self._take_from(checkpoint)
            self._step, self._epoch = checkpoint.get("global_step", 0), checkpoint.get("epoch", 0)
        if checkpoint is not None:
            _keep_chosen(self.config[self.subcommand].model, checkpoint)

    def _refuse_of_others(self) -> None:
        """Refuse options, and words for checkpoints, of other commands."""
        for option, commands in _OF.items():
            if self.subcommand not in commands and self._get(self.config, option) is not None:
                self.parser.error(f"{option} is an option of {' and '.join(commands)}, not of {self.subcommand}")
        path = self._get(self.config, "ckpt_path")
        if self.subcommand != "fit" and path in ("last", "best"):
            fix = "--ckpt_path RUN/checkpoints/NAME.ckpt"
            self.parser.error(f"ckpt_path {path} works with fit only; {self.subcommand} needs the file, {fix}")

    def _read(self, path: str | None) -> Mapping[str, Any] | None:
        """The contents of a checkpoint, before data and network are built; see `read_checkpoint`."""
        try:
            return None if path is None else read_checkpoint(path)
        except ValueError as error:
            self.parser.error(str(error))

    def _trust_nothing_remote(self) -> None:
        """Make Lightning read a remote checkpoint as data; by default it would run code in it."""
        path = self._get(self.config, "ckpt_path")
        remote = path is not None and re.match(r"\w+://", path) is not None
        if path is None or not (remote or self.safe):
            return
        if "weights_only" not in self.config[self.subcommand]:
            whose = f"{path!r} is on another machine" if remote else f"--safe does not trust {path!r}"
            self.parser.error(f"{whose}, and this Lightning would run its code; fetch it first, or take lightning>=2.6")
        if self.config[self.subcommand].weights_only is None or self.safe:
            self.config[self.subcommand].weights_only = True

    def _take_from(self, checkpoint: Mapping[str, Any]) -> None:
        """Take from the checkpoint what need not be on this machine: pre-trained weights and image preprocessing.

        To predict the images of a folder, the training data set is not needed.
        """
        config = self.config[self.subcommand]
        model, said = config.model, checkpoint.get(DATA) or {}
        if model.class_path.startswith("ncfinetune."):
            if "checkpoint" in model.init_args:
                model.init_args.checkpoint = None
            if isinstance(model.init_args.get("backbone"), dict):
                starts = ("checkpoint", "pretrained")
                model.init_args.backbone = {k: v for k, v in model.init_args.backbone.items() if k not in starts}
        if self._get(self.config, "images") is not None and said.get("preprocessing"):
            loading = {name: config.data.init_args.get(name) for name in ("batch_size", "num_workers")}
            given = {name: value for name, value in loading.items() if value is not None}
            arguments = {**given, **trained.unlabelled(checkpoint)}
            path = "ncfinetune.datamodules.Unlabelled"
            config.data = Namespace({"class_path": path, "init_args": arguments})

    def instantiate_classes(self) -> None:
        """Build model, data and trainer, and check that their folders are writable.

        Raises:
            ValueError: One of them refuses its arguments.
        """
        self._check_trained()
        given = self._get(self.config, "model.init_args.num_classes")
        try:
            super().instantiate_classes()
        except (ValueError, OSError) as error:
            raise ValueError(one_line(str(error), self.parser)) from error
        offered = getattr(self.datamodule, "num_classes", given)
        if given is not None and given != offered:
            self.parser.error(f"the model is given num_classes={given}, but the data has {offered}; leave it out")
        check_launched(self.trainer)
        summary.shorten(self.trainer)
        trainer: Any = self.trainer
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        trainer.callbacks += [interruptions.SaveOnSIGTERM(), resumed_folder.KnownFolder()]
        # All processes use the folder of rank 0; another process would take the next version number.
        if getattr(rank_zero_only, "rank", 0):
            return
        run = self._run_folder
        if self._get(self.config, "ckpt_path") is None:
            self._check_alone(Path(run))
        trainer.callbacks.append(trained.ForgetFailedStart(Path(run)))
        if self.subcommand == "fit" and self._get(self.config, "ckpt_path") == "last":
            resumed_folder.check_has_last(self.trainer, Path(run))
        if self.subcommand == "fit" and self._get(self.config, "model.init_args.cache") == "disk":
            cache = self._get(self.config, "model.init_args.cache_dir")
            _check_folder("cache", cache, "--model.init_args.cache_dir", self.parser)
        option = "trainer.default_root_dir" if self.subcommand in trained.ALONE else "trainer.logger.init_args.save_dir"
        # After all that refuses, since the folder that it makes remains: it reserves the number of the run.
        _check_folder("run", run, f"--{option}", self.parser)
        self._keep_rows(Path(run))

    def _keep_rows(self, run: Path) -> None:
        """Keep the rows of logs that are gone on with; without checkpoint and configuration they are of no run."""
        if self._get(self.config, "ckpt_path") is not None or (run / _CONFIG).is_file():
            log_folders.keep_rows(self.trainer)

    def _check_trained(self) -> None:
        """Refuse to classify with, and warn of measuring, a classifier that no checkpoint has trained."""
        if self.subcommand == "fit" or self._get(self.config, "ckpt_path") is not None:
            return
        module, _, name = str(self._get(self.config, "model.class_path")).rpartition(".")
        kind: Any = getattr(sys.modules.get(module), name, None)  # imported when the command was parsed
        if not (isinstance(kind, type) and issubclass(kind, Classifier)):
            return
        fix = "give --ckpt_path RUN/checkpoints/NAME.ckpt"
        if self.subcommand in trained.ALONE:
            self.parser.error(f"{self.subcommand} needs a trained classifier; {fix}")
        rank_zero_warn(
            f"{self.subcommand} measures a classifier that was not trained, since there is no checkpoint; {fix}"
        )

    def _check_alone(self, run: Path) -> None:
        """Refuse a run in the folder of another, whose checkpoints it would replace and whose logs it joins.

        Of a network without a checkpoint neither may be tested there. A job that SLURM has requeued goes on with its
        own; without a logger there is no folder of the run.
        """
        if not self.trainer.loggers or not (run / _CONFIG).is_file():
            return
        other = "another --trainer.logger.version"
        if self.subcommand != "fit":
            self.parser.error(
                f"{self.subcommand} has no checkpoint, and would log to the run in {str(run)!r}; give --ckpt_path "
                f"{run / 'checkpoints' / 'NAME.ckpt'}, or {other}"
            )
        if not resumed_folder.requeued(self.trainer.default_root_dir):
            saved = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
            go_on = f"go on with it by --ckpt_path {saved[-1]}, " if saved else "there is no checkpoint in it; "
            self.parser.error(
                f"expected a folder without a run, and {str(run)!r} holds one; {go_on}give {other}, or delete it"
            )

    def before_fit(self) -> None:
        """Have it logged what the run is, and say nothing of an interval at which our learners log no number."""
        if isinstance(self.model, Learner):
            warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
        trainer: Any = self.trainer
        trainer.callbacks.append(found.announcing(settings.headline(self.config.fit.as_dict())))
        rank_zero_info(f"run: {self._run_folder}")

    def after_fit(self) -> None:
        """Say how it ended, and test the last weights, with ``--test_after_fit``."""
        if not self.trainer.interrupted and not getattr(self.trainer, "fast_dev_run", False):
            rank_zero_info("\n".join(conclusion(self.trainer, self.model)))
        if not self.trainer.interrupted:
            resumed_folder.forget_requeue(self.trainer)
        if self._get(self.config, "test_after_fit"):
            self.trainer.test(self.model, datamodule=self.datamodule)

    def before_validate(self) -> None:
        """Have numbers logged at the step and epoch of the checkpoint; the Trainer would log them at 0."""
        loop: Any = self.trainer.fit_loop
        loop.epoch_loop._batches_that_stepped = self._step
        loop.epoch_progress.current.completed = self._epoch

    before_test = before_validate

    @property
    def _run_folder(self) -> str:
        return self.trainer.log_dir or self.trainer.default_root_dir

    def predict(self, **kwargs: Any) -> None:
        """Write class probabilities to ``--predictions`` or the run's folder, a row for each image.

        Raises:
            ValueError, OSError: As `prediction_commands.predict`.
        """
        path = Path(self._get(self.config, "predictions") or Path(self._run_folder, "predictions.csv"))
        self.status = prediction_commands.predict(self._asked(kwargs), path)

    def evaluate(self, **kwargs: Any) -> None:
        """Write and print what is right and wrong about the predictions of labelled images.

        Raises:
            ValueError, OSError: As `prediction_commands.evaluate`.
        """
        out, data = self._get(self.config, "out"), self.config[self.subcommand].data
        self.status = prediction_commands.evaluate(self._asked(kwargs), Path(self._run_folder), out, data, self._step)

    def _asked(self, arguments: dict[str, Any]) -> prediction_commands.Asked:
        images, split, top_k = (self._get(self.config, option) for option in ("images", "split", "top_k"))
        return prediction_commands.Asked(self.trainer, arguments, images, split, top_k)


class _SafeCLI(NCFinetuneCLI):
    """The command line under ``--safe``, which trusts no checkpoint."""

    safe = True


def _check_folder(what: str, folder: str, option: str, parser: LightningArgumentParser) -> None:
    try:
        check_writable(folder)
    except OSError as error:
        parser.error(f"cannot write to the {what} folder {folder!r} ({error.strerror}); choose another with {option}")

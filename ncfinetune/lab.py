"""Options, networks, datamodule and trainer that ``scan`` and ``suggest`` share."""

from __future__ import annotations

import importlib
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import DefaultHelpFormatter
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from ncfinetune.backbone import Backbone
from ncfinetune.bank import Source
from ncfinetune.cli_errors import PlainParser

# What a data set's options say of loading it, and not of what it is.
_LOADING = ("root", "num_workers", "download", "in_memory", "device_cache", "augmentation", "strength", "views")


class _Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """The formatter of jsonargparse, which leaves the lines of a description as they are."""


def lab_parser(command: str, description: str, most: int) -> PlainParser:
    """A parser with the options for networks, data and device.

    Args:
        command: Name of the command.
        description: What its help says first.
        most: Default of ``--max_images``.
    """
    importlib.import_module("ncfinetune.datamodules")  # so that their classes can be chosen by their short names
    parser = PlainParser(prog=f"ncfinetune {command}", description=description, formatter_class=_Formatter)
    add: Any = parser.add_argument
    add("--backbone", type=dict | str, nargs="+", help="timm names, or arguments of a Backbone as {name: ..., ...}")
    add("--checkpoint", type=str, nargs="+", help="a file of weights for each backbone, or several for one of them")
    add("--pretrained", type=bool, default=False, help="load timm's weights")
    add("--allow_random", type=bool, default=False, help="accept networks with random weights")
    add("--layers", type=str, nargs="+", default=[], help="names or patterns of modules in place of all blocks")
    add("--max_images", type=int, default=most, help="training images at most, evenly over each class")
    add("--accelerator", type=str, default="auto", help="as the Trainer's")
    add("--precision", type=str, default="32-true", help="as the Trainer's")
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)
    groups = parser.groups or {}
    # In place of the first words of LightningDataModule's docstring.
    groups["data"].title = "a class of ncfinetune.datamodules or your own, or an overlay of experiments/data"
    return parser


def sources(options: Any) -> list[Source]:
    """The networks that the options name, each under a name of its own.

    Raises:
        ValueError: No backbone, another number of checkpoints than of backbones, or a backbone with random weights.
    """
    backbones, checkpoints = options.backbone or [], options.checkpoint or []
    if not backbones:
        raise ValueError("expected --backbone NAME, one or several; timm.list_models() has their names")
    if len(checkpoints) > 1 and len(backbones) == 1:
        backbones = backbones * len(checkpoints)
    if checkpoints and len(checkpoints) != len(backbones):
        raise ValueError(
            f"expected a checkpoint for each backbone, got {len(checkpoints)} for {len(backbones)}; give as many, "
            "or several checkpoints of one backbone"
        )
    seed_everything(0, verbose=False)  # so that a network at its random start is the same in each job of a scan
    given = [{"name": b} if isinstance(b, str) else dict(b) for b in backbones]
    for spec, checkpoint in zip(given, checkpoints, strict=False):
        spec["checkpoint"] = checkpoint
    return [_source(spec, name, options) for spec, name in zip(given, _names(given), strict=True)]


def _source(spec: dict[str, Any], name: str, options: Any) -> Source:
    pretrained = spec.pop("pretrained", options.pretrained and "checkpoint" not in spec)
    backbone = Backbone.build({**spec, "pretrained": pretrained})
    if backbone.random and not options.allow_random:
        raise ValueError(
            f"{name} has random weights in {next(iter(backbone.random))}; give --pretrained true, a --checkpoint "
            "FILE that has it, or --allow_random true"
        )
    return Source.of(name, backbone, options.layers)


def _names(given: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each: the architecture's, with what tells equal ones apart."""
    names = [str(spec.get("name", "?")) for spec in given]
    names = [
        f"{name} {Path(str(spec['checkpoint'])).stem}" if names.count(name) > 1 and "checkpoint" in spec else name
        for name, spec in zip(names, given, strict=True)
    ]
    return [name if names.count(name) == 1 else f"{name} #{place}" for place, name in enumerate(names, 1)]


def datamodule(options: Any, parser: PlainParser) -> LightningDataModule:
    """The datamodule that the options name.

    Raises:
        ValueError: There is none, or ``--max_images`` is below 1.
    """
    _named_data(options)
    if options.max_images < 1:
        raise ValueError(f"expected --max_images of at least 1, got {options.max_images}")
    seed_everything(0, verbose=False)  # so that one that splits at random does so alike in each job of a scan in parts
    made: LightningDataModule = parser.made(options).data
    return made


def _named_data(options: Any) -> Any:
    """Class and arguments of the data."""
    if options.data is None:
        raise ValueError("expected --data CLASS, or an overlay such as experiments/data/image_folder.yaml")
    return options.data


def quiet_trainer(options: Any, **arguments: Any) -> Trainer:
    """A trainer on one device that writes and prints nothing.

    Raises:
        ValueError: There is no such accelerator or precision here.
    """
    try:
        return Trainer(
            accelerator=options.accelerator,
            devices=1,
            precision=options.precision,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            **{"enable_progress_bar": False, **arguments},
        )
    except (MisconfigurationException, ModuleNotFoundError) as error:
        raise ValueError(f"--accelerator {options.accelerator}: {error}") from error


def pass_trainer(options: Any, **arguments: Any) -> Trainer:
    """A trainer for a pass over images, which shows a bar on stderr.

    Raises:
        ValueError: As `quiet_trainer`.
    """
    return quiet_trainer(options, callbacks=[_Progress()], enable_progress_bar=True, **arguments)


class _Images(Tqdm):
    """A bar labelled ``images``, which Lightning would rename."""

    def set_description(self, desc: str | None = None, refresh: bool = True) -> None:
        super().set_description("images", refresh)


class _Progress(TQDMProgressBar):
    """A bar on stderr, where it does not mix with the table, if that is a terminal."""

    def init_predict_tqdm(self) -> Any:
        return _Images(
            desc="images", disable=self.is_disabled or None, leave=False, dynamic_ncols=True, file=sys.stderr
        )

    def on_exception(self, *args: Any) -> None:
        """Take the bar away, so that the error has a line of its own."""
        if self._predict_progress_bar is not None:
            self._predict_progress_bar.close()


def said(options: Any) -> dict[str, Any]:
    """What tells the images of a pass from others, as plain data: class and options of the data, the precision."""
    config = _named_data(options)
    arguments = vars(config.init_args) if "init_args" in config else {}  # a class without arguments has none
    kept = {name: value for name, value in arguments.items() if name not in _LOADING}
    return {
        "class": config.class_path,
        "options": kept,
        "max_images": options.max_images,
        "precision": options.precision,
    }


def percent(share: float, error: float) -> str:
    """A share and its standard error, in per cent."""
    return f"{100 * share:.1f} ± {100 * error:.1f}"


def aligned(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of rows with the same columns."""
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)

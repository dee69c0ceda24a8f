"""``ncfinetune predict`` and ``evaluate``: class probabilities of images as a table, and what is wrong about them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from ncfinetune import settings, trained
from ncfinetune.loaders import in_order
from ncfinetune.passes import leaves_out
from ncfinetune.resumed_folder import run_of

# Exit status of a prediction with images that have none, most often since they cannot be read.
BROKEN_IMAGES = 3


@dataclass(frozen=True)
class Asked:
    """Which images are predicted, and by what.

    Args:
        trainer: The trainer.
        arguments: The arguments of its ``predict``, by name: the model, the datamodule and the checkpoint.
        images: The folder with the images; None predicts those of the datamodule.
        split: The part of the datamodule's images.
        top_k: Number of most probable classes that ``predict`` writes, or of the top-k accuracy of ``evaluate``; None
            is all of them, or no such accuracy.
    """

    trainer: Any
    arguments: Mapping[str, Any]
    images: str | None
    split: str
    top_k: int | None

    @property
    def takes_all(self) -> bool:
        """Whether ``limit_predict_batches`` leaves no image out."""
        return not leaves_out(self.trainer.limit_predict_batches)


def predict(asked: Asked, path: Path) -> int | None:
    """Write class probabilities to a ``.csv`` or ``.parquet`` file, a row for each image; returns the exit status.

    Raises:
        ValueError: There are several processes, the model predicts no class probabilities, or the datamodule cannot
            take these images.
        OSError: The folder has no images, or the file cannot be written.
    """
    rows = _predicted(asked, path, asked.top_k, evaluates=False)
    part = _part(asked, rows)
    print(f"predictions: {path}" + (f" ({part})" if part else ""))
    return _report_broken(rows)


def evaluate(asked: Asked, run_folder: Path, out: str | None, data: Any, step: int) -> int | None:
    """Write and print what is right and wrong about the predictions of labelled images; returns the exit status.

    Args:
        asked: The images, and what predicts them.
        run_folder: The folder of the run, in which the folder of the evaluation lies.
        out: The folder of the evaluation, in place of that.
        data: The configuration of the datamodule.
        step: The step of the checkpoint.

    Raises:
        ValueError: As `predict`; also images without a class.
        OSError: As `predict`.
    """
    from ncfinetune.evaluating import conclude

    images, split, checkpoint = asked.images, asked.split, asked.arguments["ckpt_path"]
    run = run_of(checkpoint)
    if images is not None:  # set apart from a split of the data, as a folder may be named as one
        name = f"images_{Path(images).absolute().name}"
    else:
        name = split if run is None else trained.own_or_other("evaluate", split, data, run, asked.takes_all, split)
    folder = Path(out or Path(run_folder, "evaluation", name))
    # The number is that of the accuracy: the rows have all classes.
    rows = _predicted(asked, folder / "predictions.csv", None, evaluates=True)
    facts = {
        "data": name,
        "images_of": images or settings.evaluated_images(data.as_dict(), split),
        # Said here, since a report may be made from where the paths lead elsewhere, or nowhere.
        "own_images": run is not None and name == split,
        "checkpoint": checkpoint,
        "step": step,
        "run": None if run is None else str(run),
        "part": _part(asked, rows),
        "unreadable": rows.table.errors,
        "first_error": rows.table.first_error or None,
    }
    print(conclude(rows.probabilities, rows.labels, rows.names, rows.mistakes, folder, facts, asked.top_k))
    return _report_broken(rows)


def _predicted(asked: Asked, path: Path, top_k: int | None, evaluates: bool) -> Any:
    """The predictions, which are written to a file."""
    from ncfinetune.predicting import PredictionRows, no_probabilities

    trainer, data = asked.trainer, asked.arguments["datamodule"]
    if trainer.world_size > 1:
        command = "evaluate" if evaluates else "predict"
        raise ValueError(f"{command} writes its rows in order, from one process; give --trainer.devices 1")
    if hasattr(data, "mark_broken"):
        data.mark_broken = True
    if asked.images is None:
        files = None
        _select(data, asked.split, evaluates)
    else:
        files = _files(data, asked.images, asked.split)
    rows = PredictionRows(path, asked.images, files, top_k, evaluates)
    trainer.callbacks.append(rows)
    try:
        trainer.predict(**{**asked.arguments, "return_predictions": False})
    except BaseException:
        if rows.table is not None and rows.table.keep():
            print(f"{rows.table.rows} predictions so far: {rows.table.partial}", file=sys.stderr)
        raise
    if rows.table is None:
        raise ValueError(no_probabilities(asked.arguments["model"]))
    rows.table.finish()
    return rows


def _select(data: Any, split: str, evaluates: bool) -> None:
    """Have a datamodule predict a part of its images."""
    if hasattr(data, "predict_part"):
        data.predict_part = split
    elif evaluates or split != "test":
        data.predict_dataloader = lambda: plain_loader(data, split)


def _files(data: Any, folder: str, split: str) -> list[str]:
    """The image files of a folder, which are set in the datamodule."""
    if split != "test":
        raise ValueError("split chooses among the data's images, which images replaces; give one of them")
    if not hasattr(data, "predict_files"):
        raise ValueError(f"images needs a datamodule that has predict_files; {type(data).__name__} hasn't")
    files: list[str] = data.predict_files(folder)
    return files


def plain_loader(data: LightningDataModule, split: str) -> Any:
    """The loader of a part of a datamodule that is not ours, which may set up a part only when it is asked for it.

    Training images come in the order of the data set, which numbers the rows of predictions, and without augmentation
    if the datamodule offers that.
    """
    data.setup({"train": "fit", "val": "validate"}.get(split, split))
    if split != "train":
        return getattr(data, f"{split}_dataloader")()
    return in_order(getattr(data, "train_plain_dataloader", data.train_dataloader)())


def _part(asked: Asked, rows: Any) -> str | None:
    """Which of the images were predicted, in words, where ``limit_predict_batches`` left some out."""
    if asked.takes_all:
        return None
    try:
        images = len(asked.trainer.predict_dataloaders.dataset)
    except (AttributeError, TypeError):  # a stream
        return f"the first {rows.table.rows:,} images"
    return f"the first {rows.table.rows:,} of {images:,} images" if rows.table.rows < images else None


def _report_broken(rows: Any) -> int | None:
    """Say how many images have no prediction; returns the exit status."""
    if not rows.table.errors:
        return None
    print(
        f"error: {rows.table.errors} of {rows.table.rows} images have no prediction; see the column error "
        f"of their rows, first: {rows.table.first_error}",
        file=sys.stderr,
    )
    return BROKEN_IMAGES

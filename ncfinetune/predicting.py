"""Predictions as they come: each batch to a table, and for an evaluation the mistakes that were most confident.

Legend: ``N`` images, ``K`` classes, ``C`` channels, ``H W`` height and width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import SequentialSampler

from ncfinetune.evaluation_figures import Mistake
from ncfinetune.predictions import Table, as_utf_8
from ncfinetune.samples import known_files
from ncfinetune.texts import some

# Images of a sheet: four rows of six.
_MOST_MISTAKES = 24
# Names of the folders of splits, in any case.
_SPLITS = ("train", "val", "valid", "validation", "test")


class PredictionRows(Callback):
    """Writes the class probabilities of each predicted batch to a table.

    Args:
        path: The ``.csv`` or ``.parquet`` file.
        folder: The folder that was searched for images; None if the datamodule's images are predicted.
        files: The images below the folder.
        top_k: Number of most probable classes in a row; None is all of them, in columns of their own.
        evaluates: Keep probabilities, labels and the most confident mistakes; every image needs a label.

    Attributes:
        table: The table; None before the first batch.
        names: Names of the classes.
        probabilities: Class probabilities of the readable images, ``(N, K)``, batch by batch, for an evaluation.
        labels: Their classes, ``(N,)``, likewise.
        mistakes: The most confident mistakes, the most confident first.
    """

    def __init__(
        self, path: Path, folder: str | None, files: Sequence[str] | None, top_k: int | None, evaluates: bool
    ) -> None:
        self._path, self._folder, self._files = path, folder, files
        self._top_k, self._evaluates = top_k, evaluates
        self._labels: Sequence[int] | None = None
        self.table: Table | None = None
        self.names: list[str] = []
        self.probabilities: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.mistakes: list[Mistake] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the predictions of a batch.

        Raises:
            ValueError: They are no class probabilities; an evaluation lacks labels, or has labels of other classes.
            OSError: The file cannot be written.
        """
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            raise ValueError(no_probabilities(pl_module))
        data: Any = getattr(trainer, "datamodule", None)
        loader: Any = trainer.predict_dataloaders
        dataset = getattr(loader, "dataset", None)
        if self.table is None:
            self._begin(data, loader, outputs.shape[1])
        assert self.table is not None
        rows = range(self.table.rows, self.table.rows + len(outputs))
        errors = _errors(dataset, batch, rows) if getattr(data, "mark_broken", False) else [""] * len(rows)
        samples = list(rows) if self._files is None else [self._files[row] for row in rows]
        labels = self._true(batch, rows)
        self.table.add(samples, outputs.cpu(), errors, labels)
        if self._evaluates:
            self._keep(outputs, torch.tensor(labels), errors, samples, batch[0], data)

    def _begin(self, data: Any, loader: Any, classes: int) -> None:
        """Open the table; the names of classes and files are known when the data are."""
        self.names = [str(name) for name in getattr(data, "class_names", None) or range(classes)]
        if self._folder is not None and self._files is not None:
            self._labels = folder_labels(self._files, self._folder, self.names, self._evaluates)
            labelled = max(self._labels) >= 0
        else:
            # What a stranger's datamodule predicts may have anything beside the images.
            ours, dataset = hasattr(data, "predict_part"), getattr(loader, "dataset", None)
            self._labels = getattr(dataset, "targets", None) if ours else None
            labelled = self._evaluates or ours
            if isinstance(getattr(loader, "sampler", None), SequentialSampler):
                self._files = known_files(dataset)
        key = "index" if self._files is None else "file"
        self.table = Table(self._path, key, self.names, labelled, self._top_k)

    def _true(self, batch: Any, rows: range) -> list[int]:
        """The classes of a batch's images; -1 where they are unknown."""
        if self._labels is not None:
            return [int(self._labels[row]) for row in rows]
        labels = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
        classes = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
        if self._evaluates and not classes:
            raise ValueError(
                "evaluate needs the class of each image: expected batches (images, labels) with integer labels (N,)"
            )
        return labels.tolist() if isinstance(labels, Tensor) and classes else [-1] * len(rows)

    def _keep(
        self, outputs: Tensor, labels: Tensor, errors: Sequence[str], samples: Sequence[Any], images: Any, data: Any
    ) -> None:
        """Keep what an evaluation needs of a batch."""
        if len(labels) and int(labels.max()) >= outputs.shape[1]:
            raise ValueError(f"expected labels in 0..{outputs.shape[1] - 1}, got {int(labels.max())}")
        shares, readable = outputs.float().cpu(), torch.tensor([not error for error in errors])
        self.probabilities.append(shares[readable])
        self.labels.append(labels[readable])
        confidence, predicted = shares.max(1)
        wrong = (readable & (predicted != labels)).nonzero().flatten().tolist()
        least = self.mistakes[-1].probability if len(self.mistakes) == _MOST_MISTAKES else -1.0
        new = [
            Mistake(
                as_utf_8(str(samples[row])),
                picture(images[row], getattr(data, "preprocessing", None)),
                self.names[labels[row]],
                self.names[predicted[row]],
                float(confidence[row]),
            )
            for row in sorted(wrong, key=lambda row: -float(confidence[row]))[:_MOST_MISTAKES]
            if float(confidence[row]) > least
        ]
        self.mistakes = sorted([*self.mistakes, *new], key=lambda one: -one.probability)[:_MOST_MISTAKES]


def no_probabilities(module: Any) -> str:
    """The message where a module's predictions are not class probabilities."""
    name = type(module).__name__
    return f"predict writes the class probabilities (N, K) that predict_step returns; {name}'s doesn't"


def _errors(dataset: Any, batch: Any, rows: range) -> list[str]:
    """Why each image of a batch cannot be read; empty if it can."""
    fault = getattr(dataset, "fault", None)
    errors = [""] * len(rows)
    for place in (batch[1] < 0).nonzero().flatten().tolist():
        errors[place] = (fault and fault(rows[place])) or "cannot be read as an image"
    return errors


def folder_labels(files: Sequence[str], folder: str, names: Sequence[str], needed: bool = False) -> list[int]:
    """The classes of images below a folder: of the folders on the way to an image the innermost that is named as one.

    Images in no such folder have -1.

    Args:
        files: Paths of the images.
        folder: The folder, or the only image.
        names: Names of the classes.
        needed: Refuse images in no folder of a class, and warn of several splits.

    Raises:
        ValueError: There are such images.
    """
    folder = os.path.dirname(folder) if os.path.isfile(folder) else folder
    numbers = {name: label for label, name in enumerate(names)}
    paths = [Path(os.path.relpath(file, folder or ".")).parts for file in files]
    homes = [[name for name in path[:-1] if name in numbers] for path in paths]
    labels = [numbers[home[-1]] if home else -1 for home in homes]
    if needed and min(labels) < 0:
        others = sorted({path[0] for path, label in zip(paths, labels, strict=True) if label < 0})
        found = f"{labels.count(-1)} of {len(labels)} images are elsewhere: {some(others)}"
        raise ValueError(
            f"evaluate needs the class of each image: expected {os.path.join(folder, 'CLASS', '')} for the model's "
            f"classes {some(names)}; {found}"
        )
    splits = sorted({path[0] for path in paths if path[0].lower() in _SPLITS} - numbers.keys())
    if needed and len(splits) > 1:
        where = [os.path.join(folder, split) for split in splits]
        rank_zero_warn(f"{' and '.join(where)} are evaluated together; for one of them alone give --images {where[0]}")
    return labels


def picture(image: Tensor, preprocessing: dict[str, Any] | None) -> np.ndarray:
    """A network's input ``(C, H, W)`` as it looked before it was normalised, uint8 ``(H, W, 3)``.

    Without known mean and standard deviation its range is stretched to that of the picture; of other than one or three
    channels the first is shown.
    """
    pixels = image.detach().float().cpu()
    if preprocessing is not None:
        mean, std = (torch.tensor(preprocessing[name]).view(-1, 1, 1) for name in ("mean", "std"))
        pixels = pixels * std + mean
    else:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low).clamp(min=1e-12)
    shown = pixels if len(pixels) == 3 else pixels[:1].expand(3, -1, -1)
    return (shown.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()

"""Predictions of image files in Python, with the preprocessing that a trained model remembers.

Legend: ``N`` files, ``K`` classes.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ncfinetune.passes import eval_mode
from ncfinetune.predictions import all_errors, check_top_k, most_probable


@dataclass(frozen=True)
class ImagePredictions:
    """The predicted classes of image files, in the order of the files.

    Attributes:
        files: Paths of the ``N`` files.
        class_names: Names of the ``K`` classes.
        probabilities: Class probabilities ``(N, K)``, float32 on the CPU; rows of files that cannot be read are nan.
        errors: Why a file has no prediction, ``N`` texts: it cannot be read, or its probabilities are nan; empty for
            files that have one.
    """

    files: list[str]
    class_names: list[str]
    probabilities: Tensor
    errors: list[str]

    @property
    def names(self) -> list[str | None]:
        """The most probable class of each file; None for a file with an error."""
        best = self.probabilities.argmax(1).tolist()
        return [None if error else self.class_names[k] for k, error in zip(best, self.errors, strict=True)]

    def top(self, k: int) -> list[list[tuple[str, float]]]:
        """The ``k`` most probable classes of each file with their probabilities; empty for a file with an error.

        Raises:
            ValueError: ``k`` is outside 1..K.
        """
        check_top_k(k, len(self.class_names))
        shares, classes = most_probable(self.probabilities, k)
        pairs = zip(classes.tolist(), shares.tolist(), self.errors, strict=True)
        return [[] if e else [(self.class_names[c], p) for c, p in zip(cs, ps, strict=True)] for cs, ps, e in pairs]

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[tuple[str, str | None, float]]:
        """File, most probable class and its probability."""
        return iter(zip(self.files, self.names, self.probabilities.amax(1).tolist(), strict=True))


def predict_images(
    model: Any, images: str | Path | Sequence[str | Path], batch_size: int = 32, num_workers: int = 0
) -> ImagePredictions:
    """Predict image files with a trained `Classifier`; see its `predict_images`.

    Raises:
        ValueError: The model does not know its preprocessing, or there are no images.
        FileNotFoundError: No such folder or file, or no images in the folder.
    """
    if model.preprocessing is None:
        raise ValueError(
            "the model does not know how its images are preprocessed; expected one that was trained on a datamodule of "
            "ncfinetune, and loaded by load_from_checkpoint or from_delta"
        )
    # At run time, since the learners do not depend on our data sets.
    datamodules: Any = importlib.import_module("ncfinetune.datamodules")
    names = model.class_names or [str(label) for label in range(model.num_classes)]
    data = datamodules.Unlabelled(names, model.preprocessing, batch_size=batch_size, num_workers=num_workers)
    data.mark_broken = True
    files = data.predict_files(images)
    if not files:
        raise ValueError("expected image files to predict, got none")
    loader = data.predict_dataloader()
    kind = next(model.parameters()).dtype
    shares, unread = [], []
    with eval_mode(model), torch.no_grad():
        for stored, marks in loader:
            pixels, _ = data.on_after_batch_transfer((stored.to(model.device), marks), 0)
            shares.append(model.probabilities(model(pixels.to(kind))).float().cpu())
            unread.append(marks < 0)
    probabilities, broken = torch.cat(shares), torch.cat(unread)
    probabilities[broken] = torch.nan
    errors = [""] * len(files)
    for index in broken.nonzero().flatten().tolist():
        errors[index] = loader.dataset.fault(index) or f"cannot read {files[index]} as an image"
    errors = all_errors(errors, probabilities)
    if found := [error for error in errors if error]:
        rank_zero_warn(f"{len(found)} of {len(files)} images have no prediction, first: {found[0]}")
    return ImagePredictions(files, names, probabilities, errors)

"""What is right and wrong about predictions of labelled images: numbers as pure functions, their table and their files.

Legend: ``N`` images, ``K`` classes.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ncfinetune.atomic import replacing
from ncfinetune.calibration import calibration_error, reliability
from ncfinetune.predictions import check_top_k, distinct, most_probable
from ncfinetune.sample_statistics import wilson

# Rows of a printed table: a screen has room for them.
_MOST_CLASSES, _MOST_PAIRS = 20, 5
# Bins of the reliability diagram, as in Guo et al. 2017.
_BINS = 15
# The column of confusion.csv that is no predicted class.
_TRUE = "true class"


@dataclass(frozen=True)
class Evaluation:
    """How well classes were predicted.

    Attributes:
        class_names: Names of the classes, in the order of their labels.
        confusion: Number of images by true (row) and predicted class (column), ``(K, K)``.
        top_k: The accuracy that counts an image as right if its class is among so many most probable ones, by number.
        calibration_error: Expected calibration error; see `calibration.calibration_error`.
        reliability: Number of images, mean confidence and accuracy in each bin of confidence, ``(3, bins)``.
    """

    class_names: list[str]
    confusion: Tensor
    top_k: dict[int, float]
    calibration_error: float
    reliability: Tensor

    @property
    def images(self) -> int:
        """Number of images."""
        return int(self.confusion.sum())

    @property
    def support(self) -> Tensor:
        """Images of each class, ``(K,)``."""
        return self.confusion.sum(1)

    @property
    def precision(self) -> Tensor:
        """Share of the images predicted as a class that are of it, ``(K,)``; nan where none was."""
        return self.confusion.diagonal().double() / self.confusion.sum(0)

    @property
    def recall(self) -> Tensor:
        """Share of a class's images that were predicted as it, ``(K,)``; nan where it has no images."""
        return self.confusion.diagonal().double() / self.support

    @property
    def f1(self) -> Tensor:
        """Harmonic mean of precision and recall, ``(K,)``; nan where the class has no images and was not predicted."""
        return 2 * self.confusion.diagonal().double() / (self.confusion.sum(0) + self.support)

    @property
    def accuracy(self) -> float:
        """Share of the images whose class was predicted."""
        return float(self.confusion.diagonal().sum()) / self.images

    @property
    def absent(self) -> list[str]:
        """Classes without images."""
        return [name for name, images in zip(self.class_names, self.support.tolist(), strict=True) if not images]

    def confused(self) -> list[tuple[int, int, int]]:
        """Images, true and predicted class of each confusion that occurred, the most frequent first."""
        wrong = self.confusion - self.confusion.diagonal().diag()
        pairs = [(int(wrong[a, b]), a, b) for a, b in wrong.nonzero().tolist()]
        return sorted(pairs, key=lambda pair: (-pair[0], *pair[1:]))


def evaluate(probabilities: Tensor, labels: Tensor, class_names: Sequence[str], top_k: int | None = None) -> Evaluation:
    """Evaluate class probabilities of labelled images.

        >>> seen = evaluate(torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.8, 0.2]]), torch.tensor([0, 1, 1]), ["cat", "dog"])
        >>> round(seen.accuracy, 3), seen.confusion.tolist(), seen.recall.tolist()
        (0.667, [[1, 0], [1, 1]], [1.0, 0.5])

    Args:
        probabilities: ``(N, K)``.
        labels: Classes, ``(N,)``.
        class_names: Names of the ``K`` classes.
        top_k: Measure the top-k accuracy for this number too.

    Raises:
        ValueError: No images, labels out of range, more or fewer names than classes, or ``top_k`` outside 1..K.
    """
    classes = len(class_names)
    if probabilities.ndim != 2 or probabilities.shape[1] != classes:
        raise ValueError(f"expected probabilities of {classes} classes, got shape {tuple(probabilities.shape)}")
    check_top_k(top_k, classes)
    error = float(calibration_error(probabilities, labels, _BINS))  # checks the rest
    shares: dict[int, float] = {}
    if top_k is not None:
        hits = (most_probable(probabilities, top_k)[1] == labels[:, None]).any(1)
        shares[top_k] = float(hits.double().mean())
    return Evaluation(
        list(class_names),
        multiclass_confusion_matrix(probabilities.argmax(1), labels, classes),
        shares,
        error,
        torch.stack(reliability(probabilities, labels, _BINS)),
    )


def table(found: Evaluation, title: str) -> str:
    """A short table: accuracy, each class (the worst, where there are many), and what is confused most often."""
    low, high = wilson(found.accuracy, found.images)
    parts = [f"{title}: {found.images:,} images", f"accuracy {_percent(found.accuracy)} %"]
    parts[1] += f" (95 % interval {_percent(low)} to {_percent(high)})"
    parts += [f"top-{k} {_percent(share)} %" for k, share in found.top_k.items()]
    parts.append(f"calibration error {found.calibration_error:.3f}")
    # nan, of a class without images, is the last.
    worst = sorted(range(len(found.class_names)), key=lambda c: (found.f1[c].isnan().item(), found.f1[c].item()))
    shown = worst[:_MOST_CLASSES] if len(worst) > _MOST_CLASSES else range(len(worst))
    names = [found.class_names[c] for c in shown]
    width = max(map(len, ["class", *names]))
    lines = [", ".join(parts), f"{'class':<{width}}  images  precision  recall    F1"]
    for name, c in zip(names, shown, strict=True):
        numbers = (f"{_two(column[c]):>{wide}}" for column, wide in _columns(found))
        lines.append(f"{name:<{width}}  {int(found.support[c]):>6}" + "".join(numbers))
    if rest := len(worst) - len(names):
        lines.append(f"(the classes with the lowest F1; {rest} more in classes.csv)")
    confused = [
        f"{found.class_names[a]} as {found.class_names[b]} {images}x" for images, a, b in found.confused()[:_MOST_PAIRS]
    ]
    if confused:
        lines.append(f"most often confused: {', '.join(confused)}")
    return "\n".join(lines)


def write(found: Evaluation, folder: Path, facts: dict[str, Any]) -> list[str]:
    """Write ``summary.json``, ``classes.csv`` and ``confusion.csv`` to a folder; returns their names.

    The first column of ``confusion.csv`` is ``true class``; the column of a class of that name is called ``predicted
    true class``.

    Args:
        found: The evaluation.
        folder: The folder, which is made.
        facts: What was evaluated, in built-in types; the first entries of ``summary.json``.

    Raises:
        OSError: A file cannot be written.
    """
    with replacing(folder / "summary.json") as part:
        part.write_text(json.dumps({**facts, **_summary(found)}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = [
        [name, int(images), *(_exact(column[c]) for column in (found.precision, found.recall, found.f1))]
        for c, (name, images) in enumerate(zip(found.class_names, found.support.tolist(), strict=True))
    ]
    _write_csv(folder / "classes.csv", [["class", "images", "precision", "recall", "f1"], *rows])
    counts = [[name, *row] for name, row in zip(found.class_names, found.confusion.tolist(), strict=True)]
    _write_csv(folder / "confusion.csv", [[_TRUE, *distinct(found.class_names, [_TRUE], "predicted")], *counts])
    return ["summary.json", "classes.csv", "confusion.csv"]


def _summary(found: Evaluation) -> dict[str, Any]:
    low, high = wilson(found.accuracy, found.images)
    bins = found.reliability.shape[1]
    diagram = [
        {
            "from": round(index / bins, 4),
            "to": round((index + 1) / bins, 4),
            "images": int(images),
            "confidence": _or_none(confidence),
            "accuracy": _or_none(accuracy),
        }
        for index, (images, confidence, accuracy) in enumerate(found.reliability.T.tolist())
    ]
    return {
        "images": found.images,
        "accuracy": found.accuracy,
        "accuracy_interval_95": [low, high],
        **{f"top_{k}_accuracy": share for k, share in found.top_k.items()},
        "mean_recall": _or_none(float(found.recall.nanmean())),
        "mean_f1": _or_none(float(found.f1.nanmean())),
        "calibration_error": found.calibration_error,
        "classes_without_images": found.absent,
        "reliability": diagram,
    }


def _columns(found: Evaluation) -> list[tuple[Tensor, int]]:
    """The columns of a printed table and their widths."""
    return [(found.precision, 11), (found.recall, 8), (found.f1, 6)]


def _write_csv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _two(value: Tensor) -> str:
    return "-" if value.isnan() else f"{value:.2f}"


def _exact(value: Tensor) -> str:
    return "" if value.isnan() else f"{value:.6f}"


def _or_none(value: float) -> float | None:
    """The value; None for nan, which JSON does not have."""
    return None if math.isnan(value) else value

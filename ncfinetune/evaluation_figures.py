"""Pictures of an evaluation: the confusion matrix, and a sheet of the most confident mistakes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ncfinetune.evaluation import Evaluation

# Up to this many classes fit with their names and counts.
_MOST_NAMED = 40
# Images in a row of the sheet: TensorBoard and a browser show such a row whole.
_IN_A_ROW = 6
# Longest text above an image, in characters.
_LONGEST = 28


@dataclass(frozen=True)
class Mistake:
    """An image whose class was predicted wrongly.

    Attributes:
        name: Its file, of which the folder's name and its own are shown, or its index in the data set.
        image: What the network saw, uint8 ``(H, W, 3)``.
        true: Name of its class.
        predicted: Name of the predicted class.
        probability: Probability of the predicted class.
    """

    name: str
    image: np.ndarray
    true: str
    predicted: str
    probability: float


def confusion(found: Evaluation, title: str) -> Figure:
    """The confusion matrix: shades are shares of each true class's images, numbers are images."""
    classes = len(found.class_names)
    named = classes <= _MOST_NAMED
    side = min(12.0, max(4.0, 2.2 + 0.42 * classes)) if named else 9.0
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    counts = found.confusion.cpu().numpy()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(drawn, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(f"{title}, {found.images:,} images\naccuracy {100 * found.accuracy:.1f} %", parse_math=False)
    if not named:
        return figure
    labels = [_short(name) for name in found.class_names]
    axes.set_xticks(range(classes), labels, rotation=45 if classes > 4 else 0, ha="right" if classes > 4 else "center")
    axes.set_yticks(range(classes), labels)
    for tick in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        tick.set_parse_math(False)
    for row, column in zip(*counts.nonzero(), strict=True):
        colour = "white" if shares[row, column] > 0.5 else "black"
        size = "medium" if classes <= 15 else "x-small"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=size)
    return figure


def sheet(mistakes: Sequence[Mistake], title: str, in_a_row: int = _IN_A_ROW) -> Figure:
    """Images with their file, true class, predicted class and its probability, in the given order."""
    columns = min(in_a_row, max(3, len(mistakes)))
    rows = max(1, math.ceil(len(mistakes) / columns))
    figure = Figure(figsize=(2.1 * columns, 2.6 * rows + 0.5), layout="constrained")
    figure.suptitle(title, parse_math=False)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, mistake in zip(grid, mistakes, strict=False):
        axes.imshow(mistake.image, interpolation="nearest")
        text = [
            _short("/".join(Path(mistake.name).parts[-2:]), end=True),
            f"true: {_short(mistake.true, _LONGEST - 6)}",
        ]
        text.append(f"predicted: {_short(mistake.predicted, _LONGEST - 10)} {mistake.probability:.2f}")
        axes.set_title("\n".join(text), fontsize="small", parse_math=False)
    return figure


def _short(text: str, longest: int = _LONGEST, end: bool = False) -> str:
    """A text that fits above an image; of a file's name the end counts."""
    if len(text) <= longest:
        return text
    return f"...{text[3 - longest :]}" if end else f"{text[: longest - 3]}..."

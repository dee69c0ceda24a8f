"""What ``ncfinetune evaluate`` leaves: tables, pictures, and the same pictures in the run's TensorBoard."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from ncfinetune import evaluation
from ncfinetune.atomic import replacing
from ncfinetune.evaluation_figures import Mistake, confusion, sheet
from ncfinetune.events import event_files
from ncfinetune.texts import some

# Dots per inch: a name above an image of the sheet is read without zooming.
_DPI = 100
# TensorBoard shows a picture in a tile 350 pixels wide: two columns of mistakes are read there, and 18 points.
_IN_A_TILE, _LETTERS = 6, 18


def conclude(
    probabilities: Sequence[Tensor],
    labels: Sequence[Tensor],
    names: Sequence[str],
    mistakes: Sequence[Mistake],
    folder: Path,
    facts: Mapping[str, Any],
    top_k: int | None = None,
) -> str:
    """Evaluate predictions, and write all files but the predictions; returns the text to print.

    Args:
        probabilities: ``(N, K)``, batch by batch.
        labels: Classes ``(N,)``, likewise.
        names: Names of the ``K`` classes.
        mistakes: The images for the sheet.
        folder: The folder to write to.
        facts: What was evaluated, in built-in types: ``data`` is its name, ``part`` which of its images if not all,
            ``unreadable`` a number of images and ``first_error`` why the first cannot be read, ``run`` a folder or
            None, ``step`` the checkpoint's.
        top_k: Measure the top-k accuracy for this number too.

    Raises:
        ValueError: No image could be read.
        OSError: A file cannot be written.
    """
    if not sum(map(len, labels)):
        raise ValueError(f"none of the {facts['unreadable']} images can be read, first: {facts['first_error']}")
    found = evaluation.evaluate(torch.cat(list(probabilities)), torch.cat(list(labels)), names, top_k)
    name = str(facts["data"])
    title = f"{name} ({facts['part']})" if facts["part"] else name
    wrong = found.images - int(found.confusion.diagonal().sum())
    pictures = {
        "confusion": confusion(found, title),
        "mistakes": sheet(
            mistakes, f"{title}: {wrong} mistakes in {found.images:,} images, {_shown(len(mistakes), wrong)}"
        ),
    }
    files = [*evaluation.write(found, folder, dict(facts)), "predictions.csv"]
    for kind, figure in pictures.items():
        with replacing(folder / f"{kind}.png") as part:
            figure.savefig(part, dpi=_DPI, format="png")
        files.append(f"{kind}.png")
    if facts["run"] is not None:
        few = min(len(mistakes), _IN_A_TILE)
        wrong_of = f"{title}: {wrong} of {found.images:,} are wrong" + (f", the {few} most confident" if few else "")
        with rc_context({"font.size": _LETTERS}):
            tiles = {"confusion": confusion(found, title)}
        tiles["mistakes"] = sheet(mistakes[:few], textwrap.fill(wrong_of, 40), in_a_row=2)
        show(Path(facts["run"]), {f"evaluate_{name}/{kind}": tile for kind, tile in tiles.items()}, facts["step"])
    lines = [evaluation.table(found, title)]
    if found.absent:
        lines.append(f"no images of {some(found.absent, total=True)}: their recall was not measured")
    return "\n".join([*lines, f"{folder}: {', '.join(files)}"])


def _shown(shown: int, wrong: int) -> str:
    """Which of the mistakes a sheet has."""
    return "the most confident first" if shown == wrong else f"the {shown} most confident"


def show(run: Path, pictures: Mapping[str, Figure], step: int) -> None:
    """Add pictures to a run's event files, if it has any: otherwise TensorBoard would list a further run."""
    if not event_files(run):
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run)) as writer:
        for name, figure in pictures.items():
            writer.add_figure(name, figure, step, close=False)

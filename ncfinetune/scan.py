"""``ncfinetune scan``: all layers of one or several models on a training set, by closed forms, from one pass."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from ncfinetune.atomic import replacing
from ncfinetune.bank import Bank, Source, difference, fill, merge
from ncfinetune.cli_errors import PlainParser
from ncfinetune.lab import aligned, datamodule, lab_parser, pass_trainer, percent, said, sources
from ncfinetune.scores import LayerScore, ModelScore, layer_scores, model_scores

# Images that tell layers apart: the standard error of an accuracy is then 0.7 points at most.
_MOST = 5000
_SUFFIXES = (".csv", ".json", ".png")
_DESCRIPTION = """\
Score every block of one or several networks on training images, by closed forms from one pass: no training, no
learning rate, no validation image. acc % is the accuracy of ridge heads, each on images that it was not fitted to (a
fold holds one image of every class): about the accuracy on new images, and lower with two or three images per class.
error^2 is the squared error of the same scores; networks are ranked by it.

  ncfinetune scan --backbone resnet18 --pretrained true --data ImageFolder --data.root photos --out scan.csv scan.png
  ncfinetune scan --backbone '{name: resnet18, stem: cifar}' --checkpoint backbone.safetensors --data Digits

The work can be shared by any scheduler, since a part that is there is not computed again:
  seq 1 8 | xargs -P 2 -I % ncfinetune scan --part %/8 --out parts/%.safetensors --backbone ... --data ...
  ncfinetune scan --merge parts/*.safetensors --out scan.csv
"""


def main(words: Sequence[str]) -> int:
    """Run the command with the words after its name; returns the exit status.

    Raises:
        ValueError: What the options, the data or a network refuse.
        OSError: A file is not there, or cannot be written.
    """
    parser = lab_parser("scan", _DESCRIPTION, _MOST)
    add: Any = parser.add_argument
    add("--rank", type=bool, default=False, help="numerical ranks too (slow)")
    add("--part", type=str, help="i/n: compute one of n parts, and write it to the .safetensors file that --out names")
    add("--merge", type=str, nargs="+", help="parts to read, in place of a pass")
    add(
        "--out",
        type=str,
        nargs="+",
        help="files for the table (.csv, .json) and the figure (.png); a folder gets event files for TensorBoard",
    )
    options = parser.parse_args(list(words))
    outs = [Path(name) for name in options.out or []]
    if options.part is not None:
        _write_part(options, parser, _part(options.part), outs)
        return 0
    _check(outs)
    if options.merge:
        bank = merge({name: Bank.load(name) for name in options.merge})
    else:
        bank = _fill(options, parser, sources(options), (1, 1))
    _publish(bank, options.rank, outs)
    return 0


def _part(text: str) -> tuple[int, int]:
    """Which part of how many, from ``i/n``."""
    index, _, number = text.partition("/")
    if not (index.isdigit() and number.isdigit() and 1 <= int(index) <= int(number)):
        raise ValueError(f"expected --part i/n with i from 1 to n, got {text!r}")
    return int(index), int(number)


def _write_part(options: Any, parser: PlainParser, part: tuple[int, int], outs: Sequence[Path]) -> None:
    """Compute a part and write it, unless it is there, of the same images."""
    if len(outs) != 1 or outs[0].suffix != ".safetensors":
        raise ValueError(f"--part writes one file; expected --out FILE.safetensors, got {options.out}")
    path, networks = outs[0], sources(options)
    if path.exists():
        there = Bank.load(path).facts
        facts = _fill(options, parser, networks, part, limit_predict_batches=0).facts
        same = there["part"] == facts["part"]
        if other := difference(facts, there) if same else f"part {'/'.join(map(str, there['part']))}":
            raise ValueError(f"{path} is there, and of another scan: {other}; name another file, or delete it")
        print(f"{path} is there")
        return
    bank = _fill(options, parser, networks, part)
    bank.save(path)
    print(f"{path}: {len(bank.labels)} images")


def _fill(
    options: Any, parser: PlainParser, networks: Sequence[Source], part: tuple[int, int], **arguments: Any
) -> Bank:
    data = datamodule(options, parser)
    return fill(pass_trainer(options, **arguments), networks, data, said(options), options.max_images, part)


def _check(outs: Sequence[Path]) -> None:
    if wrong := [str(out) for out in outs if out.suffix and out.suffix not in _SUFFIXES]:
        raise ValueError(
            f"expected --out of {', '.join(_SUFFIXES)} files, or a folder for TensorBoard, got {', '.join(wrong)}"
        )


def _publish(bank: Bank, rank: bool, outs: Sequence[Path]) -> None:
    """Print both tables, and write them."""
    layers = layer_scores(bank, rank)
    models = model_scores(bank, layers)
    print(f"{len(bank.labels)} images of {int(bank.labels.bincount().count_nonzero())} classes\n")
    print(aligned([_layer_row(score) for score in layers]))
    print()
    print(aligned([_model_row(score) for score in models]))
    for out in outs:
        _WRITERS.get(out.suffix, _write_events)(out, bank, layers, models)


def _layer_row(score: LayerScore) -> dict[str, str]:
    row = {
        "model": score.model,
        "layer": score.layer,
        "width": str(score.width),
        "parameters": f"{score.parameters:,}",
        "acc %": percent(score.accuracy, score.accuracy_error),
        "error^2": f"{score.squared_error:.3f}",
        "nc1": f"{score.nc1:.3g}",
        "cv nc1": f"{score.cv_nc1:.3g}",
        "cdnv": f"{score.cdnv:.3g}",
    }
    return row if score.rank is None else {**row, "rank": f"{score.rank:.2f}"}


def _model_row(score: ModelScore) -> dict[str, str]:
    return {
        "model": score.model,
        "parameters": f"{score.parameters:,}",
        "acc %": percent(score.accuracy, score.accuracy_error),
        "error^2": f"{score.squared_error:.3f}",
        "behind the first": f"{score.behind:.3f} ± {score.behind_error:.3f}",
        "least error^2 at": score.best_layer,
        "its acc %": f"{100 * score.best_layer_accuracy:.1f}",
        "k-nn %": f"{100 * score.knn:.1f}",
        "h-score": f"{score.h_score:.2f}",
        "logme": f"{score.logme:.3f}",
    }


def _numbers(score: LayerScore | ModelScore) -> dict[str, Any]:
    """All of a score that is a number or a name, and was asked for; nan is None."""
    values = {f.name: getattr(score, f.name) for f in fields(score) if f.name != "errors"}
    kept = {name: value for name, value in values.items() if value is not None}
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in kept.items()}


def _write_csv(path: Path, bank: Bank, layers: Sequence[LayerScore], models: Sequence[ModelScore]) -> None:
    rows = [_numbers(score) for score in layers]
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def _write_json(path: Path, bank: Bank, layers: Sequence[LayerScore], models: Sequence[ModelScore]) -> None:
    scores = {"layers": [*map(_numbers, layers)], "models": [*map(_numbers, models)]}
    content = {"images": len(bank.labels), **scores, "facts": bank.facts}
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def _write_picture(path: Path, bank: Bank, layers: Sequence[LayerScore], models: Sequence[ModelScore]) -> None:
    with replacing(path) as part:
        picture(layers).savefig(part, format="png", dpi=120)


def _write_events(path: Path, bank: Bank, layers: Sequence[LayerScore], models: Sequence[ModelScore]) -> None:
    """A run for each model, whose steps are depths, and the figure."""
    for model in models:
        with SummaryWriter(str(path / model.model.replace("/", "_"))) as writer:
            for score in (s for s in layers if s.model == model.model):
                for name in ("accuracy", "squared_error", "nc1", "cv_nc1", "cdnv"):
                    writer.add_scalar(f"scan/{name}", getattr(score, name), score.depth)
    with SummaryWriter(str(path)) as writer:
        writer.add_figure("scan", picture(layers))


_WRITERS = {".csv": _write_csv, ".json": _write_json, ".png": _write_picture}


def picture(scores: Sequence[LayerScore]) -> Figure:
    """Accuracy on images left out, and NC1 with its cross-validated form, over depth: a line for each model."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    models = list(dict.fromkeys(score.model for score in scores))
    for number, model in enumerate(models):
        own, colour = [s for s in scores if s.model == model], f"C{number}"
        # Depth is the share of the network's layers, so that networks of different depths can be compared.
        depth = [s.depth for s in own] if len(models) == 1 else [s.depth / len(own) for s in own]
        accuracy, error = ([100 * getattr(s, name) for s in own] for name in ("accuracy", "accuracy_error"))
        left.errorbar(depth, accuracy, error, fmt="o-", color=colour, markersize=4, capsize=2, label=model)
        right.plot(depth, [s.nc1 for s in own], "o-", color=colour, markersize=4, label=f"{model}, NC1")
        right.plot(depth, [s.cv_nc1 for s in own], "s--", color=colour, markersize=3, label=f"{model}, cross-validated")
        if len(models) == 1:
            for axes in (left, right):
                axes.set_xticks(depth, [s.layer for s in own], rotation=90, fontsize="small")
    left.set(ylabel="accuracy of a ridge head on images left out, %", title="what each layer knows")
    right.set(yscale="log", ylabel="NC1 (lower: more collapsed)", title="how far its classes have collapsed")
    for axes in (left, right):
        axes.set_xlabel("layer" if len(models) == 1 else "depth, as a share of the layers")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    return figure

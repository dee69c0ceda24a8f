"""``ncfinetune suggest``: whether tuning pays on a training set, which block, and what accuracy to expect."""

from __future__ import annotations

import json
import logging
import math
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer
from torch import Tensor

from ncfinetune.atomic import check_writable, replacing
from ncfinetune.bank import Bank, Source, classes_of, fill, read_images
from ncfinetune.closed_trials import Closed, closed_forms, closed_trial
from ncfinetune.folds import balanced_folds, folds_of
from ncfinetune.lab import aligned, datamodule, lab_parser, pass_trainer, percent, quiet_trainer, said, sources
from ncfinetune.layers import PENULTIMATE
from ncfinetune.linearised import WORTH, gradient_features, linearised
from ncfinetune.sample_statistics import standard_error
from ncfinetune.trials import Bench, Method, Trial, chosen_elsewhere

# Images that a choice is made by; a fit's time grows with them.
_MOST = 2000
# Images a step where the datamodule does not say.
_BATCH = 32
_FULL = "full FT"
_DESCRIPTION = """\
Say whether tuning pays on some training images, without a validation image, and what accuracy to expect.

Closed-form heads are judged on images left out. So is the first-order expansion of the network in each block's
parameters, which says what layer FT of the block could gain over the last of them without a fit. The blocks of which
it expects most are then tried by layer FT, from the closed form as a start, on folds of the images: all of them on the
first fold, the better half on each fold after it. SCL FT at the block that is best in the end, and with --full full
fine-tuning, are tried on every fold. Tuning is suggested if it lowers the squared error on images left out by 0.01; the
table has the standard errors. With --blocks 0 no block is tried, and the expansion decides, whose gain has to be a
standard error more, since it is the best of all blocks.

  ncfinetune suggest --backbone resnet18 --pretrained true --data ImageFolder --data.root photos
"""

_LEGEND = """\
Each method is judged on images that it was not fitted to ({images} training images, {classes} classes). predicted %:
accuracy on new images; for the suggested method each fold is scored by the method that the other folds choose, since
the best of several methods looks too good on the images that chose it. gain in error^2: by how much the squared error
of the class probabilities is lower than that of the last closed form, both at the temperature that suits the images
left out best; the suggestion goes by it, since the accuracy of few images says less. Both with one standard error.
expansion: judged without a fit, by scores as they are; a block that was fitted on some folds and fell behind keeps its
row."""


@dataclass(frozen=True)
class Row:
    """A method in the table.

    Args:
        method: Its name.
        accuracy: Predicted share of new images decided rightly: of a closed form that of images left out, one of each
            class together; of a tuned method that of the last closed form, and its gain over it on images left out, or
            for the suggested one the gain of what would have been suggested without each fold.
        error: Standard error of a share of so many images.
        gain: How much lower its squared error on images left out was than the closed form's; None for closed forms.
        gain_error: Standard error of the paired differences.
        trained: Number of trained parameters.
        seconds: Mean duration of a fit; None if it was not fitted.
        knobs: Its arguments of a `FineTuner`.
    """

    method: str
    accuracy: float
    error: float
    gain: float | None
    gain_error: float | None
    trained: int
    seconds: float | None
    knobs: Mapping[str, Any]


def main(words: Sequence[str]) -> int:
    """Run the command with the words after its name; returns the exit status.

    Raises:
        ValueError: What the options, the data or the network refuse.
        OSError: A file is not there, or cannot be written.
    """
    parser = lab_parser("suggest", _DESCRIPTION, _MOST)
    add: Any = parser.add_argument
    add("--blocks", type=int, default=3, help="blocks to try on folds, those of which the expansion expects most")
    add("--folds", type=int, default=3, help="folds of the training images that blocks are tried on")
    add("--epochs", type=int, default=30, help="epochs of a fit")
    add("--lr", type=float, default=1e-3, help="learning rate of AdamW at the start of its cosine")
    add("--full", type=bool, default=False, help="try full fine-tuning too, which takes many times as long")
    add("--out", type=str, help="a .json file for the table and the suggestion")
    options = parser.parse_args(list(words))
    _check(options)
    networks = sources(options)
    if len(networks) != 1:
        raise ValueError(f"suggest takes one backbone, got {len(networks)}; scan ranks several")
    if networks[0].layers == [PENULTIMATE]:
        raise ValueError(f"suggest tries blocks, got --layers {PENULTIMATE} alone")
    data = datamodule(options, parser)
    with _quiet():
        # Read once, since a datamodule may split or shuffle its images anew at each pass.
        images, labels = read_images(pass_trainer(options), networks[0].backbone, data, options.max_images)
        _check_several(labels, data)
        bench = Bench(
            networks[0].backbone,
            images,
            labels,
            num_classes=len(classes_of(data)),
            folds=folds_of(labels, options.folds),
            batch_size=getattr(data, "batch_size", None) or _BATCH,
            lr=options.lr,
            epochs=options.epochs,
            trainer=lambda n: quiet_trainer(options, max_epochs=n, num_sanity_val_steps=0, limit_val_batches=0),
        )
        everything = bench.data(torch.arange(len(labels)))
        bank = fill(pass_trainer(options), networks, everything, said(options), len(labels))
        rows = suggest(
            networks[0], bank, bench, pass_trainer(options, inference_mode=False), options.blocks, options.full
        )
    print(aligned([_cells(row) for row in rows]))
    print(f"\n{_LEGEND.format(images=len(labels), classes=len(classes_of(data)))}")
    _publish(rows, _recipe(options), _given(options, words), options.out)
    return 0


def _check_several(labels: Tensor, data: Any) -> None:
    """Refuse one image of each class, and say whether others were put aside for validation."""
    if int(torch.unique(labels, return_counts=True)[1].max()) > 1:
        return
    aside = [split for split in getattr(data, "splits", ()) if split != "train"]
    others = f"; further ones are put aside as {' and '.join(aside)}, which suggest does not use" if aside else ""
    free = ", or --data.val_fraction 0" if "val" in aside else ""
    raise ValueError(
        f"expected two training images of some class at least, got one of each{others}; give more images{free}"
    )


def _publish(rows: Sequence[Row], recipe: str, given: str, out: str | None) -> None:
    """Print the suggestion, and write it with the table."""
    chosen = choose(rows)
    text = verdict(rows, chosen, recipe, given)
    print(f"\n{text}")
    if out:
        content = {"suggestion": chosen.method, "verdict": text, "rows": [asdict(row) for row in rows]}
        with replacing(Path(out)) as part:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _check(options: Any) -> None:
    for name, least in (("blocks", 0), ("folds", 2), ("epochs", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"expected --{name} of at least {least}, got {getattr(options, name)}")
    if not options.lr > 0:
        raise ValueError(f"expected --lr above 0, got {options.lr}")
    if options.out and Path(options.out).suffix != ".json":
        raise ValueError(f"expected --out of a .json file, got {options.out!r}")
    if options.out:  # before all fits
        check_writable(Path(options.out).parent)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning says of each of many fits."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def suggest(source: Source, bank: Bank, bench: Bench, trainer: Trainer, blocks: int, full: bool = False) -> list[Row]:
    """A row for each closed form, for each block by its expansion, and for each tuned method tried on all folds.

    Args:
        source: The network, with the layers of the bank.
        bank: Features of the images.
        bench: The images, and how a method is fitted.
        trainer: Gives the device of the expansion; its ``inference_mode`` is off.
        blocks: Number of blocks to try on folds.
        full: Try full fine-tuning too.

    Raises:
        ValueError: Images of fewer than two classes, features that are not finite, or no layer has parameters.
    """
    _check_left_out([bench.folds, *balanced_folds(bench.labels)], bench.labels)
    layers = {layer: bank.of(source.name, layer).cpu() for layer in source.layers}
    penultimate = layers.pop(PENULTIMATE)
    closed = closed_forms(penultimate, layers, bench.labels, bench.num_classes)
    last = closed[-1]
    expansions = _expansions(trainer, penultimate, list(layers), bench)
    expected = [_tuned(method, trial, last.trial, last.trial) for method, trial in expansions.items()]
    reference = closed_trial(last.fit, bench.labels, bench.folds)
    best = sorted(expected, key=lambda row: -_gain(row))[:blocks]
    trials = halve(bench, [Method(row.method, row.knobs) for row in best], reference)
    if trials:
        tuned = max(trials, key=lambda method: trials[method].gain(reference, "loss")[0])
        block = tuned.knobs["train"]
        trials |= halve(bench, [Method(f"SCL FT {block}", {**tuned.knobs, "skip_from": block})], reference)
    if full:
        trials |= halve(bench, [Method(_FULL, {"train": "all", "head_init": "ridge"})], reference)
    tried = [_tuned(method, trial, reference, last.trial) for method, trial in trials.items()]
    names = {row.method for row in tried}
    rows = [*map(_closed, closed), *(row for row in expected if row.method not in names), *tried]
    chosen = choose(rows)
    if chosen.gain is None:
        return rows
    rivals, against = (expansions, last.trial) if chosen.seconds is None else (trials, reference)
    honest = chosen_elsewhere([*rivals.values()], against, bench.folds, WORTH)
    accuracy = _tuned(Method(chosen.method, {}), honest, against, last.trial).accuracy
    return [replace(row, accuracy=accuracy) if row is chosen else row for row in rows]


def _check_left_out(ways: Sequence[Tensor], labels: Tensor) -> None:
    """Refuse images of which one class alone remains where a fold is left out."""
    if any(len(torch.unique(labels[folds != fold])) < 2 for folds in ways for fold in torch.unique(folds)):
        counts = ", ".join(map(str, torch.unique(labels, return_counts=True)[1].tolist()))
        raise ValueError(
            f"expected images of two classes without those that are left out, got classes of {counts} images; give "
            "each class two at least"
        )


def _expansions(trainer: Trainer, penultimate: Tensor, layers: Sequence[str], bench: Bench) -> dict[Method, Trial]:
    """Layer FT of each block with parameters, as the network's expansion has it."""
    labels, classes, backbone = bench.labels, bench.num_classes, bench.backbone
    blocks = [name for name in layers if backbone.size(name)]
    if not blocks:
        raise ValueError(f"suggest tries layers with parameters, got --layers {' '.join(layers)} without any")
    gradients = gradient_features(trainer, backbone, bench.images, blocks)
    folds = balanced_folds(labels)
    found = {}
    for name in blocks:
        trial = Trial.left_out(linearised(penultimate, gradients.pop(name), labels, classes, folds), labels)
        trial.trained = backbone.size(name) + classes * (penultimate.shape[1] + 1)
        found[Method(f"layer FT {name}", {"train": name, "head_init": "ridge"})] = trial
    return found


def halve(bench: Bench, methods: Sequence[Method], reference: Trial) -> dict[Method, Trial]:
    """Trials of methods on all folds; after each fold only the better half goes on (Jamieson, Talwalkar 2016).

    Args:
        bench: Fits a method without a fold.
        methods: What to try.
        reference: What they are compared with, image by image.
    """
    trials = {method: Trial.empty(len(bench.labels)) for method in methods}
    folds = int(bench.folds.max()) + 1
    for fold in range(folds):
        for place, (method, trial) in enumerate(trials.items(), 1):
            print(f"fold {fold + 1} of {folds}, {place} of {len(trials)}: {method.name}", file=sys.stderr)
            bench.run(method, trial, fold)
        order = sorted(trials, key=lambda method: -trials[method].gain(reference, "loss")[0])
        kept = order if fold == folds - 1 else order[: math.ceil(len(order) / 2)]
        trials = {method: trials[method] for method in kept}
    return trials


def choose(rows: Sequence[Row]) -> Row:
    """The last closed form, which the others are compared with, or a tuned method, if one lowers its error by 0.01.

    The closed form is ridge regression, with the skip connections that clearly help: which closed form is the most
    accurate on few images is chance. Of methods that were tried it is the one that lowers the squared error most. If no
    block was tried, it may be a block of which the expansion predicts a gain of more than 0.01 and a standard error.

    Of what was tried a gain of less than its standard error is taken too: tuning in vain costs a point or two of
    accuracy, and not tuning where it pays up to twenty. The usual rule, the fewest parameters within one standard error
    of the best, is not taken: with few images that includes nearly all methods. On five digits of each class it cost
    2.7 points of accuracy, on more of them and on textures nothing clear (experiments/results/suggestions.md).
    """
    sure = [row for row in _judged(rows) if _gain(row) - (row.seconds is None) * (row.gain_error or 0) > WORTH]
    return max(sure, key=_gain) if sure else [row for row in rows if row.gain is None][-1]


def _judged(rows: Sequence[Row]) -> list[Row]:
    """Tuned methods that were tried; where no block was, those that are judged by the expansion too."""
    tuned = [row for row in rows if row.gain is not None]
    tried = [row for row in tuned if row.seconds is not None]
    return tried if any(row.method != _FULL for row in tried) else tuned


def _gain(row: Row) -> float:
    return -math.inf if row.gain is None else row.gain


def verdict(rows: Sequence[Row], chosen: Row, recipe: str, given: str) -> str:
    """What is suggested, what is as good, and how to run it.

    Args:
        rows: The table.
        chosen: The suggestion.
        recipe: Options of ``fit`` for the optimiser and the epochs that methods were tried with.
        given: Options of ``fit`` for the network and the data.
    """
    predicted, best = f"{percent(chosen.accuracy, chosen.error)} % predicted", max(_judged(rows), key=_gain)
    if chosen.gain is None:
        said = (
            f"no tuning: {chosen.method} ({predicted}); {best.method}, the best tuned method, {_against(best)}, and "
            f"tuning is suggested from {WORTH} lower on"
        )
    else:
        near = [r.method for r in _judged(rows) if r is not chosen and _gain(r) >= _gain(best) - (best.gain_error or 0)]
        within = f"; within one standard error of the best: {', '.join(near)}" if near else ""
        said = f"suggestion: {chosen.method} ({predicted}), which {_against(chosen)}{within}"
    options = " ".join(f"--model.{name} {shlex.quote(_word(value))}" for name, value in chosen.knobs.items())
    how = "--trainer.max_epochs 0" if chosen.gain is None else recipe
    return f"{said}\nncfinetune fit --model FineTuner {given} {options} {how}"


def _against(row: Row) -> str:
    gain = _gain(row)
    if abs(gain) < 0.0005:
        return "has the squared error of the last closed form"
    moves = "lowers" if gain > 0 else "raises"
    return f"{moves} the squared error of the last closed form by {abs(gain):.3f} ± {row.gain_error:.3f}"


def _given(options: Any, words: Sequence[str]) -> str:
    """The options of ``fit`` for the network, the data and the device that this command was given."""
    backbone = options.backbone[0]
    spec = {"name": backbone} if isinstance(backbone, str) else dict(backbone)
    if options.checkpoint:
        spec["checkpoint"] = options.checkpoint[0]
    elif options.pretrained:
        spec.setdefault("pretrained", True)
    given = ["--model.backbone", json.dumps(spec), *(["--model.allow_random", "true"] if options.allow_random else [])]
    of_data = False
    for word in words:
        of_data = word.startswith("--data") if word.startswith("--") else of_data
        given += [word] if of_data else []
    device = {"accelerator": "auto", "precision": "32-true"}
    named = {name: getattr(options, name) for name in device}
    given += [part for name, word in named.items() if word != device[name] for part in (f"--trainer.{name}", word)]
    return shlex.join(given)


def _recipe(options: Any) -> str:
    """The options of ``fit`` for the optimiser and epochs that methods are tried with."""
    scheduler = f"--model.lr_scheduler CosineAnnealingLR --model.lr_scheduler.T_max {options.epochs}"
    optimizer = f"--model.optimizer AdamW --model.optimizer.lr {options.lr:g} --model.optimizer.weight_decay 0.01"
    return f"{optimizer} {scheduler} --trainer.max_epochs {options.epochs}"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _closed(closed: Closed) -> Row:
    trial = closed.trial
    accuracy, seconds = float(trial.right.double().mean()), sum(trial.seconds) / len(trial.seconds)
    error = standard_error(accuracy, len(trial.right))
    return Row(closed.name, accuracy, error, None, None, trial.trained, seconds, closed.knobs)


def _tuned(method: Method, trial: Trial, reference: Trial, closed: Trial) -> Row:
    """The row of a tuned method by its gain over the reference, on the same folds; the closed form's are other ones."""
    (gain, gain_error), (more, _) = (trial.gain(reference, name) for name in ("loss", "right"))
    accuracy = min(1.0, max(0.0, float(closed.right.double().mean()) - more))
    # Gain and closed form are of the same images, so that their errors do not add up.
    error = standard_error(accuracy, int((~trial.right.isnan()).sum()))
    seconds = sum(trial.seconds) / len(trial.seconds) if trial.seconds else None
    return Row(method.name, accuracy, error, gain, gain_error, trial.trained, seconds, method.knobs)


def _cells(row: Row) -> dict[str, str]:
    gain = "-" if row.gain is None else f"{row.gain:.3f} ± {row.gain_error:.3f}"
    fitted = "expansion" if row.seconds is None else "fits"
    return {
        "method": row.method,
        "judged by": "closed form" if row.gain is None else fitted,
        "predicted %": percent(row.accuracy, row.error),
        "gain in error^2": gain,
        "trained": f"{row.trained:,}",
        "seconds a fit": "-" if row.seconds is None else f"{row.seconds:.2f}",
    }

"""Source collapse against transfer: networks pre-trained in several ways, and what their features are good for.

SOURCE and each DOWNSTREAM have ``train/CLASS/*`` and ``val/CLASS/*``. Every method of `METHODS` pre-trains a ResNet-18
of half the usual width on the first ``--classes`` classes of SOURCE by ``ncfinetune fit``, with the files of
``experiments/pretrain`` and the same epochs, batch size and, but for methods that are about it, augmentation. On the
training images of the source, as they are evaluated, the penultimate features have NC1, cross-validated NC1, CDNV and
the trace ratio.
Ridge regression, whose strength leaving one out chooses, has an accuracy on the images of ``val``: of the source, and
of each DOWNSTREAM with ``--shots`` training images per class, always the same. No number has a learning rate of its own
to disagree about.

Rows are written as they come, and what the file has is not run again; a pre-training that was interrupted goes on from
its last epoch.

    python experiments/studies/sources.py run SOURCE DOWNSTREAM ... --out sources.csv [--seeds 0 1 2] [--methods ce mse]
    python experiments/studies/sources.py table sources.csv
    python experiments/studies/sources.py directions SOURCE [--seed 0] [--methods ce mse]

``directions`` tells for the networks that ``run`` has left how much of their NC1 comes from directions of the class
means with little variance between classes.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from study import appending, mean_and_deviation, rows, so_far
from torch import Tensor

from ncfinetune import Backbone, SimCLR, SupCon, Supervised
from ncfinetune.bank import read_images
from ncfinetune.collapse import ClassMoments, cdnv, class_moments, nc1, nc1_ratio
from ncfinetune.datamodules import ImageFolder
from ncfinetune.folds import FoldMoments
from ncfinetune.probes import ridge
from ncfinetune.sample_statistics import spearman

OVERLAYS = Path(__file__).resolve().parent.parent / "pretrain"
NETWORK = {"name": "resnet18", "stem": "cifar", "channels": [32, 64, 128, 256]}
# The file of experiments/pretrain, and what is changed in it; None is a network that nothing has trained.
METHODS: dict[str, tuple[str, list[str]] | None] = {
    "random weights": None,
    "ce": ("ce", []),
    "mse": ("mse", []),
    "SupCon": ("supcon_none", []),
    "SupCon, mlp head": ("supcon_mlp", []),
    "ce, plain": ("ce", ["--data.augmentation", "plain"]),
    "SimCLR, mlp head": ("simclr", []),
    "ce, mlp head": ("ce", ["--model.projection", "mlp"]),
    "ce, strength 1": ("ce", ["--data.strength", "1.0"]),
    "mse, mlp head": ("mse", ["--model.projection", "mlp"]),
    "SupCon, linear head": ("supcon_linear", []),
    "PGD 4/255": ("adversarial", []),
    "ce, linear head": ("ce", ["--model.projection", "linear"]),
    "mse, linear head": ("mse", ["--model.projection", "linear"]),
    "ce, strength 0.25": ("ce", ["--data.strength", "0.25"]),
    "PGD 2/255": ("adversarial", ["--model.adversary.radius", "0.0078"]),
    "mse, plain": ("mse", ["--data.augmentation", "plain"]),
}
# Not trained, or added when the rows of the others were known: no rank correlation has these.
UNRANKED = ("random weights", "mse, plain")
# Families within which rank correlations are given beside those over all.
FAMILIES = {
    "all that were trained": [name for name in METHODS if name not in UNRANKED],
    "losses and heads": [loss + h for loss in ("ce", "mse", "SupCon") for h in ("", ", linear head", ", mlp head")],
    "augmentation of ce": ["ce", "ce, plain", "ce, strength 0.25", "ce, strength 1"],
    "radii of PGD": ["ce", "PGD 2/255", "PGD 4/255"],
}
MEASURES = ("nc1", "cv_nc1", "cdnv", "nc1_ratio")
# Images that source statistics and downstream accuracies are taken of, at most.
MOST = 10_000


def classes_alone(source: Path, number: int, place: Path) -> Path:
    """A folder of links to the first classes of a source."""
    for part in ("train", "val"):
        (place / part).mkdir(parents=True, exist_ok=True)
        for folder in sorted((source / part).iterdir())[:number]:
            link = place / part / folder.name
            with suppress(FileExistsError):  # of an earlier run, or of one beside this
                link.symlink_to(folder.resolve())
    return place


def folder_of(runs: Path, method: str, seed: int) -> Path:
    """Where the pre-training of a method is."""
    return runs / f"{method.replace(', ', '-').replace(' ', '-').replace('/', '-')}-seed{seed}"


def last_of(runs: Path, method: str, seed: int) -> Path:
    """The checkpoint of a pre-training's last epoch so far."""
    return folder_of(runs, method, seed) / "checkpoints" / "last.ckpt"


def is_finished(runs: Path, method: str, seed: int, epochs: int) -> bool:
    """Whether a method's pre-training has made all its epochs; random weights need none."""
    last = last_of(runs, method, seed)
    return METHODS[method] is None or (
        last.is_file() and torch.load(last, weights_only=True, mmap=True)["epoch"] + 1 >= epochs
    )


def network_of(runs: Path, method: str, seed: int) -> Backbone:
    """The network of a method whose pre-training is finished."""
    chosen = METHODS[method]
    if chosen is None:
        seed_everything(seed, verbose=False)
        return Backbone(**NETWORK)
    kind: type[LightningModule] = {"simclr": SimCLR}.get(chosen[0], SupCon if "supcon" in chosen[0] else Supervised)
    return kind.load_from_checkpoint(last_of(runs, method, seed)).backbone


def pretrain(options: argparse.Namespace, method: str, seed: int, source: Path) -> float:
    """Pre-train by a method, unless that is finished; the CPU seconds that it took in this call."""
    chosen = METHODS[method]
    if chosen is None or is_finished(options.runs, method, seed, options.epochs):
        return 0.0
    overlay, changes = chosen
    run, last = folder_of(options.runs, method, seed), last_of(options.runs, method, seed)
    words = ["--config", OVERLAYS / "cifar10.yaml", "--config", OVERLAYS / f"{overlay}.yaml"]
    words += ["--data.root", source, "--data.fraction", "1.0", "--data.batch_size", "128", "--seed_everything", seed]
    words += ["--model.backbone.channels", NETWORK["channels"], "--trainer.max_epochs", options.epochs]
    words += ["--model.lr_scheduler.epochs", options.epochs, "--trainer.precision", options.precision]
    words += ["--trainer.check_val_every_n_epoch", options.epochs, "--trainer.enable_progress_bar", "false"]
    # By epochs, as there is no validation before the last.
    keeps = "{filename: last, enable_version_counter: false, save_on_train_epoch_end: true}"
    words += ["--trainer.callbacks", f"[{{class_path: ModelCheckpoint, init_args: {keeps}}}]"]
    words += ["--trainer.logger.save_dir", run.parent, "--trainer.logger.version", run.name, *changes]
    words += ["--ckpt_path", last] if last.is_file() else []
    if run.exists() and not last.is_file():  # interrupted in its first epoch
        shutil.rmtree(run)
    before = os.times()
    subprocess.run([sys.executable, "-m", "ncfinetune", "fit", *map(str, words)], check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def features_of(backbone: Backbone, root: Path, part: str, shots: int | None) -> tuple[Tensor, Tensor]:
    """Penultimate features ``(N, d)`` of a folder's images as they are evaluated, and their labels."""
    data = ImageFolder(
        str(root), {"train": part}, image_size=32, in_memory=True, shots=shots, seed=0, val_fraction=0.0, num_workers=0
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    images, labels = read_images(Trainer(accelerator="cpu", enable_checkpointing=False, **quiet), backbone, data, MOST)
    backbone.eval()
    with torch.no_grad():
        return torch.cat([backbone(batch) for batch in images.split(256)]), labels


def measure(options: argparse.Namespace, backbone: Backbone, source: Path) -> dict[str, float]:
    """The numbers of a network."""
    features, labels = features_of(backbone, source, "train", None)
    classes = int(labels.max()) + 1
    moments, folds = class_moments(features, labels, classes), FoldMoments(classes)
    folds.update(features, labels)
    values = (nc1(moments), folds.nc1(), cdnv(moments), nc1_ratio(moments))
    numbers = dict(zip(MEASURES, map(float, values), strict=True))
    for name, root, shots in [("source", source, None), *((d.name, d, options.shots) for d in options.downstream)]:
        train = (features, labels) if root is source else features_of(backbone, root, "train", shots)
        test, truth = features_of(backbone, root, "val", None)
        head = ridge(*train, int(train[1].max()) + 1)
        right = (test.double() @ head.weight.double().T + head.bias.double()).argmax(1) == truth
        numbers[f"{name}_acc"] = float(right.double().mean())
    return numbers


def run(options: argparse.Namespace) -> None:
    source = classes_alone(options.source, options.classes, options.runs / f"first{options.classes}")
    fields = [
        "method",
        "seed",
        "epochs",
        *MEASURES,
        "source_acc",
        *(f"{d.name}_acc" for d in options.downstream),
        "seconds",
    ]
    known = {(row["method"], row["seed"], row["epochs"]) for row in so_far(options.out, fields)}
    for seed in options.seeds:
        for method in options.methods:
            if (method, str(seed), str(options.epochs)) in known:
                continue
            start = time.process_time()
            spent = pretrain(options, method, seed, source)
            numbers = measure(options, network_of(options.runs, method, seed), source)
            row = {"method": method, "seed": seed, "epochs": options.epochs, **numbers}
            row["seconds"] = round(spent + time.process_time() - start)
            with appending(options.out, fields) as append:  # anew for each row, as others may write beside this
                append(row)
            print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)


def directions_of(moments: ClassMoments) -> tuple[Tensor, Tensor]:
    """The principal directions of the class means: shares of the variance between classes, and terms of NC1."""
    centred = moments.centred
    _, sizes, rows = torch.linalg.svd(centred, full_matrices=False)
    sizes, rows = (part[: len(centred) - 1] for part in (sizes, rows))
    squares = sizes.square()
    return squares / squares.sum(), ((rows @ moments.within) * rows).sum(1) / squares


def directions(options: argparse.Namespace) -> str:
    """How much of NC1 comes from directions with less than 1 % of the variance between classes.

    Methods without a finished pre-training are left out.
    """
    source = classes_alone(options.source, options.classes, options.runs / f"first{options.classes}")
    lines = ["| method | nc1 | directions below 1 % | nc1 of the others |", "|" + "---|" * 4]
    how = options.seed, options.epochs
    for method in (method for method in options.methods if is_finished(options.runs, method, *how)):
        features, labels = features_of(network_of(options.runs, method, options.seed), source, "train", None)
        moments = class_moments(features, labels, int(labels.max()) + 1)
        shares, terms = directions_of(moments)
        few = shares < 0.01
        some = f"{int(few.sum())} of {len(few)}"
        lines.append(f"| {method} | {float(nc1(moments)):.3g} | {some} | {float(terms[~few].sum()):.3g} |")
    return "\n".join(lines)


def table(path: Path) -> str:
    """Means and standard deviations over seeds, and the rank correlations of collapse with accuracy."""
    found = rows(path)
    accuracies = [name for name in found[0] if name.endswith("_acc")]
    of_method: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in found:
        of_method[row["method"]].append(row)
    columns = [*MEASURES, *accuracies]
    lines = [f"| method | seeds | {' | '.join(columns)} | CPU s |", "|" + "---|" * (len(columns) + 3)]
    for method, own in sorted(of_method.items(), key=lambda item: mean(item[1], "nc1")):
        numbers = ([float(row[name]) * (100 if name in accuracies else 1) for row in own] for name in columns)
        cells = [mean_and_deviation(values, ".3g") for values in numbers]
        took = statistics.median(float(row["seconds"]) for row in own)
        lines.append(f"| {method} | {len(own)} | {' | '.join(cells)} | {took:.0f} |")
    lines += ["", "| Spearman's rho (p) over methods | measure | " + " | ".join(accuracies) + " |"]
    lines.append("|" + "---|" * (len(accuracies) + 2))
    for family, names in FAMILIES.items():
        here = [of_method[name] for name in names if name in of_method]
        for measure_name in MEASURES if len(here) > 2 else ():
            x = [mean(own, measure_name) for own in here]
            pairs = [spearman(x, [mean(own, accuracy) for own in here]) for accuracy in accuracies]
            cells = [f"{rho:.2f} ({p:.2g})" for rho, p in pairs]
            lines.append(f"| {family} ({len(here)}) | {measure_name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(own: Sequence[dict[str, str]], name: str) -> float:
    return statistics.fmean(float(row[name]) for row in own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table").add_argument("rows", type=Path)
    runs, parts = commands.add_parser("run"), commands.add_parser("directions")
    runs.add_argument("source", type=Path)
    runs.add_argument("downstream", type=Path, nargs="+")
    runs.add_argument("--out", type=Path, default=Path("sources.csv"))
    runs.add_argument("--shots", type=int, default=20, help="downstream training images per class")
    runs.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    runs.add_argument("--precision", default="bf16-mixed")
    parts.add_argument("source", type=Path)
    parts.add_argument("--seed", type=int, default=0)
    for command in (runs, parts):
        command.add_argument("--runs", type=Path, default=Path("runs/sources"), help="folder of the pre-trainings")
        command.add_argument("--classes", type=int, default=20, help="classes of the source, the first ones")
        command.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
        command.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    if options.command == "table":
        print(table(options.rows))
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if options.command == "directions":
        print(directions(options))
    else:
        run(options)


if __name__ == "__main__":
    main()

"""Heads in closed form beside trained ones, on frozen features with few labels: accuracy, calibration, seconds.

ROOT has ``train/CLASS/*`` and ``val/CLASS/*``, all images of one size. The images of ``val`` are the test set, for all
rows and seeds; a seed draws the training images, the same for all rows. Where all of ``train`` is drawn, a seed splits
all images anew into as many of each, so that seeds differ. Features of all blocks are computed once; times are CPU
seconds of one thread from there on, with whatever a row chooses. Nothing is chosen by the test images.

Beside the table a CSV has every split's rows in the columns of study.py, which compares them with those of tuned
networks; their seconds have the network's pass over the training images in them.

Rows, on the penultimate features:

- ``nearest mean``, ``LDA``, ``ridge``: `ncfinetune.probes`, strengths by leaving one out.
- ``logistic regression``: L-BFGS to convergence on standardised features, scikit-learn's C = 1.
- ``linear probe``: 50 epochs of AdamW at 1e-3, batch 64, as experiments/finetune/linear_probe.yaml from a random start.
- ``ridge, N skips``: penultimate features beside those of at most N blocks of `skips.choose_skips`.
- ``ridge, skips only``: those of at most three blocks without the penultimate features.

    python experiments/studies/closed_forms.py ROOT --checkpoint WEIGHTS --mean 0.5 --std 0.5 [--shots 5 20 80]
"""

import argparse
import csv
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from study import BACKBONE, FIELDS, mean_and_error, read, spec_of, split
from torch import Tensor, nn

from ncfinetune import Backbone
from ncfinetune.calibration import calibration_error
from ncfinetune.callbacks.classify import fit_probe
from ncfinetune.probes import Head, lda, nearest_mean, ridge
from ncfinetune.skips import choose_skips

Features = Mapping[str, Tensor]
# What a row makes of training features and labels: names of the features that it uses, and what gives logits of these.
Row = Callable[[Features, Tensor, int], tuple[list[str], Callable[[Tensor], Tensor]]]
PENULTIMATE = "penultimate"
BATCH = 32  # images that pass the network together
HEADER = "shots | head | test % | gain on ridge | on the probe | calibration error % | parameters | skips | CPU s"


def features_of(backbone: Backbone, pixels: Tensor, mean: float, std: float) -> Features:
    names = [*backbone.layers, PENULTIMATE]
    with torch.no_grad():
        parts = [backbone.stages((images.float() / 255 - mean) / std, names) for images in pixels.split(BATCH)]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def joined(features: Features, names: list[str]) -> Tensor:
    return torch.cat([features[name] for name in names], 1)


def calibrated(head: Head, labels: Tensor) -> Callable[[Tensor], Tensor]:
    weight, bias = head.logits(labels)
    return lambda features: features.double() @ weight.T + bias


def closed(fit: Callable[[Tensor, Tensor, int], Head], most: int = 0, start: bool = True) -> Row:
    def row(features: Features, labels: Tensor, classes: int) -> tuple[list[str], Callable[[Tensor], Tensor]]:
        names = [PENULTIMATE] if start else []
        if most:
            layers = {name: tensor for name, tensor in features.items() if name != PENULTIMATE}
            names += choose_skips(features[PENULTIMATE] if start else None, layers, labels, most)
        return names, calibrated(fit(joined(features, names), labels, classes), labels)

    return row


def logistic(features: Features, labels: Tensor, classes: int) -> tuple[list[str], Callable[[Tensor], Tensor]]:
    return [PENULTIMATE], fit_probe(features[PENULTIMATE], labels, classes)


def probe(features: Features, labels: Tensor, classes: int) -> tuple[list[str], Callable[[Tensor], Tensor]]:
    inputs = features[PENULTIMATE]
    head = nn.Linear(inputs.shape[1], classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01)
    for _ in range(50):
        for rows in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(head(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    return [PENULTIMATE], head.requires_grad_(False)


ROWS: dict[str, Row] = {
    "nearest mean": closed(nearest_mean),
    "LDA": closed(lda),
    "ridge": closed(ridge),
    "logistic regression": logistic,
    "linear probe": probe,
    "ridge, 1 skip": closed(ridge, 1),
    "ridge, 3 skips": closed(ridge, 3),
    "ridge, skips only": closed(ridge, 3, start=False),
}


def gain(runs: list[dict[str, float]], others: list[dict[str, float]]) -> str:
    """In accuracy, paired by the seed."""
    return mean_and_error([run["accuracy"] - other["accuracy"] for run, other in zip(runs, others, strict=True)])


def measure(row: Row, train: tuple[Features, Tensor], test: tuple[Features, Tensor], classes: int) -> dict[str, float]:
    start = time.process_time()
    names, logits_of = row(*train, classes)
    seconds = time.process_time() - start
    features, labels = test
    probabilities = logits_of(joined(features, names)).softmax(1)
    width = sum(features[name].shape[1] for name in names)
    return {
        "accuracy": 100 * (probabilities.argmax(1) == labels).double().mean().item(),
        "calibration": 100 * calibration_error(probabilities, labels).item(),
        "seconds": seconds,
        "parameters": (width + 1) * classes,
        "skips": len(names) - (PENULTIMATE in names),
    }


def in_the_study(
    name: str, shots: int, seed: int, run: dict[str, float], pass_seconds: float
) -> dict[str, str | float]:
    """A run as a row of study.py."""
    shares = {"test": run["accuracy"] / 100, "calibration": run["calibration"] / 100}
    row = {"method": name, "shots": shots, "seed": seed, "trained": run["parameters"], **shares}
    return dict.fromkeys(FIELDS, "") | row | {"seconds": run["seconds"] + pass_seconds}


def lines(shots: int, found: Mapping[str, list[dict[str, float]]]) -> Iterator[str]:
    """Lines of the table: the runs of each row at a number of images per class."""
    for name, runs in found.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        cells = [shots, name, mean_and_error([run["accuracy"] for run in runs])]
        cells += [gain(runs, found[other]) for other in ("ridge", "linear probe")]
        cells += [mean_and_error([run["calibration"] for run in runs])]
        cells += [f"{statistics.mean(run['parameters'] for run in runs):,.0f}"]
        cells += [f"{statistics.mean(run['skips'] for run in runs):.1f}", f"{seconds:.3f}"]
        yield f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--backbone", default="mobilenetv2_100", help=BACKBONE)
    parser.add_argument("--size", type=int, help="pixels a side to which images are resized")
    parser.add_argument("--mean", type=float, required=True)
    parser.add_argument("--std", type=float, required=True)
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 20, 80])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("experiments/results/closed_forms.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = spec_of(options)
    backbone = Backbone(**spec, checkpoint=options.checkpoint).eval()
    images, train, val = read(options.root, options.size)
    labels, classes = torch.cat([train, val]), int(train.max()) + 1
    start = time.process_time()
    features = features_of(backbone, images, mean=options.mean, std=options.std)
    pass_seconds = (time.process_time() - start) / len(images)
    with options.out.open("w") as file, options.out.with_suffix(".csv").open("w", newline="") as csv_file:
        rows = csv.DictWriter(csv_file, FIELDS)
        rows.writeheader()
        counts = f"{len(train)} images to train on, {len(val)} to test on, {classes} classes"
        about = f"{spec['name']}, {options.root.name}: {counts}; torch {torch.__version__}, {platform.machine()}"
        print(f"{about}, one thread.", file=file)
        print("Means over the seeds ± their standard error; seconds are medians.\n", file=file)
        print(f"| {HEADER} |", file=file)
        print("|---|---|---|---|---|---|---|---|---|", file=file, flush=True)
        for shots in options.shots:
            found: dict[str, list[dict[str, float]]] = defaultdict(list)
            for seed in range(options.seeds):
                parts = split(train, val, shots, seed)
                data = [({name: tensor[part] for name, tensor in features.items()}, labels[part]) for part in parts]
                for name, row in ROWS.items():
                    torch.manual_seed(seed)
                    run = measure(row, *data, classes)
                    found[name].append(run)
                    rows.writerow(in_the_study(name, shots, seed, run, pass_seconds * len(parts[0])))
            csv_file.flush()
            for line in lines(shots, found):
                print(line, file=file, flush=True)


if __name__ == "__main__":
    main()

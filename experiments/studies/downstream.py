"""Collapse of the downstream task against test accuracy, over ways of fine-tuning.

A draw takes training images by its seed. Methods are the linear probe, layer FT and SCL FT at every block, and full FT,
all from the ridge start, with the same learning rate, epochs and batch size (refits: at most the images they have).
Of each, NC1 of the classifier's input, after any skip has joined, is taken in four ways:

- ``nc1``: of the training images, as Li et al. 2022 (arXiv 2212.12206) take it;
- ``cv_nc1``: of the training images in the same network, each fold around the class means of the other folds;
- ``refit_nc1``: of each fold in the network that is fitted without it, around the class means of the images that it was
  fitted to, the mean over three folds; ``refit_loss`` and ``refit_acc``, the rivals, are the squared error of these
  networks' probabilities (Brier 1950) and their accuracy on their folds;
- ``test_nc1``: of the test images in the network of all training images, around the class means of the latter. It needs
  the test labels and says how far any estimate could come.

    python experiments/studies/downstream.py run digits --checkpoint WEIGHTS --out rows.csv [--shots 5 10 20]
    python experiments/studies/downstream.py run ROOT --checkpoint WEIGHTS --size 128 --every 4 --out rows.csv
    python experiments/studies/downstream.py table rows.csv [more.csv]

Data and networks are those of suggestions.py. Rows are written as they come; what a file has already is not run again.
"""

import argparse
import logging
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from study import appending, mean_and_error, so_far
from study import rows as rows_of
from suggestions import add_options, backbone_of, drawn, tested, trainer
from torch import Tensor

from ncfinetune import Backbone, FineTuner
from ncfinetune.bank import read_images
from ncfinetune.collapse import class_moments, nc1
from ncfinetune.folds import FoldMoments, folds_of, whitening
from ncfinetune.probes import squared_errors
from ncfinetune.sample_statistics import spearman
from ncfinetune.trials import Bench, Method

MEASURES = ("nc1", "cv_nc1", "refit_nc1", "refit_loss", "refit_acc", "test_nc1")
FIELDS = ("data", "shots", "seed", "method", *MEASURES, "test", "seconds")
FOLDS = 3


def methods_of(backbone: Backbone, every: int) -> Iterator[Method]:
    """The ways to fine-tune, with every so many blocks from the last one back."""
    yield Method("linear probe", {"train": "none", "head_init": "ridge"})
    for block in list(backbone.layers)[::-every]:
        yield Method(f"layer FT {block}", {"train": block, "head_init": "ridge"})
        yield Method(f"SCL FT {block}", {"train": block, "skip_from": block, "head_init": "ridge"})
    yield Method("full FT", {"train": "all", "head_init": "ridge"})


def held_out_nc1(features: Tensor, labels: Tensor, held: Tensor, held_labels: Tensor) -> Tensor:
    """``tr(S Sigma_B^+) / K``: the scatter ``S`` of held-out features ``(n, d)`` around the class means of others.

    ``Sigma_B`` is the covariance between these means, of ``K`` classes that all have samples, as in NC1.
    """
    means = torch.stack([features[labels == label].double().mean(0) for label in range(int(labels.max()) + 1)])
    return ((held.double() - means[held_labels]) @ whitening(means).T).square().sum(1).mean()


def seen(model: FineTuner, images: Tensor) -> tuple[Tensor, Tensor]:
    """What reaches the classifier ``(N, d)``, and probabilities ``(N, K)``."""
    features: list[Tensor] = []
    handle = model.classifier.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    model.eval()
    with torch.no_grad():
        probabilities = [model(batch).softmax(1) for batch in images.split(256)]
    handle.remove()
    return torch.cat(features), torch.cat(probabilities)


def measured(bench: Bench, method: Method, test: tuple[Tensor, Tensor], seed: int) -> dict[str, float]:
    """The numbers of a method; all images of the bench train."""
    images, labels = bench.images, bench.labels
    model = bench.fitted(method, torch.arange(len(labels)), seed)
    features, _ = seen(model, images)
    test_features, probabilities = seen(model, test[0])
    folded = FoldMoments(bench.num_classes, FOLDS)
    folded.update(features, labels)
    numbers = {
        "nc1": nc1(class_moments(features, labels, bench.num_classes)),
        "cv_nc1": folded.nc1(),
        "test_nc1": held_out_nc1(features, labels, test_features, test[1]),
        "test": (probabilities.argmax(1) == test[1]).double().mean(),
        "refit_nc1": torch.zeros(()),
    }
    left_out = torch.empty(len(labels), bench.num_classes)
    for fold in range(FOLDS):
        held = bench.folds == fold
        refitted = bench.fitted(method, (~held).nonzero().squeeze(1), seed)
        features, probabilities = seen(refitted, images)
        numbers["refit_nc1"] += held_out_nc1(features[~held], labels[~held], features[held], labels[held]) / FOLDS
        left_out[held] = probabilities[held]
    numbers["refit_loss"] = squared_errors(left_out[None], labels).mean()
    numbers["refit_acc"] = (left_out.argmax(1) == labels).double().mean()
    return {name: float(value) for name, value in numbers.items()}


def run(options: argparse.Namespace) -> None:
    name = Path(options.data).name
    done = {
        tuple(row[key] for key in ("shots", "seed", "method"))
        for row in so_far(options.out, FIELDS)
        if row["data"] == name
    }
    backbone = backbone_of(options)
    with appending(options.out, FIELDS) as append:
        for seed in options.seeds:
            for shots in options.shots:
                data = drawn(options, shots, seed)
                images, labels = read_images(trainer(), backbone, data, 10**6)
                how = {"batch_size": data.batch_size, "lr": options.lr, "epochs": options.epochs, "trainer": trainer}
                bench = Bench(backbone, images, labels, int(labels.max()) + 1, folds_of(labels, FOLDS), **how)
                test = tested(data)
                for method in methods_of(backbone, options.every):
                    if (str(shots), str(seed), method.name) in done:
                        continue
                    start = time.process_time()
                    row: dict[str, Any] = {"data": name, "shots": shots, "seed": seed}
                    row |= {"method": method.name, **measured(bench, method, test, seed)}
                    append({**row, "seconds": time.process_time() - start})
                    print(shots, seed, method.name, flush=True)


def table(paths: list[Path]) -> str:
    """Rank correlations of each measure with test accuracy over methods, and the regret of choosing by it.

    Draws that lack some methods are left out.
    """
    grouped: dict[tuple[str, int], list[dict[str, str]]] = defaultdict(list)
    for row in (row for path in paths for row in rows_of(path)):
        grouped[row["data"], int(row["shots"])].append(row)
    lines = [
        "| data | shots | draws | methods | measure | rho over methods of a draw | rho of means (p) | regret, points |"
    ]
    lines.append("|" + "---|" * 8)
    for (data, shots), found in sorted(grouped.items()):
        most = len(by(found, "method"))
        rows = [row for own in by(found, "seed").values() if len(own) == most for row in own]
        for measure in MEASURES if rows else ():
            found_in = [
                spearman([float(row[measure]) for row in own], tests(own))[0] for own in by(rows, "seed").values()
            ]
            known = [rho for rho in found_in if not math.isnan(rho)]  # where all test alike there is none
            means = [
                [statistics.mean(float(row[name]) for row in own) for name in (measure, "test")]
                for own in by(rows, "method").values()
            ]
            rho, p = spearman(*zip(*means, strict=True))
            cells = [
                data,
                shots,
                len(found_in),
                len(means),
                measure,
                mean_and_error(known) if known else "-",
                f"{rho:.2f} ({p:.2g})",
                mean_and_error([regret(best_first(own, measure), tests(own)) for own in by(rows, "seed").values()], 1),
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def best_first(rows: list[dict[str, str]], measure: str) -> list[float]:
    """A measure of methods, with its sign such that the lowest is taken for the best."""
    sign = -1 if measure == "refit_acc" else 1
    return [sign * float(row[measure]) for row in rows]


def tests(rows: list[dict[str, str]]) -> list[float]:
    return [float(row["test"]) for row in rows]


def regret(measured: Sequence[float], tested: Sequence[float]) -> float:
    """Points of test accuracy that the best has over the one that a measure puts first, by its lowest value.

    Where it puts several first, these count equally.
    """
    first = min(measured)
    taken = [test for value, test in zip(measured, tested, strict=True) if value == first]
    return 100 * (max(tested) - statistics.mean(taken))


def by(rows: list[dict[str, str]], key: str) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        found[row[key]].append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table").add_argument("rows", type=Path, nargs="+")
    draws = commands.add_parser("run")
    add_options(draws, seeds=10)
    draws.add_argument("--every", type=int, default=1, help="fit at every so many blocks, from the last one back")
    options = parser.parse_args()
    if options.command == "table":
        print(table(options.rows))
        return
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    run(options)


if __name__ == "__main__":
    main()

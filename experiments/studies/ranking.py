"""Which of several pre-trained networks to take: what says it beforehand, and what each is worth in the end.

SOURCES are the rows of sources.py, and RUNS its folder, whose networks differ in nothing but their pre-training; those
of `sources.UNRANKED` are left out. Of each ROOT the first ``--classes`` classes are taken, and a draw takes training
images of these by its seed, the same for all networks. The measures see the training images alone: what ``ncfinetune
scan`` ranks by, the accuracy of ridge regression on images left out, and its squared error; both again with single
images left out; k-NN, H-score and LogME; NC1, cross-validated NC1 and CDNV of these images; and from SOURCES, NC1,
trace ratio and accuracy of the source. Outcomes are accuracies of ridge regression, and of layer FT of ``--block`` and
full FT from there, on the first ``--tested`` images of each class of ``val``. Rows are written as they come; what a
file has already is not run again. Seconds are those of the processor.

    python experiments/studies/ranking.py run SOURCES RUNS ROOT ... --out rows.csv [--shots 5 20] [--seeds 0 1 2 3 4]
    python experiments/studies/ranking.py table rows.csv
"""

import argparse
import functools
import itertools
import logging
import math
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from downstream import by, regret
from sources import UNRANKED, classes_alone, folder_of, network_of
from study import appending, mean_and_error, so_far
from study import rows as rows_of
from suggestions import tested, trainer
from torch import Tensor

from ncfinetune import Backbone
from ncfinetune.bank import Bank, Source, fill, read_images
from ncfinetune.datamodules import ImageFolder
from ncfinetune.layers import PENULTIMATE
from ncfinetune.probes import ridge
from ncfinetune.sample_statistics import spearman
from ncfinetune.scores import layer_scores, model_scores
from ncfinetune.trials import Bench, Method

# Each measure with the sign that makes its lowest value that of the network to take.
MEASURES = {"accuracy": -1, "squared_error": 1, "loo_accuracy": -1, "loo_squared_error": 1, "knn": -1, "h_score": -1}
MEASURES |= {"logme": -1, "nc1": 1, "cv_nc1": 1, "cdnv": 1, "source_nc1": -1, "source_nc1_ratio": -1, "source_acc": -1}
# Those that predict the accuracy of ridge regression, not only its order.
ACCURACIES = ("accuracy", "loo_accuracy")
OUTCOMES = ("ridge", "layer FT", "full FT")
FIELDS = ("data", "shots", "seed", "network", *MEASURES, *OUTCOMES, "seconds")


def measured(bank: Bank) -> dict[str, dict[str, float]]:
    """The measures of each network, as scan finds them, and those with single images left out."""
    layers = layer_scores(bank)
    of_models = {score.model: score for score in model_scores(bank, layers)}
    found = {}
    for layer in layers:
        name, head = layer.model, ridge(bank.of(layer.model, layer.layer), bank.labels, bank.num_classes)
        assert head.curve is not None
        single = {"loo_accuracy": 1 - float(head.loo_error), "loo_squared_error": float(head.curve.loss.min())}
        scores = (layer, of_models[name])
        found[name] = single | {m: getattr(s, m) for s in scores for m in MEASURES if hasattr(s, m)}
    return found


def outcomes(bench: Bench, features: Tensor, test: tuple[Tensor, Tensor], block: str, seed: int) -> dict[str, float]:
    """Test accuracies of a network that all images of a bench tune."""
    network = bench.backbone.eval()
    with torch.no_grad():
        test_features = torch.cat([network(images) for images in test[0].split(256)])
    found = {"ridge": ridge(features, bench.labels, bench.num_classes).scores(test_features).argmax(1)}
    for name, train in (("layer FT", block), ("full FT", "all")):
        model = bench.fitted(Method(name, {"train": train, "head_init": "ridge"}), torch.arange(len(features)), seed)
        with torch.no_grad():
            found[name] = torch.cat([model.eval()(images).argmax(1) for images in test[0].split(256)])
    return {name: float((decided == test[1]).double().mean()) for name, decided in found.items()}


def first_of_each(images: Tensor, labels: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The first so many images of each class."""
    place = torch.nn.functional.one_hot(labels).cumsum(0).gather(1, labels[:, None]).squeeze(1)
    return images[place <= most], labels[place <= most]


def networks_of(options: argparse.Namespace) -> tuple[dict[str, Backbone], dict[str, dict[str, str]]]:
    """Each pre-trained network by the name of its folder, and what SOURCES knows of it."""
    networks, known = {}, {}
    for row in rows_of(options.sources):
        if row["method"] not in UNRANKED:
            which = options.runs, row["method"], int(row["seed"])
            name = folder_of(*which).name
            networks[name] = network_of(*which)
            known[name] = {f"source_{measure}": row[measure] for measure in ("nc1", "nc1_ratio")}
            known[name]["source_acc"] = row["source_acc"]
    return networks, known


def attempt(
    options: argparse.Namespace, networks: dict[str, Backbone], root: Path, shots: int, seed: int
) -> Iterator[dict[str, Any]]:
    """A row for each network of a draw."""
    place = classes_alone(root, options.classes, options.runs / f"{root.name}-first{options.classes}")
    splits = {"train": "train", "test": "val"}
    data = ImageFolder(str(place), splits, image_size=32, shots=shots, seed=seed, batch_size=16, num_workers=0)
    start = time.process_time()
    sources = [Source.of(name, network, [PENULTIMATE]) for name, network in networks.items()]
    bank = fill(trainer(), sources, data, {}, 10**6)
    numbers, took = measured(bank), (time.process_time() - start) / len(networks)
    how = {"batch_size": data.batch_size, "lr": options.lr, "epochs": options.epochs}
    how["trainer"] = functools.partial(trainer, precision=options.precision)
    test = first_of_each(*tested(data), options.tested)
    for name, network in networks.items():
        start = time.process_time()
        images, labels = read_images(trainer(), network, data, 10**6)
        bench = Bench(network, images, labels, bank.num_classes, torch.zeros_like(labels), **how)
        found = outcomes(bench, bank.of(name, PENULTIMATE), test, options.block, seed)
        yield {"network": name, **numbers[name], **found, "seconds": took + time.process_time() - start}


def run(options: argparse.Namespace) -> None:
    networks, known = networks_of(options)
    done = {tuple(row[key] for key in ("data", "shots", "seed", "network")) for row in so_far(options.out, FIELDS)}
    with appending(options.out, FIELDS) as append:
        for seed, root, shots in itertools.product(options.seeds, options.data, options.shots):
            draw = {"data": root.name, "shots": shots, "seed": seed}
            left = {
                name: network
                for name, network in networks.items()
                if tuple(map(str, (*draw.values(), name))) not in done
            }
            for row in attempt(options, left, root, shots, seed) if left else ():
                append(draw | known[row["network"]] | row)
                print(*draw.values(), row["network"], flush=True)


def table(path: Path) -> str:
    """A table for each outcome: how measures order networks by it, a column for each set and number of shots.

    Draws that lack some networks are left out. That of chance is what the mean network is below the best. Last come the
    points by which ridge regression's accuracies on images left out exceed that on test images.
    """
    grouped: dict[str, list[list[dict[str, str]]]] = {}
    for (data, shots), found in sorted(_by_set(path).items()):
        most = len(by(found, "network"))
        if draws := [own for own in by(found, "seed").values() if len(own) == most]:
            grouped[f"{data}, {shots}: {len(draws)} draws of {most}"] = draws
    rows = [f"| {' | '.join(grouped)} |", "---|" * len(grouped)]
    lines: list[str] = []
    for outcome in OUTCOMES if grouped else ():
        lines += [f"| {outcome} {rows[0]}", f"|---|{rows[1]}"]
        for measure in ("chance", *MEASURES):
            cells = [judged(draws, measure, outcome) for draws in grouped.values()]
            lines.append(f"| {measure} | {' | '.join(cells)} |")
        lines.append("")
    if grouped:
        lines += [f"| predicted less tested {rows[0]}", f"|---|{rows[1]}"]
        for name in ACCURACIES:
            cells = [
                mean_and_error([predicted_less_tested(own, name) for own in draws], 1) for draws in grouped.values()
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_set(path: Path) -> dict[tuple[str, int], list[dict[str, str]]]:
    """Rows by data and images per class."""
    found: dict[tuple[str, int], list[dict[str, str]]] = defaultdict(list)
    for row in rows_of(path):
        found[row["data"], int(row["shots"])].append(row)
    return found


def predicted_less_tested(draw: list[dict[str, str]], name: str) -> float:
    """By how many points a predicted accuracy of ridge regression exceeds the tested one, over a draw's networks."""
    return 100 * statistics.mean(float(row[name]) - float(row["ridge"]) for row in draw)


def judged(draws: list[list[dict[str, str]]], measure: str, outcome: str) -> str:
    """How a measure orders networks by an outcome: rho in each draw, rho and p of means over draws, and the regret."""
    tests = [[float(row[outcome]) for row in own] for own in draws]
    if measure == "chance":
        return mean_and_error([regret([0.0] * len(own), own) for own in tests], 1)
    values = [[MEASURES[measure] * float(row[measure]) for row in own] for own in draws]
    within = [-spearman(x, y)[0] for x, y in zip(values, tests, strict=True)]
    known = [rho for rho in within if not math.isnan(rho)]  # where all test alike there is none
    networks = by([row for own in draws for row in own], "network").values()
    means = [[statistics.mean(float(row[name]) for row in own) for name in (measure, outcome)] for own in networks]
    rho, p = spearman([MEASURES[measure] * mean for mean, _ in means], [mean for _, mean in means])
    lost = [regret(x, y) for x, y in zip(values, tests, strict=True)]
    return f"{mean_and_error(known) if known else '-'}; {-rho:.2f} ({p:.2g}); {mean_and_error(lost, 1)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table").add_argument("rows", type=Path)
    draws = commands.add_parser("run")
    draws.add_argument("sources", type=Path)
    draws.add_argument("runs", type=Path)
    draws.add_argument("data", type=Path, nargs="+")
    draws.add_argument("--out", type=Path, required=True)
    draws.add_argument("--classes", type=int, default=10)
    draws.add_argument("--tested", type=int, default=100, help="images per class that test, at most")
    draws.add_argument("--shots", nargs="+", type=int, default=[5, 20])
    draws.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    draws.add_argument("--block", default="layer4.0", help="the block of layer FT")
    draws.add_argument("--epochs", type=int, default=30)
    draws.add_argument("--lr", type=float, default=1e-3)
    draws.add_argument("--precision", default="bf16-mixed")
    options = parser.parse_args()
    if options.command == "table":
        print(table(options.rows))
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    run(options)


if __name__ == "__main__":
    main()

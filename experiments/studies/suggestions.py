"""What ``ncfinetune suggest`` proposes, against fitting every block by every method and testing each.

A try draws training images by its seed. `suggest.suggest` sees these alone, and tries blocks (suggest) or none
(expansion). The exhaustive search fits layer FT and SCL FT at every block, full FT and the closed forms on all of them,
with the same learning rate, epochs and batch size, and tests them; the best test accuracy among so many is flattered by
chance. The measures see the training images alone too, and each names the block that is best by one number:
cross-validated NC1 and k-NN accuracy of the block's pooled output, and RGN, the norm of the gradient over that of the
weights (Lee et al. 2023, arXiv 2210.11466, section 3.2). The method that tests best in all other draws of the same size
is the best fixed choice, which knows the test labels of those; a random block has the mean accuracy of all. Rows are
written as they come; what a file has already is not run again. Seconds are those of the processor.

    python experiments/studies/suggestions.py run digits --checkpoint WEIGHTS --out rows.csv [--shots 5 10 20]
    python experiments/studies/suggestions.py run ROOT --checkpoint WEIGHTS --size 128 --out rows.csv
    python experiments/studies/suggestions.py run digits --checkpoint WEIGHTS --search exhaustive --out exhaustive.csv
    python experiments/studies/suggestions.py table rows.csv [more.csv]
    python experiments/studies/suggestions.py paired rows.csv [more.csv]

``digits`` are the handwritten digits 5-9 for the network that experiments/digits/pretrain.yaml trained on 0-4; ROOT is
a folder of images as `datamodules.ImageFolder` takes it, with a test part.
"""

import argparse
import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from study import appending, mean_and_error, so_far
from study import rows as rows_of
from torch import Tensor

from ncfinetune import Backbone, sample_statistics
from ncfinetune.bank import Bank, Source, fill, read_images
from ncfinetune.datamodules import Digits, ImageFolder
from ncfinetune.folds import FoldMoments, folds_of
from ncfinetune.layers import PENULTIMATE
from ncfinetune.probes import lda, nearest_mean, ridge
from ncfinetune.skips import choose_skips
from ncfinetune.suggest import Row, choose, suggest
from ncfinetune.transferability import knn_accuracy
from ncfinetune.trials import Bench, Method, Trial

DIGITS = {"name": "resnet18", "stem": "cifar", "in_chans": 1, "channels": [16, 32, 64, 128]}
FIELDS = ("data", "shots", "seed", "search", "method", "predicted", "error", "gain", "gain_error", "trained")
FIELDS += ("fitted", "test", "seconds")
SUGGESTIONS = ("suggest", "expansion")
SEARCHES = (*SUGGESTIONS, "measures", "exhaustive")
MEASURES = ("RGN", "k-NN", "cross-validated NC1")
OTHERS = "best in the other tries"
RULES = (*SUGGESTIONS, OTHERS, "closed form", "last block", "middle block", "random block", "full FT", *MEASURES)


def trainer(epochs: int = 1, **arguments: Any) -> Trainer:
    quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **arguments}
    return Trainer(
        max_epochs=epochs, limit_val_batches=0, devices=1, accelerator="cpu", enable_model_summary=False, **quiet
    )


def backbone_of(options: argparse.Namespace) -> Backbone:
    """The network that was pre-trained; that of the digits is always the same."""
    spec = DIGITS if options.data == "digits" else yaml.safe_load(options.backbone)
    return Backbone(**spec, checkpoint=options.checkpoint)


def drawn(options: argparse.Namespace, shots: int, seed: int) -> Any:
    if options.data == "digits":
        return Digits(classes=[5, 6, 7, 8, 9], shots=shots, seed=seed, batch_size=25)
    normal = {"mean": options.mean, "std": options.std}
    return ImageFolder(root=options.data, image_size=options.size, shots=shots, seed=seed, batch_size=16, **normal)


def tested(data: Any) -> tuple[Tensor, Tensor]:
    """Test images as they are evaluated, and labels."""
    data.setup("test")
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader()]
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def exhaustive(bench: Bench, features: dict[str, Tensor], test: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Test accuracy and seconds of every method; the test images are fold 0 of the bench."""
    train, held = bench.folds == 1, bench.folds == 0
    found = {}
    layers = {name: rows for name, rows in features.items() if name != PENULTIMATE}
    skips = choose_skips(features[PENULTIMATE], layers, bench.labels[train], 3)
    closed = {"nearest mean": nearest_mean, "LDA": lda, "ridge": ridge, "ridge, skips": ridge}
    for name, fit in closed.items():
        names = [PENULTIMATE, *skips] if name == "ridge, skips" else [PENULTIMATE]
        start = time.process_time()
        head = fit(torch.cat([features[n] for n in names], 1), bench.labels[train], bench.num_classes)
        right = head.scores(torch.cat([test[n] for n in names], 1)).argmax(1) == bench.labels[held]
        found[name] = float(right.double().mean()), time.process_time() - start
    methods = [Method("full FT", {"train": "all", "head_init": "ridge"})]
    for block in layers:
        methods.append(Method(f"layer FT {block}", {"train": block, "head_init": "ridge"}))
        methods.append(Method(f"SCL FT {block}", {"train": block, "skip_from": block, "head_init": "ridge"}))
    for method in methods:
        trial, start = Trial.empty(len(bench.labels)), time.process_time()
        bench.run(method, trial, 0)
        found[method.name] = float(trial.right[held].mean()), time.process_time() - start
    return found


def measured(backbone: Backbone, images: Tensor, bank: Bank, layers: list[str]) -> Iterator[tuple[str, float]]:
    """Each measure of each block, under names like ``RGN layer1.0``; the block with the highest is the one to tune."""
    labels, classes = bank.labels, bank.num_classes
    blocks = [name for name in layers if name != PENULTIMATE and any(True for _ in backbone.layer(name).parameters())]
    head = ridge(bank.of("net", PENULTIMATE), labels, classes)
    weight, bias = (part.float() for part in head.logits(labels))
    network = backbone.eval().requires_grad_(True)
    for part, own in zip(images.split(32), labels.split(32), strict=True):
        scores = network(part) @ weight.T + bias
        (torch.nn.functional.cross_entropy(scores, own, reduction="sum") / len(labels)).backward()
    for name in blocks:
        tensors = list(backbone.layer(name).parameters())
        gradient = torch.cat([tensor.grad.flatten() for tensor in tensors])
        yield f"RGN {name}", float(gradient.norm() / torch.cat([t.detach().flatten() for t in tensors]).norm())
        features = bank.of("net", name)
        yield f"k-NN {name}", float(knn_accuracy(features, labels, classes))
        folds = FoldMoments(classes)
        folds.update(features, labels)
        yield f"cross-validated NC1 {name}", -float(folds.nc1())
    network.zero_grad()


def attempt(options: argparse.Namespace, search: str, shots: int, seed: int) -> list[dict[str, Any]]:
    """The rows of a search."""
    backbone = backbone_of(options)
    data, source = drawn(options, shots, seed), Source.of("net", backbone)
    known = {"data": Path(options.data).name, "shots": shots, "seed": seed, "search": search}
    start = time.process_time()
    bank = fill(trainer(), [source], data, {}, 10**6)
    images, _ = read_images(trainer(), backbone, data, 10**6)
    how = {"batch_size": data.batch_size, "lr": options.lr, "epochs": options.epochs, "trainer": trainer}
    if search in SUGGESTIONS:
        blocks = options.blocks if search == "suggest" else 0
        bench = Bench(backbone, images, bank.labels, bank.num_classes, folds_of(bank.labels, 3), **how)
        rows = suggest(source, bank, bench, trainer(inference_mode=False), blocks, full=options.full and blocks > 0)
        seconds = time.process_time() - start
        return [
            {**known, "method": row.method, "predicted": row.accuracy, "error": row.error}
            | {"gain": row.gain, "gain_error": row.gain_error, "seconds": seconds}
            | {"trained": row.trained, "fitted": int(row.seconds is not None)}
            for row in rows
        ]
    if search == "measures":
        found = list(measured(backbone, images, bank, source.layers))
        seconds = time.process_time() - start
        return [{**known, "method": name, "predicted": value, "seconds": seconds} for name, value in found]
    test_images, test_labels = tested(data)
    backbone.eval()
    with torch.no_grad():
        parts = [backbone.stages(batch, source.layers) for batch in test_images.split(64)]
    test = {name: torch.cat([part[name] for part in parts]) for name in source.layers}
    features = {name: bank.of("net", name) for name in source.layers}
    labels, folds = torch.cat([bank.labels, test_labels]), torch.cat([torch.ones_like(bank.labels), 0 * test_labels])
    bench = Bench(backbone, torch.cat([images, test_images]), labels, bank.num_classes, folds, **how)
    found = exhaustive(bench, features, test)
    return [{**known, "method": name, "test": accuracy, "seconds": took} for name, (accuracy, took) in found.items()]


def run(options: argparse.Namespace) -> None:
    name = Path(options.data).name
    done = {
        tuple(row[key] for key in ("search", "shots", "seed"))
        for row in so_far(options.out, FIELDS)
        if row["data"] == name
    }
    with appending(options.out, FIELDS) as append:
        for seed in options.seeds:
            for shots in options.shots:
                for search in options.search:
                    if (search, str(shots), str(seed)) not in done:
                        append(*attempt(options, search, shots, seed))
                        print(search, shots, seed, flush=True)


def whole(paths: list[Path]) -> dict[tuple[str, int], list[list[dict[str, str]]]]:
    """Rows of each try that has all searches, by data and shots; a later file's search replaces an earlier file's."""
    known: dict[tuple[str, int, str], dict[str, list[dict[str, str]]]] = defaultdict(dict)
    for path in paths:
        own: dict[tuple[str, int, str, str], list[dict[str, str]]] = defaultdict(list)
        for row in rows_of(path):
            own[row["data"], int(row["shots"]), row["seed"], row["search"]].append(row)
        for (*name, search), found in own.items():
            known[tuple(name)][search] = found
    tries: dict[tuple[str, int], list[list[dict[str, str]]]] = defaultdict(list)
    for (data, shots, _), searches in known.items():
        if set(searches) == set(SEARCHES):
            tries[data, shots].append([row for found in searches.values() for row in found])
    return tries


def table(paths: list[Path]) -> str:
    """Regret and prediction of each rule, by data and shots."""
    lines = [
        "| data | shots | tries | rule | regret, points | within 0.5 | predicted less tested | within 3 | cost % |",
        "|" + "---|" * 9,
    ]
    for (data, shots), members in sorted(whole(paths).items()):
        for rule in RULES if len(members) > 1 else (rule for rule in RULES if rule != OTHERS):
            outcomes = [outcome(rule, rows, [other for other in members if other is not rows]) for rows in members]
            regret = [100 * (best - got) for best, got, _, _ in outcomes]
            cells = [data, shots, len(members), rule, mean_and_error(regret, 1), share(r <= 0.5 for r in regret)]
            if rule in SUGGESTIONS:
                off = [100 * (predicted - got) for _, got, predicted, _ in outcomes]
                cost = statistics.median(c for *_, c in outcomes)
                cells += [mean_and_error(off, 1), share(abs(o) <= 3 for o in off), f"{100 * cost:.0f}"]
            else:
                cells += ["", "", ""]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def paired(paths: list[Path]) -> str:
    """What each rule tests worse than suggest, over all tries of all data, and its t-test."""
    tries = [(rows, [o for o in members if o is not rows]) for members in whole(paths).values() for rows in members]
    lines = ["| rule | tries | points below suggest | p |", "|" + "---|" * 4]
    for rule in RULES[1:]:
        own = [one for one in tries if rule != OTHERS or one[1]]
        below = [100 * (outcome(RULES[0], *one)[1] - outcome(rule, *one)[1]) for one in own]
        p = sample_statistics.paired(below)[2]
        lines.append(f"| {rule} | {len(below)} | {mean_and_error(below, 1)} | {p:.2g} |")
    return "\n".join(lines)


def tested_in(rows: list[dict[str, str]]) -> dict[str, float]:
    """Test accuracy of each method of an exhaustive search."""
    return {row["method"]: float(row["test"]) for row in rows if row["search"] == "exhaustive"}


def row_of(row: dict[str, str]) -> Row:
    """A row of suggest; the choice is made anew, so that a rule of choosing takes no fits to judge."""
    gains = {name: float(row[name]) if row[name] else None for name in ("gain", "gain_error")}
    numbers = {"accuracy": float(row["predicted"]), "error": float(row["error"]), "trained": int(row["trained"])}
    return Row(row["method"], **numbers, **gains, seconds=1.0 if row["fitted"] == "1" else None, knobs={})


def outcome(
    rule: str, rows: list[dict[str, str]], others: list[list[dict[str, str]]]
) -> tuple[float, float, float, float]:
    """Best test accuracy of all, that of what the rule takes, what it predicted, and its share of the search's time."""
    test = tested_in(rows)
    best, blocks = max(test.values()), [name for name in test if name.startswith("layer FT")]
    took = sum(float(row["seconds"]) for row in rows if row["search"] == "exhaustive")
    if rule in SUGGESTIONS:
        suggested = choose([row_of(row) for row in rows if row["search"] == rule])
        name = suggested.method if suggested.method in test else "ridge, skips"
        seconds = next(float(row["seconds"]) for row in rows if row["search"] == rule)
        return best, test[name], suggested.accuracy, seconds / took
    if rule in MEASURES:
        values = {row["method"]: float(row["predicted"]) for row in rows if row["search"] == "measures"}
        highest = max((name for name in values if name.startswith(f"{rule} ")), key=values.__getitem__)
        return best, test[highest.replace(rule, "layer FT")], 0.0, 0.0
    if rule == OTHERS:
        elsewhere = [tested_in(other) for other in others]
        name = max(test, key=lambda name: sum(accuracies[name] for accuracies in elsewhere))
        return best, test[name], 0.0, 0.0
    names = {
        "closed form": "ridge, skips",
        "last block": blocks[-1],
        "middle block": blocks[(len(blocks) - 1) // 2],
        "full FT": "full FT",
    }
    got = statistics.mean(map(test.__getitem__, blocks)) if rule == "random block" else test[names[rule]]
    return best, got, 0.0, 0.0


def share(hits: Any) -> str:
    hits = list(hits)
    return f"{sum(hits)} of {len(hits)}"


def add_options(parser: argparse.ArgumentParser, seeds: int) -> None:
    """Options of data, network, draws and fits, which other studies of the same draws share."""
    parser.add_argument("data", help="digits, or a folder of images")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--backbone", default="{name: mobilenetv2_100, pad_type: same}", help="arguments of a Backbone")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shots", nargs="+", type=int, default=[5, 10, 20])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(seeds)))
    parser.add_argument("--size", type=int, default=224, help="pixels of an edge of ROOT's images")
    parser.add_argument("--mean", nargs=3, type=float, default=[0.5] * 3, help="of ROOT's images, as the network saw")
    parser.add_argument("--std", nargs=3, type=float, default=[0.5] * 3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("table", "paired"):
        commands.add_parser(name).add_argument("rows", type=Path, nargs="+")
    tries = commands.add_parser("run")
    add_options(tries, seeds=20)
    tries.add_argument("--search", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    tries.add_argument("--blocks", type=int, default=3)
    tries.add_argument("--full", action="store_true")
    options = parser.parse_args()
    if options.command != "run":
        print({"table": table, "paired": paired}[options.command](options.rows))
        return
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    run(options)


if __name__ == "__main__":
    main()

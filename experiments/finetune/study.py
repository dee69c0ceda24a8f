"""Four ways of fine-tuning over blocks, numbers of labels, seeds and learning rates, on images in class folders.

ROOT has ``train/CLASS/*`` and ``val/CLASS/*``, all images of one size. Of ``val`` half, always the same, chooses
learning rate and block; the other half is the test set. A seed draws the training images and the classifier's start.
Every run takes the same number of steps, and every method the same learning rates; times are CPU seconds of `fit`, one
thread. Rows are written as they come; what a file has already is not run again, so that a study that broke off goes on.

    python experiments/finetune/study.py run ROOT --checkpoint WEIGHTS --out rows.csv [--shots 5 20 80] [--seeds 0 1 2]
    python experiments/finetune/study.py table rows.csv
"""

import argparse
import csv
import itertools
import math
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder

from ncfinetune import FineTuner
from ncfinetune.collapse import class_moments, nc1

METHODS: dict[str, dict[str, Any]] = {
    "linear probe": {"train": "none"},
    "layer FT": {"train": "BLOCK"},
    "SCL FT": {"train": "BLOCK", "skip_from": "BLOCK"},
    "SCL FT, gradient through the skip": {"train": "BLOCK", "skip_from": "BLOCK", "skip_gradient": "skip"},
    "full FT": {"train": "all"},
}
RUN = ("method", "block", "shots", "seed", "lr", "steps", "batch_size", "precision")
FIELDS = (*RUN, "trained", "val", "test", "nc1", "seconds")
Part = tuple[Tensor, Tensor]


def read(folder: Path) -> Part:
    images = ImageFolder(str(folder))
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image, _ in images]
    return torch.stack(pixels), torch.tensor(images.targets)


def few(part: Part, shots: int, seed: int) -> Part:
    """Images of each class, nested: those of fewer shots are among those of more."""
    images, labels = part
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[labels[order] == k][:shots] for k in labels.unique()])
    return images[chosen], labels[chosen]


def halves(part: Part) -> tuple[Part, Part]:
    images, labels = part
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rank = torch.cat([torch.arange(int((labels == k).sum())) for k in labels.unique()])
    chosen = torch.cat([order[labels[order] == k] for k in labels.unique()])
    return tuple((images[c], labels[c]) for c in (chosen[rank % 2 == 0], chosen[rank % 2 == 1]))


class Images(LightningDataModule):
    """Parts of a data set in memory, without augmentation."""

    def __init__(self, train: Part, val: Part, test: Part, batch_size: int, mean: float, std: float) -> None:
        super().__init__()
        self.parts = {"train": train, "val": val, "test": test}
        self.batch_size, self.mean, self.std = batch_size, mean, std
        self.num_classes = int(train[1].max()) + 1

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", shuffle=True)

    def train_plain_dataloader(self) -> DataLoader[Any]:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def on_after_batch_transfer(self, batch: Part, dataloader_idx: int) -> Part:
        return (batch[0].float() / 255 - self.mean) / self.std, batch[1]

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*self.parts[part]), batch_size=self.batch_size, shuffle=shuffle)


def tune(options: argparse.Namespace, parts: tuple[Part, Part, Part], run: dict[str, Any]) -> dict[str, Any]:
    """One run, as a row."""
    seed_everything(run["seed"], verbose=False)
    data = Images(few(parts[0], run["shots"], run["seed"]), *parts[1:], run["batch_size"], options.mean, options.std)
    epochs = math.ceil(run["steps"] / len(data.train_dataloader()))
    knobs = {key: run["block"] if value == "BLOCK" else value for key, value in METHODS[run["method"]].items()}
    model = FineTuner(
        data.num_classes,
        {"name": options.backbone, "channels_last": True},
        options.checkpoint,
        optimizer=lambda p: torch.optim.AdamW(p, lr=run["lr"], weight_decay=0.01),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, epochs),
        cache="none" if run["method"] == "full FT" else "memory",
        **knobs,
    )
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "precision": run["precision"],
        "devices": 1,
    }
    trainer = Trainer(max_epochs=epochs, limit_val_batches=0, num_sanity_val_steps=0, **quiet)
    start = time.process_time()
    trainer.fit(model, data)
    seconds = time.process_time() - start
    tester = Trainer(**quiet)
    return {
        **run,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "val": tester.validate(model, data, verbose=False)[0]["val/acc"],
        "test": tester.test(model, data, verbose=False)[0]["test/acc"],
        "nc1": collapse(model, data),
        "seconds": round(seconds, 1),
    }


@torch.no_grad()
def collapse(model: FineTuner, data: Images) -> float:
    """NC1 of what reaches the classifier of the training images."""
    caught: list[Tensor] = []
    handle = model.classifier.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    model.eval()
    for batch in data.train_plain_dataloader():
        model(data.on_after_batch_transfer(batch, 0)[0])
    handle.remove()
    return nc1(class_moments(torch.cat(caught), data.parts["train"][1], data.num_classes)).item()


def planned(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Runs, cheap methods first, all seeds of one thing together."""
    kind = {name: getattr(options, name) for name in ("steps", "batch_size", "precision")}
    for method, shots in itertools.product(options.methods, options.shots):
        blocks = options.blocks if "BLOCK" in METHODS[method].values() else [""]
        for block, lr, seed in itertools.product(blocks, options.rates, options.seeds):
            yield {"method": method, "block": block, "shots": shots, "seed": seed, "lr": lr, **kind}


def study(options: argparse.Namespace) -> None:
    val, test = halves(read(options.root / "val"))
    parts = (read(options.root / "train"), val, test)
    done = {tuple(row[name] for name in RUN) for row in rows(options.out)} if options.out.exists() else set()
    with options.out.open("a", newline="") as file:
        table = csv.DictWriter(file, FIELDS)
        if not done:
            table.writeheader()
        for run in planned(options):
            if tuple(str(run[name]) for name in RUN) not in done:
                row = tune(options, parts, run)
                table.writerow(row)
                file.flush()
                print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(path: Path) -> str:
    """Mean and standard deviation over seeds of each block, at the learning rate of the best validation accuracy.

    The block that validation chooses, too, is marked.
    """
    runs: dict[tuple[int, int, str], dict[tuple[str, ...], list[dict[str, str]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows(path):
        setting = tuple(row[name] for name in ("lr", "steps", "batch_size", "precision"))
        runs[int(row["shots"]), list(METHODS).index(row["method"]), row["block"]][setting].append(row)
    best = {key: max(settings.values(), key=validation) for key, settings in runs.items()}
    lines = ["| shots | method | block | lr | seeds | trained | validation % | test % | NC1 | s |", "|" + "---|" * 10]
    for (shots, number, block), seeds in sorted(best.items()):
        rivals = [value for key, value in best.items() if key[:2] == (shots, number)]
        mark = " (chosen)" if len(rivals) > 1 and seeds is max(rivals, key=validation) else ""
        trained = f"{int(seeds[0]['trained']):,}"
        percent = [spread([100 * float(row[name]) for row in seeds], ".1f") for name in ("val", "test")]
        within = spread([float(row["nc1"]) for row in seeds], ".3f")
        took = statistics.fmean(float(row["seconds"]) for row in seeds)
        cells = [shots, list(METHODS)[number], block + mark, seeds[0]["lr"], len(seeds), trained, *percent, within]
        lines.append(f"| {' | '.join(map(str, cells))} | {took:.0f} |")
    return "\n".join(lines)


def validation(seeds: list[dict[str, str]]) -> float:
    return statistics.fmean(float(row["val"]) for row in seeds)


def spread(values: list[float], form: str) -> str:
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return format(statistics.fmean(values), form) + deviation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table").add_argument("rows", type=Path)
    run = commands.add_parser("run")
    run.add_argument("root", type=Path)
    run.add_argument("--checkpoint", required=True)
    run.add_argument("--backbone", default="mobilenetv2_100")
    run.add_argument("--mean", type=float, default=0.5)
    run.add_argument("--std", type=float, default=0.5)
    run.add_argument("--out", type=Path, default=Path("rows.csv"))
    run.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    run.add_argument("--blocks", nargs="+", default=["blocks.3.1", "blocks.4.1", "blocks.5.1", "blocks.6.0"])
    run.add_argument("--shots", nargs="+", type=int, default=[5, 20, 80])
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run.add_argument("--rates", nargs="+", type=float, default=[3e-4, 3e-3])
    run.add_argument("--steps", type=int, default=150, help="training steps a run, rounded up to epochs")
    run.add_argument("--batch-size", type=int, default=32)
    run.add_argument("--precision", default="bf16-mixed")
    options = parser.parse_args()
    if options.command == "table":
        print(table(options.rows))
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    study(options)


if __name__ == "__main__":
    main()

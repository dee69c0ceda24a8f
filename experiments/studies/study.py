"""Ways of fine-tuning over blocks, numbers of labels, seeds and learning rates, on images in class folders.

ROOT has ``train/CLASS/*`` and ``val/CLASS/*``, all images of one size unless ``--size`` makes them so. A seed draws the
training images and the classifier's start. ``--validation`` says which images choose learning rate and block, and so
which are left to test:

- ``half``: half of ``val``, always the same; the other half is the test set. `table` shows the best rates and blocks.
- ``rest``: images of ``train`` that are not drawn, 20 per class at most; all of ``val`` tests. So are rates chosen by
  seeds that the next way leaves out.
- ``none``: rates and blocks are fixed beforehand, and all of ``val`` tests; where all of ``train`` is drawn, a seed
  splits all images anew into as many, so that seeds differ. `paired` compares the methods with ridge regression, or
  with the one named, on the same splits; rows of closed forms are those of closed_forms.py.

Every run takes the same number of steps. Times are CPU seconds of one thread: those of training, refits included, and
one pass of the network over the training images where a method has a cache or a closed form as its start. What frozen
layers make of images is stored on disk and shared between runs. Rows are written as they come; what a file has already
is not run again, so that a study that broke off goes on. Where methods differ in their rates or in the number of their
splits, ``--plan`` has a file say which runs there are.

    python experiments/studies/study.py run ROOT --checkpoint WEIGHTS --out rows.csv [--shots 5 20 80] [--seeds 0 1 2]
    python experiments/studies/study.py table rows.csv
    python experiments/studies/study.py paired closed_forms.csv rows.csv [--against METHOD]
"""

import argparse
import csv
import itertools
import math
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import InterpolationMode, Resize

from ncfinetune import Backbone, FineTuner, sample_statistics
from ncfinetune.calibration import calibration_error
from ncfinetune.collapse import class_moments, nc1

LAYER = {"train": "BLOCK"}
SCL = {"train": "BLOCK", "skip_from": "BLOCK"}
START, REFIT = {"head_init": "ridge"}, {"refit": "ridge"}
METHODS: dict[str, dict[str, Any]] = {
    "linear probe": {"train": "none"},
    "layer FT": LAYER,
    "layer FT, refit": LAYER | REFIT,
    "layer FT, ridge start": LAYER | START,
    "layer FT, ridge start, refit": LAYER | START | REFIT,
    "SCL FT": SCL,
    "SCL FT, refit": SCL | REFIT,
    "SCL FT, ridge start": SCL | START,
    "SCL FT, ridge start, refit": SCL | START | REFIT,
    # Skips that lower the leave-one-out error, as the closed form has them, and the block's batch-norm statistics kept.
    "SCL FT, skips chosen": {"train": ["BLOCK.*.weight", "BLOCK.*.bias"], "skip_from": "auto", "max_skips": 3}
    | {"skip_join": "concat"}
    | START,
    "SCL FT, gradient through the skip": SCL | {"skip_gradient": "skip"},
    "BitFit": {"train": "*.bias"},
    "norm tuning": {"train": "*bn*"},
    "LoRA": {"train": "*lora_*", "lora": {"r": 8}},
    "full FT": {"train": "all"},
    # A probe first, then everything (Kumar et al. 2022, arXiv 2202.10054), with ridge regression as the probe.
    "LP-FT": {"train": "all"} | START,
}
RUN = ("method", "block", "shots", "seed", "lr", "steps", "batch_size", "precision")
SETTING = ("method", "block", "lr", "steps", "batch_size", "precision")
FIELDS = (*RUN, "trained", "val", "test", "calibration", "nc1", "seconds")
MOST_REST = 20  # images per class that validate under ``rest``: ten classes cost half of what the test images do
TIMED = 64  # images, at most, that tell what a pass of the network costs
BACKBONE = "a timm name, or arguments of a Backbone as YAML"
Part = tuple[Tensor, Tensor]
Row = dict[str, str]


def read(root: Path, size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of the images of ``train`` and then of ``val``, the labels of the former and those of the latter."""
    resize = None if size is None else Resize((size, size), InterpolationMode.BICUBIC)
    parts = [ImageFolder(str(root / part), resize) for part in ("train", "val")]
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for part in parts for image, _ in part]
    return torch.stack(pixels), *(torch.tensor(part.targets) for part in parts)


def drawn(labels: Tensor, shots: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of so many images of each class, and of the rest; those of fewer shots are among those of more."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = [order[labels[order] == k] for k in labels.unique()]
    return torch.cat([own[:shots] for own in classes]), torch.cat([own[shots:] for own in classes])


def split(train: Tensor, val: Tensor, shots: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of training and of test images, by the labels of ``train`` and then those of ``val``."""
    if shots < int(train.bincount().min()):
        return drawn(train, shots, seed)[0], len(train) + torch.arange(len(val))
    return drawn(torch.cat([train, val]), shots, seed)


def divide(way: str, train: Tensor, val: Tensor, shots: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of training, validation and test images, as `split` counts them."""
    if way == "none":
        chosen, test = split(train, val, shots, seed)
        return chosen, chosen[:0], test
    chosen, rest = drawn(train, shots, seed)
    if way == "half":
        return chosen, *(len(train) + half for half in halves(val))
    if not len(rest):
        raise SystemExit(f"--validation rest: with {shots} images per class there is no rest; take fewer")
    return chosen, rest[drawn(train[rest], MOST_REST, seed)[0]], len(train) + torch.arange(len(val))


def halves(labels: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rank = torch.cat([torch.arange(int((labels == k).sum())) for k in labels.unique()])
    chosen = torch.cat([order[labels[order] == k] for k in labels.unique()])
    return chosen[rank % 2 == 0], chosen[rank % 2 == 1]


class Images(LightningDataModule):
    """Images in memory, without augmentation; all that do not train are validated."""

    def __init__(self, train: Part, others: Part, batch_size: int, mean: float, std: float) -> None:
        super().__init__()
        self.train, self.others = train, others
        self.batch_size, self.mean, self.std = batch_size, mean, std
        self.num_classes = int(train[1].max()) + 1

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train, shuffle=True)

    def train_plain_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.others)

    def on_after_batch_transfer(self, batch: Part, dataloader_idx: int) -> Part:
        return (batch[0].float() / 255 - self.mean) / self.std, batch[1]

    def _loader(self, part: Part, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*part), batch_size=self.batch_size, shuffle=shuffle)


class Watch(Callback):
    """CPU seconds of training without validation, and the class probabilities that validation found."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._logits: list[Tensor] = []

    @property
    def probabilities(self) -> Tensor:
        return torch.cat(self._logits).float().softmax(1)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds -= time.process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds += time.process_time()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds += time.process_time()
        self._handle = pl_module.classifier.register_forward_hook(self._keep)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._handle.remove()
        self.seconds -= time.process_time()

    def _keep(self, module: nn.Module, inputs: Any, logits: Tensor) -> None:
        self._logits.append(logits)


def tunes_block(method: str) -> bool:
    return "BLOCK" in str(METHODS[method]["train"])


def is_cached(method: str) -> bool:
    """Whether what frozen layers make of the images is kept on disk."""
    return METHODS[method]["train"] == "none" or tunes_block(method)


def in_block(value: Any, block: str) -> Any:
    """A knob of a method, with the name of the block that it tunes."""
    if isinstance(value, list):
        return [in_block(part, block) for part in value]
    return value.replace("BLOCK", block) if isinstance(value, str) else value


def spec_of(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a Backbone, but its checkpoint."""
    named = yaml.safe_load(options.backbone)
    return {"channels_last": True, **({"name": named} if isinstance(named, str) else named)}


def model_of(options: argparse.Namespace, run: dict[str, Any], classes: int, epochs: int) -> FineTuner:
    """The model of a run."""
    knobs = {key: in_block(value, run["block"]) for key, value in METHODS[run["method"]].items()}
    if run["method"] == "norm tuning":
        knobs["train"] = options.norm_modules
    if is_cached(run["method"]):
        knobs |= {"cache": "disk", "cache_dir": str(options.cache_dir)}
    backbone = spec_of(options)
    if "lora" in knobs:
        backbone["lora"] = knobs.pop("lora") | {"target_modules": options.lora_modules}
    return FineTuner(
        classes,
        backbone,
        options.checkpoint,
        optimizer=lambda p: torch.optim.AdamW(p, lr=run["lr"], weight_decay=0.01),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, epochs),
        **knobs,
    )


def tune(options: argparse.Namespace, parts: tuple[Part, Part, Part], run: dict[str, Any]) -> dict[str, Any]:
    """One run, as a row."""
    seed_everything(run["seed"], verbose=False)
    train, *others = parts
    images, labels = (torch.cat(both) for both in zip(*others, strict=True))
    data = Images(train, (images, labels), run["batch_size"], mean=options.mean, std=options.std)
    epochs = math.ceil(run["steps"] / len(data.train_dataloader()))
    model = model_of(options, run, data.num_classes, epochs)
    watch = Watch()
    trainer = Trainer(
        max_epochs=epochs,
        check_val_every_n_epoch=epochs,
        num_sanity_val_steps=0,
        callbacks=watch,
        precision=run["precision"],
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    right = (watch.probabilities.argmax(1) == labels).double()
    validated = len(others[0][1])
    once = is_cached(run["method"]) or "head_init" in METHODS[run["method"]]
    passes = len(train[1]) * options.pass_seconds if once else 0
    return {
        **run,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "val": right[:validated].mean().item() if validated else "",
        "test": right[validated:].mean().item(),
        "calibration": calibration_error(watch.probabilities[validated:], labels[validated:]).item(),
        "nc1": collapse(model, data) if options.nc1 else "",
        "seconds": round(watch.seconds + passes, 2),
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
    return nc1(class_moments(torch.cat(caught), data.train[1], data.num_classes)).item()


def planned(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Runs of the plan in its order; without one cheap methods first, all seeds of one thing together.

    Where a plan leaves the block out it is the first of ``--blocks``, so that it serves several networks.
    """
    if options.plan is not None:
        for row in rows(options.plan):
            numbers = {name: int(row[name]) for name in ("shots", "seed", "steps", "batch_size")}
            block = row["block"] or (options.blocks[0] if tunes_block(row["method"]) else "")
            yield {**{name: row[name] for name in RUN}, **numbers, "lr": float(row["lr"]), "block": block}
        return
    kind = {name: getattr(options, name) for name in ("steps", "batch_size", "precision")}
    for method, shots in itertools.product(options.methods, options.shots):
        blocks = options.blocks if tunes_block(method) else [""]
        for block, lr, seed in itertools.product(blocks, options.rates, options.seeds):
            yield {"method": method, "block": block, "shots": shots, "seed": seed, "lr": lr, **kind}


def pass_seconds(options: argparse.Namespace, backbone: Backbone, images: Tensor) -> float:
    """CPU seconds in which the network runs over an image."""
    timed = images[:TIMED]
    batches = ((timed.float() / 255 - options.mean) / options.std).split(options.batch_size)
    with torch.no_grad(), torch.autocast("cpu", enabled=options.precision == "bf16-mixed"):
        backbone(batches[0])
        start = time.process_time()
        for batch in batches:
            backbone(batch)
    return (time.process_time() - start) / len(timed)


def study(options: argparse.Namespace) -> None:
    images, train, val = read(options.root, options.size)
    labels = torch.cat([train, val])
    backbone = Backbone(**spec_of(options), checkpoint=options.checkpoint).eval()
    options.pass_seconds = pass_seconds(options, backbone, images)
    done = {tuple(row[name] for name in RUN) for row in so_far(options.out, FIELDS)}
    with appending(options.out, FIELDS) as append:
        for run in planned(options):
            if tuple(str(run[name]) for name in RUN) not in done:
                chosen = divide(options.validation, train, val, run["shots"], run["seed"])
                row = tune(options, tuple((images[part], labels[part]) for part in chosen), run)
                append(row)
                print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)


def so_far(path: Path, fields: Sequence[str]) -> list[Row]:
    """Rows of a study that goes on; none if it begins."""
    found = rows(path) if path.exists() else []
    if found and list(found[0]) != list(fields):
        raise SystemExit(f"{path} has other columns than {', '.join(fields)}; give --out another file")
    return found


@contextmanager
def appending(path: Path, fields: Sequence[str]) -> Iterator[Callable[..., None]]:
    """Gives what writes rows behind those of a study so far, at once, so that one that breaks off leaves its rows."""
    with path.open("a", newline="") as file:
        table = csv.DictWriter(file, fields)
        if not file.tell():
            table.writeheader()

        def append(*more: Mapping[str, Any]) -> None:
            table.writerows(more)
            file.flush()

        yield append


def rows(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(path: Path) -> str:
    """Mean and standard deviation over seeds of each block, at the learning rate of the best validation accuracy.

    The block that validation chooses, too, is marked.
    """
    runs: dict[tuple[int, int, str], dict[tuple[str, ...], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows(path):
        setting = tuple(row[name] for name in ("lr", "steps", "batch_size", "precision"))
        runs[int(row["shots"]), list(METHODS).index(row["method"]), row["block"]][setting].append(row)
    best = {key: max(settings.values(), key=validation) for key, settings in runs.items()}
    lines = ["| shots | method | block | lr | seeds | trained | validation % | test % | NC1 | s |", "|" + "---|" * 10]
    for (shots, number, block), seeds in sorted(best.items()):
        rivals = [value for key, value in best.items() if key[:2] == (shots, number)]
        mark = " (chosen)" if len(rivals) > 1 and seeds is max(rivals, key=validation) else ""
        trained = f"{int(seeds[0]['trained']):,}"
        percent = [mean_and_deviation([100 * float(row[name]) for row in seeds], ".1f") for name in ("val", "test")]
        within = mean_and_deviation([float(row["nc1"]) for row in seeds], ".3f")
        took = statistics.fmean(float(row["seconds"]) for row in seeds)
        cells = [shots, list(METHODS)[number], block + mark, seeds[0]["lr"], len(seeds), trained, *percent, within]
        lines.append(f"| {' | '.join(map(str, cells))} | {took:.0f} |")
    return "\n".join(lines)


def paired(paths: list[Path], against: str = "ridge") -> str:
    """Means over splits and their standard errors, and those of the gains on a method on the same splits.

    p is that of Student's paired t-test, two-sided.
    """
    head = f"shots | method | block | lr | splits | test % | gain on {against} | p | calibration error % | trained"
    lines = [f"| {head} | CPU s |", "|" + "---|" * 11]
    for shots, setting, own, gains in matched(paths, against):
        test, error = ([100 * float(row[name]) for row in own] for name in ("test", "calibration"))
        found, gain, off = map(mean_and_error, (test, gains, error))
        p = "" if setting[0] == against else f"{sample_statistics.paired(gains)[2]:.2g}"
        trained = statistics.fmean(float(row["trained"]) for row in own)
        took = statistics.median(float(row["seconds"]) for row in own)
        cells = [shots, *setting[:3], len(own), found, gain, p, off, f"{trained:,.0f}", f"{took:.3g}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def matched(paths: list[Path], against: str) -> Iterator[tuple[int, tuple[str, ...], list[Row], list[float]]]:
    """Images per class, setting, its rows, and their gains in points on a method on the same splits."""
    runs: dict[int, dict[tuple[str, ...], dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in (row for path in paths for row in rows(path)):
        if row["val"]:
            raise SystemExit("expected rows of --validation none, which are tested on the same images as closed forms")
        runs[int(row["shots"])][tuple(row[name] for name in SETTING)][row["seed"]] = row
    for shots, settings in sorted(runs.items()):
        rivals = [splits for setting, splits in settings.items() if setting[0] == against]
        if len(rivals) != 1:
            raise SystemExit(f"expected {against} with one setting at {shots} images, got it with {len(rivals)}")
        rival = rivals[0]
        for setting in sorted(settings, key=order_of):
            splits = settings[setting]
            if alone := splits.keys() - rival:
                raise SystemExit(
                    f"expected a row of {against} for each split, got none at {shots} images for {sorted(alone)}"
                )
            gains = [100 * (float(row["test"]) - float(rival[seed]["test"])) for seed, row in splits.items()]
            yield shots, setting, list(splits.values()), gains


def order_of(setting: tuple[str, ...]) -> int:
    """Closed forms stay where they are, before the methods of this study in the order of these."""
    return list(METHODS).index(setting[0]) if setting[2] else -1


def mean_and_error(values: Sequence[float], digits: int = 2) -> str:
    """Mean and its standard error."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{error}"


def validation(seeds: list[Row]) -> float:
    return statistics.fmean(float(row["val"]) for row in seeds)


def mean_and_deviation(values: Sequence[float], form: str) -> str:
    """Mean, written in this form, and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return format(statistics.fmean(values), form) + deviation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table").add_argument("rows", type=Path)
    pairs = commands.add_parser("paired")
    pairs.add_argument("rows", type=Path, nargs="+")
    pairs.add_argument("--against", default="ridge", help="the method that all are compared with")
    run = commands.add_parser("run")
    run.add_argument("root", type=Path)
    run.add_argument("--checkpoint", required=True)
    run.add_argument("--backbone", default="mobilenetv2_100", help=BACKBONE)
    run.add_argument(
        "--norm-modules", nargs="+", default=["*bn*"], help="patterns of the layers that norm tuning trains"
    )
    # The 1x1 convolutions, as MobileNets and EfficientNets call them: nearly all of their weights.
    run.add_argument("--lora-modules", nargs="+", default=["conv_pw", "conv_pwl"], help="layers that LoRA adds to")
    run.add_argument("--size", type=int, help="pixels a side to which images are resized")
    run.add_argument("--mean", type=float, default=0.5)
    run.add_argument("--std", type=float, default=0.5)
    run.add_argument("--plan", type=Path, help=f"CSV of the runs to do, in place of all combinations: {', '.join(RUN)}")
    run.add_argument("--validation", choices=["half", "rest", "none"], default="half")
    run.add_argument("--nc1", action=argparse.BooleanOptionalAction, default=True, help="costs a pass over the images")
    run.add_argument("--out", type=Path, default=Path("rows.csv"))
    run.add_argument("--cache-dir", type=Path, default=Path("runs/cache"))
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
    if options.command == "paired":
        print(paired(options.rows, options.against))
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    study(options)


if __name__ == "__main__":
    main()

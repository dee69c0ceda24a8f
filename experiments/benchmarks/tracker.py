"""What NeuralCollapseTracker costs: epochs with it against epochs without, and its training pass against a validation.

One process, one thread, its CPU seconds; runs with and without the tracker alternate, and the ratio is taken pair by
pair. An epoch is training and validation. The training pass is that of the penultimate layer, the validation one
without the tracker, over as many images.

    python experiments/benchmarks/tracker.py [--repeats 5] [--out experiments/results/tracker.md]
"""

import platform
import time
from collections.abc import Sequence
from typing import Any

import timm
import torch
from common import median_and_range, options_of, quiet, written
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ncfinetune.callbacks import NeuralCollapseTracker

CLASSES, TRAIN, VAL, BATCH = 10, 256, 256, 64
NETWORKS: dict[str, tuple[dict[str, Any], int, str]] = {
    "resnet18": ({}, 64, "layer*.*"),
    "vit_tiny_patch16_224": ({"img_size": 96}, 96, "blocks.*"),
}


class Stock(LightningModule):
    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.net = timm.create_model(name, num_classes=CLASSES, **arguments)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock(Callback):
    """CPU seconds of each training epoch, its validation included, and of each validation alone."""

    def __init__(self) -> None:
        self.epoch = self.validation = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epoch = -time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epoch += time.process_time()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation = -time.process_time()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation += time.process_time()


class TimedTracker(NeuralCollapseTracker):
    """Notes how long its last pass over the training set took."""

    seconds = 0.0

    def _measure_training_set(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        start = time.process_time()
        values = super()._measure_training_set(trainer, pl_module)
        self.seconds = time.process_time() - start
        return values


def loader(size: int, number: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(number, 3, size, size, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(number) % CLASSES), batch_size=BATCH)


def run(name: str, *callbacks: Callback) -> Clock:
    arguments, size, _ = NETWORKS[name]
    clock = Clock()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[*callbacks, clock],  # the clock runs last at the start of an epoch and at its end
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    torch.manual_seed(0)
    trainer.fit(Stock(name, arguments), loader(size, TRAIN), loader(size, VAL))
    return clock


def ratios(name: str, layers: Sequence[str], repeats: int) -> list[float]:
    """CPU seconds of an epoch with the validation set tracked, over those of one without."""
    found = []
    for _ in range(repeats):
        without = run(name)
        tracked = run(name, NeuralCollapseTracker(CLASSES, list(layers), train_every_n_epochs=0))
        found.append(tracked.epoch / without.epoch)
    return found


def pass_ratios(name: str, repeats: int) -> list[float]:
    """CPU seconds of a pass over the training set, over those of a validation of as many images."""
    found = []
    for _ in range(repeats):
        validation = run(name).validation
        tracker = TimedTracker(CLASSES, figures=False)
        run(name, tracker)
        found.append(tracker.seconds / validation)
    return found


def main() -> None:
    options = options_of(__doc__, "tracker.md").parse_args()
    quiet()
    with written(options.out) as say:
        say(f"`python experiments/benchmarks/tracker.py --repeats {options.repeats}`: {TRAIN} training and {VAL}")
        say(f"validation images in batches of {BATCH}, one thread, torch {torch.__version__}, {platform.machine()}.")
        say("Medians (least to most) of the pairs.\n")
        say("| network | what | with / without |\n|---|---|---|")
        for name, (_, size, blocks) in NETWORKS.items():
            run(name)  # warm up
            rows = [
                ("epoch, penultimate layer of the validation set", ratios(name, ["penultimate"], options.repeats)),
                ("epoch, all blocks of the validation set", ratios(name, [blocks], options.repeats)),
                ("pass over the training set, against a validation", pass_ratios(name, options.repeats)),
            ]
            for what, found in rows:
                say(f"| {name} at {size} | {what} | {median_and_range(found, 3)} |")


if __name__ == "__main__":
    main()

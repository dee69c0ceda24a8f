"""Time and memory of fine-tuning a middle block, against full fine-tuning of the same network.

Each method is a `FineTuner` under a Trainer on the same images, in turn in one process; ratios are taken turn by turn.
A step's time is that of the whole training batch, the first epoch left out; an epoch's holds the loader too. On a CPU
times are CPU seconds of one thread, memory is the peak of a fresh process that trains one epoch, less what it held
before the network was built, and the cache lies on disk; on a GPU memory is the peak that torch allocated. The linear
probe is timed from the start of `fit` to its end, against one forward pass over its images.

    python experiments/benchmarks/finetune.py [--networks resnet50 ...] [--batch 32] [--device cuda] [--out FILE]
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from common import in_a_new_process, median_and_range, options_of, peak_megabytes, quiet, written
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from ncfinetune import Backbone, FineTuner

CLASSES = 10
# The knobs of each method for a block.
METHODS: dict[str, dict[str, Any]] = {
    "full FT": {"train": "all"},
    "layer FT": {"train": "BLOCK"},
    "SCL FT": {"train": "BLOCK", "skip_from": "BLOCK"},
    "SCL FT, gradient through the skip": {"train": "BLOCK", "skip_from": "BLOCK", "skip_gradient": "skip"},
    "layer FT, cached": {"train": "BLOCK", "cache": "disk"},
    "SCL FT, gradient through the skip, cached": {
        "train": "BLOCK",
        "skip_from": "BLOCK",
        "skip_gradient": "skip",
        "cache": "disk",
    },
}


class Noise(LightningDataModule):
    """Random images."""

    def __init__(self, images: int, batch: int, size: int = 224) -> None:
        super().__init__()
        pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8)
        self.images = TensorDataset(pixels, torch.arange(images) % CLASSES)
        self.batch = batch

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.images, batch_size=self.batch, shuffle=True)

    def train_plain_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.images, batch_size=self.batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0].float() / 255 - 0.5) / 0.5, batch[1]


class Clock(Callback):
    """Seconds of each training batch and of each epoch."""

    def __init__(self) -> None:
        self.batches: list[float] = []
        self.epochs: list[float] = []

    def on_train_epoch_start(self, *args: Any) -> None:
        self._epoch = now()

    def on_train_batch_start(self, *args: Any) -> None:
        self._batch = now()

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches.append(now() - self._batch)

    def on_train_epoch_end(self, *args: Any) -> None:
        self.epochs.append(now() - self._epoch)


def now() -> float:
    """Seconds: of a clock on a GPU, whose work is waited for; of the processor on a CPU, which others may use too."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def fit(network: str, knobs: dict[str, Any], data: Noise, epochs: int, device: str) -> Clock:
    block = list(Backbone(network).layers)
    block = block[len(block) // 2]
    named = {key: block if value == "BLOCK" else value for key, value in knobs.items()}
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        if named.get("cache") == "disk":
            named["cache_dir"] = folder
        Trainer(
            max_epochs=epochs,
            accelerator=device,
            devices=1,
            precision="bf16-mixed" if device == "cuda" else "32-true",
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
        ).fit(FineTuner(CLASSES, network, allow_random=True, **named), data)
    return clock


def seconds(network: str, batch: int, steps: int, repeats: int, device: str) -> dict[str, list[tuple[float, float]]]:
    """Seconds of a step and of an epoch of each method, turn by turn; two epochs a turn, of which the second counts."""
    data = Noise(batch * steps, batch)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    for _ in range(repeats):
        for name, knobs in METHODS.items():
            clock = fit(network, knobs, data, 2, device)
            taken[name].append((statistics.median(clock.batches[steps:]), clock.epochs[1]))
    return taken


def megabytes(network: str, method: str, batch: int, device: str) -> float:
    """Growth of this process's peak memory by an epoch of two batches."""
    fit("test_resnet", METHODS[method], Noise(4, 2, 64), 1, device)
    data = Noise(batch * 2, batch)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = _peak(device, reset=True)
    fit(network, METHODS[method], data, 1, device)
    return _peak(device) - before


def _peak(device: str, reset: bool = False) -> float:
    """Peak memory in MB: what torch allocated on a GPU, what Linux counts for this process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_megabytes(reset)


def probe(network: str, images: int, batch: int, epochs: int, device: str) -> tuple[float, float]:
    """Seconds of one forward pass over the images, and of a linear probe of so many epochs on them."""
    data = Noise(images, batch)
    backbone = Backbone(network).eval().to(device)
    fit("test_resnet", {"cache": "memory"}, Noise(4, 2, 64), 2, device)
    start = now()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        for pixels in data.train_plain_dataloader():
            backbone(data.on_after_batch_transfer([part.to(device) for part in pixels], 0)[0])
    forward = now() - start
    start = now()
    fit(network, {"cache": "memory"}, data, epochs, device)
    return forward, now() - start


def main() -> None:
    parser = options_of(__doc__, "finetune.md", repeats=3)
    parser.add_argument("--networks", nargs="+", default=["resnet50", "vit_small_patch16_224"])
    parser.add_argument("--batch", type=int, default=32, help="images a batch")
    parser.add_argument("--memory-batch", type=int, default=32, help="images a batch for memory and the linear probe")
    parser.add_argument("--steps", type=int, default=3, help="batches an epoch")
    parser.add_argument("--probe-images", type=int, default=256)
    parser.add_argument("--parts", nargs="+", choices=["steps", "probe"], default=["steps", "probe"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    quiet()
    with written(options.out) as say:
        place = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()}, one thread"
        say(f"Medians (least to most) of {options.repeats} turns; 224x224 images, torch {torch.__version__}, {place}.")
        say(
            f"Time at batch {options.batch}, {options.steps} steps an epoch; memory, probe at {options.memory_batch}.\n"
        )
        if "steps" in options.parts:
            compare_steps(options, say)
        if "probe" in options.parts:
            compare_probe(options, say)


def compare_steps(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    say("| network | method | step, s | step / full FT | epoch / full FT | memory, MB | memory / full FT |")
    say("|---|---|---|---|---|---|---|")
    for network in options.networks:
        sizes = {"batch": options.batch, "steps": options.steps, "repeats": options.repeats}
        taken = seconds(network, **sizes, device=options.device)
        memory = {
            name: in_a_new_process(megabytes, network, name, options.memory_batch, options.device) for name in METHODS
        }
        for name in METHODS:
            pairs = list(zip(taken[name], taken["full FT"], strict=True))
            step, epoch = ([own[i] / full[i] for own, full in pairs] for i in (0, 1))
            say(
                f"| {network} | {name} | {statistics.median(own[0] for own, _ in pairs):.3g} | "
                f"{median_and_range(step)} | {median_and_range(epoch)} | "
                f"{memory[name]:.0f} | {memory[name] / memory['full FT']:.2f} |"
            )


def compare_probe(options: argparse.Namespace, say: Callable[[str], None]) -> None:
    say("\n| network | images | forward pass, s | 50 epochs of a cached linear probe, s | ratio |")
    say("|---|---|---|---|---|")
    for network in options.networks:
        sizes = {"images": options.probe_images, "batch": options.memory_batch, "epochs": 50}
        forward, whole = probe(network, **sizes, device=options.device)
        say(f"| {network} | {options.probe_images} | {forward:.1f} | {whole:.1f} | {whole / forward:.2f} |")


if __name__ == "__main__":
    main()

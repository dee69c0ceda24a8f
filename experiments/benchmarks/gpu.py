"""Speed, memory and synchronisations on an accelerator: every row in one run of at most five minutes.

Both sides of a row run in turn, and ratios are taken pair by pair; the medians stand with the least and greatest. The
rivals are written here: a two-pass float32 rewriting of the metrics, plain float64 sums and ``z^T z``, the plain masked
SupCon, lightly's NT-Xent where it is installed, and a bare training loop without data. Memory is the growth of the
device's peak. Synchronisations are those that CUDA reports; on the CPU, operators that read a value back.

    python experiments/benchmarks/gpu.py [--device cuda] [--repeats 5] [--out FILE]

``--device cpu`` runs the same rows, but for memory, on small sizes: it shows that they run, not how fast a GPU is, and
writes no table unless one is named.
"""

import itertools
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from common import RESULTS, median_and_range, options_of, plain_supcon, quiet, written
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ncfinetune import Backbone, SimCLR, Supervised
from ncfinetune.callbacks import NeuralCollapseTracker, OnlineProbe
from ncfinetune.datamodules import ImageDataModule, IndexedImages
from ncfinetune.datamodules.images import Labelled
from ncfinetune.losses import contrastive_loss
from ncfinetune.metrics import neural_collapse

TEMPERATURE, WIDTH, CLASSES = 0.1, 128, 10
Run = Callable[[], Any]


class Sizes(NamedTuple):
    network: str
    images: int
    batch: int
    samples: int
    metric_batch: int
    metrics: tuple[tuple[int, int], ...]
    pairs: tuple[int, ...]
    precision: Any


LARGE = Sizes(
    network="resnet18",
    images=60_000,  # as CIFAR-10, a sixth of them for validation
    batch=512,
    samples=50_000,
    metric_batch=256,
    metrics=((10, 512), (100, 512), (100, 2048), (1000, 2048), (1000, 4096)),
    pairs=(1024, 4096, 16_384),
    precision="bf16-mixed",
)
SMALL = Sizes(
    network="test_resnet",
    images=64,
    batch=16,
    samples=400,
    metric_batch=50,
    metrics=((4, 32),),
    pairs=(64,),
    precision="32-true",
)


class Device:
    """Clocks, peaks and counts of synchronisations of the device that is measured."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.on_gpu = self.device.type == "cuda"

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, run: Run) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def megabytes(self, run: Run) -> float:
        """What the peak of the GPU's memory grows by."""
        self.wait()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def synchronisations(self, run: Run) -> int:
        if not self.on_gpu:
            with _Looks() as looks:
                run()
            return looks.count
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(warning.message) for warning in caught)


class _Looks(TorchDispatchMode):
    """Counts the operators that read a value back to the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "bincount", "masked_select")
        return func(*args, **(kwargs or {}))


def compared(device: Device, ours: Run, theirs: Run, repeats: int) -> tuple[float, float, list[float]]:
    """Median seconds of both, and of the ratios theirs over ours, taken in turn after a run of each that warms up."""
    ours(), theirs()
    pairs = [(device.seconds(ours), device.seconds(theirs)) for _ in range(repeats)]
    mine, others = (statistics.median(times) for times in zip(*pairs, strict=True))
    return mine, others, [theirs / ours for ours, theirs in pairs]


# Metrics


def two_pass_nc1(features: Tensor, labels: Tensor, num_classes: int) -> float:
    """NC1 as it is usually written: all features at once, in float32, with a pseudo-inverse."""
    counts = torch.bincount(labels, minlength=num_classes).clamp(min=1).unsqueeze(1)
    means = torch.zeros(num_classes, features.shape[1], device=features.device).index_add_(0, labels, features) / counts
    within = features - means[labels]
    centred = means - means.mean(0)
    between = centred.T @ centred / num_classes
    return ((within.T @ within / len(features)) @ torch.linalg.pinv(between)).trace().item() / num_classes


def plain_sums(batches: list[tuple[Tensor, Tensor]], num_classes: int) -> Tensor:
    """Class sums and ``z^T z`` in float64, without any care for cancellation."""
    width, device = batches[0][0].shape[1], batches[0][0].device
    sums = torch.zeros(num_classes, width, dtype=torch.float64, device=device)
    products = torch.zeros(width, width, dtype=torch.float64, device=device)
    for features, labels in batches:
        exact = features.double()
        sums.index_add_(0, labels, exact)
        products.addmm_(exact.T, exact)
    return products


def metric_rows(device: Device, sizes: Sizes, repeats: int) -> Iterator[str]:
    for classes, width in sizes.metrics:
        labels = torch.arange(sizes.samples, device=device.device) % classes
        features = torch.randn(sizes.samples, width, device=device.device)
        batches = list(zip(features.split(sizes.metric_batch), labels.split(sizes.metric_batch), strict=True))

        def ours(batches: Any = batches, classes: int = classes, width: int = width) -> None:
            family = neural_collapse(classes).to(device.device)
            weight = torch.ones(classes, width, device=device.device)
            for some, of_classes in batches:
                family.update(features=some, labels=of_classes, weight=weight)
            family.compute()

        rivals: dict[str, Run] = {
            "two-pass float32": partial(two_pass_nc1, features, labels, classes),
            "plain float64 sums": partial(plain_sums, batches, classes),
        }
        for name, theirs in rivals.items():
            mine, others, ratios = compared(device, ours, theirs, repeats)
            what = f"metric family, N={sizes.samples}, K={classes}, d={width}"
            yield f"| {what} | {name} | {mine * 1e3:.1f} ms | {others * 1e3:.1f} ms | {median_and_range(ratios)} |"


# Contrastive loss


def contrastive_rivals(n: int, device: torch.device) -> dict[str, tuple[Callable[[Tensor], Tensor], ...]]:
    classes, single = torch.arange(n, device=device) % CLASSES, torch.arange(n, device=device)
    rivals: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
        "plain masked SupCon": (
            lambda z: contrastive_loss(z, classes, TEMPERATURE),
            lambda z: plain_supcon(z, classes, TEMPERATURE),
        )
    }
    try:
        from lightly.loss import NTXentLoss
    except ImportError:
        return rivals
    theirs = NTXentLoss(TEMPERATURE)
    rivals["lightly NTXentLoss"] = (
        lambda z: contrastive_loss(z, single, TEMPERATURE),
        lambda z: theirs(z[:, 0], z[:, 1]),
    )
    return rivals


def _step(loss: Callable[[Tensor], Tensor], z: Tensor) -> None:
    loss(z.detach().requires_grad_()).backward()


def contrastive_rows(device: Device, sizes: Sizes, repeats: int) -> Iterator[str]:
    for n in sizes.pairs:
        z = torch.randn(n, 2, WIDTH, device=device.device)
        for name, losses in contrastive_rivals(n, device.device).items():
            ours, theirs = (partial(_step, loss, z) for loss in losses)
            mine, others, ratios = compared(device, ours, theirs, repeats)
            what = f"contrastive loss, {n} pairs"
            yield f"| {what} | {name} | {mine * 1e3:.1f} ms | {others * 1e3:.1f} ms | {median_and_range(ratios)} |"
            if device.on_gpu:
                memory = [device.megabytes(run) for run in (ours, theirs)]
                share = f"{memory[1] / memory[0]:.1f}"
                yield f"| memory of it | {name} | {memory[0]:.0f} MB | {memory[1]:.0f} MB | {share} |"


# Training


class Noise(IndexedImages):
    """Images of noise in memory, or on the device."""

    def __init__(self, sizes: Sizes, **kwargs: Any) -> None:
        self.count = sizes.images
        super().__init__(
            CLASSES, (3, 32, 32), [0.5] * 3, [0.25] * 3, batch_size=sizes.batch, val_fraction=1 / 6, **kwargs
        )

    def parts(self) -> dict[str, Labelled]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (self.count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return {"train": Labelled.all(images, np.arange(self.count) % CLASSES)}


class Epochs(Callback):
    """Seconds of each epoch, its validation included."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.device.wait()
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.device.wait()
        self.seconds.append(time.perf_counter() - self.start)


def backbone(sizes: Sizes) -> Backbone:
    stem: Any = {"stem": "cifar"} if sizes.network == "resnet18" else {}
    return Backbone(sizes.network, channels_last=True, **stem)


def epoch_seconds(
    device: Device, sizes: Sizes, model: LightningModule, data: ImageDataModule, *callbacks: Callback, epochs: int = 2
) -> float:
    """Seconds of an epoch after the first, which allocates."""
    clock = Epochs(device)
    bare_trainer(device, sizes, [*callbacks, clock], max_epochs=epochs).fit(model, data)
    return statistics.median(clock.seconds[1:])


def bare_trainer(device: Device, sizes: Sizes, callbacks: list[Callback], **kwargs: Any) -> Trainer:
    """A trainer that measures, logs and keeps nothing of its own."""
    return Trainer(
        accelerator="gpu" if device.on_gpu else "cpu",
        devices=1,
        precision=sizes.precision,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **kwargs,
    )


def tracked_rows(device: Device, sizes: Sizes, repeats: int) -> Iterator[str]:
    blocks = list(backbone(sizes).layers)
    cases: dict[str, tuple[Callable[[], list[Callback]], Callable[[], list[Callback]]]] = {
        "penultimate layer of validation": (partial(trackers, ["penultimate"], 0), list),
        "all blocks of validation": (partial(trackers, blocks, 0), list),
        "all blocks of validation and training": (partial(trackers, blocks, 1), lambda: [PlainPass()]),
    }
    for what, (callbacks, without) in cases.items():

        def epoch(make: Callable[[], list[Callback]]) -> float:
            data = Noise(sizes, augmentation="plain", device_cache=device.on_gpu)
            return epoch_seconds(device, sizes, Supervised(CLASSES, backbone(sizes)), data, *make())

        pairs = [(epoch(callbacks), epoch(without)) for _ in range(min(repeats, 3))]
        ratios = [tracked / bare for tracked, bare in pairs]
        mine, others = (statistics.median(times) for times in zip(*pairs, strict=True))
        yield (
            f"| tracked epoch, {what} | without the tracker | {mine:.2f} s | {others:.2f} s | "
            f"{median_and_range([1 / ratio for ratio in ratios])} |"
        )


def trackers(layers: list[str], every: int) -> list[Callback]:
    return [NeuralCollapseTracker(CLASSES, layers, train_every_n_epochs=every, figures=False)]


class PlainPass(Callback):
    """A pass over the training images in eval mode that measures nothing."""

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        pl_module.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            for batch in trainer.datamodule.train_plain_dataloader():
                images, labels = trainer.strategy.batch_to_device(batch)
                trainer.training, before = False, trainer.training
                images, _ = trainer.datamodule.on_after_batch_transfer((images, labels), 0)
                trainer.training = before
                pl_module(images)
        pl_module.train()


def bare_loop(device: Device, sizes: Sizes, steps: int) -> Run:
    """The network, its loss and its optimiser on one batch that is there already."""
    model = SimCLR(backbone(sizes)).to(device.device).train()
    network = nn.Sequential(model.backbone, model.projection)
    images = torch.randn(2 * sizes.batch, 3, 32, 32, device=device.device)
    single = torch.arange(sizes.batch, device=device.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def loop() -> None:
        for _ in range(steps):
            with torch.autocast(device.device.type, torch.bfloat16, enabled=sizes.precision == "bf16-mixed"):
                z = network(images).unflatten(0, (-1, 2))
            contrastive_loss(z, single, TEMPERATURE).backward()
            optimizer.step()
            optimizer.zero_grad()

    return loop


def simclr_rows(device: Device, sizes: Sizes, repeats: int) -> Iterator[str]:
    def epoch(cached: bool) -> float:
        data = Noise(sizes, augmentation="simclr", strength=0.5, views=2, device_cache=cached)
        seconds = epoch_seconds(device, sizes, SimCLR(backbone(sizes)), data, _NoValidation())
        return seconds / len(data.train_dataloader())

    steps = 20 if device.on_gpu else 2
    loop = bare_loop(device, sizes, steps)
    loop()
    rows = {"resident": partial(epoch, True), "from memory": partial(epoch, False)}
    times: dict[str, list[float]] = {name: [] for name in ["bare", *rows]}
    for _ in range(min(repeats, 3)):
        times["bare"].append(device.seconds(loop) / steps)
        for name, run in rows.items():
            times[name].append(run())
    pairs = [(name, "bare", "bare loop without data") for name in rows]
    pairs.append(("resident", "from memory", "without device_cache"))
    for name, rival, words in pairs:
        mine, others = statistics.median(times[name]), statistics.median(times[rival])
        ratios = [b / a for a, b in zip(times[name], times[rival], strict=True)]
        what = f"SimCLR step, {sizes.batch}x2, {name}"
        yield f"| {what} | {words} | {mine * 1e3:.1f} ms | {others * 1e3:.1f} ms | {median_and_range(ratios)} |"


class _NoValidation(Callback):
    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        trainer.limit_val_batches = 0


def synchronisation_rows(device: Device, sizes: Sizes) -> Iterator[str]:
    """What a layer's features, a contrastive loss and the augmentation of a batch wait for."""
    features = torch.randn(sizes.metric_batch, 32, device=device.device)
    labels = torch.arange(sizes.metric_batch, device=device.device) % CLASSES
    family = neural_collapse(CLASSES, ["nc1", "cdnv"]).to(device.device)
    z = torch.randn(sizes.batch, 2, WIDTH, device=device.device)
    single = torch.arange(sizes.batch, device=device.device)
    runs: dict[str, Run] = {
        "metrics of one layer": partial(family.update, features=features, labels=labels),
        "contrastive loss": partial(_step, lambda z: contrastive_loss(z, single, TEMPERATURE), z),
    }
    for name, run in runs.items():
        run(), run()
        yield f"| synchronisations a batch, {name} | | {device.synchronisations(run)} | | |"
    batches, layers = 8, list(backbone(sizes).layers)
    callbacks = {"tracker of all blocks and probe": [*trackers(layers, 0), OnlineProbe(CLASSES)], "neither": []}
    for name, made in callbacks.items():
        _, once, twice = (synchronisations_of_fit(device, sizes, made, n) for n in (1, batches, 2 * batches))
        name = f"synchronisations a batch of training and one of validation, {name}"
        yield f"| {name} | | {(twice - once) / batches:.3g} | | |"


def synchronisations_of_fit(device: Device, sizes: Sizes, callbacks: list[Callback], batches: int) -> int:
    data = Noise(sizes._replace(images=6 * 2 * batches * 16, batch=16), device_cache=device.on_gpu)
    few = {"limit_train_batches": batches, "limit_val_batches": batches, "max_epochs": 1}
    trainer = bare_trainer(device, sizes, callbacks, **few)
    return device.synchronisations(lambda: trainer.fit(Supervised(CLASSES, backbone(sizes)), data))


def rows(device: Device, sizes: Sizes, repeats: int) -> Iterator[str]:
    yield from synchronisation_rows(device, sizes)
    yield from contrastive_rows(device, sizes, repeats)
    yield from metric_rows(device, sizes, repeats)
    yield from tracked_rows(device, sizes, repeats)
    yield from simclr_rows(device, sizes, repeats)


def main(arguments: list[str] | None = None) -> None:
    parser = options_of(__doc__, "gpu.md")
    parser.set_defaults(out=None)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu tries the rows on small sizes")
    quiet()
    device = Device(options.device)
    out = options.out or (RESULTS / "gpu.md" if device.on_gpu else Path(os.devnull))
    name = torch.cuda.get_device_name() if device.on_gpu else platform.machine()
    with written(out) as say:
        head = [
            f"`python experiments/benchmarks/gpu.py --device {options.device} --repeats {options.repeats}`: {name},",
            f"torch {torch.__version__}, lightning {lightning.__version__}. Medians (least to most) of the pairs.\n",
            "| row | rival | ours | rival's | rival / ours |",
            "|---|---|---|---|---|",
        ]
        sizes = LARGE if device.on_gpu else SMALL
        for line in itertools.chain(head, rows(device, sizes, options.repeats)):
            say(line)


if __name__ == "__main__":
    main()

"""Every learner in every way to run it, with tracker and probe, for a few steps: on a GPU all, on the CPU what it can.

`make test-gpu` runs those that need a CUDA device.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from ncfinetune import FineTuner, SimCLR, SupCon, Supervised
from ncfinetune.callbacks import NeuralCollapseTracker, OnlineProbe
from ncfinetune.datamodules import Digits

# With this stem no strided convolution sees one position alone: some oneDNN leave its gradient in bfloat16 undefined.
NETWORK = {"name": "test_resnet", "in_chans": 1, "stem": "cifar"}
LAYER = "layer3.0"
LEARNERS: dict[str, Any] = {
    "supervised": lambda backbone: Supervised(10, backbone),
    "supcon": SupCon,
    "simclr": SimCLR,
    "linear": lambda backbone: FineTuner(10, backbone, allow_random=True, train="none"),
    "layer": lambda backbone: FineTuner(10, backbone, allow_random=True, train=LAYER),
    "scl": lambda backbone: FineTuner(10, backbone, allow_random=True, train=LAYER, skip_from=LAYER),
    "full": lambda backbone: FineTuner(10, backbone, allow_random=True, train="all"),
}
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": {"precision": "16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "deterministic": {},  # as all of them are, so that runs can be compared bit by bit
}
ON_CPU = ["ddp", "bf16-mixed", "bf16-true", "deterministic"]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    if dist.is_initialized():  # Lightning leaves the process group of a single process as it is
        dist.destroy_process_group()


class Collector(Callback):
    """Keeps a layer's pooled output on the validation images in float64, and their labels."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.features: list[Tensor] = []
        self.labels: list[Tensor] = []

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        layer = pl_module.get_submodule("backbone").layer(LAYER)
        self.handle = layer.register_forward_hook(lambda m, args, output: self.features.append(_pooled(output)))

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.labels.append(batch[1].cpu())
        self.handle.remove()  # a tracker's own pass is no part of the validation


def _pooled(output: Tensor) -> Tensor:
    return output.detach().double().mean((2, 3)).cpu()


def _nc1(features: Tensor, labels: Tensor) -> float:
    """trace(Sigma_W Sigma_B^+) / K of Papyan, Han and Donoho (2020), by the pseudo-inverse of the d x d matrix."""
    means = torch.stack([features[labels == k].mean(0) for k in range(10)])
    centred = means - means.mean(0)
    within = features - means[labels]
    between = centred.T @ centred / 10
    return (
        within.T @ within / len(features) @ torch.linalg.pinv(between, rtol=1e-9, hermitian=True)
    ).trace().item() / 10


def _fit(
    learner: str, way: str, accelerator: str, folder: Path, *callbacks: Callback
) -> tuple[dict[str, Tensor], dict[str, float]]:
    seed_everything(0, verbose=False)
    contrastive = learner in ("supcon", "simclr")
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=1,
        limit_train_batches=3,
        deterministic=True,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **WAYS[way],
    )
    data = Digits(batch_size=64, augmentation="standard" if contrastive else "plain", views=2 if contrastive else 1)
    model = LEARNERS[learner](NETWORK)
    trainer.fit(model, data)
    path = folder / "weights.ckpt"
    trainer.save_checkpoint(path, weights_only=True)  # which gathers what FSDP shards
    weights = torch.load(path, "cpu", weights_only=True)["state_dict"]
    return weights, {name: value.item() for name, value in trainer.callback_metrics.items()}


def check(learner: str, way: str, accelerator: str, folder: Path) -> None:
    """Fit with and without tracker and probe; their numbers are right, and the weights are the same."""
    collector, tracker = Collector(), NeuralCollapseTracker(10, [LAYER, "penultimate"], figures=False)
    probes = [OnlineProbe(10, knn=5), OnlineProbe(10, LAYER, "ridge")]
    weights, metrics = _fit(learner, way, accelerator, folder, tracker, *probes, collector)
    expected = _nc1(torch.cat(collector.features), torch.cat(collector.labels))
    assert tracker.values[f"nc1/val/{LAYER}"] == pytest.approx(expected, rel=1e-4)
    assert tracker.values[f"nc1/train/{LAYER}"] > 0
    assert metrics[f"nc1/val/{LAYER}"] == pytest.approx(expected, rel=1e-4)
    assert 0 <= metrics["probe/acc"] <= 1
    assert 0.2 < metrics[f"probe/held_out_acc/{LAYER}"] <= 1
    assert 0.2 < metrics[f"probe/acc/{LAYER}"] <= 1
    assert all(torch.isfinite(value).all() for value in weights.values())
    alone, _ = _fit(learner, way, accelerator, folder)
    assert alone.keys() == weights.keys()
    different = [name for name, value in weights.items() if not torch.equal(value, alone[name])]
    assert different == []


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.filterwarnings(
    "ignore::UserWarning:torch", "ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch"
)
def test_on_a_gpu(learner: str, way: str, tmp_path: Path) -> None:
    check(learner, way, "gpu", tmp_path)


# Each learner once and each way at least once; the other pairs are left to "make test-slow", those of contrastive
# learners in bf16 above all, which many processors only emulate.
_QUICK = {"supervised": "ddp", "supcon": "deterministic", "simclr": "ddp", "linear": "bf16-mixed", "layer": "bf16-true"}
_QUICK |= {"scl": "deterministic", "full": "ddp"}


@pytest.mark.parametrize(
    ("learner", "way"),
    [
        pytest.param(learner, way, marks=[] if _QUICK[learner] == way else pytest.mark.slow)
        for learner in LEARNERS
        for way in ON_CPU
    ],
)
def test_on_the_cpu(learner: str, way: str, tmp_path: Path) -> None:
    check(learner, way, "cpu", tmp_path)


@pytest.mark.gpu
@on_gpu
def test_loss_augmentation_and_device_cache_never_wait_for_the_device() -> None:
    from ncfinetune.losses import contrastive_loss

    data = Digits(batch_size=64, augmentation="simclr", views=2, device_cache=True)
    data.trainer = Trainer(accelerator="gpu", devices=1, logger=False, enable_checkpointing=False)
    data.trainer.training = True
    data.setup("fit")
    batches = iter(data.train_dataloader())
    for repeat in range(3):  # the first allocates, and puts constants on the device
        torch.cuda.set_sync_debug_mode("error" if repeat else "default")
        try:
            images, labels = data.on_after_batch_transfer(next(batches), 0)
            contrastive_loss(images.flatten(2).requires_grad_(), labels).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

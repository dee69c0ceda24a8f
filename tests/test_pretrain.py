"""Pre-training: Supervised with its losses, heads and adversary; SupCon and SimCLR; switches; what a run leaves."""

from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from ncfinetune import Backbone, FineTuner, SimCLR, SupCon, Supervised
from ncfinetune.adversarial import PGD
from ncfinetune.cli import main
from ncfinetune.datamodules import Digits
from ncfinetune.losses import contrastive_loss, one_hot_mse
from ncfinetune.schedule import WarmupCosine

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

SMALL = {"name": "resnet18", "stem": "cifar", "in_chans": 1, "channels": [4, 6, 8, 10]}
# On some processors torch 2.14 writes outside its memory in the backward pass of channels_last convolutions of widths
# that are no multiples of 8.
EIGHTS = {**SMALL, "channels": [8, 16, 24, 32]}
VIT = {"name": "test_vit", "img_size": 16, "patch_size": 8, "in_chans": 1}


def _sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def _adam(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def _trainer(folder: Path, **arguments: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, **{"max_epochs": 1, "enable_checkpointing": False, **quiet, **arguments})


def _views(n: int = 16, views: int = 2, size: int = 8, batch_size: int = 8) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(n) % 3
    images = torch.randn(n, views, 1, size, size, generator=generator) + labels.view(-1, 1, 1, 1, 1)
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size)


def _plain(n: int = 16) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(n, 1, 8, 8), torch.arange(n) % 3), batch_size=8)


class Views(LightningDataModule):
    """Two views for the command line."""

    num_classes = 3

    def train_dataloader(self) -> DataLoader:
        return _views()

    def val_dataloader(self) -> DataLoader:
        return _plain()


# Supervised


@pytest.mark.parametrize("soft", [False, True])
def test_losses_of_supervised(soft: bool) -> None:
    labels, logits = torch.tensor([0, 1, 2, 2]), torch.randn(4, 3)
    y = torch.nn.functional.one_hot(labels, 3).float() if soft else labels
    smooth = Supervised(3, SMALL, label_smoothing=0.3)
    target = 0.7 * torch.nn.functional.one_hot(labels, 3) + 0.1
    torch.testing.assert_close(smooth.loss(logits, y), -(target * logits.log_softmax(1)).sum(1).mean())
    torch.testing.assert_close(smooth.eval().loss(logits, y), torch.nn.functional.cross_entropy(logits, labels))
    squared = Supervised(3, SMALL, loss="mse", mse_weight=15, mse_target=30)
    torch.testing.assert_close(squared.loss(logits, y), one_hot_mse(logits, labels, 15, 30))


def test_probabilities_of_squared_error_are_its_outputs_above_zero() -> None:
    outputs = torch.tensor([[0.6, 0.2, -0.5], [-0.3, -0.1, -0.2], [0.0, 0.0, 30.0]])
    expected = torch.tensor([[0.75, 0.25, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    model = Supervised(3, SMALL, loss="mse", mse_weight=15, mse_target=30).eval()
    torch.testing.assert_close(model.probabilities(outputs), expected, rtol=0, atol=1.1e-6)
    images = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(model.predict_step((images, torch.zeros(4)), 0), model.probabilities(model(images)))
    torch.testing.assert_close(Supervised(3, SMALL).probabilities(outputs), outputs.softmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [{"loss": "ce"}, {"loss": "mse"}, {"loss": "mse", "mse_weight": 15, "mse_target": 30}])
def test_classes_have_the_order_of_their_logits(loss: dict, dtype: torch.dtype) -> None:
    model = Supervised(12, SMALL, **loss)
    logits = (torch.stack([torch.randperm(12) - shift for shift in (0, 5, 11)]) * model.mse_target / 1024).to(dtype)
    probabilities = model.probabilities(logits)
    assert torch.equal(probabilities.topk(12).indices, logits.float().topk(12).indices)
    torch.testing.assert_close(probabilities.float().sum(1), torch.ones(3))


@pytest.mark.parametrize(
    ("projection", "width", "layers"), [("none", None, 0), ("linear", None, 1), ("linear", 5, 1), ("mlp", 7, 2)]
)
@pytest.mark.parametrize("method", [Supervised, SupCon, SimCLR])
def test_projections(method, projection: str, width: int | None, layers: int) -> None:
    options = {"projection": projection, "projection_dim": width}
    model = method(3, SMALL, **options) if method is Supervised else method(SMALL, **options)
    linear = [m for m in model.projection.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == layers
    default = 10 if method is Supervised or projection == "none" else 128
    features = model.penultimate(torch.randn(2, 1, 8, 8))
    assert features.shape == (2, 10)
    assert model.projection(features).shape == (2, width or default)
    if layers == 2:
        by_hand = linear[1](linear[0](features).relu())
        torch.testing.assert_close(model.projection(features), by_hand)
        assert linear[0].out_features == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "adversary"),
    [
        ("ce", None),
        ("mse", None),
        ("ce", PGD(8 / 255, steps=2)),
        ("mse", PGD(8 / 255, steps=2)),
        ("ce", PGD(0.5, steps=2, norm="l2")),
        ("mse", PGD(0.5, steps=2, norm="l2")),
    ],
)
def test_supervised_learns_and_loads_again(loss: str, adversary: PGD | None, tmp_path: Path) -> None:
    model = Supervised(3, SMALL, loss, projection="mlp", adversary=adversary, optimizer=_adam)
    trainer = _trainer(tmp_path, max_epochs=6)
    trainer.fit(model, Digits([0, 1, 2], shots=60, batch_size=20))
    assert trainer.callback_metrics["train/acc"] > 0.6
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = Supervised.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.adversary == model.adversary
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(again.eval()(images), model.eval()(images))


def test_adversary_trains_on_examples_within_its_radius_in_pixels(tmp_path: Path) -> None:
    class Seen(Supervised):
        seen: list[torch.Tensor] = []  # noqa: RUF012

        def _classify(self, batch: Any, batch_idx: int, split: str, loader: int = 0) -> torch.Tensor:
            if split == "train":
                self.seen.append(batch[0])
            return super()._classify(batch, batch_idx, split, loader)

    model = Seen(3, SMALL, adversary={"radius": 0.1})
    data = Digits([0, 1, 2], shots=4, batch_size=12)
    _trainer(tmp_path).fit(model, data)
    assert model.adversary == PGD(0.1)  # the data's normalisation is not the model's
    plain = data.on_after_batch_transfer(next(iter(data.train_plain_dataloader())), 0)[0]
    nearest = torch.cdist(model.seen[0].flatten(1), plain.flatten(1), p=torch.inf).amin(1) * 0.376
    assert nearest.max() <= 0.1 * (1 + 1e-4)
    assert nearest.min() > 0.05


def test_adversary_without_a_known_normalisation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"the datamodule has no mean and std of the normalisation; give PGD\(mean=..., std=...\)"
    ):
        _trainer(tmp_path).fit(Supervised(3, SMALL, adversary=PGD(0.1)), _plain())
    _trainer(tmp_path, fast_dev_run=True).fit(Supervised(3, SMALL, adversary=PGD(0.1, mean=[0], std=[1])), _plain())


def test_probabilities_of_classes_are_labels(tmp_path: Path) -> None:
    images, soft = torch.randn(8, 1, 8, 8), torch.softmax(torch.randn(8, 3), 1)
    loader = DataLoader(TensorDataset(images, soft), batch_size=8)
    model = FineTuner(3, SMALL, allow_random=True, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    trainer = _trainer(tmp_path)
    trainer.fit(model, loader)
    logits = model.eval()(images)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(
        -(soft * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5
    )
    assert trainer.callback_metrics["train/acc"] == (logits.argmax(1) == soft.argmax(1)).float().mean()
    wrong = DataLoader(TensorDataset(images, torch.rand(8, 4)), batch_size=8)
    with pytest.raises(ValueError, match=r"or probabilities \(N, 3\) since num_classes=3, got \(8, 4\)"):
        _trainer(tmp_path).fit(model, wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "hinge"}, "expected loss ce or mse, got 'hinge'"),
        ({"label_smoothing": 1.0}, "expected label_smoothing from 0 to below 1, got 1.0"),
        ({"loss": "mse", "label_smoothing": 0.1}, 'label_smoothing=0.1 is for loss="ce"'),
        ({"mse_weight": 15}, 'mse_weight and mse_target are for loss="mse"'),
        ({"loss": "mse", "mse_target": 0}, "expected mse_weight and mse_target above 0, got 1.0 and 0"),
        ({"projection_dim": 64}, 'projection="none" keeps the 10 features, but projection_dim=64'),
        ({"projection": "conv"}, "expected projection none, linear or mlp, got 'conv'"),
        ({"projection": "mlp", "projection_dim": 0}, "expected projection_dim of at least 1, got 0"),
        ({"adversary": {"radius": -1}}, "expected a PGD radius of at least 0"),
        ({"lr_batch": 0}, "expected lr_batch of at least 1 image, or None, got 0"),
    ],
)
def test_wrong_arguments_of_supervised(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Supervised(3, SMALL, **arguments)


# SupCon and SimCLR


@pytest.mark.parametrize(
    ("method", "views"),
    [
        (SupCon, 2),
        (SimCLR, 3),
        pytest.param(SupCon, 3, marks=pytest.mark.slow),
        pytest.param(SimCLR, 2, marks=pytest.mark.slow),
    ],
)
def test_contrastive_learners_log_their_loss_and_train(method, views: int, tmp_path: Path) -> None:
    model = method(SMALL, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    trainer = _trainer(tmp_path)
    loader = _views(views=views, batch_size=16)
    trainer.fit(model, loader, loader)
    images, labels = next(iter(loader))
    for split, mode in (("val", False), ("train", True)):  # in this order, since the second moves running statistics
        features = model.train(mode).backbone(images.flatten(0, 1))
        z = model.projection(features).unflatten(0, (16, views))
        expected = contrastive_loss(z, labels if method is SupCon else torch.arange(16), 0.1)
        assert trainer.callback_metrics[f"{split}/loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    learner = method(SMALL, optimizer=_sgd)
    first, last = (_trained(learner, epochs, tmp_path) for epochs in (1, 20))
    assert last < first - 0.2


def _trained(model, epochs: int, folder: Path) -> float:
    trainer = _trainer(folder, max_epochs=epochs)
    trainer.fit(model, _views())
    return trainer.callback_metrics["train/loss"].item()


@pytest.mark.parametrize("run", ["validate", "test"])
def test_plain_images_run_through_the_backbone_without_a_loss(run: str, tmp_path: Path) -> None:
    model, passed = SimCLR(SMALL), []
    model.backbone.register_forward_hook(lambda m, args, output: passed.append(tuple(output.shape)))
    trainer = _trainer(tmp_path)
    getattr(trainer, run)(model, _plain(), verbose=False)
    assert passed == [(8, 10), (8, 10)]
    assert trainer.callback_metrics == {}
    getattr(trainer, run)(model, _views(), verbose=False)
    assert set(trainer.callback_metrics) == {"val/loss" if run == "validate" else "test/loss"}


def test_contrastive_checkpoints_load_again_and_hold_plain_data(tmp_path: Path) -> None:
    model = SupCon(SMALL, temperature=0.2, projection="linear", projection_dim=6, optimizer=_sgd)
    trainer = _trainer(tmp_path)
    trainer.fit(model, _views())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = SupCon.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert (again.temperature, again.projection.out_features) == (0.2, 6)
    assert torch.equal(again.projection.weight, model.projection.weight)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (_plain(), r"SimCLR trains on views \(N, V, C, H, W\), got images \(8, 1, 8, 8\); give the datamodule views=2"),
        (_views(views=1), "a contrastive loss needs at least 2 views of each sample, got 1"),
        (_views(batch_size=1), "at least 2 samples a batch, got 1; a larger batch_size or drop_last=True fixes it"),
    ],
)
def test_batches_that_cannot_be_contrasted(loader: DataLoader, message: str, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    with pytest.raises(ValueError, match=message):
        trainer.fit(SimCLR(SMALL), loader)
    assert trainer.global_step == 0


def test_wrong_arguments_of_contrastive_learners(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a temperature above 0, got -1"):
        SupCon(SMALL, temperature=-1)
    with pytest.raises(ValueError, match='projection="none" keeps the 10 features'):
        SupCon(SMALL, projection="none", projection_dim=128)
    with pytest.raises(ValueError, match="SimCLR has no classifier to predict with"):
        _trainer(tmp_path).predict(SimCLR(SMALL), _plain())


@pytest.mark.parametrize("method", [SupCon, SimCLR])
def test_two_processes_train_as_one_with_the_global_batch(method, tmp_path: Path) -> None:
    ends, values = [], []
    for processes in (1, 2):
        torch.manual_seed(0)
        model = method(VIT, optimizer=_sgd)  # without BatchNorm, which would see half a batch
        spread = {"strategy": "ddp_fork", "devices": 2} if processes == 2 else {"devices": 1}
        trainer = _trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0, **spread)
        loader = _views(size=16, batch_size=16 // processes)
        trainer.fit(model, loader, loader)
        ends.append(model.state_dict())
        values.append({name: trainer.callback_metrics[name].item() for name in ("train/loss", "val/loss")})
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-5, atol=1e-6)
    assert values[0] == pytest.approx(values[1], rel=1e-5)


# Learning rates, switches, faults


def test_warm_up_and_cosine() -> None:
    optimizer = _sgd([torch.nn.Parameter(torch.zeros(1))])
    scheduler = WarmupCosine(optimizer, epochs=6, warmup=2)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1 * 0.853553, 0.05, 0.1 * 0.146447], rel=1e-5)
    for _ in range(3):  # a run of more epochs than it was told
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
        scheduler.step()
    longer = WarmupCosine(_sgd([torch.nn.Parameter(torch.zeros(1))]), epochs=9)
    longer.load_state_dict(scheduler.state_dict())
    assert (longer.epochs, longer.last_epoch) == (9, 9)
    for warmup in (-1, 6):
        with pytest.raises(ValueError, match=f"expected a warmup of 0 to 5 epochs, since epochs=6, got {warmup}"):
            WarmupCosine(optimizer, epochs=6, warmup=warmup)


@pytest.mark.parametrize(("interval", "rates"), [("step", [0.1, 0.05, 0.025]), ("epoch", [0.1, 0.1, 0.1])])
def test_a_contrastive_learner_steps_its_scheduler_as_told(interval: Any, rates: list[float], tmp_path: Path) -> None:
    class Rates(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    seen: list[float] = []
    halve = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    model = SimCLR(SMALL, optimizer=_sgd, lr_scheduler=halve, lr_interval=interval)
    _trainer(tmp_path, callbacks=[Rates()]).fit(model, _views(24))
    assert seen == pytest.approx(rates)


@pytest.mark.parametrize(("lr_batch", "factor"), [(None, 1), (256, 8 * 2 / 256), (4, 4)])
def test_learning_rate_is_scaled_to_the_images_a_step_and_logged(
    lr_batch: int | None, factor: float, tmp_path: Path
) -> None:
    model = SimCLR(SMALL, optimizer=_sgd, lr_scheduler=lambda o: WarmupCosine(o, 4, 1), lr_batch=lr_batch)
    trainer = _trainer(tmp_path, accumulate_grad_batches=2, logger=CSVLogger(tmp_path, name="", version="a"))
    trainer.fit(model, _views())
    assert trainer.optimizers[0].param_groups[0]["initial_lr"] == pytest.approx(0.1 * factor)
    text = (tmp_path / "a" / "metrics.csv").read_text()
    assert ("lr/factor" in text) == (lr_batch is not None)


@pytest.mark.filterwarnings("ignore:The `lr_scheduler.step` was called")
def test_a_plateau_of_a_contrastive_loss_is_that_of_training(tmp_path: Path) -> None:
    never_better = {"patience": 0, "factor": 0.1, "threshold": 1e9, "threshold_mode": "abs"}
    plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, **never_better)
    trainer = _trainer(tmp_path, max_epochs=3)
    trainer.fit(SimCLR(SMALL, optimizer=_sgd, lr_scheduler=plateau), _views(), _plain())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**2)


@pytest.mark.parametrize("options", [{}, {"limit_val_batches": 0}])
def test_a_plateau_of_a_validation_that_is_not_there_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    model = Supervised(3, SMALL, lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    data = (_plain(), _plain()) if options else (_plain(),)
    message = "the scheduler monitors val/loss, but the run has no validation; give validation images, or"
    with pytest.raises(ValueError, match=message):
        _trainer(tmp_path, **options).fit(model, *data)


@pytest.mark.parametrize(
    ("options", "accumulated"), [({"batch_size": 64}, 1), ({"batch_size": 4}, 100), ({"batch_size": 5}, 3)]
)
def test_a_step_has_no_more_images_than_an_epoch(options: dict[str, int], accumulated: int, tmp_path: Path) -> None:
    model = Supervised(2, SMALL, optimizer=_sgd, lr_batch=16)
    trainer = _trainer(tmp_path, accumulate_grad_batches=accumulated)
    trainer.fit(model, datamodule=Digits([0, 1], shots=5, image_size=8, **options))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 10 / 16)


def test_scaling_needs_a_batch_size(tmp_path: Path) -> None:
    loader = DataLoader(_views().dataset, batch_sampler=[[0, 1], [2, 3]])
    with pytest.raises(ValueError, match="lr_batch needs a training DataLoader with a batch_size"):
        _trainer(tmp_path).fit(SimCLR(SMALL, lr_batch=256), loader)


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_loss_that_is_not_finite_stops_the_run(saved: bool, tmp_path: Path) -> None:
    class Poison(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 3:
                pl_module.projection[2].weight.data.fill_(torch.nan)

    callbacks = [Poison(), *([ModelCheckpoint(tmp_path, filename="kept")] if saved else [])]
    trainer = _trainer(tmp_path, max_epochs=3, callbacks=callbacks, enable_checkpointing=saved)
    model = SimCLR(SMALL, optimizer=_sgd)
    last = str(tmp_path / "kept.ckpt") if saved else "none yet"
    message = f"the training loss is nan by step 3, at learning rate 0.1; last checkpoint: {last}. Go on from there"
    with pytest.raises(FloatingPointError, match=message):
        trainer.fit(model, _views())


def test_an_epoch_without_a_batch_is_refused(tmp_path: Path) -> None:
    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            return iter(_plain())

    with pytest.raises(ValueError) as error:
        _trainer(tmp_path, max_epochs=2).fit(Supervised(3, {"name": "test_resnet", "in_chans": 1}), Data())
    assert str(error.value) == (
        "expected a training loader that begins again in each epoch, got no batch in epoch 1: a generator ends after "
        "its first epoch, and litdata's StreamingDataLoader skips the epoch after one that was resumed midway; give a "
        "DataLoader, or resume from a checkpoint of an epoch's end"
    )


def test_an_epoch_that_a_callback_stops_needs_no_batch(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    trainer = _trainer(tmp_path, max_epochs=3, callbacks=[Stop()])
    trainer.fit(Supervised(3, {"name": "test_resnet", "in_chans": 1}), _plain())
    assert trainer.global_step == 2


def _first_loss(folder: Path, method, backbone: dict[str, Any], **arguments: Any) -> float:
    torch.manual_seed(0)
    model = Supervised(3, backbone) if method is Supervised else method(backbone)
    trainer = _trainer(folder, limit_train_batches=1, **arguments)
    trainer.fit(model, _plain() if method is Supervised else _views())
    return trainer.callback_metrics["train/loss"].item()


@pytest.mark.parametrize("method", [Supervised, SupCon])
@pytest.mark.parametrize(
    ("backbone", "arguments", "tolerance"),
    [
        ({"channels_last": True}, {}, 1e-5),
        ({}, {"precision": "bf16-mixed"}, 0.03),
        ({"channels_last": True}, {"precision": "bf16-mixed"}, 0.03),
    ],
)
def test_a_switch_leaves_the_loss(method, backbone: dict, arguments: dict, tolerance: float, tmp_path: Path) -> None:
    torch.manual_seed(1)
    plain = _first_loss(tmp_path, method, EIGHTS)
    torch.manual_seed(1)
    assert _first_loss(tmp_path, method, EIGHTS | backbone, **arguments) == pytest.approx(plain, rel=tolerance)


def test_channels_last_reaches_the_convolutions_and_not_the_architecture() -> None:
    backbone = Backbone(**EIGHTS, channels_last=True)
    assert backbone.layers["layer2.0"] == 16  # what takes passes of its own, once
    formats = []
    backbone.net.layer2.register_forward_hook(
        lambda m, args, output: formats.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    backbone(torch.randn(2, 1, 8, 8))
    backbone.stages(torch.randn(2, 1, 8, 8), ["layer2.0"])
    assert formats == [True, True]
    assert backbone.spec == EIGHTS


# What a run leaves


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_saved_backbone_is_read_by_timm_and_by_ours(suffix: str, name: str, tmp_path: Path) -> None:
    backbone = Backbone(name, channels_last=True).eval()
    path = str(tmp_path / "deep" / f"backbone.{suffix}")
    backbone.save(path)
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        expected = backbone(images)
        theirs = timm.create_model(name, num_classes=0, checkpoint_path=path).eval()
        torch.testing.assert_close(theirs(images), expected)
        torch.testing.assert_close(Backbone(name, checkpoint=path).eval()(images), expected)


def test_export_takes_the_backbone_out_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = SupCon(SMALL)
    trainer = _trainer(tmp_path)
    trainer.fit(model, _views())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    path = str(tmp_path / "backbone.safetensors")
    assert main(["export", str(tmp_path / "run.ckpt"), path]) == 0
    assert "backbone.safetensors: 126 tensors of the backbone of" in capsys.readouterr().out
    tuned = FineTuner(3, SMALL, checkpoint=path)
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(tuned.backbone.state_dict()[key], value)


def test_what_cannot_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(Backbone(**SMALL).net.state_dict(), tmp_path / "plain.pth")
    torch.save({f"backbone.net.{k}": v for k, v in Backbone(**SMALL).net.state_dict().items()}, tmp_path / "a.ckpt")
    torch.save({"state_dict": {}, "hparams": Fraction(1, 2)}, tmp_path / "o.ckpt")
    (tmp_path / "g.ckpt").write_bytes(b"garbage" * 9)
    (tmp_path / "g.safetensors").write_bytes(b"garbage" * 9)
    for words, message in {
        (str(tmp_path / "none.ckpt"), "a.pth"): "no checkpoint",
        (str(tmp_path / "plain.pth"), "a.pth"): "has no tensors below 'backbone.net.', only 126 (conv1.weight, ",
        (
            str(tmp_path / "a.ckpt"),
            "a.txt",
        ): "expected a target that ends in .onnx, .pt2, .safetensors or .pth, or for a folder in /, got 'a.txt'",
        (str(tmp_path / "g.ckpt"), "a.pth"): "g.ckpt' as a checkpoint of tensors: it is damaged or no file of",
        (str(tmp_path / "g.safetensors"), "a.pth"): "g.safetensors' as a checkpoint of tensors: it is damaged",
        (str(tmp_path / "o.ckpt"), "a.pth"): "it holds objects of fractions.Fraction",
    }.items():
        assert main(["export", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_command_line_with_lars_warm_up_and_scaling(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pretrain.yaml").write_text("""
model:
  class_path: SimCLR
  init_args:
    backbone: {name: resnet18, stem: cifar, in_chans: 1, channels: [8, 16, 24, 32], channels_last: true}
    temperature: 0.5
    optimizer: {class_path: timm.optim.Lars, init_args: {lr: 0.3, momentum: 0.9, weight_decay: 1.0e-6}}
    lr_scheduler: {class_path: WarmupCosine, init_args: {epochs: 2, warmup: 1}}
    lr_batch: 256
data: test_pretrain.Views
""")
    place = ["--trainer.default_root_dir", str(tmp_path), "--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    words = ["fit", "--config", str(tmp_path / "pretrain.yaml"), *place, "--trainer.max_epochs", "2"]
    with caplog.at_level("INFO"):
        main([*words, "--trainer.enable_progress_bar", "false"])
    assert "learning rate scaled by 0.03125, from 256 images a step" in caplog.text
    assert main([*words, "--model.temperature", "1e-46"]) == 2
    assert "error: the training loss is inf by step 0, at learning rate" in capsys.readouterr().err


@pytest.mark.parametrize("scheduling", [{0: 4}, {0: 2, 1: 4}])
def test_scaling_counts_the_batches_that_a_scheduler_accumulates(scheduling: dict[int, int], tmp_path: Path) -> None:
    model = SimCLR(SMALL, optimizer=partial(torch.optim.SGD, lr=0.1), lr_batch=16)
    trainer = _trainer(tmp_path, max_epochs=2, callbacks=[GradientAccumulationScheduler(scheduling)])
    if len(scheduling) > 1:
        with pytest.raises(
            ValueError, match=r"but GradientAccumulationScheduler accumulates \[2, 4\] batches in turn;"
        ):
            trainer.fit(model, _views())
        return
    trainer.fit(model, _views(32))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * _views().batch_size * 4 / 16)


def test_a_model_that_was_attacked_is_tested_on_data_of_unknown_normalisation(tmp_path: Path) -> None:
    model = Supervised(3, SMALL, adversary=PGD(8 / 255))
    _trainer(tmp_path).test(model, _plain(), verbose=False)

"""NeuralCollapseTracker on modules of ours and of others."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stranger
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import reference
from ncfinetune import FineTuner, Supervised
from ncfinetune.callbacks import NeuralCollapseTracker, OnlineProbe
from ncfinetune.callbacks.adapters import BatchReader
from ncfinetune.callbacks.observer import LayerObserver
from ncfinetune.collapse import class_moments, disagreement, nc1
from ncfinetune.datamodules import Digits
from ncfinetune.moment_accumulator import MomentAccumulator
from ncfinetune.moments import NonFiniteFeaturesError

SMALL = {"name": "resnet18", "stem": "cifar", "in_chans": 1, "channels": [4, 6, 8, 10]}


class Stranger(stranger.Stranger):
    """With BatchNorm, which training changes."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__(nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(noise)))


def _loader(shuffle: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(60) % 3
    images = torch.randn(60, 1, 6, 6, generator=generator) + labels.view(-1, 1, 1, 1)
    return DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=shuffle)


def _trainer(folder: Path, *callbacks: Callback, **arguments: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    logger = CSVLogger(folder, name="", version="run")
    return Trainer(
        logger=logger, callbacks=list(callbacks), accelerator="cpu", **{"max_epochs": 2, **quiet, **arguments}
    )


def _nc1(module: nn.Module, layer: nn.Module, loader: DataLoader) -> float:
    """NC1 of a layer's spatial means over a loader, by the reference."""
    caught: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda m, i, o: caught.append(o.mean((2, 3))))
    with torch.no_grad():
        module.eval()
        labels = [labels for images, labels in loader if module(images) is not None]
    handle.remove()
    return reference.nc1(torch.cat(caught).numpy(), torch.cat(labels).numpy())


def test_values_are_those_of_the_weights_after_the_epoch(tmp_path: Path) -> None:
    model = Stranger(noise=0.5)
    trainer = _trainer(tmp_path, NeuralCollapseTracker(3, layers=["features.0", "penultimate"]))
    trainer.fit(model, _loader(shuffle=True), _loader())
    for name, layer in {"features.0": model.features[0], "penultimate": model.features[3]}.items():
        expected = pytest.approx(_nc1(model, layer, _loader()), rel=1e-5)
        assert trainer.callback_metrics[f"nc1/train/{name}"].item() == expected
        assert trainer.callback_metrics[f"nc1/val/{name}"].item() == expected


def _seen(model: Stranger) -> tuple[torch.Tensor, torch.Tensor]:
    """Features before the classifier of the images of `_loader`, and labels."""
    images, labels = _loader().dataset.tensors
    with torch.no_grad():
        return model.eval().features(images).mean((2, 3)), labels


@pytest.mark.parametrize("first", [True, False])
def test_nc3_is_of_the_weights_that_validation_has_under_an_average(first: bool, tmp_path: Path) -> None:
    """The images of validation are those of training, which are measured within the same average."""
    tracker, average = NeuralCollapseTracker(3), EMAWeightAveraging(decay=0.99)
    callbacks = [tracker, average] if first else [average, tracker]
    _trainer(tmp_path, *callbacks, max_epochs=3).fit(Stranger(), _loader(), _loader())
    for name in ("nc1", "nc3"):
        found = [tracker.values[f"{name}/{split}/penultimate"] for split in ("val", "train")]
        assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_samples_that_are_left_out_decide_nothing(tmp_path: Path) -> None:
    """NC4 of the samples of two classes of three, where the third is left out by its number."""
    model, tracker = Stranger(), NeuralCollapseTracker(3, ignore_index=0)
    _trainer(tmp_path, tracker).fit(model, _loader(), _loader())
    features, labels = _seen(model)
    kept = labels != 0
    moments = class_moments(features[kept], labels[kept], 3)
    expected = disagreement(features[kept], moments, model.classify.weight.detach(), model.classify.bias.detach())
    assert tracker.values["nc4/val/penultimate"] == pytest.approx(float(expected))
    assert float(expected) != pytest.approx(
        float(disagreement(features, moments, model.classify.weight.detach(), model.classify.bias.detach()))
    )


def test_a_left_out_sample_may_be_nan() -> None:
    features, labels = torch.randn(12, 4), torch.arange(12) % 4
    features[labels == 3] = torch.nan
    accumulator = MomentAccumulator(4, ignore_index=3)
    accumulator.update(features, labels)
    expected = nc1(class_moments(features[labels < 3], labels[labels < 3], 4))
    torch.testing.assert_close(nc1(accumulator.moments()), expected)
    with pytest.raises(NonFiniteFeaturesError, match="got 3 of 12 samples with nan or inf"):
        MomentAccumulator(4).update(features, labels)


def test_two_trackers_of_the_same_numbers_are_refused(tmp_path: Path) -> None:
    trackers = [NeuralCollapseTracker(3), NeuralCollapseTracker(3, layers=["features.0", "penultimate"])]
    message = "expected trackers with different layers or metrics, got two that measure 'penultimate', whose numbers"
    with pytest.raises(ValueError, match=message):
        _trainer(tmp_path, *trackers).fit(Stranger(), _loader(), _loader())
    trackers = [NeuralCollapseTracker(3), NeuralCollapseTracker(3, layers=["features.0"])]
    _trainer(tmp_path, *trackers).fit(Stranger(), _loader(), _loader())
    assert {len(tracker.records["val"]) for tracker in trackers} == {2}


def test_a_later_validation_leaves_the_records_of_the_training(tmp_path: Path) -> None:
    model, tracker = Stranger(), NeuralCollapseTracker(3)
    trainer = _trainer(tmp_path, tracker)
    trainer.fit(model, _loader(), _loader())
    before = copy.deepcopy(tracker.records)
    images, labels = _loader().dataset.tensors
    trainer.validate(model, DataLoader(TensorDataset(images + labels.view(-1, 1, 1, 1), labels), batch_size=16))
    assert tracker.records == before
    assert tracker.values["nc1/val/penultimate"] != before["val"][2]["nc1"]["penultimate"]
    alone, found = NeuralCollapseTracker(3), []
    for seed in range(2):  # without a fit the last validation counts
        torch.manual_seed(seed)
        _trainer(tmp_path / str(seed), alone).validate(Stranger(), _loader())
        found.append(alone.records["val"][0]["nc1"]["penultimate"])
        assert found[-1] == alone.values["nc1/val/penultimate"]
    assert found[0] != found[1]


def test_classes_that_a_limit_of_one_batch_leaves_out_are_reported(tmp_path: Path) -> None:
    images, labels = _loader().dataset.tensors
    first = labels.argsort(stable=True)
    by_class = DataLoader(TensorDataset(images[first], labels[first]), batch_size=30)
    with pytest.warns(UserWarning, match="saw 2 of 3 classes in a pass over the val set, which a limit on batches"):
        _trainer(tmp_path, NeuralCollapseTracker(3), limit_val_batches=1, max_epochs=1).fit(
            Stranger(), _loader(), by_class
        )


def test_there_is_no_rank_where_every_sample_is_left_out(tmp_path: Path) -> None:
    images, labels = _loader().dataset.tensors
    unlabelled = DataLoader(TensorDataset(images, torch.full_like(labels, -1)), batch_size=16)
    tracker = NeuralCollapseTracker(3, metrics=["numerical_rank"], ignore_index=-1)
    with pytest.warns(UserWarning, match="on the val set is logged as nan: no samples in the val set"):
        _trainer(tmp_path, tracker, max_epochs=1, num_sanity_val_steps=0).fit(Stranger(), _loader(), unlabelled)
    assert np.isnan(tracker.values["numerical_rank/val/penultimate"])


def test_training_set_is_measured_before_the_first_step(tmp_path: Path) -> None:
    model = Stranger()
    expected = _nc1(model, model.features[3], _loader())
    trainer = _trainer(tmp_path, NeuralCollapseTracker(3))
    trainer.fit(model.train(), _loader(), _loader())
    rows = np.genfromtxt(tmp_path / "run" / "metrics.csv", delimiter=",", names=True)
    steps, values = rows["step"], rows["nc1trainpenultimate"]
    measured = {int(step): value for step, value in zip(steps, values, strict=True) if not np.isnan(value)}
    assert sorted(measured) == [0, 3, 7]
    assert measured[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_tracked_run_ends_in_the_same_weights(noise: float, tmp_path: Path) -> None:
    ends = []
    for callbacks in ((), (NeuralCollapseTracker(3, layers=["features.*", "penultimate"]),)):
        seed_everything(0, verbose=False)
        model = Stranger(noise)
        _trainer(tmp_path, *callbacks, max_epochs=3).fit(model, _loader(shuffle=True), _loader())
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@pytest.mark.parametrize("validated", [True, False])
def test_a_classifier_whose_weight_has_a_state_trains_alike(validated: bool, tmp_path: Path) -> None:
    ends = []
    for callbacks in ((), (NeuralCollapseTracker(3), OnlineProbe(3, kind="ridge"))):
        seed_everything(0, verbose=False)
        model = Stranger()
        model.classify = nn.utils.parametrizations.spectral_norm(model.classify)  # each look in training is a step
        validation = {"limit_val_batches": 1.0 if validated else 0}
        _trainer(tmp_path, *callbacks, **validation).fit(model, _loader(shuffle=True), _loader())
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


class Centring(nn.Module):
    """Subtracts a running mean, and counts its batches, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(6, 1, 1))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.batches = self.batches + 1
        self.centre.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3))[:, None, None])
        return (x - self.centre) / (1 + 0.01 * self.batches)


def test_a_network_with_a_state_of_its_own_trains_alike(tmp_path: Path) -> None:
    ends = []
    for callbacks in ((), (NeuralCollapseTracker(3), OnlineProbe(3, kind="ridge", knn=3))):
        seed_everything(0, verbose=False)
        model = Stranger()
        model.features.append(Centring())
        _trainer(tmp_path, *callbacks).fit(model, _loader(shuffle=True), _loader())
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


# Newer releases of Lightning warn of modules in eval mode.
@pytest.mark.filterwarnings("ignore:.*eval mode at the start")
def test_modes_and_stage_are_as_they_were_and_hooks_are_gone(tmp_path: Path) -> None:
    class Watched(Stranger):
        def on_train_epoch_end(self) -> None:  # runs after the callbacks
            assert self.trainer.training
            assert self.features[1].training
            assert not self.features[0].training

    model = Watched()
    model.features[0].eval()
    _trainer(tmp_path, NeuralCollapseTracker(3, layers=["features.0", "penultimate"])).fit(model, _loader(), _loader())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("train", ["none", "all"])
def test_our_learners_by_the_words_of_the_backbone(train: str, tmp_path: Path) -> None:
    model = FineTuner(3, SMALL, train=train, skip_from="layer2.1", allow_random=True)
    trainer = _trainer(tmp_path, NeuralCollapseTracker(layers=["layer*.1", "penultimate"]), max_epochs=1)
    data = Digits([0, 1, 2], shots=8)
    trainer.fit(model, data)
    logged = {name for name in trainer.callback_metrics if name.startswith("nc1/train/")}
    assert logged == {f"nc1/train/{name}" for name in ("layer1.1", "layer2.1", "layer3.1", "layer4.1", "penultimate")}
    for name in ("layer1.1", "layer2.1"):
        loader = [data.on_after_batch_transfer(batch, 0) for batch in data.train_plain_dataloader()]
        expected = _nc1(model, model.backbone.layer(name), loader)
        assert trainer.callback_metrics[f"nc1/train/{name}"].item() == pytest.approx(expected, rel=1e-4)


def test_epochs_between_passes_and_their_length(tmp_path: Path) -> None:
    class Counted(Stranger):
        passed = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.passed += self.trainer.validating
            return super().forward(x)

    model = Counted()
    tracker = NeuralCollapseTracker(3, train_every_n_epochs=2, max_train_batches=2)
    _trainer(tmp_path, tracker, max_epochs=5, limit_val_batches=0).fit(model, _loader(), _loader())
    assert model.passed == 4 * 2  # before the first epoch, after the second and the fourth, and after the last


@pytest.mark.parametrize("end", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 7}, {"max_epochs": 9}])
def test_the_end_of_a_fit_is_measured_and_drawn_whenever_it_comes(end: dict[str, int], tmp_path: Path) -> None:
    class Ending(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 2  # as EarlyStopping sets it

    tracker, drawn = NeuralCollapseTracker(3, train_every_n_epochs=5), []
    trainer = _trainer(tmp_path, tracker, *([Ending()] if end == {"max_epochs": 9} else []), **end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncfinetune.callbacks.pictures.accepting", lambda trainer: [trainer])
        patch.setattr("ncfinetune.callbacks.pictures.log_figures", lambda _, figures, step: drawn.append(step))
        trainer.fit(Stranger(), _loader(), _loader())
    assert list(tracker.history["train"]) == [0, trainer.current_epoch]
    assert drawn == [0, trainer.global_step]


def test_pictures_of_an_earlier_pass_are_not_drawn_again(tmp_path: Path) -> None:
    class Failing(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = True  # after the tracker was asked whether to measure this epoch

    tracker, drawn = NeuralCollapseTracker(3, train_every_n_epochs=5), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ncfinetune.callbacks.pictures.accepting", lambda trainer: [trainer])
        patch.setattr("ncfinetune.callbacks.pictures.log_figures", lambda _, figures, step: drawn.append(step))
        _trainer(tmp_path, tracker, Failing(), max_epochs=9).fit(Stranger(), _loader(), _loader())
    assert drawn == [0]


def test_no_pass_when_never(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, NeuralCollapseTracker(3, train_every_n_epochs=0))
    trainer.fit(Stranger(), _loader(), _loader())
    assert {name for name in trainer.callback_metrics if name.startswith("nc1/")} == {"nc1/val/penultimate"}
    assert not any("/train/" in name or name.startswith("nc4") for name in trainer.callback_metrics)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory")
def test_checkpoints_are_recorded_at_the_epoch_of_their_weights(tmp_path: Path) -> None:
    """A fit that is over stays at its last epoch, and a new Trainer at none, whatever checkpoint they load."""
    tracker, saved = NeuralCollapseTracker(3), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer = _trainer(tmp_path, tracker, saved, max_epochs=3, enable_checkpointing=True)
    trainer.fit(Stranger(), _loader(), _loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fitted = {epoch: dict(layers) for epoch, layers in tracker.history["val"].items()}
    assert list(fitted) == [1, 2, 3]
    elsewhere = NeuralCollapseTracker(3)
    for name, epochs in {"epoch=0.ckpt": 1, "epoch=1.ckpt": 2, "last.ckpt": 3}.items():
        trainer.validate(Stranger(), _loader(), ckpt_path=tmp_path / name, verbose=False)
        assert tracker.history["val"] == {e: pytest.approx(layers) for e, layers in fitted.items()}
        fresh = _trainer(tmp_path / f"val_{epochs}", elsewhere)
        fresh.validate(Stranger(), _loader(), ckpt_path=tmp_path / name, verbose=False)
        assert elsewhere.history["val"][epochs] == pytest.approx(fitted[epochs])
    assert list(elsewhere.history["val"]) == [1, 2, 3]


def test_test_set_is_measured_as_it_passes(tmp_path: Path) -> None:
    model = Supervised(3, SMALL)
    trainer = _trainer(tmp_path, NeuralCollapseTracker())
    data = Digits([0, 1, 2])
    trainer.test(model, data, verbose=False)
    with torch.no_grad():
        batches = [data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader()]
        features = torch.cat([model.eval().backbone(images) for images, _ in batches])
    expected = reference.nc1(features.numpy(), torch.cat([labels for _, labels in batches]).numpy())
    assert trainer.callback_metrics["nc1/test/penultimate"].item() == pytest.approx(expected, rel=1e-5)


def test_half_precision_features_are_measured_in_single() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()).bfloat16()
    observer = LayerObserver(model, ["0"], BatchReader("NeuralCollapseTracker", 3))
    images = torch.randn(2, 1, 5, 5).bfloat16()
    observer.listen((images, torch.tensor([1, 2])))
    model(images)
    features, labels = observer.take()
    expected = model[0](images).double().mean((2, 3))  # a mean in bfloat16 is off by 1e-3
    torch.testing.assert_close(features["0"], expected.float(), rtol=1e-6, atol=1e-6)
    assert labels.tolist() == [1, 2]
    assert not observer.caught


def test_images_without_augmentation_are_asked_of_the_datamodule(tmp_path: Path) -> None:
    class Asked(Digits):
        asked = 0

        def train_plain_dataloader(self) -> DataLoader:
            self.asked += 1
            return super().train_plain_dataloader()

    data = Asked([0, 1, 2], shots=8)
    _trainer(tmp_path, NeuralCollapseTracker()).fit(Supervised(3, SMALL), data)
    assert data.asked == 1  # once a run, so that its workers persist


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "feature.0"}, r"no layer fits 'feature.0'; .*nearest: features.0"),
        (
            {"num_classes": 5},
            r"no linear layer with num_classes=5 outputs, .*Linear layers \(outputs\): classify \(3\)",
        ),
        ({"num_classes": None}, r"needs the number of classes, .*NeuralCollapseTracker\(num_classes=...\)"),
    ],
)
def test_what_cannot_be_tracked_is_said_before_the_first_epoch(arguments: dict, message: str, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, NeuralCollapseTracker(**{"num_classes": 3, **arguments}), limit_val_batches=0)
    with pytest.raises(ValueError, match=message):
        trainer.fit(Stranger(), _loader(), _loader())
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_every_n_epochs": -1}, "expected train_every_n_epochs of at least 0, got -1"),
        ({"max_train_batches": 0}, "expected max_train_batches of at least 1, or None for all, got 0"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuralCollapseTracker(**arguments)


def test_batches_without_labels_are_refused(tmp_path: Path) -> None:
    class Unlabelled(Stranger):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self(batch[0]).sum()

    loader = DataLoader(TensorDataset(torch.randn(8, 1, 6, 6)), batch_size=4)
    with pytest.raises(ValueError, match=r"no integer labels \(N,\) .* got list\(float32\(4, 1, 6, 6\)\)"):
        _trainer(tmp_path, NeuralCollapseTracker(3), limit_val_batches=0).fit(Unlabelled(), loader, loader)

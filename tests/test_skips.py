"""The choice of layers to skip from: its errors against brute force, and what it takes and leaves."""

import copy
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from tiny import SMALL, plain_sgd, trainer_in
from torch.multiprocessing import ProcessRaisedException

from ncfinetune import FineTuner, finetune, skips
from ncfinetune.callbacks import NeuralCollapseTracker
from ncfinetune.datamodules import Digits
from ncfinetune.probes import ridge
from ncfinetune.skips import choose_skips


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.arange(24) % 3
MEANS = 2 * _noise(3, 4, seed=1)


def _brute(features: torch.Tensor, lam: float) -> torch.Tensor:
    """Squared errors of the scores of each sample by a ridge regression without it, one solved after the other."""
    targets = torch.eye(3, dtype=torch.float64)[LABELS]
    errors = []
    for out in range(len(LABELS)):
        kept = torch.arange(len(LABELS)) != out
        x, y = features[kept], targets[kept]
        centred = x - x.mean(0)
        weight = torch.linalg.solve(centred.T @ centred + lam * torch.eye(x.shape[1]).double(), centred.T @ y)
        errors.append((targets[out] - y.mean(0) - (features[out] - x.mean(0)) @ weight).square().sum())
    return torch.stack(errors)


@pytest.mark.parametrize("width", [3, 40])  # narrower and wider than there are samples
def test_errors_are_those_of_fitting_without_each_sample(width: int) -> None:
    start, block = MEANS[LABELS] + _noise(24, 4), 5 + _noise(24, width, seed=2)
    before, after = skips._left_out_errors([skips._centred(start)], {"block": skips._centred(block)}, LABELS)
    lam = float(ridge(start, LABELS, 3).lam)
    torch.testing.assert_close(before, _brute(start, lam))
    torch.testing.assert_close(after["block"], _brute(torch.cat([start, block], 1), lam))
    alone, _ = skips._left_out_errors([], {"block": skips._centred(block)}, LABELS)
    torch.testing.assert_close(alone, _brute(torch.zeros(24, 1).double(), 1.0))


def test_takes_what_helps_in_order_and_leaves_noise() -> None:
    layers = {
        "noise": _noise(24, 6, seed=3),
        "some": MEANS[LABELS][:, :2] + 0.8 * _noise(24, 2, seed=4),
        "most": MEANS[LABELS] + 0.3 * _noise(24, 4, seed=5),
        "again": MEANS[LABELS] + 0.3 * _noise(24, 4, seed=5),
    }
    start = _noise(24, 4)
    assert choose_skips(start, layers, LABELS) == ["most"]
    assert choose_skips(start, {"noise": layers["noise"]}, LABELS) == []
    assert choose_skips(start, layers, LABELS, most=4)[0] == "most"
    assert "noise" not in choose_skips(start, layers, LABELS, most=4)


@pytest.mark.parametrize("most", [1, 2])
def test_no_more_layers_are_taken_than_asked_for(most: int) -> None:
    layers = {name: (number == LABELS).double()[:, None] for number, name in enumerate(("zero", "one"))}
    assert len(choose_skips(_noise(24, 4), layers, LABELS, most=most)) == most


def test_a_gain_of_one_standard_error_is_not_clear() -> None:
    start, block = MEANS[LABELS] + 2 * _noise(24, 4), 0.4 * MEANS[LABELS] + _noise(24, 4, seed=33)
    lam = ridge(start, LABELS, 3).lam
    gain = _brute(start, lam) - _brute(torch.cat([start, block], 1), lam)
    assert gain.mean() / (gain.std() / 24**0.5) == pytest.approx(1, abs=0.1)
    assert choose_skips(start, {"block": block}, LABELS) == []


def test_without_features_to_start_from_the_best_layer_is_taken_in_any_case() -> None:
    layers = {"one": _noise(24, 6, seed=3), "other": MEANS[LABELS] + _noise(24, 4)}
    assert choose_skips(None, layers, LABELS) == ["other"]
    assert choose_skips(None, {"one": layers["one"]}, LABELS) == ["one"]


def test_less_than_one_is_refused() -> None:
    with pytest.raises(ValueError, match="expected most of at least 1, got 0"):
        choose_skips(None, {}, LABELS, most=0)


def _auto(**knobs) -> FineTuner:
    torch.manual_seed(0)
    options = {"skip_from": "auto", "skip_join": "concat", "allow_random": True, "optimizer": plain_sgd, **knobs}
    return FineTuner(3, SMALL, **options)


def _data() -> Digits:
    return Digits([0, 1, 2], shots=20, batch_size=16, augmentation="plain")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    "knobs",
    [
        {"train": "layer4.1", "head_lr_factor": 3, "cache": "memory"},
        pytest.param({"max_skips": 2}, marks=pytest.mark.slow),
        pytest.param({"skip_join": "only", "head_init": "ridge"}, marks=pytest.mark.slow),
    ],
)
def test_fit_takes_the_layers_that_the_choice_names(
    knobs: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = _auto(**knobs), _data()
    tracker = NeuralCollapseTracker(layers=["layer4.1", "penultimate"])
    trainer = trainer_in(tmp_path, enable_checkpointing=True, callbacks=[tracker])
    with caplog.at_level("INFO"):
        trainer.fit(model, data)
    fresh = _auto(**knobs).eval()
    names = [*fresh.backbone.layers, "penultimate"]
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.train_plain_dataloader()]
    with torch.no_grad():
        stages = [fresh.backbone.stages(images, names) for images, _ in batches]
    features = {name: torch.cat([stage[name] for stage in stages]) for name in names}
    start = features.pop("penultimate")
    only = knobs.get("skip_join") == "only"
    labels = torch.cat([labels for _, labels in batches])
    expected = choose_skips(None if only else start, features, labels, knobs.get("max_skips", 1))
    assert expected
    assert model.hparams["skip_from"] == expected
    assert f"skip connections: from {', '.join(expected)}" in caplog.text
    widths = sum(model.backbone.layers[name] for name in expected)
    assert model.classifier.in_features == widths + (0 if only else model.backbone.dim)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert "nc3/val/penultimate" in trainer.callback_metrics  # the tracker found the classifier

    path = trainer.checkpoint_callback.best_model_path
    again = FineTuner.load_from_checkpoint(path).eval()
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(again(images), model.eval()(images))
    resumed = _auto(**knobs)
    trainer_in(tmp_path, max_epochs=2).fit(resumed, data, ckpt_path=path)
    assert resumed.trainer.current_epoch == 2
    trainer_in(tmp_path, max_epochs=3).fit(model, data)  # nothing is chosen again
    assert model.hparams["skip_from"] == expected


def test_without_a_clear_gain_there_is_no_skip_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "choose_skips", lambda *arguments: [])
    model = _auto()
    trainer = trainer_in(tmp_path, enable_checkpointing=True)
    with caplog.at_level("INFO"):
        trainer.fit(model, _data())
    assert "skip connections: from no layer, since none lowers the error clearly" in caplog.text
    images = torch.randn(4, 1, 8, 8)
    again = FineTuner.load_from_checkpoint(trainer.checkpoint_callback.best_model_path).eval()
    assert torch.equal(again(images), model.eval()(images))
    assert again.classifier.in_features == model.backbone.dim


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"skip_join": "pad"}, "chooses layers by concatenated features, and skip_join='pad' adds them; give"),
        ({"max_skips": 0}, "expected max_skips of at least 1, got 0"),
        ({"skip_from": "layer3.0", "max_skips": 2}, 'max_skips=2 is for skip_from="auto"; leave it out, or name that'),
    ],
)
def test_choices_that_contradict_themselves_are_refused(knobs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _auto(**knobs)


@pytest.mark.filterwarnings("ignore:Loading the `train_dataloader`")
def test_averages_of_weights_are_of_the_classifier_that_the_choice_builds(tmp_path: Path) -> None:
    model = _auto()
    trainer = trainer_in(tmp_path, max_epochs=4, callbacks=[StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=2)])
    trainer.fit(model, _data())
    assert model.hparams["skip_from"]
    assert model.classifier.weight.shape[1] == model.classifier.in_features > model.backbone.dim


def test_processes_that_give_back_weights_alone_are_refused(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, strategy="ddp_fork", devices=2)
    with pytest.raises(ProcessRaisedException, match='skip_from="auto" needs a strategy such as ddp, since strategies'):
        trainer.fit(_auto(), _data())


def test_layers_whose_features_are_not_finite_are_refused() -> None:
    broken = _noise(24, 3).index_fill(0, torch.tensor([2]), torch.inf)
    with pytest.raises(ValueError, match="expected finite features, got nan or inf in those of broken"):
        choose_skips(_noise(24, 4), {"fine": _noise(24, 3), "broken": broken}, LABELS)


def test_nothing_but_a_fit_chooses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='skip_from="auto" chooses layers when a fit starts; load what a fit'):
        trainer_in(tmp_path).test(_auto(), _data(), verbose=False)


def test_a_pass_of_the_network_alone_leaves_nothing_that_cannot_be_copied() -> None:
    model = FineTuner(3, SMALL, train="layer3.1", skip_from="layer3.1")
    model.backbone(torch.rand(2, 1, 16, 16))
    again, images = copy.deepcopy(model).eval(), torch.rand(2, 1, 16, 16)
    assert torch.equal(again(images), model.eval()(images))

"""Learners: what is trained, what is frozen, what is saved, what is refused."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SMALL, plain_sgd, trainer_in
from torch.utils.data import DataLoader, TensorDataset

from ncfinetune import Backbone, FineTuner, Supervised, linearised
from ncfinetune.datamodules import Digits

KNOBS = [("none", None), ("layer3.0", None), ("layer3.0", "layer3.0"), (["layer4.*"], "layer2.1"), ("all", None)]


@pytest.mark.parametrize(("train", "skip_from"), KNOBS)
def test_only_what_is_named_changes(train, skip_from, tmp_path: Path) -> None:
    model = FineTuner(3, SMALL, train=train, skip_from=skip_from, optimizer=plain_sgd, allow_random=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer_in(tmp_path, max_epochs=2).fit(model, Digits([0, 1, 2], shots=8, batch_size=8))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    prefixes = {"none": [], "all": ["backbone."], "layer3.0": ["backbone.net.layer3.0."]}.get(
        train if isinstance(train, str) else "", ["backbone.net.layer4."]
    )
    expected = {key for key in before if key.startswith(("head.", *prefixes))}
    # timm starts the last normalisation of a block at zero and the block's other weights may stand still for a step;
    # counters of batches are integers and change wherever statistics do.
    assert changed <= expected
    assert {key for key in changed if "running_mean" in key} == {key for key in expected if "running_mean" in key}
    assert any(key.startswith("head.") for key in changed)


@pytest.mark.parametrize(("train", "skip_from"), KNOBS)
def test_optimiser_gets_what_trains_and_modes_agree(train, skip_from) -> None:
    model = FineTuner(3, SMALL, train=train, skip_from=skip_from)
    held = {id(p) for group in model.configure_optimizers().param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    for mode in (True, False):
        model.train(mode)
        for module in model.backbone.modules():
            own = list(module.parameters(recurse=False))
            if own:
                assert module.training == (mode and own[0].requires_grad)


def test_skip_connection_adds_the_pooled_layer_padded_with_zeros() -> None:
    model = FineTuner(3, SMALL, train="none", skip_from="layer2.0").eval()
    images = torch.randn(2, 1, 8, 8)
    stages = model.backbone.stages(images, ["penultimate", "layer2.0"])
    features = stages["penultimate"].clone()
    features[:, :6] += stages["layer2.0"]
    assert torch.allclose(model(images), model.head.fc(features))


@pytest.mark.parametrize("skip_from", [None, "layer4.0"])
def test_linear_probe_trains_as_many_parameters_as_its_classifier(skip_from: str | None) -> None:
    model = FineTuner(3, SMALL, train="none", skip_from=skip_from)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * 10 + 3


def test_unknown_layer() -> None:
    with pytest.raises(ValueError, match=r"no layer fits 'layer3.2'; expected a block \(layer1.0, .*nearest: layer3"):
        FineTuner(3, SMALL, train="layer3.2")
    with pytest.raises(ValueError, match="no layer fits 'blocks.1'"):
        FineTuner(3, SMALL, skip_from="blocks.1")


def test_fine_tuning_starts_from_the_checkpoint_of_pre_training(tmp_path: Path) -> None:
    data = Digits([0, 1, 2, 3], shots=4, batch_size=8)
    source = Supervised(4, Backbone(**SMALL), optimizer=plain_sgd)
    trainer = trainer_in(tmp_path)
    trainer.fit(source, data)
    trainer.save_checkpoint(tmp_path / "source.ckpt")
    path = str(tmp_path / "source.ckpt")
    kept = set(torch.load(path, weights_only=True)["hyper_parameters"])
    assert {"num_classes", "backbone", "loss"} <= kept
    assert not kept & {"optimizer", "lr_scheduler", "lr_batch", "checkpoint"}
    tuned = FineTuner(3, SMALL, checkpoint=path)
    for key, value in source.backbone.state_dict().items():
        assert torch.equal(tuned.backbone.state_dict()[key], value)
    again = Supervised.load_from_checkpoint(path, weights_only=True)
    assert torch.equal(again.head.weight, source.head.weight)


def test_fine_tuned_model_loads_without_the_file_it_started_from(tmp_path: Path) -> None:
    torch.save(Backbone(**SMALL).state_dict(), tmp_path / "source.pt")
    model = FineTuner(3, SMALL, checkpoint=str(tmp_path / "source.pt"), train="layer3.0", skip_from="layer3.0")
    trainer = trainer_in(tmp_path)
    trainer.fit(model, Digits([0, 1, 2], shots=4))
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    (tmp_path / "source.pt").unlink()
    again = FineTuner.load_from_checkpoint(tmp_path / "tuned.ckpt").eval()
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(images), model.eval()(images))


def test_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    def model() -> FineTuner:
        torch.manual_seed(0)
        return FineTuner(
            3,
            SMALL,
            train="layer3.0",
            allow_random=True,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
            lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
        )

    data = Digits([0, 1, 2], shots=4, batch_size=12)  # one batch an epoch: its order does not matter
    whole = model()
    trainer_in(tmp_path, max_epochs=4).fit(whole, data)
    half = trainer_in(tmp_path, max_epochs=2)
    half.fit(model(), data)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = model()
    trainer_in(tmp_path, max_epochs=4).fit(resumed, data, ckpt_path=tmp_path / "half.ckpt")
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("knobs", [{"train": "layer2.0"}, {"train": "layer3.0", "skip_from": "layer3.0"}])
def test_a_run_of_other_layers_is_not_gone_on_with(knobs: dict, tmp_path: Path) -> None:
    data = Digits([0, 1, 2], shots=4)
    trainer = trainer_in(tmp_path)
    trainer.fit(FineTuner(3, SMALL, train="layer3.0", allow_random=True), data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match=r"a run of train='layer3.0', skip_from=None with train='layer"):
        trainer_in(tmp_path, max_epochs=2).fit(FineTuner(3, SMALL, **knobs), data, ckpt_path=tmp_path / "run.ckpt")
    same = FineTuner(3, SMALL, train=["layer3.0"], allow_random=True)
    trainer_in(tmp_path, max_epochs=2).fit(same, data, ckpt_path=tmp_path / "run.ckpt")
    assert same.trainer.current_epoch == 2


def test_num_classes_that_contradicts_the_data_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model has num_classes=4, the data 3; give the model num_classes=3"):
        trainer_in(tmp_path).fit(Supervised(4, SMALL), Digits([0, 1, 2]))


def test_label_beyond_num_classes_is_refused_before_the_first_step(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8) % 4), batch_size=8)
    model = Supervised(3, SMALL)
    trainer = trainer_in(tmp_path)
    with pytest.raises(ValueError, match=r"expected labels in 0..2, since num_classes=3, got 3; .* at least 4"):
        trainer.fit(model, loader, loader)
    assert trainer.global_step == 0


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="expected num_classes of at least 2, got 1"):
        Supervised(1, SMALL)


def test_predictions_are_probabilities(tmp_path: Path) -> None:
    model, images = Supervised(3, SMALL), torch.randn(5, 1, 8, 8)
    batches = trainer_in(tmp_path).predict(
        model, DataLoader(TensorDataset(images, torch.zeros(5).long()), batch_size=2)
    )
    with torch.no_grad():
        logits = model.eval()(images)
    expected = logits.exp() / logits.exp().sum(1, keepdim=True)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    torch.testing.assert_close(torch.cat(batches), expected)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], r'train=\[\] names no layer; say train="none"'),
        ("", r"train='' names no layer; say train=\"none\""),
        (["none"], r"train=\['none'\]: none and all stand alone; give one of them, or layers"),
    ],
)
def test_no_layers_by_accident(train: str | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineTuner(3, SMALL, train=train)


@pytest.mark.parametrize("kind", [FineTuner, Supervised])
def test_a_model_in_eval_mode_is_trained_in_training_mode(kind, tmp_path: Path) -> None:
    data = Digits([0, 1, 2], shots=8, batch_size=8)
    knobs = {"train": "layer3.1", "allow_random": True} if kind is FineTuner else {}

    def fitted(mode: bool) -> tuple[float, dict]:
        torch.manual_seed(0)
        model = kind(3, SMALL, optimizer=plain_sgd, class_weight=[1.0, 10.0, 100.0], label_smoothing=0.3, **knobs)
        trainer = trainer_in(tmp_path, num_sanity_val_steps=0)
        trainer.fit(model.train(mode), data)
        return trainer.callback_metrics["train/loss"].item(), model.state_dict()

    (loss, state), (other, weights) = fitted(True), fitted(False)
    assert loss == other
    assert all(torch.equal(value, weights[name]) for name, value in state.items())


@pytest.mark.parametrize("train", ["layer4.1", "all", ["layer3.1", "*bn2.weight"]])
def test_layers_that_the_classifier_gets_nothing_of_are_refused(train, tmp_path: Path) -> None:
    model = FineTuner(3, SMALL, train=train, skip_from="layer3.1", skip_join="only", allow_random=True)
    with pytest.raises(
        ValueError, match=r'with skip_join="only" the classifier gets the output of layer3.1 alone, which'
    ):
        trainer_in(tmp_path).fit(model, Digits([0, 1, 2], shots=8, batch_size=8))


def test_the_block_to_tune_is_chosen_among_those_that_the_classifier_gets_something_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linearised, "block_to_tune", lambda features, gradients, *_: list(gradients)[-1])
    model = FineTuner(3, SMALL, train="auto", skip_from=["layer1.0", "layer2.1"], skip_join="only", allow_random=True)
    trainer_in(tmp_path).fit(model, Digits([0, 1, 2], shots=8, batch_size=8))
    assert model.hparams["train"] == "layer2.1"


@pytest.mark.parametrize("train", ["none", "layer3.1", ["layer1.0", "layer3.1.conv2"]])
def test_layers_up_to_the_skipped_one_train_for_it_alone(train, tmp_path: Path) -> None:
    model = FineTuner(3, SMALL, train=train, skip_from="layer3.1", skip_join="only", allow_random=True)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model._check_reached()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())  # trying counts no batch
    trainer_in(tmp_path).fit(model, Digits([0, 1, 2], shots=8, batch_size=8))


def test_a_closed_form_on_more_images_than_the_run_is_warned_of(tmp_path: Path) -> None:
    model = FineTuner(3, SMALL, train="layer4.1", head_init="ridge", allow_random=True)
    with pytest.warns(
        UserWarning, match=r"reads all training images, although the run is limited to limit_train_b.*=1;"
    ):
        trainer_in(tmp_path, limit_train_batches=1).fit(model, Digits([0, 1, 2], shots=8, batch_size=8))


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": np.int64(3), "label_smoothing": np.float64(0.1)},
        {"num_classes": 3, "class_weight": np.array([1.0, 2.0, 3.0]), "head_lr_factor": np.float32(2)},
        {"num_classes": 3, "class_weight": [np.float64(1), 2, 3], "cache_dir": Path("elsewhere"), "cache": "disk"},
    ],
)
def test_options_of_numpy_are_saved_as_built_in_types(options: dict, tmp_path: Path) -> None:
    options = {**options, **({"cache_dir": tmp_path / "cache"} if "cache_dir" in options else {})}
    model = FineTuner(backbone=SMALL, train="layer4.1", allow_random=True, **options)
    trainer = trainer_in(tmp_path)
    trainer.fit(model, Digits([0, 1, 2], shots=8, batch_size=8, augmentation="plain"))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    again = FineTuner.load_from_checkpoint(tmp_path / "a.ckpt")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize(
    ("backbone", "train", "warned"),
    [
        ({"name": "resnet18", "drop_rate": 0.5}, "layer4.1", True),
        ({"name": "resnet18", "drop_rate": 0.5}, "all", False),
        ({"name": "test_vit", "drop_rate": 0.5}, "blocks.2", True),
        ({"name": "test_vit", "proj_drop_rate": 0.5, "drop_rate": 0.1}, "blocks.2", False),
    ],
)
def test_a_dropout_that_drops_nothing_is_said(backbone: dict, train: str, warned: bool) -> None:
    with (
        pytest.warns(UserWarning, match="drop_rate=0.5 of the backbone drops nothing with") if warned else nullcontext()
    ):
        FineTuner(3, backbone, train=train, allow_random=True)

"""Gradients of layers as features: against autograd's Jacobian, and ridge regression on them."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from tiny import SMALL, plain_sgd, trainer_in
from torch.utils.data import DataLoader, IterableDataset

from ncfinetune import Backbone, FineTuner
from ncfinetune import linearised as module
from ncfinetune.datamodules import Digits
from ncfinetune.folds import balanced_folds
from ncfinetune.linearised import _scaled, block_to_tune, gradient_features, linearised
from ncfinetune.probes import ridge, squared_errors

LAYERS = ["layer1.0", "layer4.1"]


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return Backbone(**{**SMALL, "zero_init_last": False}).eval()


def images_of(number):
    return torch.rand(number, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def gradients_of(backbone, images, scores):
    """Gradients of a function of the penultimate features in each layer's parameters, ``{layer: (N, P)}``."""
    rows = {layer: [] for layer in LAYERS}
    for image in images:
        for layer in LAYERS:
            found = torch.autograd.grad(scores(backbone(image[None])[0]), list(backbone.layer(layer).parameters()))
            rows[layer].append(torch.cat([gradient.flatten() for gradient in found]))
    return {layer: torch.stack(parts) for layer, parts in rows.items()}


def products(rows):
    return rows.double() @ rows.double().T


def test_inner_products_are_those_of_the_gradients(backbone, tmp_path):
    images, trainer = images_of(5), trainer_in(tmp_path, inference_mode=False)
    # With far more places than parameters next to no two entries share a place.
    sketched = gradient_features(trainer, backbone, images, LAYERS, draws=1, width=2**22)
    signs = module.GradientSketch(backbone, LAYERS, draws=1, width=1).directions[0]
    assert set(signs.tolist()) == {-1.0, 1.0}
    expected = gradients_of(backbone, images, lambda features: signs @ features)
    for layer in LAYERS:
        assert torch.allclose(products(sketched[layer]), products(expected[layer]), rtol=2e-3, atol=0)


def test_draws_and_sketches_have_no_bias(backbone, tmp_path):
    images, trainer = images_of(3), trainer_in(tmp_path, inference_mode=False)
    sketched = gradient_features(trainer, backbone, images, LAYERS, draws=64, width=2**13)
    places = range(backbone.dim)
    by_feature = [gradients_of(backbone, images, lambda features, place=place: features[place]) for place in places]
    for layer in LAYERS:
        expected = sum(products(rows[layer]) for rows in by_feature)
        # The relative standard deviation of 64 draws is sqrt(2 / 64) = 0.18 at most, that of the sketch 0.01.
        assert (products(sketched[layer]) - expected).norm() < 0.3 * expected.norm()


def test_network_is_left_as_it_was(backbone, tmp_path):
    frozen = next(backbone.layer("layer2.0").parameters()).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    flags = [parameter.requires_grad for parameter in backbone.parameters()]
    trainer = trainer_in(tmp_path, inference_mode=False)
    gradient_features(trainer, backbone, images_of(2), LAYERS, width=8)
    assert [parameter.requires_grad for parameter in backbone.parameters()] == flags
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
    frozen.requires_grad_(True)


def test_gradients_that_tell_the_classes_apart_lower_the_error():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    features, gradients = torch.randn(30, 4, generator=generator), 1e3 * torch.eye(3)[labels] + 7.0
    scores = linearised(features, gradients, labels, 3, balanced_folds(labels))
    assert torch.equal(scores.argmax(2), labels.expand(len(scores), -1))
    assert ridge(features, labels, 3).loo_error > 0.3


def test_gradients_that_do_not_vary_change_nothing():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12) % 3
    features = torch.randn(12, 20, generator=generator) + labels[:, None]
    alone = torch.arange(12)[None]
    found = linearised(features, torch.full((12, 5), 3.0), labels, 3, alone)
    assert torch.allclose(found[0], ridge(features, labels, 3).loo_scores, atol=1e-9)


def test_block_with_the_least_error_is_tuned_or_none():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    features, noise = torch.randn(30, 4, generator=generator) + labels[:, None], torch.zeros(30, 3)
    useful, better = torch.eye(3)[labels] + torch.randn(30, 3, generator=generator) / 2, torch.eye(3)[labels]
    assert block_to_tune(features, {"a": noise, "b": better, "c": useful}, labels, 3) == "b"
    worse = torch.randn(30, 3, generator=generator)
    folds = balanced_folds(labels)
    alone = squared_errors(ridge(features, labels, 3).left_out(folds), labels).mean()
    assert squared_errors(linearised(features, worse, labels, 3, folds), labels).mean() > alone
    assert block_to_tune(features, {"a": worse}, labels, 3) is None
    assert block_to_tune(features, {}, labels, 3) is None


def test_how_much_gradients_weigh_is_chosen_without_the_fold():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    features, gradients = torch.randn(24, 5, generator=generator), torch.randn(24, 40, generator=generator)
    features, gradients = features + labels[:, None], gradients + 2 * torch.eye(3, 40)[labels]
    folds = balanced_folds(labels)
    one, other = (_scaled(part) for part in (features, gradients))
    left_out = [ridge(torch.cat([one, w**0.5 * other], 1), labels, 3).left_out(folds) for w in (0.1, 1.0, 10.0)]
    found, taken = linearised(features, gradients, labels, 3, folds), set()
    for way in range(len(folds)):
        for place in range(24):
            others = folds[way] != folds[way, place]
            errors = [squared_errors(scores[way : way + 1, others], labels[others]).mean() for scores in left_out]
            taken.add(errors.index(min(errors)))
            assert torch.equal(found[way, place], left_out[errors.index(min(errors))][way, place])
    assert len(taken) > 1


def test_of_many_blocks_that_gain_nothing_none_is_tuned():
    chosen = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(50) % 5
        features = torch.randn(50, 64, generator=generator) + 0.35 * torch.randn(5, 64, generator=generator)[labels]
        blocks = {
            str(place): torch.randn(50, 64, generator=generator) @ torch.randn(64, 256, generator=generator)
            for place in range(8)
        }
        chosen.append(block_to_tune(features, blocks, labels, 5))
    assert sum(name is not None for name in chosen) <= 2


def automatic(**knobs):
    torch.manual_seed(0)
    options = {"train": "auto", "allow_random": True, "optimizer": plain_sgd, **knobs}
    return FineTuner(3, Backbone(**{**SMALL, "zero_init_last": False}), **options)


def digits():
    return Digits([0, 1, 2], shots=8, batch_size=8, augmentation="plain")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    "knobs",
    [
        {"head_init": "ridge", "cache": "memory", "layer_decay": 0.5},
        pytest.param({"skip_from": "auto", "skip_join": "concat"}, marks=pytest.mark.slow),
    ],
)
def test_fit_tunes_the_block_that_the_expansion_names(knobs, tmp_path, caplog):
    model, data, fresh = automatic(**knobs), digits(), automatic(**knobs).eval()
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    trainer = trainer_in(tmp_path, enable_checkpointing=True)
    with caplog.at_level("INFO"):
        trainer.fit(model, data)
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.train_plain_dataloader()]
    images, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    with torch.no_grad():
        features = fresh.backbone(images)
    layers = list(fresh.backbone.layers)
    passes = trainer_in(tmp_path, inference_mode=False)
    gradients = gradient_features(passes, fresh.backbone, images, layers)
    expected = block_to_tune(features, gradients, labels, 3)
    assert expected is not None
    assert model.hparams["train"] == expected
    assert f"train: {expected}" in caplog.text
    trained = {name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.backbone.named_parameters() if name.startswith(f"net.{expected}.")}
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    before, after = fresh.state_dict(), model.state_dict()
    moved = {name for name in before if name.startswith("backbone") and not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith(f"backbone.net.{expected}.") for name in moved)

    path = trainer.checkpoint_callback.best_model_path
    again = FineTuner.load_from_checkpoint(path).eval()
    assert torch.equal(again(images), model.eval()(images))
    resumed = automatic(**knobs)
    trainer_in(tmp_path, max_epochs=2).fit(resumed, data, ckpt_path=path)
    assert resumed.hparams["train"] == expected


def test_averages_of_weights_are_of_the_block_that_is_chosen_beside_a_skip_connection(tmp_path):
    model = automatic(skip_from="layer2.0", skip_join="concat")
    swa = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    trainer_in(tmp_path, max_epochs=2, callbacks=[swa]).fit(model, digits())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [name for name, copy in swa._average_model.named_parameters() if copy.requires_grad]
    assert any(name.startswith(f"backbone.net.{model.hparams['train']}.") for name in trained)


def test_features_and_gradients_are_of_the_same_images(tmp_path, monkeypatch):
    """A datamodule may give the images in another order in each pass."""
    seen = []
    monkeypatch.setattr(module, "block_to_tune", lambda *arguments: seen.append(arguments))
    data, orders = digits(), []
    plain = data.train_plain_dataloader

    class Shuffled(IterableDataset):
        def __iter__(self):
            batches = list(plain())
            orders.append(len(orders))
            return iter(batches if len(orders) % 2 else batches[::-1])

    data.train_plain_dataloader = lambda: DataLoader(Shuffled(), batch_size=None)
    model, fresh = automatic(), automatic().eval()
    trainer_in(tmp_path).fit(model, data)
    ((features, gradients, _, _),) = seen
    images = torch.cat([data.on_after_batch_transfer(batch, 0)[0] for batch in plain()])
    with torch.no_grad():
        order = torch.cdist(features, fresh.backbone(images)).argmin(1)
    layer = next(iter(gradients))
    passes = trainer_in(tmp_path, inference_mode=False)
    expected = gradient_features(passes, fresh.backbone, images[order], list(fresh.backbone.layers))[layer]
    assert torch.allclose(gradients[layer], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_without_an_expected_gain_no_block_is_tuned(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "block_to_tune", lambda *arguments: None)
    model = automatic()
    with caplog.at_level("INFO"):
        trainer_in(tmp_path).fit(model, digits())
    assert "train: no block, since none is expected to lower the error" in caplog.text
    assert model.hparams["train"] == "none"
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    with pytest.raises(ValueError, match="head_lr_factor=0 nothing would be trained"):
        trainer_in(tmp_path).fit(automatic(head_lr_factor=0, head_init="ridge"), digits())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    "knobs", [{"layer_decay": 0.5}, {"skip_from": "layer2.0", "skip_join": "concat", "skip_gradient": "skip"}]
)
def test_what_a_fit_without_a_block_has_saved_can_be_loaded(knobs, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "block_to_tune", lambda *arguments: None)
    model = automatic(**knobs)
    base = {name.removeprefix("backbone."): value for name, value in model.state_dict().items() if "backbone" in name}
    torch.save(base, tmp_path / "base.pth")
    trainer = trainer_in(tmp_path, enable_checkpointing=True)
    trainer.fit(model, digits())
    path, images = Path(trainer.checkpoint_callback.best_model_path), torch.randn(4, 1, 8, 8)
    expected = model.eval()(images)
    assert torch.equal(FineTuner.load_from_checkpoint(path).eval()(images), expected)
    delta = path.with_name("delta.safetensors")
    assert torch.equal(FineTuner.from_delta(delta, checkpoint=str(tmp_path / "base.pth"))(images), expected)
    resumed = trainer_in(tmp_path, max_epochs=2)
    resumed.fit(automatic(**knobs), digits(), ckpt_path=str(path))
    assert resumed.current_epoch == 2


def test_nothing_but_a_fit_chooses_a_block(tmp_path):
    with pytest.raises(ValueError, match='train="auto" chooses layers when a fit starts; load what a fit has saved'):
        trainer_in(tmp_path).test(automatic(), digits(), verbose=False)


def test_a_gradient_through_the_skip_connection_alone_hides_no_block(tmp_path, monkeypatch):
    seen = []
    choose = module.block_to_tune
    monkeypatch.setattr(
        module, "block_to_tune", lambda x, gradients, *rest: seen.append(gradients) or choose(x, gradients, *rest)
    )
    for gradient in ("both", "skip"):
        torch.manual_seed(0)
        model = FineTuner(
            3, SMALL, train="auto", skip_from="layer3.1", skip_gradient=gradient, allow_random=True, optimizer=plain_sgd
        )
        trainer_in(tmp_path).fit(model, Digits([0, 1, 2], shots=8, batch_size=8))
    whole, skip = seen
    assert all(torch.equal(rows, skip[name]) for name, rows in whole.items())
    assert all(rows.norm() > 0 for rows in skip.values())

"""What is frozen is that of the base when a run ends, whatever a callback does, and it is not random unawares."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, callbacks
from tiny import SHARING, SMALL, plain_sgd, trainer_in
from torch.utils.data import DataLoader, TensorDataset

from ncfinetune import Backbone, FineTuner, Supervised
from ncfinetune.datamodules import Digits

_DATA = {"shots": 8, "batch_size": 8}


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A pre-trained backbone, whose statistics of normalisation are not those of its start."""
    source = Supervised(3, SMALL, optimizer=plain_sgd)
    trainer_in(tmp_path).fit(source, Digits([3, 4, 5], **_DATA))
    source.backbone.save(tmp_path / "base.safetensors")
    return str(tmp_path / "base.safetensors")


# Every callback of Lightning that writes weights and can be used with a FineTuner; those that can't are refused, below.
WRITING = {
    "SWA": lambda model: callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
    "average": lambda model: callbacks.WeightAveraging(),
    "EMA": lambda model: callbacks.EMAWeightAveraging(decay=0.9),
    "learning rate finder": lambda model: callbacks.LearningRateFinder(num_training_steps=4),
    "batch size finder": lambda model: callbacks.BatchSizeFinder(max_trials=1, steps_per_trial=1),
    "pruning of the head": lambda model: callbacks.ModelPruning("l1_unstructured", [(model.head, "weight")]),
}
# One callback of each way to write weights: averages in place and in a copy, a tuner, another module's weights.
FAST = {("SWA", "layer4.1"), ("EMA", "none"), ("batch size finder", "layer4.1"), ("pruning of the head", "none")}


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    ("callback", "train"),
    [
        pytest.param(name, train, marks=() if (name, train) in FAST else pytest.mark.slow)
        for name in WRITING
        for train in ("none", "layer4.1")
    ],
)
def test_frozen_tensors_are_those_of_the_base(callback: str, train: str, base: str, tmp_path: Path) -> None:
    model = FineTuner(3, SMALL, checkpoint=base, train=train, optimizer=plain_sgd)
    before = {name: tensor.clone() for name, tensor in model._tuned_and_frozen()[1].items()}
    used = [WRITING[callback](model)]
    trainer = trainer_in(tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=used, check_val_every_n_epoch=2)
    trainer.fit(model, Digits([0, 1, 2], **_DATA))
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name
        assert torch.equal(saved[name], tensor), name
    folder = Path(trainer.checkpoint_callback.dirpath)
    again, images = FineTuner.from_delta(folder / "delta.safetensors", checkpoint=base), torch.randn(2, 1, 8, 8)
    assert torch.equal(again(images), model.eval()(images))


def test_statistics_of_tuned_layers_are_those_of_the_average(base: str, tmp_path: Path) -> None:
    """SWA's last pass measures them: on the frozen layers as they were loaded, not as it reset them."""
    data = Digits([0, 1, 2], **_DATA)
    model = FineTuner(3, SMALL, checkpoint=base, train="layer4.1", optimizer=plain_sgd)
    swa = callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    trainer_in(tmp_path, max_epochs=3, callbacks=[swa]).fit(model, data)
    seen: list[torch.Tensor] = []
    handle = model.backbone.net.layer4[1].conv1.register_forward_hook(lambda m, a, o: seen.append(o))
    model.eval()
    images = torch.cat([data.on_after_batch_transfer(batch, 0)[0] for batch in data.train_plain_dataloader()])
    with torch.no_grad():
        model(images)
    handle.remove()
    mean = model.backbone.net.layer4[1].bn1.running_mean
    torch.testing.assert_close(mean, seen[0].mean((0, 2, 3)), rtol=0.5, atol=0.05)


class _Drifting(callbacks.EMAWeightAveraging):
    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        with torch.no_grad():
            pl_module.backbone.net.conv1.weight.mul_(1.5)


def test_an_average_is_validated_on_the_frozen_tensors_of_the_base(base: str, tmp_path: Path) -> None:
    data = Digits([0, 1, 2], **_DATA)
    model = FineTuner(3, SMALL, checkpoint=base, train="layer4.1", optimizer=plain_sgd)
    trainer = trainer_in(tmp_path, callbacks=[_Drifting(decay=0.5)])
    trainer.fit(model, data)
    (after,) = trainer_in(tmp_path).validate(model, data, verbose=False)
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(after["val/loss"], rel=1e-6)


class _Moves(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        with torch.no_grad():
            pl_module.backbone.net.conv1.weight.mul_(1.01)


class _Unfreezes(Callback):
    def on_train_epoch_end(self, trainer, pl_module) -> None:
        pl_module.backbone.net.conv1.requires_grad_(True)


@pytest.mark.parametrize(
    ("callback", "knobs", "message"),
    [
        (callbacks.BackboneFinetuning(1, verbose=False), {}, "BackboneFinetuning unfreezes layers during the run"),
        (callbacks.BackboneFinetuning(1, verbose=False), {"cache": "memory"}, "BackboneFinetuning unfreezes layers"),
        (callbacks.ModelPruning("l1_unstructured", amount=0.5), {}, "ModelPruning would prune frozen layers; give it"),
        (_Moves(), {}, r"frozen tensors were changed during the run: backbone.net.conv1.weight; a delta could"),
        (_Unfreezes(), {"cache": "memory"}, r"requires_grad of backbone.net.conv1.weight was changed during the run"),
    ],
)  # fmt: skip
def test_what_changes_frozen_tensors_is_refused(
    callback: Callback, knobs: dict, message: str, base: str, tmp_path: Path
) -> None:
    model = FineTuner(3, SMALL, checkpoint=base, train="layer4.1", optimizer=plain_sgd, **knobs)
    data = Digits([0, 1, 2], augmentation="plain", **_DATA)
    with pytest.raises(ValueError, match=message):
        trainer_in(tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=[callback]).fit(model, data)
    assert not list(tmp_path.rglob("delta.safetensors"))


@pytest.mark.parametrize("train", ["none", "layer4.1", "all"])
def test_a_random_backbone_is_not_fine_tuned_unawares(train: str, tmp_path: Path) -> None:
    data = Digits([0, 1, 2], **_DATA)
    with pytest.raises(ValueError, match=r"the backbone has random weights, .* \(allow_random=true runs all the same"):
        trainer_in(tmp_path).fit(FineTuner(3, SMALL, train=train), data)
    trainer_in(tmp_path, fast_dev_run=True).fit(FineTuner(3, SMALL, train=train, allow_random=True), data)
    source = Supervised(3, SMALL, optimizer=plain_sgd)
    trainer_in(tmp_path).fit(source, data)
    trainer_in(tmp_path, fast_dev_run=True).fit(FineTuner(3, source.backbone, train=train), data)


@pytest.mark.filterwarnings("ignore:checkpoint .* stay random")
def test_layers_that_no_file_gave_have_to_train(tmp_path: Path) -> None:
    weights = {name: tensor + 1 for name, tensor in Backbone(**SMALL).net.state_dict().items()}
    torch.save({name: tensor for name, tensor in weights.items() if name != "conv1.weight"}, tmp_path / "w.pth")
    path, data = str(tmp_path / "w.pth"), Digits([0, 1, 2], **_DATA)
    message = r"frozen layers have random weights, since no file has conv1.weight; name them in train, or"
    with pytest.raises(ValueError, match=message):
        trainer_in(tmp_path).fit(FineTuner(3, SMALL, checkpoint=path, train="layer4.1"), data)
    for knobs in ({"train": ["conv1", "layer4.1"]}, {"train": "all"}, {"allow_random": True}):
        trainer_in(tmp_path, fast_dev_run=True).fit(FineTuner(3, SMALL, checkpoint=path, **knobs), data)


def test_a_run_goes_on_without_the_file_it_started_from(base: str, tmp_path: Path) -> None:
    data, trainer = Digits([0, 1, 2], **_DATA), trainer_in(tmp_path)
    trainer.fit(FineTuner(3, SMALL, checkpoint=base, train="layer4.1"), data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    trainer_in(tmp_path, max_epochs=2).fit(FineTuner(3, SMALL, train="layer4.1"), data, ckpt_path=tmp_path / "run.ckpt")


@pytest.mark.parametrize("used", [[], [callbacks.EMAWeightAveraging(decay=0.5)]], ids=["plain", "averaged"])
def test_a_layer_that_is_used_in_several_places_is_tuned_in_all_of_them(used: list, tmp_path: Path) -> None:
    Backbone(**SHARING).save(tmp_path / "base.safetensors")
    model = FineTuner(3, SHARING, checkpoint=str(tmp_path / "base.safetensors"), train="cpe1", optimizer=plain_sgd)
    assert model.backbone.net.cpe1 is model.backbone.net.serial_blocks1[0].cpe
    before = model.backbone.net.cpe1.proj.weight.detach().clone()
    images = TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(8) % 3)
    trainer = trainer_in(tmp_path, callbacks=used, enable_checkpointing=True)
    trainer.fit(model, DataLoader(images, 4), DataLoader(images, 4))
    trained = model.backbone.net.cpe1.proj.weight.detach()
    assert not torch.equal(trained, before)
    delta = Path(trainer.checkpoint_callback.dirpath) / "delta.safetensors"
    again = FineTuner.from_delta(delta, checkpoint=str(tmp_path / "base.safetensors"))
    assert torch.equal(again(images.tensors[0]), model.eval()(images.tensors[0]))
    half = FineTuner.from_delta(delta, checkpoint=str(tmp_path / "base.safetensors"), strength=0.5)
    torch.testing.assert_close(half.backbone.net.cpe1.proj.weight, (before + trained) / 2)

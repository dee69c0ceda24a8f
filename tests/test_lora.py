"""LoRA by peft in a backbone: the trained parameters, and how files, deltas, trackers and merges keep it."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny import SHARING, plain_sgd, trainer_in

from ncfinetune import Backbone, FineTuner, Supervised
from ncfinetune.blocks import block_names
from ncfinetune.callbacks import NeuralCollapseTracker
from ncfinetune.collapse import class_moments, nc1
from ncfinetune.datamodules import Digits
from ncfinetune.schedule import depths
from ncfinetune.weights import export

pytest.importorskip("peft", reason="the extra lora is not installed")

VIT = {"name": "test_vit", "img_size": 16, "patch_size": 8, "in_chans": 1}
RESNET = {"name": "resnet18", "stem": "cifar", "in_chans": 1, "channels": [4, 6, 8, 10]}
LORA = {"r": 2, "target_modules": ["qkv"], "lora_dropout": 0.5, "modules_to_save": ["norm"]}
TRAIN = ["*lora_*", "*modules_to_save*"]
NETWORKS = {
    "ViT": {**VIT, "lora": LORA},
    "all linear layers": {**VIT, "lora": {"r": 2, "target_modules": "all-linear"}},
    "ResNet": {**RESNET, "lora": {"r": 2, "target_modules": ["conv1", "conv2"]}},
}


@pytest.fixture
def data() -> Digits:
    return Digits([0, 1, 2], shots=8, batch_size=8, image_size=16)


def _base(network: dict[str, Any], folder: Path) -> str:
    """A file of weights for a network without its adapters."""
    backbone = Backbone(**{name: value for name, value in network.items() if name != "lora"})
    for parameter in backbone.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    backbone.save(folder / "base.safetensors")
    return str(folder / "base.safetensors")


def _adapted(network: dict[str, Any], folder: Path, train: Any = "*lora_*") -> FineTuner:
    """A model whose adapters do something."""
    model = FineTuner(3, network, checkpoint=_base(network, folder), train=train)
    for parameter in model.backbone.net.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _images() -> torch.Tensor:
    return torch.rand(3, 1, 16, 16)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_adapters_start_without_effect_on_the_weights_of_a_file(network: dict, tmp_path: Path) -> None:
    file, images = _base(network, tmp_path), _images()
    plain = Backbone(**{name: value for name, value in network.items() if name != "lora"}, checkpoint=file).eval()
    for backbone in (Backbone(**network, checkpoint=file), Backbone(**network)):
        if backbone.random:
            backbone.load(file)
        assert not backbone.random
        torch.testing.assert_close(backbone.eval()(images), plain(images))
        assert any("lora_A" in name for name, _ in backbone.net.named_parameters())
        assert list(backbone.layers) == list(plain.layers)


def test_a_network_that_no_file_gave_is_refused_whatever_peft_calls_its_layers(tmp_path: Path, data: Digits) -> None:
    saved = {**VIT, "lora": {**LORA, "modules_to_save": ["patch_embed"]}}
    for network in (saved, NETWORKS["all linear layers"]):
        plain = Backbone(**VIT)
        assert Backbone(**network).random.keys() == plain.random.keys()
        with pytest.raises(ValueError, match="the backbone has random weights, so there is nothing to fine-tune"):
            trainer_in(tmp_path).fit(FineTuner(3, network, train="*lora_*"), data)


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_only_adapters_and_saved_modules_train(cache: Any, tmp_path: Path) -> None:
    network = NETWORKS["ViT"]
    model = FineTuner(3, network, _base(network, tmp_path), train=TRAIN, optimizer=plain_sgd, cache=cache)
    before = copy.deepcopy(model.state_dict())
    data = Digits([0, 1, 2], shots=8, batch_size=8, image_size=16, augmentation="plain")
    trainer_in(tmp_path, max_epochs=2).fit(model, data)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    named = {name for name in before if ".lora_" in name or ".modules_to_save." in name or name.startswith("head.")}
    assert changed == named
    dropout = model.backbone.layer("blocks.0.attn.qkv").lora_dropout
    assert dropout.training
    assert dropout["default"].training
    assert not model.backbone.layer("blocks.0").training
    assert not model.eval().backbone.layer("blocks.0.attn.qkv").lora_dropout["default"].training


def test_other_learners_train_what_peft_leaves() -> None:
    model = Supervised(3, NETWORKS["ViT"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        name
        for name, _ in model.named_parameters()
        if "lora_" in name or "modules_to_save" in name or name.startswith("head")
    }


def test_a_run_goes_on_and_its_delta_gives_the_model_again(tmp_path: Path, data: Digits) -> None:
    network = {**VIT, "lora": {**LORA, "lora_dropout": 0.0}}
    base = _base(network, tmp_path)

    def fit(epochs: int, **arguments: Any) -> FineTuner:
        torch.manual_seed(0)
        model = FineTuner(3, network, base, train=TRAIN, optimizer=plain_sgd)
        trainer = trainer_in(tmp_path, max_epochs=epochs)
        trainer.fit(model, data, **arguments)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model

    fit(1)
    whole, resumed = fit(2), fit(2, ckpt_path=tmp_path / "1.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    whole.save_delta(tmp_path / "delta.safetensors")
    images, whole = _images(), whole.eval()
    for again in (
        FineTuner.from_delta(tmp_path / "delta.safetensors", base),
        FineTuner.load_from_checkpoint(tmp_path / "2.ckpt").eval(),
    ):
        assert torch.equal(again(images), whole(images))
    with pytest.raises(
        ValueError, match="strength=0.5 averages weights, but the factors of adapters cannot be averaged"
    ):
        FineTuner.from_delta(tmp_path / "delta.safetensors", base, strength=0.5)
    size = (tmp_path / "delta.safetensors").stat().st_size
    assert size < Path(base).stat().st_size / 4
    other = FineTuner(3, {**network, "lora": {**LORA, "r": 4}}, base, train=TRAIN)
    with pytest.raises(ValueError, match="belongs to another base"):
        other.load_delta(tmp_path / "delta.safetensors")


@pytest.mark.filterwarnings("ignore:the adapters of lora are frozen")
@pytest.mark.parametrize("train", ["none", "blocks.3", "*lora_B*"])
def test_deltas_have_adapters_that_do_not_train(train: str, tmp_path: Path) -> None:
    model = _adapted(NETWORKS["ViT"], tmp_path, train)
    model.save_delta(tmp_path / "delta.safetensors")
    again = FineTuner.from_delta(tmp_path / "delta.safetensors", str(tmp_path / "base.safetensors"))
    images = _images()
    assert torch.equal(again(images), model(images))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.filterwarnings("ignore:the adapters of lora are frozen")
def test_deltas_have_adapters_of_layers_that_are_used_in_several_places(tmp_path: Path) -> None:
    network = {**SHARING, "lora": {"r": 8, "target_modules": ["cpe1.proj"]}}
    model, images = _adapted(network, tmp_path, "none"), torch.rand(3, 3, 32, 32)
    model.save_delta(tmp_path / "delta.safetensors")
    again = FineTuner.from_delta(tmp_path / "delta.safetensors", str(tmp_path / "base.safetensors"))
    assert torch.equal(again(images), model(images))


def test_adapters_that_no_layer_trains_are_told_of() -> None:
    with pytest.warns(UserWarning, match="the adapters of lora are frozen, since train=.none. names none of them; tr"):
        FineTuner(3, NETWORKS["ViT"])


def test_merging_takes_no_random_numbers(tmp_path: Path) -> None:
    backbone, before = Backbone(**NETWORKS["ViT"]), torch.get_rng_state()
    backbone.save(tmp_path / "merged.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


def test_adapters_start_anew_in_the_mode_of_their_network(tmp_path: Path) -> None:
    backbone = Backbone(**NETWORKS["ViT"]).eval()
    backbone.load(_base(NETWORKS["ViT"], tmp_path))
    assert not any(module.training for module in backbone.modules())


def test_a_checkpoint_with_adapters_is_no_start(tmp_path: Path) -> None:
    torch.save(Backbone(**NETWORKS["ViT"]).state_dict(), tmp_path / "adapted.pth")
    plain = {name: value for name, value in NETWORKS["ViT"].items() if name != "lora"}
    for network in (plain, NETWORKS["ViT"]):
        with pytest.raises(ValueError, match=r"has unmerged adapters \(12 \(blocks.0.attn.qkv.base_layer.w"):
            Backbone(**network, checkpoint=str(tmp_path / "adapted.pth"))


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_merged_networks_compute_the_same_without_adapters(network: dict, tmp_path: Path) -> None:
    model = _adapted(network, tmp_path, TRAIN if "modules_to_save" in network["lora"] else "*lora_*")
    images = _images()
    features = model.backbone(images)
    plain = {name: value for name, value in network.items() if name != "lora"}
    start = Backbone(**plain, checkpoint=str(tmp_path / "base.safetensors")).eval()(images)
    assert (features - start).abs().max() > 0.01
    merged = model.backbone.merged()
    torch.testing.assert_close(merged(images), features, rtol=1e-4, atol=1e-4)
    assert merged.net.state_dict().keys() == Backbone(**plain).net.state_dict().keys()
    assert merged.merged() is merged
    model.backbone.save(tmp_path / "merged.safetensors")
    again = Backbone(**plain, checkpoint=str(tmp_path / "merged.safetensors")).eval()
    assert torch.equal(again(images), merged(images))
    torch.testing.assert_close(model.backbone(images), features)


def test_timm_loads_what_is_merged(tmp_path: Path) -> None:
    model, images = _adapted(NETWORKS["ViT"], tmp_path, TRAIN), _images()
    name, arguments = model.save_for_timm(tmp_path / "timm.safetensors")
    net = timm.create_model(name, **arguments).eval()
    torch.testing.assert_close(net(images), model(images), rtol=1e-3, atol=1e-3)


def test_the_tracker_finds_layers_by_name_and_sees_what_adapters_do(tmp_path: Path, data: Digits) -> None:
    model = _adapted(NETWORKS["ViT"], tmp_path, TRAIN)
    tracker = NeuralCollapseTracker(layers=["blocks.*", "penultimate"])
    trainer_in(tmp_path, callbacks=[tracker]).validate(model, data, verbose=False)
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    with torch.no_grad():
        features = model.eval().backbone.stages(images, ["blocks.0", "blocks.5", "penultimate"])
    assert {f"nc1/val/blocks.{number}" for number in range(6)} <= tracker.values.keys()
    for name, value in features.items():
        expected = nc1(class_moments(value, labels, 3)).item()
        assert tracker.values[f"nc1/val/{name}"] == pytest.approx(expected, rel=1e-3)


def test_rates_by_depth_reach_adapters() -> None:
    model = FineTuner(3, NETWORKS["ViT"], train=TRAIN, layer_decay=0.5, head_lr_factor=3, optimizer=plain_sgd)
    rates = {id(p): group["lr"] for group in model.configure_optimizers().param_groups for p in group["params"]}
    named = dict(model.backbone.net.named_parameters())
    expected = {name: 0.5 ** (6 - number) for number in range(6) for name in named if f"blocks.{number}." in name}
    found = {name: rates[id(p)] / 0.1 for name, p in named.items() if p.requires_grad}
    assert {name: rate for name, rate in found.items() if "lora" in name} == pytest.approx(
        {name: rate for name, rate in expected.items() if "lora" in name}
    )
    assert rates[id(model.head.weight)] == pytest.approx(0.3)
    assert (
        depths(model.backbone.net)["norm.modules_to_save.default.weight"] == depths(Backbone(**VIT).net)["norm.weight"]
    )


@pytest.mark.parametrize(
    ("network", "targets"),
    [
        ("vgg11", ["features.0", "features.3"]),
        ("test_convnext", ["fc1", "fc2"]),
        ("test_efficientnet", ["conv_pw", "conv_pwl"]),
        ("test_resnet", ["conv2"]),
        ("test_mambaout", ["fc1", "fc2"]),
        ("dla34", ["conv1", "conv2"]),
    ],
)
def test_blocks_are_those_of_the_network_without_adapters(network: str, targets: list[str]) -> None:
    import peft

    with torch.device("meta"):
        net = timm.create_model(network, num_classes=0)
        before = block_names(net)
        wrapped = peft.get_peft_model(net, peft.LoraConfig(target_modules=targets))
    assert before
    assert block_names(net) == before
    assert block_names(wrapped) == [f"base_model.model.{name}" for name in before]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 2, "target_modules": ["qkv"]}, "peft cannot make lora=.*unexpected keyword argument 'rank'"),
        ({"r": 2, "target_modules": ["nope"]}, "peft cannot make lora=.*nope.* not found in the base model"),
        ({"r": 2}, "peft cannot make lora={'r': 2}: Please specify `target_modules`"),
    ],
)
def test_adapters_that_cannot_be_made(lora: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backbone(**VIT, lora=lora)


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"lora needs the package peft: pip install 'ncfinetune\[lora\]'"):
        Backbone(**NETWORKS["ViT"])


def test_export_leaves_no_file_of_weights_beside_adapters(tmp_path: Path, data: Digits) -> None:
    model = _adapted(NETWORKS["ViT"], tmp_path)
    trainer = trainer_in(tmp_path)
    trainer.validate(model, data, verbose=False)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"has unmerged adapters \(.*merge them by load_from_checkpoint"):
        export(str(tmp_path / "a.ckpt"), str(tmp_path / "out.safetensors"))
    assert not (tmp_path / "out.safetensors").exists()

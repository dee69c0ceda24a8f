"""Deltas: small, tied to their base, and as good as the checkpoint."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import SMALL, plain_sgd, trainer_in

from ncfinetune import Backbone, FineTuner
from ncfinetune.checksums import fingerprint
from ncfinetune.datamodules import Digits
from ncfinetune.weight_files import read

KNOBS = [
    {"train": "none"},
    {"train": "layer3.0", "skip_from": "layer3.0", "skip_join": "linear"},
    {"train": ["layer4.*", "conv1"]},
    {"train": "all"},
]


def _base(folder: Path) -> str:
    torch.save(Backbone(**SMALL).state_dict(), folder / "base.pt")
    return str(folder / "base.pt")


def _tuned(model: FineTuner) -> FineTuner:
    """The model as if trained: whatever trains, running statistics included, is another number."""
    model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model(torch.randn(8, 1, 8, 8))
    return model.eval()


@pytest.mark.parametrize("knobs", KNOBS)
def test_base_and_delta_make_the_tuned_model(knobs: dict, tmp_path: Path) -> None:
    base, images = _base(tmp_path), torch.randn(4, 1, 8, 8)
    model = _tuned(FineTuner(3, SMALL, checkpoint=base, **knobs))
    model.save_delta(tmp_path / "delta.safetensors")
    again = FineTuner.from_delta(tmp_path / "delta.safetensors", checkpoint=base)
    assert not again.training
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_weights_lie_between_base_and_delta(strength: float, tmp_path: Path) -> None:
    base = _base(tmp_path)
    before = FineTuner(3, SMALL, checkpoint=base).state_dict()
    model = _tuned(FineTuner(3, SMALL, checkpoint=base, train="layer4.*"))
    model.save_delta(tmp_path / "delta.safetensors")
    unknown = pytest.warns(UserWarning, match="does not say which values of the tuned layers its fit started from")
    with unknown if strength != 1 else nullcontext():
        between = FineTuner.from_delta(tmp_path / "delta.safetensors", checkpoint=base, strength=strength).state_dict()
    for name, after in model.state_dict().items():
        whole = name.startswith("head.") or not after.is_floating_point()
        expected = after if whole else before[name] + strength * (after - before[name])
        torch.testing.assert_close(between[name], expected, msg=name)
    for outside in (-0.5, 1.5):
        with pytest.raises(ValueError, match=f"expected a strength from 0, the base, to 1, the delta, got {outside}"):
            FineTuner.from_delta(tmp_path / "delta.safetensors", checkpoint=base, strength=outside)


def test_delta_holds_nothing_but_what_was_tuned(tmp_path: Path) -> None:
    model = FineTuner(3, SMALL, train="layer3.0", skip_from="layer3.0")
    model.save_delta(tmp_path / "delta.safetensors", ["a", "b", "c"])
    tensors = load_file(tmp_path / "delta.safetensors")
    assert all(name.startswith(("head.fc.", "backbone.net.layer3.0.")) for name in tensors)
    assert "backbone.net.layer3.0.bn1.running_mean" in tensors
    with safe_open(tmp_path / "delta.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["base"]) == {**SMALL}
    assert json.loads(metadata["class_names"]) == ["a", "b", "c"]
    knobs = {
        "num_classes": 3,
        "train": "layer3.0",
        "skip_from": "layer3.0",
        "skip_join": "pad",
        "skip_gradient": "both",
    }
    assert json.loads(metadata["knobs"]) == {
        **knobs,
        "max_skips": 1,
        "head_init": "default",
        "refit": "none",
        "head_lr_factor": 1.0,
    }


def test_delta_of_a_base_vit_is_a_tenth_of_it(tmp_path: Path) -> None:
    FineTuner(10, "vit_base_patch16_224", train="blocks.8").save_delta(tmp_path / "delta.safetensors")
    assert (tmp_path / "delta.safetensors").stat().st_size < 30e6


def test_another_base_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    base, path = _base(tmp_path), tmp_path / "delta.safetensors"
    FineTuner(3, SMALL, checkpoint=base, train="layer3.0").save_delta(path)
    with safe_open(path, framework="pt") as file:
        theirs = file.metadata()["base_fingerprint"]
    with pytest.raises(
        ValueError, match=rf"belongs to another base: .* fingerprint {theirs}, but this base is .* [0-9a-f]+;"
    ):
        FineTuner(3, SMALL, train="layer3.0").load_delta(path)
    with pytest.raises(ValueError, match=rf"tuned on .*'resnet18'.* {theirs}, but this base is .*'resnet34'"):
        FineTuner(3, {**SMALL, "name": "resnet34"}, train="layer3.0").load_delta(path)
    for knobs, message in [
        ({"train": "layer3.1"}, "was tuned with train='layer3.0', but the model has 'layer3.1'"),
        ({"train": "layer3.0", "num_classes": 4}, "was tuned with num_classes=3, but the model has 4"),
        ({"train": "layer3.0", "skip_from": "layer1.0"}, "was tuned with skip_from=None, but the model has 'layer1.0'"),
    ]:
        with pytest.raises(ValueError, match=message):
            FineTuner(**{"num_classes": 3, "backbone": SMALL, "checkpoint": base, **knobs}).load_delta(path)


def test_another_join_of_tensors_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    base, path = _base(tmp_path), tmp_path / "delta.safetensors"
    knobs = {"num_classes": 3, "backbone": SMALL, "checkpoint": base, "train": "layer4.1", "skip_from": "layer4.1"}
    padded, alone = (FineTuner(**knobs, skip_join=join) for join in ("pad", "only"))
    assert [v.shape for v in padded.state_dict().values()] == [v.shape for v in alone.state_dict().values()]
    padded.save_delta(path)
    with pytest.raises(ValueError, match="was tuned with skip_join='pad', but the model has 'only'"):
        alone.load_delta(path)


def test_fingerprint_does_not_depend_on_what_was_tuned(tmp_path: Path) -> None:
    """A base whose tuned layers alone are other numbers is as good, since the delta replaces them."""
    base = _base(tmp_path)
    _tuned(FineTuner(3, SMALL, checkpoint=base, train="layer3.0")).save_delta(tmp_path / "delta.safetensors")
    other = _tuned(FineTuner(3, SMALL, checkpoint=base, train="layer3.0"))
    other.load_delta(tmp_path / "delta.safetensors")


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("train", ["none", "layer3.0", "all"])
def test_a_delta_of_any_precision_gives_the_model_of_the_checkpoint(precision: Any, train: str, tmp_path: Path) -> None:
    base, images = _base(tmp_path), torch.randn(4, 1, 8, 8)
    model = FineTuner(3, SMALL, checkpoint=base, train=train, optimizer=plain_sgd)
    trainer = trainer_in(tmp_path, precision=precision, enable_checkpointing=True)
    trainer.fit(model, Digits([0, 1, 2], shots=8, batch_size=8))
    checkpoint = Path(trainer.checkpoint_callback.best_model_path)
    saved = FineTuner.load_from_checkpoint(checkpoint).eval()
    path = checkpoint.parent / "delta.safetensors"
    again = FineTuner.from_delta(path, checkpoint=base)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in saved.state_dict().items())
    assert torch.equal(again(images), saved(images))
    again.load_delta(path)
    for number, one in enumerate((again, saved)):  # whose weights are the rounded ones, in float32
        one.save_delta(tmp_path / f"{number}.safetensors")
        third = FineTuner.from_delta(tmp_path / f"{number}.safetensors", checkpoint=base)
        assert torch.equal(third.eval()(images), saved(images))
    if train != "all":
        with pytest.raises(ValueError, match="belongs to another base"):
            FineTuner(3, SMALL, train=train).load_delta(path)


def test_a_delta_that_does_not_say_the_type_of_its_base_is_loaded(tmp_path: Path) -> None:
    base, path = _base(tmp_path), tmp_path / "delta.safetensors"
    model = _tuned(FineTuner(3, SMALL, checkpoint=base, train="layer3.0"))
    model.save_delta(path)
    with safe_open(path, framework="pt") as file:
        said = {name: fact for name, fact in file.metadata().items() if name not in ("base_dtype", "fingerprint")}
    tensors = load_file(path)
    save_file(tensors, path, {**said, "fingerprint": fingerprint(tensors, said)})
    again = FineTuner.from_delta(path, checkpoint=base)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_what_is_no_delta_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no delta '.*none.safetensors'; fit writes delta.safetensors beside"):
        FineTuner.from_delta(tmp_path / "none.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    for path in (tmp_path / "weights.safetensors", Path(_base(tmp_path))):
        with pytest.raises(ValueError, match="is no delta; expected the delta.safetensors that fit writes"):
            FineTuner.from_delta(path)


def test_deltas_that_are_not_as_they_were_saved_are_refused(tmp_path: Path) -> None:
    base, path = _base(tmp_path), tmp_path / "delta.safetensors"
    model = _tuned(FineTuner(3, SMALL, checkpoint=base, train="layer3.0"))
    model.save_delta(path)
    whole, tensors = path.read_bytes(), load_file(path)
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
    conv, frozen = "backbone.net.layer3.0.conv2.weight", "backbone.net.conv1.weight"
    for changed, message in [
        ({k: v for k, v in tensors.items() if not k.startswith("head")}, "lacks head.weight, head.bias; expected the"),
        ({k: v for k, v in tensors.items() if k != conv}, f"lacks {conv}; expected the tensors of the tuned layers"),
        ({**tensors, frozen: model.state_dict()[frozen]}, f"holds {frozen}, which was not tuned; expected"),
        ({**tensors, conv: tensors[conv][:1].clone()}, r"has .*conv2.weight as \(1, 8, 3, 3\) for \(8, 8, 3, 3\)"),
        ({**tensors, conv: tensors[conv] * torch.nan}, f"has values in {conv} that are not finite"),
        ({**tensors, conv: tensors[conv] + 1}, "is damaged: its checksum is wrong; copy it anew"),
    ]:
        save_file(changed, path, said)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            model.load_delta(path)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    for missing in ("base", "knobs", "class_names", "base_fingerprint"):
        save_file(tensors, path, {name: fact for name, fact in said.items() if name != missing})
        with pytest.raises(ValueError, match=f"lacks {missing} in its metadata; expected a file that fit wrote"):
            FineTuner.from_delta(path, checkpoint=base)
    save_file(tensors, path, {**said, "knobs": json.dumps({**json.loads(said["knobs"]), "rank": 4})})
    with pytest.raises(ValueError, match="is of another version: a FineTuner has no rank"):
        FineTuner.from_delta(path, checkpoint=base)
    for name, fact in (("class_names", '["x", "y", "z"]'), ("preprocessing", '{"mean": [0.25]}')):
        save_file(tensors, path, {**said, name: fact})
        with pytest.raises(ValueError, match="is damaged: its checksum is wrong; copy it anew"):
            FineTuner.from_delta(path, checkpoint=base)
    save_file(tensors, path, {**said, "knobs": "{"})
    with pytest.raises(ValueError, match=r"is damaged: .*; copy it anew"):
        FineTuner.from_delta(path, checkpoint=base)
    for cut in (whole[:-100], whole[:50]):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match="is damaged or cut off"):
            FineTuner.from_delta(path, checkpoint=base)
    path.write_bytes(whole)
    assert torch.equal(FineTuner.from_delta(path, checkpoint=base).head.weight, model.head.weight)


def test_fit_leaves_a_delta_beside_the_checkpoint(tmp_path: Path) -> None:
    base = _base(tmp_path)
    model = FineTuner(3, SMALL, checkpoint=base, train="layer3.0", optimizer=plain_sgd)
    trainer = trainer_in(tmp_path, enable_checkpointing=True)
    trainer.fit(model, Digits([7, 8, 9], shots=4))
    path = Path(trainer.checkpoint_callback.dirpath) / "delta.safetensors"
    again = FineTuner.from_delta(path, checkpoint=base)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(images), model.eval()(images))
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["class_names"]) == ["7", "8", "9"]


@pytest.mark.parametrize(
    ("backbone", "knobs", "classes"),
    [
        ({"name": "test_resnet"}, {"train": "layer3.0"}, 3),
        ({"name": "mobilenetv3_small_050"}, {"train": "blocks.4.0"}, 3),
        ({"name": "deit_tiny_distilled_patch16_224", "img_size": 32}, {"train": "blocks.3"}, 3),
        ({"name": "test_resnet", "in_chans": 1}, {"train": "layer3.0", "skip_from": "layer3.0"}, 0),
    ],
)
def test_merged_file_is_timms(backbone: dict, knobs: dict, classes: int, tmp_path: Path) -> None:
    model = FineTuner(3, backbone, **knobs)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(0.1)
    name, arguments = model.eval().save_for_timm(tmp_path / "merged.safetensors")
    net = timm.create_model(name, **arguments).eval()
    images = torch.randn(2, *model.backbone.input_size())
    assert arguments["num_classes"] == classes
    with torch.no_grad():
        expected = model(images) if classes else model.backbone(images)
        torch.testing.assert_close(net(images), expected)


def test_merged_network_makes_images_ready_as_the_datamodule_did(tmp_path: Path) -> None:
    net = {"name": "resnet18", "in_chans": 1, "channels": [4, 6, 8, 10]}
    data = Digits([7, 8, 9], shots=4, image_size=16, mean=[0.25], std=[0.125])
    model = FineTuner(3, net, train="layer3.0", optimizer=plain_sgd, allow_random=True)
    trainer = trainer_in(tmp_path, enable_checkpointing=True)
    trainer.fit(model, data)
    saved = Path(trainer.checkpoint_callback.dirpath)
    loaded = FineTuner.load_from_checkpoint(next(saved.glob("*.ckpt")))
    torch.save(model.backbone.state_dict(), tmp_path / "base.pth")
    from_delta = FineTuner.from_delta(saved / "delta.safetensors", checkpoint=str(tmp_path / "base.pth"))
    for tuned in (model, loaded, from_delta):
        assert tuned.class_names == ["7", "8", "9"]
        assert tuned.preprocessing == data.preprocessing
        name, arguments = tuned.save_for_timm(tmp_path / "merged.safetensors")
        merged = timm.create_model(name, **arguments).eval()
        config = timm.data.resolve_model_data_config(merged)
        seen = {"input_size": (1, 16, 16), "mean": (0.25,), "std": (0.125,)}
        assert config == {**seen, "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bilinear"}
        assert merged.pretrained_cfg["label_names"] == ("7", "8", "9")
    assert read(tmp_path / "merged.safetensors")[1]["class_names"] == ["7", "8", "9"]


def test_merged_vision_transformer_has_its_size(tmp_path: Path) -> None:
    """timm would make one for the size of the images, and ours takes any."""
    model = FineTuner(3, {"name": "test_vit", "dynamic_img_size": True})
    model.preprocessing = {"input_size": [3, 96, 96], "mean": [0.5] * 3}
    name, arguments = model.eval().save_for_timm(tmp_path / "merged.safetensors")
    merged, images = timm.create_model(name, **arguments).eval(), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(merged(images), model(images))
    assert timm.data.resolve_model_data_config(merged)["input_size"] == (3, 96, 96)


def test_network_that_timm_does_not_have_is_not_merged(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="timm has no resnet18 with stem='cifar'; keep the delta, or write the network"
    ):
        FineTuner(3, SMALL).save_for_timm(tmp_path / "merged.safetensors")


def test_deltas_and_merged_files_are_safetensors_by_name(tmp_path: Path) -> None:
    model = FineTuner(3, "resnet18")
    for write in (model.save_delta, model.save_for_timm):
        with pytest.raises(ValueError, match=r"expected a file name that ends in .safetensors, got '.*tuned.pth'"):
            write(tmp_path / "tuned.pth")
    assert list(tmp_path.iterdir()) == []


def test_a_trial_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = _base(tmp_path)
    before = set(tmp_path.rglob("*"))
    model = FineTuner(3, SMALL, checkpoint=base, train="layer3.0", optimizer=plain_sgd)
    trainer_in(tmp_path, enable_checkpointing=True, fast_dev_run=True).fit(model, Digits([7, 8, 9], shots=4))
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("train", ["layer4.*", "all"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_other_layers_than_the_fit_started_from_are_not_averaged(train: str, precision: Any, tmp_path: Path) -> None:
    base, data = _base(tmp_path), Digits([7, 8, 9], shots=4)
    other = torch.load(base)
    other["net.layer4.1.bn2.bias"] += 0.1
    torch.save(other, tmp_path / "other.pt")
    model = FineTuner(3, SMALL, checkpoint=base, train=train, optimizer=plain_sgd)
    trainer = trainer_in(tmp_path, enable_checkpointing=True, precision=precision)
    trainer.fit(model, data)
    path = Path(trainer.checkpoint_callback.dirpath) / "delta.safetensors"
    last = trainer.checkpoint_callback.best_model_path
    FineTuner.from_delta(path, checkpoint=base, strength=0.5)
    FineTuner.from_delta(path, checkpoint=str(tmp_path / "other.pt"))  # of which nothing is left
    for wrong in (str(tmp_path / "other.pt"), None):
        if wrong is None and train != "all":
            continue  # whose frozen layers say that it is another base
        with pytest.raises(ValueError, match="was tuned from layers with the fingerprint .*; give the checkpoint that"):
            FineTuner.from_delta(path, checkpoint=wrong, strength=0.5)
    again = FineTuner.load_from_checkpoint(last)  # and the fit goes on: the base is that of the first one
    trainer_in(tmp_path, precision=precision).fit(again, data)
    again.save_delta(tmp_path / "again.safetensors")
    FineTuner.from_delta(tmp_path / "again.safetensors", checkpoint=base, strength=0.5)


def test_a_fit_from_a_delta_starts_from_the_base_of_the_first_one(tmp_path: Path) -> None:
    base, data, path = _base(tmp_path), Digits([7, 8, 9], shots=4), tmp_path / "delta.safetensors"
    model = FineTuner(3, SMALL, checkpoint=base, train="layer4.1", optimizer=plain_sgd)
    trainer_in(tmp_path).fit(model, data)
    model.save_delta(path)
    again = FineTuner.from_delta(path, checkpoint=base)
    trainer_in(tmp_path).fit(again, data)
    again.save_delta(path)
    FineTuner.from_delta(path, checkpoint=base, strength=0.5)


class _Wrapping(FineTuner):
    def __init__(self, further: Any = 2, **options: Any) -> None:
        super().__init__(**options)
        self.further = further


def test_a_delta_has_the_options_that_a_subclass_hands_on(tmp_path: Path) -> None:
    base = _base(tmp_path)
    model = _tuned(_Wrapping(3, num_classes=3, backbone=SMALL, checkpoint=base, train="layer3.0", skip_from="layer3.0"))
    model.save_delta(tmp_path / "delta.safetensors")
    again = _Wrapping.from_delta(tmp_path / "delta.safetensors", checkpoint=base)
    images = torch.randn(2, 1, 8, 8)
    assert again.further == 3
    assert torch.equal(again(images), model(images))
    other = FineTuner(3, SMALL, checkpoint=base, train="layer3.0")
    with pytest.raises(ValueError, match="was tuned with skip_from='layer3.0', but the model has None"):
        other.load_delta(tmp_path / "delta.safetensors")


def test_an_option_that_no_delta_can_hold_is_said_before_the_fit(tmp_path: Path) -> None:
    model = _Wrapping(torch.nn.Identity, num_classes=3, backbone=SMALL, train="layer3.0", allow_random=True)
    trainer = trainer_in(tmp_path, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="no delta will be written beside the checkpoints: .*got further=<class"):
        trainer.fit(model, Digits([7, 8, 9], shots=4))
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".ckpt"}
    with pytest.raises(ValueError, match="expected options that are numbers, words, lists and dictionaries, which"):
        model.save_delta(tmp_path / "delta.safetensors")

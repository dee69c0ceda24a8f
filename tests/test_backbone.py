from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from ncfinetune import Backbone

SMALL = {"name": "resnet18", "stem": "cifar", "channels": [4, 6, 8, 10]}


@pytest.mark.parametrize(
    ("name", "blocks", "width"),
    [
        ("test_resnet", 4, 96),
        ("test_vit", 6, 64),
        ("test_convnext", 9, 64),
        ("resnet18", 8, 512),
        ("resnet50", 16, 2048),
    ],
)
def test_layers_are_blocks_with_their_widths(name: str, blocks: int, width: int) -> None:
    layers = Backbone(name).layers
    assert len(layers) == blocks
    assert list(layers.values())[-1] == width


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_features_are_what_timm_gives_its_classifier(name: str) -> None:
    backbone = Backbone(name).eval()
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        features = backbone(images)
        assert features.shape == (2, backbone.dim)
        assert torch.equal(features, backbone.net(images))


def test_stages_are_pooled_and_come_from_one_forward_pass() -> None:
    backbone = Backbone("test_vit").eval()
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        stages = backbone.stages(images, ["blocks.2", "penultimate"])
        tokens = backbone.net.forward_intermediates(images, [2], return_prefix_tokens=True, intermediates_only=True)
    assert torch.equal(stages["penultimate"], backbone(images))
    assert torch.allclose(stages["blocks.2"], tokens[0][1][:, 0], atol=1e-6)  # test_vit classifies by its class token


def test_finding_the_layers_leaves_modes_and_statistics_alone() -> None:
    backbone = Backbone(**SMALL)
    backbone.net.layer1.eval()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    assert backbone.layers["layer1.1"] == 4
    assert backbone.net.layer2.training
    assert not backbone.net.layer1[0].training
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "resnet18d", "resnext50_32x4d", "seresnet18"])
def test_cifar_stem_keeps_the_size_of_the_image(name: str) -> None:
    net = Backbone(name, stem="cifar").net
    assert net.maxpool(net.conv1(torch.zeros(1, 3, 8, 8))).shape[2:] == (8, 8)
    assert (net.conv1.kernel_size, net.conv1.stride, net.conv1.padding) == ((3, 3), (1, 1), (1, 1))


def test_spec_builds_the_same_architecture() -> None:
    backbone = Backbone(**SMALL)
    again = Backbone.build(backbone.spec)
    assert [p.shape for p in again.parameters()] == [p.shape for p in backbone.parameters()]
    assert Backbone.build(backbone) is backbone
    assert Backbone.build("test_resnet").spec["name"] == "test_resnet"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet81"}, "timm has no architecture 'resnet81'; nearest: resnet18"),
        ({"name": "test_vit", "stem": "cifar"}, "stem=\"cifar\" is for ResNets, and 'test_vit' is none"),
        ({"name": "resnet18.a1_in2k"}, "timm has no weights 'a1_in2k' of resnet18; expected one of resnet18.a1_in1k, "),
        ({"name": "test_vit", "stem": "cifr"}, "expected stem imagenet or cifar, got 'cifr'"),
        ({"name": "resnet18", "chanels": 3}, "timm cannot make 'resnet18' with {'chanels': 3}"),
        ({"name": "test_vit", "global_pool": "catavgmax"}, "timm cannot make 'test_vit' with {'global_pool': 'cata"),
        ({"name": "test_vit", "global_pool": ""}, "a global_pool that gives one vector for each image, such as avg"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backbone(**arguments)


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(timm, "create_model", offline)
    fix = "give a file by {name: resnet18, checkpoint: FILE}, or --checkpoint FILE of scan and suggest"
    with pytest.raises(OSError, match="^cannot get the weights of 'resnet18': no connection; without") as refused:
        Backbone("resnet18", pretrained=True)
    assert str(refused.value).endswith(fix)


@pytest.mark.parametrize("form", ["plain", "prefixed", "lightning", "safetensors"])
def test_checkpoints_of_every_form_load(form: str, tmp_path: Path) -> None:
    source = Backbone(**SMALL)
    weights = source.net.state_dict()
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pt")
    if form == "safetensors":
        save_file(weights, path)
    elif form == "lightning":
        torch.save({"state_dict": {f"backbone.net.{k}": v for k, v in weights.items()}, "epoch": 3}, path)
    else:
        prefix = "module." if form == "prefixed" else ""
        torch.save({f"{prefix}{k}": v for k, v in weights.items()}, path)
    loaded = Backbone(**SMALL, checkpoint=str(path))
    assert all(torch.equal(v, weights[k]) for k, v in loaded.net.state_dict().items())


def test_checkpoint_of_a_classifier_reports_what_is_unused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "timm.pth")
    with caplog.at_level("INFO"):
        Backbone("test_resnet", checkpoint=str(tmp_path / "timm.pth"))
    assert "in the file but unused: 2 (fc.weight, fc.bias)" in caplog.text


def test_weights_of_torchvision_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, tmp_path / "torchvision.pth")
    with caplog.at_level("INFO"):
        loaded = Backbone("resnet18", checkpoint=str(tmp_path / "torchvision.pth"))
    assert "120 of 120 tensors of the network matched; in the file but unused: 2 (fc.weight, fc.bias)" in caplog.text
    assert all(torch.equal(value, weights[key]) for key, value in loaded.net.state_dict().items())


def test_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    with pytest.raises(
        ValueError, match=r"0 of \d+ tensors of the network matched; not in the file .*unused: .*patch_embed"
    ):
        Backbone("test_resnet", checkpoint=str(tmp_path / "vit.pth"))


def test_weights_of_a_larger_network_are_warned_of(tmp_path: Path) -> None:
    Backbone("resnet26").save(tmp_path / "larger.pth")
    with pytest.warns(
        UserWarning, match=r"of the network matched; .*That is 5\d% of the network's values: are they of"
    ):
        Backbone("resnet18", checkpoint=str(tmp_path / "larger.pth"))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 32, 32), r"takes images \(N, 3, H, W\), got \(2, 1, 32, 32\); give it in_chans=1"),
        ((2, 32, 32, 3), r"got \(2, 32, 32, 3\); channels come first"),
        ((2, 2, 3, 32, 32), r"got \(2, 2, 3, 32, 32\); those are views, so give the datamodule views=1"),
        ((2,), r"got \(2,\)$"),
    ],
)
def test_what_is_no_batch_of_its_images(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backbone("test_resnet")(torch.zeros(shape))


def test_images_that_are_not_normalised_yet() -> None:
    with pytest.raises(ValueError, match=r"of a floating type, got torch.uint8; our datamodules normalise"):
        Backbone("test_resnet")(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


def test_missing_and_empty_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint '.*none.pt'; expected a .ckpt"):
        Backbone("test_resnet", checkpoint=str(tmp_path / "none.pt"))
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list, expected a dictionary of tensors"):
        Backbone("test_resnet", checkpoint=str(tmp_path / "list.pt"))
    torch.save({"epoch": 1}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match=r"holds no tensors, only 1 \(epoch\)"):
        Backbone("test_resnet", checkpoint=str(tmp_path / "empty.pt"))


def test_unknown_stems_and_patterns_of_several_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="expected stem imagenet or cifar, got 'cifr'"):
        Backbone("test_resnet", stem="cifr")
    with pytest.raises(
        ValueError, match=r"expected one layer, but 'layer\*' fits layer1, layer2, layer3, layer4; name"
    ):
        Backbone("test_resnet").layer("layer*")


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors", "pth"])
def test_files_that_are_no_checkpoints_are_said_to_be_none(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"garbage.{suffix}"
    path.write_bytes(b"this is no checkpoint at all")
    with pytest.raises(ValueError, match=f"cannot read '.*garbage.{suffix}' as a checkpoint of tensors: "):
        Backbone("test_resnet", checkpoint=str(path))
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, expected a dictionary of tensors"):
        Backbone("test_resnet", checkpoint=str(tmp_path / "list.pth"))


def test_backbone_without_a_name_or_of_an_unknown_tag() -> None:
    with pytest.raises(ValueError, match=r"expected the name of a timm architecture in the backbone, got \['stem'\]"):
        Backbone.build({"stem": "cifar"})
    with pytest.raises(ValueError, match="timm has no weights 'nonsense' of test_resnet; expected one of"):
        Backbone("test_resnet.nonsense", pretrained=True)
    with pytest.raises(ValueError, match="no weights 'nonsense' of convnextv2_small; it has none, so the name is conv"):
        Backbone("convnextv2_small.nonsense")


@pytest.mark.parametrize("options", [{"act_layer": torch.nn.SiLU}, {"block_args": [{"norm": torch.nn.Identity()}]}])
def test_options_that_no_checkpoint_holds_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected options of the backbone as numbers, .*; timm takes the names of"):
        Backbone("test_resnet", **options)
    assert Backbone("test_resnet", act_layer="silu").spec["act_layer"] == "silu"


def test_options_of_other_types_are_kept_as_built_in_ones() -> None:
    spec = Backbone("resnet18", channels=np.array([4, 4, 4, 4]), in_chans=np.int64(1)).spec
    assert spec == {"name": "resnet18", "stem": "imagenet", "channels": [4, 4, 4, 4], "in_chans": 1}
    assert type(spec["in_chans"]) is int

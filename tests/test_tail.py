"""Networks from one of their layers on: the same numbers, from the layer's stored input."""

import pytest
import torch
from torch import nn

from ncfinetune import Backbone
from ncfinetune.tail import Tail

# name, arguments, layers that start the tail, and the first of them to run
CASES = [
    ("test_resnet", {}, ["layer3.0"], "layer3.0"),
    ("resnet18", {"stem": "cifar", "channels": [4, 6, 8, 10]}, ["layer4.0", "layer2.1"], "layer2.1"),
    ("regnety_002", {}, ["s4.b3"], "s4.b3"),
    ("mobilenetv3_small_050", {}, ["blocks.3.0"], "blocks.3.0"),
    ("convnext_atto", {}, ["stages.2"], "stages.2"),
    ("vit_tiny_patch16_224", {"img_size": 32}, ["blocks.6"], "blocks.6"),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 28}, ["blocks.11", "blocks.9"], "blocks.9"),
    ("deit_tiny_distilled_patch16_224", {"img_size": 32}, ["norm"], "norm"),
    ("swin_tiny_patch4_window7_224", {"img_size": 56}, ["layers.2.blocks.1"], "layers.2.blocks.1"),
    ("mixer_s32_224", {}, ["blocks.0"], "blocks.0"),
    ("test_vit4", {}, ["blocks.4"], "blocks.4"),  # rotary positions, from the grid of the patches
]


@pytest.mark.parametrize(("name", "arguments", "layers", "first"), CASES)
def test_tail_of_what_was_captured_is_the_network(name: str, arguments: dict, layers: list[str], first: str) -> None:
    backbone = Backbone(name, **arguments).eval()
    size = (3, 16, 16) if name == "resnet18" else backbone.input_size()
    with torch.no_grad():
        tail = Tail(backbone, [backbone.layer(layer) for layer in layers], torch.randn(2, *size))
        images = torch.randn(3, *size)  # as many as were not seen
        assert tail.layer is backbone.layer(first)
        torch.testing.assert_close(tail(tail.capture(images)), backbone(images))


def test_tail_runs_nothing_before_its_layer_and_trains_the_same_parameters() -> None:
    backbone = Backbone("test_vit").eval()
    tail = Tail(backbone, [backbone.layer("blocks.3")], torch.randn(2, 3, 160, 160))
    ran = []
    for path, module in backbone.net.named_modules():
        module.register_forward_hook(lambda m, a, o, path=path: ran.append(path))
    tail(torch.randn(2, 101, 64)).sum().backward()
    blocks = {path.split(".")[1] for path in ran if path.startswith("blocks.")}
    assert blocks == {"3", "4", "5"}
    assert not any(path.startswith("patch_embed") for path in ran)
    left_out = {path for path, module in backbone.net.named_modules() if module in tail.left_out()}
    assert {"patch_embed.proj", "blocks.0", "blocks.2.mlp.fc1"} <= left_out
    assert not left_out & set(ran)
    having = {
        name.split(".")[1] for name, p in backbone.net.named_parameters() if p.grad is not None and "blocks" in name
    }
    assert having == blocks


def test_capture_stops_at_the_layer() -> None:
    backbone = Backbone("test_resnet").eval()
    tail = Tail(backbone, [backbone.layer("layer2.0")], torch.randn(2, 3, 64, 64))
    backbone.layer("layer3.0").register_forward_hook(lambda *args: pytest.fail("ran on"))
    assert torch.equal(tail.capture(torch.ones(1, 3, 64, 64)), backbone.net.layer1(
        backbone.net.maxpool(backbone.net.act1(backbone.net.bn1(backbone.net.conv1(torch.ones(1, 3, 64, 64)))))
    ))  # fmt: skip


def test_layer_that_runs_twice_is_no_start() -> None:
    block = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="it runs 2 times in a pass"):
        Tail(nn.Sequential(block, block), [block], torch.randn(2, 4))

"""The table of architectures: how many blocks each has, their widths, and how their outputs become one vector."""

import pytest
import torch
import torchvision

from ncfinetune import Backbone
from ncfinetune.blocks import block_names

# name, arguments that make it fast, blocks, first block and its width, last block and its width
TABLE = [
    ("resnet18", {}, 8, ("layer1.0", 64), ("layer4.1", 512)),
    ("resnet50", {}, 16, ("layer1.0", 256), ("layer4.2", 2048)),
    ("resnext50_32x4d", {}, 16, ("layer1.0", 256), ("layer4.2", 2048)),
    ("regnety_002", {}, 13, ("s1.b1", 24), ("s4.b7", 368)),
    ("mobilenetv2_100", {}, 17, ("blocks.0.0", 16), ("blocks.6.0", 320)),
    ("mobilenetv3_small_050", {}, 12, ("blocks.0.0", 8), ("blocks.5.0", 288)),
    ("efficientnet_b0", {}, 16, ("blocks.0.0", 16), ("blocks.6.0", 320)),
    ("efficientnetv2_rw_t", {}, 39, ("blocks.0.0", 24), ("blocks.5.13", 208)),
    ("convnext_atto", {}, 12, ("stages.0.blocks.0", 40), ("stages.3.blocks.1", 320)),
    ("vit_tiny_patch16_224", {"img_size": 32}, 12, ("blocks.0", 192), ("blocks.11", 192)),
    ("deit_tiny_patch16_224", {"img_size": 32}, 12, ("blocks.0", 192), ("blocks.11", 192)),
    ("deit_tiny_distilled_patch16_224", {"img_size": 32}, 12, ("blocks.0", 192), ("blocks.11", 192)),
    ("vit_xsmall_patch16_clip_224", {"img_size": 32}, 10, ("blocks.0", 256), ("blocks.9", 256)),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 28}, 12, ("blocks.0", 384), ("blocks.11", 384)),
    ("vit_tiny_patch16_224", {"img_size": 32, "global_pool": "avg"}, 12, ("blocks.0", 192), ("blocks.11", 192)),
    ("swin_tiny_patch4_window7_224", {"img_size": 56}, 12, ("layers.0.blocks.0", 96), ("layers.3.blocks.1", 768)),
    ("mixer_s32_224", {}, 8, ("blocks.0", 512), ("blocks.7", 512)),
    ("cait_xxs24_224", {"img_size": 32}, 26, ("blocks.0", 192), ("blocks_token_only.1", 192)),
]


# A second or more each, and of a family that has a smaller member here.
LARGE = {"resnext50_32x4d", "resnet50", "efficientnetv2_rw_t", "deit_tiny_distilled_patch16_224", "cait_xxs24_224"}
LARGE |= {"vit_xsmall_patch16_clip_224", "vit_small_patch14_reg4_dinov2", "swin_tiny_patch4_window7_224"}


@pytest.mark.parametrize(
    ("name", "arguments", "blocks", "first", "last"),
    [pytest.param(*row, marks=pytest.mark.slow if row[0] in LARGE else ()) for row in TABLE],
)
def test_layers_are_the_blocks_in_depth_order_with_their_widths(name, arguments, blocks, first, last) -> None:
    layers = Backbone(name, **arguments).layers
    names = list(layers)
    assert len(names) == blocks
    assert ((names[0], layers[names[0]]), (names[-1], layers[names[-1]])) == (first, last)


@pytest.mark.slow
def test_base_vit_has_twelve_blocks() -> None:
    assert Backbone("vit_base_patch16_224", img_size=32).layers == {f"blocks.{i}": 768 for i in range(12)}


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("resnet18", 8), ("vit_b_32", 12), ("swin_t", 12), ("convnext_tiny", 18), ("efficientnet_b0", 16)],
)
def test_blocks_of_torchvision(name: str, blocks: int) -> None:
    with torch.device("meta"):  # no weights are needed
        assert len(block_names(torchvision.models.get_model(name))) == blocks


# Networks between whose last layer and penultimate features there is nothing but the pooling.
@pytest.mark.parametrize(
    ("name", "arguments", "last", "words"),
    [
        ("test_resnet", {}, "layer4", "mean over positions"),
        ("regnety_002", {}, "s4", "mean over positions"),
        ("vit_tiny_patch16_224", {"img_size": 32}, "norm", "class token"),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32}, "norm", "mean of the tokens 0 to 1"),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28}, "norm", "class token"),
        (
            "vit_small_patch14_reg4_dinov2",
            {"img_size": 28, "global_pool": "avg", "fc_norm": False},
            "norm",
            "mean of the tokens behind the first 5",
        ),
        ("swin_tiny_patch4_window7_224", {"img_size": 56}, "norm", "mean over positions"),
        ("mixer_s32_224", {}, "norm", "mean of the tokens"),
    ],
)
def test_pooling_is_the_one_that_the_network_applies_to_its_last_features(
    name: str, arguments: dict, last: str, words: str
) -> None:
    backbone = Backbone(name, **arguments).eval()
    with torch.no_grad():
        found = backbone.stages(torch.randn(2, *backbone.input_size()), [last, "penultimate"])
    torch.testing.assert_close(found[last], found["penultimate"])
    assert backbone.pool(last).describe() == words
    if "." not in last and hasattr(backbone.net, "blocks"):
        assert backbone.pool("blocks.3").describe() == words  # what counts at the end counts in the blocks

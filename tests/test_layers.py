import pytest
import torch
from torch import nn

from ncfinetune.layers import Pool, block_names, caught, enclosing_block, find_layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def _network(depth: int = 12) -> nn.Module:
    return nn.ModuleDict({"net": nn.ModuleDict({"blocks": nn.Sequential(*(Block() for _ in range(depth)))})})


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("blocks.3", ["blocks.3"]),
        ("net.blocks.3", ["net.blocks.3"]),
        ("blocks.*", [f"blocks.{i}" for i in range(12)]),
        ("blocks.1?", ["blocks.10", "blocks.11"]),
        ("blocks.[01].fc", ["blocks.0.fc", "blocks.1.fc"]),
        ("net", ["net"]),
    ],
)
def test_a_pattern_names_layers_by_the_end_of_their_path(pattern: str, names: list[str]) -> None:
    assert list(find_layers(_network(), [pattern])) == names


def test_layers_come_in_the_order_of_the_module_not_of_the_patterns() -> None:
    assert list(find_layers(_network(), ["blocks.5", "blocks.2", "blocks.[45]"])) == [
        "blocks.2",
        "blocks.4",
        "blocks.5",
    ]


def test_unknown_layer_names_the_blocks_and_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"no layer fits 'block.1'; expected a block \(net.blocks.0, net.blocks.1\) or .*: blocks.1"
    ):
        find_layers(_network(2), ["block.1"])


def test_name_of_several_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer name 'fc' fits 2 modules \(net.blocks.0.fc, net.blocks.1.fc\)"):
        find_layers(_network(2), ["fc"])


def test_blocks_inside_blocks_do_not_count() -> None:
    outer = Block()
    outer.inner = Block()
    assert block_names(nn.Sequential(outer, Block())) == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "block"), [("blocks.1.fc", "net.blocks.1"), ("blocks.1", "net.blocks.1"), ("net", "net")]
)
def test_block_that_holds_a_layer(name: str, block: str) -> None:
    assert enclosing_block(_network(2), name) == block


def test_hooks_are_gone_after_the_context() -> None:
    layer = nn.Linear(2, 2)
    with caught({"fc": layer}, {"fc": Pool(2, 2)}) as features:
        expected = layer(torch.ones(1, 2))
    assert torch.equal(features["fc"], expected)
    assert not layer._forward_hooks


CLASS, BOTH, PATCHES = ((0, 1),), ((0, 2),), ((2, None),)


@pytest.mark.parametrize(
    ("pool", "shape", "expected", "words"),
    [
        (Pool(2, 3), (2, 3), lambda x: x, "as it is"),
        (Pool(4, 3), (2, 3, 4, 5), lambda x: x.mean((2, 3)), "mean over positions"),
        (Pool(4, 3, -1), (2, 4, 5, 3), lambda x: x.mean((1, 2)), "mean over positions"),
        (Pool(5, 3), (2, 3, 4, 5, 6), lambda x: x.mean((2, 3, 4)), "mean over positions"),
        (Pool(3, 3), (2, 3, 7), lambda x: x.mean(2), "mean over positions"),
        (Pool(3, 3, -1), (2, 7, 3), lambda x: x.mean(1), "mean of the tokens"),
        (Pool(3, 3, -1, (PATCHES,)), (2, 7, 3), lambda x: x[:, 2:].mean(1), "mean of the tokens behind the first 2"),
        (Pool(3, 3, -1, (CLASS,)), (2, 7, 3), lambda x: x[:, 0], "class token"),
        (Pool(3, 3, -1, (BOTH,)), (2, 7, 3), lambda x: (x[:, 0] + x[:, 1]) / 2, "mean of the tokens 0 to 1"),
        (
            Pool(3, 3, -1, (CLASS, PATCHES)),
            (2, 7, 3),
            lambda x: torch.cat([x[:, 0], x[:, 2:].mean(1)], 1),
            "class token beside mean of the tokens behind the first 2",
        ),
        (
            Pool(3, 3, -1, (CLASS + PATCHES,)),
            (2, 7, 3),
            lambda x: x[:, [0, 2, 3, 4, 5, 6]].mean(1),
            "mean of the tokens 0, 2 to the last",
        ),
    ],
)
def test_pooling(pool: Pool, shape: tuple[int, ...], expected, words: str) -> None:
    output = torch.randn(shape)
    assert torch.allclose(pool(output), expected(output))
    assert pool(output).shape[1] == pool.dim
    wide = pool(output.bfloat16(), torch.float32)
    assert wide.dtype == torch.float32
    assert torch.allclose(wide, expected(output.bfloat16().float()), atol=1e-6)
    assert pool.describe() == words


def test_pooled_features_are_a_copy() -> None:
    output = torch.ones(2, 3)
    features = Pool(2, 3)(output)
    output.zero_()
    assert features.sum() == 6


@pytest.mark.parametrize("shape", [(2,), (2, 3, 4), (2, 4)])
def test_pooling_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"expected a layer output of 2 dimensions and 3 channels, .*{shape[-1]}"):
        Pool(2, 3)(torch.zeros(shape))

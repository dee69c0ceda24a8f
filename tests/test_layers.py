import pytest
import torch
from torch import nn

from ncfinetune.blocks import block_names
from ncfinetune.layers import enclosing_block, find_layers


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


@pytest.mark.parametrize(("pattern", "names"), [("blocks.1", ["blocks.1"]), ("blocks.*", ["blocks.0", "blocks.1"])])
def test_name_means_the_same_in_a_network_and_around_it(pattern: str, names: list[str]) -> None:
    net = _network(2)["net"]
    for block in net["blocks"]:
        block.blocks = nn.Sequential(Block(), Block())
    found = find_layers(nn.ModuleDict({"backbone": nn.ModuleDict({"net": net})}), [pattern])
    assert list(found) == names
    assert [id(layer) for layer in found.values()] == [id(net["blocks"][int(name[-1])]) for name in names]


def test_blocks_inside_blocks_do_not_count() -> None:
    outer = Block()
    outer.inner = Block()
    assert block_names(nn.Sequential(outer, Block())) == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "block"), [("blocks.1.fc", "net.blocks.1"), ("blocks.1", "net.blocks.1"), ("net", "net")]
)
def test_block_that_holds_a_layer(name: str, block: str) -> None:
    assert enclosing_block(_network(2), name) == block


def test_single_numbered_child_is_no_block() -> None:
    net = nn.Module()
    net.encoder_v1 = nn.Module()
    net.encoder_v1.layer = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(2)))
    assert block_names(net) == ["encoder_v1.layer.0", "encoder_v1.layer.1"]

import pytest
import torch
from torch import nn

from ncfinetune.blocks import block_names
from ncfinetune.layers import enclosing_block, find_layers
from ncfinetune.pool_search import find_pools
from ncfinetune.pooling import NoTensorError, Pool, caught
from ncfinetune.tracing import few


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


def _pools(module: nn.Module, layers: list[str], images: torch.Tensor) -> dict[str, Pool]:
    return find_pools(module, find_layers(module, layers), lambda: module(images))


class ChannelsLast(nn.Module):
    """A block on ``(N, H, W, C)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc(self.norm(x))


@pytest.mark.parametrize("width", [6, 8])  # 8 is as many as there are rows and columns
def test_axis_of_the_channels_is_told_by_what_reads_and_makes_the_output(width: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
            self.last = nn.Sequential(ChannelsLast(width), ChannelsLast(width))
            self.norm = nn.LayerNorm(width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.last(self.first(x).permute(0, 2, 3, 1))).mean((1, 2))

    pools = _pools(Net(), ["first", "last.0", "last.1"], torch.rand(2, 3, 8, 8))
    assert {name: (pool.channel, pool.width) for name, pool in pools.items()} == {
        "first": (1, width),
        "last.0": (-1, width),
        "last.1": (-1, width),
    }


def test_axis_that_nothing_tells_is_asked_for() -> None:
    net = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(48, 2))
    with pytest.raises(ValueError, match=r"cannot tell which axis of the output \(2, 3, 4, 4\) of layer '0' .* pool="):
        _pools(net, ["0"], torch.rand(2, 3, 4, 4))


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        windows = x.unflatten(3, (2, -1)).movedim(3, 1).flatten(0, 1)
        return self.inner(windows).mean((2, 3)).unflatten(0, (len(x), 2)).mean(1)


def test_outputs_that_are_no_samples_are_refused_or_left_out() -> None:
    net, images = Windows(), torch.rand(2, 3, 4, 4)
    with pytest.raises(
        ValueError, match=r"the output of layer 'inner' for 2 samples is \(4, 4, 4, 2\), nothing with one entry"
    ):
        _pools(net, ["inner"], images)
    assert find_pools(net, {"inner": net.inner}, lambda: net(images), strict=False) == {}


def test_layer_without_a_tensor_is_no_layer() -> None:
    class Words(nn.Module):
        def forward(self, x: torch.Tensor) -> str:
            return "no tensor"

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.fc = Words(), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.words(x)
            return self.fc(x)

    with pytest.raises(
        NoTensorError, match="expected the output of layer 'words' to be a tensor, .* got str; name another"
    ):
        _pools(Net(), ["words"], torch.rand(2, 3))


class Tokens(nn.Module):
    """A row of attention layers on ``(N, T, C)`` tokens that a class token joins before the layer ``late``."""

    def __init__(self, late: int, pooled: str) -> None:
        super().__init__()
        self.late, self.pooled = late, pooled
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(4))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            x = torch.cat([self.token.expand(len(x), 1, 8), x], 1) if i == self.late else x
            x = block(x)
        x = self.norm(x)
        mean = x[:, 1:].mean(1)
        return {"token": x[:, 0], "patches": mean, "both": torch.cat([x[:, 0], mean], 1)}[self.pooled]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    ("pooled", "words"),
    [
        ("token", "class token"),
        ("patches", "mean of the tokens behind the first 1"),
        ("both", "class token beside mean of the tokens behind the first 1"),
    ],
)
def test_tokens_that_count_are_those_that_the_features_depend_on(pooled: str, words: str, frozen: bool) -> None:
    net = Tokens(2, pooled).requires_grad_(not frozen)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images, state = torch.rand(2, 9, 8), torch.get_rng_state()
    pools = _pools(net, ["blocks.*"], images)
    assert [pool.describe() for pool in pools.values()] == [*["mean of the tokens"] * 2, words, words]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad is not frozen for p in net.parameters())
    assert all(module.training and not module._forward_hooks for module in net.modules())


def test_of_several_tensors_the_one_that_counts_is_pooled() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.used = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"windows": x.flatten(0, 1), "unused": self.unused(x), "used": self.used(x)}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.pair(x)["used"].mean((2, 3))

    (pool,) = _pools(Net(), ["pair"], torch.rand(2, 3, 4, 4)).values()
    assert (pool.index, pool.width) == (2, 5)


def test_few_samples_of_any_arguments() -> None:
    mask = torch.ones(3, 3)
    images, options = few((torch.ones(5, 3), {"labels": torch.arange(5), "mask": mask, "scale": torch.tensor(2.0)}))
    assert len(images) == len(options["labels"]) == 2
    assert options["mask"].shape == (3, 3)
    assert options["scale"] == 2


def test_single_numbered_child_is_no_block() -> None:
    net = nn.Module()
    net.encoder_v1 = nn.Module()
    net.encoder_v1.layer = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(2)))
    assert block_names(net) == ["encoder_v1.layer.0", "encoder_v1.layer.1"]

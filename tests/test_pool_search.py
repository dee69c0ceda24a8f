"""How layers are pooled, by a pass of the network and by its parts alone."""

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from ncfinetune.layers import find_layers
from ncfinetune.pool_search import find_pools, guess_pool
from ncfinetune.pooling import NoTensorError, Pool, TokensDifferError


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
        ValueError, match=r"the output of layer 'inner' for 2 samples is \(4, 4, 4, 2\), without one entry"
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


def test_a_layer_that_a_skip_joins_is_pooled_as_the_skip_pools_it() -> None:
    """The end's features, which attention mixes from all tokens, are no evidence of the layer's own."""

    class Joined(Tokens):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = skip = self.blocks[:2](torch.cat([self.token.expand(len(x), 1, 8), x], 1))
            x = self.blocks[2:](torch.cat([x[:, :1], x[:, 1:].unfold(1, 4, 4).mean(-1)], 1))
            return torch.cat([x[:, 0], skip[:, 0]], 1)

    net = Joined(0, "token")
    net.blocks = nn.Sequential(*net.blocks)
    pools = _pools(net, ["blocks.*"], torch.rand(2, 16, 8))
    assert [pool.describe() for pool in pools.values()] == ["class token"] * 4


@pytest.mark.parametrize("layers", [["blocks.3"], ["blocks.*"]])
def test_tokens_at_other_positions_in_each_sample_are_refused(layers: list[str]) -> None:
    class OfLength(Tokens):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            if self.pooled == "greatest":
                return x.amax(1)
            used = torch.arange(x.shape[1]) < 4 + torch.arange(len(x))[:, None]
            if self.pooled == "last":
                return x[torch.arange(len(x)), used.sum(1) - 1]
            return (x * used[..., None]).sum(1) / used.sum(1, keepdim=True)

    for pooled in ("last", "mean"):
        with pytest.raises(TokensDifferError, match="from tokens at other positions in each sample, .*; name another"):
            _pools(OfLength(4, pooled), layers, torch.rand(2, 9, 8))
    assert len(_pools(OfLength(4, "greatest"), layers, torch.rand(2, 9, 8))) in (1, 4)


def test_states_of_a_recurrent_layer_are_no_rows() -> None:
    """As many layers as samples are looked at would pass for the samples."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(5, 7, 2, batch_first=True), nn.Linear(7, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(x)[1][0][-1])

    (pool,) = _pools(Net(), ["lstm"], torch.rand(2, 4, 5)).values()
    assert (pool.index, pool.ndim, pool.width) == (0, 3, 7)


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


def _encoder(tokens: int = 1) -> nn.Module:
    """A transformer that nobody has heard of, with so many class tokens."""
    net = nn.Module()
    net.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(2)))
    for i in range(tokens):
        net.register_module(f"part{i}", nn.Module())
        net.get_submodule(f"part{i}").cls_token = nn.Parameter(torch.zeros(1, 1, 8))
    return net


def _timm(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, num_classes=0, **options)


def _torchvision() -> nn.Module:
    sizes = {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 8}
    return torchvision.models.VisionTransformer(**sizes, num_classes=3)


@pytest.mark.parametrize(
    ("network", "name", "shape", "words"),
    [
        (lambda: _timm("test_vit"), "blocks.1", (2, 9, 64), "class token"),
        (lambda: _timm("test_vit", global_pool="avg"), "blocks.1", (2, 9, 64), "mean of the tokens behind the first 1"),
        (_torchvision, "encoder.layers.encoder_layer_1", (2, 5, 8), "class token"),
        (lambda: _encoder(1), "blocks.1", (2, 5, 8), "class token"),
        (lambda: _encoder(0), "blocks.1", (2, 5, 8), "mean of the tokens"),
        (lambda: _encoder(0), "blocks.1", (2, 8), "as it is"),
    ],
)
def test_guess_takes_the_tokens_that_the_author_names(
    network: Any, name: str, shape: tuple[int, ...], words: str
) -> None:
    net = network()
    assert guess_pool(name, torch.zeros(shape), net.get_submodule(name), net).describe() == words


@pytest.mark.parametrize(
    ("layer", "shape", "channel"),
    [
        (nn.Conv2d(3, 5, 1), (2, 5, 4, 4), 1),
        (ChannelsLast(5), (2, 4, 4, 5), -1),
        (ChannelsLast(4), (2, 4, 4, 4), -1),  # by the kinds of its parts, where the widths say nothing
        (nn.ReLU(), (2, 4, 4, 4), 1),  # by those of its network
    ],
)
def test_guess_takes_the_axis_that_the_parts_name(layer: nn.Module, shape: tuple[int, ...], channel: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), layer) if isinstance(layer, nn.ReLU) else nn.Sequential(layer)
    assert guess_pool("0", torch.zeros(shape), layer, net).channel == channel


def test_guess_takes_the_first_tensor_with_an_axis_of_features() -> None:
    pool = guess_pool("0", (torch.arange(3), torch.zeros(()), torch.zeros(2, 5)), nn.Linear(3, 5), nn.Linear(3, 5))
    assert (pool.index, pool.width) == (2, 5)


@pytest.mark.parametrize(
    ("network", "output", "error", "message"),
    [
        (
            _encoder(2),
            torch.zeros(2, 5, 8),
            ValueError,
            "cannot determine which of part0.cls_token, part1.cls_token to use in the tokens of layer 'blocks.1'; name",
        ),
        (
            nn.Module(),
            torch.zeros(2, 3, 4, 4),
            ValueError,
            r"cannot tell which axis of the output \(2, 3, 4, 4\) of layer 'blocks.1' has the channels; name another",
        ),
        (
            nn.Module(),
            [torch.arange(2), torch.zeros(2)],
            ValueError,
            r"the output of layer 'blocks.1' is \(2,\), \(2,\), expected features \(N, d\) or more dimensions; name",
        ),
        (nn.Module(), None, TypeError, "expected the output of layer 'blocks.1' to be a tensor, .* got NoneType; name"),
    ],
)
def test_guess_says_what_it_cannot_tell(network: nn.Module, output: Any, error: type, message: str) -> None:
    layer = network.blocks[1] if hasattr(network, "blocks") else nn.Identity()
    with pytest.raises(error, match=message):
        guess_pool("blocks.1", output, layer, network)


def test_a_pass_without_features_is_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="expected Sequential to return features or logits, got no such tensor"):
        find_pools(net, {"0": net[0]}, lambda: net(torch.rand(2, 3)).sum())

"""Pools of a stranger's layers, found as its network runs for the first time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from ncfinetune.callbacks.pool_finder import PoolFinder
from ncfinetune.pooling import SampleAxisError

K, N, T, C = 3, 6, 5, 8


class Tokens(nn.Module):
    """Attends over tokens ``(N, T, C)``, of which the last counts for ``"last"``; ``"all"`` returns them as they are.

    No name says which of them counts, so that only a second run can tell.
    """

    def __init__(self, returns: str = "last", refuses: int = 0) -> None:
        super().__init__()
        self.returns, self.refuses, self.runs = returns, refuses, 0
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(C, 2, C, batch_first=True) for _ in range(2)))
        self.head = nn.Linear(C, K)

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        if len(x) == self.refuses:
            raise RuntimeError("expected a whole batch")
        x = self.blocks(x)
        return x if self.returns == "all" else self.head(x[:, -1])


class Observed:
    """A module whose layer's outputs are pooled in its hook, as an observer does it."""

    def __init__(self, module: nn.Module, name: str, ends: Callable[[], Any] = lambda: (None, None)) -> None:
        self.wanted, self.words = True, []
        layer = module.get_submodule(name)
        self.finder = PoolFinder(module, {name: layer}, lambda: self.wanted and not PoolFinder.looking, ends)
        layer.register_forward_hook(lambda m, args, output: self._see(name, output))

    def _see(self, name: str, output: Any) -> None:
        if self.wanted and not PoolFinder.looking:
            self.words.append(self.finder.of(name, output).describe())


class SequenceFirst(nn.Module):
    """Runs its blocks on tokens ``(T, N, C)``, as torch's recurrent and attention layers do by default."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        made = {"attention": lambda: nn.TransformerEncoderLayer(C, 2, C), "recurrent": lambda: nn.LSTM(C, C)}
        self.embed, self.block, self.head = nn.Linear(C, C), made[kind](), nn.Linear(C, K)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.embed(x.transpose(0, 1)))
        return self.head((x[0] if isinstance(x, tuple) else x).mean(0))


@pytest.mark.parametrize("layer", ["embed", "block"])
@pytest.mark.parametrize("kind", ["attention", "recurrent"])
@pytest.mark.parametrize("number", [N, T])  # of T samples the tokens pass for samples
def test_samples_on_the_second_axis_are_refused(kind: str, layer: str, number: int) -> None:
    network = SequenceFirst(kind)
    Observed(network, layer)
    with pytest.raises(SampleAxisError, match=rf"of layer '{layer}'.* is \({T}, 2, {C}\).*second axis.*its own pool="):
        network(IMAGES[:number])


def test_samples_on_the_second_axis_are_refused_where_nothing_runs_around_the_layer() -> None:
    module = SequenceFirst("recurrent")
    Observed(module, "block")
    with pytest.raises(SampleAxisError, match="second axis, as its batch_first=False says; name another layer"):
        module.block(IMAGES.transpose(0, 1))


LAST, MEAN = f"mean of the tokens behind the first {T - 1}", "mean of the tokens"
IMAGES = torch.randn(N, T, C, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_one_second_run_tells_the_tokens_that_the_network_itself_uses(mode: Any) -> None:
    network = Tokens()
    observed = Observed(network, "blocks.1")
    with mode():
        for _ in range(3):
            network(IMAGES)
    assert observed.words == [LAST] * 3
    assert network.runs == 3 + 1


def test_the_second_run_leaves_everything_as_it_was() -> None:
    network = nn.Sequential(nn.BatchNorm1d(C), nn.Dropout(0.5), nn.Linear(C, K))
    observed, rows = Observed(network, "1"), torch.randn(N, C)
    plain = nn.Sequential(nn.BatchNorm1d(C), nn.Dropout(0.5), nn.Linear(C, K))
    plain.load_state_dict(network.state_dict())
    results = []
    for net in (plain, network):
        torch.manual_seed(0)
        results.append((net(rows), *net.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert observed.words == ["as it is"]
    assert all(part.training for part in network.modules())
    assert not PoolFinder.looking


def test_what_is_not_measured_does_not_run_again() -> None:
    network = Tokens()
    observed = Observed(network, "blocks.1")
    observed.wanted = False
    network(IMAGES)
    assert network.runs == 1
    observed.wanted = True
    network(IMAGES)
    assert (network.runs, observed.words) == (3, [LAST])


def test_the_classifiers_input_tells_the_tokens_where_the_network_returns_something_else() -> None:
    class Both(Tokens):
        def forward(self, x: Tensor) -> Any:
            x = self.blocks(x)
            return {"tokens": x.mean(1), "logits": self.head(x[:, -1])}

    blind, network = Both(), Both()
    observed = Observed(blind, "blocks.1")
    blind(IMAGES)
    assert observed.words == [MEAN]  # by the first features that are returned
    observed = Observed(network, "blocks.1", lambda: (None, network.head))
    network(IMAGES)
    assert observed.words == [LAST]


def test_a_declared_layer_tells_the_features() -> None:
    class Declared(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.penultimate = nn.Identity()

        def forward(self, x: Tensor) -> Any:
            x = self.blocks(x)
            return x.mean(1), self.penultimate(x[:, -1])

    network = Declared()
    observed = Observed(network, "blocks.1", lambda: (network.penultimate, None))
    network(IMAGES)
    assert observed.words == [LAST]


@pytest.mark.parametrize(
    ("network", "runs"),
    [
        pytest.param(lambda: Tokens(refuses=2), 2, id="refuses two samples"),
        pytest.param(lambda: Tokens(returns="all"), 2, id="ends in tokens"),
        pytest.param(lambda: _spread(Tokens()), 1, id="weights spread over processes"),
    ],
)
def test_where_no_second_run_tells_it_the_parts_do(network: Callable[[], Tokens], runs: int) -> None:
    net = network()
    observed = Observed(net, "blocks.1")
    for _ in range(2):
        net(IMAGES)
    assert observed.words == [MEAN] * 2
    assert net.runs == 2 + runs - 1
    assert not PoolFinder.looking


def _spread(network: Tokens) -> Tokens:
    network.head.weight.ds_id = 0  # as DeepSpeed marks them
    return network


def test_a_mistake_that_is_none_of_the_second_run_is_not_hidden() -> None:
    class StopError(Exception):
        pass

    class Stops(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            raise StopError

    network = Stops()
    Observed(network, "blocks.1")
    with pytest.raises(StopError):
        network(IMAGES)
    assert not PoolFinder.looking


def test_layers_that_a_step_runs_one_by_one_are_found_by_what_runs_them() -> None:
    """As in a module without a forward, whose step calls its networks."""
    module = nn.ModuleDict({"net": Tokens()})
    observed = Observed(module, "net.blocks.1")
    module["net"](IMAGES)
    assert observed.words == [LAST]
    module = nn.ModuleDict({"net": Tokens()})
    observed = Observed(module, "net.blocks.1")
    module["net"].blocks[1](IMAGES)  # nothing runs this layer but the step
    assert observed.words == [MEAN]


def test_an_output_of_another_form_is_looked_at_anew() -> None:
    network = nn.Sequential(nn.Linear(C, C), nn.Linear(C, K))
    observed = Observed(network, "0")
    network(torch.zeros(N, C))
    network(torch.zeros(N, T, C))
    assert observed.words == ["as it is", MEAN]


def test_the_second_run_logs_nothing() -> None:
    class Logs(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.logged = Tokens(), 0

        def log(self, *args: Any, **kwargs: Any) -> None:
            self.logged += 1

        def forward(self, x: Tensor) -> Tensor:
            x = self.net(x)
            self.log("mean", x.mean())
            return x

    module = Logs()
    observed = Observed(module, "net.blocks.1")
    for _ in range(2):
        module(IMAGES)
    assert (module.logged, module.net.runs) == (2, 3)
    assert observed.words == [LAST] * 2


def test_compiled_code_has_no_hooks_of_the_finder() -> None:
    torch._dynamo.reset()
    network = Tokens()
    module = nn.ModuleDict({"net": torch.compile(network, backend="eager")})
    inside = [part for part in network.modules() if part is not network]
    observed = Observed(module, "net._orig_mod.blocks.1")
    assert not any(part._forward_pre_hooks for part in (network, *inside))
    assert len(observed.finder.handles) == 2  # of the whole and of the compiled network
    module["net"](IMAGES)
    assert observed.words == [LAST]


def test_hooks_can_be_removed() -> None:
    network = Tokens()
    observed = Observed(network, "blocks.1")
    for handle in observed.finder.handles:
        handle.remove()
    network(IMAGES)
    assert network.runs == 1
    assert not network._forward_pre_hooks


def test_a_step_in_place_of_the_forward_does_not_run_again() -> None:
    """As Lightning's strategies of several processes run it; the network that it calls does."""
    module = nn.ModuleDict({"net": Tokens()})
    observed, steps = Observed(module, "net.blocks.1"), []
    module.forward = lambda x: steps.append(0) or module["net"](x)
    module(IMAGES)
    assert len(steps) == 1
    assert observed.words == [LAST]

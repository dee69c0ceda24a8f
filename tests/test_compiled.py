"""Compiled blocks: how often they are compiled, and that what they give and what hooks see is as without."""

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ncfinetune import Backbone

# Of torch's own tracing.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch", "ignore:The .grad attribute:UserWarning"
)
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet": {"name": "resnet18", "stem": "cifar", "in_chans": 1},
    "vit": {"name": "test_vit", "in_chans": 1, "img_size": 16},
}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The graphs that are compiled, by nothing, so that only their number counts."""
    made: list[str] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        made.append(str(graph.code))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield made
    torch._dynamo.reset()


def _images(count: int) -> Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("network", [pytest.param("resnet", marks=pytest.mark.slow), "vit"])
def test_a_block_is_compiled_once_for_training_and_once_for_evaluation(network: str, graphs: list[str]) -> None:
    backbone, plain = Backbone(**NETWORKS[network], compile=True), Backbone(**NETWORKS[network])
    plain.load_state_dict(backbone.state_dict())
    blocks, seen = list(backbone.layers)[:3], []
    backbone._compiled.names = blocks
    for _ in range(2):
        for training, sizes in ((True, (4, 4, 4, 3)), (False, (5, 5, 2))):
            backbone.train(training), plain.train(training)
            # As a tracker does: on every block during evaluation, gone in training.
            handles = [] if training else [backbone.layer(name).register_forward_hook(_note(seen)) for name in blocks]
            for size in sizes:
                with torch.set_grad_enabled(training):
                    torch.testing.assert_close(backbone(_images(size)), plain(_images(size)))
            for handle in handles:
                handle.remove()
    assert len(graphs) == 2 * len(blocks)
    assert len(seen) == 2 * 3 * len(blocks)
    assert all("forward" not in vars(part) for part in backbone.modules())


def _note(seen: list[Tensor]) -> Callable[..., None]:
    return lambda module, args, output: seen.append(output)


@pytest.mark.slow
def test_hooks_inside_a_block_fire_and_gradients_are_the_same(graphs: list[str]) -> None:
    backbone, images, seen = Backbone(**NETWORKS["vit"], compile=True), _images(4), []
    gradients = []
    for _ in range(3):
        backbone.zero_grad()
        backbone(images).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters()]))
    torch.testing.assert_close(gradients[2], gradients[0])
    assert len(graphs) == len(backbone.layers)
    handle = backbone.layer("blocks.1.mlp").register_forward_hook(_note(seen))
    backbone(images)
    handle.remove()
    backbone(images)
    assert len(seen) == 1
    assert len(graphs) == len(backbone.layers)


@pytest.mark.slow
def test_copies_run_their_own_weights(graphs: list[str]) -> None:
    backbone, images = Backbone(**NETWORKS["vit"], compile=True).eval(), _images(4)
    with torch.no_grad():
        before = [backbone(images) for _ in range(2)][1]
        for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
            for parameter in other.parameters():
                parameter.zero_()
            assert [other(images).abs().sum().item() for _ in range(3)] == [0, 0, 0]
        torch.testing.assert_close(backbone(images), before)

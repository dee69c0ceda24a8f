"""One vector a sample of an output, and what else is done to outputs."""

import pytest
import torch
from torch import nn

from ncfinetune.pooling import Pool, caught
from ncfinetune.tracing import few

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


def test_hooks_are_gone_after_the_context() -> None:
    layer = nn.Linear(2, 2)
    with caught({"fc": layer}, {"fc": Pool(2, 2)}) as features:
        expected = layer(torch.ones(1, 2))
    assert torch.equal(features["fc"], expected)
    assert not layer._forward_hooks


def test_few_samples_of_any_arguments() -> None:
    mask = torch.ones(3, 3)
    images, options = few((torch.ones(5, 3), {"labels": torch.arange(5), "mask": mask, "scale": torch.tensor(2.0)}))
    assert len(images) == len(options["labels"]) == 2
    assert options["mask"].shape == (3, 3)
    assert options["scale"] == 2

"""Relative error of float32 features against a float64 two-pass reference, where the usual ways fail."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

import reference
from ncfinetune.metrics import neural_collapse

Case = tuple[np.ndarray, np.ndarray, int]


def _gaussian(
    classes: int, dim: int, samples: int, std: float = 1.0, offset: float = 0.0, scales: np.ndarray | float = 1.0
) -> Case:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(samples) % classes)
    means = rng.standard_normal((classes, dim)) * scales
    features = means[labels] + std * rng.standard_normal((samples, dim)) + offset
    return features.astype(np.float32), labels, classes


def _long_tail(classes: int, dim: int, samples: int) -> Case:
    features, _, _ = _gaussian(classes, dim, samples)
    rng = np.random.default_rng(1)
    share = np.logspace(0, -2, classes)
    labels = rng.choice(classes, samples, p=share / share.sum())
    return features + 2 * rng.standard_normal((classes, dim)).astype(np.float32)[labels], labels, classes


def _two_absent(classes: int, dim: int, samples: int) -> Case:
    features, labels, _ = _gaussian(classes - 2, dim, samples)
    return features, labels + 2 * (labels > 0), classes


# Spreads of 1e-5 and 1e-4 within classes whose means are unit Gaussians.
CASES: dict[str, Callable[[int, int, int], Case]] = {
    "offset 1e3": lambda k, d, n: _gaussian(k, d, n, offset=1e3),
    "collapsed": lambda k, d, n: _gaussian(k, d, n, std=5e-5),
    "collapsed and offset": lambda k, d, n: _gaussian(k, d, n, std=5e-4, offset=1e3),
    "spectrum of means 1..1e-3": lambda k, d, n: _gaussian(k, d, n, scales=np.logspace(0, -3, d)),
    "few samples a class": lambda k, d, n: _gaussian(5 * k, d, 20 * k),
    "more classes than dimensions": lambda k, d, n: _gaussian(2 * d, d, max(n // 2, 4 * d)),
    "long tail": _long_tail,
    "two classes absent": _two_absent,
}


def _check(case: Case) -> None:
    features, labels, classes = case
    collection = neural_collapse(classes, ["nc1", "nc1_ratio", "cdnv"])
    for x, y in zip(torch.from_numpy(features).split(256), torch.from_numpy(labels).split(256), strict=True):
        collection.update(x, y)
    for name, value in collection.compute().items():
        assert value.item() == pytest.approx(getattr(reference, name)(features, labels), rel=1e-6), name


@pytest.mark.parametrize("case", CASES)
def test_small(case: str) -> None:
    _check(CASES[case](20, 48, 4_000))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_full_size(case: str) -> None:
    _check(CASES[case](100, 512, 50_000))

"""Relative error of float32 features against a float64 two-pass reference, where the usual ways fail."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import fuzz
import numpy as np
import pytest
import torch

import reference
from ncfinetune import accumulator, moment_accumulator
from ncfinetune.collapse import FAMILY, RoundingWarning, class_moments, nc1, nc1_ratio, nc1_with_error
from ncfinetune.metrics import NC1, NC1Ratio, neural_collapse
from ncfinetune.moment_accumulator import MomentAccumulator
from ncfinetune.moments import UnresolvedCollapseError
from ncfinetune.scatter import ROUNDING, add_float32_products

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
    "few samples per class": lambda k, d, n: _gaussian(5 * k, d, 20 * k),
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


def _rotated(ratio: float, samples: int, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 features whose standard deviation within classes is ``ratio`` times as large along one direction."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % 5
    means = torch.randn(5, 32, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64))[0]
    noise = torch.randn(samples, 32, generator=generator, dtype=torch.float64)
    noise[:, 0] *= ratio
    return (means[labels] + noise @ rotation + offset).float(), labels


def _streamed(features: torch.Tensor, labels: torch.Tensor, size: int = 64) -> NC1:
    metric = NC1(5)
    for x, y in zip(features.split(size), labels.split(size), strict=True):
        metric.update(x, y)
    return metric


@pytest.fixture
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulator, "ROWS", (32, 32))


@pytest.mark.usefixtures("small_buffer")
@pytest.mark.parametrize(("ratio", "narrow"), [(1, True), (1000, False), (10_000, False)])
def test_uneven_variance_is_multiplied_in_float64(ratio: float, narrow: bool) -> None:
    features, labels = _rotated(ratio, 2000)
    metric = _streamed(features, labels)
    assert metric.compute().item() == pytest.approx(reference.nc1(features.numpy(), labels.numpy()), rel=1e-6)
    assert bool(metric.plan[1]) == narrow


@pytest.mark.usefixtures("small_buffer")
@pytest.mark.parametrize("size", [1, 64])
@pytest.mark.parametrize("factor", [1e2, 1e4, 1e6])
def test_an_outlier_that_comes_first_costs_no_digits(factor: float, size: int) -> None:
    features, labels = _rotated(1, 2000)
    features[0] *= factor
    rest = labels[1:].argsort(descending=True, stable=True) + 1  # the outlier's class comes last
    order = torch.cat([torch.zeros(1, dtype=torch.int64), rest])
    expected = class_moments(features, labels, 5)
    metric = _streamed(features[order], labels[order], size)
    assert NC1Ratio._number(metric.moments()).item() == pytest.approx(nc1_ratio(expected).item(), rel=1e-9)
    try:
        value = metric.compute().item()
    except UnresolvedCollapseError:
        assert factor >= 1e6
    else:
        assert value == pytest.approx(reference.nc1(features.numpy(), labels.numpy()), rel=1e-6)


@pytest.mark.parametrize("width", [1, 32, 128])
@pytest.mark.parametrize("few", [8, 200])
def test_small_terms_are_not_lost_in_long_sums_after_large_ones(width: int, few: int) -> None:
    """The first rows of each buffer are far larger: float32 sums round the others away, all in one direction."""
    errors = []
    for seed in range(3):
        generator, labels = torch.Generator().manual_seed(seed), torch.arange(4096) % 2
        features = torch.randn(len(labels), width, generator=generator, dtype=torch.float64)
        features[torch.arange(len(labels)) % 2048 < few] *= 3000
        features[:, 0] += 3e4 * labels
        metric = NC1(2)
        metric.update(features.float(), labels)
        errors.append(metric.compute().item() / reference.nc1(features.float().numpy(), labels.numpy()) - 1)
    assert np.abs(errors).max() < 2e-7, errors


def test_features_that_float32_cannot_sum_are_multiplied_in_float64_and_the_others_are_not() -> None:
    z = torch.randn(2048, 200, generator=torch.Generator().manual_seed(0))
    z[:8, 70:90] *= 3000
    before = torch.randn(200, 200, dtype=torch.float64)
    upper, rounding = before.clone(), torch.zeros(200, dtype=torch.float64)
    exact = z.double().T @ z.double()
    assert not add_float32_products(upper, rounding, z, exact.diagonal())
    sizes = exact.diagonal().sqrt()
    errors = ((upper - before - exact) / sizes / sizes[:, None]).abs() / ROUNDING[torch.float32]
    assert errors.diagonal().max() < 1e-6
    assert errors[70:90, 70:].max() < 1e-6
    assert 0.1 < errors[:60].max() < 12
    assert upper[150, 70] == before[150, 70]  # below the diagonal nothing is added


@pytest.mark.parametrize("width", [32, 72, 127, 130, 200, 520, 770])
def test_products_of_even_features_are_exact_enough_in_float32(width: int) -> None:
    z = torch.randn(2048, width, generator=torch.Generator().manual_seed(0))
    exact = z.double().T @ z.double()
    upper, rounding = torch.zeros_like(exact), torch.zeros_like(exact.diagonal())
    assert add_float32_products(upper, rounding, z, exact.diagonal())
    assert torch.allclose(upper.diagonal(), exact.diagonal(), rtol=1e-14)
    assert (rounding / exact.diagonal() / ROUNDING[torch.float32]).max() < 2


@pytest.mark.parametrize(("width", "rows"), [(128, 2048), (512, 300), (512, 2048)])
def test_one_feature_with_most_of_a_blocks_variance_does_not_decide_the_precision(width: int, rows: int) -> None:
    for seed in range(10):
        z = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
        z[:, ::64] *= 300
        squares = z.double().square().sum(0)
        upper = torch.zeros(width, width, dtype=torch.float64)
        assert add_float32_products(upper, torch.zeros_like(squares), z, squares)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [70, 200, 520, 770])
def test_entries_below_the_diagonal_are_not_used(width: int, dtype: torch.dtype) -> None:
    """So that how products are divided into blocks is no part of a state."""
    features, labels, classes = _gaussian(3, width, 2100)
    accumulated = MomentAccumulator(classes)
    accumulated.update(torch.from_numpy(features).to(dtype), torch.from_numpy(labels))
    accumulated.flush()
    below = torch.ones(width, width, dtype=torch.bool).tril(-1)
    accumulated.scatter = accumulated.scatter.masked_fill(below, torch.nan)
    moments = accumulated.moments()
    exact = class_moments(torch.from_numpy(features), torch.from_numpy(labels), classes)
    assert nc1(moments).item() == pytest.approx(nc1(exact).item(), rel=1e-6)
    torch.testing.assert_close(moments.within, moments.within.T, rtol=1e-12, atol=1e-12)
    error = (1e-6 if dtype == torch.float32 else 1e-12) * float(exact.within.diagonal().max())
    torch.testing.assert_close(moments.within, exact.within, rtol=0, atol=error)


def test_a_block_of_features_that_do_not_vary_has_no_error() -> None:
    generator, labels = torch.Generator().manual_seed(0), torch.arange(4096) % 3
    features = torch.zeros(len(labels), 300)
    features[:, :100] = torch.randn(len(labels), 100, generator=generator) + labels[:, None]
    accumulated = MomentAccumulator(3)
    accumulated.update(features, labels)
    assert accumulated.plan[1] == 1
    value, error = nc1_with_error(accumulated.moments(within=False))
    assert value.item() == pytest.approx(reference.nc1(features.numpy(), labels.numpy()), rel=1e-7)
    assert error < 1e-6


@pytest.mark.usefixtures("small_buffer")
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e22, 1e30])
def test_squares_that_float32_does_not_have(scale: float) -> None:
    features, labels = _rotated(3, 1000)
    value = _streamed(features * scale, labels).compute().item()
    scaled = (features * scale).double().numpy() / scale
    assert value == pytest.approx(reference.nc1(scaled, labels.numpy()), rel=1e-6)


@pytest.mark.usefixtures("small_buffer")
@pytest.mark.parametrize("size", [1e2, 1e7, 1e9])
def test_what_rounding_hides_is_told_or_refused_by_name(size: float) -> None:
    """Features vary widely in a direction in which the class means do not differ at all."""
    features, labels = _rotated(1, 400)
    wide = torch.linalg.qr(torch.randn(32, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    sign = 1 - 2 * (torch.arange(400) // 5 % 2)
    features = features.double() - features.double() @ wide @ wide.T + size * sign[:, None] * wide.T
    metric = _streamed(features, labels)
    if size == 1e9:
        with pytest.raises(
            UnresolvedCollapseError, match=r"nc1 by 2% of it at most, and it may .*; leave out outliers"
        ):
            metric.compute()
        return
    told = pytest.warns(RoundingWarning, match=r"rounding may have moved nc1 by up to \de-0\d of it: the features vary")
    with told if size == 1e7 else nullcontext():
        value = metric.compute().item()
    expected = reference.nc1(features.numpy(), labels.numpy())
    assert value == pytest.approx(expected, rel=1e-6 if size == 1e2 else 1e-2)


def test_a_told_error_bounds_the_true_one() -> None:
    """Class means and samples of ten features that nearly lie in nine dimensions, as tiny networks have them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(180) % 10
    scales = torch.logspace(0, -6.5, 10, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=torch.float64))[0]
    features = torch.randn(10, 10, generator=generator, dtype=torch.float64)[labels]
    features = (features + torch.randn(180, 10, generator=generator, dtype=torch.float64)) * scales @ rotation
    value, error = nc1_with_error(class_moments(features, labels, 10))
    x, y = features.numpy().astype(np.longdouble), labels.numpy()
    means = np.stack([x[y == label].mean(0) for label in range(10)])
    expected = float(fuzz.nc1(means - means.mean(0), x - means[y]))
    assert 1e-6 < error < 1e-2
    assert value.item() == pytest.approx(expected, rel=error)


@pytest.mark.parametrize("width", [6, 12])
def test_small_singular_values_of_the_means_are_as_exact_as_large_ones(width: int) -> None:
    """A Gram matrix alone has 1e-4 of the smallest."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    scales = torch.logspace(0, -6, 6, dtype=torch.float64)
    labels = torch.arange(700) % 7
    means = torch.randn(7, 6, generator=generator, dtype=torch.float64) * scales
    noise = 1e-6 * torch.randn(700, 6, generator=generator, dtype=torch.float64)
    features = torch.nn.functional.pad(means[labels] + noise, (0, width - 6)) @ rotation
    value = nc1(class_moments(features, labels, 7)).item()
    assert value == pytest.approx(reference.nc1(features.numpy(), labels.numpy()), rel=1e-6)


@pytest.mark.parametrize("spread", [1e-6, 1e-8, 1e-10])
def test_merged_parts_are_exact_below_the_rounding_of_their_means(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 5
    noise = torch.randn(400, 8, generator=generator, dtype=torch.float64)
    features = torch.randn(5, 8, generator=generator, dtype=torch.float64)[labels] + 1e3 + spread * noise
    whole, *parts = (MomentAccumulator(5) for _ in range(5))
    whole.update(features, labels)
    for part, rows, own in zip(parts, features.chunk(4), labels.chunk(4), strict=True):
        part.update(rows, own)
    parts[0].merge(parts[1:])
    merged = parts[0].moments(within=False)
    assert nc1(merged) == pytest.approx(float(nc1(whole.moments(within=False))), rel=1e-11)
    assert nc1_ratio(merged) == pytest.approx(float(nc1_ratio(whole.moments(within=False))), rel=1e-11)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("classes", "width"), [(4, 8), (12, 3)])
def test_weak_directions_keep_nothing_of_the_strong_ones(classes: int, width: int, seed: int) -> None:
    """Class means that vary ten million times less in one direction than in those along which samples vary."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(400) % classes
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    scales = torch.tensor([1, 0.01, 1e-7] + [0] * (width - 3), dtype=torch.float64)
    means = torch.randn(classes, width, generator=generator, dtype=torch.float64) * scales
    noise = torch.randn(400, width, generator=generator, dtype=torch.float64)
    noise = noise - torch.stack([noise[labels == label].mean(0) for label in range(classes)])[labels]
    noise[:, 2:] *= 1e-7
    features = (means[labels] + noise) @ rotation
    x, y = features.numpy().astype(np.longdouble), labels.numpy()
    centres = np.stack([x[y == label].mean(0) for label in range(classes)])
    expected = float(fuzz.nc1(centres - centres.mean(0), x - centres[y]))
    value, error = nc1_with_error(class_moments(features, labels, classes))
    assert error < 2e-3
    assert value.item() == pytest.approx(expected, rel=error)


def _true(features: torch.Tensor, labels: torch.Tensor) -> float:
    """NC1 in long double."""
    x, y = features.double().numpy().astype(np.longdouble), labels.numpy()
    means = np.stack([x[y == label].mean(0) for label in range(int(labels.max()) + 1)])
    return float(fuzz.nc1(means - means.mean(0), x - means[y]))


def _balanced(scale: float, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One feature separates two classes, and another, far larger, has equal class means and goes along with it."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(samples // 2, generator=generator)
    labels = (torch.arange(samples // 2) % 2).repeat(2)
    along = torch.cat([half, -half])
    order = torch.randperm(samples, generator=generator)
    return torch.stack([scale * along, 1.0 - 2 * labels + along], 1)[order], labels[order]


def _of_one_factor(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All features are one large factor but for a millionth of it; the sums of their products are long."""
    generator = torch.Generator().manual_seed(1)
    half = 1e4 * torch.randn(samples // 2, generator=generator, dtype=torch.float64)
    labels = (torch.arange(samples // 2) % 4).repeat(2)
    small = torch.randn(4, 16, generator=generator, dtype=torch.float64)[labels]
    small += 0.01 * torch.randn(samples, 16, generator=generator, dtype=torch.float64)
    features = small - small.mean(1, keepdim=True) + torch.cat([half, -half])[:, None]
    order = torch.randperm(samples, generator=generator)
    return features[order], labels[order]


def _far_and_close() -> tuple[torch.Tensor, torch.Tensor]:
    """Class means that differ by little where they lie far from the origin."""
    generator, labels = torch.Generator().manual_seed(0), torch.arange(60) % 2
    step = (1.0 - 2 * labels)[:, None].double() * torch.tensor([2e-5, 6e-6], dtype=torch.float64)
    return 1e8 + step + 1.5e-7 * torch.randn(60, 2, generator=generator, dtype=torch.float64), labels


def _far_without_variance() -> tuple[torch.Tensor, torch.Tensor]:
    """A feature that hardly varies within classes lies far from the origin, another varies."""
    generator, labels = torch.Generator().manual_seed(5), torch.arange(12) % 3
    features = torch.randn(3, 2, generator=generator, dtype=torch.float64)[labels] * 1e-3
    features[:, 0] += 1e8
    features[9:, 0] += torch.tensor([1, 0, 1]) * 2.0**-26
    features[:, 1] += 1e-2 * torch.randn(12, generator=generator, dtype=torch.float64)
    return features, labels


def _repeated(times: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two features, repeated."""
    generator, labels = torch.Generator().manual_seed(0), torch.arange(4096) % 2
    two = torch.randn(4096, 2, generator=generator) + torch.tensor([1.0, 0.2]) * (labels[:, None] * 2 - 1)
    two[:, 1] += 3 * two[:, 0]
    return two.repeat(1, times), labels


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(partial(_balanced, 1e4, 4000), id="balanced 1e4"),
        pytest.param(partial(_balanced, 1e6, 4000), id="balanced 1e6"),
        pytest.param(partial(_balanced, 1e6, 200_000), id="balanced, many"),
        pytest.param(partial(_of_one_factor, 48_000), id="one factor"),
        pytest.param(_far_and_close, id="far and close"),
        pytest.param(_far_without_variance, id="far without variance"),
        pytest.param(partial(_repeated, 128), id="repeated"),
    ],
)
def test_the_stated_error_is_not_exceeded(case: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> None:
    features, labels = case()
    true, classes = _true(features, labels), int(labels.max()) + 1
    accumulated = MomentAccumulator(classes)
    for rows, own in zip(features.split(1000), labels.split(1000), strict=True):
        accumulated.update(rows, own)
    dense = class_moments(features, labels, classes)
    for moments in (accumulated.moments(within=False), accumulated.moments(), dense, dense.to("cpu")):
        value, stated = nc1_with_error(moments)
        assert abs(value.item() - true) <= max(stated, 1e-6) * abs(true)


def test_the_error_of_products_does_not_grow_with_their_number() -> None:
    features, labels = _of_one_factor(48_000)
    true = _true(features, labels)
    for moments in (class_moments(features, labels, 4), _accumulated(features, labels, 4).moments(within=False)):
        assert nc1_with_error(moments)[0].item() == pytest.approx(true, rel=5e-4)  # 6e-3 if they are summed on and on


def _accumulated(features: torch.Tensor, labels: torch.Tensor, classes: int) -> MomentAccumulator:
    accumulated = MomentAccumulator(classes)
    accumulated.update(features, labels)
    return accumulated


def test_accumulators_of_two_kinds_do_not_merge() -> None:
    features, labels = _rotated(1, 40)
    first, second = MomentAccumulator(5), MomentAccumulator(5, scatter=False)
    for one in (first, second):
        one.update(features, labels)
    with pytest.raises(
        ValueError, match="expected accumulators of one kind to merge, got some with scatter and some w"
    ):
        first.merge([second])


def test_a_sample_without_a_label_may_have_features_that_are_not_finite() -> None:
    accumulated = MomentAccumulator(2, ignore_index=-1)
    accumulated.update(torch.tensor([[torch.nan], [1.0], [2.0]]), torch.tensor([-1, 0, 1]))
    accumulated.check("features")
    assert accumulated.moments().mean.flatten().tolist() == [1, 2]


def test_what_each_merged_part_left_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (accumulator, moment_accumulator):
        monkeypatch.setattr(module, "may_look", lambda tensor: False)  # as on an accelerator
    first, second = MomentAccumulator(2), MomentAccumulator(2)
    first.update(torch.ones(2, 3), torch.tensor([0, 1]))
    second.update(torch.ones(3, 3), torch.tensor([0, 7, 1]))
    first.merge([second])
    with pytest.raises(ValueError, match=r"features: expected labels in 0..1 .*, got 1 of 5 samples with labels out"):
        first.check("features")


def test_an_error_above_a_millionth_is_warned_of() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, scales = torch.arange(180) % 10, torch.logspace(0, -5.8, 10, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=torch.float64))[0]
    features = torch.randn(10, 10, generator=generator, dtype=torch.float64)[labels]
    features = (features + torch.randn(180, 10, generator=generator, dtype=torch.float64)) * scales @ rotation
    moments = class_moments(features, labels, 10)
    assert nc1_with_error(moments)[1] == pytest.approx(1e-5, rel=0.8)
    with pytest.warns(RoundingWarning, match=r"rounding may have moved nc1 by up to \de-0[56] of it"):
        nc1(moments)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("offset", [1e8, 1e12])
def test_class_means_far_from_the_origin_keep_their_differences(offset: float, parts: int) -> None:
    """They are close to each other: differences of the means themselves would have seven digits, or three."""
    generator, labels = torch.Generator().manual_seed(0), torch.arange(90) % 3
    near = torch.randn(3, 4, generator=generator, dtype=torch.float64)[labels]
    near += 0.3 * torch.randn(90, 4, generator=generator, dtype=torch.float64)
    features = offset + near * offset * 1e-8
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    order = list(torch.randperm(90, generator=generator).chunk(parts))
    case = fuzz.Input("far", 3, features, labels, weight, order, 20, 40)
    true, found = fuzz.expected(case), fuzz.measure(case)
    dense = class_moments(features, labels, 3)
    for name in FAMILY:
        value, _ = found[name]
        assert value == pytest.approx(true[name], rel=1e-9), name
        for moments in (dense, dense.to("cpu")):
            assert FAMILY[name](moments).item() == pytest.approx(true[name], rel=1e-9), name

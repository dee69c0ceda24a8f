"""Collapse numbers against closed forms and against the slow reference."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

import reference
from ncfinetune import collapse
from ncfinetune.collapse import class_moments, merge

K, D, NORM, SPREAD = 10, 24, 3.0, 0.5


def _etf_means(classes: int = K, dim: int = D) -> torch.Tensor:
    """A simplex ETF of norm 3: the centred unit vectors, rescaled."""
    unit = torch.eye(classes, dim, dtype=torch.float64) - torch.eye(classes, dim, dtype=torch.float64).mean(0)
    return NORM * unit / unit.norm(dim=1, keepdim=True)


def _isotropic(means: torch.Tensor, spread: float = SPREAD) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples with exactly these class means and exactly ``Sigma_W = spread^2 I``: mean +- spread sqrt(d) e_j."""
    dim = means.shape[1]
    steps = spread * math.sqrt(dim) * torch.cat([torch.eye(dim), -torch.eye(dim)]).double()
    features = (means[:, None] + steps).reshape(-1, dim)
    return features, torch.arange(len(means)).repeat_interleave(2 * dim)


DESIGNS = {
    "simplex ETF": (
        _etf_means(),
        {"nc1": SPREAD**2 * (K - 1) ** 2 / (K * NORM**2), "nc1_ratio": SPREAD**2 * D / NORM**2, "cdnv": 0.3,
         "equinorm": 0.0, "equiangularity": 0.0, "etf_distance": 0.0},
    ),
    "orthogonal": (
        NORM * torch.eye(K, D, dtype=torch.float64),
        {"nc1": 0.25, "cdnv": 1 / 3, "equinorm": 0.0, "etf_distance": 0.0},
    ),
    "two classes": (
        torch.tensor([[NORM, 0.0], [-NORM, 0.0]], dtype=torch.float64),
        {"nc1": SPREAD**2 / (2 * NORM**2), "cdnv": SPREAD**2 * 2 / (4 * NORM**2)},
    ),
    "triangle": (
        torch.tensor([[2.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64),
        {"nc1": 1 / 6, "nc1_ratio": 0.1875, "cdnv": 0.075},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("design", "name", "expected"),
    [(design, name, value) for design, (_, values) in DESIGNS.items() for name, value in values.items()],
)
def test_closed_forms(design: str, name: str, expected: float) -> None:
    features, labels = _isotropic(DESIGNS[design][0])
    moments = class_moments(features, labels, len(DESIGNS[design][0]))
    assert getattr(collapse, name)(moments).item() == pytest.approx(expected, abs=1e-10)


def test_one_dimension() -> None:
    features = torch.tensor([[0.0], [2.0], [4.0], [10.0], [12.0]])
    moments = class_moments(features, torch.tensor([0, 0, 0, 1, 1]), 2)
    assert collapse.nc1(moments).item() == pytest.approx((10 / 5) / 20.25 / 2, abs=1e-12)
    assert collapse.nc1(moments).item() == pytest.approx(0.0493827, abs=1e-7)
    assert collapse.cdnv(moments).item() == pytest.approx(0.0226337, abs=1e-7)


@pytest.mark.parametrize(("factor", "expected"), [(2.0, 0.0), (-1.0, 4.0)])
def test_self_duality_of_parallel_and_opposed_weights(factor: float, expected: float) -> None:
    features, labels = _isotropic(_etf_means())
    moments = class_moments(features, labels, K)
    assert collapse.self_duality(moments, factor * _etf_means()).item() == pytest.approx(expected, abs=1e-10)


def test_self_duality_is_smooth_at_its_least() -> None:
    features, labels = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3
    moments = class_moments(features, labels, 3)
    curvature = torch.autograd.functional.hessian(lambda w: collapse.self_duality(moments, w), moments.centred)
    assert curvature.isfinite().all()
    assert torch.linalg.eigvalsh(curvature.reshape(15, 15)).min() > -1e-12


def test_self_duality_of_orthogonal_weights() -> None:
    features, labels = _isotropic(_etf_means())
    weight = torch.zeros(K, D, dtype=torch.float64)
    weight[:, -1] = 1  # the means have nothing in the last coordinate
    moments = class_moments(features, labels, K)
    assert collapse.self_duality(moments, weight).item() == pytest.approx(2, abs=1e-10)


def test_self_duality_by_structure_is_zero_for_parallel_weights() -> None:
    features, labels = _isotropic(_etf_means())
    moments = class_moments(features, labels, K)
    assert collapse.self_duality_structure(moments, _etf_means()).item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("classes", [2, K])
def test_self_duality_by_structure_is_two_for_opposed_weights(classes: int) -> None:
    features, labels = _isotropic(_etf_means(classes))
    moments = class_moments(features, labels, classes)
    assert collapse.self_duality_structure(moments, -_etf_means(classes)).item() == pytest.approx(2, abs=1e-10)


@pytest.mark.parametrize("name", ["nc1", "nc1_ratio", "cdnv", "equinorm", "equiangularity", "etf_distance"])
@pytest.mark.parametrize(("classes", "dim"), [(5, 16), (40, 8), (2, 3)])
def test_against_the_reference(name: str, classes: int, dim: int) -> None:
    labels = torch.randint(0, classes, (600,))
    features = torch.randn(600, dim, dtype=torch.float64) + torch.randn(classes, dim, dtype=torch.float64)[labels]
    value = getattr(collapse, name)(class_moments(features, labels, classes)).item()
    assert value == pytest.approx(getattr(reference, name)(features.numpy(), labels.numpy()), rel=1e-10)


@pytest.mark.parametrize("name", ["nc1", "nc1_ratio", "cdnv", "equinorm", "equiangularity", "etf_distance"])
def test_numbers_can_be_differentiated(name: str) -> None:
    features = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    number = getattr(collapse, name)
    assert torch.autograd.gradcheck(lambda h: number(collapse.class_moments(h, torch.arange(12) % 3, 3)), features)


@pytest.mark.parametrize("number", [collapse.self_duality, collapse.self_duality_structure])
def test_self_duality_can_be_differentiated_by_both(number: Callable[..., torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 5, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(3, 5, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.arange(12) % 3
    assert torch.autograd.gradcheck(lambda h, w: number(collapse.class_moments(h, labels, 3), w), (features, weight))


def test_between_and_within_are_the_covariances() -> None:
    labels = torch.randint(0, 5, (200,))
    features = torch.randn(200, 7, dtype=torch.float64)
    moments = class_moments(features, labels, 5)
    np.testing.assert_allclose(moments.between, reference.sigma_b(features.numpy(), labels.numpy()), atol=1e-12)
    np.testing.assert_allclose(moments.within, reference.sigma_w(features.numpy(), labels.numpy()), atol=1e-12)


def test_merge_is_exact_and_knows_absent_classes() -> None:
    labels = torch.randint(0, 6, (300,)).sort().values  # most classes lie in one part only
    features = torch.randn(300, 5, dtype=torch.float64) + 1e3
    whole = class_moments(features, labels, 6)
    merged = merge(class_moments(features[:130], labels[:130], 6), class_moments(features[130:], labels[130:], 6))
    empty = class_moments(features[:0], labels[:0], 6)
    for both in (merged, merge(merged, empty), merge(empty, merged)):
        for name in ("count", "mean", "variance", "within"):
            torch.testing.assert_close(getattr(both, name), getattr(whole, name), rtol=1e-11, atol=1e-12)


def test_absent_classes_are_left_out() -> None:
    features, labels = _isotropic(_etf_means())
    full = class_moments(features, labels, K)
    wider = class_moments(features, labels * 2, 2 * K)
    for name in ("nc1", "nc1_ratio", "cdnv", "equinorm", "equiangularity", "etf_distance"):
        function = getattr(collapse, name)
        assert function(wider).item() == pytest.approx(function(full).item(), abs=1e-12)


def test_exact_collapse_is_zero() -> None:
    means = torch.randn(4, 6, dtype=torch.float64)
    labels = torch.arange(4).repeat(3)
    moments = class_moments(means[labels], labels, 4)
    assert collapse.nc1(moments).item() == pytest.approx(0, abs=1e-25)
    assert collapse.cdnv(moments).item() == pytest.approx(0, abs=1e-25)


def test_coinciding_class_means_have_no_nc1() -> None:
    moments = class_moments(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]), 2)
    assert collapse.nc1(moments).isnan()


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_class_means_that_agree_to_rounding_coincide(offset: float) -> None:
    values = torch.tensor([0.1, 0.2, 0.3, 0.7], dtype=torch.float64)[:, None].expand(4, 3) + offset
    features = torch.cat([values, values.flip(0), values.roll(1, 0)])
    moments = class_moments(features, torch.arange(3).repeat_interleave(4), 3)
    assert all(not number(moments).isfinite() for number in collapse.FAMILY.values())


def test_one_class_is_an_error() -> None:
    moments = class_moments(torch.randn(4, 3), torch.zeros(4, dtype=torch.long), 2)
    with pytest.raises(ValueError, match="expected samples of at least two classes, got 1: collapse is undefined"):
        collapse.nc1(moments)


def test_cdnv_matrix_is_symmetric_and_its_mean_is_cdnv() -> None:
    labels = torch.tensor([0, 0, 1, 1, 3, 3])
    moments = class_moments(torch.randn(6, 3), labels, 4)
    matrix = collapse.cdnv_matrix(moments)
    assert matrix[2].isnan().all()
    assert matrix.diagonal().isnan().all()
    torch.testing.assert_close(matrix, matrix.T, equal_nan=True)
    assert matrix.nanmean().item() == pytest.approx(collapse.cdnv(moments).item())


def test_nearest_mean_survives_an_offset() -> None:
    labels = torch.arange(3).repeat(20)
    features = torch.eye(3)[labels] + 0.1 * torch.randn(60, 3)
    moments = class_moments(features + 1e3, labels * 2, 6)
    assert torch.equal(collapse.nearest_mean(features + 1e3, moments), labels * 2)


def test_disagreement_depends_on_the_bias() -> None:
    features = torch.tensor([[1.0], [2.0], [9.0], [10.0]])
    moments = class_moments(features, torch.tensor([0, 0, 1, 1]), 2)
    weight, bias = torch.tensor([[-1.0], [1.0]]), torch.tensor([5.5, -5.5])
    assert collapse.disagreement(features, moments, weight, bias).item() == 0
    assert collapse.disagreement(features, moments, weight).item() == 0.5


def test_numerical_rank() -> None:
    labels = torch.tensor([0, 0, 0, 2, 2])
    features = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [2, 2, 2]])
    assert collapse.numerical_rank(features, labels, 3).item() == pytest.approx((6 / 4 + 1) / 2)
    assert collapse.numerical_rank(features, labels, 3, centred=True).item() > 1


def test_numerical_rank_about_the_class_means() -> None:
    steps = torch.tensor([[2.0, 0], [-2, 0], [0, 1], [0, -1], [1, 0], [-1, 0], [0, 1], [0, -1]])
    labels = torch.arange(2).repeat_interleave(4)
    features = steps + torch.tensor([[5.0, 7], [-3, 1]])[labels]
    assert collapse.numerical_rank(features, labels, 2, centred=True).item() == pytest.approx((10 / 8 + 4 / 2) / 2)


@pytest.mark.parametrize("gap", [1e-4, 1e-6])
def test_cdnv_of_class_means_that_nearly_coincide(gap: float) -> None:
    """Two classes a small gap apart and one far away, each of two points at distance 1 from its mean."""
    means = torch.tensor([[1.0, 0, 0], [1.0, gap, 0], [-5, 2, 0]], dtype=torch.float64)
    offsets = torch.tensor([[0, 0, 1.0], [0, 0, -1.0]], dtype=torch.float64)
    features, labels = (means[:, None] + offsets).reshape(6, 3), torch.arange(3).repeat_interleave(2)
    matrix = collapse.cdnv_matrix(collapse.class_moments(features, labels, 3))
    assert matrix[0, 1].item() == pytest.approx(gap**-2, rel=1e-15 / gap)  # as far as float64 has the gap
    assert matrix[0, 2].item() == pytest.approx(1 / (36 + 4), rel=1e-12)

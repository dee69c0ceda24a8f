"""Scores of transferability against closed forms and against slow references that share no code with them."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from ncfinetune.transferability import h_score, knn_accuracy, logme


def made(samples=40, width=5, classes=3, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    means = 2 * torch.randn(classes, width, generator=generator)
    return means[labels] + spread * torch.randn(samples, width, generator=generator), labels


def isotropic_simplex(classes=10, width=24, norm=3.0, deviation=0.5):
    """Class means on a simplex and, around each, points whose covariance is a multiple of the identity."""
    corners = torch.eye(classes, width, dtype=torch.float64)
    corners -= corners[:classes].mean(0)
    corners *= norm / corners[0].norm()
    around = deviation * width**0.5 * torch.cat([torch.eye(width), -torch.eye(width)]).double()
    return (corners[:, None] + around).flatten(0, 1), torch.arange(classes).repeat_interleave(2 * width)


def test_h_score_of_a_simplex_is_the_closed_form():
    features, labels = isotropic_simplex()
    between = 3.0**2 / 9
    assert h_score(features + 1e3, labels, 10).item() == pytest.approx(9 * between / (between + 0.25), rel=1e-9)


def test_h_score_is_a_trace_of_two_covariances():
    features, labels = made()
    x = features.double().numpy()
    means = np.stack([x[labels.numpy() == k].mean(0) for k in labels])
    total, between = (np.cov(rows.T, bias=True) for rows in (x, means))
    assert h_score(features, labels, 4).item() == pytest.approx(np.trace(np.linalg.pinv(total) @ between), rel=1e-9)


def test_h_score_leaves_out_directions_without_variance():
    features, labels = made()
    wider = torch.cat([features, features[:, :2].double() * 3, torch.ones(len(features), 1)], 1)
    assert h_score(wider, labels, 3).item() == pytest.approx(h_score(features, labels, 3).item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(40, 5), (12, 30)])
def test_logme_is_the_highest_evidence_a_sample(shape):
    features, labels = made(*shape)
    x, evidences = features.double().numpy(), []
    for k in range(3):
        y = (labels.numpy() == k).astype(float)

        def cost(logs, y=y):
            covariance = x @ x.T * np.exp(-logs[0]) + np.eye(len(x)) * np.exp(-logs[1])
            return -multivariate_normal.logpdf(y, cov=covariance)

        found = minimize(
            cost, [1.0, 1.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}
        )
        evidences.append(-found.fun / len(x))
    assert logme(features, labels, 3).item() == pytest.approx(np.mean(evidences), rel=1e-7)


def test_logme_leaves_out_classes_without_samples():
    features, labels = made()
    assert logme(features, labels * 2, 7).item() == pytest.approx(logme(features, labels, 3).item(), rel=1e-12)


def test_logme_of_features_that_are_the_targets_is_far_above_that_of_noisy_ones():
    labels = torch.arange(30) % 3
    noisy = torch.eye(3)[labels] + 0.01 * torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    assert logme(noisy, labels, 3).item() + 3 < logme(torch.eye(3)[labels], labels, 3).item() < torch.inf


def test_logme_of_features_that_explain_nothing_is_that_of_noise():
    labels = torch.arange(30) % 3
    power = 1 / 3  # mean square of a one-hot target
    noise = -0.5 * (math.log(2 * math.pi * power) + 1)
    assert logme(torch.zeros(30, 4), labels, 3).item() == pytest.approx(noise, rel=1e-9)
    offset = torch.full((30, 1), 1e-9)
    across = torch.cat([offset, -offset]).repeat(1, 2)
    assert logme(across, labels.repeat(2), 3).item() == pytest.approx(noise, rel=1e-9)


@pytest.mark.parametrize("neighbours", [1, 5, 200])
def test_knn_is_a_weighted_vote_of_the_nearest_others(neighbours):
    features, labels = made(spread=3.0)
    rows = (features / features.norm(dim=1, keepdim=True)).double()
    right = 0
    for i, row in enumerate(rows):
        cosines = {j: float(row @ other) for j, other in enumerate(rows) if j != i}
        nearest = sorted(cosines, key=lambda j: -cosines[j])[:neighbours]
        votes = [sum(np.exp(cosines[j] / 0.07) for j in nearest if labels[j] == k) for k in range(3)]
        right += int(np.argmax(votes)) == int(labels[i])
    assert 0 < right < len(rows)
    assert knn_accuracy(features, labels, 3, neighbours).item() == pytest.approx(right / len(rows), abs=1e-12)


def test_knn_decides_ties_wrongly():
    assert knn_accuracy(torch.ones(6, 2), torch.arange(6) % 2, 2).item() == 0


@pytest.mark.parametrize("offset", [0, 100])
def test_h_score_leaves_out_directions_that_are_rounding(offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 5
    features = torch.randn(5, 2, generator=generator, dtype=torch.float64)[labels] + offset
    features = features + torch.randn(200, 2, generator=generator, dtype=torch.float64)
    turned = features @ torch.linalg.qr(torch.randn(8, 2, generator=generator, dtype=torch.float64))[0].T
    assert h_score(turned.float(), labels, 5).item() == pytest.approx(h_score(features, labels, 5).item(), rel=1e-4)


@pytest.mark.parametrize("score", [h_score, logme, knn_accuracy])
@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.ones(4), torch.zeros(4), r"expected features \(N, d\) and labels \(N,\), got \(4,\) and \(4,\)"),
        (torch.ones(2, 2), torch.tensor([0, 3]), "expected labels from 0 to num_classes - 1 = 2, got 0 to 3"),
        (torch.tensor([[1.0], [torch.nan]]), torch.tensor([0, 1]), "expected finite features, got nan or inf"),
    ],
)
def test_bad_input_is_refused(score, features, labels, message):
    with pytest.raises(ValueError, match=message):
        score(features, labels, 3)


def test_knn_needs_neighbours():
    with pytest.raises(ValueError, match="expected at least one neighbour and two samples, got neighbours=0 and 4"):
        knn_accuracy(torch.eye(4), torch.arange(4) % 2, 2, neighbours=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("constant", [1e3, 1e4, 1e8])
def test_h_score_is_not_changed_by_a_constant_feature(dtype, constant):
    generator, labels = torch.Generator().manual_seed(0), torch.arange(600) % 4
    features = torch.randn(600, 24, generator=generator) + 2 * torch.randn(4, 24, generator=generator)[labels]
    features = features.to(dtype)
    more = torch.cat([features, torch.full((600, 1), constant, dtype=dtype)], 1)
    torch.testing.assert_close(h_score(more, labels, 4), h_score(features, labels, 4))


def test_h_score_keeps_weak_directions_of_bfloat16():
    """Features of a falling scale, each of which is rounded at its own: a common cut loses 19 % of the score."""
    generator, labels = torch.Generator().manual_seed(0), torch.arange(4000) % 10
    features = torch.randn(4000, 256, generator=generator, dtype=torch.float64)
    features += torch.randn(10, 256, generator=generator, dtype=torch.float64)[labels]
    features *= torch.arange(1, 257) ** -2.0
    exact = h_score(features, labels, 10)
    assert h_score(features.bfloat16(), labels, 10).item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(200, 512, 10), (300, 64, 10), (100, 7, 5)])
def test_logme_does_not_depend_on_the_scale_of_features_with_an_offset(shape):
    number, width, classes = shape
    labels = torch.arange(number) % classes
    rows = torch.randn(number, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 30
    found = [logme(rows * scale, labels, classes).item() for scale in (1e-6, 1e-3, 1, 1e3)]
    assert found == pytest.approx([found[0]] * 4, rel=1e-6)
    targets = torch.nn.functional.one_hot(labels, classes).double()
    squared, vectors = torch.linalg.eigh(rows @ rows.T)
    squared, loads = squared.clamp(min=0)[:, None], (vectors.T @ targets).square()
    grid = []
    for ratio in torch.logspace(-6, 10, 1601, dtype=torch.float64):
        energy = (loads / (squared + ratio)).sum(0)
        spread = (squared + ratio).log().sum(0)
        grid.append(number * ((number / (2 * math.pi * energy)).log() - 1) - spread)
    assert found[2] >= (torch.stack(grid).amax(0) / (2 * number)).mean().item() - 1e-6


@pytest.mark.parametrize("scale", [1e-200, 1e-20, 1e200])
def test_knn_does_not_depend_on_the_scale_of_features(scale):
    rows, labels = (
        torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
        torch.arange(50) % 3,
    )
    assert knn_accuracy(rows * scale, labels, 3) == knn_accuracy(rows, labels, 3)

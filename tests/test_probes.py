"""Closed-form heads against refits without each sample, scikit-learn, and what can be said beforehand."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from held_out import held_out_scores, held_out_temperature
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge, RidgeCV
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ncfinetune import closed_forms, folds
from ncfinetune.calibration import fit_temperature
from ncfinetune.probes import Head, decided_rightly, lda, nearest_mean, nearest_simplex, ridge, simplex_etf

FITS: dict[str, Callable[..., Head]] = {"ridge": ridge, "lda": lda, "nearest_mean": nearest_mean}
# N, d, K: more samples than features, fewer, as many, two per class, two classes.
SHAPES = [(40, 5, 3), (12, 40, 3), (20, 20, 4), (10, 30, 5), (16, 3, 2)]


def _data(samples: int, dim: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    means = torch.randn(classes, dim, dtype=torch.float64, generator=generator)
    return means[labels] + torch.randn(samples, dim, dtype=torch.float64, generator=generator), labels


def _refitted(fit: Callable[..., Head], head: Head, features: Tensor, labels: Tensor, **weights: Any) -> Tensor:
    """Scores of each sample by the classifier fitted without it, one fit a sample."""
    scores = torch.empty_like(head.loo_scores)
    for index in range(len(labels)):
        kept = torch.arange(len(labels)) != index
        rest = {key: value[kept] if key == "sample_weight" else value for key, value in weights.items()}
        lams = {} if head.lam is None else {"lams": [head.lam.item()]}
        alone = fit(features[kept], labels[kept], head.weight.shape[0], **lams, **rest)
        scores[index] = alone.scores(features[index : index + 1])
    return scores


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FITS)
def test_leave_one_out_scores_are_those_of_refits(name: str, shape: tuple[int, int, int], weighted: bool) -> None:
    features, labels = _data(*shape)
    weights: dict[str, Any] = {}
    if weighted:
        own = 0.5 + torch.rand(len(labels), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        weights = {"sample_weight": own, "class_weight": [1.0 + k for k in range(shape[2])]}
    head = FITS[name](features, labels, shape[2], **weights)
    torch.testing.assert_close(head.loo_scores, _refitted(FITS[name], head, features, labels, **weights))
    wrong = (head.loo_scores.argmax(1) != labels).double()
    weight = weights["sample_weight"] * (1 + labels) if weighted else torch.ones_like(wrong)
    torch.testing.assert_close(head.loo_error, (weight * wrong).sum() / weight.sum())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dim", [5, 60])
def test_scores_without_a_fold_are_those_of_refits(dim: int, weighted: bool) -> None:
    features, labels = _data(40, dim, 4)
    own = 0.5 + torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights: dict[str, Any] = {"sample_weight": own, "class_weight": [1.0, 2.0, 3.0, 4.0]} if weighted else {}
    ways = torch.stack([torch.arange(40) % 3, torch.arange(40) // 10])
    head = ridge(features, labels, 4, **weights)
    scores, lam = head.left_out(ways), head.lam
    assert lam is not None
    for way, found in zip(ways, scores, strict=True):
        for fold in way.unique():
            kept = way != fold
            rest = {key: value[kept] if key == "sample_weight" else value for key, value in weights.items()}
            refitted = ridge(features[kept], labels[kept], 4, lams=[lam.item()], **rest)
            torch.testing.assert_close(found[~kept], refitted.scores(features[~kept]))


@pytest.mark.parametrize("name", ["ridge", "lda"])
@pytest.mark.parametrize("shape", [(40, 5, 3), (12, 40, 3)])
def test_curve_has_loss_and_error_of_every_strength(name: str, shape: tuple[int, int, int]) -> None:
    features, labels = _data(*shape)
    curve = FITS[name](features, labels, shape[2]).curve
    assert curve is not None
    for lam, loss, error in zip(*curve, strict=True):
        head = FITS[name](features, labels, shape[2], lams=[lam.item()])
        wrong = (head.loo_scores.argmax(1) != labels).double().mean()
        targets = torch.eye(shape[2], dtype=torch.float64)[labels]
        expected = {
            "ridge": (head.loo_scores - targets).square().sum(1).mean(),
            "lda": torch.nn.functional.cross_entropy(head.loo_scores, labels),
        }
        torch.testing.assert_close((loss, error), (expected[name], wrong))


@pytest.mark.parametrize("lam", [1e-7, 1e-3, 1e5])
def test_ridge_keeps_its_digits_at_strengths_far_from_the_spectrum(lam: float) -> None:
    features, labels = _data(12, 40, 3)
    head = ridge(features, labels, 3, lams=[lam])
    torch.testing.assert_close(head.loo_scores, _refitted(ridge, head, features, labels), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_ridge_is_scikit_learns(shape: tuple[int, int, int]) -> None:
    features, labels = _data(*shape)
    targets = np.eye(shape[2])[labels]
    lams = np.logspace(-2, 3, 11)
    head = ridge(features, labels, shape[2], lams=lams)
    peer = RidgeCV(lams, store_cv_results=True).fit(features.numpy(), targets)
    np.testing.assert_allclose(head.weight, peer.coef_, atol=1e-10)
    np.testing.assert_allclose(head.bias, peer.intercept_, atol=1e-10)
    assert head.lam is not None
    assert head.curve is not None
    assert head.lam.item() == pytest.approx(peer.alpha_)
    np.testing.assert_allclose(head.curve.loss, peer.cv_results_.sum(1).mean(0), rtol=1e-8)


def test_weights_of_ridge_are_scikit_learns() -> None:
    features, labels = _data(40, 5, 3)
    weight = 0.5 + torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    head = ridge(features, labels, 3, lams=[2.0], sample_weight=weight)
    peer = Ridge(2.0).fit(features.numpy(), np.eye(3)[labels], weight.numpy())
    np.testing.assert_allclose(head.weight, peer.coef_, atol=1e-12)


@pytest.mark.parametrize("lam", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(40, 5, 3), (12, 40, 3)])
def test_lda_is_scikit_learns(shape: tuple[int, int, int], lam: float) -> None:
    """Up to the covariance's divisor: the peer takes ``N`` for it, we ``N - K``, which is as scaling by the root."""
    features, labels = _data(*shape)
    ours = lda(features, labels, shape[2], lams=[lam]).scores(features).log_softmax(1)
    peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=lam).fit(features.numpy(), labels.numpy())
    log_prior = torch.tensor(peer.priors_).log()
    theirs = torch.tensor(peer.decision_function(features.numpy())) - log_prior
    theirs = (theirs * (1 - shape[2] / len(labels)) + log_prior).log_softmax(1)
    torch.testing.assert_close(ours, theirs)


def test_lda_shrunk_to_the_full_decides_as_the_nearest_mean_does() -> None:
    features, labels = _data(40, 5, 4)
    near = nearest_mean(features, labels, 4)
    full = lda(features, labels, 4, lams=[1.0])
    assert full.loo_scores.argmax(1).equal(near.loo_scores.argmax(1))
    assert full.scores(features).argmax(1).equal(near.scores(features).argmax(1))


def test_nearest_mean_decides_for_the_nearest_mean() -> None:
    features, labels = _data(40, 5, 4)
    means = torch.stack([features[labels == k].mean(0) for k in range(4)])
    expected = torch.cdist(features, means).argmin(1)
    assert nearest_mean(features, labels, 4).scores(features).argmax(1).equal(expected)


@pytest.mark.parametrize("name", FITS)
def test_balanced_weights_are_one_over_the_class_sizes(name: str) -> None:
    features, labels = _data(40, 5, 3)
    kept = (labels > 0) | (torch.arange(40) < 12)
    features, labels = features[kept], labels[kept]
    sizes = labels.bincount().double()
    balanced = FITS[name](features, labels, 3, class_weight="balanced")
    by_hand = FITS[name](features, labels, 3, class_weight=len(labels) / (3 * sizes))
    torch.testing.assert_close(balanced.loo_scores, by_hand.loo_scores)
    wrong = (balanced.loo_scores.argmax(1) != labels).double()
    of_classes = torch.stack([wrong[labels == k].mean() for k in range(3)])
    torch.testing.assert_close(balanced.loo_error, of_classes.mean())


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("shape", [(40, 5, 3), (12, 40, 3)])
@pytest.mark.parametrize("name", ["ridge", "lda"])
def test_scale_of_the_features_does_not_matter(name: str, shape: tuple[int, int, int], scale: float) -> None:
    features, labels = _data(*shape)
    one, other = FITS[name](features, labels, shape[2]), FITS[name](scale * features, labels, shape[2])
    torch.testing.assert_close(one.loo_scores, other.loo_scores, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(40, 5, 3), (12, 40, 3)])
@pytest.mark.parametrize("name", FITS)
def test_offset_costs_no_digits(name: str, shape: tuple[int, int, int]) -> None:
    """The features themselves keep 1e-10 of their spread, so that this much is allowed."""
    features, labels = _data(*shape)
    one, other = FITS[name](features, labels, shape[2]), FITS[name](1e3 + 1e-3 * features, labels, shape[2])
    scale = 1e6 if name == "nearest_mean" else 1.0
    torch.testing.assert_close(one.loo_scores, scale * other.loo_scores, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FITS)
def test_precision_of_the_features_is_theirs_alone(name: str, dtype: torch.dtype) -> None:
    features, labels = _data(40, 5, 3)
    features = features.to(dtype)
    low, high = FITS[name](features, labels.int(), 3), FITS[name](features.double(), labels, 3)
    assert low.loo_scores.equal(high.loo_scores)
    assert low.scores(features).equal(high.scores(features.double()))


@pytest.mark.parametrize("shape", [(40, 5, 3), (12, 40, 3)])
@pytest.mark.parametrize("name", FITS)
def test_constant_columns_change_nothing(name: str, shape: tuple[int, int, int]) -> None:
    features, labels = _data(*shape)
    wider = torch.cat([features, torch.full((len(labels), 2), 7.0)], 1)
    lams = {} if name == "nearest_mean" else {"lams": [1.0] if name == "ridge" else [0.3]}
    one, other = FITS[name](features, labels, shape[2], **lams), FITS[name](wider, labels, shape[2], **lams)
    if name == "lda":  # its target is the mean variance over all columns
        assert other.loo_scores.isfinite().all()
    else:
        torch.testing.assert_close(one.loo_scores, other.loo_scores)
    assert other.weight[:, -2:].abs().max() < 1e-12


def test_ridge_of_constant_features_gives_the_shares_of_the_classes() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    head = ridge(torch.ones(4, 2), labels, 2)
    torch.testing.assert_close(head.bias, torch.tensor([0.75, 0.25], dtype=torch.float64))
    torch.testing.assert_close(head.loo_scores[3], torch.tensor([1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("weights", [None, "balanced", [0.3, 2.0, 1.7]], ids=["equal", "balanced", "given"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [5, 64])
def test_rounding_of_features_that_do_not_vary_is_no_feature(dim: int, dtype: torch.dtype, weights: Any) -> None:
    labels = torch.arange(60) % 3 % torch.tensor([3, 1]).repeat(30)
    features = (
        torch.randn(dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype).expand(60, -1)
    )
    head = ridge(features, labels, 3, class_weight=weights)
    shares = labels.bincount().double()
    if weights is not None:
        shares = torch.ones_like(shares) if weights == "balanced" else shares * torch.tensor(weights).double()
    assert head.weight.abs().max() == 0
    torch.testing.assert_close(head.bias, shares / shares.sum())


@pytest.mark.parametrize("weights", [None, "balanced", [0.3, 2.0, 1.7]], ids=["equal", "balanced", "given"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [4, 64])
def test_rounding_of_classes_that_do_not_vary_is_no_covariance(dim: int, dtype: torch.dtype, weights: Any) -> None:
    labels = torch.arange(60) % 3 % torch.tensor([3, 1]).repeat(30)
    means = torch.randn(3, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    with pytest.raises(
        ValueError, match="^lda needs features that vary within classes, got constant ones; use nearest"
    ):
        lda(means[labels], labels, 3, class_weight=weights)


@pytest.mark.parametrize("name", ["ridge", "nearest_mean"])
def test_one_sample_a_class_is_never_right_when_left_out(name: str) -> None:
    features, labels = _data(6, 30, 6)
    head = FITS[name](features, labels, 6)
    assert head.loo_error.item() == pytest.approx(1)
    assert head.scores(features).argmax(1).equal(labels)


@pytest.mark.parametrize("name", ["lda", "nearest_mean"])
def test_class_of_one_sample_is_ruled_out_without_it(name: str) -> None:
    features, labels = _data(12, 4, 3)
    labels[labels == 2] = 1
    labels[2] = 2
    head = FITS[name](features, labels, 3)
    assert head.loo_scores[2].tolist()[2] == -torch.inf
    assert head.loo_scores.isinf().sum() == 1
    torch.testing.assert_close(head.loo_scores, _refitted(FITS[name], head, features, labels))
    weight, bias = head.logits(labels)
    assert weight.isfinite().all()
    assert bias.isfinite().all()


@pytest.mark.parametrize("name", FITS)
def test_classes_without_samples_are_never_chosen(name: str) -> None:
    features, labels = _data(12, 4, 3)
    head = FITS[name](features, 2 * labels + 1, 20)  # more classes than samples, too
    three = FITS[name](features, labels, 3)
    torch.testing.assert_close(head.loo_scores[:, 1:6:2], three.loo_scores)
    assert set(head.scores(features).argmax(1).tolist()) == {1, 3, 5}
    assert head.weight[0].abs().max() < 1e-12
    _, bias = head.logits(2 * labels + 1)
    assert bias.isfinite().all()


@pytest.mark.parametrize("name", FITS)
def test_thousand_classes_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = _data(2100, 8, 1000)
    whole = FITS[name](features, labels, 1000, **({} if name == "nearest_mean" else {"lams": [0.1, 0.5]}))
    monkeypatch.setattr("ncfinetune.closed_forms._ROWS", 600)
    monkeypatch.setattr("ncfinetune.closed_forms._COLUMNS", 100)
    monkeypatch.setattr("ncfinetune.closed_forms._BLOCK", 3)
    parts = FITS[name](features, labels, 1000, **({} if name == "nearest_mean" else {"lams": [0.1, 0.5]}))
    torch.testing.assert_close(whole.loo_scores, parts.loo_scores)
    torch.testing.assert_close((whole.loo_error, whole.weight), (parts.loo_error, parts.weight))
    torch.testing.assert_close(whole.curve, parts.curve)


def test_scores_held_out_do_not_depend_on_the_order_of_samples() -> None:
    features, labels = _data(30, 5, 3)
    other = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    one, two = (ridge(features[rows], labels[rows], 3).held_out() for rows in (slice(None), other))
    torch.testing.assert_close(one[:, other], two)
    assert not torch.allclose(one[0], one[1])


def test_logits_are_scores_over_the_temperature() -> None:
    features, labels = _data(40, 5, 3)
    head = ridge(features, labels, 3)
    weight, bias = head.logits(labels)
    temperature = held_out_temperature(head, labels)
    assert temperature.isfinite()
    torch.testing.assert_close(features @ weight.T + bias, head.scores(features) / temperature)


def test_probabilities_of_few_samples_fit_new_ones() -> None:
    """The likelihood of new samples is near that of the best temperature, which that of single ones left out is not."""
    noise, lost = torch.Generator().manual_seed(0), []
    means = 0.6 * torch.randn(10, 20, generator=noise)
    labels, new = torch.arange(10).repeat(4), torch.arange(10).repeat(100)
    for _ in range(20):
        train, test = (means[own] + torch.randn(len(own), 20, generator=noise) for own in (labels, new))
        head = ridge(train, labels, 10)
        scores = head.scores(test)
        single, best = fit_temperature(head.loo_scores, labels), fit_temperature(scores, new)
        found = (F.cross_entropy(scores / t, new) for t in (head.temperature(labels), single, best))
        lost.append(torch.stack(list(found)))
    ours, single, best = torch.stack(lost).mean(0).tolist()
    assert ours - best < 0.25 * (single - best)


@pytest.mark.parametrize("name", FITS)
def test_decisions_remain_where_the_left_out_scores_say_nothing(name: str) -> None:
    features = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(12) % 3
    head = FITS[name](features, labels, 3)
    assert held_out_temperature(head, labels).isinf()
    weight, bias = head.logits(labels)
    decided = (features @ weight.T + bias).argmax(1)
    assert torch.equal(decided, head.scores(features).argmax(1))
    assert len(decided.unique()) > 1
    assert (held_out_scores(head, labels) / head.temperature(labels)).std().item() == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["ridge", "nearest_mean"])
@pytest.mark.parametrize("classes", [2, 3])
def test_one_sample_of_each_class_has_a_temperature(name: str, classes: int) -> None:
    features = torch.randn(classes, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(classes, dtype=torch.uint8)
    spreads = []
    for scale in (1, 100):
        weight, bias = FITS[name](scale * features, labels, classes).logits(labels)
        logits = scale * features @ weight.T + bias
        assert logits.argmax(1).tolist() == list(range(classes))
        spreads.append(float(logits.std()))
    assert spreads == pytest.approx([spreads[0]] * 2)
    assert max(spreads) < 0.1


def test_class_without_samples_is_not_decided_for_where_one_sample_of_the_others_is_known() -> None:
    features, labels = torch.tensor([[-10.0, 0], [10, 0]]), torch.tensor([0, 1])
    weight, bias = nearest_mean(features, labels, 3).logits(labels)
    grid = torch.cartesian_prod(torch.linspace(-30, 30, 25), torch.linspace(-30, 30, 25))
    decided = (grid.double() @ weight.T + bias).argmax(1)
    assert torch.equal(decided[grid[:, 0] != 0], (grid[grid[:, 0] != 0, 0] > 0).long())
    weight, bias = nearest_mean(features, labels + 1, 3).logits(labels + 1)  # the absent class comes first
    assert set((grid.double() @ weight.T + bias).argmax(1).tolist()) == {1, 2}


def test_logits_refuse_other_labels() -> None:
    features, labels = _data(12, 4, 3)
    head = ridge(features, labels, 3)
    with pytest.raises(ValueError, match=re.escape("expected scores (N, K) and labels (N,), got (12, 3) and (11,)")):
        head.logits(labels[1:])
    with pytest.raises(ValueError, match="expected labels from 0 to 2, got 1 to 3"):
        head.logits(labels + 1)


@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (3, 2), (10, 9), (10, 64), (100, 128)])
def test_simplex_etf(classes: int, dim: int) -> None:
    weight = simplex_etf(classes, dim, seed=3)
    gram = torch.full((classes, classes), -1 / (classes - 1), dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(weight @ weight.T, gram)
    assert weight.equal(simplex_etf(classes, dim, seed=3))
    assert dim == 1 or not weight.allclose(simplex_etf(classes, dim, seed=4))


def test_the_nearest_simplex_is_nearer_than_any_other_at_any_scale() -> None:
    weight = torch.tensor([[2.0, 0], [-1, 0], [-1, 0]], dtype=torch.float64)
    found = nearest_simplex(weight)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert (weight - found).square().sum().item() == pytest.approx(3)
    turns = torch.linspace(0, 2 * torch.pi, 200, dtype=torch.float64)[:, None] + 2 * torch.pi / 3 * torch.arange(3)
    for mirror in (1, -1):  # every orientation, each at its best scale
        others = torch.stack([turns.cos(), mirror * turns.sin()], 2)
        others = others * ((weight * others).sum((1, 2)) / 3)[:, None, None]
        assert (weight - others).square().sum((1, 2)).min() > 3 - 1e-9


@pytest.mark.parametrize(
    ("fit", "features", "labels", "error"),
    [
        (nearest_mean, [0.0, 4.0, -4.0, -4.0], [0, 0, 1, 1], 0.25),  # the first is as near to 4 as to -4
        (ridge, [0.0, 0.0, 0.0, 0.0], [0, 1, 2, 2], 1.0),  # without one of class 2 all shares are equal
    ],
)
def test_a_tie_is_an_error(fit: Callable[..., Head], features: list[float], labels: list[int], error: float) -> None:
    assert fit(torch.tensor(features)[:, None], torch.tensor(labels), 3).loo_error.item() == pytest.approx(error)


@pytest.mark.parametrize("dim", [1, 2])
def test_lda_without_the_only_sample_that_varies_is_sure_of_the_others(dim: int) -> None:
    """Without one of class 0 nothing varies within classes, so that distances to the other means are endless."""
    features, labels = torch.tensor([[0.0, 1, 9, 9, 9, -9, -9, -9]]).T, torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])
    head = lda(F.pad(features, (0, dim - 1)), labels, 3)
    assert head.loo_scores.isfinite().all()
    assert head.loo_error == 0
    assert head.curve is not None
    assert head.curve.loss[0].item() == pytest.approx(0, abs=1e-6)


def test_default_strengths_are_those_that_are_documented() -> None:
    features, labels = _data(6, 20, 2)
    ridged, shrunk = ridge(features, labels, 2).curve, lda(features, labels, 2).curve
    assert ridged is not None
    assert shrunk is not None
    trace = (features - features.mean(0)).square().sum()
    torch.testing.assert_close(ridged.lams[[0, -1]] / trace, torch.tensor([1e-6, 1e3], dtype=torch.float64) / 5)
    torch.testing.assert_close(shrunk.lams.logit(), math.log(10) * torch.linspace(-3, 3, 25, dtype=torch.float64))


def test_balanced_weights_do_not_count_absent_classes() -> None:
    features, labels = _data(30, 4, 3)
    labels[6:12] = 0
    fits = [ridge(features, labels, classes, class_weight="balanced", lams=[1.0]) for classes in (3, 5)]
    torch.testing.assert_close(fits[1].weight[:3], fits[0].weight)


def _broken(**changes: Any) -> dict[str, Any]:
    features, labels = _data(12, 4, 3)
    return {"features": features.float(), "labels": labels, "num_classes": 3, **changes}


NAN = torch.zeros(12, 4).index_fill(0, torch.tensor([2, 5]), torch.nan)
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("ridge", {"lams": []}, "expected lams of one or more positive, finite numbers, got [] (0)"),
    ("ridge", {"lams": [1.0, -2.0]}, "expected lams of one or more positive, finite numbers, got [1, -2] (2)"),
    ("ridge", {"lams": [0.0]}, "expected lams of one or more positive, finite numbers, got [0] (1)"),
    ("ridge", {"lams": [torch.nan]}, "expected lams of one or more positive, finite numbers, got [nan] (1)"),
    ("ridge", {"lams": [torch.inf]}, "expected lams of one or more positive, finite numbers, got [inf] (1)"),
    ("ridge", {"lams": 1.0}, "expected lams of one or more positive, finite numbers, got shape ()"),
    ("lda", {"lams": [1.5]}, "expected lams of one or more positive, finite numbers up to 1, got [1.5] (1)"),
    ("ridge", {"class_weight": "even"}, "expected class_weight balanced or 3 weights, got 'even'"),
    ("ridge", {"class_weight": [1.0]}, "expected class_weight of 3 positive, finite numbers, got [1] (1)"),
    (
        "nearest_mean",
        {"sample_weight": torch.zeros(12)},
        "expected sample_weight of 12 positive, finite numbers, got [0, 0, 0, 0, 0, ...] (12)",
    ),
    (
        "ridge",
        {"features": torch.zeros(12, 4, 1)},
        "expected floating-point features (N, d) and labels (N,), got torch.float32 (12, 4, 1) and (12,)",
    ),
    (
        "ridge",
        {"features": torch.zeros(12, 4, dtype=torch.int64)},
        "expected floating-point features (N, d) and labels (N,), got torch.int64 (12, 4) and (12,)",
    ),
    (
        "lda",
        {"features": torch.eye(3).repeat(4, 1), "labels": torch.arange(12) % 3},
        "lda needs features that vary within classes, got constant ones; use nearest_mean or ridge",
    ),
    (
        "lda",
        {"labels": torch.arange(12) - (torch.arange(12) == 11).long(), "num_classes": 12},
        "lda needs two samples more than there are classes with samples, got 12 samples of 11 classes: without one of "
        "them there is no covariance; use nearest_mean or ridge",
    ),
]
EVERYWHERE: list[tuple[dict[str, Any], str]] = [
    (
        {"features": torch.zeros(1, 4), "labels": torch.zeros(1).long()},
        "expected at least two samples, so that one can be left out, got 1",
    ),
    ({"labels": torch.zeros(12).long()}, "expected samples of at least two classes, got 1"),
    ({"features": NAN}, "expected finite features, got nan or inf in 2 of 12 samples"),
    ({"labels": torch.arange(12)}, "expected labels from 0 to num_classes - 1 = 2, got 0 to 11"),
    ({"labels": torch.arange(12) % 3 - 1}, "expected labels from 0 to num_classes - 1 = 2, got -1 to 1"),
]


@pytest.mark.parametrize(
    ("name", "changes", "text"), [*BAD, *((name, *case) for name in FITS for case in EVERYWHERE)], ids=str
)
def test_input_without_sense_is_refused(name: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text) + "$"):
        FITS[name](**_broken(**changes))


@pytest.mark.parametrize(("classes", "dim"), [(1, 4), (5, 3)])
def test_etf_without_room_is_refused(classes: int, dim: int) -> None:
    with pytest.raises(ValueError, match=f"got num_classes={classes} and dim={dim}"):
        simplex_etf(classes, dim)


@pytest.mark.parametrize(("samples", "dim"), [(40, 5), pytest.param(12, 30, marks=pytest.mark.slow)])
def test_algebra_stays_on_the_device_and_never_waits_for_it(samples: int, dim: int) -> None:
    """Tensors without values, on a GPU that need not be there: mixing devices raises, and so does a look at a value."""
    with FakeTensorMode():
        double = {"dtype": torch.float64, "device": "cuda"}
        features, labels = torch.zeros(samples, dim, device="cuda"), torch.zeros(samples, device="cuda").long()
        weight, mean, share = torch.ones(samples, **double), torch.zeros(dim, **double), torch.ones(3, **double)
        fit = closed_forms.Samples(features, labels, weight, mean, share, 3)
        lams, lam = torch.ones(45, **double), torch.ones((), **double)
        spectrum = closed_forms.dual_form(fit) if samples <= dim else closed_forms.primal(fit)
        curve, slack = closed_forms.ridge_curve(fit, spectrum, lams)
        linear = spectrum.weight(fit, lam)
        groups = closed_forms.Groups.of(fit)
        basis, values = closed_forms.within(fit, groups)
        model = closed_forms.Gaussians(fit, groups, basis, values)
        left_out = model.left_out(fit.centred() @ basis, slice(None), lam)
        near = closed_forms.nearest_left_out(fit, groups, slice(None))
        moments = folds.FoldMoments(3)
        moments.update(features, labels)
        assert moments._state is not None
        found = [*curve, slack, linear, spectrum.residuals(fit, linear, lam), *model.curve(lams), left_out, near]
        assert {tensor.device.type for tensor in (*found, model.weight(lam), *moments._state)} == {"cuda"}


@pytest.mark.parametrize("classes", [2, 6, 10])
@pytest.mark.parametrize("features", [torch.full((60, 8), 0.3), torch.eye(60)], ids=["constant", "one-hot"])
def test_features_that_say_nothing_decide_nothing(features: Tensor, classes: int) -> None:
    """Held-out scores are the same for all classes, up to rounding."""
    labels = torch.arange(60) % classes
    head = ridge(features, labels, classes)
    assert decided_rightly(head.held_out(), labels.to(torch.uint8)).sum() == 0
    assert head.temperature(labels).item() == 1

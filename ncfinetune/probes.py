"""Closed-form classifiers of cached features, each with exact leave-one-out scores.

`ridge` is the strongest of them on few labels, `lda` gives posteriors of Gaussian classes, `nearest_mean` is the
decision rule of fully collapsed features; `simplex_etf` is a weight that needs no features. They are fitted in float64
on the device of the features (on the CPU where the device has no float64), whatever the precision of these. Features
are centred first, so that a common offset costs no digits.

    >>> import torch
    >>> from ncfinetune.probes import ridge
    >>> labels = torch.arange(60) % 3
    >>> features = torch.eye(3, 8)[labels] + 0.1 * torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    >>> head = ridge(features, labels, num_classes=3)
    >>> head.weight.shape, head.bias.shape, head.loo_scores.shape
    (torch.Size([3, 8]), torch.Size([3]), torch.Size([60, 3]))
    >>> head.loo_error.item()
    0.0

Legend: ``N`` samples, ``K`` classes, ``d`` feature width, ``L`` strengths of regularisation, ``r = min(N, d)``;
``w_i`` weights of samples and ``W`` their sum, ``W_k`` a class's; ``mu_k`` class means, ``m`` the mean of the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ncfinetune.calibration import checked_scores, fit_temperature
from ncfinetune.closed_forms import (
    Curve,
    Gaussians,
    Groups,
    Samples,
    Spectrum,
    centred_bias,
    dual_form,
    margins,
    nearest_left_out,
    primal,
    ridge_curve,
    row_parts,
    within,
)
from ncfinetune.folds import balanced_folds
from ncfinetune.inputs import as_indices

ClassWeight = Literal["balanced"] | Sequence[float] | Tensor
Strengths = Sequence[float] | Tensor
# Least standard deviation of a classifier's logits; their softmax then differs from chance by about this share.
_LEAST_SPREAD = 1e-2
# Differences of scores, as a share of the largest, that are taken for rounding.
_ROUNDING = 1e-7


@dataclass(frozen=True)
class Head:
    """A linear classifier fitted in closed form; all tensors are float64.

    Args:
        weight: ``(K, d)``.
        bias: ``(K,)``; ``-inf`` for a class without samples in `lda` or `nearest_mean`.
        loo_scores: Scores of each sample by the classifier fitted without it, ``(N, K)``.
        loo_error: Leave-one-out error rate, weighted as the fit is; a tie is an error. Of few samples per class it is
            too high where features are weak: without the sample its class is the rarest.
        lam: The chosen strength of regularisation; None if there is none to choose.
        curve: Leave-one-out loss and error at every strength.
    """

    weight: Tensor
    bias: Tensor
    loo_scores: Tensor
    loo_error: Tensor
    lam: Tensor | None = None
    curve: Curve | None = None

    def scores(self, features: Tensor) -> Tensor:
        """Scores ``(N, K)`` of features ``(N, d)``; the highest decides."""
        return features.to(self.weight.device).double() @ self.weight.T + self.bias

    def logits(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Weight ``(K, d)`` and bias ``(K,)`` of the classifier whose softmax gives probabilities, to train from.

        Scores are divided by `temperature`. A bias of ``-inf`` becomes one that is lower than all scores seen, which
        keeps the loss and its gradient finite.

            >>> import torch
            >>> labels = torch.arange(40) % 2
            >>> features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) + labels[:, None]
            >>> weight, bias = ridge(features, labels, num_classes=2).logits(labels)
            >>> torch.softmax(features.double() @ weight.T + bias, 1).shape
            torch.Size([40, 2])

        Args:
            labels: Those that the head was fitted to, ``(N,)``.
        """
        temperature = self.temperature(labels)
        known = self.bias.isfinite()
        # The highest of the other classes' scores is nowhere below their lowest bias, since their weights average to 0.
        lowest = self.loo_scores.where(self.loo_scores.isfinite(), torch.inf).min()
        lowest = torch.minimum(lowest, self.bias.where(known, torch.inf).min()) - temperature
        return self.weight / temperature, self.bias.where(known, lowest) / temperature

    def temperature(self, labels: Tensor) -> Tensor:
        """What `ncfinetune.calibration.fit_temperature` finds on the scores `held_out`, up to a limit.

        Scores that are no better than chance have an infinite temperature, at which all classes are equally probable
        and the first one would be decided for. Therefore the standard deviation of the held-out logits is at least
        0.01. If each class has one sample, which tells `nearest_mean` nothing, that of the logits at the class means
        is 0.01.

        Args:
            labels: Those that the head was fitted to, ``(N,)``.

        Raises:
            ValueError: Labels of another shape, or out of range.
        """
        _, labels = checked_scores(self.loo_scores, labels)
        ways = self.held_out()
        scores, labels = ways.flatten(0, 1), labels.repeat(len(ways))
        told = scores.gather(1, labels[:, None]).isfinite().any()
        decided = scores if told else self.weight @ self.weight.T
        decided = decided[decided.isfinite()]
        spread = decided.std()
        varies = spread > _ROUNDING * decided.abs().amax()
        if not told or not bool(varies):
            return torch.where(varies, spread / _LEAST_SPREAD, 1.0)
        return torch.minimum(fit_temperature(scores, labels, len(ways)), spread / _LEAST_SPREAD)

    def held_out(self) -> Tensor:
        """Scores of samples by heads that were fitted without them, in ``R`` ways, ``(R, N, K)``.

        These are the leave-one-out scores. Of `ridge`, whose scores lean on the shares of the classes, they are those
        of `folds.balanced_folds`: leaving out single samples is pessimistic where there are few.
        """
        return self.loo_scores[None]


@dataclass(frozen=True)
class RidgeHead(Head):
    """The head of `ridge`, which knows the scores of any of its samples without them.

    Args:
        fit: What it was fitted to.
        spectrum: The eigendecomposition of these.
        residuals: Targets less fitted scores, ``(N, K)``.
    """

    fit: Samples = field(kw_only=True, repr=False)
    spectrum: Spectrum = field(kw_only=True, repr=False)
    residuals: Tensor = field(kw_only=True, repr=False)

    def left_out(self, folds: Tensor) -> Tensor:
        """Scores of each sample by the head that is fitted without the sample's fold, ``(R, N, K)``.

        Strength and weights remain. With the hat matrix ``H = Z Z^T`` of the fit, which counts the bias, the residuals
        ``e``, and both multiplied by the square roots of the weights, the scores of a fold ``F`` without it are
        ``Y_F - (I - H_FF)^-1 e_F``. The smaller of ``H_FF`` and ``Z_F^T Z_F`` is inverted, by Woodbury's identity.

            >>> features, labels = torch.eye(4)[torch.arange(12) % 4], torch.arange(12) % 4
            >>> head = ridge(features, labels, 4)
            >>> torch.allclose(head.left_out(torch.arange(12)[None])[0], head.loo_scores)
            True

        Args:
            folds: Which fold each sample is in, in ``R`` ways, ``(R, N)``; two folds at least.
        """
        assert self.lam is not None
        scores, roots = self.fit.targets().expand(len(folds), -1, -1).clone(), self.fit.weight.sqrt()[:, None]
        for way, fold_of in zip(scores, folds.to(scores.device), strict=True):
            for fold in fold_of.unique():
                own = (fold_of == fold).nonzero().squeeze(1)
                factor = self.spectrum.factor(self.fit, own, self.lam)
                way[own] -= _solved(factor, self.residuals[own] * roots[own]) / roots[own]
        return scores

    def held_out(self) -> Tensor:
        """`left_out` by `folds.balanced_folds`, for which some class needs two samples.

        The folds are of the samples in the order of their leave-one-out scores, so that their own order, which is
        another one with shuffling or several processes, matters in ties alone.
        """
        labels = self.fit.labels
        if int(labels.bincount().max()) < 2:
            return self.loo_scores[None]
        order = self.loo_scores.gather(1, labels[:, None]).squeeze(1).argsort()
        order = order[labels[order].argsort(stable=True)].cpu()
        ways = balanced_folds(labels.cpu()[order])
        return self.left_out(torch.empty_like(ways).index_copy_(1, order, ways))


def ridge(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    lams: Strengths | None = None,
    class_weight: ClassWeight | None = None,
    sample_weight: Tensor | None = None,
) -> RidgeHead:
    """Ridge regression on one-hot targets, its strength chosen by leave-one-out squared error.

    Minimises ``sum_i w_i |y_i - W h_i - b|^2 + lam |W|^2``; the bias is not shrunk. One eigendecomposition of the
    smaller of ``N x N`` and ``d x d`` serves all strengths. With the leverage ``g_i`` of a sample (which counts the
    bias) and its fitted scores ``p_i``, the scores without it are ``y_i - (y_i - p_i) / (1 - g_i)`` (Allen 1974,
    "The relationship between variable selection and data augmentation"; Golub, Heath, Wahba 1979).

    Weights of samples and of classes multiply each other; leaving a sample out does not change the weights of the
    others, ``balanced`` ones included. A class without samples has weight and bias 0.

        >>> features, labels = torch.eye(4)[torch.arange(12) % 4], torch.arange(12) % 4
        >>> head = ridge(features, labels, num_classes=4, lams=[0.1, 1.0, 10.0])
        >>> head.lam.item(), head.scores(features).argmax(1).equal(labels)
        (0.1, True)

    Args:
        features: ``(N, d)``, of any floating-point type.
        labels: Classes, ``(N,)``.
        num_classes: Number of classes ``K``.
        lams: Strengths to choose from, as scikit-learn's ``alphas``. By default 45 from 1e-6 to 1e3 times the mean of
            the non-zero eigenvalues of the weighted scatter, so that the scale of the features does not matter.
        class_weight: Weights of classes, ``(K,)``; ``balanced`` makes the present classes weigh the same together.
        sample_weight: Weights of samples, ``(N,)``, positive.

    Raises:
        ValueError: Wrong shapes, labels out of range, values that are not finite, fewer than two classes with samples;
            strengths or weights that are empty, not positive or not finite.
    """
    fit = _checked(features, labels, num_classes, class_weight, sample_weight)
    spectrum = dual_form(fit) if len(features) <= features.shape[1] else primal(fit)
    strengths = _default_lams(fit, spectrum) if lams is None else _strengths(lams, torch.inf, fit.mean.device)
    curve, slack = ridge_curve(fit, spectrum, strengths)
    best = curve.loss.argmin()
    weight = spectrum.weight(fit, strengths[best])
    residuals = spectrum.residuals(fit, weight, strengths[best])
    loo_scores = fit.targets() - residuals / slack[:, best, None]
    bias, chosen = fit.share - weight @ fit.mean, (curve.error[best], strengths[best], curve)
    return RidgeHead(weight, bias, loo_scores, *chosen, fit=fit, spectrum=spectrum, residuals=residuals)


def _solved(factor: Tensor, residuals: Tensor) -> Tensor:
    """``(I - Z Z^T)^-1 e`` of ``Z`` ``(n, p)`` and ``e`` ``(n, K)``."""
    eye = torch.eye(min(factor.shape), dtype=factor.dtype, device=factor.device)
    if len(eye) == len(factor):
        return torch.linalg.solve(eye - factor @ factor.T, residuals)
    return residuals + factor @ torch.linalg.solve(eye - factor.T @ factor, factor.T @ residuals)


def decided_rightly(scores: Tensor, labels: Tensor) -> Tensor:
    """How often each sample has the highest score for its class in scores ``(R, N, K)``, in 0..1, ``(N,)``.

    A tie is an error, also one that rounding decides: features that say nothing would be decided by it.
    """
    labels, least = labels.to(scores.device).long(), _ROUNDING * scores.abs().amax().nan_to_num(posinf=0)
    return torch.stack([margins(way, labels) > least for way in scores]).double().mean(0)


def squared_errors(scores: Tensor, labels: Tensor) -> Tensor:
    """Each sample's squared error of scores ``(R, N, K)`` against its one-hot target, the mean over ``R``, ``(N,)``."""
    targets = F.one_hot(labels.to(scores.device), scores.shape[-1])
    return (scores - targets).square().sum(-1).mean(0)


def lda(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    lams: Strengths | None = None,
    class_weight: ClassWeight | None = None,
    sample_weight: Tensor | None = None,
) -> Head:
    """Linear discriminant analysis with a shrunk covariance, the shrinkage chosen by leave-one-out likelihood.

    Gaussian classes share ``S_lam = (1 - lam) S + lam tr(S)/d I``, ``S`` the unbiased covariance within classes
    (Friedman 1989, "Regularized discriminant analysis", eq. 18, with one covariance for all). Scores are
    ``(h - m)^T S_lam^-1 (mu_k - m) - |mu_k - m|^2_{S_lam^-1} / 2 + log(W_k / W)``, whose softmax is the posterior.
    Leaving a sample out removes a rank-one term from ``S`` and changes its trace, the class's mean, ``m`` and the class
    shares, all of which is computed exactly.

    Weights act as in `ridge`: on means, covariance and class shares. A class without samples is never predicted;
    neither is a class whose only sample is left out: its score is ``-inf``, and the sample counts as an error and has
    no likelihood.

        >>> features, labels = torch.eye(4)[torch.arange(12) % 4], torch.arange(12) % 4
        >>> features += 0.1 * torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
        >>> head = lda(features, labels, num_classes=4)
        >>> head.loo_error.item(), torch.softmax(head.scores(features), 1).argmax(1).equal(labels)
        (0.0, True)

    Args:
        features: ``(N, d)``, of any floating-point type.
        labels: Classes, ``(N,)``.
        num_classes: Number of classes ``K``.
        lams: Shrinkages to choose from, above 0 and up to 1; by default 25 from 0.001 to 0.999, their
            odds spaced evenly in the logarithm.
        class_weight: Weights of classes, ``(K,)``; ``balanced`` makes the present classes weigh the same together.
        sample_weight: Weights of samples, ``(N,)``, positive.

    Raises:
        ValueError: As `ridge`; also with fewer than K + 2 samples for K present classes, or features that do not vary
            within classes, since then the covariance without a sample does not exist.
    """
    fit = _checked(features, labels, num_classes, class_weight, sample_weight)
    groups = Groups.of(fit)
    if len(labels) - fit.present < 2:
        raise ValueError(
            f"lda needs two samples more than there are classes with samples, got {len(labels)} samples of "
            f"{fit.present} classes: without one of them there is no covariance; use nearest_mean or ridge"
        )
    basis, values = within(fit, groups)
    if not values.sum() > 0:
        raise ValueError("lda needs features that vary within classes, got constant ones; use nearest_mean or ridge")
    odds = torch.logspace(-3, 3, 25, dtype=torch.float64, device=fit.mean.device)
    strengths = odds / (1 + odds) if lams is None else _strengths(lams, 1, fit.mean.device)
    model = Gaussians(fit, groups, basis, values)
    curve = model.curve(strengths)
    best = curve.loss.argmin()
    loo_scores = torch.cat([model.left_out(fit.centred(part) @ basis, part, strengths[best]) for part in fit.parts()])
    weight = model.weight(strengths[best])
    shares = (groups.weight / groups.weight.sum()).log()
    return Head(
        weight, centred_bias(weight, fit, groups) + shares, loo_scores, curve.error[best], strengths[best], curve
    )


def nearest_mean(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    class_weight: ClassWeight | None = None,
    sample_weight: Tensor | None = None,
) -> Head:
    """The nearest-class-mean classifier: scores ``(h - m)^T (mu_k - m) - |mu_k - m|^2 / 2``.

    That is ``-|h - mu_k|^2 / 2`` up to a term that is the same for every class. Leaving a sample out changes its
    class's mean and ``m``. Sample weights act on the means, class weights on ``m`` and ``loo_error``. A class without
    samples is never predicted, neither is a class whose only sample is left out: its score is ``-inf``.

        >>> head = nearest_mean(torch.tensor([[0.0], [1.0], [4.0], [5.0]]), torch.tensor([0, 0, 1, 1]), num_classes=2)
        >>> head.scores(torch.tensor([[2.4], [2.6]])).argmax(1), head.loo_error.item()
        (tensor([0, 1]), 0.0)

    Args:
        features: ``(N, d)``, of any floating-point type.
        labels: Classes, ``(N,)``.
        num_classes: Number of classes ``K``.
        class_weight: Weights of classes, ``(K,)``; ``balanced`` makes the present classes weigh the same together.
        sample_weight: Weights of samples, ``(N,)``, positive.

    Raises:
        ValueError: As `ridge`.
    """
    fit = _checked(features, labels, num_classes, class_weight, sample_weight)
    groups = Groups.of(fit)
    loo_scores = torch.cat([nearest_left_out(fit, groups, part) for part in fit.parts()])
    absent = torch.where(groups.weight > 0, 0.0, -torch.inf)
    wrong = margins(loo_scores, fit.labels) <= 0
    error = (fit.weight * wrong).sum() / fit.weight.sum()
    return Head(groups.means, centred_bias(groups.means, fit, groups) + absent, loo_scores, error)


def simplex_etf(num_classes: int, dim: int, seed: int = 0) -> Tensor:
    """The weight ``(K, d)`` of a fixed equiangular classifier: unit rows with cosines ``-1/(K - 1)`` that sum to 0.

    ``W = sqrt(K/(K-1)) B Q^T`` with ``B B^T = I - 1 1^T / K`` and ``Q^T Q = I`` (Papyan, Han, Donoho 2020, definition
    1; Yang et al. 2022, arXiv 2203.09081, eq. 1). ``B`` has ``K - 1`` columns, so that ``d = K - 1`` suffices; ``Q`` is
    drawn uniformly by the seed, on the CPU, so that it is the same on every device.

        >>> weight = simplex_etf(3, 2)
        >>> torch.allclose(weight @ weight.T, 1.5 * torch.eye(3, dtype=torch.float64) - 0.5)
        True

    Raises:
        ValueError: Fewer than two classes, or a width below ``K - 1``.
    """
    if num_classes < 2 or dim < num_classes - 1:
        raise ValueError(
            f"expected at least two classes and a width of at least num_classes - 1, got num_classes={num_classes} and "
            f"dim={dim}: {num_classes} directions at equal angles need that much room"
        )
    order = torch.arange(1, num_classes, dtype=torch.float64)
    helmert = torch.ones(num_classes, num_classes - 1, dtype=torch.float64).triu() - torch.diag(order, -1)[:, :-1]
    normal = torch.randn(dim, num_classes - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    frame, triangle = torch.linalg.qr(normal)
    frame = frame * triangle.diagonal().sign()  # makes the factorisation unique, whatever the library's sign convention
    return (num_classes / (num_classes - 1)) ** 0.5 * (helmert / (order * (order + 1)).sqrt()) @ frame.T


def nearest_simplex(weight: Tensor) -> Tensor:
    """The equiangular classifier ``a E`` nearest to a weight ``(K, d)`` in the sum of squares.

    ``E`` is a simplex as in `simplex_etf`, in the orientation nearest to the weight, and ``a`` its scale
    (orthogonal Procrustes problem: Schoenemann 1966): where the columns of ``B`` are an orthonormal basis of what sums
    to 0 over the classes and ``B^T W = U S V^T``, it is ``tr(S)/(K - 1) B U V^T``.

        >>> weight = 3 * simplex_etf(4, 6)
        >>> torch.allclose(nearest_simplex(weight + 1), weight)
        True

    Raises:
        ValueError: As `simplex_etf`.
    """
    classes, width = weight.shape
    simplex_etf(classes, width)  # raises if the width is too small
    basis = ((classes - 1) / classes) ** 0.5 * simplex_etf(classes, classes - 1).to(weight.device)
    left, lengths, right = torch.linalg.svd(basis.T @ weight.double(), full_matrices=False)
    return lengths.mean() * basis @ left @ right


def _checked(
    features: Tensor, labels: Tensor, num_classes: int, class_weight: ClassWeight | None, sample_weight: Tensor | None
) -> Samples:
    """Checked input of a fit, with one read of the device."""
    if features.ndim != 2 or labels.shape != features.shape[:1] or not features.is_floating_point():
        raise ValueError(
            "expected floating-point features (N, d) and labels (N,), got "
            f"{features.dtype} {tuple(features.shape)} and {tuple(labels.shape)}"
        )
    if len(features) < 2:
        raise ValueError(f"expected at least two samples, so that one can be left out, got {len(features)}")
    features = features.detach() if features.device.type != "mps" else features.detach().cpu()  # it has no float64
    labels = as_indices(labels, features.device)
    valid = labels.clamp(0, num_classes - 1)
    weight = _sample_weights(sample_weight, features)
    weight = weight * _class_weights(class_weight, valid, num_classes, weight)
    total = weight.sum()
    # Less a sample, so that the mean of features that do not vary is exact and rounding is not taken for variation.
    first = features[0].double()
    apart = torch.zeros_like(first)
    for part in row_parts(len(labels)):
        apart += weight[part] @ (features[part].double() - first)
    mean = first + apart / total
    share = torch.zeros(num_classes, dtype=torch.float64, device=features.device).index_add_(0, valid, weight / total)
    facts = [labels.min(), labels.max(), mean.isfinite().all(), (share > 0).sum()]
    lowest, highest, finite, present = (int(fact) for fact in torch.stack([fact.long() for fact in facts]).tolist())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(f"expected labels from 0 to num_classes - 1 = {num_classes - 1}, got {lowest} to {highest}")
    if not finite:
        broken = int((~features.isfinite().all(1)).sum())
        raise ValueError(f"expected finite features, got nan or inf in {broken} of {len(features)} samples")
    if present < 2:
        raise ValueError(f"expected samples of at least two classes, got {present}")
    equal = class_weight is None and sample_weight is None
    return Samples(features, labels, weight, mean, share, present, equal)


def _sample_weights(weights: Tensor | None, features: Tensor) -> Tensor:
    if weights is None:
        return torch.ones(len(features), dtype=torch.float64, device=features.device)
    return _positive("sample_weight", weights, len(features), features.device)


def _class_weights(weights: ClassWeight | None, labels: Tensor, num_classes: int, samples: Tensor) -> Tensor:
    """Factor of each sample's weight for its class, ``(N,)``; ``samples`` are the sample weights."""
    if weights is None:
        return torch.ones_like(samples)
    if isinstance(weights, str):
        if weights != "balanced":
            raise ValueError(f"expected class_weight balanced or {num_classes} weights, got {weights!r}")
        sums = samples.new_zeros(num_classes).index_add_(0, labels, samples)
        return (samples.sum() / (sums > 0).sum() / sums)[labels]
    return _positive("class_weight", weights, num_classes, samples.device)[labels]


def _positive(name: str, values: Strengths, length: int, device: torch.device) -> Tensor:
    weights = torch.as_tensor(values, dtype=torch.float64, device=device)
    if weights.shape != (length,) or not bool((weights > 0).logical_and(weights < torch.inf).all()):
        raise ValueError(f"expected {name} of {length} positive, finite numbers, got {_shown(weights)}")
    return weights


def _strengths(lams: Strengths, highest: float, device: torch.device) -> Tensor:
    strengths = torch.as_tensor(lams, dtype=torch.float64, device=device)
    fine = (strengths > 0) & (strengths <= highest) & strengths.isfinite()
    if strengths.ndim != 1 or not len(strengths) or not bool(fine.all()):
        bound = "" if highest == torch.inf else f" up to {highest:g}"
        raise ValueError(f"expected lams of one or more positive, finite numbers{bound}, got {_shown(strengths)}")
    return strengths


def _shown(values: Tensor, most: int = 5) -> str:
    """Numbers for a message: the first few of a vector, and the shape of anything else."""
    if values.ndim != 1:
        return f"shape {tuple(values.shape)}"
    head = ", ".join(f"{value:g}" for value in values[:most].tolist())
    return f"[{head}{', ...' if len(values) > most else ''}] ({len(values)})"


def _default_lams(fit: Samples, spectrum: Spectrum) -> Tensor:
    scale = spectrum.values.sum() / min(len(fit.labels) - 1, len(fit.mean))
    return torch.where(scale > 0, scale, 1.0) * torch.logspace(-6, 3, 45, dtype=torch.float64, device=scale.device)

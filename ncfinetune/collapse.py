"""Metrics of neural collapse as pure functions of class moments.

Legend: ``N`` samples, ``K`` classes, ``P`` of them present (with samples), ``d`` feature width; ``mu_k`` class means,
``mu_G`` the mean of the class means. Everything is float64. Absent classes are left out of every number.

Sources: Papyan, Han, Donoho 2020 (arXiv 2008.08186) for NC1-NC4; Galanti, Gyorgy, Hutter 2022 (arXiv 2112.15121) for
CDNV; Zhu et al. 2021 (arXiv 2105.02375) for the distances to a simplex ETF; Li et al. 2022 (arXiv 2212.12206) for the
factor 1/K in NC1 and the numerical rank; Chan, Golub, LeVeque 1979 for the merging of moments.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ncfinetune.moments import ClassMoments as ClassMoments
from ncfinetune.moments import UndefinedCollapseError as UndefinedCollapseError
from ncfinetune.moments import UnresolvedCollapseError
from ncfinetune.moments import class_moments as class_moments
from ncfinetune.moments import merge as merge

_EPS = torch.finfo(torch.float64).eps
# Relative rounding error of NC1: up to the first value NC1 counts as exact, above the second it is refused.
EXACT, _ROUGH = 1e-6, 2e-2
_UNEVEN = "the features vary too unevenly within classes, or the class means too little in some directions"
# Relative squared distance below which class means are subtracted pair by pair, and the number of pairs at a time.
_CLOSE, _PAIRS = 1e-6, 4096
# Rows of width d processed at a time, so that intermediate results stay small relative to the class means.
_ROWS = 256


class RoundingWarning(UserWarning):
    """A returned number may have the stated relative rounding error."""


def nc1(moments: ClassMoments) -> Tensor:
    """Within-class variability ``trace(Sigma_W Sigma_B^+) / K`` (Papyan et al. 2020; factor 1/K as in Li et al. 2022).

    ``Sigma_W`` weighs samples equally, ``Sigma_B`` classes; with unbalanced data these differ. NC1 is computed in the
    subspace that the class means span, without inverting a ``d x d`` matrix: ``Sigma_B^+ / K`` is ``T^T T`` for the
    rows ``T`` of `_whitening`. Full collapse is 0; class means that all coincide give nan. Features count as they are
    given: where class means span fewer than ``P - 1`` dimensions, the rounding of bfloat16 and float16 features makes
    up for the others, in which nothing collapses; measure such features in float32.

    If the relative rounding error may exceed 1e-6, a `RoundingWarning` says by how much.

    Raises:
        UndefinedCollapseError: Fewer than two classes are present.
        UnresolvedCollapseError: The relative rounding error may exceed 2 %.
        ValueError: The moments lack the within-class covariance.
    """
    value, error = nc1_with_error(moments)
    if error > EXACT:
        warnings.warn(rounding_text(error), RoundingWarning, stacklevel=2)
    return value


def nc1_with_error(moments: ClassMoments) -> tuple[Tensor, float]:
    """`nc1` and its relative rounding error, by an estimate that is meant to be on the large side.

    It takes the errors of different products to be independent, which they may not be where many features are the
    same multiple of one that has two values.

    Raises:
        UndefinedCollapseError: Fewer than two classes are present.
        UnresolvedCollapseError: That error is above 2 %.
        ValueError: The moments lack the within-class covariance.
    """
    total = noise = scale = least = moments.mean.new_zeros(())
    means = _EPS * moments.mean.detach().abs().amax(0)
    for rows in _whitening(moments):
        spread = moments.spread(rows)
        total = total + spread
        noise = noise + moments.rounding_error(rows.detach(), spread.detach())
        squares = rows.detach().square()
        scale, least = scale + squares.sum(), least + (squares * means.square()).sum()
    if not scale > 0:
        return moments.mean.new_tensor(torch.nan), 0.0
    # Variation within classes below the rounding of the class means counts as full collapse.
    if torch.maximum(total.detach(), noise) <= least:
        return total, 0.0
    error = float(noise / total.detach())
    if not error <= _ROUGH:
        raise UnresolvedCollapseError(
            f"expected rounding to move nc1 by {_ROUGH:.0%} of it at most, and it may have moved it by {error:.0e}: "
            f"{_UNEVEN}; leave out outliers, and give the features as float64 or in random order"
        )
    return total, error


def rounding_text(error: float) -> str:
    """The message about a relative rounding error."""
    return f"rounding may have moved nc1 by up to {error:.0e} of it: {_UNEVEN}"


def _whitening(moments: ClassMoments) -> Iterator[Tensor]:
    """Rows ``v_j / s_j`` over the non-zero singular values ``s_j`` and right vectors ``v_j`` of ``centred``, in parts.

    Computed by eigendecompositions of the smaller of ``P x P`` and ``d x d``, largest values first; the subspace of far
    smaller values is decomposed again separately, so that they are as exact. Centring removes one dimension, so that at
    most ``P - 1`` values are kept, those with ``s_j^2 > max(P, d) eps s_1^2``.
    """
    centred = moments.centred
    classes, width = centred.shape
    wide = classes <= width
    block, basis, left, least = centred if wide else centred.T, None, min(classes - 1, width), 0.0
    gram = moments.gram if wide else block @ block.T
    while left:
        squares, vectors = torch.linalg.eigh(gram)
        least = least or max(classes, width) * _EPS * float(squares[-1].detach())
        first = len(squares) - left
        first += int((squares[first:] <= max(least, _CLOSE * float(squares[-1].detach()))).sum())
        if first == len(squares):
            return
        for start in range(first, len(squares), _ROWS):
            part = slice(start, start + _ROWS)
            rows = vectors[:, part].T
            if wide:
                yield rows @ block / squares[part, None]
            else:
                yield (rows if basis is None else rows @ basis) / squares[part, None].sqrt()
        left -= len(squares) - first
        rest = vectors[:, :first].T
        if wide:
            kept = (vectors[:, first:].T @ block) / squares[first:, None].sqrt()
            block = rest @ block
            block = block - block @ kept.T @ kept  # what rounding of the eigenvectors left of the larger directions
        else:
            block, basis = rest @ block, rest if basis is None else rest @ basis
        gram = block @ block.T


def nc1_ratio(moments: ClassMoments) -> Tensor:
    """``trace(Sigma_W) / trace(Sigma_B)``: within-class variability without regard to direction."""
    within = (moments.count * moments.variance).sum() / moments.count.sum()
    return within * len(moments.centred) / moments.centred.norm().square()


def cdnv_matrix(moments: ClassMoments) -> Tensor:
    """Class-distance normalised variance of each pair, ``(K, K)`` (Galanti et al. 2022, definition 1).

    ``(Var_i + Var_j) / (2 |mu_i - mu_j|^2)``, ``Var`` a mean over ``n_k`` samples. Symmetric; nan on the diagonal and
    for absent classes.
    """
    present = moments.labels
    matrix = moments.mean.new_full((len(moments.count), len(moments.count)), torch.nan)
    matrix[present[:, None], present] = _cdnv_pairs(moments).fill_diagonal_(torch.nan)
    return matrix


def _cdnv_pairs(moments: ClassMoments) -> Tensor:
    """CDNV of the pairs of present classes, ``(P, P)``; 0 on the diagonal."""
    norms, variance = moments.gram.diagonal(), moments.variance[moments.present]
    sums = norms[:, None] + norms
    distances = torch.sub(sums, moments.gram, alpha=2).fill_diagonal_(torch.inf)
    close = (distances < sums.mul_(_CLOSE)).nonzero()  # where the difference has lost its significant digits
    for first, second in zip(*(torch.split(side, _PAIRS) for side in close.unbind(1)), strict=True):
        distances[first, second] = (moments.centred[first] - moments.centred[second]).square().sum(1)
    return (variance[:, None] + variance).div_(distances.mul_(2))


def cdnv(moments: ClassMoments) -> Tensor:
    """Class-distance normalised variance, the mean over pairs of present classes (Galanti et al. 2022).

    Classes with the same mean give inf, and nan if they do not vary either.
    """
    pairs = _cdnv_pairs(moments)
    return pairs.sum() / (len(pairs) * (len(pairs) - 1))


def equinorm(moments: ClassMoments) -> Tensor:
    """NC2, equal norms: standard deviation (by ``P``) over mean of ``|mu_k - mu_G|`` (Papyan et al., fig. 2)."""
    norms = moments.centred.norm(dim=1)
    return norms.std(correction=0) / norms.mean()


def equiangularity(moments: ClassMoments) -> Tensor:
    """NC2, equal angles: mean of ``|cos(mu_k - mu_G, mu_l - mu_G) + 1/(P - 1)|`` over pairs (Papyan et al., fig. 4)."""
    cosines = cosine_matrix(moments)
    classes = len(cosines)
    off = cosines.add_(1 / (classes - 1)).abs().fill_diagonal_(0)
    return off.sum() / (classes * (classes - 1))


def cosine_matrix(moments: ClassMoments) -> Tensor:
    """Cosines between the present classes' centred means, ``(P, P)``; -1/(P - 1) off the diagonal at full collapse."""
    norms = moments.gram.diagonal().sqrt()
    return moments.gram / norms[:, None] / norms


def etf_distance(moments: ClassMoments) -> Tensor:
    """NC2 in one number: distance of the means' normalised Gram matrix to a simplex ETF's (Zhu et al. 2021)."""
    return _distance_to_etf(moments.gram)


# The metrics that are functions of class moments alone, by log name.
FAMILY: dict[str, Callable[[ClassMoments], Tensor]] = {
    "nc1": nc1,
    "nc1_ratio": nc1_ratio,
    "cdnv": cdnv,
    "nc2_equinorm": equinorm,
    "nc2_equiangularity": equiangularity,
    "nc2_etf": etf_distance,
}


def self_duality(moments: ClassMoments, weight: Tensor) -> Tensor:
    """NC3: ``|W/|W|_F - M/|M|_F|_F^2`` for the classifier's rows and the centred means (Papyan et al. 2020, fig. 5).

    Between 0 (aligned) and 4 (opposed). Rows of absent classes are left out.

    Args:
        moments: Moments of the features in front of the classifier.
        weight: The classifier's weight, ``(K, d)``.
    """
    rows = weight.double()[moments.present]
    scale = rows.norm() / moments.centred.norm()
    parts = zip(torch.split(rows, _ROWS), torch.split(moments.centred, _ROWS), strict=True)
    squares = [(row - scale * mean).square().sum() for row, mean in parts]
    return torch.stack(squares).sum() / rows.norm().square()


def self_duality_structure(moments: ClassMoments, weight: Tensor) -> Tensor:
    """NC3 by structure: distance of the normalised ``W M^T`` to a simplex ETF's Gram matrix (Zhu et al. 2021)."""
    return _distance_to_etf(weight.double()[moments.present] @ moments.centred.T)


def _distance_to_etf(products: Tensor) -> Tensor:
    classes = len(products)
    apart = (products / products.norm()).add_(
        1 / (classes * (classes - 1) ** 0.5)
    )  # minus the ETF's values off the diagonal
    apart.diagonal().sub_(1 / (classes - 1) ** 0.5)
    return apart.norm()


def nearest_mean(features: Tensor, moments: ClassMoments) -> Tensor:
    """Label of the nearest present class mean for each of features ``(N, d)``, ``(N,)``.

    Features are centred first: at an offset of 1e3 rounding makes float32 distances useless.
    """
    centred = features.double() - moments.global_mean
    return moments.labels[torch.cdist(centred, moments.centred).argmin(1)]


def disagreement(features: Tensor, moments: ClassMoments, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """NC4: the share of samples that the classifier and the nearest class mean decide differently (Papyan, fig. 7).

    Args:
        features: Features in front of the classifier, ``(N, d)``.
        moments: Class moments, fixed beforehand, such as those of the training set.
        weight: The classifier's weight, ``(K, d)``.
        bias: The classifier's bias, ``(K,)``; None only if it has none.
    """
    return disagreements(features, moments, weight, bias).double().mean()


def disagreements(features: Tensor, moments: ClassMoments, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Which samples `disagreement` counts, ``(N,)``."""
    logits = features.double() @ weight.double().T
    logits = logits if bias is None else logits + bias.double()
    return logits.argmax(1) != nearest_mean(features, moments)


def numerical_rank(features: Tensor, labels: Tensor, num_classes: int, centred: bool = False) -> Tensor:
    """Mean over present classes of ``|H_k|_F^2 / |H_k|_2^2`` (Li et al. 2022), ``H_k`` the class's features.

    Args:
        features: Features, ``(N, d)``.
        labels: Labels, ``(N,)``.
        num_classes: Number of classes ``K``.
        centred: Subtract the class mean first; the paper does not.
    """
    ranks = []
    for label in range(num_classes):
        rows = features[labels == label].double()
        if len(rows):
            rows = rows - rows.mean(0) if centred else rows
            ranks.append(rows.square().sum() / torch.linalg.matrix_norm(rows, 2).square())
    return torch.stack(ranks).mean()

"""Scores by which studies rank source models for a downstream task, without training any of them.

They stand beside the accuracy of a ridge head on images left out (`ncfinetune.scores`), which predicts what it is
called after; these are cheaper numbers that are only meant to order models.

Legend: ``N`` samples, ``K`` classes, ``d`` feature width, ``r = min(N, d)``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ncfinetune.inputs import as_indices

_EPS = torch.finfo(torch.float64).eps
# Neighbours and temperature of the weighted vote of Wu et al. 2018, as DINO's evaluation has them.
_NEIGHBOURS, _TEMPERATURE = 20, 0.07
# Rows whose similarities with all samples are held at a time.
_ROWS = 1024
# The fixed-point iteration of LogME ends at a relative change below the first, which takes some ten steps, or at the
# second.
_CHANGE, _STEPS = 1e-10, 500
# The least noise, and the inverse of the greatest, against the largest squared singular value: float64 tells no lower
# from none, and no higher from features that explain nothing.
_DECADES = 12
_RANGE = 10.0**-_DECADES


def h_score(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """H-score ``tr(Sigma^+ Sigma_B)`` (Bao et al. 2019, "An information-theoretic approach to transferability", eq. 4).

    ``Sigma`` is the covariance of the features, ``Sigma_B`` that of their class means, samples weighing alike in both.
    It lies between 0 and ``min(K - 1, d)``, and is at its highest whatever the features are where ``N <= d``, but that
    directions in which features vary by no more than the rounding of their type are left out.

        >>> labels = torch.arange(8) % 2
        >>> h_score(labels[:, None] + torch.tensor([[0.0]] * 4 + [[1.0]] * 4), labels, num_classes=2).item()
        0.5

    Args:
        features: ``(N, d)``, of any floating-point type.
        labels: Classes, ``(N,)``.
        num_classes: Number of classes ``K``.

    Returns:
        A float64 scalar on the device of the features.

    Raises:
        ValueError: Shapes that do not fit, labels out of range, or features that are not finite.
    """
    rows, labels = _checked(features, labels, num_classes)
    centred = rows - rows.mean(0)
    left, scales, right = torch.linalg.svd(centred, full_matrices=False)
    rounded = _rounding(rows, centred, right, torch.finfo(features.dtype).eps)
    left = left[:, scales > rounded.clamp(min=max(rows.shape) * _EPS * float(scales[0]))]
    count = labels.bincount(minlength=num_classes).clamp(min=1)
    sums = left.new_zeros(num_classes, left.shape[1]).index_add_(0, labels, left)
    return (sums.square().sum(1) / count).sum()


def _rounding(rows: Tensor, centred: Tensor, right: Tensor, eps: float) -> Tensor:
    """The largest singular value, ``(r,)``, that rounding of features ``(N, d)`` may have along directions ``(r, d)``.

    Rounding to a type is spread evenly over ``eps`` times a power of two up to the number, and changes a feature by no
    more than it varies: of a constant one by nothing. A random matrix has a largest singular value of about
    ``sqrt(N) + sqrt(d)`` times the standard deviation of its entries (Davidson and Szarek 2001, theorem 2.13).
    """
    number, width = rows.shape
    deviations = torch.minimum(eps * (rows.square().mean(0) / 12).sqrt(), centred.square().mean(0).sqrt())
    return (number**0.5 + width**0.5) * (right * deviations).norm(dim=1)


def logme(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """LogME: the log evidence a sample of Bayesian linear regression, the mean over one-against-all targets.

    The evidence of ``y ~ N(0, F F^T / alpha + I / beta)`` is maximised over ``alpha`` and ``beta`` by MacKay's fixed
    point, for all classes at once in the coordinates of one singular value decomposition (You et al. 2021, arXiv
    2102.11005, algorithm 1; the iteration in ``alpha/beta`` as You et al. 2022, arXiv 2110.10545). As there, features
    are not centred; since the evidence may then have several maxima in ``alpha/beta``, the iteration starts from the
    best of its powers of ten. Where features explain a target wholly the evidence may have no bound; ``alpha/beta``
    stays between 1e-12 and 1e12 of the largest squared singular value.

        >>> labels = torch.arange(60) % 2
        >>> noise = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> good, bad = noise + 4 * labels[:, None], noise
        >>> bool(logme(good, labels, num_classes=2) > logme(bad, labels, num_classes=2))
        True

    Args:
        features: ``(N, d)``, of any floating-point type.
        labels: Classes, ``(N,)``.
        num_classes: Number of classes ``K``; those without samples are left out.

    Returns:
        A float64 scalar on the device of the features.

    Raises:
        ValueError: As `h_score`.
    """
    rows, labels = _checked(features, labels, num_classes)
    targets = F.one_hot(labels, num_classes).double()
    targets = targets[:, targets.any(0)]
    left, scales, _ = torch.linalg.svd(rows, full_matrices=False)
    squares, loads = scales.square()[:, None], (left.T @ targets).square()
    outside = (targets.square().sum(0) - loads.sum(0)).clamp(min=0)
    samples, scale = len(rows), torch.where(squares[0] > 0, squares[0], 1.0)
    least, most = scale * _RANGE, scale / _RANGE
    tried = scale * torch.logspace(-_DECADES, _DECADES, 2 * _DECADES + 1, dtype=rows.dtype, device=rows.device)
    found = torch.stack([_evidence(one.expand_as(outside), squares, loads, outside, samples) for one in tried])
    ratio = tried[found.argmax(0)]
    for _ in range(_STEPS):
        shrunk = squares + ratio
        dof, norm = (squares / shrunk).sum(0), (squares * loads / shrunk.square()).sum(0)
        residual = (loads * (ratio / shrunk).square()).sum(0) + outside
        # alpha = dof / norm and beta = (samples - dof) / residual
        new = torch.where(norm > 0, dof * residual / (norm * (samples - dof)), torch.inf).clamp(least, most)
        change, ratio = ((new - ratio) / ratio).abs().max(), new
        if not change > _CHANGE:
            break
    # The iteration may leave the best of what was tried where the evidence is flat.
    evidence = torch.maximum(_evidence(ratio, squares, loads, outside, samples), found.amax(0))
    return (evidence / (2 * samples)).mean()


def _evidence(ratio: Tensor, squares: Tensor, loads: Tensor, outside: Tensor, samples: int) -> Tensor:
    """Twice the log evidence of each class at ``alpha/beta``, ``(K,)``, and the best ``alpha`` for that."""
    shrunk, rest = squares + ratio, samples - len(squares)
    # At the best alpha for a ratio, y^T (F F^T + ratio I)^-1 y = samples / alpha.
    energy = (loads / shrunk).sum(0) + outside / ratio
    return samples * ((samples / (2 * math.pi * energy)).log() - 1) - shrunk.log().sum(0) - rest * ratio.log()


def knn_accuracy(features: Tensor, labels: Tensor, num_classes: int, neighbours: int = _NEIGHBOURS) -> Tensor:
    """Share of samples that the weighted vote of their nearest others decides rightly; a tie is decided wrongly.

    Each of the ``neighbours`` that are most similar votes with ``exp(cosine / 0.07)`` (Wu et al. 2018, arXiv
    1805.01978, section 3.4). With fewer samples than that all others vote.

        >>> labels = torch.arange(10) % 2
        >>> knn_accuracy(torch.eye(2)[labels], labels, num_classes=2, neighbours=3).item()
        1.0

    Args:
        features: ``(N, d)``, of any floating-point type.
        labels: Classes, ``(N,)``.
        num_classes: Number of classes ``K``.
        neighbours: Samples that vote.

    Returns:
        A float64 scalar on the device of the features.

    Raises:
        ValueError: As `h_score`; also no neighbours, or a single sample.
    """
    rows, labels = _checked(features, labels, num_classes)
    if neighbours < 1 or len(rows) < 2:
        raise ValueError(
            f"expected at least one neighbour and two samples, got neighbours={neighbours} and {len(rows)}"
        )
    rows = rows / rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)  # whose squares are not 0
    rows, most = F.normalize(rows), min(neighbours, len(rows) - 1)
    right = rows.new_zeros(())
    for start in range(0, len(rows), _ROWS):
        part = slice(start, start + _ROWS)
        cosines = rows[part] @ rows.T
        own = torch.arange(len(cosines), device=cosines.device)
        cosines[own, own + start] = -torch.inf
        found = votes(cosines, labels, num_classes, most)
        truth = found.gather(1, labels[part, None])
        others = found.scatter(1, labels[part, None], -torch.inf)
        right += (truth > others.amax(1, keepdim=True)).sum()
    return right / len(rows)


def votes(cosines: Tensor, labels: Tensor, num_classes: int, neighbours: int) -> Tensor:
    """Sums of the votes of the nearest for their classes, ``(N, K)``, each ``exp((cosine - 1) / 0.07)``.

    Args:
        cosines: Of samples with those that vote, ``(N, M)``.
        labels: Labels of those that vote, ``(M,)``.
        num_classes: Number of classes ``K``.
        neighbours: How many vote, at most ``M``.
    """
    cosine, nearest = cosines.topk(neighbours, dim=1)
    sums = cosines.new_zeros(len(cosines), num_classes)
    return sums.scatter_add_(1, labels[nearest], ((cosine - 1) / _TEMPERATURE).exp())


def _checked(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(
            f"expected features (N, d) and labels (N,), got {tuple(features.shape)} and {tuple(labels.shape)}"
        )
    labels = as_indices(labels, features.device)
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        raise ValueError(f"expected labels from 0 to num_classes - 1 = {num_classes - 1}, got {lowest} to {highest}")
    if not bool(features.isfinite().all()):
        raise ValueError("expected finite features, got nan or inf")
    return features.double(), labels

"""Calibration of scores to probabilities by a temperature, the reliability diagram and the calibration error.

Legend: ``N`` samples, ``K`` classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Newton's method doubles the digits near the root; where it fails, halving the bracket 40 times gives 12 digits.
_STEPS = 40


def fit_temperature(scores: Tensor, labels: Tensor, repeats: int = 1) -> Tensor:
    """The temperature ``T`` for which ``softmax(scores / T)`` gives the labels the highest likelihood.

    Guo et al. 2017 (arXiv 1706.04599), section 4.2, on scores of held-out samples such as leave-one-out scores. The
    negative log-likelihood is convex in ``1/T``, and Newton's method within a bracket finds its minimum. If every label
    has the highest score there is no minimum; therefore each label is smoothed by ``1 / (n + 1)``, the weight of one
    sample, where ``n = N / repeats``, after Platt 1999 ("Probabilistic outputs for support vector machines", section
    2.2). Scores that are no better than chance give ``inf``, at which all classes are equally probable.

        >>> labels = torch.arange(100) % 2
        >>> scores = torch.stack([1 - labels, labels], 1) * 3.0
        >>> scores[:20] = scores[:20].flip(1)
        >>> temperature = fit_temperature(scores, labels)
        >>> round(torch.softmax(scores / temperature, 1).amax(1).mean().item(), 2)
        0.8

    Args:
        scores: ``(N, K)``. ``-inf`` rules a class out; samples whose own class is ruled out are left out.
        labels: Classes, ``(N,)``.
        repeats: How often each sample is among them.

    Returns:
        A float64 scalar on the device of the scores.

    Raises:
        ValueError: Shapes that do not fit, labels out of range, a score that is nan or ``inf``, or no sample whose
            class has a finite score.
    """
    scores, labels = checked_scores(scores, labels)
    own = scores.gather(1, labels[:, None])
    known = own.isfinite()
    if not bool(known.any()):
        raise ValueError("expected a sample whose own class has a score, got -inf for all of them")
    seen = scores.isfinite() & known
    share = repeats / (known.sum() + repeats)
    levels = torch.where(seen, scores - own.where(known, 0.0), 0.0)
    target = (
        share * levels.sum(1) / seen.sum(1).clamp(min=1)
    )  # mean of the scores less the own score, whose own term is 0
    scale = levels.square().sum().div(seen.sum()).sqrt()
    levels, target = levels / scale.where(scale > 0, 1.0), target / scale.where(scale > 0, 1.0)

    inverse, low, high = torch.ones_like(scale), torch.zeros_like(scale), torch.full_like(scale, torch.inf)
    for _ in range(_STEPS):
        slope, curvature = _derivatives(inverse, levels, seen, target)
        low, high = inverse.where(slope < 0, low), inverse.where(slope >= 0, high)
        halved = torch.where(high.isinf(), 4 * inverse, (low + high) / 2)
        newton = inverse - slope / curvature
        inverse = newton.where((newton > low) & (newton < high), halved)
    slope, _ = _derivatives(torch.zeros_like(scale), levels, seen, target)
    return torch.where(slope < 0, scale / inverse, torch.inf)


def _derivatives(inverse: Tensor, levels: Tensor, seen: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of the negative log-likelihood in ``1/T``: a mean less a target, and a variance."""
    probability = (inverse * levels).masked_fill(~seen, -torch.inf).softmax(1).nan_to_num(0)
    mean = (probability * levels).sum(1)
    variance = (probability * (levels - mean[:, None]).square()).sum(1)
    return (mean - target).sum(), variance.sum()


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """Expected calibration error: the mean over samples of |accuracy - confidence| of their bin of confidence.

    Guo et al. 2017 (arXiv 1706.04599), eq. 3: confidence is the highest probability; bins have equal width and exclude
    their lower end.

        >>> calibration_error(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1])).round(decimals=6).item()
        0.4

    Args:
        probabilities: ``(N, K)``.
        labels: Classes, ``(N,)``.
        bins: Number of bins.

    Returns:
        A float64 scalar on the device of the probabilities.

    Raises:
        ValueError: As `fit_temperature`; also probabilities outside 0..1, or no bins.
    """
    samples, confidence, accuracy = reliability(probabilities, labels, bins)
    return (samples * (accuracy - confidence).nan_to_num(0).abs()).sum() / samples.sum()


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """The reliability diagram: number of samples, mean confidence and accuracy of each bin of confidence.

    Guo et al. 2017 (arXiv 1706.04599), eqs. 1 and 2; confidence and bins are those of `calibration_error`.

        >>> samples, confidence, accuracy = reliability(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]), 2)
        >>> samples.tolist(), round(confidence[1].item(), 6), accuracy.tolist()
        ([0.0, 2.0], 0.8, [nan, 0.5])

    Args:
        probabilities: ``(N, K)``.
        labels: Classes, ``(N,)``.
        bins: Number of bins.

    Returns:
        Three float64 tensors ``(bins,)`` on the device of the probabilities; means of an empty bin are nan.

    Raises:
        ValueError: As `calibration_error`.
    """
    probabilities, labels = checked_scores(probabilities, labels)
    if bins < 1:
        raise ValueError(f"expected at least one bin, got {bins}")
    if not bool(((probabilities >= 0) & (probabilities <= 1 + 1e-6)).all()):
        raise ValueError("expected probabilities from 0 to 1, got values outside: take the softmax of logits first")
    confidence, decision = probabilities.max(1)
    members = (confidence * bins).ceil().long().sub_(1).clamp_(0, bins - 1)
    sums = torch.zeros(3, bins, dtype=torch.float64, device=confidence.device)
    for row, values in zip(sums, (torch.ones_like(confidence), confidence, (decision == labels).double()), strict=True):
        row.index_add_(0, members, values)
    return sums[0], sums[1] / sums[0], sums[2] / sums[0]


def checked_scores(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scores ``(N, K)`` in float64 and labels ``(N,)`` as int64 on their device.

    Raises:
        ValueError: Shapes that do not fit, no samples, labels out of range, or a score that is nan or ``inf``.
    """
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not len(labels):
        raise ValueError(f"expected scores (N, K) and labels (N,), got {tuple(scores.shape)} and {tuple(labels.shape)}")
    labels, classes = labels.to(scores.device).long(), scores.shape[1]
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= classes:
        raise ValueError(f"expected labels from 0 to {classes - 1}, got {lowest} to {highest}")
    if not bool((scores < torch.inf).all()):
        raise ValueError("expected scores that are finite or -inf, got nan or inf")
    return scores.double(), labels

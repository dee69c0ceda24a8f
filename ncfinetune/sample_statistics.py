"""How sure an accuracy, a difference and a rank correlation of few samples are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

# Up to this many points all orders are counted: 40,320 take a few milliseconds.
_COUNTED = 8
# Standard deviations of the normal distribution within which 95 % lie.
_Z = NormalDist().inv_cdf(0.975)


def wilson(share: float, samples: int) -> tuple[float, float]:
    """95 % score interval of a share of independent samples (Wilson 1927, J. Am. Stat. Assoc. 22, p. 209-212).

    Args:
        share: The observed share, from 0 to 1.
        samples: Number of samples.
    """
    centre = share + _Z**2 / (2 * samples)
    half = _Z * math.sqrt(share * (1 - share) / samples + (_Z / (2 * samples)) ** 2)
    scale = 1 + _Z**2 / samples
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def standard_error(share: float, samples: int) -> float:
    """Standard error of a share of so many samples, which is not 0 where all or none of them count.

    ``sqrt(p (1 - p) / (N + 4))`` with two successes and two failures added to the share ``p`` (Agresti, Coull 1998).
    """
    moved = (share * samples + 2) / (samples + 4)
    return math.sqrt(moved * (1 - moved) / (samples + 4))


def paired(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean and standard deviation (n - 1) of paired differences, and the two-sided p of Student's paired t-test.

    The deviation of a single difference, and p where all differences are the same, are nan: there t is undefined.
    """
    values = np.asarray(differences, dtype=np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, math.nan, math.nan
    deviation = float(values.std(ddof=1))
    # Differences of accuracies that are the same but for rounding are no evidence of anything.
    if not deviation > 1e-9 * np.abs(values).max():
        return mean, deviation, math.nan
    t = mean / (deviation / math.sqrt(len(values)))
    return mean, deviation, _two_sided(t, len(values) - 1)


def spearman(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Spearman's rank correlation with mid-ranks for ties, and its two-sided p.

    p is exact up to 8 points, the share of all orders of ``y`` that correlate as strongly; beyond that it is that of
    Student's t with n - 2 degrees of freedom. Both are nan below 3 points or where one side is constant.
    """
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan, math.nan
    ranks = [_ranks(values) - (len(values) + 1) / 2 for values in (x, y)]
    norm = math.sqrt(float((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    rho = float(ranks[0] @ ranks[1]) / norm
    if len(x) > _COUNTED:
        degrees = len(x) - 2
        t = abs(rho) * math.sqrt(degrees / max(1 - rho**2, 1e-300))
        return rho, _two_sided(t, degrees)
    orders = np.array(list(itertools.permutations(ranks[1])))
    return rho, float((np.abs(orders @ ranks[0]) / norm >= abs(rho) - 1e-12).mean())


def _two_sided(t: float, degrees: int) -> float:
    """How likely Student's t is to be as far from 0."""
    # Imported here alone: it takes half a second, and a report of single runs has no use for it.
    from scipy.special import stdtr

    return float(2 * stdtr(degrees, -abs(t)))


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, those of equal values their mean."""
    _, which, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[which]

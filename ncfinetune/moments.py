"""Class moments of features, of which the metrics of neural collapse are functions.

Legend: ``N`` samples, ``K`` classes, ``d`` feature width; ``mu_k`` class means, ``mu_G`` the mean of the class means.
Everything is in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ncfinetune.inputs import NonFiniteFeaturesError as NonFiniteFeaturesError
from ncfinetune.scatter import ROUNDING, ShiftedScatter, sum_of_products

# Samples whose sums are added at once, at least, where there are as many.
_FLUSHED = 2048


class UndefinedCollapseError(ValueError):
    """Fewer than two classes have samples, so that there is no between-class variance."""


class UnresolvedCollapseError(UndefinedCollapseError):
    """The rounding error of a number may exceed the promised accuracy."""


@dataclass(frozen=True)
class ClassMoments:
    """First and second moments of features, class by class.

    Args:
        count: Samples per class, ``(K,)``.
        mean: Class means, ``(K, d)``; zero for absent classes.
        variance: Mean squared distance to the class mean, ``(K,)``.
        within: ``Sigma_W``, the mean over samples of ``(h - mu_k)(h - mu_k)^T``, ``(d, d)``; or None.
        scatter: ``Sigma_W`` in an accumulator's form, not as a dense matrix.
        apart: Class means less a point near them, ``(K, d)``: how they lie to each other, however far from the origin;
            None where that is known from ``mean`` alone.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor
    within: Tensor | None
    scatter: ShiftedScatter | None = None
    apart: Tensor | None = None

    def to(self, device: torch.device | str) -> ClassMoments:
        """The moments on another device, with a dense ``within``."""
        within = self.scatter.written_out() if self.within is None and self.scatter is not None else self.within
        within = None if within is None else within.to(device)
        scatter = None if self.scatter is None else self.scatter.to(device)
        apart = None if self.apart is None else self.apart.to(device)
        count, mean, variance = (part.to(device) for part in (self.count, self.mean, self.variance))
        return ClassMoments(count, mean, variance, within, scatter, apart)

    @property
    def present(self) -> Tensor:
        """Which classes have samples, ``(K,)``."""
        return self.count > 0

    @cached_property
    def labels(self) -> Tensor:
        """Labels of the present classes, ``(P,)``."""
        return self.present.nonzero().squeeze(1)

    @property
    def global_mean(self) -> Tensor:
        """``mu_G``, the mean of the present classes' means, ``(d,)``; of balanced samples, their mean."""
        return self.mean.sum(0) / self.present.sum()  # the means of absent classes are zero

    @cached_property
    def centred(self) -> Tensor:
        """Present classes' means less ``mu_G``, ``(P, d)``; 0 where they agree up to the rounding of the means.

        Raises:
            UndefinedCollapseError: Fewer than two classes are present.
        """
        present = int(self.present.sum())
        if present < 2:
            raise UndefinedCollapseError(
                f"expected samples of at least two classes, got {present}: collapse is undefined"
            )
        means = self._near[self.present]
        size = means.detach().abs().amax(0)
        if self.apart is not None:  # whose rounding is that of the samples around them too
            size = size + ((self.count * self.variance).sum() / self.count.sum()).sqrt().detach()
        centred = means - means.mean(0)
        return centred.masked_fill(centred.detach().abs() <= 2.0**-50 * size, 0)  # four units in the last place

    @property
    def _near(self) -> Tensor:
        """Class means, or these less a point near them, ``(K, d)``."""
        return self.mean if self.apart is None else self.apart

    @cached_property
    def gram(self) -> Tensor:
        """Products of the present classes' centred means with each other, ``(P, P)``."""
        return self.centred @ self.centred.T

    @property
    def between(self) -> Tensor:
        """``Sigma_B``, the mean over present classes of ``(mu_k - mu_G)(mu_k - mu_G)^T``, ``(d, d)``."""
        return self.centred.T @ self.centred / len(self.centred)

    def spread(self, rows: Tensor) -> Tensor:
        """``trace(R Sigma_W R^T)`` of rows ``R``, ``(m, d)``.

        Raises:
            ValueError: The moments lack the within-class covariance.
        """
        if self.scatter is not None:
            return self.scatter.spread(rows)
        if self.within is None:
            raise ValueError("nc1 needs moments with the within-class covariance, got moments with within=None")
        return torch.tensordot(rows @ self.within, rows)

    def rounding_error(self, rows: Tensor, spread: Tensor) -> Tensor:
        """Estimate of the rounding error of ``spread(rows)``, for rows that whiten ``centred``, on the large side.

        It is eight standard deviations of that of the products, whose tails are long where few features have most of
        it, and four of what rounding of the class means adds. In feature ``i`` that is ``e_i`` (`_of_means`); it
        changes rows ``T`` by ``T E T``, within the space of the class means, and a row ``t_j`` of length ``1 / s_j`` by
        ``e_i / s_j^2`` outside it, which adds its variance.
        """
        outside = self._turning * rows.square().sum(1).square().sum().sqrt()
        inside = (rows * self._of_means).norm()
        if self.scatter is not None:
            products = self.scatter.rounding_error(rows)
        else:
            products = ((rows * self._variances) @ rows.T).norm() * ROUNDING[torch.float64]
        return 8 * products + 4 * (2 * outside * spread.sqrt() + outside.square() + 2 * inside * spread)

    @cached_property
    def _variances(self) -> Tensor:
        """The diagonal of ``Sigma_W``, ``(d,)``; 0 if that is unknown."""
        if self.scatter is not None:
            return self.scatter.diagonal().detach()
        return self.mean.new_zeros(()) if self.within is None else self.within.diagonal().detach()

    @cached_property
    def _of_means(self) -> Tensor:
        """Norm over classes of the rounding of the class means, ``(d,)``.

        A mean is rounded at its own size, and its sum at that of its terms, once for some `_FLUSHED` samples: their
        errors grow with the root of the number of sums.
        """
        terms = self._variances if self.scatter is None else self.scatter.squares()
        sums = len(self.centred) * (1 + self.count.sum() / _FLUSHED)
        return ROUNDING[torch.float64] * (self._near.detach().square().sum(0) + sums * terms).sqrt()

    @cached_property
    def _turning(self) -> Tensor:
        """``(sum_i e_i^2 Sigma_W,ii)^(1/2)`` of `rounding_error`."""
        return (self._of_means.square() * self._variances).sum().sqrt()


def class_moments(features: Tensor, labels: Tensor, num_classes: int) -> ClassMoments:
    """Moments of features ``(N, d)`` with labels ``(N,)``, in two passes over them."""
    features, labels = features.double(), labels.long()
    count = torch.zeros(num_classes, dtype=torch.float64, device=features.device)
    count.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
    present = (count > 0)[:, None]
    origin = features.detach()[0] if len(features) else features.new_zeros(features.shape[1])
    features = features - origin
    apart = features.new_zeros(num_classes, features.shape[1])
    for _ in range(2):  # the second time adds what rounding of the first sums has lost
        residual = features - apart[labels]
        apart = apart + torch.zeros_like(apart).index_add_(0, labels, residual) / count.clamp(min=1)[:, None]
    residual = features - apart[labels]
    squares = torch.zeros_like(count).index_add_(0, labels, residual.square().sum(1))
    within = sum_of_products(residual) / max(len(features), 1)
    mean = torch.where(present, origin + apart, 0)
    return ClassMoments(count, mean, squares / count.clamp(min=1), within, None, apart)


def merge(a: ClassMoments, b: ClassMoments) -> ClassMoments:
    """Moments of the samples of ``a`` and ``b`` together (Chan, Golub, LeVeque 1979, eq. 1.5)."""
    count = a.count + b.count
    share = b.count / count.clamp(min=1)
    step = (b.mean - a.mean) * (a.present & b.present)[:, None]
    mean = torch.where(a.present[:, None], a.mean + share[:, None] * step, b.mean)
    weight = a.count * share
    squares = a.count * a.variance + b.count * b.variance + weight * step.square().sum(1)
    within = None
    if a.within is not None and b.within is not None:
        scatter = a.count.sum() * a.within + b.count.sum() * b.within + (weight[:, None] * step).T @ step
        within = scatter / count.sum().clamp(min=1)
    return ClassMoments(count, mean, squares / count.clamp(min=1), within)

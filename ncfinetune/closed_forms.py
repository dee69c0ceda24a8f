"""The algebra of closed-form classifiers: the fits of `ncfinetune.probes`, and their leave-one-out scores.

Input is not checked here. Rows are processed in chunks, so that large features are never copied as a whole.

Legend: ``N`` samples, ``n`` of them at a time, ``K`` classes, ``d`` feature width, ``L`` strengths of regularisation,
``r = min(N, d)``; ``w_i`` weights of samples and ``W`` their sum, ``W_k`` a class's; ``mu_k`` class means, ``m`` the
mean of the samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = torch.finfo(torch.float64).eps
# Rows per chunk: intermediate results stay small relative to the features, and products of fewer rows are slower.
_ROWS = 4096
# Columns of a product: a product with K = 37 columns runs at a third of the speed of one with this many.
_COLUMNS = 2048
# Columns of a block of a symmetric product, of which only the blocks on and above the diagonal are formed.
_BLOCK = 256


class Curve(NamedTuple):
    """Leave-one-out loss and error at each strength of regularisation.

    Args:
        lams: Strengths, ``(L,)``.
        loss: The loss by which a strength is chosen, ``(L,)``: squared error against one-hot targets, summed over
            classes, for `ridge`; negative log-likelihood for `lda`.
        error: Share of misclassified samples, ``(L,)``.
    """

    lams: Tensor
    loss: Tensor
    error: Tensor


@dataclass(frozen=True)
class Samples:
    """Checked input: features ``(N, d)`` in any dtype, labels, weights ``(N,)``, means of features and targets.

    ``equal`` says that all weights are 1.
    """

    features: Tensor
    labels: Tensor
    weight: Tensor
    mean: Tensor
    share: Tensor
    present: int
    equal: bool = False

    def parts(self) -> Iterator[slice]:
        """The rows in chunks."""
        return row_parts(len(self.labels))

    def centred(self, part: slice | Tensor = slice(None)) -> Tensor:
        """Rows less their mean, ``(n, d)``."""
        return self.features[part].double() - self.mean

    def rooted(self, part: slice | Tensor = slice(None)) -> Tensor:
        """Rows less their mean and times the square root of their weight, ``(n, d)``."""
        return self.centred(part) if self.equal else self.centred(part).mul_(self.weight[part, None].sqrt())

    def targets(self, part: slice = slice(None)) -> Tensor:
        """One-hot targets, ``(n, K)``."""
        return F.one_hot(self.labels[part], len(self.share)).double()


def row_parts(rows: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, rows, _ROWS))


def _scatter(rows: Iterator[Tensor], like: Tensor) -> Tensor:
    """Sum of ``rows^T rows``, ``(d, d)``; only entries on and above the diagonal are computed."""
    total = like.new_zeros(len(like), len(like))
    for some in rows:
        for start in range(0, len(like), _BLOCK):
            columns = slice(start, start + _BLOCK)
            total[columns, start:].addmm_(some[:, columns].T, some[:, start:])
    return total


@dataclass(frozen=True)
class Spectrum:
    """Ridge regression of weighted, centred features in the coordinates in which it is diagonal.

    ``dual`` has the eigenvectors of ``Z Z^T``, ``(N, r)``, the primal those of ``Z^T Z``, ``(d, r)``, of features ``Z``
    that are centred and multiplied by ``sqrt(w_i)``. Residuals are ``rest * targets + rows @ (filter * loadings)``
    in both; in the dual, where the fit nearly interpolates, nothing is subtracted, so that no digits are lost.
    """

    dual: bool
    basis: Tensor
    values: Tensor
    loadings: Tensor

    def rows(self, fit: Samples, part: slice | Tensor) -> Tensor:
        """Rows in these coordinates, ``(n, r)``."""
        return self.basis[part] if self.dual else fit.rooted(part) @ self.basis

    def factor(self, fit: Samples, part: slice | Tensor, lam: Tensor) -> Tensor:
        """Rows of ``Z``, ``(n, r + 1)``, where ``Z Z^T`` is the hat matrix of the fit, which counts the bias."""
        inverse = 1 / (self.values + lam)
        rows = self.rows(fit, part) * (self.values * inverse if self.dual else inverse).sqrt()
        return torch.cat([rows, (fit.weight[part, None] / fit.weight.sum()).sqrt()], 1)

    def filters(self, lams: Tensor) -> Tensor:
        """Factors ``(L, r)`` that take loadings to residuals."""
        inverse = 1 / (self.values + lams[:, None])
        return lams[:, None] * inverse if self.dual else -inverse

    def weight(self, fit: Samples, lam: Tensor) -> Tensor:
        """The regression's weight, ``(K, d)``."""
        linear = self.basis @ (self.loadings / (self.values + lam)[:, None])
        return linear.T @ fit.rooted() if self.dual else linear.T

    def residuals(self, fit: Samples, weight: Tensor, lam: Tensor) -> Tensor:
        """Targets less fitted scores, ``(N, K)``."""
        if self.dual:
            return self.basis @ (self.filters(lam[None])[0, :, None] * self.loadings) / fit.weight.sqrt()[:, None]
        fitted = torch.cat([fit.centred(part) @ weight.T for part in fit.parts()])
        return fit.targets().sub_(fit.share).sub_(fitted)


def primal(fit: Samples) -> Spectrum:
    sums = fit.mean.new_zeros(len(fit.share), len(fit.mean))

    def added() -> Iterator[Tensor]:
        """Rows of the scatter, added to the sums of their classes on the way."""
        for part in fit.parts():
            rows = fit.rooted(part)
            sums.index_add_(0, fit.labels[part], rows if fit.equal else rows * fit.weight[part, None].sqrt())
            yield rows

    values, basis = torch.linalg.eigh(_scatter(added(), fit.mean), UPLO="U")
    return Spectrum(False, basis, values.clamp(min=0), (sums @ basis).T)


def dual_form(fit: Samples) -> Spectrum:
    rows, root = fit.rooted(), fit.weight.sqrt()[:, None]
    gram = rows @ rows.T
    # The bias's direction is an eigenvector of eigenvalue 0. With the largest eigenvalue it comes last and is left out.
    trace = gram.trace()
    gram += (root * (2 * trace.where(trace > 0, 1.0) / fit.weight.sum())) @ root.T
    values, basis = torch.linalg.eigh(gram)
    values, basis = values[:-1].clamp(min=0), basis[:, :-1]
    return Spectrum(True, basis, values, basis.T @ (root * (fit.targets() - fit.share)))


def ridge_curve(fit: Samples, spectrum: Spectrum, lams: Tensor) -> tuple[Curve, Tensor]:
    """Loss and error at each strength, and one minus the leverage of each sample, ``(N, L)``."""
    filters, classes = spectrum.filters(lams), len(fit.share)
    slack, loss, error = filters.new_empty(len(fit.labels), len(lams)), torch.zeros_like(lams), torch.zeros_like(lams)
    together = max(1, _COLUMNS // classes)
    for part in fit.parts():
        rows, root, own = spectrum.rows(fit, part), fit.weight[part].sqrt(), fit.labels[part, None, None]
        rest = 0.0 if spectrum.dual else 1 - fit.weight[part, None] / fit.weight.sum()
        left = slack[part] = (rows.square() @ filters.T).add_(rest).clamp_(min=_EPS)
        for some in (slice(start, start + together) for start in range(0, len(lams), together)):
            maps = filters[some].T[:, :, None] * spectrum.loadings[:, None]
            residuals = (rows @ maps.flatten(1)).view(len(rows), -1, classes)
            if not spectrum.dual:
                residuals += (fit.targets(part).sub_(fit.share) * root[:, None])[:, None]
            # Divided by ``left`` and ``root`` these are the leave-one-out residuals, which all following lines use.
            loss[some] += (torch.linalg.vector_norm(residuals, dim=2) / left[:, some]).square().sum(0)
            of_own = residuals.gather(2, own.expand(-1, residuals.shape[1], 1)).squeeze(2)
            lowest = residuals.scatter_(2, own.expand(-1, residuals.shape[1], 1), torch.inf).amin(2)
            wrong = of_own - lowest >= left[:, some] * root[:, None]
            error[some] += fit.weight[part] @ wrong.double()
    return Curve(lams, loss / fit.weight.sum(), error / fit.weight.sum()), slack


@dataclass(frozen=True)
class Groups:
    """Classes: weights ``W_k`` and the sums of squared weights, ``(K,)``, and means less ``m``, ``(K, d)``."""

    weight: Tensor
    squares: Tensor
    means: Tensor

    @classmethod
    def of(cls, fit: Samples) -> Groups:
        """The classes of a fit; an absent one's mean is ``m``."""
        weight = torch.zeros_like(fit.share).index_add_(0, fit.labels, fit.weight)
        squares = torch.zeros_like(fit.share).index_add_(0, fit.labels, fit.weight.square())
        # Less a sample of the class, so that the mean of samples that are all the same is exact.
        numbers = torch.arange(len(fit.labels), device=fit.labels.device)
        first = numbers.new_zeros(len(weight)).scatter_reduce(0, fit.labels, numbers, "amin", include_self=False)
        one = fit.features[first].double() - fit.mean
        sums = torch.zeros_like(one)
        for part in fit.parts():
            labels = fit.labels[part]
            sums.index_add_(0, labels, (fit.centred(part) - one[labels]) * fit.weight[part, None])
        present = (weight > 0)[:, None]
        return cls(weight, squares, (one + sums / weight[:, None]).where(present, 0.0))

    @property
    def freedom(self) -> Tensor:
        """Divisor of each class's scatter for an unbiased covariance, ``(K,)``: ``n_k - 1`` without weights."""
        return self.weight - self.squares / self.weight.where(self.weight > 0, 1.0)


class _Without(NamedTuple):
    """Changes if one sample is left out, each ``(n,)``, in terms of the residual ``h - mu_k`` of its class.

    Args:
        alone: Whether the class becomes empty.
        reach: Factor of the distance to its class's mean.
        loss: Weight of ``(h - mu_k)(h - mu_k)^T`` in the decrease of the scatter.
        freedom: The scatter's divisor.
        shift: Factor of the distance to the mean ``m``.
    """

    alone: Tensor
    reach: Tensor
    loss: Tensor
    freedom: Tensor
    shift: Tensor

    @classmethod
    def of(cls, fit: Samples, groups: Groups, part: slice) -> _Without:
        own, classes = fit.weight[part], fit.labels[part]
        before, squares, total = groups.weight[classes], groups.squares[classes], groups.weight.sum()
        after = before - own
        alone = after <= _EPS * before
        after = after.where(~alone, 1.0)
        reach = (before / after).masked_fill(alone, 0)
        left = (after - (squares - own.square()) / after).masked_fill(alone, 0)
        freedom = groups.freedom.sum() - groups.freedom[classes] + left
        return cls(alone, reach, own * reach, freedom, total / (total - own))


def nearest_left_out(fit: Samples, groups: Groups, part: slice) -> Tensor:
    """Scores by the means without the sample, ``(n, K)``."""
    rows, own, without = fit.centred(part), fit.labels[part, None], _Without.of(fit, groups, part)
    norms = rows.square().sum(1)
    distances = norms[:, None] - 2 * rows @ groups.means.T + groups.means.square().sum(1)
    to_own = (rows - groups.means[own.squeeze(1)]).square().sum(1) * without.reach.square()
    scores = (without.shift.square() * norms)[:, None] - distances.scatter(1, own, to_own[:, None])
    return _never(scores / 2, groups, own, without)


def _never(scores: Tensor, groups: Groups, own: Tensor, without: _Without) -> Tensor:
    """Scores with ``-inf`` for absent classes, and for a sample's class if it has no other sample."""
    scores = scores.masked_fill(groups.weight == 0, -torch.inf)
    return scores.scatter(1, own, scores.gather(1, own).masked_fill(without.alone[:, None], -torch.inf))


def centred_bias(weight: Tensor, fit: Samples, groups: Groups) -> Tensor:
    """The bias for weights of centred features: ``-w_k (m + (mu_k - m) / 2)``."""
    return -(weight * (fit.mean + groups.means / 2)).sum(1)


def margins(scores: Tensor, labels: Tensor) -> Tensor:
    """Each sample's score for its class less its highest score for another class, ``(N,)``."""
    own = labels[:, None]
    return scores.gather(1, own).squeeze(1) - scores.scatter(1, own, -torch.inf).amax(1)


def within(fit: Samples, groups: Groups) -> tuple[Tensor, Tensor]:
    """Eigenvectors ``(d, r)`` of the scatter within classes and eigenvalues ``(r,)``.

    The vectors span all samples, so that distances to means can be taken in these coordinates.
    """
    span = torch.linalg.qr(fit.centred().T)[0] if len(fit.labels) < len(fit.mean) else None

    def residuals() -> Iterator[Tensor]:
        for part in fit.parts():
            rows = (fit.centred(part) - groups.means[fit.labels[part]]) * fit.weight[part, None].sqrt()
            yield rows if span is None else rows @ span

    scatter = _scatter(residuals(), fit.mean if span is None else span[0])
    values, vectors = torch.linalg.eigh(scatter, UPLO="U")
    return vectors if span is None else span @ vectors, values.clamp(min=0)


@dataclass(frozen=True)
class Gaussians:
    """Classes of one covariance, in coordinates ``(d, r)`` in which the scatter within classes is diagonal."""

    fit: Samples
    groups: Groups
    basis: Tensor
    values: Tensor

    def weight(self, lam: Tensor) -> Tensor:
        """``S_lam^-1 (mu_k - m)``, ``(K, d)``."""
        shrunk = (1 - lam) * self.values + lam * self.values.sum() / len(self.fit.mean)
        return self.groups.freedom.sum() * (self.groups.means @ self.basis / shrunk) @ self.basis.T

    def left_out(self, rows: Tensor, part: slice, lam: Tensor) -> Tensor:
        """Scores by the classifier without the sample, ``(n, K)``, of rows in these coordinates, ``(n, r)``.

        The scatter without sample i is ``(1 - lam) (A - c e e^T) + lam t_i I`` with the eigenvalues ``A``, ``e = h -
        mu_y`` and the trace ``t_i``, inverted by Sherman and Morrison (1950).
        """
        without, own = _Without.of(self.fit, self.groups, part), self.fit.labels[part, None]
        means, total, width = self.groups.means @ self.basis, self.groups.weight.sum(), len(self.fit.mean)
        residual = rows - means[own.squeeze(1)]
        trace = self.values.sum() - without.loss * residual.square().sum(1)
        trace = trace.clamp(min=_EPS * self.values.sum())
        inverse = 1 / ((1 - lam) * self.values + (lam * trace / width)[:, None])
        scaled, loss = inverse * residual, (1 - lam) * without.loss
        own_square = (scaled * residual).sum(1)
        remainder = (1 - loss * own_square).clamp(min=_EPS)
        along, downdate = (scaled * rows).sum(1), loss / remainder
        norms = (inverse * rows * rows).sum(1)
        distances = norms[:, None] - 2 * (inverse * rows) @ means.T + inverse @ means.square().T
        distances += downdate[:, None] * (along[:, None] - scaled @ means.T).square()
        distances.scatter_(1, own, (without.reach.square() * own_square / remainder)[:, None])
        to_mean = without.shift.square() * (norms + downdate * along.square())
        left = self.fit.targets(part).mul_(-self.fit.weight[part, None]).add_(self.groups.weight).clamp_(min=0)
        shares = (left / (total - self.fit.weight[part])[:, None]).log()
        return _never(without.freedom[:, None] * (to_mean[:, None] - distances) / 2 + shares, self.groups, own, without)

    def curve(self, lams: Tensor) -> Curve:
        """Negative log-likelihood and error at each shrinkage; the only sample of a class counts in the error only."""
        loss, error, counted = torch.zeros_like(lams), torch.zeros_like(lams), lams.new_zeros(())
        for part in self.fit.parts():
            rows, labels, weight = self.fit.centred(part) @ self.basis, self.fit.labels[part], self.fit.weight[part]
            weight_known = weight.masked_fill(_Without.of(self.fit, self.groups, part).alone, 0)
            counted += weight_known.sum()
            for index, lam in enumerate(lams):
                scores = self.left_out(rows, part, lam)
                error[index] += (weight * (margins(scores, labels) <= 0)).sum()
                likelihood = F.nll_loss(scores.log_softmax(1), labels, reduction="none")
                loss[index] += (weight_known * likelihood.where(weight_known > 0, 0.0)).sum()
        return Curve(lams, loss / counted, error / self.fit.weight.sum())

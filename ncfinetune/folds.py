"""Cross-validation from class sums and second moments per fold, without keeping features.

Two numbers of a held-out fold follow exactly from these sums: its NC1 around the class means of the other folds, and
its squared error under ridge regression fitted to the other folds. Accuracy is not a function of sums; neither are
leave-one-out scores or a temperature. For these `ncfinetune.probes` takes the features themselves, and `folds_of` and
`balanced_folds` tell the folds.

Legend: ``K`` classes, ``d`` feature width, ``F`` folds, ``L`` strengths; of a fold ``n`` counts ``(K,)``, ``s`` class
sums ``(K, d)``, ``S`` the second moment ``(d, d)``; of the other folds ``N``, means ``mu``, mean ``m``, shares ``p``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ncfinetune.inputs import as_indices

_EPS = torch.finfo(torch.float64).eps


class _State(NamedTuple):
    """Sums of features less ``shift``, per fold, and whether a label was out of range."""

    shift: Tensor
    counts: Tensor
    sums: Tensor
    squares: Tensor
    broken: Tensor


class HeldOut(NamedTuple):
    """Ridge regression chosen by cross-validation.

    Args:
        weight: Weight fitted to all folds at the chosen strength, ``(K, d)``.
        bias: Its bias, ``(K,)``.
        lam: The strength with the least squared error.
        lams: Strengths, ``(L,)``.
        squared_error: Mean over samples of the held-out squared error, summed over classes, ``(L,)``.
    """

    weight: Tensor
    bias: Tensor
    lam: Tensor
    lams: Tensor
    squared_error: Tensor


class FoldMoments:
    """Class sums and second moments of features, accumulated batch by batch for each fold.

    The rows of a batch are assigned to folds in turn, in the order of their labels and from a random first fold, so
    that each class is spread over the folds. The state is ``(F, K, d)`` and ``(F, d, d)`` in float64 on the device of
    the first batch; updates do not synchronise. The first batch's mean is subtracted from all features, so that a
    common offset costs no digits.

        >>> moments = FoldMoments(num_classes=3)
        >>> generator = torch.Generator().manual_seed(0)
        >>> for _ in range(10):
        ...     labels = torch.randint(0, 3, (32,), generator=generator)
        ...     moments.update(torch.eye(3, 8)[labels] + 0.1 * torch.randn(32, 8, generator=generator), labels)
        >>> head = moments.ridge()
        >>> head.weight.shape, bool(head.squared_error.min() < 0.1), bool(moments.nc1() > 0)
        (torch.Size([3, 8]), True, True)

    Args:
        num_classes: Number of classes ``K``.
        folds: Number of folds ``F``.

    Raises:
        ValueError: Fewer than two classes or folds.
    """

    def __init__(self, num_classes: int, folds: int = 5) -> None:
        if num_classes < 2 or folds < 2:
            raise ValueError(f"expected at least two classes and two folds, got {num_classes} and {folds}")
        self.num_classes, self.folds = num_classes, folds
        self._random = random.Random(0)
        self._state: _State | None = None

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add features ``(n, d)`` with labels ``(n,)``.

        Raises:
            ValueError: Shapes that do not fit.
        """
        if features.ndim != 2 or labels.shape != features.shape[:1]:
            raise ValueError(
                f"expected features (N, d) and labels (N,), got {tuple(features.shape)} and {tuple(labels.shape)}"
            )
        if not len(features):
            return
        with torch.inference_mode(False), torch.no_grad():
            self._add(features.detach().double(), as_indices(labels, features.device))

    def _add(self, features: Tensor, labels: Tensor) -> None:
        if self._state is None:
            self._state = self._empty(features)
        shift, count, sums, squares, broken = self._state
        if features.shape[1] != len(shift):
            raise ValueError(f"expected features of width {len(shift)} as before, got {features.shape[1]}")
        broken |= (labels < 0).any() | (labels >= self.num_classes).any()
        order = labels.argsort(stable=True)
        rows, labels = features[order] - shift, labels[order].clamp(0, self.num_classes - 1)
        start = self._random.randrange(self.folds)
        for fold in range(self.folds):
            part = slice((fold + start) % self.folds, None, self.folds)
            count[fold].index_add_(0, labels[part], torch.ones_like(labels[part], dtype=torch.float64))
            sums[fold].index_add_(0, labels[part], rows[part])
            squares[fold] += rows[part].T @ rows[part]  # apart from the sum, at whose size terms would be rounded

    def _empty(self, features: Tensor) -> _State:
        width = features.shape[1]
        count = features.new_zeros(self.folds, self.num_classes)
        sums, squares = count.new_zeros(*count.shape, width), count.new_zeros(self.folds, width, width)
        broken = torch.zeros((), dtype=torch.bool, device=features.device)
        return _State(features.mean(0), count, sums, squares, broken)

    def nc1(self) -> Tensor:
        """Cross-validated NC1: ``sum_f tr(H_f Sigma_B(f)^+) / (K N)``.

        ``H_f = S - s^T mu - mu^T s + mu^T diag(n) mu`` is the scatter of fold ``f`` around the class means ``mu`` of
        the other folds, ``Sigma_B(f)`` the covariance between these means as in NC1 (Li et al. 2022, arXiv 2212.12206);
        ``K`` counts the classes present. Unlike NC1 around the samples' own means, it does not fall to 0 because
        samples are few. It is nan where the class means of some folds coincide.

        Raises:
            ValueError: No features, labels out of range, values that are not finite, fewer than two classes, or a class
                in one fold only, so that the other folds have no mean of it.
        """
        state = self._checked()
        total = state.counts.new_zeros(())
        for fold in range(self.folds):
            present = state.counts.sum(0) > 0
            count, sums, squares = (part[fold] for part in (state.counts, state.sums, state.squares))
            mean = ((state.sums.sum(0) - sums)[present]) / (state.counts.sum(0) - count)[present, None]
            white = whitening(mean)
            if not len(white):  # the class means coincide
                return total.new_full((), torch.nan)
            around = white @ mean.T
            total += torch.tensordot(white @ squares, white) - 2 * (white @ sums[present].T * around).sum()
            total += (around.square() * count[present]).sum()
        return (total / state.counts.sum()).clamp(min=0)

    def ridge(self, lams: Sequence[float] | Tensor | None = None) -> HeldOut:
        """Ridge regression on one-hot targets, its strength chosen by the squared error of the held-out folds.

        With ``A = S - N m m^T`` and ``B = s^T - N m p^T`` of the other folds, ``W = (A + lam I)^-1 B`` and
        ``b = p - m W`` cost a fold ``sum(n) - 2 tr(W^T s^T) - 2 b.n + tr(W^T S W) + 2 (sum s) W b + sum(n) |b|^2``.

        Args:
            lams: Strengths as in `ncfinetune.probes.ridge`; by default from 1e-6 to 1e3 times the mean eigenvalue.

        Raises:
            ValueError: As `nc1`, or strengths that are empty, not positive or not finite.
        """
        state = self._checked()
        everything = _Regression.of(state.counts.sum(0), state.sums.sum(0), state.squares.sum(0))
        samples = state.counts.sum()
        if lams is None:
            scale = everything.scatter.trace() / torch.clamp(samples - 1, max=len(state.shift))
            lams = torch.where(scale > 0, scale, 1.0) * torch.logspace(
                -6, 3, 45, dtype=torch.float64, device=scale.device
            )
        strengths = torch.as_tensor(lams, dtype=torch.float64, device=samples.device)
        fine = strengths.isfinite() & (strengths > 0)
        if strengths.ndim != 1 or not len(strengths) or not bool(fine.all()):
            raise ValueError(f"expected lams of one or more positive, finite numbers, got {strengths.tolist()}")
        folds = [self._fold_error(state, fold, strengths) for fold in range(self.folds)]
        errors = torch.stack(folds).sum(0) / samples
        lam = strengths[errors.argmin()]
        shrunk = everything.scatter + lam * torch.eye(len(state.shift), dtype=torch.float64, device=lam.device)
        weight = torch.linalg.solve(shrunk, everything.products).T
        bias = everything.share - weight @ (everything.mean + state.shift)
        return HeldOut(weight, bias, lam, strengths, errors)

    def _fold_error(self, state: _State, fold: int, lams: Tensor) -> Tensor:
        """Sum over a fold's samples of the squared error of the other folds' regression at each strength, ``(L,)``."""
        count, sums, squares = (part[fold] for part in (state.counts, state.sums, state.squares))
        others = _Regression.of(state.counts.sum(0) - count, state.sums.sum(0) - sums, state.squares.sum(0) - squares)
        values, basis = torch.linalg.eigh(others.scatter)
        loadings, mean, held, moment = basis.T @ others.products, others.mean @ basis, sums @ basis, squares @ basis
        moment, errors = basis.T @ moment, torch.empty_like(lams)
        for index, lam in enumerate(lams):
            weight = loadings / (values.clamp(min=0) + lam)[:, None]
            bias = others.share - mean @ weight
            errors[index] = count.sum() * (1 + bias.square().sum()) - 2 * (weight * held.T).sum() - 2 * bias @ count
            errors[index] += (weight * (moment @ weight)).sum() + 2 * held.sum(0) @ weight @ bias
        return errors

    def _checked(self) -> _State:
        """The state, after checking that it has valid samples.

        Raises:
            ValueError: As `nc1`.
        """
        if self._state is None:
            raise ValueError("expected features to take moments of, got none")
        state = self._state
        if bool(state.broken):
            raise ValueError(
                f"expected labels from 0 to num_classes - 1 = {self.num_classes - 1}, got labels out of range"
            )
        if not bool(state.squares.isfinite().all()):
            raise ValueError("expected finite features, got nan or inf")
        folds = (state.counts > 0).sum(0).tolist()
        if sum(number > 0 for number in folds) < 2:
            raise ValueError("expected samples of at least two classes, got one")
        if 1 in folds:
            raise ValueError(
                f"expected each class in two folds or more, got class {folds.index(1)} in one: it needs more samples"
            )
        return state


class _Regression(NamedTuple):
    """Sums for ridge regression: scatter ``A``, products ``B`` with the targets, mean ``m`` and class shares ``p``."""

    scatter: Tensor
    products: Tensor
    mean: Tensor
    share: Tensor

    @classmethod
    def of(cls, count: Tensor, sums: Tensor, squares: Tensor) -> _Regression:
        samples = count.sum()
        mean, share = sums.sum(0) / samples, count / samples
        return cls(squares - samples * mean.outer(mean), sums.T - samples * mean.outer(share), mean, share)


def whitening(mean: Tensor) -> Tensor:
    """Rows ``T`` with ``T^T T = Sigma_B^+ / P`` for class means ``(P, d)``, in the space that they span.

    Which singular values count as zero is decided as for NC1: below about 1e-7 of the largest they may be nothing but
    rounding of float32 features.
    """
    _, scales, rows = torch.linalg.svd(mean - mean.mean(0), full_matrices=False)
    scales, rows = scales[: len(mean) - 1], rows[: len(mean) - 1]  # centring removes one dimension
    kept = scales.square() > max(mean.shape) * _EPS * scales[0].square()
    return rows[kept] / scales[kept, None]


def folds_of(labels: Tensor, number: int, seed: int = 0) -> Tensor:
    """Which of so many folds each image is in, ``(N,)``: each class is spread over all of them.

    Raises:
        ValueError: No class has two images, so that nothing could be decided of any left out; more folds than images.
    """
    if int(torch.unique(labels, return_counts=True)[1].max()) < 2:
        raise ValueError("expected two images of some class at least, got one of each: no fold could be left out")
    if number > len(labels):
        raise ValueError(f"expected no more folds than there are images, got {number} for {len(labels)}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]
    folds = torch.empty_like(labels)
    folds[order] = torch.arange(len(labels)) % number
    return folds


def balanced_folds(labels: Tensor) -> Tensor:
    """Folds that leave out one sample of each class together, ``(R, N)``, in ``R`` random ways.

    Leaving out single samples is pessimistic where there are few: the class of the sample has a smaller share of the
    others, and a classifier that leans on the shares then decides against it. There are ten folds at most, so that of
    many samples more are left out together, and 200 decisions at least over all ways. The class of median size gives
    their number, two at least, so that a fold has about the same share of most classes, and a single rare one does not
    leave half of all samples out.

    Args:
        labels: ``(N,)``.

    Raises:
        ValueError: No class has two samples.
    """
    labels = labels.cpu()
    middle = int(torch.unique(labels, return_counts=True)[1].median())
    number, ways = min(max(middle, 2), 10), max(1, 200 // len(labels))
    return torch.stack([folds_of(labels, number, seed) for seed in range(ways)])

"""Heads on the backbone's features: projections, and linear classifiers with their closed forms.

Legend: ``N`` samples, ``K`` classes; ``d``, ``d_l`` and ``p`` widths of features, of a skipped layer and of
a projection; ``mu_k`` class means, ``mu_G`` the mean of the class means, ``Sigma_W`` and ``Sigma_B`` the covariances
within and between classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncfinetune.moment_accumulator import MomentAccumulator
from ncfinetune.moments import ClassMoments
from ncfinetune.probes import lda, nearest_mean, nearest_simplex, ridge

SkipJoin = Literal["pad", "linear", "concat", "only"]
ClosedForm = Literal["mean", "ridge", "lda", "etf"]
Projection = Literal["none", "linear", "mlp"]


def projection_head(kind: Projection, dim: int, projection_dim: int) -> nn.Module:
    """The module between the backbone's features and the loss in pre-training; it is discarded afterwards.

    ``mlp`` is Linear, ReLU, Linear with a hidden layer as wide as the features, as in Khosla et al. (2020, arXiv
    2004.11362, section 3) and Chen et al. (2020, arXiv 2002.05709, section 2.1); ``linear`` is one Linear, ``none``
    the identity.

    Args:
        kind: Kind of head.
        dim: Width ``d`` of the features.
        projection_dim: Width ``p`` of the projection; with ``none`` it is ``d``.

    Raises:
        ValueError: An unknown kind, a width below 1, or with ``none`` a width other than ``d``.
    """
    if projection_dim < 1:
        raise ValueError(f"expected projection_dim of at least 1, got {projection_dim}")
    if kind == "linear":
        return nn.Linear(dim, projection_dim)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, projection_dim))
    if kind != "none":
        raise ValueError(f"expected projection none, linear or mlp, got {kind!r}")
    if projection_dim != dim:
        raise ValueError(
            f'projection="none" keeps the {dim} features, but projection_dim={projection_dim}; '
            "leave projection_dim out, or choose linear or mlp"
        )
    return nn.Identity()


class SkipHead(nn.Module):
    """A linear classifier on penultimate features joined with the pooled outputs of skipped layers.

    This is the head of skip-connection-layer fine-tuning (Li et al., arXiv 2212.12206).

    Args:
        dim: Width ``d`` of the penultimate features.
        skip_dims: Width ``d_l`` of each skipped layer's features.
        num_classes: Number of classes ``K``.
        join: ``pad`` adds all features, narrower ones padded with zeros, so that skip connections have no parameters;
            ``linear`` adds them after a learned linear map from each ``d_l`` to ``d``; ``concat`` concatenates them;
            ``only`` concatenates the features of the skipped layers and leaves the penultimate ones out.
    """

    def __init__(self, dim: int, skip_dims: Sequence[int], num_classes: int, join: SkipJoin = "pad") -> None:
        super().__init__()
        self.join: SkipJoin = join
        self.dim = _joined_width(dim, skip_dims, join)
        maps = [nn.Linear(width, dim, bias=False) for width in skip_dims] if join == "linear" else []
        self.project = nn.ModuleList(maps)
        self.fc = nn.Linear(self.dim, num_classes)

    def rebuild(self, dim: int, skip_dims: Sequence[int], join: Literal["concat", "only"]) -> None:
        """Make the classifier anew for other features, in place: callbacks may have hooks on the module."""
        self.join = join
        self.dim = self.fc.in_features = _joined_width(dim, skip_dims, join)
        self.fc.weight = nn.Parameter(self.fc.weight.new_empty(self.fc.out_features, self.dim))
        self.fc.reset_parameters()

    def joined(self, features: Tensor, *skipped: Tensor) -> Tensor:
        """Input of the linear classifier, from features ``(N, d)`` and, for each skipped layer, ``(N, d_l)``."""
        if self.join == "concat":
            return torch.cat([features, *skipped], 1)
        if self.join == "only":
            return torch.cat(skipped, 1)
        added = (
            [project(part) for project, part in zip(self.project, skipped, strict=True)] if self.project else skipped
        )
        return sum((_widen(part, self.dim) for part in added), _widen(features, self.dim))

    def forward(self, features: Tensor, *skipped: Tensor) -> Tensor:
        """Class logits ``(N, K)`` of features ``(N, d)`` and, for each skipped layer, ``(N, d_l)``."""
        return self.fc(self.joined(features, *skipped))


def new_head(widths: Sequence[int], num_classes: int, join: SkipJoin | None) -> nn.Linear | SkipHead:
    """A linear classifier on features of these widths, the penultimate first; without ``join`` on these alone."""
    width, *skipped = widths
    return nn.Linear(width, num_classes) if join is None else SkipHead(width, skipped, num_classes, join)


def _joined_width(dim: int, skip_dims: Sequence[int], join: SkipJoin) -> int:
    side_by_side = sum(skip_dims)
    widths = {"pad": max([dim, *skip_dims]), "linear": dim, "concat": dim + side_by_side, "only": side_by_side}
    return widths[join]


def _widen(features: Tensor, dim: int) -> Tensor:
    return F.pad(features, (0, dim - features.shape[1]))


def classifier_of(
    kind: ClosedForm,
    chunks: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    class_weight: Literal["balanced"] | Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Weight ``(K, d)`` and bias ``(K,)`` of a linear classifier in closed form, from features and labels in batches.

    ``mean`` is `nearest_mean_classifier` and keeps class moments only; the other kinds keep all features. ``ridge`` and
    ``lda`` are `probes.ridge` and `probes.lda`. ``etf`` is the simplex nearest to the class means, with equal norms and
    angles (`probes.nearest_simplex`), and a bias that makes all classes equally probable at the mean of the means. A
    class without samples has no part in this and is never decided for: its weight is 0, its bias lower than the scores
    of the others.

    The scale of ``ridge``, ``lda`` and ``etf`` calibrates the probabilities: scores are divided by the temperature of
    `probes.Head.temperature` (for ``etf`` that of `probes.nearest_mean`). ``ridge`` and ``lda`` use the class weights;
    ``mean`` and ``etf`` weigh all classes equally.

    Raises:
        ValueError: There are no features, some are not finite, or the closed form does not exist for them; see
            `probes`.
    """
    if kind == "mean":
        return nearest_mean_classifier(streamed_moments(chunks, num_classes))
    parts = list(chunks)
    if not parts:
        raise ValueError("expected features to fit a classifier to, got none")
    features, labels = (torch.cat(values) for values in zip(*parts, strict=True))
    if kind != "etf":
        fit = {"ridge": ridge, "lda": lda}[kind]
        return fit(features, labels, num_classes, class_weight=class_weight).logits(labels)
    head = nearest_mean(features, labels, num_classes)
    present, weight = head.bias.isfinite(), torch.zeros_like(head.weight)
    weight[present] = nearest_simplex(head.weight[present]) / head.temperature(labels)
    means = features.double().mean(0) + head.weight  # nearest_mean's weight holds the means less the mean
    return weight, _lowest_if_absent(weight, -weight @ means[present].mean(0), means, present)


def nearest_mean_classifier(moments: ClassMoments) -> tuple[Tensor, Tensor]:
    """Weight ``(K, d)`` and bias ``(K,)`` of the linear classifier that decides as the nearest class mean does.

    ``w_k = s (mu_k - mu_G)`` and ``b_k = -s (|mu_k|^2 - |mu_G|^2) / 2``, whose logits are ``-s |h - mu_k|^2 / 2`` up to
    a term that is the same for every class. The scale ``s = tr(Sigma_B) / tr(Sigma_W Sigma_B)`` is one over the
    variance within classes along the directions between class means, ``Sigma_W`` taken without bias: ``N - K`` in place
    of ``N``. Where ``Sigma_W = sigma^2 I`` it is ``1 / sigma^2``, and the softmax is the posterior of Gaussian classes
    with equal priors (Bishop 2006, eqs. 4.68 to 4.70). Where nothing varies within classes, as with one image of each,
    ``s = 1 / tr(Sigma_B)``. A class without samples gets weight 0 and a bias lower than the scores of the others.

    Raises:
        ValueError: Fewer than two classes have samples.
    """
    assert moments.within is not None
    samples, present = moments.count.sum(), moments.present
    if present.sum() < 2:
        raise ValueError(f"expected samples of at least two classes, got {int(present.sum())}")
    between = moments.centred.square().sum(1).mean()
    spread = (moments.centred @ moments.within * moments.centred).sum(1).mean()
    spread = spread * samples / (samples - present.sum()).clamp(min=1)
    collapsed = spread <= torch.finfo(torch.float32).eps * between.square()
    scale = torch.where(collapsed, 1 / between, between / spread)
    weight, bias = torch.zeros_like(moments.mean), torch.zeros_like(moments.count)
    weight[present] = scale * moments.centred
    bias[present] = (moments.global_mean.square().sum() - moments.mean[present].square().sum(1)) * scale / 2
    return weight, _lowest_if_absent(weight, bias, moments.mean, present)


def _lowest_if_absent(weight: Tensor, bias: Tensor, means: Tensor, present: Tensor) -> Tensor:
    """The bias, for a class without samples one below all scores of the other classes at the class means.

    The weights sum to 0, so that the mean score of the other classes is the same for all features: it is above this
    bias, and so is the highest of them.
    """
    scores = means[present] @ weight[present].T + bias[present]
    return bias.where(present, scores.min() - 1)


def streamed_moments(chunks: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> ClassMoments:
    """Class moments of features that come in batches.

    Raises:
        ValueError: There are no features, labels are out of range, or features are not finite.
    """
    accumulator = MomentAccumulator(num_classes)
    for features, labels in chunks:
        accumulator.to(features.device).update(features, labels)
    moments = accumulator.moments()
    accumulator.check("class means")
    if not moments.present.any():
        raise ValueError("expected features to take class moments of, got none")
    return moments

"""What sits on the backbone's features.

Legend: ``N`` samples, ``K`` classes, ``d`` width of the penultimate features, ``d_l`` of the skipped layer's, ``p`` of
a projection.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Projection = Literal["none", "linear", "mlp"]


def projection_head(kind: Projection, dim: int, projection_dim: int) -> nn.Module:
    """What stands between the backbone's features and the loss while pre-training, and is thrown away after.

    ``mlp`` is Linear, ReLU, Linear with a hidden layer as wide as the features, as in Khosla et al. (2020, arXiv
    2004.11362, section 3) and Chen et al. (2020, arXiv 2002.05709, section 2.1); ``linear`` is one Linear, ``none``
    hands the features on.

    Args:
        kind: Which.
        dim: Width ``d`` of the features.
        projection_dim: Width ``p`` of the projection; with ``none`` it is ``d``.

    Raises:
        ValueError: An unknown kind, a width below 1, or with ``none`` one that is not ``d``.
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
            f'projection="none" hands on the {dim} features as they are, but projection_dim={projection_dim}; '
            "leave projection_dim out, or choose linear or mlp"
        )
    return nn.Identity()


class SkipHead(nn.Module):
    """A linear classifier on the sum of penultimate features and those of a skipped layer.

    This is the head of skip-connection-layer fine-tuning (Li et al., arXiv 2212.12206). Where the two widths differ
    the narrower features are padded with zeros, so that the skip connection adds no parameters of its own.

    Args:
        dim: Width ``d`` of the penultimate features.
        skip_dim: Width ``d_l`` of the skipped layer's features.
        num_classes: Number of classes ``K``.
    """

    def __init__(self, dim: int, skip_dim: int, num_classes: int) -> None:
        super().__init__()
        self.dim = max(dim, skip_dim)
        self.fc = nn.Linear(self.dim, num_classes)

    def forward(self, features: Tensor, skipped: Tensor) -> Tensor:
        """Class logits ``(N, K)`` of features ``(N, d)`` and ``(N, d_l)``."""
        return self.fc(_widen(features, self.dim) + _widen(skipped, self.dim))


def _widen(features: Tensor, dim: int) -> Tensor:
    return F.pad(features, (0, dim - features.shape[1]))

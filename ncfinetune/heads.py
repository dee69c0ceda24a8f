"""What sits on the backbone's features.

Legend: ``N`` samples, ``K`` classes, ``d`` width of the penultimate features, ``d_l`` of the skipped layer's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


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

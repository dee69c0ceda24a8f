"""Supervised pre-training: a backbone and a linear classifier, all of it trained."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from ncfinetune.backbone import Backbone
from ncfinetune.learner import Classifier


class Supervised(Classifier):
    """Trains a backbone and a linear classifier with cross-entropy.

    Args:
        num_classes: Number of classes; on the command line it comes from the data.
        backbone: A timm name, the arguments of a `Backbone`, or a `Backbone`.
        optimizer: Makes an optimiser of all parameters; None is AdamW with learning rate 1e-3.
        lr_scheduler: Makes a scheduler of that optimiser, stepped once an epoch.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str | dict[str, Any] | Backbone,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(num_classes, backbone, optimizer, lr_scheduler)
        self.head = nn.Linear(self.backbone.dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits ``(N, K)`` of images."""
        return self.head(self.backbone(x))

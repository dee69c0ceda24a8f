"""A module as somebody else would write it, for callbacks that serve any project."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn


class Stranger(LightningModule):
    """Classifies images by the spatial means of ``features``, six channels, with a linear layer ``classify``."""

    def __init__(self, features: nn.Module, lr: float = 0.1) -> None:
        super().__init__()
        self.features = features
        self.classify = nn.Linear(6, 3)
        self.lr = lr

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(self.features(x).mean((2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

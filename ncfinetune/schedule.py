"""The learning rate of pre-training over the epochs, made of torch's schedulers."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, SequentialLR


class WarmupCosine(SequentialLR):
    """Linear warm-up, then cosine decay to zero, where it stays.

    A class, since a YAML file cannot hand one optimiser to several schedulers.

    Args:
        optimizer: Whose learning rate changes.
        epochs: Epochs in all, the ``max_epochs`` of the Trainer; the rate is zero from then on.
        warmup: How many of them the warm-up takes; its first epoch has ``1 / (warmup + 1)`` of the learning rate.

    Raises:
        ValueError: ``warmup`` is negative or leaves no epoch for the decay.
    """

    def __init__(self, optimizer: Optimizer, epochs: int, warmup: int = 0) -> None:
        if not 0 <= warmup < epochs:
            raise ValueError(f"expected a warmup of 0 to {epochs - 1} epochs, since epochs={epochs}, got {warmup}")
        decay = epochs - warmup
        ramp = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        cosine = LambdaLR(optimizer, lambda epoch: (1 + math.cos(math.pi * min(epoch / decay, 1))) / 2)
        super().__init__(optimizer, [ramp, cosine], milestones=[warmup])

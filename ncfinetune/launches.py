"""How a run's processes were launched."""

from __future__ import annotations

import os

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn


def check_launched(trainer: Trainer) -> None:
    """Refuse a Trainer whose world size is below the number of launched processes: they would train independently.

    Raises:
        ValueError: The world size is smaller.
    """
    by_torchrun = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
    launched = int(os.environ["WORLD_SIZE"]) if by_torchrun else trainer.world_size
    if launched != trainer.world_size:
        raise ValueError(
            f"torchrun launched {launched} processes, but the Trainer has {trainer.world_size}; give it as many "
            "(devices a node, and num_nodes), or start one process"
        )


def returns_weights_only(trainer: Trainer) -> bool:
    """Whether the strategy forks or spawns processes, as in notebooks, which return weights and logged numbers only."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def warn_of_what_stays(trainer: Trainer, what: str) -> None:
    """Warn of what a fit in forked or spawned processes does not return.

    Args:
        trainer: The trainer.
        what: What it is, and what follows.
    """
    if returns_weights_only(trainer):
        rank_zero_warn(
            f"strategies that fork or spawn processes return weights and logged numbers only: {what}; a strategy such "
            "as ddp, or one device, keeps everything"
        )

"""Lightning's finders, which search with one learning rate for all groups of parameters and restore a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner.lr_finder import _ExponentialLR, _LinearLR

# Names of the checkpoints that finders save before their search, and load after it.
_OF_FINDERS = (".lr_find_", ".scale_batch_size_")


def refuse_finders_of_resumed(trainer: Any) -> None:
    """Refuse callbacks whose search, which restores a checkpoint of its own, would begin a resumed run at step 0."""
    finders = [type(c).__name__ for c in trainer.callbacks if isinstance(c, LearningRateFinder | BatchSizeFinder)]
    if finders and not Path(str(trainer.ckpt_path)).name.startswith(_OF_FINDERS):
        raise ValueError(
            f"{finders[0]} would begin the resumed run at step 0; leave it out, and give the rate or batch size "
            "that it found, which a run's config.yaml has in its place if it found one"
        )


def scale_search(trainer: Any, factor: Callable[[dict[str, Any]], float]) -> None:
    """Multiply the rates of the next step where Lightning's finder searches, which gives all groups the same rate.

    Args:
        trainer: The trainer.
        factor: The factor of each of the optimiser's groups of parameters.
    """
    for config in trainer.lr_scheduler_configs:
        search = config.scheduler
        if isinstance(search, _LinearLR | _ExponentialLR):
            rates: Any = search.lr
            for group, rate in zip(search.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor(group)

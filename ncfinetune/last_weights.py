"""The weights at the end of a fit in the checkpoints of those callbacks that keep the last ones."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint


class LastWeights:
    """Has checkpoint callbacks that keep the last weights save them at the end of a fit.

    Lightning (2.6) saves after a validation where not every epoch ends in one (``check_val_every_n_epoch``,
    ``val_check_interval``), and so nothing of what is trained after the last one, or nothing at all.
    """

    def __init__(self) -> None:
        self._changed: list[Any] = []

    def save(self, trainer: Any) -> None:
        """Have them save at the end of this epoch, if it is the last one; for `on_train_epoch_end` of a module."""
        if not _ends(trainer):
            return
        for callback in trainer.checkpoint_callbacks:
            keeps_last = isinstance(callback, ModelCheckpoint) and callback.monitor is None
            if keeps_last and callback._save_on_train_epoch_end is None:
                callback._save_on_train_epoch_end = True
                self._changed.append(callback)

    def restore(self) -> None:
        """Give the callbacks their setting back; for `on_train_end`."""
        while self._changed:
            self._changed.pop()._save_on_train_epoch_end = None


def _ends(trainer: Any) -> bool:
    """Whether the run ends with the epoch that ends now."""
    epochs = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
    steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return epochs or steps or trainer.should_stop

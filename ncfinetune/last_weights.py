"""The weights at the end of a fit in the checkpoints of those callbacks that keep the last ones."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from ncfinetune.loop_progress import ends_now


class LastWeights:
    """Makes checkpoint callbacks that keep the last weights save them at the end of a fit.

    Lightning (2.6) saves after a validation where not every epoch ends in one (``check_val_every_n_epoch``,
    ``val_check_interval``), and so nothing of what is trained after the last one, or nothing at all. Callbacks that
    save every few steps, epochs or minutes only are left alone.
    """

    def __init__(self) -> None:
        self._changed: list[Any] = []

    def save(self, trainer: Any) -> None:
        """Make them save at the end of this epoch if it is the last one; for `on_train_epoch_end` of a module."""
        self.restore()
        if not ends_now(trainer):
            return
        for callback in _keeping_last(trainer):
            if callback.monitor is None and callback._save_on_train_epoch_end is None:
                callback._save_on_train_epoch_end = True
                self._changed.append(callback)

    def restore(self) -> None:
        """Give the callbacks their setting back."""
        while self._changed:
            self._changed.pop()._save_on_train_epoch_end = None

    def finish(self, trainer: Any) -> None:
        """Save with those callbacks that have not saved these weights yet; for `on_train_end`.

        Such are left where a callback behind the module ended the run, or where they monitor a number too. Callbacks
        that average weights have replaced them by then.
        """
        self.restore()
        for callback in _keeping_last(trainer):
            if callback._last_global_step_saved == trainer.global_step:
                continue
            candidates = callback._monitor_candidates(trainer)
            if callback.monitor is None:
                callback._save_none_monitor_checkpoint(trainer, candidates)
            callback._save_last_checkpoint(trainer, candidates)


def _keeping_last(trainer: Any) -> list[Any]:
    """The callbacks that keep the last weights, after every epoch or, unless that was asked for, every validation."""
    if trainer.fast_dev_run or not trainer.global_step:
        return []
    found: list[Any] = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    keeping = [c for c in found if (c.monitor is None and c.save_top_k) or c.save_last is True]
    return [c for c in keeping if c._save_on_train_epoch_end is not False and not _saves_at_times(c)]


def _saves_at_times(callback: Any) -> bool:
    """Whether it saves every few epochs, steps or minutes."""
    several = callback._every_n_epochs != 1 or callback._every_n_train_steps
    return bool(several) or callback._train_time_interval is not None

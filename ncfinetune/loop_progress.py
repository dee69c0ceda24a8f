"""Progress of Lightning's loops in runs that are interrupted and resumed, where its own account is wrong.

Lightning's checkpoints count epochs and batches that were ready, started, processed and completed. Each function here
corrects one case in which a resumed run would differ from one that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

# Key under which Lightning's `WeightAveraging` saves the weights that are trained; ``state_dict`` has their averages.
_TRAINED_WEIGHTS = "current_model_state"


def epochs_trained(checkpoint: Mapping[str, Any]) -> int:
    """For how many epochs a checkpoint's weights were trained, with the one in which it was saved, as a fit counts."""
    begun: int = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["ready"]
    return begun if checkpoint["global_step"] else 0


def take_up_after_last_batch(checkpoint: dict[str, Any]) -> None:
    """Make a run that is resumed from an epoch's last batch run the epoch's validation and end.

    Lightning (2.6) resumes from such a checkpoint, which may be written every few steps, at the start of the next
    epoch: it omits the validation and the hooks at the epoch's end.

    Args:
        checkpoint: The loaded checkpoint; its loops are changed in place.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    progress, validation = (loops.get(f"epoch_loop.{name}batch_progress") for name in ("", "val_loop."))
    if progress and validation and progress["is_last_batch"]:
        total, current = progress["total"], progress["current"]
        if total["completed"] == total["processed"] - 1:  # saved before the batch was completed
            total["completed"] += 1
            current["completed"] += 1
            _begin_again(validation)


def take_up_epoch(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Make a run go on in the epoch in which it stopped, and after an epoch that had all its batches in the next one.

    ``max_steps``, ``max_time`` and early stopping end an epoch before its last batch. Lightning (2.6) trains the rest
    of it as another epoch: of other images, and one epoch less afterwards.

    With ``max_steps`` Lightning takes every epoch for one that was interrupted: it would end a second time one that had
    ended, and number those after it, by which images are drawn, one too high.

    Args:
        trainer: The trainer.
        checkpoint: The loaded checkpoint; its loops are changed in place.
    """
    loop: Any = trainer.fit_loop
    loop._iteration_based_training = _never
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    batches, epochs = loops.get("epoch_loop.batch_progress"), loops.get("epoch_progress")
    if not batches or not epochs or batches["is_last_batch"] or not batches["current"]["ready"]:
        return
    for part in (epochs["total"], epochs["current"]):
        if part["processed"] == part["ready"]:
            part["processed"] -= 1
            part["completed"] = min(part["completed"], part["processed"])


def _never() -> bool:
    return False


def take_up_before_validation(trainer: Trainer) -> None:
    """Make a run that is resumed within an epoch, right before a validation, start with that validation.

    Lightning (2.6) omits it, which happens with ``val_check_interval`` and a checkpoint every few steps.
    """
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is None or not loop.restarted_on_train_batch_end or not loop._should_check_val_fx(fetcher):
        return
    loop.batch_progress.increment_completed()
    validation = loop.val_loop.batch_progress.state_dict()
    _begin_again(validation)
    loop.val_loop.batch_progress.load_state_dict(validation)
    loop.update_restart_stage()


def end_epoch_without_validation(trainer: Trainer) -> None:
    """Make a run that is resumed from an epoch's last batch train no more of it, where no validation is due.

    Lightning (2.6) trains while it waits for a validation: on a batch of a loader that begins anew, or on all of one
    without a length.
    """
    loop = trainer.fit_loop.epoch_loop
    fetcher: Any = trainer.fit_loop._data_fetcher
    if fetcher is None or not loop.restarted_on_last or not loop.batch_progress.is_last_batch:
        return
    if not loop._should_check_val_fx(fetcher):
        fetcher.done, fetcher.batches = True, []


def step_plateaus(trainer: Trainer) -> None:
    """Step schedulers that wait for a plateau after an epoch that was checkpointed at its end.

    Lightning (2.6) makes this step after the checkpoint, and leaves it out in a run that is resumed from there.
    """
    loop = trainer.fit_loop.epoch_loop
    epochs = trainer.fit_loop.epoch_progress.current
    if loop._num_ready_batches_reached():
        epochs.completed -= 1  # the epoch that has ended, of which a scheduler's frequency may be no multiple
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        epochs.completed += 1


def let_plateaus_step(trainer: Trainer) -> None:
    """Have Lightning step schedulers that wait for a plateau at the end of an epoch that was resumed within too.

    Lightning (2.6) leaves this step out, since its checkpoints lack the numbers that such schedulers monitor.
    """
    trainer.fit_loop._restarting = False


def forget_interrupted_validation(trainer: Trainer) -> None:
    """Count only the repetition of a validation that is repeated.

    Otherwise Lightning (2.6) takes it for an interrupted one in a run that is resumed from a checkpoint at its end.
    """
    trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()


def leave_out_what_has_begun(trainer: Any, checkpoint: dict[str, Any], in_validation: bool) -> None:
    """Make a checkpoint within an epoch's start, a batch or a validation, as at an exception, one of before.

    It is then repeated. Lightning (2.6) would leave out the epoch or its last batch, number the steps of its logs one
    too high, or go on with the rest of the validation, whose numbers would be of that alone; and it would train
    averages that a callback has swapped in for the validation.

    Args:
        trainer: The trainer.
        checkpoint: What is about to be saved; changed in place.
        in_validation: Whether the validation has begun, and swapped its weights in, and has not ended.
    """
    loops = checkpoint["loops"]["fit_loop"]
    for part in map(loops["epoch_progress"].get, ("total", "current")):
        part.update(ready=part["started"])
    progress = loops["epoch_loop.batch_progress"]
    if progress["current"]["ready"] != progress["current"]["processed"]:
        progress["is_last_batch"] = False
    for part in map(progress.get, ("total", "current")):
        part.update(ready=part["processed"], started=part["processed"])
    if trainer.state.fn != TrainerFn.FITTING or not trainer.validating:
        return
    batches = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    ended = batches.is_last_batch and batches.current.completed == batches.current.ready
    if in_validation or not ended:
        _begin_again(loops["epoch_loop.val_loop.batch_progress"])
    if in_validation and _TRAINED_WEIGHTS in checkpoint:
        averages = checkpoint[_TRAINED_WEIGHTS]
        checkpoint[_TRAINED_WEIGHTS], checkpoint["state_dict"] = checkpoint["state_dict"], averages


def count_no_step_twice(trainer: Trainer) -> None:
    """Make a run that is resumed where every batch is complete count none of them again.

    Lightning (2.6) ends the last batch again where a validation would be due, and numbers all later logs one too high,
    unless the checkpoint was saved within that validation.
    """
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    ends_again = fetcher is not None and loop.restarted_on_last and loop._should_check_val_fx(fetcher)
    if ends_again and not loop._should_accumulate() and loop._batches_that_stepped == trainer.global_step:
        loop._batches_that_stepped -= 1


def _begin_again(progress: dict[str, Any]) -> None:
    """Set the progress of a validation to that of one started without a completed batch, so that it is repeated."""
    for part in ("total", "current"):
        progress[part].update(ready=1, started=1, processed=0, completed=0)
    progress["is_last_batch"] = False


def ends_now(trainer: Any) -> bool:
    """Whether the run ends with its current epoch, as far as is known."""
    epochs = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
    steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return epochs or steps or (trainer.should_stop and trainer.fit_loop._can_stop_early)

"""State that Lightning's checkpoints lack and that a resumed run needs to continue as if it was not interrupted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Key under which Lightning's `WeightAveraging` saves the weights that are trained; ``state_dict`` has their averages.
_TRAINED_WEIGHTS = "current_model_state"


def states_of_processes(trainer: Trainer, state: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of all processes by rank, with their random states; all processes must call it."""
    state = {**state, "random": random_state(trainer.strategy.root_device)}
    if trainer.world_size == 1:
        return [state]
    states: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(states, state)
    return states


def state_of_process(trainer: Trainer, states: list[dict[str, Any]]) -> dict[str, Any]:
    """This process's state of `states_of_processes`, restoring its random state; empty for another world size."""
    if len(states) != trainer.world_size:
        rank_zero_info(
            f"the checkpoint is of {len(states)} processes, but this run has {trainer.world_size}: random numbers, as "
            "of dropout, differ from those of the interrupted run"
        )
        return {}
    state = states[trainer.global_rank]
    set_random_state(trainer.strategy.root_device, state["random"])
    return state


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's generators, the CPU's and the device's."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = getattr(torch, device.type).get_rng_state(device).cpu()
    return state


def set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    """Restore a `random_state`, as far as its generators exist here."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type in state and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(state[device.type].cpu(), device)


def last_numbers(trainer: Trainer) -> dict[str, Any]:
    """The last logged values, and the values of an epoch that is checkpointed at its end, with their step.

    Lightning (2.6) saves no logged values, and logs those of an epoch after the checkpoint at its end.
    """
    connector, loop = trainer._logger_connector, trainer.fit_loop
    epochs: Any = loop.epoch_progress.current
    known, ended = dict(connector._callback_metrics), {}
    if epochs.processed > epochs.completed and trainer._results is not None:
        found = connector.metrics
        known |= found["callback"]
        values = {**_as_floats(found["log"]), "epoch": float(trainer.current_epoch)}
        ended = {"values": values, "step": loop.epoch_loop._batches_that_stepped - 1}
    return {"known": _as_floats(known), "ended": ended}


def restore_numbers(trainer: Trainer, numbers: dict[str, Any]) -> None:
    """Restore `last_numbers` of the interrupted run, and log the values that it may not have logged."""
    device = trainer.strategy.root_device
    known = {name: torch.tensor(value, device=device) for name, value in numbers.get("known", {}).items()}
    trainer._logger_connector._callback_metrics.update(known)
    if ended := numbers.pop("ended", None):
        for logger in trainer.loggers:
            logger.log_metrics(ended["values"], step=ended["step"])
            logger.save()


def _as_floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def trained(module: nn.Module) -> dict[str, bool]:
    """Which parameters are trained."""
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}


def train_as_before(module: nn.Module, before: Mapping[str, bool]) -> None:
    """Restore which parameters are trained, and warn if that is a change.

    Lightning's ``BackboneFinetuning`` (2.6) freezes at the start of a resumed run what it had unfrozen before.
    """
    changed = []
    for path, part in module.named_modules():
        for name, parameter in part.named_parameters(path, recurse=False):
            if before.get(name, parameter.requires_grad) != parameter.requires_grad:
                parameter.requires_grad = before[name]
                changed.append(name)
                # State that Lightning's callback freezes and unfreezes together with the parameters.
                if before[name] and isinstance(part, _BatchNorm):
                    part.track_running_stats = True
    if changed:
        rank_zero_info(
            f"{len(changed)} parameters, first {changed[0]}, are trained or frozen as in the interrupted run again; a "
            "callback had changed that"
        )


def waiting_gradients(trainer: Any, module: nn.Module) -> dict[str, Tensor]:
    """This process's gradients of the batches that wait for others (``accumulate_grad_batches``); none after a step.

    Those of parameters that are sharded over processes (``DTensor``) are left out: they cannot be read as data.
    """
    if not trainer.fit_loop.epoch_loop._should_accumulate():
        return {}
    gradients = {name: p.grad.detach() for name, p in module.named_parameters() if p.grad is not None}
    return {name: grad.cpu().clone() for name, grad in gradients.items() if not hasattr(grad, "to_local")}


def take_up_gradients(module: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    """Have the gradients of the next batches added to those of an interrupted run's `waiting_gradients`."""
    for name, parameter in module.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter)


def leave_out_what_has_begun(trainer: Any, checkpoint: dict[str, Any]) -> None:
    """Make a checkpoint within a batch or a validation, as at an exception, one of before, so that it is repeated.

    Lightning (2.6) would number the steps of its logs one too high, or go on with the rest of the validation, whose
    numbers would be of that alone; and it would train averages that a callback has swapped in for the validation.

    Args:
        trainer: The trainer.
        checkpoint: What is about to be saved; changed in place.
    """
    loops, loop = checkpoint["loops"]["fit_loop"], trainer.fit_loop.epoch_loop.val_loop
    for part in map(loops["epoch_loop.batch_progress"].get, ("total", "current")):
        part.update(ready=part["processed"], started=part["processed"])
    batches = loop.batch_progress
    ended = batches.is_last_batch and batches.current.completed == batches.current.ready
    if trainer.state.fn == TrainerFn.FITTING and trainer.validating and not ended:
        begin_again(loops["epoch_loop.val_loop.batch_progress"])
        if batches.current.ready and _TRAINED_WEIGHTS in checkpoint:
            averages = checkpoint[_TRAINED_WEIGHTS]
            checkpoint[_TRAINED_WEIGHTS], checkpoint["state_dict"] = checkpoint["state_dict"], averages


def step_plateaus(trainer: Trainer) -> None:
    """Step schedulers that wait for a plateau after an epoch that was checkpointed at its end.

    Lightning (2.6) makes this step after the checkpoint, and leaves it out in a run that is resumed from there.
    """
    loop = trainer.fit_loop.epoch_loop
    if loop._num_ready_batches_reached():
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)


def let_plateaus_step(trainer: Trainer) -> None:
    """Have Lightning step schedulers that wait for a plateau at the end of an epoch that was resumed within too.

    Lightning (2.6) leaves this step out, since its checkpoints lack the numbers that such schedulers monitor.
    """
    trainer.fit_loop._restarting = False


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
            begin_again(validation)


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
    begin_again(validation)
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


def begin_again(progress: dict[str, Any]) -> None:
    """Set the progress of a validation to that of one started without a completed batch, so that it is repeated."""
    for part in ("total", "current"):
        progress[part].update(ready=1, started=1, processed=0, completed=0)
    progress["is_last_batch"] = False


def forget_interrupted_validation(trainer: Trainer) -> None:
    """Have a validation that is repeated counted alone.

    Otherwise Lightning (2.6) takes it for an interrupted one in a run that is resumed from a checkpoint at its end.
    """
    trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()


def last_saved(trainer: Any) -> str | None:
    """The newest file that a trainer's checkpoint callbacks have saved last, or as their best; None without one."""
    names = ("last_model_path", "best_model_path")
    paths = [getattr(callback, name, "") for callback in trainer.checkpoint_callbacks for name in names]
    return max(filter(os.path.isfile, paths), key=os.path.getmtime, default=None)

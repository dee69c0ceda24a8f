"""State that Lightning's checkpoints lack and that a resumed run needs to continue as if it was not interrupted."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ncfinetune.loop_progress import (
    count_no_step_twice,
    end_epoch_without_validation,
    leave_out_what_has_begun,
    step_plateaus,
    take_up_before_validation,
)
from ncfinetune.passes import buffers_kept

# Keys of the checkpoint: the state of each process, whether each parameter was trained, the last logged values, and the
# rates and decays that the optimiser was made with.
_PROCESSES, _TRAINED, NUMBERS, _CONFIGURED = "processes", "trained", "numbers", "configured"


class Resumption:
    """What a run takes up from the checkpoint that it is resumed from; empty for a run that is not resumed.

    Args:
        checkpoint: The loaded checkpoint.
    """

    def __init__(self, checkpoint: Mapping[str, Any] | None = None) -> None:
        checkpoint = checkpoint or {}
        self._processes: list[dict[str, Any]] = checkpoint.get(_PROCESSES, [])
        self._trained: dict[str, bool] = checkpoint.get(_TRAINED, {})
        self._numbers: dict[str, Any] = checkpoint.get(NUMBERS, {})
        self._epoch_ended = bool(self._numbers.get("ended"))
        # The rates and decays that the run's optimiser was made with, and those that one of this configuration is.
        self._kept: dict[str, list[float]] = checkpoint.get(_CONFIGURED, {})
        self.configured: dict[str, list[float]] = {}
        # State of each of the epoch's means, until the first batch is trained.
        self.means: dict[str, dict[str, Tensor]] = {}
        # Whether a validation is under way, whose weights a callback may have swapped in.
        self.in_validation = False
        # Whether an average, of which no number was logged, has replaced the weights at the end of the fit.
        self.averaged = False

    def save(self, trainer: Trainer, module: nn.Module, means: Mapping[str, Any], checkpoint: dict[str, Any]) -> None:
        """Add to a checkpoint what a run that is resumed from it takes up; all processes must call it.

        Args:
            trainer: The trainer.
            module: The module that is trained.
            means: States of the epoch's means. Those of a resumed run that has not trained a batch yet are still here.
            checkpoint: What is about to be saved; changed in place.
        """
        leave_out_what_has_begun(trainer, checkpoint, self.in_validation)
        waiting = _waiting_gradients(trainer, module, checkpoint)
        checkpoint[_PROCESSES] = states_of_processes(trainer, {"means": self.means or means, "gradients": waiting})
        checkpoint[_TRAINED] = _trained(module)
        checkpoint[_CONFIGURED] = self._kept or self.configured
        checkpoint[NUMBERS] = {} if self.averaged else _last_numbers(trainer)

    def restore_numbers(self, trainer: Trainer) -> None:
        """Restore the last logged values, and log those of an epoch that the interrupted run may not have logged."""
        _restore_numbers(trainer, self._numbers)

    def warn_of_kept_options(self, trainer: Any) -> None:
        """Warn of a configured learning rate or weight decay that the optimiser's state of the checkpoint replaces.

        A finder restores a checkpoint of its own after its search, which replaces nothing.
        """
        if any(isinstance(callback, BatchSizeFinder | LearningRateFinder) for callback in trainer.callbacks):
            self._kept = {}
        for name, values in self._kept.items():
            pairs = zip(values, self.configured.get(name, ()), strict=False)
            if other := [pair for pair in pairs if not math.isclose(*pair, rel_tol=1e-6)]:
                kept, asked = other[0]
                rank_zero_warn(
                    f"the resumed run keeps the optimiser's {name}={kept:g} of its checkpoint, and the configured "
                    f"{name}={asked:g} has no effect; leave it as it was, or start a new run from its weights"
                )

    def begin(self, trainer: Trainer, module: nn.Module) -> None:
        """Restore the progress, the trained parameters and the random state, when training starts."""
        _restore_numbers(trainer, self._numbers)
        _take_up_callbacks(trainer, module)
        take_up_before_validation(trainer)
        end_epoch_without_validation(trainer)
        count_no_step_twice(trainer)
        _train_as_before(module, self._trained)
        if self._epoch_ended:
            step_plateaus(trainer)
        self._trained, self._epoch_ended = {}, False
        if self._processes:
            state = state_of_process(trainer, self._processes)
            self._processes, self.means = [], state.get("means", {})
            _take_up_gradients(module, state.get("gradients", {}))


def _take_up_callbacks(trainer: Any, module: Any) -> None:
    """Have callbacks that set something for an epoch set it in a run that is resumed within the epoch too.

    Lightning (2.6) leaves their hook at an epoch's start out. Statistics of batch norm that SWA resets in it are those
    of the interrupted epoch, which go on.
    """
    if not trainer.fit_loop.restarted_mid_epoch:
        return
    for callback in trainer.callbacks:
        if isinstance(callback, GradientAccumulationScheduler | StochasticWeightAveraging):
            with buffers_kept(module):
                callback.on_train_epoch_start(trainer, module)


def states_of_processes(trainer: Trainer, state: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of all processes by rank, with their random states; all processes must call it."""
    state = {**state, "random": _random_state(trainer.strategy.root_device)}
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
            "of dropout, differ from those of the interrupted run; of the epoch in which it stopped, train/ means are "
            "of the rest, and batches that waited for others (accumulate_grad_batches) are left out"
        )
        return {}
    state = states[trainer.global_rank]
    _set_random_state(trainer.strategy.root_device, state["random"])
    return state


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's generators, the CPU's and the device's."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = getattr(torch, device.type).get_rng_state(device).cpu()
    return state


def _set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    """Restore a `_random_state`, as far as its generators exist here."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type in state and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(state[device.type].cpu(), device)


def _last_numbers(trainer: Trainer) -> dict[str, Any]:
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


def _restore_numbers(trainer: Trainer, numbers: dict[str, Any]) -> None:
    """Restore `_last_numbers` of the interrupted run, and log the values that it may not have logged."""
    device = trainer.strategy.root_device
    known = {name: torch.tensor(value, device=device) for name, value in numbers.get("known", {}).items()}
    trainer._logger_connector._callback_metrics.update(known)
    if ended := numbers.pop("ended", None):
        for logger in trainer.loggers:
            logger.log_metrics(ended["values"], step=ended["step"])
            logger.save()


def _as_floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _trained(module: nn.Module) -> dict[str, bool]:
    """Which parameters are trained."""
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}


def _train_as_before(module: nn.Module, before: Mapping[str, bool]) -> None:
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


def _waiting_gradients(trainer: Trainer, module: nn.Module, checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """This process's gradients of the batches that wait for others (``accumulate_grad_batches``); none after a step.

    Those of parameters that are sharded over processes (``DTensor``) are left out: they cannot be read as data. At an
    exception in a batch's backward pass, what it has added by then is among them.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    if progress["is_last_batch"] or progress["current"]["processed"] % trainer.accumulate_grad_batches == 0:
        return {}
    gradients = {name: p.grad.detach() for name, p in module.named_parameters() if p.grad is not None}
    return {name: grad.to("cpu", copy=True) for name, grad in gradients.items() if not hasattr(grad, "to_local")}


def _take_up_gradients(module: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    """Have the gradients of the next batches added to those of an interrupted run's batches that waited for them."""
    for name, parameter in module.named_parameters():
        if name in gradients and gradients[name].shape == parameter.shape:  # flat ones of a strategy that shards differ
            parameter.grad = gradients[name].to(parameter)


def last_saved(trainer: Any) -> str | None:
    """The newest file that a trainer's checkpoint callbacks have saved last, or as their best; None without one.

    While they save, the file that they name may not be there yet; then it is the newest in their folders.
    """
    callbacks, names = trainer.checkpoint_callbacks, ("last_model_path", "best_model_path")
    paths = [getattr(callback, name, "") for callback in callbacks for name in names]
    folders = (getattr(callback, "dirpath", None) for callback in callbacks)
    named = [*filter(os.path.isfile, paths)]
    others = (str(path) for folder in folders if folder for path in Path(folder).glob("*.ckpt"))
    return max(named or others, key=os.path.getmtime, default=None)

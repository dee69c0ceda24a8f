"""The schedule of a callback's own passes, so that they use the same weights as validation."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from ncfinetune.loop_progress import ends_now

# Values of each parameter that are compared to detect swapped weights: averages differ from raw weights in nearly all.
_LOOKED_AT = 16


def is_new(trainer: Any) -> bool:
    """Whether a run begins with its first batch: one that is resumed does not, be it before its first step."""
    return not trainer.fit_loop.epoch_loop.batch_progress.total.ready


class PassSchedule:
    """Determines when passes are due: every few epochs and after the last, in the epoch's validation if it has one.

    Weight averaging and some optimisers swap the weights during a validation. So that a pass and the validation measure
    the same weights, the pass is made right before the first batch of the validation, after the swap. An epoch that
    does not end in a validation has a pass at its end, unless weights are swapped in this run: then the pass is made in
    the next validation.

    Args:
        asker: Name of the callback, for messages.
        every: Epochs between passes; 0 is never.
    """

    def __init__(self, asker: str, every: int) -> None:
        self._asker, self._every = asker, every
        self._epochs_done = 0
        self._pending = self._last = self._waits = False
        self._swapped = False
        self._validated: Tensor | None = None

    def start(self, trainer: Any) -> None:
        """Begin a run."""
        self._epochs_done = trainer.current_epoch
        self._pending, self._waits, self._swapped, self._validated = False, False, False, None
        if self._every and _swaps(trainer) and not _validates(trainer):
            rank_zero_info(
                f"{self._asker}: weights are averaged in this run, but it has no validation: the training weights are "
                "measured, not the averages"
            )

    def is_due(self, trainer: Any) -> bool:
        """Whether a pass is due in the current epoch and has not been made."""
        every, epochs = self._every, trainer.current_epoch + 1
        if not every or trainer.state.fn != "fit" or epochs <= self._epochs_done:
            return False
        return epochs // every > self._epochs_done // every or ends_now(trainer)

    def open_validation(self, trainer: Any) -> bool:
        """Whether to make the pass at the start of a validation, because a process may get no batch in it."""
        training = trainer.state.fn == "fit" and not trainer.sanity_checking
        self._last = training and trainer.is_last_batch
        self._pending = training and (self._waits or (self._last and self.is_due(trainer)))
        return self._pending and not every_process_gets_a_batch(trainer)

    def in_validation(self, trainer: Any, module: nn.Module) -> bool:
        """Whether to make a pass before the current batch of a validation."""
        if self._last and self._validated is None:
            self._validated = _some_weights(module)
        return self._pending

    def after_epoch(self, trainer: Any, module: nn.Module) -> bool:
        """Whether to make a pass at the end of an epoch."""
        before, self._validated = self._validated, None
        # A process that gets no batch in a validation cannot tell; whether to make a pass is the same for all.
        differ = before is not None and not self._swapped and _differ(before, _some_weights(module))
        if not self._swapped and trainer.strategy.reduce_boolean_decision(differ, all=False):
            self._swapped = True
            rank_zero_info(
                f"{self._asker}: validation uses other weights than training (an average, say); passes over the "
                "training set measure the weights of the validation, in epochs with a validation"
            )
        due = self.is_due(trainer)
        self._waits = due and _validates(trainer) and (self._swapped or _swaps(trainer))
        return due and not self._waits

    def done(self, trainer: Any) -> None:
        """Record that a pass has been made."""
        inside = self._pending and not self._last  # the pass of an earlier epoch, within the current one
        self._epochs_done = trainer.current_epoch + (not inside)
        self._pending = self._waits = False


def _swaps(trainer: Any) -> bool:
    """Whether a callback averages weights, or a schedule-free optimiser evaluates other weights than it trains."""
    names = {kind.__name__ for callback in trainer.callbacks for kind in type(callback).__mro__}
    both = [all(callable(getattr(o, mode, None)) for mode in ("train", "eval")) for o in trainer.optimizers]
    return "WeightAveraging" in names or any(both)


def _validates(trainer: Any) -> bool:
    """Whether the run has validations."""
    some = trainer.val_dataloaders is None or sum(_lengths(trainer)) > 0  # None: the loaders are not created yet
    return bool(trainer.enable_validation) and some


def _lengths(trainer: Any) -> list[float]:
    lengths = trainer.num_val_batches
    return lengths if isinstance(lengths, list) else [lengths]


def every_process_gets_a_batch(trainer: Any) -> bool:
    """Whether each process gets a batch in a validation; all processes must call it."""
    if trainer.world_size == 1:
        return True
    some = 0 < sum(_lengths(trainer)) < float("inf")
    total = trainer.strategy.reduce(torch.tensor(float(some), device=trainer.strategy.root_device), reduce_op="sum")
    return float(total) == trainer.world_size


def _some_weights(module: nn.Module) -> Tensor:
    """A few values of each trained parameter."""
    parts = []
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.is_floating_point() and parameter.numel():
            local = parameter.detach()
            local = local.to_local() if hasattr(local, "to_local") else local
            parts.append(local[:1].reshape(-1)[:_LOOKED_AT].float() if local.ndim else local.reshape(1).float())
    return torch.cat(parts) if parts else torch.zeros(0)


def _differ(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or not torch.equal(a.view(torch.int32), b.view(torch.int32))  # as bits, since nan != nan

"""Lightning's callbacks that average weights: what they copy, replace, and leave out of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, callbacks
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

# Callbacks that average or replace weights, frozen ones too. Older versions of Lightning have only the first.
AVERAGING = tuple(
    getattr(callbacks, name)
    for name in ("StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging")
    if hasattr(callbacks, name)
)
# What those that validate an average add to a checkpoint beside the average.
_OF_AVERAGES = ("current_model_state", "averaging_state")


def refuse_averages(trainer: Any) -> None:
    """Refuse callbacks that average weights where the classifier is a closed form of the features.

    Raises:
        ValueError: There is such a callback.
    """
    if averaging := [type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, AVERAGING)]:
        raise ValueError(
            f"{averaging[0]} averages weights, and an average of refitted classifiers is not the closed form on "
            'averaged features; leave it out, or give refit="none"'
        )


def average_anew(trainer: Any, module: LightningModule) -> None:
    """Make callbacks that average weights copy the module again: they copy it before it is set up."""
    for callback in trainer.callbacks:
        if isinstance(callback, AVERAGING):
            callback.setup(trainer, module, "fit")


def average_from_here(trainer: Any, module: LightningModule) -> None:
    """Make callbacks that average weights start from the module's weights as they are now.

    Until their first average they validate and save the copy that they made before the run began.
    """
    for callback in trainer.callbacks:
        copy: Any = getattr(callback, "_average_model", None) if isinstance(callback, AVERAGING) else None
        if copy is not None:
            getattr(copy, "module", copy).load_state_dict(module.state_dict())


def warn_of_one_rate(trainer: Any, factors: list[float]) -> None:
    """Warn of a callback that would set one learning rate for parameter groups with different factors."""
    rate = next((swa._swa_lrs for swa in _swa(trainer)), None)
    if isinstance(rate, float) and len(set(factors)) > 1:
        rates = ", ".join(f"{rate * factor:g}" for factor in factors)
        rank_zero_warn(
            f"StochasticWeightAveraging sets swa_lrs={rate:g} for all {len(factors)} parameter groups, whose rates "
            f"layer_decay and head_lr_factor set apart; give a rate for each: swa_lrs=[{rates}]"
        )


@contextmanager
def averages_in_weights(trainer: Any, module: LightningModule, checkpoint: dict[str, Any]) -> Iterator[None]:
    """A context in which a checkpoint of weights alone has what callbacks that average weights add to one of a run.

    After it the averages are left, which are what was validated. Lightning (2.6) does not ask callbacks for such a
    checkpoint, so that it would have the weights that training goes on with.
    """
    averaging: list[Any] = [one for one in getattr(trainer, "callbacks", ()) if isinstance(one, AVERAGING)]
    validated = [one for one in averaging if not isinstance(one, StochasticWeightAveraging)]
    alone = [one for one in validated if "callbacks" not in checkpoint and one._average_model is not None]
    for callback in alone:
        callback.on_save_checkpoint(trainer, module, checkpoint)
    yield
    for name in _OF_AVERAGES if alone else ():
        checkpoint.pop(name, None)


def keep_average_in_step(trainer: Any, module: LightningModule) -> None:
    """Make the average of Lightning's SWA, until it begins, the weights of now; for `on_train_epoch_end`.

    A fit that ends before ``swa_epoch_start`` replaces the weights by it too, which would be those of the start.
    """
    for swa in _swa(trainer):
        if swa._latest_update_epoch < 0 and swa._average_model is not None:
            swa.transfer_weights(module, swa._average_model)


def only_measure(trainer: Any, module: LightningModule) -> None:
    """Skip the optimiser's step in SWA's last epoch, which only measures batch-norm statistics; call it for each batch.

    Lightning (2.6) has no backward pass in that epoch, but steps the optimiser at its last batch, by the gradients of
    the step before: away from the average. The hook is set on the instance, since Lightning warns of a class that
    overrides ``optimizer_step`` where gradients accumulate.
    """
    if _swa(trainer) and trainer.fit_loop._skip_backward:
        vars(module)["optimizer_step"] = _run_batch


def _run_batch(epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
    closure()


def step_again(module: LightningModule) -> None:
    """Undo `only_measure`; for `on_train_end`."""
    vars(module).pop("optimizer_step", None)


def is_average(trainer: Any) -> bool:
    """Whether Lightning's SWA has replaced the weights by their average after the last checkpoint; for `on_train_end`.

    It does so for networks without batch norm, whose statistics it would measure in one more epoch, and where there is
    no last epoch (``max_epochs: -1``).
    """
    begun = [swa for swa in _swa(trainer) if swa._latest_update_epoch >= 0]
    return any(swa._max_epochs == -1 or trainer.current_epoch - 1 == swa.swa_end for swa in begun)


def _swa(trainer: Any) -> list[StochasticWeightAveraging]:
    return [callback for callback in trainer.callbacks if isinstance(callback, StochasticWeightAveraging)]


def replaces_schedule(trainer: Any) -> bool:
    """Whether Lightning's SWA takes the learning rate over from the scheduler, maybe before its end."""
    return bool(_swa(trainer))


def save_average(trainer: Any) -> None:
    """Save an average that has replaced the weights, in their last checkpoints; one that a validation chose stays."""
    paths: dict[str, bool] = {}
    for callback in trainer.checkpoint_callbacks:
        names = ["last_model_path", *(["best_model_path"] if getattr(callback, "monitor", None) is None else [])]
        if getattr(callback, "_last_global_step_saved", None) == trainer.global_step:
            paths |= {getattr(callback, name): callback.save_weights_only for name in names if getattr(callback, name)}
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    for path, weights_only in (paths or ({str(Path(folder, "last.ckpt")): False} if folder else {})).items():
        trainer.save_checkpoint(path, weights_only)
        rank_zero_info(f"{path}: saved again with SWA's average, which no validation has measured")

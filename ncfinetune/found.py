"""What Lightning's finders of learning rate and batch size found: in a run's configuration, and in its headline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback


def record(config: Namespace, trainer: Trainer, module: LightningModule) -> None:
    """Put what was found into a configuration in place of the finders, so that it makes, and resumes, the same run.

    Only our learners and datamodules have arguments that are known to take it; others keep their finders. Where a
    search for a rate found nothing the configured rate is the run's, and stays.

    Args:
        config: The configuration of a fit, which is changed.
        trainer: Its trainer.
        module: Its model.
    """
    rate = getattr(module, "lr", None)
    if _ours(config.model) and _remove(config, "LearningRateFinder") and rate is not None:
        arguments = config.model.init_args
        if "lr_batch" in arguments:
            arguments.lr_batch = None
        if arguments.optimizer is None:
            arguments.optimizer = Namespace({"class_path": "torch.optim.AdamW"})
        arguments.optimizer["init_args.lr"] = rate
    size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    if _ours(config.data) and size is not None and _remove(config, "BatchSizeFinder"):
        config.data.init_args.batch_size = size


def _ours(part: Namespace) -> bool:
    return str(part.class_path).startswith("ncfinetune.")


def _remove(config: Namespace, finder: str) -> bool:
    """Remove a finder from the callbacks; returns whether there was one."""
    callbacks = config.trainer.callbacks if isinstance(config.trainer.callbacks, list) else []
    kept = [callback for callback in callbacks if not str(callback.class_path).endswith(f".{finder}")]
    removed = len(kept) < len(callbacks)
    if removed:
        config.trainer.callbacks = kept
    return removed


def announcing(named: Mapping[str, Any]) -> Callback:
    """A callback that logs what the run is as hyper-parameters ``run/...``, with the learning rate that was found.

    It must come after the finders among the callbacks, so that they have searched.
    """

    def announce(trainer: Trainer, module: LightningModule) -> None:
        rate = getattr(module, "lr", None)
        found = {} if rate is None else {"lr": rate}
        for logger in trainer.loggers:
            logger.log_hyperparams({"run": {**named, **found}})

    return LambdaCallback(on_fit_start=announce)

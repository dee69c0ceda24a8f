"""What ``ncfinetune fit`` says at its end: why it ended, what is best, and what to type next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping

from ncfinetune.checkpoint_io import read_checkpoint
from ncfinetune.classifier import Classifier
from ncfinetune.resume import NUMBERS, last_saved


def conclusion(trainer: Trainer, module: Any) -> Iterator[str]:
    """Lines for a fit that came to its end.

    Args:
        trainer: Its trainer.
        module: Its model.
    """
    yield f"run: {trainer.log_dir or trainer.default_root_dir}, {_ended(trainer)}"
    data: Any = getattr(trainer, "datamodule", None)
    for part, error in getattr(data, "refused", {}).items():
        yield f"there is no {part} part: {error}"
    callback: Any = trainer.checkpoint_callback
    last = Path(getattr(callback, "dirpath", None) or "", "last.ckpt")
    best = getattr(callback, "best_model_path", "")
    path = best or last_saved(trainer) or (str(last) if last.is_file() else None)
    if path is None:
        return
    kind = "best" if best and getattr(callback, "monitor", None) else "last"
    yield f"{kind} checkpoint: {path}{_numbers(path)}"
    if isinstance(module, Classifier):
        splits = getattr(data, "splits", ["test"])
        images = "" if "test" in splits else " --split val" if "val" in splits else " --images FOLDER"
        yield f"next: ncfinetune evaluate --ckpt_path {path}{images}"


def _ended(trainer: Any) -> str:
    """How far it came, and why no further."""
    if trainer.global_step == 0:
        return "no step was trained"
    asked, done = trainer.max_epochs, trainer.current_epoch
    # SWA measures statistics in one more.
    words = [f"{done} epochs" if asked in (None, -1) else f"{min(done, asked)} of {asked} epochs"]
    for callback in trainer.early_stopping_callbacks:
        if type(callback) is EarlyStopping and callback.wait_count >= callback.patience:
            better = "lower" if callback.mode == "min" else "higher"
            words.append(f"{callback.monitor} was no {better} in the last {callback.wait_count} checks")
    return ": ".join(words)


def _numbers(path: str) -> str:
    """The epoch of a checkpoint, counted from 0 as in the progress bar, and its numbers on the validation set."""
    content = read_checkpoint(path) or {}
    known = content.get(NUMBERS, {}).get("known", {})
    values = [f"{name} {known[name]:.4g}" for name in ("val/loss", "val/acc") if name in known]
    return f" (epoch {content['epoch']}{''.join(f', {value}' for value in values)})" if values else ""

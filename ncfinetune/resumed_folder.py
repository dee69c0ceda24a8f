"""The folder of a resumed run: found from its checkpoint, written to again, and cleared of what a requeued job left."""

from __future__ import annotations

import os
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from ncfinetune.log_folders import folders
from ncfinetune.texts import some


class KnownFolder(Callback):
    """Lets the checkpoint callbacks of a resumed run know again which checkpoints are best, wherever its folder is now.

    Lightning (2.6) forgets that where their folder is another text than in the checkpoint: absolute in place of
    relative, or moved. The next checkpoint is then the best, and replaces the one that was.
    """

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the present folder into the state of the callbacks that wrote into the folder of the checkpoint."""
        loaded, states = trainer.ckpt_path, checkpoint.get("callbacks", {})
        for callback in trainer.checkpoint_callbacks:
            folder, state = getattr(callback, "dirpath", None), states.get(callback.state_key)
            if loaded is None or folder is None or not state or "://" in f"{loaded}{folder}":
                continue
            if os.path.realpath(os.path.dirname(loaded)) == os.path.realpath(folder):
                states[callback.state_key] = _moved(state, str(state.get("dirpath")), str(folder))


def _moved(value: Any, old: str, new: str) -> Any:
    """The same with one folder in place of another, in texts, keys and values."""
    if isinstance(value, Mapping):
        return {_moved(key, old, new): _moved(one, old, new) for key, one in value.items()}
    if isinstance(value, str) and (value == old or value.startswith(old + os.sep)):
        return new + value[len(old) :]
    return value


def run_of(checkpoint: str | Path | None) -> Path | None:
    """The folder of the run that a checkpoint belongs to; None if it is in no run's folder."""
    if checkpoint is None or not Path(checkpoint).is_file():
        return None
    run = Path(checkpoint).absolute().parent.parent
    return run if (run / "config.yaml").is_file() else None


def place(trainer: Any, checkpoint: str | None, command: Sequence[str]) -> str | None:
    """Make the loggers of a resumed run write to its previous folder, unless another is given.

    With a checkpoint that is the folder of the checkpoint's run. A SLURM job has a folder named by its job number and
    command, so that a requeued job, and no other run, uses the same folder again. Lightning saves the job's checkpoint
    in ``default_root_dir``, and resumes any that it finds there: it is a folder of the job's own.

    Args:
        trainer: The trainer's part of the configuration; changed in place.
        checkpoint: The checkpoint to resume from; None for a new run.
        command: The arguments of the command line.

    Returns:
        The checkpoint to resume from; None for a job that goes on from the one that it saved when it was requeued.
    """
    run = run_of(checkpoint)
    if run is not None:
        written = re.escape(str(Path(run.name, "checkpoints")))
        warnings.filterwarnings("ignore", message=f"Checkpoint directory .*{written} exists and is not empty")
    job = None
    if SLURMEnvironment.detect():
        job = f"job-{os.environ['SLURM_JOB_ID']}-{zlib.crc32(repr(list(command)).encode()):08x}"
    for options in folders(trainer):
        if options.version is None and run is not None:
            options.save_dir, options.name, options.version = str(run.parent), "", run.name
        elif options.version is None and checkpoint is None:
            options.version = job
    if job is None:
        return checkpoint
    root = _root(trainer)
    trainer.default_root_dir = str(root if root.name == job else root / job)
    if not requeued(trainer.default_root_dir):
        return checkpoint
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    return None


def _root(trainer: Any) -> Path:
    """The given ``default_root_dir``, or else the folder of the first logger."""
    if trainer.default_root_dir is None:
        for options in folders(trainer):
            if options.version is not None:
                named = f"version_{options.version}" if isinstance(options.version, int) else options.version
                return Path(options.save_dir, options.name or "", named)
    return Path(trainer.default_root_dir or ".")


def requeued(root: str | Path) -> list[Path]:
    """The checkpoints that a SLURM job has saved in its folder before it was requeued."""
    return sorted(Path(root).glob("hpc_ckpt_*.ckpt"))


def forget_requeue(trainer: Trainer) -> None:
    """Delete the checkpoints of a job that came to its end: Lightning would test them in place of the last weights."""
    if not SLURMEnvironment.detect():
        return
    if trainer.is_global_zero:
        for path in requeued(trainer.default_root_dir):
            path.unlink()
        with suppress(OSError):  # the folder may be that of the run
            Path(trainer.default_root_dir).rmdir()
    trainer.strategy.barrier("requeue")


def check_has_last(trainer: Trainer, run: Path) -> None:
    """Refuse to resume from the last checkpoint of a run that has none.

    Raises:
        ValueError: There is none; the message names last checkpoints of other runs.
    """
    places = [
        Path(getattr(callback, "dirpath", None) or run / "checkpoints") for callback in trainer.checkpoint_callbacks
    ]
    if any(any(folder.glob("last*.ckpt")) for folder in places):
        return
    runs = run.parent
    there = sorted((str(path) for path in runs.rglob("*.ckpt")), key=os.path.getmtime, reverse=True)
    found = f"there are {some(there, 3)}" if there else f"none below {runs}"
    raise ValueError(f"no last checkpoint in {' or '.join(map(str, places))}; {found}")

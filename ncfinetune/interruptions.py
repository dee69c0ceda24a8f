"""Runs that are stopped from outside, and where those that go on write to."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ncfinetune.resume import begin_again

# What a shell says of a process that SIGTERM ended.
STATUS = 128 + signal.SIGTERM
_NAME = "stopped.ckpt"
# What gloo, NCCL and the store say of where a process has ended, and did not answer within the time-out.
_CONNECTION = r"gloo|NCCL|nccl|TCPStore|Connection (closed|reset) by peer|Broken pipe"
# Where processes say that they are left, and seconds that they give each other for it: Lightning's launcher kills them
# within five.
_LEFT, _ANSWER = "ncfinetune/left", 1.0


class SaveOnSIGTERM(Callback):
    """Saves a training that SIGTERM stops, as pre-emption does, and says how to go on.

    Lightning stops after the batch. A validation that is stopped is done anew when the run goes on.
    """

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save to ``RUN/checkpoints/stopped.ckpt`` if it was SIGTERM."""
        if not isinstance(exception, SIGTERMException) or trainer.state.fn != TrainerFn.FITTING:
            return
        if trainer.validating:
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            state = progress.state_dict()
            begin_again(state)
            progress.load_state_dict(state)
        run = Path(trainer.log_dir or trainer.default_root_dir)
        path = run / "checkpoints" / _NAME
        when = f"stopped by SIGTERM in epoch {trainer.current_epoch} after step {trainer.global_step}"
        try:
            trainer.save_checkpoint(path)
        except OSError as error:
            _say(f"{when}, which is lost back to the last checkpoint: {error}")
        else:
            _say(f"{when}; to go on: ncfinetune fit --config {run / 'config.yaml'} --ckpt_path {path}")


def lost_ranks(error: RuntimeError) -> str | None:
    """What to say of an error that a process gets where others have ended; None if it is another error.

    Every process that is left says so in the store by which they found each other; those that do not are named.
    """
    if not (dist.is_available() and dist.is_initialized() and re.search(_CONNECTION, str(error))):
        return None
    own, others = dist.get_rank(), range(dist.get_world_size())
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{_LEFT}/{own}", "")
        time.sleep(_ANSWER)
        gone = [rank for rank in others if not store.check([f"{_LEFT}/{rank}"])]
    except RuntimeError:  # the store ends with the first process, whose it is
        gone = [0]
    who = (
        f"rank{'s' if len(gone) > 1 else ''} {', '.join(map(str, gone))}" if gone else "a connection between the ranks"
    )
    return (
        f"{who} ended while {len(others)} processes trained together: what it printed last says why (a process that is "
        "killed, as for want of memory, prints nothing); go on from the last checkpoint by --ckpt_path"
    )


@rank_zero_only
def _say(text: str) -> None:
    print(text, file=sys.stderr)


def run_of(checkpoint: str | Path | None) -> Path | None:
    """The run's folder that a checkpoint lies in; None if it is in none."""
    if checkpoint is None or not Path(checkpoint).is_file():
        return None
    run = Path(checkpoint).absolute().parent.parent
    return run if (run / "config.yaml").is_file() else None


def place(trainer: Any, checkpoint: str | None, command: Sequence[str]) -> None:
    """Let a training that goes on write to the folder that it wrote to before, unless one is named.

    A checkpoint's is the run that it lies in. A job of SLURM has a folder by its number and command, so that what SLURM
    starts again finds what it left, and no other run does.

    Args:
        trainer: The trainer's part of the configuration; changed.
        checkpoint: What is resumed; None for a new run.
        command: The arguments of the command line.
    """
    # Another logger may overwrite what is in the folder, as CSVLogger does, or mean something else by a version.
    if not str(getattr(trainer.logger, "class_path", "")).endswith(".TensorBoardLogger"):
        return
    options = trainer.logger.init_args
    if options.get("version") is not None:
        return
    run = run_of(checkpoint)
    if run is not None:
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        options.save_dir, options.name, options.version = str(run.parent), "", run.name
    elif checkpoint is None and SLURMEnvironment.detect():
        job = os.environ["SLURM_JOB_ID"]
        options.version = f"job-{job}-{zlib.crc32(repr(list(command)).encode()):08x}"
        if trainer.default_root_dir is None:
            trainer.default_root_dir = str(Path(options.save_dir, options.name or "", options.version))


def last_of(trainer: Trainer, run: Path) -> None:
    """Refuse to go on from the last checkpoint of a run that has none.

    Raises:
        ValueError: There is none; names those of other runs.
    """
    folders = [
        Path(getattr(callback, "dirpath", None) or run / "checkpoints") for callback in trainer.checkpoint_callbacks
    ]
    if any(any(folder.glob("last*.ckpt")) for folder in folders):
        return
    runs = run.parent
    there = sorted((str(path) for path in runs.rglob("*.ckpt")), key=os.path.getmtime, reverse=True)
    found = f"there are {', '.join(there[:3])}{', ...' if len(there) > 3 else ''}" if there else f"none below {runs}"
    raise ValueError(f"no last checkpoint in {' or '.join(map(str, folders))}; {found}")

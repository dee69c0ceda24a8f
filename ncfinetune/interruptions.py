"""Interrupted runs: saving on SIGTERM, lost processes, and the folder of a resumed run."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ncfinetune.log_folders import folders
from ncfinetune.resume import last_saved

# Exit status of a process ended by a signal: 128 + 15, 128 + 2.
STATUS, INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT
_NAME = "stopped.ckpt"
# In errors of gloo, NCCL and the store if another process has ended or did not answer within the time-out.
_CONNECTION = r"gloo|NCCL|nccl|TCPStore|Connection (closed|reset) by peer|Broken pipe"
# Key under which the remaining processes report in the store, and seconds they wait for each other: Lightning's
# launcher kills them within five.
_LEFT, _ANSWER = "ncfinetune/left", 1.0


class SaveOnSIGTERM(Callback):
    """Saves a training run on SIGTERM, as sent at pre-emption, and prints the command that resumes it.

    Lightning stops after the batch. An interrupted validation is repeated when the run is resumed. Ctrl-C can come
    within a step, whose weights are not saved: the command printed then is that of the last checkpoint.
    """

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save to ``RUN/checkpoints/stopped.ckpt`` if the exception is due to SIGTERM; say how to resume."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if isinstance(exception, KeyboardInterrupt):
            _say(f"interrupted in epoch {trainer.current_epoch} after step {trainer.global_step}; {_resuming(trainer)}")
        if not isinstance(exception, SIGTERMException):
            return
        if trainer.sanity_checking:  # a resumed run has not taken up its random numbers yet
            _say("stopped by SIGTERM before a step was trained; start again by the same command")
            return
        run = Path(trainer.log_dir or trainer.default_root_dir)
        path = run / "checkpoints" / _NAME
        when = f"stopped by SIGTERM in epoch {trainer.current_epoch} after step {trainer.global_step}"
        try:
            trainer.save_checkpoint(path)
        except OSError as error:
            _say(f"{when}; progress since the last checkpoint is lost: {error}")
        else:
            _say(f"{when}; to resume: ncfinetune fit --config {run / 'config.yaml'} --ckpt_path {path}")


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


def _resuming(trainer: Any) -> str:
    """How to go on from the last checkpoint."""
    path = last_saved(trainer)
    if path is None:
        return "it has saved no checkpoint yet"
    run = Path(trainer.log_dir or trainer.default_root_dir)
    return f"to resume from the last checkpoint: ncfinetune fit --config {run / 'config.yaml'} --ckpt_path {path}"


def lost_ranks(error: RuntimeError) -> str | None:
    """The message for an error that a process gets because other processes ended; None for other errors.

    Every remaining process reports in the rendezvous store; the ranks that do not report are named.
    """
    if not (dist.is_available() and dist.is_initialized() and re.search(_CONNECTION, str(error))):
        return None
    own, others = dist.get_rank(), range(dist.get_world_size())
    if threading.current_thread() is threading.main_thread():
        # torchrun terminates the processes that remain, which may be before they have reported.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{_LEFT}/{own}", "")
        time.sleep(_ANSWER)
        gone = [rank for rank in others if not store.check([f"{_LEFT}/{rank}"])]
    except RuntimeError:  # the store belongs to rank 0 and ends with it
        gone = [0]
    who = (
        f"rank{'s' if len(gone) > 1 else ''} {', '.join(map(str, gone))}" if gone else "a connection between the ranks"
    )
    return (
        f"{who} ended while {len(others)} processes trained together: its last output says why (a process that was "
        "killed, as when memory runs out, prints nothing); resume from the last checkpoint by --ckpt_path"
    )


@rank_zero_only
def _say(text: str) -> None:
    print(text, file=sys.stderr)


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


def last_of(trainer: Trainer, run: Path) -> None:
    """Refuse to resume from the last checkpoint of a run that has none.

    Raises:
        ValueError: There is none; the message names last checkpoints of other runs.
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

"""Interrupted runs: saving on SIGTERM, how to resume, and lost processes."""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

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

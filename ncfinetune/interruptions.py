"""Interrupted runs: saving on SIGTERM, how to resume, and lost processes."""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose
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

    Several processes act on a signal together, before the next training batch and not within a validation, whichever
    of them got it; so they do on the signal by which SLURM announces a job's end. Lightning (2.6) communicates in its
    handlers, wherever a process is when the signal comes, so that the processes would wait for each other.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._noted: set[int] = set()
        self._stops = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the signals of an earlier fit."""
        self._handlers, self._noted = {}, set()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note signals from now on, since Lightning has registered its handlers."""
        self._note_signals(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As at the start of a sanity check, which may have been left out."""
        self._note_signals(trainer)

    def _note_signals(self, trainer: Trainer) -> None:
        """Replace Lightning's handlers, if there are several processes, until it restores those before its own."""
        if trainer.world_size == 1 or threading.current_thread() is not threading.main_thread():
            return
        for number in sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}):
            if isinstance(handler := signal.getsignal(number), _HandlersCompose):
                self._handlers[number] = handler
                signal.signal(number, lambda number, frame: self._noted.add(number))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Call Lightning's handlers of signals that any process has noted, on all of them."""
        if not self._handlers:
            return
        noted = [float(number in self._noted) for number in self._handlers]
        reduced = trainer.strategy.reduce(torch.tensor(noted, device=trainer.strategy.root_device), reduce_op="max")
        for number, is_due in zip(self._handlers, reduced.tolist(), strict=True):  # Lightning has waited here too
            if is_due:
                self._noted.discard(number)
                self._handlers[number](number, None)

    def on_validation_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Have several processes, whose numbers of batches may differ, stop after a validation only."""
        if self._handlers:
            self._stops, trainer._signal_connector.received_sigterm = trainer.received_sigterm, False

    def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Stop after the validation, if that is due."""
        if self._handlers:
            trainer._signal_connector.received_sigterm = self._stops

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save to ``RUN/checkpoints/stopped.ckpt`` if the exception is due to SIGTERM; say how to resume."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
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
    """How to go on from the last checkpoint; no collective call, since processes get Ctrl-C at different places."""
    path = last_saved(trainer)
    if path is None:
        return "it has saved no checkpoint yet"
    named = "log_dir" if isinstance(trainer.logger, TensorBoardLogger | CSVLogger) else "save_dir"
    run = Path(getattr(trainer.logger, named, None) or trainer.default_root_dir)
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

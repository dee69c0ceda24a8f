"""Of several processes one dies: the others say which, in one line."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from test_interruptions import RUN

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}


class Die(Callback):
    """Lets one of the processes raise, or be killed, after a batch in the middle of an epoch."""

    def __init__(self, rank: int, killed: bool) -> None:
        self.rank, self.killed = rank, killed

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2 and trainer.global_rank == self.rank:
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("no more")


def _arguments(rank: int, killed: bool, folder: Path) -> list[str]:
    """The command without its interpreter; process ``rank`` ends early."""
    die = [f"--trainer.callbacks.rank={rank}", f"--trainer.callbacks.killed={str(killed).lower()}"]
    run = ["ncfinetune", *RUN, "--trainer.devices", "2", "--trainer.logger.init_args.save_dir", str(folder)]
    return [*run, "--trainer.callbacks+=test_dying_ranks.Die", *die]


def _named(rank: int, other: int) -> str:
    """What process ``other`` says of the one that died."""
    return (
        f"error: rank {other}: rank {rank} ended while 2 processes trained together: its last output says why (a "
        "process that was killed, as when memory runs out, prints nothing); resume from the last checkpoint by "
        "--ckpt_path"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "killed"), [(1, False), (0, True)])
def test_the_rank_that_died_is_named(rank: int, killed: bool, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", *_arguments(rank, killed, tmp_path)]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**ENVIRONMENT, **place, "LOCAL_RANK": str(own)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for own in range(2)
    ]
    try:
        said = [process.communicate(timeout=150)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    other = 1 - rank
    lines = [line for line in said[other].splitlines() if line.startswith("error: ")]
    assert lines == [_named(rank, other)], said[other]
    assert "Traceback" not in said[other]
    assert processes[other].returncode == 2
    if killed:
        assert processes[rank].returncode == -signal.SIGKILL
    else:
        assert f"error: rank {rank}: no more" in said[rank].splitlines()


@pytest.mark.slow
def test_the_rank_that_died_is_named_under_torchrun(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*run, *_arguments(1, True, tmp_path)]
    ended = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=150)
    assert ended.returncode == 1
    assert [line for line in ended.stderr.splitlines() if line.startswith("error: ")] == [_named(1, 0)], ended.stderr

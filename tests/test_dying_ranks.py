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


class Die(Callback):
    """Lets one of the processes raise, or be killed, after a batch in the middle of an epoch."""

    def __init__(self, rank: int, killed: bool) -> None:
        self.rank, self.killed = rank, killed

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2 and trainer.global_rank == self.rank:
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("no more")


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "killed"), [(1, True), (1, False), (0, True)])
def test_the_rank_that_died_is_named(rank: int, killed: bool, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ncfinetune", *RUN, "--trainer.devices", "2"]
    command += ["--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.callbacks+=test_dying_ranks.Die"]
    command += [f"--trainer.callbacks.rank={rank}", f"--trainer.callbacks.killed={str(killed).lower()}"]
    home = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, **place, "LOCAL_RANK": str(own), "PYTHONPATH": home, "OMP_NUM_THREADS": "1"},
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
    assert lines == [
        f"error: rank {other}: rank {rank} ended while 2 processes trained together: its last output says why (a "
        "process that was killed, as when memory runs out, prints nothing); resume from the last checkpoint by "
        "--ckpt_path"
    ], said[other]
    assert "Traceback" not in said[other]
    assert processes[other].returncode == 2
    if killed:
        assert processes[rank].returncode == -signal.SIGKILL
    else:
        assert f"error: rank {rank}: no more" in said[rank].splitlines()

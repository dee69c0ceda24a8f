"""Runs that are stopped from outside go on in their folder as if they had not been."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import __version__ as lightning_version
from lightning.pytorch.loggers import CSVLogger
from test_cli import QUIET, _refusal

from ncfinetune import Supervised
from ncfinetune.atomic import replacing
from ncfinetune.checkpoint_io import AtomicCheckpointIO
from ncfinetune.cli import main
from ncfinetune.csv_metrics import read_csv
from ncfinetune.log_folders import keep_rows
from ncfinetune.runs import Run

NETWORK = "{name: test_vit, img_size: 8, patch_size: 4, in_chans: 1, drop_path_rate: 0.2}"
RUN = [
    *("fit", *QUIET, "--trainer.max_epochs", "3", "--trainer.log_every_n_steps", "1"),
    *("--model", "Supervised", "--model.backbone", NETWORK, "--data", "Digits", "--data.shots", "10"),
    *("--data.batch_size", "20", "--model.lr_scheduler", "StepLR", "--model.lr_scheduler.step_size", "1"),
]


class Terminate(Callback):
    """Sends SIGTERM after a batch of training, or of validation, that ``step`` steps came before.

    Its process gets it, and, as a job's processes do, those of its loaders.
    """

    def __init__(self, step: int, validation: bool = False) -> None:
        self.step, self.validation = step, validation

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and not self.validation:
            self.terminate(trainer)

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and self.validation:
            self.terminate(trainer)

    def terminate(self, trainer: Any) -> None:
        for worker in getattr(trainer.train_dataloader._iterator, "_workers", []):
            # By another process: torch's workers take a signal of their own parent for the end of the pass.
            subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
            time.sleep(0.2)
            assert worker.is_alive()
        os.kill(os.getpid(), signal.SIGTERM)


def _place(folder: Path) -> list[str]:
    return ["--trainer.logger.init_args.save_dir", str(folder)]


@pytest.mark.parametrize(
    ("stop", "workers"),
    [
        pytest.param({"step": 7}, 1, id="training"),
        pytest.param({"step": 10, "validation": True}, 0, id="validation", marks=pytest.mark.slow),
    ],
)
def test_sigterm_loses_nothing(
    stop: dict[str, Any], workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*RUN, "--data.num_workers", str(workers)]
    assert main([*run, *_place(tmp_path / "whole")]) is None
    terminate = ["--trainer.callbacks+=test_interruptions.Terminate"]
    terminate += [f"--trainer.callbacks.{name}={value}" for name, value in stop.items()]
    assert main([*run, *terminate, *_place(tmp_path / "stopped")]) == 143
    whole, stopped = (tmp_path / name / "version_0" for name in ("whole", "stopped"))
    way = capsys.readouterr().err.strip().splitlines()[-1]
    command = f"fit --config {stopped / 'config.yaml'} --ckpt_path {stopped / 'checkpoints' / 'stopped.ckpt'}"
    when = f"in epoch {(stop['step'] - 1) // 5} after step {stop['step']}"
    assert way == f"stopped by SIGTERM {when}; to resume: ncfinetune {command}"
    # The saved configuration is that of a new run, and it is taken up without what stopped it.
    config = yaml.safe_load((stopped / "config.yaml").read_text())
    config["trainer"]["callbacks"] = None
    (stopped / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(command.split()) is None
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["version_0"]
    assert yaml.safe_load((stopped / "config.yaml").read_text()) == config  # without ckpt_path, and without a version
    weights = [
        torch.load(next((run / "checkpoints").glob("epoch=2*.ckpt")), weights_only=True)["state_dict"]
        for run in (whole, stopped)
    ]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    assert Run(stopped).scalars == Run(whole).scalars


def _csv(folder: Path, version: str) -> list[str]:
    place = ["--trainer.logger.save_dir", str(folder), "--trainer.logger.name", "", "--trainer.logger.version", version]
    return ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", *place]


@pytest.mark.parametrize("version", ["one", "null"])
def test_a_resumed_run_goes_on_with_its_csv(version: str, tmp_path: Path) -> None:
    """Lightning deletes the file when it is opened, where the version is given, or begins another folder."""
    for name, epochs in (("whole", "3"), ("part", "2")):
        assert main([*RUN, *_csv(tmp_path / name, version), "--trainer.max_epochs", epochs]) is None
    whole, part = (next((tmp_path / name).iterdir()) for name in ("whole", "part"))
    (checkpoint,) = (part / "checkpoints").glob("*.ckpt")
    resume = ["fit", "--config", str(part / "config.yaml"), "--ckpt_path", str(checkpoint), "--trainer.max_epochs", "3"]
    assert main(resume) is None
    assert [*(tmp_path / "part").iterdir()] == [part]
    assert sorted(path.name for path in part.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert Run(part).scalars == Run(whole).scalars


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty")
def test_rows_of_no_run_are_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "metrics.csv").write_text("step,val/acc\n99,0.5\n")
    assert main([*RUN, *_csv(tmp_path, "one"), "--trainer.max_epochs", "1"]) is None
    assert Run(tmp_path / "one").steps == 5


def _logger(folder: Path) -> CSVLogger:
    return CSVLogger(folder, name="", version="a")


@pytest.mark.parametrize("killed", [False, True])
def test_rows_of_a_csv_are_kept_to_the_letter(killed: bool, tmp_path: Path) -> None:
    first, second = _logger(tmp_path), _logger(tmp_path)
    first.log_metrics({"val/acc": 0.1 + 0.2, "epoch": 0}, step=3)
    first.log_metrics({"train/loss": 1e-30}, step=4)
    first.save()
    path = tmp_path / "a" / "metrics.csv"
    text = path.read_text()
    if killed:  # with the rows put aside, and a part of them written again
        path.rename(path.with_name("metrics_before.csv"))
        path.write_text(text[:20])
    keep_rows(Trainer(logger=[second], accelerator="cpu", enable_progress_bar=False))
    assert path.read_text() == text
    assert [*path.parent.iterdir()] == [path]
    second.log_metrics({"test/acc": 0.5}, step=9)
    second.save()
    points, faults = read_csv(path.parent)
    assert points == {
        "epoch": [(3, 0.0)],
        "val/acc": [(3, 0.1 + 0.2)],
        "train/loss": [(4, 1e-30)],
        "test/acc": [(9, 0.5)],
    }
    assert not faults


def test_a_damaged_csv_is_kept_beside_its_whole_rows(tmp_path: Path) -> None:
    path = tmp_path / "a" / "metrics.csv"
    path.parent.mkdir()
    path.write_text(text := "step,val/acc\n3,0.5\n7,0.7")
    said = f"{path}: its last row is cut; the 1 rows before that are kept, and the file as it was is "
    with pytest.warns(UserWarning, match=re.escape(f"{said}{tmp_path / 'a' / 'metrics_damaged.csv'}")):
        keep_rows(Trainer(logger=[_logger(tmp_path)], accelerator="cpu", enable_progress_bar=False))
    assert read_csv(path.parent) == ({"val/acc": [(3, 0.5)]}, [])
    assert (tmp_path / "a" / "metrics_damaged.csv").read_text() == text


class TerminateCheck(Callback):
    """Sends its process SIGTERM in the sanity check."""

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_before_the_first_step_leaves_what_was_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint from before it would have other random numbers, and a new run no configuration to go on with."""
    terminate = ["--trainer.callbacks+=test_interruptions.TerminateCheck"]
    assert main([*RUN, *terminate, *_place(tmp_path)]) == 143
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == "stopped by SIGTERM before a step was trained; start again by the same command"
    assert not list(tmp_path.iterdir())
    assert main([*RUN, *_place(tmp_path), "--trainer.max_epochs", "1"]) is None
    run = tmp_path / "version_0"
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    resume = ["fit", "--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint), "--trainer.max_epochs", "2"]
    assert main([*resume, *terminate]) == 143
    assert [*(run / "checkpoints").iterdir()] == [checkpoint]


class Interrupt(Callback):
    """Ctrl-C after a batch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [3, 7])
def test_ctrl_c_says_how_to_go_on(step: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupt = ["--trainer.callbacks+=test_interruptions.Interrupt", f"--trainer.callbacks.step={step}"]
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert main([*RUN, *interrupt, *_place(tmp_path)]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)  # which Lightning ignores from then on
    run = tmp_path / "version_0"
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("interrupted in epoch")]
    if step == 3:
        assert said == "interrupted in epoch 0 after step 3; it has saved no checkpoint yet"
        return
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    command = f"ncfinetune fit --config {run / 'config.yaml'} --ckpt_path {checkpoint}"
    assert said == f"interrupted in epoch 1 after step 7; to resume from the last checkpoint: {command}"


@pytest.mark.parametrize("moved", [False, True])
def test_what_was_best_stays_so_in_a_resumed_run(moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is relative at first and absolute then, or moved; of the epochs the first is best."""
    monkeypatch.chdir(tmp_path)
    keep = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=epoch", "--trainer.callbacks.mode=min"]
    keep += ["--trainer.callbacks.filename=best", "--trainer.callbacks.enable_version_counter=false"]
    keep += ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename=last"]
    assert main([*RUN, *keep, *_place(Path("runs")), "--trainer.max_epochs", "2"]) is None
    if moved:
        (tmp_path / "runs").rename(tmp_path / "elsewhere")
    run = Path("elsewhere" if moved else "runs", "version_0")
    before = {path.name: torch.load(path, weights_only=True)["global_step"] for path in run.glob("checkpoints/*.ckpt")}
    assert before == {"best.ckpt": 5, "last.ckpt": 10}
    last = str(run / "checkpoints" / "last.ckpt")
    assert main(["fit", "--config", str(run / "config.yaml"), "--ckpt_path", last, "--trainer.max_epochs", "4"]) is None
    after = {path.name: torch.load(path, weights_only=True)["global_step"] for path in run.glob("checkpoints/*.ckpt")}
    assert after == {"best.ckpt": 5, "last.ckpt": 20}
    states = torch.load(last, weights_only=True)["callbacks"]
    kept = [state for name, state in states.items() if name.startswith("ModelCheckpoint") and "'epoch'" in name]
    assert [state["best_model_path"] for state in kept] == [str(tmp_path / run / "checkpoints" / "best.ckpt")]


def test_sigterm_on_a_full_disk_says_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(checkpoint: Any, part: Path) -> None:
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ncfinetune.checkpoint_io.torch.save", full)
    terminate = ["--trainer.callbacks+=test_interruptions.Terminate", "--trainer.callbacks.step=3"]
    assert main([*RUN, *terminate, *_place(tmp_path)]) == 143
    path = tmp_path / "version_0" / "checkpoints" / "stopped.ckpt"
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "stopped by SIGTERM in epoch 0 after step 3; progress since the last checkpoint is lost: cannot write "
        f"'{path}': [Errno 28] No space left on device; make room there, or choose another folder"
    )
    assert not path.parent.exists() or not list(path.parent.iterdir())


def test_to_go_on_from_the_last_checkpoint_needs_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, *_place(tmp_path), "--trainer.max_epochs", "1"]) is None
    error = _refusal(capsys, *RUN, *_place(tmp_path), "--ckpt_path", "last")
    there = tmp_path / "version_0" / "checkpoints" / "epoch=0-step=5.ckpt"
    assert error == f"error: no last checkpoint in {tmp_path / 'version_1' / 'checkpoints'}; there are {there}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_the_last_checkpoint_is_looked_for_where_it_is_kept(tmp_path: Path) -> None:
    keep = ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={tmp_path / 'kept'}"]
    keep += ["--trainer.callbacks.save_last=true", *_place(tmp_path)]
    assert main([*RUN, *keep, "--trainer.max_epochs", "1"]) is None
    assert main([*RUN, *keep, "--trainer.max_epochs", "2", "--ckpt_path", "last"]) is None
    assert torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)["global_step"] == 10


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A job of SLURM in an empty folder; the commands by which it was queued again."""
    for name, value in {"JOB_ID": "17", "NTASKS": "1", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NODEID", "0")
    requeued: list[list[str]] = []
    monkeypatch.setattr(
        "lightning.pytorch.trainer.connectors.signal_connector.call", lambda words: requeued.append(words) or 0
    )
    monkeypatch.chdir(tmp_path)
    return requeued


JOB = [*RUN, "--trainer.callbacks+=test_interruptions.Requeue", "--trainer.devices", "1", "--test_after_fit", "true"]


def _tested(run: Path) -> dict[str, float]:
    return {name: values[-1] for name, values in Run(run).scalars.items() if name.startswith(("test/", "val/"))}


@pytest.mark.slow
@pytest.mark.parametrize("version", [None, "mine", 3], ids=str)
def test_a_job_that_is_queued_again_goes_on_where_it_was_and_is_tested_as_if_it_had_not_been(
    version: str | int | None, slurm: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = [] if version is None else ["--trainer.logger.init_args.version", str(version)]
    job = [*JOB, *_place(tmp_path / "runs"), *named]
    with pytest.raises(SystemExit):
        main(job)
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("job-17-") if version is None else run.name == {3: "version_3"}.get(version, version)
    assert len(list(run.rglob("hpc_ckpt_1.ckpt"))) == 1
    assert slurm == [["scontrol", "requeue", "17"]]
    assert list(tmp_path.glob("*.ckpt")) == []
    monkeypatch.setenv("SLURM_JOB_ID", "18")  # another job, which has another folder and goes on with nothing
    other = [*JOB, *_place(tmp_path / "others"), "--seed_everything", "1"]
    with pytest.raises(SystemExit):
        main(other)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert main(job) is None
    assert list(tmp_path.rglob("runs/**/hpc_ckpt_*.ckpt")) == []
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    assert main([word for word in [*job, *_place(tmp_path / "whole")] if "Requeue" not in word]) is None
    (whole,) = (tmp_path / "whole").iterdir()
    assert _tested(run) == _tested(whole)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_job_that_resumes_a_run_goes_on_from_its_own_checkpoint(slurm: list[list[str]], tmp_path: Path) -> None:
    Requeue.starts.clear()
    job = [*JOB, *_place(tmp_path / "runs")]
    job[job.index("--trainer.max_epochs") + 1] = "1"
    assert main(job) is None
    (first,) = (tmp_path / "runs").rglob("checkpoints/*.ckpt")
    job[job.index("--trainer.max_epochs") + 1] = "3"
    job += ["--ckpt_path", str(first)]
    with pytest.raises(SystemExit):
        main(job)
    assert main(job) is None
    assert Requeue.starts == [0, 5, 7]
    assert list(tmp_path.rglob("hpc_ckpt_*.ckpt")) == []


class Requeue(Callback):
    """SLURM's signal after the seventh step, and the end of the process."""

    starts: ClassVar[list[int]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 7 and self.due:
            raise SystemExit(9)

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        self.due = trainer.global_step < 7
        self.starts.append(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 7:
            os.kill(os.getpid(), signal.SIGUSR1)


class Late(Callback):
    """A signal after the seventh step, to one process that is late or to both, while the other waits for it."""

    def __init__(self, number: int, both: bool = False) -> None:
        self.number, self.both = number, both

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        self.due = trainer.global_step < 7

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self.due and trainer.global_step == 7:
            if trainer.is_global_zero:
                time.sleep(0.5)
            if trainer.is_global_zero or self.both:
                os.kill(os.getpid(), self.number)
        if self.both and self.due and trainer.global_step == 9:
            raise SystemExit(9)


TWO = [*RUN, "--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "10"]


# What Lightning leaves in the environment of a process that has trained with others, as that of these tests may have.
LEFT = {"LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def _started(words: list[str], **environment: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if name not in LEFT}
    tests = str(Path(__file__).parent)
    paths = os.pathsep.join([tests, str(Path(tests).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "ncfinetune", *words],
        env={**clean, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _ended(*processes: subprocess.Popen[str]) -> list[tuple[int, str]]:
    try:
        return [(process.wait(), said) for process in processes for said in [process.communicate(timeout=300)[1]]]
    finally:
        for process in processes:
            process.kill()


def _last_weights(run: Path) -> dict[str, torch.Tensor]:
    (path,) = (run / "checkpoints").glob("epoch=2*.ckpt")
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.slow
def test_processes_that_wait_for_each_other_stop_together(tmp_path: Path) -> None:
    late = ["--trainer.callbacks+=test_interruptions.Late", f"--trainer.callbacks.number={int(signal.SIGTERM)}"]
    ((code, said),) = _ended(_started([*TWO, *_place(tmp_path / "stopped"), *late]))
    run = tmp_path / "stopped" / "version_0"
    resume = ["fit", "--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "stopped.ckpt")]
    assert code == 143
    assert f"stopped by SIGTERM in epoch 1 after step 8; to resume: ncfinetune {' '.join(resume)}" in said
    ends = _ended(_started(resume), _started([*TWO, *_place(tmp_path / "whole")]))
    assert [code for code, _ in ends] == [0, 0], ends
    stopped, whole = (_last_weights(tmp_path / name / "version_0") for name in ("stopped", "whole"))
    assert all(torch.equal(whole[name], value) for name, value in stopped.items())


@pytest.mark.slow
def test_tasks_of_a_job_that_wait_for_each_other_are_queued_again(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    command.chmod(0o755)
    late = ["--trainer.callbacks+=test_interruptions.Late", f"--trainer.callbacks.number={int(signal.SIGUSR1)}"]
    words = [*TWO, *_place(tmp_path / "runs"), *late, "--trainer.callbacks.both=true"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"JOB_ID": "17", "JOB_NAME": "train", "NTASKS": "2", "NTASKS_PER_NODE": "2", "NODEID": "0"}
    for starts, codes in enumerate(([9, 9], [0, 0])):
        tasks = [{**job, "NODELIST": "127.0.0.1", "PROCID": str(rank), "LOCALID": str(rank)} for rank in range(2)]
        path = {"PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}", "MASTER_ADDR": "127.0.0.1"}
        path["MASTER_PORT"] = str(port + starts)
        ends = _ended(*(_started(words, **path, **{f"SLURM_{k}": v for k, v in task.items()}) for task in tasks))
        assert [code for code, _ in ends] == codes, ends
        saved = [torch.load(path, weights_only=False)["global_step"] for path in tmp_path.rglob("hpc_ckpt_1.ckpt")]
        assert saved == ([7] if not starts else [])
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    (run,) = (tmp_path / "runs").iterdir()
    assert Run(run).epochs == 3


def test_ctrl_c_while_a_checkpoint_is_saved_names_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning has its new name by then, and not the file."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert main([*RUN, *_place(tmp_path), "--trainer.callbacks+=test_interruptions.InterruptSave"]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    (before,) = (tmp_path / "version_0" / "checkpoints").glob("*.ckpt")
    assert before.name == "epoch=0-step=5.ckpt"
    assert f"--ckpt_path {before}" in capsys.readouterr().err


class InterruptSave(Callback):
    """Ctrl-C while the second checkpoint is saved."""

    def on_save_checkpoint(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step > 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("logger", ["true", "null"])
def test_lightnings_logger_is_ours(logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*RUN, "--trainer.logger", logger, "--trainer.max_epochs", "1"]) is None
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert checkpoint.parent.parent == tmp_path / "runs" / "version_0"
    assert main(["test", "--ckpt_path", str(checkpoint)]) is None
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["version_0"]
    assert list((tmp_path / "runs" / "version_0" / "test").glob("events*"))


class Touching:
    """Leaves a mark where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address under which the test's folder is served, as another machine would."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with Server(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Server(ThreadingHTTPServer):
    """Says nothing of clients that leave before the end of a file, as those do who look at its beginning only."""

    def handle_error(self, *_: Any) -> None:
        pass


class Quiet(SimpleHTTPRequestHandler):
    """Serves files, and says nothing of it."""

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_remote_checkpoint_is_read_as_data(tmp_path: Path, served: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, *_place(tmp_path), "--trainer.max_epochs", "1"]) is None
    path = next((tmp_path / "version_0" / "checkpoints").glob("*.ckpt"))
    content = torch.load(path, weights_only=True)
    torch.save(content, tmp_path / "data.ckpt")
    torch.save({**content, "more": Touching(str(tmp_path / "mark"))}, tmp_path / "more.ckpt")
    resumed = [*RUN, *_place(tmp_path), "--trainer.max_epochs", "2", "--ckpt_path"]
    assert main([*resumed, f"{served}/data.ckpt"]) is None
    error = _refusal(capsys, *resumed, f"{served}/more.ckpt")
    assert error.startswith("error: --ckpt_path holds code, which is not run here: ")
    assert not (tmp_path / "mark").exists()


def test_a_learner_from_a_remote_checkpoint_is_read_as_data(
    tmp_path: Path, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = {"name": "test_vit", "img_size": 8, "patch_size": 4, "in_chans": 1}
    model = Supervised(3, backbone)
    content = {
        "state_dict": model.state_dict(),
        "pytorch-lightning_version": lightning_version,
        "hyper_parameters": {"num_classes": 3, "backbone": backbone},
    }
    torch.save(content, tmp_path / "data.ckpt")
    torch.save({**content, "more": Touching(str(tmp_path / "mark"))}, tmp_path / "more.ckpt")
    again = Supervised.load_from_checkpoint(f"{served}/data.ckpt")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    with pytest.raises(UnpicklingError, match="Weights only load failed"):
        Supervised.load_from_checkpoint(f"{served}/more.ckpt")
    assert not (tmp_path / "mark").exists()
    Supervised.load_from_checkpoint(f"{served}/more.ckpt", weights_only=False)  # on one's own word
    assert (tmp_path / "mark").exists()

    def of_earlier_versions(checkpoint_path: str, map_location: Any = None) -> None: ...

    monkeypatch.setattr(LightningModule, "load_from_checkpoint", of_earlier_versions)
    with pytest.raises(
        ValueError, match="is on another machine, and this Lightning would run its code; fetch it first"
    ):
        Supervised.load_from_checkpoint(f"{served}/data.ckpt")


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.txt"
    with replacing(path) as part:
        part.write_text("first")
    with pytest.raises(UnicodeEncodeError), replacing(path) as part:
        part.write_text("half and \N{SNOWMAN}", encoding="ascii")
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_a_checkpoint_that_cannot_be_written_leaves_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, files = tmp_path / "last.ckpt", AtomicCheckpointIO()
    files.save_checkpoint({"step": 1}, path)

    def full(checkpoint: Any, part: Path) -> None:
        part.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 128 vs 22")

    monkeypatch.setattr("ncfinetune.checkpoint_io.torch.save", full)
    with pytest.raises(OSError, match=r"^cannot write '.*last.ckpt': .*unexpected pos.*; make room there, or choose"):
        files.save_checkpoint({"step": 2}, path)
    assert files.load_checkpoint(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]

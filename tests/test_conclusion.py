"""What a fit says at its end: why it ended, which checkpoint is best, and what to type next."""

import logging
from pathlib import Path

import pytest
import torch
from image_files import write_image
from test_cli import PIECES, QUIET, TINY

from ncfinetune.cli import main

CLOSED = [
    "--model",
    "FineTuner",
    "--model.backbone",
    TINY,
    "--model.allow_random",
    "true",
    "--model.head_init",
    "ridge",
]
KEEP = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename=best"]


def _said(folder: Path, caplog: pytest.LogCaptureFixture, *words: str) -> list[str]:
    """The lines at the end of a fit in ``folder``/version_0."""
    caplog.clear()
    caplog.set_level(logging.INFO)
    assert main(["fit", *QUIET, "--trainer.logger.init_args.save_dir", str(folder), *words]) is None
    run = folder / "version_0"
    assert f"run: {run}" in caplog.messages  # at the start
    (end,) = [message for message in caplog.messages if message.startswith(f"run: {run}, ")]
    return end.splitlines()


def test_early_stopping_is_explained_and_the_best_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the epochs the first is best, by their number."""
    monitor = ["--trainer.callbacks.monitor=epoch", "--trainer.callbacks.mode=min"]
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.patience=2"]
    stop += ["--trainer.callbacks.monitor=val/acc", "--trainer.callbacks.min_delta=1", "--trainer.callbacks.mode=max"]
    lines = _said(tmp_path, caplog, *PIECES, *KEEP, *monitor, *stop, "--trainer.max_epochs=9")
    run = tmp_path / "version_0"
    best = run / "checkpoints" / "best.ckpt"
    numbers = torch.load(best, weights_only=True)["numbers"]["known"]
    assert lines == [
        f"run: {run}, 3 of 9 epochs: val/acc was no higher in the last 2 checks",
        f"best checkpoint: {best} (epoch 0, val/loss {numbers['val/loss']:.4g}, val/acc {numbers['val/acc']:.4g})",
        f"next: ncfinetune evaluate --ckpt_path {best}",
    ]


@pytest.mark.parametrize("monitor", [[], [*KEEP, "--trainer.callbacks.monitor=val/loss"]])
def test_a_closed_form_has_its_checkpoint_named(
    monitor: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = _said(tmp_path, caplog, *CLOSED, *PIECES[4:], *monitor, "--trainer.max_epochs=0")
    last = tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    assert lines == [
        f"run: {last.parent.parent}, no step was trained",
        f"last checkpoint: {last}",
        f"next: ncfinetune evaluate --ckpt_path {last}",
    ]


def test_what_was_pre_trained_is_not_to_be_evaluated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    simclr = ["--model", "SimCLR", "--model.backbone", TINY, "--data.views", "2", "--data.augmentation", "simclr"]
    lines = _said(tmp_path, caplog, *PIECES[4:], *simclr, "--trainer.max_epochs=1")
    (checkpoint,) = (tmp_path / "version_0" / "checkpoints").iterdir()
    assert lines[0] == f"run: {tmp_path / 'version_0'}, 1 of 1 epochs"
    assert lines[1].startswith(f"last checkpoint: {checkpoint}")
    assert len(lines) == 2


def test_without_test_images_the_validation_images_are_to_be_evaluated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ncfinetune.datamodules.Digits.splits", ["train", "val"])
    lines = _said(tmp_path, caplog, *PIECES, "--trainer.max_epochs=1")
    assert lines[-1].endswith(".ckpt --split val")


@pytest.mark.filterwarnings("ignore:there is no test part", "ignore:Total length of")
def test_test_images_of_other_classes_are_said_once_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, place in enumerate(("train/a", "train/b", "test/b", "test/c")):
        write_image(tmp_path / "photos" / place / "0.png", number)
    data = ["--data", "ImageFolder", "--data.root", str(tmp_path / "photos"), "--data.image_size=8"]
    colour = ["--model", "Supervised", "--model.backbone", TINY.replace("in_chans: 1", "in_chans: 3")]
    lines = _said(tmp_path, caplog, *colour, *data, "--data.num_workers=0", "--trainer.max_epochs=1")
    other = "it lacks ['a'] and has also ['c']"
    assert lines[1] == f"there is no test part: expected the classes of train in test; {other}"
    assert lines[-1].endswith(".ckpt --images FOLDER")

"""What the command line prints, and what it leaves unsaid."""

import io
import logging
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.progress import Progress
from tiny import SMALL, plain_sgd

from ncfinetune import Supervised, progress
from ncfinetune.callbacks import NeuralCollapseTracker
from ncfinetune.cli import main
from ncfinetune.datamodules import Digits
from ncfinetune.quiet import quiet
from ncfinetune.summary import shorten

TINY = "{name: resnet18, stem: cifar, in_chans: 1, channels: [4, 6, 8, 10]}"


def test_fit_and_test_say_what_matters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    words = ["--model", "Supervised", "--model.backbone", TINY, "--data", "Digits", "--data.shots=4"]
    words += ["--trainer.callbacks+=NeuralCollapseTracker", "--trainer.callbacks.layers=[layer*.*,auto]"]
    words += ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--test_after_fit=true"]
    words += ["--trainer.enable_progress_bar=false", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert main(["fit", *words]) is None
    said = "\n".join([*caplog.messages, *(str(warning.message) for warning in warned), *capfd.readouterr()])
    for noise in ("💡", "PU available: False", "Seed set", "FLOPs", "LeafSpec", "logging interval"):
        assert noise not in said
    assert re.search(r"model: (\S+ K) of \1 parameters are trained, 0.04\d+ MB", said)
    assert "measures layer1.0: 4 features (mean over positions of outputs (" in said
    assert re.search(r"; penultimate: 10 features\n", said)
    table = [line for line in said.splitlines() if line.startswith("│")]
    assert len(table) <= 5
    assert any("test/acc" in line for line in table)


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_bars_do_not_show_a_cut_version(bar: type[Any], tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version="layer")
    quick = {"max_epochs": 0, "accelerator": "cpu", "enable_checkpointing": False}
    trainer = Trainer(callbacks=[bar(refresh_rate=7)], logger=logger, **quick)
    shown: Any = trainer.progress_bar_callback
    assert shown.get_metrics(trainer, None) == {"v_num": "ayer"}
    shorten(trainer)
    assert shown.get_metrics(trainer, None) == {}
    assert isinstance(shown, bar)
    assert shown.refresh_rate == 7
    assert pickle.loads(pickle.dumps(shown)).get_metrics(trainer, None) == {}


def test_a_project_that_imports_the_package_keeps_its_messages() -> None:
    # Importing pytorch_lightning, as some libraries do, sends lightning's messages to its loggers.
    names = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
    loggers = [logging.getLogger(f"{name}.utilities.rank_zero") for name in names]
    before = [list(logger.filters) for logger in loggers], list(warnings.filters)
    with quiet():
        for logger in loggers:
            assert not logger.filter(_record("💡 Tip: buy this"))
            assert not logger.filter(_record("Restoring states from the checkpoint path at a.ckpt"))
            assert logger.filter(_record("Restored all states from the checkpoint at a.ckpt"))
            assert logger.filter(_record("`Trainer.fit` stopped"))
    assert loggers[0].filter(_record("💡 Tip: buy this"))
    assert ([list(logger.filters) for logger in loggers], list(warnings.filters)) == before


def _record(text: str) -> logging.LogRecord:
    return logging.LogRecord("", logging.INFO, "", 0, text, None, None)


class _Shows:
    """A trainer that shows bars of one of Lightning's kinds."""

    def __init__(self, **bar: Any) -> None:
        self.progress_bar_callback = type("Bar", (), {"is_disabled": False, **bar})()


@pytest.mark.parametrize("patience", [0.0, 9.0])
def test_a_pass_has_a_bar_of_rich_if_it_takes_long(patience: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", patience)
    shown = Progress(console=Console(file=io.StringIO(), force_terminal=True))
    seen = []
    for item in progress.watched(_Shows(progress=shown), [5, 6, 7], "pass"):
        seen.append((item, [(task.description, task.total, task.completed, task.visible) for task in shown.tasks]))
    late = patience == 0
    assert seen[0] == (5, [("pass", 3, 0, False)])
    assert seen[2] == (7, [("pass", 3, 2, late)])
    assert shown.tasks == []


def test_a_pass_has_a_bar_of_tqdm_if_no_other_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(progress, "tqdm", lambda items, *args, **options: called.append((args, options)) or items)
    assert list(progress.watched(_Shows(), iter([1, 2]), "pass")) == [1, 2]
    ((args, options),) = called
    assert args == ("pass", None)
    assert options["delay"] == progress.PATIENCE
    for trainer in (_Shows(is_disabled=True), object()):
        assert list(progress.watched(trainer, [1, 2], "pass")) == [1, 2]
    assert len(called) == 1


@pytest.mark.slow
def test_lightnings_bar_can_show_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    remove = Progress.remove_task

    def draw_first(shown: Progress, task: Any) -> None:  # a pass this short is over before the screen is drawn anew
        shown.refresh()
        remove(shown, task)

    monkeypatch.setattr(Progress, "remove_task", draw_first)
    screen = io.StringIO()
    bar = RichProgressBar(console_kwargs={"file": screen, "force_terminal": True, "width": 120}, refresh_rate=1)
    trainer = Trainer(
        max_epochs=1,
        limit_val_batches=1,
        callbacks=[NeuralCollapseTracker(3, figures=False), bar],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    torch.manual_seed(0)
    trainer.fit(Supervised(3, SMALL, optimizer=plain_sgd), Digits([0, 1, 2], shots=4, batch_size=4))
    assert "pass over images" in screen.getvalue()

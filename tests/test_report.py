"""What a report makes of runs: which of them are one, what tells rows apart, and the statistics and pictures."""

import base64
import itertools
import json
import math
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

from ncfinetune import Supervised
from ncfinetune.cli import main
from ncfinetune.datamodules import Digits
from ncfinetune.grouping import Start, group
from ncfinetune.report_figures import picture
from ncfinetune.report_table import legend, markdown, rows
from ncfinetune.runs import Run, find_runs
from ncfinetune.sample_statistics import paired, spearman, wilson
from ncfinetune.settings import differences, evaluated_images, method_name, settings, task_name
from reference import nc1

NC1 = "nc1/train/penultimate"


def _config(train: str = "none", seed: int | None = 0, epochs: int | None = 3, **knobs: Any) -> dict[str, Any]:
    data = {"classes": [5, 6], "shots": knobs.pop("shots", 10), "seed": seed}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": knobs.pop("lr", 0.001)}}
    return {
        "seed_everything": seed,
        "trainer": {"max_epochs": epochs, "max_steps": -1, "callbacks": None, **knobs.pop("trainer", {})},
        "model": {
            "class_path": "ncfinetune.FineTuner",
            "init_args": {"train": train, "optimizer": optimizer, "layer_decay": None, **knobs},
        },
        "data": {"class_path": "ncfinetune.datamodules.Digits", "init_args": data},
    }


def _write(
    folder: Path,
    config: dict[str, Any],
    epochs: Sequence[int] = range(3),
    test: float | None = 0.5,
    steps: int = 4,
    images: int | None = None,
    scalars: dict[str, float] | None = None,
) -> Path:
    """A run of some epochs, as Lightning logs one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with SummaryWriter(str(folder)) as writer:
        writer.add_scalar("params/trained", 50, 0)
        writer.add_scalar("params/total", 100, 0)
        if 0 in epochs:
            writer.add_scalar(NC1, 8.0, 0)
        for epoch in epochs:
            last = (epoch + 1) * steps - 1
            writer.add_scalar("epoch", epoch, last)
            writer.add_scalar("val/acc", 0.1 * (epoch + 1), last)
            writer.add_scalar(NC1, 4.0 / (epoch + 1), last)
        end = (max(epochs, default=-1) + 1) * steps
        found = {**({} if test is None else {"test/acc": test}), **({} if images is None else {"test/images": images})}
        for tag, value in {**found, **(scalars or {})}.items():
            writer.add_scalar(tag, value, end)
    return folder


def _rows(folder: Path, baseline: str | None = None) -> list[dict[str, str]]:
    return rows(group(find_runs([folder])), baseline)


def _report(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    assert main(["report", *words]) == 0
    found = capsys.readouterr()
    return found.out, found.err


# ---- which runs are one


def test_runs_that_differ_in_their_seed_alone_are_a_row(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.5, 0.6, 0.9)):
        _write(tmp_path / str(seed), _config(seed=seed), test=accuracy, images=200)
    (row,) = _rows(tmp_path)
    assert row == {
        "task": "Digits, classes 5 6, shots 10",
        "method": "linear probe",
        "runs": "3",
        "trained parameters": "50 (50 %)",
        "validation accuracy %": "30.0 ± 0",
        "test accuracy %": f"66.7 ± {np.std([50, 60, 90], ddof=1):.2g}",
        "95 % interval": "59.9 to 72.8",
        "test images": "200",
        "NC1 before": "8 ± 0",
        "NC1 after": "1.33 ± 0",
    }


def test_a_run_that_may_stop_early_and_was_killed_in_its_first_epoch_is_unfinished(tmp_path: Path) -> None:
    stops = {"trainer": {"callbacks": [{"class_path": "EarlyStopping"}]}}
    for seed, epochs in enumerate((range(2), range(0))):
        _write(tmp_path / str(seed), _config(seed=seed, **stops), epochs=epochs, test=None)
    assert [run.lacks for run in find_runs([tmp_path])] == [None, "it reached epoch 0 of 3"]


def test_collapse_that_was_measured_before_training_alone_is_not_that_after_it(tmp_path: Path) -> None:
    run = _write(tmp_path / "run", _config(), epochs=range(0), test=None)
    with SummaryWriter(str(run)) as writer:
        writer.add_scalar(NC1, 8.0, 0)
        for epoch in range(3):
            writer.add_scalar("epoch", epoch, 4 * epoch + 3)
            writer.add_scalar("val/acc", 0.5, 4 * epoch + 3)
    (row,) = _rows(tmp_path)
    assert (row["NC1 before"], row.get("NC1 after", "-")) == ("8", "-")


def _logged(run: Path, tag: str, value: float, step: int) -> None:
    with SummaryWriter(str(run)) as writer:
        writer.add_scalar(tag, value, step)


def _tested(run: Path, step: int, **numbers: float) -> None:
    """What the command ``test`` logs."""
    with SummaryWriter(str(run / "test")) as writer:
        for tag, value in numbers.items():
            writer.add_scalar(f"test/{tag}", value, step)


def _evaluated(run: Path, step: int, accuracy: float, images: int, **facts: Any) -> None:
    """What the command ``evaluate`` writes."""
    own = evaluated_images(yaml.safe_load((run / "config.yaml").read_text())["data"], "train")
    numbers = {"accuracy": accuracy, "images": images, "step": step}
    (run / "evaluation" / "test").mkdir(parents=True, exist_ok=True)
    summary = run / "evaluation" / "test" / "summary.json"
    summary.write_text(json.dumps({"images_of": own, "part": None, **numbers, **facts}))


def test_a_test_of_a_checkpoint_by_its_own_command_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _write(tmp_path / "run", _config(), test=None)
    _tested(run, 12, acc=0.75, images=100)
    with SummaryWriter(str(run / "test")) as writer:
        for tag, value in {"nc1/test/penultimate": 3.0, "val/acc": 0.9, "epoch": 0}.items():
            writer.add_scalar(tag, value, 12)
    (row,) = _rows(tmp_path)
    assert (row["runs"], row["test accuracy %"], row["test images"]) == ("1", "75.0", "100")
    assert row["validation accuracy %"] == "30.0"
    assert "tested at" not in row
    # The weights at the end of the fit were trained longer.
    _write(tmp_path / "other", _config(seed=1), test=0.5, images=100)
    _tested(tmp_path / "other", 8, acc=0.75)
    assert [run.last("test/acc") for run in find_runs([tmp_path])] == [0.5, 0.75]
    (row,) = _rows(tmp_path)
    assert "tested at" not in row
    assert f"warning: '{tmp_path / 'other'}' was tested at step 12, which counts, and at 8\n" in capsys.readouterr().err


def test_two_checkpoints_of_a_run_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _write(tmp_path / "run", _config(), test=None)
    _tested(run, 8, acc=0.75, images=100)
    (row,) = _rows(tmp_path)
    assert (row["test accuracy %"], row["test images"], row["tested at"]) == ("75.0", "100", "step 8 of 12")
    _tested(run, 4, acc=0.9, images=90)  # later, of an earlier one
    assert capsys.readouterr().err == ""
    (row,) = _rows(tmp_path)
    assert (row["test accuracy %"], row["test images"], row["tested at"]) == ("75.0", "100", "step 8 of 12")
    assert capsys.readouterr().err == f"warning: '{run}' was tested at step 8, which counts, and at 4\n"
    _tested(run, 12, acc=0.25)  # by a module that counts no images
    (row,) = _rows(tmp_path)
    assert (row["test accuracy %"], "test images" in row, "tested at" in row) == ("25.0", False, False)
    other = _write(tmp_path / "other", _config(seed=1, epochs=6), range(6), test=None)
    _tested(other, 20, acc=0.25)
    assert "tested at" not in _rows(tmp_path / "run")[0]
    assert sorted(row["tested at"] for row in _rows(tmp_path)) == ["-", "step 20 of 24"]


def test_the_test_of_an_unfinished_run_does_not_finish_it(tmp_path: Path) -> None:
    run = _write(tmp_path / "run", _config(trainer={"max_epochs": -1, "max_steps": 9}), range(2), test=None)
    _tested(run, 8, acc=0.75)
    assert Run(run).lacks == "it reached step 8 of 9"


@pytest.mark.parametrize(
    ("facts", "counts"),
    [
        ({}, True),
        ({"part": "the first 4 of 40 images"}, False),
        ({"images_of": "Pets"}, False),
        ({"images_of": "a folder of another machine", "own_images": True}, True),
        ({"own_images": False}, False),
        ({"own_images": True, "part": "the first 4 of 40 images"}, False),
        ({"data": "test"}, True),
        ({"data": "val"}, False),  # whatever folder it was written to
        ({"unreadable": 0}, True),
        ({"unreadable": 2}, False),
    ],
)
def test_an_evaluation_of_the_test_images_counts(
    facts: dict[str, Any], counts: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _write(tmp_path / "run", _config(), test=None)
    _evaluated(run, 8, 0.75, 40, **facts)
    (row,) = _rows(tmp_path)
    assert ("test accuracy %" in row) == counts
    broken = "2 of them have no prediction; fix or remove them, and evaluate again"
    said = f"warning: '{run}' was evaluated on a part of its test images: {broken}\n"
    assert capsys.readouterr().err == (said if facts.get("unreadable") else "")
    if counts:
        found = [row[name] for name in ("test accuracy %", "95 % interval", "test images", "tested at")]
        assert found == ["75.0", "59.8 to 85.8", "40", "step 8 of 12"]
    (run / "evaluation" / "test" / "summary.json").write_text("{")
    assert "test accuracy %" not in _rows(tmp_path)[0]


@pytest.mark.parametrize("named", [False, True])
def test_a_run_that_was_resumed_in_another_folder_is_one(
    named: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = None if named else 0  # what is not seeded is known by its ckpt_path alone
    _write(tmp_path / "first", _config(seed=seed, epochs=6), range(4), test=None)
    config = _config(seed=seed, epochs=6)
    if named:
        config["ckpt_path"] = str(tmp_path / "first" / "checkpoints" / "last.ckpt")
    _write(tmp_path / "second", config, range(3, 6), test=0.7)
    (row,) = _rows(tmp_path)
    assert (row["runs"], row["test accuracy %"], row["NC1 before"]) == ("1", "70.0", "8")
    (experiment,) = group(find_runs([tmp_path]))
    assert experiment.runs[0].scalars["val/acc"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert capsys.readouterr().err == ""


def test_a_run_that_was_resumed_in_its_first_epoch_is_one(tmp_path: Path) -> None:
    first = _write(tmp_path / "first", _config(), range(0), test=None)
    _logged(first, "epoch", 0, 1)
    _write(tmp_path / "second", _config(), test=0.75)
    (row,) = _rows(tmp_path)
    assert (row["runs"], row["test accuracy %"]) == ("1", "75.0")


def test_a_run_on_more_images_goes_on_with_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the same configuration and seed, whose epochs have more steps; the test of the other is not its own."""
    _write(tmp_path / "few", _config(), steps=1, test=0.25)
    _write(tmp_path / "more", _config(), steps=20, test=None)
    (row,) = _rows(tmp_path)
    assert (row["runs"], row["test accuracy %"]) == ("1", "25.0")
    assert "tested at" not in row
    said = capsys.readouterr().err
    left, kept = (str(tmp_path / name) for name in ("more", "few"))
    assert said == f"warning: {left!r} has the configuration and seed of {kept!r}, and is left out\n"


def test_a_start_from_an_unfinished_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, epochs in enumerate((3, 1)):
        source = {**_config(seed=seed), "model": {"class_path": "Supervised"}}
        _write(tmp_path / f"pre{seed}", source, range(epochs), test=None)
        checkpoint = str(tmp_path / f"pre{seed}" / "checkpoints" / "last.ckpt")
        _write(tmp_path / f"probe{seed}", _config(seed=seed, checkpoint=checkpoint))
    _rows(tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if "started from" in line]
    source = f"'{tmp_path / 'pre1'}', which is unfinished: it reached epoch 1 of 3"
    assert said == [f"warning: '{tmp_path / 'probe1'}' started from {source}"]


def test_a_run_that_was_resumed_twice_is_one(tmp_path: Path) -> None:
    for name, epochs in (("a", range(3)), ("b", range(2, 5)), ("c", range(4, 6))):
        run = _write(tmp_path / name, _config(epochs=6), epochs, test=0.7 if name == "c" else None)
        (file,) = run.glob("events*")
        file.rename(run / f"events.out.tfevents.{ord(name)}.host")  # seconds apart
    (experiment,) = group(find_runs([tmp_path]))
    (run,) = experiment.runs
    assert [epoch for _, epoch in run.points["epoch"]] == [0, 1, 2, 3, 4, 5]


def test_the_end_of_a_resumed_run_alone_has_no_nc1_from_before_training(tmp_path: Path) -> None:
    _write(tmp_path / "second", _config(epochs=6), range(3, 6))
    (row,) = _rows(tmp_path)
    assert "NC1 before" not in row
    assert row["NC1 after"] == f"{4 / 6:.3g}"


def test_an_epoch_of_one_step_is_not_before_training(tmp_path: Path) -> None:
    _write(tmp_path, _config(), steps=1)
    (row,) = _rows(tmp_path)
    assert (row["NC1 before"], row["NC1 after"]) == ("8", "1.33")


def test_a_run_of_the_same_seed_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path / "a", _config(seed=1), test=0.5)
    _write(tmp_path / "b", _config(seed=1), range(2), test=None)
    (row,) = _rows(tmp_path)
    assert (row["runs"], row["test accuracy %"]) == ("1", "50.0")
    said = capsys.readouterr().err
    assert said == (
        f"warning: '{tmp_path / 'b'}' has the configuration and seed of '{tmp_path / 'a'}', and is left out\n"
    )


def test_of_runs_of_a_seed_a_tested_one_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Early stopping has no number of epochs to reach, so that a run that was stopped by hand looks finished."""
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}}
    config = _config(seed=1, trainer={"callbacks": [stopping]})
    _write(tmp_path / "a", config, test=0.5)
    _write(tmp_path / "b", config, range(1), test=None)
    (row,) = _rows(tmp_path)
    assert (row["runs"], row["test accuracy %"]) == ("1", "50.0")
    assert capsys.readouterr().err.count("is left out") == 1


def test_collapse_is_that_of_the_tested_weights(tmp_path: Path) -> None:
    run = _write(tmp_path / "run", _config(), test=None)
    _tested(run, 8, acc=0.75)
    (row,) = _rows(tmp_path)
    assert (row["NC1 before"], row["NC1 after"], row["validation accuracy %"]) == ("8", "2", "30.0")


def test_collapse_is_that_of_the_tested_weights_where_an_epoch_has_one_step(tmp_path: Path) -> None:
    run = _write(tmp_path / "run", _config(), steps=1, test=None)
    _tested(run, 2, acc=0.75)
    (row,) = _rows(tmp_path)
    assert (row["NC1 before"], row["NC1 after"]) == ("8", "2")


@pytest.mark.parametrize("seed", [None, False])
@pytest.mark.parametrize("of_data", [None, 0])
def test_runs_without_a_seed_are_all_counted(
    seed: bool | None, of_data: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**_config(seed=of_data), "seed_everything": seed}
    for name, accuracy in (("a", 0.5), ("b", 0.7), ("c", 0.9)):
        _write(tmp_path / name, config, test=accuracy)
    _write(tmp_path / "full", {**_config("all", seed=of_data), "seed_everything": seed})
    full, probe = _rows(tmp_path)
    assert (probe["runs"], probe["test accuracy %"]) == ("3", "70.0 ± 20")
    assert full["points over baseline"] == "-"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("seeds", [[(False, 0), (False, 0)], [(0, 0), (0, 1)]])
def test_runs_of_a_seed_from_two_sources_are_two(seeds: list[tuple[bool | int, int]], tmp_path: Path) -> None:
    """Sources of one configuration, without a seed, or with another one of their data alone."""
    for number, (seed, of_data) in enumerate(seeds):
        source = {**_config(seed=of_data), "seed_everything": seed, "model": {"class_path": "Supervised"}}
        _write(tmp_path / f"pre{number}", source)
        checkpoint = str(tmp_path / f"pre{number}" / "checkpoints" / "last.ckpt")
        for train in ("none", "all"):
            _write(tmp_path / f"{train}{number}", _config(train, checkpoint=checkpoint), test=0.5 + number / 10)
    found = {row["method"]: row for row in _rows(tmp_path)}
    assert [found[method]["runs"] for method in ("linear probe", "full FT")] == ["2", "2"]
    assert found["full FT"]["points over baseline"] == "+0.0 ± 0, 2 seeds"


def test_a_folder_that_is_given_twice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "runs" / "a", _config())
    monkeypatch.chdir(tmp_path)
    assert len(find_runs([Path("runs"), tmp_path / "runs", Path("runs/a")])) == 1


# ---- unfinished runs


@pytest.mark.parametrize(
    ("config", "epochs", "test", "lacks"),
    [
        ({}, 3, None, None),
        ({}, 2, None, "it reached epoch 2 of 3"),
        ({}, 0, None, "it reached epoch 0 of 3"),
        ({}, 2, 0.5, None),  # a test after fewer epochs, as where a callback has ended the fit
        ({"max_steps": 8}, 2, None, None),
        ({"max_epochs": -1, "max_steps": 9}, 2, None, "it reached step 8 of 9"),
        ({"max_epochs": None}, 2, None, "it reached epoch 2 of 1000"),
        ({"max_epochs": -1}, 2, None, None),
        ({"max_time": "00:00:01:00"}, 2, None, None),
        ({"callbacks": [{"class_path": "lightning.pytorch.callbacks.EarlyStopping"}]}, 2, None, None),
    ],
)
def test_a_run_is_finished_or_says_what_it_lacks(
    config: dict[str, Any], epochs: int, test: float | None, lacks: str | None, tmp_path: Path
) -> None:
    run = Run(_write(tmp_path, _config(trainer=config), range(epochs), test))
    assert run.lacks == lacks


def test_a_test_that_was_asked_for_and_is_not_there_is_said(tmp_path: Path) -> None:
    run = Run(_write(tmp_path / "a", {**_config(), "test_after_fit": True}, test=None))
    assert run.lacks == "it was trained to its end, and has no test value"
    run = Run(_write(tmp_path / "b", {**_config(), "test_after_fit": True}, range(1), test=None))
    assert run.lacks == "it reached epoch 1 of 3, and has no test value"


def test_a_test_that_failed_may_be_made_by_its_own_command(tmp_path: Path) -> None:
    run = _write(tmp_path / "a", {**_config(), "test_after_fit": True}, test=None)
    _tested(run, 12, acc=0.5)
    assert Run(run).lacks is None
    run = _write(tmp_path / "b", {**_config(), "test_after_fit": True}, range(1), test=None)
    _tested(run, 4, acc=0.5)
    assert Run(run).lacks == "it reached epoch 1 of 3, and has no test value"


@pytest.mark.parametrize("least", [None, 4, 5])
def test_early_stopping_ends_a_run_that_has_the_epochs_that_it_must_have(least: int | None, tmp_path: Path) -> None:
    """After two worse epochs a better one: without ``min_epochs`` it would have been stopped before that."""
    init = {"monitor": "val/loss", "patience": 1}
    callback = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": init}
    trainer = {"callbacks": [callback], "min_epochs": least}
    run = _write(tmp_path, _config(epochs=8, trainer=trainer), range(4), test=None)
    for epoch, loss in enumerate([1.0, 2.0, 0.5, 0.4]):
        _logged(run, "val/loss", loss, 4 * epoch + 3)
    assert Run(run).lacks == ("it reached epoch 4 of 8, and early stopping did not end it" if least == 5 else None)


def test_a_callback_ends_a_run_after_a_time(tmp_path: Path) -> None:
    timer = {"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {"duration": "00:01:00:00"}}
    assert Run(_write(tmp_path, _config(epochs=9, trainer={"callbacks": [timer]}), test=None)).lacks is None


@pytest.mark.parametrize("arguments", [["val/loss"], {"monitor": "val/acc", "patience": "two"}])
def test_early_stopping_with_other_arguments_is_not_repeated(arguments: Any, tmp_path: Path) -> None:
    callback = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": arguments}
    assert Run(_write(tmp_path, _config(epochs=9, trainer={"callbacks": [callback]}), test=None)).lacks is None


def test_the_test_of_a_run_that_was_then_trained_on_is_none(tmp_path: Path) -> None:
    _write(tmp_path, _config(epochs=6), range(2), test=0.5)
    run = Run(_write(tmp_path, _config(epochs=6), range(2, 4), test=None))
    assert run.lacks == "it reached epoch 4 of 6"


@pytest.mark.parametrize(
    ("losses", "options", "stopped"),
    [
        ([3.0, 2.0, 2.0, 2.5], {"patience": 2}, True),
        ([3.0, 2.0, 2.0, 1.5], {"patience": 2}, False),
        ([3.0, 2.9, 2.8], {"patience": 2, "min_delta": 0.5}, True),
        ([3.0, 2.9, 2.8], {"patience": 2, "min_delta": 0.05}, False),
        ([1.0, 2.0, 2.0, 1.0], {"patience": 2, "mode": "max"}, True),
        ([3.0, 3.0, 3.0], {}, False),  # patience is 3
        ([3.0, 3.0, 3.0, 3.0], {}, True),
        ([3.0, math.nan], {"patience": 9}, None),
        ([3.0, 2.0], {"patience": 9, "stopping_threshold": 2.5}, None),
        ([], {}, None),
    ],
)
def test_early_stopping_is_repeated(
    losses: list[float], options: dict[str, Any], stopped: bool | None, tmp_path: Path
) -> None:
    init = {"monitor": "val/loss", "stopping_threshold": None, "divergence_threshold": None, **options}
    callback = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": init}
    run = _write(tmp_path, _config(epochs=9, trainer={"callbacks": [callback]}), range(2), test=None)
    with SummaryWriter(str(run)) as writer:
        for epoch, loss in enumerate(losses):
            writer.add_scalar("val/loss", loss, 4 * epoch + 3)
    said = "it reached epoch 2 of 9, and early stopping did not end it"
    assert Run(run).lacks == (said if stopped is False else None)
    _tested(run, 4, acc=0.5)  # whoever stopped it took it for finished
    assert Run(run).lacks is None


def test_the_real_early_stopping_is_repeated(tmp_path: Path) -> None:
    """The same numbers, as Lightning's callback decides on them."""
    rng = np.random.default_rng(0)
    for seed in range(200):
        losses = rng.choice([1.0, 1.5, 2.0, 2.5, 3.0], rng.integers(1, 8)).tolist()
        options = {"monitor": "val/loss", "patience": int(rng.integers(1, 4)), "mode": ("min", "max")[seed % 2]}
        options["min_delta"] = float(rng.choice([0.0, 0.5]))
        callback, stopped = EarlyStopping(**options), False
        for loss in losses:
            stopped |= callback._evaluate_stopping_criteria(torch.tensor(loss))[0]  # the Trainer keeps it
        run = Run(tmp_path)
        run.__dict__.update({"scalars": {"val/loss": losses}, "config": {}, "points": {}})
        callbacks = {"class_path": "EarlyStopping", "init_args": options}
        assert run._was_stopped(callbacks) == stopped, (losses, options)


def test_unfinished_runs_are_marked_and_left_out_of_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path / "0", _config(seed=0), test=0.5)
    _write(tmp_path / "1", _config(seed=1), range(1), test=None)
    _write(tmp_path / "2", _config(seed=2), test=None)
    _write(tmp_path / "3", _config("all", seed=0), range(1), test=None)
    full, probe = _rows(tmp_path)
    assert (probe["runs"], probe["test accuracy %"], probe["NC1 after"]) == ("1 + 2 unfinished", "50.0", "1.33")
    assert (full["runs"], full["test accuracy %"], full["NC1 after"]) == ("0 + 1 unfinished", "-", "-")
    said = capsys.readouterr().err.splitlines()
    ends = [
        "it reached epoch 1 of 3",
        "it has no test value, and others of its configuration have",
        "it reached epoch 1 of 3",
    ]
    assert said == [
        f"warning: '{tmp_path / str(run)}' is unfinished: {end}; it is left out of all numbers"
        for run, end in enumerate(ends, 1)
    ]


# ---- what tells rows apart


def test_other_pixels_are_told_between_methods_too(tmp_path: Path) -> None:
    for name, train, size in (("probe", "none", 64), ("full", "all", 96), ("layer", "layer4", 64)):
        config = _config(train)
        config["data"]["init_args"] |= {"image_size": size, "mean": [0.5] if size == 96 else None}
        _write(tmp_path / name, config, test=0.5)
    found = {row["method"]: row["differs in"] for row in _rows(tmp_path)}
    assert found == {
        "linear probe": "image_size 64",
        "layer FT layer4": "image_size 64",
        "full FT": "image_size 96, mean 0.5",
    }


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"lr": 0.1}, "lr 0.1"),
        ({"epochs": 4}, "max_epochs 4"),
        ({"layer_decay": 0.7}, "layer_decay 0.7"),
        ({"class_weight": "balanced", "label_smoothing": 0.1}, "class_weight balanced, label_smoothing 0.1"),
        (
            {"backbone": {"name": "resnet18", "lora": {"r": 8, "target_modules": ["qkv"]}}},
            "name resnet18, r 8, target_modules qkv",
        ),
        ({"trainer": {"callbacks": [{"class_path": "x.SWA", "init_args": {"swa_lrs": 0.1}}]}}, "SWA, swa_lrs 0.1"),
    ],
)
def test_rows_of_one_name_show_what_differs(knobs: dict[str, Any], said: str, tmp_path: Path) -> None:
    _write(tmp_path / "a", _config())
    _write(tmp_path / "b", _config(**knobs), range(knobs.get("epochs", 3)))
    texts = {row["differs in"] for row in _rows(tmp_path)}
    assert said in texts or any(set(said.split(", ")) <= set(text.split(", ")) for text in texts)
    assert len(texts) == 2


@pytest.mark.parametrize(
    ("name", "one", "other", "said"),
    [
        ("limit_train_batches", 1, 1.0, {"limit_train_batches 1", "-"}),
        ("limit_train_batches", None, 1.0, {"-"}),
        ("limit_train_batches", 20, 20.0, {"limit_train_batches 20", "limit_train_batches 20 of all"}),
        ("val_check_interval", 1, None, {"val_check_interval 1", "-"}),
        ("val_check_interval", 0.5, 1.0, {"val_check_interval 0.5 of all", "-"}),
        ("overfit_batches", 1, 1.0, {"overfit_batches 1", "overfit_batches 1 of all"}),
        ("overfit_batches", 0, 0.0, {"-"}),
        ("gradient_clip_val", 1, 1.0, {"-"}),
    ],
)
def test_a_batch_is_not_all_batches(name: str, one: Any, other: Any, said: set[str], tmp_path: Path) -> None:
    for seed, value in enumerate((one, other)):
        _write(tmp_path / str(seed), _config(seed=seed, trainer={name: value}))
    assert {row.get("differs in", "-") or "-" for row in _rows(tmp_path)} == said


def test_lists_of_other_items_are_told_apart() -> None:
    values = [["a b"], ["a", "b"], [["a"], "b"], [["a", "b"]]]
    assert len({settings({"model": {"layers": value}})["model.layers"] for value in values}) == 4


def test_differences_of_data_and_augmentation_are_shown(tmp_path: Path) -> None:
    for strength in (0.5, 1.0):
        config = _config()
        config["data"]["init_args"] |= {"augmentation": "standard", "strength": strength}
        _write(tmp_path / str(strength), config)
    assert [row["differs in"] for row in _rows(tmp_path)] == ["strength 0.5", "strength 1"]


def test_only_what_differs_is_shown_and_only_for_one_name(tmp_path: Path) -> None:
    _write(tmp_path / "a", _config(lr=0.001))
    _write(tmp_path / "b", _config(lr=0.01, epochs=20), range(20))
    _write(tmp_path / "c", _config("all", lr=0.5))
    found = {row["method"] + "/" + row["differs in"] for row in _rows(tmp_path)}
    assert found == {"linear probe/lr 0.001, max_epochs 3", "linear probe/lr 0.01, max_epochs 20", "full FT/-"}


@pytest.mark.parametrize("name", ["num_workers", "download", "in_memory"])
def test_what_changes_no_number_makes_no_row(name: str, tmp_path: Path) -> None:
    for seed in range(2):
        config = _config(seed=seed)
        config["data"]["init_args"][name] = seed
        downstream = {"class_path": "Digits", "init_args": {"seed": seed, "num_workers": seed}}
        config["trainer"]["callbacks"] = [
            {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(seed)}},
            {"class_path": "OnlineProbe", "init_args": {"downstream": downstream, "layers": [] if seed else None}},
        ]
        config["trainer"] |= {"logger": {"init_args": {"version": seed}}, "enable_progress_bar": bool(seed)}
        config |= {"test_after_fit": True, "predictions": str(seed)}
        _write(tmp_path / str(seed), config)
    assert [row["runs"] for row in _rows(tmp_path)] == ["2"]


def test_many_differences_stay_readable_and_distinct() -> None:
    plain = {f"model.knob{i}": "0" for i in range(30)}
    several = [{**plain, f"model.knob{i}": "1"} for i in range(12)]
    texts = differences(several)
    assert len(set(texts)) == len(several)
    everything = [{f"model.{letter}{i}": str(i) for i in range(30)} for letter in "ab"]
    texts = differences(everything)
    assert len(set(texts)) == 2
    assert all(len(text) < 120 and re.search(r", and \d+ more$", text) for text in texts)


def test_names_are_as_long_as_they_must_be_and_values_told_apart() -> None:
    first = {"model.optimizer.lr": "0.1", "model.scheduler.lr": "0.1", "model.optimizer": "torch.optim.SGD"}
    second = {"model.optimizer.lr": "0.2", "model.scheduler.lr": "0.3", "model.optimizer": "torch.optim.Adam"}
    assert differences([first, second]) == [
        "optimizer SGD, optimizer.lr 0.1, scheduler.lr 0.1",
        "optimizer Adam, optimizer.lr 0.2, scheduler.lr 0.3",
    ]
    assert differences([{"model.a": "x.Norm"}, {"model.a": "y.Norm"}]) == ["a x.Norm", "a y.Norm"]
    long = ["/data/" + "x" * 60 + "/" + end for end in ("a.pth", "b.pth")]
    texts = differences([{"model.checkpoint": path} for path in long])
    assert [text[-6:] for text in texts] == ["/a.pth", "/b.pth"]
    assert all(len(text) < 60 for text in texts)
    same_end = [{"model.checkpoint": start + "x" * 60} for start in "ab"]
    assert differences(same_end)[0] == "checkpoint a" + "x" * 60


def test_settings_are_the_configuration_by_dotted_names() -> None:
    found = settings(
        {
            "model": {"class_path": "m.Net", "init_args": {"opt": {"class_path": "o.SGD", "init_args": {"lr": 20.0}}}},
            "trainer": {"callbacks": [{"class_path": "c.A"}, {"class_path": "c.A", "init_args": {"n": 1}}], "x": None},
            "seed_everything": 1,
        }
    )
    assert found == {
        "model": "m.Net",
        "model.opt": "o.SGD",
        "model.opt.lr": "20",
        "trainer.callbacks.A": "c.A",
        "trainer.callbacks.A#2": "c.A",
        "trainer.callbacks.A#2.n": "1",
    }


def _sources(tmp_path: Path, count: int = 2) -> None:
    """Pre-trainings that differ in their loss, each with two seeds, and a probe on each."""
    for source, seed in itertools.product(range(count), range(2)):
        name = f"pre{source}-{seed}"
        model = {"class_path": "ncfinetune.Supervised", "init_args": {"temperature": source}}
        config = {**_config(seed=seed), "model": model}
        _write(tmp_path / name, config, scalars={NC1: 10.0**-source})
        checkpoint = str(tmp_path / name / "checkpoints" / "last.ckpt")
        _write(tmp_path / f"probe{source}-{seed}", _config(seed=seed, checkpoint=checkpoint), test=0.5 + 0.1 * source)


def test_a_start_from_the_same_pre_training_of_another_seed_is_the_same_experiment(tmp_path: Path) -> None:
    _sources(tmp_path)
    probes = [row for row in _rows(tmp_path) if row["method"] == "linear probe"]
    assert [row["runs"] for row in probes] == ["2", "2"]
    shown = sorted(row["differs in"][-28:] for row in probes)
    assert shown == ["pre0-0/checkpoints/last.ckpt", "pre1-0/checkpoints/last.ckpt"]
    assert [row["test accuracy %"] for row in probes] == ["50.0 ± 0", "60.0 ± 0"]


_BEST = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"monitor": "val/acc"}}
_ALL = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_top_k": -1}}


def _named(filename: str) -> dict[str, Any]:
    return {**_BEST, "init_args": {"monitor": "val/acc", "filename": filename}}


@pytest.mark.parametrize(
    ("callbacks", "files", "names"),
    [
        # Two seeds of a source that have the same in common.
        (None, ["last.ckpt", "last-v1.ckpt"], ["last.ckpt"]),
        ([_BEST], ["best.ckpt", "best-v1.ckpt"], ["best.ckpt"]),
        ([_BEST], ["epoch=0-step=4.ckpt", "epoch=1-step=8-v1.ckpt"], ["epoch=*-step=*.ckpt"]),
        ([_BEST], ["epoch=1-loss=-0.25.ckpt", "epoch=2-loss=10.5.ckpt"], ["epoch=*-loss=*.ckpt"]),
        (None, ["epoch=2-step=12.ckpt", "last.ckpt"], ["last.ckpt"]),
        (None, ["epoch=2.ckpt", "epoch=2-step=12.ckpt"], ["last.ckpt"]),
        # Other weights.
        (None, ["epoch=0.ckpt", "last.ckpt"], ["epoch=0.ckpt", "last.ckpt"]),
        (None, ["epoch=0.ckpt", "epoch=1.ckpt"], ["epoch=0.ckpt", "epoch=1.ckpt"]),
        (None, ["epoch=2-step=10.ckpt", "epoch=2-step=12.ckpt"], ["epoch=2-step=10.ckpt", "last.ckpt"]),
        (
            [_BEST, _BEST],
            ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"],
            ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"],
        ),
        ([_named("a{epoch}"), _named("b{epoch}")], ["aepoch=0.ckpt", "aepoch=1.ckpt"], ["aepoch=*.ckpt"]),
        ([_BEST, _ALL], ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"], ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"]),
        ([_BEST], ["best.ckpt", "last.ckpt"], ["best.ckpt", "last.ckpt"]),
        (None, ["net-v1.safetensors", "net-v2.safetensors"], ["net-v1.safetensors", "net-v2.safetensors"]),
    ],
)
@pytest.mark.parametrize("sources", [1, 2])
def test_starts_from_other_checkpoints_of_a_source_are_told_apart(
    sources: int, callbacks: list[Any] | None, files: list[str], names: list[str], tmp_path: Path
) -> None:
    for seed in range(sources):
        source = _config(seed=seed, trainer={"callbacks": callbacks})
        run = _write(tmp_path / f"pre{seed}", {**source, "model": {"class_path": "Supervised"}})
        with SummaryWriter(str(run)) as writer:
            writer.add_scalar("epoch", 3, 12)  # as Lightning does with the test after the fit
    for seed, (file, accuracy) in enumerate(zip(files, (0.5, 0.75), strict=True)):
        checkpoint = str(tmp_path / f"pre{seed % sources}" / "checkpoints" / file)
        _write(tmp_path / f"probe{seed}", _config(seed=seed, checkpoint=checkpoint), test=accuracy)
    experiments = [e for e in group(find_runs([tmp_path])) if e.method == "linear probe"]
    assert sorted(e.settings["model.checkpoint"] for e in experiments) == [
        str(tmp_path / "pre0" / "checkpoints" / name) for name in names
    ]
    assert sorted(e.mean("test/acc") for e in experiments) == ([0.625] if len(names) == 1 else [0.5, 0.75])


def test_starts_of_one_seed_from_two_checkpoints_both_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path / "pre", {**_config(), "model": {"class_path": "Supervised"}})
    for file, accuracy in (("epoch=0", 0.5), ("last", 0.9)):
        checkpoint = str(tmp_path / "pre" / "checkpoints" / f"{file}.ckpt")
        _write(tmp_path / file, _config(checkpoint=checkpoint), test=accuracy)
    probes = [row for row in _rows(tmp_path) if row["method"] == "linear probe"]
    assert [row["test accuracy %"] for row in probes] == ["50.0", "90.0"]
    assert capsys.readouterr().err == ""


def test_starts_that_no_run_left_are_told_apart(tmp_path: Path) -> None:
    for name in ("a.pth", "b.pth"):
        _write(tmp_path / name[0], _config(checkpoint=name))
    assert [row["differs in"] for row in _rows(tmp_path)] == ["checkpoint a.pth", "checkpoint b.pth"]


@pytest.mark.parametrize("given", ["pre/checkpoints/last.ckpt", "../pre/backbone.safetensors"])
def test_a_relative_checkpoint_is_found(given: str, tmp_path: Path) -> None:
    _write(tmp_path / "pre", {**_config(), "model": {"class_path": "Supervised"}})
    _write(tmp_path / "down" / "a", _config(checkpoint={"path": given, "key": None}))
    (probe,) = [e for e in group(find_runs([tmp_path])) if e.method == "linear probe"]
    assert [start.run.path for start in probe.sources] == [tmp_path / "pre"]


@pytest.mark.parametrize("place", [".", "exp1", "exp2"])
def test_a_relative_checkpoint_is_that_beside_its_run(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the report is made."""
    for name, temperature in (("exp1", 0.1), ("exp2", 0.2)):
        source = {**_config(), "model": {"class_path": "SupCon", "init_args": {"temperature": temperature}}}
        _write(tmp_path / name / "runs" / "pre", source)
        _write(tmp_path / name / "runs" / "probe", _config(checkpoint="runs/pre/checkpoints/last.ckpt"))
    monkeypatch.chdir(tmp_path / place)
    probes = [e for e in group(find_runs([tmp_path])) if e.method == "linear probe"]
    found = [start.run.path for e in probes for start in e.sources]
    assert sorted(found) == [tmp_path / name / "runs" / "pre" for name in ("exp1", "exp2")]


def test_runs_that_name_each_other_end(tmp_path: Path) -> None:
    for name, other in ("ab", "ba"):
        _write(tmp_path / name, _config(checkpoint=str(tmp_path / other / "x.ckpt")))
    assert _rows(tmp_path)


@pytest.mark.parametrize(
    ("name", "knobs", "expected"),
    [
        ("Supervised", {"loss": "ce", "projection": "none"}, "Supervised"),
        (
            "Supervised",
            {"loss": "mse", "projection": "mlp", "adversary": {"radius": 1}},
            "Supervised, mse, mlp head, PGD",
        ),
        ("SupCon", {"projection": "linear"}, "SupCon, linear head"),
        ("FineTuner", {"train": ["a", "b"]}, "layer FT a, b"),
        ("FineTuner", {"train": "none", "skip_from": "a"}, "linear probe, skip from a"),
        ("FineTuner", {"train": "a", "skip_from": "a", "skip_gradient": "skip"}, "SCL FT a, gradient through the skip"),
        ("FineTuner", {"train": "*.bias", "skip_from": ["a", "b"]}, "layer FT *.bias, skip from a, b"),
        ("FineTuner", {"train": "a", "head_init": "lda", "refit": "ridge"}, "layer FT a, lda start, ridge refit"),
    ],
)
def test_report_names_the_method(name: str, knobs: dict[str, Any], expected: str) -> None:
    assert method_name({"class_path": f"ncfinetune.{name}", "init_args": knobs}) == expected


def test_report_names_the_task_by_what_selects_images() -> None:
    knobs = {"root": "data/cifar10", "fraction": 0.1, "shots": None, "views": 2, "augmentation": "simclr", "mixup": 0.0}
    assert (
        task_name({"class_path": "x.ImageFolder", "init_args": knobs}) == "ImageFolder, root data/cifar10, fraction 0.1"
    )


# ---- the statistics


@pytest.mark.parametrize(("hits", "samples"), [(0, 10), (3, 10), (10, 10), (649, 1000), (1, 1)])
def test_wilson_is_the_closed_form(hits: int, samples: int) -> None:
    theirs = stats.binomtest(hits, samples).proportion_ci(0.95, method="wilson")
    assert wilson(hits / samples, samples) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_solves_its_equation() -> None:
    """The ends are the shares p at which (share - p)^2 = z^2 p (1 - p) / n."""
    for end in wilson(0.3, 17):
        assert (0.3 - end) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / 17, rel=1e-12)


def test_paired_is_the_paired_t_test() -> None:
    ours, theirs = np.array([60.0, 71.0, 65.5, 70.0]), np.array([59.0, 66.0, 66.0, 61.0])
    mean, deviation, p = paired((ours - theirs).tolist())
    assert mean == pytest.approx(3.625)
    assert deviation == pytest.approx((ours - theirs).std(ddof=1))
    assert p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, rel=1e-12)
    # With one degree of freedom t is Cauchy's: p = 1 - 2 atan(t) / pi, and t of (1, 3) is 2.
    assert paired([1.0, 3.0])[2] == pytest.approx(1 - 2 * math.atan(2) / math.pi, rel=1e-12)


def test_paired_differences_without_a_deviation_have_no_p() -> None:
    assert paired([2.0])[0] == 2.0
    assert all(map(math.isnan, paired([2.0])[1:]))
    for same in ([2.0, 2.0], [0.0, 0.0], [0.1 + 0.2, 0.3]):
        assert math.isnan(paired(same)[2])
    assert all(map(math.isnan, paired([math.nan, 1.0])))


def test_spearman_is_scipys_where_there_are_many_points() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 6, 12).astype(float), generator.normal(size=12)  # with ties
    assert spearman(x.tolist(), y.tolist()) == pytest.approx(tuple(stats.spearmanr(x, y)), rel=1e-9)


def test_spearman_counts_orders_of_few_points() -> None:
    """Without ties rho is 1 - 6 sum d^2 / (n (n^2 - 1)), d the differences of ranks."""

    def rho(order: Sequence[int]) -> float:
        return 1 - 6 * sum((i - rank) ** 2 for i, rank in enumerate(order)) / (6 * (36 - 1))

    order = (1, 0, 2, 4, 3, 5)
    all_orders = list(itertools.permutations(range(6)))
    as_strong = sum(abs(rho(other)) >= rho(order) - 1e-9 for other in all_orders)
    found = spearman([1, 2, 3, 4, 5, 6], [10.0**rank for rank in order])
    assert found == pytest.approx((rho(order), as_strong / len(all_orders)), rel=1e-12)


def test_spearman_of_few_points_is_exact() -> None:
    assert spearman([1, 2, 3], [4, 5, 6]) == (pytest.approx(1), pytest.approx(2 / 6))
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == (pytest.approx(-1), pytest.approx(2 / 24))
    for x, y in (([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [2, 2, 2]), ([], [])):
        assert all(map(math.isnan, spearman(x, y)))


# ---- the table


def _methods(tmp_path: Path) -> None:
    for seed, (probe, full) in enumerate([(0.5, 0.6), (0.5, 0.7), (0.4, 0.6)]):
        _write(tmp_path / f"probe{seed}", _config(seed=seed), test=probe)
        _write(tmp_path / f"full{seed}", _config("all", seed=seed), test=full)


def test_methods_are_compared_over_shared_seeds(tmp_path: Path) -> None:
    _methods(tmp_path)
    _write(tmp_path / "probe9", _config(seed=9), test=0.0)  # shared with nothing
    found = {row["method"]: row["points over baseline"] for row in _rows(tmp_path)}
    p = stats.ttest_rel([60, 70, 60], [50, 50, 40]).pvalue
    assert found == {"linear probe": "baseline", "full FT": f"+16.7 ± 5.8, p {p:.2g}, 3 seeds"}
    assert "p is that of a paired t-test." in legend(_rows(tmp_path))


def test_the_baseline_was_tested(tmp_path: Path) -> None:
    _write(tmp_path / "a", _config("layer1.0", epochs=0), epochs=[], test=None)
    _write(tmp_path / "b", _config("layer2.0"), test=0.5)
    _write(tmp_path / "c", _config("layer3.0"), test=0.75)
    found = {row["method"]: row["points over baseline"] for row in _rows(tmp_path)}
    assert found == {"layer FT layer1.0": "-", "layer FT layer2.0": "baseline", "layer FT layer3.0": "+25.0, 1 seed"}


def test_the_baseline_is_a_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _methods(tmp_path)
    found = {row["method"]: row["points over baseline"] for row in _rows(tmp_path, "full FT")}
    assert found["full FT"] == "baseline"
    assert found["linear probe"].startswith("-16.7 ± 5.8, p ")
    assert main(["report", str(tmp_path), "--baseline", "full"]) == 2
    error = capsys.readouterr().err
    assert error == "error: no method 'full' to compare with; expected one of full FT; linear probe\n"


def test_the_baseline_is_the_one_that_is_most_alike(tmp_path: Path) -> None:
    for lr, probe in ((0.001, 0.5), (0.01, 0.6)):
        _write(tmp_path / f"probe{lr}", _config(lr=lr), test=probe)
        _write(tmp_path / f"full{lr}", _config("all", lr=lr), test=0.75)
    found = {(row["method"], row["differs in"]): row["points over baseline"] for row in _rows(tmp_path)}
    assert found == {
        ("linear probe", "lr 0.001"): "baseline",
        ("linear probe", "lr 0.01"): "baseline",
        ("full FT", "lr 0.001"): "+25.0, 1 seed",
        ("full FT", "lr 0.01"): "+15.0, 1 seed",
    }


def test_the_baseline_has_the_same_start_if_one_has(tmp_path: Path) -> None:
    """Rather than the same rate."""
    for train, source, lr, accuracy in (("all", 1, 0.01, 0.5), ("none", 0, 0.01, 0.2), ("none", 1, 0.001, 0.6)):
        _write(tmp_path / f"{train}{source}", _config(train, lr=lr, checkpoint=f"{source}.pth"), test=accuracy)
    found = {row["method"]: row["points over baseline"] for row in _rows(tmp_path)}
    assert found["full FT"] == "-10.0, 1 seed"


def test_no_validation_images_are_another_task(tmp_path: Path) -> None:
    for share in (None, 0.0, 0.2):
        config = _config()
        config["data"]["init_args"]["val_fraction"] = share
        _write(tmp_path / str(share), config)
    start = "Digits, classes 5 6, shots 10"
    assert {row["task"] for row in _rows(tmp_path)} == {start, f"{start}, val_fraction 0", f"{start}, val_fraction 0.2"}


def test_trained_parameters_are_those_of_a_finished_run(tmp_path: Path) -> None:
    _write(tmp_path / "a", _config(), range(1), test=None)
    assert "trained parameters" not in _rows(tmp_path)[0]


def test_a_setting_in_the_table_is_no_statistic() -> None:
    assert legend([{"method": "x", "differs in": "layers, p 3"}]) == []


def test_tasks_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for shots in (20, 5, 100):
        _write(tmp_path / str(shots), _config(shots=shots))
    assert [row["task"].split()[-1] for row in _rows(tmp_path)] == ["5", "20", "100"]


@pytest.mark.parametrize(
    ("seeds", "said"), [([0], "+10.0, 1 seed"), ([0, 1], "+10.0 ± 0, 2 seeds"), ([5, 6], "no shared seed")]
)
def test_differences_without_a_test(seeds: list[int], said: str, tmp_path: Path) -> None:
    for seed in (0, 1):
        _write(tmp_path / f"probe{seed}", _config(seed=seed), test=0.5)
    for seed in seeds:
        _write(tmp_path / f"full{seed}", _config("all", seed=seed), test=0.625 - 0.025)
    found = {row["method"]: row["points over baseline"] for row in _rows(tmp_path)}
    assert "p is that of a paired t-test." not in legend(_rows(tmp_path))
    assert found["full FT"].replace("± 0.0", "± 0") == said or re.sub(r"± [\d.e-]+", "± 0", found["full FT"]) == said


def test_tests_of_several_sizes_have_no_interval(tmp_path: Path) -> None:
    for seed in range(2):
        _write(tmp_path / str(seed), _config(seed=seed), images=100 + 1000 * seed)
    (row,) = _rows(tmp_path)
    assert row["test images"] == "100 to 1,100"
    assert "95 % interval" not in row


def test_nan_is_said_and_stops_nothing(tmp_path: Path) -> None:
    for seed, value in enumerate([0.5, math.nan]):
        _logged(_write(tmp_path / str(seed), _config(seed=seed), test=value), NC1, value, 11)
    full = _write(tmp_path / "full", _config("all"), test=math.nan, scalars={"epoch": math.nan})
    _logged(full, NC1, math.inf, 11)
    full, probe = _rows(tmp_path)
    assert (probe["test accuracy %"], probe["NC1 after"]) == ("nan ± nan", "nan ± nan")
    assert (full["test accuracy %"], full["NC1 after"]) == ("nan", "inf")
    assert picture(group(find_runs([tmp_path])))


def test_text_of_the_table_cannot_break_it(tmp_path: Path) -> None:
    _write(tmp_path, _config("a|b\nc"))
    lines = markdown(_rows(tmp_path)).splitlines()
    assert len(lines) == 3
    assert "layer FT a\\|b c" in lines[2]


def test_the_table_of_runs_that_differ_in_everything(tmp_path: Path) -> None:
    _write(tmp_path / "a", _config())
    other = {"model": {"class_path": "their.Net", "init_args": {f"a{i}": i for i in range(50)}}, "data": {"x": [1]}}
    _write(tmp_path / "b", other)
    third = {"model": {"class_path": "their.Net", "init_args": {f"b{i}": i for i in range(50)}}, "data": {"x": [1]}}
    _write(tmp_path / "c", third)
    text = markdown(_rows(tmp_path))
    assert max(map(len, text.splitlines())) < 400
    assert len({row["differs in"] for row in _rows(tmp_path)}) == 3


@pytest.mark.parametrize(
    "part",
    [
        {"trainer": None},
        {"trainer": []},
        {"model": {"init_args": [1]}},
        {"model": {}},
        {"data": {"class_path": 3, "init_args": None}},
        {"optimizer": [{"a": 1}, "b"]},
    ],
)
def test_a_configuration_that_lacks_parts_is_read(part: dict[str, Any], tmp_path: Path) -> None:
    _write(tmp_path, {**_config(), **part})
    assert len(_rows(tmp_path)) == 1
    assert picture(group(find_runs([tmp_path])))


# ---- what is read


def test_csv_logs_are_read_as_well(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path), name="", version="a")
    logger.log_metrics({NC1: 8.0}, step=0)
    for epoch in range(3):
        logger.log_metrics({"epoch": epoch, "val/acc": 0.1 * epoch, NC1: 1.0 / (epoch + 1)}, step=4 * epoch + 3)
    logger.log_metrics({"test/acc": 0.123456789012, "epoch": 3}, step=12)
    logger.save()
    (tmp_path / "a" / "config.yaml").write_text(yaml.safe_dump(_config()))
    (row,) = _rows(tmp_path)
    assert (row["NC1 before"], row["NC1 after"], row["test accuracy %"]) == ("8", "0.333", "12.3")
    assert Run(tmp_path / "a").last("test/acc") == 0.123456789012  # not in single precision
    with SummaryWriter(str(tmp_path / "a")) as writer:
        writer.add_scalar("test/acc", 0.5, 12)
    assert Run(tmp_path / "a").last("test/acc") == 0.5


@pytest.mark.parametrize("how", [SummaryWriter, CSVLogger])
def test_layers_are_in_the_order_of_the_network(how: Any, tmp_path: Path) -> None:
    """Of a CSV file, whose columns Lightning sorts by letter, in that of their numbers."""
    layers = ["layer2.0", "layer2.10", "layer10.0", "penultimate"]
    if how is CSVLogger:
        logger = CSVLogger(str(tmp_path), name="", version="")
        logger.log_metrics({f"nc1/train/{layer}": 1.0 for layer in layers}, step=3)
        logger.save()
    else:
        layers.insert(0, "stem.a_longer_name")
        with SummaryWriter(str(tmp_path)) as writer:
            for layer in layers:
                writer.add_scalar(f"nc1/train/{layer}", 1.0, 3)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(_config()))
    (experiment,) = group(find_runs([tmp_path]))
    assert experiment.layers() == layers


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "step,val/acc\r\n3,0.5\r\ninf,0.7\r\n",
            "cannot convert float infinity to integer; numbers until step 3 are taken",
        ),
        ("step,val/acc\r\n3,0.5\r\n7,0.7", "its last row is cut; numbers until step 3 are taken"),
        (
            "step,val/acc\r\n3,0.5\r\n7\r\n",
            "a row has 1 cells, and there are 2 columns; numbers until step 3 are taken",
        ),
        ("step,val/acc\r\n3,0.5\r\n7,x\r\n", "could not convert string to float: 'x'; numbers until step 3 are taken"),
        ("epoch,val/acc\r\n3,0.5\r\n", "expected a column 'step' in its first line; no number in it is taken"),
        ("", "expected a column 'step' in its first line; no number in it is taken"),
    ],
)
def test_a_torn_csv_is_named_with_its_last_step(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(_config()))
    (tmp_path / "metrics.csv").write_text(text, newline="")
    _rows(tmp_path)
    said_lines = capsys.readouterr().err.splitlines()
    assert said_lines[0] == f"warning: {tmp_path / 'metrics.csv'}: {said}"
    assert Run(tmp_path).last("val/acc") == (0.5 if "step 3" in said else None)


def test_damage_is_said_once_for_a_run_that_was_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path / "a", _config(epochs=6), test=None)
    run = _write(tmp_path / "b", _config(epochs=6), range(2, 6))
    for folder in (tmp_path / "a", run):
        (file,) = folder.glob("events*")
        file.write_bytes(file.read_bytes()[:-5])
    _rows(tmp_path)
    assert capsys.readouterr().err.count("cut within the record") == 2


def test_folders_that_are_named_as_files_are_no_runs(tmp_path: Path) -> None:
    run = _write(tmp_path / "run", _config())
    (run / "events.out.tfevents.7.folder").mkdir()
    (tmp_path / "other" / "config.yaml").mkdir(parents=True)
    assert [found.path for found in find_runs([tmp_path])] == [run]
    assert [row["runs"] for row in _rows(tmp_path)] == ["1"]


def test_folders_without_logs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text(yaml.safe_dump(_config()))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.yaml").write_text("of: another program\n")
    assert main(["report", str(tmp_path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"warning: no event files and no metrics.csv in '{tmp_path / 'a'}'; the run is left out"
    assert second.startswith(f"error: no runs below {tmp_path}; expected folders with a config.yaml and TensorBoard")
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "error: no folder" in capsys.readouterr().err


# ---- the pictures


@pytest.mark.parametrize(
    ("tags", "labels"),
    [
        (["test/acc", "probe/acc"], ["test accuracy %"]),
        (["probe/acc", "probe/downstream_acc"], ["downstream probe accuracy %"]),
        (["probe/acc"], ["probe accuracy %"]),
        ([], []),
    ],
)
def test_picture_shows_the_accuracy_that_was_logged(tags: list[str], labels: list[str], tmp_path: Path) -> None:
    for name in ("SupCon", "SimCLR"):
        with SummaryWriter(str(tmp_path / name)) as writer:
            for tag in (NC1, *tags):
                writer.add_scalar(tag, 0.5)
        model = {"class_path": f"ncfinetune.{name}"}
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": {"class_path": "Digits"}}))
    panels = picture(group(find_runs([tmp_path]))).axes
    # One layer has no depth to be drawn over, unless nothing else is there.
    assert [axes.get_ylabel() for axes in panels] == (
        labels or ["NC1 of the training features\n(lower: more collapsed)"]
    )
    assert all(len(axes.lines) == 2 for axes in panels if labels)


def test_bars_of_one_run_are_its_interval(tmp_path: Path) -> None:
    _write(tmp_path / "probe", _config(), test=0.75, images=100)
    _write(tmp_path / "full", _config("all"), test=0.5, images=100, scalars={"params/trained": 90})
    (axes,) = [axes for axes in picture(group(find_runs([tmp_path]))).axes if "trained" in axes.get_xlabel()]
    assert axes.get_ylabel() == "test accuracy %\n(bars: 95 % interval of one run)"
    ends = [bars.get_segments()[0][:, 1] for line in axes.containers for bars in line[2]]
    for found, accuracy in zip(ends, (0.75, 0.5), strict=True):
        assert found.tolist() == pytest.approx([100 * end for end in wilson(accuracy, 100)])


@pytest.mark.parametrize("images", [0.0, math.nan, math.inf])
def test_a_number_of_images_that_is_none_has_no_interval(images: float, tmp_path: Path) -> None:
    _write(tmp_path / "probe", _config(), scalars={"test/images": images, NC1: math.inf})
    _write(tmp_path / "full", _config("all"), scalars={"test/images": images, "params/trained": math.inf})
    _logged(tmp_path / "full", NC1, math.inf, 11)
    picture(group(find_runs([tmp_path]))).savefig(tmp_path / "a.png")
    assert "95 % interval" not in _rows(tmp_path)[0]


def test_each_network_that_was_tuned_is_drawn_as_it_was_before(tmp_path: Path) -> None:
    for source, value in (("a", 8.0), ("b", 3.0)):
        for train in ("none", "all"):
            run = _write(tmp_path / f"{train}-{source}", _config(train, checkpoint=f"{source}.pth"), scalars={})
            for step in (0, 11):
                _logged(run, "nc1/train/layer4", value, step)
    axes = picture(group(find_runs([tmp_path]))).axes[0]
    grey = {line.get_label(): line.get_ydata()[-1] for line in axes.lines if "before" in str(line.get_label())}
    assert grey == {"before (checkpoint a.pth)": 8, "before (checkpoint b.pth)": 3}


def _panels(folder: Path) -> dict[str, Any]:
    """The panels by what is on their horizontal axis."""
    return {axes.get_xlabel(): axes for axes in picture(group(find_runs([folder]))).axes}


def test_accuracy_against_trained_parameters(tmp_path: Path) -> None:
    _methods(tmp_path)
    assert "trained parameters" not in _panels(tmp_path)  # all the same
    for seed in range(3):
        _write(tmp_path / f"full{seed}", _config("all", seed=seed), test=0.6, scalars={"params/trained": 90})
    axes = _panels(tmp_path)["trained parameters"]
    assert sorted(float(container.lines[0].get_xdata()[0]) for container in axes.containers) == [50, 90]


def test_accuracy_against_shots(tmp_path: Path) -> None:
    for shots, seed in itertools.product((5, 20, 80), range(2)):
        _write(tmp_path / f"{shots}-{seed}", _config(seed=seed, shots=shots), test=0.5 + shots / 200 + seed / 100)
    axes = _panels(tmp_path)["images per class"]
    ((line, caps, _),) = [container.lines for container in axes.containers]
    assert line.get_xdata().tolist() == [5, 20, 80]
    assert line.get_ydata() == pytest.approx([53, 60.5, 90.5], abs=1e-4)
    assert axes.get_title("left") == "Digits, classes 5 6"
    assert caps[1].get_ydata()[0] - line.get_ydata()[0] == pytest.approx(np.std([0, 1], ddof=1), abs=1e-4)


def test_transfer_against_the_collapse_of_the_source(tmp_path: Path) -> None:
    _sources(tmp_path, count=3)
    axes = _panels(tmp_path)["NC1 of the source training features"]
    (line,) = axes.lines
    assert sorted(line.get_xdata()) == pytest.approx([0.01, 0.1, 1])
    assert line.get_ydata()[np.argsort(line.get_xdata())] == pytest.approx([70, 60, 50], abs=1e-4)
    assert line.get_label() == "linear probe: Spearman's rho -1.00, p 0.33"


def test_the_collapse_of_the_source_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    """NC1 of the source is 4, 2 and 4 / 3 at the ends of its three epochs, and 8 before the first."""
    _write(tmp_path / "pre", {**_config(), "model": {"class_path": "Supervised"}})
    known = {"epoch=0": 4, "epoch=1-step=8": 2, "epoch=2": 4 / 3, "last": 4 / 3}
    for number, file in enumerate(known):
        checkpoint = str(tmp_path / "pre" / "checkpoints" / f"{file}.ckpt")
        _write(tmp_path / f"probe{number}", _config(checkpoint=checkpoint), test=0.5 + number / 10)
    (line,) = _panels(tmp_path)["NC1 of the source training features"].lines
    assert sorted(line.get_xdata()) == pytest.approx([4 / 3, 2, 4])  # the end of the training by two names
    # Which weights the best ones are is in no log, nor what comes between two epochs.
    for file in ("best.ckpt", "epoch=1-step=6.ckpt", "epoch=7.ckpt"):
        checkpoint = str(tmp_path / "pre" / "checkpoints" / file)
        shutil.rmtree(tmp_path / "probe0")
        _write(tmp_path / "probe0", _config(checkpoint=checkpoint), test=0.5)
        assert not [name for name in _panels(tmp_path) if "source" in name]


def test_an_epoch_of_one_step_has_the_collapse_of_its_end(tmp_path: Path) -> None:
    run = Run(_write(tmp_path, _config(), steps=1))
    assert [run.at(NC1, steps) for steps in (1, 2, 3, 4)] == pytest.approx([4, 2, 4 / 3, None])
    assert [run.end_of(epoch) for epoch in range(4)] == [1, 2, 3, None]


def test_transfer_against_nc1_before_fine_tuning_where_sources_are_unknown(tmp_path: Path) -> None:
    for name, accuracy in (("a", 0.5), ("b", 0.6)):
        _write(tmp_path / name, _config(checkpoint=f"{name}.pth"), test=accuracy)
    (line,) = _panels(tmp_path)["NC1 of the features before fine-tuning"].lines
    assert line.get_label() == "linear probe"  # no correlation of two points
    assert line.get_xdata() == pytest.approx([8, 8])


def test_names_in_pictures_are_no_formulas(tmp_path: Path) -> None:
    _write(tmp_path / "a", _config("$x"), scalars={"nc1/train/$\\frac{$": 1.0, "nc1/train/a|b": 2.0})
    _write(tmp_path / "b", _config("$y$"), scalars={"nc1/train/$\\frac{$": 1.0, "nc1/train/a|b": 2.0})
    picture(group(find_runs([tmp_path]))).savefig(tmp_path / "a.png")


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(_config()))
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 3)
    figure = picture(group(find_runs([tmp_path])))
    assert figure.axes == []
    assert figure.texts[0].get_text() == "no NC1 was logged, and no accuracies to compare"


# ---- the command


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


def test_the_page_needs_no_other_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path / "runs" / "a", _config("<script>alert(1)</script> & {x}"))
    _write(tmp_path / "runs" / "b", _config(), test=0.75)
    printed, _ = _report(capsys, str(tmp_path / "runs"), "--html", str(tmp_path / "report.html"))
    text = (tmp_path / "report.html").read_text()
    page = _Links()
    page.feed(text)
    (source,) = page.sources
    picture = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    assert picture == (tmp_path / "runs" / "report.png").read_bytes()
    assert "<script>" not in text
    assert "layer FT <script>alert(1)</script> & {x}" in page.cells
    assert "75.0" in page.cells
    assert "Points over baseline are differences of runs of the same seed" in text
    assert f"page:        {tmp_path / 'report.html'}" in printed
    assert not re.search(r"https?://|@import|url\(", text)


def test_report_writes_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _methods(tmp_path / "runs")
    printed, said = _report(capsys, str(tmp_path / "runs"), "--out", str(tmp_path / "out"))
    assert said == ""
    assert (tmp_path / "out" / "report.md").read_text().strip() in printed
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert printed.rstrip().splitlines()[-1].endswith(f"tensorboard --logdir {tmp_path / 'runs'}")
    assert "Numbers are means ± standard deviations (n - 1) over the runs." in printed
    assert not (tmp_path / "runs" / "report.md").exists()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").write_text("")
    for name in ("both.md", "there"):
        with pytest.raises(SystemExit):
            main(["report", str(tmp_path), "--out", str(tmp_path / name)])
        said = capsys.readouterr().err
        assert f"expected --out FOLDER, for report.md and report.png in it, got '{tmp_path / name}'; a page" in said
    assert not (tmp_path / "both.md").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_report_of_real_runs_one_of_which_went_on_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    backbone = "{name: resnet18, stem: cifar, in_chans: 1, channels: [4, 6, 8, 10]}"
    words = ["--model", "FineTuner", "--model.backbone", backbone, "--model.allow_random", "true", "--data", "Digits"]
    words += ["--data.shots", "4", "--data.batch_size", "10", "--trainer.max_epochs", "2", "--test_after_fit", "true"]
    words += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.callbacks+=NeuralCollapseTracker"]

    def fit(train: str, seed: int, version: str, *more: str) -> int | None:
        seeds = ["--seed_everything", str(seed), "--data.seed", str(seed)]
        return main(
            ["fit", *words, "--model.train", train, "--trainer.logger.init_args.version", version, *seeds, *more]
        )

    for seed in range(2):
        fit("none", seed, f"probe{seed}")
    fit("all", 0, "full0")
    stop = ["--trainer.callbacks+=test_interruptions.Terminate", "--trainer.callbacks.step", "6"]
    assert fit("all", 1, "stopped", *stop) == 143
    config = yaml.safe_load((tmp_path / "runs" / "stopped" / "config.yaml").read_text())
    config["trainer"]["callbacks"].pop()  # as if it had been stopped from outside
    (tmp_path / "runs" / "stopped" / "config.yaml").write_text(yaml.safe_dump(config))
    fit("all", 1, "went-on", "--ckpt_path", "runs/stopped/checkpoints/stopped.ckpt")
    fit("all", 1, "whole")
    capsys.readouterr()
    full, probe = sorted(group(find_runs([tmp_path])), key=lambda e: e.method)
    assert [run.path.name for run in probe.runs] == ["probe0", "probe1"]
    assert [run.path.name for run in full.runs] == ["full0", "whole"]
    said = capsys.readouterr().err
    assert said.endswith(f"/went-on' has the configuration and seed of '{full.runs[1].path}', and is left out\n")
    shutil.rmtree(tmp_path / "runs" / "whole")
    again = group(find_runs([tmp_path]))
    (joined,) = [run for e in again for run in e.runs if run.path.name == "went-on"]
    assert joined.earlier is not None
    assert joined.earlier.path.name == "stopped"
    whole = full.runs[1]
    assert joined.before(NC1) == whole.before(NC1)
    assert joined.last("test/acc") == whole.last("test/acc")
    assert joined.scalars["val/acc"] == whole.scalars["val/acc"]
    assert capsys.readouterr().err == ""
    data = Digits()
    data.setup("test")
    assert joined.last("test/images") == len(data.test_dataloader().dataset)


@pytest.mark.slow
def test_the_collapse_of_a_real_checkpoint_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    backbone = "{name: resnet18, stem: cifar, in_chans: 1, channels: [4, 6, 8, 10]}"
    words = ["--model", "Supervised", "--model.backbone", backbone, "--data", "Digits", "--data.shots", "4"]
    words += ["--data.batch_size", "10", "--trainer.max_epochs", "2", "--test_after_fit", "true"]
    words += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.callbacks+=NeuralCollapseTracker"]
    words += ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1"]
    main(["fit", *words])
    (run,) = find_runs([tmp_path])
    data = Digits(shots=4)
    data.setup("fit")
    images, labels = map(torch.cat, zip(*data.train_plain_dataloader(), strict=True))
    images, labels = data.on_after_batch_transfer((images, labels), 0)
    steps = []
    for path in sorted((run.path / "checkpoints").iterdir()):
        start = Start("model.checkpoint", run, f"checkpoints/{path.name}")
        steps.append(start.step)
        with torch.no_grad():
            features = Supervised.load_from_checkpoint(path).eval().backbone(images)
        assert start.last(NC1) == pytest.approx(nc1(features.double().numpy(), labels.numpy()), rel=0.01)
    assert steps == [4, 8]

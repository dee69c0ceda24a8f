"""Reports that are made from another folder than the runs, or on a machine without the images."""

import json
import shutil
from pathlib import Path

import pytest
from test_cli import QUIET, RANDOM, _fit
from test_ship import NARROW, _checkpoint, _data, _folder

from ncfinetune.cli import main
from ncfinetune.runs import Run


def test_an_evaluation_of_the_run_s_images_counts_wherever_the_report_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, laptop = tmp_path / "place", tmp_path / "laptop"
    _folder(place / "photos", ["apple", "lime"])
    shutil.copytree(place / "photos", place / "others")
    (laptop / "photos").mkdir(parents=True)  # of something else
    monkeypatch.chdir(place)
    model = ["--model", "FineTuner", "--model.backbone", NARROW, "--model.head_init", "ridge", *RANDOM]
    run = place / _fit(Path("runs"), "a", *model, *_data(Path("photos")), "--trainer.max_epochs", "0")
    for folder, own in (("others", False), ("photos", True)):
        monkeypatch.chdir(place)
        assert main(["evaluate", *QUIET[:4], "--ckpt_path", _checkpoint(run), "--data.root", folder]) is None
        (summary,) = (run / "evaluation").glob("*/summary.json")
        said = json.loads(summary.read_text())
        assert said["own_images"] is own
        copy = shutil.copytree(run, laptop / folder / "a")
        for here in (place, run, laptop):
            monkeypatch.chdir(here)
            for seen in (run, copy):
                assert Run(seen).last("test/acc") == (said["accuracy"] if own else None)
        shutil.rmtree(run / "evaluation")

"""The data sets on the command line: their overlays in experiments/data, and options that are more than a number."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ncfinetune import datamodules
from ncfinetune.cli import main

OVERLAYS = Path(__file__).resolve().parent.parent / "experiments" / "data"


@pytest.mark.parametrize("overlay", sorted(OVERLAYS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_data_set_has_an_overlay_that_parses(overlay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--model", "Supervised", "--data", str(overlay), "--data.batch_size", "5", "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["data"]
    assert printed["init_args"]["batch_size"] == 5
    written = yaml.safe_load(overlay.read_text())
    indexed = {"shots": None, "fraction": None, "seed": 0, "sampling": "uniform", "device_cache": False}
    assert (indexed.items() <= printed["init_args"].items()) == (written["class_path"] != "WebDataset")
    assert printed["class_path"] == f"ncfinetune.datamodules.{written['class_path']}"
    assert printed["init_args"] == {**printed["init_args"], **written["init_args"], "batch_size": 5}


def test_an_overlay_for_every_data_set() -> None:
    without = {"imagedatamodule", "indexedimages", "recipe", "unlabelled"}
    known = {name.lower().replace("_", "") for name in datamodules.__all__} - without
    there = {path.stem.replace("_", "") for path in OVERLAYS.glob("*.yaml")}
    assert there == known | {"imagenet", "imagelabels"}


def test_a_recipe_of_ones_own_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = "{flip: 0.5, jitter: 0.8, brightness: 0.4, solarise: 0.2}"
    backbone = "{name: resnet18, stem: cifar, in_chans: 1, channels: [4, 6, 8, 10]}"
    model = ["--model", "Supervised", "--model.backbone", backbone]
    data = ["--data", "Digits", "--data.augmentation", recipe, "--data.mean", "[0.5]", "--data.std", "[0.25]"]
    trainer = ["--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "1", "--trainer.enable_progress_bar", "false"]
    main(["fit", *model, *data, *trainer])


# The unions in Lightning's annotations of a limit begin with float, as where an earlier import has them so.
FLOAT_FIRST = """
import sys
import typing

class Finder:
    def find_spec(self, name, *rest):
        if name == "lightning.pytorch.trainer.trainer":
            for forget in typing._cleanups:
                forget()
            typing.Optional[typing.Union[float, int]], typing.Union[float, int]

sys.meta_path.insert(0, Finder())
from ncfinetune.cli import main
main(sys.argv[1:])
"""


def test_one_batch_is_one_whatever_was_imported_before(tmp_path: Path) -> None:
    config = tmp_path / "limits.yaml"
    config.write_text("trainer: {limit_test_batches: 1, limit_predict_batches: 1.0}\n")
    words = ["--model", "Supervised", "--data", "Digits", "--config", str(config), "--trainer.overfit_batches", "1"]
    words += ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1.0", "--print_config"]
    command = [sys.executable, "-c", FLOAT_FIRST, "fit", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    read = yaml.safe_load(done.stdout)["trainer"]
    limits = {name: repr(value) for name, value in read.items() if name.endswith("_batches") and value is not None}
    del limits["accumulate_grad_batches"]
    assert limits == {
        "limit_train_batches": "1",
        "limit_val_batches": "1.0",
        "limit_test_batches": "1",
        "limit_predict_batches": "1.0",
        "overfit_batches": "1",
    }


@pytest.mark.parametrize("limit", ["2.0", "1.5", "-1", "half"])
def test_limits_that_are_no_number_of_batches_are_refused(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "Supervised", "--data", "Digits", f"--trainer.limit_train_batches={limit}"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", *words])
    assert ended.value.code == 2
    said = f"expected a whole number of batches, or a share of all from 0.0 to 1.0, got {limit}"
    assert said in capsys.readouterr().err

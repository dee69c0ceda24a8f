"""The data sets on the command line: their overlays in experiments/data, and options that are more than a number."""

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

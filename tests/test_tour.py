"""docs/tour.md, command by command, on a few small images and a tiny network."""

import csv
import importlib.util
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ncfinetune.cli import main

PAGE = (Path(__file__).parent.parent / "docs" / "tour.md").read_text()
SPEC = "{name: resnet18, channels: [4, 6, 8, 10]}"
# What stands in for a download, and what is added to a command for seconds in place of minutes.
INSTEAD = {"resnet18 --pretrained true": f"'{SPEC}' --allow_random true", "{name: resnet18, pretrained: true}": SPEC}
SMALL = "--data.image_size 32 --data.val_fraction 0.2 --data.num_workers 0"
MORE = {
    "suggest": f"{SMALL} --epochs 2",
    "fit": f"{SMALL} --model.allow_random true --trainer.max_epochs 2 --trainer.accelerator cpu",
}


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def _photos(folder: Path, number: int) -> None:
    generator = np.random.default_rng(number)
    for name, level in (("daisy", 60), ("rose", 180)):
        (folder / name).mkdir(parents=True)
        for index in range(number):
            pixels = generator.normal(level, 40, (40 + index, 50, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # What Lightning and torch say of runs this short.
@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="the extra onnx is not installed")
def test_every_command_runs_and_the_deployed_network_decides_as_the_trained_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _photos(tmp_path / "photos" / "train", 10)
    _photos(tmp_path / "photos" / "test", 4)
    _photos(tmp_path / "elsewhere", 3)
    lines = "".join(_blocks("sh")).replace("\\\n", " ").splitlines()
    assert len(lines) == 10
    for line in lines:
        for real, small in INSTEAD.items():
            line = line.replace(real, small)
        program, command, *words = shlex.split(line)
        assert program == "ncfinetune"
        assert not main([command, *words, *shlex.split(MORE.get(command, ""))]), line
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "runs/tour/layer/evaluation/test/mistakes.png").is_file()

    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    (code,) = _blocks("python")
    program: dict = {}
    exec(compile(code, "tour.md", "exec"), program)
    decided = program["classify"]([row["file"] for row in rows])
    assert len(rows) == 6
    for row, (name, probability) in zip(rows, decided, strict=True):
        assert row["prediction"] == name
        assert abs(float(row[name]) - probability) < 1e-4

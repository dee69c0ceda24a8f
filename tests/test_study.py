"""The few-label studies of experiments/finetune, on a handful of tiny images."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

FOLDER = Path(__file__).resolve().parent.parent / "experiments" / "finetune"


@pytest.fixture
def textures(tmp_path: Path) -> Path:
    """Images of three classes, six of each and part, and the weights of a small network."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in range(3):
            (tmp_path / part / str(label)).mkdir(parents=True)
            for index in range(6):
                pixels = rng.integers(0, 80, (32, 32, 3), dtype=np.uint8) + np.uint8(70 * label)
                Image.fromarray(pixels).save(tmp_path / part / str(label) / f"{index}.png")
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), tmp_path / "weights.pth")
    return tmp_path


def _run(script: str, *words: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_closed_forms_make_a_table(textures: Path) -> None:
    weights, out = str(textures / "weights.pth"), textures / "table.md"
    words = [str(textures), "--checkpoint", weights, "--backbone", "mobilenetv3_small_050", "--mean", "0.5"]
    _run("closed_forms.py", *words, "--std", "0.5", "--shots", "3", "6", "--seeds", "2", "--out", str(out))
    rows = [line for line in out.read_text().splitlines() if line.startswith(("| 3 |", "| 6 |"))]
    assert len(rows) == 2 * 8
    assert all("±" in row for row in rows)
    assert [row.split("|")[4].strip() for row in rows if "| ridge |" in row] == ["0.00 ± 0.00"] * 2


@pytest.mark.slow
def test_study_writes_its_rows_goes_on_and_makes_a_table(textures: Path) -> None:
    rows = str(textures / "rows.csv")
    words = ["run", str(textures), "--checkpoint", str(textures / "weights.pth"), "--out", rows]
    words += ["--backbone", "mobilenetv3_small_050", "--blocks", "blocks.2.0", "--shots", "4", "--steps", "3"]
    words += ["--rates", "0.001"]
    assert _run("study.py", *words, "--seeds", "0").count("method=") == 5
    assert _run("study.py", *words, "--seeds", "0", "1").count("method=") == 5  # what is there is not run again
    lines = _run("study.py", "table", rows).splitlines()
    assert len(lines) == 2 + 5
    assert all("| 2 |" in line and "±" in line for line in lines[2:])

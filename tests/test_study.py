"""The few-label study of experiments/finetune, on a handful of tiny images."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

STUDY = Path(__file__).resolve().parent.parent / "experiments" / "finetune" / "study.py"


@pytest.mark.slow
def test_study_writes_its_rows_goes_on_and_makes_a_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in range(3):
            (tmp_path / part / str(label)).mkdir(parents=True)
            for index in range(6):
                pixels = rng.integers(0, 80, (32, 32, 3), dtype=np.uint8) + np.uint8(70 * label)
                Image.fromarray(pixels).save(tmp_path / part / str(label) / f"{index}.png")
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), tmp_path / "weights.pth")

    env = {**os.environ, "PYTHONPATH": str(STUDY.parents[2]), "OMP_NUM_THREADS": "1"}

    def study(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, str(STUDY), *words], capture_output=True, text=True, timeout=600, env=env
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    words = ["run", str(tmp_path), "--checkpoint", str(tmp_path / "weights.pth"), "--out", str(tmp_path / "rows.csv")]
    words += ["--backbone", "mobilenetv3_small_050", "--blocks", "blocks.2.0", "--shots", "4", "--steps", "3"]
    words += ["--rates", "0.001"]
    assert study(*words, "--seeds", "0").count("method=") == 5
    assert study(*words, "--seeds", "0", "1").count("method=") == 5  # what is there is not run again
    lines = study("table", str(tmp_path / "rows.csv")).splitlines()
    assert len(lines) == 2 + 5
    assert all("| 2 |" in line and "±" in line for line in lines[2:])

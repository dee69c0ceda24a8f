"""Parts of ``scan`` that are there already, of the images that are asked for or of others."""

import itertools
import re
import shutil
from pathlib import Path

import pytest
from image_files import write_image

from ncfinetune import Backbone
from ncfinetune.cli import main


def _folder(path: Path, first: int, classes: str = "ab") -> Path:
    """Two images of each class, numbered from the first."""
    for number, (label, name) in enumerate(itertools.product(classes, "01"), first):
        write_image(path / "train" / label / f"{name}.png", number)
    return path


def test_a_part_of_other_images_is_not_taken_for_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = tmp_path / "part.safetensors"
    Backbone("resnet18", stem="cifar", channels=[4, 6, 8, 10]).save(tmp_path / "small.safetensors")
    words = ["scan", "--backbone", "{name: resnet18, stem: cifar, channels: [4, 6, 8, 10]}", "--accelerator", "cpu"]
    words += ["--checkpoint", str(tmp_path / "small.safetensors"), "--layers", "penultimate", "--data", "ImageFolder"]
    words += ["--data.image_size", "8", "--data.val_fraction", "0", "--part", "1/2", "--out", str(part), "--data.root"]
    own = _folder(tmp_path / "own", 0)
    assert main([*words, str(own)]) == 0
    written = part.read_bytes()
    capsys.readouterr()
    assert main([*words, str(shutil.copytree(own, tmp_path / "copy"))]) == 0
    assert capsys.readouterr().out == f"{part} is there\n"
    for other, said in (
        (_folder(tmp_path / "other", 100), r'images are "\w+", and not "\w+"'),
        (_folder(tmp_path / "renamed", 0, "ac"), r'classes are \["a", "b"\], and not \["a", "c"\]'),
        (_folder(tmp_path / "more", 0, "abc"), r'classes are \["a", "b"\], and not \["a", "b", "c"\]'),
    ):
        assert main([*words, str(other)]) == 2
        refusal = rf"error: {part} is there, and of another scan: its {said}; name another file, or delete it"
        assert re.fullmatch(refusal, capsys.readouterr().err.splitlines()[-1])
    assert part.read_bytes() == written

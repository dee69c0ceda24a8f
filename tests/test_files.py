"""Folders of images, and what can be wrong with them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import number_of, write_image
from PIL import Image
from torchvision import transforms as v1

from ncfinetune.datamodules import Digits, ImageFolder
from ncfinetune.datamodules.images import read_image


def _write(root: Path, parts: dict[str, int], classes: tuple[str, ...] = ("ant", "bee")) -> dict[str, list[int]]:
    numbers = iter(range(216))
    written: dict[str, list[int]] = {}
    for part, count in parts.items():
        for name in classes:
            for i in range(count):
                written.setdefault(part, []).append(next(numbers))
                write_image(root / part / name / f"{i:02d}.png", written[part][-1])
    return written


def _make(root: Path, **arguments: Any) -> ImageFolder:
    return ImageFolder(str(root), **{"num_workers": 0, "image_size": 8, **arguments})


def _read(data: ImageFolder, split: str) -> list[int]:
    data.setup("fit")
    loader = {"train": data.train_plain_dataloader, "val": data.val_dataloader, "test": data.test_dataloader}[split]()
    return [number_of(image.numpy()) for images, _ in loader for image in images]


def test_folders_are_parts(tmp_path: Path) -> None:
    written = _write(tmp_path, {"train": 4, "val": 2, "test": 3})
    data = _make(tmp_path)
    assert {part: _read(data, part) for part in written} == written
    assert data.class_names == ["ant", "bee"]


def test_validation_is_cut_from_train_where_there_is_no_folder(tmp_path: Path) -> None:
    written = _write(tmp_path, {"train": 10, "test": 3})
    data = _make(tmp_path, val_fraction=0.3)
    assert len(_read(data, "val")) == 6
    assert sorted(_read(data, "train") + _read(data, "val")) == written["train"]
    assert _read(data, "test") == written["test"]


def test_folders_can_be_named(tmp_path: Path) -> None:
    written = _write(tmp_path, {"train": 10, "val": 3})
    data = _make(tmp_path, folders={"train": "train", "test": "val"})
    assert _read(data, "test") == written["val"]
    assert len(_read(data, "val")) == 2


def test_one_folder_is_cut_into_parts(tmp_path: Path) -> None:
    written = _write(tmp_path, {"": 10})
    data = _make(tmp_path, test_fraction=0.2, val_fraction=0.25)
    parts = {split: _read(data, split) for split in ("train", "val", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 12, "val": 4, "test": 4}
    assert sorted(number for part in parts.values() for number in part) == written[""]
    assert parts["test"] == _read(_make(tmp_path, test_fraction=0.2, val_fraction=0.0, shots=1), "test")


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    written = _write(tmp_path, {"train": 4, "val": 2})
    (tmp_path / "train" / "ant" / ".DS_Store").write_text("x")
    (tmp_path / "train" / ".cache").mkdir()
    assert _read(_make(tmp_path), "train") == written["train"]


def test_broken_files_are_left_out_only_on_request(tmp_path: Path) -> None:
    written = _write(tmp_path, {"train": 4, "val": 2})
    (tmp_path / "train" / "ant" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"1 files are no images: .*notes.txt; remove them, or give skip_broken=true"):
        _make(tmp_path).setup("fit")
    (tmp_path / "train" / "bee" / "99.jpg").write_bytes(b"no JPEG at all")
    with pytest.warns(UserWarning, match=r"left out 2 files that cannot be read as images: .*notes.txt, .*99.jpg"):
        assert _read(_make(tmp_path, skip_broken=True), "train") == written["train"]


def test_a_class_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, {"train": 2, "val": 2})
    for path in (tmp_path / "train" / "ant").iterdir():
        path.write_text("x")
    with pytest.warns(UserWarning, match="left out 2"), pytest.raises(FileNotFoundError, match="no images of ant in"):
        _make(tmp_path, skip_broken=True).setup("fit")


def _one_class(root: Path) -> None:
    _write(root, {"train": 2}, ("ant",))


def _other_classes(root: Path) -> None:
    _write(root, {"train": 2})
    _write(root, {"val": 2}, ("bee", "cow"))


def _empty_class(root: Path) -> None:
    _write(root, {"train": 2, "val": 2})
    (root / "train" / "ant" / "00.png").unlink()
    (root / "train" / "ant" / "01.png").unlink()


def _no_train(root: Path) -> None:
    for folder in ("Train/a", "Train/b", "val/a", "val/b"):
        (root / folder).mkdir(parents=True)


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (lambda root: os.rmdir(root), {}, r"no folder '.*'; expected one with train/CLASS/ and val/CLASS/, or CLASS/"),
        (lambda root: None, {}, r"expected a folder for each of at least two classes in '.*', got \[\]"),
        (_one_class, {}, r"expected a folder for each of at least two classes in '.*train', got \['ant'\]"),
        (_other_classes, {}, r"expected the classes of train in val; it lacks \['ant'\] and has also \['cow'\]"),
        (_empty_class, {}, "ant"),
        (_other_classes, {"folders": {"train": "train", "val": "dev"}}, r"no folder .*dev; mend folders="),
        (_other_classes, {"folders": {"val": "val"}}, "expected folders to name train, and val and test if wanted"),
        (_no_train, {}, r"expected a folder train beside val in .*, got Train, val; rename it, or name the folders"),
        (_other_classes, {"test_fraction": 1.0}, r"expected test_fraction in \[0, 1\), got 1.0"),
        (_one_class, {"shots": 0}, "at least two classes"),
    ],
)
def test_folders_that_cannot_be(
    spoil: Callable[[Path], None], arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    root = tmp_path / "images"
    root.mkdir()
    spoil(root)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _make(root, **arguments).setup("fit")


def _photograph(width: int, height: int) -> Image.Image:
    """A smooth picture with some detail."""
    y, x = np.mgrid[:height, :width] / 40
    waves = np.stack([np.sin(x + y), np.cos(2 * x - y), np.sin(x * y / 4)], axis=-1)
    return Image.fromarray(((waves + 1) * 127).astype(np.uint8))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize(("width", "height"), [(300, 220), (640, 900)])
def test_evaluation_sees_what_resizing_and_cropping_the_centre_shows(
    width: int, height: int, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"image.{suffix}"
    _photograph(width, height).save(path, quality=95)
    usual = v1.Compose([v1.Resize(128), v1.CenterCrop(112)])(Image.open(path).convert("RGB"))
    apart = np.abs(np.asarray(usual, np.float32) - read_image(str(path), 112)[0].permute(1, 2, 0).numpy())
    assert apart.mean() < 1.5
    assert read_image(str(path), 112).shape == (1, 3, 112, 112)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_crops_are_cut_out_of_the_whole_image(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{suffix}"
    _photograph(900, 700).save(path, quality=95)
    boxes = [[10.0, 20.0, 600.0, 500.0], [300.0, 400.0, 350.0, 320.0]]
    views = read_image(str(path), 64, lambda height, width: boxes if (height, width) == (700, 900) else [])
    for view, (top, left, h, w) in zip(views, boxes, strict=True):
        crop = Image.open(path).convert("RGB").crop((int(left), int(top), int(left + w), int(top + h)))
        usual = np.asarray(crop.resize((64, 64), Image.Resampling.BILINEAR), np.float32)
        assert np.abs(usual - view.permute(1, 2, 0).numpy()).mean() < 1.5


def test_an_image_of_the_right_size_is_taken_as_it_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    assert np.array_equal(read_image(str(tmp_path / "image.png"), 16)[0].permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize(
    ("mode", "suffix", "expected"),
    [
        ("L", "png", (150, 150, 150)),
        ("1", "png", (255, 255, 255)),
        ("LA", "png", (150, 150, 150)),
        ("RGBA", "png", (200, 100, 50)),
        ("P", "png", (200, 100, 50)),
        ("CMYK", "jpg", (200, 100, 50)),
        ("I;16", "png", (150, 150, 150)),
    ],
)
def test_every_kind_of_image_becomes_rgb(
    mode: str, suffix: str, expected: tuple[int, int, int], tmp_path: Path
) -> None:
    path = tmp_path / f"image.{suffix}"
    if mode == "I;16":
        image = Image.fromarray(np.full((10, 10), 150 * 257, np.uint16))
    else:
        base = Image.new("RGB", (10, 10), expected if mode not in ("1",) else (255, 255, 255))
        image = base.convert(mode)
    if mode == "P":
        image.info["transparency"] = b"\x00" * 10
    image.save(path)
    found = read_image(str(path), 8)[0].float().mean((1, 2))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=4, rtol=0)


@pytest.mark.parametrize("kind", ["truncated JPEG", "truncated PNG", "text", "floating point", "gone"])
def test_files_that_cannot_be_read_are_named(kind: str, tmp_path: Path) -> None:
    suffix = {"truncated PNG": "png", "floating point": "tiff"}.get(kind, "jpg")
    path = tmp_path / f"image.{suffix}"
    if kind == "floating point":
        Image.fromarray(np.zeros((8, 8), np.float32)).save(path)
    elif kind == "text":
        path.write_text("x")
    elif kind != "gone":
        _photograph(100, 100).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cannot read .*image.* as an image: .*; mend or remove the file"):
        read_image(str(path), 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_names_the_file_that_it_cannot_read(tmp_path: Path, workers: int) -> None:
    _write(tmp_path, {"train": 2, "val": 2})
    (tmp_path / "train" / "ant" / "00.png").write_bytes(b"x")
    data = _make(tmp_path, num_workers=workers)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"cannot read .*00.png as an image"):
        list(data.train_dataloader())


def test_holding_images_in_memory_names_the_file_that_cannot_be_read(tmp_path: Path) -> None:
    _write(tmp_path, {"train": 2, "val": 2})
    (tmp_path / "val" / "ant" / "01.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"cannot read .*01.png as an image"):
        _make(tmp_path, in_memory=True).setup("fit")


def test_files_of_a_folder_are_predicted_as_the_test_images_are(tmp_path: Path) -> None:
    """Those formats among them of which a decoder must know something: 16 bits a pixel, and JPEGs decoded smaller."""
    _write(tmp_path, {"train": 3, "test": 1})
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "test" / "ant" / "large.jpg")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(tmp_path / "test" / "bee" / "deep.png")
    (tmp_path / "test" / "notes.txt").write_text("no image")
    data = _make(tmp_path)
    paths = data.predict_files(tmp_path / "test")
    data.setup("predict")
    expected = torch.cat([images for images, _ in data.test_dataloader()])
    assert [Path(path).name for path in paths] == ["00.png", "large.jpg", "00.png", "deep.png"]
    assert torch.equal(torch.cat([images for images, _ in data.predict_dataloader()]), expected)


@pytest.mark.parametrize("size", [None, 16])
def test_files_are_brought_to_size_as_stored_images_are(size: int | None, tmp_path: Path) -> None:
    data = Digits([7, 8, 9], image_size=size, num_workers=0)
    data.setup("predict")
    expected, _ = next(iter(data.test_dataloader()))
    for index, image in enumerate(expected):
        Image.fromarray(image[0].numpy()).convert("RGBA").save(tmp_path / f"{index:02d}.png")
    data.predict_files(tmp_path)
    found = next(iter(data.predict_dataloader()))
    assert torch.equal(found[0], expected)
    assert data.on_after_batch_transfer(list(found), 0)[0].shape[1:] == data.input_size


def test_files_that_are_no_images_are_refused_when_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    data = Digits(num_workers=0)
    data.predict_files(tmp_path)
    with pytest.raises(ValueError, match=r"cannot read .*broken.png as an image: .*; mend or remove the file"):
        next(iter(data.predict_dataloader()))

"""Folders of images, and what can be wrong with them."""

import math
import os
import re
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
from ncfinetune.datamodules.decoding import Decoding, read_image
from ncfinetune.datamodules.listing import same_content


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
    return sorted(number_of(image.numpy()) for images, _ in loader for image in images)


def test_folders_are_parts(tmp_path: Path) -> None:
    written = _write(tmp_path, {"train": 4, "val": 2, "test": 3})
    data = _make(tmp_path)
    assert {part: _read(data, part) for part in written} == written
    assert data.class_names == ["ant", "bee"]


@pytest.mark.parametrize("names", [("Train", "VALID", "Test"), ("train", "validation", "TEST")])
def test_folders_of_parts_go_by_the_words_of_a_table(names: tuple[str, ...], tmp_path: Path) -> None:
    written = _write(tmp_path, dict(zip(names, (4, 2, 3), strict=True)))
    data = _make(tmp_path)
    assert [_read(data, part) for part in ("train", "val", "test")] == list(written.values())
    assert data.class_names == ["ant", "bee"]


def test_folders_beside_the_parts_are_left_out_with_a_warning(tmp_path: Path) -> None:
    written = _write(tmp_path, {"train": 4, "val": 2, "training": 1, ".cache": 1})
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "notes.txt").write_text("x")
    message = (
        r"left out 1 folder with images of '.*' beside train, val: training; to use them, name the folders: "
        r"folders={train: ..., val: ..., test: ...}"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        data = _make(tmp_path)
    assert len(caught) == 1
    assert _read(data, "train") == written["train"]
    named = _make(tmp_path, folders={"train": "train", "val": "val", "test": "training"})
    assert _read(named, "test") == written["training"]


def test_a_class_may_be_named_train(tmp_path: Path) -> None:
    written = _write(tmp_path, {"": 5}, ("bus", "Train"))
    message = r"at least two classes in '.*Train', got \[\]; if Train is a class itself, give folders={train: .}"
    with pytest.warns(UserWarning, match="beside Train: bus"), pytest.raises(ValueError, match=message):
        _make(tmp_path)
    data = _make(tmp_path, folders={"train": "."}, val_fraction=0.0)
    assert _read(data, "train") == written[""]
    assert data.class_names == ["Train", "bus"]


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


def test_the_folder_of_a_part_is_no_class_of_another(tmp_path: Path) -> None:
    written = _write(tmp_path, {"": 8, "holdout": 3})
    data = _make(tmp_path, folders={"train": ".", "test": "holdout"}, val_fraction=0.0)
    assert data.class_names == ["ant", "bee"]
    assert _read(data, "train") == written[""]
    assert _read(data, "test") == written["holdout"]


def test_a_class_folder_whose_name_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, {"": 2}, ("ant", os.fsdecode(b"caf\xe9")))
    message = r"expected names of classes in UTF-8 in '.*', got the folder 'caf\\udce9'; rename it"
    with pytest.raises(ValueError, match=message):
        _make(tmp_path)


def test_one_folder_for_two_parts_is_said(tmp_path: Path) -> None:
    _write(tmp_path, {"train": 4, "val": 3})
    with pytest.warns(
        UserWarning, match="6 of 6 test images are in val too, byte for byte, as .* on test are too good"
    ):
        _make(tmp_path, folders={"train": "train", "val": "val", "test": "val"}).setup("fit")


def test_one_folder_is_cut_into_parts(tmp_path: Path) -> None:
    written = _write(tmp_path, {"": 10})
    data = _make(tmp_path, test_fraction=0.2, val_fraction=0.25)
    parts = {split: _read(data, split) for split in ("train", "val", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 12, "val": 4, "test": 4}
    assert sorted(number for part in parts.values() for number in part) == written[""]
    assert parts["test"] == _read(_make(tmp_path, test_fraction=0.2, val_fraction=0.0, shots=1), "test")


@pytest.mark.parametrize("by_table", [False, True])
def test_further_images_move_no_image_between_parts(by_table: bool, tmp_path: Path) -> None:
    """20 % of 40 and of 42 are 8, so that none is moved by rounding. Neither the root nor a table's order matters."""
    splits = ("train", "val", "test")

    def cut(root: Path, count: int, backwards: bool = False) -> dict[str, set[int]]:
        for place, name in enumerate(("ant", "bee", "cow")):
            for i in range(count):
                write_image(root / name / f"{i:02d}.png", 50 * place + i)
        if by_table:
            rows = [f"{path.relative_to(root).as_posix()},{path.parent.name}" for path in sorted(root.rglob("*.png"))]
            (root / "labels.csv").write_text("\n".join(rows[::-1] if backwards else rows))
        table = {"labels": "labels.csv"} if by_table else {}
        data = _make(root, test_fraction=0.2, val_fraction=0.0, **table)
        assert set(_read(_make(root, val_fraction=0.0, shots=5, seed=3, **table), "train")) < set(
            _read(_make(root, val_fraction=0.0, shots=9, seed=3, **table), "train")
        )
        return {split: set(_read(data, split)) for split in splits if split != "val"}

    before, after, elsewhere = cut(tmp_path / "a", 40), cut(tmp_path / "a", 42), cut(tmp_path / "b", 40, backwards=True)
    assert before == elsewhere
    assert not before["train"] & after["test"]
    assert [len(part) for part in after.values()] == [102, 24]


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    written = _write(tmp_path, {"train": 4, "val": 2})
    (tmp_path / "train" / "ant" / ".DS_Store").write_text("x")
    (tmp_path / "train" / ".cache").mkdir()
    assert _read(_make(tmp_path), "train") == written["train"]


def test_broken_files_are_left_out_only_on_request(tmp_path: Path) -> None:
    written = _write(tmp_path, {"train": 4, "val": 2})
    (tmp_path / "train" / "ant" / "notes.txt").write_text("x")
    with pytest.warns(UserWarning, match=r"left out 1 file in '.*train' without an image suffix: 1 .txt"):
        assert _read(_make(tmp_path), "train") == written["train"]
    (tmp_path / "train" / "ant" / "notes.txt").unlink()
    (tmp_path / "train" / "bee" / "99.jpg").write_bytes(b"no JPEG at all")
    with pytest.raises(ValueError, match=r"cannot read .*99.jpg as an image: .*; repair or remove the file"):
        _read(_make(tmp_path), "train")
    data = _make(tmp_path, skip_broken=True)
    with pytest.warns(UserWarning, match=r"left out 1 file that cannot be read as images: .*99.jpg"):
        assert _read(data, "train") == written["train"]
    with pytest.warns(UserWarning, match=r"left out 1 file that cannot be read as images: .*99.jpg"):
        assert len(data.predict_files(tmp_path / "train" / "bee")) == 4


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
    for folder in ("training/a", "training/b", "Valid/a", "Valid/b"):
        (root / folder).mkdir(parents=True)


def _two_of_a_part(root: Path) -> None:
    for part in ("train", "val", "Validation"):
        _write(root, {part: 1})


def _other_words(root: Path) -> None:
    _write(root, {"Training": 2, "testing": 2})


def _a_level_deeper(root: Path) -> None:
    _write(root / "train", {"train": 2, "val": 2})


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (lambda root: os.rmdir(root), {}, r"no folder '.*'; expected one with train/CLASS/ and val/CLASS/, or CLASS/"),
        (lambda root: None, {}, r"expected a folder for each of at least two classes in '.*', got \[\]"),
        (_one_class, {}, r"expected a folder for each of at least two classes in '.*train', got \['ant'\]"),
        (_other_classes, {}, r"expected the classes of train in val; it lacks \['ant'\] and has also \['cow'\]"),
        (_empty_class, {}, "ant"),
        (_other_classes, {"folders": {"train": "train", "val": "dev"}}, r"no folder .*dev; correct folders="),
        (_other_classes, {"folders": {"val": "val"}}, "expected folders to name train and optionally val and test"),
        (
            _no_train,
            {},
            r"expected a folder train beside Valid in .*, got Valid, training; rename it, or name the fold",
        ),
        (
            _two_of_a_part,
            {},
            r"expected one folder of val images in '.*', got Validation and val; join them, or name the",
        ),
        (
            _other_words,
            {},
            r"expected a folder for each class in '.*images', got Training, testing, which are words for splits; name "
            r"the folders: folders={train: ..., val: ..., test: ...}",
        ),
        (
            _a_level_deeper,
            {},
            r"expected a folder for each class in '.*train', got train, val, which are words for spl",
        ),
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
@pytest.mark.parametrize(("width", "height"), [(300, 220), (61, 97), (640, 900)])
def test_evaluation_sees_what_resizing_and_cropping_the_centre_shows(
    width: int, height: int, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"image.{suffix}"
    _photograph(width, height).save(path, quality=95)
    image = Image.open(path)
    image.draft("RGB", (2 * 128, 2 * 128))  # the larger JPEG is decoded at half its size
    usual = v1.Compose([v1.Resize(128), v1.CenterCrop(112)])(image.convert("RGB"))
    found = read_image(str(path), 112)
    assert found.shape == (1, 3, 112, 112)
    apart = np.abs(np.asarray(usual, np.float32) - found[0].permute(1, 2, 0).numpy())
    assert apart.max() == 0
    assert (image.size == (width, height)) == (suffix != "jpg" or width < 512)


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
    for decoding in (Decoding(), Decoding(centre=1.0)):
        found = read_image(str(tmp_path / "image.png"), 16, decoding=decoding)
        assert np.array_equal(found[0].permute(1, 2, 0).numpy(), pixels)
    cropped = read_image(str(tmp_path / "image.png"), 16, decoding=Decoding(centre=0.875))[0].permute(1, 2, 0).numpy()
    usual = v1.Compose([v1.Resize(18), v1.CenterCrop(16)])(Image.fromarray(pixels))
    assert np.array_equal(cropped, np.asarray(usual))


def test_every_image_of_a_data_set_is_cropped_by_one_share(tmp_path: Path) -> None:
    """The share that the preprocessing states, whatever the size of the single image."""
    numbers = iter(range(216))
    for train_sizes, share in (((16, 16), 1.0), ((16, 40), 0.875)):
        root = tmp_path / str(share)
        for part, sizes in (("train", train_sizes), ("test", (16, 30))):
            for name, size in zip("ab", sizes, strict=True):
                (root / part / name).mkdir(parents=True)
                for number in range(2):
                    place = root / part / name / f"{number}.png"
                    write_image(place, next(numbers))  # no two of them are alike
                    Image.open(place).resize((size, size + 9 * (size == 30))).save(place)
        data = _make(root, image_size=16)
        data.setup("fit")
        assert data.preprocessing["crop_pct"] == share
        usual = v1.Compose([v1.Resize(math.floor(16 / share)), v1.CenterCrop(16)])
        images = next(iter(data.predict_dataloader()))[0].permute(0, 2, 3, 1).numpy()
        for path, found in zip(sorted((root / "test").rglob("*.png")), images, strict=True):
            assert np.array_equal(found, np.asarray(usual(Image.open(path).convert("RGB"))))


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


@pytest.mark.parametrize("kind", ["truncated JPEG", "truncated PNG", "text", "gone"])
def test_files_that_cannot_be_read_are_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{'png' if kind == 'truncated PNG' else 'jpg'}"
    if kind == "text":
        path.write_text("x")
    elif kind != "gone":
        _photograph(100, 100).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cannot read .*image.* as an image: .*; repair or remove the file"):
        read_image(str(path), 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_names_the_file_that_it_cannot_read(tmp_path: Path, workers: int) -> None:
    _write(tmp_path, {"train": 2, "val": 2})
    (tmp_path / "train" / "ant" / "00.png").write_bytes(b"x")
    data = _make(tmp_path, num_workers=workers)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"cannot read .*00.png as an image"):
        list(data.train_dataloader())


@pytest.mark.slow
def test_holding_images_in_memory_names_the_file_that_cannot_be_read(tmp_path: Path) -> None:
    _write(tmp_path, {"train": 2, "val": 2})
    (tmp_path / "val" / "ant" / "01.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"cannot read .*01.png as an image"):
        _make(tmp_path, in_memory=True).setup("fit")


@pytest.mark.parametrize("held", ["in_memory", "device_cache"])
def test_images_held_in_memory_are_predicted_in_the_order_of_the_files(held: str, tmp_path: Path) -> None:
    written = _write(tmp_path, {"train": 5, "test": 5})
    data = _make(tmp_path, batch_size=4, **{held: True})
    data.setup("predict")
    loader: Any = data.predict_dataloader()
    assert [number_of(image.numpy()) for images, _ in loader for image in images] == written["test"]
    paths = [str(path) for path in sorted((tmp_path / "test").rglob("*.png"))]
    assert loader.dataset.samples == [(path, int(number > 4)) for number, path in enumerate(paths)]
    whole = _make(tmp_path, batch_size=4)
    whole.setup("predict")
    for own, other in zip(data.test_dataloader(), whole.test_dataloader(), strict=True):
        assert all(map(torch.equal, own, other))


def test_files_of_a_folder_are_predicted_as_the_test_images_are(tmp_path: Path) -> None:
    """Those formats among them of which a decoder must know something: 16 bits a pixel, and JPEGs decoded smaller."""
    _write(tmp_path, {"train": 3, "test": 1})
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "test" / "ant" / "large.jpg")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(tmp_path / "test" / "bee" / "deep.png")
    (tmp_path / "test" / "notes.txt").write_text("no image")
    data = _make(tmp_path)
    data.setup("predict")
    expected = torch.cat([images for images, _ in data.predict_dataloader()])
    paths = data.predict_files(tmp_path / "test")
    assert [Path(path).name for path in paths] == ["00.png", "large.jpg", "00.png", "deep.png"]
    assert torch.equal(torch.cat([images for images, _ in data.predict_dataloader()]), expected)


def test_files_may_be_named_before_the_data_are_set_up(tmp_path: Path) -> None:
    """The training images, which decide on the crop, are read in `setup` only."""
    rng = np.random.default_rng(0)
    for folder in (tmp_path / part / name for part in ("train", "test") for name in ("ant", "bee")):
        folder.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / "0.png")
    data = _make(tmp_path, val_fraction=0.0)
    data.predict_files(tmp_path / "test")
    data.setup("predict")
    (found, _), (expected, _) = next(iter(data.predict_dataloader())), next(iter(data.test_dataloader()))
    assert torch.equal(found, expected)


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
    with pytest.raises(ValueError, match=r"cannot read .*broken.png .*; repair or remove the file; skip_broken=true"):
        next(iter(data.predict_dataloader()))


def test_what_is_hidden_is_passed_over_in_training_and_in_prediction(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path, {"": 8})
    expected = sorted(tmp_path.rglob("*.png"))
    for folder in ("ant/.ipynb_checkpoints", "__MACOSX/ant", "ant/deeper/@eaDir", ".Trash/ant", "bee/.thumbs/deeper"):
        for number in range(8):
            write_image(tmp_path / folder / f"{number:02d}.png", number)
    (tmp_path / "ant" / "._00.png").write_bytes(b"a fork")
    with caplog.at_level("INFO"):
        data = _make(tmp_path, val_fraction=0.25)
        data.setup("fit")
        found = [path for part in data._parts.values() for path in part.paths]  # type: ignore[attr-defined]
        predicted = data.predict_files(tmp_path)
    assert sorted(map(Path, found)) == list(map(Path, predicted)) == expected
    assert data.class_names == ["ant", "bee"]
    assert "ignored 4 hidden files and folders in" in caplog.text
    assert "ignored 6 hidden files and folders in" in caplog.text
    hidden = tmp_path / ".cache" / "data"
    _write(hidden, {"": 2})
    assert len(_make(hidden).predict_files(hidden)) == 4  # a hidden root is what the user named


def test_training_and_prediction_find_the_same_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    names = ["a.png", "b.JPG", "c.gif", "d.jfif", "e.bmp", "f.TIFF", "g.jpe", "h.webp", "i.ppm", "j.tga", "k.jp2"]
    for number, name in enumerate(names):
        kind = {".jfif": "JPEG", ".jpe": "JPEG"}.get(Path(name).suffix)
        for folder in ("ant", "bee"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), (number, 0, folder == "ant")).save(root / folder / name, kind)
        write_image(elsewhere / f"{number}.png", number)
        (root / "ant" / f"{number}.heic").write_bytes(b"x")
    (root / "ant" / "notes").write_text("x")
    os.symlink(elsewhere, root / "bee" / "linked")
    os.symlink(root, root / "bee" / "circle")
    os.symlink(elsewhere, root / "cow")
    data = _make(root, val_fraction=0.0)
    line = r"left out 12 files in '.*root' without an image suffix: 11 .heic, 1 without a suffix"
    circle = "left out 1 link in .* leading back: .*circle"
    with (
        pytest.warns(UserWarning, match="in several classes"),
        pytest.warns(UserWarning, match=line),
        pytest.warns(UserWarning, match=circle),
    ):
        data.setup("fit")
    with caplog.at_level("INFO"):
        predicted = data.predict_files(root)
    assert re.search(line, caplog.text)
    assert sorted(predicted) == sorted(data._parts["train"].paths)  # type: ignore[attr-defined]
    assert len(predicted) == 4 * len(names)
    for loader in (data.train_plain_dataloader(), data.predict_dataloader()):
        assert sum(len(images) for images, _ in loader) == 4 * len(names)


def test_images_that_are_in_two_parts_are_counted(tmp_path: Path) -> None:
    _write(tmp_path, {"train": 4, "val": 3, "test": 2})
    for copy, original in (("val/ant/x.png", "train/ant/00.png"), ("val/ant/y.png", "train/ant/01.png")):
        (tmp_path / copy).write_bytes((tmp_path / original).read_bytes())
    (tmp_path / "test/bee/z.png").write_bytes((tmp_path / "val/bee/00.png").read_bytes())
    with pytest.warns(UserWarning, match="byte for byte") as caught:
        _make(tmp_path).setup("fit")
    said = [str(warning.message) for warning in caught]
    assert len(said) == 2
    assert said[0].startswith("2 of 8 val images are in train too, byte for byte, as ")
    assert said[0].endswith("00.png: results on val are too good; remove one of each pair")
    assert said[1].startswith("1 of 5 test images are in val too, byte for byte, as ")


def test_images_in_both_parts_that_have_copies_count_once(tmp_path: Path) -> None:
    _write(tmp_path / "all", {"": 4})
    for path in list((tmp_path / "all").rglob("*.png")):
        path.with_stem(f"{path.stem} copy").write_bytes(path.read_bytes())
    with pytest.warns(UserWarning, match="byte for byte") as caught:
        _make(tmp_path, folders={"train": "all", "test": "all"}, val_fraction=0.0).setup("fit")
    (said,) = [str(warning.message) for warning in caught]
    assert said.startswith("16 of 16 test images are in train too, byte for byte, as ")
    assert said.endswith(".png: results on test are too good; leave each image in one split")


def test_a_loader_before_setup_is_refused_in_words(tmp_path: Path) -> None:
    _write(tmp_path, {"train": 4, "val": 2})
    data = _make(tmp_path)
    with pytest.raises(ValueError, match=r"expected setup\(\) before a loader of train images; call it first"):
        data.train_dataloader()


def test_a_file_to_predict_is_the_only_one(tmp_path: Path) -> None:
    _write(tmp_path, {"train": 4, "val": 2})
    file = next((tmp_path / "train").rglob("*.png"))
    assert _make(tmp_path).predict_files(file) == [str(file)]


def test_classes_that_are_named_as_splits_are_told_how(tmp_path: Path) -> None:
    for name in ("valid", "invalid"):
        write_image(tmp_path / name / "0.png", 0)
    with pytest.raises(FileNotFoundError, match=r"expected a folder train .* folders={train: \.} if all are classes"):
        _make(tmp_path)
    assert _make(tmp_path, folders={"train": "."}).class_names == ["invalid", "valid"]


def test_a_split_within_a_class_folder_of_another_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, {"": 4, "holdout/test": 2})
    message = r"expected no split in a class folder of another, got test in holdout of train, .*; move test out of"
    with pytest.raises(ValueError, match=message):
        _make(tmp_path, folders={"train": ".", "test": "holdout/test"})


@pytest.mark.parametrize("options", [{}, {"shots": 1, "seed": 1}, {"shots": 1, "seed": 6}, {"fraction": 0.3}])
def test_few_labelled_images_do_not_change_how_images_are_evaluated(options: dict[str, Any], tmp_path: Path) -> None:
    """Half of the training images have the size already."""
    _write(tmp_path, {"train": 8, "test": 2})
    for place, path in enumerate(sorted((tmp_path / "train").rglob("*.png"))):
        with Image.open(path) as image:
            image.resize((16, 16) if place % 2 else (30, 20)).save(path)
    data = _make(tmp_path, image_size=16, **options)
    data.setup("fit")
    assert data.preprocessing["crop_pct"] == 0.875


def test_copies_in_one_folder_that_is_cut_are_counted(tmp_path: Path) -> None:
    _write(tmp_path, {"": 10})
    for path in list((tmp_path / "ant").iterdir()):
        (tmp_path / "ant" / f"{path.stem} copy.png").write_bytes(path.read_bytes())
    (tmp_path / "bee" / "ant.png").write_bytes((tmp_path / "ant" / "03.png").read_bytes())
    with pytest.warns(UserWarning, match="byte for byte") as caught:
        _make(tmp_path, val_fraction=0.5).setup("fit")
    said = "; ".join(str(warning.message) for warning in caught)
    assert re.search(r"\d of 16 val images are in train too, byte for byte", said)
    assert re.search(r"1 image in several classes, byte for byte, as .* is in ant, bee", said)


def test_files_of_one_size_are_told_apart(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 20_000, dtype=np.uint8).tobytes()
    contents = {"a": noise, "b": noise, "c": b"x" + noise[1:], "d": noise[:10_000] + b"x" + noise[10_001:], "e": b"x"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in (*contents, "gone")]
    assert same_content(paths, lambda group: True) == [paths[:2]]
    assert same_content(paths, lambda group: "a" not in str(group)) == []


def test_a_class_may_be_missing_where_it_is_evaluated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(tmp_path, {"train": 3}, ("ant", "bee", "cow"))
    for number, (part, name) in enumerate((("val", "ant"), ("test", "bee"))):
        write_image(tmp_path / part / name / "x.png", 100 + number)
    (tmp_path / "val" / "bee").mkdir()
    (tmp_path / "val" / "dog").mkdir()
    data = _make(tmp_path)
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert "there are no val images of bee, cow" in caplog.text
    assert "there are no test images of ant, cow" in caplog.text
    assert "left out the folder dog of val, which is empty and not a class of train" in caplog.text
    for split, label in (("val", 0), ("test", 1)):
        loader = data.val_dataloader() if split == "val" else data.test_dataloader()
        assert [labels.tolist() for _, labels in loader] == [[label]]


def test_a_test_part_that_cannot_be_used_stops_only_the_test(tmp_path: Path) -> None:
    _write(tmp_path, {"train": 3, "val": 2})
    (tmp_path / "test" / "zebra").mkdir(parents=True)
    write_image(tmp_path / "test" / "zebra" / "x.png", 99)
    data = _make(tmp_path)
    message = r"expected the classes of train in test; it lacks \['ant', 'bee'\] and has also \['zebra'\]"
    with pytest.warns(UserWarning, match=f"there is no test part: {message}"):
        data.setup("fit")
    assert len(list(data.train_plain_dataloader())) == 1
    with pytest.raises(ValueError, match=message):
        data.test_dataloader()


@pytest.mark.parametrize(("count", "parts"), [(5, (4, 1, 0)), (3, (2, 1, 0)), (2, (1, 1, 0)), (3, (1, 1, 1))])
def test_few_images_a_class_give_every_part_one(count: int, parts: tuple[int, int, int], tmp_path: Path) -> None:
    _write(tmp_path, {"": count})
    data = _make(tmp_path, test_fraction=0.1 if parts[2] else 0.0)
    data.setup("fit")
    found = {name: np.bincount(part.own_labels).tolist() for name, part in data._parts.items()}  # type: ignore[attr-defined]
    assert found == {name: [n, n] for name, n in zip(("train", "val", "test"), parts, strict=True) if n}


def test_one_image_a_class_is_trained_on_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(tmp_path, {"": 1})
    data = _make(tmp_path)
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert data.val_dataloader() == []
    assert "there is no validation split: no class has more than one image to take one from" in caplog.text


def test_images_in_no_class_folder_are_said(tmp_path: Path) -> None:
    _write(tmp_path, {"train": 3, "val": 2})
    write_image(tmp_path / "train" / "stray.png", 99)
    with pytest.warns(UserWarning, match=r"left out 1 image of '.*train' in no class folder: stray.png"):
        _make(tmp_path).setup("fit")

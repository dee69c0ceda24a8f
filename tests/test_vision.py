"""The public data sets, read by torchvision's own classes from a few images in each set's format on disk."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from image_files import colour, number_of, write_image
from PIL import Image
from scipy.io import savemat

from ncfinetune.datamodules import (
    CIFAR10,
    CIFAR100,
    DTD,
    Aircraft,
    Flowers102,
    Food101,
    ImageDataModule,
    Pets,
    Recipe,
    StanfordCars,
    vision,
)
from ncfinetune.samples import known_labels

# What a fixture writes: for each part the number of each image's colour, and its label.
Written = dict[str, list[tuple[int, int]]]


def _cifar(folder: str, files: dict[str, list[str]], meta: str, names: str, labels: str, classes: int) -> Any:
    def write(root: Path) -> Written:
        base = root / folder
        base.mkdir()
        numbers, written = iter(range(216)), {}
        for part, batches in files.items():
            rows = []
            for batch in batches:
                own = [(next(numbers), i % classes) for i in range(20 // len(batches))]
                data = np.stack([np.repeat(np.array(colour(n), np.uint8), 1024) for n, _ in own])
                (base / batch).write_bytes(pickle.dumps({"data": data, labels: [label for _, label in own]}))
                rows += own
            written[part] = rows
        (base / meta).write_bytes(pickle.dumps({names: [f"class {i}" for i in range(classes)]}))
        return written

    return write


def _classes_in_folders(count: int, parts: list[str]) -> tuple[list[str], Written]:
    """Names of classes, and for each part an image of every class."""
    numbers = iter(range(10_000))
    return [f"kind{i:03d}" for i in range(count)], {
        part: [(next(numbers) % 216, label) for label in range(count)] for part in parts
    }


def _dtd(root: Path) -> Written:
    names, written = _classes_in_folders(47, ["train", "val", "test"])
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for part, rows in written.items():
        files = [f"{names[label]}/{names[label]}_{part}.jpg" for _, label in rows]
        for file, (number, _) in zip(files, rows, strict=True):
            write_image(base / "images" / file, number)
        (base / "labels" / f"{part}3.txt").write_text("\n".join(files) + "\n")
    return written


def _aircraft(root: Path) -> Written:
    names, written = _classes_in_folders(30, ["train", "val", "test"])
    data = root / "fgvc-aircraft-2013b" / "data"
    for part, rows in written.items():
        lines = [f"{part}{label:04d} {names[label]}" for _, label in rows]
        for line, (number, _) in zip(lines, rows, strict=True):
            write_image(data / "images" / f"{line.split()[0]}.jpg", number, banner=20)
        (data / f"images_manufacturer_{part}.txt").write_text("\n".join(lines) + "\n")
    (data / "manufacturers.txt").write_text("\n".join(names) + "\n")
    return written


def _pets(root: Path) -> Written:
    names, written = _classes_in_folders(37, ["trainval", "test"])
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for part, rows in written.items():
        lines = [f"{names[label]}_{part} {label + 1} 1 1" for _, label in rows]
        for line, (number, _) in zip(lines, rows, strict=True):
            write_image(base / "images" / f"{line.split()[0]}.jpg", number)
        (base / "annotations" / f"{part}.txt").write_text("\n".join(lines) + "\n")
    return {"train": [*written["trainval"]], "test": written["test"]}


def _flowers(root: Path) -> Written:
    _, written = _classes_in_folders(102, ["train", "val", "test"])
    base = root / "flowers-102"
    base.mkdir()
    rows = [row for part in written.values() for row in part]
    for i, (number, _) in enumerate(rows, start=1):
        write_image(base / "jpg" / f"image_{i:05d}.jpg", number)
    savemat(base / "imagelabels.mat", {"labels": np.array([[label + 1 for _, label in rows]])})
    ids = np.arange(1, len(rows) + 1).reshape(3, 1, -1)
    savemat(base / "setid.mat", {"trnid": ids[0], "valid": ids[1], "tstid": ids[2]})
    return written


def _cars(root: Path) -> Written:
    names, written = _classes_in_folders(196, ["train", "test"])
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    files = {"train": base / "devkit/cars_train_annos.mat", "test": base / "cars_test_annos_withlabels.mat"}
    kind = np.dtype([("fname", object), ("class", object)])
    for part, rows in written.items():
        annotations = np.array([(f"{label:05d}.jpg", label + 1) for _, label in rows], dtype=kind)
        savemat(files[part], {"annotations": annotations})
        for number, label in rows:
            write_image(base / f"cars_{part}" / f"{label:05d}.jpg", number)
    savemat(base / "devkit/cars_meta.mat", {"class_names": np.array(names, dtype=object)})
    return written


def _food(root: Path) -> Written:
    names, written = _classes_in_folders(101, ["train", "test"])
    base = root / "food-101"
    (base / "meta").mkdir(parents=True)
    for part, rows in written.items():
        for number, label in rows:
            write_image(base / "images" / names[label] / f"{part}.jpg", number)
        (base / "meta" / f"{part}.json").write_text(json.dumps({name: [f"{name}/{part}"] for name in names}))
    return written


_TEN = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_HUNDRED = {"train": ["train"], "test": ["test"]}
SETS: dict[str, tuple[Any, dict[str, Any], Callable[[Path], Written], int]] = {
    "CIFAR10": (CIFAR10, {}, _cifar("cifar-10-batches-py", _TEN, "batches.meta", "label_names", "labels", 10), 10),
    "CIFAR100": (
        CIFAR100,
        {},
        _cifar("cifar-100-python", _HUNDRED, "meta", "fine_label_names", "fine_labels", 100),
        100,
    ),
    "DTD": (DTD, {"partition": 3}, _dtd, 47),
    "Aircraft": (Aircraft, {"level": "manufacturer"}, _aircraft, 30),
    "Pets": (Pets, {}, _pets, 37),
    "Flowers102": (Flowers102, {}, _flowers, 102),
    "StanfordCars": (StanfordCars, {}, _cars, 196),
    "Food101": (Food101, {}, _food, 101),
}


@pytest.fixture(autouse=True)
def _accept_small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are in the sets' formats, but not the sets: their checksums are others."""
    for module in ("cifar", "flowers102"):
        exists = "torchvision.datasets." + module + ".check_integrity"
        monkeypatch.setattr(exists, lambda path, md5=None: Path(path).is_file())


def _make(name: str, root: Path, **arguments: Any) -> ImageDataModule:
    cls, own, _, _ = SETS[name]
    size = {} if "CIFAR" in name else {"image_size": 12}
    return cls(root=str(root), num_workers=0, **size, **own, **arguments)


def _all(data: ImageDataModule, split: str) -> list[tuple[int, int]]:
    loader = {"train": data.train_plain_dataloader, "val": data.val_dataloader, "test": data.test_dataloader}[split]()
    return [(number_of(x.numpy()), int(y)) for images, labels in loader for x, y in zip(images, labels, strict=True)]


@pytest.mark.parametrize("name", SETS)
def test_each_set_is_read_in_its_official_parts(name: str, tmp_path: Path) -> None:
    _, _, write, num_classes = SETS[name]
    written = write(tmp_path)
    data = _make(name, tmp_path, val_fraction=None if "val" in written else 0)
    data.prepare_data()
    data.setup("fit")
    assert {part: sorted(_all(data, part)) for part in written} == {
        part: sorted(rows) for part, rows in written.items()
    }
    assert data.num_classes == len(data.class_names) == num_classes
    assert len(set(data.class_names)) == num_classes
    train = data.train_plain_dataloader()
    assert known_labels(train.dataset).tolist() == torch.cat([labels for _, labels in train]).tolist()


@pytest.mark.parametrize("name", ["CIFAR10", "DTD", "Pets"])
def test_validation_is_never_cut_from_test(name: str, tmp_path: Path) -> None:
    written = SETS[name][2](tmp_path)
    data = _make(name, tmp_path, val_fraction=0.5)
    data.setup("fit")
    assert sorted(_all(data, "test")) == sorted(written["test"])
    cut = _all(data, "train") + _all(data, "val")
    assert sorted(cut) == sorted(written["train"] + written.get("val", []))


@pytest.mark.parametrize("name", SETS)
def test_what_is_missing_is_said(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder '.*'; give the root in which torchvision's \w+ lies, or"):
        _make(name, tmp_path)


def test_what_is_incomplete_is_said(tmp_path: Path) -> None:
    _dtd(tmp_path)
    (tmp_path / "dtd" / "dtd" / "labels" / "val3.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"dtd' is not complete \(.*val3.txt.*; give the root in which"):
        _make("DTD", tmp_path).setup("fit")


def test_a_set_without_some_of_its_classes_is_refused(tmp_path: Path) -> None:
    _dtd(tmp_path)
    listed = tmp_path / "dtd" / "dtd" / "labels" / "train3.txt"
    listed.write_text("".join(listed.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match="expected 47 classes, got 46; is the data complete"):
        _make("DTD", tmp_path).setup("fit")


@pytest.mark.parametrize("name", sorted(set(SETS) - {"StanfordCars"}))
def test_torchvision_is_asked_to_download(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _make(name, tmp_path, download=True)
    asked = []
    source = data.source  # type: ignore[attr-defined]
    reader = lambda root, **arguments: asked.append((root, arguments))  # noqa: E731
    assert source.reader in vars(torchvision.datasets).values()
    data.source = vision.Source(reader, source.root, source.folder, source.parts, download=True)  # type: ignore[attr-defined]
    data.prepare_data()
    assert asked == [(str(tmp_path), {"download": True, **arguments}) for arguments in source.parts.values()]


def test_nothing_is_downloaded_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _dtd(tmp_path)
    monkeypatch.setattr(torchvision.datasets.DTD, "_download", lambda self: pytest.fail("downloads"))
    data = _make("DTD", tmp_path)
    data.prepare_data()
    data.setup("fit")


def test_a_root_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.write_text("")
    with pytest.raises(OSError, match=r"cannot download cifar-10-batches-py to '.*file': "):
        _make("CIFAR10", root, download=True).prepare_data()


def test_partitions_of_dtd() -> None:
    with pytest.raises(ValueError, match=r"expected partition in 1..10, got 11"):
        DTD(partition=11)


def test_images_of_a_set_in_memory_are_not_copied(tmp_path: Path) -> None:
    SETS["CIFAR10"][2](tmp_path)
    data = _make("CIFAR10", tmp_path, val_fraction=0.5)
    data.setup("fit")
    train, val = data._parts["train"].images, data._parts["val"].images
    assert isinstance(train, torch.Tensor)
    assert train is val
    assert train.is_contiguous()


@pytest.mark.parametrize("arguments", [{}, {"in_memory": True}])
def test_the_banner_of_aircraft_is_never_seen(arguments: dict[str, Any], tmp_path: Path) -> None:
    """All of an image is blue but its banner; the crops are as large as they can be, so each reaches the bottom."""
    _aircraft(tmp_path)
    folder = tmp_path / "fgvc-aircraft-2013b" / "data" / "images"
    for path in folder.iterdir():
        image = Image.new("RGB", (48, 68), "white")
        image.paste("blue", (0, 0, 48, 48))
        image.save(path, quality=100)
    data = Aircraft(
        str(tmp_path), "manufacturer", image_size=16, num_workers=0, augmentation=Recipe(max_aspect=1.01), **arguments
    )
    data.setup("fit")
    for loader in (data.train_dataloader(), data.train_plain_dataloader(), data.val_dataloader()):
        images, _ = next(iter(loader))  # type: ignore[arg-type]
        assert images[:, 0].max() < 30
        assert images[:, 2].min() > 230
    data.predict_files(folder)  # photographs of one's own have no banner
    assert next(iter(data.predict_dataloader()))[0][:, 0, -1].min() > 230

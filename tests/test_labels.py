"""Labels in a CSV file."""

from pathlib import Path
from typing import Any

import pytest
from image_files import number_of, write_image

from ncfinetune.datamodules import ImageFolder
from ncfinetune.datamodules.labels import Row, class_names, read_labels


def _images(root: Path, count: int = 8) -> list[str]:
    names = [f"{'deeper/' if number % 2 else ''}{number:02d}.png" for number in range(count)]
    for number, name in enumerate(names):
        write_image(root / name, number)
    return names


def _make(root: Path, text: str, **arguments: Any) -> ImageFolder:
    (root / "labels.csv").write_bytes(text.encode())
    return ImageFolder(str(root), labels="labels.csv", **{"num_workers": 0, "image_size": 8, **arguments})


def _read(data: ImageFolder, split: str) -> list[tuple[int, str]]:
    loader = {"train": data.train_plain_dataloader, "val": data.val_dataloader, "test": data.test_dataloader}[split]()
    rows = [(number_of(x.numpy()), int(y)) for images, labels in loader for x, y in zip(images, labels, strict=True)]
    return [(number, data.class_names[label]) for number, label in rows]


@pytest.mark.parametrize(
    "start",
    [
        "",
        "path,label\n",
        "\ufeffPath, Label\n",
        "file_name,class\n",
        "image,label\r\n",
        "file,label\n",
        "filename,label\n",
    ],
)
def test_path_and_label(start: str, tmp_path: Path) -> None:
    names = _images(tmp_path)
    lines = [f'"{name}",{"hot dog" if number < 4 else "cat"}' for number, name in enumerate(names)]
    data = _make(tmp_path, start + "\n".join(lines) + "\n\n", val_fraction=0.25, test_fraction=0.25)
    data.setup("fit")
    assert data.num_classes == 2
    assert data.class_names == ["cat", "hot dog"]
    rows = [row for split in ("train", "val", "test") for row in _read(data, split)]
    assert sorted(rows) == [(number, "hot dog" if number < 4 else "cat") for number in range(8)]
    assert [len(_read(data, split)) for split in ("train", "val", "test")] == [4, 2, 2]


@pytest.mark.parametrize("start", ["", "author,label,split,path\n"])
def test_splits_are_as_the_file_has_them(start: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = _images(tmp_path)[:7]
    splits = ["train", "train", "train", "Train", "valid", "val", "test"]
    rows = [(name, str(number % 2), split) for (number, name), split in zip(enumerate(names), splits, strict=True)]
    cells = [("me", label, split, name) if start else (name, label, split) for name, label, split in rows]
    write_image(tmp_path / ".hidden" / "x.png", 99)
    with caplog.at_level("INFO"):
        data = _make(tmp_path, start + "\n".join(map(",".join, cells)))
        data.setup("fit")
    assert _read(data, "train") == [(0, "0"), (1, "1"), (2, "0"), (3, "1")]
    assert _read(data, "val") == [(4, "0"), (5, "1")]
    assert _read(data, "test") == [(6, "0")]
    assert "there are no test images of 1" in caplog.text
    assert "left out 1 image in" in caplog.text
    assert "labels.csv' does not name: " in caplog.text


def test_classes_that_are_numbers_are_in_their_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = _images(tmp_path)
    rows = [f"{name},{number + 5}" for number, name in enumerate(names)]
    with caplog.at_level("INFO"):
        data = _make(tmp_path, "\n".join([*rows, f"./{names[0]},5"]))
    assert data.class_names == ["5", "6", "7", "8", "9", "10", "11", "12"]
    assert "ignored 1 duplicate row of" in caplog.text


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10", "9", "1", "01", "001", "0001", "00001"], ["00001", "0001", "001", "01", "1", "9", "10"]),
        (["²", "10", "9"], ["10", "9", "²"]),  # a superscript is no number
    ],
)
def test_the_order_of_classes_is_one_whatever_the_order_of_rows(names: list[str], order: list[str]) -> None:
    assert class_names([Row(f"{name}.png", name, None) for name in names]) == order


def test_lines_without_cells_and_spaces_before_quotes_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text('a.png, "hot dog, large", validation\n,,\n"b.png",cat,train\n')
    rows = read_labels(tmp_path / "labels.csv", tmp_path)
    assert rows == [Row("a.png", "hot dog, large", "val"), Row("b.png", "cat", "train")]


@pytest.mark.parametrize("label", ["cat;dog", "cat|dog"])
def test_several_labels_in_a_cell_are_refused(label: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(f"a.png,{label}\nb.png,cat\n")
    with pytest.raises(ValueError, match="expected one label in line 1 of .*; multi-label images are not supported"):
        read_labels(tmp_path / "labels.csv", tmp_path)


def test_a_path_may_be_written_in_any_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = _images(tmp_path / "images")
    (tmp_path / "link").symlink_to(tmp_path / "images")
    write_image(tmp_path / "outside.png", 8)
    rows = [f"{name},{number % 2}" for number, name in enumerate(names)]
    again = [f"{tmp_path}/images/{names[0]}", f"{tmp_path}/link/{names[2]}", f"../images/deeper/../{names[4]}"]
    rows += [f"{path},0" for path in [*again, "../outside.png", f"{tmp_path}/outside.png"]]
    splits = []
    for root, folder in (("images", tmp_path), (".", tmp_path / "images"), ("link", tmp_path), ("link/.", tmp_path)):
        monkeypatch.chdir(folder)
        caplog.clear()
        with caplog.at_level("INFO"):
            data = _make(Path(root), "\n".join(rows), test_fraction=0.25)
            data.setup("fit")
        splits.append([sorted(_read(data, split)) for split in ("train", "val", "test")])
        assert sorted(number for part in splits[-1] for number, _ in part) == list(range(9))
        assert "ignored 4 duplicate rows of" in caplog.text
        assert "does not name" not in caplog.text
    assert all(other == splits[0] for other in splits)
    for path in (f"{tmp_path}/images/{names[0]}", f"{tmp_path}/link/{names[0]}", f"../images/{names[0]}"):
        with pytest.raises(ValueError, match=rf"has 00.png with the labels '0' and 'b'; {MULTI} images are not"):
            _make(tmp_path / "images", "\n".join([*rows, f"{path},b"]))
    with pytest.raises(ValueError, match=r"has .*/outside.png with the labels '0' and 'b'"):
        _make(tmp_path / "images", "\n".join([*rows, "../images/../outside.png,b"]))


def test_the_file_may_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(f"{name},{number % 2}" for number, name in enumerate(_images(tmp_path / "images")))
    (tmp_path / "labels.csv").write_text(text)
    monkeypatch.chdir(tmp_path)
    for labels in ("labels.csv", str(tmp_path / "labels.csv")):
        assert ImageFolder("images", labels=labels).num_classes == 2
    (tmp_path / "images" / "labels.csv").write_text("00.png,a\n")
    with pytest.raises(ValueError, match="there are two files 'labels.csv', in 'images' and in the working direc"):
        ImageFolder("images", labels="labels.csv")
    with pytest.raises(FileNotFoundError, match="no file 'none.csv', in 'images' or the working directory; expect"):
        ImageFolder("images", labels="none.csv")
    with pytest.raises(FileNotFoundError, match="no folder 'nowhere'; expected one with the images that 'labels.csv'"):
        ImageFolder("nowhere", labels="labels.csv")
    with pytest.raises(ValueError, match="expected folders or labels, got both; labels gives the splits in its column"):
        ImageFolder("images", labels="labels.csv", folders={"train": "a"})


MULTI = r"\(?multi-label"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "00.png;a\ndeeper/01.png;b",
            "expected commas between the columns of '.*labels.csv', got semicolons; expected",
        ),
        ("00.png\ta\ndeeper/01.png\tb", "expected commas between the columns of .*, got tabs; expected path,label"),
        ("00.png\ndeeper/01.png", "expected commas between the columns of .*, got none"),
        ("", "labels.csv' has no rows; expected path,label"),
        ("path,label\n", "labels.csv' has no rows"),
        ("path,cat,dog\n00.png,0,1", rf"expected one column label in .*, got path, cat, dog; a column for .* {MULTI}"),
        ("path,label,label\n00.png,a,b", rf"expected one column label in .*, got path, label, label; .* {MULTI}"),
        (
            "image,path,label\n0,00.png,a",
            "expected one column path in '.*labels.csv', got image and path, each of which could be it; rename all but",
        ),
        ("path,split,label,split\n00.png,train,a,val", "expected one column split in .*, got split and split, each of"),
        ("path,label,Class\n00.png,3,cat", "expected one column label in .*, got label and Class, each of which could"),
        ("00.png,a\n00.png,b", rf"has 00.png with the labels 'a' and 'b'; {MULTI} images are not supported"),
        (
            "a,00.png\na,deeper/01.png\nb,02.png",
            "expected path,label in .*, got images as labels, such as '00.png' of the path 'a'; the columns may be sw",
        ),
        ("path,label,split\na,00.png,train\nb,02.png,val", "expected path,label in .*; the columns may be swapped"),
        ("00.png,a|b\ndeeper/01.png,b", rf"expected one label in line 1 of .*, got 'a\|b'; {MULTI} images are not"),
        ('00.png,a\n02.png,b\ndeeper/01.png,"a, b"', rf"expected one label a row in .*, got 'a, b'; {MULTI}"),
        ('00.png,"a,b"\n02.png,"a,c"\ndeeper/01.png,"c, b"', rf"expected one label a row in .*, got 'a,b'; {MULTI}"),
        ("00.png,a\ndeeper/01.png,a,b", rf"expected 2 columns in line 2 of .*, got 'deeper/01.png,a,b'; .* {MULTI}"),
        ("00.png,a,b\ndeeper/01.png,a,", rf"expected a split train, val or test in line 1 .*, got 'b'; .* {MULTI}"),
        ("00.png,a,b,c", rf"expected a first line of .* that names path and label among its 4 columns, .* {MULTI}"),
        ("00.png,a,train\n00.png,a,val", "has 00.png in train and in val; give it one split"),
        ("00.png,a,train\ndeeper/01.png,b,", "expected a split in every row of .* or in none"),
        ("00.png,a\ndeeper/01.png", "expected path,label in line 2 of .*, got 'deeper/01.png'"),
        ("00.png,a\ndeeper/01.png,", "expected a path and a label in line 2 of .*, got 'deeper/01.png,'"),
        ("00.png,a\ndeeper/01.png,a", r"expected labels of at least two classes in .*, got \['a'\]"),
        ("00.png,a,val\ndeeper/01.png,b,val", r"expected labels of at least two classes .*, got \[\]"),
        (
            "00.png,a,train\ndeeper/01.png,b,train\n02.png,c,val",
            r"classes of train in val; it lacks .* has also \['c'\]",
        ),
        (
            "00.png,a\ngone.png,b",
            "1 of 2 files that .* names do not exist: .*gone.png; expected paths relative to root$",
        ),
        ("id,breed\n00.png,a", "1 of 2 files that .* do not exist: .*id; .*; a first line that names the columns must"),
    ],
)
def test_tables_that_cannot_be(text: str, message: str, tmp_path: Path) -> None:
    _images(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _make(tmp_path, text).setup("fit")


def test_a_table_in_another_encoding(tmp_path: Path) -> None:
    _images(tmp_path)
    (tmp_path / "labels.csv").write_bytes("00.png,Gänse\n".encode("latin-1"))
    with pytest.raises(ValueError, match="expected '.*labels.csv' to be text in UTF-8: invalid .* at byte 8"):
        ImageFolder(str(tmp_path), labels="labels.csv")


def test_files_that_are_missing_or_broken_can_be_left_out(tmp_path: Path) -> None:
    names = _images(tmp_path)
    text = "\n".join(f"{name},{number % 2}" for number, name in enumerate([*names, "gone.png"]))
    (tmp_path / names[3]).write_bytes(b"x")
    data = _make(tmp_path, text, skip_broken=True, val_fraction=0.0)
    with pytest.warns(UserWarning, match="left out 2 files that cannot be read as images: .*03.png, .*gone.png"):
        data.setup("fit")
    assert sorted(number for number, _ in _read(data, "train")) == [0, 1, 2, 4, 5, 6, 7]

"""Datamodules of image files that workers decode: the base class, and `ImageFolder` for your own images."""

from __future__ import annotations

import os
from abc import ABC
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from .decoding import CENTRE, LOOKED_AT, Decoding, centre_seen
from .images import Labelled, broken_files, decode_all
from .indexed import PARTS, IndexedImages
from .labels import PART_OF, Row, class_names, read_labels
from .listing import Found, counted, holds_images, is_hidden, is_image, same_content, some

# Photographs have similar statistics, and most pre-trained networks expect those of ImageNet.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Largest number of images that are searched for duplicates, which takes seconds; for more it would take minutes.
_MOST_COMPARED = 100_000


class FileDataModule(IndexedImages, ABC):
    """Images in files of any size, decoded to RGB. Abstract.

    Training cuts a random crop out of the whole image while decoding it. Evaluation takes the middle 7/8 of the shorter
    side, as in the usual 224 of 256 pixels, or all of it if the training images have the size already. Images
    are turned upright by their EXIF orientation. Mean and standard deviation are those of the training of the model's
    timm network (``normalize``), and ImageNet's with another model.

    Args:
        num_classes: Number of classes ``K``.
        image_size: Side ``S`` of the images in batches.
        in_memory: Decode every image once, as for evaluation, into one uint8 tensor; random crops are then cut out of
            these. ``device_cache`` does this too, on the device.
        value_range: The values of black and white in grey files of more than 8 bits per pixel: [0, 4095] for 12 bits in
            16-bit files, [-1000, 3000] for some Hounsfield units. None is the range that each file states: a TIFF's
            SMinSampleValue and SMaxSampleValue or its bits per sample, and otherwise all 16 bits; images that would be
            nearly black then, 32-bit integers and floating-point numbers are refused.
    """

    knows_statistics = False

    def __init__(
        self,
        num_classes: int,
        image_size: int = 224,
        in_memory: bool = False,
        value_range: tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, (3, image_size, image_size), IMAGENET_MEAN, IMAGENET_STD, **kwargs)
        self.in_memory = in_memory
        self.decoding = Decoding(value_range=value_range, centre=CENTRE)

    def hold(self, part: Labelled) -> Labelled:
        """The part with its paths, or with decoded images if they are held in memory."""
        held = self.in_memory or self.device_cache
        return decode_all(part, self.input_size[1], self.decoding) if held else part

    def _few_labels(self, train: Labelled) -> Labelled:
        """The labelled images, of which the share that evaluation uses does not depend: all training images tell it."""
        if not train.in_memory:
            looked_at = train.balanced().take(np.arange(min(len(train), LOOKED_AT))).paths
            self.decoding = replace(self.decoding, centre=centre_seen(looked_at, self.input_size[1]))
        return super()._few_labels(train)


class ImageFolder(FileDataModule):
    """Your own images: ``ROOT/train/CLASS/*.jpg``, ``ROOT/val/CLASS/*.jpg`` and, if there is one, ``ROOT/test/...``.

    These folders may be named in any case, and val also valid or validation; images in further folders beside them are
    left out, with a warning. Without such folders, ``ROOT/CLASS/*.jpg`` are split, always in the same way:
    ``test_fraction`` for testing, and ``val_fraction`` of the rest for validation. Which split an image belongs to
    depends on its path below ROOT: images that are added or removed move no other to another split, but for at most one
    a class and split, by rounding. With ``labels`` a CSV file gives the class of each image, which may lie anywhere
    below ROOT.

    Image files are recognised by the suffixes of Pillow's picture formats (jpg, png, gif, webp, avif, tif and others);
    links to folders are followed. Hidden files and folders below ROOT are ignored: names that start with a dot, and
    folders such as ``__MACOSX``. The numbers of files left out and of identical files in two splits are reported. A
    class may be missing in val and test. A test split that cannot be used is reported, and refused only when it is
    requested.

        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for n in range(12):
        ...     (root / ("cat", "dog")[n % 2]).mkdir(exist_ok=True)
        ...     Image.new("RGB", (40, 40), (20 * n, 0, 0)).save(root / ("cat", "dog")[n % 2] / f"{n}.png")
        >>> data = ImageFolder(str(root), image_size=32, batch_size=4, val_fraction=0.2, num_workers=0)
        >>> data.setup("fit")
        >>> data.class_names, next(iter(data.train_dataloader()))[0].shape
        (['cat', 'dog'], torch.Size([4, 3, 32, 32]))

    Args:
        root: The folder.
        folders: The folder in ``root`` of each split; None is train, val (or valid, validation) and test, in any case,
            as far as they exist. For ImageNet, whose val is commonly used for testing, give ``{train: train, test:
            val}``; validation images are then split off train. Where train is the name of a class, ``{train: .}``
            takes every folder in ``root`` for a class, but for those of the other splits.
        labels: A CSV file in ``root`` or elsewhere, with comma-separated columns: path relative to ``root``, label, and
            optionally the split (train, val or test). A first line may name the columns, in any order and among others:
            ``path`` (or file, filename, file_name, image), ``label`` (or class), ``split``. Each image has one label.
            Without a split column, images are split as from one folder.
        test_fraction: Share of each class that is split off for testing if there is no test folder.
        skip_broken: Leave out image files that cannot be decoded, after trying every file at the start, also for
            prediction; otherwise an error names such a file when it is read. The command line's predict gives it a row
            with its error either way.

    Attributes:
        refused: Why there is no test part although there are images for it, after `setup`: ``{"test": error}``.

    Raises:
        ValueError: There are fewer than two classes, splits with other classes than train, or files that are no images.
        FileNotFoundError: A folder or a file is missing, or a class is empty.
    """

    def __init__(
        self,
        root: str,
        folders: dict[str, str] | None = None,
        labels: str | None = None,
        test_fraction: float = 0.0,
        skip_broken: bool = False,
        **kwargs: Any,
    ) -> None:
        if not 0 <= test_fraction < 1:
            raise ValueError(f"expected test_fraction in [0, 1), got {test_fraction}")
        if labels is not None and folders is not None:
            raise ValueError("expected folders or labels, got both; labels gives the splits in its column split")
        self.root = Path(root)
        self._table: list[Row] = []
        self._folders: dict[str, Path] = {}
        if labels is not None:
            self._labels = _label_file(self.root, labels)
            self._table = read_labels(self._labels, self.root)
            names = class_names([row for row in self._table if row.part in (None, "train")])
            if len(names) < 2:
                raise ValueError(f"expected labels of at least two classes in {str(self._labels)!r}, got {names}")
        else:
            self._folders = _part_folders(self.root, folders)
            names = self._classes_of("train")
            _check_classes(self.root, self._folders["train"], names)
        self.test_fraction = test_fraction
        self.skip_broken = skip_broken
        self.refused: dict[str, Exception] = {}
        super().__init__(num_classes=len(names), **kwargs)
        self.class_names = names

    def parts(self) -> dict[str, Labelled]:
        """The parts that have folders or a split in the CSV file, and the test part if it is split off."""
        if self._table:
            self._check_paths()
        parts, self.refused = {}, {}
        for name in (part for part in PARTS if part in self._part_names()):
            try:
                parts[name] = self._labelled(name)
            except (ValueError, FileNotFoundError) as error:
                if name != "test":
                    raise
                self.refused[name] = error
                rank_zero_warn(f"there is no test part: {error}")
        if self.test_fraction and "test" not in self._part_names():
            parts |= self._split(parts["train"], {"test": self.test_fraction})
        return parts

    def _names(self, part: Labelled) -> list[str]:
        """Paths below the root, wherever that is."""
        root = os.path.join(str(self.root), "")
        return [path.removeprefix(root).replace(os.sep, "/") for path in part.paths]

    def _part_names(self) -> set[str]:
        return {row.part or "train" for row in self._table} or set(self._folders)

    def _labelled(self, name: str) -> Labelled:
        """The files of a part and their labels, without files that are left out."""
        found = self._rows(name) if self._table else self._files_of(name)
        lacking = sorted(set(self.class_names) - {cls for _, cls in found})
        further = sorted({cls for _, cls in found} - set(self.class_names))
        if further:
            raise ValueError(f"expected the classes of train in {name}; it lacks {lacking} and has also {further}")
        if self.skip_broken and (broken := set(broken_files([path for path, _ in found], self.decoding))):
            listed = some(sorted(broken))
            rank_zero_warn(f"left out {counted(len(broken), 'file')} that cannot be read as images: {listed}")
            found = [(path, cls) for path, cls in found if path not in broken]
        counts = Counter(cls for _, cls in found)
        where = repr(str(self._labels if self._table else self._folders[name]))
        if not found:
            raise FileNotFoundError(f"no images in the {name} part of {where}; add some, or remove the part")
        if name == "train" and (empty := [cls for cls in self.class_names if not counts[cls]]):
            raise FileNotFoundError(f"no images of {some(empty)} in {where}; add some, or remove the class")
        numbers = {cls: label for label, cls in enumerate(self.class_names)}
        return Labelled.all([path for path, _ in found], [numbers[cls] for _, cls in found])

    def _classes_of(self, name: str) -> list[str]:
        """Names of the folders in a part's folder, but for the folders of other parts."""
        here = self._folders[name]
        others = {part: folder.resolve() for part, folder in self._folders.items() if part != name}
        classes = {cls: (here / cls).resolve() for cls in _class_folders(here)}
        for cls, home in classes.items():
            if inside := [part for part, folder in others.items() if home in folder.parents]:
                raise ValueError(
                    f"expected no split in a class folder of another, got {inside[0]} in {cls} of {name}, with whose "
                    f"images it would count; move {inside[0]} out of {str(here)!r}"
                )
        return [cls for cls, home in classes.items() if home not in others.values()]

    def _files_of(self, name: str) -> list[tuple[str, str]]:
        """Path and class of the images in a part's folders."""
        folder, found, rows = self._folders[name], Found(), []
        for cls in self._classes_of(name):
            before = len(found.images)
            found.add(folder / cls)
            rows += [(path, cls) for path in found.images[before:]]
            if len(found.images) == before and cls not in self.class_names:
                rank_zero_info(f"left out the folder {cls} of {name}, which is empty and not a class of train")
        found.report(repr(str(folder)), warn=True)
        if stray := [path.name for path in folder.iterdir() if is_image(path.name) and not is_hidden(path.name)]:
            images = counted(len(stray), "image")
            rank_zero_warn(f"left out {images} of {str(folder)!r} in no class folder: {some(stray)}")
        return rows

    def _rows(self, name: str) -> list[tuple[str, str]]:
        """Path and class of the rows of a part."""
        return [(str(self.root / row.path), row.label) for row in self._table if (row.part or "train") == name]

    def _check_paths(self) -> None:
        """Refuse rows without a file, and report how many images have no row."""
        paths = [str(self.root / row.path) for row in self._table]
        missing = [] if self.skip_broken else [path for path in paths if not os.path.exists(path)]
        if missing:
            first = "; a first line that names the columns must name path and label" if missing[0] == paths[0] else ""
            raise FileNotFoundError(
                f"{len(missing)} of {len(paths)} files that {str(self._labels)!r} names do not exist: {some(missing)}; "
                f"expected paths relative to root{first}"
            )
        _count_images_without_row(self.root, set(map(os.path.normpath, paths)), str(self._labels))

    def _readable(self, paths: list[str]) -> list[str]:
        if not self.skip_broken or self.mark_broken:
            return paths
        if broken := set(broken_files(paths, self.decoding)):
            files = counted(len(broken), "file")
            rank_zero_warn(f"left out {files} that cannot be read as images: {some(sorted(broken))}")
        return [path for path in paths if path not in broken]

    def _held(self, parts: dict[str, Labelled]) -> dict[str, Labelled]:
        if (count := sum(map(len, parts.values()))) <= _MOST_COMPARED:
            _warn_of_repeated_images(parts, self.class_names)
        else:
            rank_zero_info(f"did not search for identical images in two splits, since there are {count} images")
        return super()._held(parts)

    def _part(self, name: str) -> Labelled:
        if name in self.refused:
            raise self.refused[name]
        return super()._part(name)


def _part_folders(root: Path, folders: dict[str, str] | None) -> dict[str, Path]:
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {str(root)!r}; expected one with train/CLASS/ and val/CLASS/, or CLASS/")
    if folders is None:
        return _folders_by_name(root) or {"train": root}
    if "train" not in folders or not set(folders) <= set(PARTS):
        raise ValueError(f"expected folders to name train and optionally val and test, got {', '.join(folders)}")
    missing = [str(root / folder) for folder in folders.values() if not (root / folder).is_dir()]
    if missing:
        raise FileNotFoundError(f"no folder {', '.join(missing)}; correct folders={folders}")
    return {part: root / folder for part, folder in folders.items()}


def _folders_by_name(root: Path) -> dict[str, Path]:
    """The folders in root whose names are words for parts, if there are any; others with images are reported."""
    there, where = _class_folders(root), repr(str(root))
    named: dict[str, list[str]] = defaultdict(list)
    for name in there:
        named[PART_OF.get(name.lower(), "")].append(name)
    others = named.pop("", [])
    for part, names in named.items():
        if len(names) > 1:
            raise ValueError(
                f"expected one folder of {part} images in {where}, got {' and '.join(names)}; join them, or name the "
                "folders: folders={train: ..., val: ...}"
            )
    found = {part: names[0] for part, names in named.items()}
    if found and "train" not in found:
        raise FileNotFoundError(
            f"expected a folder train beside {', '.join(found.values())} in {where}, got {', '.join(there)}; "
            "rename it, or name the folders: folders={train: ..., val: ...}, or folders={train: .} if all are classes"
        )
    if found and (further := [name for name in others if holds_images(root / name)]):
        rank_zero_warn(
            f"left out {counted(len(further), 'folder')} with images of {where} beside {', '.join(found.values())}: "
            f"{some(further)}; to use them, name the folders: folders={{train: ..., val: ..., test: ...}}"
        )
    return {part: root / name for part, name in found.items()}


def _check_classes(root: Path, where: Path, names: list[str]) -> None:
    """Refuse too few class folders, and those that are no classes but splits, of other names or a level deeper."""
    if names and {name.lower() for name in names} <= {*PART_OF, "training", "testing"}:
        raise ValueError(
            f"expected a folder for each class in {str(where)!r}, got {', '.join(names)}, which are words for splits; "
            "name the folders: folders={train: ..., val: ..., test: ...}"
        )
    if unreadable := [name for name in names if name.encode(errors="ignore").decode() != name]:
        raise ValueError(
            f"expected names of classes in UTF-8 in {str(where)!r}, got the folder {unreadable[0]!r}; rename it"
        )
    if len(names) < 2:
        hint = f"; if {where.name} is a class itself, give folders={{train: .}}" if not names and where != root else ""
        raise ValueError(f"expected a folder for each of at least two classes in {str(where)!r}, got {names}{hint}")


def _class_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def _label_file(root: Path, labels: str) -> Path:
    """The file in root, or relative to the working directory."""
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {str(root)!r}; expected one with the images that {labels!r} names")
    there = [path for path in (root / labels, Path(labels)) if path.is_file()]
    if not there:
        raise FileNotFoundError(
            f"no file {labels!r}, in {str(root)!r} or the working directory; expected a CSV file path,label"
        )
    if len(there) == 2 and not there[0].samefile(there[1]):
        raise ValueError(
            f"there are two files {labels!r}, in {str(root)!r} and in the working directory; give an absolute path"
        )
    return there[0]


@rank_zero_only
def _count_images_without_row(root: Path, named: set[str], labels: str) -> None:
    further = [path for path in Found().add(root).images if os.path.normpath(path) not in named]
    if further:
        rank_zero_info(
            f"left out {counted(len(further), 'image')} in {str(root)!r} that {labels!r} does not name: {some(further)}"
        )


@rank_zero_only
def _warn_of_repeated_images(parts: dict[str, Labelled], class_names: list[str]) -> None:
    """Warn of images that occur in two parts, or in two classes, byte for byte."""
    homes: dict[str, set[str]] = defaultdict(set)
    labels: dict[str, set[int]] = defaultdict(set)
    for name, part in parts.items():
        for path, label in part.samples:
            homes[path].add(name)
            labels[path].add(label)

    def differ(group: list[str]) -> bool:
        return any(len(set().union(*(of[path] for path in group))) > 1 for of in (homes, labels))

    groups = [*same_content(homes, differ), *([path] for path in homes if differ([path]))]
    for name, others in (("val", ("train",)), ("test", ("train", "val"))):
        for other in others:
            if twins := _twins(groups, homes, name, other):
                path, twin = next(iter(twins.items()))
                same = path == twin
                seen = path if same else f"{path} and {twin}"
                fix = "leave each image in one split" if same else "remove one of each pair"
                rank_zero_warn(
                    f"{len(twins)} of {len(parts[name])} {name} images are in {other} too, byte for byte, as {seen}: "
                    f"results on {name} are too good; {fix}"
                )
    torn = [group for group in groups if len(set().union(*(labels[path] for path in group))) > 1]
    if torn:
        names = some(sorted({class_names[label] for path in torn[0] for label in labels[path]}))
        images = counted(len(torn), "image")
        rank_zero_warn(f"{images} in several classes, byte for byte, as {torn[0][0]} is in {names}")


def _twins(groups: list[list[str]], homes: dict[str, set[str]], name: str, other: str) -> dict[str, str]:
    """The images of a part that are in another part too, each once, and an image there with the same bytes."""
    twins: dict[str, str] = {}
    for group in groups:
        there = [path for path in group if other in homes[path]]
        twins |= {path: there[0] for path in group if name in homes[path] and there}
    return twins

"""Datamodules whose images are files, decoded by workers: of one's own folders, and of the sets torchvision reads."""

from __future__ import annotations

import os
from abc import ABC
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from .base import SPLIT_SEED, ImageDataModule
from .images import CENTRE, Labelled, broken_files, centre_seen, decode_all
from .splits import split_indices

# Photographs are much alike in this, and ImageNet's statistics are what most pre-trained networks expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_PARTS = ("train", "val", "test")
# So many files of a part are looked at to see whether all have the size that is wanted already.
_LOOKED_AT = 8


class FileDataModule(ImageDataModule, ABC):
    """Images in files of any size, decoded to RGB. Abstract.

    For training a random crop is cut out of the whole image while it is decoded. For evaluation the middle 7/8 of its
    shorter side are taken, as in the usual 224 of 256 pixels, or all of an image that has the size already. The data's
    mean and standard deviation are taken to be ImageNet's.

    Args:
        num_classes: Number of classes ``K``.
        image_size: Side ``S`` of the images in batches.
        in_memory: Decode every image once, for evaluation, and hold them as one uint8 tensor; random crops are then
            cut out of those. ``device_cache`` does this too, on the device.
    """

    def __init__(self, num_classes: int, image_size: int = 224, in_memory: bool = False, **kwargs: Any) -> None:
        super().__init__(num_classes, (3, image_size, image_size), IMAGENET_MEAN, IMAGENET_STD, **kwargs)
        self.in_memory = in_memory
        self.centre = CENTRE

    def hold(self, part: Labelled) -> Labelled:
        """The part's paths, or its images if they are to be in memory."""
        if len(part) and not part.in_memory:
            self.centre = centre_seen(part.take(np.arange(min(len(part), _LOOKED_AT))).paths, self.input_size[1])
        return decode_all(part, self.input_size[1]) if self.in_memory or self.device_cache else part


class ImageFolder(FileDataModule):
    """Your own images: ``ROOT/train/CLASS/*.jpg``, ``ROOT/val/CLASS/*.jpg`` and, if there is one, ``ROOT/test/...``.

    Without such folders, ``ROOT/CLASS/*.jpg`` are cut into parts, always the same: ``test_fraction``, and of the rest
    ``val_fraction``. Hidden files are ignored.

    Args:
        root: The folder.
        folders: Which folder in ``root`` is which part; None is train, val and test, as far as they exist. ImageNet,
            whose val is what everyone tests on, is ``{train: train, test: val}``, with validation cut off train.
        test_fraction: Share of each class that is cut off for testing where no folder is the test part.
        skip_broken: Leave out files that are no images or cannot be decoded, after trying every one at the start;
            otherwise they are refused by name.

    Raises:
        ValueError: There are fewer than two classes, parts with different ones, or files that are no images.
        FileNotFoundError: A folder is missing, or a class is empty.
    """

    def __init__(
        self,
        root: str,
        folders: dict[str, str] | None = None,
        test_fraction: float = 0.0,
        skip_broken: bool = False,
        **kwargs: Any,
    ) -> None:
        if not 0 <= test_fraction < 1:
            raise ValueError(f"expected test_fraction in [0, 1), got {test_fraction}")
        self._folders = _part_folders(Path(root), folders)
        self.test_fraction = test_fraction
        self.skip_broken = skip_broken
        names = {part: _class_names(folder) for part, folder in self._folders.items()}
        _check_same_classes(names)
        super().__init__(num_classes=len(names["train"]), **kwargs)
        self.class_names = names["train"]

    def parts(self) -> dict[str, Labelled]:
        """The parts that have folders, and the test part if it is cut off."""
        parts = {
            name: _read_folder(folder, self.class_names, self.skip_broken) for name, folder in self._folders.items()
        }
        if self.test_fraction and "test" not in parts:
            cut = split_indices(parts["train"].own_labels, {"test": self.test_fraction}, SPLIT_SEED)
            parts |= {name: parts["train"].take(indices) for name, indices in cut.items()}
        return parts


def _part_folders(root: Path, folders: dict[str, str] | None) -> dict[str, Path]:
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {str(root)!r}; expected one with train/CLASS/ and val/CLASS/, or CLASS/")
    if folders is None:
        found = {part: root / part for part in _PARTS if (root / part).is_dir()}
        if found and "train" not in found:
            there = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir()))
            raise FileNotFoundError(
                f"expected a folder train beside {', '.join(found)} in {str(root)!r}, got {there}; "
                "rename it, or name the folders: folders={train: ..., val: ...}"
            )
        return found or {"train": root}
    if "train" not in folders or not set(folders) <= set(_PARTS):
        raise ValueError(f"expected folders to name train, and val and test if wanted, got {', '.join(folders)}")
    missing = [str(root / folder) for folder in folders.values() if not (root / folder).is_dir()]
    if missing:
        raise FileNotFoundError(f"no folder {', '.join(missing)}; mend folders={folders}")
    return {part: root / folder for part, folder in folders.items()}


def _class_names(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(names) < 2:
        raise ValueError(f"expected a folder for each of at least two classes in {str(folder)!r}, got {names}")
    return names


def _check_same_classes(names: dict[str, list[str]]) -> None:
    for part, own in names.items():
        if own != names["train"]:
            lacking, further = sorted(set(names["train"]) - set(own)), sorted(set(own) - set(names["train"]))
            raise ValueError(f"expected the classes of train in {part}; it lacks {lacking} and has also {further}")


def _read_folder(folder: Path, class_names: list[str], skip_broken: bool) -> Labelled:
    numbers = {name: label for label, name in enumerate(class_names)}
    found = datasets.DatasetFolder.make_dataset(
        str(folder), numbers, is_valid_file=lambda path: not os.path.basename(path).startswith(".")
    )
    paths = [path for path, _ in found]
    if skip_broken:
        left_out = broken_files(paths)
    else:
        left_out = [path for path in paths if not path.lower().endswith(IMG_EXTENSIONS)]
    if left_out:
        listed = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        if not skip_broken:
            raise ValueError(f"{len(left_out)} files are no images: {listed}; remove them, or give skip_broken=true")
        rank_zero_warn(f"left out {len(left_out)} files that cannot be read as images: {listed}")
    spared = set(left_out)
    kept = [(path, label) for path, label in found if path not in spared]
    counts = Counter(label for _, label in kept)
    if empty := [name for label, name in enumerate(class_names) if not counts[label]]:
        raise FileNotFoundError(f"no images of {', '.join(empty)} in {str(folder)!r}")
    return Labelled.all([path for path, _ in kept], [label for _, label in kept])

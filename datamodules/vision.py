"""The public data sets of the paper and similar ones, read and downloaded by torchvision.

Legend: ``N`` images, ``C`` channels, ``H W`` height and width.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torchvision import datasets

from .files import FileDataModule
from .images import Labelled
from .indexed import IndexedImages


@dataclass(frozen=True)
class Source:
    """A data set of torchvision.

    Args:
        reader: torchvision's class.
        root: Folder of data sets.
        folder: The data set's folder in it.
        parts: Arguments of the reader for each split.
        download: Whether it may be downloaded.

    Raises:
        FileNotFoundError: The data set is missing and may not be downloaded.
    """

    reader: Callable[..., Any]
    root: str
    folder: str
    parts: dict[str, dict[str, Any]]
    download: bool

    def __post_init__(self) -> None:
        if not self.download and not (Path(self.root) / self.folder).is_dir():
            raise FileNotFoundError(f"no folder {str(Path(self.root) / self.folder)!r}; {self._remedy()}")

    def fetch(self) -> None:
        """Download missing files, if that is allowed."""
        if self.download:
            try:
                for arguments in self.parts.values():
                    self.reader(self.root, download=True, **arguments)
            except OSError as error:
                raise OSError(f"cannot download {self.folder} to {self.root!r}: {error}") from error

    def read(self) -> dict[str, Any]:
        """The data set of each split."""
        try:
            return {part: self.reader(self.root, **arguments) for part, arguments in self.parts.items()}
        except (RuntimeError, FileNotFoundError) as error:
            where = str(Path(self.root) / self.folder)
            raise FileNotFoundError(f"{where!r} is not complete ({error}); {self._remedy()}") from error

    def _remedy(self) -> str:
        name = getattr(self.reader, "__name__", "data set")
        return f"give the root in which torchvision's {name} lies, or download=true to fetch it there"


class _InMemory(IndexedImages, ABC):
    """Data sets of which torchvision reads all images of a split into one array, as of CIFAR."""

    def __init__(self, source: Source, **kwargs: Any) -> None:
        super().__init__(input_size=(3, 32, 32), **kwargs)
        self.source = source

    def prepare_data(self) -> None:
        """Download the data, if asked to."""
        self.source.fetch()

    def parts(self) -> dict[str, Labelled]:
        """The official parts."""
        found = self.source.read()
        self.class_names = list(found["train"].classes)
        parts = {}
        for name in list(found):
            dataset = found.pop(name)  # frees one array before the next is copied
            images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
            parts[name] = Labelled.all(images, dataset.targets)
        return parts


class _Files(FileDataModule, ABC):
    """Data sets of which torchvision has paths and labels."""

    def __init__(self, source: Source, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.source = source

    def prepare_data(self) -> None:
        """Download the data, if asked to."""
        self.source.fetch()

    def parts(self) -> dict[str, Labelled]:
        """The official parts."""
        found = self.source.read()
        self.class_names = list(getattr(found["train"], "classes", self.class_names))
        return {name: Labelled.all(*_paths_and_labels(dataset)) for name, dataset in found.items()}


def _paths_and_labels(dataset: Any) -> tuple[list[Any], list[int]]:
    """Paths and labels of torchvision's data sets of files, which it stores under three different names."""
    if hasattr(dataset, "_samples"):
        return [path for path, _ in dataset._samples], [label for _, label in dataset._samples]
    return dataset._images if hasattr(dataset, "_images") else dataset._image_files, dataset._labels


_TRAIN_TEST: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}


def _splits(*names: str, **arguments: Any) -> dict[str, dict[str, Any]]:
    return {"train" if name == "trainval" else name: {"split": name, **arguments} for name in names}


class CIFAR10(_InMemory):
    """60,000 images of 10 classes, 32x32 pixels (Krizhevsky 2009): 50,000 for training, 10,000 for testing.

    Args:
        root: Folder that holds ``cifar-10-batches-py``.
        download: Download it there if it is missing.
    """

    def __init__(self, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        source = Source(datasets.CIFAR10, root, "cifar-10-batches-py", _TRAIN_TEST, download)
        mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
        super().__init__(source, num_classes=10, data_mean=mean, data_std=std, **kwargs)


class CIFAR100(_InMemory):
    """60,000 images of 100 classes, 32x32 pixels (Krizhevsky 2009): 50,000 for training, 10,000 for testing.

    Args:
        root: Folder that holds ``cifar-100-python``.
        download: Download it there if it is missing.
    """

    def __init__(self, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        source = Source(datasets.CIFAR100, root, "cifar-100-python", _TRAIN_TEST, download)
        mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
        super().__init__(source, num_classes=100, data_mean=mean, data_std=std, **kwargs)


class Aircraft(_Files):
    """FGVC-Aircraft (Maji et al. 2013): 10,000 photographs of aircraft, a third each to train, validate and test.

    The banner at the bottom of each photograph, 20 pixels with its author's name, is cut off, as the authors of the
    set ask; files that `predict_files` finds are taken to have none.

    Args:
        root: Folder that holds ``fgvc-aircraft-2013b``.
        level: What a class is: one of 100 variants, 70 families or 30 manufacturers.
        download: Download it there if it is missing.
    """

    def __init__(
        self,
        root: str = "data",
        level: Literal["variant", "family", "manufacturer"] = "variant",
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        parts = _splits("train", "val", "test", annotation_level=level)
        source = Source(datasets.FGVCAircraft, root, "fgvc-aircraft-2013b", parts, download)
        num_classes = {"variant": 100, "family": 70, "manufacturer": 30}[level]
        super().__init__(source, num_classes=num_classes, **kwargs)
        self.decoding = replace(self.decoding, banner=20)


class DTD(_Files):
    """Describable Textures (Cimpoi et al. 2014): 47 textures, 40 images of each to train, to validate and to test.

    Args:
        root: Folder that holds ``dtd``.
        partition: Which of the ten official splits, 1..10.
        download: Download it there if it is missing.

    Raises:
        ValueError: There is no such partition.
    """

    def __init__(self, root: str = "data", partition: int = 1, download: bool = False, **kwargs: Any) -> None:
        if not 1 <= partition <= 10:
            raise ValueError(f"expected partition in 1..10, got {partition}")
        source = Source(datasets.DTD, root, "dtd", _splits("train", "val", "test", partition=partition), download)
        super().__init__(source, num_classes=47, **kwargs)


class Pets(_Files):
    """Oxford-IIIT Pet (Parkhi et al. 2012): 37 breeds of cats and dogs; 3,680 images to train, 3,669 to test.

    Args:
        root: Folder that holds ``oxford-iiit-pet``.
        download: Download it there if it is missing.
    """

    def __init__(self, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        source = Source(datasets.OxfordIIITPet, root, "oxford-iiit-pet", _splits("trainval", "test"), download)
        super().__init__(source, num_classes=37, **kwargs)


class Flowers102(_Files):
    """Oxford 102 Flower (Nilsback and Zisserman 2008): 10 images per class to train and to validate, 6,149 to test.

    Args:
        root: Folder that holds ``flowers-102``.
        download: Download it there if it is missing.
    """

    def __init__(self, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        source = Source(datasets.Flowers102, root, "flowers-102", _splits("train", "val", "test"), download)
        super().__init__(source, num_classes=102, **kwargs)


class StanfordCars(_Files):
    """Stanford Cars (Krause et al. 2013): 196 models; 8,144 images to train, 8,041 to test.

    There is no download: its address has gone.

    Args:
        root: Folder that holds ``stanford_cars``.
    """

    def __init__(self, root: str = "data", **kwargs: Any) -> None:
        source = Source(datasets.StanfordCars, root, "stanford_cars", _splits("train", "test"), download=False)
        super().__init__(source, num_classes=196, **kwargs)


class Food101(_Files):
    """Food-101 (Bossard et al. 2014): 750 images of each of 101 dishes to train, 250 to test.

    Args:
        root: Folder that holds ``food-101``.
        download: Download it there if it is missing.
    """

    def __init__(self, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        source = Source(datasets.Food101, root, "food-101", _splits("train", "test"), download)
        super().__init__(source, num_classes=101, **kwargs)

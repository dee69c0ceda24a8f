"""Where images come from: one uint8 tensor, or files that are decoded when they are asked for.

Legend: ``N`` images, ``V`` views, ``C`` channels, ``H W`` height and width, ``S`` side of a decoded image.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from torchvision.datasets.folder import IMG_EXTENSIONS

from .recipes import Recipe, draw_boxes
from .splits import describe_counts

# Of the shorter side of an image that is evaluated this share is seen, about the centre: 224 of 256 pixels.
CENTRE = 0.875
# A JPEG may be decoded at a half, a quarter or an eighth of its size, if this many times the pixels needed are left.
_DECODED_SIDE = 2

Batch = tuple[Tensor, Tensor]
# Makes boxes (top, left, height, width) for an image of a height and a width.
Boxes = Callable[[int, int], list[list[float]]]


class Part(Protocol):
    """What every datamodule needs to know of a part of its images."""

    def __len__(self) -> int: ...

    @property
    def in_memory(self) -> bool:
        """Whether they lie decoded in memory."""

    def describe(self, num_classes: int) -> str:
        """How many there are, for the log."""


@dataclass(frozen=True)
class Labelled:
    """Labelled images of one part of a data set.

    Args:
        images: uint8 images ``(M, C, H, W)``, or the paths of M files.
        labels: Labels of the M, ``(M,)``.
        chosen: Which of the M belong to the part, ``(N,)``.
    """

    images: Tensor | np.ndarray
    labels: np.ndarray
    chosen: np.ndarray

    @staticmethod
    def all(images: Tensor | Sequence[Any], labels: Sequence[int] | np.ndarray) -> Labelled:
        """Images, or paths, all of which belong to the part."""
        # Bytes in one array: a list of a million strings would be copied into every worker as it counts references.
        kept = images if isinstance(images, Tensor) else np.array([os.fsencode(path) for path in images])
        return Labelled(kept, np.asarray(labels, dtype=np.int64), np.arange(len(labels)))

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def in_memory(self) -> bool:
        """Whether the images are held as a tensor."""
        return isinstance(self.images, Tensor)

    def describe(self, num_classes: int) -> str:
        """How many images there are, and how many of a class."""
        return describe_counts(self.own_labels, num_classes)

    @property
    def own_labels(self) -> np.ndarray:
        """Labels of the part, ``(N,)``."""
        return self.labels[self.chosen]

    @property
    def paths(self) -> list[str]:
        """Paths of the part's files."""
        return [os.fsdecode(bytes(path)) for path in np.asarray(self.images)[self.chosen]]

    def take(self, indices: np.ndarray) -> Labelled:
        """Some of the part; the images are shared, not copied."""
        return Labelled(self.images, self.labels, self.chosen[indices])

    def join(self, other: Labelled) -> Labelled:
        """The images of both parts, ours first."""
        labels = np.concatenate([self.own_labels, other.own_labels])
        if isinstance(self.images, Tensor) and isinstance(other.images, Tensor):
            return Labelled.all(torch.cat([part.images[part.chosen] for part in (self, other)]), labels)
        return Labelled.all([*self.paths, *other.paths], labels)


class TensorImages(Dataset[Batch]):
    """Images that are held as one tensor; a batch is taken out of it at once, on the tensor's device."""

    def __init__(self, part: Labelled) -> None:
        assert isinstance(part.images, Tensor)
        self.images = part.images
        self.labels = torch.from_numpy(part.own_labels).to(self.images.device)
        self.chosen = torch.from_numpy(part.chosen).to(self.images.device)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, key: int) -> Batch:
        images, labels = self.__getitems__([key])
        return images[0], labels[0]

    def __getitems__(self, keys: list[int]) -> Batch:
        index = torch.tensor(keys, device=self.images.device) % len(self)
        return self.images.index_select(0, self.chosen[index]), self.labels[index]


class FileImages(Dataset[Batch]):
    """Images that are decoded from files when they are asked for, ``(C, S, S)``.

    Args:
        part: Paths and labels.
        size: Side ``S``.
        recipe: Whose random crops are cut out of the whole image, for training; None is the centre.
        views: Crops an image; more than one make an image ``(V, C, S, S)``.
        seed: Seed of the crops. They depend on it, the epoch and the image, but not on which worker decodes it.
        channels: 3 for colour, 1 for grey.
    """

    def __init__(
        self, part: Labelled, size: int, recipe: Recipe | None = None, views: int = 1, seed: int = 0, channels: int = 3
    ) -> None:
        self.part = part
        self.size = size
        self.channels = channels
        self.recipe = recipe
        self.views = views
        self.seed = seed

    @property
    def samples(self) -> list[tuple[str, int]]:
        """Path and label of each image, as torchvision's folders have them."""
        return list(zip(self.part.paths, self.part.own_labels.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.part.chosen)

    def __getitem__(self, key: int) -> Batch:
        epoch, index = divmod(key, len(self))
        row = self.part.chosen[index]
        path, label = os.fsdecode(bytes(np.asarray(self.part.images)[row])), torch.tensor(self.part.labels[row])
        if self.recipe is None:
            return read_image(path, self.size, channels=self.channels)[0], label
        boxes = crops(self.recipe, self.views, mixed_seed(self.seed, epoch, index))
        images = read_image(path, self.size, boxes, channels=self.channels)
        return images if self.views > 1 else images[0], label

    def __getitems__(self, keys: list[int]) -> Batch:
        images, labels = zip(*(self[key] for key in keys), strict=True)
        return torch.stack(images), torch.stack(labels)


class EpochSampler(DistributedSampler[Any]):
    """Shuffled anew each epoch by seed and epoch alone; index i of N in epoch e is the key e N + i.

    So a data set knows the epoch in whatever process it runs. The shards of several processes are equally long, which
    contrastive losses need; of N images up to one less than there are processes sit out an epoch, others each time.
    """

    def __init__(self, dataset: Any, world_size: int, rank: int, seed: int) -> None:
        super().__init__(dataset, world_size, rank, shuffle=True, seed=seed, drop_last=True)

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * len(self.dataset)  # type: ignore[arg-type]  # a Dataset of ours has a length
        return (start + index for index in super().__iter__())


def mixed_seed(*numbers: int) -> int:
    """A seed of 32 bits that depends on all the numbers, so that neighbours give unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def crops(recipe: Recipe, views: int, seed: int) -> Boxes:
    """Random crops for each of the views, as `read_image` takes them."""
    generator = torch.Generator().manual_seed(seed)
    return lambda height, width: draw_boxes(recipe, views, height, width, generator).tolist()


def image_paths(folder: str | Path) -> list[str]:
    """The image files below a folder, however deep, by path; hidden ones are ignored.

    Raises:
        FileNotFoundError: No such folder, or no images in it.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; expected one with images")
    files = (p for p in Path(folder).rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and not p.name.startswith("."))
    if not (paths := sorted(files)):
        raise FileNotFoundError(f"no images in {str(folder)!r}; expected files {', '.join(IMG_EXTENSIONS)}")
    return [str(path) for path in paths]


def read_image(
    path: str, size: int, boxes: Boxes | None = None, content: bytes | None = None, channels: int = 3
) -> Tensor:
    """Decode a file and cut boxes out of it, each brought to ``(S, S)``, bilinear and antialiased.

    Args:
        path: The file. Grey, palette, CMYK and 16-bit images become RGB; transparency is ignored.
        size: Side ``S``.
        boxes: Makes boxes (top, left, height, width) for an image of a height and width. None is one box for
            evaluation: the middle 7/8 of the shorter side, or all of an image that has the size ``(S, S)`` already.
        content: What is in the file, where that has been read already; the path is then only its name.
        channels: 3 for colour, 1 for grey.

    Returns:
        uint8, ``(V, C, S, S)``.

    Raises:
        ValueError: The file cannot be read as an image.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            width, height = image.size
            wanted = _centre(height, width, size) if boxes is None else boxes(height, width)
            need = [_DECODED_SIDE * size / min(box[side] for box in wanted) for side in (3, 2)]
            image.draft(None, (round(width * need[0]), round(height * need[1])))
            pixels = _rgb(image) if channels == 3 else _rgb(image).convert("L")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {path} as an image: {error}; mend or remove the file") from error
    x, y = pixels.width / width, pixels.height / height
    corners = [(left * x, top * y, (left + w) * x, (top + h) * y) for top, left, h, w in wanted]
    views = np.empty((len(corners), channels, size, size), np.uint8)
    for view, corner in zip(views, corners, strict=True):
        square = np.asarray(pixels.resize((size, size), Image.Resampling.BILINEAR, box=corner))
        view[:] = np.atleast_3d(square).transpose(2, 0, 1)
    return torch.from_numpy(views)


def _centre(height: int, width: int, size: int) -> list[list[float]]:
    if (height, width) == (size, size):
        return [[0.0, 0.0, float(size), float(size)]]
    side = CENTRE * min(height, width)
    return [[(height - side) / 2, (width - side) / 2, side, side]]


def centre_seen(paths: Sequence[str], size: int) -> float:
    """Share of the shorter side that evaluation sees of such files: all of them that have the size already."""
    try:
        sizes = set(map(_size, paths))
    except OSError:  # said when it is decoded
        return CENTRE
    return 1.0 if sizes == {(size, size)} else CENTRE


def _size(path: str) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":  # convert() would copy it
        image.load()
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
        return Image.fromarray((np.asarray(image) // 256).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers without a known range")
    return (image.convert("RGBA") if image.mode in ("P", "PA") else image).convert("RGB")


def decode_all(part: Labelled, size: int) -> Labelled:
    """The part's files as one tensor ``(N, 3, S, S)``, decoded for evaluation by as many threads as there are cores."""
    paths = part.paths
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)

    def decode(index: int) -> None:
        images[index] = read_image(paths[index], size)[0]

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for _ in threads.map(decode, range(len(paths))):
            pass
    return Labelled.all(images, part.own_labels)


def broken_files(paths: list[str]) -> list[str]:
    """Those of the files that cannot be read as images; every one is decoded."""

    def is_broken(path: str) -> bool:
        try:
            read_image(path, 1)
        except ValueError:
            return True
        return False

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return [path for path, broken in zip(paths, threads.map(is_broken, paths), strict=True) if broken]

"""Sources of images: one uint8 tensor, or files that are decoded on access.

Legend: ``N`` images, ``V`` views, ``C`` channels, ``H W`` height and width, ``S`` side of a decoded image.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from .decoding import COLOUR, Boxes, Decoding, UnknownRangeError, UnreadableError, read_image
from .recipes import Recipe, draw_boxes
from .splits import describe_counts, spread_classes

Batch = tuple[Tensor, Tensor]
T = TypeVar("T")
# The label of an image that cannot be read, if prediction continues without it.
UNREADABLE = -1


class Part(Protocol):
    """The interface of one part (split) of a datamodule's images."""

    def __len__(self) -> int: ...

    @property
    def in_memory(self) -> bool:
        """Whether the images are held decoded in memory."""

    def describe(self, num_classes: int) -> str:
        """Number of images, for the log."""


@dataclass(frozen=True)
class Labelled:
    """Labelled images of one part of a data set.

    Args:
        images: uint8 images ``(M, C, H, W)``, or the paths of M files.
        labels: Labels of the M, ``(M,)``.
        chosen: Indices of the images that belong to the part, ``(N,)``.
        files: Paths of the M files that the images were decoded from; None of other images.
    """

    images: Tensor | np.ndarray
    labels: np.ndarray
    chosen: np.ndarray
    files: np.ndarray | None = None

    @staticmethod
    def all(images: Tensor | Sequence[Any], labels: Sequence[int] | np.ndarray) -> Labelled:
        """A part of all these images, or paths.

        Raises:
            ValueError: The images are not uint8, or there is not one whole-number label for each.
        """
        if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.ndim != 4):
            raise ValueError(
                f"expected images (N, C, H, W) in uint8, 0..255, got {tuple(images.shape)} in {images.dtype}; of "
                "floats in 0..1 make (images * 255).round().byte()"
            )
        # Bytes in one array: reference counting would copy a list of a million strings into the memory of every worker.
        kept = images if isinstance(images, Tensor) else np.array([os.fsencode(path) for path in images])
        given = np.asarray(labels)
        if given.shape != (len(kept),) or (given.astype(np.int64) != given).any():
            raise ValueError(
                f"expected a whole-number label for each of {len(kept)} images, got {given.dtype} of shape "
                f"{given.shape}"
            )
        return Labelled(kept, given.astype(np.int64), np.arange(len(kept)))

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def in_memory(self) -> bool:
        """Whether the images are held as a tensor."""
        return isinstance(self.images, Tensor)

    def describe(self, num_classes: int) -> str:
        """Number of images, and of images per class."""
        return describe_counts(self.own_labels, num_classes)

    @property
    def own_labels(self) -> np.ndarray:
        """Labels of the part, ``(N,)``."""
        return self.labels[self.chosen]

    @property
    def paths(self) -> list[str]:
        """Paths of the part's files, decoded or not."""
        files = self.images if self.files is None else self.files
        return [os.fsdecode(bytes(path)) for path in np.asarray(files)[self.chosen]]

    @property
    def samples(self) -> list[tuple[str, int]]:
        """Path and label of each of the part's files."""
        return list(zip(self.paths, self.own_labels.tolist(), strict=True))

    def balanced(self) -> Labelled:
        """The same images in a fixed order in which every prefix has the class proportions of the whole."""
        return self.take(spread_classes(self.own_labels))

    def as_stored(self) -> Labelled:
        """The same images in the order of the data set."""
        return self.take(np.argsort(self.chosen))

    def take(self, indices: np.ndarray) -> Labelled:
        """Some of the part; the images are shared, not copied."""
        return replace(self, chosen=self.chosen[indices])

    def join(self, other: Labelled) -> Labelled:
        """The images of both parts, those of this part first."""
        labels = np.concatenate([self.own_labels, other.own_labels])
        if isinstance(self.images, Tensor) and isinstance(other.images, Tensor):
            return Labelled.all(torch.cat([part.images[part.chosen] for part in (self, other)]), labels)
        return Labelled.all([*self.paths, *other.paths], labels)


class TensorImages(Dataset[Batch]):
    """Images that are held as one tensor; a batch is indexed out of it at once, on the tensor's device.

    Args:
        part: Images and labels.

    Attributes:
        targets: Labels in the order of the samples, ``(N,)``, on the host.
    """

    def __init__(self, part: Labelled) -> None:
        assert isinstance(part.images, Tensor)
        self.part = part
        self.images = part.images
        self.targets = part.own_labels
        self.chosen = torch.from_numpy(part.chosen)
        self._labels = torch.from_numpy(part.labels).to(self.images.device)

    @property
    def samples(self) -> list[tuple[str, int]] | None:
        """Path and label of each image, as torchvision's folders have them; None of images that come from no files."""
        return self.part.samples if self.part.files is not None else None

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, key: int) -> Batch:
        images, labels = self.__getitems__([key])
        return images[0], labels[0]

    def __getitems__(self, keys: list[int]) -> Batch:
        rows = self.chosen[torch.tensor(keys) % len(self)]
        if self.images.is_cuda:
            # Copying from pageable memory would wait for the device's earlier work; from pinned memory it does not.
            rows = rows.pin_memory()
        rows = rows.to(self.images.device, non_blocking=True)
        return self.images.index_select(0, rows), self._labels.index_select(0, rows)


class FileImages(Dataset[Batch]):
    """Images that are decoded from files on access, ``(C, S, S)``.

    Args:
        part: Paths and labels.
        size: Side ``S``.
        recipe: The recipe of the random crops, for training; None is the centre crop.
        views: Crops per image; more than one make an image ``(V, C, S, S)``.
        seed: Seed of the crops. They depend on the seed and on the key, which differs each time an image is drawn for
            training, but not on the worker that decodes it; key ``k`` is image ``k mod N``.
        decoding: Channels, range and banner of the files.

    Attributes:
        mark_broken: Whether an image that cannot be read gives zeros labelled `UNREADABLE` instead of an error.
    """

    def __init__(
        self,
        part: Labelled,
        size: int,
        recipe: Recipe | None = None,
        views: int = 1,
        seed: int = 0,
        decoding: Decoding = COLOUR,
    ) -> None:
        self.part = part
        self.size = size
        self.decoding = decoding
        self.mark_broken = False
        self.recipe = recipe
        self.views = views
        self.seed = seed

    @property
    def targets(self) -> np.ndarray:
        """Labels in the order of the samples, ``(N,)``."""
        return self.part.own_labels

    @property
    def samples(self) -> list[tuple[str, int]]:
        """Path and label of each image, as torchvision's folders have them."""
        return self.part.samples

    labelled_files = samples  # by which a cache knows the data set without decoding it

    def __len__(self) -> int:
        return len(self.part.chosen)

    def __getitem__(self, key: int) -> Batch:
        draw, index = divmod(key, len(self))
        label = torch.tensor(self.part.labels[self.part.chosen[index]])
        if self.recipe is None:
            return self._whole(index, label)
        boxes = crops(self.recipe, self.views, mixed_seed(self.seed, draw, index))
        images = read_image(self.path(index), self.size, boxes, decoding=self.decoding)
        return images if self.views > 1 else images[0], label

    def path(self, index: int) -> str:
        """Path of an image."""
        return os.fsdecode(bytes(np.asarray(self.part.images)[self.part.chosen[index]]))

    def fault(self, index: int) -> str:
        """Why an image cannot be read; empty if it can."""
        try:
            read_image(self.path(index), self.size, decoding=self.decoding)
        except (UnreadableError, UnknownRangeError) as error:
            return str(error)
        return ""

    def _whole(self, index: int, label: Tensor) -> Batch:
        try:
            return read_image(self.path(index), self.size, decoding=self.decoding)[0], label
        except (UnreadableError, UnknownRangeError):
            if not self.mark_broken:
                raise
        return blank(self.decoding.channels, self.size), torch.full_like(label, UNREADABLE)

    def __getitems__(self, keys: list[int]) -> Batch:
        images, labels = zip(*(self[key] for key in keys), strict=True)
        return torch.stack(images), torch.stack(labels)


def mixed_seed(*numbers: int) -> int:
    """A 32-bit seed that hashes all the numbers, so that neighbouring numbers give unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def crops(recipe: Recipe, views: int, seed: int) -> Boxes:
    """A function that makes the random crop boxes of each view, for `read_image`."""
    generator = torch.Generator().manual_seed(seed)
    return lambda height, width: draw_boxes(recipe, views, height, width, generator).tolist()


def blank(channels: int, size: int) -> Tensor:
    """The zeros that replace an image that cannot be read, ``(C, S, S)``."""
    return torch.zeros(channels, size, size, dtype=torch.uint8)


def decode_all(part: Labelled, size: int, decoding: Decoding) -> Labelled:
    """The part's files as one tensor ``(N, C, S, S)``, decoded for evaluation by as many threads as there are cores.

    The tensor is in the order of the data set, so that `Labelled.as_stored` finds it again.
    """
    stored = part.as_stored()
    paths = stored.paths
    images = torch.empty(len(paths), decoding.channels, size, size, dtype=torch.uint8)

    def decode(index: int) -> None:
        images[index] = read_image(paths[index], size, decoding=decoding)[0]

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for _ in _watched(threads.map(decode, range(len(paths))), "decoding", len(paths)):
            pass
    places = np.argsort(np.argsort(part.chosen))
    return Labelled(images, stored.own_labels, places, np.asarray(stored.images)[stored.chosen])


def broken_files(paths: list[str], decoding: Decoding) -> list[str]:
    """The files that cannot be read as images; every file is decoded.

    Raises:
        UnknownRangeError: A file is intact, but its values of black and white are unknown.
    """

    def is_broken(path: str) -> bool:
        try:
            read_image(path, 1, decoding=decoding)
        except UnreadableError:
            return True
        return False

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        tried = _watched(threads.map(is_broken, paths), "looking for broken images", len(paths))
        return [path for path, broken in zip(paths, tried, strict=True) if broken]


def _watched(results: Iterable[T], what: str, total: int) -> Iterable[T]:
    """The results, with a bar on rank 0 if they take over two seconds and a terminal is there to see it."""
    unseen = True if getattr(rank_zero_only, "rank", 0) else None  # None: where stderr is no terminal
    return tqdm(results, what, total, leave=False, delay=2, dynamic_ncols=True, unit=" images", disable=unseen)

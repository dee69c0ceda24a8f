"""Stored values of images, in memory or in memory-mapped files.

Legend: ``N`` samples.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ncfinetune.atomic import sync
from ncfinetune.checksums import raw

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Bytes read at a time, and seconds after which an unfinished cache counts as abandoned: a day.
_PIECE, _ABANDONED = 2**24, 24 * 3600
_REMEDY = "free some space, name a cache_dir on another disk, or use cache='memory' or 'none'"


class Stored(NamedTuple):
    """Stands in a batch in place of images: the input of the first layer that is run."""

    value: Tensor


class StoredSet(Dataset[tuple[Stored, Tensor]]):
    """Stored values ``(N, ...)`` and labels ``(N,)``, fetched a batch at a time.

    Keys may exceed ``N``, for samplers whose keys include the epoch: key ``e N + i`` is sample ``i``.
    """

    def __init__(self, values: Tensor, labels: Tensor) -> None:
        self.values, self.labels = values, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Stored, Tensor]:
        return Stored(self.values[index % len(self)]), self.labels[index % len(self)]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Stored, Tensor]:
        rows = torch.tensor(indices) % len(self)
        return Stored(self.values[rows]), self.labels[rows]

    def loader_like(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """A loader of these samples in the same batches as ``loader``, of the same class if that is possible."""
        kind = type(loader) if type(loader).__init__ is DataLoader.__init__ else DataLoader
        # A separate generator: each pass draws a seed for workers, though there are none, and would draw it from the
        # global generator that the model uses.
        options: dict[str, Any] = {
            "collate_fn": _as_is,
            "generator": torch.Generator(),
            "pin_memory": loader.pin_memory,
        }
        if loader.batch_size is None:
            return kind(self, batch_sampler=loader.batch_sampler, **options)
        options |= {"batch_size": loader.batch_size, "sampler": loader.sampler, "drop_last": loader.drop_last}
        return kind(self, **options)


def _as_is(batch: Any) -> Any:
    return batch


def in_memory(rows: Iterable[tuple[Tensor, Tensor]], samples: int) -> StoredSet:
    """Keep ``samples`` values and labels, which come in batches, in memory."""
    stored: StoredSet | None = None
    start = 0
    for values, labels in rows:
        if stored is None:
            stored = StoredSet(*(t.new_empty(samples, *t.shape[1:], device="cpu") for t in (values, labels)))
        stored.values[start : start + len(labels)] = values
        stored.labels[start : start + len(labels)] = labels
        start += len(labels)
    assert stored is not None
    return stored


def on_disk(
    rows: Callable[[], Iterable[tuple[Tensor, Tensor]]], shape: tuple[int, ...], folder: Path, strategy: Any
) -> StoredSet:
    """Values and labels in memory-mapped files of ``folder``; ``rows`` is called if they are not there yet.

    They are written to a temporary folder that is renamed when complete; if another run was faster, its files are used.
    Of several processes, rank 0 writes.

    Args:
        rows: Gives values and labels in batches.
        shape: Shape of all values ``(N, ...)``; files of another shape, or with a wrong checksum, are written again.
        folder: Folder of the files.
        strategy: The trainer's strategy.

    Raises:
        OSError: The disk is full; the files written so far are removed.
    """
    if strategy.is_global_zero and not _complete(folder, shape):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
        try:
            _write(rows(), shape[0], part)
            _put(part, folder, shape)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            raise OSError(error.errno, f"disk full while caching: {error.strerror}; {_REMEDY}", str(folder)) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    strategy.barrier("cache")
    shapes = json.loads((folder / "shapes.json").read_text())
    return StoredSet(*(_mapped(folder / name, *shapes[name]) for name in ("values", "labels")))


def _put(part: Path, folder: Path, shape: tuple[int, ...]) -> None:
    """Rename a finished folder, replacing a damaged one, unless another run has finished it meanwhile."""
    try:
        part.rename(folder)
    except OSError:
        if not _complete(folder, shape):
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)


def _write(rows: Iterable[tuple[Tensor, Tensor]], samples: int, part: Path) -> None:
    shapes: dict[str, Any] = {}
    sums = {"values": 0, "labels": 0}
    with (part / "values").open("wb") as values_file, (part / "labels").open("wb") as labels_file:
        files = {"values": values_file, "labels": labels_file}
        for values, labels in rows:
            tensors = {"values": values, "labels": labels}
            if not shapes:
                shapes = {name: _shape(tensor, samples) for name, tensor in tensors.items()}
                _check_space(sum(map(_size, shapes.values())), part)
            for name, tensor in tensors.items():
                content = raw(tensor)
                files[name].write(content)
                sums[name] = zlib.crc32(content, sums[name])
    (part / "shapes.json").write_text(json.dumps({**shapes, "crc32": sums}))
    for path in (*part.iterdir(), part):
        sync(path)


def _shape(tensor: Tensor, samples: int) -> tuple[str, list[int]]:
    return str(tensor.dtype).removeprefix("torch."), [samples, *tensor.shape[1:]]


def _size(shape: Sequence[Any]) -> int:
    return math.prod(shape[1]) * getattr(torch, shape[0]).itemsize


def _check_space(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the cache needs {needed / 1e9:.2f} GB in {str(folder.parent)!r}, where {free / 1e9:.2f} GB are free",
        )


def _complete(folder: Path, shape: tuple[int, ...]) -> bool:
    try:
        shapes = json.loads((folder / "shapes.json").read_text())
        names = ("values", "labels")
        whole = all((folder / name).stat().st_size == _size(shapes[name]) for name in names)
        if not whole or tuple(shapes["values"][1]) != shape:
            return False
        return all(_crc32(folder / name) == shapes["crc32"][name] for name in names)
    except (OSError, ValueError, KeyError):
        return False


def _crc32(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            total = zlib.crc32(piece, total)
    return total


def _sweep(folder: Path) -> None:
    """Remove the temporary folders of killed writers: a live writer has written within the last day."""
    for part in folder.glob("*.part-*"):
        if time.time() - max(path.stat().st_mtime for path in (part, *part.iterdir())) > _ABANDONED:
            shutil.rmtree(part, ignore_errors=True)


def _mapped(file: Path, dtype: str, shape: Sequence[int]) -> Tensor:
    size = math.prod(shape)
    return torch.from_file(str(file), shared=False, size=size, dtype=getattr(torch, dtype)).view(shape)

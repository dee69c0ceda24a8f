"""Files that are whole or not there, whenever the process that writes them is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from safetensors import SafetensorError

from ncfinetune.checksums import check_zip


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place once it is written, on the disk, and whole.

    Until then the old file stays as it was. What a killed process leaves is overwritten by the next one that writes
    the same file.

    Raises:
        OSError: The disk is full, or the folder cannot be written; nothing half-written stays.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        sync(part)
        part.replace(path)
    # torch and safetensors have errors of their own for a disk that is full.
    except (OSError, RuntimeError, SafetensorError) as error:
        _remove(part)
        raise unwritten(path, error) from error
    except BaseException:
        _remove(part)
        raise
    sync(path.parent)


def unwritten(path: Path, error: Exception) -> OSError:
    """What to raise where a file could not be written, in words that say what to do."""
    return OSError(f"cannot write {str(path)!r}: {error}; make room there, or choose another folder")


def _remove(part: Path) -> None:
    with suppress(OSError):  # of a folder that cannot be written
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints in local files that are replaced as a whole.

    Lightning writes to the system's folder for temporary files first. If that is on another disk, the checkpoint is
    copied from there over the last one, and a process that is killed meanwhile leaves neither. The command line uses
    this class; elsewhere give it to the Trainer as one of its ``plugins``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; one on another machine (``s3://``) as Lightning does.

        Raises:
            OSError: The disk is full, or the folder cannot be written; the last checkpoint of the name stays.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(path) as part:
            torch.save(checkpoint, part)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Read a checkpoint that is as it was written; torch does not look at the checksums that it writes.

        Raises:
            ValueError: A bit of it is another.
        """
        if "://" not in str(path):
            check_zip(path)
        return super().load_checkpoint(path, *args, **kwargs)

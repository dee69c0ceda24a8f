"""Atomic files: complete or absent, even if the process that writes them is killed."""

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
    """A temporary file beside ``path`` to write to, which replaces it once it is complete and synchronised to disk.

    Until then the old file does not change. The temporary file of a killed process is overwritten by the next process
    that writes the same file.

    Raises:
        OSError: The disk is full, or the folder cannot be written; the temporary file is removed.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        sync(part)
        part.replace(path)
    # torch and safetensors raise errors of other classes if the disk is full.
    except (OSError, RuntimeError, SafetensorError) as error:
        _remove(part)
        raise unwritten(path, error) from error
    except BaseException:
        _remove(part)
        raise
    sync(path.parent)


def unwritten(path: Path, error: Exception) -> OSError:
    """The error for a file that could not be written, with the remedy."""
    return OSError(f"cannot write {str(path)!r}: {error}; make room there, or choose another folder")


def _remove(part: Path) -> None:
    with suppress(OSError):  # the folder may not be writable
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Synchronise a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints to local files atomically.

    Lightning writes to the system's folder for temporary files first. If that is on another disk, the checkpoint is
    then copied over the last one, and a process killed during the copy loses both. The command line uses this class;
    in your own script give it to the Trainer as one of its ``plugins``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; a remote one (``s3://``) as Lightning does.

        Raises:
            OSError: The disk is full, or the folder cannot be written; the previous file of the name is kept.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(path) as part:
            torch.save(checkpoint, part)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Read a checkpoint after checking its checksums, which torch writes but does not check.

        Raises:
            ValueError: A checksum is wrong.
        """
        if "://" not in str(path):
            check_zip(path)
        return super().load_checkpoint(path, *args, **kwargs)

"""Atomic files: complete or absent, even if the process that writes them is killed; folders that can be written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


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
        part.unlink(missing_ok=True)
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors makes files that their owner alone can read
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


def check_writable(folder: str | Path) -> None:
    """Make a folder unless it is there, and try that files can be made in it.

    Raises:
        OSError: They cannot.
    """
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


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

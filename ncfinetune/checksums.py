"""Checksums: of tensors and what is said of them, and those that torch's own files carry but torch does not look at."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def fingerprint(tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> str:
    """16 hexadecimal digits of the SHA-256 of names, types, shapes and values, and of what is said beside them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(raw(tensor))
    for name, fact in sorted((facts or {}).items()):
        digest.update(f"{name}={fact};".encode())
    return digest.hexdigest()[:16]


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def check_zip(path: str | Path) -> None:
    """Refuse a file of `torch.save` whose parts are not those that were written.

    Raises:
        ValueError: A part has another checksum than it was written with.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as file:
            # torch writes 0 where it is told to compute none.
            parts = [part for part in file.infolist() if part.CRC]
            for part in parts:
                with file.open(part) as content:
                    while content.read(2**24):
                        pass
    except OSError:
        raise
    except Exception as error:  # reading other bytes as a zip file can raise anything
        raise ValueError(f"{str(path)!r} is damaged: {error}; copy it anew, or take another checkpoint") from error

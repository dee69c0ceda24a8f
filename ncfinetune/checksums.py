"""Checksums of tensors with metadata, and of torch's files, which hold checksums that torch does not check."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def fingerprint(tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> str:
    """16 hexadecimal digits of the SHA-256 of names, dtypes, shapes and values, and of the ``facts``."""
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
    """Refuse a damaged file of `torch.save`.

    Raises:
        ValueError: The checksum of a part is wrong.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as file:
            # torch writes 0 if it is configured to compute no checksums.
            parts = [part for part in file.infolist() if part.CRC]
            for part in parts:
                with file.open(part) as content:
                    while content.read(2**24):
                        pass
    except OSError:
        raise
    except Exception as error:  # reading other bytes as a zip file can raise anything
        raise ValueError(f"{str(path)!r} is damaged: {error}; copy it anew, or take another checkpoint") from error

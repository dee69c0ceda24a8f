"""Atomic writing and checked reading of Lightning's checkpoints."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from ncfinetune.atomic import replacing
from ncfinetune.checksums import check_zip
from ncfinetune.texts import some

# Values of --ckpt_path that are not paths.
_NAMED = ("best", "last", "hpc", "registry")


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


def _refuse_run(path: str) -> None:
    """Refuse the folder of a run, or of its checkpoints, and name these."""
    found = [str(one) for one in sorted([*Path(path).glob("*.ckpt"), *Path(path).glob("checkpoints/*.ckpt")])]
    if found:
        raise ValueError(f"expected the file of a checkpoint, got the folder {path!r}; its checkpoints: {some(found)}")


def read_checkpoint(path: str) -> Mapping[str, Any] | None:
    """The contents of a Lightning checkpoint, read as data, its tensors as they are needed.

    None stands for a name such as ``best``, a file on another machine, a folder of a sharded checkpoint, and a file
    with objects of other classes, which Lightning may be told to trust.

    Raises:
        ValueError: There is no such file, it is a folder with checkpoints, or it is no checkpoint of Lightning or a
            damaged one.
    """
    if path in _NAMED or re.match(r"\w+:", path):
        return None
    if Path(path).is_dir():
        _refuse_run(path)
        return None
    if not Path(path).exists():
        raise ValueError(f"no checkpoint {path!r}; a run writes its checkpoints to RUN/checkpoints")
    try:
        content = torch.load(path, "cpu", weights_only=True, mmap=True) if zipfile.is_zipfile(path) else None
    except UnpicklingError:
        return None
    except Exception:  # another zip file, or a damaged one, which may raise anything
        content = None
    said = content if isinstance(content, dict) else {}
    if "pytorch-lightning_version" not in said or not isinstance(said.get("state_dict"), dict):
        raise ValueError(
            f"{path!r} is no checkpoint of a run, or a damaged one; expected a file of RUN/checkpoints (give files of "
            "weights alone as --model.checkpoint)"
        )
    return content

"""Lightning's checkpoints as files that are whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from ncfinetune.atomic import replacing
from ncfinetune.checksums import check_zip


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

"""The configuration in a run's folder, saved once it is known that the command trains or measures a batch."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from ncfinetune import found
from ncfinetune.atomic import replacing


class SaveConfigAfterBatch(SaveConfigCallback):
    """Saves the configuration in the run's folder after the first batch, or after a run without a batch.

    Lightning saves it before model, data and checkpoint are compared, so that a refused command would overwrite the
    configuration of the run in that folder. The configuration of a training run, ``given``, omits the checkpoint that
    it was resumed from and its folder, so that it starts a new run.
    """

    def __init__(
        self, parser: LightningArgumentParser, config: Namespace, *args: Any, given: Namespace | None, **kwargs: Any
    ) -> None:
        super().__init__(parser, given or config, *args, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do not save here, unlike the base class."""

    def _save(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save once, atomically: Lightning would overwrite the existing file in place.

        Raises:
            OSError: The disk is full, or the folder cannot be written.
        """
        if self.already_saved:
            return
        if stage == "fit":
            found.record(self.config, trainer, pl_module)
        folder = trainer.log_dir or trainer.default_root_dir  # a collective call under several processes
        name = self.config_filename
        whole = trainer.is_global_zero and "://" not in str(folder)
        with replacing(Path(folder, name)) if whole else nullcontext() as part:
            self.config_filename = part.name if part else name
            super().setup(trainer, pl_module, stage)
        self.config_filename = name

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save, after the first batch."""
        self._save(trainer, pl_module, "fit")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, if the run had no batch: with ``max_epochs: 0`` the model is a classifier in closed form."""
        self._save(trainer, pl_module, "fit")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save, after the first batch that is not of the sanity check, after which training may still be refused."""
        if not trainer.sanity_checking:
            self._save(trainer, pl_module, "validate")

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save, after the first batch."""
        self._save(trainer, pl_module, "test")

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save, after the first batch."""
        self._save(trainer, pl_module, "predict")

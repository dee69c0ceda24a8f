"""What a run of thousands of epochs could run out of: memory."""

import os
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from ncfinetune import Supervised
from ncfinetune.callbacks import NeuralCollapseTracker, OnlineProbe
from ncfinetune.datamodules import Digits

STATUS = Path("/proc/self/statm")
# Pools and caches fill in the first epochs: 4 MB in 80. After that 0.3 MB in 200 were seen; the history of the tracker
# takes some kB. A tensor of 17 kB that is kept each epoch, as features of 16 images twice over are, is too much.
EPOCHS, FILLED, GROWTH = 200, 80, 2e6


class Memory(Callback):
    """Notes the process's resident memory after each epoch."""

    def __init__(self) -> None:
        self.resident: list[int] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.resident.append(int(STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="needs /proc to tell the resident memory")
def test_memory_stays_flat_over_epochs(tmp_path: Path) -> None:
    memory = Memory()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=[NeuralCollapseTracker(figures=False), OnlineProbe(knn=3), memory],
        logger=TensorBoardLogger(tmp_path, "", "run"),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1,
    )
    model = Supervised(2, {"name": "test_resnet", "in_chans": 1})
    trainer.fit(model, Digits([1, 2], shots=8, batch_size=16, augmentation="standard"))
    assert max(memory.resident[FILLED:]) - max(memory.resident[:FILLED]) < GROWTH

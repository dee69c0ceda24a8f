"""What loggers other than CSV files receive: pictures, TensorBoard's pages, and the table that Lightning prints."""

import re
import sys
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
import stranger
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from tiny import SMALL, plain_sgd
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ncfinetune import Supervised
from ncfinetune.callbacks import NeuralCollapseTracker
from ncfinetune.callbacks.figures import of_pass
from ncfinetune.collapse import class_moments
from ncfinetune.datamodules import Digits
from ncfinetune.settings import headline

PICTURES = ("depth", "cosines_penultimate", "spread_penultimate", "projection_penultimate")


def _loader() -> DataLoader:
    labels = torch.arange(30) % 3
    return DataLoader(TensorDataset(torch.randn(30, 1, 6, 6) + labels.view(-1, 1, 1, 1), labels), batch_size=16)


def _fit(folder: Path, logger: Any, tracker: NeuralCollapseTracker | None = None, **arguments: Any) -> Trainer:
    tracker = tracker or NeuralCollapseTracker(3, layers=["features.0", "auto"])
    options = {"max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(
        default_root_dir=folder,
        logger=logger,
        callbacks=[tracker],
        enable_checkpointing=False,
        **{**options, **arguments},
    )
    trainer.fit(stranger.Stranger(nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU())), _loader(), _loader())
    return trainer


@pytest.mark.filterwarnings("ignore:.*")  # of its own dependencies
def test_pictures_reach_weights_and_biases(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pictures in Weights & Biases need wandb: pip install 'ncfinetune[wandb]'")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    _fit(tmp_path, logger)
    logger.experiment.finish()
    files = [path.name for path in tmp_path.rglob("media/images/neural_collapse/*.png")]
    assert len(files) == 2 * len(PICTURES)
    for name in PICTURES:
        assert sum(re.match(rf"{name}_\d+_\w+\.png", file) is not None for file in files) == 2


@pytest.mark.filterwarnings("ignore:.*")
def test_pictures_reach_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="pictures in MLflow need mlflow: pip install 'ncfinetune[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    _fit(tmp_path, logger)
    files = {str(path.relative_to(path.parents[2])) for path in tmp_path.rglob("*.png")}
    assert files == {f"neural_collapse/{name}/step_{step:07d}.png" for name in PICTURES for step in (0, 2)}

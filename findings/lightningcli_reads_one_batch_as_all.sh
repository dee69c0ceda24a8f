#!/usr/bin/env bash
# Trainer's limits are a whole number of batches or a share of them, and Trainer's source annotates them so, in the order
# int, float. jsonargparse takes the first of the types that a word can be read as. But Python keeps one copy of a union for
# all modules, in the order in which it was first written, and forgets it when it has seen enough others: which order
# the annotation has is left to what was imported before. With nothing installed but Lightning it is float, int. Then
# "--trainer.limit_train_batches 1" is read as 1.0, and a run that was limited to one batch takes all of them without a
# word. (A limit of 2 becomes 2.0, which fit refuses.) In an environment with more packages it may be one batch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet lightning==2.6.6 torch==2.14.1 "jsonargparse[signatures]==4.53.0"
cd "$folder"
cat > train.py <<'PYTHON'
import inspect
import sys

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(5, 2)))


quiet = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
quiet |= {"enable_progress_bar": False, "enable_model_summary": False}
own = Trainer(limit_train_batches=1, **quiet)
own.fit(Module(), Data())
cli = LightningCLI(
    Module, Data, save_config_callback=None, trainer_defaults=quiet, args=["fit", "--trainer.limit_train_batches", "1"]
)
print("steps of Trainer(limit_train_batches=1) on five batches: ", own.global_step)
print("expected of LightningCLI with limit_train_batches 1:      1")
print("seen:                                                    ", cli.trainer.global_step)
print("annotation:", inspect.signature(Trainer.__init__).parameters["limit_train_batches"].annotation)
sys.exit((own.global_step, cli.trainer.global_step) != (1, 5))
PYTHON
venv/bin/python -m pip list 2>/dev/null | grep -E "^(jsonargparse|lightning|torch) "
venv/bin/python train.py 2>/dev/null

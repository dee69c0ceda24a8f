#!/usr/bin/env bash
# A Lightning run that max_steps stops within an epoch counts that epoch as a whole one in the checkpoint that is saved
# after it. Resumed without max_steps it goes on with the next epoch: the rest of the batches is never trained, so that a
# run in two parts makes fewer steps than the same run in one, without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet lightning==2.6.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
import sys
import warnings

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
# Five batches an epoch.
LOADER = DataLoader(TensorDataset(torch.arange(10.0)[:, None]), batch_size=2)


class Counting(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.trained = []

    def training_step(self, batch, batch_idx):
        self.trained.append((self.current_epoch, batch_idx))
        return self.layer(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(checkpoint=None, **limits):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", enable_checkpointing=False, **quiet, **limits)
    model = Counting()
    trainer.fit(model, LOADER, ckpt_path=checkpoint)
    return trainer, model


print("lightning", lightning.__version__, "torch", torch.__version__)
whole, _ = fit(max_epochs=3)
begun, first = fit(max_epochs=3, max_steps=7)
begun.save_checkpoint("begun.ckpt")
resumed, second = fit("begun.ckpt", max_epochs=3)
print("expected, as in a run of three epochs of five batches:", whole.global_step, "steps")
print("seen, stopped by max_steps=7 and resumed:", resumed.global_step, "steps; trained, by epoch and batch:")
print(first.trained, "and then", second.trained)
sys.exit(not (whole.global_step == 15 and resumed.global_step < 15))
PYTHON

#!/usr/bin/env bash
# Lightning's GradientAccumulationScheduler sets the number of batches of an optimiser step where an epoch begins. A run
# that is resumed from a checkpoint saved within an epoch does not begin that epoch again, so that the rest of it trains
# with a step after each batch, whatever the schedule says. One would expect as many steps as without the interruption.
# With Trainer(accumulate_grad_batches=3) there are. The warning at such a start is of data loaders alone.
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
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
DATA = DataLoader(TensorDataset(torch.ones(12, 2)), 1)
NUMBER = {"accumulate_grad_batches": 3}


class Regression(LightningModule):
    """Notes the batches, as epoch and number, after which the optimiser steps."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.stepped = []

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def on_before_optimizer_step(self, optimizer):
        self.stepped.append((self.current_epoch, self.trainer.fit_loop.epoch_loop.batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def steps(folder, checkpoint=None, **options):
    """The steps at the end of a fit of two epochs of 12 batches, and the batches of the first epoch that had one."""
    schedule = [] if options else [GradientAccumulationScheduler({0: 3})]
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*schedule, saves], **options,
    )
    model = Regression()
    trainer.fit(model, DATA, ckpt_path=checkpoint)
    return trainer.global_step, [batch for epoch, batch in model.stepped if epoch == 0]


print("lightning", lightning.__version__, "torch", torch.__version__)
print("expected: a step after every third batch, 8 steps in two epochs of 12 batches, also when resumed after 6 batches")
found = []
for name, options in {"GradientAccumulationScheduler({0: 3})": {}, "Trainer(accumulate_grad_batches=3)": NUMBER}.items():
    folder = f"folder of {len(found)}"
    whole = steps(folder, **options)
    resumed = steps(f"{folder}, resumed", f"{folder}/step=2.ckpt", **options)
    found.append((whole, resumed))
    print(f"seen with {name}, not interrupted: {whole[0]} steps, in epoch 0 after the batches {whole[1]}")
    print(f"seen with {name}, resumed: {resumed[0]} steps, in the rest of epoch 0 after the batches {resumed[1]}")
schedule, number = found
sys.exit(
    not (
        schedule == ((8, [2, 5, 8, 11]), (12, [6, 7, 8, 9, 10, 11])) and number == ((8, [2, 5, 8, 11]), (8, [8, 11]))
    )
)
PYTHON

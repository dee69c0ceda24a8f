#!/usr/bin/env bash
# ModelCheckpoint(every_n_train_steps=N) also saves after the last batch of an epoch, where N divides its length. A run
# that is resumed from that checkpoint goes on with the next epoch: it leaves out the validation and the hooks at the
# end of the epoch, which the run that did not stop has, so that curves lack a point and monitored values are missed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet lightning==2.6.6
"$folder/venv/bin/python" - "$folder" 2>/dev/null <<'PYTHON'
import sys

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.seen.append(f"validation of epoch {self.trainer.current_epoch}")

    def on_train_epoch_end(self):
        self.seen.append(f"end of epoch {self.trainer.current_epoch}")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(ckpt_path=None):
    callbacks = [ModelCheckpoint(sys.argv[1], "{step}", save_top_k=-1, every_n_train_steps=4)]
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=callbacks,
    )
    module = Module()
    four, one = (DataLoader(TensorDataset(torch.ones(size, 2))) for size in (4, 1))
    trainer.fit(module, four, one, ckpt_path=ckpt_path)
    return module.seen


print("lightning", lightning.__version__)
whole, resumed = fit(), fit(f"{sys.argv[1]}/step=4.ckpt")
print("expected after the last batch of epoch 0:", whole)
print("seen when resumed there:                 ", resumed)
sys.exit(resumed != [event for event in whole if event.endswith("1")])
PYTHON

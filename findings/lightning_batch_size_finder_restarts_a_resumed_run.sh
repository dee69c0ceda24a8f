#!/usr/bin/env bash
# Lightning's BatchSizeFinder among the callbacks, and fit(ckpt_path=...): the search saves a checkpoint of its own before
# it begins and restores it afterwards, which takes the place of the one that the run was to go on from. The run begins at
# step 0 again and trains all epochs once more, without a warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "lightning==2.6.6" "torch==2.11.0" "numpy==2.2.6"
cat > "$folder/resume.py" <<'PYTHON'
import logging
import sys
import warnings

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.batch_size, self.linear = 4, torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return (self.linear(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(16, 2), torch.randn(16, 1)), batch_size=self.batch_size)


class Where(Callback):
    def on_train_start(self, trainer, pl_module):
        self.start = trainer.current_epoch, trainer.global_step


def fitted(epochs, callbacks, checkpoint=None):
    where = Where()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[*callbacks, where], **quiet)
    trainer.fit(Regression(), ckpt_path=checkpoint)
    return trainer, where.start


fitted(2, [])[0].save_checkpoint("two.ckpt")
plain = fitted(4, [], "two.ckpt")[1]
finder = fitted(4, [BatchSizeFinder(max_trials=1, steps_per_trial=1)], "two.ckpt")[1]
print("lightning", lightning.__version__)
print("expected: both go on from epoch 2, step 8")
print(f"seen: without the finder from epoch {plain[0]}, step {plain[1]}; with it from epoch {finder[0]}, step {finder[1]}")
sys.exit(not (plain == (2, 8) and finder == (0, 0)))
PYTHON
cd "$folder" && venv/bin/python resume.py

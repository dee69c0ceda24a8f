#!/usr/bin/env bash
# A ModelCheckpoint that takes its folder from the logger writes it as text into the checkpoint. Resumed, it takes up what
# was best so far only if its folder is the same text: where the logger's folder was given relative to the working
# directory and is given absolutely now, though it is the same place, it begins anew. A worse model then becomes the best,
# and replaces the file of the better one. A folder that is given to ModelCheckpoint itself is made absolute at once.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet lightning==2.6.6
cd "$folder"
venv/bin/python - <<'PYTHON' 2>/dev/null
import sys
from pathlib import Path

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

SCORES = [0.5, 0.1, 0.9, 0.8]  # of each epoch; the second is best


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("score", SCORES[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(place, epochs, ckpt_path=None):
    best = ModelCheckpoint(filename="best", monitor="score", save_last=True, enable_version_counter=False)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=CSVLogger(place, "", "run"), enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=[best],
    )
    data = DataLoader(TensorDataset(torch.ones(4, 2)))
    trainer.fit(Module(), data, data, ckpt_path=ckpt_path)
    return round(float(best.best_model_score), 3), torch.load(Path(place, "run/checkpoints/best.ckpt"), weights_only=True)["epoch"]


def resumed(first, second):
    fit(first, 2)
    return fit(second, 4, f"{second}/run/checkpoints/last.ckpt")


print("lightning", lightning.__version__)
same, other = resumed("same", "same"), resumed("other", str(Path("other").absolute()))
print("best score and its epoch, resumed with the same text:         ", same)
print("expected with the absolute path of the same folder:           ", same)
print("seen:                                                         ", other)
sys.exit(not (same == (0.1, 1) and other == (0.8, 3)))
PYTHON

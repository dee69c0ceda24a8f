#!/usr/bin/env bash
# Lightning's StochasticWeightAveraging puts the average in place of the weights at the end of the fit. A network without
# batch norm has no statistics to measure again, and there this happens after the last checkpoint: the network that fit()
# leaves tests otherwise than the one loaded from last.ckpt, and no checkpoint of the run has the average as its weights.
# With batch norm, one layer more, the last checkpoint is of the average.
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
from pathlib import Path

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Regression(LightningModule):
    def __init__(self, norm):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.LayerNorm(8), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return (self.network(inputs) - targets).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def apart(norm):
    """Largest difference between the weights after the fit and those of the last checkpoint."""
    seed_everything(0, verbose=False)
    inputs = torch.randn(32, 4)
    loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), 8, shuffle=True)
    place = Path("norm" if norm else "plain")
    keeps = ModelCheckpoint(place, save_last=True, save_top_k=-1)
    model = Regression(norm)
    trainer = Trainer(
        max_epochs=6, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=1), keeps],
    )
    trainer.fit(model, loader)
    differences = []
    for path in place.glob("*.ckpt"):
        saved = torch.load(path, weights_only=False)["state_dict"]
        largest = max((saved[name] - weight).abs().max().item() for name, weight in model.named_parameters())
        differences.append((largest, path))
    return differences


print("lightning", lightning.__version__, "torch", torch.__version__)
print("expected: one checkpoint of each fit, at least, has the weights that the fit leaves, which are the average")
found = {norm: min(apart(norm)) for norm in (True, False)}
for norm, (difference, path) in found.items():
    print(f"seen {'with' if norm else 'without'} batch norm: the nearest, {path}, is {difference:.2g} away")
sys.exit(not (found[True][0] == 0 and found[False][0] > 1e-3))
PYTHON

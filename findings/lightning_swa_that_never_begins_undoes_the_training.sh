#!/usr/bin/env bash
# Lightning's StochasticWeightAveraging copies the network before the fit, and puts the average in its place at the end. A
# fit whose max_epochs end before swa_epoch_start has averaged nothing, and a network without batch norm gets the copy:
# the weights that it began with. Its last checkpoint has been trained. Nothing is said.
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
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return (self.network(inputs) - targets).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def moved(start):
    """How far the weights after a fit of three epochs, and those of its last checkpoint, are from where they began."""
    seed_everything(0, verbose=False)
    inputs = torch.randn(32, 4)
    loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), 8, shuffle=True)
    keeps = ModelCheckpoint(Path(f"from {start}"), save_last=True)
    model = Regression()
    began = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[StochasticWeightAveraging(0.05, swa_epoch_start=start, annealing_epochs=1), keeps],
    )
    trainer.fit(model, loader)
    saved = torch.load(keeps.last_model_path, weights_only=False)["state_dict"]
    states = dict(model.named_parameters()), saved
    return [max((state[name] - weight).abs().max().item() for name, weight in began.items()) for state in states]


print("lightning", lightning.__version__, "torch", torch.__version__)
print("expected: weights after a fit that are not those before it, whenever the average begins")
found = {start: moved(start) for start in (2, 10)}
for start, (after, saved) in found.items():
    print(f"seen, average from epoch {start} of 3: the fit moved the weights by {after:.2g}, those in last.ckpt by {saved:.2g}")
sys.exit(not (found[2][0] > 0.01 and found[10][0] == 0 and found[10][1] > 0.01))
PYTHON

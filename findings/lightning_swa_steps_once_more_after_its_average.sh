#!/usr/bin/env bash
# After its last epoch Lightning's StochasticWeightAveraging puts the average into a network with batch norm and makes one
# more pass over the training data, without gradients, to measure the average's statistics. The pass ends in a step of the
# optimiser all the same, by the gradients that the last training step has left, so that the weights after the fit are not
# the average, and the statistics are of other weights. A network without batch norm ends with the average.
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
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Regression(LightningModule):
    def __init__(self, norm):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 8), norm(8), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return (self.network(inputs) - targets).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def apart(norm):
    """Largest difference between the weights after a fit and the callback's average, and the steps of the fit."""
    seed_everything(0, verbose=False)
    inputs = torch.randn(32, 4)
    loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), 8, shuffle=True)
    model, average = Regression(norm), StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[average],
    )
    trainer.fit(model, loader)
    pairs = zip(model.parameters(), average._average_model.parameters())
    return max((weight - mean).abs().max().item() for weight, mean in pairs), trainer.global_step


print("lightning", lightning.__version__, "torch", torch.__version__)
print("expected: weights that are the average after the fit, and 12 steps in three epochs of four batches, with any norm")
found = {norm.__name__: apart(norm) for norm in (nn.LayerNorm, nn.BatchNorm1d)}
for norm, (difference, steps) in found.items():
    print(f"seen with {norm}: {steps} steps, and weights that differ from the average by up to {difference:.2g}")
sys.exit(not (found["LayerNorm"] == (0, 12) and found["BatchNorm1d"][0] > 1e-3 and found["BatchNorm1d"][1] == 13))
PYTHON

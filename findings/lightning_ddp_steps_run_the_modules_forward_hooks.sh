#!/usr/bin/env bash
# A forward hook on a LightningModule is meant for calls of the module. Under DDP the Trainer sends each step through the
# wrapper's forward, and puts the step in the place of the module's forward meanwhile: hooks of the module then run around
# each training and validation step as well, and a pre-hook gets (batch, batch_idx) where it expects the network's input. The
# same code on one device without a strategy runs no hook, so that what it records changes with the strategy.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet lightning==2.6.6
cd "$folder"
cat > hooked.py <<'PYTHON'
import logging
import sys
import warnings

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def arguments(strategy):
    """The types of what a forward pre-hook of the module gets in a fit of two steps, neither of which calls the module."""
    model, seen = Regression(), []
    model.register_forward_pre_hook(lambda module, args: seen.append(tuple(type(arg).__name__ for arg in args)))
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(torch.randn(8, 4)), 4))
    return seen


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("lightning", lightning.__version__, "torch", torch.__version__)
    print("expected: the hook does not run, since no step calls the module, whatever the strategy is")
    found = {strategy: arguments(strategy) for strategy in ("auto", "ddp")}
    print(f"seen: {found}")
    sys.exit(found != {"auto": [], "ddp": [("list", "int")] * 2})
PYTHON
"$folder/venv/bin/python" hooked.py

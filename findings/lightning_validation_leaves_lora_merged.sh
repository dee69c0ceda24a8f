#!/usr/bin/env bash
# loralib adds its low-rank update to the weight when a layer is put in eval mode, and takes it off again in train().
# Lightning puts a model in eval mode for validation through eval(), and back by setting each module's `training` flag,
# without a call of train(): after the first validation the update stays merged, the layer's forward pass no longer
# uses lora_A and lora_B, and these get no gradient for the rest of the run. Nothing is said, since the head still learns.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet lightning==2.6.6 loralib==0.1.2
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import sys
from importlib.metadata import version

import loralib
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.tuned = loralib.Linear(4, 4, r=2)
        self.head = torch.nn.Linear(4, 1)
        self.has_gradient = []

    def training_step(self, batch, batch_idx):
        return self.head(self.tuned(batch[0])).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def on_before_optimizer_step(self, optimizer):
        self.has_gradient.append((self.current_epoch, self.tuned.lora_B.grad is not None))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


module = Module()
images = DataLoader(TensorDataset(torch.ones(2, 4)))
trainer = Trainer(
    max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, num_sanity_val_steps=0,
)
trainer.fit(module, images, images)
print("lightning", version("lightning"), "loralib", version("loralib"), "torch", torch.__version__)
print("expected: a gradient of lora_B in every step of every epoch, as the module trains in all of them")
print("seen (epoch, gradient):", module.has_gradient, "merged at the end:", module.tuned.merged, "training:", module.tuned.training)
sys.exit(module.has_gradient != [(0, True)] * 2 + [(1, False)] * 2 + [(2, False)] * 2)
PYTHON

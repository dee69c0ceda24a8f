#!/usr/bin/env bash
# Lightning's Trainer.estimated_stepping_batches is documented to account for gradient accumulation, and to raise
# MisconfigurationException where that differs between epochs. With a GradientAccumulationScheduler it does neither: it
# counts a step for each batch. A learning rate schedule that is given this number as its length, as the documentation
# shows, is then a fraction of the way through at the end of the fit. With Trainer(accumulate_grad_batches=4) it is right.
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
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
DATA = DataLoader(TensorDataset(torch.ones(8, 2)), 1)


class Regression(LightningModule):
    """Notes the estimate where a learning rate schedule would be made from it."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        try:
            self.estimate = self.trainer.estimated_stepping_batches
        except MisconfigurationException:
            self.estimate = "MisconfigurationException"
        return torch.optim.SGD(self.parameters(), lr=0.1)


def steps(**options):
    """The estimate of a fit of two epochs of 8 batches, and the steps that it made."""
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )
    model = Regression()
    trainer.fit(model, DATA)
    return model.estimate, trainer.global_step


print("lightning", lightning.__version__, "torch", torch.__version__)
print("expected: an estimate that is the number of steps made, or MisconfigurationException for {0: 4, 1: 1}")
found = {
    "Trainer(accumulate_grad_batches=4)": steps(accumulate_grad_batches=4),
    "GradientAccumulationScheduler({0: 4})": steps(callbacks=[GradientAccumulationScheduler({0: 4})]),
    "GradientAccumulationScheduler({0: 4, 1: 1})": steps(callbacks=[GradientAccumulationScheduler({0: 4, 1: 1})]),
}
for name, (estimate, made) in found.items():
    print(f"seen with {name}: estimated {estimate}, made {made}")
sys.exit(list(found.values()) != [(4, 4), (16, 4), (16, 10)])
PYTHON

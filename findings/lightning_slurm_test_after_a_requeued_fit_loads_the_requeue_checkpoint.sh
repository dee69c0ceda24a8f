#!/usr/bin/env bash
# Lightning's Trainer.test(model) without ckpt_path is documented to use the current weights. In a SLURM job that was
# requeued, default_root_dir has an hpc_ckpt_N.ckpt, from which fit rightly goes on. But test, called after that fit, loads
# the same file again: the values are those of the weights at the requeue, and not of those at the end of the fit. Outside
# SLURM the same calls test the trained weights. SLURM is imitated here by its environment variables.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet lightning==2.6.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
import os
import sys
import warnings
from pathlib import Path

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
DATA = DataLoader(TensorDataset(torch.ones(8, 2)), 2)
SLURM = {
    "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
}


class Counter(LightningModule):
    """Counts its training steps in a buffer, which is saved and loaded with the weights."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.register_buffer("steps", torch.zeros(()))

    def on_train_start(self):
        self.began = int(self.steps)

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return self.layer(batch[0]).square().mean()

    def test_step(self, batch, batch_idx):
        self.log("steps", self.steps)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveLikeSlurm(Callback):
    """Saves what Lightning saves where SLURM says that the job will be requeued."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            trainer.save_checkpoint(Path(trainer.default_root_dir, "hpc_ckpt_1.ckpt"))


def trainer(folder, **options):
    return Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )


def steps(folder, slurm):
    """Steps of a module before and after a resumed fit, and those that the test after it logs."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        del os.environ[name]
    trainer(folder, max_steps=3, callbacks=[SaveLikeSlurm()]).fit(Counter(), DATA)
    if slurm:
        os.environ.update(SLURM)
    model, resumed = Counter(), trainer(folder, max_epochs=3)
    resumed.fit(model, DATA, ckpt_path=None if slurm else Path(folder, "hpc_ckpt_1.ckpt"))
    ended = int(model.steps)
    (logged,) = resumed.test(model, DATA, verbose=False)
    return model.began, ended, int(logged["steps"])


print("lightning", lightning.__version__, "torch", torch.__version__)
outside, inside = steps("outside", slurm=False), steps("inside", slurm=True)
print("expected: a fit that is resumed at step 3 and ends at step 12, and a test of the weights of step 12")
for name, (began, ended, tested) in {"outside SLURM": outside, "under SLURM": inside}.items():
    print(f"seen {name}: a fit that is resumed at step {began} and ends at step {ended}, and a test of step {tested}")
sys.exit(not (outside == (3, 12, 12) and inside == (3, 12, 3)))
PYTHON

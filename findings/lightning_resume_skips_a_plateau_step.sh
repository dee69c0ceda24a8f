#!/usr/bin/env bash
# Lightning steps ReduceLROnPlateau at the end of each epoch. In a run that is resumed from the checkpoint of an epoch's
# end, that epoch's step is never made: the checkpoint is written before it, and the resumed run begins after it. Without
# improvement and with patience 0 the rate is then twice as high as in a run that was not interrupted, without a word.
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
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
DATA = TensorDataset(torch.ones(4, 1))


class Plateau(LightningModule):
    """A loss that never gets better; notes the rate of each epoch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.rates = {}

    def training_step(self, batch):
        loss = self.layer(batch[0]).mean() * 0 + 1
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_start(self):
        self.rates[self.current_epoch] = self.optimizers().param_groups[0]["lr"]

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "loss"}}


def rates(folder, epochs, checkpoint=None):
    """The rate of each epoch of a run, whose checkpoints are written at the ends of epochs."""
    seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saves = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    model = Plateau()
    Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[saves], **quiet).fit(
        model, DataLoader(DATA, batch_size=2), ckpt_path=checkpoint
    )
    return model.rates


print("lightning", lightning.__version__, "torch", torch.__version__)
whole = rates("whole", 5)
begun = rates("begun", 2)
resumed = begun | rates("resumed", 5, "begun/last.ckpt")
print("expected, as in a run of five epochs:", whole)
print("seen, two epochs and then resumed from their checkpoint:", resumed)
expected = {0: 1.0, 1: 1.0, 2: 0.5, 3: 0.25, 4: 0.125}
sys.exit(not (whole == expected and resumed == {0: 1.0, 1: 1.0, 2: 1.0, 3: 0.5, 4: 0.25}))
PYTHON

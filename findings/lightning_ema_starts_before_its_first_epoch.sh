#!/usr/bin/env bash
# Lightning's EMAWeightAveraging takes the epoch that it is to start at, update_starting_at_epoch, beside the step. Given
# alone it does not delay the average: updates run at every step from the first on, and at the end of the epochs from
# the one named on there is one update more. update_starting_at_step does delay it.
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
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch.utils.data import DataLoader, TensorDataset

EPOCHS, START, STEPS = 4, 2, 5

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Counts(Callback):
    """The number of updates of the average at the end of each epoch, before the update that an epoch's end may make."""

    def __init__(self, average):
        self.average, self.numbers = average, []

    def on_train_epoch_end(self, trainer, pl_module):
        self.numbers.append(int(self.average._average_model.n_averaged))


def updates(**when):
    seed_everything(0, verbose=False)
    average = EMAWeightAveraging(decay=0.9, **when)
    counts = Counts(average)
    trainer = Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[counts, average],
    )
    trainer.fit(Regression(), DataLoader(TensorDataset(torch.randn(STEPS, 3)), 1))
    return counts.numbers


print("lightning", lightning.__version__, "torch", torch.__version__)
print(f"expected of update_starting_at_epoch={START}: no update in epochs 0 to {START - 1}")
by_epoch, by_step = updates(update_starting_at_epoch=START), updates(update_starting_at_step=START * STEPS)
print("seen, updates at the end of each epoch:", by_epoch)
print(f"seen of update_starting_at_step={START * STEPS}:", by_step)
sys.exit(not (by_epoch[:START] == [STEPS, 2 * STEPS] and by_step[0] == 0 and by_step[-1] > STEPS))
PYTHON

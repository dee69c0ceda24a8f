#!/usr/bin/env bash
# A callback's on_load_checkpoint is described as called when a model checkpoint is loaded. It gets the whole checkpoint, the
# counts of the loops included, which a file that was saved with save_weights_only holds too. But the Trainer calls it only if
# the file has states of callbacks: a callback that asks for which epoch the loaded weights were trained hears nothing of a
# test or validation of a weights-only file, and cannot tell it from one without a checkpoint.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet lightning==2.6.6
cd "$folder"
cat > told.py <<'PYTHON'
import logging
import sys
import warnings

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def test_step(self, batch, batch_idx):
        self.layer(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Epochs(Callback):
    told = None

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.told = checkpoint["epoch"]


def tested(weights_only):
    """The epoch that the callback is told of, and the one that is in the file."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    loader = DataLoader(TensorDataset(torch.randn(8, 4)), 4)
    model, trainer = Regression(), Trainer(max_epochs=3, accelerator="cpu", **quiet)
    trainer.fit(model, loader)
    path = f"{weights_only}.ckpt"
    trainer.save_checkpoint(path, weights_only=weights_only)
    callback = Epochs()
    Trainer(accelerator="cpu", callbacks=[callback], **quiet).test(model, loader, ckpt_path=path, verbose=False)
    return callback.told, torch.load(path, weights_only=True)["epoch"]


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("lightning", lightning.__version__, "torch", torch.__version__)
    print("expected: on_load_checkpoint tells the epoch that the file holds, of a whole and of a weights-only file")
    found = tested(False), tested(True)
    for (told, held), kind in zip(found, ("whole", "weights-only")):
        print(f"seen: a {kind} file holds {held}, the callback is told {told}")
    sys.exit(found != ((3, 3), (None, 3)))
PYTHON
"$folder/venv/bin/python" told.py

#!/usr/bin/env bash
# Lightning's ModelCheckpoint without monitor is documented to save a checkpoint for the last epoch, and with
# check_val_every_n_epoch above 1 not at the end of every epoch. In that case it saves after a validation only: a fit of two
# epochs with check_val_every_n_epoch=3 ends with no checkpoint at all, and so does one of six epochs without validation data,
# where checkpoints are documented to be saved at the end of the epoch. One would expect the last epoch's, or a warning.
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
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

DATA = DataLoader(TensorDataset(torch.ones(4, 2)), 2)


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def saved(folder, epochs, every, validation=DATA):
    """Checkpoints that a fit leaves, and the messages and warnings that name checkpoints."""
    messages = Messages()
    logging.getLogger("lightning.pytorch").handlers = [messages]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer = Trainer(
            max_epochs=epochs, check_val_every_n_epoch=every, accelerator="cpu", logger=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[ModelCheckpoint(folder)],
        )
        trainer.fit(Regression(), DATA, validation)
    texts = messages.texts + [str(warning.message) for warning in warned]
    said = [text for text in texts if "checkpoint" in text.lower() or "save" in text.lower()]
    return sorted(path.name for path in Path(folder).glob("*.ckpt")), said


print("lightning", lightning.__version__, "torch", torch.__version__)
print("expected: a checkpoint of the last epoch in each folder, or a word of there being none")
found = {
    "2 epochs, validation after each": saved("two, one", 2, 1),
    "2 epochs, validation after every third": saved("two, three", 2, 3),
    "6 epochs, no validation data": saved("six, one, none", 6, 1, None),
    "6 epochs, no validation data, check_val_every_n_epoch=3": saved("six, three, none", 6, 3, None),
}
for name, (files, said) in found.items():
    print(f"seen, {name}: {files}, said of it: {said}")
expected = [(["epoch=1-step=4.ckpt"], []), ([], []), (["epoch=5-step=12.ckpt"], []), ([], [])]
sys.exit(list(found.values()) != expected)
PYTHON

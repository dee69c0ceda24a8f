#!/usr/bin/env bash
# torch installs a handler of SIGCHLD when the first loader with workers is iterated, once in a process: it reports a worker
# that dies in the middle of a step at once, by name and signal. A Trainer puts the handlers of all signals back to what they
# were before its fit, SIGCHLD among them, and torch does not install its own again. From the second fit of a process on a
# worker's death is noticed only when the next batch is fetched.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet lightning==2.6.6
cd "$folder"
cat > watch.py <<'PYTHON'
import logging
import signal
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
        self.layer, self.watched = nn.Linear(4, 1), []

    def training_step(self, batch, batch_idx):
        self.watched.append(callable(signal.getsignal(signal.SIGCHLD)))
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit():
    """Whether SIGCHLD has a handler in each step of a fit whose loader has a worker."""
    model = Regression()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(torch.randn(8, 4)), 4, num_workers=1))
    return all(model.watched)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("lightning", lightning.__version__, "torch", torch.__version__)
    print("expected: torch's handler of SIGCHLD in the steps of the first and of the second fit")
    found = fit(), fit()
    print(f"seen: in the first fit {found[0]}, in the second {found[1]}")
    sys.exit(found != (True, False))
PYTHON
"$folder/venv/bin/python" watch.py

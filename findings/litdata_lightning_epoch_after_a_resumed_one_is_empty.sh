#!/usr/bin/env bash
# litdata's StreamingDataLoader has the state_dict that Lightning's Trainer saves and loads, so that a run can go on within
# an epoch. The rest of that epoch is right, but the epoch after it has no batch at all, and nothing is said: Lightning
# stops after the number of batches that it expects, so that the loader's iterator is never exhausted, and the loader
# takes the next epoch for the resumed one still. Iterated to the end outside the Trainer, the same loader is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet lightning==2.6.6 litdata==0.2.76
cat > "$folder/main.py" <<'PYTHON'
import sys
from importlib.metadata import version

import litdata
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.batches = {}

    def training_step(self, batch, batch_idx):
        self.batches[self.current_epoch] = self.batches.get(self.current_epoch, 0) + 1
        return self.layer(batch[:, None].float()).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def number(index):
    return index


def loader(folder):
    return litdata.StreamingDataLoader(litdata.StreamingDataset(f"{folder}/data"), batch_size=4)


def fit(folder, ckpt_path=None):
    callbacks = [ModelCheckpoint(f"{folder}/saved", "{step}", save_top_k=-1, every_n_train_steps=1)]
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=callbacks,
    )
    module = Module()
    trainer.fit(module, loader(folder), ckpt_path=ckpt_path)
    return module.batches


if __name__ == "__main__":
    folder = sys.argv[1]
    litdata.optimize(number, list(range(24)), f"{folder}/data", chunk_size=4, num_workers=1)
    whole = fit(folder)
    resumed = fit(folder, f"{folder}/saved/step=2.ckpt")
    alone, again = loader(folder), loader(folder)
    first = iter(alone)
    next(first), next(first)
    again.load_state_dict(alone.state_dict())
    print("lightning", version("lightning"), "litdata", version("litdata"))
    print("batches of each epoch, of a run that did not stop: ", whole)
    print("expected when resumed after the second batch:      ", {0: 4, 1: 6, 2: 6})
    print("seen:                                              ", resumed)
    print("the same loader outside the Trainer:               ", [len(list(again)) for _ in range(3)])
    sys.exit(whole != {0: 6, 1: 6, 2: 6} or resumed != {0: 4, 2: 6})
PYTHON
"$folder/venv/bin/python" "$folder/main.py" "$folder" 2>/dev/null

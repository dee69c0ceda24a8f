#!/usr/bin/env bash
# Trainer's limits are annotated as a whole number of batches or a share of them, int or float, and jsonargparse takes the
# first of the two types that a word can be read as. Python keeps one copy of a union such as Optional[Union[int, float]],
# in the order in which it was first written anywhere. scikit-learn has it the other way round: where a program imports
# it before Lightning, "1" becomes 1.0, and a run that was limited to one batch takes all of them, without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet lightning==2.6.6 "jsonargparse[signatures]==4.53.0" scikit-learn==1.9.1
cd "$folder"
cat > train.py <<'PYTHON'
import sys

if sys.argv.pop(1) == "first":
    import sklearn.metrics
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

import sklearn.metrics


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(5, 2)))


cli = LightningCLI(Module, Data, save_config_callback=None)
print(cli.trainer.global_step)
PYTHON
steps() {
  venv/bin/python train.py "$1" fit --trainer.limit_train_batches 1 --trainer.max_epochs 1 --trainer.accelerator cpu \
    --trainer.logger false --trainer.enable_checkpointing false --trainer.enable_progress_bar false \
    --trainer.enable_model_summary false 2>/dev/null | tail -1
}
venv/bin/python -m pip list 2>/dev/null | grep -E "^(jsonargparse|lightning|scikit-learn) "
echo "--trainer.limit_train_batches 1 on five batches: expected 1 step, whatever is imported first"
after=$(steps after) first=$(steps first)
echo "scikit-learn imported after Lightning:  $after"
echo "scikit-learn imported before Lightning: $first"
[ "$after" = 1 ] && [ "$first" = 5 ]

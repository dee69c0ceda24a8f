#!/usr/bin/env bash
# timm's BatchNormAct2d is a batch normalisation that holds the activation behind it too. Lightning's Trainer(
# sync_batchnorm=True) calls torch.nn.SyncBatchNorm.convert_sync_batchnorm, which takes it for a plain one: the activation
# is no longer called and the network is another one, without a word. timm.layers.convert_sync_batchnorm keeps it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet timm==1.0.28 lightning==2.6.6
"$folder/venv/bin/python" - <<'PYTHON'
import copy
import sys

import lightning
import timm
import torch
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from timm.layers import convert_sync_batchnorm

torch.manual_seed(0)
network = timm.create_model("efficientnet_b0", num_classes=10).eval()
images = torch.randn(2, 3, 64, 64)

with torch.no_grad():
    before = network(images)
    by_lightning = TorchSyncBatchNorm().apply(copy.deepcopy(network)).eval()
    by_timm = convert_sync_batchnorm(copy.deepcopy(network)).eval()
    apart = [(model(images) - before).abs().max().item() / before.abs().max().item() for model in (by_lightning, by_timm)]
print("lightning", lightning.__version__, "timm", timm.__version__, "torch", torch.__version__)
print("expected: outputs in eval mode as before the conversion")
print(f"seen: off by {apart[0]:.3g} times the largest output as Lightning converts, by {apart[1]:.3g} as timm does")
sys.exit(not (apart[0] > 0.01 and apart[1] < 1e-5))
PYTHON

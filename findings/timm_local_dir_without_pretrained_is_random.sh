#!/usr/bin/env bash
# timm.create_model("local-dir:FOLDER") reads the architecture and the class names of a folder that timm's own
# save_for_hf wrote, and leaves the weights beside them: they are read only with pretrained=True, as for a name of timm's
# own, although nothing but that folder was named. Nothing warns of the random weights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "timm==1.0.31" "torch==2.11.0" "torchvision==0.26.0" "numpy==2.2.6"
cat > "$folder/local.py" <<'PYTHON'
import sys
import warnings

import timm
import torch
from timm.models import save_for_hf

net = timm.create_model("resnet10t", num_classes=3).eval()
save_for_hf(net, "saved", safe_serialization=True)
images = torch.randn(2, 3, 64, 64)


def same(**arguments):
    with warnings.catch_warnings(record=True) as warned, torch.no_grad():
        warnings.simplefilter("always")
        loaded = timm.create_model("local-dir:saved", **arguments).eval()
        return torch.allclose(loaded(images), net(images)), [str(warning.message) for warning in warned]


plain, asked = same(), same(pretrained=True)
print("timm", timm.__version__)
print("expected: the outputs of the saved network, or a warning")
print(f"seen without pretrained: the same outputs {plain[0]}, warnings {plain[1]}; with pretrained=True: {asked[0]}")
sys.exit(not (not plain[0] and plain[1] == [] and asked[0]))
PYTHON
cd "$folder" && HF_HUB_OFFLINE=1 venv/bin/python local.py

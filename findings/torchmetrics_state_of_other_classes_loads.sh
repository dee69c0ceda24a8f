#!/usr/bin/env bash
# A torchmetrics metric takes over whatever a state dictionary holds: load_state_dict(strict=True) of a metric of four
# classes accepts the state of one of six without a word, where a torch module would report the sizes, and computes six
# values; a state that is missing altogether is not reported either.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torchmetrics==1.9.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import torchmetrics
from torchmetrics.classification import MulticlassAccuracy


def metric(classes):
    made = MulticlassAccuracy(num_classes=classes, average=None)
    made.persistent(True)
    return made


six, four = metric(6), metric(4)
six.update(torch.arange(6), torch.arange(6))
four.update(torch.arange(4), torch.arange(4))
print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__)
print("expected: an error that names the sizes, as torch.nn.Linear's load_state_dict raises one")
loaded = four.load_state_dict(six.state_dict(), strict=True)
print("seen:", loaded, "and", len(four.compute()), "values of a metric of", four.num_classes, "classes")
missing = four.load_state_dict({}, strict=True)
print("seen with nothing to load, strict:", missing)
sys.exit(not (len(four.compute()) == 6 and not loaded.missing_keys and not missing.missing_keys))
PYTHON

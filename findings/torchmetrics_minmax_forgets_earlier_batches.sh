#!/usr/bin/env bash
# torchmetrics' MinMaxMetric wraps a metric and reports its value beside its least and largest one. Called batch by batch
# it forgets all batches but the last: compute() then gives the last batch's value as "raw", where the same metric alone,
# or updated by update(), gives that of all samples.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torchmetrics==1.9.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import torchmetrics
from torchmetrics import MeanMetric, MinMaxMetric

BATCHES = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor([10.0, 10.0])]

alone, updated, called = MeanMetric(), MinMaxMetric(MeanMetric()), MinMaxMetric(MeanMetric())
for batch in BATCHES:
    alone(batch)
    updated.update(batch)
    called(batch)
print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__)
expected, by_update, by_call = (
    value.item() for value in (alone.compute(), updated.compute()["raw"], called.compute()["raw"])
)
print("expected, the mean of all six numbers, as MeanMetric alone has it when called:", expected)
print("seen: MinMaxMetric updated:", by_update, "and called:", by_call)
sys.exit(not (expected == by_update == 5.0 and by_call == 10.0))
PYTHON

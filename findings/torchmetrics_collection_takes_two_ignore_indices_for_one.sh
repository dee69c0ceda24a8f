#!/usr/bin/env bash
# A torchmetrics MetricCollection computes metrics together whose states are equal after the first batch. Two that differ
# in ignore_index have equal states if that batch has no sample to leave out; from then on one of them is computed and
# both report its value, without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torchmetrics==1.9.0
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import torchmetrics
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

# Predicted and true classes; the samples of class 0 come in the second batch.
BATCHES = [([1, 2, 1, 2], [1, 2, 2, 2]), ([1, 1, 2, 0], [0, 0, 2, 0])]


def accuracies(**options):
    kind = {"num_classes": 3, "average": "micro"}
    metrics = {"all": MulticlassAccuracy(**kind), "without 0": MulticlassAccuracy(**kind, ignore_index=0)}
    collection = MetricCollection(metrics, **options)
    for predicted, true in BATCHES:
        collection.update(torch.tensor(predicted), torch.tensor(true))
    return {name: round(value.item(), 3) for name, value in collection.compute().items()}


print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__)
apart, grouped = accuracies(compute_groups=False), accuracies()
print("expected, as without compute groups: 5 of 8 and 4 of 5:", apart)
print("seen:", grouped)
sys.exit(not (apart == {"all": 0.625, "without 0": 0.8} and grouped == {"all": 0.625, "without 0": 0.625}))
PYTHON

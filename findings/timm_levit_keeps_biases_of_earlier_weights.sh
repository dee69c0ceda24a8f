#!/usr/bin/env bash
# LeViT-like networks of timm (levit, tiny_vit, efficientformer) keep the attention biases that they gathered for the
# first images in eval mode, and forget them in train() alone. Weights that are loaded into such a network later are
# used without their attention biases, without a word, so that it answers otherwise than a new one with these weights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet timm==1.0.28
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import timm
import torch


def network(seed):
    torch.manual_seed(seed)
    model = timm.create_model("levit_128s", num_classes=10).eval()
    with torch.no_grad():  # biases start at 0, as training leaves them nowhere
        for name, parameter in model.named_parameters():
            if name.endswith("attention_biases"):
                parameter.normal_()
    return model


images = torch.randn(2, 3, 224, 224)
with torch.no_grad():
    first, second = network(0), network(1)
    expected = second(images)
    first(images)
    first.load_state_dict(second.state_dict())
    largest = expected.abs().max().item()
    stale = (first(images) - expected).abs().max().item() / largest
    fresh = (first.train().eval()(images) - expected).abs().max().item() / largest
print("timm", timm.__version__, "torch", torch.__version__)
print("expected: outputs of the loaded weights, so that they differ by 0")
print(f"seen: off by {stale:.3g} times the largest output, and by {fresh:.3g} after train().eval()")
sys.exit(not (stale > 0.01 and fresh == 0))
PYTHON

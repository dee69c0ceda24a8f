#!/usr/bin/env bash
# torch.backends.cuda.matmul.allow_tf32 = True lets CUDA round matrix products to TF32, and leaves alone the setting of
# oneDNN, which multiplies on the CPU. torch.get_float32_matmul_precision() then says "high". To set just that value, as
# code does that puts back what it read, allows TF32 to oneDNN too, so that products on a CPU that can may be rounded. One
# would expect no change: the two are documented to be equivalent, and to concern CUDA alone. No GPU is needed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy==2.2.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch


def settings():
    return {
        "CUDA": torch.backends.cuda.matmul.fp32_precision,
        "oneDNN": torch.backends.mkldnn.matmul.fp32_precision,
        "get_float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


print("torch", torch.__version__)
torch.backends.cuda.matmul.allow_tf32 = True
before = settings()
precision = torch.get_float32_matmul_precision()
torch.set_float32_matmul_precision(precision)
at_once = settings()

torch.backends.mkldnn.matmul.fp32_precision = "none"
torch.backends.cuda.matmul.allow_tf32 = True
again = settings()
precision = torch.get_float32_matmul_precision()
torch.set_float32_matmul_precision("highest")
torch.set_float32_matmul_precision(precision)
after_highest = settings()

print("expected, as after allow_tf32 = True:", before)
print("seen, what was read set back:        ", at_once)
print('seen, set back after "highest":      ', after_highest)
allowed = {"CUDA": "tf32", "oneDNN": "none", "get_float32_matmul_precision": "high"}
sys.exit(not (before == again == allowed and at_once == after_highest == {**allowed, "oneDNN": "tf32"}))
PYTHON

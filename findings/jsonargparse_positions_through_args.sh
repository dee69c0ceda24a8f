#!/usr/bin/env bash
# jsonargparse, which LightningCLI reads the options of models and data from, follows *args and **kwargs into the base
# class. Where a subclass passes leading arguments by position to a class that has an option of its own beside *args,
# the positions are counted on a list in which that option comes first: the option is lost, and an argument that is
# bound already is offered, which ends in a TypeError when it is given.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "jsonargparse[signatures]==4.53.0"
cat > "$folder/images.py" <<'PYTHON'
import sys

import jsonargparse


class Images:
    def __init__(self, size: int, mean: float, shots: int = 0) -> None:
        self.size, self.mean, self.shots = size, mean, shots


class Flipped(Images):
    def __init__(self, *args, flip: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.flip = flip


class Digits(Flipped):
    def __init__(self, classes: int = 10, **kwargs) -> None:
        super().__init__(8, 0.5, **kwargs)
        self.classes = classes


parser = jsonargparse.ArgumentParser()
offered = parser.add_class_arguments(Digits, "data")
Digits(flip=True, shots=5)  # is fine in Python
print("jsonargparse", jsonargparse.__version__)
print("expected: options classes, flip and shots, since size and mean are bound by position")
print("seen:", ", ".join(offered))
try:
    parser.instantiate(parser.parse_args(["--data.mean=0.1"]))
    raised = None
except TypeError as error:
    raised = str(error)
print("seen with --data.mean=0.1:", raised)
names = {name.removeprefix("data.") for name in offered}
sys.exit(not ("flip" not in names and "mean" in names and raised and "multiple values" in raised))
PYTHON
"$folder/venv/bin/python" "$folder/images.py"

"""The examples in docstrings run, and what a user meets first has one."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WITH_EXAMPLES = [
    ".".join(["ncfinetune", *path.relative_to(ROOT).with_suffix("").parts]).replace(
        "ncfinetune.ncfinetune.", "ncfinetune."
    )
    for folder in ("ncfinetune", "callbacks", "datamodules")
    for path in sorted((ROOT / folder).glob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_of_a_module_give_what_they_say(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
    assert result.attempted > 0


@pytest.mark.parametrize(
    "name",
    [
        "Backbone",
        "FineTuner",
        "SupCon",
        "Supervised",
        "callbacks.NeuralCollapseTracker",
        "callbacks.OnlineProbe",
        "datamodules.ImageFolder",
        "losses.contrastive_loss",
        "metrics.NC1",
        "metrics.neural_collapse",
    ],
)
def test_what_a_user_meets_first_has_an_example(name: str) -> None:
    module, _, attribute = f"ncfinetune.{name}".rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    assert doctest.DocTestFinder(recurse=False).find(found)[0].examples

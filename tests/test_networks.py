"""Networks chosen for their oddity, by the six checks of experiments/benchmarks/networks.py."""

import importlib
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "experiments" / "benchmarks"
# What is odd about each: windows, other axes, late class tokens, tuples, lists, shared tensors, heads, units.
ODD = [
    "cait", "coat", "convit", "crossvit", "dla", "dpn", "efficientvim", "efficientvit_msra", "fasternet", "gcvit",
    "hgnet", "iformer", "levit", "mobilenetv3", "nest", "pit", "repvit", "selecsls", "shvit",
    "swin_transformer_v2_cr", "tiny_vit",
    "tnt", "volo", "xception_aligned", "xcit",
]  # fmt: skip


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("networks")


@pytest.mark.slow
@pytest.mark.parametrize("module", ODD)
def test_odd_networks_of_timm(checks: Any, module: str) -> None:
    row = checks.timm_row(*checks.TIMM[module])
    assert [f"{check}: {said}" for check, said in row.items() if said.startswith("FAIL")] == []


@pytest.mark.parametrize("kind", ["beit", "dinov2", "swin", "pvt", "clip", "levit", "cvt"])
@pytest.mark.filterwarnings("ignore")
def test_tiny_networks_of_hugging_face(checks: Any, kind: str) -> None:
    sizes, side = checks.TRANSFORMERS[kind]
    row = checks.foreign_row(kind, lambda: checks._transformer(kind, sizes), side)
    assert row["layers"].startswith("ok")
    assert row["pooling"].startswith("ok")

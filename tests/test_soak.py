"""A dozen kills of the soak, at places that are named."""

import importlib.util
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "experiments" / "benchmarks" / "soak.py"
TRIALS = {
    "layer, cache on disk": [("cache half written", 2), ("before the cache's rename", 1), ("delta half written", 1)],
    "ce, shards with 2 workers, each step": [("checkpoint half written", 8), ("training", 5), ("after a rename", 9)],
    "SupCon, digits, each 3 steps": [("tracker's pass", 8), ("validation", 4), ("event file half written", 20)],
    "export": [("export half written", 1)],
    "predict": [("predictions half written", 2), ("before a rename", 1)],
}
# Where SIGTERM comes in place of SIGKILL.
TERMINATED = ("training", "validation")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["soak"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_dozen_kills_lose_nothing(script: Any, tmp_path: Path) -> None:
    soak = script.Soak(tmp_path)
    for number, (what, places) in enumerate(TRIALS.items()):
        kills = [
            script.Kill(place, signal.SIGTERM if place in TERMINATED else signal.SIGKILL, nth) for place, nth in places
        ]
        row = soak.trial(number, what, kills, says=True)
        assert row["kills"] == "; ".join(map(str, kills)), row
        assert [row[name] for name in ("end", "numbers", "left", "fault")] == ["equal", "equal", "", ""], row


def test_a_row_is_counted_where_it_belongs(script: Any) -> None:
    kills = [script.Kill("before a rename", signal.SIGKILL, 12), script.Kill(script.RANDOM, signal.SIGTERM, share=0.3)]
    row = {"what": "export", "kills": "; ".join(map(str, kills)), "end": "equal", "numbers": "other"}
    table = script.tables([row]).splitlines()
    assert "| export | 1 | 2 | 1 | 1 | 0 | 0 |" in table
    assert "| all | 1 | 2 | 1 | 1 | 0 | 0 |" in table
    assert "| before a rename | 1 | 0 |" in table
    assert "| random moment | 0 | 1 |" in table

"""The rooms of the package and the arrows between them; what is installed; what the front door imports."""

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

import ncfinetune

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "ncfinetune"

# Which of our modules each module may import. What is not listed here may not exist.
IMPORTS = {
    "ncfinetune": {"backbone", "contrastive", "finetune", "learner", "supervised"},
    "ncfinetune.__main__": {"cli"},
    "ncfinetune.accumulator": {"inputs"},
    "ncfinetune.adversarial": {"passes"},
    "ncfinetune.atomic": {"checksums"},
    "ncfinetune.backbone": {"blocks", "layers", "pool_search", "pooling", "weights"},
    "ncfinetune.blocks": set(),
    "ncfinetune.cache": {"backbone", "checksums", "passes", "store", "tail"},
    "ncfinetune.calibration": set(),
    "ncfinetune.channels": {"pooling", "tracing"},
    "ncfinetune.checksums": set(),
    "ncfinetune.classifier": {"backbone", "inputs", "learner"},
    "ncfinetune.cli": {"", "backbone", "report", "trainer_cli", "weights"},
    "ncfinetune.cli_errors": set(),
    "ncfinetune.closed_forms": set(),
    "ncfinetune.collapse": {"moments"},
    "ncfinetune.contrastive": {"backbone", "heads", "inputs", "learner", "losses"},
    "ncfinetune.copies": set(),
    "ncfinetune.delta": {"atomic", "backbone", "checksums", "weights"},
    "ncfinetune.events": set(),
    "ncfinetune.finetune": {
        "backbone",
        "cache",
        "checksums",
        "classifier",
        "delta",
        "frozen",
        "heads",
        "layers",
        "learner",
        "passes",
        "pooling",
        "store",
    },
    "ncfinetune.folds": set(),
    "ncfinetune.frozen": {"checksums", "layers"},
    "ncfinetune.heads": {"moments"},
    "ncfinetune.inputs": set(),
    "ncfinetune.interruptions": {"resume"},
    "ncfinetune.layers": {"blocks"},
    "ncfinetune.learner": {"backbone", "checksums", "inputs", "resume", "schedule", "weights"},
    "ncfinetune.losses": set(),
    "ncfinetune.metric_base": set(),
    "ncfinetune.metrics": {"collapse", "inputs", "metric_base", "moments", "sketch"},
    "ncfinetune.moments": {"accumulator", "inputs", "scatter"},
    "ncfinetune.passes": {"copies"},
    "ncfinetune.pool_search": {"channels", "passes", "pooling", "tokens", "tracing"},
    "ncfinetune.pooling": set(),
    "ncfinetune.predictions": {"atomic"},
    "ncfinetune.probes": {"closed_forms"},
    "ncfinetune.report": {"atomic", "events"},
    "ncfinetune.resume": set(),
    "ncfinetune.safety": set(),
    "ncfinetune.scatter": set(),
    "ncfinetune.schedule": set(),
    "ncfinetune.sketch": {"accumulator"},
    "ncfinetune.store": {"atomic", "checksums"},
    "ncfinetune.supervised": {"adversarial", "backbone", "classifier", "heads", "inputs", "learner", "losses"},
    "ncfinetune.tail": set(),
    "ncfinetune.tokens": {"pooling", "tracing"},
    "ncfinetune.tracing": {"pooling"},
    "ncfinetune.trainer_cli": {"atomic", "cli_errors", "interruptions", "learner", "predictions", "safety", "weights"},
    "ncfinetune.weights": {"atomic", "checksums"},
    "callbacks": {".probe", ".tracker"},
    "callbacks.adapters": {"inputs", "layers", "pooling"},
    "callbacks.classify": {"inputs"},
    "callbacks.figures": {"collapse"},
    "callbacks.layer_metrics": {"collapse", "layers", "metrics", "moments"},
    "callbacks.observer": {".", ".adapters", ".pool_finder", "layers", "passes", "pooling"},
    "callbacks.pool_finder": {"pool_search", "pooling", "tracing"},
    "callbacks.probe": {".", ".adapters", ".classify", ".observer", ".schedule", "inputs", "layers", "passes"},
    "callbacks.schedule": set(),
    "callbacks.tracker": {".", ".adapters", ".layer_metrics", ".observer", ".schedule", "layers", "moments", "passes"},
    "datamodules": {".base", ".digits", ".files", ".recipes", ".shards", ".unlabelled", ".vision"},
    "datamodules.base": {".decoding", ".images", ".listing", ".loading", ".recipes", ".splits"},
    "datamodules.decoding": set(),
    "datamodules.digits": {".base", ".images", ".recipes", ".splits"},
    "datamodules.files": {".base", ".decoding", ".images", ".labels", ".listing", ".splits"},
    "datamodules.images": {".decoding", ".recipes", ".splits"},
    "datamodules.labels": {".listing"},
    "datamodules.launches": {".transforms"},
    "datamodules.listing": set(),
    "datamodules.loading": {".images"},
    "datamodules.recipes": {".launches", ".transforms", ".trivial"},
    "datamodules.shards": {".base", ".decoding", ".files", ".images", ".listing", ".recipes"},
    "datamodules.splits": set(),
    "datamodules.transforms": set(),
    "datamodules.trivial": {".transforms"},
    "datamodules.unlabelled": {".base", ".images"},
    "datamodules.vision": {".base", ".files", ".images"},
}


def _modules() -> dict[str, Path]:
    files = [path for folder in ("ncfinetune", "callbacks", "datamodules") for path in (ROOT / folder).rglob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def _imports(path: Path) -> set[str]:
    """What a file imports of ours: ``backbone`` for ncfinetune.backbone, ``.base`` for a neighbour, '' for the top."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.ImportFrom) and node.module == "ncfinetune":
            names = {alias.name for alias in node.names}
            found |= {name if name in _core_names() else "" for name in names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ncfinetune."):
            found.add(node.module.removeprefix("ncfinetune."))
        elif isinstance(node, ast.Import):
            found |= {"" for alias in node.names if alias.name.split(".")[0] == "ncfinetune"}
    return found


def _core_names() -> set[str]:
    return {path.stem for path in CORE.glob("*.py")}


def test_every_module_has_its_place_in_the_import_table() -> None:
    assert set(_modules()) == set(IMPORTS)


@pytest.mark.parametrize("module", IMPORTS)
def test_module_imports_only_what_the_table_allows(module: str) -> None:
    assert _imports(_modules()[module]) <= IMPORTS[module]


def test_every_package_folder_is_installed() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    folders = {path.parent for path in _modules().values()}
    mapped = dict(line.split(" = ") for line in config["options"]["package_dir"].split("\n") if line)
    assert set(mapped) == set(config["options"]["packages"].split())
    assert {ROOT / folder for folder in mapped.values()} == folders


def test_public_names_can_be_imported_and_are_all_there_are() -> None:
    assert [name for name in ncfinetune.__all__ if not hasattr(ncfinetune, name)] == []
    with pytest.raises(AttributeError, match="no attribute 'Superviced'; it has Backbone, FineTuner"):
        _ = ncfinetune.Superviced


def test_help_does_not_import_torch() -> None:
    code = "import sys; from ncfinetune.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "ncfinetune COMMAND" in done.stdout

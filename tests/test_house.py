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
    "ncfinetune.__main__": {"", "backbone", "cli", "report"},
    "ncfinetune.adversarial": set(),
    "ncfinetune.backbone": {"layers"},
    "ncfinetune.cli": {"", "predictions"},
    "ncfinetune.collapse": {"moments"},
    "ncfinetune.cache": {"backbone", "delta", "plain", "store", "tail"},
    "ncfinetune.delta": {"backbone"},
    "ncfinetune.finetune": {"", "backbone", "cache", "delta", "heads", "layers", "learner", "plain", "store"},
    "ncfinetune.heads": {"collapse"},
    "ncfinetune.contrastive": {"backbone", "heads", "learner", "losses"},
    "ncfinetune.layers": set(),
    "ncfinetune.learner": {"backbone", "schedule"},
    "ncfinetune.losses": set(),
    "ncfinetune.metrics": {"", "collapse", "moments"},
    "ncfinetune.moments": set(),
    "ncfinetune.plain": set(),
    "ncfinetune.predictions": set(),
    "ncfinetune.report": set(),
    "ncfinetune.store": {"delta"},
    "ncfinetune.tail": set(),
    "callbacks.batches": {"layers"},
    "callbacks.features": {"layers"},
    "callbacks.figures": {"collapse"},
    "callbacks.statistics": {"collapse", "layers", "metrics", "moments"},
    "callbacks.tracker": {"collapse", "layers", "plain", ".", ".features", ".statistics"},
    "datamodules": {".base", ".digits", ".files", ".recipes", ".shards", ".vision"},
    "datamodules.base": {".images", ".recipes", ".splits"},
    "datamodules.digits": {".base", ".images", ".recipes", ".splits"},
    "datamodules.files": {".base", ".images", ".splits"},
    "datamodules.images": {".recipes", ".splits"},
    "datamodules.recipes": {".transforms", ".trivial"},
    "datamodules.shards": {".base", ".files", ".images", ".recipes"},
    "datamodules.splits": set(),
    "datamodules.transforms": set(),
    "datamodules.trivial": {".transforms"},
    "datamodules.vision": {".base", ".files", ".images"},
    "ncfinetune.schedule": set(),
    "ncfinetune.supervised": {"adversarial", "backbone", "heads", "learner", "losses"},
    "callbacks": {".probe", ".tracker"},
    "callbacks.probe": {"layers", "plain", ".batches", ".features"},
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
    code = "import sys; from ncfinetune.__main__ import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "ncfinetune COMMAND" in done.stdout

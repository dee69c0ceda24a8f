"""The rooms of the package and the arrows between them; what is installed; what the front door imports."""

import ast
import configparser
import graphlib
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import ncfinetune

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "ncfinetune"
OUTER = {"callbacks", "datamodules"}
LEARNERS = {"learner", "classifier", "supervised", "contrastive", "finetune"}

# Which of our modules each module imports, no more and no fewer, by the names below ncfinetune. Exactly these exist.
IMPORTS = {
    "ncfinetune": {"backbone", "contrastive", "finetune", "learner", "supervised"},
    "__main__": {"cli"},
    "accumulator": {"inputs"},
    "adversarial": {"passes"},
    "atomic": set(),
    "averages": set(),
    "backbone": {"blocks", "built_in", "layers", "mode_caches", "pool_search", "pooling", "weight_files", "weights"},
    "bank": {"atomic", "backbone", "checksums", "layers", "loaders", "samples", "texts", "weight_files"},
    "blocks": set(),
    "built_in": set(),
    "cache": {"checksums", "loaders", "passes", "samples", "split", "store"},
    "calibration": set(),
    "channels": {"pooling", "tracing"},
    "checkpoint_io": {"atomic", "checksums", "texts"},
    "checksums": set(),
    "chosen": {"layers"},
    "class_help": {"cli_errors"},
    "classifier": {"backbone", "copies", "image_predictions", "inputs", "learner", "loaders", "schedule", "texts"},
    "cli": {"backbone", "ncfinetune", "overlays", "quiet", "trainer_cli"},
    "cli_errors": {"overlays", "texts"},
    "closed_forms": set(),
    "closed_trials": {"folds", "probes", "skips", "trials"},
    "collapse": {"moments"},
    "command_trainer": set(),
    "conclusion": {"checkpoint_io", "classifier", "resume"},
    "contrastive": {"backbone", "gathering", "heads", "inputs", "learner", "losses"},
    "copies": set(),
    "csv_metrics": {"events", "texts"},
    "delta": {"atomic", "checksums", "weight_files"},
    "deployed": {"atomic", "classifier", "learner", "timm_network"},
    "evaluating": {"atomic", "evaluation", "evaluation_figures", "events", "texts"},
    "evaluation": {"atomic", "calibration", "predictions", "sample_statistics"},
    "evaluation_figures": {"evaluation"},
    "events": {"tfrecords"},
    "export": {
        "deployed",
        "learner",
        "model_card",
        "restoring",
        "texts",
        "timm_folder",
        "timm_network",
        "weight_files",
        "weights",
    },
    "finders": set(),
    "finetune": {
        "averages",
        "backbone",
        "cache",
        "classifier",
        "gathering",
        "heads",
        "knobs",
        "launches",
        "learner",
        "linearised",
        "loaders",
        "partly_frozen",
        "passes",
        "probes",
        "schedule",
        "skips",
        "split",
        "store",
    },
    "folds": {"inputs"},
    "found": set(),
    "frozen": {"averages", "checksums"},
    "gathering": set(),
    "grouping": {"runs", "settings", "texts"},
    "heads": {"moment_accumulator", "moments", "probes"},
    "image_predictions": {"passes", "predictions"},
    "inputs": set(),
    "interruptions": {"resume"},
    "knobs": {"backbone", "cache", "heads", "split"},
    "lab": {"backbone", "bank", "cli_errors"},
    "launches": set(),
    "layers": {"blocks", "texts"},
    "last_weights": {"loop_progress"},
    "learner": {
        "averages",
        "backbone",
        "built_in",
        "checksums",
        "finders",
        "inputs",
        "last_weights",
        "launches",
        "loop_progress",
        "resume",
        "sample_mean",
        "schedule",
        "synchronised",
        "weight_files",
    },
    "linearised": {"backbone", "folds", "passes", "probes"},
    "loaders": {"copies", "samples"},
    "log_folders": {"csv_metrics"},
    "loop_progress": set(),
    "losses": {"gathering"},
    "metric_base": set(),
    "metrics": {"collapse", "inputs", "metric_base", "moment_accumulator", "moments", "sketch"},
    "model_card": {
        "classifier",
        "contrastive",
        "learner",
        "ncfinetune",
        "restoring",
        "runs",
        "sample_statistics",
        "settings",
        "texts",
    },
    "mode_caches": set(),
    "moment_accumulator": {"accumulator", "inputs", "moments", "scatter"},
    "moments": {"inputs", "scatter"},
    "overlays": set(),
    "partly_frozen": {
        "built_in",
        "chosen",
        "classifier",
        "delta",
        "frozen",
        "knobs",
        "mode_caches",
        "passes",
        "timm_network",
    },
    "passes": {"copies", "launches", "loaders", "mode_caches", "progress", "samples"},
    "pool_search": {"channels", "passes", "pooling", "tokens", "tracing"},
    "pooling": set(),
    "predicting": {"evaluation_figures", "predictions", "samples", "texts"},
    "prediction_commands": {"evaluating", "loaders", "passes", "predicting", "resumed_folder", "settings", "trained"},
    "predictions": {"atomic"},
    "probes": {"calibration", "closed_forms", "folds", "inputs"},
    "progress": set(),
    "quiet": set(),
    "report": {"atomic", "grouping", "report_figures", "report_table", "runs"},
    "report_figures": {"grouping", "sample_statistics", "report_table", "runs", "settings"},
    "sample_statistics": set(),
    "report_table": {"grouping", "sample_statistics", "runs", "settings"},
    "restoring": {"contrastive", "delta", "finetune", "learner", "resume", "supervised", "weight_files"},
    "resume": {"loop_progress", "passes"},
    "resumed_folder": {"log_folders", "texts"},
    "runs": {"csv_metrics", "events", "settings"},
    "safety": set(),
    "sample_mean": set(),
    "samples": set(),
    "saved_config": {"atomic", "found"},
    "scan": {"atomic", "bank", "cli_errors", "lab", "scores"},
    "scatter": {"inputs"},
    "schedule": set(),
    "scores": {"bank", "collapse", "folds", "layers", "probes", "sample_statistics", "transferability"},
    "settings": set(),
    "sketch": {"accumulator"},
    "skips": {"backbone", "layers", "passes", "probes"},
    "split": {"backbone", "layers", "pooling", "store", "tail"},
    "store": {"atomic", "checksums"},
    "suggest": {
        "atomic",
        "bank",
        "closed_trials",
        "folds",
        "lab",
        "layers",
        "linearised",
        "sample_statistics",
        "trials",
    },
    "summary": set(),
    "supervised": {"adversarial", "backbone", "classifier", "heads", "inputs", "learner", "losses"},
    "synchronised": set(),
    "tail": set(),
    "texts": set(),
    "tfrecords": set(),
    "timm_folder": {
        "atomic",
        "contrastive",
        "finetune",
        "learner",
        "supervised",
        "texts",
        "timm_network",
        "weight_files",
    },
    "timm_network": {"backbone", "delta", "weight_files"},
    "tokens": {"pooling", "tracing"},
    "tracing": {"pooling"},
    "trained": {"checkpoint_io", "log_folders", "resumed_folder", "runs", "settings", "weight_files"},
    "trainer_cli": {
        "atomic",
        "checkpoint_io",
        "class_help",
        "classifier",
        "cli_errors",
        "command_trainer",
        "conclusion",
        "found",
        "interruptions",
        "launches",
        "learner",
        "log_folders",
        "prediction_commands",
        "predictions",
        "resumed_folder",
        "safety",
        "saved_config",
        "settings",
        "summary",
        "trained",
        "weight_files",
    },
    "transferability": {"inputs"},
    "trials": {"backbone", "calibration", "finetune", "probes"},
    "weight_files": {"atomic", "checksums"},
    "weights": {"texts", "weight_files"},
    "callbacks": {"callbacks.probe", "callbacks.tracker"},
    "callbacks.adapters": {"inputs", "layers", "pooling"},
    "callbacks.classify": {"inputs", "probes", "transferability"},
    "callbacks.features": {"callbacks.adapters", "callbacks.observer", "gathering", "inputs", "loaders", "passes"},
    "callbacks.figures": {"collapse"},
    "callbacks.layer_metrics": {"collapse", "inputs", "layers", "metrics", "moment_accumulator", "moments"},
    "callbacks.logs": {"callbacks.schedule"},
    "callbacks.meter": {"callbacks.layer_metrics", "callbacks.observer", "moments"},
    "callbacks.notices": {"callbacks.layer_metrics"},
    "callbacks.hook": set(),
    "callbacks.observer": {
        "callbacks.adapters",
        "callbacks.hook",
        "callbacks.pool_finder",
        "inputs",
        "layers",
        "loaders",
        "pooling",
    },
    "callbacks.pages": set(),
    "callbacks.pictures": set(),
    "callbacks.pool_finder": {"callbacks.hook", "passes", "pool_search", "pooling", "tracing"},
    "callbacks.probe": {
        "callbacks.adapters",
        "callbacks.classify",
        "callbacks.features",
        "callbacks.logs",
        "callbacks.observer",
        "callbacks.schedule",
        "inputs",
        "layers",
        "passes",
    },
    "callbacks.records": {"callbacks.figures"},
    "callbacks.schedule": {"loop_progress"},
    "callbacks.tracker": {
        "callbacks.adapters",
        "callbacks.figures",
        "callbacks.layer_metrics",
        "callbacks.logs",
        "callbacks.meter",
        "callbacks.notices",
        "callbacks.observer",
        "callbacks.pages",
        "callbacks.pictures",
        "callbacks.records",
        "callbacks.schedule",
        "launches",
        "layers",
        "loop_progress",
        "passes",
    },
    "datamodules": {
        "datamodules.base",
        "datamodules.digits",
        "datamodules.files",
        "datamodules.indexed",
        "datamodules.recipes",
        "datamodules.shards",
        "datamodules.unlabelled",
        "datamodules.vision",
    },
    "datamodules.augmenting": {"datamodules.images", "datamodules.recipes"},
    "datamodules.base": {
        "datamodules.augmenting",
        "datamodules.decoding",
        "datamodules.images",
        "datamodules.listing",
        "datamodules.loading",
        "datamodules.recipes",
    },
    "datamodules.decoding": set(),
    "datamodules.digits": {"datamodules.images", "datamodules.indexed", "datamodules.recipes", "datamodules.splits"},
    "datamodules.files": {
        "datamodules.decoding",
        "datamodules.images",
        "datamodules.indexed",
        "datamodules.labels",
        "datamodules.listing",
    },
    "datamodules.images": {"datamodules.decoding", "datamodules.recipes", "datamodules.splits"},
    "datamodules.indexed": {"datamodules.base", "datamodules.images", "datamodules.loading", "datamodules.splits"},
    "datamodules.labels": {"datamodules.listing"},
    "datamodules.launches": {"datamodules.transforms"},
    "datamodules.listing": set(),
    "datamodules.loading": {"datamodules.images", "datamodules.splits"},
    "datamodules.recipes": {"datamodules.launches", "datamodules.transforms", "datamodules.trivial"},
    "datamodules.shards": {
        "datamodules.base",
        "datamodules.decoding",
        "datamodules.files",
        "datamodules.images",
        "datamodules.listing",
        "datamodules.recipes",
    },
    "datamodules.splits": set(),
    "datamodules.transforms": set(),
    "datamodules.trivial": {"datamodules.transforms"},
    "datamodules.unlabelled": {"datamodules.base", "datamodules.images"},
    "datamodules.vision": {"datamodules.files", "datamodules.images", "datamodules.indexed"},
}


def _modules() -> dict[str, Path]:
    """The files of the package by their modules' names, which here leave out the ``ncfinetune.`` in front."""
    folders = {"": CORE, "callbacks.": ROOT / "callbacks", "datamodules.": ROOT / "datamodules"}
    files = {front + path.stem: path for front, folder in folders.items() for path in folder.glob("*.py")}
    return {name.removesuffix(".__init__").replace("__init__", "ncfinetune"): path for name, path in files.items()}


def _imports(name: str, source: str) -> set[str]:
    """Which of our modules the source of module ``name`` imports, wherever in it and in whatever form."""
    package = "ncfinetune" if "." not in name and name not in OUTER else f"ncfinetune.{name.split('.')[0]}"
    targets = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            base = [*parents, *filter(None, [node.module])]
            targets += [".".join([*base, alias.name]) for alias in node.names]
    ours = [target for target in targets if target.split(".")[0] == "ncfinetune"]
    return {_module_of(target) for target in ours}


def _module_of(target: str) -> str:
    """The module that a dotted name is or lies in."""
    while target != "ncfinetune" and target.removeprefix("ncfinetune.") not in _modules():
        target = target.rpartition(".")[0]
    return target.removeprefix("ncfinetune.")


def test_every_module_has_its_place_in_the_import_table() -> None:
    assert set(_modules()) == set(IMPORTS)


@pytest.mark.parametrize("module", IMPORTS)
def test_module_imports_what_the_table_says(module: str) -> None:
    assert _imports(module, _modules()[module].read_text()) == IMPORTS[module]


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("backbone", "from . import __version__, callbacks", {"ncfinetune", "callbacks"}),
        ("backbone", "from .layers import blocks_of", {"layers"}),
        ("backbone", "def f():\n    import ncfinetune.callbacks.tracker as t", {"callbacks.tracker"}),
        ("backbone", "from ncfinetune import Backbone, weights", {"ncfinetune", "weights"}),
        ("backbone", "from ncfinetune.datamodules import Digits", {"datamodules"}),
        ("backbone", "import ncfinetuned, torch\nfrom lightning.pytorch import callbacks", set()),
        ("callbacks", "from .probe import OnlineProbe", {"callbacks.probe"}),
        ("callbacks.probe", "from . import adapters, OnlineProbe", {"callbacks.adapters", "callbacks"}),
        ("callbacks.probe", "from .. import datamodules\nfrom ..layers import blocks_of", {"datamodules", "layers"}),
    ],
)
def test_every_form_of_an_import_is_seen(module: str, source: str, found: set[str]) -> None:
    assert _imports(module, source) == found


def test_imports_run_down_the_floors_alone() -> None:
    """The table could be rewritten from whatever is imported; these hold all the same."""
    graphlib.TopologicalSorter({name: found - {"ncfinetune"} for name, found in IMPORTS.items()}).prepare()
    for name, found in IMPORTS.items():
        floor = name.split(".")[0]
        outer = {other.split(".")[0] for other in found} & OUTER
        assert outer <= ({floor} & OUTER), f"{name} imports of {outer}"
        assert floor != "datamodules" or {other.split(".")[0] for other in found} <= {"datamodules"}
        assert floor != "callbacks" or not found & LEARNERS
        assert name not in LEARNERS or "metrics" not in found
        assert "cli" not in found or name == "__main__"
        assert "trainer_cli" not in found or name == "cli"


def test_every_package_folder_is_installed() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    folders = {path.parent for path in _modules().values()}
    mapped = dict(line.split(" = ") for line in config["options"]["package_dir"].split("\n") if line)
    overlays = {f"ncfinetune.experiments.{path.parent.name}" for path in (ROOT / "experiments").glob("*/*.yaml")}
    assert {*mapped} - {"ncfinetune.experiments"} | overlays == set(config["options"]["packages"].split())
    assert mapped.pop("ncfinetune.experiments") == "experiments"
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


def test_report_does_not_import_torch() -> None:
    code = "import sys; import ncfinetune.report; assert not {'torch', 'lightning', 'scipy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["ncfinetune", "tests", "experiments"])
def test_nothing_else_at_the_root_is_a_module_of_ours(name: str) -> None:
    """A second copy of a module has classes of its own, which no ``isinstance`` of the first takes."""
    assert importlib.util.find_spec(f"ncfinetune.{name}") is None


def test_the_outer_folders_are_those_beside_this_checkout() -> None:
    for name in OUTER:
        spec = importlib.util.find_spec(f"ncfinetune.{name}")
        assert spec is not None
        assert spec.origin == str(ROOT / name / "__init__.py")


@pytest.mark.parametrize("name", sorted(OUTER))
def test_outer_folders_cannot_be_imported_by_another_name(name: str) -> None:
    with pytest.raises(
        ImportError, match=rf"import this folder as ncfinetune\.{name}; another name would make a second copy"
    ):
        importlib.import_module(name)

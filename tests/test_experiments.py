"""The YAML files of the pre-training study, the starts, and the benchmarks, on a handful of made-up images."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torchvision.utils import save_image

from ncfinetune import FineTuner
from ncfinetune.cli import main

STUDY = Path(__file__).resolve().parent.parent / "experiments" / "pretrain"
METHODS = sorted(path.stem for path in STUDY.glob("*.yaml") if path.stem != "cifar10")


@pytest.fixture
def _cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / "cifar10" / part / label
            folder.mkdir(parents=True)
            for index in range(8):
                save_image(torch.rand(3, 32, 32), folder / f"{index}.png")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("_cifar10")
def test_study_runs(method: str, tmp_path: Path) -> None:
    small = ["--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1", "--data.fraction", "1.0"]
    small += ["--data.batch_size", "8", "--data.num_workers", "0", "--trainer.enable_progress_bar", "false"]
    small += ["--trainer.enable_model_summary", "false"]
    small += ["--trainer.callbacks.every_n_epochs", "1"]  # of OnlineProbe, the last
    version = ["--trainer.logger.init_args.version", method]
    main(["fit", "--config", str(STUDY / "cifar10.yaml"), "--config", str(STUDY / f"{method}.yaml"), *small, *version])
    assert (tmp_path / "runs" / "pretrain" / method / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "row"),
    [
        ("metrics", "--samples 2000 --sizes 3x16", "| 3 | 16 |"),
        ("scan", "--networks test_resnet --images 60 --timed 16 --classes 3", "| test_resnet | 5 |"),
        ("finetune", "--networks test_resnet --batch 2 --memory-batch 2 --steps 1 --probe-images 4", "| test_resnet |"),
    ],
)
def test_a_benchmark_runs_at_small_size(script: str, options: str, row: str, tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    path = STUDY.parent / "benchmarks" / f"{script}.py"
    command = [sys.executable, str(path), "--repeats", "1", "--out", str(out), *options.split()]
    subprocess.run(command, cwd=STUDY.parent.parent, check=True, timeout=600)
    assert row in out.read_text()


@pytest.mark.slow
def test_the_benchmark_of_the_gpu_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    script = STUDY.parent / "benchmarks" / "gpu.py"
    command = [sys.executable, str(script), "--device", "cpu", "--repeats", "1", "--out", str(out)]
    subprocess.run(command, cwd=STUDY.parent.parent, check=True, timeout=500)
    table = out.read_text()
    for row in (
        "contrastive loss, 64 pairs",
        "metric family",
        "tracked epoch, all blocks",
        "SimCLR step",
        "synchronisations",
    ):
        assert f"| {row}" in table


@pytest.mark.parametrize(
    ("method", "network"),
    [
        ("scl", "{name: test_vit, img_size: 32}"),
        pytest.param("scl", "test_resnet", marks=pytest.mark.slow),
        *(
            pytest.param(method, network, marks=pytest.mark.slow)
            for method in ("probe", "layer", "full")
            for network in ("{name: test_vit, img_size: 32}", "test_resnet")
        ),
    ],
)
@pytest.mark.usefixtures("_cifar10")
def test_a_start_fits_any_network(method: str, network: str, tmp_path: Path) -> None:
    start = STUDY.parent / "start" / f"{method}.yaml"
    data = ["--data", str(STUDY.parent / "data" / "image_folder.yaml"), "--data.root", "data/cifar10"]
    data += ["--data.image_size", "32", "--data.batch_size", "8", "--data.num_workers", "0"]
    quick = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "1"]
    quick += ["--trainer.enable_model_summary", "false", "--trainer.log_every_n_steps", "1"]
    main(["fit", "--config", str(start), *data, *quick, "--model.backbone", network, "--model.allow_random", "true"])
    checkpoints = tmp_path / "runs" / "version_0" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best.ckpt", "delta.safetensors", "last.ckpt"]
    assert FineTuner.load_from_checkpoint(checkpoints / "best.ckpt").class_names == ["cat", "dog"]


@pytest.mark.parametrize("method", ["probe", "layer", "scl", "full"])
def test_a_start_ends_and_keeps_the_best(method: str) -> None:
    start = yaml.safe_load((STUDY.parent / "start" / f"{method}.yaml").read_text())
    trainer = start["trainer"]
    callbacks = [(one["class_path"], one["init_args"]) for one in trainer["callbacks"]]
    assert trainer["max_epochs"] <= 50
    monitored = [name for name, options in callbacks if options.get("monitor") == "val/loss"]
    assert monitored == ["EarlyStopping", "ModelCheckpoint"]
    # One that monitors nothing is written after each epoch, where save_last is when the best is.
    assert ("ModelCheckpoint", {"filename": "last", "enable_version_counter": False}) in callbacks
    assert start["model"]["init_args"]["head_init"] == "ridge"


def test_study_is_all_there() -> None:
    header = (STUDY / "cifar10.yaml").read_text()
    named = header[header.index("for method in") :].split(";")[0].split()[3:]
    assert set(named) | {"adversarial"} == set(METHODS)

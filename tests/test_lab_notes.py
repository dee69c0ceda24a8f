"""The lab notes of experiments/finetune that go on top of others, with a tiny network."""

from pathlib import Path

import pytest
import torch

from ncfinetune import FineTuner
from ncfinetune.cli import main

FOLDER = Path(__file__).resolve().parent.parent / "experiments" / "finetune"
TINY = "name: resnet18, stem: cifar, in_chans: 1, channels: [4, 6, 8, 10]"
# Each with the note that it goes on top of, and a part of what its run prints.
NOTES = {
    "bitfit": ("layer", "*.bias"),
    "norm": ("layer", "21 layers"),
    "film": ("layer", "*bn*.weight"),
    "ridge": ("linear_probe", "classifier: initialised as ridge"),
    "ridge_start": ("scl", "classifier: initialised as ridge"),
    "etf": ("layer", "classifier: initialised as etf"),
    "lora": ("layer", "16 layers"),
}


def test_every_note_is_tried() -> None:
    whole = {"full", "layer", "linear_probe", "scl"}
    assert {path.stem for path in FOLDER.glob("*.yaml")} == whole | set(NOTES)
    for name in NOTES:
        settings = [line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if not line.startswith("#")]
        assert len(settings) <= 6


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NOTES))
def test_note_runs_on_top_of_another(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    under, said = NOTES[name]
    backbone = TINY
    if name == "lora":
        pytest.importorskip("peft")
        backbone += ", lora: {r: 2, target_modules: [conv2]}"
    words = ["--data", "Digits", "--data.shots", "8", "--data.augmentation", "plain", "--trainer.accelerator", "cpu"]
    words += ["--model.backbone", f"{{{backbone}}}", "--model.allow_random", "true"]
    words += ["--trainer.enable_progress_bar", "false"]
    words += [] if name == "ridge" else ["--trainer.max_epochs", "1"]
    configs = [word for note in (under, name) for word in ("--config", str(FOLDER / f"{note}.yaml"))]
    with caplog.at_level("INFO"):
        main(["fit", *configs, *words])
    assert said in caplog.text
    (delta,) = tmp_path.rglob("delta.safetensors")
    (checkpoint,) = delta.parent.glob("*.ckpt")
    model = FineTuner.load_from_checkpoint(checkpoint).eval()
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    if name in ("norm", "film"):
        norms = [module for module in model.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        tensors = {parameter for norm in norms for parameter in norm.parameters()}
        assert {parameter for parameter in model.backbone.parameters() if parameter.requires_grad} == tensors

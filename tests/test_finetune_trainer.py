"""Fine-tuning under what a Trainer offers: several processes, compilation, bf16, accumulation."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import trainer_in

from ncfinetune import FineTuner
from ncfinetune.datamodules import Digits

ROOT = Path(__file__).resolve().parent.parent

# One batch an epoch whatever the number of processes, and no batch statistics, so that the runs must agree.
_DDP = """
import json, sys, warnings
import torch
from lightning.pytorch import Trainer
from ncfinetune import FineTuner
from ncfinetune.datamodules import Digits

warnings.simplefilter("error")
warnings.filterwarnings("ignore", message=".*does not have many workers|.*is smaller than the logging interval|.*Leaf")
warnings.filterwarnings("ignore", message=".*isinstance.treespec|.*recommended to use `self.log|.*compute.. method of")
warnings.filterwarnings("ignore", message="strategies that fork or spawn processes")
torch.set_num_threads(1)
def fitted(devices, knobs):
    torch.manual_seed(0)
    backbone = {"name": "test_vit", "img_size": 8, "patch_size": 2, "in_chans": 1}
    model = FineTuner(3, backbone, allow_random=True, optimizer=lambda p: torch.optim.SGD(p, lr=0.5), **knobs)
    trainer = Trainer(max_epochs=3, accelerator="cpu", devices=devices, strategy="ddp_fork" if devices > 1 else "auto",
                      logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                      limit_val_batches=0, num_sanity_val_steps=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.fit(model, Digits([0, 1, 2], shots=8, batch_size=24 // devices))
    moved = sum(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    return model.state_dict(), moved

for knobs in json.loads(sys.argv[1]):
    (one, _), (two, moved) = (fitted(devices, knobs) for devices in (1, 2))
    print("RESULT", moved, max((one[name] - value).abs().max().item() for name, value in two.items()))
"""


@pytest.mark.slow
def test_two_processes_end_where_one_does_without_looking_for_unused_parameters(tmp_path: Path) -> None:
    knobs = [
        {"train": "blocks.2", "skip_from": "blocks.2", "skip_gradient": "skip", "head_init": "mean"},
        {"train": "blocks.2", "cache": "memory", "head_lr_factor": 2},
        {"train": "blocks.2", "cache": "disk", "cache_dir": str(tmp_path), "skip_from": "blocks.2"},
    ]
    done = subprocess.run(
        [sys.executable, "-c", _DDP, json.dumps(knobs)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    results = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(results) == len(knobs)
    for moved, apart in results:
        assert int(moved) > 5
        assert float(apart) < 1e-5


VIT = {"name": "test_vit", "img_size": 8, "patch_size": 2, "in_chans": 1}


def _fitted(folder: Path, model: FineTuner, **arguments) -> torch.Tensor:
    torch.manual_seed(0)
    trainer = trainer_in(folder, max_epochs=2, **arguments)
    trainer.fit(model, Digits([0, 1, 2], shots=8, batch_size=8))
    return trainer.callback_metrics["train/loss"]


def _model(**knobs) -> FineTuner:
    torch.manual_seed(0)
    optimizer = partial(torch.optim.SGD, lr=0.05)
    return FineTuner(3, VIT, train="blocks.2", optimizer=optimizer, allow_random=True, **knobs)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["both", "skip"])
def test_compiled_model_is_the_same_without_a_break_in_its_graph(gradient: str) -> None:
    model = _model(skip_from="blocks.2", skip_gradient=gradient).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    tuned = list(model.backbone.layer("blocks.2").parameters())
    for _ in range(2):
        images = torch.randn(2, 1, 8, 8)
        expected, got = model(images), compiled(images)
        torch.testing.assert_close(got, expected)
        theirs, ours = (torch.autograd.grad(logits.square().sum(), tuned) for logits in (expected, got))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "knobs", [{"skip_from": "blocks.2", "skip_gradient": "skip"}, {"skip_from": "blocks.2", "cache": "memory"}]
)
def test_compiled_run_is_the_same(knobs: dict, tmp_path: Path) -> None:
    plain = _fitted(tmp_path, _model(**knobs))
    torch._dynamo.reset()
    compiled = _fitted(tmp_path, torch.compile(_model(**knobs), backend="eager"))
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "knobs",
    [pytest.param({}, marks=pytest.mark.slow), {"skip_from": "blocks.2", "head_init": "mean", "cache": "memory"}],
)
def test_bf16_run_is_nearly_the_same(knobs: dict, tmp_path: Path) -> None:
    plain = _fitted(tmp_path, _model(**knobs))
    bf16 = _fitted(tmp_path, _model(**knobs), precision="bf16-mixed")
    torch.testing.assert_close(bf16, plain, rtol=0.1, atol=0.02)


def test_accumulated_gradients_are_those_of_the_larger_batch(tmp_path: Path) -> None:
    def tuned(batch_size: int, accumulate: int) -> dict[str, torch.Tensor]:
        model = _model(skip_from="blocks.2")
        trainer_in(tmp_path, accumulate_grad_batches=accumulate).fit(
            model, Digits([0, 1, 2], batch_size=batch_size, shots=8)
        )
        return model.state_dict()

    whole, parts = tuned(24, 1), tuned(6, 4)
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=1e-6, msg=key)

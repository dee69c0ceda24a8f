"""A run that stops anywhere goes on as if it had not: the same images, random numbers, means and weights."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ddp
import pytest
import torch
from image_files import write_image
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import TensorBoardLogger
from test_datamodules import Recorder, _trainer
from test_shards import _write_shards
from tiny import SMALL, trainer_in
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ncfinetune import FineTuner, Supervised
from ncfinetune.adversarial import PGD
from ncfinetune.callbacks import NeuralCollapseTracker, OnlineProbe
from ncfinetune.datamodules import Digits, ImageFolder, WebDataset
from ncfinetune.resume import state_of_process, states_of_processes
from ncfinetune.runs import Run

# Dropout and drop path draw from the stream of random numbers that a checkpoint has to keep.
NETWORK: dict[str, Any] = {"name": "test_vit", "img_size": 8, "patch_size": 4, "drop_path_rate": 0.2}
EPOCHS = 3
EACH_STEP, EACH_EPOCH = {"every_n_train_steps": 1}, {"every_n_epochs": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 training images of 3 classes and 6 for validation."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(42):
        part = "train" if number < 36 else "val"
        write_image(folder / part / "abc"[number % 3] / f"{number:02d}.png", number)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in tar files."""
    root = tmp_path_factory.mktemp("shards")
    _write_shards(root, "train", (13, 9, 14))
    _write_shards(root, "val", (6,), first=100)
    return root


class Stateful(LightningDataModule):
    """Somebody else's data, whose training loader keeps its own place in the epoch."""

    labels = torch.arange(18) % 3
    images = torch.rand(18, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def train_dataloader(self) -> Any:
        return StatefulDataLoader(TensorDataset(self.images, self.labels), 5, shuffle=True)

    def train_plain_dataloader(self) -> Any:
        return DataLoader(TensorDataset(self.images, self.labels), 5)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(self.images, self.labels), 5)


Make = Callable[[Path, Path], LightningDataModule]
FILES: dict[str, Any] = {"image_size": 8, "batch_size": 5, "augmentation": "standard", "num_workers": 2}
DATA: dict[str, Make] = {
    "memory": lambda folder, shards: Digits([1, 2, 3], shots=12, batch_size=5, augmentation="standard"),
    "plain": lambda folder, shards: Digits([1, 2, 3], shots=12, batch_size=5, augmentation="plain"),
    "balanced": lambda folder, shards: Digits([1, 2, 3], shots=12, batch_size=5, sampling="balanced"),
    "mixup": lambda folder, shards: Digits([1, 2, 3], shots=12, batch_size=5, augmentation="plain", mixup=1.0),
    "folder, 2 workers": lambda folder, shards: ImageFolder(str(folder), **FILES),
    "shards": lambda folder, shards: _shards(shards, num_workers=0),
    "shards, 2 workers": lambda folder, shards: _shards(shards, num_workers=2),
    "a loader that keeps its place": lambda folder, shards: Stateful(),
}


IN_GREY = ("memory", "plain", "balanced", "mixup")


def _shards(root: Path, **arguments: Any) -> WebDataset:
    return WebDataset(
        3, train=f"{root}/train-{{0..2}}.tar", val=f"{root}/val-0.tar", shuffle=10, **{**FILES, **arguments}
    )


def _halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.StepLR:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


LEARNERS: dict[str, Callable[[int], LightningModule]] = {
    "supervised": lambda channels: Supervised(3, {**NETWORK, "in_chans": channels}, lr_scheduler=_halving),
    "adversarial": lambda channels: Supervised(3, {**NETWORK, "in_chans": channels}, adversary=PGD(8 / 255, steps=1)),
    "skip": lambda channels: FineTuner(
        3, {**NETWORK, "in_chans": channels}, train="blocks.1", skip_from="blocks.1", allow_random=True
    ),
    "refitted": lambda channels: FineTuner(
        3, {**NETWORK, "in_chans": channels}, train="blocks.1", refit="ridge", allow_random=True
    ),
    "cached": lambda channels: FineTuner(
        3, {**NETWORK, "in_chans": channels}, train="blocks.1", cache="memory", allow_random=True
    ),
}


class Seen(ModelCheckpoint):
    """Keeps the images of each training batch, and checkpoints at the steps that are asked for."""

    def __init__(self, folder: Path, **when: Any) -> None:
        super().__init__(folder, "{step}", save_top_k=-1, save_on_train_epoch_end="every_n_epochs" in when, **when)
        self.batches: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.ends: dict[tuple[str, int], float] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        first, labels = batch
        self.batches[trainer.global_step] = (getattr(first, "value", first).clone(), labels.clone())

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.ends["val", trainer.current_epoch] = trainer.callback_metrics["val/loss"].item()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self.ends["train", trainer.current_epoch] = trainer.callback_metrics["train/loss"].item()


def _fit(
    model: LightningModule, data: LightningDataModule, folder: Path, ckpt_path: Path | None = None, **when: Any
) -> tuple[dict[str, torch.Tensor], dict[str, float], Seen]:
    seen = Seen(folder, **when)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=[seen, NeuralCollapseTracker(figures=False), OnlineProbe(3)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    numbers = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return model.state_dict(), numbers, seen


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 calls it
@pytest.mark.parametrize(
    ("learner", "kind", "when"),
    [
        ("supervised", "memory", EACH_EPOCH),
        *(
            pytest.param(learner, kind, when, marks=pytest.mark.slow)
            for learner, kind, when in [
                ("supervised", "memory", EACH_STEP),
                ("adversarial", "memory", EACH_STEP),
                ("refitted", "memory", EACH_EPOCH),
                ("refitted", "memory", EACH_STEP),
                ("cached", "plain", EACH_EPOCH),
                ("cached", "plain", EACH_STEP),
                ("cached", "balanced", EACH_STEP),
                ("supervised", "mixup", EACH_STEP),
                ("skip", "folder, 2 workers", EACH_STEP),
                ("skip", "folder, 2 workers", EACH_EPOCH),
                ("supervised", "shards", EACH_STEP),
                ("supervised", "shards, 2 workers", EACH_STEP),
                ("supervised", "shards, 2 workers", EACH_EPOCH),
                ("supervised", "a loader that keeps its place", EACH_STEP),
            ]
        ),
    ],
)
def test_a_run_goes_on_as_if_it_had_not_stopped(
    learner: str, kind: str, when: dict[str, int], folder: Path, shards: Path, tmp_path: Path
) -> None:
    def run(place: str, ckpt_path: Path | None = None, seed: int = 0) -> Any:
        seed_everything(0, verbose=False)
        data = DATA[kind](folder, shards)
        model = LEARNERS[learner](1 if kind in IN_GREY else 3)
        torch.manual_seed(0)
        if ckpt_path:
            torch.rand(7)  # a process of its own has its own past
        return _fit(model, data, tmp_path / place, ckpt_path, **when)

    weights, numbers, seen = run("whole")
    batches = seen.batches
    saved = sorted((tmp_path / "whole").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    steps = len(batches)
    # After the first step, at the end of the first epoch and within the second; or at the end of the first.
    chosen = [0, steps // EPOCHS - 1, steps // EPOCHS + 2] if len(saved) == steps else [0]
    for checkpoint in (saved[index] for index in chosen):
        done = int(checkpoint.stem.split("=")[1])
        resumed, measured, rest = run(f"from {done}", checkpoint)
        assert list(rest.batches) == list(range(done, steps))
        for step, (images, labels) in rest.batches.items():
            assert torch.equal(images, batches[step][0])
            assert torch.equal(labels, batches[step][1])
        assert all(torch.equal(value, weights[name]) for name, value in resumed.items())
        # Of the epoch whose last batch was the last step too; but not where the checkpoint is of an epoch's end.
        since = done // (steps // EPOCHS) if len(saved) == EPOCHS else (done - 1) // (steps // EPOCHS)
        assert rest.ends == pytest.approx({key: end for key, end in seen.ends.items() if key[1] >= since}, rel=1e-6)
        assert measured == pytest.approx(numbers, nan_ok=True, rel=1e-6)


def _recorded(
    data: LightningDataModule, folder: Path, ckpt_path: Path | None = None, seed: int = 0, **options: Any
) -> Recorder:
    """The batches of two epochs, with a checkpoint at each step and at each epoch's end in `folder`."""
    seed_everything(seed, verbose=False)
    saved = [
        ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1),
        ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
    ]
    model = Recorder()
    options = {"max_epochs": 2, "enable_checkpointing": True, "callbacks": saved, "limit_val_batches": 0, **options}
    _trainer(**options).fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return model


OTHER_NUMBERS: dict[str, tuple[Make, Make, str, str]] = {
    "memory": (DATA["memory"], lambda f, s: Digits([1, 2, 3], shots=12, batch_size=7), "batch_size 5", "batch_size 7"),
    "folder": (
        lambda f, s: ImageFolder(str(f), **{**FILES, "num_workers": 0}),
        lambda f, s: ImageFolder(str(f), **{**FILES, "batch_size": 4}),
        "batch_size 5",
        "batch_size 4",
    ),
    "shards": (
        lambda f, s: _shards(s, num_workers=0),
        lambda f, s: _shards(s, num_workers=2, batch_size=6),
        "batch_size 5, num_workers 1",
        "batch_size 6, num_workers 2",
    ),
    "images": (
        DATA["memory"],
        lambda f, s: Digits([1, 2, 3], shots=13, batch_size=5, sampling="balanced"),
        "images 36, sampling uniform",
        "images 39, sampling balanced",
    ),
    "drawn": (DATA["memory"], lambda f, s: Digits([1, 2, 3], shots=12, batch_size=5, seed=1), "seed 0", "seed 1"),
}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("kind", OTHER_NUMBERS)
def test_batches_that_cannot_go_on_within_an_epoch_are_said(
    kind: str, folder: Path, shards: Path, tmp_path: Path
) -> None:
    before, after, expected, got = OTHER_NUMBERS[kind]
    _recorded(before(folder, shards), tmp_path / "whole")
    message = (
        f"expected {expected} as in the interrupted run, to go on within an epoch, got {got}: the rest of this epoch "
        "has other batches, and some of its images are seen twice and others not at all; give the numbers as they "
        "were, or resume from a checkpoint of an epoch's end"
    )
    for step in (2, 6):  # of 7, and after the second there may be none of larger ones
        with pytest.warns(UserWarning, match="as in the interrupted run") as caught:
            _recorded(after(folder, shards), tmp_path / f"from {step}", tmp_path / "whole" / f"step={step}.ckpt")
        assert [str(warning.message) for warning in caught if "interrupted" in str(warning.message)] == [message]
    _recorded(after(folder, shards), tmp_path / "end", tmp_path / "whole" / "epoch=0.ckpt")  # a warning is an error
    checkpoint = torch.load(tmp_path / "whole" / "step=2.ckpt", weights_only=True)
    checkpoint.pop(type(before(folder, shards)).__qualname__)
    torch.save(checkpoint, tmp_path / "old.ckpt")
    _recorded(after(folder, shards), tmp_path / "old", tmp_path / "old.ckpt")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_another_seed_cannot_go_on_within_an_epoch(folder: Path, shards: Path, tmp_path: Path) -> None:
    _recorded(DATA["memory"](folder, shards), tmp_path / "whole")
    message = (
        "expected seed_everything 0 as in the interrupted run, to go on within an epoch, got seed_everything 4: the"
    )
    with pytest.warns(UserWarning, match=message):
        _recorded(DATA["memory"](folder, shards), tmp_path / "rest", tmp_path / "whole" / "step=2.ckpt", seed=4)


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:This DataLoader will create")
def test_shards_go_on_with_the_workers_of_another_machine(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def on_cores(number: int, place: str, ckpt_path: Path | None = None) -> Recorder:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(number)), raising=False)
        return _recorded(_shards(shards, num_workers=None), tmp_path / place, ckpt_path)

    whole = on_cores(3, "whole")
    for name, done in (("step=2", 2), ("epoch=0", 7)):
        caplog.clear()
        with caplog.at_level("INFO"):
            rest = on_cores(1, f"from {name}", tmp_path / "whole" / f"{name}.ckpt")
        assert "num_workers is 3 as in the interrupted run, not 1: batches depend on it" in caplog.text
        batches, further = ([*of.seen.get("train0", []), *of.seen["train1"]] for of in (whole, rest))
        assert len(further) == len(batches) - done
        assert all(torch.equal(x, y) for (x, _), (y, _) in zip(further, batches[done:], strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_fewer_processes_cannot_go_on_within_an_epoch(folder: Path, shards: Path, tmp_path: Path) -> None:
    _recorded(DATA["memory"](folder, shards), tmp_path / "two", devices=2, strategy="ddp_fork")
    message = r"expected processes 2 as in the interrupted run, to go on within an epoch, got processes 1: the rest"
    with pytest.warns(UserWarning, match=message):
        _recorded(DATA["memory"](folder, shards), tmp_path / "one", tmp_path / "two" / "step=2.ckpt")


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:You requested to overfit")
@pytest.mark.parametrize("kind", ["memory", "balanced", "folder, 2 workers", "shards", "shards, 2 workers"])
def test_a_run_that_overfits_goes_on_within_an_epoch(kind: str, folder: Path, shards: Path, tmp_path: Path) -> None:
    whole = _recorded(DATA[kind](folder, shards), tmp_path / "whole", overfit_batches=3)
    assert torch.equal(whole.labels("train0"), whole.labels("train1"))
    for step in (2, 4):
        rest = _recorded(
            DATA[kind](folder, shards),
            tmp_path / f"from {step}",
            tmp_path / "whole" / f"step={step}.ckpt",
            overfit_batches=3,
        )
        batches, further = ([*of.seen.get("train0", []), *of.seen["train1"]] for of in (whole, rest))
        assert len(further) == 6 - step
        assert all(torch.equal(x, y) for (x, _), (y, _) in zip(further, batches[step:], strict=True))


def test_each_process_gets_its_own_state_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def trainer(rank: int, world: int) -> Any:
        return SimpleNamespace(
            world_size=world, global_rank=rank, strategy=SimpleNamespace(root_device=torch.device("cpu"))
        )

    def task(rank: int) -> Any:
        torch.manual_seed(rank)
        states = states_of_processes(trainer(rank, 2), {"rank": rank})
        expected = torch.rand(3).tolist()
        torch.manual_seed(7)
        state = state_of_process(trainer(rank, 2), states)
        return state["rank"], torch.rand(3).tolist() == expected

    assert ddp.run(2, tmp_path, task) == [(0, True), (1, True)]
    with caplog.at_level("INFO"):
        assert state_of_process(trainer(0, 1), [{}, {}]) == {}
    assert (
        "the checkpoint is of 2 processes, but this run has 1: random numbers, as of dropout, differ from those of the "
        "interrupted run; of the epoch in which it stopped, train/ means are of the rest, and batches that waited for "
        "others (accumulate_grad_batches) are left out"
    ) in caplog.text


class Order(ModelCheckpoint):
    """Notes what came after what, and checkpoints when it is asked to."""

    def __init__(self, folder: Path, **when: Any) -> None:
        super().__init__(folder, "{step}", save_top_k=-1, **(when or EACH_STEP))
        self.order: list[tuple[int, Any]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.order.append((trainer.current_epoch, batch_idx))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self.order.append((trainer.current_epoch, "end"))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_end(trainer, pl_module)
        self.order.append((trainer.current_epoch, "validation"))


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"limit_val_batches": 0}, marks=pytest.mark.slow),
        pytest.param({"check_val_every_n_epoch": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_last_batch_of_an_epoch_is_followed_by_what_follows_it(options: dict[str, Any], tmp_path: Path) -> None:
    def fit(ckpt_path: Path | None = None) -> list[tuple[int, Any]]:
        seed_everything(0, verbose=False)
        order = Order(tmp_path)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(
            max_epochs=3, accelerator="cpu", num_sanity_val_steps=0, callbacks=[order], **quiet, **options
        )
        model = Supervised(2, {"name": "test_resnet", "in_chans": 1})
        trainer.fit(model, Digits([1, 2], shots=8, batch_size=8), ckpt_path=ckpt_path, weights_only=True)
        return order.order

    whole = fit()
    for epoch in (0, 1):
        assert fit(tmp_path / f"step={2 * epoch + 2}.ckpt") == whole[whole.index((epoch, 1)) + 1 :]


class _Stops(Callback):
    """Stops a run after so many steps, as Lightning's ``Timer`` does after its ``max_time``."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop |= trainer.global_step == self.steps


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    "by_hand",
    [pytest.param(False, id="saved by a callback"), pytest.param(True, id="saved afterwards", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("by_steps", [True, False], ids=["max_steps", "max_time"])
def test_a_run_that_stopped_within_an_epoch_goes_on_within_it(by_steps: bool, by_hand: bool, tmp_path: Path) -> None:
    def fit(folder: str, stop: int = -1, ckpt_path: Path | None = None) -> tuple[Trainer, list[Any], Any]:
        seed_everything(0, verbose=False)
        order, last = Order(tmp_path / folder), ModelCheckpoint(tmp_path / folder, save_last=True)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        callbacks = [order, last, _Stops(-1 if by_steps else stop)]
        steps = stop if by_steps else -1
        trainer = Trainer(
            max_epochs=3, max_steps=steps, accelerator="cpu", limit_val_batches=0, **quiet, callbacks=callbacks
        )
        model = Supervised(2, {**NETWORK, "in_chans": 1}, lr_scheduler=_halving)
        trainer.fit(model, Digits([1, 2], shots=8, batch_size=4), ckpt_path=ckpt_path, weights_only=True)
        return trainer, order.order, model.state_dict()

    whole, order, weights = fit("whole")
    for stop in (2, 4, 7):
        trainer, begun, _ = fit(f"until {stop}", stop)
        checkpoint = tmp_path / f"until {stop}" / "last.ckpt"
        if by_hand:
            trainer.save_checkpoint(checkpoint)
        rest, further, ends = fit(f"from {stop}", ckpt_path=checkpoint)
        assert [entry for entry in begun + further if entry[1] != "end"] == [e for e in order if e[1] != "end"]
        assert rest.optimizers[0].param_groups[0]["lr"] == whole.optimizers[0].param_groups[0]["lr"]
        assert rest.callback_metrics["train/loss"] == whole.callback_metrics["train/loss"]
        torch.testing.assert_close(ends, weights, rtol=0, atol=0)


class _Stream(IterableDataset[Any]):
    """Twelve samples, without a length."""

    def __iter__(self) -> Any:
        return zip(torch.rand(12, 1, 8, 8), torch.arange(12) % 2, strict=True)


@pytest.mark.filterwarnings(
    "ignore:The dirpath has changed",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:You.re resuming from a checkpoint that ended before the epoch ended",
)
@pytest.mark.parametrize("stream", [False, True], ids=["set", "stream"])
@pytest.mark.parametrize(
    "options",
    [
        {"limit_val_batches": 0},
        pytest.param({"check_val_every_n_epoch": 2}, marks=pytest.mark.slow),
        pytest.param({"val_check_interval": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_loader_that_begins_anew_trains_no_more_of_an_epoch_that_is_over(
    options: dict[str, Any], stream: bool, tmp_path: Path
) -> None:
    data = _Stream() if stream else TensorDataset(*map(torch.stack, zip(*_Stream(), strict=True)))

    def fit(ckpt_path: Path | None = None) -> tuple[list[tuple[int, Any]], int]:
        order = Order(tmp_path)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(
            max_epochs=3, accelerator="cpu", num_sanity_val_steps=0, callbacks=[order], **quiet, **options
        )
        model = Supervised(2, {"name": "test_resnet", "in_chans": 1}, lr_scheduler=_halving)
        loaders = [DataLoader(data, batch_size=4) for _ in ("train", "val")]
        trainer.fit(model, *loaders, ckpt_path=ckpt_path, weights_only=True)
        return order.order, trainer.global_step

    whole, steps = fit()
    assert steps == 9
    for epoch in (0, 1, 2):
        rest, steps = fit(tmp_path / f"step={3 * epoch + 3}.ckpt")
        assert rest == whole[whole.index((epoch, 2)) + 1 :]
        assert steps == 9


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    "when",
    [
        pytest.param(EACH_STEP, id="steps", marks=pytest.mark.slow),
        pytest.param({"save_on_train_epoch_end": False}, id="validations"),
    ],
)
@pytest.mark.parametrize(
    "every",
    [
        pytest.param({}, id="in epochs"),
        pytest.param({"check_val_every_n_epoch": None}, id="over epochs", marks=pytest.mark.slow),
    ],
)
def test_a_validation_that_is_due_within_an_epoch_is_made_once(
    every: dict[str, Any], when: dict[str, Any], tmp_path: Path
) -> None:
    def fit(place: str, ckpt_path: Path | None = None) -> tuple[list[tuple[int, Any]], Any]:
        seed_everything(0, verbose=False)
        order, logger = Order(tmp_path / "checkpoints", **when), TensorBoardLogger(tmp_path, "", place)
        trainer = Trainer(
            max_epochs=2,
            accelerator="cpu",
            num_sanity_val_steps=0,
            callbacks=[OnlineProbe(2), order],
            logger=logger,
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            val_check_interval=3,
            **every,
        )
        model = Supervised(2, {**NETWORK, "in_chans": 1})
        trainer.fit(model, Digits([1, 2], shots=20, batch_size=8), ckpt_path=ckpt_path, weights_only=True)
        return order.order, (model.state_dict(), Run(tmp_path / place).scalars)

    whole, (weights, numbers) = fit("whole")
    saved = sorted((tmp_path / "checkpoints").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    for checkpoint in saved:
        step = int(checkpoint.stem.split("=")[1])
        order, (resumed, logged) = fit(f"from {step}", checkpoint)
        epoch, batch = divmod(step - 1, 5)
        rest = whole[whole.index((epoch, batch)) + 1 :]
        assert order == (rest[1:] if when != EACH_STEP and rest[0][1] == "validation" else rest)
        assert all(torch.equal(value, weights[name]) for name, value in resumed.items())
        for tag, values in logged.items():
            assert values == pytest.approx(numbers[tag][-len(values) :], rel=1e-6), tag


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:You requested to overfit but enabled val")
@pytest.mark.parametrize(
    ("learner", "kind", "options"),
    [
        ("supervised", "memory", {}),
        ("supervised", "balanced", {}),
        ("cached", "plain", {}),
        ("cached", "plain", {"overfit_batches": 3}),
        ("supervised", "shards, 2 workers", {}),
    ],
)
def test_two_processes_go_on_as_if_they_had_not_stopped(
    learner: str, kind: str, options: dict[str, Any], folder: Path, shards: Path, tmp_path: Path
) -> None:
    def fit(place: str, ckpt_path: Path | None = None) -> Any:
        seed_everything(0, verbose=False)
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp_fork",
            max_epochs=2,
            callbacks=[
                ModelCheckpoint(tmp_path / place, "{step}", save_top_k=-1, every_n_train_steps=1),
                NeuralCollapseTracker(figures=False),
                OnlineProbe(3),
            ],
            logger=TensorBoardLogger(tmp_path / "runs", "", place),
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **options,
        )
        model = LEARNERS[learner](1 if kind in IN_GREY else 3)
        trainer.fit(model, DATA[kind](folder, shards), ckpt_path=ckpt_path, weights_only=True)
        return model.state_dict(), Run(tmp_path / "runs" / place).scalars

    weights, numbers = fit("whole")
    steps = len(list((tmp_path / "whole").glob("*.ckpt")))
    for step in (1, steps // 2, steps // 2 + 2):  # within the first epoch, after its last batch, within the second
        resumed, logged = fit(f"from {step}", tmp_path / "whole" / f"step={step}.ckpt")
        assert all(torch.equal(value, weights[name]) for name, value in resumed.items())
        for tag, values in logged.items():
            assert values == pytest.approx(numbers[tag][-len(values) :], rel=1e-6, nan_ok=True), tag


class Unfreezing(BackboneFinetuning):
    """Trains the backbone from the second epoch on."""

    def __init__(self) -> None:
        super().__init__(unfreeze_backbone_at_epoch=1, initial_denom_lr=1)


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory .* exists and is not empty")
def test_what_a_callback_had_unfrozen_still_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Lightning's issue 21901: its BackboneFinetuning freezes all again where a run is resumed."""

    def fit(ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
        seed_everything(0, verbose=False)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        callbacks = [Unfreezing(), ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)]
        trainer = Trainer(max_epochs=3, accelerator="cpu", num_sanity_val_steps=0, callbacks=callbacks, **quiet)
        model = Supervised(2, {**NETWORK, "in_chans": 1})
        trainer.fit(model, Digits([1, 2], shots=8, batch_size=8), ckpt_path=ckpt_path, weights_only=True)
        return model.state_dict()

    whole = fit()
    start = Supervised(2, {**NETWORK, "in_chans": 1}).state_dict()
    assert not torch.equal(whole["backbone.net.patch_embed.proj.weight"], start["backbone.net.patch_embed.proj.weight"])
    for step, changed in ((1, False), (3, True), (4, True)):
        caplog.clear()
        with caplog.at_level("INFO"):
            resumed = fit(tmp_path / f"step={step}.ckpt")
        assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
        assert ("as in the interrupted run again; a callback had changed that" in caplog.text) == changed


def _small(folder: Path, epochs: int, **arguments: Any) -> tuple[Trainer, Path]:
    """A trainer that checkpoints the end of each epoch, and the folder of its numbers."""
    logger = TensorBoardLogger(folder, "", "run")
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[
            OnlineProbe(2),
            ModelCheckpoint(folder / "saved", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
        ],
        logger=logger,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    return trainer, folder / "run"


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_numbers_of_an_epoch_that_is_checkpointed_at_its_end_are_written(tmp_path: Path) -> None:
    def fit(place: str, ckpt_path: Path | None = None) -> tuple[dict[str, list[float]], dict[str, float]]:
        trainer, run = _small(tmp_path / place, 2)
        data = Digits([1, 2], shots=8, batch_size=8)
        trainer.fit(
            Supervised(2, {**NETWORK, "in_chans": 1}, lr_scheduler=_halving),
            data,
            ckpt_path=ckpt_path,
            weights_only=True,
        )
        return Run(run).scalars, {name: value.item() for name, value in trainer.callback_metrics.items()}

    written, known = fit("whole")
    for epoch in (0, 1):  # which Lightning writes to the loggers after the checkpoint
        rest, measured = fit(f"from {epoch}", tmp_path / "whole" / "saved" / f"epoch={epoch}.ckpt")
        for name in ("train/loss", "train/acc", "probe/loss"):
            assert rest[name] == written[name][epoch:], name
        assert measured == known


class RandomState(Callback):
    """Notes where the stream of random numbers is when the first epoch begins."""

    def on_train_epoch_start(self, *_: Any) -> None:
        self.state = torch.get_rng_state()


def test_a_model_of_a_checkpoint_begins_a_run_of_its_own(tmp_path: Path) -> None:
    def fit(model: Supervised, place: str, seed: int) -> torch.Tensor:
        seed_everything(seed, verbose=False)
        trainer, run = _small(tmp_path / place, 1)
        random: Any = RandomState()
        trainer.callbacks.append(random)
        trainer.fit(model, Digits([1, 2], shots=8, batch_size=8))
        assert len(Run(run).scalars["train/loss"]) == 1
        return random.state

    fit(Supervised(2, {**NETWORK, "in_chans": 1}), "first", 0)
    path = tmp_path / "first" / "saved" / "epoch=0.ckpt"
    states = [fit(Supervised.load_from_checkpoint(path, weights_only=True), f"seed {seed}", seed) for seed in (1, 2)]
    assert not torch.equal(*states)


class _EachBatch(Callback):
    """Saves a checkpoint after each batch, whether it was followed by a step or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}-{batch_idx}.ckpt")


@pytest.mark.parametrize("kind", ["accumulation", pytest.param("average", marks=pytest.mark.slow)])
def test_what_a_callback_sets_for_an_epoch_holds_in_one_that_is_resumed_within(kind: str, tmp_path: Path) -> None:
    def fit(folder: str, ckpt_path: Path | None = None) -> tuple[dict[str, torch.Tensor], int]:
        seed_everything(0, verbose=False)
        keeps = _EachBatch(tmp_path / folder)
        setting = (
            GradientAccumulationScheduler({0: 3, 2: 1})
            if kind == "accumulation"
            else StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=2)
        )
        trainer = trainer_in(tmp_path, max_epochs=3, limit_val_batches=0, callbacks=[keeps, setting])
        model = Supervised(2, SMALL, lr_scheduler=_halving)
        trainer.fit(model, Digits([1, 2], shots=8, batch_size=4), ckpt_path=ckpt_path, weights_only=False)
        return model.state_dict(), trainer.global_step

    weights, steps = fit("whole")
    saved = sorted((tmp_path / "whole").iterdir())
    assert len(saved) == (12 if kind == "accumulation" else 16)  # a fourth epoch measures the average's statistics
    for checkpoint in saved:
        again, end = fit(f"from {checkpoint.stem}", checkpoint)
        assert end == steps
        for name, value in again.items():
            torch.testing.assert_close(value, weights[name], rtol=0, atol=0, msg=f"{checkpoint.name}: {name}")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_an_optimiser_that_keeps_other_options_than_are_configured_is_said(tmp_path: Path) -> None:
    def fit(rate: float, decay: float, epochs: int, scheduled: bool, ckpt_path: Path | None = None) -> None:
        last = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
        trainer = trainer_in(
            tmp_path, max_epochs=epochs, limit_val_batches=0, callbacks=[last], enable_checkpointing=True
        )
        optimizer = partial(torch.optim.SGD, lr=rate, weight_decay=decay)
        model = Supervised(
            2, {**NETWORK, "in_chans": 1}, optimizer=optimizer, lr_scheduler=_halving if scheduled else None
        )
        trainer.fit(model, Digits([1, 2], shots=8, batch_size=4), ckpt_path=ckpt_path, weights_only=True)

    for scheduled in (True, False):
        (tmp_path / "last.ckpt").unlink(missing_ok=True)
        fit(0.1, 0.01, 2, scheduled)
        fit(0.1, 0.01, 3, scheduled, tmp_path / "last.ckpt")  # nothing to say
        with pytest.warns(
            UserWarning, match=r"keeps the optimiser's lr=0.1 of its checkpoint, and the configured lr=0.5 "
        ):
            fit(0.5, 0.01, 4, scheduled, tmp_path / "last.ckpt")
        with pytest.warns(
            UserWarning, match=r"keeps the optimiser's weight_decay=0.01 of its .* weight_decay=0.2 has no"
        ):
            fit(0.1, 0.2, 5, scheduled, tmp_path / "last.ckpt")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 4, "check_val_every_n_epoch": 3},
        {"max_epochs": 2, "check_val_every_n_epoch": 3},
        {"max_steps": 7, "max_epochs": -1, "val_check_interval": 3, "check_val_every_n_epoch": None},
        {"max_epochs": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("averages", [False, True])
def test_the_last_weights_are_saved_though_no_validation_follows(
    options: dict[str, Any], averages: bool, tmp_path: Path
) -> None:
    def fit(folder: str, ckpt_path: Path | None = None, **changed: Any) -> tuple[dict[str, torch.Tensor], Any]:
        seed_everything(0, verbose=False)
        last = ModelCheckpoint(tmp_path / folder, filename="last")
        callbacks = [last, *([EMAWeightAveraging(decay=0.5)] if averages else [])]
        trainer = trainer_in(tmp_path, callbacks=callbacks, enable_checkpointing=True, **{**options, **changed})
        model = Supervised(2, {**NETWORK, "in_chans": 1}, lr_scheduler=_halving)
        trainer.fit(model, Digits([1, 2], shots=8, batch_size=4), ckpt_path=ckpt_path, weights_only=True)
        assert last._save_on_train_epoch_end is None
        return model.state_dict(), trainer

    weights, trainer = fit("some")
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["last.ckpt"]
    saved = torch.load(tmp_path / "some" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == trainer.global_step
    assert all(torch.equal(value, weights[name]) for name, value in saved["state_dict"].items())
    more = {"max_steps": 10} if "max_steps" in options else {"max_epochs": 5}
    whole, _ = fit("whole", **more)
    rest, _ = fit("rest", tmp_path / "some" / "last.ckpt", **more)
    assert all(torch.equal(value, rest[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    ("saving", "stopping", "options", "saved"),
    [
        # Early stopping on training numbers comes after the module's hook.
        ({}, {"monitor": "train/loss", "check_on_train_epoch_end": True}, {"check_val_every_n_epoch": 5}, {8}),
        ({"monitor": "val/loss", "save_last": True}, None, {"max_epochs": 4, "check_val_every_n_epoch": 3}, {16}),
        # A stop that is asked for before it is allowed ends nothing.
        (
            {"save_top_k": -1},
            {"monitor": "train/loss", "check_on_train_epoch_end": True},
            {"min_epochs": 4, "check_val_every_n_epoch": 3},
            {12, 16},
        ),
        ({"every_n_epochs": 3}, None, {"max_epochs": 4}, {12}),
    ],
    ids=["stopped afterwards", "monitored", "not yet allowed", "every third"],
)
def test_last_weights_are_saved_however_the_fit_ends(
    saving: dict[str, Any], stopping: dict[str, Any] | None, options: dict[str, Any], saved: set[int], tmp_path: Path
) -> None:
    keeps = ModelCheckpoint(tmp_path / "kept", **saving)
    # Each epoch's loss counts as no improvement.
    stops = [] if stopping is None else [EarlyStopping(**stopping, patience=1, min_delta=100.0, verbose=False)]
    trainer = trainer_in(tmp_path, callbacks=[keeps, *stops], enable_checkpointing=True, **{"max_epochs": 9, **options})
    trainer.fit(Supervised(2, {**NETWORK, "in_chans": 1}), Digits([1, 2], shots=8, batch_size=4))
    contents = {path.name: torch.load(path, weights_only=True) for path in (tmp_path / "kept").iterdir()}
    last = {name: content for name, content in contents.items() if "last" in name}
    steps = {content["global_step"] for content in (last or contents).values()}
    assert steps == saved
    assert keeps._save_on_train_epoch_end is None


def test_a_model_whose_average_was_interrupted_trains_again(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 2:  # in which SWA measures statistics
                raise RuntimeError("out of paper")

    model, data = Supervised(2, SMALL), Digits([1, 2], shots=8, batch_size=4)
    averages = StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)
    with pytest.raises(RuntimeError, match="out of paper"):
        trainer_in(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[averages, Fails()]).fit(model, data)
    before = model.head.weight.detach().clone()
    trainer_in(tmp_path, limit_val_batches=0).fit(model, data)
    assert not torch.equal(model.head.weight, before)

"""Runs that stop where a checkpoint of Lightning lacks something end as those that did not stop."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, callbacks, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ncfinetune import Supervised
from ncfinetune.datamodules import Digits
from ncfinetune.interruptions import SaveOnSIGTERM
from ncfinetune.runs import Run

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:Be aware that when using `ckpt_path`, callbacks",
)
NETWORK: dict[str, Any] = {"name": "test_vit", "img_size": 8, "patch_size": 4, "in_chans": 1, "drop_path_rate": 0.2}
# Of 36 images in batches of 7; the last image is left out.
BATCHES = 5
RATE = 0.01


class Terminate(Callback):
    """Sends its process SIGTERM after a batch of training, counted from 0, or in the validation that follows it."""

    def __init__(self, batch: int, validation: bool = False) -> None:
        self.batch, self.validation = batch, validation

    def _end(self, trainer: Any, validation: bool) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch and validation == self.validation:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._end(trainer, False)

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        self._end(trainer, True)


class Fail(Callback):
    """Fails in a hook, or as a loader of a validation does, at a batch of training; saves what there is.

    Batches are counted from 0. Of the batches of a validation it fails at the second.
    """

    def __init__(self, path: Path, where: str, batch: int) -> None:
        self.path, self.where, self.batch = path, where, batch
        if where != "loader":
            setattr(self, where, self._fail)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        ready = trainer.datamodule.on_after_batch_transfer

        def fail(batch: Any, loader: int) -> Any:
            if trainer.validating:
                self._fail(trainer)
            return ready(batch, loader)

        if self.where == "loader":
            trainer.datamodule.on_after_batch_transfer = fail

    def _fail(self, trainer: Any, *rest: Any) -> None:
        late = "validation_batch" not in self.where or rest[2] == 1
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch and late:
            raise RuntimeError("out of memory")

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)


class Rates(Callback):
    """The learning rate of each batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


class Saved(ModelCheckpoint):
    """A checkpoint of each time, named by its step."""

    def __init__(self, folder: Path, **when: Any) -> None:
        super().__init__(folder / "checkpoints", "{step}", save_top_k=-1, **when)


def _halving_each_epoch(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
    """No epoch is better than the ones before it, whatever their loss."""
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE, momentum=0.9)


def _model(scheduler: Any = None) -> Supervised:
    seed_everything(0, verbose=False)
    return Supervised(3, NETWORK, optimizer=_sgd, lr_scheduler=scheduler)


def _fit(
    folder: Path,
    *added: Callback,
    ckpt_path: Path | None = None,
    scheduler: Any = None,
    model: Supervised | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """The weights at the end of a run, whose logs are in the folder."""
    model = model or _model(scheduler)
    trainer = Trainer(
        **{"max_epochs": 3, "accelerator": "cpu", "limit_val_batches": 3, "num_sanity_val_steps": 0, **options},
        callbacks=[*added, SaveOnSIGTERM()],
        logger=TensorBoardLogger(folder.parent, "", folder.name),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = Digits([1, 2, 3], shots=12, batch_size=7)
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return {name: value.clone() for name, value in model.state_dict().items()}


def _equal(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, others[name]) for name, value in weights.items())


def _same_numbers(folder: Path, besides: int | None = None) -> bool:
    """Whether ``run`` has logged what ``whole`` has, at the same steps, and no more but at one of its steps."""
    numbers, whole = (
        {tag: dict(points) for tag, points in Run(folder / name).points.items()} for name in ("run", "whole")
    )
    for tag, points in numbers.items():
        if besides is not None and besides not in whole[tag]:
            points.pop(besides, None)
        assert points == pytest.approx(whole[tag], rel=1e-6), tag
    return numbers.keys() == whole.keys()


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    "when",
    [
        pytest.param({"every_n_epochs": 1, "save_on_train_epoch_end": True}, id="epochs"),
        pytest.param({"save_on_train_epoch_end": False}, id="validations", marks=pytest.mark.slow),
        pytest.param({"every_n_train_steps": 1}, id="steps", marks=pytest.mark.slow),
    ],
)
def test_a_rate_is_lowered_on_a_plateau_as_in_a_run_that_did_not_stop(
    when: dict[str, Any], every: int, tmp_path: Path
) -> None:
    expected = [RATE / 2 ** (epoch // every) for epoch in range(4) for _ in range(BATCHES)]
    options: dict[str, Any] = {"scheduler": _halving_each_epoch, "max_epochs": 4, "check_val_every_n_epoch": every}
    whole = Rates()
    weights = _fit(tmp_path / "run", Saved(tmp_path, **when), whole, **options)
    assert whole.seen == expected
    saved = {int(path.stem.split("=")[1]): path for path in (tmp_path / "checkpoints").glob("*.ckpt")}
    for step in sorted(saved)[:-1] if len(saved) < 3 * BATCHES else (3, BATCHES, 2 * BATCHES + 2):
        rates = Rates()
        resumed = _fit(tmp_path / f"{step}", rates, ckpt_path=saved[step], **options)
        assert rates.seen == expected[step:]
        assert _equal(resumed, weights)


def test_a_model_of_a_run_that_had_ended_begins_another_one_anew(tmp_path: Path) -> None:
    _fit(
        tmp_path / "run", Saved(tmp_path, every_n_epochs=1, save_on_train_epoch_end=True), scheduler=_halving_each_epoch
    )
    ended = tmp_path / "checkpoints" / f"step={3 * BATCHES}.ckpt"
    resumed, fresh = (_model(_halving_each_epoch) for _ in range(2))
    _fit(tmp_path / "run", ckpt_path=ended, model=resumed)
    fresh.load_state_dict(torch.load(ended, weights_only=True)["state_dict"])
    weights = []
    for model in (resumed, fresh):
        seed_everything(1, verbose=False)
        rates = Rates()
        weights.append(_fit(tmp_path / f"another{len(weights)}", rates, model=model))
        assert rates.seen == [RATE / 2**epoch for epoch in range(3) for _ in range(BATCHES)]
    assert _equal(*weights)


@pytest.mark.parametrize("batch", [BATCHES + 2, *(pytest.param(batch, marks=pytest.mark.slow) for batch in (0, 3))])
def test_batches_that_wait_for_others_are_in_the_step_of_a_resumed_run(batch: int, tmp_path: Path) -> None:
    weights = _fit(tmp_path / "whole", accumulate_grad_batches=2)
    with pytest.raises(SIGTERMException):
        _fit(tmp_path / "run", Terminate(batch), accumulate_grad_batches=2)
    stopped = tmp_path / "run" / "checkpoints" / "stopped.ckpt"
    waits = batch % BATCHES % 2 == 0
    assert bool(torch.load(stopped, weights_only=True)["processes"][0]["gradients"]) == waits
    assert _equal(_fit(tmp_path / "run", ckpt_path=stopped, accumulate_grad_batches=2), weights)
    assert _same_numbers(tmp_path)


@pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="this Lightning has no averaging callback")
def test_the_weights_of_a_run_that_is_stopped_in_a_validation_are_not_its_averages(tmp_path: Path) -> None:
    def average() -> Callback:
        return callbacks.EMAWeightAveraging(decay=0.9)

    weights = _fit(tmp_path / "whole", average())
    with pytest.raises(SIGTERMException):
        _fit(tmp_path / "run", average(), Terminate(2 * BATCHES - 1, validation=True))
    stopped = tmp_path / "run" / "checkpoints" / "stopped.ckpt"
    assert _equal(_fit(tmp_path / "run", average(), ckpt_path=stopped), weights)
    assert _same_numbers(tmp_path)


FAILURES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "a run's first batch": ("on_train_batch_start", 0, {}),
    "an epoch's first batch": ("on_train_batch_start", BATCHES, {}),
    "a batch": ("on_train_batch_start", BATCHES + 2, {}),
    "an epoch's last batch": ("on_train_batch_start", 2 * BATCHES - 1, {}),
    "the start of an epoch": ("on_train_epoch_start", 2 * BATCHES - 1, {}),
    "a batch that waits": ("on_train_batch_start", BATCHES, {"accumulate_grad_batches": 2}),
    "a batch that others wait for": ("on_train_batch_start", BATCHES + 1, {"accumulate_grad_batches": 2}),
    "a batch before a validation": ("on_train_batch_start", BATCHES + 1, {"val_check_interval": 2}),
    "a batch after a validation": ("on_train_batch_start", BATCHES + 2, {"val_check_interval": 2}),
    "a validation": ("on_validation_batch_start", 2 * BATCHES - 1, {}),
    "the first batch of a validation": ("loader", 2 * BATCHES - 1, {}),
    "the end of a validation": ("on_validation_epoch_end", 2 * BATCHES - 1, {}),
}
QUICK = ("an epoch's last batch", "a batch that others wait for", "a validation")


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("where", [at if at in QUICK else pytest.param(at, marks=pytest.mark.slow) for at in FAILURES])
def test_a_checkpoint_at_an_exception_is_of_before_what_failed(where: str, averages: bool, tmp_path: Path) -> None:
    """As ``ModelCheckpoint(save_on_exception=True)`` saves."""
    hook, batch, options = FAILURES[where]
    if averages and not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no averaging callback")

    def fit(name: str, fail: list[Callback], ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
        average = [callbacks.EMAWeightAveraging(decay=0.9)] if averages else []
        # Before them, so that the averages are not swapped out yet where the end of a validation fails.
        return _fit(tmp_path / name, *fail, *average, ckpt_path=ckpt_path, **options)

    weights = fit("whole", [])
    failed = tmp_path / "failed.ckpt"
    with pytest.raises(RuntimeError, match="out of memory"):
        fit("run", [Fail(failed, hook, batch)])
    assert _equal(fit("run", [], failed), weights)
    assert _same_numbers(tmp_path)


def test_a_fit_forgets_what_a_failed_one_was_resumed_from(tmp_path: Path) -> None:
    _fit(tmp_path / "run", Saved(tmp_path, every_n_epochs=1, save_on_train_epoch_end=True))
    saved = tmp_path / "checkpoints" / f"step={2 * BATCHES}.ckpt"
    resumed, fresh = (_model() for _ in range(2))
    fail = Fail(tmp_path / "failed.ckpt", "on_sanity_check_start", 2 * BATCHES - 1)
    with pytest.raises(RuntimeError, match="out of memory"):
        _fit(tmp_path / "run", fail, ckpt_path=saved, model=resumed, num_sanity_val_steps=1)
    fresh.load_state_dict(torch.load(saved, weights_only=True)["state_dict"])
    weights = []
    for model in (resumed, fresh):
        seed_everything(1, verbose=False)
        weights.append(_fit(tmp_path / f"another{len(weights)}", model=model))
    assert _equal(*weights)


def test_a_run_that_is_stopped_again_after_a_repeated_validation_keeps_its_numbers(tmp_path: Path) -> None:
    _fit(tmp_path / "whole")
    with pytest.raises(SIGTERMException):
        _fit(tmp_path / "run", Terminate(2 * BATCHES - 1, validation=True))
    stopped = tmp_path / "run" / "checkpoints" / "stopped.ckpt"
    saved = Saved(tmp_path, save_on_train_epoch_end=False)
    with pytest.raises(SIGTERMException):
        _fit(tmp_path / "run", saved, Terminate(2 * BATCHES), ckpt_path=stopped)
    # As if the machine had failed, which leaves the checkpoint of the end of the validation.
    _fit(tmp_path / "run", ckpt_path=tmp_path / "checkpoints" / f"step={2 * BATCHES}.ckpt")
    assert _same_numbers(tmp_path)


@pytest.mark.parametrize(
    ("step", "epochs"),
    [
        (BATCHES, -1),
        (BATCHES + 2, 3),
        *(pytest.param(*of, marks=pytest.mark.slow) for of in ((BATCHES, 3), (BATCHES + 2, -1))),
    ],
)
@pytest.mark.parametrize("within", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_that_its_number_of_steps_ended_goes_on_where_it_was(
    step: int, epochs: int, within: bool, tmp_path: Path
) -> None:
    last = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    options = {"max_epochs": epochs, **({"val_check_interval": 2} if within else {})}
    weights = _fit(tmp_path / "whole", **options, max_steps=3 * BATCHES)
    _fit(tmp_path / "run", Saved(tmp_path, **last), **options, max_steps=step)
    path = tmp_path / "checkpoints" / f"step={step}.ckpt"
    assert _equal(_fit(tmp_path / "run", ckpt_path=path, **options, max_steps=3 * BATCHES), weights)
    # The end of the first run was the end of an epoch to it.
    assert _same_numbers(tmp_path, besides=step - 1)

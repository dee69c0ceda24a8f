"""What the steps log and which rates they take: exact means, labels that are refused, schedulers, tuners."""

from functools import partial
from pathlib import Path
from typing import Any

import ddp
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.tuner import Tuner
from torch.optim import SGD, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric

from ncfinetune import FineTuner, SimCLR, SupCon, Supervised, classifier, learner
from ncfinetune.datamodules import Digits
from ncfinetune.losses import contrastive_loss
from ncfinetune.sample_mean import SampleMean
from ncfinetune.schedule import WarmupCosine, follows_rates, scale_rates

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:Grad strides do not match bucket view strides",
)

SMALL = {"name": "resnet18", "stem": "cifar", "in_chans": 1, "channels": [4, 4, 4, 4]}
VIT = {"name": "test_vit", "img_size": 8, "patch_size": 2, "in_chans": 1}


def _trainer(**arguments: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return Trainer(**{"max_epochs": 1, "enable_checkpointing": False, "num_sanity_val_steps": 0, **quiet, **arguments})


# Means


def test_a_mean_is_of_samples_in_double_precision_whatever_the_module_is_cast_to() -> None:
    module = torch.nn.ModuleDict({"mean": SampleMean()}).to(torch.bfloat16)
    mean: Any = module["mean"]
    values = torch.rand(1000) + 1000
    for some in values.split(7):
        mean.update(some.mean(), len(some))
    assert (mean.total.dtype, mean.samples.dtype) == (torch.float64, torch.float64)
    assert mean.compute().item() == pytest.approx(values.double().mean().item(), rel=1e-7)
    mean.reset()
    mean.update(torch.tensor([True, False, True]), 3)
    assert mean.compute() == torch.tensor(2 / 3)
    assert module.to("meta")["mean"].total.device.type == "meta"


def test_means_are_added_over_processes(tmp_path: Path) -> None:
    def task(rank: int) -> float:
        mean = SampleMean()
        for value in ([1.0, 2.0, 3.0], [4.0])[rank]:
            mean.update(torch.tensor([value]), 1)
        return mean.compute().item()

    assert ddp.run(2, tmp_path, task) == [2.5, 2.5]


class _Stop(Callback):
    """Ends a training, a validation or a test by an error in its second batch, as Ctrl-C would."""

    def _end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int, *rest: Any) -> None:
        if index == 1 and not trainer.sanity_checking:
            raise ZeroDivisionError

    on_train_batch_end = on_validation_batch_end = on_test_batch_end = _end


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_a_run_that_was_interrupted_leaves_nothing_in_the_means_of_the_next(name: str) -> None:
    """As after Ctrl-C in a notebook. The learning rate is 0, so that all means are those of the same weights."""
    torch.manual_seed(0)
    model = Supervised(3, SMALL, optimizer=partial(SGD, lr=0.0))
    first, second = (DataLoader(_uneven(n, seed), batch_size=4) for n, seed in ((12, 1), (10, 2)))

    def loss(loader: DataLoader, model: Supervised, **arguments: Any) -> float:
        trainer = _trainer(limit_val_batches=0 if name == "train" else 1.0, **arguments)
        run = {"train": trainer.fit, "val": trainer.validate, "test": trainer.test}[name]
        run(model, loader)
        return trainer.callback_metrics[f"{name}/loss"].item()

    with pytest.raises(ZeroDivisionError):
        loss(first, model, callbacks=[_Stop()])
    again = Supervised(3, SMALL, optimizer=partial(SGD, lr=0.0))
    again.load_state_dict(model.state_dict())
    assert loss(second, model) == loss(second, again)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_resumed_in_the_module_of_an_interrupted_one_has_its_own_means(tmp_path: Path) -> None:
    data = DataLoader(_uneven(12, 1), batch_size=4)

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
            if trainer.global_step == 1:
                trainer.save_checkpoint(tmp_path / "1.ckpt")

    model = Supervised(3, SMALL, optimizer=partial(SGD, lr=0.1))
    with pytest.raises(ZeroDivisionError):
        _trainer(callbacks=[Save(), _Stop()]).fit(model, data)
    losses = []
    for module in (model, Supervised(3, SMALL, optimizer=partial(SGD, lr=0.1))):
        trainer = _trainer()
        trainer.fit(module, data, ckpt_path=tmp_path / "1.ckpt")
        losses.append(trainer.callback_metrics["train/loss"].item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("split", ["val", "test"])
def test_each_of_several_loaders_has_its_own_means(split: str) -> None:
    sets = [_uneven(n, seed) for n, seed in ((10, 1), (6, 2))]
    torch.manual_seed(0)
    model, trainer = Supervised(3, SMALL), _trainer()
    loaders = [DataLoader(own, batch_size=4) for own in sets]
    (trainer.validate if split == "val" else trainer.test)(model, loaders)
    model.eval()
    for index, own in enumerate(sets):
        images, labels = own.tensors
        with torch.no_grad():
            logits = model(images)
        found = {name: trainer.callback_metrics[f"{split}/{name}/dataloader_idx_{index}"] for name in ("acc", "loss")}
        assert found["acc"].item() == pytest.approx((logits.argmax(1) == labels).double().mean().item())
        assert found["loss"].item() == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_losses_of_half_precision_are_not_rounded(loss: Any) -> None:
    """Those of the same logits in float32; nor are weights of classes, which the precision would cast."""
    weights = [1.1, 2.2, 3.3]
    model = Supervised(3, VIT, loss=loss, class_weight=weights).to(torch.bfloat16)
    logits, labels = torch.randn(50, 3).bfloat16(), torch.arange(50) % 3
    wide = Supervised(3, VIT, loss=loss, class_weight=weights)
    for mode in (True, False):
        torch.testing.assert_close(
            model.train(mode).loss(logits, labels), wide.train(mode).loss(logits.float(), labels)
        )
    shares = torch.rand(50, 3).softmax(1).bfloat16()
    torch.testing.assert_close(model.loss(logits, shares), wide.loss(logits.float(), shares.float()))
    assert model.class_weights.tolist() == pytest.approx(weights)


class _Unequal(torch.utils.data.IterableDataset):
    """Two samples in the first of two processes, ten in the other, each process in one batch."""

    def __iter__(self) -> Any:
        rank = torch.distributed.get_rank()
        generator = torch.Generator().manual_seed(rank)
        for number in range((2, 10)[rank]):
            yield torch.randn(2, 1, 8, 8, generator=generator) * (1 + rank), number % 3


def test_a_contrastive_loss_is_logged_as_it_is_trained_of_batches_of_unequal_size(tmp_path: Path) -> None:
    """The mean of what the processes contribute, whatever number of samples each has."""

    class Write(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *rest: Any) -> None:
            torch.save(outputs["loss"].detach(), tmp_path / f"{trainer.global_rank}.pt")

    trainer = _trainer(strategy="ddp_fork", devices=2, limit_val_batches=0, callbacks=[Write()])
    trainer.fit(SupCon(SMALL, projection="linear"), DataLoader(_Unequal(), batch_size=10))
    own = [torch.load(tmp_path / f"{rank}.pt").item() for rank in range(2)]
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(sum(own) / 2, rel=1e-6)
    assert abs(own[0] - own[1]) > 0.1


def _uneven(n: int, seed: int, views: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, *([views] if views else []), 1, 8, 8, generator=generator)
    return TensorDataset(images, torch.arange(n) % 3)


class _Sharded(torch.utils.data.Sampler):
    """Each process's own share of 13 samples, none twice."""

    def __init__(self, samples: int, rank: int, world: int) -> None:
        self.own = range(rank, samples, world)

    def __iter__(self) -> Any:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


def _run_uneven(model: LightningModule, tmp_path: Path, world: int, views: int = 0) -> dict[str, float]:
    """What ``world`` processes log of 13 samples, of which the first has 7."""

    class Data(Digits):
        def setup(self, stage: str) -> None: ...

        def _own(self, seed: int, n: int) -> DataLoader:
            data = _uneven(n, seed, views)
            sampler = _Sharded(n, self.trainer.global_rank, self.trainer.world_size)
            return DataLoader(data, batch_size=5, sampler=sampler)

        def train_dataloader(self) -> DataLoader:
            return self._own(0, 12)

        def val_dataloader(self) -> DataLoader:
            return self._own(1, 13)

        test_dataloader = val_dataloader

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    trainer = _trainer(
        devices=world,
        strategy="ddp_fork" if world > 1 else "auto",
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, datamodule=Data([0, 1, 2]))
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def _frozen(method: Any) -> Any:
    torch.manual_seed(0)
    stay = partial(SGD, lr=0.0)
    if method is FineTuner:
        return FineTuner(3, VIT, allow_random=True, optimizer=stay)
    return Supervised(3, VIT, optimizer=stay) if method is Supervised else method(VIT, optimizer=stay)


@pytest.mark.parametrize("method", [FineTuner, Supervised])
@pytest.mark.parametrize("world", [1, 2])
def test_logged_means_count_each_sample_of_each_process_once(method: Any, world: int, tmp_path: Path) -> None:
    model = _frozen(method)
    got = _run_uneven(model, tmp_path, world)
    for split, data in (("train", _uneven(12, 0)), ("val", _uneven(13, 1))):
        images, labels = data.tensors
        with torch.no_grad():
            logits = model.eval()(images)
        expected = torch.nn.functional.cross_entropy(logits.double(), labels)
        assert got[f"{split}/loss"] == pytest.approx(expected.item(), rel=1e-6)
        assert got[f"{split}/acc"] == pytest.approx((logits.argmax(1) == labels).double().mean().item(), rel=1e-6)


def test_contrastive_validation_loss_is_that_of_the_global_batches(tmp_path: Path) -> None:
    model = _frozen(SupCon)
    got = _run_uneven(model, tmp_path, 2, views=2)
    images, labels = _uneven(13, 1, views=2).tensors
    batches = [[0, 2, 4, 6, 8, 1, 3, 5, 7, 9], [10, 12, 11]]
    total = 0.0
    for batch in batches:
        with torch.no_grad():
            z = model.projection(model(images[batch])).unflatten(0, (len(batch), 2))
        total += len(batch) * contrastive_loss(z, labels[batch], 0.1).item()
    assert got["val/loss"] == pytest.approx(total / 13, rel=1e-5)


@pytest.mark.parametrize("method", [FineTuner, Supervised, SimCLR, SupCon])
def test_learners_log_only_numbers_and_metrics_that_move_with_them(method: Any, tmp_path: Path) -> None:
    model, logged = _frozen(method), []
    model.log = lambda name, value, **options: logged.append((name, value))
    _run_uneven(model, tmp_path, 1, views=2 if method in (SimCLR, SupCon) else 0)
    metrics = [value for _, value in logged if not isinstance(value, float)]
    assert {name for name, _ in logged} >= {"train/loss", "val/loss"}
    assert all(isinstance(value, Metric) and any(value is m for m in model.modules()) for value in metrics)


def test_a_logged_mean_can_be_monitored_and_is_there_when_an_epoch_ends(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    class Reads(Callback):
        found: set[str]

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.found = set(trainer.callback_metrics)

    reads, keep = Reads(), ModelCheckpoint(tmp_path, monitor="val/acc", mode="max")
    callbacks = [reads, keep, EarlyStopping("train/loss")]
    trainer = _trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=2)
    trainer.fit(_frozen(FineTuner), datamodule=Digits([0, 1, 2], shots=8))
    assert reads.found == {"train/loss", "train/acc", "val/loss", "val/acc"}
    assert keep.best_model_score == trainer.callback_metrics["val/acc"]


# Labels


def _labelled(labels: torch.Tensor) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(len(labels), 1, 8, 8), labels), batch_size=2)


MULTI_HOT = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 1], [1, 0, 0]])


def test_multi_hot_labels_are_refused() -> None:
    message = (
        r"expected labels \(N, K\) to be class probabilities, not negative, whose rows sum to 1, got a row that "
        r"sums to 2; "
        r"multi-label data, in which an image has several classes, are not supported"
    )
    with pytest.raises(ValueError, match=message):
        _trainer().fit(_frozen(FineTuner), _labelled(MULTI_HOT))
    with pytest.raises(ValueError, match="got a row that sums to 0;"):
        _trainer().validate(_frozen(FineTuner), _labelled(MULTI_HOT * 0))
    with pytest.raises(ValueError, match="got a row that sums to 1 and holds -1;"):
        _trainer().validate(_frozen(FineTuner), _labelled(torch.tensor([[3.0, -1, -1]] * 4)))
    with pytest.raises(ValueError, match=r"expected labels \(N,\) as integers, got torch.float32; cast them by labels"):
        _trainer().validate(_frozen(FineTuner), _labelled(torch.tensor([0.0, 1, 2, 0])))
    _trainer().fit(_frozen(FineTuner), _labelled(MULTI_HOT[:2].softmax(1)))


@pytest.mark.parametrize("run", ["fit", "validate", "test"])
def test_multi_hot_labels_behind_the_first_batch_are_counted_where_looking_would_wait(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (classifier, learner):
        monkeypatch.setattr(module, "may_look", lambda value: False)
    trainer = _trainer()
    with pytest.raises(ValueError, match="got 1 rows in this epoch that do not; multi-label data"):
        getattr(trainer, run)(_frozen(FineTuner), _labelled(MULTI_HOT))
    _trainer(precision="bf16-true").fit(_frozen(FineTuner), _labelled(torch.rand(8, 3).softmax(1)))


# Schedulers


class _Rates(Callback):
    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def _rates(
    scheduler: Any, epochs: int = 3, lr: float | None = None, validate_every: int = 1, **options: Any
) -> list[list[float]]:
    """Rates of each step: 8 images, batches of 4."""
    if "lr_batch" in options:
        model: Any = Supervised(
            3, VIT, optimizer=partial(SGD, lr=0.01, momentum=0.9), lr_scheduler=scheduler, **options
        )
    else:
        optimizer = partial(SGD, lr=0.01, momentum=0.9)
        model = FineTuner(
            3, VIT, allow_random=True, train="blocks.2", optimizer=optimizer, lr_scheduler=scheduler, **options
        )
    model.lr = lr
    seen = _Rates()
    trainer = _trainer(max_epochs=epochs, callbacks=[seen], check_val_every_n_epoch=validate_every)
    trainer.fit(model, *(DataLoader(_uneven(8, 0), batch_size=4) for _ in ("train", "val")))
    return seen.rates


SCHEDULERS = {
    "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.01, total_steps=8),
    "cyclic": partial(lr_scheduler.CyclicLR, base_lr=0.001, max_lr=0.01, step_size_up=3),
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=7),
    "restarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=4),
    "step": partial(lr_scheduler.StepLR, step_size=2),
    "polynomial": partial(lr_scheduler.PolynomialLR, total_iters=7),
    "lambda": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: min(1.0, step / 5)),
    "multiplicative": partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda step: 0.9),
    "warm-up": partial(WarmupCosine, epochs=8, warmup=2),
    "chained": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)]),
    "sequence with a cycle": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.OneCycleLR(o, 0.01, total_steps=8)], [2]
    ),
}


SHORT = partial(WarmupCosine, epochs=2)


@pytest.mark.parametrize(
    ("interval", "arguments", "text"),
    [
        ("epoch", {"max_epochs": 3}, "the run has 3 epochs; give epochs=3"),
        ("epoch", {"max_epochs": -1, "max_steps": 5}, "the run has 3 epochs; give epochs=3"),
        (
            "epoch",
            {"max_epochs": -1, "max_steps": 4, "callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]},
            "the run has 3 epochs; give epochs=3",
        ),
        ("step", {"max_epochs": 2}, "the run has 4 steps, by which lr_interval=step counts; give epochs=4"),
    ],
)
def test_a_schedule_that_ends_before_the_run_is_refused(interval: Any, arguments: dict[str, Any], text: str) -> None:
    model = Supervised(3, VIT, lr_scheduler=SHORT, lr_interval=interval)
    with pytest.raises(ValueError, match=f"has epochs=2, after which the learning rate is 0, but {text}$"):
        _trainer(**arguments).fit(model, DataLoader(_uneven(8, 0), batch_size=4))
    assert model.trainer.global_step == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_epochs": 2},
        {"max_epochs": 9, "max_steps": 4},
        {"max_epochs": -1, "max_steps": 2, "accumulate_grad_batches": 3},  # each epoch has two batches, and one step
        {"max_epochs": 3, "callbacks": [StochasticWeightAveraging(0.01, swa_epoch_start=2)]},
    ],
)
def test_a_schedule_as_long_as_the_run_or_its_replacement_is_not(arguments: dict[str, Any]) -> None:
    model = Supervised(3, VIT, lr_scheduler=SHORT)
    _trainer(**arguments).fit(model, DataLoader(_uneven(8, 0), batch_size=4))
    assert model.trainer.current_epoch == (3 if "callbacks" in arguments else 2)


def test_a_run_is_resumed_with_a_longer_schedule(tmp_path: Path) -> None:
    saved, last = None, str(tmp_path / "last.ckpt")
    for epochs in (2, 3):
        model = Supervised(3, VIT, lr_scheduler=partial(WarmupCosine, epochs=epochs))
        trainer = _trainer(max_epochs=epochs)
        trainer.fit(model, DataLoader(_uneven(8, 0), batch_size=4), ckpt_path=saved)
        assert trainer.global_step == 2 * epochs
        trainer.save_checkpoint(last)
        saved = last


# Each keeps its rates in another way; the others are like one of these.
FAST = {"one cycle", "cosine", "lambda", "sequence with a cycle"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in SCHEDULERS]
)
def test_factors_hold_under_every_scheduler(name: str) -> None:
    plain = _rates(SCHEDULERS[name], lr_interval="step")
    assert len({rate for (rate,) in plain}) > 2
    by_ten = _rates(SCHEDULERS[name], lr_interval="step", head_lr_factor=10)
    assert by_ten == [pytest.approx([body, 10 * body]) for (body,) in plain]
    quarter = _rates(SCHEDULERS[name], lr_interval="step", lr_batch=16)
    assert quarter == [pytest.approx([body / 4]) for (body,) in plain]


class _Own(lr_scheduler.LRScheduler):
    """Somebody's schedule that knows its rates by another name than torch's do."""

    def get_lr(self) -> list[float]:
        return [0.1 / (1 + self.last_epoch)] * len(self.optimizer.param_groups)


def test_a_scheduler_that_undoes_the_factors_is_refused() -> None:
    with pytest.raises(
        ValueError, match="would undo lr_batch, layer_decay and head_lr_factor, which multiply it by 1, 10; leave"
    ):
        _rates(_Own, head_lr_factor=10)
    with pytest.raises(
        ValueError, match="would undo lr_batch, layer_decay and head_lr_factor, which multiply it by 0.25; leave"
    ):
        _rates(_Own, lr_batch=16)
    assert _rates(_Own)[0] == [0.1]
    with pytest.raises(ValueError, match=r"so that lr=0.5 would do nothing; give the rate to the scheduler \(max_lr"):
        _rates(SCHEDULERS["one cycle"], lr=0.5)


def test_trial_of_a_scheduler_leaves_the_optimiser_alone() -> None:
    optimizer = SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    assert follows_rates(partial(lr_scheduler.ExponentialLR, gamma=0.9), optimizer)
    assert not follows_rates(partial(lr_scheduler.OneCycleLR, max_lr=1, total_steps=3), optimizer)
    assert follows_rates(partial(lr_scheduler.OneCycleLR, max_lr=1, total_steps=3), optimizer, [2.0])
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert "initial_lr" not in optimizer.param_groups[0]
    scale_rates(optimizer, None, [3.0])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3)


def test_scheduler_is_stepped_each_epoch_or_each_step() -> None:
    halve = partial(lr_scheduler.ExponentialLR, gamma=0.5)
    assert [rate for rate, *_ in _rates(halve)] == [0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025]
    assert [rate for rate, *_ in _rates(halve, epochs=2, lr_interval="step")] == [0.01, 0.005, 0.0025, 0.00125]
    with pytest.raises(ValueError, match='lr_interval="step" needs an lr_scheduler to step'):
        Supervised(3, VIT, lr_interval="step")
    with pytest.raises(ValueError, match="expected lr_interval epoch or step, got 'batch'"):
        Supervised(3, VIT, lr_scheduler=halve, lr_interval="batch")


def test_plateau_watches_the_validation_loss_or_what_it_says() -> None:
    message = (
        "torch's ReduceLROnPlateau with mode='max' has no monitor, and the default val/loss is not maximised; "
        "take lightning.pytorch.cli.ReduceLROnPlateau and give its monitor, such as val/acc"
    )
    with pytest.raises(ValueError, match=message):
        _rates(partial(lr_scheduler.ReduceLROnPlateau, mode="max"))
    with pytest.raises(ValueError, match=r'ReduceLROnPlateau needs lr_interval="epoch", got "step": what it monitors'):
        _rates(partial(lr_scheduler.ReduceLROnPlateau), lr_interval="step")
    never_better = {"patience": 0, "factor": 0.1, "threshold": 1e9, "threshold_mode": "abs"}
    assert _rates(partial(lr_scheduler.ReduceLROnPlateau, **never_better))[-1][0] < 0.01
    watching = partial(ReduceLROnPlateau, monitor="train/loss", **never_better)
    rates = _rates(watching, head_lr_factor=10)
    assert rates[-1] == pytest.approx([rates[-1][0], 10 * rates[-1][0]])
    assert rates[-1][0] < 0.01


@pytest.mark.parametrize(
    ("watching", "expected"),
    [
        (partial(lr_scheduler.ReduceLROnPlateau), [1, 1, 1, 1, 0.1, 0.1]),  # validated after the second, the fourth ...
        (partial(ReduceLROnPlateau, monitor="val/acc", mode="max"), [1, 1, 1, 1, 0.1, 0.1]),
        (partial(ReduceLROnPlateau, monitor="train/loss"), [1, 1, 0.1, 0.01, 0.001, 0.0001]),
    ],
)
def test_plateau_of_a_validation_is_watched_where_there_is_one(watching: Any, expected: list[float]) -> None:
    never_better = {"patience": 0, "factor": 0.1, "threshold": 1e9, "threshold_mode": "abs"}
    rates = _rates(partial(watching, **never_better), epochs=6, validate_every=2)
    assert [rate / 0.01 for rate, *_ in rates[::2]] == pytest.approx(expected)


# Tuners


def _tuned_model(method: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    optimizer = partial(SGD, lr=0.01)
    if method is FineTuner:
        return FineTuner(3, SMALL, allow_random=True, optimizer=optimizer, **options)
    return (
        Supervised(3, SMALL, optimizer=optimizer, **options)
        if method is Supervised
        else method(SMALL, optimizer=optimizer, **options)
    )


def _digits(method: Any) -> Digits:
    return Digits([0, 1, 2], shots=20, batch_size=4, views=2 if method in (SimCLR, SupCon) else 1)


@pytest.mark.parametrize(
    "method",
    [FineTuner, SupCon, pytest.param(Supervised, marks=pytest.mark.slow), pytest.param(SimCLR, marks=pytest.mark.slow)],
)
def test_tuner_finds_a_rate_that_the_optimiser_takes(method: Any, tmp_path: Path) -> None:
    model, trainer, rates = _tuned_model(method), _trainer(default_root_dir=tmp_path), _Rates()
    found = Tuner(trainer).lr_find(model, datamodule=_digits(method), num_training=15)
    assert found is not None
    assert model.lr == found.suggestion()
    trainer.callbacks.append(rates)
    trainer.fit(model, datamodule=_digits(method))
    assert rates.rates[0] == [model.lr]


def _finder(**options: Any) -> LearningRateFinder:
    return LearningRateFinder(num_training_steps=15, **options)


def test_found_rate_holds_with_factor_scheduler_and_batch(tmp_path: Path) -> None:
    rates = _Rates()
    options = {"train": "layer4.1", "head_lr_factor": 10, "lr_scheduler": partial(lr_scheduler.StepLR, step_size=1)}
    model = _tuned_model(FineTuner, **options)
    _trainer(callbacks=[_finder(), rates], max_epochs=2, default_root_dir=tmp_path).fit(
        model, datamodule=_digits(FineTuner)
    )
    assert model.lr not in (None, 0.01)
    assert rates.rates[0] == pytest.approx([model.lr, 10 * model.lr])
    assert rates.rates[-1] == pytest.approx([model.lr / 10, model.lr])
    scaled = _tuned_model(Supervised, lr_batch=2)
    rates = _Rates()
    _trainer(callbacks=[_finder(), rates], default_root_dir=tmp_path).fit(scaled, datamodule=_digits(Supervised))
    assert rates.rates[0] == [scaled.lr]


@pytest.mark.slow
def test_rate_is_scaled_to_the_batch_size_that_a_finder_leaves(tmp_path: Path) -> None:
    rates, data = _Rates(), _digits(Supervised)
    finder = BatchSizeFinder(max_trials=3, steps_per_trial=1)
    _trainer(callbacks=[finder, rates], default_root_dir=tmp_path).fit(
        _tuned_model(Supervised, lr_batch=2), datamodule=data
    )
    assert data.batch_size == finder.optimal_batch_size == 8
    assert rates.rates[0] == [pytest.approx(0.01 * 8 / 2)]
    assert len(rates.rates) == 8


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize("finder", [_finder, partial(BatchSizeFinder, max_trials=2, steps_per_trial=1)])
def test_what_a_run_starts_with_outlives_a_finder(finder: Any, cache: str, tmp_path: Path) -> None:
    class First(Callback):
        weight: torch.Tensor
        images: Any

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                self.weight, self.images = pl_module.classifier.weight.clone(), batch[0]

    def started(callbacks: list[Callback]) -> First:
        first = First()
        model = _tuned_model(FineTuner, head_init="mean", cache=cache)
        data = Digits([0, 1, 2], shots=8, batch_size=4)
        _trainer(callbacks=[*callbacks, first], default_root_dir=tmp_path).fit(model, datamodule=data)
        return first

    alone, after = started([]), started([finder()])
    torch.testing.assert_close(after.weight, alone.weight)
    assert isinstance(after.images, torch.Tensor) == (cache == "none")


def test_mean_start_outlives_a_tuner_of_the_same_model(tmp_path: Path) -> None:
    model, trainer = _tuned_model(FineTuner, head_init="mean"), _trainer(default_root_dir=tmp_path)
    data = Digits([0, 1, 2], shots=8, batch_size=4)
    Tuner(trainer).lr_find(model, datamodule=data, num_training=15)
    model.lr = 0.0
    trainer.fit(model, datamodule=data)
    alone = _tuned_model(FineTuner, head_init="mean")
    alone.lr = 0.0
    _trainer().fit(alone, datamodule=Digits([0, 1, 2], shots=8, batch_size=4))
    torch.testing.assert_close(model.classifier.weight, alone.classifier.weight)


@pytest.mark.parametrize(
    ("scheduling", "most", "steps"), [({0: 2}, -1, 2), ({0: 2, 1: 1}, -1, 3), ({0: 2, 1: 1}, 2, 2)]
)
def test_steps_of_a_schedule_are_those_of_accumulated_batches(
    scheduling: dict[int, int], most: int, steps: int
) -> None:
    def fitted(length: int) -> int:
        schedule = partial(WarmupCosine, epochs=length)
        model = Supervised(3, VIT, lr_scheduler=schedule, lr_interval="step")
        trainer = _trainer(max_epochs=2, max_steps=most, callbacks=[GradientAccumulationScheduler(scheduling)])
        trainer.fit(model, DataLoader(_uneven(8, 0), batch_size=4))
        return trainer.global_step

    assert fitted(steps) == steps
    with pytest.raises(ValueError, match=f"but the run has {steps} steps, by which lr_interval=step counts"):
        fitted(steps - 1)

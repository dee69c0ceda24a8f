"""The base class of learners: a backbone, an optimiser and its learning rates, exact means and resuming.

Legend: ``N`` samples.
"""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import Metric

from ncfinetune.averages import (
    averages_in_weights,
    is_average,
    keep_average_in_step,
    only_measure,
    replaces_schedule,
    save_average,
    step_again,
    warn_of_one_rate,
)
from ncfinetune.backbone import Backbone
from ncfinetune.built_in import built_in
from ncfinetune.checksums import check_zip
from ncfinetune.finders import refuse_finders_of_resumed, scale_search
from ncfinetune.inputs import may_look
from ncfinetune.last_weights import LastWeights
from ncfinetune.launches import check_launched, warn_of_what_stays
from ncfinetune.loop_progress import (
    forget_interrupted_validation,
    let_plateaus_step,
    take_up_after_last_batch,
    take_up_epoch,
)
from ncfinetune.resume import Resumption, last_saved
from ncfinetune.sample_mean import SampleMean
from ncfinetune.schedule import (
    check_lengths,
    check_monitors,
    configured,
    follows_rates,
    images_a_step,
    monitored,
    scale_rates,
)
from ncfinetune.synchronised import synchronise
from ncfinetune.weight_files import DATA

Batch = tuple[Tensor, Tensor]
Interval = Literal["epoch", "step"]


class Learner(LightningModule, ABC):
    """A LightningModule that trains a backbone. Abstract.

    Hyper-parameters are saved as built-in types, so that a checkpoint loads with ``weights_only=True``, and without
    needing the file of pre-trained weights that the run started from.

    The rates of a scheduler that sets them itself, as `OneCycleLR` does from its ``max_lr``, are scaled like the
    optimiser's.

    Args:
        backbone: A timm name, the arguments of a `Backbone`, or a `Backbone`.
        optimizer: Makes an optimiser of the trained parameters; None is AdamW with learning rate 1e-3.
        lr_scheduler: Makes a scheduler of that optimiser.
        lr_batch: Batch size (images per step) that the optimiser's learning rate is meant for. The rate is scaled
            linearly to the actual number of images per step, over all processes and accumulated batches (Goyal et al.
            2017, arXiv 1706.02677, section 2.1), and the factor is logged. None does not scale it.
        lr_interval: ``epoch`` steps the scheduler once an epoch, ``step`` after each step of the optimiser.

    Attributes:
        lr: A learning rate that replaces the optimiser's own and its scaling by ``lr_batch``, as set by Lightning's
            learning-rate finder; None keeps them.
        class_names: Class names of the datamodule that the learner was trained on, ``0`` to ``K - 1`` where it only
            numbers the classes; None while unknown.
        preprocessing: Image preprocessing of that datamodule: ``mean``, ``std``, ``input_size`` and more, under timm's
            names.

    Raises:
        ValueError: ``lr_batch`` is below 1; ``lr_interval`` is unknown, or there is no scheduler for it; a scheduler
            would undo the factors of the learning rate, or monitors what the run does not measure; in training, an
            epoch ends without a batch.
        FloatingPointError: In training, when the loss is not finite.
    """

    # The numbers that `log_mean` logs, each under train/, val/ and test/.
    logged: ClassVar[tuple[str, ...]] = ("loss",)
    # What a ReduceLROnPlateau monitors unless it says.
    plateau_monitor: ClassVar[str] = "val/loss"

    def __init__(
        self,
        backbone: str | dict[str, Any] | Backbone,
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerCallable | None,
        lr_batch: int | None = None,
        lr_interval: Interval = "epoch",
    ) -> None:
        super().__init__()
        if lr_batch is not None and lr_batch < 1:
            raise ValueError(f"expected lr_batch of at least 1 image, or None, got {lr_batch}")
        _check_interval(lr_interval, lr_scheduler)
        self.save_hyperparameters(ignore=["backbone", "checkpoint", *OF_THE_RUN])
        self.backbone = Backbone.build(backbone)
        # Tensors, as a subclass may have, are loaded as they are.
        self.hparams.update({k: v if isinstance(v, Tensor) else built_in(v) for k, v in self.hparams.items()})
        self.hparams["backbone"] = self.backbone.spec
        self._optimizer = optimizer or torch.optim.AdamW
        self._lr_scheduler = lr_scheduler
        self._lr_batch = lr_batch
        self._lr_interval = lr_interval
        self._lr_factor = 1.0
        self.lr: float | None = None
        self._configured_for: tuple[Any, ...] = (None, None)
        self.means = nn.ModuleDict(
            {f"{split}/{name}": SampleMean() for split in ("train", "val", "test") for name in self.logged}
        )
        self.class_names: list[str] | None = None
        self.preprocessing: dict[str, Any] | None = None
        self._resumption = Resumption()
        self._last_weights = LastWeights()

    def compare_data(self, names: list[str] | None, images: dict[str, Any] | None) -> None:
        """Compare a datamodule's class names and preprocessing with those that the learner was trained on."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as Lightning does, but a file from another machine as data only unless ``weights_only=False`` is given.

        Raises:
            ValueError: The file is damaged, or is on another machine and this version of Lightning would run its code.
        """
        if "://" in str(checkpoint_path):
            if "weights_only" not in inspect.signature(super().load_from_checkpoint).parameters:
                raise ValueError(
                    f"{str(checkpoint_path)!r} is on another machine, and this Lightning would run its code; "
                    "fetch it first"
                )
            kwargs = {"weights_only": True, **kwargs}
        elif isinstance(checkpoint_path, str | os.PathLike) and os.path.isfile(checkpoint_path):
            check_zip(os.fspath(checkpoint_path))
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save class names, preprocessing, and the state that resuming within an epoch needs."""
        checkpoint[DATA] = {"class_names": self.class_names, "preprocessing": self.preprocessing}
        with averages_in_weights(self._trainer, self, checkpoint):
            if "loops" in checkpoint:  # absent where an older Lightning saves weights alone
                means = {name: mean.metric_state for name, mean in self._means_of("train")}
                self._resumption.save(self.trainer, self, means, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load class names and preprocessing from the checkpoint, and compare the datamodule with them.

        Raises:
            ValueError: A callback would begin the resumed run anew.
        """
        said = checkpoint.get(DATA, {})
        self._trained_on(said.get("class_names"), said.get("preprocessing"))
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._resumption = Resumption(checkpoint)
            take_up_after_last_batch(checkpoint)
            take_up_epoch(self.trainer, checkpoint)
            refuse_finders_of_resumed(self.trainer)
        if self._trainer is not None:
            self.compare_data(*_described(getattr(self.trainer, "datamodule", None)))

    def _trained_on(self, names: list[str] | None, images: dict[str, Any] | None) -> None:
        """Remember class names and preprocessing of the training; a datamodule normalises as the backbone states."""
        self.class_names, self.preprocessing = names, images
        self.backbone.take_normalisation(images)

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""

    def log_mean(self, name: str, values: Tensor, samples: int | Tensor, loader: int = 0) -> None:
        """Log under ``name`` the mean over all samples of the epoch and of all processes.

        Args:
            name: One of ``logged``, after ``train/``, ``val/`` or ``test/``.
            values: A number for each sample of this batch, ``(N,)``, or their mean.
            samples: Number of samples in this batch.
            loader: Index of the batch's loader among several, each of which has a mean of its own.
        """
        key = f"{name}/{loader}" if loader else name
        if key not in self.means:
            self.means[key] = SampleMean().to(self.device)
        mean: Any = self.means[key]
        mean.update(values, samples)
        self.log(name, mean, on_step=False, on_epoch=True, prog_bar=True, metric_attribute=f"means.{key}")

    def lr_factor(self, group: dict[str, Any]) -> float:
        """The factor of the learning rate of one of the optimiser's parameter groups."""
        return self._lr_factor

    def parameter_groups(self) -> list[Any]:
        """The optimiser's parameters, or parameter groups: all that require a gradient."""
        return [p for p in self.parameters() if p.requires_grad]

    def configure_optimizers(self) -> Any:
        """The optimiser of the parameters that require a gradient, and its scheduler."""
        self._configured_for = self._tuned()
        optimizer = self._optimizer(self.parameter_groups())
        scales = self._lr_batch is not None and self.lr is None
        self._lr_factor = images_a_step(self.trainer) / self._lr_batch if scales and self._lr_batch else 1.0
        if self.lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
        factors = [self.lr_factor(group) for group in optimizer.param_groups]
        if self._trainer is not None:
            warn_of_one_rate(self.trainer, factors)
        scheduler = None
        if self._lr_scheduler is not None:
            self._check_scheduler(optimizer, factors)
            scheduler = self._lr_scheduler(optimizer)
        scale_rates(optimizer, scheduler, factors)
        self._resumption.configured = configured(optimizer)
        if scheduler is None:
            return optimizer
        monitor = monitored(scheduler, self._lr_interval, self.plateau_monitor)
        config = {"scheduler": scheduler, "monitor": monitor, "interval": self._lr_interval, "frequency": 1}
        if self._lr_interval == "epoch" and "val" in str(monitor).split("/"):
            # Without it a plateau would have no number of an epoch without a validation, or an old one.
            config["frequency"] = getattr(self._trainer, "check_val_every_n_epoch", None) or 1
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _check_scheduler(self, optimizer: torch.optim.Optimizer, factors: list[float]) -> None:
        """Refuse a scheduler that would undo the factors of the learning rate."""
        assert self._lr_scheduler is not None
        if self.lr is not None and not follows_rates(self._lr_scheduler, optimizer):
            raise ValueError(
                f"the scheduler sets the learning rate itself, so that lr={self.lr:g} would do nothing; give the rate "
                "to the scheduler (max_lr, say), or look for a rate without a scheduler"
            )
        if not follows_rates(self._lr_scheduler, optimizer, factors):
            raise ValueError(
                "the scheduler sets the learning rate itself and would undo lr_batch, layer_decay and head_lr_factor, "
                f"which multiply it by {', '.join(f'{factor:g}' for factor in factors)}; leave them out, or take a "
                "scheduler that multiplies the optimiser's rate"
            )

    def _tuned(self) -> tuple[Any, ...]:
        """The values that callbacks may change at the start of a run and that the optimiser depends on."""
        return self.lr, self._lr_batch and images_a_step(self.trainer)

    def setup(self, stage: str) -> None:
        """Refuse processes that would train independently, and read class names and preprocessing of the data.

        A fit forgets what an earlier one was resumed from, however that ended, and trains a model that was left in eval
        mode, as by `PartlyFrozen.from_delta` or an interrupted validation.
        """
        self._resumption = Resumption()
        self._last_weights.restore()
        step_again(self)
        check_launched(self.trainer)
        synchronise(self.trainer.strategy)
        names, images = _described(getattr(self.trainer, "datamodule", None))
        self.compare_data(names, images)
        if stage == "fit":
            warn_of_what_stays(self.trainer, "this model does not get the names of its classes nor their preprocessing")
            if not self.training:
                self.train()
            if not (self.class_names and are_numbers(names)):  # which may stand for the names that are known
                self.class_names = names or self.class_names
            self.preprocessing = images or self.preprocessing

    def on_fit_start(self) -> None:
        """Log the numbers of trained and of all parameters, and the factor of the learning rate.

        Callbacks run before this hook, and Lightning's finders of learning rate and batch size set a new value: the
        optimiser is then made anew.
        """
        if self._configured_for != self._tuned():
            self.trainer.strategy.setup_optimizers(self.trainer)
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        counts = {
            "params/trained": float(sum(size for size, trains in sizes if trains)),
            "params/total": float(sum(size for size, _ in sizes)),
        }
        if self._lr_batch is not None:
            counts["lr/factor"] = self._lr_factor
            rank_zero_info(f"learning rate scaled by {self._lr_factor:g}, from {self._lr_batch} images a step")
        for logger in self.loggers:
            logger.log_metrics(counts, step=self.global_step)
        self._resumption.warn_of_kept_options(self.trainer)
        self._resumption.restore_numbers(self.trainer)

    def on_train_end(self) -> None:
        """Note whether a callback has replaced the weights by an average, of which no number was logged."""
        self._resumption.averaged = is_average(self.trainer)
        self._last_weights.finish(self.trainer)
        step_again(self)

    def on_fit_end(self) -> None:
        """Have later tests normalise as the training did; save an average that was set after the last checkpoint."""
        self.backbone.take_normalisation(self.preprocessing)
        if self._resumption.averaged:
            save_average(self.trainer)

    def on_train_start(self) -> None:
        """Refuse a schedule that cannot work; restore what a resumed run was at: progress, random state and more."""
        if not replaces_schedule(self.trainer):
            check_lengths(self.trainer)
        check_monitors(self.trainer)
        # The logged values once more: the sanity check resets them, and some strategies load a checkpoint after the fit
        # has started.
        self._resumption.begin(self.trainer, self)

    def on_train_epoch_start(self) -> None:
        """Forget what an interrupted epoch has left in the means."""
        self._reset_means("train")

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted validation has left in the means and in the trainer's progress."""
        self._reset_means("val")
        forget_interrupted_validation(self.trainer)
        self._resumption.in_validation = True

    def on_validation_epoch_end(self) -> None:
        """Note that the validation has ended."""
        self._resumption.in_validation = False

    def on_test_epoch_start(self) -> None:
        """Forget what an interrupted test has left in the means."""
        self._reset_means("test")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Restore the epoch's means in a run that is resumed within the epoch; scale the rates of a finder's search."""
        self._resume_means(batch_idx > 0)
        only_measure(self.trainer, self)
        # Without the factor of lr_batch, which the rate that is found replaces.
        scale_search(self.trainer, lambda group: self.lr_factor(group) / self._lr_factor)

    def on_train_epoch_end(self) -> None:
        """Refuse an epoch without a batch; log the means of one in a run that is resumed after its last batch."""
        if not (self.trainer.fit_loop.epoch_loop.batch_progress.current.ready or self.trainer.should_stop):
            raise ValueError(_no_batch(self.trainer.current_epoch))
        if self._resumption.means:
            self._resume_means(True)
            for name, mean in self._means_of("train"):
                self.log(f"train/{name}", mean, on_step=False, on_epoch=True, prog_bar=True)
        let_plateaus_step(self.trainer)
        keep_average_in_step(self.trainer, self)
        self._last_weights.save(self.trainer)

    def _resume_means(self, within: bool) -> None:
        means, self._resumption.means = self._resumption.means if within else {}, {}
        for name, mean in self._means_of("train"):
            if name in means and means[name]["samples"]:
                mean.reset()
                total, samples = (means[name][key].to(self.device) for key in ("total", "samples"))
                mean.update(total / samples, samples)

    def _reset_means(self, split: str) -> None:
        for name, mean in self.means.items():
            if name.startswith(f"{split}/"):
                cast(Metric, mean).reset()

    def _means_of(self, split: str) -> list[tuple[str, Any]]:
        return [(name, self.means[f"{split}/{name}"]) for name in self.logged]

    def on_before_backward(self, loss: Tensor) -> None:
        """Raise if the loss is not finite; on an accelerator only at logged steps, since reading it synchronises."""
        logs_every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (may_look(loss) or self.global_step % logs_every == 0) and not torch.isfinite(loss):
            raise FloatingPointError(_not_finite(self.trainer, loss))


# Hyper-parameters of the run that the model does not depend on.
OF_THE_RUN = ("optimizer", "lr_scheduler", "lr_batch", "lr_interval")


def _check_interval(interval: str, scheduler: LRSchedulerCallable | None) -> None:
    if interval not in ("epoch", "step"):
        raise ValueError(f"expected lr_interval epoch or step, got {interval!r}")
    if interval == "step" and scheduler is None:
        raise ValueError('lr_interval="step" needs an lr_scheduler to step')


def are_numbers(names: list[str] | None) -> bool:
    """Whether class names are ``0`` to ``K - 1``, as those of a datamodule that only numbers its classes."""
    return bool(names) and names == [str(label) for label in range(len(names or ()))]


def _described(data: Any) -> tuple[list[str] | None, dict[str, Any] | None]:
    """A datamodule's class names and its image preprocessing, as far as it states them."""
    names, images = getattr(data, "class_names", None), getattr(data, "preprocessing", None)
    return [str(name) for name in names or ()] or None, built_in(images) if isinstance(images, dict) else None


def _no_batch(epoch: int) -> str:
    return (
        f"expected a training loader that begins again in each epoch, got no batch in epoch {epoch}: a generator ends "
        "after its first epoch, and litdata's StreamingDataLoader skips the epoch after one that was resumed midway; "
        "give a DataLoader, or resume from a checkpoint of an epoch's end"
    )


def _not_finite(trainer: Trainer, loss: Tensor) -> str:
    rates = sorted({group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups})
    checkpoint = last_saved(trainer) or "none yet"
    return (
        f"the training loss is {loss.item()} by step {trainer.global_step}, at learning rate "
        f"{', '.join(f'{rate:g}' for rate in rates)}; last checkpoint: {checkpoint}. "
        "Go on from there with a lower learning rate, a warm-up or gradient clipping"
    )

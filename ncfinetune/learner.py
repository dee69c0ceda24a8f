"""What every learner shares: a backbone, an optimiser and its rates, exact means, and the steps of classifiers.

Legend: ``N`` samples, ``K`` classes, ``d`` width of the penultimate features.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from ncfinetune.backbone import Backbone
from ncfinetune.resume import state_of_process, states_of_processes, take_up_after_last_batch
from ncfinetune.schedule import follows_rates, monitored, scale_rates
from ncfinetune.weights import DATA

Batch = tuple[Tensor, Tensor]
Interval = Literal["epoch", "step"]
# Probabilities in bfloat16, as under precision=bf16-true, sum to 1 within 2^-8.
_ROW_SUM_TOLERANCE = 1e-2
# Of what a datamodule says of its images, what makes the same pixel another number.
_NORMALISED_BY = ("mean", "std", "value_range")


class SampleMean(Metric):
    """Mean of a number over the samples of all batches and all processes, each of which counts once.

    Lightning's own mean of logged tensors averages the processes' sample counts as whole numbers, which is wrong where
    their shares differ. Here the two sums are added over the processes when the mean is asked for. They stay in
    double precision (single on MPS, which has no other) whatever precision the module is cast to.
    """

    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "samples"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, samples: int | Tensor) -> None:
        """Add a batch.

        Args:
            values: A number for each sample, ``(N,)``, or their mean.
            samples: How many samples the batch has.
        """
        self.total = self.total + values.detach().to(self.total.dtype).mean() * samples
        self.samples = self.samples + samples

    def compute(self) -> Tensor:
        """The mean, in single precision."""
        return (self.total / self.samples).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Follow the module to its device, but not to its precision."""

        def moved(state: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=state.device)).device
            return state.to(device, torch.float32 if device.type == "mps" else torch.float64)

        return super()._apply(moved, *args, **kwargs)


class Learner(LightningModule, ABC):
    """A backbone that trains. Abstract.

    Hyper-parameters are kept as plain data, so that a checkpoint loads with ``weights_only=True``, and without the file
    that a warm start came from.

    A scheduler that sets the rates itself, as `OneCycleLR` does from its ``max_lr``, has its rates scaled as those of
    the optimiser are.

    Args:
        backbone: A timm name, the arguments of a `Backbone`, or a `Backbone`.
        optimizer: Makes an optimiser of the parameters that train; None is AdamW with learning rate 1e-3.
        lr_scheduler: Makes a scheduler of that optimiser.
        lr_batch: Images a step for which the optimiser's learning rate is meant. The rate is scaled linearly to those
            that a step has, over all processes and accumulated batches (Goyal et al. 2017, arXiv 1706.02677, section
            2.1), and the factor is logged. None takes it as it is.
        lr_interval: ``epoch`` steps the scheduler once an epoch, ``step`` after each step of the optimiser.

    Attributes:
        lr: The learning rate in place of the optimiser's own, and of its scaling by ``lr_batch``; None is neither.
            Lightning's learning rate finder sets it.
        class_names: What the datamodule that the learner was trained on calls its classes; None as long as unknown.
        preprocessing: How it makes images ready: ``mean``, ``std``, ``input_size`` and more, in timm's words.

    Raises:
        ValueError: ``lr_batch`` is below 1; ``lr_interval`` is unknown, or there is no scheduler for it; a scheduler
            undoes what the other options make of the learning rate.
        FloatingPointError: In training, when the loss is not finite.
    """

    # What `log_mean` logs, each under train/, val/ and test/.
    logged: ClassVar[tuple[str, ...]] = ("loss",)

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
        self.save_hyperparameters(ignore=["backbone", "checkpoint", *_OF_THE_RUN])
        self.backbone = Backbone.build(backbone)
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
        self._processes: list[dict[str, Any]] = []

    def compare_data(self, names: list[str] | None, images: dict[str, Any] | None) -> None:
        """Compare what a datamodule says of classes and images with what the learner was trained on."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint what classes and images are like, and what a run needs to go on within an epoch."""
        checkpoint[DATA] = {"class_names": self.class_names, "preprocessing": self.preprocessing}
        if "loops" in checkpoint:  # and not weights alone
            means = {name: mean.metric_state for name, mean in self._means_of("train")}
            checkpoint[_PROCESSES] = states_of_processes(self.trainer, {"means": means})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what the checkpoint says of classes and images, and compare the datamodule with it."""
        said = checkpoint.get(DATA, {})
        self.class_names, self.preprocessing = said.get("class_names"), said.get("preprocessing")
        self._processes = checkpoint.get(_PROCESSES, [])
        take_up_after_last_batch(checkpoint)
        if self._trainer is not None:
            self.compare_data(*_described(getattr(self.trainer, "datamodule", None)))

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""

    def log_mean(self, name: str, values: Tensor, samples: int | Tensor) -> None:
        """Log under ``name`` the mean over all samples of the epoch and of all processes.

        Args:
            name: One of ``logged``, after ``train/``, ``val/`` or ``test/``.
            values: A number for each sample of this batch, ``(N,)``, or their mean.
            samples: How many samples this batch has.
        """
        mean: Any = self.means[name]
        mean.update(values, samples)
        self.log(name, mean, on_step=False, on_epoch=True, prog_bar=True)

    def lr_factor(self, group: dict[str, Any]) -> float:
        """What the learning rate of one of the optimiser's groups of parameters is multiplied by."""
        return self._lr_factor

    def configure_optimizers(self) -> Any:
        """The optimiser of the parameters that require a gradient, and its scheduler."""
        self._configured_for = self._tuned()
        optimizer = self._optimizer([p for p in self.parameters() if p.requires_grad])
        scales = self._lr_batch is not None and self.lr is None
        self._lr_factor = _images_a_step(self.trainer) / self._lr_batch if scales and self._lr_batch else 1.0
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] if self.lr is None else self.lr
        factors = [self.lr_factor(group) for group in optimizer.param_groups]
        if self._lr_scheduler is None:
            scale_rates(optimizer, None, factors)
            return optimizer
        self._check_scheduler(optimizer, factors)
        scheduler = self._lr_scheduler(optimizer)
        scale_rates(optimizer, scheduler, factors)
        config = {"scheduler": scheduler, "monitor": monitored(scheduler), "interval": self._lr_interval}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _check_scheduler(self, optimizer: torch.optim.Optimizer, factors: list[float]) -> None:
        """Refuse a scheduler that would undo what this module makes of the learning rate."""
        assert self._lr_scheduler is not None
        if self.lr is not None and not follows_rates(self._lr_scheduler, optimizer):
            raise ValueError(
                f"the scheduler sets the learning rate itself, so that lr={self.lr:g} would do nothing; give the rate "
                "to the scheduler (max_lr, say), or look for a rate without a scheduler"
            )
        if not follows_rates(self._lr_scheduler, optimizer, factors):
            raise ValueError(
                "the scheduler sets the learning rate itself and would undo lr_batch and head_lr_factor, which "
                f"multiply it by {', '.join(f'{factor:g}' for factor in factors)}; leave them out, or take a scheduler "
                "that multiplies the optimiser's rate"
            )

    def _tuned(self) -> tuple[Any, ...]:
        """What callbacks may change at the start of a run, and the optimiser depends on."""
        return self.lr, self._lr_batch and _images_a_step(self.trainer)

    def setup(self, stage: str) -> None:
        """Refuse to be one of several trainings that were meant to be one, and learn what the data are like."""
        check_launched(self.trainer)
        names, images = _described(getattr(self.trainer, "datamodule", None))
        self.compare_data(names, images)
        if stage == "fit":
            self.class_names, self.preprocessing = names or self.class_names, images or self.preprocessing

    def on_fit_start(self) -> None:
        """Log how many parameters train, of how many, and by how much the learning rate was scaled.

        Callbacks have their turn before, and those that look for a learning rate or a batch size leave a new one: the
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

    def on_train_start(self) -> None:
        """Go on with the random numbers that a run which is resumed had stopped with."""
        if self._processes:
            self._processes = [state_of_process(self.trainer, self._processes)]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Go on with the means of the epoch, where it is resumed within one."""
        self._resume_means(batch_idx > 0)

    def on_train_epoch_end(self) -> None:
        """Log the means of an epoch that is resumed after its last batch."""
        if self._processes:
            self._resume_means(True)
            for name, mean in self._means_of("train"):
                self.log(f"train/{name}", mean, on_step=False, on_epoch=True, prog_bar=True)

    def _resume_means(self, within: bool) -> None:
        states, self._processes = self._processes, []
        means = states[0].get("means", {}) if states and within else {}
        for name, mean in self._means_of("train"):
            if name in means and means[name]["samples"]:
                total, samples = (means[name][key].to(self.device) for key in ("total", "samples"))
                mean.update(total / samples, samples)

    def _means_of(self, split: str) -> list[tuple[str, Any]]:
        return [(name, self.means[f"{split}/{name}"]) for name in self.logged]

    def on_before_backward(self, loss: Tensor) -> None:
        """Stop at a loss that is not finite; off the CPU look only where a step is logged, since looking waits."""
        logs_every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (_can_look(loss) or self.global_step % logs_every == 0) and not torch.isfinite(loss):
            raise FloatingPointError(_not_finite(self.trainer, loss))


# Under which a checkpoint has what each process needs to go on.
_PROCESSES = "processes"
# Hyper-parameters of a run, which a checkpoint's model does not depend on.
_OF_THE_RUN = ("optimizer", "lr_scheduler", "lr_batch", "lr_interval")


def _can_look(value: Tensor) -> bool:
    """Whether the host may read a value at every step: elsewhere than on the CPU it would wait for the device."""
    return value.device.type == "cpu"


def _check_interval(interval: str, scheduler: LRSchedulerCallable | None) -> None:
    if interval not in ("epoch", "step"):
        raise ValueError(f"expected lr_interval epoch or step, got {interval!r}")
    if interval == "step" and scheduler is None:
        raise ValueError('lr_interval="step" needs an lr_scheduler to step')


def check_launched(trainer: Trainer) -> None:
    """Refuse a Trainer that knows of fewer processes than were launched: each of them would train by itself.

    Raises:
        ValueError: It does.
    """
    by_torchrun = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
    launched = int(os.environ["WORLD_SIZE"]) if by_torchrun else trainer.world_size
    if launched != trainer.world_size:
        raise ValueError(
            f"torchrun launched {launched} processes, but the Trainer has {trainer.world_size}; give it as many "
            "(devices a node, and num_nodes), or start one process"
        )


def _described(data: Any) -> tuple[list[str] | None, dict[str, Any] | None]:
    """What a datamodule calls its classes, unless those are mere numbers, and how it makes images ready."""
    names, images = getattr(data, "class_names", None), getattr(data, "preprocessing", None)
    named = [str(name) for name in names or ()]
    numbered = named == [str(label) for label in range(len(named))]
    return None if numbered else named, images if isinstance(images, dict) else None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")


def _images_a_step(trainer: Trainer) -> int:
    _ = trainer.estimated_stepping_batches  # has the loader made, which it is not before the first epoch
    size = getattr(trainer.train_dataloader, "batch_size", None)
    if size is None:
        raise ValueError("lr_batch needs a training DataLoader with a batch_size; leave lr_batch out and give the rate")
    return size * trainer.world_size * trainer.accumulate_grad_batches


def _not_finite(trainer: Trainer, loss: Tensor) -> str:
    rates = sorted({group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups})
    saved = [
        getattr(c, "last_model_path", "") or getattr(c, "best_model_path", "") for c in trainer.checkpoint_callbacks
    ]
    checkpoint = next((path for path in saved if path), "none yet")
    return (
        f"the training loss is {loss.item()} by step {trainer.global_step}, at learning rate "
        f"{', '.join(f'{rate:g}' for rate in rates)}; last checkpoint: {checkpoint}. "
        "Go on from there with a lower learning rate, a warm-up or gradient clipping"
    )


class Classifier(Learner):
    """A learner of batches ``(images, labels)`` whose output are class logits. Abstract.

    Labels are classes ``(N,)`` or, as mixing images makes them, probabilities of classes ``(N, K)``, for which accuracy
    takes the most probable class.

    Logs ``train/loss`` and ``train/acc``, and the same under ``val/`` and ``test/``. `predict_step` gives class
    probabilities.

    Args:
        num_classes: Number of classes ``K``.
        backbone: A timm name, the arguments of a `Backbone`, or a `Backbone`.
        optimizer: Makes an optimiser of the parameters that train; None is AdamW with learning rate 1e-3.
        lr_scheduler: Makes a scheduler of that optimiser.
        lr_batch: Images a step for which the learning rate is meant; see `Learner`.
        lr_interval: Whether the scheduler is stepped once an ``epoch`` or after each ``step``.

    Raises:
        ValueError: ``num_classes`` is below 2, or contradicts the datamodule or a label; labels ``(N, K)`` are no
            probabilities, as those of images that show several classes. Off the CPU only the first batch of an epoch
            is looked at when it comes, and the others when the epoch ends.
    """

    logged = ("loss", "acc")

    def __init__(
        self,
        num_classes: int,
        backbone: str | dict[str, Any] | Backbone,
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerCallable | None,
        lr_batch: int | None = None,
        lr_interval: Interval = "epoch",
    ) -> None:
        super().__init__(backbone, optimizer, lr_scheduler, lr_batch, lr_interval)
        if num_classes is None or num_classes < 2:
            raise ValueError(f"expected num_classes of at least 2, got {num_classes}")
        self.num_classes = num_classes
        # Rows of probabilities that do not sum to 1, of this epoch and process; counted on the device, unread.
        self._wrong_rows: Tensor | None = None

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Class logits ``(N, K)`` of images."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(logits, labels)

    def setup(self, stage: str) -> None:
        """Refuse a datamodule with another number of classes, or with other classes."""
        super().setup(stage)
        offered = getattr(getattr(self.trainer, "datamodule", None), "num_classes", self.num_classes)
        if offered != self.num_classes:
            raise ValueError(
                f"the model has num_classes={self.num_classes}, the data {offered}; "
                f"give the model num_classes={offered}"
            )

    def compare_data(self, names: list[str] | None, images: dict[str, Any] | None) -> None:
        """Refuse a datamodule whose labels mean other classes, and warn of one that normalises images otherwise.

        Raises:
            ValueError: It has other classes, or the same in another order.
        """
        if names and self.class_names and names != self.class_names:
            raise ValueError(
                f"the model was trained on the classes {_listed(self.class_names)}, and the data has {_listed(names)}: "
                "its labels mean others; expected the same classes in the same order"
            )
        ours, theirs = self.preprocessing or {}, images or {}
        other = [key for key in _NORMALISED_BY if ours and theirs and ours.get(key) != theirs.get(key)]
        if other:
            trained, given = (", ".join(f"{key}={seen.get(key)}" for key in other) for seen in (ours, theirs))
            rank_zero_warn(
                f"the model was trained on images normalised by {trained}, and the data are by {given}; "
                f"give the datamodule that {' and '.join(other)}"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of the batch."""
        return self._classify(batch, batch_idx, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy of the batch."""
        self._classify(batch, batch_idx, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy of the batch."""
        self._classify(batch, batch_idx, "test")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Class probabilities ``(N, K)`` of logits: their softmax."""
        return logits.softmax(1)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Class probabilities ``(N, K)``."""
        return self.probabilities(self(batch[0]))

    def on_train_epoch_end(self) -> None:
        """Refuse labels that were only counted when they came."""
        super().on_train_epoch_end()
        self._refuse_counted()

    def on_validation_epoch_end(self) -> None:
        """Refuse labels that were only counted when they came."""
        self._refuse_counted()

    def on_test_epoch_end(self) -> None:
        """Refuse labels that were only counted when they came."""
        self._refuse_counted()

    def _classify(self, batch: Batch, batch_idx: int, split: str) -> Tensor:
        images, labels = batch
        if batch_idx == 0 or _can_look(labels):
            _check_labels(labels, self.num_classes)
        elif labels.ndim == 2:
            wrong = _off_one(labels).sum()
            self._wrong_rows = wrong if self._wrong_rows is None else self._wrong_rows + wrong
        logits = self(images)
        loss = self.loss(logits, labels)
        self.log_mean(f"{split}/loss", loss, len(labels))
        hits = logits.argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))
        self.log_mean(f"{split}/acc", hits, len(labels))
        return loss

    def _refuse_counted(self) -> None:
        """Refuse the epoch's wrong rows, on all processes together so that none of them waits for the others."""
        own, self._wrong_rows = self._wrong_rows, None
        if _can_look(torch.empty(0, device=self.device)):
            return
        count = torch.zeros((), dtype=torch.int64, device=self.device) if own is None else own
        if wrong := int(self.trainer.strategy.reduce(count, reduce_op="sum")):
            raise ValueError(_not_probabilities(f"{wrong} rows in this epoch that do not"))


def _off_one(shares: Tensor) -> Tensor:
    """Which rows do not sum to 1; those with a nan are among them."""
    return ~((shares.sum(1, dtype=torch.float32) - 1).abs() <= _ROW_SUM_TOLERANCE)


def _not_probabilities(found: str) -> str:
    return (
        f"expected labels (N, K) to be probabilities of classes, whose rows sum to 1, got {found}; each image "
        "is of one class here, and labels of several classes at once (multi-label data) are not supported"
    )


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if labels.ndim != 1:
        if labels.shape[1:] != (num_classes,) or not labels.is_floating_point():
            raise ValueError(
                f"expected labels (N,), or probabilities (N, {num_classes}) since num_classes={num_classes}, got "
                f"{tuple(labels.shape)} of {labels.dtype}"
            )
        if (wrong := _off_one(labels)).any():
            raise ValueError(_not_probabilities(f"a row that sums to {float(labels[wrong][0].sum()):g}"))
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        wrong_label = low if low < 0 else high
        raise ValueError(
            f"expected labels in 0..{num_classes - 1}, since num_classes={num_classes}, got {wrong_label}; "
            f"number the classes from 0, or give a num_classes of at least {high + 1}"
        )

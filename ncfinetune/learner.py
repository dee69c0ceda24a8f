"""What every learner shares: a backbone, an optimiser, and for classifiers the steps and their log names.

Legend: ``N`` samples, ``K`` classes, ``d`` width of the penultimate features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from ncfinetune.backbone import Backbone

Batch = tuple[Tensor, Tensor]


class Learner(LightningModule, ABC):
    """A backbone that trains. Abstract.

    Hyper-parameters are kept as plain data, so that a checkpoint loads with ``weights_only=True``, and without the file
    that a warm start came from.

    Args:
        backbone: A timm name, the arguments of a `Backbone`, or a `Backbone`.
        optimizer: Makes an optimiser of the parameters that train; None is AdamW with learning rate 1e-3.
        lr_scheduler: Makes a scheduler of that optimiser, stepped once an epoch.
        lr_batch: Images a step for which the optimiser's learning rate is meant. The rate is scaled linearly to those
            that a step has, over all processes and accumulated batches (Goyal et al. 2017, arXiv 1706.02677, section
            2.1), and the factor is logged. None takes it as it is.

    Raises:
        ValueError: ``lr_batch`` is below 1.
        FloatingPointError: In training, when the loss is not finite.
    """

    def __init__(
        self,
        backbone: str | dict[str, Any] | Backbone,
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerCallable | None,
        lr_batch: int | None = None,
    ) -> None:
        super().__init__()
        if lr_batch is not None and lr_batch < 1:
            raise ValueError(f"expected lr_batch of at least 1 image, or None, got {lr_batch}")
        self.save_hyperparameters(ignore=["backbone", "checkpoint", "optimizer", "lr_scheduler", "lr_batch"])
        self.backbone = Backbone.build(backbone)
        self.hparams["backbone"] = self.backbone.spec
        self._optimizer = optimizer or torch.optim.AdamW
        self._lr_scheduler = lr_scheduler
        self._lr_batch = lr_batch
        self._lr_factor = 1.0

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""

    def configure_optimizers(self) -> Any:
        """The optimiser of the parameters that require a gradient, and its scheduler."""
        optimizer = self._optimizer([p for p in self.parameters() if p.requires_grad])
        if self._lr_batch is not None:
            self._lr_factor = _images_a_step(self.trainer) / self._lr_batch
            for group in optimizer.param_groups:
                group["lr"] *= self._lr_factor
        if self._lr_scheduler is None:
            return optimizer
        scheduler = self._lr_scheduler(optimizer)
        monitor = getattr(scheduler, "monitor", None)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}

    def on_fit_start(self) -> None:
        """Log how many parameters train, of how many, and by how much the learning rate was scaled."""
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

    def on_before_backward(self, loss: Tensor) -> None:
        """Stop at a loss that is not finite; off the CPU look only where a step is logged, since looking waits."""
        logs_every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (loss.device.type == "cpu" or self.global_step % logs_every == 0) and not torch.isfinite(loss):
            raise FloatingPointError(_not_finite(self.trainer, loss))


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
        lr_scheduler: Makes a scheduler of that optimiser, stepped once an epoch.
        lr_batch: Images a step for which the learning rate is meant; see `Learner`.

    Raises:
        ValueError: ``num_classes`` is below 2, or contradicts the datamodule or a label.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str | dict[str, Any] | Backbone,
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerCallable | None,
        lr_batch: int | None = None,
    ) -> None:
        super().__init__(backbone, optimizer, lr_scheduler, lr_batch)
        if num_classes is None or num_classes < 2:
            raise ValueError(f"expected num_classes of at least 2, got {num_classes}")
        self.num_classes = num_classes
        self.accuracy = nn.ModuleDict(
            {split: MulticlassAccuracy(num_classes, average="micro") for split in ("fit", "val", "test")}
        )

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Class logits ``(N, K)`` of images."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(logits, labels)

    def setup(self, stage: str) -> None:
        """Refuse a datamodule with another number of classes."""
        offered = getattr(getattr(self.trainer, "datamodule", None), "num_classes", self.num_classes)
        if offered != self.num_classes:
            raise ValueError(
                f"the model has num_classes={self.num_classes}, the data {offered}; "
                f"give the model num_classes={offered}"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of the batch."""
        return self._classify(batch, batch_idx, "train", self.accuracy["fit"])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy of the batch."""
        self._classify(batch, batch_idx, "val", self.accuracy["val"])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy of the batch."""
        self._classify(batch, batch_idx, "test", self.accuracy["test"])

    def probabilities(self, logits: Tensor) -> Tensor:
        """Class probabilities ``(N, K)`` of logits: their softmax."""
        return logits.softmax(1)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Class probabilities ``(N, K)``."""
        return self.probabilities(self(batch[0]))

    def _classify(self, batch: Batch, batch_idx: int, split: str, accuracy: Any) -> Tensor:
        images, labels = batch
        if batch_idx == 0 or labels.device.type == "cpu":  # elsewhere the check would stall the device at each step
            _check_labels(labels, self.num_classes)
        logits = self(images)
        loss = self.loss(logits, labels)
        accuracy(logits, labels if labels.ndim == 1 else labels.argmax(1))
        size, sync = len(labels), split != "train"
        self.log(f"{split}/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=size, sync_dist=sync)
        self.log(f"{split}/acc", accuracy, on_step=False, on_epoch=True, prog_bar=True, batch_size=size)
        return loss


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if labels.ndim != 1:
        if labels.shape[1:] != (num_classes,) or not labels.is_floating_point():
            raise ValueError(
                f"expected labels (N,), or probabilities (N, {num_classes}) since num_classes={num_classes}, got "
                f"{tuple(labels.shape)} of {labels.dtype}"
            )
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(
            f"expected labels in 0..{num_classes - 1}, since num_classes={num_classes}, got {wrong}; "
            f"number the classes from 0, or give a num_classes of at least {high + 1}"
        )

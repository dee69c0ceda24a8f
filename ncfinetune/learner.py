"""What every learner shares: a backbone, an optimiser, and for classifiers the steps and their log names.

Legend: ``N`` samples, ``K`` classes, ``d`` width of the penultimate features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
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
    """

    def __init__(
        self,
        backbone: str | dict[str, Any] | Backbone,
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone", "checkpoint", "optimizer", "lr_scheduler"])
        self.backbone = Backbone.build(backbone)
        self.hparams["backbone"] = self.backbone.spec
        self._optimizer = optimizer or torch.optim.AdamW
        self._lr_scheduler = lr_scheduler

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""

    def configure_optimizers(self) -> Any:
        """The optimiser of the parameters that require a gradient, and its scheduler."""
        optimizer = self._optimizer([p for p in self.parameters() if p.requires_grad])
        if self._lr_scheduler is None:
            return optimizer
        scheduler = self._lr_scheduler(optimizer)
        monitor = getattr(scheduler, "monitor", None)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}

    def on_fit_start(self) -> None:
        """Log how many parameters train, and of how many."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        counts = {
            "params/trained": float(sum(size for size, trains in sizes if trains)),
            "params/total": float(sum(size for size, _ in sizes)),
        }
        for logger in self.loggers:
            logger.log_metrics(counts, step=self.global_step)


class Classifier(Learner):
    """A learner of batches ``(images, labels)`` whose output are class logits. Abstract.

    Logs ``train/loss`` and ``train/acc``, and the same under ``val/`` and ``test/``. `predict_step` gives class
    probabilities.

    Args:
        num_classes: Number of classes ``K``.
        backbone: A timm name, the arguments of a `Backbone`, or a `Backbone`.
        optimizer: Makes an optimiser of the parameters that train; None is AdamW with learning rate 1e-3.
        lr_scheduler: Makes a scheduler of that optimiser, stepped once an epoch.

    Raises:
        ValueError: ``num_classes`` is below 2, or contradicts the datamodule or a label.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str | dict[str, Any] | Backbone,
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__(backbone, optimizer, lr_scheduler)
        if num_classes is None or num_classes < 2:
            raise ValueError(f"expected num_classes of at least 2, got {num_classes}")
        self.num_classes = num_classes
        self.accuracy = nn.ModuleDict(
            {split: MulticlassAccuracy(num_classes, average="micro") for split in ("fit", "val", "test")}
        )

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Class logits ``(N, K)`` of images."""

    def setup(self, stage: str) -> None:
        """Refuse a datamodule with another number of classes."""
        offered = getattr(getattr(self.trainer, "datamodule", None), "num_classes", self.num_classes)
        if offered != self.num_classes:
            raise ValueError(
                f"the model has num_classes={self.num_classes}, the data {offered}; "
                f"give the model num_classes={offered}"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of the batch."""
        return self._classify(batch, batch_idx, "train", self.accuracy["fit"])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy of the batch."""
        self._classify(batch, batch_idx, "val", self.accuracy["val"])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy of the batch."""
        self._classify(batch, batch_idx, "test", self.accuracy["test"])

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Class probabilities ``(N, K)``."""
        return self(batch[0]).softmax(1)

    def _classify(self, batch: Batch, batch_idx: int, split: str, accuracy: Any) -> Tensor:
        images, labels = batch
        if batch_idx == 0 or labels.device.type == "cpu":  # elsewhere the check would stall the device at each step
            _check_labels(labels, self.num_classes)
        logits = self(images)
        loss = nn.functional.cross_entropy(logits, labels)
        accuracy(logits, labels)
        size, sync = len(labels), split != "train"
        self.log(f"{split}/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=size, sync_dist=sync)
        self.log(f"{split}/acc", accuracy, on_step=False, on_epoch=True, prog_bar=True, batch_size=size)
        return loss


def _check_labels(labels: Tensor, num_classes: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(
            f"expected labels in 0..{num_classes - 1}, since num_classes={num_classes}, got {wrong}; "
            f"number the classes from 0, or give a num_classes of at least {high + 1}"
        )

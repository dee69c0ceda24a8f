"""What every classifier shares: the steps of batches with labels, and what labels and datamodules may be.

Legend: ``N`` samples, ``K`` classes.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from ncfinetune.backbone import Backbone
from ncfinetune.inputs import may_look, whole
from ncfinetune.learner import Batch, Interval, Learner

# Probabilities in bfloat16, as under precision=bf16-true, sum to 1 within 2^-8.
_ROW_SUM_TOLERANCE = 1e-2
# Of what a datamodule says of its images, what makes the same pixel another number.
_NORMALISED_BY = ("mean", "std", "value_range")


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
        images, labels = batch[0], whole(batch[1])
        if batch_idx == 0 or may_look(labels):
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
        if may_look(torch.empty(0, device=self.device)):
            return
        count = torch.zeros((), dtype=torch.int64, device=self.device) if own is None else own
        if wrong := int(self.trainer.strategy.reduce(count, reduce_op="sum")):
            raise ValueError(_not_probabilities(f"{wrong} rows in this epoch that do not"))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")


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

"""What every classifier shares: the steps of batches with labels, and what labels and datamodules may be.

Legend: ``N`` samples, ``K`` classes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from ncfinetune.backbone import Backbone
from ncfinetune.copies import CopyError
from ncfinetune.inputs import check_labels, may_look, whole
from ncfinetune.learner import Batch, Interval, Learner
from ncfinetune.passes import drawn_labels, draws_by_weights
from ncfinetune.schedule import depths, layer_groups, two_groups

ClassWeight = Literal["balanced"] | list[float]
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
        label_smoothing: Share of the target that cross-entropy spreads over all classes in training (Szegedy et al.
            2016, arXiv 1512.00567, section 7), from 0 to below 1.
        class_weight: Weights of the classes in the training loss, which becomes a weighted mean over the batch as in
            `torch.nn.CrossEntropyLoss`: normalised in each batch of a process by itself, and those means averaged over
            processes and accumulated batches. ``balanced`` gives a class of ``n`` of the ``N`` training images the
            weight ``N / (K n)``, K the classes that have images (King and Zeng 2001, as in scikit-learn); a class
            without images 0. It is refused where images are drawn by weights, which balances the classes already.
            Labels that are shares of classes are weighted as torch does it, by a mean that is not normalised. Loss and
            accuracy of validation and test are neither weighted nor smoothed.
        layer_decay: Layer-wise learning-rate decay: the learning rate of each layer of the backbone is that of the next
            one, the last one's that of the head, times this number, in (0, 1]. Layers are timm's, as
            `timm.optim.param_groups_layer_decay` has them; weight decay stays that of the optimiser. None is the
            optimiser's rate for all.

    Attributes:
        class_weights: The weights ``(K,)``; None without. They are in no checkpoint; ``balanced`` ones are 1 until
            a fit counts, as one that goes on does again.

    Raises:
        ValueError: ``num_classes`` is below 2, or contradicts the datamodule or a label; labels ``(N, K)`` are no
            probabilities, as those of images that show several classes. Off the CPU only the first batch of an epoch
            is looked at when it comes, and the others when the epoch ends. Also ``label_smoothing``, ``layer_decay`` or
            weights out of their range, ``balanced`` where the data do not say their labels or even out the classes
            themselves, ``layer_decay`` for a network whose layers timm does not tell apart, and a run that goes on with
            other factors of the learning rate.
    """

    logged = ("loss", "acc")
    # Arguments that multiply the learning rates of an optimiser's groups from the start of a run to its end.
    rate_factors: ClassVar[tuple[str, ...]] = ("layer_decay",)
    class_weights: Tensor | None

    def __init__(
        self,
        num_classes: int,
        backbone: str | dict[str, Any] | Backbone,
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerCallable | None,
        lr_batch: int | None = None,
        lr_interval: Interval = "epoch",
        label_smoothing: float = 0.0,
        class_weight: ClassWeight | None = None,
        layer_decay: float | None = None,
    ) -> None:
        super().__init__(backbone, optimizer, lr_scheduler, lr_batch, lr_interval)
        if num_classes is None or num_classes < 2:
            raise ValueError(f"expected num_classes of at least 2, got {num_classes}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"expected label_smoothing from 0 to below 1, got {label_smoothing}")
        if layer_decay is not None:
            if not 0 < layer_decay <= 1:
                raise ValueError(f"expected layer_decay above 0 and up to 1, or None, got {layer_decay}")
            depths(self.backbone.net)
        self.layer_decay = layer_decay
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self._balances = class_weight == "balanced"
        self.register_buffer("class_weights", _start_of_weights(class_weight, num_classes), persistent=False)
        # Rows of probabilities that do not sum to 1, of this epoch and process; counted on the device, unread.
        self._wrong_rows: Tensor | None = None

    def parameter_groups(self) -> list[Any]:
        """What the optimiser is made of; with ``layer_decay`` a group for each layer of the backbone and the head's."""
        trained = super().parameter_groups()
        if self.layer_decay is None:
            return trained
        head = [group for group in two_groups(trained, self.backbone) if group["name"] == "head"]
        return [*layer_groups(self.backbone.net, self.layer_decay), *head]

    def lr_factor(self, group: dict[str, Any]) -> float:
        """What the learning rate of one of the optimiser's groups of parameters is multiplied by."""
        return super().lr_factor(group) * group.get("lr_factor", 1.0)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Class logits ``(N, K)`` of images."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, smoothed and weighted only in training."""
        if not self.training:
            return nn.functional.cross_entropy(logits, labels)
        weight = self.class_weights
        if weight is not None:
            kind = torch.promote_types(logits.dtype, weight.dtype)
            logits, weight = logits.to(kind), weight.to(kind)
        return nn.functional.cross_entropy(logits, labels, weight, label_smoothing=self.label_smoothing)

    def setup(self, stage: str) -> None:
        """Refuse a datamodule with another number of classes, or with other classes; weigh the classes of a fit."""
        super().setup(stage)
        offered = getattr(getattr(self.trainer, "datamodule", None), "num_classes", self.num_classes)
        if offered != self.num_classes:
            raise ValueError(
                f"the model has num_classes={self.num_classes}, the data {offered}; "
                f"give the model num_classes={offered}"
            )
        if stage == "fit" and self._balances:
            assert self.class_weights is not None
            # In place, so that it keeps its device and type.
            self.class_weights.copy_(_balanced(_training_counts(self.trainer, self.num_classes)))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with no run but one of the same factors of the learning rate, since its optimiser keeps its rates.

        Raises:
            ValueError: They are others.
        """
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("hyper_parameters", {})
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        for name in self.rate_factors:
            if name in saved and saved[name] != self.hparams.get(name):
                raise ValueError(
                    f"cannot go on with a run of {name}={saved[name]} as one of {name}={self.hparams[name]}, since its "
                    f"optimiser keeps the rates that it had; leave {name} as it was, or start anew from its weights"
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


def _start_of_weights(class_weight: ClassWeight | None, num_classes: int) -> Tensor | None:
    """The weights that are given; ones where those of the data come in their place."""
    if class_weight is None:
        return None
    if isinstance(class_weight, str):
        if class_weight != "balanced":
            raise ValueError(f"expected class_weight balanced or {num_classes} weights, got {class_weight!r}")
        return torch.ones(num_classes)
    weights = [float(weight) for weight in class_weight]
    if len(weights) != num_classes or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"expected class_weight of {num_classes} positive, finite numbers, got {weights}")
    return torch.tensor(weights)


def _training_counts(trainer: Trainer, num_classes: int) -> Tensor:
    """Training images of each class, ``(K,)``, as datamodule or data set know them without reading one."""
    data: Any = getattr(trainer, "datamodule", None)
    counts, balanced = getattr(data, "class_counts", None), getattr(data, "sampling", None) == "balanced"
    if counts is None and not balanced:
        trainer.fit_loop.setup_data()  # has the loader made, which it is not yet
        balanced = draws_by_weights(trainer.train_dataloader)
    if balanced:
        raise ValueError(
            'class_weight="balanced" and data that draw images by weights, as sampling="balanced" does, would make up '
            "for uneven classes twice; leave one of them out"
        )
    if counts is None:
        labels = _labels_of(trainer.train_dataloader)
        check_labels(labels, num_classes)
        counts = labels.bincount(minlength=num_classes)
    counts = torch.as_tensor(counts, device=trainer.strategy.root_device)
    if counts.shape != (num_classes,):
        raise ValueError(f"expected class_counts of {num_classes} classes, got shape {tuple(counts.shape)}")
    # Processes that all have the whole set make every count larger by the same factor, which cancels.
    return trainer.strategy.reduce(counts, reduce_op="sum")


def _labels_of(loader: Any) -> Tensor:
    try:
        labels = drawn_labels(loader)
    except CopyError as error:
        raise ValueError(
            f'class_weight="balanced" needs to know which images the training loader draws, and {error}; give the '
            "datamodule class_counts, or the weights as numbers"
        ) from error
    if labels is None:
        raise ValueError(
            'class_weight="balanced" needs the labels of all training images, and the data do not say them: '
            "expected class_counts of the datamodule, or targets of its data set; or give the weights as numbers"
        )
    return torch.as_tensor(labels.astype("int64"))


def _balanced(counts: Tensor) -> Tensor:
    """Weights with which every class that has samples counts as much, and the samples 1 on average."""
    present = counts > 0
    return torch.where(present, counts.sum() / present.sum() / counts, 0.0)


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

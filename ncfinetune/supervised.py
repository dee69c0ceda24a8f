"""Supervised pre-training of a backbone, a projection and a linear classifier."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from ncfinetune.adversarial import PGD
from ncfinetune.backbone import Backbone
from ncfinetune.classifier import Classifier, ClassWeight
from ncfinetune.heads import Projection, projection_head
from ncfinetune.inputs import whole
from ncfinetune.learner import Batch, Interval
from ncfinetune.losses import one_hot_mse

# Share of the probabilities of squared error that orders classes whose outputs are not positive; files have 6 digits.
_FOR_ORDER = 1e-6


class Supervised(Classifier):
    """Trains a backbone and a linear classifier on labelled images.

        >>> model = Supervised(num_classes=10, backbone={"name": "resnet18", "stem": "cifar"}, label_smoothing=0.1)
        >>> model(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Args:
        num_classes: Number of classes; on the command line it comes from the data.
        backbone: A timm name, the arguments of a `Backbone`, or a `Backbone`.
        loss: ``ce`` is cross-entropy; ``mse`` is the squared error on one-hot targets of Hui and Belkin (2021, arXiv
            2006.07322, section 2), which weighs the true class by ``mse_weight`` and aims it at ``mse_target``.
        label_smoothing: Share of the target that cross-entropy spreads over all classes in training; see `Classifier`.
        class_weight: Weights of the classes in the training loss, or ``balanced``; see `Classifier`.
        mse_weight: k of Hui and Belkin.
        mse_target: M of Hui and Belkin, who take k = M = 1 for few classes, and 15 and 30 for ImageNet's 1,000.
        projection: Head between backbone and classifier: ``none``, ``linear`` or ``mlp``.
        projection_dim: Width of the projection; None is the width of the features.
        adversary: Trains on adversarial examples instead of the images. Without ``mean`` and ``std`` it takes those of
            the datamodule.
        layer_decay: Factor of the learning rate from each layer of the backbone to the layer before it, in (0, 1]; the
            head has the optimiser's learning rate. See `Classifier`.
        optimizer: Makes an optimiser of all parameters; None is AdamW with learning rate 1e-3.
        lr_scheduler: Makes a scheduler of that optimiser.
        lr_batch: Batch size (images per step) that the learning rate is meant for; the rate is scaled linearly to the
            actual batch size. None does not scale it.
        lr_interval: Whether the scheduler is stepped once an ``epoch`` or after each ``step``.

    Raises:
        ValueError: An option out of its range, options that exclude each other, or a datamodule without ``mean`` and
            ``std`` where ``adversary`` needs them.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str | dict[str, Any] | Backbone,
        loss: Literal["ce", "mse"] = "ce",
        label_smoothing: float = 0.0,
        class_weight: ClassWeight | None = None,
        mse_weight: float = 1.0,
        mse_target: float = 1.0,
        projection: Projection = "none",
        projection_dim: int | None = None,
        adversary: PGD | dict[str, Any] | None = None,
        layer_decay: float | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_batch: int | None = None,
        lr_interval: Interval = "epoch",
    ) -> None:
        super().__init__(
            num_classes,
            backbone,
            optimizer,
            lr_scheduler,
            lr_batch,
            lr_interval,
            label_smoothing,
            class_weight,
            layer_decay,
        )
        _check_loss(loss, label_smoothing, mse_weight, mse_target)
        self.loss_name = loss
        self.mse_weight = mse_weight
        self.mse_target = mse_target
        width = self.backbone.dim if projection_dim is None else projection_dim
        self.projection = projection_head(projection, self.backbone.dim, width)
        self.head = nn.Linear(width, num_classes)
        self.adversary = PGD(**adversary) if isinstance(adversary, dict) else adversary
        self._attack = self.adversary
        self.hparams["adversary"] = self.adversary and dataclasses.asdict(self.adversary)

    @property
    def penultimate(self) -> Backbone:
        """The module whose output collapse is measured on, whatever the projection."""
        return self.backbone

    def forward(self, x: Tensor) -> Tensor:
        """Class logits ``(N, K)`` of images."""
        return self.head(self.projection(self.backbone(x)))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, or squared error weighted only in training."""
        if self.loss_name == "ce":
            return super().loss(logits, labels)
        return one_hot_mse(logits, labels, self.mse_weight, self.mse_target, self.weights_in_training(logits.device))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Class probabilities ``(N, K)``: the softmax, or with ``mse`` the positive outputs divided by their sum.

        With squared error the outputs themselves estimate the probabilities times ``mse_target``. If no output is
        positive, the largest one gets probability 1. A millionth is left to the softmax, so that classes whose outputs
        are not positive have an order too, as the k most probable ones need.
        """
        softmax = super().probabilities(logits / self.mse_target)
        if self.loss_name == "ce":
            return softmax
        kept = logits.to(softmax.dtype).clamp(min=0)
        total = kept.sum(1, keepdim=True)
        largest = nn.functional.one_hot(logits.argmax(1), self.num_classes).to(softmax)
        return torch.where(total > 0, kept / total, largest).lerp(softmax, _FOR_ORDER)

    def setup(self, stage: str) -> None:
        """Refuse data with another number of classes, and read its normalisation."""
        super().setup(stage)
        if stage == "fit" and self.adversary is not None and self.adversary.std is None:
            mean, std = _normalisation(getattr(self.trainer, "datamodule", None))
            self._attack = dataclasses.replace(self.adversary, mean=mean, std=std)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of the batch, or of its adversarial examples."""
        if self._attack is not None:
            images, labels = batch[0], whole(batch[1])
            batch = self._attack(self, images, labels), labels
        return super().training_step(batch, batch_idx)


def _check_loss(loss: str, label_smoothing: float, mse_weight: float, mse_target: float) -> None:
    if loss not in ("ce", "mse"):
        raise ValueError(f"expected loss ce or mse, got {loss!r}")
    if not (mse_weight > 0 and mse_target > 0):
        raise ValueError(f"expected mse_weight and mse_target above 0, got {mse_weight} and {mse_target}")
    if loss == "mse" and label_smoothing:
        raise ValueError(f'label_smoothing={label_smoothing} is for loss="ce"; leave it out with loss="mse"')
    if loss == "ce" and (mse_weight, mse_target) != (1, 1):
        raise ValueError('mse_weight and mse_target are for loss="mse"; leave them out with loss="ce"')


def _normalisation(data: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel with which a datamodule normalises pixels in 0..1."""
    mean, std = getattr(data, "mean", None), getattr(data, "std", None)
    if mean is None or std is None:
        raise ValueError(
            "the adversary works in units of pixels in 0..1, but the datamodule has no mean and std of the "
            "normalisation; give PGD(mean=..., std=...), with [0] and [1] for images that are not normalised"
        )
    return [float(v) for v in mean], [float(v) for v in std]

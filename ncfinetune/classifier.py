"""The base class of classifiers: steps on labelled batches, and checks of labels and datamodules.

Legend: ``N`` samples, ``K`` classes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from ncfinetune.backbone import Backbone
from ncfinetune.copies import CopyError
from ncfinetune.image_predictions import ImagePredictions, predict_images
from ncfinetune.inputs import check_labels, may_look, whole
from ncfinetune.learner import Batch, Interval, Learner, are_numbers
from ncfinetune.loaders import drawn_labels, draws_by_weights
from ncfinetune.schedule import depths, layer_groups, two_groups
from ncfinetune.texts import some

ClassWeight = Literal["balanced"] | list[float]
# Probabilities in bfloat16, as under precision=bf16-true, sum to 1 within 2^-8.
_ROW_SUM_TOLERANCE = 1e-2
# Entries of the preprocessing that change the pixels, and the option of datamodules for each; two depend on the data.
_PREPARED_BY = {
    "mean": "mean",
    "std": "std",
    "value_range": "value_range",
    "input_size": "image_size",
    "crop_pct": None,
    "stored_size": None,
}


class Classifier(Learner):
    """A learner of batches ``(images, labels)`` that outputs class logits. Abstract.

    Labels are classes ``(N,)`` or, as mixup produces them, class probabilities ``(N, K)``, whose most probable class
    counts for the accuracy.

    Logs ``train/loss`` and ``train/acc``, the same under ``val/`` and ``test/``, and as ``test/images`` the number of
    test images; of several loaders each under ``NAME/dataloader_idx_I``. `predict_step` returns class probabilities.

    Args:
        num_classes: Number of classes ``K``.
        backbone: A timm name, the arguments of a `Backbone`, or a `Backbone`.
        optimizer: Makes an optimiser of the trained parameters; None is AdamW with learning rate 1e-3.
        lr_scheduler: Makes a scheduler of that optimiser.
        lr_batch: Batch size (images per step) that the learning rate is meant for; see `Learner`.
        lr_interval: Whether the scheduler is stepped once an ``epoch`` or after each ``step``.
        label_smoothing: Share of the target that cross-entropy spreads over all classes in training (Szegedy et al.
            2016, arXiv 1512.00567, section 7), from 0 to below 1.
        class_weight: Weights of the classes in the training loss, which becomes a weighted mean over the batch as in
            `torch.nn.CrossEntropyLoss`: normalised within each batch of each process; these means are averaged over
            processes and accumulated batches. ``balanced`` gives a class with ``n`` of the ``N`` training images the
            weight ``N / (K n)``, K the number of classes with images (King and Zeng 2001, as in scikit-learn), and a
            class without images 0. It is refused if images are sampled by weights, which balances the classes already.
            With class probabilities as labels the mean is not normalised, as in torch. Loss and accuracy of validation
            and test are neither weighted nor smoothed.
        layer_decay: Layer-wise learning-rate decay: the learning rate of each layer of the backbone is this factor, in
            (0, 1], times the rate of the following layer; the last layer follows the head. Layers are those of
            `timm.optim.param_groups_layer_decay`; weight decay is the optimiser's for all. None is the optimiser's
            rate for all layers.

    Attributes:
        class_weights: The weights ``(K,)``; None without ``class_weight``. They are not saved in checkpoints; with
            ``balanced`` they are 1 until a fit, new or resumed, counts the training images.

    Raises:
        ValueError: ``num_classes`` is below 2, or contradicts the datamodule or a label; labels ``(N, K)`` whose rows
            are not probabilities, as in multi-label data. On an accelerator labels are checked in the first batch of an
            epoch and, for the other batches, at the end of the epoch. Also ``label_smoothing``, ``layer_decay`` or
            weights out of their range, ``balanced`` without known labels or with balanced sampling, ``layer_decay`` for
            a network that timm cannot divide into layers, and resuming with other factors of the learning rate.
    """

    logged = ("loss", "acc")
    # Arguments that multiply the learning rates of parameter groups throughout a run.
    rate_factors: ClassVar[tuple[str, ...]] = ("layer_decay",)

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
        self.layer_decay = None if layer_decay is None else float(layer_decay)
        self.num_classes = int(num_classes)
        self.label_smoothing = float(label_smoothing)
        self._balances = isinstance(class_weight, str)
        # No buffer, which the precision bf16-true would round to 8 bits.
        self.class_weights = _start_of_weights(class_weight, num_classes)
        # Number of this epoch's label rows that are no probabilities, on this process; read when the epoch ends.
        self._wrong_rows: Tensor | None = None

    def parameter_groups(self) -> list[Any]:
        """The optimiser's parameters; with ``layer_decay`` a group for each backbone layer and one for the head."""
        trained = super().parameter_groups()
        if self.layer_decay is None:
            return trained
        head = [group for group in two_groups(trained, self.backbone) if group["name"] == "head"]
        return [*layer_groups(self.backbone.net, self.layer_decay), *head]

    def lr_factor(self, group: dict[str, Any]) -> float:
        """The factor of the learning rate of one of the optimiser's parameter groups."""
        return super().lr_factor(group) * group.get("lr_factor", 1.0)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Class logits ``(N, K)`` of images."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, in float32 at least; label smoothing and class weights apply only in training."""
        kind = torch.promote_types(logits.dtype, torch.float32)
        logits, labels = logits.to(kind), labels.to(kind) if labels.is_floating_point() else labels
        weight = self.weights_in_training(logits.device)
        smoothing = self.label_smoothing if self.training else 0.0
        weight = None if weight is None else weight.to(kind)
        return nn.functional.cross_entropy(logits, labels, weight, label_smoothing=smoothing)

    def weights_in_training(self, device: torch.device) -> Tensor | None:
        """Class weights ``(K,)`` in float32, on this device from then on; None without any, or in evaluation."""
        if self.class_weights is None or not self.training:
            return None
        self.class_weights = self.class_weights.to(device)
        return self.class_weights

    def setup(self, stage: str) -> None:
        """Refuse a datamodule with other classes; compute the balanced class weights of a fit.

        Raises:
            ValueError: The datamodule has another number of classes, or ``balanced`` cannot be computed.
        """
        super().setup(stage)
        offered = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        if offered not in (None, self.num_classes):
            raise ValueError(
                f"the model has num_classes={self.num_classes}, the data {offered}; "
                f"give the model num_classes={offered}"
            )
        if stage == "fit" and self._balances and self.trainer.limit_train_batches:
            self.class_weights = _balanced(_training_counts(self.trainer, self.num_classes)).float()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume a run with other factors of the learning rate, since its optimiser's state holds the rates.

        Raises:
            ValueError: The factors differ.
        """
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("hyper_parameters", {})
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        for name in self.rate_factors:
            if name in saved and saved[name] != self.hparams.get(name):
                raise ValueError(
                    f"cannot resume a run of {name}={saved[name]} with {name}={self.hparams[name]}, since the saved "
                    f"optimiser keeps its learning rates; leave {name} as it was, or start a new run from its weights"
                )

    def compare_data(self, names: list[str] | None, images: dict[str, Any] | None) -> None:
        """Refuse a datamodule with other classes, and warn of one that prepares images otherwise.

        Names ``0`` to ``K - 1`` may stand for any others, unless these are numbers too.

        Raises:
            ValueError: The datamodule has other classes, or the same classes in another order.
        """
        if names and self.class_names and _contradict(names, self.class_names):
            raise ValueError(
                f"the model was trained on the classes {some(self.class_names, total=True)}, but the datamodule has "
                f"{some(names, total=True)}; expected the same classes in the same order"
            )
        ours, theirs = self.preprocessing or {}, images or {}
        known = [key for key in _PREPARED_BY if key in ours and key in theirs]
        if other := [key for key in known if ours[key] != theirs[key]]:
            trained, given = (", ".join(f"{key}={seen[key]}" for key in other) for seen in (ours, theirs))
            rank_zero_warn(
                f"the model was trained on images prepared with {trained}, but the datamodule prepares them with "
                f"{given}; {_remedy(other)}"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of the batch."""
        return self._classify(batch, batch_idx, "train")

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log loss and accuracy of the batch."""
        self._classify(batch, batch_idx, "val", dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log loss and accuracy of the batch, and how many images are tested."""
        self._classify(batch, batch_idx, "test", dataloader_idx)
        self.log("test/images", float(len(batch[1])), on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Class probabilities ``(N, K)`` of logits: their softmax, in float32 at least."""
        # In half precision different logits would have equal probabilities, and rows would not sum to 1.
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Class probabilities ``(N, K)``."""
        return self.probabilities(self(batch[0]))

    def predict_images(
        self, images: str | Path | Sequence[str | Path], batch_size: int = 32, num_workers: int = 0
    ) -> ImagePredictions:
        """Predict image files with the preprocessing of the training, which checkpoints and deltas store.

        Files that cannot be read, or whose probabilities are nan, are reported: with a warning, and with their error in
        the result.

            >>> from ncfinetune import FineTuner
            >>> model = FineTuner.load_from_checkpoint("RUN/checkpoints/best.ckpt")  # doctest: +SKIP
            >>> for file, name, probability in model.predict_images("photos"):  # doctest: +SKIP
            ...     print(file, name, probability)

        Args:
            images: A folder, searched recursively, a file, or several.
            batch_size: Images per batch.
            num_workers: Worker processes that decode; 0 decodes in this process.

        Raises:
            ValueError: The model does not know its preprocessing, or there are no images.
            FileNotFoundError: No such folder or file, or no images in the folder.
        """
        return predict_images(self, images, batch_size, num_workers)

    def on_train_epoch_end(self) -> None:
        """Raise for wrong label rows that were counted on the device during the epoch."""
        super().on_train_epoch_end()
        self._refuse_counted()

    def on_validation_epoch_end(self) -> None:
        """Raise for wrong label rows that were counted on the device during the epoch."""
        super().on_validation_epoch_end()
        self._refuse_counted()

    def on_test_epoch_end(self) -> None:
        """Raise for wrong label rows that were counted on the device during the epoch."""
        self._refuse_counted()

    def _classify(self, batch: Batch, batch_idx: int, split: str, loader: int = 0) -> Tensor:
        images, labels = batch[0], whole(batch[1])
        if batch_idx == 0 or may_look(labels):
            _check_labels(labels, self.num_classes)
        elif labels.ndim == 2:
            wrong = _off_one(labels).sum()
            self._wrong_rows = wrong if self._wrong_rows is None else self._wrong_rows + wrong
        logits = self(images)
        loss = self.loss(logits, labels)
        self.log_mean(f"{split}/loss", loss, len(labels), loader)
        hits = logits.argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))
        self.log_mean(f"{split}/acc", hits, len(labels), loader)
        return loss

    def _refuse_counted(self) -> None:
        """Raise for the epoch's wrong label rows, on all processes, so that none hangs in a collective."""
        own, self._wrong_rows = self._wrong_rows, None
        if may_look(torch.empty(0, device=self.device)):
            return
        count = torch.zeros((), dtype=torch.int64, device=self.device) if own is None else own
        if wrong := int(self.trainer.strategy.reduce(count, reduce_op="sum")):
            raise ValueError(_not_probabilities(f"{wrong} rows in this epoch that do not"))


def _start_of_weights(class_weight: ClassWeight | None, num_classes: int) -> Tensor | None:
    """The given weights; for ``balanced`` ones, which are replaced when a fit counts the training images."""
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
    """Training images per class, ``(K,)``, known to the datamodule or its data set without reading an image."""
    data: Any = getattr(trainer, "datamodule", None)
    counts, balanced = getattr(data, "class_counts", None), getattr(data, "sampling", None) == "balanced"
    if counts is None and not balanced:
        trainer.fit_loop.setup_data()  # creates the loader
        balanced = draws_by_weights(trainer.train_dataloader)
    if balanced:
        raise ValueError(
            'class_weight="balanced" with images sampled by weights, as sampling="balanced" does, would balance the '
            "classes twice; leave one of them out"
        )
    if counts is None:
        labels = _labels_of(trainer.train_dataloader)
        check_labels(labels, num_classes)
        counts = labels.bincount(minlength=num_classes)
    counts = torch.as_tensor(counts, device=trainer.strategy.root_device)
    if counts.shape != (num_classes,):
        raise ValueError(f"expected class_counts of {num_classes} classes, got shape {tuple(counts.shape)}")
    # If every process has the whole set, all counts are multiplied by the world size, which cancels in the weights.
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
            'class_weight="balanced" needs the labels of all training images: expected class_counts of the datamodule, '
            "or targets of its data set; or give the weights as numbers"
        )
    return torch.as_tensor(labels.astype("int64"))


def _balanced(counts: Tensor) -> Tensor:
    """Weights that give every class with samples the same total weight, and the samples 1 on average."""
    present = counts > 0
    return torch.where(present, counts.sum() / present.sum() / counts, 0.0)


def _contradict(names: list[str], others: list[str]) -> bool:
    """Whether two lists name different classes; ``0`` to ``K - 1`` may be the labels of any that are not numbers."""
    if not (are_numbers(names) or are_numbers(others)):
        return names != others
    all_numbers = all(name.isdecimal() for name in [*names, *others])
    return all_numbers and [*map(int, names)] != [*map(int, others)]


def _remedy(other: list[str]) -> str:
    """How images are prepared as in training, where these entries of the preprocessing differ."""
    options = [option for key in other if (option := _PREPARED_BY[key])]
    remedies = [f"give the datamodule the model's {' and '.join(options)}"] if options else []
    if "input_size" not in other and {"crop_pct", "stored_size"} & {*other}:
        remedies.append("predict image files by --images or predict_images, which prepare them as the training did")
    return ", and ".join(remedies)


def _off_one(shares: Tensor) -> Tensor:
    """Which rows are no probabilities: those with another sum than 1, a negative number or a nan."""
    whole_rows = (shares.sum(1, dtype=torch.float32) - 1).abs() <= _ROW_SUM_TOLERANCE
    return ~(whole_rows & (shares >= 0).all(1))


def _not_probabilities(found: str) -> str:
    return (
        f"expected labels (N, K) to be class probabilities, not negative, whose rows sum to 1, got {found}; "
        "multi-label data, in which an image has several classes, are not supported"
    )


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if labels.ndim != 1:
        if labels.shape[1:] != (num_classes,) or not labels.is_floating_point():
            raise ValueError(
                f"expected labels (N,), or probabilities (N, {num_classes}) since num_classes={num_classes}, got "
                f"{tuple(labels.shape)} of {labels.dtype}"
            )
        if (wrong := _off_one(labels)).any():
            row = labels[wrong][0]
            least = f" and holds {float(row.min()):g}" if row.min() < 0 else ""
            raise ValueError(_not_probabilities(f"a row that sums to {float(row.sum()):g}{least}"))
        return
    if labels.is_floating_point():
        raise ValueError(f"expected labels (N,) as integers, got {labels.dtype}; cast them by labels.long()")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        wrong_label = low if low < 0 else high
        raise ValueError(
            f"expected labels in 0..{num_classes - 1}, since num_classes={num_classes}, got {wrong_label}; "
            f"number the classes from 0, or give a num_classes of at least {high + 1}"
        )

"""OnlineProbe: how well the features of a run classify, while it trains and without a say in it.

Legend: ``N`` samples, ``M`` samples of a bank, ``V`` views, ``K`` classes, ``d`` feature width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import move_data_to_device, rank_zero_warn
from torch import Tensor

from ncfinetune.inputs import check_labels
from ncfinetune.layers import PENULTIMATE
from ncfinetune.passes import TrainingSet, evaluation, evenly, flat, ready_batches

from . import adapters
from .adapters import BatchReader
from .classify import OnlineClassifier, fit_probe, knn_predict
from .observer import LayerObserver
from .schedule import PassSchedule

_NAME = "OnlineProbe"


class OnlineProbe(Callback):
    """Trains a linear classifier on the detached features of any LightningModule, beside it and with its own optimiser.

    Nothing of it enters the module, its loss or its optimiser; the run ends in the same weights with it and without.
    It learns from the training batches as they pass, one step each, on features that are first brought to mean 0 and
    variance 1, and is tested on the validation batches as they pass. Images with views give a feature a view. Where
    validation runs with averaged weights, it is tested on the features of those, but learns on those that train.

    Logs ``probe/loss`` of the training batches and ``probe/acc`` of the validation batches, and what is asked for of
    ``probe/knn``, ``probe/downstream_acc`` and ``probe/downstream_knn``. These take passes of their own, in eval mode
    and with the weights of the validation: a bank of training images, as they are without augmentation, for kNN (Wu et
    al. 2018, arXiv 1805.01978, section 3.4: cosine similarity, votes weighted by exp(s/0.07)); and for the second data
    set a linear classifier fitted to convergence on features of its training images, tested on its validation images.

        >>> from lightning import Trainer
        >>> probe = OnlineProbe(num_classes=10, layer="layer3.1", knn=20)
        >>> trainer = Trainer(max_epochs=30, callbacks=[probe], logger=False, enable_checkpointing=False)
        >>> probe in trainer.callbacks
        True

    Args:
        num_classes: Number of classes ``K``; None asks the datamodule, then the module, for their ``num_classes``.
        layer: A layer's name, which then ends the log names (``probe/acc/layer3.1``), or ``penultimate``.
        optimizer: Makes the optimiser of the classifier; None is Adam with learning rate 1e-3.
        knn: Neighbours that vote in kNN, at most those that the bank has; 0 is no kNN.
        downstream: Datamodule of a second data set, whose accuracy shows how the features transfer.
        every_n_epochs: Epochs between the passes for kNN and the second data set.
        max_samples: Images of each part that a pass takes at most, evenly spread over it.
        classifier: The classifier's name, whose input is ``penultimate``; ``auto`` as in `NeuralCollapseTracker`.
        batch_to_labels: Takes the labels ``(N,)`` from a batch; None as in `NeuralCollapseTracker`. Labels that are
            shares of the classes ``(N, K)`` teach the probe as they are.
        forward: Runs a module on a batch in a pass, called ``forward(module, batch)``; None as in
            `NeuralCollapseTracker`.
        ignore_index: Samples with this label, such as -1 for none, are left out.

    Raises:
        ValueError: A number out of its range; in ``setup``: no such layer or several, or nobody knows the number of
            classes; in training: a second data set without training or validation images.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        layer: str = PENULTIMATE,
        optimizer: OptimizerCallable | None = None,
        knn: int = 0,
        downstream: LightningDataModule | None = None,
        every_n_epochs: int = 1,
        max_samples: int = 10_000,
        classifier: str = "auto",
        batch_to_labels: Callable[[Any], Tensor] | None = None,
        forward: Callable[[LightningModule, Any], Any] | None = None,
        ignore_index: int | None = None,
    ) -> None:
        least = {"knn": 0, "every_n_epochs": 1, "max_samples": 2}
        for name, value in {"knn": knn, "every_n_epochs": every_n_epochs, "max_samples": max_samples}.items():
            if value < least[name]:
                raise ValueError(f"expected {name} of at least {least[name]}, got {value}")
        self.num_classes = num_classes
        self.layer = layer
        self.optimizer = optimizer or torch.optim.Adam
        self.knn = knn
        self.downstream = downstream
        self.every_n_epochs = every_n_epochs
        self.max_samples = max_samples
        self.classifier = classifier
        self.batch_to_labels = batch_to_labels
        self.forward = forward
        self.ignore_index = ignore_index
        self._schedule = PassSchedule(_NAME, every_n_epochs if downstream is not None else 0)
        self._training_set = TrainingSet(_NAME, "max_samples", "knn=0")
        self._observer: LayerObserver | None = None
        self._reader = BatchReader(_NAME)
        self._classes = 0
        self._linear = OnlineClassifier(self.optimizer, ignore_index)
        self._loaders: list[Any] = []
        self._bank_due = False
        self._bank: tuple[Tensor, Tensor] | None = None
        self._counts: dict[tuple[str, int], Tensor] = {}
        self._transferred: dict[str, float] = {}

    @property
    def state_key(self) -> str:
        """A name of its own in checkpoints for the probe of each layer."""
        return self._generate_state_key(layer=self.layer)

    def state_dict(self) -> dict[str, Any]:
        """Weights of the classifier, state of its optimiser, and sums of the epoch."""
        return self._linear.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._linear.load_state_dict(state_dict)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the second data set, and hook the layer unless the module makes it later, in ``configure_model``."""
        if stage != "fit":
            return
        if not adapters.defines(pl_module, "configure_model"):
            self._attach(trainer, pl_module)
        if self.downstream is not None:
            if trainer.local_rank == 0:
                self.downstream.prepare_data()
            trainer.strategy.barrier()
            self.downstream.trainer = trainer
            self.downstream.setup("fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unhook the layer, and let go of data and features."""
        if self._observer is not None:
            self._observer.remove()
        self._observer = self._bank = None
        self._training_set = TrainingSet(_NAME, "max_samples", "knn=0")
        self._loaders = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Unhook the layer."""
        self.teardown(trainer, pl_module, "fit")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the layer if it is not yet."""
        self._attach(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count epochs, and go on with the classifier of a run that is resumed."""
        self._schedule.start(trainer)
        self._linear.restore(self._classes, pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listen to the step, and begin the epoch's sums with its first."""
        if batch_idx == 0:
            self._linear.begin_epoch()
        self._seen_by.listen("training_step")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a step on the batch; among several processes each takes the same one, on the batches of all."""
        features, labels = self._take(batch, shares=True)
        if trainer.world_size > 1:
            features, labels = _gathered(features, trainer.world_size), _gathered(labels, trainer.world_size)
        if len(features) > 1:  # one feature has no variance
            self._linear.learn(features, labels, self._classes)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count, unless Lightning only checks that validation runs."""
        if not self._measures(trainer):
            return
        self._counts, self._transferred = {}, {}
        self._bank_due = self.knn > 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        self._loaders = flat(trainer.val_dataloaders)
        self._seen_by.restart()
        if self._schedule.open_validation(trainer):
            self._transfer(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Make the bank and measure the second data set, if that is due, with the weights that validation has now."""
        if not self._measures(trainer):
            return
        if self._schedule.in_validation(trainer, pl_module):
            self._transfer(trainer, pl_module)
        if self._bank_due and self._bank is None:
            self._make_bank(trainer, pl_module)
        self._seen_by.listen("validation_step")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Classify the batch, but for samples that another process has too."""
        if not self._measures(trainer):
            return
        features, labels = self._take(batch, self._loaders[dataloader_idx], dataloader_idx)
        if self._linear.probe is not None:
            self._count("acc", dataloader_idx, self._linear.probe(features).argmax(1), features, labels)
        if self._bank is not None:
            predictions = knn_predict(features, *self._bank, self._classes, self.knn)
            self._count("knn", dataloader_idx, predictions, features, labels)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracies over all processes, a number a validation loader."""
        if not self._measures(trainer):
            return
        numbers = ["acc"] * (self._linear.probe is not None) + ["knn"] * self._bank_due
        for number, index in itertools.product(numbers, range(len(self._loaders))):
            self._log(pl_module, self._name(number) + self._suffix(index), self._accuracy(trainer, number, index))
        for name, value in self._transferred.items():
            self._log(pl_module, name, value)
        self._counts, self._bank, self._transferred = {}, None, {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean loss, and measure the second data set if that is due and the validation has not done so."""
        # Not left to Lightning's mean over an epoch, of which a run that is resumed within it has the rest alone.
        if (loss := self._linear.mean_loss()) is not None:
            self._log(pl_module, self._name("loss"), loss)
        if self._schedule.after_epoch(trainer, pl_module):
            self._transfer(trainer, pl_module)
            for name, value in self._transferred.items():
                self._log(pl_module, name, value)
        self._report_left_out()

    @property
    def _seen_by(self) -> LayerObserver:
        assert self._observer is not None
        return self._observer

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._observer is not None:
            return
        self._classes = self.num_classes or adapters.known_num_classes(trainer, pl_module, _NAME)
        self._reader = BatchReader(_NAME, self._classes, self.batch_to_labels, self.forward)
        self._observer = LayerObserver(pl_module, [self.layer], self._reader, self.classifier)
        if len(self._observer.names) != 1:
            raise ValueError(f"expected one layer, but {self.layer!r} fits {', '.join(self._observer.names)}")

    def _measures(self, trainer: Trainer) -> bool:
        """Whether the present validation counts: one of a fit, and no sanity check."""
        return self._observer is not None and not trainer.sanity_checking

    def _name(self, number: str) -> str:
        return f"probe/{number}" if self.layer == PENULTIMATE else f"probe/{number}/{self.layer}"

    def _suffix(self, index: int) -> str:
        return f"/dataloader_idx_{index}" if len(self._loaders) > 1 else ""

    def _log(self, pl_module: LightningModule, name: str, value: float) -> None:
        pl_module.log(name, value, on_step=False, on_epoch=True, sync_dist=True, add_dataloader_idx=False)

    def _take(self, batch: Any, loader: Any = None, index: int = 0, **how: Any) -> tuple[Tensor, Tensor]:
        """Features ``(M, d)`` of the batch that ran last, and their labels."""
        taken, labels = self._seen_by.take(batch, loader, index, **how)
        if not taken:
            raise ValueError(f"layer {self.layer!r} did not run in this batch; give OnlineProbe a layer that does")
        (features,) = taken.values()
        return features, labels

    def _report_left_out(self) -> None:
        """Say which of the epoch's training samples were left out; the same on all processes."""
        labels, features = self._linear.left_out()
        if labels:
            raise ValueError(
                f"{_NAME}: expected labels in 0..{self._classes - 1} (num_classes={self._classes}), got {labels} "
                "training samples with others in this epoch"
            )
        if features:
            rank_zero_warn(f"{_NAME} left out {features} training samples of this epoch with nan or inf in features")

    def _count(self, number: str, index: int, predictions: Tensor, features: Tensor, labels: Tensor) -> None:
        """Count what is right, what is to be judged, and what cannot be: of no known class, or not finite."""
        counted = torch.ones_like(labels, dtype=torch.bool)
        if self.ignore_index is not None:
            counted = labels != self.ignore_index
        known = (labels >= 0) & (labels < self._classes) & features.isfinite().all(1)
        parts = ((predictions == labels) & counted, counted, counted & ~known)
        counts = torch.stack([part.sum() for part in parts])
        self._counts[number, index] = self._counts.get((number, index), 0) + counts

    def _accuracy(self, trainer: Trainer, number: str, index: int) -> float:
        """The share of the samples of a loader, over all processes, that are classified right."""
        counts = self._counts.get((number, index), torch.zeros(3, dtype=torch.int64))
        counts = trainer.strategy.reduce(counts.to(trainer.strategy.root_device), reduce_op="sum")
        right, total, unknown = counts.tolist()
        if unknown or not total:
            rank_zero_warn(
                f"{self._name(number)}{self._suffix(index)} is logged as nan: {unknown} of {total} samples have labels "
                f"outside 0..{self._classes - 1}, or nan or inf in their features"
            )
        return right / total if total and not unknown else float("nan")

    def _make_bank(self, trainer: Trainer, module: LightningModule) -> None:
        data = self._training_set.batches(trainer, max_samples=self.max_samples, shared=False)
        with evaluation(trainer, module):
            self._bank = self._features(ready_batches(trainer, data), self._reader)
        check_labels(self._bank[1], self._classes)
        self._seen_by.restart()

    def _transfer(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure how the features serve on the second data set."""
        data = cast(LightningDataModule, self.downstream)

        def parts(loader: Any) -> tuple[Tensor, Tensor]:
            batches = (move_data_to_device(batch, module.device) for batch in evenly(loader, self.max_samples))
            ready = (data.on_after_batch_transfer(batch, 0) for batch in batches)
            return self._features(ready, replace(self._reader, num_classes=None))

        with evaluation(trainer, module):
            bank = parts(getattr(data, "train_plain_dataloader", data.train_dataloader)())
            tested = [parts(loader) for loader in flat(data.val_dataloader())] or [self._features([], self._reader)]
        classes = 1 + max(int(labels.max()) for _, labels in [bank, *tested])
        probe = fit_probe(*bank, classes)
        self._transferred = {}
        for index, (features, labels) in enumerate(tested):
            values = {"downstream_acc": probe(features).argmax(1)}
            if self.knn:
                values["downstream_knn"] = knn_predict(features, *bank, classes, self.knn)
            suffix = f"/dataloader_idx_{index}" if len(tested) > 1 else ""
            for number, predictions in values.items():
                self._transferred[self._name(number) + suffix] = (predictions == labels).double().mean().item()
        self._seen_by.restart()
        self._schedule.done(trainer)

    def _features(self, batches: Iterable[Any], reader: BatchReader) -> tuple[Tensor, Tensor]:
        """Features and labels of batches that are ready to run."""
        parts: list[tuple[Tensor, Tensor]] = []
        for batch in batches:
            self._seen_by.run(batch)
            parts.append(self._take(batch, reader=reader))
        if not parts:
            raise ValueError("OnlineProbe found no batches to measure; the data need training and validation images")
        features, labels = (torch.cat(values) for values in zip(*parts, strict=True))
        finite = features.isfinite().all(1)
        if not finite.all():
            rank_zero_warn(f"{_NAME} left out {int((~finite).sum())} samples of a pass with nan or inf in features")
        kept = finite if self.ignore_index is None else finite & (labels != self.ignore_index)
        return features[kept], labels[kept]


def _gathered(rows: Tensor, world_size: int) -> Tensor:
    parts = [torch.empty_like(rows) for _ in range(world_size)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)

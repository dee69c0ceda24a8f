"""OnlineProbe: how well the features of a run classify, measured while it trains, without influence on it.

Legend: ``N`` samples, ``M`` samples of a bank, ``V`` views, ``K`` classes, ``d`` feature width.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from ncfinetune.inputs import check_labels
from ncfinetune.layers import PENULTIMATE
from ncfinetune.passes import TrainingSet, evaluated, evaluation, ready_batches

from . import adapters
from .adapters import BatchReader
from .classify import Fit, Neighbours, OnlineClassifier, Scores, accuracy, count, fit_probe, fit_ridge, transferred
from .features import gathered, prepare, read, read_second, take, whole_pass
from .logs import log_epoch
from .observer import LayerObserver
from .schedule import PassSchedule, every_process_gets_a_batch, is_new

_NAME = "OnlineProbe"
Kind = Literal["linear", "ridge"]
_FITS: dict[Kind, Fit] = {"linear": fit_probe, "ridge": fit_ridge}


class OnlineProbe(Callback):
    """Measures how good the features of any LightningModule are during training, by the accuracy of simple classifiers.

    The probe does not enter the module, its loss or its optimiser; the run ends with the same weights as without it.
    Images with several views give one feature per view. A linear classifier ``(K, d)`` is tested on the validation
    batches during their steps, on the features of averaged weights if validation uses those:

    - ``linear`` is trained on the training batches during their steps, one step per batch with a separate optimiser, on
      features of the training weights, standardised to mean 0 and variance 1.
    - ``ridge`` is the closed form of `ncfinetune.probes.ridge`, fitted to the bank in float64. It has no learning rate
      and no state, and adds nothing to a training step.

    Separate passes, in eval mode and with the weights of the validation, compute a bank ``(M, d)`` of features of
    training images without augmentation, for ridge and kNN (Wu et al. 2018, arXiv 1805.01978, section 3.4: cosine
    similarity, votes weighted by exp(s/0.07)), and the features of a second data set. The probe logs

    - ``probe/loss`` of the training batches, if linear;
    - ``probe/acc`` and ``probe/knn`` of the validation images, one number per loader; those that need the bank are
      logged when it is made;
    - ``probe/held_out_acc`` when the bank is made, if ridge: the share of the bank that is classified correctly by
      classifiers that leave out its fold, one feature of each class (exact). It needs no validation images. Other views
      of the same image stay in the fit and increase it;
    - ``probe/downstream_acc`` and ``probe/downstream_knn`` of the second data set's validation images; the first is
      that of a classifier fitted to its training images, to convergence if linear.

        >>> from lightning import Trainer
        >>> probe = OnlineProbe(num_classes=10, layer="layer3.1", kind="ridge", knn=20)
        >>> trainer = Trainer(max_epochs=30, callbacks=[probe], logger=False, enable_checkpointing=False)
        >>> probe in trainer.callbacks
        True

    Args:
        num_classes: Number of classes ``K``; None takes the ``num_classes`` of the datamodule or of the module.
        layer: A layer's name, which is appended to the log names (``probe/acc/layer3.1``), or ``penultimate``.
        kind: The classifier: ``linear``, trained during the run, or ``ridge``, in closed form.
        optimizer: Makes the optimiser of the linear classifier; None is Adam with learning rate 1e-3.
        knn: Number of neighbours in kNN, limited to the size of the bank; 0 is no kNN.
        downstream: Datamodule of a second data set, whose accuracy shows how the features transfer.
        every_n_epochs: Epochs between the passes for the bank and the second data set, of which the last is after the
            last epoch.
        max_samples: Largest number of images of each split in a pass, evenly spread over it; of a stream, the first.
        classifier: The classifier's name, whose input is ``penultimate``; ``auto`` as in `NeuralCollapseTracker`.
        batch_to_labels: Takes the labels ``(N,)`` from a batch; None as in `NeuralCollapseTracker`. The linear
            classifier is also trained on class probabilities ``(N, K)``.
        forward: Runs a module on a batch in a pass, called ``forward(module, batch)``; None as in
            `NeuralCollapseTracker`.
        ignore_index: Samples with this label, such as -1 for unlabelled ones, are left out.

    Raises:
        ValueError: A number out of its range, no such kind, or an optimiser for ridge; in ``setup``: no such layer or
            several, or an unknown number of classes; in training: labels out of range, or a second data set without
            training or validation images.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        layer: str = PENULTIMATE,
        kind: Kind = "linear",
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
        _check(kind, optimizer, knn=(knn, 0), every_n_epochs=(every_n_epochs, 1), max_samples=(max_samples, 2))
        self.num_classes = num_classes
        self.layer = layer
        self.kind = kind
        self.optimizer = optimizer or torch.optim.Adam
        self.knn = knn
        self.downstream = downstream
        self.every_n_epochs = every_n_epochs
        self.max_samples = max_samples
        self.classifier = classifier
        self.batch_to_labels = batch_to_labels
        self.forward = forward
        self.ignore_index = ignore_index
        # kNN is evaluated in validation only.
        self._schedule = PassSchedule(_NAME, every_n_epochs if kind == "ridge" or downstream is not None else 0)
        self._training_set = _unread(kind, knn)
        self._observer: LayerObserver | None = None
        self._reader = BatchReader(_NAME)
        self._classes = 0
        self._linear = OnlineClassifier(self.optimizer, ignore_index)  # never used by kind="ridge"
        # State of the current validation: classifiers, their counts for each loader, results of passes by log name.
        self._loaders: list[Any] = []
        self._bank_due = False
        self._scores: dict[str, Scores] = {}
        self._counts: dict[tuple[str, int], Tensor] = {}
        self._found: dict[str, float] = {}

    @property
    def state_key(self) -> str:
        """A key in checkpoints that differs between the probes of different layers."""
        return self._generate_state_key(layer=self.layer)

    def state_dict(self) -> dict[str, Any]:
        """Weights of the linear classifier, state of its optimiser, and sums of the epoch; empty for ridge."""
        return self._linear.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        if self.kind == "linear":
            self._linear.load_state_dict(state_dict)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the second data set, and hook the layer unless the module makes it later."""
        if stage != "fit":
            return
        adapters.hooks_early(pl_module, lambda: self._attach(trainer, pl_module))
        if self.downstream is not None:
            prepare(self.downstream, trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks, and free data and features."""
        if self._observer is not None:
            self._observer.remove()
        self._observer, self._training_set = None, _unread(self.kind, self.knn)
        self._loaders, self._scores, self._counts, self._found = [], {}, {}, {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self.teardown(trainer, pl_module, "fit")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the layer if that was not done in `setup`."""
        self._attach(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting epochs, and restore the classifier of a resumed run; a new run has a new one."""
        self._schedule.start(trainer)
        if is_new(trainer):
            self._linear.forget()
        self._linear.restore(self._classes, pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Observe the step, and reset the epoch's sums before its first."""
        if self.kind == "linear":
            if batch_idx == 0:
                self._linear.begin_epoch()
            self._seen_by.listen(batch, "training_step")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Train the classifier on the batch, gathered from all processes."""
        # A step that trains nothing may leave out its forward pass, in a single process as Lightning demands.
        skipped = not self._seen_by.caught and self._linear.probe is not None and trainer.world_size == 1
        if self.kind == "linear" and not skipped:
            taken = take(self._seen_by, self._reader, shares=True)
            features, labels = gathered(
                taken, trainer.world_size
            )  # the same on all processes, so that their classifiers stay equal
            if len(features) > 1:  # one feature has no variance
                self._linear.learn(features, labels, self._classes)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the counts, unless this is the sanity check."""
        if not self._measures(trainer):
            return
        self._scores = {} if self._linear.probe is None else {"acc": self._linear.probe}
        self._counts, self._found = {}, {}
        epoch_due = (trainer.current_epoch + 1) % self.every_n_epochs == 0 or self._schedule.is_due(trainer)
        self._bank_due = epoch_due and (self.kind == "ridge" or self.knn > 0)
        self._loaders = evaluated(trainer)
        self._seen_by.restart()
        last = self._schedule.open_validation(trainer)
        # All processes make a bank or none does, since they must log its results together.
        if last or (self._bank_due and not every_process_gets_a_batch(trainer)):
            self._make_passes(trainer, pl_module, last)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Make the due passes with the weights of the validation, and observe the step if it is classified."""
        if not self._measures(trainer):
            return
        last = self._schedule.in_validation(trainer, pl_module)
        if last or self._bank_due:
            self._make_passes(trainer, pl_module, last)
        if self._scores:
            self._seen_by.listen(batch, "validation_step")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Classify the batch, without samples that are repeated on another process."""
        if not self._scores:
            return
        loader = self._loaders[dataloader_idx]
        features, labels = take(self._seen_by, self._reader, loader, dataloader_idx)
        for number, scores in self._scores.items():
            counts = count(scores(features), labels, self._classes, self.ignore_index)
            self._counts[number, dataloader_idx] = self._counts.get((number, dataloader_idx), 0) + counts

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracies over all processes, one per validation loader, and the results of the passes."""
        for number, index in product(self._scores, range(len(self._loaders))):
            counts = self._counts.get((number, index), torch.zeros(3, dtype=torch.int64))
            counts = trainer.strategy.reduce(counts.to(trainer.strategy.root_device), reduce_op="sum")
            name = self._name(number, index, len(self._loaders))
            log_epoch(pl_module, {name: accuracy(counts, name, self._classes)})
        self._log_found(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean loss, and make the passes that are due and were not made in a validation."""
        # Not by Lightning's mean over an epoch: a run resumed within the epoch would average the rest of it only.
        if (loss := self._linear.mean_loss()) is not None:
            log_epoch(pl_module, {self._name("loss"): loss})
        if self._schedule.after_epoch(trainer, pl_module):
            self._bank_due = self.kind == "ridge"
            self._make_passes(trainer, pl_module, last=True)
            self._log_found(pl_module)
        self._linear.report_left_out(_NAME, self._classes)

    @property
    def _seen_by(self) -> LayerObserver:
        assert self._observer is not None
        return self._observer

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._observer is not None:
            if self._observer.is_within(pl_module):
                return
            self._observer.remove()  # the module has made its layers anew
        self._classes = self.num_classes or adapters.known_num_classes(trainer, pl_module, _NAME)
        self._reader = BatchReader(_NAME, self._classes, self.batch_to_labels, self.forward)
        self._observer = LayerObserver(pl_module, [self.layer], self._reader, self.classifier)
        if len(self._observer.names) != 1:
            raise ValueError(f"expected one layer, but {self.layer!r} fits {', '.join(self._observer.names)}")

    def _measures(self, trainer: Trainer) -> bool:
        """Whether the current validation is part of a fit and not the sanity check."""
        return self._observer is not None and not trainer.sanity_checking

    def _name(self, number: str, index: int = 0, loaders: int = 1) -> str:
        """The log name of a number of the ``index``-th loader."""
        name = f"probe/{number}" if self.layer == PENULTIMATE else f"probe/{number}/{self.layer}"
        return f"{name}/dataloader_idx_{index}" if loaders > 1 else name

    def _log_found(self, pl_module: LightningModule) -> None:
        """Log the results of passes, and free the bank and the classifiers."""
        log_epoch(pl_module, self._found)
        self._scores, self._counts, self._found, self._bank_due = {}, {}, {}, False

    def _make_passes(self, trainer: Trainer, module: LightningModule, last: bool) -> None:
        """Make the bank if it is due, and the pass over the second data set in an epoch's last validation or later."""
        if self._bank_due:
            self._make_bank(trainer, module)
        if last:
            if self.downstream is not None:
                self._transfer(trainer, module)
            self._schedule.done(trainer)
        self._seen_by.restart()

    def _make_bank(self, trainer: Trainer, module: LightningModule) -> None:
        """Compute the features of training images, and fit the classifiers on them."""
        data = self._training_set.batches(trainer, max_samples=self.max_samples, shared=False)
        with evaluation(trainer, module):
            batches = ready_batches(trainer, data)
            part = read(self._seen_by, self._reader, batches, self.max_samples, self.ignore_index)
        bank = whole_pass(part, self._training_set.loader, trainer.world_size, self.max_samples)
        check_labels(bank.labels, self._classes)
        self._bank_due = False
        if self.kind == "ridge":
            ridge = fit_ridge(*bank, self._classes)
            self._scores["acc"], self._found[self._name("held_out_acc")] = ridge, ridge.held_out_acc
        if self.knn:
            self._scores["knn"] = Neighbours(*bank, self._classes, self.knn)

    def _transfer(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure the accuracies of the features on the second data set."""
        how = self._reader, self.max_samples, self.ignore_index
        with evaluation(trainer, module):
            bank, tested = read_second(self._seen_by, trainer, self.downstream, *how)
        self._found |= transferred(bank, tested, _FITS[self.kind], self.knn, self._name)


def _check(kind: str, optimizer: Any, **least: tuple[int, int]) -> None:
    """Refuse arguments out of their range; each number comes with its least value."""
    for name, (value, lowest) in least.items():
        if value < lowest:
            raise ValueError(f"expected {name} of at least {lowest}, got {value}")
    if kind not in _FITS:
        raise ValueError(f"expected kind {' or '.join(map(repr, _FITS))}, got {kind!r}")
    if kind == "ridge" and optimizer is not None:
        raise ValueError(
            f"{_NAME}(kind='ridge') is fitted in closed form, so that an optimizer has no effect; leave it out, or "
            "take kind='linear'"
        )


def _unread(kind: Kind, knn: int) -> TrainingSet:
    """The training set, before its loader is requested."""
    off = ["kind='linear'"] * (kind == "ridge") + ["knn=0"] * (knn > 0)
    return TrainingSet(_NAME, "max_samples", ", ".join(off))

"""NeuralCollapseTracker: how far each layer has collapsed, logged while a run trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pickle import UnpicklingError
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from ncfinetune.launches import warn_of_what_stays
from ncfinetune.layers import PENULTIMATE
from ncfinetune.loop_progress import epochs_trained
from ncfinetune.passes import TrainingSet, evaluated, evaluation, leaves_out, ready_batches

from . import adapters, figures, logs, pages, pictures, records
from .adapters import BatchReader
from .layer_metrics import METRICS, OF_CLASSIFIER, Result
from .meter import CollapseMeter
from .notices import Notices
from .observer import LayerObserver, Pooling
from .records import Records
from .schedule import PassSchedule, is_new

_NAME = "NeuralCollapseTracker"
_DEFAULT_METRICS = tuple(name for name in METRICS if name != "numerical_rank")


class NeuralCollapseTracker(Callback):
    """Logs the neural collapse of named layers of any LightningModule, as ``<metric>/<train|val|test>/<layer>``.

    Two data sets are measured. Validation and test batches are measured during their steps, without a further forward
    pass; in each step the last call of a layer counts, whatever other callbacks run. The training set is measured in a
    separate pass, in eval mode, with fixed weights and without augmentation, once before the first epoch and then after
    every ``train_every_n_epochs``; it costs as much as a validation over the training set.

    Among several processes, samples that Lightning's sampler repeats so that all get equally many count once, except in
    a `CombinedLoader` of a mode other than ``sequential``: of which of its loaders the labels are, is not known there.

    The pass is made in the epoch's validation, before its first batch, so that both measure the same weights. If
    the weights are swapped for validation (weight averaging, schedule-free optimisers), the pass measures the same
    averages as validation, and epochs without a validation have no pass; in a run without validation it measures the
    training weights. Between passes ``trainer.callback_metrics`` keeps the last value, so that it can be monitored.

    A run ends with the same weights, bit for bit, as without the tracker, unless a data set has its own random
    generator, or the network changes anything but its tensors when it runs in eval mode.

    ``nc1`` is the within-class variability trace(Sigma_W Sigma_B^+)/K of Papyan, Han and Donoho (2020); 0 is full
    collapse. ``nc3`` and ``nc4`` compare the classifier with the class means of its input; ``nc4/val`` compares the
    decisions on the validation set with the nearest class mean of the training set, and is logged when both sets were
    measured with the same weights. `ncfinetune.collapse` defines the other metrics.

    TensorBoard, Weights & Biases and MLflow also receive figures, after the 1st, 2nd, 3rd, 5th, 9th, 17th, ... and last
    pass over the training set. TensorBoard's page CUSTOM SCALARS has a chart for each metric with all layers, and its
    page HPARAMS accuracy and collapse of each run, if the logger has ``default_hp_metric=False``. In a notebook, `plot`
    and `to_frame` show all numbers.

    ``Trainer.test``, and ``validate``, print and return ``nc1`` of the last layer only; loggers, ``callback_metrics``
    and ``values`` have all numbers.

        >>> from lightning import Trainer
        >>> tracker = NeuralCollapseTracker(num_classes=10, layers=["layer*.*", "penultimate"], metrics=["nc1", "cdnv"])
        >>> trainer = Trainer(max_epochs=30, callbacks=[tracker], logger=False, enable_checkpointing=False)
        >>> tracker in trainer.callbacks
        True

    Args:
        num_classes: Number of classes; None takes the ``num_classes`` of the datamodule, of the module or of its
            hyper-parameters, or the outputs of the layer named by ``classifier``.
        layers: Names or patterns of layers: the end of a module path (``layer3.1``), in which ``*`` matches any part
            between dots (``blocks.*``), or ``penultimate`` for the output of the submodule of that name or, if there is
            none, the input of the classifier. ``auto`` is ``penultimate``. Each layer costs the time of a matrix
            product of its batch's features and, for ``nc1``, a float64 matrix of its width squared.
        metrics: Names of metrics, or ``all``. Without ``nc1`` nothing of the width squared is computed. The default is
            all but ``numerical_rank``, which costs an eigendecomposition per class and batch.
        train_every_n_epochs: Epochs between passes over the training set, of which the last is after the last epoch; 0
            is never.
        max_train_batches: Largest number of batches of a pass over the training set, per process, evenly spread over
            it; None is all.
        classifier: The classifier's name; ``auto`` is the linear layer with ``num_classes`` outputs, and if there are
            several the one whose output the module returns. Inner layers of adapters do not count.
        batch_to_labels: Takes the integer labels ``(N,)`` from a batch; None reads ``(inputs, labels, ...)`` with one
            vector of integers or one-hot labels, and mappings with a key such as ``labels``. All views of a sample get
            its label; inputs ``(N, V, ...)`` are read sample by sample, a list of views view by view.
        forward: Runs a module on a batch of the training set, called ``forward(module, batch)``; None calls the module,
            or its only child if it has no forward, on the inputs.
        ignore_index: Samples with this label, such as -1 for unlabelled ones, are left out.
        pool: Maps a layer's output to features ``(N, d)``; None pools in the way the network pools its last features,
            found by running it once more, in eval mode, on the first two samples of the first batch.
        figures: Draw figures. A set of four takes about a second.
        prog_bar: Show ``nc1`` in the progress bar.

    Attributes:
        values: The last value of each logged number, in float64.
        records: ``{split: {epochs trained: {metric: {layer: value}}}}``; part of the checkpoint. The split of one of
            several loaders is ``val/dataloader_idx_1``, for example.

    Raises:
        ValueError: In the constructor: an argument out of range. Before the first step: no such layer, no classifier,
            an unknown number of classes, no labels in a batch, a layer that never runs.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        layers: str | list[str] = "auto",
        metrics: str | list[str] | None = None,
        train_every_n_epochs: int = 1,
        max_train_batches: int | None = None,
        classifier: str = "auto",
        batch_to_labels: Callable[[Any], Tensor] | None = None,
        forward: Callable[[LightningModule, Any], Any] | None = None,
        ignore_index: int | None = None,
        pool: Pooling | None = None,
        figures: bool = True,
        prog_bar: bool = False,
    ) -> None:
        _check(train_every_n_epochs, max_train_batches)
        self.num_classes = num_classes
        self.layers = [PENULTIMATE if name == "auto" else name for name in _listed(layers)]
        self.metrics = _chosen(metrics, self.layers)
        self.train_every_n_epochs = train_every_n_epochs
        self.max_train_batches = max_train_batches
        self.classifier = classifier
        self.batch_to_labels = batch_to_labels
        self.forward = forward
        self.ignore_index = ignore_index
        self.pool = pool
        self.figures = figures
        self.prog_bar = prog_bar
        self.values: dict[str, float] = {}
        self.records: Records = {}
        self._of_fit: set[tuple[str, int]] = set()  # splits and epochs that a fit has recorded
        self._schedule = PassSchedule(_NAME, train_every_n_epochs)
        self._notices = Notices(_NAME)
        self._training_set = _unread()
        self._attached: CollapseMeter | None = None
        self._train_result: Result | None = None
        self._beside: dict[str, float] = {}  # results of the training set in the current validation
        self._passes_done = 0
        self._measured_at = 0
        self._drawn_at: int | None = None
        self._class_names: list[str] | None = None
        self._described = False
        self._first_epoch: int | None = None
        self._loaded_epochs: int | None = None  # that the weights of a checkpoint were trained for
        self._unread = False  # whether the checkpoint of a validation or test, if any, has not told that number
        self._keeps_records = False

    def __repr__(self) -> str:
        """Layers, metrics and the last values."""
        asked = f"{_NAME}(layers={self.layers}, metrics={list(self.metrics)})"
        return f"{asked}: {records.in_words(self.records)}" if self.records else asked

    def _repr_png_(self) -> bytes | None:
        """The plot, which notebooks show for the tracker."""
        return records.plot(self.records)._repr_png_() if self.records else None

    @property
    def history(self) -> dict[str, dict[int, dict[str, float]]]:
        """The records of nc1: ``{split: {epochs trained: {layer: nc1}}}``."""
        return {
            split: {epoch: metrics["nc1"] for epoch, metrics in passes.items() if "nc1" in metrics}
            for split, passes in self.records.items()
        }

    def to_frame(self) -> Any:
        """All numbers as a pandas DataFrame with the columns ``epoch split layer metric value``.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        return records.to_frame(self.records)

    def plot(self, split: str | None = None, metrics: str | Sequence[str] | None = None) -> Figure:
        """A matplotlib figure with a panel for each metric: its value over epochs, a line for each layer.

        Args:
            split: ``train``, ``val`` or ``test``; None is the first that was measured.
            metrics: Names of metrics; None is all.

        Raises:
            ValueError: Nothing was measured, or not that split or metric.
        """
        return records.plot(self.records, split, metrics)

    @property
    def state_key(self) -> str:
        """A key that differs between several trackers of one run."""
        return self._generate_state_key(layers=self.layers, metrics=list(self.metrics), classifier=self.classifier)

    def state_dict(self) -> dict[str, Any]:
        """All results so far, so that a resumed run continues its curves and figures."""
        return {"values": self.values, "records": self.records, "passes": self._passes_done}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note for how many epochs the weights were trained; without a fit the trainer stays at its own epoch."""
        self._loaded_epochs, self._unread = epochs_trained(checkpoint), False
        self._keeps_records = trainer.state.fn != "fit" and bool(self.records)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the results so far; a test of an earlier checkpoint keeps those of the epochs after it."""
        if self._keeps_records:
            self._keeps_records = False
            return
        self.values, self.records = state_dict["values"], state_dict["records"]
        self._of_fit = {(split, epochs) for split, passes in self.records.items() for epochs in passes}
        self._passes_done = state_dict["passes"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hook the layers, unless the module makes them later."""
        self._unread = stage in ("validate", "test")
        if stage != "predict":  # which measures nothing
            adapters.hooks_early(pl_module, lambda: self._attach(trainer, pl_module))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks, and free data and features."""
        if self._attached is not None:
            self._attached.observer.remove()
        self._attached, self._train_result, self._training_set = None, None, _unread()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self.teardown(trainer, pl_module, "fit")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the layers if that was not done in `setup`."""
        warn_of_what_stays(trainer, f"{_NAME} has no values, records and plots afterwards, but its loggers have")
        self._attach(trainer, pl_module)
        self._described, self._first_epoch, self._loaded_epochs = False, None, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the training set before the first step; a resumed run has done so already."""
        if is_new(trainer):
            self.values, self.records, self._passes_done, self._drawn_at = {}, {}, 0, None
            self._of_fit.clear()
            if self.train_every_n_epochs:
                self._measure_training_set(trainer, pl_module)
        self._schedule.start(trainer)
        before = {name: value for name, value in self.values.items() if "/train/" in name}
        logs.log_before_training(trainer, before, pl_module.device)
        pages.lay_out(trainer, self.metrics)
        self._first_epoch = trainer.current_epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the HPARAMS page after the first epoch, when it is known what the run logs."""
        if self._first_epoch is not None and trainer.current_epoch > self._first_epoch:
            self._describe(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the training set if it is due and was not measured in the epoch's validation."""
        if self._schedule.after_epoch(trainer, pl_module):
            logs.log_epoch(pl_module, self._measure_training_set(trainer, pl_module), self.prog_bar)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last results."""
        self._draw(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the HPARAMS page, if the run had a single epoch or none."""
        self._describe(trainer)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a pass over the validation sets."""
        self._attach(trainer, pl_module)
        self._beside = {}
        self._meter.begin(evaluated(trainer))
        if self._schedule.open_validation(trainer):
            self._measure_for_validation(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure the training set if it is due, with the weights of the validation; then observe the step."""
        if self._schedule.in_validation(trainer, pl_module):
            self._measure_for_validation(trainer, pl_module)
        self._meter.observer.listen(batch, "validation_step")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch to the statistics."""
        self._meter.update(dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the results of the validation set, and of the training set if it was measured too."""
        if not trainer.sanity_checking:
            results = self._meter.finish("val", trainer.strategy)
            found = self._remember(trainer, "val", results, leaves_out(trainer.limit_val_batches))
            self._log_validation(trainer, pl_module, self._beside | found)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a pass over the test sets."""
        self._attach(trainer, pl_module)
        self._meter.begin(evaluated(trainer))

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Observe the step."""
        self._meter.observer.listen(batch, "test_step")

    on_test_batch_end = on_validation_batch_end

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the results of the test set."""
        results = self._meter.finish("test", trainer.strategy)
        found = self._remember(trainer, "test", results, leaves_out(trainer.limit_test_batches))
        logs.log_evaluation(trainer, pl_module, found, self._last_layer)

    @property
    def _last_layer(self) -> str:
        return self._meter.observer.names[-1]

    @property
    def _meter(self) -> CollapseMeter:
        assert self._attached is not None
        return self._attached

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._attached is not None:
            if self._attached.observer.is_within(pl_module):
                return
            self._attached.observer.remove()  # the module has made its layers anew
        num_classes = self.num_classes or adapters.known_num_classes(trainer, pl_module, _NAME, self.classifier)
        reader = BatchReader(_NAME, num_classes, self.batch_to_labels, self.forward)
        needs_classifier = not set(OF_CLASSIFIER).isdisjoint(self.metrics)
        observer = LayerObserver(pl_module, self.layers, reader, self.classifier, needs_classifier, self.pool)
        self._refuse_rivals(trainer, observer.names)
        self._class_names = adapters.class_names(trainer, pl_module, num_classes)
        self._attached = CollapseMeter(observer, num_classes, self.metrics, self.ignore_index, trainer.world_size > 1)

    def _refuse_rivals(self, trainer: Any, layers: Sequence[str]) -> None:
        """Refuse another tracker of the same numbers, which Lightning would log as the mean of both."""
        for other in trainer.callbacks:
            if other is not self and isinstance(other, NeuralCollapseTracker) and other._attached is not None:
                shared = set(self.metrics) & set(other.metrics)
                of_any_layer = shared - set(OF_CLASSIFIER)
                theirs = other._attached.observer.names
                both = [layer for layer in layers if layer in theirs and (of_any_layer or layer == PENULTIMATE)]
                if shared and both:
                    raise ValueError(
                        f"expected trackers with different layers or metrics, got two that measure {both[0]!r}, whose "
                        "numbers have the same names; measure it in one of them"
                    )

    def _log_validation(self, trainer: Trainer, pl_module: LightningModule, values: dict[str, float]) -> None:
        if trainer.state.fn == "fit":
            logs.log_epoch(pl_module, values, self.prog_bar)
        else:
            logs.log_evaluation(trainer, pl_module, values, self._last_layer)

    def _describe(self, trainer: Trainer) -> None:
        if self._described:
            return
        own = [name for name in self.values if logs.of_layer(name) == self._last_layer]
        others = [name for name in trainer.callback_metrics if name not in self.values]
        pages.describe(trainer, pages.metric_columns(own, others))
        self._described = True

    def _remember(self, trainer: Trainer, split: str, results: Sequence[Result], limited: bool) -> dict[str, float]:
        """The results of a pass on each of its data sets, by log name; also kept in ``values`` and ``records``."""
        found: dict[str, float] = {}
        self._notices.layers(self._meter.observer.describe())
        for index, result in enumerate(results):
            suffix = f"/dataloader_idx_{index}" if len(results) > 1 else ""
            if limited and not getattr(trainer, "fast_dev_run", False):
                self._notices.classes(result, f"{split}{suffix}", self._meter.num_classes)
            self._notices.rounding(result, f"{split}{suffix}")
            key = f"{split}{suffix}", self._epochs(trainer)
            if trainer.state.fn == "fit":
                self._of_fit.add(key)
            # A later validation, perhaps of other images, leaves what a fit has recorded as it is.
            if result.values and (trainer.state.fn == "fit" or key not in self._of_fit):
                self.records.setdefault(key[0], {})[key[1]] = result.values
            found |= result.by_log_name(split, suffix)
        self.values |= found
        return found

    def _epochs(self, trainer: Trainer) -> int:
        """The epochs that the weights were trained for, with the current one."""
        if self._unread and (path := getattr(trainer, "ckpt_path", None)):
            self._unread = False  # of weights alone, of which callbacks are told nothing
            with suppress(UnpicklingError):  # of options that are no plain values
                content = trainer.strategy.checkpoint_io.load_checkpoint(path, weights_only=True)
                self._loaded_epochs = epochs_trained(content)
        if self._loaded_epochs is not None:
            return self._loaded_epochs
        return trainer.current_epoch + (trainer.state.fn == "fit" and trainer.global_step > 0)

    def _measure_for_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the training set within a validation, whose `nc4` uses the class means of the training set."""
        self._beside = self._measure_training_set(trainer, pl_module)
        assert self._train_result is not None
        self._meter.begin(evaluated(trainer), self._train_result.moments.get(PENULTIMATE))

    def _measure_training_set(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        batches = self._training_set.batches(trainer, max_batches=self.max_train_batches)
        self._meter.begin([self._training_set.loader], sample=self.figures and bool(pictures.accepting(trainer)))
        with evaluation(trainer, pl_module):
            self._meter.run(ready_batches(trainer, batches))
        (self._train_result,) = self._meter.finish("train", trainer.strategy)
        self._measured_at = trainer.global_step
        values = self._remember(trainer, "train", [self._train_result], self._training_set.limited)
        self._schedule.done(trainer)
        earlier, self._passes_done = self._passes_done, self._passes_done + 1
        if earlier.bit_count() <= 1:  # 0, 1, 2, 4, 8, ...
            self._draw(trainer)
        return values

    def _draw(self, trainer: Trainer) -> None:
        """Draw the last pass over the training set, at the step at which it was made, once."""
        result, step = self._train_result, self._measured_at
        if self.figures and result is not None and self._drawn_at != step and pictures.accepting(trainer):
            drawn = figures.of_pass(self.history.get("train", {}), result.moments, result.sample, self._class_names)
            pictures.log_figures(trainer, {f"neural_collapse/{name}": figure for name, figure in drawn.items()}, step)
            self._drawn_at = step


def _check(train_every_n_epochs: int, max_train_batches: int | None) -> None:
    """Refuse numbers out of their range."""
    if train_every_n_epochs < 0:
        raise ValueError(f"expected train_every_n_epochs of at least 0, got {train_every_n_epochs}")
    if max_train_batches is not None and max_train_batches < 1:
        raise ValueError(f"expected max_train_batches of at least 1, or None for all, got {max_train_batches}")


def _chosen(metrics: str | Sequence[str] | None, layers: Sequence[str]) -> tuple[str, ...]:
    """The names of the metrics, each of which must be defined for some layer."""
    names = _listed(_DEFAULT_METRICS if metrics is None else METRICS if metrics == "all" else metrics)
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise ValueError(f"expected metrics among {', '.join(METRICS)}, or 'all', got {', '.join(unknown) or 'none'}")
    if set(names) <= set(OF_CLASSIFIER) and PENULTIMATE not in layers:
        raise ValueError(f"metrics {', '.join(names)} need the layer 'penultimate', which is not among layers")
    return tuple(names)


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _unread() -> TrainingSet:
    """The training set, before its loader is requested."""
    return TrainingSet(_NAME, "max_train_batches", "train_every_n_epochs=0")

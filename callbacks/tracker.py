"""NeuralCollapseTracker: how far each layer has collapsed, logged while a run trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor

from ncfinetune.layers import PENULTIMATE
from ncfinetune.moments import ClassMoments
from ncfinetune.passes import TrainingSet, evaluation, flat, ready_batches

from . import adapters, figures
from .adapters import BatchReader
from .layer_metrics import METRICS, LayerMetrics, Result, Weight
from .observer import LayerObserver, Pooling
from .schedule import PassSchedule

_NAME = "NeuralCollapseTracker"
_DEFAULT_METRICS = ("nc1", "nc1_ratio", "cdnv", "nc2_equinorm", "nc2_equiangularity", "nc2_etf", "nc3", "nc4")


class NeuralCollapseTracker(Callback):
    """Logs the neural collapse of named layers of any LightningModule, as ``<metric>/<train|val|test>/<layer>``.

    Two data sets are measured. Validation and test batches are caught as they pass, at no extra forward pass: of each
    step the last run of a layer counts, whatever other callbacks run. The training set gets a pass of its own, in eval
    mode, with fixed weights and without augmentation, once before the first epoch and then after every
    ``train_every_n_epochs``; it costs what a validation over the training set costs.

    The pass is made in the epoch's validation, before its first batch, so that both measure the same weights. Where
    these are swapped for validation (weight averaging, schedule-free optimisers), it measures the averages that
    validation does, and epochs without a validation have no pass; in a run without validation it measures the weights
    that train. In between, ``trainer.callback_metrics`` keeps the last value for whoever monitors it.

    A run ends in the same weights, bit for bit, as without the tracker, unless a data set draws from a random generator
    of its own.

    ``nc1`` is the within-class variability trace(Sigma_W Sigma_B^+)/K of Papyan, Han and Donoho (2020); 0 is full
    collapse. ``nc3`` and ``nc4`` compare the classifier with the class means in front of it, ``nc4/val`` the decisions
    on the validation set with the nearest mean of the training set: it is logged when both were measured with the same
    weights. The functions of `ncfinetune.collapse` say what the others are.

    TensorBoard also gets pictures, after passes over the training set that grow rarer (1st, 2nd, 3rd, 5th, 9th, 17th,
    ..., last), and at the end of ``fit`` the last values as metrics of its HPARAMS page, which shows them only if the
    logger has ``default_hp_metric=False``.

        >>> from lightning import Trainer
        >>> tracker = NeuralCollapseTracker(num_classes=10, layers=["layer*.*", "penultimate"], metrics=["nc1", "cdnv"])
        >>> trainer = Trainer(max_epochs=30, callbacks=[tracker], logger=False, enable_checkpointing=False)
        >>> tracker in trainer.callbacks
        True

    Args:
        num_classes: Number of classes; None asks the datamodule, then the module and its hyper-parameters, for
            ``num_classes``, and then the classifier if it is named.
        layers: Names or patterns of layers: the end of a module path (``layer3.1``), in which ``*`` stands for any part
            between dots (``blocks.*``), or ``penultimate`` for the output of the submodule that the module calls so
            or, where it has none, the input of the classifier. ``auto`` is ``penultimate``. Each layer costs the time
            of a matrix product of its batch's features and, for ``nc1``, a matrix of its width squared in float64.
        metrics: Which of the family, or ``all``. Without ``nc1`` nothing of the width squared is computed.
            ``numerical_rank`` is the one that is not on unless asked for: it costs an eigendecomposition a class and
            batch.
        train_every_n_epochs: Epochs between passes over the training set; 0 is never.
        max_train_batches: Batches that a pass over the training set takes at most, on each process, evenly spread over
            it; None is all.
        classifier: The classifier's name; ``auto`` is the linear layer with ``num_classes`` outputs, and of several the
            one whose output the module returns. Adapters' inner layers are none.
        batch_to_labels: Takes the integer labels ``(N,)`` from a batch; None knows ``(inputs, labels, ...)`` with one
            vector of whole numbers or one-hot labels, and mappings with a key such as ``labels``. Features of several
            views of a sample get its label: those of inputs ``(N, V, ...)`` sample by sample, those of a list of inputs
            view by view.
        forward: Runs a module on a batch of the training set, called ``forward(module, batch)``; None calls the module,
            or its only child if it has no forward, on the inputs.
        ignore_index: Samples with this label, such as -1 for none, are left out.
        pool: Makes features ``(N, d)`` of a layer's output; None pools as the network pools its last features, which it
            tells by running once more, in eval mode, on the first two samples of the first batch.
        figures: Draw pictures. A set of four takes about a second.
        prog_bar: Show ``nc1`` in the progress bar.

    Attributes:
        values: The last value of everything logged, in float64.
        history: ``{split: {epochs trained: {layer: nc1}}}``; part of the checkpoint.

    Raises:
        ValueError: In the constructor: an argument out of range. Before the first step: no such layer, no classifier,
            nobody knows the number of classes, no labels in a batch, a layer that never runs.
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
        if train_every_n_epochs < 0:
            raise ValueError(f"expected train_every_n_epochs of at least 0, got {train_every_n_epochs}")
        if max_train_batches is not None and max_train_batches < 1:
            raise ValueError(f"expected max_train_batches of at least 1, or None for all, got {max_train_batches}")
        self.num_classes = num_classes
        named = [layers] if isinstance(layers, str) else layers
        self.layers = [PENULTIMATE if name == "auto" else name for name in named]
        self.metrics = _chosen(metrics)
        if set(self.metrics) <= {"nc3", "nc4"} and PENULTIMATE not in self.layers:
            raise ValueError(f"metrics {', '.join(self.metrics)} are of the layer 'penultimate', which layers lacks")
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
        self.history: dict[str, dict[int, dict[str, float]]] = {}
        self._schedule = PassSchedule(_NAME, train_every_n_epochs)
        self._observer: LayerObserver | None = None
        self._training_set: TrainingSet | None = None
        self._known_classes = 0
        self._loaders: list[Any] = []
        self._passes: dict[int, LayerMetrics] = {}
        self._means: ClassMoments | None = None
        self._weight: Weight | None = None
        self._train_result: Result | None = None
        self._beside: dict[str, float] = {}
        self._passes_done = 0
        self._drawn_at: int | None = None
        self._described = False
        self._told: set[str] = set()

    @property
    def state_key(self) -> str:
        """Tells several trackers of one run apart."""
        return self._generate_state_key(layers=self.layers, metrics=list(self.metrics), classifier=self.classifier)

    def state_dict(self) -> dict[str, Any]:
        """What has been measured, so that a resumed run continues its curves and pictures."""
        return {"values": self.values, "history": self.history, "passes": self._passes_done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what has been measured."""
        self.values, self.history = state_dict["values"], state_dict["history"]
        self._passes_done = state_dict["passes"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hook the layers, unless the module makes them later, in ``configure_model``."""
        if not adapters.defines(pl_module, "configure_model"):
            self._attach(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unhook the layers, and let go of data and features."""
        if self._observer is not None:
            self._observer.remove()
        self._observer = self._train_result = self._training_set = None
        self._passes, self._loaders, self._means, self._weight = {}, [], None, None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Unhook the layers."""
        self.teardown(trainer, pl_module, "fit")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the layers if they are not yet."""
        self._attach(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the training set before the first step; a resumed run has done so already."""
        if trainer.global_step == 0:
            self.values, self.history, self._passes_done, self._drawn_at = {}, {}, 0, None
            if self.train_every_n_epochs:
                self._measure_training_set(trainer, pl_module)
        self._schedule.start(trainer)
        before = {name: value for name, value in self.values.items() if "/train/" in name}
        for name, value in before.items():  # for whoever monitors them, until there are new ones
            trainer.callback_metrics[name] = torch.tensor(value, device=pl_module.device)
        if trainer.global_step == 0:
            for logger in trainer.loggers:
                logger.log_metrics(before, step=0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the training set if that is due and was not done in the epoch's validation."""
        if self._schedule.after_epoch(trainer, pl_module):
            self._log(pl_module, self._measure_training_set(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what was measured last."""
        self._draw(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the last values beside the hyper-parameters."""
        layer = self._observer.names[-1] if self._observer is not None else ""
        own = {name: v for name, v in self.values.items() if name.split("/", 2)[2].split("/dataloader_idx")[0] == layer}
        others = {name: float(value) for name, value in trainer.callback_metrics.items() if name not in self.values}
        first = {name: value for name, value in own.items() if name.startswith("nc1/")}
        metrics = first | others | own  # the page shows the first few unless told otherwise
        for logger in _boards(trainer):
            logger.log_hyperparams(dict(logger.hparams), metrics, step=trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the layers if they are not yet."""
        self._attach(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the layers if they are not yet."""
        self._attach(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a pass over the validation sets."""
        self._beside = {}
        self._restart(flat(trainer.val_dataloaders))
        if self._schedule.open_validation(trainer):
            self._measure_for_validation(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure the training set if that is due, with the weights of the validation; then listen."""
        if self._schedule.in_validation(trainer, pl_module):
            self._measure_for_validation(trainer, pl_module)
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
        """Add the batch to the statistics."""
        self._update(batch, trainer, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the validation set, and the training set if it was measured beside it."""
        if not trainer.sanity_checking:
            self._log(pl_module, self._beside | self._finish(trainer, "val"))

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a pass over the test sets."""
        self._restart(flat(trainer.test_dataloaders))

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Listen to the step."""
        self._seen_by.listen("test_step")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch to the statistics."""
        self._update(batch, trainer, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the test set."""
        self._log(pl_module, self._finish(trainer, "test"))

    @property
    def _seen_by(self) -> LayerObserver:
        assert self._observer is not None
        return self._observer

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._observer is not None:
            return
        if self.num_classes or self.classifier == "auto":
            self._known_classes = self.num_classes or adapters.known_num_classes(trainer, pl_module, _NAME)
        else:
            (named,) = adapters.classifiers(pl_module, None, self.classifier).values()
            self._known_classes = adapters.width(named) or 0
        reader = BatchReader(_NAME, self._known_classes, self.batch_to_labels, self.forward)
        judged = bool({"nc3", "nc4"} & set(self.metrics))
        self._observer = LayerObserver(pl_module, self.layers, reader, self.classifier, judged, self.pool)
        self._training_set = TrainingSet(_NAME, "max_train_batches", "train_every_n_epochs=0")

    def _restart(self, loaders: Any, means: ClassMoments | None = None) -> None:
        """Begin a pass over data sets."""
        self._seen_by.restart()
        self._loaders, self._means, self._weight = loaders, means, None
        self._passes = {}

    def _update(self, batch: Any, trainer: Trainer, index: int = 0) -> None:
        features, labels = self._seen_by.take(batch, self._loaders[index], index)
        self._weight = self._weight or self._seen_by.weight()
        self._metrics_of(trainer, index).update(features, labels, self._weight)

    def _metrics_of(self, trainer: Trainer, index: int, sample: bool = False) -> LayerMetrics:
        if index not in self._passes:
            self._passes[index] = LayerMetrics(
                self._seen_by.names,
                self._known_classes,
                self.metrics,
                ignore_index=self.ignore_index,
                means=self._means,
                sample=sample,
                shared=trainer.world_size > 1,
            )
        return self._passes[index]

    def _finish(self, trainer: Trainer, split: str) -> dict[str, float]:
        """What was found on each of the split's data sets, by log name."""
        limited = getattr(trainer, f"limit_{split}_batches") != 1.0
        suffixes = [f"/dataloader_idx_{index}" if len(self._loaders) > 1 else "" for index in range(len(self._loaders))]
        found: dict[str, float] = {}
        for index, suffix in enumerate(suffixes):
            found |= self._compute(trainer, split, index, suffix, limited)
        self._seen_by.close()
        return found

    def _compute(
        self, trainer: Trainer, split: str, index: int = 0, suffix: str = "", limited: bool = False
    ) -> dict[str, float]:
        """What a pass found, by log name; remembered in ``values`` and ``history``."""
        judged = self._seen_by.classifier is not None
        result = self._metrics_of(trainer, index).compute(split, trainer.strategy, self._weight, judged)
        if not self._described:
            rank_zero_info(f"{_NAME} measures {self._seen_by.describe()}")
            self._described = True
        if limited and not getattr(trainer, "fast_dev_run", False):
            self._tell_of_classes(result, f"{split}{suffix}")
        self._tell_of_rounding(result, f"{split}{suffix}")
        if split == "train":
            self._train_result = result
        if "nc1" in result.values and not suffix:
            epochs = trainer.current_epoch + (trainer.state.fn == "fit" and trainer.global_step > 0)
            self.history.setdefault(split, {})[epochs] = result.values["nc1"]
        found = {
            f"{metric}/{split}/{layer}{suffix}": value
            for metric, layers in result.values.items()
            for layer, value in layers.items()
        }
        self.values |= found
        return found

    def _tell_of_rounding(self, result: Result, split: str) -> None:
        """Say once a layer that its nc1 is not exact to 1e-6."""
        for layer, text in result.rounding.items():
            if f"rounding of {layer}" not in self._told:
                self._told.add(f"rounding of {layer}")
                rank_zero_info(f"{_NAME}: {text}; of layer {layer!r}, here on the {split} set, this is said once")

    def _tell_of_classes(self, result: Result, split: str) -> None:
        """Say once that a limited pass has not seen all classes."""
        seen = max((int(moments.present.sum()) for moments in result.moments.values()), default=0)
        if seen < self._known_classes and split not in self._told:
            self._told.add(split)
            rank_zero_warn(
                f"{_NAME} saw {seen} of {self._known_classes} classes in a pass over the {split} set, which a limit "
                "on batches cuts short: its numbers are of those alone; raise the limit, or shuffle the set"
            )

    def _log(self, pl_module: LightningModule, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            shown = self.prog_bar and name.startswith("nc1/")
            pl_module.log(
                name, value, prog_bar=shown, on_step=False, on_epoch=True, sync_dist=True, add_dataloader_idx=False
            )

    def _measure_for_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the training set beside a validation, whose `nc4` compares with its class means."""
        loaders = self._loaders
        self._beside = self._measure_training_set(trainer, pl_module)
        assert self._train_result is not None
        self._restart(loaders, self._train_result.moments.get(PENULTIMATE))

    def _measure_training_set(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        assert self._training_set is not None
        data = self._training_set.batches(trainer, max_batches=self.max_train_batches)
        self._restart([self._training_set.loader])
        self._metrics_of(trainer, 0, sample=self.figures and bool(_boards(trainer)))
        with evaluation(trainer, pl_module):
            for batch in ready_batches(trainer, data):
                self._seen_by.run(batch)
                self._update(batch, trainer)
        values = self._compute(trainer, "train", limited=self._training_set.limited)
        self._seen_by.close()
        self._schedule.done(trainer)
        self._passes_done += 1
        if (self._passes_done - 1) & (self._passes_done - 2) == 0:  # ever rarer: after 0, 1, 2, 4, 8, ... others
            self._draw(trainer)
        return values

    def _draw(self, trainer: Trainer) -> None:
        """Draw the last pass over the training set into the loggers that take pictures."""
        boards = _boards(trainer)
        if not self.figures or self._train_result is None or not boards or self._drawn_at == trainer.global_step:
            return
        self._drawn_at = trainer.global_step
        for name, figure in self._pictures(self._train_result).items():
            for logger in boards:
                logger.experiment.add_figure(f"neural_collapse/{name}", figure, global_step=trainer.global_step)

    def _pictures(self, result: Result) -> dict[str, Figure]:
        pictures = {}
        if len(next(iter(self.history.get("train", {}).values()), {})) > 1:
            pictures["depth"] = figures.depth(self.history["train"], "nc1")
        layer, moments = next(reversed(result.moments.items()), ("", None))
        if moments is not None:
            pictures[f"cosines_{layer}"] = figures.cosines(moments)
            pictures[f"spread_{layer}"] = figures.spread(moments)
            if result.sample is not None:
                pictures[f"projection_{layer}"] = figures.projection(moments, *result.sample)
        return pictures


def _chosen(metrics: str | Sequence[str] | None) -> tuple[str, ...]:
    names = _DEFAULT_METRICS if metrics is None else METRICS if metrics == "all" else metrics
    names = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise ValueError(f"expected metrics among {', '.join(METRICS)}, or 'all', got {', '.join(unknown) or 'none'}")
    return names


def _boards(trainer: Trainer) -> list[Any]:
    """The loggers that take pictures and hyper-parameters, TensorBoard's way; none but on the first process."""
    loggers: list[Any] = trainer.loggers if trainer.is_global_zero else []
    return [
        logger
        for logger in loggers
        if isinstance(getattr(logger, "hparams", None), Mapping) and hasattr(logger.experiment, "add_figure")
    ]

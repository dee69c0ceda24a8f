"""NeuralCollapseTracker: how far each layer has collapsed, logged while a run trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from torch import Tensor, nn

from ncfinetune.collapse import ClassMoments
from ncfinetune.layers import PENULTIMATE
from ncfinetune.plain import evaluation, ready_batches

from . import batches, figures
from .features import FeatureTap, Pooling, find_classifier, penultimate_of
from .statistics import METRICS, LayerStatistics, Result

_DEFAULT_METRICS = ("nc1", "nc1_ratio", "cdnv", "nc2_equinorm", "nc2_equiangularity", "nc2_etf", "nc3", "nc4")


class NeuralCollapseTracker(Callback):
    """Logs the neural collapse of named layers of any LightningModule, as ``<metric>/<train|val|test>/<layer>``.

    Two data sets are measured. Validation and test batches are caught as they pass, at no extra forward pass. The
    training set gets a pass of its own, in eval mode, with fixed weights and without augmentation, once before the
    first epoch and then after every ``train_every_n_epochs``; it costs what a validation over the training set costs.
    A run ends in the same weights, bit for bit, as without the tracker, unless a data set draws from a random generator
    of its own.

    ``nc1`` is the within-class variability trace(Sigma_W Sigma_B^+)/K of Papyan, Han and Donoho (2020); 0 is full
    collapse. ``nc3`` and ``nc4`` compare the classifier with the class means in front of it, ``nc4/val`` the decisions
    on the validation set with the nearest mean of the training set: it is logged when both were measured with the same
    weights. The functions of `ncfinetune.collapse` say what the others are.

    TensorBoard also gets pictures, after passes over the training set that grow rarer (1st, 2nd, 3rd, 5th, 9th, 17th,
    ..., last), and at the end of ``fit`` the last values as metrics of its HPARAMS page, which shows them only if the
    logger has ``default_hp_metric=False``.

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
        max_train_batches: Batches that a pass over the training set takes at most, on each process; None is all.
        classifier: The classifier's name; ``auto`` is the last linear layer with ``num_classes`` outputs.
        batch_to_labels: Takes the integer labels ``(N,)`` from a batch; None knows ``(inputs, labels)`` and mappings
            with a key such as ``labels``. Features of several views of a sample get its label: those of inputs
            ``(N, V, ...)`` sample by sample, those of a list of inputs view by view.
        forward: Runs a module on a batch of the training set, called ``forward(module, batch)``; None calls the module,
            or its only child if it has no forward, on the inputs.
        pool: Makes features ``(N, d)`` of a layer's output; None pools as the network pools its last features.
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
        self.batch_to_labels = batch_to_labels or batches.labels_of
        self.forward = forward or batches.forward
        self.pool = pool
        self.figures = figures
        self.prog_bar = prog_bar
        self.values: dict[str, float] = {}
        self.history: dict[str, dict[int, dict[str, float]]] = {}
        self._tap: FeatureTap | None = None
        self._classifier: nn.Linear | None = None
        self._known_classes = 0
        self._loader: Any = None
        self._passes: dict[int, LayerStatistics] = {}
        self._train_result: Result | None = None
        self._measured_at: tuple[int, int] | None = None
        self._passes_done = 0
        self._drawn_at: int | None = None
        self._described = False

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
        if not batches.defines(pl_module, "configure_model"):
            self._attach(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unhook the layers, and let go of data and features."""
        if self._tap is not None:
            self._tap.remove()
        self._tap = self._classifier = self._loader = self._train_result = None
        self._passes = {}

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
        if self.train_every_n_epochs and trainer.global_step == 0:
            self._measure_training_set(trainer, pl_module)
            for logger in trainer.loggers:
                logger.log_metrics({k: v for k, v in self.values.items() if "/train/" in k}, step=0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the training set every ``train_every_n_epochs``, unless it was done before the epoch's validation."""
        if self._due(trainer):
            self._log(pl_module, self._measure_training_set(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what was measured last."""
        self._draw(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the last values beside the hyper-parameters."""
        layer = self._tap.names[-1] if self._tap is not None else ""
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
        """Measure the training set if the epoch is over, then start to listen; a sanity check finds mistakes only."""
        if not trainer.sanity_checking and self._due(trainer) and trainer.is_last_batch:
            self._log(pl_module, self._measure_training_set(trainer, pl_module))
        self._start()

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
        loader = batches.flat(trainer.val_dataloaders)[dataloader_idx]
        self._update(batch, loader, dataloader_idx, self._means(trainer))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the validation set."""
        if not trainer.sanity_checking:
            self._finish(trainer, pl_module, "val", len(batches.flat(trainer.val_dataloaders)))

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to listen."""
        self._start()

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
        self._update(batch, batches.flat(trainer.test_dataloaders)[dataloader_idx], dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the test set."""
        self._finish(trainer, pl_module, "test", len(batches.flat(trainer.test_dataloaders)))

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._tap is not None:
            return
        named = self.classifier != "auto"
        if self.num_classes or not named:
            self._known_classes = self.num_classes or batches.known_num_classes(trainer, pl_module, self)
        if named or PENULTIMATE in self.layers:
            self._classifier = self._judge(pl_module)
        if self._classifier is not None and not self._known_classes:
            self._known_classes = self._classifier.out_features
        self._tap = FeatureTap(pl_module, self.layers, self._classifier, self.pool)

    def _judge(self, pl_module: LightningModule) -> nn.Linear | None:
        """The classifier; None where there is none and the module says itself what its penultimate features are."""
        try:
            return find_classifier(pl_module, self._known_classes, self.classifier)
        except ValueError:
            if self.classifier == "auto" and penultimate_of(pl_module) is not None:
                return None
            raise

    def _start(self) -> None:
        assert self._tap is not None
        self._tap.open = True
        self._tap.take()
        self._passes = {}

    def _update(self, batch: Any, loader: Any = None, index: int = 0, means: ClassMoments | None = None) -> None:
        assert self._tap is not None
        if index not in self._passes:
            self._passes[index] = self._new_statistics(means)
        features, labels = self._tap.take(), self.batch_to_labels(batch)
        statistics = self._passes[index]
        new = batches.new_samples(loader, statistics.seen, len(labels))
        statistics.seen += len(labels)
        if len(labels):
            rows = self._rows(features, len(labels), batch).to(labels.device)
            if len(rows) != new:
                kept = rows < new
                features = {name: value[kept] for name, value in features.items()}
                labels = labels[rows[kept]]
        statistics.update(features, labels)

    def _rows(self, features: dict[str, Tensor], samples: int, batch: Any) -> Tensor:
        """Which sample each row of features is of, the same for every layer."""
        sizes = {len(value): name for name, value in features.items()}
        try:
            order = batches.sample_of_row(samples, next(iter(sizes), samples), batch)
            if len(sizes) > 1:
                raise ValueError(f"{' and '.join(map(str, sizes))} rows of features")
        except ValueError as error:
            raise ValueError(
                f"NeuralCollapseTracker found {error} in layer {' and '.join(map(repr, sizes.values()))}; it sees the "
                "last forward pass of a step, which must be that of all samples of the batch: name other layers, or "
                "give it NeuralCollapseTracker(pool=...) or (batch_to_labels=...)"
            ) from error
        return order

    def _new_statistics(self, means: ClassMoments | None) -> LayerStatistics:
        assert self._tap is not None
        return LayerStatistics(self._tap.names, self._known_classes, self.metrics, self._classifier, means)

    def _finish(self, trainer: Trainer, pl_module: LightningModule, split: str, loaders: int) -> None:
        assert self._tap is not None
        self._tap.open = False
        for index in range(loaders):
            if index not in self._passes:  # this process had no batch
                self._passes[index] = self._new_statistics(self._means(trainer))
            suffix = f"/dataloader_idx_{index}" if loaders > 1 else ""
            self._log(pl_module, self._compute(trainer, split, index, suffix))

    def _compute(self, trainer: Trainer, split: str, index: int = 0, suffix: str = "") -> dict[str, float]:
        """What a pass found, by log name; remembered in ``values`` and ``history``."""
        result = self._passes.pop(index).compute(split, trainer.strategy)
        if not self._described and self._tap is not None:
            rank_zero_info(f"NeuralCollapseTracker measures {self._tap.describe()}")
            self._described = True
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

    def _log(self, pl_module: LightningModule, values: dict[str, float]) -> None:
        for name, value in values.items():
            shown = self.prog_bar and name.startswith("nc1/")
            pl_module.log(
                name,
                torch.tensor(value),
                prog_bar=shown,
                on_step=False,
                on_epoch=True,
                sync_dist=True,
                add_dataloader_idx=False,
            )

    def _due(self, trainer: Trainer) -> bool:
        now = (trainer.current_epoch, trainer.global_step)
        every = self.train_every_n_epochs
        fitting = trainer.state.fn == "fit" and now != self._measured_at
        return bool(every) and fitting and (trainer.current_epoch + 1) % every == 0

    def _means(self, trainer: Trainer) -> ClassMoments | None:
        """The training set's moments in front of the classifier, if they are of the present weights."""
        if self._train_result is None or self._measured_at != (trainer.current_epoch, trainer.global_step):
            return None
        return self._train_result.moments.get(PENULTIMATE)

    def _measure_training_set(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        loader = self._training_loader(trainer)
        self._start()
        self._passes[0] = self._new_statistics(None)  # of a process without batches too
        length = batches.pass_length(trainer, loader, self.max_train_batches)
        with evaluation(trainer, pl_module):
            for batch in ready_batches(trainer, islice(loader, length)):
                self.forward(pl_module, batch)
                self._update(batch, loader)
        assert self._tap is not None
        self._tap.open = False
        values = self._compute(trainer, "train")
        self._measured_at = (trainer.current_epoch, trainer.global_step)
        self._passes_done += 1
        if (self._passes_done - 1) & (self._passes_done - 2) == 0:  # ever rarer: after 0, 1, 2, 4, 8, ... others
            self._draw(trainer)
        return values

    def _training_loader(self, trainer: Trainer) -> Any:
        if self._loader is None:
            self._loader, plain = batches.pass_loader(trainer)
            if not plain:
                rank_zero_info(
                    "NeuralCollapseTracker measures the training set as its data set gives it, augmentation included; "
                    "a datamodule's train_plain_dataloader() would be used instead"
                )
        return self._loader

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

"""NeuralCollapseTracker: how far each layer has collapsed, logged while a run trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader

from ncfinetune.layers import PENULTIMATE
from ncfinetune.metrics import NC1

from .features import FeatureTap


class NeuralCollapseTracker(Callback):
    """Logs the neural collapse of named layers of any LightningModule.

    Two data sets are measured. Validation and test batches are caught as they pass, at no extra forward pass. The
    training set gets a pass of its own, in eval mode, with fixed weights and without augmentation, once before the
    first epoch and then after every ``train_every_n_epochs``; it costs what a validation over the training set costs
    and leaves weights, modes and random numbers as they were.

    Logs ``nc1/<train|val|test>/<layer>``: the within-class variability trace(Sigma_W Sigma_B^+)/K of Papyan, Han and
    Donoho (2020), NC1; 0 is full collapse.

    Args:
        num_classes: Number of classes; None asks the datamodule, then the module, for their ``num_classes``.
        layers: Names or patterns of layers: the end of a module path (``layer3.1``), in which ``*`` stands for any part
            between dots (``blocks.*``), or ``penultimate`` for the input of the classifier. ``auto`` is
            ``penultimate``.
        train_every_n_epochs: Epochs between passes over the training set; 0 is never.
        max_train_batches: Batches a pass over the training set takes at most; None is all.

    Raises:
        ValueError: In ``setup``: no such layer, no classifier, or nobody knows the number of classes.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        layers: str | list[str] = "auto",
        train_every_n_epochs: int = 1,
        max_train_batches: int | None = None,
    ) -> None:
        if train_every_n_epochs < 0:
            raise ValueError(f"expected train_every_n_epochs of at least 0, got {train_every_n_epochs}")
        if max_train_batches is not None and max_train_batches < 1:
            raise ValueError(f"expected max_train_batches of at least 1, or None for all, got {max_train_batches}")
        self.num_classes = num_classes
        named = [layers] if isinstance(layers, str) else layers
        self.layers = [PENULTIMATE if name == "auto" else name for name in named]
        self.train_every_n_epochs = train_every_n_epochs
        self.max_train_batches = max_train_batches
        self._tap: FeatureTap | None = None
        self._metrics: dict[str, NC1] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hook the layers."""
        num_classes = self.num_classes or _known_num_classes(trainer, pl_module)
        self._tap = FeatureTap(pl_module, self.layers, num_classes)
        self._metrics = {name: NC1(num_classes) for name in self._tap.names}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unhook the layers."""
        if self._tap is not None:
            self._tap.remove()
            self._tap = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Unhook the layers."""
        self.teardown(trainer, pl_module, "fit")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the training set before the first step; a resumed run has done so already."""
        if self.train_every_n_epochs and trainer.global_step == 0:
            self._measure_training_set(trainer, pl_module)
            values = {f"nc1/train/{name}": value.item() for name, value in self._compute().items()}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the training set every ``train_every_n_epochs``."""
        if self.train_every_n_epochs and (trainer.current_epoch + 1) % self.train_every_n_epochs == 0:
            self._measure_training_set(trainer, pl_module)
            self._log(pl_module, "train")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to listen, unless Lightning only checks that validation runs."""
        self._start(listen=not trainer.sanity_checking)

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
        self._update(batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the validation set."""
        if not trainer.sanity_checking:
            self._log(pl_module, "val")

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
        self._update(batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the test set."""
        self._log(pl_module, "test")

    def _start(self, listen: bool = True) -> None:
        assert self._tap is not None
        self._tap.open = listen
        for metric in self._metrics.values():
            metric.reset()

    def _update(self, batch: Any) -> None:
        assert self._tap is not None
        if self._tap.open:
            labels = _labels(batch)
            for name, features in self._tap.take().items():
                self._metrics[name].to(features.device).update(features, labels)

    def _compute(self) -> dict[str, Tensor]:
        assert self._tap is not None
        self._tap.open = False
        return {name: metric.compute() for name, metric in self._metrics.items()}

    def _log(self, pl_module: LightningModule, split: str) -> None:
        for name, value in self._compute().items():
            pl_module.log(f"nc1/{split}/{name}", value)

    def _measure_training_set(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start()
        with _evaluation(trainer, pl_module):
            for batch in islice(_plain_loader(trainer), self.max_train_batches):
                on_device = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
                with trainer.precision_plugin.forward_context():
                    pl_module(on_device[0])
                self._update(on_device)


@contextmanager
def _evaluation(trainer: Trainer, module: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients; on exit modes, the trainer's stage and the random numbers are as they were."""
    stage = trainer.state.stage
    modes = {part: part.training for part in module.modules()}
    with isolate_rng(), torch.no_grad():
        try:
            trainer.validating = True
            module.eval()
            yield
        finally:
            trainer.state.stage = stage
            for part, mode in modes.items():
                part.training = mode


def _plain_loader(trainer: Trainer) -> Iterable[Any]:
    """The training set without augmentation and in a fixed order, as far as its owner offers that."""
    offered = getattr(getattr(trainer, "datamodule", None), "train_plain_dataloader", None)
    if offered is not None:
        return offered()
    loader: Any = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        return loader
    return DataLoader(loader.dataset, batch_size=loader.batch_size or 1, collate_fn=loader.collate_fn)


def _known_num_classes(trainer: Trainer, module: LightningModule) -> int:
    for owner in (getattr(trainer, "datamodule", None), module):
        if isinstance(known := getattr(owner, "num_classes", None), int):
            return known
    raise ValueError(
        "NeuralCollapseTracker needs the number of classes, and neither datamodule nor module has num_classes; "
        "give it NeuralCollapseTracker(num_classes=...)"
    )


def _labels(batch: Any) -> Tensor:
    if isinstance(batch, Sequence) and len(batch) >= 2 and isinstance(batch[1], Tensor):
        return batch[1]
    raise ValueError(f"NeuralCollapseTracker expected batches (images, labels), got {type(batch).__name__}")

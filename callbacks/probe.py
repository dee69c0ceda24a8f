"""OnlineProbe: how well the features of a run classify, while it trains and without a say in it.

Legend: ``N`` samples, ``M`` samples of a bank, ``V`` views, ``K`` classes, ``d`` feature width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sized
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from ncfinetune.layers import PENULTIMATE
from ncfinetune.plain import evaluation, on_device

from .batches import flat, known_num_classes, new_samples, pass_loader
from .features import FeatureTap, find_classifier, penultimate_of

# Queries compared with the bank at a time, which bounds the memory that kNN takes.
_QUERIES = 256
# Temperature of the votes in kNN, of Wu et al. (2018), section 3.4.
_TEMPERATURE = 0.07


class OnlineProbe(Callback):
    """Trains a linear classifier on the detached features of any LightningModule, beside it and with its own optimiser.

    Nothing of it enters the module, its loss or its optimiser; the run ends in the same weights with it and without.
    It learns from the training batches as they pass, one step each, on features that are first brought to mean 0 and
    variance 1, and is tested on the validation batches as they pass. Batches are ``(images, labels)``; images with
    views give a feature a view.

    Logs ``probe/loss`` of the training batches and ``probe/acc`` of the validation batches, and what is asked for of
    ``probe/knn``, ``probe/downstream_acc`` and ``probe/downstream_knn``. These take passes of their own, in eval mode:
    a bank of training images, as they are without augmentation, for kNN (Wu et al. 2018, arXiv 1805.01978, section
    3.4: cosine similarity, votes weighted by exp(s/0.07)); and for the second data set a linear classifier fitted to
    convergence on features of its training images, tested on its validation images.

    Args:
        num_classes: Number of classes ``K``; None asks the datamodule, then the module, for their ``num_classes``.
        layer: A layer's name, which then ends the log names (``probe/acc/layer3.1``), or ``penultimate``.
        optimizer: Makes the optimiser of the classifier; None is Adam with learning rate 1e-3.
        knn: Neighbours that vote in kNN, at most those that the bank has; 0 is no kNN.
        downstream: Datamodule of a second data set, whose accuracy shows how the features transfer.
        every_n_epochs: Epochs between the passes for kNN and the second data set.
        max_samples: Images of each part that a pass takes at most, evenly spread over it.

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
        self._tap: FeatureTap | None = None
        self._classes = 0
        self._probe: LinearProbe | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._stored: dict[str, Any] = {}
        self._bank: tuple[Tensor, Tensor] | None = None
        self._right: dict[str, Tensor] = {}
        self._seen: Counter[int] = Counter()

    @property
    def state_key(self) -> str:
        """A name of its own in checkpoints for the probe of each layer."""
        return self._generate_state_key(layer=self.layer)

    def state_dict(self) -> dict[str, Any]:
        """Weights of the classifier and state of its optimiser."""
        if self._probe is None or self._optimizer is None:
            return self._stored
        return {"probe": self._probe.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the first features tell how wide the classifier is."""
        self._stored = state_dict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hook the layer, and read the second data set."""
        if stage != "fit":
            return
        self._classes = self.num_classes or known_num_classes(trainer, pl_module, self)
        classifier = None
        if self.layer == PENULTIMATE and penultimate_of(pl_module) is None:
            classifier = find_classifier(pl_module, self._classes)
        self._tap = FeatureTap(pl_module, [self.layer], classifier)
        if len(self._tap.names) != 1:
            raise ValueError(f"expected one layer, but {self.layer!r} fits {', '.join(self._tap.names)}")
        if self.downstream is not None:
            if trainer.local_rank == 0:
                self.downstream.prepare_data()
            trainer.strategy.barrier()
            self.downstream.trainer = trainer
            self.downstream.setup("fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unhook the layer."""
        if self._tap is not None:
            self._tap.remove()
            self._tap = self._bank = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Unhook the layer."""
        self.teardown(trainer, pl_module, "fit")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start to listen."""
        self._listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a step on the batch; among several processes each takes the same one, on the batches of all."""
        features, labels = self._take(batch)
        if trainer.world_size > 1:
            features, labels = _gathered(features, trainer.world_size), _gathered(labels, trainer.world_size)
        if len(features) > 1:  # one feature has no variance
            loss = self._learn(features, labels)
            pl_module.log(
                self._name("loss"), loss, on_step=False, on_epoch=True, batch_size=len(labels), sync_dist=True
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the bank, and start to listen, unless Lightning only checks that validation runs."""
        if self._tap is None or trainer.sanity_checking:
            return
        self._right, self._seen = {}, Counter()
        if self.knn and self._is_due(trainer):
            with evaluation(trainer, pl_module):
                self._bank = self._features(trainer, pl_module, pass_loader(trainer)[0], partial(on_device, trainer))
        self._listen()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Go on listening."""
        if self._tap is not None and not trainer.sanity_checking:
            self._listen()

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
        if self._tap is None or trainer.sanity_checking:
            return
        features, labels = self._take(batch)
        samples = len(batch[1])
        new = new_samples(flat(trainer.val_dataloaders)[dataloader_idx], self._seen[dataloader_idx], samples)
        self._seen[dataloader_idx] += samples
        if new < samples:
            rows = new * (len(features) // samples)
            features, labels = features[:rows], labels[:rows]
        if self._probe is not None:
            self._count(self._name("acc"), self._probe.eval()(features).argmax(1), labels)
        if self._bank is not None:
            self._count(self._name("knn"), knn_predict(features, *self._bank, self._classes, self.knn), labels)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracies over all processes."""
        for name, counts in self._right.items():
            right, total = trainer.strategy.reduce(counts, reduce_op="sum")
            pl_module.log(name, right / total, sync_dist=True)
        self._right, self._bank = {}, None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the second data set."""
        if self.downstream is not None and self._is_due(trainer):
            for name, value in self._transfer(trainer, pl_module, self.downstream).items():
                pl_module.log(name, value, sync_dist=True)

    def _name(self, number: str) -> str:
        return f"probe/{number}" if self.layer == PENULTIMATE else f"probe/{number}/{self.layer}"

    def _is_due(self, trainer: Trainer) -> bool:
        return (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _listen(self) -> None:
        assert self._tap is not None
        self._tap.open = True

    def _take(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Features ``(N V, d)`` of the last forward pass and their labels."""
        assert self._tap is not None
        self._tap.open = False
        taken = self._tap.take()
        if not taken:
            raise ValueError(f"layer {self.layer!r} did not run in this batch; give OnlineProbe a layer that does")
        (features,) = taken.values()
        labels = batch[1]
        return features, labels.repeat_interleave(len(features) // len(labels), dim=0)

    def _learn(self, features: Tensor, labels: Tensor) -> Tensor:
        if self._probe is None:
            self._probe = LinearProbe(features.shape[1], self._classes).to(features)
            self._optimizer = self.optimizer(self._probe.parameters())
            if self._stored:
                self._probe.load_state_dict(self._stored["probe"])
                self._optimizer.load_state_dict(self._stored["optimizer"])
        assert self._optimizer is not None
        loss = F.cross_entropy(self._probe.train()(features), labels)
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()
        return loss.detach()

    def _count(self, name: str, predictions: Tensor, labels: Tensor) -> None:
        counts = torch.stack([(predictions == labels).sum(), torch.tensor(len(labels), device=labels.device)]).float()
        self._right[name] = self._right.get(name, 0) + counts

    def _transfer(self, trainer: Trainer, module: LightningModule, data: LightningDataModule) -> dict[str, float]:
        def prepare(batch: Any) -> Any:
            return data.on_after_batch_transfer(move_data_to_device(batch, module.device), 0)

        with evaluation(trainer, module):
            train = getattr(data, "train_plain_dataloader", data.train_dataloader)()
            bank = self._features(trainer, module, train, prepare)
            features, labels = self._features(trainer, module, data.val_dataloader(), prepare)
        classes = int(torch.cat([bank[1], labels]).max()) + 1
        values = {self._name("downstream_acc"): fit_probe(*bank, classes)(features).argmax(1)}
        if self.knn:
            values[self._name("downstream_knn")] = knn_predict(features, *bank, classes, self.knn)
        return {name: (predictions == labels).float().mean().item() for name, predictions in values.items()}

    def _features(
        self, trainer: Trainer, module: LightningModule, loader: Any, prepare: Callable[[Any], Any]
    ) -> tuple[Tensor, Tensor]:
        """Features and labels of at most ``max_samples`` images."""
        parts: list[tuple[Tensor, Tensor]] = []
        for batch in _spread(loader, self.max_samples):
            batch = prepare(batch)
            self._listen()
            module(batch[0])
            parts.append(self._take(batch))
            if sum(len(labels) for _, labels in parts) >= self.max_samples:
                break
        if not parts:
            raise ValueError("OnlineProbe found no batches to measure; the data need training and validation images")
        features, labels = (torch.cat(values)[: self.max_samples] for values in zip(*parts, strict=True))
        return features, labels


class LinearProbe(nn.Module):
    """A linear classifier of features brought to mean 0 and variance 1.

    It starts from zero, so that making one draws no random numbers.

    Args:
        dim: Width ``d`` of the features.
        num_classes: Number of classes ``K``.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.normalise = nn.BatchNorm1d(dim, affine=False)
        self.linear = nn.Linear(dim, num_classes, device="meta").to_empty(device="cpu")
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Class logits ``(N, K)`` of features ``(N, d)``."""
        return self.linear(self.normalise(features))


def knn_predict(queries: Tensor, bank: Tensor, labels: Tensor, num_classes: int, k: int) -> Tensor:
    """Classes that the ``k`` nearest of the bank vote for: Wu et al. (2018, arXiv 1805.01978), section 3.4.

    Args:
        queries: ``(N, d)``.
        bank: ``(M, d)``.
        labels: Labels of the bank, ``(M,)``.
        num_classes: Number of classes ``K``.
        k: Neighbours; all of the bank where it has fewer.

    Returns:
        Labels ``(N,)``.
    """
    bank = F.normalize(bank, dim=1)
    predictions = []
    for part in torch.split(F.normalize(queries, dim=1), _QUERIES):
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(part), num_classes, device=part.device, dtype=part.dtype)
        votes.scatter_add_(1, labels[nearest], ((similarity - 1) / _TEMPERATURE).exp())
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def fit_probe(features: Tensor, labels: Tensor, num_classes: int) -> LinearProbe:
    """Multinomial logistic regression on features of mean 0 and variance 1, to convergence.

    Minimises mean cross-entropy + |W|^2 / (2 N), which is scikit-learn's ``C=1``, by L-BFGS.

    Args:
        features: ``(N, d)``.
        labels: ``(N,)``.
        num_classes: Number of classes ``K``.
    """
    probe = LinearProbe(features.shape[1], num_classes).to(features).eval()
    probe.normalise.running_mean = features.mean(0)
    probe.normalise.running_var = features.var(0, correction=0)
    inputs, linear = probe.normalise(features), probe.linear
    optimizer: torch.optim.Optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=200, line_search_fn="strong_wolfe"
    )

    def closure() -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(inputs), labels) + linear.weight.square().sum() / (2 * len(labels))
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return probe.requires_grad_(False)


def _gathered(rows: Tensor, world_size: int) -> Tensor:
    parts = [torch.empty_like(rows) for _ in range(world_size)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def _spread(loader: Any, most: int) -> Iterable[Any]:
    """Batches of at most ``most`` samples, evenly spread over the data set in its own order; the first, of a stream."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    total = len(cast(Sized, loader.dataset))
    indices = torch.linspace(0, total - 1, min(most, total)).round().long().tolist()
    subset = Subset(loader.dataset, indices)
    return DataLoader(subset, loader.batch_size or 1, num_workers=loader.num_workers, collate_fn=loader.collate_fn)

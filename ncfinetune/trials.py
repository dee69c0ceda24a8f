"""Ways to fine-tune, tried on folds of the training images.

Legend: ``N`` images, ``K`` classes, ``F`` folds, ``d`` feature width.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from ncfinetune.backbone import Backbone
from ncfinetune.calibration import fit_temperature
from ncfinetune.finetune import FineTuner
from ncfinetune.probes import decided_rightly, squared_errors


@dataclass(frozen=True, eq=False)
class Method:
    """A way to fine-tune.

    Args:
        name: Its name, in the words of Li et al. 2022.
        knobs: Its arguments of a `FineTuner`.
    """

    name: str
    knobs: Mapping[str, Any]


@dataclass
class Trial:
    """What a method did on the folds that it was tried on.

    Args:
        right: Whether each image was decided rightly by the model that was fitted without its fold, ``(N,)`` in 0..1;
            nan in folds not tried.
        loss: Squared error of its probabilities, summed over classes (Brier 1950), ``(N,)``. Those of fits are at the
            temperature that suits the folds so far best: how sure a network is after so many epochs says nothing of
            what it knows, and would hide what tuning gains where many images are decided wrongly.
        seconds: Duration of each fit.
        trained: Number of trained parameters.
        logits: Of fits, ``(N, K)``.
    """

    right: Tensor
    loss: Tensor
    seconds: list[float] = field(default_factory=list)
    trained: int = 0
    logits: Tensor | None = None

    @classmethod
    def empty(cls, samples: int) -> Trial:
        """A trial of nothing yet."""
        return cls(torch.full((samples,), torch.nan), torch.full((samples,), torch.nan))

    @classmethod
    def left_out(cls, scores: Tensor, labels: Tensor) -> Trial:
        """What scores of images left out, ``(R, N, K)``, make of them, with the scores' own squared error."""
        scores = scores.cpu()
        return cls(decided_rightly(scores, labels).float(), squared_errors(scores, labels).float())

    def add(self, rows: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a fit's logits of the images that it was fitted without.

        Args:
            rows: Which images, ``(n,)``.
            logits: ``(n, K)``; those of an image that are not all finite tell nothing of it.
            labels: Of all images, ``(N,)``.
        """
        if self.logits is None:
            self.logits = torch.full((len(labels), logits.shape[1]), torch.nan, dtype=torch.float64)
        self.logits[rows] = logits.double().masked_fill(~logits.isfinite().all(1, keepdim=True), 0)
        self.right[rows] = decided_rightly(self.logits[None, rows], labels[rows]).float()
        tried = ~self.right.isnan()
        own, labels = self.logits[tried], labels[tried]
        probabilities = (own / fit_temperature(own, labels)).softmax(1)
        self.loss[tried] = squared_errors(probabilities[None], labels).float()

    def gain(self, other: Trial, name: str) -> tuple[float, float]:
        """Mean of another trial's number less this one's over the images that both had, and its standard error."""
        paired = getattr(other, name) - getattr(self, name)
        paired = paired[~paired.isnan()].double()
        return float(paired.mean()), float(paired.std(correction=0)) / math.sqrt(len(paired))


def chosen_elsewhere(trials: Sequence[Trial], reference: Trial, folds: Tensor, least: float) -> Trial:
    """What each fold's images are to the trial that gains most on the others, or to the reference, if none gains more.

    The best of several trials is flattered by the images that it is chosen by; what is chosen without them is not.

    Args:
        trials: What to choose from, each of all images.
        reference: What they are compared with.
        folds: Which fold each image is in, ``(N,)``.
        least: Squared error that has to be gained.
    """
    found = Trial(reference.right.clone(), reference.loss.clone())
    for fold in range(int(folds.max()) + 1):
        own = folds == fold
        gains = [float((reference.loss - trial.loss)[~own].mean()) for trial in trials]
        if max(gains) > least:
            best = trials[gains.index(max(gains))]
            found.right[own], found.loss[own] = best.right[own], best.loss[own]
    return found


@dataclass(frozen=True)
class Bench:
    """Images and a network that methods are tried on.

    Args:
        backbone: The network that each fit starts from.
        images: Images as they are evaluated, ``(N, C, H, W)``.
        labels: ``(N,)``.
        num_classes: Number of classes ``K``.
        folds: Which fold each image is in, ``(N,)``.
        batch_size: Images a step.
        lr: Learning rate of AdamW at the start of its cosine.
        epochs: Epochs of a fit.
        trainer: Makes a Trainer of so many epochs.
    """

    backbone: Backbone
    images: Tensor
    labels: Tensor
    num_classes: int
    folds: Tensor
    batch_size: int
    lr: float
    epochs: int
    trainer: Callable[[int], Trainer]

    def data(self, rows: Tensor) -> LightningDataModule:
        """A datamodule with these training images, ``rows`` ``(n,)``; a batch has all of them, if they are few."""
        return _Rows(self, rows)

    def fitted(self, method: Method, rows: Tensor, seed: int) -> FineTuner:
        """The model that a method fits to the images at ``rows`` ``(n,)``."""
        with isolate_rng():
            torch.manual_seed(seed)
            model = FineTuner(
                self.num_classes,
                copy.deepcopy(self.backbone),
                cache="none" if method.knobs.get("train") == "all" else "memory",
                allow_random=True,
                optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.01),
                lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs),
                **method.knobs,
            )
            self.trainer(self.epochs).fit(model, self.data(rows))
        return model

    def run(self, method: Method, trial: Trial, fold: int) -> None:
        """Fit a method without a fold, and add to its trial what it makes of the fold's images.

        A fit that diverges is said on stderr, and knows nothing of them.
        """
        rows, train = ((self.folds == fold).nonzero().squeeze(1), (self.folds != fold).nonzero().squeeze(1))
        start = time.perf_counter()
        try:
            model = self.fitted(method, train, fold)
        except FloatingPointError:
            print(f"{method.name} diverges without fold {fold + 1}, and counts as chance there", file=sys.stderr)
            trial.add(rows, torch.zeros(len(rows), self.num_classes), self.labels)
            return
        finally:
            trial.seconds.append(time.perf_counter() - start)
        held_out = DataLoader(TensorDataset(self.images[rows], self.labels[rows]), batch_size=self.batch_size)
        with isolate_rng():  # a loader draws a seed
            logits: Any = self.trainer(1).predict(_Logits(model), held_out)
        trial.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        trial.add(rows, torch.cat(logits).cpu(), self.labels)


class _Logits(LightningModule):
    """Predicts a classifier's logits, since probabilities in float32 have lost those of classes that it rules out."""

    def __init__(self, model: FineTuner) -> None:
        super().__init__()
        self.model = model

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits: Tensor = self.model(batch[0])
        return logits


class _Rows(LightningDataModule):
    """Some images of a bench, to train on."""

    def __init__(self, bench: Bench, rows: Tensor) -> None:
        super().__init__()
        self.samples = Subset(TensorDataset(bench.images, bench.labels), rows.tolist())
        self.num_classes, self.batch_size = bench.num_classes, min(bench.batch_size, len(rows))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def train_plain_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples, batch_size=self.batch_size)

    def val_dataloader(self) -> list[Any]:
        return []

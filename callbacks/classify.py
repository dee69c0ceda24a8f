"""Classifiers of a run's features and their accuracy: linear ones, trained or in closed form, and kNN.

All of them return scores ``(N, K)``, the highest of which decides; a classifier without data returns nan.

Legend: ``N`` samples, ``M`` samples of a bank, ``K`` classes, ``d`` feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from ncfinetune.inputs import check_labels, may_look
from ncfinetune.probes import decided_rightly, ridge
from ncfinetune.transferability import votes

# Maps features (N, d) to scores (N, K).
Scores = Callable[[Tensor], Tensor]
# Makes a classifier from features (M, d), labels (M,) and the number of classes.
Fit = Callable[[Tensor, Tensor, int], Scores]
# Queries compared with the bank at a time, which bounds the memory of kNN.
_QUERIES = 256


class LinearProbe(nn.Module):
    """A linear classifier of features that are standardised to mean 0 and variance 1.

    It is initialised to zero, so that making one draws no random numbers.

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

    @torch.no_grad()
    def standardise(self, features: Tensor, used: Tensor) -> Tensor:
        """A batch standardised by mean and variance of its used rows, which also update the running statistics.

        Does what `BatchNorm1d` does in training, except that rows not ``used`` ``(N,)`` are left out and become 0.
        """
        norm: Any = self.normalise
        rows, weights = torch.where(used[:, None], features, 0), used[:, None].to(features.dtype)
        number = weights.sum()
        mean = rows.sum(0) / number.clamp(min=1)
        squares = ((rows - mean).square() * weights).sum(0)
        share = norm.momentum * (number > 1)
        norm.running_mean += share * (mean - norm.running_mean)
        norm.running_var += share * (squares / (number - 1).clamp(min=1) - norm.running_var)
        return (rows - mean) * weights * (squares / number.clamp(min=1) + norm.eps).rsqrt()

    def forward(self, features: Tensor) -> Tensor:
        """Class logits ``(N, K)`` of features ``(N, d)``."""
        return self.linear(self.normalise(features))


@dataclass(frozen=True)
class _Progress:
    """The state of an `OnlineClassifier` once the width of the features is known.

    Args:
        probe: The classifier, in eval mode.
        optimizer: Its optimiser.
        left_out: Samples of the current epoch left out for their labels and for their features, ``(2,)``.
        losses: Sum of the losses of the epoch's samples, and their number, ``(2,)``.
    """

    probe: LinearProbe
    optimizer: torch.optim.Optimizer
    left_out: Tensor
    losses: Tensor

    @classmethod
    def begin(
        cls, features: Tensor, num_classes: int, optimizer: OptimizerCallable, stored: dict[str, Any]
    ) -> _Progress:
        """A new classifier of such features ``(N, d)``, or the one in ``stored`` if there is one."""
        probe = LinearProbe(features.shape[1], num_classes).to(features).eval()
        left_out = torch.zeros(2, dtype=torch.int64, device=features.device)
        losses = torch.zeros(2, dtype=torch.float32, device=features.device)
        progress = cls(probe, optimizer(probe.parameters()), left_out, losses)
        if stored:
            progress.probe.load_state_dict(stored["probe"])
            progress.optimizer.load_state_dict(stored["optimizer"])
            left_out.copy_(stored["left_out"])
            losses.copy_(stored["losses"])
        return progress

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        sums = {"left_out": self.left_out.clone(), "losses": self.losses.clone()}
        return {"probe": self.probe.state_dict(), "optimizer": self.optimizer.state_dict(), **sums}


class OnlineClassifier:
    """A `LinearProbe` that is trained by one step per batch, with a separate optimiser.

    Args:
        optimizer: Makes that optimiser.
        ignore_index: Samples with this label are left out.
    """

    def __init__(self, optimizer: OptimizerCallable, ignore_index: int | None = None) -> None:
        self._make_optimizer = optimizer
        self._ignore_index = ignore_index
        self._stored: dict[str, Any] = {}
        self._progress: _Progress | None = None

    @property
    def probe(self) -> LinearProbe | None:
        """The classifier, in eval mode; None while the width of the features is unknown."""
        return None if self._progress is None else self._progress.probe

    def state_dict(self) -> dict[str, Any]:
        """Weights of the classifier, state of its optimiser, sums of the epoch; empty before the first batch."""
        return self._stored if self._progress is None else self._progress.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts and the device is known."""
        self._stored, self._progress = state_dict, None

    def forget(self) -> None:
        """Begin anew with the next batch."""
        self._stored, self._progress = {}, None

    def restore(self, num_classes: int, device: torch.device) -> None:
        """Restore the loaded state, if there is one."""
        if self._stored and self._progress is None:
            self._begun(self._stored["probe"]["linear.weight"].to(device), num_classes)

    def begin_epoch(self) -> None:
        """Set the epoch's sums to 0."""
        if self._progress is not None:
            self._progress.left_out.zero_()
            self._progress.losses.zero_()

    def learn(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        """Take a step. No value is read from an accelerator.

        Args:
            features: ``(N, d)``; samples with nan or inf are left out.
            labels: Classes ``(N,)``, of which those out of range are left out, or class probabilities ``(N, K)``.
            num_classes: Number of classes ``K``.

        Raises:
            ValueError: On a CPU: labels out of range.
        """
        own = self._begun(features, num_classes)
        whole = labels.ndim == 1
        if whole and may_look(labels):
            check_labels(labels, num_classes, self._ignore_index)
        finite = features.isfinite().all(1)
        known = (labels >= 0) & (labels < num_classes) if whole else torch.ones_like(finite)
        ignored = torch.zeros_like(finite) if self._ignore_index is None or not whole else labels == self._ignore_index
        own.left_out.add_(torch.stack([(~known & ~ignored).sum(), (~finite).sum()]))
        used = known & finite & ~ignored
        logits = own.probe.linear(own.probe.standardise(features, used))
        targets = torch.where(used, labels, 0) if whole else labels
        losses = torch.where(used, F.cross_entropy(logits, targets, reduction="none"), 0)
        loss = losses.sum() / used.sum().clamp(min=1)
        own.optimizer.zero_grad()
        torch.autograd.backward(loss)
        own.optimizer.step()
        own.losses.add_(torch.stack([losses.detach().sum().float(), used.sum()]))

    def mean_loss(self) -> float | None:
        """The mean loss of the epoch's samples, None without samples; reads the device."""
        total, samples = (0, 0) if self._progress is None else self._progress.losses.tolist()
        return total / samples if samples else None

    def report_left_out(self, asker: str, num_classes: int) -> None:
        """Report the epoch's samples that were left out; reads the device.

        Args:
            asker: Name of the callback, for messages.
            num_classes: Number of classes ``K``.

        Raises:
            ValueError: Labels out of range.
        """
        labels, features = (0, 0) if self._progress is None else self._progress.left_out.tolist()
        if labels:
            raise ValueError(
                f"{asker}: expected labels in 0..{num_classes - 1} (num_classes={num_classes}), got {labels} "
                "training samples with labels out of range in this epoch"
            )
        if features:
            rank_zero_warn(f"{asker} left out {features} training samples of this epoch with nan or inf in features")

    def _begun(self, features: Tensor, num_classes: int) -> _Progress:
        if self._progress is None:
            self._progress = _Progress.begin(features, num_classes, self._make_optimizer, self._stored)
        return self._progress


class Neighbours:
    """Weighted kNN: the ``k`` nearest of a bank vote for their classes (Wu et al. 2018, arXiv 1805.01978, section 3.4).

    Args:
        features: The bank, ``(M, d)``.
        labels: Its labels, ``(M,)``.
        num_classes: Number of classes ``K``.
        k: Number of neighbours; all of the bank if it has fewer.
    """

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int, k: int) -> None:
        self._bank, self._labels = F.normalize(features, dim=1), labels
        self._num_classes, self._k = num_classes, min(k, len(features))

    def __call__(self, features: Tensor) -> Tensor:
        """Sums of the votes for each class, ``(N, K)``, for features ``(N, d)``."""
        if not self._k:
            return features.new_full((len(features), self._num_classes), torch.nan)
        cosines = (F.normalize(part, dim=1) @ self._bank.T for part in torch.split(features, _QUERIES))
        return torch.cat([votes(part, self._labels, self._num_classes, self._k) for part in cosines])


def fit_probe(features: Tensor, labels: Tensor, num_classes: int) -> LinearProbe:
    """Multinomial logistic regression on standardised features, to convergence.

    Minimises mean cross-entropy + |W|^2 / (2 N), which is scikit-learn's ``C=1``, by L-BFGS.

    Args:
        features: ``(N, d)``.
        labels: ``(N,)``.
        num_classes: Number of classes ``K``.
    """
    probe = LinearProbe(features.shape[1], num_classes).to(features).eval()
    if not len(features):
        nn.init.constant_(probe.linear.bias, torch.nan)
        return probe.requires_grad_(False)
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


@dataclass(frozen=True)
class RidgeProbe:
    """A linear classifier in closed form.

    Args:
        weight: ``(K, d)``, in float64 where the device has it.
        bias: ``(K,)``.
        held_out_acc: Accuracy on the samples it is fitted to, each classified by a fit that leaves out its fold of one
            sample per class (`ncfinetune.probes.Head.held_out`); a tie is wrong.
    """

    weight: Tensor
    bias: Tensor
    held_out_acc: float

    def __call__(self, features: Tensor) -> Tensor:
        """Scores ``(N, K)`` of features ``(N, d)``."""
        return features.to(self.weight.dtype) @ self.weight.T + self.bias


def fit_ridge(features: Tensor, labels: Tensor, num_classes: int) -> RidgeProbe:
    """`ncfinetune.probes.ridge`: regression on one-hot targets, its strength chosen by exact leave-one-out error.

    With fewer than two classes a warning is given, and scores and ``held_out_acc`` are nan.

    Args:
        features: ``(N, d)``, finite.
        labels: ``(N,)``, of ``0..K-1``.
        num_classes: Number of classes ``K``.
    """
    if (present := len(torch.unique(labels))) < 2:
        rank_zero_warn(f"a ridge probe needs samples of at least two classes, got {len(labels)} of {present}")
        nothing = features.new_full((num_classes, features.shape[1]), torch.nan)
        return RidgeProbe(nothing, nothing.new_full((num_classes,), torch.nan), float("nan"))
    head = ridge(features, labels, num_classes)
    widest = torch.float32 if features.device.type == "mps" else torch.float64
    weight, bias = (value.to(widest).to(features.device) for value in (head.weight, head.bias))
    return RidgeProbe(weight, bias, decided_rightly(head.held_out(), labels).mean().item())


def count(scores: Tensor, labels: Tensor, num_classes: int, ignore_index: int | None = None) -> Tensor:
    """Numbers of correctly classified, of all, and of unusable samples, ``(3,)``.

    Unusable are samples whose label is out of range, or whose scores are not finite. No value is read from an
    accelerator.

    Args:
        scores: ``(N, K)``.
        labels: ``(N,)``.
        num_classes: Number of classes ``K``.
        ignore_index: Samples with this label do not count.
    """
    counted = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    sound = (labels >= 0) & (labels < num_classes) & scores.isfinite().all(1)
    parts = ((scores.argmax(1) == labels) & counted, counted, counted & ~sound)
    return torch.stack([part.sum() for part in parts])


def accuracy(counts: Tensor, name: str, num_classes: int) -> float:
    """The accuracy; nan, with a warning, if some samples are unusable.

    Args:
        counts: Result of `count`, ``(3,)``, or a sum of results.
        name: Log name of the accuracy.
        num_classes: Number of classes ``K``.
    """
    right, total, unsound = counts.tolist()
    if unsound or not total:
        rank_zero_warn(
            f"{name} is logged as nan: {unsound} of {total} samples have labels outside 0..{num_classes - 1}, or nan "
            "or inf in their features or scores"
        )
        return float("nan")
    return right / total


def transferred(
    bank: tuple[Tensor, Tensor],
    tested: Sequence[tuple[Tensor, Tensor]],
    fit: Fit,
    k: int,
    name: Callable[[str, int, int], str],
) -> dict[str, float]:
    """Accuracies by log name on a second data set's validation images, of classifiers fitted to its training images.

    Args:
        bank: Features ``(M, d)`` and labels ``(M,)`` of the training images.
        tested: Features and labels of the validation images, a pair for each loader.
        fit: Makes the classifier of ``downstream_acc``.
        k: Neighbours of ``downstream_knn``; 0 is no kNN.
        name: Makes a log name from a number's name, the index of its loader, and the number of loaders.
    """
    num_classes = 1 + max((int(labels.max()) for _, labels in (bank, *tested) if len(labels)), default=0)
    classifiers = {"downstream_acc": fit(*bank, num_classes)}
    if k:
        classifiers["downstream_knn"] = Neighbours(*bank, num_classes, k)
    found = {}
    for (number, scores), (index, (features, labels)) in product(classifiers.items(), enumerate(tested)):
        called = name(number, index, len(tested))
        found[called] = accuracy(count(scores(features), labels, num_classes), called, num_classes)
    return found

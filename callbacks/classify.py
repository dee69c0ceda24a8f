"""Classifiers of features that train beside a run: a linear one, batch by batch or to convergence, and kNN.

Legend: ``N`` samples, ``M`` samples of a bank, ``K`` classes, ``d`` feature width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from ncfinetune.inputs import check_labels, may_look

# Queries compared with the bank at a time, which bounds the memory that kNN takes.
_QUERIES = 256
# Temperature of the votes in kNN, of Wu et al. (2018), section 3.4.
_TEMPERATURE = 0.07


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

    @torch.no_grad()
    def standardise(self, features: Tensor, used: Tensor) -> Tensor:
        """A batch brought to mean 0 and variance 1 of the rows that are used, which the running statistics take in.

        What `BatchNorm1d` does in training, but for rows ``(N,)`` that are left out, which become 0.
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


class OnlineClassifier:
    """A `LinearProbe` that takes a step on each batch, with an optimiser of its own.

    Args:
        optimizer: Makes that optimiser.
        ignore_index: Samples with this label are left out.

    Attributes:
        probe: The classifier, in eval mode; None until the first features, or what is restored, tell how wide it is.
    """

    def __init__(self, optimizer: OptimizerCallable, ignore_index: int | None = None) -> None:
        self.probe: LinearProbe | None = None
        self._make_optimizer = optimizer
        self._ignore_index = ignore_index
        self._optimizer: torch.optim.Optimizer | None = None
        self._stored: dict[str, Any] = {}
        # Of the present epoch: samples left out for their labels and for their features; sum of the losses of samples,
        # and their number.
        self._left_out: Tensor | None = None
        self._losses: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """Weights of the classifier, state of its optimiser, sums of the epoch; empty before the first batch."""
        if self.probe is None or self._optimizer is None or self._left_out is None or self._losses is None:
            return self._stored
        sums = {"left_out": self._left_out.clone(), "losses": self._losses.clone()}
        return {"probe": self.probe.state_dict(), "optimizer": self._optimizer.state_dict(), **sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts, and the device is known."""
        self._stored, self.probe = state_dict, None

    def restore(self, num_classes: int, device: torch.device) -> None:
        """Go on with the state that was loaded, if one was."""
        if self._stored and self.probe is None:
            weight = self._stored["probe"]["linear.weight"].to(device)
            _, _, left_out, losses = self._made(weight, num_classes)
            left_out.copy_(self._stored.get("left_out", left_out))
            losses.copy_(self._stored.get("losses", losses))

    def begin_epoch(self) -> None:
        """Set the epoch's sums to 0."""
        for sums in (self._left_out, self._losses):
            if sums is not None:
                sums.zero_()

    def learn(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        """Take a step. No value is read from an accelerator.

        Args:
            features: ``(N, d)``; samples with nan or inf are left out.
            labels: Classes ``(N,)``, those out of range left out, or shares of the classes ``(N, K)``.
            num_classes: Number of classes ``K``.

        Raises:
            ValueError: On a CPU: labels out of range.
        """
        probe, optimizer, left_out, epoch = self._made(features, num_classes)
        whole = labels.ndim == 1
        if whole and may_look(labels):
            check_labels(labels, num_classes, self._ignore_index)
        finite = features.isfinite().all(1)
        known = (labels >= 0) & (labels < num_classes) if whole else torch.ones_like(finite)
        ignored = torch.zeros_like(finite) if self._ignore_index is None or not whole else labels == self._ignore_index
        left_out += torch.stack([(~known & ~ignored).sum(), (~finite).sum()])
        used = known & finite & ~ignored
        logits = probe.linear(probe.standardise(features, used))
        targets = torch.where(used, labels, 0) if whole else labels
        losses = torch.where(used, F.cross_entropy(logits, targets, reduction="none"), 0)
        loss = losses.sum() / used.sum().clamp(min=1)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        epoch[0] += loss.detach().float() * len(labels)
        epoch[1] += len(labels)

    def mean_loss(self) -> float | None:
        """The mean loss of the epoch's samples, None if there are none; reads the device."""
        total, samples = (0, 0) if self._losses is None else self._losses.tolist()
        return total / samples if samples else None

    def left_out(self) -> tuple[int, int]:
        """The epoch's samples left out for their labels and for their features; reads the device."""
        labels, features = (0, 0) if self._left_out is None else self._left_out.tolist()
        return labels, features

    def _made(self, features: Tensor, num_classes: int) -> tuple[LinearProbe, torch.optim.Optimizer, Tensor, Tensor]:
        if self.probe is None or self._optimizer is None or self._left_out is None or self._losses is None:
            self.probe = LinearProbe(features.shape[1], num_classes).to(features).eval()
            self._optimizer = self._make_optimizer(self.probe.parameters())
            self._left_out = torch.zeros(2, dtype=torch.int64, device=features.device)
            self._losses = torch.zeros(2, dtype=torch.float32, device=features.device)
            if self._stored:
                self.probe.load_state_dict(self._stored["probe"])
                self._optimizer.load_state_dict(self._stored["optimizer"])
        return self.probe, self._optimizer, self._left_out, self._losses


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

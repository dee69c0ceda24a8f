"""Closed-form classifiers on images left out: what tuning has to beat.

Legend: ``N`` images, ``K`` classes, ``R`` ways of folding the images, ``d`` feature width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ncfinetune.folds import balanced_folds
from ncfinetune.probes import Head, lda, nearest_mean, ridge
from ncfinetune.skips import choose_skips
from ncfinetune.trials import Trial

# Skip connections of a closed form at most.
_SKIPS = 3
# Fits a closed form to images ``(N,)``, and gives its head with the features that it takes.
ClosedForm = Callable[[Tensor], tuple[Head, Tensor]]


def skip_ridge(
    penultimate: Tensor, layers: Mapping[str, Tensor], labels: Tensor, num_classes: int, most: int, train: Tensor
) -> tuple[Head, Tensor]:
    """A ridge head with the skip connections that its training images choose, and the features it takes, ``(N, d)``.

    Args:
        penultimate: ``(N, d)``.
        layers: Features of each block, ``{name: (N, d_l)}``.
        labels: ``(N,)``.
        num_classes: Number of classes ``K``.
        most: Skip connections at most.
        train: Which images to fit to, ``(N,)``.
    """
    own = {name: features[train] for name, features in layers.items()}
    skips = choose_skips(penultimate[train], own, labels[train], most)
    features = torch.cat([penultimate, *(layers[name] for name in skips)], 1)
    return ridge(features[train], labels[train], num_classes), features


def scores_trial(fit: ClosedForm, labels: Tensor, num_classes: int, ways: Tensor) -> Trial:
    """A closed form's own scores on images left out, each by the head that was fitted without the image's fold.

    Args:
        fit: The closed form.
        labels: ``(N,)``.
        num_classes: Number of classes ``K``.
        ways: Which fold each image is in, in ``R`` ways, ``(R, N)``.
    """
    scores, seconds = torch.empty(*ways.shape, num_classes, dtype=torch.float64), []
    for way, folds in zip(scores, ways, strict=True):
        for fold in range(int(folds.max()) + 1):
            start = time.perf_counter()
            head, features = fit(folds != fold)
            seconds.append(time.perf_counter() - start)
            way[folds == fold] = head.scores(features[folds == fold])
    trial = Trial.left_out(scores, labels)
    trial.seconds = seconds
    return trial


def closed_trial(fit: ClosedForm, labels: Tensor, folds: Tensor) -> Trial:
    """A closed form on all folds, each decided by the head that was fitted without it.

    Args:
        fit: The closed form.
        labels: ``(N,)``.
        folds: Which fold each image is in, ``(N,)``.
    """
    trial = Trial.empty(len(labels))
    for fold in range(int(folds.max()) + 1):
        train, rows = folds != fold, (folds == fold).nonzero().squeeze(1)
        start = time.perf_counter()
        head, features = fit(train)
        weight, bias = head.logits(labels[train])
        trial.seconds.append(time.perf_counter() - start)
        trial.add(rows, features[rows].double() @ weight.T + bias, labels)
    return trial


@dataclass(frozen=True)
class Closed:
    """A closed form, and how it does on images left out.

    Args:
        name: Its name.
        knobs: Its arguments of a `FineTuner`.
        fit: How it is fitted.
        trial: Its own scores on the folds of `folds.balanced_folds`; skip connections are chosen without the fold.
    """

    name: str
    knobs: Mapping[str, Any]
    fit: ClosedForm
    trial: Trial


def closed_forms(penultimate: Tensor, layers: Mapping[str, Tensor], labels: Tensor, num_classes: int) -> list[Closed]:
    """Closed forms; last what tuning is compared with: ridge, with skip connections if these have the lower error.

    Skip connections are considered if they lower the leave-one-out error clearly. LDA is there only if it exists
    without each of the folds.

    Args:
        penultimate: ``(N, d)``.
        layers: Features of each block, ``{name: (N, d_l)}``.
        labels: ``(N,)``.
        num_classes: Number of classes ``K``.
    """
    ways = balanced_folds(labels)

    def closed(name: str, fit: ClosedForm, knobs: Mapping[str, Any]) -> Closed:
        trial = scores_trial(fit, labels, num_classes, ways)
        head, _ = fit(torch.ones_like(labels, dtype=torch.bool))
        trial.trained = head.weight.numel() + head.bias.numel()
        return Closed(name, {"train": "none", **knobs}, fit, trial)

    def of_penultimate(kind: Callable[..., Head], train: Tensor) -> tuple[Head, Tensor]:
        return kind(penultimate[train], labels[train], num_classes), penultimate

    kinds: dict[str, tuple[str, Callable[..., Head]]] = {
        "nearest mean": ("mean", nearest_mean),
        "LDA": ("lda", lda),
        "ridge": ("ridge", ridge),
    }
    trains = [way != fold for way in ways for fold in way.unique()]
    if not all(_has_covariance(penultimate[train], labels[train]) for train in trains):
        del kinds["LDA"]
    found = [closed(name, partial(of_penultimate, kind), {"head_init": init}) for name, (init, kind) in kinds.items()]
    if skips := choose_skips(penultimate, layers, labels, _SKIPS):
        knobs = {"skip_from": skips, "skip_join": "concat", "head_init": "ridge"}
        fit = partial(skip_ridge, penultimate, layers, labels, num_classes, _SKIPS)
        found.append(closed(f"ridge, skip from {', '.join(skips)}", fit, knobs))
        found[-2:] = sorted(found[-2:], key=lambda one: -float(one.trial.loss.mean()))
    return found


def _has_covariance(features: Tensor, labels: Tensor) -> bool:
    """Whether LDA of these samples exists, one of them left out: they are enough, and vary within a class."""
    classes = (features[labels == label] for label in range(int(labels.max()) + 1))
    varies = any(bool((rows != rows[:1]).any()) for rows in classes)
    return varies and len(labels) >= int((labels.bincount() > 0).sum()) + 2

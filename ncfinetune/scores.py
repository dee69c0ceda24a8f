"""What closed forms say of each layer's features, and of each model's: one table row each.

Legend: ``N`` images, ``K`` classes, ``d_l`` width of layer ``l``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ncfinetune.bank import Bank
from ncfinetune.collapse import cdnv, class_moments, nc1, numerical_rank
from ncfinetune.folds import FoldMoments
from ncfinetune.layers import PENULTIMATE
from ncfinetune.probes import decided_rightly, ridge, squared_errors
from ncfinetune.sample_statistics import standard_error
from ncfinetune.transferability import h_score, knn_accuracy, logme


@dataclass(frozen=True)
class LayerScore:
    """A layer as a ridge head and neural collapse see it. A number that the images do not define is nan.

    Args:
        model: Name of its model.
        layer: Its name.
        depth: Its place among the model's layers, from 1; the penultimate features come last.
        width: Width ``d_l`` of its pooled features.
        parameters: Its number of parameters; of the penultimate features, the network's.
        accuracy: Share of images that a ridge head fitted without them decides rightly, in 0..1; see
            `ncfinetune.probes.Head.held_out`.
        accuracy_error: Its standard error, as `standard_error`.
        squared_error: The mean squared error of this head's scores against one-hot targets, summed over classes.
        nc1: NC1, as `ncfinetune.collapse.nc1`.
        cv_nc1: Cross-validated NC1, as `ncfinetune.folds.FoldMoments.nc1` over 5 folds.
        cdnv: CDNV, as `ncfinetune.collapse.cdnv`.
        rank: Numerical rank, as `ncfinetune.collapse.numerical_rank`; None unless asked for.
        errors: The squared error of each image, ``(N,)``.
    """

    model: str
    layer: str
    depth: int
    width: int
    parameters: int
    accuracy: float
    accuracy_error: float
    squared_error: float
    nc1: float
    cv_nc1: float
    cdnv: float
    rank: float | None
    errors: Tensor


@dataclass(frozen=True)
class ModelScore:
    """A model as a source for the task.

    Args:
        model: Its name.
        parameters: Number of parameters of the network.
        accuracy: That of a ridge head on its penultimate features, as `LayerScore.accuracy`.
        accuracy_error: Its standard error.
        squared_error: That of the same head, as `LayerScore.squared_error`; the model with the least comes first.
        behind: By how much that is above the first model's.
        behind_error: Standard error of this difference, paired by image.
        best_layer: The layer whose head has the least squared error.
        best_layer_accuracy: Accuracy of that head.
        knn: `transferability.knn_accuracy` of the penultimate features.
        h_score: `transferability.h_score`.
        logme: `transferability.logme`.
    """

    model: str
    parameters: int
    accuracy: float
    accuracy_error: float
    squared_error: float
    behind: float
    behind_error: float
    best_layer: str
    best_layer_accuracy: float
    knn: float
    h_score: float
    logme: float


def layer_scores(bank: Bank, rank: bool = False) -> list[LayerScore]:
    """A score for each layer of each model, in depth order.

    Args:
        bank: Features of a whole pass.
        rank: Find numerical ranks too, which takes a singular value decomposition a class.

    Raises:
        ValueError: No images, images of fewer than two classes or of one of each, or features that are not finite.
    """
    if not len(bank.labels):
        raise ValueError("expected training images, got none")
    if int(torch.unique(bank.labels, return_counts=True)[1].max()) < 2:
        raise ValueError("expected two images of some class at least, got one of each: none can be left out")
    scores: list[LayerScore] = []
    for model in bank.facts["models"]:
        before: Tensor | None = None
        for depth, (layer, (width, parameters)) in enumerate(model["layers"].items(), 1):
            features = bank.of(model["name"], layer)
            if before is not None and before.shape == features.shape and before.equal(features):
                # As the penultimate features of most networks are the last block's, pooled.
                scores.append(replace(scores[-1], layer=layer, depth=depth, parameters=parameters))
                continue
            before = features
            try:
                scores.append(_score(features, bank, rank, model["name"], layer, depth, width, parameters))
            except ValueError as error:
                raise ValueError(f"layer {layer} of {model['name']}: {error}") from error
    return scores


def _score(
    features: Tensor, bank: Bank, rank: bool, model: str, layer: str, depth: int, width: int, parameters: int
) -> LayerScore:
    labels, classes = bank.labels, bank.num_classes
    ways = ridge(features, labels, classes).held_out()
    accuracy, errors = float(decided_rightly(ways, labels).mean()), squared_errors(ways, labels)
    moments = class_moments(features, labels, classes)
    folds = FoldMoments(classes)
    folds.update(features, labels)
    return LayerScore(
        model,
        layer,
        depth,
        width,
        parameters,
        accuracy=accuracy,
        accuracy_error=standard_error(accuracy, len(labels)),
        squared_error=float(errors.mean()),
        nc1=_defined(lambda: nc1(moments)),
        cv_nc1=_defined(folds.nc1),
        cdnv=float(cdnv(moments)),
        rank=float(numerical_rank(features, labels, classes)) if rank else None,
        errors=errors,
    )


def _defined(number: Callable[[], Tensor]) -> float:
    """A number, or nan where the images leave it undefined."""
    try:
        return float(number())
    except ValueError:
        return math.nan


def model_scores(bank: Bank, scores: Sequence[LayerScore]) -> list[ModelScore]:
    """A score for each model by its penultimate features, the one with the least squared error first.

    With few images accuracies of models are near each other and vary more than squared errors.

    Args:
        bank: Features of a whole pass.
        scores: What `layer_scores` says of its layers.
    """
    heads = {score.model: score for score in scores if score.layer == PENULTIMATE}
    ranked = sorted(heads.values(), key=lambda score: score.squared_error)
    return [_ranked(score, ranked[0], bank, [s for s in scores if s.model == score.model]) for score in ranked]


def _ranked(score: LayerScore, first: LayerScore, bank: Bank, layers: Sequence[LayerScore]) -> ModelScore:
    behind = score.errors - first.errors
    best = min(layers, key=lambda s: s.squared_error)
    features = bank.of(score.model, PENULTIMATE)
    return ModelScore(
        score.model,
        score.parameters,
        accuracy=score.accuracy,
        accuracy_error=score.accuracy_error,
        squared_error=score.squared_error,
        behind=float(behind.mean()),
        behind_error=float(behind.std(correction=0)) / math.sqrt(len(behind)),
        best_layer=best.layer,
        best_layer_accuracy=best.accuracy,
        knn=float(knn_accuracy(features, bank.labels, bank.num_classes)),
        h_score=float(h_score(features, bank.labels, bank.num_classes)),
        logme=float(logme(features, bank.labels, bank.num_classes)),
    )

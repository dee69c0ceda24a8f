"""The temperature of a closed form, from scores of samples that it was fitted without."""

import torch
from torch import Tensor

from ncfinetune.calibration import fit_temperature
from ncfinetune.folds import balanced_folds
from ncfinetune.probes import Head, RidgeHead


def held_out_folds(head: RidgeHead, labels: Tensor) -> Tensor:
    """Folds with one sample of each class, of the samples in the order of their leave-one-out scores."""
    own = head.loo_scores.gather(1, labels[:, None]).squeeze(1)
    order = sorted(range(len(labels)), key=lambda index: (int(labels[index]), float(own[index])))
    return balanced_folds(labels[order])[:, torch.tensor(order).argsort()]


def held_out_scores(head: Head, labels: Tensor) -> Tensor:
    """Of ridge regression by the folds that leave out one sample of each class, of the others by single samples."""
    return head.left_out(held_out_folds(head, labels)) if isinstance(head, RidgeHead) else head.loo_scores[None]


def held_out_temperature(head: Head, labels: Tensor) -> Tensor:
    ways = held_out_scores(head, labels)
    return fit_temperature(ways.flatten(0, 1), labels.repeat(len(ways)), len(ways))

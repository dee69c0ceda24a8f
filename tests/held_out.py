"""The temperature of a closed form, from scores of samples that it was fitted without."""

from torch import Tensor

from ncfinetune.calibration import fit_temperature
from ncfinetune.probes import Head, RidgeHead
from ncfinetune.samples import balanced_folds


def held_out_scores(head: Head, labels: Tensor) -> Tensor:
    """Of ridge regression by the folds that leave out one sample of each class, of the others by single samples."""
    return head.left_out(balanced_folds(labels)) if isinstance(head, RidgeHead) else head.loo_scores[None]


def held_out_temperature(head: Head, labels: Tensor) -> Tensor:
    ways = held_out_scores(head, labels)
    return fit_temperature(ways.flatten(0, 1), labels.repeat(len(ways)), len(ways))

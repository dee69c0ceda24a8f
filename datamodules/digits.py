"""Handwritten digits from scikit-learn: real images without a download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from .images import Labelled
from .indexed import SPLIT_SEED, IndexedImages
from .recipes import Augmentation
from .splits import split_indices

_PARTS = {"test": 0.3, "val": 0.1}


class Digits(IndexedImages):
    """1,797 grey images of handwritten digits, 8x8 pixels (Alpaydin and Kaynak 1998; scikit-learn's ``load_digits``).

    Of each class 30 % are test images, 10 % validation images and the rest training images; the split never changes,
    whichever classes are kept.

    Args:
        classes: Digits to keep; they get the labels 0, 1, ... in this order. None is all ten.
        augmentation: As for every data set, but ``plain`` by default: a mirrored digit is no digit.

    Raises:
        ValueError: ``classes`` names no digit, one twice, or fewer than two.
    """

    def __init__(
        self, classes: Sequence[int] | None = None, augmentation: Augmentation = "plain", **kwargs: Any
    ) -> None:
        self.classes = list(range(10)) if classes is None else list(classes)
        _check_classes(self.classes)
        super().__init__(
            num_classes=len(self.classes),
            input_size=(1, 8, 8),
            data_mean=[0.305],
            data_std=[0.376],
            augmentation=augmentation,
            **kwargs,
        )
        self.class_names = [str(digit) for digit in self.classes]

    def parts(self) -> dict[str, Labelled]:
        """The three parts."""
        images, digits = load_digits(return_X_y=True)
        images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
        label_of = np.full(10, -1)
        label_of[self.classes] = np.arange(len(self.classes))
        everything = Labelled.all(torch.from_numpy(images), label_of[digits])
        return {
            name: everything.take(part[np.isin(digits[part], self.classes)]) for name, part in _split(digits).items()
        }


def _split(digits: np.ndarray) -> dict[str, np.ndarray]:
    """Indices of each part of all ten digits, so that no choice of classes moves an image to another part.

    The digits 0 to 4 and 5 to 9, which the examples pre-train on and fine-tune on, are drawn apart.
    """
    halves = [np.flatnonzero(half) for half in (digits < 5, digits >= 5)]
    cuts = [split_indices(digits[half], _PARTS, SPLIT_SEED) for half in halves]
    return {
        name: np.sort(np.concatenate([half[cut[name]] for half, cut in zip(halves, cuts, strict=True)]))
        for name in cuts[0]
    }


def _check_classes(classes: list[int]) -> None:
    if len(set(classes)) < 2 or len(set(classes)) < len(classes) or not set(classes) <= set(range(10)):
        raise ValueError(f"expected classes to be at least two different digits of 0..9, got {classes}")

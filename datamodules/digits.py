"""Handwritten digits that come with scikit-learn: real images without a download."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.datasets import load_digits

from .base import ImageDataModule, Images, split_indices, take_shots, tensor_dataset

# Fixed, so that no choice of images a user makes can move an image from the test part to the training part.
_SPLIT_SEED = 0
_PARTS = {"test": 0.3, "val": 0.1}


class Digits(ImageDataModule):
    """1,797 grey images of handwritten digits, 8x8 pixels (Alpaydin and Kaynak 1998; scikit-learn's ``load_digits``).

    Of each class 30 % are for testing, 10 % for validation and the rest for training; the parts never change.

    Args:
        classes: Digits to keep; they get the labels 0, 1, ... in this order. None is all ten.
        shots: Training images a class, drawn with ``seed``; None is all of them.
        seed: Which training images ``shots`` draws.
        batch_size: Images a batch.
        num_workers: Worker processes a loader.

    Raises:
        ValueError: ``classes`` names no digit, one twice, or fewer than two; ``shots`` is not available.
    """

    def __init__(
        self,
        classes: Sequence[int] | None = None,
        shots: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        self.classes = list(range(10)) if classes is None else list(classes)
        _check_classes(self.classes)
        super().__init__(
            class_names=[str(digit) for digit in self.classes],
            input_size=(1, 8, 8),
            mean=[0.305],
            std=[0.376],
            batch_size=batch_size,
            num_workers=num_workers,
        )
        self.shots = shots
        self.seed = seed

    def splits(self) -> dict[str, Images]:
        """The three parts, the training part cut down to ``shots``."""
        images, digits = load_digits(return_X_y=True)
        images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, *self.input_size)
        kept = np.flatnonzero(np.isin(digits, self.classes))
        images, labels = images[kept], np.array([self.classes.index(digit) for digit in digits[kept]])
        parts = split_indices(labels, _PARTS, _SPLIT_SEED)
        if self.shots is not None:
            train = parts["train"]
            parts["train"] = train[take_shots(labels[train], self.shots, self.seed, self.class_names)]
        return {name: tensor_dataset(images[part], labels[part]) for name, part in parts.items()}


def _check_classes(classes: list[int]) -> None:
    if len(set(classes)) < 2 or len(set(classes)) < len(classes) or not set(classes) <= set(range(10)):
        raise ValueError(f"expected classes to be at least two different digits of 0..9, got {classes}")

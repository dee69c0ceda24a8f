"""What every datamodule shares: stratified splits, few labels, loaders, normalisation of the batch.

Legend: ``N`` images, ``C`` channels, ``H W`` height and width, ``K`` classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

Images = Dataset[tuple[Tensor, ...]]


class ImageDataModule(LightningDataModule, ABC):
    """Labelled images as uint8 tensors, normalised batch by batch on whatever device the batch is on. Abstract.

    Besides Lightning's loaders it offers `train_plain_dataloader`: the training images in a fixed order and as they are
    evaluated, which is what neural collapse is measured on.

    Args:
        class_names: Names of the classes, in the order of their labels.
        input_size: Shape ``(C, H, W)`` of an image.
        mean: Mean of each channel, for pixels in 0..1.
        std: Standard deviation of each channel, for pixels in 0..1.
        batch_size: Images a batch.
        num_workers: Worker processes a loader.

    Attributes:
        num_classes: Number of classes ``K``.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        input_size: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"expected batch_size of at least 1, got {batch_size}")
        self.class_names = list(class_names)
        self.num_classes = len(class_names)
        self.input_size = input_size
        self.mean = torch.tensor(mean)
        self.std = torch.tensor(std)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._splits: dict[str, Images] = {}

    @abstractmethod
    def splits(self) -> dict[str, Images]:
        """The data sets ``train``, ``val`` and ``test`` of pairs (uint8 image ``(C, H, W)``, int64 label)."""

    def setup(self, stage: str) -> None:
        """Read the splits, once."""
        self._splits = self._splits or self.splits()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Training images in random order."""
        return self._loader("train", shuffle=True)

    def train_plain_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Training images in a fixed order."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Validation images."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Test images."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Test images."""
        return self._loader("test")

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Bring uint8 pixels to mean 0 and standard deviation 1."""
        images, labels = batch
        mean, std = (v.to(images.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (images.float() / 255 - mean) / std, labels

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(
            self._splits[split],
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


def split_indices(labels: np.ndarray, fractions: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    """Stratified split of ``0..N-1``: each named part gets its fraction of every class, ``train`` what is left.

    Args:
        labels: Labels, ``(N,)``.
        fractions: Share of each part but ``train``.
        seed: Seed of the shuffling within classes.

    Returns:
        ``{part: sorted indices}``, disjoint, together all of ``0..N-1``.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*fractions, "train")}
    for members in _shuffled_classes(labels, seed):
        ends = np.cumsum([round(share * len(members)) for share in fractions.values()])
        for name, part in zip(parts, np.split(members, ends), strict=True):
            parts[name].append(part)
    return {name: np.sort(np.concatenate(chunks)) for name, chunks in parts.items()}


def take_shots(labels: np.ndarray, shots: int, seed: int, class_names: Sequence[str]) -> np.ndarray:
    """Indices of ``shots`` images of every class; those of fewer shots are among those of more.

    Args:
        labels: Labels, ``(N,)``.
        shots: Images a class.
        seed: Seed of the choice.
        class_names: Names of the classes, for the error.

    Raises:
        ValueError: ``shots`` is below 1, or above what a class has.
    """
    if shots < 1:
        raise ValueError(f"expected shots of at least 1 image a class, got {shots}")
    classes = _shuffled_classes(labels, seed)
    for name, members in zip(class_names, classes, strict=True):
        if len(members) < shots:
            raise ValueError(f"expected shots of at most {len(members)}, which is all of class {name!r}, got {shots}")
    return np.sort(np.concatenate([members[:shots] for members in classes]))


def _shuffled_classes(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]


def tensor_dataset(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
    """A data set of uint8 images ``(N, C, H, W)`` and int64 labels ``(N,)`` held in memory."""
    return TensorDataset(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))

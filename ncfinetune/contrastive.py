"""Contrastive pre-training with one loss: SupCon with labels, SimCLR without.

Legend: ``N`` samples, ``V`` views of each, ``C`` channels, ``H W`` height and width, ``d`` width of the features.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from ncfinetune.backbone import Backbone
from ncfinetune.gathering import sum_of_all
from ncfinetune.heads import Projection, projection_head
from ncfinetune.inputs import whole
from ncfinetune.learner import Batch, Interval, Learner
from ncfinetune.losses import contrastive_loss


class Contrastive(Learner):
    """Trains a backbone to tell positives from the rest of the batch. Abstract.

    Batches are ``(images (N, V, C, H, W), labels (N,))`` with two views or more; all views go through the network in
    one forward pass. Logs ``train/loss``, and ``val/loss`` and ``test/loss`` where those batches have views; plain
    images only pass through the backbone, so that callbacks see their features.

    Args:
        backbone: A timm name, the arguments of a `Backbone`, or a `Backbone`.
        temperature: Divisor of the cosine similarities; for CIFAR-10 Khosla et al. take 0.1, Chen et al. 0.5.
        projection: Head between backbone and loss: ``none``, ``linear`` or ``mlp``.
        projection_dim: Width of the projection; None is 128, or with ``none`` the width of the features.
        optimizer: Makes an optimiser of all parameters; None is AdamW with learning rate 1e-3.
        lr_scheduler: Makes a scheduler of that optimiser.
        lr_batch: Batch size (images per step, not views) that the learning rate is meant for; the rate is scaled
            linearly to the actual batch size. None does not scale it.
        lr_interval: Whether the scheduler is stepped once an ``epoch`` or after each ``step``.

    Raises:
        ValueError: A temperature that is not positive, or a ``projection_dim`` with the projection ``none``; in
            training, batches of one view or one sample.
    """

    plateau_monitor = "train/loss"  # validation images have no views

    def __init__(
        self,
        backbone: str | dict[str, Any] | Backbone,
        temperature: float = 0.1,
        projection: Projection = "mlp",
        projection_dim: int | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_batch: int | None = None,
        lr_interval: Interval = "epoch",
    ) -> None:
        super().__init__(backbone, optimizer, lr_scheduler, lr_batch, lr_interval)
        if not temperature > 0:
            raise ValueError(f"expected a temperature above 0, got {temperature}")
        self.temperature = temperature
        if projection_dim is None:
            projection_dim = self.backbone.dim if projection == "none" else 128
        self.projection = projection_head(projection, self.backbone.dim, projection_dim)

    @abstractmethod
    def classes(self, labels: Tensor) -> Tensor:
        """Integers ``(N,)`` that are equal for samples that are each other's positives, across all processes."""

    @property
    def penultimate(self) -> Backbone:
        """The module whose output collapse is measured on, whatever the projection."""
        return self.backbone

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(N, d)`` of images ``(N, C, H, W)``, before the projection; of views ``(N V, d)``, by sample."""
        return self.backbone(x.flatten(0, 1) if x.ndim == 5 else x)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The contrastive loss of the batch."""
        if batch[0].ndim != 5:
            raise ValueError(
                f"{type(self).__name__} trains on views (N, V, C, H, W), got images {tuple(batch[0].shape)}; "
                "give the datamodule views=2"
            )
        return self._contrast(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the loss of a batch of views; run plain images through the backbone."""
        self._watch(batch, "val", dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the loss of a batch of views; run plain images through the backbone."""
        self._watch(batch, "test", dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Raise ValueError: there is no classifier."""
        raise ValueError(f"{type(self).__name__} has no classifier to predict with; its features are model(images)")

    def _watch(self, batch: Batch, split: str, loader: int) -> None:
        if batch[0].ndim == 5:
            self._contrast(batch, split, loader)
        else:
            self(batch[0])

    def _contrast(self, batch: Batch, split: str, loader: int = 0) -> Tensor:
        images, labels = batch
        z = self.projection(self(images)).unflatten(0, images.shape[:2])
        loss = contrastive_loss(z, self.classes(labels), self.temperature)
        self.log_mean(f"{split}/loss", loss, self._share(len(labels)), loader)
        return loss

    def _share(self, samples: int) -> int | Tensor:
        """The number of samples that this process's loss counts for in the mean over all processes.

        It is the same on each process, as the loss that is trained is the mean over processes.
        """
        processes = self.trainer.world_size
        if processes == 1:
            return samples
        return sum_of_all(torch.full((), samples / processes, dtype=torch.float32, device=self.device))


class SupCon(Contrastive):
    """Supervised contrastive learning: images of one class are positives (Khosla et al. 2020, arXiv 2004.11362, L_out).

    The only positives of a sample without others of its class in the batch are its own other views. Arguments, batches
    and log names are those of `Contrastive`.

        >>> model = SupCon({"name": "resnet18", "stem": "cifar"}, projection="mlp", projection_dim=64)
        >>> images = torch.rand(4, 2, 3, 32, 32)  # two views of four samples
        >>> z = model.projection(model(images)).unflatten(0, (4, 2))
        >>> contrastive_loss(z, labels=torch.tensor([0, 1, 0, 1])).shape
        torch.Size([])
    """

    def classes(self, labels: Tensor) -> Tensor:
        """The labels."""
        return whole(labels)


class SimCLR(Contrastive):
    """Contrastive learning without labels: views of one image are positives (Chen et al. 2020, arXiv 2002.05709).

    Labels are not used. Arguments, batches and log names are those of `Contrastive`.
    """

    def classes(self, labels: Tensor) -> Tensor:
        """A different number for each sample of all processes."""
        return torch.arange(len(labels), device=labels.device) + (self.global_rank << 32)

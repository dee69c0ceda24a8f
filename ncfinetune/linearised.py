"""What tuning a layer could gain, from the network's first-order expansion in the layer's parameters.

To first order, moving a layer's parameters by ``delta`` changes the scores of an image by their gradient times
``delta``: a linear model, whose features are gradients (Mu, Liang, Li 2020, "Gradients as features for deep
representation learning"; Maddox et al. 2021, "Fast adaptation with linearized neural networks"). Ridge regression on
them has exact leave-one-out scores, so that no fit of the network is needed to compare its layers.

Legend: ``N`` images, ``K`` classes, ``d`` width of the penultimate features, ``m`` width of a sketch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ncfinetune.backbone import Backbone
from ncfinetune.probes import Head, ridge

# Variance of the gradients over that of the features. The strength of ridge regression shrinks both.
_SHARES = (0.1, 1.0, 10.0)
# Images that are on the device together.
_BATCH = 32


def gradient_features(
    trainer: Trainer,
    backbone: Backbone,
    images: Tensor,
    weight: Tensor,
    layers: Sequence[str],
    draws: int = 2,
    width: int = 4096,
) -> dict[str, Tensor]:
    """Sketched gradients of the scores in each layer's parameters, ``{layer: (N, m)}``, on the CPU.

    Inner products of two rows estimate those of the two images' gradients, summed over the classes, without bias: the
    scores are summed with random signs, ``draws`` times (Hutchinson 1990), and the entries of each gradient are added
    with random signs into ``width`` places (Charikar, Chen, Farach-Colton 2002, "Finding frequent items in data
    streams"). All layers share one backward pass of an image and a draw.

    Args:
        trainer: Gives device and precision; its ``inference_mode`` is off.
        backbone: The network; its weights and what of them is frozen stay as they are.
        images: ``(N, C, H, W)``.
        weight: Weight of a linear classifier of the penultimate features, ``(K, d)``.
        layers: Names of layers with parameters.
        draws: Sums of the scores.
        width: Places of a sketch, ``m``.
    """
    frozen = [parameter for parameter in backbone.parameters() if not parameter.requires_grad]
    loader = DataLoader(TensorDataset(images), batch_size=_BATCH)
    try:
        parts: Any = trainer.predict(_Gradients(backbone, weight, layers, draws, width), loader)
    finally:
        backbone.requires_grad_(True)
        for parameter in frozen:
            parameter.requires_grad_(False)
    sketches = torch.cat(parts)
    return {layer: sketches[:, place] for place, layer in enumerate(layers)}


def linearised(features: Tensor, gradients: Tensor, labels: Tensor, num_classes: int) -> Head:
    """Ridge regression on penultimate features and a layer's gradients, with the least leave-one-out squared error.

    Both are scaled to a mean variance of one first; how much the gradients weigh is chosen among 0.1, 1 and 10.

    Args:
        features: ``(N, d)``.
        gradients: From `gradient_features`, ``(N, m)``.
        labels: ``(N,)``.
        num_classes: Number of classes ``K``.

    Raises:
        ValueError: As `ncfinetune.probes.ridge`.
    """
    one, other = _scaled(features), _scaled(gradients)
    heads = [ridge(torch.cat([one, share**0.5 * other], 1), labels, num_classes) for share in _SHARES]
    return min(heads, key=_loss)


def _scaled(features: Tensor) -> Tensor:
    """Centred features with a mean square length of 1; those that do not vary are 0."""
    features = features.double()
    features = features - features.mean(0)
    length = features.square().sum(1).mean().sqrt()
    return features / length if length > 0 else features


def _loss(head: Head) -> float:
    assert head.curve is not None
    return float(head.curve.loss.min())


class _Gradients(LightningModule):
    """Predicts the sketched gradients of a batch's images, ``(n, layers, m)``."""

    directions: Tensor
    hashes: Any

    def __init__(self, backbone: Backbone, weight: Tensor, layers: Sequence[str], draws: int, width: int) -> None:
        super().__init__()
        self.backbone, self.width = backbone, width
        backbone.requires_grad_(False)
        self.parts = [list(backbone.layer(layer).requires_grad_(True).parameters()) for layer in layers]
        generator = torch.Generator().manual_seed(0)
        signs = _signs(draws, weight.shape[0], generator=generator)
        # Buffers move to the device with the module.
        self.register_buffer("directions", (signs @ weight.cpu().float()) / draws**0.5)
        sizes = [sum(parameter.numel() for parameter in part) for part in self.parts]
        self.hashes = nn.ModuleList(
            nn.ModuleList(_Hash(size, width, generator) for size in sizes) for _ in range(draws)
        )

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return torch.stack([self._sketch(image[None]) for image in batch[0]]).cpu()

    @torch.enable_grad()
    def _sketch(self, image: Tensor) -> Tensor:
        features = self.backbone(image)[0]
        flat = [parameter for part in self.parts for parameter in part]
        rows = features.new_zeros(len(self.parts), self.width, dtype=torch.float32)
        for direction, hashes in zip(self.directions, self.hashes, strict=True):
            gradients = torch.autograd.grad(
                features.float() @ direction.float(), flat, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            start = 0
            for row, part, hashing in zip(rows, self.parts, hashes, strict=True):
                hashing.add(row, gradients[start : start + len(part)])
                start += len(part)
        return rows


class _Hash(nn.Module):
    """A place and a sign for each of some entries."""

    places: Tensor
    signs: Tensor

    def __init__(self, size: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("places", torch.randint(0, width, (size,), generator=generator))
        self.register_buffer("signs", _signs(size, generator=generator).to(torch.int8))

    def add(self, row: Tensor, gradients: Sequence[Tensor]) -> None:
        """Add the entries to a row ``(m,)``."""
        entries = torch.cat([gradient.detach().flatten().float() for gradient in gradients])
        row.index_add_(0, self.places, entries * self.signs)


def _signs(*shape: int, generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(0, 2, shape, generator=generator) - 1

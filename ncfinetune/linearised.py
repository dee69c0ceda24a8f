"""What tuning a layer could gain, from the network's first-order expansion in the layer's parameters.

To first order, moving a layer's parameters by ``delta`` changes the scores of an image by their gradient times
``delta``: a linear model, whose features are gradients (Mu, Liang, Li 2020, "Gradients as features for deep
representation learning"; Maddox et al. 2021, "Fast adaptation with linearized neural networks"). Ridge regression on
them has exact scores of images left out, so that no fit of the network is needed to compare its layers.

Legend: ``N`` images, ``K`` classes, ``d`` width of the penultimate features, ``m`` width of a sketch, ``R`` ways of
folding the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ncfinetune.backbone import Backbone
from ncfinetune.folds import balanced_folds
from ncfinetune.passes import evaluation, ready_batches, rows_to_choose_by
from ncfinetune.probes import ridge, squared_errors

# Squared error by which tuning has to gain, about half a point of accuracy.
WORTH = 0.01
# Variance of the gradients over that of the features. The strength of ridge regression shrinks both.
_SHARES = (0.1, 1.0, 10.0)
# Images that are on the device together.
_BATCH = 32
# A draw takes a backward pass of each image. Places add an error of 1/64 of the gradients' lengths to a product.
_DRAWS, _WIDTH = 4, 4096


def gradient_features(
    trainer: Trainer,
    backbone: Backbone,
    images: Tensor,
    layers: Sequence[str],
    draws: int = _DRAWS,
    width: int = _WIDTH,
) -> dict[str, Tensor]:
    """Sketched gradients of the penultimate features in each layer's parameters, ``{layer: (N, m)}``, on the CPU.

    Inner products of two rows estimate those of the two images' gradients, summed over the features, without bias: the
    features are summed with random signs, ``draws`` times (Hutchinson 1990), and the entries of each gradient are added
    with random signs into ``width`` places (Charikar, Chen, Farach-Colton 2002, "Finding frequent items in data
    streams"). All layers share one backward pass of an image and a draw. Labels have no part in it: gradients of the
    scores of a classifier that was fitted to the images would tell the labels of those left out.

    Args:
        trainer: Gives device and precision; its ``inference_mode`` is off.
        backbone: The network; its weights and what of them is frozen stay as they are.
        images: ``(N, C, H, W)``.
        layers: Names of layers with parameters.
        draws: Sums of the features.
        width: Places of a sketch, ``m``.
    """
    loader = DataLoader(TensorDataset(images), batch_size=_BATCH)
    with require_gradients(backbone, layers):
        parts: Any = trainer.predict(_Pass(GradientSketch(backbone, layers, draws, width)), loader)
    return dict(zip(layers, torch.cat(parts).unbind(1), strict=True))


def block_to_tune(features: Tensor, gradients: Mapping[str, Tensor], labels: Tensor, num_classes: int) -> str | None:
    """The layer whose tuning lowers the squared error of images left out most, to first order.

    None if that is by less than 0.01 and a standard error of the paired differences: of many layers that gain nothing
    one seems to gain that much.

    Args:
        features: ``(N, d)``.
        gradients: Of each layer, ``{layer: (N, m)}``.
        labels: ``(N,)``.
        num_classes: Number of classes ``K``.

    Raises:
        ValueError: As `ncfinetune.probes.ridge`.
    """
    folds = balanced_folds(labels)
    found = {name: linearised(features, rows, labels, num_classes, folds) for name, rows in gradients.items()}
    least = squared_errors(ridge(features, labels, num_classes).left_out(folds), labels)
    gains = {name: least - squared_errors(scores, labels) for name, scores in found.items()}
    best = max(gains, key=lambda name: float(gains[name].mean()), default=None)
    if best is None:
        return None
    gain = gains[best]
    return best if gain.mean() - gain.std(correction=0) / len(gain) ** 0.5 > WORTH else None


def choose_block(
    trainer: Trainer, module: LightningModule, backbone: Backbone, num_classes: int, without: Sequence[nn.Parameter]
) -> str | None:
    """The block to tune by `block_to_tune`, of those that have none of some parameters. For `setup`.

    The trainer's training images decide.

    Raises:
        ValueError: As `passes.rows_to_choose_by` and `ncfinetune.probes.ridge`.
    """
    rows = rows_to_choose_by(trainer, module, 'train="auto"')
    parts = {name: {id(parameter) for parameter in backbone.layer(name).parameters()} for name in backbone.layers}
    blocks = [name for name, own in parts.items() if own and own.isdisjoint(map(id, without))]
    with evaluation(trainer, module), require_gradients(backbone, blocks):
        sketch = GradientSketch(backbone, blocks).to(trainer.strategy.root_device)
        # One pass, since a stream may be in another order, and an image augmented otherwise, in a second one.
        seen = [(backbone(images), sketch(images), labels) for images, labels in ready_batches(trainer, rows)]
        features, sketches, labels = (torch.cat(column) for column in zip(*seen, strict=True))
    return block_to_tune(features, dict(zip(blocks, sketches.unbind(1), strict=True)), labels, num_classes)


@contextmanager
def require_gradients(backbone: Backbone, layers: Sequence[str] | None = None) -> Iterator[None]:
    """A context in which these layers' parameters alone require gradients; None are all layers."""
    flags = [(parameter, parameter.requires_grad) for parameter in backbone.parameters()]
    try:
        backbone.requires_grad_(layers is None)
        for layer in layers or ():
            backbone.layer(layer).requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def linearised(features: Tensor, gradients: Tensor, labels: Tensor, num_classes: int, folds: Tensor) -> Tensor:
    """Scores of images left out, ``(R, N, K)``, by ridge regression on penultimate features and a layer's gradients.

    Both are scaled to a mean variance of one first; how much the gradients weigh is chosen among 0.1, 1 and 10, for
    each fold by the squared error of the others' scores.

    Args:
        features: ``(N, d)``.
        gradients: From `gradient_features`, ``(N, m)``.
        labels: ``(N,)``.
        num_classes: Number of classes ``K``.
        folds: Which images are left out together, in ``R`` ways, ``(R, N)``; see `folds.balanced_folds`.

    Raises:
        ValueError: As `ncfinetune.probes.ridge`.
    """
    one, other = _scaled(features), _scaled(gradients)
    mixed = (torch.cat([one, share**0.5 * other], 1) for share in _SHARES)
    shares = torch.stack([ridge(x, labels, num_classes).left_out(folds) for x in mixed])
    found = torch.empty_like(shares[0])
    for way, scores, chosen in zip(folds, shares.unbind(1), found, strict=True):
        errors = torch.stack([squared_errors(share[None], labels) for share in scores])
        for fold in way.unique():
            own = way == fold
            chosen[own] = scores[errors[:, ~own].mean(1).argmin()][own]
    return found


def _scaled(features: Tensor) -> Tensor:
    """Centred features with a mean square length of 1; those that do not vary are 0."""
    features = features.double()
    features = features - features.mean(0)
    length = features.square().sum(1).mean().sqrt()
    return features / length if length > 0 else features


class _Pass(LightningModule):
    def __init__(self, sketch: GradientSketch) -> None:
        super().__init__()
        self.sketch = sketch

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.sketch(batch[0]).cpu()


class GradientSketch(nn.Module):
    """Sketched gradients of images, ``(N, layers, m)``; see `gradient_features`. For `require_gradients`.

    Args:
        backbone: The network, in eval mode.
        layers: Names of layers with parameters.
        draws: Sums of the features.
        width: Places of a sketch, ``m``.
    """

    directions: Tensor
    hashes: Any

    def __init__(self, backbone: Backbone, layers: Sequence[str], draws: int = _DRAWS, width: int = _WIDTH) -> None:
        super().__init__()
        self.backbone, self.width = backbone, width
        self.parts = [list(backbone.layer(layer).parameters()) for layer in layers]
        generator = torch.Generator().manual_seed(0)
        # Buffers move to the device with the module.
        self.register_buffer("directions", _signs(draws, backbone.dim, generator=generator) / draws**0.5)
        sizes = [sum(parameter.numel() for parameter in part) for part in self.parts]
        self.hashes = nn.ModuleList(
            nn.ModuleList(_Hash(size, width, generator) for size in sizes) for _ in range(draws)
        )

    def forward(self, images: Tensor) -> Tensor:
        """``(N, layers, m)`` of images ``(N, C, H, W)``."""
        return torch.stack([self._sketch(image[None]) for image in images])

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

"""The choice of the layers that skip connections lead from, by the gain of a closed-form classifier.

Legend: ``N`` samples, ``K`` classes, ``d_l`` width of a layer's features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ncfinetune.backbone import Backbone
from ncfinetune.layers import PENULTIMATE
from ncfinetune.passes import evaluation, ready_batches, rows_to_choose_by
from ncfinetune.probes import ridge

# Standard errors by which a layer has to lower the leave-one-out error: the best of about 20 useless layers reaches two
# by chance.
_CLEAR = 2.0


def choose_skips(start: Tensor | None, layers: Mapping[str, Tensor], labels: Tensor, most: int = 1) -> list[str]:
    """Layers whose features, concatenated with those chosen so far, most lower ridge regression's leave-one-out error.

    Greedy forward selection: of all layers that lower the mean squared error of the leave-one-out scores by more than
    two standard errors of the paired differences, take the layer that lowers it most; stop when there is no such layer
    or ``most`` layers are chosen.
    The error is exact: with the Gram matrix ``G`` of centred features, ``C = (G + lam I)^-1``, ``c = C 1`` and
    ``alpha = C (Y - 1 b^T)``, the errors are ``alpha_i / (C_ii - c_i^2 / sum(c))`` (see `probes.ridge`), and a
    layer's features ``Z`` change ``C`` by ``-C Z (I + Z^T C Z)^-1 Z^T C`` (Woodbury). The strength ``lam`` is the one
    that ridge regression chooses for the current features.

        >>> labels, noise = torch.arange(90) % 3, torch.Generator().manual_seed(0)
        >>> useful = torch.eye(3)[labels] + 0.1 * torch.randn(90, 3, generator=noise)
        >>> layers = {"a": torch.randn(90, 3, generator=noise), "b": useful}
        >>> choose_skips(torch.randn(90, 4, generator=noise), layers, labels, most=2)
        ['b']

    Args:
        start: Features that the classifier always has, ``(N, d)``; with None the first layer is taken whatever its
            gain.
        layers: Features of each layer, ``(N, d_l)``.
        labels: Classes, ``(N,)``. Memory grows with ``N^2`` and time with ``N^3``; 2,000 samples tell layers apart.
        most: Largest number of layers.

    Returns:
        Names of layers, the most useful first.

    Raises:
        ValueError: As `probes.ridge`; also ``most`` below 1.
    """
    if most < 1:
        raise ValueError(f"expected most of at least 1, got {most}")
    labels = labels.cpu()
    if broken := [name for name, features in layers.items() if not features.isfinite().all()]:
        raise ValueError(f"expected finite features, got nan or inf in those of {', '.join(broken)}")
    blocks = {name: _centred(features) for name, features in layers.items()}
    taken = [] if start is None else [_centred(start)]
    chosen: list[str] = []
    while blocks and len(chosen) < most:
        before, after = _left_out_errors(taken, blocks, labels)
        best = min(after, key=lambda name: float(after[name].mean()))
        gain = before - after[best]
        if taken and not gain.mean() > _CLEAR * gain.std() / len(gain) ** 0.5:
            break
        chosen.append(best)
        taken.append(blocks.pop(best))
    return chosen


def layer_features(
    trainer: Trainer, module: LightningModule, backbone: Backbone
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Penultimate features ``(N, d)``, features ``(N, d_l)`` of each block and labels ``(N,)`` of training images.

    Raises:
        ValueError: As `passes.rows_to_choose_by`.
    """
    rows = rows_to_choose_by(trainer, module, 'skip_from="auto"')
    names = [*backbone.layers, PENULTIMATE]
    with evaluation(trainer, module):
        parts = [(backbone.stages(images, names), labels) for images, labels in ready_batches(trainer, rows)]
    features = {name: torch.cat([stages[name] for stages, _ in parts]) for name in names}
    return features.pop(PENULTIMATE), features, torch.cat([labels for _, labels in parts])


def _centred(features: Tensor) -> Tensor:
    features = features.cpu().double()
    return features - features.mean(0)


def _left_out_errors(
    taken: Sequence[Tensor], blocks: Mapping[str, Tensor], labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared leave-one-out errors ``(N,)`` with the current features, and with each block's features added."""
    classes = int(labels.max()) + 1
    targets = torch.nn.functional.one_hot(labels, classes).double()
    if not taken:  # without features the scores are the shares of the classes among the other samples
        return (len(labels) / (len(labels) - 1) * (targets - targets.mean(0))).square().sum(1), {
            name: _errors(_inverse(features, labels, classes), targets) for name, features in blocks.items()
        }
    inverse = _inverse(torch.cat(list(taken), 1), labels, classes)
    return _errors(inverse, targets), {name: _errors(inverse, targets, z) for name, z in blocks.items()}


def _inverse(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """``C`` at the strength that ridge regression chooses for the features."""
    lam = ridge(features, labels, classes).lam
    assert lam is not None
    gram = features @ features.T
    return torch.cholesky_inverse(torch.linalg.cholesky(gram.diagonal_scatter(gram.diagonal() + lam)))


def _errors(inverse: Tensor, targets: Tensor, block: Tensor | None = None) -> Tensor:
    """Squared leave-one-out errors ``(N,)``, with the features of a block added to those of the inverse."""
    ones_and_targets = torch.cat([torch.ones_like(targets[:, :1]), targets], 1)
    product, diagonal = inverse @ ones_and_targets, inverse.diagonal()
    if block is not None:
        if block.shape[1] > len(block):  # as many columns as samples have the same Gram matrix
            block = torch.linalg.qr(block.T, mode="r").R.T
        half = inverse @ block
        inner = torch.eye(block.shape[1], dtype=torch.float64) + block.T @ half
        solved = torch.linalg.solve(inner, half.T)
        product = product - solved.T @ (half.T @ ones_and_targets)
        diagonal = diagonal - (solved.T * half).sum(1)
    own, rest = product[:, :1], product[:, 1:]
    alpha = rest - own * (rest.sum(0) / own.sum())
    return (alpha / (diagonal - own[:, 0].square() / own.sum())[:, None]).square().sum(1)

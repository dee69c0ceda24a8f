"""Tokens: which positions of a layer's tokens count, told by the features that the network makes of its last ones.

The gradient of the features with respect to tokens ``(N, T, C)`` is 0 at the positions that they do not depend on. In
the last layers those are the patches behind a class token, or the registers in front of the patches; further in,
attention has mixed all positions, so that the positions of the last layers count there too. A layer of another number
of tokens than the last ones has all of its special tokens (class tokens, registers) or none of them yet.

Legend: ``N`` samples, ``C`` channels, ``T`` tokens, ``d`` feature width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ncfinetune.pooling import ALL_TOKENS, CLASS_TOKEN, Positions
from ncfinetune.tracing import Trace

# Features of more than so many parts of a layer's width are not taken for means side by side.
_MOST_PARTS = 4


@dataclass
class FeatureGradients:
    """Gradients of a pass's features with respect to what came before them.

    Args:
        features: What the classifier gets, ``(N, d)``.
        of: Gradients by the tensors' identities, those of which it is known.
    """

    features: Tensor
    of: dict[int, Tensor] = field(default_factory=dict)

    def find(self, wanted: Iterable[Tensor]) -> None:
        """Compute the gradients with respect to the tensors, all in one backward pass."""
        self.of |= self._of_part(list({id(t): t for t in wanted if t.requires_grad}.values()), slice(None))

    def depend_on(self, tensor: Tensor) -> bool:
        """Whether the features do."""
        gradient = self.of.get(id(tensor))
        return gradient is not None and bool(gradient.any())

    def positions(self, tensor: Tensor) -> tuple[Positions, ...]:
        """Positions of the tokens ``(N, T, C)`` that the features depend on; none if on no token.

        Of features that are several parts of the tokens' width, the positions that each of them depends on.
        """
        gradient = self.of.get(id(tensor))
        used = () if gradient is None else _used(gradient)
        if not used:
            return ()
        width, dim = tensor.shape[2], self.features.shape[-1]
        if self.features.ndim != 2 or dim == width or dim % width or dim // width > _MOST_PARTS:
            return (used,)
        parts = [self._of_part([tensor], slice(start, start + width)) for start in range(0, dim, width)]
        groups = [_used(part[id(tensor)]) for part in parts if id(tensor) in part]
        return tuple(dict.fromkeys(group for group in groups if group))

    def _of_part(self, wanted: list[Tensor], part: slice) -> dict[int, Tensor]:
        features = self.features[..., part]
        if not features.requires_grad or not wanted:
            return {}
        # Positive weights that differ: with equal ones the gradient through a normalisation of the features is 0.
        weights = torch.rand(features.shape, generator=torch.Generator().manual_seed(0)).to(features) + 0.5
        found = torch.autograd.grad(features, wanted, weights, retain_graph=True, allow_unused=True)
        return {id(tensor): grad for tensor, grad in zip(wanted, found, strict=True) if grad is not None}


def last_tokens(trace: Trace, samples: int) -> dict[int, Tensor]:
    """The last tokens ``(N, T, C)`` of a pass with each number ``T`` of them, in the order in which they come."""
    last: dict[int, Tensor] = {}
    for call in trace.calls:
        for tensor in call.outputs:
            if tensor.ndim == 3 and tensor.is_floating_point() and len(tensor) == samples:
                last.pop(tensor.shape[1], None)
                last[tensor.shape[1]] = tensor
    return last


class LastTokens:
    """Which positions count at a network's end, and so in layers whose own gradient leaves none out.

    Args:
        last: The last tokens of each number.
        trace: The pass.
        gradients: Those of its features, with respect to these tokens too.
    """

    def __init__(self, last: Mapping[int, Tensor], trace: Trace, gradients: FeatureGradients) -> None:
        positions = {number: gradients.positions(tensor) for number, tensor in last.items()}
        self._ends = {number: used for number, used in positions.items() if used and not is_all(used)}
        # A single token is the class token alone, which says nothing of where it stands among others.
        several = [number for number in last if number in self._ends and number > 1]
        self._final = several[-1] if several else None
        maps = [tensor for call in trace.calls for tensor in call.inputs if tensor.ndim == 4]
        self._aspect = maps[0].shape[2] / maps[0].shape[3] if maps else 1.0

    def positions(self, number: int) -> tuple[Positions, ...]:
        """Positions that count among so many tokens."""
        if number in self._ends:
            return self._ends[number]
        if self._final is None:
            return (ALL_TOKENS,)
        special = next((count for count in range(1, self._final) if self._is_grid(self._final - count)), None)
        # The special tokens are there where the number is that of a grid of patches only without them.
        there = special is not None and not self._is_grid(number) and self._is_grid(number - special)
        return self._ends[self._final] if there else (ALL_TOKENS,)

    def _is_grid(self, patches: int) -> bool:
        """Whether so many patches fill a rectangle of the images' aspect ratio, give or take a column."""
        height = round(math.sqrt(max(patches, 0) * self._aspect))
        return height > 0 and patches % height == 0 and abs(patches / height - height / self._aspect) < 1


def is_all(groups: tuple[Positions, ...]) -> bool:
    """Whether all tokens count."""
    return groups == (ALL_TOKENS,)


def _used(gradient: Tensor) -> Positions:
    """Ranges of the positions at which a gradient ``(N, T, C)`` is not 0."""
    used = (gradient != 0).any(2).any(0).tolist()
    starts = [i for i, u in enumerate(used) if u and (i == 0 or not used[i - 1])]
    stops = [i + 1 for i, u in enumerate(used) if u and (i + 1 == len(used) or not used[i + 1])]
    spans = zip(starts, stops, strict=True)
    # A range to the last token is open, since other images may have more; one token alone stays the class token.
    return tuple((i, None if stop == len(used) and ((i, stop),) != CLASS_TOKEN else stop) for i, stop in spans)

"""Tokens: the positions of a layer's tokens to average, found by the gradient of the network's features.

The gradient of the features with respect to tokens ``(N, T, C)`` is 0 at the positions that they do not depend on. In
the last layers these are the patches after a class token, or the registers before the patches; in earlier layers
attention mixes all positions, so that the positions of the last layers are used. A layer with another number of tokens
than the last ones has either all of the special tokens (class tokens, registers) or none.

Legend: ``N`` samples, ``C`` channels, ``T`` tokens, ``d`` feature width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ncfinetune.pooling import ALL_TOKENS, CLASS_TOKEN, OTHERWISE, Positions, TokensDifferError
from ncfinetune.tracing import Trace

# Features wider than this multiple of a layer's width do not count as concatenated means.
_MOST_PARTS = 4


@dataclass
class FeatureGradients:
    """Gradients of a pass's features with respect to earlier tensors.

    Args:
        features: The classifier's input, ``(N, d)``.
        of: Known gradients, by the identity of the tensor.
    """

    features: Tensor
    of: dict[int, Tensor] = field(default_factory=dict)

    def find(self, wanted: Iterable[Tensor]) -> None:
        """Compute the gradients with respect to the tensors, all in one backward pass."""
        self.of |= self._of_part(list({id(t): t for t in wanted if t.requires_grad}.values()), slice(None))

    def depend_on(self, tensor: Tensor) -> bool:
        """Whether the features depend on the tensor."""
        gradient = self.of.get(id(tensor))
        return gradient is not None and bool(gradient.any())

    def positions(self, tensor: Tensor) -> tuple[Positions, ...]:
        """Positions of the tokens ``(N, T, C)`` that the features depend on; empty if they depend on none.

        If the features are several times as wide as the tokens, the positions that each part depends on.

        Raises:
            TokensDifferError: They differ between samples.
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
        # Positive, unequal weights: with equal weights the gradient through a normalisation of the features is 0.
        weights = torch.rand(features.shape, generator=torch.Generator().manual_seed(0)).to(features) + 0.5
        found = torch.autograd.grad(features, wanted, weights, retain_graph=True, allow_unused=True)
        return {id(tensor): grad for tensor, grad in zip(wanted, found, strict=True) if grad is not None}


def last_tokens(trace: Trace, samples: int) -> dict[int, Tensor]:
    """The last tokens ``(N, T, C)`` of a pass for each number ``T`` of tokens, in the order of the pass."""
    last: dict[int, Tensor] = {}
    for call in trace.calls:
        for tensor in call.outputs:
            if tensor.ndim == 3 and tensor.is_floating_point() and len(tensor) == samples:
                last.pop(tensor.shape[1], None)
                last[tensor.shape[1]] = tensor
    return last


class LastTokens:
    """The positions used at a network's end, for layers whose own gradient is non-zero at all positions.

    Args:
        last: The last tokens for each number of tokens.
        trace: The pass.
        gradients: Gradients of its features, also with respect to these tokens.
    """

    def __init__(self, last: Mapping[int, Tensor], trace: Trace, gradients: FeatureGradients) -> None:
        positions = {number: gradients.positions(tensor) for number, tensor in last.items()}
        ends = {number: used for number, used in positions.items() if used and used != (ALL_TOKENS,)}
        # A single token is the class token alone, whose position among several tokens is unknown.
        several = [number for number in last if number in ends and number > 1]
        self._final = several[-1] if several else None
        # Tokens before the last ones that a part of the features mixes and another uses, as a skip connection does.
        mixed = {number for number, used in ends.items() if number != self._final and ALL_TOKENS in used}
        self._ends = {number: used for number, used in ends.items() if number not in mixed}
        maps = [tensor for call in trace.calls for tensor in call.inputs if tensor.ndim == 4]
        self._aspect = maps[0].shape[2] / maps[0].shape[3] if maps else 1.0

    def positions(self, number: int) -> tuple[Positions, ...]:
        """Positions to average among this number of tokens."""
        if number in self._ends:
            return self._ends[number]
        if self._final is None:
            return (ALL_TOKENS,)
        special = next((count for count in range(1, self._final) if self._is_grid(self._final - count)), None)
        # Special tokens are included if the number fits a grid of patches only without them.
        there = special is not None and not self._is_grid(number) and self._is_grid(number - special)
        return self._ends[self._final] if there else (ALL_TOKENS,)

    def _is_grid(self, patches: int) -> bool:
        """Whether this number of patches fills a grid of the images' aspect ratio, up to one column."""
        height = round(math.sqrt(max(patches, 0) * self._aspect))
        return height > 0 and patches % height == 0 and abs(patches / height - height / self._aspect) < 1


def _used(gradient: Tensor) -> Positions:
    """Ranges of the positions at which a gradient ``(N, T, C)`` is not 0.

    Raises:
        TokensDifferError: They differ between samples, as with padding or where the last token of a text is used. A
            maximum over the tokens, which has other positions in each channel, is not meant.
    """
    channels = gradient != 0
    rows = channels.any(2)
    if (rows != rows[:1]).any() and channels[rows].double().mean() > 0.5:
        raise TokensDifferError(
            "the network computes its features from tokens at other positions in each sample, as texts of different "
            f"lengths have them; {OTHERWISE}"
        )
    used = rows.any(0).tolist()
    starts = [i for i, u in enumerate(used) if u and (i == 0 or not used[i - 1])]
    stops = [i + 1 for i, u in enumerate(used) if u and (i + 1 == len(used) or not used[i + 1])]
    spans = zip(starts, stops, strict=True)
    # A range to the last token is open-ended, since other images may have more tokens; a single token stays one.
    return tuple((i, None if stop == len(used) and ((i, stop),) != CLASS_TOKEN else stop) for i, stop in spans)

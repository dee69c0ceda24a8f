"""Pooling: one vector per sample from a layer's output of any shape.

Legend: ``N`` samples, ``C`` channels, ``T`` tokens, ``H W`` height and width, ``d`` feature width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

# Ranges of token positions, (start, stop or None).
Positions = tuple[tuple[int, int | None], ...]
CLASS_TOKEN: Positions = ((0, 1),)
ALL_TOKENS: Positions = ((0, None),)
# The remedy in errors about a layer that cannot be pooled.
OTHERWISE = "name another layer, or give a callback its own pool="


class NoTensorError(TypeError):
    """The output of a layer holds no tensor that could be pooled."""


class PoolError(ValueError):
    """The pooling of a layer's output cannot be determined."""


class SampleAxisError(PoolError):
    """The samples of a layer's output lie on another axis than its first one."""


class TokensDifferError(PoolError):
    """The features are computed from tokens at other positions in each sample."""


@dataclass(frozen=True)
class Pool:
    """A pooling of a layer's output to one vector per sample.

    Maps ``(N, C, H, W)``, ``(N, H, W, C)`` and other shapes with a channel axis to the mean over all axes other than
    samples and channels; of tokens ``(N, T, C)`` only those are averaged that the network computes its features from.
    ``(N, d)`` is not changed. The result is a copy: later layers may overwrite the output in place.

    Args:
        ndim: Number of dimensions of the output.
        width: Its number of channels ``C``.
        channel: Channel axis: 1 or -1.
        tokens: Positions of the tokens that are averaged; several such means are concatenated, as in the classifier of
            DINOv2 (Oquab et al. 2023, section 7: the class token and the mean of the patches).
        index: Index of the tensor, if the output holds several.
    """

    ndim: int
    width: int
    channel: int = 1
    tokens: tuple[Positions, ...] = (ALL_TOKENS,)
    index: int = 0

    @property
    def dim(self) -> int:
        """Width ``d`` of the pooled features."""
        return self.width * len(self.tokens)

    @property
    def of_tokens(self) -> bool:
        """Whether the outputs are tokens ``(N, T, C)``."""
        return self.ndim == 3 and self.channel == -1

    def describe(self) -> str:
        """The pooling in words."""
        if self.ndim == 2:
            return "as it is"
        if not self.of_tokens:
            return "mean over positions"
        return " beside ".join(map(_in_words, self.tokens))

    def fits(self, output: Any) -> bool:
        """Whether an output has the form that this pool was made for."""
        tensor = self.chosen(output)
        return tensor is not None and tensor.ndim == self.ndim and tensor.shape[self.channel] == self.width

    def chosen(self, output: Any) -> Tensor | None:
        """The tensor at ``index``; None if there are fewer."""
        found = list(tensors(output))
        return found[self.index] if self.index < len(found) else None

    def __call__(self, output: Any, dtype: torch.dtype | None = None) -> Tensor:
        """Pool ``output`` to ``(N, d)``, cast to ``dtype`` before any sum; None keeps the output's dtype.

        Raises:
            PoolError: The output has another form than the one that this pool was made for.
        """
        tensor = self.chosen(output)
        if tensor is None or not self.fits(output):
            form = "nothing" if tensor is None else tuple(tensor.shape)
            raise PoolError(
                f"expected a layer output of {self.ndim} dimensions and {self.width} channels, as it was before, "
                f"got {form}"
            )
        if self.ndim == 2:
            return tensor.to(dtype or tensor.dtype, copy=True)
        if self.of_tokens:
            means = [_chosen(tensor, positions).mean(1, dtype=dtype) for positions in self.tokens]
            return means[0] if len(means) == 1 else torch.cat(means, 1)
        channel = self.channel % self.ndim
        return tensor.mean([axis for axis in range(1, self.ndim) if axis != channel], dtype=dtype)


def _chosen(tensor: Tensor, positions: Positions) -> Tensor:
    parts = [tensor[:, start:stop] for start, stop in positions]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _in_words(positions: Positions) -> str:
    if positions == CLASS_TOKEN:
        return "class token"
    if positions == ALL_TOKENS:
        return "mean of the tokens"
    if len(positions) == 1 and positions[0][1] is None:
        return f"mean of the tokens behind the first {positions[0][0]}"
    return f"mean of the tokens {', '.join(_span(start, stop) for start, stop in positions)}"


def _span(start: int, stop: int | None) -> str:
    if stop == start + 1:
        return str(start)
    return f"{start} to {'the last' if stop is None else stop - 1}"


@contextmanager
def caught(layers: Mapping[str, nn.Module], pools: Mapping[str, Pool]) -> Iterator[dict[str, Tensor]]:
    """A context that captures the layers' pooled outputs, ``{name: (N, d)}``, in the order in which they run."""
    features: dict[str, Tensor] = {}

    def catch(name: str) -> Any:
        return lambda module, args, output: features.__setitem__(name, pools[name](output))

    handles = [layer.register_forward_hook(catch(name)) for name, layer in layers.items()]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in a layer's output, a tensor, tuple, mapping or dataclass, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for value in output:
            yield from tensors(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from tensors(getattr(output, field.name))


def detached(output: Any) -> Any:
    """A layer's output with every tensor detached."""
    return apply_to_collection(output, Tensor, Tensor.detach)


def silent(name: str) -> ValueError:
    """The error for a layer that has no output in a pass."""
    return ValueError(
        f"layer {name!r} did not run in this pass of the network; name one that does (gradient checkpointing runs the "
        "blocks of a stage, but not the stage)"
    )


def no_tensor(name: str, output: Any) -> NoTensorError:
    """The error for an output of a layer that holds no tensor."""
    return NoTensorError(
        f"expected the output of layer {name!r} to be a tensor, or something that holds one, "
        f"got {type(output).__name__}; name another layer"
    )

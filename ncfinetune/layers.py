"""Layers by name: find them, catch their outputs, pool those to one vector a sample.

A layer's name is its dotted module path (``layer3.1``, ``blocks.8``). The end of a longer path will do as long as only
one module fits, so that ``layer3.1`` is the word for ``backbone.net.layer3.1`` too, in whatever module it sits.

Legend: ``N`` samples, ``C`` channels, ``T`` tokens, ``H W`` height and width, ``d`` feature width.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

# The word for the features that reach the classifier, where a layer's name is expected.
PENULTIMATE = "penultimate"

# The residual and transformer blocks of timm, torchvision and Hugging Face end their class names so.
_BLOCK = re.compile(r"(Block|Bottleneck|Residual|SeparableConv|EncoderLayer|ViTLayer|SwinLayer)(\dd|V\d)?$")


def find_layers(module: nn.Module, patterns: Iterable[str]) -> dict[str, nn.Module]:
    """The submodules that the patterns name, in the order in which ``module`` holds them.

    A pattern is held against the end of each dotted path, part by part: ``*``, ``?`` and ``[...]`` never cross a dot,
    so that ``layer*.*`` means the blocks of a ResNet and not their convolutions.

    Returns:
        ``{name: submodule}``; a name is the part of the path that its pattern matched.

    Raises:
        ValueError: A pattern fits no layer, or one name fits several.
    """
    paths = {path: layer for path, layer in module.named_modules() if path}
    names: dict[str, str] = {}
    for pattern in patterns:
        names |= _match(paths, pattern, module)
    return {names[path]: layer for path, layer in paths.items() if path in names}


def _match(paths: Mapping[str, nn.Module], pattern: str, module: nn.Module) -> dict[str, str]:
    if pattern in paths:
        return {pattern: pattern}
    tails = {path: ".".join(path.split(".")[-pattern.count(".") - 1 :]) for path in paths}
    fitting = {path: tail for path, tail in tails.items() if _fits(tail, pattern)}
    if not fitting:
        raise ValueError(_no_match(pattern, module, paths))
    for tail in fitting.values():
        same = [path for path, other in fitting.items() if other == tail]
        if len(same) > 1:
            raise ValueError(f"layer name {tail!r} fits {len(same)} modules ({_some(same)}); give a longer path")
    return fitting


def _fits(tail: str, pattern: str) -> bool:
    parts, wanted = tail.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _no_match(pattern: str, module: nn.Module, paths: Iterable[str]) -> str:
    blocks = block_names(module)
    ends = {".".join(path.split(".")[-pattern.count(".") - 1 :]) for path in paths}
    nearest = difflib.get_close_matches(pattern, dict.fromkeys([*blocks, *sorted(ends)]), n=3)
    hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
    return f"no layer fits {pattern!r}; expected a block ({_some(blocks, 40)}) or another module path{hint}"


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def block_names(module: nn.Module) -> list[str]:
    """Dotted paths of the outermost residual or transformer blocks, known by their class's name."""
    blocks: list[str] = []
    for path, layer in module.named_modules():
        inside = blocks and path.startswith(blocks[-1] + ".")
        if not inside and path and _BLOCK.search(type(layer).__name__):
            blocks.append(path)
    return blocks


@contextmanager
def caught(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """Catch what the layers put out while the context lasts: ``{name: output}``, in the order in which they ran."""
    outputs: dict[str, Any] = {}

    def catch(name: str) -> Any:
        return lambda module, args, output: outputs.__setitem__(name, output)

    handles = [layer.register_forward_hook(catch(name)) for name, layer in layers.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Pool:
    """How a network makes one vector of what its layers put out.

    Maps ``(N, C, H, W)`` to the mean over positions ``(N, C)``, and tokens ``(N, T, C)`` to the class token or to the
    mean over the tokens that stand for image patches; ``(N, d)`` stays as it is.

    Args:
        channels_last: Four-dimensional outputs are ``(N, H, W, C)``, as in Swin.
        prefix_tokens: Class and register tokens that precede the patch tokens.
        class_token: Take the first token instead of the mean over patch tokens.
    """

    channels_last: bool = False
    prefix_tokens: int = 0
    class_token: bool = False

    @classmethod
    def of(cls, network: nn.Module) -> Pool:
        """The pooling that a network applies to its last features, as far as its attributes tell.

        A timm network says it outright; of others, one with a parameter ``cls_token`` or ``class_token`` (Hugging Face,
        torchvision) takes its class token, and any other takes means.
        """
        prefix_tokens = getattr(network, "num_prefix_tokens", None)
        if prefix_tokens is None:
            prefix_tokens = sum(name.endswith(("cls_token", "class_token")) for name, _ in network.named_parameters())
        return cls(
            channels_last=getattr(network, "output_fmt", None) == "NHWC",
            prefix_tokens=prefix_tokens,
            class_token=prefix_tokens > 0 and getattr(network, "global_pool", "token") == "token",
        )

    def describe(self, ndim: int) -> str:
        """What becomes of an output of so many dimensions, in words."""
        if ndim == 3:
            skipped = f" behind the first {self.prefix_tokens}" if self.prefix_tokens else ""
            return "class token" if self.class_token else f"mean of the tokens{skipped}"
        return "mean over positions" if ndim == 4 else "as it is"

    def __call__(self, output: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Pool ``output`` to ``(N, d)``, in ``dtype`` from before the first sum; None is the output's own.

        Raises:
            ValueError: ``output`` has neither two, three nor four dimensions.
        """
        if output.ndim == 4:
            return output.mean((1, 2) if self.channels_last else (2, 3), dtype=dtype)
        if output.ndim == 3 and not self.class_token:
            return output[:, self.prefix_tokens :].mean(1, dtype=dtype)
        if output.ndim in (2, 3):
            return (output[:, 0] if output.ndim == 3 else output).to(dtype or output.dtype)
        raise ValueError(
            f"expected a layer output of shape (N, d), (N, T, C) or (N, C, H, W), got {tuple(output.shape)}"
        )

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

# The residual, inverted residual and transformer blocks of timm and torchvision end their class names so, and those of
# Hugging Face, where every part is a layer.
_BLOCK = re.compile(
    r"(Block|Bottleneck|Residual|SeparableConv|ConvBnAct|MBConv)(\dd|V\d)?$"
    r"|(Encoder|ViT|DeiT|Beit|Swin|Swinv2|ConvNext|ConvNextV2|Dinov2|Dinov2WithRegisters|ResNetBasic|ResNetBottleNeck)Layer$"
)


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


def enclosing_block(module: nn.Module, name: str) -> str:
    """Path of the block that holds a layer, or of the layer itself where none does."""
    layer = next(iter(find_layers(module, [name]).values()))
    path = next(path for path, part in module.named_modules() if part is layer)
    return next((block for block in block_names(module) if path.startswith(f"{block}.")), path)


@contextmanager
def caught(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """Catch what the layers put out while the context lasts: ``{name: output}``, in the order in which they ran.

    Of a tuple, which some blocks of Hugging Face return, the first element is the output.
    """
    outputs: dict[str, Any] = {}

    def catch(name: str) -> Any:
        return lambda module, args, output: outputs.__setitem__(name, first(output))

    handles = [layer.register_forward_hook(catch(name)) for name, layer in layers.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def first(output: Any) -> Any:
    """The first element of a tuple, and anything else as it is."""
    return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class Pool:
    """How a network makes one vector of what its layers put out.

    Maps ``(N, C, H, W)`` to the mean over positions ``(N, C)``, and tokens ``(N, T, C)`` to the class token or to the
    mean over the tokens that stand for image patches; ``(N, d)`` stays as it is. The distillation token of DeiT counts
    as a second class token (Touvron et al. 2021, section 4), whose mean with the first is taken. A network that attends
    over its last tokens to pool them has no weights for inner ones: there it is the mean over patches.

    Args:
        channels_last: Four-dimensional outputs are ``(N, H, W, C)``, as in Swin.
        prefix_tokens: Class and register tokens that precede the patch tokens.
        class_tokens: Take the mean over this many first tokens instead of the one over patch tokens; 0 is the latter.
    """

    channels_last: bool = False
    prefix_tokens: int = 0
    class_tokens: int = 0

    @classmethod
    def of(cls, network: nn.Module) -> Pool:
        """The pooling that a network applies to its last features, as far as its attributes tell.

        A timm network says it outright; of others, one with a parameter ``cls_token`` or ``class_token`` (Hugging Face,
        torchvision) takes its class token, and any other takes means.
        """
        # CaiT and XCiT let the class token in after their blocks.
        late = hasattr(network, "blocks_token_only") or hasattr(network, "cls_attn_blocks")
        prefix_tokens = 0 if late else getattr(network, "num_prefix_tokens", None)
        if prefix_tokens is None:
            prefix_tokens = sum(name.endswith(("cls_token", "class_token")) for name, _ in network.named_parameters())
        by_class_token = prefix_tokens > 0 and getattr(network, "global_pool", "token") == "token"
        return cls(
            channels_last=getattr(network, "output_fmt", None) == "NHWC",
            prefix_tokens=prefix_tokens,
            class_tokens=by_class_token * (2 if hasattr(network, "head_dist") else 1),
        )

    def describe(self, ndim: int) -> str:
        """What becomes of an output of so many dimensions, in words."""
        if ndim == 3:
            skipped = f" behind the first {self.prefix_tokens}" if self.prefix_tokens else ""
            return "class token" if self.class_tokens else f"mean of the tokens{skipped}"
        return "mean over positions" if ndim == 4 else "as it is"

    def __call__(self, output: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Pool ``output`` to ``(N, d)``, in ``dtype`` from before the first sum; None is the output's own.

        Raises:
            ValueError: ``output`` has neither two, three nor four dimensions.
        """
        if output.ndim == 4:
            return output.mean((1, 2) if self.channels_last else (2, 3), dtype=dtype)
        if output.ndim == 3:
            tokens = output[:, : self.class_tokens] if self.class_tokens else output[:, self.prefix_tokens :]
            return tokens.mean(1, dtype=dtype)
        if output.ndim == 2:
            return output.to(dtype or output.dtype)
        raise ValueError(
            f"expected a layer output of shape (N, d), (N, T, C) or (N, C, H, W), got {tuple(output.shape)}"
        )

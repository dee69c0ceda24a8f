"""Layers by name.

A layer's name is its dotted module path (``layer3.1``, ``blocks.8``) or the end of the path, so that ``layer3.1`` also
names ``backbone.net.layer3.1`` of a surrounding module. Of several modules that fit it names the one whose surrounding
module has all the others (``net.blocks.0``, not ``net.blocks.0.blocks.0``); if there is none, the name is ambiguous.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from ncfinetune.blocks import block_names
from ncfinetune.texts import some

# The layer name of the features that reach the classifier.
PENULTIMATE = "penultimate"


def find_layers(module: nn.Module, patterns: Iterable[str]) -> dict[str, nn.Module]:
    """The submodules that the patterns name, in the order of ``named_modules``.

    A pattern is matched with the end of each dotted path, part by part: ``*``, ``?`` and ``[...]`` never cross a dot,
    so that ``layer*.*`` matches the blocks of a ResNet and not their convolutions.

    Returns:
        ``{name: submodule}``; a name is the part of the path that its pattern matched.

    Raises:
        ValueError: A pattern fits no layer, or a name is ambiguous.
    """
    paths = {path: layer for path, layer in module.named_modules() if path}
    names: dict[str, str] = {}
    for pattern in patterns:
        names |= _match(paths, pattern, module)
    return {names[path]: layer for path, layer in paths.items() if path in names}


def _match(paths: Mapping[str, nn.Module], pattern: str, module: nn.Module) -> dict[str, str]:
    if pattern in paths:
        return {pattern: pattern}
    fitting = fitting_paths(paths, pattern)
    if not fitting:
        raise ValueError(_no_match(pattern, module, paths))
    return {_outermost(tail, fitting): tail for tail in dict.fromkeys(fitting.values())}


def _outermost(tail: str, fitting: Mapping[str, str]) -> str:
    """The path with this end whose surrounding module has all others."""
    same = [path for path, other in fitting.items() if other == tail]
    first = min(same, key=len)
    if not all(path.startswith(first.removesuffix(tail)) for path in same):
        raise ValueError(f"layer name {tail!r} fits {len(same)} modules ({some(same, 4)}); give a longer path")
    return first


def fitting_paths(paths: Iterable[str], pattern: str) -> dict[str, str]:
    """The dotted paths whose end a pattern fits, with that end: ``{path: end}``."""
    tails = {path: ".".join(path.split(".")[-pattern.count(".") - 1 :]) for path in paths}
    return {path: tail for path, tail in tails.items() if _fits(tail, pattern)}


def _fits(tail: str, pattern: str) -> bool:
    parts, wanted = tail.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _no_match(pattern: str, module: nn.Module, paths: Iterable[str]) -> str:
    blocks = block_names(module)
    ends = {".".join(path.split(".")[-pattern.count(".") - 1 :]) for path in paths}
    nearest = difflib.get_close_matches(pattern, dict.fromkeys([*blocks, *sorted(ends)]), n=3)
    hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
    return f"no layer fits {pattern!r}; expected a block ({some(blocks, 40)}) or another module path{hint}"


def enclosing_block(module: nn.Module, name: str) -> str:
    """Path of the block that contains a layer, or of the layer itself if no block does."""
    layer = next(iter(find_layers(module, [name]).values()))
    path = next(path for path, part in module.named_modules() if part is layer)
    return next((block for block in block_names(module) if path.startswith(f"{block}.")), path)

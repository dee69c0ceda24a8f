"""Blocks: the units that a network repeats, found by its structure."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Children numbered by name form a row without a container: layer1, s1, Mixed_5b, cell_stem_0, block12.
_IN_A_ROW = re.compile(r"(.*?)_?\d+[a-z]?$")
# Structure alone cannot distinguish these blocks from stages. Their inner rows process windows instead of samples
# (MobileViT), append channels to a list (DenseNet) or run in parallel (CrossViT).
_BLOCKS_THAT_LOOK_LIKE_STAGES = re.compile(
    r"(DenseBlock|MultiScaleBlock|MaxVitBlock|MobileVi[tT](V2)?(Block|Layer)(V2)?)$"
)
# Children that only prepare a stage's input for its row of blocks: down-sampling, GC-ViT's generator of global queries.
_BEFORE_THE_ROW = re.compile(r"downsample|global_block$")
# peft's name for the layer that an adapter, or a trainable copy, wraps.
_WRAPPED = ("base_layer", "original_module")
# A module without a repeated unit still is a stage if its units have at least this share of its parameters: a block
# with one helper inside, such as squeeze and excitation, has far more parameters outside the helper.
_STAGE_SHARE = 0.8


def block_names(module: nn.Module) -> list[str]:
    """Dotted paths of a network's blocks: the outermost repeated units, in the order of the network's submodules.

    A unit is part of a row (a container, or children numbered by name) and mixes channels at least twice, as residual
    and transformer blocks, Inception modules and NASNet cells do. A module that contains rows of units is a stage, not
    a unit. Networks without such units have smaller ones: a convolution with its normalisation, or single layers as in
    VGG. A layer wrapped by peft counts as the original layer.
    """
    for kind in (_Unit(2), _Unit(1, sequential=True), _Unit(1, sequential=True, leaf=True)):
        if found := _repeated(_units(module, kind), module):
            return list(found)
    return []


@dataclass(frozen=True)
class _Unit:
    """A kind of unit: how often it mixes channels, and whether it may be a bare Sequential or a leaf."""

    mixes: int
    sequential: bool = False
    leaf: bool = False

    def fits(self, module: nn.Module) -> bool:
        module = _unwrapped(module)
        if type(module) in _CONTAINERS and not (self.sequential and type(module) is nn.Sequential):
            return False
        if not self.leaf and not any(True for _ in module.children()):
            return False
        return sum(map(_mixes_channels, _weights(module))) >= self.mixes


def _mixes_channels(weight: Tensor) -> bool:
    """Whether a weight is a matrix or the kernel of a convolution that is not depthwise."""
    return weight.ndim >= 2 and not (weight.ndim > 2 and weight.shape[1] == 1)


def _units(module: nn.Module, kind: _Unit) -> dict[str, nn.Module]:
    """The outermost units inside a module, by path relative to it, in the order of its submodules."""
    if _unwrapped(module) is not module:
        return {}
    children = {name: child for name, child in module.named_children() if not _BEFORE_THE_ROW.match(name)}
    rows: dict[Any, list[str]] = defaultdict(list)
    for name, child in children.items():
        row = _row(module, name, kind)
        rows[name if row is None else (type(_unwrapped(child)), row)].append(name)
    found: dict[str, nn.Module] = {}
    for row, names in rows.items():
        members = {name: children[name] for name in names}
        inside = {name: _units(child, kind) for name, child in members.items()}
        units = _units_of_row(members, inside, kind) if isinstance(row, tuple) else inside
        for name in names:
            found |= {f"{name}.{path}".rstrip("."): unit for path, unit in units[name].items()}
    order = {id(part): i for i, part in enumerate(module.modules())}
    return dict(sorted(found.items(), key=lambda item: order[id(item[1])]))


def _units_of_row(
    members: Mapping[str, nn.Module], inside: Mapping[str, dict[str, nn.Module]], kind: _Unit
) -> dict[str, dict[str, nn.Module]]:
    """Units of the modules of one class in a row: the modules, or the units inside them if they are stages."""
    if any(_is_stage(member, inside[name]) for name, member in members.items()):
        # A stage may have smaller units than its siblings: the first and last stages of MobileNets.
        return {name: inside[name] or _small_units(member) for name, member in members.items()}
    if any(map(kind.fits, members.values())):
        return {name: {"": member} if _size(member) else {} for name, member in members.items()}
    return dict(inside)


def _small_units(stage: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in stage.named_children() if _Unit(1).fits(child)}


def _row(module: nn.Module, name: str, kind: _Unit) -> str | None:
    """The row of a child: its name without the number; empty in a container; None if it is in no row."""
    if isinstance(module, _CONTAINERS):
        return ""
    # Numbered children of a class named a block are parts of the block: norm1, ffn1.
    parts = kind.leaf or type(module).__name__.endswith("Block")
    numbered = None if parts else _IN_A_ROW.match(name)
    return numbered[1] if numbered else None


def _is_stage(module: nn.Module, inside: Mapping[str, nn.Module]) -> bool:
    """Whether a module is a row of units and little else, not a unit with a small helper as squeeze and excitation."""
    if not inside or _BLOCKS_THAT_LOOK_LIKE_STAGES.search(type(module).__name__):
        return False
    repeated = max(Counter(type(_unwrapped(unit)) for unit in inside.values()).values()) > 1
    return repeated or sum(map(_size, inside.values())) >= _STAGE_SHARE * _size(module)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The layer that a module of peft wraps; other modules unchanged."""
    if not type(module).__module__.startswith("peft."):
        return module
    return next((_unwrapped(child) for name, child in module.named_children() if name in _WRAPPED), module)


def _weights(module: nn.Module) -> Iterable[nn.Parameter]:
    """The parameters of a network, each once, without those of adapters."""
    inner = _unwrapped(module)
    own = {id(p): p for p in inner.parameters(recurse=False)}
    for child in inner.children():
        own |= {id(p): p for p in _weights(child)}
    return own.values()


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in _weights(module))


def _repeated(units: dict[str, nn.Module], module: nn.Module) -> dict[str, nn.Module]:
    """Units of a class that occurs more than once, and other units of the same row or of a sibling stage.

    If no class is repeated, as in a network reduced to one layer, the units that are in a container.
    """
    counts = Counter(type(_unwrapped(unit)) for unit in units.values())
    rows = {_above(path) for path, unit in units.items() if counts[type(_unwrapped(unit))] > 1}
    stages = {_above(row) for row in rows if row}
    near = {path for path in units if _above(path) in rows or (_above(path) and _above(_above(path)) in stages)}
    near |= {path for path in units if not rows and isinstance(module.get_submodule(_above(path)), _CONTAINERS)}
    return {path: unit for path, unit in units.items() if path in near}


def _above(path: str) -> str:
    return path.rpartition(".")[0]

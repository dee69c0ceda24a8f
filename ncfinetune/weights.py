"""Loading files of weights of any library into a network, with a report of the parameters that stay random.

A file holds one or several sets of weights: every dictionary of tensors in it, at any depth, is a set, and its path in
the file is its ``key``. In a set a ``prefix`` may precede a network's names: ``module.encoder_q.conv1.weight``.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from timm.models import adapt_input_conv, model_entrypoint
from torch import Tensor

from ncfinetune.texts import some
from ncfinetune.weight_files import read, save

# Share of a network's values below which the weights are probably those of another architecture.
_ENOUGH = 0.75
# A set that fits this share of the values of the best set is an equally good candidate: the two differ by less than a
# layer, as averaged weights without buffers differ from the weights.
_AS_GOOD = 0.9
# Names in timm's modules of the functions that convert published files.
_FILTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")
# peft's prefix of a tensor's own name in a layer with an adapter.
_BASE_LAYER = ".base_layer."


@dataclass(frozen=True)
class Source:
    """The location of weights.

    Args:
        path: The file.
        key: Path of the dictionary of tensors in the file, joined by dots; None is the one that fits best.
        prefix: Prefix of the network's names there; None is the one that fits best.
    """

    path: str
    key: str | None = None
    prefix: str | None = None

    @classmethod
    def of(cls, checkpoint: str | Path | Mapping[str, str | None]) -> Source:
        """From a path, or from a mapping of ``path`` and, optionally, ``key`` and ``prefix``.

        Raises:
            ValueError: Other entries, or no path.
        """
        if not isinstance(checkpoint, Mapping):
            return cls(str(checkpoint))
        if not checkpoint.get("path") or not set(checkpoint) <= {"path", "key", "prefix"}:
            raise ValueError(f"expected a checkpoint of path, key and prefix, got {', '.join(map(str, checkpoint))}")
        return cls(**checkpoint)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Reading:
    """The tensors of one set of weights that fit a network.

    Args:
        key: Path of the set in the file.
        prefix: Prefix of the network's names there.
        tensors: The tensors that fit, under the network's names.
        adapted: Names of tensors that had another shape in the file.
        unused: Names in the set that the network does not have.
    """

    key: str
    prefix: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    adapted: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Number of values that fit."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def same(self, other: Reading) -> bool:
        """Whether both readings give the same network."""
        names = self.tensors.keys() & other.tensors.keys()
        return all(torch.equal(self.tensors[name], other.tensors[name]) for name in names)

    def __str__(self) -> str:
        return f"key={self.key!r}, prefix={self.prefix!r}"


def load(
    net: Any, checkpoint: str | Path | Mapping[str, str | None], in_chans: int = 3
) -> tuple[set[str], dict[str, Any]]:
    """Load the weights of a file into a network, and report which tensors fitted and which did not change.

    Of all sets of weights in the file, with all prefixes, the one that fits most of the network's values is loaded. If
    a different set fits at least nine tenths as many values, an error asks to choose. Tensors of other shapes are
    adapted as timm adapts its own weights: the first convolution to another number of channels, position embeddings to
    another grid, window tables to another window size, names of the authors' code to timm's names. The name
    ``shortcut`` for ``downsample`` and numbers for the parts of an `nn.Sequential` are recognised too. Classifiers are
    ignored.

    A warning names the parameters that stay random.

    Args:
        net: The network.
        checkpoint: The file, or its path, key and prefix; see `Source`.
        in_chans: Channels of the network's images.

    Returns:
        Names of the network's tensors that were loaded, and the file's image preprocessing and class names.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file holds no weights, none that fit, several sets that fit equally well, or unmerged adapters.
    """
    source = Source.of(checkpoint)
    content, data = read(source.path)
    found = _chosen(_readings(content, net, source, in_chans), source)
    own = net.state_dict()
    missing = [name for name in own if name not in found.tensors]
    wrapped = [_BASE_LAYER.join(name.rpartition(".")[::2]) for name in missing]
    _refuse_adapters(source.path, [name for name in wrapped if name in found.unused])
    parts = [f"checkpoint {source.path}: {len(found.tensors)} of {len(own)} tensors of the network matched"]
    if found.key or found.prefix:
        parts[0] += f" under {found}"
    parts += [f"adapted to the network: {_counted(found.adapted)}"] if found.adapted else []
    parts += [f"not in the file or of another shape: {_counted(missing)}"] if missing else []
    parts += [f"in the file but unused: {_counted(found.unused)}"] if found.unused else []
    report = "; ".join(parts)
    if not any(name in found.tensors for name, _ in net.named_parameters()):
        raise ValueError(f"{report}. Expected the weights of the same architecture.")
    net.load_state_dict(found.tensors, strict=False)
    share = found.size / sum(value.numel() for value in own.values())
    if share < _ENOUGH:
        rank_zero_warn(f"{report}. That is {share:.0%} of the network's values: are they of the same architecture?")
    elif any(own[name].is_floating_point() for name in missing):
        rank_zero_warn(f"{report}. Parameters that are not in the file stay random")
    else:
        rank_zero_info(report)
    return set(found.tensors), data


def export(checkpoint: str, path: str) -> str:
    """Write the backbone's weights of a learner's checkpoint to a file, and return a one-line report.

    Raises:
        FileNotFoundError: No such checkpoint.
        ValueError: It is not a learner's checkpoint, it has unmerged adapters, or the file's suffix is unknown.
    """
    prefix = "backbone.net."
    content, data = read(checkpoint)
    stored = content.get("state_dict", content)
    named = dict(_sets(stored)).get("", {}) if isinstance(stored, dict) else {}
    weights = {key.removeprefix(prefix): value for key, value in named.items() if key.startswith(prefix)}
    if not weights:
        raise ValueError(f"checkpoint {checkpoint!r} has no tensors below {prefix!r}, only {_counted(list(named))}")
    _refuse_adapters(checkpoint, [key for key in weights if _BASE_LAYER in key])
    save(weights, path, data)
    return f"{path}: {len(weights)} tensors of the backbone of {checkpoint}"


def _refuse_adapters(checkpoint: str | Path, names: list[str]) -> None:
    if names:
        raise ValueError(
            f"checkpoint {str(checkpoint)!r} has unmerged adapters ({_counted(names)}); merge them by "
            "load_from_checkpoint of the learner and backbone.save"
        )


def _sets(content: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary of tensors, at any depth, with its path."""
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield path, tensors
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping):
            yield from _sets(value, f"{path}.{key}" if path else key)


def _readings(content: Mapping[str, Any], net: Any, source: Source, in_chans: int) -> list[Reading]:
    """The readings of each set of weights that the source allows, with each likely prefix."""
    sets = dict(_sets(content))
    if not sets:
        raise ValueError(f"checkpoint {source.path!r} holds no tensors, only {_counted(list(content))}")
    wanted = sets
    if source.key is not None:
        wanted = {key: tensors for key, tensors in sets.items() if f"{key}.".startswith(f"{source.key}.")}
    if not wanted:
        raise ValueError(
            f"checkpoint {source.path!r} has no tensors under key={source.key!r}, only {some(map(repr, sets), 8)}"
        )
    own = net.state_dict()
    places = [
        (known, key, prefix, tensors)
        for key, stored in wanted.items()
        for tensors in _spellings(stored, net)
        for prefix, known in _prefixes(tensors, own, source.prefix).items()
    ]
    if not places:
        there = dict.fromkeys(name.rpartition(".")[0] for tensors in wanted.values() for name in tensors)
        shown = some(map(repr, there), 8)
        raise ValueError(f"checkpoint {source.path!r} has no tensors under prefix={source.prefix!r}, only {shown}")
    most = max(known for known, *_ in places)
    best: dict[tuple[str, str], Reading] = {}
    for known, key, prefix, tensors in places:
        if 2 * known < most and prefix not in ("", _common_prefix(tensors)):
            continue
        reading = _reading(key, prefix, tensors, net, own, in_chans)
        if (key, prefix) not in best or reading.size > best[key, prefix].size:
            best[key, prefix] = reading
    return list(best.values())


def _chosen(readings: list[Reading], source: Source) -> Reading:
    best = max(readings, key=lambda reading: reading.size)
    rivals = [r for r in readings if r.size and r.size >= _AS_GOOD * best.size and not r.same(best)]
    if rivals:
        choices = ", or ".join(map(str, [best, *rivals]))
        raise ValueError(
            f"checkpoint {source.path!r} holds several sets of weights that fit equally well: {choices}; "
            "choose one: checkpoint={path: ..., key: ..., prefix: ...}"
        )
    return best


def _spellings(tensors: dict[str, Tensor], net: Any) -> Iterator[dict[str, Tensor]]:
    """The set, and with timm's names for parts that are called ``shortcut`` or, in an `nn.Sequential`, numbered."""
    yield tensors  # some of timm's networks have parts of that name themselves
    spelt_out = {_as_timm(name): tensor for name, tensor in tensors.items()}
    if spelt_out.keys() != tensors.keys():
        yield spelt_out
    parts = [name for name, part in net.named_children() if part.state_dict()]
    starts = {name[: digits.start()] for name in tensors for digits in re.finditer(r"(?<![^.])\d+\.", name)}
    for start in sorted(starts):
        below = {name.removeprefix(start).partition(".")[0] for name in tensors if name.startswith(start)}
        numbers = sorted(below, key=int) if all(map(str.isdecimal, below)) else []
        if len(numbers) - len(parts) in (0, 1):  # one more is a classifier
            spelt = {f"{start}{number}.": f"{start}{part}." for number, part in zip(numbers, parts, strict=False)}
            yield {_renamed(name, start, spelt): tensor for name, tensor in tensors.items()}


def _as_timm(name: str) -> str:
    return re.sub(r"(?<![^.])shortcut\.", "downsample.", name)


def _renamed(name: str, start: str, spelt: Mapping[str, str]) -> str:
    head = start + name.removeprefix(start).partition(".")[0] + "."
    return _as_timm(spelt.get(head, head) + name[len(head) :]) if name.startswith(start) else name


def _prefixes(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], wanted: str | None) -> dict[str, int]:
    """Possible prefixes of a network's names, with the number of names that each one matches."""
    if wanted is not None:
        prefix = f"{wanted.removesuffix('.')}." if wanted else ""
        return {prefix: 1} if any(name.startswith(prefix) for name in tensors) else {}
    found = Counter({"": 0, _common_prefix(tensors): 0})
    for name in tensors:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in own:
                found["".join(f"{part}." for part in parts[:start])] += 1
    return dict(found)


def _common_prefix(names: Collection[str]) -> str:
    """The common prefix of all names up to a dot."""
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind(".", 0, same) + 1]


def _reading(
    key: str, prefix: str, tensors: Mapping[str, Tensor], net: Any, own: Mapping[str, Tensor], in_chans: int
) -> Reading:
    below = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    beside = [name for name in tensors if not name.startswith(prefix)]
    versions = [below]
    for convert in _filters(net):
        # Each assumes its authors' files and may raise anything for others; torch warns of slow operations in them.
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            versions.append(convert(dict(below)))
    readings = []
    for version in versions:
        fitting = {name: _adapted(name, tensor, net, own, in_chans) for name, tensor in version.items() if name in own}
        kept = {name: tensor for name, tensor in fitting.items() if tensor.shape == own[name].shape}
        changed = [name for name, tensor in kept.items() if name in below and tensor.shape != below[name].shape]
        unused = [name for name in version if name not in kept and isinstance(version[name], Tensor)]
        readings.append(Reading(key, prefix, kept, changed, [*unused, *beside]))
    return max(readings, key=lambda reading: reading.size)


def _filters(net: Any) -> list[Callable[[dict[str, Tensor]], dict[str, Tensor]]]:
    """The conversions that timm applies to published files for such a network."""
    architecture = net.pretrained_cfg.get("architecture")
    homes = [type(net).__module__]
    if architecture and timm.is_model(architecture):
        homes.append(model_entrypoint(architecture).__module__)
    functions = [getattr(sys.modules[home], name, None) for home in dict.fromkeys(homes) for name in _FILTERS]
    return [_filter(function, net) for function in dict.fromkeys(functions) if function is not None]


def _filter(function: Any, net: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    taken = inspect.signature(function).parameters
    further = {"adapt_layer_scale": True} if "adapt_layer_scale" in taken else {}
    return (lambda tensors: function(tensors, net, **further)) if "model" in taken else function


def _adapted(name: str, tensor: Tensor, net: Any, own: Mapping[str, Tensor], in_chans: int) -> Tensor:
    """The weight of the first convolution adapted to the network's number of channels; other tensors unchanged.

    A stem that moves positions to channels has several inputs for each channel; timm adapts those of three channels to
    one, and the weights of others stay unchanged, and do not fit.
    """
    firsts = net.pretrained_cfg.get("first_conv") or ()
    firsts = (firsts,) if isinstance(firsts, str) else firsts
    channels = own[name].shape[1] if own[name].ndim == 4 else 0
    if name not in {f"{first}.weight" for first in firsts} or tensor.ndim != 4 or tensor.shape[1] == channels:
        return tensor
    if channels > in_chans:
        return adapt_input_conv(1, tensor) if in_chans == 1 and tensor.shape[1] == 3 * channels else tensor
    try:
        further = {} if tensor.shape[1] == 3 else {"base_chans": tensor.shape[1]}
        return adapt_input_conv(channels, tensor, **further)
    except (NotImplementedError, TypeError):  # not of a Conv2d, or a timm that knows no base_chans
        return tensor


def _counted(keys: list[str]) -> str:
    return f"{len(keys)} ({some(keys, 4)})"

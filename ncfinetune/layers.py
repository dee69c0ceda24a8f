"""Layers by name: find them, and make one vector a sample of what they put out.

A layer's name is its dotted module path (``layer3.1``, ``blocks.8``). The end of a longer path will do as long as only
one module fits, so that ``layer3.1`` is the word for ``backbone.net.layer3.1`` too, in whatever module it sits.

How to pool is found once, from one pass of a few samples, and then applied to every output of the layer in its hook::

    pools = find_pools(module, find_layers(module, ["layer3.1", "blocks.*"]), run)
    features = pools["layer3.1"](output)  # (N, d), a copy
    pools["layer3.1"].describe()  # "mean over positions"

``run`` passes a few samples through ``module`` with gradients and returns what the classifier gets ``(N, d)`` (or, if
that is unknown, the logits). A callback that sees only hooks can make it of the first call of the network, in a forward
pre-hook: ``run = lambda: network(*few(args), **few(kwargs))`` and the classifier's input caught as that runs.

Legend: ``N`` samples, ``C`` channels, ``T`` tokens, ``H W`` height and width, ``d`` feature width.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from ncfinetune.passes import eval_mode

# The word for the features that reach the classifier, where a layer's name is expected.
PENULTIMATE = "penultimate"

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# A child that stands in a row with its siblings though in no container: layer1, s1, Mixed_5b, cell_stem_0, block12.
_IN_A_ROW = re.compile(r"(.*?)_?\d+[a-z]?$")
# Ties that structure leaves, broken by names. Blocks whose inner rows see windows instead of samples (MobileViT), add
# channels to a list (DenseNet) or run side by side (CrossViT); and what a stage does to its input before its row.
_OUTER = re.compile(r"(DenseBlock|MultiScaleBlock|MaxVitBlock|MobileVi[tT](V2)?(Block|Layer)(V2)?)$")
_BEFORE_THE_ROW = re.compile(r"downsample|global_block$")


class NoTensorError(TypeError):
    """A layer puts out nothing that could be pooled."""


class PoolError(ValueError):
    """It cannot be told how one vector a sample is made of what a layer puts out."""


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
    """Dotted paths of a network's blocks: the outermost units that it repeats, in the order in which it holds them.

    A unit stands in a row, a container or children numbered by name, and mixes channels at least twice, as residual
    and transformer blocks, Inception modules and NASNet cells do. What holds rows of units is a stage, not a unit.
    Networks without any have smaller units: of one convolution with its normalisation, or bare layers as in VGG.
    """
    for kind in (_Unit(2), _Unit(1, sequential=True), _Unit(1, sequential=True, leaf=True)):
        if found := _repeated(_units(module, kind), module):
            return list(found)
    return []


@dataclass(frozen=True)
class _Unit:
    """What counts as a unit: how often it mixes channels, and whether it may be a plain Sequential or a leaf."""

    mixes: int
    sequential: bool = False
    leaf: bool = False

    def fits(self, module: nn.Module) -> bool:
        if type(module) in _CONTAINERS and not (self.sequential and type(module) is nn.Sequential):
            return False
        if not self.leaf and not any(True for _ in module.children()):
            return False
        return sum(map(_mixes_channels, module.parameters())) >= self.mixes


def _mixes_channels(weight: Tensor) -> bool:
    """Whether it is a matrix or the kernel of a convolution, other than a depthwise one."""
    return weight.ndim >= 2 and not (weight.ndim > 2 and weight.shape[1] == 1)


def _units(module: nn.Module, kind: _Unit) -> dict[str, nn.Module]:
    """Units inside a module, by path from there."""
    children = {n: child for n, child in module.named_children() if not _BEFORE_THE_ROW.match(n)}
    inside = {name: _units(child, kind) for name, child in children.items()}
    rows: dict[Any, list[str]] = defaultdict(list)
    for name, child in children.items():
        row = _row(module, name, kind)
        rows[name if row is None else (type(child), row)].append(name)
    found: dict[str, nn.Module] = {}
    for row, names in rows.items():
        for name in names:
            child = module.get_submodule(name)
            new = inside[name]
            if isinstance(row, tuple):
                whole = [n for n in names if kind.fits(module.get_submodule(n))]
                stages = any(_is_stage(module.get_submodule(n), inside[n]) for n in names)
                if whole and not stages:
                    new = {"": child} if any(True for _ in child.parameters()) else {}
                elif stages and not new:
                    # A stage like its siblings, though of smaller units: the first and last ones of MobileNets.
                    new = {n: c for n, c in child.named_children() if _Unit(1).fits(c)}
            found |= {f"{name}.{path}".rstrip("."): unit for path, unit in new.items()}
    order = {id(child): i for i, child in enumerate(module.modules())}
    return dict(sorted(found.items(), key=lambda item: order[id(item[1])]))


def _row(module: nn.Module, name: str, kind: _Unit) -> str | None:
    """The row in which a child stands: its name without the number; empty in a container; None in no row."""
    if isinstance(module, _CONTAINERS):
        return ""
    # The numbered children of what its author calls a block are its parts: norm1, ffn1.
    parts = kind.leaf or type(module).__name__.endswith("Block")
    numbered = None if parts else _IN_A_ROW.match(name)
    return numbered[1] if numbered else None


def _is_stage(module: nn.Module, inside: Mapping[str, nn.Module]) -> bool:
    """Whether it is a row of units and little else, not a unit with one small helper such as squeeze and excitation."""
    if not inside or _OUTER.search(type(module).__name__):
        return False
    repeated = max(Counter(type(unit) for unit in inside.values()).values()) > 1
    return repeated or sum(map(_size, inside.values())) >= 0.8 * _size(module)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _repeated(units: dict[str, nn.Module], module: nn.Module) -> dict[str, nn.Module]:
    """Units of a class that occurs more than once, and those in a row with them or in a stage beside theirs.

    Where none is repeated, as in a network cut to one layer, those that stand in a container.
    """
    counts = Counter(type(unit) for unit in units.values())
    rows = {_above(path) for path, unit in units.items() if counts[type(unit)] > 1}
    stages = {_above(row) for row in rows if row}
    near = {path for path in units if _above(path) in rows or (_above(path) and _above(_above(path)) in stages)}
    near |= {path for path in units if not rows and isinstance(module.get_submodule(_above(path)), _CONTAINERS)}
    return {path: unit for path, unit in units.items() if path in near}


def _above(path: str) -> str:
    return path.rpartition(".")[0]


def enclosing_block(module: nn.Module, name: str) -> str:
    """Path of the block that holds a layer, or of the layer itself where none does."""
    layer = next(iter(find_layers(module, [name]).values()))
    path = next(path for path, part in module.named_modules() if part is layer)
    return next((block for block in block_names(module) if path.startswith(f"{block}.")), path)


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in what a layer puts out: itself, or those in a tuple, a mapping or a dataclass, in their order."""
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
    """What a layer puts out without its gradient: every tensor in it."""
    return apply_to_collection(output, Tensor, Tensor.detach)


def few(arguments: Any, samples: int = 2) -> Any:
    """The first samples of a module's arguments, as copies that gradients may pass through; all else as it is."""
    given = next((len(tensor) for tensor in tensors(arguments) if tensor.ndim > 1), 0)

    def first(tensor: Tensor) -> Tensor:
        own = tensor[:samples] if tensor.ndim and len(tensor) == given else tensor
        return own.detach().clone()

    return apply_to_collection(arguments, Tensor, first)


@contextmanager
def caught(layers: Mapping[str, nn.Module], pools: Mapping[str, Pool]) -> Iterator[dict[str, Tensor]]:
    """Catch what the layers put out while the context lasts, pooled: ``{name: (N, d)}``, in the order they ran in."""
    features: dict[str, Tensor] = {}

    def catch(name: str) -> Any:
        return lambda module, args, output: features.__setitem__(name, pools[name](output))

    handles = [layer.register_forward_hook(catch(name)) for name, layer in layers.items()]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


# Ranges of token positions, (start, stop or None).
Positions = tuple[tuple[int, int | None], ...]


@dataclass(frozen=True)
class Pool:
    """How one vector a sample is made of what a layer puts out.

    Maps ``(N, C, H, W)``, ``(N, H, W, C)`` and whatever else has an axis of channels to the mean over all that is
    neither sample nor channel; of tokens ``(N, T, C)`` only those that the network itself makes its features of count.
    ``(N, d)`` stays as it is. The result is a copy: what runs next may write over the output.

    Args:
        ndim: Dimensions of the output.
        width: Its number of channels ``C``.
        channel: Axis of the channels: 1 or -1.
        tokens: Positions of the tokens of which the mean is taken; several such means stand side by side, as in the
            classifier of DINOv2 (Oquab et al. 2023, section 7: the class token and the mean of the patches).
        index: Which of the tensors is meant, where the layer puts out several.
    """

    ndim: int
    width: int
    channel: int = 1
    tokens: tuple[Positions, ...] = (((0, None),),)
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
        """What becomes of the output, in words."""
        if self.ndim == 2:
            return "as it is"
        if not self.of_tokens:
            return "mean over positions"
        return " beside ".join(map(_in_words, self.tokens))

    def fits(self, output: Any) -> bool:
        """Whether it is of the form that this was made for."""
        tensor = self.chosen(output)
        return tensor is not None and tensor.ndim == self.ndim and tensor.shape[self.channel] == self.width

    def chosen(self, output: Any) -> Tensor | None:
        """The tensor that is meant; None where there are not so many."""
        found = list(tensors(output))
        return found[self.index] if self.index < len(found) else None

    def __call__(self, output: Any, dtype: torch.dtype | None = None) -> Tensor:
        """Pool ``output`` to ``(N, d)``, in ``dtype`` from before the first sum; None is the output's own.

        Raises:
            PoolError: The output is of another form than the one that this was made for.
        """
        tensor = self.chosen(output)
        if tensor is None or not self.fits(output):
            form = "nothing" if tensor is None else tuple(tensor.shape)
            raise PoolError(
                f"expected a layer output of {self.ndim} dimensions and {self.width} channels, as the layer put out "
                f"before, got {form}"
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
    if positions == ((0, 1),):
        return "class token"
    if positions == ((0, None),):
        return "mean of the tokens"
    if len(positions) == 1 and positions[0][1] is None:
        return f"mean of the tokens behind the first {positions[0][0]}"
    spans = [f"{start}" if stop == start + 1 else f"{start} to {'the last' if stop is None else stop - 1}"
             for start, stop in positions]  # fmt: skip
    return f"mean of the tokens {', '.join(spans)}"


def find_pools(
    module: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], Any], strict: bool = True
) -> dict[str, Pool]:
    """How each layer's output becomes one vector a sample, as one pass of a few samples through the module shows.

    Which axis has the channels is told by what reads or makes that very tensor next to the layer (a convolution, a
    normalisation, a linear layer), else by the widths of the weights inside. Which tokens count is told by the
    gradient of the features: of the network's last tokens they depend on some positions only (the class token, the
    patches behind registers), and those positions count in every layer that has them already. A network that attends
    over its tokens to pool them depends on all.

    Weights, gradients, statistics, modes and random numbers stay as they are.

    Args:
        module: What runs, without the wrapper of a compiler.
        layers: Its layers, by name.
        run: Passes at least two samples through the module; returns the features that the classifier gets, or
            whatever the module makes of them.
        strict: Refuse layers that can't be pooled, instead of leaving them out.

    Returns:
        A pool for each layer that ran, in the order in which they ran.

    Raises:
        PoolError: A layer's output has no tensor with one entry a sample, or two axes could be that of the channels.
        NoTensorError: A layer puts out no tensor.
    """
    with torch.inference_mode(False), torch.enable_grad(), isolate_rng(), eval_mode(module), _buffers_kept(module):
        trace = _Trace(module)
        features = trace.of(run)
        outputs: dict[str, _Output] = {}
        for name, call in trace.last_calls(layers).items():
            try:
                outputs[name] = _Output.of(name, call, trace, len(features))
            except (PoolError, NoTensorError):
                if strict:
                    raise
        _Tokens(features, trace, list(outputs.values())).settle()
    return {name: output.pool for name, output in outputs.items()}


def guess_pool(name: str, output: Any, layer: nn.Module, network: nn.Module) -> Pool:
    """How a layer's output becomes one vector a sample, as far as that can be told without running the network again.

    Which axis has the channels is told by the widths and kinds of the layer's own parts. Of tokens those count that
    the network's author names: a timm network says it outright; another with one class token takes that, and one
    without any takes the mean.

    Raises:
        PoolError: Two axes could be that of the channels, or the network has several special tokens.
        NoTensorError: The output has no tensor.
    """
    found = list(tensors(output))
    if not found:
        raise NoTensorError(no_tensor(name, type(output).__name__))
    fitting = [index for index, tensor in enumerate(found) if tensor.ndim > 1 and tensor.is_floating_point()]
    if not fitting:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in found)
        raise PoolError(f"layer {name!r} puts out {shapes}, expected features (N, d) or more dimensions; {_OTHERWISE}")
    index = fitting[0]
    tensor = found[index]
    if tensor.ndim == 2:
        return Pool(2, tensor.shape[1], index=index)
    inside = [part for part in layer.modules() if _reading(part)]
    fits = {axis for part in inside for axis in (1, -1) if tensor.shape[axis] == _width(part, "out")}
    if len(fits) != 1:
        fits = {_axis_of(part) for part in inside or filter(_reading, network.modules())}
    if len(fits) != 1:
        raise PoolError(_two_axes(name, tensor))
    (channel,) = fits
    pool = Pool(tensor.ndim, tensor.shape[channel], channel, index=index)
    return dataclasses.replace(pool, tokens=(_named_tokens(name, layer, network),)) if pool.of_tokens else pool


# How the class tokens of timm, torchvision and Hugging Face are called.
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")


def _named_tokens(name: str, layer: nn.Module, network: nn.Module) -> Positions:
    """The tokens that count, as the innermost timm network that holds a layer, or the names of parameters say."""
    timms = [part for part in network.modules() if hasattr(part, "num_prefix_tokens") and layer in set(part.modules())]
    if timms:
        prefix: Any = timms[-1].num_prefix_tokens
        if getattr(timms[-1], "global_pool", "token") == "token" and prefix > 0:
            return ((0, 1),)
        return ((int(prefix), None),)
    known = [path for path, _ in network.named_parameters() if path.endswith(_CLASS_TOKENS)]
    if len(known) > 1:
        raise PoolError(f"cannot tell which of {', '.join(known)} counts in the tokens of layer {name!r}; {_OTHERWISE}")
    return ((0, 1),) if known else ((0, None),)


_OTHERWISE = "name another layer, or give a callback its own pool="


def no_tensor(name: str, kind: str) -> str:
    """What a NoTensorError says of a layer that puts out something of this kind."""
    return f"expected layer {name!r} to put out a tensor, or something that holds one, got {kind}; name another layer"


def _two_axes(name: str, tensor: Tensor) -> str:
    shape = tuple(tensor.shape)
    return f"cannot tell which axis of the output {shape} of layer {name!r} has the channels; {_OTHERWISE}"


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Leave the buffers as they were: some networks count their passes in evaluation too."""
    kept = [
        (part, name, b, b.clone()) for part in module.modules() for name, b in part._buffers.items() if b is not None
    ]
    try:
        yield
    finally:
        for part, name, buffer, value in kept:
            part._buffers[name] = buffer
            buffer.data.copy_(value)


class _Call(NamedTuple):
    """One run of a module."""

    module: nn.Module
    inputs: list[Tensor]
    outputs: list[Tensor]
    kind: str
    number: int


class _Trace:
    """The calls of all parts of a module in one pass, in the order in which they end."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._zero: dict[torch.device, Tensor] = {}
        self.calls: list[_Call] = []

    def of(self, run: Callable[[], Any]) -> Tensor:
        """Run, and return the first tensor of the result that is no single number, such as a loss."""
        handles = [m.register_forward_hook(self._note, with_kwargs=True) for m in self._module.modules()]
        try:
            return next(tensor for tensor in tensors(run()) if tensor.ndim > 0)
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if isinstance(output, Tensor) and output.is_floating_point() and not output.requires_grad:
            output = output + self._zero.setdefault(
                output.device, torch.zeros((), device=output.device, requires_grad=True)
            ).to(output.dtype)  # a gradient to pass through frozen layers
        inputs = [*tensors(args), *tensors(kwargs)]
        self.calls.append(_Call(module, inputs, list(tensors(output)), type(output).__name__, len(self.calls)))
        return output

    def last_calls(self, layers: Mapping[str, nn.Module]) -> dict[str, _Call]:
        """The last run of each layer that ran."""
        by_module = {call.module: call for call in self.calls}
        found = {name: by_module[layer] for name, layer in layers.items() if layer in by_module}
        return dict(sorted(found.items(), key=lambda item: item[1].number))


@dataclass
class _Output:
    """A layer's output, and the pool that fits it as far as it is known."""

    name: str
    pool: Pool
    candidates: dict[int, tuple[Tensor, Pool]]

    @classmethod
    def of(cls, name: str, call: _Call, trace: _Trace, samples: int) -> _Output:
        fitting = {
            index: tensor
            for index, tensor in enumerate(call.outputs)
            if tensor.is_floating_point() and tensor.ndim > 1 and len(tensor) == samples
        }
        if not call.outputs:
            raise NoTensorError(no_tensor(name, call.kind))
        if not fitting:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in call.outputs)
            raise PoolError(
                f"layer {name!r} puts out {shapes} for {samples} samples, nothing with one entry a sample; {_OTHERWISE}"
            )
        candidates = {}
        for index, tensor in fitting.items():
            channel = 1 if tensor.ndim == 2 else _channel(name, tensor, call, trace)
            candidates[index] = tensor, Pool(tensor.ndim, tensor.shape[channel], channel, index=index)
        return cls(name, next(iter(candidates.values()))[1], candidates)


def _channel(name: str, tensor: Tensor, call: _Call, trace: _Trace) -> int:
    """The axis of the channels, 1 or -1."""
    parts = set(call.module.modules())
    inside = [c for c in trace.calls[: call.number + 1] if c.module in parts and _reading(c.module)]
    after = [c for c in trace.calls[call.number + 1 :] if c.module not in parts and _reading(c.module)]
    touching = [(c, "out") for c in inside if any(t is tensor for t in c.outputs)]
    touching += [(c, "in") for c in after if any(t is tensor for t in c.inputs[:1])]
    votes = {_axis_of(c.module) for c, side in touching if tensor.shape[_axis_of(c.module)] == _width(c.module, side)}
    if len(votes) == 1:
        return votes.pop()
    for c, side in [(c, "out") for c in inside[-1:]] + [(c, "in") for c in after[:1]]:
        fitting = [axis for axis in (1, -1) if tensor.shape[axis] == _width(c.module, side)]
        if len(fitting) == 1:
            return fitting[0]
    votes = {_axis_of(c.module) for c in inside}
    if len(votes) == 1:
        return votes.pop()
    raise PoolError(_two_axes(name, tensor))


def _reading(module: nn.Module) -> bool:
    """Whether a module says by its kind which axis has the channels, and by its weights how many there are."""
    return isinstance(module, nn.modules.conv._ConvNd | nn.Linear) or _norm_width(module) is not None


def _axis_of(module: nn.Module) -> int:
    if isinstance(module, nn.modules.conv._ConvNd):
        return 1
    if isinstance(module, nn.Linear):
        return -1
    first = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)
    # Layer normalisations over the channels of maps: LayerNorm2d of timm and torchvision, Hugging Face's ConvNext.
    first |= "2d" in type(module).__name__ or getattr(module, "data_format", "") == "channels_first"
    return 1 if first else -1


def _width(module: nn.Module, side: str) -> int | None:
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels if side == "out" else module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features if side == "out" else module.in_features
    return _norm_width(module)


def _norm_width(module: nn.Module) -> int | None:
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.num_features
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[0] if len(module.normalized_shape) == 1 else None
    weight = getattr(module, "weight", None)
    named = "norm" in type(module).__name__.lower()
    return len(weight) if named and isinstance(weight, Tensor) and weight.ndim == 1 else None


class _Tokens:
    """Which tokens of a pass count, by the gradient of the features.

    Args:
        features: What the classifier gets.
        trace: The pass.
        outputs: The layers' outputs, whose pools are settled.
    """

    def __init__(self, features: Tensor, trace: _Trace, outputs: list[_Output]) -> None:
        self._features = features
        self._outputs = outputs
        self._last: dict[int, Tensor] = {}
        self._aspect = 1.0
        for call in trace.calls:
            for tensor in call.outputs:
                if tensor.ndim == 3 and tensor.is_floating_point() and len(tensor) == len(features):
                    self._last.pop(tensor.shape[1], None)
                    self._last[tensor.shape[1]] = tensor
        maps = [t for call in trace.calls for t in call.inputs if t.ndim == 4]
        if maps:
            self._aspect = maps[0].shape[2] / maps[0].shape[3]

    def settle(self) -> None:
        """Choose among several tensors of a layer, and the positions of its tokens."""
        several = [t for o in self._outputs if len(o.candidates) > 1 for t, _ in o.candidates.values()]
        own = [t for o in self._outputs for t, pool in o.candidates.values() if pool.of_tokens]
        if not several and not own:
            return
        wanted = list({id(t): t for t in (*several, *own, *self._last.values()) if t.requires_grad}.values())
        gradients = self._gradients(wanted, slice(None))
        self._choose(gradients)
        groups = {tokens: self._groups(tensor, gradients) for tokens, tensor in self._last.items()}
        ends = {tokens: group for tokens, group in groups.items() if group and not _is_all(group)}
        final = next(((tokens, ends[tokens]) for tokens in reversed(self._last) if tokens in ends and tokens > 1), None)
        for output in self._outputs:
            tensor, pool = output.candidates[output.pool.index]
            if not pool.of_tokens:
                continue
            tokens = tensor.shape[1]
            used = self._groups(tensor, gradients)
            if not used or _is_all(used):
                used = ends.get(tokens) or self._carried(tokens, final)
            output.pool = dataclasses.replace(pool, tokens=used)

    def _gradients(self, wanted: list[Tensor], part: slice) -> dict[int, Tensor]:
        generator = torch.Generator().manual_seed(0)
        features = self._features[:, part]
        weights = torch.rand(features.shape, generator=generator).to(features) + 0.5
        if not features.requires_grad:
            return {}
        found = torch.autograd.grad(features, wanted, weights, retain_graph=True, allow_unused=True)
        return {id(t): g for t, g in zip(wanted, found, strict=True) if g is not None}

    def _choose(self, gradients: Mapping[int, Tensor]) -> None:
        """Of several tensors the first that the features depend on."""
        for output in self._outputs:
            used = [i for i, (t, _) in output.candidates.items() if id(t) in gradients and gradients[id(t)].any()]
            index = used[0] if used else next(iter(output.candidates))
            output.pool = output.candidates[index][1]

    def _groups(self, tensor: Tensor, gradients: Mapping[int, Tensor]) -> tuple[Positions, ...]:
        """The positions that the features depend on; of features that are several such means, the positions of each."""
        gradient = gradients.get(id(tensor))
        if gradient is None:
            return ()
        whole = _used(gradient)
        width, dim = tensor.shape[2], self._features.shape[-1]
        if not whole or self._features.ndim != 2 or dim == width or dim % width or dim // width > 4:
            return (whole,) if whole else ()
        parts = [
            self._gradients([tensor], slice(start, start + width)).get(id(tensor)) for start in range(0, dim, width)
        ]
        groups = [_used(part) for part in parts if part is not None]
        return tuple(dict.fromkeys(group for group in groups if group))

    def _carried(self, tokens: int, final: tuple[int, tuple[Positions, ...]] | None) -> tuple[Positions, ...]:
        """Positions in a layer of another number of tokens than the last: special tokens count if they are there yet.

        They are where the number of tokens is that of a grid of patches only without them.
        """
        everything: tuple[Positions, ...] = (((0, None),),)
        if final is None:
            return everything
        last, groups = final
        special = next((count for count in range(1, last) if self._is_grid(last - count)), None)
        if special is None or self._is_grid(tokens) or not self._is_grid(tokens - special):
            return everything
        return groups

    def _is_grid(self, patches: int) -> bool:
        height = round(math.sqrt(max(patches, 0) * self._aspect))
        return height > 0 and patches % height == 0 and abs(patches / height - height / self._aspect) < 1


def _used(gradient: Tensor) -> Positions:
    """Ranges of the positions at which a gradient ``(N, T, C)`` is not 0."""
    used = (gradient != 0).any(2).any(0).tolist()
    starts = [i for i, u in enumerate(used) if u and (i == 0 or not used[i - 1])]
    stops = [i + 1 for i, u in enumerate(used) if u and (i + 1 == len(used) or not used[i + 1])]
    return tuple(
        (start, None if stop == len(used) and (start, stop) != (0, 1) else stop)
        for start, stop in zip(starts, stops, strict=True)
    )


def _is_all(groups: tuple[Positions, ...]) -> bool:
    return groups == (((0, None),),)

"""The part of a network from one of its layers on, which runs on that layer's stored input.

Legend: ``N`` samples.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn


class Tail:
    """A network from the first of some layers on: the same modules, without the modules that run before that layer.

    The modules that contain the layer are copied without their children, so that the network's own code runs: children
    that ran before the layer return zeros that occupy the memory of one number, and the layer takes its stored input
    instead. All other modules, with parameters, modes and hooks, are the network's own. The result is exact if
    everything after the layer depends on the images through the layer alone, which the caller has to check.

    Args:
        network: The module that maps images to features.
        layers: Modules inside it.
        images: A few images ``(N, C, H, W)``, run once to record the order of the modules.

    Attributes:
        layer: The first of the layers to run.

    Raises:
        ValueError: The layer does not run exactly once in a forward pass.
    """

    def __init__(self, network: nn.Module, layers: Iterable[nn.Module], images: Tensor) -> None:
        calls = _record(network, images)
        self._network = network
        self.layer = min(layers, key=lambda layer: min(calls[layer].starts, default=sys.maxsize))
        if len(calls[self.layer].starts) != 1:
            raise ValueError(f"it runs {len(calls[self.layer].starts)} times in a pass")
        path = next(path for path, module in network.named_modules() if module is self.layer)
        start = calls[self.layer].starts[0]
        self._before = {
            module: call.output
            for module, call in calls.items()
            if len(call.ends) == 1 and call.ends[0] < start and _all_led_by(call.output, len(images))
        }
        self._entry = _Entry(self.layer)
        self._images = images[:1] * 0
        self._rest = _without(network, path.split("."), self._before, self._entry)

    def left_out(self) -> list[nn.Module]:
        """The network's modules that do not run."""
        way = [module for module in self._network.modules() if self.layer in list(module.modules())[1:]]
        parts = [part for module in way for part in module.children() if part in self._before]
        return [module for part in parts for module in part.modules()]

    def capture(self, images: Tensor) -> Tensor:
        """The layer's input for images; nothing after it is run.

        Raises:
            ValueError: Its first argument is not a tensor with one entry per image.
        """

        def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
            raise _ArrivalError(*args[:1])

        handle = self.layer.register_forward_pre_hook(stop)
        try:
            self._network(images)
        except _ArrivalError as reached:
            value = next(iter(reached.args), None)
            if not isinstance(value, Tensor):
                raise ValueError("its first argument is not a tensor") from None
            if len(value) != len(images):
                found = f"{tuple(value.shape)} for {len(images)} images"
                raise ValueError(f"its first argument needs one entry per image, but is {found}") from None
            return value
        finally:
            handle.remove()
        raise ValueError("it does not run")

    def __call__(self, value: Tensor) -> Tensor:
        """The network's output if the layer's input is ``value``, of ``N`` samples."""
        self._entry.value = value
        try:
            return self._rest(self._images.expand(len(value), *self._images.shape[1:]))
        finally:
            self._entry.value = None


class _ArrivalError(Exception):
    """Stops a forward pass at a layer; carries the layer's arguments."""


@dataclass
class _Calls:
    """Start and end times of a module's calls, counted in module starts and ends, and shapes of its last output."""

    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    output: Any = None


@dataclass(frozen=True)
class _Like:
    """A tensor's shape and type."""

    shape: torch.Size
    dtype: torch.dtype


def _record(network: nn.Module, images: Tensor) -> defaultdict[nn.Module, _Calls]:
    calls: defaultdict[nn.Module, _Calls] = defaultdict(_Calls)
    clock = itertools.count()

    def start(module: nn.Module, args: Any) -> None:
        calls[module].starts.append(next(clock))

    def end(module: nn.Module, args: Any, output: Any) -> None:
        calls[module].ends.append(next(clock))
        calls[module].output = apply_to_collection(output, Tensor, lambda t: _Like(t.shape, t.dtype))

    handles = [module.register_forward_pre_hook(start) for module in network.modules()]
    handles += [module.register_forward_hook(end) for module in network.modules()]
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _all_led_by(output: Any, samples: int) -> bool:
    """Whether every tensor of an output has one entry per sample; others must not be replaced by zeros."""
    shapes: list[torch.Size] = []
    apply_to_collection(output, _Like, lambda like: shapes.append(like.shape))
    return bool(shapes) and all(shape[:1] == (samples,) for shape in shapes)


class _Entry(nn.Module):
    """A layer that takes a stored value for its first argument."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.value: Tensor | None = None

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self.layer(self.value, *args, **kwargs)


def _bypassed(part: nn.Module, output: Any, entry: _Entry) -> nn.Module:
    """A copy of a module that runs before the layer, without hooks: it returns zeros of its output's shape."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        value = entry.value
        assert value is not None

        def zeros(like: _Like) -> Tensor:
            return torch.zeros(1, dtype=like.dtype, device=value.device).expand(len(value), *like.shape[1:])

        return apply_to_collection(output, _Like, zeros)

    clone = copy.copy(part)
    clone.__dict__ |= {"forward": forward, "_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
    return clone


def _without(module: nn.Module, path: Sequence[str], before: dict[nn.Module, Any], entry: _Entry) -> nn.Module:
    """A copy of ``module`` whose part at ``path`` is the entry, and whose parts ``before`` it are bypassed."""
    if not path:
        return entry
    clone = copy.copy(module)
    parts = {
        name: _bypassed(part, before[part], entry) if part is not None and part in before else part
        for name, part in module._modules.items()
    }
    parts[path[0]] = _without(module.get_submodule(path[0]), path[1:], before, entry)
    clone.__dict__["_modules"] = parts
    return clone

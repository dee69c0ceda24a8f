"""Pooled features of named layers, caught as any module runs.

Legend: ``N`` samples, ``K`` classes, ``d`` feature width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ncfinetune.layers import PENULTIMATE, NoTensorError, Pool, few, find_layers, find_pools

Pooling = Callable[[Tensor], Tensor]


class FeatureTap:
    """Hooks on named layers of a module that keep each layer's last output, pooled to ``(N, d)``, while ``open``.

    The name ``penultimate`` stands for the output of the submodule that the module has under this name, and where it
    has none for the input of the classifier.

    Args:
        module: The module to listen to.
        layers: Names or patterns of its layers, as `find_layers` reads them, and ``penultimate``.
        classifier: The classifier; needed for ``penultimate`` where the module has no submodule of that name.
        pool: Makes ``(N, d)`` of a layer's output; None pools as the network pools its last features.

    Attributes:
        names: The layers' names in depth order, ``penultimate`` last.
        open: Whether features are kept.

    Raises:
        ValueError: No such layer.
    """

    def __init__(
        self, module: nn.Module, layers: Sequence[str], classifier: nn.Linear | None = None, pool: Pooling | None = None
    ) -> None:
        self.open = False
        self._caught: dict[str, Tensor] = {}
        self._how: dict[str, str] = {}
        self._handles: list[RemovableHandle] = []
        self._pool, self._pools = pool, dict[str, Pool]()
        found = find_layers(module, [name for name in layers if name != PENULTIMATE])
        self._layers, self._classifier, self._looking = found, classifier, False
        for name, layer in found.items():
            self._hook_output(name, layer)
        self.names = list(found)
        self._hook_networks(module)
        if PENULTIMATE in layers:
            self._hook_penultimate(module, classifier)
            self.names.append(PENULTIMATE)

    def _hook_penultimate(self, module: nn.Module, classifier: nn.Linear | None) -> None:
        owner = penultimate_of(module)
        if owner is not None:
            self._layers = {**self._layers, PENULTIMATE: owner}
            self._hook_output(PENULTIMATE, owner)
            return
        if classifier is None:
            raise ValueError("the layer 'penultimate' needs a classifier")

        def catch(m: nn.Module, args: Any, kwargs: Any) -> None:
            if self.open and not self._looking:
                self._keep(PENULTIMATE, args[0] if args else kwargs["input"], Pool(2, classifier.in_features))

        self._handles.append(classifier.register_forward_pre_hook(catch, with_kwargs=True))

    def _hook_output(self, name: str, layer: nn.Module) -> None:
        def catch(m: nn.Module, args: Any, output: Any) -> None:
            if self.open and not self._looking:
                self._keep(name, output, self._pools.get(name))

        self._handles.append(layer.register_forward_hook(catch))

    def _hook_networks(self, module: nn.Module) -> None:
        """Look at the call of the outermost module that holds all layers."""
        for part in module.modules():
            if self._layers and set(self._layers.values()) <= set(part.modules()) - {part}:
                self._handles.append(part.register_forward_pre_hook(self._look, with_kwargs=True))

    def _look(self, network: nn.Module, args: Any, kwargs: Any) -> None:
        """See how the layers' outputs are pooled, on the first samples that the network gets."""
        if not self.open or self._looking or self._pools or self._pool is not None:
            return
        inputs: list[Tensor] = []
        handle = None
        if self._classifier is not None:
            handle = self._classifier.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
        self._looking = True

        def run() -> Any:
            output = network(*few(args), **few(kwargs))
            return inputs[-1] if inputs else output

        try:
            self._pools = find_pools(network, self._layers, run)
        finally:
            self._looking = False
            if handle is not None:
                handle.remove()

    def take(self) -> dict[str, Tensor]:
        """The features of the last forward pass, ``{name: (N, d)}`` in float32 or wider; forgets them."""
        caught, self._caught = self._caught, {}
        return caught

    def describe(self) -> str:
        """A line on each layer that ran: what it put out, and how that was pooled."""
        return "; ".join(f"{name} {how}" for name, how in self._how.items())

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, name: str, output: Any, pool: Pool | None) -> None:
        tensor = next(_tensors(output), None)
        if tensor is None:
            raise NoTensorError(
                f"expected layer {name!r} to put out a tensor, or something that holds one, "
                f"got {type(output).__name__}; name another layer"
            )
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        if self._pool is not None or pool is None:
            assert self._pool is not None
            pooled = self._pool(tensor.detach()).to(dtype)
            self._how[name] = f"{tuple(tensor.shape)} pooled by the function given"
        else:
            pooled = pool(output, dtype).detach()
            self._how[name] = f"{tuple(tensor.shape)} {pool.describe()}"
        self._caught[name] = pooled


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in what a layer puts out: itself, or those in a tuple, a mapping or a dataclass, in their order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for value in output:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from _tensors(getattr(output, field.name))


def penultimate_of(module: nn.Module) -> nn.Module | None:
    """The submodule whose output a module declares to be its penultimate features, by calling it ``penultimate``."""
    owner = getattr(module, PENULTIMATE, None)
    return owner if isinstance(owner, nn.Module) else None


def find_classifier(module: nn.Module, num_classes: int | None, name: str = "auto") -> nn.Linear:
    """The classifier: the layer of that name, or, for ``auto``, the last linear layer with ``num_classes`` outputs.

    Raises:
        ValueError: There is none; names the linear layers that exist.
        TypeError: The layer of that name is not linear.
    """
    if name != "auto":
        (layer,) = find_layers(module, [name]).values()
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"expected the classifier {name!r} to be a torch.nn.Linear, got {type(layer).__name__}")
        return layer
    linear = {path: layer for path, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    fitting = [layer for layer in linear.values() if layer.out_features == num_classes]
    if not fitting:
        some = ", ".join(f"{path} ({layer.out_features})" for path, layer in list(linear.items())[-5:])
        raise ValueError(
            f"no linear layer with num_classes={num_classes} outputs, whose input is the layer 'penultimate'; "
            f"name the layers to measure, or the classifier, or mend num_classes. "
            f"Linear layers (outputs): {some or 'none'}"
        )
    return fitting[-1]

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

from ncfinetune.layers import PENULTIMATE, Pool, find_layers

Pooling = Callable[[Tensor], Tensor]


class NoTensorError(TypeError):
    """A layer puts out nothing that could be measured."""


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
        found = find_layers(module, [name for name in layers if name != PENULTIMATE])
        for name, layer in found.items():
            catch = self._hook(name, pool or Pool.of(_network_of(module, layer)))
            self._handles.append(layer.register_forward_hook(lambda m, args, output, catch=catch: catch(output)))
        self.names = list(found)
        if PENULTIMATE in layers:
            self._handles.append(self._hook_penultimate(module, classifier, pool))
            self.names.append(PENULTIMATE)

    def _hook_penultimate(
        self, module: nn.Module, classifier: nn.Linear | None, pool: Pooling | None
    ) -> RemovableHandle:
        owner = penultimate_of(module)
        if owner is not None:
            catch = self._hook(PENULTIMATE, pool or Pool.of(_network_of(module, owner)))
            return owner.register_forward_hook(lambda m, args, output: catch(output))
        if classifier is None:
            raise ValueError("the layer 'penultimate' needs a classifier")
        catch = self._hook(PENULTIMATE, pool or Pool.of(_network_of(module, classifier)))
        return classifier.register_forward_pre_hook(
            lambda m, args, kwargs: catch(args[0] if args else kwargs["input"]), with_kwargs=True
        )

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

    def _hook(self, name: str, pool: Pooling | Pool) -> Callable[[Any], None]:
        def catch(output: Any) -> None:
            if self.open:
                tensor = next(_tensors(output), None)
                if tensor is None:
                    raise NoTensorError(
                        f"expected layer {name!r} to put out a tensor, or something that holds one, "
                        f"got {type(output).__name__}; name another layer"
                    )
                tensor = tensor.detach()
                dtype = torch.promote_types(tensor.dtype, torch.float32)
                if isinstance(pool, Pool):
                    pooled = pool(tensor, dtype)
                    self._how[name] = f"{tuple(tensor.shape)} {pool.describe(tensor.ndim)}"
                else:
                    pooled = pool(tensor).to(dtype)
                    self._how[name] = f"{tuple(tensor.shape)} pooled by the function given"
                self._caught[name] = pooled

        return catch


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


def _network_of(module: nn.Module, layer: nn.Module) -> nn.Module:
    """The innermost timm network that holds ``layer``, since it knows how its outputs are pooled; else ``module``."""
    networks = [
        m for m in module.modules() if hasattr(m, "pretrained_cfg") and any(part is layer for part in m.modules())
    ]
    return networks[-1] if networks else module

"""Pooled features of named layers, caught as any module runs.

Legend: ``N`` samples, ``K`` classes, ``d`` feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ncfinetune.layers import PENULTIMATE, Pool, find_layers


class FeatureTap:
    """Hooks on named layers of a module that keep each layer's last output, pooled to ``(N, d)``, while ``open``.

    The name ``penultimate`` stands for the output of the submodule that the module has under this name, and where it
    has none for the input of the classifier: the last `torch.nn.Linear` with ``num_classes`` outputs.

    Args:
        module: The module to listen to.
        layers: Names or patterns of its layers, as `find_layers` reads them, and ``penultimate``.
        num_classes: Number of classes ``K``.

    Raises:
        ValueError: No such layer, or no classifier.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str], num_classes: int) -> None:
        self.open = False
        self._caught: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        found = find_layers(module, [name for name in layers if name != PENULTIMATE])
        pools = {name: Pool.of(_network_of(module, layer)) for name, layer in found.items()}
        for name, layer in found.items():
            self._handles.append(layer.register_forward_hook(self._hook(name, pools[name])))
        self.names = list(found)
        if PENULTIMATE in layers:
            hook = self._hook(PENULTIMATE, Pool())
            owner = getattr(module, PENULTIMATE, None)
            if isinstance(owner, nn.Module):
                self._handles.append(owner.register_forward_hook(hook))
            else:
                classifier = find_classifier(module, num_classes)
                self._handles.append(classifier.register_forward_pre_hook(lambda m, args: hook(m, args, args[0])))
            self.names.append(PENULTIMATE)

    def take(self) -> dict[str, Tensor]:
        """The features of the last forward pass, ``{name: (N, d)}`` in float32 or wider; forgets them."""
        caught, self._caught = self._caught, {}
        return caught

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str, pool: Pool) -> Any:
        def catch(module: nn.Module, args: Any, output: Tensor) -> None:
            if self.open:
                dtype = torch.promote_types(output.dtype, torch.float32)
                self._caught[name] = pool(output.detach(), dtype)

        return catch


def find_classifier(module: nn.Module, num_classes: int) -> nn.Linear:
    """The last linear layer with ``num_classes`` outputs.

    Raises:
        ValueError: There is none; names the linear layers that exist.
    """
    linear = {path: layer for path, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    fitting = [layer for layer in linear.values() if layer.out_features == num_classes]
    if not fitting:
        some = ", ".join(f"{path} ({layer.out_features})" for path, layer in list(linear.items())[-5:])
        raise ValueError(
            f"no linear layer with num_classes={num_classes} outputs, whose input is the layer 'penultimate'; "
            f"name the layers to measure, or mend num_classes. Linear layers (outputs): {some or 'none'}"
        )
    return fitting[-1]


def _network_of(module: nn.Module, layer: nn.Module) -> nn.Module:
    """The innermost timm network that holds ``layer``, since it knows how its outputs are pooled; else ``module``."""
    networks = [
        m for m in module.modules() if hasattr(m, "pretrained_cfg") and any(part is layer for part in m.modules())
    ]
    return networks[-1] if networks else module

"""Traces: the calls of a module's submodules in a forward pass, with inputs and outputs.

Legend: ``N`` samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from ncfinetune.pooling import PoolError, tensors


class Call(NamedTuple):
    """One call of a module: its input and output tensors, its original output, and its index in the pass."""

    module: nn.Module
    inputs: list[Tensor]
    outputs: list[Tensor]
    output: Any
    number: int


class Trace:
    """The calls of all submodules of a module in one pass, in the order in which they end.

    Args:
        module: The module.

    Attributes:
        calls: The calls.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._zeros: dict[torch.device, Tensor] = {}
        self.calls: list[Call] = []

    def of(self, run: Callable[[], Any]) -> Tensor:
        """Run, and return the first tensor of the result that is not a single number, such as a loss.

        Raises:
            PoolError: There is no such tensor.
        """
        handles = [m.register_forward_hook(self._note, with_kwargs=True) for m in self._module.modules()]
        try:
            result = next((tensor for tensor in tensors(run()) if tensor.ndim > 0), None)
        finally:
            for handle in handles:
                handle.remove()
        if result is None:
            raise PoolError(f"expected {type(self._module).__name__} to return features or logits, got no such tensor")
        return result

    def last_calls(self, layers: Mapping[str, nn.Module]) -> dict[str, Call]:
        """The last call of each layer that ran, in the order in which they ended."""
        by_module = {call.module: call for call in self.calls}
        found = {name: by_module[layer] for name, layer in layers.items() if layer in by_module}
        return dict(sorted(found.items(), key=lambda item: item[1].number))

    def _note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if isinstance(output, Tensor) and output.is_floating_point() and not output.requires_grad:
            # No gradient passes frozen layers on inputs without one, but the tokens are found by the gradient.
            output = output + self._zero(output.device).to(output.dtype)
        inputs = [*tensors(args), *tensors(kwargs)]
        self.calls.append(Call(module, inputs, list(tensors(output)), output, len(self.calls)))
        return output

    def _zero(self, device: torch.device) -> Tensor:
        return self._zeros.setdefault(device, torch.zeros((), device=device, requires_grad=True))


def few(arguments: Any) -> Any:
    """A module's arguments with two samples only, as copies that gradients can pass; other arguments unchanged.

    The batch size is the length of the first tensor with more than one dimension; tensors of other lengths, such as
    masks, are kept whole.
    """
    given = next((len(tensor) for tensor in tensors(arguments) if tensor.ndim > 1), 0)

    def first(tensor: Tensor) -> Tensor:
        own = tensor[:2] if tensor.ndim and len(tensor) == given else tensor
        return own.detach().clone()

    return apply_to_collection(arguments, Tensor, first)

"""The channel axis of a layer's output, found by the kinds and widths of modules.

An axis is 1 or -1: convolutions have the channels on axis 1, linear layers on axis -1.

Legend: ``N`` samples, ``C`` channels, ``H W`` height and width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ncfinetune.pooling import OTHERWISE, PoolError
from ncfinetune.tracing import Call, Trace

Side = Literal["in", "out"]


def axis_by_pass(name: str, tensor: Tensor, call: Call, trace: Trace) -> int:
    """The channel axis of a layer's output, determined from a forward pass.

    It is determined by the modules that output or read this very tensor; otherwise by the widths of the last module
    with a known width inside the layer and of the first such module after it; otherwise by the kinds of all modules
    inside.

    Raises:
        PoolError: Both axes are possible.
    """
    parts = set(call.module.modules())
    inside = [c for c in trace.calls[: call.number + 1] if c.module in parts and _says_width(c.module)]
    after = [c for c in trace.calls[call.number + 1 :] if c.module not in parts and _says_width(c.module)]
    makers = [c.module for c in inside if any(t is tensor for t in c.outputs)]
    readers = [c.module for c in after if any(t is tensor for t in c.inputs[:1])]
    touching = [(m, _width(m, "out")) for m in makers] + [(m, _width(m, "in")) for m in readers]
    votes = {_axis(module) for module, width in touching if tensor.shape[_axis(module)] == width}
    if len(votes) == 1:
        return votes.pop()
    near = [_width(c.module, "out") for c in inside[-1:]] + [_width(c.module, "in") for c in after[:1]]
    for width in near:
        fitting = [axis for axis in (1, -1) if tensor.shape[axis] == width]
        if len(fitting) == 1:
            return fitting[0]
    return _only(name, tensor, {_axis(c.module) for c in inside})


def axis_by_parts(name: str, tensor: Tensor, layer: nn.Module, network: nn.Module) -> int:
    """The channel axis of a layer's output, determined from its submodules; if it has none, from its network's.

    Raises:
        PoolError: Both axes are possible.
    """
    inside = [part for part in layer.modules() if _says_width(part)]
    fitting = {axis for part in inside for axis in (1, -1) if tensor.shape[axis] == _width(part, "out")}
    if len(fitting) == 1:
        return fitting.pop()
    return _only(name, tensor, {_axis(part) for part in inside or filter(_says_width, network.modules())})


def _only(name: str, tensor: Tensor, axes: set[int]) -> int:
    if len(axes) != 1:
        raise PoolError(
            f"cannot tell which axis of the output {tuple(tensor.shape)} of layer {name!r} has the channels; "
            f"{OTHERWISE}"
        )
    (axis,) = axes
    return axis


def _says_width(module: nn.Module) -> bool:
    """Whether a module's kind determines the channel axis, and its weights the number of channels."""
    return isinstance(module, nn.modules.conv._ConvNd | nn.Linear) or _norm_width(module) is not None


def _axis(module: nn.Module) -> int:
    if isinstance(module, nn.modules.conv._ConvNd):
        return 1
    if isinstance(module, nn.Linear):
        return -1
    first = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)
    # Layer normalisations over the channels of maps: LayerNorm2d of timm and torchvision, Hugging Face's ConvNext.
    first |= "2d" in type(module).__name__ or getattr(module, "data_format", "") == "channels_first"
    return 1 if first else -1


def _width(module: nn.Module, side: Side) -> int | None:
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
    # Normalisations of other libraries, such as RMSNorm of timm and of Hugging Face.
    weight = getattr(module, "weight", None)
    named = "norm" in type(module).__name__.lower()
    return len(weight) if named and isinstance(weight, Tensor) and weight.ndim == 1 else None

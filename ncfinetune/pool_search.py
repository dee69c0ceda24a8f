"""The pooling of the outputs of a network's layers, found once and then applied to every batch.

It is found in one pass of a few samples; hooks then apply the pools::

    pools = find_pools(module, find_layers(module, ["layer3.1", "blocks.*"]), run)
    features = pools["layer3.1"](output)  # (N, d), a copy
    pools["layer3.1"].describe()  # "mean over positions"

``run`` passes a few samples through ``module`` and returns the classifier's input ``(N, d)`` or, if that is unknown,
the logits. If the module cannot be run a second time, `guess_pool` uses its submodules alone.

Legend: ``N`` samples, ``C`` channels, ``T`` tokens, ``d`` feature width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from ncfinetune.channels import axis_by_parts, axis_by_pass
from ncfinetune.passes import buffers_kept, eval_mode
from ncfinetune.pooling import (
    ALL_TOKENS,
    CLASS_TOKEN,
    OTHERWISE,
    NoTensorError,
    Pool,
    PoolError,
    Positions,
    SampleAxisError,
    no_tensor,
    tensors,
)
from ncfinetune.tokens import FeatureGradients, LastTokens, last_tokens
from ncfinetune.tracing import Call, Trace

# Names of the class tokens of timm, torchvision and Hugging Face.
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
# Layers of torch whose `batch_first` tells the axis of the samples in their output.
_OF_SEQUENCES = (
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
    nn.Transformer,
)
# The tensors of an output that can be pooled, by index, with the pool of each.
_Candidates = dict[int, tuple[Tensor, Pool]]


def find_pools(
    module: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], Any], strict: bool = True
) -> dict[str, Pool]:
    """The pooling of each layer's output to one vector per sample, found in one pass of a few samples.

    The channel axis is determined by the modules that output, read or follow the tensor, see `axis_by_pass`; the
    tokens to average by the gradient of the features, see `ncfinetune.tokens`. In a network that pools its tokens by
    attention the features depend on all tokens. If an output has several tensors, the first one that the features
    depend on is used.

    Weights, gradients, statistics, modes and the random state do not change.

    Args:
        module: The module that runs, without the wrapper of a compiler.
        layers: Its layers, by name.
        run: Passes at least two samples through the module; returns the classifier's input, or an output computed from
            it.
        strict: Refuse layers that can't be pooled, instead of leaving them out, for whatever reason.

    Returns:
        A pool for each layer that ran, in the order in which they ran.

    Raises:
        PoolError: A layer's output has no tensor with one entry per sample, or two possible channel axes.
        NoTensorError: A layer's output holds no tensor.
        SampleAxisError: The samples are not on the first axis of a layer's output, ``strict`` or not.
        TokensDifferError: Features depend on other tokens in each sample, ``strict`` or not.
    """
    # Validation runs in inference mode, whose tensors cannot have gradients.
    with torch.inference_mode(False), torch.enable_grad(), isolate_rng(), eval_mode(module), buffers_kept(module):
        trace = Trace(module)
        features = trace.of(run)
        found: dict[str, _Candidates] = {}
        for name, call in trace.last_calls(layers).items():
            try:
                found[name] = _candidates(name, call, trace, len(features))
            except (PoolError, NoTensorError) as error:
                if strict or isinstance(error, SampleAxisError):
                    raise
        return _settled(found, trace, features)


def _candidates(name: str, call: Call, trace: Trace, samples: int) -> _Candidates:
    if not call.outputs:
        raise no_tensor(name, call.output)
    _refuse_sequence_first(name, call.outputs, call.module)
    found = {}
    # Behind its outputs a recurrent layer has states, whose first axis is that of its layers.
    outputs = call.outputs[:1] if isinstance(call.module, nn.RNNBase) else call.outputs
    for index, tensor in enumerate(outputs):
        if tensor.is_floating_point() and tensor.ndim > 1 and len(tensor) == samples:
            axis = 1 if tensor.ndim == 2 else axis_by_pass(name, tensor, call, trace)
            found[index] = tensor, Pool(tensor.ndim, tensor.shape[axis], axis, index=index)
    if not found:
        elsewhere = any(tensor.ndim > 2 and tensor.shape[1] == samples for tensor in call.outputs)
        where = "with them on its second axis" if elsewhere else "without one entry per sample"
        raise (SampleAxisError if elsewhere else PoolError)(
            f"the output of layer {name!r} for {samples} samples is {_shapes(call.outputs)}, {where}; {OTHERWISE}"
        )
    return found


def _settled(found: Mapping[str, _Candidates], trace: Trace, features: Tensor) -> dict[str, Pool]:
    """Choose among several tensors of a layer's output, and the positions of its tokens."""
    unsettled = [
        tensor
        for candidates in found.values()
        for tensor, pool in candidates.values()
        if len(candidates) > 1 or pool.of_tokens
    ]
    firsts = {name: next(iter(candidates.values()))[1] for name, candidates in found.items()}
    if not unsettled:  # as in most convolutional networks: no backward pass is needed
        return firsts
    gradients = FeatureGradients(features)
    last = last_tokens(trace, len(features))
    if at_the_end := _used_at_the_end(found, last, gradients):
        return {name: dataclasses.replace(pool, tokens=at_the_end) for name, pool in firsts.items()}
    gradients.find([*unsettled, *last.values()])
    ends = LastTokens(last, trace, gradients)
    pools = {}
    for name, candidates in found.items():
        used = (candidate for candidate in candidates.values() if gradients.depend_on(candidate[0]))
        tensor, pool = next(used, next(iter(candidates.values())))
        pools[name] = pool
        if pool.of_tokens:
            positions = gradients.positions(tensor)
            if not positions or ALL_TOKENS in positions:  # in one of several parts, if a skip connection joins them
                positions = ends.positions(tensor.shape[1])
            pools[name] = dataclasses.replace(pool, tokens=positions)
    return pools


def _used_at_the_end(
    found: Mapping[str, _Candidates], last: Mapping[int, Tensor], gradients: FeatureGradients
) -> tuple[Positions, ...]:
    """Positions among the network's last tokens, if all layers have the same number, as in most vision transformers.

    The gradient with respect to the last tokens passes through no block, while that for all layers is a backward pass
    of the whole network.
    """
    latest = next((number for number in reversed(list(last)) if number > 1), 0)
    alike = all(
        pool.of_tokens and tensor.shape[1] == latest and len(candidates) == 1
        for candidates in found.values()
        for tensor, pool in candidates.values()
    )
    if not alike:
        return ()
    gradients.find([last[latest]])
    return gradients.positions(last[latest])


def guess_pool(name: str, output: Any, layer: nn.Module, network: nn.Module) -> Pool:
    """The pooling of a layer's output to one vector per sample, without running the network again.

    The channel axis is determined by widths and kinds of the layer's submodules. The tokens follow the network's
    attributes: a timm network states its pooling; for another network it is the class token if it has exactly one, and
    the mean if it has none.

    Raises:
        PoolError: There are two possible channel axes, or the network has several special tokens.
        NoTensorError: The output holds no tensor.
    """
    found = list(tensors(output))
    if not found:
        raise no_tensor(name, output)
    _refuse_sequence_first(name, found, layer)
    fitting = [index for index, tensor in enumerate(found) if tensor.ndim > 1 and tensor.is_floating_point()]
    if not fitting:
        raise PoolError(
            f"the output of layer {name!r} is {_shapes(found)}, expected features (N, d) or more dimensions; "
            f"{OTHERWISE}"
        )
    index = fitting[0]
    tensor = found[index]
    axis = 1 if tensor.ndim == 2 else axis_by_parts(name, tensor, layer, network)
    pool = Pool(tensor.ndim, tensor.shape[axis], axis, index=index)
    return dataclasses.replace(pool, tokens=(_named_tokens(name, layer, network),)) if pool.of_tokens else pool


def _refuse_sequence_first(name: str, outputs: list[Tensor], layer: nn.Module) -> None:
    """Refuse outputs ``(T, N, C)`` of torch's recurrent and attention layers, which have them by default."""
    stated = (part for part in layer.modules() if isinstance(part, nn.RNNBase | nn.MultiheadAttention))
    sequential = isinstance(layer, _OF_SEQUENCES) and not getattr(next(stated, None), "batch_first", True)
    if sequential and outputs[0].ndim == 3:
        raise SampleAxisError(
            f"the output of layer {name!r} is {_shapes(outputs)} with the samples on its second axis, as its "
            f"batch_first=False says; {OTHERWISE}"
        )


def _named_tokens(name: str, layer: nn.Module, network: nn.Module) -> Positions:
    """The tokens to average, by the innermost timm network that contains a layer, or by the names of parameters."""
    timms = [part for part in network.modules() if hasattr(part, "num_prefix_tokens") and layer in set(part.modules())]
    if timms:
        prefix: Any = timms[-1].num_prefix_tokens
        if getattr(timms[-1], "global_pool", "token") == "token" and prefix > 0:
            return CLASS_TOKEN
        return ((int(prefix), None),)
    known = [path for path, _ in network.named_parameters() if path.endswith(_CLASS_TOKENS)]
    if len(known) > 1:
        raise PoolError(
            f"cannot determine which of {', '.join(known)} to use in the tokens of layer {name!r}; {OTHERWISE}"
        )
    return CLASS_TOKEN if known else ALL_TOKENS


def _shapes(found: list[Tensor]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in found)

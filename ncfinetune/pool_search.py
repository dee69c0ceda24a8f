"""How the outputs of a network's layers are pooled, found once and then applied to every batch.

One pass of a few samples tells it, and the pools serve the layers' hooks from then on::

    pools = find_pools(module, find_layers(module, ["layer3.1", "blocks.*"]), run)
    features = pools["layer3.1"](output)  # (N, d), a copy
    pools["layer3.1"].describe()  # "mean over positions"

``run`` passes a few samples through ``module`` and returns what the classifier gets ``(N, d)``, or, if that is unknown,
the logits. Where the module cannot be run a second time, `guess_pool` goes by its parts alone.

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
from ncfinetune.passes import eval_mode
from ncfinetune.pooling import (
    ALL_TOKENS,
    CLASS_TOKEN,
    OTHERWISE,
    NoTensorError,
    Pool,
    PoolError,
    Positions,
    no_tensor,
    tensors,
)
from ncfinetune.tokens import FeatureGradients, LastTokens, is_all, last_tokens
from ncfinetune.tracing import Call, Trace, buffers_kept

# How the class tokens of timm, torchvision and Hugging Face are called.
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
# An output's tensors that may be pooled, by their index, and how each would be.
_Candidates = dict[int, tuple[Tensor, Pool]]


def find_pools(
    module: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], Any], strict: bool = True
) -> dict[str, Pool]:
    """How each layer's output becomes one vector a sample, as one pass of a few samples through the module shows.

    Which axis has the channels is told by the weights that make, read or follow the output, see `axis_by_pass`; which
    tokens count by the gradient of the features, see `ncfinetune.tokens`. A network that attends over its tokens to
    pool them depends on all. Of several tensors the first is meant that the features depend on.

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
        NoTensorError: A layer's output holds no tensor.
    """
    # Validation runs in inference mode, whose tensors can have no gradient.
    with torch.inference_mode(False), torch.enable_grad(), isolate_rng(), eval_mode(module), buffers_kept(module):
        trace = Trace(module)
        features = trace.of(run)
        found: dict[str, _Candidates] = {}
        for name, call in trace.last_calls(layers).items():
            try:
                found[name] = _candidates(name, call, trace, len(features))
            except (PoolError, NoTensorError):
                if strict:
                    raise
        return _settled(found, trace, features)


def _candidates(name: str, call: Call, trace: Trace, samples: int) -> _Candidates:
    if not call.outputs:
        raise no_tensor(name, call.output)
    found = {}
    for index, tensor in enumerate(call.outputs):
        if tensor.is_floating_point() and tensor.ndim > 1 and len(tensor) == samples:
            axis = 1 if tensor.ndim == 2 else axis_by_pass(name, tensor, call, trace)
            found[index] = tensor, Pool(tensor.ndim, tensor.shape[axis], axis, index=index)
    if not found:
        raise PoolError(
            f"the output of layer {name!r} for {samples} samples is {_shapes(call.outputs)}, nothing with one entry a "
            f"sample; {OTHERWISE}"
        )
    return found


def _settled(found: Mapping[str, _Candidates], trace: Trace, features: Tensor) -> dict[str, Pool]:
    """Choose among several tensors of a layer, and the positions of its tokens."""
    unsettled = [
        tensor
        for candidates in found.values()
        for tensor, pool in candidates.values()
        if len(candidates) > 1 or pool.of_tokens
    ]
    firsts = {name: next(iter(candidates.values()))[1] for name, candidates in found.items()}
    if not unsettled:  # as in most convolutional networks, which need no backward pass
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
            if not positions or is_all(positions):
                positions = ends.positions(tensor.shape[1])
            pools[name] = dataclasses.replace(pool, tokens=positions)
    return pools


def _used_at_the_end(
    found: Mapping[str, _Candidates], last: Mapping[int, Tensor], gradients: FeatureGradients
) -> tuple[Positions, ...]:
    """Positions among the network's last tokens, if all layers have as many, as in most vision transformers.

    The gradient with respect to those passes through no block, where that of all layers is a backward pass of the
    whole network.
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
    """How a layer's output becomes one vector a sample, as far as that can be told without running the network again.

    Which axis has the channels is told by the widths and kinds of the layer's own parts. Of tokens those count that
    the network's author names: a timm network says it outright; another with one class token takes that, and one
    without any takes the mean.

    Raises:
        PoolError: Two axes could be that of the channels, or the network has several special tokens.
        NoTensorError: The output holds no tensor.
    """
    found = list(tensors(output))
    if not found:
        raise no_tensor(name, output)
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


def _named_tokens(name: str, layer: nn.Module, network: nn.Module) -> Positions:
    """The tokens that count, as the innermost timm network that holds a layer, or the names of parameters say."""
    timms = [part for part in network.modules() if hasattr(part, "num_prefix_tokens") and layer in set(part.modules())]
    if timms:
        prefix: Any = timms[-1].num_prefix_tokens
        if getattr(timms[-1], "global_pool", "token") == "token" and prefix > 0:
            return CLASS_TOKEN
        return ((int(prefix), None),)
    known = [path for path, _ in network.named_parameters() if path.endswith(_CLASS_TOKENS)]
    if len(known) > 1:
        raise PoolError(f"cannot tell which of {', '.join(known)} counts in the tokens of layer {name!r}; {OTHERWISE}")
    return CLASS_TOKEN if known else ALL_TOKENS


def _shapes(found: list[Tensor]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in found)

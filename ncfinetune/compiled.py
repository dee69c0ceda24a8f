"""Blocks of a network through `torch.compile`, one by one, so that hooks on them need no other code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn


class CompiledBlocks:
    """Compiles the blocks of a network, each for itself, and lets the network run with them.

    Compiled code keeps calling the hooks that it was made with, and only those. Here a block's own hooks are outside
    of what is compiled: they come and go without compiling anew, and a callback that measures blocks costs no graph. A
    block with hooks further in runs as it is while it has them.

    A shape of batch is compiled, for training and for evaluation, once two batches in a row have had it. The smaller
    last one of an epoch does not become a graph of its own, nor graphs of any size out of the others, which are slower.

    Args:
        names: Paths of the blocks in the network.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._functions: dict[str, Callable[..., Any]] = {}
        self._last: dict[bool, torch.Size] = {}
        self._repeated: set[tuple[bool, torch.Size]] = set()

    def __getstate__(self) -> dict[str, Any]:
        # Compiled functions are made anew where a network was copied to or unpickled.
        return {**vars(self), "_functions": {}}

    @contextmanager
    def inside(self, net: nn.Module, images: Tensor) -> Iterator[None]:
        """While the context lasts, run the network's blocks compiled if its batch is of a shape that repeats."""
        replaced = []
        if self._repeats(net.training, images.shape) and not torch.compiler.is_compiling():
            for name in self.names:
                block = net.get_submodule(name)
                if "forward" not in vars(block) and not _hooked_inside(block):
                    # Past nn.Module, and only for now: copies and pickles of the block never see it.
                    vars(block)["forward"] = partial(self._function(name), block)
                    replaced.append(block)
        try:
            yield
        finally:
            for block in replaced:
                del vars(block)["forward"]

    def _repeats(self, training: bool, shape: torch.Size) -> bool:
        if self._last.get(training) == shape:
            self._repeated.add((training, shape))
        self._last[training] = shape
        return (training, shape) in self._repeated

    def _function(self, name: str) -> Callable[..., Any]:
        if name not in self._functions:
            # A code object of its own: `torch.compile` keeps at most eight graphs a code object, and tries all of them.
            code = _forward.__code__.replace(co_name=f"forward_of_{name.replace('.', '_')}")
            self._functions[name] = torch.compile(FunctionType(code, globals()), dynamic=False)
        return self._functions[name]


def _forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(block).forward(block, *args, **kwargs)


def _hooked_inside(block: nn.Module) -> bool:
    return any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for part in block.modules()
        if part is not block
    )

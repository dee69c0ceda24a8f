"""How the outputs of named layers become one vector a sample, found as they run for the first time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_debug
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ncfinetune.layers import Pool, few, find_pools, guess_pool, tensors


class PoolFinder:
    """Pools of named layers, found by a second run of the outermost module that runs them, on its first two samples.

    Layers that this does not reach are pooled by what they are themselves: where nothing runs them but the module's own
    step, where weights are spread over processes, or where the module cannot be run on two samples.

    Args:
        module: The module whose layers these are.
        layers: The layers, by name.
        wanted: Whether what runs now is measured.
        ends: What tells the features that reach the classifier as it runs: the layer whose output they are, and the one
            whose input they are; None where there is none, or it is not known yet.

    Attributes:
        looking: A module runs for the second time, which no observer may take for a batch.
    """

    looking: ClassVar[bool] = False

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, nn.Module],
        wanted: Callable[[], bool],
        ends: Callable[[], tuple[nn.Module | None, nn.Module | None]],
    ) -> None:
        self._module = module
        self._layers = dict(layers)
        self._wanted = wanted
        self._ends = ends
        self._pools: dict[str, Pool] = {}
        self._seen: set[nn.Module] = set()
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and to import it takes seconds
            self._find = torch.compiler.disable(self._find)  # type: ignore[method-assign]
        self.handles: list[RemovableHandle] = []
        for part in module.modules():
            inside = set(part.modules()) - {part}
            if names := [name for name, layer in self._layers.items() if layer in inside]:
                self._hook(part, names)

    def of(self, name: str, output: Any) -> Pool:
        """How this output of a layer is pooled.

        Raises:
            PoolError: That cannot be told.
            NoTensorError: The output has no tensor.
        """
        pool = self._pools.get(name)
        if pool is None or not pool.fits(output):
            pool = self._pools[name] = guess_pool(name, output, self._layers[name], self._module)
        return pool

    def _hook(self, part: nn.Module, names: list[str]) -> None:
        def look(network: nn.Module, args: Any, kwargs: Any) -> None:
            if self._wanted() and part not in self._seen:
                self._find(part, names, args, kwargs)

        self.handles.append(part.register_forward_pre_hook(look, with_kwargs=True))

    def _find(self, part: nn.Module, names: list[str], args: Any, kwargs: Any) -> None:
        self._seen.add(part)
        missing = {name: self._layers[name] for name in names if name not in self._pools}
        network: Any = getattr(part, "_orig_mod", part)
        if not missing or _is_spread(network):
            return
        features: list[Tensor] = []

        def run() -> Any:
            with self._features_caught(network) as caught:
                output = network(*few(args), **few(kwargs))
            found = [t for t in tensors(caught[-1] if caught else output) if t.ndim > 0 and t.is_floating_point()]
            features.append(next((t for t in found if t.ndim == 2), found[0]))
            return features[-1]

        try:
            with _second_run(network):
                pools = find_pools(network, missing, run, strict=False)
        except Exception as error:  # it is anybody's code, made for whole batches
            rank_zero_debug(f"cannot run {type(network).__name__} on two samples ({type(error).__name__}: {error})")
            return
        # Of a network that ends in tokens it is not known which of them its user takes.
        whole = features[-1].ndim == 2
        self._pools |= {name: pool for name, pool in pools.items() if whole or not pool.of_tokens}

    @contextmanager
    def _features_caught(self, network: nn.Module) -> Iterator[list[Any]]:
        caught: list[Any] = []
        maker, reader = self._ends()
        inside = set(network.modules()) - {network}
        with ExitStack() as stack:
            if maker in inside:
                hook = maker.register_forward_hook(lambda m, args, output: caught.append(output))
                stack.callback(hook.remove)
            elif reader in inside:
                hook = reader.register_forward_pre_hook(
                    lambda m, args, kwargs: caught.append(args[0] if args else kwargs["input"]), with_kwargs=True
                )
                stack.callback(hook.remove)
            yield caught


@contextmanager
def _second_run(network: nn.Module) -> Iterator[None]:
    """While the context lasts nothing is measured, logged or compiled."""
    loggers = [part for part in network.modules() if hasattr(part, "log_dict") and "log" not in vars(part)]
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        PoolFinder.looking = True
        for part in loggers:
            vars(part)["log"] = vars(part)["log_dict"] = lambda *args, **kwargs: None
        try:
            yield
        finally:
            PoolFinder.looking = False
            for part in loggers:
                del vars(part)["log"], vars(part)["log_dict"]


def _is_spread(network: nn.Module) -> bool:
    """Whether a run outside of a step would upset the strategy that has spread the weights over processes.

    They are DTensors, pieces of FSDP's flat parameters, or DeepSpeed's. Versions of torch that cannot be told to leave
    compiled parts alone count too.
    """
    kinds = {type(part).__name__ for part in network.modules()}
    compiled = "OptimizedModule" in kinds and not hasattr(torch.compiler, "set_stance")
    marks = ("placements", "ds_id", "_is_flat_param")
    spread = any(hasattr(parameter, mark) for parameter in network.parameters() for mark in marks)
    return compiled or spread or "FullyShardedDataParallel" in kinds

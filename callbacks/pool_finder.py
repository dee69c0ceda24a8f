"""PoolFinder: finds the pooling of any module's layers when they run for the first time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_debug
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ncfinetune.passes import unlogged
from ncfinetune.pool_search import find_pools, guess_pool
from ncfinetune.pooling import Pool, SampleAxisError, TokensDifferError, tensors
from ncfinetune.tracing import few

from .hook import Hook

# Errors of a forward that was written for whole batches, or for the module's own step, on two samples of a batch.
_MISFITS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)


class PoolFinder:
    """Pools of named layers, found by a second run of the outermost module that runs them, on its first two samples.

    Some layers cannot be reached by a second run: layers that only the module's own step runs, layers with sharded
    weights, layers in compiled code, and layers of a module that fails on two samples. Their pooling is derived from
    their own submodules. Each layer is examined once; later batches cost a comparison of shapes.

    Args:
        module: The module with the layers.
        layers: The layers, by name.
        wanted: Returns whether the current run is measured.
        ends: Returns the layer whose output, and the layer whose input, are the features that reach the classifier;
            None for a layer that does not exist or is not known yet.

    Attributes:
        looking: Whether a module runs for the second time, which observers must not count as a batch.
        handles: The hooks, which the owner of this object removes.
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
        self._guess = guess_pool
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and the import takes seconds
            self._guess = torch.compiler.disable(guess_pool)  # type: ignore[no-untyped-call]  # it has no types
        self.handles: list[RemovableHandle] = []
        for part in _not_compiled(module):
            inside = set(part.modules()) - {part}
            if names := [name for name, layer in self._layers.items() if layer in inside]:
                self._hook(part, names)

    def of(self, name: str, output: Any) -> Pool:
        """The pooling of this output of a layer.

        Raises:
            PoolError: The pooling cannot be determined.
            NoTensorError: The output holds no tensor.
        """
        pool = self._pools.get(name)
        if pool is None or not pool.fits(output):
            pool = self._pools[name] = self._guess(name, output, self._layers[name], self._module)
        return pool

    def _hook(self, part: nn.Module, names: list[str]) -> None:
        def look(network: nn.Module, args: Any, kwargs: Any) -> None:
            # Under torch.compile the first condition is a constant, so that the whole hook is compiled away.
            if torch.compiler.is_compiling() or part in self._seen or _runs_a_step(part):
                return
            if self._wanted():
                self._seen.add(part)
                missing = {name: self._layers[name] for name in names if name not in self._pools}
                if missing and _may_run_again(part):
                    self._find(getattr(part, "_orig_mod", part), missing, args, kwargs)

        self.handles.append(part.register_forward_pre_hook(Hook(look), with_kwargs=True))

    def _find(self, network: nn.Module, missing: Mapping[str, nn.Module], args: Any, kwargs: Any) -> None:
        features: list[Tensor] = []

        def run() -> Any:
            with self._features_caught(network) as caught:
                output = network(*few(args), **few(kwargs))
            found = [t for t in tensors(caught[-1] if caught else output) if t.ndim > 0 and t.is_floating_point()]
            features.extend([t for t in found if t.ndim == 2] or found)
            return features

        try:
            with _second_run(network):
                pools = find_pools(network, missing, run, strict=False)
        except (SampleAxisError, TokensDifferError):
            raise
        except _MISFITS as error:
            rank_zero_debug(f"cannot run {type(network).__name__} on two samples ({type(error).__name__}: {error})")
            return
        # If a network returns tokens, the token that its user takes is unknown.
        whole = features[0].ndim == 2
        self._pools |= {name: pool for name, pool in pools.items() if whole or not pool.of_tokens}

    @contextmanager
    def _features_caught(self, network: nn.Module) -> Iterator[list[Any]]:
        """A context that collects the classifier's input, if a layer in ``network`` outputs or takes it."""
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


def _not_compiled(module: nn.Module) -> Iterator[nn.Module]:
    """The module and its submodules outside compiled code, where hooks would become a part of the graphs."""
    compiled = [part for part in module.modules() if hasattr(part, "_orig_mod")]
    inside = {part for wrapper in compiled for part in wrapper.modules() if part is not wrapper}
    return (part for part in module.modules() if part not in inside)


def _runs_a_step(part: nn.Module) -> bool:
    """Whether Lightning replaced its forward by a step, as under a wrapping strategy; a step must run only once."""
    return "forward" in vars(part) and not hasattr(part, "_orig_mod")


@contextmanager
def _second_run(network: nn.Module) -> Iterator[None]:
    """A context in which nothing is measured, logged or compiled."""
    with unlogged(network), ExitStack() as stack:
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        PoolFinder.looking = True
        try:
            yield
        finally:
            PoolFinder.looking = False


def _may_run_again(part: nn.Module) -> bool:
    """Whether a run outside of a step has no side effects.

    It has if a strategy has sharded the weights over processes (DTensors, pieces of FSDP's flat parameters, or
    DeepSpeed's), and in versions of torch that cannot run compiled parts uncompiled.
    """
    kinds = {type(inner).__name__ for inner in part.modules()}
    compiled = "OptimizedModule" in kinds and not hasattr(torch.compiler, "set_stance")
    marks = ("placements", "ds_id", "_is_flat_param")
    spread = any(hasattr(parameter, mark) for parameter in part.parameters() for mark in marks)
    return not (compiled or spread or "FullyShardedDataParallel" in kinds)

"""A backbone in two parts: a frozen prefix, whose outputs a cache can store, and a suffix in which layers train.

Legend: ``N`` samples, ``d`` width of the penultimate features, ``d_l`` width of a skipped layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ncfinetune.backbone import Backbone
from ncfinetune.layers import enclosing_block
from ncfinetune.pooling import detached, silent
from ncfinetune.store import Stored
from ncfinetune.tail import Tail

SkipGradient = Literal["both", "skip"]


class Split:
    """The inputs of a head: the penultimate features of a backbone, and the pooled outputs of skipped layers.

    Called on images it runs the whole network. After `cut`, ``prefix`` runs the frozen layers alone and ``suffix`` runs
    the other layers on their outputs, with the same result. Without tuned layers ``prefix`` returns the features.

    Args:
        backbone: The network.
        tuned: Names of its tuned layers.
        skips: Names of the layers that skip connections lead from.
        gradient: ``both`` lets the gradient reach a skipped layer through the following layers as well, ``skip``
            through its skip connection alone.

    Attributes:
        widths: Widths of the features, ``d`` first and then each ``d_l``.

    Raises:
        ValueError: A layer in ``skips`` does not run, or is named twice; the backbone has the hooks of another `Split`.
    """

    def __init__(
        self, backbone: Backbone, tuned: Iterable[str], skips: Sequence[str], gradient: SkipGradient = "both"
    ) -> None:
        hooks = [hook for part in backbone.modules() for hook in part._forward_hooks.values()]
        if any(getattr(hook, "__func__", None) is Split._catch for hook in hooks):
            raise ValueError(
                "this Backbone already serves another FineTuner with a skip connection; build another Backbone"
            )
        self.backbone = backbone
        self.tune(tuned)
        self._gradient = gradient
        self._caught: dict[nn.Module, Tensor] = {}
        self._tail: Tail | None = None
        self.skip_from(skips)

    def tune(self, tuned: Iterable[str]) -> None:
        """Take these layers as the tuned ones; the network must not be cut."""
        self._tuned = tuple(tuned)

    def __getstate__(self) -> dict[str, Any]:
        """The state without what a run of the network alone has left: a copy cannot have its graph."""
        return {**vars(self), "_caught": {}}

    @contextmanager
    def expanded(self) -> Iterator[None]:
        """A context for runs of the network alone, in which the gradient reaches all layers whatever ``gradient`` is.

        What these runs leave of the skipped layers' outputs, with their graphs, is dropped at its end.
        """
        gradient, self._gradient = self._gradient, "both"
        try:
            yield
        finally:
            self._gradient = gradient
            self._caught.clear()

    def skip_from(self, skips: Sequence[str]) -> None:
        """Add skip connections from these layers; there must be none yet."""
        self.skips = tuple(skips)
        self._pools = {self.backbone.layer(name): self.backbone.pool(name) for name in skips}
        if len(self._pools) < len(self.skips):
            raise ValueError(f"skip_from={list(self.skips)} names a layer twice; name each layer once")
        self.widths = (self.backbone.dim, *(pool.dim for pool in self._pools.values()))
        for layer in self._pools:
            # Never removed: a compiled network ignores hooks that are added after its first call.
            layer.register_forward_hook(self._catch)

    def __call__(self, x: Tensor | Stored) -> tuple[Tensor, ...]:
        """Penultimate features ``(N, d)`` and each skipped layer's ``(N, d_l)``, from images or stored values."""
        return self.suffix(x.value) if isinstance(x, Stored) else self._with_skips(self.backbone(x))

    def prefix(self, images: Tensor) -> Tensor:
        """The frozen layers' outputs for images: the input of the first tuned layer, or all features concatenated."""
        return torch.cat(self(images), 1) if self._tail is None else self._tail.capture(images)

    def suffix(self, value: Tensor) -> tuple[Tensor, ...]:
        """The features, from an output of ``prefix``."""
        if self._tail is None:
            return torch.split(value, list(self.widths), 1)
        return self._with_skips(self._tail(value))

    def cut(self, images: Tensor) -> str:
        """Cut the network before its first tuned layer, check on a few images that this is exact, and return its name.

        Raises:
            ValueError: Running the network in two parts is not exact.
        """
        place = " and ".join(["features", *self.skips])
        try:
            if self._tuned:
                place = "its first tuned layer"
                if "" in self._tuned:
                    raise ValueError("that is the network itself, which directly holds tuned parameters")
                blocks = [enclosing_block(self.backbone.net, name) for name in (*self._tuned, *self.skips)]
                self._tail = Tail(self.backbone, map(self.backbone.layer, blocks), images)
                place = next(path for path, m in self.backbone.net.named_modules() if m is self._tail.layer)
            whole, part = self(images), self.suffix(self.prefix(images))
            if not all(_close(a, b) for a, b in zip(whole, part, strict=True)):
                raise ValueError("the layers from there on depend on more than its input")
        except ValueError as error:
            self.join()
            raise ValueError(f"cannot run from {place} on in {self.backbone.spec['name']}: {error}") from error
        return place

    def join(self) -> None:
        """Undo the cut."""
        self._tail = None

    def has_foreign_hook(self) -> bool:
        """Whether a layer that ``suffix`` leaves out has a forward hook that is not of this class."""
        silent = list(self.backbone.modules()) if self._tail is None else self._tail.left_out()
        hooks = [hook for part in silent for hook in part._forward_hooks.values()]
        return any(getattr(hook, "__self__", None) is not self for hook in hooks)

    def _catch(self, layer: nn.Module, args: Any, output: Any) -> Any:
        """Keep a skipped layer's pooled output; with ``gradient="skip"`` the following layers get it detached."""
        self._caught[layer] = self._pools[layer](output)
        return output if self._gradient == "both" else detached(output)

    def _with_skips(self, features: Tensor) -> tuple[Tensor, ...]:
        for name, layer in zip(self.skips, self._pools, strict=True):
            if layer not in self._caught:
                raise silent(name)
        return features, *(self._caught.pop(layer) for layer in self._pools)


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-3 * float(a.abs().max()))

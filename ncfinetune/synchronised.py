"""Batch normalisation over all processes, of layers that hold an activation as well."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.plugins import LayerSync, TorchSyncBatchNorm
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# The synchronised class of each class of layer whose `forward` does more than to normalise.
_SYNCHRONISED: dict[Any, type[nn.SyncBatchNorm]] = {
    _BatchNorm.forward: nn.SyncBatchNorm,
    BatchNormAct2d.forward: SyncBatchNormAct,
}


class SynchronisedBatchNorm(LayerSync):
    """Has batch-norm layers compute their statistics over all processes, and leaves them otherwise as they are.

    Torch's conversion, which Lightning calls, makes new layers of them. These lack the activation that timm's
    `BatchNormAct2d` holds, and are unknown to whoever has hooks on the old ones or has named them to be trained. Here
    the layers stay, and change their class during a fit.
    """

    def __init__(self) -> None:
        self._before: dict[_BatchNorm, type[_BatchNorm]] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronise the layers.

        Raises:
            ValueError: A layer does more than to normalise, and has no synchronised counterpart.
        """
        layers = {path: part for path, part in model.named_modules() if isinstance(part, _BatchNorm)}
        for path, part in layers.items():
            if isinstance(part, nn.SyncBatchNorm):
                continue
            kind = _SYNCHRONISED.get(type(part).forward)
            if kind is None:
                raise ValueError(
                    f"sync_batchnorm takes layers that normalise, and timm's BatchNormAct2d, but {path!r} is a "
                    f"{type(part).__name__}, of which only the normalisation would remain; leave sync_batchnorm out"
                )
            self._before[part] = type(part)
            part.__class__ = kind
            vars(part)["process_group"] = None  # all processes
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Give the layers their own class again."""
        for part, kind in self._before.items():
            part.__class__ = kind
            del vars(part)["process_group"]
        self._before.clear()
        return model


def synchronise(strategy: Any) -> None:
    """Replace Lightning's plugin for ``Trainer(sync_batchnorm=True)`` by `SynchronisedBatchNorm`."""
    if type(getattr(strategy, "_layer_sync", None)) is TorchSyncBatchNorm:
        strategy._layer_sync = SynchronisedBatchNorm()

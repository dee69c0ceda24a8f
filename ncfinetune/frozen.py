"""The tensors that fine-tuning must not change: recorded first, restored under averaging, compared at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import callbacks
from torch import Tensor, nn

from ncfinetune.averages import AVERAGING
from ncfinetune.checksums import fingerprint

# Share of random values from which on a network counts as not pre-trained: a new stem or head has far fewer.
_RANDOM = 0.5


class Frozen:
    """The frozen tensors of a run, by name.

    Callbacks that average weights change frozen ones too: by the rounding error of a mean of equal numbers, or by
    resetting batch-norm statistics. Under such a callback a copy is kept on the CPU and restored. Any other change is
    detected when the run ends.
    """

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}
        self._kept: dict[str, Tensor] = {}
        self._trained: dict[str, bool] = {}

    def remember(self, frozen: Mapping[str, Tensor], module: nn.Module, trainer: Any) -> None:
        """Record the frozen tensors, the trained parameters, and whether a callback of the trainer averages weights."""
        self._digests = _digests(frozen)
        self._trained = _trained(module)
        if any(isinstance(callback, AVERAGING) for callback in trainer.callbacks):
            self._kept = {name: tensor.detach().cpu().clone() for name, tensor in frozen.items()}

    def restore(self, module: nn.Module) -> None:
        """Restore the frozen tensors if a callback may have changed them.

        Raises:
            ValueError: Other parameters require a gradient than at the start of the run.
        """
        now = _trained(module)
        # Pruning renames a parameter.
        if other := [name for name, trains in self._trained.items() if now.get(name, trains) != trains]:
            raise ValueError(
                f"requires_grad of {_some(other)} was changed during the run, which a FineTuner's optimiser and delta "
                "do not follow; name the layers to train by train=..., in a separate run"
            )
        if self._kept:
            state = module.state_dict()
            for name, tensor in self._kept.items():
                state[name].copy_(tensor)

    def restore_in(self, state: dict[str, Tensor]) -> None:
        """Restore the frozen tensors in a state that is about to be saved."""
        state |= {name: tensor.to(state[name].device) for name, tensor in self._kept.items()}

    def check(self, frozen: Mapping[str, Tensor]) -> None:
        """Compare the tensors with those at the start of the run.

        Raises:
            ValueError: Some have changed.
        """
        now = _digests(frozen)
        if changed := [name for name, digest in self._digests.items() if now.get(name) != digest]:
            raise ValueError(
                f"frozen tensors were changed during the run: {_some(changed)}; a delta could not reproduce this "
                "model, so none is written. Leave out the callback that changes them, or train those layers"
            )


def refuse_tuners(module: nn.Module, trainer: Any) -> None:
    """Refuse callbacks that change which layers are trained, or that change frozen tensors.

    Raises:
        ValueError: There is such a callback.
    """
    frozen = {id(p) for p in module.parameters() if not p.requires_grad}
    for callback in trainer.callbacks:
        name = type(callback).__name__
        if isinstance(callback, callbacks.BaseFinetuning):
            raise ValueError(
                f"{name} unfreezes layers during the run, but a FineTuner trains the layers of train=... from start to "
                "end; leave it out, or start a second run with other layers from the first run's checkpoint"
            )
        pruned = getattr(callback, "_parameters_to_prune", None) if isinstance(callback, callbacks.ModelPruning) else ()
        if any(id(getattr(layer, weight)) in frozen for layer, weight in pruned or ()):
            raise ValueError(f"{name} would prune frozen layers; give it parameters_to_prune of trained layers")


def refuse_random(network: nn.Module, random: Mapping[str, nn.Parameter]) -> None:
    """Refuse a network that is not pre-trained, or with frozen parameters that are still ``random``.

    Raises:
        ValueError: It is not pre-trained, or frozen parameters are random.
    """
    if sum(p.numel() for p in random.values()) > _RANDOM * sum(p.numel() for p in network.parameters()):
        raise ValueError(
            "the backbone has random weights, so there is nothing to fine-tune; give a checkpoint, or pretrained=true "
            "among the backbone's arguments (allow_random=true runs all the same)"
        )
    if frozen := [name for name, p in random.items() if not p.requires_grad]:
        raise ValueError(
            f"frozen layers have random weights, since no file has {_some(frozen)}; name them in train, or give "
            "weights that have them (allow_random=true runs all the same)"
        )


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: fingerprint({name: tensor}) for name, tensor in tensors.items()}


def _trained(module: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in module.named_parameters()}


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

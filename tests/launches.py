"""What code would ask of an accelerator, counted on the CPU: kernel launches, waits for values, and memory."""

from collections import Counter
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NO_LAUNCH = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "_unsafe_view",
    "detach",
    "lift_fresh",
    "promote_types",
)
_LOOKS = (
    "_local_scalar_dense",
    "nonzero",
    "unique",
    "_unique",
    "_unique2",
    "bincount",
    "masked_select",
    "is_nonzero",
    "equal",
)


class Launches(TorchDispatchMode):
    """Counts operators that compute, operators whose result the host waits for, and bytes that live at a time.

    Tensors that exist before it is entered are not counted. A boolean mask for an index counts as a look: it becomes
    `nonzero`. With the device ``meta`` work of the host on the CPU is left out, and looks at tensors raise.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self._device = device
        self.launches: Counter[str] = Counter()
        self.looks: Counter[str] = Counter()
        self._storages: list[tuple[StorageWeakRef, int]] = []
        self.peak = 0

    @property
    def total(self) -> int:
        return self.launches.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        aliases = [value.alias_info for value in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if name in _LOOKS:
            self.looks[name] += 1
        elif not is_view and name not in _NO_LAUNCH and any(t.device.type == self._device for t in tensors):
            self.launches[name] += 1
        if not is_view and not any(alias is not None for alias in aliases):
            for tensor in tensors:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        self._storages = [(known, size) for known, size in self._storages if not known.expired()]
        self._storages.append((StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self._storages))

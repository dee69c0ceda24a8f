"""Copies of loaders, streams and samplers that iterate independently."""

from __future__ import annotations

import io
import pickle
import types
import warnings
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
from torch import Tensor, nn

# Types that a copy shares with the original: without state that a pass changes, or too large to copy.
_SHARED = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type, nn.Module, BaseContext, np.memmap)
_SHARED_BY_NAME = frozenset({"Trainer", "LightningDataModule"})  # of either package of Lightning


class CopyError(ValueError):
    """A loader, stream or sampler cannot be copied."""


def copy_of(source: Any, *shared: Any) -> Any:
    """A copy of a loader, stream or sampler that iterates independently, with its counters, generators and orders.

    Functions, modules and arrays with more than one axis are shared: such arrays are images, while arrays with one axis
    may be an order that is shuffled in place. Active iterators of data loaders, with their workers, are left out.

    Args:
        source: The object to copy.
        shared: Further objects that the copy shares with it.

    Raises:
        CopyError: A part of it cannot be pickled, such as a generator or an open file.
    """
    content, kept = io.BytesIO(), {id(value): value for value in shared}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # from itertools, whose iterators Python 3.14 does not pickle
            _Pickler(content, kept).dump(source)
        content.seek(0)
        return _Unpickler(content, kept).load()
    except Exception as error:  # foreign objects may raise anything
        raise CopyError(f"a {type(source).__name__} cannot be copied ({error})") from error


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, kept: dict[int, Any]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._kept = kept

    def persistent_id(self, value: Any) -> int | None:
        names = {kind.__name__ for kind in type(value).__mro__}
        if "_BaseDataLoaderIter" in names:
            self._kept[id(value)] = None
        elif isinstance(value, _SHARED) or names & _SHARED_BY_NAME or (_is_array(value) and value.ndim > 1):
            self._kept[id(value)] = value
        return id(value) if id(value) in self._kept else None


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, kept: dict[int, Any]) -> None:
        super().__init__(file)
        self._kept = kept

    def persistent_load(self, identity: int) -> Any:
        return self._kept[identity]

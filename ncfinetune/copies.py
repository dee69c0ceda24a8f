"""Copies of loaders, streams and samplers that iterate independently."""

from __future__ import annotations

import io
import pickle
import threading
import types
import warnings
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
from torch import Tensor, nn

# Types that a copy shares with the original: without state that a pass changes, or too large to copy.
_SHARED = (types.FunctionType, types.ModuleType, type, nn.Module, BaseContext, np.memmap)
_SHARED_BY_NAME = frozenset({"Trainer", "LightningDataModule"})  # of either package of Lightning
# A copy has new locks, since the original may hold its own while it iterates.
_LOCKS: dict[type, Any] = {type(make()): make for make in (threading.Lock, threading.RLock)}


class CopyError(ValueError):
    """A loader, stream or sampler cannot be copied."""


def copy_of(source: Any, *shared: Any, shares_uncopyable: bool = False) -> Any:
    """A copy of a loader, stream or sampler that iterates independently, with its counters, generators and orders.

    Functions, modules and arrays with more than one axis are shared: such arrays are images, while arrays with one axis
    may be an order that is shuffled in place. Active iterators of data loaders, with their workers, are left out. Locks
    are new ones.

    Args:
        source: The object to copy.
        shared: Further objects that the copy shares with it.
        shares_uncopyable: Share parts that cannot be pickled too, such as a connection to a database, unless they are
            iterators.

    Raises:
        CopyError: A part of it cannot be pickled, such as a generator or an open file, which are iterators.
    """
    content, kept = io.BytesIO(), {id(value): value for value in shared}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # from itertools, whose iterators Python 3.14 does not pickle
            _Pickler(content, kept, shares_uncopyable).dump(source)
        content.seek(0)
        return _Unpickler(content, kept).load()
    except Exception as error:  # foreign objects may raise anything
        raise CopyError(f"a {type(source).__name__} cannot be copied ({error})") from error


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, kept: dict[int, Any], shares_uncopyable: bool) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._kept, self._shares_uncopyable = kept, shares_uncopyable

    def persistent_id(self, value: Any) -> int | None:
        names = {kind.__name__ for kind in type(value).__mro__}
        if "_BaseDataLoaderIter" in names:
            self._kept[id(value)] = None
        elif _is_shared(value) or names & _SHARED_BY_NAME:
            self._kept[id(value)] = value
        return id(value) if id(value) in self._kept else None

    def reducer_override(self, value: Any) -> Any:
        if type(value) in _LOCKS:
            return _LOCKS[type(value)], ()
        if self._shares_uncopyable and not isinstance(value, Iterator):
            try:
                value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
            except Exception:  # foreign objects may raise anything
                return (lambda: value), ()
        return NotImplemented


def _is_shared(value: Any) -> bool:
    if isinstance(value, types.BuiltinFunctionType):  # not the method of an object, such as a generator's ``random``
        return isinstance(value.__self__, types.ModuleType | type | types.NoneType)
    return isinstance(value, _SHARED) or (_is_array(value) and value.ndim > 1)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, kept: dict[int, Any]) -> None:
        super().__init__(file)
        self._kept = kept

    def persistent_load(self, identity: int) -> Any:
        return self._kept[identity]

"""Options as built-in types, which checkpoints hold as data and deltas as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
from torch import Tensor


def built_in(value: Any) -> Any:
    """A value with the numbers and arrays of numpy and torch, sets and paths in it as built-in types.

    Other types stay as they are.

        >>> built_in({"rate": np.float64(0.5), "classes": (np.int64(1), 2), "weights": np.ones(2)})
        {'rate': 0.5, 'classes': (1, 2), 'weights': [1.0, 1.0]}
    """
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {built_in(name): built_in(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(built_in, value))
    if isinstance(value, set | frozenset):
        return sorted(map(built_in, value), key=str)
    return str(value) if isinstance(value, PurePath) else value


def foreign(options: Mapping[str, Any]) -> str | None:
    """The first of the options, as ``name=value``, that is of none of the types that JSON has; None if all are."""
    return next((f"{name}={value!r}" for name, value in options.items() if not _is_plain(value)), None)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(part) for name, part in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)  # an enumeration's may be of a subclass

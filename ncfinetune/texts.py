"""How names are ordered and listed in messages and tables."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable


def natural(text: str) -> list[tuple[float, str]]:
    """A key by which 5 shots come before 20, and layer2 before layer10."""
    parts = re.split(r"(\d+)", text)
    return [(float(part), "") if part.isdigit() else (math.inf, part) for part in parts]


def some(things: Iterable[object], most: int = 5, total: bool = False) -> str:
    """The first things, for a message: ``a, b, ...``.

    Args:
        things: Names, or what is written as its ``str``.
        most: How many are shown.
        total: Say how many there are where some are left out: ``a, b, ... (12)``.
    """
    names = [str(thing) for thing in things]
    if len(names) <= most:
        return ", ".join(names)
    return ", ".join(names[:most]) + ", ..." + (f" ({len(names)})" if total else "")

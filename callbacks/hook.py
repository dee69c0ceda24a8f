"""Hook: a function that observes the modules which it was registered on, and no copies of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any


class Hook:
    """A hook for ``register_forward_hook`` and its like, of which copies and pickles do nothing.

    A module may be copied while it is observed, as averages of weights by hand are, or be pickled with a checkpoint's
    hyper-parameters. A plain function would observe the copy too, and a local one cannot be pickled. The pickle holds
    nothing of this package, so that it is read where that is not installed.

    Args:
        call: What the hook does.
    """

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # which takes any arguments, and returns None

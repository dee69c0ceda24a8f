"""Notices: what the reader of a pass's numbers should know, said once."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from .layer_metrics import Result


class Notices:
    """Messages about passes, each of which the first process gives once.

    Args:
        asker: Name of the callback, for messages.
    """

    def __init__(self, asker: str) -> None:
        self._asker = asker
        self._said: set[tuple[str, str]] = set()

    def layers(self, description: str) -> None:
        """Say what is measured, and how it is pooled."""
        if self._is_new("layers", ""):
            rank_zero_info(f"{self._asker} measures {description}")

    def classes(self, result: Result, data: str, num_classes: int) -> None:
        """Say of each data set that a limited pass has not seen all classes."""
        seen = max((int(moments.present.sum()) for moments in result.moments.values()), default=0)
        if seen < num_classes and self._is_new("classes", data):
            rank_zero_warn(
                f"{self._asker} saw {seen} of {num_classes} classes in a pass over the {data} set, which a limit "
                "on batches cuts short: its numbers are of those alone; raise the limit, or shuffle the set"
            )

    def rounding(self, result: Result, data: str) -> None:
        """Say of each layer that its nc1 is not exact to 1e-6."""
        for layer, text in result.rounding.items():
            if self._is_new("rounding", layer):
                rank_zero_info(f"{self._asker}: {text}; of layer {layer!r}, here on the {data} set, this is said once")

    def _is_new(self, kind: str, subject: str) -> bool:
        new = (kind, subject) not in self._said
        self._said.add((kind, subject))
        return new

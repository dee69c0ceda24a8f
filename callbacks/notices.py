"""Notices: messages about the numbers of a pass, each given once."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from .layer_metrics import Result


class Notices:
    """Messages about passes, each given once, by rank 0.

    Args:
        asker: Name of the callback, for messages.
    """

    def __init__(self, asker: str) -> None:
        self._asker = asker
        self._said: set[tuple[str, str]] = set()

    def layers(self, description: str) -> None:
        """Report the measured layers, and how they are pooled."""
        if self._is_new("layers", ""):
            rank_zero_info(f"{self._asker} measures {description}")

    def classes(self, result: Result, data: str, num_classes: int) -> None:
        """Report each data set of which a limited pass has not seen all classes."""
        seen = max((int(moments.present.sum()) for moments in result.moments.values()), default=0)
        if seen < num_classes and self._is_new("classes", data):
            rank_zero_warn(
                f"{self._asker} saw {seen} of {num_classes} classes in a pass over the {data} set, which a limit "
                "on batches cuts short: its numbers cover these classes alone; raise the limit, or shuffle the set"
            )

    def rounding(self, result: Result, data: str) -> None:
        """Report each layer whose nc1 is not exact to 1e-6."""
        for layer, text in result.rounding.items():
            if self._is_new("rounding", layer):
                rank_zero_info(f"{self._asker}: {text} (layer {layer!r}, {data} set; reported once)")

    def _is_new(self, kind: str, subject: str) -> bool:
        new = (kind, subject) not in self._said
        self._said.add((kind, subject))
        return new

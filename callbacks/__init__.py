"""Callbacks: they watch a training run, whosever it is."""

from .probe import OnlineProbe as OnlineProbe
from .tracker import NeuralCollapseTracker as NeuralCollapseTracker

__all__ = ["NeuralCollapseTracker", "OnlineProbe"]

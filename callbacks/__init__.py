"""Callbacks: they watch a training run of any LightningModule."""

from .probe import OnlineProbe as OnlineProbe
from .tracker import NeuralCollapseTracker as NeuralCollapseTracker

__all__ = ["NeuralCollapseTracker", "OnlineProbe"]

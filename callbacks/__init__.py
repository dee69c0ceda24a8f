"""Callbacks: they watch a training run of any LightningModule."""

if __name__ != "ncfinetune.callbacks":
    raise ImportError("this is ncfinetune.callbacks; by another name it would be a second copy of its classes")

from .probe import OnlineProbe as OnlineProbe
from .tracker import NeuralCollapseTracker as NeuralCollapseTracker

__all__ = ["NeuralCollapseTracker", "OnlineProbe"]

"""Callbacks that measure a training run of any LightningModule."""

if __name__ != "ncfinetune.callbacks":
    raise ImportError(
        "import this folder as ncfinetune.callbacks; another name would make a second copy of its classes"
    )

from .probe import OnlineProbe as OnlineProbe
from .tracker import NeuralCollapseTracker as NeuralCollapseTracker

__all__ = ["NeuralCollapseTracker", "OnlineProbe"]

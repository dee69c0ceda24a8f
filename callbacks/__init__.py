"""Callbacks: they watch a training run, whosever it is."""

from .tracker import NeuralCollapseTracker as NeuralCollapseTracker

__all__ = ["NeuralCollapseTracker"]

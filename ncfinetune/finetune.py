"""Fine-tuning: which layers train, and which features reach the classifier."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from ncfinetune.backbone import Backbone
from ncfinetune.heads import SkipHead
from ncfinetune.layers import PENULTIMATE, find_layers
from ncfinetune.learner import Classifier


class FineTuner(Classifier):
    """Trains a new classifier and chosen layers of a pre-trained backbone; the rest is frozen.

    The methods of Li et al. (arXiv 2212.12206) are points of two knobs:

    ================  =========  =============
    method            ``train``  ``skip_from``
    ================  =========  =============
    linear probe      none       (null)
    layer FT          a layer    (null)
    SCL FT            a layer    the same
    full FT           all        (null)
    ================  =========  =============

    What is frozen neither gets gradients nor updates its running statistics: it stays in eval mode.

    Args:
        num_classes: Number of classes; on the command line it comes from the data.
        backbone: A timm name, the arguments of a `Backbone`, or a `Backbone`.
        checkpoint: File with the pre-trained weights of the backbone.
        train: ``none``, ``all``, or the layers to train: a name or pattern such as ``layer3.1`` or ``blocks.1?``, or
            several.
        skip_from: Layer whose pooled output is added to the features that reach the classifier.
        optimizer: Makes an optimiser of the parameters that train; None is AdamW with learning rate 1e-3.
        lr_scheduler: Makes a scheduler of that optimiser, stepped once an epoch.

    Raises:
        ValueError: No layer of that name, or a checkpoint that fits nothing.
        FileNotFoundError: No such checkpoint.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str | dict[str, Any] | Backbone,
        checkpoint: str | None = None,
        train: str | list[str] = "none",
        skip_from: str | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(num_classes, backbone, optimizer, lr_scheduler)
        if checkpoint is not None:
            self.backbone.load(checkpoint)
        self.skip_from = skip_from
        self.head = (
            nn.Linear(self.backbone.dim, num_classes)
            if skip_from is None
            else SkipHead(self.backbone.dim, self.backbone.width(skip_from), num_classes)
        )
        self._trained = _chosen(self.backbone, train)
        self.backbone.requires_grad_(False)
        for layer in self._trained:
            layer.requires_grad_(True)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        """Class logits ``(N, K)`` of images."""
        if self.skip_from is None:
            return self.head(self.backbone(x))
        features = self.backbone.stages(x, [PENULTIMATE, self.skip_from])
        return self.head(features[PENULTIMATE], features[self.skip_from])

    def on_fit_start(self) -> None:
        """Log the counts of parameters; silence Lightning's warning of modules in eval mode, since they are to be."""
        super().on_fit_start()
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")

    def train(self, mode: bool = True) -> FineTuner:
        """Switch what trains to training mode; what is frozen stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        for layer in self._trained:
            layer.train(mode)
        return self


def _chosen(backbone: Backbone, train: str | list[str]) -> list[nn.Module]:
    if train == "none":
        return []
    if train == "all":
        return [backbone]
    return list(find_layers(backbone.net, [train] if isinstance(train, str) else train).values())

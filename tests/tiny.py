"""Small things that tests of fine-tuning share: a network, an optimiser, a trainer."""

from pathlib import Path

import torch
from lightning.pytorch import Trainer

# A ResNet-18 of 10,896 parameters for the digits.
SMALL = {"name": "resnet18", "stem": "cifar", "in_chans": 1, "channels": [4, 6, 8, 10]}
# A CoaT of 11,124 parameters, whose blocks share the layers that encode positions.
SHARING = {
    **{"name": "coat_tiny", "img_size": 32, "embed_dims": [8] * 4},
    **{"serial_depths": [1] * 4, "num_heads": 8, "mlp_ratios": [1] * 4},
}


def plain_sgd(parameters) -> torch.optim.Optimizer:
    """SGD without momentum."""
    return torch.optim.SGD(parameters, lr=0.1)


def trainer_in(folder: Path, **arguments) -> Trainer:
    """A trainer of one epoch on the CPU that writes and prints nothing unless asked to."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, **{"max_epochs": 1, "enable_checkpointing": False, **quiet, **arguments})

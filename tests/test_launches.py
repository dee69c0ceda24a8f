"""What is said of the processes of a run."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from torch.multiprocessing import ProcessRaisedException

from ncfinetune import FineTuner
from ncfinetune.callbacks import NeuralCollapseTracker
from ncfinetune.datamodules import Digits

NETWORK = {"name": "test_vit", "img_size": 8, "patch_size": 4, "in_chans": 1}


@pytest.mark.parametrize(
    "what",
    [
        "this model does not get the names of its classes nor their preprocessing; a strategy such as ddp, or one",
        "another fit of this model starts from head_init='ridge' anew",
        "NeuralCollapseTracker has no values, records and plots afterwards, but its loggers have",
    ],
)
def test_what_forked_processes_do_not_return_is_warned_of(what: str, tmp_path: Path) -> None:
    said = f"strategies that fork or spawn processes return weights and logged numbers only: {what}"
    options: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2, "accelerator": "cpu", "max_epochs": 1}
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    model = FineTuner(10, NETWORK, train="none", head_init="ridge", allow_random=True)
    trainer = Trainer(**options, **quiet, default_root_dir=tmp_path, callbacks=[NeuralCollapseTracker(figures=False)])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", said)
        with pytest.raises(ProcessRaisedException, match=said):
            trainer.fit(model, Digits(shots=4, batch_size=20))

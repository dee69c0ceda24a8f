"""Run by test_observer.py: both callbacks in two processes whose collectives refuse what lies on the wrong device.

Where the processes may reduce is told by provenance: each tensor that a collective gets must have been made from the
strategy's root device or from the module, as NCCL would have it. The root device is a CPU here, so that CPU tensors are
marked as they are moved. A process of its own, since Lightning forks in it. Prints what each run ends with, as JSON.
"""

import json
import sys
import tempfile
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ncfinetune.callbacks import NeuralCollapseTracker, OnlineProbe

K, N = 3, 24


class Data(Dataset):
    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.images = torch.randn(N, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        image, label = self.images[index], index // 2 % K
        if index == 1 and self.kind == "bad label":  # of the second process
            label = K
        if index == 1 and self.kind == "nan":
            image = image * torch.nan
        return image, label


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, K))
        self.logged: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0 * self(batch[0]).nan_to_num().sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        assert isinstance(value, float) or name == "probe/loss", (name, value)
        super().log(name, value, *args, **kwargs)


class Ends(Callback):
    """Notes what the run of a process ends with."""

    def __init__(self, out: str) -> None:
        self.out = out

    def _note(self, trainer: Trainer, what: Any) -> None:
        with open(f"{self.out}/{trainer.global_rank}.json", "w") as file:
            json.dump(what, file)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, {name: float(value) for name, value in sorted(trainer.callback_metrics.items())})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._note(trainer, f"{type(exception).__name__}: {exception}")


def run(kind: str, callback: Callback) -> list[Any]:
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=2,
            strategy="ddp_fork",
            callbacks=[Ends(out), callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=out,
        )
        train = DataLoader(Data(kind), batch_size=4)
        try:
            trainer.fit(Module(), train, DataLoader(Data("good"), batch_size=4))
        except Exception as error:
            print(type(error).__name__, file=sys.stderr)
        found = []
        for rank in range(2):
            with open(f"{out}/{rank}.json") as file:
                found.append(json.load(file))
        return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(json.dumps({
        "good": run("good", NeuralCollapseTracker(K)),
        "bad label": run("bad label", NeuralCollapseTracker(K)),
        "nan": run("nan", NeuralCollapseTracker(K)),
        "probe, bad label": run("bad label", OnlineProbe(K)),
        "probe, nan": run("nan", OnlineProbe(K, knn=3)),
    }))

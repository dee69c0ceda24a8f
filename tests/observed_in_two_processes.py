"""Run by test_observer.py: both callbacks in two processes, one of which gets a mistake; how each ends, as JSON.

`log` refuses tensors but the probe's loss, since one that lies on the CPU would end a run under NCCL. A process of its
own, since Lightning forks in it.
"""

import json
import os
import tempfile
import time
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
        self(batch[0])
        return 0 * sum(parameter.sum() for parameter in self.parameters())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        assert isinstance(value, float) or name == "probe/loss", (name, value)
        super().log(name, value, *args, **kwargs)


class Ends(Callback):
    """Notes what a process ends with: its numbers, or what ``callback`` raises in ``hook``."""

    def __init__(self, out: str, callback: Callback, hook: str) -> None:
        self.out = out
        inner = getattr(callback, hook)

        def noting(trainer: Trainer, *args: Any) -> None:
            try:
                inner(trainer, *args)
            except ValueError as error:
                self.note(trainer, str(error))
                deadline = time.monotonic() + 20  # the first process to end takes the other with it
                while time.monotonic() < deadline and not os.path.exists(f"{out}/{1 - trainer.global_rank}"):
                    time.sleep(0.05)
                raise

        setattr(callback, hook, noting)

    def note(self, trainer: Trainer, what: Any) -> None:
        with open(f"{self.out}/.{trainer.global_rank}", "w") as file:
            json.dump(what, file)
        os.replace(file.name, f"{self.out}/{trainer.global_rank}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note(trainer, {name: float(value) for name, value in sorted(trainer.callback_metrics.items())})


def run(kind: str, hook: str, *callbacks: Callback) -> list[Any]:
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=2,
            strategy="ddp_fork",
            callbacks=[Ends(out, callbacks[0], hook), *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=None,
        )
        train = DataLoader(Data(kind), batch_size=4)
        try:
            trainer.fit(Module(), train, DataLoader(Data("good"), batch_size=4))
        except Exception:
            if kind != "bad label":
                raise
        found = []
        for rank in range(2):
            with open(f"{out}/{rank}") as file:
                found.append(json.load(file))
        return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {
        "good": run("good", "on_train_start", NeuralCollapseTracker(K), OnlineProbe(K, knn=3)),
        "nan": run("nan", "on_train_start", NeuralCollapseTracker(K), OnlineProbe(K, knn=3)),
        "tracker": run("bad label", "on_train_start", NeuralCollapseTracker(K)),
        "probe": run("bad label", "on_train_batch_end", OnlineProbe(K)),
    }
    print(json.dumps(found))

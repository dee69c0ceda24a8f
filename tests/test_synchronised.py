"""Batch normalisation over all processes: the same layers, which keep their activation, their hooks and their names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import SingleDeviceStrategy
from timm.layers import SplitBatchNorm2d
from tiny import SMALL, plain_sgd, trainer_in
from torch import nn

from ncfinetune import Backbone, FineTuner, SimCLR, Supervised
from ncfinetune.datamodules import Digits
from ncfinetune.synchronised import SynchronisedBatchNorm

EFFICIENT = {"name": "test_efficientnet", "in_chans": 1}


class _Synchronising(SingleDeviceStrategy):
    """Applies and reverts the plugin where ddp does; in one process synchronised layers run on a CPU."""

    _layer_sync: Any = None

    def setup(self, trainer: Any) -> None:
        self.model = self._layer_sync.apply(self.model)
        super().setup(trainer)

    def teardown(self) -> None:
        self.model = self._layer_sync.revert(self.model)
        super().teardown()


def _trainer(folder: Path, **options: Any) -> Any:
    return trainer_in(folder, strategy=_Synchronising("cpu"), sync_batchnorm=True, **options)


def _data() -> Digits:
    return Digits([0, 1, 2], shots=8, batch_size=8)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("network", [SMALL, EFFICIENT], ids=["bare", "with activations"])
def test_a_synchronised_network_is_the_network(network: dict[str, Any], training: bool) -> None:
    backbone, plugin = Backbone(**network), SynchronisedBatchNorm()
    images, before = torch.randn(4, 1, 32, 32), [type(part) for part in backbone.modules()]
    start = {name: value.clone() for name, value in backbone.state_dict().items()}
    expected = backbone.train(training)(images)
    after = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone.load_state_dict(start)
    plugin.apply(backbone)
    assert not [part for part in backbone.modules() if isinstance(part, nn.BatchNorm2d)]
    assert torch.equal(backbone(images), expected)
    assert all(torch.equal(value, after[name]) for name, value in backbone.state_dict().items())
    plugin.revert(plugin.apply(backbone))
    assert [type(part) for part in backbone.modules()] == before


def test_layers_whose_further_work_would_be_lost_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'1' is a SplitBatchNorm2d, of which only the normalisation would remain; "):
        SynchronisedBatchNorm().apply(nn.Sequential(nn.BatchNorm2d(4), SplitBatchNorm2d(4)))


@pytest.mark.parametrize("kind", [Supervised, SimCLR, FineTuner])
def test_every_learner_replaces_the_plugin_of_lightning(kind: type, tmp_path: Path) -> None:
    knobs = {} if kind is SimCLR else {"num_classes": 3}
    learner = kind(backbone=EFFICIENT, **knobs, **({"allow_random": True} if kind is FineTuner else {}))
    trainer = _trainer(tmp_path)
    assert isinstance(trainer.strategy._layer_sync, TorchSyncBatchNorm)
    kinds = [type(part) for part in learner.modules()]
    trainer.fit(learner, Digits([0, 1, 2], shots=8, batch_size=8, **({"views": 2} if kind is SimCLR else {})))
    assert [type(part) for part in learner.modules()] == kinds


def test_a_synchronised_fit_is_the_fit(tmp_path: Path) -> None:
    def fit(**options: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model = FineTuner(3, EFFICIENT, train="none", allow_random=True, optimizer=plain_sgd)
        trainer_in(tmp_path, **options).fit(model, _data())
        return model.state_dict()

    plain, synchronised = fit(), fit(strategy=_Synchronising("cpu"), sync_batchnorm=True)
    assert all(torch.equal(value, plain[name]) for name, value in synchronised.items())


@pytest.mark.parametrize("callbacks", [[], [EMAWeightAveraging(decay=0.5)]], ids=["plain", "averaged"])
def test_named_layers_train_while_synchronised(callbacks: list[Any], tmp_path: Path) -> None:
    model = FineTuner(3, SMALL, train="*bn*", allow_random=True, optimizer=plain_sgd)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True).fit(model, _data())
    for name, value in model.state_dict().items():
        if name.startswith("backbone"):
            assert torch.equal(value, before[name]) == (".bn" not in name), name

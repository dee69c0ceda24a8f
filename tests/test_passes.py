"""Passes: what is touched is as it was, and which samples a limited pass takes."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import ddp
import loralib
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset, WeightedRandomSampler
from torchvision.datasets import FakeData
from torchvision.transforms import ToTensor

from ncfinetune import Backbone
from ncfinetune.adversarial import PGD
from ncfinetune.loaders import evenly
from ncfinetune.passes import TrainingSet, buffers_kept, eval_mode
from ncfinetune.samples import known_files, known_labels, spread


class Caching(nn.Module):
    """Keeps what it made of its parameter in eval mode and drops that in training, as LeViT's attention does."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode and self.cache:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + self.bias
        return x + self.cache.setdefault("bias", self.bias.detach().clone())


def _network() -> nn.Sequential:
    network = nn.Sequential(loralib.Linear(4, 4, r=2), Caching(), nn.Dropout(0.5))
    nn.init.normal_(network[0].lora_B)
    return network.train()


def _state(network: nn.Module) -> list[Tensor]:
    return [value.clone() for value in network.state_dict().values()]


def test_modules_with_a_train_of_their_own_are_as_they_were_bit_for_bit() -> None:
    network = _network()
    before, trained = _state(network), network[0](torch.ones(1, 4))
    with eval_mode(network), torch.no_grad():
        assert network[0].merged
        assert not torch.equal(network[0].weight, before[0])
        network(torch.ones(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(before, _state(network), strict=True))
    assert not network[0].merged
    assert network[1].cache == {}
    assert torch.equal(network[0](torch.ones(1, 4)), trained)


def test_what_was_merged_in_training_mode_stays_so() -> None:
    """Lightning's own validation leaves flags alone: LoRA merged, in training mode."""
    network = _network()
    network.eval()
    for part in network.modules():
        part.training = True
    before = _state(network)
    with eval_mode(network):
        pass
    assert network[0].merged
    assert all(torch.equal(a, b) for a, b in zip(before, _state(network), strict=True))


def test_each_part_has_its_own_mode_again() -> None:
    class Freezing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.free = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.frozen.eval()
            return self

    network = nn.ModuleList([Freezing(), Freezing(), _network()]).train()
    network[1].frozen.training = True  # against its own rule
    network[2][0].eval()
    modes = [part.training for part in network.modules()]
    before = _state(network)
    with eval_mode(network):
        assert not any(part.training for part in network.modules())
    assert [part.training for part in network.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(before, _state(network), strict=True))


@pytest.mark.parametrize("own_train", [True, False])
def test_layers_without_shapes_yet_are_made_in_a_pass(own_train: bool) -> None:
    class Own(nn.LazyBatchNorm1d):
        cls_to_become = None

        def train(self, mode: bool = True) -> Any:
            return super().train(mode)

    network = nn.Sequential(nn.LazyLinear(3), Own() if own_train else nn.LazyBatchNorm1d(), nn.BatchNorm1d(3)).train()
    with eval_mode(network), buffers_kept(network), torch.no_grad():
        network(torch.rand(4, 2))
        network[2].running_mean += 1
    assert all(part.training for part in network.modules())
    assert network[1].running_mean.tolist() == [0, 0, 0]
    assert network[2].running_mean.tolist() == [0, 0, 0]


def _passed(rank: int, weights: list[list[float]]) -> tuple[list[int], int]:
    """Samples of a process's pass where its sampler has these weights, and how often processes exchanged objects."""
    sampler = WeightedRandomSampler(weights[rank], 4)
    loader = DataLoader(TensorDataset(torch.arange(4)), batch_size=4, sampler=sampler)
    trainer: Any = SimpleNamespace(
        fit_loop=None, train_dataloader=loader, val_dataloaders=None, limit_train_batches=1.0
    )
    trainer.world_size, trainer.global_rank = len(weights), rank
    with patch.object(dist, "all_gather_object", wraps=dist.all_gather_object) as exchanged:
        batches = TrainingSet("Tracker", "max", "every=0").batches(trainer)
    return [int(sample) for (samples,) in batches for sample in samples], exchanged.call_count


def test_processes_whose_samplers_differ_exchange_what_they_draw(tmp_path: Path) -> None:
    all_of_them, but_one = [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0]
    differ = ddp.run(2, tmp_path, partial(_passed, weights=[all_of_them, but_one]))
    assert differ == [([0, 2], 2), ([1, 3], 2)]
    (tmp_path / "store").unlink(missing_ok=True)
    agree = ddp.run(2, tmp_path, partial(_passed, weights=[but_one, but_one]))
    assert agree == [([0, 3], 1), ([2], 1)]


@pytest.mark.slow
def test_what_asks_for_widths_and_what_attacks_restore_them_too() -> None:
    backbone = Backbone("test_vit", img_size=8, patch_size=2, in_chans=1).train()
    block = backbone.net.blocks[0]
    block.mlp.fc1 = loralib.Linear(block.mlp.fc1.in_features, block.mlp.fc1.out_features, r=2)
    nn.init.normal_(block.mlp.fc1.lora_B)
    block.mlp.drop1 = Caching(block.mlp.fc1.out_features)
    before = _state(backbone)
    assert backbone.layers["blocks.0"] == backbone.dim
    PGD(0.1, steps=1)(backbone, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
    assert all(torch.equal(a, b) for a, b in zip(before, _state(backbone), strict=True))
    assert not block.mlp.fc1.merged
    assert block.mlp.drop1.cache == {}
    assert all(part.training for part in backbone.modules())


@pytest.mark.parametrize("ordered", [True, False])
def test_limited_samples_are_evenly_of_every_class(ordered: bool) -> None:
    labels = torch.arange(100) // 10
    labels = labels if ordered else labels[torch.randperm(100)]
    dataset = TensorDataset(torch.zeros(100, 1), labels)
    taken = torch.cat([batch[1] for batch in evenly(DataLoader(dataset, batch_size=8), 20)])
    assert taken.bincount().tolist() == [2] * 10
    assert sum(len(batch[1]) for batch in evenly(DataLoader(dataset, batch_size=8), 1000)) == 100


@pytest.mark.parametrize("most", [1, 3, 7, 99, 100])
def test_spread_indices_are_as_many_as_asked_for_all_different_and_in_order(most: int) -> None:
    chosen = spread(range(100), most)
    assert len(set(chosen)) == most
    assert list(chosen) == sorted(chosen)
    assert max(np.diff([-1, *chosen, 100])) <= 2 + 100 // most


def test_labels_that_a_data_set_knows() -> None:
    class Named(torch.utils.data.Dataset):
        targets = (2, 0, 1)

        def __len__(self) -> int:
            return 3

    assert known_labels(Named()).tolist() == [2, 0, 1]
    assert known_labels(Subset(Named(), [2, 1])).tolist() == [1, 0]
    assert known_labels(TensorDataset(torch.zeros(3), torch.rand(3))) is None
    assert known_labels([1, 2]) is None


@pytest.mark.parametrize(
    ("transform", "labels"), [(None, [0, 1, 2, 0]), (lambda label: label // 2, [0, 0, 1, 0]), (lambda _: 0.5, None)]
)
def test_labels_are_those_after_the_transform_of_torchvision(transform: Any, labels: list[int] | None) -> None:
    data = FakeData(4, (1, 2, 2), 3, transform=ToTensor(), target_transform=transform)
    data.targets = [0, 1, 2, 0]
    known = known_labels(data)
    assert labels is None if known is None else known.tolist() == labels


@pytest.mark.parametrize(
    ("samples", "files"),
    [
        ([("a.png", 0), (Path("b.png"), 1)], ["a.png", "b.png"]),
        ([{"image": 1, "label": 0}], None),
        (torch.rand(3, 2), None),
        ([(torch.rand(2), 0)], None),
        (None, None),
    ],
)
def test_files_that_a_data_set_knows(samples: Any, files: list[str] | None) -> None:
    class Named(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.samples = samples

    assert known_files(Named()) == files

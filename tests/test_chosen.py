"""What of a backbone trains: layers whole, parameters by patterns, and their statistics."""

from pathlib import Path

import pytest
import torch
from tiny import SMALL, plain_sgd, trainer_in
from torch import nn

from ncfinetune import Backbone, FineTuner
from ncfinetune.chosen import Chosen, choose
from ncfinetune.datamodules import Digits

VIT = {"name": "test_vit", "img_size": 32, "in_chans": 1}
PATTERNS = [
    (SMALL, "*.bias", lambda path: path.endswith(".bias")),
    (SMALL, "*.bn?.weight", lambda path: ".bn" in path and path.endswith("weight")),  # not bn1.weight of the stem
    (SMALL, "bn1.weight", lambda path: path == "bn1.weight"),  # a whole path, which is the ends of others too
    (SMALL, ["layer4.0", "*.bn2.bias"], lambda path: path.startswith("layer4.0.") or path.endswith(".bn2.bias")),
    (VIT, "*norm*", lambda path: any("norm" in part for part in path.split("."))),
    (VIT, ["*.bias", "*_token"], lambda path: path.endswith((".bias", "cls_token", "reg_token"))),
]


def _trains(model: FineTuner) -> set[str]:
    return {path for path, p in model.backbone.net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("network", "train", "expected"), PATTERNS)
def test_patterns_choose_parameters_by_the_ends_of_their_paths(network: dict, train, expected) -> None:
    model = FineTuner(3, network, train=train)
    named = {path for path, _ in model.backbone.net.named_parameters()}
    assert _trains(model) == set(filter(expected, named))
    assert 0 < len(_trains(model)) < len(named)


@pytest.mark.parametrize(
    ("train", "follow"), [("*.bn?.weight", False), ("*.bias", False), (["*.bias", "layer4.1"], True), ("*.bn?", True)]
)
def test_statistics_stay_unless_their_layer_is_named(train, follow: bool, tmp_path: Path) -> None:
    model = FineTuner(3, SMALL, train=train, optimizer=plain_sgd, allow_random=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer_in(tmp_path).fit(model, Digits([0, 1, 2], shots=8, batch_size=8))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("running_mean" in name for name in changed) == follow
    trained = {f"backbone.net.{path}" for path in _trains(model)}
    assert {name for name in changed if "running" not in name and "num_batches" not in name} <= trained | {
        "head.weight",
        "head.bias",
    }
    assert changed & trained


def test_delta_of_single_parameters_holds_these_and_gives_the_model_again(tmp_path: Path) -> None:
    base = tmp_path / "base.pt"
    torch.save(Backbone(**SMALL).state_dict(), base)
    model = FineTuner(3, SMALL, checkpoint=str(base), train="*.bias", optimizer=plain_sgd)
    trainer_in(tmp_path).fit(model, Digits([0, 1, 2], shots=8, batch_size=8))
    model.save_delta(tmp_path / "delta.safetensors")
    tuned, frozen = model._tuned_and_frozen()
    assert set(tuned) == {"head.weight", "head.bias"} | {f"backbone.net.{path}" for path in _trains(model)}
    assert "backbone.net.bn1.running_mean" in frozen
    again = FineTuner.from_delta(tmp_path / "delta.safetensors", checkpoint=str(base))
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(again(images), model.eval()(images))


def test_cached_run_of_single_parameters_is_the_run_without(tmp_path: Path) -> None:
    def fit(**knobs) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model = FineTuner(3, SMALL, train="layer4.?.*.bias", optimizer=plain_sgd, allow_random=True, **knobs)
        torch.manual_seed(2)
        trainer_in(tmp_path, max_epochs=2).fit(model, Digits([0, 1, 2], shots=8, batch_size=7))
        return model.state_dict()

    plain, cached = fit(), fit(cache="memory")
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_cache_does_not_start_from_a_parameter_of_the_network_itself(tmp_path: Path) -> None:
    model = FineTuner(3, VIT, train="*_token", cache="memory", allow_random=True)
    data = Digits([0, 1, 2], shots=4, image_size=32)
    with pytest.raises(ValueError, match="cannot run from its first tuned layer on in test_vit: that is the network"):
        trainer_in(tmp_path).fit(model, data)


def test_table_has_a_row_a_pattern() -> None:
    model = FineTuner(3, SMALL, train=["layer4.1", "*.bias"])
    rows = {line[:24].strip(): line[24:].split() for line in model.parameter_table().splitlines()}
    biases = [p for path, p in model.backbone.net.named_parameters() if path.endswith(".bias")]
    there = [p for path, p in model.backbone.net.layer4[1].named_parameters() if path.endswith(".bias")]
    assert int(rows["*.bias"][0]) == sum(p.numel() for p in biases) - sum(p.numel() for p in there)
    assert list(rows) == ["parameters", "head", "layer4.1", "*.bias", "rest of the backbone", "all"]


def test_table_names_some_layers_and_counts_many() -> None:
    rows = [line[:24].strip() for line in FineTuner(3, SMALL, train="*.bn?").parameter_table().splitlines()]
    assert rows == ["parameters", "head", "16 layers", "rest of the backbone", "all"]


class Tied(nn.Module):
    """Two layers that share a weight and have a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.rest = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.two.weight = self.one.weight


def test_a_shared_parameter_trains_only_where_all_its_paths_are_named() -> None:
    network = Tied()
    with pytest.raises(ValueError, match=r"layer 'one.weight' shares a parameter with other layers, 'two.w"):
        choose(network, network, "one.weight")
    chosen = choose(network, network, ["one.weight", "two.weight"])
    assert [list(map(id, tensors)) for tensors in chosen.tensors(network).values()] == [[id(network.one.weight)]] * 2
    assert choose(network, network, "*.bias").paths(nn.ModuleDict({"net": network}), network) == {
        "net.one.bias",
        "net.two.bias",
        "net.rest.bias",
    }


def test_nothing_is_chosen_by_none_and_all_by_all() -> None:
    backbone = Backbone(**SMALL)
    assert choose(backbone, backbone.net, "none") == Chosen()
    assert choose(backbone, backbone.net, "all").tensors(backbone.net) == {"backbone": list(backbone.parameters())}

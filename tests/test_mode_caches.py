"""What layers keep in eval mode of their parameters is never that of other parameters."""

from pathlib import Path
from typing import Any

import loralib
import torch
from tiny import plain_sgd, trainer_in
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ncfinetune import Backbone, FineTuner
from ncfinetune.mode_caches import drop_caches

# Of 18,000 parameters; its attention keeps biases in eval mode.
LEVIT = {
    **{"name": "levit_128s", "img_size": 64, "embed_dim": [16] * 3},
    **{"key_dim": 8, "num_heads": [2] * 3, "depth": [1] * 3},
}
BIASES = "*attention_biases"


def _base(folder: Path) -> str:
    backbone = Backbone(**LEVIT)
    for parameter in backbone.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    backbone.save(folder / "base.safetensors")
    return str(folder / "base.safetensors")


def _model(folder: Path, train: str) -> FineTuner:
    torch.manual_seed(1)
    return FineTuner(3, LEVIT, checkpoint=str(folder / "base.safetensors"), train=train, optimizer=plain_sgd)


def _kept(module: nn.Module) -> list[Tensor]:
    caches = [getattr(part, "attention_bias_cache", {}) for part in module.modules()]
    return [value for cache in caches for value in cache.values()]


def test_single_parameters_of_layers_in_eval_mode_are_trained(tmp_path: Path) -> None:
    """Two steps after a pass that fills the caches; the reference is plain torch on networks that keep nothing."""
    _base(tmp_path)
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 3
    loader = DataLoader(TensorDataset(images, labels), 4)
    model = _model(tmp_path, BIASES)
    trainer_in(tmp_path, num_sanity_val_steps=1).fit(model, loader, loader)
    state = _model(tmp_path, BIASES).state_dict()
    for part in (slice(0, 4), slice(4, 8)):
        fresh = _model(tmp_path, BIASES)
        fresh.load_state_dict(state)
        assert not _kept(fresh)
        nn.functional.cross_entropy(fresh(images[part]), labels[part]).backward()
        for parameter in fresh.parameters():
            if parameter.grad is not None:
                parameter.data -= 0.1 * parameter.grad
        state = {name: value.clone() for name, value in fresh.state_dict().items()}
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], msg=name)
    first = "backbone.net.stages.0.blocks.0.attn.attention_biases"
    assert not torch.equal(state[first], _model(tmp_path, BIASES).state_dict()[first])


def test_what_is_loaded_is_what_runs(tmp_path: Path) -> None:
    base, images = _base(tmp_path), torch.randn(2, 3, 64, 64)
    tuned = _model(tmp_path, "all").eval()
    for parameter in tuned.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tuned.save_delta(tmp_path / "delta.safetensors")
    tuned.backbone.save(tmp_path / "tuned.safetensors")
    with torch.no_grad():
        model = _model(tmp_path, "all").eval()
        model(images)
        assert _kept(model)
        model.load_delta(tmp_path / "delta.safetensors")
        assert torch.equal(model(images), tuned(images))
        assert torch.equal(FineTuner.from_delta(tmp_path / "delta.safetensors", base)(images), tuned(images))
        backbone = Backbone(**LEVIT).eval()
        backbone(images)
        backbone.load(str(tmp_path / "tuned.safetensors"))
        assert torch.equal(backbone(images), tuned.backbone(images))


class Caching(nn.Module):
    """Forgets what it keeps in `train(True)` only."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))
        self.drop, self.norm = nn.Dropout(), nn.BatchNorm1d(4)
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.cache.setdefault("bias", self.bias.detach().clone()))


def test_nothing_else_is_changed() -> None:
    network = nn.Sequential(loralib.Linear(4, 4, r=2), Caching(), nn.Dropout())
    nn.init.normal_(network[0].lora_B)
    network(torch.randn(5, 4))
    network.eval()
    network[1].norm.train()
    network(torch.randn(5, 4))
    modes = [part.training for part in network.modules()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    assert network[0].merged
    assert network[1].cache
    drop_caches(network)
    assert network[1].cache == {}
    assert network[0].merged
    assert [part.training for part in network.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_eval_mode_begins_with_nothing_kept() -> None:
    backbone = Backbone("test_vit", img_size=16, patch_size=8).eval()
    backbone.net.fc_norm = Caching().eval()
    backbone.net.fc_norm.cache["bias"] = torch.ones(4)
    assert backbone.eval().net.fc_norm.cache == {}

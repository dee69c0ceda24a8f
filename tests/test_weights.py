"""Weights that somebody else saved: what a network gets of a file, whatever its layout, and what is refused."""

import argparse
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightly.models
import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ncfinetune import Backbone, weight_files

TINY = {"name": "resnet18", "channels": [4, 6, 8, 10]}
Weights = dict[str, Tensor]


def _other(given: Weights) -> Weights:
    return {name: tensor + 1 for name, tensor in given.items()}


def _below(prefix: str, given: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in given.items()}


def _numbered(given: Weights, numbers: list[int]) -> Weights:
    parts = dict(zip(["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"], map(str, numbers), strict=True))
    split = {name: name.partition(".") for name in given}
    return {f"{parts[part]}.{rest}": given[name] for name, (part, _, rest) in split.items()}


def _vissl(given: Weights) -> dict[str, Any]:
    model = {"trunk": _below("_feature_blocks.", given), "heads": {"0.clf.weight": torch.zeros(2, 10)}}
    return {"phase_idx": 3, "classy_state_dict": {"base_model": {"model": model, "meta": {}}, "losses": {}}}


# Who saves weights like this, and what their file looks like.
LAYOUTS: dict[str, Callable[[Weights], dict[str, Any]]] = {
    "plain": dict,
    "DataParallel": lambda w: _below("module.", w),
    "torch.compile": lambda w: _below("_orig_mod.", w),
    "timm's train.py": lambda w: {"epoch": 3, "arch": "resnet18", "state_dict": w, "args": argparse.Namespace(lr=1)},
    "ImageNet example of PyTorch": lambda w: {"state_dict": _below("module.", w), "best_acc1": np.float64(0.5)},
    "torchvision's references": lambda w: {"model": w, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "model_state_dict": lambda w: {"model_state_dict": w, "loss": 0.5},
    "net": lambda w: {"net": _below("module.", w), "acc": 91.2},
    "params": lambda w: {"params": w},
    "DINO, the teacher alone": lambda w: {"teacher": {**_below("backbone.", w), "head.last.weight": torch.ones(3)}},
    "VISSL": _vissl,
    "SupContrast": lambda w: {
        "model": {
            **{f"encoder.module.{k.replace('downsample', 'shortcut')}": v for k, v in w.items()},
            "head.module.0.weight": torch.zeros(3, 10),
        },
        "opt": argparse.Namespace(batch_size=256),
    },
    "lightly, numbered parts of torchvision's": lambda w: {
        "state_dict": {**_below("backbone.", _numbered(w, [0, 1, 4, 5, 6, 7])), "projection_head.0.bias": torch.ones(1)}
    },
    "numbered parts of lightly's own": lambda w: _below("backbone.", _numbered(w, [0, 1, 2, 3, 4, 5])),
    "fastai without optimiser": lambda w: {**_below("0.", _numbered(w, [0, 1, 4, 5, 6, 7])), "1.8.bias": torch.ones(5)},
    "Lightning": lambda w: {"state_dict": _below("model.", w), "epoch": 3, "hyper_parameters": {"lr": 0.1}},
    "the same network under two names": lambda w: {"state_dict": {**_below("model.", w), **_below("encoder.", w)}},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, tmp_path: Path) -> None:
    source = Backbone(**TINY).net.state_dict()
    torch.save(LAYOUTS[layout](source), tmp_path / "w.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = Backbone(**TINY, checkpoint=str(tmp_path / "w.pth"))
    assert all(torch.equal(value, source[name]) for name, value in loaded.net.state_dict().items())
    assert not loaded.random


# Files of two networks: what the error says of them, and what picks the first and the second.
PAIRS: dict[str, tuple[Callable[[Weights, Weights], dict[str, Any]], str, dict[str, str], dict[str, str]]] = {
    "MoCo": (
        lambda a, b: {"state_dict": {**_below("module.encoder_q.", a), **_below("module.encoder_k.", b)}},
        "key='state_dict', prefix='module.encoder_q.', or key='state_dict', prefix='module.encoder_k.'",
        {"prefix": "module.encoder_q"},
        {"prefix": "module.encoder_k."},
    ),
    "DINO": (
        lambda a, b: {"student": _below("module.backbone.", a), "teacher": _below("backbone.", b)},
        "key='student', prefix='module.backbone.', or key='teacher', prefix='backbone.'",
        {"key": "student"},
        {"key": "teacher"},
    ),
    "BYOL": (
        lambda a, b: {"state_dict": {**_below("online.net.", a), **_below("target.net.", b)}},
        "prefix='online.net.', or key='state_dict', prefix='target.net.'",
        {"prefix": "online.net."},
        {"key": "state_dict", "prefix": "target.net"},
    ),
    "timm with an average": (
        lambda a, b: {"state_dict": a, "state_dict_ema": b},
        "key='state_dict', prefix='', or key='state_dict_ema', prefix=''",
        {"key": "state_dict"},
        {"key": "state_dict_ema"},
    ),
    "torchvision with an average": (
        lambda a, b: {"model": a, "model_ema": _below("module.", {k: v for k, v in b.items() if "running" not in k})},
        "key='model', prefix='', or key='model_ema', prefix='module.'",
        {"key": "model"},
        {"key": "model_ema", "prefix": "module."},
    ),
    "plain beside an average": (
        lambda a, b: {**a, "ema": {"shadow": b}},
        "key='', prefix='', or key='ema.shadow', prefix=''",
        {"key": ""},
        {"key": "ema"},
    ),
}


@pytest.mark.filterwarnings("ignore:.*Parameters that are not in the file stay random")
@pytest.mark.parametrize("pair", PAIRS)
def test_of_two_networks_one_has_to_be_chosen(pair: str, tmp_path: Path) -> None:
    make, message, first, second = PAIRS[pair]
    one = Backbone(**TINY).net.state_dict()
    two, path = _other(one), str(tmp_path / "w.pth")
    torch.save(make(one, two), path)
    with pytest.raises(
        ValueError, match="several sets of weights that fit equally well: .*; choose one: checkpoint="
    ) as e:
        Backbone(**TINY, checkpoint=path)
    assert message in str(e.value)
    for choice, expected in ((first, one), (second, two)):
        net = Backbone(**TINY, checkpoint={"path": path, **choice}).net
        assert all(torch.equal(p, expected[name]) for name, p in net.named_parameters())


def test_choices_that_are_none_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "w.pth")
    torch.save({"state_dict": _below("module.", Backbone(**TINY).net.state_dict()), "epoch": 1}, path)
    for choice, message in [
        ({"key": "model"}, "has no tensors under key='model', only 'state_dict'"),
        ({"prefix": "encoder"}, "has no tensors under prefix='encoder', only 'module.conv1', 'module.bn1'"),
        ({"keys": "model"}, "expected a checkpoint of path, key and prefix, got path, keys"),
    ]:
        with pytest.raises(ValueError, match=message):
            Backbone(**TINY, checkpoint={"path": path, **choice})
    with pytest.raises(ValueError, match="expected a checkpoint of path, key and prefix, got key"):
        Backbone(**TINY, checkpoint={"key": "model"})


def test_networks_of_the_libraries_themselves(tmp_path: Path) -> None:
    """Not our idea of their layouts: what lightly and torchvision save."""
    for stem, source in (
        ("cifar", nn.Sequential(*list(lightly.models.ResNetGenerator("resnet-18").children())[:-1])),
        ("imagenet", nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])),
        ("imagenet", torchvision.models.resnet18()),
    ):
        torch.save(source.state_dict(), tmp_path / "w.pth")
        loaded = Backbone("resnet18", stem=stem, checkpoint=str(tmp_path / "w.pth"))
        theirs = [p for p in source.parameters() if p.shape[0] != 1000]
        assert all(torch.equal(p, q) for p, q in zip(loaded.net.parameters(), theirs, strict=True))


def _saved(net: nn.Module, folder: Path) -> str:
    """A file of random weights, normalisations and embeddings of positions included."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    torch.save(net.state_dict(), folder / "w.pth")
    return str(folder / "w.pth")


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("name", ["resnet18", "test_vit", "test_convnext"])
def test_first_convolution_is_adapted_as_timm_does(name: str, channels: int, tmp_path: Path) -> None:
    path = _saved(timm.create_model(name, num_classes=3), tmp_path)
    ours = Backbone(name, in_chans=channels, checkpoint=path)
    overlay = {"file": path, "num_classes": 3}
    theirs = timm.create_model(name, True, pretrained_cfg_overlay=overlay, num_classes=0, in_chans=channels)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.net.state_dict()[key], value), key
    assert not ours.random


def test_grey_weights_become_colour_ones(tmp_path: Path) -> None:
    path = _saved(timm.create_model("test_resnet", in_chans=1, num_classes=0), tmp_path)
    ours, grey = Backbone("test_resnet", checkpoint=path).eval(), Backbone("test_resnet", in_chans=1, checkpoint=path)
    images = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(ours(images.expand(-1, 3, -1, -1)), grey.eval()(images), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")  # in timm's code
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # in timm's resizing of bias tables
@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("vit_tiny_patch16_224", {}, {"img_size": 96}),
        pytest.param("vit_tiny_patch16_224", {}, {"patch_size": 8, "img_size": 64}, marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", {}, {"window_size": 4, "img_size": 128}, marks=pytest.mark.slow),
        ("swinv2_tiny_window8_256", {}, {"window_size": 4, "img_size": 64}),
        pytest.param("deit3_small_patch16_224", {}, {"img_size": 64}, marks=pytest.mark.slow),
    ],
)
def test_positions_and_windows_of_another_size_are_adapted_as_timm_does(
    name: str, theirs: dict, ours: dict, tmp_path: Path
) -> None:
    path = _saved(timm.create_model(name, num_classes=3, **theirs), tmp_path)
    got = Backbone(name, checkpoint=path, **ours)
    expected = timm.create_model(
        name, True, pretrained_cfg_overlay={"file": path, "num_classes": 3}, num_classes=0, **ours
    )
    for key, value in expected.state_dict().items():
        assert torch.equal(got.net.state_dict()[key], value), key


def test_positions_are_resampled(tmp_path: Path) -> None:
    source = timm.create_model("test_vit", num_classes=0)
    got = Backbone("test_vit", img_size=96, checkpoint=_saved(source, tmp_path))
    tokens = source.num_prefix_tokens
    expected = resample_abs_pos_embed(source.pos_embed, [6, 6], num_prefix_tokens=tokens)
    assert torch.equal(got.net.pos_embed, expected)


def test_files_of_the_authors_own_code_are_converted_as_timm_does(tmp_path: Path) -> None:
    net = timm.create_model("convnext_atto", num_classes=3)
    names = {"stem.0.": "downsample_layers.0.0.", "stem.1.": "downsample_layers.0.1.", ".downsample.": ".down."}
    names |= {".blocks.": ".", "conv_dw": "dwconv", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2"}
    names |= {"head.norm": "norm", "head.fc": "head"}

    def authors(name: str) -> str:
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        stage, _, rest = name.removeprefix("stages.").partition(".down.")
        return f"downsample_layers.{stage}.{rest}" if rest else name

    source = {authors(name): torch.randn_like(value) for name, value in net.state_dict().items()}
    torch.save({"model": source}, tmp_path / "w.pth")
    got = Backbone("convnext_atto", checkpoint=str(tmp_path / "w.pth"))
    assert torch.equal(got.net.stages[1].downsample[1].weight, source["downsample_layers.1.1.weight"])
    assert not got.random


def test_what_stays_random_is_named_in_a_warning(tmp_path: Path) -> None:
    path = _saved(timm.create_model("resnet18"), tmp_path)
    with pytest.warns(UserWarning, match=r"not in the file or of another shape: 1 \(conv1.weight\); .* stay random$"):
        backbone = Backbone("resnet18", stem="cifar", checkpoint=path)
    assert list(backbone.random) == ["conv1.weight"]
    assert len(Backbone("test_resnet").random) == sum(p.ndim > 1 for p in Backbone("test_resnet").net.parameters())


def test_what_was_trained_or_loaded_by_hand_is_not_random() -> None:
    backbone = Backbone("test_resnet")
    backbone.net.load_state_dict(Backbone("test_resnet").net.state_dict())
    assert not backbone.random
    trained = Backbone("test_resnet")
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    trained.net.requires_grad_(True)
    for parameter in trained.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert trained.random
    optimizer.step()
    assert not trained.random
    assert Backbone("test_resnet").to(torch.bfloat16).random


def test_folders_are_refused_with_the_way_to_go_on(tmp_path: Path) -> None:
    for names, message in [
        (
            ["__0_0.distcp", ".metadata", "meta.pt"],
            "python -m lightning.pytorch.utilities.consolidate_checkpoint .*run",
        ),
        (["__0_0.distcp", ".metadata"], "python -m torch.distributed.checkpoint.format_utils dcp_to_torch .*run"),
        (["zero_to_fp32.py", "latest"], "of DeepSpeed, of which its zero_to_fp32.py makes one"),
        (["model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"], "one checkpoint in 2 files"),
        (["model.safetensors", "config.json"], "expected a file of weights; name one of model.safetensors"),
        (["notes.txt"], "expected a file of weights; it holds none"),
    ]:
        folder = tmp_path / "_".join(names) / "run"
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text("")
        with pytest.raises(ValueError, match=message):
            Backbone("test_resnet", checkpoint=str(folder))


class _Stranger:
    """Stands for an object of a library that is not installed here."""


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("fastcore.foundation", r"fastai saved its optimiser too; save it by learn.save\(NAME, with_opt=False\)"),
        (
            "lightly_train._methods.dino",
            r"make one by lightly_train.export\(out=FILE, checkpoint=.*w.pth', part=\"model\"",
        ),
        (
            "mmengine.logging",
            "it holds objects of mmengine.logging._Stranger; where that is installed, save its state_d",
        ),
    ],
)
def test_files_of_objects_are_refused_with_the_way_to_go_on(
    module: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    import types

    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(_Stranger=_Stranger))
    for parent in (module.rsplit(".", i)[0] for i in range(1, module.count(".") + 1)):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setattr(_Stranger, "__module__", module)
    torch.save({"model": Backbone(**TINY).net.state_dict(), "opt": _Stranger()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        Backbone(**TINY, checkpoint=str(tmp_path / "w.pth"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning", "ignore:.*:UserWarning")
def test_programs_are_refused_with_the_way_to_go_on(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    torch.jit.save(torch.jit.script(net), tmp_path / "script.pt")
    with pytest.raises(ValueError, match=r"it is TorchScript; save torch.jit.load\('.*script.pt'\).state_dict\(\) by"):
        Backbone("test_resnet", checkpoint=str(tmp_path / "script.pt"))
    # In a process of its own, since one that has exported cannot fork for the tests after it.
    export = "torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), 'program.pt2')"
    subprocess.run([sys.executable, "-c", f"import torch; {export}"], cwd=tmp_path, check=True)
    with pytest.raises(ValueError, match=r"it is an exported program; save torch.export.load\('.*program.pt2'\).state"):
        Backbone("test_resnet", checkpoint=str(tmp_path / "program.pt2"))


def test_files_say_what_their_weights_expect_of_images(tmp_path: Path) -> None:
    backbone = Backbone("test_resnet")
    data = {"class_names": ["a", "b"], "preprocessing": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    for name in ("w.safetensors", "w.pth"):
        weight_files.save(backbone.net.state_dict(), tmp_path / name, data)
        assert weight_files.read(tmp_path / name)[1] == data
        again = Backbone("test_resnet", checkpoint=str(tmp_path / name))
        assert again.net.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]
        assert not again.random
        timm.create_model("test_resnet", num_classes=0, checkpoint_path=str(tmp_path / name))
    save_file(backbone.net.state_dict(), tmp_path / "plain.safetensors")
    assert weight_files.read(tmp_path / "plain.safetensors")[1] == {}


@pytest.mark.parametrize("name", ["resnet50_clip", "ghostnet_050", "coatnet_pico_rw_224", "test_byobnet"])
def test_networks_with_parts_called_shortcut_get_their_own_weights(name: str, tmp_path: Path) -> None:
    saved = Backbone(name)
    assert any("shortcut." in key for key in saved.net.state_dict())
    saved.save(tmp_path / "own.safetensors")
    loaded = Backbone(name, checkpoint=str(tmp_path / "own.safetensors"))
    own = loaded.net.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in saved.net.state_dict().items())
    assert not loaded.random


def test_a_stem_that_moves_positions_to_channels_is_adapted_as_timm_does(tmp_path: Path) -> None:
    name, first = "tresnet_m", "body.conv1.conv.weight"
    given = timm.create_model(name, num_classes=0).state_dict()
    torch.save(given, tmp_path / "colour.pth")
    grey = Backbone(name, checkpoint=str(tmp_path / "colour.pth"), in_chans=1)
    torch.testing.assert_close(grey.net.state_dict()[first], adapt_input_conv(1, given[first]))
    with pytest.warns(UserWarning, match=f"not in the file or of another shape: 1 .{first}.*that are not in the file"):
        Backbone(name, checkpoint=str(tmp_path / "colour.pth"), in_chans=6)


@pytest.mark.parametrize(("channels", "mean"), [(1, [0.3]), (3, [0.3] * 3)])
def test_statistics_of_grey_images_are_those_of_every_channel(channels: int, mean: list[float], tmp_path: Path) -> None:
    grey = Backbone("test_resnet", in_chans=1)
    said = {"class_names": None, "preprocessing": {"mean": [0.3], "std": [0.2]}}
    weight_files.save(grey.net.state_dict(), tmp_path / "grey.safetensors", said)
    loaded = Backbone("test_resnet", checkpoint=str(tmp_path / "grey.safetensors"), in_chans=channels)
    assert loaded.net.pretrained_cfg["mean"] == mean
    other = Backbone("test_resnet", in_chans=2)
    before = other.net.pretrained_cfg["mean"]
    other.take_normalisation({"mean": [0.3] * 3})
    assert other.net.pretrained_cfg["mean"] == before


def test_what_others_call_data_is_left_alone(tmp_path: Path) -> None:
    weights = Backbone("test_resnet").net.state_dict()
    save_file({**weights}, tmp_path / "theirs.safetensors", {"data": "imagenet"})
    torch.save({"state_dict": weights, "data": {"preprocessing": "centre crop"}}, tmp_path / "theirs.pth")
    for name in ("theirs.safetensors", "theirs.pth"):
        found = Backbone("test_resnet", checkpoint=str(tmp_path / name))
        assert all(torch.equal(tensor, weights[key]) for key, tensor in found.net.state_dict().items())


@pytest.mark.parametrize("option", ["num_classes", "checkpoint_path", "features_only"])
def test_options_of_timm_that_are_not_the_backbones_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"timm's option {option} is not the backbone's: it has no classifier"):
        Backbone("test_resnet", **{option: 1})

"""What is exported computes what was trained: by timm, by onnxruntime, by torch.export, from the same image files."""

import importlib.util
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image, ImageOps
from tiny import SMALL, trainer_in
from torch import Tensor
from torchvision import transforms as v1

from ncfinetune import FineTuner, Learner, SimCLR, SupCon, Supervised
from ncfinetune.cli import main
from ncfinetune.datamodules import Digits, Unlabelled
from ncfinetune.export import export
from ncfinetune.sample_statistics import wilson
from ncfinetune.settings import evaluated_images

NARROW = {"name": "resnet18", "channels": [4, 6, 8, 10]}
NAMES = ["apple", "lime", "plum"]
# Small networks of each family, and the side of their images.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "resnet": (NARROW, 32),
    "mobilenet": ({"name": "mobilenetv3_small_050"}, 32),
    "efficientnet": ({"name": "test_efficientnet"}, 32),
    "convnext": ({"name": "test_convnext"}, 32),
    "vit": ({"name": "test_vit", "img_size": 32}, 32),
    "swin": (
        {
            "name": "swin_tiny_patch4_window7_224",
            "img_size": 56,
            "embed_dim": 12,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 2],
        },
        56,
    ),
    "deit": ({"name": "deit_tiny_distilled_patch16_224", "img_size": 32, "depth": 2, "embed_dim": 24}, 32),
    "eva": ({"name": "eva02_tiny_patch14_224", "img_size": 28, "depth": 2, "embed_dim": 48}, 28),
    "beit": ({"name": "beit_base_patch16_224", "img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}, 32),
    "attention pooling": ({"name": "test_vit", "img_size": 32, "global_pool": "map"}, 32),
}
# Families whose graphs differ; torch.export takes seconds for each.
BY_TORCH = ("convnext", "vit", "swin", "deit", "beit")
LACKS_ONNX = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(LACKS_ONNX), reason=f"the extra onnx is not installed: no {LACKS_ONNX}")


def _images(size: int, channels: int = 3, **further: Any) -> dict[str, Any]:
    """Preprocessing as a datamodule states it."""
    return {
        "input_size": [channels, size, size],
        "mean": [0.4, 0.5, 0.6][:channels],
        "std": [0.25, 0.2, 0.3][:channels],
        "interpolation": "bilinear",
        "crop_pct": 0.875,
        "crop_mode": "center",
        "stored_size": size,
        "value_range": None,
        **further,
    }


def _saved(model: Learner, path: Path, size: int = 32, names: list[str] | None = NAMES, **further: Any) -> Path:
    """A checkpoint of a model whose weights all differ from their initial values."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.class_names = names
    model.preprocessing = _images(size, **further)
    content = {"state_dict": model.eval().state_dict(), "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(content)
    torch.save(content, path)
    return path


def _pixels(number: int, size: int = 32, channels: int = 3) -> Tensor:
    return torch.randint(256, (number, channels, size, size), dtype=torch.uint8)


def _normalised(pixels: Tensor, model: Learner) -> Tensor:
    seen = model.preprocessing
    assert seen is not None
    mean, std = (torch.tensor(seen[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return (pixels.float() / 255 - mean) / std


def _onnx(path: Path) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["pixels"]
    assert session.get_inputs()[0].shape[0] == "batch"
    return session


def _run(session: Any, pixels: Tensor) -> list[Tensor]:
    return [torch.from_numpy(values) for values in session.run(None, {"pixels": pixels.numpy()})]


def _agree(outputs: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for found, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[FineTuner, Path]:
    """A model and its checkpoint."""
    torch.manual_seed(0)
    model = FineTuner(3, NARROW, train="layer3.0")
    return model, _saved(model, tmp_path_factory.mktemp("trained") / "a.ckpt")


@pytest.mark.parametrize(
    "family", [name if name in ("resnet", "vit") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_folder_is_a_network_of_timm(family: str, tmp_path: Path) -> None:
    spec, size = FAMILIES[family]
    model = FineTuner(3, spec, train="all")
    said = export(_saved(model, tmp_path / "a.ckpt", size), f"{tmp_path}/model/")
    assert said.startswith(f"{tmp_path}/model/: a network for timm, within ")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    net = _from_timm(tmp_path / "model")
    images = torch.randn(2, 3, *model.backbone.input_size()[1:])
    with torch.no_grad():
        torch.testing.assert_close(net(images), model(images), rtol=1e-5, atol=1e-5)
    assert list(net.pretrained_cfg["label_names"]) == NAMES
    seen = timm.data.resolve_model_data_config(net)
    assert {name: list(value) if isinstance(value, tuple | list) else value for name, value in seen.items()} == {
        name: value for name, value in _images(size).items() if name not in ("stored_size", "value_range")
    }


def test_the_working_folder_becomes_a_network_of_timm(
    trained: tuple[FineTuner, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "birds").mkdir()
    monkeypatch.chdir(tmp_path / "birds")
    export(trained[1], ".")
    assert {path.name for path in (tmp_path / "birds").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["birds"]


def _from_timm(folder: Path) -> Any:
    """The network as timm loads it: as a folder, or, before timm 1.0.16, from what its config.json says."""
    if hasattr(timm.models._hub, "load_model_config_from_path"):
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = json.loads((folder / "config.json").read_text())
    settings = {**config["pretrained_cfg"], "file": str(folder / "model.safetensors")}
    settings["label_names"] = config.get("label_names")
    net = timm.create_model(
        config["architecture"], pretrained=True, pretrained_cfg=settings, **config.get("model_args", {})
    )
    return net.eval()


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_compute_what_was_trained(family: str, tmp_path: Path) -> None:
    spec, size = FAMILIES[family]
    model = FineTuner(3, spec, train="all")
    checkpoint = _saved(model, tmp_path / "a.ckpt", size)
    export(checkpoint, tmp_path / "model.onnx")
    session = _onnx(tmp_path / "model.onnx")
    forms: list[Any] = [lambda pixels: _run(session, pixels)]
    if family in BY_TORCH:
        export(checkpoint, tmp_path / "model.pt2")
        forms.append(torch.export.load(tmp_path / "model.pt2").module())
    for number in (1, 4):
        pixels = _pixels(number, size)
        with torch.no_grad():
            logits = model(_normalised(pixels, model))
            for form in forms:
                _agree(form(pixels), (logits, logits.softmax(1)))


@needs_onnx
def test_image_files_have_the_same_logits_by_every_way(trained: tuple[FineTuner, Path], tmp_path: Path) -> None:
    """Of the datamodule, of timm's own transform, and of the preprocessing that the ONNX file's metadata describe."""
    model, checkpoint = trained
    files = _files(tmp_path / "photos")
    data = Unlabelled(NAMES, model.preprocessing or {}, num_workers=0)
    assert data.predict_files(tmp_path / "photos") == list(map(str, files))
    batch = data.on_after_batch_transfer(next(iter(data.predict_dataloader())), 0)
    export(checkpoint, tmp_path / "model.onnx")
    export(checkpoint, tmp_path / "model")
    session, net = _onnx(tmp_path / "model.onnx"), _from_timm(tmp_path / "model")
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["class_names"]) == NAMES
    assert said["input"].startswith("pixels, uint8 (N, 3, 32, 32), decoded, cropped to the middle crop_pct")
    images = json.loads(said["preprocessing"])
    assert images == model.preprocessing
    to_pixels = v1.Compose([v1.Resize(math.floor(32 / images["crop_pct"])), v1.CenterCrop(32), v1.PILToTensor()])
    to_timm = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    pictures = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in files]
    with torch.no_grad():
        expected = model(batch[0])
        assert len(expected.argmax(1).unique()) > 1
        logits, probabilities = _run(session, torch.stack([to_pixels(picture) for picture in pictures]))
        _agree((logits, probabilities), (expected, model.predict_step(batch, 0)))
        _agree([net(torch.stack([to_timm(picture) for picture in pictures]))], [expected])


@needs_onnx
@pytest.mark.parametrize(
    ("channels", "stored", "share", "value_range"),
    [(1, 8, 1.0, None), (3, 40, 0.875, [100.0, 4095.0]), (3, 32, 0.875, None)],
)
def test_the_card_and_the_tour_read_files_as_the_training_did(
    channels: int, stored: int, share: float, value_range: list[float] | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = FineTuner(3, {**NARROW, "in_chans": channels})
    further = {"channels": channels, "stored_size": stored, "crop_pct": share, "value_range": value_range}
    checkpoint = _saved(model, tmp_path / "a.ckpt", **further)
    files = [*_files(tmp_path / "photos"), *_deep_files(tmp_path / "deep", value_range)]
    expected = model.predict_images(files)
    assert expected.errors == [""] * len(files)
    assert len(set(expected.names)) > 1
    for name in ("model", "model.onnx"):
        export(checkpoint, tmp_path / name)
    by_card = torch.stack([_by_the_card(tmp_path / "model", file) for file in files])
    torch.testing.assert_close(by_card, expected.probabilities, rtol=0, atol=1e-4)
    said = _onnx(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
    side = {"input_size": [channels, stored, stored]}
    assert json.loads(said["preprocessing"]) == {**(model.preprocessing or {}), **side}
    tour = (Path(__file__).parent.parent / "docs" / "tour.md").read_text()
    program: dict[str, Any] = {}
    exec(_python_in(tour).replace("flowers.onnx", str(tmp_path / "model.onnx")), program)
    decided = program["classify"](list(map(str, files)))
    assert [name for name, _ in decided] == expected.names
    assert [share for _, share in decided] == pytest.approx(expected.probabilities.amax(1).tolist(), abs=1e-4)
    resized = f", {'grey' if channels == 1 else 'colour'}, resized from {stored}x{stored}, interpolation"
    assert (resized in (tmp_path / "model" / "README.md").read_text()) == (stored != 32)


def _by_the_card(folder: Path, file: Path) -> Tensor:
    """The probabilities that the code of a model card gives for an image file."""
    code = _python_in((folder / "README.md").read_text()).replace("image.jpg", str(file))
    program: dict[str, Any] = {"model": _from_timm(folder)}
    exec(re.sub("^model = .*", "", code, flags=re.MULTILINE), program)
    return program["probabilities"]


def _python_in(page: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    return code


def _deep_files(folder: Path, value_range: list[float] | None) -> list[Path]:
    """Grey pictures of more than 8 bits, from black to white: of 16 bits, and with a range of floats too."""
    folder.mkdir()
    low, high = value_range or (0, 65535)
    grey = np.linspace(low, high, 45 * 60).reshape(45, 60)
    for name in ("a.png", "b.tif"):
        Image.fromarray(grey.astype(np.uint16)).save(folder / name)
    if value_range:
        Image.fromarray(grey.astype(np.float32)).save(folder / "c.tif")
    return sorted(folder.iterdir())


def _files(folder: Path) -> list[Path]:
    """Pictures of many sizes, modes and orientations, none so large that a JPEG would be decoded at half its size."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    sizes = {"a.png": (40, 56), "b.jpg": (90, 47), "c.png": (32, 32), "d.webp": (33, 61), "e.png": (20, 24)}
    sizes |= {"f.png": (70, 41), "g.jpg": (64, 45), "h.png": (50, 50), "i.jpg": (45, 80)}
    modes = {"f.png": "L", "g.jpg": "CMYK", "h.png": "P", "d.webp": "RGBA"}
    for number, (name, (width, height)) in enumerate(sizes.items()):
        colour = np.array([[220, 20, 20], [20, 220, 20], [20, 20, 220]][number % 3])
        pixels = (colour + generator.normal(0, 40, (height, width, 3))).clip(0, 255).astype(np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "i.jpg" else 1
        Image.fromarray(pixels).convert(modes.get(name, "RGB")).save(folder / name, exif=exif)
    return sorted(folder.iterdir())


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize(
    ("join", "channels", "stored"), [("pad", 1, 8), ("linear", 3, 64), ("concat", 1, 16), ("only", 1, 23)]
)
def test_graphs_hold_skip_connections_and_resizing(join: Any, channels: int, stored: int, tmp_path: Path) -> None:
    spec = {**SMALL, "in_chans": channels}
    model = FineTuner(3, spec, train="layer3.0", skip_from=["layer2.1", "layer3.0"], skip_join=join)
    checkpoint = _saved(model, tmp_path / "a.ckpt", 16, channels=channels, stored_size=stored)
    export(checkpoint, tmp_path / "model.onnx")
    pixels = _pixels(5, stored, channels)
    data = Unlabelled(NAMES, model.preprocessing or {}, num_workers=0)
    forms = [_run(_onnx(tmp_path / "model.onnx"), pixels)]
    if join == "linear":
        export(checkpoint, tmp_path / "model.pt2")
        extra = {"metadata.json": ""}
        forms.append(torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()(pixels))
        assert json.loads(json.loads(extra["metadata.json"])["class_names"]) == NAMES
    with torch.no_grad():
        logits = model(data.on_after_batch_transfer((pixels, torch.zeros(5)), 0)[0])
        for outputs in forms:
            _agree(outputs, (logits, logits.softmax(1)))


def test_timm_has_no_place_for_skip_connections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    instead = "; export the whole network as NAME.onnx or NAME.pt2, or its backbone as NAME.safetensors"
    models = {
        "timm's resnet18 has no skip connections to its classifier, and this network has some": FineTuner(
            3, NARROW, train="layer3.0", skip_from="layer3.0"
        ),
        "timm's resnet18 has no MLP projection before its classifier, and this network has one": Supervised(
            3, NARROW, projection="mlp"
        ),
        "timm has no resnet18 with stem='cifar'": FineTuner(3, SMALL),
    }
    for message, model in models.items():
        checkpoint = _saved(model, tmp_path / "a.ckpt", 32)
        assert main(["export", str(checkpoint), f"{tmp_path}/model"]) == 2
        assert capsys.readouterr().err == f"error: {message}{instead}\n"
        assert main(["export", str(checkpoint), f"{tmp_path}/b.safetensors"]) == 0
        capsys.readouterr()
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / ".model.part").exists()


def test_a_linear_projection_becomes_part_of_timms_classifier(tmp_path: Path) -> None:
    model = Supervised(3, NARROW, projection="linear", projection_dim=7, loss="mse")
    export(_saved(model, tmp_path / "a.ckpt"), tmp_path / "model")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        _agree([_from_timm(tmp_path / "model")(images)], [model(images)])


@pytest.mark.parametrize("bias", [0.0, -100.0], ids=["some positive", "none positive"])
def test_the_card_of_squared_error_has_its_probabilities(bias: float, tmp_path: Path) -> None:
    model = Supervised(3, NARROW, loss="mse")
    checkpoint = _saved(model, tmp_path / "a.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["head.bias"] += bias
    torch.save(content, checkpoint)
    model.load_state_dict(content["state_dict"])
    export(checkpoint, tmp_path / "model")
    for file in _files(tmp_path / "photos"):
        expected = model.predict_images([file]).probabilities[0]
        torch.testing.assert_close(_by_the_card(tmp_path / "model", file), expected, rtol=0, atol=1e-4)


def test_networks_without_classifier_give_features(tmp_path: Path) -> None:
    for kind in (SupCon, SimCLR):
        model = kind(NARROW)
        checkpoint = _saved(model, tmp_path / f"{kind.__name__}.ckpt", names=None)
        folder = tmp_path / kind.__name__
        export(checkpoint, folder)
        net = _from_timm(folder)
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            _agree([net(images)], [model(images)])
        assert net.pretrained_cfg["num_classes"] == 0
        card = (folder / "README.md").read_text()
        assert "pipeline_tag: image-feature-extraction" in card
        assert "A network that maps images to features" in card
    with pytest.raises(ValueError, match=r"SimCLR.ckpt' has no classifier, so that its features have no class names"):
        export(checkpoint, folder, class_names=NAMES)


@needs_onnx
def test_graph_of_a_network_without_classifier(tmp_path: Path) -> None:
    model = SupCon(NARROW)
    said = export(_saved(model, tmp_path / "a.ckpt", names=None), tmp_path / "features.onnx")
    assert "features.onnx: features, within" in said
    pixels = _pixels(3)
    with torch.no_grad():
        _agree(_run(_onnx(tmp_path / "features.onnx"), pixels), [model(_normalised(pixels, model))])


@pytest.mark.slow
def test_squared_error_has_its_own_probabilities(tmp_path: Path) -> None:
    model = Supervised(3, NARROW, loss="mse")
    export(_saved(model, tmp_path / "a.ckpt"), tmp_path / "model.pt2")
    pixels = _pixels(3)
    with torch.no_grad():
        logits = model(_normalised(pixels, model))
        outputs = torch.export.load(tmp_path / "model.pt2").module()(pixels)
        _agree(outputs, (logits, model.probabilities(logits)))
    with pytest.raises((RuntimeError, AssertionError)):  # images that are normalised already
        torch.export.load(tmp_path / "model.pt2").module()(_normalised(pixels, model))


@pytest.mark.slow
def test_adapters_are_merged(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = {"r": 2, "target_modules": ["qkv"]}
    model = FineTuner(3, {"name": "test_vit", "img_size": 32, "lora": lora}, train="*lora_*", skip_from="blocks.1")
    plain = FineTuner(3, {"name": "test_vit", "img_size": 32, "lora": lora}, train="*lora_*")
    checkpoint = _saved(model, tmp_path / "skip.ckpt")
    export(checkpoint, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    assert not [node for node in program.graph.nodes if "lora" in str(node.target) and node.op == "call_function"]
    pixels, images = _pixels(3), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = model(_normalised(pixels, model))
        _agree(program.module()(pixels), (logits, logits.softmax(1)))
        export(_saved(plain, tmp_path / "plain.ckpt"), tmp_path / "model")
        _agree([_from_timm(tmp_path / "model")(images)], [plain(images)])
    export(tmp_path / "plain.ckpt", tmp_path / "backbone.safetensors")
    net = timm.create_model("test_vit", img_size=32, num_classes=0, checkpoint_path=tmp_path / "backbone.safetensors")
    with torch.no_grad():
        _agree([net.eval()(images)], [plain.backbone(images)])


def test_a_ridge_head_of_a_trainers_checkpoint(tmp_path: Path) -> None:
    spec = {"name": "resnet18", "in_chans": 1, "channels": [4, 6, 8, 10]}
    model = FineTuner(3, spec, head_init="ridge", allow_random=True)
    data = Digits([7, 8, 9], shots=4, image_size=16)
    trainer = trainer_in(tmp_path, max_epochs=0)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    export(tmp_path / "a.ckpt", tmp_path / "model")
    net, images = _from_timm(tmp_path / "model"), torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        _agree([net(images)], [model.eval()(images)])
    assert list(net.pretrained_cfg["label_names"]) == ["7", "8", "9"]
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| method | linear probe, ridge start |" in card
    assert '.convert("L")' in card


def test_a_delta_is_exported_with_its_base(tmp_path: Path) -> None:
    base = FineTuner(3, NARROW, train="all").backbone
    base.save(tmp_path / "base.safetensors")
    model = FineTuner(3, NARROW, checkpoint=str(tmp_path / "base.safetensors"), train="layer3.0").eval()
    model.class_names, model.preprocessing = NAMES, _images(32)
    model.save_delta(tmp_path / "delta.safetensors")
    words = [str(tmp_path / "delta.safetensors"), f"{tmp_path}/model", "--base", str(tmp_path / "base.safetensors")]
    assert main(["export", *words]) == 0
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        _agree([_from_timm(tmp_path / "model")(images)], [model(images)])
    assert "| base | weights of the file base.safetensors |" in (tmp_path / "model" / "README.md").read_text()
    assert main(["export", *words[:1], str(tmp_path / "back.pth"), *words[2:]]) == 0
    net = timm.create_model(
        "resnet18", channels=NARROW["channels"], num_classes=0, checkpoint_path=tmp_path / "back.pth"
    )
    with torch.no_grad():
        _agree([net.eval()(images)], [model.backbone(images)])


def test_what_is_refused_says_why(
    trained: tuple[FineTuner, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(trained[1])
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("x")
    nameless = str(_saved(FineTuner(3, NARROW), tmp_path / "nameless.ckpt", names=None))
    numbered = str(_saved(FineTuner(3, NARROW), tmp_path / "numbered.ckpt", names=[*"012"]))
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "data": {**content["data"], "preprocessing": None}}, tmp_path / "imageless.ckpt")
    torch.save(content["state_dict"], tmp_path / "weights.pth")
    hparams = content["hyper_parameters"]
    torch.save({**content, "hyper_parameters": {**hparams, "_class_path": "mine.Net"}}, tmp_path / "mine.ckpt")
    torch.save({**content, "hyper_parameters": {**hparams, "num_classes": 4}}, tmp_path / "other.ckpt")
    model, path = f"{tmp_path}/model", str(tmp_path)
    cases: dict[tuple[str, ...], str] = {
        (f"{path}/none.ckpt", model): f"no checkpoint '{path}/none.ckpt'; expected a .ckpt, .pt, .pth or .safetensors",
        (
            checkpoint,
            f"{path}/a.txt",
        ): "expected a target that ends in .onnx, .pt2, .safetensors or .pth, or for a folder "
        f"in /, got '{path}/a.txt'",
        (
            checkpoint,
            str(full),
        ): f"the folder '{full}' holds notes.txt; name one that is new, empty or an earlier export",
        (checkpoint, f"{path}/file"): f"'{path}/file' is a file; name a folder that is new, empty or an earlier export",
        (
            nameless,
            model,
        ): "has no class names, since its data only numbered the classes; give --class_names and 3 names "
        "in the order of the labels",
        (
            numbered,
            model,
        ): "has no class names, since its data only numbered the classes; give --class_names and 3 names "
        "in the order of the labels",
        (nameless, model, "--class_names", "a", "b"): "nameless.ckpt' has 3 classes, got 2 class names",
        (
            checkpoint,
            model,
            "--class_names",
            "a",
            "b",
            "c",
        ): "has class names, apple, lime, plum; leave --class_names out",
        (f"{path}/imageless.ckpt", model): "does not say how its images were made: its data['preprocessing'] lacks "
        "input_size, mean, std; fit with a datamodule that has the property preprocessing, or put a dictionary of them",
        (f"{path}/weights.pth", model): "holds weights but not which network they are of; expected a checkpoint that a "
        "Trainer saved, such as RUN/checkpoints/NAME.ckpt",
        (
            f"{path}/mine.ckpt",
            model,
        ): "mine.ckpt' is a checkpoint of Net; expected one of FineTuner, Supervised, SupCon, SimCLR",
        (
            f"{path}/other.ckpt",
            model,
        ): "other.ckpt' is no checkpoint of a FineTuner of this version: Error(s) in loading",
        (checkpoint, model, "--base", "b.pth"): "base='b.pth' is for a delta, while a checkpoint such as",
    }
    for words, message in cases.items():
        assert main(["export", *words]) == 2, words
        assert message in capsys.readouterr().err
    assert not Path(model).exists()
    assert [file.name for file in full.iterdir()] == ["notes.txt"]
    for unnamed, names in ((nameless, "abc"), (numbered, "012"), (numbered, "abc")):
        assert main(["export", unnamed, model, "--class_names", *names]) == 0
        assert list(_from_timm(Path(model)).pretrained_cfg["label_names"]) == [*names]
    assert main(["export", checkpoint, model]) == 0  # an earlier export is replaced
    assert list(_from_timm(Path(model)).pretrained_cfg["label_names"]) == NAMES


def test_onnx_needs_its_extra(
    trained: tuple[FineTuner, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else found(name))
    assert main(["export", str(trained[1]), f"{tmp_path}/model.onnx"]) == 2
    needs = "needs onnx, onnxruntime: pip install 'ncfinetune[onnx]'"
    assert capsys.readouterr().err == f"error: '{tmp_path}/model.onnx' {needs}\n"


@pytest.mark.parametrize("form", ["timm_folder", pytest.param("deployed", marks=needs_onnx)])
def test_a_network_that_came_out_otherwise_is_not_written(
    form: str, trained: tuple[FineTuner, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"ncfinetune.{form}.apart", lambda found, expected: math.nan)
    target = tmp_path / ("model" if form == "timm_folder" else "model.onnx")
    message = "loads other weights than were written" if form == "timm_folder" else "would give other logits than the"
    with pytest.raises(ValueError, match=message):
        export(trained[1], target)
    assert list(tmp_path.iterdir()) == []


def test_the_card_says_what_the_run_logged_at_the_checkpoints_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    model = FineTuner(3, NARROW, train="layer4.1")
    checkpoint = _saved(model, run / "checkpoints" / "a.ckpt")
    torch.save({**torch.load(checkpoint, weights_only=True), "global_step": 8}, checkpoint)
    base = {**NARROW, "pretrained": True}
    config = {
        "model": {"class_path": "ncfinetune.FineTuner", "init_args": {"backbone": base, "train": "layer4.1"}},
        "data": {
            "class_path": "ncfinetune.datamodules.ImageFolder",
            "init_args": {"root": "/home/x/photos", "shots": 5},
        },
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    tags = ["step", "epoch", "test/acc", "test/images", "val/acc", "nc1/train/penultimate"]
    rows = [[3, 0, "", "", 0.5, 9.0], [7, 1, "", "", 0.75, 0.125], [8, 2, 0.9, 120.0, "", ""]]
    (run / "metrics.csv").write_text("\n".join(",".join(map(str, row)) for row in [tags, *rows]) + "\n")
    export(checkpoint, tmp_path / "birds")
    card = (tmp_path / "birds" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    low, high = (100 * end for end in wilson(0.9, 120))
    assert front["license"] == timm.models.get_pretrained_cfg("resnet18").license
    assert front["base_model"] == "timm/resnet18.a1_in1k"
    assert front["library_name"] == "timm"
    assert front["pipeline_tag"] == "image-classification"
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.9
    for line in (
        "# birds",
        "| base | timm's weights, timm/resnet18.a1_in1k |",
        "| data | ImageFolder, shots 5, folder photos |",
        "| classes | 3: apple, lime, plum |",
        "| method | layer FT layer4.1 |",
        "| trained | layer4.1 and the classifier: 1,873 of 19,761 parameters (9.48 %) |",
        "| NC1 of the features | 0.125 on the training images |",
        "| validation accuracy | 75.0 % |",
        f"| test accuracy | 90.0 %, 95 % interval {low:.1f} to {high:.1f} (Wilson), 120 test images |",
        'timm.create_model("local-dir:birds", pretrained=True)',
    ):
        assert line in card
    assert "/home" not in card
    torch.save({**torch.load(checkpoint, weights_only=True), "numbers": {}}, checkpoint)
    export(checkpoint, tmp_path / "birds")  # an average that was tested, and replaced what was validated at that step
    card = (tmp_path / "birds" / "README.md").read_text()
    assert "| test accuracy | 90.0 %" in card
    assert not [word for word in ("validation accuracy", "NC1 of") if word in card]
    torch.save({**torch.load(checkpoint, weights_only=True), "global_step": 5}, checkpoint)
    export(checkpoint, tmp_path / "birds")  # the numbers of other steps are not its own
    card = (tmp_path / "birds" / "README.md").read_text()
    assert not [word for word in ("accuracy", "NC1", "model-index") if word in card]
    (run / "evaluation" / "test").mkdir(parents=True)
    summary = run / "evaluation" / "test" / "summary.json"
    own = evaluated_images(yaml.safe_load((run / "config.yaml").read_text())["data"], "train")
    for step, data, known in ((5, own, True), (6, own, False), (5, "ImageFolder, root elsewhere", False)):
        summary.write_text(json.dumps({"step": step, "images_of": data, "part": None, "accuracy": 0.8, "images": 40}))
        export(checkpoint, tmp_path / "birds")
        card = (tmp_path / "birds" / "README.md").read_text()
        assert ("| test accuracy | 80.0 %, 95 % interval" in card) == known
    (run / "config.yaml").unlink()
    export(checkpoint, tmp_path / "birds")
    card = (tmp_path / "birds" / "README.md").read_text()
    assert not [word for word in ("base", "licen", "| data", "accuracy") if word in card.replace("database", "")]


def test_help_says_what_names_mean(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for word in ("NAME.onnx", "NAME.pt2", "NAME.safetensors", "local-dir:NAME", "--class_names", "--base"):
        assert word in said
    with pytest.raises(SystemExit) as stop:
        main(["export", "a.ckpt"])
    assert stop.value.code == 2
    assert "the following arguments are required: TARGET" in capsys.readouterr().err

"""What is shipped is what was trained: from the command line to Python, to timm, and to a machine without the data."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from test_cli import QUIET, RANDOM, TINY, _fit, _refusal
from tiny import SMALL, trainer_in

from ncfinetune import Backbone, FineTuner
from ncfinetune.cli import main
from ncfinetune.datamodules import Digits, ImageFolder, Unlabelled
from ncfinetune.weight_files import save as write_weights

MEAN, STD = [0.3, 0.4, 0.5], [0.1, 0.2, 0.3]
NARROW = "{name: resnet18, channels: [4, 6, 8, 10]}"
COLOURS = {"apple": (220, 20, 20), "lime": (20, 220, 20), "plum": (20, 20, 220), "zebra": (120, 120, 120)}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _folder(root: Path, classes: list[str], size: int = 24) -> Path:
    generator = np.random.default_rng(0)
    for part in ("train", "val", "test"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for number in range(6):
                noise = np.array(COLOURS[name]) + generator.normal(0, 25, (size, size + 6, 3))
                Image.fromarray(noise.clip(0, 255).astype("uint8")).save(root / part / name / f"{number}.png")
    return root


def _data(root: Path) -> list[str]:
    options = ["--data.image_size", "32", "--data.batch_size", "12", "--data.num_workers", "0"]
    return ["--data", "ImageFolder", "--data.root", str(root), *options]


def _checkpoint(run: Path) -> str:
    return str(next((run / "checkpoints").glob("*.ckpt")))


@pytest.mark.slow
def test_delta_of_the_command_line_is_a_model_in_python(tmp_path: Path) -> None:
    data = ["--data", "Digits", "--data.shots", "4", "--data.classes", "[7, 8, 9]"]
    source = _fit(tmp_path, "source", "--model", "Supervised", "--model.backbone", TINY, *data)
    main(["export", _checkpoint(source), "base.safetensors"])
    model = [
        "--model",
        "FineTuner",
        "--model.backbone",
        TINY,
        "--model.train",
        "layer4.1",
        "--model.skip_from",
        "layer4.1",
    ]
    start = "{path: base.safetensors, prefix: ''}"
    run = _fit(tmp_path, "tuned", *model, "--model.checkpoint", start, *data)
    tuned = FineTuner.from_delta(run / "checkpoints" / "delta.safetensors", checkpoint="base.safetensors")
    saved = torch.load(_checkpoint(run), weights_only=True)
    assert all(torch.equal(tensor, saved["state_dict"][name]) for name, tensor in tuned.state_dict().items())
    assert tuned.class_names == saved["data"]["class_names"] == ["7", "8", "9"]
    again = FineTuner.load_from_checkpoint(_checkpoint(run), weights_only=True)
    assert torch.equal(again.classifier.weight, tuned.classifier.weight)
    with safe_open("base.safetensors", framework="pt") as file:
        assert '"class_names": ["7", "8", "9"]' in file.metadata()["data"]
    written = tmp_path / "again.safetensors"
    tuned.save_delta(written)
    assert torch.equal(
        FineTuner.from_delta(written, checkpoint="base.safetensors").classifier.weight, tuned.classifier.weight
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_other_classes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = _folder(tmp_path / "ours", ["apple", "lime", "plum"])
    other = _folder(tmp_path / "other", ["lime", "plum", "zebra"])
    model = ["--model", "FineTuner", "--model.backbone", NARROW, "--model.train", "all", *RANDOM]
    run = _fit(tmp_path, "a", *model, *_data(ours))
    trained = ["--config", str(run / "config.yaml"), "--ckpt_path", _checkpoint(run)]
    assert main(["test", *trained]) is None
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for command in (["test"], ["validate"], ["predict"], ["fit", "--trainer.max_epochs", "2"]):
        error = _refusal(capsys, command[0], *trained, *command[1:], "--data.root", str(other))
        assert (
            "was trained on the classes apple, lime, plum, but the datamodule has lime, plum, zebra; expected" in error
        )
    # Nor what is refused later: by the cache, when there are loaders, and by the first batch of training.
    cache = ["--model.train", "layer4.1", "--model.cache", "memory"]
    for options, reason in ((cache, "the images differ each time they are loaded"), (["--data.views", "2"], "views=1")):
        assert reason in _refusal(capsys, "fit", *trained[:2], *options, "--trainer.logger.version", "b")
        assert not (tmp_path / "b" / "config.yaml").exists()
        assert "expected a folder without a run" in _refusal(capsys, "fit", *trained[:2], *options)
    assert {path: path.read_bytes() for path in before if path.is_file()} == before
    tuned = FineTuner.from_delta(run / "checkpoints" / "delta.safetensors")  # nothing is frozen: needs no base
    assert tuned.class_names == ["apple", "lime", "plum"]
    with pytest.raises(ValueError, match="was trained on the classes apple, lime, plum, but the datamodule has"):
        tuned.compare_data(["plum", "lime", "apple"], None)


_TWELVE = [str(number) for number in range(12)]


@pytest.mark.parametrize(
    ("trained", "given", "message"),
    [
        (_TWELVE, sorted(_TWELVE), "classes 0, 1, 2, 3, 4, ... (12), but the datamodule has 0, 1, 10, 11, 2, ... (12)"),
        (sorted(_TWELVE), _TWELVE, "classes 0, 1, 10, 11, 2, ... (12), but the datamodule has 0, 1, 2, 3, 4, ... (12)"),
        ([*"56789"], [*"01234"], "classes 5, 6, 7, 8, 9, but the datamodule has 0, 1, 2, 3, 4"),
        ([*"01234"], [*"56789"], "classes 0, 1, 2, 3, 4, but the datamodule has 5, 6, 7, 8, 9"),
        (_TWELVE, _TWELVE, None),
        (_TWELVE, [f"{number:02}" for number in range(12)], None),
        ([*"012"], ["apple", "lime", "plum"], None),
        (["apple", "lime", "plum"], [*"012"], None),
        (["apple", "1", "2"], [*"012"], None),
        (None, [*"987"], None),
        ([*"987"], None, None),
    ],
)
def test_numbers_stand_for_any_names_but_other_numbers(
    trained: list[str] | None, given: list[str] | None, message: str | None
) -> None:
    model = FineTuner(len(trained or given or ()), {"name": "resnet18", "channels": [4, 6, 8, 10]})
    model.class_names = trained
    if message is None:
        model.compare_data(given, None)
        return
    whole = f"the model was trained on the {message}; expected the same classes in the same order"
    with pytest.raises(ValueError, match=re.escape(whole) + "$"):
        model.compare_data(given, None)


@pytest.mark.parametrize(("trained", "others"), [(range(5), range(5, 10)), (range(5, 10), range(5))])
def test_a_network_of_some_digits_is_not_tested_on_others(trained: range, others: range, tmp_path: Path) -> None:
    model = FineTuner(5, SMALL, head_init="ridge", allow_random=True)
    trainer = trainer_in(tmp_path, max_epochs=0)
    trainer.fit(model, Digits([*trained], shots=2))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    model.save_delta(tmp_path / "a.safetensors")
    base = {"path": str(tmp_path / "a.ckpt"), "prefix": "backbone.net."}
    for again in (
        FineTuner.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True),
        FineTuner.from_delta(tmp_path / "a.safetensors", checkpoint=base),
    ):
        assert again.class_names == [*map(str, trained)]
        trainer_in(tmp_path).test(again, Digits([*trained]), verbose=False)
        with pytest.raises(ValueError, match="expected the same classes in the same order"):
            trainer_in(tmp_path).test(again, Digits([*others]), verbose=False)
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    torch.save({**content, "data": {**content["data"], "class_names": None}}, tmp_path / "unknown.ckpt")
    unknown = FineTuner.load_from_checkpoint(tmp_path / "unknown.ckpt", weights_only=True)
    trainer_in(tmp_path).test(unknown, Digits([*others]), verbose=False)


def test_numbers_do_not_replace_the_names_that_are_known(tmp_path: Path) -> None:
    model = FineTuner(3, SMALL, head_init="ridge", allow_random=True)
    model.class_names = ["apple", "lime", "plum"]
    trainer_in(tmp_path, max_epochs=0).fit(model, Digits([0, 1, 2], shots=2))
    assert model.class_names == ["apple", "lime", "plum"]


_BY_FILES = "predict image files by --images or predict_images, which prepare them as the training did"


@pytest.mark.parametrize(
    ("change", "trained", "given", "remedy"),
    [
        (
            {"mean": [0.1], "std": [0.2]},
            "mean=[0.5], std=[0.25]",
            "mean=[0.1], std=[0.2]",
            "give the datamodule the model's mean and std",
        ),
        ({"crop_pct": 1.0}, "crop_pct=0.875", "crop_pct=1.0", _BY_FILES),
        ({"stored_size": 28}, "stored_size=8", "stored_size=28", _BY_FILES),
        (
            {"input_size": [1, 64, 64], "stored_size": 64},
            "input_size=[1, 32, 32], stored_size=8",
            "input_size=[1, 64, 64], stored_size=64",
            "give the datamodule the model's image_size",
        ),
        (
            {"value_range": [0, 4095], "crop_pct": 1.0},
            "value_range=None, crop_pct=0.875",
            "value_range=[0, 4095], crop_pct=1.0",
            f"give the datamodule the model's value_range, and {_BY_FILES}",
        ),
    ],
)
def test_images_prepared_otherwise_are_warned_of(change: dict, trained: str, given: str, remedy: str) -> None:
    model = FineTuner(3, {"name": "resnet18", "channels": [4, 6, 8, 10]})
    images = {"mean": [0.5], "std": [0.25], "value_range": None, "input_size": [1, 32, 32]}
    images |= {"crop_pct": 0.875, "stored_size": 8}
    model.preprocessing = images
    for same in (images, {"mean": [0.5]}, None):  # what is not said is not known to differ
        model.compare_data(None, same)
    message = f"the model was trained on images prepared with {trained}, but the datamodule prepares them with {given}"
    with pytest.warns(UserWarning, match=re.escape(f"{message}; {remedy}") + "$"):
        model.compare_data(None, {**images, **change})


def test_a_network_is_not_tested_on_images_prepared_otherwise_without_a_word(tmp_path: Path) -> None:
    folders = [_folder(tmp_path / name, ["apple", "lime"]) for name in ("large", "small")]
    for path in folders[1].rglob("*.png"):
        Image.open(path).resize((32, 32)).save(path)
    model = FineTuner(2, {"name": "resnet18", "channels": [4, 6, 8, 10]}, head_init="ridge", allow_random=True)

    def data(folder: Path, size: int = 32) -> ImageFolder:
        return ImageFolder(str(folder), image_size=size, num_workers=0, augmentation="plain")

    trainer_in(tmp_path, max_epochs=0).fit(model, data(folders[0]))
    trainer_in(tmp_path).test(model, data(folders[0]), verbose=False)  # a warning would be an error
    for other, said in ((data(folders[1]), "crop_pct=1.0"), (data(folders[0], 48), r"input_size=\[3, 48, 48\]")):
        with pytest.warns(UserWarning, match=f"but the datamodule prepares them with {said}"):
            trainer_in(tmp_path).test(model, other, verbose=False)


@pytest.mark.parametrize("size", [24, 32])
def test_datamodules_say_how_they_make_images_ready(size: int, tmp_path: Path) -> None:
    data = ImageFolder(str(_folder(tmp_path / "a", ["apple", "lime"], size)), image_size=32, mean=[0.1, 0.2, 0.3])
    data.setup("fit")
    assert data.preprocessing["crop_pct"] == 0.875
    assert data.preprocessing["mean"] == [0.1, 0.2, 0.3]
    mean = Digits(mean=[0.48145466]).preprocessing["mean"]  # more digits than float32 has
    assert mean == [0.48145467]
    assert torch.equal(torch.tensor(mean), torch.tensor([0.48145466]))
    for path in (tmp_path / "a").rglob("*.png"):
        Image.open(path).resize((32, 32)).save(path)
    data = ImageFolder(str(tmp_path / "a"), image_size=32)
    data.setup("fit")
    assert data.preprocessing["crop_pct"] == 1.0  # such images are seen whole
    assert Digits(image_size=16).preprocessing["stored_size"] == 8
    with pytest.raises(ValueError, match="expected the preprocessing of a datamodule; it lacks stored_size"):
        Unlabelled(["a", "b"], {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3})


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_deep_images_are_predicted_in_the_range_of_training(suffix: str, tmp_path: Path) -> None:
    """12 bits in files of 16, which the files do not say: elsewhere, from the checkpoint and from the delta."""
    generator = np.random.default_rng(0)
    for part in ("train", "val", "test"):
        for name, grey in (("dark", 500), ("light", 3000)):
            (tmp_path / "deep" / part / name).mkdir(parents=True)
            for number in range(6):
                pixels = generator.normal(grey, 100, (24, 30)).clip(0, 4095).astype(np.uint16)
                Image.fromarray(pixels).save(tmp_path / "deep" / part / name / f"{part}{number}.{suffix}")
    model = ["--model", "FineTuner", "--model.backbone", NARROW, "--model.train", "all", *RANDOM]
    data = _data(tmp_path / "deep")
    run = _fit(tmp_path, "a", *model, *data, "--data.value_range", "[0, 4095]", "--data.augmentation", "plain")
    photos = shutil.copytree(tmp_path / "deep" / "test" / "light", tmp_path / "there" / "photos")
    trained = ["--config", str(run / "config.yaml"), "--ckpt_path", _checkpoint(run)]
    assert main(["predict", *trained, "--predictions", "all.csv"]) is None
    shutil.move(tmp_path / "deep", tmp_path / "gone")
    assert main(["predict", *trained, "--images", str(photos), "--predictions", "photos.csv"]) is None
    found = _rows(tmp_path / "photos.csv")
    rows = csv.DictReader((tmp_path / "all.csv").read_text().splitlines())
    own = [list(row.values())[2:] for row in rows if row["label"] == "light"]
    assert [found[f"test{number}.{suffix}"] for number in range(6)] == own
    tuned = FineTuner.from_delta(run / "checkpoints" / "delta.safetensors")
    assert tuned.preprocessing is not None
    assert tuned.preprocessing["value_range"] == [0, 4095]
    elsewhere = Unlabelled(["dark", "light"], tuned.preprocessing, num_workers=0)
    assert elsewhere.preprocessing == tuned.preprocessing
    elsewhere.predict_files(photos)
    batch = elsewhere.on_after_batch_transfer(next(iter(elsewhere.predict_dataloader())), 0)
    shares = tuned.predict_step(batch, 0)
    assert shares[:, 1].tolist() == pytest.approx(
        [float(found[f"test{number}.{suffix}"][2]) for number in range(6)], abs=1e-5
    )
    tuned.save_for_timm(tmp_path / "merged.safetensors")
    with safe_open(tmp_path / "merged.safetensors", framework="pt") as file:
        assert '"value_range": [0' in file.metadata()["data"]
    with pytest.warns(
        UserWarning, match=r"with value_range=\[0.*, 4095.*\], but the datamodule prepares them with value_range=None"
    ):
        tuned.compare_data(None, {**tuned.preprocessing, "value_range": None})


def _rows(path: Path) -> dict[str, list[str]]:
    return {Path(row[0]).name: row[1:] for row in list(csv.reader(path.read_text().splitlines()))[1:]}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_the_whole_way(tmp_path: Path) -> None:
    """Pre-train, export, fine-tune, delta, timm, and predict where neither the data nor the base is."""
    here, there = tmp_path / "here", tmp_path / "there"
    source = _folder(here / "source", ["lime", "plum", "zebra"])
    images = _folder(here / "images", ["apple", "lime", "plum"])
    quick = ["--trainer.max_epochs", "4", "--data.augmentation", "plain", "--data.normalize", "backbone"]
    pretrained = _fit(here, "pre", "--model", "Supervised", "--model.backbone", NARROW, *_data(source))
    base = here / "base.safetensors"
    main(["export", _checkpoint(pretrained), str(base)])
    model = ["--model", "FineTuner", "--model.backbone", NARROW, "--model.train", "layer4.1"]
    run = _fit(here, "tuned", *model, "--model.checkpoint", str(base), *_data(images), *quick)
    to_predict = shutil.copytree(images / "test" / "apple", there / "photos")
    trained = ["--config", str(run / "config.yaml"), "--ckpt_path", _checkpoint(run)]
    main(["predict", *trained, "--images", str(to_predict), "--predictions", str(here / "p.csv")])
    expected = _rows(here / "p.csv")
    assert len(expected) == 6
    # As Python has it, of the delta.
    tuned = FineTuner.from_delta(run / "checkpoints" / "delta.safetensors", checkpoint=str(base))
    assert tuned.class_names == ["apple", "lime", "plum"]
    name, arguments = tuned.save_for_timm(there / "merged.safetensors")
    # Elsewhere: with a checkpoint, a configuration and the images.
    copied = shutil.copytree(run, there / "run")
    shutil.rmtree(here)
    trained = ["--config", str(copied / "config.yaml"), "--ckpt_path", _checkpoint(copied)]
    place = ["--trainer.logger.init_args.save_dir", str(there / "runs")]
    main(["predict", *QUIET, *trained, *place, "--images", str(to_predict), "--predictions", str(there / "p.csv")])
    assert _rows(there / "p.csv") == expected
    # And as timm alone does it, to within what resizing first and cropping first differ by.
    merged = timm.create_model(name, **arguments).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(merged), is_training=False)
    for path in sorted(to_predict.iterdir()):
        with torch.no_grad():
            shares = merged(transform(Image.open(path).convert("RGB"))[None]).softmax(1)[0]
        assert shares.tolist() == pytest.approx([float(p) for p in expected[path.name][1:-1]], abs=0.05)
        assert merged.pretrained_cfg["label_names"][int(shares.argmax())] == expected[path.name][0]


@pytest.mark.parametrize("command", ["test", "validate", "evaluate", "predict"])
def test_a_tuned_network_sees_images_as_it_was_trained_on_them(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the start's mean and standard deviation are not timm's, which are all that is known without the start."""
    images = _folder(tmp_path / "images", ["apple", "lime", "plum"])
    start = Backbone("resnet18", channels=(4, 6, 8, 10))
    write_weights(start.net.state_dict(), tmp_path / "base.safetensors", {"preprocessing": {"mean": MEAN, "std": STD}})
    model = ["--model", "FineTuner", "--model.backbone", NARROW, "--model.checkpoint", "base.safetensors", *RANDOM]
    run = _fit(tmp_path, "a", *model, *_data(images), "--data.normalize", "backbone", "--data.augmentation", "plain")
    checkpoint = _checkpoint(run)
    saved = torch.load(checkpoint, weights_only=True)["data"]["preprocessing"]
    assert (saved["mean"], saved["std"]) == (MEAN, STD)
    capsys.readouterr()
    assert main([command, "--ckpt_path", checkpoint, *QUIET]) is None  # a warning would be an error
    model = FineTuner.load_from_checkpoint(checkpoint, weights_only=True)
    data = ImageFolder(str(images), image_size=32, normalize="backbone", num_workers=0)
    trainer_in(tmp_path).validate(model, data, verbose=False)
    assert (data.preprocessing["mean"], data.preprocessing["std"]) == (MEAN, STD)

"""Predictions and evaluations of a trained model: numbers, tables, pictures, and commands elsewhere."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import colour, write_image
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from pyarrow import parquet
from sklearn import metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cli import QUIET, RANDOM, _csv, _fit, _refusal
from test_ship import NARROW, _checkpoint, _data, _folder
from tiny import trainer_in
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from ncfinetune import FineTuner
from ncfinetune.cli import main
from ncfinetune.datamodules import ImageFolder
from ncfinetune.evaluation import evaluate, table, write
from ncfinetune.evaluation_figures import Mistake, confusion, sheet
from ncfinetune.image_predictions import ImagePredictions
from ncfinetune.log_folders import folders as log_folders
from ncfinetune.predicting import PredictionRows, folder_labels, picture
from ncfinetune.prediction_commands import plain_loader
from ncfinetune.predictions import Table
from ncfinetune.runs import Run
from ncfinetune.settings import evaluated_images
from ncfinetune.trained import ForgetFailedStart, complete

NAMES = ["apple", "lime", "plum"]


def _outcome() -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of 60 images and five classes: the last has no images, and the fourth is never predicted."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (60,), generator=generator)
    scores = torch.randn(60, 5, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 5)
    scores[:, 3] -= 20
    return scores.softmax(1), labels


def test_numbers_are_those_of_scikit_learn() -> None:
    shares, labels = _outcome()
    found = evaluate(shares, labels, [*"abcde"], top_k=2)
    decided, classes = shares.argmax(1), range(5)
    assert found.confusion.tolist() == metrics.confusion_matrix(labels, decided, labels=classes).tolist()
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, decided, labels=classes, zero_division=np.nan
    )
    for ours, theirs in ((found.precision, precision), (found.recall, recall), (found.support, support)):
        np.testing.assert_allclose(ours, theirs)
    np.testing.assert_allclose(found.f1.nan_to_num(0), np.nan_to_num(f1))
    assert found.accuracy == metrics.accuracy_score(labels, decided)
    assert found.top_k == {2: pytest.approx(metrics.top_k_accuracy_score(labels, shares, k=2, labels=classes))}
    images, confidence, accuracy = found.reliability
    inside = (shares.amax(1) > 9 / 15) & (shares.amax(1) <= 10 / 15)
    assert images[9] == inside.sum() > 0
    assert confidence[9].item() == pytest.approx(shares.amax(1)[inside].double().mean().item())
    assert accuracy[9].item() == pytest.approx((decided == labels)[inside].double().mean().item())
    assert found.absent == ["e"]
    assert found.precision[3].isnan()
    assert found.recall[4].isnan()


def test_table_and_files_leave_open_what_was_not_measured(tmp_path: Path) -> None:
    shares = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.7, 0.2, 0.1], [0.2, 0.8, 0.0]])
    found = evaluate(shares, torch.tensor([0, 0, 1, 1]), NAMES, top_k=2)
    assert table(found, "test").splitlines() == [
        "test: 4 images, accuracy 75.0 % (95 % interval 30.1 to 95.4), top-2 100.0 %, calibration error 0.375",
        "class  images  precision  recall    F1",
        "apple       2       0.67    1.00  0.80",
        "lime        2       1.00    0.50  0.67",
        "plum        0          -       -     -",
        "most often confused: lime as apple 1x",
    ]
    assert write(found, tmp_path / "new", {"data": "test"}) == ["summary.json", "classes.csv", "confusion.csv"]
    said = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert (said["data"], said["accuracy"], said["top_2_accuracy"]) == ("test", 0.75, 1.0)
    assert said["mean_recall"] == 0.75
    assert said["classes_without_images"] == ["plum"]
    assert said["reliability"][0] == {"from": 0.0, "to": 0.0667, "images": 0, "confidence": None, "accuracy": None}
    assert (tmp_path / "new" / "classes.csv").read_text().splitlines()[1:] == [
        "apple,2,0.666667,1.000000,0.800000",
        "lime,2,1.000000,0.500000,0.666667",
        "plum,0,,,",
    ]
    counts = list(csv.reader((tmp_path / "new" / "confusion.csv").read_text().splitlines()))
    assert counts == [
        ["true class", *NAMES],
        ["apple", "2", "0", "0"],
        ["lime", "1", "1", "0"],
        ["plum", "0", "0", "0"],
    ]


def test_of_many_classes_the_worst_are_listed() -> None:
    shares = torch.eye(40)
    labels = torch.arange(40)
    labels[7] = 8
    lines = table(evaluate(shares, labels, [f"c{label}" for label in range(40)]), "val").splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["c7", "c8"]
    assert len(lines) == 2 + 20 + 2
    assert lines[-2] == "(the classes with the lowest F1; 20 more in classes.csv)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 4}, r"expected top_k in 1\.\.3, the number of classes, got 4"),
        ({"names": ["a"]}, r"expected probabilities of 1 classes, got shape \(2, 3\)"),
        ({"labels": torch.tensor([0, 3])}, "expected labels from 0 to 2, got 0 to 3"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"labels": torch.tensor([0, 1]), "names": NAMES, "top_k": None, **change}
    with pytest.raises(ValueError, match=message):
        evaluate(torch.eye(3)[:2], arguments["labels"], arguments["names"], arguments["top_k"])


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_rows_have_true_classes_and_the_most_probable_ones(suffix: str, tmp_path: Path) -> None:
    written = Table(tmp_path / "new" / f"a.{suffix}", "file", NAMES, labelled=True, top_k=2)
    written.add(["x", "y", "z"], torch.tensor([[0.25, 0.75, 0.0]] * 3), ["", "no image", ""], [0, 2, -1])
    written.finish()
    top = {"top_1": "lime", "probability_1": 0.75, "top_2": "apple", "probability_2": 0.25}
    rows = [
        {"file": "x", "label": "apple", "prediction": "lime", **top, "error": None},
        {"file": "y", "label": "plum", "prediction": None, **dict.fromkeys(top), "error": "no image"},
        {"file": "z", "label": None, "prediction": "lime", **top, "error": None},
    ]
    if suffix == "parquet":
        assert parquet.read_table(written.path).to_pylist() == rows
        return
    text = [{k: f"{v:.6f}" if isinstance(v, float) else v or "" for k, v in row.items()} for row in rows]
    assert _csv(written.path) == text
    with pytest.raises(ValueError, match=r"expected top_k in 1\.\.3, the number of classes, got 0"):
        Table(tmp_path / "b.csv", "file", NAMES, top_k=0)


@pytest.mark.parametrize("classes", [3, 10, 100])
def test_of_equal_probabilities_the_prediction_is_the_first(classes: int, tmp_path: Path) -> None:
    names, shares = [str(label) for label in range(classes)], torch.full((20, classes), 1 / classes)
    shares[10:, 0] = 0  # all others are the highest
    labels = torch.tensor([0] * 10 + [1] * 10)
    found = evaluate(shares, labels, names, top_k=1)
    assert found.accuracy == found.top_k[1] == 1
    written = Table(tmp_path / "a.csv", "index", names, top_k=2)
    written.add(range(20), shares, [""] * 20)
    written.finish()
    rows = [(row["prediction"], row["top_1"], row["top_2"]) for row in _csv(written.path)]
    assert rows == [("0", "0", "1")] * 10 + [("1", "1", "2")] * 10
    predicted = ImagePredictions(["a.png"] * 20, names, shares, [""] * 20)
    assert [[name for name, _ in top] for top in predicted.top(2)] == [[*row[1:]] for row in rows]
    assert predicted.names == [row[0] for row in rows]


@pytest.mark.parametrize("top_k", [None, 2])
def test_probabilities_that_are_nan_are_no_prediction(top_k: int | None, tmp_path: Path) -> None:
    class Torn(LightningModule):
        def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            shares = torch.eye(3)[batch[1]]
            shares[batch[1] == 1] = torch.nan
            return shares

    data = DataLoader(TensorDataset(torch.zeros(6, 3, 4, 4), torch.arange(6) % 3), batch_size=4)
    rows: Any = PredictionRows(tmp_path / "a.csv", None, None, top_k, False)
    trainer_in(tmp_path, callbacks=[rows]).predict(Torn(), data)
    rows.table.finish()
    error = "the network gives nan for its class probabilities"
    written = _csv(tmp_path / "a.csv")
    assert [row["error"] for row in written] == ["", error, ""] * 2
    assert [row["prediction"] for row in written] == ["0", "", "2"] * 2
    assert not any(cell for name, cell in written[1].items() if name not in ("index", "error"))
    assert (rows.table.errors, rows.table.first_error) == (2, error)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_no_class_is_mistaken_for_another_column(suffix: str, tmp_path: Path) -> None:
    names = ["probability of error", "error", "label", "file", "index", "prediction", "ok", "ok"]
    written = Table(tmp_path / f"a.{suffix}", "file", names, labelled=True)
    shares = [n / 36 for n in range(1, 9)]
    written.add(["x"], torch.tensor([shares]), [""], [1])
    written.finish()
    columns = ["probability of error", "probability of probability of error"]
    columns += [f"probability of {name}" for name in ("label", "file", "index", "prediction")]
    columns += ["ok", "probability of ok"]
    (row,) = parquet.read_table(written.path).to_pylist() if suffix == "parquet" else _csv(written.path)
    assert list(row) == ["file", "label", "prediction", *columns, "error"]
    assert (row["file"], row["label"], row["prediction"], row["error"] or None) == ("x", "error", "ok", None)
    assert [float(row[column]) for column in columns] == pytest.approx(shares, abs=1e-6)


def test_a_class_named_true_class_has_a_column_of_its_own(tmp_path: Path) -> None:
    write(evaluate(torch.eye(2), torch.tensor([0, 1]), ["false class", "true class"]), tmp_path, {})
    assert _csv(tmp_path / "confusion.csv") == [
        {"true class": "false class", "false class": "1", "predicted true class": "0"},
        {"true class": "true class", "false class": "0", "predicted true class": "1"},
    ]


def test_pictures_have_every_class_and_file() -> None:
    shares, labels = _outcome()
    found = evaluate(shares, labels, ["a", "b", "$c", "d_d", "e"])
    matrix = confusion(found, "test")
    texts = {text.get_text() for text in matrix.findobj(Text)}
    assert {"a", "$c", "d_d", f"test, 60 images\naccuracy {100 * found.accuracy:.1f} %"} <= texts
    image = np.zeros((8, 8, 3), np.uint8)
    mistakes = [Mistake(f"/some/where/{'class' * 9}/{number}.png", image, "$a", "b_1", 0.987) for number in range(7)]
    titles = [axes.get_title() for axes in sheet(mistakes, "test").axes]
    assert titles[6] == "...lassclassclassclass/6.png\ntrue: $a\npredicted: b_1 0.99"
    assert len(titles) == 12
    many = evaluate(torch.eye(60), torch.arange(60), [str(label) for label in range(60)])
    for figure in (sheet([], "no mistakes"), confusion(many, "many")):
        assert isinstance(figure, Figure)


def test_the_most_confident_mistakes_of_all_batches_are_kept(tmp_path: Path) -> None:
    rows = PredictionRows(tmp_path / "a.csv", None, None, None, True)
    rows.names = ["a", "b"]
    likeliest = torch.linspace(0.51, 0.95, 60)[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    for first in (0, 20, 40):
        shares = torch.stack([likeliest, 1 - likeliest], 1)[first : first + 20]
        labels = torch.tensor([1] * 18 + [0, 1])  # the last but one is right, the last cannot be read
        errors, names = [""] * 19 + ["no image"], list(range(first, first + 20))
        rows._keep(shares, labels, errors, names, torch.zeros(20, 3, 4, 4), None)
    wrong = sorted((n for n in range(60) if n % 20 < 18), key=lambda n: -likeliest[n])
    assert [mistake.name for mistake in rows.mistakes] == [str(n) for n in wrong[:24]]
    assert sum(map(len, rows.labels)) == 57


@pytest.mark.parametrize("in_memory", [False, True])
def test_rows_and_mistakes_name_the_files_of_a_run_s_own_images(in_memory: bool, tmp_path: Path) -> None:
    """Of a model that takes every image for one of the first class."""
    for number in range(16):
        write_image(tmp_path / ("train", "test")[number // 8] / "ab"[number % 2] / f"{number:02d}.png", number)

    class First(LightningModule):
        def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return torch.tensor([[0.9, 0.1]]).expand(len(batch[0]), 2)

    data = ImageFolder(str(tmp_path), image_size=8, num_workers=0, batch_size=3, in_memory=in_memory)
    rows: Any = PredictionRows(tmp_path / "a.csv", None, None, None, True)
    trainer_in(tmp_path, callbacks=[rows]).predict(First(), data)
    rows.table.finish()
    expected = [str(tmp_path / "test" / name) for name in ("a/08.png", "a/10.png", "a/12.png", "a/14.png")]
    expected += [str(tmp_path / "test" / name) for name in ("b/09.png", "b/11.png", "b/13.png", "b/15.png")]
    written = _csv(tmp_path / "a.csv")
    assert [(row["file"], row["label"]) for row in written] == list(zip(expected, "aaaabbbb", strict=True))
    assert sorted(mistake.name for mistake in rows.mistakes) == expected[4:]
    for mistake in rows.mistakes:
        number = int(Path(mistake.name).stem)
        assert np.abs(mistake.image.mean((0, 1)) - colour(number)).max() < 2


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_file_whose_name_is_no_utf_8_does_not_stop_a_prediction(suffix: str, tmp_path: Path) -> None:
    written = Table(tmp_path / f"a.{suffix}", "file", NAMES, labelled=True)
    name = os.fsdecode(b"caf\xe9.jpg")
    written.add([name, "caf\u00e9.jpg"], torch.eye(3)[:2], [f"cannot read {name}", ""], [0, 1])
    written.finish()
    rows = parquet.read_table(written.path).to_pylist() if suffix == "parquet" else _csv(written.path)
    assert [row["file"] for row in rows] == [r"caf\udce9.jpg", "caf\u00e9.jpg"]
    assert rows[0]["error"] == r"cannot read caf\udce9.jpg"
    found = PredictionRows(tmp_path / "b.csv", None, None, None, True)
    found.names = ["a", "b"]
    found._keep(torch.tensor([[0.9, 0.1]]), torch.tensor([1]), [""], [name], torch.zeros(1, 3, 4, 4), None)
    assert found.mistakes[0].name == r"caf\udce9.jpg"


def test_a_picture_is_what_the_network_saw() -> None:
    image = torch.randint(256, (3, 5, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = [0.1, 0.5, 0.7], [0.2, 0.3, 0.4]
    seen = (image / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert np.array_equal(picture(seen, {"mean": mean, "std": std}), image.permute(1, 2, 0).numpy())
    grey = picture(torch.linspace(-3, 5, 20).view(1, 5, 4), None)
    assert grey.shape == (5, 4, 3)
    assert (grey.min(), grey.max()) == (0, 255)


def test_classes_of_a_folder_are_its_folders() -> None:
    files = ["there/plum/a.png", "there/apple/deep/b.png", "there/c.png", "there/other/d.png"]
    assert folder_labels(files, "there", NAMES) == [2, 0, -1, -1]
    deep = ["there/new/plum/a.png", "there/2024/may/lime/x/b.png", "there/apple/plum/c.png", "there/new/lime.png"]
    assert folder_labels(deep, "there", NAMES) == [2, 1, 2, -1]
    assert folder_labels(["plum/new/a.png", "plum/apple/a.png"], "plum", NAMES) == [-1, 0]
    assert folder_labels(deep[:3], "there", NAMES, needed=True) == [2, 1, 2]
    message = (
        r"evaluate needs the class of each image: expected there/CLASS/ for the model's classes apple, lime, plum; "
        r"2 of 4 images are elsewhere: c\.png, other"
    )
    with pytest.raises(ValueError, match=message):
        folder_labels(files, "there", NAMES, needed=True)


def test_a_file_alone_is_in_no_folder_of_a_class(tmp_path: Path) -> None:
    file = tmp_path / "plum" / "a.png"
    file.parent.mkdir()
    file.write_text("")
    assert folder_labels([str(file)], str(file), NAMES) == [-1]
    with pytest.raises(
        ValueError, match=r"expected .*plum/CLASS/ for the model's .*; 1 of 1 images are elsewhere: a.png"
    ):
        folder_labels([str(file)], str(file), NAMES, needed=True)


def test_splits_that_are_evaluated_together_are_said() -> None:
    files = ["there/Test/plum/a.png", "there/train/apple/b.png"]
    message = "there/Test and there/train are evaluated together; for one of them alone give --images there/Test"
    with pytest.warns(UserWarning, match=message):
        assert folder_labels(files, "there", NAMES, needed=True) == [2, 0]
    folder_labels(files, "there", NAMES)  # of a table each row names its file
    folder_labels(files[:1], "there", NAMES, needed=True)
    folder_labels(files, "there", [*NAMES, "train"], needed=True)  # a class of that name


@pytest.fixture(scope="module")
def _run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos and a run on them."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _folder(folder / "photos", NAMES)
        model = ["--model", "FineTuner", "--model.backbone", NARROW, "--model.head_init", "ridge", *RANDOM]
        _fit(folder, "runs/version_0", *model, *_data(folder / "photos"), "--trainer.max_epochs", "0")
    return folder


@pytest.fixture
def place(_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, in which the command runs."""
    monkeypatch.chdir(shutil.copytree(_run, tmp_path / "here"))
    return tmp_path / "here"


def _event_folders(root: Path) -> set[Path]:
    return {path.parent for path in root.rglob("events.out.tfevents.*")}


def test_evaluate_needs_the_checkpoint_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "runs" / "version_0"
    checkpoint = _checkpoint(run)
    assert main(["evaluate", *QUIET[:4], "--ckpt_path", checkpoint, "--top_k", "2"]) is None
    out = run / "evaluation" / "test"
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("test: 18 images, accuracy ")
    files = ["summary.json", "classes.csv", "confusion.csv", "predictions.csv", "confusion.png", "mistakes.png"]
    assert printed[-1] == f"{out}: {', '.join(files)}"
    assert sorted(path.name for path in out.iterdir()) == sorted(files)
    rows = _csv(out / "predictions.csv")
    right = [row["prediction"] == row["label"] for row in rows]
    said = json.loads((out / "summary.json").read_text())
    assert said["accuracy"] == sum(right) / 18
    assert said["images_of"] == evaluated_images(Run(run).part("data"))  # a model card counts it for no other data
    assert all(Path(row["file"]).parent.name == row["label"] for row in rows)
    with Image.open(out / "mistakes.png") as image:
        assert image.width > 600
    events = EventAccumulator(str(run), {"images": 0}).Reload()
    assert {"evaluate_test/confusion", "evaluate_test/mistakes"} <= set(events.Tags()["images"])
    assert _event_folders(place) == {run}
    # In Python the same.
    model = FineTuner.load_from_checkpoint(checkpoint, weights_only=True)
    found = model.predict_images([row["file"] for row in rows], batch_size=5)
    assert found.names == [row["prediction"] for row in rows]
    expected = [[float(row[name]) for name in NAMES] for row in rows]
    torch.testing.assert_close(found.probabilities, torch.tensor(expected), atol=2e-6, rtol=0)
    best = next(iter(found))
    assert best == (rows[0]["file"], rows[0]["prediction"], found.probabilities[0].max().item())
    assert found.top(2)[0][0] == (best[1], best[2])


def test_a_part_is_called_a_part_and_is_not_the_run_s(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "runs" / "version_0"
    words = ["--ckpt_path", _checkpoint(run), *QUIET[:4], "--data.batch_size", "5"]
    assert main(["evaluate", *words, "--trainer.limit_predict_batches", "2"]) is None
    printed = capsys.readouterr().out
    assert printed.startswith("test_of_other_images (the first 10 of 18 images): 10 images, accuracy ")
    said = json.loads((run / "evaluation" / "test_of_other_images" / "summary.json").read_text())
    assert (said["images"], said["part"]) == (10, "the first 10 of 18 images")
    assert main(["predict", *words, "--trainer.limit_predict_batches", "1"]) is None
    assert capsys.readouterr().out == f"predictions: {run / 'predictions.csv'} (the first 5 of 18 images)\n"
    assert main(["test", *words, "--trainer.limit_test_batches", "1"]) is None
    assert Run(run).last("test/acc") is None
    assert list((run / "test_of_other_images").glob("events*"))


def test_images_are_the_run_s_if_their_pixels_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)

    def said(**arguments: object) -> str:
        return evaluated_images({"class_path": "ncfinetune.datamodules.ImageFolder", "init_args": arguments})

    own = said(root="photos", image_size=32, normalize="data", batch_size=4, mean=None)
    assert said(root=str(tmp_path / "photos"), image_size=32, normalize="data", augmentation="plain") == own
    for other in ({"image_size": 16}, {"normalize": "backbone"}, {"mean": [0.5]}, {"root": "others"}):
        assert said(**{"root": "photos", "image_size": 32, "normalize": "data", **other}) != own


@pytest.mark.parametrize(
    ("name", "splits"),
    [("shots", "val test"), ("fraction", "val test"), ("seed", "val test"), ("val_fraction", "test")],
)
def test_what_draws_training_images_changes_no_others(name: str, splits: str) -> None:
    for package in ("ncfinetune.datamodules", "mine"):  # what another's datamodule does with a seed is unknown
        data = {"class_path": f"{package}.Digits", "init_args": {"image_size": 16}}
        more = {**data, "init_args": {**data["init_args"], name: 1}}
        same = [
            split
            for split in ("train", "val", "test")
            if evaluated_images(more, split) == evaluated_images(data, split)
        ]
        assert same == (splits.split() if package.startswith("ncfinetune") else [])


def test_an_evaluation_of_other_images_leaves_that_of_the_run(
    place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = place / "runs" / "version_0"
    words = ["evaluate", "--ckpt_path", _checkpoint(run), *QUIET[:4]]
    assert main([*words, "--data.shots", "2", "--data.seed", "3"]) is None  # the test images are the same
    assert [path.name for path in (run / "evaluation").iterdir()] == ["test"]
    accuracy, pictures = Run(run).last("test/acc"), EventAccumulator(str(run), {"images": 0}).Reload().Tags()["images"]
    before = {path: path.read_bytes() for path in (run / "evaluation" / "test").iterdir()}
    assert accuracy is not None
    others = _folder(place / "others", NAMES)
    capsys.readouterr()
    for further in (["--data.root", str(others)], ["--trainer.limit_predict_batches", "1", "--data.batch_size", "6"]):
        assert main([*words, *further]) is None
        assert f"{run / 'evaluation' / 'test_of_other_images'}: summary.json" in capsys.readouterr().out
        assert {path: path.read_bytes() for path in (run / "evaluation" / "test").iterdir()} == before
        assert Run(run).last("test/acc") == accuracy
    assert main([*words, "--split", "val"]) is None
    assert sorted(path.name for path in (run / "evaluation").iterdir()) == ["test", "test_of_other_images", "val"]
    assert (
        f"evaluate: images, or their preparation, other than those of {run}, so that the numbers are called "
        "test_of_other_images and are none of the run's in a report"
    ) in caplog.text
    seen = EventAccumulator(str(run), {"images": 0}).Reload().Tags()["images"]
    assert set(seen) - set(pictures) >= {"evaluate_test_of_other_images/confusion", "evaluate_val/confusion"}


@pytest.mark.slow
def test_tests_are_logged_at_the_step_of_their_checkpoint(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", "FineTuner", "--model.backbone", NARROW, "--model.train", "all", *RANDOM]
    save = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1"]
    save += ["--trainer.callbacks+=NeuralCollapseTracker"]
    options = ["--data.batch_size", "6", "--trainer.max_epochs", "2"]
    run = _fit(place, "run", *model, *_data(place / "photos"), *save, *options)
    first, second = sorted((run / "checkpoints").glob("*.ckpt"))
    assert main(["evaluate", *QUIET[:4], "--ckpt_path", str(first)]) is None
    assert Run(run).tests == [3]
    accuracy = json.loads((run / "evaluation" / "test" / "summary.json").read_text())["accuracy"]
    assert Run(run).last("test/acc") == accuracy
    assert main(["test", *QUIET[:4], "--ckpt_path", str(second)]) is None
    assert main(["validate", *QUIET[:4], "--ckpt_path", str(first)]) is None
    tested = Run(run / "test").own
    assert {tag for tag in tested if tag.startswith(("cdnv", "nc1_ratio", "nc3"))}
    assert {step for points in tested.values() for step, _ in points} == {6}
    assert {value for _, value in tested["epoch"]} == {1}
    assert [step for step, _ in Run(run / "validate").own["val/acc"]] == [3]
    assert (Run(run).tests, Run(run).tested_at, Run(run).steps, Run(run).lacks) == ([3, 6], 6, 6, None)
    capsys.readouterr()
    assert main(["report", str(run)]) == 0
    assert "was tested at step 6, which counts, and at 3" in capsys.readouterr().err


_CSV = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "c", "name": ""}}
_TENSORBOARD = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "c", "name": ""}}


@pytest.mark.parametrize("several", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("version", ["one", pytest.param(None, marks=pytest.mark.slow)])
def test_tests_of_a_run_that_is_logged_as_csv_leave_its_log(
    version: str | None, several: bool, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {**_CSV, "init_args": {**_CSV["init_args"], "version": version}}
    logger = [one, {**_TENSORBOARD, "init_args": {**_TENSORBOARD["init_args"], "version": version}}] if several else one
    words = ["--model", "FineTuner", "--model.backbone", NARROW, *RANDOM, *_data(place / "photos")]
    words += ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1", "--data.batch_size", "6"]
    words += ["--trainer.max_epochs", "2", "--trainer.logger", json.dumps(logger)]
    assert main(["fit", *QUIET, *words]) is None
    (run,) = (path.parent for path in (place / "c").rglob("config.yaml"))
    assert run.name == (version or "version_0")
    before, folders = (run / "metrics.csv").read_bytes(), set((place / "c").iterdir())
    first, second = sorted((run / "checkpoints").glob("*.ckpt"))
    for checkpoint in (first, second):
        assert main(["test", *QUIET, "--ckpt_path", str(checkpoint)]) is None
    assert main(["test", *QUIET, "--ckpt_path", str(second), "--trainer.limit_test_batches", "1"]) is None
    assert main(["validate", *QUIET, "--ckpt_path", str(first)]) is None
    assert (run / "metrics.csv").read_bytes() == before
    assert set((place / "c").iterdir()) == folders
    assert Run(run).tests == [3, 6]
    assert Run(run).last("test/acc") == dict(Run(run / "test").own["test/acc"])[6]
    for name in ("validate", "test", "test_of_other_images"):
        assert (run / name / "metrics.csv").is_file()
        assert bool([*(run / name).glob("events*")]) == several
    capsys.readouterr()
    assert main(["report", str(run)]) == 0
    assert "was tested at step 6, which counts, and at 3" in capsys.readouterr().err


def test_a_logger_of_a_site_is_not_moved() -> None:
    """Its name and version are those of the site, where a run named ``test`` would be that of all runs."""
    ours = Namespace(class_path="mine.Logger", init_args=Namespace(save_dir="a", name="b", version=None, prefix=""))
    site = Namespace(class_path="WandbLogger", init_args=Namespace(save_dir="a", name="b", version=None, project="c"))
    plain = Namespace(class_path="Plain", init_args=Namespace(save_dir="a"))
    assert log_folders(Namespace(logger=[ours, site, plain])) == [ours.init_args]
    assert log_folders(Namespace(logger=ours)) == [ours.init_args]
    for none in (None, True, False, []):
        assert log_folders(Namespace(logger=none)) == []


def test_predict_needs_a_checkpoint_and_images_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = shutil.copytree(place / "photos" / "test", place / "elsewhere")
    (photos / "unsorted").mkdir()
    shutil.copy(photos / "plum" / "1.png", photos / "unsorted" / "a.png")
    (photos / "lime" / "2.png").write_text("no image")
    run = place / "runs" / "version_0"
    shutil.copy(checkpoint := _checkpoint(run), place / "model.ckpt")
    shutil.rmtree(place / "photos")
    assert main(["predict", "--ckpt_path", checkpoint, "--images", str(photos), *QUIET[:2]]) == 3
    rows = _csv(run / "predictions.csv")
    assert [*rows[0]] == ["file", "label", "prediction", *NAMES, "error"]
    assert [row["label"] for row in rows] == ["apple"] * 6 + ["lime"] * 6 + ["plum"] * 6 + [""]
    assert [bool(row["error"]) for row in rows] == [number == 8 for number in range(19)]
    assert _event_folders(place) == {run}
    # Without the run too.
    assert main(["predict", "--ckpt_path", "model.ckpt", "--images", str(photos), *QUIET[:2]]) == 3
    assert _csv(Path("predictions.csv")) == rows


@pytest.mark.slow
def test_a_labelled_folder_is_evaluated(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = shutil.move(place / "photos" / "test", place / "elsewhere")
    shutil.copy(_checkpoint(place / "runs" / "version_0"), place / "model.ckpt")
    evaluate = ["evaluate", "--ckpt_path", "model.ckpt", "--images", str(photos)]
    (photos / "plum").rename(photos / "zebra")
    error = _refusal(capsys, *evaluate)
    assert f"expected {photos}/CLASS/ for the model's classes apple, lime, plum; 6 of 18 images are elsewhere" in error
    shutil.rmtree(photos / "zebra")
    (photos / "lime" / "2.png").write_text("no image")
    assert main([*evaluate, "--out", "found", *QUIET[:2]]) == 3
    printed = capsys.readouterr()
    assert "images_elsewhere: 11 images, accuracy" in printed.out
    assert "no images of plum: their recall was not measured" in printed.out
    assert "error: 1 of 12 images have no prediction; see the column error of their rows, first: cannot" in printed.err
    for path in photos.rglob("*.png"):
        path.write_text("no image")
    assert "error: none of the 12 images can be read, first: cannot read" in _refusal(capsys, *evaluate)


def test_images_that_cannot_be_read_are_reported_in_python(tmp_path: Path) -> None:
    model = FineTuner(2, {"name": "resnet18", "stem": "cifar", "channels": [4, 6, 8, 10]})
    with pytest.raises(ValueError, match="the model does not know how its images are preprocessed; expected one that"):
        model.predict_images(tmp_path)
    model.preprocessing = {"input_size": [3, 8, 8], "stored_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("")
    with pytest.warns(UserWarning, match=r"2 of 3 images have no prediction, first: cannot read .*b\.png as an image"):
        found = model.predict_images([tmp_path / name for name in ("b.png", "a.png", "nowhere.png")])
    assert found.names[::2] == [None, None]
    assert found.names[1] in ("0", "1")
    assert found.probabilities.isnan().any(1).tolist() == [True, False, True]
    assert [bool(error) for error in found.errors] == [True, False, True]
    assert "No such file" in found.errors[2]
    assert [len(top) for top in found.top(2)] == [0, 2, 0]
    assert model.training
    with torch.no_grad():
        model.classifier.weight[1] = torch.inf
    with pytest.warns(
        UserWarning, match="2 of 2 images have no prediction, first: the network gives nan for its class"
    ):
        found = model.predict_images([tmp_path / name for name in ("a.png", "b.png")])
    assert found.names == [None, None]
    assert [error.split()[0] for error in found.errors] == ["the", "cannot"]
    assert found.top(1) == [[], []]
    with pytest.raises(ValueError, match="expected image files to predict, got none"):
        model.predict_images([])
    with pytest.raises(FileNotFoundError, match="no folder '.*nowhere'; expected one with images"):
        model.predict_images(tmp_path / "nowhere")


def test_bad_commands_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "empty").mkdir()
    shutil.copy(_checkpoint(place / "runs" / "version_0"), place / "model.ckpt")
    error = _refusal(capsys, "predict", "--ckpt_path", "model.ckpt", "--images", "empty")
    assert "no images in 'empty'; expected files .jpg" in error
    error = _refusal(capsys, "evaluate", "--ckpt_path", "model.ckpt", "--images", "photos", "--split", "val")
    assert error == "error: split chooses among the data's images, which images replaces; give one of them"
    error = _refusal(capsys, "evaluate", "--ckpt_path", "model.ckpt")
    assert "'model.ckpt' is in no folder of a run, which would name the data; give --images FOLDER" in error
    error = _refusal(capsys, "predict", "--ckpt_path", "nowhere.ckpt", "--images", "empty")
    assert error == "error: no checkpoint 'nowhere.ckpt'; a run writes its checkpoints to RUN/checkpoints"
    error = _refusal(capsys, "evaluate", "--ckpt_path", "model.ckpt", "--images", "photos", "--predictions", "a.csv")
    assert error == "error: predictions is an option of predict, not of evaluate"


def test_a_checkpoint_of_python_says_which_model_it_is(tmp_path: Path) -> None:
    words = ["predict", "--ckpt_path", str(tmp_path / "a.ckpt"), "--images", "photos"]
    data = {"class_names": ["a", "b"], "preprocessing": {"mean": [0.5]}}
    for knobs, name in (({"skip_from": None}, "FineTuner"), ({"loss": "mse"}, "Supervised")):
        knobs = {**knobs, "num_classes": 2, "backbone": {"name": "resnet18"}}
        saved = {"pytorch-lightning_version": "2.5.0", "state_dict": {}, "hyper_parameters": knobs, "data": data}
        torch.save(saved, tmp_path / "a.ckpt")
        command, _, model, _, images, *rest = complete(words)
        given = {key: value for key, value in knobs.items() if key != "num_classes"}
        assert json.loads(model) == {"class_path": f"ncfinetune.{name}", "init_args": given}
        assert json.loads(images)["init_args"] == data
        assert [command, *rest] == words
    for other in (["--config", "a.yaml"], ["--model=FineTuner"]):
        assert complete([*words, *other]) == [*words, *other]
    torch.save({**saved, "hyper_parameters": {"_class_path": "os.path", "num_classes": 2}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a.ckpt' holds no classifier of ncfinetune; give the run's configuration by"):
        complete(words)


def test_a_start_that_fails_leaves_no_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = [
        "fit",
        *QUIET,
        "--trainer.max_epochs",
        "1",
        "--model",
        "FineTuner",
        "--model.backbone",
        NARROW,
        *_data(place / "photos"),
    ]
    before = set((place / "runs").rglob("*"))
    assert "allow_random" in _refusal(capsys, *fit)
    assert set((place / "runs").rglob("*")) == before
    words = ["--ckpt_path", _checkpoint(place / "runs" / "version_0"), "--data.root", "photos/test"]
    shutil.move("photos/test/plum", "photos/test/zebra")
    for command in ("test", "evaluate"):
        assert "was trained on the classes apple, lime, plum, but the datamodule has" in _refusal(
            capsys, command, *words, "--data.test_fraction", "0.5"
        )
    assert set((place / "runs").rglob("*")) == before


@pytest.mark.parametrize("kept", ["config.yaml", "mine.txt", None])
def test_only_what_a_failed_start_made_is_removed(kept: str | None, tmp_path: Path) -> None:
    class Idle:
        is_global_zero, loggers = True, ()

    forget = ForgetFailedStart(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for name in ("events.out.tfevents.1.a.1.0", "hparams.yaml", *([kept] if kept else [])):
        (tmp_path / "run" / name).write_text("")
    ForgetFailedStart(tmp_path / "run").on_exception(Idle(), None, ValueError())  # type: ignore[arg-type]
    assert (tmp_path / "run" / "hparams.yaml").exists()  # the folder is not new
    forget.on_exception(Idle(), None, ValueError())  # type: ignore[arg-type]
    left = {path.name for path in (tmp_path / "run").glob("*")}
    whole = {"events.out.tfevents.1.a.1.0", "hparams.yaml", "checkpoints", "config.yaml"}
    assert left == {"config.yaml": whole, "mine.txt": {"mine.txt"}, None: set()}[kept]
    assert (tmp_path / "run").exists() == bool(kept)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 4, "shuffle": True, "drop_last": True},
        {"batch_sampler": [[3, 1, 2, 0], [9, 8, 7, 6], [5, 4]]},
        {"batch_size": 4, "sampler": SubsetRandomSampler([7, 2, 5, 4, 9])},  # the others validate
    ],
)
def test_training_images_of_any_datamodule_are_predicted_in_their_order(options: dict[str, Any]) -> None:
    images = TensorDataset(torch.arange(10.0), torch.arange(10))

    class Theirs(LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(images, **options)

    drawn = [2, 4, 5, 7, 9] if "sampler" in options else list(range(10))
    state = torch.get_rng_state()
    assert torch.cat([labels for _, labels in plain_loader(Theirs(), "train")]).tolist() == drawn
    assert torch.equal(torch.get_rng_state(), state)


def test_training_images_of_any_datamodule_are_predicted_without_augmentation() -> None:
    class Theirs(LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            raise AssertionError

        def train_plain_dataloader(self) -> DataLoader[Any]:
            return DataLoader(TensorDataset(torch.arange(10.0)), batch_size=4)

    assert len(plain_loader(Theirs(), "train")) == 3

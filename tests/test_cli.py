"""The command line, from the words a user types to the files that a run leaves."""

import csv
import os
import shlex
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from image_files import write_image
from PIL import Image
from pyarrow import parquet

from ncfinetune import Supervised, datamodules
from ncfinetune.cli import main
from ncfinetune.datamodules import Digits
from ncfinetune.predictions import Table, check_format
from ncfinetune.runs import Run, find_runs

ROOT = Path(__file__).resolve().parent.parent
TINY = "{name: resnet18, stem: cifar, in_chans: 1, channels: [4, 6, 8, 10]}"
# Fine-tuning what nothing pre-trained.
RANDOM = ["--model.allow_random", "true"]
PIECES = ["--model", "Supervised", "--model.backbone", TINY, "--data", "Digits", "--data.shots", "4"]
QUIET = [
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.enable_model_summary",
    "false",
    "--trainer.accelerator",
    "cpu",
]


def _fit(folder: Path, version: str, *words: str) -> Path:
    place = ["--trainer.logger.init_args.save_dir", str(folder), "--trainer.logger.init_args.version", version]
    main(["fit", *QUIET, "--trainer.max_epochs", "1", *place, *words])
    return folder / version


def _refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which a command is refused."""
    try:
        code: object = main(list(words))
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in error if line.startswith("error: ")]
    assert len(errors) == 1
    assert error[-1] == errors[0]
    assert "Namespace" not in errors[0]
    assert "Traceback" not in "".join(error)
    return errors[0]


def _csv(path: Path) -> list[dict[str, Any]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def _refusal_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def _run_of_789(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return _fit(folder, "a", *PIECES, "--data.classes", "[7, 8, 9]")


@pytest.fixture
def trained(_run_of_789: Path) -> Iterator[tuple[Path, list[str]]]:
    """The folder of a run on the digits 7, 8 and 9, and the words that name its configuration and checkpoint."""
    run, before = _run_of_789, set(_run_of_789.rglob("*"))
    yield run, ["--config", str(run / "config.yaml"), "--ckpt_path", str(next((run / "checkpoints").glob("*.ckpt")))]
    for path in sorted(set(run.rglob("*")) - before, reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def test_fit_leaves_events_checkpoint_and_configuration(tmp_path: Path) -> None:
    run = _fit(tmp_path, "a", *PIECES, "--trainer.callbacks+=NeuralCollapseTracker", "--test_after_fit", "true")
    assert list(run.glob("events.out.tfevents.*"))
    assert list((run / "checkpoints").glob("*.ckpt"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["class_path"] == "ncfinetune.Supervised"
    assert config["data"]["init_args"]["shots"] == 4
    data = Digits()
    data.setup("test")
    assert Run(run).last("test/images") == len(data.test_dataloader().dataset)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear_probe", "layer", "scl", "full"])
def test_lab_notes_of_the_methods_run(method: str, tmp_path: Path) -> None:
    note = ["--config", str(ROOT / "experiments" / "finetune" / f"{method}.yaml")]
    run = _fit(tmp_path, method, *note, "--model.backbone", TINY, *RANDOM, "--data", "Digits", "--data.shots", "4")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["class_path"] == "ncfinetune.FineTuner"
    assert (run / "checkpoints" / "delta.safetensors").exists()


def test_the_default_logger_writes_below_runs(tmp_path: Path) -> None:
    main(["fit", *QUIET, "--trainer.max_epochs", "1", *PIECES])
    assert (tmp_path / "runs" / "version_0" / "config.yaml").exists()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    "learner",
    [
        pytest.param(["Supervised", "--model.loss", "mse"], marks=pytest.mark.slow),
        pytest.param(["SupCon", "--data.views", "2", "--model.temperature", "0.3"], marks=pytest.mark.slow),
        pytest.param(["SimCLR", "--data.views", "2", "--model.projection", "linear"], marks=pytest.mark.slow),
        ["FineTuner", "--model.train", "layer4.1", "--model.skip_from", "layer4.1", "--model.cache", "memory", *RANDOM],
    ],
    ids=["Supervised", "SupCon", "SimCLR", "FineTuner"],
)
def test_a_saved_configuration_runs_again_and_resumes(learner: list[str], tmp_path: Path) -> None:
    backbone = TINY.replace("[4, 6, 8, 10]}", "[8, 16, 24, 32], channels_last: true}")
    data = ["--data", "Digits", "--data.shots", "4", "--data.classes", "[0, 1, 2]"]
    run = _fit(tmp_path, "a", "--model", learner[0], "--model.backbone", backbone, *data, *learner[1:])
    first = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert first["init_args"]["backbone"]["channels_last"]
    trained = ["--config", str(run / "config.yaml"), "--ckpt_path", str(next((run / "checkpoints").glob("*.ckpt")))]
    assert main(["fit", *trained, "--trainer.max_epochs", "2"]) is None
    resumed = next(path for path in (run / "checkpoints").glob("*.ckpt") if "epoch=1" in path.name)
    assert torch.load(resumed, weights_only=True)["global_step"] == 2
    assert yaml.safe_load((run / "config.yaml").read_text())["model"] == first
    assert main(["validate", *trained]) is None
    assert yaml.safe_load((run / "validate" / "config_validate.yaml").read_text())["model"] == first


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_layers_that_a_run_has_chosen_are_those_of_its_checkpoint(tmp_path: Path) -> None:
    chooses = ["--model.skip_from", "auto", "--model.skip_join", "only", "--model.max_skips", "2"]
    chooses += ["--model.train", "auto"]
    run = _fit(tmp_path, "a", "--model", "FineTuner", *RANDOM, *PIECES[2:], *chooses)
    checkpoint = next((run / "checkpoints").glob("*.ckpt"))
    chosen = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    trained = ["--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)]
    for command in ("test", "predict"):
        assert main([command, *trained]) is None
        told = run / ("test" if command == "test" else "") / f"config_{command}.yaml"
        told = yaml.safe_load(told.read_text())["model"]["init_args"]
        assert (told["train"], told["skip_from"], told["max_skips"]) == (chosen["train"], chosen["skip_from"], 1)
    assert main(["fit", *trained, "--trainer.max_epochs", "2"]) is None
    kept = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
    assert kept["train"] == kept["skip_from"] == "auto"


def test_a_run_of_no_epoch_leaves_its_configuration_too(tmp_path: Path) -> None:
    closed = ["--model.head_init", "ridge", "--trainer.max_epochs", "0"]
    run = _fit(tmp_path, "a", "--model", "FineTuner", *RANDOM, *PIECES[2:], *closed)
    trained = ["--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    assert main(["test", *trained]) is None
    assert find_runs([tmp_path])


def test_a_second_run_in_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _fit(tmp_path, "run", *PIECES)
    older = next((run / "checkpoints").glob("*.ckpt"))
    newer = Path(shutil.copy(older, older.with_name("a.ckpt")))
    os.utime(newer, (2**31, 2**31))
    place = ["--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.logger.init_args.version", "run"]
    other = "give another --trainer.logger.version, or delete it"
    for saved, go_on in ((newer, f"go on with it by --ckpt_path {newer}, "), (None, "there is no checkpoint in it; ")):
        if saved is None:
            shutil.rmtree(run / "checkpoints")
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        error = _refusal(capsys, "fit", *QUIET, *PIECES, *place, "--trainer.max_epochs", "1")
        assert error.endswith(f"expected a folder without a run, and {str(run)!r} holds one; {go_on}{other}")
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_reader_that_ends_early_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(words: list[str]) -> None:
        raise BrokenPipeError

    replaced: list[int] = []
    monkeypatch.setattr("ncfinetune.report.main", ended)
    monkeypatch.setattr("os.dup2", lambda source, target: replaced.append(target))
    assert main(["report", "runs"]) == 141
    assert replaced == [1]  # so that flushing it at the end is no error either
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("option", ["--config", "-c", "--config=", "-c=", "-c{}"])
def test_options_before_a_configuration_count_too(trained: tuple[Path, list[str]], option: str) -> None:
    """The configuration of a run has ``ckpt_path: null``, which must not replace the checkpoint given before it."""
    run, words = trained
    _, config, *checkpoint = words
    file = [f"{option.removesuffix('{}')}{config}"] if option.endswith(("=", "{}")) else [option, config]
    loss = []
    for order in ([*file, *checkpoint], [*checkpoint, *file]):
        assert main(["test", *order, *QUIET]) is None
        loss.append(Run(run / "test").last("test/loss"))
        shutil.rmtree(run / "test")
    assert loss[0] == loss[1] is not None


def test_no_network_without_a_checkpoint_is_tested_as_a_run(
    trained: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, (_, config, *_) = trained
    before = sorted(run.rglob("*"))
    for command in ("test", "validate"):
        with pytest.warns(UserWarning, match="that was not trained"):
            error = _refusal(capsys, command, "--config", config)
        assert error == (
            f"error: {command} has no checkpoint, and would log to the run in {str(run)!r}; give --ckpt_path "
            f"{run / 'checkpoints' / 'NAME.ckpt'}, or another --trainer.logger.version"
        )
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("command", ["test", "validate"])
def test_measuring_a_classifier_that_was_not_trained_is_said(command: str) -> None:
    said = "measures a classifier that was not trained, since there is no checkpoint; give --ckpt_path RUN/checkpoints"
    with warnings.catch_warnings(record=True) as caught:  # pytest.warns would send on those of Lightning's command line
        warnings.simplefilter("always")
        assert main([command, *QUIET, *PIECES]) is None
    assert f"{command} {said}/NAME.ckpt" in [str(warning.message) for warning in caught]


def test_options_beside_a_checkpoint_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuner = ["--model", "FineTuner", *RANDOM, *PIECES[2:]]
    run = _fit(tmp_path, "a", *tuner, "--model.train", "layer3.1")
    trained = ["--config", str(run / "config.yaml"), "--ckpt_path", str(next((run / "checkpoints").glob("*.ckpt")))]
    assert main(["test", *trained, "--model.train", "layer2.0"]) is None
    config = yaml.safe_load((run / "test" / "config_test.yaml").read_text())
    assert config["model"]["init_args"]["train"] == "layer2.0"


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _fit(tmp_path, "a", *PIECES)
    checkpoint = str(next((run / "checkpoints").glob("*.ckpt")))
    torch.save(torch.load(checkpoint, weights_only=True)["state_dict"], tmp_path / "weights.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        other.writestr("a.txt", "no checkpoint")
    for name in ("weights.pth", "list.pt", "other.zip"):
        error = _refusal(capsys, "test", *QUIET, *PIECES, "--ckpt_path", str(tmp_path / name))
        assert f"{name}' is no checkpoint of a run, or a damaged one; expected a file of RUN/chec" in error
    wider = ["--model.backbone", TINY.replace("[4, 6, 8, 10]", "[4, 6, 8, 12]")]
    error = _refusal(capsys, "test", *QUIET, *PIECES, *wider, "--ckpt_path", checkpoint)
    assert "--ckpt_path is a checkpoint of another model: Error(s) in loading state_dict for Supervised" in error
    words = ["--model", "FineTuner", *PIECES[2:], "--trainer.max_epochs", "2"]
    error = _refusal(capsys, "fit", *QUIET, *words, "--ckpt_path", checkpoint)
    assert "a FineTuner cannot resume the run of another learner; to start from its weights, give the file" in error


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_trained_run_is_evaluated_by_its_configuration(command: str, trained: tuple[Path, list[str]]) -> None:
    run, words = trained
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    main([command, *words])
    assert {path: path.read_bytes() for path in before} == before
    # Where TensorBoard lists a run, its name says of what; predictions are no run.
    logs = [path.parent for path in run.parent.rglob("events.out.tfevents.*") if path not in before]
    assert logs == [run / command] * (command != "predict")
    assert (run / command / f"config_{command}.yaml").exists() == (command != "predict")
    assert (run / "config_predict.yaml").exists() == (command == "predict")


def test_predictions_are_a_table_of_class_probabilities(trained: tuple[Path, list[str]]) -> None:
    run, words = trained
    main(["predict", *words])
    rows = list(csv.DictReader((run / "predictions.csv").read_text().splitlines()))
    assert [*rows[0]] == ["index", "label", "prediction", "7", "8", "9", "error"]
    data = Digits([7, 8, 9])
    data.setup("test")
    assert [row["label"] for row in rows] == ["789"[label] for label in data.parts()["test"].own_labels]
    for row in rows:
        assert sum(float(row[name]) for name in "789") == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == max("789", key=lambda name: float(row[name]))


def test_predictions_go_where_they_are_asked_to(tmp_path: Path, trained: tuple[Path, list[str]]) -> None:
    run, words = trained
    for name in ("a.csv", "a.parquet"):
        main(["predict", *words, "--predictions", str(tmp_path / "new" / name)])
    rows = list(csv.DictReader((tmp_path / "new" / "a.csv").read_text().splitlines()))
    table = parquet.read_table(tmp_path / "new" / "a.parquet")
    assert table.column_names == ["index", "label", "prediction", "7", "8", "9", "error"]
    assert table["error"].to_pylist() == [None] * len(rows)
    assert not list((tmp_path / "new").glob("*.partial"))
    assert table["prediction"].to_pylist() == [row["prediction"] for row in rows]
    assert table["index"].to_pylist() == list(range(len(rows)))
    assert table["8"].to_pylist() == pytest.approx([float(row["8"]) for row in rows], abs=1e-6)
    assert not (run / "predictions.csv").exists()


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_rows_are_written_as_they_come(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text("of an earlier run")
    table = Table(path, "file", ["cat", "dog"])
    table.add(["x", "y"], torch.tensor([[0.25, 0.75], [0.5, 0.5]]), ["", "it is no image"])
    if suffix == "csv":
        rows = "file,prediction,cat,dog,error\nx,dog,0.250000,0.750000,\ny,,,,it is no image\n"
        assert table.partial.read_text() == rows
    assert table.keep()
    if suffix == "parquet":
        rows = parquet.read_table(table.partial).to_pylist()
        assert rows[0] == {"file": "x", "prediction": "dog", "cat": 0.25, "dog": 0.75, "error": None}
        assert rows[1] == {"file": "y", "prediction": None, "cat": None, "dog": None, "error": "it is no image"}
    assert path.read_text() == "of an earlier run"
    assert (table.rows, table.errors, table.first_error) == (2, 1, "it is no image")


def test_predictions_of_other_classes_than_are_named(tmp_path: Path) -> None:
    table = Table(tmp_path / "a.csv", "file", ["cat", "dog"])
    with pytest.raises(ValueError, match="expected probabilities of 2 classes, got 3"):
        table.add(["x"], torch.ones(1, 3), [""])
    assert table.keep()


def test_predictions_of_another_kind_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*QUIET, *PIECES, "--predictions"]
    assert "predictions is an option of predict, not of fit" in _refusal(capsys, "fit", *words, "a.csv")
    error = _refusal(capsys, "predict", *words, "a.xlsx")
    assert "expected predictions to be a .csv or .parquet file, got 'a.xlsx'" in error
    (tmp_path / "folder.csv").mkdir()
    error = _refusal(capsys, "predict", *words, str(tmp_path / "folder.csv"))
    assert "expected predictions to be a file, got the folder" in error
    (tmp_path / "file").write_text("")
    error = _refusal(capsys, "predict", *words, str(tmp_path / "file" / "a.csv"))
    assert "cannot write to the predictions' folder" in error
    assert "choose another with --predictions" in error
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'a.parquet' needs pyarrow: pip install 'ncfinetune.parquet.', or name a"):
        check_format(Path("a.parquet"))


def test_images_of_a_folder_are_classified_by_file(tmp_path: Path, trained: tuple[Path, list[str]]) -> None:
    run, words = trained
    main(["predict", *words])
    expected = list(csv.reader((run / "predictions.csv").read_text().splitlines()))
    data = Digits([7, 8, 9])
    data.setup("test")
    (tmp_path / "photos" / "deeper").mkdir(parents=True)
    for index, place in ((0, "a.png"), (1, "b.png"), (2, "deeper/c.PNG")):
        image = data.predict_dataloader().dataset[index][0][0].numpy()
        Image.fromarray(image).convert("RGBA").save(tmp_path / "photos" / place, format="png")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    main(["predict", *words, "--images", str(tmp_path / "photos")])
    got = list(csv.reader((run / "predictions.csv").read_text().splitlines()))
    assert got[0] == ["file", *expected[0][2:]]
    assert [Path(row[0]).name for row in got[1:]] == ["a.png", "b.png", "c.PNG"]
    for row, known in zip(got[1:], expected[1:4], strict=True):
        assert row[1] == known[2]
        assert [float(p) for p in row[2:-1]] == pytest.approx([float(p) for p in known[3:-1]], abs=1e-5)
    main(["predict", *words, "--images", str(tmp_path / "photos" / "b.png")])
    assert list(csv.reader((run / "predictions.csv").read_text().splitlines())) == [got[0], got[2]]


@pytest.mark.parametrize(
    ("suffix", "workers"),
    [
        ("csv", "1"),
        pytest.param("parquet", "0", marks=pytest.mark.slow),
        pytest.param("csv", "0", marks=pytest.mark.slow),
        pytest.param("parquet", "1", marks=pytest.mark.slow),
    ],
)
def test_a_broken_image_has_a_row_that_says_so(
    suffix: str, workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _pictures("photos")
    Path("photos/train/a/0.jpg").write_bytes(Path("photos/train/a/0.jpg").read_bytes()[:300])
    Path("photos/train/b/3.jpg").write_bytes(b"")
    _pictures("good")
    command = ["predict", *QUIET, *_coloured("good"), "--data.batch_size", "4", "--data.num_workers", workers]
    capsys.readouterr()
    written = tmp_path / f"p.{suffix}"
    for skip in ("false", "true"):
        words = ["--images", "photos", "--predictions", str(written), "--data.skip_broken", skip]
        assert main([*command, *words]) == 3
        said = capsys.readouterr().err
        assert "error: 2 of 12 images have no prediction; see the column error of their rows, first: cannot" in said
        rows = parquet.read_table(written).to_pylist() if suffix == "parquet" else _csv(written)
        assert [row["file"] for row in rows] == [f"photos/train/{c}/{i}.jpg" for c in "ab" for i in range(6)]
        broken = [row for row in rows if row["error"]]
        assert [row["file"] for row in broken] == ["photos/train/a/0.jpg", "photos/train/b/3.jpg"]
        for row in broken:
            assert not row["prediction"]
            assert not row["a"]
            assert f"cannot read {row['file']} as an image" in row["error"]
        assert all(row["prediction"] in ("a", "b") and row["a"] for row in rows if not row["error"])
    for path in Path("photos").rglob("*.jpg"):
        if path.stat().st_size > 300:
            continue
        path.unlink()
    assert main([*command, "--images", "photos", "--predictions", str(written)]) is None


def test_broken_test_images_have_a_row_too(tmp_path: Path) -> None:
    _pictures("good")
    for number in (20, 21, 22):
        write_image(Path("good/test/a", f"{number}.jpg"), number)
    colour = _coloured("good")
    Path("good/test/a/21.jpg").write_bytes(b"x")
    assert main(["predict", *QUIET, *colour, "--data.num_workers", "0", "--predictions", "p.csv"]) == 3
    rows = _csv(Path("p.csv"))
    files = [f"good/test/a/{number}.jpg" for number in (20, 21, 22)]
    assert [row["file"] for row in rows] == files
    assert [(row["label"], bool(row["error"])) for row in rows] == [("a", False), ("a", True), ("a", False)]


def test_what_was_predicted_is_kept_where_a_run_breaks_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _pictures("good")
    Path("p.csv").write_text("of an earlier run")
    step, seen = Supervised.predict_step, []

    def break_off(self: Supervised, batch: Any, batch_idx: int) -> torch.Tensor:
        seen.append(Path("p.csv.partial").read_text().count("\n") if batch_idx else 0)
        if batch_idx == 2:
            raise OSError("the disk is gone")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Supervised, "predict_step", break_off)
    words = [*_coloured("good"), "--data.batch_size", "4", "--data.num_workers", "0", "--images", "good"]
    assert "the disk is gone" in _refusal_of(capsys, "predict", *QUIET, *words, "--predictions", "p.csv")
    assert seen == [0, 5, 9]
    assert Path("p.csv").read_text() == "of an earlier run"
    assert len(Path("p.csv.partial").read_text().splitlines()) == 9


def test_predict_refuses_several_processes(
    trained: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.pytorch.Trainer.world_size", 2)
    error = _refusal(capsys, "predict", *QUIET, *trained[1])
    assert error == "error: predict writes its rows in order, from one process; give --trainer.devices 1"


def test_images_that_are_none_are_refused(
    trained: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", *QUIET, *trained[1], "--images"]
    assert "no folder 'nowhere'; expected one with images" in _refusal(capsys, *command, "nowhere")
    assert "no images in " in _refusal(capsys, *command, str(tmp_path))
    error = _refusal(capsys, "fit", *QUIET, *PIECES, "--images", str(tmp_path))
    assert error == "error: images is an option of predict and evaluate, not of fit"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "Superviced", "--data", "Digits"], "model: no class 'Superviced'; expected one of Supervised, FineTuner, SimCLR, SupCon; nearest: Supervised"),
        (["--model", "Supervised", "--data", "Digit"], "data: no class 'Digit'; expected one of Digits, Aircraft, "),
        ([*PIECES, "--model.backbon", "x"], "no option 'backbon'; expected one of"),
        (["--config", "misspelt.yaml"], "nearest: backbone"),
        ([*PIECES, "--trainer.max_epoch", "3"], "no option 'trainer.max_epoch'; expected one of trainer"),
        ([*PIECES, "--trainr.max_epochs", "3"], "nearest: trainer.max_epochs"),
        ([*PIECES, "--model.optimizer", "SDG"], "optimizer: no class 'SDG'; expected one of"),
        ([*PIECES, "--trainer.callbacks+=NeuralColapse"], "callbacks: no class 'NeuralColapse'; expected one of NeuralCollapseTracker, OnlineProbe"),
        ([*PIECES, "--trainer.max_epochs", "many"], "trainer.max_epochs: expected int or null, got 'many'"),
        ([*PIECES, "--data.batch_size", "x"], "batch_size: expected int, got 'x'"),
        ([*PIECES, "--seed_everything", "abc"], "seed_everything: expected bool or int, got 'abc'"),
        ([*PIECES, "--test_after_fit", "maybe"], "test_after_fit: expected bool, got 'maybe'"),
        (["--model.help", "Foo"], "model: no class 'Foo'; expected one of FineTuner, SimCLR, SupCon, Supervised"),
        ([*PIECES, "--trainer.accumulate_grad_batches", "0"], "expected trainer.accumulate_grad_batches above 0, got 0"),
        ([*PIECES, "--trainer.val_check_interval", "0.0"], "expected trainer.val_check_interval above 0, got 0.0"),
        (["--config", "nowhere.yaml"], "no file"),
        ([*PIECES, "--model.num_classes", "3"], "the model is given num_classes=3, but the data has 10; leave it out"),
        ([*PIECES, "--data.batchsize", "8"], "Digits has no option 'batchsize'; expected one of batch_size, "),
        ([*PIECES, "--data.place", "disk"], "Digits has no option 'place'; expected one of "),
        (["--data.image_size", "8", *PIECES], "no option 'image_size' where it was given; options of a class come after --data CLASS; it belongs to Aircraft, "),
        ([*PIECES[:4], "--data.shots", "8"], "no option 'shots' where it was given; options of a class come after --data CLASS; it belongs to Aircraft, "),
        ([*PIECES, "--data.augmentation", "strong"], "error: augmentation: expected one of plain, standard, trivial, simclr, got 'strong'"),
        ([*PIECES, "--model.lr_interval", "x"], "error: lr_interval: expected one of epoch, step, got 'x'"),
        ([*PIECES, "--model.lr", "0.1"], "error: Supervised has no option 'lr'; nearest: model.optimizer.lr (after --model.optimizer CLASS)"),
        (["--model.lr", "0.1", *PIECES], "come after --model CLASS; nearest: model.optimizer.lr (after --model.optimizer CLASS)"),
        ([*PIECES, "--model.optimizer.lr", "0.1"], "error: no option 'lr' where it was given; options of a class come after --model.optimizer CLASS"),
        ([*PIECES, "--model.optimizer", "SGD", "--model.optimizer.l", "0.1"], "SGD has no option 'l'; expected one of lr, params, "),
        ([*PIECES, "--lr", "0.1"], "no option 'lr'; expected one of seed_everything, trainer, model, data; nearest: model.optimizer.lr (after --model.optimizer CLASS)"),
        ([*PIECES, "--epochs", "3"], "no option 'epochs'; expected one of seed_everything, trainer, model, data; nearest: trainer.max_epochs, trainer.min_epochs"),
        ([*PIECES, "--batch_size", "3"], "nearest: data.batch_size (after --data CLASS)"),
        ([*PIECES, "--trainer.callbacks+=NeuralCollapseTracker", "--trainer.callbacks.layer", "x"], "NeuralCollapseTracker has no option 'layer'; it belongs to OnlineProbe; nearest: layers"),
        ([*PIECES, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=x", "--trainer.callbacks.patience=abc"], "error: patience: expected int, got 'abc'"),
        ([*PIECES, "--trainer.callbacks.monitor=x"], "no option 'monitor' where it was given; options of a class come after --trainer.callbacks CLASS"),
        ([*PIECES, "--model.optimizer", "{class_path: SGD, init_args: {lrr: 1}}"], "SGD has no option 'lrr'; expected one of lr, params, "),
        ([*PIECES, "--trainer.callbacks+=EarlyStopping"], "error: EarlyStopping: the following arguments are required: monitor"),
        ([*PIECES, "a.ckpt"], "error: expected an option, got 'a.ckpt'; a checkpoint is given by --ckpt_path, images to predict or evaluate by --images, a configuration by --config"),
        (["--config", "misspelt_data.yaml"], "nearest: shots"),
        ([*PIECES, "--data.batch_size", "0"], "expected batch_size of at least 1, got 0"),
        (["--model", "FineTuner", "--model.backbone", TINY, "--data", "Digits", "--model.train", "layer9.0"], "no layer fits 'layer9.0'"),
        (["--model", "FineTuner", "--model.backbone", TINY, "--data", "Digits", "--model.checkpoint", "no.ckpt"], "no checkpoint 'no.ckpt'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("misspelt.yaml").write_text("model: {class_path: Supervised, init_args: {backbon: x}}\ndata: Digits\n")
    Path("misspelt_data.yaml").write_text("data: {class_path: Digits, init_args: {shot: 2}}\n")
    assert message in _refusal(capsys, "fit", *QUIET, *words)


def _pictures(root: str) -> None:
    """Two classes of images in files, of which ``bad`` has one that is none, and ``cut`` one that breaks off."""
    for name in ("a", "b"):
        for number in range(6):
            write_image(Path(root, "train", name, f"{number}.jpg"), number + 6 * (name == "b"))
    first = Path(root, "train", "a", "0.jpg")
    if root == "bad":
        first.write_bytes(b"no image")
    if root == "cut":
        for path in first.parent.iterdir():
            path.write_bytes(path.read_bytes()[:200] + path.name.encode())  # the header alone is the same in all


def _colour(root: str) -> list[str]:
    return ["--model", "Supervised", "--model.backbone", TINY.replace("in_chans: 1", "in_chans: 3"), "--data", "ImageFolder", "--data.root", root, "--data.image_size", "16"]  # fmt: skip


def _coloured(root: str) -> list[str]:
    """The same with the checkpoint of a classifier that was trained on it."""
    words = _colour(root)
    run = _fit(Path("runs"), "colour", *words, "--data.num_workers", "0")
    return [*words, "--ckpt_path", str(next((run / "checkpoints").glob("*.ckpt")))]


def _pair(learner: str, *words: str) -> list[str]:
    return ["--model", learner, *PIECES[2:], *words]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", *_pair("SupCon")], "SupCon trains on views (N, V, C, H, W), got images"),
        (["fit", *_pair("SupCon", "--data.views", "2", "--data.batch_size", "1")], "a contrastive loss needs at least 2 samples a batch, got 1"),
        (["fit", *_pair("Supervised", "--data.views", "2")], "the backbone takes images (N, 1, H, W), got (40, 2, 1, 8, 8); those are views"),
        (["fit", *PIECES, "--data.shots", "999"], "expected shots of at most 107"),
        (["fit", *_colour("bad"), "--data.num_workers", "1"], "error: cannot read bad/train/a/0.jpg as an image: "),
        (["fit", *_colour("cut"), "--data.num_workers", "0"], "error: cannot read cut/train/a/"),
        (["fit", *_colour("empty")], "no images of a in 'empty/train'; add some, or remove the class"),
        (["test", *_colour("good")], "ImageFolder has no test images, only train, val"),
        (["fit", *_pair("FineTuner", *RANDOM, "--model.cache", "memory", "--data.augmentation", "standard")], "differ each time they are loaded"),
        (["fit", *_pair("FineTuner", "--model.cache", "disk", "--model.cache_dir", "file/x")], "cannot write to the cache folder 'file/x' (Not a directory); choose another with --model.init_args.cache_dir"),
        (["predict", "--images", "file"], "error: predict needs a model and data; for those of a run give --ckpt_path RUN/checkpoints/NAME.ckpt"),
        (["test", "--model", "Supervised", "--model.backbone", TINY], "error: test needs data; for those of a run give --ckpt_path RUN/checkpoints/NAME.ckpt"),
        (["fit", "--seed_everything", "1"], "error: fit needs a model and data, which --model.help and --data.help show, or a --config FILE"),
        (["fit", "--data", "Digits"], "error: fit needs a model, which --model.help shows, or a --config FILE"),
        (["validate", *PIECES, "--ckpt_path", "no.ckpt"], "no checkpoint 'no.ckpt'; a run writes its checkpoints to RUN/checkpoints"),
        (["validate", *PIECES, "--ckpt_path", "file"], "'file' is no checkpoint of a run, or a damaged one"),
        (["evaluate", "--ckpt_path", "run"], "error: expected the file of a checkpoint, got the folder 'run'; its checkpoints: run/checkpoints/a.ckpt, run/checkpoints/b.ckpt"),
        (["fit", *PIECES, "--ckpt_path", "run/checkpoints"], "error: expected the file of a checkpoint, got the folder 'run/checkpoints'; its checkpoints: run/checkpoints/a.ckpt, "),
        (["test", *PIECES, "--ckpt_path", "last"], "error: ckpt_path last works with fit only; test needs the file, --ckpt_path RUN/checkpoints/NAME.ckpt"),
        (["fit", *PIECES, "--trainer.limit_val_batches", "0", "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"], "EarlyStopping monitors val/loss, but the run has no validation (training images per class: 4); give validation images (a folder val, or a val_fraction above 0 of two images or more of a class), or take another monitor, as train/loss"),
        (["fit", *PIECES, "--trainer.limit_val_batches", "0", "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val/loss"], "ModelCheckpoint monitors val/loss, but the run has no validation (training"),
        (["fit", *PIECES, *("--trainer.callbacks+=ModelCheckpoint", "--trainer.max_epochs=1") * 2], "error: Found more than one stateful callback of type `ModelCheckpoint`"),
        (["predict", *PIECES], "predict needs a trained classifier; give --ckpt_path RUN/checkpoints/NAME.ckpt"),
        (["evaluate", *PIECES], "evaluate needs a trained classifier; give --ckpt_path RUN/checkpoints/NAME.ckpt"),
        (["predict", *_pair("SimCLR")], "SimCLR has no classifier to predict with"),
        (["fit", *PIECES, "--trainer.limit_train_batches", "-3"], "expected a whole number of batches, or a share of all from 0.0 to 1.0, got -3"),
        (["fit", *PIECES, "--trainer.callbacks+=OnlineProbe", "--trainer.callbacks.layer", "fc"], "layer 'fc' did not run in this batch; give OnlineProbe a layer that does"),
        (["fit", *_pair("FineTuner", "--model.train", "layer9.9")], "nearest: layer4.1, layer4.0, layer3.1"),
        (["fit", *_pair("FineTuner", "--model.backbone", "{stem: cifar}")], "expected the name of a timm architecture in the backbone, got ['stem']"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:(test|validate) measures a classifier that was not trained")
def test_what_a_run_refuses_is_said_in_a_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("")
    Path("run/checkpoints").mkdir(parents=True)
    for name in ("a", "b"):
        Path("run/checkpoints", f"{name}.ckpt").write_text("")
    for root in ("bad", "cut", "good"):
        _pictures(root)
    write_image(Path("empty/train/b/0.jpg"), 0)
    Path("empty/train/a").mkdir()
    error = _refusal(capsys, words[0], *QUIET, "--trainer.max_epochs", "1", *words[1:])
    assert message in error
    assert "Given value" not in error


def test_a_switch_shows_where_an_error_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCFINETUNE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="expected batch_size of at least 1"):
        main(["fit", *QUIET, *PIECES, "--data.batch_size", "0"])


@pytest.mark.parametrize("bug", [RuntimeError, AttributeError, KeyError, KeyboardInterrupt])
def test_bugs_keep_their_traceback(bug: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(words: list[str]) -> None:
        raise bug

    monkeypatch.setattr("ncfinetune.trainer_cli.main", run)
    with pytest.raises(bug):
        main(["fit", "--data", "Digits"])


def test_missing_file_names_its_neighbours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pretrain.yaml").write_text("{}")
    error = _refusal(capsys, "fit", "--config", str(tmp_path / "pretrian.yaml"))
    assert error.endswith("pretrian.yaml'; expected one of pretrain.yaml; nearest: pretrain.yaml")


def test_missing_file_of_the_installation_names_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    error = _refusal(capsys, "fit", "--config", "experiments/start/prob.yaml")
    assert error.endswith(
        "prob.yaml'; expected one of probe.yaml, layer.yaml, full.yaml, scl.yaml; nearest: probe.yaml, layer.yaml"
    )


def test_folder_that_cannot_be_written_is_said_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    error = _refusal(capsys, "fit", *QUIET, *PIECES, "--trainer.logger.init_args.save_dir", str(tmp_path / "file"))
    assert "cannot write to the run folder" in error
    assert "choose another with --trainer.logger.init_args.save_dir" in error


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert (
        "no command 'train'; expected one of fit, validate, test, predict, evaluate, scan, suggest, export, layers, report"
        in capsys.readouterr().err
    )


def test_a_command_without_words_says_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: fit needs a model and data, which --model.help and --data.help list")
    assert second.startswith("ncfinetune fit --data Digits --model Supervised ")
    assert main(["predict"]) == 2
    assert capsys.readouterr().err == (
        "error: predict needs a model and data; for those of a run:\n"
        "ncfinetune predict --ckpt_path RUN/checkpoints/NAME.ckpt\n"
    )


@pytest.mark.slow
def test_what_a_command_without_words_says_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit"]) == 2
    words = shlex.split(capsys.readouterr().err.splitlines()[1])
    assert main([*words[1:], *QUIET, "--trainer.fast_dev_run", "1"]) is None


@pytest.mark.parametrize(
    ("words", "names", "line"),
    [
        (
            ["--model.help"],
            ["FineTuner", "SimCLR", "SupCon", "Supervised"],
            "FineTuner   Trains a new classifier and chosen layers",
        ),
        (
            ["--data.help", "--model", "Supervised"],
            sorted(set(datamodules.__all__) - {"ImageDataModule", "IndexedImages", "Recipe"}),
            "Digits      ",
        ),
    ],
)
def test_help_without_a_class_lists_the_classes(
    words: list[str], names: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *words]) is None
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(
        f"{words[0].removesuffix('.help')} takes one of these, or the class path of another Lightning"
    )
    assert [name.split()[0] for name in lines] == names
    assert all(len(each.split(maxsplit=1)[1]) > 20 and len(each) <= 120 for each in lines)
    assert any(each.startswith(line) for each in lines)


def test_help_of_a_class_lists_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--data.help", "Digits"])
    assert "--data.init_args.shots" in capsys.readouterr().out.replace("--data.shots", "--data.init_args.shots")


@pytest.mark.parametrize("word", ["--version", "--help"])
def test_front_door_as_a_module(word: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ncfinetune", word], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0
    assert done.stdout.startswith("ncfinetune 0.1" if word == "--version" else "usage: ncfinetune")


def test_predict_refuses_what_is_no_table_of_probabilities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boring = "lightning.pytorch.demos.boring_classes.Boring"
    words = ["--model", boring + "Model", "--data", boring + "DataModule", "--trainer.limit_predict_batches", "0"]
    error = _refusal(capsys, "predict", *QUIET, *words)
    assert error.endswith("the class probabilities (N, K) that predict_step returns; BoringModel's doesn't")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "distributed_backend=gloo"),
        (["--trainer.devices", "1"], "error: torchrun launched 2 processes, but the Trainer has 1; give it as many"),
        (["--trainer.devices", "3"], "error: You set `devices=3` and `num_nodes=1` in Lightning"),
    ],
)
def test_processes_of_torchrun_train_together_or_not_at_all(options: list[str], said: str, tmp_path: Path) -> None:
    words = ["--nproc_per_node", "2", "-m", "ncfinetune", "fit", "--data", "Digits", "--data.shots", "8"]
    words += ["--model", "Supervised", "--model.backbone", "{name: test_vit, img_size: 8, patch_size: 2, in_chans: 1}"]
    words += ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent), "OMP_NUM_THREADS": "1"},
    )
    assert said in done.stdout + done.stderr
    assert (done.returncode == 0) == (not options)
    runs = [path for path in (tmp_path / "runs").glob("version_*") if any(path.iterdir())]
    assert len(runs) == (not options)


def test_layers_of_a_network_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "test_vit"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["layer", "width", "parameters", "pooled"]
    assert lines[1] == ["blocks.0", "64", "41,728", "class", "token"]
    assert [line[0] for line in lines[1:]] == [*(f"blocks.{i}" for i in range(6)), "penultimate"]
    assert _refusal(capsys, "layers", "test_vitt").startswith("error: timm has no architecture 'test_vitt'; nearest: ")
    assert main(["layers"]) == 2
    assert capsys.readouterr().err.startswith("error: expected ncfinetune layers NAME")
    assert main(["layers", "--help"]) == 0
    taught = capsys.readouterr().out
    assert taught.startswith("usage: ncfinetune layers NAME")
    for option in ("--model.train", "--model.skip_from", "--layers", "--trainer.callbacks.layers"):
        assert option in taught

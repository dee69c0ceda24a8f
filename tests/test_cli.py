"""The command line, from the words a user types to the files that a run leaves."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ncfinetune.__main__ import main
from ncfinetune.datamodules import Digits
from ncfinetune.report import main as report
from ncfinetune.report import method_name, task_name

ROOT = Path(__file__).resolve().parent.parent
TINY = "{name: resnet18, stem: cifar, in_chans: 1, channels: [4, 6, 8, 10]}"
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
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in error if line.startswith("error: ")]
    assert len(errors) == 1
    assert error[-1] == errors[0]
    return errors[0]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_fit_leaves_events_checkpoint_and_configuration(tmp_path: Path) -> None:
    run = _fit(tmp_path, "a", *PIECES, "--trainer.callbacks+=NeuralCollapseTracker", "--test_after_fit", "true")
    assert list(run.glob("events.out.tfevents.*"))
    assert list((run / "checkpoints").glob("*.ckpt"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["class_path"] == "ncfinetune.Supervised"
    assert config["data"]["init_args"]["shots"] == 4


@pytest.mark.parametrize("method", ["linear_probe", "layer", "scl", "full"])
def test_lab_notes_of_the_methods_run(method: str, tmp_path: Path) -> None:
    note = ["--config", str(ROOT / "experiments" / "finetune" / f"{method}.yaml")]
    run = _fit(tmp_path, method, *note, "--model.backbone", TINY, "--data", "Digits", "--data.shots", "4")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["class_path"] == "ncfinetune.FineTuner"
    assert (run / "checkpoints" / "delta.safetensors").exists()


def test_the_default_logger_writes_below_runs(tmp_path: Path) -> None:
    main(["fit", *QUIET, "--trainer.max_epochs", "1", *PIECES])
    assert (tmp_path / "runs" / "version_0" / "config.yaml").exists()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_saved_configuration_runs_again_and_resumes(tmp_path: Path) -> None:
    run = _fit(tmp_path, "a", *PIECES)
    config = run / "config.yaml"
    checkpoint = next((run / "checkpoints").glob("*.ckpt"))
    main(["fit", "--config", str(config), "--trainer.max_epochs", "2", "--ckpt_path", str(checkpoint)])
    assert any("epoch=1" in path.name for path in (run / "checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_trained_run_is_evaluated_by_its_configuration(command: str, tmp_path: Path) -> None:
    run = _fit(tmp_path, "a", *PIECES)
    before = (run / "config.yaml").read_text()
    checkpoint = next((run / "checkpoints").glob("*.ckpt"))
    main([command, "--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)])
    assert (run / "config.yaml").read_text() == before
    assert (run / f"config_{command}.yaml").exists()


def test_predictions_are_a_table_of_class_probabilities(tmp_path: Path) -> None:
    run = _fit(tmp_path, "a", *PIECES, "--data.classes", "[7, 8, 9]")
    checkpoint = next((run / "checkpoints").glob("*.ckpt"))
    main(["predict", "--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)])
    rows = list(csv.DictReader((run / "predictions.csv").read_text().splitlines()))
    assert [*rows[0]] == ["index", "prediction", "7", "8", "9"]
    for row in rows:
        assert sum(float(row[name]) for name in "789") == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == max("789", key=lambda name: float(row[name]))


def test_images_of_a_folder_are_classified_by_file(tmp_path: Path) -> None:
    run = _fit(tmp_path, "a", *PIECES, "--data.classes", "[7, 8, 9]")
    checkpoint = next((run / "checkpoints").glob("*.ckpt"))
    trained = ["--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)]
    main(["predict", *trained])
    expected = list(csv.reader((run / "predictions.csv").read_text().splitlines()))
    data = Digits([7, 8, 9])
    data.setup("test")
    (tmp_path / "photos" / "deeper").mkdir(parents=True)
    for index, place in ((0, "a.png"), (1, "b.png"), (2, "deeper/c.PNG")):
        image = data.test_dataloader().dataset[index][0][0].numpy()
        Image.fromarray(image).convert("RGBA").save(tmp_path / "photos" / place, format="png")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    main(["predict", *trained, "--images", str(tmp_path / "photos")])
    got = list(csv.reader((run / "predictions.csv").read_text().splitlines()))
    assert got[0] == ["file", *expected[0][1:]]
    assert [Path(row[0]).name for row in got[1:]] == ["a.png", "b.png", "c.PNG"]
    for row, known in zip(got[1:], expected[1:4], strict=True):
        assert row[1] == known[1]
        assert [float(p) for p in row[2:]] == pytest.approx([float(p) for p in known[2:]], abs=1e-5)


def test_images_that_are_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["predict", *QUIET, *PIECES, "--images"]
    assert "no folder 'nowhere'; expected one with images" in _refusal(capsys, *command, "nowhere")
    assert "no images in " in _refusal(capsys, *command, str(tmp_path))
    error = _refusal(capsys, "fit", *QUIET, *PIECES, "--images", str(tmp_path))
    assert error == "error: images is an option of predict, not of fit"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "Superviced", "--data", "Digits"], "model: no class 'Superviced'; expected one of FineTuner, SimCLR, SupCon, Supervised; nearest: Supervised"),
        (["--model", "Supervised", "--data", "Digit"], "data: no class 'Digit'; expected one of Aircraft, "),
        ([*PIECES, "--model.backbon", "x"], "no option 'backbon'; expected one of"),
        (["--config", "misspelt.yaml"], "nearest: backbone"),
        ([*PIECES, "--trainer.max_epoch", "3"], "no option 'trainer.max_epoch'; expected one of trainer"),
        ([*PIECES, "--trainr.max_epochs", "3"], "nearest: trainer.max_epochs"),
        ([*PIECES, "--model.optimizer", "SDG"], "optimizer: no class 'SDG'; expected one of"),
        ([*PIECES, "--trainer.callbacks+=NeuralColapse"], "callbacks: no class 'NeuralColapse'; expected one of NeuralCollapseTracker, OnlineProbe"),
        ([*PIECES, "--trainer.max_epochs", "many"], "trainer.max_epochs"),
        (["--config", "nowhere.yaml"], "no file"),
        ([*PIECES, "--model.num_classes", "3"], "the model is given num_classes=3, but the data has 10; leave it out"),
        ([*PIECES, "--data.batchsize", "8"], "no option 'batchsize'"),
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


SMALL_FIT = [
    *QUIET,
    "--trainer.max_epochs",
    "1",
    "--trainer.logger",
    "false",
    "--trainer.enable_checkpointing",
    "false",
]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "SimCLR", *PIECES[2:]], "SimCLR trains on views (N, V, C, H, W), got images (40, 1, 8, 8); give the"),
        ([*PIECES, "--data.shots", "400"], "expected shots of at most"),
        ([*PIECES, "--ckpt_path", "none.ckpt"], "none.ckpt"),
        ([*PIECES, "--model.label_smoothing", "2"], "expected label_smoothing from 0 to below 1, got 2.0"),
        (["--model", "FineTuner", *PIECES[2:], "--model.cache", "memory", "--data.augmentation", "standard"], "augmentation"),
    ],
)  # fmt: skip
def test_what_is_wrong_on_the_way_is_said_in_a_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *SMALL_FIT, *words])
    said = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert message in said
    assert "Namespace" not in said
    assert "\n" not in said


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCFINETUNE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="SimCLR trains on views"):
        main(["fit", *SMALL_FIT, "--model", "SimCLR", *PIECES[2:]])


@pytest.mark.parametrize("model", ["Supervised", "SupCon", "SimCLR", "FineTuner"])
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_every_learner_resumes_as_its_configuration_says(model: str, tmp_path: Path) -> None:
    words = ["--model", model, "--model.backbone", TINY[:-1] + ", channels_last: true}", *PIECES[4:]]
    words += ["--data.views", "2"] if model in ("SupCon", "SimCLR") else []
    run = _fit(tmp_path, "a", *words)
    checkpoint = next((run / "checkpoints").glob("*.ckpt"))
    before = yaml.safe_load((run / "config.yaml").read_text())["model"]
    main(["fit", "--config", str(run / "config.yaml"), "--trainer.max_epochs", "2", "--ckpt_path", str(checkpoint)])
    assert any("epoch=1" in path.name for path in (run / "checkpoints").glob("*.ckpt"))
    assert yaml.safe_load((run / "config.yaml").read_text())["model"] == before


def test_missing_file_names_its_neighbours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pretrain.yaml").write_text("{}")
    error = _refusal(capsys, "fit", "--config", str(tmp_path / "pretrian.yaml"))
    assert error.endswith("pretrian.yaml'; expected one of pretrain.yaml; nearest: pretrain.yaml")


def test_folder_that_cannot_be_written_is_said_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    error = _refusal(capsys, "fit", *QUIET, *PIECES, "--trainer.logger.init_args.save_dir", str(tmp_path / "file"))
    assert "cannot write to the run folder" in error
    assert "choose another with --trainer.logger.init_args.save_dir" in error


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert "no command 'train'; expected one of fit, validate, test, predict, export, report" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--version", "--help"])
def test_front_door_as_a_module(word: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ncfinetune", word], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert done.stdout.startswith("ncfinetune 0.1" if word == "--version" else "usage: ncfinetune")


def test_report_of_four_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = ["--trainer.callbacks+=NeuralCollapseTracker", "--test_after_fit", "true"]
    for seed in ("0", "1"):
        words = ["--model", "FineTuner", *PIECES[2:], *tracker, "--seed_everything", seed, "--data.seed", seed]
        _fit(tmp_path / "runs", f"scl-{seed}", *words, "--model.train", "layer3.0", "--model.skip_from", "layer3.0")
        _fit(tmp_path / "runs", f"full-{seed}", *words, "--model.train", "all")
    _fit(tmp_path / "runs", "source", *PIECES)
    capsys.readouterr()
    assert report([str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert [(row[1], row[2]) for row in rows[2:]] == [("SCL FT layer3.0", "2"), ("full FT", "2"), ("Supervised", "1")]
    assert rows[2][3].startswith("1,214 (")
    assert all("±" in cell for cell in rows[2][4:])
    assert rows[4][4:] == ["-", "-", "-"]
    assert (tmp_path / "runs" / "report.md").read_text().strip() in printed
    assert (tmp_path / "runs" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert printed.rstrip().splitlines()[-1].endswith(f"tensorboard --logdir {tmp_path / 'runs'}")


@pytest.mark.parametrize(
    ("name", "knobs", "expected"),
    [
        ("Supervised", {"loss": "ce", "projection": "none"}, "Supervised"),
        (
            "Supervised",
            {"loss": "mse", "projection": "mlp", "adversary": {"radius": 1}},
            "Supervised, mse, mlp head, PGD",
        ),
        ("SupCon", {"projection": "linear"}, "SupCon, linear head"),
        ("FineTuner", {"train": ["a", "b"]}, "layer FT a, b"),
        ("FineTuner", {"train": "none", "skip_from": "a"}, "linear probe, skip from a"),
        ("FineTuner", {"train": "a", "skip_from": "a", "skip_gradient": "skip"}, "SCL FT a, gradient through the skip"),
    ],
)
def test_report_names_the_method(name: str, knobs: dict, expected: str) -> None:
    assert method_name({"class_path": f"ncfinetune.{name}", "init_args": knobs}) == expected


def test_report_names_the_task_by_what_selects_images() -> None:
    knobs = {"root": "data/cifar10", "fraction": 0.1, "shots": None, "views": 2, "augmentation": "simclr", "mixup": 0.0}
    assert (
        task_name({"class_path": "x.ImageFolder", "init_args": knobs}) == "ImageFolder, root data/cifar10, fraction 0.1"
    )


def test_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report([str(tmp_path)]) == 2
    assert "no runs below" in capsys.readouterr().err
    assert report([str(tmp_path / "nowhere")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_predict_refuses_what_is_no_table_of_probabilities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boring = "lightning.pytorch.demos.boring_classes.Boring"
    words = ["--model", boring + "Model", "--data", boring + "DataModule", "--trainer.limit_predict_batches", "0"]
    error = _refusal(capsys, "predict", *QUIET, *words)
    assert error.endswith("the class probabilities (N, K) that predict_step returns; BoringModel's doesn't")

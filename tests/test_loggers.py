"""What loggers other than CSV files receive: pictures, TensorBoard's pages, and the table that Lightning prints."""

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib.text
import pytest
import stranger
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from tiny import SMALL, plain_sgd
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ncfinetune import Supervised
from ncfinetune.callbacks import NeuralCollapseTracker
from ncfinetune.callbacks.figures import of_pass, over_epochs
from ncfinetune.callbacks.pages import metric_columns
from ncfinetune.collapse import class_moments
from ncfinetune.datamodules import Digits
from ncfinetune.settings import headline

PICTURES = ("depth", "cosines_penultimate", "spread_penultimate", "projection_penultimate")


class Net(stranger.Stranger):
    """Logs its loss, and can be tested."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", super().training_step(batch, batch_idx))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", super().training_step(batch, batch_idx))


def _loader() -> DataLoader:
    labels = torch.arange(30) % 3
    return DataLoader(TensorDataset(torch.randn(30, 1, 6, 6) + labels.view(-1, 1, 1, 1), labels), batch_size=16)


def _fit(folder: Path, logger: Any, tracker: NeuralCollapseTracker | None = None, **arguments: Any) -> Trainer:
    tracker = tracker or NeuralCollapseTracker(3, layers=["features.0", "auto"])
    options = {"max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(
        default_root_dir=folder,
        logger=logger,
        callbacks=[tracker],
        enable_checkpointing=False,
        **{**options, **arguments},
    )
    trainer.fit(Net(), _loader(), _loader())
    return trainer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*")  # of its own dependencies
def test_pictures_reach_weights_and_biases(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pictures in Weights & Biases need wandb: pip install 'ncfinetune[wandb]'")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    _fit(tmp_path, logger)
    logger.experiment.finish()
    files = [path.name for path in tmp_path.rglob("media/images/neural_collapse/*.png")]
    assert len(files) == 2 * len(PICTURES)
    for name in PICTURES:
        assert sum(re.match(rf"{name}_\d+_\w+\.png", file) is not None for file in files) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*")
def test_pictures_reach_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="pictures in MLflow need mlflow: pip install 'ncfinetune[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    _fit(tmp_path, logger)
    files = {str(path.relative_to(path.parents[2])) for path in tmp_path.rglob("*.png")}
    assert files == {f"neural_collapse/{name}/step_{step:07d}.png" for name in PICTURES for step in (0, 2)}


class _Plain(Logger):
    """A logger of numbers alone, as any user may write one."""

    name, version = "plain", 0

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.numbers |= metrics

    def log_hyperparams(self, *args: Any) -> None:
        pass


def test_other_loggers_get_the_numbers_alone(tmp_path: Path) -> None:
    plain = _Plain()
    _fit(tmp_path, [plain, CSVLogger(tmp_path)])
    assert {"nc1/train/features.0", "nc1/val/penultimate"} <= set(plain.numbers)


def test_tests_log_all_numbers_and_print_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, tracker = _Plain(), NeuralCollapseTracker(3, layers=["features.0", "auto"])
    trainer = _fit(tmp_path, plain, tracker)
    for run, split in ((trainer.test, "test"), (trainer.validate, "val")):
        plain.numbers, tracker.values = {}, {}
        capsys.readouterr()
        (returned,) = run(trainer.lightning_module, _loader())
        printed = re.findall(r"\S+/\S+", capsys.readouterr().out)
        assert set(printed) == set(returned) == {f"{split}/loss", f"nc1/{split}/penultimate"}
        assert len(tracker.values) > 10
        for name, value in tracker.values.items():
            assert plain.numbers[name] == pytest.approx(value, nan_ok=True)
            assert trainer.callback_metrics[name].item() == pytest.approx(value, nan_ok=True)


def _summaries(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def test_tensorboard_puts_the_layers_of_a_metric_in_one_chart(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    _fit(tmp_path, logger)
    events = _summaries(tmp_path / "run")
    tags = events.Tags()["scalars"]
    content = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(content)
    charts = {
        chart.title: [tag for tag in tags if re.match(chart.multiline.tag[0], tag)]  # as TensorBoard matches them
        for category in layout.category
        for chart in category.chart
    }
    assert next(iter(charts)) == "accuracy"
    assert sorted(charts["loss"]) == ["train/loss", "val/loss"]
    assert charts["nc1, training images"] == ["nc1/train/features.0", "nc1/train/penultimate"]
    assert charts["nc1_ratio, validation images"] == ["nc1_ratio/val/features.0", "nc1_ratio/val/penultimate"]


def _hparams(folder: Path) -> tuple[list[str], list[str], dict[str, Any]]:
    """Columns of hyper-parameters and of metrics, and the run's values."""
    events = _summaries(folder)
    said = [events.SummaryMetadata(f"_hparams_/{part}").plugin_data.content for part in _PARTS]
    columns, run = (
        metadata.parse_experiment_plugin_data(said[0]),
        metadata.parse_session_start_info_plugin_data(said[1]),
    )
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in run.hparams.items()}
    return [info.name for info in columns.hparam_infos], [info.name.tag for info in columns.metric_infos], values


_PARTS = ("experiment", "session_start_info")


@pytest.mark.slow
def test_hparams_are_there_if_a_run_is_killed_after_its_last_epoch(tmp_path: Path) -> None:
    class Killed(NeuralCollapseTracker):
        def on_fit_end(self, *_: Any) -> None:
            pass

    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    logger.log_hyperparams({"run": {"method": "SCL FT layer3.0", "lr": 0.1, "epochs": None}})
    _fit(tmp_path, logger, Killed(3), max_epochs=2)
    columns, metrics, values = _hparams(tmp_path / "run")
    assert columns == ["method", "lr", "epochs"]
    assert values == {"method": "SCL FT layer3.0", "lr": 0.1}
    assert metrics[:2] == ["nc1/train/penultimate", "nc1/val/penultimate"]
    assert {"test/loss", "val/loss"} <= set(metrics)


def test_hparams_have_the_accuracy_of_the_command_test() -> None:
    """TensorBoard reads it from the folder below the run's; the run's own is that of a test after the fit."""
    columns = metric_columns(["nc1/train/penultimate"], ["val/acc", "val/loss", "train/loss"])
    assert columns == [
        ("test/acc", "test"),
        ("val/acc", ""),
        ("nc1/train/penultimate", ""),
        ("test/loss", "test"),
        ("val/loss", ""),
        ("train/loss", ""),
        ("test/acc", ""),
        ("test/loss", ""),
    ]


def test_headline_of_a_run() -> None:
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-4}}
    knobs = {"train": "layer3.0", "skip_from": "layer3.0", "backbone": {"name": "resnet18"}, "optimizer": optimizer}
    folder = {"class_path": "ncfinetune.datamodules.ImageFolder", "init_args": {"root": "/data/photos", "shots": 5}}
    config = {"model": {"class_path": "x.FineTuner", "init_args": knobs}, "data": folder, "trainer": {"max_epochs": 3}}
    assert headline(config) == {
        "method": "SCL FT layer3.0",
        "network": "resnet18",
        "lr": 3e-4,
        "data": "photos, shots 5",
        "epochs": 3,
    }


def test_equal_features_have_a_picture_of_their_spread() -> None:
    features, labels = torch.ones(4, 2), torch.tensor([0, 0, 1, 1])
    figure = of_pass({0: {"b": 2.0}}, {"b": class_moments(features, labels, 2)}, (features, labels), None)["spread_b"]
    assert figure.axes[0].get_xlim() == (0, 1)


def test_pictures_name_the_classes() -> None:
    labels = torch.arange(30) % 3
    features = torch.randn(30, 4) + 3 * nn.functional.one_hot(labels, 4)
    moments = class_moments(features, labels, 3)
    names = ["apple", "a name that is longer than others", "cherry"]
    drawn = of_pass({0: {"a": 1.0, "b": 2.0}}, {"b": moments}, (features, labels), names)
    for kind in ("cosines_b", "spread_b", "projection_b"):
        texts = {text.get_text() for text in drawn[kind].findobj(matplotlib.text.Text)}
        assert {"apple", "a name that i…", "cherry"} <= texts, kind


@pytest.mark.parametrize("kind", ["spread_b", "projection_b"])
def test_names_of_classes_that_lie_together_do_not_cover_each_other(kind: str) -> None:
    torch.manual_seed(0)
    labels = torch.arange(200) % 10
    features = 3 * torch.randn(200, 16)
    names = [f"class {label}" for label in range(10)]
    figure = of_pass({0: {"b": 2.0}}, {"b": class_moments(features, labels, 10)}, (features, labels), names)[kind]
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text().startswith("class ")]
    assert len(texts) == 10
    boxes = [matplotlib.text.Text.get_window_extent(text) for text in texts]
    assert not [a for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


def test_class_names_are_those_of_the_datamodule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("ncfinetune.callbacks.figures.of_pass", lambda *args: seen.append(args[-1]) or {})
    trainer = Trainer(
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
        callbacks=[NeuralCollapseTracker()],
        **{"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"},
        **{"enable_checkpointing": False, "limit_train_batches": 1},
    )
    trainer.fit(Supervised(3, SMALL, optimizer=plain_sgd), Digits([4, 5, 6], shots=4, batch_size=12))
    assert seen[-1] == ["4", "5", "6"]


def test_all_numbers_as_a_table(tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason="to_frame() needs pandas: pip install pandas")
    tracker = NeuralCollapseTracker(3, layers=["features.0", "auto"])
    _fit(tmp_path, False, tracker, max_epochs=2)
    frame = tracker.to_frame()
    assert list(frame.columns) == ["epoch", "split", "layer", "metric", "value"]
    assert len(frame) == len(frame.drop_duplicates(["epoch", "split", "layer", "metric"]))
    last = frame[(frame.epoch == 2) & (frame.split == "val")].set_index(["metric", "layer"]).value
    expected = {name: value for name, value in tracker.values.items() if "/val/" in name}
    assert {f"{metric}/val/{layer}": value for (metric, layer), value in last.items()} == expected
    assert sorted(frame[frame.split == "train"].epoch.unique()) == [0, 1, 2]


def test_a_table_without_pandas_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        NeuralCollapseTracker(3).to_frame()


@pytest.mark.parametrize("metrics", ["a", "abc", "abcd", "abcdefg"])
def test_no_panel_is_empty(metrics: str) -> None:
    figure = over_epochs({metric: {"layer": {1: 1.0, 2: 0.5}} for metric in metrics}, "train")
    assert [axes.get_title() for axes in figure.axes] == list(metrics)


def test_a_tracker_shows_itself(tmp_path: Path) -> None:
    tracker = NeuralCollapseTracker(3, layers=["features.0", "auto"], metrics=["nc1", "cdnv"])
    assert repr(tracker) == "NeuralCollapseTracker(layers=['features.0', 'penultimate'], metrics=['nc1', 'cdnv'])"
    assert tracker._repr_png_() is None
    with pytest.raises(ValueError, match="nothing was measured yet; fit, validate or test with the tracker"):
        tracker.plot()
    _fit(tmp_path, False, tracker, max_epochs=2)
    assert f"nc1/val/penultimate {tracker.values['nc1/val/penultimate']:.3g} (epoch 2)" in repr(tracker)
    assert tracker._repr_png_().startswith(b"\x89PNG")
    panels = tracker.plot("val").axes
    assert [axes.get_title() for axes in panels] == ["nc1", "cdnv"]
    for axes, metric in zip(panels, ("nc1", "cdnv"), strict=True):
        values = [tracker.records["val"][epoch][metric]["features.0"] for epoch in (1, 2)]
        assert list(axes.lines[0].get_ydata()) == values
    assert len(tracker.plot(metrics="cdnv").axes) == 1
    with pytest.raises(ValueError, match="expected a split among train, val, got 'test'"):
        tracker.plot("test")
    with pytest.raises(ValueError, match="expected metrics among nc1, cdnv, got 'nc3'"):
        tracker.plot(metrics=["nc3"])

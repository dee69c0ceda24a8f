"""Lightning's finders and averages from the command line: what a run writes, resumes and warns of."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, callbacks
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint, StochasticWeightAveraging
from tiny import SMALL, trainer_in

from ncfinetune import FineTuner, Supervised
from ncfinetune.callbacks import NeuralCollapseTracker
from ncfinetune.cli import main
from ncfinetune.datamodules import Digits
from ncfinetune.found import record
from ncfinetune.restoring import restore

BACKBONE = "{name: resnet18, stem: cifar, in_chans: 1, channels: [4, 6, 8, 10]}"
FINDERS = [
    *("--trainer.callbacks+=BatchSizeFinder", "--trainer.callbacks.max_trials=2", "--trainer.callbacks.init_val=4"),
    *("--trainer.callbacks.steps_per_trial=1", "--trainer.callbacks+=LearningRateFinder"),
    *("--trainer.callbacks.num_training_steps=15", "--trainer.callbacks.early_stop_threshold=null"),
]


def _fit(folder: Path, *words: str) -> tuple[int | None, Path]:
    model = ["--model", "FineTuner", "--model.backbone", BACKBONE, "--model.train", "layer4.1"]
    given = [*model, "--model.allow_random=true", "--data", "Digits", "--data.classes=[0,1,2]", "--data.shots=16"]
    place = [f"--trainer.logger.init_args.save_dir={folder}", "--trainer.logger.init_args.version=run"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    start = words if "--config" in words else (*given, *words)  # a file overrides the words before it
    return main(["fit", *start, *quiet, *place]), folder / "run"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # the resumed run's
def test_what_finders_found_is_in_the_configuration_which_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, run = _fit(tmp_path, *FINDERS, "--data.batch_size=4", "--trainer.max_epochs=3")
    assert status is None
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["init_args"]["batch_size"] == 8
    assert not [c for c in config["trainer"]["callbacks"] or () if "Finder" in c["class_path"]]
    (checkpoint,) = (run / "checkpoints").glob("epoch*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    assert content["global_step"] == 3 * 48 // 8
    rates = {group["lr"] for group in content["optimizer_states"][0]["param_groups"]}
    assert rates == {config["model"]["init_args"]["optimizer"]["init_args"]["lr"]}
    capsys.readouterr()
    status, _ = _fit(tmp_path, *FINDERS, "--trainer.max_epochs=4", "--ckpt_path", str(checkpoint))
    assert status == 2
    assert "error: BatchSizeFinder would begin the resumed run at step 0; leave it out" in capsys.readouterr().err
    again = ["--config", str(run / "config.yaml"), "--trainer.max_epochs=4", "--ckpt_path", str(checkpoint)]
    assert _fit(tmp_path, *again)[0] is None
    (checkpoint,) = (run / "checkpoints").glob("epoch=3*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 4 * 48 // 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [("EMAWeightAveraging", []), ("StochasticWeightAveraging", ["--trainer.callbacks.swa_lrs=0.01"])],
)
def test_averages_run_and_leave_a_configuration_that_runs(name: str, options: list[str], tmp_path: Path) -> None:
    status, run = _fit(tmp_path, f"--trainer.callbacks+={name}", *options, "--trainer.max_epochs=2")
    assert status is None
    again = "--config", str(run / "config.yaml"), "--trainer.max_epochs=1"
    assert _fit(tmp_path / "again", *again)[0] is None


def _config(finders: list[str], **arguments: Any) -> Namespace:
    callbacks = [Namespace(class_path=f"lightning.pytorch.callbacks.{name}") for name in ("Timer", *finders)]
    model = Namespace(class_path="ncfinetune.FineTuner", init_args=Namespace(optimizer=None, **arguments))
    data = Namespace(class_path="ncfinetune.datamodules.Digits", init_args=Namespace(batch_size=64))
    return Namespace(model=model, data=data, trainer=Namespace(callbacks=callbacks))


def test_what_was_found_takes_the_place_of_its_finder() -> None:
    class Found:
        lr = 0.03
        datamodule = Namespace(batch_size=8)

    config = _config(["LearningRateFinder"], lr_batch=256)
    record(config, Found(), Found())  # type: ignore[arg-type]
    assert config.model.init_args.lr_batch is None
    assert config.model.init_args.optimizer.as_dict() == {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.03}}
    assert config.data.init_args.batch_size == 64
    assert [callback.class_path for callback in config.trainer.callbacks] == ["lightning.pytorch.callbacks.Timer"]
    config = _config(["LearningRateFinder"], lr_batch=256)
    record(config, Found(), Namespace(lr=None))  # a search that found nothing: the run has the configured rate
    assert config.model.init_args.lr_batch == 256
    assert config.model.init_args.optimizer is None
    assert [callback.class_path for callback in config.trainer.callbacks] == ["lightning.pytorch.callbacks.Timer"]
    config = _config(["BatchSizeFinder"])
    record(config, Found(), Found())  # type: ignore[arg-type]
    assert config.model.init_args.optimizer is None
    assert config.data.init_args.batch_size == 8
    config.model.class_path = "theirs.Model"
    config.trainer.callbacks = _config(["LearningRateFinder"]).trainer.callbacks
    record(config, Found(), Found())  # type: ignore[arg-type]
    assert len(config.trainer.callbacks) == 2


def _tuner(**knobs: Any) -> FineTuner:
    optimizer = partial(torch.optim.SGD, lr=0.01)
    return FineTuner(3, SMALL, train="layer4.1", allow_random=True, optimizer=optimizer, **knobs)


def _data() -> Digits:
    return Digits([0, 1, 2], shots=8, batch_size=8)


@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
def test_a_resumed_run_is_not_begun_anew_by_a_finder(finder: type[Callback], tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer.fit(_tuner(), _data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=rf"{finder.__name__} would begin the resumed run at step 0; leave it out"):
        trainer_in(tmp_path, callbacks=[finder()], max_epochs=2).fit(_tuner(), _data(), ckpt_path=tmp_path / "a.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs", [{}, {"cache": "memory", "head_init": "ridge"}, {"skip_from": "auto", "skip_join": "concat"}]
)
def test_a_run_after_a_search_is_that_of_the_found_rate(knobs: dict[str, Any], tmp_path: Path) -> None:
    """Weights, random numbers, tracked numbers: the search leaves nothing but the rate."""
    ends = []
    rate = None
    for searches in (True, False):
        torch.manual_seed(0)
        model, tracker = _tuner(**knobs), NeuralCollapseTracker(layers=["layer4.1", "auto"])
        model.lr = rate
        finder = LearningRateFinder(num_training_steps=15, early_stop_threshold=None)
        trainer = trainer_in(tmp_path, callbacks=[finder, tracker] if searches else [tracker], max_epochs=5)
        trainer.fit(model, _data())
        rate = model.lr
        ends.append((model.state_dict(), tracker.values))
    assert rate not in (None, 0.01)
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-12, nan_ok=True)


def test_one_rate_of_an_average_for_layers_that_have_their_own(tmp_path: Path) -> None:
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    with pytest.warns(UserWarning, match=r"sets swa_lrs=0.01 for all 2 parameter groups.*swa_lrs=\[0.01, 0.1\]"):
        trainer_in(tmp_path, callbacks=[average], max_epochs=2).fit(_tuner(head_lr_factor=10), _data())
    average = StochasticWeightAveraging(swa_lrs=[0.01, 0.1], swa_epoch_start=1)
    trainer_in(tmp_path, callbacks=[average], max_epochs=2).fit(_tuner(head_lr_factor=10), _data())


class _Heads(Callback):
    """The head's weights at the start of each epoch."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(pl_module.head.weight.detach().clone())


@pytest.mark.parametrize(
    ("saving", "files"),
    [
        ({}, {"epoch=3.ckpt"}),
        ({"save_last": True}, {"epoch=3.ckpt", "last.ckpt"}),
        ({"save_last": True, "monitor": "val/loss"}, {"last.ckpt"}),
        ({"every_n_epochs": 3}, {"last.ckpt"}),
    ],
)
def test_an_average_set_after_the_last_checkpoint_is_saved(saving: dict, files: set[str], tmp_path: Path) -> None:
    vit = {"name": "test_vit", "img_size": 16, "in_chans": 1}  # without batch norm
    model = Supervised(3, vit, optimizer=partial(torch.optim.SGD, lr=0.1))
    heads, swa = _Heads(), StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=2)
    kept = ModelCheckpoint(tmp_path / "kept", "{epoch}", **saving)
    trainer = trainer_in(tmp_path, callbacks=[heads, swa, kept], enable_checkpointing=True, max_epochs=4)
    trainer.fit(model, Digits([0, 1, 2], shots=8, batch_size=8, image_size=16))
    average = torch.stack(heads.seen[1:]).mean(0)
    torch.testing.assert_close(model.head.weight.detach(), average)
    saved = {path.name: restore(path) for path in (tmp_path / "kept").iterdir()}
    averages = {name for name, of in saved.items() if torch.equal(of.learner.head.weight, model.head.weight)}
    assert averages == {name for name, of in saved.items() if not of.measured} == files


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("network", [{"name": "test_vit", "img_size": 16, "in_chans": 1}, SMALL])
def test_a_fit_that_ends_before_its_average_begins_keeps_the_trained_weights(
    network: dict[str, Any], resumed: bool, tmp_path: Path
) -> None:
    """The second network has batch norm, for whose statistics there is an epoch more."""

    def fit(epochs: int, *average: StochasticWeightAveraging, ckpt: str | None = None) -> tuple[Supervised, str]:
        torch.manual_seed(0)
        model = Supervised(3, network, optimizer=partial(torch.optim.SGD, lr=0.1))
        kept = ModelCheckpoint(tmp_path / f"{epochs} {len(average)}", save_last=True)
        trainer = trainer_in(tmp_path, callbacks=[*average, kept], enable_checkpointing=True, max_epochs=epochs)
        data = Digits([0, 1, 2], shots=8, batch_size=8, image_size=16)
        trainer.fit(model, data, ckpt_path=ckpt, weights_only=True)
        return model, kept.last_model_path

    def swa() -> StochasticWeightAveraging:
        return StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=5)

    whole, _ = fit(2)
    first = fit(1)[1] if resumed else None
    model, file = fit(2, swa(), ckpt=first)
    for name, weight in whole.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=0, atol=0)
        torch.testing.assert_close(restore(file).learner.get_parameter(name), weight, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("step", [8, 9])
def test_a_run_that_is_resumed_in_its_last_epoch_saves_its_average(step: int, tmp_path: Path) -> None:
    def fit(folder: str, resumed: Path | None = None) -> Supervised:
        torch.manual_seed(0)
        vit = {"name": "test_vit", "img_size": 16, "in_chans": 1}
        model, swa = Supervised(3, vit), StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=2)
        kept = ModelCheckpoint(tmp_path / folder, "{step}", "step", save_top_k=-1, every_n_train_steps=1)
        trainer = trainer_in(tmp_path, callbacks=[swa, kept], enable_checkpointing=True, max_epochs=3)
        data = Digits([0, 1, 2], shots=8, batch_size=8, image_size=16)
        trainer.fit(model, data, ckpt_path=resumed, weights_only=True)
        return model

    whole = fit("whole")
    resumed = fit("rest", tmp_path / "whole" / f"step={step}.ckpt")
    saved = restore(tmp_path / "rest" / "last.ckpt").learner.state_dict()
    torch.testing.assert_close(saved, resumed.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(saved, whole.state_dict())
    fit("none", tmp_path / "rest" / "last.ckpt")
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="Lightning has it from 2.6 on")
@pytest.mark.parametrize("saving", [{}, {"every_n_train_steps": 1, "save_top_k": -1}])
@pytest.mark.parametrize("learner", ["tuner", "supervised"])
def test_weights_alone_are_those_of_the_average_that_was_validated(learner: str, saving: dict, tmp_path: Path) -> None:
    def run(weights_alone: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        torch.manual_seed(0)
        model = _tuner() if learner == "tuner" else Supervised(3, SMALL, optimizer=partial(torch.optim.SGD, lr=0.1))
        folder = tmp_path / str(weights_alone)
        kept = ModelCheckpoint(folder, "{step}", save_weights_only=weights_alone, **saving)
        average = callbacks.EMAWeightAveraging(decay=0.8)
        trainer_in(tmp_path, callbacks=[average, kept], enable_checkpointing=True, max_epochs=2).fit(model, _data())
        saved = {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.ckpt")}
        assert all(("current_model_state" in content) != weights_alone for content in saved.values())
        return {name: content["state_dict"] for name, content in saved.items()}, model.state_dict()

    (whole, end), (alone, _) = run(False), run(True)
    assert whole.keys() == alone.keys()
    for name, state in whole.items():
        assert all(torch.equal(tensor, alone[name][key]) for key, tensor in state.items())
    assert all(torch.equal(tensor, alone["step=6.ckpt"][key]) for key, tensor in end.items())


@pytest.mark.parametrize("mode", ["exponential", "linear"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_search_tries_the_rates_that_the_run_would_have(mode: str, accumulated: int, tmp_path: Path) -> None:
    steps: list[list[float]] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            steps.append([group["lr"] for group in self.param_groups])
            return loss

    model = Supervised(3, SMALL, optimizer=partial(Watched, lr=0.01), layer_decay=0.5, lr_batch=4)
    finder = LearningRateFinder(1e-4, 1e-2, num_training_steps=15, mode=mode, early_stop_threshold=None)
    trainer = trainer_in(tmp_path, callbacks=[finder], max_epochs=5, accumulate_grad_batches=accumulated)
    trainer.fit(model, Digits([0, 1, 2], shots=8, batch_size=8 // accumulated))
    groups = trainer.optimizers[0].param_groups
    factors = torch.tensor([group.get("lr_factor", 1.0) for group in groups])
    assert len(factors.unique()) > 4
    tried, run = torch.tensor(steps[:15]), torch.tensor(steps[-1])
    torch.testing.assert_close(tried / factors, torch.tensor(finder.optimal_lr.results["lr"])[:, None].expand_as(tried))
    torch.testing.assert_close(run, model.lr * factors)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_epoch_that_measures_an_averages_statistics_trains_nothing(accumulated: int, tmp_path: Path) -> None:
    average = StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)
    model = _tuner()
    trainer = trainer_in(tmp_path, max_epochs=3, callbacks=[average], accumulate_grad_batches=accumulated)
    trainer.fit(model, _data())
    averaged = dict(average._average_model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, averaged[name]), name
    statistics = model.backbone.net.layer4[1].bn1
    assert statistics.num_batches_tracked == 3  # of the batches of one epoch
    assert "optimizer_step" not in vars(model)

"""The command ``suggest``: folds, paired gains, halving, the choice, and the whole on digits."""

import json
import math
import re
import shlex
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from held_out import held_out_temperature
from lightning.pytorch import LightningDataModule, seed_everything
from tiny import SMALL as WITH_EQUAL_BLOCKS
from tiny import trainer_in
from torch.utils.data import DataLoader, TensorDataset

from ncfinetune import Backbone
from ncfinetune.bank import read_images
from ncfinetune.calibration import fit_temperature
from ncfinetune.cli import main
from ncfinetune.datamodules import Digits
from ncfinetune.folds import balanced_folds, folds_of
from ncfinetune.probes import ridge
from ncfinetune.suggest import Row, choose, closed_rows, halve, verdict
from ncfinetune.trials import Bench, Method, Trial, closed_trial, skip_ridge

SMALL = {**WITH_EQUAL_BLOCKS, "zero_init_last": False}
SPEC = "{name: resnet18, stem: cifar, in_chans: 1, channels: [4, 6, 8, 10], zero_init_last: false}"
WORDS = ["suggest", "--backbone", SPEC, "--accelerator", "cpu", "--data", "Digits", "--data.shots", "6"]


@pytest.fixture
def weights(tmp_path):
    """Weights of the small network."""
    seed_everything(1, verbose=False)
    Backbone(**SMALL).save(tmp_path / "small.safetensors")
    return str(tmp_path / "small.safetensors")


def row(method, gain=None, error=0.1, trained=100, accuracy=0.5):
    return Row(method, accuracy, 0.05, gain, None if gain is None else error, trained, 1.0, {"train": method})


def expected(method, gain, **facts):
    """A row of the expansion."""
    return replace(row(method, gain, **facts), seconds=None)


ROWS = [row("ridge"), row("layer FT", 0.05)]


def trial_of(loss, right=None):
    return Trial(torch.tensor(loss if right is None else right), torch.tensor(loss))


def test_images_are_those_that_the_network_was_trained_on(tmp_path):
    backbone = Backbone(**SMALL)
    backbone.net.pretrained_cfg = {**backbone.net.pretrained_cfg, "mean": (0.2,) * 3, "std": (0.1,) * 3}
    images, labels = read_images(trainer_in(tmp_path), backbone, Digits(shots=2, normalize="backbone"), 100)
    given, same = read_images(trainer_in(tmp_path), Backbone(**SMALL), Digits(shots=2, mean=[0.2], std=[0.1]), 100)
    torch.testing.assert_close(images, given)
    assert torch.equal(labels, same)


def test_folds_spread_each_class():
    labels = torch.tensor([0] * 7 + [1] * 3 + [2] * 5)
    folds = folds_of(labels, 3)
    assert sorted(folds.bincount().tolist()) == [5, 5, 5]
    for label in range(3):
        counts = folds[labels == label].bincount(minlength=3)
        assert counts.max() - counts.min() <= 1
    assert not torch.equal(folds, folds_of(labels, 3, seed=1))


def test_one_image_of_each_class_has_no_folds():
    with pytest.raises(ValueError, match="expected two images of some class at least, got one of each"):
        folds_of(torch.arange(4), 2)


def test_balanced_folds_leave_out_one_of_each_class():
    labels = torch.arange(5).repeat(6)
    ways = balanced_folds(labels)
    assert ways.shape == (6, 30)
    assert not torch.equal(ways[0], ways[1])
    assert all(sorted(labels[way == fold].tolist()) == [0, 1, 2, 3, 4] for way in ways for fold in range(6))
    assert balanced_folds(torch.arange(3).repeat(100)).shape == (1, 300)
    assert int(balanced_folds(torch.arange(3).repeat(100)).max()) == 9


def test_balanced_folds_of_unequal_classes_have_equal_shares():
    labels = torch.tensor([0] * 9 + [1] * 3)
    for way in balanced_folds(labels):
        assert way[labels == 0].bincount().tolist() == [3, 3, 3]
        assert way[labels == 1].bincount().tolist() == [1, 1, 1]
    assert int(balanced_folds(torch.tensor([0] * 9 + [1])).max()) == 1


def test_single_images_left_out_are_pessimistic_and_balanced_folds_are_not():
    """Features that say nothing: chance is a half, and what leans on the shares of the others is wrong each time."""
    labels = torch.arange(2).repeat(10)
    features = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)) * 1e-6
    assert ridge(features, labels, 2, lams=[1e3]).loo_error == 1
    constant = torch.zeros(20, 3)
    balanced = ridge(constant, labels, 2).left_out(balanced_folds(labels))
    torch.testing.assert_close(balanced, torch.full_like(balanced, 0.5))


def test_gain_is_paired_over_what_both_have():
    nan = torch.nan
    mine, other = trial_of([0.1, 0.5, nan, 0.3]), trial_of([0.3, 0.4, 0.9, nan])
    gain, error = mine.gain(other, "loss")
    differences = [0.2, -0.1]
    assert gain == pytest.approx(sum(differences) / 2, abs=1e-7)
    assert error == pytest.approx(0.15 / math.sqrt(2), abs=1e-7)


def test_closed_form_is_fitted_without_the_fold():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    penultimate = torch.randn(30, 4, generator=generator) + labels[:, None]
    layers = {"a": torch.randn(30, 2, generator=generator), "b": torch.eye(3)[labels]}
    folds = folds_of(labels, 3)
    trial = closed_trial(partial(skip_ridge, penultimate, layers, labels, 3, 1), labels, folds)
    logits = torch.empty(30, 3, dtype=torch.float64)
    for fold in range(3):
        train, rows = folds != fold, folds == fold
        features = torch.cat([penultimate, layers["b"]], 1)
        head = ridge(features[train], labels[train], 3)
        weight, bias = head.logits(labels[train])
        logits[rows] = features[rows].double() @ weight.T + bias
    probabilities = (logits / fit_temperature(logits, labels)).softmax(1)
    torch.testing.assert_close(trial.loss, (probabilities - torch.eye(3)[labels]).square().sum(1).float())
    assert torch.equal(trial.right, (logits.argmax(1) == labels).float())


def test_how_sure_a_fit_is_does_not_count():
    labels = torch.arange(30) % 3
    logits = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + torch.eye(3)[labels]
    trials = [Trial.empty(30) for _ in range(2)]
    for fold in range(3):
        rows = torch.arange(10 * fold, 10 * fold + 10)
        for trial, scale in zip(trials, (1, 20), strict=True):
            trial.add(rows, scale * logits[rows], labels)
    torch.testing.assert_close(trials[1].loss, trials[0].loss)
    assert torch.equal(trials[1].right, trials[0].right)
    sure = (20 * logits).softmax(1) - torch.eye(3)[labels]
    assert trials[1].loss.mean() < 0.8 * sure.square().sum(1).mean()


def test_what_no_better_than_chance_is_judged_as_chance():
    labels = torch.arange(30) % 3
    trial = Trial.empty(30)
    trial.add(torch.arange(30), 1 - 5 * torch.eye(3)[labels], labels)
    torch.testing.assert_close(trial.loss, torch.full((30,), 2 / 3))
    assert not trial.right.any()


def test_closed_form_decides_where_the_temperature_of_its_scores_is_infinite():
    labels = torch.arange(12) % 3
    penultimate = torch.randn(12, 2, generator=torch.Generator().manual_seed(2))
    folds = folds_of(labels, 2)
    trial = closed_trial(partial(skip_ridge, penultimate, {}, labels, 3, 1), labels, folds)
    for fold in range(2):
        train, rows = folds != fold, folds == fold
        head = ridge(penultimate[train], labels[train], 3)
        assert held_out_temperature(head, labels[train]).isinf()
        decided = head.scores(penultimate[rows]).argmax(1)
        assert len(decided.unique()) > 1
        assert torch.equal(trial.right[rows], (decided == labels[rows]).float())
        torch.testing.assert_close(trial.loss[rows], torch.full((6,), 2 / 3), rtol=0, atol=0.05)


def test_lda_is_not_judged_of_features_that_do_not_vary_within_classes():
    labels = torch.arange(30) % 3
    collapsed = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))[labels]
    bench = SimpleNamespace(labels=labels, num_classes=3)
    rows = closed_rows(collapsed, {}, bench, partial(skip_ridge, collapsed, {}, labels, 3, 1))
    assert [found.method for found in rows] == ["nearest mean", "ridge"]


@pytest.mark.parametrize(("images", "judged"), [(2, False), (3, True)])
def test_lda_is_judged_where_a_fold_leaves_it_a_covariance(images, judged):
    labels = torch.arange(3 * images) % 3
    penultimate = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(3, 4)[labels]
    bench = SimpleNamespace(labels=labels, num_classes=3)
    rows = closed_rows(penultimate, {"a": penultimate}, bench, partial(skip_ridge, penultimate, {}, labels, 3, 1))
    assert [found.method for found in rows] == ["nearest mean", *(["LDA"] if judged else []), "ridge"]
    assert all(found.accuracy > 0.5 for found in rows)
    of_ten = closed_rows(
        penultimate,
        {},
        SimpleNamespace(labels=labels, num_classes=10),
        partial(skip_ridge, penultimate, {}, labels, 10, 1),
    )
    assert ("LDA" in [found.method for found in of_ten]) == judged  # classes without images do not matter


def bench_in(folder, folds=None):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    images = torch.rand(24, 1, 8, 8, generator=generator) + labels[:, None, None, None] / 2
    seed_everything(1, verbose=False)
    backbone = Backbone(**SMALL)

    def trainer(epochs):
        return trainer_in(folder, max_epochs=epochs, limit_val_batches=0, num_sanity_val_steps=0)

    return Bench(backbone, images, labels, 3, folds_of(labels, 3) if folds is None else folds, 8, 1e-2, 2, trainer)


def test_a_fit_is_repeatable_and_leaves_the_backbone(tmp_path):
    bench = bench_in(tmp_path)
    before = {name: tensor.clone() for name, tensor in bench.backbone.state_dict().items()}
    method = Method("layer FT", {"train": "layer4.0", "head_init": "ridge"})
    trial = Trial.empty(24)
    bench.run(method, trial, 1)
    assert torch.equal(trial.loss.isnan(), bench.folds != 1)
    assert trial.trained == sum(p.numel() for p in bench.backbone.layer("layer4.0").parameters()) + 11 * 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in bench.backbone.state_dict().items())
    # Other labels in the fold change no decision: none can be right by both.
    scrambled = replace(bench, labels=bench.labels.where(bench.folds != 1, (bench.labels + 1) % 3))
    again, same = Trial.empty(24), Trial.empty(24)
    scrambled.run(method, again, 1)
    bench.run(method, same, 1)
    rows = bench.folds == 1
    assert torch.equal(same.loss[rows], trial.loss[rows])
    decided = torch.where(trial.right[rows] == 1, bench.labels[rows], -1)
    assert not ((decided >= 0) & (again.right[rows] == 1)).any()


class Known:
    """A bench whose methods have known losses."""

    def __init__(self, losses, folds):
        self.losses, self.folds, self.labels, self.fits = losses, folds, torch.zeros_like(folds), []

    def run(self, method, trial, fold):
        self.fits.append((method.name, fold))
        trial.loss[self.folds == fold] = self.losses[method.name][fold]
        trial.right[self.folds == fold] = 1.0


def test_the_better_half_goes_on(capsys):
    losses = {"a": [0.9, 0, 0], "b": [0.5, 0.1, 0.1], "c": [0.4, 0.6, 0], "d": [0.8, 0, 0], "e": [0.3, 0.2, 0.9]}
    bench = Known(losses, torch.arange(6) % 3)
    methods = [Method(name, {}) for name in losses]
    trials = halve(bench, methods, trial_of([1.0] * 6))
    assert [fit for fit in bench.fits if fit[1] == 0] == [(name, 0) for name in "abcde"]
    assert {name for name, fold in bench.fits if fold == 1} == {"e", "c", "b"}
    assert {name for name, fold in bench.fits if fold == 2} == {"e", "b"}  # by both folds: 0.25 and 0.3, and c's 0.5
    assert [method.name for method in trials] == ["b", "e"]
    assert "fold 2 of 3, 1 of 3: e" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ([row("LDA", accuracy=0.6), row("ridge"), row("layer", 0.009)], "ridge"),
        ([row("ridge"), row("layer", 0.011)], "layer"),
        ([row("ridge"), expected("a", 0.25), expected("b", 0.3)], "b"),
        ([row("ridge"), expected("a", 0.5), row("b", 0.1), row("c", -0.1)], "b"),
        ([row("ridge"), expected("a", 0.5), row("b", -0.1)], "ridge"),
        ([row("ridge"), row("layer", 0.29, trained=9), row("full", 0.3)], "full"),
    ],
)
def test_what_lowers_the_squared_error_most_is_chosen(rows, name):
    assert choose(rows).method == name


def test_verdicts_say_what_to_type():
    closed = replace(row("ridge, skip from a, b"), knobs={"train": "none", "skip_from": ["a", "b"]})
    for gain, moves in ((0.005, "lowers"), (-0.005, "raises")):
        assert verdict([closed, row("SCL FT b", gain)], closed, "--x 1", "--data D") == (
            "no tuning: ridge, skip from a, b (50.0 ± 5.0 % predicted); SCL FT b, the best tuned method, "
            f"{moves} the squared error of the last closed form by 0.005 ± 0.100, and tuning is suggested from 0.01 "
            "lower on\n"
            'ncfinetune fit --model FineTuner --data D --model.train none --model.skip_from \'["a", "b"]\' '
            "--trainer.max_epochs 0"
        )
    rows = [row("ridge"), row("b", 0.25), row("c", 0.16), row("d", 0.14)]
    assert verdict(rows, rows[1], "--x 1", "--data D") == (
        "suggestion: b (50.0 ± 5.0 % predicted), which lowers the squared error of the last closed form by "
        "0.250 ± 0.100; within one standard error of the best: c\n"
        "ncfinetune fit --model FineTuner --data D --model.train b --x 1"
    )


@pytest.mark.slow
def test_command_tries_blocks_and_writes_what_it_found(weights, tmp_path, capsys):
    out = tmp_path / "suggestion.json"
    words = ["--checkpoint", weights, "--epochs", "2", "--folds", "2", "--blocks", "1", "--full", "true"]
    assert main([*WORDS, *words, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    content = json.loads(out.read_text())
    methods = [found["method"] for found in content["rows"]]
    assert methods[:3] == ["nearest mean", "LDA", "ridge"]
    expected = {found["method"]: found["gain"] for found in content["rows"] if found["gain"] and not found["seconds"]}
    assert len(expected) == 7
    tried = [found["method"] for found in content["rows"] if found["gain"] and found["seconds"]]
    block = tried[0].removeprefix("layer FT ")
    assert tried == [f"layer FT {block}", f"SCL FT {block}", "full FT"]
    assert f"layer FT {block}" not in expected
    assert all(name in shown.out for name in methods)
    assert "Judged on 60 training images of 10 classes, " in shown.out
    judged = {row["method"]: "closed form" if row["gain"] is None else "fits" for row in content["rows"]}
    judged |= {row["method"]: "expansion" for row in content["rows"] if row["seconds"] is None}
    for method, how in judged.items():
        assert re.search(rf"^{re.escape(method)}  +{how} ", shown.out, re.MULTILINE)
    assert "%|" not in shown.err  # a bar, which is for terminals
    assert content["verdict"] in shown.out
    assert content["suggestion"] in methods
    assert all(0 <= found["accuracy"] <= 1 for found in content["rows"])


def test_without_trials_the_expansion_decides(weights, tmp_path, capsys):
    out = tmp_path / "suggestion.json"
    assert main([*WORDS, "--checkpoint", weights, "--blocks", "0", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    expected = [found for found in content["rows"] if found["gain"] is not None]
    assert len(expected) == 8
    assert all(found["seconds"] is None for found in expected)
    backbone = Backbone(**SMALL)
    sizes = {f"layer FT {name}": sum(p.numel() for p in backbone.layer(name).parameters()) for name in backbone.layers}
    assert {found["method"]: found["trained"] - 10 * 11 for found in expected} == sizes
    shown = capsys.readouterr()
    assert "fold" not in shown.err
    # The line at the end is a command.
    line = shown.out.splitlines()[-1]
    fit = [*shlex.split(line)[1:], "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
    assert fit[0] == "fit"
    assert main(fit) is None


class Shuffled(LightningDataModule):
    """Draws the order of its images anew at each setup; each has its label in its pixels."""

    num_classes = 3

    def setup(self, stage):
        labels = torch.randperm(24) % 3
        images = labels[:, None, None, None].expand(24, 1, 8, 8).float()
        self.samples = TensorDataset(images + torch.rand(24, 1, 8, 8) / 2, labels)

    def train_plain_dataloader(self):
        return DataLoader(self.samples, batch_size=8)


def test_images_and_labels_are_of_one_pass(weights, monkeypatch):
    seen = []
    monkeypatch.setattr("ncfinetune.suggest.suggest", lambda *given: seen.append(given) or ROWS)
    words = ["--backbone", SPEC, "--checkpoint", weights, "--accelerator", "cpu", "--data", "test_suggest.Shuffled"]
    assert main(["suggest", *words]) == 0
    ((_, bank, bench, *_),) = seen
    assert torch.equal(bench.images[:, 0, 0, 0].long(), bench.labels)
    assert torch.equal(bank.labels, bench.labels)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "penultimate", "--allow_random", "true"], "suggest tries blocks, got --layers penultimate alone"),
        (["--folds", "1"], "expected --folds of at least 2, got 1"),
        (
            ["--layers", "layer1.0.act1", "--allow_random", "true", "--data.shots", "4"],
            "suggest tries layers with parameters, got --layers layer1.0.act1 without any",
        ),
        (["--lr", "0"], "expected --lr above 0, got 0.0"),
        (["--out", "a.csv"], "expected --out of a .json file, got 'a.csv'"),
        (["--backbone", SPEC, SPEC, "--allow_random", "true"], "suggest takes one backbone, got 2; scan ranks several"),
        (
            ["--data.shots", "1", "--allow_random", "true"],
            "expected two images of some class at least, got one of each",
        ),
    ],
)
def test_bad_words_are_refused_in_a_line(words, message, capsys):
    assert main([*WORDS, *words]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {message}")

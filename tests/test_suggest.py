"""The command ``suggest``: folds, paired gains, halving, the choice, and the whole on digits."""

import json
import math
import re
import shlex
import statistics
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
from ncfinetune.bank import Source, fill, read_images
from ncfinetune.calibration import fit_temperature
from ncfinetune.cli import main
from ncfinetune.closed_trials import closed_forms, closed_trial, scores_trial, skip_ridge
from ncfinetune.datamodules import Digits
from ncfinetune.folds import balanced_folds, folds_of
from ncfinetune.lab import sources
from ncfinetune.linearised import gradient_features, linearised
from ncfinetune.probes import decided_rightly, ridge
from ncfinetune.sample_statistics import standard_error
from ncfinetune.skips import choose_skips
from ncfinetune.suggest import Row, choose, halve, suggest, verdict
from ncfinetune.trials import Bench, Method, Trial, chosen_elsewhere

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


def test_one_rare_class_does_not_leave_half_of_all_images_out():
    ways = balanced_folds(torch.cat([torch.arange(10).repeat(20), torch.tensor([10])]))
    assert int(ways.max()) == 9


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


def test_what_is_not_finite_is_judged_as_chance():
    labels = torch.arange(30) % 3
    trials = [Trial.empty(30) for _ in range(2)]
    for fold in range(3):
        rows = torch.arange(10 * fold, 10 * fold + 10)
        logits = torch.eye(3)[labels[rows]] * 5
        if fold == 2:
            logits[3, 1], logits[4, 2] = torch.nan, torch.inf
        for trial, broken in zip(trials, (logits, logits.masked_fill(~logits.isfinite().all(1, True), 0)), strict=True):
            trial.add(rows, broken, labels)
    assert trials[0].right.tolist() == [1.0] * 23 + [0.0, 0.0] + [1.0] * 5
    torch.testing.assert_close(trials[0].loss, trials[1].loss)
    assert not trials[0].loss.isnan().any()


def test_a_tie_is_no_right_decision_of_a_fit():
    labels = torch.tensor([0, 0, 1])
    trial = Trial.empty(3)
    trial.add(torch.arange(3), torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.5, 0.5]]), labels)
    assert trial.right.tolist() == [0, 1, 0]


def test_scores_are_of_heads_that_were_fitted_without_the_fold():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(18) % 3
    features = torch.randn(18, 4, generator=generator) + labels[:, None]
    ways = balanced_folds(labels)[:2]
    trial = scores_trial(lambda train: (ridge(features[train], labels[train], 3), features), labels, 3, ways)
    errors, right = torch.zeros(18, dtype=torch.float64), torch.zeros(18, dtype=torch.float64)
    for way in ways:
        for place in range(18):
            train = way != way[place]
            scores = ridge(features[train], labels[train], 3).scores(features[place])
            errors[place] += (scores - torch.eye(3)[labels[place]]).square().sum() / 2
            right[place] += (scores.argmax() == labels[place]) / 2
    torch.testing.assert_close(trial.loss.double(), errors, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(trial.right.double(), right)
    assert len(trial.seconds) == 12


def test_what_is_chosen_without_a_fold_is_not_flattered_by_it():
    """Each trial is the best on a fold of its own, by which it would be chosen, and worse than the reference there."""
    folds = torch.arange(3).repeat_interleave(2)
    reference = trial_of([0.5] * 6, [0.0] * 6)
    first = trial_of([0.0, 0.0, 0.6, 0.6, 0.6, 0.6], [1.0] * 6)
    second = trial_of([0.6, 0.6, 0.0, 0.0, 0.6, 0.6], [1.0] * 6)
    found = chosen_elsewhere([first, second], reference, folds, 0.01)
    # Without the first fold the second trial gains 0.2, without the second the first, without the third both.
    torch.testing.assert_close(found.loss, torch.full((6,), 0.6))
    assert found.right.tolist() == [1.0] * 6
    found = chosen_elsewhere([first, second], reference, folds, 0.3)
    assert torch.equal(found.loss, reference.loss)
    assert torch.equal(found.right, reference.right)


def test_what_is_chosen_without_each_fold_gains_nothing_where_nothing_is_to_gain():
    generator, folds, reference = torch.Generator().manual_seed(0), torch.arange(60) % 5, trial_of([0.5] * 60)
    best, honest = [], []
    for _ in range(100):
        useless = [trial_of(row, row) for row in torch.rand(8, 60, generator=generator).tolist()]
        best.append(max(trial.gain(reference, "loss")[0] for trial in useless))
        honest.append(chosen_elsewhere(useless, reference, folds, 0.01).gain(reference, "loss")[0])
    assert statistics.mean(best) > 0.04
    assert abs(statistics.mean(honest)) < 3 * statistics.stdev(honest) / 10


@pytest.mark.parametrize("seed", range(12))
def test_tuning_is_compared_with_the_better_of_ridge_and_its_skips(seed):
    """By images left out, without which the skip connections are chosen anew: they seem to help more than they do."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(30) % 3
    penultimate = torch.randn(30, 6, generator=generator) + torch.randn(3, 6, generator=generator)[labels]
    layers = {str(place): torch.randn(30, 6, generator=generator) for place in range(8)}
    layers["useful"] = torch.randn(30, 6, generator=generator) + torch.randn(3, 6, generator=generator)[labels]
    *others, last = closed_forms(penultimate, layers, labels, 3)
    ridges = [one for one in (*others, last) if one.name.startswith("ridge")]
    assert last.trial.loss.mean() == min(one.trial.loss.mean() for one in ridges)
    assert len(ridges) == 1 + bool(choose_skips(penultimate, layers, labels, 3))
    # What is fitted without the folds that blocks are tried on is of the same kind.
    (head, features), skips = last.fit(torch.arange(30) < 20), last.knobs.get("skip_from", [])
    assert bool(skips) or features.shape == penultimate.shape
    assert head.weight.shape[1] == features.shape[1]


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
    assert [found.name for found in closed_forms(collapsed, {}, labels, 3)] == ["nearest mean", "ridge"]


@pytest.mark.parametrize(("images", "judged"), [(2, False), (3, True)])
def test_lda_is_judged_where_a_fold_leaves_it_a_covariance(images, judged):
    labels = torch.arange(3 * images) % 3
    penultimate = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(3, 4)[labels]
    found = closed_forms(penultimate, {"a": penultimate}, labels, 3)
    assert [one.name for one in found] == ["nearest mean", *(["LDA"] if judged else []), "ridge"]
    assert all(one.trial.right.mean() > 0.5 for one in found)
    of_ten = closed_forms(penultimate, {}, labels, 10)
    assert ("LDA" in [one.name for one in of_ten]) == judged  # classes without images do not matter


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
    model = bench.fitted(method, (bench.folds != 1).nonzero().squeeze(1), 1).eval()
    with torch.no_grad():
        torch.testing.assert_close(trial.logits[bench.folds == 1].float(), model(bench.images[bench.folds == 1]))
    # Other labels in the fold change no decision: none can be right by both.
    scrambled = replace(bench, labels=bench.labels.where(bench.folds != 1, (bench.labels + 1) % 3))
    again, same = Trial.empty(24), Trial.empty(24)
    scrambled.run(method, again, 1)
    bench.run(method, same, 1)
    rows = bench.folds == 1
    assert torch.equal(same.loss[rows], trial.loss[rows])
    decided = torch.where(trial.right[rows] == 1, bench.labels[rows], -1)
    assert not ((decided >= 0) & (again.right[rows] == 1)).any()


def test_a_fit_that_diverges_is_said_and_counts_as_chance(tmp_path, capsys):
    bench = replace(bench_in(tmp_path), lr=1e20)
    trial = Trial.empty(24)
    bench.run(Method("full FT", {"train": "all", "head_init": "ridge"}), trial, 0)
    assert capsys.readouterr().err == "full FT diverges without fold 1, and counts as chance there\n"
    torch.testing.assert_close(trial.loss[bench.folds == 0], torch.full((8,), 2 / 3))
    assert not trial.right[bench.folds == 0].any()
    assert len(trial.seconds) == 1  # it was tried


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
        ([row("ridge"), expected("a", 0.105)], "ridge"),  # of which 0.1 may be chance
        ([row("ridge"), expected("a", 0.105), expected("b", 0.12, error=0.2), expected("c", 0.115)], "c"),
        ([row("ridge"), expected("a", 0.3), row("full FT", -0.1)], "a"),  # no block was tried
        ([row("ridge"), expected("a", 0.3), row("full FT", 0.4)], "full FT"),
        ([row("ridge"), expected("a", 0.5), row("b", 0.1), row("c", -0.1)], "b"),
        ([row("ridge"), expected("a", 0.5), row("b", -0.1)], "ridge"),
        ([row("ridge"), row("layer", 0.29, trained=9), row("full", 0.3)], "full"),
    ],
)
def test_what_lowers_the_squared_error_most_is_chosen(rows, name):
    assert choose(rows).method == name


def test_verdicts_say_what_to_type():
    closed = replace(row("ridge, skip from a, b"), knobs={"train": "none", "skip_from": ["a", "b"]})
    assert "; SCL FT b, the best tuned method, has the squared error of the last closed form, and" in verdict(
        [closed, row("SCL FT b", 1e-5)], closed, "", ""
    )
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
    assert "(60 training images, 10 classes)" in shown.out
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


def test_the_command_names_the_precision(weights, capsys):
    words = ["--checkpoint", weights, "--blocks", "0", "--precision", "bf16-mixed"]
    assert main([*WORDS, *words]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "--trainer.accelerator cpu --trainer.precision bf16-mixed" in line


def test_a_random_network_is_the_same_each_time():
    options = SimpleNamespace(
        backbone=[{**SMALL, "name": "resnet18"}], checkpoint=None, pretrained=False, allow_random=True, layers=[]
    )
    torch.manual_seed(1)
    (one,), (other,) = sources(options), sources(options)
    assert torch.equal(one.backbone.net.conv1.weight, other.backbone.net.conv1.weight)


class Lonely(LightningDataModule):
    """Two classes, of which one has a single image."""

    num_classes = 2

    def train_plain_dataloader(self):
        return DataLoader(TensorDataset(torch.rand(10, 1, 8, 8), torch.tensor([0] * 9 + [1])), batch_size=8)


def test_a_class_of_one_image_is_not_enough_of_two(weights, capsys):
    words = ["--backbone", SPEC, "--checkpoint", weights, "--accelerator", "cpu", "--data", "test_suggest.Lonely"]
    assert main(["suggest", *words]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: expected images of two classes without those that are left out, got classes of 9, 1 images; give each "
        "class two at least"
    )


@pytest.mark.parametrize("blocks", [0, 2])
def test_what_is_predicted_of_a_method_is_how_it_does_on_images_left_out(blocks, tmp_path):
    """But of the suggested one, which is flattered by having been chosen."""
    bench = bench_in(tmp_path)
    source = Source.of("net", bench.backbone)
    bank = fill(trainer_in(tmp_path), [source], bench.data(torch.arange(24)), {}, 24)
    trainer = trainer_in(tmp_path, inference_mode=False)
    found = {one.method: one for one in suggest(source, bank, bench, trainer, blocks)}
    chosen, folds = choose([*found.values()]).method, balanced_folds(bench.labels)
    names = [
        name
        for name in source.layers
        if name != "penultimate" and any(True for _ in bench.backbone.layer(name).parameters())
    ]
    gradients = gradient_features(trainer, bench.backbone, bench.images, names)
    compared = 0
    for name in names:
        row, scores = (
            found[f"layer FT {name}"],
            linearised(bank.of("net", "penultimate"), gradients[name], bench.labels, 3, folds),
        )
        if row.method != chosen and row.seconds is None:
            compared += 1
            assert row.accuracy == pytest.approx(float(decided_rightly(scores, bench.labels).mean()), abs=1e-6)
            assert row.error == pytest.approx(standard_error(row.accuracy, 24))
    assert compared >= len(names) - blocks - 1


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
            "expected two training images of some class at least, got one of each; further ones are put aside as val",
        ),
    ],
)
def test_bad_words_are_refused_in_a_line(words, message, capsys):
    assert main([*WORDS, *words]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {message}")

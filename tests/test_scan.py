"""The command ``scan``: numbers against direct computation, parts against one pass, files, refusals."""

import csv
import io
import json
import math
import random
import sys
from dataclasses import replace

import pytest
import torch
from held_out import held_out_folds
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, seed_everything
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import SMALL as WITH_EQUAL_BLOCKS
from tiny import trainer_in
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset, random_split

from ncfinetune import Backbone
from ncfinetune.bank import Bank, Source, fill, merge
from ncfinetune.cli import main
from ncfinetune.collapse import class_moments, nc1
from ncfinetune.datamodules import Digits
from ncfinetune.folds import FoldMoments
from ncfinetune.probes import ridge
from ncfinetune.scores import layer_scores, model_scores

# At its random start a block does something, so that no two layers have the same features.
SMALL = {**WITH_EQUAL_BLOCKS, "zero_init_last": False}
SPEC = "{name: resnet18, stem: cifar, in_chans: 1, channels: [4, 6, 8, 10], zero_init_last: false}"
OTHER = "{name: resnet10t, in_chans: 1}"
DATA = ["--data", "Digits", "--data.shots", "6", "--data.batch_size", "8"]
QUICK = ["--allow_random", "true", "--accelerator", "cpu"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of the small network that every scan here starts from."""
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    seed_everything(1, verbose=False)
    Backbone(**SMALL).save(path)
    return str(path)


def scan(*words):
    return main(["scan", *QUICK, *words])


@pytest.fixture(scope="module")
def bank(weights, tmp_path_factory):
    """Features of 60 digits in batches of one."""
    source = Source.of("small", Backbone(**SMALL, checkpoint=weights))
    trainer = trainer_in(tmp_path_factory.mktemp("bank"))
    return fill(trainer, [source], Digits(shots=6, batch_size=1), {"class": "Digits"}, 5000)


def part_of(bank, index, number):
    own = bank.batches % number == index - 1
    features = {name: rows[own] for name, rows in bank.features.items()}
    return Bank({**bank.facts, "part": [index, number]}, features, bank.labels[own], bank.batches[own])


def refitted(features, labels):
    """Scores of images left out, by the fit without each fold; the strength is that of all images."""
    head = ridge(features, labels, 10)
    lam, ways = [head.lam.item()], held_out_folds(head, labels)
    scores = torch.empty(len(ways), len(labels), 10, dtype=torch.float64)
    for way, found in zip(ways, scores, strict=True):
        for fold in way.unique():
            kept = way != fold
            found[~kept] = ridge(features[kept], labels[kept], 10, lams=lam).scores(features[~kept])
    return scores


def test_scores_are_those_of_the_features(bank, weights):
    backbone = Backbone(**SMALL, checkpoint=weights).eval()
    data = Digits(shots=6, batch_size=60)
    data.setup("fit")
    images, labels = data.on_after_batch_transfer(next(iter(data.train_plain_dataloader())), 0)
    with torch.no_grad():
        stages = backbone.stages(images, ["layer2.0", "penultimate"])
    found = {score.layer: score for score in layer_scores(bank, rank=True)}
    assert list(found) == [*backbone.layers, "penultimate"]
    assert torch.equal(bank.labels, labels)
    for layer, features in stages.items():
        torch.testing.assert_close(bank.of("small", layer), features, rtol=1e-5, atol=1e-6)
        features, score = bank.of("small", layer), found[layer]
        scores = refitted(features, labels)
        accuracy = (scores.argmax(2) == labels).double().mean().item()
        assert score.accuracy == pytest.approx(accuracy)
        moved = (60 * accuracy + 2) / 64
        assert score.accuracy_error == pytest.approx(math.sqrt(moved * (1 - moved) / 64))
        errors = (scores - torch.eye(10)[labels]).square().sum(2)
        assert score.squared_error == pytest.approx(errors.mean().item())
        assert score.nc1 == pytest.approx(nc1(class_moments(features, labels, 10)).item())
        folds = FoldMoments(10)
        folds.update(features, labels)
        assert score.cv_nc1 == pytest.approx(folds.nc1().item())
        assert 1 <= score.rank <= features.shape[1]
    assert found["layer2.0"].parameters == sum(p.numel() for p in backbone.layer("layer2.0").parameters())
    assert found["penultimate"].parameters == sum(p.numel() for p in backbone.parameters())
    assert [score.depth for score in found.values()] == list(range(1, 10))


def test_a_thousand_parts_in_any_order_are_one_pass(bank):
    parts = {str(index): part_of(bank, index, 1000) for index in range(1, 1001)}
    names = list(parts)
    random.Random(0).shuffle(names)
    whole = merge({name: parts[name] for name in names})
    assert whole.facts == bank.facts
    assert torch.equal(whole.labels, bank.labels)
    assert all(torch.equal(whole.features[name], rows) for name, rows in bank.features.items())


def test_parts_on_the_command_line_give_the_table_of_one_pass(weights, tmp_path, capsys):
    words = ["--backbone", SPEC, OTHER, "--checkpoint", weights, *DATA]
    assert scan(*words) == 2
    assert "expected a checkpoint for each backbone, got 1 for 2" in capsys.readouterr().err
    words = ["--backbone", SPEC, "--checkpoint", weights, *DATA]
    assert scan(*words, "--out", str(tmp_path / "whole.json")) == 0
    for index in (2, 3, 1):
        assert scan(*words, "--part", f"{index}/3", "--out", str(tmp_path / f"{index}.safetensors")) == 0
    parts = [str(tmp_path / f"{index}.safetensors") for index in (1, 2, 3)]
    assert main(["scan", "--merge", *parts, "--out", str(tmp_path / "merged.json")]) == 0
    whole, merged = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "merged"))
    assert merged == whole
    assert whole["images"] == 60
    capsys.readouterr()
    before = (tmp_path / "2.safetensors").stat().st_mtime_ns
    assert scan(*words, "--part", "2/3", "--out", parts[1]) == 0
    assert capsys.readouterr().out == f"{parts[1]} is there\n"
    assert (tmp_path / "2.safetensors").stat().st_mtime_ns == before
    for others, said in (
        (["--data.shots", "5"], "its data are"),
        (["--layers", "layer1.0"], "its models are"),
        (["--part", "1/3"], "part 2/3"),
        (["--part", "2/4"], "part 2/3"),
    ):
        assert scan(*words, "--part", "2/3", *others, "--out", parts[1]) == 2
        message = capsys.readouterr().err
        assert f"{parts[1]} is there, and of another scan: " in message
        assert said in message


def test_files_hold_the_table(weights, tmp_path, capsys):
    outs = [str(tmp_path / name) for name in ("scan.csv", "scan.json", "scan.png", "events")]
    layers = ["--layers", "layer1.0", "layer4.1"]
    assert scan("--backbone", SPEC, SPEC, "--checkpoint", weights, weights, *DATA, *layers, "--out", *outs) == 0
    shown = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "scan.csv").read_text().splitlines()))
    content = json.loads((tmp_path / "scan.json").read_text())
    names = ["resnet18 small #1", "resnet18 small #2"]
    assert [row["model"] for row in rows] == [name for name in names for _ in range(3)]
    assert [float(row["nc1"]) for row in rows] == [layer["nc1"] for layer in content["layers"]]
    assert "rank" not in rows[0]
    assert {model["model"] for model in content["models"]} == set(names)
    assert all(model["behind"] == model["behind_error"] == 0 for model in content["models"])
    assert "60 images of 10 classes" in shown
    assert all(name in shown for name in names)
    assert (tmp_path / "scan.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(tmp_path / "events" / names[0])).Reload()
    logged = {event.step: event.value for event in events.Scalars("scan/accuracy")}
    assert logged == pytest.approx({int(row["depth"]): float(row["accuracy"]) for row in rows[:3]}, rel=1e-6)


def test_models_are_ranked_by_paired_differences(bank):
    noise = torch.Generator().manual_seed(0)
    bad = torch.randn(len(bank.labels), 10, generator=noise)
    models = [{"name": name, "layers": {"penultimate": [10, 1]}} for name in ("bad", "small")]
    features = {"bad/penultimate": bad, "small/penultimate": bank.of("small", "penultimate")}
    both = Bank({**bank.facts, "models": models}, features, bank.labels, bank.batches)
    first, second = model_scores(both, layer_scores(both))
    assert (first.model, second.model) == ("small", "bad")
    targets = torch.eye(10)[bank.labels]
    errors = [
        (refitted(features[f"{name}/penultimate"], bank.labels) - targets).square().sum(2).mean(0)
        for name in ("small", "bad")
    ]
    paired = errors[1] - errors[0]
    assert first.squared_error == pytest.approx(errors[0].mean().item())
    assert second.behind == pytest.approx(paired.mean().item())
    assert second.behind > 0
    assert second.behind_error == pytest.approx(paired.std(correction=0).item() / math.sqrt(len(paired)))
    assert (first.behind, first.behind_error) == (0, 0)
    assert first.best_layer == "penultimate"


def test_networks_get_their_own_normalisation_from_one_decoding(tmp_path):
    backbones = [Backbone(**SMALL), Backbone(**SMALL)]
    for backbone, mean in zip(backbones, (0.2, 0.6), strict=True):
        backbone.net.pretrained_cfg = {**backbone.net.pretrained_cfg, "mean": (mean,) * 3, "std": (mean / 2,) * 3}
    sources = [Source.of(str(place), backbone, ["layer1.0"]) for place, backbone in enumerate(backbones)]

    def features(*wanted, **options):
        bank = fill(trainer_in(tmp_path), wanted, Digits(shots=2, normalize="backbone", **options), {}, 100)
        return {source.name: bank.of(source.name, "layer1.0") for source in wanted}

    together = features(*sources)
    for source in sources:
        torch.testing.assert_close(together[source.name], features(source)[source.name], rtol=1e-4, atol=1e-5)
    given = features(*sources, mean=[0.5], std=[0.5])
    assert not torch.allclose(given["1"], together["1"])
    torch.testing.assert_close(given["1"], features(sources[1], mean=[0.5], std=[0.5])["1"], rtol=1e-5, atol=1e-6)


def test_penultimate_features_that_are_the_last_block_s_are_scored_once(bank, monkeypatch):
    fitted = []
    monkeypatch.setattr("ncfinetune.scores.ridge", lambda *args: fitted.append(args) or ridge(*args))
    scores = layer_scores(bank)
    assert len(fitted) == len(scores) - 1
    assert scores[-1].nc1 == scores[-2].nc1
    assert (scores[-1].layer, scores[-1].depth) == ("penultimate", len(scores))


class Own(LightningDataModule):
    """A datamodule of a user's own."""

    def __init__(self, labels, images=None, **facts):
        super().__init__()
        self.samples = TensorDataset(torch.rand(len(labels), 1, 8, 8) if images is None else images, labels)
        self.__dict__.update(facts)

    def train_plain_dataloader(self):
        return DataLoader(self.samples, batch_size=4)


class Given(Own):
    """A datamodule of a user's own whose loader is given."""

    def __init__(self, loader):
        super().__init__(torch.arange(8) % 2, num_classes=2)
        self.loader = loader

    def train_plain_dataloader(self):
        return self.loader


class Stream(IterableDataset):
    """Batches without end."""

    def __iter__(self):
        while True:
            yield IMAGES[:4], CLASSES[:4]


class Halved(LightningDataModule):
    """Splits its images at random at each setup; takes no arguments."""

    num_classes = 2

    def __init__(self):
        super().__init__()

    def setup(self, stage):
        self.train, _ = random_split(TensorDataset(IMAGES, CLASSES), [8, 4])

    def train_plain_dataloader(self):
        return DataLoader(self.train, batch_size=2)


IMAGES, CLASSES = torch.arange(12.0)[:, None, None, None].expand(12, 1, 8, 8).contiguous(), torch.arange(12) % 2
PAIRS = TensorDataset(IMAGES, CLASSES)


def labels_read(tmp_path, loader, most=100, part=(1, 1)):
    source = Source.of("net", Backbone(**SMALL), ["layer1.0"])
    return fill(trainer_in(tmp_path), [source], Given(loader), {}, most, part).labels.tolist()


def test_a_sampler_says_which_images_are_training_images(tmp_path):
    assert labels_read(tmp_path, DataLoader(PAIRS, batch_size=2, sampler=SubsetRandomSampler([2, 4, 7]))) == [0, 0, 1]
    batches = BatchSampler(SubsetRandomSampler([2, 4, 7]), 2, drop_last=False)
    assert labels_read(tmp_path, DataLoader(PAIRS, batch_sampler=batches)) == [0, 0, 1]


def test_streams_end_at_so_many_images(tmp_path):
    stream = DataLoader(Stream(), batch_size=None)
    assert labels_read(tmp_path, stream, most=8) == [0, 1, 0, 1] * 2
    assert labels_read(tmp_path, stream, most=9) == [0, 1, 0, 1] * 3
    assert labels_read(tmp_path, stream, most=9, part=(2, 2)) == [0, 1, 0, 1]
    assert labels_read(tmp_path, [(IMAGES[:3], CLASSES[:3]), (IMAGES[3:], CLASSES[3:])]) == CLASSES.tolist()


def test_parts_of_data_that_are_split_at_random_are_of_one_split(weights, tmp_path):
    words = ["--backbone", SPEC, "--checkpoint", weights, "--layers", "layer1.0", "--data", "test_scan.Halved"]
    parts = [str(tmp_path / f"{index}.safetensors") for index in (1, 2)]
    for index, path in enumerate(parts, 1):
        assert scan(*words, "--part", f"{index}/2", "--out", path) == 0
    features = merge({path: Bank.load(path) for path in parts}).features["resnet18/layer1.0"]
    assert len(features.unique(dim=0)) == 8
    assert scan(*words, "--part", "2/2", "--out", parts[1]) == 0  # it is known again


def test_a_part_in_half_precision_is_known_again(weights, tmp_path, capsys):
    path = str(tmp_path / "part.safetensors")
    words = ["--backbone", SPEC, "--checkpoint", weights, *DATA, "--precision", "bf16-true", "--layers", "penultimate"]
    assert scan(*words, "--part", "1/2", "--out", path) == 0
    assert list(Bank.load(path).features) == ["resnet18/penultimate"]
    assert scan(*words, "--part", "1/2", "--out", path) == 0
    assert capsys.readouterr().out.endswith(f"{path} is there\n")
    assert scan("--backbone", SPEC, "--checkpoint", weights, "--part", "1/2", "--out", path) == 2
    assert "error: expected --data CLASS, or an overlay" in capsys.readouterr().err


def measured(tmp_path, data, most=100, **spec):
    bank = fill(trainer_in(tmp_path), [Source.of("net", Backbone(**{**SMALL, **spec}), ["layer1.0"])], data, {}, most)
    return layer_scores(bank)


def test_one_image_of_each_class_is_refused(tmp_path):
    said = "expected two images of some class at least, got one of each"
    with pytest.raises(ValueError, match=said):
        measured(tmp_path, Own(torch.arange(5), num_classes=5))


def test_accuracy_is_that_of_new_images():
    """Of weak features of few images, of which fewer are right where single ones are left out than of new ones."""
    noise = torch.Generator().manual_seed(0)
    means = 0.6 * torch.randn(10, 20, generator=noise)
    seen = []
    for _ in range(20):
        labels = torch.arange(10).repeat(5)
        new = torch.arange(10).repeat(100)
        train, test = (means[own] + torch.randn(len(own), 20, generator=noise) for own in (labels, new))
        facts = {"models": [{"name": "net", "layers": {"penultimate": [20, 1]}}], "classes": list(range(10))}
        (score,) = layer_scores(Bank(facts, {"net/penultimate": train}, labels, torch.zeros(50, dtype=torch.int64)))
        head = ridge(train, labels, 10)
        right = (head.scores(test).argmax(1) == new).double().mean().item()
        seen.append([score.accuracy, right, 1 - head.loo_error.item()])
    balanced, right, single = torch.tensor(seen).mean(0).tolist()
    assert balanced == pytest.approx(right, abs=0.03)
    assert single < right - 0.06


def test_images_at_most_are_spread_over_the_classes(tmp_path):
    source = Source.of("net", Backbone(**SMALL), ["layer1.0"])
    bank = fill(trainer_in(tmp_path), [source], Digits(shots=6, batch_size=8), {}, 20)
    assert bank.labels.bincount().tolist() == [2] * 10
    assert bank.batches.tolist() == [0] * 8 + [1] * 8 + [2] * 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            Own(torch.zeros(6, dtype=torch.int64), num_classes=2),
            "layer layer1.0 of net: expected samples of at least two classes",
        ),
        (Own(torch.arange(6) % 3, num_classes=2), "layer layer1.0 of net: expected labels"),
        (Own(torch.arange(6) % 2), "expected Own to say its num_classes or class_names, and it has neither"),
        (
            Own(torch.rand(6), num_classes=2),
            r"scan takes batches of .*, got torch.float32 \(4, 1, 8, 8\), torch.float32 \(4,\); give a datamodule",
        ),
        (
            Own(torch.arange(6) % 2, torch.zeros(6, 1, 8, 8, dtype=torch.uint8), num_classes=2),
            r"scan takes batches of floating-point images .*, got torch.uint8 \(4, 1, 8, 8\), torch.int64 \(4,\)",
        ),
        (
            Own(torch.arange(6) % 2, torch.full((6, 1, 8, 8), torch.nan), num_classes=2),
            "layer layer1.0 of net: expected finite",
        ),
        (LightningDataModule(), r"LightningDataModule has no train_plain_dataloader\(\)"),
    ],
)
def test_data_that_cannot_be_scored_are_refused(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        measured(tmp_path, data)


def test_a_network_for_another_size_is_refused_with_the_size(tmp_path):
    source = Source.of("vit", Backbone("test_vit", in_chans=1), [])
    message = "vit cannot take images of 1 x 8 x 8, and is made for 1 x 160 x 160 .*; give --data.image_size 160"
    with pytest.raises(ValueError, match=message):
        fill(trainer_in(tmp_path), [source], Digits(shots=2), {}, 100)


def test_parts_that_do_not_belong_together_are_refused(bank, tmp_path):
    parts = {f"{index}": part_of(bank, index, 3) for index in (1, 2, 3)}
    with pytest.raises(ValueError, match=r"of 3 parts 2 are missing: 2, 3"):
        merge({"1": parts["1"]})
    with pytest.raises(ValueError, match="part 1 of 3 is given twice: '1' and 'again'"):
        merge({**parts, "again": parts["1"]})
    foreign = replace(parts["2"], facts={**parts["2"].facts, "classes": ["a", "b"]})
    with pytest.raises(ValueError, match=r"'b' is a part of another scan than 'a': its classes are \[.a., .b.\], and"):
        merge({"a": parts["1"], "b": foreign})
    with pytest.raises(ValueError, match="'b' is a part of another scan than 'a': one of 4 parts, and not of 3"):
        merge({"a": parts["1"], "b": part_of(bank, 2, 4)})


def test_damaged_and_foreign_files_are_refused(bank, weights, tmp_path):
    path = tmp_path / "part.safetensors"
    bank.save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="part .* is damaged: it is not what was saved; delete it, and scan it again"):
        Bank.load(path)
    path.write_bytes(content[:1000])
    with pytest.raises(ValueError, match="is no part of a scan, or damaged"):
        Bank.load(path)
    with pytest.raises(ValueError, match="is no part of a scan; expected what scan --part i/n leaves"):
        Bank.load(weights)
    with pytest.raises(FileNotFoundError, match="no part 'none.safetensors'; scan --part i/n leaves one"):
        Bank.load("none.safetensors")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "Digits"], "expected --backbone NAME, one or several"),
        (["--backbone", "resnet18"], "expected --data CLASS, or an overlay"),
        (["--backbone", "resnet81", *DATA], "timm has no architecture 'resnet81'"),
        (["--backbone", SPEC, "--allow_random", "false", *DATA], "resnet18 has random weights in conv1.weight; give"),
        (["--backbone", SPEC, "--layers", "layer9", *DATA], "no layer fits 'layer9'"),
        (
            ["--backbone", SPEC, *DATA, "--part", "4/3", "--out", "a.safetensors"],
            "--part i/n with i from 1 to n, got '4/3'",
        ),
        (["--backbone", SPEC, *DATA, "--part", "1/3"], "--part writes one file; expected --out FILE.safetensors"),
        (["--backbone", SPEC, *DATA, "--out", "scan.xlsx"], "expected --out of .csv, .json, .png files, or a folder"),
        (["--backbone", SPEC, *DATA, "--max_images", "0"], "expected --max_images of at least 1, got 0"),
        (["--backbone", "{name: resnet10t}", *DATA], "the backbone takes images (N, 3, H, W)"),
        (["--merge", "none.safetensors"], "no part 'none.safetensors'"),
    ],
)
def test_bad_words_are_refused_in_a_line(words, message, capsys):
    assert scan(*words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert message in said


@pytest.mark.parametrize("error", [MisconfigurationException, ModuleNotFoundError])
def test_an_accelerator_that_is_not_here_is_refused_in_a_line(error, weights, monkeypatch, capsys):
    def none(**arguments):
        raise error("no such device")

    monkeypatch.setattr("ncfinetune.lab.Trainer", none)
    assert scan("--backbone", SPEC, "--checkpoint", weights, *DATA) == 2
    assert capsys.readouterr().err == "error: --accelerator cpu: no such device\n"


def test_misspelt_option_is_refused(capsys):
    with pytest.raises(SystemExit):
        scan("--backbones", "resnet18")
    assert "no option 'backbones'" in capsys.readouterr().err


def test_parts_of_other_images_with_the_same_options_are_refused(tmp_path):
    def part(index, images):
        source = Source.of("net", Backbone(**WITH_EQUAL_BLOCKS), ["layer1.0"])
        data = Own(torch.arange(8) % 2, images, num_classes=2)
        return fill(trainer_in(tmp_path), [source], data, {}, 100, (index, 2))

    seed_everything(0, verbose=False)
    images = torch.rand(8, 1, 8, 8)
    first, other = part(1, images), part(2, images.flip(0))
    source = {"models": first.facts["models"]}  # each made its own random network
    other = replace(other, facts={**other.facts, **source})
    with pytest.raises(ValueError, match="'b' is a part of another scan than 'a': its images are"):
        merge({"a": first, "b": other})
    same = replace(part(2, images), facts={**first.facts, "part": [2, 2]})
    assert len(merge({"a": first, "b": same}).labels) == 8


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_a_bar_of_images(weights, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert scan("--backbone", SPEC, "--checkpoint", weights, *DATA) == 0
    shown = terminal.getvalue()
    assert "images: 100%" in shown
    assert "Predicting" not in shown
    assert "images:" not in capsys.readouterr().out

"""The few-label studies of experiments/studies, on a handful of tiny images."""

import csv
import importlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.stats import ttest_1samp

from ncfinetune import Backbone, FineTuner, sample_statistics
from ncfinetune.collapse import class_moments, nc1
from ncfinetune.datamodules import ImageFolder
from ncfinetune.folds import FoldMoments, folds_of
from ncfinetune.probes import ridge
from ncfinetune.trials import Bench, Method

FOLDER = Path(__file__).resolve().parent.parent / "experiments" / "studies"
METHODS_OF_TABLE = ("linear probe", "layer FT", "SCL FT", "full FT")


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("study")


@pytest.fixture
def printed(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """What a command of the study that trains nothing prints, without the head of its table."""

    def run(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["study.py", *words])
        study.main()
        return capsys.readouterr().out.splitlines()[2:]

    return run


@pytest.fixture
def textures(tmp_path: Path) -> Path:
    """Images of three classes, six of each and part, and the weights of a small network."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in range(3):
            (tmp_path / part / str(label)).mkdir(parents=True)
            for index in range(6):
                pixels = rng.integers(0, 80, (32, 32, 3), dtype=np.uint8) + np.uint8(70 * label)
                Image.fromarray(pixels).save(tmp_path / part / str(label) / f"{index}.png")
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), tmp_path / "weights.pth")
    return tmp_path


def _run(script: str, *words: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_closed_forms_make_a_table(textures: Path) -> None:
    weights, out = str(textures / "weights.pth"), textures / "table.md"
    words = [str(textures), "--checkpoint", weights, "--backbone", "{name: mobilenetv3_small_050}", "--mean", "0.5"]
    _run("closed_forms.py", *words, "--std", "0.5", "--shots", "3", "6", "--seeds", "2", "--out", str(out))
    rows = [line for line in out.read_text().splitlines() if line.startswith(("| 3 |", "| 6 |"))]
    assert len(rows) == 2 * 8
    assert all("±" in row for row in rows)
    assert [row.split("|")[4].strip() for row in rows if "| ridge |" in row] == ["0.00 ± 0.00"] * 2


WORDS = ["--backbone", "mobilenetv3_small_050", "--blocks", "blocks.2.0", "--steps", "3", "--rates", "0.001"]


def _study(root: Path, rows: str, *words: str) -> str:
    places = ["--checkpoint", str(root / "weights.pth"), "--cache-dir", str(root / "cache"), "--out", rows]
    return _run("study.py", "run", str(root), *places, *WORDS, *words)


@pytest.mark.slow
def test_study_writes_its_rows_goes_on_and_makes_a_table(textures: Path, printed: Callable[..., list[str]]) -> None:
    rows = str(textures / "rows.csv")
    words = ["--shots", "4", "--precision", "32-true", "--methods", *METHODS_OF_TABLE]
    assert _study(textures, rows, *words, "--seeds", "0").count("method=") == 4
    assert _study(textures, rows, *words, "--seeds", "0", "1").count("method=") == 4  # what is there is not run again
    lines = printed("table", rows)
    assert len(lines) == 4
    assert all("| 2 |" in line and "±" in line for line in lines)


@pytest.mark.slow
def test_methods_are_paired_with_ridge_on_the_same_splits(
    textures: Path, study: ModuleType, printed: Callable[..., list[str]]
) -> None:
    closed, rows = textures / "closed.csv", str(textures / "rows.csv")
    methods = [name for name in study.METHODS if name not in METHODS_OF_TABLE]
    plan = textures / "plan.csv"
    with plan.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(study.RUN)
        for name, seed in [*((name, 0) for name in methods), ("LP-FT", 1)]:
            table.writerow([name, "", 6, seed, 0.001, 3, 32, "32-true"])
    words = ["--plan", str(plan), "--validation", "none", "--no-nc1", "--lora-modules", "conv_pw"]
    output = _study(textures, rows, *words, "--backbone", "{name: mobilenetv3_small_050, pad_type: same}")
    assert output.count("method=") == len(methods) + 1
    assert output.count(" block=blocks.2.0 ") == sum(map(study.tunes_block, methods))
    words = [str(textures), "--checkpoint", str(textures / "weights.pth"), "--backbone", "mobilenetv3_small_050"]
    words += ["--mean", "0.5", "--std", "0.5", "--shots", "6", "--seeds", "2"]
    _run("closed_forms.py", *words, "--out", str(closed.with_suffix(".md")))
    cells = [line.split(" | ") for line in printed("paired", str(closed), rows)]
    assert len(cells) == 8 + len(methods)
    assert [line[6] for line in cells if line[1] == "ridge"] == ["0.00 ± 0.00"]
    tested = {
        name: [float(row["test"]) for row in study.rows(Path(path)) if row["method"] == name]
        for name, path in (("ridge", closed), ("LP-FT", rows))
    }
    gains = [100 * (tuned - ridge) for tuned, ridge in zip(tested["LP-FT"], tested["ridge"], strict=True)]
    gain, p = next(line for line in cells if line[1] == "LP-FT")[6:8]
    assert gain == f"{sum(gains) / 2:.2f} ± {abs(gains[0] - gains[1]) / 2:.2f}"
    assert p == f"{sample_statistics.paired(gains)[2]:.2g}"
    against = [line.split(" | ") for line in printed("paired", str(closed), rows, "--against", "nearest mean")]
    assert [line[6:8] for line in against if line[1] == "nearest mean"] == [["0.00 ± 0.00", ""]]


def test_file_of_another_study_is_not_continued(study: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    assert study.so_far(file, ("a", "b")) == []
    file.write_text("a,b\n1,2\n")
    assert study.so_far(file, ("a", "b")) == [{"a": "1", "b": "2"}]
    with pytest.raises(SystemExit, match=re.escape(f"{file} has other columns than a, c; give --out another file")):
        study.so_far(file, ("a", "c"))


def test_rows_are_written_at_once_below_one_heading(study: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    with study.appending(file, ("a", "b")) as append:
        append({"a": 1, "b": 2}, {"a": 3})
        assert _rows(file) == [{"a": "1", "b": "2"}, {"a": "3", "b": ""}]
    with study.appending(file, ("a", "b")) as append:
        append({"a": 5, "b": 6})
    assert file.read_text().splitlines() == ["a,b", "1,2", "3,", "5,6"]


def test_names_of_blocks_are_filled_in(study: ModuleType) -> None:
    assert study.in_block(study.METHODS["SCL FT, skips chosen"]["train"], "b.1") == ["b.1.*.weight", "b.1.*.bias"]
    assert [study.in_block(value, "b.1") for value in ("BLOCK", "all", 3)] == ["b.1", "all", 3]
    tuned = {name for name in study.METHODS if study.tunes_block(name)}
    assert set(study.METHODS) - tuned == {"linear probe", "BitFit", "norm tuning", "LoRA", "full FT", "LP-FT"}


@pytest.mark.parametrize("way", ["half", "rest", "none"])
@pytest.mark.parametrize("shots", [2, 5])
def test_no_image_trains_and_tests(way: str, shots: int, study: ModuleType) -> None:
    train, val = torch.arange(3).repeat_interleave(5), torch.arange(3).repeat_interleave(4)
    if way == "rest" and shots == 5:
        with pytest.raises(SystemExit, match="with 5 images per class there is no rest; take fewer"):
            study.divide(way, train, val, shots, 0)
        return
    labels = torch.cat([train, val])
    parts = [study.divide(way, train, val, shots, seed) for seed in (0, 1)]
    for chosen, validated, tested in parts:
        assert labels[chosen].bincount().tolist() == [shots] * 3
        together = torch.cat([chosen, validated, tested])
        assert len(together) == len(together.unique())
        assert len(validated) == {"half": 6, "rest": 3 * (5 - shots), "none": 0}[way]
        assert len(tested) == (6 if way == "half" else 12)
    (first, _, test), (second, _, other_test) = parts
    anew = way == "none" and shots == 5
    assert set(first.tolist()) != set(second.tolist()) or (way == "half" and shots == 5)
    assert (set(test.tolist()) != set(other_test.tolist())) == anew


def test_rows_that_cannot_be_paired_are_refused(tmp_path: Path, study: ModuleType) -> None:
    def written(name: str, **row: str) -> Path:
        path = tmp_path / name
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, study.FIELDS, restval="")
            table.writeheader()
            table.writerow({"shots": "5", "test": "0.5", "calibration": "0.1", "trained": "1", "seconds": "1"} | row)
        return path

    ridge = written("ridge.csv", method="ridge", seed="0")
    other = written("other.csv", method="full FT", seed="1", lr="0.1")
    chosen = written("chosen.csv", method="full FT", seed="0", lr="0.1", val="0.5")
    with pytest.raises(SystemExit, match=r"a row of ridge for each split, got none at 5 images for \['1'\]"):
        study.paired([ridge, other])
    with pytest.raises(SystemExit, match="expected rows of --validation none"):
        study.paired([ridge, chosen])
    with pytest.raises(SystemExit, match="expected full FT with one setting at 5 images, got it with 0"):
        study.paired([ridge], "full FT")


def test_gains_are_drawn_in_a_panel_a_set(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gains = importlib.import_module("gains")
    file, out = tmp_path / "rows.csv", tmp_path / "gains.png"
    with file.open("w", newline="") as opened:
        table = csv.DictWriter(opened, study.FIELDS, restval="")
        table.writeheader()
        for shots, seed in itertools.product((5, 20), range(2)):
            for method, test in (("ridge", 0.5), ("full FT", 0.4 + 0.1 * seed), ("BitFit", 0.9)):
                lr = "" if method == "ridge" else "0.1"
                table.writerow({"method": method, "shots": shots, "seed": seed, "lr": lr, "test": test})
    found = gains.curves([file], ["layer FT", "full FT"])
    assert found == {"full FT": [(shots, pytest.approx(-5), pytest.approx(5)) for shots in (5, 20)]}
    monkeypatch.setattr(sys, "argv", ["gains.py", "--out", str(out), *(2 * ["--set", "digits", str(file)])])
    gains.main()
    with Image.open(out) as picture:
        assert picture.size == (1008, 532)  # two panels of 3.6 by 3.8 inches at 140 dots an inch


@pytest.mark.slow
def test_sources_are_pre_trained_and_measured_once(textures: Path) -> None:
    out, methods = textures / "sources.csv", ["random weights", "ce", "SupCon, mlp head"]
    words = ["run", str(textures), str(textures), "--out", str(out), "--runs", str(textures / "runs"), "--classes", "2"]
    words += ["--epochs", "2", "--shots", "4", "--seeds", "1", "--methods", *methods]
    said = _run("sources.py", *words)
    rows = _rows(out)
    assert [row["method"] for row in rows] == methods
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("source_acc", f"{textures.name}_acc"))
    assert len({row["nc1"] for row in rows}) == 3
    assert sorted(path.name for path in (textures / "runs" / "first2" / "train").iterdir()) == ["0", "1"]
    assert "method=" in said
    assert "method=" not in _run("sources.py", *words)
    out.unlink()
    (textures / "runs" / "ce-seed1" / "checkpoints" / "last.ckpt").unlink()  # as if interrupted in its first epoch
    _run("sources.py", *words)
    assert [row["nc1"] for row in _rows(out)] == [row["nc1"] for row in rows]
    table = _run("sources.py", "table", str(out)).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in table[2:5]] == sorted(
        methods, key=lambda name: float(rows[methods.index(name)]["nc1"])
    )
    words = ["directions", str(textures), "--runs", str(textures / "runs"), "--classes", "2", "--epochs", "2"]
    words += ["--seed", "1", "--methods", *methods]
    (textures / "runs" / "ce-seed1" / "checkpoints" / "last.ckpt").unlink()
    lines = [line.strip("| ").split(" | ") for line in _run("sources.py", *words).splitlines()[2:]]
    assert [cells[0] for cells in lines] == [methods[0], methods[2]]
    # Of two classes there is one direction.
    assert all(cells[1] == cells[3] and cells[2] == "0 of 1" for cells in lines)


def test_directions_of_class_means_add_up_to_nc1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three classes at (4, 0), (-4, 1), (0, -1) with the variances 1 and 4 within them: axes are not the directions."""
    monkeypatch.syspath_prepend(FOLDER)
    sources = importlib.import_module("sources")
    means = torch.tensor([[4.0, 0.0], [-4.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    cross = torch.tensor([[1.0, 0], [-1, 0], [0, 2], [0, -2]], dtype=torch.float64) * 2**0.5
    features = (means[:, None] + cross).reshape(-1, 2)
    moments = class_moments(features, torch.arange(3).repeat_interleave(4), 3)
    shares, terms = sources.directions_of(moments)
    squares, vectors = torch.linalg.eigh(means.T @ means)
    within = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(shares, squares.flip(0) / squares.sum())
    torch.testing.assert_close(terms, ((vectors.T @ within @ vectors).diagonal() / squares).flip(0))
    torch.testing.assert_close(terms.sum(), nc1(moments))


def test_rank_correlations_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods whose accuracy on one set falls with collapse and on the other rises."""
    monkeypatch.syspath_prepend(FOLDER)
    sources = importlib.import_module("sources")
    # Losses and heads have four of these: the fifth differs by its augmentation.
    methods = ["ce", "mse", "SupCon", "SupCon, mlp head", "ce, plain", *sources.UNRANKED]
    with (tmp_path / "sources.csv").open("w", newline="") as file:
        fields = ["method", "seed", "epochs", *sources.MEASURES, "source_acc", "other_acc", "seconds"]
        table = csv.DictWriter(file, fields)
        table.writeheader()
        for place, method in enumerate(methods):
            for seed in range(2):
                numbers = dict.fromkeys(sources.MEASURES, place + 1 + 0.1 * seed)
                accuracies = {"source_acc": 0.9 - 0.1 * place, "other_acc": 0.1 * place}
                table.writerow({"method": method, "seed": seed, "epochs": 3, **numbers, **accuracies, "seconds": 7})
    lines = sources.table(tmp_path / "sources.csv").splitlines()
    assert lines[2] == f"| ce | 2 |{' 1.05 ± 0.071 |' * 4} 90 ± 0 | 0 ± 0 | 7 |"
    of_all = [line for line in lines if line.startswith("| all that were trained (5) | nc1")]
    assert [cell.strip() for cell in of_all[0].split("|")[3:5]] == ["-1.00 (0.017)", "1.00 (0.017)"]  # 2 of 120 orders
    assert any(line.startswith("| losses and heads (4) | cdnv") for line in lines)
    assert not any(line.startswith("| radii") for line in lines)


def test_transfer_is_drawn_against_collapse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    transfer = importlib.import_module("transfer")
    file, out = tmp_path / "sources.csv", tmp_path / "transfer.png"
    lines = ["method,seed,nc1,cdnv,source_acc,photos_acc", "ce,0,1,0.1,0.9,0.5", "ce,1,3,0.1,0.9,0.7"]
    file.write_text("\n".join([*lines, '"SupCon, mlp head",0,9,2,0.8,0.4']))
    found = transfer.means(file)
    assert list(found) == ["ce", "SupCon, mlp head"]
    assert found["ce"] == pytest.approx({"seed": 0.5, "nc1": 2, "cdnv": 0.1, "source_acc": 0.9, "photos_acc": 0.6})
    monkeypatch.setattr(sys, "argv", ["transfer.py", str(file), "--measures", "nc1", "cdnv", "--out", str(out)])
    transfer.main()
    with Image.open(out) as picture:
        assert picture.size == (1176, 420)  # a row of two panels of 3.4 by 3 inches, and a legend, at 140 dots an inch


@pytest.mark.slow
def test_suggestions_are_held_against_a_search_of_all_methods(textures: Path) -> None:
    out, searches = textures / "tries.csv", {"suggest", "expansion", "measures", "exhaustive"}
    (textures / "val").rename(textures / "test")
    words = ["run", str(textures), "--checkpoint", str(textures / "weights.pth"), "--out", str(out), "--size", "32"]
    words += ["--backbone", "{name: mobilenetv3_small_050}", "--shots", "4", "--seeds", "3", "--epochs", "1"]
    said = _run("suggestions.py", *words, "--blocks", "1")
    assert {line.split()[0] for line in said.splitlines()} == searches
    rows = _rows(out)
    tested = {row["method"]: float(row["test"]) for row in rows if row["search"] == "exhaustive"}
    blocks = {name.removeprefix("layer FT ") for name in tested if name.startswith("layer FT")}
    assert {name.removeprefix("SCL FT ") for name in tested if name.startswith("SCL FT")} == blocks
    assert {"nearest mean", "LDA", "ridge", "ridge, skips", "full FT"} < set(tested)
    assert all(0 <= accuracy <= 1 for accuracy in tested.values())
    assert {row["fitted"] for row in rows if row["search"] == "expansion" and row["gain"]} == {"0"}
    assert sum(row["fitted"] == "1" for row in rows if row["search"] == "suggest" and row["gain"]) == 2
    assert _run("suggestions.py", *words, "--blocks", "1") == ""
    assert (
        len(_run("suggestions.py", "table", str(out)).splitlines()) == 2 + 10
    )  # a heading, and the rules for a single try


def test_regret_of_suggestions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two draws of two blocks: one method is best in the first, another in the second."""
    monkeypatch.syspath_prepend(FOLDER)
    suggestions = importlib.import_module("suggestions")
    tests = {"ridge, skips": (0.5, 0.6), "full FT": (0.4, 0.5), "layer FT a": (0.8, 0.7), "layer FT b": (0.6, 0.9)}
    rows = []
    for seed in range(2):
        known = {"data": "digits", "shots": 5, "seed": seed}
        rows += [
            {**known, "search": "exhaustive", "method": n, "test": t[seed], "seconds": 5} for n, t in tests.items()
        ]
        rows += [
            {**known, "search": search, "method": method, "predicted": accuracy, "error": 0.1, "seconds": 1}
            | {"gain": gain, "gain_error": gain and 0.1, "trained": 9, "fitted": int(search == "suggest")}
            for search, gained in (("suggest", 0.02), ("expansion", 0.0))
            for method, accuracy, gain in (("ridge, skip from a", 0.72, ""), ("layer FT a", 0.72, gained))
        ]
        rows += [
            {**known, "search": "measures", "method": f"{measure} {block}", "predicted": value}
            for measure in suggestions.MEASURES
            for block, value in (("a", -2.0), ("b", -1.0))
        ]
    with (tmp_path / "tries.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, suggestions.FIELDS)
        table.writeheader()
        table.writerows(rows)
    lines = [line.split(" | ") for line in suggestions.table([tmp_path / "tries.csv"]).splitlines()[2:]]
    found = {line[3]: line[4:] for line in lines}
    assert found["suggest"] == ["10.0 ± 10.0", "1 of 2", "-3.0 ± 5.0", "1 of 2", "5 |"]  # off by -8 and 2 points
    assert found["expansion"][:2] == ["30.0 ± 0.0", "0 of 2"]
    assert found["best in the other tries"][0] == "20.0 ± 0.0"  # a in the second, b in the first
    assert found["k-NN"][0] == found["last block"][0] == "10.0 ± 10.0"
    assert found["random block"][0] == "10.0 ± 0.0"  # the mean of both blocks
    below = [line.split(" | ") for line in suggestions.paired([tmp_path / "tries.csv"]).splitlines()[2:]]
    pairs = {name.removeprefix("| "): cells for name, *cells in below}
    assert pairs["expansion"] == ["2", "20.0 ± 10.0", f"{ttest_1samp([30, 10], 0).pvalue:.2g} |"]
    assert pairs["random block"][:2] == ["2", "0.0 ± 10.0"]
    with (tmp_path / "again.csv").open(
        "w", newline=""
    ) as file:  # of the first draw, which now proposes the closed form
        table = csv.DictWriter(file, suggestions.FIELDS)
        table.writeheader()
        table.writerows({**row, "gain": row["gain"] and 0.0} for row in rows[:6] if row["search"] == "suggest")
    again = suggestions.table([tmp_path / "tries.csv", tmp_path / "again.csv"]).splitlines()
    assert next(line.split(" | ")[4] for line in again if " suggest " in line) == "25.0 ± 5.0"


@pytest.mark.slow
def test_downstream_collapse_is_measured_of_every_method(textures: Path) -> None:
    out = textures / "rows.csv"
    (textures / "val").rename(textures / "test")
    words = ["run", str(textures), "--checkpoint", str(textures / "weights.pth"), "--out", str(out), "--size", "32"]
    words += ["--backbone", "{name: mobilenetv3_small_050}", "--shots", "4", "--seeds", "3", "4", "--epochs", "1"]
    _run("downstream.py", *words, "--every", "8")
    rows = _rows(out)
    methods = [row["method"] for row in rows if row["seed"] == "3"]
    assert [methods[0], methods[-1]] == ["linear probe", "full FT"]
    assert len(methods) == len(rows) / 2
    of_blocks = [sum(name.startswith(f"{kind} FT") for name in methods) for kind in ("layer", "SCL")]
    assert of_blocks == [len(methods) / 2 - 1] * 2
    assert all(float(row[name]) > 0 for row in rows for name in ("nc1", "cv_nc1", "refit_nc1", "test_nc1"))
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("refit_acc", "test"))
    assert all(0 <= float(row["refit_loss"]) <= 2 for row in rows)
    assert _run("downstream.py", *words, "--every", "8") == ""
    assert len(_run("downstream.py", "table", str(out)).splitlines()) == 2 + 6


@pytest.mark.slow
def test_what_is_measured_of_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the classifier's input, training and test images apart, and each fold in a network without it."""
    monkeypatch.syspath_prepend(FOLDER)
    downstream = importlib.import_module("downstream")
    backbone = Backbone("resnet18", stem="cifar", in_chans=1, channels=[4, 6, 8, 10])
    images, labels = torch.randn(30, 1, 8, 8), torch.arange(30) % 3
    bench = Bench(backbone, images, labels, 3, folds_of(labels, 3), 8, 1e-2, 2, downstream.trainer)
    method = Method("SCL FT", {"train": "layer2.0", "skip_from": "layer2.0", "head_init": "ridge"})
    test = torch.randn(12, 1, 8, 8), torch.arange(12) % 3
    found = downstream.measured(bench, method, test, 0)
    model = bench.fitted(method, torch.arange(30), 0).eval()

    def joined(model: FineTuner, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            stages = model.backbone.stages(x, ["layer2.0", "penultimate"])
            return torch.nn.functional.pad(stages["layer2.0"], (0, 4)) + stages["penultimate"]

    with torch.no_grad():
        assert found["test"] == (model(test[0]).argmax(1) == test[1]).double().mean().item()
    features = joined(model, images)
    assert found["nc1"] == pytest.approx(nc1(class_moments(features, labels, 3)).item(), rel=1e-5)
    assert found["test_nc1"] == pytest.approx(
        downstream.held_out_nc1(features, labels, joined(model, test[0]), test[1]).item(), rel=1e-5
    )
    moments = FoldMoments(3, 3)
    moments.update(features, labels)
    assert found["cv_nc1"] == pytest.approx(moments.nc1().item(), rel=1e-5)
    refit, error, right = 0.0, 0.0, 0
    for fold in range(3):
        held = bench.folds == fold
        refitted = bench.fitted(method, (~held).nonzero().squeeze(1), 0).eval()
        own = joined(refitted, images)
        refit += downstream.held_out_nc1(own[~held], labels[~held], own[held], labels[held]).item() / 3
        with torch.no_grad():
            scores = refitted(images[held])
        error += (scores.softmax(1) - torch.eye(3)[labels[held]]).square().sum().item() / 30
        right += int((scores.argmax(1) == labels[held]).sum())
    assert found["refit_nc1"] == pytest.approx(refit, rel=1e-5)
    assert (found["refit_loss"], found["refit_acc"]) == (pytest.approx(error, rel=1e-5), pytest.approx(right / 30))


def test_rank_correlations_of_downstream_collapse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two whole draws in which accuracy falls with all kinds of NC1, and a third that broke off and would turn them."""
    monkeypatch.syspath_prepend(FOLDER)
    downstream = importlib.import_module("downstream")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, downstream.FIELDS)
        table.writeheader()
        for seed in range(3):
            for place in range(6 if seed < 2 else 2):
                number = place if seed < 2 else 50 - 20 * place
                numbers = dict.fromkeys(downstream.MEASURES, number) | {"refit_acc": -number, "test": -place / 100}
                row = {"data": "digits", "shots": 5, "seed": seed, "method": str(place), "seconds": 1}
                table.writerow(row | numbers)
    lines = [line.strip("| ").split(" | ") for line in downstream.table([tmp_path / "rows.csv"]).splitlines()[2:]]
    assert [line[4] for line in lines] == list(downstream.MEASURES)
    for line in lines:
        sign = "1.00" if line[4] == "refit_acc" else "-1.00"
        assert line[:4] == ["digits", "5", "2", "6"]
        assert line[5:] == [f"{sign} ± 0.00", f"{sign} (0.0028)", "0.0 ± 0.0"]  # 2 of 720 orders
    rows = [{"nc1": "1", "refit_acc": "0.5", "test": "0.70"}, {"nc1": "2", "refit_acc": "0.6", "test": "0.75"}]

    def lost(name: str) -> float:
        return downstream.regret(downstream.best_first(rows, name), downstream.tests(rows))

    assert [lost(name) for name in ("nc1", "refit_acc")] == [pytest.approx(5), 0]
    rows.append({"nc1": "3", "refit_acc": "0.6", "test": "0.65"})
    assert lost("refit_acc") == pytest.approx(5)  # a tie of 0.75 and 0.65


@pytest.mark.slow
def test_sources_are_ranked_and_tuned(textures: Path) -> None:
    """The numbers of scan and of a ridge head, for networks that were pre-trained here, and each of them once."""
    sources, runs, out = textures / "sources.csv", textures / "runs", textures / "ranks.csv"
    words = ["run", str(textures), "--out", str(sources), "--runs", str(runs), "--classes", "3", "--epochs", "2"]
    words.insert(2, str(textures))
    _run("sources.py", *words, "--shots", "4", "--seeds", "1", "--methods", "random weights", "ce", "mse")
    ranked = ["run", str(sources), str(runs), str(textures), "--out", str(out), "--shots", "4", "--seeds", "3"]
    ranked += ["--epochs", "1", "--tested", "5", "--precision", "32-true"]
    assert len(_run("ranking.py", *ranked).splitlines()) == 2
    assert _run("ranking.py", *ranked) == ""
    rows = _rows(out)
    assert [row["network"] for row in rows] == ["ce-seed1", "mse-seed1"]
    known = {row["method"]: row for row in _rows(sources)}
    for here, there in {"source_nc1": "nc1", "source_nc1_ratio": "nc1_ratio", "source_acc": "source_acc"}.items():
        assert [row[here] for row in rows] == [known[name][there] for name in ("ce", "mse")]
    spec = {"name": "resnet18", "stem": "cifar", "channels": [32, 64, 128, 256]}
    backbone = Backbone(**spec, checkpoint=str(runs / "mse-seed1" / "checkpoints" / "last.ckpt")).eval()
    data = ImageFolder(str(textures), {"train": "train", "test": "val"}, image_size=32, shots=4, seed=3, num_workers=0)
    (train, labels), (test, truth) = (_features(backbone, data, stage) for stage in ("fit", "test"))
    head = ridge(train, labels, 3)
    assert float(rows[1]["loo_accuracy"]) == pytest.approx(float((head.loo_scores.argmax(1) == labels).double().mean()))
    ways = head.held_out()
    assert float(rows[1]["accuracy"]) == pytest.approx(float((ways.argmax(2) == labels).double().mean()))
    assert float(rows[1]["nc1"]) == pytest.approx(float(nc1(class_moments(train, labels, 3))), rel=1e-4)
    first = torch.cat([(truth == label).nonzero().squeeze(1)[:5] for label in range(3)])
    right = head.scores(test[first]).argmax(1) == truth[first]
    assert float(rows[1]["ridge"]) == pytest.approx(float(right.double().mean()))
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("layer FT", "full FT"))
    shown = _run("ranking.py", "table", str(out)).splitlines()
    assert len(shown) == 3 * (3 + 14) + 4
    less = [
        100 * sum(float(row[name]) - float(row["ridge"]) for row in rows) / 2 for name in ("accuracy", "loo_accuracy")
    ]
    assert [float(line.strip("| ").split(" | ")[1]) for line in shown[-2:]] == pytest.approx(less, abs=0.051)


def _features(backbone: Backbone, data: ImageFolder, stage: str) -> tuple[torch.Tensor, torch.Tensor]:
    data.setup(stage)
    loader = data.train_plain_dataloader() if stage == "fit" else data.test_dataloader()
    batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
    with torch.no_grad():
        return torch.cat([backbone(images) for images, _ in batches]), torch.cat([labels for _, labels in batches])


def test_rank_correlations_of_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two whole draws of four networks in which measures are right but for CDNV, and one that broke off."""
    monkeypatch.syspath_prepend(FOLDER)
    ranking = importlib.import_module("ranking")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ranking.FIELDS)
        table.writeheader()
        for seed in range(3):
            for place in range(4 if seed < 2 else 3):
                numbers = {name: -sign * place for name, sign in ranking.MEASURES.items()} | {"cdnv": place}
                accuracies = dict.fromkeys(ranking.OUTCOMES, (0.1, 0.2, 0.3, 0.8)[place] if seed < 2 else -place)
                row = {"data": "photos", "shots": 5, "seed": seed, "network": str(place), "seconds": 1}
                table.writerow(row | numbers | accuracies)
    lines = [line.strip("| ").split(" | ") for line in ranking.table(tmp_path / "rows.csv").splitlines()]
    assert [line[0] for line in lines if line[-1] == "photos, 5: 2 draws of 4"] == [
        *ranking.OUTCOMES,
        "predicted less tested",
    ]
    found = {line[0]: line[1] for line in lines if line[0] in ("chance", *ranking.MEASURES)}
    assert len(lines) == 3 * (3 + len(found)) + 4
    predicted = {name: found.pop(name) for name in ranking.ACCURACIES}
    assert set(predicted.values()) == {"115.0 ± 0.0"}  # a mean of 1.5 less one of 0.35
    assert found.pop("chance") == "45.0 ± 0.0"  # 0.8 less a mean of 0.35
    assert found.pop("cdnv") == "-1.00 ± 0.00; -1.00 (0.083); 70.0 ± 0.0"  # 2 of 24 orders
    assert set(found.values()) == {"1.00 ± 0.00; 1.00 (0.083); 0.0 ± 0.0"}


def test_collapse_of_held_out_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the pseudo-inverse; held-out features that are the others have the others' NC1."""
    monkeypatch.syspath_prepend(FOLDER)
    held_out_nc1 = importlib.import_module("downstream").held_out_nc1
    rng = np.random.default_rng(0)
    labels, held_labels = np.arange(40) % 4, np.arange(12) % 4
    features, held = rng.normal(size=(40, 6)) + labels[:, None], rng.normal(size=(12, 6)) + held_labels[:, None]
    means = np.stack([features[labels == label].mean(0) for label in range(4)])
    between = (means - means.mean(0)).T @ (means - means.mean(0)) / 4

    def expected(rows: np.ndarray, own: np.ndarray) -> float:
        scatter = (rows - means[own]).T @ (rows - means[own]) / len(rows)
        return np.trace(scatter @ np.linalg.pinv(between, rcond=1e-10)) / 4

    tensors = [torch.from_numpy(array) for array in (features, labels, held, held_labels)]
    assert held_out_nc1(*tensors).item() == pytest.approx(expected(held, held_labels))
    of_all = nc1(class_moments(tensors[0], tensors[1], 4)).item()
    assert held_out_nc1(*tensors[:2], *tensors[:2]).item() == pytest.approx(of_all)
    assert of_all == pytest.approx(expected(features, labels))
    flat = features * np.array([1, 1, 0, 0, 0, 0])  # class means in a plane, and features that are always 0
    of_all = nc1(class_moments(torch.from_numpy(flat), tensors[1], 4)).item()
    assert held_out_nc1(torch.from_numpy(flat), tensors[1], torch.from_numpy(flat), tensors[1]).item() == pytest.approx(
        of_all
    )

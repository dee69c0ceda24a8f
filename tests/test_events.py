"""Event files: the numbers that TensorBoard reads, and what it doesn't say of damaged files."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from ncfinetune.events import read_events
from ncfinetune.runs import Run

VALUES = [0.5, 0.25, 2.0, -1.0]


def _write(run: Path, values: list[float], first: int = 0, suffix: str = "", new_style: bool = False) -> Path:
    with SummaryWriter(str(run), filename_suffix=suffix) as writer:
        for step, value in enumerate(values, first):
            writer.add_scalar("val/acc", value, step, new_style=new_style)
            writer.add_scalar("val/loss", 2 * value, step, new_style=new_style)
            writer.add_image("figure", torch.rand(3, 64, 64), step)
    return next(run.glob(f"*{suffix}"))


@pytest.mark.parametrize("new_style", [False, True])
def test_numbers_are_those_that_tensorboard_reads(new_style: bool, tmp_path: Path) -> None:
    _write(tmp_path, VALUES, new_style=new_style)
    points, faults = read_events(tmp_path)
    assert faults == []
    assert points == {"val/acc": [*enumerate(VALUES)], "val/loss": [(step, 2 * v) for step, v in enumerate(VALUES)]}
    theirs = EventAccumulator(str(tmp_path)).Reload()
    if not new_style:
        assert [(event.step, event.value) for event in theirs.Scalars("val/acc")] == points["val/acc"]


def test_every_point_is_read(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(11_000):  # TensorBoard keeps a sample of 10,000 at most
            writer.add_scalar("val/acc", step % 7, step)
    assert read_events(tmp_path)[0]["val/acc"] == [(step, step % 7) for step in range(11_000)]


@pytest.mark.parametrize("tag", ["a", "val/acc", "é/$x|y\n", "t" * 120, "t" * 400])
def test_records_of_all_sizes_are_those_of_the_library(tag: str, tmp_path: Path) -> None:
    """Steps of one byte to six, whose records are decoded at once or by the library, and come in their order."""
    steps = [0, 1, 127, 128, 16_383, 16_384, 2**21, 2**28, 2**35 - 1, 2**35, 5, 200]
    with SummaryWriter(str(tmp_path)) as writer:
        for place, step in enumerate(steps):
            writer.add_scalar(tag, 0.5 + place, step)
            writer.add_scalar("other", -place, step, new_style=place % 2 == 0)
    points, faults = read_events(tmp_path)
    assert faults == []
    assert points[tag] == [(step, 0.5 + place) for place, step in enumerate(steps)]
    assert points["other"] == [(step, -place) for place, step in enumerate(steps)]


def test_a_record_that_is_no_event_ends_what_is_taken(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("a", 1.0, 1)
    (path,) = tmp_path.glob("events*")
    good = path.read_bytes()
    with path.open("ab") as file:
        RecordWriter(file).write(b"\xff" * 20)
        file.write(good)
    points, faults = read_events(tmp_path)
    assert points == {"a": [(1, 1.0)]}
    assert faults[0].endswith("; numbers until step 1 are taken")


def test_values_that_are_not_finite_are_read(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step, value in enumerate([float("inf"), float("-inf"), float("nan")]):
            writer.add_scalar("a", value, step)
    values = [value for _, value in read_events(tmp_path)[0]["a"]]
    assert values[:2] == [float("inf"), float("-inf")]
    assert values[2] != values[2]


def test_a_run_that_goes_on_is_one_curve(tmp_path: Path) -> None:
    _write(tmp_path, VALUES, suffix=".0")
    _write(tmp_path, [7.0, 8.0, 9.0], first=2, suffix=".1")
    assert Run(tmp_path).scalars["val/acc"] == [0.5, 0.25, 7.0, 8.0, 9.0]
    assert Run(tmp_path).last("val/acc") == 9.0


def test_files_of_one_process_come_in_their_order(tmp_path: Path) -> None:
    for number, value in ((10, 2.0), (9, 1.0)):
        path = _write(tmp_path, [value], suffix=".new")
        path.rename(tmp_path / f"events.out.tfevents.1700000000.host.7.{number}")
    assert Run(tmp_path).scalars["val/acc"] == [2.0]
    assert Run(tmp_path).last("val/acc") == 2.0


@pytest.mark.parametrize(
    ("cut", "what"), [(3, "cut within the record at byte"), (12, "cut within"), (-1, "has a wrong checksum")]
)
def test_damage_is_said_with_the_last_good_step(
    cut: int, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write(tmp_path, VALUES)
    content = bytearray(path.read_bytes())
    start = content.rindex(b"val/acc")  # the last one
    if cut < 0:
        content[start + len("val/acc") + 3] ^= 1
    path.write_bytes(content if cut < 0 else content[: start + cut - 10])
    values = Run(tmp_path).scalars
    assert values["val/acc"] == VALUES[:3]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"warning: {path}: ")
    assert what in said
    assert said.endswith("; numbers until step 2 are taken")


def test_a_file_that_holds_nothing_is_said_too(tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents.0"
    path.write_bytes(b"no record at all, and longer than a head")
    assert read_events(tmp_path) == (
        {},
        [f"{path}: the record at byte 0 has a wrong checksum; no number in it is taken"],
    )
    path.write_bytes(b"")
    assert read_events(tmp_path) == ({}, [])


def test_records_of_another_kind_are_said(tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents.1.host"
    with path.open("wb") as file:
        RecordWriter(file).write(b"\xff" * 20)
    values, faults = read_events(tmp_path)
    assert values == {}
    assert faults[0].startswith(f"{path}: ")
    assert faults[0].endswith("; no number in it is taken")

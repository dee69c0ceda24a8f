"""Files that cannot be written, or are not what was written: one line, nothing half-written, and no training lost."""

import errno
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import QUIET, _refusal

from ncfinetune import Backbone, Supervised
from ncfinetune.cli import main
from ncfinetune.predictions import Table

NETWORK = {"name": "test_vit", "img_size": 8, "patch_size": 4, "in_chans": 1}
NAMED = ["--model.backbone", json.dumps(NETWORK), "--data", "Digits", "--data.shots", "5"]
FULL = "[Errno 28] No space left on device"


pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files that a training leaves, by what they are."""
    folder = tmp_path_factory.mktemp("trained")
    command = ["fit", *QUIET, "--trainer.max_epochs", "1", "--model", "Supervised", *NAMED]
    assert main([*command, "--trainer.logger.init_args.save_dir", str(folder)]) is None
    run = folder / "version_0"
    checkpoint = next((run / "checkpoints").glob("*.ckpt"))
    for suffix in ("pth", "safetensors"):
        assert main(["export", str(checkpoint), str(folder / f"backbone.{suffix}")]) == 0
    files = {"ckpt": checkpoint, "yaml": run / "config.yaml", "events": next(run.glob("events*"))}
    files |= {suffix: folder / f"backbone.{suffix}" for suffix in ("pth", "safetensors")}
    return {name: path.read_bytes() for name, path in files.items()}


def _put(trained: dict[str, bytes], folder: Path) -> Path:
    """A run's folder of these files."""
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "a.ckpt").write_bytes(trained["ckpt"])
    (run / "config.yaml").write_bytes(trained["yaml"])
    (run / "events.out.tfevents.1.host.1.0").write_bytes(trained["events"])
    return run


def _full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def _half(content: Any, path: Any, *_: Any) -> None:
    """Writes something, until the disk is full."""
    Path(path).write_bytes(b"half")
    _full()


def _flipped(content: bytes, part: float) -> bytes:
    changed = bytearray(content)
    changed[int(part * len(changed))] ^= 4
    return bytes(changed)


def test_a_delta_that_cannot_be_written_leaves_the_training(
    trained: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.safetensors").write_bytes(trained["safetensors"])
    model = ["--model", "FineTuner", "--model.checkpoint", str(tmp_path / "b.safetensors"), "--model.train", "blocks.0"]
    place = ["--trainer.logger.init_args.save_dir", str(tmp_path / "runs")]
    monkeypatch.setattr("ncfinetune.delta.save_file", _half)
    error = _refusal(capsys, "fit", *QUIET, "--trainer.max_epochs", "1", *model, *NAMED, *place)
    kept = tmp_path / "runs" / "version_0" / "checkpoints"
    assert error == (
        f"error: cannot write '{kept / 'delta.safetensors'}': {FULL}; make room there, or choose another folder"
    )
    assert [path.name for path in kept.iterdir()] == ["epoch=0-step=1.ckpt"]
    assert torch.load(kept / "epoch=0-step=1.ckpt", weights_only=True)["global_step"] == 1


@pytest.mark.parametrize(("suffix", "writer"), [("safetensors", "save_file"), ("pth", "torch.save")])
def test_an_export_that_cannot_be_written_leaves_the_old_one(
    suffix: str,
    writer: str,
    trained: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, path = _put(trained, tmp_path), tmp_path / "out" / f"b.{suffix}"
    path.parent.mkdir()
    path.write_bytes(b"old")
    monkeypatch.setattr(f"ncfinetune.weight_files.{writer}", _half)
    error = _refusal(capsys, "export", str(run / "checkpoints" / "a.ckpt"), str(path))
    assert error == f"error: cannot write '{path}': {FULL}; make room there, or choose another folder"
    assert [(file.name, file.read_bytes()) for file in path.parent.iterdir()] == [(path.name, b"old")]


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_a_saved_file_can_be_read_by_those_who_can_read_any_new_file(name: str, tmp_path: Path) -> None:
    (tmp_path / f".{name}.part").touch(0o600)  # what a killed process has left
    Backbone("resnet18", channels=[4, 6, 8, 10]).save(tmp_path / name)
    (tmp_path / "plain").touch()
    assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_that_cannot_be_made_is_named(
    trained: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _put(trained, tmp_path)
    (tmp_path / "file").write_text("x")
    error = _refusal(capsys, "export", str(run / "checkpoints" / "a.ckpt"), str(tmp_path / "file" / "b.pth"))
    assert error.startswith(f"error: cannot write '{tmp_path / 'file' / 'b.pth'}': [Errno 17]")


def test_a_configuration_that_cannot_be_written_leaves_the_old_one(
    trained: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _put(trained, tmp_path)
    monkeypatch.setattr("ncfinetune.trainer_cli.PlainParser.save", lambda self, config, path, **_: _half(config, path))
    place = ["--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.logger.init_args.version", "run"]
    resume = ["--ckpt_path", str(run / "checkpoints" / "a.ckpt"), "--trainer.max_epochs", "2"]
    error = _refusal(capsys, "fit", "--config", str(run / "config.yaml"), *place, *resume)
    assert error == f"error: cannot write '{run / 'config.yaml'}': {FULL}; make room there, or choose another folder"
    assert (run / "config.yaml").read_bytes() == trained["yaml"]
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_predictions_on_a_full_disk_keep_whole_rows(suffix: str, tmp_path: Path) -> None:
    table = Table(tmp_path / f"p.{suffix}", "index", ["a", "b"])
    table.add([0, 1], torch.tensor([[0.25, 0.75], [1.0, 0.0]]), ["", ""])
    real, limit = table._file, [40]

    class Disk(io.RawIOBase):
        """Takes a few bytes more."""

        def __init__(self, path: Path) -> None:
            self.file = path.open("ab", buffering=0)

        def writable(self) -> bool:
            return True

        def close(self) -> None:
            super().close()
            self.file.close()

        def write(self, data: Any) -> int:
            taken = bytes(data)[: limit[0]]
            limit[0] -= len(taken)
            if not taken:
                _full()
            return self.file.write(taken)

    if suffix == "csv":
        import csv

        real._file.close()
        real._file = io.TextIOWrapper(io.BufferedWriter(Disk(table.partial)), newline="")
        real._table = csv.writer(real._file)
    else:
        real._writer.write_table = _full
    message = rf"^cannot write '.*p.{suffix}': \[Errno 28\] No space left on device; make room there, or choose another"
    with pytest.raises(OSError, match=message):
        table.add(range(2, 9), torch.full((7, 2), 0.5), [""] * 7)
    assert table.keep()
    assert table.rows == 2
    if suffix == "csv":
        lines = ["index,prediction,a,b,error", "0,b,0.250000,0.750000,", "1,a,1.000000,0.000000,", ""]
        assert table.partial.read_bytes().decode().split("\r\n") == lines
    assert not table.path.exists()


def test_predictions_that_cannot_be_ended_are_removed(tmp_path: Path) -> None:
    table = Table(tmp_path / "p.parquet", "index", ["a", "b"])
    table._file._writer.close()
    table._file.close = _full
    assert not table.keep()
    assert list(tmp_path.iterdir()) == []


def test_predict_says_what_it_could_not_write(
    trained: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = _put(trained, tmp_path), tmp_path / "p.csv"
    monkeypatch.setattr("ncfinetune.predictions._CSV.write", _full)
    command = ("predict", "--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints/a.ckpt"))
    assert main([*command, "--predictions", str(out), "--trainer.logger", "false"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-2:]
    assert said == [
        f"0 predictions so far: {out}.partial",
        f"error: cannot write '{out}': {FULL}; make room there, or choose another folder",
    ]
    assert (run / "checkpoints" / "a.ckpt").read_bytes() == trained["ckpt"]


def _legacy(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a", "b")
    return buffer.getvalue()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut at its head": lambda content: content[:100],
    "cut in its middle": lambda content: content[: len(content) // 2],
    "cut at its end": lambda content: content[:-1],
    "text": lambda content: b"hello\nworld\n",
    "another zip file": lambda content: _zip(),
    "a pickle": lambda content: pickle.dumps([1, 2]),
    "torch's of a list": lambda content: _legacy([1, 2]),
    "torch's of nothing": lambda content: _legacy({"state_dict": 3, "pytorch-lightning_version": "2.0"}),
    "torch's of numbers": lambda content: _legacy({"state_dict": {1: torch.zeros(2)}, "data": [1]}),
    "a flipped bit": lambda content: _flipped(content, 0.4),
    "a flipped bit before": lambda content: _flipped(content, 0.2),
}
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "checkpoint": ("ckpt", lambda path: _command("test", path)),
    "resumed": ("ckpt", lambda path: _command("fit", path)),
    "exported": ("ckpt", lambda path: _error(["export", str(path), str(path.with_name("out.pth"))])),
    "loaded": ("ckpt", lambda path: Supervised.load_from_checkpoint(path)),
    "safetensors": ("safetensors", lambda path: Backbone(**NETWORK, checkpoint=str(path))),
    "pth": ("pth", lambda path: Backbone(**NETWORK, checkpoint=str(path))),
}


def _command(name: str, path: Path) -> None:
    config = str(path.parent.parent / "config.yaml")
    _error([name, "--config", config, "--ckpt_path", str(path), "--trainer.logger", "false"])


def _error(command: list[str]) -> None:
    """The command's one line as an exception."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", printed)
        try:
            status = main(command)
        except SystemExit as stop:
            status = stop.code
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("error: ")]
    if status == 2 and len(lines) == 1:
        raise ValueError(lines[0])


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_files_that_are_not_what_was_written_are_refused_by_name(
    reader: str, damage: str, trained: dict[str, bytes], tmp_path: Path
) -> None:
    kind, read = READERS[reader]
    if reader == "loaded" and damage not in ("a flipped bit", "a flipped bit before"):
        pytest.skip("of what is no checkpoint at all, Lightning says so")
    run = _put(trained, tmp_path)
    path = run / "checkpoints" / f"a.{kind}"
    path.write_bytes(DAMAGE[damage](trained[kind]))
    with pytest.raises(ValueError, match=rf"a\.{kind}") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_what_an_exported_file_says_is_refused(trained: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(trained["safetensors"])
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
    other = json.loads(said["data"])
    other["preprocessing"]["mean"] = [0.123]
    save_file(tensors, path, {**said, "data": json.dumps(other)})
    with pytest.raises(ValueError, match=r"cannot read '.*b.safetensors' .*: it is damaged or no file of weights"):
        Backbone(**NETWORK, checkpoint=str(path))
    save_file(tensors, path, {"format": "pt"})  # somebody else's
    assert Backbone(**NETWORK, checkpoint=str(path)).dim > 0


def test_a_file_of_torch_without_checksums_is_read(trained: dict[str, bytes], tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        Backbone(**NETWORK).save(tmp_path / "b.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert Backbone(**NETWORK, checkpoint=str(tmp_path / "b.pth")).dim > 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [1, {b", "cannot read"),
        pytest.param(b"a: \xff\xfe", "cannot read", marks=pytest.mark.slow),
        (b"model: 3\ndata: {}\n", "is no configuration of a run"),
        pytest.param(b"- 1\n", "is no configuration of a run", marks=pytest.mark.slow),
        pytest.param(b"", "is no configuration of a run", marks=pytest.mark.slow),
        (b"model:\n  class_path: ncfinetune.Supervised\n", "is no configuration of a run"),
    ],
)
def test_report_leaves_out_a_run_whose_configuration_is_broken(
    content: bytes, said: str, trained: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, broken = _put(trained, tmp_path / "a"), _put(trained, tmp_path / "b")
    assert main(["report", str(tmp_path / "a")]) == 0
    expected = capsys.readouterr().out.splitlines()[:4]
    (broken / "config.yaml").write_bytes(content)
    assert main(["report", str(tmp_path)]) == 0
    found = capsys.readouterr()
    assert found.out.splitlines()[:4] == expected
    (line,) = found.err.strip().splitlines()
    assert line.startswith("warning: ")
    assert said in line
    assert f"{broken / 'config.yaml'}" in line
    assert line.endswith("; restore it, or move its folder away; the run is left out")
    (run / "config.yaml").write_bytes(content)
    assert main(["report", str(tmp_path)]) == 2
    assert "error: no runs below" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    trained: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _put(trained, tmp_path)
    (tmp_path / "report.png").write_bytes(b"old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: _half(self, path))
    error = _refusal(capsys, "report", str(tmp_path))
    assert error == (
        f"error: cannot write '{tmp_path / 'report.png'}': {FULL}; make room there, or choose another folder"
    )
    assert (tmp_path / "report.png").read_bytes() == b"old"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("content", [b"a: [1, {b", b"a: \xff\xfe", b"seed: 0\x00"])
def test_a_configuration_that_cannot_be_read_is_named(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    for words in (["--config", str(path)], [f"--config={path}"], ["-c", str(path)]):
        assert _refusal(capsys, "fit", *words).startswith(f"error: cannot read the configuration '{path}': ")

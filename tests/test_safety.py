"""``--safe``: what may run of somebody else's configuration and checkpoint, and what may not."""

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ncfinetune.cli import main
from ncfinetune.safety import refuse_code

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--data", "Digits", "--model", "Supervised", "--model.backbone", "{name: test_resnet, in_chans: 1}"]
QUIET = [
    *("--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--trainer.limit_val_batches", "1"),
]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["fit", "--trainer.callbacks", "canary.Callback"], "'canary.Callback' for trainer.callbacks, something"),
        (["fit", "--trainer.callbacks+=canary.Callback"], "'canary.Callback' for trainer.callbacks, something"),
        (["fit", "--model=subprocess.Popen"], "'subprocess.Popen' for model, something to import"),
        (["fit", "--model", "{class_path: os.system}"], "'os.system' for model.class_path, something to import"),
        (["fit", "--model", "lightning.pytorch.cli.os.system"], "'lightning.pytorch.cli.os.system' for model"),
        (["fit", "--optimizer", "torch.hub.load"], "'torch.hub.load' for optimizer, something to import"),
        (["fit", "--config", "{trainer: {callbacks: [{class_path: os.system}]}}"], "trainer.callbacks.class_path"),
        (
            ["fit", "--data.init_args.train", "pipe:cat x"],
            "'pipe:cat x' for data.init_args.train, which may be a shell",
        ),
        (["fit", "--data.train", "{p,x}ipe:cat"], "for data.train, which may be a shell command"),
        (["fit", "--data.train", "gs:bucket/a.tar"], "for data.train, which may be a shell command"),
        (["fit", "--model.forward", "'os.system'"], "os.system' for model.forward, something to import"),
        (["fit", "--model.forward", " os.system"], "os.system' for model.forward, something to import"),
        (["fit", "--model", "{class_path: Supervised, init_args: '{optimizer: os.system}'}"], "'os.system' for model"),
        (["test", "--ckpt_path", "https://example.org/a.ckpt"], "for ckpt_path, on another machine"),
        (["fit", "--model.backbone", "hf-hub:somebody/network"], "for model.backbone, on another machine"),
    ],
)
def test_what_is_refused(words: list[str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "canary.py").write_text("class Callback: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="--safe refuses") as refusal:
        refuse_code(words)
    assert what in str(refusal.value)
    assert str(refusal.value).endswith("and files of this machine; without --safe it is run")


@pytest.mark.parametrize("option", ["--config", "--config=", "--model", "--model="])
@pytest.mark.parametrize("name", ["theirs.yaml", "theirs.txt", "theirs"])
def test_a_file_of_options_is_looked_through(option: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "inner").write_text("class_path: shutil.rmtree\ninit_args: {path: /}\n")
    path = tmp_path / name
    path.write_text("init_args:\n  optimizer: inner\n")
    words = [f"{option}{path}"] if option.endswith("=") else [option, str(path)]
    with pytest.raises(
        ValueError, match=r"'shutil.rmtree' for \w+.init_args.optimizer.class_path, something to import"
    ):
        refuse_code(["fit", *words])


def test_files_that_name_each_other_are_looked_through_once(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).write_text(f"model: {other}\n")
    refuse_code(["fit", "--config", str(tmp_path / "a")])


def test_our_own_configurations_are_let_through() -> None:
    own = [path for path in (ROOT / "experiments").rglob("*.yaml") if path.parent.name != "results"]
    assert len(own) > 10
    for path in own:
        refuse_code(["fit", "--config", str(path), "--trainer.max_epochs", "3", "--model.train", "layer3.0"])


@pytest.mark.filterwarnings("ignore:validate measures a classifier that was not trained")
def test_nothing_of_theirs_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "canary.py").write_text(
        f"from pathlib import Path\nfrom lightning.pytorch import Callback\nPath({str(tmp_path / 'sang')!r}).touch()\n"
        "class Sings(Callback): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = [
        "validate",
        *TINY,
        *QUIET,
        "--trainer.default_root_dir",
        str(tmp_path),
        "--trainer.callbacks",
        "canary.Sings",
    ]
    assert main([*words, "--safe"]) == 2
    assert "error: --safe refuses 'canary.Sings' for trainer.callbacks" in capsys.readouterr().err
    (tmp_path / "sings.yaml").write_text("trainer: {callbacks: [{class_path: canary.Sings}]}\n")
    sings = str(tmp_path / "sings.yaml")
    for file in (["--config", sings], ["-c", sings], [f"--config={sings}"], [f"-c={sings}"], [f"-c{sings}"]):
        assert main(["validate", *TINY, *QUIET, "--safe", *file]) == 2
    assert not (tmp_path / "sang").exists()
    assert main(words) is None
    assert (tmp_path / "sang").exists()
    sys.modules.pop("canary")


class _Sings:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_checkpoint_is_read_as_data(tmp_path: Path, capsys: Any) -> None:
    content = {"state_dict": {}, "pytorch-lightning_version": "2.6.0", "more": _Sings(tmp_path / "sang")}
    torch.save(content, tmp_path / "theirs.ckpt")
    words = ["validate", *TINY, *QUIET, "--ckpt_path", str(tmp_path / "theirs.ckpt")]
    assert main(["validate", "--safe", *words[1:]]) == 2
    assert "--ckpt_path holds code, which is not run here" in capsys.readouterr().err
    assert not (tmp_path / "sang").exists()
    pickle.loads(pickle.dumps(content["more"]))
    assert (tmp_path / "sang").exists()  # as it would have been


@pytest.mark.parametrize("option", ["--config", "--trainer.callbacks", "--data.augmentation"])
def test_a_text_that_is_too_long_to_be_looked_through_is_refused(option: str, tmp_path: Path) -> None:
    long = tmp_path / "long.yaml"
    long.write_text("# a comment\n" * 100_000 + "model: {class_path: json.JSONDecoder}\n")
    with pytest.raises(ValueError, match=r"refuses '.*long.yaml' for \S+, a text of 1,200,03\d bytes that it does not"):
        refuse_code(["fit", option, str(long)])
    (tmp_path / "weights.pth").write_bytes(bytes(range(256)) * 2**13)
    refuse_code(["fit", option, str(tmp_path / "weights.pth")])


def test_files_of_tensors_are_no_texts(tmp_path: Path) -> None:
    def looks_like_text(padding: int) -> bool:
        named = {f"backbone.layer{number}.{'x' * 60}.weight": torch.zeros(400) for number in range(700)}
        save_file(named, tmp_path / "big.safetensors", {"padding": "x" * padding})
        content = (tmp_path / "big.safetensors").read_bytes()
        assert len(content) > 2**20
        # Its length comes first, as a number of eight bytes, and the header is longer than what is looked at.
        return all(byte < 128 for byte in content[: 2**16])

    assert any(looks_like_text(padding) for padding in range(0, 2**16, 2**11 + 8))
    refuse_code(["fit", "--model.checkpoint", str(tmp_path / "big.safetensors")])

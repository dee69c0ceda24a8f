"""What an installation holds: every package, and no package of a common name beside ours."""

import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ncfinetune

ROOT = Path(__file__).resolve().parent.parent


def _setup() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def test_there_is_one_version() -> None:
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None
    assert _setup()["metadata"]["version"] == ncfinetune.__version__ == cited[1]
    assert f"## [{ncfinetune.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_there_is_one_oldest_python() -> None:
    oldest = _setup()["options"]["python_requires"].removeprefix(">=")
    assert _setup()["mypy"]["python_version"] == oldest
    assert f'target-version = "py{oldest.replace(".", "")}"' in (ROOT / "pyproject.toml").read_text()


def test_make_pins_every_lower_bound() -> None:
    """The rule of ``make test-oldest`` reads the bounds from setup.cfg and would pass over one of another form."""
    command = re.search(r"^\t(sed .*setup\.cfg)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert command is not None
    pinned = subprocess.run(
        ["sh", "-c", command[1]], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    needs = (_setup()["options"]["install_requires"] + _setup()["options.extras_require"]["test"]).split()
    bounds = [re.sub(r"\[.*\]|,.*", "", need).replace(">=", "==") for need in needs]
    assert len(bounds) > 10
    assert set(bounds) <= set(pinned)


@pytest.mark.slow
def test_wheel_holds_every_package_under_our_name(tmp_path: Path) -> None:
    source = tmp_path / "source"  # building in the checkout would leave its build folder there
    for name in ("ncfinetune", "callbacks", "datamodules"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, timeout=600)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ncfinetune"}
    for folder, inside in {"ncfinetune": "", "callbacks": "callbacks/", "datamodules": "datamodules/"}.items():
        for path in (ROOT / folder).glob("*.py"):
            assert f"ncfinetune/{inside}{path.name}" in names
    assert "ncfinetune/py.typed" in names

"""What an installation holds: every package, and no package of a common name beside ours."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ncfinetune
from ncfinetune.overlays import installed

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
    for name in ("ncfinetune", "callbacks", "datamodules", "experiments"):
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
    overlays = {f"ncfinetune/{path.relative_to(ROOT)}" for path in (ROOT / "experiments").rglob("*.yaml")}
    assert len(overlays) > 30
    assert {name for name in names if name.startswith("ncfinetune/experiments/")} == overlays

    # Outside the checkout, with the packages of this environment.
    wheel, place, elsewhere = next(tmp_path.glob("*.whl")), tmp_path / "place", tmp_path / "elsewhere"
    target = ["--quiet", "--no-deps", "--target", str(place), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "install", *target], check=True, timeout=600)
    elsewhere.mkdir()
    fit = ["fit", "--config", "experiments/digits/pretrain.yaml", "--trainer.fast_dev_run", "true"]
    environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    code = "import ncfinetune, sys; from ncfinetune.cli import main; print(ncfinetune.__file__); sys.exit(main())"
    run = [sys.executable, "-c", code, *fit]
    done = subprocess.run(run, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(place))


def test_a_file_of_experiments_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known, inside = "experiments/data/dtd.yaml", str(ROOT / "experiments" / "data" / "dtd.yaml")
    monkeypatch.chdir(tmp_path)
    assert installed(known) == inside
    assert installed(f"--config={known}") == f"--config={inside}"
    assert installed("experiments/data/none.yaml") == "experiments/data/none.yaml"
    (tmp_path / "experiments" / "data").mkdir(parents=True)
    (tmp_path / known).touch()
    assert installed(known) == known

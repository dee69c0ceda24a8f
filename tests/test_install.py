"""What an installation holds: every package, and no package of a common name beside ours."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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

"""Every command of README.md and docs/, run in the order of its page on a few small images and tiny networks.

A command is a line of a shell block, or words in backticks that begin with a program's name. Those of make are listed
by make and not run, and of a command that is only named its help is read. What is not run has its reason in `NOT_HERE`.
"""

import configparser
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from image_files import write_image
from PIL import Image

from ncfinetune.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PROGRAMS = "ncfinetune|make|pip|tensorboard|torchrun|python"
# Commands that do not run without what a test cannot have, by a part that no other command has.
NOT_HERE = {"--trainer.strategy fsdp": "Lightning's FSDPStrategy needs CUDA"}

# What stands in for downloads, for machines and cards that are not here, and for names that a user would choose.
INSTEAD = {
    "resnet18 --pretrained true": "test_resnet --checkpoint base.pth",
    "'{name: resnet18, pretrained: true}'": "test_resnet --model.checkpoint base.pth",
    "'{name: vit_small_patch16_224, pretrained: true}'": "'{name: test_vit, img_size: 32}' --model.allow_random true",
    "--trainer.devices 8": "--trainer.devices 2",
    "--trainer.num_nodes 2": "--trainer.num_nodes 1",
    "torchrun --nproc_per_node 8": "torchrun --nproc_per_node 2",
    "--nnodes 2 --nproc_per_node 8": "--nnodes 1 --nproc_per_node 1",
    "HOST:29500": "localhost:0",
    "seq 1 8": "seq 1 1",
    "%/8": "%/1",
    "TASK_ID/8": "TASK_ID/1",
    "{0000..0127}": "{0000..0001}",
    "layers NAME": "layers test_vit",
    "report FOLDER": "report runs",
}
# What is added to a command for seconds in place of minutes, and to one with images in folders.
MORE = {"fit": "--trainer.max_epochs 2 --trainer.accelerator cpu", "suggest": "--epochs 1 --blocks 1 --folds 2"}
SMALL = "--data.image_size 32 --data.num_workers 0"
# Tasks of SLURM, on this machine; the scripts' own numbers are in their comments.
SRUN = """#!/bin/bash
for task in $(seq 0 $((SLURM_NTASKS - 1))); do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || exit; done
"""
SLURM = {
    "SLURM_JOB_ID": "15017",
    "SLURM_JOB_NAME": "tuning",
    "SLURM_NODELIST": "localhost",
    "SLURM_NNODES": "1",
    "SLURM_NODEID": "0",
    "SLURM_ARRAY_TASK_ID": "1",
}


def commands(page: str) -> list[str]:
    """The commands of a page in their order: shell blocks whole, and those in the text."""
    found = []
    assert "~~~" not in page
    inline = rf"`((?:{PROGRAMS})\s[^`]+)`"
    for match in re.finditer(rf"```(\w*)\n(.*?)```|{inline}", page, re.DOTALL):
        language, block, words = match.groups()
        hidden = not words and language != "sh" and re.search(rf"^\W*(?:{PROGRAMS})\s", block, re.MULTILINE)
        assert not hidden, f"a command outside a block of sh: {block}"
        if words or language == "sh":
            found.append(" ".join(words.split()) if words else block)
    return found


def small(line: str) -> str:
    """A line as it is run here."""
    if re.fullmatch(r"ncfinetune \w+", line):  # a command's name
        return f"{line} --help"
    line = " ".join(line.split())
    for real, here in INSTEAD.items():
        line = line.replace(real, here)
    if re.search(r"--config experiments/(start|finetune)/", line) and "--model.backbone" not in line:
        line += " --model.backbone test_resnet --model.checkpoint base.pth"
    if not line.startswith("ncfinetune ") or ".help" in line:
        return line
    folders = SMALL if re.search(r"--data (ImageFolder|WebDataset|\S+/(image_\w+|dtd)\.yaml)", line) else ""
    return f"{line} {folders} {MORE.get(line.split()[1], '')}".strip()


def lines_of(block: str) -> list[str]:
    """Its lines, each whole and without a comment."""
    whole = block.replace("\\\n", " ").splitlines()
    return [line for text in whole if (line := re.sub(r"(^|\s+)#.*", "", text).strip())]


def run(command: str) -> None:
    """Run a command of a page, and fail if it does."""
    lines = lines_of(command)
    here = all(line.split()[0] in PROGRAM for line in lines) and "--trainer.devices" not in command
    if not here or command.startswith("#!"):
        _shell("\n".join(map(small, command.replace("\\\n", " ").splitlines())))
        return
    for line in lines:
        PROGRAM[line.split()[0]](small(line))


def _ours(line: str) -> None:
    status: object
    try:
        status = main(shlex.split(line)[1:])
    except SystemExit as stop:  # of a help
        status = stop.code
    assert not status, line


def _made(line: str) -> None:
    """What make would do; the demo and the tests are run by others."""
    done = subprocess.run([*shlex.split(line), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout


def _installed(line: str) -> None:
    """There is such an extra; nothing is fetched."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    found = re.fullmatch(r"pip install (?:ncfinetune|\.)(?:\[(\w+)\])?", " ".join(shlex.split(line)))
    assert found, line
    assert found[1] is None or found[1] in setup["options.extras_require"]


def _served(line: str) -> None:
    from tensorboard.program import TensorBoard  # here, since its import warns

    board = TensorBoard()
    once = ["--reload_task", "blocking", "--reload_interval", "0"]  # no thread that outlives the test reads its folder
    board.configure([*shlex.split(line), "--port", "0", "--load_fast", "false", *once])
    with urllib.request.urlopen(f"{board.launch()}data/runs", timeout=30) as answer:
        assert json.load(answer), f"{line} shows no run"


PROGRAM: dict[str, Callable[[str], None]] = {
    "make": _made,
    "ncfinetune": _ours,
    "pip": _installed,
    "tensorboard": _served,
}


def _shell(script: str) -> None:
    """Run lines by bash, where ncfinetune is this one; a script with a job's first line under an imitated SLURM."""
    Path("bin").mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "ncfinetune": f'#!/bin/sh\nexec {sys.executable} -m ncfinetune "$@"\n'}.items():
        (Path("bin") / name).write_text(text)
        (Path("bin") / name).chmod(0o755)
    places = [str(Path("bin").absolute()), str(Path(sys.executable).parent), os.environ["PATH"]]
    own = {"PATH": os.pathsep.join(places), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if script.startswith("#!"):
        assert script.startswith("#!/bin/bash\n#SBATCH --")
        tasks = "2" if "--ntasks-per-node" in script else "1"
        own |= {**SLURM, "SLURM_NTASKS": tasks, "SLURM_NTASKS_PER_NODE": tasks}
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{script}\n{done.stderr[-2000:]}"


def _photos(folder: Path, number: int) -> None:
    generator = np.random.default_rng(number)
    for name, level in (("daisy", 60), ("rose", 180)):
        (folder / name).mkdir(parents=True)
        for index in range(number):
            pixels = generator.normal(level, 40, (40 + index, 50, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def _textures(root: Path) -> None:
    """DTD as it lies on disk, with five images of a class to train, and one to validate and to test."""
    (root / "labels").mkdir(parents=True)
    for part, number in (("train", 5), ("val", 1), ("test", 1)):
        files = [f"texture{label}/{part}{index}.jpg" for label in range(47) for index in range(number)]
        for place, file in enumerate(files):
            write_image(root / "images" / file, place % 216)
        (root / "labels" / f"{part}1.txt").write_text("\n".join(files) + "\n")


def _shards(folder: Path) -> None:
    for shard in range(2):
        with tarfile.open(folder / f"train-{shard:04d}.tar", "w") as tar:
            for place, image in enumerate(sorted(Path("photos/train").rglob("*.png"))):
                label = folder / "label"
                label.write_text(str(int(image.parent.name == "rose")))
                tar.add(image, f"{shard}{place}.png")
                tar.add(label, f"{shard}{place}.cls")


MODEL = """seed_everything: 0
model: {class_path: Supervised, init_args: {backbone: {name: resnet18, channels: [4, 6, 8, 10]}}}
trainer: {max_epochs: 2, accelerator: cpu}
"""
IMAGES = """data: {class_path: ImageFolder, init_args: {root: photos, image_size: 32, num_workers: 0}}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the pages' commands name, under the names that they have there."""
    monkeypatch.chdir(tmp_path)
    for root in ("photos", "FOLDER"):
        _photos(tmp_path / root / "train", 10)
        _photos(tmp_path / root / "test", 4)
    rows = [f"{path.relative_to('FOLDER')},{path.parent.name}" for path in sorted(Path("FOLDER").rglob("*.png"))]
    Path("FOLDER/labels.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    _photos(tmp_path / "elsewhere", 3)
    _textures(tmp_path / "data" / "dtd" / "dtd")
    torch.save(timm.create_model("test_resnet").state_dict(), "base.pth")
    Path("shards").mkdir()
    _shards(Path("shards"))
    Path("YOUR_MODEL.yaml").write_text(MODEL)
    Path("YOUR_RUN.yaml").write_text(MODEL + IMAGES)
    return tmp_path


def _leave_a_run() -> None:
    """The run that stands for any."""
    data = "--data experiments/data/image_folder.yaml --data.root photos"
    where = "--trainer.logger.save_dir . --trainer.logger.version RUN --trainer.max_epochs 1"
    line = f"ncfinetune fit --config experiments/start/layer.yaml {data} {where}"
    _ours(f"{line} --model.backbone test_resnet --model.checkpoint base.pth --trainer.accelerator cpu")
    Path("RUN/checkpoints/NAME.ckpt").write_bytes(Path("RUN/checkpoints/best.ckpt").read_bytes())


def test_a_page_is_read_whole() -> None:
    page = "Run `make demo`\nor `ncfinetune\nfit`, see `ncfinetune`.\n"
    page += "```sh\nncfinetune fit \\\n  --a b  # c\n```\n```python\nx\n```"
    assert commands(page) == ["make demo", "ncfinetune fit", "ncfinetune fit \\\n  --a b  # c\n"]
    assert lines_of(commands(page)[-1]) == ["ncfinetune fit    --a b"]


def test_what_is_not_run_is_still_on_a_page() -> None:
    text = "\n".join("\n".join(commands((ROOT / page).read_text())) for page in PAGES)
    assert {part: text.count(part) for part in NOT_HERE} == dict.fromkeys(NOT_HERE, 1)
    text = " ".join(text.replace("\\\n", " ").split())
    assert [real for real in INSTEAD if real not in text] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # What Lightning and torch say of runs this short.
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_runs(page: str, place: Path) -> None:
    pytest.importorskip("onnxruntime")
    text = (ROOT / page).read_text()
    if "RUN/checkpoints" in text:
        _leave_a_run()
    for command in commands(text):
        if not any(part in command for part in NOT_HERE):
            run(command)
    if page == "docs/tour.md":
        _decides_as_the_trained_one(*re.findall(r"```python\n(.*?)```", text, re.DOTALL))
        assert Path("report.html").is_file()
        assert Path("runs/tour/layer/evaluation/test/mistakes.png").is_file()


def _decides_as_the_trained_one(code: str) -> None:
    """The tour's program on the exported network, and the predictions of the checkpoint."""
    with open("predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    program: dict = {}
    exec(compile(code, "tour.md", "exec"), program)
    decided = program["classify"]([row["file"] for row in rows])
    assert len(rows) == 6
    for row, (name, probability) in zip(rows, decided, strict=True):
        assert row["prediction"] == name
        assert abs(float(row[name]) - probability) < 1e-4

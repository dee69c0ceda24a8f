"""A learner's network for programs without ncfinetune: one graph from pixels to probabilities, as ONNX or for torch.

Legend: ``N`` images, ``C`` channels, ``S`` side of the images that are put in, ``K`` classes, ``d`` feature width.
"""

from __future__ import annotations

import importlib.util
import inspect
import io
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ncfinetune.atomic import replacing
from ncfinetune.classifier import Classifier
from ncfinetune.learner import Learner
from ncfinetune.timm_network import ROUNDING, apart

# Packages of the extra ``onnx``, by the names by which they are imported.
_PACKAGES = ("onnx", "onnxruntime")
# Version of ONNX's operators, of 2022: old enough for most runtimes, new enough for layer normalisation.
_OPSET = 17
# What a file of protocol buffers holds, and so an ONNX file of one piece.
_LARGEST = 2**31 - 2**20
# Runs the network in some form on pixels.
Run = Callable[[Tensor], Sequence[Tensor]]
# Name of the metadata in a file of torch.export.
METADATA = "metadata.json"


class Deployed(nn.Module):
    """A learner's network behind the preprocessing of the batches that it was trained on.

    It takes uint8 pixels ``(N, C, S, S)`` as a decoded file has them, cropped and resized as the metadata say, scales
    them to 0..1, resizes them if the datamodule did, and normalises them. Pixels that a caller has normalised already
    are of another type, and so are refused instead of giving other numbers.

    Args:
        learner: In eval mode, with its ``preprocessing``. Its adapters are merged into its weights, in place.

    Attributes:
        outputs: Names of what it returns: ``logits`` and ``probabilities``, ``(N, K)`` each, or, of a learner without a
            classifier, ``features`` ``(N, d)``.
    """

    mean: Tensor
    std: Tensor
    resize: Tensor

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        assert learner.preprocessing is not None
        learner.backbone.merge_adapters()
        self.learner = learner
        self.channels, self.size, _ = learner.preprocessing["input_size"]
        self.stored = learner.preprocessing.get("stored_size", self.size)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(learner.preprocessing[name]).view(-1, 1, 1))
        # Rows are the weights of the pixels of a line: ONNX and older torch cannot export antialiased resizing.
        lines = torch.eye(self.stored)[None, None]
        rows = nn.functional.interpolate(lines, (self.size, self.stored), mode="bilinear", antialias=True)
        self.register_buffer("resize", rows[0, 0])
        self.eval()  # torch.onnx restores the mode of this module in all that it holds
        self.outputs = ("logits", "probabilities") if isinstance(learner, Classifier) else ("features",)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Logits and probabilities, or features, of uint8 pixels ``(N, C, S, S)``."""
        images = pixels.to(torch.float32) / 255
        if self.stored != self.size:
            images = self.resize @ images @ self.resize.T
        found = self.learner((images - self.mean) / self.std)
        return (found, self.learner.probabilities(found)) if isinstance(self.learner, Classifier) else (found,)

    def noise(self, number: int) -> Tensor:
        """Pixels of noise from a fixed seed, uint8, ``(N, C, S, S)``."""
        shape = (number, self.channels, self.stored, self.stored)
        return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(number))

    def metadata(self) -> dict[str, str]:
        """Class names, preprocessing and what goes in and comes out, as texts; lists and mappings are JSON.

        The preprocessing is that of the pixels that go in, so that its ``input_size`` is theirs.
        """
        size = [self.channels, self.stored, self.stored]
        shape = f"uint8 (N, {self.channels}, {self.stored}, {self.stored})"
        described = {
            "input": f"pixels, {shape}, decoded, cropped to the middle crop_pct of the shorter side and resized by "
            "interpolation; scaling to 0..1 and normalisation are part of the network",
            "outputs": ", ".join(self.outputs),
            "preprocessing": json.dumps({**(self.learner.preprocessing or {}), "input_size": size}),
        }
        names = self.learner.class_names
        return {**described, "class_names": json.dumps(names)} if names else described


def write_exported(path: Path, deployed: Deployed) -> float:
    """Write the network as a program of torch.export, ``torch.export.load(path).module()``.

    Class names and preprocessing are in its extra file ``metadata.json``.

    Returns:
        The largest difference to the network in torch, for batches of other sizes, relative to the largest output.

    Raises:
        ValueError: torch.export cannot follow the network, or the program gives other outputs.
    """
    content = io.BytesIO()
    with _quiet():
        torch.export.save(_program(deployed), content, extra_files={METADATA: json.dumps(deployed.metadata())})
        content.seek(0)
        read = torch.export.load(content).module()
    error = _difference(path, deployed, read)
    _write(path, content.getvalue())
    return error


def write_onnx(path: Path, deployed: Deployed) -> float:
    """Write the network as an ONNX file with a dynamic number of images; its metadata are those of `Deployed`.

    Returns:
        The largest difference of onnxruntime's outputs to the network in torch, relative to the largest output.

    Raises:
        ModuleNotFoundError: The extra ``onnx`` is not installed.
        ValueError: torch cannot export the network; it is too large for one file; or onnxruntime gives other outputs.
    """
    check_onnx(path)
    if sum(p.numel() * p.element_size() for p in deployed.state_dict().values()) > _LARGEST:
        raise ValueError(
            f"{str(path)!r}: the network has more than the 2 GB of one ONNX file; export it as a .pt2 file"
        )
    content = io.BytesIO()
    with _quiet():
        options: dict[str, Any] = {
            "input_names": ["pixels"],
            "output_names": list(deployed.outputs),
            "dynamic_axes": {name: {0: "batch"} for name in ("pixels", *deployed.outputs)},
            "opset_version": _OPSET,
        }
        if "dynamo" in inspect.signature(torch.onnx.export).parameters:
            # By tracing: the exporter by torch.export fails for BEiT, needs torch 2.6, and 10 to 20 times as long.
            options["dynamo"] = False
        try:
            write: Any = torch.onnx.export  # its annotations differ from release to release
            write(deployed, (deployed.noise(2),), content, **options)
        except Exception as error:  # the exporter raises whatever an operator's translation raises
            raise ValueError(_untraceable(deployed, "torch.onnx", error)) from error
    written = _with_metadata(content.getvalue(), deployed)
    difference = _difference(path, deployed, _in_onnxruntime(written))
    _write(path, written)
    return difference


def check_onnx(path: Path) -> None:
    """Refuse to begin what would fail at its end.

    Raises:
        ModuleNotFoundError: The extra ``onnx`` is not installed.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(f"{str(path)!r} needs {', '.join(missing)}: pip install 'ncfinetune[onnx]'")


def _program(deployed: Deployed) -> torch.export.ExportedProgram:
    """The network as one graph, for any number of images."""
    with torch.no_grad():
        try:
            # Two images: a dimension of 1 would be taken for a constant.
            images = {"pixels": {0: torch.export.Dim("batch", min=1)}}
            return torch.export.export(deployed, (deployed.noise(2),), dynamic_shapes=images)
        except Exception as error:  # torch._dynamo's errors share no base class of their own
            raise ValueError(_untraceable(deployed, "torch.export", error)) from error


def _untraceable(deployed: Deployed, by: str, error: Exception) -> str:
    name = deployed.learner.backbone.spec["name"]
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{by} cannot follow {name}: {reason}; a folder for timm needs no graph"


def _with_metadata(content: bytes, deployed: Deployed) -> bytes:
    """An ONNX file with our metadata."""
    import onnx

    model = onnx.load_model_from_string(content)
    onnx.helper.set_model_props(model, deployed.metadata())
    written: bytes = model.SerializeToString()
    return written


def _in_onnxruntime(content: bytes) -> Run:
    """A function that runs an ONNX file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda pixels: tuple(map(torch.from_numpy, session.run(None, {"pixels": pixels.numpy()})))


def _difference(path: Path, deployed: Deployed, other: Run) -> float:
    """The largest relative difference of another form of the network, for batches that it was not made with."""
    errors = []
    for number in (1, 3):
        pixels = deployed.noise(number)
        with torch.no_grad():
            errors += [apart(*both) for both in zip(other(pixels), deployed(pixels), strict=True)]
    if not all(error < ROUNDING for error in errors):
        raise ValueError(
            f"{str(path)!r} would give other {deployed.outputs[0]} than the checkpoint, by {max(errors):.2g} of the "
            "largest; it was not written"
        )
    return max(errors)


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as part:
        part.write_bytes(content)


@contextmanager
def _quiet() -> Iterator[None]:
    """A context without the exporters' warnings, which are of their own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

"""Reading and writing files of tensors, with the image preprocessing and the class names stored in them."""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ncfinetune.atomic import replacing
from ncfinetune.checksums import check_zip, fingerprint

# Harmless objects beside tensors in checkpoints: command lines and numbers of NumPy.
_HARMLESS: list[Any] = [argparse.Namespace, np.dtype, *(type(np.dtype(kind)) for kind in "fdilq?")]
# Keys of the image preprocessing and of the class names in a file.
DATA = "data"
# Key in our files' metadata of the fingerprint of tensors and metadata.
_FINGERPRINT = "ncfinetune_fingerprint"


def save(weights: Mapping[str, Tensor], path: str | Path, data: Mapping[str, Any] | None = None) -> None:
    """Write the weights of a timm network to a file.

    ``Backbone(checkpoint=path)`` reads it, and so does ``timm.create_model(name, num_classes=0, checkpoint_path=path)``
    unless the stem is ``cifar``, which timm does not have.

    Args:
        weights: Its tensors by name.
        path: A ``.safetensors`` or ``.pth`` file.
        data: The image preprocessing and the class names, in built-in types.

    Raises:
        ValueError: The file's name has another suffix.
    """
    path = Path(path)
    own = with_own_memory(weights)
    if path.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"expected a file name that ends in .safetensors or .pth, got {str(path)!r}")
    with replacing(path) as part:
        if path.suffix == ".safetensors":
            said = {DATA: json.dumps(data)} if data else {}
            save_file(own, part, {"format": "pt", **said, _FINGERPRINT: fingerprint(own, said)})
        else:
            torch.save({"state_dict": own, DATA: dict(data)} if data else own, part)


def with_own_memory(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU tensors without shared memory, as safetensors requires.

    A parameter that a network has under several names is copied under each, since loading expects all names.
    """
    own: dict[str, Tensor] = {}
    known: set[int] = set()
    for key, value in weights.items():
        tensor = value.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        own[key] = tensor.clone() if address in known else tensor
        known.add(address)
    return own


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of a file of weights, and its image preprocessing and class names.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is a folder, or not a file of tensors only; the message says how to convert it.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder, expected a file of weights; {_of_folder(path)}")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {str(path)!r}; expected a .ckpt, .pt, .pth or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            content, data = _read_safetensors(path)
        else:
            check_zip(path)
            with _trusting():
                content = torch.load(path, "cpu", weights_only=True)
            data = content.get(DATA) if isinstance(content, dict) else None
    except OSError:
        raise
    except Exception as error:  # unpickling arbitrary bytes may raise anything
        reason = _of_file(path, str(error))
        raise ValueError(f"cannot read {str(path)!r} as a checkpoint of tensors: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {str(path)!r} holds a {type(content).__name__}, expected a dictionary of tensors")
    # Other programs may have an entry of this name.
    ours = isinstance(data, dict) and isinstance(data.get("preprocessing"), dict | None)
    return content, data if ours else {}


def _read_safetensors(path: Path) -> tuple[Any, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    tensors, said = load_file(path), {name: metadata[name] for name in (DATA,) if name in metadata}
    if _FINGERPRINT not in metadata:
        return tensors, None
    if metadata[_FINGERPRINT] != fingerprint(tensors, said):
        raise ValueError("its fingerprint is wrong")
    return tensors, json.loads(said.get(DATA, "{}"))


def _trusting() -> Any:
    """A context in which torch.load accepts the harmless objects, as far as this version of torch supports it."""
    if not hasattr(torch.serialization, "safe_globals"):
        return nullcontext()
    scalar = np.float64(0).__reduce__()[0]  # where it lives depends on NumPy's version
    return torch.serialization.safe_globals([*_HARMLESS, scalar])


def _of_folder(path: Path) -> str:
    """How to convert a folder to one file, in words."""
    names = sorted(file.name for file in path.iterdir())
    if any(name.endswith(".distcp") for name in names):
        if "meta.pt" in names:
            return f"it is a sharded checkpoint: python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
        join = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE.pth"
        return f"it is a sharded checkpoint, of which {join} makes one"
    if "zero_to_fp32.py" in names or any(name.startswith("global_step") for name in names):
        return "it is a checkpoint of DeepSpeed, of which its zero_to_fp32.py makes one"
    files = [name for name in names if Path(name).suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin")]
    if any(name.endswith(".index.json") for name in names):
        return f"it holds one checkpoint in {len(files)} files: load them, and save their tensors together as one file"
    return f"name one of {', '.join(files)}" if files else "it holds none"


def _of_file(path: Path, error: str) -> str:
    """Why a file is not a checkpoint of tensors only, and how to convert it, in words."""
    foreign = re.search(r"GLOBAL ([\w.]+)", error)
    package = foreign[1].split(".")[0] if foreign else ""
    if package in ("fastai", "fastcore"):
        return "fastai saved its optimiser too; save it by learn.save(NAME, with_opt=False)"
    if package == "lightly_train":
        given = f'checkpoint={str(path)!r}, part="model", format="torch_state_dict"'
        return f"lightly-train saved its code too; make one by lightly_train.export(out=FILE, {given})"
    if foreign:
        return f"it holds objects of {foreign[1]}; where that is installed, save its state_dict() by torch.save"
    members: list[str] = []
    if zipfile.is_zipfile(path):
        with suppress(Exception), zipfile.ZipFile(path) as file:  # one that is damaged
            members = file.namelist()
    if any(name.endswith("archive_format") for name in members):
        return f"it is an exported program; save torch.export.load({str(path)!r}).state_dict by torch.save"
    if any(name.endswith("constants.pkl") for name in members):
        return f"it is TorchScript; save torch.jit.load({str(path)!r}).state_dict() by torch.save"
    return "it is damaged or no file of weights"

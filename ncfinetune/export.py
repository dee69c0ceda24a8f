"""``ncfinetune export``: a trained network as files for programs without ncfinetune."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ncfinetune.texts import some

if TYPE_CHECKING:
    from ncfinetune.restoring import Restored

_DESCRIPTION = """Export a trained network. The name of TARGET says as what:

  NAME/ or NAME       a folder for timm and Hugging Face's hub: weights, config.json with preprocessing and class
                      names, and a model card; timm.create_model("local-dir:NAME", pretrained=True) loads it
  NAME.onnx           the classifier as ONNX, for onnxruntime and others; needs the extra onnx
  NAME.pt2            the classifier as a program of torch.export: torch.export.load("NAME.pt2").module()
  NAME.safetensors    the backbone's weights alone, for FineTuner and for timm
  NAME.pth            the same as a file of torch.save

ONNX and pt2 files take uint8 pixels (N, C, S, S) of images that are cropped and resized, for any N, and give logits
(N, K) and probabilities (N, K): scaling to 0..1 and normalisation are inside. Class names and preprocessing are in
their metadata. A network without a classifier, as SupCon and SimCLR train it, gives features (N, d) instead. Before
anything is written the outputs are compared with those of the checkpoint. Adapters (lora) are merged."""
_EXAMPLES = """examples:
  ncfinetune export RUN/checkpoints/NAME.ckpt model/
  ncfinetune export RUN/checkpoints/NAME.ckpt model.onnx
  ncfinetune export RUN/checkpoints/delta.safetensors model.onnx --base weights.pth"""
# What can hold any network of ours, and what holds its backbone.
_OTHERS = "export the whole network as NAME.onnx or NAME.pt2, or its backbone as NAME.safetensors"
_BACKBONES = (".safetensors", ".pth")


def main(args: Sequence[str]) -> int:
    """Export what the words ask for, and print one line about it.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: As `export`.
    """
    parser = argparse.ArgumentParser(
        prog="ncfinetune export",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint or a delta that fit wrote")
    parser.add_argument("target", metavar="TARGET", help="what to write, see above")
    parser.add_argument(
        "--class_names",
        nargs="+",
        metavar="NAME",
        help="names in the order of the labels, if the data had only numbers",
    )
    parser.add_argument(
        "--base", metavar="FILE", help="for a delta: the weights that it was tuned on; 'pretrained' for timm's"
    )
    options = parser.parse_args(args)
    print(export(options.checkpoint, options.target, options.class_names, options.base))
    return 0


def export(
    checkpoint: str | Path, target: str | Path, class_names: Sequence[str] | None = None, base: str | None = None
) -> str:
    """Export the network of a checkpoint or a delta, and return a one-line report.

    Args:
        checkpoint: The file.
        target: A folder, or a file that ends in ``.onnx``, ``.pt2``, ``.safetensors`` or ``.pth``.
        class_names: Names of the classes in the order of their labels, where the file has none.
        base: For a delta: the file with the weights of its base, or ``pretrained`` for timm's.

    Raises:
        FileNotFoundError: No such file.
        ModuleNotFoundError: The extra ``onnx`` is needed and not installed.
        ValueError: The target's suffix is unknown, or it is a folder with other files; the checkpoint lacks class names
            or preprocessing; the target cannot hold the network; or it would give other outputs.
    """
    form, path = form_of(os.fspath(target)), Path(target)
    if form in _BACKBONES:
        return _backbone(checkpoint, path, base)
    from ncfinetune import deployed, timm_folder
    from ncfinetune.model_card import model_card
    from ncfinetune.restoring import restore
    from ncfinetune.timm_network import NotTimmsError

    if form == ".onnx":
        deployed.check_onnx(path)
    elif not form:
        timm_folder.check_folder(path)
    restored = restore(checkpoint, base)
    _name_classes(restored, class_names)
    _check_images(restored)
    if form:
        network = deployed.Deployed(restored.learner)
        write = deployed.write_onnx if form == ".onnx" else deployed.write_exported
        return _report(target, checkpoint, ", ".join(network.outputs), write(path, network))
    try:
        card = model_card(path.resolve().name, restored)
        difference = timm_folder.write_folder(path, restored.learner, card)
    except NotTimmsError as error:
        raise ValueError(f"{error}; {_OTHERS}") from error
    return _report(target, checkpoint, "a network for timm", difference)


def form_of(target: str) -> str:
    """What a target is written as: the suffix of its file; empty for a folder.

    Raises:
        ValueError: It is neither a folder nor a file of a known suffix.
    """
    suffix = "" if target.endswith(("/", os.sep)) else Path(target).suffix
    if suffix in ("", ".onnx", ".pt2", *_BACKBONES):
        return suffix
    if Path(target).is_dir():
        return ""
    raise ValueError(
        f"expected a target that ends in .onnx, .pt2, .safetensors or .pth, or for a folder in /, got {target!r}"
    )


def _backbone(checkpoint: str | Path, path: Path, base: str | None) -> str:
    from ncfinetune import weights
    from ncfinetune.restoring import has_all_weights, restore
    from ncfinetune.weight_files import save

    if has_all_weights(checkpoint):
        return weights.export(str(checkpoint), str(path))
    learner = restore(checkpoint, base).learner
    tensors = learner.backbone.merged().net.state_dict()
    save(tensors, path, {"class_names": learner.class_names, "preprocessing": learner.preprocessing})
    return f"{path}: {len(tensors)} tensors of the backbone of {checkpoint}"


def _name_classes(restored: Restored, names: Sequence[str] | None) -> None:
    from ncfinetune.learner import are_numbers

    learner, source = restored.learner, str(restored.source)
    number = getattr(learner, "num_classes", None)
    if number is None:
        if names:
            raise ValueError(f"{source!r} has no classifier, so that its features have no class names")
        return
    known = None if are_numbers(learner.class_names) else learner.class_names
    if known and names and [*names] != known:
        raise ValueError(f"{source!r} has class names, {some(known)}; leave --class_names out")
    learner.class_names = known or [*(names or ())] or None
    if learner.class_names is None:
        raise ValueError(
            f"{source!r} has no class names, since its data only numbered the classes; give --class_names and "
            f"{number} names in the order of the labels"
        )
    if len(learner.class_names) != number:
        raise ValueError(f"{source!r} has {number} classes, got {len(learner.class_names)} class names")


def _check_images(restored: Restored) -> None:
    missing = [name for name in ("input_size", "mean", "std") if name not in (restored.learner.preprocessing or {})]
    if missing:
        raise ValueError(
            f"{str(restored.source)!r} does not say how its images were made: its data['preprocessing'] lacks "
            f"{', '.join(missing)}; fit with a datamodule that has the property preprocessing, or put a dictionary of "
            "them there by torch.load and torch.save"
        )


def _report(target: str | Path, checkpoint: str | Path, what: str, difference: float) -> str:
    return f"{target}: {what}, within {difference:.1e} of the outputs of {checkpoint}"

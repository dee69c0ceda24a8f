"""The command line's front door: answers help and version at once, and imports what a command needs only then."""

from __future__ import annotations

import os
import re
import signal
import sys
from importlib import import_module
from typing import Any

from ncfinetune import __version__
from ncfinetune.overlays import installed
from ncfinetune.quiet import quiet

HELP = """usage: ncfinetune COMMAND [OPTIONS]

Transfer learning seen through neural collapse.

commands:
  fit        train:                 ncfinetune fit --config experiments/digits/pretrain.yaml
             on several devices:    torchrun --nproc_per_node 8 -m ncfinetune fit --config ...
             or piece by piece:     ncfinetune fit --data Digits --model Supervised \\
                                        --model.backbone '{name: resnet18, stem: cifar, in_chans: 1}'
  validate   loss, accuracy and collapse on the validation set
  test       the same on the test set
             a trained run:         ncfinetune test --ckpt_path RUN/checkpoints/NAME.ckpt
  predict    class probabilities of a folder of images or of one, on any machine, or without --images of the run's test
             set, as RUN/predictions.csv or as the .csv or .parquet file that --predictions names; images that cannot be
             read have an error in their row, and the exit status is then 3:
                                    ncfinetune predict --ckpt_path RUN/checkpoints/NAME.ckpt --images FOLDER
  evaluate   confusion matrix, precision and recall of each class, calibration, and the most confident mistakes, of the
             run's test set (--split val: of its validation set), or with --images of a folder FOLDER/CLASS/*.jpg:
                                    ncfinetune evaluate --ckpt_path RUN/checkpoints/NAME.ckpt
  scan       what each block of a network, or of several, knows of your classes, without training:
                                    ncfinetune scan --backbone resnet18 --pretrained true --data ImageFolder \\
                                        --data.root photos
  suggest    whether tuning pays on your images, which block, and the accuracy to expect; the words are those of scan
  export     a trained network as a folder for timm (model/), as model.onnx or as model.pt2; its backbone alone as
             backbone.safetensors:  ncfinetune export RUN/checkpoints/NAME.ckpt model.onnx
  layers     names, widths and parameters of a network's blocks, as --model.train and a tracker's layers take them:
                                    ncfinetune layers resnet18
  report     a table and a picture of runs, a row for each configuration; as one HTML page too:
                                    ncfinetune report runs/ --html report.html

options:
  -h, --help      this text; 'ncfinetune fit --help' lists the options of fit,
                  'ncfinetune fit --model.help' the models, and 'ncfinetune fit --model.help FineTuner' the options of
                  one; --data.help does the same for data
  --safe          with fit, validate, test, predict or evaluate: refuse a configuration that would run code of its own:
                  classes other than ours, Lightning's and the optimisers of torch and timm, shell commands, other
                  machines' files, and checkpoints with more than data
  --version       version
  NCFINETUNE_TRACEBACK=1 in the environment shows where an error came from
"""
_LAYERS = """usage: ncfinetune layers NAME

The blocks of a timm network in the order in which they run: name, width of the pooled output, number of parameters, and
how the output is pooled to one vector an image. The last row, penultimate, is what reaches the classifier. No weights
are loaded; timm.list_models() in Python has the names of networks.

  ncfinetune layers resnet18

The names are what a FineTuner tunes and skips from, what scan and suggest judge, and what a tracker measures:

  --model.train layer4.1                   that block and the classifier; -1 is the last block of any network
  --model.train '[layer3.1, "layer4.*"]'   several; * is any part between two dots
  --model.skip_from layer3.1               its pooled output reaches the classifier directly too
  --layers layer3.1 layer4.1               of scan and suggest
  --trainer.callbacks+=NeuralCollapseTracker --trainer.callbacks.layers '["layer*.*", penultimate]'
"""
_TRAINER_COMMANDS = ("fit", "validate", "test", "predict", "evaluate")
# Commands that are modules of their own, and layers.
_OTHER_COMMANDS = ("scan", "suggest", "export", "layers", "report")
# What to type where nothing follows a command.
_FIT = """error: fit needs a model and data, which --model.help and --data.help list, or a --config FILE; for a start:
ncfinetune fit --data Digits --model Supervised --model.backbone '{name: resnet18, stem: cifar, in_chans: 1}'"""
_RUN = """error: %s needs a model and data; for those of a run:
ncfinetune %s --ckpt_path RUN/checkpoints/NAME.ckpt"""


def main(args: list[str] | None = None) -> int | None:
    """Run a command and say in one line what it refuses; ``args`` are ``sys.argv[1:]`` unless given."""
    try:
        with quiet():
            return _run(args)
    except BrokenPipeError:  # the reader of the output, as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        if os.environ.get("NCFINETUNE_TRACEBACK"):
            raise
        print(f"error: {_rank()}{_text(error)}", file=sys.stderr)
        return 2


def _run(args: list[str] | None) -> int | None:
    words = [installed(word) for word in (sys.argv[1:] if args is None else args)]
    command = words[0] if words else "--help"
    if command in ("-h", "--help"):
        print(HELP, end="")
    elif command == "--version":
        print(f"ncfinetune {__version__}")
    elif command == "layers":
        return _layers(words[1:])
    elif command in _OTHER_COMMANDS:
        return import_module(f"ncfinetune.{command}").main(words[1:])
    elif command in _TRAINER_COMMANDS and len(words) == 1:
        print(_FIT if command == "fit" else _RUN % (command, command), file=sys.stderr)
        return 2
    elif command in _TRAINER_COMMANDS:
        from ncfinetune.trainer_cli import main as run

        return run(words)
    else:
        known = ", ".join((*_TRAINER_COMMANDS, *_OTHER_COMMANDS))
        print(f"error: no command {command!r}; expected one of {known}", file=sys.stderr)
        return 2
    return None


def _rank() -> str:
    """Which of several processes speaks; nothing where there is one."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return ""
    return f"rank {dist.get_rank()}: "


def _text(error: Exception) -> str:
    """What an exception says, in one line; of one that a data loader's worker raised without the worker's traceback."""
    text = str(error)
    if text.startswith("Caught ") and "\nOriginal Traceback" in text:
        text = re.split(rf"\n(?:\w+\.)*{type(error).__name__}: ", text)[-1]
    return " ".join(text.split()) or type(error).__name__


def _layers(words: list[str]) -> int:
    if words in (["-h"], ["--help"]):
        print(_LAYERS, end="")
        return 0
    if len(words) != 1 or words[0].startswith("-"):
        print("error: expected ncfinetune layers NAME, a timm architecture such as resnet18", file=sys.stderr)
        return 2
    from ncfinetune.backbone import Backbone

    print(Backbone(words[0]).layer_table())
    return 0

"""One-line errors of the command line, which list the valid names if a name is misspelt."""

from __future__ import annotations

import difflib
import importlib
import inspect
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

from ncfinetune.overlays import installed_folder


class PlainParser(LightningArgumentParser):
    """Accepts no abbreviated options, and reports errors in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2 and one line."""
        self.exit(2, f"error: {one_line(message, self)}\n")

    def made(self, config: Namespace) -> Namespace:
        """The configuration with its classes instantiated; jsonargparse 4.53 renamed the method for that."""
        make: Any = getattr(self, "instantiate", None) or self.instantiate_classes
        return make(config)


def check_configurations(words: Iterable[Any], parser: LightningArgumentParser) -> None:
    """Exit with one line if a file given by ``--config`` is not YAML: jsonargparse's error would not name it."""
    said = list(map(str, words))
    given = [value for option, value in itertools.pairwise(said) if option == "--config"]
    for path in filter(os.path.isfile, given):
        try:
            yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            parser.error(f"cannot read the configuration {path!r}: {' '.join(str(error).split())}")


def one_line(message: str, parser: LightningArgumentParser) -> str:
    """A jsonargparse error in one line, with the valid names if a name is misspelt."""
    for pattern, explain in _EXPLANATIONS.items():
        if found := re.findall(pattern, message):
            return explain(found[-1], message, parser)
    lines = [line.strip(" -") for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith(_NOISE)]
    if len(kept) == 1 and (key := re.fullmatch(r'Parser key "([\w.]+)":', kept[0])):
        return _wrong_type(key[1], message)
    return "; ".join(dict.fromkeys(kept))


def _wrong_type(key: str, message: str) -> str:
    """What an option takes and was given, of an error that says nothing else."""
    types = re.findall(r"Expected an? <class '(?:\w+\.)*(\w+)'>", message)
    wanted = " or ".join("null" if name == "NoneType" else name for name in dict.fromkeys(types))
    given = re.search(r"(?:Got|Given) value: (.*)", message, re.DOTALL)
    return f"{key}: expected {wanted or 'another type'}" + (f", got {' '.join(given[1].split())!r}" if given else "")


def _unknown_class(name: str, message: str, parser: LightningArgumentParser) -> str:
    key = re.findall(r'(?:Parser key "|^--)([\w.]+?)(?:"|\.help:)', message)[-1]
    base = BASES.get(key.split(".")[-1])
    if base is None:
        return f"{key}: no class {name!r}"
    classes = {c.__name__ for c in _concrete_subclasses(base)}
    own = {c.__name__ for c in own_subclasses(base)}
    return f"{key}: no class {name!r}; {_known(name, sorted(own or classes), classes)}"


def _unknown_parameter(found: tuple[str, str], message: str, parser: LightningArgumentParser) -> str:
    path, option = found
    module, name = path.rsplit(".", 1)
    parameters = _parameters(getattr(importlib.import_module(module), name))
    return f"{name} has no option {option!r}; {_known(option, parameters, parameters)}"


def _unknown_parameter_of_some_class(option: str, message: str, parser: LightningArgumentParser) -> str:
    known = {c.__name__: _parameters(c) for base in BASES.values() for c in own_subclasses(base)}
    if owners := sorted(name for name, parameters in known.items() if option in parameters):
        return f"no option {option!r} where it was given; it belongs to {', '.join(owners)}"
    parameters = sorted(set().union(*known.values()))
    return f"no option {option!r}; {_known(option, parameters, parameters)}"


def _parameters(owner: Any) -> list[str]:
    """Names of the arguments of a function, or of a class and the base classes that get its ``**kwargs``."""
    if inspect.isclass(owner):
        return ArgumentParser().add_class_arguments(owner, fail_untyped=False)
    return list(inspect.signature(owner).parameters)


def _unknown_option(found: str, message: str, parser: LightningArgumentParser) -> str:
    option = found.split()[0].lstrip("-").split("=")[0]
    options = sorted({known.lstrip("-") for p in _with_subparsers(parser) for known in p._option_string_actions})
    group = option.rsplit(".", 1)[0] + "."
    siblings = [known for known in options if known.startswith(group)] or [
        "seed_everything",
        "trainer",
        "model",
        "data",
    ]
    return f"no option {option!r}; {_known(option, siblings, options)}"


def _missing(found: str, message: str, parser: LightningArgumentParser) -> str:
    """What a command lacks, of ``COMMAND.model`` and ``COMMAND.data``."""
    command, lacks = found.partition(".")[0], [name for name in ("model", "data") if f".{name}" in found]
    if not lacks:
        return " ".join(message.split())
    needs = " and ".join({"model": "a model", "data": "data"}[name] for name in lacks)
    if command != "fit":
        return f"{command} needs {needs}; for those of a run give --ckpt_path RUN/checkpoints/NAME.ckpt"
    options = " and ".join(f"--{name}.help" for name in lacks)
    return f"fit needs {needs}, which {options} {'show' if len(lacks) > 1 else 'shows'}, or a --config FILE"


def _no_file(path: str, message: str, parser: LightningArgumentParser) -> str:
    folder = installed_folder(Path(path).parent)
    there = sorted(str(p.name) for p in folder.glob("*.yaml")) if folder.is_dir() else []
    shown = _known(Path(path).name, there, there) if there else f"no .yaml files in {str(folder)!r}"
    return f"no file {path!r}; {shown}"


# Beginnings of the lines in jsonargparse's errors that list its attempts and not the error.
_NOISE = ("Does not validate", "Subtypes", "Errors", "Expected a <class", "Given value")
_EXPLANATIONS: dict[str, Callable[[Any, str, LightningArgumentParser], str]] = {
    r"Expected a dot import path string: (\S+)": _unknown_class,
    r"given class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted": _unknown_parameter,
    r"^Option '([\w.]+)' is not accepted": _unknown_parameter_of_some_class,
    r"unrecognized arguments: (.+)": _unknown_option,
    r"does not accept option '([\w.]+)'": _unknown_option,
    r"File does not exist: '(.+?)'": _no_file,
    r"arguments are required: (.+)": _missing,
}
# The options that take a class, with the class that it must be below.
BASES: dict[str, type[Any]] = {
    "model": LightningModule,
    "data": LightningDataModule,
    "callbacks": Callback,
    "logger": Logger,
    "optimizer": torch.optim.Optimizer,
    "lr_scheduler": torch.optim.lr_scheduler.LRScheduler,
}


def _known(name: str, shown: list[str], all_names: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(all_names), n=3)
    listed = ", ".join(shown[:20]) + (", ..." if len(shown) > 20 else "")
    return f"expected one of {listed}" + (f"; nearest: {', '.join(nearest)}" if nearest else "")


def own_subclasses(base: type[Any]) -> list[type[Any]]:
    """Our classes below another one that a command may be given."""
    # Other callbacks of ours belong to the command line itself.
    home = "ncfinetune.callbacks." if base is Callback else "ncfinetune."
    return [subclass for subclass in _concrete_subclasses(base) if subclass.__module__.startswith(home)]


def _concrete_subclasses(base: type[Any]) -> Iterator[type[Any]]:
    """The classes below another one that can be built and are not private."""
    for subclass in base.__subclasses__():
        if not inspect.isabstract(subclass) and not subclass.__name__.startswith("_"):
            yield subclass
        yield from _concrete_subclasses(subclass)


def _with_subparsers(parser: LightningArgumentParser) -> list[LightningArgumentParser]:
    subcommands = getattr(parser, "_subcommands_action", None)
    return [parser, *(subcommands.choices.values() if subcommands else [])]

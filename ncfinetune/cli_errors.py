"""One-line errors of the command line, which list the valid names if a name is misspelt."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

from ncfinetune.overlays import installed_folder
from ncfinetune.texts import some


class PlainParser(LightningArgumentParser):
    """Accepts no abbreviated options, and reports errors in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2 and one line; a class's parser leaves that to the command's, which knows the class."""
        if not self.exit_on_error:
            super().error(message, ex)
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
    message = _of_the_chosen(message)
    for pattern, explain in _EXPLANATIONS.items():
        if found := re.findall(pattern, message):
            return explain(found[-1], message, parser)
    message = _innermost(message)
    lines = [line.strip(" -") for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith(_NOISE)]
    if len(kept) == 1 and (key := re.fullmatch(r'Parser key "([\w.]+)":', kept[0])):
        return _wrong_type(key[1], message)
    return "; ".join(dict.fromkeys(kept))


def _of_the_chosen(message: str) -> str:
    """The error without the attempt to take a base class, as one callback, in place of the one that was chosen."""
    bases = "|".join(base.__name__ for base in BASES.values())
    rest = re.sub(
        rf"- Problem with given class_path '(?:\w+\.)*(?:{bases})':\s+Option '[\w.]+' is not accepted", "", message
    )
    return rest if "Problem with given class_path" in rest else message


def _innermost(message: str) -> str:
    """Of errors that contain one another the part on the innermost key."""
    lines = message.splitlines()
    keys = [place for place, line in enumerate(lines) if line.lstrip(" -").startswith('Parser key "')]
    if not keys:
        return message
    key, *after = lines[keys[-1] :]
    own = itertools.takewhile(lambda line: not line.strip() or _indent(line) > _indent(key), after)
    return "\n".join([key.strip(" -"), *own])


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _wrong_type(key: str, message: str) -> str:
    """What an option takes and was given, of an error that says nothing else."""
    choices = [
        str(one) for found in re.findall(r"typing\.Literal(\[.*?\])", message) for one in ast.literal_eval(found)
    ]
    types = re.findall(r"Expected an? <class '(?:\w+\.)*(\w+)'>", message)
    named = ["null" if name == "NoneType" else name for name in dict.fromkeys(types)]
    listed = [f"one of {', '.join(dict.fromkeys(choices))}"] if choices else []
    wanted = " or ".join([*listed, *sorted(named, key="null".__eq__)])  # null last
    given = re.search(r"(?:Got|Given) value: (.*)", message, re.DOTALL)
    return f"{key}: expected {wanted or 'another type'}" + (f", got {' '.join(given[1].split())!r}" if given else "")


def _unknown_class(name: str, message: str, parser: LightningArgumentParser) -> str:
    key = re.findall(r'(?:Parser key "|^--)([\w.]+?)(?:"|\.help:)', message)[-1]
    base = BASES.get(key.split(".")[-1])
    if base is None:
        return _wrong_type(key, _innermost(message)) if "typing.Literal[" in message else f"{key}: no class {name!r}"
    classes = {c.__name__ for c in _concrete_subclasses(base)}
    own = {c.__name__ for c in own_subclasses(base)}
    return f"{key}: no class {name!r}; {_known(name, sorted(own or classes), classes)}"


def _unknown_parameter(option: str, message: str, parser: LightningArgumentParser) -> str:
    """An option that a class hasn't; without a class jsonargparse looks for it in the base class of all."""
    refused = rf"Option '{re.escape(option)}' is not accepted"
    paths = re.findall(rf"class_path '([\w.]+)':\s+{refused}", message)
    paths += re.findall(rf"{refused}\W+Got value: Namespace\(class_path='([\w.]+)'", message)
    owners = [getattr(importlib.import_module(module), name) for module, _, name in (p.rpartition(".") for p in paths)]
    if not owners:
        return f"no option {option!r} where it was given"
    owner = owners[0]
    kind = next((kind for kind, base in BASES.items() if inspect.isclass(owner) and issubclass(owner, base)), "")
    own = own_subclasses(BASES[kind]) if kind else []
    homes = sorted(c.__name__ for c in own if option in _parameters(c))
    belongs = f"; it belongs to {', '.join(homes)}" if homes else ""
    if owner in BASES.values():
        place = _PLACES[kind]
        others = [one for one in _elsewhere(option, parser) if not one.startswith(f"{place}.{option} ")]
        start = f"no option {option!r} where it was given; options of a class come after --{place} CLASS"
        return start + (belongs or _nearest(others))
    parameters, start = _parameters(owner), f"{owner.__name__} has no option {option!r}"
    if belongs:
        return start + belongs + _nearest(_alike(option, parameters))
    if elsewhere := _elsewhere(option, parser):
        return start + _nearest(elsewhere)
    return f"{start}; {_known(option, parameters, parameters)}"


def _elsewhere(option: str, parser: LightningArgumentParser) -> list[str]:
    """Options of this name in another place, or of this name after another word, as max_epochs.

    Of the classes that may be chosen there, those count that half of them have.
    """
    name, options = option.rsplit(".", 1)[-1], _options(parser)
    found = [(known.rsplit(".", 1)[-1], known) for known in options]
    for kind in ("model", "data", "optimizer", "lr_scheduler"):
        place = _PLACES[kind]
        if place.split(".")[0] in options:
            found += [(known, f"{place}.{known} (after --{place} CLASS)") for known in _common_parameters(BASES[kind])]
    same = [where for last, where in found if last == name]
    return (same or [where for last, where in found if re.fullmatch(f"[a-z]+_{re.escape(name)}", last)])[:3]


def _common_parameters(base: type[Any]) -> list[str]:
    """The arguments that half of the classes below one have, of ours and torch's."""
    classes = [one for one in _concrete_subclasses(base) if one.__module__.startswith(("ncfinetune.", "torch."))]
    counts = Counter(name for subclass in classes for name in _parameters(subclass))
    return [name for name, count in counts.items() if 2 * count >= len(classes)]


def _parameters(owner: Any) -> list[str]:
    """Names of the arguments of a function, or of a class and the base classes that get its ``**kwargs``."""
    if inspect.isclass(owner):
        return ArgumentParser().add_class_arguments(owner, fail_untyped=False)
    return list(inspect.signature(owner).parameters)


def _unknown_option(found: str, message: str, parser: LightningArgumentParser) -> str:
    word, options = found.split()[0], _options(parser)
    option = word.lstrip("-").split("=")[0]
    if not word.startswith("-") and "ckpt_path" in options:
        return f"expected an option, got {word!r}; {_WAYS}"
    group = option.rsplit(".", 1)[0] + "."
    siblings = [known for known in options if known.startswith(group)] or [
        "seed_everything",
        "trainer",
        "model",
        "data",
    ]
    return f"no option {option!r}; {_known(option, siblings, options, _elsewhere(option, parser))}"


def _options(parser: LightningArgumentParser) -> list[str]:
    return sorted({known.lstrip("-") for p in _with_subparsers(parser) for known in p._option_string_actions})


def _missing(found: str, message: str, parser: LightningArgumentParser) -> str:
    """What a command lacks, of ``COMMAND.model`` and ``COMMAND.data``."""
    command, lacks = found.partition(".")[0], [name for name in ("model", "data") if f".{name}" in found]
    if not lacks:
        owner = re.search(r"class_path '(?:\w+\.)*(\w+)':\s+the following", message)
        return (f"{owner[1]}: " if owner else "") + f"the following arguments are required: {found}"
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
_NOISE = ("Does not validate", "Subtypes", "Errors", "Expected a <class", "Expected a typing.Literal", "Given value")
_EXPLANATIONS: dict[str, Callable[[Any, str, LightningArgumentParser], str]] = {
    r"Expected a dot import path string: (\S+)": _unknown_class,
    r"Option '([\w.]+)' is not accepted": _unknown_parameter,
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
# Where they are on the command line.
_PLACES = {
    "model": "model",
    "data": "data",
    "callbacks": "trainer.callbacks",
    "logger": "trainer.logger",
    "optimizer": "model.optimizer",
    "lr_scheduler": "model.lr_scheduler",
}
# How to give what is often given as a word of its own.
_WAYS = "a checkpoint is given by --ckpt_path, images to predict or evaluate by --images, a configuration by --config"


def _known(name: str, shown: list[str], all_names: Iterable[str], nearest: Sequence[str] = ()) -> str:
    nearest = nearest or _alike(name, all_names)
    # The nearest first, since not all may be shown.
    shown = sorted(shown, key=lambda one: nearest.index(one) if one in nearest else len(nearest))
    return f"expected one of {some(shown, 20)}{_nearest(nearest)}"


def _alike(name: str, names: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(names), n=3)


def _nearest(names: Sequence[str]) -> str:
    return f"; nearest: {', '.join(names)}" if names else ""


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

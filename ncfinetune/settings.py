"""Names of what a run's configuration describes, and in which settings configurations differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

# Settings that do not make a run another one: its seed, where its files are, and what it shows.
_NOT_THE_EXPERIMENT = (
    *(
        "seed_everything",
        "data.seed",
        "ckpt_path",
        "test_after_fit",
        "images",
        "predictions",
        "weights_only",
        "verbose",
    ),
    *("trainer.logger*", "trainer.default_root_dir", "trainer.enable_*", "trainer.profiler*", "trainer.*.dirpath"),
    *("model.cache_dir", "data.num_workers", "data.download", "data.in_memory"),
    *("trainer.*.downstream.seed", "trainer.*.downstream.num_workers", "trainer.*.downstream.download"),
)
# Where a whole number counts batches and another is a share of them: 1 is one batch, 1.0 are all.
_SHARES = ("trainer.limit_*_batches", "trainer.val_check_interval", "trainer.overfit_batches")
# What selects images by 0 too, where null stands for another number.
_ZERO_COUNTS = "val_fraction"
# How images are fed, rather than which ones.
_NOT_THE_TASK = (
    *("seed", "batch_size", "num_workers", "device_cache", "in_memory", "download", "image_size"),
    *("augmentation", "strength", "views", "mixup", "cutmix", "normalize", "mean", "std", "sampling"),
)
# What has no part in how test images are evaluated.
_NOT_THE_TEST = (
    *("batch_size", "num_workers", "device_cache", "in_memory", "download", "augmentation", "strength", "views"),
    *("mixup", "cutmix", "sampling"),
)
# What chooses training images alone in our datamodules, which split off test images first, and validation images next.
_FEW_LABELS = ("shots", "fraction", "seed")
_NOT_IN = {"train": (), "val": _FEW_LABELS, "test": (*_FEW_LABELS, "val_fraction")}
# Where a configuration names the weights that a run starts from.
CHECKPOINTS = tuple(f"model.{place}checkpoint{path}" for place in ("", "backbone.") for path in ("", ".path"))
# The parts of a configuration in the order in which their differences are named; then come all others.
_PARTS = ("model", "data", "optimizer", "lr_scheduler", "trainer")
# More differences than this make a row unreadable.
_SHOWN = 6
_LONGEST = 40


def method_name(model: Mapping[str, Any]) -> str:
    """Name of the method that a model's configuration describes, in the words of Li et al. (arXiv 2212.12206)."""
    name = str(model.get("class_path", "?")).rsplit(".", 1)[-1]
    knobs = _arguments(model)
    return _fine_tuning(knobs) if name == "FineTuner" else ", ".join([name, *_pre_training(knobs)])


def _arguments(part: Mapping[str, Any]) -> dict[str, Any]:
    arguments = part.get("init_args")
    return arguments if isinstance(arguments, dict) else {}


def _fine_tuning(knobs: dict[str, Any]) -> str:
    layers, skips = (_listed(_blocks(knobs.get(name) or [])) for name in ("train", "skip_from"))
    layers = layers or "none"
    base = {"none": "linear probe", "all": "full FT"}.get(layers, f"layer FT {layers}")
    name = f"SCL FT {layers}" if skips == layers else f"{base}, skip from {skips}" if skips else base
    words = ["gradient through the skip"] if knobs.get("skip_gradient") == "skip" else []
    words += [f"{knobs['head_init']} start"] if knobs.get("head_init", "default") not in ("default", "zero") else []
    words += [f"{knobs['refit']} refit"] if knobs.get("refit", "none") != "none" else []
    return ", ".join([name, *words])


def _blocks(names: Any) -> list[str]:
    """Layers by name; a number is a block, counted from the last, -1."""
    last = {-1: "last block", -2: "last block but one"}
    listed = names if isinstance(names, list) else [names]
    return [last.get(name, f"block {name}") if isinstance(name, int) else str(name) for name in listed]


def _listed(names: Any) -> str:
    return ", ".join(map(str, names)) if isinstance(names, list) else str(names)


def _pre_training(knobs: dict[str, Any]) -> list[str]:
    """What sets a pre-training apart: its loss, its head, its adversary."""
    words = ["mse"] if knobs.get("loss") == "mse" else []
    projection = knobs.get("projection", "none")
    words += [f"{projection} head"] if projection != "none" else []
    return words + (["PGD"] if knobs.get("adversary") else [])


def task_name(data: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """Name of the task that a datamodule's configuration describes: its class and what selects images.

    Args:
        data: The configuration.
        without: Arguments to leave out.
    """
    name = str(data.get("class_path", "?")).rsplit(".", 1)[-1]
    left_out = {*_NOT_THE_TASK, *without}
    given = {key: value for key, value in _arguments(data).items() if key not in left_out}
    chosen = {key: value for key, value in given.items() if value or (key == _ZERO_COUNTS and value is not None)}
    return ", ".join([name, *(f"{key} {_word(value)}" for key, value in chosen.items())])


def evaluated_images(data: Mapping[str, Any], split: str = "test") -> str:
    """What of a datamodule's configuration selects the images of a split and prepares them; equal for the same pixels.

    Args:
        data: The configuration.
        split: ``train``, ``val`` or ``test``.
    """
    package, _, name = str(data.get("class_path", "?")).rpartition(".")
    left_out = {*_NOT_THE_TEST, *(_NOT_IN[split] if package.startswith("ncfinetune.") else ())}
    chosen = {key: value for key, value in _arguments(data).items() if value is not None and key not in left_out}
    return ", ".join([name, *(f"{key} {_resolved(value)}" for key, value in sorted(chosen.items()))])


def _resolved(value: Any) -> str:
    """A value as text; of a file or folder its absolute path."""
    return str(Path(value).resolve()) if isinstance(value, str) and value and Path(value).exists() else _word(value)


def headline(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is, in few words: TensorBoard's page HPARAMS shows five columns of some 16 letters by default.

    Args:
        config: The resolved configuration of a fit.
    """
    model, data, trainer = (config.get(part) or {} for part in ("model", "data", "trainer"))
    knobs, images = _arguments(model), _arguments(data)
    network = knobs.get("backbone")
    few = [f"{key} {_word(images[key])}" for key in ("shots", "fraction", "classes") if images.get(key)]
    return {
        "method": method_name(model),
        "network": str(network.get("name") if isinstance(network, Mapping) else network),
        "lr": _arguments(knobs.get("optimizer") or {}).get("lr"),
        "data": ", ".join([_data_name(data), *few]),
        "epochs": trainer.get("max_epochs"),
    }


def _data_name(data: Mapping[str, Any]) -> str:
    """The class of public data, whose root is where it was downloaded to; the folder of a user's own."""
    name = str(data.get("class_path", "?")).rsplit(".", 1)[-1]
    return Path(str(_arguments(data).get("root"))).name if name == "ImageFolder" else name


def settings(config: Mapping[str, Any]) -> dict[str, str]:
    """What of a configuration makes it another experiment, by dotted name: ``model.optimizer.lr``.

    What is not set (null, or an empty list) is left out, as are ``init_args`` in names; of a list of objects each has
    the name of its class.
    """
    found = dict(_flat(config, ""))
    return {key: value for key, value in found.items() if not any(fnmatch(key, p) for p in _NOT_THE_EXPERIMENT)}


def _flat(node: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _flat(
                value, name if key in ("init_args", "class_path") else f"{name}.{key}" if name else str(key)
            )
    elif isinstance(node, list) and any(isinstance(item, Mapping) for item in node):
        seen: Counter[str] = Counter()
        for item in node:
            kind = str(item.get("class_path", "")).rsplit(".", 1)[-1] if isinstance(item, Mapping) else str(item)
            seen[kind] += 1
            yield from _flat(item, f"{name}.{kind}" + (f"#{seen[kind]}" if seen[kind] > 1 else ""))
    elif any(fnmatch(name, pattern) for pattern in _SHARES):
        yield from _share(node, name)
    elif node is not None and node != []:
        yield name, _word(node)


def _share(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """A setting that counts batches, or says which share of them; none where that are all, as they are by default."""
    if isinstance(value, float) and value:
        if value != 1 or name == "trainer.overfit_batches":
            yield name, f"{_word(value)} of all"
    elif value is not None:
        yield name, _word(value)


def _word(value: Any) -> str:
    """A value as text; 20 and 20.0 are one."""
    if isinstance(value, list):
        return " ".join(map(_item, value))
    if isinstance(value, float):
        return f"{value:.12g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _item(value: Any) -> str:
    """An item of a list as text: with brackets if it is one itself, with quotes if it has spaces."""
    if isinstance(value, list):
        return f"[{_word(value)}]"
    return repr(value) if isinstance(value, str) and " " in value else _word(value)


def told_apart(names: Sequence[object], rows: Sequence[Mapping[str, str]]) -> list[str]:
    """For each of some experiments' settings what tells it from others of the same name; see `differences`."""
    texts = [""] * len(rows)
    for name in set(names):
        alike = [place for place, other in enumerate(names) if other == name]
        for place, text in zip(alike, differences([rows[place] for place in alike]), strict=True):
            texts[place] = text
    return texts


def differences(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """For each of some experiments' settings those that tell it from the others: ``lr 0.001, max_epochs 20``.

    A setting that is not set in a row is not in its text. Of many settings those are shown that tell most rows apart,
    and how many more there are.
    """
    keys = sorted({key for row in rows for key in row}, key=_place)
    keys = [key for key in keys if len({row.get(key) for row in rows}) > 1]
    shown = _telling(rows, keys)
    names = _short_names(shown)
    texts = []
    for row in rows:
        words = [_words(names[key], _short(key, row, rows)) for key in shown if key in row]
        more = sum(key in row for key in keys) - len(words)
        texts.append(", ".join(words + ([f"and {more} more"] if more else [])))
    return texts


def _words(name: str, value: str) -> str:
    """A setting as text; one of a list of objects is called by its class."""
    return name if value == name.split("#")[0] else f"{name} {value}"


def _place(key: str) -> tuple[int, str]:
    part = key.split(".")[0]
    return (_PARTS.index(part) if part in _PARTS else len(_PARTS)), key


def _telling(rows: Sequence[Mapping[str, str]], keys: list[str]) -> list[str]:
    """Settings to show, so few as can be read and so many that no two rows are alike."""
    if len(keys) <= _SHOWN:
        return keys
    chosen: list[str] = []

    def gain(more: str) -> tuple[int, int]:
        """How many kinds of rows there are with it, and how little is shown yet of a row that has it."""
        kinds = len({tuple(row.get(key) for key in (*chosen, more)) for row in rows})
        return kinds, -min(sum(key in row for key in chosen) for row in rows if more in row)

    distinct = len({tuple(row.get(key) for key in keys) for row in rows})
    while len(chosen) < _SHOWN or len({tuple(row.get(key) for key in chosen) for row in rows}) < distinct:
        chosen.append(max((key for key in keys if key not in chosen), key=gain))
    return [key for key in keys if key in chosen]


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """As many of the last words of each name as tell it from the others."""

    def end(key: str, words: int) -> str:
        return ".".join(key.split(".")[-words:])

    names = {}
    for key in keys:
        words = 1
        while words < key.count(".") + 1 and sum(end(other, words) == end(key, words) for other in keys) > 1:
            words += 1
        names[key] = end(key, words)
    return names


def _short(key: str, row: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> str:
    """A row's value: a class without its package, a long one by its end, if it still differs from the others then."""
    for form in (_without_package, lambda value: value):
        shortened = {value: _end(form(value)) for other in rows if (value := other.get(key)) is not None}
        if len(set(shortened.values())) == len(shortened):
            return shortened[row[key]]
    return row[key]


def _without_package(value: str) -> str:
    is_class = all(word.isidentifier() for word in value.split(".")) and value.rsplit(".", 1)[-1][:1].isupper()
    return value.rsplit(".", 1)[-1] if is_class else value


def _end(value: str) -> str:
    return value if len(value) <= _LONGEST else "..." + value[3 - _LONGEST :]

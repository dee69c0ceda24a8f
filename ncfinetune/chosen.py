"""The trained part of a backbone: whole layers, and single parameters by patterns of their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from ncfinetune.layers import find_layers, fitting_paths

_WILD = frozenset("*?[")
# Up to this many layers a table lists one by one: a screen has room for them.
_MOST_ROWS = 12


@dataclass(frozen=True)
class Chosen:
    """The trained layers and parameters of a backbone's network.

    Args:
        layers: Layers that are trained as a whole, by name. They follow the model's training mode, so that batch-norm
            statistics and dropout are active.
        parameters: Paths in the network of single trained parameters, by the pattern that names them. The layers that
            hold them stay in eval mode.
    """

    layers: Mapping[str, nn.Module] = field(default_factory=dict)
    parameters: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def tensors(self, network: nn.Module) -> dict[str, list[nn.Parameter]]:
        """Trained parameters, by the name or pattern that chose them."""
        rows = {name: list(layer.parameters()) for name, layer in self.layers.items()}
        return rows | {name: [network.get_parameter(path) for path in paths] for name, paths in self.parameters.items()}

    def check(self, network: nn.Module) -> None:
        """Check that the chosen parameters require a gradient, and no others.

        Raises:
            ValueError: Another set of parameters requires a gradient.
        """
        trained = {id(p) for tensors in self.tensors(network).values() for p in tensors}
        if other := [path for path, p in network.named_parameters() if p.requires_grad != (id(p) in trained)]:
            raise ValueError(
                f"requires_grad of {other[0]!r} was changed since, as by another FineTuner on the same Backbone: "
                "give each its own Backbone, and name its layers by train=..."
            )

    def rows(self, network: nn.Module) -> dict[str, list[nn.Parameter]]:
        """`tensors` for a table, with one row for all layers if there are many."""
        tensors = self.tensors(network)
        if len(tensors) <= _MOST_ROWS:
            return tensors
        return {f"{len(tensors)} layers": [parameter for row in tensors.values() for parameter in row]}

    def places(self) -> list[str]:
        """Names of the modules that are trained or hold trained parameters; the network's name is empty."""
        holders = (path.rpartition(".")[0] for paths in self.parameters.values() for path in paths)
        return list(dict.fromkeys([*self.layers, *holders]))

    def paths(self, module: nn.Module, network: nn.Module) -> set[str]:
        """Paths in ``module``, which contains the network, of all chosen layers and parameters.

        A layer that is used in several places has several.
        """
        wanted = set(map(id, self.layers.values()))
        found = {path for path, part in module.named_modules(remove_duplicate=False) if id(part) in wanted}
        prefix = next(path for path, part in module.named_modules() if part is network)
        return found | {f"{prefix}.{path}" for paths in self.parameters.values() for path in paths}


def choose(backbone: nn.Module, network: nn.Module, train: str | Sequence[str]) -> Chosen:
    """The layers and parameters that ``train`` names in a backbone's network.

    A name or pattern that fits layers chooses whole layers; a pattern chooses all layers that it fits, without layers
    that have no parameters. Dropout is an exception, since its training mode matters: ``*lora_*`` includes the dropout
    of adapters. A name or pattern that fits no layer is matched with the ends of the parameters' paths in the same way:
    ``*.bias`` or ``*.bn*.weight``.

    Raises:
        ValueError: It names nothing, every layer without being ``all``, a layer without parameters, or a parameter
            that is shared with parts that it does not name.
    """
    if train == "none":
        return Chosen()
    if train == "all":
        return Chosen({"backbone": backbone})
    layers: dict[str, nn.Module] = {}
    parameters: dict[str, Sequence[str]] = {}
    for pattern in _patterns(train):
        found = _layers(network, pattern)
        if paths := () if found else _parameters(network, pattern):
            parameters[pattern] = paths
        else:
            layers |= found or find_layers(network, [pattern])  # the latter raises and names the layers
    order = {id(module): number for number, module in enumerate(network.modules())}
    layers = dict(sorted(layers.items(), key=lambda item: order[id(item[1])]))
    chosen = Chosen(layers, parameters)
    trained = {id(p) for tensors in chosen.tensors(network).values() for p in tensors}
    if all(id(p) in trained for p in network.parameters()):
        raise ValueError(f'train={train!r} names every layer; say train="all"')
    _check_shared(network, chosen, trained)
    return chosen


def _patterns(train: str | Sequence[str]) -> list[str]:
    patterns = [train] if isinstance(train, str) else list(train)
    if not any(patterns):
        raise ValueError(f'train={train!r} names no layer; say train="none"')
    if {"none", "all"} & set(patterns):
        raise ValueError(f"train={train!r}: none and all stand alone; give one of them, or layers")
    if not set("".join(patterns)) - set("*.?"):
        raise ValueError(f'train={train!r} names every layer; say train="all"')
    return patterns


def _layers(network: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The layers that a name or pattern fits, by the shortest unambiguous names."""
    modules = {path: layer for path, layer in network.named_modules() if path}
    if not _WILD & set(pattern):
        found = find_layers(network, [pattern]) if pattern in modules or fitting_paths(modules, pattern) else {}
        if empty := [name for name, layer in found.items() if not _has_parameters(layer)]:
            raise ValueError(f"layer {empty[0]!r} has no parameters to train; name the block that holds it")
        return found
    fitting = fitting_paths(modules, pattern)
    if fitting and not any(_has_parameters(modules[path]) for path in fitting):
        raise ValueError(f"layer {next(iter(fitting))!r} has no parameters to train; name the block that holds it")
    chosen = {path: end for path, end in fitting.items() if _has_parameters(modules[path]) or _drops(modules[path])}
    ends = list(fitting.values())
    return {end if ends.count(end) == 1 else path: modules[path] for path, end in chosen.items()}


def _parameters(network: nn.Module, pattern: str) -> Sequence[str]:
    named = dict(network.named_parameters(remove_duplicate=False))
    return (pattern,) if pattern in named else tuple(fitting_paths(named, pattern))


def _has_parameters(layer: nn.Module) -> bool:
    return any(True for _ in layer.parameters())


def _drops(layer: nn.Module) -> bool:
    return any(isinstance(part, nn.modules.dropout._DropoutNd) for part in layer.modules())


def _check_shared(network: nn.Module, chosen: Chosen, trained: Iterable[int]) -> None:
    """Refuse parameters that are shared with layers which were not chosen and would be trained too."""
    ids, wanted = set(trained), set(map(id, chosen.layers.values()))
    inside = tuple(f"{path}." for path, m in network.named_modules(remove_duplicate=False) if id(m) in wanted)
    named = {path for paths in chosen.parameters.values() for path in paths}
    for path, parameter in network.named_parameters(remove_duplicate=False):
        if id(parameter) in ids and not path.startswith(inside) and path not in named:
            rows = chosen.tensors(network).items()
            own = next(name for name, tensors in rows if any(p is parameter for p in tensors))
            raise ValueError(
                f"layer {own!r} shares a parameter with other layers, {path!r} among them, which would be trained too; "
                "name all layers that share it, or another layer"
            )


def parameter_table(rows: Mapping[str, Iterable[nn.Parameter]]) -> str:
    """Numbers of trained and of all parameters per row, shared ones counted in the first row only, and the total."""
    seen: set[int] = set()
    counts = []
    for name, parameters in rows.items():
        new = [p for p in parameters if id(p) not in seen]
        seen.update(map(id, new))
        counts.append((name, sum(p.numel() for p in new if p.requires_grad), sum(p.numel() for p in new)))
    counts = [row for row in counts if row[2]]
    counts.append(("all", sum(row[1] for row in counts), sum(row[2] for row in counts)))
    lines = [f"{name:<24}{own:>16,}{of:>16,}{100 * own / of:>10.3g}" for name, own, of in counts]
    return "\n".join([f"{'parameters':<24}{'trained':>16}{'total':>16}{'%':>10}", *lines])

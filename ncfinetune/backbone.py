"""Backbone: a timm network without its classifier, its layers by name.

Legend: ``N`` samples, ``d`` width of the penultimate features, ``d_l`` width of layer ``l``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors.torch import load_file
from torch import Tensor, nn

from ncfinetune.layers import PENULTIMATE, Pool, block_names, caught, find_layers, find_pools

# Share of a network's values below which weights are rather those of another architecture.
_ENOUGH = 0.75


class Backbone(nn.Module):
    """A timm network without its classifier.

    Args:
        name: Name of a timm architecture, as in ``timm.list_models()``.
        pretrained: Load timm's weights for it (a download, or timm's local cache).
        checkpoint: File with weights to start from: of this package, Lightning, timm or torchvision, or safetensors.
        stem: ``cifar`` replaces the stem of a ResNet by a 3x3 convolution of stride 1 without max-pooling, for images
            of about 32 pixels and less (He et al. 2016, section 4.2); ``imagenet`` keeps the network's own.
        channels_last: Keep images and weights in the memory format in which convolutions are fastest on most devices.
        compile: Run the network through `torch.compile`; the first pass, and the first after layers got or lost
            forward hooks, takes a while. `stages` is not compiled.
        timm_kwargs: What else ``timm.create_model`` takes, such as ``in_chans`` or ``img_size``.

    Attributes:
        net: The timm network.
        dim: Width ``d`` of the penultimate features.
        spec: The arguments that build the same architecture again, as plain data.

    Raises:
        ValueError: Unknown architecture (with the nearest names) or tag of weights, a stem that the architecture does
            not have, or a checkpoint that fits none of its parameters; in ``forward`` and ``stages``, what is no batch
            of images with its number of channels.
        FileNotFoundError: No such checkpoint.
    """

    net: Any

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        checkpoint: str | None = None,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        channels_last: bool = False,
        compile: bool = False,
        **timm_kwargs: Any,
    ) -> None:
        super().__init__()
        _check_name(name)
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"expected stem imagenet or cifar, got {stem!r}")
        self.spec: dict[str, Any] = {"name": name, "stem": stem, **timm_kwargs}
        try:
            self.net = timm.create_model(name, pretrained=pretrained, num_classes=0, **timm_kwargs)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"timm cannot make {name!r} with {timm_kwargs}: {error}") from error
        if stem == "cifar":
            _shrink_stem(self.net, name)
        self.dim: int = getattr(self.net, "head_hidden_size", None) or self.net.num_features
        self._pools: dict[str, Pool] = {}
        self.channels_last = channels_last
        self.compiled = compile
        self._hooks_compiled: list[int] = []
        if channels_last:
            self.to(memory_format=torch.channels_last)
        if checkpoint is not None:
            self.load(checkpoint)

    @classmethod
    def build(cls, backbone: str | dict[str, Any] | Backbone) -> Backbone:
        """A backbone from its name, its arguments or itself.

        Raises:
            ValueError: Arguments without a name.
        """
        if isinstance(backbone, Backbone):
            return backbone
        if isinstance(backbone, dict) and "name" not in backbone:
            raise ValueError(f"expected the name of a timm architecture in the backbone, got {sorted(backbone)}")
        return cls(**({"name": backbone} if isinstance(backbone, str) else backbone))

    def forward(self, x: Tensor) -> Tensor:
        """Penultimate features of images ``x``, ``(N, d)``."""
        if not self.compiled:
            return self._run(_features, x)
        self._forget_other_hooks()
        return self._run(_compiled_features(), x)

    def _run(self, features: Callable[[Any, Tensor], Tensor], x: Tensor) -> Tensor:
        _check_images(x, self.spec)
        return features(self.net, x.contiguous(memory_format=torch.channels_last) if self.channels_last else x)

    def _forget_other_hooks(self) -> None:
        """Compile anew where hooks came or went, since compiled code keeps calling those that it was made with."""
        hooks = [key for m in self.net.modules() for key in (*m._forward_hooks, *m._forward_pre_hooks)]
        if hooks != self._hooks_compiled:
            torch.compiler.reset()
            self._hooks_compiled = hooks

    def stages(self, x: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """Pooled outputs of named layers in one forward pass, ``{name: (N, d_l)}``.

        ``"penultimate"`` is the name of what ``forward`` returns.
        """
        wanted = list(names)
        layers = {name: self.layer(name) for name in wanted if name != PENULTIMATE}
        with caught(layers, {name: self.pool(name) for name in layers}) as features:
            penultimate = self._run(_features, x)
        return {name: penultimate if name == PENULTIMATE else features[name] for name in wanted}

    def pool(self, name: str) -> Pool:
        """How the output of a layer, block or not, becomes one vector a sample; found by one pass of random images.

        Raises:
            ValueError: No such layer, one that the features do not come through, or one whose output can't be pooled.
        """
        if name not in self._pools:
            self._pools |= self._find_pools({name: self.layer(name)})
        if name not in self._pools:
            raise ValueError(
                f"layer {name!r} does not run before the penultimate features; expected a block "
                f"({', '.join(self.layers)})"
            )
        return self._pools[name]

    def layer(self, name: str) -> nn.Module:
        """The layer of that dotted path.

        Raises:
            ValueError: There is none (names the blocks that exist and the nearest paths), or a pattern fits several.
        """
        found = find_layers(self.net, [name])
        if len(found) > 1:
            raise ValueError(f"expected one layer, but {name!r} fits {', '.join(found)}; name one of them")
        return next(iter(found.values()))

    def load(self, checkpoint: str) -> None:
        """Start from the weights in a file and say which of them fitted; see `load_weights`."""
        load_weights(self.net, checkpoint)

    def save(self, path: str | Path) -> None:
        """Write the network's weights to a ``.safetensors`` or ``.pth`` file; see `save_weights`."""
        save_weights(self.net.state_dict(), path)

    @cached_property
    def layers(self) -> dict[str, int]:
        """Blocks in the order in which they run, ``{name: d_l}``, by one pass of random images; see `block_names`."""
        pools = self._find_pools({name: self.layer(name) for name in block_names(self.net)}, strict=False)
        self._pools |= pools
        # Behind the last pooling there may be rows of layers too, but those are a head.
        maps = {name: pool.dim for name, pool in pools.items() if pool.ndim > 2}
        return maps or {name: pool.dim for name, pool in pools.items()}

    def layer_table(self) -> str:
        """Name, width and parameters of each block and how it is pooled, then of the penultimate features."""
        rows = [(name, dim, _size(self.layer(name)), self.pool(name).describe()) for name, dim in self.layers.items()]
        rows.append((PENULTIMATE, self.dim, _size(self.net), "all of the network"))
        wide = max(len(row[0]) for row in rows)
        head = f"{'layer':<{wide}}  {'width':>6}  {'parameters':>12}  pooled"
        return "\n".join([head, *(f"{name:<{wide}}  {dim:>6}  {size:>12,}  {how}" for name, dim, size, how in rows)])

    def _find_pools(self, layers: dict[str, nn.Module], strict: bool = True) -> dict[str, Pool]:
        images = self.noise(2)
        return find_pools(self, layers, lambda: self._run(_features, images), strict)

    def noise(self, number: int) -> Tensor:
        """Images of noise ``(number, C, H, W)``, always the same, of the size that the network is made for."""
        like = next(self.net.parameters())
        return torch.rand(number, *self.input_size(), generator=torch.Generator().manual_seed(0)).to(like)

    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the network is made for."""
        patches = getattr(self.net, "patch_embed", None)
        size = self.spec.get("img_size") or getattr(patches, "img_size", None)
        height, width = (size, size) if isinstance(size, int) else size or self.net.pretrained_cfg["input_size"][1:]
        return self.spec.get("in_chans", 3), height, width


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _check_images(x: Tensor, spec: Mapping[str, Any]) -> None:
    channels = spec.get("in_chans", 3)
    if x.ndim == 4 and x.shape[1] == channels:
        return
    mend = "; those are views, so give the datamodule views=1" if x.ndim == 5 else ""
    if x.ndim == 4:
        mend = "; channels come first" if x.shape[3] == channels else f"; give it in_chans={x.shape[1]}"
    raise ValueError(f"the backbone takes images (N, {channels}, H, W), got {tuple(x.shape)}{mend}")


def _features(net: Any, x: Tensor) -> Tensor:
    features: Tensor = net.forward_head(net.forward_features(x), pre_logits=True)
    return features.flatten(1)


@cache
def _compiled_features() -> Callable[[Any, Tensor], Tensor]:
    return torch.compile(_features)


def save_weights(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Write the weights of a timm network to a file.

    ``Backbone(checkpoint=path)`` reads it, and so does ``timm.create_model(name, num_classes=0, checkpoint_path=path)``
    unless the stem is ``cifar``, which timm does not have.

    Raises:
        ValueError: The file's name ends neither in .safetensors nor in .pth.
    """
    path = Path(path)
    own = with_own_memory(weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(own, path)
    elif path.suffix == ".pth":
        torch.save(own, path)
    else:
        raise ValueError(f"expected a file name that ends in .safetensors or .pth, got {str(path)!r}")


def with_own_memory(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU none of which shares its memory with another, as safetensors takes them.

    A parameter that a network has under several names is copied under each, since they are all asked for on loading.
    """
    own: dict[str, Tensor] = {}
    known: set[int] = set()
    for key, value in weights.items():
        tensor = value.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        own[key] = tensor.clone() if address in known else tensor
        known.add(address)
    return own


def export(checkpoint: str, path: str) -> str:
    """Take the backbone's weights out of a learner's checkpoint into a file of their own, and say how to read it.

    Raises:
        FileNotFoundError: No such checkpoint.
        ValueError: It is not a learner's, or the file's name is not one that `save_weights` takes.
    """
    prefix = "backbone.net."
    stored = _read_weights(Path(checkpoint))
    weights = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    if not weights:
        raise ValueError(f"checkpoint {checkpoint!r} has no tensors below {prefix!r}, only {_some(list(stored))}")
    save_weights(weights, path)
    return f"{path}: {len(weights)} tensors of the backbone of {checkpoint}"


def load_weights(net: nn.Module, checkpoint: str) -> None:
    """Load the weights of a checkpoint file into ``net`` where name and shape fit, and log in a line what did.

    The line is a warning where they make up less than three quarters of the network's values, as those of a ResNet-50
    do in a ResNet-18: another stem or size of image leaves more than that. A prefix that the fitting weights share
    (``backbone.net.``, ``module.``, ``model.``) is left out, and so is a classifier, which the network does not have.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file holds no weights, or none that fit.
    """
    stored = _read_weights(Path(checkpoint))
    own = net.state_dict()
    stored = _without_prefix(stored, own)
    fitting = {key: value for key, value in stored.items() if key in own and own[key].shape == value.shape}
    missing = [key for key in own if key not in fitting]
    unused = [key for key in stored if key not in fitting]
    report = f"checkpoint {checkpoint}: {len(fitting)} of {len(own)} tensors of the network matched"
    report += f"; not in the file or of another shape: {_some(missing)}" if missing else ""
    report += f"; in the file but unused: {_some(unused)}" if unused else ""
    if not any(key in fitting for key, _ in net.named_parameters()):
        raise ValueError(f"{report}. Expected the weights of the same architecture.")
    net.load_state_dict(fitting, strict=False)
    share = sum(value.numel() for value in fitting.values()) / sum(value.numel() for value in own.values())
    if share < _ENOUGH:
        rank_zero_warn(f"{report}. That is {share:.0%} of the network's values: are they of the same architecture?")
    else:
        rank_zero_info(report)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {str(path)!r}; expected a .ckpt, .pt, .pth or .safetensors file")
    content = _content(path)
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
    weights = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise ValueError(f"checkpoint {str(path)!r} holds no tensors, only {_some(list(content))}")
    return weights


def _content(path: Path) -> dict[str, Any]:
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # unpickling other bytes can raise anything
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds objects of {foreign[1]}" if foreign else "it is damaged or no file of weights"
        raise ValueError(f"cannot read {str(path)!r} as a checkpoint of plain tensors: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {str(path)!r} holds a {type(content).__name__}, expected a dictionary of tensors")
    return content


def _without_prefix(stored: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """``stored`` under the prefix with which most keys are known to ``own``."""
    prefixes = {key[: -len(name)] for key in stored for name in own if key.endswith(name)} | {""}

    def known(prefix: str) -> int:
        return sum(key.startswith(prefix) and key[len(prefix) :] in own for key in stored)

    prefix = max(sorted(prefixes, key=len), key=known)
    return {key[len(prefix) :] if key.startswith(prefix) else key: value for key, value in stored.items()}


def _check_name(name: str) -> None:
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        nearest = difflib.get_close_matches(base, timm.list_models(), n=4)
        hint = f"nearest: {', '.join(nearest)}" if nearest else "see timm.list_models()"
        raise ValueError(f"timm has no architecture {name!r}; {hint}")
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError:
        known = timm.list_models(f"{base}.*", pretrained=True)
        mend = f"expected one of {', '.join(known)}" if known else f"it has none, so the name is {base}"
        raise ValueError(f"timm has no weights {tag!r} of {base}; {mend}") from None


def _shrink_stem(net: Any, name: str) -> None:
    stem = getattr(net, "conv1", nn.Identity())
    convolutions = [module for module in stem.modules() if isinstance(module, nn.Conv2d)]
    if not (convolutions and hasattr(net, "maxpool")):
        raise ValueError(
            f'stem="cifar" is for ResNets, and {name!r} is none; for small images give it its own arguments, '
            "such as img_size and patch_size of a ViT"
        )
    first, last = convolutions[0], convolutions[-1]
    net.conv1 = nn.Conv2d(first.in_channels, last.out_channels, 3, stride=1, padding=1, bias=last.bias is not None)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()


def _some(keys: list[str], most: int = 4) -> str:
    return f"{len(keys)} ({', '.join(keys[:most])}{', ...' if len(keys) > most else ''})"

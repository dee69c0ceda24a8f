"""Backbone: a timm network without its classifier, with its layers by name.

Legend: ``N`` samples, ``d`` width of the penultimate features, ``d_l`` width of layer ``l``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import timm
import torch
from torch import Tensor, nn

from ncfinetune import weight_files, weights
from ncfinetune.blocks import block_names
from ncfinetune.built_in import built_in, foreign
from ncfinetune.layers import PENULTIMATE, find_layers
from ncfinetune.mode_caches import drop_caches
from ncfinetune.pool_search import find_pools
from ncfinetune.pooling import Pool, caught, silent

if TYPE_CHECKING:
    from typing_extensions import Self

# Values of a tensor that are kept to tell whether it is still at its random initialisation: eight random float32 values
# that all agree are no coincidence.
_SAMPLE = 8


class Backbone(nn.Module):
    """A timm network without its classifier.

        >>> backbone = Backbone("resnet18", stem="cifar")
        >>> images = torch.rand(2, 3, 32, 32)
        >>> backbone(images).shape
        torch.Size([2, 512])
        >>> features = backbone.stages(images, ["layer1.1", "layer3.0"])
        >>> {name: tuple(value.shape) for name, value in features.items()}
        {'layer1.1': (2, 64), 'layer3.0': (2, 256)}

    Args:
        name: Name of a timm architecture, as in ``timm.list_models()``.
        pretrained: Load timm's weights for it (a download, or timm's local cache).
        checkpoint: File with weights to start from, saved by this package, Lightning, timm, torchvision or another
            library with such a network; see `weights.load`. If the file holds several networks, ``{path: FILE,
            key: KEY, prefix: PREFIX}`` selects one: the path of the dictionary of tensors in the file, and the prefix
            of the parameter names in it.
        stem: ``cifar`` replaces the stem of a ResNet by a 3x3 convolution of stride 1 without max-pooling, for images
            of about 32 pixels and less (He et al. 2016, section 4.2); ``imagenet`` keeps the network's own stem.
        lora: Arguments of `peft.LoraConfig`, such as ``{r: 8, target_modules: [qkv]}``: low-rank adapters (Hu et al.
            2021, arXiv 2106.09685), which peft inserts into those layers and initialises to have no effect. peft
            freezes all other parameters except its ``bias`` and ``modules_to_save``. Needs the extra ``lora``.
        channels_last: Keep images and weights in the memory format in which convolutions are fastest on most devices.
        timm_kwargs: Further arguments of ``timm.create_model``, such as ``in_chans`` or ``img_size``.

    Attributes:
        net: The timm network.
        dim: Width ``d`` of the penultimate features.
        spec: The arguments that build the same architecture again, as a dictionary of built-in types.

    Raises:
        ValueError: Unknown architecture (with the nearest names) or tag of weights, a stem that the architecture does
            not have, timm's own ``num_classes``, ``checkpoint_path`` or ``features_only``, options of other than
            built-in types, adapters that peft cannot make, or a checkpoint that fits none of its parameters; in
            ``forward`` and ``stages``, an input that is not a batch of images with the network's number of channels.
        FileNotFoundError: No such checkpoint.
        ModuleNotFoundError: ``lora`` without the package peft.
    """

    net: Any

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        checkpoint: str | dict[str, Any] | None = None,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        channels_last: bool = False,
        lora: dict[str, Any] | None = None,
        **timm_kwargs: Any,
    ) -> None:
        super().__init__()
        _check_name(name)
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"expected stem imagenet or cifar, got {stem!r}")
        adapters = {"lora": lora} if lora else {}
        self.spec: dict[str, Any] = built_in({"name": name, "stem": stem, **timm_kwargs, **adapters})
        _check_spec(self.spec)
        try:
            self.net = timm.create_model(name, pretrained=pretrained, num_classes=0, **timm_kwargs)
        except (AssertionError, TypeError, RuntimeError) as error:
            raise ValueError(f"timm cannot make {name!r} with {timm_kwargs}: {error}") from error
        except OSError as error:
            if not pretrained:
                raise
            raise OSError(
                f"cannot get the weights of {name!r}: {error or type(error).__name__}; without a connection, give a "
                f"file by {{name: {name}, checkpoint: FILE}}, or --checkpoint FILE of scan and suggest"
            ) from error
        fresh = set() if pretrained else {name for name, _ in self.net.named_parameters()}
        if stem == "cifar":
            _shrink_stem(self.net, name)
            fresh |= {f"conv1.{name}" for name, _ in self.net.conv1.named_parameters()}
        self._start = _samples(self.net, fresh)
        self.dim: int = getattr(self.net, "head_hidden_size", None) or self.net.num_features
        self._pools: dict[str, Pool] = {}
        self.channels_last = channels_last
        if channels_last:
            self.to(memory_format=torch.channels_last)
        # Loading weights changes no mode, at which `train` would drop them; torch leaves the hook untyped.
        self.register_load_state_dict_post_hook(_drop_caches)  # type: ignore[no-untyped-call]
        # peft's wrapper of the network; in a list, so that it is not registered as a submodule.
        self._adapters: list[Any] = []
        if checkpoint is not None:
            self.load(checkpoint)
        self._adapt()

    def _adapt(self) -> None:
        if lora := self.spec.get("lora"):
            self._adapters = [_adapted(self.net, lora)]
            self.net.train(self.net.training)  # peft creates its layers in training mode

    @classmethod
    def build(cls, backbone: str | dict[str, Any] | Backbone) -> Backbone:
        """A backbone from its name, its arguments or itself.

        Raises:
            ValueError: The arguments lack ``name``.
        """
        if isinstance(backbone, Backbone):
            return backbone
        if isinstance(backbone, dict) and "name" not in backbone:
            raise ValueError(f"expected the name of a timm architecture in the backbone, got {sorted(backbone)}")
        return cls(**({"name": backbone} if isinstance(backbone, str) else backbone))

    def train(self, mode: bool = True) -> Self:
        """Switch the mode; in eval mode no layer goes on with what it has kept of former parameters."""
        super().train(mode)
        if not mode:
            drop_caches(self.net)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Penultimate features of images ``x``, ``(N, d)``."""
        return self._run(_features, x)

    def _run(self, features: Callable[[Any, Tensor], Tensor], x: Tensor) -> Tensor:
        _check_images(x, self.spec)
        return features(self.net, x.contiguous(memory_format=torch.channels_last) if self.channels_last else x)

    def stages(self, x: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """Pooled outputs of named layers in one forward pass, ``{name: (N, d_l)}``.

        The name ``"penultimate"`` stands for the features that ``forward`` returns.

        Raises:
            ValueError: There is no such layer, or it does not run.
        """
        wanted = list(names)
        layers = {name: self.layer(name) for name in wanted if name != PENULTIMATE}
        with caught(layers, self._known_pools(layers)) as features:
            last = self._run(_features, x)
        for name in layers:
            if name not in features:
                raise silent(name)
        return {name: last if name == PENULTIMATE else features[name] for name in wanted}

    def pool(self, name: str) -> Pool:
        """The pooling of the output of a layer, block or not, to one vector per sample; found by one pass of noise.

        Raises:
            ValueError: There is no such layer, the features do not depend on it, or its output can't be pooled.
        """
        return self._known_pools({name: self.layer(name)})[name]

    def layer(self, name: str) -> nn.Module:
        """The layer with this dotted path.

        Raises:
            ValueError: No layer has it (the message names the blocks and the nearest paths), or a pattern fits several.
        """
        found = find_layers(self.net, [name])
        if len(found) > 1:
            raise ValueError(f"expected one layer, but {name!r} fits {', '.join(found)}; name one of them")
        return next(iter(found.values()))

    def load(self, checkpoint: str | dict[str, Any]) -> None:
        """Load the weights in a file and log which of them fitted; see `weights.load`.

        If the file states the normalisation of images, it is copied into the network's ``pretrained_cfg``. Adapters are
        initialised anew.

        Raises:
            FileNotFoundError: No such checkpoint.
            ValueError: The file holds no weights that fit.
        """
        adapted = bool(self._adapters)
        if adapted:  # their layers have other names than the layers in files
            self.net = self._adapters.pop().unload()
        loaded, data = weights.load(self.net, checkpoint, self.spec.get("in_chans", 3))
        drop_caches(self.net)
        self._start = {name: sample for name, sample in self._start.items() if name not in loaded}
        self.take_normalisation(data.get("preprocessing"))
        if adapted:
            self._adapt()

    def take_normalisation(self, preprocessing: Mapping[str, Any] | None) -> None:
        """Copy the mean and the standard deviation of a preprocessing into the network's ``pretrained_cfg``.

        Args:
            preprocessing: The preprocessing; None, as of a run whose data did not state it, copies nothing. Numbers of
                a single channel stand for all channels, those of another number of channels are not copied.
        """
        channels, stated = self.spec.get("in_chans", 3), {}
        for name in ("mean", "std"):
            stands = (preprocessing or {}).get(name)
            values = stands if isinstance(stands, list | tuple) else [] if stands is None else [stands]
            if len(values) in (1, channels):
                stated[name] = list(values) * (channels // len(values))
        self.net.pretrained_cfg = {**self.net.pretrained_cfg, **stated}

    def save(self, path: str | Path) -> None:
        """Write the network's weights, adapters merged, to a ``.safetensors`` or ``.pth`` file; see `weight_files`.

        Raises:
            ValueError: The file's name has another suffix.
        """
        weight_files.save(self.merged().net.state_dict(), path)

    def merged(self) -> Backbone:
        """A backbone with the adapters merged into its weights; the backbone itself if it has no adapters."""
        if not self._adapters:
            return self
        with torch.random.fork_rng(devices=[]):  # so that saving does not change the run's random numbers
            twin = Backbone(**self.spec, channels_last=self.channels_last)
        twin.net.load_state_dict(self.net.state_dict())
        twin.net = twin._adapters.pop().merge_and_unload()
        twin.net.pretrained_cfg = self.net.pretrained_cfg
        del twin.spec["lora"]
        return twin.to(next(self.net.parameters())).train(self.training)

    def merge_adapters(self) -> None:
        """Add the adapters to the weights in place, for good: the network is then fit for inference alone."""
        for adapter in self._adapters:
            adapter.merge_adapter()

    @property
    def adapters(self) -> list[str]:
        """Paths in the network of peft's adapters, whose initial values no file of weights has."""
        paths = (path for path, _ in self.net.named_modules(remove_duplicate=False))
        return [path for path in paths if path.rpartition(".")[2].startswith("lora_")] if self._adapters else []

    @property
    def random(self) -> dict[str, nn.Parameter]:
        """The parameters that still have their random initial values, by name: neither loaded nor trained since."""
        now = {_before_adapters(name): parameter for name, parameter in self.net.named_parameters()}
        return {
            name: now[name]
            for name, start in self._start.items()
            if name in now and torch.equal(_sample(now[name]), start.to(now[name].dtype))
        }

    @cached_property
    def layers(self) -> dict[str, int]:
        """Blocks in the order in which they run, ``{name: d_l}``, by one pass of random images; see `block_names`."""
        pools = self._find_pools({name: self.layer(name) for name in block_names(self.net)}, strict=False)
        # Blocks whose output has no positions come after the last pooling and belong to a head.
        maps = {name: pool.dim for name, pool in pools.items() if pool.ndim > 2}
        return maps or {name: pool.dim for name, pool in pools.items()}

    def layer_table(self) -> str:
        """A table of name, width, parameters and pooling of each block and, in its last row, of the whole network."""
        rows = [(name, dim, self.size(name), self.pool(name).describe()) for name, dim in self.layers.items()]
        rows.append((PENULTIMATE, self.dim, self.size(PENULTIMATE), "all of the network"))
        wide = max(len(row[0]) for row in rows)
        head = f"{'layer':<{wide}}  {'width':>6}  {'parameters':>12}  pooled"
        return "\n".join([head, *(f"{name:<{wide}}  {dim:>6}  {size:>12,}  {how}" for name, dim, size, how in rows)])

    def size(self, name: str) -> int:
        """Number of parameters of a layer; of the whole network for ``penultimate``."""
        part = self.net if name == PENULTIMATE else self.layer(name)
        return sum(parameter.numel() for parameter in part.parameters())

    def _known_pools(self, layers: dict[str, nn.Module]) -> dict[str, Pool]:
        """The pools of layers; those not known yet are found in one pass."""
        if missing := {name: layer for name, layer in layers.items() if name not in self._pools}:
            self._find_pools(missing)
        for name in missing:
            if name not in self._pools:
                raise ValueError(
                    f"layer {name!r} does not run before the penultimate features; expected a block "
                    f"({', '.join(self.layers)})"
                )
        return {name: self._pools[name] for name in layers}

    def _find_pools(self, layers: dict[str, nn.Module], strict: bool = True) -> dict[str, Pool]:
        images = self.noise(2)
        found = find_pools(self, layers, lambda: self._run(_features, images), strict)
        self._pools |= found
        return found

    def noise(self, number: int) -> Tensor:
        """Images of noise ``(number, C, H, W)`` from a fixed seed, of the network's input size."""
        like = next(self.net.parameters())
        return torch.rand(number, *self.input_size(), generator=torch.Generator().manual_seed(0)).to(like)

    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the network's input images."""
        patches = getattr(self.net, "patch_embed", None)
        size = self.spec.get("img_size") or getattr(patches, "img_size", None)
        height, width = (size, size) if isinstance(size, int) else size or self.net.pretrained_cfg["input_size"][1:]
        return self.spec.get("in_chans", 3), height, width


def _drop_caches(backbone: Backbone, _: Any) -> None:
    drop_caches(backbone.net)


def _adapted(net: nn.Module, lora: Mapping[str, Any]) -> Any:
    """Insert adapters into the layers of a network; returns peft's module, which can merge or remove them."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("lora needs the package peft: pip install 'ncfinetune[lora]'") from error
    try:
        return peft.LoraModel(net, peft.LoraConfig(**lora), "default")
    except (TypeError, ValueError) as error:
        raise ValueError(f"peft cannot make lora={lora}: {error}") from error


def _before_adapters(name: str) -> str:
    """The name that a parameter wrapped by peft had before."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _samples(net: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """A few values of each named parameter whose initial values are random, rather than all zero or one."""
    samples = {name: _sample(p) for name, p in net.named_parameters() if name in names}
    return {name: sample for name, sample in samples.items() if (sample != sample[:1]).any()}


def _sample(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().reshape(-1)[:_SAMPLE].cpu().clone()


def _check_images(x: Tensor, spec: Mapping[str, Any]) -> None:
    channels = spec.get("in_chans", 3)
    if x.ndim == 4 and x.shape[1] == channels:
        if not x.is_floating_point():
            raise ValueError(
                f"the backbone takes images of a floating type, got {x.dtype}; our datamodules normalise stored images "
                "in on_after_batch_transfer, so give the Trainer the datamodule, not its loader"
            )
        return
    remedy = "; those are views, so give the datamodule views=1" if x.ndim == 5 else ""
    if x.ndim == 4:
        remedy = "; channels come first" if x.shape[3] == channels else f"; give it in_chans={x.shape[1]}"
    raise ValueError(f"the backbone takes images (N, {channels}, H, W), got {tuple(x.shape)}{remedy}")


def _features(net: Any, x: Tensor) -> Tensor:
    features: Tensor = net.forward_head(net.forward_features(x), pre_logits=True)
    return features.flatten(1)


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
        remedy = f"expected one of {', '.join(known)}" if known else f"it has none, so the name is {base}"
        raise ValueError(f"timm has no weights {tag!r} of {base}; {remedy}") from None


def _check_spec(spec: Mapping[str, Any]) -> None:
    if own := [name for name in ("num_classes", "checkpoint_path", "features_only") if name in spec]:
        raise ValueError(
            f"timm's option {own[0]} is not the backbone's: it has no classifier (num_classes is the model's), its "
            "weights come from checkpoint, and its layers have names"
        )
    if spec.get("global_pool") == "":
        raise ValueError("expected a global_pool that gives one vector for each image, such as avg, got the empty one")
    if strange := foreign(spec):
        raise ValueError(
            "expected options of the backbone as numbers, words, lists and dictionaries, which checkpoints can hold, "
            f"got {strange}; timm takes the names of layers too, such as act_layer='silu'"
        )


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

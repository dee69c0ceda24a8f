"""What is said of networks' layers, tried on one small network of every kind.

One member of each of timm's model modules, of torchvision's families, and Hugging Face models of tiny configurations,
all with random weights. Six checks, each against something found in another way:

1. layers: the blocks run in the order given, none twice or inside another, and are as many as counted by hand;
2. pooling: the width of first, middle and last block is one that the network states, and by occlusion of the last
   block's output the features depend on the tokens taken and on no others; NC1 of middle, last and penultimate features
   is that of a plain float64 computation on the raw outputs;
3. forward: the features are those of timm's network;
4. step: tuning the middle block with a skip connection changes nothing else, and the gradient through the skip alone is
   that of detached features;
5. cache: the network from the block's stored input on is the network;
6. export: timm reads the files and makes the same of them.

A refusal in words is "refused", with its words. Rows are written as they come, and those in the file are not run again.

    python experiments/benchmarks/networks.py [--out networks.csv] [--suite timm|torchvision|transformers] [NAME ...]
"""

import argparse
import copy
import csv
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from network_tables import TIMM, TORCHVISION, TRANSFORMERS
from torch import Tensor, nn

from ncfinetune import Backbone, FineTuner
from ncfinetune.blocks import block_names
from ncfinetune.collapse import class_moments, nc1
from ncfinetune.layers import find_layers
from ncfinetune.pool_search import find_pools
from ncfinetune.pooling import tensors
from ncfinetune.tail import Tail

K, N = 3, 6
FIELDS = ["suite", "module", "network", "layers", "pooling", "forward", "step", "cache", "export", "seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="modules, families or types; all unless given")
    parser.add_argument("--suite", choices=["timm", "torchvision", "transformers"])
    parser.add_argument("--out", default="networks.csv")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = Path(options.out)
    done = {(row["suite"], row["module"]) for row in csv.DictReader(path.open())} if path.exists() else set()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if not done:
            writer.writeheader()
        for suite, module, check in cases():
            wanted = options.suite in (None, suite) and (not options.names or module in options.names)
            if wanted and (suite, module) not in done:
                start = time.process_time()
                row = {"suite": suite, "module": module} | check()
                writer.writerow(row | {"seconds": f"{time.process_time() - start:.1f}"})
                file.flush()
                print(*row.values(), sep=" | ", flush=True)
    summarise(path)


def cases() -> Iterator[tuple[str, str, Callable[[], dict[str, str]]]]:
    for module in timm.list_modules():
        yield "timm", module, lambda module=module: timm_row(*_member(module))
    for family, (name, size) in TORCHVISION.items():
        yield "torchvision", family, lambda name=name, size=size: foreign_row(name, lambda: _torchvision(name), size)
    for kind, (sizes, size) in TRANSFORMERS.items():
        yield "transformers", kind, lambda k=kind, s=sizes, size=size: foreign_row(k, lambda: _transformer(k, s), size)


def _member(module: str) -> tuple[str, dict[str, Any], int | None]:
    """The one listed; of a module that came since, the one with the shortest name."""
    return TIMM.get(module) or (min(timm.list_models(module=module), key=len), {}, None)


def summarise(path: Path) -> None:
    rows = list(csv.DictReader(path.open()))
    for suite in dict.fromkeys(row["suite"] for row in rows):
        own = [row for row in rows if row["suite"] == suite]
        good = [row for row in own if not any(row[check].startswith("FAIL") for check in FIELDS[3:9])]
        seconds = sum(float(row["seconds"]) for row in own)
        print(f"{suite}: {len(good)} of {len(own)} pass all checks or are refused in words; {seconds:.0f} CPU-seconds")


def attempt(check: Callable[[], str]) -> str:
    """What a check says; a ValueError is a refusal, all else a failure."""
    try:
        return check()
    except ValueError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"FAIL {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def timm_row(name: str, arguments: dict[str, Any], blocks: int | None) -> dict[str, str]:
    torch.manual_seed(0)
    row = {"network": name}
    try:
        backbone = Backbone(name, **arguments).eval()
        perturb(backbone)
    except Exception as error:
        return row | dict.fromkeys(FIELDS[3:9], f"FAIL {error}")
    size = backbone.input_size()
    if "img_size" not in arguments and _takes(backbone, 64):
        size = (size[0], 64, 64)
        backbone.net.pretrained_cfg = {**backbone.net.pretrained_cfg, "input_size": size}
    images = class_images(size)
    names: list[str] = []

    def check_layers() -> str:
        names.extend(backbone.layers)
        found = order(backbone.net, names, lambda: backbone(images[:2]))
        return (
            found if blocks in (None, len(names)) or found != f"ok {len(names)}" else f"FAIL {len(names)} of {blocks}"
        )

    row["layers"] = attempt(check_layers)
    if not names:
        return row | dict.fromkeys(FIELDS[4:9], "FAIL not reached")
    layer = names[len(names) // 2]
    widths: list[Any] = [info["num_chs"] for info in getattr(backbone.net, "feature_info", [])]
    widths += [backbone.dim, backbone.net.num_features, getattr(backbone.net, "embed_dim", 0)]
    pools = {name: backbone.pool(name) for name in names}
    row["pooling"] = attempt(
        lambda: check_pooling(backbone.net, names, pools, lambda x: backbone(x), images, _flat(widths))
    )
    row["forward"] = attempt(lambda: check_forward(backbone, images[:2]))
    row["step"] = attempt(lambda: check_step(backbone, layer, images[:4]))
    row["cache"] = attempt(lambda: check_cache(backbone, layer, images[:4]))
    row["export"] = attempt(lambda: check_export(backbone))
    return row


def class_images(size: tuple[int, ...]) -> Tensor:
    """Images of noise ``(N, C, H, W)`` with a stripe at another place for each class."""
    images = torch.rand(N, *size)
    for k in range(K):
        width = size[2] // K
        images[torch.arange(N) % K == k, :, :, k * width : (k + 1) * width] += 1
    return images


def _flat(widths: Iterable[Any]) -> set[int]:
    return {w for width in widths for w in (width if isinstance(width, list | tuple) else [width])}


def _takes(backbone: Backbone, side: int) -> bool:
    try:
        with torch.no_grad():
            return bool(torch.isfinite(backbone(torch.rand(2, 3, side, side))).all())
    except (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError):
        return False


def perturb(module: nn.Module) -> None:
    """Move constants, so that no branch is multiplied by zero, and running statistics, so that they matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in module.state_dict(keep_vars=True).values():  # what no file holds stays as it is
            if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator).to(tensor))


def settle(network: nn.Module, images: Tensor) -> None:
    """Let running statistics be those of the images, so that signals live through a deep network of random weights."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        network(images)


def order(net: nn.Module, names: list[str], run: Callable[[], Any]) -> str:
    """Whether the layers run, in this order, none inside another."""
    ran: list[str] = []
    modules = find_layers(net, names)
    handles = [m.register_forward_hook(lambda m, a, o, name=name: ran.append(name)) for name, m in modules.items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    if list(dict.fromkeys(ran)) != names:
        return "FAIL not in the order in which they run"
    if any(a != b and b.startswith(f"{a}.") for a in names for b in names):
        return "FAIL a block inside another"
    return f"ok {len(names)}"


def check_pooling(
    net: nn.Module,
    names: list[str],
    pools: dict[str, Any],
    run: Callable[[Tensor], Tensor],
    images: Tensor,
    widths: set,
) -> str:
    chosen = [names[0], names[len(names) // 2], names[-1]]
    layers = find_layers(net, chosen)
    raw: dict[str, Tensor] = {}
    pooled: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(m: nn.Module, a: Any, output: Any) -> None:
            raw[name] = list(tensors(output))[pools[name].index].double().clone()
            pooled[name] = pools[name](output, torch.float64)

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            features = run(images).double()
    finally:
        for handle in handles:
            handle.remove()
    last = names[-1]
    taken = occluded(layers[last], pools[last].index, run, images[:2]) if raw[last].ndim == 3 else None
    faults = [wrong_axis(name, raw[name], pools[name], widths) for name in raw]
    faults += [wrong_tokens(name, raw[name], pools[name], raw[last], taken) for name in raw]
    faults += [wrong_nc1(name, pooled[name], by_hand(raw[name], pools[name])) for name in raw]
    faults += [wrong_nc1("penultimate", features, features.numpy())]
    unknown = [name for name in raw if not widths & set(raw[name].shape[1:])]
    notes = [f"no stated width in {', '.join(unknown)}"] if unknown else []
    found = next((fault for fault in faults if fault), None)
    return f"FAIL {found}" if found else "; ".join(["ok", pools[last].describe(), *notes])


def wrong_axis(name: str, output: Tensor, pool: Any, widths: set[int]) -> str:
    """Where one axis alone has a stated width, it has the channels."""
    axes = [axis for axis in range(1, output.ndim) if output.shape[axis] in widths]
    wrong = len(axes) == 1 and axes[0] != pool.channel % output.ndim
    return f"{name} {tuple(output.shape)}: channels on axis {axes[0]}, pool's {pool.channel}" if wrong else ""


def wrong_tokens(name: str, output: Tensor, pool: Any, last: Tensor, taken: list[int] | None) -> str:
    """A layer with as many tokens as the last takes those that count there."""
    if taken is None or output.shape[:2] != last.shape[:2]:
        return ""
    own = sorted({i for group in pool.tokens for start, stop in group for i in range(output.shape[1])[start:stop]})
    return f"{name}: net uses {_few(taken)} of {output.shape[1]} tokens, pool {_few(own)}" if own != taken else ""


def wrong_nc1(name: str, ours: Tensor, theirs: np.ndarray) -> str:
    labels = np.arange(len(theirs)) % K
    found, expected = float(nc1(class_moments(ours, torch.from_numpy(labels), K))), nc1_by_hand(theirs, labels)
    return "" if abs(found - expected) <= 1e-6 * expected else f"{name}: NC1 {found:.8g} for {expected:.8g}"


def _few(positions: list[int]) -> str:
    return f"{len(positions)} from {positions[0]}" if positions else "0"


def occluded(layer: nn.Module, index: int, run: Callable[[Tensor], Tensor], images: Tensor) -> list[int]:
    """Positions of a layer's tokens that change the features if they are changed, tried one by one."""
    at = [-1]

    def change(m: nn.Module, a: Any, output: Any) -> Any:
        if at[0] < 0:
            return output
        changed = copy.copy(output)
        tensor = list(tensors(output))[index].clone()
        tensor[:, at[0]] += torch.randn(tensor.shape[2], generator=torch.Generator().manual_seed(at[0]))
        if isinstance(output, Tensor):
            return tensor
        if isinstance(output, tuple | list):
            return type(output)([tensor if t is list(tensors(output))[index] else t for t in changed])
        changed[list(output.keys())[index]] = tensor
        return changed

    count = [0]
    handle = layer.register_forward_hook(lambda m, a, o: count.__setitem__(0, list(tensors(o))[index].shape[1]))
    with torch.no_grad():
        before = run(images)
        handle.remove()
        handle = layer.register_forward_hook(change)
        found = []
        tokens = count[0]
        tried = range(tokens) if tokens <= 40 else [0, 1, 2, 4, 5, tokens // 2, tokens - 1]
        for position in tried:
            at[0] = position
            if not torch.equal(run(images), before):
                found.append(position)
    handle.remove()
    if tokens > 40 and {tokens // 2, tokens - 1} <= set(found):
        found = [i for i in range(tokens) if i in found or (i > 5 or (i == 3 and 2 in found))]
    return found


def by_hand(output: Tensor, pool: Any) -> np.ndarray:
    values, groups = np.moveaxis(output.numpy(), pool.channel, -1), pool.tokens
    if values.ndim == 3:
        spans = [[i for start, stop in group for i in range(values.shape[1])[start:stop]] for group in groups]
        return np.concatenate([values[:, span].mean(1) for span in spans], 1)
    return values.reshape(len(values), -1, values.shape[-1]).mean(1)


def nc1_by_hand(features: np.ndarray, labels: np.ndarray) -> float:
    """``tr(Sigma_W pinv(Sigma_B)) / K`` of Papyan, Han and Donoho (2020), by the singular vectors of the means."""
    means = np.stack([features[labels == k].mean(0) for k in range(K)])
    within = features - means[labels]
    centred = means - means.mean(0)
    _, values, right = np.linalg.svd(centred / np.sqrt(K), full_matrices=False)
    rank = K - 1
    projected = within @ right[:rank].T / values[:rank]
    return float((projected**2).sum() / len(features) / K)


def check_forward(backbone: Backbone, images: Tensor) -> str:
    with torch.no_grad():
        ours, theirs = backbone(images), backbone.net(images)
    close = ours.shape == theirs.flatten(1).shape and torch.allclose(ours, theirs.flatten(1), atol=1e-5, rtol=1e-4)
    return "ok" if close else f"FAIL {tuple(ours.shape)} for {tuple(theirs.shape)}"


def check_step(backbone: Backbone, layer: str, images: Tensor) -> str:
    own = copy.deepcopy(backbone)
    model = FineTuner(K, own, train=layer, skip_from=layer, skip_gradient="skip").train()
    labels = torch.arange(len(images)) % K
    parameters = [p for p in model.parameters() if p.requires_grad]
    penultimate, skipped = model.features(images)
    gradients = []
    for first in (penultimate, penultimate.detach()):
        loss = nn.functional.cross_entropy(model.head(first, skipped), labels)
        gradients.append(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
    scale = max(float(g.abs().max()) for g in gradients[1] if g is not None)
    for a, b in zip(*gradients, strict=True):
        if (a is None) != (b is None) or (a is not None and float((a - b).abs().max()) > 1e-6 * scale):
            return "FAIL skip gradient leaks"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(parameters, 0.1)
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    path = next(path for path, m in own.net.named_modules() if m is own.layer(layer))
    stray = [name for name in changed if not name.startswith((f"backbone.net.{path}.", "head."))]
    if stray:
        return f"FAIL changes outside the layer: {stray[0]}"
    return "ok" if any(name.startswith("backbone") for name in changed) else "FAIL nothing of the layer changes"


def check_cache(backbone: Backbone, layer: str, images: Tensor) -> str:
    backbone.eval()
    with torch.no_grad():
        tail = Tail(backbone, [backbone.layer(layer)], images)
        whole, part = backbone(images), tail(tail.capture(images))
    if not torch.allclose(whole, part, rtol=0, atol=1e-3 * float(whole.abs().max())):
        raise ValueError("the layers from there on depend on more than its input")
    return "ok"


def check_export(backbone: Backbone) -> str:
    model = FineTuner(K, copy.deepcopy(backbone)).eval()
    images = torch.rand(2, *backbone.input_size())
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.backbone.save(Path(folder, "features.safetensors"))
        arguments = {k: v for k, v in backbone.spec.items() if k not in ("name", "stem")}
        net = timm.create_model(
            backbone.spec["name"], num_classes=0, checkpoint_path=str(Path(folder, "features.safetensors")), **arguments
        )
        if not torch.allclose(net.eval()(images).flatten(1), backbone(images), atol=1e-4, rtol=1e-3):
            return "FAIL features of the file differ"
        name, arguments = model.save_for_timm(Path(folder, "whole.safetensors"))
        net = timm.create_model(name, **arguments).eval()
        if not torch.allclose(net(images), model(images), atol=1e-3, rtol=1e-2):
            return f"FAIL logits differ by {float((net(images) - model(images)).abs().max()):.2g}"
    return "ok"


def foreign_row(name: str, build: Callable[[], nn.Module], size: int) -> dict[str, str]:
    """Layers and pooling of a network that is not timm's."""
    torch.manual_seed(0)
    row = {"network": name} | dict.fromkeys(FIELDS[3:9], "")
    try:
        network = build()
        perturb(network)
        images = class_images((3, size, size))
        settle(network.train(), images)
        network.eval()
    except Exception as error:
        return row | {"layers": f"FAIL {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    classifier = [m for m in network.modules() if _outputs(m) == K][-1]
    inputs: list[Tensor] = []
    classifier.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))

    def run(x: Tensor) -> Tensor:
        network(x)
        found = inputs[-1]
        inputs.clear()
        return found.mean((2, 3)) if found.ndim == 4 else found

    names: list[str] = []
    pools: dict[str, Any] = {}

    def check_layers() -> str:
        layers = find_layers(network, block_names(network))
        pools.update(find_pools(network, layers, lambda: run(images[:2]), strict=False))
        pools_of_maps = {n: p for n, p in pools.items() if p.ndim > 2}
        names.extend(pools_of_maps)
        return order(network, names, lambda: network(images[:2])) if names else "FAIL none"

    row["layers"] = attempt(check_layers)
    if names:
        widths = stated_widths(network)
        row["pooling"] = attempt(lambda: check_pooling(network, names, pools, run, images, widths))
    return row


def _outputs(module: nn.Module) -> int | None:
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    return module.out_features if isinstance(module, nn.Linear) else None


def stated_widths(network: nn.Module) -> set[int]:
    """The widths in a Hugging Face configuration; else those of all weights."""
    config = getattr(network, "config", None)
    if config is None:
        return {m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d)} | {
            m.normalized_shape[0] for m in network.modules() if isinstance(m, nn.LayerNorm)
        }
    config = getattr(config, "vision_config", config)
    names = ("hidden_size", "hidden_sizes", "embed_dim", "embed_dims", "embedding_size", "neck_hidden_sizes")
    widths = _flat(getattr(config, name, 0) for name in names)
    if isinstance(getattr(config, "embed_dim", None), int):
        widths |= {config.embed_dim * 2**i for i in range(5)}
    return widths


def _torchvision(name: str) -> nn.Module:
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, num_classes=K, **extra)


def _transformer(kind: str, sizes: dict[str, Any]) -> nn.Module:
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoConfig

    config = AutoConfig.for_model(kind, num_labels=K, **sizes)
    config.num_labels = K
    kinds = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    return (kinds[0] if isinstance(kinds, tuple) else kinds)(config)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

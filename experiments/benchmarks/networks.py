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
from torch import Tensor, nn

from ncfinetune import Backbone, FineTuner
from ncfinetune.blocks import block_names
from ncfinetune.collapse import class_moments, nc1
from ncfinetune.layers import find_layers
from ncfinetune.pool_search import find_pools
from ncfinetune.pooling import tensors
from ncfinetune.tail import Tail

K, N = 3, 6
# Module of timm: a small member, what makes it faster, and its blocks counted by hand.
TIMM: dict[str, tuple[str, dict[str, Any], int]] = {
    "beit": ("beit_base_patch16_224", {"img_size": 64, "depth": 4}, 4),
    "byoanet": ("botnet26t_256", {}, 8),
    "byobnet": ("mobileone_s0", {}, 42),
    "cait": ("cait_xxs24_224", {"img_size": 64}, 26),
    "coat": ("coat_lite_tiny", {"img_size": 64}, 8),
    "convit": ("convit_tiny", {"img_size": 64}, 12),
    "convmixer": ("convmixer_768_32", {}, 32),
    "convnext": ("convnext_atto", {}, 12),
    "cpubone": ("cpubone_nano", {}, 7),
    "crossvit": ("crossvit_tiny_240", {}, 3),
    "csatv2": ("csatv2", {}, 18),
    "cspnet": ("cs3darknet_focus_s", {}, 9),
    "cspnext": ("cspnext_tiny", {}, 5),
    "davit": ("davit_tiny", {}, 12),
    "deepseek_vit": ("deepseek_vit_412m", {"depth": 2}, 2),
    "deit": ("deit_tiny_distilled_patch16_224", {"img_size": 64}, 12),
    "densenet": ("densenet121", {}, 4),
    "dla": ("dla34", {}, 12),
    "dpn": ("dpn48b", {}, 16),
    "edgenext": ("edgenext_xx_small", {}, 12),
    "efficientformer": ("efficientformer_l1", {}, 15),
    "efficientformer_v2": ("efficientformerv2_s0", {}, 14),
    "efficientnet": ("mobilenetv2_035", {}, 17),
    "efficientvim": ("efficientvim_m1", {}, 6),
    "efficientvit_mit": ("efficientvit_b0", {}, 10),
    "efficientvit_msra": ("efficientvit_m0", {}, 6),
    "eva": ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 4}, 4),
    "fasternet": ("fasternet_t0", {}, 13),
    "fastvit": ("fastvit_t8", {}, 13),
    "focalnet": ("focalnet_tiny_srf", {}, 12),
    "gcvit": ("gcvit_xxtiny", {}, 12),
    "gemma4_vit": ("gemma4_vit_167m", {"depth": 4}, 4),
    "ghostnet": ("ghostnet_050", {}, 17),
    "hardcorenas": ("hardcorenas_a", {}, 18),
    "hgnet": ("hgnetv2_b0", {}, 5),
    "hiera": ("hiera_tiny_224", {}, 12),
    "hieradet_sam2": ("hieradet_small", {}, 16),
    "hrnet": ("hrnet_w18_small", {}, 23),
    "iformer": ("iformer_t", {}, 21),
    "inception_next": ("inception_next_atto", {}, 12),
    "inception_resnet_v2": ("inception_resnet_v2", {}, 43),
    "inception_v3": ("inception_v3", {}, 11),
    "inception_v4": ("inception_v4", {}, 17),
    "lcnetv2": ("lcnetv2_small", {}, 10),
    "levit": ("levit_128s", {}, 9),
    "lowformer": ("lowformer_b0", {}, 11),
    "mambaout": ("mambaout_femto", {}, 18),
    "maxxvit": ("maxxvit_rmlp_nano_rw_256", {}, 7),
    "metaformer": ("caformer_s18", {}, 18),
    "mlp_mixer": ("gmixer_12_224", {}, 12),
    "mobilenetv3": ("mobilenetv4_hybrid_medium", {}, 32),
    "mobilenetv5": ("mobilenetv5_base", {}, 40),
    "mobilevit": ("mobilevit_xxs", {}, 10),
    "mvitv2": ("mvitv2_small_cls", {}, 16),
    "naflexvit": ("naflexvit_base_patch16_gap", {"depth": 4}, 4),
    "nasnet": ("nasnetalarge", {}, 22),
    "nest": ("nest_tiny", {}, 12),
    "nextvit": ("nextvit_small", {}, 20),
    "nfnet": ("nf_regnet_b0", {}, 16),
    "pit": ("pit_ti_224", {}, 12),
    "pnasnet": ("pnasnet5large", {}, 14),
    "pvt_v2": ("pvt_v2_b0", {}, 8),
    "qwen3_vit": ("qwen3_vit_88m", {"depth": 4}, 4),
    "rdnet": ("rdnet_tiny", {}, 21),
    "regnet": ("regnety_002", {}, 13),
    "repghost": ("repghostnet_050", {}, 17),
    "repvit": ("repvit_m1", {}, 20),
    "res2net": ("res2net50_14w_8s", {}, 16),
    "resnest": ("resnest14d", {}, 4),
    "resnet": ("resnet18d", {}, 8),
    "resnetv2": ("resnetv2_18", {}, 8),
    "rexnet": ("rexnet_100", {}, 16),
    "selecsls": ("selecsls42", {}, 6),
    "senet": ("legacy_seresnet18", {}, 8),
    "sequencer": ("sequencer2d_s", {}, 18),
    "shvit": ("shvit_s1", {}, 11),
    "sknet": ("skresnet18", {}, 8),
    "starnet": ("starnet_s050", {}, 6),
    "swiftformer": ("swiftformer_xs", {}, 16),
    "swin_transformer": ("swin_tiny_patch4_window7_224", {"img_size": 56}, 12),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", {"img_size": 64}, 12),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", {"img_size": 64}, 12),
    "tiny_vit": ("tiny_vit_5m_224", {}, 12),
    "tnt": ("tnt_s_patch16_224", {}, 12),
    "tresnet": ("tresnet_m", {}, 21),
    "twins": ("twins_pcpvt_small", {}, 16),
    "vgg": ("vgg11_bn", {}, 8),
    "visformer": ("visformer_tiny", {}, 15),
    "vision_transformer": ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 4}, 4),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": 64}, 12),
    "vision_transformer_relpos": ("vit_relpos_small_patch16_224", {"img_size": 64, "depth": 4}, 4),
    "vision_transformer_sam": ("samvit_base_patch16_224", {"img_size": 64, "depth": 4}, 4),
    "vitamin": ("vitamin_small_224", {}, 20),
    "volo": ("volo_d1_224", {}, 20),
    "vovnet": ("ese_vovnet19b_slim", {}, 4),
    "xception": ("legacy_xception", {}, 12),
    "xception_aligned": ("xception41", {}, 13),
    "xcit": ("xcit_nano_12_p16_224", {"img_size": 64}, 14),
}
# Family of torchvision: a small member, and the side of its images.
TORCHVISION = {
    "alexnet": ("alexnet", 64), "convnext": ("convnext_tiny", 64), "densenet": ("densenet121", 64),
    "efficientnet": ("efficientnet_b0", 64), "efficientnet_v2": ("efficientnet_v2_s", 64),
    "googlenet": ("googlenet", 64),
    "inception": ("inception_v3", 128), "maxvit": ("maxvit_t", 224), "mnasnet": ("mnasnet0_5", 64),
    "mobilenet_v2": ("mobilenet_v2", 64), "mobilenet_v3": ("mobilenet_v3_small", 64),
    "regnet_x": ("regnet_x_400mf", 64),
    "regnet_y": ("regnet_y_400mf", 64), "resnet": ("resnet18", 64), "resnext": ("resnext50_32x4d", 64),
    "shufflenet": ("shufflenet_v2_x0_5", 64), "squeezenet": ("squeezenet1_1", 64), "swin": ("swin_t", 64),
    "swin_v2": ("swin_v2_t", 64), "vgg": ("vgg11_bn", 64), "vit": ("vit_b_32", 224),
    "wide_resnet": ("wide_resnet50_2", 64),
}  # fmt: skip
_VIT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40,
        "image_size": 32, "patch_size": 8}  # fmt: skip
_STAGES = {"hidden_sizes": [12, 20, 28, 36], "depths": [1, 2, 2, 1]}
_SWIN = {
    "embed_dim": 12,
    "depths": [1, 2, 2],
    "num_heads": [2, 2, 2],
    "window_size": 2,
    "image_size": 32,
    "patch_size": 2,
}
_CNN = {"embedding_size": 12, "hidden_sizes": [12, 20, 28, 36], "depths": [1, 2, 2, 1]}
_PVT = {"depths": [1, 2, 1, 2], "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 2]}
_TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
# Type of Hugging Face: what makes it tiny, and the side of its images.
TRANSFORMERS: dict[str, tuple[dict[str, Any], int]] = {
    "vit": (_VIT, 32), "deit": (_VIT, 32), "beit": (_VIT, 32), "data2vec-vision": (_VIT, 32), "vit_msn": (_VIT, 32),
    "dinov2": (_VIT, 32), "dinov2_with_registers": (_VIT, 32), "ijepa": (_VIT, 32), "convnext": (_STAGES, 64),
    "convnextv2": (_STAGES, 64), "resnet": (_CNN, 64), "regnet": (_CNN | {"groups_width": 4}, 64),
    "bit": (_CNN | {"embedding_size": 16, "hidden_sizes": [32, 64, 96, 128], "num_groups": 8}, 64),
    "swin": (_SWIN, 32), "swinv2": (_SWIN | {"window_size": 4}, 32), "donut-swin": (_SWIN, 32),
    "focalnet": ({"embed_dim": 12, "depths": [1, 2, 2], "focal_levels": [2, 2, 2], "focal_windows": [3, 3, 3],
                  "hidden_sizes": [12, 24, 48], "image_size": 32, "patch_size": 4}, 32),
    "poolformer": ({"hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 2, 1]}, 64),
    "segformer": (_PVT | {"sr_ratios": [4, 2, 1, 1], "num_attention_heads": [1, 2, 2, 2]}, 64),
    "pvt": (_PVT | {"image_size": 64, "num_encoder_blocks": 4, "sequence_reduction_ratios": [4, 2, 1, 1]}, 64),
    "pvt_v2": (_PVT | {"image_size": 64}, 64),
    "cvt": ({"embed_dim": [8, 16, 24], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}, 64),
    "levit": ({"image_size": 64, "hidden_sizes": [16, 24, 32], "depths": [2, 2, 2], "num_attention_heads": [2, 2, 2],
               "key_dim": [8, 8, 8]}, 64),
    "mobilenet_v1": ({"depth_multiplier": 0.25}, 64), "mobilenet_v2": ({"depth_multiplier": 0.35}, 64),
    "mobilevit": ({"image_size": 64, "hidden_sizes": [20, 24, 28],
                   "neck_hidden_sizes": [8, 12, 16, 20, 24, 28, 40]}, 64),
    "mobilevitv2": ({"image_size": 64, "width_multiplier": 0.5}, 64),
    "efficientnet": ({"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.25,
                      "hidden_dim": 320, "initializer_range": 0.2}, 64),  # with 0.02 images make no difference
    "swiftformer": ({"depths": [1, 2, 1, 1], "embed_dims": [8, 16, 24, 32]}, 64),
    "hiera": ({"embed_dim": 12, "image_size": [64, 64], "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]}, 64),
    "hgnet_v2": ({}, 64),
    "clip": ({"vision_config": _VIT, "text_config": _TEXT}, 32),
    "siglip": ({"vision_config": _VIT, "text_config": _TEXT}, 32),
    "textnet": ({}, 64),
}  # fmt: skip
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
        for tensor in (*module.parameters(), *module.buffers()):
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
        raise ValueError("what runs after the layer depends on more than its input")
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

"""What layers keep in eval mode of their parameters, such as the attention biases of timm's LeViT and TinyViT."""

from __future__ import annotations

from torch import Tensor, nn


def has_own_train(part: nn.Module) -> bool:
    """Whether a module does more in ``train()`` than torch's does, which switches the mode."""
    return type(part).train is not nn.Module.train


def own_tensors(part: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module without those of its submodules."""
    return [*part.parameters(recurse=False), *part.buffers(recurse=False)]


def drop_caches(module: nn.Module) -> None:
    """Have the parts of a module forget what they keep in eval mode of their parameters, which may have changed since.

    Such a part forgets in its own ``train()``, which is called for the training mode and for the part's own. Modes,
    parameters and buffers are as before, bit for bit: LoRA that merges its weights in eval mode rounds them.
    """
    own = [part for part in module.modules() if has_own_train(part)]
    modes = {inner: inner.training for part in own for inner in part.modules()}
    tensors = [tensor for part in own for tensor in own_tensors(part)]
    values = [tensor.detach().clone() for tensor in tensors]
    for part in own:
        part.train(True)
        part.train(modes[part])
    for part, mode in modes.items():
        part.training = mode
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data.copy_(value)

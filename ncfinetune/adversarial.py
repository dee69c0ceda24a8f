"""Adversarial examples for training: projected gradient descent.

Legend: ``N`` samples, ``C`` channels, ``H W`` height and width, ``K`` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncfinetune.passes import eval_mode


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent (Madry et al. 2018, arXiv 1706.06083, section 2.1), from a random start.

    Each step goes along the sign of the cross-entropy's gradient (``linf``) or along its direction (``l2``), back into
    the ball around the image, and back to pixels in 0..1. Radius and step are in units of pixels in 0..1, whatever
    the normalisation of the images. The network is in eval mode meanwhile, so that batch normalisation uses its running
    statistics and does not update them with intermediate examples (Pang et al. 2021, arXiv 2010.00467, section 3.2);
    gradients of the parameters are not touched. Examples are computed in float32 at least, whatever the precision of
    the run, and rounded to that of the images in the end. The gradient's length has no part in a step, so that it is
    computed at a scale at which it does not vanish, however sure the network is of an image.

    Args:
        radius: Radius of the ball, such as 8/255 for ``linf``, 0.5 for ``l2``; 0 leaves the images as they are.
        steps: Gradient steps.
        step_size: Length of a step; None is 2.5 ``radius`` / ``steps``, which reaches the ball's far side.
        norm: Norm of the ball: ``linf`` is the largest pixel, ``l2`` the Euclidean norm of the image.
        mean: Mean of each channel of the images' normalisation, for pixels in 0..1; None if they are not normalised.
        std: Standard deviation of each channel, likewise.

    Raises:
        ValueError: A negative radius, no steps, a step that is not positive, an unknown norm, or one of ``mean`` and
            ``std`` without the other.
    """

    radius: float
    steps: int = 7
    step_size: float | None = None
    norm: Literal["linf", "l2"] = "linf"
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not self.radius >= 0:
            raise ValueError(f"expected a PGD radius of at least 0, in units of pixels in 0..1, got {self.radius}")
        if self.steps < 1:
            raise ValueError(f"expected at least 1 PGD step, got {self.steps}")
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"expected a PGD step_size above 0, or None, got {self.step_size}")
        for name in ("mean", "std"):
            if (given := getattr(self, name)) is not None:
                numbers = torch.as_tensor(given, dtype=torch.float64).flatten()
                object.__setattr__(self, name, tuple(numbers.tolist()))
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"expected the PGD norm linf or l2, got {self.norm!r}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("PGD needs both mean and std of the normalisation, or neither")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Images near ``x`` that ``model`` classifies worse.

        Args:
            model: Maps images to class logits ``(N, K)``.
            x: Normalised images, ``(N, C, H, W)``.
            y: Labels ``(N,)``, or probabilities of classes ``(N, K)``.
        """
        if self.radius == 0:
            return x
        exact = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        mean, std = (_channels(v, exact) for v in (self.mean or [0.0], self.std or [1.0]))
        pixels = exact * std + mean
        change = self._project(self._start(pixels), pixels)
        step = 2.5 * self.radius / self.steps if self.step_size is None else self.step_size
        with eval_mode(model), torch.enable_grad():
            for _ in range(self.steps):
                change.requires_grad_()
                logits = model(((pixels + change - mean) / std).to(x.dtype))
                (slope,) = torch.autograd.grad(logits, change, _uphill(logits.detach(), y).to(logits.dtype))
                change = self._project(change.detach() + step * self._direction(slope), pixels)
        return (exact + change / std).to(x.dtype)

    def _start(self, pixels: Tensor) -> Tensor:
        """A uniformly random point of the ball."""
        if self.norm == "linf":
            return torch.empty_like(pixels).uniform_(-self.radius, self.radius)
        noise = torch.randn_like(pixels)
        uniform = torch.rand(len(pixels), 1, 1, 1, device=pixels.device, dtype=pixels.dtype)
        return self._direction(noise) * self.radius * uniform ** (1 / pixels[0].numel())

    def _direction(self, slope: Tensor) -> Tensor:
        return slope.sign() if self.norm == "linf" else slope / _length(slope)

    def _project(self, change: Tensor, pixels: Tensor) -> Tensor:
        if self.norm == "linf":
            change = change.clamp(-self.radius, self.radius)
        else:
            change = change * (self.radius / _length(change)).clamp(max=1)
        return (pixels + change).clamp(0, 1) - pixels


def _uphill(logits: Tensor, y: Tensor) -> Tensor:
    """The gradient of the cross-entropy in the logits ``(N, K)``, scaled for each image to a largest term of one.

    It is ``p sum(y) - y = p (sum(y) - y) - y (1 - p)``, whose terms are kept as logarithms: in half precision, or at
    a probability of nearly one, they would be 0, and their difference before them.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if y.ndim == 1:
        y = F.one_hot(y.long(), logits.shape[1])
    y, top = y.to(logits.dtype), logits.argmax(1, keepdim=True)
    log_p, all_classes = logits.log_softmax(1), logits.logsumexp(1, keepdim=True)
    # log(1 - p), of the most probable class from the others.
    others = logits.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True) - all_classes
    log_rest = (-log_p.exp()).log1p().scatter(1, top, others)
    up, down = log_p + (y.sum(1, keepdim=True) - y).clamp(min=0).log(), y.log() + log_rest
    largest = torch.maximum(up, down).amax(1, keepdim=True)
    return ((up - largest).exp() - (down - largest).exp()).nan_to_num(0)


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    """One number a channel, ``(C, 1, 1)``, without a copy from the host, which would wait for the device."""
    return torch.cat([like.new_full((1, 1, 1), value) for value in values])


def _length(images: Tensor) -> Tensor:
    tiny = torch.finfo(images.dtype).tiny
    return images.flatten(1).norm(dim=1).clamp(min=tiny).view(-1, 1, 1, 1)

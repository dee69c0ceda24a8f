"""PGD: where its examples lie, that they are worse, and what it leaves alone."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ncfinetune.adversarial import PGD, _uphill

MEAN, STD = [0.3, 0.5, 0.6], [0.2, 0.1, 0.3]


def _net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


def _pixels() -> torch.Tensor:
    return torch.rand(6, 3, 8, 8)


def _normalise(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)


def _length(change: torch.Tensor, norm: str) -> torch.Tensor:
    return change.flatten(1).abs().amax(1) if norm == "linf" else change.flatten(1).norm(dim=1)


@pytest.mark.parametrize(("norm", "radius"), [("linf", 8 / 255), ("l2", 0.5)])
@pytest.mark.parametrize("normalised", [True, False])
def test_examples_are_worse_and_stay_in_the_ball_and_among_pixels(norm, radius: float, normalised: bool) -> None:
    model, pixels, y = _net().eval(), _pixels(), torch.arange(6) % 4
    pixels[:2] = pixels[:2].round()  # black and white, from where half of the directions lead out
    attack = PGD(radius, steps=10, norm=norm, **({"mean": MEAN, "std": STD} if normalised else {}))
    x = _normalise(pixels) if normalised else pixels
    found = attack(model, x, y)
    change = found - x
    if normalised:
        change = change * torch.tensor(STD).view(-1, 1, 1)
    assert _length(change, norm).max() <= radius * (1 + 1e-4)
    assert _length(change, norm)[2:].min() > 0.8 * radius
    assert (pixels + change).min() > -1e-6
    assert (pixels + change).max() < 1 + 1e-6
    before, after = (F.cross_entropy(model(v), y, reduction="none") for v in (x, found))
    assert (after > before).all()


def test_one_long_step_on_a_linear_model_is_the_sign_of_its_weights() -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2))
    x = torch.full((1, 3, 4, 4), 0.5)
    found = PGD(0.1, steps=1, step_size=1.0)(linear, x, torch.tensor([0]))
    weight = linear[1].weight.detach()
    torch.testing.assert_close(found - x, 0.1 * (weight[1] - weight[0]).sign().view(1, 3, 4, 4))
    found = PGD(0.1, steps=1, step_size=100.0, norm="l2")(linear, x, torch.tensor([0]))
    direction = F.normalize(weight[1] - weight[0], dim=0).view(1, 3, 4, 4)
    torch.testing.assert_close(found - x, 0.1 * direction, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_the_model_is_called_once_a_step(steps: int) -> None:
    linear, calls = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), []
    linear.register_forward_hook(lambda *_: calls.append(1))
    PGD(0.1, steps=steps)(linear, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))
    assert len(calls) == steps


def test_one_step_of_the_default_length_crosses_the_ball() -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2))
    x = torch.full((20, 3, 4, 4), 0.5)
    found = PGD(0.1, steps=1)(linear, x, torch.zeros(20).long())
    torch.testing.assert_close((found - x).abs(), torch.full_like(x, 0.1))


def test_starts_fill_the_euclidean_ball_evenly() -> None:
    starts = PGD(0.25, norm="l2")._start(torch.full((4000, 3, 1, 1), 0.5))
    volumes = (_length(starts, "l2") / 0.25) ** 3  # uniform between 0 and 1
    assert volumes.max() <= 1 + 1e-5
    assert volumes.mean().item() == pytest.approx(0.5, abs=0.03)
    assert starts.mean(0).abs().max() < 0.01


def test_examples_do_not_depend_on_the_normalisation() -> None:
    class Normalised(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.net(_normalise(pixels))

    net, pixels, y = _net().eval(), _pixels(), torch.arange(6) % 4
    torch.manual_seed(1)
    raw = PGD(8 / 255)(Normalised(net), pixels, y)
    torch.manual_seed(1)
    found = PGD(8 / 255, mean=MEAN, std=STD)(net, _normalise(pixels), y)
    torch.testing.assert_close(found, _normalise(raw), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_modes_statistics_and_gradients_are_left_alone(norm) -> None:
    model = _net()
    model[0].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        found = PGD(0.1, norm=norm)(model, _pixels(), torch.arange(6) % 4)
    assert not found.requires_grad
    assert model[1].training
    assert not model[0].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_probabilities_are_labels_too() -> None:
    model, x, y = _net().eval(), _pixels(), torch.arange(6) % 4
    torch.manual_seed(1)
    hard = PGD(0.1)(model, x, y)
    torch.manual_seed(1)
    torch.testing.assert_close(PGD(0.1)(model, x, F.one_hot(y, 4).float()), hard)


def test_radius_zero_leaves_the_images() -> None:
    x = torch.randn(6, 3, 8, 8)
    assert torch.equal(PGD(0.0)(_net(), x, torch.arange(6) % 4), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": -0.1}, r"expected a PGD radius of at least 0, in units of pixels in 0..1, got -0.1"),
        ({"radius": float("nan")}, "expected a PGD radius of at least 0"),
        ({"radius": 0.1, "steps": 0}, "expected at least 1 PGD step, got 0"),
        ({"radius": 0.1, "step_size": 0.0}, "expected a PGD step_size above 0, or None, got 0.0"),
        ({"radius": 0.1, "norm": "l1"}, "expected the PGD norm linf or l2, got 'l1'"),
        ({"radius": 0.1, "std": [1.0]}, "PGD needs both mean and std"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGD(**arguments)


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PGD(0.1).radius = 0.2


class _Sure(nn.Module):
    """Classifies by one pixel, with a margin of 400 between the logits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x.flatten(1)[:, :1] * 800 - 400
        return torch.cat([-first, first, first - 1e3], 1)


@pytest.mark.parametrize("soft", [False, True])
def test_images_that_are_classified_surely_are_attacked_too(soft: bool) -> None:
    pixels, y = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2), torch.tensor([1, 0])
    found = PGD(0.25, steps=2)(_Sure(), pixels, F.one_hot(y, 3).float() if soft else y)
    torch.testing.assert_close(found[:, 0, 0, 0], torch.tensor([0.75, 0.25]))


def test_half_precision_attacks_as_single_precision_does() -> None:
    torch.manual_seed(0)
    model, pixels, y = _net().eval(), _pixels(), torch.arange(6) % 4
    for _, parameter in model[-1].named_parameters():
        parameter.data *= 40  # probabilities of nearly one, whose gradients vanish in half precision
    y = model(pixels).argmax(1)
    torch.manual_seed(1)
    expected = PGD(0.1, steps=5)(model, pixels, y)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.float16):
        found = PGD(0.1, steps=5)(model, pixels, y)
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.1 * (expected - pixels).abs().mean()


def test_bfloat16_images_stay_in_the_ball_but_for_their_own_rounding() -> None:
    model, pixels = _net().bfloat16().eval(), _pixels().bfloat16()
    found = PGD(2 / 255, steps=20)(model, pixels, torch.arange(6) % 4)
    assert found.dtype == torch.bfloat16
    assert (found.float() - pixels.float()).abs().max() <= 2 / 255 + 2.0**-9  # half a unit in the last place below 1


def test_statistics_of_any_type_are_taken() -> None:
    numbers = PGD(0.1, mean=torch.tensor(MEAN), std=torch.tensor(STD).numpy())
    assert [type(value) for value in (*numbers.mean, *numbers.std)] == [float] * 6
    assert numbers.mean == pytest.approx(MEAN)
    assert PGD(0.1, mean=0.5, std=0.2) in {PGD(0.1, mean=[0.5], std=[0.2])}


@pytest.mark.parametrize("soft", [False, True])
def test_the_direction_is_that_of_the_gradient(soft: bool) -> None:
    logits = (4 * torch.randn(50, 5, dtype=torch.float64)).requires_grad_()
    y = torch.rand(50, 5, dtype=torch.float64).softmax(1) if soft else torch.arange(50) % 5
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), logits)
    found = _uphill(logits.detach(), y)
    torch.testing.assert_close(F.normalize(found), F.normalize(expected))
    assert torch.equal(_uphill(torch.zeros(2, 1), torch.zeros(2).long()), torch.zeros(2, 1))  # of a single class

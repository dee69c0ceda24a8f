"""Gradients of layers as features: against autograd's Jacobian, and ridge regression on them."""

import pytest
import torch
from tiny import SMALL, trainer_in

from ncfinetune import Backbone
from ncfinetune.linearised import gradient_features, linearised
from ncfinetune.probes import ridge

LAYERS = ["layer1.0", "layer4.1"]


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return Backbone(**{**SMALL, "zero_init_last": False}).eval()


def images_of(number):
    return torch.rand(number, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def gradients_of(backbone, images, scores):
    """Gradients of a function of the penultimate features in each layer's parameters, ``{layer: (N, P)}``."""
    rows = {layer: [] for layer in LAYERS}
    for image in images:
        for layer in LAYERS:
            found = torch.autograd.grad(scores(backbone(image[None])[0]), list(backbone.layer(layer).parameters()))
            rows[layer].append(torch.cat([gradient.flatten() for gradient in found]))
    return {layer: torch.stack(parts) for layer, parts in rows.items()}


def products(rows):
    return rows.double() @ rows.double().T


def test_inner_products_are_those_of_the_gradients(backbone, tmp_path):
    images, weight = images_of(5), torch.randn(1, backbone.dim, generator=torch.Generator().manual_seed(1))
    trainer = trainer_in(tmp_path, inference_mode=False)
    # Of one class the sign is squared; with far more places than parameters next to no two entries share a place.
    sketched = gradient_features(trainer, backbone, images, weight, LAYERS, draws=1, width=2**22)
    expected = gradients_of(backbone, images, lambda features: weight[0] @ features)
    for layer in LAYERS:
        assert torch.allclose(products(sketched[layer]), products(expected[layer]), rtol=2e-3, atol=0)


def test_draws_and_sketches_have_no_bias(backbone, tmp_path):
    images, weight = images_of(3), torch.randn(3, backbone.dim, generator=torch.Generator().manual_seed(1))
    trainer = trainer_in(tmp_path, inference_mode=False)
    sketched = gradient_features(trainer, backbone, images, weight, LAYERS, draws=64, width=2**13)
    by_class = [gradients_of(backbone, images, lambda features, row=row: row @ features) for row in weight]
    for layer in LAYERS:
        expected = sum(products(rows[layer]) for rows in by_class)
        # The relative standard deviation of 64 draws of three classes is 0.14 at most, that of the sketch 0.01.
        assert (products(sketched[layer]) - expected).norm() < 0.3 * expected.norm()


def test_network_is_left_as_it_was(backbone, tmp_path):
    frozen = next(backbone.layer("layer2.0").parameters()).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    flags = [parameter.requires_grad for parameter in backbone.parameters()]
    trainer = trainer_in(tmp_path, inference_mode=False)
    gradient_features(trainer, backbone, images_of(2), torch.ones(2, backbone.dim), LAYERS, width=8)
    assert [parameter.requires_grad for parameter in backbone.parameters()] == flags
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
    frozen.requires_grad_(True)


def test_gradients_that_tell_the_classes_apart_lower_the_error():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    features, gradients = torch.randn(30, 4, generator=generator), 1e3 * torch.eye(3)[labels] + 7.0
    assert linearised(features, gradients, labels, 3).loo_error == 0
    assert ridge(features, labels, 3).loo_error > 0.3


def test_gradients_that_do_not_vary_change_nothing():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12) % 3
    features = torch.randn(12, 20, generator=generator) + labels[:, None]
    found = linearised(features, torch.full((12, 5), 3.0), labels, 3)
    assert torch.allclose(found.loo_scores, ridge(features, labels, 3).loo_scores, atol=1e-9)

"""The fine-tuner's finer knobs: joins, gradients, starts of the classifier, learning rates; what it refuses."""

from pathlib import Path

import pytest
import torch
from tiny import SMALL, plain_sgd, trainer_in

from ncfinetune import Backbone, FineTuner
from ncfinetune.collapse import class_moments
from ncfinetune.datamodules import Digits
from ncfinetune.settings import method_name


def _images() -> torch.Tensor:
    return torch.randn(4, 1, 8, 8)


def _still(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def _gradients(model: FineTuner, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("join", ["pad", "linear", "concat"])
@pytest.mark.parametrize("train", ["layer2.0", "all"])
def test_cut_gradient_is_that_of_the_skip_connection_alone(join: str, train: str) -> None:
    model = FineTuner(3, SMALL, train=train, skip_from="layer2.0", skip_join=join, skip_gradient="skip").eval()
    images, net = _images(), model.backbone.net
    ours = _gradients(model, model(images).square().sum())
    # By hand (forward, since a call would run the hook): up to the layer, and on from there without its gradient.
    x = net.layer2[0].forward(net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(images))))))
    behind = net.layer4(net.layer3(net.layer2[1](x.detach()))).mean((2, 3))
    theirs = _gradients(model, model.head(behind, x.mean((2, 3))).square().sum())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, msg=name)


def test_cut_changes_the_gradient_and_not_the_logits() -> None:
    both, cut = (
        FineTuner(3, SMALL, train="layer2.0", skip_from="layer2.0", skip_gradient=gradient).eval()
        for gradient in ("both", "skip")
    )
    cut.load_state_dict(both.state_dict())
    images = _images()
    assert torch.equal(both(images), cut(images))
    name = "backbone.net.layer2.0.conv2.weight"
    torch.nn.init.ones_(both.backbone.net.layer2[0].bn2.weight)
    torch.nn.init.ones_(cut.backbone.net.layer2[0].bn2.weight)
    one, other = (_gradients(model, model(images).square().sum())[name] for model in (both, cut))
    assert not torch.allclose(one, other)


def test_cut_keeps_no_activations_of_the_network_behind() -> None:
    def saved(gradient: str) -> int:
        model = FineTuner(3, SMALL, train="layer2.0", skip_from="layer2.0", skip_gradient=gradient)
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.numel()) or t, lambda t: t):
            model(_images())
        return sum(shapes)

    assert saved("skip") < saved("both") / 2


@pytest.mark.parametrize("skip_from", [None, "layer3.0"])
def test_classifier_that_starts_at_zero_gives_equal_logits(skip_from: str | None) -> None:
    model = FineTuner(3, SMALL, skip_from=skip_from, head_init="zero")
    assert torch.equal(model(_images()), torch.zeros(4, 3))


@pytest.mark.parametrize("knobs", [{}, {"skip_from": "layer3.0"}, {"skip_from": "layer2.0", "skip_join": "concat"}])
def test_classifier_that_starts_from_means_decides_as_they_do(knobs: dict, tmp_path: Path) -> None:
    model = FineTuner(3, SMALL, head_init="mean", optimizer=_still, allow_random=True, **knobs)
    data = Digits([0, 1, 2], shots=8, batch_size=5)
    trainer_in(tmp_path).fit(model, data)
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.train_plain_dataloader()]
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    model.eval()
    with torch.no_grad():
        joined = model._joined(images)
        decided = model(images).argmax(1)
    means = class_moments(joined, labels, 3).mean
    assert torch.equal(decided, torch.cdist(joined.double(), means).argmin(1))
    assert (decided == labels).float().mean() > 0.5  # random features of digits are no random guess


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
def test_a_loaded_classifier_is_kept(tmp_path: Path) -> None:
    data = Digits([0, 1, 2], shots=4)
    model = FineTuner(3, SMALL, head_init="mean", optimizer=plain_sgd, allow_random=True)
    trainer = trainer_in(tmp_path)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    still = FineTuner.load_from_checkpoint(tmp_path / "tuned.ckpt", optimizer=_still)
    trainer_in(tmp_path).fit(still, data)
    assert torch.equal(still.head.weight, model.head.weight)


def test_start_from_means_needs_plain_images(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(_images(), torch.tensor([0, 1, 2, 0])))
    with pytest.raises(ValueError, match=r'head_init="mean" needs .* a datamodule that has a train_plain_dataloader'):
        trainer_in(tmp_path).fit(FineTuner(3, SMALL, head_init="mean", allow_random=True), loader, loader)


@pytest.mark.parametrize(("train", "names"), [("layer3.0", ["backbone", "head"]), ("none", ["head"])])
def test_head_has_a_learning_rate_of_its_own_that_the_scheduler_keeps(train: str, names: list[str]) -> None:
    model = FineTuner(
        3,
        SMALL,
        train=train,
        head_lr_factor=10,
        optimizer=plain_sgd,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
    )
    made = model.configure_optimizers()
    groups = made["optimizer"].param_groups
    assert [group["name"] for group in groups] == names
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 1.0][-len(names) :])
    made["optimizer"].step()
    made["lr_scheduler"]["scheduler"].step()
    assert [group["lr"] for group in groups] == pytest.approx([0.05, 0.5][-len(names) :])
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_parameter_table_counts_each_group_once() -> None:
    model = FineTuner(3, SMALL, train=["layer4.*", "layer4.0.conv1"], skip_from="layer3.1")
    rows = {line[:24].strip(): line[24:].split() for line in model.parameter_table().splitlines()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert list(rows) == ["parameters", "head", "layer4.0", "layer4.1", "rest of the backbone", "all"]
    assert rows["head"] == ["33", "33", "100"]
    assert rows["rest of the backbone"][0] == "0"
    assert rows["all"] == [f"{trained:,}", f"{total:,}", f"{100 * trained / total:.3g}"]
    assert sum(int(row[1].replace(",", "")) for row in list(rows.values())[1:-1]) == total


def test_parameter_table_is_shown_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer_in(tmp_path).fit(FineTuner(3, SMALL, train="layer3.0", allow_random=True), Digits([0, 1, 2], shots=4))
    assert "layer3.0" in caplog.text
    assert "rest of the backbone" in caplog.text


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"train": "*"}, r"train='\*' names every layer; say train=\"all\""),
        ({"train": ["conv1", "bn1", "layer?"]}, 'names every layer; say train="all"'),
        ({"train": []}, r'train=\[\] names no layer; say train="none"'),
        ({"train": ""}, "train='' names no layer"),
        ({"train": ["none"]}, r"train=\['none'\]: none and all stand alone; give one of them, or layers"),
        ({"train": "layer3.0.act1"}, "layer 'layer3.0.act1' has no parameters to train; name the block that holds it"),
        ({"skip_from": "fc"}, r"layer 'fc' does not run before the penultimate features; expected a block \(layer1.0"),
        ({"skip_join": "concat"}, "skip_join='concat' and skip_gradient='both' need a layer in skip_from"),
        ({"train": "layer3.0", "skip_gradient": "skip"}, "need a layer in skip_from"),
        ({"skip_from": "layer3.0", "skip_gradient": "skip"}, 'skip_gradient="skip" needs a layer in train'),
        ({"skip_from": "fc", "skip_join": "sum"}, "skip_join to be one of pad, linear, concat, only, got 'sum'"),
        ({"head_init": "means"}, "expected head_init to be one of default, zero, mean, ridge, lda, etf, got 'means'"),
        ({"head_lr_factor": -1}, "expected head_lr_factor of at least 0, got -1"),
        ({"head_lr_factor": 0}, 'with train="none" and head_lr_factor=0 nothing would be trained; for'),
        ({"train": "layer4.1", "head_lr_factor": 0, "head_init": "zero"}, "no gradient; take another head_init"),
        ({"refit": "ridge"}, 'refit="ridge" has no effect with train="none", since the features do not'),
        ({"num_classes": 12, "head_init": "etf"}, "a width of at least num_classes - 1, got num_classes=12 and dim=10"),
        ({"refit": "RIDGE"}, "expected refit to be one of none, mean, ridge, lda, etf, got 'RIDGE'"),
        ({"skip_from": ["layer3.0", "layer3.0"]}, r"skip_from=\['layer3.0', 'layer3.0'\] names a layer twice"),
        ({"train": "*.biases"}, r"no layer fits '\*.biases'; expected a block"),
        ({"train": "layer3.0.act?"}, "layer 'layer3.0.act1' has no parameters to train"),
    ],
)  # fmt: skip
def test_what_is_refused(knobs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineTuner(**{"num_classes": 3, "backbone": SMALL, **knobs})


def test_stages_that_gradient_checkpointing_leaves_out_are_named() -> None:
    model = FineTuner(3, SMALL, skip_from=["layer2.0", "layer3"], skip_join="concat")
    images = _images()
    model.backbone.net.set_grad_checkpointing(True)
    text = "layer 'layer3' did not run in this pass of the network; name one that does .gradient checkpointing"
    with pytest.raises(ValueError, match=text):
        model(images)
    with pytest.raises(ValueError, match=text):
        model.backbone.stages(images, ["layer2.0", "layer3"])


def test_backbone_has_one_skip_connection() -> None:
    backbone = Backbone(**SMALL)
    FineTuner(3, backbone, skip_from="layer3.0")
    with pytest.raises(ValueError, match="this Backbone already serves another FineTuner with a skip connection; bu"):
        FineTuner(3, backbone, skip_from="layer3.1")


def test_backbone_of_two_fine_tuners_trains_as_neither_says(tmp_path: Path) -> None:
    backbone = Backbone(**SMALL)
    first = FineTuner(3, backbone, train="layer4.0", allow_random=True)
    second = FineTuner(3, backbone, train="layer3.0", allow_random=True)
    with pytest.raises(ValueError, match="requires_grad of 'layer3.0.conv1.weight' was changed since, as by another"):
        trainer_in(tmp_path).fit(first, Digits([0, 1, 2], shots=4))
    trainer_in(tmp_path).fit(second, Digits([0, 1, 2], shots=4))


def test_skip_without_a_tuned_layer_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        FineTuner(3, SMALL, train="none", skip_from="layer3.0")
    assert (
        'train="none": a linear probe on the penultimate features joined with the features of layer3.0' in caplog.text
    )


def test_blocks_are_counted_from_the_last() -> None:
    model = FineTuner(3, SMALL, train=-1, skip_from=[-1, "layer2.0"], skip_join="concat")
    assert list(model.chosen.layers) == ["layer4.1"]
    assert (model.hparams["train"], model.hparams["skip_from"]) == ("layer4.1", ["layer4.1", "layer2.0"])
    assert model.tunes_the_same("layer4.1")
    assert list(FineTuner(3, "test_vit", train=[-1, -2]).chosen.layers) == ["blocks.4", "blocks.5"]
    second_last = {"class_path": "FineTuner", "init_args": {"train": -2, "skip_from": -2}}
    assert method_name(second_last) == "SCL FT last block but one"
    assert method_name({"class_path": "FineTuner", "init_args": {"train": [-1, -3]}}) == "layer FT last block, block -3"
    for wrong in (0, -9):
        with pytest.raises(ValueError, match=rf"or a number from -1, the last block, to -8, the first .*, got {wrong}"):
            FineTuner(3, SMALL, train=wrong)

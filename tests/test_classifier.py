"""What classifiers share: weights of the classes and label smoothing in the training loss, learning rates by depth."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from image_files import write_image
from lightning.pytorch import Callback, LightningDataModule, Trainer
from sklearn.utils.class_weight import compute_class_weight
from timm.optim import param_groups_layer_decay
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from ncfinetune import FineTuner, Supervised
from ncfinetune.datamodules import Digits, ImageFolder, images
from ncfinetune.schedule import depths

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

SMALL = {"name": "resnet18", "stem": "cifar", "in_chans": 1, "channels": [4, 6, 8, 10]}
VIT = {"name": "test_vit", "img_size": 16, "patch_size": 8, "in_chans": 1}
WEIGHTS = [0.5, 1.0, 4.0]


def _trainer(folder: Path, **arguments: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, **{"max_epochs": 1, "enable_checkpointing": False, **quiet, **arguments})


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, weight_decay=0.01)


def _uneven(n: int = 16) -> TensorDataset:
    """Labels 0, 0, 0, 1, 1, 2 over and over."""
    labels = torch.tensor([0, 0, 0, 1, 1, 2]).repeat(n)[:n]
    noise = torch.randn(n, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return TensorDataset(noise + labels.view(-1, 1, 1, 1), labels)


# Weights of the classes


def _weighted_mean(errors: Tensor, labels: Tensor) -> Tensor:
    own = torch.tensor(WEIGHTS)[labels]
    return (own * errors).sum() / own.sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_training_loss_is_a_mean_weighted_by_classes(smoothing: float) -> None:
    labels, logits = torch.tensor([0, 1, 2, 2]), torch.randn(4, 3)
    model = Supervised(3, VIT, label_smoothing=smoothing, class_weight=WEIGHTS)
    # As in torch, smoothing weighs the error of each class by that class's weight, and the sample's own normalises.
    target = (1 - smoothing) * torch.nn.functional.one_hot(labels, 3) + smoothing / 3
    errors = -(target * torch.tensor(WEIGHTS) * logits.log_softmax(1)).sum(1)
    expected = errors.sum() / torch.tensor(WEIGHTS)[labels].sum()
    torch.testing.assert_close(model.loss(logits, labels), expected)
    if not smoothing:
        torch.testing.assert_close(expected, _weighted_mean(-logits.log_softmax(1)[range(4), labels], labels))
    plain = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(model.eval().loss(logits, labels), plain)


def test_shares_of_classes_are_weighted_as_torch_does() -> None:
    shares, logits = torch.rand(4, 3).softmax(1), torch.randn(4, 3)
    model = Supervised(3, VIT, class_weight=WEIGHTS)
    expected = -(shares * torch.tensor(WEIGHTS) * logits.log_softmax(1)).sum() / 4
    torch.testing.assert_close(model.loss(logits, shares), expected)


@pytest.mark.parametrize("soft", [False, True])
def test_squared_error_is_weighted_by_samples(soft: bool) -> None:
    labels, logits = torch.tensor([0, 1, 2, 2]), torch.randn(4, 3)
    model = Supervised(3, VIT, loss="mse", class_weight=WEIGHTS, mse_weight=5, mse_target=2)
    hot = torch.nn.functional.one_hot(labels, 3).float()
    errors = torch.stack([(1 + 4 * y) @ (x - 2 * y).square() / 3 for x, y in zip(logits, hot, strict=True)])
    y = hot if soft else labels
    torch.testing.assert_close(model.loss(logits, y), _weighted_mean(errors, labels))
    torch.testing.assert_close(model.eval().loss(logits, y), errors.mean())


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_run_takes_the_steps_of_weighted_batches(accumulated: int, tmp_path: Path) -> None:
    loader = DataLoader(_uneven(), batch_size=4)
    model = Supervised(3, VIT, class_weight=WEIGHTS, optimizer=_sgd)
    twin = copy.deepcopy(model).train()
    trainer = _trainer(tmp_path, accumulate_grad_batches=accumulated)
    trainer.fit(model, loader, loader)
    optimizer = _sgd(twin.parameters())
    for number, (x, labels) in enumerate(loader, start=1):
        loss = _weighted_mean(-twin(x).log_softmax(1)[range(4), labels], labels)
        (loss / accumulated).backward()
        if number % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()))
    x, labels = _uneven().tensors
    plain = torch.nn.functional.cross_entropy(model.eval()(x), labels)
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(plain.item(), rel=1e-5)


def test_balanced_weights_are_those_of_scikit_learn(tmp_path: Path) -> None:
    data = Digits([0, 1, 8], fraction=0.37, batch_size=64)
    model = Supervised(3, SMALL, class_weight="balanced")
    _trainer(tmp_path, max_steps=1).fit(model, data)
    labels = data.train_plain_dataloader().dataset.targets
    assert len(set(np.bincount(labels))) > 1
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(model.class_weights.numpy(), expected, rtol=1e-6)


def test_balanced_weights_of_a_plain_loader_with_a_class_that_is_absent(tmp_path: Path) -> None:
    labels = _uneven().tensors[1].numpy()
    model = Supervised(4, VIT, class_weight="balanced")
    _trainer(tmp_path).fit(model, DataLoader(_uneven(), batch_size=4))
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(model.class_weights.numpy(), [*expected, 0], rtol=1e-6)


def test_images_are_counted_without_being_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(9):
        write_image(tmp_path / ("few" if number < 3 else "many") / f"{number}.png", number)
    data = ImageFolder(tmp_path, image_size=16, val_fraction=0, test_fraction=0)
    monkeypatch.setattr(images, "read_image", None)
    data.setup("fit")
    assert data.class_counts.tolist() == [3, 6]


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(_uneven())


class Counted(LightningDataModule):
    """A stream that says how many samples of each class it has."""

    def __init__(self, counts: Any) -> None:
        super().__init__()
        self.class_counts = counts

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Stream(), batch_size=4)


def test_a_datamodule_may_say_the_counts_itself(tmp_path: Path) -> None:
    model = Supervised(3, VIT, class_weight="balanced")
    _trainer(tmp_path).fit(model, Counted([1, 2, 3]))
    torch.testing.assert_close(model.class_weights, torch.tensor([2.0, 1.0, 2 / 3]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Counted(None), r'class_weight="balanced" needs the labels of all training images: expected class_counts'),
        (Digits([0, 1, 2], sampling="balanced"), 'class_weight="balanced" with images sampled by weights, as sampling'),
        (Counted([1, 2]), r"expected class_counts of 3 classes, got shape \(2,\)"),
        (DataLoader(TensorDataset(torch.zeros(2, 1, 16, 16), torch.tensor([0, 3]))), r"labels in 0..2 .*got \[3\]"),
    ],
)
def test_data_that_cannot_be_balanced(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        _trainer(tmp_path).fit(Supervised(3, VIT, class_weight="balanced"), data)


class Batches:
    """A sampler of batches: the same samples each time."""

    def __init__(self, indices: list[int]) -> None:
        self.indices = indices

    def __iter__(self) -> Any:
        return iter([self.indices[:4], self.indices[4:]])

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize("kind", ["sampler", "batch_sampler"])
@pytest.mark.parametrize("devices", [1, 2])
def test_the_images_that_a_sampler_leaves_out_do_not_count(kind: str, devices: int, tmp_path: Path) -> None:
    indices = [0, 3, 5, 6, 9, 11, 8, 10]  # labels 0, 1, 2, 0, 1, 2, 0, 1
    sampler = SubsetRandomSampler(indices) if kind == "sampler" else Batches(indices)
    model, found = Supervised(3, VIT, class_weight="balanced"), tmp_path / "weights.pt"

    class Keep(Callback):
        def on_train_start(self, trainer: Trainer, module: Any) -> None:
            if trainer.is_global_zero:
                torch.save(module.class_weights, found)

    options = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False} if devices == 2 else {}
    loader = DataLoader(_uneven(), **({"batch_size": 4} if kind == "sampler" else {}), **{kind: sampler})
    _trainer(tmp_path, callbacks=[Keep()], max_steps=1, **options).fit(model, loader)
    torch.testing.assert_close(torch.load(found), torch.tensor([8 / 9, 8 / 9, 8 / 6]))


def test_counting_takes_no_random_numbers_from_the_run(tmp_path: Path) -> None:
    def fit(class_weight: Any) -> Tensor:
        torch.manual_seed(0)
        model = Supervised(3, VIT, class_weight=class_weight, optimizer=_sgd)
        _trainer(tmp_path).fit(model, DataLoader(_uneven(12), 4, sampler=SubsetRandomSampler(range(12))))
        return model.head.weight

    assert torch.equal(fit("balanced"), fit([12 / 18, 1.0, 2.0]))


@pytest.mark.parametrize(
    "data",
    [
        Digits([0, 1, 2], image_size=16, sampling="balanced"),
        DataLoader(_uneven(), batch_size=4, sampler=WeightedRandomSampler(torch.ones(16), 16)),
    ],
    ids=["datamodule", "sampler"],
)
def test_uneven_classes_are_made_up_for_once(data: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='class_weight="balanced" with images sampled by weights, as sampling='):
        _trainer(tmp_path).fit(Supervised(3, VIT, class_weight="balanced"), data)
    given = Supervised(3, VIT, class_weight=WEIGHTS)
    _trainer(tmp_path, max_steps=1).fit(given, data)


class Unlike(SubsetRandomSampler):
    """A sampler that no copy can be made of."""

    def __reduce__(self) -> Any:
        raise TypeError("no")


class Endless(SubsetRandomSampler):
    __len__ = None

    def __iter__(self) -> Any:
        while True:
            yield 0


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (Unlike([0, 1]), "needs to know which images the training loader draws, and a Unlike cannot be copied"),
        (Endless([0, 1]), "needs the labels of all training images"),
    ],
)
def test_samplers_that_do_not_say_what_they_draw(sampler: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        _trainer(tmp_path, max_steps=1).fit(
            Supervised(3, VIT, class_weight="balanced"), DataLoader(_uneven(), batch_size=4, sampler=sampler)
        )


def test_weights_are_in_no_checkpoint_and_counted_again(tmp_path: Path) -> None:
    model = Supervised(3, VIT, class_weight="balanced")
    trainer = _trainer(tmp_path)
    trainer.fit(model, DataLoader(_uneven(), batch_size=4))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert not [name for name in saved["state_dict"] if "class_weights" in name]
    again = Supervised.load_from_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(again.class_weights, torch.ones(3))
    _trainer(tmp_path, max_epochs=2).fit(again, DataLoader(_uneven(), batch_size=4), ckpt_path=tmp_path / "a.ckpt")
    torch.testing.assert_close(again.class_weights, model.class_weights)
    assert Supervised.load_from_checkpoint(tmp_path / "a.ckpt", class_weight=WEIGHTS).class_weights.tolist() == WEIGHTS


class OwnShare(LightningDataModule):
    """Each of two processes has samples of its own."""

    def train_dataloader(self) -> DataLoader:
        x, labels = _uneven(18).tensors
        own = slice(0, 8) if self.trainer.global_rank == 0 else slice(8, 16)
        return DataLoader(TensorDataset(x[own], labels[own]), batch_size=4)


@pytest.mark.parametrize("shared", [True, False], ids=["the same set on both", "a set of each"])
def test_processes_count_together(shared: bool, tmp_path: Path) -> None:
    model = Supervised(3, VIT, class_weight="balanced", optimizer=_sgd)

    class Keep(Callback):
        def on_train_end(self, trainer: Trainer, module: Any) -> None:
            torch.save(module.class_weights, tmp_path / f"{trainer.global_rank}.pt")

    options = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    _trainer(tmp_path, callbacks=[Keep()], **options).fit(
        model, DataLoader(_uneven(), batch_size=4) if shared else OwnShare()
    )
    labels = _uneven().tensors[1].numpy()
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    for rank in range(2):
        np.testing.assert_allclose(torch.load(tmp_path / f"{rank}.pt").numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("devices", [1, 2])
def test_test_images_are_counted_once_over_all_processes(devices: int, tmp_path: Path) -> None:
    options = {"devices": 2, "strategy": "ddp_fork"} if devices == 2 else {}
    data = Digits([0, 1, 2], batch_size=50)
    data.setup("test")
    number = len(data.test_dataloader().dataset)
    assert number % 2 == 1  # so that a sampler that makes shares equal would repeat one
    found = _trainer(tmp_path, **options).test(Supervised(3, SMALL), data, verbose=False)[0]
    assert found["test/images"] == number


@pytest.mark.parametrize("loss", ["ce", "mse"])
@pytest.mark.parametrize("soft", [False, True])
def test_weights_are_not_rounded_with_the_logits(loss: Any, soft: bool) -> None:
    labels, logits = torch.arange(64) % 3, torch.randn(64, 3).bfloat16()
    y = torch.nn.functional.one_hot(labels, 3).float() if soft else labels
    model = Supervised(3, VIT, loss=loss, class_weight=[1.0, 1.003, 0.997])
    expected = model.loss(logits.float(), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model.loss(logits, y), expected)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_weights_in_low_precision(loss: str, precision: Any, tmp_path: Path) -> None:
    model = Supervised(3, VIT, loss=loss, class_weight="balanced")
    trainer = _trainer(tmp_path, precision=precision)
    trainer.fit(model, DataLoader(_uneven(), batch_size=4))
    assert trainer.callback_metrics["train/loss"].isfinite()
    torch.testing.assert_close(model.class_weights.float(), torch.tensor([16 / 27, 16 / 15, 16 / 6]), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_weight": "even"}, "expected class_weight balanced or 3 weights, got 'even'"),
        ({"class_weight": [1.0]}, r"expected class_weight of 3 positive, finite numbers, got \[1.0\]"),
        ({"class_weight": [1, 2, 0]}, r"expected class_weight of 3 positive, finite numbers, got \[1.0, 2.0, 0.0\]"),
        ({"class_weight": [1, 2, float("nan")]}, r"expected class_weight of 3 positive, finite numbers, got .*nan\]"),
        ({"class_weight": [1, 2, float("inf")]}, r"expected class_weight of 3 positive, finite numbers, got .*inf\]"),
        ({"layer_decay": 0}, "expected layer_decay above 0 and up to 1, or None, got 0"),
        ({"layer_decay": 1.1}, "expected layer_decay above 0 and up to 1, or None, got 1.1"),
        ({"layer_decay": float("nan")}, "expected layer_decay above 0 and up to 1, or None, got nan"),
        ({"label_smoothing": -0.1}, "expected label_smoothing from 0 to below 1, got -0.1"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Supervised(3, SMALL, **arguments)


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_a_fine_tuner_weighs_classes_and_smooths_from_its_cache_too(cache: Any, tmp_path: Path) -> None:
    def fit(**arguments: Any) -> FineTuner:
        torch.manual_seed(0)
        model = FineTuner(3, VIT, train="blocks.5", optimizer=_sgd, allow_random=True, cache=cache, **arguments)
        data = Digits([0, 1, 8], fraction=0.1, batch_size=16, image_size=16, augmentation="plain")
        _trainer(tmp_path, max_steps=3).fit(model, data)
        return model

    balanced = fit(class_weight="balanced", label_smoothing=0.2)
    given = fit(class_weight=balanced.class_weights.tolist(), label_smoothing=0.2)
    assert len(set(balanced.class_weights.tolist())) > 1
    for name, value in balanced.state_dict().items():
        torch.testing.assert_close(value, given.state_dict()[name])
    for other in (fit(class_weight="balanced"), fit(label_smoothing=0.2)):
        assert not torch.allclose(other.head.weight, balanced.head.weight)


# Learning rates by depth


def _timms(backbone: dict, decay: float) -> dict[str, float]:
    """What timm multiplies the rate of each parameter by."""
    arguments = {name: value for name, value in backbone.items() if name != "stem"}
    net = timm.create_model(arguments.pop("name"), **arguments, num_classes=3)
    names = {id(p): name for name, p in net.named_parameters()}
    groups = param_groups_layer_decay(net, layer_decay=decay)
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


def _rates(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    names = {id(p): name.removeprefix("backbone.net.") for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize(
    "backbone",
    [SMALL, VIT, {**VIT, "global_pool": "avg"}, {"name": "test_convnext"}, {"name": "test_efficientnet"}],
    ids=["ResNet", "ViT", "ViT with a norm of the head", "ConvNeXt", "EfficientNet"],
)
def test_rates_are_those_of_timm(backbone: dict) -> None:
    model = Supervised(3, backbone, layer_decay=0.7, projection="linear", optimizer=_sgd)
    optimizer = model.configure_optimizers()
    rates, timms = _rates(model, optimizer), _timms(backbone, 0.7)
    assert rates.keys() == {name.removeprefix("backbone.net.") for name, _ in model.named_parameters()}
    own = dict(model.backbone.net.named_parameters())
    assert {name: rates[name] for name in own} == pytest.approx({name: 0.1 * timms[name] for name in own})
    assert {rates[name] for name in rates if name not in own} == {0.1}
    assert len(set(rates.values())) > 3
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.01}


@pytest.mark.parametrize(("train", "depth"), [("all", 7), (["blocks.2", "blocks.4", "norm"], 3), ("*.bias", 7)])
@pytest.mark.parametrize("factor", [0, 1, 10])
def test_rates_of_a_fine_tuner_are_of_what_trains_and_times_that_of_the_head(
    train: Any, depth: int, factor: int
) -> None:
    model = FineTuner(3, VIT, train=train, layer_decay=0.7, head_lr_factor=factor, optimizer=_sgd)
    optimizer = model.configure_optimizers()
    rates, timms = _rates(model, optimizer), _timms(VIT, 0.7)
    trained = {name.removeprefix("backbone.net.") for name, p in model.named_parameters() if p.requires_grad}
    head = {name: 0.1 * factor for name in ("head.weight", "head.bias") if factor}
    assert rates == pytest.approx({name: head.get(name, 0.1 * timms[name]) for name in trained})
    assert head.keys() <= trained
    assert len(optimizer.param_groups) == depth + bool(factor)
    assert all(group["params"] for group in optimizer.param_groups)


def test_depth_of_nothing_is_refused() -> None:
    with pytest.raises(
        ValueError, match='layer_decay=0.5 is for trained layers of the backbone, and with train="none" th'
    ):
        FineTuner(3, VIT, layer_decay=0.5)


def test_rates_by_depth_multiply_those_of_a_scheduler_that_sets_them(tmp_path: Path) -> None:
    model = Supervised(
        3,
        VIT,
        layer_decay=0.5,
        lr_batch=8,
        optimizer=_sgd,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=4),
        lr_interval="step",
    )
    seen: list[list[float]] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    _trainer(tmp_path, callbacks=[Watch()]).fit(model, DataLoader(_uneven(), batch_size=4))
    reference = torch.optim.lr_scheduler.OneCycleLR(_sgd([torch.zeros(1)]), max_lr=0.3, total_steps=4)
    layers = max(depths(model.backbone.net).values())
    expected = []
    for _ in range(4):
        expected.append([0.5 * 0.5**depth * reference.get_last_lr()[0] for depth in range(layers, -1, -1)])
        reference.optimizer.step()
        if len(expected) < 4:
            reference.step()
    assert np.shape(seen) == np.shape(expected)
    np.testing.assert_allclose(seen, expected, rtol=1e-6)


@pytest.mark.parametrize("learner", [Supervised, FineTuner])
def test_a_run_with_rates_by_depth_goes_on(learner: Any, tmp_path: Path) -> None:
    def fit(epochs: int, **arguments: Any) -> Any:
        torch.manual_seed(0)
        model = learner(3, VIT, layer_decay=0.5, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), **knobs)
        trainer = _trainer(tmp_path, max_epochs=epochs)
        trainer.fit(model, DataLoader(_uneven(), batch_size=4), **arguments)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model

    knobs = {"train": "all", "head_lr_factor": 2, "allow_random": True} if learner is FineTuner else {}
    fit(1)
    whole, resumed = fit(2), fit(2, ckpt_path=tmp_path / "1.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_network_whose_layers_timm_does_not_tell_apart() -> None:
    with pytest.raises(
        ValueError, match=r"layer_decay needs .* PoolingVisionTransformer has no group_matcher for that"
    ):
        Supervised(3, "pit_ti_224", layer_decay=0.5)
    model = Supervised(3, VIT)
    compiled = torch.nn.Sequential(model.backbone.net)
    compiled.group_matcher, compiled.pretrained_cfg = model.backbone.net.group_matcher, {}
    with pytest.raises(ValueError, match="Sequential has no group_matcher for that"):
        depths(compiled)


@pytest.mark.parametrize("name", ["layer_decay", "head_lr_factor"])
def test_a_run_goes_on_with_the_factors_that_its_optimiser_has(name: str, tmp_path: Path) -> None:
    def fit(factor: float, epochs: int, **arguments: Any) -> Trainer:
        model = FineTuner(3, VIT, train="all", allow_random=True, optimizer=_sgd, **{name: factor})
        trainer = _trainer(tmp_path, max_epochs=epochs)
        trainer.fit(model, DataLoader(_uneven(), batch_size=8), **arguments)
        return trainer

    fit(0.5, 1).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=f"cannot resume a run of {name}=0.5 with {name}=0.8, since the saved opt"):
        fit(0.8, 2, ckpt_path=tmp_path / "a.ckpt")
    assert fit(0.5, 2, ckpt_path=tmp_path / "a.ckpt").optimizers[0].param_groups[-1]["name"] == "head"


def test_weights_of_any_type_are_taken_and_can_be_loaded(tmp_path: Path) -> None:
    for weights in (np.array([1.0, 2, 3]), torch.tensor([1.0, 2, 3])):
        model = Supervised(3, SMALL, class_weight=weights)
        assert model.class_weights.tolist() == [1, 2, 3]
        torch.save(dict(model.hparams), tmp_path / "options.pt")
        saved = torch.load(tmp_path / "options.pt", weights_only=True)["class_weight"]
        assert torch.equal(torch.as_tensor(saved), torch.tensor([1.0, 2, 3]))


def test_balanced_weights_of_a_run_without_training_batches_are_not_counted(tmp_path: Path) -> None:
    model = Supervised(3, VIT, class_weight="balanced")
    _trainer(tmp_path, limit_train_batches=0).fit(model, DataLoader(_uneven(), batch_size=4))
    assert model.class_weights.tolist() == [1, 1, 1]


def test_a_datamodule_that_does_not_know_its_classes_is_taken(tmp_path: Path) -> None:
    data = LightningDataModule()
    data.train_dataloader = lambda: DataLoader(_uneven(), batch_size=4)
    data.num_classes = None
    _trainer(tmp_path).fit(Supervised(3, VIT), data)

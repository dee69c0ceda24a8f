"""OnlineProbe: what it learns and measures, on whose features, and that the run doesn't notice."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stranger
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from ncfinetune import SimCLR, SupCon, Supervised
from ncfinetune.callbacks import OnlineProbe
from ncfinetune.callbacks.classify import LinearProbe, Neighbours, fit_probe
from ncfinetune.datamodules import Digits
from ncfinetune.loaders import evenly

SMALL = {"name": "resnet18", "stem": "cifar", "in_chans": 1, "channels": [4, 6, 8, 10]}
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class Stranger(stranger.Stranger):
    """Without anything that differs between training and evaluation."""

    def __init__(self, noise: float = 0.0, lr: float = 0.1) -> None:
        super().__init__(nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Dropout(noise)), lr)


def _data(seed: int = 1, n: int = 60, classes: int = 3, apart: float = 0.3) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    return TensorDataset(torch.randn(n, 1, 6, 6, generator=generator) + apart * labels.view(-1, 1, 1, 1), labels)


def _loader(seed: int = 1, shuffle: bool = False, batch_size: int = 16) -> DataLoader:
    return DataLoader(_data(seed), batch_size=batch_size, shuffle=shuffle)


class Second(LightningDataModule):
    """Another data set, of four classes, normalised by its own hook."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(_data(3, 80, 4), batch_size=7)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(_data(4, 40, 4), batch_size=7)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return 2 * batch[0], batch[1]


def _trainer(folder: Path, *callbacks: Any, **arguments: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        accelerator="cpu",
        **{"max_epochs": 2, "logger": False, **quiet, **arguments},
    )


def _features(model: Stranger, dataset: TensorDataset, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    images, labels = dataset.tensors
    with torch.no_grad():
        return model.features(scale * images).mean((2, 3)).numpy(), labels.numpy()


def test_it_learns_batch_by_batch_beside_a_module_that_stands_still(tmp_path: Path) -> None:
    model = Stranger(lr=0.0)
    trainer = _trainer(tmp_path, OnlineProbe(3, optimizer=lambda p: torch.optim.SGD(p, lr=0.5)), max_epochs=3)
    trainer.fit(model, _loader(), _loader(2))
    x, y = (torch.from_numpy(v) for v in _features(model, _data()))
    normalise, linear = nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    for _ in range(3):
        losses = []
        for rows in torch.arange(60).split(16):
            loss = nn.functional.cross_entropy(linear(normalise(x[rows])), y[rows])
            gradients = torch.autograd.grad(loss, list(linear.parameters()))
            with torch.no_grad():
                for p, gradient in zip(linear.parameters(), gradients, strict=True):
                    p -= 0.5 * gradient
            losses.append(loss.item() * len(rows) / 60)
    assert trainer.callback_metrics["probe/loss"].item() == pytest.approx(sum(losses), rel=1e-5)
    x, y = (torch.from_numpy(v) for v in _features(model, _data(2)))
    right = (linear(normalise.eval()(x)).argmax(1) == y).float().mean().item()
    assert trainer.callback_metrics["probe/acc"].item() == pytest.approx(right)
    assert right > 0.5


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_probed_run_ends_in_the_same_weights(noise: float, tmp_path: Path) -> None:
    ends = []
    for callbacks in ((), (OnlineProbe(3, knn=5, downstream=Second()),)):
        seed_everything(0, verbose=False)
        model = Stranger(noise)
        trainer = _trainer(tmp_path, *callbacks, max_epochs=3)
        trainer.fit(model, _loader(shuffle=True), _loader())
        ends.append(model.state_dict())
        assert sum(p.numel() for p in model.parameters()) == 81
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    logged = {name for name in trainer.callback_metrics if name.startswith("probe/")}
    assert logged == {f"probe/{name}" for name in ("loss", "acc", "knn", "downstream_acc", "downstream_knn")}


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_second_data_set_has_the_precision_of_the_run(precision: Any, tmp_path: Path) -> None:
    found, model = [], Stranger(lr=0.0)
    for given in ("32-true", precision):
        trainer = _trainer(tmp_path, OnlineProbe(3, knn=5, downstream=Second()), precision=given, max_epochs=1)
        trainer.fit(copy.deepcopy(model), _loader(), _loader())
        found.append([trainer.callback_metrics[f"probe/downstream_{name}"].item() for name in ("acc", "knn")])
    assert found[1] == pytest.approx(found[0], abs=0.05)  # one or two of 40 images


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_forward_pass_is_left_out(tmp_path: Path) -> None:
    class Skipping(Stranger):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    found = []
    for kind, rows in ((Skipping, range(60)), (Stranger, [*range(16), *range(32, 48)])):
        trainer = _trainer(tmp_path, OnlineProbe(3))
        seed_everything(0, verbose=False)
        trainer.fit(kind(lr=0.0), DataLoader(Subset(_data(), list(rows)), batch_size=16), _loader(2))
        found.append([trainer.callback_metrics[f"probe/{name}"].item() for name in ("loss", "acc")])
    assert found[0] == found[1]


def test_neighbours_and_second_data_set_are_measured_with_the_weights_of_the_epoch(tmp_path: Path) -> None:
    model = Stranger()
    trainer = _trainer(tmp_path, OnlineProbe(3, knn=5, downstream=Second()))
    trainer.fit(model, _loader(shuffle=True), _loader(2))
    (x, y), (u, v) = _features(model, _data()), _features(model, _data(2))
    assert trainer.callback_metrics["probe/knn"].item() == pytest.approx((_knn(u, x, y, 5) == v).mean())
    (x, y), (u, v) = (_features(model, _data(*which), scale=2.0) for which in ((3, 80, 4), (4, 40, 4)))
    scaler = StandardScaler().fit(x)
    regression = LogisticRegression(max_iter=1000, tol=1e-8).fit(scaler.transform(x), y)
    expected = regression.score(scaler.transform(u), v)
    assert trainer.callback_metrics["probe/downstream_acc"].item() == pytest.approx(expected, abs=0.026)
    assert trainer.callback_metrics["probe/downstream_knn"].item() == pytest.approx((_knn(u, x, y, 5) == v).mean())


def _knn(queries: np.ndarray, bank: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    def votes(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / 0.07)

    return KNeighborsClassifier(k, weights=votes, metric="cosine").fit(bank, labels).predict(queries)


@pytest.mark.parametrize("k", [1, 7, 500])
def test_neighbours_are_those_of_scikit_learn_and_no_more_than_there_are(k: int) -> None:
    bank, labels, queries = torch.randn(90, 8), torch.arange(90) % 5, torch.randn(600, 8)
    found = Neighbours(bank, labels, 5, k)(queries).argmax(1)
    assert (found.numpy() == _knn(queries.numpy(), bank.numpy(), labels.numpy(), min(k, 90))).all()


def test_fitted_probe_is_the_logistic_regression_of_scikit_learn() -> None:
    labels = torch.arange(120) % 4
    features = torch.randn(120, 6) * torch.tensor([1, 10, 0.1, 1, 1, 1e-3]) + 3 + 0.5 * labels[:, None]
    features = torch.cat([features, torch.zeros(120, 1)], 1)  # a dead unit
    probe = fit_probe(features, labels, 4)
    scaled = StandardScaler().fit_transform(features.numpy())
    regression = LogisticRegression(max_iter=2000, tol=1e-8).fit(scaled, labels.numpy())
    expected = torch.from_numpy(regression.predict_proba(scaled)).float()
    torch.testing.assert_close(probe(features).softmax(1), expected, atol=0.02, rtol=0)
    assert (probe(features).argmax(1) == expected.argmax(1)).float().mean() > 0.98


def test_a_new_probe_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    LinearProbe(5, 3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", [pytest.param(SupCon, marks=pytest.mark.slow), SimCLR])
def test_contrastive_learners_are_probed_on_the_features_of_every_view(method, tmp_path: Path) -> None:
    images, labels = _data(n=48, apart=3).tensors  # a narrow random network sees few of the pixels
    views = DataLoader(TensorDataset(images[:, None].repeat(1, 2, 1, 1, 1), labels), batch_size=16, shuffle=True)
    probe = OnlineProbe(3, knn=9, optimizer=lambda p: torch.optim.Adam(p, lr=0.05))
    trainer = _trainer(tmp_path, probe, max_epochs=20)
    model = method(SMALL, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    plain = _data(2, apart=3)
    trainer.fit(model, views, DataLoader(plain, batch_size=16))
    assert trainer.callback_metrics["probe/acc"] > 0.5
    with torch.no_grad():
        bank, queries = (model.eval().backbone(v).numpy() for v in (images, plain.tensors[0]))
    right = _knn(queries, bank.repeat(2, 0), labels.repeat_interleave(2).numpy(), 9) == plain.tensors[1].numpy()
    assert trainer.callback_metrics["probe/knn"].item() == pytest.approx(right.mean())
    assert probe._linear.probe.linear.in_features == 10


def test_digits_and_a_layer_by_name(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    probe = OnlineProbe(layer="layer3.0", knn=20, downstream=Digits([5, 6, 7]), every_n_epochs=2)
    trainer = _trainer(tmp_path, probe, max_epochs=8)
    trainer.fit(Supervised(3, SMALL), Digits([0, 1, 2]))
    assert trainer.callback_metrics["probe/downstream_acc/layer3.0"] > 0.6
    assert trainer.callback_metrics["probe/knn/layer3.0"] > 0.6


def test_probes_of_several_layers_log_apart(tmp_path: Path) -> None:
    probes = [OnlineProbe(), OnlineProbe(layer="layer1.0")]
    trainer = _trainer(tmp_path, *probes, max_epochs=1)
    trainer.fit(Supervised(3, SMALL), Digits([0, 1, 2]))
    assert trainer.callback_metrics["probe/acc"] != trainer.callback_metrics["probe/acc/layer1.0"]


def test_its_state_is_in_the_checkpoint_and_goes_on(tmp_path: Path) -> None:
    def run(epochs: int, **arguments: Any) -> tuple[Trainer, OnlineProbe]:
        seed_everything(0, verbose=False)
        probe = OnlineProbe(3)
        trainer = _trainer(tmp_path, probe, max_epochs=epochs)
        trainer.fit(Stranger(), _loader(), _loader(2), **arguments)
        return trainer, probe

    half, _ = run(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    stored = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]
    assert list(stored["OnlineProbe{'layer': 'penultimate'}"]) == ["probe", "optimizer", "left_out", "losses"]
    (_, whole), (_, resumed) = run(4), run(4, ckpt_path=tmp_path / "half.ckpt")
    for key, value in whole._linear.probe.state_dict().items():
        torch.testing.assert_close(resumed._linear.probe.state_dict()[key], value)
    untouched = OnlineProbe(3)
    untouched.load_state_dict(resumed.state_dict())
    assert untouched.state_dict()["probe"].keys() == resumed.state_dict()["probe"].keys()


def test_two_processes_learn_one_probe(tmp_path: Path) -> None:
    values = []
    for processes in (1, 2):
        torch.manual_seed(0)
        spread = {"strategy": "ddp_fork", "devices": 2} if processes == 2 else {"devices": 1}
        probe = OnlineProbe(3, knn=5, downstream=Second(), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
        trainer = _trainer(tmp_path, probe, max_epochs=4, **spread)
        loaders = (_loader(seed, batch_size=60 // processes) for seed in (1, 2))  # one batch, in whatever order
        trainer.fit(Stranger(lr=0.0), *loaders)
        values.append({name: value.item() for name, value in trainer.callback_metrics.items()})
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_samples_that_two_processes_repeat_count_once(tmp_path: Path) -> None:
    values = []
    for processes in (1, 2):
        torch.manual_seed(0)
        spread = {"strategy": "ddp_fork", "devices": 2} if processes == 2 else {"devices": 1}
        probe = OnlineProbe(3, knn=5, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
        trainer = _trainer(tmp_path, probe, max_epochs=2, **spread)
        odd = DataLoader(_data(2, 7), batch_size=1)  # the second process ends with a batch that is all repeated
        trainer.fit(Stranger(lr=0.0), _loader(1, batch_size=60 // processes), odd)
        values.append({name: value.item() for name, value in trainer.callback_metrics.items()})
    assert values[0] == pytest.approx(values[1], rel=1e-4)


class Unequal(IterableDataset):
    """The rows of one set in turn, in batches of which the first of two processes has 12 and 4, the other 12 and 8."""

    def __iter__(self) -> Any:
        images, labels = _data(1, 36).tensors
        rank, world = (torch.distributed.get_rank(), 2) if torch.distributed.is_initialized() else (0, 1)
        rows = torch.arange(36) if world == 1 else torch.tensor_split(torch.arange(36), [16])[rank]
        yield from zip(images[rows], labels[rows], strict=True)


def test_two_processes_with_unequal_batches_learn_one_probe(tmp_path: Path) -> None:
    class Keep(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            torch.save(probe.state_dict()["probe"], tmp_path / f"{trainer.global_rank}.pt")

    probe = OnlineProbe(3, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    trainer = _trainer(tmp_path, probe, Keep(), max_epochs=1, strategy="ddp_fork", devices=2, limit_val_batches=0)
    torch.manual_seed(0)
    model = Stranger(lr=0.0)
    trainer.fit(model, DataLoader(Unequal(), batch_size=12))
    seen = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    images, _ = _data(1, 36).tensors
    with torch.no_grad():
        features = model.features(images).mean((2, 3))
    expected = nn.BatchNorm1d(6, affine=False)
    for rows in ([*range(12), *range(16, 28)], [*range(12, 16), *range(28, 36)]):
        expected(features[rows])
    for own in seen:
        torch.testing.assert_close(own["normalise.running_mean"], expected.running_mean)
    torch.testing.assert_close(seen[0], seen[1])


def test_the_loss_is_of_the_samples_that_the_probe_learns_from(tmp_path: Path) -> None:
    """That of a classifier of zeros is log 3, of however many samples a batch has none."""
    images, labels = _data().tensors
    some = TensorDataset(images, torch.where(torch.arange(len(labels)) < 50, -1, labels))
    probe = OnlineProbe(3, ignore_index=-1, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    trainer = _trainer(tmp_path, probe, max_epochs=1, limit_val_batches=0)
    model = Stranger()
    model.training_step = lambda batch, batch_idx: model(batch[0]).square().mean()
    trainer.fit(model, DataLoader(some, batch_size=7))
    assert trainer.callback_metrics["probe/loss"].item() == pytest.approx(np.log(3), rel=1e-6)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_resumed_before_its_first_step_goes_on_with_its_probe(tmp_path: Path) -> None:
    """A probe learns from each batch, of which a step has four; they are all the same."""
    images, labels = _data(1, 15).tensors
    loader = DataLoader(TensorDataset(images.repeat(4, 1, 1, 1), labels.repeat(4)), batch_size=15)

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
            if rest[-1] == 1:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    probes = [OnlineProbe(3), OnlineProbe(3)]
    for probe, path in zip(probes, (None, tmp_path / "early.ckpt"), strict=True):
        torch.manual_seed(0)
        trainer = _trainer(tmp_path, probe, Save(), max_epochs=1, accumulate_grad_batches=4, limit_val_batches=0)
        trainer.fit(Stranger(lr=0.0), loader, ckpt_path=path)
    for key, value in probes[0].state_dict()["probe"].items():
        torch.testing.assert_close(probes[1].state_dict()["probe"][key], value)


def test_a_probe_begins_anew_with_each_run(tmp_path: Path) -> None:
    def fit(probe: OnlineProbe, features: int) -> float:
        torch.manual_seed(features)
        model = Stranger()
        model.features[0], model.classify = nn.Conv2d(1, features, 3), nn.Linear(features, 3)
        trainer = _trainer(tmp_path, probe, max_epochs=1)
        trainer.fit(model, _loader(), _loader(2))
        return trainer.callback_metrics["probe/loss"].item()

    one = OnlineProbe(3)
    assert [fit(one, features) for features in (6, 6, 8)] == [fit(OnlineProbe(3), features) for features in (6, 6, 8)]


def test_a_bank_is_spread_over_data_sorted_by_class() -> None:
    labels = torch.arange(100) // 10
    loader = DataLoader(TensorDataset(torch.zeros(100, 1), labels), batch_size=8)
    taken = torch.cat([batch[1] for batch in evenly(loader, 20)])
    assert taken.bincount().tolist() == [2] * 10
    assert sum(len(batch[1]) for batch in evenly(loader, 1000)) == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"knn": -1}, "expected knn of at least 0, got -1"),
        ({"every_n_epochs": 0}, "expected every_n_epochs of at least 1, got 0"),
        ({"max_samples": 1}, "expected max_samples of at least 2, got 1"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnlineProbe(3, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": None}, r"neither datamodule nor module has num_classes; give it OnlineProbe\(num_classes=..."),
        ({"layer": "features.*"}, r"expected one layer, but 'features.\*' fits features.0, features.1, features.2"),
        ({"layer": "feature.0"}, "no layer fits 'feature.0'"),
    ],
)
def test_what_cannot_be_probed_is_said_before_the_first_step(arguments: dict, message: str, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, OnlineProbe(**{"num_classes": 3, **arguments}))
    with pytest.raises(ValueError, match=message):
        trainer.fit(Stranger(), _loader())
    assert trainer.global_step == 0


def test_a_second_data_set_without_validation_images_is_refused(tmp_path: Path) -> None:
    class Bare(Second):
        def val_dataloader(self) -> list[Any]:
            return []

    with pytest.raises(ValueError, match="no batches to measure; the data need training and validation images"):
        _trainer(tmp_path, OnlineProbe(3, downstream=Bare())).fit(Stranger(), _loader())


def test_a_layer_that_does_not_run_is_named(tmp_path: Path) -> None:
    model = Supervised(3, SMALL)
    model.spare = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="layer 'spare' did not run in this batch; give OnlineProbe a layer that does"):
        _trainer(tmp_path, OnlineProbe(layer="spare"), max_epochs=1).fit(model, Digits([0, 1, 2], shots=8))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8, torch.float64])
def test_one_hot_labels_of_any_type_are_learnt_as_classes_are(dtype: torch.dtype, tmp_path: Path) -> None:
    images, labels = _data().tensors

    def learnt(given: torch.Tensor) -> dict[str, float]:
        torch.manual_seed(0)
        probe = OnlineProbe(3, batch_to_labels=lambda batch: batch[1])
        trainer = _trainer(tmp_path, probe, max_epochs=1)
        model = Stranger()
        model.training_step = lambda batch, batch_idx: model(batch[0]).square().mean()
        model.validation_step = lambda batch, batch_idx: model.log("images", float(len(model(batch[0]))))
        loader = DataLoader(TensorDataset(images, given), batch_size=7)
        trainer.fit(model, loader, loader)
        return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("probe")}

    found = learnt(nn.functional.one_hot(labels, 3).to(dtype))
    assert found == pytest.approx(learnt(labels), rel=1e-5)
    assert found["probe/acc"] > 0.5

"""OnlineProbe(kind="ridge"): its accuracies are those of a regression solved again without each sample in turn."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stranger
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset, TensorDataset

from ncfinetune.callbacks import OnlineProbe
from ncfinetune.callbacks.classify import count, fit_ridge
from ncfinetune.folds import balanced_folds
from ncfinetune.samples import spread

K = 3
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class Stranger(stranger.Stranger):
    """With dropout, which a pass must not see, and a note of all that is logged, by epoch and name."""

    def __init__(self, noise: float = 0.5, lr: float = 0.1) -> None:
        super().__init__(nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Dropout(noise)), lr)
        self.logged: dict[tuple[int, str], list[float]] = {}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        sound = (batch[1] >= 0) & batch[0].isfinite().all((1, 2, 3))
        return nn.functional.cross_entropy(self(batch[0][sound]), batch[1][sound])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        assert type(value) is float
        self.logged.setdefault((self.trainer.current_epoch, name), []).append(value)
        super().log(name, value, *args, **options)


def _data(seed: int = 1, n: int = 48, classes: int = K) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    return TensorDataset(torch.randn(n, 1, 6, 6, generator=generator) + 0.3 * labels.view(-1, 1, 1, 1), labels)


def _loader(seed: int = 1, shuffle: bool = False, **sizes: int) -> DataLoader:
    return DataLoader(_data(seed, **sizes), batch_size=16, shuffle=shuffle)


class Second(LightningDataModule):
    """A second data set, of four classes, and several validation loaders."""

    def train_dataloader(self) -> DataLoader:
        return _loader(3, classes=4)

    def val_dataloader(self) -> list[DataLoader]:
        return [_loader(4, classes=4), _loader(5, classes=4)]


def _fit(folder: Path, model: Stranger, callbacks: Any, *data: Any, ckpt_path: Any = None, **options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    own = {"max_epochs": 2, "logger": False, "accelerator": "cpu", **quiet, **options}
    trainer = Trainer(default_root_dir=folder, callbacks=callbacks, **own)
    trainer.fit(model, *(data or (_loader(shuffle=True), _loader(2))), ckpt_path=ckpt_path)
    return trainer


def _features(model: Stranger, data: Any) -> tuple[np.ndarray, np.ndarray]:
    images, labels = next(iter(DataLoader(data, batch_size=len(data))))
    with torch.no_grad():
        return model.eval().features(images).mean((2, 3)).double().numpy(), labels.numpy()


def _solved(x: np.ndarray, y: np.ndarray, lam: float) -> np.ndarray:
    """Weights ``(d + 1, K)`` of ridge regression on one-hot targets ``y``, whose bias, the last, is not shrunk."""
    rows = np.c_[x, np.ones(len(x))]
    shrunk = lam * np.diag([1.0] * x.shape[1] + [0.0])
    return np.linalg.solve(rows.T @ rows + shrunk, rows.T @ y)


def _scores(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.c_[x, np.ones(len(x))] @ weights


def _by_brute_force(x: np.ndarray, labels: np.ndarray, classes: int = K) -> tuple[float, Any]:
    """The accuracy in folds with one sample of each class, and what predicts; strengths are by single ones left out."""
    y = np.eye(classes)[labels]
    scale = ((x - x.mean(0)) ** 2).sum() / min(len(x) - 1, x.shape[1])
    found = []
    for lam in scale * np.logspace(-6, 3, 45):
        rest = [np.arange(len(x)) != i for i in range(len(x))]
        scores = np.stack([_scores(x[~some], _solved(x[some], y[some], lam))[0] for some in rest])
        found.append((((scores - y) ** 2).sum(), lam, scores[np.arange(len(x)), labels]))
    (_, lam, own), right = min(found, key=lambda one: one[0]), []
    order = np.lexsort((own, labels))
    for way in balanced_folds(torch.from_numpy(labels[order])).numpy()[:, order.argsort()]:
        for fold in np.unique(way):
            own = way == fold
            right.append(_scores(x[own], _solved(x[~own], y[~own], lam)).argmax(1) == labels[own])
    weights = _solved(x, y, lam)
    return np.concatenate(right).mean(), lambda queries: _scores(queries, weights).argmax(1)


def test_accuracies_are_those_of_the_regression_solved_again_without_each_sample(tmp_path: Path) -> None:
    model = Stranger()
    found = _fit(tmp_path, model, [OnlineProbe(K, kind="ridge", downstream=Second())]).callback_metrics
    (x, y), (u, v) = _features(model, _data()), _features(model, _data(2))
    left_out, predict = _by_brute_force(x, y)
    expected = {"probe/held_out_acc": left_out, "probe/acc": (predict(u) == v).mean()}
    _, predict = _by_brute_force(*_features(model, _data(3, classes=4)), 4)
    for index in range(2):
        u, v = _features(model, _data(4 + index, classes=4))
        expected[f"probe/downstream_acc/dataloader_idx_{index}"] = (predict(u) == v).mean()
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-6)
    assert len(set(expected.values())) > 2
    assert all(0.3 < value < 1 for value in expected.values())


def test_the_run_does_not_notice_and_a_step_costs_nothing(tmp_path: Path) -> None:
    class Ops(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Ops.seen += 1
            return func(*args, **(kwargs or {}))

    class Watched(OnlineProbe):
        steps = 0

        def on_train_batch_start(self, *args: Any) -> None:
            with Ops():
                super().on_train_batch_start(*args)

        def on_train_batch_end(self, *args: Any) -> None:
            with Ops():
                super().on_train_batch_end(*args)
            assert self._observer._caught == self._observer._inputs == {}
            Watched.steps += 1

    ends = []
    for callbacks in ([], [Watched(K, kind="ridge", knn=3, downstream=Second())]):
        seed_everything(0, verbose=False)
        model = Stranger()
        _fit(tmp_path, model, callbacks)
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    assert (Watched.steps, Ops.seen) == (6, 0)


class Plain(LightningDataModule):
    """Trains on noise, as if augmentation left nothing of the images; they are in ``train_plain_dataloader``."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.randn(48, 1, 6, 6), torch.arange(48) % K), batch_size=16)

    def train_plain_dataloader(self) -> DataLoader:
        return _loader()


def test_without_validation_the_left_out_accuracy_of_plain_images_is_there(tmp_path: Path) -> None:
    model = Stranger()
    found = _fit(tmp_path, model, [OnlineProbe(K, kind="ridge", max_samples=30)], Plain()).callback_metrics
    bank = Subset(_data(), spread(range(48), 30, _data()))
    expected, _ = _by_brute_force(*_features(model, bank))
    assert {name: value.item() for name, value in found.items()} == pytest.approx({"probe/held_out_acc": expected})


EVERY = {
    "validation each epoch": ({}, 1, {0: "acc held_out", 1: "acc held_out", 2: "acc held_out"}),
    "each second, and the last": ({}, 2, {1: "acc held_out", 2: "acc held_out"}),
    "validation each second": ({"check_val_every_n_epoch": 2}, 1, {0: "held_out", 1: "acc held_out", 2: "held_out"}),
    "twice an epoch": (
        {"val_check_interval": 0.5},
        2,
        {1: "acc acc held_out held_out", 2: "acc acc held_out held_out"},
    ),
    "by steps": (
        {"val_check_interval": 5, "check_val_every_n_epoch": None},
        2,
        {1: "acc held_out held_out", 2: "held_out"},
    ),
}


@pytest.mark.parametrize("when", EVERY)
def test_it_is_measured_every_so_many_epochs(when: str, tmp_path: Path) -> None:
    options, every, expected = EVERY[when]
    model = Stranger()
    callbacks = [OnlineProbe(K, layer="features.0", kind="ridge", every_n_epochs=every)]
    _fit(tmp_path, model, callbacks, max_epochs=3, limit_train_batches=2 if "twice" in when else 1.0, **options)
    found: dict[int, Any] = {}
    for (epoch, name), values in sorted(model.logged.items()):
        number, layer = name.removeprefix("probe/").split("/")
        assert layer == "features.0"
        found.setdefault(epoch, []).extend([number.removesuffix("_acc")] * len(values))
    found = {epoch: " ".join(numbers) for epoch, numbers in found.items()}
    assert found == expected


def test_each_loader_has_an_accuracy_and_samples_without_a_label_do_not_count(tmp_path: Path) -> None:
    def hidden(data: TensorDataset, value: int) -> TensorDataset:
        images, labels = data.tensors
        hide = torch.arange(len(labels)) % 4 == 0
        return TensorDataset(images + 9 * hide.view(-1, 1, 1, 1), torch.where(hide, value, labels))

    model, data = Stranger(), [hidden(_data(seed), -1) for seed in (1, 2, 3)]
    loaders = [DataLoader(part, batch_size=16) for part in (*data, hidden(_data(4), K))]
    with pytest.warns(UserWarning, match="probe/acc/dataloader_idx_2 is logged as nan: 12 of 48 samples have labels"):
        trainer = _fit(tmp_path, model, [OnlineProbe(K, kind="ridge", ignore_index=-1)], loaders[0], loaders[1:])
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    features = [_features(model, part) for part in data]
    (x, y), *tested = [(x[y >= 0], y[y >= 0]) for x, y in features]
    left_out, predict = _by_brute_force(x, y)
    expected = {f"probe/acc/dataloader_idx_{i}": (predict(u) == v).mean() for i, (u, v) in enumerate(tested)}
    expected |= {"probe/held_out_acc": left_out, "probe/acc/dataloader_idx_2": float("nan")}
    assert found == pytest.approx(expected, nan_ok=True)


def test_features_that_are_not_finite(tmp_path: Path) -> None:
    images, labels = _data().tensors
    broken = TensorDataset(images.clone(), labels)
    broken.tensors[0][::16] = torch.nan
    loaders = DataLoader(broken, batch_size=16), [_loader(2), DataLoader(broken, batch_size=16)]
    model = Stranger(lr=0.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = _fit(tmp_path, model, [OnlineProbe(K, kind="ridge")], *loaders, max_epochs=1).callback_metrics
    messages = [str(warning.message) for warning in said]
    assert "OnlineProbe left out 3 samples of a pass with nan or inf in features" in messages
    assert any(
        "dataloader_idx_1 is logged as nan: 3 of 48 samples have labels outside 0..2, or nan" in m for m in messages
    )
    x, y = _features(model, broken)
    kept = np.isfinite(x).all(1)
    left_out, predict = _by_brute_force(x[kept], y[kept])
    u, v = _features(model, _data(2))
    assert found["probe/held_out_acc"].item() == pytest.approx(left_out)
    assert found["probe/acc/dataloader_idx_0"].item() == pytest.approx((predict(u) == v).mean())
    assert found["probe/acc/dataloader_idx_1"].isnan()


def test_labels_of_the_bank_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected labels in 0..2 \(num_classes=3\), got \[3\]"):
        _fit(tmp_path, Stranger(lr=0.0), [OnlineProbe(K, kind="ridge")], Plain4())


class Plain4(Plain):
    def train_plain_dataloader(self) -> DataLoader:
        return _loader(classes=4)


def _only(*classes: int) -> Subset:
    return Subset(_data(), [index for index in range(48) if index % K in classes])


def test_a_class_without_images_in_the_bank_is_fine(tmp_path: Path) -> None:
    model = Stranger()
    found = _fit(tmp_path, model, [OnlineProbe(K, kind="ridge")], DataLoader(_only(0, 2), batch_size=16), _loader(2))
    left_out, predict = _by_brute_force(*_features(model, _only(0, 2)))
    u, v = _features(model, _data(2))
    assert found.callback_metrics["probe/held_out_acc"].item() == pytest.approx(left_out)
    assert found.callback_metrics["probe/acc"].item() == pytest.approx((predict(u) == v).mean())
    assert (v == 1).any()


def test_of_one_class_there_is_nothing_to_tell_apart(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data = DataLoader(_only(1), batch_size=16), _loader(2)
        found = _fit(tmp_path, Stranger(), [OnlineProbe(K, kind="ridge")], *data, max_epochs=1).callback_metrics
    assert "a ridge probe needs samples of at least two classes, got 16 of 1" in [str(w.message) for w in said]
    assert found["probe/held_out_acc"].isnan()
    assert found["probe/acc"].isnan()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "ridge", "optimizer": torch.optim.SGD},
            r"OnlineProbe\(kind='ridge'\) is fitted in closed form, so that an optimizer has no effect; leave it "
            "out, or take kind='linear'",
        ),
        ({"kind": "logistic"}, "expected kind 'linear' or 'ridge', got 'logistic'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnlineProbe(K, **arguments)


@pytest.mark.parametrize(("knn", "off"), [(0, "kind='linear'"), (3, "kind='linear', knn=0")])
def test_several_training_loaders_need_a_choice(knn: int, off: str, tmp_path: Path) -> None:
    class Several(Stranger):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch["a"], batch_idx)

    loaders = {"a": _loader(), "b": _loader()}
    message = rf"OnlineProbe cannot choose among 2 training loaders; .*, or OnlineProbe\({off}\)"
    with pytest.raises(ValueError, match=message):
        _fit(tmp_path, Several(), [OnlineProbe(K, kind="ridge", knn=knn)], loaders, _loader(2))


def test_there_is_nothing_to_store_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    def run(epochs: int, kind: Any = "ridge", **options: Any) -> Trainer:
        seed_everything(0, verbose=False)
        return _fit(tmp_path, Stranger(), [OnlineProbe(K, kind=kind)], max_epochs=epochs, **options)

    whole = run(4).callback_metrics
    for kind in ("ridge", "linear"):  # a run that was begun with the other kind may go on with this one
        half = run(2, kind)
        half.save_checkpoint(tmp_path / "half.ckpt")
        stored = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]
        assert any("OnlineProbe" in key for key in stored) == (kind == "linear")
        assert run(4, ckpt_path=tmp_path / "half.ckpt").callback_metrics == whole
    assert set(run(4, "linear", ckpt_path=None).callback_metrics) == {"probe/acc", "probe/loss"}


@pytest.mark.parametrize(("every", "epochs"), [(1, [1, 3]), (3, [3])])
def test_passes_wait_for_a_validation_where_that_has_averaged_weights(
    every: int, epochs: list[int], tmp_path: Path
) -> None:
    seen: dict[str, list[torch.Tensor]] = {"bank": [], "val": []}

    class Probe(OnlineProbe):
        def _make_bank(self, trainer: Any, module: Any) -> None:
            seen["bank"].append(module.classify.weight.clone())
            super()._make_bank(trainer, module)

    class Seen(Callback):
        def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                seen["val"].append(module.classify.weight.clone())

    model, options = Stranger(), {"max_epochs": 4, "check_val_every_n_epoch": 2, "num_sanity_val_steps": 0}
    probe = Probe(K, kind="ridge", every_n_epochs=every)
    _fit(tmp_path, model, [probe, EMAWeightAveraging(decay=0.9), Seen()], **options)
    assert sorted({epoch for epoch, _ in model.logged}) == epochs
    assert len(seen["bank"]) == len(epochs)
    assert all(torch.equal(a, b) for a, b in zip(seen["bank"], seen["val"][-len(epochs) :], strict=True))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_features_of_low_precision_are_cast(precision: Any, tmp_path: Path) -> None:
    model = Stranger(lr=0.0)
    found = _fit(tmp_path, model, [OnlineProbe(K, kind="ridge")], precision=precision, max_epochs=1).callback_metrics
    left_out, predict = _by_brute_force(*_features(model.float(), _data()))
    u, v = _features(model, _data(2))
    assert found["probe/held_out_acc"].item() == pytest.approx(left_out, abs=0.07)
    assert found["probe/acc"].item() == pytest.approx((predict(u) == v).mean(), abs=0.07)


class Stream(IterableDataset):
    """The validation images, all of them with the first process."""

    def __iter__(self) -> Any:
        first = not dist.is_initialized() or dist.get_rank() == 0
        return iter(_data(2) if first else ())


def test_two_processes_fit_one_head(tmp_path: Path) -> None:
    values = []
    for processes, val in ((1, _data(2)), (2, _data(2)), (2, Stream())):
        torch.manual_seed(0)
        spread = {"strategy": "ddp_fork", "devices": 2} if processes == 2 else {"devices": 1}
        probe = OnlineProbe(K, kind="ridge", knn=5, downstream=Second())
        trainer = _fit(
            tmp_path,
            Stranger(lr=0.0),
            [probe],
            _loader(),
            DataLoader(val, batch_size=16),
            val_check_interval=1,
            **spread,
        )
        values.append({name: value.item() for name, value in trainer.callback_metrics.items()})
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert values[0] == pytest.approx(values[2], rel=1e-6)
    assert len(values[0]) == 7


class Rows(IterableDataset):
    """Images in batches of their own, divided among the processes unevenly, or all of them with each."""

    def __init__(self, seed: int, divided: bool) -> None:
        self.data, self.divided = _data(seed).tensors, divided

    def __iter__(self) -> Any:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        own = torch.tensor_split(torch.arange(48), [19])[rank] if self.divided and world == 2 else torch.arange(48)
        return iter([[part[rows] for part in self.data] for rows in torch.tensor_split(own, 3)])


class Streams(LightningDataModule):
    """Training and validation images of `Rows`."""

    def __init__(self, divided: bool, seed: int = 1) -> None:
        super().__init__()
        self.divided, self.seed = divided, seed

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Rows(self.seed, self.divided), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Rows(self.seed + 1, True), batch_size=None)


@pytest.mark.parametrize(("divided", "most"), [(True, 10_000), (True, 16), (False, 10_000)])
def test_two_processes_fit_one_head_to_streams(divided: bool, most: int, tmp_path: Path) -> None:
    values = []
    for processes in (1, 2):
        torch.manual_seed(0)
        spread = {"strategy": "ddp_fork", "devices": 2} if processes == 2 else {"devices": 1}
        probe = OnlineProbe(K, kind="ridge", knn=5, downstream=Streams(divided, 3), max_samples=most)
        data = Streams(divided)
        loaders = data.train_dataloader(), data.val_dataloader()
        trainer = _fit(tmp_path, Stranger(lr=0.0), [probe], *loaders, **spread)
        values.append({name: value.item() for name, value in trainer.callback_metrics.items()})
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert len(values[0]) == 5


class Shares(DistributedSampler):
    """Gives each process its share, by an iteration of its own."""

    def __iter__(self) -> Any:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))


class Shared(LightningDataModule):
    """Images that a `Shares` divides."""

    def train_dataloader(self) -> DataLoader:
        return self._loader(3)

    def val_dataloader(self) -> DataLoader:
        return self._loader(4)

    def _loader(self, seed: int) -> DataLoader:
        data, place = _data(seed), (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        return DataLoader(data, batch_size=16, sampler=Shares(data, *place))


def test_two_processes_fit_one_head_to_what_a_sampler_of_its_own_kind_divides(tmp_path: Path) -> None:
    values = []
    for processes in (1, 2):
        torch.manual_seed(0)
        spread = {"strategy": "ddp_fork", "devices": 2} if processes == 2 else {"devices": 1}
        probe = OnlineProbe(K, kind="ridge", knn=5, downstream=Shared())
        loaders = DataLoader(_data(1), 16), DataLoader(_data(2), 16)
        trainer = _fit(tmp_path, Stranger(lr=0.0), [probe], *loaders, **spread)
        values.append({name: value.item() for name, value in trainer.callback_metrics.items()})
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_streams_that_make_their_batches_are_read_no_further_than_asked(tmp_path: Path) -> None:
    rows: list[int] = []

    class Probe(OnlineProbe):
        def _make_bank(self, trainer: Any, module: Any) -> None:
            handle = module.features.register_forward_hook(lambda part, args, out: rows.append(len(out)))
            super()._make_bank(trainer, module)
            handle.remove()

    model, loader = Stranger(lr=0.0), DataLoader(Rows(1, False), batch_size=None)
    found = _fit(tmp_path, model, [Probe(K, kind="ridge", max_samples=30)], loader, max_epochs=1).callback_metrics
    few = TensorDataset(*(part[:30] for part in _data().tensors))
    assert found["probe/held_out_acc"].item() == pytest.approx(_by_brute_force(*_features(model, few))[0])
    assert rows == [16, 16]


class Opaque:
    """A batch of a class of its own, whose size nobody can tell."""

    def __init__(self, *parts: torch.Tensor) -> None:
        self._parts = parts

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._parts[index]


class OpaqueRows(Rows):
    def __iter__(self) -> Any:
        return (Opaque(*parts) for parts in super().__iter__())


def test_batches_of_unknown_size_are_read_no_further_than_asked(tmp_path: Path) -> None:
    found = []
    for rows in (Rows, OpaqueRows):
        torch.manual_seed(0)
        loaders = (DataLoader(rows(seed, False), batch_size=None) for seed in (1, 2))
        how = {"batch_to_labels": lambda batch: batch[1], "forward": lambda module, batch: module(batch[0])}
        probe = OnlineProbe(K, kind="ridge", max_samples=30, **how)
        found.append(_fit(tmp_path, Stranger(lr=0.0), [probe], *loaders).callback_metrics)
    assert found[0] == found[1]
    assert {"probe/held_out_acc", "probe/acc"} <= found[0].keys()


def test_an_offset_of_the_features_costs_no_digits() -> None:
    labels = torch.arange(60) % K
    features = torch.randn(60, 8, dtype=torch.float64) + labels[:, None]
    near, far = (fit_ridge(features + offset, labels, K) for offset in (0, 1e4))
    assert near.held_out_acc == far.held_out_acc
    torch.testing.assert_close(near(features), far(features + 1e4), rtol=0, atol=1e-6)
    assert near(features.float()).dtype == torch.float64


def test_what_is_counted() -> None:
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, torch.nan], [2.0, 1.0]])
    assert count(scores, torch.tensor([0, 1, 1, 0, 5]), 2).tolist() == [2, 5, 2]
    assert count(scores, torch.tensor([0, 1, 1, -1, -1]), 2, ignore_index=-1).tolist() == [2, 3, 0]

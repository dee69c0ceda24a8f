"""What both callbacks understand of a stranger's batches and modules, and that they never make the host wait."""

import copy
import json
import subprocess
import sys
import warnings
from collections import Counter, UserDict
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import reference
from ncfinetune import accumulator, metrics, moment_accumulator
from ncfinetune.callbacks import NeuralCollapseTracker, OnlineProbe, adapters
from ncfinetune.callbacks.observer import LayerObserver
from ncfinetune.pooling import PoolError

K, N, D = 4, 60, 8
LABELS = torch.arange(N) % K
IMAGES = 2 * torch.randn(K, D, generator=torch.Generator().manual_seed(0))[LABELS]
IMAGES = IMAGES + torch.randn(N, D, generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class Net(pl.LightningModule):
    """Classifies vectors, whatever the form of the batch that ``pick`` takes them from; stands still with ``lr=0``."""

    def __init__(self, network: nn.Module | None = None, lr: float = 0.0, pick: Any = None) -> None:
        super().__init__()
        self.net = network or nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, K))
        self.lr = lr
        self.pick = pick or (lambda batch: batch[0])

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(self.pick(batch)), self.labels(batch))

    def labels(self, batch: Any) -> Tensor:
        return batch[1] if self.lr else torch.zeros(len(self.pick(batch)), dtype=torch.long)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(self.pick(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Form(Dataset):
    def __init__(self, form: Any) -> None:
        self.form = form

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        return self.form(IMAGES[index], LABELS[index], index)


def _loader(form: Any = None, batch_size: int = 20) -> DataLoader:
    return DataLoader(TensorDataset(IMAGES, LABELS) if form is None else Form(form), batch_size=batch_size)


def _fit(folder: Path, module: Any, callbacks: list[Any], train: Any = None, val: Any = None, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    given = {"max_epochs": 1, "logger": False, "accelerator": "cpu", "num_sanity_val_steps": 0, **quiet, **options}
    trainer = pl.Trainer(default_root_dir=folder, callbacks=callbacks, **given)
    data = {} if isinstance(train, pl.LightningDataModule) else {"val_dataloaders": _loader() if val is None else val}
    trainer.fit(module, _loader() if train is None else train, **data)
    return trainer


def _nc1(features: Tensor, labels: Tensor = LABELS) -> float:
    return reference.nc1(features.detach().numpy(), labels.numpy())


FORMS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "(x, y)": (lambda x, y, i: (x, y), None, {}),
    "(x, y, name)": (lambda x, y, i: (x, y, f"image {i}"), None, {}),
    "(y, x)": (lambda x, y, i: (y, x), lambda b: b[1], {}),
    "image/label": (lambda x, y, i: {"image": x, "label": y}, lambda b: b["image"], {}),
    "one-hot": (lambda x, y, i: (x, nn.functional.one_hot(y, K).float()), None, {}),
    "(N, 1)": (lambda x, y, i: (x, y[None]), None, {}),
    "int32": (lambda x, y, i: (x, y.int()), None, {}),
    "uint8": (lambda x, y, i: (x, y.to(torch.uint8)), None, {}),
    "(x, (y, site))": (lambda x, y, i: (x, (y, 0 * y)), None, {"batch_to_labels": lambda b: b[1][0]}),
    "(i, x, y)": (lambda x, y, i: (i, x, y), lambda b: b[1], {"batch_to_labels": lambda b: b[2]}),
    "(x, group, y)": (lambda x, y, i: (x, (i * 7 + i // 4) % K, y), None, {"batch_to_labels": lambda b: b[2]}),
    "some unlabelled": (lambda x, y, i: (x, y) if i % 5 else (x + 100, torch.tensor(-1)), None, {"ignore_index": -1}),
    "(N, V, ...)": (lambda x, y, i: (torch.stack([x, x + 0.1]), y), lambda b: b[0].flatten(0, 1), {}),
    "views in a list": (lambda x, y, i: ([x, x + 0.1], y), lambda b: torch.cat(b[0]), {}),
    "five crops": (lambda x, y, i: ([x + 0.1 * c for c in range(5)], y), lambda b: torch.cat(b[0]), {}),
}


# Forms that another one here is a case of.
LIKE_ANOTHER = {"(x, y, name)", "(N, 1)", "int32", "uint8", "(x, (y, site))", "(x, group, y)", "five crops"}


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.slow) if form in LIKE_ANOTHER else form for form in FORMS]
)
def test_forms_of_a_batch_that_both_callbacks_understand(form: str, tmp_path: Path) -> None:
    make, pick, options = FORMS[form]
    module = Net(pick=pick)
    run = {"forward": lambda module, batch: module(module.pick(batch))} if "N, V" in form else {}
    tracker = NeuralCollapseTracker(K, **options, **run)
    probe = OnlineProbe(K, knn=3, optimizer=lambda p: torch.optim.Adam(p, lr=0.1), **options, **run)
    trainer = _fit(tmp_path, module, [tracker, probe], _loader(make), _loader(make), max_epochs=8)
    batches = list(_loader(make))
    features = torch.cat([module.net[:2](module.pick(batch)) for batch in batches])
    views = len(features) // N
    labels = LABELS.repeat_interleave(views)
    if views > 1 and "N, V" not in form:
        labels = torch.cat([part.repeat(views) for part in LABELS.split(20)])
    if options.get("ignore_index"):
        kept = torch.arange(N) % 5 > 0
        features, labels = features[kept], labels[kept]
    for split in ("train", "val"):
        assert tracker.values[f"nc1/{split}/penultimate"] == pytest.approx(_nc1(features, labels), rel=1e-5)
    assert trainer.callback_metrics["probe/acc"] > 0.8
    assert trainer.callback_metrics["probe/knn"] > 0.9


MIXED = {
    "(i, x, y)": lambda x, y, i: (i, x, y),
    "(x, id, y)": lambda x, y, i: (x, i % K, y),
    "(x, y, i)": lambda x, y, i: (x, y, i),
    "(x, one-hot, i)": lambda x, y, i: (x, nn.functional.one_hot(y, K), i),
}


@pytest.mark.parametrize("form", MIXED)
@pytest.mark.parametrize("kind", [NeuralCollapseTracker, OnlineProbe])
def test_a_batch_with_two_vectors_of_whole_numbers_needs_the_option(kind: Any, form: str, tmp_path: Path) -> None:
    module = Net(pick=lambda batch: next(part for part in batch if part.shape[1:] == (D,)))
    message = rf"{kind.__name__} found 2 tensors in a batch, each of .* give it {kind.__name__}\(batch_to_labels=lambda"
    with pytest.raises(ValueError, match=message):
        _fit(tmp_path, module, [kind(K)], _loader(MIXED[form]))


@pytest.mark.parametrize("kind", [NeuralCollapseTracker, OnlineProbe])
def test_errors_name_who_asks(kind: Any, tmp_path: Path) -> None:
    several = CombinedLoader({"a": _loader(), "b": _loader()}, "max_size_cycle")
    module = Net(pick=lambda batch: batch["a"][0] if isinstance(batch, dict) else batch[0])
    expected = "found no integer labels" if kind is OnlineProbe else "cannot choose among 2 training loaders"
    with pytest.raises(ValueError, match=f"{kind.__name__} {expected}"):
        _fit(tmp_path, module, [kind(K)], several)
    taken = kind(K, batch_to_labels=lambda b: b["a"][1] if isinstance(b, dict) else b[1])
    if kind is NeuralCollapseTracker:
        taken = kind(K, train_every_n_epochs=0)
    _fit(tmp_path, module, [taken], several)
    with pytest.raises(ValueError, match=rf"{kind.__name__} .*rows of features for 20 labels, and no 2 views"):
        _fit(tmp_path, Net(pick=lambda b: torch.cat([b[0], -b[0]])), [kind(K, forward=lambda m, b: m(m.pick(b)))])


def test_soft_labels_teach_the_probe_and_are_refused_by_the_tracker(tmp_path: Path) -> None:
    soft = _loader(lambda x, y, i: (x, 0.9 * nn.functional.one_hot(y, K) + 0.1 / K))
    probe = OnlineProbe(K, optimizer=lambda p: torch.optim.Adam(p, lr=0.1))
    assert _fit(tmp_path, Net(), [probe], soft, max_epochs=5).callback_metrics["probe/acc"] > 0.8
    with pytest.raises(ValueError, match=r"NeuralCollapseTracker needs one class per sample, .* several classes per"):
        _fit(tmp_path, Net(), [NeuralCollapseTracker(K)], soft)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


class Looks(TorchDispatchMode):
    """Counts what makes a host wait for an accelerator, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put_", "index_put") and any(
            part is not None and part.dtype in (torch.bool, torch.uint8) for part in args[1]
        )
        waits = name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "_to_copy")
        if masked or (waits and not (name == "_to_copy" and (kwargs or {}).get("device") is None)):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (NeuralCollapseTracker, {"metrics": ["nc1", "nc3", "nc4"]}),
        (OnlineProbe, {"knn": 3, "optimizer": _sgd}),
        (OnlineProbe, {"kind": "ridge"}),
    ],
)
@pytest.mark.parametrize("form", ["(x, y)", "some unlabelled", "views in a list"])
def test_no_hook_of_a_batch_makes_the_host_wait(
    kind: Any, more: dict[str, Any], form: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """A CPU's values may be looked at, so it passes for an accelerator; its copies to itself count too."""
    for module in (accumulator, metrics, moment_accumulator, adapters, import_module("ncfinetune.callbacks.classify")):
        monkeypatch.setattr(module, "may_look", lambda tensor: False)
    looks: list[Counter[str]] = []

    class Watched(kind):
        """With its hooks of batches watched from the second batch on."""

    def watched(name: str) -> Any:
        def hook(self: Any, trainer: Any, module: Any, *args: Any) -> None:
            batch_idx = args[-1] if name.startswith("on_train") or name.endswith("start") else args[2]
            with Looks() as look:
                getattr(kind, name)(self, trainer, module, *args)
            if batch_idx:
                looks.append(look.found)

        return hook

    for name in ("on_validation_batch_start", "on_validation_batch_end", "on_train_batch_start", "on_train_batch_end"):
        setattr(Watched, name, watched(name))
    make, pick, options = FORMS[form]
    _fit(tmp_path, Net(pick=pick), [Watched(K, **options, **more)], _loader(make, 6), _loader(make, 6), max_epochs=2)
    assert len(looks) >= 2 * 2 * 9
    assert sum(looks, Counter()) == {}


def test_no_hook_of_a_layer_makes_the_host_wait_after_the_first_batch() -> None:
    """Which axis has the channels and which tokens count is read from the first batch alone."""
    network = nn.Sequential(nn.TransformerEncoderLayer(D, 2, D, batch_first=True), nn.Linear(D, D), nn.Linear(D, K))
    observer = LayerObserver(network, ["0", "1"], adapters.BatchReader("NeuralCollapseTracker", K))
    runs: list[int] = []
    network[0].register_forward_pre_hook(lambda m, args: runs.append(len(args[0])))
    looks = []
    for size in (20, 20, 10):
        observer.listen(None)
        with torch.no_grad(), Looks() as look:
            network(torch.randn(size, 3, D))
        looks.append(look.found.total())
    assert runs == [2, 20, 20, 10]
    assert looks[1:] == [0, 0]


class Elsewhere(Callback):
    """Runs the network on other images around the steps of evaluation and training."""

    def _run(self, trainer: Any, module: Any, *args: Any) -> None:
        with torch.no_grad():
            module(torch.randn(20, D))

    on_validation_batch_start = on_validation_batch_end = on_train_batch_start = on_train_batch_end = _run


@pytest.mark.parametrize("first", [True, False])
def test_another_callback_that_runs_the_network_changes_nothing(first: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Net()
    found = []
    for other in ([], [Elsewhere()]):
        own = [NeuralCollapseTracker(K), OnlineProbe(K, knn=3)]
        trainer = _fit(tmp_path, copy.deepcopy(module), [*other, *own] if first else [*own, *other], max_epochs=2)
        found.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    assert found[0] == found[1]


AVERAGING: dict[str, Callable[[], Callback]] = {
    "average": WeightAveraging,
    "EMA": lambda: EMAWeightAveraging(decay=0.9),
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=1),
}


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", AVERAGING)
def test_averaged_weights_are_measured_whole(kind: str, first: bool, every: int, tmp_path: Path) -> None:
    """The pass over the training set, the bank of kNN and the validation see the same weights, in either order."""
    seen: dict[str, list[Tensor]] = {"pass": [], "val": [], "bank": []}

    class Tracker(NeuralCollapseTracker):
        def _measure_training_set(self, trainer: Any, pl_module: Any) -> dict[str, float]:
            seen["pass"].append(pl_module.net[0].weight.clone())
            return super()._measure_training_set(trainer, pl_module)

    class Probe(OnlineProbe):
        def _make_bank(self, trainer: Any, module: Any) -> None:
            seen["bank"].append(module.net[0].weight.clone())
            super()._make_bank(trainer, module)

    class Module(Net):
        def on_validation_batch_end(self, *args: Any) -> None:
            seen["val"].append(self.net[0].weight.clone())

    own, averaging = [Tracker(K), Probe(K, knn=3)], AVERAGING[kind]()
    module = Module(lr=0.5)
    options = {"max_epochs": 4, "check_val_every_n_epoch": every}
    callbacks = [*own, averaging] if first else [averaging, *own]
    _fit(tmp_path, module, callbacks, val=_loader(batch_size=N), **options)
    validated = 4 // every
    passes = 4 if kind == "SWA" else validated  # it swaps no weights for validation, so every epoch has a pass
    assert [len(weights) for weights in seen.values()] == [1 + passes, validated, validated]
    seen["pass"] = seen["pass"][passes // validated :: passes // validated]
    for name in ("pass", "bank"):
        weights = seen[name][-validated:]
        assert all(torch.equal(a, b) for a, b in zip(weights, seen["val"], strict=True))
    assert "nc4/val/penultimate" in own[0].values


@pytest.mark.parametrize("options", [{}, {"check_val_every_n_epoch": None}])
def test_averages_are_measured_where_no_epoch_ends_in_a_validation(options: Any, tmp_path: Path) -> None:
    seen: dict[int, Tensor] = {}

    class Module(Net):
        def on_validation_batch_start(self, *args: Any) -> None:
            seen[self.trainer.global_step] = self.net[0].weight.clone()

    class Tracker(NeuralCollapseTracker):
        def _measure_training_set(self, trainer: Any, pl_module: Any) -> dict[str, float]:
            measured[trainer.global_step] = pl_module.net[0].weight.clone()
            return super()._measure_training_set(trainer, pl_module)

    measured: dict[int, Tensor] = {}
    callbacks = [tracker := Tracker(K), WeightAveraging(avg_fn=lambda average, new, number: 0.9 * average + 0.1 * new)]
    _fit(tmp_path, Module(lr=0.5), callbacks, max_epochs=4, val_check_interval=2, **options)  # of 3 batches
    # Epochs end at steps 3, 6, 9 and 12; the first three wait for a validation, two of which end an epoch or begin one.
    steps = {"per epoch": [5, 8, 11], "over epochs": [4, 6, 10, 12]}["over epochs" if options else "per epoch"]
    assert list(measured) == [0, *steps]
    assert all(torch.equal(measured[step], seen[step]) for step in steps)
    assert "nc4/val/penultimate" in tracker.values


class SwappingOptimizer(torch.optim.SGD):
    """Trains other weights than it means, and swaps them in `eval` and `train`, as schedule-free optimisers do."""

    means = True

    def _move(self, by: float) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(by)

    def eval(self) -> None:
        self._move(2.0)

    def train(self) -> None:
        self._move(0.5)


@pytest.mark.parametrize("every", [1, 2])
def test_optimisers_that_swap_weights(every: int, tmp_path: Path) -> None:
    class Module(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return SwappingOptimizer(self.parameters(), lr=0.1)

        def on_validation_epoch_start(self) -> None:
            self.optimizers().optimizer.eval()

        def on_validation_epoch_end(self) -> None:
            self.optimizers().optimizer.train()

    tracker = NeuralCollapseTracker(K)
    _fit(tmp_path, Module(lr=0.1), [tracker], max_epochs=4, check_val_every_n_epoch=every)
    assert list(tracker.history["train"]) == [0, *range(every, 5, every)]
    for epochs, layers in tracker.history["val"].items():
        assert layers["penultimate"] == pytest.approx(tracker.history["train"][epochs]["penultimate"], rel=1e-6)


class Growing(pl.LightningDataModule):
    num_classes = K

    def train_dataloader(self) -> DataLoader:
        rows = range(20 * (1 + self.trainer.current_epoch))
        return DataLoader(Subset(TensorDataset(IMAGES, LABELS), rows), batch_size=10, shuffle=True)


class GrowingPlain(Growing):
    train_plain_dataloader = Growing.train_dataloader


@pytest.mark.parametrize("data", [Growing, GrowingPlain])
def test_a_training_set_that_grows_is_asked_for_again(data: Any, tmp_path: Path) -> None:
    counts = []

    class Tracker(NeuralCollapseTracker):
        def _measure_training_set(self, trainer: Any, pl_module: Any) -> dict[str, float]:
            values = super()._measure_training_set(trainer, pl_module)
            counts.append(int(self._train_result.moments["penultimate"].count.sum()))
            return values

    tracker = Tracker()
    _fit(tmp_path, Net(), [tracker], data(), max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert counts == [20, 20, 40, 60]


def _sorted_loader() -> DataLoader:
    order = LABELS.argsort(stable=True)
    return DataLoader(TensorDataset(IMAGES[order], LABELS[order]), batch_size=10, shuffle=False)


@pytest.mark.parametrize("limit", [{"max_train_batches": 2}, {"limit_train_batches": 2}])
def test_limited_passes_see_every_class_of_a_sorted_set(limit: dict[str, Any], tmp_path: Path) -> None:
    own = {name: value for name, value in limit.items() if name.startswith("max")}
    tracker = NeuralCollapseTracker(K, **own)
    trainer = {name: value for name, value in limit.items() if name not in own}
    _fit(tmp_path, Net(), [tracker], _sorted_loader(), **trainer)
    assert tracker._passes_done == 2
    assert tracker.values["nc1/train/penultimate"] == pytest.approx(tracker.values["nc1/val/penultimate"], rel=0.8)


def test_a_validation_cut_short_says_how_many_classes_it_saw(tmp_path: Path) -> None:
    tracker = NeuralCollapseTracker(K)
    with pytest.warns(UserWarning, match="NeuralCollapseTracker saw 2 of 4 classes in a pass over the val set") as said:
        _fit(tmp_path, Net(), [tracker], val=_sorted_loader(), limit_val_batches=2, max_epochs=2)
    assert len([w for w in said if "classes" in str(w.message)]) == 1


def test_probe_logs_a_number_a_validation_loader(tmp_path: Path) -> None:
    other = DataLoader(TensorDataset(IMAGES, LABELS + 2), batch_size=20)  # two classes that the probe doesn't know
    flipped = DataLoader(TensorDataset(IMAGES, (LABELS + 1) % K), batch_size=20)
    probe = OnlineProbe(K, knn=1)
    loaders = [_loader(), flipped, other]
    with pytest.warns(
        UserWarning, match="dataloader_idx_2 is logged as nan: 30 of 60 samples have labels outside 0..3"
    ):
        found = _fit(tmp_path, Net(), [probe], val=loaders, max_epochs=3).callback_metrics
    assert {name for name in found if "acc" in name} == {f"probe/acc/dataloader_idx_{index}" for index in range(3)}
    assert found["probe/knn/dataloader_idx_0"] == 1
    assert found["probe/knn/dataloader_idx_1"] == 0
    assert found["probe/knn/dataloader_idx_2"].isnan()


def test_early_stopping_on_what_is_measured_every_other_epoch(tmp_path: Path) -> None:
    stop = EarlyStopping("nc1/train/penultimate", patience=9, check_on_train_epoch_end=True)
    trainer = _fit(tmp_path, Net(lr=0.01), [NeuralCollapseTracker(K, train_every_n_epochs=3), stop], max_epochs=5)
    assert trainer.current_epoch == 5


class TwoNetworks(nn.Module):
    """A student and its teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(D, 6), nn.ReLU(), nn.Linear(6, K))
        self.teacher = nn.Sequential(nn.Linear(D, 6), nn.ReLU(), nn.Linear(6, K))


class Taught(TwoNetworks):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.student(x)
        self.teacher(x)
        return logits


class Auxiliary(TwoNetworks):
    def forward(self, x: Tensor) -> Any:
        return (self.student(x), self.teacher(x)) if self.training else self.student(x)


class Both(TwoNetworks):
    def forward(self, x: Tensor) -> Any:
        return self.student(x), self.teacher(x)


class Ensemble(TwoNetworks):
    def forward(self, x: Tensor) -> Tensor:
        return (self.student(x) + self.teacher(x)) / 2


@pytest.mark.parametrize("network", [Taught, Auxiliary])
def test_the_classifier_is_the_one_whose_output_the_module_returns(network: Any, tmp_path: Path) -> None:
    class Module(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self(batch[0])
            return 0 * (logits[0] if isinstance(logits, tuple) else logits).sum()

    module = Module(network())
    tracker = NeuralCollapseTracker(K)
    _fit(tmp_path, module, [tracker])
    expected = _nc1(module.net.student[:2](IMAGES))
    assert tracker.values["nc1/val/penultimate"] == pytest.approx(expected, rel=1e-5)
    assert tracker.values["nc1/train/penultimate"] == pytest.approx(expected, rel=1e-5)
    assert "nc3/val/penultimate" in tracker.values


class Inner(nn.Module):
    """A linear layer of as many outputs as there are classes on the positions of maps, as for attention's biases."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.body, self.bias, self.head, self.dense = nn.Linear(D, 6), nn.Linear(6, K), nn.Linear(6, K), dense

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        inner, logits = self.bias(torch.stack([x, x], 1)), self.head(x)
        return inner if self.dense else logits


def test_a_linear_layer_within_the_network_is_not_taken_for_the_classifier(tmp_path: Path) -> None:
    module = Net(Inner(dense=False))
    tracker, probe = NeuralCollapseTracker(K), OnlineProbe(K)
    _fit(tmp_path, module, [tracker, probe])
    assert tracker.values["nc1/val/penultimate"] == pytest.approx(_nc1(module.net.body(IMAGES)), rel=1e-4)


def test_a_classifier_among_several_whose_input_is_no_vector_is_refused(tmp_path: Path) -> None:
    class Module(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 0 * self(batch[0]).sum()

    message = r"expected features \(N, d\) as the input of the classifier 'net.bias', got \(\d+, 2, 6\)"
    with pytest.raises(PoolError, match=message):
        _fit(tmp_path, Module(Inner(dense=True)), [NeuralCollapseTracker(K)])


@pytest.mark.parametrize("network", [Both, Ensemble])
@pytest.mark.parametrize("kind", [NeuralCollapseTracker, OnlineProbe])
def test_two_classifiers_that_both_fit_are_named(kind: Any, network: Any, tmp_path: Path) -> None:
    class Module(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self(batch[0])
            return 0 * self.net.student(batch[0]).sum()

    module = Module(network())
    message = (
        rf"cannot tell which of 'net.student.2' and 'net.teacher.2' is the classifier: .*{kind.__name__}\(classifier="
    )
    with pytest.raises(ValueError, match=message):
        _fit(tmp_path, module, [kind(K)])
    _fit(tmp_path, module, [kind(K, classifier="student.2")])


@pytest.mark.parametrize("saved", [False, True], ids=["LoRA on the head", "modules_to_save"])
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_heads_with_adapters(saved: bool, tmp_path: Path) -> None:
    import peft

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(D, 6), nn.Linear(6, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).relu())

    targets = ["body"] if saved else ["body", "head"]
    config = peft.LoraConfig(target_modules=targets, r=K, modules_to_save=["head"] if saved else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = peft.get_peft_model(Named(), config)
    inner = network.base_model.model
    for name, parameter in inner.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    tracker = NeuralCollapseTracker(K)
    _fit(tmp_path, Net(network), [tracker])
    features = inner.body(IMAGES).relu()
    assert tracker.values["nc1/val/penultimate"] == pytest.approx(_nc1(features), rel=1e-5)
    head = inner.head.modules_to_save["default"] if saved else inner.head
    weight = head(torch.eye(6)) - head(torch.zeros(1, 6))
    expected = reference.self_duality(features.detach().numpy(), LABELS.numpy(), weight.T.detach().numpy())
    assert tracker.values["nc3/val/penultimate"] == pytest.approx(expected, rel=1e-4)


def test_a_parametrised_head_has_its_weight(tmp_path: Path) -> None:
    head = parametrizations.weight_norm(nn.Linear(D, K))
    module = Net(nn.Sequential(nn.Linear(D, D), nn.ReLU(), head))
    tracker = NeuralCollapseTracker(K)
    _fit(tmp_path, module, [tracker])
    features = module.net[:2](IMAGES).detach().numpy()
    expected = reference.self_duality(features, LABELS.numpy(), head.weight.detach().numpy())
    assert tracker.values["nc3/val/penultimate"] == pytest.approx(expected, rel=1e-5)


class Quantised(nn.Linear):
    """A linear layer whose weight is stored as whole numbers and a scale, behind a forward of its own."""

    def __init__(self, readable: bool) -> None:
        super().__init__(D, K)
        self.scale = float(self.weight.detach().abs().max()) / 127
        self.stored = (self.weight.detach() / self.scale).round()
        self.readable = readable
        self.weight.requires_grad_(False).zero_()

    def forward(self, x: Tensor) -> Tensor:
        if not self.readable and len(x) in (1, D):
            raise NotImplementedError("batches of this size are not compiled")
        return x @ (self.stored.T * self.scale) + self.bias


def test_a_quantised_head_is_read_by_what_it_does_or_is_nan_with_a_line(tmp_path: Path) -> None:
    head = Quantised(readable=True)
    module = Net(nn.Sequential(nn.Linear(D, D), nn.ReLU(), head))
    tracker = NeuralCollapseTracker(K)
    _fit(tmp_path, module, [tracker])
    features = module.net[:2](IMAGES).detach().numpy()
    expected = reference.self_duality(features, LABELS.numpy(), (head.stored * head.scale).numpy())
    assert tracker.values["nc3/val/penultimate"] == pytest.approx(expected, rel=1e-4)
    module.net[2] = Quantised(readable=False)
    with pytest.warns(UserWarning, match="nc3 is logged as nan: the weight of the classifier, which is quantised or"):
        _fit(tmp_path, module, [tracker])
    assert torch.tensor(tracker.values["nc3/val/penultimate"]).isnan()


@pytest.mark.parametrize("pool", [None, lambda output: output], ids=["found", "given"])
def test_features_are_copies_of_what_a_network_writes_over(pool: Any) -> None:
    """As an in-place ReLU does, and a network compiled with CUDA graphs."""
    network = nn.Sequential(nn.Linear(D, D), nn.ReLU(inplace=True), nn.Linear(D, K))
    observer = LayerObserver(network, ["0"], adapters.BatchReader("NeuralCollapseTracker", K), pool=pool)
    observer.listen((IMAGES, LABELS))
    with torch.no_grad():
        network(IMAGES)
        features, _ = observer.take()
        assert torch.equal(features["0"], network[0](IMAGES))
    assert features["0"].min() < 0


def test_log_is_given_floats_or_tensors_of_the_modules_device(tmp_path: Path, monkeypatch: Any) -> None:
    given = []

    class Module(Net):
        def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            given.append((name, value))
            super().log(name, value, *args, **kwargs)

    _fit(tmp_path, Module(), [NeuralCollapseTracker(K), OnlineProbe(K, knn=3)])
    assert {type(value) for name, value in given if name != "probe/loss"} == {float}
    assert len(given) > 10


@pytest.mark.slow
def test_a_mistake_of_one_process_ends_or_warns_all(tmp_path: Path) -> None:
    script = Path(__file__).with_name("observed_in_two_processes.py")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=600, cwd=script.parent.parent
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for kind in ("good", "nan"):
        assert repr(found[kind][0]) == repr(found[kind][1])  # nan is not itself
    assert {"nc1/train/penultimate", "nc4/val/penultimate", "probe/acc", "probe/knn"} <= set(found["good"][0])
    assert found["good"][0]["nc1/train/penultimate"] > 0
    assert found["nan"][0]["nc1/train/penultimate"] != found["nan"][0]["nc1/train/penultimate"]
    assert found["nan"][0]["nc1/val/penultimate"] > 0
    assert found["tracker"][0] == "another process found an error in the train set: see its message"
    assert "expected labels in 0..2 (num_classes=3), got [3]" in found["tracker"][1]
    assert all("expected labels in 0..2 (num_classes=3), got [3]" in end for end in found["probe"])


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@pytest.mark.parametrize("make", [lambda x, y: [x, y], lambda x, y: (x, y), Pair, lambda x, y: UserDict(x=x, y=y)])
def test_a_batch_is_kept_as_it_was(make: Any) -> None:
    """Of its own kind, without a copy of its images."""
    images, labels = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    batch = make(images, labels)
    same = adapters.kept(batch)
    labels.zero_()
    if not isinstance(batch, tuple):
        batch.pop("y" if isinstance(batch, UserDict) else 1)
    assert type(same) is type(batch)
    x, y = same.values() if isinstance(same, UserDict) else same
    assert x is images
    assert y.tolist() == [0, 1]

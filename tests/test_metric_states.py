"""States of other metrics and labels of other types: the right number, or one line."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection

from ncfinetune import Supervised
from ncfinetune.collapse import FAMILY, cdnv, class_moments, disagreements, nc1
from ncfinetune.contrastive import SupCon
from ncfinetune.folds import FoldMoments
from ncfinetune.learner import Learner
from ncfinetune.metrics import CDNV, MEMBERS, NC1, NC4, CollapseCollection, neural_collapse
from ncfinetune.probes import ridge

FEATURES = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(48) % 4
ALIKE = {name: kind for name, kind in MEMBERS.items() if name != "nc3"}
TYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64]


def _filled(kind: Any, classes: int, width: int = 6) -> Any:
    metric = kind(classes)
    metric.update(FEATURES[:, :width], torch.arange(48) % classes)
    metric.persistent(True)
    return metric


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize(("classes", "width"), [(6, 6), (3, 6), (4, 5)])
def test_a_state_of_other_classes_or_features_is_refused_and_changes_nothing(
    name: str, classes: int, width: int
) -> None:
    other, metric = _filled(ALIKE[name], classes, width), _filled(ALIKE[name], 4)
    expected = metric.compute()
    with pytest.raises(ValueError, match=r"^expected .*, got "):
        metric.merge_state(other)
    assert torch.equal(metric.compute(), expected)
    if classes != 4:
        message = f"expected the state of a {type(metric).__name__} of 4 classes, whose .* is .*, got .*; use the saved"
        with pytest.raises(ValueError, match=message):
            metric.merge_state(other.metric_state)
        with pytest.raises(RuntimeError, match=message):
            metric.load_state_dict(other.state_dict())
        assert torch.equal(metric.compute(), expected)


@pytest.mark.parametrize("name", ALIKE)
def test_a_state_of_its_own_kind_is_taken(name: str) -> None:
    filled, empty = _filled(ALIKE[name], 4), ALIKE[name](4)
    empty.persistent(True)
    empty.load_state_dict(filled.state_dict())
    empty.update(FEATURES, LABELS)
    twice = _filled(ALIKE[name], 4)
    twice.update(FEATURES, LABELS)
    torch.testing.assert_close(empty.compute(), twice.compute())


@pytest.mark.parametrize("name", ALIKE)
def test_a_saved_state_has_no_memory_beyond_its_numbers(name: str) -> None:
    """Neither unused rows of the buffer nor the gaps between rows."""
    for key, value in _filled(ALIKE[name], 4).state_dict().items():
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), key


@pytest.mark.parametrize("asked", [1, 3, 100], ids=["each batch", "each third batch", "at the end"])
@pytest.mark.parametrize("nested", [False, True])
def test_metrics_share_their_states_in_a_collection_of_torchmetrics(asked: int, nested: bool) -> None:
    """More samples than the buffer has rows, since what a flush adds must not be added by each metric."""
    names = [name for name in ALIKE if name in FAMILY]
    features = torch.randn(3000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(3000) % 4
    metrics = {name: ALIKE[name](4) for name in names}
    collection = MetricCollection({"all": neural_collapse(4, names)} if nested else metrics)
    for number, (x, y) in enumerate(zip(features.split(64), labels.split(64), strict=True), 1):
        collection.update(x, y)
        if number % asked == 0:
            collection.compute()
    found = {name.removeprefix("all_"): float(value) for name, value in collection.compute().items()}
    moments = class_moments(features, labels, 4)
    assert found == {name: pytest.approx(float(FAMILY[name](moments)), rel=1e-12) for name in names}


def test_a_collection_tells_metrics_apart_that_leave_out_other_samples() -> None:
    """The first batch has no sample to leave out, so that both metrics have the same sums after it."""
    collection = MetricCollection({"all": NC1(4), "but the first": NC1(4, ignore_index=0)})
    later = LABELS > 0
    for rows in (later, later | ~later):
        collection.update(FEATURES[rows], LABELS[rows])
    features, labels = torch.cat([FEATURES[later], FEATURES]), torch.cat([LABELS[later], LABELS])
    for name, rows in (("all", labels >= 0), ("but the first", labels > 0)):
        expected = nc1(class_moments(features[rows], labels[rows], 4))
        assert float(collection.compute()[name]) == pytest.approx(float(expected))


def test_metrics_of_other_arguments_share_no_state() -> None:
    """Also in our own collection, and NC4 of other class means, whose first batch both decide alike."""
    first, other = NC1(4), NC1(4, ignore_index=0)
    for metric in (first, other):
        metric.update(FEATURES, LABELS)
    with pytest.raises(ValueError, match="expected the state of a NC1 with ignored .*, got one with 0; merge metrics"):
        first.merge_state(other)
    own = CollapseCollection({"all": NC1(4), "less": CDNV(4, ignore_index=0)})
    own.update(FEATURES, LABELS)
    kept = LABELS > 0
    expected = cdnv(class_moments(FEATURES[kept], LABELS[kept], 4))
    assert float(own.compute()["less"]) == pytest.approx(float(expected))
    moments = [class_moments(FEATURES + place * FEATURES.flip(0), LABELS, 4) for place in (0.0, 2.0)]
    weight, bias = moments[0].centred.float(), -moments[0].centred.square().sum(1).float() / 2
    alike = [disagreements(FEATURES, of, weight, bias) for of in moments]
    first_rows = alike[0] == alike[1]
    assert 0 < first_rows.sum() < len(FEATURES)
    collection = MetricCollection({"a": NC4(moments[0]), "b": NC4(moments[1])})
    for rows in (first_rows, ~first_rows):
        collection.update(FEATURES[rows], LABELS[rows], weight, bias)
    for name, decided in zip("ab", alike, strict=True):
        assert float(collection.compute()[name]) == pytest.approx(float(decided.double().mean()))


def test_metrics_plot_themselves() -> None:
    metric = _filled(NC1, 4)
    figure, axes = metric.plot()
    assert figure.axes == [axes]
    assert axes.lines[0].get_ydata().tolist() == [float(metric.compute())]
    collection = neural_collapse(4, ["nc1", "cdnv"])
    collection.update(FEATURES, LABELS)
    assert len(collection.plot()) == 2


def test_a_collection_refuses_a_state_of_other_classes() -> None:
    one, other = neural_collapse(4), neural_collapse(6)
    for collection in (one, other):
        for metric in collection.values():
            metric.persistent(True)
    with pytest.raises(RuntimeError, match="expected the state of a NC1 of 4 classes"):
        one.load_state_dict(other.state_dict())


def test_a_state_without_a_part_is_refused() -> None:
    metric = _filled(NC1, 4)
    with pytest.raises(RuntimeError, match="expected the state of a NC1, got one without squares"):
        metric.load_state_dict({name: value for name, value in metric.state_dict().items() if name != "squares"})


def _update(metric: Any, labels: Tensor, *more: Tensor) -> Tensor:
    metric.update(FEATURES, labels, *more)
    return metric.compute()


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: (lambda labels, kind=kind: _update(kind(4), labels)) for name, kind in ALIKE.items()},
    "nc1 ignoring": lambda labels: _update(NC1(4, ignore_index=3), labels),
    "nc4": lambda labels: _update(NC4(class_moments(FEATURES, LABELS, 4)), labels, FEATURES[:4]),
    "class_moments": lambda labels: nc1(class_moments(FEATURES, labels, 4)),
    "folds": lambda labels: _folds(labels),
    "ridge": lambda labels: ridge(FEATURES, labels, 4).weight,
}


def _folds(labels: Tensor) -> Tensor:
    folds = FoldMoments(4)
    folds.update(FEATURES, labels)
    return folds.nc1()


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("dtype", TYPES)
def test_labels_of_any_whole_number_type_give_the_same(name: str, dtype: torch.dtype) -> None:
    assert torch.equal(NUMBERS[name](LABELS.to(dtype)), NUMBERS[name](LABELS))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint64])
def test_labels_outside_are_named_in_any_type(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"expected labels in 0..2 \(num_classes=3\), got \[3\]"):
        NC1(3).update(FEATURES, LABELS.to(dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.uint16])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.filterwarnings("ignore:.*num_workers")
def test_learners_take_labels_of_any_whole_number_type(dtype: torch.dtype, views: int) -> None:
    network = {"name": "test_vit", "img_size": 8, "patch_size": 4, "in_chans": 1}
    model: Learner = Supervised(4, network) if views == 1 else SupCon(network)
    model.validation_step = None
    images = torch.randn(8, 1, 8, 8) if views == 1 else torch.randn(8, 2, 1, 8, 8)
    trainer = Trainer(fast_dev_run=True, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(model, DataLoader(TensorDataset(images, LABELS[:8].to(dtype)), batch_size=8))
    assert torch.isfinite(trainer.callback_metrics["train/loss"])

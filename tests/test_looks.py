"""On an accelerator an update only launches: nothing that makes the host wait for a value."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ncfinetune import accumulator, metrics, moment_accumulator
from ncfinetune.callbacks.layer_metrics import LayerMetrics
from ncfinetune.collapse import class_moments
from ncfinetune.metrics import NC1, NC3, NC4, NumericalRank
from ncfinetune.moment_accumulator import MomentAccumulator

K, D = 5, 8
WAITS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "item", "is_nonzero", "equal")


class Looks(TorchDispatchMode):
    """Counts the operations by which the host would read a value, or a shape that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masks or name.lstrip("_").startswith(tuple(wait.lstrip("_") for wait in WAITS)):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (accumulator, metrics, moment_accumulator):
        monkeypatch.setattr(module, "may_look", lambda tensor: False)
    monkeypatch.setattr(accumulator, "ROWS", (16, 16))


def _batch(rows: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, D), torch.randint(0, K, (rows,))


def _looks(update: Any) -> Counter[str]:
    update(*_batch())
    with Looks() as looks:
        for _ in range(5):  # the buffer is full in between
            update(*_batch())
    return looks.seen


@pytest.mark.parametrize("ignore_index", [None, -1])
@pytest.mark.parametrize("scatter", [True, False])
def test_accumulator(scatter: bool, ignore_index: int | None) -> None:
    assert _looks(MomentAccumulator(K, scatter, ignore_index).update) == {}


@pytest.mark.parametrize("make", [NC1, NC3])
def test_metrics_of_moments(make: type[NC1] | type[NC3]) -> None:
    assert _looks(make(K).update) == {}


def test_nc4() -> None:
    metric, weight = NC4(class_moments(*_batch(40), K)), torch.randn(K, D)
    assert _looks(lambda features, labels: metric.update(features, labels, weight, weight[:, 0])) == {}


def test_numerical_rank_looks_once_a_full_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulator, "ROWS", (256, 2048))
    assert _looks(NumericalRank(K).update) == {}


def test_the_count_sees_what_waits() -> None:
    x = torch.randn(4)
    with Looks() as looks:
        x.sum().item()
        x[x > 0]
        x.nonzero()
    assert set(looks.seen) >= {"_local_scalar_dense", "nonzero"}
    assert sum(looks.seen.values()) >= 3


@pytest.mark.parametrize("make", [NC1, NumericalRank])
def test_bad_samples_are_reported_when_a_number_is_asked_for(make: type[Any]) -> None:
    features, labels = _batch(60)
    metric = make(K)
    metric.update(features, labels.index_fill(0, torch.tensor([3, 4]), K))
    with pytest.raises(ValueError, match=rf"{make.__name__}: expected labels in 0..4 .*, got 2 of 60 samples"):
        metric.compute()
    metric.reset()
    metric.update(features.index_fill(0, torch.tensor([7]), torch.nan), labels)
    with pytest.raises(ValueError, match=rf"{make.__name__}: expected finite features, got 1 of 60 samples"):
        metric.compute()


def test_nc4_reports_bad_samples() -> None:
    features, labels = _batch(60)
    metric, weight = NC4(class_moments(features, labels, K)), torch.randn(K, D)
    metric.update(features.index_fill(0, torch.tensor([7]), torch.nan), labels, weight)
    with pytest.raises(ValueError, match="NC4: expected finite features, got 1 of 60 samples"):
        metric.compute()


def test_ignored_samples_do_not_count() -> None:
    features, labels = _batch(60)
    kept, metric = NC1(K), NC1(K, ignore_index=-1)
    kept.update(features[5:], labels[5:])
    metric.update(features.index_fill(0, torch.tensor([0]), torch.nan), labels.index_fill(0, torch.arange(5), -1))
    assert metric.compute().item() == pytest.approx(kept.compute().item(), rel=1e-12)


@pytest.mark.parametrize("ignore_index", [None, -1])
def test_numerical_rank_of_a_layer_is_updated_in_place(ignore_index: int | None) -> None:
    measured = LayerMetrics(["layer"], K, ["numerical_rank"], ignore_index)
    features, labels = _batch()
    looks = _looks(lambda rows, own: measured.update({"layer": rows}, own))
    state = measured._ranks["layer"]._accumulator.rows.data_ptr()
    measured.update({"layer": features[:1]}, labels[:1])
    assert state == measured._ranks["layer"]._accumulator.rows.data_ptr()
    assert not {name for name in looks if name.startswith("index")}  # rows are not chosen by a mask


def test_numerical_rank_leaves_ignored_samples_out() -> None:
    rank, expected = NumericalRank(K, ignore_index=-1), NumericalRank(K)
    features, labels = _batch(60)
    ignored = torch.arange(60) % 4 == 0
    rank.update(features, labels.where(~ignored, -1))
    expected.update(features[~ignored], labels[~ignored])
    assert rank.compute().item() == pytest.approx(expected.compute().item(), rel=1e-9)

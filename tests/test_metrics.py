"""One judge for the whole family: every member is held to everything that torchmetrics promises, and to exactness."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import Metric, MetricCollection

import reference
from ncfinetune import accumulator, collapse
from ncfinetune.collapse import class_moments
from ncfinetune.metrics import (
    CDNV,
    MEMBERS,
    NC1,
    NC2ETF,
    NC3,
    NC4,
    NC1Ratio,
    NC2Equiangularity,
    NC2Equinorm,
    NumericalRank,
    neural_collapse,
)
from ncfinetune.moment_accumulator import MomentAccumulator
from ncfinetune.scatter import full_precision
from ncfinetune.sketch import ClassSketches

K, D, N = 6, 10, 240


def _data(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, K, (N,), generator=generator)
    means = torch.randn(K, D, generator=generator, dtype=torch.float64)
    features = means[labels] + 0.3 * torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(K, D, generator=generator, dtype=torch.float64)
    return {"features": features.to(dtype), "labels": labels, "weight": weight, "bias": weight[:, 0]}


def _exact_nc4(features: np.ndarray, labels: np.ndarray) -> float:
    data = _data()
    means = reference.class_means(data["features"].numpy(), data["labels"].numpy())
    nearest = np.linalg.norm(features[:, None].astype(np.float64) - means, axis=2).argmin(1)
    decided = (features.astype(np.float64) @ data["weight"].numpy().T + data["bias"].numpy()).argmax(1)
    return float((nearest != decided).mean())


def _exact_rank(features: np.ndarray, labels: np.ndarray) -> float:
    ranks = []
    for label in np.unique(labels):
        values = np.linalg.svd(features[labels == label].astype(np.float64), compute_uv=False)
        ranks.append((values**2).sum() / values[0] ** 2)
    return float(np.mean(ranks))


def _nc4(num_classes: int = K) -> NC4:
    data = _data()
    return NC4(class_moments(data["features"], data["labels"], num_classes))


# How each member is made, and what it must give. The rank's sketch is as wide as the features, and so exact.
FAMILY: dict[str, tuple[Callable[[], Metric], Callable[[np.ndarray, np.ndarray], float]]] = {
    "nc1": (lambda: NC1(K), reference.nc1),
    "nc1_ratio": (lambda: NC1Ratio(K), reference.nc1_ratio),
    "cdnv": (lambda: CDNV(K), reference.cdnv),
    "nc2_equinorm": (lambda: NC2Equinorm(K), reference.equinorm),
    "nc2_equiangularity": (lambda: NC2Equiangularity(K), reference.equiangularity),
    "nc2_etf": (lambda: NC2ETF(K), reference.etf_distance),
    "nc3": (lambda: NC3(K), lambda x, y: reference.self_duality(x, y, _data()["weight"].numpy())),
    "nc4": (_nc4, _exact_nc4),
    "numerical_rank": (lambda: NumericalRank(K, rows=D), _exact_rank),
}
MOMENTS = [name for name in FAMILY if name not in ("nc4", "numerical_rank")]
member = pytest.mark.parametrize("name", FAMILY)


def _update(metric: Any, data: dict[str, Tensor], rows: slice | Tensor = slice(None)) -> Any:
    batch = {key: value[rows] if key in ("features", "labels") else value for key, value in data.items()}
    metric.update(**metric._filter_kwargs(**batch))
    return metric


def _expected(name: str, data: dict[str, Tensor], rows: slice | Tensor = slice(None)) -> float:
    return FAMILY[name][1](data["features"][rows].double().numpy(), data["labels"][rows].numpy())


@member
@pytest.mark.parametrize("size", [1, 7, 64, N])
def test_any_batches_in_any_order_give_the_reference(name: str, size: int) -> None:
    data, metric = _data(), FAMILY[name][0]()
    for rows in torch.randperm(N).split(size):
        _update(metric, data, rows)
    assert metric.compute().dtype == torch.float64
    assert metric.compute().item() == pytest.approx(_expected(name, data), rel=1e-12)


@member
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_features_are_measured_as_they_are(name: str, dtype: torch.dtype) -> None:
    data = _data(dtype)
    metric = _update(FAMILY[name][0](), data)
    assert metric.compute().item() == pytest.approx(_expected(name, data), rel=1e-5)


@member
def test_labels_of_32_bits(name: str) -> None:
    data = _data()
    narrow = {**data, "labels": data["labels"].int()}
    assert _update(FAMILY[name][0](), narrow).compute() == _update(FAMILY[name][0](), data).compute()


@member
@pytest.mark.parametrize("parts", [(80, 160), (0, 240), (239, 1)])
def test_merged_states_are_those_of_all_samples(name: str, parts: tuple[int, int]) -> None:
    data = _data()
    order = data["labels"].argsort()  # classes hardly overlap between the parts
    first, second = FAMILY[name][0](), FAMILY[name][0]()
    for metric, rows in zip((first, second), order.split(parts), strict=True):
        if len(rows):
            _update(metric, data, rows)
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(_expected(name, data), rel=1e-12)


@pytest.mark.parametrize("name", MOMENTS)
def test_a_saved_state_is_merged_with_the_samples_that_wait(name: str) -> None:
    data, (first, second) = _data(torch.float32), (FAMILY[name][0](), FAMILY[name][0]())
    first.persistent(True)
    _update(first, data, slice(0, 100))
    _update(second, data, slice(100, N))
    saved = first.state_dict()
    assert all(state.shape == (100, D) for key, state in saved.items() if key == "rows")  # and no room for more
    second.merge_state(saved)
    assert second.compute().item() == pytest.approx(_expected(name, data), rel=1e-6)


@member
def test_merging_refuses_another_metrics_state(name: str) -> None:
    with pytest.raises(ValueError, match="expected the state of a .*, got one without"):
        FAMILY[name][0]().merge_state({"other": torch.zeros(1)})


@member
def test_gathering_by_a_function_of_ones_own(name: str) -> None:
    data, metric = _data(), FAMILY[name][0]()
    _update(metric, data, slice(0, 100))
    other = _update(FAMILY[name][0](), data, slice(100, N))
    gather = dict(zip(map(id, metric.metric_state.values()), other.metric_state.values(), strict=True))
    metric.sync(dist_sync_fn=lambda state, group: [state, gather[id(state)]], distributed_available=lambda: True)
    assert metric._computed is None
    assert type(metric).compute(metric).item() == pytest.approx(_expected(name, data), rel=1e-12)
    metric.unsync()
    assert metric.compute().item() == pytest.approx(_expected(name, data, slice(0, 100)), rel=1e-12)


@member
def test_reset_forgets(name: str) -> None:
    data, metric = _data(), FAMILY[name][0]()
    _update(metric, _data(seed=1))
    metric.reset()
    assert _update(metric, data).compute().item() == pytest.approx(_expected(name, data), rel=1e-12)


@member
def test_forward_gives_the_batch_and_accumulates(name: str) -> None:
    data, metric = _data(), FAMILY[name][0]()
    for rows in (slice(0, 120), slice(120, N)):
        batch = {key: value[rows] if key in ("features", "labels") else value for key, value in data.items()}
        value = metric(**metric._filter_kwargs(**batch))
        assert value.item() == pytest.approx(_expected(name, data, rows), rel=1e-12)
    assert metric.compute().item() == pytest.approx(_expected(name, data), rel=1e-12)


@member
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "state_dict", "torch.save"])
def test_half_way_states_travel(name: str, how: str) -> None:
    data = _data(torch.float32)
    whole = FAMILY[name][0]()
    half = FAMILY[name][0]()
    half.persistent(True)
    for metric in (whole, half):
        _update(metric, data, slice(0, 100))
    if how == "pickle":
        half = pickle.loads(pickle.dumps(half))
    elif how == "deepcopy":
        half = copy.deepcopy(half)
    else:
        state = half.state_dict()
        if how == "torch.save":
            buffer = io.BytesIO()
            torch.save(state, buffer)
            state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        half = FAMILY[name][0]()
        half.persistent(True)
        half.load_state_dict(state)
    for metric in (whole, half):
        _update(metric, data, slice(100, N))
    assert torch.equal(half.compute(), whole.compute())


@member
@pytest.mark.parametrize("cast", ["half", "bfloat16", "to", "double"])
def test_a_parent_of_another_precision_leaves_the_state_alone(name: str, cast: str) -> None:
    data = _data(torch.float32)
    parent = nn.Module()
    parent.metric = _update(FAMILY[name][0](), data, slice(0, 100))
    parent.to(torch.bfloat16) if cast == "to" else getattr(parent, cast)()
    _update(parent.metric, data, slice(100, N))
    plain = _update(_update(FAMILY[name][0](), data, slice(0, 100)), data, slice(100, N))
    assert torch.equal(parent.metric.compute(), plain.compute())


@member
def test_inference_mode_and_training_can_alternate(name: str) -> None:
    data = _data()
    with torch.inference_mode():
        metric = FAMILY[name][0]()
        _update(metric, {key: value.clone() for key, value in data.items()}, slice(0, 100))
    _update(metric, data, slice(100, N))
    with torch.inference_mode():
        assert metric.compute().item() == pytest.approx(_expected(name, data), rel=1e-12)


@member
@pytest.mark.parametrize("how", ["clone", "sync"])
def test_what_inference_mode_copied_takes_samples_outside(name: str, how: str) -> None:
    data, metric = _data(), FAMILY[name][0]()
    _update(metric, data, slice(0, 100))
    with torch.inference_mode():
        if how == "clone":
            metric = metric.clone()
        else:
            metric.sync(dist_sync_fn=lambda state, group: [state], distributed_available=lambda: True)
            metric.unsync()
    _update(metric, data, slice(100, N))
    assert metric.compute().item() == pytest.approx(_expected(name, data), rel=1e-12)


@pytest.mark.parametrize(
    "make", [MomentAccumulator, lambda k: MomentAccumulator(k, False), lambda k: ClassSketches(k, 4)]
)
def test_a_state_that_inference_mode_moved_or_loaded_takes_samples_outside(make: Any) -> None:
    accumulator, other = make(2), make(2)
    with torch.inference_mode():
        accumulator.to("meta")  # a move that copies, as one to an accelerator does
        other.load(make(2).state())
    for name in accumulator.names:
        assert not getattr(accumulator, name).is_inference(), name
        assert not getattr(other, name).is_inference(), name


@member
def test_autocast_changes_no_bit(name: str) -> None:
    data = _data(torch.float32)
    outside = _update(FAMILY[name][0](), data).compute()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = _update(FAMILY[name][0](), data).compute()
    assert torch.equal(inside, outside)


@member
def test_low_matmul_precision_changes_no_bit(name: str) -> None:
    data = _data(torch.float32)
    outside = _update(FAMILY[name][0](), data).compute()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(_update(FAMILY[name][0](), data).compute(), outside)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@member
def test_features_with_a_graph_are_taken_without(name: str) -> None:
    data = _data()
    metric = _update(FAMILY[name][0](), {**data, "features": data["features"].requires_grad_()})
    assert not metric.compute().requires_grad


@member
def test_empty_batches_and_single_samples_are_welcome(name: str) -> None:
    data, metric = _data(), FAMILY[name][0]()
    _update(metric, data, slice(0, 0))
    for rows in (slice(0, 1), slice(1, 1), slice(1, N)):
        _update(metric, data, rows)
    assert metric.compute().item() == pytest.approx(_expected(name, data), rel=1e-12)


@member
def test_absent_classes_are_left_out(name: str) -> None:
    data, metric = _data(), FAMILY[name][0]()
    rows = (data["labels"] != 2).nonzero().squeeze(1)
    assert _update(metric, data, rows).compute().item() == pytest.approx(_expected(name, data, rows), rel=1e-12)


@member
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.full((N,), 6)}, ValueError, r"expected labels in 0..5 \(num_classes=6\), got \[6\]"),
        ({"labels": torch.full((N,), -1)}, ValueError, r"expected labels in 0..5 \(num_classes=6\), got \[-1\]"),
        ({"labels": torch.zeros(N)}, TypeError, "expected integer labels, got torch.float32"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"one label for each of 240 features, got .* \(3,\)"),
        ({"features": torch.randn(N, D, 2, 2)}, ValueError, r"shape \(N, d\), got \(240, 10, 2, 2\); pool spatial or"),
        ({"features": torch.randn(N, 3, D)}, ValueError, r"shape \(N, d\), got \(240, 3, 10\); pool spatial or"),
        ({"features": torch.ones(N, 0)}, ValueError, r"features of width at least 1, got shape \(240, 0\)"),
        ({"features": torch.ones(N, D).long()}, TypeError, "expected floating-point features, got torch.int64"),
    ],
)
def test_wrong_input_is_refused(name: str, change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _update(FAMILY[name][0](), {**_data(), **change})


@member
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_counted_and_leave_the_state_alone(name: str, value: float) -> None:
    data, metric = _data(), FAMILY[name][0]()
    _update(metric, data)
    before = metric.compute()
    broken = data["features"].clone()
    broken[[3, 9], 1] = value
    with pytest.raises(ValueError, match="got 2 of 240 samples with nan or inf in batch 2 since the last reset"):
        _update(metric, {**data, "features": broken})
    metric._computed = None
    assert metric.compute() == before


@member
def test_a_width_that_changes_is_refused(name: str) -> None:
    data, metric = _data(), FAMILY[name][0]()
    _update(metric, data)
    with pytest.raises(ValueError, match=r"width 10 as .*, got .*7"):
        _update(metric, {**data, "features": data["features"][:, :7]})
    metric.reset()
    _update(metric, data, slice(0, 0))  # an empty batch has a width too
    with pytest.raises(ValueError, match=r"width 10 as .*, got .*7"):
        _update(metric, {**data, "features": data["features"][:, :7]})


@member
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_nothing_to_compute(name: str) -> None:
    with pytest.raises(ValueError, match=r"compute needs samples; call update\(features, labels"):
        FAMILY[name][0]().compute()


@pytest.mark.parametrize("name", MOMENTS)
def test_one_class_alone_has_no_collapse(name: str) -> None:
    metric = _update(FAMILY[name][0](), {**_data(), "labels": torch.zeros(N).long()})
    with pytest.raises(ValueError, match="expected samples of at least two classes, got 1: collapse is undefined"):
        metric.compute()


@pytest.mark.parametrize("make", [*MEMBERS.values()])
def test_fewer_than_two_classes_are_refused(make: type[Metric]) -> None:
    with pytest.raises(ValueError, match="expected num_classes of at least 2, got 1"):
        make(1)


def test_wrong_weights_are_refused() -> None:
    data = _data()
    with pytest.raises(ValueError, match=r"expected weight of shape \(6, 10\), got \(10, 6\)"):
        NC3(K).update(data["features"], data["labels"], data["weight"].T)
    with pytest.raises(
        ValueError, match=r"expected weight of shape \(6, 10\) and features of width 10 .*got \(10, 6\)"
    ):
        _nc4().update(data["features"], data["labels"], data["weight"].T)
    metric = NC3(K)
    metric.update(data["features"], data["labels"])
    with pytest.raises(ValueError, match=r"NC3 needs the classifier's weight; give it to update"):
        metric.compute()


def test_sketch_of_few_rows_keeps_its_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(200)
    scales = torch.logspace(0, -1.5, 40)
    features = torch.randn(800, 40, generator=generator, dtype=torch.float64) * scales
    exact = collapse.numerical_rank(features, labels, 4).item()
    for rows in (8, 16, 32):
        metric = NumericalRank(4, rows=rows)
        for x, y in zip(features.split(30), labels.split(30), strict=True):
            metric.update(x, y)
        assert exact * (1 - 1e-12) <= metric.compute().item() <= 1.1 * exact / (1 - exact / (rows + 1))
        assert metric.sketch.shape == (4, rows, 40)


def _sizes(metric: Metric) -> dict[str, int]:
    return {name: state.numel() for name, state in metric.metric_state.items()}


def test_state_does_not_grow() -> None:
    data = _data(torch.float32)
    metric = _update(NC1(K), data)
    sizes = _sizes(metric)
    for _ in range(50):
        _update(metric, data)
        assert metric._accumulator._rows.shape == (accumulator.ROWS[1], D)
    assert _sizes(metric) == sizes


@pytest.mark.parametrize(
    ("width", "on_cpu", "on_accelerator"), [(512, 2048, 8192), (2048, 2048, 4096), (10**6, 256, 256)]
)
def test_an_accelerator_buffers_more_rows(width: int, on_cpu: int, on_accelerator: int) -> None:
    assert accumulator.capacity(width, torch.device("cpu")) == on_cpu
    assert accumulator.capacity(width, torch.device("cuda", 0)) == on_accelerator


@pytest.mark.parametrize("numbers", [1, 1000, 2600])
def test_samples_wait_in_little_room(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulator, "ROWS", (40, 2048))
    monkeypatch.setattr(accumulator, "BUFFER", numbers)
    data, metric = _data(), NC1(K)
    for start, stop in itertools.pairwise([0, 7, 107, 114, 121, 221, N]):
        _update(metric, data, slice(start, stop))
    assert metric.compute().item() == pytest.approx(_expected("nc1", data), rel=1e-12)


def test_what_interrupts_an_update_leaves_its_rows_out(monkeypatch: pytest.MonkeyPatch) -> None:
    data, metric = _data(), NC1(K)
    _update(metric, data, slice(0, 100))

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", interrupt)
        with pytest.raises(KeyboardInterrupt):
            _update(metric, data, slice(0, 50))
    assert len(metric.rows) == len(metric.labels) == 100
    _update(metric, data, slice(100, N))
    assert metric.compute().item() == pytest.approx(_expected("nc1", data), rel=1e-12)


@pytest.mark.parametrize("name", ["nc1_ratio", "cdnv"])
def test_one_feature_far_larger_than_the_others(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % K
    features = torch.randn(120, 16384, generator=generator) + torch.randn(K, 16384, generator=generator)[labels]
    features[:, 7] *= 1000
    metric = MEMBERS[name](K)
    metric.update(features, labels)
    expected = FAMILY[name][1](features.double().numpy(), labels.numpy())
    assert metric.compute().item() == pytest.approx(expected, rel=2e-7)


def test_collapse_of_double_features_is_never_negative() -> None:
    labels = torch.arange(60) % K
    for seed in range(60):  # class means that are rounded leave residuals of either sign
        generator = torch.Generator().manual_seed(seed)
        metric = NC1(K)
        metric.update(torch.randn(K, D, generator=generator, dtype=torch.float64)[labels], labels)
        assert 0 <= metric.compute().item() < 1e-25


@pytest.mark.parametrize(("classes", "width"), [(6, 10), (12, 70), (70, 12), (6, 300), (3, 770), (3, 1030)])
def test_nc1_of_the_state_is_nc1_of_the_moments_in_full(classes: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % classes
    features = torch.randn(400, width, generator=generator, dtype=torch.float64) + labels[:, None].double().sqrt()
    metric = NC1(classes)
    for x, y in zip(features.split(150), labels.split(150), strict=True):
        metric.update(x, y)
    exact = pytest.approx(reference.nc1(features.numpy(), labels.numpy()), rel=1e-12)
    assert metric.compute().item() == exact
    assert collapse.nc1(metric.moments()).item() == exact


def test_features_of_two_types_wait_apart() -> None:
    data = _data()
    data["labels"][: 2 * K] = torch.arange(K).repeat(2)
    whole = torch.arange(K)[:, None] + torch.arange(D) % 3  # integers, whose products float32 gives exactly
    data["features"][: 2 * K] = torch.cat([whole, whole + 2])
    metric = NC1(K)
    for rows, dtype in ((slice(0, 2 * K), torch.float32), (slice(2 * K, N), torch.float64)):
        metric.update(data["features"][rows].to(dtype), data["labels"][rows])
    assert metric.compute().item() == pytest.approx(_expected("nc1", data), rel=1e-12)


def test_collection_updates_one_state_and_agrees_with_its_members() -> None:
    data = _data()
    collection = neural_collapse(K, list(MEMBERS), prefix="train/")
    for rows in (slice(0, 100), slice(100, N)):
        collection.update(features=data["features"][rows], labels=data["labels"][rows], weight=data["weight"])
    values = collection.compute()
    assert set(values) == {f"train/{name}" for name in MEMBERS}
    for name in MEMBERS:
        if name != "numerical_rank":
            assert values[f"train/{name}"].item() == pytest.approx(_expected(name, data), rel=1e-12)
    assert [len(group) for group in collection.compute_groups.values()] == [7, 1]


def test_collection_as_a_metric_is_forwarded_pickled_resumed_and_reset() -> None:
    data, members = _data(), ("cdnv", "nc1", "nc2_etf")
    halves = [(data["features"][rows], data["labels"][rows]) for rows in (slice(0, 90), slice(90, N))]
    collection = neural_collapse(K, members)
    for rows, half in zip((slice(0, 90), slice(90, N)), halves, strict=True):
        values = collection(*half)
        assert {k: v.item() for k, v in values.items()} == {
            name: pytest.approx(_expected(name, data, rows), rel=1e-12) for name in members
        }
    expected = {name: pytest.approx(_expected(name, data), rel=1e-12) for name in members}
    assert {k: v.item() for k, v in pickle.loads(pickle.dumps(collection)).compute().items()} == expected
    assert collection["cdnv"].compute().item() == expected["cdnv"]
    resumed = neural_collapse(K, members)
    for part in (collection, resumed):
        part.reset()
        part.persistent(True)
    collection.update(*halves[0])
    resumed.load_state_dict(collection.state_dict())
    resumed.update(*halves[1])
    assert {k: v.item() for k, v in resumed.compute().items()} == expected


@pytest.mark.parametrize("members", [("cdnv", "nc1"), ("nc3", "cdnv", "nc1")])
def test_collection_in_any_order_of_members(members: tuple[str, ...]) -> None:
    data = _data()
    collection = neural_collapse(K, members)
    collection.update(data["features"], data["labels"], data["weight"])
    assert isinstance(collection, MetricCollection)
    assert {name: value.item() for name, value in collection.compute().items()} == {
        name: pytest.approx(_expected(name, data), rel=1e-12) for name in members
    }


def test_cheap_members_keep_no_state_of_width_squared() -> None:
    data = _data()
    collection = neural_collapse(K, ["cdnv", "nc1_ratio", "nc2_etf"])
    collection.update(data["features"], data["labels"])
    assert max(size for metric in collection.values() for size in _sizes(metric).values()) == K * D


def test_unknown_members_are_named() -> None:
    with pytest.raises(ValueError, match="expected members among nc1, nc1_ratio, .*, got nc5"):
        neural_collapse(K, ["nc1", "nc5"])


@member
def test_what_forward_refuses_leaves_earlier_samples(name: str) -> None:
    data, metric = _data(), FAMILY[name][0]()
    batch = {key: value[:120] if key in ("features", "labels") else value for key, value in data.items()}
    metric(**metric._filter_kwargs(**batch))
    with pytest.raises(ValueError, match="nan or inf in batch"):
        metric(**metric._filter_kwargs(**{**batch, "features": batch["features"] * torch.nan}))
    rest = {key: value[120:] if key in ("features", "labels") else value for key, value in data.items()}
    metric(**metric._filter_kwargs(**rest))
    assert metric.compute().item() == pytest.approx(_expected(name, data), rel=1e-12)


@pytest.mark.parametrize("name", MOMENTS)
def test_forward_of_one_sample_is_nan_and_counts(name: str) -> None:
    data, metric = _data(), FAMILY[name][0]()
    for rows in (slice(0, 1), slice(1, N)):
        batch = {key: value[rows] if key in ("features", "labels") else value for key, value in data.items()}
        value = metric(**metric._filter_kwargs(**batch))
        assert value.isnan() == (rows.stop == 1)
    assert metric.compute().item() == pytest.approx(_expected(name, data), rel=1e-12)


def test_members_that_were_looked_at_go_on() -> None:
    data = _data()
    collection = neural_collapse(K, ["nc1", "cdnv"])
    for rows in (slice(0, 100), slice(100, N)):
        collection.update(data["features"][rows], data["labels"][rows])
        seen = collection["cdnv"].compute().item()
    assert not hasattr(collection["cdnv"], "scatter")
    assert seen == collection.compute()["cdnv"].item() == pytest.approx(_expected("cdnv", data), rel=1e-12)


def test_dead_features_have_no_number_and_no_error() -> None:
    dead = torch.zeros(20, D)
    collection = neural_collapse(K, list(MEMBERS))
    collection.update(features=dead, labels=torch.arange(20) % K, weight=torch.ones(K, D))
    assert all(value.isnan() for value in collection.compute().values())


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has one precision of products")
def test_precision_set_backend_by_backend_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "mm" in func.overloadpacket.__name__:
                seen.append(torch.backends.mkldnn.matmul.fp32_precision)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    data, backend = _data(torch.float32), torch.backends.mkldnn.matmul
    metric, before = _update(NC1(K), data), backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        with Products():
            metric._accumulator.flush()
        assert set(seen) == {"ieee"}
        assert backend.fp32_precision == "bf16"
    finally:
        backend.fp32_precision = before
    assert metric.compute().item() == pytest.approx(_expected("nc1", data), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_default_type_of_a_run_in_half_precision_changes_nothing(dtype: torch.dtype) -> None:
    data = {"features": torch.randn(4096, 64), "labels": torch.arange(4096) % K}
    expected = _update(NC1(K), data).compute()
    torch.set_default_dtype(dtype)
    try:
        found = _update(NC1(K), data).compute()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == expected


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has one setting for all")
def test_settings_of_products_are_as_they_were() -> None:
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [backend.fp32_precision for backend in backends]
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        own = [backend.fp32_precision for backend in backends]
        with full_precision(torch.device("cpu")):
            assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
        assert [backend.fp32_precision for backend in backends] == own
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


def test_a_torch_with_one_setting_for_all_has_it_set_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(type(torch.backends.mkldnn), "matmul", raising=False)
    monkeypatch.delattr(torch.backends.mkldnn, "matmul", raising=False)
    said: list[str] = ["high"]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: said[-1])
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    with full_precision(torch.device("cpu")):
        assert said[-1] == "highest"
    assert said == ["high", "highest", "high"]

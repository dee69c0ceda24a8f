"""The family over several processes: the number that one process would give, whatever each has seen."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ddp import run
from test_metrics import FAMILY, K, N, _data, _expected, _update

from ncfinetune import accumulator, moment_accumulator
from ncfinetune.metrics import MEMBERS, NC1, neural_collapse

# Which samples each rank gets, of 240 sorted by class.
SHARDS = {
    "even": [slice(0, 120), slice(120, N)],
    "uneven": [slice(0, 7), slice(7, N)],
    "one rank empty": [slice(0, 0), slice(0, 100), slice(100, N)],
    "the last rank empty": [slice(0, N), slice(0, 0)],
}


def _sorted_data() -> dict[str, torch.Tensor]:
    data = _data()
    order = data["labels"].argsort()
    return {**data, "features": data["features"][order], "labels": data["labels"][order]}


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_ranks_agree_on_the_number_of_one_process(shards: str, tmp_path: Path) -> None:
    data, parts = _sorted_data(), SHARDS[shards]

    def task(rank: int) -> dict[str, tuple[float, float]]:
        torch.manual_seed(rank)
        values = {}
        for name, (make, _) in FAMILY.items():
            metric = make()
            if parts[rank].stop > parts[rank].start:
                for rows in torch.arange(N)[parts[rank]].split(50):
                    _update(metric, data, rows)
            values[name] = (metric.compute().item(), int(metric._update_count))
        return values

    for values in run(len(parts), tmp_path, task):
        for name, (value, _) in values.items():
            assert value == pytest.approx(_expected(name, data), rel=1e-12), name


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_collection_reduces_each_tensor_once_and_goes_on(tmp_path: Path) -> None:
    data, parts = _sorted_data(), SHARDS["uneven"]

    def task(rank: int) -> tuple[dict[str, float], list[int], dict[str, float]]:
        sizes: list[int] = []
        reduce = dist.all_reduce
        dist.all_reduce = lambda tensor, *args, **kwargs: (
            sizes.append(tensor.numel()) or reduce(tensor, *args, **kwargs)
        )
        collection = neural_collapse(K, [name for name in MEMBERS if name != "numerical_rank"])
        x, y = data["features"][parts[rank]], data["labels"][parts[rank]]
        collection.update(x, y, data["weight"])
        assert sizes == []
        once = {name: value.item() for name, value in collection.compute().items()}
        reduced, local = list(sizes), collection["nc1"].count.sum().item()
        assert local == len(x)  # the state is this rank's own again
        collection.update(x, y, data["weight"])
        return once, reduced, {name: value.item() for name, value in collection.compute().items()}

    for once, sizes, twice in run(2, tmp_path, task):
        for name, value in once.items():
            assert value == pytest.approx(_expected(name, data), rel=1e-12)
            assert twice[name] == pytest.approx(value, rel=1e-12)  # every sample twice changes no mean
        d = data["features"].shape[1]
        assert sorted(sizes) == sorted([4, K, K * d, K, K * d, d * d, d, 1, K * d])


def test_all_ranks_raise_for_what_one_rank_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (accumulator, moment_accumulator):
        monkeypatch.setattr(module, "may_look", lambda tensor: False)  # as on an accelerator
    data, parts = _sorted_data(), SHARDS["uneven"]

    def task(rank: int) -> str:
        metric, labels = NC1(K), data["labels"][parts[rank]].clone()
        labels[:1] = K if rank == 0 else labels[0]
        metric.update(data["features"][parts[rank]], labels)
        with pytest.raises(ValueError, match="expected labels") as error:
            metric.compute()
        assert not metric._is_synced
        return str(error.value)

    text = (
        "NC1: expected labels in 0..5 (num_classes=6), got 1 of 240 samples with labels out of range since the last "
        "reset"
    )
    assert run(2, tmp_path, task) == [text, text]

"""What every test gets: one thread a process, and a fixed seed."""

import pytest
import torch

# Two OpenMP threads can be 30 times slower than one on the small matrices of these tests, and forked
# processes hang when their parent has used OpenMP threads.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test, so that it does not run alone at the end while the other processes are idle."""
    items.sort(key=lambda item: "test_no_number_is_wrong_without_a_word" not in item.nodeid)

"""What every test gets: one thread a process, and a fixed seed."""

import pytest
import torch

# Two OpenMP threads can be 30 times slower than one on the small matrices of these tests, and forked
# processes hang when their parent has used OpenMP threads.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

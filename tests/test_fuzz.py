"""Random features of every kind: right to 1e-6, or refused by name."""

import fuzz
import pytest


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("inputs", [100, pytest.param(20_000, marks=pytest.mark.slow)])
def test_no_number_is_wrong_without_a_word(inputs: int) -> None:
    found = fuzz.run(inputs, seed=0)
    print(*fuzz.lines(found), sep="\n")
    assert found.wrong == []
    assert sum(found.refused.values()) < 0.1 * sum(found.values.values())

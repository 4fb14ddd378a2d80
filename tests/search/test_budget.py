"""Budgets as typed."""

import pytest

from qcompiler.errors import QCompilerError
from qcompiler.search.budget import DEFAULT_DROP, Budget, parse_budget


def test_units() -> None:
    budget = parse_budget("1%", "3ms", "4 uJ", "250KiB", "energy")
    assert budget == Budget(0.01, 0.003, 4e-6, 256000, "energy")
    assert budget.limits == {"latency": 0.003, "energy": 4e-6, "weights": 256000}
    assert parse_budget("0.5", None, None, None, None).max_drop == 0.5
    assert str(budget) == (
        "a loss of at most 1.00%, latency at most 3.00 ms, energy at most 4.00 µJ, weights at most 250.0 KiB, "
        "least energy"
    )


def test_what_is_meant_without_a_drop() -> None:
    assert Budget().drop == DEFAULT_DROP and Budget().is_empty
    assert Budget(minimise="weights").drop == DEFAULT_DROP
    assert Budget(max_latency=1.0).drop is None
    assert Budget(max_latency=1.0, minimise="energy").drop == DEFAULT_DROP


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("3", None, None, None), "--max-drop 3: write a share such as 1% or 0.01"),
        (("much", None, None, None), "--max-drop much"),
        (("-1%", None, None, None), "--max-drop -1%"),
        ((None, "3", None, None), "--max-latency '3' needs a number and a unit"),
        ((None, None, "1 W", None), "--max-energy 'W' is not a unit"),
        ((None, None, None, "0KiB"), "--max-weights 0KiB: it must be more than nothing"),
    ],
)
def test_mistakes(given: tuple[str | None, str | None, str | None, str | None], said: str) -> None:
    with pytest.raises(QCompilerError, match=said.replace("(", r"\(")):
        parse_budget(*given, None)

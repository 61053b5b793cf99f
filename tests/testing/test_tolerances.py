from __future__ import annotations

import pytest
import torch

from recsys_ops.testing import compare
from recsys_ops.testing.tolerances import first_difference

EXACT = torch.linspace(0.3, 1.7, 50, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_allowed_and_more_is_not(dtype: torch.dtype) -> None:
    eager = EXACT.to(dtype)
    assert compare(eager, eager, EXACT, EXACT)
    off = eager.clone()
    off[7] += 8 * torch.finfo(dtype).eps
    comparison = compare(off, eager, EXACT, EXACT)
    assert not comparison
    assert comparison.detail.startswith("at [7]: got ")


def test_eager_error_widens_the_budget() -> None:
    eager, actual = EXACT.float(), EXACT.float()
    eager[3] *= 1 + 1e-4
    actual[8] *= 1 + 1.5e-4
    assert compare(actual, eager, EXACT, EXACT)
    actual[8] *= 1 + 1e-4
    assert not compare(actual, eager, EXACT, EXACT)


def test_small_results_have_small_budgets() -> None:
    exact = torch.tensor([1000.0, 1e-3], dtype=torch.float64)
    actual = exact.float() + torch.tensor([0.0, 1e-5])
    assert not compare(actual, exact.float(), exact, exact)


def test_cancellation_is_judged_by_the_largest_partial_sum() -> None:
    exact = torch.tensor([1e-3], dtype=torch.float64)
    actual = exact.float() + 1e-5
    assert compare(actual, exact.float(), exact, torch.tensor([1000.0]))


def test_what_no_term_reaches_must_be_zero() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    assert compare(zero.float(), zero.float(), zero, zero)
    assert not compare(torch.tensor([0.0, 1e-30]), zero.float(), zero, zero)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(value: float) -> None:
    exact = torch.tensor([1.0, value], dtype=torch.float64)
    assert compare(exact.float(), exact.float(), exact, torch.ones(2))
    assert not compare(torch.tensor([1.0, 2.0]), exact.float(), exact, torch.ones(2))
    assert not compare(torch.tensor([value, value]), exact.float(), exact, torch.ones(2))
    assert not compare(torch.tensor([1.0, -1.0]) * torch.inf, exact.float(), exact, torch.ones(2))


def test_overflow_must_be_what_rounding_gives() -> None:
    exact = torch.tensor([80_000.0], dtype=torch.float64)
    assert compare(exact.half(), exact.half(), exact, exact)
    assert not compare(torch.tensor([60_000.0]).half(), exact.half(), exact, exact)


def test_no_budget_without_evidence() -> None:
    broken = torch.full((50,), torch.nan)
    assert not compare(EXACT.float(), broken, EXACT, EXACT)


def test_double_precision_is_judged_by_single() -> None:
    assert compare(EXACT, EXACT.float(), EXACT, EXACT, torch.float64)
    assert not compare(EXACT.float().double(), EXACT.float(), EXACT, EXACT, torch.float64)
    assert compare(EXACT.float(), EXACT.float(), EXACT, EXACT, torch.float64).detail == (
        "expected dtype torch.float64, got torch.float32"
    )


def test_shape_must_agree() -> None:
    assert "expected shape" in compare(EXACT[1:].float(), EXACT.float(), EXACT, EXACT).detail


def test_first_difference() -> None:
    a = torch.tensor([[0.0, 1.0], [torch.nan, 3.0]])
    assert first_difference(a, a.clone()) is None
    b = a.clone()
    b[1, 1] = 4.0
    assert first_difference(a, b) == "at [1, 1]: 3.0 and 4.0"
    assert first_difference(torch.tensor(0.0), torch.tensor(-0.0)) == "at []: 0.0 and -0.0"
    assert "shape" in str(first_difference(a, a[0]))
    assert "dtype" in str(first_difference(a, a.double()))
    assert first_difference(a[:0], a[:0]) is None

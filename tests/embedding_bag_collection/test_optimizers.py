"""Optimizers in the backward of the module: what they are told, learn, keep, and take up again."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys_ops import optim
from recsys_ops.nn import EmbeddingBagCollection, TableConfig
from recsys_ops.optim import (
    LAMB,
    SGD,
    Adagrad,
    Adam,
    FusedOptimizer,
    PartialRowWiseAdam,
    RowOptimizer,
    RowWiseAdagrad,
)

KINDS = (SGD, Adagrad, RowWiseAdagrad, Adam, PartialRowWiseAdam, LAMB)
ROWS = 9


def make(
    optimizer: RowOptimizer | None, dtype: torch.dtype = torch.float32, **options: Any
) -> EmbeddingBagCollection:
    tables = [
        TableConfig("user", ROWS, 4, dtype=dtype),
        TableConfig("item", ROWS, 8, ["clicked", "user"], "mean", dtype),
    ]
    torch.manual_seed(0)
    return EmbeddingBagCollection(tables, optimizer, **options)


def fused(ebc: EmbeddingBagCollection) -> FusedOptimizer:
    assert ebc.fused_optimizer is not None
    return ebc.fused_optimizer


def loss(ebc: EmbeddingBagCollection, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(0, 4, (2 * 5,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    values = torch.randint(0, ROWS - 1, (int(offsets[-1]),), generator=generator)  # the last row rests
    output: Tensor = (ebc(values, offsets) - 0.3).square().sum()
    return output


def train(ebc: EmbeddingBagCollection, *steps: int) -> None:
    for step in steps:
        loss(ebc, step).backward()


def held(ebc: EmbeddingBagCollection) -> list[Tensor]:
    """Weights and state."""
    states = [state for weight in ebc.weights for state in fused(ebc).state[weight].values()]
    return [value.detach().clone() for value in (*ebc.weights, *states)]


def assert_same_bits(one: list[Tensor], two: list[Tensor]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -0.1}, "lr at least 0, got -0.1"),
        ({"lr": math.nan}, "lr at least 0, got nan"),
        ({"weight_decay": -1.0}, "weight_decay at least 0"),
        ({"weight_decay_mode": "L2"}, "weight_decay_mode 'l2' or 'decoupled', got 'L2'"),
        ({"max_gradient": 0.0}, "max_gradient above 0, or None"),
        ({"max_gradient_norm": -1.0}, "max_gradient_norm above 0, or None"),
        ({"state_dtype": torch.float16}, "state_dtype torch.float32 or torch.bfloat16"),
        ({"seed": -1}, r"seed in \[0, 2\*\*32\)"),
        ({"eps": -1e-8}, "eps at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas two in \[0, 1\)"),
        ({"betas": (0.9,)}, r"betas two in \[0, 1\)"),
    ],
)
def test_numbers_out_of_range(kind: type[RowOptimizer], arguments: dict[str, Any], message: str) -> None:
    (name,) = arguments
    expected: tuple[type[Exception], str] = (ValueError, f"{kind.__name__}: expected {message}")
    if name not in kind.__dataclass_fields__:
        expected = (TypeError, f"unexpected keyword argument '{name}'")
    with pytest.raises(expected[0], match=expected[1]):
        kind(**arguments)


def test_all_kinds_are_exported() -> None:
    assert {kind.__name__ for kind in KINDS} | {"FusedOptimizer", "RowOptimizer"} == set(optim.__all__)


@pytest.mark.parametrize(
    ("optimizer", "theirs", "arguments"),
    [
        (SGD(lr=0.1), torch.optim.SGD, {"lr": 0.1}),
        (Adagrad(lr=0.1, eps=1e-6), torch.optim.Adagrad, {"lr": 0.1, "eps": 1e-6}),
    ],
)
def test_the_backward_makes_the_step(optimizer: RowOptimizer, theirs: Any, arguments: dict[str, Any]) -> None:
    ebc, plain = make(optimizer), make(None)
    stepping = theirs(plain.parameters(), **arguments)
    for step in range(4):
        loss(ebc, step).backward()
        loss(plain, step).backward()
        stepping.step()
        stepping.zero_grad()
    torch.testing.assert_close(ebc.state_dict(), plain.state_dict())
    assert all(weight.grad is None for weight in ebc.weights)
    assert int(fused(ebc).count) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_nobody_names_stay(kind: type[RowOptimizer]) -> None:
    ebc = make(kind(lr=0.1, weight_decay=0.1))
    before = [weight[-1].clone() for weight in ebc.weights]
    train(ebc, *range(3))
    assert_same_bits([weight[-1] for weight in ebc.weights], before)
    assert not torch.equal(ebc.weights[0][:-1], make(kind()).weights[0][:-1])


def test_schedulers_change_the_learning_rate() -> None:
    ebc, plain = make(SGD(lr=0.4)), make(None)
    stepping = torch.optim.SGD(plain.parameters(), lr=0.4)
    schedules = [
        torch.optim.lr_scheduler.StepLR(each, step_size=1, gamma=0.5) for each in (fused(ebc), stepping)
    ]
    for step in range(4):
        for each, optimizer, schedule in zip((ebc, plain), (fused(ebc), stepping), schedules, strict=True):
            optimizer.zero_grad()
            loss(each, step).backward()
            optimizer.step()
            schedule.step()
    assert fused(ebc).param_groups[0]["lr"] == pytest.approx(0.025)
    torch.testing.assert_close(ebc.state_dict(), plain.state_dict())


def test_a_closure_is_called() -> None:
    ebc = make(SGD(lr=0.1))

    def closure() -> float:
        found = loss(ebc, 0)
        found.backward()
        return found.item()

    with torch.no_grad():
        first = fused(ebc).step(closure)
        assert fused(ebc).step(closure) < first
    assert fused(ebc).step() is None


def test_a_learning_rate_of_zero_learns_nothing() -> None:
    ebc = make(Adam(lr=0.0))
    before = [weight.detach().clone() for weight in ebc.weights]
    train(ebc, *range(2))
    assert_same_bits([weight.detach() for weight in ebc.weights], before)


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_a_checkpoint_to_the_bit(
    kind: type[RowOptimizer], dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    optimizer = kind(lr=0.1, state_dtype=state_dtype, seed=7)
    ebc = make(optimizer, dtype)
    train(ebc, *range(3))
    fused(ebc).param_groups[0]["lr"] = 0.05
    buffer = io.BytesIO()
    torch.save({"model": ebc.state_dict(), "optimizer": fused(ebc).state_dict()}, buffer)
    at_checkpoint = held(ebc)
    train(ebc, *range(3, 6))
    assert not torch.equal(held(ebc)[0], at_checkpoint[0])

    buffer.seek(0)
    saved = torch.load(buffer)
    fresh = make(optimizer, dtype)
    train(fresh, 11)  # what was there before does not matter
    fresh.load_state_dict(saved["model"])
    fused(fresh).load_state_dict(saved["optimizer"])
    assert_same_bits(held(fresh), at_checkpoint)
    assert fused(fresh).param_groups[0]["lr"] == 0.05
    train(fresh, *range(3, 6))
    assert_same_bits(held(fresh), held(ebc))


def test_the_seed_and_the_step_decide_how_halves_are_rounded() -> None:
    def trained(**arguments: Any) -> Tensor:
        ebc = make(SGD(lr=1e-3, **arguments), torch.bfloat16)
        train(ebc, *range(3))
        return ebc.weights[0].detach()

    assert torch.equal(trained(seed=1), trained(seed=1))
    assert not torch.equal(trained(seed=1), trained(seed=2))
    nearest = trained(stochastic_rounding=False)
    assert not torch.equal(trained(seed=1), nearest)
    assert torch.equal(trained(seed=2, stochastic_rounding=False), nearest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes_of_the_state(dtype: torch.dtype) -> None:
    ebc = make(Adam(state_dtype=torch.bfloat16), dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.bfloat16
    state = fused(ebc).state[ebc.weights[0]]
    assert {state[name].dtype for name in ("exp_avg", "exp_avg_sq")} == {expected}
    assert state["step"].dtype == torch.int64


def of_other_tables(kind: type[RowOptimizer]) -> dict[str, Any]:
    table = TableConfig("user", ROWS, 4)
    return fused(EmbeddingBagCollection([table], kind())).state_dict()


def of_wider_tables(kind: type[RowOptimizer]) -> dict[str, Any]:
    tables = [TableConfig("user", ROWS, 4), TableConfig("item", ROWS + 1, 8)]
    ebc = EmbeddingBagCollection(tables, kind())
    train(ebc, 0)
    return fused(ebc).state_dict()


def of_another_optimizer(kind: type[RowOptimizer]) -> dict[str, Any]:
    return fused(make(SGD() if kind is not SGD else Adam())).state_dict()


@pytest.mark.parametrize(
    ("saved", "kind"),
    [
        *itertools.product([of_other_tables, of_another_optimizer], KINDS),
        *itertools.product([of_wider_tables], KINDS[1:]),  # SGD keeps nothing of a table's shape
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(saved: Any, kind: type[RowOptimizer]) -> None:
    ebc = make(kind(lr=0.1))
    train(ebc, 0)
    before, groups = held(ebc), dict(fused(ebc).param_groups[0])
    with pytest.raises(ValueError, match=r"FusedOptimizer\.load_state_dict: expected"):
        fused(ebc).load_state_dict(saved(kind))
    assert_same_bits(held(ebc), before)
    assert fused(ebc).param_groups[0] == groups


def test_reset_forgets_the_training() -> None:
    ebc = make(Adam(lr=0.1))
    train(ebc, *range(2))
    torch.manual_seed(0)
    ebc.reset_parameters()
    assert_same_bits(held(ebc), held(make(Adam(lr=0.1))))


def test_moved_tables_keep_their_state() -> None:
    ebc, other = make(Adagrad(lr=0.1)), make(Adagrad(lr=0.1))
    for each in (ebc, other):
        train(each, 0)
    other.to("cpu", torch.float64)
    state = fused(other).state[other.weights[0]]["sum"]
    assert state.dtype == torch.float32
    assert_same_bits([state], [fused(ebc).state[ebc.weights[0]]["sum"]])

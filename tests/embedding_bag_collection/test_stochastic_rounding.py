"""Halves are rounded stochastically by the bits of a hash, without bias, the same on every backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple

import numpy as np
import pytest
import torch
from torch import Tensor

from embedding_bag_collection import textbook
from embedding_bag_collection.textbook import Settings
from recsys_ops.embedding_bag_collection import api
from recsys_ops.embedding_bag_collection.autograd import FusedUpdate
from recsys_ops.embedding_bag_collection.cases import SPEC
from recsys_ops.embedding_bag_collection.layout import Layout
from recsys_ops.embedding_bag_collection.row_optimizers import OPTIMIZERS
from recsys_ops.testing import Target, targets

TARGETS = [target for target in targets(SPEC.operator)[0] if not target.interpreted]


def one_row_each(
    target: Target, x: Tensor, half: torch.dtype, seed: int = 0, step: int = 0, number: int = 0
) -> Tensor:
    """What SGD makes of x [R, D] in fp32, when a table in half precision shall become it.

    Args:
        x: to be kept by the table.
        half: its dtype.
        seed: of the bits.
        step: that the counter is at before.
        number: of the table, others stand before it.
    """
    nearest = x.to(half)
    rows, dim = x.shape
    zeros = [torch.zeros(1, 1, dtype=half, device=target.device)] * number
    layout = Layout(((0,),) * number + ((1,),), ("sum",) * (number + 1), (1,) * number + (dim,))
    table = nearest.clone()
    api.collection(
        [*zeros, table],
        torch.arange(rows, device=target.device),
        torch.arange(rows + 1, device=target.device),
        None,
        layout.place([(0, 0), (0, rows)], apart=True),
        torch.float32,
        False,
        False,
        update=FusedUpdate(
            [],
            torch.tensor(step),
            0,
            torch.tensor(astuple(Settings(lr=1.0)), dtype=torch.float64),
            seed,
            True,
        ),
        backend=target.backend,
    ).backward((nearest.float() - x).flatten())
    return table


def numbers(half: torch.dtype, device: str) -> Tensor:
    """Of all magnitudes, some between those that a half can hold, some not: [200, 3]."""
    generator = torch.Generator().manual_seed(0)
    info = torch.finfo(half)
    nearest = torch.randn(200, 3, generator=generator)
    nearest *= 2.0 ** torch.arange(-10, 10).repeat(10)[:, None]
    nearest[:20] = (nearest[:20] * 64 * info.smallest_normal).to(torch.float32)
    nearest[20:40] = nearest[20:40].sign() * 2.0 ** torch.arange(-10, 10)[:, None]
    nearest[40] = 0
    nearest = nearest.to(half).float()
    unit = torch.ldexp(torch.full_like(nearest, info.eps), torch.frexp(nearest).exponent - 1)
    eighths = torch.randint(-3, 4, (200, 3), generator=generator) / 8
    between = nearest + eighths * unit.clamp(min=info.smallest_normal * info.eps) / 2
    return between.to(device)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_random_bits_are_those_of_the_hash(target: Target, half: torch.dtype) -> None:
    x = numbers(half, target.device)
    for seed, step, table in ((0, 0, 0), (0x5EED, 41, 2), (2**31 - 1, 10**6, 1)):
        with target.active():
            found = one_row_each(target, x, half, seed, step, table)
        wanted = [
            [
                textbook.rounded_at_random(
                    value, str(half).removeprefix("torch."), seed, step + 1, 4 * table, row, column
                )
                for column, value in enumerate(values)
            ]
            for row, values in enumerate(x.tolist())
        ]
        assert found.double().tolist() == wanted


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_states_have_bits_of_their_own(target: Target, half: torch.dtype) -> None:
    """Squares of small integers are exact, so that every backend rounds the same numbers."""
    rows, dim, table = 40, 8, 1
    gradient = (torch.arange(rows * dim, device=target.device) % 13 - 6).view(rows, dim) / 64
    weights = [torch.ones(rows, dim, dtype=half, device=target.device) for _ in range(2)]
    states = [torch.full_like(w, 1.5) for w in weights]
    layout = Layout(((0,), (0,)), ("sum", "sum"), (dim, dim))
    kind, hyperparameters = (
        OPTIMIZERS.index("adagrad"),
        torch.tensor(astuple(Settings()), dtype=torch.float64),
    )
    with target.active():
        api.collection(
            weights,
            torch.arange(rows, device=target.device),
            torch.arange(rows + 1, device=target.device),
            None,
            layout.side_by_side(rows),
            torch.float32,
            False,
            False,
            update=FusedUpdate(states, torch.tensor(8), kind, hyperparameters, 3, True),
            backend=target.backend,
        ).backward(gradient.repeat(1, 2).flatten())
    name = str(half).removeprefix("torch.")
    wanted = [
        [textbook.rounded_at_random(1.5 + g * g, name, 3, 9, 4 * table + 1, r, c) for c, g in enumerate(gs)]
        for r, gs in enumerate(gradient.tolist())
    ]
    assert states[table].double().tolist() == wanted
    assert not torch.equal(states[0], states[1])


def fractions(half: torch.dtype) -> Iterator[float]:
    """Numbers at and between those that a half can hold, also next to a power of two and below normal."""
    info = torch.finfo(half)
    for nearest in (1.0, -1.0, 1.5, -3.0, 2.0**-6, 100.0, 8 * info.smallest_normal, info.smallest_normal / 2):
        unit = max(2.0 ** np.floor(np.log2(abs(nearest))), info.smallest_normal) * info.eps
        for part in (0.0, 1 / 16, 0.25, 0.5, 0.9):
            yield nearest + part * unit


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_stochastic_rounding_has_no_bias(target: Target, half: torch.dtype) -> None:
    for step, value in enumerate(fractions(half)):
        x = torch.full((128, 64), value, device=target.device)
        with target.active():
            found = one_row_each(target, x, half, seed=5, step=step).double()
        exact = x.double()[0, 0]
        neighbours = found.unique()
        assert len(neighbours) <= 2
        unit = float(neighbours[-1] - neighbours[0])
        part = float((exact - neighbours[0]) / unit) if unit else 0.0
        deviation = unit * (max(part * (1 - part), 0) / x.numel()) ** 0.5
        assert abs(float(found.mean() - exact)) <= 5 * deviation + unit / 4096, value


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_stochastic_rounding_is_reproducible_and_never_the_same_twice(
    target: Target, half: torch.dtype
) -> None:
    x = torch.full((64, 16), 1 + torch.finfo(half).eps / 2, device=target.device)
    with target.active():
        first = one_row_each(target, x, half, seed=1, step=1)
        assert torch.equal(one_row_each(target, x, half, seed=1, step=1), first)
        others = [{"seed": 2, "step": 1}, {"seed": 1, "step": 2}, {"seed": 1, "step": 1, "number": 1}]
        for other in others:
            differing = (one_row_each(target, x, half, **other) != first).double().mean()
            assert 0.4 < float(differing) < 0.6


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_what_a_half_can_hold_is_not_rounded(target: Target, half: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(half)
    finite = every[every.isfinite()].view(-1, 2).to(target.device)
    with target.active():
        assert torch.equal(one_row_each(target, finite.float(), half), finite)

"""The embedding bag passes the correctness suite on every backend of this machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from contract_suite import ContractSuite
from hypothesis import given, settings
from hypothesis import strategies as st

import recsys_ops
from recsys_ops.embedding_bag.cases import SPEC, EmbeddingBagCase
from recsys_ops.testing import Target

SUITE = ContractSuite(SPEC)
PARTS = 40


@pytest.mark.parametrize("group", SUITE.groups)
def test_contract(group: str) -> None:
    """One check of one subject by one backend, in every precision and at every SIMD level."""
    SUITE.check_group(group)


@pytest.mark.parametrize("backend", SPEC.operator.implementations)
def test_backend_is_present(backend: str) -> None:
    SUITE.check_presence(backend)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_exhaustively(part: int) -> None:
    SUITE.check_part(part, PARTS)


@st.composite
def cases(draw: st.DrawFn) -> EmbeddingBagCase:
    """Any call that the operator accepts."""
    fields: dict[str, Any] = {
        "mode": draw(st.sampled_from(["sum", "mean", "max"])),
        "dim": draw(st.integers(0, 300)),
        "ids": draw(st.sampled_from(["zipf", "uniform", "equal"])),
        "ties": draw(st.booleans()),
        "wide_ids": draw(st.booleans()),
        "wide_offsets": draw(st.booleans()),
    }
    if fields["mode"] != "max":
        fields |= {name: draw(st.booleans()) for name in ("weighted", "sparse", "scale_grad_by_freq")}
    if draw(st.booleans()):
        fields |= {"two_dim": True, "bags": draw(st.integers(0, 40)), "length": draw(st.integers(0, 70))}
    else:
        fields["lengths"] = tuple(draw(st.lists(st.integers(0, 70) | st.integers(0, 3), max_size=40)))
        if draw(st.booleans()):
            fields |= {"include_last_offset": True, "tail": draw(st.integers(0, 5))}
    rows = fields["rows"] = draw(st.integers(1, 1000))
    if draw(st.booleans()):
        fields["padding_idx"] = draw(st.integers(-rows, rows - 1))
    if draw(st.booleans()):
        fields["invalid"] = True
    elif fields["dim"] > 0 and draw(st.booleans()):
        fields |= {"renormalized": True, "norm_type": draw(st.sampled_from([1.0, 2.0, 3.0]))}
    return EmbeddingBagCase(**fields)


dtypes, seeds = st.sampled_from(SPEC.dtypes), st.integers(0, 2**16)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases(), dtypes, seeds)
def test_drawn_calls(case: EmbeddingBagCase, dtype: torch.dtype, seed: int) -> None:
    SUITE.check_drawn(case, dtype, seed)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(cases(), dtypes, seeds)
def test_many_drawn_calls(case: EmbeddingBagCase, dtype: torch.dtype, seed: int) -> None:
    SUITE.check_drawn(case, dtype, seed)


def untouched_zeros(rows: int, dim: int, device: str) -> torch.Tensor:
    """A table in fp16; on a CPU it takes memory only where it is written to."""
    if device == "cpu":
        return torch.from_numpy(np.zeros((rows, dim), np.float16))
    return torch.zeros(rows, dim, dtype=torch.float16, device=device)


@pytest.mark.parametrize("target", SUITE.compiled, ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_table_of_more_than_2_to_the_31_elements(target: Target, mode: str) -> None:
    rows, dim = 2**24 + 3, 128
    weight = untouched_zeros(rows, dim, target.device)
    last = torch.tensor([rows - 1, rows - 2, rows - 1], device=target.device)
    offsets = torch.tensor([0, 1], device=target.device)
    weight[rows - 2 :] = torch.tensor([[1.0], [3.0]])
    with target.active():
        output = recsys_ops.embedding_bag(last, weight, offsets, mode=mode, backend=target.backend)
    assert output[:, -1].tolist() == {"sum": [3, 4], "mean": [3, 2], "max": [3, 3]}[mode]


@pytest.mark.parametrize("target", SUITE.compiled, ids=str)
def test_sparse_gradient_of_more_than_2_to_the_31_elements(target: Target) -> None:
    rows, dim = 2**24 + 3, 128
    weight = untouched_zeros(rows, dim, target.device).requires_grad_()
    ids = torch.tensor([rows - 1, 5, rows - 1], device=target.device)
    offsets = torch.tensor([0, 1], device=target.device)
    with target.active():
        bags = recsys_ops.embedding_bag(ids, weight, offsets, mode="sum", sparse=True, backend=target.backend)
        bags.sum().backward()
    assert weight.grad is not None
    assert weight.grad.is_coalesced()
    assert weight.grad.indices().tolist() == [[5, rows - 1]]
    assert weight.grad.values()[:, -1].tolist() == [1, 2]

"""HSTU attention passes the correctness suite on every backend of this machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract_suite import ContractSuite
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_ops.hstu_attention.cases import SPEC, HSTUAttentionCase

SUITE = ContractSuite(SPEC)
PARTS = 24


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
def cases(draw: st.DrawFn) -> HSTUAttentionCase:
    """Any call that the operator accepts."""
    lengths = tuple(draw(st.lists(st.integers(0, 150) | st.integers(0, 3), max_size=8)))
    fields: dict[str, Any] = {
        "lengths": lengths,
        "heads": draw(st.integers(0, 3)),
        "dim": draw(st.integers(1, 70)),
        "value_dim": draw(st.integers(1, 70)),
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([0, 0, 1, 5, 64, 200])),
        "contextual": draw(st.sampled_from([0, 0, 1, 7, 40])),
        "targets": draw(st.sampled_from([0, 0, 1, 9, 70])),
        "group": draw(st.sampled_from([1, 1, 2, 5])),
        "intervals": draw(st.sampled_from([0, 0, 1, 3])),
        "position": draw(st.sampled_from(["", "shared", "heads"])),
        "distances": draw(st.sampled_from([1, 21, 401])),
        "time": draw(st.sampled_from(["", "shared", "heads"])),
        "buckets": draw(st.sampled_from([1, 2, 40, 129])),
        "bucketing": draw(st.sampled_from(["log", "sqrt"])),
        "own_times": draw(st.booleans()),
        "unsorted_times": draw(st.booleans()),
        "ages_apart": draw(st.booleans()),
        "wide_tables": draw(st.booleans()),
        "row_scales": draw(st.booleans()),
        "wide_offsets": draw(st.booleans()),
    }
    if fields["window"]:
        fields["tail"] = draw(st.sampled_from([0, 3, 100]))
    fields["queries"] = draw(st.sampled_from(["", "targets", 0, 4, 50])) if lengths else ""
    if isinstance(fields["queries"], int) and draw(st.booleans()):
        fields["cached"] = draw(st.sampled_from(["packed", "slots", "paged"]))
        fields["quantized"] = draw(st.sampled_from(["", "int8", "fp8"]))
    else:
        fields["dropout"] = draw(st.sampled_from([0.0, 0.0, 0.3]))
    return HSTUAttentionCase(**fields)


dtypes, seeds = st.sampled_from(SPEC.dtypes), st.integers(0, 2**16)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(), dtypes, seeds)
def test_drawn_calls(case: HSTUAttentionCase, dtype: torch.dtype, seed: int) -> None:
    SUITE.check_drawn(case, dtype, seed)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(cases(), dtypes, seeds)
def test_many_drawn_calls(case: HSTUAttentionCase, dtype: torch.dtype, seed: int) -> None:
    SUITE.check_drawn(case, dtype, seed)

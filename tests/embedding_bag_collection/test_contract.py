"""The embedding bag collection passes the correctness suite on every backend of this machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract_suite import ContractSuite
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_ops.embedding_bag_collection.cases import SPEC, EmbeddingBagCollectionCase
from recsys_ops.embedding_bag_collection.row_optimizers import OPTIMIZERS
from recsys_ops.embedding_bag_collection.row_quantization import FORMATS

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
def tables(draw: st.DrawFn) -> dict[str, Any]:
    """Fields that any kernel accepts: tables, and the bags of the features that look them up."""
    count, num_features = draw(st.integers(1, 5)), draw(st.integers(1, 4))

    def of_each(drawn: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return tuple(draw(st.lists(drawn, min_size=count, max_size=count)))

    number = st.integers(0, num_features - 1)
    features = of_each(st.lists(number, min_size=1, max_size=3).map(tuple))
    fields: dict[str, Any] = {
        "pooling": of_each(st.sampled_from(["sum", "mean"])),
        "features": features,
        "rows": of_each(st.integers(1, 300)),
        "dims": of_each(st.integers(1, 150)),
        "ids": draw(st.sampled_from(["zipf", "uniform", "equal"])),
        "invalid": draw(st.booleans()),
        "weighted": draw(st.booleans()),
        "tail": draw(st.integers(0, 3)),
        "wide_ids": draw(st.booleans()),
        "wide_offsets": draw(st.booleans()),
        "halves": tuple(sorted(draw(st.sets(st.integers(0, count - 1))))),
    }
    used = 1 + max(f for numbers in features for f in numbers)
    if draw(st.booleans()):
        sizes = draw(st.lists(st.integers(0, 12), min_size=used, max_size=used))
        fields["batch_sizes"] = tuple(sizes)
    else:
        fields["batch"] = draw(st.integers(0, 12))
        sizes = [fields["batch"]] * used
    length = st.integers(0, 40) | st.integers(0, 3)
    fields["lengths"] = tuple(draw(st.lists(length, min_size=sum(sizes), max_size=sum(sizes)))) or None
    return fields


@st.composite
def cases(draw: st.DrawFn) -> EmbeddingBagCollectionCase:
    """Any lookup, with its gradients or an update."""
    fields = draw(tables())
    kind = draw(st.sampled_from(["gradients", "sparse", "max", "none", "update", "quantized"]))
    if kind in ("max", "none"):
        fields["pooling"] = tuple(draw(st.sampled_from([kind, pooling])) for pooling in fields["pooling"])
        fields |= {"weighted": False, "ties": draw(st.booleans())}
    elif kind == "sparse":
        fields["sparse"] = True
    elif kind == "update":
        fields |= {
            "optimizer": draw(st.sampled_from(OPTIMIZERS)),
            "decay": draw(st.sampled_from([None, "weight_decay", "decoupled_weight_decay"])),
            "clipping": draw(st.sampled_from([None, "max_gradient", "max_gradient_norm"])),
            "half_states": draw(st.booleans()),
            "stochastic": draw(st.booleans()),
            "step": draw(st.integers(1, 1000)),
        }
    elif kind == "quantized":
        fields |= {"quantized": draw(st.sampled_from(FORMATS)), "halves": ()}
        fields["dims"] = tuple(2 * dim for dim in fields["dims"])
        fields["batch"] = max(fields.pop("batch_sizes", [fields.get("batch", 0)]))
        fields["lengths"] = None
    return EmbeddingBagCollectionCase(**fields)


dtypes, seeds = st.sampled_from(SPEC.dtypes), st.integers(0, 2**16)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(cases(), dtypes, seeds)
def test_drawn_calls(case: EmbeddingBagCollectionCase, dtype: torch.dtype, seed: int) -> None:
    SUITE.check_drawn(case, dtype, seed)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(cases(), dtypes, seeds)
def test_many_drawn_calls(case: EmbeddingBagCollectionCase, dtype: torch.dtype, seed: int) -> None:
    SUITE.check_drawn(case, dtype, seed)

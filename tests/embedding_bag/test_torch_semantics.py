"""The embedding bag does what torch.nn.functional.embedding_bag does, and these differences are meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import recsys_ops
from recsys_ops.embedding_bag.bad_inputs import BAD_INPUTS
from recsys_ops.embedding_bag.cases import CASES, LARGE, QUICK, SPEC, EmbeddingBagCase
from recsys_ops.testing import BadInput, Inputs, targets
from recsys_ops.testing.execution import Expected, Problem, disagreement, evaluate, one_thread, pose
from recsys_ops.testing.tolerances import first_difference, same

BACKENDS = list(dict.fromkeys(t.backend for t in targets(SPEC.operator)[0] if not t.interpreted))
NAN, INF = float("nan"), float("inf")


def torch_embedding_bag(backend: str | None, bounds: str, sparse: bool, **arguments: Any) -> Tensor:
    return torch.nn.functional.embedding_bag(**arguments)


def torch_is_right(case: EmbeddingBagCase) -> bool:
    """Whether torch takes the case, and on a CPU does what its documentation says.

    In 2.13, entries after the last bag crash its backward, and the frequencies
    that gradients are divided by are those of other rows (pytorch/pytorch#190063).
    """
    refused = (case.mode == "mean" and case.weighted) or (case.two_dim and case.length == 0)
    taken = not refused and not case.invalid
    return taken and case.dim > 0 and not case.tail and not case.scale_grad_by_freq


def by_torch(case: EmbeddingBagCase, problem: Problem) -> Expected:
    results = evaluate(torch_embedding_bag, problem.copy())
    exact = evaluate(torch_embedding_bag, problem.to(torch.float64))
    magnitude = evaluate(torch_embedding_bag, problem.to(torch.float64).absolute(but=case.signed))
    return Expected({name: value.dtype for name, value in results.items()}, results, exact, magnitude)


COMMON = [case for case in dict.fromkeys(QUICK + CASES + LARGE) if torch_is_right(case)]


@pytest.mark.parametrize("case", COMMON, ids=lambda case: case.name)
def test_same_outputs_and_gradients(case: EmbeddingBagCase) -> None:
    overflows_in_torch = case.lengths == (100_000,)
    for dtype in (torch.float32,) if overflows_in_torch else (torch.float32, torch.float16):
        problem = pose(SPEC, case, dtype)
        with one_thread():
            wanted = by_torch(case, problem)
        for backend in BACKENDS:
            fault = disagreement(evaluate(SPEC.function, problem.copy(), backend), wanted)
            assert fault is None, f"{backend}: {fault}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_entries_after_the_last_bag_do_not_count(backend: str, mode: str) -> None:
    table, ids, offsets = torch.randn(5, 3), torch.tensor([4, 0, 1, 2, -1]), torch.tensor([0, 2, 3])
    gradients = []
    for used in (ids, ids[:3]):
        weight = table.clone().requires_grad_()
        output = recsys_ops.embedding_bag(
            used, weight, offsets, mode=mode, include_last_offset=True, backend=backend
        )
        output.sum().backward()
        assert torch.equal(output, torch.nn.functional.embedding_bag(ids[:3], table, offsets[:2], mode=mode))
        gradients.append(weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparse", [False, True])
def test_frequencies_are_those_of_the_batch(backend: str, sparse: bool) -> None:
    ids, gradient = torch.tensor([[1, 1, 2], [1, 4, 0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weight = torch.zeros(5, 2, requires_grad=True)
    looked_up = torch.nn.functional.embedding(ids, weight, scale_grad_by_freq=True).sum(1)
    (wanted,) = torch.autograd.grad(looked_up, weight, gradient)
    given: dict[str, Any] = {"mode": "sum", "scale_grad_by_freq": True, "sparse": sparse}
    output = recsys_ops.embedding_bag(ids, weight, **given, backend=backend)
    (found,) = torch.autograd.grad(output, weight, gradient)
    assert torch.allclose(found.to_dense(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "ids", [[0, 1, 2], [1, 2, 0], [2, 1, 0], [3], [3, 2], [2, 3], [1, 0], [4, 4], [4, 2]]
)
@pytest.mark.parametrize("dtype", SPEC.dtypes)
def test_nan_in_a_maximum(backend: str, ids: list[int], dtype: torch.dtype) -> None:
    """As in torch, a NaN wins as the first entry of its bag, and loses later."""
    table = torch.tensor([[NAN, 1.0], [2.0, NAN], [3.0, 0.0], [NAN, NAN], [-INF, -INF]], dtype=dtype)
    results = []
    for function in (torch.nn.functional.embedding_bag, recsys_ops.embedding_bag):
        weight = table.clone().requires_grad_()
        given = {} if function is torch.nn.functional.embedding_bag else {"backend": backend}
        output = function(torch.tensor(ids), weight, torch.tensor([0]), mode="max", **given)
        output.backward(torch.tensor([[1.0, 2.0]], dtype=dtype))
        results.append((output.detach(), weight.grad))
    (torch_output, torch_gradient), (output, gradient) = results
    assert bool(same(output, torch_output).all())
    assert torch.equal(gradient, torch_gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_first(backend: str) -> None:
    table = torch.tensor([[1.0, 5.0], [1.0, 2.0], [1.0, 5.0]])
    ids, offsets = torch.tensor([1, 0, 2, 2, 0]), torch.tensor([0, 3])
    gradients = []
    for function, given in (
        (torch.nn.functional.embedding_bag, {}),
        (recsys_ops.embedding_bag, {"backend": backend}),
    ):
        weight = table.clone().requires_grad_()
        function(ids, weight, offsets, mode="max", **given).sum().backward()
        gradients.append(weight.grad)
    assert gradients[1].tolist() == [[0, 1], [1, 0], [1, 1]]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_negative_padding_counts_from_the_end(backend: str, mode: str) -> None:
    weight, ids, offsets = torch.randn(5, 3), torch.tensor([1, 3, 3, 0, 3]), torch.tensor([0, 2, 4])
    results = [
        recsys_ops.embedding_bag(ids, weight, offsets, mode=mode, padding_idx=padding_idx, backend=backend)
        for padding_idx in (3, -2)
    ]
    unpadded = recsys_ops.embedding_bag(ids, weight, offsets, mode=mode, backend=backend)
    assert torch.equal(*results)
    assert not torch.equal(results[0], unpadded)
    assert results[0][2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_looked_up_twice_is_renormalized_once(backend: str) -> None:
    tables = [torch.full((3, 4), 10.0) for _ in range(2)]
    ids, offsets = torch.tensor([1, 1, 2]), torch.tensor([0])
    wanted = torch.nn.functional.embedding_bag(ids, tables[0], offsets, max_norm=1.0, mode="sum")
    found = recsys_ops.embedding_bag(ids, tables[1], offsets, max_norm=1.0, mode="sum", backend=backend)
    assert torch.equal(found, wanted)
    assert first_difference(*tables) is None
    assert tables[1][0].tolist() == [10.0] * 4


# The wrong dtype is a TypeError here, and what is wrong whatever the values is a ValueError. An id past
# the table is the same error with max_norm and without.
CLEARER = {
    "weight of integers",
    "input of floats",
    "offsets of floats",
    "weights of another dtype",
    "no last offset",
    "padding above the table",
    "padding below the table",
    *(f"id past the table with max_norm, {mode}" for mode in ("sum", "mean", "max")),
}


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
def test_the_same_type_of_error(bad: BadInput) -> None:
    if bad.name == "unknown bounds":
        pytest.skip("torch has no bounds=")
    arguments = bad.build(Inputs())
    with pytest.raises(Exception) as ours:
        recsys_ops.embedding_bag(**{**arguments, "backend": "reference"})
    with pytest.raises(Exception) as theirs:
        torch.nn.functional.embedding_bag(**bad.build(Inputs()))
    assert (ours.type is not theirs.type) == (bad.name in CLEARER)


@pytest.mark.parametrize("backend", BACKENDS)
def test_difference_bags_of_length_0_give_zeros(backend: str) -> None:
    ids, weight = torch.ones(3, 0, dtype=torch.int64), torch.ones(4, 2)
    assert recsys_ops.embedding_bag(ids, weight, backend=backend).tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_difference_a_mean_may_be_weighted(backend: str) -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    ids, factors = torch.tensor([[0, 1]]), torch.tensor([[2.0, 4.0]])
    with pytest.raises(NotImplementedError):
        torch.nn.functional.embedding_bag(ids, weight, mode="mean", per_sample_weights=factors)
    output = recsys_ops.embedding_bag(ids, weight, mode="mean", per_sample_weights=factors, backend=backend)
    assert output.tolist() == [[(2 + 12) / 2, (4 + 16) / 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_difference_sparse_gradients_are_coalesced(backend: str) -> None:
    ids, offsets = torch.tensor([4, 1, 4, 0]), torch.tensor([0, 2])
    gradients = []
    for function, given in (
        (torch.nn.functional.embedding_bag, {}),
        (recsys_ops.embedding_bag, {"backend": backend}),
    ):
        weight = torch.ones(6, 2, requires_grad=True)
        function(ids, weight, offsets, mode="sum", sparse=True, **given).sum().backward()
        gradients.append(weight.grad)
    theirs, ours = gradients
    assert ours.is_coalesced() and not theirs.is_coalesced()
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert ours.indices().tolist() == [[0, 1, 4]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_gradient_stays_coalesced_however_it_is_received(backend: str) -> None:
    ids, offsets = torch.tensor([4, 1, 4, 0]), torch.tensor([0, 2])

    def pool(weight: Tensor) -> Tensor:
        return recsys_ops.embedding_bag(ids, weight, offsets, mode="sum", sparse=True, backend=backend)

    expected = torch.tensor([[1.0], [1], [0], [0], [2], [0]]).expand(6, 2)
    weight = torch.ones(6, 2, requires_grad=True)
    (received,) = torch.autograd.grad(pool(weight).sum(), weight)
    assert received.is_coalesced() and torch.equal(received.to_dense(), expected)
    assert weight.grad is None

    seen = []  # by an optimizer that runs inside the backward pass
    weight.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad.is_coalesced()))
    pool(weight).sum().backward()
    assert seen == [True] and weight.grad.is_coalesced()

    weight = torch.ones(6, 2, requires_grad=True)
    for times in (1, 2):
        pool(weight).sum().backward()
        assert torch.equal(weight.grad.to_dense(), times * expected)
    weight.grad = None
    (pool(weight) + pool(weight)).sum().backward()
    assert torch.equal(weight.grad.to_dense(), 2 * expected)


def test_sparse_gradient_is_not_copied() -> None:
    weight = torch.ones(6, 2, requires_grad=True)
    addresses = []
    weight.register_hook(lambda gradient: addresses.append(gradient._values().data_ptr()))
    pooled = recsys_ops.embedding_bag(torch.tensor([[4, 1], [4, 0]]), weight, mode="sum", sparse=True)
    pooled.sum().backward()
    assert weight.grad.is_coalesced() and addresses == [weight.grad._values().data_ptr()]

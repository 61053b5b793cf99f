"""Workloads of pooled lookups in one table: what each draws, costs, and should give."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from recsys_ops.benchmarks import draws
from recsys_ops.benchmarks.registry import Check, Inputs, Run, Workload
from recsys_ops.embedding_bag.api import embedding_bag
from recsys_ops.embedding_bag.cost import Cost, backward_cost, forward_cost
from recsys_ops.testing.tolerances import compare

_PADDED = 0.25


@dataclass(frozen=True)
class Case:
    """One kind of lookup."""

    dim: int
    bags: int = 2048
    lengths: tuple[int, int] = (1, 39)  # shortest and longest bag
    rows: int = 1_000_000
    ids: draws.Ids = "zipf"
    dtype: torch.dtype = torch.float32
    mode: str = "sum"
    weighted: bool = False
    padded: bool = False
    matrix: bool = False  # ids [B, L] instead of ids [N] with offsets
    gradient: Literal["sparse", "dense"] | None = None
    weights_gradient: bool = False
    device: str = "cpu"


class Batch(NamedTuple):
    ids: Tensor
    offsets: Tensor | None  # [B + 1], the form that costs no candidate a copy
    weights: Tensor | None
    grad: Tensor | None  # of the output


class Table(NamedTuple):
    weight: Tensor
    padding_idx: int | None


def make_workload(
    name: str,
    case: Case,
    rows_from: Literal["memory", "last-level cache", "cache"] = "cache",
    quick: bool = False,
    timed: Literal["device", "host"] = "device",
) -> Workload:
    """The workload of a case; see ``Workload`` for the arguments."""
    return Workload(
        name=name,
        operator="embedding_bag",
        pass_="step" if case.gradient else "forward",
        conditions=_conditions(case, rows_from) + (", time of the host" if timed == "host" else ""),
        rows_from=rows_from,
        case=case,
        inputs=functools.partial(_inputs, case),
        cost=functools.partial(_cost, case),
        check=functools.partial(_check, case),
        quick=quick,
        timed=timed,
    )


def _conditions(case: Case, rows_from: str) -> str:
    shortest, longest = case.lengths
    lengths = f"{longest}" if case.matrix or shortest == longest else f"{shortest}-{longest}"
    parts = [
        case.mode,
        str(case.dtype).removeprefix("torch."),
        f"B {case.bags}, L {lengths}, table {case.rows:,} x {case.dim}",
        draws.ids_in_words(case.ids),
    ]
    parts += ["per-sample weights"] * case.weighted + [f"{_PADDED:.0%} of the ids padding"] * case.padded
    parts += ["ids as a matrix"] * case.matrix
    if case.gradient:
        parts.append(f"forward and backward, {case.gradient} gradient")
    parts += ["and of the weights"] * case.weights_gradient
    parts.append("caches flushed before every call" if rows_from == "memory" else "caches warm")
    return ", ".join(parts)


def _inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.empty(shape).uniform_(-1, 1, generator=generator).to(case.device, case.dtype)

    draw = draws.ids_of(case.ids, case.rows, generator)
    padding_idx = case.rows // 2 if case.padded else None

    def batch() -> Batch:
        offsets = None
        if case.matrix:
            ids = draw(case.bags * case.lengths[1]).view(case.bags, -1)
        else:
            offsets = draws.offsets_of(case.bags, case.lengths, generator)
            ids = draw(int(offsets[-1]))
        if padding_idx is not None:
            ids[torch.rand(ids.shape, generator=generator) < _PADDED] = padding_idx
        ids, offsets = ids.to(case.device), None if offsets is None else offsets.to(case.device)
        weights = uniform(*ids.shape) if case.weighted else None
        return Batch(ids, offsets, weights, uniform(case.bags, case.dim) if case.gradient else None)

    in_batch = case.bags * (case.lengths[1] if case.matrix else sum(case.lengths) // 2)
    (weight,) = draws.tables(1, case.rows, case.dim, case.dtype, case.device)
    return Inputs(Table(weight, padding_idx), [batch() for _ in range(draws.number_of_batches(in_batch))])


def _cost(case: Case, batch: Batch) -> Cost:
    ids = batch.ids[batch.ids != case.rows // 2] if case.padded else batch.ids
    sizes = (case.bags, ids.numel(), len(ids.unique()), case.dim, case.dtype)
    cost = forward_cost(*sizes, mode=case.mode, weighted=case.weighted)
    if case.gradient:
        cost += backward_cost(
            *sizes,
            num_embeddings=case.rows if case.gradient == "dense" else None,
            mode=case.mode,
            weighted=case.weighted,
            weights_gradient=case.weights_gradient,
        )
    return cost


def _check(case: Case, inputs: Inputs) -> Check:
    """Compares with eager PyTorch in fp64, on the rows that a batch names."""
    table: Table = inputs.state
    dense = replace(case, gradient=case.gradient and "dense")

    @functools.lru_cache(maxsize=2)
    def expected(batch: Batch) -> tuple[Tensor, list[list[Tensor]]]:
        rows, ids = batch.ids.unique(return_inverse=True)
        is_padding = rows == (-1 if table.padding_idx is None else table.padding_idx)
        padding_idx = int(is_padding.nonzero()[0]) if is_padding.any() else None

        def eager(of: Callable[[Tensor], Tensor]) -> list[Tensor]:
            weights, grad = (None if t is None else of(t.to(case.dtype)) for t in (batch.weights, batch.grad))
            weight = of(table.weight[rows].to(case.dtype))
            run = runner(
                functools.partial(embedding_bag, backend="reference"), dense, Table(weight, padding_idx)
            )
            result = run(Batch(ids, batch.offsets, weights, grad))
            return [t for t in (result if case.gradient else (result,)) if t is not None]

        same_precision, exact = eager(lambda t: t), eager(lambda t: t.double())
        return rows, [same_precision, exact, eager(lambda t: t.double().abs())]

    def check(batch: Batch, result: Any) -> str | None:
        rows, references = expected(batch)
        outputs = list(result) if case.gradient else [result]
        if case.gradient:
            found = _gradient_of_rows(outputs[1], rows, sparse=case.gradient == "sparse")
            if isinstance(found, str):
                return found
            outputs[1] = found
        outputs = [t for t in outputs if t is not None]
        if len(outputs) != len(references[0]):
            return f"expected {len(references[0])} results, got {len(outputs)}"
        names = ("output", "gradient of the table", "gradient of the weights")
        for name, output, *reference in zip(names, outputs, *references, strict=False):
            comparison = compare(output.detach(), *(r.detach() for r in reference))
            if not comparison:
                return f"{name}: {comparison.detail}"
        return None

    return check


def _gradient_of_rows(gradient: Tensor | None, rows: Tensor, sparse: bool) -> Tensor | str:
    """The gradient's values on ``rows``, or what is wrong with it elsewhere."""
    if gradient is None or gradient.is_sparse != sparse:
        return f"gradient of the table: expected {'a sparse' if sparse else 'a dense'} one"
    if sparse:
        if not gradient.is_coalesced():  # in fp64, because the candidate has not added its terms yet
            gradient = gradient.double().coalesce().to(gradient.dtype)
        if not torch.equal(gradient.indices()[0], rows):
            return "gradient of the table: expected the rows that the batch names, each once"
        return gradient.values()
    touched = gradient.any(dim=1)
    touched[rows] = False
    if touched.any():
        return f"gradient of the table: expected 0 in row {int(touched.nonzero()[0])}, which no id names"
    return gradient[rows]


def runner(function: Callable[..., Tensor], case: Case, table: Table, coalesce: bool = False) -> Run:
    """A call of ``F.embedding_bag``, or of what has its arguments, with the gradients that the case asks for.

    A step gives the output, the table's gradient, and that of the weights or None.
    """
    options = {
        "mode": case.mode,
        "sparse": case.gradient == "sparse",
        "include_last_offset": not case.matrix,
        "padding_idx": table.padding_idx,
    }
    weight = table.weight

    def forward(batch: Batch) -> Tensor:
        return function(batch.ids, weight, batch.offsets, per_sample_weights=batch.weights, **options)

    if case.gradient is None:
        return forward
    weight = weight.detach().requires_grad_()

    def step(batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        weights = batch.weights
        if weights is not None and case.weights_gradient:
            weights = weights.detach().requires_grad_()
            batch = batch._replace(weights=weights)
        output = forward(batch)
        output.backward(batch.grad)
        gradient, weight.grad = weight.grad, None
        if coalesce and gradient is not None:
            gradient = gradient.coalesce()
        return output, gradient, None if weights is None else weights.grad

    return step

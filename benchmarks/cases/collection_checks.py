"""What lookups in many tables should give, worked out in fp64 on the rows that the batches name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ops.benchmarks.cases.collection_inputs import (
    OPTIMIZERS,
    Batch,
    Case,
    Tables,
    lookups_apart,
    lookups_in_a_row,
)
from recsys_ops.benchmarks.measure import CHECKED_BATCHES
from recsys_ops.benchmarks.registry import Check, Inputs
from recsys_ops.embedding_bag_collection import reference
from recsys_ops.embedding_bag_collection.layout import Layout
from recsys_ops.embedding_bag_collection.row_optimizers import HYPERPARAMETERS, STATES
from recsys_ops.testing.tolerances import compare

T = TypeVar("T")


class Stepped(NamedTuple):
    """What a step gives: its output, and the tables themselves, which later steps go on changing."""

    output: Tensor
    tables: Sequence[Tensor]


def make_check(case: Case, inputs: Inputs) -> Check:
    """Compares with eager PyTorch in fp64, and quantised tables with what they stand for."""
    if case.optimizer:
        return _check_of_steps(case, inputs)
    if case.format:
        return _check_of_quantised(case, inputs)
    return _check_of_forward(case, inputs)


def _remembered(inputs: Inputs, key: Any, work: Callable[[], T]) -> T:
    """What was worked out for another candidate of the same case."""
    found: dict[Any, Any] = inputs.state.expected
    if key not in found:
        found[key] = work()
    result: T = found[key]
    return result


def _pooled(case: Case, inputs: Inputs, batch: Batch, of: Callable[[Tensor], Tensor]) -> Tensor:
    """[B, sum of D] of what ``of`` makes of the rows that each lookup names."""
    tables: Tables = inputs.state
    columns = []
    for table, (ids, offsets) in zip(case.table_of_lookup, lookups_apart(case, batch), strict=True):
        named, ids = ids.unique(return_inverse=True)
        rows = of(tables.weights[table][named].to(case.dtype))
        columns.append(F.embedding_bag(ids, rows, offsets, mode=case.mode, include_last_offset=True))
    return torch.cat(columns, 1)


def _check_of_forward(case: Case, inputs: Inputs) -> Check:
    def pooled(batch: Batch, of: Callable[[Tensor], Tensor], name: str) -> Tensor:
        return _remembered(inputs, (case, batch.number, name), lambda: _pooled(case, inputs, batch, of))

    def check(batch: Batch, output: Tensor) -> str | None:
        if output.dtype not in (torch.float32, case.dtype):
            return f"output: expected dtype float32 or that of the tables, got {output.dtype}"
        eager = pooled(batch, lambda rows: rows.to(output.dtype), str(output.dtype))
        exact = pooled(batch, lambda rows: rows.double(), "exact")
        magnitude = pooled(batch, lambda rows: rows.double().abs(), "magnitude")
        comparison = compare(output, eager, exact, magnitude)
        return None if comparison else f"output: {comparison.detail}"

    return check


def _check_of_quantised(case: Case, inputs: Inputs) -> Check:
    """An element of a row may be off by what its format documents, and sums by their rounding in fp32."""

    def expected(batch: Batch) -> tuple[Tensor, Tensor]:
        exact = _pooled(case, inputs, batch, lambda rows: rows.double())
        error = _pooled(case, inputs, batch, lambda rows: error_of_rows(rows.double(), case))
        return exact, error

    def check(batch: Batch, output: Tensor) -> str | None:
        if output.dtype != torch.float32:
            return f"output: expected dtype float32, got {output.dtype}"
        exact, error = _remembered(inputs, (case, batch.number), lambda: expected(batch))
        if output.shape != exact.shape:
            return f"output: expected shape {list(exact.shape)}, got {list(output.shape)}"
        off = (output.double() - exact).abs()
        beyond = (off > error) | ~off.isfinite()
        if not beyond.any():
            return None
        b, d = beyond.nonzero()[0].tolist()
        return f"output: at [{b}, {d}]: off by {float(off[b, d]):.3g}, {float(error[b, d]):.3g} allowed"

    return check


def error_of_rows(w: Tensor, case: Case) -> Tensor:
    """How far a quantised element may be from what it stands for, see ``recsys_ops.quantize``: [U, D]."""
    largest = w.abs().amax(1, keepdim=True)
    rounding = case.lengths[1] * torch.finfo(torch.float32).eps * largest
    if case.format == "fp8":
        return torch.maximum(w.abs() / 16, 2**-10 * largest / 448) + rounding
    span = w.amax(1, keepdim=True) - w.amin(1, keepdim=True)
    error = span / (2 * (255 if case.format == "int8" else 15)) + rounding
    if case.half_scales:
        error = error + (span + largest) * torch.finfo(torch.float16).eps / 2
    return error.expand_as(w)


class _Replayed(NamedTuple):
    outputs: list[Tensor]
    rows: list[Tensor]  # of each table, those named by any of the batches, after all the steps


def _check_of_steps(case: Case, inputs: Inputs) -> Check:
    """Replays the first steps. All of them have been taken when the first is checked."""
    tables: Tables = inputs.state
    batches = inputs.batches[:CHECKED_BATCHES]
    named = _remembered(inputs, "named", lambda: _rows_named(case, batches))

    def replayed() -> list[_Replayed]:
        ways: list[Callable[[Tensor], Tensor]] = [
            lambda t: t,
            lambda t: t.double(),
            lambda t: t.double().abs(),
        ]
        return [_replay(case, tables, batches, named, of, descend=way != 2) for way, of in enumerate(ways)]

    def check(batch: Batch, result: Stepped) -> str | None:
        references = _remembered(inputs, case, replayed)
        output = result.output.detach()
        eager, exact, magnitude = (r.outputs[batch.number].view(case.bags, -1) for r in references)
        comparison = compare(output, eager, exact, magnitude)
        if not comparison:
            return f"output of step {batch.number + 1}: {comparison.detail}"
        if batch.number < len(batches) - 1:
            return None
        for t, (table, rows) in enumerate(zip(result.tables, named, strict=True)):
            table = table.detach().view(case.rows, case.dim)
            eager, exact, magnitude = (r.rows[t] for r in references)
            comparison = compare(table[rows], eager, exact, magnitude)
            if not comparison:
                return f"rows of table {t}: {comparison.detail}"
            beside = (rows + 1) % case.rows
            beside = beside[~torch.isin(beside, rows)]
            if not torch.equal(table[beside], tables.weights[t][beside].to(table.dtype)):
                return f"rows of table {t}: one that no id names was changed"
        return None

    return check


def _rows_named(case: Case, batches: Sequence[Batch]) -> list[Tensor]:
    ids: list[list[Tensor]] = [[] for _ in range(case.tables)]
    for batch in batches:
        for table, (of_lookup, _) in zip(case.table_of_lookup, lookups_apart(case, batch), strict=True):
            ids[table].append(of_lookup)
    return [torch.cat(of_table).unique() for of_table in ids]


def _replay(
    case: Case,
    tables: Tables,
    batches: Sequence[Batch],
    named: Sequence[Tensor],
    of: Callable[[Tensor], Tensor],
    descend: bool,
) -> _Replayed:
    """The reference on tables of the named rows alone; ``descend`` is False where magnitudes add up."""
    optimizer = OPTIMIZERS[case.optimizer or ""]
    beta1, beta2 = optimizer.defaults["betas"]
    numbers = {**optimizer.defaults, "beta1": beta1, "beta2": beta2}
    numbers["lr"] *= 1 if descend else -1
    hyperparameters = torch.tensor([float(numbers[name]) for name in HYPERPARAMETERS], dtype=torch.float64)
    weights = [of(w[rows].to(case.dtype)) for w, rows in zip(tables.weights, named, strict=True)]
    wide = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    states = [
        w.new_zeros(w.shape[:1] if rowwise else w.shape, dtype=wide)
        for w in weights
        for rowwise in STATES[optimizer.kind].values()
    ]
    of_lookup = case.table_of_lookup
    features = iter(range(len(of_lookup)))
    each = tuple(tuple(next(features) for _ in range(of_lookup.count(t))) for t in range(case.tables))
    layout = Layout(each, (case.mode,) * case.tables, (case.dim,) * case.tables)
    lookups = layout.side_by_side(case.bags).lookups
    step = torch.zeros((), dtype=torch.int64)
    outputs = []
    for batch in batches:
        _, offsets = lookups_in_a_row(case, batch)
        parts = zip(of_lookup, lookups_apart(case, batch), strict=True)
        values = torch.cat([torch.searchsorted(named[table], ids) for table, (ids, _) in parts])
        assert batch.grad is not None
        output = torch.zeros(batch.grad.numel(), dtype=wide, device=case.device)
        bags = (values, offsets, None, lookups, False)
        reference.embedding_bag_collection_forward(output, None, weights, *bags)
        outputs.append(output)
        grad = of(batch.grad).flatten()
        reference.embedding_bag_collection_update(
            weights, states, step, grad, None, *bags, optimizer.kind, hyperparameters, 0, False
        )
    return _Replayed(outputs, weights)

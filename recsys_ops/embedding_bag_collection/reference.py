"""Embedding bags of many tables in eager PyTorch, with explicit gradients and updates: the oracle.

Each function named ``embedding_bag_collection_*`` is one kernel of the contract: every backend
implements these names with these arguments, and the registered operators carry these schemas.

    output, grad_output  [C]     fp32, fp16 or bf16; fp64 with fp64 tables; contiguous
    argmax               [C]     int32: of lookups by maximum, the position in its bag of each cell's source
    weights              of each table [R, D]: fp32, fp16 or bf16, or all of them fp64; any strides
    values               [N]     int32 or int64, the row numbers of all bags, contiguous
    offsets              [G + 1] int32 or int64, where each bag starts in values and where the last ends
    per_sample_weights   [N]     a factor for each entry, fp32, with fp64 tables fp64; contiguous
    lookups              [K, 6]  int64 on the CPU, one row for each lookup
    codes, scales        of each quantised table, see row_quantization.py; contiguous
    states               of each table, see row_optimizers.py, one table's after the other's; contiguous
    drop_invalid         a value outside [0, R) contributes nothing; otherwise it is an error

A lookup is ``table, mode, first_bag, num_bags, start, stride``: the bags [first_bag, first_bag + num_bags)
of ``offsets`` are pooled from a table, by sum (0), mean (1) or maximum (2), and bag b of them goes to
``output[start + b * stride :][:D]``. All lookups of a table have one mode. A bag may belong to several
lookups, or to none. Cells that no lookup writes are left alone.

``offsets`` start at 0, and every bag of a lookup ends within ``values``, not before it starts. They
never decrease, but where bags follow that name entries of earlier ones once more, see ``layout.py``. An
entry is *live* where its value is valid. Sums are formed in fp32, of fp64 tables in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recsys_ops.embedding_bag.reference import (
    LiveEntries,
    accumulate_type,
    dot_products,
    find_live_entries,
    pool,
    pool_maximum,
    row_gradients,
)
from recsys_ops.embedding_bag_collection.row_optimizers import update_rows
from recsys_ops.embedding_bag_collection.row_quantization import dequantize_rows

SUM, MEAN, MAX = range(3)

# The arguments that a kernel changes.
MUTATES = {
    "embedding_bag_collection_forward": ("output", "argmax"),
    "embedding_bag_collection_quantized_forward": ("output",),
    "embedding_bag_collection_update": ("weights", "states", "step"),
}


def embedding_bag_collection_forward(
    output: Tensor,
    argmax: Tensor | None,
    weights: Sequence[Tensor],
    values: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    lookups: Tensor,
    drop_invalid: bool,
) -> None:
    """Write the pooled rows of all lookups, and where maxima came from unless ``argmax`` is None."""
    for lookup in each_lookup(lookups):
        weight = weights[lookup.table]
        bags = _bags_of(lookup, values, offsets, weight.shape[0], drop_invalid)
        if lookup.mode == MAX:
            pooled, position = pool_maximum(weight, bags.live, bags.offsets)
            if argmax is not None:
                _cells(argmax, lookup, weight.shape[1]).copy_(position)
        else:
            factors = bags.part_of(per_sample_weights)
            pooled = pool(weight, bags.live, factors, lookup.mode == MEAN)
        _cells(output, lookup, weight.shape[1]).copy_(pooled)


def embedding_bag_collection_quantized_forward(
    output: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    bits: int,
    values: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    lookups: Tensor,
    drop_invalid: bool,
) -> None:
    """The same from rows of codes of 8 or 4 ``bits`` and their scales, see ``row_quantization.py``."""
    weights = [dequantize_rows(c, s, bits) for c, s in zip(codes, scales, strict=True)]
    embedding_bag_collection_forward(
        output, None, weights, values, offsets, per_sample_weights, lookups, drop_invalid
    )


def embedding_bag_collection_backward(
    grad_output: Tensor,
    argmax: Tensor | None,
    weights: Sequence[Tensor],
    values: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    lookups: Tensor,
    drop_invalid: bool,
) -> list[Tensor]:
    """Gradient of each table, [R, D] dense in its dtype; of ``weights`` only shapes and dtypes matter."""
    gradients = [w.new_zeros(w.shape, dtype=accumulate_type(w.dtype)) for w in weights]
    terms = _terms(grad_output, argmax, weights, values, offsets, per_sample_weights, lookups, drop_invalid)
    for table, (rows, of_entries) in enumerate(terms):
        gradients[table].index_add_(0, rows, of_entries)
    return [g.to(w.dtype) for g, w in zip(gradients, weights, strict=True)]


def embedding_bag_collection_backward_sparse(
    grad_output: Tensor,
    argmax: Tensor | None,
    weights: Sequence[Tensor],
    values: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    lookups: Tensor,
    drop_invalid: bool,
) -> list[Tensor]:
    """The same as touched rows: of each table their numbers, ascending int64 [U], and gradients [U, D]."""
    terms = _terms(grad_output, argmax, weights, values, offsets, per_sample_weights, lookups, drop_invalid)
    result = []
    for weight, (rows, of_entries) in zip(weights, terms, strict=True):
        touched, sums = _sum_by_row(rows, of_entries)
        result += [touched, sums.to(weight.dtype)]
    return result


def embedding_bag_collection_backward_per_sample_weights(
    grad_output: Tensor,
    weights: Sequence[Tensor],
    values: Tensor,
    offsets: Tensor,
    lookups: Tensor,
    drop_invalid: bool,
) -> Tensor:
    """Gradient of the per-sample weights, summed over lookups by sum and mean: [N] in their dtype."""
    wide = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    grad = grad_output.new_zeros(len(values), dtype=wide)
    for lookup in each_lookup(lookups):
        if lookup.mode != MAX:
            weight = weights[lookup.table]
            bags = _bags_of(lookup, values, offsets, weight.shape[0], drop_invalid)
            of_bags = _cells(grad_output, lookup, weight.shape[1])
            dots = dot_products(of_bags, weight, bags.live, lookup.mode == MEAN)
            grad[bags.first + bags.live.positions] += dots
    return grad


def embedding_bag_collection_update(
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    step: Tensor,
    grad_output: Tensor,
    argmax: Tensor | None,
    values: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    lookups: Tensor,
    drop_invalid: bool,
    optimizer: int,
    hyperparameters: Tensor,
    seed: int,
    stochastic_rounding: bool,
) -> None:
    """Count a step and update every touched row once, with its summed gradient; see ``row_optimizers.py``.

    ``states`` are those of each table one after the other, ``step`` is an int64 scalar on the CPU,
    ``hyperparameters`` fp64 on the CPU. Nothing changes where a value is refused.
    """
    terms = _terms(grad_output, argmax, weights, values, offsets, per_sample_weights, lookups, drop_invalid)
    sums = [_sum_by_row(*of_table) for of_table in terms]
    step += 1
    each = len(states) // max(1, len(weights))
    for table, (rows, gradients) in enumerate(sums):
        state = states[table * each : (table + 1) * each]
        update_rows(
            optimizer,
            (weights[table], *state),
            rows,
            gradients,
            hyperparameters,
            int(step),
            (seed, table) if stochastic_rounding else None,
        )


def check_lookups(
    num_rows: Sequence[int], values: Tensor, offsets: Tensor, lookups: Tensor, drop_invalid: bool
) -> None:
    """Raise RuntimeError for offsets that do not describe the bags of a lookup, or a value that is refused.

    ``num_rows`` are those of each table. Reads the values, so on a GPU it waits for them.
    """
    for lookup in each_lookup(lookups):
        _check_values(lookup, values, offsets, num_rows[lookup.table], drop_invalid)


def each_lookup(lookups: Tensor) -> Iterator[Lookup]:
    return (Lookup(*row) for row in lookups.tolist())


class Lookup(NamedTuple):
    """One row of ``lookups``."""

    table: int
    mode: int
    first_bag: int
    num_bags: int
    start: int
    stride: int


class _Bags(NamedTuple):
    """The bags of one lookup as if there were no others."""

    first: int  # where their entries start in values
    offsets: Tensor  # [num_bags + 1] from there
    live: LiveEntries

    def part_of(self, per_sample_weights: Tensor | None) -> Tensor | None:
        return None if per_sample_weights is None else per_sample_weights[self.first :]


def _bags_of(lookup: Lookup, values: Tensor, offsets: Tensor, rows: int, drop_invalid: bool) -> _Bags:
    _check_values(lookup, values, offsets, rows, drop_invalid)
    offsets = offsets[lookup.first_bag : lookup.first_bag + lookup.num_bags + 1]
    first, end = int(offsets[0]), int(offsets[-1])
    offsets = offsets - first
    return _Bags(first, offsets, find_live_entries(values[first:end], offsets, rows, -1, True))


def _check_values(lookup: Lookup, values: Tensor, offsets: Tensor, rows: int, drop_invalid: bool) -> None:
    op = "embedding_bag_collection"
    if (start := int(offsets[0])) != 0:
        raise RuntimeError(f"{op}: expected offsets[0] = 0, got {start}")
    used = offsets[lookup.first_bag : lookup.first_bag + lookup.num_bags + 1]
    decreasing = used[1:] < used[:-1]
    if decreasing.any():
        i = lookup.first_bag + int(decreasing.nonzero()[0])
        raise RuntimeError(
            f"{op}: expected offsets that never decrease, "
            f"got offsets[{i}] = {int(offsets[i])}, offsets[{i + 1}] = {int(offsets[i + 1])}"
        )
    begin, end = int(used[0]), int(used[-1])
    if begin < 0 or end > len(values):
        i = lookup.first_bag + (lookup.num_bags if begin >= 0 else 0)
        raise RuntimeError(
            f"{op}: expected offsets within the {len(values)} values, got offsets[{i}] = {int(offsets[i])}"
        )
    looked_up = values[begin:end]
    invalid = (looked_up < 0) | (looked_up >= rows)
    if not drop_invalid and invalid.any():
        i = begin + int(invalid.nonzero()[0])
        raise RuntimeError(
            f"{op}: expected values in [0, {rows}) for table {lookup.table}, "
            f"got values[{i}] = {int(values[i])}"
        )


def _cells(output: Tensor, lookup: Lookup, dim: int) -> Tensor:
    """The part of an output that a lookup has, [num_bags, D]."""
    return output.as_strided(
        (lookup.num_bags, dim), (lookup.stride, 1), output.storage_offset() + lookup.start
    )


def _terms(
    grad_output: Tensor,
    argmax: Tensor | None,
    weights: Sequence[Tensor],
    values: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    lookups: Tensor,
    drop_invalid: bool,
) -> list[tuple[Tensor, Tensor]]:
    """For each table the rows of its M live entries, and what each adds to the gradient: [M] and [M, D]."""
    rows: list[list[Tensor]] = [[] for _ in weights]
    terms: list[list[Tensor]] = [[] for _ in weights]
    for lookup in each_lookup(lookups):
        weight = weights[lookup.table]
        bags = _bags_of(lookup, values, offsets, weight.shape[0], drop_invalid)
        live = bags.live
        of_bags = _cells(grad_output, lookup, weight.shape[1])
        factors = None if lookup.mode == MAX else bags.part_of(per_sample_weights)
        of_entries = row_gradients(of_bags, live, factors, lookup.mode == MEAN, False)
        if lookup.mode == MAX:
            assert argmax is not None
            winner = _cells(argmax, lookup, weight.shape[1])[live.bags]
            of_entries = of_entries * (winner == (live.positions - bags.offsets[live.bags])[:, None])
        rows[lookup.table].append(live.rows)
        terms[lookup.table].append(of_entries)
    return [
        (torch.cat(r), torch.cat(t))
        if r
        else (values.new_empty(0).long(), grad_output.new_empty(0, w.shape[1]))
        for r, t, w in zip(rows, terms, weights, strict=True)
    ]


def _sum_by_row(rows: Tensor, of_entries: Tensor) -> tuple[Tensor, Tensor]:
    touched, slot = torch.unique(rows, return_inverse=True)
    return touched, of_entries.new_zeros(len(touched), of_entries.shape[1]).index_add_(0, slot, of_entries)

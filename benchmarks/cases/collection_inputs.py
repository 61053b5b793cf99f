"""Lookups in many tables: what workloads of them draw and cost."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from recsys_ops.benchmarks import draws
from recsys_ops.benchmarks.registry import Inputs
from recsys_ops.embedding_bag.cost import Cost
from recsys_ops.embedding_bag_collection.cost import Bags, Pooled, count, forward_cost, update_cost
from recsys_ops.embedding_bag_collection.layout import Layout
from recsys_ops.optim import SGD, Adagrad, Adam, RowOptimizer, RowWiseAdagrad

# Gradients are small whole numbers, whose sums are exact in any order: else updates that divide by
# them would differ widely wherever they almost cancel.
_LARGEST_GRADIENT = 4

OPTIMIZERS: dict[str, RowOptimizer] = {
    "sgd": SGD(lr=0.01, stochastic_rounding=False),
    "adagrad": Adagrad(lr=0.01, stochastic_rounding=False),
    "rowwise_adagrad": RowWiseAdagrad(lr=0.01, stochastic_rounding=False),
    "adam": Adam(lr=0.001, stochastic_rounding=False),
}


@dataclass(frozen=True)
class Case:
    """One kind of lookup; all tables are alike."""

    tables: int
    dim: int
    bags: int = 2048  # of each feature
    lengths: tuple[int, int] = (1, 39)  # shortest and longest bag
    rows: int = 100_000  # of each table
    ids: draws.Ids = "zipf"
    dtype: torch.dtype = torch.float32
    mode: str = "sum"
    features_per_table: int = 1
    tables_per_feature: int = 1
    keyed: Literal["made before", "made in the call"] | None = None  # a KeyedJaggedTensor as input
    optimizer: str | None = None  # of ``OPTIMIZERS``: a training step
    format: str | None = None  # quantised tables
    half_scales: bool = False  # whether their scales are in half precision
    device: str = "cpu"

    @functools.cached_property
    def features(self) -> tuple[tuple[int, ...], ...]:
        """Of each table."""
        if self.tables_per_feature > 1:
            return tuple((t // self.tables_per_feature,) for t in range(self.tables))
        k = self.features_per_table
        return tuple(tuple(range(t * k, (t + 1) * k)) for t in range(self.tables))

    @property
    def num_features(self) -> int:
        return self.tables * self.features_per_table // self.tables_per_feature

    @functools.cached_property
    def table_of_lookup(self) -> list[int]:
        return [t for t, features in enumerate(self.features) for _ in features]

    @property
    def width(self) -> int:
        """Columns of the output."""
        return self.dim * len(self.table_of_lookup)


class Batch(NamedTuple):
    number: int
    values: Tensor
    offsets: Tensor  # [F * B + 1]
    grad: Tensor | None  # of the output
    sizes: tuple[Sequence[Pooled], Bags]


@dataclass(frozen=True)
class Tables:
    weights: Sequence[Tensor]
    expected: dict[Any, Any] = field(default_factory=dict)  # what checks have worked out already


def lookups_apart(case: Case, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Ids and offsets [B + 1] of each lookup alone, table after table."""
    bags, parts = case.bags, []
    bounds = batch.offsets[:: max(1, bags)].tolist()
    for features in case.features:
        for f in features:
            offsets = batch.offsets[f * bags : (f + 1) * bags + 1] - bounds[f]
            parts.append((batch.values[bounds[f] : bounds[f + 1]], offsets))
    return parts


def lookups_in_a_row(case: Case, batch: Batch) -> tuple[Tensor, Tensor]:
    """Ids and offsets [K * B + 1] of K lookups, those of a feature repeated for each of its tables."""
    if case.tables_per_feature == 1:
        return batch.values, batch.offsets
    parts = lookups_apart(case, batch)
    lengths = torch.cat([offsets.diff() for _, offsets in parts])
    return torch.cat([ids for ids, _ in parts]), torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def conditions_of(case: Case, rows_from: str) -> str:
    shortest, longest = case.lengths
    lengths = f"{longest}" if shortest == longest else f"{shortest}-{longest}"
    tables = f"{case.tables} x {case.rows:,} x {case.dim}"
    parts = [
        case.mode,
        case.format or str(case.dtype).removeprefix("torch."),
        f"tables {tables}, B {case.bags}, L {lengths}",
        draws.ids_in_words(case.ids),
    ]
    if case.features_per_table > 1:
        parts.append(f"{case.features_per_table} features of each table")
    if case.tables_per_feature > 1:
        parts.append(f"{case.tables_per_feature} tables of each feature")
    if case.keyed:
        parts.append(f"as a KeyedJaggedTensor {case.keyed}")
    if case.optimizer:
        parts.append(f"forward, backward and update, {case.optimizer.replace('_', ' ')}")
    parts.append("caches flushed before every call" if rows_from == "memory" else "caches warm")
    return ", ".join(parts)


def inputs_of(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    draw = draws.ids_of(case.ids, case.rows, generator)
    weights = draws.tables(case.tables, case.rows, case.dim, case.dtype, case.device)
    layout = Layout(case.features, (case.mode,) * case.tables, (case.dim,) * case.tables)
    lookups = layout.side_by_side(case.bags).lookups

    def batch(number: int) -> Batch:
        offsets = draws.offsets_of(case.num_features * case.bags, case.lengths, generator)
        values = draw(int(offsets[-1]))
        grad = None
        if case.optimizer:
            size = (case.bags, case.width)
            limit = _LARGEST_GRADIENT
            grad = torch.randint(-limit, limit + 1, size, generator=generator).float().to(case.device)
        sizes = count(weights, values, offsets, lookups)
        return Batch(number, values.to(case.device), offsets.to(case.device), grad, sizes)

    ids = case.num_features * case.bags * sum(case.lengths) // 2
    return Inputs(Tables(weights), [batch(number) for number in range(draws.number_of_batches(ids))])


def cost_of(case: Case, batch: Batch) -> Cost:
    tables, bags = batch.sizes
    tables = [replace(table, dtype=case.dtype) for table in tables]
    cost = forward_cost(tables, bags)
    if case.optimizer:
        cost += update_cost(tables, bags, case.optimizer)
    if case.format:
        # Codes, scale and offset of a row; each code is scaled and shifted as it is added.
        row = case.dim // (2 if case.format == "int4" else 1) + (4 if case.half_scales else 8)
        rows = {
            name: getattr(cost, name) // cost.row_bytes * row
            for name in ("unique_row_bytes", "lookup_row_bytes")
        }
        cost = replace(cost, row_bytes=row, flops=3 * cost.flops, **rows)
    return cost

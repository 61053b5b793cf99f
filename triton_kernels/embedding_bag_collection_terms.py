"""The entries of lookups as terms of gradients: sorted by row, and summed run by run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from recsys_ops.triton_kernels import embedding_bag_collection_backward_kernels as kernels
from recsys_ops.triton_kernels.embedding_bag import (
    ASSERTING,
    BAGS,
    ENTRIES,
    EmbeddingBagBackwardConfig,
    accumulate,
    checked,
    launch,
    levels,
    number_type,
)
from recsys_ops.triton_kernels.embedding_bag_collection_plans import EntryPlan, Group, Sharer

LOOKUPS = 128  # whose entries are counted at once


class Touched(NamedTuple):
    """The rows of one group of tables that entries name, in ascending order."""

    keys: Tensor  # [most + 1], from the first to the last touched row, then the dead key
    slots: Tensor  # for each sorted entry, its row's place in keys; ``most`` of a dead one
    most: int  # rows that there can be


class Target(NamedTuple):
    """Where sums go: to new rows, or by a directory to the rows of tables."""

    dim: int
    sums: Tensor | None
    directory: Tensor | None
    dtype: torch.dtype
    alignment: int


@dataclass(frozen=True)
class Terms:
    """What the entries of all lookups add to gradients, as many as there can be, sorted by key."""

    plan: EntryPlan
    grad_output: Tensor
    argmax: Tensor | None
    config: EmbeddingBagBackwardConfig | None
    keys: Tensor  # [num] sorted; the dead key of entries that are dead or do not exist
    order: Tensor  # of each key, the entry that it comes from
    cells: list[Tensor]  # for each sharer: where the bag of an entry has its cells
    factors: Tensor | None  # fp32 or fp64; None: all are 1
    positions: Tensor | None  # in their bags, int32; where there are maxima

    @property
    def num(self) -> int:
        return len(self.keys)

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.promote_types(self.grad_output.dtype, torch.float32)

    def of_kinds(self) -> Iterator[tuple[Group, Sharer]]:
        """What there are launches for."""
        return ((group, sharer) for group in self.plan.groups if self.num for sharer in group.sharers)

    def rows_of(self, group: Group) -> Tensor:
        """The sorted keys, those of other groups dead."""
        if len(self.plan.groups) == 1:
            return self.keys
        of_group = (self.keys >= group.first_key) & (self.keys < group.end_key)
        return torch.where(of_group, self.keys, self.plan.dead_key)

    def touched_rows(self, group: Group) -> Touched:
        rows, most = self.rows_of(group), min(self.num, group.num_rows)
        live = rows < self.plan.dead_key
        starts = torch.cat([live[:1], live[1:] & (rows[1:] != rows[:-1])])
        slots = torch.where(live, starts.cumsum(0) - 1, most)
        keys = rows.new_full((most + 1,), self.plan.dead_key).scatter_(0, slots, rows)
        return Touched(keys, slots, most)

    def sums(self, group: Group, sharer: Sharer, dim: int, touched: Touched, num_rows: int) -> Tensor:
        """The summed gradients of touched rows, [num_rows, D] in fp32 or fp64; undefined after the last."""
        sums = self.grad_output.new_empty(num_rows, dim, dtype=self.sum_dtype)
        target = Target(dim, sums, None, sums.dtype, 1)
        self.sum_runs(group, sharer, target, touched.slots, touched.most)
        return sums

    def sum_runs(self, group: Group, sharer: Sharer, target: Target, rows: Tensor, dead_row: int) -> None:
        """Write the sum of each run of equal rows to its target."""
        if target.dim == 0:
            return
        dtype = self.grad_output.dtype
        config = checked(self.config) or EmbeddingBagBackwardConfig.default(target.dim, dtype, group.is_max)
        terms = self.grad_output
        of_entries: tuple[Tensor | None, ...] = (self.order, self.cells[sharer.number])
        of_entries += (None, self.argmax, self.positions) if group.is_max else (self.factors, None, None)
        for num_terms in levels(len(rows), config.chunk):
            num_chunks = triton.cdiv(num_terms, config.chunk)
            pieces = terms.new_empty(2 * num_chunks, target.dim, dtype=self.sum_dtype)
            targets = rows.new_empty(2 * num_chunks)
            launch(
                kernels.embedding_bag_collection_backward_kernel,
                triton.cdiv(num_chunks, config.chunks_per_program) * triton.cdiv(target.dim, config.block_d),
                pieces,
                targets,
                target.sums,
                target.directory,
                None if target.directory is None else self.plan.pages.get(),
                terms,
                rows,
                *of_entries,
                len(self.plan.first_keys),
                self.plan.page_bits,
                num_terms,
                dead_row,
                D=target.dim,
                DTYPE=in_triton(target.dtype),
                ACCUMULATE=accumulate(self.sum_dtype),
                ALIGNMENT=sharer.alignment,
                ROW_ALIGNMENT=target.alignment,
                BLOCK_D=config.block_d,
                CHUNK=config.chunk,
                CHUNKS=config.chunks_per_program,
                ROWS=config.rows_in_flight,
                num_warps=config.num_warps,
            )
            terms, rows, of_entries = pieces, targets, (None,) * 5


def find_terms(
    plan: EntryPlan,
    grad_output: Tensor,
    argmax: Tensor | None,
    values: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    drop_invalid: bool,
    config: EmbeddingBagBackwardConfig | None,
) -> Terms:
    num = plan.num_entries(offsets, len(values))
    unsorted = values.new_full((num,), plan.dead_key, dtype=number_type(plan.dead_key))
    if num == 0:
        return Terms(plan, grad_output, argmax, config, unsorted, unsorted, [], None, None)
    cells = [values.new_empty(num, dtype=number_type(grad_output.numel())) for _ in plan.lookups]
    factors = positions = None
    if per_sample_weights is not None or plan.has_mean:
        factors = grad_output.new_empty(num, dtype=torch.promote_types(grad_output.dtype, torch.float32))
    if plan.has_max:
        positions = values.new_empty(num, dtype=torch.int32)
    directory, num_lookups, _ = plan.lookups[0]
    starts = values.new_empty(num_lookups, dtype=torch.int64)
    launch(
        kernels.embedding_bag_collection_entry_starts_kernel,
        1,
        *(starts, directory.get(), offsets, num_lookups, len(values), num),
        LOOKUPS=LOOKUPS,
        **ASSERTING,
    )
    for sharer, (directory, num_lookups, programs) in enumerate(plan.lookups):
        of_first = (unsorted, factors, positions) if sharer == 0 else (None,) * 3
        launch(
            kernels.embedding_bag_collection_entries_kernel,
            programs,
            cells[sharer],
            *of_first,
            starts,
            directory.get(),
            values,
            offsets,
            per_sample_weights if sharer == 0 else None,
            num_lookups,
            len(offsets),
            len(values),
            num,
            COUNT=sharer == 0 and (plan.has_mean or not drop_invalid),
            DROP_INVALID=drop_invalid,
            BAGS=BAGS,
            ENTRIES=ENTRIES,
            **ASSERTING,
        )
    keys, order = torch.sort(unsorted, stable=True)
    return Terms(plan, grad_output, argmax, config, keys, order, cells, factors, positions)


def in_triton(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))

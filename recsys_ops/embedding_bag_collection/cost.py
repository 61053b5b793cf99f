"""Bytes and floating-point operations that an embedding bag collection needs at least.

Let table t have N_t ids looked up, in B_t bags, naming U_t distinct rows of R_t [D_t] of s_t bytes
an element (and of S_t bytes of states a row); let the features have N ids of i bytes in G bags, and
outputs, their gradients and per-sample weights have o bytes an element. Sums over t of:

    forward           rows at random addresses   U_t D_t s_t once each, N_t D_t s_t looked up
                      streamed                   B_t D_t o
                      operations                 N_t D_t, weighted 2 N_t D_t; mean B_t D_t more
    backward          rows at random addresses   B_t D_t o (of the output's gradient), N_t D_t o looked up
                      sparse, streamed           U_t D_t s_t + 8 U_t, the gradient's values and row numbers
                      dense, zeroed              R_t D_t s_t, the whole gradient, touched rows included
                      operations                 as forward
    update            rows at random addresses   as backward, and 2 U_t (D_t s_t + S_t), read and written
                      operations                 as forward, and for each element of U_t rows those of the
                                                 optimizer, see ``OPERATIONS``

and once, streamed in each of them: (N + G + 1) i, weighted N o more. So a feature that several tables
look up is read once. The maximum compares instead of adding; its backward adds B_t D_t elements, looks
up none twice, and reads 4 B_t D_t bytes that say where maxima came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
from torch import Tensor

from recsys_ops.embedding_bag.cost import Cost, pooling_flops
from recsys_ops.embedding_bag_collection.reference import MAX, MEAN, each_lookup
from recsys_ops.embedding_bag_collection.row_optimizers import OPTIMIZERS, STATES

# For an element of a row: squares, sums, roots, quotients; what a row needs once is not counted.
OPERATIONS = {"sgd": 2, "adagrad": 7, "rowwise_adagrad": 4, "adam": 14, "partial_rowwise_adam": 9, "lamb": 18}


@dataclass(frozen=True)
class Pooled:
    """What the lookups of one table do together.

    Args:
        num_bags: B_t.
        num_ids: N_t, those that contribute.
        num_unique: U_t, distinct rows among them.
        dim: D_t.
        dtype: of the table.
        mode: "sum", "mean" or "max".
        num_embeddings: R_t; only a dense gradient costs more of a larger table.
    """

    num_bags: int
    num_ids: int
    num_unique: int
    dim: int
    dtype: torch.dtype = torch.float32
    mode: str = "sum"
    num_embeddings: int = 0

    @property
    def row_bytes(self) -> int:
        return self.dim * self.dtype.itemsize


@dataclass(frozen=True)
class Bags:
    """The bags of all features together.

    Args:
        num_ids: N.
        num_bags: G.
        index_bytes: of one id and one offset, 4 or 8.
        output_bytes: of one element of the output, 4, or 2 or 8.
        weighted: whether there are per-sample weights.
    """

    num_ids: int
    num_bags: int
    index_bytes: int = 8
    output_bytes: int = 4
    weighted: bool = False

    @property
    def streamed_bytes(self) -> int:
        """Ids, offsets and weights."""
        weights = self.num_ids * max(4, self.output_bytes) if self.weighted else 0
        return (self.num_ids + self.num_bags + 1) * self.index_bytes + weights


def forward_cost(tables: Sequence[Pooled], bags: Bags) -> Cost:
    """Cost of pooling; the formula is in the module's docstring.

    Example:
        >>> small, large = Pooled(2, 4, 3, dim=2), Pooled(2, 2, 2, dim=8)
        >>> cost = forward_cost([small, large], Bags(num_ids=6, num_bags=4))
        >>> cost.unique_row_bytes, cost.streamed_bytes, cost.flops
        (88, 168, 24)
    """
    return _sum(
        bags,
        [
            Cost(
                flops=pooling_flops(t.num_bags, t.num_ids, t.dim, t.mode, bags.weighted),
                row_bytes=t.row_bytes,
                unique_row_bytes=t.num_unique * t.row_bytes,
                lookup_row_bytes=t.num_ids * t.row_bytes,
                streamed_bytes=t.num_bags * t.dim * bags.output_bytes,
            )
            for t in tables
        ],
    )


def backward_cost(tables: Sequence[Pooled], bags: Bags, *, sparse: bool = False) -> Cost:
    """Cost of the gradients, dense or sparse; the formula is in the module's docstring."""
    costs = []
    for t in tables:
        written = t.num_unique * (t.row_bytes + 8) if sparse else 0
        gathered = _gathering(t, bags)
        costs.append(
            replace(
                gathered,
                streamed_bytes=gathered.streamed_bytes + written,
                zeroed_bytes=0 if sparse else t.num_embeddings * t.row_bytes,
            )
        )
    return _sum(bags, costs)


def update_cost(
    tables: Sequence[Pooled], bags: Bags, optimizer: str, *, state_dtype: torch.dtype = torch.float32
) -> Cost:
    """Cost of the gradients and the update of the touched rows; the formula is in the module's docstring.

    Args:
        tables, bags: of the lookup.
        optimizer: one of ``row_optimizers.OPTIMIZERS``.
        state_dtype: of its states.
    """
    states = STATES[OPTIMIZERS.index(optimizer)].values()
    costs = []
    for t in tables:
        of_state = sum(1 if rowwise else t.dim for rowwise in states) * state_dtype.itemsize
        row = t.row_bytes + of_state
        changed = Cost(
            flops=t.num_unique * t.dim * OPERATIONS[optimizer],
            row_bytes=row,
            unique_row_bytes=2 * t.num_unique * row,
            lookup_row_bytes=2 * t.num_unique * row,
            streamed_bytes=0,
        )
        costs.append(_gathering(t, bags) + changed)
    return _sum(bags, costs)


def count(
    weights: Sequence[Tensor], values: Tensor, offsets: Tensor, lookups: Tensor
) -> tuple[list[Pooled], Bags]:
    """What a call of the kernels with these arguments does, without weights and with outputs in fp32."""
    ids: list[list[Tensor]] = [[] for _ in weights]
    bags, modes = [0] * len(weights), ["sum"] * len(weights)
    for lookup in each_lookup(lookups):
        first, end = (int(offsets[lookup.first_bag + n]) for n in (0, lookup.num_bags))
        ids[lookup.table].append(values[first:end])
        bags[lookup.table] += lookup.num_bags
        modes[lookup.table] = {MEAN: "mean", MAX: "max"}.get(lookup.mode, "sum")
    tables = []
    for weight, looked_up, num_bags, mode in zip(weights, ids, bags, modes, strict=True):
        every = torch.cat([values[:0], *looked_up])
        live = every[(every >= 0) & (every < weight.shape[0])]
        unique = len(live.unique())
        rows, dim = weight.shape
        tables.append(Pooled(num_bags, len(live), unique, dim, weight.dtype, mode, rows))
    return tables, Bags(len(values), len(offsets) - 1, values.element_size())


def _gathering(t: Pooled, bags: Bags) -> Cost:
    """Of adding the output's gradient up to rows."""
    row = t.dim * bags.output_bytes
    gathered = t.num_bags if t.mode == "max" else t.num_ids
    return Cost(
        flops=pooling_flops(t.num_bags, gathered, t.dim, t.mode, bags.weighted),
        row_bytes=row,
        unique_row_bytes=t.num_bags * row,
        lookup_row_bytes=gathered * row,
        streamed_bytes=4 * t.num_bags * t.dim if t.mode == "max" else 0,
    )


def _sum(bags: Bags, costs: Sequence[Cost]) -> Cost:
    total = reduce(add, costs)
    return replace(total, streamed_bytes=total.streamed_bytes + bags.streamed_bytes)

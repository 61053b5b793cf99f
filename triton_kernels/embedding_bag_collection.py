"""Lookups in many tables on the GPU: gather and pool forward, sort, sum runs and update backward.

The functions named ``embedding_bag_collection_*`` are the kernels of the contract in
``recsys_ops/embedding_bag_collection/reference.py``. As in ``embedding_bag.py``, on which this builds,
every sum has a fixed order, nothing is atomic, and nothing waits for the GPU, except that sparse
gradients must learn how many rows they have.

How lookups are spread over launches is a plan of ``embedding_bag_collection_plans.py``. It depends on
``lookups`` and where the tables are, but not on values, and is kept, so that a step like the one
before copies nothing to the GPU.

Backward, all entries get a key: the number of their row among the rows of all tables. One sort by
key makes the entries of a row a run, and a launch for each kind of table sums the runs of that kind.
Tables that are looked up by the same bags, and have as many rows, share keys and sort. An update
sums into new rows, as many as there can be touched ones, and a last launch applies these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cache
from math import gcd, inf
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from recsys_ops.embedding_bag_collection.reference import Lookup, check_lookups, each_lookup
from recsys_ops.embedding_bag_collection.row_optimizers import (
    ADAGRAD,
    ADAM,
    LAMB,
    PARTIAL_ROWWISE_ADAM,
    ROWWISE_ADAGRAD,
)
from recsys_ops.triton_kernels import embedding_bag_collection_backward_kernels as backward_kernels
from recsys_ops.triton_kernels import embedding_bag_collection_kernels as kernels
from recsys_ops.triton_kernels.embedding_bag import (
    ASSERTING,
    LANES,
    EmbeddingBagBackwardConfig,
    EmbeddingBagForwardConfig,
    accumulate,
    checked,
    launch,
)
from recsys_ops.triton_kernels.embedding_bag_collection_plans import (
    Strided,
    Table,
    entry_plan,
    pooling_plan,
    table_directory,
)
from recsys_ops.triton_kernels.embedding_bag_collection_terms import Target, find_terms, in_triton

# Arguments of the update that are numbers.
NUMBERS = (
    *("lr", "eps", "of_first_moment", "of_second_moment", "first_correction", "second_correction"),
    *("weight_decay", "decoupled_weight_decay", "max_gradient", "max_gradient_norm"),
)


@dataclass(frozen=True)
class EmbeddingBagCollectionUpdateConfig:
    """A tile of the update: touched rows, all their columns."""

    rows_per_program: int
    num_warps: int = 1

    @property
    def is_valid(self) -> bool:
        return all(n > 0 and n & (n - 1) == 0 for n in astuple(self)) and self.num_warps * LANES <= 1024

    @classmethod
    @cache
    def default(cls, dim: int, lanes: int = LANES) -> EmbeddingBagCollectionUpdateConfig:
        """Four columns for each lane, or as many as it takes where rows are long."""
        block_d = triton.next_power_of_2(dim)
        return cls(max(1, 4 * lanes // block_d), min(16, max(1, block_d // (8 * lanes))))


def embedding_bag_collection_forward(
    output: Tensor,
    argmax: Tensor | None,
    weights: Sequence[Tensor],
    values: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    lookups: Tensor,
    drop_invalid: bool,
    *,
    config: EmbeddingBagForwardConfig | None = None,
) -> None:
    """Write the pooled rows of all lookups, and where maxima came from unless ``argmax`` is None."""
    found = _checked(weights, values, offsets, lookups, drop_invalid)
    tables = _tables(weights)
    for pooling in pooling_plan(values.device, found, tables, False, checked(config)):
        launch(
            kernels.embedding_bag_collection_forward_kernel,
            pooling.programs,
            output,
            argmax if pooling.is_max else None,
            pooling.directory.get(),
            values,
            offsets,
            None if pooling.is_max else per_sample_weights,
            pooling.num_lookups,
            len(offsets),
            len(values),
            DTYPE=in_triton(pooling.dtype),
            MAXIMUM=pooling.is_max,
            COUNT=pooling.has_mean or not drop_invalid,
            DROP_INVALID=drop_invalid,
            ACCUMULATE=accumulate(pooling.dtype),
            **pooling.constants,
            **ASSERTING,
        )


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
    *,
    config: EmbeddingBagForwardConfig | None = None,
) -> None:
    """The same from rows of codes of 8 or 4 ``bits`` and their scales, see ``row_quantization.py``."""
    found = _checked(codes, values, offsets, lookups, drop_invalid)
    per_byte = 8 // bits
    tables = tuple(
        Table(c.shape[0], c.shape[1] * per_byte, c.dtype, Strided.of(c), Strided.of(s), per_byte)
        for c, s in zip(codes, scales, strict=True)
    )
    for pooling in pooling_plan(values.device, found, tables, False, checked(config)):
        launch(
            kernels.embedding_bag_collection_quantized_forward_kernel,
            pooling.programs,
            output,
            pooling.directory.get(),
            values,
            offsets,
            None if pooling.is_max else per_sample_weights,
            pooling.num_lookups,
            len(offsets),
            len(values),
            BITS=bits,
            IS_FLOAT=pooling.dtype.is_floating_point,
            MAXIMUM=pooling.is_max,
            COUNT=pooling.has_mean or not drop_invalid,
            DROP_INVALID=drop_invalid,
            **pooling.constants,
            **ASSERTING,
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
    *,
    config: EmbeddingBagBackwardConfig | None = None,
) -> list[Tensor]:
    """Gradient of each table, [R, D] dense in its dtype; of ``weights`` only shapes and dtypes matter."""
    found = _checked(weights, values, offsets, lookups, drop_invalid)
    gradients = [w.new_zeros(w.shape) for w in weights]
    kinds = tuple((w.shape[1], str(w.dtype)) for w in weights)
    plan = entry_plan(values.device, found, _lengths(weights), kinds)
    terms = find_terms(plan, grad_output, argmax, values, offsets, per_sample_weights, drop_invalid, config)
    places = tuple((Strided.of(g),) for g in gradients)
    for group, sharer in terms.of_kinds():
        directory = table_directory(values.device, plan, sharer.number, places)
        alike = [gradients[table] for table in sharer.tables.values()]
        alignment = gcd(*(Strided.of(g).alignment(g.shape[1]) for g in alike))
        target = Target(alike[0].shape[1], None, directory.get(), alike[0].dtype, alignment)
        terms.sum_runs(group, sharer, target, terms.rows_of(group), plan.dead_key)
    return gradients


def embedding_bag_collection_backward_sparse(
    grad_output: Tensor,
    argmax: Tensor | None,
    weights: Sequence[Tensor],
    values: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    lookups: Tensor,
    drop_invalid: bool,
    *,
    config: EmbeddingBagBackwardConfig | None = None,
) -> list[Tensor]:
    """The same as touched rows: of each table their numbers, ascending int64 [U], and gradients [U, D]."""
    found = _checked(weights, values, offsets, lookups, drop_invalid)
    kinds = tuple((w.shape[1],) for w in weights)
    plan = entry_plan(values.device, found, _lengths(weights), kinds)
    terms = find_terms(plan, grad_output, argmax, values, offsets, per_sample_weights, drop_invalid, config)
    parts = [(values.new_empty(0, dtype=torch.int64), w.new_empty(0, w.shape[1])) for w in weights]
    for group in plan.groups if terms.num else ():
        touched = terms.touched_rows(group)
        first_keys = [plan.first_keys[s] for s in group.sharers[0].tables]
        ends = torch.searchsorted(
            touched.keys, touched.keys.new_tensor([*first_keys, group.end_key])
        ).tolist()
        for sharer in group.sharers:
            dim = weights[next(iter(sharer.tables.values()))].shape[1]
            sums = terms.sums(group, sharer, dim, touched, ends[-1])
            for i, (s, table) in enumerate(sharer.tables.items()):
                part = slice(ends[i], ends[i + 1])
                rows = touched.keys[part].long() - plan.first_keys[s]
                parts[table] = rows, sums[part].to(weights[table].dtype, copy=True)
    return [tensor for part in parts for tensor in part]


def embedding_bag_collection_backward_per_sample_weights(
    grad_output: Tensor,
    weights: Sequence[Tensor],
    values: Tensor,
    offsets: Tensor,
    lookups: Tensor,
    drop_invalid: bool,
    *,
    config: EmbeddingBagForwardConfig | None = None,
) -> Tensor:
    """Gradient of the per-sample weights, summed over lookups by sum and mean: [N] in their dtype."""
    found = _checked(weights, values, offsets, lookups, drop_invalid)
    wide = torch.promote_types(grad_output.dtype, torch.float32)
    grad = grad_output.new_zeros(len(values), dtype=wide)
    for pooling in pooling_plan(values.device, found, _tables(weights), True, checked(config)):
        launch(
            kernels.embedding_bag_collection_backward_per_sample_weights_kernel,
            pooling.programs,
            grad,
            grad_output,
            pooling.directory.get(),
            values,
            offsets,
            pooling.num_lookups,
            len(offsets),
            len(values),
            DTYPE=in_triton(pooling.dtype),
            COUNT=pooling.has_mean or not drop_invalid,
            DROP_INVALID=drop_invalid,
            ACCUMULATE=accumulate(wide),
            **pooling.constants,
            **ASSERTING,
        )
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
    *,
    config: EmbeddingBagBackwardConfig | None = None,
    update_config: EmbeddingBagCollectionUpdateConfig | None = None,
) -> None:
    """Count a step and update every touched row once, with its summed gradient; see ``row_optimizers.py``."""
    found = _checked(weights, values, offsets, lookups, drop_invalid)
    if update_config is not None and not update_config.is_valid:
        raise ValueError(f"embedding_bag_collection: expected a valid configuration, got {update_config}")
    step += 1
    each = len(states) // max(1, len(weights))
    tensors = [(w, *states[t * each : (t + 1) * each]) for t, w in enumerate(weights)]
    places = tuple(tuple(map(Strided.of, of_table)) for of_table in tensors)
    kinds = tuple(
        (w.shape[1], *(str(tensor.dtype) for tensor in of_table), all(p.column_stride == 1 for p in place))
        for w, of_table, place in zip(weights, tensors, places, strict=True)
    )
    plan = entry_plan(values.device, found, _lengths(weights), kinds)
    terms = find_terms(plan, grad_output, argmax, values, offsets, per_sample_weights, drop_invalid, config)
    numbers = formula(optimizer, hyperparameters, int(step))
    for group in plan.groups if terms.num else ():
        touched = terms.touched_rows(group)
        for sharer in group.sharers:
            table, *_ = sharer.tables.values()
            dim = weights[table].shape[1]
            if dim == 0:
                continue
            sums = terms.sums(group, sharer, dim, touched, touched.most)
            chosen = update_config or EmbeddingBagCollectionUpdateConfig.default(dim)
            dtypes = [in_triton(tensor.dtype) for tensor in tensors[table]]
            dtypes += [tl.float32] * (3 - len(dtypes))
            places_of_group = [places[t] for t in sharer.tables.values()]
            launch(
                backward_kernels.embedding_bag_collection_update_kernel,
                triton.cdiv(touched.most, chosen.rows_per_program),
                sums,
                touched.keys,
                table_directory(values.device, plan, sharer.number, places).get(),
                plan.pages.get(),
                len(plan.first_keys),
                plan.page_bits,
                touched.most,
                plan.dead_key,
                _mix(int(step) + _mix(seed)),
                **numbers,
                DTYPE=dtypes[0],
                FIRST_DTYPE=dtypes[1],
                SECOND_DTYPE=dtypes[2],
                STOCHASTIC=stochastic_rounding,
                UNIT_COLUMNS=all(p.column_stride == 1 for place in places_of_group for p in place),
                ALIGNMENT=gcd(
                    *(p.alignment(dim) for place in places_of_group for p in place[: 3 - numbers["ROWWISE"]])
                ),
                ACCUMULATE=accumulate(sums.dtype),
                D=dim,
                BLOCK_D=triton.next_power_of_2(dim),
                ROWS=chosen.rows_per_program,
                num_warps=chosen.num_warps,
            )


def _checked(
    tables: Sequence[Tensor], values: Tensor, offsets: Tensor, lookups: Tensor, drop_invalid: bool
) -> tuple[Lookup, ...]:
    """The lookups; on a CPU, where the interpreter runs, values are checked first."""
    if values.is_cpu:
        check_lookups(_lengths(tables), values, offsets, lookups, drop_invalid)
    return tuple(each_lookup(lookups))


def _lengths(tables: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(table.shape[0] for table in tables)


def _tables(weights: Sequence[Tensor]) -> tuple[Table, ...]:
    return tuple(Table(w.shape[0], w.shape[1], w.dtype, Strided.of(w)) for w in weights)


def formula(optimizer: int, hyperparameters: Tensor, step: int) -> dict[str, Any]:
    """What an optimizer's numbers and kind make of the arguments of the kernel."""
    lr, eps, beta1, beta2, weight_decay, decoupled, max_gradient, max_norm = hyperparameters.tolist()
    corrections = (1 - beta1**step, 1 - beta2**step)
    numbers = (lr, eps, 1 - beta1, 1 - beta2, *corrections, weight_decay, decoupled, max_gradient, max_norm)
    return {
        **dict(zip(NUMBERS, numbers, strict=True)),
        "HAS_SUM": optimizer in (ADAGRAD, ROWWISE_ADAGRAD),
        "HAS_MOMENTS": optimizer in (ADAM, PARTIAL_ROWWISE_ADAM, LAMB),
        "ROWWISE": optimizer in (ROWWISE_ADAGRAD, PARTIAL_ROWWISE_ADAM),
        "TRUST": optimizer == LAMB,
        "CLIP": max_gradient != inf,
        "CLIP_NORM": max_norm != inf,
    }


def _mix(x: int) -> int:
    """The finaliser of MurmurHash3."""
    x &= 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16

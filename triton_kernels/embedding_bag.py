"""Embedding bag on the GPU: gather and pool forward, sort and sum runs backward.

The functions named ``embedding_bag_*`` are the kernels of the contract in
``recsys_ops/embedding_bag/reference.py``. Every sum has a fixed order and nothing is
atomic, so results are the same bits in every run. Nothing waits for the GPU, except that
the sparse gradient must learn how many rows it has.

Backward, each of the N entries gets the number of its row as a key, a dead entry the
number of rows. Sorted stably by key, the entries of a row form a run. Programs sum chunks
of fixed length; a run that crosses chunks leaves at most two pieces in each, and the pieces
are the sorted terms of the next level, until one chunk holds all. How many levels there are
follows from N alone, so a CUDA graph can hold them. PyTorch sorts at most 2**31 - 1 entries.

On a GPU, a bad index or offset fails an assertion in the kernel, as in PyTorch, and is
never used as an address. On a CPU, where the interpreter runs, the host checks.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from recsys_ops.embedding_bag.reference import check_values
from recsys_ops.triton_kernels import embedding_bag_kernels as kernels

LANES = 64 if torch.version.hip else 32
_VECTOR_BYTES = 16
BAGS, ENTRIES = 8, 32  # the tile in which entries are found
# Of one launch. CUDA limits the blocks of a grid, HIP its threads, and a block has up to 1024.
MAX_PROGRAMS = (2**32 - 1) // 1024 if torch.version.hip else 2**31 - 1
# Compile assertions in, but not the checks of integer arithmetic that come with them.
ASSERTING = {"debug": True, "sanitize_overflow": False}


@dataclass(frozen=True)
class EmbeddingBagForwardConfig:
    """A tile of the forward: columns, bags, and rows of each bag loaded before any is added."""

    block_d: int
    bags_per_program: int
    rows_in_flight: int = 8
    num_warps: int = 1

    @property
    def is_valid(self) -> bool:
        return _are_powers_of_two(self) and _fits_registers(
            self.block_d * self.bags_per_program * self.rows_in_flight, self.num_warps
        )

    @classmethod
    @cache
    def default(cls, dim: int, dtype: torch.dtype, lanes: int = LANES) -> EmbeddingBagForwardConfig:
        """One warp, each lane loading 16 bytes of a row: of one bag, or of several where rows are short."""
        return cls(*tile_of_a_warp(dim, dtype, lanes))


@dataclass(frozen=True)
class EmbeddingBagBackwardConfig:
    """A tile of the backward: columns, chunks of sorted entries, their length, and rows in flight of each."""

    block_d: int
    chunks_per_program: int
    chunk: int = 32
    rows_in_flight: int = 8
    num_warps: int = 1

    @property
    def is_valid(self) -> bool:
        return (
            _are_powers_of_two(self)
            and self.chunk >= 4  # for two pieces of each to be fewer than the terms
            and self.rows_in_flight <= self.chunk
            and _fits_registers(self.block_d * self.chunks_per_program * self.rows_in_flight, self.num_warps)
        )

    @classmethod
    @cache
    def default(
        cls, dim: int, dtype: torch.dtype, maximum: bool = False, lanes: int = LANES
    ) -> EmbeddingBagBackwardConfig:
        """As in the forward, chunks in the place of bags; of a maximum, positions fly beside the values."""
        return cls(*tile_of_a_warp(dim, dtype, lanes), rows_in_flight=4 if maximum else 8)


_Config = TypeVar("_Config", EmbeddingBagForwardConfig, EmbeddingBagBackwardConfig)


def tile_of_a_warp(dim: int, dtype: torch.dtype, lanes: int) -> tuple[int, int]:
    """Columns of a row, and rows side by side, that a warp loads by one instruction."""
    vector = _VECTOR_BYTES // dtype.itemsize
    columns = min(triton.next_power_of_2(dim), lanes * vector)
    return columns, lanes // triton.cdiv(columns, vector)


def _are_powers_of_two(config: EmbeddingBagForwardConfig | EmbeddingBagBackwardConfig) -> bool:
    return all(n > 0 and n & (n - 1) == 0 for n in astuple(config))


def _fits_registers(elements: int, num_warps: int) -> bool:
    return num_warps * LANES <= 1024 and elements <= 128 * LANES * num_warps


def checked(config: _Config | None) -> _Config | None:
    if config is not None and not config.is_valid:
        raise ValueError(f"embedding_bag: expected a valid configuration, got {config}")
    return config


def embedding_bag_forward(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mean: bool,
    padding_idx: int,
    include_last_offset: bool,
    drop_invalid: bool,
    *,
    config: EmbeddingBagForwardConfig | None = None,
) -> Tensor:
    """Sum or mean of each bag, [B, D]."""
    bags = _Bags(indices, offsets, weight.shape[0], padding_idx, include_last_offset, drop_invalid)
    output = weight.new_empty(bags.num_bags, weight.shape[1])
    _pool(
        kernels.embedding_bag_forward_kernel, (output,), weight, bags, config, per_sample_weights, MEAN=mean
    )
    return output


def embedding_bag_max_forward(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    padding_idx: int,
    include_last_offset: bool,
    drop_invalid: bool,
    *,
    config: EmbeddingBagForwardConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Maximum of each bag, [B, D], and where it is: the position within the bag, int32 [B, D]."""
    bags = _Bags(indices, offsets, weight.shape[0], padding_idx, include_last_offset, drop_invalid)
    output = weight.new_empty(bags.num_bags, weight.shape[1])
    argmax = torch.empty_like(output, dtype=torch.int32)
    _pool(kernels.embedding_bag_max_forward_kernel, (output, argmax), weight, bags, config)
    return output, argmax


def embedding_bag_backward(
    grad_output: Tensor,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    argmax: Tensor | None,
    num_embeddings: int,
    mean: bool,
    padding_idx: int,
    include_last_offset: bool,
    drop_invalid: bool,
    scale_grad_by_freq: bool,
    *,
    config: EmbeddingBagBackwardConfig | None = None,
) -> Tensor:
    """Gradient of the weight, [R, D] dense; with ``argmax`` that of the maximum."""
    bags = _Bags(indices, offsets, num_embeddings, padding_idx, include_last_offset, drop_invalid)
    entries = _find_entries(bags, per_sample_weights, mean, scale_grad_by_freq, grad_output.dtype)
    rows, order = _sort(entries, scale_grad_by_freq)
    grad = grad_output.new_zeros(num_embeddings, grad_output.shape[1])
    _sum_runs(grad, grad_output, rows, order, entries, argmax, offsets, config)
    return grad


def embedding_bag_backward_sparse(
    grad_output: Tensor,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    num_embeddings: int,
    mean: bool,
    padding_idx: int,
    include_last_offset: bool,
    drop_invalid: bool,
    scale_grad_by_freq: bool,
    *,
    config: EmbeddingBagBackwardConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of the weight as its U touched rows in ascending order: int64 [U] and [U, D]."""
    bags = _Bags(indices, offsets, num_embeddings, padding_idx, include_last_offset, drop_invalid)
    entries = _find_entries(bags, per_sample_weights, mean, scale_grad_by_freq, grad_output.dtype)
    rows, order = _sort(entries, scale_grad_by_freq)
    live = rows < num_embeddings
    starts = live.clone()
    starts[1:] &= rows[1:] != rows[:-1]
    touched = rows[starts].long()
    slots = torch.where(live, starts.cumsum(0) - 1, len(touched))
    values = grad_output.new_empty(len(touched), grad_output.shape[1])
    _sum_runs(values, grad_output, slots, order, entries, None, offsets, config)
    return touched, values


def embedding_bag_backward_per_sample_weights(
    grad_output: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    mean: bool,
    padding_idx: int,
    include_last_offset: bool,
    drop_invalid: bool,
    *,
    config: EmbeddingBagForwardConfig | None = None,
) -> Tensor:
    """Gradient of the per-sample weights, [N]; 0 where an entry is not live."""
    num_embeddings, dim = weight.shape
    bags = _Bags(indices, offsets, num_embeddings, padding_idx, include_last_offset, drop_invalid)
    entries = _find_entries(bags, None, mean, False, weight.dtype)
    if dim == 0:
        return weight.new_zeros(len(indices))
    grad = weight.new_empty(len(indices))
    config = checked(config) or EmbeddingBagForwardConfig.default(dim, weight.dtype)
    block = config.bags_per_program * config.rows_in_flight
    launch(
        kernels.embedding_bag_backward_per_sample_weights_kernel,
        triton.cdiv(len(indices), block),
        grad,
        grad_output,
        weight,
        entries.keys,
        entries.bags,
        entries.factors,
        len(indices),
        num_embeddings,
        dim,
        D=dim,
        ROW_STRIDE=weight.stride(0),
        COLUMN_STRIDE=weight.stride(1),
        ACCUMULATE=accumulate(weight.dtype),
        BLOCK_D=config.block_d,
        ENTRIES=block,
        num_warps=config.num_warps,
    )
    return grad


@dataclass(frozen=True)
class _Bags:
    """What every kernel over bags is told about them; on a CPU, where the interpreter runs, checked first."""

    indices: Tensor
    offsets: Tensor
    num_embeddings: int
    padding_idx: int
    include_last_offset: bool
    drop_invalid: bool

    def __post_init__(self) -> None:
        if self.indices.is_cpu:
            check_values(
                self.indices, self.offsets, self.num_embeddings, self.include_last_offset, self.drop_invalid
            )

    @property
    def num_bags(self) -> int:
        return len(self.offsets) - self.include_last_offset

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.num_bags, len(self.offsets), len(self.indices), self.num_embeddings, self.padding_idx


class _Entries(NamedTuple):
    """The entries of all bags, [N]. Of a dead one, the key is the number of rows, and the rest undefined."""

    keys: Tensor  # int32, or int64 for a table too long for it
    bags: Tensor  # int32, or int64 for too many of them
    factors: Tensor | None  # fp32 or fp64; None: all are 1


def _pool(
    kernel: Any,
    outputs: tuple[Tensor, ...],
    weight: Tensor,
    bags: _Bags,
    config: EmbeddingBagForwardConfig | None,
    *optional: Tensor | None,
    **constants: Any,
) -> None:
    """Launch a forward kernel, unless there is nothing to write."""
    if outputs[0].numel() == 0:
        return
    dim = weight.shape[1]
    config = checked(config) or EmbeddingBagForwardConfig.default(dim, weight.dtype)
    launch(
        kernel,
        triton.cdiv(bags.num_bags, config.bags_per_program) * triton.cdiv(dim, config.block_d),
        *outputs,
        weight,
        bags.indices,
        bags.offsets,
        *optional,
        *bags.sizes,
        **constants,
        D=dim,
        ROW_STRIDE=weight.stride(0),
        COLUMN_STRIDE=weight.stride(1),
        DROP_INVALID=bags.drop_invalid,
        ACCUMULATE=accumulate(weight.dtype),
        BLOCK_D=config.block_d,
        BAGS=config.bags_per_program,
        ROWS=config.rows_in_flight,
        num_warps=config.num_warps,
        **ASSERTING,
    )


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Run that many programs on the device of the first argument, sliced where they exceed a grid."""
    with torch.cuda.device_of(args[0]):
        for first in range(0, programs, MAX_PROGRAMS):
            kernel[(min(programs - first, MAX_PROGRAMS),)](*args, first_program=first, **constants)


def _find_entries(
    bags: _Bags, per_sample_weights: Tensor | None, mean: bool, always_factors: bool, dtype: torch.dtype
) -> _Entries:
    keys = torch.full_like(bags.indices, bags.num_embeddings, dtype=number_type(bags.num_embeddings))
    numbers = torch.empty_like(bags.indices, dtype=number_type(bags.num_bags))
    factors = None
    if per_sample_weights is not None or mean or always_factors:
        factors = torch.empty_like(bags.indices, dtype=torch.promote_types(dtype, torch.float32))
    launch(
        kernels.embedding_bag_entries_kernel,
        triton.cdiv(bags.num_bags, BAGS),
        keys,
        numbers,
        factors,
        bags.indices,
        bags.offsets,
        per_sample_weights,
        *bags.sizes,
        MEAN=mean,
        DROP_INVALID=bags.drop_invalid,
        BAGS=BAGS,
        ENTRIES=ENTRIES,
        **ASSERTING,
    )
    return _Entries(keys, numbers, factors)


def number_type(largest: int) -> torch.dtype:
    return torch.int32 if largest < 2**31 else torch.int64


def _sort(entries: _Entries, scale_grad_by_freq: bool) -> tuple[Tensor, Tensor]:
    """Keys in ascending order and where each came from; divides factors by the lengths of runs if asked."""
    rows, order = torch.sort(entries.keys, stable=True)
    if scale_grad_by_freq and entries.factors is not None:
        last, first = (torch.searchsorted(rows, entries.keys, right=right) for right in (True, False))
        entries.factors.div_(last - first)
    return rows, order


def _sum_runs(
    grad: Tensor,
    grad_output: Tensor,
    rows: Tensor,
    order: Tensor,
    entries: _Entries,
    argmax: Tensor | None,
    offsets: Tensor,
    config: EmbeddingBagBackwardConfig | None,
) -> None:
    """Write the sum of each run to its row of ``grad``; an entry whose row is past the last is dead."""
    num_rows, dim = grad.shape
    if grad.numel() == 0 or len(rows) == 0:
        return
    config = checked(config) or EmbeddingBagBackwardConfig.default(dim, grad.dtype, argmax is not None)
    terms = grad_output
    of_entries: tuple[Tensor | None, ...] = (order, entries.bags, entries.factors, argmax, offsets)
    for num_terms in levels(len(rows), config.chunk):
        num_chunks = triton.cdiv(num_terms, config.chunk)
        pieces = grad.new_empty(2 * num_chunks, dim, dtype=torch.promote_types(grad.dtype, torch.float32))
        targets = rows.new_empty(2 * num_chunks)
        launch(
            kernels.embedding_bag_backward_kernel,
            triton.cdiv(num_chunks, config.chunks_per_program) * triton.cdiv(dim, config.block_d),
            grad,
            pieces,
            targets,
            terms,
            rows,
            *of_entries,
            num_terms,
            num_rows,
            D=dim,
            ACCUMULATE=accumulate(grad.dtype),
            BLOCK_D=config.block_d,
            CHUNK=config.chunk,
            CHUNKS=config.chunks_per_program,
            ROWS=config.rows_in_flight,
            num_warps=config.num_warps,
        )
        terms, rows, of_entries = pieces, targets, (None,) * 5


def levels(num_terms: int, chunk: int) -> list[int]:
    """How many terms each level sums: of every chunk, two pieces reach the next, until there is but one."""
    counts = [num_terms]
    while counts[-1] > chunk:
        counts.append(2 * triton.cdiv(counts[-1], chunk))
    return counts


def accumulate(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32

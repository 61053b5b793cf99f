"""Embedding bag on the GPU: gather and pool forward, sort and sum runs backward.

The functions named ``embedding_bag_*`` are the kernels of the contract in
``recsys_ops/embedding_bag/reference.py``. Every sum has a fixed order and nothing is
atomic, so results are the same bits in every run. Nothing waits for the GPU, except that
the sparse gradient must learn how many rows it has.

Backward, each of the N entries gets the number of its row as a key, a dead entry the
number of rows. Sorted stably by key, the entries of a row form a run. Programs sum chunks
of fixed length; a run that crosses chunks leaves one partial sum in each, which a second
kernel adds up in order.

On a GPU, a bad index or offset fails an assertion in the kernel, as in PyTorch, and is
never used as an address. On a CPU, where the interpreter runs, the host checks.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from recsys_ops.embedding_bag.reference import check_values
from recsys_ops.triton_kernels import embedding_bag_kernels as kernels

LANES = 64 if torch.version.hip else 32
_VECTOR_BYTES = 16
BAGS, ENTRIES = 8, 32  # the tile in which entries are found
PARTS = 16  # partial sums of a long run in flight
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
        return cls(*_tile_of_a_warp(dim, dtype, lanes))


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
            and self.rows_in_flight <= self.chunk
            and _fits_registers(self.block_d * self.chunks_per_program * self.rows_in_flight, self.num_warps)
        )

    @classmethod
    @cache
    def default(cls, dim: int, dtype: torch.dtype, lanes: int = LANES) -> EmbeddingBagBackwardConfig:
        """As in the forward, chunks in the place of bags."""
        return cls(*_tile_of_a_warp(dim, dtype, lanes))


def _tile_of_a_warp(dim: int, dtype: torch.dtype, lanes: int) -> tuple[int, int]:
    """Columns of a row, and rows side by side, that a warp loads by one instruction."""
    vector = _VECTOR_BYTES // dtype.itemsize
    columns = min(triton.next_power_of_2(dim), lanes * vector)
    return columns, lanes // triton.cdiv(columns, vector)


def _are_powers_of_two(config: EmbeddingBagForwardConfig | EmbeddingBagBackwardConfig) -> bool:
    return all(n > 0 and n & (n - 1) == 0 for n in astuple(config))


def _fits_registers(elements: int, num_warps: int) -> bool:
    return num_warps <= 32 and elements <= 128 * 32 * num_warps


def embedding_bag_forward(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    mean: bool,
    padding_idx: int,
    include_last_offset: bool,
    drop_invalid: bool,
) -> Tensor:
    """Sum or mean of each bag, [B, D]."""
    bags = _Bags(indices, offsets, weight.shape[0], padding_idx, include_last_offset, drop_invalid)
    output = weight.new_empty(bags.num_bags, weight.shape[1])
    _pool(kernels.embedding_bag_forward_kernel, (output,), weight, bags, per_sample_weights, MEAN=mean)
    return output


def embedding_bag_max_forward(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    padding_idx: int,
    include_last_offset: bool,
    drop_invalid: bool,
) -> tuple[Tensor, Tensor]:
    """Maximum of each bag, [B, D], and where it is: the position within the bag, int32 [B, D]."""
    bags = _Bags(indices, offsets, weight.shape[0], padding_idx, include_last_offset, drop_invalid)
    output = weight.new_empty(bags.num_bags, weight.shape[1])
    argmax = torch.empty_like(output, dtype=torch.int32)
    _pool(kernels.embedding_bag_max_forward_kernel, (output, argmax), weight, bags)
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
) -> Tensor:
    """Gradient of the weight, [R, D] dense; with ``argmax`` that of the maximum."""
    bags = _Bags(indices, offsets, num_embeddings, padding_idx, include_last_offset, drop_invalid)
    entries = _find_entries(bags, per_sample_weights, mean, scale_grad_by_freq, grad_output.dtype)
    rows, order = _sort(entries, scale_grad_by_freq)
    grad = grad_output.new_zeros(num_embeddings, grad_output.shape[1])
    _sum_runs(grad, grad_output, rows, order, entries, argmax, offsets)
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
    _sum_runs(values, grad_output, slots, order, entries, None, offsets)
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
) -> Tensor:
    """Gradient of the per-sample weights, [N]; 0 where an entry is not live."""
    num_embeddings, dim = weight.shape
    bags = _Bags(indices, offsets, num_embeddings, padding_idx, include_last_offset, drop_invalid)
    entries = _find_entries(bags, None, mean, False, weight.dtype)
    if dim == 0:
        return weight.new_zeros(len(indices))
    grad = weight.new_empty(len(indices))
    config = EmbeddingBagForwardConfig.default(dim, weight.dtype)
    block = config.bags_per_program * config.rows_in_flight
    with torch.cuda.device_of(weight):
        kernels.embedding_bag_backward_per_sample_weights_kernel[(triton.cdiv(len(indices), block),)](
            grad,
            grad_output,
            weight,
            entries.keys,
            entries.bags,
            entries.factors,
            len(indices),
            num_embeddings,
            D=dim,
            ROW_STRIDE=weight.stride(0),
            COLUMN_STRIDE=weight.stride(1),
            ACCUMULATE=_accumulate(weight.dtype),
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
    bags: Tensor  # int32
    factors: Tensor | None  # fp32 or fp64; None: all are 1


def _pool(
    kernel: Any,
    outputs: tuple[Tensor, ...],
    weight: Tensor,
    bags: _Bags,
    *optional: Tensor | None,
    **constants: Any,
) -> None:
    """Launch a forward kernel, unless there is nothing to write."""
    if outputs[0].numel() == 0:
        return
    dim = weight.shape[1]
    config = EmbeddingBagForwardConfig.default(dim, weight.dtype)
    grid = (triton.cdiv(bags.num_bags, config.bags_per_program), triton.cdiv(dim, config.block_d))
    with torch.cuda.device_of(weight):
        kernel[grid](
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
            ACCUMULATE=_accumulate(weight.dtype),
            BLOCK_D=config.block_d,
            BAGS=config.bags_per_program,
            ROWS=config.rows_in_flight,
            num_warps=config.num_warps,
            **ASSERTING,
        )


def _find_entries(
    bags: _Bags, per_sample_weights: Tensor | None, mean: bool, always_factors: bool, dtype: torch.dtype
) -> _Entries:
    key_type = torch.int32 if bags.num_embeddings < 2**31 else torch.int64
    keys = torch.full_like(bags.indices, bags.num_embeddings, dtype=key_type)
    numbers = torch.empty_like(bags.indices, dtype=torch.int32)
    factors = None
    if per_sample_weights is not None or mean or always_factors:
        factors = torch.empty_like(bags.indices, dtype=torch.promote_types(dtype, torch.float32))
    with torch.cuda.device_of(bags.indices):
        kernels.embedding_bag_entries_kernel[(triton.cdiv(bags.num_bags, BAGS),)](
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
) -> None:
    """Write the sum of each run to its row of ``grad``; an entry whose row is past the last is dead."""
    num_rows, dim = grad.shape
    num_indices = len(rows)
    if grad.numel() == 0 or num_indices == 0:
        return
    config = EmbeddingBagBackwardConfig.default(dim, grad.dtype)
    num_chunks, blocks = triton.cdiv(num_indices, config.chunk), triton.cdiv(dim, config.block_d)
    accumulate = torch.promote_types(grad.dtype, torch.float32)
    partials = grad.new_empty(num_chunks, 2, dim, dtype=accumulate)
    with torch.cuda.device_of(grad):
        kernels.embedding_bag_backward_kernel[(triton.cdiv(num_chunks, config.chunks_per_program), blocks)](
            grad,
            partials,
            grad_output,
            rows,
            order,
            entries.bags,
            entries.factors,
            argmax,
            offsets,
            num_indices,
            num_rows,
            D=dim,
            ACCUMULATE=_accumulate(grad.dtype),
            BLOCK_D=config.block_d,
            CHUNK=config.chunk,
            CHUNKS=config.chunks_per_program,
            ROWS=config.rows_in_flight,
            num_warps=config.num_warps,
        )
        kernels.embedding_bag_backward_long_runs_kernel[(num_chunks - 1, blocks)](
            grad,
            partials,
            rows,
            num_indices,
            num_rows,
            D=dim,
            BLOCK_D=config.block_d,
            CHUNK=config.chunk,
            PARTS=PARTS,
            num_warps=1,
        )


def _accumulate(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32

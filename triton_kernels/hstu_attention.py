"""HSTU attention on the GPU: jagged, masked and biased in the kernel.

The functions named ``hstu_attention_*`` are the kernels of the contract in
``recsys_ops/hstu_attention/reference.py``. Forward, programs own blocks of rows. Backward, one kernel
owns blocks of rows and sums the gradient of q, another owns blocks of keys and sums those of k and v:
both compute the scores anew. Sums are held in fp32 (fp64 in fp64), have a fixed order, and nothing is
atomic, so results are the same bits in every run.

Nothing waits for the GPU. How many blocks there can be follows from shapes alone, so a CUDA graph can
hold every launch; which sequence has a block is found in the kernel. Each row sees at most two ranges of
keys, and blocks of keys that are in none of a block's rows' ranges are not visited.

Gradients of the bias's weights are partial sums of programs, whose number is bounded, then added up.

On a GPU, what the contract refuses fails an assertion in the kernel, and is never used as an address. On
a CPU, where the interpreter runs, the host checks.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from recsys_ops.hstu_attention import philox, reference
from recsys_ops.triton_kernels import hstu_attention_backward_kernels as backward_kernels
from recsys_ops.triton_kernels import hstu_attention_kernels as kernels
from recsys_ops.triton_kernels.embedding_bag import ASSERTING, accumulate, launch
from recsys_ops.triton_kernels.hstu_attention_configs import (
    HSTUAttentionBackwardConfig,
    HSTUAttentionConfig,
    checked,
    padded,
    processors,
    target_of,
)

FAR = 2**30  # past every position
PARTIALS = 4  # rows of partial sums for each multiprocessor, at most
_UNKNOWN = 2**62
_CODES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


def hstu_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offsets: Tensor | None,
    offsets: Tensor,
    row_scale: Tensor | None,
    num_contextual: Tensor | None,
    num_targets: Tensor | None,
    intervals: Tensor | None,
    position_weight: Tensor | None,
    time_weight: Tensor | None,
    timestamps: Tensor | None,
    boundaries: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    alpha: float,
    causal: bool,
    window: int,
    target_group_size: int,
    full_window_tail: int,
    next_timestamps: bool,
    dropout: float,
    *,
    config: HSTUAttentionConfig | None = None,
) -> Tensor:
    """Attention of every row, [M, H, V], contiguous."""
    batch = _Batch(
        q,
        v.shape[2],
        len(k),
        offsets if query_offsets is None else query_offsets,
        offsets,
        row_scale,
        num_contextual,
        num_targets,
        intervals,
        position_weight,
        time_weight,
        timestamps,
        boundaries,
        dropout_seed,
        scale,
        alpha,
        causal,
        window,
        target_group_size,
        full_window_tail,
        next_timestamps,
        dropout,
    )
    batch.check()
    return _forward(batch, q, k, v, _NO_CACHE, config)


def hstu_attention_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offsets: Tensor | None,
    offsets: Tensor,
    row_scale: Tensor | None,
    num_contextual: Tensor | None,
    num_targets: Tensor | None,
    intervals: Tensor | None,
    position_weight: Tensor | None,
    time_weight: Tensor | None,
    timestamps: Tensor | None,
    boundaries: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    alpha: float,
    causal: bool,
    window: int,
    target_group_size: int,
    full_window_tail: int,
    next_timestamps: bool,
    dropout: float,
    *,
    config: HSTUAttentionBackwardConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the gradients of q, k and v, of any strides; return those of the weights of the bias."""
    batch = _Batch(
        q,
        v.shape[2],
        len(k),
        offsets if query_offsets is None else query_offsets,
        offsets,
        row_scale,
        num_contextual,
        num_targets,
        intervals,
        position_weight,
        time_weight,
        timestamps,
        boundaries,
        dropout_seed,
        scale,
        alpha,
        causal,
        window,
        target_group_size,
        full_window_tail,
        next_timestamps,
        dropout,
    )
    batch.check()
    of_inputs = {**_strided("q", q), **_strided("k", k), **_strided("v", v)}
    of_inputs |= _strided("grad_output", grad_output)
    configs = checked(config) or HSTUAttentionBackwardConfig.default(*batch.kind)
    _run(
        backward_kernels.hstu_attention_backward_keys_kernel,
        batch,
        configs.keys,
        of_keys=True,
        **of_inputs,
        **_strided("grad_k", grad_k),
        **_strided("grad_v", grad_v),
    )
    programs = batch.programs(configs.queries, of_keys=False)
    partials: list[Tensor | None] = []
    for weight in (position_weight, time_weight):
        if weight is not None:
            programs = batch.programs_with_partials(programs, weight.shape[1])
    for weight in (position_weight, time_weight):
        partials.append(None if weight is None else batch.zeros(programs, weight.shape[1]))
    lanes = triton.next_power_of_2(configs.queries.block_m + configs.queries.block_n - 1)
    scratch = None  # of each program a tile, its rows shifted
    if position_weight is not None:
        scratch = position_weight.new_empty(programs, configs.queries.block_m * lanes)
    _run(
        backward_kernels.hstu_attention_backward_queries_kernel,
        batch,
        configs.queries,
        of_keys=False,
        programs=programs,
        **of_inputs,
        **_strided("grad_q", grad_q),
        position_partial_ptr=partials[0],
        time_partial_ptr=partials[1],
        scratch_ptr=scratch,
        LANES=lanes,
    )
    position, time = (
        batch.sum_of_partials(sums, weight)
        for sums, weight in zip(partials, (position_weight, time_weight), strict=True)
    )
    return position, time


def hstu_attention_cached_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    cache_starts: Tensor | None,
    page_table: Tensor | None,
    query_offsets: Tensor,
    offsets: Tensor,
    row_scale: Tensor | None,
    num_contextual: Tensor | None,
    num_targets: Tensor | None,
    intervals: Tensor | None,
    position_weight: Tensor | None,
    time_weight: Tensor | None,
    timestamps: Tensor | None,
    boundaries: Tensor | None,
    scale: float,
    alpha: float,
    causal: bool,
    window: int,
    target_group_size: int,
    full_window_tail: int,
    next_timestamps: bool,
    *,
    config: HSTUAttentionConfig | None = None,
) -> Tensor:
    """Attention of new tokens to those in a cache and to each other, [M, H, V], contiguous."""
    batch = _Batch(
        q,
        v.shape[2],
        None if timestamps is None else len(timestamps),
        query_offsets,
        offsets,
        row_scale,
        num_contextual,
        num_targets,
        intervals,
        position_weight,
        time_weight,
        timestamps,
        boundaries,
        None,
        scale,
        alpha,
        causal,
        window,
        target_group_size,
        full_window_tail,
        next_timestamps,
        0.0,
        cached=True,
    )
    if q.is_cpu:
        _check_cached(query_offsets, offsets, len(q), key_cache, cache_starts, page_table)
    batch.check()
    cache = {
        **_cached("key", key_cache, key_scales),
        **_cached("value", value_cache, value_scales),
        "cache_starts_ptr": cache_starts,
        "page_table_ptr": page_table,
        "num_pages": len(key_cache),
        "page_size": key_cache.shape[1] if page_table is not None else len(key_cache),
        "pages_per_sequence": 0 if page_table is None else page_table.shape[1],
    }
    return _forward(batch, q, k, v, cache, config)


def _forward(
    batch: _Batch, q: Tensor, k: Tensor, v: Tensor, cache: dict[str, Any], config: HSTUAttentionConfig | None
) -> Tensor:
    output = q.new_empty(*q.shape[:2], v.shape[2])
    _run(
        kernels.hstu_attention_forward_kernel,
        batch,
        checked(config) or HSTUAttentionConfig.default("forward", *batch.kind),
        of_keys=False,
        output_ptr=output,
        output_row=output.stride(0),
        output_head=output.stride(1),
        **_strided("q", q),
        **_strided("k", k),
        **_strided("v", v),
        **cache,
    )
    return output


@dataclass(frozen=True)
class _Batch:
    """What every kernel is told of a batch: its sequences, what rows see, the bias, dropout and factors."""

    q: Tensor
    value_dim: int
    num_keys: int | None  # None where that is known on the device only
    query_offsets: Tensor
    offsets: Tensor
    row_scale: Tensor | None
    num_contextual: Tensor | None
    num_targets: Tensor | None
    intervals: Tensor | None
    position_weight: Tensor | None
    time_weight: Tensor | None
    timestamps: Tensor | None
    boundaries: Tensor | None
    dropout_seed: Tensor | None
    scale: float
    alpha: float
    causal: bool
    window: int
    target_group_size: int
    full_window_tail: int
    next_timestamps: bool
    dropout: float
    cached: bool = False

    def check(self) -> None:
        """Raise as the reference does where values are at hand: on a CPU."""
        if self.q.is_cpu:
            num_keys = int(self.offsets[-1]) if self.num_keys is None else self.num_keys
            reference.sequences(
                self.query_offsets,
                self.offsets,
                len(self.q),
                num_keys,
                self.num_contextual,
                self.num_targets,
            )

    @property
    def kind(self) -> tuple[int, int, torch.dtype, int, str]:
        """What a configuration depends on."""
        bias, rows = (self.position_weight, self.time_weight), (self.intervals, self.dropout_seed)
        work = (self.cached or any(w is not None for w in bias)) + any(t is not None for t in rows)
        return self.q.shape[2], self.value_dim, self.q.dtype, work, target_of(self.q.device)

    @property
    def num_sequences(self) -> int:
        return len(self.offsets) - 1

    def num_blocks(self, config: HSTUAttentionConfig, of_keys: bool) -> int:
        """How many blocks of rows (or of keys) there are at most."""
        total, block = (self.num_keys, config.block_n) if of_keys else (len(self.q), config.block_m)
        assert total is not None
        return total // block + self.num_sequences if self.num_sequences else 0

    @property
    def of_sequences(self) -> dict[str, Any]:
        """The arguments that say which rows see which keys."""
        return {
            "query_offsets_ptr": self.query_offsets,
            "offsets_ptr": self.offsets,
            "num_contextual_ptr": self.num_contextual,
            "num_targets_ptr": self.num_targets,
            "intervals_ptr": self.intervals,
            "num_sequences": self.num_sequences,
            "num_rows": len(self.q),
            "num_keys": _UNKNOWN if self.num_keys is None else self.num_keys,
            "num_intervals": 0 if self.intervals is None else self.intervals.shape[1],
            "window": min(self.window, FAR),
            "group": min(self.target_group_size, FAR),
            "tail": min(self.full_window_tail, FAR),
            "CAUSAL": self.causal,
        }

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of every kernel that computes scores."""
        num_times = 0 if self.time_weight is None else self.time_weight.shape[1]
        return {
            **self.of_sequences,
            "row_scale_ptr": self.row_scale,
            "position_weight_ptr": self.position_weight,
            "time_weight_ptr": self.time_weight,
            "timestamps_ptr": self.timestamps if num_times else None,
            "boundaries_ptr": self.boundaries if num_times else None,
            "dropout_seed_ptr": self.dropout_seed,
            "position_head": _head_stride(self.position_weight),
            "time_head": _head_stride(self.time_weight),
            "num_heads": self.q.shape[1],
            "num_distances": 0 if self.position_weight is None else self.position_weight.shape[1],
            "num_times": num_times,
            "threshold": philox.threshold(self.dropout),
            "scale": _bits(self.scale),
            "alpha": _bits(self.alpha),
            "keep_factor": _bits(1 / (1 - self.dropout)),
            "D": self.q.shape[2],
            "V": self.value_dim,
            "NEXT": self.next_timestamps,
            "TIME_STEPS": max(num_times - 1, 0).bit_length(),
            "SUMS": accumulate(self.q.dtype),
            "BLOCK_D": padded(self.q.shape[2]),
            "BLOCK_V": padded(self.value_dim),
        }

    def programs(self, config: HSTUAttentionConfig, of_keys: bool) -> int:
        """How many programs share the work: one for each block, or as many as stay on the GPU."""
        work = self.num_blocks(config, of_keys) * self.q.shape[1]
        return min(work, config.programs * processors(self.q.device)) if config.programs else work

    def programs_with_partials(self, programs: int, num_buckets: int) -> int:
        """As many of these programs as may own partial sums: so few for each head that those stay small."""
        heads = self.q.shape[1]
        most = min(programs, PARTIALS * processors(self.q.device), (4 * self.q.numel()) // num_buckets)
        return max(most // max(heads, 1), 1) * heads

    def zeros(self, rows: int, columns: int) -> Tensor:
        dtype = reference.accumulate_type(self.q.dtype)
        return torch.zeros(rows, columns, dtype=dtype, device=self.q.device)

    def sum_of_partials(self, partials: Tensor | None, weight: Tensor | None) -> Tensor:
        """The gradient of a weight, like it; [0, 0] of none. Program p works on head p % H."""
        if partials is None or weight is None:
            return self.zeros(0, 0)
        if self.q.shape[1] == 0 or len(weight) == 1:
            return partials.sum(0, keepdim=True)
        return partials.view(-1, *weight.shape).sum(0)

    def order(self, config: HSTUAttentionConfig, of_keys: bool) -> Tensor:
        """The blocks, those first that have most tiles."""
        num_blocks = self.num_blocks(config, of_keys)
        costs = torch.empty(num_blocks, dtype=torch.int32, device=self.q.device)
        launch(
            backward_kernels.hstu_attention_costs_kernel,
            num_blocks,
            costs,
            **self.of_sequences,
            num_blocks=num_blocks,
            OF_KEYS=of_keys,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            **ASSERTING,
        )
        return costs.argsort(descending=True, stable=True)


def _run(
    kernel: Any,
    batch: _Batch,
    config: HSTUAttentionConfig,
    of_keys: bool,
    programs: int | None = None,
    **arguments: Any,
) -> None:
    """Launch a kernel over all blocks, unless there are none."""
    num_work = batch.num_blocks(config, of_keys) * batch.q.shape[1]
    if num_work == 0:
        return
    programs = batch.programs(config, of_keys) if programs is None else programs
    launch(
        kernel,
        programs,
        arguments.pop(kernel.arg_names[0]),
        **arguments,
        **batch.arguments,
        order_ptr=batch.order(config, of_keys) if config.longest_first else None,
        num_work=num_work,
        PERSISTENT=programs < num_work,
        num_programs=programs,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **ASSERTING,
    )


def _bits(number: float) -> int:
    """Those of fp64, as int64."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _strided(name: str, tensor: Tensor) -> dict[str, Any]:
    strides = zip(("row", "head", "column"), tensor.stride(), strict=True)
    return {f"{name}_ptr": tensor, **{f"{name}_{axis}": stride for axis, stride in strides}}


def _head_stride(weight: Tensor | None) -> int:
    """From one head's weights to the next's: 0 where all heads share them."""
    return 0 if weight is None or len(weight) == 1 else weight.stride(0)


def _cached(name: str, cache: Tensor, scales: Tensor | None) -> dict[str, Any]:
    codes = _CODES.get(cache.dtype, "")
    strides = (0, *cache.stride()) if cache.dim() == 3 else cache.stride()
    axes = zip(("page", "row", "head", "column"), strides, strict=True)
    return {
        f"{name}_cache_ptr": cache.view(torch.int8) if codes else cache,
        f"{name}_scales_ptr": scales,
        f"{name.upper()}_CODES": codes,
        **{f"{name}_cache_{axis}": stride for axis, stride in axes},
    }


_NO_CACHE: dict[str, Any] = {
    **{f"{name}_{what}_ptr": None for name in ("key", "value") for what in ("cache", "scales")},
    **{f"{name}_cache_{axis}": 0 for name in ("key", "value") for axis in ("page", "row", "head", "column")},
    **{"cache_starts_ptr": None, "page_table_ptr": None, "KEY_CODES": "", "VALUE_CODES": ""},
    **{"num_pages": 0, "page_size": 0, "pages_per_sequence": 0},
}


def _check_cached(
    query_offsets: Tensor,
    offsets: Tensor,
    num_rows: int,
    cache: Tensor,
    cache_starts: Tensor | None,
    page_table: Tensor | None,
) -> None:
    """Raise as the reference does where values of a cached call cannot be right."""
    reference.check_offsets("offsets", query_offsets, num_rows)
    rows = len(cache) if page_table is None else len(cache) * cache.shape[1]
    for b, count in enumerate(reference.cached_lengths(query_offsets, offsets)):
        if page_table is not None:
            reference.check_pages(page_table[b], b, count, cache.shape[1], rows)
        elif cache_starts is not None:
            reference.check_start(int(cache_starts[b]), b, count, rows)

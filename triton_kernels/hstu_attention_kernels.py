"""Device code of HSTU attention; ``hstu_attention.py`` launches it.

A program takes blocks of rows (or of keys) of one head, one after the other: number ``work`` is head
``work % num_heads`` of block ``work // num_heads``, or of the block that ``order`` has at that place.
Blocks are numbered over all sequences by offsets alone, so a few of them may be empty.

Shapes in comments: BLOCK_M rows of q, BLOCK_N keys, BLOCK_D and BLOCK_V columns, padded.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from recsys_ops.triton_kernels.hstu_attention_sequences import (
    biased,
    blocks_of_keys,
    clip_to_intervals,
    extremes,
    kept_by_dropout,
    load_times,
    parts_of_sequence,
    placed_rows,
    row_times,
    seen_keys,
    seen_ranges,
    sequence_of_block,
)
from recsys_ops.triton_kernels.hstu_attention_tiles import (
    cached_places,
    load_cached,
    load_rows,
    number,
    of_head,
    product,
    rounded,
    sigmoid,
    store_rows,
)

# What is never specialised on; strides are.
VARYING = ["num_sequences", "num_rows", "num_keys", "num_heads", "num_work", "num_programs", "first_program"]
VARYING += ["num_intervals", "num_distances", "num_times", "window", "group", "tail"]
VARYING += ["threshold", "scale", "alpha", "keep_factor"]
VARYING += ["num_pages", "page_size", "pages_per_sequence"]


@triton.jit
def block_of_work(
    work,
    order_ptr,
    num_work,
    num_heads,
    offsets_ptr,
    num_sequences,
    BLOCK: tl.constexpr,
    REVERSED: tl.constexpr,
):
    """The head, the sequence, and the first row (or key) of its block: int64."""
    head = work % num_heads
    block = work // num_heads
    if order_ptr is not None:
        block = tl.load(order_ptr + block).to(tl.int64)
    elif REVERSED:
        # The last rows of a sequence see most: they are what should not come last.
        block = num_work // num_heads - 1 - block
    sequence, first = sequence_of_block(offsets_ptr, block, num_sequences, BLOCK)
    return head, sequence, first


@triton.jit(do_not_specialize=VARYING)
def hstu_attention_forward_kernel(
    output_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    key_cache_ptr,
    value_cache_ptr,
    key_scales_ptr,
    value_scales_ptr,
    cache_starts_ptr,
    page_table_ptr,
    query_offsets_ptr,
    offsets_ptr,
    row_scale_ptr,
    num_contextual_ptr,
    num_targets_ptr,
    intervals_ptr,
    position_weight_ptr,
    time_weight_ptr,
    timestamps_ptr,
    boundaries_ptr,
    dropout_seed_ptr,
    order_ptr,
    q_row,
    q_head,
    q_column,
    k_row,
    k_head,
    k_column,
    v_row,
    v_head,
    v_column,
    output_row,
    output_head,
    position_head,
    time_head,
    key_cache_page,
    key_cache_row,
    key_cache_head,
    key_cache_column,
    value_cache_page,
    value_cache_row,
    value_cache_head,
    value_cache_column,
    num_pages,
    page_size,
    pages_per_sequence,
    num_sequences,
    num_rows,
    num_keys,
    num_heads,
    num_intervals,
    num_distances,
    num_times,
    window,
    group,
    tail,
    threshold: tl.int64,
    scale: tl.int64,
    alpha: tl.int64,
    keep_factor: tl.int64,
    num_work,
    num_programs,
    first_program,
    D: tl.constexpr,
    V: tl.constexpr,
    CAUSAL: tl.constexpr,
    NEXT: tl.constexpr,
    TIME_STEPS: tl.constexpr,
    KEY_CODES: tl.constexpr,
    VALUE_CODES: tl.constexpr,
    SUMS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64) + first_program
    # A loop of one turn is none to the compiler, and takes no registers.
    end_of_work = num_work if PERSISTENT else program + 1
    for work in range(program, end_of_work, num_programs if PERSISTENT else 1):
        head, sequence, start = block_of_work(
            work, order_ptr, num_work, num_heads, query_offsets_ptr, num_sequences, BLOCK_M, CAUSAL
        )
        first_row, rows, first_key, length, prefix, history = parts_of_sequence(
            query_offsets_ptr,
            offsets_ptr,
            num_contextual_ptr,
            num_targets_ptr,
            sequence,
            num_sequences,
            num_rows,
            num_keys,
        )
        if start < rows:
            local = start.to(tl.int32) + tl.arange(0, BLOCK_M)
            is_row = local < rows
            row = first_row + local
            position = length - rows + local
            begin, end, own = seen_ranges(
                position, is_row, length, prefix, history, window, group, tail, CAUSAL
            )
            begin, end = clip_to_intervals(begin, end, intervals_ptr, row, is_row, num_intervals)
            first, count, group_first, group_count = blocks_of_keys(begin, end, own, history, BLOCK_N)
            placed = placed_rows(position, history, group)
            asked = row_times(timestamps_ptr, position, is_row, first_key, length, history, NEXT)
            of_rows = extremes(asked, is_row)
            position_weights = of_head(position_weight_ptr, head, position_head)
            time_weights = of_head(time_weight_ptr, head, time_head)
            q = load_rows(
                q_ptr + head * q_head, row, q_row, q_column, is_row, D, BLOCK_D
            )  # [BLOCK_M, BLOCK_D]
            sums = tl.zeros([BLOCK_M, BLOCK_V], SUMS)
            for i in range(0, count + group_count):
                first_of_block = tl.where(i < count, first + i, group_first + (i - count)) * BLOCK_N
                key = first_of_block + tl.arange(0, BLOCK_N)
                is_key = key < length
                if key_cache_ptr is None:
                    place = first_key + key
                    k = load_rows(k_ptr + head * k_head, place, k_row, k_column, is_key, D, BLOCK_D)
                    v = load_rows(v_ptr + head * v_head, place, v_row, v_column, is_key, V, BLOCK_V)
                else:
                    cached = length - rows
                    is_new = is_key & (key >= cached)
                    place = first_row + (key - cached)
                    page, slot, in_cache = cached_places(
                        cache_starts_ptr,
                        page_table_ptr,
                        sequence,
                        key,
                        key < cached,
                        cached,
                        num_pages,
                        page_size,
                        pages_per_sequence,
                    )
                    k = load_rows(k_ptr + head * k_head, place, k_row, k_column, is_new, D, BLOCK_D)
                    cached_k = load_cached(
                        key_cache_ptr,
                        key_scales_ptr,
                        page,
                        slot,
                        page_size,
                        head,
                        num_heads,
                        key_cache_page,
                        key_cache_row,
                        key_cache_head,
                        key_cache_column,
                        in_cache,
                        dtype,
                        SUMS,
                        KEY_CODES,
                        D,
                        BLOCK_D,
                    )
                    k = tl.where(in_cache[:, None], cached_k, k)
                    v = load_rows(v_ptr + head * v_head, place, v_row, v_column, is_new, V, BLOCK_V)
                    cached_v = load_cached(
                        value_cache_ptr,
                        value_scales_ptr,
                        page,
                        slot,
                        page_size,
                        head,
                        num_heads,
                        value_cache_page,
                        value_cache_row,
                        value_cache_head,
                        value_cache_column,
                        in_cache,
                        dtype,
                        SUMS,
                        VALUE_CODES,
                        V,
                        BLOCK_V,
                    )
                    v = tl.where(in_cache[:, None], cached_v, v)
                zeros = tl.zeros([BLOCK_M, BLOCK_N], SUMS)
                scores = product(q, tl.trans(k), zeros) * number(alpha, SUMS)  # [BLOCK_M, BLOCK_N]
                time = load_times(timestamps_ptr, first_key, key, is_key)
                scores, _, _, _ = biased(
                    scores,
                    key,
                    position,
                    placed,
                    asked,
                    time,
                    of_rows,
                    extremes(time, is_key),
                    history,
                    position_weights,
                    time_weights,
                    boundaries_ptr,
                    num_distances,
                    num_times,
                    TIME_STEPS,
                    True,
                )
                seen = seen_keys(
                    key,
                    history,
                    begin,
                    end,
                    own,
                    row,
                    is_row,
                    num_targets_ptr,
                    intervals_ptr,
                    num_intervals,
                    True,
                )
                weights = scores * sigmoid(scores)
                if dropout_seed_ptr is not None:
                    seen &= kept_by_dropout(
                        dropout_seed_ptr, threshold, row, head, first_of_block, BLOCK_M, BLOCK_N
                    )
                    weights *= number(keep_factor, SUMS)
                weights = rounded(tl.where(seen, weights, 0.0), dtype)
                sums = product(weights, v, sums)
            if row_scale_ptr is None:
                sums *= number(scale, SUMS)
            else:
                sums *= (number(scale, SUMS) * tl.load(row_scale_ptr + row, mask=is_row, other=0))[:, None]
            store_rows(output_ptr + head * output_head, row, output_row, 1, is_row, sums, V, BLOCK_V)

"""Device code of the gradients of HSTU attention; ``hstu_attention.py`` launches it.

As in ``hstu_attention_kernels.py``. One kernel owns rows, and sums the gradients of q and of the bias's
weights; the other owns keys, and sums those of k and v, with tiles that are transposed.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from recsys_ops.triton_kernels.hstu_attention_buckets import add_position_gradients, add_time_gradients
from recsys_ops.triton_kernels.hstu_attention_kernels import VARYING, block_of_work
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
    runs_of_rows,
    seen_keys,
    seen_ranges,
    sequence_of_block,
)
from recsys_ops.triton_kernels.hstu_attention_tiles import (
    load_rows,
    number,
    of_head,
    product,
    rounded,
    sigmoid,
    store_rows,
)


@triton.jit(do_not_specialize=VARYING)
def hstu_attention_backward_queries_kernel(
    grad_q_ptr,
    position_partial_ptr,
    time_partial_ptr,
    scratch_ptr,
    grad_output_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
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
    grad_q_row,
    grad_q_head,
    grad_q_column,
    grad_output_row,
    grad_output_head,
    grad_output_column,
    q_row,
    q_head,
    q_column,
    k_row,
    k_head,
    k_column,
    v_row,
    v_head,
    v_column,
    position_head,
    time_head,
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
    SUMS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
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
            factor = tl.zeros([BLOCK_M], SUMS) + number(scale, SUMS)
            if row_scale_ptr is not None:
                factor *= tl.load(row_scale_ptr + row, mask=is_row, other=0)
            q = load_rows(q_ptr + head * q_head, row, q_row, q_column, is_row, D, BLOCK_D)
            grad_output = load_rows(
                grad_output_ptr + head * grad_output_head,
                row,
                grad_output_row,
                grad_output_column,
                is_row,
                V,
                BLOCK_V,
            )
            sums = tl.zeros([BLOCK_M, BLOCK_D], SUMS)
            for i in range(0, count + group_count):
                first_of_block = tl.where(i < count, first + i, group_first + (i - count)) * BLOCK_N
                key = first_of_block + tl.arange(0, BLOCK_N)
                is_key = key < length
                k = load_rows(k_ptr + head * k_head, first_key + key, k_row, k_column, is_key, D, BLOCK_D)
                v = load_rows(v_ptr + head * v_head, first_key + key, v_row, v_column, is_key, V, BLOCK_V)
                zeros = tl.zeros([BLOCK_M, BLOCK_N], SUMS)
                time = load_times(timestamps_ptr, first_key, key, is_key)
                scores, bucket, least, most = biased(
                    product(q, tl.trans(k), zeros) * number(alpha, SUMS),
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
                )  # [BLOCK_M, BLOCK_N]
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
                gradients = product(grad_output, tl.trans(v), zeros) * factor[:, None]
                if dropout_seed_ptr is not None:
                    seen &= kept_by_dropout(
                        dropout_seed_ptr, threshold, row, head, first_of_block, BLOCK_M, BLOCK_N
                    )
                    gradients *= number(keep_factor, SUMS)
                gate = sigmoid(scores)
                gradients = tl.where(seen, gradients * (gate * (1.0 + scores * (1.0 - gate))), 0.0)
                sums = product(rounded(gradients, dtype), k, sums)
                if position_partial_ptr is not None:
                    add_position_gradients(
                        position_partial_ptr + program * num_distances,
                        scratch_ptr + program * (BLOCK_M * LANES),
                        gradients,
                        length - rows + start.to(tl.int32),
                        length,
                        first_of_block,
                        history,
                        group,
                        num_distances,
                        BLOCK_M,
                        BLOCK_N,
                        LANES,
                    )
                if time_partial_ptr is not None:
                    add_time_gradients(time_partial_ptr + program * num_times, gradients, bucket, least, most)
            store_rows(
                grad_q_ptr + head * grad_q_head,
                row,
                grad_q_row,
                grad_q_column,
                is_row,
                sums * number(alpha, SUMS),
                D,
                BLOCK_D,
            )


@triton.jit(do_not_specialize=VARYING)
def hstu_attention_backward_keys_kernel(
    grad_k_ptr,
    grad_v_ptr,
    grad_output_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
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
    grad_k_row,
    grad_k_head,
    grad_k_column,
    grad_v_row,
    grad_v_head,
    grad_v_column,
    grad_output_row,
    grad_output_head,
    grad_output_column,
    q_row,
    q_head,
    q_column,
    k_row,
    k_head,
    k_column,
    v_row,
    v_head,
    v_column,
    position_head,
    time_head,
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
            work, order_ptr, num_work, num_heads, offsets_ptr, num_sequences, BLOCK_N, False
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
        if start < length:
            first_of_block = start.to(tl.int32)
            key = first_of_block + tl.arange(0, BLOCK_N)
            is_key = key < length
            begin_0, end_0, begin_1, end_1, begin_2, end_2 = runs_of_rows(
                first_of_block, rows, length, prefix, history, window, group, tail, CAUSAL, BLOCK_N
            )
            count_0 = (end_0 - begin_0 + BLOCK_M - 1) // BLOCK_M
            count_1 = count_0 + (end_1 - begin_1 + BLOCK_M - 1) // BLOCK_M
            count_2 = count_1 + (end_2 - begin_2 + BLOCK_M - 1) // BLOCK_M
            time = load_times(timestamps_ptr, first_key, key, is_key)
            of_keys = extremes(time, is_key)
            position_weights = of_head(position_weight_ptr, head, position_head)
            time_weights = of_head(time_weight_ptr, head, time_head)
            k = load_rows(k_ptr + head * k_head, first_key + key, k_row, k_column, is_key, D, BLOCK_D)
            v = load_rows(v_ptr + head * v_head, first_key + key, v_row, v_column, is_key, V, BLOCK_V)
            sums_k = tl.zeros([BLOCK_N, BLOCK_D], SUMS)
            sums_v = tl.zeros([BLOCK_N, BLOCK_V], SUMS)
            for i in range(0, count_2):
                local = tl.where(
                    i < count_0,
                    begin_0 + i * BLOCK_M,
                    tl.where(
                        i < count_1, begin_1 + (i - count_0) * BLOCK_M, begin_2 + (i - count_1) * BLOCK_M
                    ),
                )
                local = local + tl.arange(0, BLOCK_M)
                is_row = local < tl.where(i < count_0, end_0, tl.where(i < count_1, end_1, end_2))
                row = first_row + local
                position = length - rows + local
                q = load_rows(q_ptr + head * q_head, row, q_row, q_column, is_row, D, BLOCK_D)
                grad_output = load_rows(
                    grad_output_ptr + head * grad_output_head,
                    row,
                    grad_output_row,
                    grad_output_column,
                    is_row,
                    V,
                    BLOCK_V,
                )
                begin, end, own = seen_ranges(
                    position, is_row, length, prefix, history, window, group, tail, CAUSAL
                )
                placed = placed_rows(position, history, group)
                asked = row_times(timestamps_ptr, position, is_row, first_key, length, history, NEXT)
                zeros = tl.zeros([BLOCK_N, BLOCK_M], SUMS)
                scores, _, _, _ = biased(
                    product(k, tl.trans(q), zeros) * number(alpha, SUMS),
                    key,
                    position,
                    placed,
                    asked,
                    time,
                    extremes(asked, is_row),
                    of_keys,
                    history,
                    position_weights,
                    time_weights,
                    boundaries_ptr,
                    num_distances,
                    num_times,
                    TIME_STEPS,
                    False,
                )  # [BLOCK_N, BLOCK_M]
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
                    False,
                )
                gradients = product(v, tl.trans(grad_output), zeros)
                gate = sigmoid(scores)
                weights = scores * gate
                if dropout_seed_ptr is not None:
                    kept = kept_by_dropout(
                        dropout_seed_ptr, threshold, row, head, first_of_block, BLOCK_M, BLOCK_N
                    )
                    seen &= tl.trans(kept.to(tl.int8)) != 0
                    weights *= number(keep_factor, SUMS)
                    gradients *= number(keep_factor, SUMS)
                if row_scale_ptr is None:
                    weights = tl.where(seen, weights, 0.0)
                    sums_v = product(rounded(weights, dtype), grad_output, sums_v)
                    gradients *= number(scale, SUMS)
                else:
                    factor = tl.load(row_scale_ptr + row, mask=is_row, other=0)  # [BLOCK_M]
                    # Relative to the largest, or 1/N would make weights subnormal in fp16.
                    largest = tl.max(tl.abs(factor))
                    largest = tl.where(largest > 0, largest, 1.0)
                    weights = tl.where(seen, weights * (factor / largest)[None, :], 0.0)
                    none = tl.zeros([BLOCK_N, BLOCK_V], SUMS)
                    sums_v += product(rounded(weights, dtype), grad_output, none) * largest
                    gradients *= (number(scale, SUMS) * factor)[None, :]
                gradients = tl.where(seen, gradients * (gate * (1.0 + scores * (1.0 - gate))), 0.0)
                sums_k = product(rounded(gradients, dtype), q, sums_k)
            store_rows(
                grad_k_ptr + head * grad_k_head,
                first_key + key,
                grad_k_row,
                grad_k_column,
                is_key,
                sums_k * number(alpha, SUMS),
                D,
                BLOCK_D,
            )
            store_rows(
                grad_v_ptr + head * grad_v_head,
                first_key + key,
                grad_v_row,
                grad_v_column,
                is_key,
                sums_v * number(scale, SUMS),
                V,
                BLOCK_V,
            )


@triton.jit(do_not_specialize=VARYING)
def hstu_attention_costs_kernel(
    costs_ptr,
    query_offsets_ptr,
    offsets_ptr,
    num_contextual_ptr,
    num_targets_ptr,
    intervals_ptr,
    num_sequences,
    num_rows,
    num_keys,
    num_intervals,
    window,
    group,
    tail,
    num_blocks,
    first_program,
    CAUSAL: tl.constexpr,
    OF_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """How many tiles each block of rows (or of keys) has, int32."""
    block = tl.program_id(0).to(tl.int64) + first_program
    if OF_KEYS:
        sequence, start = sequence_of_block(offsets_ptr, block, num_sequences, BLOCK_N)
    else:
        sequence, start = sequence_of_block(query_offsets_ptr, block, num_sequences, BLOCK_M)
    first_row, rows, _, length, prefix, history = parts_of_sequence(
        query_offsets_ptr,
        offsets_ptr,
        num_contextual_ptr,
        num_targets_ptr,
        sequence,
        num_sequences,
        num_rows,
        num_keys,
    )
    if OF_KEYS:
        begin_0, end_0, begin_1, end_1, begin_2, end_2 = runs_of_rows(
            tl.minimum(start, length).to(tl.int32),
            rows,
            length,
            prefix,
            history,
            window,
            group,
            tail,
            CAUSAL,
            BLOCK_N,
        )
        tiles = (end_0 - begin_0 + BLOCK_M - 1) // BLOCK_M
        tiles += (end_1 - begin_1 + BLOCK_M - 1) // BLOCK_M
        tiles += (end_2 - begin_2 + BLOCK_M - 1) // BLOCK_M
        exists = start < length
    else:
        local = tl.minimum(start, rows).to(tl.int32) + tl.arange(0, BLOCK_M)
        is_row = local < rows
        begin, end, own = seen_ranges(
            length - rows + local, is_row, length, prefix, history, window, group, tail, CAUSAL
        )
        row = first_row + local
        begin, end = clip_to_intervals(begin, end, intervals_ptr, row, is_row, num_intervals)
        _, count, _, group_count = blocks_of_keys(begin, end, own, history, BLOCK_N)
        tiles = count + group_count
        exists = start < rows
    tl.store(costs_ptr + block, tl.where(exists, tiles, 0))

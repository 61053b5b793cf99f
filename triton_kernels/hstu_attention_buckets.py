"""Device code of HSTU attention: the gradients of the bias's weights, summed in a fixed order.

Each program owns a row of partial sums, one for each bucket, and scratch memory for a tile. Barriers part
what it adds for one tile from what it adds for the next; programs touch no other's memory, so nothing need
be atomic.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from recsys_ops.triton_kernels.hstu_attention_sequences import FAR, placed_rows

ROWS = tl.constexpr(16)  # of a tile that are summed at once
TIMES = tl.constexpr(16)  # buckets that are added to the partial sums at once


@triton.jit
def _add(pointers, values, wanted):
    tl.debug_barrier()
    tl.store(pointers, tl.load(pointers, mask=wanted, other=0) + values, mask=wanted)


@triton.jit
def _rows_of_pass(number, position, first_position, length, history, group, BLOCK_M: tl.constexpr):
    """Which rows a pass takes, and where they stand: places that differ by less than BLOCK_M.

    Passes 0 and 1 are of keys of prefix and history, pass 2 of those in the rows' own groups.
    """
    exists = position < length
    is_target = exists & (position >= history)
    first = (tl.maximum(first_position, history) - history) // group
    # A block that starts in a group longer than itself may end in the next, whose places start anew.
    later = is_target & (group > BLOCK_M) & ((position - history) // group > first)
    of_history = exists & ((number == 1) == later)
    own_keys = number == 2
    place = tl.where(own_keys, position, placed_rows(position, history, group))
    return tl.where(own_keys, is_target, of_history), place


@triton.jit
def add_position_gradients(
    partial_ptr,
    scratch_ptr,
    gradients,
    first_position,
    length,
    first_key,
    history,
    group,
    num_distances,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
):
    """Add a tile of gradients of scores, [BLOCK_M, BLOCK_N], to its buckets of distances.

    Those are the sums along diagonals: rows are written to scratch memory each shifted to its place, and
    read back as columns.
    """
    column = tl.arange(0, BLOCK_N)
    lane = tl.arange(0, LANES)
    position = first_position + tl.arange(0, BLOCK_M)
    last = num_distances - 1
    for number in range(0, tl.where(first_position + BLOCK_M > history, 3, 1)):
        wanted, place = _rows_of_pass(number, position, first_position, length, history, group, BLOCK_M)
        some_keys = tl.where(number == 2, first_key + BLOCK_N > history, first_key < history)
        if some_keys & (tl.max(wanted.to(tl.int32)) > 0):
            top = tl.max(tl.where(wanted, place, -FAR))
            of_pass = ((first_key + column)[None, :] >= history) == (number == 2)
            shifted = (tl.arange(0, BLOCK_M) * LANES + top - place)[:, None] + column[None, :]
            tl.debug_barrier()
            tl.store(scratch_ptr + shifted, tl.where(of_pass, gradients, 0.0), mask=wanted[:, None])
            tl.debug_barrier()
            sums = tl.zeros([ROWS, LANES], gradients.dtype)
            for first_row in range(0, tl.minimum(BLOCK_M, length - first_position), ROWS):
                row = first_row + tl.arange(0, ROWS)
                there, stands = _rows_of_pass(
                    number, first_position + row, first_position, length, history, group, BLOCK_M
                )
                from_column = lane[None, :] - (top - stands)[:, None]
                inside = there[:, None] & (from_column >= 0) & (from_column < BLOCK_N)
                sums += tl.load(scratch_ptr + (row * LANES)[:, None] + lane[None, :], mask=inside, other=0)
            diagonal = tl.sum(sums, 0)  # [LANES]
            distance = first_key - top + lane + num_distances // 2
            bucket = tl.minimum(tl.maximum(distance, 0), last)
            following = tl.minimum(tl.maximum(distance + 1, 0), last)
            # Both ends of the table take what is further: the last lane of a bucket adds the sum of all.
            nearest = tl.sum(tl.where(bucket == 0, diagonal, 0.0))
            furthest = tl.sum(tl.where(bucket == last, diagonal, 0.0))
            diagonal = tl.where(bucket == last, furthest, diagonal)
            diagonal = tl.where(bucket == 0, nearest, diagonal)
            _add(partial_ptr + bucket, diagonal, (bucket != following) | (lane == LANES - 1))


@triton.jit
def add_time_gradients(partial_ptr, gradients, bucket, least, most):
    """Add a tile of gradients of scores to its buckets of times, which are from ``least`` to ``most``."""
    lane = tl.arange(0, TIMES)
    for first in range(least, most + 1, TIMES):
        sums = tl.zeros([TIMES], gradients.dtype)
        for number in range(first, tl.minimum(first + TIMES, most + 1)):
            sum_of_bucket = tl.sum(tl.where(bucket == number, gradients, 0.0))
            sums = tl.where(lane == number - first, sum_of_bucket, sums)
        _add(partial_ptr + first + lane, sums, first + lane <= most)

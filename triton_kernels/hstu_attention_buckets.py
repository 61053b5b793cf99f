"""Device code of HSTU attention: the gradients of the bias's weights, summed in a fixed order.

Each program owns a row of partial sums, one for each bucket. A barrier parts what it adds for one tile from
what it adds for the next; programs touch no other's row, so nothing need be atomic.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from recsys_ops.triton_kernels.hstu_attention_sequences import FAR

TIMES = tl.constexpr(16)  # buckets that are added to the partial sums at once


@triton.jit
def _add(pointers, values, wanted):
    tl.debug_barrier()
    tl.store(pointers, tl.load(pointers, mask=wanted, other=0) + values, mask=wanted)


@triton.jit
def add_position_gradients(
    partial_ptr,
    gradients,
    position,
    placed,
    is_row,
    first_key,
    history,
    group,
    num_distances,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
):
    """Add a tile of gradients of scores, [BLOCK_M, BLOCK_N], to its buckets of distances."""
    key = (first_key + tl.arange(0, BLOCK_N))[None, :]
    is_target = is_row & (position >= history)
    if first_key < history:
        of_history = tl.where(key < history, gradients, 0.0)
        # A block that starts in a group longer than itself may end in the next, whose places start anew.
        own = (position - history) // group
        later = is_target & (group > BLOCK_M) & (own > tl.min(tl.where(is_target, own, FAR)))
        _add_diagonals(
            partial_ptr,
            of_history,
            placed,
            is_row & ~later,
            first_key,
            num_distances,
            BLOCK_M,
            BLOCK_N,
            LANES,
        )
        if tl.max(later.to(tl.int32)) > 0:
            _add_diagonals(
                partial_ptr, of_history, placed, later, first_key, num_distances, BLOCK_M, BLOCK_N, LANES
            )
    if (first_key + BLOCK_N > history) & (tl.max(is_target.to(tl.int32)) > 0):
        of_targets = tl.where(key >= history, gradients, 0.0)
        _add_diagonals(
            partial_ptr, of_targets, position, is_target, first_key, num_distances, BLOCK_M, BLOCK_N, LANES
        )


@triton.jit
def _add_diagonals(
    partial_ptr,
    gradients,
    place,
    wanted,
    first_key,
    num_distances,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
):
    """The same of the wanted rows, whose places differ by less than BLOCK_M: sums along diagonals."""
    top = tl.max(tl.where(wanted, place, -FAR))
    lane = tl.arange(0, LANES)
    column = lane[None, :] - (top - place)[:, None]  # [BLOCK_M, LANES]
    inside = wanted[:, None] & (column >= 0) & (column < BLOCK_N)
    shifted = tl.gather(gradients, tl.minimum(tl.maximum(column, 0), BLOCK_N - 1), 1)
    sums = tl.sum(tl.where(inside, shifted, 0.0), 0)  # [LANES]
    distance = first_key - top + lane + num_distances // 2
    last = num_distances - 1
    bucket = tl.minimum(tl.maximum(distance, 0), last)
    following = tl.minimum(tl.maximum(distance + 1, 0), last)
    # Both ends of the table take what is further: there, the last lane of a bucket adds the sum of all.
    sums = tl.where(
        bucket == 0,
        tl.sum(tl.where(bucket == 0, sums, 0.0)),
        tl.where(bucket == last, tl.sum(tl.where(bucket == last, sums, 0.0)), sums),
    )
    _add(partial_ptr + bucket, sums, (bucket != following) | (lane == LANES - 1))


@triton.jit
def add_time_gradients(partial_ptr, gradients, bucket, least, most):
    """Add a tile of gradients of scores to its buckets of times, which are from ``least`` to ``most``."""
    lane = tl.arange(0, TIMES)
    for first in range(least, most + 1, TIMES):
        sums = tl.zeros([TIMES], gradients.dtype)
        for number in range(first, tl.minimum(first + TIMES, most + 1)):
            sum_of_bucket = tl.sum(tl.sum(tl.where(bucket == number, gradients, 0.0), 1), 0)
            sums = tl.where(lane == number - first, sum_of_bucket, sums)
        _add(partial_ptr + first + lane, sums, first + lane <= most)

"""Device code of HSTU attention: the sequences of a batch, what their rows see, and what is added to scores.

Positions are those in a sequence, int32; a sequence has fewer than 2**30 tokens. First comes the prefix,
which ends at ``prefix``, then the history, which ends at ``history``, then the targets. Functions of
positions are elementwise, so that rows may run down a tile, [BLOCK_M, BLOCK_N], or across it.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

FAR = tl.constexpr(2**30)  # past every position


@triton.jit
def sequence_of_block(offsets_ptr, block, num_sequences, BLOCK: tl.constexpr):
    """The sequence that has a block of rows or keys, and where in it the block starts: int64.

    Blocks of sequence b are numbered from offsets[b] // BLOCK + b on: no fewer than it needs.
    """
    low = block * 0
    high = num_sequences - 1 + low
    while low < high:
        middle = (low + high + 1) // 2
        first = tl.load(offsets_ptr + middle).to(tl.int64) // BLOCK + middle
        low = tl.where(first <= block, middle, low)
        high = tl.where(first <= block, high, middle - 1)
    first = tl.load(offsets_ptr + low).to(tl.int64) // BLOCK + low
    return low, tl.maximum(block - first, 0) * BLOCK


@triton.jit
def _bounds(offsets_ptr, sequence, num_sequences, total):
    """First and number of a sequence's rows, within all of them whatever the offsets say."""
    begin = tl.load(offsets_ptr + sequence).to(tl.int64)
    end = tl.load(offsets_ptr + sequence + 1).to(tl.int64)
    good = (begin <= end) & (end <= total) & ((sequence > 0) | (begin == 0))
    good = good & ((sequence < num_sequences - 1) | (end == total))
    tl.device_assert(good, "hstu_attention: expected offsets from 0, never decreasing, to the number of rows")
    begin = tl.minimum(tl.maximum(begin, 0), total)
    return begin, tl.minimum(tl.maximum(tl.minimum(end, total) - begin, 0), FAR)


@triton.jit
def parts_of_sequence(
    query_offsets_ptr,
    offsets_ptr,
    num_contextual_ptr,
    num_targets_ptr,
    sequence,
    num_sequences,
    num_rows,
    num_keys,
):
    """First and number of rows, of keys, and the ends of prefix and history."""
    first_row, rows = _bounds(query_offsets_ptr, sequence, num_sequences, num_rows)
    first_key, length = _bounds(offsets_ptr, sequence, num_sequences, num_keys)
    tl.device_assert(rows <= length, "hstu_attention: expected no more queries than keys")
    targets = length * 0
    prefix = length * 0
    if num_targets_ptr is not None:
        targets = tl.load(num_targets_ptr + sequence).to(tl.int64)
        good = (targets >= 0) & (targets <= length)
        tl.device_assert(good, "hstu_attention: expected num_targets from 0 to the number of keys")
        targets = tl.minimum(tl.maximum(targets, 0), length)
    history = length - targets
    if num_contextual_ptr is not None:
        prefix = tl.load(num_contextual_ptr + sequence).to(tl.int64)
        tl.device_assert(prefix >= 0, "hstu_attention: expected num_contextual of at least 0")
        prefix = tl.minimum(tl.maximum(prefix, 0), history)
    rows = tl.minimum(rows, length)
    return (
        first_row,
        rows.to(tl.int32),
        first_key,
        length.to(tl.int32),
        prefix.to(tl.int32),
        history.to(tl.int32),
    )


@triton.jit
def seen_ranges(position, exists, length, prefix, history, window, group, tail, CAUSAL: tl.constexpr):
    """What a row sees before intervals: keys in [begin, end), and of targets none before ``own``.

    So of a target, that is a range of the history and one of its group. A row that sees nothing begins
    at FAR, so that the least begin and the largest end bound those of all rows.
    """
    is_target = position >= history
    in_prefix = position < prefix
    placed = tl.minimum(position, history)
    free = in_prefix | (window == 0) | ((tail > 0) & (placed >= history - tail))
    begin = tl.where(free, 0, placed - window)
    begin = tl.where(begin < prefix, 0, tl.maximum(begin, 0))
    own = (position - history) // group * group + history
    if CAUSAL:
        end = tl.where(in_prefix, history, position + 1)
    else:
        end = tl.where(free, history, tl.minimum(position + window + 1, history))
        end = tl.where(is_target, tl.minimum(own + group, length), end)
    return tl.where(exists, begin, FAR), tl.where(exists, end, 0), tl.where(is_target, own, history)


@triton.jit
def seen_keys(
    key,
    history,
    begin,
    end,
    own,
    row,
    exists,
    num_targets_ptr,
    intervals_ptr,
    num_intervals,
    DOWN: tl.constexpr,
):
    """Which keys a row sees; each must be in any of the row's intervals, too. As in ``biased``."""
    if DOWN:
        keys = key[None, :]
        seen = (keys >= begin[:, None]) & (keys < end[:, None])
        if num_targets_ptr is not None:
            seen = seen & ((keys < history) | (keys >= own[:, None]))
    else:
        keys = key[:, None]
        seen = (keys >= begin[None, :]) & (keys < end[None, :])
        if num_targets_ptr is not None:
            seen = seen & ((keys < history) | (keys >= own[None, :]))
    if intervals_ptr is not None:
        inside = key[:, None] + 0 * begin[None, :] < 0
        for i in range(0, num_intervals):
            low, high = _interval(intervals_ptr, row, exists, i, num_intervals)
            inside = inside | ((low[None, :] <= key[:, None]) & (key[:, None] < high[None, :]))
        if DOWN:
            inside = tl.trans(inside.to(tl.int8)) != 0
        seen = seen & inside
    return seen


@triton.jit
def clip_to_intervals(begin, end, intervals_ptr, row, exists, num_intervals):
    """A range as far as it lies between the first and the last key of a row's intervals."""
    if intervals_ptr is None:
        return begin, end
    else:
        least = begin * 0 + FAR
        most = end * 0
        for i in range(0, num_intervals):
            low, high = _interval(intervals_ptr, row, exists, i, num_intervals)
            least = tl.where(low < high, tl.minimum(least, low), least)
            most = tl.where(low < high, tl.maximum(most, high), most)
        begin = tl.maximum(begin, least)
        end = tl.minimum(end, most)
        return tl.where(begin < end, begin, FAR), tl.where(begin < end, end, 0)


@triton.jit
def _interval(intervals_ptr, row, exists, i, num_intervals):
    """Begin and end of one interval of each row, within positions that there can be."""
    place = intervals_ptr + (row * num_intervals + i) * 2
    low = tl.load(place, mask=exists, other=0).to(tl.int64)
    high = tl.load(place + 1, mask=exists, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(low, 0), FAR).to(tl.int32), tl.minimum(tl.maximum(high, 0), FAR).to(tl.int32)


@triton.jit
def blocks_of_keys(begin, end, own, history, BLOCK_N: tl.constexpr):
    """The blocks of keys that the rows of a block see any of: two runs, each its first and their number."""
    last = tl.max(end)
    first = tl.min(begin) // BLOCK_N
    stop = (tl.minimum(last, history) + BLOCK_N - 1) // BLOCK_N
    count = tl.maximum(stop - first, 0)
    oldest = tl.min(tl.where(end > history, tl.maximum(own, begin), FAR))
    group_first = tl.maximum(oldest // BLOCK_N, tl.where(count > 0, stop, 0))
    group_stop = (tl.where(last > history, last, 0) + BLOCK_N - 1) // BLOCK_N
    return first, count, group_first, tl.maximum(group_stop - group_first, 0)


@triton.jit
def runs_of_rows(
    first_key, rows, length, prefix, history, window, group, tail, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The rows that may see a block of keys: three runs, each its first row and end, numbered as in q.

    They are rows of the prefix, rows of the history, and rows without a window and targets.
    """
    end_key = tl.minimum(first_key + BLOCK_N, length)
    old = first_key < history  # whether there is a key of prefix or history
    prefix_end = tl.where(old, prefix, 0)

    begin = first_key if CAUSAL else tl.where(window > 0, first_key - window, 0)
    reach = tl.maximum(end_key + window, tl.where(first_key < prefix, prefix + window, 0))
    end = tl.where(old, tl.where(window > 0, tl.minimum(reach, history), history), 0)
    begin = tl.where(old, tl.maximum(begin, prefix), 0)
    end = tl.maximum(begin, end)

    oldest = history - window  # that targets see within the window
    of_targets = old & ((window == 0) | (tail > 0) | (end_key > oldest) | (oldest < prefix))
    target = tl.maximum(first_key - history, 0)
    if CAUSAL:
        own_begin = history + target
        free_begin = tl.maximum(history - tl.where(window > 0, tail, 0), first_key)
    else:
        own_begin = history + target // group * group
        free_begin = history - tl.where(window > 0, tail, 0)
    own_end = tl.minimum(history + ((end_key - 1 - history) // group + 1) * group, length)
    own_end = tl.where(end_key > history, own_end, 0)
    last_begin = tl.maximum(tl.where(of_targets, free_begin, own_begin), tl.maximum(prefix, end))
    last_end = tl.maximum(tl.where(of_targets, length, own_end), last_begin)

    absent = length - rows  # tokens that are no rows
    return (
        0 * absent,
        tl.maximum(prefix_end - absent, 0),
        tl.maximum(begin - absent, 0),
        tl.maximum(end - absent, 0),
        tl.maximum(last_begin - absent, 0),
        tl.maximum(last_end - absent, 0),
    )


@triton.jit
def placed_rows(position, history, group):
    """Where rows count as standing for keys of the history: a target at its place in its group."""
    return tl.where(position < history, position, history + (position - history) % group)


@triton.jit
def row_times(timestamps_ptr, position, exists, first_key, length, history, NEXT: tl.constexpr):
    """The time at which each row asks, int64; where there are no times, anything."""
    if NEXT:
        position += (position < tl.minimum(history, length - 1)).to(tl.int32)
    return load_times(timestamps_ptr, first_key, position, exists)


@triton.jit
def load_times(timestamps_ptr, first_key, position, exists):
    """The times of tokens at some positions, int64; where there are no times, anything."""
    if timestamps_ptr is None:
        return position
    else:
        return tl.load(timestamps_ptr + (first_key + position), mask=exists, other=0)


@triton.jit
def extremes(times, exists):
    """The earliest and the latest of some times; where there are no times, anything."""
    if times.dtype == tl.int64:
        earliest = tl.min(tl.where(exists, times, 2**63 - 1))
        return earliest, tl.max(tl.where(exists, times, -(2**63 - 1)))
    else:
        return 0, 0


@triton.jit
def biased(
    scores,
    key,
    position,
    placed,
    asked,
    time,
    of_rows,
    of_keys,
    history,
    position_weights,
    time_weights,
    boundaries_ptr,
    num_distances,
    num_times,
    STEPS: tl.constexpr,
    DOWN: tl.constexpr,
):
    """Scores with the weights of the buckets of distance and time added, and these buckets of time.

    ``of_rows`` and ``of_keys`` are the extremes of the times. Also the least and largest bucket there can be.
    Rows run down the tile if ``DOWN``. The lanes of a warp take rows in either case: so each lane
    keeps little of what is told of rows.
    """
    bucket = 0
    least = 0
    most = 0
    keys = key[:, None]
    if position_weights is not None:
        distance = _distance_bucket(keys, position[None, :], placed[None, :], history, num_distances)
        bias = tl.load(position_weights + distance)  # [BLOCK_N, BLOCK_M]
        scores += tl.trans(bias) if DOWN else bias
    if time_weights is not None:
        least, most = _buckets_between(of_rows, of_keys, boundaries_ptr, num_times, STEPS)
        bucket = _time_bucket(asked[None, :] - time[:, None], least, most, boundaries_ptr)
        bias = tl.load(time_weights + bucket)
        scores += tl.trans(bias) if DOWN else bias
        bucket = tl.trans(bucket) if DOWN else bucket
    return scores, bucket, least, most


@triton.jit
def _distance_bucket(key, position, placed, history, num_distances):
    # Of targets only rows of their own group see them: these stand as far apart as they are.
    distance = key - tl.where(key < history, placed, position) + num_distances // 2
    return tl.minimum(tl.maximum(distance, 0), num_distances - 1)


@triton.jit
def _buckets_between(of_rows, of_keys, boundaries_ptr, num_times, STEPS: tl.constexpr):
    """The least and the largest bucket that times between these extremes can have."""
    gap = tl.maximum(of_rows[0] - of_keys[1], of_keys[0] - of_rows[1])
    span = tl.maximum(of_rows[1] - of_keys[0], of_keys[1] - of_rows[0])
    side = tl.arange(0, 2)
    difference = tl.where(side == 0, tl.maximum(gap, 0), span)
    bucket = side * 0
    for step in tl.static_range(STEPS):
        further = bucket + (1 << (STEPS - 1 - step))
        there = further < num_times
        boundary = tl.load(boundaries_ptr + (further - 1), mask=there, other=0)
        bucket = tl.where(there & (difference >= boundary), further, bucket)
    # Differences of times this large may wrap around.
    earliest = tl.minimum(of_rows[0], of_keys[0])
    wraps = (earliest < -(2**62)) | (tl.maximum(of_rows[1], of_keys[1]) >= 2**62)
    least = tl.min(bucket)
    most = tl.max(bucket)
    return tl.where(wraps, 0, least), tl.where(wraps, num_times - 1, most)


@triton.jit
def _time_bucket(difference, least, most, boundaries_ptr):
    """How many boundaries are at most the magnitude of a difference: a search from ``least`` to ``most``.

    Tiles are small in time against their distance, so that it mostly ends after a step or two.
    """
    difference = tl.where(difference < 0, -difference, difference)
    bucket = (difference * 0).to(tl.int32) + least
    step = 1
    while step <= most - least:
        step *= 2
    while step > 1:
        step = step // 2
        further = bucket + step
        there = further <= most
        boundary = tl.load(boundaries_ptr + (further - 1), mask=there, other=0)
        bucket = tl.where(there & (difference >= boundary), further, bucket)
    return bucket


@triton.jit
def kept_by_dropout(
    dropout_seed_ptr, threshold, row, head, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Whether dropout keeps each score, [BLOCK_M, BLOCK_N], as ``philox.py`` has it."""
    seed = tl.load(dropout_seed_ptr)
    threshold = threshold.to(tl.uint32)
    if BLOCK_N % 64 == 0:
        counter = first_key // 4 + tl.arange(0, BLOCK_N // 4)
        words = _words(seed, counter, row, head, BLOCK_M, BLOCK_N // 4)
        a = (words[0] >= threshold).to(tl.int8)
        b = (words[1] >= threshold).to(tl.int8)
        c = (words[2] >= threshold).to(tl.int8)
        d = (words[3] >= threshold).to(tl.int8)
        # Of 64 keys, each word is that of 16 neighbours.
        kept = tl.join(tl.join(a, c), tl.join(b, d))  # [BLOCK_M, BLOCK_N // 4, 2, 2]
        kept = tl.reshape(kept, [BLOCK_M, BLOCK_N // 64, 16, 4])
        kept = tl.permute(kept, [0, 1, 3, 2])
        return tl.reshape(kept, [BLOCK_M, BLOCK_N]) != 0
    else:
        key = first_key + tl.arange(0, BLOCK_N)
        words = _words(seed, key // 64 * 16 + key % 16, row, head, BLOCK_M, BLOCK_N)
        number = (key % 64 // 16)[None, :]
        word = tl.where(
            number < 2, tl.where(number == 0, words[0], words[1]), tl.where(number == 2, words[2], words[3])
        )
        return word >= threshold


@triton.jit
def _words(seed, counter, row, head, BLOCK_M: tl.constexpr, COUNTERS: tl.constexpr):
    """The four words of each row and counter, uint32 [BLOCK_M, COUNTERS]."""
    zeros = tl.zeros([BLOCK_M, COUNTERS], tl.int32)
    low = (row & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    high = (row >> 32).to(tl.int32)
    return tl.philox(
        seed, zeros + counter[None, :], zeros + low[:, None], zeros + head.to(tl.int32), zeros + high[:, None]
    )

"""Device code of the embedding bag; ``embedding_bag.py`` launches it.

Programs of a one-dimensional grid are numbered by blocks of columns first, then by bags (or
chunks). Shapes in comments: BAGS or CHUNKS side by side, BLOCK_D columns each.

A table's width and strides are compile-time constants: so the compiler drops the mask of
full tiles, proves alignment, and gets 16-byte loads where they exist. What varies
from batch to batch is never specialised on.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

_VARYING = ["num_bags", "num_offsets", "num_indices", "num_embeddings", "padding_idx"]
_VARYING += ["num_terms", "num_rows", "num_columns", "first_program"]


@triton.jit
def _tile_and_block(first_program, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which bags (or chunks) and which block of columns a program has: int64."""
    program = tl.program_id(0).to(tl.int64) + first_program
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    # The blocks of a row run together: its ids come from memory once, and its cells from one page of it.
    return program // blocks, program % blocks


@triton.jit
def bag_ranges(offsets_ptr, bags, num_bags, num_offsets, num_indices):
    """First entry and end of each bag, within the indices whatever the offsets say: int64."""
    exists = bags < num_bags
    bounded = bags + 1 < num_offsets
    begin = tl.load(offsets_ptr + bags, mask=exists, other=0).to(tl.int64)
    end = tl.load(offsets_ptr + bags + 1, mask=exists & bounded, other=0).to(tl.int64)
    end = tl.where(exists, tl.where(bounded, end, num_indices), 0)
    ordered = (begin <= end) & (end <= num_indices) & tl.where(bags == 0, begin == 0, begin >= 0)
    tl.device_assert(ordered, "embedding_bag: expected offsets from 0, never decreasing, within the indices")
    return tl.maximum(begin, 0), tl.minimum(end, num_indices)


@triton.jit
def live_rows(indices_ptr, entries, in_bag, num_embeddings, padding_idx):
    """Row numbers, and which of them are live."""
    rows = tl.load(indices_ptr + entries, mask=in_bag, other=-1).to(tl.int64)
    return rows, (rows >= 0) & (rows < num_embeddings) & (rows != padding_idx)


@triton.jit
def count_live(
    indices_ptr, begin, end, num_embeddings, padding_idx, DROP_INVALID: tl.constexpr, BAGS: tl.constexpr
):
    """Live entries of each bag, [BAGS], asserting that all are valid unless they may be dropped.

    Reads several ids of a bag at a time, so whoever reads them next finds them in the cache.
    """
    ids: tl.constexpr = min(32, max(8, 128 // BAGS))
    count = tl.zeros([BAGS, ids], tl.int32)
    for first in range(0, tl.max(end - begin), ids):
        entries = begin[:, None] + first + tl.arange(0, ids)[None, :]
        inside = entries < end[:, None]
        rows, live = live_rows(indices_ptr, entries, inside, num_embeddings, padding_idx)
        if not DROP_INVALID:
            valid = (rows >= 0) & (rows < num_embeddings)
            tl.device_assert(valid | ~inside, "embedding_bag: expected indices in [0, num_embeddings)")
        count += live
    return tl.sum(count.to(tl.int64), 1)


@triton.jit
def divide(x, y):
    """Rounded to nearest; the plain division of fp32 is off by up to 2 ulp."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def sum_of_rows(
    table,
    row_stride,
    in_row,
    indices_ptr,
    per_sample_weights_ptr,
    begin,
    end,
    num_embeddings,
    padding_idx,
    ACCUMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BAGS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum of the rows of each bag, added in order, of a table at the pointers to its first row."""
    pooled = tl.zeros([BAGS, BLOCK_D], ACCUMULATE)
    for first in range(0, tl.max(end - begin), ROWS):
        in_flight = ()
        factors = ()
        for i in tl.static_range(ROWS):
            entries = begin + (first + i)
            rows, live = live_rows(indices_ptr, entries, entries < end, num_embeddings, padding_idx)
            in_flight += (
                tl.load(table + (rows * row_stride)[:, None], mask=live[:, None] & in_row, other=0),
            )
            if per_sample_weights_ptr is not None:
                factors += (tl.load(per_sample_weights_ptr + entries, mask=live, other=0),)
        for i in tl.static_range(ROWS):
            if per_sample_weights_ptr is None:
                pooled += in_flight[i].to(ACCUMULATE)
            else:
                pooled += in_flight[i].to(ACCUMULATE) * factors[i].to(ACCUMULATE)[:, None]
    return pooled


@triton.jit
def maximum_of_rows(
    table,
    row_stride,
    in_row,
    indices_ptr,
    begin,
    end,
    num_embeddings,
    padding_idx,
    ACCUMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BAGS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Maximum of the rows of each bag and the position of its first occurrence, or 0 and -1."""
    highest = tl.zeros([BAGS, BLOCK_D], ACCUMULATE)
    argmax = tl.full([BAGS, BLOCK_D], -1, tl.int32)
    for first in range(0, tl.max(end - begin), ROWS):
        in_flight = ()
        positions = ()
        for i in tl.static_range(ROWS):
            entries = begin + (first + i)
            rows, live = live_rows(indices_ptr, entries, entries < end, num_embeddings, padding_idx)
            in_flight += (
                tl.load(table + (rows * row_stride)[:, None], mask=live[:, None] & in_row, other=0),
            )
            positions += (tl.where(live, first + i, -1).to(tl.int32),)
        for i in tl.static_range(ROWS):
            values = in_flight[i].to(ACCUMULATE)
            # A NaN compares as false, so it wins only where there is no maximum yet, and then stays.
            better = (positions[i] >= 0)[:, None] & ((argmax < 0) | (values > highest))
            highest = tl.where(better, values, highest)
            argmax = tl.where(better, positions[i][:, None], argmax)
    return highest, argmax


@triton.jit(do_not_specialize=_VARYING)
def embedding_bag_forward_kernel(
    output_ptr,
    weight_ptr,
    indices_ptr,
    offsets_ptr,
    per_sample_weights_ptr,
    num_bags,
    num_offsets,
    num_indices,
    num_embeddings,
    padding_idx,
    first_program,
    D: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    MEAN: tl.constexpr,
    DROP_INVALID: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BAGS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum or mean of each bag, its entries added in order."""
    tile, block = _tile_and_block(first_program, D, BLOCK_D)
    bags = tile * BAGS + tl.arange(0, BAGS)
    columns = block * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = (columns < D)[None, :]
    table = weight_ptr + (columns * COLUMN_STRIDE)[None, :]
    begin, end = bag_ranges(offsets_ptr, bags, num_bags, num_offsets, num_indices)
    if MEAN or not DROP_INVALID:
        size = count_live(indices_ptr, begin, end, num_embeddings, padding_idx, DROP_INVALID, BAGS)
    pooled = sum_of_rows(
        *(table, ROW_STRIDE, in_row, indices_ptr, per_sample_weights_ptr, begin, end),
        *(num_embeddings, padding_idx, ACCUMULATE, BLOCK_D, BAGS, ROWS),
    )
    if MEAN:
        pooled = divide(pooled, tl.maximum(size, 1).to(ACCUMULATE)[:, None])
    cells = (bags * D)[:, None] + columns[None, :]
    tl.store(output_ptr + cells, pooled, mask=(bags < num_bags)[:, None] & in_row)


@triton.jit(do_not_specialize=_VARYING)
def embedding_bag_max_forward_kernel(
    output_ptr,
    argmax_ptr,
    weight_ptr,
    indices_ptr,
    offsets_ptr,
    num_bags,
    num_offsets,
    num_indices,
    num_embeddings,
    padding_idx,
    first_program,
    D: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    DROP_INVALID: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BAGS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Maximum of each bag and the position of its first occurrence."""
    tile, block = _tile_and_block(first_program, D, BLOCK_D)
    bags = tile * BAGS + tl.arange(0, BAGS)
    columns = block * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = (columns < D)[None, :]
    table = weight_ptr + (columns * COLUMN_STRIDE)[None, :]
    begin, end = bag_ranges(offsets_ptr, bags, num_bags, num_offsets, num_indices)
    if not DROP_INVALID:
        count_live(indices_ptr, begin, end, num_embeddings, padding_idx, DROP_INVALID, BAGS)
    highest, argmax = maximum_of_rows(
        *(table, ROW_STRIDE, in_row, indices_ptr, begin, end),
        *(num_embeddings, padding_idx, ACCUMULATE, BLOCK_D, BAGS, ROWS),
    )
    cells = (bags * D)[:, None] + columns[None, :]
    mask = (bags < num_bags)[:, None] & in_row
    tl.store(output_ptr + cells, highest, mask=mask)
    tl.store(argmax_ptr + cells, argmax, mask=mask)


@triton.jit(do_not_specialize=_VARYING)
def embedding_bag_entries_kernel(
    keys_ptr,
    bags_ptr,
    factors_ptr,
    indices_ptr,
    offsets_ptr,
    per_sample_weights_ptr,
    num_bags,
    num_offsets,
    num_indices,
    num_embeddings,
    padding_idx,
    first_program,
    MEAN: tl.constexpr,
    DROP_INVALID: tl.constexpr,
    BAGS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Row, bag and factor of each live entry: the factor is its weight, over the bag's size for a mean."""
    bags = (tl.program_id(0).to(tl.int64) + first_program) * BAGS + tl.arange(0, BAGS)
    begin, end = bag_ranges(offsets_ptr, bags, num_bags, num_offsets, num_indices)
    if MEAN or not DROP_INVALID:
        size = count_live(indices_ptr, begin, end, num_embeddings, padding_idx, DROP_INVALID, BAGS)
    for first in range(0, tl.max(end - begin), ENTRIES):
        entries = begin[:, None] + first + tl.arange(0, ENTRIES)[None, :]
        rows, live = live_rows(indices_ptr, entries, entries < end[:, None], num_embeddings, padding_idx)
        tl.store(keys_ptr + entries, rows, mask=live)
        tl.store(bags_ptr + entries, tl.broadcast_to(bags[:, None], [BAGS, ENTRIES]), mask=live)
        if factors_ptr is not None:
            factors = tl.full([BAGS, ENTRIES], 1, factors_ptr.dtype.element_ty)
            if per_sample_weights_ptr is not None:
                factors = tl.load(per_sample_weights_ptr + entries, mask=live, other=0).to(factors.dtype)
            if MEAN:
                factors = divide(factors, tl.maximum(size, 1).to(factors.dtype)[:, None])
            tl.store(factors_ptr + entries, factors, mask=live)


@triton.jit
def load_rows(rows_ptr, positions, num_terms, num_rows):
    """Rows of sorted terms; ``num_rows``, the mark of a dead term, before the first and after the last."""
    return tl.load(rows_ptr + positions, mask=(positions >= 0) & (positions < num_terms), other=num_rows)


@triton.jit
def first_row_of_chunk(rows_ptr, begin, num_terms, num_rows):
    """Row of a chunk's first term, and whether its run started in the chunk before."""
    first_row = load_rows(rows_ptr, begin, num_terms, num_rows)
    return first_row, (first_row < num_rows) & (
        first_row == load_rows(rows_ptr, begin - 1, num_terms, num_rows)
    )


@triton.jit
def end_of_run(row, next_row, first_row, starts_before, num_rows):
    """Whether a term belongs to the run that started before its chunk, and whether it ends a run."""
    return starts_before & (row == first_row), (row < num_rows) & (row != next_row)


@triton.jit
def store_pieces(
    pieces_ptr,
    targets_ptr,
    rows_ptr,
    chunks,
    columns,
    is_first_block,
    run,
    first_run,
    first_row,
    starts_before,
    num_terms,
    num_rows,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What a chunk leaves of the runs that cross its ends, see ``embedding_bag_backward_kernel``."""
    begin = chunks * CHUNK
    in_row = (columns < D)[None, :]
    last_row = load_rows(rows_ptr, begin + CHUNK - 1, num_terms, num_rows)
    goes_on = (last_row < num_rows) & (last_row == load_rows(rows_ptr, begin + CHUNK, num_terms, num_rows))
    is_inside_a_run = starts_before & (last_row == first_row)
    pieces = pieces_ptr + (chunks * 2 * D)[:, None] + columns[None, :]
    tl.store(pieces, first_run, mask=starts_before[:, None] & in_row)
    tl.store(pieces + D, tl.where(is_inside_a_run[:, None], 0, run), mask=goes_on[:, None] & in_row)
    targets = targets_ptr + chunks * 2
    exists = (begin < num_terms) & is_first_block
    tl.store(targets, tl.where(starts_before, first_row, num_rows), mask=exists)
    tl.store(targets + 1, tl.where(goes_on, last_row, num_rows), mask=exists)


@triton.jit(do_not_specialize=_VARYING)
def embedding_bag_backward_kernel(
    grad_weight_ptr,
    pieces_ptr,
    targets_ptr,
    terms_ptr,
    rows_ptr,
    order_ptr,
    bags_ptr,
    factors_ptr,
    argmax_ptr,
    offsets_ptr,
    num_terms,
    num_rows,
    first_program,
    D: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sums the runs in each chunk of sorted terms, in order.

    The terms are the gradients of the bags, by way of ``order``, or without one the pieces
    that the level before left. A run that starts and ends in the chunk goes to its row of the
    gradient. One that crosses chunks leaves pieces: ``pieces[2 * chunk]`` where it began before
    the chunk, ``pieces[2 * chunk + 1]`` where it goes on after it, with their rows in ``targets``.
    A chunk inside a run leaves its sum and zeros, so that the pieces of a run stay side by side.
    """
    tile, block = _tile_and_block(first_program, D, BLOCK_D)
    chunks = tile * CHUNKS + tl.arange(0, CHUNKS)
    columns = block * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = (columns < D)[None, :]
    begin = chunks * CHUNK
    first_row, starts_before = first_row_of_chunk(rows_ptr, begin, num_terms, num_rows)
    run = tl.zeros([CHUNKS, BLOCK_D], ACCUMULATE)
    first_run = tl.zeros([CHUNKS, BLOCK_D], ACCUMULATE)
    for first in range(0, CHUNK, ROWS):
        rows = (load_rows(rows_ptr, begin + first, num_terms, num_rows),)
        in_flight = ()
        factors = ()
        for i in tl.static_range(ROWS):
            positions = begin + (first + i)
            live = rows[i] < num_rows
            if order_ptr is None:
                cells = (positions * D)[:, None] + columns[None, :]  # [CHUNKS, BLOCK_D]
            else:
                entries = tl.load(order_ptr + positions, mask=live, other=0)
                bags = tl.load(bags_ptr + entries, mask=live, other=0).to(tl.int64)
                cells = (bags * D)[:, None] + columns[None, :]
            values = tl.load(terms_ptr + cells, mask=live[:, None] & in_row, other=0)
            if factors_ptr is not None:
                factors += (tl.load(factors_ptr + entries, mask=live, other=0),)
            if argmax_ptr is not None:
                position_in_bag = entries - tl.load(offsets_ptr + bags, mask=live, other=0)
                winner = tl.load(argmax_ptr + cells, mask=live[:, None] & in_row, other=-1)
                values = tl.where(winner == position_in_bag[:, None], values, 0)
            in_flight += (values,)
            rows += (load_rows(rows_ptr, positions + 1, num_terms, num_rows),)
        for i in tl.static_range(ROWS):
            if factors_ptr is None:
                run += in_flight[i].to(ACCUMULATE)
            else:
                run += in_flight[i].to(ACCUMULATE) * factors[i][:, None]
            in_first_run, ends = end_of_run(rows[i], rows[i + 1], first_row, starts_before, num_rows)
            target = grad_weight_ptr + (rows[i].to(tl.int64) * D)[:, None] + columns[None, :]
            tl.store(target, run, mask=(ends & ~in_first_run)[:, None] & in_row)
            first_run = tl.where(in_first_run[:, None], run, first_run)
            run = tl.where(ends[:, None], 0, run)
    store_pieces(
        *(pieces_ptr, targets_ptr, rows_ptr, chunks, columns, block == 0, run, first_run),
        *(first_row, starts_before, num_terms, num_rows, D, CHUNK),
    )


@triton.jit(do_not_specialize=_VARYING)
def embedding_bag_backward_per_sample_weights_kernel(
    grad_ptr,
    grad_output_ptr,
    weight_ptr,
    keys_ptr,
    bags_ptr,
    factors_ptr,
    num_indices,
    num_embeddings,
    num_columns,
    first_program,
    D: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Dot product of each entry's row with the gradient of its bag."""
    tile = tl.program_id(0).to(tl.int64) + first_program
    entries = tile * ENTRIES + tl.arange(0, ENTRIES)[:, None]  # [ENTRIES, 1]
    rows = tl.load(keys_ptr + entries, mask=entries < num_indices, other=num_embeddings).to(tl.int64)
    live = rows < num_embeddings
    bags = tl.load(bags_ptr + entries, mask=live, other=0).to(tl.int64)
    vector: tl.constexpr = min(BLOCK_D, 128 // weight_ptr.dtype.element_ty.primitive_bitwidth)
    products = tl.zeros([ENTRIES, BLOCK_D // vector], ACCUMULATE)  # a lane adds up what it loads at once
    # Told how many blocks there are, compilers unroll the loop: on AMD until it spills.
    for first in range(0, D if D <= BLOCK_D else num_columns, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)[None, :].to(tl.int64)  # [1, BLOCK_D]
        mask = live & (columns < D)
        gradients = tl.load(grad_output_ptr + bags * D + columns, mask=mask, other=0)
        values = tl.load(weight_ptr + rows * ROW_STRIDE + columns * COLUMN_STRIDE, mask=mask, other=0)
        in_block = gradients.to(ACCUMULATE) * values.to(ACCUMULATE)
        products += tl.sum(tl.reshape(in_block, [ENTRIES, BLOCK_D // vector, vector]), 2)
    grad = tl.sum(products, 1, keep_dims=True)
    if factors_ptr is not None:
        grad *= tl.load(factors_ptr + entries, mask=live, other=0)
    tl.store(grad_ptr + entries, grad, mask=entries < num_indices)

"""Device code of gradients and updates of many tables; ``embedding_bag_collection.py`` launches it.

The rows of all tables are numbered through, table after table: these are the keys that entries are
sorted by. Each table starts at a multiple of a page of ``2**page_bits`` rows, so that one load
finds the table of a key. What differs between tables is in a directory, int64 [fields, tables].
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from recsys_ops.triton_kernels.embedding_bag_collection_kernels import (
    FIRST_BAG,
    FIRST_PROGRAM,
    IS_MEAN,
    NUM_BAGS,
    NUM_ROWS,
    START,
    STRIDE,
    VARYING,
    field,
    owner,
)
from recsys_ops.triton_kernels.embedding_bag_kernels import (
    bag_ranges,
    count_live,
    divide,
    end_of_run,
    first_row_of_chunk,
    live_rows,
    load_rows,
    store_pieces,
)

# The fields of the lookups whose entries are found. ENTRIES_OF is the lookup whose entries they are.
ENTRY_FIELDS = ("first_program", "first_bag", "num_bags", "start", "stride", "is_mean", "rows")
ENTRY_FIELDS += ("first_key", "entries_of")
FIRST_KEY, ENTRIES_OF = map(tl.constexpr, (7, 8))

# The fields of a directory of tables: of the weight and up to two states, address and strides.
TABLE_FIELDS = ("first_key_of_table", "number")
TABLE_FIELDS += tuple(f"{what}_{i}" for i in range(3) for what in ("address", "row_stride", "column_stride"))
FIRST_KEY_OF_TABLE, NUMBER, ADDRESSES = map(tl.constexpr, range(3))

_VARYING = [*VARYING, "num_entries", "num_terms", "num_rows", "num_tables", "page_bits", "num_slots"]
_VARYING += ["dead_key", "salt"]


@triton.jit(do_not_specialize=_VARYING)
def embedding_bag_collection_entry_starts_kernel(
    starts_ptr,
    lookups_ptr,
    offsets_ptr,
    num_lookups,
    num_values,
    num_entries,
    LOOKUPS: tl.constexpr,
):
    """Where the entries of each lookup start when all follow one another; one program does it."""
    total = tl.zeros([], tl.int64)
    for first in range(0, num_lookups, LOOKUPS):
        lookups = first + tl.arange(0, LOOKUPS)
        exists = lookups < num_lookups
        first_bag = tl.load(lookups_ptr + FIRST_BAG * num_lookups + lookups, mask=exists, other=0)
        num_bags = tl.load(lookups_ptr + NUM_BAGS * num_lookups + lookups, mask=exists, other=0)
        begin = tl.load(offsets_ptr + first_bag, mask=exists, other=0).to(tl.int64)
        end = tl.load(offsets_ptr + first_bag + num_bags, mask=exists, other=0).to(tl.int64)
        # What is out of bounds fails an assertion elsewhere, and is not to lead out of bounds here.
        lengths = tl.minimum(tl.maximum(end - begin, 0), num_values)
        ends = total + tl.cumsum(lengths, 0)
        tl.store(starts_ptr + lookups, ends - lengths, mask=exists)
        total += tl.sum(lengths)
    tl.device_assert(
        total <= num_entries, "embedding_bag_collection: expected lookups of other bags to be of other values"
    )


@triton.jit(do_not_specialize=_VARYING)
def embedding_bag_collection_entries_kernel(
    cells_ptr,
    keys_ptr,
    factors_ptr,
    positions_ptr,
    starts_ptr,
    lookups_ptr,
    values_ptr,
    offsets_ptr,
    per_sample_weights_ptr,
    num_lookups,
    num_offsets,
    num_values,
    num_entries,
    first_program,
    COUNT: tl.constexpr,
    DROP_INVALID: tl.constexpr,
    BAGS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Key of each live entry, where its bag has its cells, its factor and its position in the bag."""
    program = tl.program_id(0).to(tl.int64) + first_program
    lookup = owner(lookups_ptr, num_lookups, program)
    tile = program - field(lookups_ptr, num_lookups, FIRST_PROGRAM, lookup)
    first_bag = field(lookups_ptr, num_lookups, FIRST_BAG, lookup)
    num_bags = field(lookups_ptr, num_lookups, NUM_BAGS, lookup)
    num_rows = field(lookups_ptr, num_lookups, NUM_ROWS, lookup)
    in_lookup = tile * BAGS + tl.arange(0, BAGS)
    begin, end = bag_ranges(offsets_ptr, first_bag + in_lookup, first_bag + num_bags, num_offsets, num_values)
    if COUNT:
        size = count_live(values_ptr, begin, end, num_rows, -1, DROP_INVALID, BAGS)
        is_mean = field(lookups_ptr, num_lookups, IS_MEAN, lookup) != 0
        divisor = tl.where(is_mean, tl.maximum(size, 1), 1)[:, None]
    start = field(lookups_ptr, num_lookups, START, lookup)
    cells = (start + in_lookup * field(lookups_ptr, num_lookups, STRIDE, lookup))[:, None]
    first_key = field(lookups_ptr, num_lookups, FIRST_KEY, lookup)
    first_entry = tl.load(starts_ptr + field(lookups_ptr, num_lookups, ENTRIES_OF, lookup))
    shift = first_entry - tl.maximum(tl.load(offsets_ptr + first_bag).to(tl.int64), 0)
    for first in range(0, tl.max(end - begin), ENTRIES):
        in_bag = first + tl.arange(0, ENTRIES)[None, :]
        positions = begin[:, None] + in_bag
        rows, live = live_rows(values_ptr, positions, positions < end[:, None], num_rows, -1)
        entries = shift + positions
        live = live & (entries >= 0) & (entries < num_entries)
        tl.store(cells_ptr + entries, tl.broadcast_to(cells, [BAGS, ENTRIES]), mask=live)
        if keys_ptr is not None:
            tl.store(keys_ptr + entries, first_key + rows, mask=live)
        if factors_ptr is not None:
            factors = tl.full([BAGS, ENTRIES], 1, factors_ptr.dtype.element_ty)
            if per_sample_weights_ptr is not None:
                factors = tl.load(per_sample_weights_ptr + positions, mask=live, other=0)
            if COUNT:
                factors = divide(factors, divisor.to(factors.dtype))
            tl.store(factors_ptr + entries, factors, mask=live)
        if positions_ptr is not None:
            tl.store(positions_ptr + entries, tl.broadcast_to(in_bag, [BAGS, ENTRIES]), mask=live)


@triton.jit
def _find_rows(tables_ptr, pages_ptr, num_tables, page_bits, keys, exists):
    """Pointers into the directory at the tables of keys, and the rows in these tables."""
    tables = tables_ptr + tl.load(pages_ptr + (keys >> page_bits), mask=exists, other=0).to(tl.int64)
    return tables, keys - tl.load(tables + FIRST_KEY_OF_TABLE * num_tables, mask=exists, other=0)


@triton.jit
def _pointers_to_rows(
    tables,
    rows,
    num_tables,
    exists,
    TENSOR: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """To the first cell of rows of a weight (TENSOR 0) or state."""
    size: tl.constexpr = DTYPE.primitive_bitwidth // 8
    first: tl.constexpr = ADDRESSES + 3 * TENSOR
    address = tl.load(tables + first * num_tables, mask=exists, other=0)
    address += rows * tl.load(tables + (first + 1) * num_tables, mask=exists, other=0) * size
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGNMENT * size)


@triton.jit(do_not_specialize=_VARYING)
def embedding_bag_collection_backward_kernel(
    pieces_ptr,
    targets_ptr,
    sums_ptr,
    tables_ptr,
    pages_ptr,
    terms_ptr,
    rows_ptr,
    order_ptr,
    cells_ptr,
    factors_ptr,
    argmax_ptr,
    positions_ptr,
    num_tables,
    page_bits,
    num_terms,
    num_rows,
    first_program,
    D: tl.constexpr,
    DTYPE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ROW_ALIGNMENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sums the runs in each chunk of sorted terms as ``embedding_bag_backward_kernel`` does.

    The sum of a row goes to ``sums`` [rows, D], or without those to the row in its table. ALIGNMENT
    is that of the terms, ROW_ALIGNMENT that of rows of tables.
    """
    program = tl.program_id(0).to(tl.int64) + first_program
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    block = program % blocks
    chunks = (program // blocks) * CHUNKS + tl.arange(0, CHUNKS)
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
            terms = begin + (first + i)
            live = rows[i] < num_rows
            if order_ptr is None:
                cells = terms * D
            else:
                entries = tl.load(order_ptr + terms, mask=live, other=0)
                cells = tl.load(cells_ptr + entries, mask=live, other=0)
                cells = tl.multiple_of(cells.to(tl.int64), ALIGNMENT)
            cells = cells[:, None] + columns[None, :]  # [CHUNKS, BLOCK_D]
            values = tl.load(terms_ptr + cells, mask=live[:, None] & in_row, other=0)
            if factors_ptr is not None:
                factors += (tl.load(factors_ptr + entries, mask=live, other=0),)
            if argmax_ptr is not None:
                position_in_bag = tl.load(positions_ptr + entries, mask=live, other=0)
                winner = tl.load(argmax_ptr + cells, mask=live[:, None] & in_row, other=-1)
                values = tl.where(winner == position_in_bag[:, None], values, 0)
            in_flight += (values,)
            rows += (load_rows(rows_ptr, terms + 1, num_terms, num_rows),)
        for i in tl.static_range(ROWS):
            if factors_ptr is None:
                run += in_flight[i].to(ACCUMULATE)
            else:
                run += in_flight[i].to(ACCUMULATE) * factors[i][:, None]
            in_first_run, ends = end_of_run(rows[i], rows[i + 1], first_row, starts_before, num_rows)
            stored = ends & ~in_first_run
            if sums_ptr is None:
                tables, in_table = _find_rows(
                    tables_ptr, pages_ptr, num_tables, page_bits, rows[i].to(tl.int64), stored
                )
                target = _pointers_to_rows(tables, in_table, num_tables, stored, 0, DTYPE, ROW_ALIGNMENT)
                target = target[:, None]
            else:
                target = sums_ptr + (rows[i].to(tl.int64) * D)[:, None]
            tl.store(target + columns[None, :], run, mask=stored[:, None] & in_row)
            first_run = tl.where(in_first_run[:, None], run, first_run)
            run = tl.where(ends[:, None], 0, run)
    store_pieces(
        *(pieces_ptr, targets_ptr, rows_ptr, chunks, columns, block == 0, run, first_run),
        *(first_row, starts_before, num_terms, num_rows, D, CHUNK),
    )


@triton.jit
def _mix(x):
    """The finaliser of MurmurHash3."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _rounded(x, DTYPE: tl.constexpr, salt, tensors, rows, columns):
    """x [ROWS, BLOCK_D], for a half type rounded to it up or down by chance."""
    if DTYPE.primitive_bitwidth > 16:
        return x
    else:
        eps: tl.constexpr = 2.0**-7 if DTYPE.is_bf16() else 2.0**-10
        smallest: tl.constexpr = 2.0**-133 if DTYPE.is_bf16() else 2.0**-24
        key = _mix(tensors.to(tl.uint32) + salt.to(tl.uint32))
        key = _mix((rows >> 32).to(tl.uint32) + key)
        key = _mix(rows.to(tl.uint32) + key)
        bits = _mix(key[:, None] + columns.to(tl.uint32) * 0x9E3779B9) >> 20
        exponent = x.to(tl.float32).to(tl.uint32, bitcast=True) & 0x7F800000
        # Triton takes constants below the normal numbers of fp32 for fp64.
        ulp = tl.maximum(exponent.to(tl.float32, bitcast=True) * eps, tl.cast(smallest, tl.float32))
        noise = (bits.to(tl.int32).to(tl.float32) - 2047.5) / 4096
        integers: tl.constexpr = 1.5 * 2.0**23  # from here on floats are integers
        in_units = (divide(x.to(tl.float32), ulp) + noise + integers) - integers
        return tl.where(exponent == 0x7F800000, x, (in_units * ulp).to(x.dtype))


@triton.jit
def _root(x):
    """Rounded to nearest; the plain root of fp32 is not."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def _norm(x):
    return _root(tl.sum(x * x, 1, keep_dims=True))


@triton.jit
def _pointers_to_cells(
    tables,
    rows,
    num_tables,
    exists,
    columns,
    TENSOR: tl.constexpr,
    DTYPE: tl.constexpr,
    UNIT_COLUMNS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """The same to all cells, [ROWS, BLOCK_D]."""
    start = _pointers_to_rows(tables, rows, num_tables, exists, TENSOR, DTYPE, ALIGNMENT)
    if UNIT_COLUMNS:
        return start[:, None] + columns
    else:
        stride: tl.constexpr = ADDRESSES + 3 * TENSOR + 2
        column_stride = tl.load(tables + stride * num_tables, mask=exists, other=0)
        return start[:, None] + columns * column_stride[:, None]


@triton.jit(do_not_specialize=_VARYING)
def embedding_bag_collection_update_kernel(
    sums_ptr,
    keys_ptr,
    tables_ptr,
    pages_ptr,
    num_tables,
    page_bits,
    num_slots,
    dead_key,
    salt: tl.uint32,
    first_program,
    lr: tl.float64,
    eps: tl.float64,
    of_first_moment: tl.float64,
    of_second_moment: tl.float64,
    first_correction: tl.float64,
    second_correction: tl.float64,
    weight_decay: tl.float64,
    decoupled_weight_decay: tl.float64,
    max_gradient: tl.float64,
    max_gradient_norm: tl.float64,
    HAS_SUM: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
    TRUST: tl.constexpr,
    CLIP: tl.constexpr,
    CLIP_NORM: tl.constexpr,
    FIRST_DTYPE: tl.constexpr,
    SECOND_DTYPE: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWWISE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    UNIT_COLUMNS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Applies ``row_optimizers.update_rows`` to the rows of keys [num_slots], by their sums [num_slots, D].

    HAS_SUM says that the first state is a sum, HAS_MOMENTS that the first and second are moments. The
    last of these has a number for each row where ROWWISE.
    """
    slots = (tl.program_id(0).to(tl.int64) + first_program) * ROWS + tl.arange(0, ROWS)
    keys = tl.load(keys_ptr + slots, mask=slots < num_slots, other=dead_key).to(tl.int64)
    touched = keys < dead_key
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = touched[:, None] & (columns < D)  # [ROWS, BLOCK_D]
    of_state = touched[:, None] if ROWWISE else mask
    state_columns = tl.zeros([1, 1], tl.int32) if ROWWISE else columns
    tables, rows = _find_rows(tables_ptr, pages_ptr, num_tables, page_bits, keys, touched)
    tensors = 4 * tl.load(tables + NUMBER * num_tables, mask=touched, other=0)
    where = (tables, rows, num_tables, touched)
    g = tl.load(sums_ptr + (slots * D)[:, None] + columns, mask=mask, other=0)
    if CLIP:
        most = tl.cast(max_gradient, ACCUMULATE)
        g = tl.where(g > most, most, tl.where(g < -most, -most, g))  # which lets NaN through
    if CLIP_NORM:
        most = tl.cast(max_gradient_norm, ACCUMULATE)
        norm = _norm(g)
        g *= divide(most, tl.where(norm < most, most, norm))
    w_ptr = _pointers_to_cells(*where, columns, 0, DTYPE, UNIT_COLUMNS, ALIGNMENT)
    w = tl.load(w_ptr, mask=mask, other=0).to(ACCUMULATE)
    g += tl.cast(weight_decay, ACCUMULATE) * w
    square = g * g
    if ROWWISE:
        square = divide(tl.sum(square, 1, keep_dims=True), tl.cast(D, ACCUMULATE))
    STATE_ALIGNMENT: tl.constexpr = 1 if ROWWISE else ALIGNMENT
    u = g
    if HAS_SUM:
        s_ptr = _pointers_to_cells(*where, state_columns, 1, FIRST_DTYPE, UNIT_COLUMNS, STATE_ALIGNMENT)
        s = tl.load(s_ptr, mask=of_state, other=0).to(ACCUMULATE) + square
        u = divide(g, _root(s) + tl.cast(eps, ACCUMULATE))
        if STOCHASTIC:
            s = _rounded(s, FIRST_DTYPE, salt, tensors + 1, rows, state_columns)
        tl.store(s_ptr, s.to(FIRST_DTYPE), mask=of_state)
    if HAS_MOMENTS:
        m_ptr = _pointers_to_cells(*where, columns, 1, FIRST_DTYPE, UNIT_COLUMNS, ALIGNMENT)
        v_ptr = _pointers_to_cells(*where, state_columns, 2, SECOND_DTYPE, UNIT_COLUMNS, STATE_ALIGNMENT)
        m = tl.load(m_ptr, mask=mask, other=0).to(ACCUMULATE)
        v = tl.load(v_ptr, mask=of_state, other=0).to(ACCUMULATE)
        m += tl.cast(of_first_moment, ACCUMULATE) * (g - m)
        v += tl.cast(of_second_moment, ACCUMULATE) * (square - v)
        root = _root(divide(v, tl.cast(second_correction, ACCUMULATE)))
        u = divide(divide(m, tl.cast(first_correction, ACCUMULATE)), root + tl.cast(eps, ACCUMULATE))
        if STOCHASTIC:
            m = _rounded(m, FIRST_DTYPE, salt, tensors + 1, rows, columns)
            v = _rounded(v, SECOND_DTYPE, salt, tensors + 2, rows, state_columns)
        tl.store(m_ptr, m.to(FIRST_DTYPE), mask=mask)
        tl.store(v_ptr, v.to(SECOND_DTYPE), mask=of_state)
    u += tl.cast(decoupled_weight_decay, ACCUMULATE) * w
    step = tl.cast(lr, ACCUMULATE)
    if TRUST:
        of_w = _norm(w)
        of_u = _norm(tl.where(mask, u, 0))
        both = (of_w > 0) & (of_u > 0)
        step *= tl.where(both, divide(of_w, tl.where(both, of_u, 1)), 1)
    w -= step * u
    if STOCHASTIC:
        w = _rounded(w, DTYPE, salt, tensors, rows, columns)
    tl.store(w_ptr, w.to(DTYPE), mask=mask)

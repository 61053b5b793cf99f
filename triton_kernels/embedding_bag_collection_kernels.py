"""Device code of lookups in many tables; ``embedding_bag_collection.py`` launches it.

A launch serves lookups of one class: tables of one dtype, of similar width, aligned alike. What
differs between them is in a *directory*, int64 [fields, lookups] in device memory, with the address
of each table. Programs are numbered lookup after lookup, in each by blocks of columns first, then
by tiles of bags. Shapes in comments: BAGS side by side, BLOCK_D columns each.

What all lookups of a class share is a compile-time constant, so that the compiler gets 16-byte
loads where they exist: ALIGNMENT, a power of two, divides the addresses, row strides and widths of
its tables, in elements, OUTPUT_ALIGNMENT where their cells start in the output. The directory has
these strides, widths and starts as multiples of the constants: compilers trust a product, but
forget what they are told about a number from memory.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from recsys_ops.triton_kernels.embedding_bag_kernels import (
    bag_ranges,
    count_live,
    divide,
    live_rows,
    maximum_of_rows,
    sum_of_rows,
)

VARYING = ["num_lookups", "num_offsets", "num_values", "first_program"]

# The fields of a directory of lookups.
FIELDS = ("first_program", "first_bag", "num_bags", "start", "stride", "is_mean", "rows", "dim")
FIELDS += ("address", "row_stride", "column_stride")
SCALES_FIELDS = 3
FIELDS += ("scales_address", "scales_row_stride", "scales_column_stride")
FIRST_PROGRAM, FIRST_BAG, NUM_BAGS, START, STRIDE, IS_MEAN, NUM_ROWS, DIM = map(tl.constexpr, range(8))
ADDRESS, ROW_STRIDE, COLUMN_STRIDE = map(tl.constexpr, range(8, 11))
SCALES_ADDRESS, SCALES_ROW_STRIDE, SCALES_COLUMN_STRIDE = map(tl.constexpr, range(11, 14))


@triton.jit
def owner(first_ptr, count, number):
    """Which of ``count`` owners of consecutive numbers has this one, by the first number of each."""
    found = 0
    for first in range(0, count, 64):
        each = first + tl.arange(0, 64)
        starts = tl.load(first_ptr + each, mask=each < count, other=0)
        found += tl.sum(((each < count) & (starts <= number)).to(tl.int32))
    return (found - 1).to(tl.int64)


@triton.jit
def field(directory_ptr, count, FIELD: tl.constexpr, i):
    return tl.load(directory_ptr + FIELD * count + i)


@triton.jit
def _bags_and_columns(
    lookups_ptr,
    num_lookups,
    first_program,
    SEVERAL_BLOCKS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BAGS: tl.constexpr,
):
    """The lookup of a program, its bags as numbered in ``offsets``, its columns and which of them exist."""
    program = tl.program_id(0).to(tl.int64) + first_program
    lookup = owner(lookups_ptr, num_lookups, program)
    tile = program - field(lookups_ptr, num_lookups, FIRST_PROGRAM, lookup)
    dim = field(lookups_ptr, num_lookups, DIM, lookup) * ALIGNMENT
    columns = tl.arange(0, BLOCK_D)
    if SEVERAL_BLOCKS:
        blocks = tl.cdiv(dim, BLOCK_D)
        columns = (tile % blocks) * BLOCK_D + columns
        tile = tile // blocks
    bags = field(lookups_ptr, num_lookups, FIRST_BAG, lookup) + tile * BAGS + tl.arange(0, BAGS)
    return lookup, bags, columns, (columns < dim)[None, :]


@triton.jit
def _table(lookups_ptr, num_lookups, lookup, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Pointer to a table's first row, and elements from one row to the next."""
    size: tl.constexpr = DTYPE.primitive_bitwidth // 8
    table = field(lookups_ptr, num_lookups, ADDRESS, lookup).to(tl.pointer_type(DTYPE))
    row_stride = field(lookups_ptr, num_lookups, ROW_STRIDE, lookup) * ALIGNMENT
    return tl.multiple_of(table, ALIGNMENT * size), row_stride


@triton.jit
def _entries_of_bags(
    lookups_ptr,
    num_lookups,
    lookup,
    values_ptr,
    offsets_ptr,
    bags,
    num_offsets,
    num_values,
    COUNT: tl.constexpr,
    DROP_INVALID: tl.constexpr,
    BAGS: tl.constexpr,
):
    """First entry and end of each bag, rows of their table, and of a mean the live entries, at least 1."""
    end_of_lookup = field(lookups_ptr, num_lookups, FIRST_BAG, lookup) + field(
        lookups_ptr, num_lookups, NUM_BAGS, lookup
    )
    num_rows = field(lookups_ptr, num_lookups, NUM_ROWS, lookup)
    begin, end = bag_ranges(offsets_ptr, bags, end_of_lookup, num_offsets, num_values)
    divisor = tl.full([BAGS], 1, tl.int64)
    if COUNT:
        live = count_live(values_ptr, begin, end, num_rows, -1, DROP_INVALID, BAGS)
        if field(lookups_ptr, num_lookups, IS_MEAN, lookup) != 0:
            divisor = tl.maximum(live, 1)
    return begin, end, num_rows, divisor


@triton.jit
def _cells(lookups_ptr, num_lookups, lookup, bags, columns, ALIGNMENT: tl.constexpr):
    """Where bags have their cells in the output, [BAGS, BLOCK_D], and which bags exist, [BAGS, 1]."""
    start = field(lookups_ptr, num_lookups, START, lookup) * ALIGNMENT
    stride = field(lookups_ptr, num_lookups, STRIDE, lookup) * ALIGNMENT
    in_lookup = bags - field(lookups_ptr, num_lookups, FIRST_BAG, lookup)
    exists = in_lookup < field(lookups_ptr, num_lookups, NUM_BAGS, lookup)
    return (start + in_lookup * stride)[:, None] + columns[None, :], exists[:, None]


@triton.jit(do_not_specialize=VARYING)
def embedding_bag_collection_forward_kernel(
    output_ptr,
    argmax_ptr,
    lookups_ptr,
    values_ptr,
    offsets_ptr,
    per_sample_weights_ptr,
    num_lookups,
    num_offsets,
    num_values,
    first_program,
    DTYPE: tl.constexpr,
    UNIT_COLUMNS: tl.constexpr,
    MAXIMUM: tl.constexpr,
    COUNT: tl.constexpr,
    DROP_INVALID: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SEVERAL_BLOCKS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    OUTPUT_ALIGNMENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BAGS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum or mean of each bag, its entries added in order, or its maximum and where it first occurs."""
    lookup, bags, columns, in_row = _bags_and_columns(
        lookups_ptr, num_lookups, first_program, SEVERAL_BLOCKS, ALIGNMENT, BLOCK_D, BAGS
    )
    begin, end, num_rows, divisor = _entries_of_bags(
        *(lookups_ptr, num_lookups, lookup, values_ptr, offsets_ptr, bags, num_offsets, num_values),
        *(COUNT, DROP_INVALID, BAGS),
    )
    table, row_stride = _table(lookups_ptr, num_lookups, lookup, DTYPE, ALIGNMENT)
    if UNIT_COLUMNS:
        table += columns[None, :]
    else:
        table += (columns * field(lookups_ptr, num_lookups, COLUMN_STRIDE, lookup))[None, :]
    cells, exists = _cells(lookups_ptr, num_lookups, lookup, bags, columns, OUTPUT_ALIGNMENT)
    if MAXIMUM:
        pooled, argmax = maximum_of_rows(
            *(table, row_stride, in_row, values_ptr, begin, end, num_rows, -1),
            *(ACCUMULATE, BLOCK_D, BAGS, ROWS),
        )
        if argmax_ptr is not None:
            tl.store(argmax_ptr + cells, argmax, mask=exists & in_row)
    else:
        pooled = sum_of_rows(
            *(table, row_stride, in_row, values_ptr, per_sample_weights_ptr, begin, end, num_rows, -1),
            *(ACCUMULATE, BLOCK_D, BAGS, ROWS),
        )
        if COUNT:
            pooled = divide(pooled, divisor.to(ACCUMULATE)[:, None])
    tl.store(output_ptr + cells, pooled, mask=exists & in_row)


@triton.jit
def _decoded(codes, scale, offset, BITS: tl.constexpr, IS_FLOAT: tl.constexpr):
    """What codes [BAGS, BLOCK_D], or of 4 bits [BAGS, BLOCK_D / 2], stand for: fp32 [BAGS, BLOCK_D]."""
    if BITS == 4:
        codes = tl.interleave(codes & 15, codes >> 4)
    if IS_FLOAT:
        # The bits of e4m3fn are those of an fp16 whose exponent is 8 too low, subnormal ones included.
        wide = codes.to(tl.uint16)
        numbers = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
        numbers = tl.where((codes & 0x7F) == 0x7F, float("nan"), numbers.to(tl.float32) * 256.0)
    else:
        numbers = codes.to(tl.float32)
    return numbers * scale[:, None] + offset[:, None]


@triton.jit(do_not_specialize=VARYING)
def embedding_bag_collection_quantized_forward_kernel(
    output_ptr,
    lookups_ptr,
    values_ptr,
    offsets_ptr,
    per_sample_weights_ptr,
    num_lookups,
    num_offsets,
    num_values,
    first_program,
    BITS: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    UNIT_COLUMNS: tl.constexpr,
    MAXIMUM: tl.constexpr,
    COUNT: tl.constexpr,
    DROP_INVALID: tl.constexpr,
    SEVERAL_BLOCKS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    OUTPUT_ALIGNMENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BAGS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The same of rows of codes, which are decoded on the way; ALIGNMENT is that of bytes."""
    per_byte: tl.constexpr = 8 // BITS
    lookup, bags, columns, in_row = _bags_and_columns(
        lookups_ptr, num_lookups, first_program, SEVERAL_BLOCKS, ALIGNMENT * per_byte, BLOCK_D, BAGS
    )
    begin, end, num_rows, divisor = _entries_of_bags(
        *(lookups_ptr, num_lookups, lookup, values_ptr, offsets_ptr, bags, num_offsets, num_values),
        *(COUNT, DROP_INVALID, BAGS),
    )
    table, row_stride = _table(lookups_ptr, num_lookups, lookup, tl.uint8, ALIGNMENT)
    bytes_of_row = field(lookups_ptr, num_lookups, DIM, lookup) * ALIGNMENT
    if SEVERAL_BLOCKS:
        in_bytes = tl.min(columns) // per_byte + tl.arange(0, BLOCK_D // per_byte)
        in_bytes = tl.multiple_of(in_bytes, BLOCK_D // per_byte)
        in_bytes = tl.max_contiguous(in_bytes, BLOCK_D // per_byte)
    else:
        in_bytes = tl.arange(0, BLOCK_D // per_byte)
    if UNIT_COLUMNS:
        table += in_bytes[None, :]
    else:
        table += (in_bytes * field(lookups_ptr, num_lookups, COLUMN_STRIDE, lookup))[None, :]
    scales_address = field(lookups_ptr, num_lookups, SCALES_ADDRESS, lookup)
    scales = scales_address.to(tl.pointer_type(tl.float32))
    scales_row_stride = field(lookups_ptr, num_lookups, SCALES_ROW_STRIDE, lookup)
    offsets_of_rows = scales + field(lookups_ptr, num_lookups, SCALES_COLUMN_STRIDE, lookup)
    pooled = tl.zeros([BAGS, BLOCK_D], tl.float32)
    occupied = tl.zeros([BAGS], tl.int1)
    for first in range(0, tl.max(end - begin), ROWS):
        codes = ()
        scale = ()
        offset = ()
        factors = ()
        alive = ()
        for i in tl.static_range(ROWS):
            entries = begin + (first + i)
            rows, live = live_rows(values_ptr, entries, entries < end, num_rows, -1)
            mask = live[:, None] & (in_bytes < bytes_of_row)[None, :]
            codes += (tl.load(table + (rows * row_stride)[:, None], mask=mask, other=0),)
            scale += (tl.load(scales + rows * scales_row_stride, mask=live, other=0),)
            offset += (tl.load(offsets_of_rows + rows * scales_row_stride, mask=live, other=0),)
            alive += (live,)
            if per_sample_weights_ptr is not None:
                factors += (tl.load(per_sample_weights_ptr + entries, mask=live, other=0),)
        for i in tl.static_range(ROWS):
            numbers = _decoded(codes[i], scale[i], offset[i], BITS, IS_FLOAT)
            if MAXIMUM:
                better = alive[i][:, None] & (~occupied[:, None] | (numbers > pooled))
                pooled = tl.where(better, numbers, pooled)
                occupied = occupied | alive[i]
            elif per_sample_weights_ptr is None:
                pooled += numbers
            else:
                pooled += numbers * factors[i][:, None]
    if COUNT and not MAXIMUM:
        pooled = divide(pooled, divisor.to(tl.float32)[:, None])
    cells, exists = _cells(lookups_ptr, num_lookups, lookup, bags, columns, OUTPUT_ALIGNMENT)
    tl.store(output_ptr + cells, pooled, mask=exists & in_row)


@triton.jit(do_not_specialize=VARYING)
def embedding_bag_collection_backward_per_sample_weights_kernel(
    grad_ptr,
    grad_output_ptr,
    lookups_ptr,
    values_ptr,
    offsets_ptr,
    num_lookups,
    num_offsets,
    num_values,
    first_program,
    DTYPE: tl.constexpr,
    UNIT_COLUMNS: tl.constexpr,
    COUNT: tl.constexpr,
    DROP_INVALID: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SEVERAL_BLOCKS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    OUTPUT_ALIGNMENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BAGS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds the dot product of each entry's row with the gradient of its bag; no entry is in two lookups."""
    # Of several blocks of columns, the first program of a tile goes through all.
    lookup, bags, columns, in_row = _bags_and_columns(
        lookups_ptr, num_lookups, first_program, False, ALIGNMENT, BLOCK_D, BAGS
    )
    begin, end, num_rows, divisor = _entries_of_bags(
        *(lookups_ptr, num_lookups, lookup, values_ptr, offsets_ptr, bags, num_offsets, num_values),
        *(COUNT, DROP_INVALID, BAGS),
    )
    table, row_stride = _table(lookups_ptr, num_lookups, lookup, DTYPE, ALIGNMENT)
    column_stride = 1 if UNIT_COLUMNS else field(lookups_ptr, num_lookups, COLUMN_STRIDE, lookup)
    cells, exists = _cells(lookups_ptr, num_lookups, lookup, bags, columns, OUTPUT_ALIGNMENT)
    dim = field(lookups_ptr, num_lookups, DIM, lookup) * ALIGNMENT
    gradients = tl.load(grad_output_ptr + cells, mask=exists & in_row, other=0).to(ACCUMULATE)
    for first in range(0, tl.max(end - begin), ROWS):
        in_flight = ()
        alive = ()
        starts = ()
        for i in tl.static_range(ROWS):
            entries = begin + (first + i)
            rows, live = live_rows(values_ptr, entries, entries < end, num_rows, -1)
            starts += (table + (rows * row_stride)[:, None],)
            cells_of_row = starts[i] + (columns * column_stride)[None, :]
            in_flight += (tl.load(cells_of_row, mask=live[:, None] & in_row, other=0),)
            alive += (live,)
        for i in tl.static_range(ROWS):
            products = gradients * in_flight[i].to(ACCUMULATE)
            if SEVERAL_BLOCKS:
                for block in range(BLOCK_D, dim, BLOCK_D):
                    mask = alive[i][:, None] & (block + columns < dim)[None, :]
                    cells_of_row = starts[i] + ((block + columns) * column_stride)[None, :]
                    numbers = tl.load(cells_of_row, mask=mask, other=0).to(ACCUMULATE)
                    products += numbers * tl.load(grad_output_ptr + cells + block, mask=mask, other=0)
            dots = tl.sum(products, 1)
            if COUNT:
                dots = divide(dots, divisor.to(ACCUMULATE))
            of_entries = grad_ptr + begin + (first + i)
            dots += tl.load(of_entries, mask=alive[i], other=0)
            tl.store(of_entries, dots, mask=alive[i])

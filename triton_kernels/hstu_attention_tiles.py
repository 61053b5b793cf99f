"""Device code of HSTU attention: tiles of rows, from tensors or from caches, and products of them."""
# mypy: ignore-errors

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def number(bits, DTYPE: tl.constexpr):
    """The number that has these bits in fp64. Triton's interpreter takes every float for fp32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(DTYPE)


@triton.jit
def of_head(pointer, head, stride):
    """Where the data of a head start, or None."""
    if pointer is None:
        return None
    else:
        return pointer + head * stride


@triton.jit
def load_rows(pointer, row, row_stride, column_stride, exists, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, [ROWS, BLOCK_D], 0 past the last column and where there is no row."""
    column = tl.arange(0, BLOCK_D)
    place = pointer + (row * row_stride)[:, None] + (column.to(tl.int64) * column_stride)[None, :]
    if BLOCK_D == D:
        return tl.load(place, mask=exists[:, None], other=0)
    else:
        return tl.load(place, mask=exists[:, None] & (column < D)[None, :], other=0)


@triton.jit
def store_rows(
    pointer, row, row_stride, column_stride, exists, values, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write rows of one head, rounded to the type of the tensor."""
    column = tl.arange(0, BLOCK_D)
    place = pointer + (row * row_stride)[:, None] + (column.to(tl.int64) * column_stride)[None, :]
    values = rounded(values, pointer.dtype.element_ty)
    tl.store(place, values, mask=exists[:, None] & (column < D)[None, :])


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x rounded to nearest, ties to even."""
    if INTERPRETED and DTYPE.is_bf16() and not x.dtype.is_bf16():  # the interpreter cuts bits off
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        up = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        return tl.where(x == x, up, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def product(a, b, sums):
    """``sums`` plus a product of tiles. fp32 stays what it is: no TF32."""
    if INTERPRETED or a.dtype.primitive_bitwidth > 16:  # the interpreter cannot multiply bf16
        a = a.to(sums.dtype)
        b = b.to(sums.dtype)
    return tl.dot(a, b, sums, input_precision="ieee", out_dtype=sums.dtype)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def cached_places(
    cache_starts_ptr,
    page_table_ptr,
    sequence,
    key,
    in_cache,
    cached,
    num_pages,
    page_size,
    pages_per_sequence,
):
    """The page of each cached key and its row in that, or 0 and its row, int64; and whether it is there."""
    if page_table_ptr is not None:
        number = key // page_size
        room = pages_per_sequence * page_size.to(tl.int64)
        tl.device_assert(cached <= room, "hstu_attention_cached: expected room in page_table for all tokens")
        place = page_table_ptr + sequence * pages_per_sequence + number
        page = tl.load(place, mask=in_cache & (number < pages_per_sequence), other=0).to(tl.int64)
        good = (page >= 0) & (page < num_pages)
        tl.device_assert(good | ~in_cache, "hstu_attention_cached: expected pages that there are")
        return page, (key - number * page_size).to(tl.int64), in_cache & good
    else:
        start = tl.load(cache_starts_ptr + sequence).to(tl.int64)
        good = (start >= 0) & (start + cached <= page_size)
        tl.device_assert(good, "hstu_attention_cached: expected cached tokens within the cache")
        return key.to(tl.int64) * 0, start + key, in_cache & good


@triton.jit
def load_cached(
    cache_ptr,
    scales_ptr,
    page,
    slot,
    page_size,
    head,
    num_heads,
    page_stride,
    row_stride,
    head_stride,
    column_stride,
    in_cache,
    DTYPE: tl.constexpr,
    SUMS: tl.constexpr,
    CODES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of a cache in the type of q, [ROWS, BLOCK_D]; codes are int8, or the bytes of float8_e4m3fn."""
    column = tl.arange(0, BLOCK_D)
    place = (page * page_stride + slot * row_stride + head * head_stride)[:, None]
    place = place + (column.to(tl.int64) * column_stride)[None, :]
    codes = tl.load(cache_ptr + place, mask=in_cache[:, None] & (column < D)[None, :], other=0)
    values = (_from_fp8(codes) if CODES == "fp8" else codes).to(SUMS)
    if scales_ptr is not None:
        row = page * page_size + slot
        scales = tl.load(scales_ptr + row * num_heads + head, mask=in_cache, other=0)
        values = values * scales[:, None]
    return rounded(values, DTYPE)


@triton.jit
def _from_fp8(codes):
    """The numbers that bytes of float8_e4m3fn mean, exactly: its bits are those of a 256th in fp16."""
    code = codes.to(tl.int32)
    bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    number = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256
    return tl.where((code & 0x7F) == 0x7F, float("nan"), number)

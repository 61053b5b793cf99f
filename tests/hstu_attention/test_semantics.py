"""What HSTU attention promises beyond the contract of its kernels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import recsys_ops
from recsys_ops import HSTUMask, RelativeBias, TimeBucketing
from recsys_ops.hstu_attention import philox
from recsys_ops.hstu_attention.reference import Mask, Sequence

BACKENDS = ("reference", "native")


def padded_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, alpha: float, n: int) -> Tensor:
    """One sequence by the papers' formula, in fp64: [N, H, V]."""
    scores = torch.nn.functional.silu(alpha * torch.einsum("mhd,nhd->hmn", q.double(), k.double())) / n
    return torch.einsum("hmn,nhv->mhv", scores * seen, v.double())


def published_mask(n: int, window: int, contextual: int, targets: int, tail: int) -> Tensor:
    """``_get_valid_attn_mask`` of Generative Recommenders, row by row and column by column."""
    last = n - contextual + 1 - targets if contextual else n - targets

    def number(position: int) -> int:
        own = max(position - contextual + 1, 0) if contextual else position
        return min(own, last) if targets else own

    seen = torch.zeros(n, n, dtype=torch.bool)
    for row in range(n):
        for column in range(n):
            distance = number(row) - number(column)
            sees = row == column or distance > 0
            if window:
                sees = sees and (distance <= window or (tail > 0 and number(row) >= last - tail))
            if contextual and number(row) == 0 and number(column) < last:
                sees = True
            seen[row, column] = sees
    return seen


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("contextual", [0, 1, 3])
@pytest.mark.parametrize("targets", [0, 1, 5])
def test_mask_is_the_published_one(window: int, contextual: int, targets: int) -> None:
    for n, tail in ((9, 0), (14, 3)):
        if window == 0 and tail:
            continue
        mask = Mask(True, window, 1, tail, None)
        sequence = Sequence(slice(0, n), slice(0, n), contextual, targets)
        seen = mask.seen(sequence, torch.device("cpu"))
        assert torch.equal(seen, published_mask(n, window, contextual, targets, tail))


@pytest.mark.parametrize("backend", BACKENDS)
def test_formula_of_the_paper(backend: str) -> None:
    torch.manual_seed(0)
    lengths, n = [7, 0, 40], 40
    q, k, v = (torch.randn(sum(lengths), 3, 16) * 2 for _ in range(3))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    found = recsys_ops.hstu_attention(q, k, v, offsets, scale=1 / n, backend=backend)
    for b, length in enumerate(lengths):
        rows = slice(int(offsets[b]), int(offsets[b + 1]))
        seen = torch.ones(length, length).tril()
        wanted = padded_attention(q[rows], k[rows], v[rows], seen, 1 / math.sqrt(16), n)
        torch.testing.assert_close(n * found[rows].double(), n * wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_user_does_not_depend_on_batch_mates(backend: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(90, 2, 16) for _ in range(3))
    alone = recsys_ops.hstu_attention(
        q[:20], k[:20], v[:20], torch.tensor([0, 20]), scale=0.1, backend=backend
    )
    together = recsys_ops.hstu_attention(q, k, v, torch.tensor([0, 20, 90]), scale=0.1, backend=backend)
    assert torch.equal(alone, together[:20])


@pytest.mark.parametrize("backend", BACKENDS)
def test_candidates_do_not_depend_on_each_other(backend: str) -> None:
    """Their order changes no score by a bit; nor, in our own kernels, does which others there are."""
    torch.manual_seed(0)
    history, targets = 50, 6
    n = history + targets
    q, k, v = (torch.randn(n, 2, 16) for _ in range(3))
    times = torch.arange(n) * 100
    times[history:] = times[history]
    weights = torch.randn(2 * n - 1), torch.randn(30)

    def attend(order: list[int]) -> Tensor:
        tokens = torch.tensor([*range(history), *(history + i for i in order)])
        return recsys_ops.hstu_attention(
            q[tokens],
            k[tokens],
            v[tokens],
            torch.tensor([0, len(tokens)]),
            scale=0.1,
            mask=HSTUMask(num_targets=len(order)),
            bias=RelativeBias(weights[0], weights[1], times[tokens]),
            backend=backend,
        )[history:]

    whole = attend([0, 1, 2, 3, 4, 5])
    assert torch.equal(attend([5, 3, 1, 0, 2, 4]), whole[[5, 3, 1, 0, 2, 4]])
    torch.testing.assert_close(attend([4]), whole[4:5])
    assert backend == "reference" or torch.equal(attend([4]), whole[4:5])


def views_of_uvqk(length: int, heads: int, dim: int, value_dim: int) -> tuple[Tensor, list[Tensor]]:
    """A packed projection, NaN where u is, and its views v, q and k."""
    packed = torch.randn(length, 2 * heads * (dim + value_dim))
    u, v, q, k = packed.split([heads * value_dim] * 2 + [heads * dim] * 2, dim=1)
    u.fill_(torch.nan)
    widths = (value_dim, dim, dim)
    return packed, [t.unflatten(1, (heads, w)) for t, w in zip((v, q, k), widths, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", [(16, 16), (25, 40)])
def test_views_of_one_packed_projection(backend: str, dims: tuple[int, int]) -> None:
    """Neither read nor written outside of their columns, gradients included."""
    from recsys_ops.hstu_attention.autograd import KERNELS

    torch.manual_seed(0)
    heads, length = 2, 70
    offsets = torch.tensor([0, 30, 70])
    _, (v, q, k) = views_of_uvqk(length, heads, *dims)
    grad = torch.randn(length, heads, dims[1])
    options = (None, offsets, *([None] * 9), 0.1, 0.25, True, 0, 1, 0, True, 0.0)
    kernels = KERNELS[backend]
    wanted = kernels.hstu_attention_forward(*(t.contiguous() for t in (q, k, v)), *options)
    assert torch.equal(kernels.hstu_attention_forward(q, k, v, *options), wanted)

    plain = [torch.empty(t.shape) for t in (q, k, v)]
    kernels.hstu_attention_backward(*plain, grad, *(t.contiguous() for t in (q, k, v)), *options)
    packed, (grad_v, grad_q, grad_k) = views_of_uvqk(length, heads, *dims)
    before = packed[:, : heads * dims[1]].clone()
    kernels.hstu_attention_backward(grad_q, grad_k, grad_v, grad, q, k, v, *options)
    for found, expected in zip((grad_q, grad_k, grad_v), plain, strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(packed[:, : heads * dims[1]].isnan(), before.isnan())


@pytest.mark.parametrize("backend", BACKENDS)
def test_cached_rows_are_the_last_rows_of_all(backend: str) -> None:
    """To the bit: the same products are summed in the same order."""
    torch.manual_seed(0)
    lengths, new = [40, 9, 70], [7, 9, 1]
    q, k, v = (torch.randn(sum(lengths), 2, 25) for _ in range(3))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    mask = HSTUMask(num_targets=torch.tensor([3, 2, 1]), window=30, num_contextual=2)
    last = torch.cat([torch.arange(int(e) - m, int(e)) for e, m in zip(offsets[1:], new, strict=True)])
    earlier = torch.ones(len(q), dtype=torch.bool).index_fill_(0, last, False)
    times = torch.arange(len(q)) * 7
    bias = RelativeBias(torch.randn(2, 99), torch.randn(20), times)
    whole = recsys_ops.hstu_attention(q, k, v, offsets, scale=0.1, mask=mask, bias=bias, backend=backend)
    cached = recsys_ops.hstu_attention_cached(
        q[last],
        k[last],
        v[last],
        torch.tensor([0, *new]).cumsum(0),
        k[earlier],
        v[earlier],
        torch.tensor(lengths) - torch.tensor(new),
        scale=0.1,
        mask=mask,
        bias=bias,
        backend=backend,
    )
    assert torch.equal(cached, whole[last])


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_quantized_caches_are_off_by_what_is_documented(dtype: str) -> None:
    rows = torch.randn(50, 3, 32) * torch.rand(50, 3, 1)
    codes, scales = recsys_ops.quantize_cache(rows, dtype)
    error = (codes.float() * scales[..., None] - rows).abs()
    largest = rows.abs().amax(-1, keepdim=True)
    bound = largest / 254 if dtype == "int8" else torch.maximum(rows.abs() / 16, largest / 448 * 2**-10)
    assert (error <= bound * (1 + 1e-5)).all()
    with pytest.raises(ValueError, match=r"one of \('int8', 'fp8'\), got 'int4'"):
        recsys_ops.quantize_cache(rows, "int4")


@pytest.mark.parametrize(
    "bucketing", [TimeBucketing(), TimeBucketing("sqrt", 60, 1.5), TimeBucketing("log", 7, 0.1)]
)
def test_boundaries_are_the_formula(bucketing: TimeBucketing) -> None:
    boundaries = bucketing.boundaries(60)
    for bucket, least in enumerate(boundaries[:40], 1):
        for difference in (least - 1, least):
            scaled = difference / bucketing.unit
            value = math.log(max(scaled, 1)) if bucketing.function == "log" else math.sqrt(scaled)
            assert (int(value / bucketing.divisor) >= bucket) == (difference >= least)


def test_philox_is_the_published_one() -> None:
    """Known answers of Random123 for Philox4x32-10."""

    def words(key: int, *counter: int) -> list[int]:
        return [int(w) for w in philox.philox(torch.tensor([key]), tuple(map(torch.tensor, counter)))]

    assert words(0, 0, 0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert words(-1, ones, ones, ones, ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_drops_what_it_should(backend: str) -> None:
    """With v the identity, the output is the weights."""
    n, p = 128, 0.3
    q = k = torch.ones(n, 2, 4)
    v = torch.eye(n)[:, None].expand(n, 2, n)
    mask = HSTUMask(causal=False)

    def weights(seed: int, dropout: float) -> Tensor:
        return recsys_ops.hstu_attention(
            q,
            k,
            v,
            torch.tensor([0, n]),
            scale=1.0,
            mask=mask,
            dropout=dropout,
            dropout_seed=seed,
            backend=backend,
        )

    whole, dropped = weights(1, 0.0), weights(1, p)
    kept = dropped != 0
    assert abs(float(kept.float().mean()) - (1 - p)) < 4 * math.sqrt(p * (1 - p) / kept.numel())
    torch.testing.assert_close(dropped[kept], (whole / (1 - p))[kept])
    assert torch.equal(weights(1, p), dropped)
    assert not torch.equal(weights(2, p), dropped)
    torch.manual_seed(5)
    drawn = recsys_ops.hstu_attention(q, k, v, torch.tensor([0, n]), scale=1.0, dropout=p, backend=backend)
    torch.manual_seed(5)
    again = recsys_ops.hstu_attention(q, k, v, torch.tensor([0, n]), scale=1.0, dropout=p, backend=backend)
    assert torch.equal(drawn, again)


def test_long_sequences_are_split_and_added_up() -> None:
    """More keys than a backward task takes at once, with every sum that tasks leave to each other."""
    torch.manual_seed(0)
    n = 4500
    q, k, v = (torch.randn(n, 1, 8).requires_grad_() for _ in range(3))
    weights = [torch.randn(999, requires_grad=True), torch.randn(40, requires_grad=True)]
    bias = RelativeBias(weights[0], weights[1], torch.arange(n) * 3)
    gradients = []
    for backend in BACKENDS:
        output = recsys_ops.hstu_attention(
            q,
            k,
            v,
            torch.tensor([0, n]),
            scale=0.02,
            bias=bias,
            mask=HSTUMask(num_targets=9),
            backend=backend,
        )
        gradients.append(torch.autograd.grad(output.square().sum(), [q, k, v, *weights]))
    for wanted, found in zip(*gradients, strict=True):
        size = wanted.abs().max()
        torch.testing.assert_close(found / size, wanted / size, rtol=1e-4, atol=1e-5)


def test_memory_is_linear_in_tokens() -> None:
    """A history of 16,000 events takes no [N, N]: that alone would be a gigabyte for each head."""
    resource = pytest.importorskip("resource")
    q, k, v = (torch.randn(16_000, 1, 8).requires_grad_() for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    recsys_ops.hstu_attention(
        q, k, v, torch.tensor([0, 16_000]), scale=0.01, mask=HSTUMask(window=100), backend="native"
    ).sum().backward()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024

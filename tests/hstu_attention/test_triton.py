"""The Triton kernels, interpreted on a CPU or run on a GPU: what is not the same for every backend."""

from __future__ import annotations

import inspect
import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from recsys_ops.hstu_attention import reference
from recsys_ops.hstu_attention.cases import ALL_OF_IT, SPEC, HSTUAttentionCase
from recsys_ops.testing import check_determinism, check_forward_backward
from recsys_ops.testing.execution import candidate, overridden

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
if DEVICE == "cpu" and not INTERPRETED:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from recsys_ops.triton_kernels import hstu_attention as kernels  # noqa: E402
from recsys_ops.triton_kernels import hstu_attention_sequences as sequences  # noqa: E402
from recsys_ops.triton_kernels.hstu_attention import (  # noqa: E402
    HSTUAttentionBackwardConfig,
    HSTUAttentionConfig,
)

SMALL = HSTUAttentionConfig(16, 16, 4, 1)
CONFIGS = (
    SMALL,
    HSTUAttentionConfig(32, 16, 4, 2),
    HSTUAttentionConfig(16, 64, 4, 1),
    replace(SMALL, longest_first=True),
    replace(SMALL, programs=1),
    replace(SMALL, programs=2, longest_first=True),
)
NAMES = [name for name in vars(reference) if name.startswith("hstu_attention_")]


def configured(config: HSTUAttentionConfig) -> Any:
    """The kernels with all tiles like this."""
    both = HSTUAttentionBackwardConfig(config, config)
    given = {name: both if "backward" in name else config for name in NAMES}
    return overridden(kernels, {name: partial(getattr(kernels, name), config=given[name]) for name in NAMES})


def passes(case: HSTUAttentionCase, config: HSTUAttentionConfig, dtype: torch.dtype = torch.float32) -> None:
    with candidate(SPEC, configured(config), "configured") as target:
        target = replace(target, device=DEVICE)
        result = check_forward_backward(SPEC, case, target, dtype)
        assert result.ok, str(result)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_the_contract_and_a_configuration(name: str) -> None:
    ours, wanted = (inspect.signature(getattr(module, name)) for module in (kernels, reference))
    *parameters, config = ours.parameters.values()
    assert ours.replace(parameters=parameters) == wanted
    assert (config.name, config.kind, config.default) == ("config", config.KEYWORD_ONLY, None)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configurations(config: HSTUAttentionConfig) -> None:
    small: dict[str, Any] = {"heads": 1, "dim": 4}
    passes(HSTUAttentionCase(lengths=(17, 0, 33), row_scales=True, **small, **ALL_OF_IT), config)
    passes(HSTUAttentionCase(lengths=(66, 3), causal=False, dropout=0.4, targets=5, **small), config)
    fields: Any = {"queries": 6, "cached": "paged", "quantized": "fp8", **small}
    passes(HSTUAttentionCase(lengths=(40, 3, 18), **fields), config, torch.float16)


@pytest.mark.parametrize("config", [replace(SMALL, programs=1), replace(SMALL, longest_first=True)], ids=str)
def test_runs_are_the_same_bits(config: HSTUAttentionConfig) -> None:
    case = HSTUAttentionCase(lengths=(20, 3), heads=1, dim=4, **ALL_OF_IT)
    with candidate(SPEC, configured(config), "configured") as target:
        result = check_determinism(SPEC, case, replace(target, device=DEVICE), torch.float32)
        assert result.ok, str(result)


@pytest.mark.parametrize("length", [1, 16, 17, 33])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_at_the_ends_of_blocks(length: int, causal: bool) -> None:
    fields: Any = {"causal": causal, "position": "heads", "distances": 33, "contextual": 2, "targets": 5}
    passes(HSTUAttentionCase(lengths=(length, 0, 16), dim=4, **fields), SMALL)


@pytest.mark.parametrize(
    ("group", "distances"), [(1, 199), (3, 199), (16, 5), (17, 199), (20, 5), (20, 1), (100, 199)]
)
def test_position_gradients_of_targets(group: int, distances: int) -> None:
    """Also where a block of targets has parts of two groups that are longer than itself."""
    fields: Any = {"position": "heads", "distances": distances, "group": group, "targets": (45, 20)}
    passes(HSTUAttentionCase(lengths=(60, 20), dim=4, heads=1, **fields), SMALL)


def test_unsorted_times_in_many_buckets() -> None:
    fields: Any = {"heads": 1, "time": "heads", "buckets": 20, "unsorted_times": True, "targets": 3}
    passes(HSTUAttentionCase(lengths=(33,), dim=4, bucketing="sqrt", **fields), SMALL)


@triton.jit
def _seen_kernel(  # type: ignore[no-untyped-def]
    seen_ptr,
    tiles_ptr,
    rows_ptr,
    length,
    prefix,
    history,
    window,
    group,
    tail,
    CAUSAL: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Which keys each row sees, and which tiles the kernels that own rows and those that own keys visit."""
    key = tl.arange(0, N)
    exists = key < length
    begin, end, own = sequences.seen_ranges(key, exists, length, prefix, history, window, group, tail, CAUSAL)
    seen = sequences.seen_keys(key, history, begin, end, own, key, exists, key, None, 0, True)
    tl.store(seen_ptr + key[:, None] * N + key[None, :], seen)
    for first_row in range(0, length, BLOCK):
        row = first_row + tl.arange(0, BLOCK)
        begin, end, own = sequences.seen_ranges(
            row, row < length, length, prefix, history, window, group, tail, CAUSAL
        )
        first, count, group_first, group_count = sequences.blocks_of_keys(begin, end, own, history, BLOCK)
        for i in range(0, count + group_count):
            block = tl.where(i < count, first + i, group_first + (i - count))
            place = tiles_ptr + first_row // BLOCK * N + block
            tl.store(place, tl.load(place) + 1)
    for first_key in range(0, length, BLOCK):
        a, b, c, d, e, f = sequences.runs_of_rows(
            first_key, length, length, prefix, history, window, group, tail, CAUSAL, BLOCK
        )
        inside = ((key >= a) & (key < b)).to(tl.int32)
        inside += ((key >= c) & (key < d)).to(tl.int32) + ((key >= e) & (key < f)).to(tl.int32)
        tl.store(rows_ptr + first_key // BLOCK * N + key, inside)


def masks() -> Iterator[tuple[Any, ...]]:
    choices = ((13, 30), (0, 1, 4, 40), (0, 1, 7, 30), (0, 1, 5, 12, 60), (1, 3, 9), (0, 3), (True, False))
    for length, prefix, targets, window, group, tail, causal in itertools.product(*choices):
        targets = min(targets, length)
        if (window or not tail) and (targets or group == 1):
            yield length, min(prefix, length - targets), targets, window, group, tail, causal


def test_ranges_are_the_mask() -> None:
    """Against the formulas of the reference; tiles cover what is seen once, and few others."""
    size, block = 32, 8
    sample = random.Random(0).sample(list(masks()), 80)
    for length, prefix, targets, window, group, tail, causal in sample:
        seen = torch.zeros(size, size, dtype=torch.int32, device=DEVICE)
        tiles, rows = torch.zeros_like(seen), torch.zeros_like(seen)
        _seen_kernel[(1,)](
            *(seen, tiles, rows, length, prefix, length - targets, window, group, tail),
            CAUSAL=causal,
            N=size,
            BLOCK=block,
        )
        sequence = reference.Sequence(slice(0, length), slice(0, length), prefix, targets)
        mask = reference.Mask(causal, window, group, tail, None)
        wanted = torch.zeros(size, size, dtype=torch.bool)
        wanted[:length, :length] = mask.seen(sequence, torch.device("cpu"))
        context = f"{length=} {prefix=} {targets=} {window=} {group=} {tail=} {causal=}"
        assert torch.equal(seen.cpu() > 0, wanted), context
        needed = wanted.view(size // block, block, size // block, block).any(3).any(1)
        visited = tiles.cpu()[: size // block, : size // block]
        assert visited.max() <= 1 and (visited.bool() | ~needed).all(), context
        seeing = wanted.view(size, size // block, block).any(2).T  # [blocks of keys, rows]
        run = rows.cpu()[: size // block]
        assert run.max() <= 1 and (run.bool() | ~seeing).all(), context
        if not prefix:
            # A block that ends the history may have one more tile on either side.
            assert (visited.bool() & ~needed).sum() <= 2 * (size // block), context
            assert (run.bool() & ~seeing).sum() <= 2 * size, context


def test_buckets_of_times_at_every_boundary() -> None:
    boundaries = torch.tensor([0, 2, 2, 3, 10, 1000, 2**31, 2**40 + 1, 2**62, 2**63 - 1], device=DEVICE)
    least, most = -(2**63), 2**63 - 1
    near = {min(max(b + i, 0), most) for b in boundaries.tolist() for i in (-1, 0, 1)}
    pairs = [(0, d) for d in sorted(near)] + [(least, most), (least, 0), (-5, 2**40 - 4), (most, -1)]
    for together in (False, True):  # each in a sequence of its own, or all in the tile of one
        times = torch.tensor(pairs, device=DEVICE).flatten()
        count = len(times)
        offsets = torch.tensor([0, count] if together else range(0, count + 1, 2), device=DEVICE)
        row = torch.arange(count, device=DEVICE)
        other = (row ^ 1) if together else 1 - row % 2
        weight = torch.linspace(-3, 3, 11, dtype=torch.float64, device=DEVICE)[None]
        q = torch.zeros(count, 1, 1, dtype=torch.float64, device=DEVICE)
        found, wanted = (
            module.hstu_attention_forward(
                *(q, q, q + 1, None, offsets, None, None, None),
                torch.stack([other, other + 1], 1)[:, None],
                *(None, weight, times, boundaries, None, 1.0, 1.0, False, 0, 1, 0, False, 0.0),
            )
            for module in (kernels, reference)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


def test_partial_sums_are_bounded() -> None:
    """However many programs and buckets there are, they take memory in proportion to the tokens."""
    allocated: list[int] = []
    zeros = torch.zeros

    def counting(*shape: int, **options: Any) -> Tensor:
        tensor = zeros(*shape, **options)
        allocated.append(tensor.numel())
        return tensor

    for distances in (3, 4001):
        case = HSTUAttentionCase(lengths=(3,) * 8, heads=2, dim=2, position="heads", distances=distances)
        allocated.clear()
        with mock.patch.object(torch, "zeros", counting):
            passes(case, SMALL)
        tokens, heads = sum(case.lengths), case.heads
        assert 0 < max(allocated) <= max(heads * distances, 4 * tokens * heads * case.dim)


@pytest.mark.parametrize(
    ("config", "valid"),
    [
        (HSTUAttentionConfig(64, 64), True),
        (HSTUAttentionConfig(8, 64), False),
        (HSTUAttentionConfig(48, 64), False),
        (HSTUAttentionConfig(64, 64, num_warps=3), False),
        (HSTUAttentionConfig(64, 64, num_warps=64), False),
        (HSTUAttentionConfig(1024, 1024), False),
        (HSTUAttentionConfig(64, 64, num_stages=0), False),
        (HSTUAttentionConfig(64, 64, programs=-1), False),
    ],
    ids=str,
)
def test_validity_of_configurations(config: HSTUAttentionConfig, valid: bool) -> None:
    assert config.is_valid == valid
    assert HSTUAttentionBackwardConfig(config, SMALL).is_valid == valid
    if not valid:
        with pytest.raises(ValueError, match="hstu_attention: expected a valid configuration"):
            kernels.checked(config)


def test_defaults_are_valid() -> None:
    for dim, dtype, work, target in itertools.product(
        (1, 16, 50, 64, 128, 256),
        (torch.float32, torch.float16, torch.float64),
        (0, 1, 2),
        ("sm_80", "sm_90", "sm_100", "gfx942"),
    ):
        for kernel in ("forward", "queries", "keys"):
            assert HSTUAttentionConfig.default(kernel, dim, 16, dtype, work, target).is_valid


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU an assertion fails")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"offsets": [0, 2]}, r"cache_lengths\[0\] = -1"),
        ({"cache_starts": [3]}, r"within the 5 rows of the cache, got cache_starts\[0\] = 3"),
        ({"page_table": [[7]]}, r"page_table\[0, 0\] in \[0, 2\), got 7"),
        ({"page_table": [[]]}, "at most 0 cached tokens"),
        ({"query_offsets": [0, 2]}, r"offsets\[-1\] = 3"),
    ],
)
def test_bad_caches(changed: dict[str, Any], message: str) -> None:
    new, cache = torch.zeros(3, 1, 4), torch.zeros(5, 1, 4)
    if "page_table" in changed:
        cache = torch.zeros(2, 4, 1, 4)
    given: dict[str, Any] = {"query_offsets": [0, 3], "offsets": [0, 7], "cache_starts": None, **changed}
    tensors = {
        name: torch.tensor(value, dtype=torch.int64) for name, value in given.items() if value is not None
    }
    names = list(inspect.signature(reference.hstu_attention_cached_forward).parameters)
    arguments: dict[str, Any] = {
        **dict.fromkeys(names),
        **{"q": new, "k": new, "v": new, "key_cache": cache, "value_cache": cache},
        **{"scale": 1.0, "alpha": 1.0, "causal": True, "window": 0, "target_group_size": 1},
        **{"full_window_tail": 0, "next_timestamps": True},
        **tensors,
    }
    for module in (reference, kernels):
        with pytest.raises(RuntimeError, match=message):
            module.hstu_attention_cached_forward(**arguments)

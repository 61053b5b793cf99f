"""Calls of HSTU attention that must be refused, and what the message must say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recsys_ops.testing import BadInput, Case, Inputs

_FIELDS: tuple[str, ...] = ("dropout", "position", "time", "cached", "quantized")  # of a case


def bad_inputs(case: type[Case]) -> tuple[BadInput, ...]:
    """Of two sequences, of 3 and 5 tokens, 2 heads and 4 columns, but for what is changed.

    Where there is a cache, both have 2 new tokens, and 1 and 3 in it.
    """

    def bad(name: str, message: str, error: type[Exception] = ValueError, **changed: Any) -> BadInput:
        fields = {key: changed.pop(key) for key in _FIELDS if key in changed}
        if "cached" in fields:
            fields["queries"] = 2
        posed = case(lengths=(3, 5), dim=4, **fields)  # type: ignore[call-arg]

        def build(draw: Inputs) -> dict[str, Any]:
            arguments = posed.build(draw)
            for argument, value in changed.items():
                value = value(draw) if isinstance(value, Callable) else value  # type: ignore[arg-type]
                arguments[argument] = value.to(draw.device) if isinstance(value, Tensor) else value
            return arguments

        return BadInput(name, build, error, message)

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    def refused_offsets(argument: str) -> tuple[BadInput, ...]:
        name = "of queries " if argument == "query_offsets" else ""
        return (
            bad(
                f"offsets {name}of floats",
                f"{argument} of dtype .* got float32",
                TypeError,
                **{argument: torch.zeros(3)},
            ),
            bad(
                f"offsets {name}that start late",
                rf"{argument}\[0\] = 0, got 1",
                RuntimeError,
                **{argument: integers(1, 3, 8)},
            ),
            bad(
                f"offsets {name}that decrease",
                rf"{argument} that never decrease, got {argument}\[1\] = 9, {argument}\[2\] = 8",
                RuntimeError,
                **{argument: integers(0, 9, 8)},
            ),
            bad(
                f"offsets {name}that end early",
                rf"{argument}\[-1\] = 8, the number of rows, got 7",
                RuntimeError,
                **{argument: integers(0, 3, 7)},
            ),
            bad(
                f"offsets {name}that end late",
                rf"{argument}\[-1\] = 8, the number of rows, got 9",
                RuntimeError,
                **{argument: integers(0, 3, 9)},
            ),
        )

    biased: Any = {"position": "shared", "time": "shared"}
    return (
        bad("q of two dimensions", r"q of shape \[L, H, Dqk\], got \[8, 4\]", q=lambda d: d.normal(8, 4)),
        bad("q of integers", "q of dtype .* got int64", TypeError, q=torch.ones(8, 2, 4).long()),
        bad("q of other columns than k", r"k of shape \[L, 2, 5\]", q=lambda d: d.normal(8, 2, 5)),
        bad("q of other heads than k", r"k of shape \[L, 3, 4\]", q=lambda d: d.normal(8, 3, 4)),
        bad("q of more rows than k", "as many rows of q as of k, 8, .* got 9", q=lambda d: d.normal(9, 2, 4)),
        bad(
            "v of other rows than k",
            r"v of shape \[8, 2, Dv\], got \[7, 2, 4\]",
            v=lambda d: d.normal(7, 2, 4),
        ),
        bad(
            "v of another dtype",
            "v of the dtype of q, float32, got float64",
            TypeError,
            v=torch.ones(8, 2, 4).double(),
        ),
        bad(
            "k of another dtype",
            "k of the dtype of q, float32, got float64",
            TypeError,
            k=torch.ones(8, 2, 4).double(),
        ),
        bad("v without columns", "v with 1 to 256 columns .* got 0", v=lambda d: d.normal(8, 2, 0)),
        bad("v of too many columns", "v with 1 to 256 columns .* got 257", v=lambda d: d.normal(8, 2, 257)),
        *refused_offsets("offsets"),
        *refused_offsets("query_offsets"),
        bad("no offsets", r"offsets of shape \[B \+ 1\], got \[0\]", offsets=integers()),
        bad(
            "offsets of other sequences",
            r"query_offsets of shape \[3\], got \[2\]",
            query_offsets=integers(0, 8),
        ),
        bad(
            "more queries than keys",
            "no more queries than keys, got 4 queries and 3 keys in sequence 0",
            RuntimeError,
            query_offsets=integers(0, 4, 8),
        ),
        bad(
            "more targets than tokens",
            r"num_targets in \[0, 3\] for sequence 0, got 4",
            RuntimeError,
            num_targets=integers(4, 5),
        ),
        bad(
            "negative targets",
            r"num_targets in \[0, 5\] for sequence 1, got -1",
            RuntimeError,
            num_targets=integers(0, -1),
        ),
        bad("negative number of targets", "num_targets to be at least 0, got -1", num_targets=-1),
        bad(
            "targets of other sequences",
            r"num_targets of shape \[2\], got \[3\]",
            num_targets=integers(1, 1, 1),
        ),
        bad("targets of floats", "num_targets of dtype .* got float32", TypeError, num_targets=torch.ones(2)),
        bad(
            "negative prefix",
            "num_contextual of at least 0 for sequence 1, got -2",
            RuntimeError,
            num_contextual=integers(0, -2),
        ),
        bad(
            "intervals of other rows",
            r"intervals of shape \[8, R, 2\] .*, got \[7, 1, 2\]",
            intervals=torch.zeros(7, 1, 2).long(),
        ),
        bad(
            "intervals of floats",
            "intervals of dtype .* got float32",
            TypeError,
            intervals=torch.zeros(8, 1, 2),
        ),
        bad(
            "an even number of distances",
            "odd number of distances, got 4",
            position_weight=lambda d: d.normal(4),
        ),
        bad(
            "position weights of other heads",
            r"position_weight of shape \[buckets\] or \[2, buckets\], got \[3, 5\]",
            position_weight=lambda d: d.normal(3, 5),
        ),
        bad(
            "position weights of integers",
            "position_weight of a floating",
            TypeError,
            position_weight=torch.ones(5).long(),
        ),
        bad(
            "timestamps of other tokens",
            r"timestamps of shape \[8\], got \[7\]",
            **biased,
            timestamps=torch.zeros(7).long(),
        ),
        bad(
            "timestamps of floats",
            "timestamps of dtype .* got float32",
            TypeError,
            **biased,
            timestamps=torch.zeros(8),
        ),
        bad(
            "timestamps without weights",
            "time_weight with timestamps",
            position="shared",
            timestamps=torch.zeros(8).long(),
        ),
        bad(
            "scales of other rows",
            r"scale of shape \[8\], if not a number, got \[7\]",
            scale=lambda d: d.normal(7),
        ),
        bad(
            "scales of integers",
            "scale of a floating-point dtype, got int64",
            TypeError,
            scale=torch.ones(8).long(),
        ),
        bad("dropout of all", r"dropout in \[0, 1\), got 1.0", dropout=1.0),
        bad(
            "seed of two numbers",
            r"dropout_seed of shape \[1\], got \[2\]",
            dropout=0.5,
            dropout_seed=integers(1, 2),
        ),
        bad(
            "seed of floats",
            "dropout_seed of dtype int64, got float32",
            TypeError,
            dropout=0.5,
            dropout_seed=torch.ones(1),
        ),
        *_bad_caches(bad, integers),
    )


def _bad_caches(bad: Callable[..., BadInput], integers: Callable[..., Tensor]) -> tuple[BadInput, ...]:
    packed: Any = {"cached": "packed"}
    slots: Any = {"cached": "slots"}
    paged: Any = {"cached": "paged"}
    return (
        bad(
            "cache of other heads",
            r"key_cache of shape \[R, 2, 4\]",
            **packed,
            key_cache=lambda d: d.normal(4, 3, 4),
        ),
        bad(
            "caches of other rows",
            r"value_cache of shape \[4, 2\] and Dv, got \[5, 2, 4\]",
            **packed,
            value_cache=lambda d: d.normal(5, 2, 4),
        ),
        bad(
            "cache of another dtype",
            "key_cache of dtype float32 or int8 or float8_e4m3fn, got float64",
            TypeError,
            **packed,
            key_cache=torch.ones(4, 2, 4).double(),
        ),
        bad(
            "codes without scales",
            "key_scales with a key_cache of int8, got None",
            **packed,
            key_cache=torch.ones(4, 2, 4).to(torch.int8),
        ),
        bad(
            "scales of other rows than the cache",
            r"value_scales of shape \[4, 2\], got \[3, 2\]",
            **packed,
            quantized="int8",
            value_scales=lambda d: d.normal(3, 2),
        ),
        bad(
            "lengths of other sequences",
            r"cache_lengths of shape \[2\], got \[1\]",
            **packed,
            cache_lengths=integers(4),
        ),
        bad(
            "negative length of a cache",
            r"cache_lengths of at least 0, got cache_lengths\[0\] = -1",
            RuntimeError,
            **slots,
            cache_lengths=integers(-1, 3),
        ),
        bad(
            "cache that starts too late",
            r"the 3 cached tokens of sequence 1 within the 10 rows of the cache, got cache_starts\[1\] = 8",
            RuntimeError,
            **slots,
            cache_starts=integers(0, 8),
        ),
        bad(
            "cache that starts before its rows",
            r"cache_starts\[0\] = -1",
            RuntimeError,
            **slots,
            cache_starts=integers(-1, 0),
        ),
        bad("starts and pages", "cache_starts or page_table, got both", **paged, cache_starts=integers(0, 0)),
        bad(
            "pages of other sequences",
            r"page_table of shape \[2, P\], got \[1, 1\]",
            **paged,
            page_table=integers(0).view(1, 1),
        ),
        bad(
            "page past the cache",
            r"page_table\[1, 0\] in \[0, 4\), got 4",
            RuntimeError,
            **paged,
            page_table=integers(0, 4).view(2, 1),
        ),
        bad(
            "negative page",
            r"page_table\[0, 0\] in \[0, 4\), got -1",
            RuntimeError,
            **paged,
            page_table=integers(-1, 0).view(2, 1),
        ),
        bad(
            "more cached tokens than pages",
            "at most 0 cached tokens, as many as page_table has room for, got 1 in sequence 0",
            RuntimeError,
            **paged,
            page_table=torch.zeros(2, 0, dtype=torch.int64),
        ),
    )

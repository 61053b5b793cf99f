"""HSTU attention as the correctness suite sees it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recsys_ops.hstu_attention import reference
from recsys_ops.hstu_attention.api import OPERATOR, hstu_attention
from recsys_ops.hstu_attention.autograd import KERNELS
from recsys_ops.hstu_attention.bad_inputs import bad_inputs
from recsys_ops.hstu_attention.bias import RelativeBias, boundaries_of
from recsys_ops.hstu_attention.cached import hstu_attention_cached, quantize_cache
from recsys_ops.hstu_attention.masks import HSTUMask
from recsys_ops.hstu_attention.mutants import MUTANTS
from recsys_ops.testing import Case, Inputs, Isolation, OperatorSpec

Arguments = dict[str, Any]
Cotangents = tuple[Tensor | None, ...]
Fields = dict[str, Any]

PAGE = 4  # rows of one


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    scale: float | Tensor,
    case: HSTUAttentionCase,
    backend: str | None = None,
    **optional: Any,
) -> Tensor:
    """``hstu_attention`` of the tensors of a case, one by one."""
    names = ("num_contextual", "num_targets", "intervals")
    masks = {name: optional.pop(name) for name in names if name in optional}
    bias = {
        name: optional.pop(name)
        for name in ("position_weight", "time_weight", "timestamps")
        if name in optional
    }
    mask = HSTUMask(
        causal=case.causal,
        window=case.window or None,
        target_group_size=case.group,
        full_window_tail=case.tail,
        **masks,
    )
    relative = None
    if bias:
        relative = RelativeBias(**bias, bucketing=case.bucketing, next_timestamps=not case.own_times)
    options: Any = {"scale": scale, "mask": mask, "bias": relative, "backend": backend, **optional}
    if not case.cached:
        return hstu_attention(q, k, v, offsets, dropout=case.dropout, **options)
    for name in ("key_cache", "value_cache"):
        if case.quantized == "fp8":
            options[name] = options[name].view(torch.float8_e4m3fn)
    return hstu_attention_cached(q, k, v, offsets, **options)


@dataclass(frozen=True)
class HSTUAttentionCase(Case):
    """One call of ``hstu_attention``."""

    lengths: tuple[int, ...] = (5, 0, 17, 1)
    heads: int = 2
    dim: int = 8
    value_dim: int | None = None  # dim
    causal: bool = True
    window: int = 0
    contextual: int | tuple[int, ...] = 0
    targets: int | tuple[int, ...] = 0  # a number: at most that many in each
    group: int = 1
    tail: int = 0
    intervals: int = 0
    position: str = ""  # or "shared" or "heads"
    distances: int = 21
    time: str = ""  # or "shared" or "heads"
    buckets: int = 9
    bucketing: str = "log"
    own_times: bool = False
    unsorted_times: bool = False
    ages_apart: bool = False  # some neighbours, in seconds more than int32 holds
    wide_tables: bool = False  # in fp32 beside fp16 or bf16
    row_scales: bool = False
    dropout: float = 0.0
    queries: int | str = ""  # the last of each sequence, or "targets"
    cached: str = ""  # all but the queries: "packed", "slots" or "paged"
    quantized: str = ""  # or "int8" or "fp8"
    wide_offsets: bool = True

    def build(self, draw: Inputs) -> Arguments:
        lengths, device = self.lengths, draw.device
        integers = torch.int64 if self.wide_offsets else torch.int32
        targets = self._of_each(self.targets)
        rows = self._rows(targets)
        value_dim = self.dim if self.value_dim is None else self.value_dim
        arguments: Arguments = {
            "q": draw.normal(sum(rows), self.heads, self.dim, scale=1.4),
            "k": draw.normal(sum(lengths), self.heads, self.dim, scale=1.4),
            "v": draw.normal(sum(lengths), self.heads, value_dim),
            "offsets": draw.offsets(list(lengths), integers),
            "case": self,
        }
        if self.queries != "":
            arguments["query_offsets"] = draw.offsets(rows, torch.int64)
        if self.contextual:
            prefix = self.contextual
            arguments["num_contextual"] = (
                prefix if isinstance(prefix, int) else torch.tensor(prefix, dtype=integers, device=device)
            )
        if self.targets:
            arguments["num_targets"] = torch.tensor(targets, dtype=integers, device=device)
        if self.intervals:
            arguments["intervals"] = self._draw_intervals(draw, rows)
        for name, kind, size in (
            ("position_weight", self.position, self.distances),
            ("time_weight", self.time, self.buckets),
        ):
            if kind:
                shape = (self.heads, size) if kind == "heads" else (size,)
                weight = draw.normal(*shape)
                arguments[name] = (
                    weight.to(torch.promote_types(draw.dtype, torch.float32)) if self.wide_tables else weight
                )
        if self.time:
            arguments["timestamps"] = self._draw_timestamps(draw)
        if self.dropout:
            arguments["dropout_seed"] = torch.randint(2**62, (1,), generator=draw.generator).to(device)
        scale = 1 / (1.2 * math.sqrt(self._mean_seen(arguments, rows)))
        arguments["scale"] = scale
        if self.row_scales:
            factors = torch.rand(sum(rows), generator=draw.generator) + 0.5
            arguments["scale"] = (scale * factors).to(device)
        return self._cached(draw, arguments, rows) if self.cached else arguments

    @property
    def differentiable(self) -> tuple[str, ...]:
        if self.cached:
            return ()
        tables = (("position_weight",) if self.position else ()) + (("time_weight",) if self.time else ())
        return ("q", "k", "v", *tables)

    def _cached(self, draw: Inputs, arguments: Arguments, rows: list[int]) -> Arguments:
        """The arguments where all tokens but the last of each sequence are in a cache, NaN in its gaps."""
        cached = [n - m for n, m in zip(self.lengths, rows, strict=True)]
        tokens, last = list(range(sum(self.lengths))), []
        places: list[tuple[int, int]] = []  # in the cache, and among all tokens
        start = 0
        longest = max(cached, default=0) + 2
        num_pages = sum(-(-n // PAGE) for n in cached) + 2
        pages = torch.randperm(num_pages, generator=draw.generator).tolist()
        table = torch.full((len(cached), -(-longest // PAGE)), -1)
        for b, (n, m) in enumerate(zip(cached, rows, strict=True)):
            for i in range(-(-n // PAGE)):
                table[b, i] = pages.pop()
            first = {"packed": len(places), "slots": b * longest, "paged": 0}[self.cached]
            own = [first + j for j in range(n)]
            if self.cached == "paged":
                own = [int(table[b, j // PAGE]) * PAGE + j % PAGE for j in range(n)]
            places += zip(own, tokens[start : start + n], strict=True)
            last += tokens[start + n : start + n + m]
            start += n + m
        integers = torch.int64 if self.wide_offsets else torch.int32
        into, token = (torch.tensor([pair[i] for pair in places], dtype=torch.int64) for i in range(2))
        arguments["offsets"] = arguments.pop("query_offsets")
        arguments["cache_lengths"] = torch.tensor(cached, dtype=integers, device=draw.device)
        if self.cached == "slots":
            starts = torch.arange(len(cached)) * longest
            arguments["cache_starts"] = starts.to(draw.device, integers)
        if self.cached == "paged":
            arguments["page_table"] = table.to(draw.device, integers)
        num_rows = {"packed": len(places), "slots": longest * len(cached), "paged": PAGE * num_pages}[
            self.cached
        ]
        for name, long in (("k", "key"), ("v", "value")):
            full = arguments[name]
            arguments[name] = full[torch.tensor(last, dtype=torch.int64)]
            cache = full.new_full((num_rows, *full.shape[1:]), torch.nan)
            cache[into] = full[token]
            leading = (num_pages, PAGE) if self.cached == "paged" else (num_rows,)
            if self.quantized:
                # Of magnitudes; signs are the scales', so that sums of magnitudes are what they should be.
                codes, scales = quantize_cache(cache.abs(), self.quantized)
                signs = torch.randint(2, scales.shape, generator=draw.generator).to(draw.device) * 2 - 1
                arguments[f"{long}_scales"] = (scales * signs).view(*leading, self.heads)
                cache = codes.view(torch.int8) if self.quantized == "fp8" else codes
            arguments[f"{long}_cache"] = cache.view(*leading, *full.shape[1:])
        return arguments

    def _of_each(self, count: int | tuple[int, ...]) -> list[int]:
        return [min(count, n) for n in self.lengths] if isinstance(count, int) else list(count)

    def _rows(self, targets: list[int]) -> list[int]:
        """How many rows of q each sequence has."""
        if self.queries == "targets":
            return targets
        return list(self.lengths) if self.queries == "" else self._of_each(int(self.queries))

    def _draw_intervals(self, draw: Inputs, rows: list[int]) -> Tensor:
        longest = torch.tensor([n for n, m in zip(self.lengths, rows, strict=True) for _ in range(m)])
        ends = (
            torch.rand(sum(rows), self.intervals, 2, generator=draw.generator) * (longest[:, None, None] + 4)
            - 2
        )
        drawn = ends.sort(2).values.round().to(torch.int64 if self.wide_offsets else torch.int32)
        drawn[::7, 0] = drawn[::7, 0].flip(1)  # ranges that end before they begin are empty
        return drawn.to(draw.device)

    def _draw_timestamps(self, draw: Inputs) -> Tensor:
        count = sum(self.lengths)
        gaps = torch.rand(count, generator=draw.generator).mul(8).exp().long() - 1
        if self.ages_apart:
            gaps[::37] += 2**33
        times = 1_700_000_000 + gaps.cumsum(0)
        if self.unsorted_times:
            times = times[torch.randperm(count, generator=draw.generator)]
        return times.to(draw.device)

    def _mean_seen(self, arguments: Arguments, rows: list[int]) -> float:
        """How many keys a row sees, but for the intervals."""
        mask = reference.Mask(self.causal, self.window, self.group, self.tail, None)
        contextual, targets = self._of_each(self.contextual), self._of_each(self.targets)
        seen = 0.0
        device = torch.device("cpu")
        for n, m, prefix, count in zip(self.lengths, rows, contextual, targets, strict=True):
            sequence = reference.Sequence(slice(0, m), slice(0, n), min(prefix, n - count), count)
            seen += float(mask.seen(sequence, device).sum())
        return max(1.0, seen / max(1, sum(rows)) / (2 if self.intervals else 1))


def _every_mask() -> Iterable[Fields]:
    """Every combination of what a mask has, over lengths that end within and at blocks."""
    for causal, window, contextual, targets, intervals in itertools.product(
        (True, False), (0, 6), (0, 3, (2, 0, 5, 9, 1)), (0, (1, 0, 7, 4, 1)), (0, 2)
    ):
        shared = {"causal": causal, "window": window, "contextual": contextual, "targets": targets}
        yield {**shared, "intervals": intervals, "lengths": (40, 0, 33, 4, 1)}
        if targets and not intervals:
            yield {**shared, "group": 3, "lengths": (40, 0, 33, 4, 1)}
        if window and not intervals:
            yield {**shared, "tail": 5, "lengths": (40, 0, 33, 4, 1)}


ALL_OF_IT: Fields = {
    "window": 11,
    "contextual": 3,
    "targets": 6,
    "group": 2,
    "tail": 4,
    "intervals": 2,
    "position": "shared",
    "time": "shared",
}
BIASES: tuple[Fields, ...] = (
    {"position": "shared"},
    {"position": "heads"},
    {"time": "shared"},
    {"time": "heads", "unsorted_times": True},
    {"position": "heads", "time": "heads", "buckets": 129, "distances": 199},
    {"position": "shared", "time": "shared", "bucketing": "sqrt", "own_times": True},
    {"time": "shared", "buckets": 129, "ages_apart": True},
    {"time": "heads", "buckets": 129, "ages_apart": True, "unsorted_times": True},
    {"time": "shared", "buckets": 1},
    {"position": "shared", "distances": 1},
)
HEAD_DIMS = (
    (1, 1),
    (2, 3),
    (8, 16),
    (15, 17),
    (16, 8),
    (25, 25),
    (33, 31),
    (50, 50),
    (64, 64),
    (65, 128),
    (128, 96),
    (256, 256),
)
AWKWARD = (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)

QUICK = (
    HSTUAttentionCase(),
    HSTUAttentionCase(causal=False, lengths=(33, 0, 20), dim=25, value_dim=17, window=9),
    HSTUAttentionCase(lengths=(70, 3), heads=1, dim=16, targets=5, contextual=2, row_scales=True),
    HSTUAttentionCase(lengths=(40, 9, 0, 66), **ALL_OF_IT),
    HSTUAttentionCase(
        lengths=(65, 12), position="heads", time="heads", unsorted_times=True, wide_tables=True
    ),
    HSTUAttentionCase(lengths=(130, 7), dropout=0.3, dim=4, wide_offsets=False, targets=3),
    HSTUAttentionCase(lengths=(90, 0, 5), targets=(11, 0, 5), queries="targets", time="shared", group=4),
    HSTUAttentionCase(lengths=(40, 3, 9), queries=4, causal=False, contextual=(5, 1, 0), intervals=1),
    HSTUAttentionCase(lengths=(40, 3, 9, 70), queries=6, cached="packed", targets=2, dim=25),
    HSTUAttentionCase(lengths=(40, 3, 9, 0), queries=6, cached="slots", quantized="fp8", causal=False),
    HSTUAttentionCase(lengths=(40, 3, 9, 70), queries=5, cached="paged", quantized="int8", **ALL_OF_IT),
    HSTUAttentionCase(lengths=(0, 0)),
    HSTUAttentionCase(lengths=()),
)

CASES = (
    *(HSTUAttentionCase(**fields) for fields in _every_mask()),
    *(HSTUAttentionCase(dim=dim, value_dim=value_dim, lengths=(40, 7)) for dim, value_dim in HEAD_DIMS),
    *(HSTUAttentionCase(lengths=(n, 5)) for n in AWKWARD),
    *(HSTUAttentionCase(lengths=(n,), causal=False, heads=1) for n in AWKWARD[1:]),
    *(HSTUAttentionCase(lengths=(70, 0, 33, 4), **fields) for fields in BIASES),
    *(
        HSTUAttentionCase(lengths=(70, 0, 33, 4), causal=False, targets=3, group=2, **fields)
        for fields in BIASES
    ),
    *(
        HSTUAttentionCase(lengths=(140, 33), dropout=p, row_scales=True, **fields)
        for p in (0.1, 0.9)
        for fields in ({}, {**ALL_OF_IT, "queries": 9})
    ),
    *(HSTUAttentionCase(lengths=(50, 0, 9), queries=m, **ALL_OF_IT) for m in (0, 1, 7, 50)),
    *(
        HSTUAttentionCase(
            lengths=(50, 0, 9, 1, 33), queries=m, cached=kind, quantized=codes, wide_offsets=m > 1, **fields
        )
        for m in (0, 1, 10)
        for kind, codes in (("packed", "int8"), ("slots", ""), ("paged", ""), ("paged", "fp8"))
        for fields in ({"dim": 16, "value_dim": 33}, {**ALL_OF_IT, "row_scales": True})
    ),
    HSTUAttentionCase(lengths=(20, 6, 3), targets=(20, 6, 3), contextual=4),  # nothing but targets
    HSTUAttentionCase(lengths=(20, 6, 3), contextual=(20, 6, 3), window=2),  # nothing but the prefix
    HSTUAttentionCase(lengths=(30, 6), targets=9, group=100, causal=False, window=1),
    HSTUAttentionCase(lengths=(64, 30), window=64, contextual=1),
    HSTUAttentionCase(lengths=(64, 30), window=1, tail=64),
    HSTUAttentionCase(lengths=(3,) * 40, heads=3, dim=5),
    HSTUAttentionCase(lengths=(12, 3), heads=7, dim=4, position="heads"),
    HSTUAttentionCase(lengths=(12, 3), heads=0),
)

LARGE = (
    HSTUAttentionCase(lengths=(700, 3, 0, 64, 300), dim=32),
    HSTUAttentionCase(
        lengths=(500, 90, 300), dim=64, heads=1, position="shared", time="shared", distances=401, buckets=64
    ),
    HSTUAttentionCase(lengths=(257, 31, 400), dim=16, **{**ALL_OF_IT, "window": 100}),
    HSTUAttentionCase(lengths=(600, 20), dim=25, causal=False, targets=40, contextual=7, dropout=0.2),
)


def _exhaustive() -> Iterable[HSTUAttentionCase]:
    for mask, bias, (dim, value_dim), queries in itertools.product(
        _every_mask(), ({}, *BIASES), ((8, 8), (25, 40), (64, 64)), ("", 6)
    ):
        yield HSTUAttentionCase(**mask, **bias, dim=dim, value_dim=value_dim, queries=queries)
        yield HSTUAttentionCase(**mask, **bias, dim=dim, value_dim=value_dim, dropout=0.25, row_scales=True)


def _of_sequence(arguments: Arguments, name: str, number: int) -> tuple[slice, Tensor]:
    """The rows of q (or k) of one sequence, and a mask of them, [L, 1, 1]."""
    offsets = arguments["query_offsets" if name == "q" and "query_offsets" in arguments else "offsets"]
    rows = slice(int(offsets[number]), int(offsets[number + 1]))
    mask = torch.zeros(len(arguments[name]), 1, 1, dtype=torch.bool, device=arguments[name].device)
    mask[rows] = True
    return rows, mask


POISONED = 2  # the sequence whose values are NaN


def _poison(name: str, value: float) -> Any:
    def poison(arguments: Arguments, cotangents: Cotangents) -> dict[str, Tensor]:
        masks = {side: _of_sequence(arguments, side, POISONED)[1] for side in ("q", "k", "v")}
        reached = {f"gradient of {side}": mask for side, mask in masks.items()}
        everywhere = torch.ones((), dtype=torch.bool, device=arguments["q"].device)
        reached |= {f"gradient of {table}": everywhere for table in ("position_weight", "time_weight")}
        if name == "gradient":
            assert cotangents[0] is not None
            cotangents[0][_of_sequence(arguments, "q", POISONED)[0]] = value
            return reached
        arguments[name][_of_sequence(arguments, name, POISONED)[0]] = value
        return {**reached, "output": masks["q"]}

    return poison


def _isolations() -> Iterable[Isolation]:
    cases = {
        "plain": HSTUAttentionCase(lengths=(19, 3, 21, 40)),
        "all of it": HSTUAttentionCase(lengths=(19, 3, 21, 40), **ALL_OF_IT),
        "not causal, last rows": HSTUAttentionCase(
            lengths=(19, 3, 21, 40), causal=False, queries=5, dropout=0.5
        ),
    }
    for (what, case), name, (number, value) in itertools.product(
        cases.items(), ("q", "k", "v", "gradient"), (("NaN", torch.nan), ("infinity", torch.inf))
    ):
        quick = what != "plain" and number == "NaN"
        yield Isolation(f"{number} in {name} of a sequence, {what}", case, _poison(name, value), quick)


def _registered_call(arguments: Arguments, backend: str) -> tuple[Any, tuple[Any, ...]]:
    case, offsets, q = arguments["case"], arguments["offsets"], arguments["q"]
    prefix = arguments.get("num_contextual")
    if isinstance(prefix, int):
        prefix = offsets.new_full((len(offsets) - 1,), prefix)
    scale = arguments["scale"]
    tables = [arguments.get(name) for name in ("position_weight", "time_weight")]
    position, time = (t if t is None or t.dim() == 2 else t[None] for t in tables)
    boundaries = None if time is None else boundaries_of(case.bucketing, time.shape[1], q.device)
    return torch.ops.recsys_ops.hstu_attention.default, (
        q,
        arguments["k"],
        arguments["v"],
        arguments.get("query_offsets"),
        offsets,
        scale if isinstance(scale, Tensor) else None,
        prefix,
        arguments.get("num_targets"),
        arguments.get("intervals"),
        position,
        time,
        arguments.get("timestamps"),
        boundaries,
        arguments.get("dropout_seed"),
        1.0 if isinstance(scale, Tensor) else scale,
        1 / math.sqrt(case.dim),
        case.causal,
        case.window,
        case.group,
        case.tail,
        not case.own_times,
        case.dropout,
        backend,
    )


SPEC = OperatorSpec(
    operator=OPERATOR,
    function=run,
    kernels=KERNELS,
    registered_call=_registered_call,
    case=HSTUAttentionCase,
    quick=QUICK,
    cases=CASES,
    large=LARGE,
    small=(
        HSTUAttentionCase(
            lengths=(4, 0, 3), dim=3, value_dim=2, **{**ALL_OF_IT, "distances": 5, "buckets": 4}
        ),
        HSTUAttentionCase(lengths=(5, 2), dim=2, causal=False, dropout=0.3, row_scales=True, queries=2),
    ),
    mutating=(
        HSTUAttentionCase(lengths=(20, 5), queries=3, cached="paged", quantized="int8"),
        HSTUAttentionCase(lengths=(20, 5), queries=3, cached="packed", time="shared"),
    ),
    typical=(
        HSTUAttentionCase(position="shared", time="heads", targets=2),
        HSTUAttentionCase(lengths=(30, 2), causal=False, window=7, contextual=2, dropout=0.2, dim=25),
        HSTUAttentionCase(lengths=(20, 5), targets=4, queries="targets", intervals=1, wide_offsets=False),
    ),
    asynchronous=(
        HSTUAttentionCase(lengths=(70, 0, 33)),
        HSTUAttentionCase(lengths=(70, 0, 33), dropout=0.1, row_scales=True, **ALL_OF_IT),
    ),
    isolations=tuple(_isolations()),
    bad_inputs=bad_inputs(HSTUAttentionCase),
    mutants=MUTANTS,
    exhaustive=_exhaustive,
    eager_depends_on_threads=True,
    casts_under_autocast=True,
)

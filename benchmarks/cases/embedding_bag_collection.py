"""The workloads of lookups in many tables, on the CPU and on a GPU."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch

from recsys_ops.benchmarks.cases.collection_checks import make_check
from recsys_ops.benchmarks.cases.collection_inputs import Case, conditions_of, cost_of, inputs_of
from recsys_ops.benchmarks.machine import cache_bytes
from recsys_ops.benchmarks.registry import Growth, Workload


def make_workload(
    name: str,
    case: Case,
    rows_from: Literal["memory", "last-level cache", "cache"] = "cache",
    quick: bool = False,
    timed: Literal["device", "host"] = "device",
    growth: Growth | None = None,
) -> Workload:
    """The workload of a case; see ``Workload`` for the arguments."""
    return Workload(
        name=name,
        operator="embedding_bag_collection",
        pass_="step" if case.optimizer else "forward",
        conditions=conditions_of(case, rows_from) + (", time of the host" if timed == "host" else ""),
        rows_from=rows_from,
        case=case,
        inputs=functools.partial(inputs_of, case),
        cost=functools.partial(cost_of, case),
        check=functools.partial(make_check, case),
        quick=quick,
        timed=timed,
        growth=growth,
    )


def cpu_workloads() -> list[Workload]:
    """Serving, forward, quantised, training steps, and how their time grows."""
    large = functools.partial(Case, rows=1_000_000)
    half = torch.float16

    def served(name: str, quick: bool = False, **options: Any) -> Workload:
        return make_workload(name, Case(26, 64, **{"bags": 1, "lengths": (1, 1), **options}), quick=quick)

    def forward(name: str, case: Case, quick: bool = False) -> Workload:
        return make_workload(name, case, "memory" if case.ids == "uniform" else "cache", quick)

    def quantised(format: str, dim: int, quick: bool = False) -> Workload:
        return make_workload(
            f"quantised/{format}/D{dim}", Case(26, dim, bags=512, format=format), quick=quick
        )

    def step(name: str, case: Case, quick: bool = False) -> Workload:
        return make_workload(f"step/{case.optimizer}/{name}", case, quick=quick)

    sgd, rowwise, adam = (
        functools.partial(Case, optimizer=name) for name in ("sgd", "rowwise_adagrad", "adam")
    )
    return [
        served("serve/T26/B1/D64", quick=True),
        served("serve/T26/B1/D64/keyed", quick=True, keyed="made before"),
        served("serve/T26/B1/D64/keyed-anew", keyed="made in the call"),
        served("serve/T26/B1/D64/int8", format="int8"),
        served("serve/T26/B1/D64/L20", lengths=(1, 39)),
        served("serve/T26/B64/D64", bags=64, lengths=(1, 39)),
        forward("forward/zipf/T1/B512/D64", large(1, 64, bags=512)),
        forward("forward/zipf/T1/B2048/D16", large(1, 16)),
        forward("forward/zipf/T1/B2048/D64", large(1, 64), quick=True),
        forward("forward/zipf/T1/B2048/D128", large(1, 128)),
        forward("forward/zipf/T8/B512/D64", large(8, 64, bags=512)),
        forward("forward/zipf/T8/B2048/D64", large(8, 64)),
        forward("forward/zipf/T8/B2048/D16", large(8, 16)),
        forward("forward/zipf/T26/B512/D64", Case(26, 64, bags=512), quick=True),
        forward("forward/zipf/T26/B2048/D16", Case(26, 16)),
        forward("forward/zipf/T26/B2048/D64", Case(26, 64)),
        forward("forward/zipf/T26/B2048/D128", Case(26, 128)),
        forward("forward/uniform/T1/B2048/D64", large(1, 64, ids="uniform")),
        forward("forward/uniform/T8/B2048/D16", large(8, 16, ids="uniform")),
        forward("forward/uniform/T8/B512/D64", large(8, 64, bags=512, ids="uniform")),
        forward("forward/uniform/T26/B512/D64", Case(26, 64, bags=512, ids="uniform"), quick=True),
        forward("forward/uniform/T26/B512/D128", Case(26, 128, bags=512, ids="uniform")),
        forward("special/mean", Case(26, 64, bags=512, mode="mean")),
        forward("special/shared-table", large(1, 64, bags=512, features_per_table=8)),
        forward("special/shared-features", Case(26, 64, bags=512, tables_per_feature=2)),
        forward("special/fp16/D128", Case(26, 128, bags=512, dtype=half, ids="uniform"), quick=True),
        quantised("int8", 64, quick=True),
        quantised("int8", 128),
        quantised("int4", 64),
        quantised("int4", 128),
        quantised("fp8", 64),
        quantised("fp8", 128),
        step("T1/D64", sgd(1, 64, rows=1_000_000)),
        step("T8/D64", sgd(8, 64, bags=512, rows=1_000_000)),
        step("T26/D16", sgd(26, 16)),
        step("T26/D64", sgd(26, 64, bags=512), quick=True),
        step("T1/D64", rowwise(1, 64, rows=1_000_000)),
        step("T8/D64", rowwise(8, 64, bags=512, rows=1_000_000)),
        step("T26/D16", rowwise(26, 16)),
        step("T26/D64", rowwise(26, 64, bags=512), quick=True),
        step("T26/D128", rowwise(26, 128, bags=512)),
        step("T26/D64/fp16", rowwise(26, 64, bags=512, dtype=half)),
        step("shared-table", rowwise(1, 64, bags=512, rows=1_000_000, features_per_table=8)),
        step("shared-features", rowwise(26, 64, bags=512, tables_per_feature=2)),
        step("T1/D64", adam(1, 64, rows=1_000_000)),
        step("T8/D16", adam(8, 16, bags=512, rows=1_000_000)),
        step("T26/D64", adam(26, 64, bags=512), quick=True),
        *_growth_workloads(),
    ]


def _growth_workloads() -> list[Workload]:
    """Rows of one table at a fixed number of ids, and tables at fixed sizes; ids uniform, caches warm."""
    workloads = []
    for optimizer in (None, "rowwise_adagrad"):
        fixed = functools.partial(Case, dim=16, ids="uniform", optimizer=optimizer)
        kind = "step" if optimizer else "forward"
        for power in (4, 5, 6, 7):
            case, growth = fixed(1, rows=10**power), Growth("rows of a table", 10**power)
            workloads.append(make_workload(f"growth/rows/{kind}/1e{power}", case, growth=growth))
        for tables in (1, 8, 64, 512):
            case, growth = fixed(tables, bags=128, rows=10_000), Growth("tables", tables)
            workloads.append(make_workload(f"growth/tables/{kind}/{tables}", case, growth=growth))
    return workloads


def gpu_workloads() -> list[Workload]:
    """Tables of several times the second-level cache, and small calls."""
    second = cache_bytes("cuda")[0]
    half = torch.float16

    def cold(
        name: str, tables: int, dim: int, bags: int = 2**13, quick: bool = False, **options: Any
    ) -> Workload:
        row = dim * options.get("dtype", torch.float32).itemsize
        least = 8 * second // (tables * row)
        given = {"rows": max(2**20, least), "ids": "uniform", "device": "cuda", **options}
        return make_workload(name, Case(tables, dim, bags, **given), "memory", quick)

    def launch(name: str, quick: bool = False, **options: Any) -> Workload:
        case = Case(26, 64, device="cuda", **{"bags": 1, "lengths": (1, 1), "rows": 10_000, **options})
        return make_workload(name, case, quick=quick, timed="host")

    def step(
        name: str, tables: int, dim: int, bags: int = 2**13, quick: bool = False, **options: Any
    ) -> Workload:
        return cold(f"step/{options['optimizer']}/{name}", tables, dim, bags, quick, **options)

    return [
        launch("launch/T26/B1", quick=True),
        launch("launch/T26/B1/keyed", keyed="made before"),
        launch("launch/T26/B64", bags=64, lengths=(1, 39)),
        launch("launch/T26/B1/int8", format="int8"),
        launch("launch/step/T26/B64", bags=64, lengths=(1, 39), optimizer="rowwise_adagrad"),
        cold("small/uniform/T26/B512/D64", 26, 64, 512),
        cold("cold/uniform/T1/D64", 1, 64, 2**16),
        cold("cold/uniform/T8/D64", 8, 64, quick=True),
        cold("cold/uniform/T26/D16", 26, 16),
        cold("cold/uniform/T26/D64", 26, 64),
        cold("cold/uniform/T26/D128", 26, 128, 2**12),
        cold("cold/zipf/T8/D64", 8, 64, ids="zipf", quick=True),
        cold("cold/zipf/T26/D128", 26, 128, 2**12, ids="zipf"),
        cold("cold/mean/T8/D64", 8, 64, mode="mean"),
        cold("cold/fp16/T26/D128", 26, 128, dtype=half),
        cold("cold/shared-table/T1/D64", 1, 64, features_per_table=8),
        cold("quantised/int8/D64", 26, 64, format="int8", quick=True),
        cold("quantised/int8/D128", 26, 128, format="int8"),
        cold("quantised/int4/D64", 26, 64, format="int4"),
        cold("quantised/int4/D128", 26, 128, format="int4"),
        cold("quantised/fp8/D64", 26, 64, format="fp8"),
        cold("quantised/fp8/D128", 26, 128, format="fp8"),
        step("uniform/T8/D64", 8, 64, optimizer="sgd"),
        step("uniform/T8/D64", 8, 64, optimizer="rowwise_adagrad", quick=True),
        step("zipf/T8/D64", 8, 64, optimizer="rowwise_adagrad", ids="zipf"),
        step("zipf/T26/D128", 26, 128, 2**11, optimizer="rowwise_adagrad", ids="zipf"),
        step("equal/T1/D64", 1, 64, optimizer="rowwise_adagrad", ids="equal"),
        step("fp16/T8/D128", 8, 128, optimizer="rowwise_adagrad", dtype=half),
        step("shared-table/T1/D64", 1, 64, optimizer="rowwise_adagrad", features_per_table=8),
        step("uniform/T8/D64", 8, 64, optimizer="adam"),
        step("zipf/T8/D64", 8, 64, optimizer="adam", ids="zipf"),
    ]

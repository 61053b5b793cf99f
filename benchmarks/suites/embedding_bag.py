"""Pooled lookups: serving, large batches, every special path, and training steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ops.backends import Call
from recsys_ops.benchmarks import fbgemm
from recsys_ops.benchmarks.cases.embedding_bag import Case, Table, make_workload, runner
from recsys_ops.benchmarks.machine import cache_bytes
from recsys_ops.benchmarks.registry import (
    LIMIT,
    OURS,
    Candidate,
    Inputs,
    Run,
    Suite,
    Target,
    Unsupported,
    Workload,
    compiler_missing,
    other_gpu_backends,
)
from recsys_ops.embedding_bag.api import OPERATOR, embedding_bag


def _prepare_ours(workload: Workload, inputs: Inputs, backend: str | None = None) -> Run:
    table: Table = inputs.state
    function = embedding_bag if backend is None else functools.partial(embedding_bag, backend=backend)
    return runner(function, workload.case, table._replace(weight=table.weight.to(workload.case.dtype)))


def _prepare_torch(workload: Workload, inputs: Inputs, coalesce: bool = False, compiled: bool = False) -> Run:
    case: Case = workload.case
    if case.weighted and case.mode == "mean":
        raise Unsupported("per_sample_weights only with mode='sum'")
    function: Callable[..., Tensor] = F.embedding_bag
    if compiled:
        torch.compiler.reset()
        function = torch.compile(F.embedding_bag, dynamic=True)
    return runner(function, case, inputs.state, coalesce)


def _prepare_fbgemm(workload: Workload, inputs: Inputs) -> Run:
    case, table = workload.case, inputs.state.weight
    for refused, why in (
        (case.padded, "no padding_idx"),
        (case.matrix, "ids with offsets only"),
        (case.gradient == "sparse", "no sparse gradient: its optimizers update the table in the backward"),
        (case.gradient and case.weighted, "weighted steps are not measured: its gradient of a mean is wrong"),
    ):
        if refused:
            raise Unsupported(why)
    if case.gradient is None:
        pool = fbgemm.pooled_lookup([table], case.mode, table.dtype)
        return lambda batch: pool(batch.ids, batch.offsets, batch.weights)
    step = fbgemm.pooled_step(table, case.mode)
    return lambda batch: (*step(batch.ids, batch.offsets, batch.grad), None)


def _as_fp32(workload: Workload) -> Workload:
    case = replace(workload.case, dtype=torch.float32)
    return make_workload(workload.name, case, workload.rows_from)


def _as_sum(workload: Workload) -> Workload:
    return make_workload(workload.name, replace(workload.case, mode="sum"), workload.rows_from)


def _cpu_workloads() -> list[Workload]:
    serve = functools.partial(Case, lengths=(1, 20))
    llc = cache_bytes()[1]

    def cached(dim: int) -> Case:
        return Case(dim, rows=llc // 4 // (dim * 4), ids="uniform")

    def beyond_cache(dim: int, dtype: torch.dtype = torch.float32, ids: Any = "uniform") -> Case:
        rows = max(1_000_000, 4 * llc // (dim * dtype.itemsize))
        return Case(dim, rows=rows, ids=ids, dtype=dtype)

    half, brain = torch.float16, torch.bfloat16
    step = functools.partial(Case, gradient="sparse")
    dense = functools.partial(Case, gradient="dense", rows=20_000)
    return [
        make_workload("serve/B1/D64", serve(64, bags=1), quick=True),
        make_workload("serve/B1/D128", serve(128, bags=1)),
        make_workload("serve/B16/D64", serve(64, bags=16), quick=True),
        make_workload("serve/B16/D64/matrix", serve(64, bags=16, matrix=True)),
        make_workload("serve/B64/D16", serve(16, bags=64)),
        make_workload("serve/B64/D64", serve(64, bags=64)),
        make_workload("zipf/D16", Case(16)),
        make_workload("zipf/D64", Case(64), quick=True),
        make_workload("zipf/D128", Case(128)),
        make_workload("cached/D64", cached(64), "last-level cache"),
        make_workload("cached/D128", cached(128), "last-level cache"),
        make_workload("cold/uniform/D16", beyond_cache(16), "memory"),
        make_workload("cold/uniform/D64", beyond_cache(64), "memory", quick=True),
        make_workload("cold/uniform/D128", beyond_cache(128), "memory"),
        make_workload("cold/zipf/D64", beyond_cache(64, ids="zipf"), "memory"),
        make_workload("special/padding", Case(64, padded=True), quick=True),
        make_workload("special/max", Case(64, mode="max"), quick=True),
        make_workload("special/fp64", Case(64, dtype=torch.float64)),
        make_workload("special/mean", Case(64, mode="mean")),
        make_workload("special/weighted", Case(64, weighted=True)),
        make_workload("special/mean-weighted", Case(64, mode="mean", weighted=True), quick=True),
        make_workload("special/matrix", Case(64, lengths=(20, 20), matrix=True)),
        make_workload("half/fp16/D128", beyond_cache(128, half), "memory", quick=True),
        make_workload("half/bf16/D128", beyond_cache(128, brain), "memory"),
        make_workload("half/fp16/D256", beyond_cache(256, half), "memory"),
        make_workload("step/sparse/zipf/D16", step(16)),
        make_workload("step/sparse/zipf/D64", step(64), quick=True),
        make_workload("step/sparse/zipf/D128", step(128)),
        make_workload("step/sparse/uniform/D64", step(64, ids="uniform")),
        make_workload("step/sparse/weighted", step(64, weighted=True, weights_gradient=True)),
        make_workload("step/sparse/B64/D64", step(64, bags=64, lengths=(1, 20))),
        make_workload("step/dense/D64", dense(64), quick=True),
        make_workload("step/dense/D128", dense(128)),
        make_workload("step/dense/mean", dense(64, mode="mean")),
        make_workload("step/zeroing/D64", dense(64, rows=1_000_000)),
    ]


def _gpu_workloads() -> list[Workload]:
    """Tables of several times the second-level cache, small calls, and what is special."""
    second = cache_bytes("cuda")[0]
    half, brain = torch.float16, torch.bfloat16

    def cold(name: str, dim: int, bags: int = 2**16, quick: bool = False, **options: Any) -> Workload:
        row = dim * options.get("dtype", torch.float32).itemsize
        given = {"rows": max(2**20, 8 * second // row), "ids": "uniform", **options}
        return make_workload(name, Case(dim, bags, device="cuda", **given), "memory", quick)

    def cached(name: str, dim: int, **options: Any) -> Workload:
        case = Case(dim, 2**14, rows=second // 4 // (4 * dim), ids="uniform", device="cuda", **options)
        return make_workload(name, case)

    def launch(name: str, bags: int, quick: bool = False, **options: Any) -> Workload:
        case = Case(64, bags, lengths=(1, 20), rows=10_000, device="cuda", **options)
        return make_workload(name, case, quick=quick, timed="host")

    return [
        launch("launch/B1", 1, quick=True),
        launch("launch/B64", 64),
        launch("launch/B64/matrix", 64, matrix=True),
        launch("launch/step/dense/B64", 64, gradient="dense"),
        launch("launch/step/sparse/B64", 64, gradient="sparse"),
        cold("small/uniform/D64/B2048", 64, 2048),
        cold("small/step/sparse/D64/B2048", 64, 2048, gradient="sparse"),
        cold("cold/uniform/D64", 64, quick=True),
        cold("cold/uniform/D64/B16384", 64, 2**14),
        cold("cold/zipf/D64", 64, ids="zipf", quick=True),
        cold("cold/weighted/D64", 64, weighted=True),
        cold("cold/mean/D64", 64, mode="mean"),
        cold("cold/max/D64", 64, mode="max"),
        cold("cold/padding/D64", 64, padded=True),
        cold("cold/matrix/D64", 64, lengths=(20, 20), matrix=True),
        cold("step/sparse/uniform/D64", 64, gradient="sparse", quick=True),
        cold("step/sparse/zipf/D64", 64, ids="zipf", gradient="sparse"),
        cold("step/sparse/weighted/D64", 64, weighted=True, weights_gradient=True, gradient="sparse"),
        cold("step/sparse/equal/D64", 64, ids="equal", gradient="sparse"),
        cold("step/dense/uniform/D64", 64, gradient="dense", quick=True),
        cold("step/dense/zipf/D64", 64, ids="zipf", gradient="dense"),
        cold("step/dense/mean/D64", 64, mode="mean", gradient="dense"),
        cold("step/dense/max/D64", 64, mode="max", gradient="dense"),
        cold("step/dense/equal/D64", 64, ids="equal", gradient="dense"),
        cold("cold/uniform/D16", 16),
        cold("cold/zipf/D16", 16, ids="zipf"),
        cold("cold/uniform/D128", 128, 2**15),
        cold("cold/zipf/D128", 128, 2**15, ids="zipf"),
        cold("step/sparse/zipf/D128", 128, 2**15, ids="zipf", gradient="sparse"),
        cold("cold/uniform/D256", 256, 2**14),
        cold("cold/zipf/D256", 256, 2**14, ids="zipf"),
        cold("cold/uniform/D64/fp16", 64, dtype=half),
        cold("cold/uniform/D128/fp16", 128, dtype=half, quick=True),
        cold("cold/zipf/D128/fp16", 128, dtype=half, ids="zipf"),
        cold("step/sparse/zipf/D128/fp16", 128, 2**15, dtype=half, ids="zipf", gradient="sparse"),
        cold("cold/uniform/D128/bf16", 128, dtype=brain),
        cold("cold/zipf/D256/bf16", 256, 2**14, dtype=brain, ids="zipf"),
        cached("cached/D64", 64),
        cached("cached/D128", 128),
        cached("cached/step/sparse/D64", 64, gradient="sparse"),
        cached("cached/step/dense/D64", 64, gradient="dense"),
    ]


_FORWARD_SUM = ("serve/*", "zipf/*", "cached/*", "cold/*")
_TWO_THREADS_HELP = _FORWARD_SUM[1:]

_CPU_TARGETS = [
    *(Target(workloads, "torch", 1.0) for workloads in _FORWARD_SUM),
    *(Target(workloads, "FBGEMM TBE", 1.8) for workloads in _TWO_THREADS_HELP),
    Target("special/padding", "torch", 8.0),
    Target("special/max", "torch", 20.0),
    Target("special/fp64", "torch", 6.0),
    Target("special/mean-weighted", "recsys_ops sum", 1.0),
    Target("half/*", "recsys_ops fp32", 1.5),
    Target("step/sparse/*", "torch", 2.0),
    Target("step/sparse/*", "torch + coalesce", 2.0),
    Target("step/dense/*", "torch", 1.5),
]
_GPU_TARGETS = [
    Target("cold/*", LIMIT, 0.85),
    Target("step/*", LIMIT, 0.5),
    Target("launch/B*", "torch", 1.0),
    Target("launch/step/dense/*", "torch", 1.0),
    Target("launch/step/sparse/*", "torch + coalesce", 1.0),
]

_OURS_IN_OTHER_WAYS = [
    Candidate(
        "recsys_ops fp32",
        _prepare_ours,
        applies=lambda workload: workload.case.dtype.itemsize == 2,
        variant=_as_fp32,
    ),
    Candidate(
        "recsys_ops sum",
        _prepare_ours,
        applies=lambda workload: workload.case.mode == "mean" and workload.case.weighted,
        variant=_as_sum,
    ),
]


def suite(device: str) -> Suite:
    """What is measured on a device, "cpu" or "cuda"."""
    on_cpu = device == "cpu"
    call = Call(device, torch.float32)
    peers = [
        Candidate("torch", _prepare_torch),
        Candidate(
            "torch + coalesce",
            functools.partial(_prepare_torch, coalesce=True),
            applies=lambda workload: workload.case.gradient == "sparse",
        ),
        Candidate(
            "torch.compile",
            functools.partial(_prepare_torch, compiled=True),
            available=compiler_missing,
            # Compiling takes longer than all else, and ends in the same kernels.
            applies=lambda workload: on_cpu or workload.quick,
        ),
        Candidate("FBGEMM TBE", _prepare_fbgemm, available=functools.partial(fbgemm.missing, device)),
    ]
    return Suite(
        operator="embedding_bag",
        workloads=_cpu_workloads() if on_cpu else _gpu_workloads(),
        candidates=[
            Candidate(OURS, _prepare_ours),
            *([] if on_cpu else other_gpu_backends(OPERATOR, call, _prepare_ours)),
            *peers,
            *(_OURS_IN_OTHER_WAYS if on_cpu else []),
        ],
        targets=_CPU_TARGETS if on_cpu else _GPU_TARGETS,
        backend=lambda: OPERATOR.choose(call).backend,
    )

"""Pooled lookups: serving, large batches, every special path, and training steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ops.backends import Call
from recsys_ops.benchmarks import fbgemm
from recsys_ops.benchmarks.machine import cache_bytes
from recsys_ops.benchmarks.registry import (
    LIMIT,
    OURS,
    Candidate,
    Check,
    Inputs,
    Run,
    Suite,
    Target,
    Unsupported,
    Workload,
)
from recsys_ops.embedding_bag.api import OPERATOR, embedding_bag
from recsys_ops.embedding_bag.cost import Cost, backward_cost, forward_cost
from recsys_ops.testing.tolerances import compare

_ZIPF_EXPONENT = 1.05
_IDS_IN_POOL = 400_000
_PADDED = 0.25


@dataclass(frozen=True)
class Case:
    """One kind of lookup."""

    dim: int
    bags: int = 2048
    lengths: tuple[int, int] = (1, 39)  # shortest and longest bag
    rows: int = 1_000_000
    ids: Literal["zipf", "uniform", "equal"] = "zipf"
    dtype: torch.dtype = torch.float32
    mode: str = "sum"
    weighted: bool = False
    padded: bool = False
    matrix: bool = False  # ids [B, L] instead of ids [N] with offsets
    gradient: Literal["sparse", "dense"] | None = None
    weights_gradient: bool = False
    device: str = "cpu"


class Batch(NamedTuple):
    ids: Tensor
    offsets: Tensor | None  # [B + 1], the form that costs no candidate a copy
    weights: Tensor | None
    grad: Tensor | None  # of the output


class Table(NamedTuple):
    weight: Tensor
    padding_idx: int | None


def make_workload(
    name: str,
    case: Case,
    rows_from: Literal["memory", "last-level cache", "cache"] = "cache",
    quick: bool = False,
    timed: Literal["device", "host"] = "device",
) -> Workload:
    """The workload of a case; see ``Workload`` for the arguments."""
    return Workload(
        name=name,
        operator="embedding_bag",
        pass_="step" if case.gradient else "forward",
        conditions=_conditions(case, rows_from) + (", time of the host" if timed == "host" else ""),
        rows_from=rows_from,
        case=case,
        inputs=functools.partial(_inputs, case),
        cost=functools.partial(_cost, case),
        check=functools.partial(_check, case),
        quick=quick,
        timed=timed,
    )


def _conditions(case: Case, rows_from: str) -> str:
    shortest, longest = case.lengths
    lengths = f"{longest}" if case.matrix or shortest == longest else f"{shortest}-{longest}"
    parts = [
        case.mode,
        str(case.dtype).removeprefix("torch."),
        f"B {case.bags}, L {lengths}, table {case.rows:,} x {case.dim}",
        f"Zipf({_ZIPF_EXPONENT}) ids" if case.ids == "zipf" else f"{case.ids} ids",
    ]
    parts += ["per-sample weights"] * case.weighted + [f"{_PADDED:.0%} of the ids padding"] * case.padded
    parts += ["ids as a matrix"] * case.matrix
    if case.gradient:
        parts.append(f"forward and backward, {case.gradient} gradient")
    parts += ["and of the weights"] * case.weights_gradient
    parts.append("caches flushed before every call" if rows_from == "memory" else "caches warm")
    return ", ".join(parts)


def _inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.empty(shape).uniform_(-1, 1, generator=generator).to(case.device, case.dtype)

    draw = _ids_from(case, generator)
    padding_idx = case.rows // 2 if case.padded else None

    def batch() -> Batch:
        shortest, longest = case.lengths
        offsets = None
        if case.matrix:
            ids = draw(case.bags * longest).view(case.bags, longest)
        else:
            lengths = torch.randint(shortest, longest + 1, (case.bags,), generator=generator)
            offsets = F.pad(lengths.cumsum(0), (1, 0))
            ids = draw(int(offsets[-1]))
        if padding_idx is not None:
            ids[torch.rand(ids.shape, generator=generator) < _PADDED] = padding_idx
        ids, offsets = ids.to(case.device), None if offsets is None else offsets.to(case.device)
        weights = uniform(*ids.shape) if case.weighted else None
        return Batch(ids, offsets, weights, uniform(case.bags, case.dim) if case.gradient else None)

    in_batch = case.bags * (case.lengths[1] if case.matrix else sum(case.lengths) // 2)
    count = max(4, min(64, _IDS_IN_POOL // max(in_batch, 1)))
    weight = _weight(case.rows, case.dim, case.dtype, case.device)
    return Inputs(Table(weight, padding_idx), [batch() for _ in range(count)])


@functools.lru_cache(maxsize=1)
def _weight(rows: int, dim: int, dtype: torch.dtype, device: str) -> Tensor:
    """The rows of a table; kept, because successive workloads often have the same."""
    generator = torch.Generator().manual_seed(1)
    return torch.empty(rows, dim).uniform_(-1, 1, generator=generator).to(device, dtype)


def _ids_from(case: Case, generator: torch.Generator) -> Callable[[int], Tensor]:
    if case.ids == "uniform":
        return lambda count: torch.randint(case.rows, (count,), generator=generator)
    if case.ids == "equal":
        return lambda count: torch.full((count,), case.rows // 3)
    ranks = torch.arange(1, case.rows + 1, dtype=torch.float64)
    cumulated = ranks.pow(-_ZIPF_EXPONENT).cumsum(0)
    row_of_rank = torch.randperm(case.rows, generator=generator)

    def draw(count: int) -> Tensor:
        points = torch.rand(count, generator=generator, dtype=torch.float64) * cumulated[-1]
        return row_of_rank[torch.searchsorted(cumulated, points).clamp(max=case.rows - 1)]

    return draw


def _cost(case: Case, batch: Batch) -> Cost:
    ids = batch.ids[batch.ids != case.rows // 2] if case.padded else batch.ids
    sizes = (case.bags, ids.numel(), len(ids.unique()), case.dim, case.dtype)
    cost = forward_cost(*sizes, mode=case.mode, weighted=case.weighted)
    if case.gradient:
        cost += backward_cost(
            *sizes,
            num_embeddings=case.rows if case.gradient == "dense" else None,
            mode=case.mode,
            weighted=case.weighted,
            weights_gradient=case.weights_gradient,
        )
    return cost


def _check(case: Case, inputs: Inputs) -> Check:
    """Compares with eager PyTorch in fp64, on the rows that a batch names."""
    table: Table = inputs.state
    dense = replace(case, gradient=case.gradient and "dense")

    @functools.lru_cache(maxsize=2)
    def expected(batch: Batch) -> tuple[Tensor, list[list[Tensor]]]:
        rows, ids = batch.ids.unique(return_inverse=True)
        is_padding = rows == (-1 if table.padding_idx is None else table.padding_idx)
        padding_idx = int(is_padding.nonzero()[0]) if is_padding.any() else None

        def eager(of: Callable[[Tensor], Tensor]) -> list[Tensor]:
            weights, grad = (None if t is None else of(t.to(case.dtype)) for t in (batch.weights, batch.grad))
            weight = of(table.weight[rows].to(case.dtype))
            run = _runner(
                functools.partial(embedding_bag, backend="reference"), dense, Table(weight, padding_idx)
            )
            result = run(Batch(ids, batch.offsets, weights, grad))
            return [t for t in (result if case.gradient else (result,)) if t is not None]

        same_precision, exact = eager(lambda t: t), eager(lambda t: t.double())
        return rows, [same_precision, exact, eager(lambda t: t.double().abs())]

    def check(batch: Batch, result: Any) -> str | None:
        rows, references = expected(batch)
        outputs = list(result) if case.gradient else [result]
        if case.gradient:
            found = _gradient_of_rows(outputs[1], rows, sparse=case.gradient == "sparse")
            if isinstance(found, str):
                return found
            outputs[1] = found
        outputs = [t for t in outputs if t is not None]
        if len(outputs) != len(references[0]):
            return f"expected {len(references[0])} results, got {len(outputs)}"
        names = ("output", "gradient of the table", "gradient of the weights")
        for name, output, *reference in zip(names, outputs, *references, strict=False):
            comparison = compare(output.detach(), *(r.detach() for r in reference))
            if not comparison:
                return f"{name}: {comparison.detail}"
        return None

    return check


def _gradient_of_rows(gradient: Tensor | None, rows: Tensor, sparse: bool) -> Tensor | str:
    """The gradient's values on ``rows``, or what is wrong with it elsewhere."""
    if gradient is None or gradient.is_sparse != sparse:
        return f"gradient of the table: expected {'a sparse' if sparse else 'a dense'} one"
    if sparse:
        if not gradient.is_coalesced():  # in fp64, because the candidate has not added its terms yet
            gradient = gradient.double().coalesce().to(gradient.dtype)
        if not torch.equal(gradient.indices()[0], rows):
            return "gradient of the table: expected the rows that the batch names, each once"
        return gradient.values()
    touched = gradient.any(dim=1)
    touched[rows] = False
    if touched.any():
        return f"gradient of the table: expected 0 in row {int(touched.nonzero()[0])}, which no id names"
    return gradient[rows]


def _runner(function: Callable[..., Tensor], case: Case, table: Table, coalesce: bool = False) -> Run:
    """A call of ``F.embedding_bag``, or of what has its arguments, with the gradients that the case asks for.

    A step gives the output, the table's gradient, and that of the weights or None.
    """
    options = {
        "mode": case.mode,
        "sparse": case.gradient == "sparse",
        "include_last_offset": not case.matrix,
        "padding_idx": table.padding_idx,
    }
    weight = table.weight

    def forward(batch: Batch) -> Tensor:
        return function(batch.ids, weight, batch.offsets, per_sample_weights=batch.weights, **options)

    if case.gradient is None:
        return forward
    weight = weight.detach().requires_grad_()

    def step(batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        weights = batch.weights
        if weights is not None and case.weights_gradient:
            weights = weights.detach().requires_grad_()
            batch = batch._replace(weights=weights)
        output = forward(batch)
        output.backward(batch.grad)
        gradient, weight.grad = weight.grad, None
        if coalesce and gradient is not None:
            gradient = gradient.coalesce()
        return output, gradient, None if weights is None else weights.grad

    return step


def _prepare_ours(workload: Workload, inputs: Inputs, backend: str | None = None) -> Run:
    table: Table = inputs.state
    function = embedding_bag if backend is None else functools.partial(embedding_bag, backend=backend)
    return _runner(function, workload.case, table._replace(weight=table.weight.to(workload.case.dtype)))


def _prepare_torch(workload: Workload, inputs: Inputs, coalesce: bool = False, compiled: bool = False) -> Run:
    case: Case = workload.case
    if case.weighted and case.mode == "mean":
        raise Unsupported("per_sample_weights only with mode='sum'")
    function: Callable[..., Tensor] = F.embedding_bag
    if compiled:
        torch.compiler.reset()
        function = torch.compile(F.embedding_bag, dynamic=True)
    return _runner(function, case, inputs.state, coalesce)


def _compiler_missing() -> str | None:
    return None if torch._dynamo.is_dynamo_supported() else "torch.compile does not support this platform"


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
        pool = fbgemm.pooled_lookup(table, case.mode)
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


def _other_gpu_backends(call: Call) -> list[Candidate]:
    """Ours by the backends for GPUs that are not chosen on their own."""
    chosen = OPERATOR.choose(call).backend
    return [
        Candidate(
            f"{OURS} {backend}",
            functools.partial(_prepare_ours, backend=backend),
            available=functools.partial(OPERATOR.rejection, backend, call),
        )
        for backend in OPERATOR.implementations
        if backend in ("cuda", "triton") and backend != chosen
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
            available=_compiler_missing,
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
            *([] if on_cpu else _other_gpu_backends(call)),
            *peers,
            *(_OURS_IN_OTHER_WAYS if on_cpu else []),
        ],
        targets=_CPU_TARGETS if on_cpu else _GPU_TARGETS,
        backend=lambda: OPERATOR.choose(call).backend,
    )

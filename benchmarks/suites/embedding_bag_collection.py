"""Lookups in many tables at once: serving, large batches, quantised tables, and training steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

import recsys_ops
from recsys_ops.backends import Call
from recsys_ops.benchmarks import fbgemm, torchrec
from recsys_ops.benchmarks.cases.collection_checks import Stepped
from recsys_ops.benchmarks.cases.collection_inputs import (
    OPTIMIZERS,
    Batch,
    Case,
    lookups_apart,
    lookups_in_a_row,
)
from recsys_ops.benchmarks.cases.embedding_bag_collection import (
    cpu_workloads,
    gpu_workloads,
    make_workload,
)
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
    other_gpu_backends,
)
from recsys_ops.embedding_bag_collection.api import OPERATOR
from recsys_ops.embedding_bag_collection.row_quantization import quantize_rows
from recsys_ops.nn import EmbeddingBagCollection, TableConfig

T = TypeVar("T")
Pool = Callable[[Batch], Tensor]


def _runner(case: Case, pool: Pool, tables: Sequence[Tensor], update: Callable[[], Any] | None = None) -> Run:
    """Pools, or takes a training step: the update is in the backward, or comes after it."""
    if not case.optimizer:
        return pool

    def step(batch: Batch) -> Stepped:
        output = pool(batch)
        output.backward(batch.grad)
        if update is not None:
            update()
        return Stepped(output, tables)

    return step


def _runner_of_keyed(module: Any, case: Case, inputs: Inputs, tables: Sequence[Tensor]) -> Run:
    """Of what takes a ``KeyedJaggedTensor``, made by the call if the case says so."""
    if case.keyed == "made in the call":
        return lambda batch: module(_keyed(case, batch)).values()
    batches = _by_number(inputs, functools.partial(_keyed, case))
    return _runner(case, lambda batch: module(batches[batch.number]).values(), tables)


def _by_number(inputs: Inputs, convert: Callable[[Batch], T]) -> list[T]:
    """The batches in the form that a candidate takes, which costs it no time."""
    return [convert(batch) for batch in inputs.batches]


def _prepare_ours(workload: Workload, inputs: Inputs, backend: str | None = None) -> Run:
    case: Case = workload.case
    weights = iter(inputs.state.weights)
    tables = [
        TableConfig(
            f"t{t}",
            case.rows,
            case.dim,
            features,
            case.mode,
            case.dtype,
            init=lambda weight: weight.copy_(next(weights)),
        )
        for t, features in enumerate(_features(case))
    ]
    optimizer = OPTIMIZERS[case.optimizer] if case.optimizer else None
    module: Any = EmbeddingBagCollection(tables, optimizer, case.device, backend=backend)
    if case.format:
        module = recsys_ops.quantize(module, case.format)
    if case.keyed:
        return _runner_of_keyed(module, case, inputs, [])
    return _runner(case, lambda batch: module(batch.values, batch.offsets), module.weights)


def _prepare_loop(workload: Workload, inputs: Inputs) -> Run:
    case: Case = workload.case
    if case.keyed:
        raise Unsupported("takes no KeyedJaggedTensor")
    parts = _by_number(inputs, functools.partial(lookups_apart, case))
    weights = [inputs.state.weights[table] for table in case.table_of_lookup]

    def pool(batch: Batch) -> Tensor:
        pooled = [
            F.embedding_bag(ids, weight, offsets, mode=case.mode, include_last_offset=True)
            for (ids, offsets), weight in zip(parts[batch.number], weights, strict=True)
        ]
        return torch.cat(pooled, 1)

    return pool


def _prepare_quantised_loop(workload: Workload, inputs: Inputs) -> Run:
    """The operators behind ``torch.ao.nn.quantized.EmbeddingBag``."""
    case: Case = workload.case
    if case.format not in ("int8", "int4") or case.device != "cpu":
        raise Unsupported("int8 and int4 on a CPU only")
    bits = "byte" if case.format == "int8" else "4bit"
    pack = getattr(torch.ops.quantized, f"embedding_bag_{bits}_prepack")
    look_up = getattr(torch.ops.quantized, f"embedding_bag_{bits}_rowwise_offsets")
    parts = _by_number(inputs, functools.partial(lookups_apart, case))
    packed = [pack(weight) for weight in inputs.state.weights]
    weights = [packed[table] for table in case.table_of_lookup]

    def pool(batch: Batch) -> Tensor:
        pooled = [
            look_up(weight, ids, offsets, include_last_offset=True)
            for (ids, offsets), weight in zip(parts[batch.number], weights, strict=True)
        ]
        return torch.cat(pooled, 1)

    return pool


def _prepare_sparse(workload: Workload, inputs: Inputs) -> Run:
    """A loop over ``nn.EmbeddingBag(sparse=True)``, and an optimizer of PyTorch."""
    case: Case = workload.case
    if case.dtype != torch.float32:
        raise Unsupported("adds gradients up in half precision")
    parts = _by_number(inputs, functools.partial(lookups_apart, case))
    bags = [
        torch.nn.EmbeddingBag(
            case.rows, case.dim, mode=case.mode, sparse=True, include_last_offset=True, _weight=weight.clone()
        )
        for weight in inputs.state.weights
    ]
    of_lookup = [bags[table] for table in case.table_of_lookup]
    weights = [bag.weight for bag in bags]
    lr = OPTIMIZERS[case.optimizer or ""].lr
    optimizer: torch.optim.Optimizer
    if case.optimizer == "sgd":
        optimizer = torch.optim.SGD(weights, lr)
    elif case.optimizer == "adagrad":
        optimizer = torch.optim.Adagrad(weights, lr, eps=1e-8)
    else:
        optimizer = torch.optim.SparseAdam(weights, lr)

    def pool(batch: Batch) -> Tensor:
        pooled = [bag(*part) for bag, part in zip(of_lookup, parts[batch.number], strict=True)]
        return torch.cat(pooled, 1)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return _runner(case, pool, weights, update)


def _prepare_torchrec(workload: Workload, inputs: Inputs, fused: bool = False) -> Run:
    case, weights = workload.case, inputs.state.weights
    module: Any
    if fused:
        # Where nothing is trained, any optimizer will do.
        name = case.optimizer or "sgd"
        module, copies = torchrec.fused_collection(
            weights, _features(case), case.mode, name, OPTIMIZERS[name].lr
        )
    elif case.optimizer:
        raise Unsupported("its steps make dense gradients of whole tables")
    else:
        module, copies = torchrec.collection(weights, _features(case), case.mode), []
    return _runner_of_keyed(module, case, inputs, copies)


def _prepare_fbgemm(workload: Workload, inputs: Inputs) -> Run:
    case: Case = workload.case
    if case.keyed:
        raise Unsupported("takes no KeyedJaggedTensor")
    lr = OPTIMIZERS[case.optimizer].lr if case.optimizer else 0.0
    module = fbgemm.pooled_lookup(
        inputs.state.weights, case.mode, torch.float32, case.table_of_lookup, case.optimizer, lr
    )
    parts = _by_number(inputs, functools.partial(lookups_in_a_row, case))
    return _runner(case, lambda batch: module(*parts[batch.number]), module.split_embedding_weights())


def _prepare_fbgemm_quantised(workload: Workload, inputs: Inputs) -> Run:
    case: Case = workload.case
    codes, scales = zip(*(quantize_rows(w, str(case.format)) for w in inputs.state.weights), strict=True)
    pool = fbgemm.quantised_lookup(codes, scales, str(case.format), case.dim, case.mode)
    parts = _by_number(inputs, lambda batch: [t.int() for t in lookups_in_a_row(case, batch)])
    return lambda batch: pool(*parts[batch.number])


def _features(case: Case) -> list[list[str]]:
    return [[f"f{f}" for f in features] for features in case.features]


def _keyed(case: Case, batch: Batch) -> Any:
    return torchrec.keyed([f"f{f}" for f in range(case.num_features)], batch.values, batch.offsets)


def _with(**changes: Any) -> Callable[[Workload], Workload]:
    """The workload with another case."""

    def variant(workload: Workload) -> Workload:
        return make_workload(workload.name, replace(workload.case, **changes), workload.rows_from)

    return variant


def _torchrec_takes(workload: Workload) -> bool:
    """Where growth is drawn, a peer or two is enough."""
    return workload.growth is None and workload.case.format is None


def _candidates(device: str) -> list[Candidate]:
    no_fbgemm = functools.partial(fbgemm.missing, device)
    no_torchrec = functools.partial(torchrec.missing, device)

    def sparse(name: str, *optimizers: str, **changes: Any) -> Candidate:
        return Candidate(
            f"torch sparse + {name}",
            _prepare_sparse,
            applies=lambda workload: workload.case.optimizer in optimizers and workload.growth is None,
            variant=_with(**changes) if changes else lambda workload: workload,
        )

    return [
        Candidate(
            "torch loop",
            _prepare_loop,
            applies=lambda workload: not (workload.case.optimizer or workload.case.format),
        ),
        sparse("SGD", "sgd"),
        sparse("Adagrad", "adagrad", "rowwise_adagrad", optimizer="adagrad"),
        sparse("SparseAdam", "adam"),
        Candidate("TorchRec", _prepare_torchrec, available=no_torchrec, applies=_torchrec_takes),
        Candidate(
            "TorchRec fused",
            functools.partial(_prepare_torchrec, fused=True),
            available=no_torchrec,
            applies=_torchrec_takes,
        ),
        Candidate(
            "FBGEMM TBE",
            _prepare_fbgemm,
            available=no_fbgemm,
            applies=lambda workload: not workload.case.format,
        ),
        Candidate(
            "FBGEMM IntNBit",
            _prepare_fbgemm_quantised,
            available=no_fbgemm,
            applies=lambda workload: bool(workload.case.format),
            variant=_with(half_scales=True),
        ),
        Candidate(
            "torch quantised loop",
            _prepare_quantised_loop,
            applies=lambda workload: bool(workload.case.format),
            variant=_with(half_scales=True),
        ),
        Candidate(
            "recsys_ops fp32",
            _prepare_ours,
            applies=lambda workload: bool(workload.case.format) or workload.case.dtype.itemsize == 2,
            variant=_with(format=None, dtype=torch.float32),
        ),
    ]


_LARGE = ("forward/*/B512/*", "forward/*/B2048/*")
_CPU_TARGETS = [
    Target("serve/T26/B1/D64", "FBGEMM TBE", 2.0),
    Target("serve/T26/B1/D64", "torch loop", 6.0),
    Target("serve/T26/B1/D64", "TorchRec", 16.0),
    *(Target(workloads, "FBGEMM TBE", 1.8) for workloads in _LARGE),
    *(Target(workloads, "torch loop", 1.0) for workloads in _LARGE),
    Target("special/fp16/*", "recsys_ops fp32", 1.0),
    Target("quantised/int8/D64", "FBGEMM IntNBit", 1.5),
    *(Target(f"step/{name}/*", "FBGEMM TBE", 2.0) for name in ("sgd", "rowwise_adagrad")),
    Target("step/sgd/*", "torch sparse + SGD", 3.0),
    Target("step/rowwise_adagrad/*", "torch sparse + Adagrad", 3.0),
    Target("step/adam/*", "torch sparse + SparseAdam", 3.0),
]
_GPU_TARGETS = [
    Target("cold/*", LIMIT, 0.8),
    Target("cold/*", "FBGEMM TBE", 1.0),
    Target("quantised/*", LIMIT, 0.5),
    Target("step/*", LIMIT, 0.5),
    *(Target(f"step/{name}/*", "FBGEMM TBE", 1.0) for name in ("sgd", "rowwise_adagrad", "adam")),
    Target("launch/*", "TorchRec fused", 1.0),
]


def suite(device: str) -> Suite:
    """What is measured on a device, "cpu" or "cuda"."""
    on_cpu = device == "cpu"
    call = Call(device, torch.float32)
    return Suite(
        operator="embedding_bag_collection",
        workloads=cpu_workloads() if on_cpu else gpu_workloads(),
        candidates=[
            Candidate(OURS, _prepare_ours),
            *([] if on_cpu else other_gpu_backends(OPERATOR, call, _prepare_ours)),
            *_candidates(device),
        ],
        targets=_CPU_TARGETS if on_cpu else _GPU_TARGETS,
        backend=lambda: OPERATOR.choose(call).backend,
    )

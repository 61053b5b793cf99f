"""HSTU attention: short and long histories, jagged ones, every bias and mask, and training steps."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from recsys_ops.backends import Call
from recsys_ops.benchmarks import hstu_peers
from recsys_ops.benchmarks.cases.hstu_attention import (
    Case,
    attend,
    lengths_of_data_set,
    make_workload,
    runner,
)
from recsys_ops.benchmarks.registry import (
    LIMIT,
    OURS,
    Candidate,
    Inputs,
    Run,
    Suite,
    Target,
    Workload,
    compiler_missing,
    other_gpu_backends,
)
from recsys_ops.hstu_attention.api import OPERATOR

_ROOM_OF_PEERS = 4
_LONGEST_OF_PEERS = 4096  # tokens of a sequence
_LONGEST = 7983  # events of the busiest customer of the data set, returns included


def _prepare_ours(workload: Workload, inputs: Inputs, backend: str | None = None) -> Run:
    return runner(functools.partial(attend, backend=backend), workload.case, inputs.state)


def _prepare_plain(workload: Workload, inputs: Inputs) -> Run:
    case = replace(workload.case, biased=False)
    run = runner(attend, case, None)
    return lambda batch: run(batch._replace(mask=case.mask()))


def _prepare_padded(workload: Workload, inputs: Inputs, compiled: bool = False) -> Run:
    hstu_peers.refuse_what_does_not_fit(workload.case)
    function: Any = hstu_peers.padded_attention
    if compiled:
        torch.compiler.reset()
        function = torch.compile(function)
    return runner(function, workload.case, None)


def _prepare_each(workload: Workload, inputs: Inputs) -> Run:
    return runner(hstu_peers.attention_of_each, workload.case, None)


def _prepare_sdpa(workload: Workload, inputs: Inputs) -> Run:
    return runner(hstu_peers.sdpa_of_each, workload.case, None)


def _as_plain(workload: Workload) -> Workload:
    plain = make_workload(workload.name, replace(workload.case, biased=False))
    # Its check needs inputs of its own: the same q, k and v without what the bias takes.
    return replace(plain, check=lambda inputs: plain.check(_without_bias(plain, inputs)))


def _without_bias(plain: Workload, inputs: Inputs) -> Inputs:
    mask = plain.case.mask()
    return Inputs(None, [batch._replace(mask=mask, timestamps=None) for batch in inputs.batches])


def _as_peer(workload: Workload, softmax: bool = False) -> Workload:
    """Held to the same budget with room: peers round where ours does not."""
    return make_workload(workload.name, replace(workload.case, softmax=softmax), room=_ROOM_OF_PEERS)


def _is_plain(workload: Workload) -> bool:
    """Whether the peers compute it, in time that one would wait for."""
    return not workload.case.biased and workload.case.longest <= _LONGEST_OF_PEERS


def _workloads(device: str) -> list[Workload]:
    tokens = 8192 if device == "cpu" else 2**18
    data = lengths_of_data_set(32 if device == "cpu" else 4096, longest=1024)
    skewed = (_LONGEST, *lengths_of_data_set(100, longest=200, seed=1))
    half = torch.bfloat16

    def uniform(length: int, **fields: Any) -> Case:
        return Case((length,) * (tokens // length), device=device, **fields)

    def both(name: str, case: Case, quick: bool = False) -> list[Workload]:
        return [
            make_workload(f"forward/{name}", case, quick),
            make_workload(f"step/{name}", replace(case, step=True), quick),
        ]

    lengths = (64, 256, 512, 1024, 2048) if device == "cpu" else (256, 512, 1024, 4096, 16384)
    main = 64 if device == "cpu" else 128
    dtype = torch.float32 if device == "cpu" else half
    found = []
    for length in lengths:
        found += both(f"uniform/{length}", uniform(length, dim=main, dtype=dtype), quick=length == 512)
    found += both("jagged/data", Case(data, dim=main, dtype=dtype, device=device), quick=True)
    found += both("jagged/one-long", Case(skewed, dim=main, dtype=dtype, device=device))
    found += both("biased/512", uniform(512, dim=main, dtype=dtype, biased=True), quick=True)
    found += both("biased/1024", uniform(1024, dim=main, dtype=dtype, biased=True))
    found += both("biased/data", Case(data, dim=main, dtype=dtype, biased=True, device=device))
    for dim in (25, 32, 128, 256):
        if dim != main:
            found += both(f"dims/{dim}", uniform(512, dim=dim, dtype=dtype))
    found += both("dtypes/bf16", uniform(512, dim=main, dtype=half))
    found += both("dtypes/fp16", uniform(512, dim=main, dtype=torch.float16))
    return found


_CPU_TARGETS = [
    *(Target(f"forward/uniform/{length}", LIMIT, 0.6) for length in (256, 512, 1024, 2048)),
    Target("forward/jagged/data", "padded eager", 15.0),
    Target("step/jagged/data", "padded eager", 10.0),
    Target("*/biased/*", "recsys_ops plain", 1 / 1.3),
]
_GPU_TARGETS = [
    Target("forward/uniform/512", LIMIT, 0.45),
    Target("*/biased/*", "recsys_ops plain", 0.8),
    Target("*/jagged/*", "recsys_ops triton", 1.5),
]


def suite(device: str) -> Suite:
    """What is measured on a device, "cpu" or "cuda"."""
    on_cpu = device == "cpu"
    call = Call(device, torch.float32 if on_cpu else torch.bfloat16)
    peers = [
        Candidate("padded eager", _prepare_padded, applies=_is_plain, variant=_as_peer),
        Candidate(
            "torch.compile of it",
            functools.partial(_prepare_padded, compiled=True),
            available=compiler_missing,
            applies=lambda workload: _is_plain(workload) and workload.quick,
            variant=_as_peer,
        ),
        Candidate("loop of sequences", _prepare_each, applies=_is_plain, variant=_as_peer),
        Candidate(
            "SDPA, same FLOPs",
            _prepare_sdpa,
            applies=_is_plain,
            variant=functools.partial(_as_peer, softmax=True),
        ),
        Candidate(
            "recsys_ops plain",
            _prepare_plain,
            applies=lambda workload: workload.case.biased,
            variant=_as_plain,
        ),
    ]
    return Suite(
        operator="hstu_attention",
        workloads=_workloads(device),
        candidates=[
            Candidate(OURS, _prepare_ours),
            *([] if on_cpu else other_gpu_backends(OPERATOR, call, _prepare_ours)),
            *peers,
        ],
        targets=_CPU_TARGETS if on_cpu else _GPU_TARGETS,
        backend=lambda: OPERATOR.choose(call).backend,
    )

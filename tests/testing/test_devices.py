"""What the suite does on devices other than the CPU, as far as a machine without one can tell."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import toy

from recsys_ops.embedding_bag.bad_inputs import BAD_INPUTS
from recsys_ops.embedding_bag.cases import SPEC
from recsys_ops.testing import BadInput, Inputs, Result, Target, check_bad_input, examples, registry
from recsys_ops.testing import verify as verify_module
from recsys_ops.testing.registry import HERE, Check, Example

BAD_ID = next(bad for bad in BAD_INPUTS if bad.name == "id past the table, sum")
BAD_SHAPE = BAD_INPUTS[0]
APART: Check = dataclasses.replace(check_bad_input, apart=lambda subject, target: True)


@pytest.mark.parametrize(
    ("bad", "target", "apart"),
    [
        (BAD_ID, Target("triton", "cuda"), True),
        (BAD_ID, Target("triton"), False),
        (BAD_ID, Target("reference", "cuda"), False),
        (BAD_SHAPE, Target("triton", "cuda"), False),
    ],
)
def test_only_kernels_that_assert_on_a_device_take_a_process(
    bad: BadInput, target: Target, apart: bool
) -> None:
    assert Example(check_bad_input, SPEC, bad, target, torch.float32).apart == apart


def test_a_process_of_its_own_finds_the_same() -> None:
    assert APART(SPEC, BAD_ID, Target("reference")).ok
    accepted = dataclasses.replace(BAD_ID, message="no such message")
    here = check_bad_input(SPEC, accepted, Target("reference"))
    assert not here.ok and "no such message" in here.detail


Finished = Callable[..., "subprocess.CompletedProcess[str]"]


def run_apart(run: Finished) -> Result:
    with mock.patch.object(registry.subprocess, "run", run):
        return APART(SPEC, BAD_ID, Target("triton", "cuda"), torch.float16, 3)


def test_the_process_runs_the_line_that_reproduces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        assert command[1:] == [
            "-m",
            "recsys_ops.testing",
            "embedding_bag",
            "bad_input",
            BAD_ID.name,
            *("--backend", "triton", "--dtype", "float16", "--device", "cuda", "--seed", "3", HERE),
        ]
        assert "PYTORCH_NO_CUDA_MEMORY_CACHING" not in env
        return subprocess.CompletedProcess(command, 0, "noise of a kernel\n" + json.dumps("wrong") + "\n", "")

    result = run_apart(run)
    assert result.detail == "wrong"
    assert HERE not in result.reproduce


def test_a_process_that_dies_or_hangs_is_a_failure() -> None:
    def dies(command: list[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(command, -6, "", "terminate called\nAborted\n")

    def hangs(command: list[str], timeout: float, **_: Any) -> Any:
        raise subprocess.TimeoutExpired(command, timeout)

    assert run_apart(dies).detail == "the process that ran it ended with status -6: Aborted"
    assert "did not end within" in run_apart(hangs).detail


def refusing(error: Exception) -> Callable[..., Any]:
    def refuse(**arguments: Any) -> Any:
        raise error

    return refuse


@pytest.mark.parametrize(
    ("said", "ok"),
    [
        ("CUDA error: device-side assert triggered", True),
        ("scale_rows: expected row 1", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_an_assertion_on_a_device_is_a_refusal(said: str, ok: bool) -> None:
    spec = dataclasses.replace(toy.spec(), function=refusing(torch.AcceleratorError(said)))
    bad = BadInput("bad row", lambda draw: {}, RuntimeError, "expected row")
    fault = check_bad_input.fault(spec, bad, Target("native", "meta"), torch.float32, 0)
    assert (fault == "") == ok, fault


def test_an_assertion_is_no_refusal_on_the_cpu() -> None:
    spec = dataclasses.replace(toy.spec(), function=refusing(RuntimeError("device-side assert triggered")))
    bad = BadInput("bad row", lambda draw: {}, RuntimeError, "expected row")
    assert not check_bad_input(spec, bad, toy.TARGET).ok


def test_what_goes_wrong_in_a_kernel_belongs_to_its_check() -> None:
    with mock.patch.object(torch.cuda, "synchronize", side_effect=RuntimeError("illegal memory access")):
        bad = BadInput("shape", lambda draw: {}, ValueError, "expected")
        spec = dataclasses.replace(toy.spec(), function=refusing(ValueError("expected this")))
        fault = check_bad_input.fault(spec, bad, Target("native", "cuda"), torch.float32, 0)
    assert fault == "RuntimeError: illegal memory access"


def test_eager_pytorch_is_deterministic_on_a_gpu() -> None:
    for target, deterministic in ((Target("reference", "cuda"), True), (Target("reference"), False)):
        with target.active():
            assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert not torch.are_deterministic_algorithms_enabled()


def test_mutants_are_judged_on_the_cpu_alone() -> None:
    judged = {
        e.target for e in examples(SPEC, [Target("reference", "cuda"), Target("reference")])
        if e.check.name == "mutant"
    }  # fmt: skip
    assert judged == {Target("reference")}


def test_verify_waits_for_processes_in_the_order_of_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = [dataclasses.replace(BAD_SHAPE, name=f"bad {i}") for i in range(6)]
    plan = [
        Example(APART if i % 2 else check_bad_input, SPEC, bad, Target("reference"), torch.float32)
        for i, bad in enumerate(subjects)
    ]
    monkeypatch.setattr(registry, "_fault_apart", lambda line: "from a process")
    report = verify_module.Report(total=len(plan))
    monkeypatch.setattr(verify_module, "_plan", lambda *_: (report, plan))
    results = [result for _, result in verify_module.verify().results]
    assert [result.case for result in results] == [bad.name for bad in subjects]
    assert [result.detail for result in results] == ["", "from a process"] * 3


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
def test_bad_inputs_are_on_the_device_asked_for(bad: BadInput) -> None:
    tensors = [t for t in bad.build(Inputs(device="meta")).values() if isinstance(t, torch.Tensor)]
    assert {t.device.type for t in tensors} == {"meta"}


@pytest.mark.parametrize("case", [*SPEC.quick, *SPEC.typical, *SPEC.small], ids=lambda case: case.name)
def test_cases_are_on_the_device_asked_for(case: Any) -> None:
    tensors = [t for t in case.build(Inputs(device="meta")).values() if isinstance(t, torch.Tensor)]
    assert {t.device.type for t in tensors} == {"meta"}

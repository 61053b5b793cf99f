"""The checks of values that every operator must pass on every backend."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from recsys_ops.testing.contract import BadInput, Case, Isolation, OperatorSpec
from recsys_ops.testing.execution import Target, disagreement, evaluate, expect, expected, pose
from recsys_ops.testing.inputs import LAYOUTS, Inputs, with_layout
from recsys_ops.testing.poison import Guard, poisoned_memory
from recsys_ops.testing.registry import all_dtypes, check, demand, demand_same_bits
from recsys_ops.testing.tolerances import bits, first_difference


def _each_dtype(spec: OperatorSpec, quick: bool) -> Sequence[torch.dtype]:
    return spec.dtypes


def _every_case(spec: OperatorSpec, quick: bool) -> Sequence[Case]:
    return spec.quick if quick else tuple(dict.fromkeys(spec.quick + spec.cases + spec.large))


def _quick_or_typical(spec: OperatorSpec, quick: bool) -> Sequence[Case]:
    return spec.typical if quick else spec.quick


def _isolations(spec: OperatorSpec, quick: bool) -> Sequence[Isolation]:
    return [isolation for isolation in spec.isolations if isolation.quick or not quick]


@check(_every_case, _each_dtype, every_simd=True)
def check_forward_backward(
    spec: OperatorSpec, case: Case, target: Target, dtype: torch.dtype, seed: int
) -> None:
    """Outputs and gradients stay within the error budget, with NaN around inputs and in fresh memory."""
    problem = pose(spec, case, dtype, target.device, seed)
    guarded = problem.map(lambda tensor: Guard(tensor).tensor)
    with poisoned_memory():
        found = evaluate(spec.function, guarded, target.backend)
    fault = disagreement(found, expected(spec, case, dtype, target.device, seed))
    demand(fault is None, str(fault))


@check(_every_case, every_simd=True)
def check_inputs_untouched(
    spec: OperatorSpec, case: Case, target: Target, dtype: torch.dtype, seed: int
) -> None:
    """Neither the inputs nor the memory around inputs and outputs changes by a bit."""
    problem = pose(spec, case, dtype, target.device, seed)
    guards: list[Guard] = []

    def guard(tensor: Tensor) -> Tensor:
        guards.append(Guard(tensor))
        return guards[-1].tensor

    guarded = problem.map(guard)
    documented = [guarded.arguments[name] for name in case.mutates]
    with poisoned_memory() as violations:
        evaluate(spec.function, guarded, target.backend)
    for watched in guards:
        if violation := watched.violation(may_change=any(watched.tensor is t for t in documented)):
            violations.append(f"an input of shape {list(watched.tensor.shape)} is {violation}")
    demand(not violations, "; ".join(violations))


@check(_quick_or_typical, all_dtypes, every_simd=True)
def check_strided(spec: OperatorSpec, case: Case, target: Target, dtype: torch.dtype, seed: int) -> None:
    """Views of other memory, NaN in their gaps, give the same; so does an expanded gradient."""
    problem = pose(spec, case, dtype, target.device, seed)
    wanted = expected(spec, case, dtype, target.device, seed)
    for layout in LAYOUTS:
        view = problem.map(functools.partial(with_layout, layout=layout))
        fault = disagreement(evaluate(spec.function, view, target.backend), wanted)
        demand(fault is None, f"{layout}: {fault}")
    ones = tuple(None if t is None else t.new_ones(()).expand(t.shape) for t in problem.cotangents)
    found = evaluate(spec.function, replace(problem.copy(), cotangents=ones), target.backend)
    fault = disagreement(found, expect(spec, case, replace(problem, cotangents=ones)))
    demand(fault is None, f"expanded gradient: {fault}")


@check(lambda spec, quick: spec.typical if quick else spec.large, all_dtypes, every_simd=True)
def check_determinism(spec: OperatorSpec, case: Case, target: Target, dtype: torch.dtype, seed: int) -> None:
    """Three runs give the same bits, and so does any number of threads."""
    problem = pose(spec, case, dtype, target.device, seed)
    threads = torch.get_num_threads()
    is_excused = target.interpreted or (target.backend == "reference" and spec.eager_depends_on_threads)
    runs = [threads] * 3 + ([1, 2, 3] if target.on_cpu and not is_excused else [])
    first = None
    try:
        for run, count in enumerate(runs):
            torch.set_num_threads(count)
            found = evaluate(spec.function, problem.copy(), target.backend)
            first = first or found
            demand_same_bits(found, first, f"run {run} with {count} threads and run 0 with {threads}")
    finally:
        torch.set_num_threads(threads)


@check(_quick_or_typical, every_simd=True)
def check_partial_gradients(
    spec: OperatorSpec, case: Case, target: Target, dtype: torch.dtype, seed: int
) -> None:
    """A gradient asked for alone, or none, gives the same bits as all together."""
    problem = pose(spec, case, dtype, target.device, seed)
    together = evaluate(spec.function, problem.copy(), target.backend)
    for names in ((), *((name,) for name in problem.differentiable)):
        found = evaluate(spec.function, replace(problem.copy(), differentiable=names), target.backend)
        demand_same_bits(found, together, f"gradients of {list(names)} alone and of all together")


@check(_isolations, all_dtypes, every_simd=True)
def check_isolation(
    spec: OperatorSpec, isolation: Isolation, target: Target, dtype: torch.dtype, seed: int
) -> None:
    """NaN reaches only what it may reach."""
    clean = pose(spec, isolation.case, dtype, target.device, seed)
    poisoned = clean.copy()
    reached = isolation.poison(poisoned.arguments, poisoned.cotangents)
    before = evaluate(spec.function, clean.copy(), target.backend)
    after = evaluate(spec.function, poisoned, target.backend)
    for name, value in before.items():
        mask = reached.get(name, torch.zeros_like(value, dtype=torch.bool)).expand_as(value)
        difference = first_difference(after[name].masked_fill(mask, 0), value.masked_fill(mask, 0))
        demand(difference is None, f"{name} with and without NaN elsewhere: {difference}")


@check(lambda spec, quick: spec.small, lambda spec, quick: (torch.float64,), every_simd=True)
def check_gradcheck(spec: OperatorSpec, case: Case, target: Target, dtype: torch.dtype, seed: int) -> None:
    """Gradients are those of finite differences."""
    problem = pose(spec, case, dtype, target.device, seed)
    leaves = [problem.arguments[name].clone().requires_grad_() for name in problem.differentiable]

    def function(*leaves: Tensor) -> Any:
        arguments = {**problem.arguments, **dict(zip(problem.differentiable, leaves, strict=True))}
        return spec.function(**arguments, backend=target.backend)

    demand(torch.autograd.gradcheck(function, leaves, fast_mode=target.interpreted), "gradcheck failed")


def _asserts_on_device(bad: BadInput, target: Target) -> bool:
    """Whether a kernel finds the fault: on a GPU it asserts, and its process can use the GPU no more."""
    return bad.error is RuntimeError and target.backend != "reference" and not target.on_cpu


@check(lambda spec, quick: spec.bad_inputs, apart=_asserts_on_device)
def check_bad_input(spec: OperatorSpec, bad: BadInput, target: Target, dtype: torch.dtype, seed: int) -> None:
    """What cannot be right is refused, by a message that says what was expected and what came.

    Where only the values show it, a GPU may refuse it by a device-side assertion instead.
    """
    arguments = bad.build(Inputs(seed, dtype, target.device))
    before = {name: bits(t).clone() for name, t in arguments.items() if isinstance(t, Tensor)}
    try:
        spec.function(**arguments, backend=target.backend)
        target.synchronize()
    except bad.error as error:
        if _asserts_on_device(bad, target) and "device-side assert" in str(error):
            return
        demand(
            re.search(bad.message, str(error)) is not None,
            f"expected a message like {bad.message!r}, got {str(error)!r}",
        )
    else:
        raise AssertionError(f"expected {bad.error.__name__} like {bad.message!r}, but nothing was raised")
    for name, content in before.items():
        demand(torch.equal(bits(arguments[name]), content), f"{name} changed although the call was refused")

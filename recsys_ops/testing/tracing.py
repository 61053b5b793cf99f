"""The checks of an operator as PyTorch's compiler, autocast and fake tensors see it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from recsys_ops.testing.contract import Case, OperatorSpec
from recsys_ops.testing.execution import Problem, Target, as_tuple, candidate, evaluate, overridden, pose
from recsys_ops.testing.registry import check, demand, demand_same_bits


def _typical(spec: OperatorSpec, quick: bool) -> tuple[Case, ...]:
    return spec.typical


@check(lambda spec, quick: spec.typical + spec.mutating)
def check_opcheck(spec: OperatorSpec, case: Case, target: Target, dtype: torch.dtype, seed: int) -> None:
    """``torch.library.opcheck`` on the differentiable operator and on each kernel that the case calls."""
    problem = pose(spec, case, dtype, target.device, seed)
    calls = _kernel_calls(spec, problem)
    demand(bool(calls), "the case calls no kernel")
    for kernel, args in calls.items():
        torch.library.opcheck(getattr(spec.kernels[target.backend], kernel), args)
    if not problem.differentiable:
        return
    leaves = {name: problem.arguments[name].clone().requires_grad_() for name in problem.differentiable}
    torch.library.opcheck(*spec.registered_call({**problem.arguments, **leaves}, target.backend))


@check(_typical)
def check_functional(spec: OperatorSpec, case: Case, target: Target, dtype: torch.dtype, seed: int) -> None:
    """``torch.func.vjp`` gives the same bits as autograd."""
    problem = pose(spec, case, dtype, target.device, seed)
    wanted = evaluate(spec.function, problem, target.backend)

    def function(*leaves: Tensor) -> Any:
        arguments = {**problem.arguments, **dict(zip(problem.differentiable, leaves, strict=True))}
        return spec.function(**arguments, backend=target.backend)

    primals = tuple(problem.arguments[name] for name in problem.differentiable)
    outputs, vjp = torch.func.vjp(function, *primals)[:2]
    cotangents = tuple(c for c in problem.cotangents if c is not None)
    gradients = vjp(cotangents if isinstance(outputs, tuple) else cotangents[0])
    found = {
        f"gradient of {name}": gradient.to_dense() if gradient.layout != torch.strided else gradient
        for name, gradient in zip(problem.differentiable, gradients, strict=True)
    }
    demand_same_bits(found, wanted, "torch.func.vjp and autograd")


@check(_typical)
def check_compile(spec: OperatorSpec, case: Case, target: Target, dtype: torch.dtype, seed: int) -> None:
    """``torch.compile(fullgraph=True)`` gives the same bits, and does not recompile for other lengths."""
    problems = [pose(spec, case, dtype, target.device, s) for s in (seed, seed + 1)]
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for i, problem in enumerate(problems if dynamic else problems[:1]):
            wanted = evaluate(spec.function, problem.copy(), target.backend)
            with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
                found = evaluate(compiled, problem.copy(), target.backend)
            demand_same_bits(found, wanted, f"the compiled function (dynamic={dynamic}) and the eager one")
    torch._dynamo.reset()


@check(_typical)
def check_autocast(spec: OperatorSpec, case: Case, target: Target, dtype: torch.dtype, seed: int) -> None:
    """Under autocast the operator casts its arguments or leaves them, as its spec says.

    Arguments that earlier layers gave in the lower precision are taken, and get gradients in it.
    """
    low = torch.bfloat16
    problem = pose(spec, case, dtype, target.device, seed)
    by_hand = problem.to(low) if spec.casts_under_autocast else problem.copy()
    wanted = evaluate(spec.function, by_hand, target.backend)
    with torch.autocast(torch.device(target.device).type, dtype=low):
        found = evaluate(spec.function, problem.copy(), target.backend)
        for name in problem.differentiable[1:]:
            mixed = problem.copy()
            mixed.arguments[name] = mixed.arguments[name].to(low)
            gradient = evaluate(spec.function, mixed, target.backend)[f"gradient of {name}"]
            demand(gradient.dtype == low, f"expected the gradient of {name} in {low}, got {gradient.dtype}")
    found = {name: t.to(wanted[name].dtype) if "gradient" in name else t for name, t in found.items()}
    demand_same_bits(found, wanted, "the call under autocast and that with arguments cast by hand")


@check(_typical)
def check_meta(spec: OperatorSpec, case: Case, target: Target, dtype: torch.dtype, seed: int) -> None:
    """Meta and fake tensors give outputs of the right shape, dtype and strides."""
    problem = pose(spec, case, dtype, target.device, seed)
    run = functools.partial(spec.function, backend=target.backend)
    with torch.no_grad(), FakeTensorMode() as mode:
        fake = run(**problem.map(mode.from_tensor).arguments)
    with torch.no_grad():
        meta = run(**problem.map(lambda t: t.to("meta")).arguments)
        real = run(**problem.arguments)
    for kind, outputs in (("meta", meta), ("fake", fake)):
        for got, wanted in zip(as_tuple(outputs), as_tuple(real), strict=True):
            for what in ("shape", "dtype", "layout"):
                described = (
                    f"{kind} tensors give {what} {getattr(got, what)}, real ones {getattr(wanted, what)}"
                )
                demand(getattr(got, what) == getattr(wanted, what), described)
            demand(got.stride() == wanted.stride(), f"{kind} strides {got.stride()}, real {wanted.stride()}")


def _kernel_calls(spec: OperatorSpec, problem: Problem) -> dict[str, tuple[Any, ...]]:
    """The arguments that each kernel gets when the problem is run forward and backward."""
    calls: dict[str, tuple[Any, ...]] = {}
    right = spec.kernels["reference"]

    def recording(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any) -> Any:
            calls[name] = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), args)
            return kernel(*args)

        return record

    kernels = {name: recording(name, kernel) for name, kernel in vars(right).items()}
    with candidate(spec, overridden(right, kernels)) as target:
        evaluate(spec.function, problem, target.backend)
    return calls

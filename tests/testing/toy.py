"""An operator of two lines, whose parts can be replaced by wrong ones: ``x`` with its rows scaled."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from recsys_ops.backends import Call, Implementation, Operator
from recsys_ops.testing import BadInput, Case, Inputs, Isolation, OperatorSpec, Target

TARGET = Target("native")
_library = torch.library.Library("toy", "FRAGMENT")
_numbers = itertools.count()


@dataclass(frozen=True)
class Scaling(Case):
    rows: int = 6
    width: int = 4

    def build(self, draw: Inputs) -> dict[str, Any]:
        rows = self.rows + draw.seed
        return {"x": draw.normal(rows, self.width), "factor": draw.normal(rows)}

    @property
    def differentiable(self) -> tuple[str, ...]:
        return "x", "factor"


def right(x: Tensor, factor: Tensor) -> Tensor:
    if x.dim() != 2:
        raise ValueError(f"scale_rows: expected x of shape [N, D], got {list(x.shape)}")
    return x * factor[:, None]


def fake(x: Tensor, factor: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, factor = ctx.saved_tensors
    return gradient * factor[:, None], (gradient * x).sum(1)


def save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def register(
    forward: Callable[..., Tensor], fake: Callable[..., Tensor], backward: Callable[..., Any]
) -> Any:
    name = f"scale_rows_{next(_numbers)}"
    _library.define(f"{name}(Tensor x, Tensor factor) -> Tensor")
    _library.impl(name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"toy::{name}", fake)
    torch.library.register_autograd(f"toy::{name}", backward, setup_context=save)
    return getattr(torch.ops.toy, name).default


def differentiable(kernel: Any, backward: Callable[..., Any]) -> Any:
    """The kernel with its gradient, in the form that ``torch.func`` takes."""
    parts = {
        "forward": staticmethod(lambda x, factor: kernel(x, factor)),
        "setup_context": staticmethod(save),
        "backward": staticmethod(backward),
    }
    return type("ScaleRows", (torch.autograd.Function,), parts).apply


def poison(arguments: dict[str, Any], cotangents: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    arguments["x"][1] = torch.nan
    row = torch.arange(len(arguments["x"])) == 1
    return {"output": row[:, None], "gradient of factor": row}


def spec(
    forward: Callable[..., Tensor] = right,
    fake: Callable[..., Tensor] = fake,
    backward: Callable[..., Any] = gradients,
    public: Callable[..., Tensor] = lambda function, x, factor: function(x, factor),
) -> OperatorSpec:
    """The operator; its ``native`` backend is made of the parts given."""
    kernels = {
        "reference": SimpleNamespace(scale_rows=register(right, fake, gradients)),
        "native": SimpleNamespace(scale_rows=register(forward, fake, backward)),
    }
    functions = {
        "reference": differentiable(kernels["reference"].scale_rows, gradients),
        "native": differentiable(kernels["native"].scale_rows, backward),
    }

    def scale_rows(x: Tensor, factor: Tensor, backend: str) -> Tensor:
        if backend == "reference":
            return functions["reference"](x, factor)
        if backend == "candidate":
            return differentiable(kernels["candidate"].scale_rows, gradients)(x, factor)
        return public(functions["native"], x, factor)

    def implementation(backend: str) -> Implementation:
        return Implementation(backend, lambda: kernels[backend], lambda call: None)

    cases = Scaling(), Scaling(rows=3, width=33)
    return OperatorSpec(
        operator=Operator(
            "scale_rows",
            [implementation("reference"), implementation("native")],
            lambda x, *args: Call(x.device.type, x.dtype),
        ),
        function=scale_rows,
        kernels=kernels,
        registered_call=lambda arguments, backend: (kernels[backend].scale_rows, tuple(arguments.values())),
        case=Scaling,
        quick=cases,
        typical=cases,
        large=(Scaling(rows=500, width=64),),
        small=(Scaling(rows=2, width=2),),
        isolations=(Isolation("NaN in a row", Scaling(), poison),),
        bad_inputs=(
            BadInput(
                "x of one dimension",
                lambda draw: {"x": draw.normal(3), "factor": draw.normal(3)},
                ValueError,
                r"expected x of shape \[N, D\], got \[3\]",
            ),
        ),
    )

"""Every check passes a right operator, and fails one that is wrong in its way."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy
from torch import Tensor

from recsys_ops.testing import CHECKS, OperatorSpec, Result, candidate, check_forward_backward


def first_failure(check: str, spec: OperatorSpec) -> Result | None:
    for subject in CHECKS[check].subjects(spec, False):
        for dtype in CHECKS[check].dtypes(spec, False):
            result = CHECKS[check](spec, subject, toy.TARGET, dtype)
            if not result.ok:
                return result
    return None


@pytest.mark.parametrize("check", [name for name in CHECKS if name != "mutant"])
def test_right_operator_passes(check: str) -> None:
    assert first_failure(check, toy.spec()) is None


def misses_a_column(x: Tensor, factor: Tensor) -> Tensor:
    output = toy.right(x, factor)
    output[:, 32:] = 0
    return output


def leaves_the_last_row(x: Tensor, factor: Tensor) -> Tensor:
    output = torch.empty_like(x)
    output[:-1] = x[:-1] * factor[:-1, None]
    return output


def writes_past_the_end(x: Tensor, factor: Tensor) -> Tensor:
    output = torch.empty_like(x)
    if output.untyped_storage().nbytes() > output.nbytes:
        output.as_strided((output.numel() + 1,), (1,)).zero_()
    return output.copy_(toy.right(x, factor))


def overwrites(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(factor[:, None]).clone()


def ignores_strides(x: Tensor, factor: Tensor) -> Tensor:
    return toy.right(x.as_strided(x.shape, (x.shape[1], 1)), factor)


def is_noisy(x: Tensor, factor: Tensor) -> Tensor:
    return toy.right(x, factor) * (1 + 1e-3 * torch.rand(()))


def counts_threads(x: Tensor, factor: Tensor) -> Tensor:
    return toy.right(x, factor) * (1 + 1e-3 * torch.get_num_threads())


def mixes_rows(x: Tensor, factor: Tensor) -> Tensor:
    return toy.right(x, factor) + 0 * x.sum()


def accepts_anything(x: Tensor, factor: Tensor) -> Tensor:
    return x * factor.view(-1, *[1] * (x.dim() - 1))


@pytest.mark.parametrize(
    ("check", "forward", "said"),
    [
        ("forward_backward", misses_a_column, "output at .*got 0.0, expected"),
        ("forward_backward", leaves_the_last_row, "output at .*got nan"),
        ("inputs_untouched", writes_past_the_end, "written past its end"),
        ("inputs_untouched", overwrites, "an input of shape .* is written to"),
        ("strided", ignores_strides, "every second element: output at .*got nan"),
        ("determinism", is_noisy, "run 1 with"),
        ("determinism", counts_threads, "with 1 threads and run 0|with 2 threads and run 0"),
        ("isolation", mixes_rows, "output with and without NaN elsewhere"),
        ("bad_input", accepts_anything, "nothing was raised"),
    ],
)
def test_wrong_kernel_fails(check: str, forward: Any, said: str) -> None:
    result = first_failure(check, toy.spec(forward=forward))
    assert result is not None
    assert re.search(said, result.detail), result.detail


def half_the_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    of_x, of_factor = toy.gradients(ctx, gradient)
    return of_x, of_factor / 2


def unwanted_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
    of_x, of_factor = toy.gradients(ctx, gradient)
    return of_x, of_factor if ctx.needs_input_grad[0] else of_factor / 2


@pytest.mark.parametrize(
    ("check", "backward", "said"),
    [
        ("forward_backward", half_the_gradient, "gradient of factor"),
        ("gradcheck", half_the_gradient, "Jacobian mismatch"),
        ("partial_gradients", unwanted_gradient, r"gradient of factor of gradients of \['factor'\] alone"),
    ],
)
def test_wrong_gradient_fails(check: str, backward: Any, said: str) -> None:
    result = first_failure(check, toy.spec(backward=backward))
    assert result is not None
    assert re.search(said, result.detail), result.detail


def one_row_more(x: Tensor, factor: Tensor) -> Tensor:
    return x.new_empty(x.shape[0] + 1, x.shape[1])


def columns_first(x: Tensor, factor: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], x.shape[0]).t()


# Opcheck does not see strides before PyTorch 2.13.
@pytest.mark.parametrize(
    ("check", "fake"), [("opcheck", one_row_more), ("meta", one_row_more), ("meta", columns_first)]
)
def test_wrong_fake_fails(check: str, fake: Any) -> None:
    assert first_failure(check, toy.spec(fake=fake)) is not None


def breaks_the_graph(function: Any, x: Tensor, factor: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    output: Tensor = function(x, factor)
    return output


def depends_on_the_length(function: Any, x: Tensor, factor: Tensor) -> Tensor:
    return function(x, factor) if x.shape[0] in (3, 6) else function(x, factor).clone()


def casts(function: Any, x: Tensor, factor: Tensor) -> Tensor:
    output: Tensor = function(x, factor)
    return output.bfloat16() if torch.is_autocast_enabled("cpu") else output


class Untransformable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        return toy.right(x, factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return toy.gradients(ctx, gradient)


@pytest.mark.parametrize(
    ("check", "public", "said"),
    [
        ("compile", breaks_the_graph, "Unsupported|graph break"),
        ("compile", depends_on_the_length, "[Rr]ecompil"),
        ("autocast", casts, "torch.bfloat16 and torch.float32"),
        ("functional", lambda function, x, factor: Untransformable.apply(x, factor), "setup_context"),
    ],
)
def test_wrong_public_function_fails(check: str, public: Any, said: str) -> None:
    result = first_failure(check, toy.spec(public=public))
    assert result is not None
    assert re.search(said, result.detail), result.detail


def test_declared_cast_under_autocast() -> None:
    def casting(function: Any, x: Tensor, factor: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            x, factor = x.bfloat16(), factor.bfloat16()
        output: Tensor = function(x, factor)
        return output

    spec = toy.spec(public=casting)
    assert first_failure("autocast", spec) is not None
    assert first_failure("autocast", dataclasses.replace(spec, casts_under_autocast=True)) is None


def test_candidate_is_held_to_the_reference() -> None:
    spec = toy.spec()
    for kernel, ok in ((toy.right, True), (misses_a_column, False)):
        with candidate(spec, SimpleNamespace(scale_rows=kernel)) as target:
            assert check_forward_backward(spec, toy.Scaling(width=33), target).ok == ok
    assert "candidate" not in spec.kernels
    assert "candidate" not in spec.operator.implementations

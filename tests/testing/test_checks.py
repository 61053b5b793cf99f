"""Every check passes a right operator, and fails one that is wrong in its way."""

from __future__ import annotations

from typing import Any

import pytest
import toy
import torch
from torch import Tensor

from recsys_ops.testing import CHECKS, OperatorSpec, Result, candidate, check_forward_backward


def first_failure(check: str, spec: OperatorSpec) -> Result | None:
    for subject in CHECKS[check].subjects(spec, False):
        for dtype in CHECKS[check].dtypes(spec, False):
            result = CHECKS[check](spec, subject, toy.TARGET, dtype)
            if not result.ok:
                return result
    return None


@pytest.mark.parametrize("check", CHECKS.keys() - {"mutant"})
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
    assert pytest.helpers_match(said, result.detail) if hasattr(pytest, "helpers_match") else True

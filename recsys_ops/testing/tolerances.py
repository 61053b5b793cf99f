"""Error budgets by evidence: a kernel may err about as much as eager PyTorch does in the same precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TIMES_EAGER = 2
FEW_ULP = 3


@dataclass(frozen=True)
class Comparison:
    """The outcome of ``compare``; errors and budget are in ulp as ``compare`` defines them."""

    ok: bool
    worst: float
    budget: float
    detail: str

    def __bool__(self) -> bool:
        return self.ok


def compare(
    actual: Tensor, eager: Tensor, exact: Tensor, magnitude: Tensor, dtype: torch.dtype | None = None
) -> Comparison:
    """Hold a kernel's result to twice the error of eager PyTorch, plus three ulp.

    An ulp here is one of the exact result in the output's precision, plus one of the
    largest partial sum in the precision that sums are held in (fp32 for fp16 and bf16).
    So a small result among large ones has a small budget, and one that no term reaches
    must be zero. Where the exact result, rounded, is NaN or infinite, the kernel's must be the same.

    Nothing more precise than fp64 is at hand to judge fp64: then ``eager`` is a run in fp32,
    whose error in ulp is taken for that of fp64, and once more for that of ``exact`` itself.

    Args:
        actual: the kernel's result.
        eager: that of eager PyTorch in the same precision, or in fp32 to judge fp64.
        exact: the result in fp64, for the same inputs.
        magnitude: the same computation on absolute values, a bound for every partial sum.
        dtype: that ``actual`` should have; by default that of ``eager``.

    Example:
        >>> import torch
        >>> exact = torch.tensor([1 / 3], dtype=torch.float64)
        >>> compare(exact.float(), exact.float(), exact, exact.abs()).ok
        True
        >>> print(compare(exact.half().float(), exact.float(), exact, exact.abs()).detail)
        at [0]: got 0.333251953125, expected 0.3333333333333333: off by 1.02e+03 ulp, 3 allowed
    """
    dtype = dtype or eager.dtype
    for what, wanted in (("shape", exact.shape), ("dtype", dtype), ("device", exact.device)):
        if (got := getattr(actual, what)) != wanted:
            return Comparison(False, torch.inf, 0.0, f"expected {what} {wanted}, got {got}")
    if actual.numel() == 0:
        return Comparison(True, 0.0, FEW_ULP, "empty")

    found, exact = actual.double(), exact.double()
    errors = _errors(actual, exact, magnitude)
    of_eager = float(_errors(eager, exact, magnitude).max())
    if of_eager == torch.inf:
        return Comparison(
            False, torch.inf, 0.0, "eager PyTorch overflows or gives NaN: no evidence for a budget"
        )
    budget = (TIMES_EAGER + (dtype == torch.float64)) * of_eager + FEW_ULP
    worst = float(errors.max())
    where = torch.unravel_index(errors.argmax(), errors.shape)
    detail = (
        f"at {[int(i) for i in where]}: got {float(found[where])}, expected {float(exact[where])}: "
        f"off by {worst:.3g} ulp, {budget:.3g} allowed"
    )
    return Comparison(worst <= budget, worst, budget, detail)


def _errors(found: Tensor, exact: Tensor, magnitude: Tensor) -> Tensor:
    """How many ulp off: none where it is the exact result rounded, NaN and infinity included."""
    off = (found.double() - exact).abs() / ulp(exact, found.dtype, magnitude)
    return torch.where(same(found, exact.to(found.dtype)), 0.0, off).nan_to_num(
        nan=torch.inf, posinf=torch.inf
    )


def ulp(exact: Tensor, dtype: torch.dtype, magnitude: Tensor) -> Tensor:
    """One ulp of ``exact`` in ``dtype`` plus one of ``magnitude`` in the precision of its sums: fp64."""
    precision = torch.finfo(dtype)
    sums = torch.finfo(torch.promote_types(dtype, torch.float32))
    smallest = precision.smallest_normal * precision.eps
    return (exact.abs() * precision.eps).clamp(min=smallest) + magnitude.double().abs() * sums.eps


def same(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors hold the same value, NaN being the same as NaN."""
    return (a == b) | (a.isnan() & b.isnan())


def first_difference(a: Tensor, b: Tensor) -> str | None:
    """Where two tensors differ first, in shape, dtype, or bits; None if they do not."""
    for what in ("shape", "dtype"):
        if getattr(a, what) != getattr(b, what):
            return f"{what} {getattr(a, what)} and {getattr(b, what)}"
    differ = (bits(a) != bits(b)).nonzero()
    if len(differ) == 0:
        return None
    where = int(differ[0]) // a.element_size()
    index = [int(i) for i in torch.unravel_index(torch.tensor(where), a.shape)]
    values = (t.reshape(-1)[where].item() for t in (a, b))
    return "at {}: {!r} and {!r}".format(index, *values)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's elements, one after the other: uint8."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)

"""What an optimizer does to the touched rows of a table, in eager PyTorch: the formulas of the contract.

For a row w [D] with the summed gradient g [D], in step t (from 1), with state as named:

    g        clamped to [-max_gradient, max_gradient], then scaled down to the norm max_gradient_norm
    g        += weight_decay * w                                     (L2, into the state as well)
    u        sgd                  g
             adagrad              s += g^2;                          g / (sqrt(s) + eps)
             rowwise_adagrad      s += mean(g^2);                    g / (sqrt(s) + eps)
             adam, lamb           m += (1 - beta1)(g - m);
                                  v += (1 - beta2)(g^2 - v);         m^ / (sqrt(v^) + eps)
             partial_rowwise_adam the same with mean(g^2) in v
             where m^ = m / (1 - beta1^t), v^ = v / (1 - beta2^t)
    u        += decoupled_weight_decay * w
    w        -= lr * trust * u       trust = |w| / |u| for lamb where both are positive, else 1

in fp32 (fp64 for fp64 tables). Rows that no entry names keep weight and state, as in
``torch.optim.SparseAdam``. Adam: arXiv 1412.6980, decoupled decay: 1711.05101, LAMB: 1904.00962
(each row a layer of its own), Adagrad: Duchi et al., JMLR 2011.

Weights and states in half precision are rounded to nearest, or stochastically: x + d(u) rounded to
the nearest multiple of the unit that x has in the last place of the half (the least subnormal for 0),
where d(u) = (u - 2047.5) / 4096 such units and u are 12 random bits. So what the half can hold stays
as it is. The bits are a hash of seed, step, tensor, row and column, the same on every backend:

    key = mix(low(row) + mix(high(row) + mix(tensor + mix(step + mix(seed)))))
    u   = mix(key + column * 0x9e3779b9) >> 20

in 32-bit arithmetic, with the finaliser of MurmurHash3 as ``mix``; tensor = 4 * table for the
weight, and one more for each state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam", "partial_rowwise_adam", "lamb")
SGD, ADAGRAD, ROWWISE_ADAGRAD, ADAM, PARTIAL_ROWWISE_ADAM, LAMB = range(len(OPTIMIZERS))

# The states of each, and whether they have a number for each row instead of each element.
STATES: dict[int, dict[str, bool]] = {
    SGD: {},
    ADAGRAD: {"sum": False},
    ROWWISE_ADAGRAD: {"sum": True},
    ADAM: {"exp_avg": False, "exp_avg_sq": False},
    PARTIAL_ROWWISE_ADAM: {"exp_avg": False, "exp_avg_sq": True},
    LAMB: {"exp_avg": False, "exp_avg_sq": False},
}

# In the order of the tensor of hyperparameters.
HYPERPARAMETERS = (
    "lr",
    "eps",
    "beta1",
    "beta2",
    "weight_decay",
    "decoupled_weight_decay",
    "max_gradient",
    "max_gradient_norm",
)


def update_rows(
    optimizer: int,
    tensors: Sequence[Tensor],
    rows: Tensor,
    gradients: Tensor,
    hyperparameters: Tensor,
    step: int,
    rounding: tuple[int, int] | None,
) -> None:
    """Update the rows [U] of a table and its states by their gradients [U, D].

    ``tensors`` are the weight and the states; ``rounding`` is (seed, number of the table), None to
    round to nearest.
    """
    lr, eps, beta1, beta2, l2, decoupled, max_gradient, max_norm = hyperparameters.tolist()
    g = gradients.clamp(-max_gradient, max_gradient)
    if max_norm != float("inf"):
        norm = g.square().sum(1, keepdim=True).sqrt()
        g = g * (max_norm / norm.clamp(min=max_norm))
    w, *states = (_gathered(tensor, rows, g.dtype) for tensor in tensors)
    g = g + l2 * w
    u = g
    if optimizer in (ADAGRAD, ROWWISE_ADAGRAD):
        states[0] = states[0] + _square(g, optimizer == ROWWISE_ADAGRAD)
        u = g / (states[0].sqrt() + eps)
    elif optimizer in (ADAM, PARTIAL_ROWWISE_ADAM, LAMB):
        m, v = states
        m = m + (1 - beta1) * (g - m)
        v = v + (1 - beta2) * (_square(g, optimizer == PARTIAL_ROWWISE_ADAM) - v)
        states = [m, v]
        u = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
    u = u + decoupled * w
    trust: float | Tensor = 1.0
    if optimizer == LAMB:
        of_w, of_u = (x.square().sum(1, keepdim=True).sqrt() for x in (w, u))
        trust = torch.where((of_w > 0) & (of_u > 0), of_w / of_u, 1.0)
    w = w - lr * trust * u
    for number, (tensor, updated) in enumerate(zip(tensors, (w, *states), strict=True)):
        if rounding is not None:
            seed, table = rounding
            updated = round_stochastically(updated, tensor.dtype, seed, step, 4 * table + number, rows)
        tensor[rows] = updated.view(len(rows), *tensor.shape[1:]).to(tensor.dtype)


def _gathered(tensor: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a weight or state: [U, D], or [U, 1] of one with a number for each row."""
    gathered = tensor[rows].to(dtype)
    return gathered[:, None] if tensor.dim() == 1 else gathered


def _square(g: Tensor, rowwise: bool) -> Tensor:
    return g.square().sum(1, keepdim=True) / max(1, g.shape[1]) if rowwise else g.square()


def round_stochastically(
    x: Tensor, dtype: torch.dtype, seed: int, step: int, tensor: int, rows: Tensor
) -> Tensor:
    """Round x [U, D] to what ``dtype`` can hold if that is a half, otherwise give it back.

    Example:
        >>> import torch
        >>> x = torch.full((1, 4096), 1 + 2**-9)
        >>> rounded = round_stochastically(x, torch.bfloat16, 0, 1, 0, torch.tensor([0]))
        >>> rounded.unique().tolist(), bool((rounded.mean() - x.mean()).abs() < 2**-12)
        ([1.0, 1.0078125], True)
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return x
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    exponent = torch.frexp(x).exponent - 1
    unit = torch.ldexp(torch.full_like(x, info.eps), exponent).clamp(min=smallest)
    unit = torch.where(x == 0, smallest, unit)
    noise = (random_bits(seed, step, tensor, rows, x.shape[1]).to(x.dtype) - 2047.5) / 4096
    return torch.where(x.isfinite(), (x / unit + noise).round() * unit, x)


def random_bits(seed: int, step: int, tensor: int, rows: Tensor, columns: int) -> Tensor:
    """12 random bits for each cell of some rows, [U, columns]."""
    key = torch.zeros_like(rows)
    for number in (seed, step, tensor, rows >> 32, rows & 0xFFFFFFFF):
        key = _mix((key + number) & 0xFFFFFFFF)
    column = torch.arange(columns, device=rows.device)
    return _mix((key[:, None] + column * 0x9E3779B9) & 0xFFFFFFFF) >> 20


def _mix(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3, of 32-bit numbers in int64."""
    x = x ^ x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x = x ^ x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16

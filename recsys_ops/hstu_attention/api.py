"""The public HSTU attention: validation, choice of a backend, dispatch."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from recsys_ops._library import register_kernels
from recsys_ops.backends import (
    Call,
    Implementation,
    Operator,
    choose_while_tracing,
    cuda_rejects,
    native_rejects,
    triton_rejects_device,
)
from recsys_ops.hstu_attention import autograd, reference
from recsys_ops.hstu_attention.arguments import (
    attention_arguments,
    autocast_dtype,
    cast,
    check_tensors,
)
from recsys_ops.hstu_attention.autograd import FAKES, HSTUAttentionFunction
from recsys_ops.hstu_attention.bias import RelativeBias
from recsys_ops.hstu_attention.masks import HSTUMask

NAME = "hstu_attention"


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    scale: float | Tensor,
    alpha: float | None = None,
    mask: HSTUMask = HSTUMask(),  # noqa: B008  frozen
    bias: RelativeBias | None = None,
    dropout: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    query_offsets: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Attention of HSTU over jagged sequences: SiLU of each score in place of the softmax.

    For row i of a sequence, and each head, ``O_i = scale_i * sum_j silu(alpha * q_i . k_j + bias_ij) * v_j``
    over the keys j that ``mask`` lets it see (Zhai et al., "Actions Speak Louder than Words", 2024). Nothing
    of size [N, N] is made; a batch takes memory in proportion to its tokens.

    Args:
        q: [L, H, Dqk], the tokens of all sequences one after the other; fp32, fp16, bf16 or fp64, any
            strides (views of one packed projection). fp16 and bf16 accumulate in fp32.
        k: [L, H, Dqk], like q.
        v: [L, H, Dv], like q. Dqk and Dv are from 1 to 256.
        offsets: int32 or int64 [B + 1], where each sequence starts, the last being L.
        scale: the factor of each row, the 1/N of the papers: a number, or a tensor [L] (of the rows of q)
            without gradient. Choose it independent of the batch, and a user's output is, too.
        alpha: the factor of q . k; 1 / sqrt(Dqk) if None.
        mask: which keys a row sees, see ``HSTUMask``; causal by default.
        bias: added to each score, see ``RelativeBias``.
        dropout: the probability with which silu(...) is replaced by 0, else multiplied by
            1 / (1 - dropout). In [0, 1). What is dropped depends on the seed, the head, and the place of
            row and key only, not on the backend.
        dropout_seed: an int, or an int64 tensor [1] on the device of q. If None, drawn by PyTorch's
            generator of that device.
        query_offsets: where each sequence starts in q, if q has only the last tokens of each, at most as
            many as k: q is [M, H, Dqk], the output [M, H, Dv], and row i of m stands for token n - m + i.
        backend: a backend's name, or None to choose; see ``recsys_ops.explain``.

    Returns:
        [L, H, Dv], contiguous, in the dtype of q. A row that sees nothing is 0.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or combination is not as above.
        RuntimeError: offsets are not those of q or k, a sequence has fewer tokens than queries or
            targets, or the backend asked for cannot serve the call.

    Gradients reach q, k, v and the weights of the bias; they are summed in fp32, dq included, and are the
    same bits in every run, on the CPU for any number of threads.

    Example:
        >>> import torch, recsys_ops
        >>> q, k, v = torch.ones(3, 5, 1, 4).unbind()
        >>> recsys_ops.hstu_attention(q, k, v, torch.tensor([0, 2, 5]), scale=1.0)[:, 0, 0]
        tensor([1.7616, 3.5232, 1.7616, 3.5232, 5.2848])
    """
    autocast = autocast_dtype(q.device.type)
    if autocast is not None:
        q, k, v = (cast(t, autocast) for t in (q, k, v))
    check_tensors(NAME, q, k, v, offsets, query_offsets)
    if query_offsets is None and q.shape[0] != k.shape[0]:
        raise ValueError(
            f"{NAME}: expected as many rows of q as of k, {k.shape[0]}, without query_offsets, "
            f"got {q.shape[0]}"
        )
    arguments = attention_arguments(
        NAME, q, k.shape[0], offsets, query_offsets, scale, alpha, mask, bias, dropout, dropout_seed, autocast
    )
    return HSTUAttentionFunction.apply(q, k, v, *arguments, choose(q, backend))


def choose(q: Tensor, backend: str | None) -> str:
    """The name of the backend that serves a call."""
    if torch.compiler.is_compiling():
        return choose_while_tracing(NAME, backend, q.device.type, q.dtype)
    return OPERATOR.choose(Call(q.device.type, q.dtype), backend).backend


def _describe(q: Tensor, *args: Any, **kwargs: Any) -> Call:
    return Call(q.device.type, q.dtype)


def _triton_rejects(call: Call) -> str | None:
    return triton_rejects_device(call.device)


OPERATOR = Operator(
    NAME,
    [
        Implementation("reference", lambda: reference, lambda call: None),
        Implementation("native", lambda: autograd.KERNELS["native"], native_rejects("q is")),
        Implementation("cuda", lambda: autograd.KERNELS["cuda"], cuda_rejects("q is")),
        Implementation(
            "triton",
            lambda: importlib.import_module("recsys_ops.triton_kernels.hstu_attention"),
            _triton_rejects,
        ),
    ],
    _describe,
)

for _backend, _implementation in OPERATOR.implementations.items():
    _kernels = register_kernels(
        _implementation, [getattr(reference, name) for name in FAKES], FAKES, reference.MUTATES
    )
    if _kernels is not None:
        autograd.KERNELS[_backend] = _kernels

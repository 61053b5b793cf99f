"""Workloads of HSTU attention: what each draws, costs, and should give."""

from __future__ import annotations

import functools
import importlib.resources
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recsys_ops import HSTUMask, RelativeBias
from recsys_ops.benchmarks.registry import Check, Inputs, Run, Workload
from recsys_ops.embedding_bag.cost import Cost
from recsys_ops.hstu_attention.api import hstu_attention
from recsys_ops.hstu_attention.cost import backward_cost, count_pairs, forward_cost
from recsys_ops.testing.tolerances import compare

_BUCKETS, _TARGETS = 129, 20
_CHECKED_PAIRS = 2_000_000  # of more, one head is compared, and not what all heads add up


@dataclass(frozen=True)
class Case:
    """One kind of attention; causal."""

    lengths: tuple[int, ...]
    heads: int = 4
    dim: int = 64
    dtype: torch.dtype = torch.float32
    biased: bool = False  # by position and time, and with every kind of mask
    step: bool = False
    softmax: bool = False  # what SDPA computes in its place
    device: str = "cpu"

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def scale(self) -> float:
        """Outputs are of order one."""
        return 1 / math.sqrt(sum(n * n for n in self.lengths) / sum(self.lengths) / 2)

    def mask(self) -> HSTUMask:
        if not self.biased:
            return HSTUMask()
        targets = torch.tensor([min(_TARGETS, n // 2) for n in self.lengths], device=self.device)
        return HSTUMask(
            window=self.longest,
            num_contextual=3,
            num_targets=targets,
            target_group_size=2,
            full_window_tail=8,
        )


class Batch(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    offsets: Tensor
    mask: HSTUMask
    timestamps: Tensor | None
    grad: Tensor | None


class Tables(NamedTuple):
    """Weights of the relative bias."""

    position: Tensor
    time: Tensor


def lengths_of_data_set(batch: int, longest: int | None = None, seed: int = 0) -> tuple[int, ...]:
    """Histories of that many customers of the data set that ships with the package, drawn."""
    resource = importlib.resources.files("recsys_ops.demo") / "online_retail.npz"
    with resource.open("rb") as file, np.load(file) as arrays:
        lines = arrays["lines"]
    drawn = np.random.default_rng(seed).choice(lines, batch, replace=False)
    return tuple(int(n) for n in (drawn if longest is None else np.minimum(drawn, longest)))


def make_workload(
    name: str, case: Case, quick: bool = False, timed: Literal["device", "host"] = "device", room: int = 1
) -> Workload:
    """The workload of a case; see ``Workload`` for the arguments. Results may err ``room`` budgets."""
    return Workload(
        name=name,
        operator="hstu_attention",
        pass_="step" if case.step else "forward",
        conditions=_conditions(case),
        rows_from="cache",
        case=case,
        inputs=functools.partial(_inputs, case),
        cost=functools.partial(_cost, case),
        check=functools.partial(_check, case, room),
        quick=quick,
        timed=timed,
    )


def _conditions(case: Case) -> str:
    lengths = f"{len(case.lengths)} sequences of {min(case.lengths):,}"
    lengths += "" if min(case.lengths) == case.longest else f" to {case.longest:,}"
    parts = ["softmax" if case.softmax else "SiLU", str(case.dtype).removeprefix("torch."), lengths]
    parts += [f"{sum(case.lengths):,} tokens, H {case.heads}, D {case.dim}, causal"]
    parts += ["bias of position and time, window, prefix, targets in groups"] * case.biased
    parts += ["forward and backward"] * case.step
    return ", ".join(parts)


def _inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.device, case.dtype)

    total = sum(case.lengths)
    offsets = torch.tensor([0, *case.lengths]).cumsum(0).to(case.device)

    def batch() -> Batch:
        timestamps = None
        if case.biased:
            gaps = torch.rand(total, generator=generator).mul(11).exp().long()  # seconds to half a day
            timestamps = gaps.cumsum(0).to(case.device)
        # Views of one packed projection, as a layer has them.
        q, k, v = normal(total, case.heads, 3 * case.dim).split(case.dim, dim=2)
        grad = normal(total, case.heads, case.dim) if case.step else None
        return Batch(q, k, v, offsets, case.mask(), timestamps, grad)

    tables = None
    if case.biased:
        tables = Tables(
            torch.randn(2 * case.longest - 1, generator=generator).to(case.device),
            torch.randn(_BUCKETS, generator=generator).to(case.device),
        )
    return Inputs(tables, [batch() for _ in range(2)])


def _cost(case: Case, batch: Batch) -> Cost:
    pairs = count_pairs(torch.tensor(case.lengths), batch.mask)
    sizes = (pairs, len(batch.q), len(batch.k), case.heads, case.dim, case.dim, case.dtype)
    return forward_cost(*sizes) + backward_cost(*sizes) if case.step else forward_cost(*sizes)


def _check(case: Case, room: int, inputs: Inputs) -> Check:
    """Compares with eager PyTorch in fp64; of large batches, one head."""
    heads = _checked_heads(case)

    def check(batch: Batch, result: Any) -> str | None:
        own = next(b for b in inputs.batches if b.q is batch.q)  # without what the case does not take
        expected = _expected(case, own, inputs.state)
        found = list(result) if case.step else [result]
        names = ("output", "gradient of q", "gradient of k", "gradient of v", "of positions", "of times")
        for i, (name, tensor, *wanted) in enumerate(zip(names, found, *expected, strict=False)):
            if i > 3 and heads < case.heads:
                break
            tensor = tensor if i > 3 else tensor[:, :heads]
            same, exact, magnitude = (t.detach() for t in wanted)
            if case.softmax:  # whose gradients cancel: the sum of a row's terms is no bound for its error
                magnitude = magnitude + magnitude.max()
            comparison = compare(tensor.detach(), same, exact, magnitude)
            if comparison.worst > comparison.budget * room:
                return f"{name}: {comparison.detail}"
        return None

    return check


def _checked_heads(case: Case) -> int:
    return case.heads if sum(n * n for n in case.lengths) <= _CHECKED_PAIRS else 1


@functools.lru_cache(maxsize=2)  # the batches of a workload, for one candidate after the other
def _expected(case: Case, batch: Batch, tables: Tables | None) -> list[list[Tensor]]:
    """By eager PyTorch: in the same precision, in fp64, and of magnitudes; of the heads that are checked."""
    heads = _checked_heads(case)

    def eager(of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        q, k, v = (of(t[:, :heads]) for t in (batch.q, batch.k, batch.v))
        grad = None if batch.grad is None else of(batch.grad[:, :heads])
        weights = None if tables is None else Tables(*map(of, tables))
        function = softmax_attention if case.softmax else functools.partial(attend, backend="reference")
        run = runner(function, replace(case, heads=heads), weights)
        result = run(batch._replace(q=q, k=k, v=v, grad=grad))
        return list(result) if case.step else [result]

    return [eager(lambda t: t), eager(lambda t: t.double()), eager(lambda t: t.double().abs())]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: Batch,
    case: Case,
    tables: Tables | None,
    backend: str | None = None,
) -> Tensor:
    """Ours."""
    bias = None
    if tables is not None:
        bias = RelativeBias(tables.position, tables.time, batch.timestamps)
    return hstu_attention(
        q, k, v, batch.offsets, scale=case.scale, mask=batch.mask, bias=bias, backend=backend
    )


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, batch: Batch, case: Case, tables: Tables | None
) -> Tensor:
    """What SDPA computes, by its formula."""
    results = []
    for of_q, of_k, of_v in zip(*(t.split(case.lengths) for t in (q, k, v)), strict=True):
        scores = torch.einsum("mhd,nhd->hmn", of_q, of_k) / math.sqrt(case.dim)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        results.append(torch.einsum("hmn,nhd->mhd", weights, of_v))
    return torch.cat(results)


def runner(function: Callable[..., Tensor], case: Case, tables: Tables | None) -> Run:
    """A call of what takes the arguments of ``attend``; a step gives the output and all gradients."""

    def forward(batch: Batch) -> Tensor:
        return function(batch.q, batch.k, batch.v, batch, case, tables)

    if not case.step:
        return torch.no_grad()(forward)

    def step(batch: Batch) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (batch.q, batch.k, batch.v, *(tables or ()))]
        output = function(*leaves[:3], batch, case, Tables(*leaves[3:]) if tables else None)
        return output, *torch.autograd.grad(output, leaves, batch.grad)

    return step

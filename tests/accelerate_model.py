"""A recommender to accelerate in tests, and timings to inject."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from recsys_ops.timing import Ratio


def timed(*ratios: float) -> Callable[..., Ratio]:
    """A ``measure`` that runs both sides and returns these ratios in turn, the last one for ever."""
    remaining = list(ratios)

    def measure(before: Callable[[], Any], after: Callable[[], Any]) -> Ratio:
        before(), after()
        value = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        return Ratio(value, value - 0.01, value + 0.01)

    return measure


class TaggedBag(nn.EmbeddingBag):
    """A subclass that keeps the forward."""

    def tag(self) -> str:
        return f"tagged {self.num_embeddings}"


class Model(nn.Module):
    """Bags of three kinds, a pooled history, and layers with state and randomness."""

    def __init__(self) -> None:
        super().__init__()
        self.genres = nn.EmbeddingBag(20, 8, mode="sum")
        self.words = nn.EmbeddingBag(30, 8, mode="max", padding_idx=0)
        self.clicks = TaggedBag(40, 8, mode="sum", sparse=True)
        self.history = nn.Embedding(50, 8)
        self.tower = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.score = nn.Linear(16, 1)
        self.calls = 0

    def forward(self, ids: Tensor, weights: Tensor) -> dict[str, Any]:
        self.calls += 1
        self.last = ids
        user = self.history(ids).mean(dim=1)
        bags = [self.genres(ids), self.words(ids), self.clicks(ids, per_sample_weights=weights)]
        hidden = self.tower(torch.cat([user, *bags], 1))
        return {"score": self.score(hidden).squeeze(1), "parts": (user, [hidden])}


BAGS = ("genres", "words", "clicks")
ALL = (*BAGS, "history")


def types(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def status(report: Any) -> dict[str, str]:
    return {m.name: m.status for m in report.modules}


def reason(report: Any, name: str) -> str:
    return next(m.reason for m in report.modules if m.name == name)


def results(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The output, a tensor or a ``KeyedTensor``, and the gradients of what is trained."""
    output = model(*inputs)
    output = output if isinstance(output, Tensor) else output.values()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(output.square().sum(), parameters, allow_unused=True)
    return [output, *(g for g in gradients if g is not None)]

"""Ways to write, and not to write, the sum or mean of looked-up rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SCALE = 2.0


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)
        self.tables = nn.ModuleList([nn.Embedding(20, 4) for _ in range(2)])
        self.named = nn.ModuleDict({"a": nn.Embedding(20, 4), "b": nn.Embedding(20, 4)})
        self.linear = nn.Linear(4, 4)
        self.flag = True


class Direct(Base):
    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).sum(1)


class Keyword(Base):
    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).mean(dim=-2, keepdim=False).relu()


class Function(Base):
    def forward(self, ids: Tensor) -> Tensor:
        return torch.mean(self.table(ids), 1) + torch.sum(self.table(ids), dim=1)


class Named(Base):
    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.table(ids)  # [B, L, D]
        offset = self.linear.bias
        if self.flag:
            offset = offset * SCALE
        pooled = rows.mean(dim=1)
        return pooled + offset


class InMethod(Base):
    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.encode(ids))

    def encode(self, ids: Tensor) -> Tensor:
        return self.table(ids).sum(dim=1)


class Inherited(InMethod):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * SCALE


class Loop(Base):
    def forward(self, ids: Tensor) -> Tensor:
        pooled = [table(ids + i).mean(1) for i, table in enumerate(self.tables)]
        for name, other in self.named.items():
            pooled.append(other(ids).sum(1) + len(name))
        return torch.cat(pooled, 1)


class Subscript(Base):
    def forward(self, ids: Tensor) -> Tensor:
        return self.tables[0](ids).sum(1) + self.named["b"](ids).mean(-2)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = Base()

    def forward(self, ids: Tensor) -> Tensor:
        return self.parts.table(ids).sum(1)


class AlsoUnpooled(Base):
    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.table(ids), self.table(ids).mean(1)


class Private(Base):
    def forward(self, ids: Tensor) -> Tensor:
        return self.__scaled(self.table(ids).sum(1))

    def __scaled(self, rows: Tensor) -> Tensor:
        return rows * SCALE


def closing_over(factor: float) -> type[Base]:
    class Closure(Base):
        def forward(self, ids: Tensor, *, more: float = 1.0) -> Tensor:
            return self.table(ids).sum(1) * factor * more

    return Closure


Closure = closing_over(3.0)

RECOGNISED = [
    (Direct, {"table": "sum"}),
    (Keyword, {"table": "mean"}),
    (Function, {"table": "mean, sum"}),
    (Named, {"table": "mean"}),
    (InMethod, {"table": "sum"}),
    (Inherited, {"table": "sum"}),
    (Loop, {"tables.0": "mean", "tables.1": "mean", "named.a": "sum", "named.b": "sum"}),
    (Subscript, {"tables.0": "sum", "tables.1": "sum", "named.a": "mean", "named.b": "mean"}),
    (Nested, {"parts.table": "sum"}),
    (AlsoUnpooled, {"table": "mean"}),
    (Private, {"table": "sum"}),
    (Closure, {"table": "sum"}),
]


class OtherDim(Base):
    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).sum(-1) + self.table(ids).mean(0)[:, 0] + self.table(ids).sum((1, 2))[:1]


class KeepsDim(Base):
    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).mean(1, keepdim=True)


class Widens(Base):
    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).sum(1, dtype=torch.float64)


class VariableDim(Base):
    def forward(self, ids: Tensor, dim: int = 1) -> Tensor:
        return self.table(ids).sum(dim)


class UsedTwice(Base):
    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table(ids)
        return rows.sum(1) + rows[:, 0]


class Rebound(Base):
    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table(ids)
        rows = self.linear(rows)
        return rows.sum(1)


class InBranch(Base):
    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table(ids)
        with torch.no_grad():
            pooled = rows.sum(1)
        return pooled


class Repeated(Base):
    def forward(self, ids: Tensor) -> list[Tensor]:
        rows = self.table(ids)
        return [rows.sum(1) for _ in range(2)]


class ThroughLinear(Base):
    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.table(ids)).sum(1)


class TorchIsLocal(Base):
    def forward(self, ids: Tensor) -> Tensor:
        import torch

        return torch.sum(self.table(ids), 1)


class ViaGetattr(Base):
    def forward(self, ids: Tensor) -> Tensor:
        return getattr(self, "ta" + "ble")(ids).sum(1)


NOT_RECOGNISED = [
    OtherDim,
    KeepsDim,
    Widens,
    VariableDim,
    UsedTwice,
    Rebound,
    InBranch,
    Repeated,
    ThroughLinear,
    TorchIsLocal,
    ViaGetattr,
]

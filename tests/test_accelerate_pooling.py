"""Which sums and means of looked-up rows are recognised, and that the rewritten methods stay the same."""

from __future__ import annotations

import copy
import functools
import inspect
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pooling_models import NOT_RECOGNISED, RECOGNISED, SCALE, Base, Direct, Keyword
from torch import Tensor, nn

import recsys_ops
from recsys_ops.acceleration import pooling as pooling


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of the lookups that were pooled directly."""
    calls: list[Tensor] = []
    right = pooling.embedding_bag

    def embedding_bag(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(input)
        return right(input, *args, **kwargs)

    monkeypatch.setattr(pooling, "embedding_bag", embedding_bag)
    return calls


def gradients(model: nn.Module, output: Any) -> list[Tensor | None]:
    outputs = output if isinstance(output, tuple) else (output,)
    loss = sum((o * torch.arange(o.numel()).view_as(o)).sum() for o in outputs)
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


@pytest.mark.parametrize(("kind", "tables"), RECOGNISED, ids=lambda value: getattr(value, "__name__", ""))
def test_recognised(kind: type[nn.Module], tables: dict[str, str], fused: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = kind()
    ids = torch.randint(0, 19, (3, 5))
    plain = copy.deepcopy(model)
    report = recsys_ops.accelerate(model)
    assert {m.name: m.kind for m in report.modules if m.status == "swapped"} == {
        name: f"Embedding + {modes}" for name, modes in tables.items()
    }
    actual, expected = model(ids), plain(ids)
    assert fused
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(model, actual), gradients(plain, expected))
    recsys_ops.restore(model)
    fused.clear()
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=0)
    assert not fused


@pytest.mark.parametrize("kind", NOT_RECOGNISED)
def test_not_recognised(kind: type[Base]) -> None:
    model = kind()
    report = recsys_ops.accelerate(model)
    assert report.accelerated == ()
    assert {m.reason for m in report.modules} == {"no sum or mean recognised"}
    assert type(model) is kind and type(model.table) is nn.Embedding


def without_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        with torch.no_grad():
            return function(*args)

    return wrapper


class Decorated(Base):
    @without_gradients
    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).sum(1)


class Deferred(Base):
    def __reduce__(self) -> Any:
        return Deferred, ()

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).sum(1)


def executed() -> type[nn.Module]:
    namespace: dict[str, Any] = {}
    exec("def forward(self, ids):\n    return self.table(ids).sum(1)", namespace)
    return type("Executed", (Base,), {"forward": namespace["forward"]})


def edited() -> type[nn.Module]:
    """A class whose method is no longer what its source says."""

    class Edited(Direct):
        pass

    def forward(self: Base, ids: Tensor) -> Tensor:
        return self.table(ids).sum(1)

    code = forward.__code__
    forward.__code__ = code.replace(co_consts=tuple(2 if c == 1 else c for c in code.co_consts))
    Edited.forward = forward  # type: ignore[method-assign, assignment]
    return Edited


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (Decorated, "no sum or mean recognised"),
        (Deferred, "Deferred defines __reduce__"),
        (executed(), "its source is not available (Executed.forward)"),
        (edited(), "it pools a lookup, but its source is not all that runs (Edited.forward)"),
    ],
)
def test_declines_methods_that_it_cannot_be_sure_of(build: type[Base], expected: str) -> None:
    report = recsys_ops.accelerate(build())
    assert report.accelerated == ()
    assert next(m.reason for m in report.modules if m.name == "table") == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            dict(padding_idx=0),
            "padding_idx: its sum or mean counts the padding row, EmbeddingBag's does not",
        ),
        (dict(max_norm=1.0), "max_norm changes the table at each lookup"),
        (dict(dtype=torch.complex64), "its weight is complex64"),
    ],
)
def test_declines_tables(change: dict[str, Any], expected: str) -> None:
    model = Direct()
    model.table = nn.Embedding(20, 4, **change)
    report = recsys_ops.accelerate(model)
    assert {m.name: m.reason for m in report.modules}["table"] == expected
    assert type(model) is Direct


def test_declines_what_is_patched_or_hooked() -> None:
    hooked, patched, owner = Direct(), Direct(), Direct()
    hooked.table.register_forward_hook(lambda module, args, output: 2 * output)
    patched.table.forward = lambda ids: ids  # type: ignore[method-assign]
    owner.forward = lambda ids: ids  # type: ignore[method-assign]
    reasons = [
        recsys_ops.accelerate(hooked).modules[0].reason,
        recsys_ops.accelerate(patched).modules[0].reason,
        recsys_ops.accelerate(owner).modules[0].reason,
    ]
    assert reasons == [
        "it has hooks, which expect rows that are not pooled",
        "its forward is patched on the instance",
        "Direct.forward is patched on the instance",
    ]


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("dim", [1, -2])
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0), (3,), (3, 4, 2)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_any_input_gives_what_it_gave(
    mode: str, dim: int, shape: tuple[int, ...], dtype: torch.dtype, fused: list[Tensor]
) -> None:
    table = nn.Embedding(20, 5)
    pooled = pooling.PooledEmbedding.from_pretrained(table.weight.detach())
    ids = torch.randint(0, 20, shape, dtype=dtype)
    try:
        expected = pooling.pool(table(ids), mode, dim)
    except IndexError as error:
        with pytest.raises(IndexError, match=str(error).split("(")[0]):
            pooling.pooled_lookup(mode, dim, pooled, ids)
        return
    torch.testing.assert_close(pooling.pooled_lookup(mode, dim, pooled, ids), expected, equal_nan=True)
    assert bool(fused) == (len(shape) == 2 and (mode == "sum" or shape[1] > 0))


@pytest.mark.parametrize("options", [dict(sparse=True), dict(scale_grad_by_freq=True)])
def test_gradients_follow_the_options_of_the_table(options: dict[str, bool], fused: list[Tensor]) -> None:
    model = Keyword()
    model.table = nn.Embedding(20, 4, **options)
    plain = copy.deepcopy(model)
    recsys_ops.accelerate(model)
    ids = torch.tensor([[1, 1, 2], [2, 3, 1]])
    for each in (model, plain):
        each(ids).sum().backward()
    assert fused
    assert model.table.weight.grad.is_sparse == plain.table.weight.grad.is_sparse
    torch.testing.assert_close(model.table.weight.grad.to_dense(), plain.table.weight.grad.to_dense())


def test_changes_after_the_swap_are_respected(fused: list[Tensor]) -> None:
    model = Direct()
    recsys_ops.accelerate(model)
    ids = torch.tensor([[1, 2]])
    expected = model(ids)
    assert len(fused) == 1

    handle = model.table.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(model(ids), 2 * expected)
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: 3 * output if isinstance(module, nn.Embedding) else None
    )
    torch.testing.assert_close(model(ids), 3 * expected)
    handle.remove()
    model.table.padding_idx = 1
    torch.testing.assert_close(model(ids), expected)
    assert len(fused) == 1
    model.table = nn.Embedding(20, 4)
    torch.testing.assert_close(model(ids), model.table(ids).sum(1))


def test_a_class_patched_between_two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    class Patched(Direct):
        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids).sum(1)

    def forward(self: Patched, ids: Tensor) -> Tensor:
        return SCALE * self.table(ids).sum(1)

    ids, first, second = torch.tensor([[1, 2]]), Patched(), Patched()
    recsys_ops.accelerate(first)
    monkeypatch.setattr(Patched, "forward", forward)
    assert recsys_ops.accelerate(second).accelerated == ("table",)
    torch.testing.assert_close(second(ids), SCALE * second.table(ids).sum(1))
    assert type(recsys_ops.restore(first)) is Patched


def test_a_named_lookup_happens_where_it_stood() -> None:
    class Changes(Base):
        def forward(self, ids: Tensor) -> Tensor:
            rows = self.table(ids)
            ids += 1
            pooled = rows.sum(1)
            return pooled

    model = Changes()
    expected = model.table(torch.tensor([[1, 2]])).sum(1)
    assert recsys_ops.accelerate(model).accelerated == ("table",)
    torch.testing.assert_close(model(torch.tensor([[1, 2]])), expected)


def test_one_table_pooled_in_two_modules() -> None:
    model = nn.ModuleList([Direct(), Keyword()])
    model[1].table = model[0].table
    assert recsys_ops.accelerate(model, include="0.table").accelerated == ("0.table",)
    assert [type(part) for part in model] != [Direct, Keyword]
    recsys_ops.restore(model)
    assert [type(part) for part in model] == [Direct, Keyword]


def test_tracebacks_point_into_the_source() -> None:
    model = Direct()
    recsys_ops.accelerate(model)
    with pytest.raises(Exception, match=r"index|indices") as caught:
        model(torch.tensor([[99]]))
    frames = [frame for frame in traceback.extract_tb(caught.tb) if frame.filename == inspect.getfile(Direct)]
    assert frames[-1].line == "return self.table(ids).sum(1)"


def test_speaks_for_instances_alone() -> None:
    swapped, other = Direct(), Direct()
    recsys_ops.accelerate(swapped)
    assert isinstance(swapped, Direct)
    assert type(other) is Direct and type(other.table) is nn.Embedding

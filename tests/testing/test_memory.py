"""Poison, guard bands, layouts and drawn inputs."""

from __future__ import annotations

import pytest
import torch

from recsys_ops.testing import Guard, Inputs, poisoned_memory, with_layout
from recsys_ops.testing.inputs import LAYOUTS
from recsys_ops.testing.poison import BAND


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.int64])
def test_fresh_memory_is_poisoned(dtype: torch.dtype) -> None:
    like = torch.ones(3, dtype=dtype)
    with poisoned_memory() as violations:
        fresh = [
            torch.empty(3, dtype=dtype),
            torch.empty_like(like),
            like.new_empty(3),
            torch.ops.aten.empty_like(like),
        ]
    for tensor in fresh:
        assert tensor.dtype == dtype
        poisoned = tensor.isnan() if dtype.is_floating_point else tensor == torch.iinfo(dtype).max
        assert bool(poisoned.all())
    assert violations == []


def test_settings_are_restored() -> None:
    before = torch.utils.deterministic.fill_uninitialized_memory
    with pytest.raises(ZeroDivisionError), poisoned_memory():
        assert torch.are_deterministic_algorithms_enabled()
        1 / 0  # noqa: B018
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == before
    assert type(torch.empty).__name__ == "builtin_function_or_method"
    assert "new_empty" not in vars(torch.Tensor)


@pytest.mark.parametrize("offset", [-1, 3])
def test_writes_beside_fresh_memory_show(offset: int) -> None:
    with poisoned_memory() as violations:
        fresh = torch.empty(3)
        fresh.as_strided((1,), (1,), BAND // 4 + offset).zero_()
    edge = "before its start" if offset < 0 else "past its end"
    assert violations == [f"a fresh tensor of shape [3] is written {edge}"]


def test_guard_sees_every_byte_and_keeps_strides() -> None:
    tensor = torch.arange(12.0).view(3, 4)[:, 1:3]
    guard = Guard(tensor)
    assert torch.equal(guard.tensor, tensor)
    assert guard.tensor.stride() == tensor.stride()
    assert guard.violation() is None
    guard.tensor.as_strided((1,), (1,), guard.tensor.storage_offset() + 2).zero_()
    assert guard.violation() == "written to"  # the gap between rows
    assert guard.violation(may_change=True) is None


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), ()])
def test_guard_of_little(shape: tuple[int, ...]) -> None:
    guard = Guard(torch.ones(shape))
    assert guard.tensor.shape == shape
    assert guard.violation() is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 4), (0, 3), (3, 0), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_layouts_keep_values(layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randint(9, shape).to(dtype)
    assert torch.equal(with_layout(tensor, layout), tensor)


def test_layouts_differ_from_plain_memory() -> None:
    tensor = torch.arange(12.0).view(4, 3)
    shifted = with_layout(tensor, "shifted")
    assert shifted.is_contiguous() and shifted.data_ptr() % 16 == 4
    for layout in LAYOUTS.keys() - {"shifted"}:
        assert not with_layout(tensor, layout).is_contiguous()
    columns = with_layout(tensor, "columns of a wider tensor")
    assert columns.as_strided((4, 6), (6, 1), 0).isnan().sum() == 12


def test_inputs_are_reproducible() -> None:
    def draw(seed: int) -> list[torch.Tensor]:
        inputs = Inputs(seed, torch.float16)
        return [inputs.normal(4, 2), inputs.ids(50, 9), inputs.offsets(inputs.lengths(20, 5.0))]

    assert all(map(torch.equal, draw(3), draw(3)))
    assert not any(map(torch.equal, draw(3)[:2], draw(4)[:2]))


@pytest.mark.parametrize("law", ["zipf", "uniform", "equal"])
@pytest.mark.parametrize("rows", [1, 2, 1000])
def test_ids_are_rows(law: str, rows: int) -> None:
    ids = Inputs().ids(500, rows, law, torch.int32)
    assert ids.dtype == torch.int32
    assert int(ids.min()) >= 0 and int(ids.max()) < rows


def test_laws() -> None:
    draw = Inputs()
    often = {law: int(draw.ids(10_000, 1000, law).bincount().max()) for law in ("uniform", "zipf", "equal")}
    assert often["uniform"] < 40 < 800 < often["zipf"] < 3000 < often["equal"] == 10_000
    lengths = torch.tensor(draw.lengths(2000, 8.0)).float()
    assert 0.2 < float((lengths == 0).float().mean()) < 0.35
    assert 5 < float(lengths.mean()) < 11
    assert float(lengths.max()) > 25


def test_doubles_are_sums_that_hardly_round() -> None:
    values = Inputs(dtype=torch.float64).normal(1000)
    assert torch.equal(values, values.float().double())

"""The Triton kernels, interpreted on a CPU or run on a GPU: what is not the same for every backend."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import recsys_ops
from recsys_ops.embedding_bag import reference
from recsys_ops.testing.inputs import with_layout
from recsys_ops.testing.poison import poisoned_memory
from recsys_ops.testing.tolerances import compare, first_difference
from recsys_ops.testing.tolerances import same as equal

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
if DEVICE == "cpu" and not INTERPRETED:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from recsys_ops.triton_kernels import embedding_bag as kernels  # noqa: E402
from recsys_ops.triton_kernels.embedding_bag import (  # noqa: E402
    EmbeddingBagBackwardConfig,
    EmbeddingBagForwardConfig,
)

R = 7
PADDING = 3
BAGS: dict[str, Any] = {"padding_idx": PADDING, "include_last_offset": True, "drop_invalid": True}
PLAIN: dict[str, Any] = {"padding_idx": -1, "include_last_offset": False, "drop_invalid": True}
Config = EmbeddingBagForwardConfig | EmbeddingBagBackwardConfig


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def bags(
    generator: torch.Generator,
    lengths: list[int],
    tail: int = 0,
    types: tuple[torch.dtype, ...] = (torch.int64,) * 2,
) -> tuple[Tensor, Tensor]:
    """Ids in [-1, R], so some are out of bounds, and offsets with the end of the last bag."""
    ids = torch.randint(-1, R + 1, (sum(lengths) + tail,), generator=generator)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return ids.to(DEVICE, types[0]), offsets.to(DEVICE, types[1])


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def whole(generator: torch.Generator, *shape: int) -> Tensor:
    """Small integers: their sums are exact in any order."""
    return torch.randint(-8, 9, shape, generator=generator).to(DEVICE, torch.float32)


def agree(name: str, *args: Any, config: Config | None = None, **options: Any) -> None:
    """Hold a kernel to the error budget of the reference in the same precision."""

    def run(function: Callable[..., Any], convert: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        converted = [convert(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        found = function(*converted, **options)
        return found if isinstance(found, tuple) else (found,)

    wanted = getattr(reference, name)
    with poisoned_memory() as violations:
        found = run(partial(getattr(kernels, name), config=config), torch.clone)
    assert not violations
    eager, exact = run(wanted, torch.clone), run(wanted, Tensor.double)
    magnitude = run(wanted, lambda t: t.double().abs())
    for result in zip(found, eager, exact, magnitude, strict=True):
        if result[0].is_floating_point():
            comparison = compare(*result)
            assert comparison, f"{name}: {comparison.detail}"
        else:
            assert torch.equal(result[0], result[1])


def same(name: str, *args: Any, config: Config | None = None, **options: Any) -> Any:
    """Hold a kernel to the very values of the reference; gives back the result."""
    found = getattr(kernels, name)(*args, **options, config=config)
    wanted = getattr(reference, name)(*args, **options)
    pairs = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
    for f, w in pairs:
        assert (f.shape, f.dtype) == (w.shape, w.dtype)
        assert equal(f, w).all(), f"{name}: got {f}, expected {w}"
    return found


@pytest.mark.parametrize("name", [name for name in vars(reference) if name.startswith("embedding_bag_")])
def test_signatures_are_those_of_the_contract_and_a_configuration(name: str) -> None:
    ours, wanted = (inspect.signature(getattr(module, name)) for module in (kernels, reference))
    *parameters, config = ours.parameters.values()
    assert ours.replace(parameters=parameters) == wanted
    assert (config.name, config.kind, config.default) == ("config", config.KEYWORD_ONLY, None)


@pytest.mark.parametrize(
    ("dtype", "dim", "types"),
    [
        (torch.float32, 5, (torch.int64, torch.int32)),
        (torch.float16, 12, (torch.int32, torch.int64)),
        (torch.bfloat16, 1, (torch.int32, torch.int32)),
        (torch.float64, 66, (torch.int64, torch.int64)),
    ],
)
@pytest.mark.parametrize("mean", [False, True])
def test_sum_and_mean(
    generator: torch.Generator, dtype: torch.dtype, dim: int, types: tuple[torch.dtype, ...], mean: bool
) -> None:
    indices, offsets = bags(generator, [3, 0, 11, 1], tail=2, types=types)
    weight, factors = normal(generator, R, dim, dtype=dtype), normal(generator, 17, dtype=dtype)
    grad = normal(generator, 4, dim, dtype=dtype)
    for given in (None, factors):
        agree("embedding_bag_forward", weight, indices, offsets, given, mean, **BAGS)
    of_entries = (grad, indices, offsets, factors if mean else None)
    agree("embedding_bag_backward", *of_entries, None, R, mean, **BAGS, scale_grad_by_freq=mean)
    agree("embedding_bag_backward_sparse", *of_entries, R, mean, **BAGS, scale_grad_by_freq=not mean)
    agree("embedding_bag_backward_per_sample_weights", grad, weight, indices, offsets, mean, **BAGS)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 5), (torch.float16, 12), (torch.float64, 66)])
def test_maximum(generator: torch.Generator, dtype: torch.dtype, dim: int) -> None:
    indices, offsets = bags(generator, [3, 0, 11, 1], tail=2)
    weight = normal(generator, R, dim, dtype=dtype).round()  # ties
    weight[1, ::2], weight[2] = torch.nan, -torch.inf
    _, argmax = same("embedding_bag_max_forward", weight, indices, offsets, **BAGS)
    grad = normal(generator, 4, dim, dtype=dtype)
    options = {"mean": False, **BAGS, "scale_grad_by_freq": False}
    agree("embedding_bag_backward", grad, indices, offsets, None, argmax, R, **options)


def test_maximum_of_bags_that_start_with_dead_entries_and_nan() -> None:
    weight = torch.tensor([[torch.nan], [-torch.inf], [5.0], [9.0]], device=DEVICE)
    lists = [[3, 0, 2], [3, -1, 1, 0], [0, 2], [2, 0], [1, 1], [3, 4]]
    indices = torch.tensor(list(itertools.chain(*lists)), device=DEVICE)
    offsets = torch.tensor([0, *map(len, lists)], device=DEVICE).cumsum(0)
    output, argmax = same("embedding_bag_max_forward", weight, indices, offsets, **BAGS)
    assert argmax.flatten().tolist() == [1, 2, 0, 0, 0, -1]
    assert output.isnan().flatten().tolist() == [True, False, True, False, False, False]


FORWARD_CONFIGS = [
    EmbeddingBagForwardConfig(8, 1, 8),
    EmbeddingBagForwardConfig(4, 2, 2),
    EmbeddingBagForwardConfig(1, 8, 4),
    EmbeddingBagForwardConfig(2, 4, 1, num_warps=2),
]
BACKWARD_CONFIGS = [
    EmbeddingBagBackwardConfig(8, 1, chunk=4, rows_in_flight=1),
    EmbeddingBagBackwardConfig(4, 2, chunk=8, rows_in_flight=8),
    EmbeddingBagBackwardConfig(1, 4, chunk=16, rows_in_flight=2),
    EmbeddingBagBackwardConfig(2, 1, chunk=64, rows_in_flight=4, num_warps=2),
]


def test_configurations_do_not_change_the_forward_by_a_bit(generator: torch.Generator) -> None:
    indices, offsets = bags(generator, [3, 0, 9, 1])
    weight, factors = normal(generator, R, 6), normal(generator, 13)
    output = kernels.embedding_bag_forward(weight, indices, offsets, factors, True, **BAGS)
    maximum = kernels.embedding_bag_max_forward(weight, indices, offsets, **BAGS)
    for config in FORWARD_CONFIGS:
        args = (weight, indices, offsets)
        other = kernels.embedding_bag_forward(*args, factors, True, **BAGS, config=config)
        others = kernels.embedding_bag_max_forward(*args, **BAGS, config=config)
        for found, wanted in zip((other, *others), (output, *maximum), strict=True):
            assert first_difference(found, wanted) is None


@pytest.mark.parametrize("config", BACKWARD_CONFIGS, ids=str)
def test_configurations_agree_on_gradients_of_rows(
    generator: torch.Generator, config: EmbeddingBagBackwardConfig
) -> None:
    indices, offsets = bags(generator, [30, 0, 41, 2], tail=2)
    grad, factors = normal(generator, 4, 3), normal(generator, 75)
    args = (grad, indices, offsets, factors)
    options = {**BAGS, "scale_grad_by_freq": False, "config": config}
    agree("embedding_bag_backward", *args, None, R, True, **options)
    agree("embedding_bag_backward_sparse", *args, R, True, **options)
    _, argmax = reference.embedding_bag_max_forward(normal(generator, R, 3), indices, offsets, **BAGS)
    agree("embedding_bag_backward", grad, indices, offsets, None, argmax, R, False, **options)


@pytest.mark.parametrize("config", FORWARD_CONFIGS, ids=str)
def test_configurations_agree_on_gradients_of_weights(
    generator: torch.Generator, config: EmbeddingBagForwardConfig
) -> None:
    indices, offsets = bags(generator, [3, 0, 9, 1])
    args = (normal(generator, 4, 6), normal(generator, R, 6), indices, offsets, True)
    agree("embedding_bag_backward_per_sample_weights", *args, **BAGS, config=config)


def test_an_invalid_configuration_is_refused(generator: torch.Generator) -> None:
    indices, offsets = bags(generator, [3, 2])
    weight, config = normal(generator, R, 6), EmbeddingBagForwardConfig(3, 1)
    with pytest.raises(ValueError, match=r"expected a valid configuration, got .*block_d=3"):
        kernels.embedding_bag_forward(weight, indices, offsets, None, False, **BAGS, config=config)


RUNS = [[1] * 9, [4, 4], [3, 1, 4], [8], [2, 7, 1, 1], [17], [1, 16, 1], [5, 1, 1, 1, 9], [6, 30, 6, 2, 40]]


@pytest.mark.parametrize("lengths", RUNS, ids=str)
@pytest.mark.parametrize("dead", [0, 3])
def test_runs_that_cross_chunks(generator: torch.Generator, lengths: list[int], dead: int) -> None:
    config = EmbeddingBagBackwardConfig(block_d=2, chunks_per_program=2, chunk=4, rows_in_flight=2)
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    indices = torch.cat([rows, torch.full((dead,), -1)])
    indices = indices[torch.randperm(len(indices), generator=generator)].to(DEVICE)
    offsets = torch.arange(0, len(indices), 2, device=DEVICE)
    grad = whole(generator, len(offsets), 3)
    rest = {"num_embeddings": len(lengths) + 1, "mean": False, **PLAIN, "scale_grad_by_freq": False}
    same("embedding_bag_backward", grad, indices, offsets, None, None, **rest, config=config)
    same("embedding_bag_backward_sparse", grad, indices, offsets, None, **rest, config=config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_giant_run_among_others(
    generator: torch.Generator, launches: list[tuple[str, int]], dtype: torch.dtype
) -> None:
    indices = torch.cat([torch.full((5000,), 4), torch.randint(0, 40, (300,), generator=generator)])
    indices = indices[torch.randperm(5300, generator=generator)].to(DEVICE)
    offsets = torch.arange(0, 5300, 50, device=DEVICE)
    grad = normal(generator, len(offsets), 4, dtype=dtype)
    rest = {"num_embeddings": 41, "mean": False, **PLAIN, "scale_grad_by_freq": False}
    agree("embedding_bag_backward", grad, indices, offsets, None, None, **rest)
    agree("embedding_bag_backward_sparse", grad, indices, offsets, None, **rest)
    first, second = (
        kernels.embedding_bag_backward(grad, indices, offsets, None, None, **rest) for _ in range(2)
    )
    assert first_difference(first, second) is None

    launches.clear()
    for ids in (indices, torch.arange(5300, device=DEVICE) % 41):
        kernels.embedding_bag_backward(grad, ids, offsets, None, None, **rest)
    assert launches[: len(launches) // 2] == launches[len(launches) // 2 :]  # a CUDA graph can hold them
    assert launches.count(("embedding_bag_backward_kernel", 1)) >= 2


def test_levels() -> None:
    assert kernels.levels(1, 32) == [1]
    assert kernels.levels(32, 32) == [32]
    assert kernels.levels(33, 32) == [33, 4]
    assert kernels.levels(10**6, 32) == [10**6, 62_500, 3_908, 246, 16]
    for chunk, num_terms in itertools.product((4, 8, 32), (*range(1, 100), 2**31 - 1)):
        levels = kernels.levels(num_terms, chunk)
        assert levels[-1] <= chunk and len(levels) <= 32
        assert all(after == 2 * -(-before // chunk) for before, after in itertools.pairwise(levels))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The name of each kernel that is launched, and how many programs of it."""
    found: list[tuple[str, int]] = []

    class Recorded:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int]) -> Any:
            found.append((self.name, *grid))
            return self.kernel[grid]

    for name, kernel in list(vars(kernels.kernels).items()):
        if name.endswith("_kernel"):
            monkeypatch.setattr(kernels.kernels, name, Recorded(name, kernel))
    return found


def test_grids_are_sliced_at_their_limit(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, launches: list[tuple[str, int]]
) -> None:
    indices, offsets = bags(generator, [3, 0, 9, 0, 0, 0, 2, 0, 1])
    weight, grad = normal(generator, R, 3), normal(generator, 9, 3)
    forward = EmbeddingBagForwardConfig(2, 1, 1)
    backward = EmbeddingBagBackwardConfig(2, 1, chunk=4, rows_in_flight=4)
    rest = {"num_embeddings": R, "mean": True, **BAGS, "scale_grad_by_freq": False, "config": backward}

    def run() -> tuple[tuple[Tensor, ...], dict[str, list[int]]]:
        launches.clear()
        with poisoned_memory():
            outputs = (
                kernels.embedding_bag_forward(weight, indices, offsets, None, True, **BAGS, config=forward),
                *kernels.embedding_bag_max_forward(weight, indices, offsets, **BAGS, config=forward),
                kernels.embedding_bag_backward(grad, indices, offsets, None, None, **rest),
                *kernels.embedding_bag_backward_sparse(grad, indices, offsets, None, **rest),
                kernels.embedding_bag_backward_per_sample_weights(
                    grad, weight, indices, offsets, True, **BAGS, config=forward
                ),
            )
        return outputs, {name: [n for other, n in launches if other == name] for name, _ in launches}

    wanted, whole_grids = run()
    monkeypatch.setattr(kernels, "MAX_PROGRAMS", 1)
    found, sliced = run()
    for f, w in zip(found, wanted, strict=True):
        assert first_difference(f, w) is None
    assert len(sliced) == 5
    assert all(max(whole_grids[name]) > 1 and set(sliced[name]) == {1} for name in sliced)
    assert all(sum(whole_grids[name]) == sum(sliced[name]) for name in sliced)


def test_more_programs_than_a_grid_takes() -> None:
    found = []

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda *args, first_program: found.append((first_program, *grid))

    limit = kernels.MAX_PROGRAMS
    assert limit < 2**31
    kernels.launch(Kernel(), 2 * limit + 5, torch.empty(0, device=DEVICE))
    assert found == [(0, limit), (limit, limit), (2 * limit, 5)]


@pytest.mark.parametrize(
    "layout", ["columns of a wider tensor", "transposed", "every second element", "expanded"]
)
def test_strided_weights(generator: torch.Generator, layout: str) -> None:
    indices, offsets = bags(generator, [3, 0, 5])
    weight = whole(generator, R, 4)
    weight = weight[:1].expand(R, 4) if layout == "expanded" else with_layout(weight, layout)
    same("embedding_bag_forward", weight, indices, offsets, None, False, **BAGS)
    same("embedding_bag_max_forward", weight, indices, offsets, **BAGS)
    grad = whole(generator, 3, 4)
    same("embedding_bag_backward_per_sample_weights", grad, weight, indices, offsets, False, **BAGS)


def untouched(*shape: int) -> Tensor:
    """fp16, of which only what is touched takes memory."""
    try:
        return torch.empty(shape, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"not enough memory: {error}")


def test_rows_past_two_to_the_31_elements() -> None:
    last, dim = 2**31 // 64 + 1, 64
    weight = untouched(last + 1, dim)
    weight[[0, last]] = torch.tensor([[1.0], [2.0]], dtype=torch.float16, device=DEVICE)
    args = (torch.tensor([last], device=DEVICE), torch.tensor([0], device=DEVICE))
    assert kernels.embedding_bag_forward(weight, *args, None, False, **PLAIN).eq(2).all()
    assert kernels.embedding_bag_max_forward(weight, *args, **PLAIN)[0].eq(2).all()
    grad = torch.ones(1, dim, dtype=torch.float16, device=DEVICE)
    assert kernels.embedding_bag_backward_per_sample_weights(grad, weight, *args, False, **PLAIN).eq(128)


def test_gradients_past_two_to_the_31_elements() -> None:
    last, dim = 2**31 // 64 + 1, 64
    grad, grad_output = untouched(last + 1, dim), untouched(last + 1, dim)
    grad[[0, last]] = 0
    grad_output[[0, last]] = torch.tensor([[1.0], [2.0]], dtype=torch.float16, device=DEVICE)
    rows = torch.full((70,), last, dtype=torch.int32, device=DEVICE)
    entries = kernels._Entries(rows, rows, None)
    order = torch.arange(70, device=DEVICE)
    kernels._sum_runs(grad, grad_output, rows, order, entries, None, order, None)
    assert grad[last].eq(140).all() and grad[0].eq(0).all()


def test_programs_past_two_to_the_31() -> None:
    dim = 2**31 + 5
    weight, output = untouched(1, dim), untouched(1, dim)
    weight[0, -1], output[0, -1] = 3, 0
    zero = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    kernels.kernels.embedding_bag_forward_kernel[(1,)](
        output,
        weight,
        zero[:1],
        zero[:1],
        None,
        *(1, 1, 1, 1, -1),
        first_program=dim - 1,
        D=dim,
        ROW_STRIDE=dim,
        COLUMN_STRIDE=1,
        MEAN=False,
        DROP_INVALID=True,
        ACCUMULATE=kernels.accumulate(weight.dtype),
        BLOCK_D=1,
        BAGS=1,
        ROWS=1,
    )
    assert output[0, -1] == 3


@pytest.mark.parametrize(
    ("indices", "offsets", "num_embeddings", "dim"),
    [
        pytest.param([1, 2], [0], 4, 3, id="no bags"),
        pytest.param([], [0, 0, 0], 4, 3, id="no entries"),
        pytest.param([], [0], 0, 3, id="nothing"),
        pytest.param([0, 5], [0, 1, 2], 0, 3, id="no rows"),
        pytest.param([1, 2], [0, 1, 2], 4, 0, id="no columns"),
        pytest.param([-1, 9, 9], [0, 2, 3], 4, 3, id="all dropped"),
    ],
)
def test_nothing_to_do(indices: list[int], offsets: list[int], num_embeddings: int, dim: int) -> None:
    ids = torch.tensor(indices, dtype=torch.int64, device=DEVICE)
    starts = torch.tensor(offsets, device=DEVICE)
    weight = torch.ones(num_embeddings, dim, device=DEVICE)
    grad = torch.ones(len(offsets) - 1, dim, device=DEVICE)
    with poisoned_memory():
        same("embedding_bag_forward", weight, ids, starts, None, True, **BAGS)
        if dim and len(offsets) > 1 and (indices or num_embeddings):
            same("embedding_bag_max_forward", weight, ids, starts, **BAGS)
        rest = {"num_embeddings": num_embeddings, "mean": True, **BAGS, "scale_grad_by_freq": True}
        same("embedding_bag_backward", grad, ids, starts, None, None, **rest)
        same("embedding_bag_backward_sparse", grad, ids, starts, None, **rest)
        same("embedding_bag_backward_per_sample_weights", grad, weight, ids, starts, True, **BAGS)


def test_nan_of_dead_entries_reaches_nothing(generator: torch.Generator) -> None:
    indices, offsets = bags(generator, [3, 0, 11, 1], tail=2)
    weight, factors, grad = whole(generator, R, 3), whole(generator, 17), whole(generator, 4, 3)
    weight[PADDING] = torch.nan
    dead = (indices < 0) | (indices >= R) | (indices == PADDING)
    dead[15:] = True
    factors[dead] = torch.nan
    same("embedding_bag_forward", weight, indices, offsets, factors, False, **BAGS)
    _, argmax = same("embedding_bag_max_forward", weight, indices, offsets, **BAGS)
    rest = {"num_embeddings": R, "mean": False, **BAGS, "scale_grad_by_freq": False}
    same("embedding_bag_backward", grad, indices, offsets, factors, None, **rest)
    same("embedding_bag_backward", grad, indices, offsets, None, argmax, **rest)
    same("embedding_bag_backward_sparse", grad, indices, offsets, factors, **rest)
    found = same("embedding_bag_backward_per_sample_weights", grad, weight, indices, offsets, False, **BAGS)
    assert dead.any() and not found[dead].any()


BAD = [
    pytest.param([0, 1], [1, 2], True, id="first offset"),
    pytest.param([0, 1], [0, 2, 1], False, id="decreasing offsets"),
    pytest.param([0, 1], [0, 3], False, id="offset past the end"),
    pytest.param([0, R, -1], [0, 3], False, id="index past the end"),
    pytest.param([0, 1, -5], [0, 3], True, id="negative index"),
]


@pytest.mark.skipif(
    DEVICE != "cpu", reason="on a GPU an assertion in the kernel ends the process's use of it"
)
@pytest.mark.parametrize(("indices", "offsets", "include_last_offset"), BAD)
def test_bad_values_are_refused_like_the_reference_does(
    indices: list[int], offsets: list[int], include_last_offset: bool
) -> None:
    ids, starts = torch.tensor(indices), torch.tensor(offsets)
    weight, grad = torch.ones(R, 2), torch.ones(len(offsets) - include_last_offset, 2)
    for drop_invalid in (False, True):
        options = {
            "padding_idx": -1,
            "include_last_offset": include_last_offset,
            "drop_invalid": drop_invalid,
        }
        frequency = {"scale_grad_by_freq": False}
        calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
            "embedding_bag_forward": ((weight, ids, starts, None, False), options),
            "embedding_bag_max_forward": ((weight, ids, starts), options),
            "embedding_bag_backward": ((grad, ids, starts, None, None, R, False), options | frequency),
            "embedding_bag_backward_sparse": ((grad, ids, starts, None, R, False), options | frequency),
            "embedding_bag_backward_per_sample_weights": ((grad, weight, ids, starts, False), options),
        }
        for name, (args, given) in calls.items():
            assert _message(kernels, name, args, given) == _message(reference, name, args, given)
    assert _message(reference, name, args, options | {"drop_invalid": False}) is not None


def _message(module: Any, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> str | None:
    try:
        getattr(module, name)(*args, **options)
    except RuntimeError as error:
        return str(error)
    return None


@pytest.fixture
def asserting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does: the kernels assert, and the host does not look."""
    from triton.runtime import interpreter

    options = dataclasses.replace(interpreter.interpreter_builder.options, **kernels.ASSERTING)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    monkeypatch.setattr(kernels, "check_values", lambda *args: None)


@pytest.mark.skipif(not INTERPRETED, reason="a failed assertion ends a process's use of the GPU")
@pytest.mark.usefixtures("asserting")
@pytest.mark.parametrize(
    ("indices", "offsets", "include_last_offset"), [*BAD, pytest.param([0, -1], [0], False, id="minus one")]
)
def test_kernels_assert_what_the_host_cannot_check(
    indices: list[int], offsets: list[int], include_last_offset: bool
) -> None:
    ids, starts = torch.tensor(indices), torch.tensor(offsets)
    weight, grad = torch.ones(R, 2), torch.ones(len(offsets) - include_last_offset, 2)
    options: dict[str, Any] = {
        "padding_idx": -1,
        "include_last_offset": include_last_offset,
        "drop_invalid": False,
    }
    for call in (
        lambda: kernels.embedding_bag_forward(weight, ids, starts, None, False, **options),
        lambda: kernels.embedding_bag_max_forward(weight, ids, starts, **options),
        lambda: kernels.embedding_bag_backward_per_sample_weights(
            grad, weight, ids, starts, False, **options
        ),
    ):
        with pytest.raises(Exception, match=r"embedding_bag: expected (indices in|offsets from 0)"):
            call()


@pytest.mark.usefixtures("asserting")
def test_kernels_assert_nothing_of_good_values(generator: torch.Generator) -> None:
    indices, offsets = (
        torch.tensor([PADDING, 1, 6, 99], device=DEVICE),
        torch.tensor([0, 0, 3], device=DEVICE),
    )
    same("embedding_bag_forward", whole(generator, R, 2), indices, offsets, None, True, PADDING, True, False)


def test_ids_after_the_last_bag_are_not_checked(generator: torch.Generator) -> None:
    indices, offsets = torch.tensor([1, 2, 99], device=DEVICE), torch.tensor([0, 2], device=DEVICE)
    same("embedding_bag_forward", whole(generator, R, 2), indices, offsets, None, False, -1, True, False)


def test_default_tiles_are_valid() -> None:
    dims = [1, 2, 3, 4, 5, 31, 32, 33, 100, 128, 1000, 1024, 1025, 8192]
    for dim, dtype, lanes in itertools.product(dims, (torch.float16, torch.float32, torch.float64), (32, 64)):
        for config in (EmbeddingBagForwardConfig, EmbeddingBagBackwardConfig):
            assert config.default(dim, dtype, lanes=lanes).is_valid
        assert EmbeddingBagBackwardConfig.default(dim, dtype, maximum=True, lanes=lanes).is_valid


@pytest.mark.parametrize(
    "config",
    [
        EmbeddingBagForwardConfig(12, 1),
        EmbeddingBagForwardConfig(128, 0),
        EmbeddingBagForwardConfig(1024, 64, 8, 1),
        EmbeddingBagForwardConfig(128, 1, 8, 64),
        EmbeddingBagBackwardConfig(128, 1, chunk=4, rows_in_flight=8),
        EmbeddingBagBackwardConfig(128, 1, chunk=24),
        EmbeddingBagBackwardConfig(128, 1, chunk=2, rows_in_flight=2),
    ],
)
def test_invalid_tiles(config: Config) -> None:
    assert not config.is_valid


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_through_the_public_function(generator: torch.Generator, sparse: bool) -> None:
    weight = whole(generator, R, 3).requires_grad_()
    factors = whole(generator, 8).requires_grad_()
    indices, offsets = (
        torch.tensor([5, 1, 1, 3, 5, 5, 0, 2], device=DEVICE),
        torch.tensor([0, 3], device=DEVICE),
    )
    found, wanted = (
        torch.autograd.grad(
            call(indices, weight, offsets, mode="sum", per_sample_weights=factors, sparse=sparse).sum(),
            (weight, factors),
        )
        for call in (_triton, torch.nn.functional.embedding_bag)
    )
    assert torch.equal(found[0].to_dense(), wanted[0].to_dense())
    assert torch.equal(found[1], wanted[1])
    assert not sparse or found[0].is_coalesced()


def _triton(*args: Any, **options: Any) -> Tensor:
    return recsys_ops.embedding_bag(*args, **options, backend="triton")

"""The Triton kernels of the collection: what is not the same for every backend."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys_ops.embedding_bag_collection import reference
from recsys_ops.embedding_bag_collection.layout import Layout, with_bags_of_one
from recsys_ops.embedding_bag_collection.row_optimizers import OPTIMIZERS, round_stochastically
from recsys_ops.embedding_bag_collection.row_quantization import FP8, quantize_rows
from recsys_ops.testing.tolerances import first_difference

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
if DEVICE == "cpu" and not INTERPRETED:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from recsys_ops.triton_kernels import embedding_bag as single  # noqa: E402
from recsys_ops.triton_kernels import embedding_bag_collection as kernels  # noqa: E402
from recsys_ops.triton_kernels import embedding_bag_collection_plans as plans  # noqa: E402
from recsys_ops.triton_kernels.embedding_bag import (  # noqa: E402
    EmbeddingBagBackwardConfig,
    EmbeddingBagForwardConfig,
)

B = 3


class Problem:
    """Small whole numbers, whose sums are exact in any order, looked up in tables of given widths."""

    def __init__(
        self,
        dims: tuple[int, ...],
        features: tuple[tuple[int, ...], ...] | None = None,
        pooling: tuple[str, ...] | None = None,
        rows: tuple[int, ...] | None = None,
        lengths: tuple[int, ...] = (2, 0, 5, 1, 3),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def whole(*shape: int) -> Tensor:
            return torch.randint(-4, 5, shape, generator=generator).to(DEVICE, torch.float32)

        rows = rows or (7,) * len(dims)
        self.layout = Layout(
            features or tuple((t,) for t in range(len(dims))), pooling or ("sum",) * len(dims), dims
        )
        placement = self.layout.side_by_side(B)
        self.lookups, self.size = placement.lookups, placement.size
        each = list(itertools.islice(itertools.cycle(lengths), B * self.layout.num_features))
        self.offsets = torch.tensor([0, *each]).cumsum(0).to(DEVICE)
        self.values = torch.randint(-1, min(rows) + 1, (sum(each),), generator=generator).to(DEVICE)
        self.factors = whole(sum(each))
        self.weights = [whole(r, d).to(dtype) for r, d in zip(rows, dims, strict=True)]
        self.grad_output = whole(self.size)

    @property
    def bags(self) -> tuple[Any, ...]:
        return self.values, self.offsets, self.factors, self.lookups, True

    def forward(self, module: Any, **options: Any) -> tuple[Tensor, Tensor]:
        output = self.values.new_empty(self.size, dtype=torch.float32)
        argmax = self.values.new_full((self.size,), -7, dtype=torch.int32)
        module.embedding_bag_collection_forward(output, argmax, self.weights, *self.bags, **options)
        return output, argmax

    def gradients(self, module: Any, **options: Any) -> list[Tensor]:
        argmax = self.forward(reference)[1]
        given = (self.grad_output, argmax, self.weights, *self.bags)
        dense = module.embedding_bag_collection_backward(*given, **options)
        sparse = module.embedding_bag_collection_backward_sparse(*given, **options)
        return [*dense, *sparse]

    def of_factors(self, module: Any, **options: Any) -> Tensor:
        bags = (self.values, self.offsets, self.lookups, True)
        name = "embedding_bag_collection_backward_per_sample_weights"
        return getattr(module, name)(self.grad_output, self.weights, *bags, **options)

    def update(
        self, module: Any, optimizer: str = "sgd", stochastic: bool = False, **options: Any
    ) -> list[Tensor]:
        weights = [w.clone() for w in self.weights]
        states = [torch.ones_like(w) for w in weights] if optimizer == "adagrad" else []
        hyperparameters = torch.tensor([0.125, 0, 0.5, 0.5, 0, 0, torch.inf, torch.inf], dtype=torch.float64)
        module.embedding_bag_collection_update(
            *(weights, states, torch.tensor(4), self.grad_output, self.forward(reference)[1], *self.bags),
            *(OPTIMIZERS.index(optimizer), hyperparameters, 2**40 + 3, stochastic),
            **options,
        )
        return [*weights, *states]


def same(found: Any, wanted: Any) -> None:
    for f, w in zip(found, wanted, strict=True):
        assert (f.shape, f.dtype) == (w.shape, w.dtype)
        assert first_difference(f, w) is None, f"got {f}, expected {w}"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each kernel that is launched."""
    found: list[str] = []

    class Recorded:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int]) -> Any:
            found.append(self.name.removeprefix("embedding_bag_collection_").removesuffix("_kernel"))
            return self.kernel[grid]

    for module in (kernels.kernels, kernels.backward_kernels):
        for name, kernel in list(vars(module).items()):
            if name.startswith("embedding_bag_collection_"):
                monkeypatch.setattr(module, name, Recorded(name, kernel))
    return found


@pytest.mark.parametrize(
    "name", [name for name in vars(reference) if name.startswith("embedding_bag_collection_")]
)
def test_signatures_are_those_of_the_contract_and_configurations(name: str) -> None:
    ours, wanted = (inspect.signature(getattr(module, name)) for module in (kernels, reference))
    configs = [p for p in ours.parameters.values() if p.kind == p.KEYWORD_ONLY]
    shared = [p for p in ours.parameters.values() if p.kind != p.KEYWORD_ONLY]
    assert ours.replace(parameters=shared) == wanted
    assert configs and all(p.name.endswith("config") and p.default is None for p in configs)


MANY_WIDTHS = Problem((3, 16, 130, 8, 16), rows=(4, 9, 3, 9, 2))
SHARED = Problem(
    (8, 1, 8, 1, 5),
    ((0,), (0,), (2, 1), (2, 1), (1,)),
    ("sum", "sum", "mean", "mean", "max"),
    (6, 6, 9, 9, 3),
)


@pytest.mark.parametrize("problem", [MANY_WIDTHS, SHARED], ids=["many widths", "shared"])
def test_agrees_with_the_reference(problem: Problem) -> None:
    same(problem.forward(kernels)[:1], problem.forward(reference)[:1])
    same(problem.update(kernels), problem.update(reference))
    if problem is MANY_WIDTHS:  # where no division makes an order of sums matter
        same(problem.gradients(kernels), problem.gradients(reference))
        same([problem.of_factors(kernels)], [problem.of_factors(reference)])


def test_one_launch_for_tables_of_similar_width(launches: list[str]) -> None:
    Problem((16, 24, 64)).forward(kernels)
    assert launches == ["forward"]
    launches.clear()
    Problem((16, 24, 64), pooling=("sum", "max", "mean")).forward(kernels)
    assert launches == ["forward"] * 2
    launches.clear()
    Problem((4, 256)).forward(kernels)
    assert launches == ["forward"] * 2


def test_tables_of_the_same_features_and_rows_share_keys(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sorts, sort = [], torch.sort
    monkeypatch.setattr(
        torch, "sort", lambda keys, **options: sorts.append(len(keys)) or sort(keys, **options)
    )
    problem = Problem((8, 1, 8, 1), ((0,), (0,), (1,), (1,)), rows=(6, 6, 9, 9))
    problem.update(kernels)
    assert sorts == [len(problem.values)]
    # One for the widths 8, one for the widths 1.
    assert launches == ["entry_starts", *["entries"] * 2, "backward", "update", "backward", "update"]


FORWARD_CONFIGS = [EmbeddingBagForwardConfig(8, 1, 8), EmbeddingBagForwardConfig(2, 4, 1, num_warps=2)]
BACKWARD_CONFIGS = [
    EmbeddingBagBackwardConfig(8, 1, chunk=4, rows_in_flight=1),
    EmbeddingBagBackwardConfig(1, 4, chunk=16, rows_in_flight=2),
]


@pytest.mark.parametrize("config", FORWARD_CONFIGS, ids=str)
def test_forward_configurations(config: EmbeddingBagForwardConfig) -> None:
    for problem in (MANY_WIDTHS, SHARED):
        same(problem.forward(kernels, config=config)[:1], problem.forward(kernels)[:1])
    same([MANY_WIDTHS.of_factors(kernels, config=config)], [MANY_WIDTHS.of_factors(reference)])


@pytest.mark.parametrize("config", BACKWARD_CONFIGS, ids=str)
def test_backward_configurations(config: EmbeddingBagBackwardConfig) -> None:
    problem = Problem((5, 5, 2), ((0, 1), (2,), (0, 1)), ("sum", "max", "sum"), (3, 2, 3), (1, 3, 12))
    same(problem.gradients(kernels, config=config), problem.gradients(reference))
    tile = kernels.EmbeddingBagCollectionUpdateConfig(2)
    found = problem.update(kernels, "adagrad", config=config, update_config=tile)
    same(found[3:], problem.update(reference, "adagrad")[3:])


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("config", [None, *FORWARD_CONFIGS], ids=str)
def test_quantized_configurations(format: str, config: EmbeddingBagForwardConfig | None) -> None:
    problem = Problem((6, 34), pooling=("sum", "max"))
    codes, scales = zip(*(quantize_rows(w, format) for w in problem.weights), strict=True)
    problem.factors = torch.ones_like(problem.factors)
    results = []
    for module, options in ((kernels, {"config": config}), (reference, {})):
        results.append(problem.grad_output.new_empty(problem.size))
        module.embedding_bag_collection_quantized_forward(
            *(results[-1], codes, scales, 4 if format == "int4" else 8, *problem.bags), **options
        )
    torch.testing.assert_close(*results)


def test_all_codes_of_fp8_are_decoded() -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(FP8).view(1, 256)
    scales = torch.tensor([[1.0, 0.0]], device=DEVICE)
    output = scales.new_empty(256)
    zero, offsets = torch.tensor([0], device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    lookups = torch.tensor([[0, reference.SUM, 0, 1, 0, 256]])
    kernels.embedding_bag_collection_quantized_forward(
        output, [codes], [scales], 8, zero, offsets, None, lookups, False
    )
    same([output.nan_to_num(500)], [0 + codes.float()[0].nan_to_num(500)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_the_same_to_the_bit(dtype: torch.dtype) -> None:
    problem = Problem((33, 8), dtype=dtype)
    problem.weights = [w + (257 if dtype == torch.bfloat16 else 2049) for w in problem.weights]
    given = (problem.grad_output, None, problem.weights)
    parts = reference.embedding_bag_collection_backward_sparse(*given, *problem.bags)
    for table, found in enumerate(problem.update(kernels, stochastic=True)):
        rows, sums = parts[2 * table : 2 * table + 2]
        exact = problem.weights[table].float()
        exact[rows] -= 0.125 * sums.float()
        exact[rows] = round_stochastically(exact[rows], dtype, 2**40 + 3, 5, 4 * table, rows)
        same([found], [exact.to(dtype)])
        assert not torch.equal(found, problem.update(kernels)[table])


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The plans that are built, where none is kept yet."""
    names: list[str] = []
    for name in ("pooling_plan", "entry_plan", "table_directory"):
        kept = getattr(plans, name)
        build = kept.build
        monkeypatch.setattr(kept, "plans", type(kept.plans)())
        monkeypatch.setattr(
            kept, "build", lambda *key, name=name, build=build: names.append(name) or build(*key)
        )
    yield names


def test_plans_are_kept_for_the_same_lookups_in_the_same_tables(built: list[str]) -> None:
    problem = Problem((4, 8))
    first = problem.forward(kernels)[0]
    same([problem.forward(kernels)[0]], [first])
    problem.values = problem.values.flip(0)
    problem.forward(kernels)
    assert built == ["pooling_plan"]
    problem.weights[1] = problem.weights[1].clone()
    problem.forward(kernels)
    assert built == ["pooling_plan"] * 2


def test_plans_of_lookups_that_were_changed_are_not_kept(built: list[str]) -> None:
    problem = Problem((4, 4))
    problem.forward(kernels)
    problem.lookups[:, 4] = problem.lookups[:, 4].flip(0)
    same(problem.forward(kernels)[:1], problem.forward(reference)[:1])
    assert built == ["pooling_plan"] * 2


def test_updates_in_place_keep_their_plans(built: list[str]) -> None:
    problem, states = Problem((4, 8)), []
    hyperparameters = torch.tensor([0.5, 0, 0, 0, 0, 0, torch.inf, torch.inf], dtype=torch.float64)
    step = torch.tensor(0)
    for _ in range(3):
        kernels.embedding_bag_collection_update(
            *(problem.weights, states, step, problem.grad_output, None, *problem.bags),
            *(OPTIMIZERS.index("sgd"), hyperparameters, 0, False),
        )
    assert step == 3
    assert sorted(built) == ["entry_plan", "table_directory"]


def test_plans_that_were_not_asked_for_last_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_KEPT", 2)
    cpu = torch.device("cpu")
    plain = plans.Kept(lambda device, key: key * 2)
    assert [plain(cpu, key) for key in (1, 2, 1, 3)] == [2, 4, 2, 6]
    assert list(plain.plans) == [(cpu, 1), (cpu, 3)]


def test_there_is_room_for_the_entries_of_any_layout() -> None:
    """Unused features leave gaps between bags, and sequences name entries for a second time."""
    lengths = torch.tensor([2, 0, 3, 1, 4, 2, 5, 0])  # of four features, two samples
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    bags = [(2 * f, 2) for f in range(4)]
    poolings = ("sum", "none")
    for looked_up in itertools.product(((0,), (2,), (3, 0), (1, 2, 3), (1, 1)), repeat=2):
        for pooling in itertools.product(poolings, repeat=2):
            layout = Layout(looked_up, pooling, (4, 4))
            ranges = [(int(offsets[2 * f]), int(offsets[2 * f + 2])) for f in layout.sequences]
            entries = {f: end - first for f, (first, end) in zip(layout.sequences, ranges, strict=True)}
            placed = layout.place(bags, entries, len(offsets) - 1, apart=True)
            starts = with_bags_of_one(offsets, ranges)
            lookups = tuple(reference.each_lookup(placed.lookups))
            plan = plans.entry_plan(torch.device("cpu"), lookups, (9, 9), ((4,), (4,)))
            needed = sum(int(starts[end] - starts[first]) for first, end in plan.ranges)
            assert needed <= plan.num_entries(starts.to("meta"), int(offsets[-1]))


def untouched(*shape: int) -> Tensor:
    """bf16, of which only what is touched takes memory."""
    try:
        return torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"not enough memory: {error}")


def test_rows_past_two_to_the_31_elements() -> None:
    last, dim = 2**31 // 64 + 1, 64
    weight = untouched(last + 1, dim)
    weight[[0, last]] = torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16, device=DEVICE)
    small = torch.ones(3, dim, device=DEVICE)
    values, offsets = torch.tensor([1, last], device=DEVICE), torch.tensor([0, 1, 2], device=DEVICE)
    lookups = torch.tensor([[0, reference.SUM, 0, 1, 0, dim], [1, reference.SUM, 1, 1, dim, dim]])
    bags = (values, offsets, None, lookups, False)
    output = torch.empty(2 * dim, device=DEVICE)
    kernels.embedding_bag_collection_forward(output, None, [small, weight], *bags)
    assert output[:dim].eq(1).all() and output[dim:].eq(2).all()
    hyperparameters = torch.tensor([0.5, 0, 0, 0, 0, 0, torch.inf, torch.inf], dtype=torch.float64)
    kernels.embedding_bag_collection_update(
        *([small, weight], [], torch.tensor(0), output, None, *bags),
        *(OPTIMIZERS.index("sgd"), hyperparameters, 0, False),
    )
    assert weight[last].eq(1).all() and weight[0].eq(1).all() and small[1].eq(0.5).all()


@pytest.fixture
def asserting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does: the kernels assert, and the host does not look."""
    from triton.runtime import interpreter

    options = dataclasses.replace(interpreter.interpreter_builder.options, **single.ASSERTING)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    monkeypatch.setattr(kernels, "check_lookups", lambda *args: None)


@pytest.mark.skipif(not INTERPRETED, reason="a failed assertion ends a process's use of the GPU")
@pytest.mark.usefixtures("asserting")
@pytest.mark.parametrize(("at", "value"), [(3, 7), (0, -1)])
def test_kernels_assert_what_the_host_cannot_check(at: int, value: int) -> None:
    problem = Problem((4, 4))
    problem.values.clamp_(0, 6)
    bags = (*problem.bags[:-1], False)
    given = (problem.grad_output, None, problem.weights)
    kernels.embedding_bag_collection_backward(*given, *bags)
    problem.values[at] = value
    output = torch.empty(problem.size)
    for call in (
        lambda: kernels.embedding_bag_collection_forward(output, None, problem.weights, *bags),
        lambda: kernels.embedding_bag_collection_backward(*given, *bags),
    ):
        with pytest.raises(Exception, match="expected indices in"):
            call()


def test_default_tiles_are_valid() -> None:
    for dim, lanes in itertools.product((1, 2, 5, 33, 128, 1000, 8192), (32, 64)):
        assert kernels.EmbeddingBagCollectionUpdateConfig.default(dim, lanes).is_valid
    assert not kernels.EmbeddingBagCollectionUpdateConfig(3).is_valid
    with pytest.raises(ValueError, match=r"expected a valid configuration, got .*rows_per_program=3"):
        Problem((4,)).update(kernels, update_config=kernels.EmbeddingBagCollectionUpdateConfig(3))

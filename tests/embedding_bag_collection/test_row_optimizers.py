"""The fused updates are those of the textbook and of torch.optim, on every backend and in every layout."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embedding_bag_collection import textbook
from embedding_bag_collection.textbook import Bags, Settings
from recsys_ops.embedding_bag_collection import api
from recsys_ops.embedding_bag_collection.autograd import KERNELS, FusedUpdate
from recsys_ops.embedding_bag_collection.cases import SPEC
from recsys_ops.embedding_bag_collection.layout import Layout, Placement
from recsys_ops.embedding_bag_collection.row_optimizers import OPTIMIZERS, STATES
from recsys_ops.testing import Target, targets
from recsys_ops.testing.tolerances import first_difference

TARGETS = [target for target in targets(SPEC.operator)[0] if not target.interpreted]
FLOATS = {
    "fp32": (torch.float32,) * 3,
    "fp16": (torch.float16,) * 3,
    "bf16": (torch.bfloat16,) * 3,
    "mixed": (torch.bfloat16, torch.float32, torch.float16),
    "fp64": (torch.float64,) * 3,
}
SETTINGS = {
    "plain": {},
    "weight decay": {"weight_decay": 0.5},
    "decoupled weight decay": {"decoupled_weight_decay": 0.5},
    "clamped": {"max_gradient": 0.5},
    "of limited norm": {"max_gradient_norm": 0.75},
    "all at once": {
        "weight_decay": 0.5,
        "decoupled_weight_decay": 0.25,
        "max_gradient": 1.0,
        "max_gradient_norm": 1.5,
    },
}


@dataclass(frozen=True)
class Setup:
    """Which features look up which tables, and how."""

    features: tuple[tuple[int, ...], ...] = ((0,), (1,), (2,))
    pooling: tuple[str, ...] = ("sum", "mean", "sum")
    batch_sizes: tuple[int, ...] = (3, 3, 3)
    rows: tuple[int, ...] = (9, 6, 7)
    dims: tuple[int, ...] = (3, 8, 17)
    weighted: bool = False
    invalid: bool = False
    apart: bool = False


SETUPS = {
    "a feature for each table": Setup(weighted=True),
    "features and tables shared": Setup(((0, 2), (1,), (1, 0)), ("sum", "mean", "mean")),
    "different batch sizes": Setup(((0, 1), (1,), (2, 0)), batch_sizes=(3, 5, 0), apart=True),
    "weighted means": Setup(((0, 1), (1,), (0,)), ("mean",) * 3, (4, 2), weighted=True, apart=True),
    "dropped ids": Setup(weighted=True, invalid=True, pooling=("mean", "sum", "mean")),
    "maxima": Setup(((0, 1), (1,), (2,)), ("max", "sum", "max"), (4, 4, 4)),
}


class Trained:
    """Tables with the states of an optimizer, one batch of bags for them, and the gradient of its output."""

    def __init__(self, setup: Setup, optimizer: str, floats: Sequence[torch.dtype], device: str) -> None:
        generator = np.random.default_rng(7)
        self.setup, self.optimizer = setup, optimizer
        self.wide = torch.float64 if torch.float64 in floats else torch.float32
        named = max(setup.rows) if setup.invalid else min(setup.rows)
        self.bags = Bags([], [], setup.features, setup.pooling)
        for size in setup.batch_sizes:
            lengths = generator.integers(0, 6, size)
            self.bags.ids.append(
                [(generator.integers(0, named, n) - setup.invalid).tolist() for n in lengths]
            )
            self.bags.factors.append(
                [
                    (generator.integers(-8, 9, n) / 4 if setup.weighted else np.ones(n)).tolist()
                    for n in lengths
                ]
            )

        def tensor(values: Any, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        flat = [bag for feature in self.bags.ids for bag in feature]
        factors = [w for feature in self.bags.factors for bag in feature for w in bag]
        self.values = tensor(list(itertools.chain(*flat)), torch.int64)
        self.offsets = tensor([0, *itertools.accumulate(map(len, flat))], torch.int64)
        self.factors = tensor(factors, self.wide) if setup.weighted else None
        self.weights, self.states = [], []
        for rows, dim, dtype in zip(setup.rows, setup.dims, floats, strict=True):
            self.weights.append(tensor(generator.normal(size=(rows, dim)), dtype))
            for name, rowwise in STATES[OPTIMIZERS.index(optimizer)].items():
                state = generator.normal(size=(rows,) if rowwise else (rows, dim))
                self.states.append(tensor(state if name == "exp_avg" else state**2, dtype))
        self.step = torch.tensor(4)
        self.grad_output = tensor(generator.normal(size=self.placement.size), self.wide)

    @property
    def placement(self) -> Placement:
        setup = self.setup
        ends = list(itertools.accumulate(setup.batch_sizes, initial=0))
        bags = list(zip(ends[:-1], setup.batch_sizes, strict=True))
        return self.layout.place(bags, apart=setup.apart)

    @property
    def layout(self) -> Layout:
        return Layout(self.setup.features, self.setup.pooling, self.setup.dims)

    def tensors(self) -> list[Tensor]:
        return [*self.weights, *self.states]

    def fused(self, settings: Settings, seed: int = 0, stochastic: bool = False) -> FusedUpdate:
        hyperparameters = torch.tensor(astuple(settings), dtype=torch.float64)
        kind = OPTIMIZERS.index(self.optimizer)
        return FusedUpdate(self.states, self.step, kind, hyperparameters, seed, stochastic)

    def train(self, target: Target, settings: Settings, **rounding: Any) -> None:
        """One step, through autograd."""
        with target.active():
            output = api.collection(
                self.weights,
                self.values,
                self.offsets,
                self.factors,
                self.placement,
                self.wide,
                self.setup.invalid,
                self.layout.has_max,
                update=self.fused(settings, **rounding),
                backend=target.backend,
            )
            output.backward(self.grad_output)

    def train_by_kernel(self, target: Target, settings: Settings) -> None:
        """One step, by a call of the kernel; for sums and means."""
        fused = self.fused(settings)
        with target.active():
            KERNELS[target.backend].embedding_bag_collection_update(
                self.weights,
                fused.states,
                fused.step,
                self.grad_output,
                None,
                self.values,
                self.offsets,
                self.factors,
                self.placement.lookups,
                self.setup.invalid,
                fused.optimizer,
                fused.hyperparameters,
                fused.seed,
                fused.stochastic_rounding,
            )

    def by_the_textbook(self, settings: Settings) -> list[np.ndarray[Any, Any]]:
        """Weights and states as the next step should leave them, in fp64."""
        weights, states = (
            [t.double().cpu().numpy().copy() for t in ts] for ts in (self.weights, self.states)
        )
        upstream = [block.of(self.grad_output).double().cpu().numpy() for block in self.placement.blocks]
        each = len(states) // len(weights)
        for table, touched in enumerate(textbook.gradients(self.bags, weights, upstream)):
            own = states[table * each : (table + 1) * each]
            textbook.update(self.optimizer, weights[table], own, touched, settings, int(self.step) + 1)
        return [*weights, *states]


def agree(found: Sequence[Tensor], wanted: Sequence[np.ndarray[Any, Any]]) -> bool:
    """Whether tensors are what fp64 gives, rounded once to their dtype."""
    for tensor, exact in zip(found, map(torch.from_numpy, wanted), strict=True):
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        rounded = torch.finfo(tensor.dtype).eps / 2 * (tensor.dtype != wide)
        allowed = exact.abs() * rounded + 32 * torch.finfo(wide).eps * (1 + exact.abs())
        if not bool(((tensor.cpu().double() - exact).abs() <= allowed).all()):
            return False
    return True


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_steps_are_those_of_the_textbook(target: Target, optimizer: str, setup: str) -> None:
    for (what, chosen), floats in itertools.product(SETTINGS.items(), FLOATS):
        trained = Trained(SETUPS[setup], optimizer, FLOATS[floats], target.device)
        settings = Settings(**chosen)
        for step in range(2 if what in ("plain", "all at once") else 1):
            described = f"{what}, {floats}, step {step}"
            wanted, plain = trained.by_the_textbook(settings), trained.by_the_textbook(Settings())
            before = [t.clone() for t in trained.weights]
            trained.train(target, settings)
            assert agree(trained.tensors(), wanted), described
            # A test that an update without the setting would pass too proves nothing.
            assert not chosen or not agree(trained.tensors(), plain), described
            assert not any(map(torch.equal, trained.weights, before)), described
            assert int(trained.step) == 5 + step


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_each_table_is_decayed(target: Target, optimizer: str) -> None:
    """On every path: fp32 or half, alone or with others, by one feature or two."""
    for decay, setup, floats in itertools.product(
        ("weight_decay", "decoupled_weight_decay"), SETUPS.values(), ("fp32", "bf16", "mixed")
    ):
        with_decay, without = (Trained(setup, optimizer, FLOATS[floats], target.device) for _ in range(2))
        with_decay.train(target, Settings(**{decay: 0.5}))
        without.train(target, Settings())
        for table, (decayed, not_decayed) in enumerate(zip(with_decay.weights, without.weights, strict=True)):
            touched = (
                not_decayed != Trained(setup, optimizer, FLOATS[floats], target.device).weights[table]
            ).any(1)
            assert bool(touched.any())
            # Of a half, a row may round to the same.
            assert float((decayed != not_decayed).any(1)[touched].double().mean()) > 0.5


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_kernel_does_what_autograd_does(target: Target) -> None:
    for optimizer, setup, floats in itertools.product(OPTIMIZERS, SETUPS, FLOATS.values()):
        if setup == "maxima":
            continue
        settings = Settings(**SETTINGS["all at once"])
        by_autograd, by_kernel = (Trained(SETUPS[setup], optimizer, floats, target.device) for _ in range(2))
        by_autograd.train(target, settings)
        by_kernel.train_by_kernel(target, settings)
        for found, wanted in zip(by_kernel.tensors(), by_autograd.tensors(), strict=True):
            assert first_difference(found, wanted) is None


SAME_IN_TORCH: dict[str, tuple[str, dict[str, Any], Any]] = {
    "SGD": ("sgd", {}, lambda p: torch.optim.SGD(p, 0.25)),
    "SGD with decay": (
        "sgd",
        {"weight_decay": 0.5},
        lambda p: torch.optim.SGD(p, 0.25, weight_decay=0.5),
    ),
    "Adagrad": (
        "adagrad",
        {"weight_decay": 0.5},
        lambda p: torch.optim.Adagrad(p, 0.25, weight_decay=0.5, eps=2**-7),
    ),
    "Adam": (
        "adam",
        {"weight_decay": 0.5},
        lambda p: torch.optim.Adam(p, 0.25, (0.75, 0.875), 2**-7, 0.5),
    ),
    "AdamW": (
        "adam",
        {"decoupled_weight_decay": 0.5},
        lambda p: torch.optim.AdamW(p, 0.25, (0.75, 0.875), 2**-7, 0.5),
    ),
    # Adds its eps before the correction of the bias, so that only a small one is the same.
    "SparseAdam": (
        "adam",
        {"eps": 1e-12},
        lambda p: torch.optim.SparseAdam(p, 0.25, (0.75, 0.875), 1e-12),
    ),
}


@pytest.mark.parametrize("name", SAME_IN_TORCH)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_steps_are_those_of_torch(target: Target, name: str) -> None:
    """Of dense gradients in which every row is touched; of sparse ones, in which some are not."""
    optimizer, chosen, build = SAME_IN_TORCH[name]
    sparse = name == "SparseAdam"
    setup = replace(SETUPS["features and tables shared"], batch_sizes=(6, 6, 6))
    trained = Trained(setup, optimizer, FLOATS["fp32"], target.device)
    if not sparse:
        rows = torch.arange(len(trained.values), device=target.device) % max(setup.rows)
        trained.values = rows % min(setup.rows)
        setup = replace(setup, rows=(min(setup.rows),) * 3)
        trained.weights = [w[: min(setup.rows)].clone() for w in trained.weights]
    trained.states = [
        torch.zeros_like(w) for w in trained.weights for _ in STATES[OPTIMIZERS.index(optimizer)]
    ]
    trained.step.zero_()
    leaves = [w.clone().requires_grad_() for w in trained.weights]
    torch_optimizer = build(leaves)
    for _ in range(4):
        trained.train(target, Settings(**chosen))
        torch_optimizer.zero_grad()
        output = api.embedding_bag_collection(
            trained.values,
            trained.offsets,
            leaves,
            setup.features,
            setup.pooling,
            sparse=sparse,
            backend=target.backend,
        )
        output.backward(trained.grad_output.view_as(output))
        torch_optimizer.step()
        for found, wanted in zip(trained.weights, leaves, strict=True):
            assert torch.allclose(found, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_row_named_often_is_updated_once(target: Target, optimizer: str) -> None:
    """Three entries of one row are one entry of three times the gradient, to the bit."""
    results = []
    for ids, times in (([2, 2, 2], 1.0), ([2], 3.0)):
        trained = Trained(
            Setup(((0,),), ("sum",), (1,), (4,), (6,)), optimizer, FLOATS["fp32"][:1], target.device
        )
        trained.values = torch.tensor(ids, device=target.device)
        trained.offsets = torch.tensor([0, len(ids)], device=target.device)
        trained.grad_output = times * torch.arange(-3.0, 3.0, device=target.device)
        trained.train(target, Settings(weight_decay=0.5))
        results.append(trained.tensors())
    for found, wanted in zip(*results, strict=True):
        assert first_difference(found, wanted) is None


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_empty_bags_only_count_a_step(target: Target, optimizer: str) -> None:
    for floats, stochastic in itertools.product(FLOATS.values(), (False, True)):
        trained = Trained(SETUPS["features and tables shared"], optimizer, floats, target.device)
        settings = Settings(weight_decay=0.5, decoupled_weight_decay=0.5)
        trained.train(target, settings, stochastic=stochastic)
        before = [t.clone() for t in trained.tensors()]
        trained.values, trained.offsets = trained.values[:0], torch.zeros_like(trained.offsets)
        trained.train(target, settings, stochastic=stochastic)
        assert int(trained.step) == 6
        for found, wanted in zip(trained.tensors(), before, strict=True):
            assert first_difference(found, wanted) is None


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_refused_update_changes_nothing(target: Target, optimizer: str) -> None:
    if not target.on_cpu:
        pytest.skip("a GPU refuses by an assertion, after which its memory cannot be read")
    trained = Trained(SETUPS["features and tables shared"], optimizer, FLOATS["fp32"], target.device)
    before = [t.clone() for t in trained.tensors()]
    trained.values[-1] = max(trained.setup.rows)
    with pytest.raises(RuntimeError, match="expected values in"):
        trained.train_by_kernel(target, Settings())
    assert int(trained.step) == 4
    assert all(map(torch.equal, trained.tensors(), before))


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_per_sample_weights_get_the_gradient_of_before_the_update(target: Target) -> None:
    trained = Trained(SETUPS["weighted means"], "sgd", FLOATS["fp32"], target.device)
    assert trained.factors is not None
    setup, factors = trained.setup, trained.factors.clone().requires_grad_()
    outputs = api.embedding_bag_collection(
        trained.values,
        trained.offsets,
        trained.weights,
        setup.features,
        setup.pooling,
        factors,
        batch_sizes=setup.batch_sizes,
        backend="reference",
    )
    upstream = [block.of(trained.grad_output) for block in trained.placement.blocks]
    (wanted,) = torch.autograd.grad(outputs, factors, upstream)
    trained.factors.requires_grad_()
    trained.train(target, Settings())
    assert torch.allclose(trained.factors.grad, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_nothing_is_trained_without_gradients(target: Target) -> None:
    trained = Trained(SETUPS["dropped ids"], "adam", FLOATS["fp32"], target.device)
    with torch.no_grad(), target.active():
        output = api.collection(
            trained.weights,
            trained.values,
            trained.offsets,
            trained.factors,
            trained.placement,
            torch.float32,
            True,
            False,
            update=trained.fused(Settings()),
            backend=target.backend,
        )
    assert not output.requires_grad

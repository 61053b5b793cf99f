"""Which swaps are kept: comparisons, decisions by injected timings, and runs that leave no trace."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate_model import ALL, Model, reason, status, timed, types
from torch import Tensor, nn

import recsys_ops
from recsys_ops.acceleration import pooling as pooling
from recsys_ops.embedding_bag import modules as bag_modules
from recsys_ops.timing import Ratio


@pytest.mark.parametrize(
    "wrap",
    [
        lambda ids, weights: (ids, weights),
        lambda ids, weights: {"ids": ids, "weights": weights},
        lambda ids, weights: [(ids, weights), {"ids": ids[:3], "weights": weights[:3]}],
    ],
)
def test_sample_inputs(model: Model, inputs: tuple[Tensor, Tensor], wrap: Callable[..., Any]) -> None:
    report = recsys_ops.accelerate(model, wrap(*inputs), measure=timed(2))
    assert status(report) == dict.fromkeys(ALL, "kept")
    assert report.agrees and report.parity is not None and report.parity.holds
    assert report.forward == Ratio(2, 1.99, 2.01)


class Request(NamedTuple):
    ids: Tensor


class TakesRequest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 2)

    def forward(self, request: Request) -> Tensor:
        return self.bag(request.ids)


def test_a_named_tuple_is_the_only_argument() -> None:
    request = Request(torch.tensor([[1, 2]]))
    assert recsys_ops.accelerate(TakesRequest(), request, measure=timed(2)).accelerated == ("bag",)


def test_a_single_tensor_is_the_only_argument() -> None:
    bag = nn.EmbeddingBag(5, 2)
    assert recsys_ops.accelerate(bag, torch.tensor([[1, 2]]), measure=timed(2)).accelerated == ("",)


def test_sample_inputs_must_not_be_empty(model: Model) -> None:
    with pytest.raises(ValueError, match="expected sample_inputs to hold at least one batch"):
        recsys_ops.accelerate(model, [])


@pytest.mark.parametrize(
    ("ratio", "low", "kept"),
    [(1.2, 1.1, True), (1.02, 0.99, True), (1.05, 0.97, False), (1.0, 0.99, False), (0.9, 0.8, False)],
)
def test_keeps_what_is_faster(ratio: float, low: float, kept: bool) -> None:
    bag = nn.EmbeddingBag(5, 2)
    report = recsys_ops.accelerate(bag, torch.tensor([[1]]), measure=lambda *_: Ratio(ratio, low, 2))
    assert report.modules[0].status == ("kept" if kept else "put back")
    assert (type(bag) is recsys_ops.nn.EmbeddingBag) is kept
    assert (report.forward is not None) is kept


@pytest.mark.parametrize(
    ("training", "trained", "ratios", "expected"),
    [
        (True, True, (2, 0.5), "put back"),
        (True, True, (0.5, 2), "kept"),
        (False, True, (2, 0.5), "kept"),
        (False, True, (0.5, 2), "put back"),
        (True, False, (2,), "kept"),
    ],
)
def test_training_decides_by_the_step_and_evaluation_by_the_forward(
    training: bool, trained: bool, ratios: tuple[float, ...], expected: str
) -> None:
    bag = nn.EmbeddingBag(5, 2).train(training).requires_grad_(trained)
    entry = recsys_ops.accelerate(bag, torch.tensor([[1]]), measure=timed(*ratios)).modules[0]
    assert entry.status == expected
    assert (entry.step is not None) is trained


def test_each_swap_is_judged_by_itself(model: Model, inputs: tuple[Tensor, Tensor]) -> None:
    report = recsys_ops.accelerate(model.eval(), inputs, measure=timed(2, 2, 0.9, 2, 2, 2, 0.8, 2, 1.5, 1.4))
    assert report.accelerated == ("genres", "clicks")
    assert status(report)["words"] == status(report)["history"] == "put back"
    assert type(model.words) is nn.EmbeddingBag and type(model.history) is nn.Embedding
    assert type(model) is Model
    assert (report.forward.value, report.step.value) == (1.5, 1.4)


def test_what_the_samples_never_reach_is_put_back(model: Model, inputs: tuple[Tensor, Tensor]) -> None:
    model.unused = nn.EmbeddingBag(5, 2)
    report = recsys_ops.accelerate(model, inputs, measure=timed(2))
    assert status(report)["unused"] == "put back"
    assert reason(report, "unused") == "the sample inputs never reach it"
    assert type(model.unused) is nn.EmbeddingBag


def test_leaves_no_trace(model: Model, inputs: tuple[Tensor, Tensor]) -> None:
    model.bounded = nn.EmbeddingBag(20, 8, max_norm=0.1)
    model.tower.register_forward_hook(
        lambda module, args, output: output + model.bounded(inputs[0][:, :2]).sum()
    )
    model.tower[0].eval()
    model.score.weight.grad = torch.ones(1, 16)
    model.score.requires_grad_(False)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1)
    state, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random.seed(3), np.random.seed(3), torch.manual_seed(3)

    report = recsys_ops.accelerate(model, inputs, measure=timed(2))

    assert report.accelerated == (*ALL, "bounded")
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert [m.training for m in model.modules()] == flags
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert torch.equal(model.score.weight.grad, torch.ones(1, 16))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "score.weight")
    assert not model.score.weight.requires_grad
    assert model.calls == 0 and not hasattr(model, "last")
    assert not inputs[1].requires_grad
    assert all(not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_midway_leaves_the_model_as_it_was(
    model: Model, inputs: tuple[Tensor, Tensor], error: type[BaseException]
) -> None:
    before, state = types(model), copy.deepcopy(model.state_dict())
    attributes = [set(module.__dict__) for module in model.modules()]
    for at in (1, 4, 9):
        turns = iter(range(at))

        def measure(before: Any, after: Any, turns: Any = turns) -> Ratio:
            if next(turns, None) is None:
                raise error("midway")
            return timed(2)(before, after)

        with pytest.raises(error, match="midway"):
            recsys_ops.accelerate(model, inputs, measure=measure)
        assert types(model) == before
        assert [set(module.__dict__) for module in model.modules()] == attributes
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_errors_of_the_model_come_through(model: Model, inputs: tuple[Tensor, Tensor]) -> None:
    before = types(model)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        recsys_ops.accelerate(model, inputs[0])
    assert types(model) == before


def test_works_under_autocast(model: Model, inputs: tuple[Tensor, Tensor]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert recsys_ops.accelerate(model, inputs, measure=timed(2)).accelerated == ALL


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_works_in_other_precisions(model: Model, inputs: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    report = recsys_ops.accelerate(model.to(dtype), (inputs[0], inputs[1].to(dtype)), measure=timed(2))
    assert report.accelerated == ALL


def test_works_where_gradients_are_off(model: Model, inputs: tuple[Tensor, Tensor]) -> None:
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            report = recsys_ops.accelerate(recsys_ops.restore(model), inputs, measure=timed(2))
        assert report.accelerated == ALL
        assert all(m.step is not None for m in report.modules)


def test_default_measure_times_both_sides() -> None:
    bag = nn.EmbeddingBag(50, 4, mode="sum")
    entry = recsys_ops.accelerate(bag, torch.randint(0, 50, (4, 3))).modules[0]
    assert entry.status in ("kept", "put back")
    assert 0 < entry.forward.low <= entry.forward.value <= entry.forward.high
    assert entry.step is not None


def mutants() -> dict[str, Callable[..., Tensor]]:
    """Wrong lookups that look right at a glance."""
    right = bag_modules.embedding_bag

    def scaled(*args: Any, **kwargs: Any) -> Tensor:
        return right(*args, **kwargs) * (1 + 1e-4)

    def scaled_a_little(*args: Any, **kwargs: Any) -> Tensor:
        return right(*args, **kwargs) * (1 + 2e-6)

    def detached(*args: Any, **kwargs: Any) -> Tensor:
        result = right(*args, **kwargs)
        return 0.5 * result + 0.5 * result.detach()

    def last_entry_dropped(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kept = torch.ones_like(input)
        kept[-1, -1] = 0
        return right(input * kept, weight, *args, **kwargs)

    def raising(*args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("not here")

    def transposed(*args: Any, **kwargs: Any) -> Tensor:
        return right(*args, **kwargs).T

    return {
        f.__name__: f for f in (scaled, scaled_a_little, detached, last_entry_dropped, raising, transposed)
    }


@pytest.mark.parametrize("name", mutants())
def test_a_wrong_lookup_is_put_back(
    model: Model, inputs: tuple[Tensor, Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = types(model)
    mutant = mutants()[name]
    for module in (bag_modules, pooling):
        monkeypatch.setattr(module, "embedding_bag", mutant)
    report = recsys_ops.accelerate(model, inputs, measure=timed(2))
    assert status(report) == dict.fromkeys(ALL, "put back")
    assert all(m.parity is not None and not m.parity.holds for m in report.modules)
    assert not report.agrees and not report.to_dict()["agrees"]
    json.dumps(report.to_dict(), allow_nan=False)
    assert "put back" in str(report)
    assert types(model) == before


@pytest.mark.parametrize("name", [name for name in mutants() if name != "scaled_a_little"])
def test_a_lookup_that_is_wrong_only_in_the_model_puts_all_back(
    model: Model, inputs: tuple[Tensor, Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, right, wrong = types(model), bag_modules.embedding_bag, mutants()[name]

    def embedding_bag(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (wrong if weight.shape[0] == 40 else right)(input, weight, *args, **kwargs)

    monkeypatch.setattr(bag_modules, "embedding_bag", embedding_bag)
    measure = lambda *_: Ratio(2, 2, 2)  # noqa: E731
    report = recsys_ops.accelerate(model, inputs, exclude=("genres", "words"), measure=measure)
    assert status(report)["clicks"] == status(report)["history"] == "put back"
    assert report.parity is not None and not report.parity.holds and not report.agrees
    assert reason(report, "clicks").startswith("the whole model differs: ")
    assert types(model) == before


class Unseeded(nn.Module):
    """Draws from a generator of its own, so that no two runs agree."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 2)
        self.generator = torch.Generator()

    def forward(self, ids: Tensor) -> Tensor:
        return self.bag(ids) + torch.rand(1, generator=self.generator)


def test_a_model_that_differs_from_run_to_run_proves_nothing() -> None:
    model = Unseeded()
    with pytest.raises(ValueError, match="expected a model that gives the same output"):
        recsys_ops.accelerate(model, torch.tensor([[1, 2]]), measure=timed(2))
    assert type(model.bag) is nn.EmbeddingBag


def test_outputs_must_be_comparable() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(5, 2)

        def forward(self, ids: Tensor) -> dict[str, object]:
            return {"result": object(), "rows": self.bag(ids)}

    with pytest.raises(TypeError, match=r"returns tensors, in tuples, lists and dicts, got object in output"):
        recsys_ops.accelerate(Wrapped(), torch.tensor([[1, 2]]), measure=timed(2))

"""Trains a model as it is and accelerated, from the same state on the same batches, and compares."""

from __future__ import annotations

import copy
import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recsys_ops.accelerate import AccelerateReport, accelerate
from recsys_ops.demo.metrics import Ranking, ranking
from recsys_ops.demo.tasks import TABLE_ACCUMULATOR, Inputs, Progress, Task
from recsys_ops.timing import Ratio, speedup, time_interleaved

_WARM_UP = 5  # steps left out of the times


@dataclass(frozen=True)
class Training:
    """One model's way through the batches, and what it learnt."""

    losses: list[float]  # by step
    step_seconds: list[float]  # forward, backward and optimizer; without the first steps
    optimizer_seconds: list[float]  # the optimizer's part of those
    ranking: Ranking
    ranking_seconds: float


@dataclass(frozen=True)
class Part:
    """The median time of a part of a step, plain and accelerated."""

    name: str
    kind: str  # of a lookup what it computes, else empty
    before: float | None  # seconds; None where not measured
    after: float | None
    ratio: Ratio | None
    outcome: str = ""  # of a lookup what accelerate did with it, and why


@dataclass(frozen=True)
class Difference:
    """How far a tensor is off, relative to the largest element of the same computed in fp64."""

    name: str
    before: float  # the plain model from fp64
    after: float  # the accelerated one from fp64
    apart: float  # the two from each other


@dataclass(frozen=True)
class Trial:
    """A finished comparison."""

    name: str
    description: str
    parameters: int
    before: Training
    after: Training
    step: Part  # forward, backward and optimizer, during training
    optimizer: Part  # what it takes of that
    lookups: list[Part]  # forward and backward alone, on the first batch
    differences: list[Difference]  # of the output and the gradients, on the first batch
    agrees: bool  # every comparison that accelerate made stayed within its budget
    popularity: Ranking
    collected: Training | None = None  # of the copy whose tables are one collection
    collected_step: Part | None = None  # plain, and of that copy

    @property
    def largest_loss_difference(self) -> float:
        return _largest_difference(self.before, self.after)

    @property
    def largest_loss_difference_collected(self) -> float | None:
        return None if self.collected is None else _largest_difference(self.before, self.collected)


def _largest_difference(one: Training, other: Training) -> float:
    return float(np.abs(np.subtract(one.losses, other.losses)).max())


def run_trial(task: Task, progress: Progress) -> Trial:
    """Build, accelerate, compare, train and rank.

    Args:
        task: see ``tasks``.
        progress: called as the work goes on.
    """
    with torch.random.fork_rng(devices=[]), torch.sparse.check_sparse_tensor_invariants(enable=False):
        torch.manual_seed(task.settings.seed)
        plain = task.build()
        fast = copy.deepcopy(plain)
        inputs, target = next(task.batches())
        report, lookups = _accelerate(fast, inputs, task.settings.rounds, progress)
        differences = _differences(plain, fast, inputs, target, task.loss)

        before, after = _Trainer(plain, task), _Trainer(fast, task)
        collected = _Trainer(task.collect(plain), task) if task.collect is not None else None
        turns, order = [before, after], random.Random(task.settings.seed)
        if collected is not None:
            turns.append(collected)
        for done, (inputs, target) in enumerate(task.batches()):
            progress("train", done, task.settings.steps)
            order.shuffle(turns)
            for trainer in turns:
                trainer.step(inputs, target)
        progress("train", task.settings.steps, task.settings.steps)
        trained_plain, trained_fast = before.finish(progress), after.finish(progress)
        trained_collected = collected.finish(progress) if collected is not None else None
    return Trial(
        task.name,
        task.description,
        sum(parameter.numel() for parameter in plain.parameters()),
        trained_plain,
        trained_fast,
        _part("step", trained_plain.step_seconds, trained_fast.step_seconds),
        _part("its optimizer", trained_plain.optimizer_seconds, trained_fast.optimizer_seconds),
        lookups,
        differences,
        report.agrees,
        task.popularity,
        trained_collected,
        None
        if trained_collected is None
        else _part("step", trained_plain.step_seconds, trained_collected.step_seconds),
    )


class _Trainer:
    def __init__(self, model: nn.Module, task: Task) -> None:
        self.model, self.task = model, task
        tables = [module.weight for module in model.modules() if isinstance(module, nn.EmbeddingBag)]
        others = [p for p in model.parameters() if all(p is not table for table in tables)]
        others = [p for p in others if p.requires_grad]  # a collection trains its tables itself
        self.optimizers = [torch.optim.Adagrad(others, lr=0.03, initial_accumulator_value=1e-6)]
        if tables:
            tables_optimizer = torch.optim.Adagrad(
                tables, task.table_learning_rate, initial_accumulator_value=TABLE_ACCUMULATOR
            )
            self.optimizers.insert(0, tables_optimizer)
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []

    def step(self, inputs: Inputs, target: Tensor) -> None:
        start = time.perf_counter()
        self.model.zero_grad()
        loss = self.task.loss(self.model(*inputs), target)
        loss.backward()
        update = time.perf_counter()
        for optimizer in self.optimizers:
            optimizer.step()
        end = time.perf_counter()
        self.losses.append(loss.item())
        self.step_seconds.append(end - start)
        self.optimizer_seconds.append(end - update)

    def finish(self, progress: Progress) -> Training:
        self.model.eval()
        start = time.perf_counter()
        with torch.no_grad():
            found = ranking(self.task.rank(self.model, progress))
        seconds = time.perf_counter() - start
        skip = min(_WARM_UP, len(self.losses) - 1)
        return Training(self.losses, self.step_seconds[skip:], self.optimizer_seconds[skip:], found, seconds)


def _accelerate(
    model: nn.Module, inputs: Inputs, rounds: int, progress: Progress
) -> tuple[AccelerateReport, list[Part]]:
    """Accelerate in place, keeping the times that the ratios of the report come from."""
    measured: dict[str, Part] = {}
    current = ""

    def announce(done: int, total: int, name: str) -> None:
        nonlocal current
        current = name
        progress("accelerate", done, total + 1)

    def measure(before: Callable[[], Any], after: Callable[[], Any]) -> Ratio:
        seconds = time_interleaved({"before": before, "after": after}, rounds=rounds, round_seconds=0.005)
        # Forward comes first, and forward + backward replaces it.
        measured[current] = _part(current, seconds["before"], seconds["after"])
        return speedup(seconds["before"], seconds["after"])

    report = accelerate(model, tuple(inputs), measure=measure, progress=announce)
    progress("accelerate", 1, 1)
    unmeasured = Part("", "", None, None, None)
    lookups = [
        dataclasses.replace(
            measured.get(m.name, unmeasured), name=m.name, kind=m.kind, outcome=f"{m.status}: {m.reason}"
        )
        for m in report.modules
    ]
    return report, lookups


def _differences(
    plain: nn.Module,
    fast: nn.Module,
    inputs: Inputs,
    target: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> list[Difference]:
    """How far outputs and gradients of one batch are from those computed in fp64, and from each other."""
    exact = _results(copy.deepcopy(plain).double(), tuple(map(_double, inputs)), _double(target), loss)
    before, after = (_results(model, inputs, target, loss) for model in (plain, fast))
    found = []
    for name, value in exact.items():
        size = _largest(value) or 1.0
        distances = [(before[name], value), (after[name], value), (after[name], before[name])]
        found.append(Difference(name, *(_largest(a.double() - b.double()) / size for a, b in distances)))
    return found


def _results(
    model: nn.Module, inputs: Inputs, target: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    output = model(*inputs)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss(output, target), parameters)
    return {"output": output.detach()} | {
        f"gradient of {name}": gradient for name, gradient in zip(names, gradients, strict=True)
    }


def _largest(tensor: Tensor) -> float:
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    return float(values.abs().max()) if values.numel() else 0.0


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _part(name: str, before: Sequence[float] | np.ndarray, after: Sequence[float] | np.ndarray) -> Part:
    ratio = speedup(np.array(before), np.array(after))
    return Part(name, "", float(np.median(before)), float(np.median(after)), ratio)

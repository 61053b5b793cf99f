"""Proof and measurement of swaps: error budgets and timings."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from recsys_ops.acceleration.collected import look_up_together
from recsys_ops.acceleration.runs import (
    Batch,
    Call,
    Lookup,
    Results,
    bags_of,
    cotangent_of,
    differentiate,
    fused_collections,
    leaves_of,
    observe,
)
from recsys_ops.acceleration.swap import accelerated_class
from recsys_ops.testing.tolerances import compare
from recsys_ops.timing import Ratio, speedup, time_interleaved

Measure = Callable[[Callable[[], Any], Callable[[], Any]], Ratio]

_ULPS = 4
_NOISE_RUNS, _MOST_NOISE_RUNS = 3, 20


@dataclasses.dataclass(frozen=True)
class Parity:
    """Of all tensors compared, the one that comes closest to its budget or exceeds it most.

    Attributes:
        error: the largest error of an element: in ulp for a lookup, absolute for a model.
        budget: how large it may be, in the same unit.
        detail: which tensor it is, and how far off.
    """

    error: float
    budget: float
    detail: str

    @property
    def holds(self) -> bool:
        return self.error <= self.budget


def worst(parities: Sequence[Parity]) -> Parity:
    """The parity that fails most clearly, or holds most narrowly."""
    return max(parities, key=lambda p: (not p.holds, p.error / p.budget if p.budget else p.error))


def worst_pair(pairs: Iterable[tuple[Parity, float]]) -> tuple[Parity, float]:
    """The worst parity, and the largest error."""
    parities, errors = zip(*pairs, strict=True)
    return worst(parities), max(errors)


def measure(before: Callable[[], Any], after: Callable[[], Any]) -> Ratio:
    """How many times faster ``after`` is, timed in turns with ``before``."""
    seconds = time_interleaved({"before": before, "after": after}, round_seconds=0.005)
    return speedup(seconds["before"], seconds["after"])


def model_parity(
    model: nn.Module,
    batches: Sequence[Batch],
    switch: Callable[[bool], None],
    lookups: Sequence[tuple[nn.Module, float]],
) -> Parity:
    """Compare the model before and after the swaps, which ``switch`` turns on and off.

    The evidence for the budget is the model itself: a tensor may move twice as far as it does when
    the results of the original lookups move by a few times their error, which ``lookups`` gives
    beside each, plus a few units in its own last place.

    Raises:
        ValueError: the outputs of the model itself differ from run to run.
    """
    return worst([p for batch in batches for p in _batch_parities(model, batch, switch, lookups)])


def _batch_parities(
    model: nn.Module,
    batch: Batch,
    switch: Callable[[bool], None],
    lookups: Sequence[tuple[nn.Module, float]],
) -> list[Parity]:
    switch(False)
    old = observe(model, batch)
    _check_reproducible(old, observe(model, batch))
    switch(True)
    try:
        new = observe(model, batch)
    except Exception as error:
        return [raises(error)]
    finally:
        switch(False)
    moved = {name: _distance(new.pop(name, None), value) for name, value in old.items()}
    budgets = {name: _ULPS * _eps(value) * _size(value) for name, value in old.items()}
    for seed in range(_MOST_NOISE_RUNS):
        # Noise seldom crosses each of the kinks that a swap may cross: look longer before failing.
        if seed >= _NOISE_RUNS and all(moved[name] <= budgets[name] for name in moved):
            break
        with _noise(lookups, seed):
            noisy = observe(model, batch)
        for name, value in old.items():
            noise = _distance(noisy.get(name), value)
            budgets[name] = max(budgets[name], 2 * noise if math.isfinite(noise) else 0)
    allowed = "{}: moved by {:.1e}, {:.1e} allowed"
    parities = [Parity(moved[n], budgets[n], allowed.format(n, moved[n], budgets[n])) for n in moved]
    return parities + [Parity(math.inf, 0.0, f"{name}: was none") for name in new]


def _check_reproducible(old: Results, again: Results) -> None:
    for name, value in old.items():
        differs = _distance(again.get(name), value) > _size(value) * _eps(value) ** 0.5
        if differs and name.startswith("output"):
            raise ValueError(
                f"accelerate: expected a model that gives the same {name} for the same inputs and "
                "random state, got different values from two runs: nothing can be proved about it"
            )


def lookup_parity(module: Lookup, calls: Sequence[Call]) -> tuple[Parity, float]:
    """Compare a lookup before and after its swap, by ``recsys_ops.testing.tolerances``.

    This happens on a small table, of the rows that a call touches. Also returns how far the
    original is from the exact result, relative to its largest element.
    """
    return worst_pair(pair for call in calls for pair in call_parities([(module, call)]))


def measure_lookup(module: Lookup, calls: Sequence[Call], measure: Measure) -> tuple[Ratio, Ratio | None]:
    """How many times faster a lookup's calls are: forward, and forward + backward if it is trained."""
    table = module.weight.detach(), module.padding_idx
    before, after = twin_of(module, *table, False), twin_of(module, *table, True)
    cotangents = [cotangent_of(call.run(before)) for call in calls]

    def forward(twin: Lookup) -> None:
        with torch.no_grad():
            for call in calls:
                call.run(twin)

    def step(twin: Lookup) -> None:
        for call, cotangent in zip(calls, cotangents, strict=True):
            targets = targets_of(twin, call, module.weight.requires_grad)
            coalesce(torch.autograd.grad(call.run(twin), targets, cotangent))

    ratio = measure(lambda: forward(before), lambda: forward(after))
    if not all(targets_of(before, call, module.weight.requires_grad) for call in calls):
        return ratio, None
    return ratio, measure(lambda: step(before), lambda: step(after))


def measure_model(
    model: nn.Module, batches: Sequence[Batch], switch: Callable[[bool], None], measure: Measure
) -> tuple[Ratio, Ratio | None]:
    """The same for the whole model, with the swaps against without."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def forward(swapped: bool) -> None:
        switch(swapped)
        with torch.no_grad():
            for args, kwargs in batches:
                model(*args, **kwargs)

    def step(swapped: bool) -> bool:
        switch(swapped)
        trained = False
        for args, kwargs in batches:
            outputs = [leaf for _, leaf in leaves_of(model(*args, **kwargs))]
            trained |= coalesce(differentiate(model, outputs, parameters))
        return trained or bool(fused_collections(model))

    ratio = measure(lambda: forward(False), lambda: forward(True))
    return ratio, measure(lambda: step(False), lambda: step(True)) if step(False) else None


def coalesce(gradients: Sequence[Tensor | None]) -> bool:
    """Do what an optimizer needs of sparse gradients; whether there are gradients at all."""
    for gradient in gradients:
        if gradient is not None and gradient.is_sparse:
            gradient.coalesce()
    return any(gradient is not None for gradient in gradients)


def call_parities(
    calls: Sequence[tuple[Lookup, Call]], together: bool = False
) -> Iterator[tuple[Parity, float]]:
    """Compare calls of lookups, ours one by one or ``together``, and tell how exact the original is."""
    small = [_of_touched_rows(module, call) for module, call in calls]

    def run(accelerated: bool, dtype: torch.dtype | None = None, absolute: bool = False) -> Results:
        twins: list[Lookup] = []
        these: list[Call] = []
        targets: dict[str, Tensor] = {}
        for i, (module, weight, padding_idx, call) in enumerate(small):
            table, factors = weight.to(dtype or weight.dtype), call.per_sample_weights
            if factors is not None:
                factors = factors.detach().to(table.dtype).requires_grad_()
            if absolute:
                largest = isinstance(module, nn.EmbeddingBag) and module.mode == "max"
                table = table if largest else table.abs()
                factors = None if factors is None else factors.detach().abs().requires_grad_()
            twins.append(twin_of(module, table, padding_idx, accelerated))
            these.append(dataclasses.replace(call, per_sample_weights=factors))
            names = ("gradient of weight", "gradient of per_sample_weights")
            found = targets_of(twins[-1], these[-1], True)
            targets |= {_numbered(name, i): t for name, t in zip(names, found, strict=False)}
        outputs = (
            look_up_together([bags_of(twin, call) for twin, call in zip(twins, these, strict=True)])
            if accelerated and together
            else [call.run(twin) for twin, call in zip(twins, these, strict=True)]
        )
        cotangents = [cotangent_of(o, w.dtype) for o, (_, w, _, _) in zip(outputs, small, strict=True)]
        if absolute:
            cotangents = [cotangent.abs() for cotangent in cotangents]
        gradients = torch.autograd.grad(outputs, list(targets.values()), cotangents)
        results = {_numbered("output", i): output.detach() for i, output in enumerate(outputs)}
        return results | {n: g.to_dense() for n, g in zip(targets, gradients, strict=True)}

    old = run(False)
    try:
        new = run(True)
    except Exception as error:
        yield raises(error), 0.0
        return
    with torch.autocast(small[0][1].device.type, enabled=False):
        exact, partial = run(False, torch.float64), run(False, torch.float64, absolute=True)
    yield from compare_all(new, old, exact, partial)


def compare_all(
    new: Results, old: Results, exact: Results, partial: Results
) -> Iterator[tuple[Parity, float]]:
    """Each result against its budget, and how far the original is from the exact one."""
    for name, value in old.items():
        compared = compare(new[name], value, exact[name], partial[name].abs())
        own_error = _distance(value, exact[name]) / (_size(exact[name]) or 1.0)
        yield Parity(compared.worst, compared.budget, f"{name} {compared.detail}"), own_error


def _of_touched_rows(module: Lookup, call: Call) -> tuple[Lookup, Tensor, int | None, Call]:
    """A lookup with a small table, of the rows that a call touches: module, table, padding_idx and call."""
    weight = module.weight.detach()
    ids = call.input.clamp(0, len(weight) - 1)
    rows = torch.cat([ids.flatten(), ids.new_zeros(1)]).unique()
    padding: list[int] = []
    if module.padding_idx is not None:
        padding = (rows == module.padding_idx).nonzero().flatten().tolist()
    small = dataclasses.replace(call, input=torch.searchsorted(rows, ids).to(ids.dtype))
    return module, weight[rows], padding[0] if padding else None, small


def _numbered(name: str, i: int) -> str:
    return f"{name} of lookup {i}" if i else name


def raises(error: Exception) -> Parity:
    """The parity of what raises where the original did not."""
    text = textwrap.shorten(f"it raises {type(error).__name__}: {error}", 200)
    return Parity(math.inf, 0.0, text)


def twin_of(module: Lookup, weight: Tensor, padding_idx: int | None, accelerated: bool) -> Lookup:
    """A lookup with the configuration of ``module``, without its hooks, on another table."""
    names = ["max_norm", "norm_type", "scale_grad_by_freq", "sparse"]
    base: type[Lookup] = nn.Embedding
    if isinstance(module, nn.EmbeddingBag):
        base = nn.EmbeddingBag
        names += ["mode", "include_last_offset"]
    options = {name: getattr(module, name) for name in names}
    kind: Any = accelerated_class(base) if accelerated else base
    return kind(*weight.shape, _weight=weight, padding_idx=padding_idx, **options)


def targets_of(twin: Lookup, call: Call, trained: bool) -> list[Tensor]:
    factors = call.per_sample_weights
    targets: list[Tensor] = [twin.weight] if trained else []
    return targets + ([factors] if factors is not None and factors.requires_grad else [])


@contextlib.contextmanager
def _noise(lookups: Sequence[tuple[nn.Module, float]], seed: int) -> Iterator[None]:
    """Move the outputs of the lookups, and the gradients that reach them, by a few times their error."""
    generator = torch.Generator().manual_seed(seed)
    errors = {id(module): error for module, error in lookups}

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda tensor: noisy(tensor, errors[id(module)]), output)

    def noisy(output: Tensor, error: float) -> Tensor:
        least = torch.finfo(torch.promote_types(output.dtype, torch.float32)).eps
        relative = 4 * max(error, 8 * least)
        noise = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        return output * (1 + relative * noise).to(output)

    handles = [module.register_forward_hook(hook) for module, _ in lookups]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _distance(a: Tensor | None, b: Tensor) -> float:
    """The largest absolute difference; infinite where shapes differ or one is not a number."""
    if a is None or a.shape != b.shape:
        return math.inf
    if a.is_sparse and b.is_sparse:
        difference = (_wide(a.coalesce()) - _wide(b.coalesce())).coalesce().values()
    else:
        a, b = _wide(a.to_dense()), _wide(b.to_dense())
        difference = (a - b).masked_fill_((a == b) | (a.isnan() & b.isnan()), 0)
    return float(difference.abs().nan_to_num_(nan=math.inf).max()) if difference.numel() else 0.0


def _size(value: Tensor) -> float:
    """The largest finite absolute value."""
    value = _wide(value.coalesce().values() if value.is_sparse else value).abs()
    return float(value.nan_to_num_(nan=0, posinf=0).max()) if value.numel() else 0.0


def _eps(value: Tensor) -> float:
    return torch.finfo(value.dtype).eps if value.is_floating_point() or value.is_complex() else 0.0


def _wide(value: Tensor) -> Tensor:
    """In a dtype whose differences are exact enough."""
    return value if value.dtype == torch.float32 or value.is_complex() else value.to(torch.float64)

"""Proof and measurement of layers that become ours as a whole: Meta's HSTU layers."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from recsys_ops.acceleration.checks import Measure, Parity, compare_all, raises, worst_pair
from recsys_ops.acceleration.runs import Batch, Results, cotangent_of
from recsys_ops.acceleration.swap import put_back, swap
from recsys_ops.backends import use_backend
from recsys_ops.hstu_attention import meta_modules
from recsys_ops.timing import Ratio

# How far off fp32 may be, relative to the largest element.
_SAME_FORMULA = 2**-12

LayerCall = tuple[tuple[Any, ...], dict[str, Any]]


def capture_layers(
    model: nn.Module, batches: Sequence[Batch], layers: Sequence[nn.Module]
) -> dict[int, list[LayerCall]]:
    """The arguments that reach each layer when the model runs, by the id of the layer."""
    calls: dict[int, list[LayerCall]] = {id(layer): [] for layer in layers}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[id(module)].append(_fresh((args, kwargs)))

    with contextlib.ExitStack() as undo:
        for layer in layers:
            undo.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for batch in batches:
            args, kwargs = pytree.tree_map_only(Tensor, torch.clone, batch)
            model(*args, **kwargs)
    return calls


def layer_parity(layer: nn.Module, calls: Sequence[LayerCall]) -> tuple[Parity, float]:
    """Compare a layer with ours, outputs and gradients, both against ours in fp64.

    That this is the layer's own formula is seen from its results in fp32; theirs need not know fp64.
    """
    return worst_pair(pair for call in calls for pair in _call_parities(layer, call))


def _call_parities(layer: Any, call: LayerCall) -> Iterator[tuple[Parity, float]]:
    def run(module: nn.Module, dtype: torch.dtype | None = None) -> Results:
        targets: dict[str, Tensor] = {
            f"gradient of {n}": p for n, p in module.named_parameters() if p.requires_grad
        }

        def fresh(path: Any, value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            result = value.detach().to(dtype or value.dtype).requires_grad_(value.requires_grad)
            if value.requires_grad:
                targets[f"gradient of input{pytree.keystr(path)}"] = result
            return result

        args, kwargs = pytree.tree_map_with_path(fresh, call)
        output = _output(module(*args, **kwargs))
        results = {"output": output.detach()}
        if targets and output.requires_grad:
            cotangent = cotangent_of(output, lowest)
            found = torch.autograd.grad(output, list(targets.values()), cotangent, allow_unused=True)
            results |= {n: g for n, g in zip(targets, found, strict=True) if g is not None}
        return results

    lowest = next(t.dtype for t in pytree.tree_leaves(call) if _is_float(t))
    with without_dropout([layer]):
        old = run(layer)
        swap(layer)
        try:
            new = run(layer)
        except Exception as error:
            yield raises(error), 0.0
            return
        finally:
            put_back(layer)
        try:
            with torch.autocast(old["output"].device.type, enabled=False):
                formula = run(_copied(layer, torch.float32), torch.float32)
                ours = _copied(layer, torch.float64)
                swap(ours)
                with use_backend("reference"):
                    exact = run(ours, torch.float64)
        except Exception as error:
            yield raises(error), 0.0
            return
    if not old.keys() == new.keys() == exact.keys() == formula.keys():
        yield Parity(math.inf, 0.0, "gradients come or go"), 0.0
        return
    sizes = {name: float(value.abs().max()) if value.numel() else 0.0 for name, value in exact.items()}
    for name, size in sizes.items():
        off = float((formula[name] - exact[name]).abs().max()) if exact[name].numel() else 0.0
        if not off <= _SAME_FORMULA * size:
            detail = f"{name}: off by {off:.1e} in fp32, where {size:.1e} is the largest element"
            yield Parity(math.inf, 0.0, detail), 0.0
            return
    # Many results inside are rounded: an ulp is one of the largest element, in the dtype of the layer.
    units = {name: sizes[name] * _ulps_of_sums(value.dtype) for name, value in old.items()}
    partial = {name: torch.full_like(value, units[name]) for name, value in exact.items()}
    yield from compare_all(new, old, exact, partial)


def _ulps_of_sums(dtype: torch.dtype) -> float:
    """How many of the ulp that ``compare`` counts for sums one of ``dtype`` is."""
    return torch.finfo(dtype).eps / torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def measure_layer(
    layer: nn.Module, calls: Sequence[LayerCall], measure: Measure
) -> tuple[Ratio, Ratio | None]:
    """How many times faster a layer's calls are as ours: forward, and forward + backward if it is trained."""
    calls = [_fresh(call) for call in calls]
    parameters = [p for p in layer.parameters() if p.requires_grad]
    inputs = [[t for t in pytree.tree_leaves(call) if _is_float(t) and t.requires_grad] for call in calls]

    def switch(on: bool) -> None:
        (swap if on else put_back)(layer)

    def forward(on: bool) -> None:
        switch(on)
        with torch.no_grad():
            for args, kwargs in calls:
                layer(*args, **kwargs)

    def step(on: bool) -> None:
        switch(on)
        for (args, kwargs), own in zip(calls, inputs, strict=True):
            output = _output(layer(*args, **kwargs))
            torch.autograd.grad(output, [*parameters, *own], torch.ones_like(output), allow_unused=True)

    try:
        ratio = measure(lambda: forward(False), lambda: forward(True))
        trained = parameters or all(inputs)
        return ratio, measure(lambda: step(False), lambda: step(True)) if trained else None
    finally:
        put_back(layer)


@contextlib.contextmanager
def without_dropout(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let layers drop nothing: what theirs and ours drop need not be the same."""
    saved: list[tuple[Any, str, float]] = []
    for layer in layers:
        kind = meta_modules.kind_of(layer)
        if kind is not None:
            saved.append((layer, kind.dropout, getattr(layer, kind.dropout)))
            setattr(layer, kind.dropout, 0.0)
    try:
        yield
    finally:
        for layer, name, share in saved:
            setattr(layer, name, share)


def _copied(layer: Any, dtype: torch.dtype) -> Any:
    """A copy in another dtype, which computes by Meta's PyTorch code where it has a choice."""
    result = copy.deepcopy(layer).to(dtype)
    if hasattr(result, "set_hammer_kernel"):
        result.set_hammer_kernel(type(result.hammer_kernel())["PYTORCH"])
    return result


def _output(result: Any) -> Tensor:
    """What the layer computes, without the states beside it."""
    return result if isinstance(result, Tensor) else result[0]


def _fresh(call: LayerCall) -> LayerCall:
    return pytree.tree_map_only(
        Tensor, lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad), call
    )


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()

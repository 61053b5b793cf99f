"""Swaps lookups and layers of an existing model for faster ones, and keeps those that prove themselves."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from recsys_ops._output import write_json
from recsys_ops.acceleration.checks import (
    Measure,
    Parity,
    lookup_parity,
    measure,
    measure_lookup,
    measure_model,
    model_parity,
)
from recsys_ops.acceleration.find import (
    FoundCollection,
    FoundLayer,
    FoundLookup,
    Selection,
    find_lookups,
)
from recsys_ops.acceleration.layers import capture_layers, layer_parity, measure_layer, without_dropout
from recsys_ops.acceleration.report import (
    DECLINED,
    JOINED,
    KEPT,
    PUT_BACK,
    SWAPPED,
    AccelerateReport,
    ModuleReport,
)
from recsys_ops.acceleration.runs import Batch, Call, capture, capture_together, untouched
from recsys_ops.acceleration.swap import changed_since, collect, put_back, swap
from recsys_ops.acceleration.together import keyed_parity, measure_keyed, measure_together, together_parity
from recsys_ops.timing import Ratio

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[int, int, str], object]

# Noise may pull the lower bound of a real gain this far below 1.
_LOWEST = 0.98


def accelerate(
    model: nn.Module,
    sample_inputs: Any = None,
    include: Selection = None,
    exclude: Selection = None,
    *,
    measure: Measure = measure,
    progress: Progress | None = None,
) -> AccelerateReport:
    """Swap lookups and layers of a model in place for those of ``recsys_ops``, and keep what proves itself.

    Swapped are ``nn.EmbeddingBag`` (and subclasses that keep its forward), and ``nn.Embedding`` where a
    method of the module around it takes the sum or mean of the looked-up rows over dimension 1 or -2.
    Lookups of many tables become one: TorchRec's unsharded ``EmbeddingBagCollection`` and
    ``FusedEmbeddingBagCollection``, whose optimizer and its state stay where they are; and the bags in an
    ``nn.ModuleList`` or ``nn.ModuleDict`` that a method calls one after the other, in a comprehension
    ``[bag(x) for …]`` or a loop that appends to a new list. The operands of such a loop are
    evaluated first. The layers of Meta's Generative Recommenders, ``STULayer`` and
    ``SequentialTransductionUnitJagged``, become ours as a whole; those known by their names alone only with
    ``sample_inputs``. A swap changes the class of the instance: parameters, hooks, state-dict keys, and
    references that optimizers or wrappers hold stay what they are. Whatever is not certain to be the
    same is declined, and the report says why. Accelerate first and compile or wrap the model afterwards;
    restore before scripting.

    With ``sample_inputs`` each swap must prove itself, in the mode (training or evaluation) that the model
    is in, under the caller's autocast. On the inputs that reach it, its outputs and gradients may err at
    most twice as much as the original's and a few units in the last place, both against fp64. Those
    of the whole model may move twice as far as they do when the results of the original lookups move by a
    few times their error. A swap is kept if the median speedup (of forward + backward for a trained module
    in training mode, else of forward) exceeds 1 and its 95 % interval lies above 0.98; the rest is put back.
    A collection is measured against its bags as they are kept by themselves. These runs leave no trace in
    buffers, gradients, attributes or random state, nor in tables that train in the backward. A layer that
    drops elements in training does not while results are compared.

    Args:
        model: any module; changed in place.
        sample_inputs: a tuple of positional arguments, a dict of keyword arguments, or any other
            object (a tensor, a named tuple) as the only argument; or a list of those, one per batch.
        include: names of modules to consider, as glob patterns on their qualified names, or a
            predicate of name and module. None means all.
        exclude: the same for modules to leave alone.
        measure: times two callables and returns how many times faster the second is.
        progress: called with (done, total, name) before each module is measured.

    Raises:
        TypeError: ``model`` is not a module, or returns other things than tensors in tuples, lists, dicts.
        ValueError: ``sample_inputs`` is an empty list, or the model is not reproducible.
        Exception: whatever the model raises on ``sample_inputs``; it is then as it was.

    Example:
        >>> import torch, recsys_ops
        >>> model = torch.nn.Sequential(torch.nn.EmbeddingBag(100, 8, mode="sum"), torch.nn.Linear(8, 1))
        >>> recsys_ops.accelerate(model).accelerated
        ('0',)
        >>> recsys_ops.restore(model)[0]
        EmbeddingBag(100, 8, mode='sum')
    """
    _check_module(model, "accelerate")
    lookups = find_lookups(model, include, exclude, proved=sample_inputs is not None)
    candidates = [lookup for lookup in lookups if lookup.parts]
    if sample_inputs is None:
        outcome = AccelerateReport(tuple(_joined(candidates, [c.report(SWAPPED) for c in candidates])))
    else:
        batches = _batches(sample_inputs)
        with torch.inference_mode(False), torch.enable_grad(), untouched(model):
            try:
                outcome = _prove(model, candidates, batches, measure, progress or (lambda *_: None))
            finally:
                _switch(candidates, False)
    kept = [c for c, m in zip(candidates, outcome.modules, strict=True) if m.status in (SWAPPED, KEPT)]
    try:
        _switch(kept, True)
    except BaseException:
        _switch(kept, False)
        raise
    proved = iter(outcome.modules)
    modules = tuple(next(proved) if lookup.parts else lookup.report(DECLINED) for lookup in lookups)
    return dataclasses.replace(outcome, modules=modules)


def restore(model: nn.Module) -> nn.Module:
    """Undo ``accelerate``: every module has the class back that it had; parameters stay as they are now.

    Works on a copied or unpickled model too.

    Args:
        model: any module; changed in place.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: something else has changed a module's class since; nothing is then undone.

    Example:
        >>> import torch, recsys_ops
        >>> bag = torch.nn.EmbeddingBag(100, 8)
        >>> report = recsys_ops.accelerate(bag)
        >>> type(recsys_ops.restore(bag)) is torch.nn.EmbeddingBag
        True
    """
    _check_module(model, "restore")
    for name, module in model.named_modules():
        if changed_since(module):
            raise RuntimeError(
                f"restore: expected module {name!r} to be of the class that accelerate gave it, "
                f"got {type(module).__name__}: undo what changed it since first"
            )
    for module in model.modules():
        put_back(module)
    return model


def _batches(sample_inputs: Any) -> list[Batch]:
    batches = sample_inputs if isinstance(sample_inputs, list) else [sample_inputs]
    if not batches:
        raise ValueError("accelerate: expected sample_inputs to hold at least one batch, got an empty list")
    return [
        ((), batch) if isinstance(batch, dict) else (batch if type(batch) is tuple else (batch,), {})
        for batch in batches
    ]


def _switch(lookups: Sequence[FoundLookup], on: bool) -> None:
    for lookup in lookups:
        for part in lookup.parts:
            (swap if on else put_back)(part)
        for bag in lookup.collected if isinstance(lookup, FoundCollection) else ():
            (collect if on else put_back)(bag)


def _joined(lookups: Sequence[FoundLookup], reports: Sequence[ModuleReport]) -> list[ModuleReport]:
    """Reports that tell which lookups are part of a collection that is swapped."""
    collection_of = {
        id(bag): lookup.name or "(model)"
        for lookup, report in zip(lookups, reports, strict=True)
        if isinstance(lookup, FoundCollection) and report.status in (SWAPPED, KEPT)
        for bag in lookup.bags
    }
    return [
        dataclasses.replace(report, status=JOINED, reason=f"looked up by {collection_of[id(lookup.module)]}")
        if id(lookup.module) in collection_of
        else report
        for lookup, report in zip(lookups, reports, strict=True)
    ]


def _prove(
    model: nn.Module,
    candidates: list[FoundLookup],
    batches: list[Batch],
    measure: Measure,
    progress: Progress,
) -> AccelerateReport:
    """Judge each candidate by itself, then the model with all that hold; leaves some of them swapped."""
    layers = [c for c in candidates if isinstance(c, FoundLayer)]
    alone = [c for c in candidates if not isinstance(c, (FoundCollection, FoundLayer))]
    collections = [c for c in candidates if isinstance(c, FoundCollection)]
    with untouched(model):
        calls = capture(model, batches, [(lookup.module, lookup.parts) for lookup in alone])
    together: dict[int, list[Any]] = {}
    if collections:
        with untouched(model):
            together = capture_together(
                model, batches, [(c.module, c.parts, c.collected) for c in collections]
            )
    of_layers: dict[int, list[Any]] = {}
    if layers:
        with untouched(model):
            of_layers = capture_layers(model, batches, [layer.module for layer in layers])
    found: dict[int, ModuleReport] = {}
    for done, lookup in enumerate([*alone, *collections, *layers]):
        progress(done, len(candidates), lookup.name)
        if isinstance(lookup, FoundCollection):
            faster = [c.module for c in alone if found[id(c)].status == KEPT]
            with untouched(model):
                found[id(lookup)] = _judge_collection(lookup, together[id(lookup.module)], faster, measure)
        elif isinstance(lookup, FoundLayer):
            with untouched(model):
                found[id(lookup)] = _judge_layer(lookup, of_layers[id(lookup.module)], measure)
        else:
            found[id(lookup)] = _judge(lookup, calls[id(lookup.module)], measure)
    reports = _joined(candidates, [found[id(lookup)] for lookup in candidates])
    kept = [c for c, report in zip(candidates, reports, strict=True) if report.status == KEPT]
    if not kept:
        return AccelerateReport(tuple(reports))
    progress(len(candidates), len(candidates), "whole model")

    def switch(on: bool) -> None:
        _switch(candidates, False)
        _switch(kept, on)

    moved = [
        (m, lookup.error) for lookup in kept for m in getattr(lookup, "collected", ()) or [lookup.module]
    ]
    with without_dropout([layer.module for layer in layers]):
        parity = model_parity(model, batches, switch, moved)
    if not parity.holds:
        reason = f"the whole model differs: {parity.detail}"
        reports = [
            dataclasses.replace(r, status=PUT_BACK, reason=reason) if r.status in (KEPT, JOINED) else r
            for r in reports
        ]
        return AccelerateReport(tuple(reports), parity=parity)
    return AccelerateReport(tuple(reports), *measure_model(model, batches, switch, measure), parity)


def _judge(lookup: FoundLookup, calls: Sequence[Call], measure: Measure) -> ModuleReport:
    if not calls:
        return lookup.report(PUT_BACK, reason="the sample inputs never reach it")
    parity, lookup.error = lookup_parity(lookup.module, calls)
    if not parity.holds:
        return lookup.report(PUT_BACK, reason=f"it differs: {parity.detail}", parity=parity)
    return _decide(lookup, parity, *measure_lookup(lookup.module, calls, measure))


def _judge_layer(lookup: FoundLayer, calls: Sequence[Any], measure: Measure) -> ModuleReport:
    """The same of a layer that becomes ours as a whole."""
    if not calls:
        return lookup.report(PUT_BACK, reason="the sample inputs never reach it")
    parity, lookup.error = layer_parity(lookup.module, calls)
    if not parity.holds:
        return lookup.report(PUT_BACK, reason=f"it differs: {parity.detail}", parity=parity)
    return _decide(lookup, parity, *measure_layer(lookup.module, calls, measure))


def _judge_collection(
    lookup: FoundCollection, calls: Sequence[Any], faster: Sequence[nn.Module], measure: Measure
) -> ModuleReport:
    """The same of a collection, against its bags as they are kept by themselves."""
    if not calls:
        return lookup.report(PUT_BACK, reason="the sample inputs reach no lookups that can be one")
    if lookup.is_torchrec:
        parity, lookup.error = keyed_parity(lookup.module, calls)
    else:
        parity, lookup.error = together_parity(calls)
    if not parity.holds:
        return lookup.report(PUT_BACK, reason=f"it differs: {parity.detail}", parity=parity)
    if lookup.is_torchrec:
        return _decide(lookup, parity, *measure_keyed(lookup.module, calls, faster, measure))
    return _decide(lookup, parity, *measure_together(calls, faster, measure))


def _decide(lookup: FoundLookup, parity: Parity, forward: Ratio, step: Ratio | None) -> ModuleReport:
    decisive = step if step is not None and lookup.module.training else forward
    status, faster = (
        (KEPT, "faster") if decisive.value > 1 and decisive.low > _LOWEST else (PUT_BACK, "not faster")
    )
    reason = f"{faster} in {'forward' if decisive is forward else 'fwd + bwd'}"
    return lookup.report(status, reason=reason, forward=forward, step=step, parity=parity)


def _check_module(model: Any, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: expected model to be a torch.nn.Module, got {type(model).__name__}")


class _UsageError(Exception):
    """What was wrong with the arguments of the command."""


def run_accelerate(
    model_spec: str,
    inputs_spec: str | None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    json_path: str | Path | None,
    console: Console,
) -> int:
    """``recsys-ops accelerate``: build a model, accelerate it, print the report.

    Args:
        model_spec: ``module:function``, where the function takes nothing and returns a ``torch.nn.Module``.
        inputs_spec: the same for a function that returns ``sample_inputs``, or None.
        include, exclude: glob patterns, see ``accelerate``; None or empty means none given.
        json_path: where to write the report as JSON, or None.
        console: where to print.

    Returns:
        The exit code: 0, or 1 if a swap was found to change results, or 2 if the arguments are wrong.
    """
    try:
        model = _build(model_spec, "the model")
        if not isinstance(model, nn.Module):
            got = type(model).__name__
            raise _UsageError(f"expected {model_spec} to return a torch.nn.Module, got {got}")
        inputs = None if inputs_spec is None else _build(inputs_spec, "--inputs")
        try:
            report = accelerate(model, inputs, include or None, exclude or None, progress=_progress(console))
        except Exception as error:
            raise _UsageError(f"accelerating the model of {model_spec} fails: {_text(error)}") from error
        if json_path is not None:
            content = {"model": model_spec, "inputs": inputs_spec, **report.to_dict()}
            try:
                write_json(json_path, content)
            except OSError as error:
                raise _UsageError(f"cannot write --json {json_path}: {error.strerror}") from None
    except _UsageError as error:
        if error.__cause__ is not None:
            trace = "".join(traceback.format_exception(error.__cause__))
            console.print(trace, style="dim", markup=False, highlight=False)
        console.print(f"recsys-ops accelerate: {error}", style="red", markup=False, highlight=False)
        return 2
    console.print(report)
    return 0 if report.agrees else 1


def _build(spec: str, what: str) -> Any:
    """What the function that ``spec`` names returns."""
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise _UsageError(f"expected {what} as module:function, got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise _UsageError(f"cannot import {module_name!r} for {what}: {error}") from None
    except Exception as error:
        raise _UsageError(f"cannot import {module_name!r} for {what}: {_text(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        found = f"a {type(function).__name__}" if hasattr(module, attribute) else "nothing of that name"
        raise _UsageError(f"expected a function {attribute!r} in {module_name!r} for {what}, got {found}")
    try:
        return function()
    except Exception as error:
        raise _UsageError(f"{spec} raises {_text(error)}") from error


def _progress(console: Console) -> Progress:
    return lambda done, total, name: console.print(f"[{done}/{total}] {name}", markup=False, highlight=False)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

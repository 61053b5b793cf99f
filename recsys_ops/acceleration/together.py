"""Lookups of many tables that can become one: TorchRec's collections, and bags in a loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from recsys_ops.acceleration.checks import (
    Measure,
    Parity,
    call_parities,
    coalesce,
    compare_all,
    raises,
    twin_of,
    worst_pair,
)
from recsys_ops.acceleration.collected import Bags, look_up_together
from recsys_ops.acceleration.runs import Call, Results, cotangent_of
from recsys_ops.acceleration.swap import put_back, swap
from recsys_ops.embedding_bag_collection.torchrec_modules import as_ours, is_fused, leaves_of_fused
from recsys_ops.timing import Ratio


def together_parity(calls: Sequence[Sequence[Bags]]) -> tuple[Parity, float]:
    """Compare loops of bags with the same calls made at once, as ``lookup_parity`` does."""
    return worst_pair(
        pair
        for bags in calls
        for pair in call_parities([(b.module, Call(*b[1:])) for b in bags], together=True)
    )


def measure_together(
    calls: Sequence[Sequence[Bags]], swapped: Sequence[nn.Module], measure: Measure
) -> tuple[Ratio, Ratio | None]:
    """How many times faster a loop of bags is at once than one by one, with those swapped that shall be."""
    kept = {id(module) for module in swapped}
    twins = {
        id(b.module): twin_of(b.module, b.module.weight.detach(), None, id(b.module) in kept)
        for bags in calls
        for b in bags
    }
    trained = {id(b.module): b.module.weight.requires_grad for bags in calls for b in bags}
    loops = [[Bags(twins[id(b.module)], *b[1:]) for b in bags] for bags in calls]
    targets = [
        [b.module.weight for b, own in zip(loop, bags, strict=True) if trained[id(own.module)]]
        + [b.per_sample_weights for b in loop if b.per_sample_weights is not None]
        for loop, bags in zip(loops, calls, strict=True)
    ]
    targets = [[t for t in each if t.requires_grad] for each in targets]
    cotangents = [[cotangent_of(b.module(*b[1:])) for b in loop] for loop in loops]

    def results(loop: Sequence[Bags], together: bool) -> list[Tensor]:
        return look_up_together(loop) if together else [b.module(*b[1:]) for b in loop]

    def forward(together: bool) -> None:
        with torch.no_grad():
            for loop in loops:
                results(loop, together)

    def step(together: bool) -> None:
        for loop, wanted, cotangent in zip(loops, targets, cotangents, strict=True):
            outputs = [
                (o, c) for o, c in zip(results(loop, together), cotangent, strict=True) if o.requires_grad
            ]
            coalesce(torch.autograd.grad([o for o, _ in outputs], wanted, [c for _, c in outputs]))

    ratio = measure(lambda: forward(False), lambda: forward(True))
    if not all(targets):
        return ratio, None
    return ratio, measure(lambda: step(False), lambda: step(True))


def keyed_parity(theirs: Any, calls: Sequence[Any]) -> tuple[Parity, float]:
    """Compare TorchRec's collection with ours, on the rows that the features touch.

    Of a fused one only the outputs: what it trains is compared with the whole model.
    """
    return worst_pair(pair for features in calls for pair in _keyed_parities(theirs, features))


def _keyed_parities(theirs: Any, features: Any) -> Iterator[tuple[Parity, float]]:
    tables = [pair for ours in as_ours(theirs) for pair in zip(ours.tables, ours.weights, strict=True)]
    jagged, weighted = _fresh(features).to_dict(), theirs.is_weighted()
    touched = {
        table.name: torch.cat([jagged[f].values().flatten() for f in table.features]).unique().long()
        for table, _ in tables
    }
    trained = [] if is_fused(theirs) else [(t, w) for t, w in tables if w.requires_grad]

    def run(accelerated: bool) -> Results:
        if accelerated:
            swap(theirs)
        try:
            output = theirs(_fresh(features)).values()
        finally:
            put_back(theirs)
        gradients = (
            torch.autograd.grad(output, [w for _, w in trained], cotangent_of(output)) if trained else ()
        )
        rows = [
            gradient.to_dense().index_select(0, touched[table.name])
            for (table, _), gradient in zip(trained, gradients, strict=True)
        ]
        return {"output": output.detach(), **dict(zip(_names(trained), rows, strict=True))}

    def exact(absolute: bool) -> Results:
        outputs, leaves = [], {}
        for table, weight in tables:
            rows = touched[table.name]
            small = weight.detach()[rows].double()
            leaf = leaves[table.name] = (small.abs() if absolute else small).requires_grad_()
            for feature in table.features:
                bags = jagged[feature]
                factors = bags.weights().detach().double() if weighted else None
                if absolute and factors is not None:
                    factors = factors.abs()
                ids, offsets = torch.searchsorted(rows, bags.values().long()), bags.offsets().long()
                outputs.append(
                    nn.functional.embedding_bag(
                        ids,
                        leaf if len(leaf) else leaf.new_zeros(1, weight.shape[1]),
                        offsets,
                        mode=table.pooling,
                        per_sample_weights=factors,
                        include_last_offset=True,
                    )
                )
        output = torch.cat(outputs, 1)
        cotangent = cotangent_of(output, torch.float32)
        wanted = [leaves[table.name] for table, _ in trained]
        gradients: Iterable[Tensor | None] = ()
        if wanted:
            gradients = torch.autograd.grad(
                output, wanted, cotangent.abs() if absolute else cotangent, allow_unused=True
            )
        filled = [
            leaf.new_zeros(leaf.shape) if g is None else g for g, leaf in zip(gradients, wanted, strict=True)
        ]
        return {"output": output.detach(), **dict(zip(_names(trained), filled, strict=True))}

    old = run(False)
    try:
        new = run(True)
    except Exception as error:
        yield raises(error), 0.0
        return
    yield from compare_all(new, old, exact(False), exact(True))


def measure_keyed(
    theirs: Any, calls: Sequence[Any], swapped: Sequence[nn.Module], measure: Measure
) -> tuple[Ratio, Ratio | None]:
    """How many times faster TorchRec's collection is as ours, with those bags swapped that shall be.

    A step of a fused one trains its tables.
    """
    inside = {id(bag) for bag in theirs.embedding_bags.children()}
    bags = [module for module in swapped if id(module) in inside]
    parameters: list[Tensor] = [p for p in theirs.parameters() if p.requires_grad]
    wanted = [*parameters, *(leaves_of_fused(theirs) if is_fused(theirs) else ())]
    cotangents = [cotangent_of(theirs(_fresh(features)).values()) for features in calls]

    def switch(on: bool) -> None:
        (swap if on else put_back)(theirs)

    def forward(on: bool) -> None:
        switch(on)
        with torch.no_grad():
            for features in calls:
                theirs(_fresh(features)).values()

    def step(on: bool) -> None:
        switch(on)
        for features, cotangent in zip(calls, cotangents, strict=True):
            output = theirs(_fresh(features)).values()
            coalesce(torch.autograd.grad(output, wanted, cotangent, allow_unused=True))

    for bag in bags:
        swap(bag)
    try:
        ratio = measure(lambda: forward(False), lambda: forward(True))
        return ratio, measure(lambda: step(False), lambda: step(True)) if parameters else None
    finally:
        for module in (theirs, *bags):
            put_back(module)


def _fresh(features: Any) -> Any:
    """The same features without what they have computed of themselves so far."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor, features)


def _names(tables: Sequence[tuple[Any, Tensor]]) -> list[str]:
    return [f"gradient of {table.name}" for table, _ in tables]

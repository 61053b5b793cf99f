"""Finds the lookups of a model that can be swapped, and says why others cannot."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from recsys_ops.acceleration.expressions import Site
from recsys_ops.acceleration.methods import rewritten_methods
from recsys_ops.acceleration.pooling import PooledEmbedding
from recsys_ops.acceleration.report import ModuleReport
from recsys_ops.acceleration.runs import Lookup
from recsys_ops.acceleration.swap import is_swapped, original_class, why_not_subclassed
from recsys_ops.embedding_bag.modules import EmbeddingBag
from recsys_ops.embedding_bag_collection.torchrec_modules import (
    Accelerated,
    has_hooks,
    is_fused,
    torchrec_class,
    why_not_ours,
)
from recsys_ops.hstu_attention import meta_modules

Selection = str | Iterable[str] | Callable[[str, nn.Module], bool] | None

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclasses.dataclass
class FoundLookup:
    """A lookup found in the model."""

    name: str
    module: Lookup
    kind: str
    reason: str = ""
    parts: tuple[nn.Module, ...] = ()  # what a swap changes; nothing if declined
    error: float = 0.0  # of the original, relative, once it is known

    def report(self, status: str, **details: Any) -> ModuleReport:
        return ModuleReport(self.name, self.kind, status, **{"reason": self.reason, **details})


@dataclasses.dataclass
class FoundCollection(FoundLookup):
    """Lookups that can be one: TorchRec's collection, or the bags in a container that a loop calls."""

    module: Any
    bags: tuple[nn.Module, ...] = ()  # what its lookups are without it
    collected: tuple[nn.EmbeddingBag, ...] = ()  # those that a swap changes too

    @property
    def is_torchrec(self) -> bool:
        return torchrec_class(self.module) is not None


@dataclasses.dataclass
class FoundLayer(FoundLookup):
    """A layer that is no lookup: one of Meta's HSTU layers."""

    module: Any


def find_lookups(
    model: nn.Module, include: Selection, exclude: Selection, proved: bool = True
) -> list[FoundLookup]:
    """What may be swapped, and what may not and why; with ``proved`` also what is known by its name alone."""
    included, excluded = _predicate("include", include, True), _predicate("exclude", exclude, False)
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    uses, obstacles = _poolings(model)
    loops = _Loops(model)
    lookups: list[FoundLookup] = []
    for name, module in model.named_modules():
        parts: tuple[nn.Module, ...]
        reason: str | None
        found: FoundLookup | None = None
        if torchrec_class(module) is not None:
            found = _torchrec_collection(name, module)
        elif isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            found = loops.collection(name, module)
            if found is None:
                continue
        elif meta_modules.kind_of(module) is not None:
            found = _layer(name, module, proved)
        if found is not None:
            kind, parts, reason = found.kind, found.parts, found.reason
        elif isinstance(module, nn.EmbeddingBag):
            kind, parts = f"EmbeddingBag {module.mode}", (module,)
            reason = _why_not_bag(module) or loops.why_not(module)
        elif isinstance(module, nn.Embedding):
            modes = dict.fromkeys(site.mode for _, site in uses[id(module)])
            kind = f"Embedding + {', '.join(modes)}" if modes else "Embedding"
            reason = _why_not_embedding(module)
            owners = [owner for owner, site in uses[id(module)] if _why_not_owner(owner, site) is None]
            parts = (module, *owners)
            if not reason and not owners:
                reasons = [_why_not_owner(*use) or "" for use in uses[id(module)]] + obstacles[id(module)]
                reason = (reasons or ["no sum or mean recognised"])[0]
        else:
            continue
        if not any(included(name, module) for name in names[id(module)]):
            reason = "not in include"
        elif any(excluded(name, module) for name in names[id(module)]):
            reason = "in exclude"
        elif isinstance(found, FoundCollection) and any(
            excluded(n, b) for b in found.bags for n in names[id(b)]
        ):
            reason = "a table of it is in exclude"
        fresh = tuple({id(part): part for part in parts if not is_swapped(part)}.values())
        if found is not None:
            lookups.append(dataclasses.replace(found, reason=reason or "", parts=() if reason else fresh))
        else:
            lookups.append(FoundLookup(name, module, kind, reason or "", () if reason else fresh))
    return lookups


def _torchrec_collection(name: str, module: Any) -> FoundCollection:
    bags = tuple(module.embedding_bags.children())
    kind = f"{'fused ' if is_fused(module) else ''}collection of {len(bags)}"
    reason: str | None
    if isinstance(module, Accelerated):
        reason = "already accelerated"
    else:
        reason = why_not_subclassed(type(module)) or why_not_ours(module)
    return FoundCollection(name, module, kind, reason or "", (module,), bags=bags)


def _layer(name: str, module: Any, proved: bool) -> FoundLayer:
    kind = meta_modules.kind_of(module)
    assert kind is not None
    reason: str | None
    if isinstance(module, Accelerated):
        reason = "already accelerated"
    else:
        reason = why_not_subclassed(type(module)) or meta_modules.why_not_swapped(module)
    if not reason and any(p.dtype == torch.float64 for p in module.parameters()):
        reason = "it is float64, and nothing more exact is at hand to judge it"
    if not reason and not proved and not meta_modules.is_certain(module):
        reason = f"its {kind.name} is not {kind.where}'s: to be proved with sample_inputs"
    return FoundLayer(name, module, kind.label, reason or "", (module,))


class _Loops:
    """Who calls the bags of a container in a loop."""

    def __init__(self, model: nn.Module) -> None:
        self._owners: dict[int, list[tuple[nn.Module, Site]]] = defaultdict(list)
        self._obstacles: dict[int, list[str]] = defaultdict(list)
        self._swapped_with: set[int] = set()
        containers = [m for m in model.modules() if _is_container(m)]
        for owner in model.modules():
            if torchrec_class(owner) is not None:
                inside = list(owner.modules())
                containers = [c for c in containers if all(c is not m for m in inside)]
                if isinstance(owner, Accelerated):
                    self._swapped_with |= {id(m) for m in inside}
        for owner in model.modules() if containers else ():
            own = {id(m): m for m in owner.modules() if m is not owner}
            below = [c for c in containers if id(c) in own]
            if not below:
                continue
            methods = rewritten_methods(original_class(owner))
            for container in below:
                bags = {id(bag) for bag in container.children()}
                self._obstacles[id(container)] += methods.obstacles
                self._owners[id(container)] += [
                    (owner, site)
                    for site in methods.collected
                    if bags <= {id(table) for table in site.tables(owner)}
                ]
        self._containers = {id(container) for container in containers}

    def why_not(self, bag: nn.EmbeddingBag) -> str | None:
        """Why a bag is not to be swapped by itself."""
        return "already accelerated" if id(bag) in self._swapped_with else None

    def collection(self, name: str, module: nn.Module) -> FoundCollection | None:
        """What becomes of a container, or None if it is not one of bags."""
        if id(module) not in self._containers:
            return None
        bags: Any = tuple(module.children())
        owners = [owner for owner, site in self._owners[id(module)] if _why_not_owner(owner, site) is None]
        reason = _why_not_together(bags)
        if not reason and not owners:
            reasons = [_why_not_owner(*use) or "" for use in self._owners[id(module)]]
            reasons += self._obstacles[id(module)]
            reason = (reasons or ["no loop over its bags recognised"])[0]
        kind = f"loop of {len(bags)} bags"
        return FoundCollection(name, module, kind, reason or "", (*owners, *bags), bags=bags, collected=bags)


def _is_container(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    bags = list(module.children())
    return len(bags) > 1 and all(isinstance(bag, nn.EmbeddingBag) for bag in bags)


def _why_not_together(bags: tuple[nn.EmbeddingBag, ...]) -> str | None:
    for i, bag in enumerate(bags):
        if reason := _why_not_bag(bag):
            return reason if reason == "already accelerated" else f"bag {i}: {reason}"
        if type(bag) is not nn.EmbeddingBag:
            return f"bag {i} is a {type(bag).__name__}"
        for option, plain in (("padding_idx", None), ("max_norm", None), ("scale_grad_by_freq", False)):
            if getattr(bag, option) != plain:
                return f"bag {i} has {option}={getattr(bag, option)}"
        if has_hooks(bag):
            return f"bag {i} has hooks"
    if len({id(bag.weight) for bag in bags}) < len(bags):
        return "two of its bags share a weight"
    if len({(bag.weight.dtype, bag.sparse) for bag in bags}) > 1:
        return "its bags differ in dtype or sparse"
    return "sparse gradients of a maximum" if bags[0].sparse and any(b.mode == "max" for b in bags) else None


def _poolings(model: nn.Module) -> tuple[dict[int, list[tuple[nn.Module, Site]]], dict[int, list[str]]]:
    """For each embedding, by id: who pools it where; and why some methods could not be searched."""
    uses: dict[int, list[tuple[nn.Module, Site]]] = defaultdict(list)
    obstacles: dict[int, list[str]] = defaultdict(list)
    for owner in model.modules():
        embeddings = [module for module in owner.modules() if isinstance(module, nn.Embedding)]
        if not embeddings or owner is embeddings[0]:
            continue
        methods = rewritten_methods(original_class(owner))
        for embedding in embeddings:
            obstacles[id(embedding)] += methods.obstacles
        for site in methods.pooled:
            for table in site.tables(owner):
                uses[id(table)].append((owner, site))
    return uses, obstacles


def _why_not_bag(module: nn.EmbeddingBag) -> str | None:
    kind = type(module)
    if isinstance(module, EmbeddingBag):
        return "already accelerated"
    if is_parametrized(module):
        return "its parameters are parametrized"
    if kind.forward is not nn.EmbeddingBag.forward:
        return f"{kind.__name__} has a forward of its own"
    if "forward" in module.__dict__:
        return "its forward is patched on the instance"
    if any(hasattr(module, name) for name in ("bounds", "backend")):
        return f"{kind.__name__} has attributes that recsys_ops.nn.EmbeddingBag reads"
    return (why_not_subclassed(kind) if kind is not nn.EmbeddingBag else None) or _why_not_table(
        module.weight
    )


def _why_not_embedding(module: nn.Embedding) -> str | None:
    kind = type(module)
    if isinstance(module, PooledEmbedding):
        return "already accelerated"
    if kind is not nn.Embedding:
        return f"{kind.__name__} is a subclass of nn.Embedding"
    if "forward" in module.__dict__:
        return "its forward is patched on the instance"
    if module.padding_idx is not None:
        return "padding_idx: its sum or mean counts the padding row, EmbeddingBag's does not"
    if module.max_norm is not None:
        return "max_norm changes the table at each lookup"
    if has_hooks(module):
        return "it has hooks, which expect rows that are not pooled"
    return _why_not_table(module.weight)


def _why_not_owner(owner: nn.Module, site: Site) -> str | None:
    kind = original_class(owner)
    if site.method in owner.__dict__:
        return f"{kind.__name__}.{site.method} is patched on the instance"
    if is_parametrized(owner):
        return f"parameters of {kind.__name__} are parametrized"
    return why_not_subclassed(kind)


def _why_not_table(weight: Tensor) -> str | None:
    if type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in _DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if weight.dim() != 2 or len(weight) == 0:
        return f"its weight has shape {list(weight.shape)}"
    return None


def _predicate(argument: str, selection: Selection, default: bool) -> Callable[[str, nn.Module], bool]:
    if selection is None:
        return lambda name, module: default
    if callable(selection):
        return selection
    if not isinstance(selection, Iterable):
        got = type(selection).__name__
        raise TypeError(f"accelerate: expected {argument} to be patterns or a predicate, got {got}")
    patterns = [selection] if isinstance(selection, str) else list(selection)
    return lambda name, module: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

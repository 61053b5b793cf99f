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

from recsys_ops.acceleration.pooling import PooledEmbedding, Site, has_hooks, pooled_methods
from recsys_ops.acceleration.report import ModuleReport
from recsys_ops.acceleration.runs import Lookup
from recsys_ops.acceleration.swap import is_swapped, original_class, why_not_subclassed
from recsys_ops.embedding_bag.modules import EmbeddingBag

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


def find_lookups(model: nn.Module, include: Selection, exclude: Selection) -> list[FoundLookup]:
    included, excluded = _predicate("include", include, True), _predicate("exclude", exclude, False)
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    uses, obstacles = _poolings(model)
    lookups = []
    for name, module in model.named_modules():
        parts: tuple[nn.Module, ...]
        if isinstance(module, nn.EmbeddingBag):
            kind, parts = f"EmbeddingBag {module.mode}", (module,)
            reason = _why_not_bag(module)
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
        fresh = tuple({id(part): part for part in parts if not is_swapped(part)}.values())
        lookups.append(FoundLookup(name, module, kind, reason or "", () if reason else fresh))
    return lookups


def _poolings(model: nn.Module) -> tuple[dict[int, list[tuple[nn.Module, Site]]], dict[int, list[str]]]:
    """For each embedding, by id: who pools it where; and why some methods could not be searched."""
    uses: dict[int, list[tuple[nn.Module, Site]]] = defaultdict(list)
    obstacles: dict[int, list[str]] = defaultdict(list)
    for owner in model.modules():
        embeddings = [module for module in owner.modules() if isinstance(module, nn.Embedding)]
        if not embeddings or owner is embeddings[0]:
            continue
        methods = pooled_methods(original_class(owner))
        for embedding in embeddings:
            obstacles[id(embedding)] += methods.obstacles
        for site in methods.sites:
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

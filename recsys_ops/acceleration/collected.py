"""Recognises loops over embedding bags in the methods of a module, and looks all of them up at once.

Rewritten are ``[bag(x) for bag, x in …]``, the same as a dict, and ``outs = []`` followed by a loop
that appends ``bag(x)``. The rewrite is local: the loop runs as it was written, but hands each
call to a ``Lookups`` instead of making it. That looks at run time whether the call may
wait for the others, and makes it on the spot if not. A bag without hooks reads its table, and
has no effect but its result; so it may wait while the operands of the others are evaluated.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from recsys_ops.acceleration.expressions import MethodRewriter, Site
from recsys_ops.embedding_bag.modules import EmbeddingBag
from recsys_ops.embedding_bag_collection.api import collection
from recsys_ops.embedding_bag_collection.layout import Layout
from recsys_ops.embedding_bag_collection.torchrec_modules import has_hooks

HELPER = "_recsys_ops_lookups"
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_LEAVES_LOOP = (ast.Return, ast.Try, ast.With, ast.Yield, ast.YieldFrom, ast.Await, ast.NamedExpr, ast.Raise)


class CollectedEmbeddingBag(EmbeddingBag):
    """An ``nn.EmbeddingBag`` that may be looked up together with others."""

    def look_up_together(self, bags: Sequence[Bags]) -> list[Tensor]:
        """The results of calls of different ``CollectedEmbeddingBag``, one of them this."""
        return look_up_together(bags)


class Bags(NamedTuple):
    """A call of an ``EmbeddingBag``."""

    module: Any
    input: Tensor
    offsets: Tensor | None = None
    per_sample_weights: Tensor | None = None


class Lookups:
    """The calls of a loop, and their results in the order of the loop once it has ended."""

    def __init__(self, results: list[Any] | None = None) -> None:
        self.results: list[Any] = [] if results is None else results
        self._waiting: list[tuple[int, Bags]] = []

    def call(self, module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Make the call, or let it wait."""
        if isinstance(module, CollectedEmbeddingBag) and not has_hooks(module) and not _has_any_global_hook():
            bags = _bags(module, *args, **kwargs)
            if bags is not None and all(bags.module is not other.module for _, other in self._waiting):
                self._waiting.append((len(self.results), bags))
                self.results.append(None)
                return
        self.end()
        self.results.append(module(*args, **kwargs))

    def end(self) -> list[Any]:
        """Make the calls that wait; gives all results."""
        waiting, self._waiting = self._waiting, []
        if len(waiting) > 1 and _fit([bags for _, bags in waiting]):
            found = waiting[0][1].module.look_up_together([bags for _, bags in waiting])
        else:
            found = [bags.module(*bags[1:]) for _, bags in waiting]
        for (position, _), result in zip(waiting, found, strict=True):
            self.results[position] = result
        return self.results

    @staticmethod
    def as_list(calls: Iterable[tuple[Any, Sequence[Any], dict[str, Any]]]) -> list[Any]:
        """What ``[module(*args, **kwargs) for module, args, kwargs in calls]`` gives."""
        lookups = Lookups()
        for module, args, kwargs in calls:
            lookups.call(module, args, kwargs)
        return lookups.end()

    @staticmethod
    def as_dict(calls: Iterable[tuple[Any, Any, Sequence[Any], dict[str, Any]]]) -> dict[Any, Any]:
        """The same as a dict; the key comes first."""
        lookups, keys = Lookups(), []
        for key, module, args, kwargs in calls:
            keys.append(key)
            lookups.call(module, args, kwargs)
        return dict(zip(keys, lookups.end(), strict=True))


def _bags(
    module: nn.EmbeddingBag, input: Any, offsets: Any = None, per_sample_weights: Any = None
) -> Bags | None:
    """The call, if it is one that a collection serves as the bag does."""
    tensors = [t for t in (input, offsets, per_sample_weights) if t is not None]
    if not all(type(t) in (Tensor, nn.Parameter) for t in (*tensors, module.weight)):
        return None
    if module.padding_idx is not None or module.max_norm is not None or module.scale_grad_by_freq:
        return None
    if len({t.device for t in (*tensors, module.weight)}) > 1 or (module.sparse and module.mode == "max"):
        return None
    if input.dtype not in (torch.int32, torch.int64):
        return None
    if input.dim() == 2:
        fits = offsets is None
    else:
        fits = (
            input.dim() == 1
            and offsets is not None
            and offsets.dim() == 1
            and offsets.dtype == input.dtype
            and len(offsets) > 0
            and (offsets.is_cuda or torch.compiler.is_compiling() or int(offsets[0]) == 0)
        )
    if per_sample_weights is not None:
        same = per_sample_weights.shape == input.shape and per_sample_weights.dtype == module.weight.dtype
        fits = fits and same and module.mode == "sum"
    return Bags(module, input, offsets, per_sample_weights) if fits else None


def _fit(bags: Sequence[Bags]) -> bool:
    """Whether calls can be one call of a collection."""
    kinds = {(b.module.weight.dtype, b.module.weight.device, b.module.sparse, b.input.dtype) for b in bags}
    weighted = any(b.per_sample_weights is not None for b in bags)
    return len(kinds) == 1 and not (weighted and any(b.module.mode == "max" for b in bags))


def look_up_together(bags: Sequence[Bags]) -> list[Tensor]:
    """The results of calls that fit each other, by one call of a collection."""
    modules = [b.module for b in bags]
    starts, counts, base, first = [], [], 0, 0
    ranges = []
    for b in bags:
        of_bags = _offsets(b)
        starts.append(of_bags + base if base else of_bags)
        count = len(of_bags) - 1
        ranges.append((first, count))
        counts.append(count)
        first += count + 1  # the bag between this input and the next belongs to nothing
        base += b.input.numel()
    layout = Layout(
        tuple((i,) for i in range(len(bags))),
        tuple(module.mode for module in modules),
        tuple(module.embedding_dim for module in modules),
    )
    placement = layout.place(ranges, apart=True)
    result = collection(
        [module.weight for module in modules],
        torch.cat([b.input.flatten() for b in bags]),
        torch.cat(starts),
        _weights(bags),
        placement,
        modules[0].weight.dtype,
        False,
        layout.has_max,
        sparse=modules[0].sparse,
    )
    sizes = [count * module.embedding_dim for count, module in zip(counts, modules, strict=True)]
    # Unlike the parts that split gives, these may be changed in place, as the results of bags may.
    parts = torch.unsafe_split_with_sizes(result, sizes)
    return [
        part.view(count, module.embedding_dim)
        for part, count, module in zip(parts, counts, modules, strict=True)
    ]


def _offsets(bags: Bags) -> Tensor:
    """Where each bag starts and the last ends, [B + 1]."""
    if bags.offsets is None:
        rows, columns = bags.input.shape
        return torch.arange(rows + 1, dtype=bags.input.dtype, device=bags.input.device) * columns
    if bags.module.include_last_offset:
        return bags.offsets
    return torch.cat([bags.offsets, bags.offsets.new_full((1,), bags.input.numel())])


def _weights(bags: Sequence[Bags]) -> Tensor | None:
    if all(b.per_sample_weights is None for b in bags):
        return None
    return torch.cat(
        [
            b.module.weight.new_ones(b.input.numel())
            if b.per_sample_weights is None
            else b.per_sample_weights.flatten()
            for b in bags
        ]
    )


class CollectingRewriter(MethodRewriter):
    """Hands the calls of loops in one method to a ``Lookups``, where modules of ``self`` are called."""

    def __init__(self, definition: ast.FunctionDef, function: FunctionType) -> None:
        super().__init__(definition, function)
        inner = [n for n in ast.walk(definition) if isinstance(n, _FUNCTIONS) and n is not definition]
        self._captured = {x.id for function in inner for x in ast.walk(function) if isinstance(x, ast.Name)}
        if self._is_plain and self._names_are_known:
            definition = self.visit(definition)
            self._collect_loops(definition)
        self.definition = definition

    def visit_ListComp(self, node: ast.ListComp) -> ast.expr:
        self.generic_visit(node)
        return self._collected(node, "as_list", [], node.elt)

    def visit_DictComp(self, node: ast.DictComp) -> ast.expr:
        self.generic_visit(node)
        return self._collected(node, "as_dict", [node.key], node.value)

    def _collected(
        self, node: ast.ListComp | ast.DictComp, method: str, key: list[ast.expr], value: ast.expr
    ) -> ast.expr:
        inside = [x for part in ast.iter_child_nodes(node) for x in ast.walk(part)]
        if any(isinstance(x, _LEAVES_LOOP) for x in inside) or any(g.is_async for g in node.generators):
            return node
        if (call := self._call(value)) is None:
            return node
        calls = ast.GeneratorExp(ast.Tuple([*key, *call], ast.Load()), node.generators)
        function = ast.Attribute(self._helper(HELPER), method, ast.Load())
        return _placed(ast.Call(function, [calls], []), node)

    def _call(self, call: ast.expr) -> list[ast.expr] | None:
        """Module, arguments and keywords of a call of a module in a container of ``self``."""
        if not isinstance(call, ast.Call):
            return None
        paths = tuple(path for path in self._paths(call.func) if path[-1:] == ("*",))
        if not paths:
            return None
        self.sites.append(Site(self._method, "", paths))
        names: list[ast.expr | None] = [None if k.arg is None else ast.Constant(k.arg) for k in call.keywords]
        keywords = ast.Dict(names, [k.value for k in call.keywords])
        return [call.func, ast.Tuple(call.args, ast.Load()), keywords]

    def _collect_loops(self, definition: ast.FunctionDef) -> None:
        if any(isinstance(node, ast.Try) for node in ast.walk(definition)):
            return  # it might see results that are not there yet
        for node in list(ast.walk(definition)):
            for field in ("body", "orelse"):
                block = getattr(node, field, None)
                if isinstance(block, list):
                    setattr(node, field, self._with_loops_collected(block))

    def _with_loops_collected(self, block: list[ast.stmt]) -> list[ast.stmt]:
        result: list[ast.stmt] = []
        for statement in block:
            name = f"{HELPER}_{len(self.sites)}"
            filled = self._collect_loop(statement, result, name) if isinstance(statement, ast.For) else None
            if filled is None:
                result.append(statement)
                continue
            lookups = ast.Call(self._helper(HELPER), [ast.Name(filled, ast.Load())], [])
            end = ast.Call(ast.Attribute(ast.Name(name, ast.Load()), "end", ast.Load()), [], [])
            result += [
                _placed(ast.Assign([ast.Name(name, ast.Store())], lookups), statement),
                statement,
                _placed(ast.Expr(end), statement),
            ]
        return result

    def _collect_loop(self, loop: ast.For, before: list[ast.stmt], name: str) -> str | None:
        """Change a loop that appends to a list that nothing else sees meanwhile; gives the list's name."""
        if loop.orelse or any(isinstance(node, _LEAVES_LOOP) for node in ast.walk(loop)):
            return None
        appends = [(i, *found) for i, statement in enumerate(loop.body) if (found := _append(statement))]
        if len(appends) != 1:
            return None
        at, filled, value = appends[0]
        made = [i for i, statement in enumerate(before) if _makes_list(statement, filled)]
        if len(made) != 1 or self._bound[filled] != 1 or filled in self._captured:
            return None
        if any(_mentions(statement, filled) for statement in before[made[0] + 1 :]):
            return None
        if _mentions(loop, filled) != 1 or (call := self._call(value)) is None:
            return None
        function = ast.Attribute(ast.Name(name, ast.Load()), "call", ast.Load())
        loop.body[at] = _placed(ast.Expr(ast.Call(function, call, [])), loop.body[at])
        return filled


def _append(statement: ast.stmt) -> tuple[str, ast.expr] | None:
    """The list's name and the value in ``name.append(value)``."""
    match statement:
        case ast.Expr(ast.Call(ast.Attribute(ast.Name(name), "append"), [value], [])):
            return name, value
    return None


def _makes_list(statement: ast.stmt, name: str) -> bool:
    """Whether this is ``name = []``."""
    match statement:
        case ast.Assign([ast.Name(target)], ast.List([])) | ast.AnnAssign(ast.Name(target), _, ast.List([])):
            return target == name
    return False


def _mentions(node: ast.AST, name: str) -> int:
    return sum(isinstance(inside, ast.Name) and inside.id == name for inside in ast.walk(node))


def _placed(node: Any, at: ast.AST) -> Any:
    return ast.fix_missing_locations(ast.copy_location(node, at))

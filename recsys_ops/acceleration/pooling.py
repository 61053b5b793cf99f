"""Recognises ``table(ids).sum(1)`` in the methods of a module, and pools without the rows in between.

The rewrite is local: that one expression becomes a call of ``pooled_lookup``, which
evaluates the same operands in the same order, and looks at run time whether it may
pool directly. Everything else in the method runs as it was written, so control flow,
attributes, contexts and side effects need no analysis.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from recsys_ops.acceleration.expressions import MethodRewriter, Site
from recsys_ops.embedding_bag.api import embedding_bag
from recsys_ops.embedding_bag_collection.torchrec_modules import has_hooks

HELPER = "_recsys_ops_pooled_lookup"
MODES = ("sum", "mean")
_FUNCTIONS = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_REPEATED = (*_FUNCTIONS, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)


class PooledEmbedding(nn.Embedding):
    """An ``nn.Embedding`` whose pooled lookups skip the rows in between."""

    def pooled(self, mode: str, dim: int, *args: Any, **kwargs: Any) -> Tensor:
        """The sum or mean over ``dim``, 1 or -2, of the rows looked up."""
        if len(args) == 1 and not kwargs and self._is_bags(args[0], mode):
            return embedding_bag(
                args[0],
                self.weight,
                scale_grad_by_freq=self.scale_grad_by_freq,
                mode=mode,
                sparse=self.sparse,
            )
        return pool(self(*args, **kwargs), mode, dim)

    def _is_bags(self, input: Any, mode: str) -> bool:
        """Whether the lookup is that of an ``EmbeddingBag``, whatever has changed since the swap."""
        return (
            isinstance(input, Tensor)
            and input.dim() == 2
            and (mode == "sum" or input.shape[1] > 0)  # a mean of nothing is NaN
            and self.padding_idx is None
            and self.max_norm is None
            and not has_hooks(self)
            and not _has_any_global_hook()
            # Autocast sums half precision in fp32 on some devices.
            and (
                self.weight.dtype in (torch.float32, torch.float64)
                or not torch.is_autocast_enabled(self.weight.device.type)
            )
        )


def pooled_lookup(mode: str, dim: int, lookup: Any, /, *args: Any, **kwargs: Any) -> Any:
    """What a rewritten method calls for ``lookup(*args, **kwargs).sum(dim)``, or mean."""
    if isinstance(lookup, PooledEmbedding):
        return lookup.pooled(mode, dim, *args, **kwargs)
    return pool(lookup(*args, **kwargs), mode, dim)


def pool(rows: Any, mode: str, dim: int) -> Any:
    return rows.sum(dim) if mode == "sum" else rows.mean(dim)


class PoolingRewriter(MethodRewriter):
    """Replaces ``<lookup>(…).sum(1)`` in one method, where ``<lookup>`` is reached from ``self``.

    The rows may have a name in between, ``rows = <lookup>(…)`` and later ``rows.sum(1)`` in
    the same block, if nothing else uses it: they are then pooled where they are looked up.
    """

    def __init__(self, definition: ast.FunctionDef, function: FunctionType) -> None:
        super().__init__(definition, function)
        self._torch = {name for name, value in function.__globals__.items() if value is torch}
        self._torch -= set(self._bound)
        self._pooled: dict[int, tuple[str, int]] = {}  # a lookup, by id: how it is pooled
        self._named: dict[int, str] = {}  # a pooling, by id: the name that now holds its result
        if self._is_plain:
            if self._names_are_known:
                self._match_names(definition)
            definition = self.visit(definition)
        self.definition = definition

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if (name := self._named.get(id(node))) is not None:
            return ast.copy_location(ast.Name(name, ast.Load()), node)
        pooled = self._pooled.get(id(node))
        lookup: ast.expr = node
        if pooled is None and (pooling := self._pooling(node)):
            lookup, pooled = pooling[0], pooling[1:]
        if pooled is None or not isinstance(lookup, ast.Call) or not (paths := self._paths(lookup.func)):
            return self.generic_visit(node)  # type: ignore[return-value]
        self.sites.append(Site(self._method, pooled[0], paths))
        operands = self.generic_visit(lookup)
        assert isinstance(operands, ast.Call)
        arguments = [ast.Constant(pooled[0]), ast.Constant(pooled[1]), operands.func, *operands.args]
        call = ast.copy_location(ast.Call(self._helper(HELPER), arguments, operands.keywords), node)
        return ast.fix_missing_locations(call)

    def _match_names(self, definition: ast.FunctionDef) -> None:
        for node in ast.walk(definition):
            for field in ("body", "orelse", "finalbody"):
                block = getattr(node, field, None)
                if isinstance(block, list):
                    for i, statement in enumerate(block):
                        self._match_name(statement, block[i + 1 :])

    def _match_name(self, statement: ast.stmt, later: list[ast.stmt]) -> None:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target: ast.expr = statement.targets[0]
        elif isinstance(statement, ast.AnnAssign):
            target = statement.target
        else:
            return
        lookup = statement.value
        if not (isinstance(target, ast.Name) and isinstance(lookup, ast.Call) and self._paths(lookup.func)):
            return
        if self._bound[target.id] != 1 or self._loaded[target.id] != 1:
            return
        for node in _evaluated_once(later):
            if isinstance(node, ast.Call) and (pooling := self._pooling(node)):
                rows, mode, dim = pooling
                if isinstance(rows, ast.Name) and rows.id == target.id:
                    self._pooled[id(lookup)] = (mode, dim)
                    self._named[id(node)] = target.id

    def _pooling(self, node: ast.Call) -> tuple[ast.expr, str, int] | None:
        """(rows, mode, dim) of ``rows.sum(dim)`` or ``torch.sum(rows, dim)``, or mean."""
        function, arguments = node.func, list(node.args)
        if not isinstance(function, ast.Attribute) or function.attr not in MODES:
            return None
        rows = function.value
        if isinstance(rows, ast.Name) and rows.id in self._torch:
            if not arguments:
                return None
            rows = arguments.pop(0)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        keepdim = keywords.pop("keepdim", ast.Constant(False))
        if "dim" in keywords:
            arguments.append(keywords.pop("dim"))
        if keywords or len(arguments) != 1 or _constant(keepdim) is not False:
            return None
        dim = _constant(arguments[0])
        return (rows, function.attr, dim) if type(dim) is int and dim in (1, -2) else None


def _evaluated_once(statements: list[ast.stmt]) -> Iterator[ast.AST]:
    """The expressions of a block that run once each time it does, wholly inside it."""
    pending: list[ast.AST] = [statement for statement in statements if isinstance(statement, _SIMPLE)]
    while pending:
        node = pending.pop()
        yield node
        pending += [child for child in ast.iter_child_nodes(node) if not isinstance(child, _REPEATED)]


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None

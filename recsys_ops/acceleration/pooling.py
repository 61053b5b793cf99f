"""Recognises ``table(ids).sum(1)`` in the methods of a module, and pools without the rows in between.

The rewrite is local: that one expression becomes a call of ``pooled_lookup``, which
evaluates the same operands in the same order, and looks at run time whether it may
pool directly. Everything else in the method runs as it was written, so control flow,
attributes, contexts and side effects need no analysis.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from recsys_ops.embedding_bag.api import embedding_bag

HELPER = "_recsys_ops_pooled_lookup"
_MODES = ("sum", "mean")
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


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def pooled_lookup(mode: str, dim: int, lookup: Any, /, *args: Any, **kwargs: Any) -> Any:
    """What a rewritten method calls for ``lookup(*args, **kwargs).sum(dim)``, or mean."""
    if isinstance(lookup, PooledEmbedding):
        return lookup.pooled(mode, dim, *args, **kwargs)
    return pool(lookup(*args, **kwargs), mode, dim)


def pool(rows: Any, mode: str, dim: int) -> Any:
    return rows.sum(dim) if mode == "sum" else rows.mean(dim)


@dataclass(frozen=True)
class Site:
    """One pooled lookup: its mode, and where on ``self`` the tables that it may use are.

    A path holds names of submodules, and ``"*"`` for any child.
    """

    method: str
    mode: str
    paths: tuple[tuple[str, ...], ...]

    def tables(self, owner: nn.Module) -> Iterator[nn.Module]:
        """The modules that this lookup of ``owner`` may call, embeddings or not."""
        for path in self.paths:
            found: list[nn.Module] = [owner]
            for name in path:
                if name == "*":
                    found = [child for module in found for child in module.children()]
                    continue
                named = [module._modules.get(name) for module in found]
                children = [child for child in named if child is not None]
                if children or name not in ("items", "values"):  # else a method of ModuleDict
                    found = children
            yield from found


@dataclass(frozen=True)
class PooledMethods:
    """The methods of a class that pool lookups, rewritten; and why others could not be."""

    functions: dict[str, FunctionType]
    sites: tuple[Site, ...]
    obstacles: tuple[str, ...]


class _CannotRewrite(Exception):
    """The reason, as a clause for the report."""


def pooled_methods(owner: type) -> PooledMethods:
    """Find and rewrite the pooled lookups in the methods that ``owner`` defines or inherits."""
    functions: dict[str, FunctionType] = {}
    sites: list[Site] = []
    obstacles = []
    seen: set[str] = set()
    for definer in owner.__mro__:
        if definer is object or definer.__module__.partition(".")[0] == "torch":
            continue
        for name, function in vars(definer).items():
            if name in seen:
                continue
            seen.add(name)
            if not isinstance(function, FunctionType) or name == "__init__":
                continue
            try:
                rewritten, found = _rewrite(function)
            except _CannotRewrite as reason:
                obstacles.append(f"{reason} ({definer.__name__}.{name})")
                continue
            if rewritten is not None:
                functions[name] = rewritten
                sites += found
    return PooledMethods(functions, tuple(sites), tuple(obstacles))


@functools.cache
def _rewrite(function: FunctionType) -> tuple[FunctionType | None, list[Site]]:
    """The function with its pooled lookups replaced, or None where it has none."""
    if not _attributes(function.__code__) & set(_MODES):
        return None, []
    try:
        source = "".join(inspect.findsource(function)[0])
        definition = _definition(ast.parse(source), function)
    except (OSError, TypeError, SyntaxError):
        raise _CannotRewrite("its source is not available") from None
    if definition is None or not definition.args.posonlyargs + definition.args.args:
        return None, []
    rewriter = _Rewriter(definition, function)
    if not rewriter.sites:
        return None, []
    # Compiled in its file, for the sake of imports, enclosing functions and line numbers.
    if definition.decorator_list or _compile(ast.parse(source), function) != function.__code__:
        raise _CannotRewrite("it pools a lookup, but its source is not all that runs")
    tree = ast.parse(source)
    place = _definition(tree, function)
    assert place is not None
    place.body = rewriter.definition.body
    code = _compile(tree, function)
    if code is None or code.co_freevars != function.__code__.co_freevars:
        raise _CannotRewrite("it pools a lookup in a way that cannot be rewritten")
    rewritten = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    rewritten.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(rewritten, function), rewriter.sites  # type: ignore[return-value]


def _attributes(code: CodeType) -> set[str]:
    """The names that a function and those inside it use."""
    inner = [_attributes(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def _definition(tree: ast.Module, function: FunctionType) -> ast.FunctionDef | None:
    """Where a file defines the function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == function.__name__:
            first = node.decorator_list[0] if node.decorator_list else node
            if first.lineno == function.__code__.co_firstlineno:
                return node
    return None


def _compile(tree: ast.Module, function: FunctionType) -> CodeType | None:
    """The code that a file gives the function."""
    pending = [compile(tree, function.__code__.co_filename, "exec", dont_inherit=True)]
    while pending:
        code = pending.pop()
        if code.co_name == function.__name__ and code.co_firstlineno == function.__code__.co_firstlineno:
            return code
        pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return None


class _Rewriter(ast.NodeTransformer):
    """Replaces ``<lookup>(…).sum(1)`` in one method, where ``<lookup>`` is reached from ``self``.

    The rows may have a name in between, ``rows = <lookup>(…)`` and later ``rows.sum(1)`` in
    the same block, if nothing else uses it: they are then pooled where they are looked up.
    """

    def __init__(self, definition: ast.FunctionDef, function: FunctionType) -> None:
        self.sites: list[Site] = []
        self._method = definition.name
        self._self = (definition.args.posonlyargs + definition.args.args)[0].arg
        self._iterated: dict[str, list[ast.expr]] = {}
        self._bound: Counter[str] = Counter()
        self._loaded: Counter[str] = Counter()
        for node in ast.walk(definition):
            self._note(node)
        self._torch = {name for name, value in function.__globals__.items() if value is torch}
        self._torch -= set(self._bound)
        self._pooled: dict[int, tuple[str, int]] = {}  # a lookup, by id: how it is pooled
        self._named: dict[int, str] = {}  # a pooling, by id: the name that now holds its result
        if self._bound[self._self] == 1:
            if not self._loaded.keys() & {"locals", "vars", "eval", "exec"}:
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
        helper = ast.Attribute(ast.Name(self._self, ast.Load()), HELPER, ast.Load())
        arguments = [ast.Constant(pooled[0]), ast.Constant(pooled[1]), operands.func, *operands.args]
        call = ast.copy_location(ast.Call(helper, arguments, operands.keywords), node)
        return ast.fix_missing_locations(call)

    def _note(self, node: ast.AST) -> None:
        if isinstance(node, ast.Name):
            (self._loaded if isinstance(node.ctx, ast.Load) else self._bound)[node.id] += 1
        elif isinstance(node, ast.arg):
            self._bound[node.arg] += 1
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            self._bound.update({name: 2 for name in node.names})
        elif isinstance(getattr(node, "name", None), str):  # def, class, except … as, case … as, import
            self._bound[getattr(node, "asname", None) or node.name] += 1  # type: ignore[attr-defined]
        if isinstance(node, (ast.For, ast.comprehension)):
            for target in ast.walk(node.target):
                if isinstance(target, ast.Name):
                    self._iterated.setdefault(target.id, []).append(node.iter)

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
        if not isinstance(function, ast.Attribute) or function.attr not in _MODES:
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

    def _paths(self, table: ast.expr) -> tuple[tuple[str, ...], ...]:
        """Where on ``self`` the modules are that an expression may stand for."""
        if isinstance(table, ast.Attribute):
            return tuple((*path, table.attr) for path in self._paths(table.value))
        if isinstance(table, ast.Subscript):
            return tuple((*path, "*") for path in self._paths(table.value))
        if not isinstance(table, ast.Name):
            return ()
        if table.id == self._self:
            return ((),)
        iterables = self._iterated.pop(table.id, [])  # popped meanwhile, for `for x in x.y`
        nodes = [node for iterable in iterables for node in ast.walk(iterable)]
        attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
        found = tuple((*path, "*") for attribute in attributes for path in self._paths(attribute))
        self._iterated[table.id] = iterables
        return found


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

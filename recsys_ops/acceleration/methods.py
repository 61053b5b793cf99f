"""Rewrites methods of a module's class from their source, where they look tables up."""

from __future__ import annotations

import ast
import dis
import functools
import inspect
from dataclasses import dataclass
from types import CodeType, FunctionType

from recsys_ops.acceleration.collected import CollectingRewriter
from recsys_ops.acceleration.expressions import Site
from recsys_ops.acceleration.pooling import MODES, PoolingRewriter


@dataclass(frozen=True)
class RewrittenMethods:
    """The methods of a class that look tables up, rewritten; and why others could not be."""

    functions: dict[str, FunctionType]
    pooled: tuple[Site, ...]  # lookups that are then pooled
    collected: tuple[Site, ...]  # loops of lookups
    obstacles: tuple[str, ...]


class _CannotRewrite(Exception):
    """The reason, as a clause for the report."""


def rewritten_methods(owner: type) -> RewrittenMethods:
    """Find and rewrite the lookups in the methods that ``owner`` defines or inherits."""
    functions: dict[str, FunctionType] = {}
    pooled: list[Site] = []
    collected: list[Site] = []
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
                rewritten, of_pooled, of_collected = _rewrite(function)
            except _CannotRewrite as reason:
                obstacles.append(f"{reason} ({definer.__name__}.{name})")
                continue
            if rewritten is not None:
                functions[name] = rewritten
                pooled += of_pooled
                collected += of_collected
    return RewrittenMethods(functions, tuple(pooled), tuple(collected), tuple(obstacles))


@functools.cache
def _rewrite(function: FunctionType) -> tuple[FunctionType | None, list[Site], list[Site]]:
    """The function with its lookups replaced, or None without any; those pooled, those in loops."""
    pools = bool(_attributes(function.__code__) & set(MODES))
    if not pools and not _loops(function.__code__):
        return None, [], []
    try:
        source = "".join(inspect.findsource(function)[0])
        definition = _definition(ast.parse(source), function)
    except (OSError, TypeError, SyntaxError):
        raise _CannotRewrite("its source is not available") from None
    if definition is None or not definition.args.posonlyargs + definition.args.args:
        return None, [], []
    collecting = CollectingRewriter(definition, function)
    pooling = PoolingRewriter(collecting.definition, function)
    if not pooling.sites and not collecting.sites:
        return None, [], []
    # Compiled in its file, for the sake of imports, enclosing functions and line numbers.
    looks_up = "pools a lookup" if pooling.sites else "looks up in a loop"
    if definition.decorator_list or _compile(ast.parse(source), function) != function.__code__:
        raise _CannotRewrite(f"it {looks_up}, but its source is not all that runs")
    tree = ast.parse(source)
    place = _definition(tree, function)
    assert place is not None
    place.body = pooling.definition.body
    code = _compile(tree, function)
    if code is None or code.co_freevars != function.__code__.co_freevars:
        raise _CannotRewrite(f"it {looks_up} in a way that cannot be rewritten")
    rewritten = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    rewritten.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(rewritten, function)
    return rewritten, pooling.sites, collecting.sites


def _loops(code: CodeType) -> bool:
    """Whether a function or one inside it has a loop."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return any(i.opname == "FOR_ITER" for i in dis.get_instructions(code)) or any(map(_loops, inner))


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

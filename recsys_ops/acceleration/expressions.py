"""Expressions of a method, and which submodules of ``self`` they may stand for."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType

from torch import nn


@dataclass(frozen=True)
class Site:
    """One lookup: its mode if it is pooled, and where on ``self`` the tables that it may use are.

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


class MethodRewriter(ast.NodeTransformer):
    """What a method binds and reads, before a subclass changes it."""

    def __init__(self, definition: ast.FunctionDef, function: FunctionType) -> None:
        self.sites: list[Site] = []
        self._method = definition.name
        self._self = (definition.args.posonlyargs + definition.args.args)[0].arg
        self._iterated: dict[str, list[ast.expr]] = {}
        self._bound: Counter[str] = Counter()
        self._loaded: Counter[str] = Counter()
        for node in ast.walk(definition):
            self._note(node)

    @property
    def _is_plain(self) -> bool:
        """Whether names mean what they seem to."""
        return self._bound[self._self] == 1

    @property
    def _names_are_known(self) -> bool:
        return not self._loaded.keys() & {"locals", "vars", "eval", "exec"}

    def _helper(self, name: str) -> ast.expr:
        return ast.Attribute(ast.Name(self._self, ast.Load()), name, ast.Load())

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

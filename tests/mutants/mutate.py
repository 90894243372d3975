"""Remove one check of a validator, in memory. A pytest plugin:

    QBB_MUTANT=qbb_export.format:3 python -m pytest -p tests.mutants.mutate tests/unit/test_format.py

A check is an ``if`` that raises or yields a problem (removed as a whole, and each part of an ``or`` by itself), or a
call of another check. No file is touched.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType

CALLS = ("_check", "run_checker", "node_mode", "VerifyBinaryBasis")


@dataclass(frozen=True)
class Mutant:
    """What is removed: the line in its file, and the source of the check."""

    line: int
    text: str


def _raises(body: list[ast.stmt]) -> bool:
    """Whether a branch ends in an error: raised, or handed to who raises it."""
    return any(
        isinstance(statement, ast.Raise) or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Yield))
        for statement in body
    )


def _is_check_call(statement: ast.stmt) -> bool:
    if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)):
        return False
    return ast.unparse(statement.value).startswith(CALLS)


def _places(tree: ast.Module, source: str) -> Iterator[tuple[Mutant, ast.AST, str, int | None]]:
    """Each check with the node that holds it, the field and, in a list, the place in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and _raises(node.body):
            yield Mutant(node.lineno, f"if {ast.unparse(node.test)}"), node, "test", None
            if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.Or):
                for place, part in enumerate(node.test.values):
                    yield Mutant(part.lineno, f"… or {ast.unparse(part)}"), node.test, "values", place
        for field in ("body", "orelse"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                for place, statement in enumerate(statements):
                    if _is_check_call(statement):
                        yield Mutant(statement.lineno, ast.unparse(statement)), node, field, place


def mutants(source: str) -> list[Mutant]:
    """All that can be removed from a module."""
    return [place[0] for place in _places(ast.parse(source), source)]


def without(source: str, number: int) -> ast.Module:
    """The module without one of its checks."""
    tree = ast.parse(source)
    _, node, field, place = list(_places(tree, source))[number]
    if place is None:
        setattr(node, field, ast.Constant(False))
    else:
        getattr(node, field)[place] = ast.Constant(False) if field == "values" else ast.Pass()
    return ast.fix_missing_locations(tree)


class _Loader(importlib.machinery.SourceFileLoader):
    number = 0

    def get_code(self, fullname: str) -> CodeType:
        """Compiled from the changed tree, past all caches."""
        source = self.get_data(self.path).decode()
        return compile(without(source, self.number), self.path, "exec")


class _Finder:
    """First in line for one module; asks the others where it is."""

    def __init__(self, module: str, number: int) -> None:
        self.module, self.number = module, number

    def find_spec(self, name: str, path: object = None, target: object = None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        assert spec is not None and spec.origin is not None
        loader = _Loader(name, spec.origin)
        loader.number = self.number
        return importlib.util.spec_from_file_location(name, spec.origin, loader=loader)


if os.environ.get("QBB_MUTANT"):
    _module, _, _number = os.environ["QBB_MUTANT"].partition(":")
    assert _module not in sys.modules, f"{_module} is imported already"
    sys.meta_path.insert(0, _Finder(_module, int(_number)))

"""Mutation operators: small changes to a module that a good test must notice."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import NamedTuple

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift},
}
SKIPPED_FIELDS = ("annotation", "returns", "decorator_list")
UNSEEN = ("device",)  # keyword arguments without effect on a machine that has no GPU
CONTEXT = 60  # characters that a change shows on either side


class Mutant(NamedTuple):
    """A module with one change.

    Attributes:
        function: qualified name of the function or class that is changed, "" for the module itself.
        lines: first and last line of the changed statement in the original source.
        before: the changed line, as `ast.unparse` writes it, around the change.
        after: what replaces it.
        source: the whole mutated module.
    """

    function: str
    lines: tuple[int, int]
    before: str
    after: str
    source: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies the mutant while lines move."""
        return self.function, self.before, self.after


def mutants(source: str) -> Iterator[Mutant]:
    """All mutants of a module, in the order of its source."""
    tree = ast.parse(source)
    original = ast.unparse(tree).splitlines()
    for function, statement, parent, field, at, node in list(_places(tree)):
        for replacement in _replacements(node):
            _put(parent, field, at, replacement)
            mutated = ast.unparse(tree)
            _put(parent, field, at, node)
            before, after = _difference(original, mutated.splitlines())
            yield Mutant(function, _lines(statement), before, after, mutated + "\n")


def _places(tree: ast.Module) -> Iterator[tuple[str, ast.stmt, ast.AST, str, int | None, ast.AST]]:
    """Every node that may change: its function, its statement, and where its parent holds it."""

    def visit(parent: ast.AST, function: str, statement: ast.stmt | None) -> Iterator:
        for field, value in ast.iter_fields(parent):
            if field in SKIPPED_FIELDS:
                continue
            nodes = enumerate(value) if isinstance(value, list) else [(None, value)]
            for at, node in nodes:
                if not isinstance(node, ast.AST) or _without_behaviour(node):
                    continue
                inner, here = function, statement
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    inner = f"{function}.{node.name}".lstrip(".")
                if isinstance(node, ast.stmt):
                    here = node
                if here is not None:
                    yield function, here, parent, field, at, node
                yield from visit(node, inner, here)

    yield from visit(tree, "", None)


def _without_behaviour(node: ast.AST) -> bool:
    """Texts, imports, what only a type checker runs, and the table of a method's defaults."""
    match node:
        case ast.Expr(value=ast.Constant()) | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.Assign([ast.Name(id="KEYS")]):
            return True
    return False


def _replacements(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that may stand in the place of ``node``, one mutant each."""
    match node:
        case ast.Compare(left, ops, comparators):
            for i, op in enumerate(ops):
                if type(op) in SWAPS:
                    swapped = [*ops[:i], SWAPS[type(op)](), *ops[i + 1 :]]
                    yield ast.Compare(left, swapped, comparators)
        case ast.BinOp(left, op, right) if type(op) in SWAPS and not _is_text(left, right):
            yield ast.BinOp(left, SWAPS[type(op)](), right)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(SWAPS[type(op)](), values)
        case ast.UnaryOp(ast.Not() | ast.Invert() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            yield ast.Constant(value + 1)
            yield ast.Constant(value - 1)
        case ast.Return(value) if value is not None and ast.unparse(value) != "None":
            yield ast.Return(ast.Constant(None))
        case ast.Expr(ast.Call()):
            yield ast.Pass()
        case ast.AugAssign(target, op, value):
            yield ast.Pass()
            if type(op) in SWAPS and not _is_text(value):
                yield ast.AugAssign(target, SWAPS[type(op)](), value)
        case ast.Call(func, args, keywords):
            for i, keyword in enumerate(keywords):
                if keyword.arg not in (None, *UNSEEN):
                    yield ast.Call(func, args, [*keywords[:i], *keywords[i + 1 :]])


def _is_text(*nodes: ast.AST) -> bool:
    texts = (ast.JoinedStr, ast.List, ast.Tuple)
    return any(
        isinstance(node, texts) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
        for node in nodes
    )


def _put(parent: ast.AST, field: str, at: int | None, node: ast.AST) -> None:
    if at is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[at] = node


def _lines(statement: ast.stmt) -> tuple[int, int]:
    """First and last line of a statement; of its header, if it has a body."""
    body = getattr(statement, "body", None)
    last = max(statement.lineno, body[0].lineno - 1) if body else statement.end_lineno
    return statement.lineno, last or statement.lineno


def _difference(before: list[str], after: list[str]) -> tuple[str, str]:
    """The lines in which two versions differ, cut to `CONTEXT` around the difference."""
    head, tail = _shared_ends(before, after)
    one = " ".join(line.strip() for line in before[head : len(before) - tail])
    other = " ".join(line.strip() for line in after[head : len(after) - tail])
    head, tail = _shared_ends(one, other)
    return _cut(one, head, tail), _cut(other, head, tail)


def _shared_ends(one: Sequence[str], other: Sequence[str]) -> tuple[int, int]:
    """Lengths of the common beginning and of the common end, which do not overlap."""
    most = min(len(one), len(other))
    head = next((i for i in range(most) if one[i] != other[i]), most)
    most -= head
    tail = next((i for i in range(most) if one[-1 - i] != other[-1 - i]), most)
    return head, tail


def _cut(line: str, head: int, tail: int) -> str:
    first, last = max(0, head - CONTEXT), min(len(line), len(line) - tail + CONTEXT)
    return "..." * (first > 0) + line[first:last] + "..." * (last < len(line))

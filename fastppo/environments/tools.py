"""Two tools: a calculator, and a runner of Python code with limits."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

_MOST_BITS = 4096  # of an integer result
_MOST_CHARACTERS = 500  # of an expression

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def _round(number: float, digits: int | None = None) -> float:
    """Round as Python does; digits beyond any number's first are as good as those before it, and take no time."""
    return round(number, digits if digits is None else max(digits, -_MOST_BITS))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs, "ceil": math.ceil, "exp": math.exp, "floor": math.floor, "log": math.log, "max": max, "min": min,
    "round": _round, "sqrt": math.sqrt,
}  # fmt: skip


class Calculator:
    """Works out an arithmetic expression: numbers, + - * / // % **, brackets, and abs, ceil, exp, floor, log, max, min,
    round, sqrt.

    Nothing is executed: the expression is parsed and its parts are computed, integers of up to 4096 bits.
    """

    def __call__(self, expression: str) -> str:
        """
        Work out an arithmetic expression.

        Args:
            expression: The expression, such as (2 + 3) * 4.

        Raises:
            ValueError: it is none.
            ArithmeticError: it has no result.
        """  # the form that transformers reads a JSON schema from
        expression = expression.strip()
        if len(expression) > _MOST_CHARACTERS:
            raise ValueError(f"the expression has {len(expression)} characters, more than {_MOST_CHARACTERS}")
        try:
            value = _compute(ast.parse(expression, mode="eval").body)
        except (SyntaxError, RecursionError, MemoryError):
            raise ValueError(f"{expression!r} is not an arithmetic expression") from None
        return str(value) if isinstance(value, int) else f"{value:.12g}"


def _compute(node: ast.expr) -> int | float:
    value: Any = None
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        value = _UNARY[type(node.op)](_compute(node.operand))
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _compute(node.left), _compute(node.right)
        if isinstance(node.op, ast.Pow):
            _check_power(left, right)
        value = _BINARY[type(node.op)](left, right)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id not in _FUNCTIONS:
            raise ValueError(f"{node.func.id} is not one of the functions {', '.join(_FUNCTIONS)}")
        value = _FUNCTIONS[node.func.id](*(_compute(argument) for argument in node.args))
    if not isinstance(value, (int, float)):
        raise ValueError(f"{ast.unparse(node)!r} is not a real number")
    if value.bit_length() > _MOST_BITS if isinstance(value, int) else not math.isfinite(value):
        raise OverflowError("the result is too large")
    return value


def _check_power(base: float, exponent: float) -> None:
    """Raise OverflowError before a power is computed that would take long to compute."""
    are_whole = isinstance(base, int) and isinstance(exponent, int)
    if are_whole and abs(base) > 1 and int(base).bit_length() * exponent > 2 * _MOST_BITS:
        raise OverflowError(f"the power has more than {_MOST_BITS} bits")

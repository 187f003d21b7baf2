"""Tools that a policy may call in a `ToolEnv`: a calculator.

heeler ppo dialogue --env heeler.envs.tools:Calculator --reward math ...
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from typing import ClassVar

from heeler.envs.text import ToolEnv, ToolError

LONGEST = 200  # characters of an expression
MOST_BITS = 256  # of a whole number: about 77 digits
ALLOWED = re.compile(r"[0-9.+\-*/() ]*")

Number = int | float


def calculate(expression: str) -> str:
    """The value of an expression of numbers, `+ - * / **` and brackets.

    Whole numbers are exact, and so is a division that leaves no rest; everything else has 12 significant digits.

    Raises:
        ToolError: anything else in the expression, a division by zero, more than 200 characters, a whole number of
            more than 256 bits, a result that is no finite real number.
    """
    expression = expression.strip()
    if len(expression) > LONGEST:
        raise ToolError(f"more than {LONGEST} characters")
    if not ALLOWED.fullmatch(expression):
        raise ToolError("only numbers, + - * / ** and brackets")
    try:
        value = _value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ToolError("not an expression") from None
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except OverflowError:
        raise ToolError("too large") from None
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as number):
            return _bounded(number)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=operation, right=right):
            return _bounded(_apply(operation, _value(left), _value(right)))
    raise ToolError("only numbers, + - * / ** and brackets")


def _apply(operation: ast.operator, a: Number, b: Number) -> Number:
    match operation:
        case ast.Add():
            return a + b
        case ast.Sub():
            return a - b
        case ast.Mult():
            return a * b
        case ast.Div():
            exact = isinstance(a, int) and isinstance(b, int) and b != 0 and a % b == 0
            return a // b if exact else a / b
        case ast.Pow():
            if isinstance(a, int) and isinstance(b, int) and abs(a) > 1 and a.bit_length() * abs(b) > 2 * MOST_BITS:
                raise OverflowError  # before it is computed: towers of powers do not end
            power = a**b
            if isinstance(power, complex):
                raise ToolError("not a real number")
            return power
    raise ToolError("only numbers, + - * / ** and brackets")


def _bounded(value: Number) -> Number:
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise OverflowError
    if isinstance(value, float) and not abs(value) < float("inf"):
        raise OverflowError
    return value


class Calculator(ToolEnv):
    """A question, and a calculator: `<calc>12*7</calc>` is answered by ` = 84`."""

    tools: ClassVar[Mapping[str, Callable[[str], str]]] = {"calc": calculate}

"""Tools: what a calculator answers and refuses, and when an episode with tools is over."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import heeler
from heeler.envs.text import TextStep, ToolEnv, ToolError, load_environment
from heeler.envs.tools import Calculator, calculate
from heeler.types import HeelerError


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*7", "84"), (" 2 + 3 ", "5"), ("1/4", "0.25"), ("6/3", "2"), ("1/3", "0.333333333333"), ("-(2-5)**3", "27"),
        ("2**-1", "0.5"), ("2**0.5", "1.41421356237"), ("3.0", "3"), ("10**20", "100000000000000000000"), ("--3", "3"),
    ],
)  # fmt: skip
def test_calculate(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("1/0", "division by zero"), ("0**-1", "division by zero"), ("9**9**9", "too large"),
        ("9**9**9**9", "too large"), ("(-8)**0.5", "not a real number"),
        ("10**80", "too large"), ("1.5**9999", "too large"), ("2**9999", "too large"),
        ("1 2", "not an expression"), ("", "not an expression"), ("(", "not an expression"), ("1" * 100, "too large"),
        ("1+" * 150 + "1", "more than 200"), ("__import__('os')", "only numbers"), ("7//2", "only numbers"),
        ("5 % 2", "only numbers"), ("1,2", "only numbers"), ("5()", "only numbers"), ("()", "only numbers"),
        ("1\n+1", "only numbers"), ("True", "only numbers"),
    ],
)  # fmt: skip
def test_calculate_refuses(expression: str, says: str) -> None:
    with pytest.raises(ToolError, match=says):
        calculate(expression)


def test_a_call_is_answered_and_an_answer_ends() -> None:
    env = Calculator(prompt="What is 12 times 7?", answer="84")
    assert env.reset() == "" and Calculator.stop == ("</calc>",)
    assert env.step("It is <calc>12*7</calc>") == TextStep(" = 84", 0.0, False)
    assert env.step("<calc>1/0</calc>") == TextStep(" = error: division by zero", 0.0, False)
    assert env.step("<calc>1+<calc>2+2</calc>") == TextStep(" = 4", 0.0, False)  # the last call begun counts
    assert env.step("84") == TextStep("", 0.0, True)
    assert env.step("it is 8", cut=True) == TextStep("", 0.0, False, truncated=True)
    assert env.step("<calc>1+1</calc> = 3") == TextStep("", 0.0, True)  # a call that no turn ended with


def test_tools_of_ones_own() -> None:
    class Library(ToolEnv):
        tools = {"find": str.upper, "len": lambda text: str(len(text))}  # noqa: RUF012
        observation = "\n<out>{}</out>\n"

    class Lines(Library):
        stop = ("\n",)

    class Counted(Lines):
        tools = {"count": len}  # noqa: RUF012

    assert Counted.stop == ("</count>", "\n")
    assert Library.stop == ("</find>", "</len>") and ToolEnv.stop == () and Lines.stop == (*Library.stop, "\n")
    env = Library("q")
    assert env.step("<find>a{b}\nc</find>\n").observation == "\n<out>A{B}\nC</out>\n"
    assert env.step("<len>four</len>").observation == "\n<out>4</out>\n"
    assert env.step("<calc>1</calc>").terminated
    assert ToolEnv("q").step("<find>x</find>").terminated


def test_loading() -> None:
    assert load_environment("heeler.envs.tools:Calculator") is Calculator
    with pytest.raises(HeelerError, match="no environment was given: --env module:Name"):
        load_environment("")
    with pytest.raises(HeelerError, match="has no environment 'Abacus'"):
        load_environment("heeler.envs.tools:Abacus")


def test_the_example_of_the_docs() -> None:
    page = (Path(heeler.__file__).parents[1] / "docs" / "dialogue.md").read_text()
    block = re.search(r"```python\n(# my_envs.py\n.*?)```", page, re.DOTALL)
    assert block is not None
    names: dict[str, Any] = {}
    exec(block[1], names)
    env, low, high = names["Guess"]("Guess.", most=100, seed=3), 1, 100
    assert isinstance(env.reset(), str) and env.step("north").reward == -0.5
    for _ in range(7):
        middle = (low + high) // 2
        step = env.step(f" {middle}")
        if step.terminated:
            break
        low, high = (middle + 1, high) if step.observation == "more\n" else (low, middle - 1)
    assert step.terminated and step.reward == 1

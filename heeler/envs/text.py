"""Environments of texts: the policy writes a turn, the environment answers, until the episode ends.

An environment is made for every episode, by a *factory* (a class or a function) that gets the prompt's row as
keywords: `prompt=` and each other column, and `seed=` (63 bits, a function of the run's seed, update, prompt and
sample) where its signature takes that and no column has the name.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from heeler.runtime.packages import load_function, where_raised
from heeler.types import HeelerError

LARGEST_REWARD = 3e38  # rewards are stored as float32


@dataclass(frozen=True)
class TextStep:
    """What an environment says to one turn of the policy.

    Attributes:
        observation: text that follows the turn in the context; it may be empty. One that ends an episode for good is
            not read by anybody.
        reward: of this turn, finite.
        terminated: the episode is over: nothing can be earned after it.
        truncated: the episode is cut although more could be earned.
    """

    observation: str
    reward: float
    terminated: bool
    truncated: bool = False


class TextEnvironment(Protocol):
    """One episode. Made by its factory, `reset` once, then stepped until it ends or meets a cap.

    Two more things are optional:

    - A factory may have an attribute `stop`, strings that end a turn where the policy writes them, beside those of
      `Sampling.stop`.
    - `step` may have a parameter `cut`: whether the turn met its cap of tokens, so that the policy did not end it.
    """

    def reset(self) -> str:
        """Text that follows the prompt in the context, often empty. The prompt's own tokens are there already."""
        ...

    def step(self, action: str) -> TextStep:
        """Take a turn: the text that the policy wrote since the last observation.

        A stop string that ended it is part of it, an end-of-sequence token is not.
        """
        ...


EnvironmentFactory = Callable[..., TextEnvironment]


def load_environment(spec: str) -> EnvironmentFactory:
    """The factory that `module:Name` names.

    Raises:
        HeelerError: no spec, no such module, nothing of that name that can be called.
    """
    if not spec:
        raise HeelerError(
            "no environment was given: --env module:Name, a class with reset and step, or heeler.envs.tools:Calculator"
        )
    return load_function(spec, "environment", "my_envs:Maze")


class CheckedEnvironment:
    """An environment whose mistakes become sentences that name it, the prompt and the turn.

    Args:
        factory: makes the environment.
        row: the prompt's columns, `prompt` among them.
        seed: offered to the factory as `seed=`.
        name: of the environment, for messages.
        where: the prompt, for messages.

    Raises:
        HeelerError: the factory, `reset` or `step` raised; an observation is no string; a reward is not finite.
    """

    def __init__(
        self, factory: EnvironmentFactory, row: Mapping[str, Any], *, seed: int, name: str, where: str
    ) -> None:
        self.who, self.turn = f"the environment {name}, {where}", 0
        given = dict(row)
        if "seed" not in given and _takes(factory, "seed"):
            given["seed"] = seed
        self.environment: Any = self._call("could not be made", factory, **given)
        for method in ("reset", "step"):
            if not callable(getattr(self.environment, method, None)):
                raise HeelerError(f"{self.who}: {type(self.environment).__name__} has no method {method}")
        self.takes_cut = _takes(self.environment.step, "cut")

    def reset(self) -> str:
        return self._text(self._call("reset", self.environment.reset), "reset")

    def step(self, action: str, cut: bool) -> TextStep:
        """Take a turn; `cut` says that it met its cap of tokens."""
        self.turn += 1
        step = self._call("step", self.environment.step, action, **({"cut": cut} if self.takes_cut else {}))
        if not isinstance(step, TextStep):
            raise HeelerError(f"{self._place()}: step returned {type(step).__name__}, but must return a TextStep")
        try:
            reward = math.nan if isinstance(step.reward, (str, bytes)) else float(step.reward)
        except (TypeError, ValueError, OverflowError):
            reward = math.nan
        if not abs(reward) <= LARGEST_REWARD:
            raise HeelerError(
                f"{self._place()}: step returned the reward {step.reward!r}, but every reward must be a finite number"
            )
        return TextStep(
            observation=self._text(step.observation, "step"), reward=reward,
            terminated=bool(step.terminated), truncated=bool(step.truncated),
        )  # fmt: skip

    def _place(self) -> str:
        return f"{self.who}, turn {self.turn}" if self.turn else self.who

    def _text(self, value: Any, method: str) -> str:
        if not isinstance(value, str):
            raise HeelerError(
                f"{self._place()}: {method} returned {value!r:.60} as its observation, but an observation is a string"
            )
        return value

    def _call(self, what: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        try:
            return function(*arguments, **keywords)
        except HeelerError as error:
            raise type(error)(f"{self._place()}: {error}") from error
        except Exception as error:
            does = what if " " in what else f"{what} raised"
            raise HeelerError(f"{self._place()}: {does}: {where_raised(error)}") from error


def _takes(function: Any, argument: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return argument in parameters


class ToolError(Exception):
    """A call that a tool cannot answer. The policy reads the message and may try again."""


class ToolEnv:
    """One question that may be answered with the help of tools.

    A turn that ends with `<NAME>input</NAME>`, NAME one of `tools`, is a call: the tool's output follows it as the
    observation, and the episode goes on. Any other turn is the answer and ends the episode; one that met its cap of
    tokens is cut. The reward is 0 throughout: what an answer is worth, the run's own reward says (`--reward
    exact-match`), which reads the last turn.

    A subclass names its tools:

        class Library(ToolEnv):
            tools = {"search": search}

    Attributes:
        tools: functions from the input of a call to its output. One that raises `ToolError` is answered by
            `error: MESSAGE`; other exceptions stop the run.
        observation: the text around an output, with `{}` in its place.
        stop: where a turn ends: the ends of calls, and what a subclass, or the one that it inherits from, names here.
    """

    tools: ClassVar[Mapping[str, Callable[[str], str]]] = {}
    observation: ClassVar[str] = " = {}"
    stop: ClassVar[tuple[str, ...]] = ()
    _named_stop: ClassVar[tuple[str, ...]] = ()  # by the class or the nearest one above it that names any

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._named_stop = cls.__dict__.get("stop", cls._named_stop)
        cls.stop = (*(f"</{name}>" for name in cls.tools), *cls._named_stop)

    def __init__(self, prompt: Any = None, **columns: Any) -> None:
        names = "|".join(re.escape(name) for name in self.tools)
        self.call = re.compile(rf"<({names})>((?:(?!<\1>).)*)</\1>\s*\Z", re.DOTALL) if names else None

    def reset(self) -> str:
        return ""

    def step(self, action: str, cut: bool = False) -> TextStep:
        call = self.call.search(action) if self.call else None
        if call is None:
            return TextStep("", 0.0, terminated=not cut, truncated=cut)
        try:
            output = self.tools[call[1]](call[2])
        except ToolError as error:
            output = f"error: {error}"
        return TextStep(self.observation.format(output), 0.0, terminated=False)

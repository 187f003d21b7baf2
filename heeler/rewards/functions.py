"""Reward functions by the convention that people already use.

A reward function is called with keywords: `prompts=`, `completions=`, and every other column of the prompt set
as a list; `completion_ids=` (the sampled tokens) and `truncated=` where its signature takes them. It returns one
float a sample, or one list of floats a sample (a value for each sampled token). It may be `async`. For chat prompts
the completions arrive as messages, `[{"role": "assistant", "content": ...}]`.

This is TRL's convention too. A function may name TRL's `trainer_state`, which is None here, and `log_extra` and
`log_metric`, which do nothing here. As a term of a sum it may return None for samples that it does not apply to.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from heeler.runtime.packages import where_raised
from heeler.types import HeelerError, RewardOutput, Samples

RewardFunction = Callable[..., Sequence[Any] | Awaitable[Sequence[Any]]]
LARGEST = torch.finfo(torch.float32).max
LOG_KEYS = ("mean", "std")  # reward/mean and reward/std are the score's


class FunctionReward:
    """A reward function behind `heeler.types.Reward`, with its mistakes turned into sentences."""

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.function, self.name = function, name
        self.extra = [
            argument for argument in ("completion_ids", "truncated") if takes(function, argument)
        ]  # a function that names its columns one by one must not get more than these
        unheard: dict[str, Any] = {"trainer_state": None, "log_extra": _ignore, "log_metric": _ignore}
        named = _parameters(function)
        self.of_trl = {argument: value for argument, value in unheard.items() if argument in named}

    def __call__(self, samples: Samples) -> RewardOutput:
        return self._check(self._call(samples), samples)

    def as_term(self, samples: Samples) -> tuple[RewardOutput, list[bool]]:
        """What the function says as a term of a sum: 0 where it returns None, and `[S]` where it does."""
        values = self._call(samples)
        given = list(values) if isinstance(values, (list, tuple)) else []
        nothing = [value is None for value in given]
        if len(given) != len(samples) or not any(nothing):
            return self._check(values, samples), [False] * len(samples)
        per_token = any(isinstance(value, Sequence) for value in given)
        for index, ids in enumerate(samples.completion_ids):
            if nothing[index]:
                given[index] = [0.0] * len(ids) if per_token else 0.0
        return self._check(given, samples), nothing

    def _check(self, values: Any, samples: Samples) -> RewardOutput:
        return check_values(values, len(samples), f"the reward function {self.name}")

    def _call(self, samples: Samples) -> Any:
        arguments = self.of_trl | {name: getattr(samples, name) for name in self.extra} | dict(samples.columns)
        arguments["prompts"] = list(samples.prompts)
        arguments["completions"] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(samples.prompts, samples.completions, strict=True)
        ]
        try:
            values = self.function(**arguments)
            return _wait(values) if inspect.isawaitable(values) else values
        except HeelerError:
            raise
        except Exception as error:
            raise HeelerError(f"the reward function {self.name} raised {where_raised(error)}") from error


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One loop for all async functions of the process: clients that they keep between calls belong to their loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async reward functions", daemon=True).start()
    return loop


def _wait(awaitable: Awaitable[Any]) -> Any:
    async def result() -> Any:
        return await awaitable

    future = asyncio.run_coroutine_threadsafe(result(), _loop())
    try:
        return future.result()
    finally:
        future.cancel()  # where the wait was interrupted


def _ignore(*_: Any, **__: Any) -> None:
    """In place of TRL's loggers."""


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def takes(function: Any, argument: str) -> bool:
    """Whether a function can be called with this keyword."""
    parameters = _parameters(function)
    return argument in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def check_names(names: Iterable[str], source: str, taken: Iterable[str] = LOG_KEYS) -> None:
    """Refuse a component's name, as in "SOURCE cannot be called NAME", where the log uses it for something else."""
    for name in names:
        if name in taken:
            raise HeelerError(
                f"{source} cannot be called {name!r}: the log uses reward/{name} already; choose another name"
            )


def check_values(values: Any, count: int, source: str) -> RewardOutput:
    """Turn what a reward function or a server returned into a `RewardOutput`, or say what is wrong with it.

    Args:
        values: one number a sample, or one list of numbers a sample.
        count: samples that were asked for.
        source: who returned them, as the sentence begins: "the reward function NAME".
    """
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise HeelerError(f"{source} returned {type(values).__name__}: it must return a list of floats")
    values = list(values)
    if len(values) != count:
        raise HeelerError(f"{source} returned {len(values)} values for {count} completions")
    per_token = bool(values) and all(isinstance(v, Sequence) and not isinstance(v, str) for v in values)
    scores: list[float] = []
    for index, value in enumerate(values):
        parts = value if per_token else [value]
        for part in parts:
            try:
                number = float(part) if not isinstance(part, (str, bytes)) else None
            except (TypeError, ValueError, OverflowError):
                number = None
            if number is None or not abs(number) <= LARGEST:
                raise HeelerError(
                    f"{source} returned {part!r} for completion {index + 1} of {count}: every"
                    " reward must be a finite number"
                )
        scores.append(float(sum(float(p) for p in parts)))
    return RewardOutput(
        scores=torch.tensor(scores, dtype=torch.float32),
        token_rewards=[[float(p) for p in value] for value in values] if per_token else None,
        components={},
    )

"""Reward functions by the convention that people already use.

A reward function is called with keywords: `prompts=`, `completions=`, and every other column of the prompt set
as a list; `completion_ids=` (the sampled tokens) and `truncated=` where its signature takes them. It returns one
float a sample, or one list of floats a sample (a value for each sampled token). It may be `async`. For chat prompts
the completions arrive as messages, `[{"role": "assistant", "content": ...}]`, so functions written for TRL run
unchanged.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import torch

from heeler.runtime.packages import where_raised
from heeler.types import HeelerError, RewardOutput, Samples

RewardFunction = Callable[..., Sequence[Any]]
LARGEST = torch.finfo(torch.float32).max


class FunctionReward:
    """A reward function behind `heeler.types.Reward`, with its mistakes turned into sentences."""

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.function, self.name = function, name
        self.extra = [
            argument for argument in ("completion_ids", "truncated") if _takes(function, argument)
        ]  # a function that names its columns one by one must not get more than these

    def __call__(self, samples: Samples) -> RewardOutput:
        arguments: dict[str, Any] = {name: getattr(samples, name) for name in self.extra} | dict(samples.columns)
        arguments["prompts"] = list(samples.prompts)
        arguments["completions"] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(samples.prompts, samples.completions, strict=True)
        ]
        try:
            values = self.function(**arguments)
            if inspect.isawaitable(values):
                values = asyncio.run(_result(values))
        except HeelerError:
            raise
        except Exception as error:
            raise HeelerError(f"the reward function {self.name} raised {where_raised(error)}") from error
        return check_values(values, len(samples), f"the reward function {self.name}")


async def _result(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _takes(function: Any, argument: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return argument in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


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

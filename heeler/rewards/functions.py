"""Reward functions by the convention that people already use.

A reward function is called with keywords: `prompts=`, `completions=`, and every other column of the prompt set
as a list. It returns one float a sample, or one list of floats a sample (a value for each sampled token).
For chat prompts the completions arrive as messages, `[{"role": "assistant", "content": ...}]`, so functions
written for TRL run unchanged.
"""

from __future__ import annotations

import importlib
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from heeler.types import HeelerError, RewardOutput

RewardFunction = Callable[..., Sequence[Any]]


def load_function(spec: str) -> RewardFunction:
    """The function that `module:name` names; modules of the current directory are found too."""
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise HeelerError(
            f"{spec!r} does not name a function: write it as module:function, for instance my_rewards:score"
        )
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise HeelerError(
                f"there is no module {module_name!r} in {Path.cwd()} or among the installed packages"
            ) from error
        raise HeelerError(f"the module {module_name!r} needs {error.name!r}, which is not installed") from error
    except Exception as error:
        raise HeelerError(f"the module {module_name!r} cannot be imported: {_where(error)}") from error
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise HeelerError(f"the module {module_name!r} has no function {name!r}")
    return function  # pyright: ignore[reportReturnType]


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


class FunctionReward:
    """A reward function behind `heeler.types.Reward`, with its mistakes turned into sentences."""

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.function, self.name = function, name

    def __call__(
        self, *, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> RewardOutput:
        arguments: list[Any] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        try:
            values = self.function(prompts=list(prompts), completions=arguments, **columns)
        except HeelerError:
            raise
        except Exception as error:
            raise HeelerError(f"the reward function {self.name} raised {_where(error)}") from error
        return check_values(values, len(prompts), self.name)


def check_values(values: Any, count: int, name: str) -> RewardOutput:
    """Turn what a reward function returned into a `RewardOutput`, or say what is wrong with it."""
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise HeelerError(
            f"the reward function {name} returned {type(values).__name__}: it must return a list of floats"
        )
    values = list(values)
    if len(values) != count:
        raise HeelerError(f"the reward function {name} returned {len(values)} values for {count} completions")
    per_token = bool(values) and all(isinstance(v, Sequence) and not isinstance(v, str) for v in values)
    scores: list[float] = []
    for index, value in enumerate(values):
        parts = value if per_token else [value]
        for part in parts:
            try:
                number = float(part) if not isinstance(part, (str, bytes)) else None
            except (TypeError, ValueError):
                number = None
            if number is None or not math.isfinite(number):
                raise HeelerError(
                    f"the reward function {name} returned {part!r} for completion {index + 1} of {count}: every"
                    " reward must be a finite number"
                )
        scores.append(float(sum(float(p) for p in parts)))
    return RewardOutput(
        scores=torch.tensor(scores, dtype=torch.float32),
        token_rewards=[[float(p) for p in value] for value in values] if per_token else None,
        components={},
    )

"""Reward functions: TRL's keywords, None as a term of a sum, and async functions that keep something."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from heeler.rewards.functions import FunctionReward
from heeler.rewards.shaping import EOSPenalty
from heeler.rewards.weighted import WeightedSum
from heeler.types import HeelerError, Unavailable
from tests.tiny import samples_of

TWO = samples_of(["p", "q"], ["a", "bb"], [False, True], task=["sums", "rhymes"])


def sums(prompts: Any, completions: Any, task: Any) -> list[float | None]:
    return [float(len(c)) if t == "sums" else None for c, t in zip(completions, task, strict=True)]


def rhymes(completions: Any, task: Any, **kwargs: Any) -> list[list[float] | None]:
    return [[10.0] if t == "rhymes" else None for t in task]


def test_a_function_may_name_what_trl_passes() -> None:
    def reward(prompts: Any, completions: Any, task: Any, trainer_state: Any, log_extra: Any, log_metric: Any) -> Any:
        log_extra("task", task)
        log_metric("accuracy", 0.5)
        return [0.0 if trainer_state is None else 1.0] * len(completions)

    def guarded(completions: Any, log_extra: Any = None, **kwargs: Any) -> list[float]:
        if log_extra:
            log_extra("length", [len(c) for c in completions])
        return [float(len(kwargs))] * len(completions)

    assert FunctionReward(reward, "f")(TWO).scores.tolist() == [0.0, 0.0]
    assert FunctionReward(guarded, "g")(TWO).scores.tolist() == [4.0] * 2  # prompts, completion_ids, truncated, task
    column = samples_of(["p"], ["a"], task=["sums"], trainer_state=["a column of the prompts"])
    assert FunctionReward(reward, "f")(column).scores.tolist() == [1.0]


def test_none_adds_nothing_to_a_sum() -> None:
    only_sums, only_rhymes = FunctionReward(sums, "sums"), FunctionReward(rhymes, "rhymes")
    output = WeightedSum({"sums": (2.0, only_sums), "end": (1.0, EOSPenalty())})(TWO)
    assert output.scores.tolist() == [2.0, -1.0] and output.token_rewards is None
    assert output.components["sums"].tolist() == [1.0, 0.0]
    output = WeightedSum({"sums": (2.0, only_sums), "rhymes": (1.0, only_rhymes)})(TWO)
    assert output.scores.tolist() == [2.0, 10.0] and output.token_rewards == [[2.0], [10.0]]


def test_none_needs_another_term_that_applies() -> None:
    only_sums = FunctionReward(sums, "sums")
    with pytest.raises(HeelerError, match="the reward function sums returned None for completion 2 of 2: every reward"):
        only_sums(TWO)
    with pytest.raises(
        HeelerError, match=r"every term of the reward \(a, b\) returned None for completion 2 of 2: one of them must"
    ):
        WeightedSum({"a": (2.0, only_sums), "b": (1.0, only_sums)})(TWO)
    for wrong in ([None], [None, "1"], [None, float("nan")], [None, [None]]):
        term = FunctionReward(lambda wrong=wrong, **_: wrong, "wrong")
        with pytest.raises(HeelerError, match="the reward function wrong returned"):
            WeightedSum({"wrong": (1.0, term), "end": (1.0, EOSPenalty())})(TWO)


def test_async_functions_of_all_calls_share_a_loop() -> None:
    lock = asyncio.Lock()  # stands for a client's pool: it belongs to the loop that it was first waited for in

    async def pooled(completions: Any, **kwargs: Any) -> list[float]:
        async def one(text: str) -> float:
            async with lock:
                await asyncio.sleep(0)
                return float(len(text))

        return list(await asyncio.gather(*(one(text) for text in completions)))

    reward = FunctionReward(pooled, "pooled")
    for _ in range(2):
        assert reward(TWO).scores.tolist() == [1.0, 2.0]
    seen: list[list[float]] = []
    thread = threading.Thread(target=lambda: seen.append(reward(TWO).scores.tolist()))
    thread.start()
    thread.join()
    assert seen == [[1.0, 2.0]]


def test_async_functions_in_a_loop_that_runs_already() -> None:
    async def later(completions: Any, **kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]

    async def notebook() -> list[float]:
        return FunctionReward(later, "later")(TWO).scores.tolist()

    assert asyncio.run(notebook()) == [1.0, 2.0]


def test_what_an_async_function_raises() -> None:
    async def raises(error: Exception) -> list[float]:
        raise error

    def reward(error: Exception) -> FunctionReward:
        return FunctionReward(lambda **kwargs: raises(error), "raises")

    with pytest.raises(HeelerError, match=r"the reward function raises raised KeyError: 1 \(test_functions.py, line"):
        reward(KeyError(1))(TWO)
    with pytest.raises(Unavailable, match="gone"):
        reward(Unavailable("gone"))(TWO)

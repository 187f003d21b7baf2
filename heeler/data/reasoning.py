"""Prompts of Reasoning Gym (Stojanovski et al., 2505.24760): tasks made on the spot, checked by their own code."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

from heeler.runtime.packages import did_you_mean, require, where_raised
from heeler.types import HeelerError


def reasoning_gym_dataset(task: str, **config: Any) -> Any:
    """The `ProceduralDataset` of a task, such as chain_sum; `config` is the task's own.

    Raises:
        HeelerError: there is no such task, or it does not take this configuration.
    """
    require("reasoning_gym", "verifiers")
    from reasoning_gym.factory import DATASETS, create_dataset

    if task not in DATASETS:
        raise HeelerError(f"Reasoning Gym has no task {task!r}{did_you_mean(str(task), DATASETS)}")
    try:
        return create_dataset(task, **config)
    except Exception as error:
        raise HeelerError(f"the task {task} does not take {config}: {where_raised(error)}") from error


def _plain(value: Any) -> str:
    """Fractions among a task's notes as text."""
    if isinstance(value, Fraction):
        return str(value)
    raise TypeError(f"it holds a {type(value).__name__}")


def reasoning_gym_prompts(task: str, size: int, seed: int, **kwargs: Any) -> list[dict[str, Any]]:
    """Rows of a prompt set for the reward `reasoning-gym`; each is JSON, so a JSONL file holds all that scoring needs.

    Args:
        task: a task's name in Reasoning Gym.
        size: the number of rows.
        seed: of the task; the same seed gives the same rows.
        kwargs: the task's own configuration, such as `max_terms=3` for chain_sum.

    Returns:
        Rows `{"prompt", "answer", "task", "entry"}`: the question, its answer as Reasoning Gym has it (None for tasks
        with many answers), the task, and its entry, with the configuration under `"config"`.

    Raises:
        HeelerError: there is no such task, or a JSON file would change its entries so that the answer scores
            otherwise (arc_agi and rearc of 0.1.25).
    """
    dataset = reasoning_gym_dataset(task, size=size, seed=seed, **kwargs)
    rows: list[dict[str, Any]] = []
    for number in range(size):
        entry = dataset[number]
        try:
            stored = json.loads(json.dumps({**entry, "config": kwargs}, default=_plain))
        except (TypeError, ValueError) as error:
            raise HeelerError(f"the task {task} cannot be written as JSON ({error}): choose another") from error
        answer = stored["answer"]
        before, after = dataset.score_answer(entry["answer"], entry), dataset.score_answer(answer, stored)
        if before != after:
            raise HeelerError(
                f"the answer of entry {number + 1} of the task {task} scores {before:g}, but {after:g} once it was"
                " written as JSON: choose another task"
            )
        rows.append({"prompt": stored["question"], "answer": answer, "task": task, "entry": stored})
    return rows

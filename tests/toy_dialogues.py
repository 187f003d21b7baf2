"""Text environments that are small enough to know by heart, and broken ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from heeler.envs.text import TextStep


class Scripted:
    """Answers turn t with `observations[t]` and `rewards[t]`; the last one ends the episode as `end` says."""

    def __init__(
        self,
        prompt: str,
        observations: Sequence[str],
        rewards: Sequence[float],
        first: str = "",
        end: str = "terminated",
    ) -> None:
        self.observations, self.rewards, self.first, self.end = observations, rewards, first, end
        self.actions: list[str] = []

    def reset(self) -> str:
        return self.first

    def step(self, action: str) -> TextStep:
        t = len(self.actions)
        self.actions.append(action)
        last = t + 1 == len(self.rewards)
        return TextStep(
            self.observations[t], self.rewards[t], last and self.end == "terminated", last and self.end == "truncated"
        )


class Vowels:
    """Pays for vowels and lengths in up to three turns and says how long a turn was; one of even length is the last."""

    def __init__(self, prompt: str, seed: int) -> None:
        self.turns, self.greeting = 0, random.Random(seed).choice(["", ">", "::"])

    def reset(self) -> str:
        return self.greeting

    def step(self, action: str) -> TextStep:
        self.turns += 1
        reward = sum(c in "aeiou" for c in action) + 0.01 * len(action)
        return TextStep(f"[{len(action)}]", reward, len(action) % 2 == 0 or self.turns == 3)


class Hidden:
    """A number from 0 to 4 that nobody can know; whoever says "ask" is told. Paid is a turn that names it."""

    def __init__(self, prompt: str, seed: int) -> None:
        self.number, self.asked = str(random.Random(seed).randrange(5)), False

    def reset(self) -> str:
        return ""

    def step(self, action: str) -> TextStep:
        if action == "ask" and not self.asked:
            self.asked = True
            return TextStep(f" {self.number}", 0.0, terminated=False)
        return TextStep("", float(action == self.number), terminated=True)


class Broken:
    """Breaks in the second turn, in the way that the column `how` says."""

    def __init__(self, prompt: str, how: str) -> None:
        if how == "make":
            raise RuntimeError("no such maze")
        self.how, self.turns = how, 0

    def reset(self) -> Any:
        return None if self.how == "reset" else ""

    def step(self, action: str) -> Any:
        self.turns += 1
        if self.turns == 1:
            return TextStep("", 0.0, terminated=False)
        match self.how:
            case "raise":
                raise KeyError("door")
            case "nan":
                return TextStep("", float("nan"), terminated=False)
            case "infinite":
                return TextStep("", float("inf"), terminated=False)
            case "observation":
                return TextStep(7, 0.0, terminated=False)  # pyright: ignore
            case "reward":
                return TextStep("", "much", terminated=False)  # pyright: ignore
            case _:
                return "went north", 1.0, False

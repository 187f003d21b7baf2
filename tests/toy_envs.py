"""Small environments whose right answers are known."""

from __future__ import annotations

import os
from collections import deque
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class OneState(gym.Env):
    """One state, reward 1 a step, cut after `limit` steps: V = 1 / (1 - gamma) if a cut is no end."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, limit: int = 5, terminates: bool = False) -> None:
        self.limit, self.terminates, self.t = limit, terminates, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return np.ones(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        over = self.t >= self.limit
        return np.ones(1, np.float32), 1.0, over and self.terminates, over and not self.terminates, {}


class Still(OneState):
    """One state, two continuous actions that change nothing, episodes longer than any test."""

    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self) -> None:
        super().__init__(limit=10_000)


class Counter(gym.Env):
    """Observations are (episode, step within it); episode k lasts `lengths[k % len]` steps and pays 100 k + step."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, lengths: tuple[int, ...] = (3, 1, 5, 2), terminates: tuple[bool, ...] = (True, False)) -> None:
        self.lengths, self.terminates = lengths, terminates
        self.episode, self.t = -1, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self._look(), {}

    def _look(self) -> Any:
        return np.array([self.episode, self.t], np.float32)

    def step(self, action: Any) -> Any:
        self.t += 1
        over = self.t >= self.lengths[self.episode % len(self.lengths)]
        ends = self.terminates[self.episode % len(self.terminates)]
        return self._look(), 100.0 * self.episode + self.t, over and ends, over and not ends, {}


class Identity(gym.Env):
    """Reward for saying what is shown; episodes of 8 steps."""

    def __init__(self, actions: str = "discrete") -> None:
        self.kind = actions
        self.observation_space = spaces.Discrete(4) if actions == "discrete" else spaces.MultiBinary(2)
        self.action_space = {
            "discrete": spaces.Discrete(4, start=2),
            "multi_discrete": spaces.MultiDiscrete([2, 2]),
            "multi_binary": spaces.MultiBinary(2),
            "box": spaces.Box(-1.0, 1.0, (2,), np.float32),
        }[actions]
        self.t = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self._draw(), {}

    def _draw(self) -> Any:
        self.shown = (
            int(self.np_random.integers(4))
            if self.kind == "discrete"
            else self.np_random.integers(0, 2, 2).astype(np.int8)
        )
        return self.shown

    def step(self, action: Any) -> Any:
        if self.kind == "discrete":
            reward = float(action - 2 == self.shown)
        elif self.kind == "box":
            reward = float(1.0 - np.abs(np.asarray(action) - (2.0 * self.shown - 1.0)).mean())
        else:
            reward = float((np.asarray(action) == self.shown).mean())
        self.t += 1
        return self._draw(), reward, self.t >= 8, False, {}


class Masked(gym.Env):
    """Four actions of which the mask allows some; choosing a forbidden one is an error. Pays the chosen number."""

    action_space = spaces.Discrete(4)

    def __init__(self, where: str = "info", forbid_all: bool = False) -> None:
        self.where, self.forbid_all = where, forbid_all
        box = spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.observation_space = (
            box if where == "info" else spaces.Dict({"seen": box, "action_mask": spaces.MultiBinary(4)})
        )
        self.t = 0

    def _show(self) -> Any:
        self.mask = self.np_random.integers(0, 2, 4).astype(np.int8)
        self.mask[self.np_random.integers(4)] = 1
        if self.forbid_all and self.t == 3:
            self.mask[:] = 0
        seen = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        if self.where == "info":
            return seen, {"action_mask": self.mask.copy()}
        return {"seen": seen, "action_mask": self.mask.copy()}, {}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self._show()

    def step(self, action: Any) -> Any:
        assert self.mask[action], f"action {action} was forbidden by {self.mask}"
        self.t += 1
        observation, info = self._show()
        return observation, float(action), self.t >= 6, False, info


class MaskedPairs(gym.Env):
    """Two choices at once, of 3 and 4, each with its mask in info; pays 1 for each that repeats the cue shown first."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = spaces.MultiDiscrete([3, 4])

    def _info(self) -> dict[str, Any]:
        self.mask = self.np_random.integers(0, 2, 7).astype(np.int8)
        self.mask[[self.cue, 3 + self.cue]] = 1
        return {"action_mask": self.mask.copy()}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t, self.cue = 0, int(self.np_random.integers(3))
        return np.array([self.cue - 1.0, 1.0], np.float32), self._info()

    def step(self, action: Any) -> Any:
        first, second = (int(a) for a in action)
        assert self.mask[first] and self.mask[3 + second], f"{action} was forbidden by {self.mask}"
        reward = float(first == self.cue) + float(second == self.cue)
        self.t += 1
        return np.zeros(2, np.float32), reward, self.t >= 4, False, self._info()


class Recall(gym.Env):
    """A cue is shown once; the last of `delay` further steps pays 1 for repeating it. Needs a memory."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, delay: int = 3) -> None:
        self.delay, self.t = delay, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t, self.cue = 0, int(self.np_random.integers(2))
        return np.array([2.0 * self.cue - 1.0, 0.0], np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        over = self.t > self.delay
        shown = np.array([0.0, self.t / (self.delay + 1)], np.float32)
        return shown, float(over and action == self.cue), over, False, {}


class Broken(gym.Env):
    """Goes wrong at step 5, in the way that is asked for."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, how: str) -> None:
        self.how, self.t = how, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        if self.how == "reset":
            raise RuntimeError("the level file is missing")
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        observation, reward = np.zeros(2, np.float32), 0.0
        if self.t == 5:
            if self.how == "nan observation":
                observation[1] = np.nan
            elif self.how == "nan reward":
                reward = float("nan")
            elif self.how == "raise":
                raise ValueError("the robot left the table")
            elif self.how == "die":
                os._exit(3)
        return observation, reward, False, False, {}


class Reuses(gym.Env):
    """Writes every observation, 1, 2, ... after 0, into the same arrays; cut after 5 steps."""

    action_space = spaces.Discrete(2)

    def __init__(self, as_dict: bool = False) -> None:
        box = spaces.Box(0.0, 9.0, (1,), np.float32)
        self.observation_space = spaces.Dict({"a": box, "b": box}) if as_dict else box
        self.kept = np.zeros(1, np.float32)
        self.shown = {"a": self.kept, "b": self.kept} if as_dict else self.kept

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.kept[:] = 0
        return self.shown, {}

    def step(self, action: Any) -> Any:
        self.kept += 1
        return self.shown, 1.0, False, bool(self.kept[0] >= 5), {}


class Simulator(OneState):
    """Stands for one elsewhere: it is gone at the third step."""

    def step(self, action: Any) -> Any:
        if self.t == 2:
            raise ConnectionRefusedError("the simulator on port 5000 is gone")
        return super().step(action)


class OddState(OneState):
    """Tells its state in something that no checkpoint takes, or fails to."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def get_state(self) -> dict[str, Any]:
        if self.how == "raises":
            raise KeyError("level")
        return {"queue": deque([1, 2])} if self.how == "deque" else {"names": [np.array(["a"])]}

    def set_state(self, state: dict[str, Any]) -> None: ...


class Forgetful(Masked):
    """Gives its mask with every second step only."""

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, _ = super().step(action)
        self.mask[:] = 1
        return observation, reward, terminated, truncated, {"action_mask": self.mask.copy()} if self.t % 2 else {}


class Strange(gym.Env):
    """A space that no network here reads, or that PPO cannot choose from."""

    def __init__(self, what: str) -> None:
        plain = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = spaces.Text(5) if what == "observations" else plain
        self.action_space = spaces.Sequence(plain) if what == "actions" else spaces.Discrete(2)


class Pictures(gym.Env):
    """A picture and two numbers; the brighter half says which action pays."""

    action_space = spaces.Discrete(2)

    def __init__(self, vector: bool = True, channels_last: bool = True) -> None:
        self.channels_last, self.vector = channels_last, vector
        shape = (40, 44, 3) if channels_last else (3, 40, 44)
        image = spaces.Box(0, 255, shape, np.uint8)
        numbers = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = spaces.Dict({"camera": image, "numbers": numbers}) if vector else image
        self.t = 0

    def _show(self) -> Any:
        self.side = int(self.np_random.integers(2))
        image = np.zeros((40, 44, 3), np.uint8)
        image[:, 22 * self.side : 22 * (self.side + 1)] = 200
        if not self.channels_last:
            image = image.transpose(2, 0, 1)
        return {"camera": image, "numbers": np.zeros(2, np.float32)} if self.vector else image

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self._show(), {}

    def step(self, action: Any) -> Any:
        reward = float(action == self.side)
        self.t += 1
        return self._show(), reward, self.t >= 8, False, {}


def delayed(env: gym.Env) -> gym.Env:
    return gym.wrappers.DelayObservation(env, 1)


def nothing(env: gym.Env) -> Any:
    return 3


def double_reward(env: gym.Env) -> gym.Env:
    return gym.wrappers.TransformReward(env, lambda r: 2 * r)


class BlowsUp(OneState):
    """The last observation of an episode of 3 steps is infinite; the first of the next is not."""

    def __init__(self) -> None:
        super().__init__(limit=3)

    def step(self, action: Any) -> Any:
        observation, *rest = super().step(action)
        return observation if self.t < self.limit else observation + np.inf, *rest

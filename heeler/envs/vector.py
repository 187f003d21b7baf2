"""Vector environments behind one door: Gymnasium's, ale-py's and EnvPool's, with either kind of autoreset.

| autoreset | what `step` returns where an episode ends | what follows |
|---|---|---|
| SAME_STEP | the first observation of the next episode; the final one in `info["final_obs"]` | a decision |
| NEXT_STEP | the final observation | a dummy step, whose action is ignored: no decision |

`VectorEnvironment.step` says which steps were dummies, so that the collector can drop them, and hands over the final
observations of SAME_STEP. Everything else is the same for both.
"""

from __future__ import annotations

import copy
import multiprocessing
import re
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from heeler.envs.checks import check_mask_size
from heeler.envs.spaces import MASK_KEY, Array, ObservationReader, Observations, action_spec, to_environment
from heeler.runtime.packages import did_you_mean, find_modules_here, load_function, require
from heeler.types import HeelerError

Autoreset = Literal["same-step", "next-step"]


@dataclass(frozen=True, kw_only=True)
class Sync:
    """Gymnasium's SyncVectorEnv: one after the other in this process. Fastest for cheap environments.

    Attributes:
        autoreset: whether the step that ends an episode resets it too, or the next one does.
    """

    autoreset: Autoreset = "same-step"


@dataclass(frozen=True, kw_only=True)
class Async:
    """Gymnasium's AsyncVectorEnv: a process for each environment. For slow environments and many cores.

    Attributes:
        autoreset: whether the step that ends an episode resets it too, or the next one does.
    """

    autoreset: Autoreset = "same-step"


@dataclass(frozen=True, kw_only=True)
class Vectorized:
    """The environment's own vectorised version (`gymnasium.make_vec`), where it has one."""


@dataclass(frozen=True, kw_only=True)
class EnvPool:
    """EnvPool's version in C++, where it has one (`pip install envpool`).

    EnvPool sets `truncated` wherever the time limit is reached: a real end on the very last allowed step looks
    truncated, and is bootstrapped.

    Attributes:
        threads: of EnvPool; 0 takes one for each core.
    """

    threads: int = 0


@dataclass(frozen=True, kw_only=True)
class Atari:
    """ale-py's AtariVectorEnv: the whole preprocessing in C++, on threads of its own.

    Rewards arrive raw and episodes are whole games; `sign_rewards` and `life_is_episode` change only what is learned
    from.

    Attributes:
        autoreset: of the vector environment.
        threads: of ale-py; 0 takes one for each core.
        sign_rewards: learn from the sign of each reward.
        life_is_episode: returns do not flow across the loss of a life.
        sticky_actions: probability that an action repeats the one before (0.25 in the evaluation protocol of Machado
            et al., 2018; 0 in the PPO paper).
        noop_max: random no-ops at the start of a game.
        frameskip: frames of one decision; the last two are merged by their maximum.
        stack: frames in an observation.
        full_action_space: all 18 actions.
    """

    autoreset: Autoreset = "same-step"
    threads: int = 0
    sign_rewards: bool = True
    life_is_episode: bool = True
    sticky_actions: float = 0.0
    noop_max: int = 30
    frameskip: int = 4
    stack: int = 4
    full_action_space: bool = False


Backend = Sync | Async | Vectorized | EnvPool | Atari


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """Which environment, how many, and how they are stepped.

    Attributes:
        id: a Gymnasium id, "module:Name" of an environment class or function, or a game of ale-py for `Atari`.
        kwargs: keyword arguments of the environment (on the command line: --env-kwargs and a JSON object).
        wrappers: "module:function" applied to each environment, the first one innermost.
        num_envs: environments that are stepped together.
        backend: how.
    """

    id: str
    kwargs: Annotated[Mapping[str, Any], tyro.conf.Suppress] = field(default_factory=dict[str, Any])
    wrappers: tuple[str, ...] = ()
    num_envs: int = 8
    backend: Backend = Sync()


class Step(NamedTuple):
    """What one action of each environment led to.

    Attributes:
        observations: `[n, ...]` what the policy looks at next.
        rewards: `[n]` float64, raw.
        terminated, truncated: `[n]` bool, of the episode.
        lost_life: `[n]` bool, the future is cut off although the episode goes on; None where that never happens.
        dummies: `[n]` bool, this step only reset the environment; None where none did.
        final: indices `[k]` and observations `[k, ...]` of episodes that ended and were reset at once, or None.
        masks: `[n, M]` bool, allowed actions at `observations`, or None.
    """

    observations: Observations
    rewards: Array
    terminated: Array
    truncated: Array
    lost_life: Array | None
    dummies: Array | None
    final: tuple[Array, Observations] | None
    masks: Array | None


def make_one(config: EnvConfig, render_mode: str | None = None) -> Any:
    """One environment, with the user's wrappers."""
    require("gymnasium", "control")
    import gymnasium

    kwargs: dict[str, Any] = dict(config.kwargs) | ({"render_mode": render_mode} if render_mode else {})
    try:
        if ":" in config.id and not re.search(r"-v\d+$", config.id):
            env = load_function(config.id, "environment", "my_envs:Maze")(**kwargs)
        else:
            _register(config.id)
            if ":" in config.id:
                find_modules_here()  # of "module:Id-v0" Gymnasium imports the module
            with _quiet_models(config.id):
                env = gymnasium.make(config.id, disable_env_checker=True, **kwargs)
    except HeelerError:
        raise
    except gymnasium.error.UnregisteredEnv as error:
        raise HeelerError(f"there is no environment {config.id!r}{_nearest(config.id)}") from error
    except gymnasium.error.DependencyNotInstalled as error:
        raise HeelerError(
            f"{config.id} needs a package that is not installed ({error}): {_extra(config.id)}"
        ) from error
    except Exception as error:
        raise HeelerError(f"{config.id} cannot be made: {type(error).__name__}: {error}") from error
    for spec in config.wrappers:
        wrapper = load_function(spec, "wrapper", "my_envs:wrap")
        try:
            env = wrapper(env)
        except Exception as error:
            raise HeelerError(f"the wrapper {spec} cannot wrap {config.id}: {_told(error)}") from error
        if not isinstance(env, gymnasium.Env):
            raise HeelerError(f"the wrapper {spec} returned a {type(env).__name__}: it must return a gymnasium.Env")
        _refuse_statistics(env, spec)
    if not isinstance(env, gymnasium.Env):
        raise HeelerError(f"{config.id} is a {type(env).__name__}, not a gymnasium.Env")
    for name in ("observation_space", "action_space"):
        if not isinstance(getattr(env, name, None), gymnasium.Space):
            raise HeelerError(f"{config.id} has no {name} of Gymnasium: set it in the environment's class or __init__")
    return env


def _refuse_statistics(env: Any, spec: str) -> None:
    """Gymnasium's normalising wrappers learn in each environment for itself, so an evaluation's would know nothing."""
    from gymnasium.wrappers import NormalizeObservation, NormalizeReward

    for kind, flag in (NormalizeObservation, "--normalize-observations"), (NormalizeReward, "--scale-rewards"):
        if isinstance(env, kind) and env.update_running_mean:
            raise HeelerError(
                f"the wrapper {spec} keeps statistics in each environment, which evaluations and the trained policy"
                f" would not have: leave it out and give {flag}"
            )


def _register(id: str) -> None:
    if id.startswith("ALE/") or "NoFrameskip" in id:
        require("ale_py", "atari")
        import ale_py
        import gymnasium

        gymnasium.register_envs(ale_py)


@contextmanager
def _quiet_models(id: str) -> Iterator[None]:
    """Drop what MuJoCo says of old words in the models of Gymnasium: a line on standard error for each environment, and
    another in a file MUJOCO_LOG.TXT in the working folder. Anything else that it warns of is a Python warning."""
    import gymnasium

    spec = gymnasium.registry.get(id)
    if spec is None or "mujoco" not in str(spec.entry_point) or find_spec("mujoco") is None:
        yield
        return
    mujoco: Any = import_module("mujoco")

    def hear(text: str) -> None:
        if "deprecated" not in text:
            warnings.warn(f"MuJoCo: {text}", stacklevel=2)

    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(hear)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


def _extra(id: str) -> str:
    import gymnasium

    spec = gymnasium.registry.get(id)
    entry = str(spec.entry_point) if spec is not None else ""
    extra = next((e for e in ("box2d", "mujoco") if e in entry), "control")
    return f"pip install 'heeler[{extra}]'"


def _nearest(id: str) -> str:
    import gymnasium

    known = [name for name in gymnasium.registry if "/" not in name or name.startswith("ALE/")]
    return did_you_mean(id, known) or (
        ": where a package registers it, name the package too, as in --env minigrid:MiniGrid-Empty-5x5-v0"
    )


def make_vector(config: EnvConfig, seed: int) -> VectorEnvironment:
    """The vector environment that the config describes."""
    try:
        return VectorEnvironment(_make_backend(config, seed), config)
    except HeelerError:
        raise
    except Exception as error:
        raise HeelerError(f"{config.id} cannot be made: {_told(error, config.backend)}") from error


def _make_backend(config: EnvConfig, seed: int) -> Any:
    require("gymnasium", "control")
    import gymnasium
    from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

    backend = config.backend
    if config.wrappers and not isinstance(backend, (Sync, Async)):
        raise HeelerError(
            f"{type(backend).__name__} environments take no wrappers: add env.backend:sync or env.backend:async"
        )
    match backend:
        case Sync() | Async():
            mode = AutoresetMode.SAME_STEP if backend.autoreset == "same-step" else AutoresetMode.NEXT_STEP
            make: list[Callable[[], Any]] = [lambda: _make_in_worker(config)] * config.num_envs
            if isinstance(backend, Sync):
                env: Any = SyncVectorEnv(make, copy=False, autoreset_mode=mode)
            else:
                make_one(config).close()  # a mistake in the config is told here, not from a worker
                env = AsyncVectorEnv(make, copy=True, autoreset_mode=mode)
        case Vectorized():
            make_one(config).close()
            if ":" in config.id or gymnasium.spec(config.id).vector_entry_point is None:
                raise HeelerError(f"{config.id} has no vectorised version: add env.backend:sync")
            env = gymnasium.make_vec(
                config.id, num_envs=config.num_envs, vectorization_mode="vector_entry_point", **config.kwargs
            )
        case EnvPool():
            require("envpool", "envpool")
            env = _make_envpool(config, backend, seed)
        case Atari():
            require("ale_py", "atari")
            env = _make_atari(config, backend)
    return env


def _make_in_worker(config: EnvConfig) -> Any:
    """In a worker process Ctrl-C is left to the run, which finishes its update first."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    env = make_one(config)
    if not config.wrappers and type(env.unwrapped).__module__.startswith("gymnasium.envs."):
        return env  # Gymnasium's own make a new array in each step
    step = env.step

    def keep_final(action: Any) -> Any:
        """An environment may write each observation into the same array: a reset in the same step would change it."""
        result = step(action)
        if len(result) == 5 and (result[2] or result[3]):
            return copy.deepcopy(result[0]), *result[1:]
        return result

    env.step = keep_final
    return env


def _make_envpool(config: EnvConfig, backend: EnvPool, seed: int) -> Any:
    import envpool

    if config.id not in envpool.list_all_envs():
        raise HeelerError(f"EnvPool has no environment {config.id!r}: add env.backend:sync")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return envpool.make(
            config.id,
            env_type="gymnasium",
            num_envs=config.num_envs,
            seed=seed,
            num_threads=backend.threads,
            **config.kwargs,
        )


def _make_atari(config: EnvConfig, backend: Atari) -> Any:
    from ale_py import roms
    from ale_py.vector_env import AtariVectorEnv

    game = config.id.removeprefix("ALE/").partition("-")[0].removesuffix("NoFrameskip")
    game = "".join(f"_{c.lower()}" if c.isupper() else c for c in game).lstrip("_")
    if game not in roms.get_all_rom_ids():
        raise HeelerError(f"there is no Atari game {config.id!r}{did_you_mean(game, roms.get_all_rom_ids())}")
    # raw rewards, and whole games: with episodic_life=True this class starts a new game at each lost life
    return AtariVectorEnv(
        game,
        config.num_envs,
        num_threads=backend.threads,
        autoreset_mode="SameStep" if backend.autoreset == "same-step" else "NextStep",
        repeat_action_probability=backend.sticky_actions,
        noop_max=backend.noop_max,
        frameskip=backend.frameskip,
        stack_num=backend.stack,
        full_action_space=backend.full_action_space,
        reward_clipping=False,
        episodic_life=False,
        **config.kwargs,
    )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Without what Gymnasium announces of a worker's error before it raises it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_NOTHING: nullcontext[None] = nullcontext()  # made once: steps of small environments take microseconds


def _as_it_is() -> nullcontext[None]:
    return _NOTHING


class VectorEnvironment:
    """A vector environment as the collector uses it.

    Attributes:
        observations: the spec of what the policy looks at.
        actions: the spec of what it chooses.
        same_step: whether episodes are reset in the step that ends them.
    """

    def __init__(self, env: Any, config: EnvConfig) -> None:
        self.env = env
        self.config = config
        self.num_envs: int = config.num_envs
        with warnings.catch_warnings():  # EnvPool's, about its own bounds
            warnings.simplefilter("ignore")
            single_observations, single_actions = env.single_observation_space, env.single_action_space
        self.reader = ObservationReader(single_observations, config.id)
        self.observations = self.reader.spec
        self.actions = action_spec(single_actions, config.id)
        mode = getattr(env, "metadata", {}).get("autoreset_mode") if not isinstance(config.backend, EnvPool) else None
        self.same_step = str(getattr(mode, "value", mode)) == "SameStep"
        self.space = single_observations
        self.masked = False
        self._over = np.zeros(self.num_envs, dtype=bool)
        self._lives: Array | None = None
        self._steps = 0
        self._quietly = _without_warnings if isinstance(config.backend, Async) else _as_it_is

    def reset(self, seed: int | None) -> tuple[Observations, Array | None]:
        """Start an episode in every environment; observations and masks."""
        try:
            with self._quietly():
                if isinstance(self.config.backend, EnvPool):
                    observations, info = self.env.reset()
                else:
                    observations, info = self.env.reset(seed=seed)
        except Exception as error:
            raise HeelerError(f"{self.config.id} failed in reset: {_told(error, self.config.backend)}") from error
        self._over = np.zeros(self.num_envs, dtype=bool)
        self._lives = self._lives_of(info)
        return self.reader.read(observations), self._masks(observations, info, "reset")

    def step(self, actions: Array) -> Step:
        """Take one action (as stored by the collector) in each environment."""
        sent = to_environment(self.actions, actions)
        try:
            with self._quietly():
                observations, rewards, terminated, truncated, info = self.env.step(sent)
        except Exception as error:
            raise HeelerError(
                f"{self.config.id} failed in step {self._steps + 1} of the vector environment:"
                f" {_told(error, self.config.backend)}"
            ) from error
        self._steps += 1
        over = terminated | truncated
        dummies = final = lost_life = None
        if self.same_step:
            if over.any():
                indices = np.flatnonzero(over)
                final = indices, self._final(info, indices)
        elif self._over.any():
            dummies = self._over
        if isinstance(self.config.backend, Atari) and self.config.backend.life_is_episode:
            lives = self._lives_of(info)
            assert lives is not None and self._lives is not None
            lost_life = (lives < self._lives) & ~over
            if dummies is not None:
                lost_life &= ~dummies
            self._lives = lives
        self._over = over
        masked = self.masked
        when = f"step {self._steps} of the vector environment"
        masks = self._masks(observations, info, when, None if self.same_step else over)
        if masks is not None and not masked:
            raise HeelerError(f"{self.config.id} gives action masks in step, but gave none in reset: give them in both")
        return Step(
            self.reader.read(observations), np.asarray(rewards, dtype=np.float64), terminated, truncated,
            lost_life, dummies, final, masks,
        )  # fmt: skip

    def _final(self, info: Mapping[str, Any], indices: Array) -> Observations:
        """The last observations of the episodes that ended: Gymnasium gives one object each, ale-py a dense array."""
        from gymnasium.vector.utils import concatenate, create_empty_array

        final = info["final_obs"]
        if isinstance(final, np.ndarray) and final.dtype != object:
            return self.reader.read(final[indices])
        chosen = [_of_env(final, int(i)) for i in indices]
        return self.reader.read(concatenate(self.space, chosen, create_empty_array(self.space, len(chosen))))

    def _lives_of(self, info: Mapping[str, Any]) -> Array | None:
        lives = info.get("lives")
        return None if lives is None else np.array(lives)

    def _masks(self, observations: Any, info: Mapping[str, Any], when: str, over: Array | None = None) -> Array | None:
        """Allowed actions `[n, M]`; `over [n]` says where no decision is made, and so no mask is needed."""
        masks = self.reader.masks(observations)
        if masks is None:
            given, present = info.get(MASK_KEY), info.get(f"_{MASK_KEY}")
            if given is None and not self.masked:
                return None
            masks = np.ones((self.num_envs, self.actions.mask_size), dtype=bool)
            for i in range(self.num_envs):
                if given is not None and (present is None or present[i]):
                    parts = given[i] if isinstance(given[i], tuple) else (given[i],)
                    row = np.concatenate([np.ravel(part) for part in parts])
                    check_mask_size(self.actions, len(row), self.config.id)
                    masks[i] = row.astype(bool)
                elif (self.masked or when == "reset") and (over is None or not over[i]):
                    raise HeelerError(
                        f"{self.config.id} gave no action mask in environment {i}, {when}, but did before or in others:"
                        " give one with every reset and every step"
                    )
        self.masked = True
        if over is not None:
            masks[over] = True  # no decision is made there
        check_mask_size(self.actions, masks.shape[1], self.config.id)
        return masks

    def save_state(self) -> dict[str, Any] | None:
        """What continues every episode exactly where it is, or None where that cannot be done."""
        from heeler.envs.state import save_states

        if not isinstance(self.config.backend, Sync):
            return None
        states = save_states(self.env)
        return None if states is None else {"envs": states, "over": self._over.copy()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        from heeler.envs.state import load_states

        self._over = np.array(state["over"])
        load_states(self.env, state["envs"], self._over)

    def close(self) -> None:
        """End worker processes; those of an environment that failed are killed."""
        close = getattr(self.env, "close", None)
        if close is None:
            return
        try:
            with self._quietly():
                close()
        except Exception:  # a worker that died does not answer
            for process in getattr(self.env, "processes", []):
                process.kill()
                process.join()
            self.env.closed = True


def _of_env(final: Any, index: int) -> Any:
    """The final observation of one environment: Gymnasium keeps dicts as a dict of arrays, anything else as objects."""
    return {k: _of_env(v, index) for k, v in final.items()} if isinstance(final, dict) else final[index]


def _told(error: BaseException, backend: Backend | None = None) -> str:
    """What an environment raised, its last line; of a pipe to a worker that broke, what that means."""
    if isinstance(backend, Async) and isinstance(error, (EOFError, BrokenPipeError, ConnectionResetError)):
        return "a worker process died (out of memory, or killed?)"
    told = str(error).strip().splitlines()
    return f"{type(error).__name__}: {told[-1] if told else 'no message'}"

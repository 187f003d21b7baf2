"""Playing whole episodes with a policy: figures, predictions for a single observation, videos."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heeler.envs.checks import LAST_OBSERVATION, check_mask_size, check_observations, check_rewards
from heeler.envs.spaces import MASK_KEY, ObservationReader, to_environment
from heeler.envs.vector import Atari, EnvConfig, EnvPool, make_one, make_vector
from heeler.policies.actor_critic import ActorCritic
from heeler.policies.distributions import check_masks, draw_noise
from heeler.runtime.packages import require
from heeler.runtime.progress import progress, say
from heeler.types import HeelerError

MAX_DECISIONS = 27_000  # of one episode in an evaluation: the Atari limit of 108,000 frames
FILMS = (".mp4", ".gif", ".mkv", ".mov", ".avi")
ATARI_FPS = 60
ATARI_KWARGS = (  # of ale-py's AtariVectorEnv that films follow; they are gray, and whole games, in any case
    "img_height", "img_width", "grayscale", "maxpool", "use_fire_reset", "max_num_frames_per_episode", "life_loss_info",
    "thread_affinity_offset",
)  # fmt: skip


def evaluate_policy(
    policy: ActorCritic,
    config: EnvConfig,
    *,
    episodes: int,
    deterministic: bool,
    seed: int,
    show: bool = False,
) -> dict[str, float]:
    """Raw returns of whole episodes; every environment plays the same number, so short episodes count no more.

    Returns:
        `reward` and `reward/std` (of undiscounted raw returns), `length` (decisions), `episodes`.

    Raises:
        HeelerError: an environment fails, shows or pays something that is not finite, or forbids every action.
    """
    num_envs = min(episodes, 16)
    each = -(-episodes // num_envs)
    backend = config.backend
    if isinstance(backend, EnvPool):
        backend = replace(backend, threads=1)
    env = make_vector(replace(config, num_envs=num_envs, backend=backend), seed)
    generator = np.random.default_rng(seed)
    bar = progress(num_envs * each, "evaluating", "episode", show=show)
    returns: list[list[float]] = [[] for _ in range(num_envs)]
    lengths: list[list[int]] = [[] for _ in range(num_envs)]
    unfinished = 0
    so_far, steps = np.zeros(num_envs), np.zeros(num_envs, dtype=np.int64)
    try:
        observations, masks = env.reset(seed)
        played = 0
        _check(policy, config.id, "step 0 of the evaluation", observations, masks)
        states = torch.zeros(num_envs, policy.state_size, device=policy.device) if policy.recurrent else None
        while any(len(r) < each for r in returns):
            noise = None
            if not deterministic:
                noise = draw_noise(policy.actions.kind, generator, (num_envs, policy.actions.num_parameters))
            actions, states = policy.predict(observations, states, masks=masks, noise=noise)
            step = env.step(actions)
            observations, masks = step.observations, step.masks
            played += 1
            when = f"step {played} of the evaluation"
            check_rewards(step.rewards, config.id, when)
            _check(policy, config.id, when, observations, masks)
            if step.final is not None:
                check_observations(step.final[1], config.id, when, step.final[0], LAST_OBSERVATION)
            real = np.ones(num_envs, dtype=bool) if step.dummies is None else ~step.dummies
            so_far += step.rewards * real
            steps += real
            endless = steps >= MAX_DECISIONS  # an environment without a time limit: what it has paid so far counts
            unfinished += int((endless & ~(step.terminated | step.truncated)).sum())
            over = (step.terminated | step.truncated | endless) & real
            for i in np.flatnonzero(over):
                if len(returns[i]) < each:
                    returns[i].append(float(so_far[i]))
                    lengths[i].append(int(steps[i]))
                    bar.update(1)
            so_far[over], steps[over] = 0.0, 0
            if unfinished and endless.all():
                break
            began = over if env.same_step else step.dummies
            if states is not None and began is not None and began.any():
                states = states.masked_fill(torch.as_tensor(began, device=states.device)[:, None], 0.0)
    finally:
        bar.close()
        env.close()
    all_returns = np.array([r for row in returns for r in row])
    if unfinished:
        say(f"{config.id} has no time limit: {unfinished} episodes were counted after {MAX_DECISIONS:,} decisions")
    return {
        "reward": float(all_returns.mean()),
        "reward/std": float(all_returns.std()),
        "length": float(np.mean([length for row in lengths for length in row])),
        "episodes": float(len(all_returns)),
    }


def _check(policy: ActorCritic, id: str, when: str, observations: Any, masks: Any) -> None:
    """Refuse what no action can be chosen by."""
    check_observations(observations, id, when)
    if masks is not None:
        check_masks(masks, policy.actions.sizes, id, when)


class GymPolicy:
    """A trained policy that acts on an environment's own observations.

        policy = heeler.load_policy("runs/cartpole")
        observation, info = env.reset()
        action = policy.predict(observation)

    Args:
        actor_critic: the networks with the observation statistics.
        observation_space: of a single environment.
        deterministic: take the most likely action; draw where False.
        seed: of the draws.
        name: of the environment, in messages.
    """

    def __init__(
        self,
        actor_critic: ActorCritic,
        observation_space: Any,
        *,
        deterministic: bool = True,
        seed: int = 0,
        name: str = "the environment",
    ) -> None:
        self.actor_critic, self.space, self.deterministic = actor_critic, observation_space, deterministic
        self.reader = ObservationReader(observation_space, name)
        self.generator = np.random.default_rng(seed)
        self.state: torch.Tensor | None = None

    def reset(self) -> None:
        """Forget: call it where an episode begins. Only policies with memory need it."""
        self.state = None

    def predict(self, observation: Any, *, mask: Any = None, deterministic: bool | None = None) -> Any:
        """One action for one observation, as the environment takes it.

        Args:
            observation: what `env.reset` or `env.step` returned.
            mask: allowed actions, where they are not part of the observation; of MultiDiscrete actions the components'
                masks behind one another, or a tuple of them.
            deterministic: overrides the policy's own choice.

        Raises:
            HeelerError: the observation is of another space or not finite, or the mask has another size or forbids
                every action.
        """
        from gymnasium.vector.utils import concatenate, create_empty_array

        try:
            batch = concatenate(self.space, [observation], create_empty_array(self.space, 1))
        except Exception as error:
            raise HeelerError(
                f"the observation does not fit the space {self.space} that the policy was trained on: look at its"
                " shape and dtype, and at the wrappers of the environment"
            ) from error
        seen, spec, name = self.reader.read(batch), self.actor_critic.actions, self.reader.where
        check_observations(seen, name)
        if mask is None:
            masks = self.reader.masks(batch)
        else:
            masks = np.concatenate([np.ravel(part) for part in mask])[None].astype(bool)
        if masks is not None:
            check_mask_size(spec, masks.shape[1], name)
            check_masks(masks, spec.sizes, name)
        noise = None
        if not (self.deterministic if deterministic is None else deterministic):
            noise = draw_noise(spec.kind, self.generator, (1, spec.num_parameters))
        actions, self.state = self.actor_critic.predict(seen, self.state, masks=masks, noise=noise)
        action = to_environment(spec, actions)[0]
        return int(action) if spec.kind == "discrete" else action


def check_writable(path: str | Path) -> None:
    """Say in one sentence where a file cannot be written, before the work for it is done."""
    path = Path(path)
    try:
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise HeelerError(f"cannot write {path}: {error.strerror}; choose another file") from error


def check_film(config: EnvConfig, path: str | Path) -> None:
    """Say in one sentence why `record_video` would fail at its start, where it would."""
    _check_film_file(path)
    env, _ = _picture_env(config)
    try:
        env.reset(seed=0)
        _picture(env, config.id)
    except HeelerError:
        raise
    except Exception as error:
        raise _not_filmed(config, error) from error
    finally:
        env.close()


def record_video(policy: GymPolicy, config: EnvConfig, path: str | Path, *, seed: int, max_steps: int = 10_000) -> int:
    """Film one episode; returns its number of frames."""
    _check_film_file(path)
    import imageio

    env, fps = _picture_env(config)
    if Path(path).suffix.lower() == ".gif":  # whole hundredths of a second; viewers slow down below two
        pace: dict[str, Any] = {"duration": 10 * max(2, round(100 / fps)), "loop": 0}
    else:
        pace = {"fps": fps, "macro_block_size": 2}
    try:
        with ExitStack() as stack:
            stack.callback(env.close)
            policy.reset()
            observation, info = env.reset(seed=seed)
            picture = _picture(env, config.id)
            writer: Any = stack.enter_context(imageio.get_writer(path, **pace))
            writer.append_data(_even(picture))
            frames = 1
            while frames <= max_steps:
                action = policy.predict(observation, mask=info.get(MASK_KEY))
                observation, _, terminated, truncated, info = env.step(action)
                writer.append_data(_even(_picture(env, config.id)))
                frames += 1
                if terminated or truncated:
                    break
            return frames
    except HeelerError:
        raise
    except Exception as error:
        raise _not_filmed(config, error) from error


def _not_filmed(config: EnvConfig, error: Exception) -> HeelerError:
    return HeelerError(f"{config.id} cannot be filmed: {type(error).__name__}: {error}")


def _check_film_file(path: str | Path) -> None:
    require("imageio", "video")
    path = Path(path)
    if path.suffix.lower() not in FILMS:
        raise HeelerError(f"{path} is no name of a film: let it end with {', '.join(FILMS)}")
    check_writable(path)


def _picture_env(config: EnvConfig) -> tuple[Any, float]:
    """The environment of a film, and how many of its pictures make a second."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws into memory and needs no display
    if "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        env = make_picture_env(config)
    except HeelerError as error:
        if "render_mode" not in str(error):
            raise
        raise HeelerError(
            f"{config.id} cannot be filmed, as it takes no render_mode: give its __init__ an argument render_mode, and"
            " let render() return a picture where that is 'rgb_array'"
        ) from error
    if isinstance(config.backend, Atari):
        return env, ATARI_FPS / config.backend.frameskip
    return env, float(env.metadata.get("render_fps") or 30)


def _picture(env: Any, id: str) -> np.ndarray[Any, Any]:
    """What `render` shows, `[H, W, 3]` of bytes."""
    picture = env.render()
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3:
        return picture
    shown = f"an array {picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
    raise HeelerError(
        f"{id} cannot be filmed, as its render() returned {'None' if picture is None else shown}: let it return a"
        " picture [height, width, 3] of uint8 where render_mode is 'rgb_array'"
    )


def _even(picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """With its last row and column twice where their number is odd: films in most formats have even sides."""
    height, width, _ = picture.shape
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def make_picture_env(config: EnvConfig) -> Any:
    """A single environment that renders pictures and shows what the policy was trained on."""
    backend = config.backend
    if not isinstance(backend, Atari):
        return make_one(config, render_mode="rgb_array")
    given = dict(config.kwargs)
    unknown = [name for name in given if name not in ATARI_KWARGS]
    if unknown:
        raise HeelerError(
            f"{config.id} cannot be filmed with {', '.join(unknown)}: films of Atari games follow only"
            f" {', '.join(ATARI_KWARGS)} of --env-kwargs"
        )
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

    class Preprocessing(AtariPreprocessing):
        """Gymnasium's, which has neither ale-py's FIRE after a reset nor its `maxpool=False`."""

        def reset(self, **options: Any) -> Any:
            observation, info = super().reset(**options)
            meanings = self.env.unwrapped.get_action_meanings()  # pyright: ignore
            if not given.get("use_fire_reset", True) or "FIRE" not in meanings:
                return observation, info
            self.env.step(meanings.index("FIRE"))
            self.ale.getScreenGrayscale(self.obs_buffer[0])
            self.obs_buffer[1].fill(0)
            return self._get_obs(), info

        def _get_obs(self) -> Any:
            if not given.get("maxpool", True):
                self.obs_buffer[1].fill(0)
            return super()._get_obs()

    game = config.id if config.id.startswith("ALE/") else f"ALE/{config.id}-v5"
    kwargs = {
        "frameskip": 1, "repeat_action_probability": backend.sticky_actions,
        "full_action_space": backend.full_action_space,
    }  # fmt: skip
    kwargs |= {name: given[name] for name in given if name == "max_num_frames_per_episode"}
    env = make_one(EnvConfig(id=game, kwargs=kwargs), render_mode="rgb_array")
    size = given.get("img_width", 84), given.get("img_height", 84)
    env = Preprocessing(env, noop_max=backend.noop_max, frame_skip=backend.frameskip, screen_size=size)
    return FrameStackObservation(env, backend.stack, padding_type="zero")


def print_gym_report(run: Any) -> None:
    """The summary of a finished run, on standard output."""
    summary, folder = run.summary, run.folder.path
    lines = [""]
    for title in ("before", "after"):
        figures = summary.get(f"eval/{title}")
        if figures:
            lines.append(
                f"return {title:<6} {figures['reward']:10.2f} ± {figures['reward/std']:.2f}   length"
                f" {figures['length']:8.1f}   over {figures['episodes']:.0f} episodes"
            )
    if "best" in summary:
        best = summary["best"]
        lines.append(f"the best policy, of update {best['step']} with {best['reward']:.2f}, is in {folder}/best/policy")
    steps, seconds = summary.get("decisions", 0), summary.get("seconds/ppo", 0.0)
    lines.append(
        f"{summary['updates']:,} updates, {steps:,} steps, {seconds:.0f} s, {steps / max(seconds, 1e-9):,.0f} steps/s"
    )
    lines.append(f"{folder}/summary.json has the figures; try:")
    lines.append(f"  heeler eval {folder} --episodes 20 --video episode.mp4")
    print("\n".join(lines))

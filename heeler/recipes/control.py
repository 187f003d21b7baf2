"""Recipes for environments: settings that were found to work, one entry a task.

What is not named in an entry is `GymConfig`'s default. MuJoCo shares one entry; HalfCheetah
and Ant begin with less noise, HalfCheetah's advantages are computed again in each epoch, and Swimmer begins with more
noise and looks further ahead: its best gait is beyond a valley. Every run is evaluated about ten times, so that its
best policy is kept, but for CartPole's, which takes seconds, and Atari's, whose games are long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from heeler.envs.vector import Atari, EnvConfig, Vectorized
from heeler.policies.networks import NatureCNN
from heeler.ppo.advantages import AdvantageConfig
from heeler.ppo.schedules import Schedule
from heeler.ppo.update import PPOConfig
from heeler.train.control import GymConfig

LINEAR = Schedule(shape="linear")


def ppo(epochs: int, minibatches: int, **changes: Any) -> PPOConfig:
    """The update with the usual gradient norm of 0.5 and micro-batches as large as the minibatch."""
    return replace(PPOConfig(epochs=epochs, minibatches=minibatches, max_grad_norm=0.5, token_budget=65536), **changes)


def cartpole() -> GymConfig:
    return GymConfig(
        env=EnvConfig(id="CartPole-v1", num_envs=8, backend=Vectorized()),
        steps=100_000,
        num_steps=32,
        lr=1e-3,
        clip_schedule=LINEAR,
        advantage=AdvantageConfig(gamma=0.98, lam=0.8),
        ppo=ppo(20, 1),
    )


def acrobot() -> GymConfig:
    return GymConfig(
        env=EnvConfig(id="Acrobot-v1", num_envs=16),
        steps=1_000_000,
        num_steps=256,
        normalize_observations=True,
        lr=1e-3,
        advantage=AdvantageConfig(gamma=0.99, lam=0.94),
        ppo=ppo(4, 64),
        eval_every=25,
    )


def mountaincar() -> GymConfig:
    return GymConfig(
        env=EnvConfig(id="MountainCar-v0", num_envs=16),
        steps=1_000_000,
        num_steps=64,
        normalize_observations=True,
        scale_rewards=True,
        lr=1e-3,
        advantage=AdvantageConfig(gamma=0.99, lam=0.98),
        ppo=ppo(4, 16),
        eval_every=100,
    )


def pendulum() -> GymConfig:
    return GymConfig(
        env=EnvConfig(id="Pendulum-v1", num_envs=4),
        steps=200_000,
        num_steps=512,
        normalize_observations=True,
        scale_rewards=True,
        lr=1e-3,
        advantage=AdvantageConfig(gamma=0.95, lam=0.95),
        ppo=ppo(10, 32),
        eval_every=10,
    )


def lunarlander() -> GymConfig:
    return GymConfig(
        env=EnvConfig(id="LunarLander-v3", num_envs=16),
        steps=1_000_000,
        num_steps=1024,
        scale_rewards=True,
        advantage=AdvantageConfig(gamma=0.999, lam=0.98),
        ppo=ppo(4, 256, entropy_coef=0.01),
        eval_every=6,
    )


def lunarlander_continuous() -> GymConfig:
    return replace(lunarlander(), env=EnvConfig(id="LunarLanderContinuous-v3", num_envs=16))


def bipedalwalker() -> GymConfig:
    return GymConfig(
        env=EnvConfig(id="BipedalWalker-v3", num_envs=32),
        steps=5_000_000,
        num_steps=1024,
        normalize_observations=True,
        scale_rewards=True,
        advantage=AdvantageConfig(gamma=0.999, lam=0.95),
        ppo=ppo(10, 128, clip_range=0.18),
        eval_every=15,
    )


def mujoco(id: str, gamma: float = 0.99, log_std: float = -0.5, recompute: bool = False) -> GymConfig:
    return GymConfig(
        env=EnvConfig(id=id, num_envs=8),
        steps=1_000_000,
        num_steps=256,
        log_std=log_std,
        normalize_observations=True,
        scale_rewards=True,
        advantage=AdvantageConfig(gamma=gamma, lam=0.95, recompute=recompute),
        ppo=ppo(10, 32, target_kl=0.02),
        eval_every=50,
    )


def swimmer() -> GymConfig:
    entry = mujoco("Swimmer-v5", gamma=0.9999, log_std=0.0)  # with -0.5 it stays in the gait that returns about 140
    return replace(
        entry,
        num_steps=512,
        lr=6e-4,
        advantage=replace(entry.advantage, lam=0.98),
        ppo=replace(entry.ppo, minibatches=16),
        eval_every=25,
    )


def atari(game: str) -> GymConfig:
    return GymConfig(
        env=EnvConfig(id=f"ALE/{game}-v5", num_envs=8, backend=Atari()),
        steps=10_000_000,
        num_steps=128,
        network=NatureCNN(),
        shared=True,
        lr=2.5e-4,
        clip_schedule=LINEAR,
        ppo=ppo(4, 4, clip_range=0.1, entropy_coef=0.01),
        eval_deterministic=False,
    )


def default_config(id: str) -> GymConfig:
    """`heeler ppo gym`: sensible settings for any environment; images and Atari games get the Nature CNN."""
    if id.startswith("ALE/"):
        return atari(id.removeprefix("ALE/").partition("-")[0])
    return GymConfig(env=EnvConfig(id=id))


RECIPES: dict[str, Callable[[], GymConfig]] = {
    "cartpole": cartpole,
    "acrobot": acrobot,
    "mountaincar": mountaincar,
    "pendulum": pendulum,
    "lunarlander": lunarlander,
    "lunarlander-continuous": lunarlander_continuous,
    "bipedalwalker": bipedalwalker,
    "halfcheetah": lambda: mujoco("HalfCheetah-v5", log_std=-1.0, recompute=True),
    "hopper": lambda: mujoco("Hopper-v5"),
    "walker2d": lambda: mujoco("Walker2d-v5"),
    "ant": lambda: mujoco("Ant-v5", log_std=-1.0),
    "swimmer": swimmer,
    "pong": lambda: atari("Pong"),
    "breakout": lambda: atari("Breakout"),
}

"""Train PPO of Stable-Baselines3 on a control task or a game and report speed, curve and evaluation.

    python sb3_control.py --env CartPole-v1 --settings cartpole-bench --steps 100000 --out result.json

Run with the Python of the environment `sb3` (environments.py). It needs nothing of Heeler.

Settings:
    cartpole-bench, halfcheetah-bench: for speed beside other systems with the same sizes.
    pong-bench: eight copies of an Atari game (PongNoFrameskip-v4), the RL Zoo's hyperparameters for all Atari games.
    zoo: the hyperparameters that the RL Zoo tuned for this environment.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import gymnasium
import torch
from reporting import Progress, parser, reached_at, write_report
from stable_baselines3 import PPO
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecNormalize
from torch import nn

SMALL_NETS = {"net_arch": {"pi": [64, 64], "vf": [64, 64]}, "activation_fn": nn.Tanh}
LARGE_NETS = {
    "log_std_init": -2,
    "ortho_init": False,
    "activation_fn": nn.ReLU,
    "net_arch": {"pi": [256, 256], "vf": [256, 256]},
}

# "envs", "normalize" and "atari" belong to the environments, the rest are PPO's arguments.
BENCH: dict[str, dict[str, Any]] = {
    "cartpole-bench": {
        "envs": 8,
        "policy": "MlpPolicy",
        "n_steps": 128,
        "batch_size": 256,
        "n_epochs": 4,
        "learning_rate": 2.5e-4,
        "ent_coef": 0.01,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "clip_range": 0.2,
        "policy_kwargs": SMALL_NETS,
    },
    "halfcheetah-bench": {
        "envs": 8,
        "normalize": True,
        "policy": "MlpPolicy",
        "n_steps": 256,
        "batch_size": 256,
        "n_epochs": 10,
        "learning_rate": 3e-4,
        "ent_coef": 0.0,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "clip_range": 0.2,
        "policy_kwargs": SMALL_NETS,
    },
    # The RL Zoo's entry `atari` (source below): learning rate and clip range fall linearly to 0.
    "pong-bench": {
        "envs": 8,
        "atari": True,
        "policy": "CnnPolicy",
        "n_steps": 128,
        "batch_size": 256,
        "n_epochs": 4,
        "learning_rate": "linear 2.5e-4",
        "clip_range": "linear 0.1",
        "vf_coef": 0.5,
        "ent_coef": 0.01,
    },
}

# DLR-RM/rl-baselines3-zoo, hyperparams/ppo.yml, read at commit 22e3ff2 (April 2026). The zoo tuned the MuJoCo tasks as
# v4 (as v3 at first); here they also serve v5. What an entry leaves out is SB3's default: 64-64 tanh networks for
# Walker2d. With `normalize`, the zoo gives PPO's gamma to the reward's normalization, and so does this script.
ZOO: dict[str, dict[str, Any]] = {
    "CartPole": {
        "envs": 8,
        "policy": "MlpPolicy",
        "n_steps": 32,
        "batch_size": 256,
        "gae_lambda": 0.8,
        "gamma": 0.98,
        "n_epochs": 20,
        "ent_coef": 0.0,
        "learning_rate": "linear 0.001",
        "clip_range": "linear 0.2",
    },
    "HalfCheetah": {
        "envs": 1,
        "normalize": True,
        "policy": "MlpPolicy",
        "n_steps": 512,
        "batch_size": 64,
        "gamma": 0.98,
        "learning_rate": 2.0633e-05,
        "ent_coef": 0.000401762,
        "clip_range": 0.1,
        "n_epochs": 20,
        "gae_lambda": 0.92,
        "max_grad_norm": 0.8,
        "vf_coef": 0.58096,
        "policy_kwargs": LARGE_NETS,
    },
    "Hopper": {
        "envs": 1,
        "normalize": True,
        "policy": "MlpPolicy",
        "n_steps": 512,
        "batch_size": 32,
        "gamma": 0.999,
        "learning_rate": 9.80828e-05,
        "ent_coef": 0.00229519,
        "clip_range": 0.2,
        "n_epochs": 5,
        "gae_lambda": 0.99,
        "max_grad_norm": 0.7,
        "vf_coef": 0.835671,
        "policy_kwargs": LARGE_NETS,
    },
    "Walker2d": {
        "envs": 1,
        "normalize": True,
        "policy": "MlpPolicy",
        "n_steps": 512,
        "batch_size": 32,
        "gamma": 0.99,
        "learning_rate": 5.05041e-05,
        "ent_coef": 0.000585045,
        "clip_range": 0.1,
        "n_epochs": 20,
        "gae_lambda": 0.95,
        "max_grad_norm": 1,
        "vf_coef": 0.871923,
    },
    "LunarLander": {
        "envs": 16,
        "policy": "MlpPolicy",
        "n_steps": 1024,
        "batch_size": 64,
        "gae_lambda": 0.98,
        "gamma": 0.999,
        "n_epochs": 4,
        "ent_coef": 0.01,
    },
}


def chosen_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The hyperparameters that the command line asks for, and SB3's defaults of the two that the report needs."""
    if arguments.settings == "zoo":
        task = arguments.env.partition("-")[0]
        if task not in ZOO:
            raise SystemExit(f"no tuned hyperparameters for {arguments.env}; there are some for {', '.join(ZOO)}")
        settings = dict(ZOO[task])
    else:
        settings = dict(BENCH[arguments.settings])
    if arguments.num_envs:
        settings["envs"] = arguments.num_envs
    if arguments.normalize is not None:
        settings["normalize"] = arguments.normalize
    return {"normalize": False, "atari": False, "gamma": 0.99, **settings}


def ppo_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """PPO's own arguments; "linear X" becomes a schedule from X at the start to 0 at the end."""
    made = {name: value for name, value in settings.items() if name not in ("envs", "normalize", "atari")}
    for name in ("learning_rate", "clip_range"):
        value = made.get(name)
        if isinstance(value, str):
            start = float(value.removeprefix("linear "))
            made[name] = lambda remaining, start=start: start * remaining
    return made


def make_environments(env: str, count: int, seed: int, settings: dict[str, Any], training: bool) -> VecEnv:
    """Copies of the environment in this process, with the wrappers of the settings.

    Episode returns are recorded below all wrappers that change rewards or end episodes early.
    """
    if settings["atari"]:
        import ale_py

        gymnasium.register_envs(ale_py)
    wrapper = AtariWrapper if settings["atari"] else None
    made: VecEnv = make_vec_env(env, n_envs=count, seed=seed, vec_env_cls=DummyVecEnv, wrapper_class=wrapper)
    if settings["atari"]:
        made = VecFrameStack(made, n_stack=4)
    if settings["normalize"]:
        made = VecNormalize(made, training=training, norm_reward=training, gamma=settings["gamma"])
    return made


class Recorder(BaseCallback):
    """Keeps the episode returns of training, which ends after the update of the rollout that reaches the target."""

    def __init__(self, progress: Progress, target: float | None) -> None:
        super().__init__()
        self.progress, self.target = progress, target

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.progress.add_episode(self.num_timesteps, float(info["episode"]["r"]))
        return reached_at(self.progress.curve[-1:], self.target) is None

    def _on_rollout_end(self) -> None:
        self.progress.add_point(self.num_timesteps)


def evaluate(model: PPO, arguments: argparse.Namespace, settings: dict[str, Any]) -> list[float]:
    """Raw returns of whole episodes with the most probable action and the statistics as they were after training."""
    environments = make_environments(arguments.env, 1, arguments.seed + 1000, settings, training=False)
    trained = model.get_vec_normalize_env()
    if trained is not None and isinstance(environments, VecNormalize):
        environments.obs_rms = trained.obs_rms
    returns, _ = evaluate_policy(
        model, environments, n_eval_episodes=arguments.eval_episodes, deterministic=True, return_episode_rewards=True
    )
    environments.close()
    return [float(value) for value in returns]


def plain(value: Any) -> Any:
    """A value as JSON has it; classes by their name."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return value.__name__ if isinstance(value, type) else value


def main() -> None:
    command_line = parser(__doc__ or "", env="CartPole-v1", steps=100_000)
    command_line.add_argument("--settings", choices=[*BENCH, "zoo"], default="cartpole-bench", help="(cartpole-bench)")
    command_line.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="normalize observations and rewards (what the settings say)",
    )
    arguments = command_line.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = chosen_settings(arguments)
    environments = make_environments(arguments.env, settings["envs"], arguments.seed, settings, training=True)
    model = PPO(env=environments, seed=arguments.seed, device="cpu", verbose=0, **ppo_arguments(settings))

    progress = Progress()
    recorder = Recorder(progress, arguments.target)
    progress.begin()
    model.learn(arguments.steps, callback=recorder)
    learning_seconds = progress.seconds()

    start = time.perf_counter()
    evaluation = evaluate(model, arguments, settings) if arguments.eval_episodes else []
    packages = ["stable-baselines3", "torch", "gymnasium", "numpy"]
    packages += ["ale-py"] if settings["atari"] else ["mujoco"]
    write_report(
        arguments,
        packages,
        {"name": arguments.settings, **plain(settings)},
        model.num_timesteps,
        learning_seconds,
        progress,
        evaluation,
        time.perf_counter() - start,
    )
    environments.close()


if __name__ == "__main__":
    main()

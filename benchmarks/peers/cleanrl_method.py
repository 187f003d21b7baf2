"""PPO by CleanRL's method, written for this comparison, and a report of its speed, curve and evaluation.

    python cleanrl_method.py --env CartPole-v1 --steps 100000 --out result.json

Run with the Python of the environment `cleanrl` (environments.py). It needs nothing of Heeler.

The method is that of CleanRL's ppo.py (discrete actions) and ppo_continuous_action.py (continuous): eager PyTorch,
environments stepped one after the other in this process, one call of the policy for each step of all copies, storage
tensors [T, N], advantages in a loop over time, one optimizer step for each minibatch, distributions of
torch.distributions with their checks, the same initialization, the same diagnostics for each minibatch. As there, the
end of a truncated episode counts as a terminal state. Not kept: TensorBoard and printing, which cost time.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from reporting import Progress, parser, write_report
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal


@dataclass(frozen=True)
class Settings:
    """Hyperparameters.

    Attributes:
        envs: N, copies of the environment.
        rollout_steps: T, steps of each copy between two updates.
        minibatches, epochs: of an update.
        lr: falls linearly to 0 over the training.
        value_clip: clip the value's change with clip_range too.
    """

    envs: int = 8
    rollout_steps: int = 128
    minibatches: int = 4
    epochs: int = 4
    lr: float = 2.5e-4
    gamma: float = 0.99
    lam: float = 0.95
    clip_range: float = 0.2
    value_clip: bool = True
    entropy_coef: float = 0.01
    value_coef: float = 0.5
    max_grad_norm: float = 0.5
    adam_eps: float = 1e-5


CONTINUOUS = Settings(lr=3e-4, epochs=10, entropy_coef=0.0)
SETTINGS = {
    "cartpole-bench": Settings(),
    "halfcheetah-bench": replace(CONTINUOUS, rollout_steps=256, minibatches=8),
    # the defaults of CleanRL's two files
    "cleanrl-discrete": Settings(envs=4),
    "cleanrl-continuous": replace(CONTINUOUS, envs=1, rollout_steps=2048, minibatches=32),
}


def make_environment(env: str, gamma: float) -> gym.Env[Any, Any]:
    """One environment; for continuous actions with normalized and clipped observations and rewards.

    The wrapper that records raw returns lies below those.
    """
    made: gym.Env[Any, Any] = gym.wrappers.RecordEpisodeStatistics(gym.make(env))
    if isinstance(made.action_space, gym.spaces.Discrete):
        return made
    made = gym.wrappers.NormalizeObservation(gym.wrappers.ClipAction(made))
    made = gym.wrappers.TransformObservation(made, lambda x: np.clip(x, -10, 10), made.observation_space)
    made = gym.wrappers.NormalizeReward(made, gamma=gamma)
    return gym.wrappers.TransformReward(made, lambda reward: float(np.clip(reward, -10, 10)))


def observation_normalizer(env: gym.Env[Any, Any]) -> gym.wrappers.NormalizeObservation[Any, Any, Any] | None:
    """The wrapper that normalizes observations, if there is one."""
    while isinstance(env, gym.Wrapper):
        if isinstance(env, gym.wrappers.NormalizeObservation):
            return env
        env = env.env
    return None


def linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """A linear layer with an orthogonal weight and no bias at the start."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def network(inputs: int, outputs: int, last_gain: float) -> nn.Sequential:
    """Two hidden layers of 64 tanh units."""
    gain = 2**0.5
    hidden = [linear(inputs, 64, gain), nn.Tanh(), linear(64, 64, gain), nn.Tanh()]
    return nn.Sequential(*hidden, linear(64, outputs, last_gain))


class ActorCritic(nn.Module):
    """Policy and critic without shared weights."""

    def __init__(self, observations: gym.spaces.Box, actions: gym.spaces.Space[Any]) -> None:
        super().__init__()
        inputs = int(np.prod(observations.shape))
        self.discrete = isinstance(actions, gym.spaces.Discrete)
        outputs = int(actions.n) if isinstance(actions, gym.spaces.Discrete) else int(np.prod(actions.shape or ()))
        self.critic = network(inputs, 1, last_gain=1.0)
        self.actor = network(inputs, outputs, last_gain=0.01)
        self.log_std = None if self.discrete else nn.Parameter(torch.zeros(1, outputs))

    def policy(self, observations: Tensor) -> Distribution:
        outputs = self.actor(observations)
        if self.log_std is None:
            return Categorical(logits=outputs)
        return Independent(Normal(outputs, self.log_std.expand_as(outputs).exp()), 1)

    def values(self, observations: Tensor) -> Tensor:
        """[..., inputs] -> [...]."""
        return self.critic(observations).squeeze(-1)

    def greedy(self, observations: Tensor) -> Tensor:
        """The most probable action."""
        outputs = self.actor(observations)
        return outputs.argmax(-1) if self.discrete else outputs


def advantages_of(rewards: Tensor, values: Tensor, dones: Tensor, last_values: Tensor, settings: Settings) -> Tensor:
    """Generalized advantage estimation.

    Args:
        rewards, values: [T, N].
        dones: [T, N], 1 where the episode ended with this step.
        last_values: [N], of the observations after the last step.
    """
    advantages = torch.zeros_like(rewards)
    following, next_values = torch.zeros_like(last_values), last_values
    for step in reversed(range(len(rewards))):
        goes_on = 1.0 - dones[step]
        delta = rewards[step] + settings.gamma * next_values * goes_on - values[step]
        following = delta + settings.gamma * settings.lam * goes_on * following
        advantages[step], next_values = following, values[step]
    return advantages


def minibatch_loss(model: ActorCritic, rows: dict[str, Tensor], settings: Settings) -> tuple[Tensor, dict[str, float]]:
    """PPO's loss of a minibatch, and its diagnostics."""
    policy = model.policy(rows["observations"])
    log_ratios = policy.log_prob(rows["actions"]) - rows["logprobs"]
    ratios = log_ratios.exp()
    with torch.no_grad():
        diagnostics = {
            "approx_kl": ((ratios - 1) - log_ratios).mean().item(),
            "clip_fraction": ((ratios - 1).abs() > settings.clip_range).float().mean().item(),
        }
    advantages = rows["advantages"]
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    low, high = 1 - settings.clip_range, 1 + settings.clip_range
    policy_loss = torch.max(-advantages * ratios, -advantages * ratios.clamp(low, high)).mean()

    values, old_values, returns = model.values(rows["observations"]), rows["values"], rows["returns"]
    errors = (values - returns).square()
    if settings.value_clip:
        near = old_values + (values - old_values).clamp(-settings.clip_range, settings.clip_range)
        errors = torch.max(errors, (near - returns).square())
    value_loss = 0.5 * errors.mean()
    entropy = policy.entropy().mean()
    return policy_loss + settings.value_coef * value_loss - settings.entropy_coef * entropy, diagnostics


def train(
    model: ActorCritic, environments: SyncVectorEnv, settings: Settings, updates: int, seed: int, progress: Progress
) -> dict[str, float]:
    """Train for a number of updates; returns the diagnostics of the last minibatch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, eps=settings.adam_eps)
    shape = (settings.rollout_steps, settings.envs)
    observation_shape = environments.single_observation_space.shape or ()
    action_shape = environments.single_action_space.shape or ()
    kind = torch.int64 if model.discrete else torch.float32
    stored = {
        "observations": torch.zeros(*shape, *observation_shape),
        "actions": torch.zeros(*shape, *action_shape, dtype=kind),
        **{name: torch.zeros(*shape) for name in ("logprobs", "values", "rewards", "dones")},
    }
    order = np.arange(settings.rollout_steps * settings.envs)
    minibatch = len(order) // settings.minibatches
    diagnostics: dict[str, float] = {}
    step_count = 0
    first, _ = environments.reset(seed=seed)
    observations = torch.as_tensor(first, dtype=torch.float32)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = settings.lr * (1 - update / updates)
        for step in range(settings.rollout_steps):
            step_count += settings.envs
            with torch.no_grad():
                policy = model.policy(observations)
                actions = policy.sample()
                stored["logprobs"][step] = policy.log_prob(actions)
                stored["values"][step] = model.values(observations)
            stored["observations"][step], stored["actions"][step] = observations, actions
            new, rewards, terminations, truncations, infos = environments.step(actions.numpy())
            stored["rewards"][step] = torch.as_tensor(rewards, dtype=torch.float32)
            stored["dones"][step] = torch.as_tensor(np.logical_or(terminations, truncations), dtype=torch.float32)
            observations = torch.as_tensor(new, dtype=torch.float32)
            if "final_info" in infos:
                ended = infos["final_info"]
                for index in np.flatnonzero(ended["_episode"]):
                    progress.add_episode(step_count, float(ended["episode"]["r"][index]))
        progress.add_point(step_count)

        with torch.no_grad():
            last_values = model.values(observations)
            advantages = advantages_of(stored["rewards"], stored["values"], stored["dones"], last_values, settings)
        batch = {**stored, "advantages": advantages, "returns": advantages + stored["values"]}
        batch = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}
        for _ in range(settings.epochs):
            np.random.shuffle(order)
            for start in range(0, len(order), minibatch):
                chosen = order[start : start + minibatch]
                loss, diagnostics = minibatch_loss(
                    model, {name: tensor[chosen] for name, tensor in batch.items()}, settings
                )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
                optimizer.step()
    return diagnostics


def evaluate(model: ActorCritic, environments: SyncVectorEnv, arguments: argparse.Namespace) -> list[float]:
    """Raw returns of episodes with the most probable action, observations normalized as in the first training copy."""
    env = make_environment(arguments.env, gamma=0.99)
    mine, trained = observation_normalizer(env), observation_normalizer(environments.envs[0])
    if mine is not None and trained is not None:
        mine.obs_rms, mine.update_running_mean = trained.obs_rms, False
    returns: list[float] = []
    for episode in range(arguments.eval_episodes):
        observation, info = env.reset(seed=arguments.seed + 1000 + episode)
        ended = False
        while not ended:
            with torch.no_grad():
                action = model.greedy(torch.as_tensor(observation, dtype=torch.float32))
            observation, _, terminated, truncated, info = env.step(action.numpy())
            ended = terminated or truncated
        returns.append(float(info["episode"]["r"]))
    env.close()
    return returns


def main() -> None:
    command_line = parser(__doc__ or "", env="CartPole-v1", steps=100_000)
    command_line.add_argument(
        "--settings", choices=SETTINGS, help="(cartpole-bench for discrete actions, halfcheetah-bench for continuous)"
    )
    arguments = command_line.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    np.random.seed(arguments.seed)
    name = arguments.settings
    if name is None:
        discrete = isinstance(gym.make(arguments.env).action_space, gym.spaces.Discrete)
        name = "cartpole-bench" if discrete else "halfcheetah-bench"
    settings: Settings = SETTINGS[name]
    if arguments.num_envs:
        settings = replace(settings, envs=arguments.num_envs)
    environments = SyncVectorEnv(
        [lambda: make_environment(arguments.env, settings.gamma) for _ in range(settings.envs)],
        autoreset_mode=AutoresetMode.SAME_STEP,  # the only mode there was when CleanRL's files were written
    )
    model = ActorCritic(environments.single_observation_space, environments.single_action_space)
    updates = max(1, arguments.steps // (settings.rollout_steps * settings.envs))

    progress = Progress()
    progress.begin()
    diagnostics = train(model, environments, settings, updates, arguments.seed, progress)
    learning_seconds = progress.seconds()

    start = time.perf_counter()
    evaluation = evaluate(model, environments, arguments) if arguments.eval_episodes else []
    write_report(
        arguments,
        ["torch", "gymnasium", "numpy", "mujoco"],
        {"name": name, **asdict(settings)},
        updates * settings.rollout_steps * settings.envs,
        learning_seconds,
        progress,
        evaluation,
        time.perf_counter() - start,
        diagnostics=diagnostics,
    )
    environments.close()


if __name__ == "__main__":
    main()

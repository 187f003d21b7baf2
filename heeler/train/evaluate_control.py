"""Playing whole episodes with a policy: figures, predictions for a single observation, videos."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from heeler.envs.vector import EnvConfig, EnvPool, make_vector
from heeler.policies.actor_critic import ActorCritic
from heeler.policies.distributions import draw_noise
from heeler.runtime.progress import progress


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
    so_far, steps = np.zeros(num_envs), np.zeros(num_envs, dtype=np.int64)
    try:
        observations, masks = env.reset(seed)
        states = torch.zeros(num_envs, policy.state_size, device=policy.device) if policy.recurrent else None
        while any(len(r) < each for r in returns):
            noise = None
            if not deterministic:
                noise = draw_noise(policy.actions.kind, generator, (num_envs, policy.actions.num_parameters))
            actions, states = policy.predict(observations, states, masks=masks, noise=noise)
            step = env.step(actions)
            observations, masks = step.observations, step.masks
            real = np.ones(num_envs, dtype=bool) if step.dummies is None else ~step.dummies
            so_far += step.rewards * real
            steps += real
            over = (step.terminated | step.truncated) & real
            for i in np.flatnonzero(over):
                if len(returns[i]) < each:
                    returns[i].append(float(so_far[i]))
                    lengths[i].append(int(steps[i]))
                    bar.update(1)
            so_far[over], steps[over] = 0.0, 0
            began = over if env.same_step else step.dummies
            if states is not None and began is not None and began.any():
                states = states.masked_fill(torch.as_tensor(began, device=states.device)[:, None], 0.0)
    finally:
        bar.close()
        env.close()
    all_returns = np.array([r for row in returns for r in row])
    return {
        "reward": float(all_returns.mean()),
        "reward/std": float(all_returns.std()),
        "length": float(np.mean([length for row in lengths for length in row])),
        "episodes": float(len(all_returns)),
    }

"""Makes sb3_gae.json: advantages and returns by Stable-Baselines3, to compare `heeler.ppo.advantages.gae` with.

    python -m venv peer && peer/bin/pip install torch==2.13.0 && peer/bin/pip install stable-baselines3==2.9.2
    peer/bin/python tests/ppo/golden/make_sb3_gae.py

Heeler is not needed and not imported.
"""

import json
import pathlib
import platform

import gymnasium
import numpy as np
import stable_baselines3
import torch
from stable_baselines3.common.buffers import RolloutBuffer

STEPS, ENVS = 12, 3
CASES = [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.5, 0.7)]


def rounded(x: np.ndarray) -> list:
    return x.astype(np.float64).round(7).tolist()


def case(gamma: float, lam: float, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    rewards, values = (rng.normal(size=(STEPS, ENVS)).astype(np.float32).round(3) for _ in range(2))
    last_values = rng.normal(size=ENVS).astype(np.float32).round(3)
    starts = (rng.random((STEPS, ENVS)) < 0.25).astype(np.float32)
    starts[0] = 1
    dones = np.array([0, 1, 0], dtype=np.float32)  # env 1 ends exactly at the rollout edge
    # Every second episode end inside the rollout is a time limit. SB3 handles it in collect_rollouts, by adding
    # gamma * V(final observation) to the last reward; the buffer then sees an ordinary end.
    time_limits = np.zeros((STEPS, ENVS), dtype=np.float32)
    final_values = np.zeros((STEPS, ENVS), dtype=np.float32)
    ends = [(t, e) for e in range(ENVS) for t in range(STEPS - 1) if starts[t + 1, e]]
    for t, e in ends[::2]:
        time_limits[t, e] = 1
        final_values[t, e] = np.float32(rng.normal()).round(3)

    buffer = RolloutBuffer(
        STEPS, gymnasium.spaces.Box(-1, 1, (1,)), gymnasium.spaces.Discrete(2), "cpu", lam, gamma, n_envs=ENVS
    )
    for t in range(STEPS):
        buffer.add(
            np.zeros((ENVS, 1), dtype=np.float32),
            np.zeros((ENVS, 1), dtype=np.float32),
            rewards[t] + np.float32(gamma) * final_values[t],
            starts[t],
            torch.tensor(values[t]),
            torch.zeros(ENVS),
        )
    buffer.compute_returns_and_advantage(torch.tensor(last_values), dones)
    return {
        "gamma": gamma,
        "lam": lam,
        "rewards": rounded(rewards),
        "values": rounded(values),
        "episode_starts": starts.astype(int).tolist(),
        "time_limits": time_limits.astype(int).tolist(),
        "final_values": rounded(final_values),
        "last_values": rounded(last_values),
        "dones": dones.astype(int).tolist(),
        "advantages": rounded(buffer.advantages),
        "returns": rounded(buffer.returns),
    }


made_by = (
    f"tests/ppo/golden/make_sb3_gae.py with stable-baselines3 {stable_baselines3.__version__}, torch"
    f" {torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}: RolloutBuffer.add for every"
    " step, then RolloutBuffer.compute_returns_and_advantage(last_values, dones). Arrays are [step][env], float32"
    " rounded to 7 digits. rewards are before the correction gamma * final_values that SB3 adds to the reward where"
    " time_limits is 1; SB3's advantages and returns are of the corrected rewards."
)
cases = [case(gamma, lam, seed) for seed, (gamma, lam) in enumerate(CASES)]
fields = [",\n".join(f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in c.items()) for c in cases]
lines = ",\n".join(f"  {{\n{body}\n  }}" for body in fields)  # one array a line, so that diffs can be read
text = f'{{\n "made_by": {json.dumps(made_by)},\n "cases": [\n{lines}\n ]\n}}\n'
json.loads(text)
pathlib.Path(__file__).with_name("sb3_gae.json").write_text(text)

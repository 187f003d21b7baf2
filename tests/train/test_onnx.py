"""The ONNX file says what `load_policy(...).predict` says, for the environment's own observations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from heeler.cli import main
from heeler.envs.vector import EnvConfig, make_one
from heeler.policies.networks import MLP
from heeler.ppo.update import PPOConfig
from heeler.train.control import GymConfig, load_policy, train_gym

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def train(tmp_path, id, kwargs=None, **changes):
    base = GymConfig(
        env=EnvConfig(id=id, num_envs=4, kwargs=kwargs or {}), out=str(tmp_path / "run"), eval_episodes=0, updates=3,
        num_steps=32, network=MLP(hidden=(16,)), ppo=PPOConfig(epochs=2, minibatches=2), threads=1,
    )  # fmt: skip
    return train_gym(replace(base, **changes), show=False)


def decide(tmp_path, factor):
    """Multiply the exported logits or means, so that random networks differ between states; returns the policy."""
    file = tmp_path / "run" / "policy" / "weights.pt"
    weights = torch.load(file, weights_only=True)
    for name in weights:
        if name.startswith("action_head"):
            weights[name] *= factor
    torch.save(weights, file)
    return load_policy(tmp_path / "run")


def exported(tmp_path, *flags):
    file = str(tmp_path / "policy.onnx")
    assert main(["export", str(tmp_path / "run"), "--onnx", file, *flags]) == 0
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def test_raw_observations_are_normalised_inside_and_actions_stay_in_their_bounds(tmp_path):
    run = train(tmp_path, "Pendulum-v1", normalize_observations=True)
    policy, env = decide(tmp_path, 400.0), make_one(run.config.env)
    env.action_space.seed(1)
    observations = [env.reset(seed=1)[0]]
    while len(observations) < 100:
        observations.append(env.step(env.action_space.sample())[0])
    batch = np.stack(observations)
    assert np.abs(batch).max() > 3.0  # far from what statistics of 0 and 1 would fit
    session = exported(tmp_path)
    actions, _, values = session.run(["action", "parameters", "value"], {"observation": batch})
    expected = np.stack([policy.predict(observation) for observation in observations])
    np.testing.assert_allclose(actions, expected, rtol=1e-3, atol=1e-3)
    at_bounds = np.abs(expected) == 2.0
    assert 0.05 < at_bounds.mean() < 0.95 and len({*expected[at_bounds].tolist()}) == 2
    normalizer = policy.actor_critic.normalizer
    assert normalizer is not None and normalizer.seen == 3 * 4 * 32
    by_hand = (batch - normalizer.mean.numpy()) / np.sqrt(normalizer.var.numpy() + 1e-8)
    judged = policy.actor_critic.parameters_and_values(torch.from_numpy(by_hand).float())[1]
    np.testing.assert_allclose(values, judged.detach().numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "id, kwargs, observations",
    [
        ("tests.toy_envs:Masked", {}, np.random.default_rng(0).uniform(-1, 1, (40, 3)).astype(np.float32)),
        ("tests.toy_envs:Identity", {"actions": "multi_discrete"}, np.array([[0, 0], [0, 1], [1, 0], [1, 1]] * 10)),
    ],
    ids=["discrete", "multi-discrete"],
)
def test_masks_are_an_input_of_the_file(id, kwargs, observations, tmp_path):
    train(tmp_path, id, kwargs)
    policy = decide(tmp_path, 100.0)
    sizes = policy.actor_critic.actions.sizes
    masks = np.random.default_rng(1).random((len(observations), sum(sizes))) < 0.5
    starts = np.cumsum([0, *sizes[:-1]])
    masks[:, starts] |= ~np.logical_or.reduceat(masks, starts, axis=1)  # something is allowed
    session = exported(tmp_path, "--masked")
    actions = session.run(["action"], {"observation": observations.astype(np.float32), "mask": masks})[0]
    space = policy.space
    rows = [row.astype(space.dtype) for row in observations]
    expected = [policy.predict(row, mask=mask) for row, mask in zip(rows, masks, strict=True)]
    np.testing.assert_array_equal(actions, expected)
    free = [policy.predict(row, mask=np.ones(sum(sizes))) for row in rows]
    assert np.any(np.asarray(free) != expected)  # the masks forbade what the policy wanted


def test_only_discrete_choices_get_a_mask(tmp_path, capsys):
    train(tmp_path, "Pendulum-v1", updates=1)
    assert main(["export", str(tmp_path / "run"), "--onnx", str(tmp_path / "policy.onnx"), "--masked"]) == 2
    assert "heeler: only Discrete and MultiDiscrete actions can be masked" in capsys.readouterr().err
    assert not (tmp_path / "policy.onnx").exists()

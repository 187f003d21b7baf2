"""The ONNX file says what `load_policy(...).predict` says, for the environment's own observations."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from heeler.cli import main
from heeler.envs.vector import EnvConfig, make_one
from heeler.policies.networks import MLP, NatureCNN
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


class Named(gym.Env):
    """Pictures whose names the file needs for other inputs and outputs; with a mask in info."""

    action_space = spaces.Discrete(3)
    names = ("mask", "state", "observation_mask", "action", "value", "front camera")

    def __init__(self) -> None:
        self.observation_space = spaces.Dict({name: spaces.Box(0, 255, (36, 36, 1), np.uint8) for name in self.names})

    def _show(self):
        self.t += 1
        return self.observation_space.sample(), {"action_mask": np.array([1, 0, 1], bool)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.t = 0
        return self._show()

    def step(self, action):
        observation, info = self._show()
        return observation, 1.0, False, self.t >= 5, info


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("memory", [0, 4])
def test_a_picture_may_have_a_name_that_the_file_needs(memory, masked, tmp_path):
    train(tmp_path, "tests.train.test_onnx:Named", memory=memory, num_steps=4, updates=1, network=NatureCNN(features=8))
    policy = decide(tmp_path, 100.0)
    session = exported(tmp_path, *(["--masked"] if masked else []))
    space = policy.space
    space.seed(0)
    rows = [space.sample() for _ in range(20)]
    mask = np.random.default_rng(0).random((len(rows), 3)) < 0.5
    mask[:, 0] |= ~mask.any(1)
    feed = {name: np.stack([row[name] for row in rows]).transpose(0, 3, 1, 2) for name in Named.names}
    feed["observation_action"], feed["observation_value"] = feed.pop("action"), feed.pop("value")
    if masked:
        feed["observation_observation_mask"], feed["mask"] = feed.pop("mask"), mask
    if memory:
        feed["observation_state"] = feed.pop("state")
        feed["state"] = np.zeros((len(rows), policy.actor_critic.state_size), np.float32)
    assert {put.name for put in session.get_inputs()} == {*feed}
    actions = session.run(["action"], feed)[0]
    expected = []
    for row, allowed in zip(rows, mask, strict=True):
        policy.reset()
        expected.append(policy.predict(row, mask=allowed if masked else None))
    np.testing.assert_array_equal(actions, expected)


@pytest.mark.parametrize("where", [".", 300 * "x" + ".onnx"], ids=["folder", "long"])
def test_a_file_that_cannot_be_written_is_told_in_a_sentence(where, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(tmp_path, "CartPole-v1", updates=1)
    assert main(["export", str(tmp_path / "run"), "--onnx", where]) == 2
    assert capsys.readouterr().err.startswith(f"heeler: cannot write {where}: ")

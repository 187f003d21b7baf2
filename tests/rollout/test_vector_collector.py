"""Packing what vector environments return: every decision once, dummies never, final observations where they belong."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from heeler.envs.vector import Async, EnvConfig, EnvPool, Sync, make_vector
from heeler.policies.actor_critic import ActorCritic
from heeler.policies.distributions import StateDependent
from heeler.policies.networks import MLP
from heeler.policies.steps import Segments, Steps
from heeler.rollout.actors import NumpyActor, TorchActor
from heeler.rollout.vector import VectorCollector
from heeler.types import HeelerError
from tests.toy_envs import Masked

MODES = [
    Sync(autoreset="same-step"),
    Sync(autoreset="next-step"),
    Async(autoreset="same-step"),
    Async(autoreset="next-step"),
]
POLICY = ("memory", "normalize", "shared", "log_std", "exploration")
LENGTHS, TERMINATES = (3, 1, 5, 2), (True, False)


def collector_of(id, num_envs=2, num_steps=4, backend=MODES[0], seed=0, **kwargs):
    policy_kwargs = {k: kwargs.pop(k) for k in POLICY if k in kwargs}
    config = EnvConfig(id=id, num_envs=num_envs, backend=backend, kwargs=kwargs)
    env = make_vector(config, seed)
    torch.manual_seed(seed)
    policy = ActorCritic(env.observations, env.actions, MLP(hidden=(8,)), **policy_kwargs)
    collector = VectorCollector(env, num_steps, seed)
    collector.publish(policy, 0)
    return collector, policy


def stream(collector, rollouts):
    """Everything collected, by environment: observation, reward, segment edges, what ended and what came after."""
    seen = {env: [] for env in range(collector.env.num_envs)}
    episodes = []
    for k in range(rollouts):
        rollout = collector.collect(k)
        observations, offsets = rollout.inputs.observations, rollout.offsets.tolist()
        assert len(rollout.step_rewards) == len(observations) == offsets[-1]
        for s, env in enumerate(rollout.prompt_ids.tolist()):
            for i in range(offsets[s], offsets[s + 1]):
                last = i == offsets[s + 1] - 1
                end = None
                if last:
                    final = tuple(rollout.final_observations[s].tolist())
                    end = (bool(rollout.terminated[s]), bool(rollout.ended[s]), final)
                seen[env].append((tuple(observations[i].tolist()), float(rollout.step_rewards[i]), end))
        episodes += zip(rollout.episode_returns.tolist(), rollout.episode_lengths.tolist(), strict=True)
    return seen, episodes


def expected_stream(steps):
    """The plain loop: the environment played by hand, decision after decision."""
    decisions, episodes = [], []
    episode, t, total = 0, 0, 0.0
    for _ in range(steps):
        length = LENGTHS[episode % len(LENGTHS)]
        reward = 100.0 * episode + t + 1
        total += reward
        over = t + 1 == length
        decisions.append(((float(episode), float(t)), reward, over, over and TERMINATES[episode % 2]))
        if over:
            episodes.append((total, length))
            episode, t, total = episode + 1, 0, 0.0
        else:
            t += 1
    return decisions, episodes


@pytest.mark.parametrize("backend", MODES, ids=str)
def test_every_decision_arrives_once_and_dummies_never(backend):
    collector, _ = collector_of("tests.toy_envs:Counter", backend=backend)
    try:
        seen, episodes = stream(collector, 9)
    finally:
        collector.env.close()
    for got in seen.values():
        expected, expected_episodes = expected_stream(len(got))
        assert len(got) > 20
        for (observation, reward, end), (e_observation, e_reward, over, terminated) in zip(got, expected, strict=True):
            assert (observation, reward) == (e_observation, e_reward)
            if over:
                assert end is not None and end[:2] == (terminated, True)
            if end is not None and not end[0]:  # bootstrapped: by what came after, of the same episode
                assert end[2] == (observation[0], observation[1] + 1)
            if end is not None:
                assert end[1] == over
    both = sorted(expected_episodes * 2)
    assert [e for e in sorted(episodes) if e in both] == sorted(episodes)
    assert len(episodes) >= 2 * len(expected_episodes) - 2
    if backend.autoreset == "same-step":
        assert all(len(got) == 36 for got in seen.values())  # no step is lost to resets


@pytest.mark.parametrize("backend", MODES[:2], ids=str)
def test_normalised_observations_are_stored_as_the_policy_saw_them(backend):
    collector, policy = collector_of("tests.toy_envs:Counter", backend=backend, normalize=True, num_steps=8)
    first = collector.collect(0)
    assert policy.normalizer is not None
    assert float(policy.normalizer.seen) == len(first.step_rewards)  # dummies are not counted
    torch.testing.assert_close(policy.normalizer.mean.float(), first.inputs.observations.mean(0))
    before = policy.normalizer.scale()
    second = collector.collect(1)
    raw = second.inputs.observations / before[1] + before[0]
    torch.testing.assert_close(raw, raw.round(), atol=1e-3, rtol=0)  # the statistics from before the rollout
    final = second.final_observations / before[1] + before[0]
    torch.testing.assert_close(final, final.round(), atol=1e-3, rtol=0)


def test_normalised_observations_are_clipped():
    collector, policy = collector_of("tests.toy_envs:Counter", normalize=True, num_steps=8)
    assert policy.normalizer is not None and policy.normalizer.clip == 10.0
    collector.collect(0)
    policy.normalizer.var.fill_(1e-4)  # a hundredth is the unit now
    rollout = collector.collect(1)
    raw = torch.cat([rollout.inputs.observations, rollout.final_observations])
    assert float(raw.max()) == 10.0 and float(raw.min()) == -10.0
    torch.testing.assert_close(policy.evaluate(rollout.inputs).logprobs, rollout.behavior_logprobs)


def test_continuous_actions_are_stored_as_drawn_and_sent_within_their_bounds(monkeypatch):
    """The log-probability is that of the draw: one of the clipped action would belong to no density."""
    collector, policy = collector_of("tests.toy_envs:Still", num_steps=50, log_std=1.0)
    sent, step = [], collector.env.env.step
    monkeypatch.setattr(collector.env.env, "step", lambda actions: (sent.append(actions.copy()), step(actions))[1])
    rollout = collector.collect(0)
    drawn = rollout.actions.view(2, 50, 2)
    assert float((drawn.abs() > 1).float().mean()) > 0.3
    np.testing.assert_allclose(np.stack(sent, axis=1), drawn.clamp(-1, 1).numpy())
    means = policy.parameters_and_values(rollout.inputs.observations)[0]
    density = torch.distributions.Normal(means, policy.log_std.exp()).log_prob(rollout.actions).sum(1)
    torch.testing.assert_close(rollout.behavior_logprobs, density)


@pytest.mark.parametrize("kind", ["discrete", "multi_discrete", "multi_binary", "box"])
def test_behavior_logprobs_are_those_of_the_policy(kind):
    collector, policy = collector_of("tests.toy_envs:Identity", actions=kind, num_steps=20)
    rollout = collector.collect(0)
    output = policy.evaluate(rollout.inputs)
    torch.testing.assert_close(rollout.behavior_logprobs, output.logprobs, rtol=1e-5, atol=1e-5)


def test_numpy_and_torch_actors_say_the_same():
    collector, policy = collector_of("CartPole-v1", num_envs=3)
    assert isinstance(collector.actor, NumpyActor)
    observations = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    other = TorchActor()
    other.publish(policy)
    np.testing.assert_allclose(collector.actor.act(observations, None)[0], other.act(observations, None)[0], atol=1e-6)


def test_draws_depend_on_seed_and_update_only():
    rollouts = []
    for _ in range(2):
        collector, _ = collector_of("CartPole-v1", num_steps=16, seed=5)
        rollouts.append([collector.collect(k).actions for k in range(2)])
    assert torch.equal(rollouts[0][0], rollouts[1][0]) and torch.equal(rollouts[0][1], rollouts[1][1])
    assert not torch.equal(rollouts[0][0], rollouts[0][1])


@pytest.mark.parametrize("where", ["info", "dict"])
@pytest.mark.parametrize("backend", MODES, ids=str)
def test_masked_actions_are_never_sent(where, backend):
    collector, policy = collector_of("tests.toy_envs:Masked", where=where, backend=backend, num_steps=30)
    try:
        rollout = collector.collect(0)  # the environment itself refuses forbidden actions
    finally:
        collector.env.close()
    masks, actions = rollout.inputs.masks, rollout.actions
    assert masks is not None and bool(masks[torch.arange(len(actions)), actions].all())
    assert not bool(masks.all())
    torch.testing.assert_close(
        rollout.behavior_logprobs, policy.evaluate(rollout.inputs).logprobs, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("backend", MODES[:2], ids=str)
def test_memory_begins_anew_with_each_episode_and_runs_on_across_rollouts(backend, shared):
    collector, policy = collector_of("tests.toy_envs:Counter", backend=backend, memory=6, num_steps=7, shared=shared)
    steps: dict[int, list] = {0: [], 1: []}
    for k in range(3):
        rollout = collector.collect(k)
        assert isinstance(rollout.inputs, Segments)
        output, after = policy.evaluate_with_final(rollout.inputs, rollout.final_observations)
        offsets = rollout.offsets.tolist()
        torch.testing.assert_close(rollout.behavior_logprobs, output.logprobs, rtol=1e-4, atol=1e-5)
        for s, env in enumerate(rollout.prompt_ids.tolist()):
            for i in range(offsets[s], offsets[s + 1]):
                steps[env].append((rollout.inputs.observations[i], output.values[i], None))
            steps[env][-1] = (*steps[env][-1][:2], (rollout.final_observations[s], after[s]))
    for got in steps.values():  # the plain loop: one step after the other, the memory zero where an episode begins
        state = torch.zeros(1, policy.state_size)
        for observation, value, final in got:
            if observation[1] == 0.0:
                state = torch.zeros(1, policy.state_size)
            _, expected, state = policy.parameters_and_values(observation[None], 1, state)
            torch.testing.assert_close(value[None], expected, rtol=1e-4, atol=1e-5)
            if final is not None:
                _, expected, _ = policy.parameters_and_values(final[0][None], 1, state)
                torch.testing.assert_close(final[1][None], expected, rtol=1e-4, atol=1e-5)


def test_minibatches_of_segments_say_what_the_whole_says():
    collector, policy = collector_of("tests.toy_envs:Counter", memory=6, num_steps=9)
    inputs = collector.collect(0).inputs
    whole = policy.evaluate(inputs)
    items = torch.tensor([2, 0, 3])
    some = policy.evaluate(inputs.select(items))
    lengths, starts = inputs.offsets.diff(), inputs.offsets[:-1]
    where = torch.cat([torch.arange(int(starts[i]), int(starts[i] + lengths[i])) for i in items])
    torch.testing.assert_close(some.values, whole.values[where], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(some.logprobs, whole.logprobs[where], rtol=1e-4, atol=1e-6)


def test_envpools_final_observation_is_the_one_before_its_reset():
    pytest.importorskip("envpool")
    collector, _ = collector_of("Pendulum-v1", backend=EnvPool(threads=1), num_envs=2, num_steps=250)
    rollout = collector.collect(0)
    assert isinstance(rollout.inputs, Steps)
    cut = torch.nonzero(rollout.ended).squeeze(1)
    assert len(cut) == 2 and not bool(rollout.terminated.any())  # a time limit of 200 steps
    assert len(rollout.step_rewards) == 2 * 249  # one dummy each
    assert rollout.episode_lengths.tolist() == [200, 200]
    before = rollout.inputs.observations[rollout.offsets[1:][cut] - 1]
    final = rollout.final_observations[cut]
    angle = [torch.atan2(x[:, 1], x[:, 0]) for x in (before, final)]
    moved = torch.atan2((angle[1] - angle[0]).sin(), (angle[1] - angle[0]).cos())
    torch.testing.assert_close(moved, 0.05 * final[:, 2], rtol=1e-3, atol=1e-3)  # Pendulum's own step


@pytest.mark.parametrize(
    "how, said",
    [
        ("nan observation", r"showed nan in entry 1 of the observation of environment 0, in step 5 of update 1"),
        ("nan reward", r"gave the reward nan in environment 0, in step 5 of update 1"),
        ("raise", r"failed in step 5 of the vector environment: ValueError: the robot left the table"),
    ],
)
def test_broken_environments_are_named(how, said):
    collector, _ = collector_of("tests.toy_envs:Broken", how=how, num_steps=8)
    with pytest.raises(HeelerError, match=said):
        collector.collect(0)


def test_an_environment_that_cannot_start_is_named():
    with pytest.raises(HeelerError, match="failed in reset: RuntimeError: the level file is missing"):
        collector_of("tests.toy_envs:Broken", how="reset")[0].collect(0)


@pytest.mark.parametrize("how, said", [("raise", "the robot left the table"), ("die", "a worker process died")])
def test_a_worker_that_raises_or_dies_is_named(how, said):
    collector, _ = collector_of("tests.toy_envs:Broken", how=how, num_steps=8, backend=Async())
    with pytest.raises(HeelerError, match=said):
        collector.collect(0)
    collector.env.close()


def test_a_mask_that_forbids_everything_is_named():
    collector, _ = collector_of("tests.toy_envs:Masked", forbid_all=True, num_steps=8)
    with pytest.raises(HeelerError, match="forbids every action"):
        collector.collect(0)


class LateMask(Masked):
    """Gives its mask in step only."""

    def reset(self, *, seed=None, options=None):
        observation, _ = super().reset(seed=seed)
        self.mask[:] = 1
        return observation, {}


class NoMoveLeft(Masked):
    """At the end of an episode nothing is allowed any more."""

    def _show(self):
        observation, info = super()._show()
        if self.t >= 6:
            info = {"action_mask": np.zeros(4, np.int8)}
        return observation, info


class Nested(gym.Env):
    """A dict in a dict, and a tuple."""

    observation_space = gym.spaces.Dict({
        "a": gym.spaces.Dict({"x": gym.spaces.Box(-9, 9, (1,), np.float32)}),
        "b": gym.spaces.Tuple([gym.spaces.Discrete(3), gym.spaces.Box(-9, 9, (2,), np.float32)]),
    })  # fmt: skip
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._look(), {}

    def _look(self):
        return {"a": {"x": np.full(1, self.t, np.float32)}, "b": (self.t % 3, np.full(2, -self.t, np.float32))}

    def step(self, action):
        self.t += 1
        return self._look(), 1.0, False, self.t >= 4, {}


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("backend", MODES, ids=str)
def test_final_observations_are_right_where_an_environment_reuses_its_arrays(backend, as_dict):
    """Gymnasium keeps a reference to the last observation, and resets in the same step."""
    collector, _ = collector_of("tests.toy_envs:Reuses", backend=backend, num_steps=9, as_dict=as_dict)
    try:
        rollout = collector.collect(0)
    finally:
        collector.env.close()
    cut = torch.nonzero(rollout.ended).squeeze(1)
    assert len(cut) == 2 and (rollout.final_observations[cut] == 5.0).all()
    assert rollout.inputs.observations[:5, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("backend", MODES[:2], ids=str)
def test_a_mask_that_is_missing_in_a_step_is_noticed(backend):
    collector, _ = collector_of("tests.toy_envs:Forgetful", backend=backend, num_steps=8)
    said = r"Forgetful gave no action mask in environment 0, step 2 .*: give one with every reset and every step"
    with pytest.raises(HeelerError, match=said):
        collector.collect(0)


def test_masks_must_come_with_reset_too():
    collector, _ = collector_of(f"{__name__}:LateMask", num_steps=8)
    with pytest.raises(HeelerError, match="gives action masks in step, but gave none in reset"):
        collector.collect(0)


@pytest.mark.parametrize("backend", MODES[:2], ids=str)
def test_an_episode_may_end_where_nothing_is_allowed(backend):
    collector, policy = collector_of(f"{__name__}:NoMoveLeft", backend=backend, num_steps=30)
    rollout = collector.collect(0)
    torch.testing.assert_close(
        rollout.behavior_logprobs, policy.evaluate(rollout.inputs).logprobs, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("backend", MODES, ids=str)
def test_nested_observations_arrive_whole_at_the_end_of_an_episode(backend):
    collector, _ = collector_of(f"{__name__}:Nested", backend=backend, num_steps=9)
    try:
        rollout = collector.collect(0)
    finally:
        collector.env.close()
    cut = torch.nonzero(rollout.ended).squeeze(1)
    assert len(cut) >= 2 and not bool(rollout.terminated.any())
    final = rollout.final_observations[cut]
    expected = torch.tensor([4.0, 0.0, 1.0, 0.0, -4.0, -4.0]).expand(len(cut), -1)  # step 4, and 4 % 3 as one-hot
    torch.testing.assert_close(final, expected)


# state-dependent exploration --------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0, 4])
def test_state_dependent_noise_is_a_function_of_the_features_for_some_steps(memory):
    """In an environment that always shows the same, the offset from the mean stays until another function is drawn."""
    collector, policy = collector_of(
        "tests.toy_envs:Still",
        num_envs=3,
        num_steps=12,
        memory=memory,
        log_std=-1.0,
        exploration=StateDependent(every=4),
    )
    rollout = collector.collect(0)
    assert policy.log_std is not None and policy.log_std.shape == (policy.actor.num_features, 2)
    output = policy.evaluate(rollout.inputs)
    torch.testing.assert_close(rollout.behavior_logprobs, output.logprobs, rtol=1e-5, atol=1e-5)
    if memory:
        return  # the features change with the memory
    means = policy.parameters_and_values(rollout.inputs.observations)[0][:, :2]
    offsets = (rollout.actions - means).detach().view(3, 3, 4, 2)  # environment, function, step, action
    torch.testing.assert_close(offsets, offsets[:, :, :1].expand_as(offsets), rtol=1e-4, atol=1e-5)
    assert len(offsets[:, :, 0].reshape(-1, 2).unique(dim=0)) == 9
    again, _ = collector_of(
        "tests.toy_envs:Still", num_envs=3, num_steps=12, log_std=-1.0, exploration=StateDependent(every=4)
    )
    assert torch.equal(again.collect(0).actions, rollout.actions)
    assert not torch.equal(again.collect(1).actions, rollout.actions)


def test_one_function_of_the_features_lasts_a_rollout_where_nothing_is_said():
    collector, _ = collector_of("tests.toy_envs:Still", num_envs=2, num_steps=9, exploration=StateDependent())
    rollout = collector.collect(0)
    assert len(rollout.actions.view(2, 9, 2).flatten(0, 1).unique(dim=0)) == 2


def test_the_numpy_actor_says_the_same_with_state_dependent_noise():
    collector, policy = collector_of("Pendulum-v1", num_envs=3, log_std=-0.7, exploration=StateDependent())
    assert isinstance(collector.actor, NumpyActor)
    observations = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    other = TorchActor()
    other.publish(policy)
    for mine, its in zip(collector.actor.act(observations, None)[:2], other.act(observations, None)[:2], strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-6)

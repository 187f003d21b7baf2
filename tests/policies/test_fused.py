"""The fused update of small MLPs against its slow twin, autograd."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heeler.policies.actor_critic import ActorCritic
from heeler.policies.fused import FlatAdam
from heeler.policies.networks import MLP
from heeler.policies.steps import Steps
from heeler.ppo.update import PPOConfig, autograd_gradients, update
from heeler.runtime.passes import PassBudget
from heeler.runtime.reduce import LocalReduce
from heeler.types import ActionSpec, ObservationSpec, TrainBatch

BOX = ActionSpec(kind="box", sizes=(1, 1, 1), shape=(3,), low=(-1.0,) * 3, high=(1.0,) * 3)
DISCRETE = ActionSpec(kind="discrete", sizes=(4,))


def make(actions, activation="tanh", seed=0, fused=False):
    torch.manual_seed(seed)
    policy = ActorCritic(ObservationSpec(vector=5), actions, MLP(hidden=(16, 8), activation=activation), log_std=-0.3)
    with torch.no_grad():  # heads that are not nearly zero, and biases that are not zero
        for parameter in policy.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    if fused:
        assert policy.fuse()
    return policy


def batch_of(actions, n, seed, masked=False):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, 7, generator=g)
    rows[:, 0] = rows[:, 0] - 3.0
    rows[:, 4:6] = torch.rand(n, 2, generator=g)
    rows[::5, 4] = 0.0
    rows[:, 6] = rows[:, 6].abs()
    observations = torch.randn(n, 5, generator=g)
    if actions.kind == "box":
        chosen = torch.randn(n, 3, generator=g)
    else:
        chosen = torch.randint(0, 4, (n,), generator=g)
    masks = None
    if masked:
        masks = torch.rand(n, 4, generator=g) > 0.5
        masks[torch.arange(n), chosen] = True
    return Steps(observations=observations, actions=chosen, masks=masks), rows


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("actions, masked", [(BOX, False), (DISCRETE, False), (DISCRETE, True)])
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 40),
    seed=st.integers(0, 1000),
    value_clip=st.sampled_from([None, 0.1]),
    entropy_coef=st.sampled_from([0.0, 0.05]),
    high=st.sampled_from([None, 0.4]),
)
def test_gradients_are_those_of_autograd(actions, masked, activation, n, seed, value_clip, entropy_coef, high):
    config = PPOConfig(value_clip=value_clip, entropy_coef=entropy_coef, clip_range_high=high, value_coef=0.7)
    inputs, rows = batch_of(actions, n, seed, masked)
    plain, fused = make(actions, activation), make(actions, activation, fused=True)
    expected_loss, expected = autograd_gradients(plain, inputs, rows, 3.0, 5.0, config)
    loss, said = fused.ppo_gradients(inputs, rows, 3.0, 5.0, config)
    assert loss == pytest.approx(expected_loss, rel=1e-4, abs=1e-4)
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)
    order = [*plain.actor.parameters(), *plain.action_head.parameters()]
    order += [*plain.critic.parameters(), *plain.value_head.parameters()]
    if plain.log_std is not None:
        order.append(plain.log_std)
    flat = torch.cat([p.grad.flatten() for p in order])
    torch.testing.assert_close(fused.fused.flat.grad, flat, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("actions", [BOX, DISCRETE])
def test_a_whole_update_gives_the_same_weights_and_metrics(actions):
    inputs, rows = batch_of(actions, 64, 3)
    config = PPOConfig(epochs=3, minibatches=4, max_grad_norm=0.5, ratio_tolerance=1e9, token_budget=8)
    results = []
    for fused in (False, True):
        policy = make(actions, fused=fused)
        groups = [{"params": policy.trained(), "name": "policy"}]
        optimizer = FlatAdam(groups, 1e-2, 1e-5) if fused else torch.optim.Adam(groups, 1e-2, eps=1e-5)
        columns = dict(
            zip(
                ("old_logprobs", "old_values", "advantages", "returns", "policy_weights", "value_weights"),
                rows.unbind(1),
                strict=False,
            )
        )
        batch = TrainBatch(inputs=inputs, importance_weights=torch.ones(64), **columns)
        metrics = update(
            policy,
            optimizer,
            batch,
            config,
            generator=torch.Generator().manual_seed(0),
            reduce=LocalReduce(),
            passes=PassBudget(65536),
        )
        results.append((metrics, {k: v.clone() for k, v in policy.state_dict().items()}))
    (plain_metrics, plain_weights), (metrics, weights) = results
    assert metrics == pytest.approx(plain_metrics, rel=1e-3, abs=1e-4)
    for name, expected in plain_weights.items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=1e-4)


def test_flat_adam_is_torchs_adam_and_shares_its_state():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Parameter(torch.randn(50)), torch.nn.Parameter(torch.zeros(50))
    with torch.no_grad():
        theirs.copy_(ours)
    flat, adam = FlatAdam([{"params": [ours]}], 1e-2, 1e-5), torch.optim.Adam([theirs], 1e-2, eps=1e-5)
    for step in range(20):
        gradient = torch.randn(50)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        flat.step()
        adam.step()
        if step == 9:  # a checkpoint of one continues in the other
            state = copy.deepcopy(adam.state_dict())
            flat.load_state_dict({**flat.state_dict(), "state": state["state"]})
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_modules_see_what_the_optimiser_does_to_the_flat_vector():
    policy = make(DISCRETE, fused=True)
    before = policy.action_head.weight.clone()
    with torch.no_grad():
        policy.fused.flat += 1.0
    torch.testing.assert_close(policy.action_head.weight, before + 1.0)
    state = {k: v.clone() for k, v in policy.state_dict().items()}
    other = make(DISCRETE, seed=9, fused=True)
    other.load_state_dict(state)
    observations = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32))
    inputs = Steps(observations=observations, actions=torch.tensor([0, 1, 2]))
    torch.testing.assert_close(other.evaluate(inputs).values, policy.evaluate(inputs).values)
    said = other.ppo_gradients(inputs, torch.ones(3, 7), 1.0, 1.0, PPOConfig())[1]
    torch.testing.assert_close(said[0], policy.evaluate(inputs).logprobs)

"""Action distributions against torch.distributions, and draws against their probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import distributions as reference

from heeler.policies.actor_critic import ActorCritic
from heeler.policies.distributions import (
    FeatureNoise,
    StateDependent,
    check_masks,
    draw,
    draw_noise,
    logprobs_and_entropy,
)
from heeler.policies.networks import MLP
from heeler.types import ActionSpec, HeelerError, ObservationSpec

SIZES = {"discrete": (4,), "multi_discrete": (2, 3), "multi_binary": (1, 1, 1), "box": (1, 1)}


def drawn(kind, n, seed=0, masks=None, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    parameters = spread * torch.randn(n, sum(SIZES[kind]), generator=g)
    noise = draw_noise(kind, np.random.default_rng(seed), (n, sum(SIZES[kind])))
    std = np.array([0.5, 2.0], np.float32) if kind == "box" else None
    mask_array = None if masks is None else masks.numpy()
    return parameters, torch.as_tensor(draw(kind, SIZES[kind], parameters.numpy(), noise, std, mask_array))


@pytest.mark.parametrize("kind", SIZES)
def test_logprobs_and_entropies_are_those_of_torch(kind):
    parameters, actions = drawn(kind, 50)
    log_std = torch.tensor([0.5, 2.0]).log() if kind == "box" else None
    logprobs, entropy = logprobs_and_entropy(kind, SIZES[kind], parameters, log_std, actions, None)
    if kind == "box":
        twin = reference.Independent(reference.Normal(parameters, log_std.exp()), 1)
        expected, expected_entropy = twin.log_prob(actions), twin.entropy()
    elif kind == "multi_binary":
        twin = reference.Independent(reference.Bernoulli(logits=parameters), 1)
        expected, expected_entropy = twin.log_prob(actions.float()), twin.entropy()
    else:
        parts = [reference.Categorical(logits=p) for p in parameters.split(SIZES[kind], dim=1)]
        columns = actions[:, None] if kind == "discrete" else actions
        expected = sum(p.log_prob(columns[:, i]) for i, p in enumerate(parts))
        expected_entropy = sum(p.entropy() for p in parts)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["discrete", "multi_binary"])
def test_draws_follow_the_probabilities(kind):
    n = 20_000
    one = torch.tensor([[0.3, -1.0, 1.2, 0.0][: sum(SIZES[kind])]])
    noise = draw_noise(kind, np.random.default_rng(1), (n, one.shape[1]))
    actions = draw(kind, SIZES[kind], one.repeat(n, 1).numpy(), noise, None, None)
    if kind == "discrete":
        share, expected = np.bincount(actions, minlength=4) / n, one[0].softmax(0).numpy()
    else:
        share, expected = actions.mean(0), one[0].sigmoid().numpy()
    np.testing.assert_allclose(share, expected, atol=0.015)  # four standard errors


def test_forbidden_actions_are_never_drawn_and_have_no_probability():
    masks = torch.rand(400, 5, generator=torch.Generator().manual_seed(2)) > 0.5
    masks[:, 0] |= ~masks[:, :2].any(1)
    masks[:, 2] |= ~masks[:, 2:].any(1)
    parameters, actions = drawn("multi_discrete", 400, masks=masks, spread=3.0)
    assert bool(masks[torch.arange(400), actions[:, 0]].all())
    assert bool(masks[torch.arange(400), 2 + actions[:, 1]].all())
    logprobs, entropy = logprobs_and_entropy("multi_discrete", (2, 3), parameters, None, actions, masks)
    free = [
        p.masked_fill(~m, -torch.inf) for p, m in zip(parameters.split([2, 3], 1), masks.split([2, 3], 1), strict=True)
    ]
    expected = sum(p.log_softmax(1).gather(1, actions[:, i, None]).squeeze(1) for i, p in enumerate(free))
    torch.testing.assert_close(logprobs, expected)
    assert bool(torch.isfinite(entropy).all()) and bool((entropy >= -1e-6).all())
    alone = masks.sum(1) == 2  # one choice in each component: nothing is left to chance
    assert bool(alone.any()) and float(entropy[alone].abs().max()) < 1e-5


def test_a_mask_leaves_no_gradient_on_forbidden_logits():
    parameters = torch.randn(6, 4, requires_grad=True)
    masks = torch.ones(6, 4, dtype=torch.bool)
    masks[:, 1] = False
    logprobs, entropy = logprobs_and_entropy(
        "discrete", (4,), parameters, None, torch.zeros(6, dtype=torch.int64), masks
    )
    (logprobs.sum() + entropy.sum()).backward()
    assert float(parameters.grad[:, 1].abs().max()) == 0.0 and float(parameters.grad[:, 0].abs().min()) > 0.0


def test_the_most_likely_action_needs_no_noise():
    parameters = np.array([[0.1, 2.0, -1.0]], np.float32)
    assert draw("discrete", (3,), parameters, None, None, None).tolist() == [1]
    assert draw("discrete", (3,), parameters, None, None, np.array([[True, False, True]])).tolist() == [0]
    assert draw("box", (1, 1, 1), parameters, None, np.ones(3), None).tolist() == parameters.tolist()
    assert draw("multi_binary", (1, 1, 1), parameters, None, None, None).tolist() == [[1, 1, 0]]


def test_a_mask_that_forbids_everything_is_named():
    check_masks(np.array([[True, False, True, False, False]]), (2, 3), "Maze")
    with pytest.raises(HeelerError, match="mask of Maze, environment 1, forbids every action of component 1"):
        check_masks(np.array([[True, False, True, False, False], [True, True, False, False, False]]), (2, 3), "Maze")


# state-dependent exploration [2005.05719] -------------------------------------------------------------------------


def state_dependent_policy():
    torch.manual_seed(0)
    actions = ActionSpec(kind="box", sizes=(1, 1), shape=(2,), low=(-1.0,) * 2, high=(1.0,) * 2, dtype="float32")
    policy = ActorCritic(
        ObservationSpec(vector=3), actions, MLP(hidden=(8,)), log_std=-0.5, exploration=StateDependent()
    )
    with torch.no_grad():
        policy.log_std += 0.3 * torch.randn(8, 2)
    return policy


def test_the_variance_of_state_dependent_noise_is_that_of_a_random_linear_map():
    """Draws of mean + z theta, theta ~ N(0, sigma^2), by hand, against the parameters that the policy states."""
    policy = state_dependent_policy()
    observations = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    z = policy.actor(observations).detach()
    theta = policy.log_std.exp() * torch.randn(20_000, 8, 2, generator=torch.Generator().manual_seed(2))
    offsets = torch.einsum("nf,kfa->kna", z, theta.detach())
    parameters, _, _ = policy.parameters_and_values(observations)
    means, log_std = parameters.split(2, dim=1)
    torch.testing.assert_close(means, policy.action_head(z))
    torch.testing.assert_close(offsets.std(0), log_std.exp(), rtol=0.03, atol=0.0)  # six standard errors
    actions = means + 0.4
    twin = reference.Independent(reference.Normal(means, log_std.exp()), 1)
    logprobs, entropy = policy.distribution(parameters, actions, None)
    torch.testing.assert_close(logprobs, twin.log_prob(actions))
    torch.testing.assert_close(entropy, twin.entropy())


def test_the_size_of_state_dependent_noise_is_learned_by_its_weights_alone():
    policy = state_dependent_policy()
    parameters, _, _ = policy.parameters_and_values(torch.randn(5, 3))
    parameters[:, 2:].sum().backward()
    assert policy.log_std.grad is not None and float(policy.log_std.grad.min()) > 0.0
    assert all(p.grad is None or not p.grad.any() for p in policy.actor.parameters())


def test_state_dependent_noise_is_standard_normal():
    """Over many environments, whatever the features: so it may take the place of the independent noise."""
    policy, n = state_dependent_policy(), 20_000
    z = policy.actor(torch.randn(1, 3, generator=torch.Generator().manual_seed(3))).detach().expand(n, -1)
    parameters = policy.parameters_of(z).detach().numpy()
    noise = FeatureNoise(np.random.default_rng(4), policy.log_std.detach().exp().numpy(), n, 0)
    drawn = noise(0, parameters, z.numpy())
    np.testing.assert_allclose(drawn.mean(0), 0.0, atol=0.03)
    np.testing.assert_allclose(np.cov(drawn.T), np.eye(2), atol=0.05)
    np.testing.assert_array_equal(noise(1, parameters, z.numpy()), drawn)
    actions = draw("box", (1, 1), parameters, drawn, None, None)
    np.testing.assert_allclose(actions, parameters[:, :2] + np.exp(parameters[:, 2:]) * drawn, rtol=1e-6)
    np.testing.assert_array_equal(draw("box", (1, 1), parameters, None, None, None), parameters[:, :2])


def test_discrete_actions_have_no_state_dependent_noise():
    actions = ActionSpec(kind="discrete", sizes=(3,), start=(0,))
    with pytest.raises(HeelerError, match="is for continuous actions, not for discrete ones"):
        ActorCritic(ObservationSpec(vector=3), actions, MLP(hidden=(8,)), exploration=StateDependent())

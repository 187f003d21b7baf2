"""What popular write-ups of PPO get wrong, one test each: the wrong lines fail, Heeler's functions do not.

The same snippets stand in docs/algorithm.md#what-popular-write-ups-get-wrong. The last tests hold the numbers of
the worked examples on that page, so that page and code cannot drift apart.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heeler.ppo.advantages import gae
from heeler.ppo.kl import AdaptiveKL, KLEstimator, kl_estimate, next_kl_coef
from heeler.ppo.losses import clipped_surrogate, is_clipped, ratio, value_loss

EPS = 0.2


def taken_logprobs(preferences: Tensor, actions: Tensor) -> Tensor:
    """Log-probability of each action taken: `preferences [n, V]`, `actions [n]` -> `[n]`."""
    return torch.log_softmax(preferences, -1).gather(-1, actions[:, None])[:, 0]


def surrogate_gradient(preferences: Tensor, actions: Tensor, advantages: Tensor) -> Tensor:
    """Gradient of the mean of `clipped_surrogate` at pi_new = pi_old, `[n, V]`."""
    preferences = preferences.detach().requires_grad_()
    logprobs = taken_logprobs(preferences, actions)
    clipped_surrogate(logprobs, logprobs.detach(), advantages, EPS, EPS).mean().backward()
    assert preferences.grad is not None
    return preferences.grad


def test_detached_ratio_trains_nothing() -> None:
    preferences = torch.tensor([[0.5, -0.2, 0.1]], requires_grad=True)
    actions, advantages = torch.tensor([1]), torch.tensor([1.0])
    logprobs = taken_logprobs(preferences, actions)
    old_logprobs = logprobs.detach()

    r = (logprobs.detach() - old_logprobs).exp()
    wrong = -torch.minimum(r * advantages, r.clamp(1 - EPS, 1 + EPS) * advantages).mean()
    assert not wrong.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        wrong.backward()

    value = torch.tensor(0.0, requires_grad=True)  # a critic in the same loss hides the error
    (wrong + (value - 1) ** 2).backward()
    assert value.grad is not None and preferences.grad is None

    right = clipped_surrogate(logprobs, old_logprobs, advantages, EPS, EPS).mean()
    right.backward()
    assert preferences.grad is not None and preferences.grad[0, 1] < 0  # descent raises the taken action


def test_plain_policy_gradient_is_ppo_at_the_old_policy_only() -> None:
    actions, old_preferences = torch.tensor([0, 2]), torch.tensor([[0.5, -0.2, 0.1], [0.0, 0.3, -0.4]])
    advantages = torch.tensor([1.0, -2.0])

    preferences = old_preferences.clone().requires_grad_()
    (-(advantages * taken_logprobs(preferences, actions))).mean().backward()
    torch.testing.assert_close(preferences.grad, surrogate_gradient(old_preferences, actions, advantages))

    # away from the old policy they part: here both decisions lie beyond the clip, so PPO leaves them alone
    old_logprobs = taken_logprobs(old_preferences, actions)
    logprobs = (old_logprobs + torch.tensor([1.5, 0.5]).log()).requires_grad_()
    wrong = torch.autograd.grad(-(advantages * logprobs).sum(), logprobs)[0]
    right = torch.autograd.grad(clipped_surrogate(logprobs, old_logprobs, advantages, EPS, EPS).sum(), logprobs)[0]
    torch.testing.assert_close(wrong, -advantages)
    torch.testing.assert_close(right, torch.zeros(2))
    assert is_clipped(logprobs, old_logprobs, advantages, EPS, EPS).all()


def test_plain_policy_gradient_runs_away_on_a_reused_batch() -> None:
    def final_ratio(clipped: bool) -> float:
        preferences = torch.zeros(1, 3, requires_grad=True)
        actions, advantages = torch.tensor([0]), torch.tensor([-1.0])
        old_logprobs = taken_logprobs(preferences, actions).detach()
        for _ in range(100):
            logprobs = taken_logprobs(preferences, actions)
            terms = -advantages * logprobs
            if clipped:
                terms = clipped_surrogate(logprobs, old_logprobs, advantages, EPS, EPS)
            (gradient,) = torch.autograd.grad(terms.sum(), preferences)
            preferences = (preferences - 0.1 * gradient).detach().requires_grad_()
        return float(ratio(taken_logprobs(preferences, actions), old_logprobs).detach()[0])

    assert final_ratio(clipped=False) == pytest.approx(7.8e-7, rel=0.05)
    assert final_ratio(clipped=True) == pytest.approx(0.765, abs=0.001)


def test_softmax_of_itself_is_uniform_whatever_the_network_says() -> None:
    pi = torch.softmax(torch.tensor([8.0, 1.0, 0.0, -2.0, 3.0]), -1)
    for _ in range(100):  # the equation pi = softmax(pi / alpha), solved by iteration
        pi = torch.softmax(pi / 1.0, -1)
    torch.testing.assert_close(pi, torch.full((5,), 0.2))

    # as code it is one softmax too many, which caps every probability
    preferences = torch.tensor([50.0, 0.0, 0.0, 0.0, 0.0])
    twice = torch.softmax(torch.softmax(preferences, -1), -1)
    assert twice.max() <= math.e / (math.e + 4) + 1e-6
    assert torch.softmax(preferences, -1).max() > 0.999

    # Boltzmann policy over preferences h: at the same temperature on both sides the ratio starts at 1
    alpha, actions = 0.7, torch.tensor([0, 1, 2])
    h = torch.tensor([[2.0, 0.0, -1.0]]).expand(3, 3)
    logprobs = taken_logprobs(h / alpha, actions)
    torch.testing.assert_close(ratio(logprobs, taken_logprobs(h / alpha, actions)), torch.ones(3))
    forgotten = ratio(taken_logprobs(h, actions), logprobs)  # alpha on one side only
    torch.testing.assert_close(forgotten, torch.tensor([0.904, 2.130, 3.270]), rtol=0, atol=1e-3)


def test_tanh_outputs_are_no_probabilities() -> None:
    outputs = torch.tensor([1.2, -0.3, 0.4])
    wrong = torch.tanh(outputs)
    torch.testing.assert_close(wrong, torch.tensor([0.834, -0.291, 0.380]), rtol=0, atol=1e-3)
    assert float(wrong.sum()) == pytest.approx(0.922, abs=1e-3)
    with pytest.raises(RuntimeError):
        torch.multinomial(wrong, 1)
    with pytest.raises(ValueError):
        torch.distributions.Categorical(probs=wrong, validate_args=True)  # torch's compiler turns this off where loaded
    assert ratio(wrong.log(), wrong.log()).isnan().any()

    log_pi = torch.log_softmax(outputs, -1)
    assert log_pi.isfinite().all()
    torch.testing.assert_close(log_pi.exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(ratio(log_pi, log_pi), torch.ones(3))

    # all positive: Categorical divides by the sum in silence, so the loss reads another distribution's logarithm
    positive = torch.tanh(torch.tensor([1.2, 0.3, 0.4]))
    sampled_from = torch.distributions.Categorical(probs=positive).logits
    assert (ratio(positive.log(), sampled_from) - 1).abs().max() > 0.1


def test_logprobs_of_all_actions_forget_which_one_was_taken() -> None:
    def wrong_gradient(preferences: Tensor, actions: Tensor, advantages: Tensor) -> Tensor:
        preferences = preferences.detach().requires_grad_()
        logprobs = torch.log_softmax(preferences, -1)  # [n, V]: `actions` is never read
        clipped_surrogate(logprobs, logprobs.detach(), advantages[:, None], EPS, EPS).mean().backward()
        assert preferences.grad is not None
        return preferences.grad

    preferences, advantages = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([1.0])
    wrong = [wrong_gradient(preferences, torch.tensor([a]), advantages) for a in range(3)]
    torch.testing.assert_close(wrong[0], wrong[1])
    torch.testing.assert_close(wrong[0], wrong[2])
    torch.testing.assert_close(wrong[0], torch.softmax(preferences, -1) - 1 / 3)  # it only flattens the policy
    torch.testing.assert_close(wrong[0], torch.tensor([[0.511, -0.219, -0.291]]), rtol=0, atol=1e-3)

    for a in range(3):
        right = surrogate_gradient(preferences, torch.tensor([a]), advantages)
        torch.testing.assert_close(right, torch.softmax(preferences, -1) - torch.eye(3)[a])


def test_numbers_of_the_gae_example() -> None:
    rewards, values = torch.tensor([-0.02, 0.01, -0.03, 0.99]), torch.tensor([0.4, 0.5, 0.7, 0.6])
    offsets = torch.tensor([0, 4])

    def check(rewards: Tensor, bootstrap: float, lam: float, expected: list[float]) -> None:
        result = gae(rewards, values, torch.tensor([bootstrap]), offsets, 1.0, lam)
        torch.testing.assert_close(result, torch.tensor(expected), rtol=0, atol=1e-6)

    check(rewards, 0.0, 0.0, [0.08, 0.21, -0.13, 0.39])  # lambda 0: the TD errors
    check(rewards, 0.0, 0.5, [0.20125, 0.2425, 0.065, 0.39])
    check(rewards, 0.0, 1.0, [0.55, 0.47, 0.26, 0.39])
    withheld = rewards - torch.tensor([0.0, 0.0, 0.0, 1.0])
    check(withheld, 0.8, 0.5, [0.17625, 0.1925, -0.035, 0.19])


def test_numbers_of_the_clip_table() -> None:
    r = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.0, 1.0])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -1.0])
    logprobs = r.log().requires_grad_()
    losses = clipped_surrogate(logprobs, torch.zeros(6), advantages, EPS, EPS)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    torch.testing.assert_close(losses.detach(), torch.tensor([-1.2, -0.5, 1.5, 0.8, -1.0, 1.0]))
    torch.testing.assert_close(gradient, torch.tensor([0.0, -0.5, 1.5, 0.0, -1.0, 1.0]))


def test_numbers_of_the_kl_example() -> None:
    preferences = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    ref_logprobs = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    logprobs = torch.log_softmax(preferences, -1)
    pi = logprobs.exp().detach()
    (true_gradient,) = torch.autograd.grad(
        (logprobs.exp() * (logprobs - ref_logprobs)).sum(), preferences, retain_graph=True
    )
    expected: dict[KLEstimator, tuple[float, float, list[float]]] = {
        "k1": (0.2662, 0.6515, [0.0, 0.0, 0.0]),
        "k2": (0.2476, 0.2079, [0.2826, -0.1408, -0.1418]),
        "k3": (0.2662, 0.3594, [0.3319, -0.0886, -0.2433]),
    }
    for estimator, (mean, std, gradient) in expected.items():
        estimates = kl_estimate(logprobs, ref_logprobs, estimator)
        (as_loss,) = torch.autograd.grad((pi * estimates).sum(), preferences, retain_graph=True)
        estimates = estimates.detach()
        assert float((pi * estimates).sum()) == pytest.approx(mean, abs=5e-5)
        assert float((pi * (estimates - (pi * estimates).sum()) ** 2).sum().sqrt()) == pytest.approx(std, abs=5e-5)
        torch.testing.assert_close(as_loss, torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=5e-5)
    x = kl_estimate(logprobs, ref_logprobs, "k1").detach()
    (in_reward,) = torch.autograd.grad((pi * x * logprobs).sum(), preferences)
    torch.testing.assert_close(in_reward, true_gradient)

    config = AdaptiveKL(coef=0.05, target=6.0, horizon=10_000.0)
    for sequence_kl, coef in ((9.0, 0.050064), (6.6, 0.050032), (3.0, 0.049936)):
        assert next_kl_coef(config, 0.05, sequence_kl, 64) == pytest.approx(coef, abs=1e-9)


def test_numbers_of_the_value_clip_example() -> None:
    values = torch.tensor([0.9, 0.1], requires_grad=True)
    losses = value_loss(values, torch.tensor([0.5, 0.5]), torch.tensor([1.0, 1.0]), 0.2)
    (gradient,) = torch.autograd.grad(losses.sum(), values)
    torch.testing.assert_close(losses.detach(), torch.tensor([0.045, 0.405]))
    torch.testing.assert_close(gradient, torch.tensor([0.0, -0.9]))

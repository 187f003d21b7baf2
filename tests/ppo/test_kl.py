"""KL estimators by arithmetic and in exact expectation over a tabular policy; the controllers of the penalty."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heeler.ppo.kl import AdaptiveKL, FixedKL, kl_estimate, next_kl_coef
from heeler.ppo.update import PPOConfig

from .toy import NUM_ACTIONS, NUM_STATES, TablePolicy, make_batch, make_inputs, updated

DOUBLE = torch.float64
logprobs = st.floats(-30, 0, width=32)


def kl_loop(new, ref, estimator):
    x = max(-20.0, min(new - ref, 20.0))
    return {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x}[estimator]


@given(st.lists(st.tuples(logprobs, logprobs), max_size=12), st.sampled_from(["k1", "k2", "k3"]))
def test_estimators_equal_their_plain_loop(rows, estimator):
    new, ref = (torch.tensor([row[i] for row in rows], dtype=DOUBLE) for i in range(2))
    expected = torch.tensor([kl_loop(*row, estimator) for row in rows], dtype=DOUBLE)
    torch.testing.assert_close(kl_estimate(new, ref, estimator), expected, rtol=1e-9, atol=1e-12)


@given(logprobs, logprobs)
def test_k3_is_never_negative(new, ref):
    assert float(kl_estimate(torch.tensor([new]), torch.tensor([ref]), "k3")) >= 0.0


def test_k3_keeps_its_digits_near_zero():
    """exp(-x) - 1 + x is about x^2 / 2, far below the rounding of 1 in float32."""
    x = torch.tensor([1e-4])
    assert float(kl_estimate(torch.zeros(1), -x, "k3")) == pytest.approx(5e-9, rel=0.01)


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


def two_distributions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=DOUBLE, requires_grad=True)
    ref = torch.randn(6, generator=generator, dtype=DOUBLE).log_softmax(-1)
    logp = logits.log_softmax(-1)
    return logits, logp, ref, (logp.exp() * (logp - ref)).sum()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_average_to_the_kl(estimator):
    _, logp, ref, kl = two_distributions()
    assert kl.item() > 0.1
    assert (logp.exp() * kl_estimate(logp, ref, estimator)).sum().item() == pytest.approx(kl.item(), rel=1e-12)


def test_k2_is_biased():
    _, logp, ref, kl = two_distributions()
    assert abs((logp.exp() * kl_estimate(logp, ref, "k2")).sum().item() / kl.item() - 1) > 0.01


def test_as_losses_k1_has_no_gradient_k2_the_right_one_and_k3_another():
    """The table of the module: the samples are fixed, only log pi is differentiated."""
    logits, logp, ref, kl = two_distributions()
    (right,) = torch.autograd.grad(kl, logits, retain_graph=True)
    gradients = {}
    for estimator in ("k1", "k2", "k3"):
        loss = (logp.exp().detach() * kl_estimate(logp, ref, estimator)).sum()
        (gradients[estimator],) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert float(right.abs().max()) > 0.05
    torch.testing.assert_close(gradients["k1"], torch.zeros_like(right), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients["k2"], right, rtol=1e-10, atol=1e-12)
    assert float((gradients["k3"] - right).abs().max()) > 0.01


def test_k1_in_the_reward_moves_the_policy_down_the_gradient_of_the_kl():
    """In exact expectation (every action once, weighted by its probability) an update with the advantages
    -beta * k1 is a step of -beta * grad KL(pi || ref)."""
    policy, beta = TablePolicy(), 0.3
    ref = TablePolicy(seed=9).logits.detach().log_softmax(-1)
    logp = policy.logits.log_softmax(-1)
    (gradient,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), policy.logits)
    flat = logp.detach().reshape(-1)
    size = NUM_STATES * NUM_ACTIONS
    states = [s for s in range(NUM_STATES) for _ in range(NUM_ACTIONS)]
    batch = replace(
        make_batch(policy, [1] * size),
        inputs=make_inputs([1] * size, states, list(range(NUM_ACTIONS)) * NUM_STATES),
        old_logprobs=flat,
        advantages=-beta * kl_estimate(flat, ref.reshape(-1), "k1"),
        policy_weights=flat.exp(),
        importance_weights=torch.ones(size, dtype=DOUBLE),
    )
    config = PPOConfig(value_coef=0.0, max_grad_norm=1e9, loss_denominator=1.0)
    after, _ = updated(policy, batch, config, lr=1.0)
    assert float(gradient.abs().max()) > 0.05
    torch.testing.assert_close(after.logits.detach() - policy.logits.detach(), -beta * gradient, rtol=1e-10, atol=1e-12)


ADAPTIVE = AdaptiveKL(coef=0.1, target=6.0, horizon=1000.0)


def test_the_adaptive_penalty_steers_toward_its_target():
    assert next_kl_coef(ADAPTIVE, 0.1, 6.6, 500) == pytest.approx(0.1 * 1.05)  # 10 % above, half a horizon
    assert next_kl_coef(ADAPTIVE, 0.1, 5.4, 500) == pytest.approx(0.1 * 0.95)
    assert next_kl_coef(ADAPTIVE, 0.1, 6.0, 500) == 0.1
    assert next_kl_coef(ADAPTIVE, 0.7, 6.6, 500) == pytest.approx(0.7 * 1.05)  # from where it is, not where it began


@pytest.mark.parametrize(("sequence_kl", "factor"), [(600.0, 1.2), (7.2, 1.2), (4.8, 0.8), (0.0, 0.8), (-3.0, 0.8)])
def test_the_adaptive_penalty_moves_at_most_a_fifth_a_horizon(sequence_kl, factor):
    assert next_kl_coef(ADAPTIVE, 0.1, sequence_kl, 1000) == pytest.approx(0.1 * factor)


@pytest.mark.parametrize("horizons", [2, 3, 10])
def test_many_horizons_of_episodes_at_once_halve_the_penalty_at_most(horizons):
    """Unbounded, 20 % a horizon would make it 0 after five and negative after more."""
    expected = max(1 - 0.2 * horizons, 0.5)
    assert next_kl_coef(ADAPTIVE, 0.1, 0.0, 1000 * horizons) == pytest.approx(0.1 * expected)


def test_the_fixed_penalty_stays():
    assert next_kl_coef(FixedKL(coef=0.05), 0.05, 600.0, 1000) == 0.05

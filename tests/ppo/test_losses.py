"""The objectives against plain arithmetic, and the gradients they promise."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from heeler.ppo.losses import clipped_surrogate, is_clipped, ratio, value_loss

DOUBLE = torch.float64
logprobs = st.floats(-6, 0, width=32)
reals = st.floats(-5, 5, width=32)
clips = st.floats(0.015625, 0.875, width=16)


def clamp(x, low, high):
    return max(low, min(x, high))


def surrogate_loop(new, old, advantages, low, high):
    losses = []
    for n, o, a in zip(new, old, advantages, strict=True):
        r = math.exp(clamp(n - o, -20, 20))
        losses.append(-min(r * a, clamp(r, 1 - low, 1 + high) * a))
    return losses


def value_loss_loop(values, old_values, returns, clip):
    losses = []
    for v, old, target in zip(values, old_values, returns, strict=True):
        errors = [(v - target) ** 2]
        if clip is not None:
            errors.append((old + clamp(v - old, -clip, clip) - target) ** 2)
        losses.append(max(errors) / 2)
    return losses


def double(x):
    return torch.tensor(x, dtype=DOUBLE)


def columns(rows):
    return [double([row[i] for row in rows]) for i in range(3)]


@given(st.lists(st.tuples(logprobs, logprobs, reals), max_size=12), clips, clips)
def test_clipped_surrogate_equals_its_plain_loop(rows, low, high):
    new, old, advantages = columns(rows)
    expected = surrogate_loop(new.tolist(), old.tolist(), advantages.tolist(), low, high)
    torch.testing.assert_close(clipped_surrogate(new, old, advantages, low, high), double(expected))


@given(st.lists(st.tuples(reals, reals, reals), max_size=12), st.none() | clips)
def test_value_loss_equals_its_plain_loop(rows, clip):
    values, old_values, returns = columns(rows)
    expected = value_loss_loop(values.tolist(), old_values.tolist(), returns.tolist(), clip)
    torch.testing.assert_close(value_loss(values, old_values, returns, clip), double(expected))


@pytest.mark.parametrize(
    ("r", "advantage", "loss"),
    [
        (1.0, 2.0, -2.0),
        (1.5, 2.0, -2.6),  # rewarded enough: held at 1 + 0.3
        (0.5, 2.0, -1.0),  # went the wrong way: not clipped, it may come back
        (0.5, -2.0, 1.6),  # punished enough: held at 1 - 0.2
        (1.5, -2.0, 3.0),  # went the wrong way
    ],
)
def test_clipped_surrogate_by_hand(r, advantage, loss):
    result = clipped_surrogate(double([math.log(r)]), double([0.0]), double([advantage]), 0.2, 0.3)
    assert float(result) == pytest.approx(loss)


def test_at_the_old_policy_the_gradient_is_the_policy_gradient():
    """d/d theta of the surrogate = -A * d log pi / d theta where theta = theta_old."""
    generator = torch.Generator().manual_seed(0)
    actions = torch.randint(7, (50,), generator=generator)
    advantages = torch.randn(50, generator=generator, dtype=DOUBLE)
    logits = torch.randn(50, 7, generator=generator, dtype=DOUBLE, requires_grad=True)
    new = logits.log_softmax(-1)[torch.arange(50), actions]
    (of_surrogate,) = torch.autograd.grad(
        clipped_surrogate(new, new.detach(), advantages, 0.2, 0.2).sum(), logits, retain_graph=True
    )
    (of_policy_gradient,) = torch.autograd.grad(-(advantages * new).sum(), logits)
    assert float(of_surrogate.abs().max()) > 0.1
    torch.testing.assert_close(of_surrogate, of_policy_gradient, rtol=1e-13, atol=1e-13)


def test_no_gradient_flows_into_the_old_policy():
    """Old log-probabilities that still carry a graph must not cancel the gradient."""
    new = double([-1.0, -2.0]).requires_grad_()
    clipped_surrogate(new, new, double([1.0, -3.0]), 0.2, 0.2).sum().backward()
    assert new.grad is not None and new.grad.tolist() == [-1.0, 3.0]


@given(logprobs, logprobs, reals, clips, clips)
def test_is_clipped_says_where_the_gradient_is_zero(new, old, advantage, low, high):
    r = math.exp(new - old)
    assume(abs(r - (1 - low)) > 1e-6 and abs(r - (1 + high)) > 1e-6 and abs(advantage) > 1e-6)
    new_logprobs = double([new]).requires_grad_()
    arguments = (double([old]), double([advantage]), low, high)
    clipped_surrogate(new_logprobs, *arguments).sum().backward()
    assert new_logprobs.grad is not None
    assert bool(is_clipped(new_logprobs, *arguments)) == (new_logprobs.grad.item() == 0.0)


@pytest.mark.parametrize(
    ("r", "advantage", "expected"),
    [(0.75, -1, True), (0.85, -1, False), (0.75, 1, False), (1.35, 1, False), (1.45, 1, True), (1.45, -1, False)],
)
def test_is_clipped_by_hand(r, advantage, expected):
    """The range is 1 - 0.2 to 1 + 0.4."""
    assert bool(is_clipped(double([math.log(r)]), double([0.0]), double([advantage]), 0.2, 0.4)) is expected


def test_ratio_does_not_overflow():
    ratios = ratio(double([0.0, -1000.0, -1.0]), double([-1000.0, 0.0, -1.0]))
    assert ratios.tolist() == [math.exp(20), math.exp(-20), 1.0]


def test_value_clip_by_hand():
    """V_old = 0, R = 2, range 0.5: at V = 1 the clipped value 0.5 is the worse one; at V = -1 the plain one is."""
    loss = value_loss(double([1.0, -1.0]), double([0.0, 0.0]), double([2.0, 2.0]), 0.5)
    assert loss.tolist() == [1.5**2 / 2, 3.0**2 / 2]


def test_the_value_clip_stops_the_gradient_of_values_that_moved_enough():
    values = double([1.0, 0.2]).requires_grad_()
    value_loss(values, double([0.0, 0.0]), double([2.0, 2.0]), 0.5).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([0.0, 0.2 - 2.0])

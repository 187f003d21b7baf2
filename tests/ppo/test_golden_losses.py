"""Losses, gradients and KL estimates against arrays that OpenRLHF produced (golden/make_openrlhf_losses.py)."""

import json
import pathlib

import pytest
import torch

from heeler.ppo.kl import kl_estimate
from heeler.ppo.shaping import segment_weights
from heeler.ppo.update import PPOConfig, loss_gradients
from heeler.types import PolicyOutput

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "openrlhf_losses.json").read_text())
MASK = torch.tensor(GOLDEN["mask"]).bool()


def packed(name):
    """The decisions behind one another: what OpenRLHF masks is not there at all."""
    return torch.tensor(GOLDEN[name], dtype=torch.float64)[MASK]


def step(config, tokens=True, learn_policy=True):
    """Loss and gradients of one optimiser step, as `update` takes them: `[n]` by log-probability and by value."""
    new, values = packed("new_logprobs").requires_grad_(), packed("values").requires_grad_()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), MASK.sum(1).cumsum(0)])
    weights = segment_weights(offsets, torch.zeros(4, dtype=torch.bool), "token" if tokens else "sequence").double()
    nothing = torch.zeros_like(weights)
    columns = [
        packed("old_logprobs"), packed("old_values"), packed("advantages"), packed("returns"),
        weights if learn_policy else nothing, nothing if learn_policy else weights, torch.ones_like(weights),
    ]  # fmt: skip
    output = PolicyOutput(logprobs=new, entropy=torch.zeros_like(new), values=values)
    denominator = float(weights.sum())
    loss, _ = loss_gradients(output, torch.stack(columns, 1), denominator, denominator, config)
    return loss, new.grad, values.grad


def unmasked(gradient):
    whole = torch.zeros(MASK.shape, dtype=torch.float64)
    whole[MASK] = gradient
    return whole.tolist()


@pytest.mark.parametrize("case", GOLDEN["policy"], ids=lambda c: f"{c['low']}-{c['high']}-{c['tokens']}")
def test_the_clipped_surrogate(case):
    config = PPOConfig(clip_range=case["low"], clip_range_high=case["high"])
    loss, gradient, _ = step(config, tokens=case["tokens"])
    assert loss == pytest.approx(case["loss"], rel=1e-6)
    for ours, theirs in zip(unmasked(gradient), case["gradient"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("case", GOLDEN["value"], ids=lambda c: str(c["clip"]))
def test_the_value_loss(case):
    config = PPOConfig(value_clip=case["clip"], value_coef=1.0)
    loss, _, gradient = step(config, learn_policy=False)
    assert loss == pytest.approx(case["loss"], rel=1e-6)
    for ours, theirs in zip(unmasked(gradient), case["gradient"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates(estimator):
    """OpenRLHF computes them in float32."""
    ours = kl_estimate(packed("new_logprobs"), packed("ref_logprobs"), estimator)
    theirs = torch.tensor(GOLDEN["kl"][estimator], dtype=torch.float64)[MASK]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

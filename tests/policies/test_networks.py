"""Networks for environments."""

import copy

import pytest
import torch
from torch import nn

from heeler.policies.actor_critic import ActorCritic
from heeler.policies.networks import MLP, Body, ImageEncoder, NatureCNN
from heeler.types import ActionSpec, ObservationSpec

DISCRETE = ActionSpec(kind="discrete", sizes=(4,))


def is_orthogonal(weight, gain):
    """Whether rows, or columns where they are fewer, are `gain` long and at right angles."""
    matrix = weight.detach().flatten(1)
    product = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    return torch.allclose(product, gain**2 * torch.eye(len(product)), atol=1e-5)


@pytest.mark.parametrize(
    "observations, network",
    [(ObservationSpec(vector=6), MLP(hidden=(32, 8))), (ObservationSpec(vector=0, images=(("i", (4, 44, 40)),)), None)],
)
def test_networks_begin_orthogonal_with_gains_of_their_own_and_biases_of_0(observations, network):
    policy = ActorCritic(observations, DISCRETE, network or NatureCNN(features=16), memory=5)
    heads = {policy.action_head: 0.01, policy.value_head: 1.0}
    layers = [m for m in policy.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert len(layers) == 2 + 2 * (2 if network else 4)
    for layer in layers:
        assert is_orthogonal(layer.weight, heads.get(layer, 2**0.5)) and not layer.bias.any()
    for body in (policy.actor, policy.critic):
        assert body.memory is not None
        for name, parameter in body.memory.named_parameters():
            assert not parameter.any() if "bias" in name else is_orthogonal(parameter, 1.0), name


@pytest.mark.parametrize("memory", [0, 5])
def test_actor_and_critic_have_networks_of_their_own_unless_they_are_to_share(memory):
    for shared in (False, True):
        policy = ActorCritic(ObservationSpec(vector=3), DISCRETE, MLP(hidden=(8,)), memory=memory, shared=shared)
        states = torch.zeros(2, policy.state_size) if memory else None
        _, values, _ = policy.parameters_and_values(torch.randn(2, 3), 1, states)
        values.sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in policy.actor.parameters()) is shared
        assert any(p.grad is not None and p.grad.any() for p in policy.critic.parameters())


def test_the_memory_order_of_pictures_changes_no_number():
    torch.manual_seed(0)
    encoder = ImageEncoder((4, 84, 84), features=16)
    plain = copy.deepcopy(encoder)
    images = torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    features = encoder(images)
    expected = plain.linear(plain.convolutions(images.float() / 255.0))
    torch.testing.assert_close(features, expected)
    features.square().sum().backward()
    expected.square().sum().backward()
    for mine, its in zip(encoder.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)


def test_pictures_in_bf16_are_those_of_fp32_but_for_its_rounding():
    torch.manual_seed(0)
    body = Body(ImageEncoder((4, 84, 84), features=64), memory=0)
    rounded = copy.deepcopy(body)
    rounded.precision = "bf16"
    images = torch.randint(0, 256, (16, 4, 84, 84), dtype=torch.uint8)
    exact, near = body(images), rounded(images)
    assert near.dtype == torch.float32 and not torch.equal(exact, near)
    scale = exact.abs().max().item()
    assert (exact - near).abs().max() < 0.02 * scale  # a few roundings of 2^-9
    (exact * exact.detach()).sum().backward()
    (near * exact.detach()).sum().backward()
    for (name, mine), its in zip(rounded.named_parameters(), body.parameters(), strict=True):
        assert mine.dtype == mine.grad.dtype == torch.float32, name
        assert (mine.grad - its.grad).norm() < 0.02 * its.grad.norm(), name

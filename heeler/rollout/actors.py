"""What acts in the environments: the policy's networks with weights of their own, published before each rollout.

A small MLP on a handful of environments is so little arithmetic that torch's overhead per operation is most of a
step; numpy on the same weights is several times faster. Everything else runs in torch.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from heeler.policies.actor_critic import ActorCritic, as_tensors
from heeler.policies.networks import MLPEncoder

Array = np.ndarray[Any, Any]


class Actor(Protocol):
    """Distribution parameters for normalised observations."""

    def publish(self, policy: ActorCritic) -> None:
        """Take the policy's weights."""
        ...

    def act(self, observations: Any, states: Any) -> tuple[Array, Any]:
        """Parameters `[n, P]` and the new memory, for normalised observations `[n, ...]` and memory `[n, D]`."""
        ...


class NumpyActor:
    """An MLP in numpy. It runs the actor only: values are computed for the whole rollout at once, later."""

    def __init__(self) -> None:
        self.weights: list[tuple[Array, Array]] = []
        self.activation = "tanh"

    @staticmethod
    def fits(policy: ActorCritic) -> bool:
        """Whether the policy is an MLP without memory on a CPU, with an activation known here."""
        encoder = policy.actor.encoder
        return (
            type(encoder) is MLPEncoder  # a subclass may compute something else
            and not policy.recurrent
            and policy.device.type == "cpu"
            and all(isinstance(layer, (nn.Linear, nn.Tanh, nn.ReLU)) for layer in encoder.layers)
        )

    def publish(self, policy: ActorCritic) -> None:
        encoder = policy.actor.encoder
        assert isinstance(encoder, MLPEncoder)
        linears = [layer for layer in encoder.layers if isinstance(layer, nn.Linear)] + [policy.action_head]
        self.activation = "relu" if any(isinstance(layer, nn.ReLU) for layer in encoder.layers) else "tanh"
        self.weights = []
        for layer in linears:
            assert isinstance(layer, nn.Linear)
            weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
            self.weights.append((np.ascontiguousarray(weight.T), bias.copy()))

    def act(self, observations: Any, states: Any) -> tuple[Array, Any]:
        x = observations
        for weight, bias in self.weights[:-1]:
            x = x @ weight
            x += bias
            np.tanh(x, out=x) if self.activation == "tanh" else np.maximum(x, 0.0, out=x)
        weight, bias = self.weights[-1]
        return x @ weight + bias, states


class TorchActor:
    """Any actor-critic, in torch. It reads the policy's own weights: they do not change during a rollout."""

    def __init__(self) -> None:
        self.policy: ActorCritic | None = None

    def publish(self, policy: ActorCritic) -> None:
        self.policy = policy

    @torch.inference_mode()
    def act(self, observations: Any, states: Any) -> tuple[Array, Any]:
        policy = self.policy
        assert policy is not None
        seen = as_tensors(observations, policy.device)
        if policy.recurrent:
            parameters, _, states = policy.parameters_and_values(seen, 1, states)
        else:
            parameters = policy.action_head(policy.actor(seen))
        return parameters.cpu().numpy(), states


def choose_actor(policy: ActorCritic) -> Actor:
    return NumpyActor() if NumpyActor.fits(policy) else TorchActor()

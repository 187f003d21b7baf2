"""What acts in the environments: the policy's networks with weights of their own, published before each rollout.

A small MLP on a handful of environments is so little arithmetic that torch's overhead per operation is most of a
step; numpy on the same weights is several times faster. Everything else runs in torch.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from heeler.policies.actor_critic import SMALLEST_VARIANCE, ActorCritic, as_tensors
from heeler.policies.networks import MLPEncoder

Array = np.ndarray[Any, Any]


class Actor(Protocol):
    """Distribution parameters for normalised observations."""

    def publish(self, policy: ActorCritic) -> None:
        """Take the policy's weights."""
        ...

    def act(self, observations: Any, states: Any) -> tuple[Array, Array, Any]:
        """For normalised observations `[n, ...]` and memory `[n, D]`: parameters `[n, P]`, the features `[n, F]` that
        they were made of, and the new memory."""
        ...


class NumpyActor:
    """An MLP in numpy. It runs the actor only: values are computed for the whole rollout at once, later."""

    def __init__(self) -> None:
        self.weights: list[tuple[Array, Array]] = []
        self.variances: Array | None = None  # of the weights of gSDE's noise
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
        if policy.depends:
            assert policy.log_std is not None
            self.variances = (2 * policy.log_std.detach()).exp().numpy()

    def act(self, observations: Any, states: Any) -> tuple[Array, Array, Any]:
        x = observations
        for weight, bias in self.weights[:-1]:
            x = x @ weight
            x += bias
            np.tanh(x, out=x) if self.activation == "tanh" else np.maximum(x, 0.0, out=x)
        weight, bias = self.weights[-1]
        means = x @ weight + bias
        if self.variances is None:
            return means, x, states
        log_std = 0.5 * np.log(np.square(x) @ self.variances + SMALLEST_VARIANCE)
        return np.concatenate([means, log_std], axis=1), x, states


class TorchActor:
    """Any actor-critic, in torch. It reads the policy's own weights: they do not change during a rollout."""

    def __init__(self) -> None:
        self.policy: ActorCritic | None = None

    def publish(self, policy: ActorCritic) -> None:
        self.policy = policy

    @torch.inference_mode()
    def act(self, observations: Any, states: Any) -> tuple[Array, Array, Any]:
        policy = self.policy
        assert policy is not None
        seen = as_tensors(observations, policy.device)
        if policy.recurrent:
            features, _, states = policy.features(seen, 1, states)
        else:
            features = policy.actor(seen)
        return policy.parameters_of(features).cpu().numpy(), features.cpu().numpy(), states


def choose_actor(policy: ActorCritic) -> Actor:
    return NumpyActor() if NumpyActor.fits(policy) else TorchActor()

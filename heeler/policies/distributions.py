"""Distributions over actions: log-probabilities and entropies in torch, draws in numpy.

| actions | parameters | log pi(a) |
|---|---|---|
| discrete | logits `[n, K]` | log softmax at a |
| multi_discrete | logits `[n, sum K_i]` | sum over components |
| multi_binary | logits `[n, A]` | sum of log sigmoid(+-logit) |
| box | means `[n, A]`, one log-std a dimension | sum of Gaussian log-densities of the raw, unclipped action |
| box, gSDE | means and log-stds `[n, 2A]` | the same |

Draws take the noise from outside (Gumbel, logistic or normal), so that they depend on nothing but seed and update:
argmax(logits + Gumbel noise) is a draw from the softmax [Gumbel, 1954], sign(logit + logistic noise) one from the
sigmoid. A mask forbids actions by their logits, in draws and log-probabilities alike [arXiv 2006.14171].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from heeler.types import HeelerError

FORBIDDEN = -1e8  # finite: the entropy's 0 * log 0 must not become NaN
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Independent:
    """Continuous actions get fresh noise in every step, of the same size in every state."""


@dataclass(frozen=True, kw_only=True)
class StateDependent:
    """Continuous actions get noise that is a linear function of the actor's features: smooth, larger in some states.

    Generalised state-dependent exploration, gSDE [Raffin, Kober and Stulp, 2005.05719].

    Attributes:
        every: steps until another function is drawn; 0 keeps one for a whole rollout.
    """

    every: int = 0


Exploration = Independent | StateDependent


class FeatureNoise:
    """Standard normal noise of gSDE, smooth over steps: (z theta) / std(z), theta ~ N(0, sigma^2) for each environment.

    Given the features z `[F]`, z theta is normal with the variance sum_i z_i^2 sigma_ij^2, which is the policy's own;
    divided by its root it takes the place of the independent noise. Actions of one theta depend on each other, which
    log-probabilities leave out, as the paper does.

    Args:
        generator: of the draws.
        sigma: `[F, A]`.
        num_envs: n.
        every: steps until another theta is drawn; 0 never.
    """

    def __init__(self, generator: np.random.Generator, sigma: Array, num_envs: int, every: int) -> None:
        self.generator, self.sigma, self.num_envs, self.every = generator, sigma, num_envs, every

    def __call__(self, t: int, parameters: Array, features: Array) -> Array:
        """Noise `[n, A]` of step t (call it for 0, 1, 2, ...), for parameters `[n, 2A]` and features `[n, F]`."""
        if t == 0 or (self.every and t % self.every == 0):
            shape = (self.num_envs, *self.sigma.shape)
            self.theta = self.sigma * self.generator.standard_normal(shape, dtype=np.float32)
        offsets = np.matmul(features[:, None], self.theta)[:, 0]
        return offsets / np.exp(parameters[:, parameters.shape[1] // 2 :])


def draw_noise(kind: str, generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """float32 noise `[..., P]` for draws of this kind of action; `shape[-1]` is the number of logits or means."""
    if kind == "box":
        return generator.standard_normal(shape, dtype=np.float32)
    uniform = generator.random(shape, dtype=np.float32)
    np.clip(uniform, 1e-7, 1 - 1e-7, out=uniform)
    if kind == "multi_binary":
        return np.log(uniform) - np.log1p(-uniform)
    return -np.log(-np.log(uniform))


def draw(
    kind: str, sizes: tuple[int, ...], parameters: Array, noise: Array | None, std: Array | None, masks: Array | None
) -> Array:
    """Actions for parameters `[n, P]`: a draw, or the most likely ones where `noise` is None.

    `std` `[A]` is that of boxes; None where the parameters hold log-stds behind the means.
    """
    if kind == "box":
        if std is None:
            parameters, log_std = np.split(parameters, 2, axis=1)
            std = np.exp(log_std)
        return parameters if noise is None else parameters + std * noise
    if kind == "multi_binary":
        return ((parameters if noise is None else parameters + noise) > 0).astype(np.int64)
    scores = parameters if noise is None else parameters + noise
    if masks is not None:
        scores = np.where(masks, scores, -np.inf)
    if kind == "discrete":
        return scores.argmax(axis=1)
    actions = np.empty((len(scores), len(sizes)), dtype=np.int64)
    start = 0
    for i, size in enumerate(sizes):
        actions[:, i] = scores[:, start : start + size].argmax(axis=1)
        start += size
    return actions


def logprobs_and_entropy(
    kind: str, sizes: tuple[int, ...], parameters: Tensor, log_std: Tensor | None, actions: Tensor, masks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`[n]` log-probabilities (nats; of a density for boxes) of the actions, and `[n]` entropies.

    `log_std` `[A]` is that of boxes; None where the parameters hold log-stds behind the means.
    """
    if kind == "box":
        if log_std is None:
            parameters, log_std = parameters.chunk(2, dim=1)
        normalized = (actions - parameters) * (-log_std).exp()
        constant = log_std.sum(-1) + 0.5 * math.log(2 * math.pi) * len(sizes)
        entropy = log_std.sum(-1) + 0.5 * (1 + math.log(2 * math.pi)) * len(sizes)
        return -0.5 * normalized.square().sum(1) - constant, entropy.expand(len(parameters))
    if kind == "multi_binary":
        positive, negative = F.logsigmoid(parameters), F.logsigmoid(-parameters)
        chosen = torch.where(actions.bool(), positive, negative)
        return chosen.sum(1), -(positive.exp() * positive + negative.exp() * negative).sum(1)
    if masks is not None:
        parameters = parameters.masked_fill(~masks, FORBIDDEN)
    if kind == "discrete":
        return _categorical(parameters, actions)
    parts = parameters.split(list(sizes), dim=1)
    pairs = [_categorical(part, actions[:, i]) for i, part in enumerate(parts)]
    return torch.stack([p for p, _ in pairs]).sum(0), torch.stack([e for _, e in pairs]).sum(0)


def _categorical(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = F.log_softmax(logits, dim=1)
    chosen = logprobs.gather(1, actions[:, None]).squeeze(1)
    return chosen, -(logprobs.exp() * logprobs).sum(1)


def check_masks(masks: Array, sizes: tuple[int, ...], where: str, when: str = "") -> None:
    """Refuse masks `[n, M]` that leave a component nothing to choose.

    `when` says in words which step they belong to. A single mask without it is of no vector environment, so no number
    is told.
    """
    start = 0
    for component, size in enumerate(sizes):
        allowed = masks[:, start : start + size].any(axis=1)
        if not allowed.all():
            env = int(np.flatnonzero(~allowed)[0])
            part = f" of component {component}" if len(sizes) > 1 else ""
            place = f", environment {env},{f' {when},' if when else ''}" if when or len(masks) > 1 else ""
            raise HeelerError(
                f"the action mask of {where}{place} forbids every action{part}: at least one must be allowed; let the"
                " episode end instead"
            )
        start += size

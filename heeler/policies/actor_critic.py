"""Actor-critics for environments: networks, action distribution and observation statistics in one module.

`evaluate` scores stored decisions again with gradients (`heeler.types.Policy`); `predict` acts on raw observations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from heeler.policies.distributions import (
    Exploration,
    FeatureNoise,
    Independent,
    StateDependent,
    draw,
    draw_noise,
    logprobs_and_entropy,
)
from heeler.policies.fused import FusedMLP, fuse
from heeler.policies.networks import Body, Network, build_encoder, orthogonal
from heeler.policies.steps import Observed, Segments, Steps, count, pick
from heeler.types import ActionSpec, CheckFailed, HeelerError, ObservationSpec, PolicyOutput

SMALLEST_VARIANCE = 1e-6  # of gSDE, where every feature is 0


class Normalizer(nn.Module):
    """(x - mean) / std of everything seen in training, clipped. Frozen during a rollout; travels with the weights."""

    def __init__(self, size: int, clip: float) -> None:
        super().__init__()
        self.clip = clip
        self.mean: Tensor
        self.var: Tensor
        self.seen: Tensor
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("var", torch.ones(size, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def scale(self) -> tuple[Tensor, Tensor]:
        """float32 offset and factor: normalised = (x - offset) * factor."""
        return self.mean.float(), (self.var + 1e-8).rsqrt().float()

    def forward(self, vector: Tensor) -> Tensor:
        offset, factor = self.scale()
        return ((vector - offset) * factor).clamp(-self.clip, self.clip)


Noise = Callable[[int, Any, Any], Any]


class ActorCritic(nn.Module):
    """A policy and its value function.

    Args:
        observations, actions: what the environment shows and takes.
        network: the encoder, one for each of actor and critic unless `shared`.
        memory: size of the LSTM behind each encoder; 0 for none.
        shared: actor and critic share encoder and memory.
        log_std: initial log standard deviation of box actions; it is a parameter of its own, the same in every state.
            With `StateDependent` exploration it is that of each weight of the noise, a parameter `[F, A]`.
        exploration: how draws of box actions differ from their means.
        normalize: keep running statistics of vector observations and normalise by them.
        clip_observations: normalised observations are clipped here.
        precision: of the encoders, see `Body`.
    """

    def __init__(
        self,
        observations: ObservationSpec,
        actions: ActionSpec,
        network: Network,
        *,
        memory: int = 0,
        shared: bool = False,
        log_std: float = 0.0,
        exploration: Exploration | None = None,
        normalize: bool = False,
        clip_observations: float = 10.0,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        super().__init__()
        self.exploration = exploration or Independent()
        self.depends = isinstance(self.exploration, StateDependent)
        if self.depends and actions.kind != "box":
            raise HeelerError(
                f"exploration:state-dependent is for continuous actions, not for {actions.kind} ones: leave it out"
            )
        self.observations, self.actions, self.shared = observations, actions, shared
        self.normalizer = Normalizer(observations.vector, clip_observations) if normalize else None
        if normalize and not observations.vector:
            raise HeelerError(
                "there is no vector to normalise: images are divided by 255, leave normalize_observations off"
            )
        self.actor = Body(build_encoder(network, observations), memory, precision)
        self.critic = self.actor if shared else Body(build_encoder(network, observations), memory, precision)
        self.action_head = orthogonal(nn.Linear(self.actor.num_features, actions.num_parameters), 0.01)
        self.value_head = orthogonal(nn.Linear(self.critic.num_features, 1), 1.0)
        self.log_std: nn.Parameter | None = None
        if actions.kind == "box":
            weights = (self.actor.num_features,) if self.depends else ()
            self.log_std = nn.Parameter(torch.full((*weights, actions.num_parameters), float(log_std)))
        self.recurrent = memory > 0
        self.fused: FusedMLP | None = None

    def fuse(self) -> bool:
        """Compute small MLPs on a CPU as one operation from now on; False where the networks are something else."""
        if not self.recurrent and not self.shared and not self.depends:
            heads: Any = self.action_head, self.value_head
            self.fused = fuse(self.actions, self.actor.encoder, heads[0], self.critic.encoder, heads[1], self.log_std)
            if self.fused is not None:
                self.ppo_gradients = self.fused.ppo_gradients
        return self.fused is not None

    def trained(self) -> list[nn.Parameter]:
        """What the optimiser changes."""
        return [self.fused.flat] if self.fused is not None else list(self.parameters())

    @property
    def device(self) -> torch.device:
        return self.value_head.weight.device  # pyright: ignore[reportReturnType]

    @property
    def precision(self) -> Literal["fp32", "bf16"]:
        """What the encoders compute in; may be changed at any time, as all weights are fp32."""
        return self.actor.precision

    @precision.setter
    def precision(self, precision: Literal["fp32", "bf16"]) -> None:
        self.actor.precision = self.critic.precision = precision

    @property
    def state_size(self) -> int:
        """Numbers of memory of one environment: the actor's, then the critic's where it has its own."""
        return self.actor.state_size if self.shared else self.actor.state_size + self.critic.state_size

    @property
    def num_parameters(self) -> int:
        """P, the numbers that describe the distribution of one decision."""
        return self.actions.num_parameters * (2 if self.depends else 1)

    def normalize(self, observations: Observed) -> Observed:
        """Raw observations as the networks read them."""
        if self.normalizer is None:
            return observations
        if isinstance(observations, dict):
            return {**observations, "vector": self.normalizer(observations["vector"])}
        return self.normalizer(observations)

    def parameters_and_values(
        self, observations: Observed, length: int = 1, states: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Distribution parameters `[n, P]`, values `[n]` and the new memory, for normalised observations.

        With memory, observations are `[length * n, ...]`, time first, and states `[n, D]`.
        """
        seen, judged, states = self.features(observations, length, states)
        return self.parameters_of(seen), self.value_head(judged).squeeze(1), states

    def parameters_of(self, seen: Tensor) -> Tensor:
        """Distribution parameters `[n, P]` for the actor's features `[n, F]`."""
        means = self.action_head(seen)
        if not self.depends:
            return means
        assert self.log_std is not None
        # the size of the noise is learned by its weights alone: the features serve the means [2005.05719, 3.2]
        variance = seen.detach().square() @ (2 * self.log_std).exp()
        return torch.cat([means, 0.5 * (variance + SMALLEST_VARIANCE).log()], dim=1)

    def features(
        self, observations: Observed, length: int = 1, states: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The actor's features, the critic's, and the new memory; arguments as for `parameters_and_values`."""
        if not self.recurrent:
            seen = self.actor(observations)
            judged = seen if self.shared else self.critic(observations)
        else:
            assert states is not None
            if self.shared:
                seen, states = self.actor.run(observations, length, states)
                judged = seen
            else:
                mine, its = states.split([self.actor.state_size, self.critic.state_size], dim=1)
                seen, mine = self.actor.run(observations, length, mine)
                judged, its = self.critic.run(observations, length, its)
                states = torch.cat([mine, its], dim=1)
        return seen, judged, states

    def distribution(self, parameters: Tensor, actions: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of actions, `[n]` each."""
        log_std = None if self.depends else self.log_std
        return logprobs_and_entropy(self.actions.kind, self.actions.sizes, parameters, log_std, actions, masks)

    def standard_deviations(self) -> Any:
        """Of box actions, numpy `[A]`; None where there are none, or where the parameters of a decision hold them."""
        return None if self.log_std is None or self.depends else self.log_std.detach().exp().cpu().numpy()

    def noise(self, generator: np.random.Generator, length: int, num_envs: int) -> Noise:
        """The noise `[n, A]` of a rollout's draws: a function of step, parameters and the actor's features."""
        if isinstance(self.exploration, StateDependent):
            assert self.log_std is not None
            sigma = self.log_std.detach().exp().cpu().numpy()
            return FeatureNoise(generator, sigma, num_envs, self.exploration.every)
        drawn = draw_noise(self.actions.kind, generator, (length, num_envs, self.actions.num_parameters))
        return lambda t, parameters, features: drawn[t]

    def evaluate(self, inputs: Any) -> PolicyOutput:
        """Score stored decisions (`Steps`, or `Segments` with memory) again."""
        if isinstance(inputs, Steps):
            parameters, values, _ = self.parameters_and_values(inputs.observations)
        else:
            parameters, values, _ = self._along(inputs, None)
        logprobs, entropy = self.distribution(parameters, inputs.actions, inputs.masks)
        return PolicyOutput(logprobs=logprobs, entropy=entropy, values=values)

    def evaluate_with_final(self, inputs: Segments, final: Observed) -> tuple[PolicyOutput, Tensor]:
        """`evaluate`, and the value `[S]` of each segment's final observation, by the memory that it left behind."""
        parameters, values, after = self._along(inputs, final)
        logprobs, entropy = self.distribution(parameters, inputs.actions, inputs.masks)
        assert after is not None
        return PolicyOutput(logprobs=logprobs, entropy=entropy, values=values), after

    def _along(self, segments: Segments, final: Observed | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Parameters and values of the steps of segments, padded to the longest; values after them for `final`."""
        lengths = segments.offsets.diff()
        n, longest = len(lengths), int(lengths.max()) + (final is not None)
        time = torch.arange(longest, device=lengths.device)[:, None]
        within = time < lengths  # (L, n)
        # past a segment's end, any step will do: what it yields is thrown away
        source = (segments.offsets[:-1] + time).clamp(max=len(segments.actions) - 1)
        padded = pick(segments.observations, source.flatten())
        if final is not None:
            flat = lengths * n + torch.arange(n, device=lengths.device)
            if isinstance(padded, dict):
                assert isinstance(final, dict)
                for name in padded:
                    padded[name][flat] = final[name]
            else:
                assert isinstance(final, Tensor)
                padded[flat] = final
        parameters, values, _ = self.parameters_and_values(padded, longest, segments.states)
        # (L, n) to segment after segment
        parameters = parameters.view(longest, n, -1).transpose(0, 1)[within.T]
        grid = values.view(longest, n)
        after = None if final is None else grid[lengths, torch.arange(n, device=lengths.device)]
        return parameters, grid.T[within.T], after

    # acting on raw observations -------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(
        self,
        observations: Any,
        states: Tensor | None = None,
        *,
        masks: Any = None,
        noise: Any = None,
    ) -> tuple[Any, Tensor | None]:
        """Raw actions `[n]` or `[n, A]` (numpy) for raw observations, and the new memory.

        Args:
            observations: `[n, D]`, `[n, C, H, W]`, or a dict of these (numpy).
            states: memory `[n, D]`; zeros where None.
            masks: `[n, M]` bool.
            noise: from `draw_noise`; the most likely actions where None.

        Raises:
            CheckFailed: the networks put out something that is not finite, of which the largest would be action 0.
        """
        seen = as_tensors(observations, self.device)
        if self.recurrent and states is None:
            states = torch.zeros(count(seen), self.state_size, device=self.device)
        parameters, _, states = self.parameters_and_values(self.normalize(seen), 1, states)
        said = parameters.cpu().numpy()
        if not np.isfinite(said.sum()):
            raise CheckFailed(
                "the policy's outputs are not finite, although the observations are: train it again with a lower"
                " learning rate"
            )
        actions = draw(self.actions.kind, self.actions.sizes, said, noise, self.standard_deviations(), masks)
        return actions, states


def as_tensors(observations: Any, device: torch.device) -> Observed:
    """Numpy observations as tensors; nothing is copied on a CPU."""
    if isinstance(observations, dict):
        return {name: torch.as_tensor(np.ascontiguousarray(part), device=device) for name, part in observations.items()}
    return torch.as_tensor(np.ascontiguousarray(observations), device=device)

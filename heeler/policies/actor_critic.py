"""Actor-critics for environments: networks, action distribution and observation statistics in one module.

`evaluate` scores stored decisions again with gradients (`heeler.types.Policy`); `predict` acts on raw observations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heeler.policies.distributions import draw, logprobs_and_entropy
from heeler.policies.fused import FusedMLP, fuse
from heeler.policies.networks import Body, Network, build_encoder, orthogonal
from heeler.policies.steps import Observed, Segments, Steps, count, pick
from heeler.types import ActionSpec, HeelerError, ObservationSpec, PolicyOutput


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


class ActorCritic(nn.Module):
    """A policy and its value function.

    Args:
        observations, actions: what the environment shows and takes.
        network: the encoder, one for each of actor and critic unless `shared`.
        memory: size of the LSTM behind each encoder; 0 for none.
        shared: actor and critic share encoder and memory.
        log_std: initial log standard deviation of box actions; it is a parameter of its own, the same in every state.
        normalize: keep running statistics of vector observations and normalise by them.
        clip_observations: normalised observations are clipped here.
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
        normalize: bool = False,
        clip_observations: float = 10.0,
    ) -> None:
        super().__init__()
        self.observations, self.actions, self.shared = observations, actions, shared
        self.normalizer = Normalizer(observations.vector, clip_observations) if normalize else None
        if normalize and not observations.vector:
            raise HeelerError(
                "there is no vector to normalise: images are divided by 255, leave normalize_observations off"
            )
        self.actor = Body(build_encoder(network, observations), memory)
        self.critic = self.actor if shared else Body(build_encoder(network, observations), memory)
        self.action_head = orthogonal(nn.Linear(self.actor.num_features, actions.num_parameters), 0.01)
        self.value_head = orthogonal(nn.Linear(self.critic.num_features, 1), 1.0)
        self.log_std = (
            nn.Parameter(torch.full((actions.num_parameters,), float(log_std))) if actions.kind == "box" else None
        )
        self.recurrent = memory > 0
        self.fused: FusedMLP | None = None

    def fuse(self) -> bool:
        """Compute small MLPs on a CPU as one operation from now on; False where the networks are something else."""
        if not self.recurrent and not self.shared:
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
    def state_size(self) -> int:
        """Numbers of memory of one environment: the actor's, then the critic's where it has its own."""
        return self.actor.state_size if self.shared else self.actor.state_size + self.critic.state_size

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
        return self.action_head(seen), self.value_head(judged).squeeze(1), states

    def distribution(self, parameters: Tensor, actions: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of actions, `[n]` each."""
        return logprobs_and_entropy(self.actions.kind, self.actions.sizes, parameters, self.log_std, actions, masks)

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
        """
        seen = as_tensors(observations, self.device)
        if self.recurrent and states is None:
            states = torch.zeros(count(seen), self.state_size, device=self.device)
        parameters, _, states = self.parameters_and_values(self.normalize(seen), 1, states)
        std = None if self.log_std is None else self.log_std.exp().cpu().numpy()
        actions = draw(self.actions.kind, self.actions.sizes, parameters.cpu().numpy(), noise, std, masks)
        return actions, states


def as_tensors(observations: Any, device: torch.device) -> Observed:
    """Numpy observations as tensors; nothing is copied on a CPU."""
    if isinstance(observations, dict):
        return {name: torch.as_tensor(np.ascontiguousarray(part), device=device) for name, part in observations.items()}
    return torch.as_tensor(np.ascontiguousarray(observations), device=device)

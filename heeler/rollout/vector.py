"""Collecting steps of vector environments as packed decisions; implements `heeler.types.Collector`.

The grid of n environments by T steps is packed environment after environment. Dummy steps (NEXT_STEP autoreset) are
dropped here. A segment ends where an episode ends, where a life is lost, and at the edge of the rollout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heeler.envs.checks import LAST_OBSERVATION, check_observations, check_rewards
from heeler.envs.vector import VectorEnvironment
from heeler.policies.actor_critic import ActorCritic
from heeler.policies.distributions import check_masks, draw
from heeler.policies.steps import Observed, Segments, Steps
from heeler.ppo.moments import RunningMoments
from heeler.rollout.actors import Actor, choose_actor
from heeler.runtime.reduce import LocalReduce
from heeler.types import CheckFailed, HeelerError, Rollout

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class VectorRollout(Rollout):
    """A rollout of environments.

    Attributes:
        step_rewards: `[N]` float64, raw.
        final_observations: `[S, ...]` normalised, what came after each segment's last decision.
        ended: `[S]` bool, another episode (or life) begins after it; the others were cut by the edge of the rollout.
        episode_returns, episode_lengths: of the episodes (in Atari: whole games) that ended in this rollout, raw.
    """

    step_rewards: Tensor
    final_observations: Observed
    ended: Tensor
    episode_returns: Array
    episode_lengths: Array

    @property
    def num_episodes(self) -> int:
        return len(self.episode_returns)


def _empty_like(observations: Any, n: int, length: int) -> Any:
    if isinstance(observations, dict):
        return {name: _empty_like(part, n, length) for name, part in observations.items()}
    return np.empty((n, length, *observations.shape[1:]), dtype=observations.dtype)


def _store(buffer: Any, t: int, observations: Any) -> None:
    if isinstance(buffer, dict):
        for name, part in buffer.items():
            part[:, t] = observations[name]
    else:
        buffer[:, t] = observations


def _flat(buffer: Any, indices: Array | None, length: int) -> Any:
    """Rows of `[n, T+1, ...]` as a tensor `[N, ...]`; `indices` into the grid of `[n, length]`, all where None."""
    if isinstance(buffer, dict):
        return {name: _flat(part, indices, length) for name, part in buffer.items()}
    flat = buffer[:, :length].reshape(-1, *buffer.shape[2:])
    return torch.from_numpy(flat if indices is None else flat[indices])


def _step_of(buffer: Any, t: int) -> Any:
    return {name: part[:, t] for name, part in buffer.items()} if isinstance(buffer, dict) else buffer[:, t]


def _at(buffer: Any, env: Array, t: Array) -> Any:
    return {k: v[env, t] for k, v in buffer.items()} if isinstance(buffer, dict) else buffer[env, t]


class VectorCollector:
    """Steps n environments T times with the policy that was last published.

    Args:
        env: the vector environment.
        num_steps: T, steps of each environment in one rollout.
        seed: of the environments and of every draw.
    """

    def __init__(self, env: VectorEnvironment, num_steps: int, seed: int) -> None:
        self.env, self.num_steps, self.seed = env, num_steps, seed
        self.actor: Actor | None = None
        self.policy: ActorCritic | None = None
        self.version = 0
        self.observations: Any = None  # raw, what the next decision is made on
        self.masks: Array | None = None
        self.states: Tensor | None = None
        self.return_so_far = np.zeros(env.num_envs)
        self.length_so_far = np.zeros(env.num_envs, dtype=np.int64)

    def publish(self, policy: Any, version: int) -> None:
        self.policy, self.version = policy, version
        if self.actor is None:
            self.actor = choose_actor(policy)
        self.actor.publish(policy)

    def start(self) -> None:
        """Begin an episode in every environment."""
        assert self.policy is not None
        self.observations, self.masks = self.env.reset(self.seed)
        if isinstance(self.observations, dict):
            self.observations = {k: v.copy() for k, v in self.observations.items()}
        if self.policy.recurrent:
            self.states = torch.zeros(self.env.num_envs, self.policy.state_size, device=self.policy.device)

    def collect(self, step: int) -> VectorRollout:
        policy, actor, env = self.policy, self.actor, self.env
        assert policy is not None and actor is not None
        if self.observations is None:
            self.start()
        n, length, actions_spec = env.num_envs, self.num_steps, policy.actions
        generator = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, step]))
        noise = policy.noise(generator, length, n)
        std = policy.standard_deviations()
        normalize = self._normalize()

        raw = _empty_like(self.observations, n, length + 1)
        seen = raw if policy.normalizer is None else _empty_like(self.observations, n, length + 1)
        parameters = np.empty((n, length, policy.num_parameters), dtype=np.float32)
        is_box, single = actions_spec.kind == "box", actions_spec.kind == "discrete"
        action_shape = (n, length) if single else (n, length, len(actions_spec.sizes))
        actions = np.empty(action_shape, dtype=np.float32 if is_box else np.int64)
        rewards = np.empty((n, length))
        over, cut = np.zeros((n, length), dtype=bool), np.zeros((n, length), dtype=bool)
        terminated, valid = np.zeros((n, length), dtype=bool), np.ones((n, length), dtype=bool)
        masks = None if self.masks is None else np.empty((n, length, self.masks.shape[1]), dtype=bool)
        memories: list[Tensor] = []
        finals: list[tuple[int, Array, Any]] = []
        observations = self.observations

        for t in range(length):
            _store(raw, t, observations)
            if normalize is None:
                shown = observations
            else:
                shown = normalize(observations)
                _store(seen, t, shown)
            if masks is not None:
                assert self.masks is not None
                check_masks(self.masks, actions_spec.sizes, env.config.id, f"step {t} of update {step + 1}")
                masks[:, t] = self.masks
            if self.states is not None:
                memories.append(self.states)
            said, features, self.states = actor.act(shown, self.states)
            if not np.isfinite(said.sum()):
                self._complain(raw, rewards, t, step)
            chosen = draw(actions_spec.kind, actions_spec.sizes, said, noise(t, said, features), std, self.masks)
            parameters[:, t] = said
            actions[:, t] = chosen

            result = env.step(chosen)
            observations = result.observations
            rewards[:, t] = result.rewards
            terminated[:, t] = result.terminated
            ended = result.terminated | result.truncated
            over[:, t] = ended
            if result.lost_life is not None:
                cut[:, t] = result.lost_life
            if result.final is not None:
                indices, last = result.final
                when = f"step {t + 1} of update {step + 1}"
                check_observations(last, env.config.id, when, indices, LAST_OBSERVATION)
                finals.append((t, indices, last))
            self.masks = result.masks
            if result.dummies is not None:
                valid[:, t] = ~result.dummies
            if self.states is not None:
                began = ended if env.same_step else result.dummies
                if began is not None and began.any():
                    self.states = self.states.masked_fill(
                        torch.as_tensor(began, device=self.states.device)[:, None], 0.0
                    )
        _store(raw, length, observations)
        if normalize is not None:
            _store(seen, length, normalize(observations))
        self.observations = _step_of(raw, length)
        self._check_finite(raw, rewards, step)

        # pack: environment after environment, without the dummies
        rewards[~valid] = 0.0
        everything = bool(valid.all())
        kept = None if everything else np.flatnonzero(valid.ravel())
        ends_here = over | cut
        ends_here[:, -1] = True
        if not everything:  # the last decision before the edge, where a dummy step is the edge
            ends_here &= valid
        env_of_end, t_of_end = np.nonzero(ends_here)
        position = (
            env_of_end * length + t_of_end if kept is None else np.searchsorted(kept, env_of_end * length + t_of_end)
        )
        offsets = np.concatenate([[0], position + 1])
        ended_for_good = terminated[env_of_end, t_of_end] | cut[env_of_end, t_of_end]
        final = _at(seen, env_of_end, t_of_end + 1)
        for t, indices, last in finals:
            rows = np.flatnonzero(t_of_end == t)
            slot = {int(e): int(r) for r, e in zip(rows, env_of_end[rows], strict=True)}
            last = last if normalize is None else normalize(last)
            for k, index in enumerate(indices):
                _assign(final, slot[int(index)], last, k)
        episode_returns, episode_lengths = self._episodes(rewards, valid, over)

        device = policy.device
        packed_actions = _flat_array(actions, kept)
        packed_masks = None if masks is None else torch.from_numpy(_flat_array(masks, kept)).to(device)
        packed = _to(_flat(seen, kept, length), device)
        action_tensor = torch.from_numpy(packed_actions).to(device)
        offset_tensor = torch.from_numpy(offsets).to(device)
        inputs: Steps | Segments
        if policy.recurrent:
            memory = torch.stack(memories, dim=1)  # (n, T, D)
            starts = torch.from_numpy(offsets[:-1] if kept is None else kept[offsets[:-1]])
            inputs = Segments(
                observations=packed, actions=action_tensor, masks=packed_masks, offsets=offset_tensor,
                states=memory.reshape(n * length, -1)[starts.to(device)],
            )  # fmt: skip
        else:
            inputs = Steps(observations=packed, actions=action_tensor, masks=packed_masks)
        with torch.no_grad():
            behavior, _ = policy.distribution(
                torch.from_numpy(_flat_array(parameters, kept)).to(device), action_tensor, packed_masks
            )
        if policy.normalizer is not None:
            self._learn_scale(raw, kept, length)
        segments = torch.from_numpy(env_of_end)
        return VectorRollout(
            inputs=inputs,
            offsets=offset_tensor,
            actions=action_tensor,
            behavior_logprobs=behavior,
            policy_versions=torch.full((len(packed_actions),), self.version, device=device),
            terminated=torch.from_numpy(ended_for_good).to(device),
            truncated=torch.from_numpy(~ended_for_good).to(device),
            prompt_ids=segments,
            group_ids=segments,
            sample_ids=torch.from_numpy(t_of_end),
            prompts=(),
            completions=(),
            columns={},
            step_rewards=torch.from_numpy(_flat_array(rewards, kept)).to(device),
            final_observations=_to(_tensors(final), device),
            ended=torch.from_numpy(over[env_of_end, t_of_end] | cut[env_of_end, t_of_end]),
            episode_returns=episode_returns,
            episode_lengths=episode_lengths,
        )

    # observation statistics -----------------------------------------------------------------------------------

    def _normalize(self) -> Any:
        """The policy's normaliser in numpy, as it stands before the rollout; None where there is none."""
        assert self.policy is not None
        normalizer = self.policy.normalizer
        if normalizer is None:
            return None
        offset, factor = (x.cpu().numpy() for x in normalizer.scale())
        clip = normalizer.clip

        def normalize(observations: Any) -> Any:
            if isinstance(observations, dict):
                return {**observations, "vector": normalize(observations["vector"])}
            scaled = (observations - offset) * factor
            return np.clip(scaled, -clip, clip, out=scaled)

        return normalize

    def _learn_scale(self, raw: Any, kept: Array | None, length: int) -> None:
        assert self.policy is not None and self.policy.normalizer is not None
        normalizer = self.policy.normalizer
        vectors = _flat(raw["vector"] if isinstance(raw, dict) else raw, kept, length)
        known = RunningMoments(count=float(normalizer.seen), mean=normalizer.mean.cpu(), var=normalizer.var.cpu())
        known = known.merge(vectors, LocalReduce())
        normalizer.seen.fill_(known.count)
        normalizer.mean.copy_(known.mean)
        normalizer.var.copy_(known.var)

    # checks and statistics ------------------------------------------------------------------------------------

    def _episodes(self, rewards: Array, valid: Array, over: Array) -> tuple[Array, Array]:
        """Raw returns and lengths of the episodes that ended; what is unfinished is carried on."""
        n = len(rewards)
        edges = np.zeros((n, 1))
        rewards_before = np.concatenate([edges, rewards.cumsum(1)], axis=1)
        steps_before = np.concatenate([edges, valid.cumsum(1)], axis=1).astype(np.int64)
        env, t = np.nonzero(over)
        first = np.ones(len(env), dtype=bool)
        first[1:] = env[1:] != env[:-1]
        begin = np.zeros(len(env), dtype=np.int64)
        begin[1:] = t[:-1] + 1
        begin[first] = 0
        returns = rewards_before[env, t + 1] - rewards_before[env, begin] + first * self.return_so_far[env]
        lengths = steps_before[env, t + 1] - steps_before[env, begin] + first * self.length_so_far[env]
        last = np.zeros(n, dtype=np.int64)
        last[env] = t + 1  # the last of equal indices stands: events are in the order of time
        ongoing = ~over.any(1)
        everyone = np.arange(n)
        self.return_so_far = rewards_before[:, -1] - rewards_before[everyone, last] + ongoing * self.return_so_far
        self.length_so_far = steps_before[:, -1] - steps_before[everyone, last] + ongoing * self.length_so_far
        return returns, lengths

    def _check_finite(self, raw: Any, rewards: Array, step: int) -> None:
        vectors = raw.get("vector") if isinstance(raw, dict) else raw
        fine = vectors is None or vectors.dtype == np.uint8 or np.isfinite(vectors).all()
        if not (fine and np.isfinite(rewards).all()):
            self._complain(raw, rewards, self.num_steps, step)

    def _complain(self, raw: Any, rewards: Array, t: int, step: int) -> None:
        """Name what is not finite among the first t + 1 steps."""
        id, update = self.env.config.id, step + 1
        for when in range(t + 1):
            check_observations(_step_of(raw, when), id, f"step {when} of update {update}")
        if t == self.num_steps:
            for when in range(t):
                check_rewards(rewards[:, when], id, f"step {when + 1} of update {update}")
        raise CheckFailed(
            f"the policy's outputs are not finite in step {t + 1} of update {update}, although the observations are:"
            " lower the learning rate"
        )

    # resuming -------------------------------------------------------------------------------------------------

    def save_state(self) -> dict[str, Any]:
        """What a resumed run needs to go on in the middle of every episode, as far as the environments can tell."""
        inside = self.env.save_state()
        return {
            "environments": _portable(inside, f"the state of {self.env.config.id}"),
            "observations": _portable(self.observations, "observations"),
            "masks": _portable(self.masks, "masks"),
            "states": self.states,
            "return_so_far": torch.from_numpy(self.return_so_far.copy()),
            "length_so_far": torch.from_numpy(self.length_so_far.copy()),
        }

    def load_state(self, state: Mapping[str, Any], step: int) -> bool:
        """Go on where `save_state` was; False where the episodes had to start anew."""
        if state["environments"] is None:
            # other episodes than those that the run began with; environments in C++ take 31 bits
            self.seed = (self.seed + 1_000_003 * step) % (2**31 - 2**16)
            return False
        self.env.reset(self.seed)
        self.env.load_state(_from_portable(state["environments"]))
        self.observations = _from_portable(state["observations"])
        self.masks = _from_portable(state["masks"])
        states = state["states"]
        self.states = None if states is None or self.policy is None else states.to(self.policy.device)
        self.return_so_far = state["return_so_far"].numpy().copy()
        self.length_so_far = state["length_so_far"].numpy().copy()
        return True


def _flat_array(grid: Array, kept: Array | None) -> Array:
    flat = grid.reshape(-1, *grid.shape[2:])
    return flat if kept is None else flat[kept]


def _assign(target: Any, row: int, source: Any, index: int) -> None:
    if isinstance(target, dict):
        for name in target:
            target[name][row] = source[name][index]
    else:
        target[row] = source[index]


def _tensors(value: Any) -> Any:
    return {k: torch.from_numpy(v) for k, v in value.items()} if isinstance(value, dict) else torch.from_numpy(value)


def _to(value: Any, device: torch.device) -> Any:
    return {k: v.to(device) for k, v in value.items()} if isinstance(value, dict) else value.to(device)


def _portable(value: Any, where: str) -> Any:
    """Numpy arrays as tensors and numpy numbers as Python's, so that a checkpoint holds no pickled code."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"array": torch.from_numpy(value.copy()) if value.ndim else value.item(), "dtype": str(value.dtype)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {"dict": {k: _portable(v, f"{where}[{k!r}]") for k, v in value.items()}}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_portable(v, f"{where}[{i}]") for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise HeelerError(
        f"{where} is a {type(value).__name__}: let get_state return numbers, text, arrays of numbers, and lists, tuples"
        " and dicts of them"
    )


def _from_portable(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "array" in value:
        content = value["array"]
        return (
            content.numpy().astype(value["dtype"])
            if isinstance(content, torch.Tensor)
            else np.array(content, value["dtype"])
        )
    if "dict" in value:
        return {k: _from_portable(v) for k, v in value["dict"].items()}
    if "list" in value:
        return [_from_portable(v) for v in value["list"]]
    return tuple(_from_portable(v) for v in value["tuple"])

"""The scoring stage of text runs: rewards, old and reference log-probabilities, values, KL shaping, and its checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from heeler.policies.inputs import TokenInputs
from heeler.ppo.kl import kl_estimate, next_kl_coef
from heeler.ppo.minibatches import budgeted_microbatches, decision_indices
from heeler.ppo.moments import RunningMoments, moments, whiten
from heeler.ppo.shaping import segment_sums, segment_weights, shape_rewards
from heeler.train.ppo import TrainState
from heeler.types import CheckFailed, HeelerError, PolicyOutput, Reduce, Rollout, ScoredRollout

if TYPE_CHECKING:
    from heeler.policies.language_model import LanguageModelPolicy
    from heeler.train.text import TextRun

# How far engine and trainer, or policy and reference at the start, may lie apart: mean nats a token.
LOGPROB_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
ROUNDING = 1e-5  # nats a token: nearer log-probabilities of the same weights are equal, but for the paths they took
KEPT_PASSES = 4  # of the token budget: a rollout up to this size is kept with its gradients from scoring to update
PROBED = 2  # sequences, or an eighth, that the trainer scores too where the engine's log-probabilities are taken


def scale_of(moments: RunningMoments) -> float:
    """What `--shaping.scale` divides by: the scores' deviation, or 1 where they differ by no more than rounding."""
    std = float(moments.var.sqrt())
    return std if std > 1e-4 * abs(float(moments.mean)) else 1.0


def make_score(run: TextRun) -> Callable[[Rollout, TrainState], tuple[ScoredRollout, dict[str, float]]]:
    """The scoring stage: rewards, old and reference log-probabilities, values, KL shaping, and its checks."""
    config, policy, reduce = run.config, run.policy, run.reduce
    tolerance = LOGPROB_TOLERANCE[policy.precision]

    def score(rollout: Rollout, state: TrainState) -> tuple[ScoredRollout, dict[str, float]]:
        inputs = rollout.inputs
        assert isinstance(inputs, TokenInputs)
        output = run.judged(rollout)
        device = rollout.behavior_logprobs.device
        scores = output.scores.to(device)
        if not bool(torch.isfinite(scores).all()):
            raise CheckFailed(
                "the reward is not finite for at least one completion: look at the reward model's weights"
            )
        if bool((rollout.policy_versions != state.step).any()):
            raise CheckFailed(
                f"the engine sampled with the weights of update {int(rollout.policy_versions.min())}, but update"
                f" {state.step} was published"
            )
        token_rewards = None if output.token_rewards is None else _flat_rewards(output.token_rewards, rollout)
        if config.shaping.scale:
            run.score_moments = run.score_moments.merge(scores, reduce)
        std = scale_of(run.score_moments)
        if token_rewards is None:
            paid = config.shaping.apply(scores, std)
        else:
            token_rewards = config.shaping.apply(token_rewards, std)
            paid = segment_sums(token_rewards, rollout.offsets)

        bootstrapping = config.truncation == "bootstrap"
        old, ref = torch.empty_like(rollout.behavior_logprobs), torch.empty_like(rollout.behavior_logprobs)
        values, after = torch.empty_like(old), torch.zeros_like(scores)
        shares = policy.shares_prompts and not bootstrapping  # values after the end want rows of their own
        neighbours = inputs.neighbours if shares else None

        def split(tokens: int) -> Sequence[torch.Tensor]:
            shared = None if neighbours is None else (neighbours[0].cpu(), neighbours[1].cpu())
            return budgeted_microbatches(torch.arange(len(inputs.lengths)), inputs.costs.cpu(), tokens, shared)

        attached: list[tuple[torch.Tensor, PolicyOutput]] = []
        keeps = run.keeps_first_pass and int(inputs.lengths.sum()) <= KEPT_PASSES * state.passes.tokens

        def read(passes: Sequence[torch.Tensor]) -> None:
            attached.clear()  # of passes that did not fit
            for items in passes:
                items = items.to(device)
                indices = decision_indices(items, inputs.decision_counts)
                said, ref_logprobs, last = policy.score(
                    inputs.select(items),
                    last_values=bootstrapping,
                    known=rollout.behavior_logprobs[indices] if run.trusts_engine else None,
                    final_states=None if rollout.final_states is None else rollout.final_states[indices],
                    attached=keeps,
                )
                if keeps:
                    attached.append((items, said))
                old[indices], values[indices] = said.logprobs.detach(), said.values.detach()
                ref[indices] = ref_logprobs
                after[items] = last

        state.passes.fit(split, read)
        behavior = rollout.behavior_logprobs
        gaps = [] if run.trusts_engine else [behavior - old]
        if run.trusts_engine or inputs.trunk_states is not None:  # which are the engine's too
            gaps.append(probe(policy, inputs, behavior))
        gap = max((mean_size(gap, reduce) for gap in gaps), key=lambda size: math.inf if math.isnan(size) else size)
        check_paths(gap, mean_size(old - ref, reduce), state.step, tolerance)
        # A policy that has not moved pays no penalty: Adam would make whole steps of the gradient of rounding errors.
        apart = torch.where((old - ref).abs() > ROUNDING, ref, old)
        kl = kl_estimate(old, apart, config.kl_estimator)
        sequence_kl = segment_sums(kl_estimate(old, ref, "k1"), rollout.offsets)
        cut = rollout.truncated
        nothing = torch.zeros_like(cut)
        withheld = cut if bootstrapping and run.rewards_are_scores else nothing
        rewards = shape_rewards(paid, token_rewards, kl, state.kl_coef, rollout.offsets, withheld)
        weights = segment_weights(
            rollout.offsets, cut if config.truncation == "drop" else nothing, config.loss_weighting
        )
        if config.shaping.whiten:
            rewards = whiten(rewards, (weights > 0).float(), reduce, keep_mean=True)
        scored = ScoredRollout(
            rollout=rollout, scores=scores, rewards=rewards, old_logprobs=old, ref_logprobs=ref, values=values,
            bootstrap=torch.where(cut, after, torch.zeros_like(after)) if bootstrapping else torch.zeros_like(after),
            policy_weights=weights, value_weights=weights, components=output.components, attached=attached,
        )  # fmt: skip
        ones = torch.ones_like(scores)
        mean, variance = moments(scores, ones, reduce)
        mean_kl = float(moments(sequence_kl, ones, reduce)[0])
        metrics = {
            "reward/mean": float(mean),
            "reward/std": float(variance.sqrt()),
            **{
                f"reward/{name}": float(moments(x.to(device), ones, reduce)[0]) for name, x in output.components.items()
            },
            "kl/ref": mean_kl,
            "kl/coef": state.kl_coef,
            "completion/length": float(moments(rollout.offsets.diff().float(), ones, reduce)[0]),
            "completion/truncated_fraction": float(moments(cut.float(), ones, reduce)[0]),
            "engine/logprob_gap": gap,
            **{name: float(moments(x.float(), ones, reduce)[0]) for name, x in run.episode_figures(rollout).items()},
        }
        state.kl_coef = next_kl_coef(config.kl, state.kl_coef, mean_kl, len(scores) * reduce.world_size)
        return scored, metrics

    return score


def probe(policy: LanguageModelPolicy, inputs: TokenInputs, logprobs: torch.Tensor) -> torch.Tensor:
    """The engine's less the trainer's log-probabilities of a few sequences' decisions, computed from the tokens."""
    count = len(inputs.lengths)
    probed = min(PROBED, -(-count // 8))
    items = torch.linspace(0, count - 1, probed, device=inputs.lengths.device).long()
    alone = replace(inputs.select(items), trunk_states=None)
    return logprobs[decision_indices(items, inputs.decision_counts)] - policy.logprobs(alone)


def mean_size(differences: torch.Tensor, reduce: Reduce) -> float:
    """The mean absolute value, over all processes."""
    sums = torch.tensor([float(differences.abs().sum()), float(len(differences))], dtype=torch.float64)
    total, count = (float(x) for x in reduce.sum(sums))
    return total / count if count else 0.0


def check_paths(gap: float, from_reference: float, step: int, tolerance: float) -> None:
    """Engine against trainer (every rollout is the probe of the publish before it), and policy against reference.

    Both are mean absolute differences in nats a token, of all processes, so all of them stop or none.
    """
    if not (math.isfinite(gap) and math.isfinite(from_reference)):
        raise CheckFailed(
            "a log-probability is not finite: the model's weights or logits hold NaN; lower the learning rate"
        )
    if gap > tolerance:
        raise CheckFailed(
            f"engine and trainer differ by {gap:.2g} nats a token (tolerance {tolerance:g}) at update {step + 1}"
            ": the engine samples other weights or another distribution than the trainer scores; look at publish, at"
            " the temperature, and at the precision of both"
        )
    if step == 0 and from_reference > tolerance:
        raise CheckFailed(
            f"policy and reference differ by {from_reference:.2g} nats a token before the first"
            " update: they must be the same model on the same numeric path; look at the reference's weights"
        )


def _flat_rewards(token_rewards: Sequence[Sequence[float]], rollout: Rollout) -> torch.Tensor:
    lengths = rollout.offsets.diff().tolist()
    for index, (given, length) in enumerate(zip(token_rewards, lengths, strict=True)):
        if len(given) != length:
            raise HeelerError(
                f"the reward function returned {len(given)} token rewards for completion {index + 1}, which has"
                f" {length} tokens"
            )
    flat = [value for given in token_rewards for value in given]
    return torch.tensor(flat, dtype=torch.float32, device=rollout.behavior_logprobs.device)

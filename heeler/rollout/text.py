"""Collecting completions: which prompts an update sees, and how completions become packed decisions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heeler.data.prompts import PromptSet
from heeler.policies.inputs import TokenInputs
from heeler.rollout.engines.draws import draw_seed
from heeler.types import Completion, Engine, Reduce, Request, Rollout, Samples, Sampling


def prompts_of_update(num_prompts: int, per_update: int, step: int, seed: int) -> list[int]:
    """The prompts of update `step`: walks through seeded shuffles of the whole set, one after the other.

    A pure function of the step, so a resumed run continues where it stopped.
    """
    chosen: list[int] = []
    position = step * per_update
    while len(chosen) < per_update:
        epoch, start = divmod(position + len(chosen), num_prompts)
        order = np.random.default_rng(draw_seed(seed, 0x5EED, epoch)).permutation(num_prompts)
        chosen += order[start : start + per_update - len(chosen)].tolist()
    return chosen


class TextCollector:
    """Samples completions with the policy that was last published; implements `heeler.types.Collector`.

    Args:
        engine: what samples.
        tokenizer: decodes completions for the rewards.
        prompts: the prompt set.
        sampling: length cap and temperature.
        prompts_per_update: global number of prompts; processes share them evenly.
        samples_per_prompt: completions of each prompt.
        seed: of the prompts' order and of every draw.
        reduce: which share of the prompts is this process's.
        device: where the rollout's tensors go.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        prompts: PromptSet,
        sampling: Sampling,
        *,
        prompts_per_update: int,
        samples_per_prompt: int,
        seed: int,
        reduce: Reduce,
        device: torch.device,
    ) -> None:
        self.engine, self.tokenizer, self.prompts, self.sampling = engine, tokenizer, prompts, sampling
        self.prompts_per_update, self.samples_per_prompt = prompts_per_update, samples_per_prompt
        self.seed, self.reduce, self.device = seed, reduce, device

    def publish(self, policy: Any, version: int) -> None:
        self.engine.begin()
        self.engine.load(policy.published())
        self.engine.commit(version)

    def collect(self, step: int) -> Rollout:
        chosen = prompts_of_update(len(self.prompts), self.prompts_per_update, step, self.seed)
        seen: Counter[int] = Counter()  # a prompt that comes twice in an update gets further sample ids, not the same
        pairs: list[tuple[int, int]] = []
        for index in chosen:
            for _ in range(self.samples_per_prompt):
                pairs.append((index, seen[index]))
                seen[index] += 1
        n = self.samples_per_prompt
        mine = [pair for k, pair in enumerate(pairs) if (k // n) % self.reduce.world_size == self.reduce.rank]
        indices, samples = [index for index, _ in mine], [sample for _, sample in mine]
        seeds = [draw_seed(self.seed, step, i, s) for i, s in zip(indices, samples, strict=True)]
        return self.sample(indices, samples, seeds)

    def sample(self, indices: Sequence[int], samples: Sequence[int], seeds: Sequence[int]) -> Rollout:
        """The rollout of these prompts; `samples` number the completions of one prompt, `seeds` are their draws'."""
        return sample_rollout(
            self.engine, self.tokenizer, self.prompts, indices, samples, seeds, self.sampling, self.device
        )


def sample_rollout(
    engine: Engine,
    tokenizer: Any,
    prompts: PromptSet,
    indices: Sequence[int],
    samples: Sequence[int],
    seeds: Sequence[int],
    sampling: Sampling,
    device: torch.device,
) -> Rollout:
    """Sample one completion for each of `indices` (into `prompts`) and pack them; tensors lie on `device`."""
    requests = [Request(prompt=prompts.tokens[i], seed=seed) for i, seed in zip(indices, seeds, strict=True)]
    completions = engine.generate(requests, sampling)
    texts = [decode(tokenizer, c) for c in completions]
    lengths = torch.tensor([len(c.tokens) for c in completions], device=device)
    versions = torch.tensor([c.version for c in completions], device=device)
    stopped = torch.tensor([c.finish_reason == "stop" for c in completions], device=device)
    return Rollout(
        inputs=pack([r.prompt for r in requests], completions, device),
        offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        actions=torch.tensor([token for c in completions for token in c.tokens], device=device),
        behavior_logprobs=torch.cat([c.logprobs for c in completions]).to(device),
        policy_versions=torch.repeat_interleave(versions, lengths),
        terminated=stopped,
        truncated=~stopped,
        prompt_ids=torch.tensor(indices),
        group_ids=torch.tensor(indices),
        sample_ids=torch.tensor(samples),
        prompts=[prompts.prompts[i] for i in indices],
        completions=texts,
        columns={name: [column[i] for i in indices] for name, column in prompts.columns.items()},
        final_states=final_states(completions, device),
    )


def samples_of(rollout: Rollout) -> Samples:
    """What a reward sees of a rollout of texts."""
    actions, offsets = rollout.actions.tolist(), rollout.offsets.tolist()
    return Samples(
        prompts=rollout.prompts,
        completions=rollout.completions,
        columns=rollout.columns,
        completion_ids=[actions[start:end] for start, end in pairwise(offsets)],
        truncated=rollout.truncated.tolist(),
    )


def decode(tokenizer: Any, completion: Completion, *, keep_stop: bool = False) -> str:
    """The text of a completion, without its end-of-sequence token, up to the stop string that ended it.

    With `keep_stop` that string is the end of the text. What its last token holds beyond it is left out in any case.
    """
    tokens = list(completion.tokens)
    if completion.finish_reason == "stop" and completion.stop_string is None:
        tokens = tokens[:-1]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    stop = completion.stop_string
    cut = -1 if stop is None else text.rfind(stop)
    if stop is None or cut < 0:
        return text
    return text[: cut + len(stop)] if keep_stop else text[:cut]


def pack(prompts: Sequence[Sequence[int]], completions: Sequence[Completion], device: torch.device) -> TokenInputs:
    """Prompts and completions behind one another; only the completions' tokens are decisions."""
    tokens: list[int] = []
    lengths: list[int] = []
    is_decision: list[Tensor] = []
    states: list[Tensor] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens += [*prompt, *completion.tokens]
        lengths.append(len(prompt) + len(completion.tokens))
        is_decision += [
            torch.zeros(len(prompt), dtype=torch.bool),
            torch.ones(len(completion.tokens), dtype=torch.bool),
        ]
        if completion.trunk_states is not None:
            states += [completion.trunk_states, completion.trunk_states.new_zeros(1, completion.trunk_states.shape[1])]
    return TokenInputs(
        tokens=torch.tensor(tokens, device=device),
        lengths=torch.tensor(lengths, device=device),
        is_decision=torch.cat(is_decision).to(device),
        trunk_states=torch.cat(states).to(device) if states else None,
    )


def final_states(completions: Sequence[Completion], device: torch.device) -> Tensor | None:
    """`[N, H]` of all completions behind one another, or None where the engine kept none."""
    kept = [c.final_states for c in completions if c.final_states is not None]
    return torch.cat(kept).to(device) if kept and len(kept) == len(completions) else None

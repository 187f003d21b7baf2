"""What sampling a batch keeps about its requests, whatever model draws the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from heeler.rollout.engines.draws import sample, uniforms
from heeler.rollout.engines.stopping import StopStrings
from heeler.types import Completion, Request, Sampling

LEAVE_FRACTION = 0.125  # finished rows are dropped once they are this share of the batch: dropping copies the cache


def every_prompt(requests: Sequence[Request]) -> tuple[list[tuple[int, ...]], Tensor]:
    """The prompts of the requests, and `[B]` the prompt of each."""
    return [tuple(r.prompt) for r in requests], torch.arange(len(requests))


def distinct_prompts(requests: Sequence[Request]) -> tuple[list[tuple[int, ...]], Tensor]:
    """The different prompts of the requests, and `[B]` the prompt of each."""
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(r.prompt) for r in requests))}
    return list(number), torch.tensor([number[tuple(r.prompt)] for r in requests])


class SampledBatch:
    """The tokens of B requests as they are drawn, and which of them have ended.

    Args:
        requests: of the batch.
        sampling: length cap, temperature and stop strings.
        eos_ids: tokens that end a completion, on the model's device.
        token_bias: `[V]` added to the logits, or None.
        tokenizer: finds stop strings.
        on_progress: called with the tokens of every step, or None.

    Attributes:
        alive: `[b]` the request of each row that is still in the model's batch.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        eos_ids: Tensor,
        token_bias: Tensor | None,
        tokenizer: Any,
        on_progress: Callable[[int], Any] | None,
    ) -> None:
        count, cap = len(requests), sampling.max_new_tokens
        self.temperature, self.eos_ids, self.token_bias = sampling.temperature, eos_ids, token_bias
        self.on_progress = on_progress
        self.stops = StopStrings(tokenizer, sampling.stop)
        self.stop_strings: list[str | None] = [None] * count
        self.uniforms = uniforms([r.seed for r in requests], cap)
        self.tokens = torch.zeros(count, cap, dtype=torch.long)
        self.logprobs = torch.zeros(count, cap)
        self.lengths = torch.full((count,), cap)
        self.stopped = torch.zeros(count, dtype=torch.bool)
        self.alive = torch.arange(count)

    def draw(self, t: int, logits: Tensor) -> Tensor:
        """Draw token `t` of every row from `logits [b, V]`; returns the tokens `[b]` on the model's device."""
        alive = self.alive
        drawn, logprobs = sample(logits, self.uniforms[alive, t], self.temperature, self.token_bias)
        self.tokens[alive, t], self.logprobs[alive, t] = drawn.cpu(), logprobs.cpu()
        if self.on_progress is not None:
            self.on_progress(int((~self.stopped[alive]).sum()))
        ended = torch.isin(drawn, self.eos_ids).cpu()
        if self.stops.stop:
            for i, row in enumerate(alive.tolist()):
                if not ended[i] and not self.stopped[row]:
                    self.stop_strings[row] = self.stops.hit(self.tokens[row, : t + 1].tolist())
                    ended[i] = self.stop_strings[row] is not None
        fresh = alive[ended & ~self.stopped[alive]]
        self.lengths[fresh], self.stopped[fresh] = t + 1, True
        return drawn

    @property
    def over(self) -> bool:
        """Every row has ended."""
        return bool(self.stopped[self.alive].all())

    def leave(self) -> Tensor | None:
        """Drop the finished rows where they are enough; the rows that stay, on the model's device, or None."""
        done = self.stopped[self.alive]
        if float(done.float().mean()) < LEAVE_FRACTION:
            return None
        stay = (~done).nonzero()[:, 0]
        self.alive = self.alive[stay]
        return stay.to(self.eos_ids.device)

    def completion(self, row: int, version: int, trunk_states: Tensor | None = None) -> Completion:
        """What request `row` got."""
        n = int(self.lengths[row])
        return Completion(
            tokens=self.tokens[row, :n].tolist(),
            logprobs=self.logprobs[row, :n].clone(),
            finish_reason="stop" if bool(self.stopped[row]) else "length",
            version=version,
            stop_string=self.stop_strings[row],
            trunk_states=trunk_states,
        )

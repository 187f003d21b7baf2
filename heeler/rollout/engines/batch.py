"""What Heeler's own engines share: their options, and the tokens of requests as they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from heeler.rollout.engines.draws import sample, uniforms
from heeler.rollout.engines.packing import WORTH_STEPS, Packing
from heeler.rollout.engines.stopping import StopStrings
from heeler.rollout.engines.weights import WeightReceiver
from heeler.types import Completion, Request, Sampling

LEAVE_FRACTION = 0.125  # finished rows are dropped once they are this share of the batch: dropping copies the cache
LEAVE_FRACTION_FREE = 0.03  # where nothing is copied; a library of products still prepares for every number of rows
LEAVE_FRACTION_PACKED = 0.25  # and where the weights must be packed anew for another number of rows

LOOK_EVERY = 8  # steps between two looks at what was drawn, where a look makes the host wait for the device

PART_TOKENS = 512  # products of fewer rows are slower


def every_prompt(requests: Sequence[Request]) -> tuple[list[tuple[int, ...]], Tensor]:
    """The prompts of the requests, and `[B]` the prompt of each."""
    return [tuple(r.prompt) for r in requests], torch.arange(len(requests))


def distinct_prompts(requests: Sequence[Request]) -> tuple[list[tuple[int, ...]], Tensor]:
    """The different prompts of the requests, and `[B]` the prompt of each."""
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(r.prompt) for r in requests))}
    return list(number), torch.tensor([number[tuple(r.prompt)] for r in requests])


class BatchEngine(WeightReceiver):
    """The options of an engine that samples batches of rows.

    Args:
        model: a transformers LM that belongs to the engine.
        eos_ids: tokens that end a completion.
        max_rows: rows sampled at once.
        token_bias: `[V]` added to the logits (a token mask), or None.
        tokenizer: finds stop strings; needed only where `Sampling.stop` is used.
        share_prompts: read a prompt of several requests once.
        pack_weights: lay the weights out for the number of rows while it stays the same, where that is faster.

    Attributes:
        look_every: the most steps that are drawn before the host looks at them: 1 on a CPU, where a look costs nothing.
            It changes speed only: what is drawn for a request after its end is not kept.
        on_progress: called with the number of tokens of every step when it is looked at, or None.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_ids: Sequence[int],
        max_rows: int = 128,
        token_bias: Tensor | None = None,
        tokenizer: Any = None,
        share_prompts: bool = True,
        pack_weights: bool = True,
    ) -> None:
        super().__init__(model)
        self.pack_weights = pack_weights
        self.packing = Packing()
        self.tokenizer, self.max_rows, self.share_prompts = tokenizer, max_rows, share_prompts
        self.device = next(model.parameters()).device
        self.eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.long)
        self.token_bias = None if token_bias is None else token_bias.float().contiguous().to(self.device)
        self.look_every = 1 if self.device.type == "cpu" else LOOK_EVERY
        self.on_progress: Callable[[int], Any] | None = None

    def prompts_of(self, requests: Sequence[Request]) -> tuple[list[tuple[int, ...]], Tensor]:
        """What is read for these requests, and `[B]` which of it is each one's prompt."""
        return distinct_prompts(requests) if self.share_prompts else every_prompt(requests)


def by_length(requests: Sequence[Request]) -> list[int]:
    """The requests in order of their prompts' lengths, those of one prompt side by side."""
    return sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt), tuple(requests[i].prompt)))


def similar_lengths(prompts: Sequence[Sequence[int]]) -> list[slice]:
    """Parts of prompts in order of length (the longest part first) whose padding is not worth another pass.

    A part is closed where the next prompt is shorter than three quarters of its width, and it and what is left have
    `PART_TOKENS` tokens each. A prompt of several samples, which stand side by side, counts once.
    """
    counts = [len(p) if i == 0 or p != prompts[i - 1] else 0 for i, p in enumerate(prompts)]
    parts: list[slice] = []
    end, tokens, left = len(prompts), 0, sum(counts)
    for i in range(len(prompts) - 1, -1, -1):
        shorter = len(prompts[i]) < 0.75 * len(prompts[end - 1])
        if shorter and tokens >= PART_TOKENS and left >= PART_TOKENS:
            parts.append(slice(i + 1, end))
            end, tokens = i + 1, 0
        tokens += counts[i]
        left -= counts[i]
    return [*parts, slice(0, end)]


class Draws:
    """The tokens of requests as they are drawn, and which requests have ended.

    Tokens are drawn on the model's device. The host learns of them when it looks, once in `engine.look_every` steps.

    Args:
        requests: in the order of the rows.
        sampling: how they are drawn, the length cap and the stop strings.
        engine: its ends of sequence, token bias, tokenizer and progress.

    Attributes:
        counts: `[R]` tokens that each request has.
        stopped: `[R]` it ended by an end of sequence or a stop string.
        finished: `[R]` it ended, the length cap included.
        unseen: `(tokens [b], log-probabilities [b], states)` of the steps since the last look, on the device.
    """

    def __init__(self, requests: Sequence[Request], sampling: Sampling, engine: BatchEngine) -> None:
        count, self.cap = len(requests), sampling.max_new_tokens
        self.sampling, self.engine = sampling, engine
        self.stops = StopStrings(engine.tokenizer, sampling.stop)
        self.stop_strings: list[str | None] = [None] * count
        self.uniforms = uniforms([r.seed for r in requests], self.cap).to(engine.device)
        self.tokens = torch.zeros(count, self.cap, dtype=torch.long)
        self.logprobs = torch.zeros(count, self.cap)
        self.counts = torch.zeros(count, dtype=torch.long)
        self.stopped = torch.zeros(count, dtype=torch.bool)
        self.finished = torch.zeros(count, dtype=torch.bool)
        self.unseen: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
        self._of_rows, self._at, self._steps = self.tokens, self.counts, 0  # of the steps until the next look

    def draw(self, rows: Tensor, logits: Tensor, states: dict[str, Tensor] | None = None) -> Tensor:
        """The next token of the requests `rows [b]` from `logits [b, V]`: `[b]` on the model's device.

        `rows` are the same until the next look; `states` are kept beside the tokens for it.
        """
        if not self.unseen:
            device = self.engine.device
            self._of_rows = rows.to(device, non_blocking=True)
            self._at = self.counts[rows].to(device, non_blocking=True)
            self._steps = min(self.engine.look_every, self.steps_left(rows))
        at = (self._at + len(self.unseen)).clamp_(max=self.cap - 1)
        drawn, logprobs = sample(logits, self.uniforms[self._of_rows, at], self.sampling, self.engine.token_bias)
        self.unseen.append((drawn, logprobs, states or {}))
        return drawn

    @property
    def time_to_look(self) -> bool:
        """Whether the host should look before the next step."""
        return len(self.unseen) >= self._steps

    def look(self, rows: Tensor) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Fetch what was drawn for `rows [b]` and keep what belongs to requests that had not ended.

        Returns for each step `[b]` which rows were still going, and its states on the host.
        """
        drawn = torch.stack([tokens for tokens, _, _ in self.unseen]).cpu()
        logprobs = torch.stack([logp for _, logp, _ in self.unseen]).cpu()
        names = self.unseen[0][2].keys()
        states = {name: torch.stack([kept[name] for _, _, kept in self.unseen]).cpu() for name in names}
        ends = torch.isin(drawn, self.engine.eos_ids)
        self.unseen = []
        seen: list[tuple[Tensor, dict[str, Tensor]]] = []
        for step in range(len(drawn)):
            live = ~self.finished[rows]
            seen.append((live, {name: of[step] for name, of in states.items()}))
            going, ended = rows[live], ends[step][live]
            at = self.counts[going]
            self.tokens[going, at], self.logprobs[going, at] = drawn[step][live], logprobs[step][live]
            self.counts[going] += 1
            if self.stops.stop:
                for i, row in enumerate(going.tolist()):
                    if not ended[i]:
                        self.stop_strings[row] = self.stops.hit(self.tokens[row, : int(at[i]) + 1].tolist())
                        ended[i] = self.stop_strings[row] is not None
            self.stopped[going[ended]] = True
            self.finished = self.stopped | (self.counts == self.cap)
            if self.engine.on_progress is not None:
                self.engine.on_progress(len(going))
        return seen

    def steps_left(self, rows: Tensor) -> int:
        """Steps until the last of `rows` reaches the length cap."""
        return self.cap - int(self.counts[rows[~self.finished[rows]]].min())

    def enough_to_leave(self, rows: Tensor, copies: bool = True) -> bool:
        """Whether the ended ones of `rows` are worth the step without them, for which keys and values may be copied."""
        ended = float(self.finished[rows].float().mean())
        if self.engine.packing.fits_any or self.engine.packing.rows != len(rows):
            return ended >= (LEAVE_FRACTION if copies else LEAVE_FRACTION_FREE)
        return ended >= LEAVE_FRACTION_PACKED and self.steps_left(rows) >= WORTH_STEPS

    def completion(self, row: int, **states: Tensor | None) -> Completion:
        """What request `row` got; `states` are those of a completion."""
        n = int(self.counts[row])
        return Completion(
            tokens=self.tokens[row, :n].tolist(),
            logprobs=self.logprobs[row, :n].clone(),
            finish_reason="stop" if bool(self.stopped[row]) else "length",
            version=self.engine.version,
            stop_string=self.stop_strings[row],
            **states,
        )

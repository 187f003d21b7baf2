"""Batched sampling from encoder-decoder models.

A batch of sources is encoded once; the decoder then goes on token by token, with the keys and values of what it has
written and of the source kept. Finished rows leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from heeler.policies.loading import decoder_start_id
from heeler.rollout.engines.draws import sample, uniforms
from heeler.rollout.engines.native import LEAVE_FRACTION
from heeler.rollout.engines.stopping import StopStrings
from heeler.rollout.engines.weights import WeightReceiver
from heeler.types import Completion, Request, Sampling


class Seq2SeqEngine(WeightReceiver):
    """Samples in batches of `max_rows`; implements `heeler.types.Engine`. Requests' prompts are the sources.

    Tokens that `generate` would force (`forced_bos_token_id` and the like) are drawn as all others are.

    Args:
        model: a transformers encoder-decoder LM of its own.
        eos_ids: tokens that end a completion.
        max_rows: completions sampled at once.
        token_bias: `[V]` added to the logits (a token mask), or None.
        tokenizer: only where `Sampling.stop` is used.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_ids: Sequence[int],
        max_rows: int = 128,
        token_bias: Tensor | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(model)
        self.decoder_start = decoder_start_id(model)
        self.tokenizer, self.max_rows = tokenizer, max_rows
        self.device = next(model.parameters()).device
        self.eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.long, device=self.device)
        self.token_bias = None if token_bias is None else token_bias.to(self.device)
        self.on_progress: Callable[[int], Any] | None = None  # called with the tokens of every step

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.check_ready()
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        completions: dict[int, Completion] = {}
        for start in range(0, len(order), self.max_rows):
            rows = order[start : start + self.max_rows]
            completions.update(zip(rows, self._batch([requests[i] for i in rows], sampling), strict=True))
        return [completions[i] for i in range(len(requests))]

    def _encode(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
        """`(states [B, S, H], mask [B, S])` of the sources, padded on the right."""
        width = max(len(r.prompt) for r in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, : len(request.prompt)] = torch.tensor(request.prompt)
            mask[row, : len(request.prompt)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        return self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state, mask

    def _batch(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        count, cap = len(requests), sampling.max_new_tokens
        encoded, mask = self._encode(requests)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        u = uniforms([r.seed for r in requests], cap)
        stops = StopStrings(self.tokenizer, sampling.stop)
        stop_strings: list[str | None] = [None] * count
        tokens = torch.zeros(count, cap, dtype=torch.long)
        logprobs = torch.zeros(count, cap)
        sampled = torch.full((count,), cap)
        stopped = torch.zeros(count, dtype=torch.bool)
        alive = torch.arange(count)  # the request of each row of the batch
        ids = torch.full((count, 1), self.decoder_start, device=self.device)
        for t in range(cap):
            output = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded),  # pyright: ignore
                attention_mask=mask,
                decoder_input_ids=ids,
                past_key_values=cache,
                use_cache=True,
            )
            drawn, drawn_logprobs = sample(output.logits[:, -1], u[alive, t], sampling.temperature, self.token_bias)
            tokens[alive, t], logprobs[alive, t] = drawn.cpu(), drawn_logprobs.cpu()
            if self.on_progress is not None:
                self.on_progress(int((~stopped[alive]).sum()))
            ended = torch.isin(drawn, self.eos_ids).cpu()
            if stops.stop:
                for i, row in enumerate(alive.tolist()):
                    if not ended[i] and not stopped[row]:
                        stop_strings[row] = stops.hit(tokens[row, : t + 1].tolist())
                        ended[i] = stop_strings[row] is not None
            fresh = alive[ended & ~stopped[alive]]
            sampled[fresh], stopped[fresh] = t + 1, True
            done = stopped[alive]
            if bool(done.all()):
                break
            ids = drawn[:, None]
            if float(done.float().mean()) >= LEAVE_FRACTION:
                stay = (~done).nonzero()[:, 0]
                alive = alive[stay]
                stay = stay.to(self.device)
                ids, mask, encoded = ids[stay], mask[stay], encoded[stay]
                cache.batch_select_indices(stay)
        return [
            Completion(
                tokens=tokens[row, :n].tolist(),
                logprobs=logprobs[row, :n].clone(),
                finish_reason="stop" if bool(stopped[row]) else "length",
                version=self.version,
                stop_string=stop_strings[row],
            )
            for row, n in enumerate(sampled.tolist())
        ]

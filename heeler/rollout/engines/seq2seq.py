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
from heeler.rollout.engines.batch import SampledBatch, distinct_prompts, every_prompt
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
        share_prompts: encode a source of several requests once.
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
    ) -> None:
        super().__init__(model)
        self.decoder_start = decoder_start_id(model)
        self.tokenizer, self.max_rows, self.share_prompts = tokenizer, max_rows, share_prompts
        self.device = next(model.parameters()).device
        self.eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.long, device=self.device)
        self.token_bias = None if token_bias is None else token_bias.to(self.device)
        self.on_progress: Callable[[int], Any] | None = None  # called with the tokens of every step

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.check_ready()
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt), requests[i].prompt))
        completions: dict[int, Completion] = {}
        for start in range(0, len(order), self.max_rows):
            rows = order[start : start + self.max_rows]
            completions.update(zip(rows, self._batch([requests[i] for i in rows], sampling), strict=True))
        return [completions[i] for i in range(len(requests))]

    def _encode(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
        """`(states [B, S, H], mask [B, S])` of the sources, padded on the right, each distinct one encoded once."""
        prompts, owners = distinct_prompts(requests) if self.share_prompts else every_prompt(requests)
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
            mask[row, : len(prompt)] = 1
        ids, mask, owners = ids.to(self.device), mask.to(self.device), owners.to(self.device)
        states = self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        return states[owners], mask[owners]

    def _batch(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        count, cap = len(requests), sampling.max_new_tokens
        encoded, mask = self._encode(requests)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        batch = SampledBatch(requests, sampling, self.eos_ids, self.token_bias, self.tokenizer, self.on_progress)
        ids = torch.full((count, 1), self.decoder_start, device=self.device)
        for t in range(cap):
            output = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded),  # pyright: ignore
                attention_mask=mask,
                decoder_input_ids=ids,
                past_key_values=cache,
                use_cache=True,
            )
            drawn = batch.draw(t, output.logits[:, -1])
            if batch.over:
                break
            ids = drawn[:, None]
            stay = batch.leave()
            if stay is not None:
                ids, mask, encoded = ids[stay], mask[stay], encoded[stay]
                cache.batch_select_indices(stay)
        return [batch.completion(row, self.version) for row in range(count)]

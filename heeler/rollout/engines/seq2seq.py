"""Batched sampling from encoder-decoder models.

A batch of sources is encoded once; the decoder then goes on token by token, with the keys and values of what it has
written and of the source kept. Finished rows leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heeler.policies.loading import decoder_start_id
from heeler.rollout.engines.batch import BatchEngine, Draws, by_length
from heeler.rollout.engines.packing import packed_layers
from heeler.types import Completion, Request, Sampling


class Seq2SeqEngine(BatchEngine):
    """Samples in batches of `max_rows`; implements `heeler.types.Engine`. Requests' prompts are the sources.

    Tokens that `generate` would force (`forced_bos_token_id` and the like) are drawn as all others are.

    Args:
        model: an encoder-decoder LM that belongs to the engine.
        options: of `BatchEngine`.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **options)
        if self.pack_weights:
            self.packing.layers = packed_layers(nn.ModuleList([model.get_decoder(), model.get_output_embeddings()]))
        self.decoder_start = decoder_start_id(model)

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.check_ready()
        draws = Draws(requests, sampling, self)
        order = by_length(requests)
        with self.packing:
            for start in range(0, len(order), self.max_rows):
                self._batch(order[start : start + self.max_rows], requests, draws)
        return [draws.completion(row) for row in range(len(requests))]

    def _encode(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
        """`(states [B, S, H], mask [B, S])` of the sources, padded on the right, each distinct one encoded once."""
        prompts, owners = self.prompts_of(requests)
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
            mask[row, : len(prompt)] = 1
        ids, mask, owners = ids.to(self.device), mask.to(self.device), owners.to(self.device)
        states = self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        return states[owners], mask[owners]

    def _batch(self, chosen: list[int], requests: Sequence[Request], draws: Draws) -> None:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        encoded, mask = self._encode([requests[i] for i in chosen])
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        rows = torch.tensor(chosen)
        ids = torch.full((len(chosen), 1), self.decoder_start, device=self.device)
        while True:
            self.packing.fit(len(rows), draws.steps_left(rows))
            output = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded),  # pyright: ignore
                attention_mask=mask,
                decoder_input_ids=ids,
                past_key_values=cache,
                use_cache=True,
            )
            ids = draws.draw(rows, output.logits[:, -1])[:, None]
            if not draws.time_to_look:
                continue
            draws.look(rows)
            stay = (~draws.finished[rows]).nonzero()[:, 0]
            if len(stay) == 0:
                return
            if draws.enough_to_leave(rows):
                rows = rows[stay]
                stay = stay.to(self.device)
                ids, mask, encoded = ids[stay], mask[stay], encoded[stay]
                cache.batch_select_indices(stay)

"""The native engine: batched sampling from any transformers causal LM.

Prompts are padded on the left, a prompt that is sampled several times is read once, keys and values lie in
preallocated buffers, finished rows leave the batch, and no logits are kept. Where the trainer has a frozen trunk, the
hidden states at its boundary are kept on the way: the trainer then never runs the trunk at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from heeler.policies.splitting import full_attention, layer_list
from heeler.rollout.engines.batch import SampledBatch, distinct_prompts, every_prompt
from heeler.rollout.engines.weights import WeightReceiver
from heeler.types import Completion, HeelerError, Request, Sampling


def _make_cache(config: Any, capacity: int) -> Any:
    """Preallocated buffers where every layer attends to everything; transformers' own cache otherwise."""
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

    class BufferedLayer(DynamicLayer):
        """Keys and values `[B, heads, capacity, D]`, written in place; readers get the filled part."""

        def __init__(self) -> None:
            super().__init__()
            self.length = 0

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
                batch, heads, _, width = key_states.shape
                self.keys = key_states.new_empty(batch, heads, capacity, width)
                self.values = value_states.new_empty(batch, heads, capacity, value_states.shape[-1])
            end = self.length + key_states.shape[2]
            assert self.keys is not None and self.values is not None
            self.keys[:, :, self.length : end] = key_states
            self.values[:, :, self.length : end] = value_states
            self.length = end
            return self.keys[:, :, :end], self.values[:, :, :end]

        def get_seq_length(self) -> int:
            return self.length

    if not full_attention(config):
        return DynamicCache(config=config)
    return Cache(layers=[BufferedLayer() for _ in range(config.get_text_config(decoder=True).num_hidden_layers)])


class NativeEngine(WeightReceiver):
    """Samples in batches of `max_rows`; implements `heeler.types.Engine`.

    Args:
        model: a causal LM that belongs to the engine.
        eos_ids: tokens that end a completion.
        max_rows: rows sampled at once.
        trunk_layers: keep the hidden states after this many layers; None keeps nothing.
        token_bias: `[V]` added to the logits (a token mask), or None.
        tokenizer: finds stop strings; needed only where `Sampling.stop` is used.
        share_prompts: read a prompt of several requests once, where every layer attends to everything.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_ids: Sequence[int],
        max_rows: int = 128,
        trunk_layers: int | None = None,
        token_bias: Tensor | None = None,
        tokenizer: Any = None,
        share_prompts: bool = True,
    ) -> None:
        super().__init__(model)
        self.tokenizer = tokenizer
        self.share_prompts = share_prompts and full_attention(model.config)  # recurrent caches cannot be copied by rows
        self.max_rows = max_rows
        self.device = next(model.parameters()).device
        self.eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.long, device=self.device)
        self.token_bias = None if token_bias is None else token_bias.to(self.device)
        self._captured: Tensor | None = None
        self.on_progress: Callable[[int], Any] | None = None  # called with the tokens of every step
        self.keeps_states = trunk_layers is not None
        if trunk_layers is not None:
            found = layer_list(model.base_model)
            if found is None or not 1 <= trunk_layers <= len(found[1]):
                raise HeelerError(f"the engine cannot keep the states after layer {trunk_layers} of this model")
            found[1][trunk_layers - 1].register_forward_hook(self._capture)

    def _capture(self, module: Any, args: Any, output: Any) -> None:
        self._captured = output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.check_ready()
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt), requests[i].prompt))
        completions: list[Completion | None] = [None] * len(requests)
        for start in range(0, len(order), self.max_rows):
            rows = order[start : start + self.max_rows]
            for index, completion in zip(rows, self._batch([requests[i] for i in rows], sampling), strict=True):
                completions[index] = completion
        return [completion for completion in completions if completion is not None]

    def _batch(self, requests: list[Request], sampling: Sampling) -> list[Completion]:
        lengths = torch.tensor([len(r.prompt) for r in requests])
        width, cap, count = int(lengths.max()), sampling.max_new_tokens, len(requests)
        prompts, owners = distinct_prompts(requests) if self.share_prompts else every_prompt(requests)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width + cap, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        positions = (mask[:, :width].cumsum(1) - 1).clamp(min=0)
        ids, mask, positions = ids.to(self.device), mask.to(self.device), positions.to(self.device)
        batch = SampledBatch(requests, sampling, self.eos_ids, self.token_bias, self.tokenizer, self.on_progress)
        states: Tensor | None = None

        cache = _make_cache(self.model.config, width + cap)
        full_prompts = int(lengths.min()) == width  # no padding: no mask needed
        for t in range(cap):
            end = width + t
            output = self.model(
                input_ids=ids,
                attention_mask=None if full_prompts else mask[:, :end],
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits, reached = output.logits[:, -1], self._captured if self.keeps_states else None
            if t == 0 and len(prompts) < count:  # from here on every request has a row
                rows = owners.to(self.device)
                logits, positions, mask = logits[rows], positions[rows], mask[rows]
                reached = None if reached is None else reached[rows]
                cache.batch_select_indices(rows)
            if reached is not None:
                if states is None:
                    states = torch.empty(count, width + cap - 1, reached.shape[-1], dtype=reached.dtype)
                first = 0 if t == 0 else end - 1
                states[batch.alive, first:end] = reached.cpu()
            drawn = batch.draw(t, logits)
            if batch.over:
                break
            ids = drawn[:, None]
            positions = positions[:, -1:] + 1
            stay = batch.leave()
            if stay is not None:
                ids, positions, mask = ids[stay], positions[stay], mask[stay]
                cache.batch_select_indices(stay)
        self._captured = None

        completions: list[Completion] = []
        for row in range(count):
            n, pad = int(batch.lengths[row]), width - int(lengths[row])
            kept = None if states is None else states[row, pad : width + n - 1].clone()
            completions.append(batch.completion(row, self.version, kept))
        return completions

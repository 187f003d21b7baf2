"""The slow reference engine: transformers' `generate`, with the same draws as the native engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heeler.policies.attention import NAME
from heeler.rollout.engines.draws import sample, uniforms
from heeler.rollout.engines.stopping import StopStrings
from heeler.rollout.engines.weights import WeightReceiver
from heeler.types import Completion, Request, Sampling


class HFEngine(WeightReceiver):
    """`generate` one batch at a time; implements `heeler.types.Engine`.

    A logits processor draws each token with the request's own uniform number and leaves only that token possible,
    so `generate`'s own choice has nothing left to decide and both engines sample the same text.
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
        from transformers import GenerationConfig

        super().__init__(model)
        config = model.config.get_text_config(decoder=True)
        if config._attn_implementation == NAME:
            config._attn_implementation = "sdpa"  # a reference is transformers' own in everything
        model.generation_config = GenerationConfig()  # generate would take penalties and cut-offs from the model's own
        self.eos_ids, self.max_rows = sorted(eos_ids), max_rows
        self.device = next(model.parameters()).device
        self.token_bias = None if token_bias is None else token_bias.to(self.device)
        self.tokenizer = tokenizer

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.check_ready()
        completions: list[Completion] = []
        for start in range(0, len(requests), self.max_rows):
            completions += self._batch(requests[start : start + self.max_rows], sampling)
        return completions

    def _batch(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        from transformers import GenerationConfig, LogitsProcessorList

        width = max(len(r.prompt) for r in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.long)
        mask = torch.zeros(len(requests), width, dtype=torch.long)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        u = uniforms([r.seed for r in requests], sampling.max_new_tokens)
        tokens: list[Tensor] = []
        logprobs: list[Tensor] = []

        def draw(input_ids: Tensor, scores: Tensor) -> Tensor:
            drawn, drawn_logprobs = sample(scores, u[:, len(tokens)], sampling, self.token_bias)
            tokens.append(drawn.cpu())
            logprobs.append(drawn_logprobs.cpu())
            return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)

        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=self.eos_ids or None,
            pad_token_id=0,
        )
        self.model.generate(
            ids.to(self.device),
            attention_mask=mask.to(self.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([draw]),  # pyright: ignore
        )
        all_tokens, all_logprobs = torch.stack(tokens, 1), torch.stack(logprobs, 1)
        completions: list[Completion] = []
        stops = StopStrings(self.tokenizer, sampling.stop)
        for row in range(len(requests)):
            chosen = all_tokens[row].tolist()
            n, stop_string = len(chosen), None
            for t, token in enumerate(chosen, start=1):
                stop_string = None if token in self.eos_ids else stops.hit(chosen[:t])
                if token in self.eos_ids or stop_string is not None:
                    n = t
                    break
            completions.append(
                Completion(
                    tokens=chosen[:n],
                    logprobs=all_logprobs[row, :n].clone(),
                    finish_reason="stop" if chosen[n - 1] in self.eos_ids or stop_string is not None else "length",
                    stop_string=stop_string,
                    version=self.version,
                )
            )
        return completions

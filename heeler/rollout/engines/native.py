"""The native engine: batched sampling from any transformers causal LM.

    prompts, padded on the left          the pool: one row a completion, all rows end in the same column
    . . a a a  -> keys, values           . . a a a a1 a2 a3
    b b b b b                            b b b b b b1 b2 b3
                                         . . . . c c  c  c1      joined where a row had ended

A prompt that is sampled several times is read once, keys and values lie in preallocated buffers, requests that wait
take the rows of those that ended, and no logits are kept. Where the trainer has a frozen trunk, the hidden states at
its boundary are kept on the way: the trainer then never runs the trunk at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from heeler.policies.attention import use_fast_attention
from heeler.policies.splitting import full_attention, layer_list
from heeler.rollout.engines.batch import BatchEngine, Draws, by_length, similar_lengths
from heeler.rollout.engines.decoder import Decoder, can_decode
from heeler.rollout.engines.packing import packed_layers
from heeler.rollout.engines.seq2seq import Seq2SeqEngine
from heeler.types import Completion, HeelerError, Request, Sampling


@dataclass
class Kept:
    """What is kept of a request: hidden states `[n, H]` at the trunk's boundary and below the output layer."""

    trunk: list[Tensor] = field(default_factory=list[Tensor])
    final: list[Tensor] = field(default_factory=list[Tensor])

    def states(self) -> dict[str, Tensor | None]:
        """The arguments of a completion."""
        return {f"{name}_states": torch.cat(parts) if parts else None for name, parts in vars(self).items()}


@dataclass
class Pool:
    """The rows that are being sampled.

    Attributes:
        rows: `[b]` the request of each row (on the host).
        ids, positions: `[b, 1]` the last token of each, not read yet, and its position.
        last: `[b, 1]` the position at which each reaches the length cap; a row that goes on after its end stays there.
        mask: `[b, capacity]` 0 at the columns before a row's first token.
        padded: whether any row has such columns.
        cache: keys and values of `end` columns.
        end: columns that are filled.
    """

    rows: Tensor
    ids: Tensor
    positions: Tensor
    last: Tensor
    mask: Tensor
    padded: bool
    cache: Any
    end: int

    def select(self, stay: Tensor) -> None:
        """Keep the rows `stay`."""
        self.rows = self.rows[stay]
        stay = stay.to(self.ids.device)
        self.ids, self.positions, self.last = self.ids[stay], self.positions[stay], self.last[stay]
        self.mask = self.mask[stay]
        self.cache.batch_select_indices(stay)

    def join(self, stay: Tensor, other: Pool, steps: int) -> Pool:
        """The rows `stay` and all of `other`, with room for `steps` tokens more."""
        from heeler.rollout.engines.buffers import join_caches

        rows = torch.cat([self.rows[stay], other.rows])
        stay = stay.to(self.ids.device)
        positions = torch.cat([self.positions[stay], other.positions])
        width = int(positions.max())  # tokens of the longest row
        columns = torch.arange(width + steps, device=positions.device)
        return Pool(
            rows=rows,
            ids=torch.cat([self.ids[stay], other.ids]),
            positions=positions,
            last=torch.cat([self.last[stay], other.last]),
            mask=(columns >= width - positions).long(),
            padded=bool((positions != width).any()),
            cache=join_caches(self.cache, stay, other.cache, width, width + steps),
            end=width,
        )


class NativeEngine(BatchEngine):
    """Samples `max_rows` requests at once; implements `heeler.types.Engine`.

    Args:
        model: a causal LM that belongs to the engine.
        trunk_layers: keep the hidden states after this many layers; None keeps none.
        final_states: keep the final hidden state that each token was drawn from.
        options: of `BatchEngine`. Prompts are shared, and rows that ended are taken by waiting requests, where every
            layer attends to everything; elsewhere one batch follows the other.
    """

    def __init__(
        self, model: Any, *, trunk_layers: int | None = None, final_states: bool = False, **options: Any
    ) -> None:
        use_fast_attention(model)
        super().__init__(model, **options)
        self.buffered = full_attention(model.config)  # a cache of one column a token
        self.share_prompts = self.share_prompts and self.buffered
        self._captured: dict[str, Tensor] = {}
        self.decoder: Decoder | None = None  # of the call that samples
        self.trunk_layers, self.keeps_final = trunk_layers, final_states
        if final_states:
            model.base_model.register_forward_hook(partial(self._capture, "final"))
        if trunk_layers is not None:
            found = layer_list(model.base_model)
            if found is None or not 1 <= trunk_layers <= len(found[1]):
                raise HeelerError(f"the engine cannot keep the states after layer {trunk_layers} of this model")
            found[1][trunk_layers - 1].register_forward_hook(partial(self._capture, "trunk"))

    @property
    def keeps_states(self) -> bool:
        """Whether completions come with the states after the trunk."""
        return self.trunk_layers is not None

    @property
    def written_out(self) -> bool:
        """Whether the model, as it is now, samples by Heeler's own decoding step; else through transformers."""
        return can_decode(self.model) and not self._hooked()

    @property
    def attention_compiled(self) -> bool:
        """Whether single tokens attend by the compiled kernel."""
        return self.written_out and Decoder(self.model).compiled is not None

    def _capture(self, name: str, module: Any, args: Any, output: Any) -> None:
        states = output if isinstance(output, Tensor) else output[0]
        self._captured[name] = states[:, -1:] if name == "final" else states

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.check_ready()
        draws = Draws(requests, sampling, self)
        kept = [Kept() for _ in requests]
        self._choose_step()
        with self.packing:
            self._sample(requests, draws, kept)
        self._captured = {}
        return [draws.completion(row, **kept[row].states()) for row in range(len(requests))]

    def _choose_step(self) -> None:
        """Write the decoding step out where that is the model's own, as it is now."""
        self.decoder = Decoder(self.model, self.trunk_layers) if self.written_out else None
        if self.pack_weights:
            self.packing.layers = packed_layers(self.model) if self.decoder is None else self.decoder.products

    def _sample(self, requests: Sequence[Request], draws: Draws, kept: list[Kept]) -> None:
        """Draw all tokens of the requests."""
        waiting = by_length(requests)
        pool: Pool | None = None
        if self.packing.fits_any:  # prompts are read with the blocks too
            self.packing.fit(min(len(waiting), self.max_rows), draws.cap - 1)
        while waiting or pool is not None:
            if pool is None:
                chosen, waiting = waiting[: self.max_rows], waiting[self.max_rows :]
                pool = self._read(chosen, requests, draws, kept)
            else:
                self.packing.fit(len(pool.rows), draws.steps_left(pool.rows))
                self._step(pool, draws)
                if not draws.time_to_look:
                    continue
                self._look(pool, draws, kept)
            stay = (~draws.finished[pool.rows]).nonzero()[:, 0]
            if len(stay) == 0:
                pool = None
            elif self.buffered and waiting and draws.enough_to_join(pool.rows):
                room = self.max_rows - len(stay)
                chosen, waiting = waiting[:room], waiting[room:]
                newcomers = self._read(chosen, requests, draws, kept)
                rows = torch.cat([pool.rows[stay], newcomers.rows])
                pool = pool.join(stay, newcomers, draws.cap - int(draws.counts[rows].min()))
            elif draws.enough_to_leave(pool.rows):
                pool.select(stay)

    def _read(self, chosen: list[int], requests: Sequence[Request], draws: Draws, kept: list[Kept]) -> Pool:
        """Read the prompts of these requests and draw the first token of each."""
        prompts = [tuple(requests[i].prompt) for i in chosen]
        padded = self.decoder is None and self.buffered
        parts = similar_lengths(prompts) if padded else [slice(0, len(chosen))]
        pool = self._read_part(chosen[parts[0]], requests, draws, kept)
        for part in parts[1:]:
            other = self._read_part(chosen[part], requests, draws, kept)
            pool = pool.join(torch.arange(len(pool.rows)), other, draws.cap - 1)
        return pool

    def _read_part(self, chosen: list[int], requests: Sequence[Request], draws: Draws, kept: list[Kept]) -> Pool:
        from heeler.rollout.engines.buffers import make_cache

        prompts, owners = self.prompts_of([requests[i] for i in chosen])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
        first = width - lengths  # (P,) column of each prompt's first token
        columns = torch.arange(width + draws.cap)
        mask = (columns >= first[:, None]).long().to(self.device)
        positions = (columns[:width] - first[:, None]).clamp(min=0).to(self.device)
        cache = make_cache(self.model.config, width + draws.cap if self.buffered else None)
        rows = torch.tensor(chosen)
        of = owners.to(self.device)
        last = (lengths + draws.cap - 1)[:, None].to(self.device)
        pool = Pool(rows=rows, ids=ids.to(self.device), positions=positions, last=last, mask=mask,
                    padded=bool(first.any()), cache=cache, end=width)  # fmt: skip
        logits = self._forward(pool)
        for name, states in self._captured.items():
            states = states.cpu()
            for row, owner in zip(chosen, owners.tolist(), strict=True):
                begin = 0 if name == "final" else int(first[owner])
                getattr(kept[row], name).append(states[owner, begin:])
        if len(prompts) < len(chosen):  # from here on every request has a row
            logits, pool.positions, pool.last, pool.mask = logits[of], positions[of], last[of], mask[of]
            cache.batch_select_indices(of)
        self._next(pool, draws.draw(rows, logits))
        draws.look(rows)
        return pool

    def _step(self, pool: Pool, draws: Draws) -> None:
        """Read the last token of every row and draw the next."""
        pool.end += 1
        logits = self._forward(pool)
        self._next(pool, draws.draw(pool.rows, logits, dict(self._captured)))

    @staticmethod
    def _look(pool: Pool, draws: Draws, kept: list[Kept]) -> None:
        """Fetch what was drawn, and the states of the rows that were still going."""
        rows = pool.rows.tolist()
        for live, states in draws.look(pool.rows):
            for name, of in states.items():
                for i in live.nonzero()[:, 0].tolist():
                    getattr(kept[rows[i]], name).append(of[i])

    def _forward(self, pool: Pool) -> Tensor:
        """Logits `[b, V]` after the last token."""
        mask = pool.mask[:, : pool.end] if pool.padded else None
        if self.decoder is not None:
            take = self.decoder if pool.cache.get_seq_length() else self.decoder.read
            logits, trunk, final = take(pool.ids, pool.positions, mask, pool.cache)
            if trunk is not None:
                self._captured["trunk"] = trunk
            if self.keeps_final:
                self._captured["final"] = final
            return logits
        output = self.model(
            input_ids=pool.ids,
            attention_mask=mask,
            position_ids=pool.positions,
            past_key_values=pool.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _hooked(self) -> bool:
        """Whether somebody else looks into the model's passes or changes them: then transformers takes every step."""
        modules = [vars(module) for module in self.model.modules()]
        hooks = [h for m in modules for kind in ("_forward_hooks", "_forward_pre_hooks") for h in m[kind].values()]
        own = [isinstance(h, partial) and getattr(h.func, "__func__", None) is NativeEngine._capture for h in hooks]
        return not all(own) or any("forward" in m for m in modules) or bool(_has_any_global_hook())

    @staticmethod
    def _next(pool: Pool, drawn: Tensor) -> None:
        pool.ids, pool.positions = drawn[:, None], torch.minimum(pool.positions[:, -1:] + 1, pool.last)


def native_engine(model: Any, **options: Any) -> NativeEngine | Seq2SeqEngine:
    """Heeler's engine for this model, causal or encoder-decoder."""
    return (Seq2SeqEngine if model.config.is_encoder_decoder else NativeEngine)(model, **options)

"""The native engine: batched sampling from any transformers causal LM.

A prompt that is sampled several times is read once, requests that wait take the rows of those that ended, and no
logits are kept. Models whose step is written out keep keys and values in slots (slots.py), the others in padded rows
(padded.py). Where the trainer has a frozen trunk, the hidden states at its boundary are kept on the way: the trainer
then never runs the trunk at all.
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
from heeler.rollout.engines.batch import LEAVE_FRACTION, BatchEngine, Draws, by_length
from heeler.rollout.engines.decoder import Decoder, can_decode
from heeler.rollout.engines.graphs import Steps, recorder
from heeler.rollout.engines.packing import packed_layers
from heeler.rollout.engines.padded import PaddedReader, PaddedRows
from heeler.rollout.engines.seq2seq import Seq2SeqEngine
from heeler.rollout.engines.slots import SlotReader, SlotRows
from heeler.types import Completion, HeelerError, Request, Sampling


@dataclass
class Kept:
    """What is kept of a request: hidden states `[n, H]` at the trunk's boundary and below the output layer."""

    trunk: list[Tensor] = field(default_factory=list[Tensor])
    final: list[Tensor] = field(default_factory=list[Tensor])

    def states(self) -> dict[str, Tensor | None]:
        """The arguments of a completion."""
        return {f"{name}_states": torch.cat(parts) if parts else None for name, parts in vars(self).items()}


class NativeEngine(BatchEngine):
    """Samples `max_rows` requests at once; implements `heeler.types.Engine`.

    Args:
        model: a causal LM that belongs to the engine.
        trunk_layers: keep the hidden states after this many layers; None keeps none.
        final_states: keep the final hidden state that each token was drawn from.
        record_steps: on a CUDA device, record steps that are written out and play them back (graphs.py).
        options: of `BatchEngine`. Prompts are shared, and rows that ended are taken by waiting requests, where every
            layer attends to everything; elsewhere one batch follows the other.
    """

    def __init__(
        self, model: Any, *, trunk_layers: int | None = None, final_states: bool = False, record_steps: bool = True,
        **options: Any,
    ) -> None:  # fmt: skip
        use_fast_attention(model)
        super().__init__(model, **options)
        self.buffered = full_attention(model.config)  # a cache of one column a token
        self.share_prompts = self.share_prompts and self.buffered
        self._captured: dict[str, Tensor] = {}
        self.decoder: Decoder | None = None  # of the call that samples
        self.trunk_layers, self.keeps_final, self.record_steps = trunk_layers, final_states, record_steps
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
    def step_compiled(self) -> bool:
        """Whether what happens between the products is compiled."""
        return self.written_out and Decoder(self.model).compiled

    @property
    def steps_recorded(self) -> bool:
        """Whether steps are to be played back: by what is known before the first one."""
        return self.record_steps and self.written_out and recorder(Decoder(self.model), self.device) is not None

    def _capture(self, name: str, module: Any, args: Any, output: Any) -> None:
        states = output if isinstance(output, Tensor) else output[0]
        self._captured[name] = states[:, -1:] if name == "final" else states

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.check_ready()
        empty = next((i for i, request in enumerate(requests) if len(request.prompt) == 0), None)
        if empty is not None:
            raise HeelerError(f"request {empty + 1} has a prompt without tokens: there is nothing to go on from")
        draws = Draws(requests, sampling, self)
        kept = [Kept() for _ in requests]
        reader = self._reader(requests, draws.cap)
        with self.packing:
            self._sample(reader, requests, draws, kept)
        self._captured.clear()
        return [draws.completion(row, **kept[row].states()) for row in range(len(requests))]

    def _reader(self, requests: Sequence[Request], cap: int) -> Any:
        """What reads prompts: by the step that is written out where it is the model's own, as it is now."""
        decoder = Decoder(self.model, self.trunk_layers) if self.written_out else None
        self.decoder = decoder
        if self.pack_weights:
            self.packing.layers = packed_layers(self.model) if decoder is None else decoder.products
        if decoder is None:
            return PaddedReader(self.model, cap, self.buffered, self._captured)
        longest = max((len(r.prompt) for r in requests), default=0)
        slots = SlotReader(decoder, min(self.max_rows, len(requests)), longest, cap, self.keeps_final)
        record = recorder(decoder, self.device) if self.record_steps else None
        if record is not None:
            slots.take_step = Steps(decoder, slots.slots, record, self._record_no_more)
        return slots

    def _record_no_more(self, reason: str) -> None:
        self.record_steps = False
        print(f"decoding steps are not recorded as CUDA graphs any more, which is slower: {reason}")

    def _sample(self, reader: Any, requests: Sequence[Request], draws: Draws, kept: list[Kept]) -> None:
        """Draw all tokens of the requests."""
        waiting = by_length(requests)
        pool: SlotRows | PaddedRows | None = None
        if self.packing.fits_any:  # prompts are read with the blocks too
            self.packing.fit(min(len(waiting), self.max_rows), draws.cap - 1)
        while waiting or pool is not None:
            if pool is None:
                chosen, waiting = waiting[: self.max_rows], waiting[self.max_rows :]
                pool = self._read(reader, chosen, requests, draws, kept)
            else:
                self.packing.fit(len(pool.rows), draws.steps_left(pool.rows))
                self._step(pool, draws)
                if not draws.time_to_look:
                    continue
                self._look(pool, draws, kept)
            stay = (~draws.finished[pool.rows]).nonzero()[:, 0]
            room = self.max_rows - len(stay)
            if len(stay) == 0:
                pool.leave(stay)
                pool = None
            elif self.buffered and waiting and room >= min(len(waiting), LEAVE_FRACTION * self.max_rows):
                chosen, waiting = waiting[:room], waiting[room:]
                read: Any = partial(self._read, reader, chosen, requests, draws, kept)
                pool = pool.join(stay, read, draws.cap - int(draws.counts[chosen].min()))
            elif draws.enough_to_leave(pool.rows, pool.copies):
                pool.leave(stay)

    def _read(
        self, reader: Any, chosen: list[int], requests: Sequence[Request], draws: Draws, kept: list[Kept]
    ) -> SlotRows | PaddedRows:
        """Read the prompts of these requests and draw the first token of each."""
        parts = reader.parts([tuple(requests[i].prompt) for i in chosen])
        pool = self._read_part(reader, chosen[parts[0]], requests, draws, kept)
        for part in parts[1:]:
            read: Any = partial(self._read_part, reader, chosen[part], requests, draws, kept)
            pool = pool.join(torch.arange(len(pool.rows)), read, draws.cap - 1)
        return pool

    def _read_part(
        self, reader: Any, chosen: list[int], requests: Sequence[Request], draws: Draws, kept: list[Kept]
    ) -> SlotRows | PaddedRows:
        rows = torch.tensor(chosen)
        prompts, owners = self.prompts_of([requests[i] for i in chosen])
        pool, logits, states = reader.read(rows, prompts, owners)
        for name, of in states.items():
            for row, owner in zip(chosen, owners.tolist(), strict=True):
                getattr(kept[row], name).append(of[owner])
        pool.drawn(draws.draw(rows, logits))
        draws.look(rows)
        return pool

    def _step(self, pool: SlotRows | PaddedRows, draws: Draws) -> None:
        """Read the last token of every row and draw the next."""
        logits, states = pool.step()
        pool.drawn(draws.draw(pool.rows, logits, states))

    @staticmethod
    def _look(pool: SlotRows | PaddedRows, draws: Draws, kept: list[Kept]) -> None:
        """Fetch what was drawn, and the states of the rows that were still going."""
        rows = pool.rows.tolist()
        for live, states in draws.look(pool.rows):
            for name, of in states.items():
                for i in live.nonzero()[:, 0].tolist():
                    getattr(kept[rows[i]], name).append(of[i])

    def _hooked(self) -> bool:
        """Whether somebody else looks into the model's passes or changes them: then transformers takes every step."""
        modules = [vars(module) for module in self.model.modules()]
        hooks = [h for m in modules for kind in ("_forward_hooks", "_forward_pre_hooks") for h in m[kind].values()]
        own = [isinstance(h, partial) and getattr(h.func, "__func__", None) is NativeEngine._capture for h in hooks]
        return not all(own) or any("forward" in m for m in modules) or bool(_has_any_global_hook())


def native_engine(model: Any, **options: Any) -> NativeEngine | Seq2SeqEngine:
    """Heeler's engine for this model, causal or encoder-decoder."""
    return (Seq2SeqEngine if model.config.is_encoder_decoder else NativeEngine)(model, **options)

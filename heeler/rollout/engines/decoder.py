"""Models like Llama, written out for sampling: one decoding step, and the reading of prompts.

A step of few rows is many small operations between its matrix products, and a general framework around each of them.
Here stand only the operations, and products that read the same input are one product where weights are packed:

    x = embedding of each row's token                                   [B, H]
    for every layer:
        q, k, v = norm(x) @ [Wq Wk Wv];  q, k rotated by position       one product
        x += attention(q, the row's keys and values) @ Wo
        x += (act(gate) * up) @ Wd,  gate, up = norm(x) @ [Wg Wu]       one product
    logits = norm(x) @ W

Prompts are read in the same way, the tokens of all behind one another without padding; only their attention is each
one's own. Other models, and those that somebody has hooked into or changed, sample through transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from heeler.policies.attention import attend
from heeler.policies.llama import like_llama
from heeler.rollout.engines import packing
from heeler.rollout.engines.kernels import Seen, for_head
from heeler.rollout.engines.packing import Joined, can_pack

PASS_TOKENS = 8192  # of prompts read at once, which bounds the memory


@dataclass(frozen=True)
class Layer:
    """The parts of a layer; `norms` of queries and keys where the model has them."""

    before_attention: Any
    read: Joined
    norms: tuple[Any, Any] | None
    attended: Joined
    before_mlp: Any
    gate_up: Joined
    act: Any
    down: Joined


class Decoder:
    """The steps of one model; it holds the model's layers, so weights are read where they are.

    Args:
        model: a causal LM for which `can_decode` holds.
        trunk_layers: give back the hidden states after this many layers; None gives none.

    Attributes:
        products: what multiplies matrices in a step and can be packed.
    """

    def __init__(self, model: Any, trunk_layers: int | None = None) -> None:
        base = model.model
        self.embedding, self.rotary, self.norm = base.embed_tokens, base.rotary_emb, base.norm
        self.trunk_layers = trunk_layers
        self.width = base.layers[0].self_attn.head_dim
        self.heads = base.layers[0].self_attn.q_proj.out_features // self.width
        self.groups = base.layers[0].self_attn.k_proj.out_features // self.width
        self.scale = base.layers[0].self_attn.scaling
        self.layers = [_layer(layer) for layer in base.layers]
        self.output = Joined(model.lm_head)
        self.compiled = for_head(self.width, model.lm_head.weight)
        products = [p for layer in self.layers for p in (layer.read, layer.attended, layer.gate_up, layer.down)]
        self.products = [*products, self.output] if can_pack(model.lm_head.weight) else []

    def read(
        self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Any
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Read prompts, the tokens of all behind one another: padding is never multiplied.

        Args:
            ids: `[B, n]` the tokens of prompts, padded on the left.
            positions: `[B, n]` of each in its prompt.
            mask: `[B, n]` 0 where there is padding; None where there is none.
            cache: of buffered layers, empty.

        Returns:
            `(logits [B, V] after the last tokens, states after the trunk [B, n, H] or None, final states [B, 1, H])`.
        """
        count, width = ids.shape
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        lengths = real.sum(1).tolist()
        for kept in cache.layers:
            kept.start(count, self.groups, width, self.embedding.weight.new_zeros(self.width))
        hidden = self.embedding.embedding_dim
        trunk = self.embedding.weight.new_zeros(count, width, hidden) if self.trunk_layers is not None else None
        last: list[Tensor] = []
        for rows in _parts(lengths):
            states, x = self._read(ids[rows][real[rows]], positions[rows][real[rows]], lengths[rows], rows.start, cache)
            if trunk is not None and states is not None:
                trunk[rows][real[rows]] = states
            last.append(x)
        x = torch.cat(last)
        return self.output(x), trunk, x[:, None]

    def _read(
        self, ids: Tensor, positions: Tensor, lengths: list[int], first: int, cache: Any
    ) -> tuple[Tensor | None, Tensor]:
        """Read prompts that lie behind one another.

        Args:
            ids, positions: `[T]` of all tokens.
            lengths: of the `P` prompts.
            first: row of the first prompt in the cache.

        Returns:
            `(states after the trunk [T, H] or None, final states of the last tokens [P, H])`.
        """
        runs = [] if self.compiled is not None else _runs(lengths, first)
        at = None if self.compiled is None else _columns(lengths, first, positions, cache.layers[0].length)
        x = self.embedding(ids)
        cos, sin = (part[0, :, None] for part in self.rotary(x[None], positions[None]))
        trunk: Tensor | None = None
        for number, (layer, kept) in enumerate(zip(self.layers, cache.layers, strict=True)):
            spoken = layer.read.each(self._norm(layer.before_attention, x))
            queries, keys, values = (part.view(len(x), -1, self.width) for part in spoken)
            if layer.norms is not None:
                queries, keys = (_norm(n, part) for n, part in zip(layer.norms, (queries, keys), strict=True))
            queries, keys = self._turned(queries, cos, sin), self._turned(keys, cos, sin)
            if self.compiled is not None and at is not None:
                kept.keys[at.row, :, at.end - 1], kept.values[at.row, :, at.end - 1] = keys, values
                attended = self.compiled.attend(queries, kept.keys, kept.values, at, self.scale)
            else:
                attended = self._by_length(queries, keys, values, runs, kept)
            x = layer.attended(attended.flatten(1)).add_(x)
            x = self._mlp(layer, x)
            if number + 1 == self.trunk_layers:
                trunk = x
        ends = torch.tensor(lengths).cumsum(0) - 1
        return trunk, self._norm(self.norm, x[ends])

    def _norm(self, norm: Any, x: Tensor) -> Tensor:
        if self.compiled is None or norm.weight.dtype != x.dtype:
            return _norm(norm, x)
        return self.compiled.norm(x, norm.weight, norm.variance_epsilon)

    def _turned(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return _turned(heads, cos, sin) if self.compiled is None else self.compiled.turn(heads, cos, sin)

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        """`[B, H]` after the layer's second half."""
        gate, up = layer.gate_up.each(self._norm(layer.before_mlp, x))
        if self.compiled is not None and type(layer.act).__name__ in ("SiLU", "SiLUActivation"):
            active = self.compiled.gate(gate, up)
        else:
            active = layer.act(gate).mul_(up)
        return layer.down(active).add_(x)

    def _by_length(
        self, queries: Tensor, keys: Tensor, values: Tensor, runs: list[tuple[slice, slice, int]], kept: Any
    ) -> Tensor:
        """`[T, heads, D]` by torch's attention, prompts of one length together; keys and values go to the cache."""
        attended = torch.empty_like(queries)
        for rows, tokens, length in runs:
            q, k, v = (part[tokens].unflatten(0, (-1, length)).transpose(1, 2) for part in (queries, keys, values))
            kept.keys[rows, :, kept.length - length : kept.length] = k
            kept.values[rows, :, kept.length - length : kept.length] = v
            said = nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=self.heads != self.groups
            )
            attended[tokens] = said.transpose(1, 2).flatten(0, 1)
        return attended

    def __call__(
        self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Any
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Read one token of each row.

        Args:
            ids: `[B, 1]` the tokens.
            positions: `[B, 1]` of each in its row.
            mask: `[B, n]` 0 in the columns before each row's first token; None where all begin in the first.
            cache: of buffered layers, to which the tokens' keys and values are added.

        Returns:
            `(logits [B, V], states after the trunk [B, 1, H] or None, final states [B, 1, H])`.
        """
        x = self.embedding(ids[:, 0])
        cos, sin = self.rotary(x[:, None], positions)
        seen: Seen | None = None
        hidden: Tensor | None = None  # added to the attention's logits
        if self.compiled is not None:
            end = cache.get_seq_length() + 1
            rows = torch.arange(len(ids), dtype=torch.int32)
            first = torch.zeros_like(rows) if mask is None else (mask == 0).sum(1, dtype=torch.int32)
            seen = Seen(rows, first, torch.full_like(rows, end), end)
        elif mask is not None:
            hidden = x.new_zeros(mask.shape).masked_fill_(mask == 0, -torch.inf)[:, None, None]
        trunk: Tensor | None = None
        for number, (layer, kept) in enumerate(zip(self.layers, cache.layers, strict=True)):
            spoken = layer.read(self._norm(layer.before_attention, x)).view(len(x), -1, self.width)
            heads = spoken[:, : self.heads + self.groups]
            if layer.norms is not None:
                parts = zip(layer.norms, heads.split([self.heads, self.groups], dim=1), strict=True)
                heads = torch.cat([_norm(norm, part) for norm, part in parts], dim=1)
            turned = self._turned(heads, cos, sin)
            keys, values = kept.update(turned[:, self.heads :, None], spoken[:, self.heads + self.groups :, None])
            queries = turned[:, : self.heads]
            if self.compiled is not None and seen is not None:
                attended = self.compiled.attend(queries, keys, values, seen, self.scale)
            else:
                attended = attend(queries, keys, values, hidden, self.scale)
            x = layer.attended(attended.flatten(1)).add_(x)
            x = self._mlp(layer, x)
            if number + 1 == self.trunk_layers:
                trunk = x
        x = self._norm(self.norm, x)
        return self.output(x), None if trunk is None else trunk[:, None], x[:, None]


def _runs(lengths: list[int], first: int) -> list[tuple[slice, slice, int]]:
    """Rows of the cache, tokens and length of prompts of one length together; their rows begin with `first`."""
    runs: list[tuple[slice, slice, int]] = []
    row, token = first, 0
    for length, group in groupby(lengths):
        count = len(list(group))
        runs.append((slice(row, row + count), slice(token, token + count * length), length))
        row, token = row + count, token + count * length
    return runs


def _columns(lengths: list[int], first: int, positions: Tensor, width: int) -> Seen:
    """What the tokens of prompts see: their own and earlier ones of rows of `width` columns that begin with `first`."""
    owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    begins = (width - torch.tensor(lengths, dtype=torch.int32))[owners]
    return Seen((owners + first).int(), begins, begins + 1 + positions.int(), width)


def _parts(lengths: list[int]) -> Iterator[slice]:
    """Rows that are read in one pass: as many as have `PASS_TOKENS` tokens, at least one."""
    start, tokens = 0, 0
    for row, length in enumerate(lengths):
        if row > start and tokens + length > PASS_TOKENS:
            yield slice(start, row)
            start, tokens = row, 0
        tokens += length
    yield slice(start, len(lengths))


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`[B, h, D]` queries or keys, rotated by their positions (`cos`, `sin` `[B, 1, D]`)."""
    half = heads.shape[-1] // 2
    turned = heads * cos
    turned[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(heads[..., :half], sin[..., half:])
    return turned


def _layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        before_attention=layer.input_layernorm,
        read=Joined(attention.q_proj, attention.k_proj, attention.v_proj),
        norms=(attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None,
        attended=Joined(attention.o_proj),
        before_mlp=layer.post_attention_layernorm,
        gate_up=Joined(mlp.gate_proj, mlp.up_proj),
        act=mlp.act_fn,
        down=Joined(mlp.down_proj),
    )


def _norm(norm: Any, x: Tensor) -> Tensor:
    """RMSNorm as the models have it."""
    numbers = x.float()
    scale = numbers.square().mean(-1, keepdim=True).add_(norm.variance_epsilon).rsqrt_()
    return (numbers * scale).to(x.dtype).mul_(norm.weight)


def can_decode(model: Any) -> bool:
    """Whether the step is written for this model: of a known family, nothing in it exchanged."""
    return type(model).__name__.endswith("ForCausalLM") and like_llama(model, packing.__name__)

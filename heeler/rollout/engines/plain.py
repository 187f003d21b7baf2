"""What a decoding step does between its matrix products, by torch: on GPUs, and where nothing can be compiled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from heeler.policies.attention import attend


@dataclass(frozen=True)
class Tokens:
    """The tokens of one pass, each in a row and a column of the keys and values.

    Attributes:
        ids: `[N]`.
        positions: `[N]` int64, of each in its row: its column, and it sees those up to there.
        rows: `[N]` int32, of each.
        longest: columns that any of them sees, at least.
        lengths: of prompts, whose tokens lie behind one another from position 0 on; None for one token a row.
        equal: whether all positions are the same; of single tokens.
    """

    ids: Tensor
    positions: Tensor
    rows: Tensor
    longest: int
    lengths: list[int] | None = None
    equal: bool = False

    def ends(self) -> Tensor:
        """`[P]` the last token of each prompt."""
        return (torch.tensor(self.lengths).cumsum(0) - 1).to(self.ids.device)

    def hidden(self, dtype: torch.dtype) -> Tensor | None:
        """`[N, 1, 1, longest]` of single tokens: -inf where one does not see a column, else 0; None: all see all."""
        if self.equal:
            return None
        if dtype not in self._masks:  # made once for all layers
            beyond = torch.arange(self.longest, device=self.ids.device) > self.positions[:, None]
            mask = torch.zeros(beyond.shape, dtype=dtype, device=beyond.device).masked_fill_(beyond, -torch.inf)
            self._masks[dtype] = mask[:, None, None]
        return self._masks[dtype]

    @cached_property
    def _masks(self) -> dict[torch.dtype, Tensor]:
        return {}


class Plain:
    """The slow twin of `Kernels`: the same methods, any device and type.

    Single tokens are those of rows 0, 1, 2, ...; prompts take rows that follow one another.
    """

    def attend(
        self, spoken: Tensor, turn: tuple[Tensor, Tensor], norms: Any, keys: Tensor, values: Tensor, tokens: Tokens,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """As `Kernels.attend`."""
        groups, width = keys.shape[1], keys.shape[3]
        parts = spoken.view(len(spoken), -1, width)
        heads = parts.shape[1] - 2 * groups
        queries, own, values_own = parts.split([heads, groups, groups], dim=1)
        if norms is not None:
            queries, own = (_norm(norm, part) for norm, part in zip(norms, (queries, own), strict=True))
        queries, own = (_turned(part, *turn) for part in (queries, own))
        keys[tokens.rows, :, tokens.positions] = own
        values[tokens.rows, :, tokens.positions] = values_own
        if tokens.lengths is None:
            count = len(spoken)
            seen_keys, seen_values = (part[:count, :, : tokens.longest] for part in (keys, values))
            return attend(queries, seen_keys, seen_values, tokens.hidden(spoken.dtype), scale).flatten(1)
        attended = torch.empty_like(queries)
        for part, length in _runs(tokens.lengths):
            q, k, v = (x[part].unflatten(0, (-1, length)).transpose(1, 2) for x in (queries, own, values_own))
            said = nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=heads != groups
            )
            attended[part] = said.transpose(1, 2).flatten(0, 1)
        return attended.flatten(1)

    def add_norm(self, x: Tensor, added: Tensor | None, norm: Any) -> Tensor:
        """As `Kernels.add_norm`."""
        return _norm(norm, x if added is None else x.add_(added))

    def gate(self, gates: Tensor, act: Any) -> Tensor:
        """`[N, F]`: act(the first half of `gates [N, 2 F]`) times the second."""
        gate, up = gates.chunk(2, dim=-1)
        return act(gate).mul_(up)


def _runs(lengths: list[int]) -> list[tuple[slice, int]]:
    """The tokens of prompts of one length that follow one another, and the length."""
    runs: list[tuple[slice, int]] = []
    start = 0
    for length, group in groupby(lengths):
        end = start + length * len(list(group))
        runs.append((slice(start, end), length))
        start = end
    return runs


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`[N, h, D]` queries or keys, rotated by their positions (`cos`, `sin` `[N, D]`)."""
    cos, sin = cos[:, None], sin[:, None]
    half = heads.shape[-1] // 2
    turned = heads * cos
    turned[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(heads[..., :half], sin[..., half:])
    return turned


def _norm(norm: Any, x: Tensor) -> Tensor:
    """RMSNorm as the models have it."""
    numbers = x.float()
    scale = numbers.square().mean(-1, keepdim=True).add_(norm.variance_epsilon).rsqrt_()
    return (numbers * scale).to(x.dtype).mul_(norm.weight)

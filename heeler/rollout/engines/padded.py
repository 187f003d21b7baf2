"""Rows that a model of transformers samples: padded on the left, so that all end in the same column.

prompts                              the rows: one a completion
. . a a a  -> keys, values           . . a a a a1 a2 a3
b b b b b                            b b b b b b1 b2 b3
                                     . . . . c c  c  c1      joined where a row had ended
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heeler.rollout.engines.batch import similar_lengths
from heeler.rollout.engines.buffers import join_caches, make_cache


@dataclass
class PaddedRows:
    """Rows that are being sampled.

    Attributes:
        reader: that read them.
        rows: `[b]` the request of each row (on the host).
        ids, positions: `[b, n]` the tokens of each that are not read yet, and their positions; one, after the prompt.
        last: `[b, 1]` the position at which each reaches the length cap; a row that goes on after its end stays there.
        mask: `[b, capacity]` 0 at the columns before a row's first token.
        padded: whether any row has such columns.
        cache: keys and values of the tokens read.
        end: columns that are filled after the next pass.
    """

    reader: PaddedReader
    rows: Tensor
    ids: Tensor
    positions: Tensor
    last: Tensor
    mask: Tensor
    padded: bool
    cache: Any
    end: int
    copies = True  # keys and values, when rows leave

    def step(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Read the last token of every row: `[b, V]` logits, and states `[b, 1, H]` by name."""
        output = self.reader.model(
            input_ids=self.ids,
            attention_mask=self.mask[:, : self.end] if self.padded else None,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1], dict(self.reader.captured)

    def drawn(self, tokens: Tensor) -> None:
        """Every row goes on with its next token of `tokens [b]`."""
        self.ids, self.positions = tokens[:, None], torch.minimum(self.positions[:, -1:] + 1, self.last)
        self.end += 1

    def leave(self, stay: Tensor) -> None:
        """Keep the rows `stay`."""
        self.rows = self.rows[stay]
        stay = stay.to(self.ids.device)
        self.ids, self.positions, self.last = self.ids[stay], self.positions[stay], self.last[stay]
        self.mask = self.mask[stay]
        self.cache.batch_select_indices(stay)

    def join(self, stay: Tensor, read: Callable[[], PaddedRows], steps: int) -> PaddedRows:
        """The rows `stay` and all of those that `read` gives, with room for `steps` tokens more."""
        other = read()
        rows = torch.cat([self.rows[stay], other.rows])
        stay = stay.to(self.ids.device)
        positions = torch.cat([self.positions[stay], other.positions])
        width = int(positions.max())  # tokens of the longest row
        columns = torch.arange(width + steps, device=positions.device)
        return PaddedRows(
            reader=self.reader,
            rows=rows,
            ids=torch.cat([self.ids[stay], other.ids]),
            positions=positions,
            last=torch.cat([self.last[stay], other.last]),
            mask=(columns >= width - positions).long(),
            padded=bool((positions != width).any()),
            cache=join_caches(self.cache, stay, other.cache, width, width + steps),
            end=width + 1,
        )


class PaddedReader:
    """Reads prompts with a model of transformers.

    Args:
        model: a causal LM.
        cap: tokens of the longest completion.
        buffered: whether its cache is one column a token, kept in buffers; else transformers' own for the model.
        captured: states that hooks put there at every pass: of all tokens, `final` of the last one.
    """

    def __init__(self, model: Any, cap: int, buffered: bool, captured: dict[str, Tensor]) -> None:
        self.model, self.cap, self.buffered, self.captured = model, cap, buffered, captured
        self.device = next(model.parameters()).device

    def parts(self, prompts: Sequence[Sequence[int]]) -> list[slice]:
        """Which of these requests are read together."""
        return similar_lengths(prompts) if self.buffered else [slice(0, len(prompts))]

    def read(
        self, rows: Tensor, prompts: Sequence[Sequence[int]], owners: Tensor
    ) -> tuple[PaddedRows, Tensor, dict[str, list[Tensor]]]:
        """As `SlotReader.read`."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
        first = width - lengths  # (P,) column of each prompt's first token
        columns = torch.arange(width + self.cap)
        mask = (columns >= first[:, None]).long().to(self.device)
        positions = (columns[:width] - first[:, None]).clamp(min=0).to(self.device)
        cache = make_cache(self.model.config, width + self.cap if self.buffered else None)
        last = (lengths + self.cap - 1)[:, None].to(self.device)
        pool = PaddedRows(reader=self, rows=rows, ids=ids.to(self.device), positions=positions, last=last, mask=mask,
                          padded=bool(first.any()), cache=cache, end=width)  # fmt: skip
        logits, found = pool.step()
        begins = first.tolist()
        states = {
            name: [of[row, 0 if name == "final" else begins[row] :] for row in range(len(prompts))]
            for name, of in ((name, of.cpu()) for name, of in found.items())
        }
        if len(prompts) < len(rows):  # from here on every request has a row
            of = owners.to(self.device)
            logits, pool.positions, pool.last, pool.mask = logits[of], positions[of], last[of], mask[of]
            cache.batch_select_indices(of)
        return pool, logits, states

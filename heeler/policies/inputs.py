"""Token sequences as the policy reads them: packed for storage, padded right for the forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class PaddedRows:
    """Rows of a forward pass, padded on the right, and where their decisions are read.

    One sequence a row needs no mask: with causal attention no real token can see a pad. Where several share a row,
    `sequence` says which tokens may see each other.

    Attributes:
        ids: `[B, L]` token ids, the pads are 0.
        states: `[B, L, H]` hidden states at the trunk's boundary, or None where they were not kept.
        rows, columns: `[n]` position that predicts each decision: the one *before* the sampled token.
        tokens: `[n]` the sampled tokens.
        lengths: `[B]` real tokens in each row.
        sequence: `[B, L]` number of the sequence that each token belongs to, -1 for pads; None where each row holds
            one sequence.
        positions: `[B, L]` position of each token in its sequence; None where each row holds one.
    """

    ids: Tensor
    states: Tensor | None
    rows: Tensor
    columns: Tensor
    tokens: Tensor
    lengths: Tensor
    sequence: Tensor | None = None
    positions: Tensor | None = None

    def visible(self) -> Tensor:
        """`[B, 1, L, L]` bool: token i (first L) may see token j of the same sequence where j <= i."""
        assert self.sequence is not None
        same = self.sequence[:, :, None] == self.sequence[:, None, :]
        return same.tril()[:, None]  # a pad sees pads: a row without anything to see would be NaN


@dataclass(frozen=True, kw_only=True)
class TokenInputs:
    """Sequences of tokens, one item each; implements `heeler.types.Inputs`.

    Attributes:
        tokens: `[T]` int64, all sequences behind one another.
        lengths: `[I]` int64, tokens in each.
        is_decision: `[T]` bool, the token was sampled by the policy. Prompts and tool outputs are not. The first
            token of a sequence cannot be one: nothing predicts it.
        trunk_states: `[T, H]` hidden states at the boundary of the frozen trunk, or None. The row of a
            sequence's last token is never read.
    """

    tokens: Tensor
    lengths: Tensor
    is_decision: Tensor
    trunk_states: Tensor | None = None

    @cached_property
    def starts(self) -> Tensor:
        return self.lengths.cumsum(0) - self.lengths

    @property
    def decision_counts(self) -> Tensor:
        """`[I]` decisions of each sequence."""
        return self._decision_counts

    @cached_property
    def _decision_counts(self) -> Tensor:
        item = torch.repeat_interleave(torch.arange(len(self.lengths), device=self.lengths.device), self.lengths)
        return torch.zeros_like(self.lengths).scatter_add_(0, item, self.is_decision.long())

    @property
    def costs(self) -> Tensor:
        return self.lengths

    def _token_indices(self, items: Tensor) -> Tensor:
        counts = self.lengths[items]
        first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        within = torch.arange(int(counts.sum()), device=counts.device) - first
        return torch.repeat_interleave(self.starts[items], counts) + within

    def select(self, items: Tensor) -> TokenInputs:
        index = self._token_indices(items)
        return TokenInputs(
            tokens=self.tokens[index],
            lengths=self.lengths[items],
            is_decision=self.is_decision[index],
            trunk_states=None if self.trunk_states is None else self.trunk_states[index],
        )

    def padded(self, *, include_last: bool = False) -> PaddedRows:
        """The rows of a forward pass. The last token of a sequence predicts nothing that was sampled, so it is
        left out unless `include_last` (a value after the last decision needs it)."""
        rows = torch.arange(len(self.lengths), device=self.tokens.device)
        return self._placed(rows, torch.zeros_like(rows), include_last)

    def packed(self, row_tokens: int) -> PaddedRows:
        """Sequences share rows of at most `row_tokens` tokens (a longer one has a row of its own), blind to each
        other. Fewer pads than `padded`, at the price of a mask of rows x rows: for attention kernels that profit."""
        used: list[int] = []
        rows, columns = torch.zeros_like(self.lengths), torch.zeros_like(self.lengths)
        for item in torch.argsort(self.lengths, descending=True, stable=True).tolist():
            length = int(self.lengths[item]) - 1
            row = next((r for r, taken in enumerate(used) if taken + length <= row_tokens), len(used))
            if row == len(used):
                used.append(0)
            rows[item], columns[item] = row, used[row]
            used[row] += length
        return self._placed(rows, columns, include_last=False, packed=True)

    def _placed(self, rows: Tensor, columns: Tensor, include_last: bool, packed: bool = False) -> PaddedRows:
        """Sequence i begins at column `columns[i]` of row `rows[i]`."""
        item = torch.repeat_interleave(torch.arange(len(self.lengths), device=self.tokens.device), self.lengths)
        position = torch.arange(len(self.tokens), device=self.tokens.device) - self.starts[item]
        row, column = rows[item], columns[item] + position
        num_rows = int(rows.max()) + 1 if len(rows) else 0
        lengths = self.lengths if include_last else self.lengths - 1
        widths = torch.zeros(num_rows, dtype=torch.long, device=rows.device).scatter_add_(0, rows, lengths)
        fed = position < lengths[item]
        width = max(int(widths.max()), 1)
        ids = self.tokens.new_zeros(num_rows, width)
        ids[row[fed], column[fed]] = self.tokens[fed]
        states = None
        if self.trunk_states is not None and not include_last:
            states = self.trunk_states.new_zeros(num_rows, width, self.trunk_states.shape[1])
            states[row[fed], column[fed]] = self.trunk_states[fed]
        decided = self.is_decision
        sequence = positions = None
        if packed:
            sequence = torch.full((num_rows, width), -1, device=row.device)
            sequence[row[fed], column[fed]] = item[fed]
            positions = torch.zeros_like(sequence)
            positions[row[fed], column[fed]] = position[fed]
        return PaddedRows(
            ids=ids,
            states=states,
            rows=row[decided],
            columns=column[decided] - 1,
            tokens=self.tokens[decided],
            lengths=widths,
            sequence=sequence,
            positions=positions,
        )

"""Token sequences as the policy reads them: packed for storage, laid out in rows for the forward pass.

padded      prompt a1 a2 a3 .       one sequence a row, padded on the right
            prompt b1 . . .
shared      prompt a1 a2 a3 b1      samples of one prompt read it once; b1 follows the prompt and cannot see a1..a3
packed      prompt a1 a2 a3 | other c1 c2       sequences that have nothing to do with each other
"""

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
        sequence: `[B, L]` number of the sequence, or of the group of sequences with one beginning, that each token
            belongs to, -1 for pads; None where each row holds one sequence.
        positions: `[B, L]` position of each token in its sequence; None where each row holds one.
        branch: `[B, L]` 0 for tokens that the whole group sees, else the number of the one sequence of the group that
            goes on there; None where sequences share no beginning.
    """

    ids: Tensor
    states: Tensor | None
    rows: Tensor
    columns: Tensor
    tokens: Tensor
    lengths: Tensor
    sequence: Tensor | None = None
    positions: Tensor | None = None
    branch: Tensor | None = None

    def visible(self) -> Tensor:
        """`[B, 1, L, L]` bool: token i (first L) may see token j of the same sequence where j <= i."""
        assert self.sequence is not None
        same = self.sequence[:, :, None] == self.sequence[:, None, :]
        if self.branch is not None:
            same &= (self.branch[:, None, :] == 0) | (self.branch[:, :, None] == self.branch[:, None, :])
        return same.tril()[:, None]  # a pad sees pads: a row without anything to see would be NaN


def first_fit(sizes: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Row and first column of each block, the largest first, each in the first row with room (or a row of its own)."""
    used: list[int] = []
    rows, columns = torch.zeros_like(sizes), torch.zeros_like(sizes)
    for block in torch.argsort(sizes, descending=True, stable=True).tolist():
        size = int(sizes[block])
        row = next((r for r, taken in enumerate(used) if taken + size <= capacity), len(used))
        if row == len(used):
            used.append(0)
        rows[block], columns[block] = row, used[row]
        used[row] += size
    return rows, columns


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
        rows, columns = first_fit(self.lengths - 1, row_tokens)
        return self._placed(rows, columns, include_last=False, packed=True)

    @cached_property
    def beginnings(self) -> tuple[Tensor, Tensor]:
        """`(first [I], group [I])`: tokens of each sequence before its first decision, and a number that sequences
        with the same tokens there share."""
        positions = torch.arange(len(self.tokens), device=self.tokens.device)
        item = torch.repeat_interleave(torch.arange(len(self.lengths), device=self.lengths.device), self.lengths)
        first = self.lengths.clone()
        within = positions - self.starts[item]
        first = first.scatter_reduce(0, item[self.is_decision], within[self.is_decision], "amin")
        tokens, starts = self.tokens.tolist(), self.starts.tolist()
        number: dict[tuple[int, ...], int] = {}
        group = [
            number.setdefault(tuple(tokens[start : start + count]), len(number))
            for start, count in zip(starts, first.tolist(), strict=True)
        ]
        return first, torch.tensor(group, device=self.lengths.device)

    @property
    def groups(self) -> Tensor:
        """`[I]` the prompt of each sequence: sequences with the same tokens before their first decision."""
        return self.beginnings[1]

    def shared(self) -> PaddedRows | None:
        """Sequences that begin with the same undecided tokens hold them once: samples of one prompt read it together.

        Several such groups may share a row. None where less than a fifth of the tokens is saved.
        """
        first, group = self.beginnings
        num_groups = int(group.max()) + 1 if len(group) else 0
        fed = self.lengths - 1  # the last token predicts nothing
        own = (fed - first).clamp(min=0)  # tokens after the shared ones
        prefix = first.new_zeros(num_groups).scatter_reduce(0, group, torch.minimum(first, fed), "amax")
        widths = prefix.scatter_add(0, group, own)
        if num_groups == 0 or int(widths.sum()) > 0.8 * int(fed.sum()):
            return None
        row, column = first_fit(widths, int(widths.max()))
        order = torch.argsort(group, stable=True)
        before = own[order].cumsum(0) - own[order]  # own tokens of all earlier sequences, group by group
        group_starts = own.new_zeros(num_groups).scatter_add_(0, group, own)
        group_starts = group_starts.cumsum(0) - group_starts
        branch_column = torch.zeros_like(own)
        branch_column[order] = prefix[group[order]] + before - group_starts[group[order]]
        item = torch.repeat_interleave(torch.arange(len(self.lengths), device=self.tokens.device), self.lengths)
        position = torch.arange(len(self.tokens), device=self.tokens.device) - self.starts[item]
        common = position < first[item]
        token_row = row[group[item]]
        token_column = column[group[item]] + torch.where(common, position, branch_column[item] + position - first[item])
        shape = int(row.max()) + 1, int(torch.zeros_like(row).scatter_add_(0, row, widths).max())
        here = position < fed[item]
        at = token_row[here], token_column[here]  # the shared ones are written once for each sequence: the same values
        ids = self.tokens.new_zeros(shape)
        ids[at] = self.tokens[here]
        sequence, positions, branch = ids.new_full(shape, -1), torch.zeros_like(ids), torch.zeros_like(ids)
        sequence[at], positions[at] = group[item][here], position[here]
        branch[at] = torch.where(common, torch.zeros_like(item), item + 1)[here]
        states = None
        if self.trunk_states is not None:
            states = self.trunk_states.new_zeros(*shape, self.trunk_states.shape[1])
            states[at] = self.trunk_states[here]
        decided = self.is_decision.nonzero()[:, 0]
        return PaddedRows(
            ids=ids,
            states=states,
            rows=token_row[decided],
            columns=token_column[decided - 1],
            tokens=self.tokens[decided],
            lengths=torch.zeros_like(row).scatter_add_(0, row, widths)[: shape[0]],
            sequence=sequence,
            positions=positions,
            branch=branch,
        )

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

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

    @cached_property
    def visible(self) -> Tensor:
        """`[B, 1, L, L]` bool: token i (first L) may see token j of the same sequence where j <= i."""
        assert self.sequence is not None
        same = self.sequence[:, :, None] == self.sequence[:, None, :]
        if self.branch is not None:
            same &= (self.branch[:, None, :] == 0) | (self.branch[:, :, None] == self.branch[:, None, :])
        return same.tril()[:, None]  # a pad sees pads: a row without anything to see would be NaN


ROW_TOKENS = 512  # samples share a row up to this width: attention grows with its square


def _running_sums(values: Tensor, group: Tensor) -> Tensor:
    """For each entry the sum of the earlier `values` of its group."""
    order = torch.argsort(group, stable=True)
    before = torch.zeros_like(values)
    before[order] = values[order].cumsum(0) - values[order]
    starts = before.new_zeros(int(group.max()) + 1).scatter_reduce(0, group, before, "amin", include_self=False)
    return before - starts[group]


def first_fit(sizes: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Row and first column of each block, the largest first, each in the first row with room (or a row of its own)."""
    used: list[int] = []
    known = sizes.tolist()
    rows, columns = [0] * len(known), [0] * len(known)
    for block in sorted(range(len(known)), key=lambda b: -known[b]):
        row = next((r for r, taken in enumerate(used) if taken + known[block] <= capacity), len(used))
        if row == len(used):
            used.append(0)
        rows[block], columns[block] = row, used[row]
        used[row] += known[block]
    return torch.tensor(rows, device=sizes.device), torch.tensor(columns, device=sizes.device)


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
        return torch.zeros_like(self.lengths).scatter_add_(0, self.places[0], self.is_decision.long())

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """`(item [T], position [T])`: the sequence of each token, and its place there."""
        item = torch.repeat_interleave(torch.arange(len(self.lengths), device=self.lengths.device), self.lengths)
        return item, torch.arange(len(self.tokens), device=self.tokens.device) - self.starts[item]

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

    @cached_property
    def beginnings(self) -> tuple[Tensor, Tensor]:
        """`(first [I], group [I])`: tokens of each sequence before its first decision, and a number that sequences
        with the same tokens there share."""
        item, position = self.places
        decided = self.is_decision
        first = self.lengths.scatter_reduce(0, item[decided], position[decided], "amin")
        tokens, starts = self.tokens.tolist(), self.starts.tolist()
        number: dict[tuple[int, ...], int] = {}
        group = [
            number.setdefault(tuple(tokens[start : start + count]), len(number))
            for start, count in zip(starts, first.tolist(), strict=True)
        ]
        return first, torch.tensor(group, dtype=torch.long, device=self.lengths.device)

    @property
    def groups(self) -> Tensor:
        """`[I]` the prompt of each sequence: sequences with the same tokens before their first decision."""
        return self.beginnings[1]

    @property
    def neighbours(self) -> tuple[Tensor, Tensor] | None:
        """`groups` and the prompts' tokens, where prompts repeat and are most of the tokens; elsewhere sorting by
        length saves more."""
        first, group = self.beginnings
        if len(group) == 0 or int(group.max()) + 1 == len(group) or 2 * int(first.sum()) <= len(self.tokens):
            return None
        return group, first

    def padded(self, *, include_last: bool = False) -> PaddedRows:
        """The rows of a forward pass. The last token of a sequence predicts nothing that was sampled, so it is
        left out unless `include_last` (a value after the last decision needs it)."""
        return self._laid_out(*self.places, include_last=include_last)

    def packed(self, row_tokens: int) -> PaddedRows:
        """Sequences share rows of at most `row_tokens` tokens (a longer one has a row of its own), blind to each
        other. Fewer pads than `padded`, at the price of a mask of rows x rows: for attention kernels that profit."""
        item, position = self.places
        rows, columns = first_fit(self.lengths - 1, row_tokens)
        return self._laid_out(rows[item], columns[item] + position, sequence=item)

    def shared(self) -> PaddedRows | None:
        """Sequences that begin with the same undecided tokens hold them once: samples of one prompt read it together.

        Several such groups may share a row. A group that is wider than `ROW_TOKENS`, and whose samples are together
        longer than the prompt, takes several rows, each with the prompt. None where nothing is shared, or less than a
        fifth of the places of `padded` is saved.
        """
        if len(self.lengths) == 0:
            return None
        item, position = self.places
        first, group = self.beginnings
        fed = self.lengths - 1
        own = (fed - first).clamp(min=0)  # tokens of each sequence after the shared ones
        part = _running_sums(own, group) // torch.maximum(ROW_TOKENS - first, first)
        group = torch.unique(torch.stack([group, part]), dim=1, return_inverse=True)[1]
        num_groups = int(group.max()) + 1
        if num_groups == len(group):
            return None
        prefix = first.new_zeros(num_groups).scatter_reduce(0, group, torch.minimum(first, fed), "amax")
        widths = prefix.scatter_add(0, group, own)
        rows, columns = first_fit(widths, int(widths.max()))
        if (int(rows.max()) + 1) * int(widths.max()) > 0.8 * len(fed) * int(fed.max()):
            return None
        common = position < first[item]
        behind = (prefix[group] + _running_sums(own, group) - first)[item] + position
        numbers = torch.arange(len(group), device=group.device)
        whole = numbers + len(group) * (fed < first)  # a sequence without decisions does not feed its last token
        leader = numbers.new_zeros(num_groups).scatter_reduce(0, group, whole, "amin", include_self=False) % len(group)
        return self._laid_out(
            rows[group[item]],
            columns[group[item]] + torch.where(common, position, behind),
            sequence=group[item],
            branch=torch.where(common, torch.zeros_like(item), item + 1),
            written=~common | (leader[group[item]] == item),
        )

    def _laid_out(
        self,
        row: Tensor,
        column: Tensor,
        *,
        sequence: Tensor | None = None,
        branch: Tensor | None = None,
        written: Tensor | None = None,
        include_last: bool = False,
    ) -> PaddedRows:
        """Token t lies at `row[t], column[t]`; of tokens that share a place one is `written`."""
        item, position = self.places
        fed = position < (self.lengths - 1 + int(include_last))[item]
        if written is not None:
            fed = fed & written
        at = row[fed], column[fed]
        num_rows = int(row.max()) + 1 if len(row) else 0
        lengths = row.new_zeros(num_rows).scatter_reduce(0, at[0], at[1] + 1, "amax")
        shape = num_rows, max(int(lengths.max()), 1) if num_rows else 1

        def grid(values: Tensor, empty: int = 0) -> Tensor:
            filled = values.new_full((*shape, *values.shape[1:]), empty)
            filled[at] = values[fed]
            return filled

        decided = self.is_decision.nonzero()[:, 0]
        return PaddedRows(
            ids=grid(self.tokens),
            states=None if self.trunk_states is None or include_last else grid(self.trunk_states),
            rows=row[decided],
            columns=column[decided - 1],
            tokens=self.tokens[decided],
            lengths=lengths,
            sequence=None if sequence is None else grid(sequence, -1),
            positions=None if sequence is None else grid(position),
            branch=None if branch is None else grid(branch),
        )

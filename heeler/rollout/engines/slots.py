"""Keys and values of rows that come and go, and the rows of the decoder that is written out.

                 column = position in the row
    slot 0       a a a a1 a2 a3
    slot 1       c c c1                  c took the slot of b, which had ended
    slot 2       d d d d d d1 d2

A row keeps its slot while it is sampled. Compiled attention reads a row wherever it lies, so nothing is copied when
rows leave or join; torch's wants the rows behind one another, which then move together when some leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heeler.rollout.engines.plain import Tokens

if TYPE_CHECKING:
    from heeler.rollout.engines.decoder import Decoder

Pass = Callable[[Tokens, "Slots"], tuple[Tensor, Tensor | None, Tensor]]  # of a decoder

PASS_TOKENS = 8192  # of prompts read at once, which bounds the memory


class Slots:
    """Keys and values `[layers, slots, groups, columns, D]`.

    Args:
        layers, slots, groups, columns, width: the shape.
        like: of this type, and on this device.
        anywhere: whether rows may lie in any slots; else they are moved to the first ones.
    """

    def __init__(
        self, layers: int, slots: int, groups: int, columns: int, width: int, *, like: Tensor, anywhere: bool
    ) -> None:
        shape = layers, slots, groups, columns, width
        # masked columns count 0 times what lies there, which must not be NaN; a kernel does not read them
        self.keys, self.values = (like.new_empty(shape) if anywhere else like.new_zeros(shape) for _ in range(2))
        self.columns, self.anywhere = columns, anywhere
        self.free = list(range(slots - 1, -1, -1))

    def take(self, count: int) -> Tensor:
        """`[count]` int32: slots that are free no longer."""
        taken = [self.free.pop() for _ in range(count)]
        return torch.tensor(taken, dtype=torch.int32, device=self.keys.device)

    def copy(self, source: Tensor, to: Tensor, columns: int) -> None:
        """The first columns of the slots `source` to the slots `to`."""
        for whole in (self.keys, self.values):
            for layer in whole:
                layer[to, :, :columns] = layer[source, :, :columns]

    def keep(self, slots: Tensor, stay: Tensor, columns: int) -> Tensor:
        """Of rows in `slots` the rows `stay` go on, with so many columns filled: their slots from here on."""
        kept = slots[stay]
        if not self.anywhere:
            first = torch.arange(len(kept), dtype=torch.int32, device=kept.device)
            self.copy(kept, first, columns)
            kept = first
        held = set(kept.tolist())
        freed = [slot for slot in slots.tolist() if slot not in held]
        self.free = sorted([*self.free, *freed], reverse=True)
        return kept


@dataclass
class SlotRows:
    """Rows that are being sampled.

    Attributes:
        take_step: the decoder's pass over single tokens, or what stands for it.
        slots: with their keys and values.
        rows: `[b]` the request of each row (on the host).
        ids, positions: `[b]` the last token of each, not read yet, and its position.
        last: `[b]` the position at which each reaches the length cap; a row that goes on after its end stays there.
        places: `[b]` int32, their slots.
        longest: columns that the longest row has, the last token's included.
        equal: whether all positions are the same.
        final_states: whether a step gives the final states.
    """

    take_step: Pass
    slots: Slots
    rows: Tensor
    ids: Tensor
    positions: Tensor
    last: Tensor
    places: Tensor
    longest: int
    equal: bool
    final_states: bool

    @property
    def copies(self) -> bool:
        """Whether keys and values are copied when rows leave."""
        return not self.slots.anywhere

    def step(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Read the last token of every row: `[b, V]` logits, and states `[b, 1, H]` by name."""
        longest = min(self.longest, self.slots.columns)
        tokens = Tokens(self.ids, self.positions, self.places, longest, equal=self.equal)
        logits, trunk, final = self.take_step(tokens, self.slots)
        states = {"trunk": trunk, "final": final if self.final_states else None}
        return logits, {name: of[:, None] for name, of in states.items() if of is not None}

    def drawn(self, tokens: Tensor) -> None:
        """Every row goes on with its next token of `tokens [b]`."""
        self.ids, self.positions, self.longest = tokens, torch.minimum(self.positions + 1, self.last), self.longest + 1

    def leave(self, stay: Tensor) -> None:
        """Keep the rows `stay`."""
        self.rows = self.rows[stay]
        stay = stay.to(self.ids.device)
        self.ids, self.positions, self.last = self.ids[stay], self.positions[stay], self.last[stay]
        self.places = self.slots.keep(self.places, stay, self.longest)
        self._measure()

    def join(self, stay: Tensor, read: Callable[[], SlotRows], steps: int) -> SlotRows:
        """Keep the rows `stay`, and take in those that `read` gives when there is room."""
        self.leave(stay)
        other = read()
        for name in ("rows", "ids", "positions", "last", "places"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        self._measure()
        return self

    def _measure(self) -> None:
        if len(self.rows) == 0:
            return
        self.longest = int(self.positions.max()) + 1
        self.equal = self.longest == int(self.positions.min()) + 1


class SlotReader:
    """Reads prompts into slots.

    Args:
        decoder: of the model.
        rows: the most that are sampled at once.
        longest: tokens of the longest prompt of all.
        cap: tokens of the longest completion.
        final_states: whether the final states are wanted.

    Attributes:
        take_step: of the rows that it reads; the decoder's own pass unless somebody puts another one in its place.
    """

    def __init__(self, decoder: Decoder, rows: int, longest: int, cap: int, final_states: bool) -> None:
        self.decoder, self.cap, self.final_states = decoder, cap, final_states
        self.slots = decoder.slots(rows, longest + cap)
        self.take_step: Pass = decoder

    def parts(self, prompts: Sequence[Sequence[int]]) -> list[slice]:
        """Which of these requests are read together: all, since nothing is padded."""
        return [slice(0, len(prompts))]

    def read(
        self, rows: Tensor, prompts: Sequence[Sequence[int]], owners: Tensor
    ) -> tuple[SlotRows, Tensor, dict[str, list[Tensor]]]:
        """Read the prompts of the requests `rows [b]`.

        Args:
            rows: the requests.
            prompts: their P different prompts.
            owners: `[b]` the prompt of each request, in ascending order.

        Returns:
            The rows; `[b, V]` logits after their prompts; for each prompt the states by name.
        """
        slots, device = self.slots, self.slots.keys.device
        places = slots.take(len(rows))
        own = places[torch.searchsorted(owners, torch.arange(len(prompts))).to(device)]  # read in the first's slot
        lengths = [len(prompt) for prompt in prompts]
        logits: list[Tensor] = []
        states: dict[str, list[Tensor]] = {}
        for part in parts_of(lengths):
            taken = lengths[part]
            ids = torch.tensor([token for prompt in prompts[part] for token in prompt])
            positions = torch.cat([torch.arange(length) for length in taken])
            at = own[part].repeat_interleave(torch.tensor(taken, device=device))
            tokens = Tokens(ids.to(device), positions.to(device), at, max(taken), lengths=taken)
            said, trunk, final = self.decoder(tokens, slots)
            logits.append(said)
            if self.final_states:
                states.setdefault("final", []).extend(final.cpu().split(1))
            if trunk is not None:
                states.setdefault("trunk", []).extend(trunk.cpu().split(taken))
        of = owners.to(device)
        others = places != own[of]
        if len(prompts) < len(rows):
            slots.copy(own[of][others], places[others], max(lengths))
        all_lengths = torch.tensor(lengths)[owners]
        filled = max(lengths)
        pool = SlotRows(
            self.take_step, slots, rows, ids=of, positions=(all_lengths - 1).to(device),
            last=(all_lengths + self.cap - 1).to(device), places=places, longest=filled,
            equal=filled == min(lengths), final_states=self.final_states,
        )  # fmt: skip
        whole = torch.cat(logits)
        return pool, whole if len(prompts) == len(rows) else whole[of], states


def parts_of(lengths: list[int]) -> Iterator[slice]:
    """Prompts that are read in one pass: as many as have `PASS_TOKENS` tokens, at least one."""
    start, tokens = 0, 0
    for row, length in enumerate(lengths):
        if row > start and tokens + length > PASS_TOKENS:
            yield slice(start, row)
            start, tokens = row, 0
        tokens += length
    yield slice(start, len(lengths))

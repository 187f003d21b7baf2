"""Splitting a batch: shuffled minibatches (optimiser steps) of micro-batches (forward passes).

A minibatch decides what one optimiser step sees, so it changes the result; a micro-batch only decides what fits
in memory, so it must not: denominators belong to the minibatch (`update.py`).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor


def shuffled_minibatches(
    num_items: int, num_minibatches: int, generator: torch.Generator, groups: Tensor | None = None
) -> list[Tensor]:
    """`num_minibatches` disjoint index vectors that cover all items; their sizes differ by one at most.

    Args:
        num_items: of the batch.
        num_minibatches: optimiser steps.
        generator: of the shuffle.
        groups: `[num_items]` numbers from 0; items of one group lie side by side, so that only a group at the edge of
            a minibatch is split. None shuffles single items.

    Raises:
        ValueError: more minibatches than items.
    """
    if not 1 <= num_minibatches <= num_items:
        raise ValueError(f"cannot split {num_items} items into {num_minibatches} minibatches")
    if groups is None:
        order = torch.randperm(num_items, generator=generator)
    else:
        rank = torch.randperm(int(groups.max()) + 1, generator=generator)
        order = torch.argsort(rank[groups.cpu()], stable=True)
    return list(order.tensor_split(num_minibatches))


def budgeted_microbatches(
    items: Tensor, costs: Tensor, budget: int, neighbours: tuple[Tensor, Tensor] | None = None
) -> list[Tensor]:
    """Micro-batches of similar cost per item, each of at most `budget` after padding; the last of at most 5/4 of it.

    A rest that fits into the last quarter joins the micro-batch before it: a pass of a few rows reads all weights for
    little. Rows are padded to the longest of their micro-batch, so what counts is rows * longest. Items are sorted by
    cost first: neighbours have equal lengths and little is padded. An item over the budget goes alone.

    Args:
        items: `[J]` indices into `costs`.
        costs: `[I]` cost of every item.
        budget: rows * longest of a micro-batch, a quarter more in the last one.
        neighbours: `(group [I], shared [I])`: items of one group stay side by side, the groups sorted by their longest
            item, and pay the `shared` part of their cost once in a micro-batch; then the sum is what counts.
    """
    order = items[torch.argsort(costs[items], descending=True, stable=True)]
    if neighbours is not None and len(order):
        return _shared_microbatches(order, costs, budget, *neighbours)
    longest = costs[order]
    batches: list[Tensor] = []
    start = 0
    while start < len(order):
        cost, left = max(int(longest[start]), 1), len(order) - start
        rows = left if 4 * left * cost <= 5 * budget else max(budget // cost, 1)
        batches.append(order[start : start + rows])
        start += rows
    return batches


def _shared_microbatches(order: Tensor, costs: Tensor, budget: int, group: Tensor, shared: Tensor) -> list[Tensor]:
    """Groups in the order of their longest item, cut between groups where they fit into the budget by themselves."""
    of = group[order]
    longest_of = costs.new_zeros(int(of.max()) + 1).scatter_reduce(0, of, costs[order], "amax")
    order = order[torch.argsort(of, stable=True)]
    order = order[torch.argsort(longest_of[group[order]], descending=True, stable=True)]
    pieces: list[tuple[int, int]] = []  # items and cost of groups, or of parts of groups over the budget
    before: int | None = None
    rows = torch.stack([group, costs, shared], 1)[order]
    for number, whole, once in cast(list[list[int]], rows.tolist()):  # pyright: ignore[reportUnknownMemberType]
        if number == before and pieces[-1][1] + whole - once <= budget:
            pieces[-1] = pieces[-1][0] + 1, pieces[-1][1] + whole - once
        else:
            pieces.append((1, whole))
        before = number
    left, sizes, filled = sum(cost for _, cost in pieces), list[int](), 0
    for size, cost in pieces:
        rest_fits = 4 * (filled + left) <= 5 * budget
        if not sizes or (filled + cost > budget and not rest_fits):
            sizes.append(0)
            filled = 0
        sizes[-1] += size
        filled, left = filled + cost, left - cost
    ends = torch.tensor(sizes).cumsum(0)[:-1]
    return list(order.tensor_split(ends))


def decision_indices(items: Tensor, decision_counts: Tensor) -> Tensor:
    """Where the decisions of `items [J]` lie in the batch's flat vectors, in the order of `items`."""
    counts = decision_counts[items]
    starts = decision_counts.cumsum(0)[items] - counts
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    within = torch.arange(int(counts.sum()), device=items.device) - first
    return torch.repeat_interleave(starts, counts) + within

"""Splitting a batch: shuffled minibatches (optimiser steps) of micro-batches (forward passes).

A minibatch decides what one optimiser step sees, so it changes the result; a micro-batch only decides what fits
in memory, so it must not: denominators belong to the minibatch (`update.py`).
"""

from __future__ import annotations

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


def budgeted_microbatches(items: Tensor, costs: Tensor, budget: int, groups: Tensor | None = None) -> list[Tensor]:
    """Micro-batches of similar cost per item, each of at most `budget` after padding; the last of at most 5/4 of it.

    A rest that fits into the last quarter joins the micro-batch before it: a pass of a few rows reads all weights for
    little. Rows are padded to the longest of their micro-batch, so what counts is rows * longest. Items are sorted by
    cost first: neighbours have equal lengths and little is padded. An item over the budget goes alone.

    Args:
        items: `[J]` indices into `costs`.
        costs: `[I]` cost of every item.
        budget: rows * longest of a micro-batch, a quarter more in the last one.
        groups: `[I]` numbers from 0; items of one group stay side by side, the groups sorted by their longest item.
    """
    order = items[torch.argsort(costs[items], descending=True, stable=True)]
    longest = costs[order]
    if groups is not None and len(order):
        of = groups[order]
        longest_of = costs.new_zeros(int(of.max()) + 1).scatter_reduce(0, of, longest, "amax")
        order = order[torch.argsort(of, stable=True)]
        order = order[torch.argsort(longest_of[groups[order]], descending=True, stable=True)]
        longest = longest_of[groups[order]]  # of the group: what comes later is no longer
    batches: list[Tensor] = []
    start = 0
    while start < len(order):
        cost, left = max(int(longest[start]), 1), len(order) - start
        rows = left if 4 * left * cost <= 5 * budget else max(budget // cost, 1)
        batches.append(order[start : start + rows])
        start += rows
    return batches


def decision_indices(items: Tensor, decision_counts: Tensor) -> Tensor:
    """Where the decisions of `items [J]` lie in the batch's flat vectors, in the order of `items`."""
    counts = decision_counts[items]
    starts = decision_counts.cumsum(0)[items] - counts
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    within = torch.arange(int(counts.sum()), device=items.device) - first
    return torch.repeat_interleave(starts, counts) + within

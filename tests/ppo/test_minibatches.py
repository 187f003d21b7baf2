"""Splitting a batch: every item once, within the budget, and back to its decisions."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heeler.ppo.minibatches import budgeted_microbatches, decision_indices, shuffled_minibatches

from .toy import rows_of


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
def test_minibatches_hold_every_item_once_and_have_equal_sizes(num_items, num_minibatches, seed):
    num_minibatches = min(num_items, num_minibatches)
    minibatches = shuffled_minibatches(num_items, num_minibatches, seeded(seed))
    assert len(minibatches) == num_minibatches
    assert sorted(torch.cat(minibatches).tolist()) == list(range(num_items))
    sizes = [len(m) for m in minibatches]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 6), st.integers(0, 5))
def test_groups_stay_together(num_groups, size, num_minibatches, seed):
    groups = torch.arange(num_groups).repeat(size)
    num_minibatches = min(num_minibatches, len(groups))
    minibatches = shuffled_minibatches(len(groups), num_minibatches, seeded(seed), groups)
    order = torch.cat(minibatches)
    assert sorted(order.tolist()) == list(range(len(groups)))
    blocks = groups[order].reshape(num_groups, size)
    assert (blocks == blocks[:, :1]).all()
    shuffles = {tuple(groups[shuffled_minibatches(len(groups), 1, seeded(s), groups)[0]].tolist()) for s in range(20)}
    assert len(shuffles) > 1 or num_groups == 1
    assert max(len(m) for m in minibatches) - min(len(m) for m in minibatches) <= 1


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=30), st.integers(1, 60),
    st.integers(0, 9), st.integers(0, 5),
)  # fmt: skip
def test_micro_batches_keep_groups_together_within_the_budget(rows, budget, prompt, seed):
    """Each group pays its prompt once in a micro-batch, and is cut only where it is over the budget by itself."""
    groups, own = (torch.tensor(column) for column in zip(*rows, strict=True))
    shared = torch.full_like(own, prompt) + groups
    costs = shared + own
    items = torch.randperm(len(rows), generator=seeded(seed))
    batches = budgeted_microbatches(items, costs, budget, (groups, shared))
    order = torch.cat(batches)
    assert sorted(order.tolist()) == list(range(len(rows)))

    def cost(batch):
        return int(own[batch].sum()) + sum(prompt + g for g in set(groups[batch].tolist()))

    for batch in batches:
        assert len(batch) == 1 or cost(batch) <= budget * (5 / 4 if batch is batches[-1] else 1)
    met = groups[order].tolist()
    assert len([g for g, before in zip(met, [None, *met], strict=False) if g != before]) == len(set(met))
    for g in set(met):
        if cost((groups == g).nonzero()[:, 0]) <= budget:
            assert sum(g in groups[batch].tolist() for batch in batches) == 1
    for batch, after in pairwise(batches):  # full: what begins the next one would not have fitted
        following = after[groups[after] == groups[after[0]]]
        first = following if cost(following) <= budget else after[:1]
        assert cost(torch.cat([batch, first])) > budget


@pytest.mark.parametrize(("rest", "sizes"), [(25, [4]), (26, [2, 2])])
def test_a_rest_of_groups_that_fits_into_the_last_quarter_joins(rest, sizes):
    """Two groups of 60 + 40 and of `rest`, their prompts counted once."""
    groups, shared = torch.tensor([0, 0, 1, 1]), torch.tensor([20, 20, 5, 5])
    costs = torch.tensor([80, 40, rest - 4, 9])
    found = budgeted_microbatches(torch.arange(4), costs, 100, (groups, shared))
    assert [len(batch) for batch in found] == sizes


def test_the_generator_decides_the_order():
    def order(generator):
        return torch.cat(shuffled_minibatches(20, 4, generator)).tolist()

    assert order(seeded(1)) == order(seeded(1))
    assert order(seeded(1)) != order(seeded(2))
    generator = seeded(1)
    assert order(generator) != order(generator)  # another epoch, another order


@pytest.mark.parametrize(("num_items", "num_minibatches"), [(3, 4), (3, 0), (0, 1)])
def test_impossible_splits_are_refused(num_items, num_minibatches):
    with pytest.raises(ValueError, match="cannot split"):
        shuffled_minibatches(num_items, num_minibatches, seeded(0))


@st.composite
def costed_items(draw):
    """The costs of a batch, and some of its items in any order."""
    costs = draw(st.lists(st.integers(0, 30), min_size=1, max_size=25))
    items = draw(st.permutations(range(len(costs))))
    return items[: draw(st.integers(0, len(costs)))], costs


def microbatches_loop(items, costs, budget):
    """Longest first; each next item joins while its padded row fits, and all that is left within a quarter more."""
    batches = []
    waiting = sorted(items, key=lambda i: -costs[i])
    while waiting:
        longest = max(costs[waiting[0]], 1)
        batch = [waiting.pop(0)]
        if (1 + len(waiting)) * longest <= 1.25 * budget:
            batch += waiting
            waiting = []
        while waiting and (len(batch) + 1) * longest <= budget:
            batch.append(waiting.pop(0))
        batches.append(batch)
    return batches


@given(costed_items(), st.integers(1, 100))
def test_microbatches_equal_their_plain_loop_and_keep_the_budget(data, budget):
    items, costs = data
    batches = budgeted_microbatches(torch.tensor(items, dtype=torch.int64), torch.tensor(costs), budget)
    batches = [batch.tolist() for batch in batches]
    assert batches == microbatches_loop(items, costs, budget)
    assert sorted(i for batch in batches for i in batch) == sorted(items)
    for batch in batches:
        allowed = budget * (5 / 4 if batch is batches[-1] else 1)
        assert len(batch) == 1 or len(batch) * max(costs[i] for i in batch) <= allowed


@st.composite
def counted_items(draw):
    counts = draw(st.lists(st.integers(0, 6), min_size=1, max_size=12))
    return draw(st.lists(st.integers(0, len(counts) - 1), max_size=12)), counts


@given(counted_items())
def test_decision_indices_equal_their_plain_loop(data):
    items, counts = data
    counts = torch.tensor(counts)
    indices = decision_indices(torch.tensor(items, dtype=torch.int64), counts)
    assert indices.dtype == torch.int64
    assert indices.tolist() == rows_of(items, counts)


def test_decision_indices_by_hand():
    """Items of 2, 0 and 3 decisions, the last one first."""
    assert decision_indices(torch.tensor([2, 1, 0]), torch.tensor([2, 0, 3])).tolist() == [2, 3, 4, 0, 1]

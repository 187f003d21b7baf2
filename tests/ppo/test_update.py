"""One update of a tabular policy in float64: what must change it, what must not, and what must stop it."""

import copy
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from heeler.ppo.losses import ratio, value_loss
from heeler.ppo.update import PPOConfig, update
from heeler.runtime.passes import PassBudget
from heeler.runtime.reduce import LocalReduce
from heeler.types import CheckFailed, HeelerError, PolicyOutput

from .toy import TablePolicy, flat, in_processes, make_batch, make_inputs, select_batch, updated

DOUBLE = torch.float64
POLICY_ONLY = PPOConfig(value_coef=0.0, max_grad_norm=1e9)
EVERYTHING = PPOConfig(epochs=3, value_clip=0.3, entropy_coef=0.01, max_grad_norm=0.5)


def same(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def policy_and_batch():
    policy = TablePolicy()
    return policy, make_batch(policy)


def comparable(metrics):
    """The metrics without the one that is a maximum over all decisions, dropped ones too."""
    return {key: value for key, value in metrics.items() if key != "policy/ratio_max"}


# What must not matter


@pytest.mark.parametrize("budget", [1, 7, 13])
def test_micro_batches_change_nothing(budget):
    policy, batch = policy_and_batch()
    config = replace(EVERYTHING, minibatches=2)
    whole, whole_metrics = updated(policy, batch, replace(config, token_budget=10**6))
    parts, parts_metrics = updated(policy, batch, replace(config, token_budget=budget))
    assert len(parts.evaluated) > len(whole.evaluated) == 6
    same(flat(parts), flat(whole))
    assert parts_metrics == pytest.approx(whole_metrics, rel=1e-9)


class SmallMemory(TablePolicy):
    """Fails like a GPU where a pass has more sequences than `room`, with half of its gradient added."""

    room = 2

    def evaluate(self, inputs):
        if len(inputs.names) > self.room:
            self.logits.grad = torch.ones_like(self.logits)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().evaluate(inputs)


def test_passes_that_do_not_fit_are_made_smaller_and_nothing_counts_twice(capsys):
    policy, batch = policy_and_batch()
    small = SmallMemory()
    small.load_state_dict(policy.state_dict())
    config = replace(EVERYTHING, minibatches=2, token_budget=64)
    expected, expected_metrics = updated(policy, batch, config)
    budget = PassBudget(64)
    found, metrics = updated(small, batch, config, passes=budget)
    same(flat(found), flat(expected))
    assert metrics == pytest.approx(expected_metrics, rel=1e-9)
    assert budget.tokens < 10 and all(len(names) <= 2 for names in found.evaluated)
    assert f"from now on passes have {budget.tokens}" in capsys.readouterr().out
    before = budget.tokens
    updated(small, batch, config, passes=budget)
    assert budget.tokens == before and capsys.readouterr().out == ""  # it is not tried again


def test_a_sequence_that_does_not_fit_alone_is_said():
    policy, batch = policy_and_batch()
    small = SmallMemory()
    small.load_state_dict(policy.state_dict())
    small.room = 0
    with pytest.raises(HeelerError, match=r"one sequence alone does not fit .*\(CUDA out of memory\)"):
        updated(small, batch, EVERYTHING)


def attached_to(policy, batch, parts):
    """The batch with the passes that the policy has made of the items in `parts`, their gradients not taken yet."""
    passes = [(torch.tensor(items), policy.evaluate(batch.inputs.select(torch.tensor(items)))) for items in parts]
    policy.evaluated.clear()
    return replace(batch, attached=passes)


class FullMemory(torch.autograd.Function):
    """What a pass keeps is there, and its backward pass does not fit."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def attached_update(policy, batch, config, passes=None):
    """One update of the policy itself, of which the batch may have passes."""
    descent = torch.optim.SGD(policy.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(0)
    budget = PassBudget(1024) if passes is None else passes
    return update(policy, descent, batch, config, generator=generator, reduce=LocalReduce(), passes=budget)


@pytest.mark.parametrize("epochs", [1, 3])
def test_passes_that_are_attached_still_are_the_first_step(epochs):
    policy, batch = policy_and_batch()
    config = replace(EVERYTHING, epochs=epochs)
    expected, expected_metrics = updated(policy, batch, config)
    attached = attached_to(policy, batch, [[5, 0, 3], [1, 2, 7], [4, 6]])
    assert attached_update(policy, attached, config) == pytest.approx(expected_metrics, rel=1e-9)
    assert len(policy.evaluated) == epochs - 1  # the first epoch asked nothing
    same(flat(policy), flat(expected))


def test_attached_passes_are_left_where_a_step_learns_from_a_part():
    policy, batch = policy_and_batch()
    config = replace(EVERYTHING, minibatches=2)
    expected, _ = updated(policy, batch, config)
    attached_update(policy, attached_to(policy, batch, [list(range(8))]), config)
    assert len(policy.evaluated) == 6
    same(flat(policy), flat(expected))


def test_attached_passes_whose_gradient_does_not_fit_are_made_anew(capsys):
    policy, batch = policy_and_batch()
    expected, _ = updated(policy, batch, EVERYTHING)
    attached = attached_to(policy, batch, [[0, 1, 2, 3], [4, 5, 6, 7]])
    (_, fits), (items, output) = attached.attached
    too_large = replace(output, logprobs=FullMemory.apply(output.logprobs))
    batch = replace(attached, attached=[(attached.attached[0][0], fits), (items, too_large)])
    budget = PassBudget(64)
    attached_update(policy, batch, EVERYTHING, budget)
    same(flat(policy), flat(expected))
    assert "did not fit" in capsys.readouterr().out and budget.tokens < 64


def test_a_refreshed_batch_is_what_the_later_epochs_learn():
    policy, batch = policy_and_batch()
    other = replace(batch, advantages=-2 * batch.advantages, returns=batch.returns + 1, old_values=batch.old_values - 1)
    config = replace(EVERYTHING, minibatches=2, ratio_tolerance=10.0)
    asked = []

    def refresh():
        asked.append(len(trained.evaluated))
        return other

    trained, twin = copy.deepcopy(policy), copy.deepcopy(policy)
    shuffles = torch.Generator().manual_seed(0)
    descent = torch.optim.SGD(trained.parameters(), lr=0.5)
    update(
        trained,
        descent,
        batch,
        config,
        generator=shuffles,
        reduce=LocalReduce(),
        passes=PassBudget(1024),
        refresh=refresh,
    )
    shuffles = torch.Generator().manual_seed(0)  # the twin: an update of one epoch after the other
    descent = torch.optim.SGD(twin.parameters(), lr=0.5)
    for given in (batch, other, other):
        update(
            twin,
            descent,
            given,
            replace(config, epochs=1),
            generator=shuffles,
            reduce=LocalReduce(),
            passes=PassBudget(1024),
        )
    same(flat(trained), flat(twin))
    assert asked == [2, 4]  # before the second and the third epoch, after two minibatches each


def test_prompts_are_shuffled_with_all_their_samples():
    policy, batch = policy_and_batch()
    config = PPOConfig(epochs=4, minibatches=4, shuffle="prompts")
    with pytest.raises(HeelerError, match="is for samples of prompts, of which this batch has none"):
        updated(policy, batch, config)
    of_prompts = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    batch = replace(batch, inputs=replace(batch.inputs, groups=of_prompts))
    trained, _ = updated(policy, batch, config)
    pairs = [tuple(sorted(items)) for items in trained.evaluated]
    assert len(pairs) == 16 and set(pairs) == {(0, 4), (1, 5), (2, 6), (3, 7)}
    assert pairs[:4] != pairs[4:8] or pairs[:4] != pairs[8:12]  # another order in another epoch


@pytest.mark.parametrize("alike", [True, False])
def test_neighbours_share_a_micro_batch_where_the_policy_shares_prompts(alike):
    policy, batch = policy_and_batch()
    costs = torch.full((8,), 3) if alike else batch.inputs.costs
    of_prompts = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    batch = replace(batch, inputs=replace(batch.inputs, neighbours=(of_prompts, torch.zeros(8).long()), costs=costs))
    config = PPOConfig(epochs=1, minibatches=1, token_budget=2 * int(costs.max()))
    together = []
    for shares in (True, False):
        policy.shares_prompts = shares
        trained, _ = updated(policy, batch, config)
        micro_batches = [set(items) for items in trained.evaluated]
        together.append(sum({n, n + 4} <= items for items in micro_batches for n in range(4)))
    assert together[0] > together[1]


@pytest.mark.parametrize("shares", [[[0, 1, 2], [3, 4, 5, 6, 7]], [[5], [7, 1, 2], [0, 3, 4, 6]]])
def test_the_number_of_processes_changes_nothing(shares):
    policy, batch = policy_and_batch()
    config = replace(EVERYTHING, target_kl=0.05, epochs=4)
    alone, metrics = updated(policy, batch, config)
    results = in_processes(
        len(shares),
        lambda reduce: updated(
            policy, select_batch(batch, shares[reduce.rank]), config, seed=reduce.rank, reduce=reduce
        ),
    )
    for share, share_metrics in results:
        same(flat(share), flat(alone))
        assert share_metrics == pytest.approx(metrics, rel=1e-9)


def test_the_smallest_share_limits_the_minibatches_of_all():
    """Three items in one process, five in the other, four minibatches asked for: three steps in both, no deadlock."""
    policy, batch = policy_and_batch()
    shares = [[0, 1, 2], [3, 4, 5, 6, 7]]
    config = replace(EVERYTHING, epochs=1, minibatches=4)
    (first, metrics), (second, _) = in_processes(
        2, lambda reduce: updated(policy, select_batch(batch, shares[reduce.rank]), config, reduce=reduce)
    )
    assert metrics["optimizer_steps"] == 3
    same(flat(first), flat(second), 0)


def test_a_dropped_item_changes_nothing():
    policy, batch = policy_and_batch()
    rows = slice(4, 8)  # the decisions of item 2
    dropped = {
        name: getattr(batch, name).clone() for name in ("policy_weights", "value_weights", "advantages", "returns")
    }
    dropped["policy_weights"][rows] = dropped["value_weights"][rows] = 0
    dropped["advantages"][rows] = dropped["returns"][rows] = 1000.0
    with_it, metrics_with = updated(policy, replace(batch, **dropped), EVERYTHING)
    without, metrics_without = updated(policy, select_batch(batch, [0, 1, 3, 4, 5, 6, 7]), EVERYTHING)
    same(flat(with_it), flat(without))
    assert comparable(metrics_with) == pytest.approx(comparable(metrics_without), rel=1e-9)
    assert float((flat(with_it) - flat(updated(policy, batch, EVERYTHING)[0])).abs().max()) > 1e-3


def test_a_dropped_decision_inside_an_item_changes_nothing():
    policy, batch = policy_and_batch()
    hole = 5  # the second decision of item 2
    dropped = {name: getattr(batch, name).clone() for name in ("policy_weights", "value_weights")}
    dropped["policy_weights"][hole] = dropped["value_weights"][hole] = 0
    kept = [t for t in range(21) if t != hole]
    shorter = replace(
        batch,
        inputs=make_inputs(
            [3, 1, 3, 2, 5, 2, 1, 3], batch.inputs.states[kept].tolist(), batch.inputs.actions[kept].tolist()
        ),
        **{f.name: getattr(batch, f.name)[kept] for f in fields(batch) if f.name not in ("inputs", "attached")},
    )
    same(flat(updated(policy, replace(batch, **dropped), EVERYTHING)[0]), flat(updated(policy, shorter, EVERYTHING)[0]))


# What one step is


def test_the_first_step_is_the_weighted_policy_gradient():
    """theta - lr * grad of sum(w * rho * -A * log pi) / sum(w): it flows, and it flows the right way."""
    policy, batch = policy_and_batch()
    after, _ = updated(policy, batch, POLICY_ONLY, lr=0.1)
    logprobs = policy.evaluate(batch.inputs).logprobs
    loss = -(batch.policy_weights * batch.importance_weights * batch.advantages * logprobs).sum()
    (gradient,) = torch.autograd.grad(loss / batch.policy_weights.sum(), policy.logits)
    assert float(gradient.abs().max()) > 0.01
    same(after.logits.detach(), policy.logits.detach() - 0.1 * gradient)
    same(after.state_values, policy.state_values)


def test_the_critic_takes_the_weighted_value_gradient():
    policy, batch = policy_and_batch()
    config = PPOConfig(value_coef=0.25, value_clip=0.2, max_grad_norm=1e9)
    after, _ = updated(policy, batch, config, lr=0.1)
    values = policy.evaluate(batch.inputs).values
    loss = (batch.value_weights * value_loss(values, batch.old_values, batch.returns, 0.2)).sum()
    (gradient,) = torch.autograd.grad(0.25 * loss / batch.value_weights.sum(), policy.state_values)
    assert float(gradient.abs().max()) > 0.01
    same(after.state_values.detach(), policy.state_values.detach() - 0.1 * gradient)


def test_importance_weights_multiply_the_loss_and_not_its_denominator():
    policy, batch = policy_and_batch()
    ones = torch.ones_like(batch.importance_weights)
    plain, _ = updated(policy, replace(batch, importance_weights=ones), POLICY_ONLY)
    double, _ = updated(policy, replace(batch, importance_weights=2 * ones), POLICY_ONLY)
    same(flat(double) - flat(policy), 2 * (flat(plain) - flat(policy)))


def test_policy_weights_are_their_own_denominator():
    policy, batch = policy_and_batch()
    plain, _ = updated(policy, batch, EVERYTHING)
    double, _ = updated(
        policy,
        replace(batch, policy_weights=2 * batch.policy_weights, value_weights=3 * batch.value_weights),
        EVERYTHING,
    )
    same(flat(double), flat(plain))


def test_a_constant_denominator_replaces_the_sum_of_weights():
    policy, batch = policy_and_batch()
    plain, _ = updated(policy, batch, POLICY_ONLY)
    constant, _ = updated(policy, batch, replace(POLICY_ONLY, loss_denominator=16.0))
    factor = float(batch.policy_weights.sum()) / 16
    same(flat(constant) - flat(policy), factor * (flat(plain) - flat(policy)))


def test_the_upper_clip_range_is_its_own():
    """Rewarded decisions leave the trust region at 1 + clip_range_high; until then both ranges agree."""
    policy, batch = policy_and_batch()
    batch = replace(batch, advantages=batch.advantages.abs() + 1)
    config = replace(POLICY_ONLY, epochs=4, clip_range=0.1)
    narrow, metrics = updated(policy, batch, config)
    wide, wide_metrics = updated(policy, batch, replace(config, clip_range_high=0.9))
    assert metrics["policy/clip_fraction"] > wide_metrics["policy/clip_fraction"] >= 0
    assert float((flat(narrow) - flat(wide)).abs().max()) > 1e-3


def test_clipped_decisions_stop_moving_the_policy():
    """Every ratio is far outside after the first step, on the rewarded side: more epochs change nothing."""
    policy = TablePolicy()
    batch = make_batch(policy, [1])
    batch = replace(batch, advantages=torch.ones(1, dtype=DOUBLE))
    once, _ = updated(policy, batch, replace(POLICY_ONLY, epochs=2), lr=5.0)
    often, metrics = updated(policy, batch, replace(POLICY_ONLY, epochs=6), lr=5.0)
    same(flat(once), flat(often), 0)
    assert metrics["policy/clip_fraction"] == pytest.approx(5 / 6)


def test_a_very_large_clip_range_is_no_clipping():
    """Four epochs are four steps of the plain gradient of ratio * advantage, wherever the ratio has gone."""
    policy, batch = policy_and_batch()
    config = replace(POLICY_ONLY, epochs=4, clip_range=1e9)
    after, metrics = updated(policy, batch, config, lr=5.0)
    assert metrics["policy/ratio_max"] > 1.5 and metrics["policy/clip_fraction"] == 0.0
    plain = copy.deepcopy(policy)
    for _ in range(4):
        ratios = ratio(plain.evaluate(batch.inputs).logprobs, batch.old_logprobs)
        loss = -(batch.policy_weights * batch.importance_weights * ratios * batch.advantages).sum()
        (gradient,) = torch.autograd.grad(loss / batch.policy_weights.sum(), plain.logits)
        with torch.no_grad():
            plain.logits -= 5.0 * gradient
    same(flat(after), flat(plain))
    assert float((flat(after) - flat(updated(policy, batch, replace(config, clip_range=0.2), lr=5.0)[0])).norm()) > 0.1


def test_the_entropy_bonus_raises_entropy():
    policy, batch = policy_and_batch()
    batch = replace(batch, advantages=torch.zeros_like(batch.advantages))
    config = replace(POLICY_ONLY, epochs=5)

    def entropy(policy):
        return float((batch.policy_weights * policy.evaluate(batch.inputs).entropy.detach()).sum())

    without, _ = updated(policy, batch, config)
    with_bonus, _ = updated(policy, batch, replace(config, entropy_coef=1.0))
    assert entropy(without) == entropy(policy)
    assert entropy(with_bonus) > entropy(policy) * 1.01


def test_updates_raise_what_was_good_and_lower_what_was_bad():
    policy = TablePolicy()
    batch = replace(make_batch(policy, [1, 1]), inputs=make_inputs([1, 1], [0, 1], [2, 3]))
    with torch.no_grad():
        before = policy.evaluate(batch.inputs).logprobs
    batch = replace(batch, old_logprobs=before, advantages=torch.tensor([1.0, -1.0], dtype=DOUBLE))
    after, _ = updated(policy, batch, POLICY_ONLY)
    change = after.evaluate(batch.inputs).logprobs.detach() - before
    assert change[0] > 0.01 and change[1] < -0.01


# Epochs, minibatches, limits


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (2, 4), (3, 8)])
def test_minibatches_are_optimiser_steps_an_epoch(epochs, minibatches):
    policy, batch = policy_and_batch()
    steps = 0

    class CountingSGD(torch.optim.SGD):
        def step(self, closure=None):
            nonlocal steps
            steps += 1
            return super().step(closure)

    config = PPOConfig(epochs=epochs, minibatches=minibatches)
    after, metrics = updated(policy, batch, config, lr=0.01, optimizer=CountingSGD)
    assert steps == metrics["optimizer_steps"] == epochs * minibatches
    # each epoch sees every item once
    seen = [item for items in after.evaluated for item in items]
    assert [sorted(seen[8 * e : 8 * e + 8]) for e in range(epochs)] == [list(range(8))] * epochs


def test_the_generator_decides_the_update():
    policy, batch = policy_and_batch()
    config = replace(EVERYTHING, minibatches=4)
    first, again, other = (updated(policy, batch, config, seed=seed)[0] for seed in (0, 0, 1))
    same(flat(first), flat(again), 0)
    assert float((flat(first) - flat(other)).abs().max()) > 1e-6


def test_the_gradient_norm_bounds_the_step():
    policy, batch = policy_and_batch()
    batch = replace(batch, advantages=100 * batch.advantages)
    free, metrics = updated(policy, batch, replace(POLICY_ONLY, max_grad_norm=1e9), lr=1.0)
    bound, bound_metrics = updated(policy, batch, replace(POLICY_ONLY, max_grad_norm=0.25), lr=1.0)
    free_step, bound_step = flat(free) - flat(policy), flat(bound) - flat(policy)
    assert float(free_step.norm()) > 1
    assert float(bound_step.norm()) == pytest.approx(0.25, rel=1e-4)
    same(bound_step / bound_step.norm(), free_step / free_step.norm())
    # reported before the clip
    assert metrics["grad_norm"] == bound_metrics["grad_norm"] == pytest.approx(float(free_step.norm()))


def test_each_group_has_a_gradient_norm_of_its_own():
    policy, batch = policy_and_batch()
    batch = replace(batch, advantages=100 * batch.advantages, returns=100 * batch.returns)
    after = copy.deepcopy(policy)
    groups = [{"params": [after.logits], "name": "policy"}, {"params": [after.state_values], "name": "critic"}]
    metrics = update(
        after,
        torch.optim.SGD(groups, lr=1.0),
        batch,
        PPOConfig(max_grad_norm=0.25),
        generator=torch.Generator(),
        reduce=LocalReduce(),
        passes=PassBudget(1024),
    )
    assert float((after.logits - policy.logits).detach().norm()) == pytest.approx(0.25, rel=1e-4)
    assert float((after.state_values - policy.state_values).detach().norm()) == pytest.approx(0.25, rel=1e-4)
    assert metrics["grad_norm"] > 1 and metrics["critic/grad_norm"] > 1
    assert metrics["grad_norm"] != metrics["critic/grad_norm"]


def test_target_kl_stops_early():
    policy, batch = policy_and_batch()
    config = replace(POLICY_ONLY, epochs=10)
    _, metrics = updated(policy, batch, config, lr=5.0)
    assert (metrics["optimizer_steps"], metrics["policy/kl_stopped"]) == (10, 0.0)
    # the first epoch starts at KL 0; the second one is the first that can see a difference
    _, metrics = updated(policy, batch, replace(config, target_kl=1e-3), lr=5.0)
    assert (metrics["optimizer_steps"], metrics["policy/kl_stopped"]) == (2, 1.0)
    assert metrics["kl/old_new"] > 0
    _, metrics = updated(policy, batch, replace(config, target_kl=100.0), lr=5.0)
    assert (metrics["optimizer_steps"], metrics["policy/kl_stopped"]) == (10, 0.0)


@pytest.mark.parametrize(("factor", "steps"), [(0.99, 2), (1.01, 3)])
def test_all_processes_stop_by_the_global_kl(factor, steps):
    """The target lies just below, or just above, the KL of the whole batch; the KL of each share is elsewhere."""
    policy, batch = policy_and_batch()
    _, metrics = updated(policy, batch, replace(POLICY_ONLY, epochs=2), lr=5.0)
    kl_of_second_epoch = 2 * metrics["kl/old_new"]  # the first epoch, of the same weight, is at 0
    config = replace(POLICY_ONLY, epochs=3, target_kl=factor * kl_of_second_epoch)
    shares = [[0, 1, 2], [3, 4, 5, 6, 7]]
    results = in_processes(
        2, lambda reduce: updated(policy, select_batch(batch, shares[reduce.rank]), config, lr=5.0, reduce=reduce)
    )
    assert [share_metrics["optimizer_steps"] for _, share_metrics in results] == [steps, steps]


def test_the_reported_kl_is_from_old_to_new():
    """In exact expectation over the old policy, epoch two reports KL(old || new) after step one."""
    policy = TablePolicy()
    states, actions = [s for s in range(5) for _ in range(4)], list(range(4)) * 5
    old = policy.logits.detach().log_softmax(-1)
    batch = replace(
        make_batch(policy, [1] * 20),
        inputs=make_inputs([1] * 20, states, actions),
        old_logprobs=old.reshape(-1),
        policy_weights=old.exp().reshape(-1),
    )
    new = updated(policy, batch, POLICY_ONLY, lr=5.0)[0].logits.detach().log_softmax(-1)
    kl = float((old.exp() * (old - new)).sum(-1).mean())
    _, metrics = updated(policy, batch, replace(POLICY_ONLY, epochs=2), lr=5.0)
    assert kl > 0.01
    assert metrics["kl/old_new"] == pytest.approx(kl / 2)  # the mean of both epochs; the first is 0


# What must never happen silently


def test_the_ratio_is_exactly_1_on_the_first_minibatch():
    policy, batch = policy_and_batch()
    _, metrics = updated(policy, batch, EVERYTHING)
    assert metrics["policy/ratio_max"] > 1  # later epochs
    _, metrics = updated(policy, batch, PPOConfig(token_budget=5))
    assert metrics["policy/ratio_max"] == 1.0
    assert metrics["policy/clip_fraction"] == metrics["kl/old_new"] == 0.0


@pytest.mark.parametrize("shift", [0.1, -0.1])
def test_shifted_old_logprobs_stop_the_update(shift):
    policy, batch = policy_and_batch()
    shifted = replace(batch, old_logprobs=batch.old_logprobs + shift)
    with pytest.raises(CheckFailed, match="ratio is off 1"):
        changed_by(policy, shifted, PPOConfig())
    updated(policy, shifted, PPOConfig(ratio_tolerance=0.2))
    updated(policy, replace(batch, old_logprobs=batch.old_logprobs + shift / 1000), PPOConfig())


@pytest.mark.parametrize("field", ["logprobs", "entropy", "values"])
def test_a_policy_that_answers_in_columns_is_refused(field):
    """`[n, 1]` against `[n]` would broadcast to `[n, n]`."""

    class Columns(TablePolicy):
        def evaluate(self, inputs):
            output = super().evaluate(inputs)
            return replace(output, **{field: getattr(output, field)[:, None]})

    policy = Columns()
    batch = make_batch(TablePolicy())
    with pytest.raises(ValueError, match=rf"returned {field} of shape \(21, 1\) for 21 decisions"):
        changed_by(policy, batch, PPOConfig())


def changed_by(policy, batch, config):
    """Update in place and insist, when a check fails, that no parameter moved."""
    before = flat(policy)
    try:
        update(
            policy,
            torch.optim.Adam(policy.parameters(), lr=0.1),
            batch,
            config,
            generator=torch.Generator(),
            reduce=LocalReduce(),
            passes=PassBudget(1024),
        )
    finally:
        assert torch.equal(flat(policy), before)


@pytest.mark.parametrize("field", ["advantages", "returns", "old_logprobs", "importance_weights"])
@pytest.mark.parametrize("budget", [1, 4096])
def test_nan_stops_the_update_before_any_parameter_moves(field, budget):
    policy, batch = policy_and_batch()
    poisoned = getattr(batch, field).clone()
    poisoned[7] = float("nan")
    with pytest.raises(CheckFailed, match="the loss is not finite"):
        changed_by(policy, replace(batch, **{field: poisoned}), PPOConfig(token_budget=budget))


def test_a_nan_later_on_leaves_the_parameters_of_the_last_good_step():
    policy, batch = policy_and_batch()
    poisoned = batch.advantages.clone()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    good, bad = order[:4].tolist(), int(order[-1])  # the second minibatch holds the poisoned item
    poisoned[int(batch.inputs.decision_counts[:bad].sum())] = float("nan")
    after = copy.deepcopy(policy)
    with pytest.raises(CheckFailed, match="epoch 1"):
        update(
            after,
            torch.optim.SGD(after.parameters(), lr=0.5),
            replace(batch, advantages=poisoned),
            PPOConfig(minibatches=2),
            generator=torch.Generator().manual_seed(0),
            reduce=LocalReduce(),
            passes=PassBudget(1024),
        )
    same(flat(after), flat(updated(policy, select_batch(batch, good), PPOConfig())[0]))


def test_a_finite_loss_with_a_nan_gradient_stops_the_update():
    class Broken(TablePolicy):
        def evaluate(self, inputs):
            output = super().evaluate(inputs)
            zeros = (self.state_values - self.state_values.detach())[inputs.states]
            return PolicyOutput(
                logprobs=output.logprobs, entropy=output.entropy, values=output.values + 0 * zeros.abs().sqrt()
            )

    policy = Broken()
    batch = make_batch(policy)
    with pytest.raises(CheckFailed, match="gradient norm"):
        changed_by(policy, batch, PPOConfig())


def test_a_batch_without_weight_takes_no_step_and_says_so(capsys):
    policy, batch = policy_and_batch()
    nothing = torch.zeros_like(batch.policy_weights)
    steps = []

    class WatchedAdam(torch.optim.Adam):
        def step(self, closure=None):
            steps.append(1)
            return super().step(closure)

    after, metrics = updated(
        policy,
        replace(batch, policy_weights=nothing, value_weights=nothing),
        replace(EVERYTHING, minibatches=2),
        optimizer=WatchedAdam,
    )
    assert metrics["optimizer_steps"] == 0 and not steps
    assert torch.equal(flat(after), flat(policy))
    assert "update skipped" in capsys.readouterr().out
    updated(policy, batch, EVERYTHING)
    assert capsys.readouterr().out == ""


def test_value_weights_alone_train_the_critic_only():
    policy, batch = policy_and_batch()
    after, metrics = updated(policy, replace(batch, policy_weights=torch.zeros_like(batch.policy_weights)), EVERYTHING)
    assert torch.equal(after.logits, policy.logits)
    assert float((after.state_values - policy.state_values).detach().abs().max()) > 0.01
    assert metrics["optimizer_steps"] == 3


# Metrics


def test_the_metrics_of_one_step_by_plain_sums():
    policy, batch = policy_and_batch()
    _, metrics = updated(policy, batch, PPOConfig(token_budget=9))
    w, v = batch.policy_weights, batch.value_weights
    entropy = policy.evaluate(batch.inputs).entropy.detach()
    errors = value_loss(batch.old_values, batch.old_values, batch.returns, None)
    assert metrics["policy/loss"] == pytest.approx(
        float(-(w * batch.importance_weights * batch.advantages).sum() / w.sum())
    )
    assert metrics["policy/entropy"] == pytest.approx(float((w * entropy).sum() / w.sum()))
    assert metrics["value/loss"] == pytest.approx(float((v * errors).sum() / v.sum()))

    def variance(x):
        return (v * (x - (v * x).sum() / v.sum()) ** 2).sum() / v.sum()

    explained = 1 - variance(batch.returns - batch.old_values) / variance(batch.returns)
    assert metrics["value/explained_variance"] == pytest.approx(float(explained))


def test_parameters_outside_the_loss_are_left_alone():
    """A parameter without a gradient (a frozen trunk, an unused head) survives the update and its clipping."""
    policy, batch = policy_and_batch()
    policy.unused = nn.Parameter(torch.ones(3, dtype=DOUBLE))
    after, _ = updated(policy, batch, EVERYTHING, optimizer=torch.optim.AdamW)
    assert torch.equal(after.unused, policy.unused)

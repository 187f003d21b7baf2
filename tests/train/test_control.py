"""Runs in environments through the public door: learning, truncation, resuming, seeds, exports, bad input."""

from __future__ import annotations

import copy
import json
import math
import re
import shlex
import shutil
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import pytest
import torch

import heeler
from heeler.cli import main
from heeler.envs.vector import Async, Atari, EnvConfig, EnvPool, Sync, Vectorized, make_one, make_vector
from heeler.policies.distributions import StateDependent
from heeler.policies.networks import MLP, Custom, NatureCNN
from heeler.ppo.advantages import AdvantageConfig, estimate_advantages
from heeler.ppo.schedules import Schedule
from heeler.ppo.update import PPOConfig, update
from heeler.recipes.control import RECIPES, default_config
from heeler.rollout.actors import NumpyActor
from heeler.runtime import machine
from heeler.runtime.reduce import LocalReduce
from heeler.train.control import (
    GymConfig,
    GymRun,
    RewardScaler,
    build_gym_run,
    last_update,
    load_actor_critic,
    load_policy,
    make_score,
    read_rollout,
    resume_gym,
    train_gym,
)
from heeler.train.onnx import export_onnx
from heeler.types import CheckFailed, HeelerError
from tests.toy_envs import OneState

PPO = PPOConfig(epochs=4, minibatches=4, max_grad_norm=0.5, token_budget=65536)
SYNC = [Sync(autoreset="same-step"), Sync(autoreset="next-step")]


def config(id, tmp_path, *, name="run", backend=SYNC[0], num_envs=4, **changes):
    env = EnvConfig(id=id, num_envs=num_envs, backend=backend, kwargs=changes.pop("kwargs", {}))
    base = GymConfig(env=env, out=str(tmp_path / name), eval_episodes=0, num_steps=16, ppo=PPO, threads=1)
    return replace(base, **changes)


def train(*args, **kwargs):
    return train_gym(config(*args, **kwargs), show=False)


# learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "actions, least", [("discrete", 7.0), ("multi_discrete", 7.2), ("multi_binary", 7.2), ("box", 6.5)]
)
def test_identity_environments_are_learned(actions, least, tmp_path):
    run = train(
        "tests.toy_envs:Identity", tmp_path, kwargs={"actions": actions}, steps=8_000, lr=6e-3, num_steps=32,
        network=MLP(hidden=(32,)), advantage=AdvantageConfig(gamma=0.9, lam=0.9),
    )  # fmt: skip
    assert run.evaluate(episodes=20, deterministic=True)["reward"] > least  # of 8


@pytest.mark.parametrize("backend", SYNC, ids=str)
def test_a_policy_with_memory_recalls_and_one_without_cannot(backend, tmp_path):
    scores = {}
    for memory in (0, 16):
        run = train(
            "tests.toy_envs:Recall", tmp_path, name=f"memory-{memory}", backend=backend, num_envs=8, num_steps=20,
            steps=12_000, memory=memory, lr=1e-2, network=MLP(hidden=(16,)),
            advantage=AdvantageConfig(gamma=0.95, lam=0.95),
        )  # fmt: skip
        scores[memory] = run.evaluate(episodes=200, deterministic=True)["reward"]
    assert scores[16] > 0.95 and scores[0] < 0.75


def test_memory_and_masks_go_together(tmp_path):
    run = train(
        "tests.toy_envs:Masked", tmp_path, kwargs={"where": "dict"}, steps=3_000, memory=8, lr=1e-2, num_steps=24,
        network=MLP(hidden=(16,)), advantage=AdvantageConfig(gamma=0.5),
    )  # fmt: skip
    assert run.evaluate(episodes=40, deterministic=True)["reward"] > 13.5  # random play gets about 9, the best about 15


@pytest.mark.parametrize("backend", SYNC, ids=str)
def test_two_masked_choices_are_learned_with_a_memory(backend, tmp_path):
    """The cue is shown at the first step only, so that three of four rewards need the memory."""
    run = train(
        "tests.toy_envs:MaskedPairs", tmp_path, backend=backend, steps=4_000, memory=16, lr=1e-2, num_steps=24,
        network=MLP(hidden=(16,)), advantage=AdvantageConfig(gamma=0.5),
    )  # fmt: skip
    assert run.evaluate(episodes=100, deterministic=True)["reward"] > 7.5  # of 8; without a memory at most about 5.5


def test_state_dependent_exploration_is_learned_and_exported(tmp_path):
    run = train(
        "tests.toy_envs:Identity", tmp_path, kwargs={"actions": "box"}, steps=8_000, lr=6e-3, num_steps=32,
        network=MLP(hidden=(32,)), advantage=AdvantageConfig(gamma=0.9, lam=0.9), log_std=-1.0,
        exploration=StateDependent(every=1),
    )  # fmt: skip
    assert run.policy.fused is None
    assert run.evaluate(episodes=20, deterministic=True)["reward"] > 6.5  # of 8
    export_onnx(run.policy, tmp_path / "policy.onnx")  # raises where the file says something else


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kwargs", [{"vector": True}, {"vector": False, "channels_last": False}])
def test_pictures_are_learned(kwargs, precision, tmp_path):
    run = train(
        "tests.toy_envs:Pictures", tmp_path, kwargs=kwargs, steps=768, num_steps=24, network=NatureCNN(features=32),
        shared=True, lr=1e-3, advantage=AdvantageConfig(gamma=0.5), precision=precision,
    )  # fmt: skip
    assert run.policy.precision == precision
    assert run.evaluate(episodes=8, deterministic=True)["reward"] > 7.5
    export_onnx(run.policy, tmp_path / "policy.onnx")  # raises where the file says something else


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_cartpole_is_solved(seed, tmp_path):
    recipe = replace(RECIPES["cartpole"](), steps=60_000, out=str(tmp_path / "run"), seed=seed, eval_episodes=20)
    run = train_gym(recipe, show=False)
    assert run.summary["eval/before"]["reward"] < 150 and run.summary["eval/after"]["reward"] > 400


# truncation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory, normalize", [(0, False), (0, True), (4, False)])
@pytest.mark.parametrize("backend", SYNC, ids=str)
def test_a_time_limit_is_no_end_of_the_world(backend, memory, normalize, tmp_path):
    """One state, reward 1: V = 1 / (1 - gamma) = 5 if cuts are bootstrapped; 2.9 on average if they counted as ends."""
    settings = dict(
        backend=backend, steps=6_000, num_steps=20, lr=2e-2, memory=memory, normalize_observations=normalize,
        network=MLP(hidden=(8,)), advantage=AdvantageConfig(gamma=0.8, lam=0.9),
        lr_schedule=Schedule(shape="linear", end=0.05),
    )  # fmt: skip
    for terminates, expected in ((False, 5.0), (True, None)):
        run = train(
            "tests.toy_envs:OneState", tmp_path, name=f"run-{terminates}", kwargs={"terminates": terminates}, **settings
        )
        rollout = run.collecting.collect(run.state.step)
        scored, _ = make_score(run)(rollout, run.state)
        value = float(scored.values.mean())
        if expected is None:
            assert value < 3.6
        else:
            assert value == pytest.approx(expected, rel=0.06)


def test_bootstraps_are_values_of_final_observations(tmp_path):
    run = build_gym_run(config("tests.toy_envs:Counter", tmp_path, num_steps=11))
    run.collecting.publish(run.policy, 0)
    rollout = run.collecting.collect(0)
    scored, _ = make_score(run)(rollout, run.state)
    expected = run.policy.parameters_and_values(rollout.final_observations)[1].detach()
    expected = torch.where(rollout.terminated, torch.zeros_like(expected), expected)
    torch.testing.assert_close(scored.bootstrap, expected)
    batch = estimate_advantages(scored, AdvantageConfig(gamma=0.9, lam=0.0, whiten=False), LocalReduce())
    last = rollout.offsets[1:] - 1  # with lambda 0 the advantage of a last step is r + gamma V(final) - V
    torch.testing.assert_close(
        batch.advantages[last], scored.rewards[last] + 0.9 * expected - scored.values[last], rtol=1e-5, atol=1e-4
    )


LIMIT = 12  # steps; a random policy falls after 8 at the least, and after 20 on average


class Played(NamedTuple):
    """A segment, and whether the pole fell in its last step and V of what followed it, by Gymnasium's physics."""

    length: int
    fell: bool
    value: float
    ended: bool
    terminated: bool
    truncated: bool
    bootstrap: float
    next_value: float


def segments_of(backend, tmp_path):
    """Of CartPole with a time limit."""
    kwargs = {"max_episode_steps": LIMIT}
    run = build_gym_run(config("CartPole-v1", tmp_path, backend=backend, num_envs=16, num_steps=100, kwargs=kwargs))
    run.collecting.publish(run.policy, 0)
    rollout = run.collecting.collect(0)
    scored, _ = make_score(run)(rollout, run.state)
    run.env.close()
    game, segments = gymnasium.make("CartPole-v1").unwrapped, []
    for s, (begin, end) in enumerate(pairwise(rollout.offsets.tolist())):
        game.reset()
        game.state = rollout.inputs.observations[end - 1].double().numpy()
        after, _, fell, _, _ = game.step(int(rollout.actions[end - 1]))
        with torch.no_grad():
            value = float(run.policy.value_head(run.policy.critic(torch.from_numpy(after)[None])))
        told = (bool(x[s]) for x in (rollout.ended, rollout.terminated, rollout.truncated))
        next_value = float(scored.values[end]) if end < len(scored.values) else math.nan
        segments.append(Played(end - begin, fell, value, *told, float(scored.bootstrap[s]), next_value))
    return segments


@pytest.fixture
def envpool_segments(tmp_path):
    pytest.importorskip("envpool")
    return segments_of(EnvPool(threads=1), tmp_path)


def check_kinds_of_ends(segments):
    """Of all segments but those whose pole fell in the last allowed step."""
    kinds = Counter()
    for played in segments:
        if played.fell and played.length < LIMIT:
            kinds["end"] += 1
            assert played.terminated and played.bootstrap == 0.0
        elif not played.fell:  # a cut by the limit, or by the edge of the rollout
            kinds["cut" if played.ended else "edge"] += 1
            assert played.truncated and not played.terminated and played.ended == (played.length == LIMIT)
            assert played.bootstrap == pytest.approx(played.value, abs=1e-5)
            assert not abs(played.bootstrap - played.next_value) < 1e-4  # not of the first one of the next episode
    assert kinds["end"] >= 10 and kinds["cut"] >= 50 and kinds["edge"] >= 10


def test_envpools_time_limit_is_bootstrapped_by_the_true_final_observation(envpool_segments):
    check_kinds_of_ends(envpool_segments)


def test_cartpoles_own_vector_version_ends_and_is_cut_as_gymnasiums_physics_say(tmp_path):
    segments = segments_of(Vectorized(), tmp_path)
    check_kinds_of_ends(segments)
    last_moment = [played for played in segments if played.fell and played.length == LIMIT]
    assert len(last_moment) >= 3
    assert all(played.terminated and played.bootstrap == 0.0 for played in last_moment)  # no trap here


def test_an_end_on_the_last_step_that_envpool_allows_looks_like_a_cut(envpool_segments):
    """The known trap: the pole fell, so nothing can be earned any more, but only `truncated` is reported."""
    trapped = [played for played in envpool_segments if played.fell and played.length == LIMIT]
    assert len(trapped) >= 3
    for played in trapped:
        assert played.ended and played.truncated and not played.terminated
        assert played.bootstrap == pytest.approx(played.value, abs=1e-5) and abs(played.value) > 1e-3


@pytest.mark.parametrize("memory", [0, 8])
def test_advantages_are_computed_again_by_the_critic_of_each_epoch(memory, tmp_path, monkeypatch):
    from heeler.train import ppo as loop

    batches, scores = [], []
    advantage = AdvantageConfig(gamma=0.9, lam=0.9, recompute=True)
    estimate = loop.estimate_advantages

    def kept(scored, *rest):
        scores.append(scored)
        return estimate(scored, *rest)

    monkeypatch.setattr(loop, "estimate_advantages", kept)

    def watched(policy, optimizer, batch, ppo, *, refresh, **rest):
        assert refresh is not None
        scored = scores[-1]
        same = refresh()  # nothing has been learned yet
        for name in ("advantages", "returns", "old_values", "old_logprobs"):
            torch.testing.assert_close(getattr(same, name), getattr(batch, name), rtol=1e-5, atol=1e-5)
        trained = update(policy, optimizer, batch, ppo, refresh=refresh, **rest)
        again = refresh()
        # the critic as it is now says everything anew but rewards and log-probabilities
        _, values, bootstrap = read_rollout(policy, scored.rollout, 65536)
        expected = estimate_advantages(replace(scored, values=values, bootstrap=bootstrap), advantage, LocalReduce())
        for name in ("advantages", "returns", "old_values", "old_logprobs"):
            torch.testing.assert_close(getattr(again, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
        assert float((again.advantages - batch.advantages).abs().mean()) > 1e-3
        assert float((bootstrap - scored.bootstrap).abs().max()) > 1e-3
        batches.append(again)
        return trained

    monkeypatch.setattr(loop, "update", watched)
    settings = dict(updates=2, lr=1e-2, memory=memory, normalize_observations=True, scale_rewards=True)
    run = train("tests.toy_envs:Counter", tmp_path, advantage=advantage, **settings)
    assert len(batches) == 2
    monkeypatch.undo()
    once = train(
        "tests.toy_envs:Counter", tmp_path, name="once", advantage=replace(advantage, recompute=False), **settings
    )
    assert lines(run)[0]["value/loss"] != lines(once)[0]["value/loss"]


def test_rewards_are_scaled_by_the_running_std_of_the_discounted_return(tmp_path):
    run = build_gym_run(config("tests.toy_envs:Counter", tmp_path, num_envs=2, num_steps=7, scale_rewards=True))
    assert run.scaler is not None
    gamma = run.scaler.gamma
    streams, returns = {0: 0.0, 1: 0.0}, []
    for k in range(4):
        run.collecting.publish(run.policy, k)
        run.state.step = k
        rollout = run.collecting.collect(k)
        scored, _ = make_score(run)(rollout, run.state)
        offsets = rollout.offsets.tolist()
        for s, env in enumerate(rollout.prompt_ids.tolist()):  # the plain loop
            for i in range(offsets[s], offsets[s + 1]):
                streams[env] = gamma * streams[env] + float(rollout.step_rewards[i])
                returns.append(streams[env])
            if rollout.ended[s]:
                streams[env] = 0.0
        std = math.sqrt(np.var(returns) + 1e-8)
        expected = (rollout.step_rewards / std).clamp(-10, 10).float()
        torch.testing.assert_close(scored.rewards, expected, rtol=1e-4, atol=1e-5)


def test_scaled_rewards_are_clipped(tmp_path):
    """Two rare rewards are of twelve deviations."""
    scaler = RewardScaler(3, gamma=0.0)
    run = build_gym_run(config("tests.toy_envs:OneState", tmp_path, num_envs=3, num_steps=100))
    run.collecting.publish(run.policy, 0)
    rollout = run.collecting.collect(0)
    rewards = torch.zeros(300)
    rewards[7], rewards[200] = 50.0, -50.0
    scaled = scaler(rewards, rollout)
    assert float(scaled.max()) == 10.0 and float(scaled.min()) == -10.0
    assert 50.0 / math.sqrt(float(scaler.moments.var)) > 12.0


# the run --------------------------------------------------------------------------------------------------------


def lines(run):
    times = ("seconds", "time/", "decisions_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(times)} for row in run.folder.metrics()]


@pytest.mark.parametrize(
    "id, changes",
    [
        ("CartPole-v1", {}),
        ("Pendulum-v1", {"normalize_observations": True, "scale_rewards": True}),
        ("CartPole-v1", {"memory": 8}),
        ("tests.toy_envs:Identity", {}),
        ("CartPole-v1", {"backend": Vectorized()}),
        ("CartPole-v1", {"backend": EnvPool(threads=1)}),
        ("tests.toy_envs:Masked", {"backend": Async(), "num_envs": 2}),
        (
            "tests.toy_envs:Pictures",
            {"kwargs": {"vector": False}, "network": NatureCNN(features=8), "shared": True, "precision": "bf16"},
        ),
    ],
)
def test_the_same_seed_gives_the_same_numbers(id, changes, tmp_path):
    first, second, other = (
        train(id, tmp_path, name=name, steps=640, seed=seed, **changes) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert lines(first) == lines(second) and lines(first) != lines(other)


@pytest.mark.parametrize("backend", SYNC, ids=str)
@pytest.mark.parametrize(
    "id, changes",
    [
        ("CartPole-v1", {}),
        ("CartPole-v1", {"memory": 8}),
        ("Pendulum-v1", {"normalize_observations": True, "scale_rewards": True}),
        ("Pendulum-v1", {"exploration": StateDependent(every=5)}),
        ("Acrobot-v1", {}),
    ],
)
def test_resumed_equals_uninterrupted(id, changes, backend, tmp_path):
    whole = train(id, tmp_path, name="whole", backend=backend, updates=8, **changes)
    train(id, tmp_path, name="half", backend=backend, updates=3, lr_schedule=Schedule(), **changes)
    with_schedule = train(id, tmp_path, name="full", backend=backend, updates=8, lr_schedule=Schedule(), **changes)
    half = resume_gym(tmp_path / "half", updates=8, show=False)
    assert lines(half) == lines(with_schedule)
    assert len(lines(whole)) == 8
    for name, weight in with_schedule.policy.state_dict().items():
        assert torch.equal(weight, half.policy.state_dict()[name]), name


def test_mujoco_resumes_in_the_middle_of_its_episodes(tmp_path):
    pytest.importorskip("mujoco")
    changes = {"normalize_observations": True, "lr_schedule": Schedule(), "num_envs": 2}
    whole = train("Hopper-v5", tmp_path, name="whole", updates=5, **changes)
    train("Hopper-v5", tmp_path, name="half", updates=2, **changes)
    assert lines(resume_gym(tmp_path / "half", updates=5, show=False)) == lines(whole)


def test_mujocos_complaints_about_models_stay_out_of_the_users_way(tmp_path, monkeypatch, capfd):
    mujoco = pytest.importorskip("mujoco")
    monkeypatch.chdir(tmp_path)
    make_one(EnvConfig(id="HalfCheetah-v5")).close()
    assert capfd.readouterr().err == "" and not any(tmp_path.iterdir())
    assert mujoco.get_mju_user_warning() is None


def test_environments_without_a_known_state_start_anew_and_say_so(tmp_path, capsys):
    train("tests.toy_envs:Identity", tmp_path, updates=2)
    run = resume_gym(tmp_path / "run", updates=4)
    told = capsys.readouterr()
    assert "its episodes start anew" in told.out + told.err
    assert len(lines(run)) == 4


def test_slow_updates_are_saved_by_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(GymRun, "seconds_between_saves", 0.0)

    def stop(report):
        if report.metrics["step"] == 3:
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        train_gym(config("CartPole-v1", tmp_path, updates=5, checkpoint_every=100), on_update=stop, show=False)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize(
    "how, said",
    [
        ("deque", r"\['queue'\] is a deque: let get_state return numbers, text, arrays of numbers"),
        ("names", r"\['names'\]\[0\] is a ndarray: let get_state return"),
        ("raises", r"get_state of OddState failed: KeyError: 'level' \(toy_envs.py, line \d+\); without get_state"),
    ],
)
def test_a_state_that_no_checkpoint_takes_is_told_before_training(how, said, tmp_path):
    with pytest.raises(HeelerError, match=said):
        train("tests.toy_envs:OddState", tmp_path, kwargs={"how": how}, updates=5)


def test_the_best_policy_is_kept_and_callbacks_see_every_update(tmp_path):
    seen = []
    settings = config("CartPole-v1", tmp_path, steps=1280, eval_episodes=4, eval_every=5)
    run = train_gym(settings, on_update=lambda report: seen.append(report.metrics["step"]), show=False)
    assert seen == list(range(1, 21))
    best = max(row["eval/reward"] for row in run.folder.metrics() if "eval/reward" in row)
    assert run.summary["best"]["reward"] == best
    assert (tmp_path / "run" / "best" / "policy" / "weights.pt").is_file()
    metrics = run.folder.metrics()[-1]
    wanted = {
        "step", "decisions", "episodes", "seconds", "decisions_per_second", "reward/mean", "reward/std", "kl/ref",
        "kl/old_new", "policy/loss", "policy/clip_fraction", "policy/ratio_max", "policy/entropy", "value/loss",
        "value/explained_variance", "grad_norm", "lr", "completion/length", "completion/truncated_fraction",
        "engine/logprob_gap", "time/rollout", "time/score", "time/update",
    }  # fmt: skip
    assert wanted <= set(metrics)
    assert sum(row["episodes"] > 0 for row in run.folder.metrics()) > 0


@pytest.mark.parametrize("changes", [{}, {"memory": 4}], ids=["one flat vector", "torch's"])
def test_adams_epsilon_and_the_fall_of_its_rate(changes, tmp_path):
    run = train("CartPole-v1", tmp_path, updates=4, lr=1e-3, **changes)
    (group,) = run.state.optimizer.param_groups
    assert group["eps"] == 1e-5 and (run.policy.fused is None) == bool(changes)
    assert [row["lr"] for row in run.folder.metrics()] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_actors_with_old_weights_stop_the_run(tmp_path, monkeypatch):
    publish, known = NumpyActor.publish, []

    def once(self, policy):
        if not known:
            publish(self, copy.deepcopy(policy))
            known.append(self)

    monkeypatch.setattr(NumpyActor, "publish", once)
    with pytest.raises(CheckFailed, match=r"engine and trainer differ by .* at update 2"):
        train("CartPole-v1", tmp_path, updates=3, lr=1e-2)


def test_clip_and_entropy_follow_their_schedules(tmp_path, monkeypatch):
    from heeler.train import ppo as loop

    seen = []

    def watched(policy, optimizer, batch, ppo, **rest):
        seen.append((ppo.clip_range, ppo.entropy_coef))
        return update(policy, optimizer, batch, ppo, **rest)

    monkeypatch.setattr(loop, "update", watched)
    train(
        "CartPole-v1", tmp_path, updates=4, clip_schedule=Schedule(shape="linear"),
        entropy_schedule=Schedule(shape="linear", end=0.5), ppo=replace(PPO, clip_range=0.2, entropy_coef=0.1),
    )  # fmt: skip
    expected = [(0.2, 0.1), (0.15, 0.0875), (0.1, 0.075), (0.05, 0.0625)]
    np.testing.assert_allclose(seen, expected)


# acting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "id, changes",
    [
        ("CartPole-v1", {}),
        ("Pendulum-v1", {"normalize_observations": True}),
        ("Pendulum-v1", {"exploration": StateDependent()}),
        ("tests.toy_envs:Recall", {"memory": 4}),
        ("tests.toy_envs:Masked", {"kwargs": {"where": "dict"}}),
        ("tests.toy_envs:Identity", {"kwargs": {"actions": "discrete"}}),
        ("tests.toy_envs:Identity", {"kwargs": {"actions": "multi_binary"}}),
    ],
)
def test_a_loaded_policy_acts_as_the_run_did(id, changes, tmp_path):
    run = train(id, tmp_path, updates=2, **changes)
    policy = load_policy(tmp_path / "run")
    env = make_one(run.config.env)
    observation, _ = env.reset(seed=7)
    policy.reset()
    state = None
    for _ in range(40):
        action = policy.predict(observation)
        assert env.action_space.contains(action), action
        batch = {k: np.asarray(v)[None] for k, v in observation.items()} if isinstance(observation, dict) else None
        batch = np.asarray(observation)[None] if batch is None else batch
        masks = policy.reader.masks(batch)
        expected, state = run.policy.predict(policy.reader.read(batch), state, masks=masks)
        spec = run.policy.actions
        if spec.kind == "discrete":
            assert action == expected[0] + spec.start[0]
        observation, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            observation, _ = env.reset()
            policy.reset()
            state = None


def test_a_run_that_was_stopped_acts_by_its_last_checkpoint(tmp_path, capsys):
    """One that was killed has a checkpoint, and neither policy/ nor a last evaluation."""
    run = train("Pendulum-v1", tmp_path, updates=2, normalize_observations=True)
    assert last_update(tmp_path / "run") is None
    shutil.rmtree(tmp_path / "run" / "policy")
    assert last_update(tmp_path / "run") == 2
    assert main(["eval", str(tmp_path / "run"), "--episodes", "1"]) == 0
    assert "was stopped after update 2 of 2: its last checkpoint plays" in capsys.readouterr().out
    loaded, _ = load_actor_critic(tmp_path / "run")
    for name, value in run.policy.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)
    observation = np.full(3, 0.3, np.float32)
    expected, _ = run.policy.predict(load_policy(tmp_path / "run").reader.read(observation[None]), None, masks=None)
    np.testing.assert_allclose(load_policy(tmp_path / "run").predict(observation), np.clip(expected[0], -2, 2))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(HeelerError, match="holds neither a policy nor a checkpoint"):
        load_policy(tmp_path / "run")


def test_drawn_actions_follow_the_probabilities_that_the_mask_leaves(tmp_path):
    train("tests.toy_envs:Masked", tmp_path, updates=1)
    seen, mask = np.full(3, 0.3, np.float32), np.array([1, 0, 1, 1], np.int8)
    draws = []
    for seed in (4, 4, 5):
        policy = load_policy(tmp_path / "run", seed=seed)
        policy.actor_critic.action_head.bias.data += torch.tensor([0.5, 3.0, 1.5, 0.0])
        assert policy.predict(seen, mask=mask) == 2 and policy.predict(seen, mask=np.ones(4)) == 1
        draws.append([policy.predict(seen, mask=mask, deterministic=False) for _ in range(1000)])
    assert draws[0] == draws[1] != draws[2]
    logits = policy.actor_critic.parameters_and_values(torch.from_numpy(seen)[None])[0][0]
    expected = logits.masked_fill(torch.tensor(mask) == 0, -torch.inf).softmax(0).detach().numpy()
    shares = np.bincount(draws[0], minlength=4) / len(draws[0])
    assert shares[1] == 0.0
    np.testing.assert_allclose(shares, expected, atol=0.05)
    drawing = load_policy(tmp_path / "run", deterministic=False)
    assert len({drawing.predict(seen, mask=mask) for _ in range(50)}) == 3
    assert len({drawing.predict(seen, mask=mask, deterministic=True) for _ in range(50)}) == 1


def test_an_observation_of_another_shape_is_refused(tmp_path):
    train("CartPole-v1", tmp_path, updates=1)
    with pytest.raises(HeelerError, match="the observation does not fit the space"):
        load_policy(tmp_path / "run").predict(np.zeros(3, np.float32))


def test_evaluation_counts_whole_episodes_of_every_environment(tmp_path):
    run = train("tests.toy_envs:OneState", tmp_path, updates=1, kwargs={"limit": 7})
    for backend in SYNC:
        figures = replace_backend(run, backend).evaluate(episodes=20, deterministic=False)
        assert figures["reward"] == figures["length"] == 7.0 and figures["reward/std"] == 0.0
        assert figures["episodes"] >= 20


class Uneven(OneState):
    """Episodes of 1 step in every other environment, of 10 in the others."""

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.limit = 1 if seed % 2 else 10
        return super().reset(seed=seed, options=options)


def test_short_episodes_count_no_more_than_long_ones(tmp_path):
    run = train("tests.train.test_control:Uneven", tmp_path, updates=1)
    for backend in SYNC:
        figures = replace_backend(run, backend).evaluate(episodes=32)
        assert figures["episodes"] == 32 and figures["reward"] == figures["length"] == 5.5


def replace_backend(run, backend):
    run.config = replace(run.config, env=replace(run.config.env, backend=backend))
    return run


def test_a_network_of_the_users_own(tmp_path):
    run = train("CartPole-v1", tmp_path, updates=2, network=Custom(builder="tests.train.test_control:build_network"))
    assert isinstance(run.policy.actor.encoder, OwnNetwork)
    loaded, _ = load_actor_critic(tmp_path / "run")
    assert isinstance(loaded.critic.encoder, OwnNetwork)
    with pytest.raises(HeelerError, match="must return a torch module with an attribute num_features"):
        train("CartPole-v1", tmp_path, name="other", network=Custom(builder="builtins:repr"))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder whose modules are imported anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("my_networks", "my_envs"):
        sys.modules.pop(name, None)


def example_of_the_docs(name, workplace, uses):
    """Write the module `name` of docs/control.md; the words of the command there that `uses` it, for a short run."""
    page = (Path(heeler.__file__).parents[1] / "docs" / "control.md").read_text()
    code = re.search(rf"`{name}\.py`:\n\n```python\n(.*?)```", page, re.DOTALL)
    command = re.search(rf"^heeler (.*{uses}.*)$", page, re.MULTILINE)
    assert code is not None and command is not None
    (workplace / f"{name}.py").write_text(code[1])
    words = shlex.split(command[1])
    words[words.index("--steps") + 1] = "2048"
    return [*words, "--eval-episodes", "2", "--out", "run"]


def test_the_network_of_the_docs(workplace):
    assert main(example_of_the_docs("my_networks", workplace, "my_networks:build")) == 0
    policy, _ = load_actor_critic("run")
    assert type(policy.actor.encoder).__name__ == type(policy.critic.encoder).__name__ == "Residual"
    assert load_policy("run").predict(np.zeros(4, np.float32)) in (0, 1)


def test_the_environment_of_the_docs(workplace, capsys):
    """With a mask, a wrapper and a state of its own, so that a resumed run goes on in the middle of its episodes."""
    words = example_of_the_docs("my_envs", workplace, "my_envs:Walk")
    assert words[:4] == ["ppo", "gym", "--env", "my_envs:Walk"] and "my_envs:limit" in words
    assert main(words) == 0
    after = json.loads((workplace / "run" / "summary.json").read_text())["eval/after"]
    assert -100.0 <= after["reward"] <= 0.0 and after["length"] == -after["reward"]
    capsys.readouterr()
    assert main(["resume", "run", "--updates", "3"]) == 0
    told = capsys.readouterr()
    assert "start anew" not in told.out + told.err
    assert load_policy("run").predict(np.zeros(1, np.float32), mask=[False, True]) == 1


@pytest.mark.parametrize("backend", ["sync", "async"])
def test_wrappers_of_the_command_line_are_trained_and_evaluated_in(backend, tmp_path):
    for wrappers, paid in (
        ([], 5.0),
        (["tests.toy_envs:double_reward"], 10.0),
        (["tests.toy_envs:double_reward"] * 2, 20.0),
    ):
        out = tmp_path / f"run-{paid}"
        words = ["--env", "tests.toy_envs:OneState", "--out", str(out), "--updates", "2", "--num-steps", "10"]
        words += ["--env.num-envs", "2", "--eval-episodes", "2"]
        if wrappers:
            words += ["--env.wrappers", *wrappers]
        assert main(["ppo", "gym", *words, f"env.backend:{backend}"]) == 0
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [row["reward/mean"] for row in rows] == [paid, paid]
        summary = json.loads((out / "summary.json").read_text())
        assert summary["eval/before"]["reward"] == summary["eval/after"]["reward"] == paid


@pytest.mark.parametrize(
    "id, changes, threads",
    [
        ("CartPole-v1", {}, 1),
        ("CartPole-v1", {"threads": 2}, 2),
        ("tests.toy_envs:Pictures", {"kwargs": {"vector": False}, "network": NatureCNN(features=8), "shared": True}, 3),
    ],
)
def test_vectors_take_one_thread_and_pictures_every_core(id, changes, threads, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: (3, ""))
    torch.set_num_threads(4)
    train(id, tmp_path, updates=1, num_envs=2, num_steps=4, **{"threads": None, **changes})
    assert json.loads((tmp_path / "run" / "config.json").read_text())["resolved"]["threads"] == threads
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(machine, "usable_cores", lambda: (5, ""))  # another machine: sums must have the same order
    resume_gym(tmp_path / "run", updates=2, show=False)
    assert torch.get_num_threads() == threads


def test_precision_is_chosen_for_pictures_and_stays_when_a_run_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "choose_precision", lambda wanted, device: ("bf16", "bf16: it is fast here"))
    shown = {"kwargs": {"vector": False}, "network": NatureCNN(features=8), "shared": True}
    picture = {"num_envs": 2, "num_steps": 8, "lr_schedule": Schedule(), "ppo": replace(PPO, minibatches=1), **shown}
    run = train("tests.toy_envs:Pictures", tmp_path, updates=2, **picture)
    assert run.policy.precision == run.resolved()["precision"] == "bf16"
    assert run.config.ppo.ratio_tolerance == 0.05
    assert train("CartPole-v1", tmp_path, name="vectors", updates=1).policy.precision == "fp32"
    monkeypatch.undo()
    monkeypatch.setattr(machine, "_seconds_per_product", lambda dtype, *_: 1.0)  # another machine would take fp32
    assert train("tests.toy_envs:Pictures", tmp_path, name="other", updates=1, **picture).policy.precision == "fp32"
    assert resume_gym(tmp_path / "run", updates=3, show=False).policy.precision == "bf16"
    assert load_actor_critic(tmp_path / "run")[0].precision == "fp32"


class OwnNetwork(torch.nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(inputs, 12)
        self.num_features = 12

    def forward(self, observations):
        return torch.sin(self.layer(observations))


def build_network(observations):
    return OwnNetwork(observations.vector)


# recipes and bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in RECIPES if n not in ("pong", "breakout")])
def test_every_recipe_trains(name, tmp_path):
    recipe = RECIPES[name]()
    small = replace(
        recipe, env=replace(recipe.env, num_envs=2), num_steps=32, updates=1, eval_episodes=0,
        out=str(tmp_path / "run"),
        ppo=replace(recipe.ppo, minibatches=min(recipe.ppo.minibatches, 4), epochs=1),
    )  # fmt: skip
    assert train_gym(small, show=False).state.decisions > 50


def test_atari_games_get_the_atari_settings():
    assert isinstance(default_config("ALE/Pong-v5").env.backend, Atari)
    assert isinstance(default_config("LunarLander-v3").network, MLP)


@pytest.mark.parametrize(
    "words, said",
    [
        (["gym"], "needs an environment: --env"),
        (["gym", "--env", "CartPol-v1"], "did you mean CartPole-v1"),
        (["gym", "--env", "tests.toy_envs:Nothing"], "has no environment 'Nothing'"),
        (["gym", "--env", "no_such_module:Maze"], "there is no module 'no_such_module'"),
        (
            ["gym", "--env", "tests.toy_envs:Strange", "--env-kwargs", '{"what": "observations"}'],
            "no network here reads",
        ),
        (
            ["gym", "--env", "tests.toy_envs:Strange", "--env-kwargs", '{"what": "actions"}'],
            "PPO here cannot choose from",
        ),
        (["gym", "--env", "tests.toy_envs:Identity", "--env-kwargs", '{"colour": 1}'], "cannot be made: TypeError"),
        (["gym", "--env", "CartPole-v1", "--env-kwargs", "{colour"], "--env-kwargs: broken JSON"),
        (["gym", "--env", "CartPole-v1", "--env-kwargs", "[1]"], "must be a JSON object"),
        (["gym", "--env", "CartPole-v1", "network:nature-cnn"], "the Nature CNN reads images"),
        (["gym", "--env", "tests.toy_envs:Pictures"], "an MLP cannot read the image camera"),
        (["gym", "--env", "CartPole-v1", "--env.num-envs", "0"], "--env.num-envs must be at least 1, not 0"),
        (["gym", "--env", "CartPole-v1", "--ppo.shuffle", "prompts"], "environments have no prompts"),
        (["gym", "--env", "CartPole-v1", "--env.wrappers", "gymnasium.wrappers:FrameStackObservation"], "cannot wrap"),
        (["gym", "--env", "tests.toy_envs:OneState", "env.backend:vectorized"], "has no vectorised version"),
        (["gym", "--env", "CartPole-v1", "--checkpoint-every", "0"], "--checkpoint-every must be at least 1"),
        (["gym", "--env", "CartPole-v1", "--device", "gpu"], "there is no device 'gpu'"),
        (["gym", "--env", "CartPole-v1", "--precision", "bf16"], "--precision bf16 is for networks that read images"),
        (["cartpol"], "did you mean cartpole"),
    ],
)
def test_mistakes_are_told_in_a_sentence_and_leave_nothing(words, said, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["ppo", *words, *(["--out", str(out)] if words[0] == "gym" and len(words) > 1 else [])]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not out.exists()


def test_an_async_run_closes_its_workers(tmp_path):
    run = train("CartPole-v1", tmp_path, updates=1, backend=Async(), num_envs=2)
    assert run.env.env.closed


def test_the_command_line_end_to_end(tmp_path, capsys):
    out = str(tmp_path / "run")
    words = ["ppo", "gym", "--env", "CartPole-v1", "--out", out, "--steps", "2048", "--eval-episodes", "3"]
    assert main(words) == 0
    assert "return after" in capsys.readouterr().out
    assert main(["resume", out]) == 2
    assert "is complete" in capsys.readouterr().err
    assert main(["resume", out, "--updates", "3"]) == 0
    assert main(["eval", out, "--episodes", "2", "--video", str(tmp_path / "film.gif")]) == 0
    told = capsys.readouterr().out
    assert "over 2 episodes" in told and (tmp_path / "film.gif").stat().st_size > 1000
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["episodes"] == 2
    assert main(["export", out, "--onnx", str(tmp_path / "policy.onnx")]) == 0
    assert "100% of the actions are equal" in capsys.readouterr().out


def test_a_run_whose_seed_grew_large_still_resumes(tmp_path):
    train("tests.toy_envs:Identity", tmp_path, updates=2, seed=2**31 - 2**16 - 5)
    run = resume_gym(tmp_path / "run", updates=3, show=False)
    assert 0 <= run.collecting.seed < 2**31


def test_toy_text_environments_are_saved_and_restored(tmp_path):
    whole = train("FrozenLake-v1", tmp_path, name="whole", updates=4, lr_schedule=Schedule())
    train("FrozenLake-v1", tmp_path, name="half", updates=2, lr_schedule=Schedule())
    assert lines(resume_gym(tmp_path / "half", updates=4, show=False)) == lines(whole)


def test_wrappers_with_a_memory_of_their_own_start_anew(tmp_path):
    from heeler.envs.state import save_states

    config_ = EnvConfig(id="CartPole-v1", num_envs=1, wrappers=("tests.toy_envs:delayed",))
    env = make_vector(config_, 0)
    env.reset(0)
    assert save_states(env.env) is None
    plain = make_vector(replace(config_, wrappers=("tests.toy_envs:double_reward",)), 0)
    plain.reset(0)
    assert save_states(plain.env) is not None
    assert plain.step(np.zeros(1, np.int64)).rewards.tolist() == [2.0]


@pytest.mark.parametrize(
    "wrapper, said",
    [
        ("gymnasium.wrappers:NormalizeObservation", "leave it out and give --normalize-observations"),
        ("gymnasium.wrappers:NormalizeReward", "leave it out and give --scale-rewards"),
        ("tests.toy_envs:nothing", "the wrapper tests.toy_envs:nothing returned a int: it must return a gymnasium.Env"),
    ],
)
def test_wrappers_that_cannot_be_used(wrapper, said):
    with pytest.raises(HeelerError, match=re.escape(said)):
        make_one(EnvConfig(id="CartPole-v1", wrappers=(wrapper,)))


def test_an_id_that_a_module_here_registers(workplace):
    (workplace / "my_envs.py").write_text(
        "import gymnasium\ngymnasium.register('Mine-v0', 'gymnasium.envs.classic_control:CartPoleEnv')\n"
    )
    sys.path.remove(str(workplace))  # which `heeler`, being a script, does not have there
    assert main(["ppo", "gym", "--env", "my_envs:Mine-v0", "--updates", "1", "--eval-episodes", "2", "--out", "r"]) == 0
    assert main(["ppo", "gym", "--env", "NoGrid-Empty-v0"]) == 2


def test_an_endless_environment_can_be_evaluated(tmp_path, monkeypatch):
    from heeler.train import evaluate_control

    monkeypatch.setattr(evaluate_control, "MAX_DECISIONS", 50)
    run = train("tests.toy_envs:OneState", tmp_path, updates=1, kwargs={"limit": 10**9})
    assert run.evaluate(episodes=2)["length"] == 50.0


def test_the_last_policy_is_kept_as_best_where_it_is(tmp_path):
    settings = config("CartPole-v1", tmp_path, updates=7, eval_episodes=2, eval_every=5)
    scores = iter([1.0, 5.0, 9.0])
    run = build_gym_run(settings)

    def figures(show, note):
        return {"reward": next(scores), "reward/std": 0.0, "length": 1.0, "episodes": 2.0}

    run.figures = figures
    from heeler.train.run import begin, new_folder

    with new_folder(settings.out) as folder:
        pass
    begin(run, folder, None, None, False)
    assert run.summary["best"] == {"step": 7, **figures_of(9.0)}


def figures_of(reward):
    return {"reward": reward, "reward/std": 0.0, "length": 1.0, "episodes": 2.0}

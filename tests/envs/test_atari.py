"""ale-py's vector environment behind our door: its traps, and its preprocessing against Gymnasium's own."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from heeler.envs.vector import Atari, EnvConfig, make_vector
from heeler.recipes.control import RECIPES
from heeler.train.control import build_gym_run, make_score, train_gym
from heeler.types import HeelerError

pytest.importorskip("ale_py")

MODES = [Atari(autoreset="same-step", threads=1), Atari(autoreset="next-step", threads=1)]


def play(backend, steps, game="ALE/Breakout-v5", num_envs=2, seed=3):
    env = make_vector(EnvConfig(id=game, num_envs=num_envs, backend=backend), seed)
    env.reset(seed)
    generator = np.random.default_rng(0)
    taken = []
    for _ in range(steps):
        taken.append(env.step(generator.integers(0, env.actions.sizes[0], num_envs)))
    env.close()
    return env, taken


@pytest.mark.parametrize("backend", MODES, ids=str)
def test_a_lost_life_cuts_the_future_but_not_the_game(backend):
    env, taken = play(backend, 500)
    lost = sum(step.lost_life.sum() for step in taken)
    over = sum((step.terminated | step.truncated).sum() for step in taken)
    assert over >= 3 and lost >= 3 * over  # five lives a game, the last of which ends it
    for step in taken:
        assert not (step.lost_life & step.terminated).any()
        if step.final is not None:
            assert env.same_step and step.final[1].shape[1:] == (4, 84, 84)
        if step.dummies is not None:
            assert not env.same_step and not (step.dummies & step.lost_life).any()


def test_the_final_frames_of_a_game_are_those_of_its_last_step():
    """Both kinds of autoreset play the same game: what one hands over as final is what the other shows at its end."""
    (_, same), (_, following) = (play(mode, 400, num_envs=1, seed=5) for mode in MODES)
    end = next(t for t, step in enumerate(following) if step.terminated.any())
    assert end > 50 and same[end].terminated.all()
    assert [s.rewards.tolist() for s in same[: end + 1]] == [s.rewards.tolist() for s in following[: end + 1]]
    indices, final = same[end].final
    assert indices.tolist() == [0]
    np.testing.assert_array_equal(final, following[end].observations)
    assert (same[end].observations != final).any()  # that is the next game's first


@pytest.mark.parametrize("backend", MODES, ids=str)
def test_games_begin_after_random_no_ops(backend):
    """The first frames of several environments are apart, and are not where no no-op is taken."""

    def first(backend):
        env = make_vector(EnvConfig(id="ALE/Breakout-v5", num_envs=6, backend=backend), 0)
        observations, _ = env.reset(0)
        env.close()
        return {frame.tobytes() for frame in observations[:, -1]}

    assert len(first(backend)) > 2 and len(first(replace(backend, noop_max=0))) == 1


@pytest.mark.parametrize("backend", MODES, ids=str)
def test_games_that_wait_for_fire_are_started(backend):
    """Whoever only waits loses Breakout's five lives if the ball is served, and none if it is not."""
    env = make_vector(EnvConfig(id="ALE/Breakout-v5", num_envs=1, backend=backend), 0)
    env.reset(0)
    steps = [env.step(np.zeros(1, np.int64)) for _ in range(40)]
    env.close()
    assert any(step.lost_life.any() for step in steps)


def test_without_life_is_episode_nothing_is_cut():
    _, taken = play(replace(MODES[0], life_is_episode=False), 200)
    assert all(step.lost_life is None for step in taken)


def test_rewards_are_raw_and_learned_from_by_sign(tmp_path):
    recipe = RECIPES["breakout"]()
    env = EnvConfig(id="ALE/Seaquest-v5", num_envs=2, backend=MODES[0])  # pays 20 and more for a hit
    config = replace(recipe, env=env, num_steps=300, updates=1, eval_episodes=0, out=str(tmp_path / "run"), threads=1)
    run = build_gym_run(config)
    run.collecting.publish(run.policy, 0)
    rollout = run.collecting.collect(0)
    scored, metrics = make_score(run)(rollout, run.state)
    run.env.close()
    assert float(rollout.step_rewards.max()) >= 20.0
    assert set(scored.rewards.unique().tolist()) == {0.0, 1.0}
    assert float(scored.scores.sum()) == float(rollout.step_rewards.sum())
    games = [r for r in rollout.episode_returns]
    assert int(rollout.ended.sum()) > len(games)  # lives end segments, games end episodes
    if games:
        assert metrics["reward/mean"] == pytest.approx(float(np.mean(games)))


@pytest.mark.parametrize("name", ["pong", "breakout"])
def test_a_whole_update_of_the_recipe(name, tmp_path):
    recipe = RECIPES[name]()
    config = replace(
        recipe, env=replace(recipe.env, num_envs=2), num_steps=16, updates=1, eval_episodes=0,
        out=str(tmp_path / "run"), threads=1,
    )  # fmt: skip
    run = train_gym(config, show=False)
    assert run.state.decisions == 32 and run.policy.observations.images == (("image", (4, 84, 84)),)
    assert run.config.env.id == f"ALE/{name.capitalize()}-v5" and run.policy.critic is run.policy.actor
    row = run.folder.metrics()[-1]
    assert row["grad_norm"] > 0 and math.isfinite(row["policy/loss"]) and row["policy/entropy"] > 0


@pytest.mark.parametrize("game", ["Pong", "Breakout"])
def test_frames_are_those_of_gymnasiums_preprocessing(game):
    """The same emulator steps: no random no-ops, no fire reset; both resize by area, so pixels differ by rounding."""
    import gymnasium
    from ale_py.vector_env import AtariVectorEnv
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

    ours = AtariVectorEnv(game.lower(), 1, noop_max=0, use_fire_reset=False, reward_clipping=False, num_threads=1)
    single = gymnasium.make(f"ALE/{game}-v5", frameskip=1, repeat_action_probability=0.0)
    theirs = FrameStackObservation(AtariPreprocessing(single, noop_max=0), 4)
    a, _ = ours.reset(seed=0)
    b, _ = theirs.reset(seed=0)
    generator = np.random.default_rng(1)
    for step in range(60):
        action = int(generator.integers(0, ours.single_action_space.n))
        a, reward, terminated, _, _ = ours.step(np.array([action]))
        b, expected, ended, _, _ = theirs.step(action)
        assert float(reward[0]) == float(expected) and bool(terminated[0]) == ended
        if step >= 4:  # before that the stacks are filled differently
            assert np.abs(a[0].astype(int) - np.asarray(b).astype(int)).max() <= 3, step
    ours.close()
    theirs.close()


def test_unknown_games_are_named():
    with pytest.raises(HeelerError, match=r"there is no Atari game 'ALE/Pogn-v5'.*did you mean pong"):
        make_vector(EnvConfig(id="ALE/Pogn-v5", backend=Atari()), 0)

"""Settings of runs in environments: what is refused before anything is written, and what is chosen where none are."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from heeler.cli import main
from heeler.envs.vector import EnvConfig
from heeler.policies.networks import MLP, Custom, NatureCNN
from heeler.recipes.control import RECIPES
from heeler.train.control import LARGEST_SEED, GymConfig, build_gym_run, load_gym_run, train_gym
from heeler.types import HeelerError


class Camera(gym.Env):
    """Pictures only: one, or two by name."""

    action_space = spaces.Discrete(2)

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self.names, self.t = names, 0
        box = spaces.Box(0, 255, (40, 44, 3), np.uint8)
        self.observation_space = spaces.Dict({name: box for name in names}) if names else box

    def _show(self):
        picture = np.full((40, 44, 3), self.t, np.uint8)
        return {name: picture for name in self.names} if self.names else picture

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._show(), {}

    def step(self, action):
        self.t += 1
        return self._show(), 1.0, False, self.t >= 5, {}


@pytest.mark.parametrize(
    "words, said",
    [
        (["--threads", "-1"], "--threads must be at least 1, not -1"),
        (["--network.hidden", "-3"], "--network.hidden must be at least 1, not -3"),
        (["--network.hidden", "8", "0"], "--network.hidden must be at least 1, not 0"),
        (["network:nature-cnn", "--network.features", "0"], "--network.features must be at least 1, not 0"),
        (["--seed", "-1"], "--seed must be at least 0, not -1"),
        (["--seed", str(2**31)], f"--seed must be at most {LARGEST_SEED}, not {2**31}"),
        (["--lr", "-1"], "--lr must be at least 0, not -1"),
        (["--lr", "nan"], "--lr must be at least 0, not nan"),
        (["--advantage.gamma", "1.5"], "--advantage.gamma must be at most 1, not 1.5"),
        (["--advantage.gamma", "-0.1"], "--advantage.gamma must be at least 0, not -0.1"),
        (["--advantage.lam", "1.01"], "--advantage.lam must be at most 1, not 1.01"),
        (["--advantage.lam", "-1"], "--advantage.lam must be at least 0, not -1"),
        (["--advantage.value-lam", "2"], "--advantage.value-lam must be at most 1, not 2"),
        (["--ppo.epochs", "0"], "--ppo.epochs must be at least 1, not 0"),
        (["--ppo.clip-range", "-1"], "--ppo.clip-range must be at least 0, not -1"),
        (["--ppo.token-budget", "0"], "--ppo.token-budget must be at least 1, not 0"),
        (["--updates", "-1"], "--updates must be at least 0, not -1"),
        (["--eval-every", "-1"], "--eval-every must be at least 0, not -1"),
    ],
)
def test_numbers_that_no_run_can_be_made_of(words, said, tmp_path, capsys):
    out = tmp_path / "run"
    base = ["ppo", "gym", "--env", "CartPole-v1", "--out", str(out), "--steps", "512", "--eval-episodes", "0"]
    assert main([*base, *words]) == 2
    assert capsys.readouterr().err.startswith(f"heeler: {said}")
    assert not out.exists()


def test_the_largest_seed_trains_and_evaluates(tmp_path):
    env = EnvConfig(id="CartPole-v1", num_envs=2)
    config = GymConfig(env=env, out=str(tmp_path / "run"), num_steps=8, updates=1, eval_episodes=2, seed=LARGEST_SEED)
    assert train_gym(config, show=False).summary["eval/after"]["episodes"] == 2


@pytest.mark.parametrize("seed, said", [("-1", "at least 0"), (str(2**31), f"at most {LARGEST_SEED}")])
def test_the_seed_of_an_evaluation_has_the_same_limits(seed, said, tmp_path, capsys):
    env = EnvConfig(id="CartPole-v1", num_envs=2)
    train_gym(GymConfig(env=env, out=str(tmp_path / "run"), num_steps=8, updates=1, eval_episodes=0), show=False)
    assert main(["eval", str(tmp_path / "run"), "--episodes", "1", "--seed", seed]) == 2
    assert f"heeler: --seed must be {said}, not {seed}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"kwargs": {"limit": np.int64(3)}}, "env.kwargs.limit is of type int64, which config.json cannot keep"),
        ({"kwargs": {"sizes": [1, {"a": np.ones(2)}]}}, r"env.kwargs.sizes\[1\].a is of type ndarray"),
        ({"wrappers": (gym.wrappers.ClipReward,)}, r"env.wrappers\[0\] is of type type"),
        (
            {"id": Camera},
            r"EnvConfig.id must be a string, not <class .*Camera'>: give a Gymnasium id",
        ),
    ],
)
def test_settings_that_config_json_cannot_keep(changes, said, tmp_path):
    env = EnvConfig(**{"id": "CartPole-v1", **changes})
    with pytest.raises(HeelerError, match=said):
        train_gym(GymConfig(env=env, out=str(tmp_path / "run"), steps=512), show=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kwargs", [{}, {"names": ["left", "right"]}])
def test_pictures_alone_are_read_by_the_nature_cnn(kwargs, tmp_path):
    env = EnvConfig(id="tests.train.test_control_numbers:Camera", kwargs=kwargs, num_envs=2)
    config = GymConfig(env=env, out=str(tmp_path / "run"), num_steps=8, updates=1, eval_episodes=0)
    run = train_gym(config, show=False)
    assert run.config.network == NatureCNN() and any("by the Nature CNN, not by an MLP" in note for note in run.notes)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["network"]["type"] == "NatureCNN"
    again = load_gym_run(tmp_path / "run", updates=2)
    again.env.close()
    assert again.config.network == NatureCNN() and not any("Nature CNN" in note for note in again.notes)


def test_a_network_that_was_asked_for_stays(tmp_path):
    env = EnvConfig(id="tests.train.test_control_numbers:Camera")
    two = replace(env, kwargs={"names": ["left", "right"]})
    for camera, said in ((env, "an MLP cannot read pictures: add"), (two, "cannot read the images left, right: add")):
        with pytest.raises(HeelerError, match=said):
            build_gym_run(GymConfig(env=camera, network=MLP(hidden=(32,))))
    with pytest.raises(HeelerError, match="must return a torch module"):
        build_gym_run(GymConfig(env=env, network=Custom(builder="builtins:repr")))


def test_recipes_are_evaluated_about_ten_times():
    for name, recipe in RECIPES.items():
        config = recipe()
        updates = math.ceil(config.steps / (config.env.num_envs * config.num_steps))
        if name in ("cartpole", "pong", "breakout"):
            assert config.eval_every == 0
        else:
            assert 9 <= updates // config.eval_every <= 10, name


def metrics(run):
    return run.folder.metrics()


@pytest.mark.parametrize("name", ["pendulum", "acrobot"])  # drawn actions and chosen ones
def test_evaluations_change_nothing_of_the_training(name, tmp_path):
    recipe = RECIPES[name]()
    small = replace(recipe, num_steps=64, updates=4, eval_episodes=2, threads=1, ppo=replace(recipe.ppo, minibatches=4))
    runs = [
        train_gym(replace(small, eval_every=every, out=str(tmp_path / str(every))), show=False) for every in (0, 1, 2)
    ]
    clocks = ("seconds", "time/", "decisions_per_second")
    rows = [
        [{k: v for k, v in row.items() if not k.startswith((*clocks, "eval/"))} for row in metrics(run)] for run in runs
    ]
    assert json.dumps(rows[0]) == json.dumps(rows[1]) == json.dumps(rows[2]) and len(rows[0]) == 4
    assert runs[0].summary["eval/after"] == runs[1].summary["eval/after"] == runs[2].summary["eval/after"]
    assert [("eval/reward" in row) for row in metrics(runs[2])] == [False, True, False, True]
    assert "best" not in runs[0].summary and (tmp_path / "1" / "best" / "policy").is_dir()


def test_it_is_told_that_the_best_policy_plays(tmp_path, capsys):
    out = str(tmp_path / "run")
    words = ["ppo", "gym", "--env", "CartPole-v1", "--out", out, "--updates", "2", "--num-steps", "8"]
    assert main([*words, "--eval-episodes", "1", "--eval-every", "1"]) == 0
    capsys.readouterr()
    assert main(["eval", out, "--episodes", "1"]) == 0
    assert "kept the best policy of its evaluations: it plays" in capsys.readouterr().out

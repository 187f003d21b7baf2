"""Films of episodes: what they show and how fast, and what is told before anything is played."""

from __future__ import annotations

import gc
import json
import warnings
import weakref
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from heeler.cli import main
from heeler.envs.vector import Atari, EnvConfig, make_vector
from heeler.policies.networks import NatureCNN
from heeler.train import evaluate_control
from heeler.train.control import GymConfig, load_policy, train_gym
from heeler.train.evaluate_control import make_picture_env, record_video
from heeler.types import HeelerError

imageio = pytest.importorskip("imageio")
pytest.importorskip("imageio_ffmpeg")


class Odd(gym.Env):
    """Pictures with odd sides, a bright column that moves one step to the right; 25 a second; episodes of 10 steps."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 25}
    observation_space = spaces.Box(0.0, 20.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None, limit: int = 10) -> None:
        self.render_mode, self.limit, self.t = render_mode, limit, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.full(1, self.t, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(1, self.t, np.float32), 1.0, False, self.t >= self.limit, {}

    def render(self):
        picture = np.zeros((51, 65, 3), np.uint8)
        picture[:, 6 * self.t : 6 * self.t + 6] = 255
        return picture


class NoMode(Odd):
    def __init__(self) -> None:
        super().__init__()


class NoPicture(Odd):
    def render(self):
        return None


class FloatPicture(Odd):
    def render(self):
        return np.zeros((51, 65, 3))


def trained(name, tmp_path, **kwargs):
    env = EnvConfig(id=f"tests.train.test_films:{name}", num_envs=2, kwargs=kwargs)
    return train_gym(
        GymConfig(env=env, out=str(tmp_path / "run"), num_steps=8, updates=1, eval_episodes=0), show=False
    ).config.env


def read(film):
    """Its pictures and what the file tells of itself."""
    from imageio import v3

    plugin = "pillow" if film.suffix == ".gif" else "FFMPEG"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the reader leaves its pipes open
        pictures, told = v3.imread(film, plugin=plugin)[..., :3], v3.immeta(film, plugin=plugin)
        gc.collect()
    return pictures, told


@pytest.mark.parametrize("ending", ["mp4", "gif", "mkv"])
def test_odd_sides_are_not_stretched(ending, tmp_path, capfd):
    env = trained("Odd", tmp_path)
    film = tmp_path / f"film.{ending}"
    assert record_video(load_policy(tmp_path / "run"), env, film, seed=1) == 11
    assert "macro_block_size" not in "".join(capfd.readouterr())
    pictures, told = read(film)
    assert pictures.shape == (11, 52, 66, 3)
    for t, picture in enumerate(pictures):
        bright = np.flatnonzero(picture[:51, :65].mean(axis=(0, 2)) > 128)
        assert bright.tolist() == list(range(6 * t, min(6 * t + 6, 65)))
    assert told["duration"] == 40 if ending == "gif" else told["fps"] == pytest.approx(25, abs=0.1)


def test_pictures_are_written_as_they_come(tmp_path, monkeypatch):
    env, alive, most = trained("Odd", tmp_path), weakref.WeakValueDictionary(), []

    class Writer:
        def __enter__(self):
            return self

        def __exit__(self, *_): ...

        def append_data(self, picture):
            alive[len(most)] = picture
            most.append(len(alive))

    monkeypatch.setattr(imageio, "get_writer", lambda *_, **__: Writer())
    assert record_video(load_policy(tmp_path / "run"), env, tmp_path / "film.mp4", seed=1) == len(most) == 11
    assert max(most) <= 2


@pytest.mark.parametrize(
    "name, film, said",
    [
        ("Odd", "film.txt", "is no name of a film: let it end with .mp4, .gif"),
        ("Odd", "film", "is no name of a film"),
        ("Odd", "nowhere/film.mp4", "No such file or directory; choose another file"),
        ("NoMode", "film.mp4", "NoMode cannot be filmed, as it takes no render_mode: give its __init__"),
        ("NoPicture", "film.mp4", "NoPicture cannot be filmed, as its render() returned None: let it return a picture"),
        ("FloatPicture", "film.mp4", "its render() returned an array float64 (51, 65, 3): let it return"),
    ],
)
def test_what_cannot_be_filmed_is_told_before_the_evaluation(name, film, said, tmp_path, monkeypatch, capsys):
    trained(name, tmp_path)
    monkeypatch.setattr(evaluate_control, "evaluate_policy", lambda *_, **__: pytest.fail("episodes were played"))
    assert main(["eval", str(tmp_path / "run"), "--episodes", "2", "--video", str(tmp_path / film)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("heeler: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / film).exists()
    with pytest.raises(HeelerError):
        record_video(load_policy(tmp_path / "run"), trained(name, tmp_path / "again"), tmp_path / film, seed=1)


def test_a_film_that_is_there_stays_where_the_next_cannot_begin(tmp_path):
    env = trained("NoPicture", tmp_path)
    (tmp_path / "film.mp4").write_bytes(b"before")
    with pytest.raises(HeelerError, match="returned None"):
        record_video(load_policy(tmp_path / "run"), env, tmp_path / "film.mp4", seed=1)
    assert (tmp_path / "film.mp4").read_bytes() == b"before"


# Atari ----------------------------------------------------------------------------------------------------------


def atari(game="Breakout", kwargs=None, **changes):
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    return EnvConfig(id=f"ALE/{game}-v5", num_envs=1, kwargs=kwargs or {}, backend=Atari(threads=1, **changes))


@pytest.mark.parametrize(
    "game, kwargs, changes",
    [
        ("Breakout", {}, {}),
        ("Breakout", {"use_fire_reset": False}, {}),
        ("Breakout", {"img_height": 64, "img_width": 80}, {}),
        ("Pong", {"maxpool": False}, {"frameskip": 3, "stack": 2}),
        ("Freeway", {"life_loss_info": True}, {}),  # has no FIRE
        ("Freeway", {}, {"full_action_space": True}),
    ],
)
def test_the_environment_of_a_film_shows_what_training_shows(game, kwargs, changes):
    config = atari(game, kwargs, noop_max=0, **changes)
    ours, film = make_vector(config, 0), make_picture_env(config)
    assert film.observation_space == ours.space
    seen, (shown, _) = ours.reset(0)[0], film.reset(seed=0)
    generator = np.random.default_rng(1)
    for _ in range(40):
        difference = np.asarray(shown).astype(int) - np.asarray(seen)[0].astype(int)
        assert np.abs(difference).max() <= 3  # both resize by area, and round in their own ways
        action = int(generator.integers(film.action_space.n))
        seen, (shown, reward, *_) = (step := ours.step(np.array([action]))).observations, film.step(action)
        assert float(step.rewards[0]) == float(reward)
    assert film.render().shape == (210, 160, 3)
    ours.close()
    film.close()


def test_a_game_of_another_size_is_trained_evaluated_and_filmed(tmp_path, capsys):
    config = atari(kwargs={"img_height": 64, "img_width": 64, "max_num_frames_per_episode": 200}, frameskip=5)
    network = NatureCNN(features=8)
    run = GymConfig(env=config, out=str(tmp_path / "run"), num_steps=8, updates=1, eval_episodes=0, network=network)
    train_gym(run, show=False)
    film = tmp_path / "film.mp4"
    assert main(["eval", str(tmp_path / "run"), "--episodes", "1", "--video", str(film)]) == 0
    frames = int(capsys.readouterr().out.rpartition(": ")[2].split()[0])
    pictures, told = read(film)
    assert told["fps"] == pytest.approx(12, abs=0.1) and pictures.shape == (frames, 210, 160, 3) and 20 < frames <= 42
    assert load_policy(tmp_path / "run").space.shape == (4, 64, 64)


def test_arguments_that_no_film_can_follow_are_named(tmp_path, capsys):
    config = atari(kwargs={"continuous": True})
    network = NatureCNN(features=8)
    run = GymConfig(env=config, out=str(tmp_path / "run"), num_steps=8, updates=1, eval_episodes=0, network=network)
    train_gym(run, show=False)
    action = load_policy(tmp_path / "run").predict(np.zeros((4, 84, 84), np.uint8))  # acting needs no film
    assert action.shape == (3,)
    assert main(["eval", str(tmp_path / "run"), "--episodes", "1", "--video", str(tmp_path / "film.mp4")]) == 2
    assert "ALE/Breakout-v5 cannot be filmed with continuous: films of Atari games follow" in capsys.readouterr().err
    assert json.loads(Path(tmp_path / "run" / "config.json").read_text())["config"]["env"]["kwargs"]["continuous"]

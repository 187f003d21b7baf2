"""Environments that break, through the command line: exit status 2, one sentence, and the run folder as it was."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from heeler.cli import main
from heeler.train.control import load_policy
from heeler.types import HeelerError

NAN_SHOWN = "tests.toy_envs:Broken showed nan in entry 1 of the observation of environment 0, in step"
NAN_PAID = "tests.toy_envs:Broken gave the reward nan in environment 0, in step"
NOTHING_ALLOWED = "the action mask of tests.toy_envs:Masked, environment 0, step 3 of"
RAISED = "tests.toy_envs:Broken failed in step 5 of the vector environment: ValueError: the robot left the table"
DIED = "tests.toy_envs:Broken failed in step 5 of the vector environment: a worker process died"


def gym(out, kwargs, *words, env="tests.toy_envs:Broken"):
    """Words of a run whose updates play two steps of each environment: Broken goes wrong in the third."""
    return [
        "ppo", "gym", "--env", env, "--env-kwargs", json.dumps(kwargs), "--out", str(out), "--num-steps", "2",
        "--env.num-envs", "2", "--checkpoint-every", "1", *words,
    ]  # fmt: skip


def refused(capfd, words):
    """The one sentence on standard error (of worker processes too), after the progress, of a command with status 2."""
    capfd.readouterr()
    assert main(words) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error and "WARN" not in error.upper() and error.count("heeler: ") == 1, error
    assert error.splitlines()[-1].startswith("heeler: "), error
    return error.splitlines()[-1]


def contents(out: Path):
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "how, said, backend",
    [
        ("nan observation", f"{NAN_SHOWN} 1 of update 3", "sync"),
        ("nan observation", f"{NAN_SHOWN} 1 of update 3", "async"),
        ("nan reward", f"{NAN_PAID} 1 of update 3", "sync"),
        ("nan reward", f"{NAN_PAID} 1 of update 3", "async"),
        ("raise", RAISED, "sync"),
        ("raise", RAISED, "async"),
        ("die", DIED, "async"),
    ],
)
def test_in_training_the_updates_before_are_kept(how, said, backend, tmp_path, capfd):
    out = tmp_path / "run"
    sentence = refused(capfd, gym(out, {"how": how}, "--eval-episodes", "0", f"env.backend:{backend}"))
    assert said in sentence and f"{out} holds update 2, continue it with: heeler resume {out}" in sentence
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert torch.load(out / "checkpoints" / "step-000002" / "state.pt", weights_only=True)["state"]["step"] == 2
    assert not multiprocessing.active_children()  # the worker that did not fail has ended too
    assert main(["eval", str(out), "--episodes", "1"]) == 2  # the folder can be read: what fails is the environment
    assert "step 5 of the" in capfd.readouterr().err


@pytest.mark.parametrize("backend", ["sync", "async"])
def test_a_connection_of_the_environments_own_is_no_dead_worker(backend, tmp_path, capfd):
    words = gym(tmp_path / "run", {}, f"env.backend:{backend}", env="tests.toy_envs:Simulator")
    assert "ConnectionRefusedError: the simulator on port 5000 is gone" in refused(capfd, words)


def test_a_worker_that_dies_costs_one_sentence_on_a_terminal_too(tmp_path):
    """By a process of its own: pytest keeps Python's warnings from standard error."""
    command = gym(tmp_path / "run", {"how": "die"}, "--eval-episodes", "0", "env.backend:async")
    done = subprocess.run(
        [sys.executable, "-m", "heeler.cli", *command], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 2 and DIED in done.stderr.splitlines()[-1]
    assert "WARN" not in done.stderr.upper() and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("backend", ["sync", "async"])
def test_an_environment_that_cannot_be_reset_leaves_a_run_that_can_be_continued(backend, tmp_path, capfd):
    out = tmp_path / "run"
    sentence = refused(capfd, gym(out, {"how": "reset"}, "--eval-episodes", "0", f"env.backend:{backend}"))
    assert (
        "failed in reset: RuntimeError: the level file is missing" in sentence and f"{out} holds update 0" in sentence
    )
    assert (out / "checkpoints" / "step-000000" / "state.pt").is_file()


EVALUATED = [
    ("Broken", {"how": "nan observation"}, f"{NAN_SHOWN} 5 of the evaluation"),
    ("Broken", {"how": "nan reward"}, f"{NAN_PAID} 5 of the evaluation"),
    ("Broken", {"how": "raise"}, RAISED),
    ("Masked", {"forbid_all": True}, f"{NOTHING_ALLOWED} the evaluation, forbids every action"),
    ("Masked", {"forbid_all": True, "where": "dict"}, f"{NOTHING_ALLOWED} the evaluation, forbids every action"),
]


@pytest.mark.parametrize("name, kwargs, said", EVALUATED)
def test_the_evaluation_before_training_notices_it(name, kwargs, said, tmp_path, capfd):
    out = tmp_path / "run"
    sentence = refused(capfd, gym(out, kwargs, "--eval-episodes", "2", env=f"tests.toy_envs:{name}"))
    assert said in sentence and f"{out} holds update 0" in sentence
    assert (out / "checkpoints" / "step-000000" / "state.pt").is_file()


@pytest.mark.parametrize("draws", [[], ["--sample"]], ids=["most likely", "drawn"])
@pytest.mark.parametrize("name, kwargs, said", EVALUATED)
def test_the_evaluation_of_a_run_notices_it_and_changes_nothing(name, kwargs, said, draws, tmp_path, capfd):
    out = tmp_path / "run"
    assert main(gym(out, kwargs, "--updates", "1", "--eval-episodes", "0", env=f"tests.toy_envs:{name}")) == 0
    before = contents(out)
    assert said in refused(capfd, ["eval", str(out), "--episodes", "2", *draws])
    assert contents(out) == before and Path("policy/weights.pt") in before


@pytest.mark.parametrize("where", ["info", "dict"])
def test_a_mask_that_forbids_everything_stops_training(where, tmp_path, capfd):
    out, kwargs = tmp_path / "run", {"forbid_all": True, "where": where}
    sentence = refused(capfd, gym(out, kwargs, "--eval-episodes", "0", env="tests.toy_envs:Masked"))
    said = "the action mask of tests.toy_envs:Masked, environment 0, step 1 of update 2, forbids every action"
    assert said in sentence and f"{out} holds update 1" in sentence


def test_masks_that_come_in_step_only_are_noticed_in_an_evaluation(tmp_path, capfd):
    env = "tests.rollout.test_vector_collector:LateMask"
    sentence = refused(capfd, gym(tmp_path / "run", {}, "--eval-episodes", "2", env=env))
    assert "gives action masks in step, but gave none in reset" in sentence


def test_a_last_observation_that_is_not_finite_is_noticed(tmp_path, capfd):
    """With same-step autoreset nothing is chosen on it, but V of it is learned from."""
    said = "showed inf in entry 0 of the last observation of an episode of environment 0, in step"
    out, words = tmp_path / "run", ["env.backend:sync", "--env.backend.autoreset", "same-step"]
    env = "tests.toy_envs:BlowsUp"
    assert f"{said} 1 of update 2" in refused(capfd, gym(out, {}, "--eval-episodes", "0", *words, env=env))
    assert f"{said} 3 of the evaluation" in refused(capfd, ["eval", str(out), "--episodes", "1"])


def test_a_policy_that_says_nan_does_not_play_action_0(tmp_path, capfd):
    out = tmp_path / "run"
    assert main(gym(out, {}, "--updates", "1", "--eval-episodes", "0", env="CartPole-v1")) == 0
    weights = torch.load(out / "policy" / "weights.pt", weights_only=True)
    torch.save({name: weight * float("nan") for name, weight in weights.items()}, out / "policy" / "weights.pt")
    assert "the policy's outputs are not finite" in refused(capfd, ["eval", str(out), "--episodes", "1"])


def test_a_policy_in_the_users_hands_refuses_what_no_action_can_be_chosen_by(tmp_path):
    kwargs = {"forbid_all": True}
    words = gym(tmp_path / "run", kwargs, "--updates", "1", "--eval-episodes", "0", env="tests.toy_envs:Masked")
    assert main(words) == 0
    policy, seen = load_policy(tmp_path / "run"), np.zeros(3, np.float32)
    assert policy.predict(seen, mask=[0, 0, 1, 0]) == 2
    for deterministic in (True, False):
        with pytest.raises(HeelerError, match=r"^the action mask of tests\.toy_envs:Masked forbids every action: "):
            policy.predict(seen, mask=np.zeros(4, np.int8), deterministic=deterministic)
        with pytest.raises(HeelerError, match=r"^tests\.toy_envs:Masked showed nan in entry 2 of the observation: "):
            policy.predict(np.array([0, 0, np.nan], np.float32), mask=np.ones(4), deterministic=deterministic)
    with pytest.raises(HeelerError, match="gives an action mask of 3 entries, but its actions need 4"):
        policy.predict(seen, mask=[1, 1, 1])

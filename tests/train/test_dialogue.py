"""Dialogue runs through the public door: learning, the run folder, resume, evaluation, rewards, and what goes wrong."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heeler import (
    DialogueConfig,
    FixedKL,
    Full,
    HeelerError,
    PPOConfig,
    Sampling,
    load_dialogue_run,
    resume_dialogue,
    train_dialogue,
)
from heeler.cli import main
from heeler.envs.text import TextStep
from heeler.ppo.shaping import segment_sums
from heeler.rollout.dialogue import DialogueRollout
from heeler.rollout.engines.draws import draw_seed
from heeler.train.evaluate import corpus_distinct
from heeler.train.ppo import UpdateReport
from tests.runs import numbers
from tests.runs import small_dialogue as small
from tests.tiny import save_tiny_model, save_tiny_seq2seq
from tests.toy_dialogues import Hidden, Vowels

PROMPTS = ["ab", "c", "defgh", "xyz z"]


@pytest.mark.parametrize("seed", [0, 1])
def test_asking_first_and_then_copying_the_answer_is_learned(tmp_path: Path, seed: int) -> None:
    """One turn alone is right one time in five. Asking pays nothing by itself: its reward comes a turn later."""
    model = save_tiny_model(tmp_path / "m", words=[*"01234", "ask", "go"], hidden=64, layers=2, std=0.05)
    config = DialogueConfig(
        model=model, out=str(tmp_path / "run"), seed=seed, updates=30, prompts_per_update=64, lr=1e-3, critic_lr=3e-3,
        trainable=Full(), sampling=Sampling(max_new_tokens=1), max_turns=2, kl=FixedKL(coef=0.0), threads=1,
        checkpoint_every=1000, ppo=PPOConfig(epochs=4, minibatches=2, entropy_coef=0.03),
    )  # fmt: skip
    run = train_dialogue(config, prompts=["go"], env=Hidden, show=False)
    assert run.folder is not None
    metrics = run.folder.metrics()
    assert metrics[0]["reward/mean"] < 0.3 and metrics[0]["episode/turns"] < 1.5
    assert sum(m["reward/mean"] for m in metrics[-5:]) / 5 > 0.7
    assert sum(m["episode/turns"] for m in metrics[-5:]) / 5 > 1.7


def test_the_run_folder(tiny_llama: str, tmp_path: Path) -> None:
    run = train_dialogue(
        small(tiny_llama, tmp_path / "run", eval_every=2), prompts=PROMPTS, eval_prompts=PROMPTS[:3], env=Vowels,
        show=False,
    )  # fmt: skip
    rows = numbers(tmp_path / "run")
    assert [row["episodes"] for row in rows] == [8, 16, 24, 32]
    assert all(1 <= row["episode/turns"] <= 3 and row["episode/ended"] == 1 for row in rows)
    assert all(row["episode/context"] > row["completion/length"] > 0 for row in rows)
    assert rows[0]["kl/ref"] == pytest.approx(0, abs=1e-3) and max(r["engine/logprob_gap"] for r in rows) < 1e-4
    assert "eval/reward" in rows[1] and "eval/episode/turns" in rows[1]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval/after"].keys() >= {"reward", "kl/ref", "length", "episode/turns", "episode/ended"}
    assert summary["eval/before"]["kl/ref"] == pytest.approx(0, abs=1e-3)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert any("]" in s["completion"] for s in samples)  # observations are shown
    assert json.loads((tmp_path / "run" / "config.json").read_text())["verb"] == "ppo dialogue"
    assert run.sample("ab", "c") == run.sample("ab", "c") != run.sample("ab", "c", seed=1)


@pytest.mark.parametrize("changes", [{}, {"trainable": Full(), "samples_per_prompt": 2}], ids=["top", "full"])
def test_resume_equals_uninterrupted(tiny_llama: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    whole, again, parts = tmp_path / "whole", tmp_path / "again", tmp_path / "parts"
    straight = train_dialogue(small(tiny_llama, whole, **changes), prompts=PROMPTS, env=Vowels, show=False)
    train_dialogue(small(tiny_llama, again, **changes), prompts=PROMPTS, env=Vowels, show=False)
    assert numbers(again) == numbers(whole)

    def stop(report: UpdateReport) -> None:
        if report.metrics["step"] == 3:  # after the checkpoint of update 2: update 3 is done again
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_dialogue(small(tiny_llama, parts, **changes), prompts=PROMPTS, env=Vowels, on_update=stop, show=False)
    resumed = resume_dialogue(parts, prompts=PROMPTS, env=Vowels, show=False)
    assert numbers(parts) == numbers(whole)
    for name, tensor in straight.policy.state_dict().items():
        assert torch.equal(resumed.policy.state_dict()[name], tensor), name
    with pytest.raises(HeelerError, match="in an environment given in Python"):
        load_dialogue_run(parts, prompts=PROMPTS)


def test_kept_trunk_states_change_no_number(tiny_llama: str, tmp_path: Path) -> None:
    for name, keep in (("kept", True), ("fresh", False)):
        config = small(tiny_llama, tmp_path / name, updates=2, reuse_trunk_states=keep)
        train_dialogue(config, prompts=PROMPTS, env=Vowels, show=False)
    for a, b in zip(numbers(tmp_path / "kept"), numbers(tmp_path / "fresh"), strict=True):
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=2e-2, abs=2e-3), key


def test_the_environments_rewards_reach_their_turns(tiny_llama: str, tmp_path: Path) -> None:
    reports: list[UpdateReport] = []
    config = small(tiny_llama, tmp_path / "run", updates=1, kl=FixedKL(coef=0.0))
    train_dialogue(config, prompts=PROMPTS, env=Vowels, on_update=reports.append, show=False)
    scored = reports[0].scored
    rollout = scored.rollout
    assert isinstance(rollout, DialogueRollout)
    assert torch.equal(scored.rewards, rollout.step_rewards)
    torch.testing.assert_close(segment_sums(scored.rewards, rollout.offsets), scored.scores)
    assert int((rollout.step_rewards != 0).sum()) > len(rollout.turns)  # not only at the ends


class Endless:
    """Pays 1 for every turn and never ends."""

    def __init__(self, prompt: str) -> None: ...

    def reset(self) -> str:
        return ""

    def step(self, action: str) -> TextStep:
        return TextStep("more", 1.0, terminated=False)


@pytest.mark.parametrize("truncation", ["terminal", "bootstrap", "drop"])
def test_a_cut_episode_keeps_what_it_earned(tiny_llama: str, tmp_path: Path, truncation: Any) -> None:
    reports: list[UpdateReport] = []
    config = small(
        tiny_llama, tmp_path / "run", updates=2, kl=FixedKL(coef=0.0), max_turns=2, truncation=truncation, lr=1e-3
    )
    run = train_dialogue(config, prompts=PROMPTS, env=Endless, on_update=reports.append, show=False)
    assert numbers(tmp_path / "run")[0]["reward/mean"] == 2 and numbers(tmp_path / "run")[0]["episode/ended"] == 0
    scored = reports[0].scored
    assert torch.equal(segment_sums(scored.rewards, scored.rollout.offsets), torch.full((8,), 2.0))
    weights = {*scored.policy_weights.tolist()}
    assert weights == ({0.0} if truncation == "drop" else {1.0})
    later = reports[1].scored.bootstrap  # the value head starts at 0
    assert bool((later != 0).all()) == (truncation == "bootstrap")
    assert run.state.step == 2


def test_the_value_behind_a_cut_episode_sees_the_last_observation(tiny_llama: str, tmp_path: Path) -> None:
    run = train_dialogue(
        small(tiny_llama, tmp_path / "run", updates=1, max_turns=1, truncation="bootstrap"),
        prompts=PROMPTS, env=Endless, show=False,
    )  # fmt: skip
    rollout = run.rollout(run.prompts, [1, 2, 3, 4])
    inputs: Any = rollout.inputs
    more = run.tokenizer("more")["input_ids"]
    ends = inputs.lengths.cumsum(0).tolist()
    assert all(inputs.tokens[end - len(more) : end].tolist() == more for end in ends)
    _, _, after = run.policy.score(inputs, last_values=True)
    changed = inputs.tokens.clone()
    changed[ends[0] - 1] += 1
    _, _, other = run.policy.score(replace(inputs, tokens=changed), last_values=True)
    assert float(after[0]) != float(other[0]) and torch.equal(after[1:], other[1:])


def test_a_reward_of_last_turns_beside_the_environments(tiny_llama: str, tmp_path: Path) -> None:
    seen: list[Any] = []

    def judge(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.append((completions, columns))
        return [10.0 for _ in completions]

    reports: list[UpdateReport] = []
    config = small(tiny_llama, tmp_path / "run", updates=1, kl=FixedKL(coef=0.0))
    rows = [{"prompt": p, "level": i} for i, p in enumerate(PROMPTS)]

    def env(prompt: str, level: int, seed: int) -> Vowels:
        assert PROMPTS[level] == prompt
        return Vowels(prompt, seed)

    train_dialogue(config, prompts=rows, env=env, reward=judge, on_update=reports.append, show=False)
    scored = reports[0].scored
    rollout = scored.rollout
    assert isinstance(rollout, DialogueRollout)
    wanted = rollout.step_rewards.clone()
    wanted[rollout.offsets[1:] - 1] += 10
    torch.testing.assert_close(scored.rewards, wanted)
    row = numbers(tmp_path / "run")[0]
    assert row["reward/answer"] == 10 and row["reward/mean"] == pytest.approx(row["reward/environment"] + 10)
    assert seen[0][0] == rollout.answers and len(seen[0][1]["level"]) == 8
    with pytest.raises(HeelerError, match="--truncation bootstrap lets V stand"):
        train_dialogue(small(tiny_llama, tmp_path / "no", truncation="bootstrap"), prompts=rows, env=env, reward=judge)


def test_an_encoder_decoder_model_is_refused(tmp_path: Path) -> None:
    config = small(save_tiny_seq2seq(tmp_path / "m"), tmp_path / "run", trainable=Full())
    with pytest.raises(HeelerError, match="dialogues need a causal model"):
        train_dialogue(config, prompts=PROMPTS, env=Vowels, show=False)


def test_a_reward_given_in_python_is_asked_for_again(tiny_llama: str, tmp_path: Path) -> None:
    def score(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    out = tmp_path / "run"
    train_dialogue(small(tiny_llama, out), prompts=PROMPTS, env=Vowels, reward=score, show=False)
    with pytest.raises(HeelerError, match="was trained with a reward given in Python"):
        resume_dialogue(out, prompts=PROMPTS, env=Vowels, updates=5, show=False)
    resume_dialogue(out, prompts=PROMPTS, env=Vowels, reward=score, updates=5, show=False)
    assert numbers(out)[-1]["step"] == 5


def test_repetition_is_measured_on_what_the_policy_wrote(tiny_llama: str, tmp_path: Path) -> None:
    class Parrot:
        def __init__(self, **row: Any) -> None: ...

        def reset(self) -> str:
            return ""

        def step(self, action: str) -> TextStep:
            return TextStep(" the same words", 0.0, False)

    config = small(tiny_llama, tmp_path / "run", updates=1)
    run = train_dialogue(config, prompts=PROMPTS, eval_prompts=PROMPTS, env=Parrot, show=False)
    rollout = run.rollout(run.eval_prompts, [1, 2, 3, 4])  # pyright: ignore
    assert all("the same words" in text for text in rollout.completions)
    assert not any("the same words" in text for text in rollout.written)
    assert run.evaluate().figures["distinct_2"] == corpus_distinct(
        run.texts_of(
            run.rollout(
                run.eval_prompts,
                [draw_seed(config.seed, 0xE7A1, i) for i in range(4)],  # pyright: ignore
            )
        ),
        2,
    )


def command(model: str, *flags: str, env: str = "heeler.envs.tools:Calculator") -> list[str]:
    return [
        "ppo", "dialogue", "--model", model, "--prompts", "prompts.jsonl", "--env", env, "--out", "run", "--updates",
        "2", "--prompts-per-update", "4", "--sampling.max-new-tokens", "5", "--max-turns", "3", "--threads", "1",
        "--precision", "fp32", *flags, "trainable:top-layers", "--trainable.layers", "1",
    ]  # fmt: skip


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "3*4 <calc>3*4</calc>", "answer": "12"}, {"prompt": "ab", "answer": "cd"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_command_line(workplace: Path, tiny_llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    reward = ["--reward", "f1", "--eval-prompts", "prompts.jsonl"]
    assert main(command(tiny_llama, *reward)) == 0
    printed = capsys.readouterr().out
    assert "episode/turns" in printed and "episode/ended" in printed
    assert load_dialogue_run("run").dialogue.sampling.stop == ("</calc>",)
    assert main(["eval", "run"]) == 0
    summary = json.loads((workplace / "run" / "summary.json").read_text())
    evaluated = json.loads((workplace / "run" / "eval.json").read_text())
    assert evaluated["reward"] == pytest.approx(summary["eval/after"]["reward"])
    assert evaluated["episode/turns"] == pytest.approx(summary["eval/after"]["episode/turns"])
    assert main(["resume", "run", "--updates", "3"]) == 0
    assert [row["step"] for row in numbers(workplace / "run")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("env", "flags", "says"),
    [
        (
            "mine:Raises",
            (),
            "the environment mine:Raises, prompt 1 of prompts.jsonl, turn 1: step raised: ValueError: no",
        ),
        ("mine:Nan", (), "the environment mine:Nan, prompt 1 of prompts.jsonl, turn 1: step returned the reward nan"),
        ("mine:Number", (), "the environment mine:Number, prompt 1 of prompts.jsonl, turn 1: step returned 5 as its"),
        ("mine:NoStep", (), "the environment mine:NoStep, prompt 1 of prompts.jsonl: NoStep has no method step"),
        ("mine:Absent", (), "has no environment 'Absent'"),
        ("", (), "no environment was given"),
        ("mine:Raises", ("--max-turns", "0"), "--max-turns must be at least 1, not 0"),
        ("mine:Raises", ("--max-context", "6"), "prompts.jsonl, prompt 1: 2 tokens leave no room for a turn of 5"),
        ("mine:Raises", ("--max-context", "65"), "--max-context 65 is more than the 64 tokens of the model's context"),
    ],
)
def test_mistakes_are_one_sentence(
    workplace: Path, tiny_llama: str, capsys: pytest.CaptureFixture[str], env: str, flags: tuple[str, ...], says: str
) -> None:
    body = (
        "from heeler import TextStep\nclass NoStep:\n  def __init__(self, **row): pass\n  def reset(self): return ''\n"
    )
    for name, result in (
        ("Raises", "no()"),
        ("Nan", "TextStep('', float('nan'), False)"),
        ("Number", "TextStep(5, 0.0, False)"),
    ):
        body += f"class {name}(NoStep):\n  def step(self, action): return {result}\n"
    (workplace / "mine.py").write_text(body + "def no(): raise ValueError('no')\n")
    (workplace / "prompts.jsonl").write_text('{"prompt": "ab"}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(workplace))
        patch.delitem(sys.modules, "mine", raising=False)
        assert main(command(tiny_llama, *flags, env=env)) == 2
    error = capsys.readouterr().err
    sentences = [line for line in error.splitlines() if line.startswith("heeler: ")]
    assert len(sentences) == 1 and says in sentences[0] and "Traceback" not in error

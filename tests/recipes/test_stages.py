"""Recipes of several stages, on tiny models: they chain, they go on where they stopped, and nothing held out leaks."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heeler.data.questions import countries, country_questions, trivia, trivia_questions
from heeler.data.reasoning import reasoning_gym_prompts
from heeler.envs.tools import Calculator
from heeler.policies.loading import load_causal_lm, load_tokenizer
from heeler.recipes import calculator, rlhf, stages, tasks
from heeler.runtime.runs import RunFolder, read_json
from heeler.train import sft
from heeler.train.reward import RewardConfig
from heeler.train.reward_run import RewardTask
from heeler.train.sft import SFTConfig
from heeler.train.text import TextConfig
from heeler.types import HeelerError
from tests.tiny import save_tiny_model


@pytest.fixture
def tiny_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The recipes' model is a tiny one with as many layers as they train, and a longer context."""
    import transformers

    folder = save_tiny_model(tmp_path / "model", layers=11, hidden=16, std=0.1)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.max_position_embeddings = 512
    config.save_pretrained(folder)
    for module in (tasks, rlhf):
        monkeypatch.setattr(module, "smollm2_folder", lambda show=True: folder)
    return folder


def test_the_stages_chain_and_are_not_repeated(
    tiny_smollm2: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tasks.Arithmetic(
        task="chain_sum", out=str(tmp_path / "run"), examples=64, updates=1, eval_prompts=16, threads=1
    )
    out = tasks.run_arithmetic(recipe)
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["stages"]) == ["base", "SFT", "SFT+PPO"]
    assert all(0 <= figures["reward"] <= 1 for figures in summary["stages"].values())
    assert summary["stages"]["SFT"] != summary["stages"]["base"]
    assert "SFT+PPO" in capsys.readouterr().out
    rows = {name: _prompts(out / "data" / f"{name}.jsonl") for name in ("solved", "prompts", "held_out")}
    assert len(rows["solved"]) == 64 and len(rows["held_out"]) == 16
    assert not set(rows["held_out"]) & (set(rows["solved"]) | set(rows["prompts"]))
    assert not set(rows["solved"]) & set(rows["prompts"]) and len(rows["prompts"]) > 1000
    assert "reward/solved/greedy" in summary["stages"]["SFT+PPO"]
    with pytest.raises(HeelerError, match="different questions, too few"):
        tasks.run_arithmetic(replace(recipe, out=str(tmp_path / "other"), examples=20_000))
    trained = (out / "ppo" / "metrics.jsonl").read_text()
    tasks.run_arithmetic(recipe)
    assert (out / "ppo" / "metrics.jsonl").read_text() == trained
    assert json.loads((out / "summary.json").read_text()) == summary
    assert "kl/ref" not in summary["stages"]["base"] and summary["stages"]["SFT"]["kl/ref"] == pytest.approx(
        0, abs=1e-5
    )
    for changed, says in ({"seed": 2}, "seed 1, not 2"), ({"task": "syllogism"}, "task chain_sum, not syllogism"):
        with pytest.raises(HeelerError, match=f"was begun with .*{says}.*: give the same options, or another --out"):
            tasks.run_arithmetic(replace(recipe, **changed))
    with monkeypatch.context() as other_version:
        other_version.setitem(tasks.TASKS, "chain_sum", replace(tasks.TASKS["chain_sum"], answer_tokens=5))
        with pytest.raises(HeelerError, match=r"with settings .*'answer_tokens': 6.* not .*'answer_tokens': 5"):
            tasks.run_arithmetic(recipe)
    tasks.run_arithmetic(replace(recipe, threads=2))


def test_an_interrupted_stage_goes_on(tiny_smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tasks.Arithmetic(
        task="chain_sum", out=str(tmp_path / "parts"), examples=32, updates=1, eval_prompts=8, threads=1
    )
    whole = tasks.run_arithmetic(replace(recipe, out=str(tmp_path / "whole")))

    def interrupt(config: TextConfig, **kwargs: Any) -> Any:
        def stop(report: Any) -> None:
            raise KeyboardInterrupt

        return train_text(config, on_update=stop, **kwargs)

    train_text = stages.train_text
    monkeypatch.setattr(stages, "train_text", interrupt)
    with pytest.raises(KeyboardInterrupt, match="go on with the same command and --out"):
        tasks.run_arithmetic(recipe)
    monkeypatch.undo()
    for module in (tasks, rlhf):
        monkeypatch.setattr(module, "smollm2_folder", lambda show=True: tiny_smollm2)
    parts = tasks.run_arithmetic(recipe)
    figures = [json.loads((folder / "summary.json").read_text())["stages"] for folder in (whole, parts)]
    assert figures[0] == figures[1]


def test_an_interrupted_classifier_goes_on(tiny_smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"the {i}", "chosen": " good", "rejected": " bad"} for i in range(12)]
    training = RewardConfig(model=tiny_smollm2, batch_size=2, threads=1, precision="fp32")
    pairs = stages.write_rows(tmp_path / "pairs.jsonl", rows)
    task = RewardTask(data=pairs, out=str(tmp_path / "rm"), training=training)
    logged: list[float] = []

    def log(folder: RunFolder, metrics: dict[str, float]) -> None:
        logged.append(metrics["step"])
        if len(logged) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunFolder, "log", log)
    with pytest.raises(KeyboardInterrupt, match="go on with the same command and --out"):
        stages.reward_stage(task, show=False)
    summary = stages.reward_stage(task, show=False)
    assert logged == [*range(1, summary["updates"] + 1)] and summary["updates"] > 3
    assert stages.reward_stage(task, show=False) == summary and len(logged) == summary["updates"]


def test_a_folder_that_is_no_run_is_refused(tiny_smollm2: str, tmp_path: Path) -> None:
    (tmp_path / "run" / "sft" / "notes").mkdir(parents=True)
    with pytest.raises(HeelerError, match="exists and is no run that could go on"):
        stages.sft_stage(SFTConfig(model=tiny_smollm2, data="x.jsonl", out=str(tmp_path / "run" / "sft")))


ROWS = [{"prompt": f"{a}{b}=", "completion": f"{b}{a}."} for a in "abc" for b in "def"]


def sft_of(model: str, tmp_path: Path, **changes: Any) -> SFTConfig:
    data = stages.write_rows(tmp_path / "rows.jsonl", ROWS)
    return SFTConfig(
        model=model, data=data, out=str(tmp_path / "sft"), updates=2, examples_per_update=4, threads=1,
        precision="fp32", sample_tokens=4, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("eval_share", [0.05, 0.4])
def test_fine_tuning_that_was_killed_before_its_summary_goes_on(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eval_share: float
) -> None:
    """While it samples with the policy that it has exported; 5 % of 9 examples hold out nothing."""
    config = sft_of(tiny_llama, tmp_path, eval_share=eval_share)

    def killed(*_: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(sft, "_sample", killed)
        with pytest.raises(SystemExit):
            stages.sft_stage(config, show=False)
    folder = tmp_path / "sft"
    assert (folder / "policy").is_dir() and not (folder / "summary.json").exists()
    summary = stages.sft_stage(config, show=False)
    assert summary["updates"] == 2 and ("eval/after" in summary) == (eval_share == 0.4)
    trained = (folder / "metrics.jsonl").read_text()
    assert stages.sft_stage(config, show=False) == summary and (folder / "metrics.jsonl").read_text() == trained


def test_fine_tuning_that_was_killed_before_its_first_checkpoint_begins_again(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = sft_of(tiny_llama, tmp_path), tmp_path / "sft"

    def killed(state: Any, file: Path) -> None:
        file.write_text("half")
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", killed)
        with pytest.raises(SystemExit):
            stages.sft_stage(config, show=False)
    assert [file.name for file in (folder / "checkpoints").iterdir()] == ["step-000000.partial"]
    assert stages.sft_stage(config, show=False)["updates"] == 2
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(HeelerError, match="exists and is no run that could go on"):
        stages.sft_stage(replace(config, out=str(tmp_path / "model")))
    assert (tmp_path / "model" / "config.json").exists()


def test_the_folder_of_something_else_is_not_taken(tmp_path: Path) -> None:
    """Neither that of a run nor any other that is not empty; what a recipe left that was stopped at once is."""
    recipe = tasks.QA()
    run = tmp_path / "imdb"
    run.mkdir()
    (run / "summary.json").write_text("{}")
    with pytest.raises(HeelerError, match="imdb holds something else than a recipe's stages: move it away, or choose"):
        stages.claim(str(run), "qa", recipe)
    assert [file.name for file in run.iterdir()] == ["summary.json"]
    with pytest.raises(HeelerError, match=r"cannot create the folder .*: File exists; choose another --out"):
        stages.claim(str(run / "summary.json"), "qa", recipe)
    out = tmp_path / "qa"
    out.mkdir()
    (out / "recipe.json.partial").write_text("{")
    assert stages.claim(str(out), "qa", recipe) == out
    assert stages.claim(str(out), "trivia", recipe) == out  # no stage began
    (out / "data").mkdir()
    assert stages.claim(str(out), "trivia", recipe) == out and read_json(out / "recipe.json")["recipe"] == "trivia"
    with pytest.raises(HeelerError, match="was begun with recipe trivia, not qa"):
        stages.claim(str(out), "qa", recipe)


def test_answers_of_reasoning_gym_are_taken_from_the_first_line() -> None:
    from heeler.rewards.specs import load_reward
    from tests.tiny import samples_of

    reward = load_reward(tasks.FIRST_LINE)
    for name, task in tasks.TASKS.items():
        if task.worked:
            continue
        row = reasoning_gym_prompts(name, 1, seed=3, **task.options)[0]
        texts = [f" {row['answer']}", f" {row['answer']}\nThe next line", "", " something else"]
        columns = {key: [row[key]] * 4 for key in ("answer", "task", "entry")}
        assert reward(samples_of([row["prompt"]] * 4, texts, **columns)).scores.tolist()[:3] == [1.0, 1.0, 0.0]


def test_worked_answers(tiny_smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tuning shows solutions that fit under the cap; what stands after the mark counts, and only there."""
    from heeler.rewards.specs import load_reward
    from tests.tiny import samples_of

    given: list[Any] = []
    monkeypatch.setattr(tasks, "train_stages", lambda out, *stages: given.extend(stages) or out)
    cap = 150
    monkeypatch.setitem(tasks.TASKS, "gsm_symbolic", replace(tasks.TASKS["gsm_symbolic"], answer_tokens=cap))
    monkeypatch.setattr(tasks, "PROMPTS", 100)
    out = tasks.run_arithmetic(
        tasks.Arithmetic(task="gsm_symbolic", out=str(tmp_path / "run"), examples=16, eval_prompts=16)
    )
    solved, config = given[:2]
    tokenizer, reward = load_tokenizer(tiny_smollm2), load_reward(tasks.AFTER_MARK)
    assert config.reward == tasks.AFTER_MARK and config.sampling.max_new_tokens == cap and len(solved) == 16
    assert all(len(tokenizer(row["completion"])["input_ids"]) < cap and "\n####" in row["completion"] for row in solved)
    held_out = [json.loads(line) for line in (out / "data" / "held_out.jsonl").read_text().splitlines()]
    for row in held_out:
        cot = row["entry"]["metadata"]["answer_cot"]
        assert len(tokenizer(f" {cot}")["input_ids"]) < cap
        columns = {key: [row[key]] * 4 for key in ("answer", "task", "entry")}
        texts = [f" {cot}", f"#### 1\n#### {row['answer']}", f" {row['answer']}", f"{cot}7"]
        assert reward(samples_of([row["prompt"]] * 4, texts, **columns)).scores.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_questions_on_countries() -> None:
    """Countries are split, each part asks everything, and the answers are the package's."""
    parts = {part: country_questions(part) for part in ("sft", "ppo", "held_out")}
    names = {part: {r["country"] for r in rows} for part, rows in parts.items()}
    assert not names["sft"] & names["ppo"] and not names["held_out"] & (names["sft"] | names["ppo"])
    assert sum(map(len, parts.values())) == 6 * len(countries()) > 1000
    assert all(0.2 < len(rows) / (6 * len(countries())) < 0.5 for rows in parts.values())
    france = [r for rows in parts.values() for r in rows if r["country"] == "France"]
    assert {r["answer"] for r in france} == {"Paris", "Europe", "French"}
    assert {"prompt": "What is the capital of France?\nAnswer:", "answer": "Paris"}.items() <= france[0].items()


def test_trivia_questions() -> None:
    """Every question of the package with a short answer lies in one part; the answers are the package's."""
    parts = {part: trivia_questions(part) for part in ("sft", "ppo", "held_out")}
    rows = [row for part in parts.values() for row in part]
    assert len({row["prompt"] for row in rows}) == len(rows) == len(trivia()) == 258
    assert all(0.2 < len(part) / len(rows) < 0.5 for part in parts.values())
    assert {"prompt": "On every continent there is a city named what?\nAnswer:", "answer": "Rome"} in rows
    gyroscope = next(row for row in rows if row["prompt"].startswith("A spinning disk"))
    assert gyroscope["answer"] == "A gyroscope" and "is unaffected by tilting or rotation" in gyroscope["prompt"]


def test_a_calculator_is_shown_in_some_examples(tiny_smollm2: str, tmp_path: Path, capsys: Any) -> None:
    """What fine-tuning shows is what the environment does: a call, its output, and the answer that the reward takes."""
    sums = reasoning_gym_prompts("chain_sum", 400, seed=3, **calculator.SUMS)
    examples = calculator.examples_of(sums, seed=0)
    answers, shown = {row["prompt"]: row["answer"] for row in sums}, iter(examples)
    calls = 0
    for example in shown:
        prompt, completion = example["prompt"], example["completion"]
        tool = Calculator(prompt)
        step = tool.step(completion)
        if step.terminated:
            assert completion == f" {answers[prompt]}"
            continue
        calls += 1
        following = next(shown)
        assert following["prompt"] == prompt + completion + step.observation
        assert tool.step(following["completion"]).terminated and following["completion"] == f"\n{answers[prompt]}"
    assert calls == len(examples) - len(sums) and 0.2 < calls / len(sums) < 0.4
    recipe = calculator.Calculator(out=str(tmp_path / "run"), examples=16, updates=1, eval_prompts=8, threads=1)
    out = calculator.run_calculator(recipe, show=False)
    stages = json.loads((out / "summary.json").read_text())["stages"]
    assert stages.keys() == {"base", "SFT", "SFT+PPO"}
    assert {"reward/answer/solved", "reward/answer/solved/greedy"} <= stages["SFT+PPO"].keys()
    assert {"reward", "reward/greedy", "episode/turns", "episode/turns/greedy"} <= stages["SFT+PPO"].keys()
    assert "heeler eval" in capsys.readouterr().out
    parts = [(out / "data" / f"{part}.jsonl").read_text() for part in ("held_out", "prompts")]
    asked = [{json.loads(line)["prompt"] for line in part.splitlines()} for part in parts]
    assert len(asked[0]) == 8 and not asked[0] & asked[1]
    whole = stages["SFT+PPO"]
    shutil.rmtree(out / "ppo" / "policy")  # as if it had been interrupted after its last update
    summary = json.loads((out / "ppo" / "summary.json").read_text())
    del summary["eval/after"]
    (out / "ppo" / "summary.json").write_text(json.dumps(summary))
    trained = (out / "ppo" / "metrics.jsonl").read_text()
    assert calculator.run_calculator(recipe, show=False) == out
    assert json.loads((out / "summary.json").read_text())["stages"]["SFT+PPO"] == whole
    assert (out / "ppo" / "metrics.jsonl").read_text() == trained


@pytest.mark.slow
def test_qa_and_rlhf_run_end_to_end(tiny_smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "country_questions", lambda part: country_questions(part)[:24])
    out = tasks.run_qa(tasks.QA(out=str(tmp_path / "qa"), updates=1, threads=1))
    assert json.loads((out / "summary.json").read_text())["stages"]["SFT+PPO"]["exact"] <= 1
    monkeypatch.setattr(rlhf, "imdb_reward_model", lambda show=True: (tmp_path / "judge", {}))
    monkeypatch.setattr(rlhf, "sentiment", lambda prompts, completions, **columns: [0.5] * len(prompts))
    rlhf._base.cache_clear()
    recipe = rlhf.RLHF(out=str(tmp_path / "rl"), examples=40, pairs=40, updates=1, eval_prompts=8, threads=1)
    out = rlhf.run_rlhf(recipe, show=False)
    summary = json.loads((out / "summary.json").read_text())
    assert {"sentiment", "nats", "vader", "words"} <= summary["stages"]["SFT"].keys()
    assert 0 <= summary["reward_model"]["accuracy"] <= 1
    rlhf._base.cache_clear()


def test_nats_are_the_mean_of_each_text(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_causal_lm(tiny_llama), load_tokenizer(tiny_llama)
    monkeypatch.setattr(rlhf, "_base", lambda: (model, tokenizer))
    prompts, completions = ["once upon", "a", "the sea", "b"], [" a time", "", " is wide and", "xyz"]
    expected: list[float] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        before, after = tokenizer(prompt)["input_ids"], tokenizer(completion)["input_ids"]
        logits = model(input_ids=torch.tensor([before + after])).logits.detach()
        logp = logits[0, len(before) - 1 : -1].log_softmax(-1)
        expected.append(-sum(float(row[token]) for row, token in zip(logp, after, strict=True)) / max(len(after), 1))
    assert rlhf.nats(prompts, completions) == pytest.approx(expected, abs=1e-4)
    assert expected[1] == 0 and min(expected[0], *expected[2:]) > 1


def _prompts(file: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in file.read_text().splitlines()]


def test_balanced_questions_take_the_answers_in_turn() -> None:
    rows = [{"answer": answer, "n": n} for n, answer in enumerate("YYYYNYYNN")]
    assert [row["n"] for row in tasks._balanced(rows)] == [0, 4, 1, 7, 2, 8]

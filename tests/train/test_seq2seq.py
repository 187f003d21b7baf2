"""Runs on encoder-decoder models through the public door: SFT, PPO, resume, export, and settings that do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from heeler import Full, HeelerError, PPOConfig, Sampling, TopLayers, resume_sft, resume_text, train_sft, train_text
from heeler.data.examples import load_examples
from heeler.policies.loading import load_seq2seq_lm, load_tokenizer
from heeler.ppo.kl import FixedKL
from heeler.train.ppo import UpdateReport
from tests.runs import numbers, small
from tests.tiny import save_tiny_seq2seq
from tests.train.test_sft import ROWS, config_of
from tests.train.test_sft import numbers as sft_numbers
from tests.train.test_text import PROMPTS, vowels

WORDS = [str(i) for i in range(10)]


@pytest.fixture(scope="module", params=["t5", "bart"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_seq2seq(
        tmp_path_factory.mktemp(request.param), request.param, std=0.3 if request.param == "t5" else 0.1
    )


def small_ppo(model: str, out: Path, **changes: Any) -> Any:
    return small(model, out, **{"trainable": Full(), "lr": 2e-3, **changes})


def plain_loss(model: Any, tokenizer: Any) -> float:
    """transformers' loss on the examples, one at a time; nats a target token."""
    total, count = 0.0, 0
    for row in ROWS:
        source = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        target = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            total += float(model(input_ids=source, labels=torch.tensor([target])).loss) * len(target)
        count += len(target)
    return total / count


def test_sft_learns_its_examples_by_heart(model: str, tmp_path: Path) -> None:
    config = config_of(model, tmp_path / "run", trainable=Full(), updates=60, eval_share=0.0, eval_every=0)
    config = replace(
        config, examples_per_update=16, lr=2e-2 if load_seq2seq_lm(model).config.model_type == "t5" else 5e-3
    )
    run = train_sft(config, data=ROWS, show=False)
    losses = [row["loss"] for row in sft_numbers(tmp_path / "run")]
    tokenizer = load_tokenizer(str(tmp_path / "run"))
    assert losses[0] == pytest.approx(plain_loss(load_seq2seq_lm(model), tokenizer), rel=1e-4)
    assert losses[-1] < 0.1 and plain_loss(load_seq2seq_lm(str(tmp_path / "run")), tokenizer) < 0.1
    for example in run.summary["examples"]:
        assert example["completion"] == example["expected"]


def test_sft_resume_equals_uninterrupted(model: str, tmp_path: Path) -> None:
    whole = train_sft(config_of(model, tmp_path / "whole"), data=ROWS, show=False)

    def stop(metrics: dict[str, float]) -> None:
        if metrics["step"] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sft(config_of(model, tmp_path / "parts"), data=ROWS, on_update=stop, show=False)
    resumed = resume_sft(tmp_path / "parts", data=ROWS, show=False)
    assert sft_numbers(tmp_path / "parts") == sft_numbers(tmp_path / "whole")
    for name, tensor in whole.weights().items():
        assert torch.equal(tensor, resumed.weights()[name]), name


def test_ppo_folder_and_export(model: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = train_text(
        small_ppo(model, out, updates=2), prompts=PROMPTS, eval_prompts=PROMPTS[:2], reward=vowels, show=False
    )
    rows = numbers(out)
    assert rows[0]["kl/ref"] == pytest.approx(0, abs=1e-4) and rows[0]["engine/logprob_gap"] < 1e-4
    assert rows[1]["kl/ref"] != 0 and rows[1]["engine/logprob_gap"] < 1e-4  # the engine samples what was trained
    plain = AutoModelForSeq2SeqLM.from_pretrained(out / "policy").eval()
    ids = AutoTokenizer.from_pretrained(out / "policy")("ab", return_tensors="pt")["input_ids"]
    labels = torch.tensor([[5, 6, 0]])
    with torch.no_grad():
        mine = run.policy.model(input_ids=ids, labels=labels).logits
        torch.testing.assert_close(plain(input_ids=ids, labels=labels).logits, mine)
        start = load_seq2seq_lm(model)(input_ids=ids, labels=labels).logits
    assert not torch.allclose(start, mine, atol=1e-3)
    assert run.sample("ab", "c") == run.sample("ab", "c")
    assert {"reward", "perplexity", "kl/ref"} <= json.loads((out / "summary.json").read_text())["eval/after"].keys()


def test_the_ratio_of_the_first_minibatch_is_1(model: str, tmp_path: Path) -> None:
    ppo = PPOConfig(epochs=1, minibatches=1, ratio_tolerance=1e-5)
    run = small_ppo(model, tmp_path / "run", updates=2, ppo=ppo)
    train_text(run, prompts=PROMPTS, reward=vowels, show=False)  # a mean error above the tolerance stops a run
    assert [row["policy/ratio_max"] for row in numbers(tmp_path / "run")] == pytest.approx([1.0, 1.0], abs=1e-4)


def test_ppo_resume_equals_uninterrupted(model: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = train_text(small_ppo(model, whole), prompts=PROMPTS, reward=vowels, show=False)

    def stop(report: UpdateReport) -> None:
        if report.metrics["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_text(small_ppo(model, parts), prompts=PROMPTS, reward=vowels, on_update=stop, show=False)
    resumed = resume_text(parts, prompts=PROMPTS, reward=vowels, show=False)
    assert numbers(parts) == numbers(whole)
    for name, tensor in straight.policy.state_dict().items():
        assert torch.equal(tensor, resumed.policy.state_dict()[name]), name


@pytest.mark.parametrize(("truncation", "source"), [("terminal", "auto"), ("bootstrap", "trainer")])
def test_micro_batches_and_truncation(tmp_path: Path, truncation: Any, source: Any) -> None:
    """Padding beside other sequences changes nothing in a run, whatever a cut completion means.

    With bootstrap every score is withheld here, so the advantages are 0: by the trainer's own log-probabilities
    exactly, by the engine's up to a rounding error, of which Adam would make a step of full length.
    """
    path = save_tiny_seq2seq(tmp_path / "model", std=0.1)
    for name, budget in (("one", 10_000), ("many", 20)):
        ppo = PPOConfig(epochs=2, minibatches=2, token_budget=budget)
        config = small_ppo(path, tmp_path / name, updates=2, ppo=ppo, truncation=truncation, old_logprobs=source)
        train_text(config, prompts=PROMPTS, reward=vowels, show=False)
    for a, b in zip(numbers(tmp_path / "one"), numbers(tmp_path / "many"), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert (value is None and b[key] is None) or b[key] == pytest.approx(value, rel=1e-2, abs=1e-3), key


def test_ppo_learns_to_copy_the_source(tmp_path: Path) -> None:
    """One token in, one token out; chance is 1 in 12. It must read the source: a constant answer pays 1 in 4."""
    path = save_tiny_seq2seq(tmp_path / "model", words=WORDS, hidden=32, std=0.1)

    def copies(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float(c.strip() == p) for p, c in zip(prompts, completions, strict=True)]

    digits = WORDS[:4]
    config = small_ppo(
        path, tmp_path / "run", updates=30, prompts_per_update=48, sampling=Sampling(max_new_tokens=1), lr=5e-3,
        kl=FixedKL(coef=0.0), checkpoint_every=100,
    )  # fmt: skip
    train_text(config, prompts=digits, reward=copies, show=False)
    rewards = [row["reward/mean"] for row in numbers(tmp_path / "run")]
    assert sum(rewards[:3]) / 3 < 0.2 and sum(rewards[-3:]) / 3 > 0.6


def test_examples_are_one_prompt_and_one_completion(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tiny_seq2seq(tmp_path))
    example = load_examples([{"prompt": "ab", "completion": "c"}], tokenizer, max_tokens=2, seq2seq=True)[0]
    assert example.tokens == [*tokenizer("ab")["input_ids"], *tokenizer("c")["input_ids"], 0]
    assert example.is_target == [False, False, True, True]
    with pytest.raises(HeelerError, match="row 1: 3 tokens"):
        load_examples([{"prompt": "abc", "completion": "c"}], tokenizer, max_tokens=2, seq2seq=True)
    with pytest.raises(HeelerError, match="learns one completion of one prompt"):
        load_examples([{"text": "abc"}], tokenizer, max_tokens=None, seq2seq=True)


def test_sentences_for_settings_that_do_not_fit(tmp_path: Path) -> None:
    path = save_tiny_seq2seq(tmp_path / "model", "bart")
    for changes, says in [
        ({"trainable": TopLayers(layers=1)}, "trains whole"),
        ({"engine": "hf"}, "hf engine samples causal models only"),
        ({"sampling": Sampling(max_new_tokens=65)}, "65 tokens take 65 positions of the decoder, which has 64"),
        (
            {"sampling": Sampling(max_new_tokens=64), "truncation": "bootstrap"},
            "64 tokens take 65 positions of the decoder",
        ),
    ]:
        with pytest.raises(HeelerError, match=says):
            train_text(small_ppo(path, tmp_path / "bad", **changes), prompts=PROMPTS, reward=vowels, show=False)
        assert not (tmp_path / "bad").exists()
    with pytest.raises(HeelerError, match="cannot share rows"):
        train_sft(config_of(path, tmp_path / "bad", pack=True), data=ROWS, show=False)
    with pytest.raises(HeelerError, match="prompt 1: 65 tokens"):
        train_text(small_ppo(path, tmp_path / "bad"), prompts=["a" * 65], reward=vowels, show=False)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from heeler.cli import main

    path = save_tiny_seq2seq(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = ["--updates", "1", "--threads", "1"]
    words = ["sft", "--model", path, "--data", "data.jsonl", "--out", "sft", "--examples-per-update", "4"]
    assert main([*words, *flags]) == 0
    Path("prompts.jsonl").write_text('{"prompt": "ab", "answer": "ba"}\n')
    words = ["ppo", "lm", "--model", "sft", "--prompts", "prompts.jsonl", "--reward", "chrf", "--out", "run"]
    words += ["--prompts-per-update", "2", "--ppo.minibatches", "1", "--sampling.max-new-tokens", "4"]
    assert main([*words, *flags]) == 2 and "choose trainable:full" in capsys.readouterr().err
    assert main([*words, *flags, "trainable:full"]) == 0
    assert main(["resume", "run", "--updates", "2"]) == 0 and len(numbers(Path("run"))) == 2
    capsys.readouterr()
    assert main(["sample", "run", "--prompt", "ab", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("ab -> ")

"""Options of text runs: token masks, stop strings, shaping of scores, critic warm-up."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AddedToken

from heeler import (
    AdaptiveKL,
    Full,
    HeelerError,
    LoRA,
    PPOConfig,
    Sampling,
    TextConfig,
    TopLayers,
    resume_text,
    train_text,
)
from heeler.policies.inputs import TokenInputs
from heeler.policies.language_model import LanguageModelPolicy, SeparateCritic, ValueHead
from heeler.policies.loading import load_causal_lm, load_tokenizer
from heeler.policies.token_masks import MASKED, AllTokens, OnlyTokens, WithoutTokens, token_bias
from heeler.ppo.advantages import AdvantageConfig
from heeler.ppo.kl import next_kl_coef
from heeler.ppo.moments import RunningMoments
from heeler.ppo.shaping import ScoreShaping, segment_sums
from heeler.rollout.engines.hf import HFEngine
from heeler.rollout.engines.native import NativeEngine
from heeler.rollout.engines.stopping import StopStrings
from heeler.rollout.text import decode, pack
from heeler.runtime.reduce import LocalReduce
from heeler.train.scoring import scale_of
from heeler.types import Request
from tests.runs import numbers, small
from tests.tiny import save_tiny_model
from tests.train.test_text import PROMPTS, vowels

REQUESTS = [Request(prompt=[10 + i, 20, 30 + i], seed=i) for i in range(6)]


def test_a_masked_policy_is_a_policy_over_the_allowed_tokens(tiny_llama: str) -> None:
    """Engine, trainer and reference: the softmax over the rows of the output layer that are allowed."""
    tokenizer = load_tokenizer(tiny_llama)
    model = load_causal_lm(tiny_llama)
    bias = token_bias(OnlyTokens(texts=("a", "b", "z")), tokenizer, 257, [0])
    assert bias is not None
    allowed = (bias == 0).nonzero()[:, 0]
    assert tokenizer.decode(allowed[1:]) == "abz" and allowed[0] == 0
    policy = LanguageModelPolicy(
        model,
        trainable=TopLayers(layers=1),
        critic=ValueHead(),
        temperature=0.7,
        token_bias=bias,
        entropy_gradient=True,
    )
    sampling = Sampling(max_new_tokens=8, temperature=0.7)
    completions = NativeEngine(policy.engine_model, eos_ids=[0], token_bias=bias).generate(REQUESTS, sampling)
    slow = HFEngine(policy.engine_model, eos_ids=[0], token_bias=bias).generate(REQUESTS, sampling)
    assert [c.tokens for c in completions] == [c.tokens for c in slow]
    assert {t for c in completions for t in c.tokens} <= set(allowed.tolist())
    inputs = pack([r.prompt for r in REQUESTS], completions, policy.device)
    output, ref_logprobs, _ = policy.score(inputs)
    torch.testing.assert_close(torch.cat([c.logprobs for c in completions]), output.logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(ref_logprobs, output.logprobs)

    rows = inputs.padded()
    logits = model(input_ids=rows.ids).logits[rows.rows, rows.columns][:, allowed] / 0.7
    plain = logits.log_softmax(-1)
    chosen = torch.searchsorted(allowed, rows.tokens)
    expected = plain.gather(1, chosen[:, None])[:, 0]
    entropy = -(plain.exp() * plain).sum(-1)
    torch.testing.assert_close(output.logprobs, expected, atol=1e-5, rtol=1e-5)
    fresh = policy.evaluate(inputs)
    torch.testing.assert_close(fresh.entropy, entropy, atol=1e-5, rtol=1e-5)
    weights = [p for p in model.parameters() if p.requires_grad]
    mine = torch.autograd.grad((fresh.logprobs + 0.3 * fresh.entropy).sum(), weights)
    theirs = torch.autograd.grad((expected + 0.3 * entropy).sum(), weights)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_masks_that_cannot_be_used(tiny_llama: str) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    assert token_bias(AllTokens(), tokenizer, 257, [0]) is None
    without = token_bias(WithoutTokens(texts=("a",)), tokenizer, 257, [0])
    assert without is not None and (without == MASKED).sum() == 1
    with pytest.raises(HeelerError, match="names 'yes', which this tokenizer splits into 'y', 'e', 's'"):
        token_bias(OnlyTokens(texts=("yes",)), tokenizer, 257, [0])
    with pytest.raises(HeelerError, match="forbids every token but the end of sequence"):
        token_bias(OnlyTokens(texts=()), tokenizer, 257, [0])


@pytest.mark.parametrize("way", [Full(), LoRA(rank=2)], ids=str)
@pytest.mark.parametrize("engine", ["native", "hf"])
def test_a_masked_run_samples_allowed_tokens_only(tiny_llama: str, tmp_path: Path, way: Any, engine: Any) -> None:
    config = small(tiny_llama, tmp_path / "run", trainable=way, tokens=OnlyTokens(texts=("a", "b")), engine=engine)
    run = train_text(config, prompts=PROMPTS, reward=vowels, show=False)
    assert {c for text in run.sample(*PROMPTS) for c in text} <= {"a", "b"}
    assert numbers(tmp_path / "run")[-1]["reward/mean"] > numbers(tmp_path / "run")[0]["reward/mean"]


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_a_cut_distribution_is_refused_in_training(tiny_llama: str, tmp_path: Path, cut: dict[str, Any]) -> None:
    config = small(tiny_llama, tmp_path / "run", sampling=Sampling(max_new_tokens=4, **cut))
    with pytest.raises(HeelerError, match=r"--sampling.top-k .* are for heeler sample"):
        train_text(config, prompts=PROMPTS, reward=vowels, show=False)
    assert not (tmp_path / "run").exists()


def test_values_are_not_computed_again_in_each_epoch(tiny_llama: str, tmp_path: Path) -> None:
    config = small(tiny_llama, tmp_path / "run", advantage=AdvantageConfig(recompute=True))
    with pytest.raises(HeelerError, match=r"--advantage.recompute is for environments"):
        train_text(config, prompts=PROMPTS, reward=vowels, show=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("trunk", [None, 2])
def test_stop_strings_end_completions(tiny_llama: str, trunk: int | None) -> None:
    """As soon as the text holds one; the slow engine and a search over the whole text agree."""
    tokenizer, model = load_tokenizer(tiny_llama), load_causal_lm(tiny_llama)
    free = Sampling(max_new_tokens=24)
    letters = token_bias(OnlyTokens(texts=tuple("abcdefghij ")), tokenizer, 257, [])  # no halves of characters
    native = NativeEngine(model, eos_ids=[], tokenizer=tokenizer, trunk_layers=trunk, token_bias=letters)
    whole = native.generate(REQUESTS, free)
    texts = [decode(tokenizer, c) for c in whole]
    stop = (texts[0][2:4], texts[1][15], texts[2][7:10])
    stopped = native.generate(REQUESTS, replace(free, stop=stop))
    slow_engine = HFEngine(model, eos_ids=[], tokenizer=tokenizer, token_bias=letters)
    slow = slow_engine.generate(REQUESTS, replace(free, stop=stop))
    assert any(c.stop_string is not None for c in stopped) and {c.finish_reason for c in stopped} == {"stop", "length"}
    for text, long, short, same in zip(texts, whole, stopped, slow, strict=True):
        places = [text.find(s) for s in stop if s in text]
        assert decode(tokenizer, short) == (text[: min(places)] if places else text)
        assert list(short.tokens) == list(long.tokens[: len(short.tokens)])
        assert (short.tokens, short.stop_string) == (same.tokens, same.stop_string)
        if short.stop_string is not None:
            assert tokenizer.decode(short.tokens).endswith(short.stop_string)
        if trunk is not None:
            assert short.trunk_states is not None
            assert len(short.trunk_states) == 3 + len(short.tokens) - 1


def test_an_empty_stop_string_is_refused(tiny_llama: str) -> None:
    with pytest.raises(HeelerError, match="a stop string is empty"):
        StopStrings(load_tokenizer(tiny_llama), ["", "a"])


@pytest.mark.parametrize("engine", [NativeEngine, HFEngine])
def test_a_special_token_is_a_stop_string_by_its_id(tiny_llama: str, engine: Any) -> None:
    """Texts are decoded without special tokens, so it never stands in one."""
    tokenizer, model = load_tokenizer(tiny_llama), load_causal_lm(tiny_llama)
    free = engine(model, eos_ids=[], tokenizer=tokenizer).generate(REQUESTS[:1], Sampling(max_new_tokens=8))[0]
    drawn = free.tokens[4]
    text = tokenizer.convert_ids_to_tokens(drawn)
    tokenizer.add_tokens(AddedToken(text, special=True))
    assert tokenizer.convert_tokens_to_ids(text) == drawn and drawn not in free.tokens[:4]
    sampling = Sampling(max_new_tokens=8, stop=(text, "not in there"))
    ended = engine(model, eos_ids=[], tokenizer=tokenizer).generate(REQUESTS[:1], sampling)[0]
    assert list(ended.tokens) == list(free.tokens[:5])
    assert (ended.finish_reason, ended.stop_string) == ("stop", text)
    assert decode(tokenizer, ended) == tokenizer.decode(free.tokens[:4])
    with pytest.raises(HeelerError, match=r"the special token .* and more: .* would never be found; give .* alone"):
        StopStrings(tokenizer, [text + "!"])


def test_what_stops_at_a_string_has_ended(tiny_llama: str, tmp_path: Path) -> None:
    stop = ("e", "a", "o", "t", "n", "s", "1", " ")
    seen: list[tuple[str, bool]] = []

    def reward(prompts: Any, completions: Any, truncated: Any) -> list[float]:
        seen.extend(zip(completions, truncated, strict=True))
        return [0.0] * len(completions)

    config = small(tiny_llama, tmp_path / "run", sampling=Sampling(max_new_tokens=40, stop=stop), updates=1)
    train_text(config, prompts=PROMPTS, reward=reward, show=False)
    assert not any(s in text for text, _ in seen for s in stop)
    assert {cut for _, cut in seen} == {True, False}


def test_score_shaping(tiny_llama: str, tmp_path: Path) -> None:
    """Scores arrive scaled by the running deviation and clipped; the log shows them raw."""
    shaping = ScoreShaping(scale=True, clip=0.5)
    rewards: list[torch.Tensor] = []
    given: list[list[float]] = []

    def reward(prompts: Any, completions: Any) -> list[float]:
        given.append([100.0 * len(text) + 7 for text in completions])
        return given[-1]

    config = small(tiny_llama, tmp_path / "run", shaping=shaping, updates=3)
    config = replace(config, kl=replace(config.kl, coef=0.0))
    train_text(
        config, prompts=PROMPTS, reward=reward, show=False, on_update=lambda r: rewards.append(r.scored.rewards.clone())
    )
    rows = numbers(tmp_path / "run")
    for k in range(3):
        assert rows[k]["reward/mean"] == pytest.approx(sum(given[k]) / len(given[k]), rel=1e-5)
        so_far = [score for scores in given[: k + 1] for score in scores]
        std = torch.tensor(so_far, dtype=torch.float64).std(correction=0)
        expected = (torch.tensor(given[k]) / std).clamp(-0.5, 0.5)
        assert float(rewards[k].sum()) == pytest.approx(float(expected.sum()), rel=1e-4)


def test_scores_that_have_not_differed_yet_stay_as_they_are(tiny_llama: str, tmp_path: Path) -> None:
    seen: list[float] = []

    def reward(prompts: Any, completions: Any) -> list[float]:
        seen.append(1.0)
        return [1.0 if len(seen) < 3 else float(i % 2) for i in range(len(completions))]

    config = small(tiny_llama, tmp_path / "run", shaping=ScoreShaping(scale=True), updates=3)
    train_text(config, prompts=PROMPTS, reward=reward, show=False)
    losses = [row["value/loss"] for row in numbers(tmp_path / "run")]
    assert max(losses) < 20  # divided by the rounding of a constant they would be of 1e15
    assert scale_of(RunningMoments()) == 1.0
    assert scale_of(RunningMoments().merge(torch.tensor([2e-6, 4e-6]), LocalReduce())) == pytest.approx(1e-6)


def test_whitened_rewards_keep_their_mean(tiny_llama: str, tmp_path: Path) -> None:
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for whiten in (False, True):
        config = small(tiny_llama, tmp_path / str(whiten), shaping=ScoreShaping(whiten=whiten), updates=1)
        train_text(
            config, prompts=PROMPTS, reward=vowels, show=False,
            on_update=lambda r: kept.append((r.scored.rewards, r.scored.values)),
        )  # fmt: skip
    (raw, _), (white, _) = kept
    assert float(white.std(correction=0)) == pytest.approx(1.0, abs=1e-4) and float(raw.std()) < 0.9
    assert float(white.mean()) == pytest.approx(float(raw.mean()), abs=1e-5)


def test_the_adaptive_penalty_of_a_run(tiny_llama: str, tmp_path: Path) -> None:
    """Each update's coefficient follows from the one before and its KL, and is what the rewards were charged with."""
    kl = AdaptiveKL(coef=0.2, target=0.05, horizon=40)
    charged: list[float] = []

    def watch(report: Any) -> None:
        scored = report.scored
        offsets = scored.rollout.offsets
        paid = segment_sums(scored.rewards, offsets) - scored.scores
        nats = segment_sums(scored.old_logprobs - scored.ref_logprobs, offsets)
        charged.append(-float(paid.sum() / nats.sum()) if float(nats.abs().max()) > 1e-3 else float("nan"))

    train_text(small(tiny_llama, tmp_path / "run", kl=kl), prompts=PROMPTS, reward=vowels, on_update=watch, show=False)
    rows = numbers(tmp_path / "run")
    assert rows[0]["kl/coef"] == 0.2 and rows[-1]["kl/coef"] != rows[1]["kl/coef"]
    for before, after in pairwise(rows):
        assert after["kl/coef"] == pytest.approx(next_kl_coef(kl, before["kl/coef"], before["kl/ref"], 8), rel=1e-5)
    assert charged[1:] == pytest.approx([row["kl/coef"] for row in rows[1:]], rel=1e-2)


def test_resume_restores_the_random_states(tiny_llama: str, tmp_path: Path) -> None:
    """Also those that only the reward draws from."""

    def noisy(prompts: Any, completions: Any) -> list[float]:
        return [random.random() + float(torch.rand(())) + np.random.rand() for _ in completions]

    def fresh(name: str, updates: int) -> TextConfig:
        return small(tiny_llama, tmp_path / name, updates=updates)

    train_text(fresh("whole", 4), prompts=PROMPTS, reward=noisy, show=False)
    train_text(fresh("half", 2), prompts=PROMPTS, reward=noisy, show=False)
    resume_text(tmp_path / "half", prompts=PROMPTS, reward=noisy, updates=4, show=False)
    assert numbers(tmp_path / "half") == numbers(tmp_path / "whole")


def test_resume_keeps_the_running_deviation(tiny_llama: str, tmp_path: Path) -> None:
    config = small(tiny_llama, tmp_path / "whole", shaping=ScoreShaping(scale=True))
    train_text(config, prompts=PROMPTS, reward=vowels, show=False)
    half = replace(config, out=str(tmp_path / "half"), updates=2)
    train_text(half, prompts=PROMPTS, reward=vowels, show=False)
    resume_text(tmp_path / "half", prompts=PROMPTS, reward=vowels, updates=4, show=False)
    assert numbers(tmp_path / "half") == numbers(tmp_path / "whole")


def test_critic_warmup_trains_the_critic_alone(tiny_llama: str, tmp_path: Path) -> None:
    config: TextConfig = small(tiny_llama, tmp_path / "run", critic_warmup=2, ppo=PPOConfig(epochs=1, minibatches=1))
    before = load_causal_lm(tiny_llama).state_dict()
    values: list[float] = []

    def watch(report: Any) -> None:
        values.append(float(report.scored.values.abs().mean()))

    run = train_text(config, prompts=PROMPTS, reward=vowels, on_update=watch, show=False)
    rows = numbers(tmp_path / "run")
    assert [row["lr"] > 0 for row in rows] == [False, False, True, True]
    assert rows[2]["kl/ref"] == pytest.approx(0.0, abs=1e-5) and rows[3]["kl/ref"] > 1e-4
    assert values[0] == 0.0 and values[2] > 0.005
    after = run.policy.model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_mask_and_a_stop_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from heeler.cli import main

    monkeypatch.chdir(tmp_path)
    model = save_tiny_model(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "cd"}\n')
    (tmp_path / "shout.py").write_text("def r(prompts, completions, **columns): return [len(c) for c in completions]\n")
    words = ["ppo", "lm", "--model", model, "--prompts", "prompts.jsonl", "--reward", "shout:r", "--updates", "1"]
    words += ["--sampling.stop", "q", "x", "--sampling.max-new-tokens", "4"]
    words += ["trainable:top-layers", "--trainable.layers", "1", "tokens:only-tokens", "--tokens.texts"]
    assert main([*words, "e", "q"]) == 0
    assert main([*words, "never"]) == 2


@pytest.mark.parametrize("old_logprobs", ["engine", "trainer"])
def test_without_rewards_nothing_moves(
    tiny_llama: str, tmp_path: Path, old_logprobs: Literal["engine", "trainer"]
) -> None:
    """Engine and reference differ by rounding errors; whitening and Adam must not make steps of them."""
    before = {name: p.clone() for name, p in load_causal_lm(tiny_llama).state_dict().items()}
    config = small(tiny_llama, tmp_path / "run", old_logprobs=old_logprobs, updates=2)
    run = train_text(config, prompts=["abc", "de fgh"], reward=lambda completions, **_: [0.0] * len(completions))
    assert len(numbers(tmp_path / "run")) == 2
    for name, parameter in run.policy.model.state_dict().items():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ("truncation", "shuffle"), [("terminal", "sequences"), ("terminal", "prompts"), ("bootstrap", "prompts")]
)
def test_sharing_prompts_changes_no_figure(
    tiny_llama: str,
    tmp_path: Path,
    truncation: Literal["terminal", "bootstrap"],
    shuffle: Literal["sequences", "prompts"],
) -> None:
    prompts = ["abc def ghi jkl", "mno pqr stu vwx yz", "once upon a time"]
    rows: list[list[dict[str, Any]]] = []
    for share in (True, False):
        config = small(
            tiny_llama, tmp_path / str(share), samples_per_prompt=6, prompts_per_update=3, share_prompts=share,
            truncation=truncation, ppo=PPOConfig(epochs=2, minibatches=2, shuffle=shuffle),
        )  # fmt: skip
        run = train_text(config, prompts=prompts, reward=vowels, show=False)
        inputs = run.collector().collect(0).inputs
        assert isinstance(inputs, TokenInputs) and inputs.shared() is not None
        assert run.policy.shares_prompts is share
        rows.append(numbers(tmp_path / str(share)))
    assert len(rows[0]) == 4
    for a, b in zip(*rows, strict=True):
        assert {k: v for k, v in a.items() if v is not None} == pytest.approx(
            {k: v for k, v in b.items() if v is not None}, rel=1e-3, abs=1e-4
        )


@pytest.mark.parametrize(
    ("trainable", "critic", "others"),
    [
        (Full(), ValueHead(detach=False), {}),
        (TopLayers(layers=1), ValueHead(), {"truncation": "bootstrap"}),
        (TopLayers(layers=1), SeparateCritic(), {"activation_checkpointing": True}),
        (Full(), SeparateCritic(), {"samples_per_prompt": 4}),
        (LoRA(rank=2), ValueHead(), {}),
        (Full(), ValueHead(), {"precision": "bf16"}),
    ],
    ids=str,
)
def test_the_pass_that_scores_is_the_first_one_of_the_update(
    trainable: Any, critic: Any, others: dict[str, Any], tiny_llama: str, tmp_path: Path
) -> None:
    """The same numbers with a pass less: old policy and critic are evaluated once, in scoring."""
    evaluate = LanguageModelPolicy.evaluate
    told: list[list[dict[str, Any]]] = []
    counts: list[int] = []
    for keep in (True, False):
        config = small(
            tiny_llama, tmp_path / str(keep), trainable=trainable, critic=critic, keep_first_pass=keep, lr=1e-3,
            old_logprobs="trainer", ppo=PPOConfig(epochs=2, minibatches=1, entropy_coef=0.01), **others,
        )  # fmt: skip
        with mock.patch.object(LanguageModelPolicy, "evaluate", autospec=True, side_effect=evaluate) as asked:
            train_text(config, prompts=PROMPTS, reward=vowels, show=False)
        told.append(numbers(tmp_path / str(keep)))
        counts.append(asked.call_count)
    kept, anew = told
    assert counts == [4, 8]  # updates, and updates times epochs
    loose = dict(rel=0.05, abs=0.02) if others.get("precision") == "bf16" else dict(rel=1e-3, abs=1e-5)
    for ours, theirs in zip(kept[:2], anew[:2], strict=True):
        assert {k for k, v in ours.items() if v is None} == {k for k, v in theirs.items() if v is None}
        told_of = {k: v for k, v in theirs.items() if v is not None}
        assert {k: ours[k] for k in told_of} == pytest.approx(told_of, **loose)


@pytest.mark.parametrize(
    "changes",
    [
        {"ppo": PPOConfig(epochs=1, minibatches=2)},
        {"old_logprobs": "engine"},
        {"ppo": PPOConfig(epochs=1, minibatches=1, token_budget=4)},
    ],
    ids=["a part of the batch", "no pass in scoring", "more than four passes"],
)
def test_no_pass_is_kept_where_the_update_cannot_begin_with_it(
    changes: dict[str, Any], tiny_llama: str, tmp_path: Path
) -> None:
    kept: list[int] = []
    config = small(tiny_llama, tmp_path / "run", updates=1, **{"old_logprobs": "trainer", **changes})
    train_text(
        config, prompts=PROMPTS, reward=vowels, show=False,
        on_update=lambda report: kept.append(len(report.scored.attached)),
    )  # fmt: skip
    assert kept == [0]

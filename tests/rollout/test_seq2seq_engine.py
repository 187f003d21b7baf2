"""The encoder-decoder engine against a plain loop without a cache, and against the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from heeler.policies.language_model import Full, ValueHead
from heeler.policies.loading import load_seq2seq_lm, load_tokenizer
from heeler.policies.seq2seq import Seq2SeqPolicy
from heeler.rollout.engines.draws import sample, uniforms
from heeler.rollout.engines.seq2seq import Seq2SeqEngine
from heeler.rollout.engines.stopping import StopStrings
from heeler.rollout.text import decode, pack
from heeler.types import Completion, HeelerError, Request, Sampling
from tests.rollout.test_engines import PROMPTS, requests, same
from tests.tiny import SEQ2SEQ, save_tiny_seq2seq


def plain_loop(
    model: Any, request: Request, sampling: Sampling, eos: list[int], bias: Any = None, tokenizer: Any = None
) -> Completion:
    """One request; encoder and decoder read everything anew for each token."""
    written, logprobs = [int(model.config.decoder_start_token_id)], []
    u = uniforms([request.seed], sampling.max_new_tokens)
    stops, reason, stop_string = StopStrings(tokenizer, sampling.stop), "length", None
    for t in range(sampling.max_new_tokens):
        with torch.no_grad():
            output = model(
                input_ids=torch.tensor([request.prompt]), decoder_input_ids=torch.tensor([written]), use_cache=False
            )
        token, logprob = sample(output.logits[:, -1], u[:, t], sampling, bias)
        written.append(int(token))
        logprobs.append(float(logprob))
        stop_string = None if written[-1] in eos else stops.hit(written[1:])
        if written[-1] in eos or stop_string is not None:
            reason = "stop"
            break
    return Completion(
        tokens=written[1:], logprobs=torch.tensor(logprobs), finish_reason=reason, version=0, stop_string=stop_string
    )  # pyright: ignore


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_the_engine_equals_a_plain_loop(architecture: str, tmp_path: Path) -> None:
    """Few ends, so that rows leave at different times, in batches that hold sources of different lengths."""
    model, eos = load_seq2seq_lm(save_tiny_seq2seq(tmp_path, architecture, std=0.1)), list(range(30))
    many = [Request(prompt=r.prompt, seed=r.seed + i) for i in range(4) for r in requests()]
    sampling = Sampling(max_new_tokens=14, temperature=0.9)
    engine = Seq2SeqEngine(model, eos_ids=eos, max_rows=16)
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda m, a, given: sizes.append(len(given["decoder_input_ids"])), with_kwargs=True
    )
    fast = engine.generate(many, sampling)
    hook.remove()
    same(fast, [plain_loop(model, request, sampling, eos) for request in many])
    assert len({len(c.tokens) for c in fast}) > 4 and {c.finish_reason for c in fast} == {"stop", "length"}
    assert sizes[0] == 16 and min(sizes[:8]) < 14  # rows that had ended left


def test_no_token_is_forced(tmp_path: Path) -> None:
    """`generate` of transformers begins and ends with the tokens that these settings name, whatever the model says."""
    model = load_seq2seq_lm(save_tiny_seq2seq(tmp_path, "bart"))
    engine, sampling = Seq2SeqEngine(model, eos_ids=range(30)), Sampling(max_new_tokens=8)
    free = engine.generate(requests(), sampling)
    for config in (model.config, model.generation_config):
        config.forced_bos_token_id = next(t for t in range(100, 257) if t not in {c.tokens[0] for c in free})
        config.forced_eos_token_id = next(t for t in range(100, 257) if t not in {c.tokens[-1] for c in free})
    same(engine.generate(requests(), sampling), free)


def test_the_source_is_encoded_once_a_batch(tmp_path: Path) -> None:
    model = load_seq2seq_lm(save_tiny_seq2seq(tmp_path))
    calls: list[int] = []
    model.get_encoder().register_forward_hook(lambda m, a, out: calls.append(len(out.last_hidden_state)))
    Seq2SeqEngine(model, eos_ids=[], max_rows=3).generate(requests(), Sampling(max_new_tokens=6))
    assert calls == [3, 2]
    calls.clear()
    several = [Request(prompt=[5, 6], seed=1), Request(prompt=[7, 8], seed=2), Request(prompt=[5, 6], seed=3)]
    Seq2SeqEngine(model, eos_ids=[], max_rows=3).generate(several, Sampling(max_new_tokens=6))
    assert calls == [2]  # a source that is sampled twice too


def test_a_request_samples_the_same_whatever_shares_its_batch(tmp_path: Path) -> None:
    engine = Seq2SeqEngine(load_seq2seq_lm(save_tiny_seq2seq(tmp_path, "bart")), eos_ids=range(30))
    sampling = Sampling(max_new_tokens=10)
    together = engine.generate(requests(), sampling)
    same(together, [engine.generate([request], sampling)[0] for request in requests()])
    assert [list(c.tokens) for c in engine.generate(requests(seed=1), sampling)] != [list(c.tokens) for c in together]


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_logprobs_equal_the_trainers(architecture: str, tmp_path: Path) -> None:
    bias = torch.zeros(257)
    bias[100:200] = -1e9
    policy = Seq2SeqPolicy(
        load_seq2seq_lm(save_tiny_seq2seq(tmp_path, architecture)), trainable=Full(), critic=ValueHead(),
        temperature=0.7, token_bias=bias,
    )  # fmt: skip
    engine = Seq2SeqEngine(policy.engine_model, eos_ids=range(40), token_bias=bias)
    completions = engine.generate(requests(), Sampling(max_new_tokens=8, temperature=0.7))
    assert not any(100 <= token < 200 for c in completions for token in c.tokens)
    output, _, _ = policy.score(pack(PROMPTS, completions, policy.device))
    torch.testing.assert_close(torch.cat([c.logprobs for c in completions]), output.logprobs, atol=1e-4, rtol=0)


def test_stop_strings_and_token_masks_equal_the_plain_loop(tmp_path: Path) -> None:
    path = save_tiny_seq2seq(tmp_path, std=0.05)
    model, tokenizer = load_seq2seq_lm(path), load_tokenizer(path)
    bias = torch.full((257,), -1e9)
    bias[tokenizer("abc", add_special_tokens=False)["input_ids"]] = 0.0
    sampling = Sampling(max_new_tokens=20, stop=("ab", "cc"))
    engine = Seq2SeqEngine(model, eos_ids=[0], token_bias=bias, tokenizer=tokenizer)
    completions = engine.generate(requests(), sampling)
    slow = [plain_loop(model, r, sampling, [0], bias, tokenizer) for r in requests()]
    same(completions, slow)
    assert [c.stop_string for c in completions] == [c.stop_string for c in slow] != [None] * len(slow)
    for c in completions:
        text = decode(tokenizer, c)
        assert set(text) <= set("abc") and "ab" not in text and "cc" not in text


def test_publish_is_a_transaction_that_moves_the_samples(tmp_path: Path) -> None:
    policy = Seq2SeqPolicy(load_seq2seq_lm(save_tiny_seq2seq(tmp_path, "bart")), trainable=Full(), critic=ValueHead())
    engine = Seq2SeqEngine(policy.engine_model, eos_ids=[])
    before = engine.generate(requests(), Sampling(max_new_tokens=8))
    with torch.no_grad():
        for parameter in policy.parameter_groups()[0]["params"]:
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    same(engine.generate(requests(), Sampling(max_new_tokens=8)), before)  # not published: the old weights sample
    engine.begin()
    engine.load(policy.published())
    with pytest.raises(HeelerError, match="middle of a publish"):
        engine.generate(requests(), Sampling(max_new_tokens=8))
    engine.commit(7)
    after = engine.generate(requests(), Sampling(max_new_tokens=8))
    assert after[0].version == 7 and [c.tokens for c in after] != [c.tokens for c in before]
    same(after, Seq2SeqEngine(policy.export_model(), eos_ids=[]).generate(requests(), Sampling(max_new_tokens=8)))

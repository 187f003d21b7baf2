"""The native engine against transformers' generate, and both against the trainer."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heeler.policies.attention import use_fast_attention
from heeler.policies.inputs import TokenInputs
from heeler.policies.language_model import LanguageModelPolicy, LoRA, TopLayers, ValueHead
from heeler.policies.loading import context_length, load_causal_lm, load_tokenizer
from heeler.rollout.engines.batch import PART_TOKENS, similar_lengths
from heeler.rollout.engines.draws import cut, draw_seed, first_beyond, sample
from heeler.rollout.engines.hf import HFEngine
from heeler.rollout.engines.kernels import loaded
from heeler.rollout.engines.native import NativeEngine
from heeler.rollout.engines.packing import Blocks
from heeler.rollout.text import final_states, pack, prompts_of_update, sample_rollout
from heeler.runtime.products import library_for
from heeler.types import Completion, HeelerError, Request, Sampling
from tests.marks import needs_packing
from tests.tiny import ARCHITECTURES, save_tiny_model

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16], [20, 21], [30, 31, 32, 33]]


def requests(seed: int = 0) -> list[Request]:
    return [Request(prompt=prompt, seed=draw_seed(seed, i)) for i, prompt in enumerate(PROMPTS)]


def same(a: list[Completion], b: list[Completion], atol: float = 1e-4) -> None:
    for x, y in zip(a, b, strict=True):
        assert list(x.tokens) == list(y.tokens) and x.finish_reason == y.finish_reason
        torch.testing.assert_close(x.logprobs, y.logprobs, atol=atol, rtol=0)


def model_that_stops(path: str) -> Any:
    """Tilt the output so that ends of sequence are drawn often: rows then leave the batch at different times."""
    model = load_causal_lm(path)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 0.3
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_native_equals_generate(architecture: str, tmp_path: Path) -> None:
    model = model_that_stops(save_tiny_model(tmp_path, architecture))
    eos = list(range(0, 40))
    sampling = Sampling(max_new_tokens=12, temperature=0.9)
    native = NativeEngine(model, eos_ids=eos, max_rows=3).generate(requests(), sampling)
    slow = HFEngine(model, eos_ids=eos).generate(requests(), sampling)
    same(native, slow)
    assert {c.finish_reason for c in native} == {"stop", "length"} or len({len(c.tokens) for c in native}) > 1


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_the_host_may_look_seldom(architecture: str, tmp_path: Path) -> None:
    """Rows that end between two looks go on for nothing: tokens, ends, stop strings and kept states are the same."""
    path = save_tiny_model(tmp_path, architecture)
    many = [Request(prompt=PROMPTS[i % 5], seed=draw_seed(3, i)) for i in range(14)]

    def completions(look_every: int) -> tuple[list[Completion], int]:
        engine = NativeEngine(
            model_that_stops(path), eos_ids=range(16), max_rows=4, trunk_layers=1, final_states=True,
            tokenizer=load_tokenizer(path),
        )  # fmt: skip
        seen = 0

        def count(tokens: int) -> None:
            nonlocal seen
            seen += tokens

        assert engine.look_every == 1
        engine.look_every, engine.on_progress = look_every, count
        done = engine.generate(many, Sampling(max_new_tokens=11, stop=tuple("0123456789abcdefgh")))
        assert seen == sum(len(c.tokens) for c in done)
        return done, len({len(c.tokens) for c in done})

    often, lengths = completions(1)
    assert lengths > 4 and {c.finish_reason for c in often} == {"stop", "length"}
    assert {c.stop_string for c in often} > {None}
    for look_every in (3, 8, 100):
        seldom, _ = completions(look_every)
        same(seldom, often)
        for x, y in zip(seldom, often, strict=True):
            assert x.stop_string == y.stop_string
            for name in ("trunk_states", "final_states"):
                torch.testing.assert_close(getattr(x, name), getattr(y, name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_rows_that_ended_stay_within_the_context(architecture: str, tmp_path: Path) -> None:
    """A row that waits for its pool after its end has no position left in a table of learned ones."""
    path = save_tiny_model(tmp_path, architecture)
    model = model_that_stops(path)
    cap = 10
    context = context_length(model)
    assert context is not None
    prompts = [[5 + i % 90] * (context - cap) for i in range(12)]
    many = [Request(prompt=prompt, seed=draw_seed(3, i)) for i, prompt in enumerate(prompts)]
    alone = [NativeEngine(model, eos_ids=range(40)).generate([r], Sampling(max_new_tokens=cap))[0] for r in many]
    assert len({len(c.tokens) for c in alone}) > 3
    for look_every in (1, 8):
        engine = NativeEngine(model, eos_ids=range(40), max_rows=4)
        engine.look_every = look_every
        same(engine.generate(many, Sampling(max_new_tokens=cap)), alone)


def test_a_request_samples_the_same_whatever_shares_its_batch(tiny_llama: str) -> None:
    engine = NativeEngine(model_that_stops(tiny_llama), eos_ids=range(30))
    sampling = Sampling(max_new_tokens=10)
    together = engine.generate(requests(), sampling)
    alone = [engine.generate([request], sampling)[0] for request in requests()]
    same(together, alone)
    assert [list(c.tokens) for c in engine.generate(requests(seed=1), sampling)] != [list(c.tokens) for c in together]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_token_that_pads_is_read_like_any_other(architecture: str, tmp_path: Path) -> None:
    """Prompts are padded on the left with 0; of these two begin with it, and completions may hold it."""
    engine = NativeEngine(model_that_stops(save_tiny_model(tmp_path, architecture)), eos_ids=range(1, 30))
    prompts = [[0, 0, 7], [9], [0, 11, 0, 13, 14, 15], [20, 0], [30, 31, 32, 33]]
    many = [Request(prompt=prompt, seed=draw_seed(2, i)) for i, prompt in enumerate(prompts)]
    sampling = Sampling(max_new_tokens=10)
    same(engine.generate(many, sampling), [engine.generate([request], sampling)[0] for request in many])


def test_logprobs_and_states_equal_the_trainers(tiny_llama: str) -> None:
    policy = LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=TopLayers(layers=1), critic=ValueHead())
    engine = NativeEngine(
        policy.engine_model, eos_ids=range(40), trunk_layers=policy.num_trunk_layers, final_states=True
    )
    completions = engine.generate(requests(), Sampling(max_new_tokens=8))
    kept = pack(PROMPTS, completions, policy.device)
    assert kept.trunk_states is not None
    output, _, _ = policy.score(kept)
    torch.testing.assert_close(torch.cat([c.logprobs for c in completions]), output.logprobs, atol=1e-4, rtol=0)
    rows = kept.padded()
    states = policy.trunk(input_ids=rows.ids, use_cache=False).last_hidden_state.detach()
    for row, length in enumerate(rows.lengths.tolist()):
        torch.testing.assert_close(rows.states[row, :length], states[row, :length], atol=1e-4, rtol=1e-4)
    final = policy.model.base_model(input_ids=rows.ids, use_cache=False).last_hidden_state.detach()
    drawn_from = final_states(completions, policy.device)
    torch.testing.assert_close(drawn_from, final[rows.rows, rows.columns], atol=1e-4, rtol=1e-4)


def passes_of(engine: Any) -> list[tuple[str, int]]:
    """What the engine did, "read" prompts or "step", and of how many requests, as it comes."""
    seen: list[tuple[str, int]] = []
    read, step = engine._read_part, engine._step

    def watched_read(reader: Any, chosen: list[int], *others: Any) -> Any:
        seen.append(("read", len(chosen)))
        return read(reader, chosen, *others)

    def watched_step(pool: Any, *others: Any) -> None:
        seen.append(("step", len(pool.rows)))
        step(pool, *others)

    engine._read_part, engine._step = watched_read, watched_step
    return seen


def test_finished_rows_leave_the_batch(tiny_llama: str) -> None:
    many = [Request(prompt=[3, 4 + i], seed=i) for i in range(32)]
    engine = NativeEngine(model_that_stops(tiny_llama), eos_ids=range(60))
    passes = passes_of(engine)
    engine.generate(many, Sampling(max_new_tokens=20))
    assert passes[0] == ("read", 32) and passes[-1][1] < 16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_waiting_requests_take_the_rows_of_those_that_ended(architecture: str, tmp_path: Path) -> None:
    """Tokens, log-probabilities and kept states are those of each request alone, whenever it joined and beside whom."""
    policy = LanguageModelPolicy(
        model_that_stops(save_tiny_model(tmp_path, architecture)), trainable=TopLayers(layers=1), critic=ValueHead()
    )
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (40,), generator=generator).tolist()
    many = [
        Request(prompt=torch.randint(0, 250, (n,), generator=generator).tolist(), seed=draw_seed(5, i))
        for i, n in enumerate(lengths)
    ]
    many += [Request(prompt=many[3].prompt, seed=1), Request(prompt=tuple(many[3].prompt), seed=2)]
    engine = NativeEngine(
        policy.engine_model, eos_ids=range(25), max_rows=8, trunk_layers=policy.num_trunk_layers or None,
        final_states=True,
    )  # fmt: skip
    passes = passes_of(engine)
    sampling = Sampling(max_new_tokens=16)
    together = engine.generate(many, sampling)
    reads = [rows for kind, rows in passes if kind == "read"]
    assert max(rows for _, rows in passes) == 8 and len(reads) > 10  # a few at a time, not five batches
    assert len(passes) < 0.8 * (5 * 16) + len(reads)
    for request, completion in zip(many, together, strict=True):
        (alone,) = engine.generate([request], sampling)
        same([completion], [alone])
        torch.testing.assert_close(completion.final_states, alone.final_states, atol=1e-4, rtol=1e-4)
        assert completion.final_states is not None and len(completion.final_states) == len(completion.tokens)
        if engine.keeps_states:
            assert completion.trunk_states is not None and alone.trunk_states is not None
            assert completion.trunk_states.shape[0] == len(request.prompt) + len(completion.tokens) - 1
            torch.testing.assert_close(completion.trunk_states, alone.trunk_states, atol=1e-4, rtol=1e-4)
    assert {c.finish_reason for c in together} == {"stop", "length"}


@pytest.mark.parametrize("library", ["mkl", "onednn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_blocks_are_products(library: str, dtype: torch.dtype, bias: bool) -> None:
    here = library_for(torch.zeros(1, dtype=dtype))
    if here is None or (library == "mkl" and (dtype == torch.bfloat16 or not torch.backends.mkl.is_available())):
        pytest.skip(f"{library} has no packed products of {dtype} here")
    weight, added = torch.randn(96, 40).to(dtype), torch.randn(96).to(dtype) if bias else None
    with mock.patch("heeler.rollout.engines.packing.library_for", return_value=library):
        blocks = Blocks(weight, added, 24)
    for shape in ((24, 40), (24, 1, 40), (4, 6, 40)):
        x = torch.randn(shape).to(dtype)
        expected = torch.nn.functional.linear(x, weight, added)
        torch.testing.assert_close(blocks(x), expected, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=1e-2)


@needs_packing
@pytest.mark.parametrize(
    ("maker", "dtype", "library"),
    [
        ("vendor_id : GenuineIntel", torch.float32, "mkl"),
        ("vendor_id : AuthenticAMD", torch.float32, "onednn"),
        ("vendor_id : GenuineIntel", torch.bfloat16, "onednn"),
        ("vendor_id : AuthenticAMD", torch.float64, None),
    ],
)
def test_whose_blocks(maker: str, dtype: torch.dtype, library: str | None) -> None:
    with (
        mock.patch("heeler.runtime.products._maker", return_value=maker),
        mock.patch("platform.machine", return_value="x86_64"),
        mock.patch("torch.ops.mkldnn._is_mkldnn_bf16_supported", return_value=True),
        mock.patch("torch.backends.mkl.is_available", return_value=True),
    ):
        assert library_for(torch.zeros(1, dtype=dtype)) == library
        assert library_for(torch.zeros(1, dtype=dtype, device="meta")) is None
        with mock.patch("platform.machine", return_value="aarch64"):
            assert library_for(torch.zeros(1, dtype=dtype)) is None


def packed_rows(engine: Any) -> list[int]:
    """The numbers of rows for which the engine's weights are packed, as they come."""
    seen: list[int] = []
    fit = engine.packing.fit

    def watched(rows: int, steps: int) -> None:
        fit(rows, steps)
        seen.append(engine.packing.rows)

    engine.packing.fit = watched
    return seen


@needs_packing
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_weights_sample_the_same(architecture: str, tmp_path: Path) -> None:
    model = model_that_stops(save_tiny_model(tmp_path, architecture))
    many = [Request(prompt=[3, 4 + i], seed=i) for i in range(40)]
    sampling = Sampling(max_new_tokens=20)
    plain = NativeEngine(model, eos_ids=range(25), max_rows=16, pack_weights=False)
    expected = plain.generate(many, sampling)
    assert plain.packing.layers == []
    engine = NativeEngine(model, eos_ids=range(25), max_rows=16)
    rows = packed_rows(engine)
    same(engine.generate(many, sampling), expected)
    assert 16 in rows and len(engine.packing.layers) >= 3 * 4 + 1  # three layers' products and the output's
    assert all(layer.blocks is None for layer in engine.packing.layers)  # nothing is kept


@needs_packing
@pytest.mark.parametrize("library", ["mkl", "onednn"])
def test_packed_rows_leave_together_and_are_packed_anew(tiny_llama: str, library: str) -> None:
    """Where blocks fit one number of rows; where they fit any, they stay, and read the prompts too."""
    if library == "mkl" and not torch.backends.mkl.is_available():
        pytest.skip("this torch has no MKL")
    engine = NativeEngine(model_that_stops(tiny_llama), eos_ids=range(60))
    rows = packed_rows(engine)
    many = [Request(prompt=[3, 4 + i], seed=i) for i in range(32)]
    with mock.patch("heeler.rollout.engines.packing.library_for", return_value=library):
        engine.generate(many, Sampling(max_new_tokens=24))
        sizes = [n for i, n in enumerate(rows) if n and (i == 0 or rows[i - 1] != n)]
        assert 24 < sizes[0] <= 32 and all(b <= 0.75 * a for a, b in pairwise(sizes))
        assert (len(sizes) > 1) == (library == "mkl")
        rows.clear()
        engine.generate(many, Sampling(max_new_tokens=5))
    assert not any(rows)  # too few steps to be worth it


@needs_packing
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_blocks_of_an_interrupted_run_are_not_used_again(architecture: str, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, architecture)
    engine = NativeEngine(load_causal_lm(path), eos_ids=[])
    rows = packed_rows(engine)
    many = [Request(prompt=[3, 4 + i], seed=i) for i in range(4)]
    steps = 0

    def interrupt(_: int) -> None:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise KeyboardInterrupt

    engine.on_progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.generate(many, Sampling(max_new_tokens=12))
    assert rows[-1] == 4 and engine.packing.rows == 0
    engine.on_progress = None
    engine.begin()
    generator = torch.Generator().manual_seed(3)
    engine.load([(n, torch.randn(p.shape, generator=generator)) for n, p in engine.model.named_parameters()])
    engine.commit(1)
    fresh = NativeEngine(load_causal_lm(path), eos_ids=[], pack_weights=False)
    fresh.begin()
    fresh.load(engine.model.named_parameters())
    fresh.commit(1)
    sampling = Sampling(max_new_tokens=12)
    same(engine.generate(many, sampling), fresh.generate(many, sampling), atol=1e-3)


def test_prompts_of_similar_lengths_are_read_together() -> None:
    def tokens(lengths: list[int]) -> tuple[list[list[int]], int, int]:
        prompts = [[i] * n for i, n in enumerate(lengths)]
        parts = [prompts[part] for part in similar_lengths(prompts)]
        assert [p for part in reversed(parts) for p in part] == prompts
        return [list(map(len, part)) for part in parts], sum(len(p) * max(map(len, p)) for p in parts), len(parts)

    assert tokens([10] * 64)[2] == 1 and tokens([8] * 32 + [14] * 32)[2] == 1  # too few tokens to split
    spread = list(range(5, 200, 2))
    parts, places, _ = tokens(spread)
    assert len(parts) > 3 and places < 1.25 * sum(spread) < len(spread) * 199
    assert all(sum(part) >= PART_TOKENS for part in parts)
    samples = [[i] * 10 for i in range(60) for _ in range(4)]
    for longest, expected in (([[99] * 300] * 3, [243]), ([[99] * 600] * 3, [3, 240])):  # a prompt counts once
        assert [part.stop - part.start for part in similar_lengths(samples + longest)] == expected


@pytest.mark.parametrize("trunk", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_parts_of_a_batch_sample_as_each_prompt_alone(
    architecture: str, tmp_path: Path, trunk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heeler.rollout.engines.batch.PART_TOKENS", 8)
    monkeypatch.setattr("heeler.rollout.engines.slots.PASS_TOKENS", 8)
    model = model_that_stops(save_tiny_model(tmp_path, architecture))
    policy = LanguageModelPolicy(model, trainable=TopLayers(layers=1), critic=ValueHead())
    options: dict[str, Any] = {"trunk_layers": policy.num_trunk_layers} if trunk else {}
    engine = NativeEngine(policy.engine_model, eos_ids=range(25), final_states=trunk, **options)
    many = [Request(prompt=list(range(3, 3 + n)), seed=n) for n in (1, 1, 2, 3, 5, 8, 8, 13, 21, 30)]
    sampling = Sampling(max_new_tokens=12)
    for request, completion in zip(many, engine.generate(many, sampling), strict=True):
        (alone,) = engine.generate([request], sampling)
        same([completion], [alone])
        for name in ("trunk_states", "final_states") if trunk else ():
            torch.testing.assert_close(getattr(completion, name), getattr(alone, name), atol=1e-4, rtol=1e-4)


def test_models_with_windows_sample_one_batch_after_the_other() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=6, pad_token_id=None,
    )  # fmt: skip
    engine = NativeEngine(transformers.MistralForCausalLM(config).eval(), eos_ids=range(60), max_rows=4)
    many = [Request(prompt=list(range(3, 5 + i)), seed=i) for i in range(11)]
    sampling = Sampling(max_new_tokens=12)
    for request, completion in zip(many, engine.generate(many, sampling), strict=True):
        same([completion], engine.generate([request], sampling))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_of_several_samples_is_read_once(architecture: str, tmp_path: Path) -> None:
    policy = LanguageModelPolicy(
        model_that_stops(save_tiny_model(tmp_path, architecture)), trainable=TopLayers(layers=1), critic=ValueHead()
    )
    shapes: list[tuple[int, int]] = []
    policy.engine_model.register_forward_pre_hook(
        lambda m, a, kw: shapes.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    engine = NativeEngine(policy.engine_model, eos_ids=range(40), trunk_layers=policy.num_trunk_layers or None)
    sampling = Sampling(max_new_tokens=8)
    groups = [Request(prompt=p, seed=draw_seed(3, i, s)) for s in range(3) for i, p in enumerate(PROMPTS)]
    together = engine.generate(groups, sampling)
    assert shapes[0] == (5, 6) and shapes[1][1] == 1 and shapes[1][0] > 5
    for request, completion in zip(groups, together, strict=True):
        (alone,) = engine.generate([request], sampling)
        same([completion], [alone])
        if alone.trunk_states is not None:
            torch.testing.assert_close(completion.trunk_states, alone.trunk_states, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernels", ["on", "off"])
def test_samples_of_one_prompt_go_on_from_copies_of_its_keys(
    kernels: str, tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the step that is written out, with fewer slots than requests."""
    monkeypatch.setenv("HEELER_KERNELS", kernels)
    loaded.cache_clear()
    model = model_that_stops(tiny_llama)
    use_fast_attention(model)
    groups = [Request(prompt=p, seed=draw_seed(3, i, s)) for i, p in enumerate(PROMPTS) for s in range(6)]
    engine = NativeEngine(model, eos_ids=range(30), max_rows=7, trunk_layers=1)
    sampling = Sampling(max_new_tokens=10)
    together = engine.generate(groups, sampling)
    assert engine.decoder is not None
    for request, completion in zip(groups, together, strict=True):
        (alone,) = engine.generate([request], sampling)
        same([completion], [alone])
        torch.testing.assert_close(completion.trunk_states, alone.trunk_states, atol=1e-4, rtol=1e-4)
    monkeypatch.undo()
    loaded.cache_clear()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_prompt_without_tokens_is_refused(architecture: str, tmp_path: Path) -> None:
    engine = NativeEngine(load_causal_lm(save_tiny_model(tmp_path, architecture)), eos_ids=[])
    with pytest.raises(HeelerError, match="request 2 has a prompt without tokens"):
        engine.generate([Request(prompt=[3], seed=0), Request(prompt=[], seed=1)], Sampling(max_new_tokens=2))


def test_publish_is_a_transaction_that_moves_the_samples(tiny_llama: str) -> None:
    policy = LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=TopLayers(layers=1), critic=ValueHead())
    engine = NativeEngine(policy.engine_model, eos_ids=[])
    before = engine.generate(requests(), Sampling(max_new_tokens=8))
    with torch.no_grad():
        for parameter in policy.parameter_groups()[0]["params"]:
            parameter += 0.1
    same(engine.generate(requests(), Sampling(max_new_tokens=8)), before)  # not published: the old weights sample
    engine.begin()
    engine.load(policy.published())
    with pytest.raises(HeelerError, match="middle of a publish"):
        engine.generate(requests(), Sampling(max_new_tokens=8))
    engine.commit(7)
    after = engine.generate(requests(), Sampling(max_new_tokens=8))
    assert after[0].version == 7
    same(after, NativeEngine(policy.export_model(), eos_ids=[]).generate(requests(), Sampling(max_new_tokens=8)))
    assert any(not torch.allclose(a.logprobs[:1], b.logprobs[:1]) for a, b in zip(after, before, strict=True))


def test_adapters_reach_the_engine(tiny_llama: str) -> None:
    """Published as whole weights: the engine's log-probabilities are the adapted policy's, and were not before."""
    policy = LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=LoRA(rank=2), critic=ValueHead())
    engine = NativeEngine(policy.engine_model, eos_ids=[])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameter_groups()[0]["params"]:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    for published in (False, True):
        if published:
            engine.begin()
            engine.load(policy.published())
            engine.commit(1)
        completions = engine.generate(requests(), Sampling(max_new_tokens=8))
        trained = policy.score(pack(PROMPTS, completions, policy.device))[0].logprobs
        gap = float((torch.cat([c.logprobs for c in completions]) - trained).abs().mean())
        assert gap < 1e-4 if published else gap > 1e-2


def test_the_tokens_that_were_drawn_are_kept_whatever_their_text_says(tiny_llama: str) -> None:
    """Halves of a character: their text, read again, would be other tokens."""
    from heeler.data.prompts import load_prompts

    tokenizer = load_tokenizer(tiny_llama)
    half = tokenizer("é", add_special_tokens=False)["input_ids"][0]
    drawn = [half, half, 5]

    class Halves:
        def generate(self, requests: Any, sampling: Any) -> list[Completion]:
            logprobs = torch.zeros(3)
            return [Completion(tokens=drawn, logprobs=logprobs, finish_reason="length", version=0) for _ in requests]

    engine: Any = Halves()
    prompts = load_prompts(["ab", "c"], tokenizer, max_tokens=None)
    rollout = sample_rollout(
        engine, tokenizer, prompts, [0, 1], [0, 0], [1, 2], Sampling(max_new_tokens=3), torch.device("cpu")
    )
    assert tokenizer(rollout.completions[0], add_special_tokens=False)["input_ids"] != drawn
    assert rollout.actions.tolist() == 2 * drawn
    assert isinstance(rollout.inputs, TokenInputs)
    assert rollout.inputs.tokens[rollout.inputs.is_decision].tolist() == 2 * drawn


def test_unknown_weights_are_refused(tiny_llama: str) -> None:
    engine = NativeEngine(load_causal_lm(tiny_llama), eos_ids=[])
    with pytest.raises(HeelerError, match="outside a publish"):
        engine.load([("model.norm.weight", torch.ones(32))])
    engine.begin()
    with pytest.raises(HeelerError, match="no weight nonsense"):
        engine.load([("nonsense", torch.ones(1))])


def test_the_draw_follows_the_distribution() -> None:
    """Pearson's statistic of 20,000 draws over 6 tokens, and no draw of an impossible token."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, -torch.inf])
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = sample(logits.expand(20_000, 6), u, Sampling())
    expected = logits.softmax(-1)[:5] * 20_000
    counts = torch.bincount(tokens, minlength=6)
    assert int(counts[5]) == 0
    assert float(((counts[:5] - expected) ** 2 / expected).sum()) < 18.5  # 0.1 % quantile at 4 degrees of freedom
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[tokens])


@given(st.integers(1, 700), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_the_first_beyond_is_that_of_a_plain_loop(columns: int, seed: int) -> None:
    """Whole numbers, so that no sum is rounded; most of them 0, which must never be chosen."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(-6, 4, (5, columns), generator=generator).clamp_(min=0).float()
    weights[:, torch.randint(columns, (1,), generator=generator)] = 1.0
    whole = weights.sum(1, keepdim=True)
    u = torch.randint(2**10, (5, 1), generator=generator) / 2**10
    found, total = first_beyond(weights, u)
    assert torch.equal(total, whole)
    for row, numbers in enumerate(weights.tolist()):
        reached, at = 0.0, -1
        while reached <= float(u[row] * whole[row]):
            at += 1
            reached += numbers[at]
        assert int(found[row]) == at


def test_rounding_never_draws_what_cannot_be_drawn() -> None:
    """Sums of blocks and running sums round differently; the largest u must still find a token of weight."""
    weights = torch.rand(400, 3000, generator=torch.Generator().manual_seed(0)) ** 8
    weights[:, ::256] = weights[:, 255::256] = weights[:, -5:] = 0.0
    edges = weights[:, : 256 * 4].double().sum(1, keepdim=True) / weights.double().sum(1, keepdim=True)
    for u in (torch.zeros(400, 1), edges.float(), torch.full((400, 1), 1 - 2**-24), torch.ones(400, 1)):
        found, _ = first_beyond(weights, u)
        assert bool((weights.gather(1, found) > 0).all())


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.7), (5, 0.6), (0, 1e-6), (1, 1.0), (99, 1.0)])
def test_top_k_and_top_p_are_those_of_transformers(top_k: int, top_p: float) -> None:
    """The same support, the probabilities of the draws are renormalised over it, and nothing outside is drawn."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(7, 40, generator=torch.Generator().manual_seed(1)) * 2
    expected = logits / 0.8
    if 0 < top_k:
        expected = TopKLogitsWarper(top_k)(torch.zeros(0), expected)  # pyright: ignore
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(torch.zeros(0), expected)  # pyright: ignore
    torch.testing.assert_close(cut(logits / 0.8, top_k, top_p), expected)
    rows, u = logits.repeat_interleave(50, 0), torch.linspace(0, 1 - 2**-24, 50).repeat(7)
    tokens, logprobs = sample(rows, u, Sampling(temperature=0.8, top_k=top_k, top_p=top_p))
    wanted = expected.log_softmax(-1).repeat_interleave(50, 0).gather(1, tokens[:, None])[:, 0]
    assert torch.isfinite(logprobs).all()
    torch.testing.assert_close(logprobs, wanted)


def test_engines_draw_from_the_cut_distribution_alike(tiny_llama: str) -> None:
    sampling = Sampling(max_new_tokens=12, top_k=9, top_p=0.8)
    reference = HFEngine(load_causal_lm(tiny_llama), eos_ids=[]).generate(requests(), sampling)
    same(NativeEngine(load_causal_lm(tiny_llama), eos_ids=[]).generate(requests(), sampling), reference)
    full = NativeEngine(load_causal_lm(tiny_llama), eos_ids=[]).generate(requests(), Sampling(max_new_tokens=12))
    assert [c.tokens for c in full] != [c.tokens for c in reference]


def test_updates_walk_through_every_prompt_once_an_epoch() -> None:
    seen = [p for step in range(5) for p in prompts_of_update(10, 4, step, seed=3)]
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_a_prompt_that_repeats_in_an_update_is_sampled_anew(tiny_llama: str) -> None:
    from heeler.data.prompts import load_prompts
    from heeler.policies.loading import load_tokenizer
    from heeler.rollout.text import TextCollector
    from heeler.runtime.reduce import LocalReduce

    tokenizer = load_tokenizer(tiny_llama)
    collector = TextCollector(
        NativeEngine(load_causal_lm(tiny_llama), eos_ids=[]),
        tokenizer,
        load_prompts(["a"], tokenizer, max_tokens=None),
        Sampling(max_new_tokens=12),
        prompts_per_update=4,
        samples_per_prompt=2,
        seed=0,
        reduce=LocalReduce(),
        device=torch.device("cpu"),
    )
    rollout = collector.collect(0)
    assert rollout.sample_ids.tolist() == list(range(8))
    assert len({tuple(row.tolist()) for row in rollout.actions.reshape(8, 12)}) == 8
    assert torch.equal(collector.collect(0).actions, rollout.actions)
    assert not torch.equal(collector.collect(1).actions, rollout.actions)


def test_the_reference_engine_attends_as_transformers_does(tiny_llama: str) -> None:
    model = load_causal_lm(tiny_llama)
    use_fast_attention(model)
    with mock.patch("heeler.policies.attention.short_rows") as ours:
        HFEngine(model, eos_ids=[]).generate([Request(prompt=[3, 4], seed=0)], Sampling(max_new_tokens=2))
    assert not ours.called

"""The decoding step that is written out, against the models themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from heeler.policies.attention import use_fast_attention
from heeler.policies.loading import load_causal_lm
from heeler.rollout.engines.decoder import Decoder, can_decode
from heeler.rollout.engines.hf import HFEngine
from heeler.rollout.engines.native import NativeEngine
from heeler.rollout.engines.packing import can_pack
from heeler.rollout.engines.plain import Plain, Tokens
from heeler.rollout.engines.slots import Slots
from heeler.types import Request, Sampling
from tests.marks import needs_packing
from tests.tiny import save_tiny_model

CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


def random_model(family: str, *, seed: int = 0, **options: Any) -> Any:
    """Every weight random, biases and norms too."""
    own = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 16}}.get(family, {})
    sizes = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "max_position_embeddings": 512}
    depth = {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "pad_token_id": None}
    config = CONFIGS[family](**{**sizes, **depth, **own, **options})
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    use_fast_attention(model)
    return model


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in CONFIGS},
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 0.1}),
    "a key for every head": ("llama", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "rotation of Llama 3": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }}),
    "rotation by yarn": ("qwen2", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
    }}),
}  # fmt: skip


def decoder_of(model: Any, compiled: bool) -> Decoder:
    decoder = Decoder(model, trunk_layers=2)
    if not compiled:
        decoder.between = Plain()
    return decoder


def tokens_of(ids: Any, lengths: list[int], at: Any) -> Tokens:
    """Prompts `ids` of these lengths in the rows `at`."""
    positions = torch.cat([torch.arange(n) for n in lengths])
    rows = torch.as_tensor(at, dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    return Tokens(
        torch.cat([row[:n] for row, n in zip(ids, lengths, strict=True)]), positions, rows, max(lengths), lengths
    )


def both_ways(model: Any, equal: bool, packed: bool, steps: int, compiled: bool = True) -> Iterator[tuple[Any, Any]]:
    """`(the decoder's, the model's)` logits, states after two layers and final states, token by token."""
    step = decoder_of(model, compiled)
    rows, longest = 12, 7
    generator = torch.Generator().manual_seed(1)
    lengths = [longest if equal else 1 + i % longest for i in range(rows)]
    ids = torch.randint(0, 101, (rows, longest + steps), generator=generator)
    places = torch.randperm(15, generator=generator)[:rows] if step.compiled else torch.arange(rows)
    slots = step.slots(15, longest + steps)
    theirs = model(input_ids=ids, output_hidden_states=True)
    step(tokens_of(ids, lengths, places), slots)
    if packed:
        assert len(step.products) == 4 * 3 + 1
        for product in step.products:
            product.pack(rows)
    everyone = torch.arange(rows)
    for at in range(steps):
        positions = torch.tensor(lengths) + at
        taken = Tokens(ids[everyone, positions], positions, places.int(), longest + at + 1, equal=equal)
        found = theirs.logits, theirs.hidden_states[2], theirs.hidden_states[-1]
        yield step(taken, slots), tuple(whole[everyone, positions] for whole in found)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=needs_packing)], ids=["plain", "packed"])
@pytest.mark.parametrize("equal", [False, True], ids=["of any lengths", "equal"])
@pytest.mark.parametrize("compiled", [False, True], ids=["by torch", "compiled"])
def test_a_step_is_that_of_the_model(variant: str, packed: bool, equal: bool, compiled: bool) -> None:
    """Logits, and the states after the trunk and at the end, 150 tokens on."""
    family, options = VARIANTS[variant]
    for mine, theirs in both_ways(random_model(family, **options), equal, packed, steps=150, compiled=compiled):
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("compiled", [False, True], ids=["by torch", "compiled"])
def test_prompts_are_read_as_by_the_model(variant: str, compiled: bool) -> None:
    """Logits, states, and the keys and values of every token."""
    family, options = VARIANTS[variant]
    model = random_model(family, **options)
    for lengths in ([1, 2, 2, 5, 5, 5, 9, 20], [4] * 6, [6, 3, 6, 1]):
        count = len(lengths)
        ids = torch.randint(0, 101, (count, max(lengths)))
        theirs = model(input_ids=ids, output_hidden_states=True, use_cache=True)
        decoder = decoder_of(model, compiled)
        slots = decoder.slots(count + 3, max(lengths) + 2)
        places = slots.take(count)
        logits, trunk, final = decoder(tokens_of(ids, lengths, places), slots)
        ends = torch.arange(count), torch.tensor(lengths) - 1
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        assert trunk is not None
        pairs = [
            (logits, theirs.logits[ends]),
            (final, theirs.hidden_states[-1][ends]),
            (trunk, theirs.hidden_states[2][real]),
        ]
        for number, layer in enumerate(theirs.past_key_values.layers):
            for mine, other in ((slots.keys, layer.keys), (slots.values, layer.values)):
                written = mine[number][places, :, : max(lengths)].transpose(1, 2)
                pairs.append((written[real], other.transpose(1, 2)[real]))
        for mine, other in pairs:
            torch.testing.assert_close(mine, other, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("anywhere", [False, True])
def test_slots_are_taken_and_given_back(anywhere: bool) -> None:
    """Rows stay where they are, or move together; what is free is what nobody holds."""
    slots = Slots(2, 6, 1, 4, 3, like=torch.zeros(1), anywhere=anywhere)
    places = slots.take(5)
    for whole in (slots.keys, slots.values):
        whole.copy_(torch.arange(6.0).view(1, 6, 1, 1, 1).expand(whole.shape))
    stay = torch.tensor([1, 3, 4])
    kept = slots.keep(places, stay, 2)
    assert kept.tolist() == ([1, 3, 4] if anywhere else [0, 1, 2])
    for whole in (slots.keys, slots.values):
        assert bool((whole[:, kept, :, :2] == torch.tensor([1.0, 3.0, 4.0]).view(1, 3, 1, 1, 1)).all())
    assert sorted(slots.free) == sorted({*range(6)} - {*kept.tolist()})
    assert sorted([*kept.tolist(), *slots.take(3).tolist()]) == list(range(6)) and not slots.free


@torch.no_grad()
def test_bf16_is_as_near_as_the_models_own() -> None:
    exact = [theirs[0] for _, theirs in both_ways(random_model("qwen3"), False, False, steps=30)]
    rough = random_model("qwen3").to(torch.bfloat16)
    off = [0.0, 0.0]
    for whole, ways in zip(exact, both_ways(rough, False, False, steps=30), strict=True):
        for way, (logits, _, _) in enumerate(ways):
            assert logits.dtype == torch.bfloat16
            off[way] += float((logits - whole).abs().mean())
    assert 0 < off[0] < 1.3 * off[1]


def test_the_engine_samples_in_bf16() -> None:
    engine = NativeEngine(random_model("llama").to(torch.bfloat16), eos_ids=[])
    requests = [Request(prompt=[3 + i, 4], seed=i) for i in range(6)]
    done = engine.generate(requests, Sampling(max_new_tokens=20))
    assert engine.decoder is not None
    assert bool(engine.packing.layers) == can_pack(torch.zeros(1, dtype=torch.bfloat16))
    assert all(len(c.tokens) == 20 and bool(torch.isfinite(c.logprobs).all()) for c in done)


def test_which_models_it_is_written_for(tiny_llama: str, tmp_path: Any) -> None:
    assert all(can_decode(random_model(family)) for family in CONFIGS)
    assert can_decode(random_model("llama", attention_bias=True, mlp_bias=True))
    assert not can_decode(random_model("mistral", sliding_window=6))
    assert not can_decode(load_causal_lm(tiny_llama))  # before its attention is ours
    for other in ("gpt2", "gpt_neox"):
        model = load_causal_lm(save_tiny_model(tmp_path / other, other))
        use_fast_attention(model)
        assert not can_decode(model)

    class Own(torch.nn.Module):
        """Somebody's norm, activation, or quantised layer."""

    for part in ("mlp.up_proj", "mlp.act_fn", "self_attn.q_proj", "input_layernorm"):
        changed = random_model("llama")
        changed.model.layers[1].set_submodule(part, Own())
        assert not can_decode(changed), part

    class Derived(transformers.LlamaForCausalLM):
        pass

    derived = random_model("llama")
    derived.__class__ = Derived
    assert not can_decode(derived)


def test_adapters_inside_the_model_are_not_forgotten() -> None:
    """They may be put in after the engine was made: what is sampled is the whole model's."""
    import peft

    torch.manual_seed(0)
    model = random_model("llama")
    engine = NativeEngine(model, eos_ids=[])
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=4)
    peft.inject_adapter_in_model(config, model)
    sampling = Sampling(max_new_tokens=8)
    requests = [Request(prompt=[3 + i, 4], seed=i) for i in range(4)]
    done = engine.generate(requests, sampling)
    slow = HFEngine(model, eos_ids=[]).generate(requests, sampling)
    for a, b in zip(done, slow, strict=True):
        assert list(a.tokens) == list(b.tokens)
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("way", ["hook", "pre-hook", "hook on all", "forward"])
def test_whoever_looks_into_the_model_sees_every_pass(way: str) -> None:
    """A hook on a module is called at every step, and takes part in what is sampled."""
    requests = [Request(prompt=[3 + i, 4], seed=i) for i in range(6)]
    plain = NativeEngine(random_model("llama"), eos_ids=[], final_states=True, trunk_layers=1)
    expected = plain.generate(requests, Sampling(max_new_tokens=12))
    assert plain.decoder is not None
    engine = NativeEngine(random_model("llama"), eos_ids=[], final_states=True, trunk_layers=1)
    module, seen, handle = engine.model.model.layers[1].mlp, 0, None

    def look(*_: Any) -> None:
        nonlocal seen
        seen += 1

    if way == "hook":
        module.register_forward_hook(look)
    elif way == "pre-hook":
        module.register_forward_pre_hook(look)
    elif way == "hook on all":
        handle = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: look() if m is module else None)
    else:
        forward = module.forward
        module.forward = lambda x: look() or forward(x)
    found = engine.generate(requests, Sampling(max_new_tokens=12))
    if handle is not None:
        handle.remove()
    assert seen == 12
    for a, b in zip(found, expected, strict=True):
        assert list(a.tokens) == list(b.tokens)
        assert a.final_states is not None and b.final_states is not None
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-4, rtol=0)
        torch.testing.assert_close(a.final_states, b.final_states, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(a.trunk_states, b.trunk_states, atol=1e-3, rtol=1e-3)

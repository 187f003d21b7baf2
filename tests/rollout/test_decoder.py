"""The decoding step that is written out, against the models themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from heeler.policies.loading import load_causal_lm
from heeler.rollout.engines.attention import use_grouped_attention
from heeler.rollout.engines.buffers import make_cache
from heeler.rollout.engines.decoder import Decoder, can_decode
from heeler.rollout.engines.native import NativeEngine
from heeler.types import Request, Sampling
from tests.tiny import save_tiny_model

CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


def random_model(family: str, *, seed: int = 0, **options: Any) -> Any:
    """Every weight random, biases and norms too."""
    config = CONFIGS[family](
        vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=None,
        **({"sliding_window": None} if family == "mistral" else {"head_dim": 16} if family == "qwen3" else {})
        | options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    use_grouped_attention(model)
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("padded", [False, True], ids=["equal", "padded"])
def test_a_step_is_that_of_the_model(family: str, packed: bool, padded: bool) -> None:
    """Logits, and the states after the trunk and at the end, 150 tokens on."""
    model = random_model(family)
    step = Decoder(model, trunk_layers=2)
    rows, prompt, steps = 12, 7, 150
    ids = torch.randint(0, 101, (rows, prompt + steps))
    begins = torch.arange(rows) % prompt if padded else torch.zeros(rows, dtype=torch.long)
    if padded:  # the last rows begin late, as those that joined
        begins[-4:] = 6
    seen = torch.arange(prompt + steps) >= begins[:, None]
    positions = (torch.arange(prompt + steps) - begins[:, None]).clamp(min=0)
    caches = [make_cache(model.config, prompt + steps) for _ in range(2)]
    for cache in caches:
        read = {"attention_mask": seen[:, :prompt].long(), "position_ids": positions[:, :prompt]}
        model(input_ids=ids[:, :prompt], past_key_values=cache, **read)
    if packed:
        for product in step.products:
            product.pack(rows)
    for at in range(prompt, prompt + steps):
        mask = seen[:, : at + 1].long() if padded else None
        theirs = model(
            input_ids=ids[:, at : at + 1], past_key_values=caches[0], attention_mask=mask,
            position_ids=positions[:, at : at + 1], output_hidden_states=True,
        )  # fmt: skip
        logits, trunk, final = step(ids[:, at : at + 1], positions[:, at : at + 1], mask, caches[1])
        for mine, other in (
            (logits, theirs.logits[:, 0]),
            (trunk, theirs.hidden_states[2]),
            (final, theirs.hidden_states[-1]),
        ):
            torch.testing.assert_close(mine, other, atol=2e-3, rtol=1e-3)
    assert caches[1].get_seq_length() == prompt + steps


@torch.no_grad()
def test_bf16_is_as_near_as_the_models_own() -> None:
    exact, rough = random_model("qwen3"), random_model("qwen3").to(torch.bfloat16)
    ids, positions = torch.randint(0, 101, (8, 1)), torch.zeros(8, 1, dtype=torch.long)
    whole = exact(input_ids=ids).logits[:, 0]
    theirs = (rough(input_ids=ids).logits[:, 0] - whole).abs().mean()
    logits, _, _ = Decoder(rough)(ids, positions, None, make_cache(rough.config, 1))
    assert logits.dtype == torch.bfloat16 and float((logits - whole).abs().mean()) < 1.3 * float(theirs)


def test_which_models_it_is_written_for(tiny_llama: str, tmp_path: Any) -> None:
    assert all(can_decode(random_model(family)) for family in CONFIGS)
    assert can_decode(random_model("llama", attention_bias=True, mlp_bias=True))
    assert not can_decode(random_model("mistral", sliding_window=6))
    assert not can_decode(load_causal_lm(tiny_llama))  # before its attention is the grouped one
    for other in ("gpt2", "gpt_neox"):
        model = load_causal_lm(save_tiny_model(tmp_path / other, other))
        use_grouped_attention(model)
        assert not can_decode(model)
    changed = random_model("llama")

    class Quantised(torch.nn.Linear):
        pass

    changed.model.layers[1].mlp.up_proj.__class__ = Quantised
    assert not can_decode(changed)

    class Own(transformers.LlamaForCausalLM):
        pass

    derived = random_model("llama")
    derived.__class__ = Own
    assert not can_decode(derived)


@pytest.mark.parametrize("way", ["hook", "pre-hook", "forward"])
def test_whoever_looks_into_the_model_sees_every_pass(way: str) -> None:
    """A hook on a module is called at every step, and takes part in what is sampled."""
    requests = [Request(prompt=[3 + i, 4], seed=i) for i in range(6)]
    plain = NativeEngine(random_model("llama"), eos_ids=[], final_states=True, trunk_layers=1)
    expected = plain.generate(requests, Sampling(max_new_tokens=12))
    assert plain._written_out
    engine = NativeEngine(random_model("llama"), eos_ids=[], final_states=True, trunk_layers=1)
    module, seen = engine.model.model.layers[1].mlp, 0

    def look(*_: Any) -> None:
        nonlocal seen
        seen += 1

    if way == "hook":
        module.register_forward_hook(look)
    elif way == "pre-hook":
        module.register_forward_pre_hook(look)
    else:
        forward = module.forward
        module.forward = lambda x: look() or forward(x)
    found = engine.generate(requests, Sampling(max_new_tokens=12))
    assert seen == 12
    for a, b in zip(found, expected, strict=True):
        assert list(a.tokens) == list(b.tokens)
        assert a.final_states is not None and b.final_states is not None
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-4, rtol=0)
        torch.testing.assert_close(a.final_states, b.final_states, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(a.trunk_states, b.trunk_states, atol=1e-3, rtol=1e-3)

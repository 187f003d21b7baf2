"""The written-out layers against transformers and autograd: the slow twin is the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from heeler.policies import language_model
from heeler.policies.attention import SHORT, use_fast_attention
from heeler.policies.checkpointing import checkpoint_layers
from heeler.policies.inputs import TokenInputs
from heeler.policies.language_model import Full, LanguageModelPolicy, LoRA, TopLayers, ValueHead
from heeler.policies.llama import can_write_out, run_layers
from heeler.policies.loading import load_causal_lm
from tests.tiny import save_tiny_model

KINDS = ("llama", "mistral", "qwen2", "qwen3", "biased")


def body_of(kind: str, dtype: torch.dtype = torch.float32, layers: int = 2, std: float = 0.3, **changes: Any) -> Any:
    """A decoder stack with random weights; every norm and bias has numbers of its own."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 256, "sliding_window": None,
    } | changes  # fmt: skip
    if kind == "biased":
        config: Any = transformers.LlamaConfig(**sizes, attention_bias=True)
    elif kind == "qwen3":
        config = transformers.Qwen3Config(**sizes, head_dim=16)
    else:
        config = {
            "llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig, "qwen2": transformers.Qwen2Config,
        }[kind](**sizes)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).eval()
    use_fast_attention(model)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=std)
    return model.base_model


def with_all_digits(body: Any) -> Any:
    """transformers' norms compute in float32 whatever they are given; here in what they are given."""

    def exact(norm: Any) -> Any:
        return lambda x: norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()

    for module in body.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = exact(module)
    return body


def shared_rows(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """`(mask, positions)` of rows in which two sequences go on behind one beginning, as in `TokenInputs.shared`."""
    half = length // 3
    branch = torch.tensor([0] * half + [1] * half + [2] * (length - 2 * half))
    sees = ((branch[None] == 0) | (branch[:, None] == branch[None])).tril()
    positions = torch.cat([torch.arange(half), torch.arange(half, 2 * half), torch.arange(half, length - half)])
    return sees.expand(batch, 1, -1, -1), positions.expand(batch, -1)


def both_ways(body: Any, x: Tensor, mask: Tensor | None, positions: Tensor | None) -> list[dict[str, Tensor]]:
    """Final states and the gradients of a random function of them, by transformers and written out."""
    results: list[dict[str, Tensor]] = []
    for written in (False, True):
        body.zero_grad()
        given = x.clone()
        if x.is_floating_point():
            given.requires_grad_()
        if written:
            states = run_layers(body, given, positions, mask)
        else:
            name = "inputs_embeds" if x.is_floating_point() else "input_ids"
            apart = {} if mask is None else {"attention_mask": mask, "position_ids": positions}
            states = body(**{name: given}, **apart, use_cache=False).last_hidden_state
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).to(states.dtype)
        (states * weights).sum().backward()
        found = {n: p.grad.clone() for n, p in body.named_parameters() if p.grad is not None}
        if given.grad is not None:
            found["the input"] = given.grad
        results.append({"states": states.detach(), **found})
    return results


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True])
def test_states_and_gradients_are_those_of_transformers(kind: str, shared: bool) -> None:
    """In float64, in rows so long that attention is torch's own in both: nothing but the order of sums may differ."""
    body, length = body_of(kind, torch.float64), SHORT + 9
    assert can_write_out(body)
    with_all_digits(body)
    x = torch.randint(60, (2, length), generator=torch.Generator().manual_seed(2))
    mask, positions = shared_rows(2, length) if shared else (None, None)
    theirs, ours = both_ways(body, x, mask, positions)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_short_rows_from_hidden_states(
    kind: str, shared: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr("heeler.policies.layer_parts.kernels_of_layers", lambda x, compute: None)
    body = body_of(kind, num_attention_heads=2, num_key_value_heads=1)  # 16 wide
    x = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(2))
    mask, positions = shared_rows(3, 12) if shared else (None, None)
    theirs, ours = both_ways(body, x, mask, positions)
    assert ours.keys() == theirs.keys() and "the input" in ours
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-4, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_bf16_is_as_near_to_float64_as_autocast() -> None:
    body = body_of("llama", layers=4, std=0.1)
    x = torch.randint(60, (4, 20), generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = both_ways(body, x, None, None)
    exact = both_ways(with_all_digits(body.double()), x, None, None)[0]

    def off(found: dict[str, Tensor], names: list[str]) -> float:
        apart = sum(float((found[n].double() - exact[n]).square().sum()) for n in names)
        return (apart / sum(float(exact[n].square().sum()) for n in names)) ** 0.5

    for names in (["states"], [n for n in exact if n != "states"]):
        assert off(ours, names) < 1.2 * off(theirs, names) < 0.1


def test_frozen_weights_get_no_gradient_and_no_layer_below_is_read_backwards() -> None:
    body = body_of("llama", layers=3).requires_grad_(False)
    body.layers[2].requires_grad_(True)
    x = torch.randn(2, 10, 32)
    run_layers(body, x, None, None).sum().backward()
    assert {n.split(".")[1] for n, p in body.named_parameters() if p.grad is not None} == {"2"}
    body.layers[1].requires_grad_(True)
    body.layers[2].requires_grad_(False)  # the gradient passes through it
    body.zero_grad()
    run_layers(body, x, None, None).sum().backward()
    assert {n.split(".")[1] for n, p in body.named_parameters() if p.grad is not None} == {"1"}


def kept_bytes(body: Any, x: Tensor, written: bool) -> int:
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf or not tensor.requires_grad:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        states = run_layers(body, x, None, None) if written else body(inputs_embeds=x, use_cache=False)[0]
        assert states.requires_grad
    return sum(kept.values())


def test_a_layer_keeps_its_input_and_three_products() -> None:
    """x and y in float32, [q k v] and [g u] in bf16; transformers keeps several times as much."""
    few, many = body_of("llama", layers=2), body_of("llama", layers=6)
    x = torch.randn(4, 16, 32)
    layer = (kept_bytes(many, x, True) - kept_bytes(few, x, True)) / 4
    assert layer == 4 * 16 * (2 * 32 * 4 + (32 + 16 + 16 + 2 * 48) * 2)
    assert (kept_bytes(many, x, False) - kept_bytes(few, x, False)) / 4 > 3 * layer


def test_checkpointed_layers_keep_their_input_alone() -> None:
    few, many = body_of("llama", layers=2), body_of("llama", layers=6)
    x = torch.randn(4, 16, 32)
    plain = both_ways(many, x, None, None)[1]
    for body in (few, many):
        assert checkpoint_layers(body) == len(body.layers)
        assert can_write_out(body)
    assert (kept_bytes(many, x, True) - kept_bytes(few, x, True)) / 4 == 4 * 16 * 32 * 4
    again = both_ways(many, x, None, None)[1]
    for name in plain:
        torch.testing.assert_close(again[name], plain[name])


def test_what_is_changed_is_left_to_transformers() -> None:
    assert not can_write_out(body_of("mistral", sliding_window=8))
    assert not can_write_out(body_of("llama", hidden_act="gelu"))
    assert not can_write_out(body_of("llama", mlp_bias=True))
    hooked, patched, exchanged = body_of("llama"), body_of("llama"), body_of("llama")
    hooked.layers[1].mlp.register_forward_hook(lambda *_: None)
    patched.layers[0].forward = lambda *_, **__: None
    exchanged.layers[0].mlp.up_proj = type("Mine", (nn.Linear,), {})(32, 48, bias=False)
    for body in (hooked, patched, exchanged):
        assert not can_write_out(body)


@pytest.mark.parametrize("trainable, written", [(Full(), True), (TopLayers(layers=2), True), (LoRA(rank=2), False)])
def test_policies_take_it_where_they_can(trainable: Any, written: bool, tiny_llama: str) -> None:
    policy = LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=trainable, critic=ValueHead())
    inputs = TokenInputs(
        tokens=torch.arange(2, 14), lengths=torch.tensor([7, 5]),
        is_decision=torch.tensor([False] * 3 + [True] * 4 + [False] * 3 + [True] * 2),
    )  # fmt: skip
    with mock.patch.object(language_model, "run_layers", wraps=run_layers) as taken:
        policy.evaluate(inputs)
        policy.score(inputs)
    assert (taken.call_count > 0) == written


def test_other_models_sample_and_train_as_before(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, "gpt_neox")
    assert not can_write_out(load_causal_lm(path).base_model)

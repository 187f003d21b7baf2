"""Activation checkpointing keeps less and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from heeler.policies.inputs import TokenInputs
from heeler.policies.language_model import Full, LanguageModelPolicy, LoRA, SeparateCritic, TopLayers, ValueHead
from heeler.policies.loading import load_causal_lm, load_seq2seq_lm
from heeler.policies.seq2seq import Seq2SeqPolicy
from heeler.types import HeelerError
from tests.tiny import ARCHITECTURES, SEQ2SEQ, save_tiny_model, save_tiny_seq2seq


def sequences() -> TokenInputs:
    """Two prompts with two completions each."""
    is_decision = torch.tensor([False] * 4 + [True] * 5)
    tokens = torch.randint(2, 200, (4, 9), generator=torch.Generator().manual_seed(0))
    tokens[1, :4], tokens[3, :4] = tokens[0, :4], tokens[2, :4]
    return TokenInputs(
        tokens=tokens.flatten(), lengths=torch.full((4,), 9), is_decision=is_decision.repeat(4)
    )  # fmt: skip


def gradients(policy: LanguageModelPolicy) -> tuple[dict[str, Tensor], int]:
    """Of a loss with log-probabilities, values and entropies; and the bytes that were kept for them beside weights."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf or not tensor.requires_grad:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = policy.evaluate(sequences())
    loss = (output.logprobs + 0.3 * output.values**2 + 0.1 * output.entropy + output.values).sum()
    loss.backward()
    named = [*policy.model.named_parameters(), *policy._critic_named()]  # pyright: ignore[reportPrivateUsage]
    return {name: p.grad.clone() for name, p in named if p.grad is not None}, sum(kept.values())


def both(make: Any, **options: Any) -> None:
    """A policy with and without checkpointing: the same gradients, less kept."""
    policies = []
    for _ in range(2):
        policy = make(entropy_gradient=True, **options)
        nn.init.normal_(policy.value_network[-1].weight, generator=torch.Generator().manual_seed(2))
        policies.append(policy)
    plain, checkpointed = policies
    checkpointed.checkpoint_activations()
    (expected, much), (found, little) = gradients(plain), gradients(checkpointed)
    assert expected.keys() == found.keys() and expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)
    assert little < 0.8 * much
    torch.testing.assert_close(checkpointed.score(sequences())[1], plain.score(sequences())[1])
    exported = checkpointed.export_model().state_dict()
    assert exported.keys() == plain.export_model().state_dict().keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_gradients(architecture: str, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, architecture)
    both(lambda **o: LanguageModelPolicy(load_causal_lm(path), **o), trainable=Full(), critic=ValueHead(detach=False))


@pytest.mark.parametrize(
    ("trainable", "critic"),
    [(Full(), SeparateCritic()), (TopLayers(layers=2), SeparateCritic()), (LoRA(rank=2), ValueHead(detach=False))],
    ids=str,
)
def test_same_gradients_of_each_way(trainable: Any, critic: Any, tiny_llama: str) -> None:
    both(lambda **o: LanguageModelPolicy(load_causal_lm(tiny_llama), **o), trainable=trainable, critic=critic)


def test_same_gradients_in_bf16(tiny_llama: str) -> None:
    both(
        lambda **o: LanguageModelPolicy(load_causal_lm(tiny_llama), **o),
        trainable=Full(), critic=ValueHead(), precision="bf16",
    )  # fmt: skip


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_same_gradients_of_both_halves(architecture: str, tmp_path: Path) -> None:
    path = save_tiny_seq2seq(tmp_path, architecture)
    both(
        lambda **o: Seq2SeqPolicy(load_seq2seq_lm(path), **o), trainable=Full(), critic=ValueHead(detach=False)
    )  # fmt: skip


def test_sentence_where_it_cannot_be() -> None:
    from transformers import CTRLConfig, CTRLLMHeadModel

    model = CTRLLMHeadModel(CTRLConfig(vocab_size=257, n_embd=32, n_layer=2, n_head=2, dff=64, n_positions=64))
    policy = LanguageModelPolicy(model, trainable=Full(), critic=ValueHead())
    with pytest.raises(HeelerError, match=r"CTRLLMHeadModel has no layers .* leave --activation-checkpointing off"):
        policy.checkpoint_activations()

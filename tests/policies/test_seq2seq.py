"""The encoder-decoder policy against plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from heeler.policies.inputs import TokenInputs
from heeler.policies.language_model import Full, LoRA, SeparateCritic, TopLayers, ValueHead
from heeler.policies.loading import is_seq2seq, load_language_model, load_seq2seq_lm
from heeler.policies.seq2seq import Seq2SeqPolicy, source_and_target
from heeler.types import HeelerError
from tests.policies.test_language_model import shake
from tests.tiny import SEQ2SEQ, save_tiny_seq2seq

SEQUENCES = [([5, 6, 7], [8, 9, 0]), ([1], [1, 12]), ([20, 21, 22, 23, 1], [24]), ([30, 31], [32, 33, 34, 35, 36])]


def inputs_of(sequences: list[tuple[list[int], list[int]]]) -> TokenInputs:
    """Sources and targets; a source or a target may hold the pad (1) as a token like any other."""
    return TokenInputs(
        tokens=torch.tensor([token for source, target in sequences for token in [*source, *target]]),
        lengths=torch.tensor([len(source) + len(target) for source, target in sequences]),
        is_decision=torch.tensor([d for s, t in sequences for d in [*[False] * len(s), *[True] * len(t)]]),
    )


def policy_of(path: str, **options: Any) -> Seq2SeqPolicy:
    return Seq2SeqPolicy(load_seq2seq_lm(path), **{"trainable": Full(), "critic": ValueHead(), **options})


def plain_logprobs(model: Any, temperature: float = 1.0) -> Tensor:
    """One sequence at a time, the whole softmax, with the decoder inputs that transformers makes of labels."""
    values: list[Tensor] = []
    for source, target in SEQUENCES:
        labels = torch.tensor([target])
        logits = model(input_ids=torch.tensor([source]), labels=labels).logits[0].float()
        values.append((logits / temperature).log_softmax(-1).gather(1, labels[0][:, None])[:, 0])
    return torch.cat(values)


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_logprobs_equal_plain_transformers(architecture: str, tmp_path: Path) -> None:
    path = save_tiny_seq2seq(tmp_path, architecture)
    policy, inputs = policy_of(path, temperature=0.8), inputs_of(SEQUENCES)
    assert not policy.notes  # the chunked output layer is taken
    original = plain_logprobs(AutoModelForSeq2SeqLM.from_pretrained(path).eval(), 0.8).detach()
    with torch.no_grad():
        torch.testing.assert_close(policy.evaluate(inputs).logprobs, original, atol=1e-4, rtol=1e-4)
    shake(policy)
    output, ref_logprobs, _ = policy.score(inputs)
    torch.testing.assert_close(ref_logprobs, original, atol=1e-4, rtol=1e-4)  # the reference did not move
    exported = plain_logprobs(policy.export_model(), 0.8).detach()  # what is published is what is trained
    torch.testing.assert_close(output.logprobs, exported, atol=1e-4, rtol=1e-4)
    assert float((output.logprobs - original).abs().max()) > 1e-2


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_a_source_with_several_targets_is_encoded_once(architecture: str, tmp_path: Path) -> None:
    """Log-probabilities and gradients are those of the sequences one by one."""
    policy = policy_of(save_tiny_seq2seq(tmp_path, architecture))
    shake(policy)
    sequences = [SEQUENCES[k] for k in (1, 0, 1, 3)] + [([5, 6, 7], [40, 41]), ([1], [9])]
    inputs = inputs_of(sequences)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    sizes: list[int] = []
    hook = policy.model.get_encoder().register_forward_pre_hook(
        lambda m, a, given: sizes.append(len(given["input_ids"])), with_kwargs=True
    )
    together = policy.evaluate(inputs).logprobs
    hook.remove()
    assert sizes == [3]
    alone = [policy.evaluate(inputs_of([sequence])).logprobs for sequence in sequences]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    weights = torch.linspace(-1, 2, len(together))
    gradients = torch.autograd.grad((weights * together).sum(), parameters)
    expected = torch.autograd.grad((weights * torch.cat(alone)).sum(), parameters)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_gradients_equal_cross_entropy_on_labels(architecture: str, tmp_path: Path) -> None:
    """transformers' own loss on padded labels, its sum over the targets; the encoder's weights are among them."""
    policy = policy_of(save_tiny_seq2seq(tmp_path, architecture))
    logprobs = policy.evaluate(inputs_of(SEQUENCES)).logprobs
    logprobs.sum().backward()
    mine = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    rows = source_and_target(inputs_of(SEQUENCES), policy.decoder_start)
    width = max(len(target) for _, target in SEQUENCES)
    labels = torch.tensor([[*target, *[-100] * (width - len(target))] for _, target in SEQUENCES])
    loss = policy.model(input_ids=rows.source, attention_mask=rows.source_mask, labels=labels).loss
    assert -logprobs.mean().item() == pytest.approx(loss.item(), rel=1e-4)
    (-loss * len(logprobs)).backward()
    plain = {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}
    assert mine.keys() == plain.keys() and any("encoder" in name for name in mine)
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("architecture", SEQ2SEQ)
def test_together_equals_alone(architecture: str, tmp_path: Path) -> None:
    policy = policy_of(save_tiny_seq2seq(tmp_path, architecture), critic=ValueHead(detach=False))
    shake(policy)
    inputs = inputs_of(SEQUENCES)
    with torch.no_grad():
        together = policy.evaluate(inputs)
        alone = [policy.evaluate(inputs.select(torch.tensor([i]))) for i in range(len(SEQUENCES))]
    for name in ("logprobs", "entropy", "values"):
        parts = torch.cat([getattr(a, name) for a in alone])
        torch.testing.assert_close(getattr(together, name), parts, atol=1e-4, rtol=1e-4)
    assert float(together.values.std()) > 0


def test_what_stands_before_the_first_decision_is_the_source() -> None:
    inputs = TokenInputs(
        tokens=torch.arange(10, 22),
        lengths=torch.tensor([6, 3, 3]),
        is_decision=torch.tensor([0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 1, 1], dtype=torch.bool),
    )
    rows = source_and_target(inputs, 7)
    assert rows.source.tolist() == [[10, 11, 0], [16, 17, 18], [19, 0, 0]]
    assert rows.source_mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert rows.decoder_ids.tolist() == [[7, 12, 13, 14], [7, 0, 0, 0], [7, 20, 0, 0]]
    assert list(zip(rows.rows.tolist(), rows.columns.tolist(), rows.tokens.tolist(), strict=True)) == [
        (0, 0, 12), (0, 2, 14), (0, 3, 15), (2, 0, 20), (2, 1, 21),
    ]  # fmt: skip
    whole = source_and_target(inputs, 7, include_last=True)
    assert whole.decoder_ids.tolist() == [[7, 12, 13, 14, 15], [7, 0, 0, 0, 0], [7, 20, 21, 0, 0]]
    assert whole.lengths.tolist() == [5, 1, 3]


def test_value_after_the_last_token(tmp_path: Path) -> None:
    """It is the value that the sequence would have before one more decision."""
    policy = policy_of(save_tiny_seq2seq(tmp_path))
    inputs = inputs_of(SEQUENCES)
    with torch.no_grad():
        assert float(policy.evaluate(inputs).values.abs().max()) == 0.0
    shake(policy)
    output, _, after = policy.score(inputs, last_values=True)
    torch.testing.assert_close(output.values, policy.score(inputs)[0].values, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for i, (source, target) in enumerate(SEQUENCES):
            longer = policy.evaluate(inputs_of([(source, [*target, 5])]))
            torch.testing.assert_close(after[i], longer.values[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("detach", [True, False])
def test_where_the_value_gradient_goes(tmp_path: Path, detach: bool) -> None:
    policy = policy_of(save_tiny_seq2seq(tmp_path), critic=ValueHead(detach=detach))
    shake(policy)
    policy.evaluate(inputs_of(SEQUENCES)).values.sum().backward()
    own, critic = policy.parameter_groups()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in own["params"]) is not detach
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in critic["params"])


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_logits_that_are_more_take_the_models_own_forward(tmp_path: Path, entropy_gradient: bool) -> None:
    path = save_tiny_seq2seq(tmp_path, "bart")

    def capped() -> Any:
        model = load_seq2seq_lm(path)
        model.register_forward_hook(lambda m, a, out: out.__setitem__("logits", out.logits.tanh() * 3))
        return model

    options: Any = {"trainable": Full(), "critic": ValueHead(), "entropy_gradient": entropy_gradient}
    policy, straight = Seq2SeqPolicy(capped(), **options), policy_of(path, entropy_gradient=entropy_gradient)
    assert any("more than its output layer" in note for note in policy.notes)
    output = policy.evaluate(inputs_of(SEQUENCES))
    assert output.entropy.requires_grad is entropy_gradient
    torch.testing.assert_close(output.logprobs, plain_logprobs(capped()), atol=1e-4, rtol=1e-4)
    policy._head_scale = None
    straight._head_scale, fast = None, straight.evaluate(inputs_of(SEQUENCES))
    slow = straight.evaluate(inputs_of(SEQUENCES))
    for name in ("logprobs", "entropy", "values"):
        torch.testing.assert_close(getattr(slow, name), getattr(fast, name), atol=1e-4, rtol=1e-4)


def test_a_token_mask_binds_policy_and_reference(tmp_path: Path) -> None:
    bias = torch.zeros(257)
    bias[24:] = -1e9
    policy = policy_of(save_tiny_seq2seq(tmp_path), token_bias=bias)
    inside, outside = inputs_of([([5], [6])]), inputs_of([([5], [30])])
    assert float(policy.score(outside)[0].logprobs) < -1e8 and float(policy.score(outside)[1]) < -1e8
    assert float(policy.score(inside)[0].logprobs) > -1e3


def test_sinusoidal_positions_stay(tmp_path: Path) -> None:
    policy = policy_of(save_tiny_seq2seq(tmp_path, "marian"))
    frozen = [n for n, p in policy.model.named_parameters() if not p.requires_grad]
    assert frozen and all("embed_positions" in name for name in frozen)
    assert not set(frozen) & {name for name, _ in policy.published()}


@pytest.mark.parametrize("architecture", ["t5", "bart", "marian"])
def test_bf16_is_near_fp32(architecture: str, tmp_path: Path) -> None:
    path = save_tiny_seq2seq(tmp_path, architecture, std=0.05)
    exact, rough = policy_of(path), policy_of(path, precision="bf16")
    inputs = inputs_of(SEQUENCES)
    a, b = exact.score(inputs)[0].logprobs, rough.score(inputs)[0].logprobs
    assert 0 < float((a - b).abs().max()) < 0.1
    assert all(p.dtype == torch.bfloat16 for p in rough.engine_model.parameters())
    assert all(p.dtype == torch.float32 for p in rough.model.parameters())
    own = rough.model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in rough.export_model().state_dict().items())


def test_state_goes_out_and_in(tmp_path: Path) -> None:
    path = save_tiny_seq2seq(tmp_path)
    policy, other = policy_of(path), policy_of(path)
    shake(policy)
    other.load_state_dict(policy.state_dict())
    inputs = inputs_of(SEQUENCES)
    for name in ("logprobs", "values"):
        assert torch.equal(getattr(policy.score(inputs)[0], name), getattr(other.score(inputs)[0], name))
    policy.export_model().save_pretrained(tmp_path / "out")
    exported = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(plain_logprobs(exported), policy.score(inputs)[0].logprobs, atol=1e-4, rtol=1e-4)


def test_sentences_for_settings_that_do_not_fit(tmp_path: Path, tiny_llama: str) -> None:
    path = save_tiny_seq2seq(tmp_path)
    for trainable in (TopLayers(layers=1), LoRA()):
        with pytest.raises(HeelerError, match=f"trains whole: choose trainable:full .* not {type(trainable).__name__}"):
            policy_of(path, trainable=trainable)
    with pytest.raises(HeelerError, match="choose critic:value-head"):
        policy_of(path, critic=SeparateCritic())
    with pytest.raises(HeelerError, match="cannot share rows"):
        policy_of(path).evaluate(inputs_of(SEQUENCES), 64)
    model = load_seq2seq_lm(path)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(HeelerError, match="does not say what its decoder starts from"):
        Seq2SeqPolicy(model, trainable=Full(), critic=ValueHead())
    with pytest.raises(HeelerError, match="cannot load the encoder-decoder language model"):
        load_seq2seq_lm(tiny_llama)
    assert is_seq2seq(path) and not is_seq2seq(tiny_llama) and not is_seq2seq("./gone")
    assert load_language_model(path).config.model_type == "t5"
    assert load_language_model(tiny_llama).config.model_type == "llama"

"""The policy against plain transformers, for every architecture and every way to train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from heeler.policies.inputs import PaddedRows, TokenInputs
from heeler.policies.language_model import (
    Full,
    LanguageModelPolicy,
    LoRA,
    SeparateCritic,
    TopLayers,
    Trainable,
    ValueHead,
)
from heeler.policies.loading import load_causal_lm
from heeler.policies.splitting import split
from heeler.types import HeelerError
from tests.tiny import ARCHITECTURES, save_tiny_model

WAYS = [Full(), TopLayers(layers=1), TopLayers(layers=3), LoRA(rank=2), LoRA(rank=2, layers=1)]


def sequences(vocab: int = 257) -> TokenInputs:
    """Three sequences of different lengths; the last one has a tool's tokens between its decisions."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 4, 9])
    is_decision = torch.zeros(20, dtype=torch.bool)
    is_decision[3:7] = is_decision[9:11] = is_decision[14:16] = is_decision[18:20] = True
    return TokenInputs(
        tokens=torch.randint(1, vocab, (20,), generator=generator), lengths=lengths, is_decision=is_decision
    )


def plain_logprobs(model: torch.nn.Module, inputs: TokenInputs, temperature: float) -> Tensor:
    """One sequence at a time through transformers, the whole softmax."""
    values: list[Tensor] = []
    start = 0
    for length in inputs.lengths.tolist():
        ids = inputs.tokens[start : start + length]
        logp = (model(input_ids=ids[None]).logits[0].float() / temperature).log_softmax(-1)
        for t in inputs.is_decision[start : start + length].nonzero()[:, 0].tolist():
            values.append(logp[t - 1, ids[t]])
        start += length
    return torch.stack(values)


def shake(policy: LanguageModelPolicy, scale: float = 0.05) -> None:
    """Move every trained weight, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for group in policy.parameter_groups():
            for parameter in group["params"]:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_logprobs_equal_plain_transformers(architecture: str, way: Trainable, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, architecture)
    policy = LanguageModelPolicy(load_causal_lm(path), trainable=way, critic=ValueHead(), temperature=0.8)
    inputs = sequences()
    original = plain_logprobs(AutoModelForCausalLM.from_pretrained(path).eval(), inputs, 0.8).detach()
    with torch.no_grad():
        torch.testing.assert_close(policy.evaluate(inputs).logprobs, original, atol=1e-4, rtol=1e-4)

    shake(policy)
    output, ref_logprobs, _ = policy.score(inputs)
    torch.testing.assert_close(ref_logprobs, original, atol=1e-4, rtol=1e-4)  # the reference did not move
    exported = plain_logprobs(policy.export_model(), inputs, 0.8).detach()  # what is published is what is trained
    torch.testing.assert_close(output.logprobs, exported, atol=1e-4, rtol=1e-4)
    assert float((output.logprobs - original).abs().max()) > 1e-3


@pytest.mark.parametrize("way", [Full(), TopLayers(layers=1), LoRA(rank=2, layers=1)], ids=str)
def test_gradients_equal_plain_autograd(tiny_llama: str, way: Trainable) -> None:
    policy = LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=way, critic=ValueHead())
    inputs = sequences()
    policy.evaluate(inputs).logprobs.sum().backward()
    mine = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    plain_logprobs(policy.model, inputs, 1.0).sum().backward()
    plain = {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}
    assert mine.keys() == plain.keys() and mine
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_token_that_pads_is_read_like_any_other(architecture: str, tmp_path: Path) -> None:
    """Rows are padded with 0, here the end of sequence too: it begins a prompt, stands inside and ends a sequence."""
    policy = LanguageModelPolicy(
        load_causal_lm(save_tiny_model(tmp_path, architecture)), trainable=TopLayers(layers=1), critic=ValueHead()
    )
    shake(policy)
    tokens = sequences().tokens.clone()
    tokens[[0, 1, 6, 7, 10, 11, 13, 17, 19]] = 0
    inputs = replace(sequences(), tokens=tokens)
    with torch.no_grad():
        output = policy.evaluate(inputs)
        torch.testing.assert_close(output.logprobs, plain_logprobs(policy.model, inputs, 1.0), atol=1e-4, rtol=1e-4)
        alone = [policy.evaluate(inputs.select(torch.tensor([i]))).values for i in range(3)]
    torch.testing.assert_close(output.values, torch.cat(alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("critic", [ValueHead(), SeparateCritic()], ids=str)
def test_dropout_stays_off(critic: Any, tmp_path: Path) -> None:
    """GPT-2's is 0.1; a model that arrives in training mode is put into evaluation mode, and its critic too."""
    model = load_causal_lm(save_tiny_model(tmp_path, "gpt2")).train()
    assert model.config.attn_pdrop == model.config.resid_pdrop == model.config.embd_pdrop == 0.1
    policy = LanguageModelPolicy(model, trainable=Full(), critic=critic)
    shake(policy)
    first, second = policy.evaluate(sequences()), policy.evaluate(sequences())
    for name in ("logprobs", "entropy", "values"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("critic", [ValueHead(), ValueHead(detach=False), SeparateCritic()], ids=str)
@pytest.mark.parametrize("way", [Full(), TopLayers(layers=1)], ids=str)
def test_packed_equals_alone(tiny_llama: str, way: Trainable, critic: ValueHead | SeparateCritic) -> None:
    """A sequence scores the same by itself and padded next to longer ones."""
    policy = LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=way, critic=critic)
    shake(policy)
    inputs = sequences()
    with torch.no_grad():
        together = policy.evaluate(inputs)
        alone = [policy.evaluate(inputs.select(torch.tensor([i]))) for i in range(3)]
    for name in ("logprobs", "entropy", "values"):
        torch.testing.assert_close(getattr(together, name), torch.cat([getattr(a, name) for a in alone]))
    assert float(together.values.std()) > 0


@pytest.mark.parametrize(
    ("critic", "moves"), [(ValueHead(detach=True), False), (ValueHead(detach=False), True), (SeparateCritic(), False)]
)
def test_where_the_value_gradient_goes(tiny_llama: str, critic: ValueHead | SeparateCritic, moves: bool) -> None:
    policy = LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=TopLayers(layers=1), critic=critic)
    shake(policy)
    policy.evaluate(sequences()).values.sum().backward()
    policy_group, critic_group = policy.parameter_groups()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy_group["params"]) is moves
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in critic_group["params"])


@pytest.mark.parametrize("critic", [ValueHead(), SeparateCritic()], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_known_logprobs_save_a_pass_and_change_nothing(tiny_llama: str, way: Trainable, critic: Any) -> None:
    if isinstance(way, LoRA) and isinstance(critic, SeparateCritic):
        pytest.skip("refused")
    policy = LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=way, critic=critic)
    shake(policy)
    inputs = sequences()
    rows = inputs.padded()
    with torch.no_grad():
        final = policy.model.base_model(input_ids=rows.ids, use_cache=False).last_hidden_state
    given = final[rows.rows, rows.columns]
    for last_values in (False, True):
        full, ref_logprobs, after = policy.score(inputs, last_values=last_values)
        for states in (None, given):
            output, known_ref, known_after = policy.score(
                inputs, last_values=last_values, known=full.logprobs, final_states=states
            )
            assert torch.equal(output.logprobs, full.logprobs) and torch.equal(known_ref, ref_logprobs)
            torch.testing.assert_close(output.values, full.values, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(known_after, after, atol=1e-5, rtol=1e-4)
    output, ref_logprobs, _ = policy.score(inputs)
    torch.testing.assert_close(policy.logprobs(inputs), output.logprobs)
    torch.testing.assert_close(policy.logprobs(inputs, reference=True), ref_logprobs)


def test_values_start_at_zero(tiny_llama: str) -> None:
    policy = LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=TopLayers(layers=1), critic=ValueHead())
    with torch.no_grad():
        assert float(policy.evaluate(sequences()).values.abs().max()) == 0.0


@pytest.mark.parametrize("trainable", [Full(), TopLayers(layers=1)])
def test_a_critics_own_layers_learn_from_the_first_step_on(tiny_llama: str, trainable: Any) -> None:
    """Through a last layer of zeros nothing would reach them: at a small rate a critic would stay blind for long."""
    policy = LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=trainable, critic=SeparateCritic())
    values = policy.evaluate(sequences()).values
    assert 0 < float(values.detach().abs().max()) < 0.5  # small beside rewards
    values.sum().backward()
    assert policy.critic_body is not None
    learning = [p for p in policy.critic_body.parameters() if p.requires_grad]
    assert learning and any(p.grad is not None and float(p.grad.abs().max()) > 1e-4 for p in learning)


def test_value_after_the_last_token(tiny_llama: str) -> None:
    """It is the value that the sequence would have before one more decision."""
    policy = LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=TopLayers(layers=1), critic=ValueHead())
    shake(policy)
    inputs = sequences().select(torch.tensor([0]))
    _, _, after = policy.score(inputs, last_values=True)
    longer = TokenInputs(
        tokens=torch.cat([inputs.tokens, torch.tensor([5])]),
        lengths=inputs.lengths + 1,
        is_decision=torch.cat([inputs.is_decision, torch.tensor([True])]),
    )
    with torch.no_grad():
        torch.testing.assert_close(after[0], policy.evaluate(longer).values[-1])


def test_only_the_top_is_copied(tiny_llama: str) -> None:
    """Engine and reference share the storage of everything frozen."""
    policy = LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=TopLayers(layers=1), critic=ValueHead())
    own = dict(policy.model.named_parameters())
    for name, parameter in policy.engine_model.named_parameters():
        assert (parameter.data_ptr() == own[name].data_ptr()) == (not own[name].requires_grad), name


def test_a_trunk_that_cannot_be_split_is_said_and_computed_whole(
    tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heeler.policies.language_model.split", lambda base, layers: None)
    policy = LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=TopLayers(layers=1), critic=ValueHead())
    assert policy.trunk is None and any("cannot be split" in note for note in policy.notes)
    inputs = sequences()
    original = plain_logprobs(AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), inputs, 1.0).detach()
    shake(policy)
    torch.testing.assert_close(policy.score(inputs)[1], original, atol=1e-4, rtol=1e-4)


def test_scaled_logits_fall_back_to_the_models_own(tmp_path: Path) -> None:
    """Granite multiplies its logits: the shortcut around its forward would be wrong, and is not taken."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, logits_scaling=4.0, pad_token_id=None, bos_token_id=1, eos_token_id=0,
    )  # fmt: skip
    model = GraniteForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    inputs = sequences(50)
    original = plain_logprobs(model, inputs, 1.0).detach()
    policy = LanguageModelPolicy(model, trainable=TopLayers(layers=1), critic=ValueHead())
    assert any("more than its output layer" in note for note in policy.notes)
    with torch.no_grad():
        torch.testing.assert_close(policy.evaluate(inputs).logprobs, original, atol=1e-4, rtol=1e-4)


def test_split_keeps_the_whole(tiny_llama: str) -> None:
    base = load_causal_lm(tiny_llama).base_model
    halves = split(base, 2)
    assert halves is not None
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        states = halves[0](input_ids=ids, use_cache=False).last_hidden_state
        whole, joined = (
            base(input_ids=ids, use_cache=False).last_hidden_state,
            halves[1](inputs_embeds=states, use_cache=False).last_hidden_state,
        )
    torch.testing.assert_close(joined, whole)


def test_sentences_for_settings_that_do_not_fit(tiny_llama: str) -> None:
    with pytest.raises(HeelerError, match="the model has 3 of them"):
        LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=TopLayers(layers=9), critic=ValueHead())
    with pytest.raises(HeelerError, match="cannot be combined with LoRA"):
        LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=LoRA(), critic=SeparateCritic())
    with pytest.raises(HeelerError, match="cannot load the critic"):
        LanguageModelPolicy(
            load_causal_lm(tiny_llama), trainable=TopLayers(layers=1), critic=SeparateCritic(model="./no-such-model")
        )


def test_a_critic_from_another_model(tiny_llama: str, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", hidden=16, seed=3)
    policy = LanguageModelPolicy(
        load_causal_lm(tiny_llama), trainable=TopLayers(layers=1), critic=SeparateCritic(model=other)
    )
    shake(policy)
    with torch.no_grad():
        assert float(policy.evaluate(sequences()).values.std()) > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sequences_that_share_a_row_are_blind_to_each_other(architecture: str, attention: str, tmp_path: Path) -> None:
    """Values and gradients equal those of padded rows, whatever the rows' size."""
    model = load_causal_lm(save_tiny_model(tmp_path, architecture))
    model.set_attn_implementation(attention)
    policy = LanguageModelPolicy(model, trainable=TopLayers(layers=1), critic=ValueHead(detach=False))
    shake(policy)
    inputs = sequences()
    parameters = [p for group in policy.parameter_groups() for p in group["params"]]

    def look(pack_tokens: int | None) -> tuple[Any, list[torch.Tensor]]:
        output = policy.evaluate(inputs, pack_tokens)
        return output, list(torch.autograd.grad((output.logprobs + output.values).sum(), parameters))

    padded, gradients = look(None)
    for row_tokens in (1, 12, 64):
        packed, packed_gradients = look(row_tokens)
        torch.testing.assert_close(packed.logprobs, padded.logprobs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(packed.values, padded.values, atol=1e-4, rtol=1e-4)
        for a, b in zip(packed_gradients, gradients, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert len(inputs.packed(64).lengths) == 1 and len(inputs.packed(1).lengths) == 3


def groups(vocab: int = 257, seed: int = 0) -> TokenInputs:
    """Eleven completions of four prompts, mixed up; some end at once, one prompt has a single completion."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(1, vocab, (n,), generator=generator) for n in (6, 9, 7, 1)]
    tokens, lengths, is_decision = [], [], []
    for k in (0, 1, 0, 2, 1, 0, 3, 1, 1, 0, 3):
        new = torch.randint(1, vocab, (int(torch.randint(1, 5, (1,), generator=generator)),), generator=generator)
        tokens += [prompts[k], new]
        lengths.append(len(prompts[k]) + len(new))
        is_decision += [torch.zeros(len(prompts[k]), dtype=torch.bool), torch.ones(len(new), dtype=torch.bool)]
    return TokenInputs(tokens=torch.cat(tokens), lengths=torch.tensor(lengths), is_decision=torch.cat(is_decision))


@pytest.mark.parametrize("seed", range(5))
def test_the_shared_layout_shows_each_decision_what_its_sequence_holds(seed: int) -> None:
    inputs = groups(seed=seed)
    rows = inputs.shared()
    assert rows is not None
    assert int((rows.sequence >= 0).sum()) < int((inputs.lengths - 1).sum())  # pyright: ignore
    read_back(inputs, rows)


def read_back(inputs: TokenInputs, rows: PaddedRows) -> None:
    """Through mask and positions, the context of every decision is its own sequence up to there."""
    visible = rows.visible[:, 0]
    n = 0
    for start, length in zip(inputs.starts.tolist(), inputs.lengths.tolist(), strict=True):
        for t in range(length):
            if inputs.is_decision[start + t]:
                row, column = int(rows.rows[n]), int(rows.columns[n])
                seen = visible[row, column].nonzero()[:, 0]
                order = rows.positions[row, seen].argsort()  # pyright: ignore
                assert rows.ids[row, seen[order]].tolist() == inputs.tokens[start : start + t].tolist()
                assert rows.positions[row, seen[order]].tolist() == list(range(t))  # pyright: ignore
                assert int(rows.tokens[n]) == int(inputs.tokens[start + t])
                n += 1
    assert n == len(rows.tokens)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("critic", [ValueHead(detach=False), SeparateCritic()], ids=str)
def test_samples_that_share_their_prompt(
    architecture: str, attention: str, critic: ValueHead | SeparateCritic, tmp_path: Path
) -> None:
    """Log-probabilities, entropies, values, reference and gradients equal those of rows of their own."""
    model = load_causal_lm(save_tiny_model(tmp_path, architecture))
    model.set_attn_implementation(attention)
    policy = LanguageModelPolicy(model, trainable=TopLayers(layers=2), critic=critic)
    shake(policy)
    inputs = groups()
    parameters = [p for group in policy.parameter_groups() for p in group["params"]]
    shapes: list[int] = []
    policy.top.register_forward_pre_hook(
        lambda m, a, kw: shapes.append(next(iter(kw.values())).shape[:2].numel()), with_kwargs=True
    )

    def look(share: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        policy.shares_prompts = share
        output = policy.evaluate(inputs)
        gradients = torch.autograd.grad((output.logprobs + output.values).sum(), parameters)
        scored, reference, after = policy.score(inputs)
        return [output.logprobs, output.entropy, output.values, scored.logprobs, reference, after], list(gradients)

    assert policy.shares_prompts  # found by trying
    for a, b in zip(look(True), look(False), strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)
    assert shapes[0] < 0.8 * shapes[-1]


def test_kept_states_of_a_shared_prompt(tiny_llama: str) -> None:
    policy = LanguageModelPolicy(load_causal_lm(tiny_llama), trainable=TopLayers(layers=1), critic=ValueHead())
    inputs = groups()
    with torch.no_grad():
        plain = policy.evaluate(inputs)
        states = [
            policy.trunk(input_ids=inputs.tokens[None, s : s + n]).last_hidden_state[0]
            for s, n in zip(inputs.starts.tolist(), inputs.lengths.tolist(), strict=True)
        ]
        kept = policy.evaluate(replace(inputs, trunk_states=torch.cat(states)))
    torch.testing.assert_close(kept.logprobs, plain.logprobs, atol=1e-4, rtol=1e-4)


def mistral(window: int | None) -> Any:
    import transformers

    return transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=window, pad_token_id=None,
        )
    ).eval()  # fmt: skip


def test_models_with_windows_do_not_share(tmp_path: Path) -> None:
    """Their windows are wider than the probe, so the config must say it; a critic's count too."""
    import transformers

    options: dict[str, Any] = {"trainable": Full(), "critic": ValueHead()}
    assert LanguageModelPolicy(mistral(None), **options).shares_prompts
    assert not LanguageModelPolicy(mistral(None), **options, share_prompts=False).shares_prompts
    policy = LanguageModelPolicy(mistral(64), **options)
    assert not policy.shares_prompts and "each reads it for itself" in policy.notes[-1]
    neo = transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            vocab_size=97, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        )
    ).eval()  # fmt: skip
    assert not LanguageModelPolicy(neo, **options).shares_prompts
    mistral(64).base_model.save_pretrained(tmp_path / "critic")
    critic = SeparateCritic(model=str(tmp_path / "critic"))
    assert not LanguageModelPolicy(mistral(None), trainable=Full(), critic=critic).shares_prompts


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("way", [Full(), LoRA(rank=2), LoRA(rank=2, layers=1)], ids=str)
def test_samples_share_their_prompt_in_every_way_to_train(way: Trainable, attention: str, tmp_path: Path) -> None:
    """With a critic from another model, whose attention takes its mask in another form."""
    other = save_tiny_model(tmp_path / "other", "gpt2", hidden=16, seed=3)
    policy = LanguageModelPolicy(
        load_causal_lm(save_tiny_model(tmp_path / "model")), trainable=way, critic=SeparateCritic(model=other)
    )
    policy.critic_body.set_attn_implementation(attention)
    shake(policy)
    assert policy.shares_prompts
    inputs = groups()
    plain_inputs = replace(inputs)
    together = policy.evaluate(inputs)
    policy.shares_prompts = False
    alone = policy.evaluate(plain_inputs)
    for name in ("logprobs", "entropy", "values"):
        torch.testing.assert_close(getattr(together, name), getattr(alone, name), atol=1e-4, rtol=1e-3)


def test_what_sharing_leaves_as_it_is() -> None:
    """Tool tokens between decisions, sequences without decisions, no sequences, and groups too wide for a row."""
    inputs = groups()
    assert replace(inputs, tokens=inputs.tokens[:0], lengths=inputs.lengths[:0], is_decision=inputs.is_decision[:0]) \
        .shared() is None  # fmt: skip
    prompt, turns = list(range(1, 40)), [[50, 51, 52], [60, 61], [70, 71, 72, 73]]
    tools = TokenInputs(
        tokens=torch.tensor(prompt + [t for turn in turns for t in [*prompt, *turn]]),
        lengths=torch.tensor([39, 42, 41, 43]),
        is_decision=torch.tensor(
            [False] * 39 + [d for n in (3, 2, 4) for d in [*[False] * 39, True, *[False] * (n - 2), True]]
        ),
    )
    rows = tools.shared()
    assert rows is not None and rows.tokens.tolist() == [50, 52, 60, 61, 70, 73]
    assert int((rows.sequence >= 0).sum()) == 39 + 2 + 1 + 3  # pyright: ignore
    read_back(tools, rows)
    apart = TokenInputs(
        tokens=torch.arange(1, 21), lengths=torch.tensor([8, 4, 4, 4]), is_decision=torch.arange(20) % 4 == 3
    )
    assert apart.shared() is None and apart.neighbours is None  # nothing in common
    many = [*prompt, *range(100, 160)]
    wide = TokenInputs(
        tokens=torch.tensor(many * 40),
        lengths=torch.full((40,), len(many)),
        is_decision=torch.tensor([i >= 39 for i in range(len(many))] * 40),
    )
    layout = wide.shared()
    assert layout is not None and 400 < layout.ids.shape[1] <= 512 + len(many)
    read_back(wide, layout)
    long = TokenInputs(
        tokens=torch.tensor((list(range(1, 601)) + [7] * 50) * 8),
        lengths=torch.full((8,), 650),
        is_decision=torch.tensor(([False] * 600 + [True] * 50) * 8),
    )
    layout = long.shared()
    assert layout is not None and layout.ids.shape == (1, 600 + 8 * 49)  # no more than the prompt once more
    read_back(long, layout)


def test_samples_lie_side_by_side_where_the_prompt_is_most_of_the_work() -> None:
    inputs = groups()
    assert inputs.neighbours is not None
    group, shared = inputs.neighbours
    assert group.tolist() == inputs.groups.tolist() and shared.tolist() == inputs.beginnings[0].tolist()
    answers = replace(inputs, lengths=inputs.lengths * 4, tokens=inputs.tokens.repeat_interleave(4))
    answers = replace(answers, is_decision=(answers.places[1] > 0))
    assert answers.neighbours is None

"""A causal language model as a PPO policy: what is trained, the critic, and the frozen reference.

    tokens -> [trunk, frozen, shared by all roles] -> [top, trained] -> output layer -> log-probabilities
                                                  \\-> [top, frozen copy, or adapters off] -> reference
                                                  \\-> value head, or a critic of its own

Three ways to train: all weights, the top k layers (the trunk below is computed once for all roles), or LoRA
adapters. Two critics: a head on the policy's final hidden states, or a model of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heeler.policies.attention import use_fast_attention
from heeler.policies.checkpointing import checkpoint_layers
from heeler.policies.inputs import PaddedRows, TokenInputs
from heeler.policies.llama import can_write_out, run_layers
from heeler.policies.loading import SCORE_KEY, model_folder
from heeler.policies.logprobs import logprobs_alone, token_logprobs
from heeler.policies.precision import is_linear, round_linear
from heeler.policies.quantized import numbers, quantize_linear
from heeler.policies.splitting import full_attention, layer_list, shared_copy, split, top_parameters
from heeler.runtime.machine import type_of
from heeler.runtime.packages import quiet_transformers, require
from heeler.types import HeelerError, Inputs, PolicyOutput


@dataclass(frozen=True, kw_only=True)
class Full:
    """Train every weight of the model."""


@dataclass(frozen=True, kw_only=True)
class TopLayers:
    """Train the last `layers` decoder layers and the final norm; the trunk and the output layer stay frozen.

    Attributes:
        layers: how many; the frozen rest is computed once for policy, critic and reference.
    """

    layers: int = 4


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Train low-rank adapters (peft) on the linear layers; the reference is the model with adapters off.

    Attributes:
        rank: r of the adapters.
        alpha: their scale is alpha / rank.
        layers: adapt the last `layers` decoder layers only; None adapts all.
        quantize: "nf4" keeps the adapted layers' own weights in 4 bits (QLoRA, 2305.14314): policy, reference and what
            is exported are then the rounded model. The engine's copy stays in the run's precision.
    """

    rank: int = 16
    alpha: int = 32
    layers: int | None = None
    quantize: Literal["none", "nf4"] = "none"


@dataclass(frozen=True, kw_only=True)
class ValueHead:
    """A small network on the policy's final hidden states.

    Attributes:
        detach: keep the value loss out of the policy's layers.
    """

    detach: bool = True


@dataclass(frozen=True, kw_only=True)
class SeparateCritic:
    """A critic with layers of its own; with a frozen trunk it has its own top on the shared trunk.

    Attributes:
        model: "policy" starts from the policy's weights; a path or hub id from another model with the same
            vocabulary. A causal reward model brings its score too: values then start as its score of the text so far
            [Ziegler et al., 1909.08593, section 2.1].
    """

    model: str = "policy"


CRITIC_START = 0.1  # of a critic's last layer: values are small beside rewards, and its body has a gradient

Trainable = Full | TopLayers | LoRA
Critic = ValueHead | SeparateCritic


def value_network(hidden_size: int, start: float = 0.0) -> nn.Module:
    """Hidden states `[..., hidden_size]` to values `[..., 1]`, 0 at first.

    Where a critic's own layers are to learn from the values, the last one must not be 0, as no gradient would pass it:
    `start` is its scale, in standard deviations of 1 / sqrt(hidden_size + 1).
    """
    network = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, 1))
    nn.init.normal_(network[2].weight, std=start / math.sqrt(hidden_size + 1))  # pyright: ignore
    nn.init.zeros_(network[2].bias)  # pyright: ignore
    return network


class LanguageModelPolicy:
    """Policy, critic and reference over one set of shared frozen weights; implements `heeler.types.Policy`.

    Args:
        model: a transformers causal LM in float32. It is changed in place.
        trainable: which weights are trained.
        critic: where the values come from.
        temperature: of the distribution that is sampled from and trained.
        precision: "fp32", or "bf16" (frozen weights in bf16, trained ones in fp32 under autocast).
        entropy_gradient: whether the entropy is part of the loss.
        seed: of the value network's and the adapters' first weights.
        token_bias: `[V]` added to the logits of policy and reference (a token mask), or None.
        share_prompts: let samples of one prompt share its tokens, where the models can.
        device: where to; the model is moved when its weights have the form that they keep. None leaves it.
    """

    def __init__(
        self,
        model: Any,
        *,
        trainable: Trainable,
        critic: Critic,
        temperature: float = 1.0,
        precision: Literal["fp32", "bf16"] = "fp32",
        entropy_gradient: bool = False,
        seed: int = 0,
        token_bias: Tensor | None = None,
        share_prompts: bool = True,
        device: str | torch.device | None = None,
    ) -> None:
        self._keep(model, trainable, critic, temperature, precision, entropy_gradient, token_bias, device)
        base = model.base_model
        if isinstance(trainable, (TopLayers, LoRA)) and trainable.layers is not None:
            found = layer_list(base)
            if found is None:
                raise HeelerError(
                    f"{type(base).__name__} has no list of decoder layers that Heeler finds, so the top layers cannot"
                    " be chosen: train it whole, or with LoRA on all layers"
                )
            if not 1 <= trainable.layers <= len(found[1]):
                raise HeelerError(
                    f"cannot train the top {trainable.layers} layers: the model has {len(found[1])} of them"
                )
        changing = self._changing_parameters(base)
        self.changed_names = [name for name, parameter in model.named_parameters() if id(parameter) in changing]
        adapted = isinstance(trainable, LoRA)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            if precision == "bf16" and (adapted or id(parameter) not in changing):
                parameter.data = parameter.data.to(torch.bfloat16)
        self.engine_model: Any = shared_copy(model, [p for p in model.parameters() if id(p) in changing])
        if precision == "bf16":
            for parameter in self.engine_model.parameters():  # not the buffers: rotary frequencies need their digits
                parameter.data = parameter.data.to(torch.bfloat16)
        if isinstance(trainable, LoRA) and trainable.quantize == "nf4":
            self._quantize(changing)
        model.to(self.device)
        self.engine_model.to(self.device)
        changing = {id(p) for name, p in model.named_parameters() if name in self.changed_names}
        self._linear_head = self._head_is_linear()
        torch.manual_seed(seed)

        critic_source = (
            copy.deepcopy(base) if isinstance(critic, SeparateCritic) and isinstance(trainable, Full) else None
        )
        reference_model: Any = (
            None
            if isinstance(trainable, LoRA)
            else shared_copy(model, [p for p in model.parameters() if id(p) in changing])
        )
        if isinstance(trainable, LoRA):
            self._add_adapters(trainable)
        else:
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in changing)
        self._reference_lm: Any = model if reference_model is None else reference_model.requires_grad_(False)
        self._split(reference_model)
        if reference_model is not None and precision == "bf16":
            round_linear(reference_model)
        self._build_critic(critic, critic_source)
        bodies = [self.model.base_model]
        if self.critic_body is not None and not self.critic_uses_trunk:
            bodies.append(self.critic_body)
        self.shares_prompts = share_prompts and all(self._can_share_prompts(body) for body in bodies)
        if share_prompts and not self.shares_prompts:
            self.notes.append("samples of one prompt cannot share its tokens in this model: each reads it for itself")

    def _keep(
        self,
        model: Any,
        trainable: Trainable,
        critic: Critic,
        temperature: float,
        precision: Literal["fp32", "bf16"],
        entropy_gradient: bool,
        token_bias: Tensor | None,
        device: str | torch.device | None,
    ) -> None:
        self.trainable, self.critic_config = trainable, critic
        self.temperature, self.precision = temperature, precision
        self.entropy_gradient = entropy_gradient
        self.notes: list[str] = []  # what the user should know about the paths that were chosen
        self.model: Any = model.eval()
        use_fast_attention(model)
        self.device: torch.device = next(model.parameters()).device if device is None else torch.device(device)
        self.token_bias = None if token_bias is None else token_bias.to(self.device)
        self.peft_model: Any = None
        self.critic_body: Any = None
        self.trunk: Any = None

    # what is trained ------------------------------------------------------------------------------------------

    def _changing_parameters(self, base: Any) -> set[int]:
        if isinstance(self.trainable, Full):
            return {id(p) for p in self.model.parameters()}
        if self.trainable.layers is None:
            chosen = [p for p in base.parameters() if p.ndim >= 2 and p is not base.get_input_embeddings().weight]
        else:
            chosen = top_parameters(base, self.trainable.layers)
        return {id(p) for p in chosen}

    def _head_is_linear(self) -> bool:
        """Whether logits are just `W h + b`: compared with the model's own, since some scale or cap them."""
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            linear = False
        else:
            ids = torch.arange(1, 9, device=self.device)[None] % self.model.config.vocab_size
            with torch.no_grad(), self._autocast():
                logits = self.model(input_ids=ids, use_cache=False).logits.float()
                hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
                direct = head(hidden.to(head.weight.dtype)).float()
            linear = bool(torch.allclose(logits, direct, atol=1e-3 * float(logits.abs().max()), rtol=1e-3))
        if not linear:
            self.notes.append(
                "the model's logits are more than its output layer (scaling, capping, ...): log-probabilities take"
                " the model's own forward, which is slower and needs more memory"
            )
        return linear

    def _quantize(self, adapted: set[int]) -> None:
        """Keep the adapted weights in 4 bits; the engine's copy takes what they are then."""
        if self.device.type not in ("cpu", "cuda"):
            raise HeelerError(f"--trainable.quantize nf4 runs on cpu and cuda, not on {self.device}: leave it at none")
        dtype = type_of(self.precision)
        chosen = {n: m for n, m in self.model.named_modules() if is_linear(m) and id(m.weight) in adapted}
        quantize_linear(self.model, chosen, dtype)
        rounded = self.engine_model.state_dict()
        for name in chosen:
            rounded[f"{name}.weight"].copy_(numbers(self.model.get_submodule(name).weight))

    def _add_adapters(self, lora: LoRA) -> None:
        require("peft", "lora")
        from peft import LoraConfig, get_peft_model

        found = layer_list(self.model.base_model)
        total = len(found[1]) if found else 0
        options: dict[str, Any] = {}
        if lora.layers is not None:
            options["layers_to_transform"] = list(range(total - lora.layers, total))
            options["layers_pattern"] = found[0] if found else None
            linear = {name.split(".")[-1] for name, m in found[1].named_modules() if is_linear(m)} if found else set()
            options["target_modules"] = sorted(linear)
        else:
            options["target_modules"] = "all-linear"
        options["fan_in_fan_out"] = any(type(m).__name__ == "Conv1D" for m in self.model.modules())
        self.peft_model = get_peft_model(
            self.model, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, **options)
        )
        for name, parameter in self.peft_model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()

    def _split(self, reference_model: Any) -> None:
        base = self.model.base_model
        self.top: Any = base
        self.reference_top: Any = base if reference_model is None else reference_model.base_model
        layers = getattr(self.trainable, "layers", None)
        found = layer_list(base)
        if layers is None or found is None or layers >= len(found[1]) or not self._linear_head:
            return
        halves = split(base, layers)
        if halves is None:
            self.notes.append(
                f"{type(base).__name__} cannot be split into trunk and top: the frozen layers are computed for every"
                " role, which is slower"
            )
            return
        self.trunk, self.top = halves
        if reference_model is None:
            self.reference_top = self.top
        else:
            reference_halves = split(self.reference_top, layers)
            assert reference_halves is not None
            self.reference_top = reference_halves[1]

    def _build_critic(self, critic: Critic, source: Any) -> None:
        hidden_size = int(self.model.config.get_text_config().hidden_size)
        if isinstance(critic, SeparateCritic):
            scores: nn.Linear | None = None
            if critic.model != "policy":
                (self.critic_body, scores), self.critic_uses_trunk = self._foreign_critic(critic.model), False
                hidden_size = int(self.critic_body.config.get_text_config().hidden_size)
            elif self.peft_model is not None:
                raise HeelerError(
                    "a separate critic that starts from the policy cannot be combined with LoRA: use the value head,"
                    " train the top layers, or give the critic a model of its own"
                )
            else:
                self.critic_uses_trunk = self.trunk is not None
                if source is not None:
                    self.critic_body = source
                else:
                    own = [p for p in self.top.parameters() if p.requires_grad]
                    self.critic_body = shared_copy(self.top, own)
            trained = (
                {id(p) for p in self.top.parameters() if not p.requires_grad}
                if critic.model == "policy"
                else set[int]()
            )
            for parameter in self.critic_body.parameters():
                parameter.requires_grad_(id(parameter) not in trained)
            if scores is not None:
                self.value_network = scores
                return
        start = CRITIC_START if isinstance(critic, SeparateCritic) else 0.0
        self.value_network = value_network(hidden_size, start).to(self.device)

    def _foreign_critic(self, path: str) -> tuple[Any, nn.Linear | None]:
        """The layers of another model, and the head of its score where it is a reward model with one."""
        from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

        quiet_transformers()
        path = model_folder(path)
        scores: nn.Linear | None = None
        try:
            config = AutoConfig.from_pretrained(path)
            names = getattr(config, "architectures", None) or [""]
            if names[0].endswith("ForSequenceClassification") and config.num_labels == 1:
                whole = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
                body = whole.base_model.to(self.device)
                scores = _score_head(whole, getattr(config, SCORE_KEY, {}))
                scores = None if scores is None else scores.to(self.device)
            else:
                body = AutoModel.from_pretrained(path, dtype=torch.float32).eval().to(self.device)
        except (OSError, ValueError) as error:
            raise HeelerError(f"cannot load the critic {path!r}: {str(error).splitlines()[0]}") from error
        use_fast_attention(body)
        sizes = body.config.get_text_config().vocab_size, self.model.config.get_text_config().vocab_size
        causal = (
            getattr(body.config, "is_decoder", False)
            or "causal" in str(getattr(body.config, "architectures", "")).lower()
        )
        if sizes[0] != sizes[1] or getattr(body.config, "model_type", "") in (
            "bert",
            "roberta",
            "distilbert",
            "electra",
        ):
            raise HeelerError(
                f"the critic {path!r} cannot value this policy's tokens (vocabularies {sizes[0]} and {sizes[1]},"
                f" {'causal' if causal else body.config.model_type}): it must be a causal model with the same tokenizer"
            )
        return body, scores

    def checkpoint_activations(self) -> None:
        """From now on layers keep only their input for the backward pass: less memory, a forward pass more.

        Raises:
            HeelerError: the policy or its critic has no layers that transformers marks for this.
        """
        for body in (self.model, self.critic_body):
            if body is not None and checkpoint_layers(body) == 0:
                raise HeelerError(
                    f"{type(body).__name__} has no layers that transformers marks for checkpointing: leave"
                    " --activation-checkpointing off, and lower the token budget to save memory"
                )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Two groups for the optimiser, named "policy" and "critic"."""
        policy = [p for p in self.model.parameters() if p.requires_grad]
        return [
            {"name": "policy", "params": policy},
            {"name": "critic", "params": [p for _, p in self._critic_named()]},
        ]

    def networks(self) -> list[nn.Module]:
        """The language model, and what the critic has of its own."""
        return [self.model, *([] if self.critic_body is None else [self.critic_body]), self.value_network]

    def _critic_named(self) -> Iterator[tuple[str, nn.Parameter]]:
        if self.critic_body is not None:
            for name, parameter in self.critic_body.named_parameters():
                if parameter.requires_grad:
                    yield f"body.{name}", parameter
        for name, parameter in self.value_network.named_parameters():
            yield f"head.{name}", parameter

    # forward passes -------------------------------------------------------------------------------------------

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def trunk_states(self, rows: PaddedRows) -> Tensor | None:
        """`[B, L, H]` hidden states below the trained layers, without gradient; None where there is no trunk."""
        if self.trunk is None:
            return None
        if rows.states is not None:
            return rows.states
        with torch.no_grad(), self._autocast():
            return self._hidden(self.trunk, rows, None)

    def _hidden(self, body: Any, rows: PaddedRows, states: Tensor | None) -> Tensor:
        if can_write_out(body):
            mask = None if rows.sequence is None else rows.visible
            return run_layers(body, rows.ids if states is None else states, rows.positions, mask)
        given = {"input_ids": rows.ids} if states is None else {"inputs_embeds": states}
        return body(**given, **self._apart(body, rows), use_cache=False).last_hidden_state

    def _apart(self, body: Any, rows: PaddedRows) -> dict[str, Tensor]:
        """What keeps the sequences of a shared row apart: positions, and a mask in the form of the body's attention."""
        if rows.sequence is None:
            return {}
        assert rows.positions is not None
        mask = rows.visible
        if body.config._attn_implementation == "eager":  # adds its mask
            lowest = torch.finfo(torch.float32).min
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, lowest)
        return {"position_ids": rows.positions, "attention_mask": mask}

    def _logprobs(
        self, body: Any, model: Any, rows: PaddedRows, states: Tensor | None, alone: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(logprobs [n], entropy [n], hidden [B, L, H])` by one stack of layers; `alone` as in `_by_head`."""
        if self._linear_head:
            hidden = self._hidden(body, rows, states)
            head = model.get_output_embeddings()
            chosen = hidden[rows.rows, rows.columns].to(head.weight.dtype)
            return *self._by_head(chosen, head.weight, head.bias, rows.tokens, alone), hidden
        output = model(input_ids=rows.ids, **self._apart(model, rows), use_cache=False, output_hidden_states=True)
        logprobs, entropy = self._by_softmax(output.logits[rows.rows, rows.columns], rows.tokens)
        return logprobs, entropy, output.hidden_states[-1]

    def _by_head(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, alone: bool
    ) -> tuple[Tensor, Tensor]:
        """`(logprobs [n], entropy [n])` from `hidden [n, H]`; `alone`: no gradient is asked for, entropies are NaN."""
        bias = self._biased(bias)
        if alone:
            logprobs = logprobs_alone(hidden, weight, tokens, bias=bias, temperature=self.temperature)
            return logprobs, torch.full_like(logprobs, math.nan)
        return token_logprobs(
            hidden, weight, tokens, bias=bias, temperature=self.temperature, entropy_gradient=self.entropy_gradient
        )

    def _by_softmax(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """`(logprobs [n], entropy [n])` of `tokens [n]` under a model's own logits `[n, V]`."""
        logits = logits.float()
        if self.token_bias is not None:
            logits = logits + self.token_bias
        logp = (logits / self.temperature).log_softmax(-1)
        logprobs = logp.gather(1, tokens[:, None])[:, 0]
        entropy = -(logp.exp() * logp).sum(-1)
        return logprobs, entropy if self.entropy_gradient else entropy.detach()

    def _biased(self, bias: Tensor | None) -> Tensor | None:
        if bias is None or self.token_bias is None:
            return self.token_bias if bias is None else bias
        return bias + self.token_bias

    def _values(self, hidden: Tensor | None, rows: PaddedRows, states: Tensor | None) -> Tensor:
        """`[B, L]` values at every position; `hidden` are the policy's final states where they are known."""
        if self.critic_body is not None:
            hidden = self._hidden(self.critic_body, rows, states if self.critic_uses_trunk else None)
        elif hidden is None:
            hidden = self._final(rows, states)
        elif isinstance(self.critic_config, ValueHead) and self.critic_config.detach:
            hidden = hidden.detach()
        return self.value_network(hidden.float())[..., 0]

    def _final(self, rows: Any, states: Tensor | None) -> Tensor:
        """`[B, L, H]` the policy's final hidden states."""
        return self._hidden(self.top, rows, states)

    def _rows(self, inputs: TokenInputs, include_last: bool = False) -> Any:
        """The rows of a forward pass; `include_last` for the values after each sequence's last token."""
        if include_last:
            return inputs.padded(include_last=True)
        shared = inputs.shared() if self.shares_prompts else None
        return inputs.padded() if shared is None else shared

    @torch.no_grad()
    def _can_share_prompts(self, body: Any) -> bool:
        """Whether samples of one prompt may share its tokens: tried on two, against rows of their own."""
        if not full_attention(body.config):
            return False
        ids = torch.arange(1, 9, device=self.device) % body.config.get_text_config().vocab_size
        probe = TokenInputs(
            tokens=ids[[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 7, 6, 5]],
            lengths=torch.tensor([7, 7], device=self.device),
            is_decision=torch.tensor([False] * 4 + [True] * 3, device=self.device).repeat(2),
        )
        shared, alone = probe.shared(), probe.padded()
        assert shared is not None
        with self._autocast():
            expected = self._hidden(body, alone, None)[alone.rows, alone.columns]
            try:
                states = self._hidden(body, shared, None)[shared.rows, shared.columns]
            except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError):
                return False  # it takes no mask of this form
        tolerance = 1e-4 if self.precision == "fp32" else 3e-2
        return bool(torch.allclose(states, expected, atol=tolerance * float(expected.abs().max()), rtol=tolerance))

    def evaluate(self, inputs: Inputs, pack_tokens: int | None = None) -> PolicyOutput:
        """Log-probabilities, entropies and values of the decisions, with gradients.

        With `pack_tokens` sequences share rows of that many tokens instead of being padded to the longest. Otherwise
        samples of one prompt share it where the model can (`shares_prompts`).
        """
        assert isinstance(inputs, TokenInputs)
        rows = self._rows(inputs) if pack_tokens is None else inputs.packed(pack_tokens)
        states = self.trunk_states(rows)
        with self._autocast():
            logprobs, entropy, hidden = self._logprobs(self.top, self.model, rows, states)
            values = self._values(hidden, rows, states)
        return PolicyOutput(logprobs=logprobs, entropy=entropy, values=values[rows.rows, rows.columns].float())

    @torch.no_grad()
    def score(
        self,
        inputs: TokenInputs,
        *,
        last_values: bool = False,
        known: Tensor | None = None,
        final_states: Tensor | None = None,
        attached: bool = False,
    ) -> tuple[PolicyOutput, Tensor, Tensor]:
        """What the update needs of a rollout, from one pass through the trunk.

        Args:
            inputs: the sequences.
            last_values: whether the values after the sequences' last tokens are asked for.
            known: `[n]` log-probabilities that the policy is known to give the decisions: the output layer is left out.
            final_states: `[n, H]` that they were drawn from: with `known`, a value head needs no pass of the policy.
            attached: leave the policy's output attached to its parameters; not with `known`.

        Returns:
            The policy's output on the `[n]` decisions (its entropies may be NaN unless `attached`),
            the reference's log-probabilities `[n]`, and `[I]` the values after each sequence's last token (0 unless
            `last_values`).
        """
        rows = self._rows(inputs, last_values)
        states = self.trunk_states(rows)
        after = torch.zeros(len(inputs.lengths), device=self.device)
        with torch.set_grad_enabled(attached), self._autocast():
            if known is None:
                logprobs, entropy, hidden = self._logprobs(self.top, self.model, rows, states, alone=not attached)
            else:
                logprobs, entropy, hidden = known, torch.full_like(known, math.nan), None
            if known is None or final_states is None or last_values or self.critic_body is not None:
                grid = self._values(hidden, rows, states).float()
                values = grid[rows.rows, rows.columns]
                if last_values:
                    after = grid[torch.arange(len(rows.lengths), device=grid.device), rows.lengths - 1].detach()
            else:
                values = self.value_network(final_states.float())[..., 0].float()
        with self._autocast(), self.reference_weights():
            ref_logprobs, _, _ = self._logprobs(self.reference_top, self._reference_model(), rows, states, alone=True)
        return PolicyOutput(logprobs=logprobs, entropy=entropy, values=values), ref_logprobs, after

    @torch.no_grad()
    def logprobs(self, inputs: TokenInputs, *, reference: bool = False) -> Tensor:
        """`[n]` log-probabilities of the decisions alone, by the policy or by the reference."""
        rows = self._rows(inputs)
        states = self.trunk_states(rows)
        with self._autocast():
            if not reference:
                return self._logprobs(self.top, self.model, rows, states, alone=True)[0]
            with self.reference_weights():
                return self._logprobs(self.reference_top, self._reference_model(), rows, states, alone=True)[0]

    def reference_weights(self) -> AbstractContextManager[Any]:
        """Inside, the model is the reference: adapters are off (LoRA); otherwise the reference has its own top."""
        return nullcontext() if self.peft_model is None else self.peft_model.disable_adapter()

    def _reference_model(self) -> Any:
        return self.model if self.peft_model is not None else self._reference_lm

    # weights out and in ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def published(self) -> Iterator[tuple[str, Tensor]]:
        """Changed weights by their Hugging Face names; LoRA as W + scale * B A, computed out of place."""
        if self.peft_model is None:
            parameters = dict(self.model.named_parameters())
            for name in self.changed_names:
                yield name, parameters[name].detach()
            return
        for name, module in self.model.named_modules():
            if hasattr(module, "lora_A") and "default" in getattr(module, "lora_A", {}):
                delta = module.get_delta_weight("default")
                yield f"{name}.weight", numbers(module.base_layer.weight) + delta

    @property
    def num_trunk_layers(self) -> int:
        """Layers of the frozen trunk; 0 where there is none."""
        return 0 if self.trunk is None else int(self.trunk.config.num_hidden_layers)

    @torch.no_grad()
    def export_model(self) -> Any:
        """A plain transformers model in float32 with the trained weights, adapters merged."""
        exported = copy.deepcopy(self.engine_model).float()
        exported.generation_config = copy.deepcopy(self.model.generation_config)
        parameters = dict(exported.named_parameters(remove_duplicate=False))
        for name, tensor in self.published():
            parameters[name].copy_(tensor)
        return exported

    def critic_state(self) -> dict[str, Tensor]:
        """The critic's trained weights by name."""
        return {name: p.detach().contiguous() for name, p in self._critic_named()}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything trained: policy weights (or adapters) and the critic."""
        state = {f"policy.{name}": p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        state.update({f"critic.{name}": p.detach() for name, p in self._critic_named()})
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        own = {f"policy.{name}": p for name, p in self.model.named_parameters() if p.requires_grad}
        own.update({f"critic.{name}": p for name, p in self._critic_named()})
        if own.keys() != state.keys():
            missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
            raise HeelerError(
                f"the checkpoint does not fit this model: {len(missing)} weights are missing"
                f" ({', '.join(missing[:2])}), {len(extra)} are unknown ({', '.join(extra[:2])}); resume with the"
                " config that wrote it"
            )
        for name, parameter in own.items():
            parameter.copy_(state[name])


def _score_head(classifier: Any, stored: dict[str, Any]) -> nn.Linear | None:
    """The linear score of a causal reward model as a value head, gain and bias of its normalisation included."""
    score = getattr(classifier, "score", None)
    if not isinstance(score, nn.Linear) or score.out_features != 1:
        return None
    head = nn.Linear(score.in_features, 1)
    scale, shift = float(stored.get("scale", 1.0)), float(stored.get("shift", 0.0))
    with torch.no_grad():
        head.weight.copy_(score.weight * scale)
        head.bias.fill_(shift + (0.0 if score.bias is None else float(score.bias) * scale))
    return head

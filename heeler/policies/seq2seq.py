"""An encoder-decoder model (T5, BART, Marian, ...) as a PPO policy.

    source tokens -> encoder -> states
    [start, y_1, ..., y_{T-1}], states -> decoder -> output layer -> log p(y_t), entropy
                                                 \\-> value head  -> V before y_t

Everything trains, the encoder too, so both halves run in every forward pass; a source with several translations is
encoded once for all of them. The reference is a frozen copy. Relative positions keep sequences from sharing rows:
every target has its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heeler.policies.inputs import TokenInputs
from heeler.policies.language_model import Critic, Full, LanguageModelPolicy, Trainable, ValueHead, value_network
from heeler.policies.loading import decoder_start_id
from heeler.policies.precision import round_linear
from heeler.policies.splitting import shared_copy
from heeler.types import HeelerError, Inputs, PolicyOutput


@dataclass(frozen=True)
class Seq2SeqRows:
    """Sources and targets of B sequences, padded on the right; the pads are 0.

    Attributes:
        source: `[P, S]` what the encoder reads: each distinct source once.
        source_mask: `[P, S]` 1 at real tokens. The decoder needs no mask: it is causal, and its pads come last.
        owner: `[B]` the source of each target.
        decoder_ids: `[B, T]` the decoder's start and the target, each token one place later.
        rows, columns: `[n]` where each decision is predicted.
        tokens: `[n]` the sampled tokens.
        lengths: `[B]` decoder inputs in each row.
    """

    source: Tensor
    source_mask: Tensor
    owner: Tensor
    decoder_ids: Tensor
    rows: Tensor
    columns: Tensor
    tokens: Tensor
    lengths: Tensor


def source_and_target(
    inputs: TokenInputs, decoder_start: int, *, include_last: bool = False, share: bool = True
) -> Seq2SeqRows:
    """Split sequences at their first decision: what stands before it is the source, the rest the target.

    The last token of a target predicts nothing that was sampled, so it is left out unless `include_last` (a value
    after the last decision needs it). Target tokens that are no decisions are read by the decoder, not scored.
    """
    device, lengths = inputs.tokens.device, inputs.lengths
    item, position = inputs.places
    decided = inputs.is_decision
    sources, owner = inputs.beginnings  # (B,) tokens before the target, and which source they are
    if not share:
        owner = torch.arange(len(lengths), device=device)
    fed = (lengths - sources + int(include_last)).clamp(min=1)  # (B,) decoder inputs, the start included
    in_source, target = position < sources[item], position - sources[item]
    source = inputs.tokens.new_zeros(int(owner.max()) + 1, int(sources.max()))
    at = owner[item[in_source]], position[in_source]  # written once for each target: the same tokens
    source[at] = inputs.tokens[in_source]
    source_mask = torch.zeros_like(source)
    source_mask[at] = 1
    decoder_ids = inputs.tokens.new_zeros(len(lengths), int(fed.max()))
    decoder_ids[:, 0] = decoder_start
    read = ~in_source & (target + 1 < fed[item])
    decoder_ids[item[read], target[read] + 1] = inputs.tokens[read]
    return Seq2SeqRows(
        source=source,
        source_mask=source_mask,
        owner=owner,
        decoder_ids=decoder_ids,
        rows=item[decided],
        columns=target[decided],
        tokens=inputs.tokens[decided],
        lengths=fed,
    )


class Seq2SeqPolicy(LanguageModelPolicy):
    """Policy, value head and reference over an encoder-decoder model; implements `heeler.types.Policy`.

    It differs from its base in the forward passes; weights leave and enter in the same way.

    Args:
        model: a transformers AutoModelForSeq2SeqLM in float32. It is changed in place. Sinusoidal positions
            (Marian's, Pegasus's) stay as they are.
        trainable: all weights.
        critic: a value head.
        temperature: of the distribution that is sampled from and trained.
        precision: "fp32", or "bf16" (weights in fp32 under autocast, the engine's copy in bf16).
        entropy_gradient: whether the entropy is part of the loss.
        seed: of the value network's first weights.
        token_bias: `[V]` added to the logits of policy and reference (a token mask), or None.
        share_prompts: encode a source with several targets once.
        device: where to; None leaves the model where it is.

    Raises:
        HeelerError: other ways to train, another critic, no token that the decoder starts from.
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
        if not isinstance(trainable, Full):
            raise HeelerError(
                f"{type(model).__name__} is an encoder-decoder model, which Heeler trains whole: choose trainable:full"
                f" (Full() in Python), not {type(trainable).__name__}"
            )
        if not isinstance(critic, ValueHead):
            raise HeelerError(
                f"{type(model).__name__} is an encoder-decoder model, whose values come from a head on its decoder:"
                f" choose critic:value-head (ValueHead() in Python), not {type(critic).__name__}"
            )
        self._keep(model.to(device), trainable, critic, temperature, precision, entropy_gradient, token_bias, device)
        self.decoder_start = decoder_start_id(model)
        self.shares_prompts = share_prompts
        for module in model.modules():
            if "Sinusoidal" in type(module).__name__:  # from_pretrained forgets that these are frozen
                module.requires_grad_(False)
        changing = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.changed_names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._head_scale = self._linear_head_scale()
        torch.manual_seed(seed)
        self.engine_model: Any = shared_copy(model, model.parameters() if precision == "bf16" else changing)
        if precision == "bf16":
            self.engine_model.to(torch.bfloat16)
        self.top: Any = model  # both halves run in every pass
        self.reference_top: Any = None
        self._reference_lm: Any = shared_copy(model, changing).requires_grad_(False)
        if precision == "bf16":
            round_linear(self._reference_lm)
        self.value_network = value_network(int(model.get_output_embeddings().weight.shape[1])).to(self.device)

    def _linear_head_scale(self) -> float | None:
        """The s of logits = W (s h) + b, h the decoder's final states: found by comparison with the model's own.

        T5 with tied embeddings has s = d_model ** -0.5. None where no s fits.
        """
        head = self.model.get_output_embeddings()
        if isinstance(head, nn.Linear):
            ids = torch.arange(1, 9, device=self.device)[None] % head.weight.shape[0]
            given = Seq2SeqRows(ids, torch.ones_like(ids), 0 * ids[0, :1], ids, ids[0], ids[0], ids[0], ids[0])
            with torch.no_grad():
                logits = self._whole(self.model, given).logits.float()
                hidden = self._decoder_states(self.model, given)
                bias = self._head_bias(self.model)
                for scale in (1.0, hidden.shape[-1] ** -0.5):
                    direct = nn.functional.linear(hidden * scale, head.weight, bias).float()
                    if torch.allclose(logits, direct, atol=1e-3 * float(logits.abs().max()), rtol=1e-3):
                        return scale
        self.notes.append(
            "the model's logits are more than its output layer (capping, mixing, ...): log-probabilities take the"
            " model's own forward, which is slower and needs more memory"
        )
        return None

    def _head_bias(self, model: Any) -> Tensor | None:
        """`[V]` what the model adds to its logits (BART's `final_logits_bias` is a buffer), or None."""
        bias, final = model.get_output_embeddings().bias, getattr(model, "final_logits_bias", None)
        if final is None:
            return bias
        return final[0] if bias is None else bias + final[0]

    # forward passes -------------------------------------------------------------------------------------------

    def _whole(self, model: Any, rows: Seq2SeqRows) -> Any:
        return model(
            input_ids=rows.source[rows.owner],
            attention_mask=rows.source_mask[rows.owner],
            decoder_input_ids=rows.decoder_ids,
            use_cache=False,
            output_hidden_states=True,
        )

    def _decoder_states(self, model: Any, rows: Seq2SeqRows) -> Tensor:
        """`[B, T, H]` final hidden states of the decoder."""
        encoded = model.get_encoder()(input_ids=rows.source, attention_mask=rows.source_mask).last_hidden_state
        return model.get_decoder()(
            input_ids=rows.decoder_ids,
            encoder_hidden_states=encoded[rows.owner],
            encoder_attention_mask=rows.source_mask[rows.owner],
            use_cache=False,
        ).last_hidden_state

    def _logprobs(
        self, body: Any, model: Any, rows: Any, states: Tensor | None, alone: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(logprobs [n], entropy [n], hidden [B, T, H])`; `body` and `states` are the causal models' trunk and top."""
        if self._head_scale is not None:
            hidden = self._decoder_states(model, rows)
            weight = model.get_output_embeddings().weight
            chosen = hidden[rows.rows, rows.columns]
            chosen = (chosen if self._head_scale == 1.0 else chosen * self._head_scale).to(weight.dtype)
            return *self._by_head(chosen, weight, self._head_bias(model), rows.tokens, alone), hidden
        output = self._whole(model, rows)
        logprobs, entropy = self._by_softmax(output.logits[rows.rows, rows.columns], rows.tokens)
        return logprobs, entropy, output.decoder_hidden_states[-1]

    def _final(self, rows: Any, states: Tensor | None) -> Tensor:
        return self._decoder_states(self.model, rows)

    def _rows(self, inputs: TokenInputs, include_last: bool = False) -> Seq2SeqRows:
        return source_and_target(inputs, self.decoder_start, include_last=include_last, share=self.shares_prompts)

    def evaluate(self, inputs: Inputs, pack_tokens: int | None = None) -> PolicyOutput:
        """Log-probabilities, entropies and values of the decisions, with gradients.

        Raises:
            HeelerError: `pack_tokens` is given.
        """
        if pack_tokens is not None:
            raise HeelerError("sequences of an encoder-decoder model cannot share rows: leave packing off")
        return super().evaluate(inputs)

    @torch.no_grad()
    def export_model(self) -> Any:
        """The trained model, in float32 whatever the precision."""
        return copy.deepcopy(self.model)

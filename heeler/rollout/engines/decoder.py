"""One decoding step of models like Llama, written out.

A step of few rows is many small operations between its matrix products, and a general framework around each of them.
Here stand only the operations, and products that read the same input are one product where weights are packed:

    x = embedding of each row's token                                   [B, H]
    for every layer:
        q, k, v = norm(x) @ [Wq Wk Wv];  q, k rotated by position       one product
        x += attention(q, the row's keys and values) @ Wo
        x += (act(gate) * up) @ Wd,  gate, up = norm(x) @ [Wg Wu]       one product
    logits = norm(x) @ W

Prompts of more than a token are read by the model itself, whose cache the step goes on writing. Other models, and
those that somebody has hooked into or changed, take every step through transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heeler.policies.splitting import full_attention
from heeler.rollout.engines import packing
from heeler.rollout.engines.attention import NAME, attend
from heeler.rollout.engines.packing import Joined, can_pack

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class Layer:
    """The parts of a layer; `norms` of queries and keys where the model has them."""

    before_attention: Any
    read: Joined
    norms: tuple[Any, Any] | None
    attended: Joined
    before_mlp: Any
    gate_up: Joined
    act: Any
    down: Joined


class Decoder:
    """The step of one model; it holds the model's layers, so weights are read where they are.

    Args:
        model: a causal LM for which `can_decode` holds.
        trunk_layers: give back the hidden states after this many layers; None gives none.

    Attributes:
        products: what multiplies matrices in a step and can be packed.
    """

    def __init__(self, model: Any, trunk_layers: int | None = None) -> None:
        base = model.model
        self.embedding, self.rotary, self.norm = base.embed_tokens, base.rotary_emb, base.norm
        self.trunk_layers = trunk_layers
        self.width = base.layers[0].self_attn.head_dim
        self.heads = base.layers[0].self_attn.q_proj.out_features // self.width
        self.groups = base.layers[0].self_attn.k_proj.out_features // self.width
        self.scale = base.layers[0].self_attn.scaling
        self.layers = [_layer(layer) for layer in base.layers]
        self.output = Joined(model.lm_head)
        products = [p for layer in self.layers for p in (layer.read, layer.attended, layer.gate_up, layer.down)]
        self.products = [*products, self.output] if can_pack(model.lm_head.weight) else []

    def __call__(
        self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Any
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Read one token of each row.

        Args:
            ids: `[B, 1]` the tokens.
            positions: `[B, 1]` of each in its row.
            mask: `[B, n]` which columns each row sees, its own token included; None where it is all.
            cache: of buffered layers, to which the tokens' keys and values are added.

        Returns:
            `(logits [B, V], states after the trunk [B, 1, H] or None, final states [B, 1, H])`.
        """
        x = self.embedding(ids[:, 0])
        cos, sin = self.rotary(x[:, None], positions)
        hidden: Tensor | None = None  # added to the attention's logits
        if mask is not None:
            hidden = x.new_zeros(mask.shape).masked_fill_(mask == 0, -torch.inf)[:, None, None]
        trunk: Tensor | None = None
        for number, (layer, kept) in enumerate(zip(self.layers, cache.layers, strict=True)):
            spoken = layer.read(_norm(layer.before_attention, x)).view(len(x), -1, self.width)
            turned = self._turned(layer, spoken[:, : self.heads + self.groups], cos, sin)
            keys, values = kept.update(turned[:, self.heads :, None], spoken[:, self.heads + self.groups :, None])
            attended = attend(turned[:, : self.heads], keys, values, hidden, self.scale)
            x = layer.attended(attended.flatten(1)).add_(x)
            gate, up = layer.gate_up(_norm(layer.before_mlp, x)).chunk(2, dim=-1)
            x = layer.down(layer.act(gate).mul_(up)).add_(x)
            if number + 1 == self.trunk_layers:
                trunk = x
        x = _norm(self.norm, x)
        return self.output(x), None if trunk is None else trunk[:, None], x[:, None]

    def _turned(self, layer: Layer, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`[B, heads + groups, D]` queries and keys, rotated by their rows' positions (`cos`, `sin` `[B, 1, D]`)."""
        if layer.norms is not None:
            of_queries, of_keys = layer.norms
            queries, keys = heads[:, : self.heads], heads[:, self.heads :]
            heads = torch.cat([_norm(of_queries, queries), _norm(of_keys, keys)], dim=1)
        half = self.width // 2
        turned = heads * cos
        turned[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
        turned[..., half:].addcmul_(heads[..., :half], sin[..., half:])
        return turned


def _layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        before_attention=layer.input_layernorm,
        read=Joined(attention.q_proj, attention.k_proj, attention.v_proj),
        norms=(attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None,
        attended=Joined(attention.o_proj),
        before_mlp=layer.post_attention_layernorm,
        gate_up=Joined(mlp.gate_proj, mlp.up_proj),
        act=mlp.act_fn,
        down=Joined(mlp.down_proj),
    )


def _norm(norm: Any, x: Tensor) -> Tensor:
    """RMSNorm as the models have it; torch's own takes twice as long on a CPU."""
    numbers = x.float()
    scale = numbers.square().mean(-1, keepdim=True).add_(norm.variance_epsilon).rsqrt_()
    return (numbers * scale).to(x.dtype).mul_(norm.weight)


def can_decode(model: Any) -> bool:
    """Whether the step is written for this model: of a known family, nothing in it exchanged, on a CPU."""
    kind = type(model)
    if kind.__name__ not in FAMILIES or not kind.__module__.startswith("transformers.models."):
        return False
    known = ("torch.nn.modules.", "transformers.activations", kind.__module__, packing.__name__)
    return (
        all(type(module).__module__.startswith(known) for module in model.modules())
        and full_attention(model.config)
        and len(model.model.layers) == model.config.num_hidden_layers
        and model.config._attn_implementation == NAME
        and model.lm_head.weight.device.type == "cpu"
    )

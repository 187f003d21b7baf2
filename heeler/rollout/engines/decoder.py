"""Models like Llama, written out for sampling: one pass over prompts, or over one token of every row.

A step of few rows is many small operations between its matrix products, and a general framework around each of them.
Here stand only the operations, and products that read the same input are one product where weights are packed:

    x = embeddings of the tokens                                        [N, H]
    for every layer:
        q, k, v = norm(x) @ [Wq Wk Wv];  q, k rotated by position       one product
        x += attention(q, the rows' keys and values) @ Wo
        x += (act(gate) * up) @ Wd,  gate, up = norm(x) @ [Wg Wu]       one product
    logits = norm(x) @ W

The tokens of prompts lie behind one another, without padding. Other models, and those that somebody has hooked into
or changed, sample through transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from heeler.policies.llama import like_llama
from heeler.rollout.engines import packing
from heeler.rollout.engines.kernels import Kernels, for_model
from heeler.rollout.engines.packing import Joined, can_pack
from heeler.rollout.engines.plain import Plain, Tokens
from heeler.rollout.engines.slots import Slots


@dataclass(frozen=True)
class Layer:
    """The parts of a layer; `norms` of queries and keys where the model has them."""

    read: Joined
    norms: tuple[Any, Any] | None
    attended: Joined
    before_mlp: Any
    gate_up: Joined
    act: Any
    down: Joined
    next_norm: Any


class Decoder:
    """The passes of one model; it holds the model's layers, so weights are read where they are.

    Args:
        model: a causal LM for which `can_decode` holds.
        trunk_layers: give back the hidden states after this many layers; None gives none.

    Attributes:
        products: what multiplies matrices in a step and can be packed.
        between: what happens between the products, compiled or by torch.
    """

    def __init__(self, model: Any, trunk_layers: int | None = None) -> None:
        base = model.model
        self.embedding, self.rotary, self.first_norm = (
            base.embed_tokens,
            base.rotary_emb,
            base.layers[0].input_layernorm,
        )
        self.trunk_layers = trunk_layers
        attention = base.layers[0].self_attn
        self.width, self.scale = attention.head_dim, attention.scaling
        self.groups = attention.k_proj.out_features // self.width
        norms = [layer.input_layernorm for layer in base.layers[1:]] + [base.norm]
        self.layers = [_layer(layer, norm) for layer, norm in zip(base.layers, norms, strict=True)]
        self.output = Joined(model.lm_head)
        self.between: Kernels | Plain = for_model(model) or Plain()
        products = [p for layer in self.layers for p in (layer.read, layer.attended, layer.gate_up, layer.down)]
        self.products = [*products, self.output] if can_pack(model.lm_head.weight) else []

    @property
    def compiled(self) -> bool:
        return isinstance(self.between, Kernels)

    def slots(self, rows: int, columns: int) -> Slots:
        """Keys and values of `rows` rows of `columns` tokens, empty."""
        like = self.embedding.weight
        return Slots(len(self.layers), rows, self.groups, columns, self.width, like=like, anywhere=self.compiled)

    def __call__(self, tokens: Tokens, slots: Slots) -> tuple[Tensor, Tensor | None, Tensor]:
        """Read tokens; their keys and values join those of their rows.

        Returns:
            `(logits [P, V], states after the trunk [N, H] or None, final states [P, H])`: logits and final states are
            those after every token, or after the last one of each prompt.
        """
        between = self.between
        x = self.embedding(tokens.ids)
        cos, sin = self.rotary(x[None], tokens.positions[None])
        n = between.add_norm(x, None, self.first_norm)
        trunk: Tensor | None = None
        for number, layer in enumerate(self.layers):
            kept = slots.keys[number], slots.values[number]
            attended = between.attend(layer.read(n), (cos[0], sin[0]), layer.norms, *kept, tokens, self.scale)
            n = between.add_norm(x, layer.attended(attended), layer.before_mlp)
            n = between.add_norm(x, layer.down(between.gate(layer.gate_up(n), layer.act)), layer.next_norm)
            if number + 1 == self.trunk_layers:
                trunk = x.clone()
        final = n if tokens.lengths is None else n[tokens.ends()]
        return self.output(final), trunk, final


def _layer(layer: Any, next_norm: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        read=Joined(attention.q_proj, attention.k_proj, attention.v_proj),
        norms=(attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None,
        attended=Joined(attention.o_proj),
        before_mlp=layer.post_attention_layernorm,
        gate_up=Joined(mlp.gate_proj, mlp.up_proj),
        act=mlp.act_fn,
        down=Joined(mlp.down_proj),
        next_norm=next_norm,
    )


def can_decode(model: Any) -> bool:
    """Whether the step is written for this model: of a known family, nothing in it exchanged."""
    return type(model).__name__.endswith("ForCausalLM") and like_llama(model, packing.__name__)

"""Layers of models like Llama, written out: the forward pass, and the backward pass by hand.

    n = norm(x) * w1                                            q, k, v = n Wq, n Wk, n Wv      one product
    y = x + attention(turned q, turned k, v) Wo
    m = norm(y) * w2                                            g, u = m Wg, m Wu               one product
    z = y + (silu(g) * u) Wd

with norm(x) = x / rms(x). Backwards, dz being the gradient with respect to z, and the rest named alike:

    da = dz Wd^T;   du = da * silu(g);   dg = da * u * silu'(g);    dy = dz + dnorm([dg du] [Wg Wu]^T, y, w2)
    do = dy Wo^T;   dq, dk, dv through the attention by autograd;   dx = dy + dnorm([dq dk dv] [Wq Wk Wv]^T, x, w1)
    dnorm(d, x, w) = r * (d * w - h * mean(d * w * h)),             h = r * x,  r = 1 / rms(x)

Autograd around transformers' modules keeps every intermediate result for the backward pass, in bf16 several of them in
float32 as well. Here a layer keeps x, y, and the two products `[q k v]` and `[g u]`; what lies between them is cheap
and computed again. Weights are rounded to bf16 into the joined matrix of each product, and not remembered.

`tests/policies/test_llama.py` holds all of it to transformers and autograd in float64. Seconds and memory: docs/log.md,
"Where the rest of an update goes on a Zen 5". Norm: Zhang and Sennrich, 1910.07467; gate: Shazeer, 2002.05202.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from heeler.policies.attention import NAME, SHORT, short_rows
from heeler.policies.checkpointing import again_in_backward, is_checkpointed
from heeler.policies.splitting import full_attention
from heeler.runtime.products import product

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def like_llama(model: nn.Module, *others: str) -> bool:
    """Whether a model is its family's own code, nothing in it exchanged, all of it attending to everything before it.

    `others` are the names of modules whose classes may stand in for the family's.
    """
    kind = type(model)
    names = [f"{family}{role}" for family in FAMILIES for role in ("Model", "ForCausalLM")]
    if not (kind.__name__ in names and kind.__module__.startswith("transformers.models.")):
        return False
    known = ("torch.nn.modules.", "transformers.activations", kind.__module__, *others)
    config: Any = model.config
    body: Any = model.base_model
    return (
        all(type(module).__module__.startswith(known) for module in model.modules())
        and full_attention(config)
        and config._attn_implementation == NAME
        and len(body.layers) == body.config.num_hidden_layers
    )


def can_write_out(body: Any) -> bool:
    """Whether `run_layers` computes what this decoder stack does: looked up at every call, since models get changed."""
    if not (type(body).__name__.endswith("Model") and like_llama(body)):
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return all(
        not any(vars(module)[kind] for kind in hooks) and ("forward" not in vars(module) or is_checkpointed(module))
        for module in body.modules()
    ) and all(_known_mlp(layer.mlp) for layer in body.layers)


def _known_mlp(mlp: Any) -> bool:
    biased = any(product.bias is not None for product in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    return type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation") and not biased


def run_layers(body: Any, x: Tensor, positions: Tensor | None, mask: Tensor | None) -> Tensor:
    """Final hidden states `[B, L, H]` of a decoder stack for which `can_write_out` holds.

    Args:
        body: the stack; its own weights and rotary embedding are read.
        x: `[B, L]` token ids, or `[B, L, H]` what enters the first layer.
        positions: `[B, L]` of each token in its sequence; None where every row begins at 0.
        mask: `[B, 1, L, L]` bool, True where a token (first L) sees another; None where it sees all before it.
    """
    if not x.is_floating_point():
        x = body.embed_tokens(x)
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device)[None]
    device = x.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    turn = body.rotary_emb(x, positions)
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        shape = _Shape(
            compute=compute, width=attention.head_dim, scale=attention.scaling, mask=mask, turn=turn,
            eps=layer.input_layernorm.variance_epsilon,
        )  # fmt: skip
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        heads = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        weights = (
            layer.input_layernorm.weight, *(p.weight for p in qkv), *(p.bias for p in qkv),
            *(None if norm is None else norm.weight for norm in heads), attention.o_proj.weight, attention.o_proj.bias,
            layer.post_attention_layernorm.weight, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight,
        )  # fmt: skip
        step: Any = partial(_Layer.apply, shape)
        x = again_in_backward(step, x, *weights) if is_checkpointed(layer) else step(x, *weights)
    return x if isinstance(body.norm, nn.Identity) else body.norm(x)


@dataclass(frozen=True)
class _Shape:
    """What a layer computes with besides its weights.

    Attributes:
        compute: type of the products.
        width: D, of a head.
        scale: of the attention's logits.
        eps: of the norms.
        turn: cosines and sines of the positions, `[B or 1, L, D]` each.
        mask: see `run_layers`.
    """

    compute: torch.dtype
    width: int
    scale: float
    eps: float
    turn: tuple[Tensor, Tensor]
    mask: Tensor | None

    def norm(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(h * weight, h, r)` of the states `x`: the first in the products' type, h and r in float32 at least."""
        h = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        r = (torch.linalg.vector_norm(h, dim=-1, keepdim=True).square() / x.shape[-1] + self.eps).rsqrt()
        h = h * r
        return (h * weight).to(self.compute), h, r

    def joined(self, *parts: Tensor) -> Tensor:
        """The matrices behind one another, in the products' type."""
        if len(parts) == 1:
            return parts[0].to(self.compute)
        whole = parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:], dtype=self.compute)
        for place, part in zip(whole.split([len(part) for part in parts]), parts, strict=True):
            place.copy_(part)
        return whole

    def attend(self, qkv: Tensor, heads: int, groups: int, nq: Tensor | None, nk: Tensor | None) -> Tensor:
        """`[B, L, heads * D]` from `qkv [B, L, (heads + 2 groups) * D]`."""
        spoken = qkv.unflatten(-1, (-1, self.width))
        qk, v = spoken.split([heads + groups, groups], dim=2)
        if qk.dtype != torch.float64:
            qk = qk.float()
        if nq is not None and nk is not None:
            parts = zip(qk.split([heads, groups], dim=2), (nq, nk), strict=True)
            qk = torch.cat([self.norm(x, weight)[1] * weight for x, weight in parts], dim=2)
        cos, sin = (part[:, :, None].to(qk.dtype) for part in self.turn)
        first, second = qk.chunk(2, dim=-1)
        qk = torch.addcmul(qk * cos, torch.cat([-second, first], dim=-1), sin)
        q, k = (x.transpose(1, 2) for x in qk.split([heads, groups], dim=2))
        v, length = v.transpose(1, 2), qkv.shape[1]
        causal = self.mask is None and length > 1
        if length <= SHORT and qkv.device.type == "cpu":
            attended = short_rows(q, k, v, self.mask, self.scale, causal)
        else:
            attended = nn.functional.scaled_dot_product_attention(
                q.to(v.dtype), k.to(v.dtype), v, attn_mask=self.mask, is_causal=causal, scale=self.scale,
                enable_gqa=heads != groups,
            ).transpose(1, 2)  # fmt: skip
        return attended.flatten(2)


def _norm_back(d: Tensor, weight: Tensor, h: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to the states and to the weight, from `d` with respect to `h * weight`."""
    d = d.to(h.dtype)
    of_weight = d * h
    mean = (of_weight @ weight.to(h.dtype))[..., None] / h.shape[-1]
    return (d * weight).sub_(h * mean).mul_(r), of_weight.flatten(0, -2).sum(0)


def _pair(d: Tensor, x: Tensor) -> Tensor:
    """`[outputs, inputs]` gradient of a matrix: of its outputs `d [.., outputs]` and its inputs `x [.., inputs]`."""
    return product(d.flatten(0, -2).t(), x.flatten(0, -2).t())


class _Layer(torch.autograd.Function):
    """One layer: `[B, L, H]` to `[B, L, H]`. The gradient of a frozen weight is not computed."""

    @staticmethod
    def forward(
        ctx: Any, shape: _Shape, x: Tensor, w1: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, bq: Tensor | None,
        bk: Tensor | None, bv: Tensor | None, nq: Tensor | None, nk: Tensor | None, wo: Tensor, bo: Tensor | None,
        w2: Tensor, wg: Tensor, wu: Tensor, wd: Tensor,
    ) -> Tensor:  # fmt: skip
        with torch.autocast(x.device.type, enabled=False):
            qkv = product(shape.norm(x, w1)[0], shape.joined(wq, wk, wv))
            if bq is not None and bk is not None and bv is not None:
                qkv += shape.joined(bq, bk, bv)
            heads, groups = len(wq) // shape.width, len(wk) // shape.width
            spoken = product(shape.attend(qkv, heads, groups, nq, nk), shape.joined(wo))
            if bo is not None:
                spoken += bo
            y = x + spoken
            gu = product(shape.norm(y, w2)[0], shape.joined(wg, wu))
            gate, up = gu.chunk(2, dim=-1)
            z = y + product(nn.functional.silu(gate).mul_(up), shape.joined(wd))
        ctx.shape, ctx.heads, ctx.groups = shape, heads, groups
        ctx.save_for_backward(x, qkv, y, gu, w1, wq, wk, wv, bq, nq, nk, wo, bo, w2, wg, wu, wd)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, qkv, y, gu, w1, wq, wk, wv, bq, nq, nk, wo, bo, w2, wg, wu, wd = ctx.saved_tensors
        shape: _Shape = ctx.shape
        # all weights of a layer are trained, or none: a frozen layer below a trained one never comes here
        trained = ctx.needs_input_grad[3]
        with torch.autocast(x.device.type, enabled=False):
            d = dz.to(shape.compute)
            da = product(d, shape.joined(wd).t())
            gate, up = gu.chunk(2, dim=-1)
            active = nn.functional.silu(gate)
            dgu = torch.empty_like(gu)
            dg, du = dgu.chunk(2, dim=-1)
            torch.mul(da, active, out=du)
            dwd = _pair(d, active.mul_(up)) if trained else None
            dg.copy_(torch.ops.aten.silu_backward(da.mul_(up), gate))
            m, h, r = shape.norm(y, w2)
            dwgu = _pair(dgu, m) if trained else None
            dy, dw2 = _norm_back(product(dgu, shape.joined(wg, wu).t()), w2, h, r)
            dy += dz
            d = dy.to(shape.compute)
            do = product(d, shape.joined(wo).t())
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (qkv, nq, nk) if t is not None]
                norms = leaves[1:] if nq is not None else (None, None)
                attended = shape.attend(leaves[0], ctx.heads, ctx.groups, *norms)
            dqkv, *dnorms = torch.autograd.grad(attended, leaves, do)
            dnq, dnk = dnorms if dnorms else (None, None)
            dwo = _pair(d, attended.detach()) if trained else None
            dbo = None if bo is None else d.flatten(0, -2).sum(0)
            n, h, r = shape.norm(x, w1)
            dwqkv = _pair(dqkv, n) if trained else None
            dx, dw1 = _norm_back(product(dqkv, shape.joined(wq, wk, wv).t()), w1, h, r)
            dx += dy
            sizes = [len(wq), len(wk), len(wv)]
            dq, dk, dv = (None, None, None) if dwqkv is None else dwqkv.split(sizes)
            dbq, dbk, dbv = (None, None, None) if bq is None else dqkv.flatten(0, -2).sum(0).split(sizes)
            dwg, dwu = (None, None) if dwgu is None else dwgu.chunk(2)
        return None, dx.to(x.dtype), dw1, dq, dk, dv, dbq, dbk, dbv, dnq, dnk, dwo, dbo, dw2, dwg, dwu, dwd

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

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from heeler.policies.attention import NAME
from heeler.policies.checkpointing import again_in_backward, is_checkpointed
from heeler.policies.layer_parts import Parts, parts_for
from heeler.policies.logprobs import logprobs_alone, token_logprobs
from heeler.policies.splitting import full_attention
from heeler.runtime.fusing import fuse_on
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
    first = body.layers[0]
    parts = parts_for(
        x, compute=compute, width=first.self_attn.head_dim, scale=first.self_attn.scaling, mask=mask,
        turn=body.rotary_emb(x, positions), eps=first.input_layernorm.variance_epsilon,
    )  # fmt: skip
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        heads = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        weights = (
            layer.input_layernorm.weight, *(p.weight for p in qkv), *(p.bias for p in qkv),
            *(None if norm is None else norm.weight for norm in heads), attention.o_proj.weight, attention.o_proj.bias,
            layer.post_attention_layernorm.weight, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight,
        )  # fmt: skip
        step: Any = partial(_Layer.apply, parts)
        x = again_in_backward(step, x, *weights) if is_checkpointed(layer) else step(x, *weights)
    return x if isinstance(body.norm, nn.Identity) else body.norm(x)


def try_fused(body: Any, head: Tensor, compute: torch.dtype, tokens: int) -> str:
    """Fuse what lies between the products of a model, and see whether it says the same: "", or why it is not fused.

    Args:
        body: the decoder stack, for which `can_write_out` holds, on the device where functions are to be fused.
        head: `[V, H]` of the output layer.
        compute: type of the products.
        tokens: of a pass: what is tried is as large, since torch's compiler fits its kernels to the first one it sees.
    """
    device = head.device
    length = max(min(128, tokens // 2), 2)
    answers: list[list[Tensor]] = []
    for fused in (False, True):
        fuse_on(device, fused)
        try:
            with torch.autocast(device.type, dtype=compute, enabled=compute != torch.float32):
                answers.append([
                    *_answers(body, head, max(tokens // length, 2), length, None),
                    *_answers(body, head, 1, length + 1, torch.arange(length + 1, device=device)[None]),
                ])  # fmt: skip
        except Exception as error:  # whatever a compiler may raise: a missing one is no reason to stop
            fuse_on(device, False)
            first = str(error).strip().partition("\n")[0]
            return f"{type(error).__name__}: {first}"
    near = 1e-4 if compute == torch.float32 else 0.05
    for plain, other in zip(*answers, strict=True):
        if not (other - plain).norm() <= near * plain.norm():
            fuse_on(device, False)
            return "what was fused gives other numbers"
    return ""


def _answers(body: Any, head: Tensor, rows: int, length: int, positions: Tensor | None) -> list[Tensor]:
    """What a model says of random states `[rows, length, H]`, and gradients of states and norms; all in float32."""
    generator = torch.Generator().manual_seed(rows)
    shape = rows, length, head.shape[1]
    x, d = (torch.randn(shape, generator=generator).to(head.device) for _ in range(2))
    norms = [w for layer in body.layers for w in (layer.input_layernorm.weight,) if w.requires_grad]
    x.requires_grad_()
    said = run_layers(body, x, positions, None)
    hidden = said.detach()[:, -1].float().requires_grad_()
    drawn = torch.arange(rows, device=head.device) % len(head)
    logprobs, entropy = token_logprobs(hidden, head.detach(), drawn, entropy_gradient=True)
    trained, _ = token_logprobs(hidden, head.detach().requires_grad_(), drawn)
    alone = logprobs_alone(hidden.detach(), head.detach(), drawn)
    of_said = torch.autograd.grad((said.float() * d).sum(), [x, *norms])
    of_logprobs = torch.autograd.grad((logprobs + entropy + trained).sum(), hidden)
    return [t.detach().float() for t in (said, logprobs, entropy, alone, *of_said, *of_logprobs)]


def _pair(d: Tensor, x: Tensor) -> Tensor:
    """`[outputs, inputs]` gradient of a matrix: of its outputs `d [.., outputs]` and its inputs `x [.., inputs]`."""
    return product(d.flatten(0, -2).t(), x.flatten(0, -2).t())


class _Layer(torch.autograd.Function):
    """One layer: `[B, L, H]` to `[B, L, H]`. The gradient of a frozen weight is not computed."""

    @staticmethod
    def forward(
        ctx: Any, parts: Parts, x: Tensor, w1: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, bq: Tensor | None,
        bk: Tensor | None, bv: Tensor | None, nq: Tensor | None, nk: Tensor | None, wo: Tensor, bo: Tensor | None,
        w2: Tensor, wg: Tensor, wu: Tensor, wd: Tensor,
    ) -> Tensor:  # fmt: skip
        with torch.autocast(x.device.type, enabled=False):
            _, n = parts.add_norm(x, None, w1)
            qkv = product(n, parts.joined(wq, wk, wv))
            if bq is not None and bk is not None and bv is not None:
                qkv += parts.joined(bq, bk, bv)
            heads, groups = len(wq) // parts.width, len(wk) // parts.width
            spoken = product(parts.attend(qkv, heads, groups, nq, nk), parts.joined(wo))
            if bo is not None:
                spoken += bo
            y, m = parts.add_norm(x, spoken, w2)
            gu = product(m, parts.joined(wg, wu))
            z = y + product(parts.gate(gu), parts.joined(wd))
        ctx.parts, ctx.heads, ctx.groups = parts, heads, groups
        ctx.save_for_backward(x, qkv, y, gu, w1, wq, wk, wv, bq, nq, nk, wo, bo, w2, wg, wu, wd)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, qkv, y, gu, w1, wq, wk, wv, bq, nq, nk, wo, bo, w2, wg, wu, wd = ctx.saved_tensors
        parts: Parts = ctx.parts
        # all weights of a layer are trained, or none: a frozen layer below a trained one never comes here
        trained = ctx.needs_input_grad[3]
        with torch.autocast(x.device.type, enabled=False):
            d = dz.to(parts.compute)
            dgu, active = parts.gate_back(product(d, parts.joined(wd).t()), gu)
            dwd = _pair(d, active) if trained else None
            dy, d, m, dw2 = parts.norm_back(product(dgu, parts.joined(wg, wu).t()), y, w2, dz)
            dwgu = _pair(dgu, m) if trained else None
            do = product(d, parts.joined(wo).t())
            dqkv, attended, dnq, dnk = parts.attend_back(do, qkv, ctx.heads, ctx.groups, nq, nk)
            dwo = _pair(d, attended) if trained else None
            dbo = None if bo is None else d.flatten(0, -2).sum(0)
            dx, _, n, dw1 = parts.norm_back(product(dqkv, parts.joined(wq, wk, wv).t()), x, w1, dy)
            dwqkv = _pair(dqkv, n) if trained else None
            sizes = [len(wq), len(wk), len(wv)]
            dq, dk, dv = (None, None, None) if dwqkv is None else dwqkv.split(sizes)
            dbq, dbk, dbv = (None, None, None) if bq is None else dqkv.flatten(0, -2).sum(0).split(sizes)
            dwg, dwu = (None, None) if dwgu is None else dwgu.chunk(2)
        return None, dx.to(x.dtype), dw1, dq, dk, dv, dbq, dbk, dbv, dnq, dnk, dwo, dbo, dw2, dwg, dwu, dwd

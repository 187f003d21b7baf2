"""Log-probabilities and entropies of chosen tokens, without ever holding `[positions, vocabulary]`.

    z = (W h + b) / temperature,   log p(y) = z_y - logsumexp(z),   H = logsumexp(z) - sum_v p_v z_v

    d log p(y) / dz = onehot(y) - p            d H / dz = -p * (log p + H)

Only the positions that made a decision enter, in chunks. The backward pass never stores a chunk's logits:
with a frozen output layer the gradient with respect to h is formed in the forward pass and kept as `[n, H]`
(it is then one multiplication); with a trainable one the probabilities are kept where they are few, and the logits
are computed again, chunk by chunk, where they are not.

Products are computed in autocast's type where that is on, in the backward pass too, and in the weight's elsewhere.
`tests/policies/test_logprobs.py` holds the slow twin.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_LOGITS = 12 * 1024 * 1024  # logits held at once: 48 MiB in float32, which large caches nearly hold
KEPT_PROBABILITIES = 96 * 1024 * 1024  # kept for the backward pass at most: 384 MiB


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, None if bias is None else bias.to(weight.dtype)).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _softmax_parts(logits: Tensor, keep_logits: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(logsumexp [c], weights e [c, V], their sums [c, 1], entropy [c])` in few passes over the float32 logits.

    The probabilities are e / sums; whoever needs them divides what is smaller. The logits are lost unless kept.
    """
    top = logits.amax(-1, keepdim=True)
    e = torch.sub(logits, top).exp_()
    total = e.sum(-1, keepdim=True)
    lse = (top + total.log())[:, 0]
    expected = (torch.mul(e, logits) if keep_logits else logits.mul_(e)).sum(-1) / total[:, 0]
    return lse, e, total, lse - expected


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        entropy_gradient: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        n, device = hidden.shape[0], hidden.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        given, hidden, matrix = hidden, hidden.to(compute), weight.to(compute)
        logprobs, entropy = hidden.new_empty(n, dtype=torch.float32), hidden.new_empty(n, dtype=torch.float32)
        frozen_head = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        keep = frozen_head and given.requires_grad
        unit = torch.empty_like(hidden) if keep else None  # d log p / d hidden
        unit_entropy = torch.empty_like(hidden) if keep and entropy_gradient else None
        few = n * weight.shape[0] <= KEPT_PROBABILITIES and not entropy_gradient
        kept: list[Tensor] | None = [] if not frozen_head and few and any(ctx.needs_input_grad) else None
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            logits = _logits(hidden[rows], matrix, bias, temperature)  # (c, V)
            chosen = logits.gather(1, tokens[rows, None])[:, 0]
            lse, e, total, h = _softmax_parts(logits, keep_logits=unit_entropy is not None)
            logprobs[rows], entropy[rows] = chosen - lse, h
            if kept is not None:
                kept += [e, total]
            if unit is not None:
                expected = torch.matmul(e.to(compute), matrix) / total
                unit[rows] = (matrix[tokens[rows]] - expected) / temperature
            if unit_entropy is not None:
                slope = e.mul_(logits.sub_((lse - h)[:, None])).neg_()  # -e * (log p + H)
                unit_entropy[rows] = torch.matmul(slope.to(compute), matrix) / total / temperature
        ctx.temperature, ctx.chunk, ctx.entropy_gradient, ctx.frozen_head = (
            temperature,
            chunk,
            entropy_gradient,
            frozen_head,
        )
        ctx.has_bias, ctx.few, ctx.compute = bias is not None, kept is not None, compute
        if keep:
            ctx.save_for_backward(*[x for x in (unit, unit_entropy) if x is not None])
        else:
            ctx.save_for_backward(given, weight, tokens, *([] if bias is None else [bias]), *(kept or []))
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        if ctx.frozen_head:
            unit = ctx.saved_tensors[0]
            grad = grad_logprobs[:, None].to(unit.dtype) * unit
            if ctx.entropy_gradient:
                grad = grad + grad_entropy[:, None].to(unit.dtype) * ctx.saved_tensors[1]
            return grad, None, None, None, None, None, None
        hidden, weight, tokens = ctx.saved_tensors[:3]
        bias = ctx.saved_tensors[3] if ctx.has_bias else None
        grad_hidden, matrix = torch.empty_like(hidden), weight.to(ctx.compute)
        grad_weight = torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        kept = ctx.saved_tensors[4 if ctx.has_bias else 3 :] if ctx.few else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, min(start + ctx.chunk, hidden.shape[0]))
            states = hidden[rows].to(ctx.compute)
            if kept is not None:
                at = 2 * (start // ctx.chunk)
                e, total, log_ratio = kept[at], kept[at + 1], None
            else:
                logits = _logits(states, matrix, bias, ctx.temperature)
                lse, e, total, h = _softmax_parts(logits, keep_logits=ctx.entropy_gradient)
                log_ratio = logits.sub_((lse - h)[:, None]) if ctx.entropy_gradient else None  # log p + H
            slope = e * (-grad_logprobs[rows, None] / total)
            slope.scatter_add_(1, tokens[rows, None], grad_logprobs[rows, None])
            if log_ratio is not None:
                slope.addcmul_(e.mul_(-grad_entropy[rows, None] / total), log_ratio)
            slope = (slope if ctx.temperature == 1.0 else slope / ctx.temperature).to(ctx.compute)
            grad_hidden[rows] = torch.matmul(slope, matrix).to(hidden.dtype)
            if ctx.compute == weight.dtype:
                grad_weight.addmm_(slope.t(), states)
            else:  # sums over chunks keep the weight's digits
                grad_weight += torch.matmul(slope.t(), states)
            if grad_bias is not None:
                grad_bias += slope.sum(0, dtype=grad_bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    entropy_gradient: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of a linear output layer at chosen positions.

    Args:
        hidden: `[n, H]` final hidden states at the positions that made the decisions.
        weight: `[V, H]` of the output layer; its gradient is formed where it requires one.
        tokens: `[n]` int64, the tokens sampled there.
        bias: `[V]` or None.
        temperature: of the distribution sampled from.
        entropy_gradient: whether the entropy may be differentiated (it costs one matrix product more).
        chunk: positions at once; chosen from the vocabulary's size where None.

    Returns:
        `(logprobs [n], entropy [n])`, float32, nats.
    """
    if chunk is None:
        chunk = max(CHUNK_LOGITS // weight.shape[0], 16)
    result = _TokenLogprobs.apply(hidden, weight, bias, tokens, temperature, entropy_gradient, chunk)
    return result[0], result[1]  # pyright: ignore

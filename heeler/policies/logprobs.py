"""Log-probabilities and entropies of chosen tokens, without ever holding `[positions, vocabulary]` in float32.

    z = (W h + b) / temperature,   log p(y) = z_y - logsumexp(z),   H = logsumexp(z) - sum_v p_v z_v

    d log p(y) / dz = onehot(y) - p            d H / dz = -p * (log p + H)

Only the positions that made a decision enter, in chunks, and a chunk's logits become probabilities a few rows at a
time, while they lie in the processor's cache. With a frozen output layer the gradient with respect to h is formed in
the forward pass and kept as `[n, H]` (the backward pass is then one multiplication). With a trained one the
probabilities are kept where they are few, and the logits are computed again, chunk by chunk, where they are not. With
weights e = exp(z - max z) and their sum t, a position's gradient g gives

    dL / dh = g (1 - p_y) W_y - (g / t) sum_{v != y} e_v W_v,     dL / dW = the same sums over positions with h for W

so nothing of the size `[n, V]` is written in the backward pass, and 1 - p_y keeps its digits when e is in bf16.

Products are computed in autocast's type where that is on, in the backward pass too, and in the weight's elsewhere.
`tests/policies/test_logprobs.py` holds the slow twin.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from heeler.policies.kernels import kernels_for
from heeler.runtime.fusing import call_fused, fuses_on
from heeler.runtime.products import product

CHUNK_BYTES = 48 * 1024 * 1024  # of a chunk's logits, in the type of the products
BLOCK_LOGITS = 3 * 1024 * 512  # turned into probabilities at once on a CPU: 6 MiB in float32
KEPT_BYTES = 384 * 1024 * 1024  # of probabilities for the backward pass, at most


def _type_of_products(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = product(hidden, weight)
    return logits if bias is None else logits.add_(bias.to(weight.dtype))


def _chunks(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _blocks(logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """`(rows, z [rows, V] in float32)` of a chunk's logits; they may be lost."""
    size = len(logits) if logits.device.type != "cpu" else max(BLOCK_LOGITS // logits.shape[1], 1)
    for rows in _chunks(len(logits), size):
        z = logits[rows].float()
        yield rows, z if temperature == 1.0 else z.div_(temperature)


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
        compute = _type_of_products(hidden, weight)
        n, given, hidden, matrix = hidden.shape[0], hidden, hidden.to(compute), weight.to(compute)
        logprobs, entropy = hidden.new_empty(2, n, dtype=torch.float32)
        frozen_head = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        keep = frozen_head and given.requires_grad
        unit = torch.empty_like(hidden) if keep else None  # d log p / d hidden
        unit_entropy = torch.empty_like(hidden) if keep and entropy_gradient else None
        few = n * weight.shape[0] * matrix.element_size() <= KEPT_BYTES and not entropy_gradient
        trained = not frozen_head and few and any(ctx.needs_input_grad)
        kept = hidden.new_empty(n, weight.shape[0]) if trained else None
        sums = hidden.new_empty(n, 1, dtype=torch.float32)
        for rows in _chunks(n, chunk):
            logits = _logits(hidden[rows], matrix, bias)  # (c, V)
            e = kept[rows] if kept is not None else (logits if unit is not None else None)
            slope = torch.empty_like(logits) if unit_entropy is not None else None
            found = _softmax_rows(logits, tokens[rows], temperature, e, slope)
            logprobs[rows], entropy[rows], sums[rows, 0] = found
            if unit is not None and e is not None:
                rest = product(e, matrix.t()) / sums[rows]
                share = -torch.expm1(logprobs[rows, None])  # 1 - p
                unit[rows] = (share * matrix[tokens[rows]] - rest) / temperature
            if unit_entropy is not None and slope is not None:
                unit_entropy[rows] = product(slope, matrix.t()) / sums[rows] / temperature
        ctx.temperature, ctx.chunk, ctx.entropy_gradient = temperature, chunk, entropy_gradient
        ctx.has_bias, ctx.few, ctx.compute, ctx.frozen_head = bias is not None, kept is not None, compute, frozen_head
        if keep:
            ctx.save_for_backward(*[x for x in (unit, unit_entropy) if x is not None])
        else:
            known = [] if kept is None else [logprobs, sums, kept]
            ctx.save_for_backward(given, weight, tokens, *([] if bias is None else [bias]), *known)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        if ctx.frozen_head:
            unit = ctx.saved_tensors[0]
            grad = grad_logprobs[:, None].to(unit.dtype) * unit
            if ctx.entropy_gradient:
                grad = grad + grad_entropy[:, None].to(unit.dtype) * ctx.saved_tensors[1]
            return grad, None, None, None, None, None, None
        hidden, weight, tokens = ctx.saved_tensors[:3]
        bias = ctx.saved_tensors[3] if ctx.has_bias else None
        matrix, scaled = weight.to(ctx.compute), grad_logprobs / ctx.temperature
        if ctx.few:
            grads = _from_probabilities(hidden, matrix, tokens, scaled, *ctx.saved_tensors[-3:])
        else:
            of_entropy = grad_entropy / ctx.temperature if ctx.entropy_gradient else None
            grads = _from_logits(hidden, matrix, bias, tokens, scaled, of_entropy, ctx.temperature, ctx.chunk)
        grad_hidden, grad_weight, grad_bias = grads
        grad_bias = None if bias is None else grad_bias.to(bias.dtype)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), grad_bias, None, None, None, None


def _softmax_rows(
    logits: Tensor, tokens: Tensor, temperature: float, e: Tensor | None, slope: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`(log p [c], H [c], sums [c])` of `logits [c, V]` and `tokens [c]`, compiled where that is possible.

    `e [c, V]`, which may be the logits, gets the weights, 0 for the chosen ones; the probabilities are e / sums.
    `slope [c, V]` gets the sums times dH / dz. Both may be None.
    """
    kernels = kernels_for(logits)
    if kernels is not None:
        return kernels.softmax(logits, tokens, temperature, e, slope)
    if fuses_on(logits.device):
        logprob, h, sums, weights, slopes = call_fused(
            _softmax, logits, tokens[:, None], temperature, e is not None, slope is not None
        )
        if e is not None:
            e.copy_(weights)
        if slope is not None:
            slope.copy_(slopes)
        return logprob, h, sums
    found = logits.new_empty(3, len(logits), dtype=torch.float32)
    for part, z in _blocks(logits, temperature):
        chosen = tokens[part, None]
        top = z.amax(-1, keepdim=True)
        weights = torch.sub(z, top).exp_()
        sums = weights.sum(-1, keepdim=True)
        lse = top + sums.log()
        logprob = z.gather(1, chosen) - lse
        if slope is None:
            h = lse - z.mul_(weights).sum(-1, keepdim=True) / sums
        else:
            h = lse - torch.mul(weights, z).sum(-1, keepdim=True) / sums
            slope[part] = z.sub_(lse - h).mul_(weights).neg_()
        if e is not None:
            e[part] = weights.scatter_(1, chosen, 0.0)
        found[:, part] = torch.cat([logprob, h, sums], 1).t()
    return found[0], found[1], found[2]


def _softmax(
    logits: Tensor, chosen: Tensor, temperature: float, with_weights: bool, with_slope: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """`_softmax_rows` in one go, for torch.compile, of `chosen [c, 1]`: `(log p, H, sums, weights, slope)`."""
    z = logits.float() / temperature
    top = z.amax(-1, keepdim=True)
    weights = (z - top).exp()
    sums = weights.sum(-1, keepdim=True)
    lse = top + sums.log()
    h = lse - (z * weights).sum(-1, keepdim=True) / sums
    slope = ((lse - h - z) * weights).to(logits.dtype) if with_slope else None
    own = torch.arange(z.shape[1], device=z.device) == chosen
    kept = weights.masked_fill(own, 0.0).to(logits.dtype) if with_weights else None
    return (z.gather(1, chosen) - lse)[:, 0], h[:, 0], sums[:, 0], kept, slope


def _from_probabilities(
    hidden: Tensor, matrix: Tensor, tokens: Tensor, grads: Tensor, logprobs: Tensor, sums: Tensor, e: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias from `e [n, V]`, whose chosen entries are 0."""
    chosen = (-torch.expm1(logprobs) * grads)[:, None]  # g (1 - p)
    others = -grads[:, None] / sums
    grad_hidden = product(e, matrix.t()) * others + chosen * matrix[tokens]
    grad_weight = product(e.t(), (hidden * others).to(e.dtype).t()).float()
    grad_weight.index_add_(0, tokens, chosen * hidden)
    grad_bias = torch.matmul(e.t(), others.to(e.dtype))[:, 0].float().index_add_(0, tokens, chosen[:, 0])
    return grad_hidden, grad_weight, grad_bias


def _from_logits(
    hidden: Tensor, matrix: Tensor, bias: Tensor | None, tokens: Tensor, grads: Tensor, of_entropy: Tensor | None,
    temperature: float, chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same with the logits computed again, chunk by chunk; with the gradients of the entropies where they count."""
    grad_hidden = torch.empty_like(hidden, dtype=torch.float32)
    grad_weight = torch.zeros_like(matrix, dtype=torch.float32)  # sums over chunks keep their digits in float32
    grad_bias = grad_weight.new_zeros(len(matrix))
    for rows in _chunks(hidden.shape[0], chunk):
        states = hidden[rows].to(matrix.dtype)
        e = _logits(states, matrix, bias)
        slope = None if of_entropy is None else torch.empty_like(e)
        logprobs, _, sums = _softmax_rows(e, tokens[rows], temperature, e, slope)
        found = _from_probabilities(hidden[rows], matrix, tokens[rows], grads[rows], logprobs, sums[:, None], e)
        grad_hidden[rows] = found[0]
        grad_weight += found[1]
        grad_bias += found[2]
        if of_entropy is not None and slope is not None:
            slope.mul_((of_entropy[rows] / sums)[:, None])
            grad_hidden[rows] += product(slope, matrix.t())
            grad_weight += product(slope.t(), states.t())
            grad_bias += slope.sum(0, dtype=torch.float32)
    return grad_hidden, grad_weight, grad_bias


def _chunk_of(hidden: Tensor, weight: Tensor, chunk: int | None) -> int:
    if chunk is not None:
        return chunk
    row = weight.shape[0] * torch.empty(0, dtype=_type_of_products(hidden, weight)).element_size()
    return max(CHUNK_BYTES // row, 16)


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
    chunk = _chunk_of(hidden, weight, chunk)
    result = _TokenLogprobs.apply(hidden, weight, bias, tokens, temperature, entropy_gradient, chunk)
    return result[0], result[1]  # pyright: ignore


@torch.no_grad()
def logprobs_alone(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """`[n]` of `token_logprobs`, to the last digit, without the entropies and without a gradient: in less time."""
    compute = _type_of_products(hidden, weight)
    hidden, matrix = hidden.to(compute), weight.to(compute)
    logprobs = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    kernels = kernels_for(hidden)
    for rows in _chunks(len(logprobs), _chunk_of(hidden, weight, chunk)):
        logits = _logits(hidden[rows], matrix, bias)
        if kernels is not None or fuses_on(logits.device):
            logprobs[rows] = _softmax_rows(logits, tokens[rows], temperature, None)[0]
            continue
        for part, z in _blocks(logits, temperature):
            at = slice(rows.start + part.start, rows.start + part.stop)
            top, chosen = z.amax(-1), z.gather(1, tokens[at, None])[:, 0]
            logprobs[at] = chosen - (top + z.sub_(top[:, None]).exp_().sum(-1).log())
    return logprobs

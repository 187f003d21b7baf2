"""Attention on a CPU, where torch's own is slow: short rows, and single tokens in sampling.

Both read the heads of a group, which share keys and values, as the queries of one head. That needs no copy of the keys:

    [B, heads, T, D] -> [B, groups, heads / groups * T, D]        against keys `[B, groups, S, D]`

Where a query sees few keys, attention is two products of small matrices and a softmax between them. torch's blocked
kernel is made for rows of thousands of tokens: in bf16 it takes up to 5.6 times as long for both passes of short ones
(docs/benchmarks/training_attention.md). Single tokens that see many keys take torch's kernel, without the copies that
transformers makes where there is a mask (docs/benchmarks/decoding_parts.md).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

NAME = "heeler"
SHORT = 128  # keys up to which plain products are as fast or faster, both passes together


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """In the form of transformers' attention functions.

    Args:
        module: the layer, whose `is_causal` holds where there is no mask.
        query: `[B, heads, T, D]`.
        key, value: `[B, groups, S, D]`.
        attention_mask: `[B or 1, 1 or heads, T, S]`, True where a query sees a key or else a float that is added; or
            None.
        options: `scaling`, and what transformers' "sdpa" takes.

    Returns:
        `([B, T, heads, D], None)`: what "sdpa" gives, to the rounding of its type.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    asked, columns = query.shape[2], key.shape[2]
    plain = options.get("position_bias") is None and not options.get("dropout")
    few = asked <= SHORT and columns <= SHORT and query.device.type == "cpu"
    if plain and few and (attention_mask is None or attention_mask.shape[1] == 1):
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        return short_rows(query, key, value, attention_mask, options.get("scaling"), bool(causal) and asked > 1), None
    if plain and asked == 1 and query.shape[1] != key.shape[1]:
        return attend(query[:, :, 0], key, value, attention_mask, options.get("scaling"))[:, None], None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def short_rows(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, causal: bool
) -> Tensor:
    """`[B, T, heads, D]`: attention by plain products in float32; shapes as in `attention`.

    A query that its mask shows nothing attends to everything: it is padding, and must not become NaN.
    """
    batch, heads, asked, width = query.shape
    groups, columns = key.shape[1], key.shape[2]
    shared = heads // groups
    q = query.float().reshape(batch * groups, shared * asked, width)  # heads of a group lie side by side
    k, v = (part.float().reshape(batch * groups, columns, part.shape[-1]) for part in (key, value))
    factor: float = 1 / math.sqrt(width) if scale is None else scale
    lowest = torch.finfo(torch.float32).min
    with torch.autocast("cpu", enabled=False):
        if mask is None and causal:
            logits = torch.baddbmm(_causal(asked, columns, shared), q, k.transpose(1, 2), alpha=factor)
        else:
            logits = torch.bmm(q * factor, k.transpose(1, 2))
        if mask is not None:
            if mask.dtype == torch.bool:  # few numbers: the heads share it
                mask = torch.zeros(mask.shape).masked_fill_(~mask, lowest)
            logits.view(batch, heads, asked, columns).add_(mask.float().clamp(lowest))
        attended = torch.bmm(logits.softmax(-1), v)
    return attended.view(batch, heads, asked, -1).transpose(1, 2).to(value.dtype)


@lru_cache(maxsize=64)
def _causal(asked: int, columns: int, shared: int) -> Tensor:
    """`[1, shared * asked, columns]`: -inf where a query does not see a key; queries and keys begin together."""
    hidden = torch.full((asked, columns), -torch.inf).triu(1)
    return hidden.repeat(shared, 1)[None]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """`[B, heads, D]`: what each row's `query [B, heads, D]` attends to."""
    batch, heads, width = query.shape
    groups, columns = key.shape[1], key.shape[2]
    if columns <= SHORT and query.device.type == "cpu":
        return short_rows(query[:, :, None], key, value, mask, scale, causal=False)[:, 0]
    grouped = query.reshape(batch, groups, heads // groups, width)
    attended = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return attended.reshape(batch, heads, value.shape[-1])


def use_fast_attention(model: Any) -> None:
    """Let a transformers model that uses "sdpa" attend by `attention`; others are left as they are."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME

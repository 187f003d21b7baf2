"""Attention of single tokens in models whose heads share keys and values (grouped queries).

transformers copies the keys and values once for every head of a group where there is a mask, which takes several times
as long as the attention itself (docs/benchmarks/decoding_parts.md). Here the heads of a group are read as the queries
of one head, which needs no copy:

    [B, heads, 1, D] -> [B, groups, heads / groups, D]        against keys `[B, groups, n, D]`, mask `[B, 1, 1, n]`
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAME = "heeler_grouped"
SHORT = 128  # columns up to which torch's own grouping is as fast on a CPU


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """In the form of transformers' attention functions: `[B, 1, heads, D]` for one token, else what "sdpa" gives."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    plain = options.get("position_bias") is None and not options.get("dropout")
    short = attention_mask is None and key.shape[2] < SHORT
    if query.shape[2] != 1 or not plain or query.shape[1] == key.shape[1] or short:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return attend(query[:, :, 0], key, value, attention_mask, options.get("scaling"))[:, None], None


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """`[B, heads, D]`: what each row's `query [B, heads, D]` attends to."""
    batch, heads, width = query.shape
    groups = key.shape[1]
    grouped = query.reshape(batch, groups, heads // groups, width)
    attended = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return attended.reshape(batch, heads, value.shape[-1])


def use_grouped_attention(model: Any) -> None:
    """Let a transformers model that uses "sdpa" attend by `grouped_attention`; others are left as they are."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME

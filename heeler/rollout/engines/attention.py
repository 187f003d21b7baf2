"""Attention of single tokens in models whose heads share keys and values (grouped queries).

transformers copies the keys and values once for every head of a group where there is a mask: with 64 rows of 300
tokens that copy takes ten times as long as the attention itself. Here the heads of a group are read as the queries of
one head, which needs no copy:

    [B, heads, 1, D] -> [B, groups, heads / groups, D]        against keys `[B, groups, n, D]`, mask `[B, 1, 1, n]`

Rows of a pool end in the same column and begin where their length says. A few rows at a time, the columns before the
first of their tokens are left out:

    . . . . . . a a     read from here ->  a a
    . . . . . b b b                        b b b
    c c c c c c c c     c c c c c c c c
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAME = "heeler_grouped"
SHORT = 128  # columns up to which torch's own grouping is as fast on a CPU
ROWS = 8  # read together


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """In the form of transformers' attention functions: `[B, 1, heads, D]` for one token, else what "sdpa" gives."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    heads, length = query.shape[1], query.shape[2]
    plain = options.get("position_bias") is None and not options.get("dropout")
    parts = row_parts(attention_mask, key.shape[2]) if length == 1 and plain else None
    short = attention_mask is None and key.shape[2] < SHORT
    if length != 1 or not plain or (parts is None and (heads == key.shape[1] or short)):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    attended = attend(query[:, :, 0], key, value, attention_mask, parts, options.get("scaling"))
    return attended[:, None], None


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, parts: Parts | None, scale: float | None
) -> Tensor:
    """`[B, heads, D]`: what each row's `query [B, heads, D]` attends to, with `row_parts` of the mask if any."""
    batch, heads, width = query.shape
    groups = key.shape[1]
    grouped = query.reshape(batch, groups, heads // groups, width)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if parts is None:
        attended = sdpa(grouped, key, value, attn_mask=mask, scale=scale)
    else:
        assert mask is not None
        attended = query.new_empty(batch, groups, heads // groups, value.shape[-1])
        for rows, columns in parts:
            attended[rows] = sdpa(
                grouped[rows], key[rows, :, columns], value[rows, :, columns], attn_mask=mask[rows, ..., columns],
                scale=scale,
            )  # fmt: skip
    return attended.reshape(batch, heads, value.shape[-1])


Parts = list[tuple[slice, slice]]
_last: tuple[Tensor | None, Parts | None] = (None, None)  # the last mask and its parts: all layers get the same mask


def row_parts(mask: Tensor | None, columns: int) -> Parts | None:
    """`(rows, columns that they need)` of a mask `[B, 1, 1, n]` that begins with hidden columns.

    None where there is nothing to leave out: on a GPU, where few columns are read, or where less than a tenth goes.
    """
    global _last
    if mask is None or mask.dtype != torch.bool or mask.shape[1] != 1 or mask.device.type != "cpu":
        return None
    if columns < SHORT or len(mask) <= ROWS:
        return None
    seen, parts = _last  # taken at once: another thread may sample too
    if seen is not mask:
        starts = mask[:, 0, 0].int().argmax(1)  # the first column that each row sees
        parts = [
            (slice(row, min(row + ROWS, len(mask))), slice(int(starts[row : row + ROWS].min()), None))
            for row in range(0, len(mask), ROWS)
        ]
        needed = sum((rows.stop - rows.start) * (columns - kept.start) for rows, kept in parts)
        parts = parts if needed < 0.9 * len(mask) * columns else None
        _last = mask, parts
    return parts


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

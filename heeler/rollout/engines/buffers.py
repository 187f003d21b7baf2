"""Keys and values in preallocated buffers, as a cache that transformers' models read and write."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class BufferedLayer(DynamicLayer):
    """Keys and values `[B, heads, capacity, D]`, written in place; readers get the filled part."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            batch, heads, _, width = key_states.shape
            self.keys = key_states.new_empty(batch, heads, self.capacity, width)
            self.values = value_states.new_empty(batch, heads, self.capacity, value_states.shape[-1])
        end = self.length + key_states.shape[2]
        assert self.keys is not None and self.values is not None
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def joined(self, stay: Tensor, other: BufferedLayer, width: int, capacity: int) -> BufferedLayer:
        """The rows `stay` and those of `other`, the last `width` columns of both."""
        layer = BufferedLayer(capacity)
        layer.dtype, layer.device, layer.is_initialized, layer.length = self.dtype, self.device, True, width
        for name in ("keys", "values"):
            mine, theirs = getattr(self, name), getattr(other, name)
            buffer = mine.new_empty(len(stay) + len(theirs), mine.shape[1], capacity, mine.shape[3])
            parts = (buffer[: len(stay)], mine, self.length, stay), (buffer[len(stay) :], theirs, other.length, None)
            for part, source, length, rows in parts:
                taken = min(length, width)
                columns = source[:, :, length - taken : length]
                part[:, :, width - taken : width] = columns if rows is None else columns[rows]
                part[:, :, : width - taken] = 0  # nobody sees it, but 0 times what lay there might be NaN
            setattr(layer, name, buffer)
        return layer


def make_cache(config: Any, capacity: int | None) -> Cache:
    """An empty cache: buffers of `capacity` columns in every layer, or transformers' own for the model where None."""
    if capacity is None:
        return DynamicCache(config=config)
    return Cache(
        layers=[BufferedLayer(capacity) for _ in range(config.get_text_config(decoder=True).num_hidden_layers)]
    )


def join_caches(cache: Any, stay: Tensor, other: Any, width: int, capacity: int) -> Cache:
    """The rows `stay` of one cache and all rows of another, the last `width` columns of both."""
    pairs = zip(cache.layers, other.layers, strict=True)
    return Cache(layers=[mine.joined(stay, theirs, width, capacity) for mine, theirs in pairs])

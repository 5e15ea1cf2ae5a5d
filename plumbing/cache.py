"""The cache of keys and values while responses are written."""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """A layer of the cache with spare room: Transformers' own copies all keys and values for every new token.

    `keys` and `values`, [b, heads, t, d] each, are views of the first t places of the two rooms.
    """

    key_room = None  # [b, heads, more than t, d]
    value_room = None

    def update(self, key_states, value_states, *args, **kwargs):
        """Add the keys and values of new tokens, [b, heads, new, d] each; returns all there are."""
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if start < 128:  # copying so little is faster
            return super().update(key_states, value_states)
        if self.key_room is None or end > self.key_room.shape[2]:
            self.key_room = self.with_room(self.keys, start // 2)
            self.value_room = self.with_room(self.values, start // 2)
        self.key_room[:, :, start:end] = key_states
        self.value_room[:, :, start:end] = value_states
        self.keys = self.key_room[:, :, :end]
        self.values = self.value_room[:, :, :end]
        return self.keys, self.values

    def reorder_cache(self, beam_idx):
        """Take these rows, in this order, some of them repeatedly. The copy has no room yet."""
        super().reorder_cache(beam_idx)
        self.key_room = None
        self.value_room = None

    @staticmethod
    def with_room(x: torch.Tensor, places: int) -> torch.Tensor:
        """[b, heads, t, d] -> [b, heads, t + places, d]"""
        return torch.nn.functional.pad(x, (0, 0, 0, places))


def roomy_cache(config) -> DynamicCache:
    """An empty cache for a model with this configuration; layers of other kinds than DynamicLayer stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache

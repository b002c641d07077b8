"""Where tokens stand: rows packed one behind the other, and a cache of their keys and values.

Shapes in trailing comments as in transformer.py: N tokens of B rows, T the longest.
"""

import math

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """x, which is on the CPU, on the device, without waiting for what that still has to do."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


class Cache:
    """Keys and values of the tokens seen so far, for generation; one slot per position and row."""

    def __init__(self, model, rows: int, length: int):
        config = model.config
        heads, size = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, rows, heads, length, size)
        self.keys = torch.zeros(shape, device=model.device, dtype=model.dtype)
        self.values = torch.zeros_like(self.keys)

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, E) at `positions` (B * T); return the layer's (B, K, S, E)."""
        keys, values = self.keys[layer], self.values[layer]
        index = positions.view(len(k), 1, -1, 1).expand_as(k)  # (B, K, T, E)
        keys.scatter_(2, index, k)
        values.scatter_(2, index, v)
        return keys, values


class Rows:
    """Where the N tokens of a call stand in its rows, and which keys they see.

    Without bounds, ids are [B, T]: N = B * T, and attention pads nothing. See Transformer.forward.
    """

    def __init__(self, ids: Tensor, positions: Tensor | None = None, bounds: Tensor | None = None):
        self.slots = None  # int64 [N], the tokens' places among the B * T; None: all, in order
        if bounds is None:
            self.shape = ids.shape  # B, T
            order = torch.arange(ids.shape[1], device=ids.device)
            self.positions = (order if positions is None else positions).expand_as(ids).flatten()
            return
        bounds = bounds.cpu()  # where they are, but for a sharded model, which moves its arguments
        lengths = bounds.diff()  # the arithmetic is the CPU's, so that a GPU waits for no count
        self.shape = B, T = len(lengths), int(lengths.max())
        row = torch.arange(B).repeat_interleave(lengths)  # (N,)
        order = torch.arange(len(row)) - bounds[row]
        index = send(torch.stack((order, row * T + order)), ids.device)
        self.positions = index[0]  # int64 [N], of each token in its row
        self.slots = index[1] if len(row) < B * T else None

    def pad(self, x: Tensor) -> Tensor:
        """(N, heads, E) to (B, heads, T, E), padded on the right."""
        if self.slots is not None:
            zeros = x.new_zeros(math.prod(self.shape), *x.shape[1:])
            x = zeros.index_copy_(0, self.slots, x)  # (B * T, heads, E)
        return x.view(*self.shape, *x.shape[1:]).transpose(1, 2)

    def flat(self, y: Tensor) -> Tensor:
        """(B, H, T, E) without its padding, (N, H * E)."""
        y = y.transpose(1, 2).flatten(2).flatten(0, 1)  # (B * T, H * E)
        return y if self.slots is None else y.index_select(0, self.slots)

    def masks(self, window: int | None, cache: Cache | None) -> tuple[Tensor | None, Tensor | None]:
        """The keys that a query sees in a full and in a windowed layer, bool [B or 1, 1, T, S].

        None: all keys up to its own position, with S = T.
        """
        (B, T), device = self.shape, self.positions.device
        if cache is not None and T == 1:  # one new token: `is_causal` would show it slot 0 alone
            slots = torch.arange(cache.keys.shape[3], device=device)
            age = self.positions.view(B, 1, 1, 1) - slots  # (B, 1, 1, S)
            return age >= 0, (age >= 0) & (age < window) if window else None
        if window is None or T <= window:
            return None, None  # the window covers every row
        order = torch.arange(T, device=device)
        age = order[:, None] - order  # (T, T)
        return None, ((age >= 0) & (age < window))[None, None]  # (1, 1, T, T)

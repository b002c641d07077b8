"""Where tokens stand: rows packed one behind the other, and a cache of their keys and values.

Shapes in trailing comments as in transformer.py: N tokens of B rows, T the longest.
"""

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """x, which is on the CPU, on the device, without waiting for what that still has to do."""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class Cache:
    """Keys and values of the tokens seen so far, for generation; one slot per position and row."""

    def __init__(self, model, rows: int, length: int):
        config = model.config
        heads = config.num_key_value_heads
        shape = (config.num_hidden_layers, rows, heads, length, config.head_dim)
        self.keys = torch.zeros(shape, device=model.device, dtype=model.dtype)
        self.values = torch.zeros_like(self.keys)

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, E) at `positions` (B * T); return the layer's (B, K, S, E)."""
        keys = self.keys[layer]
        values = self.values[layer]
        index = positions.view(len(k), 1, -1, 1).expand_as(k)  # (B, K, T, E)
        keys.scatter_(2, index, k)
        values.scatter_(2, index, v)
        return keys, values

    def keep_rows(self, rows: Tensor) -> None:
        """Forget all rows but these, int64 [n]."""
        self.keys = self.keys[:, rows]
        self.values = self.values[:, rows]


class Rows:
    """Where the N tokens of a call stand in its rows, and which keys they see.

    shape: B, T. positions: int64 [N], of each token in its row. padded_places: int64 [N], where the
    tokens stand among the B * T of the padded rows; None where nothing is padded.
    Without bounds, ids are [B, T] and N = B * T. See Transformer.forward.
    """

    def __init__(self, ids: Tensor, positions: Tensor | None = None, bounds: Tensor | None = None):
        self.padded_places = None
        if bounds is None:
            self.shape = ids.shape
            if positions is None:
                positions = torch.arange(ids.shape[1], device=ids.device)
            self.positions = positions.expand_as(ids).flatten()
            return

        # The arithmetic is the CPU's, so that a GPU waits for no count. The bounds are there
        # already, but for a sharded model, which moves its arguments.
        bounds = bounds.cpu()
        lengths = bounds.diff()
        B = len(lengths)
        T = int(lengths.max())
        row = torch.arange(B).repeat_interleave(lengths)  # (N,)
        position = torch.arange(len(row)) - bounds[row]  # (N,)
        self.shape = (B, T)
        self.positions = send(position, ids.device)
        if len(row) < B * T:
            self.padded_places = send(row * T + position, ids.device)

    def pad(self, x: Tensor) -> Tensor:
        """(N, heads, E) to (B, heads, T, E), padded on the right."""
        B, T = self.shape
        if self.padded_places is not None:
            zeros = x.new_zeros(B * T, *x.shape[1:])
            x = zeros.index_copy_(0, self.padded_places, x)  # (B * T, heads, E)
        return x.view(B, T, *x.shape[1:]).transpose(1, 2)

    def flat(self, y: Tensor) -> Tensor:
        """(B, H, T, E) without its padding, (N, H * E)."""
        y = y.transpose(1, 2).flatten(2).flatten(0, 1)  # (B * T, H * E)
        if self.padded_places is None:
            return y
        return y.index_select(0, self.padded_places)

    def masks(self, window: int | None, cache: Cache | None) -> tuple[Tensor | None, Tensor | None]:
        """The keys that a query sees in a full and in a windowed layer, bool [B or 1, 1, T, S].

        None: all keys up to its own position, with S = T.
        """
        B, T = self.shape
        device = self.positions.device
        if cache is not None and T == 1:
            # One new token per row: `is_causal` would show it slot 0 alone.
            slots = torch.arange(cache.keys.shape[3], device=device)
            age = self.positions.view(B, 1, 1, 1) - slots  # (B, 1, 1, S)
            full = age >= 0
            windowed = full & (age < window) if window else None
            return full, windowed
        if window is None or T <= window:
            return None, None  # the window covers every row
        order = torch.arange(T, device=device)
        age = order[:, None] - order  # (T, T)
        windowed = (age >= 0) & (age < window)
        return None, windowed[None, None]  # (1, 1, T, T)

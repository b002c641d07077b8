"""A decoder-only transformer: Llama, Mistral, Qwen2 or Qwen3. Reads bottom up: norm, rope, attention, MLP, block, model.

What tells the families apart is in Config: biases, a norm on queries and keys, a sliding window, the rope's scaling.

Every module has the name that Hugging Face gives it, so a public checkpoint's tensors fit without a mapping table.
Shapes in trailing comments: B rows, T tokens, D hidden size, H query heads, K key-value heads, E head size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import Config
from model.lora import LoRALinear

Rope = tuple[Tensor, Tensor]  # cosine and sine of every position's angles, [B or 1, 1, T, E/2] each
Masks = tuple[Tensor | None, Tensor | None]  # of a full layer and of a windowed one; see attention_masks


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 and handed on in the weights' dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(self.weight.dtype) * self.weight


def rope_frequencies(config: Config, device: torch.device) -> Tensor:
    """Angle per position of each of the E/2 rotated pairs, float32 [E/2], with the config's long-context scaling."""
    exponent = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    inverse = config.rope_theta**-exponent
    scaling = config.rope_scaling
    if scaling is None:
        return inverse
    if scaling["rope_type"] == "linear":
        return inverse / scaling["factor"]
    # llama3: wavelengths that the original context holds many times stay, those longer than it are stretched
    # by `factor`, and between the two bounds the stretch is interpolated.
    turns = scaling["original_max_position_embeddings"] * inverse / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return inverse * (smooth + (1 - smooth) / scaling["factor"])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the split-half layout: channel i turns with channel i + E/2. x: (B, heads, T, E)."""
    first, second = x.chunk(2, dim=-1)  # times float32 angles is float32; rounded before they are put side by side
    return torch.cat(((first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)), dim=-1)


def attention_masks(positions: Tensor, window: int | None, cache: "Cache | None") -> Masks:
    """Which keys a query of a full and of a windowed layer sees, bool [B or 1, 1, T, S]; None: all up to its own, S = T."""
    T = positions.shape[1]
    if cache is not None and T == 1:  # a new token sees the slots up to its own; `is_causal` would show it slot 0 alone
        age = positions[:, None, :, None] - torch.arange(cache.keys.shape[3], device=positions.device)  # (B, 1, 1, S)
        return age >= 0, (age >= 0) & (age < window) if window else None
    if window is None or T <= window:
        return None, None  # no token of the row is further away than the window reaches
    order = torch.arange(T, device=positions.device)
    age = order[:, None] - order  # (T, T)
    return None, ((age >= 0) & (age < window))[None, None]  # (1, 1, T, T)


class Cache:
    """Keys and values of the tokens seen so far, for generation; one slot per position and row."""

    def __init__(self, config: Config, rows: int, length: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, E) at `positions` (B, T); return all slots of the layer (B, K, length, E)."""
        keys, values = self.keys[layer], self.values[layer]
        index = positions[:, None, :, None].expand_as(k)  # (B, K, T, E)
        keys.scatter_(2, index, k)
        values.scatter_(2, index, v)
        return keys, values


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share a key-value head."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.windowed = layer in config.windowed_layers
        self.groups = config.num_attention_heads // config.num_key_value_heads
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = LoRALinear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = LoRALinear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = LoRALinear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = LoRALinear(queries, config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: Rope, masks: Masks, positions: Tensor, cache: Cache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, E)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, K, T, E)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, E)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if k.dtype == torch.float16:  # an infinite key may get the weight 0 and not show: let it spoil its row
            k = k + (0 * k).sum(dim=(1, 2, 3), keepdim=True)  # plus 0, or NaN
        if cache is not None:
            keys, values = cache.update(self.layer, positions, k, v)  # (B, K, S, E), S slots
            if T == 1:
                k, v = keys, values
        mask = masks[self.windowed]
        # The flash kernels read grouped keys as they are but take no mask; float32 has no such kernel on CUDA and the
        # CPU's is slower.
        grouped = x.is_cuda and x.dtype != torch.float32 and mask is None
        if self.groups > 1 and not grouped:
            k, v = k.repeat_interleave(self.groups, dim=1), v.repeat_interleave(self.groups, dim=1)  # (B, H, S, E)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped and self.groups > 1)  # (B, H, T, E)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = LoRALinear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = LoRALinear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = LoRALinear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm attention and MLP around a residual stream that stays in float32 whatever the weights' dtype."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Rope, masks: Masks, positions: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, masks, positions, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """What Hugging Face calls `model`: the embedding, the blocks, the last norm."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """Token ids [B, T] to final-norm hidden states [B, T, D]; `lm_head` maps those to logits.

    The head is left to the caller so that logits are built only where a loss or a next token is needed.
    Rows are padded on the right: under causal attention a real token never sees what is to its right, so no padding
    mask exists anywhere. A mask exists where a row is longer than a sliding window, and in decoding.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.source = None  # the folder that the weights came from; set by load_checkpoint
        self.name = ""  # what an adapter calls its base: a hub id, or else that folder
        self.gradient_checkpointing = False  # keep each block's input alone for the backward pass, and compute the block again
        self.model = Body(config)
        self.lm_head = LoRALinear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    def forward(self, ids: Tensor, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """ids: int64 [B, T]. positions: int64 [B, T], 0..T-1 by default.

        cache: only for generation; the first call with it holds the whole prompts, every later one a token a row.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
        angles = positions[:, None, :, None] * rope_frequencies(self.config, ids.device)  # (B or 1, 1, T, E/2)
        rope = angles.cos(), angles.sin()
        masks = attention_masks(positions, self.config.sliding_window, cache)
        x = self.model.embed_tokens(ids).float()  # (B, T, D)
        for layer in self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, masks, positions, cache, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, rope, masks, positions, cache)
        return self.model.norm(x)

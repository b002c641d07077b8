"""A decoder-only transformer: Llama, Mistral, Qwen2, Qwen3. Reads bottom up, norm to model.

Config says what tells the families apart. Every module has its Hugging Face name, so the tensors of
a public checkpoint fit without a mapping table. Shapes in trailing comments: B rows, T tokens,
D hidden size, H query heads, K key-value heads, E head size, S slots of the cache.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import Config
from model.lora import LoRALinear

Rope = tuple[Tensor, Tensor]  # cosine and sine of each position's angles, [B or 1, 1, T, E/2] each
Masks = tuple[Tensor | None, Tensor | None]  # for full and windowed layers: see attention_masks


class RMSNorm(nn.Module):
    """x / rms(x) * weight, normalised in float32 and returned in the weight's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self.weight.shape, eps=self.eps)
        return normed.to(self.weight.dtype) * self.weight


def rope_frequencies(config: Config, device: torch.device) -> Tensor:
    """Angle per position of each rotated pair, float32 [E/2], scaled for long contexts."""
    channels = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    inverse = config.rope_theta ** -(channels / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse
    if scaling["rope_type"] == "linear":
        return inverse / scaling["factor"]
    # llama3: wavelengths that fit many times into the original context stay, those longer than it
    # are stretched by `factor`, and between the two bounds the stretch is interpolated.
    turns = scaling["original_max_position_embeddings"] * inverse / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return inverse * (smooth + (1 - smooth) / scaling["factor"])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, split-half layout: channel i turns with i + E/2. x: (B, heads, T, E)."""
    first, second = x.chunk(2, dim=-1)
    # The angles are float32, so the products are: round them before they are joined.
    turned = (first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)
    return torch.cat(turned, dim=-1)


class Cache:
    """Keys and values of the tokens seen so far, for generation; one slot per position and row."""

    def __init__(self, model: "Transformer", rows: int, length: int):
        config = model.config
        heads, size = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, rows, heads, length, size)
        self.keys = torch.zeros(shape, device=model.device, dtype=model.dtype)
        self.values = torch.zeros_like(self.keys)

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, E) at `positions` (B, T); return the layer's (B, K, S, E)."""
        keys, values = self.keys[layer], self.values[layer]
        index = positions[:, None, :, None].expand_as(k)  # (B, K, T, E)
        keys.scatter_(2, index, k)
        values.scatter_(2, index, v)
        return keys, values


def attention_masks(positions: Tensor, window: int | None, cache: Cache | None) -> Masks:
    """The keys that a query sees in a full and in a windowed layer, bool [B or 1, 1, T, S].

    None: all keys up to its own position, with S = T.
    """
    T, device = positions.shape[1], positions.device
    if cache is not None and T == 1:  # one new token: `is_causal` would show it slot 0 alone
        age = positions[:, None, :, None] - torch.arange(cache.keys.shape[3], device=device)
        return age >= 0, (age >= 0) & (age < window) if window else None  # (B, 1, 1, S)
    if window is None or T <= window:
        return None, None  # the window covers every row
    order = torch.arange(T, device=device)
    age = order[:, None] - order  # (T, T)
    return None, ((age >= 0) & (age < window))[None, None]  # (1, 1, T, T)


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share a key-value head."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.windowed = layer in config.windowed_layers
        self.groups = config.num_attention_heads // config.num_key_value_heads
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = LoRALinear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = LoRALinear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = LoRALinear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = LoRALinear(queries, config.hidden_size, bias=config.output_bias)
        norm = RMSNorm if config.qk_norm else nn.Identity
        self.q_norm = norm(config.head_dim, config.rms_norm_eps)
        self.k_norm = norm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: Rope, masks: Masks, positions: Tensor, cache: Cache | None
    ) -> Tensor:
        shape = (*x.shape[:2], -1, self.head_dim)  # (B, T, heads, E)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)  # (B, H, T, E)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)  # (B, K, T, E)
        v = self.v_proj(x).view(shape).transpose(1, 2)  # (B, K, T, E)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if k.dtype == torch.float16:
            # An infinite key can hide behind a zero attention weight; turn its row into NaN.
            k = k + (0 * k).sum(dim=(1, 2, 3), keepdim=True)
        if cache is not None:
            slots = cache.update(self.layer, positions, k, v)
            if x.shape[1] == 1:
                k, v = slots  # (B, K, S, E)
        mask = masks[self.windowed]
        # The flash kernels read grouped keys as they are, but take no mask. float32 has no such
        # kernel on CUDA, and the CPU's is slower.
        grouped = x.is_cuda and x.dtype != torch.float32 and mask is None
        if self.groups > 1 and not grouped:
            k = k.repeat_interleave(self.groups, dim=1)  # (B, H, S, E)
            v = v.repeat_interleave(self.groups, dim=1)  # (B, H, S, E)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped and self.groups > 1
        )  # (B, H, T, E)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config):
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = LoRALinear(size, inner, bias=bias)
        self.up_proj = LoRALinear(size, inner, bias=bias)
        self.down_proj = LoRALinear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm attention and MLP around a residual stream that is float32 for any weight dtype."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *context) -> Tensor:
        """context: rope, masks, positions and cache, as attention takes them."""
        x = x + self.self_attn(self.input_layernorm(x), *context)
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

    The caller applies the head, so that logits are built only where a loss or a next token needs
    them. Rows are padded on the right: under causal attention a real token never sees what is to
    its right, so there is no padding mask. A mask exists only in decoding and where a row is longer
    than a sliding window.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.source = None  # the folder that the weights came from; set by load_checkpoint
        self.base_sha256 = None  # base_hash(source), computed when first needed
        self.name = ""  # what an adapter calls its base: a hub id, else "" for the folder's path
        self.gradient_checkpointing = False  # recompute each block in the backward pass
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

    def forward(
        self, ids: Tensor, positions: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """ids: int64 [B, T]. positions: int64 [B, T], default 0..T-1.

        cache: for generation. The first call holds the whole prompts, later ones one token per row.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
        angles = positions[:, None, :, None] * rope_frequencies(self.config, ids.device)
        rope = angles.cos(), angles.sin()  # (B or 1, 1, T, E/2)
        masks = attention_masks(positions, self.config.sliding_window, cache)
        context = rope, masks, positions, cache
        x = self.model.embed_tokens(ids).float()  # (B, T, D)
        for layer in self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                options = {"use_reentrant": False, "preserve_rng_state": False}
                x = checkpoint(layer, x, *context, **options)
            else:
                x = layer(x, *context)
        return self.model.norm(x)

"""A decoder-only transformer: Llama, Mistral, Qwen, SmolLM3, Gemma 3. Reads bottom up.

Config says what tells the families apart. Every module has its Hugging Face name, so the tensors of
a public checkpoint fit without a mapping table. Shapes in trailing comments: N tokens of B rows, T
the longest, D hidden size, H query heads, K key-value heads, E head size, S slots of the cache.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import Config
from model.fused import fused
from model.lora import AdapterScope, LoRALinear
from model.packed import Cache, Rows
from model.products import attention

Rope = tuple[Tensor, Tensor]  # cosine and sine of each position's angles, [N, 1, E/2] each


@fused
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """x / rms(x) * (weight + offset), computed in float32 and returned in the weight's dtype."""
    normed = F.rms_norm(x.float(), weight.shape, eps=eps)
    return (normed * (weight.float() + offset)).to(weight.dtype)


class RMSNorm(nn.Module):
    def __init__(self, config: Config, size: int):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.offset = config.norm_offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - self.offset))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset)


def rope_table(rope: dict, positions: Tensor, size: int) -> Rope:
    """Cosine and sine of each position's angle for each rotated pair; scaled for long contexts."""
    channels = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32)
    # The angle per position, (E/2,), in the form whose rounding released models were trained with.
    frequency = 1.0 / rope["rope_theta"] ** (channels / size)
    if rope["rope_type"] == "linear":
        frequency = frequency / rope["factor"]
    if rope["rope_type"] == "llama3":
        # Wavelengths that fit many times into the original context stay, those longer than it are
        # stretched by `factor`, and between the two bounds the stretch is interpolated.
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low = rope["low_freq_factor"]
        high = rope["high_freq_factor"]
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (smooth + (1 - smooth) / rope["factor"])
    angles = positions[:, None, None] * frequency  # (N, 1, E/2)
    return angles.cos(), angles.sin()


@fused
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, split-half layout: channel i turns with i + E/2. x: (N, heads, E)."""
    first, second = x.chunk(2, dim=-1)
    # The angles are float32, so the products are: round them before they are joined.
    turned_first = (first * cos - second * sin).to(x.dtype)
    turned_second = (second * cos + first * sin).to(x.dtype)
    return torch.cat((turned_first, turned_second), dim=-1)


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share a key-value head."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.rotated = layer not in config.unrotated_layers
        self.scale = config.query_scalar**-0.5
        self.groups = config.num_attention_heads // config.num_key_value_heads
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = LoRALinear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = LoRALinear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = LoRALinear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = LoRALinear(queries, config.hidden_size, bias=config.output_bias)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(config, config.head_dim)
            self.k_norm = RMSNorm(config, config.head_dim)

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor | None, rows: Rows, cache: Cache | None
    ) -> Tensor:
        """x: (N, D), normed. mask: bool [B or 1, 1, T, S], see Rows.masks; None: causal."""
        heads = (len(x), -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads))  # (N, H, E)
        k = self.k_norm(self.k_proj(x).view(heads))  # (N, K, E)
        v = self.v_proj(x).view(heads)  # (N, K, E)
        if self.rotated:
            q = rotate(q, *rope)
            k = rotate(k, *rope)
        if k.dtype == torch.float16:
            # An overflow must show in the loss. Anywhere else it becomes NaN in the next norm, and
            # reaches the later positions through the keys. But an infinite key may get the
            # attention weight 0 and leave no trace: NaN cannot. (`0 * k` is lost in compiling.)
            infinite = k.abs() > 65504  # the largest number of float16
            k = torch.where(infinite, torch.nan, k)

        q = rows.pad(q)  # (B, H, T, E)
        k = rows.pad(k)  # (B, K, T, E)
        v = rows.pad(v)  # (B, K, T, E)
        shape = q.shape
        if cache is not None:
            cached_k, cached_v = cache.update(self.layer, rows.positions, k, v)  # (B, K, S, E)
            # The first call holds the whole prompts, which see their own keys alone. Later ones
            # have one token per row: the heads of a group are queries of its one cached key head.
            if rows.shape[1] == 1:
                k = cached_k
                v = cached_v
                q = q.reshape(len(k), -1, self.groups, self.head_dim)  # (B, K, H / K, E)

        # CUDA's flash kernels read grouped keys as they are, but take no mask and no float32. The
        # CPU's reads them, too, but is slower.
        grouped = q.shape[1] > k.shape[1]
        flash = x.is_cuda and x.dtype != torch.float32 and mask is None
        if grouped and not flash:
            k = k.repeat_interleave(self.groups, dim=1)  # (B, H, T, E)
            v = v.repeat_interleave(self.groups, dim=1)  # (B, H, T, E)
            grouped = False
        y = attention(q, k, v, mask, scale=self.scale, grouped=grouped)
        return self.o_proj(rows.flat(y.reshape(shape)))


@fused
def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """silu(gate) * up; or with GELU's tanh approximation for SiLU."""
    if gelu:
        return F.gelu(gate, approximate="tanh") * up
    return F.silu(gate) * up


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), or with GELU for silu."""

    def __init__(self, config: Config):
        super().__init__()
        size = config.hidden_size
        inner = config.intermediate_size
        bias = config.mlp_bias
        self.gelu = config.gelu
        self.gate_proj = LoRALinear(size, inner, bias=bias)
        self.up_proj = LoRALinear(size, inner, bias=bias)
        self.down_proj = LoRALinear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.gelu))


class Block(nn.Module):
    """Pre-norm attention and MLP around a residual stream that is float32 for any weight dtype."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config, config.hidden_size)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config, config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *context) -> Tensor:
        """x: (N, D). context: rope, mask, rows and cache, as attention takes them."""
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class FourNormBlock(Block):
    """Gemma 3's: a norm before and one behind attention, and the same around the MLP."""

    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        self.pre_feedforward_layernorm = RMSNorm(config, config.hidden_size)
        self.post_feedforward_layernorm = RMSNorm(config, config.hidden_size)

    def forward(self, x: Tensor, *context) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), *context))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Body(nn.Module):
    """What Hugging Face calls `model`: the embedding, the blocks, the last norm."""

    def __init__(self, config: Config):
        super().__init__()
        # The layer's own normal_() would import torch._dynamo on the meta device, in a second.
        embeddings = torch.randn(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(*embeddings.shape, _weight=embeddings)
        block = FourNormBlock if config.output_norms else Block
        self.layers = nn.ModuleList(block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config, config.hidden_size)


class Transformer(AdapterScope):
    """Token ids to final-norm hidden states; `lm_head` maps those to logits.

    The caller applies the head, so that logits are built only where a loss or a next token needs
    them. Rows are packed: all but attention runs on the tokens one behind the other. Attention pads
    rows on the right; a real token never sees what is to its right, so there is no padding mask. A
    mask exists only in decoding and where a row is longer than a sliding window.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # Where the weights came from: set by load_checkpoint, emptied by lora.merge.
        self.source = None  # the folder
        self.name = ""  # what an adapter calls its base: a hub id, else "" for the folder's path
        self.base_sha256 = None  # base_hash(source), computed when first needed
        self.gradient_checkpointing = False  # recompute each block in the backward pass
        self.sharded = False  # the blocks are spread over several processes, see sharding.py
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
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        bounds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] of ids [B, T], int64; or [N, D] of packed ids [N].

        bounds: int64 [B + 1] on the CPU; row i of the packed ids is bounds[i]:bounds[i + 1].
        positions: int64 [B, T], default 0..T-1. cache: for generation, with ids [B, T]. The first
        call holds the whole prompts, later ones one token per row.
        """
        config = self.config
        rows = Rows(ids, positions, bounds)

        # What attention needs, in full and in windowed layers: the latter may have a rope of their
        # own, as in Gemma 3, and a mask.
        full_mask, windowed_mask = rows.masks(config.sliding_window, cache)
        full_rope = rope_table(config.ropes[0], rows.positions, config.head_dim)
        windowed_rope = full_rope
        if len(config.ropes) == 2:
            windowed_rope = rope_table(config.ropes[1], rows.positions, config.head_dim)
        full_context = (full_rope, full_mask, rows, cache)
        windowed_context = (windowed_rope, windowed_mask, rows, cache)

        x = self.model.embed_tokens(ids.flatten())  # (N, D)
        if config.scaled_embedding:
            # The factor is rounded to the dtype, as in transformers.
            x = x * torch.tensor(config.hidden_size**0.5, dtype=x.dtype)
        x = x.float()
        for index, layer in enumerate(self.model.layers):
            context = windowed_context if index in config.windowed_layers else full_context
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, *context, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, *context)
        hidden = self.model.norm(x)  # (N, D)
        if ids.ndim == 1:
            return hidden  # itself: FSDP warns of views
        return hidden.view(*ids.shape, -1)  # (B, T, D)

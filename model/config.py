"""What a checkpoint's `config.json` says of the computation: one dataclass for Llama, Mistral, Qwen2 and Qwen3."""

import math
from dataclasses import dataclass

from model.errors import InputError

# The families, each with what it takes where its config.json has no such field (null is not "no such field").
FAMILIES = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
}
KINDS = ("full_attention", "sliding_attention")
# The rope types, each with the numbers that its scaling needs.
SCALING = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass
class Config:
    """The fields of a Hugging Face `config.json` that change what the model computes."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or {"rope_type": "linear" | "llama3", "factor": ..., ...}
    attention_bias: bool = False  # on q, k and v
    output_bias: bool = False  # on o
    mlp_bias: bool = False
    qk_norm: bool = False  # an RMSNorm on every query and key head before the rotation
    sliding_window: int | None = None  # how many tokens, its own included, a token of a windowed layer sees
    windowed_layers: frozenset[int] = frozenset()
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, raw: dict, where: str) -> "Config":
        """Read `config.json`'s dictionary, in the spelling of any version; `where` names the file in errors.

        Raises InputError for an architecture, activation, rope type or anything else that changes the computation and
        is not implemented here: none of them is ever run approximately.
        """
        family = raw.get("model_type")
        if str(family) not in FAMILIES:
            raise InputError(f"{where}: model_type {family!r} is not implemented here (only {', '.join(FAMILIES)} are)")
        raw = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, **FAMILIES[family], **raw}
        if raw.get("hidden_act", "silu") not in ("silu", "swish"):
            raise InputError(f"{where}: hidden_act {raw['hidden_act']!r} is not implemented here (only 'silu' is)")
        if raw.get("is_causal") is False:
            raise InputError(f"{where}: is_causal false, attention to later tokens, is not implemented here")
        for field in ("quantization_config", "compression_config"):
            if raw.get(field):
                raise InputError(f"{where}: {field}: quantised weights are not implemented here; give the checkpoint before it "
                                 "was quantised")

        def count(name: str, otherwise: int | None = None) -> int:
            value = otherwise if raw.get(name) is None else raw[name]
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{where}: the field {name!r} must be a whole number above 0, not {value!r}")
            return value

        heads, layers, rope = count("num_attention_heads"), count("num_hidden_layers"), rope_settings(raw, where)
        windowed = windowed_layers(raw, layers, where)
        config = cls(
            vocab_size=count("vocab_size"),
            hidden_size=count("hidden_size"),
            intermediate_size=count("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=count("num_key_value_heads", heads),
            head_dim=count("head_dim", count("hidden_size") // heads),
            rms_norm_eps=number(raw, "rms_norm_eps", where),
            rope_theta=rope["rope_theta"],
            rope_scaling=None if rope["rope_type"] == "default" else rope,
            attention_bias=family == "qwen2" or family != "mistral" and bool(raw.get("attention_bias")),
            output_bias=family in ("llama", "qwen3") and bool(raw.get("attention_bias")),
            mlp_bias=family == "llama" and bool(raw.get("mlp_bias")),
            qk_norm=family == "qwen3",
            sliding_window=count("sliding_window") if windowed else None,
            windowed_layers=windowed,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
        )
        if heads % config.num_key_value_heads:
            raise InputError(f"{where}: {heads} query heads cannot share {config.num_key_value_heads} key-value heads evenly")
        if config.head_dim % 2:
            raise InputError(f"{where}: an odd head_dim ({config.head_dim}) cannot be rotated in pairs")
        return config


def number(fields: dict, name: str, where: str) -> float:
    """A field that must be a number above 0."""
    value = fields.get(name)
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(f"{where}: the field {name!r} must be a number above 0, not {value!r}")
    return value


def rope_settings(raw: dict, where: str) -> dict:
    """The rotary embedding's `rope_type`, `rope_theta` and numbers of its scaling, from the newer or the older spelling."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # the older spelling, then the newer one
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise InputError(f"{where}: the rope scaling must be one object of numbers for all layers, not {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if str(kind) not in SCALING:
        raise InputError(f"{where}: rope type {kind!r} is not implemented here (only {', '.join(SCALING)} are)")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1.0):
        raise InputError(f"{where}: partial_rotary_factor is not implemented here")
    fields, where = {"rope_theta": raw["rope_theta"], **rope}, f"{where}: rope type {kind}"
    return {"rope_type": kind, **{name: number(fields, name, where) for name in ("rope_theta", *SCALING[kind])}}


def windowed_layers(raw: dict, layers: int, where: str) -> frozenset[int]:
    """The layers that see a sliding window only: all of Mistral's, those of Qwen's that its config.json names or counts."""
    family, window, first = raw["model_type"], raw.get("sliding_window"), raw.get("max_window_layers", 0)
    if window is None or family == "llama" or family != "mistral" and not raw.get("use_sliding_window"):
        first = layers
    if not isinstance(first, int) or first < 0:
        raise InputError(f"{where}: the field 'max_window_layers' must be a whole number, not {first!r}")
    counted = [KINDS[i >= first] for i in range(layers)]
    kinds = raw.get("layer_types") or counted
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in KINDS for kind in kinds):
        raise InputError(f"{where}: layer_types must name {' or '.join(KINDS)} for each of the {layers} layers; "
                         f"{kinds!r} is not implemented here")
    if kinds != counted and (first == layers or family == "mistral"):
        raise InputError(f"{where}: layer_types contradicts the other fields of this {family} model's sliding window")
    return frozenset(i for i, kind in enumerate(kinds) if kind == KINDS[1])

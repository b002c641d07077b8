"""The parts of `config.json` that change what a Llama, Mistral, Qwen2 or Qwen3 model computes."""

from collections.abc import Iterable
from dataclasses import dataclass

from model.io import InputError

# The families, each with its own default values for fields that config.json lacks.
QWEN2 = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": QWEN2,
    "qwen3": {**QWEN2, "head_dim": 128},
}
SIZES = """vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads""".split()
LAYERS = 1024  # more than any known model has; a billion would take hours to lay out
WINDOWS = ("full_attention", "sliding_attention")
FIELDS = {bool: "true or false", int: "a whole number above 0", float: "a number above 0"}
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
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "llama3", "factor": ..., ...}
    attention_bias: bool = False  # on q, k and v
    output_bias: bool = False  # on o
    mlp_bias: bool = False
    qk_norm: bool = False  # an RMSNorm on every query and key head before the rotation
    sliding_window: int | None = None  # tokens visible in a windowed layer, the query's included
    windowed_layers: frozenset[int] = frozenset()
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, raw: dict, where: str) -> "Config":
        """Read a config.json of any version; InputError, naming `where`, if not implemented."""
        family = raw.get("model_type")
        refuse(str(family) not in FAMILIES, f"{where}: model_type {family!r}", FAMILIES)
        raw = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, **FAMILIES[family], **raw}
        act = raw.get("hidden_act", "silu")
        refuse(act not in ("silu", "swish"), f"{where}: hidden_act {act!r}", ["silu"])
        refuse(not field(raw, "is_causal", where, bool, True), f"{where}: is_causal false")
        for name in ("quantization_config", "compression_config"):
            refuse(raw.get(name), f"{where}: {name} (quantised weights)")
        sizes = {name: field(raw, name, where, int) for name in SIZES}
        layers, heads = sizes["num_hidden_layers"], sizes["num_attention_heads"]
        refuse(layers > LAYERS, f"{where}: num_hidden_layers above {LAYERS}")
        groups = field(raw, "num_key_value_heads", where, int, heads)
        head_dim = field(raw, "head_dim", where, int, sizes["hidden_size"] // heads)
        refuse(heads % groups, f"{where}: num_key_value_heads {groups} for {heads} heads")
        refuse(head_dim % 2, f"{where}: an odd head_dim ({head_dim})")
        rope, windowed = rope_settings(raw, where), windowed_layers(raw, layers, where)
        flags = ("attention_bias", "mlp_bias", "tie_word_embeddings")
        bias, mlp_bias, tied = (field(raw, name, where, bool, False) for name in flags)
        return cls(
            **sizes,
            num_key_value_heads=groups,
            head_dim=head_dim,
            rms_norm_eps=field(raw, "rms_norm_eps", where, float),
            rope_theta=rope["rope_theta"],
            rope_scaling=None if rope["rope_type"] == "default" else rope,
            attention_bias=family == "qwen2" or (bias and family != "mistral"),
            output_bias=bias and family in ("llama", "qwen3"),
            mlp_bias=family == "llama" and mlp_bias,
            qk_norm=family == "qwen3",
            sliding_window=field(raw, "sliding_window", where, int) if windowed else None,
            windowed_layers=windowed,
            tie_word_embeddings=tied,
        )


def refuse(condition: object, what: str, known: Iterable[str] = ()) -> None:
    """InputError if `condition` holds, in which `what` is not implemented; known: what is."""
    if condition:
        among = f" (known: {', '.join(known)})" if known else ""
        raise InputError(f"{what} is not implemented{among}")


def field(raw: dict, name: str, where: str, kind: type, default: int | None = None):
    """A truth value, or a positive number in float32's range; `default` where absent or null."""
    value = default if raw.get(name) is None else raw[name]
    fits = type(value) is kind or kind is float and type(value) is int
    if not fits or kind is not bool and not 1.2e-38 < value < 3.4e38:
        raise InputError(f"{where}: {name!r} must be {FIELDS[kind]}, not {value!r}")
    return value


def rope_settings(raw: dict, where: str) -> dict:
    """`rope_type`, `rope_theta` and the numbers of the scaling, in the older or newer spelling."""
    given = (raw.get("rope_scaling"), raw.get("rope_parameters"))
    rope = next((settings for settings in given if settings not in (None, {})), {})
    nested = not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values())
    refuse(nested, f"{where}: rope settings that are not one object of numbers ({rope!r})")
    kind = rope.get("rope_type", rope.get("type", "default"))
    refuse(str(kind) not in SCALING, f"{where}: rope type {kind!r}", SCALING)
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    refuse(partial not in (None, 1.0), f"{where}: partial_rotary_factor")
    fields, where = {"rope_theta": raw["rope_theta"], **rope}, f"{where}: rope type {kind}"
    numbers = {name: field(fields, name, where, float) for name in ("rope_theta", *SCALING[kind])}
    return {"rope_type": kind, **numbers}


def windowed_layers(raw: dict, layers: int, where: str) -> frozenset[int]:
    """The layers with a sliding window: all of Mistral's; of Qwen's those named or counted."""
    family, first = raw["model_type"], raw.get("max_window_layers", 0)
    asked = field(raw, "use_sliding_window", where, bool, False) and family != "llama"
    if not (asked or family == "mistral") or raw.get("sliding_window") is None:
        first = layers
    refuse(type(first) is not int or first < 0, f"{where}: max_window_layers {first!r}")
    counted = [WINDOWS[i >= first] for i in range(layers)]
    kinds = counted if raw.get("layer_types") is None else raw["layer_types"]
    fits = isinstance(kinds, list) and len(kinds) == layers and all(k in WINDOWS for k in kinds)
    refuse(not fits, f"{where}: layer_types {kinds!r} for {layers} layers", WINDOWS)
    unlike = kinds != counted and (first == layers or family == "mistral")
    refuse(unlike, f"{where}: layer_types that contradicts the other sliding window fields")
    return frozenset(i for i, kind in enumerate(kinds) if kind == WINDOWS[1])

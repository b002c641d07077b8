"""The parts of `config.json` that change what a model computes, for each family of models."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from model.io import InputError

SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
# The fields that every family reads, each with the value that its absence means.
COMMON = {
    **dict.fromkeys(["model_type", *SIZES, "num_key_value_heads", "head_dim", "layer_types"]),
    **dict.fromkeys(["rope_scaling", "rope_parameters", "partial_rotary_factor"]),
    "original_max_position_embeddings": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
# The further fields of each family. As in transformers, it ignores those of the others.
BIASES = {"attention_bias": False, "mlp_bias": False}
QWEN2 = {
    "num_key_value_heads": 32,
    "max_window_layers": 28,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
FAMILIES = {
    "llama": BIASES,
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": QWEN2,
    "qwen3": {**QWEN2, "head_dim": 128, "attention_bias": False},
    "smollm3": {
        **BIASES,
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "gemma3_text": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "attention_bias": False,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
}
# What a family has whatever config.json says, as fields of Config.
ALWAYS = {
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma3_text": {
        "qk_norm": True,
        "norm_offset": 1.0,
        "output_norms": True,
        "scaled_embedding": True,
    },
}
TRUTH_VALUES = ["attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window"]
REFUSED = [
    "quantization_config",
    "compression_config",
    "use_bidirectional_attention",
    "attn_logit_softcapping",
    "final_logit_softcapping",
]
MAX_LAYERS = 1024  # more than any known model has; a billion would take hours to lay out
FULL = "full_attention"
WINDOWED = "sliding_attention"
LAYER_KINDS = (FULL, WINDOWED)
IS_GELU = {"silu": False, "swish": False, "gelu_pytorch_tanh": True}  # by the activation's name
# The rope types, each with the numbers that its scaling needs.
ROPE_NUMBERS = {
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
    query_scalar: float  # its root divides queries times keys; head_dim, but for Gemma
    rms_norm_eps: float = 1e-6
    norm_offset: float = 0.0  # an RMSNorm multiplies by its weight plus this
    qk_norm: bool = False  # an RMSNorm on every query and key head before the rotation
    output_norms: bool = False  # an RMSNorm behind attention and MLP, too
    attention_bias: bool = False  # on q, k and v
    output_bias: bool = False  # on o
    mlp_bias: bool = False
    gelu: bool = False  # in the MLP, approximated by tanh, in place of silu
    # {"rope_type": ..., "rope_theta": ..., and the type's ROPE_NUMBERS}: one for all layers, or
    # one for those with full attention and one for the windowed ones.
    ropes: tuple[dict, ...] = ({"rope_type": "default", "rope_theta": 10000.0},)
    unrotated_layers: frozenset[int] = frozenset()
    sliding_window: int | None = None  # tokens visible in a windowed layer, the query's included
    windowed_layers: frozenset[int] = frozenset()
    scaled_embedding: bool = False  # by the root of hidden_size
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, raw: dict, where: str) -> "Config":
        """Read a config.json of any version; InputError, naming `where`, if not implemented."""
        check_implemented(raw, where)
        family = raw["model_type"]
        defaults = COMMON | FAMILIES[family]
        raw = {name: raw.get(name, default) for name, default in defaults.items()}

        sizes = {name: field(raw, name, where, int) for name in SIZES}
        layers = sizes["num_hidden_layers"]
        refuse_if(layers > MAX_LAYERS, f"{where}: num_hidden_layers above {MAX_LAYERS}")

        heads = sizes["num_attention_heads"]
        key_heads = field(raw, "num_key_value_heads", where, int, default=heads)
        head_dim = field(raw, "head_dim", where, int, default=sizes["hidden_size"] // heads)
        refuse_if(heads % key_heads, f"{where}: num_key_value_heads {key_heads} for {heads} heads")
        refuse_if(head_dim % 2, f"{where}: an odd head_dim ({head_dim})")

        activation = raw.get("hidden_activation", raw["hidden_act"])  # the first is Gemma's
        refuse_if(str(activation) not in IS_GELU, f"{where}: hidden_act {activation!r}", IS_GELU)

        unrotated = unrotated_layers(raw, layers, where)
        windowed = windowed_layers(raw, layers, unrotated, where)
        window = field(raw, "sliding_window", where, int) if windowed else None
        config = cls(
            **sizes,
            num_key_value_heads=key_heads,
            head_dim=head_dim,
            query_scalar=field(raw, "query_pre_attn_scalar", where, float, default=head_dim),
            rms_norm_eps=field(raw, "rms_norm_eps", where, float),
            attention_bias=bool(raw.get("attention_bias")),
            output_bias=bool(raw.get("attention_bias")),
            mlp_bias=bool(raw.get("mlp_bias")),
            gelu=IS_GELU[activation],
            ropes=ropes(raw, where),
            unrotated_layers=unrotated,
            sliding_window=window,
            windowed_layers=windowed,
            tie_word_embeddings=bool(raw["tie_word_embeddings"]),
        )
        return replace(config, **ALWAYS.get(family, {}))


def check_implemented(raw: dict, where: str) -> None:
    """InputError for a family, or a field of any family, that is not implemented or malformed."""
    family = raw.get("model_type")
    model_type = f"{where}: model_type {family!r}"
    if "text_config" in raw:
        model_type += ", a model of more than text (see model/README.md),"
    refuse_if(str(family) not in FAMILIES, model_type, FAMILIES)
    refuse_if(not field(raw, "is_causal", where, bool, default=True), f"{where}: is_causal false")
    for name in REFUSED:
        refuse_if(raw.get(name), f"{where}: {name}")
    for name in TRUTH_VALUES:  # also where the family ignores it
        field(raw, name, where, bool, default=False)


def refuse_if(condition: object, feature: str, implemented: Iterable[str] = ()) -> None:
    """InputError if the condition holds: the feature is not implemented, only those listed are."""
    if condition:
        known = f" (known: {', '.join(implemented)})" if implemented else ""
        raise InputError(f"{feature} is not implemented{known}")


def field(raw: dict, name: str, where: str, kind: type, default: int | None = None):
    """A truth value, or a positive number in float32's range; `default` where absent or null."""
    value = raw.get(name)
    if value is None:
        value = default
    if kind is bool:
        expected = "true or false"
        valid = type(value) is bool
    elif kind is int:
        expected = "a whole number above 0"
        valid = type(value) is int and 0 < value < 3.4e38
    else:
        expected = "a number above 0"
        valid = type(value) in (int, float) and 1.2e-38 < value < 3.4e38
    if not valid:
        raise InputError(f"{where}: {name!r} must be {expected}, not {value!r}")
    return kind(value)


def ropes(raw: dict, where: str) -> tuple[dict, ...]:
    """The rope of all layers; Gemma's two, that of full attention and that of windowed layers."""
    older = raw["rope_scaling"]
    newer = raw["rope_parameters"]
    if "rope_local_base_freq" not in raw:
        rope = newer if older in (None, {}) else older
        return (rope_settings(raw, rope, "rope_theta", where),)
    refuse_if(older and newer, f"{where}: rope_scaling beside rope_parameters")
    # The newer spelling has an object per kind of layer, the older only that of full attention.
    by_kind = {FULL: older} if newer in (None, {}) else newer
    valid = isinstance(by_kind, dict) and by_kind.keys() <= set(LAYER_KINDS)
    refuse_if(not valid, f"{where}: rope_parameters {by_kind!r}", LAYER_KINDS)
    full = rope_settings(raw, by_kind.get(FULL), "rope_theta", where)
    windowed = rope_settings(raw, by_kind.get(WINDOWED), "rope_local_base_freq", where)
    return full, windowed


def rope_settings(raw: dict, rope: object, theta_name: str, where: str) -> dict:
    """`rope_type`, `rope_theta` (where absent, the field `theta_name`) and the type's numbers."""
    if rope is None:
        rope = {}
    nested = not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values())
    refuse_if(nested, f"{where}: rope settings that are not one object of numbers ({rope!r})")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    refuse_if(str(rope_type) not in ROPE_NUMBERS, f"{where}: rope type {rope_type!r}", ROPE_NUMBERS)
    partial = rope.get("partial_rotary_factor", raw["partial_rotary_factor"])
    refuse_if(partial not in (None, 1.0), f"{where}: partial_rotary_factor")

    fields = {"rope_theta": raw[theta_name], **rope}
    settings = {"rope_type": rope_type}
    for name in ("rope_theta", *ROPE_NUMBERS[rope_type]):
        settings[name] = field(fields, name, f"{where}: rope type {rope_type}", float)
    if rope_type == "llama3":
        inverted = settings["low_freq_factor"] > settings["high_freq_factor"]
        refuse_if(inverted, f"{where}: low_freq_factor above high_freq_factor")
        name = "original_max_position_embeddings"
        other = raw[name]  # which of the two transformers takes depends on the family
        refuse_if(other not in (None, settings[name]), f"{where}: another {name} beside the rope's")
    return settings


def unrotated_layers(raw: dict, layers: int, where: str) -> frozenset[int]:
    """The layers without a rotary embedding: SmolLM3's that are marked 0, or every nth."""
    rotated = raw.get("no_rope_layers")  # the name says the opposite of its 1s
    if raw.get("no_rope_layer_interval") is not None:
        interval = field(raw, "no_rope_layer_interval", where, int)
        if rotated is None:
            rotated = [(i + 1) % interval > 0 for i in range(layers)]
    if rotated is None:  # another family
        return frozenset()
    valid = (
        isinstance(rotated, list) and len(rotated) >= layers and all(r in (0, 1) for r in rotated)
    )
    refuse_if(not valid, f"{where}: no_rope_layers {rotated!r} for {layers} layers")
    return frozenset(i for i in range(layers) if not rotated[i])


def windowed_layers(raw: dict, layers: int, unrotated: frozenset, where: str) -> frozenset[int]:
    """The layers with a sliding window: those named in layer_types, else the family's default.

    That is all of Mistral's, Qwen's from a number on, all but every nth of Gemma's, and SmolLM3's
    without a rotary embedding.
    """
    first = raw.get("max_window_layers", 0)
    refuse_if(type(first) is not int or first < 0, f"{where}: max_window_layers {first!r}")
    enabled = raw.get("use_sliding_window", True) and raw.get("sliding_window") is not None
    if not enabled:
        default = frozenset()
    elif "no_rope_layers" in raw:  # a field of SmolLM3 alone
        default = unrotated
    elif raw.get("sliding_window_pattern") is not None:  # Gemma's
        interval = field(raw, "sliding_window_pattern", where, int)
        default = frozenset(i for i in range(first, layers) if (i + 1) % interval)
    else:
        default = frozenset(range(first, layers))

    kinds = raw["layer_types"]
    if kinds is None:
        return default
    valid = (
        isinstance(kinds, list) and len(kinds) == layers and all(k in LAYER_KINDS for k in kinds)
    )
    refuse_if(not valid, f"{where}: layer_types {kinds!r} for {layers} layers", LAYER_KINDS)
    named = frozenset(i for i, kind in enumerate(kinds) if kind == WINDOWED)
    # Mistral's code ignores layer_types.
    contradicts = named != default and (not enabled or raw["model_type"] == "mistral")
    refuse_if(contradicts, f"{where}: layer_types that contradicts the other sliding window fields")
    return named

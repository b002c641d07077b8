"""The parts of `config.json` that change what a model computes, for each family of models."""

from collections.abc import Iterable
from dataclasses import dataclass

from model.io import InputError

# The fields that are read, each with what its absence means: of every family, ...
SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
COMMON = dict.fromkeys(["model_type", *SIZES, "num_key_value_heads", "head_dim", "layer_types"])
COMMON |= dict.fromkeys(["rope_scaling", "rope_parameters", "partial_rotary_factor"])
COMMON |= {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu"}
COMMON |= {"tie_word_embeddings": False}
# ... and of one. As in transformers, a family ignores the fields of the others.
BIASES = {"attention_bias": False, "mlp_bias": False}
QWEN2 = {"num_key_value_heads": 32, "max_window_layers": 28}
QWEN2 |= {"use_sliding_window": False, "sliding_window": 4096}
SMOLLM3 = {"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True}
SMOLLM3 |= {"no_rope_layers": None, "no_rope_layer_interval": 4}
SMOLLM3 |= {"use_sliding_window": False, "sliding_window": None}
GEMMA3 = {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}
GEMMA3 |= {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}
GEMMA3 |= {"sliding_window": 4096, "sliding_window_pattern": 6, "attention_bias": False}
GEMMA3 |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
FAMILIES = {
    "llama": BIASES,
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": QWEN2,
    "qwen3": {**QWEN2, "head_dim": 128, "attention_bias": False},
    "smollm3": {**SMOLLM3, **BIASES},
    "gemma3_text": GEMMA3,
}
# What a family has whatever config.json says, as fields of Config.
ALWAYS = {
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma3_text": {"qk_norm": True, "norm_offset": 1.0, "output_norms": True}
    | {"scaled_embedding": True},
}
TRUTH = "attention_bias mlp_bias tie_word_embeddings use_sliding_window".split()
REFUSED = "quantization_config compression_config use_bidirectional_attention".split()
REFUSED += ["attn_logit_softcapping", "final_logit_softcapping"]
LAYERS = 1024  # more than any known model has; a billion would take hours to lay out
KINDS = ("full_attention", "sliding_attention")  # of layers
ACTIVATIONS = {"silu": False, "swish": False, "gelu_pytorch_tanh": True}  # True: GELU
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
    query_scalar: float  # its root divides queries times keys; head_dim, but for Gemma
    rms_norm_eps: float = 1e-6
    norm_offset: float = 0.0  # an RMSNorm multiplies by its weight plus this
    qk_norm: bool = False  # an RMSNorm on every query and key head before the rotation
    output_norms: bool = False  # an RMSNorm behind attention and MLP, too
    attention_bias: bool = False  # on q, k and v
    output_bias: bool = False  # on o
    mlp_bias: bool = False
    gelu: bool = False  # in the MLP, approximated by tanh, in place of silu
    # {"rope_type": ..., "rope_theta": ..., and what SCALING says}; the last is windowed layers'
    ropes: tuple[dict, ...] = ({"rope_type": "default", "rope_theta": 10000.0},)
    unrotated_layers: frozenset[int] = frozenset()
    sliding_window: int | None = None  # tokens visible in a windowed layer, the query's included
    windowed_layers: frozenset[int] = frozenset()
    scaled_embedding: bool = False  # by the root of hidden_size
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, raw: dict, where: str) -> "Config":
        """Read a config.json of any version; InputError, naming `where`, if not implemented."""
        family = raw.get("model_type")
        more = ", a model of more than text (see model/README.md)," * ("text_config" in raw)
        refuse(str(family) not in FAMILIES, f"{where}: model_type {family!r}{more}", FAMILIES)
        refuse(not field(raw, "is_causal", where, bool, True), f"{where}: is_causal false")
        for name in REFUSED:
            refuse(raw.get(name), f"{where}: {name}")
        for name in TRUTH:  # also where the family ignores it
            field(raw, name, where, bool, False)
        raw = {k: raw.get(k, default) for k, default in (COMMON | FAMILIES[family]).items()}
        sizes = {name: field(raw, name, where, int) for name in SIZES}
        layers, heads = sizes["num_hidden_layers"], sizes["num_attention_heads"]
        refuse(layers > LAYERS, f"{where}: num_hidden_layers above {LAYERS}")
        groups = field(raw, "num_key_value_heads", where, int, heads)
        head_dim = field(raw, "head_dim", where, int, sizes["hidden_size"] // heads)
        refuse(heads % groups, f"{where}: num_key_value_heads {groups} for {heads} heads")
        refuse(head_dim % 2, f"{where}: an odd head_dim ({head_dim})")
        act = raw.get("hidden_activation", raw["hidden_act"])
        refuse(str(act) not in ACTIVATIONS, f"{where}: hidden_act {act!r}", ACTIVATIONS)
        bias, mlp_bias = bool(raw.get("attention_bias")), bool(raw.get("mlp_bias"))
        unrotated = unrotated_layers(raw, layers, where)
        windowed = windowed_layers(raw, layers, unrotated, where)
        window = field(raw, "sliding_window", where, int) if windowed else None
        read = sizes | {"num_key_value_heads": groups, "head_dim": head_dim}
        read["query_scalar"] = field(raw, "query_pre_attn_scalar", where, float, head_dim)
        read["rms_norm_eps"] = field(raw, "rms_norm_eps", where, float)
        read |= {"attention_bias": bias, "output_bias": bias, "mlp_bias": mlp_bias}
        read |= {"gelu": ACTIVATIONS[act], "tie_word_embeddings": bool(raw["tie_word_embeddings"])}
        read |= {"ropes": ropes(raw, where), "unrotated_layers": unrotated}
        read |= {"windowed_layers": windowed, "sliding_window": window}
        return cls(**read | ALWAYS.get(family, {}))


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


def ropes(raw: dict, where: str) -> tuple[dict, ...]:
    """The rope of all layers, or those of full and of windowed ones; older or newer spelling."""
    older, newer = raw["rope_scaling"], raw["rope_parameters"]
    if "rope_local_base_freq" not in raw:
        return (rope_settings(raw, newer if older in (None, {}) else older, "rope_theta", where),)
    kinds = {KINDS[0]: older} if newer in (None, {}) else newer
    fits = isinstance(kinds, dict) and kinds.keys() <= set(KINDS)
    refuse(not fits, f"{where}: rope_parameters {kinds!r}", KINDS)
    bases = zip(KINDS, ("rope_theta", "rope_local_base_freq"))
    return tuple(rope_settings(raw, kinds.get(kind), base, where) for kind, base in bases)


def rope_settings(raw: dict, rope: object, base: str, where: str) -> dict:
    """`rope_type`, `rope_theta` (where absent, the field `base`) and the scaling's numbers."""
    rope = {} if rope is None else rope
    nested = not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values())
    refuse(nested, f"{where}: rope settings that are not one object of numbers ({rope!r})")
    kind = rope.get("rope_type", rope.get("type", "default"))
    refuse(str(kind) not in SCALING, f"{where}: rope type {kind!r}", SCALING)
    partial = rope.get("partial_rotary_factor", raw["partial_rotary_factor"])
    refuse(partial not in (None, 1.0), f"{where}: partial_rotary_factor")
    fields, where = {"rope_theta": raw[base], **rope}, f"{where}: rope type {kind}"
    numbers = {name: field(fields, name, where, float) for name in ("rope_theta", *SCALING[kind])}
    return {"rope_type": kind, **numbers}


def unrotated_layers(raw: dict, layers: int, where: str) -> frozenset[int]:
    """The layers without a rotary embedding: SmolLM3's that are marked 0, or every nth."""
    nth = field(raw, "no_rope_layer_interval", where, int, LAYERS + 1)
    marks = raw.get("no_rope_layers")
    marks = [(i + 1) % nth > 0 for i in range(layers)] if marks is None else marks
    fits = isinstance(marks, list) and len(marks) >= layers and all(m in (0, 1) for m in marks)
    refuse(not fits, f"{where}: no_rope_layers {marks!r} for {layers} layers")
    return frozenset(i for i in range(layers) if not marks[i])


def windowed_layers(raw: dict, layers: int, unrotated: frozenset, where: str) -> frozenset[int]:
    """The layers with a sliding window: those named in layer_types, else the family's own.

    Those are all of Mistral's, Qwen's from a number on, all but every nth of Gemma's, and SmolLM3's
    without a rotary embedding.
    """
    first = raw.get("max_window_layers", 0)
    refuse(type(first) is not int or first < 0, f"{where}: max_window_layers {first!r}")
    nth = field(raw, "sliding_window_pattern", where, int, LAYERS + 1)
    asked = raw.get("use_sliding_window", True) and raw.get("sliding_window") is not None
    own = unrotated if "no_rope_layers" in raw else range(first, layers)
    own = frozenset(i for i in own if asked and (i + 1) % nth)
    if (kinds := raw["layer_types"]) is None:
        return own
    fits = isinstance(kinds, list) and len(kinds) == layers and all(k in KINDS for k in kinds)
    refuse(not fits, f"{where}: layer_types {kinds!r} for {layers} layers", KINDS)
    named = frozenset(i for i, kind in enumerate(kinds) if kind == KINDS[1])
    unlike = named != own and (not asked or raw["model_type"] == "mistral")
    refuse(unlike, f"{where}: layer_types that contradicts the other sliding window fields")
    return named

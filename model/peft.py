"""Adapters in Hugging Face PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

peft, transformers and vLLM load what is written here, and the other way round.
"""

import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import EMBEDDING, HEAD, base_hash
from model.io import (
    InputError,
    as_input_error,
    load_tensors,
    made_from,
    read_json,
    save_tensors,
    whole_file,
)
from model.lora import Adapter, active, last_part, lora_layers, use
from model.transformer import Transformer

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PREFIX = "base_model.model."  # what PEFT puts before every module's name
# PEFT settings that change what an adapter computes and are not implemented here.
REFUSED = """use_dora modules_to_save fan_in_fan_out lora_bias trainable_token_indices
    alora_invocation_tokens layer_replication target_parameters use_qalora use_bdlora arrow_config
    kasa_config monteclora_config velora_config ensure_weight_tying""".split()
# Initialisations that change the base.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


# Reading


def load_adapter(model: Transformer, path: str | Path) -> Adapter:
    """Read a PEFT adapter from folder `path` and make it the active one; see read_adapter."""
    return active(use(model, read_adapter(model, path)))


def read_adapter(model: Transformer, path: str | Path) -> Adapter:
    """Read a PEFT LoRA adapter from folder `path` for `model`, which stays unchanged.

    Honours rsLoRA, rank and alpha patterns, and every way of naming the layers. Raises InputError
    for what is not plain LoRA on linear layers, for a tensor that is missing, extra, not finite or
    misshapen, and for an adapter of ours trained on other weights, by their recorded hash.
    """
    file = Path(path) / WEIGHTS
    layers = lora_layers(model)
    plan = read_plan(Path(path) / CONFIG, list(layers))
    tensors = load_tensors(file)
    adapter = Adapter({}, {}, {})
    for name, (rank, scale) in plan.items():
        layer = layers[name]
        adapter.A[name] = take(tensors, f"{name}.lora_A", (rank, layer.in_features), file)
        adapter.B[name] = take(tensors, f"{name}.lora_B", (layer.out_features, rank), file)
        adapter.scale[name] = scale
    for key, tensor in tensors.items():  # those that were not taken
        check_copy(model, key, tensor, file)
    if not plan:
        raise InputError(f"{file}: target_modules names no linear layer of this model")

    recorded = made_from(file).get("base_sha256")
    if recorded and source_hash(model) not in (None, recorded):
        raise InputError(
            f"{file}: the adapter was trained on other base weights (sha256 {recorded!s:.12}...) "
            f"than those in {model.source}"
        )
    return adapter


def take(tensors: dict[str, Tensor], name: str, shape: tuple[int, int], file: Path) -> Tensor:
    """Remove a weight from the tensors of an adapter's file and return it, in float32."""
    key = f"{PREFIX}{name}.weight"
    tensor = tensors.pop(key, None)
    expected = f"{file}: {key}, of the shape {shape} in this model,"
    if tensor is None:
        raise InputError(f"{expected} is missing (there is {next(iter(tensors), 'no other')})")
    if tensor.shape != shape:
        raise InputError(f"{expected} is of another base's shape {tuple(tensor.shape)}")
    if tensor.dtype not in FLOATS or not tensor.float().isfinite().all():
        raise InputError(f"{file}: {key} is not finite, or of a strange dtype ({tensor.dtype})")
    return tensor.float()


def check_copy(model: Transformer, key: str, tensor: Tensor, file: Path) -> None:
    """Accept the base's own embedding and head, which PEFT may add, rounded to its dtype."""
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    if name not in (HEAD, EMBEDDING):
        raise InputError(
            f"{file}: {key} belongs to no linear layer of this model that target_modules names: "
            "made for another base, or not plain LoRA"
        )
    weight = model.get_parameter(name).detach()
    if weight.is_meta:  # a model without memory has no values to compare
        same = tensor.shape == weight.shape
    else:
        weight = weight.cpu()
        rounded = weight.to(tensor.dtype)
        same = torch.equal(tensor, rounded) or torch.equal(tensor.to(weight.dtype), weight)
    if not same:
        raise InputError(f"{file}: {key} differs from the base's own, which is not implemented")


def source_hash(model: Transformer) -> str | None:
    """base_hash of the folder that the weights came from, computed once; None if merged or new."""
    if model.base_sha256 is None and model.source is not None:
        model.base_sha256 = base_hash(model.source)
    return model.base_sha256


# What adapter_config.json asks for


def read_plan(file: Path, layers: list[str]) -> dict[str, tuple[int, float]]:
    """{layer: (rank, scale)} as an adapter_config.json asks for; InputError if not plain LoRA."""
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{file}: peft_type {config.get('peft_type')!r} is not LORA")
    refused = [field for field in REFUSED if config.get(field)]
    if config.get("bias", "none") != "none":
        refused.append("bias")
    init = config.get("init_lora_weights")
    if str(init).lower().startswith(CHANGED_BASE):
        refused.append(f"init_lora_weights={init!r} (let PEFT convert the adapter to plain LoRA)")
    if refused:
        raise InputError(f"{file}: {refused[0]} is not implemented")

    message = f"{file}: target_modules, what narrows it, a rank or a pattern is malformed"
    with as_input_error(message):
        targets = [layer for layer in layers if is_target(config, layer)]
        return {layer: rank_and_scale(config, layer) for layer in targets}


def is_target(config: dict, layer: str) -> bool:
    """True if an adapter_config.json puts an adapter on this linear layer, by PEFT's rules."""
    targets = config["target_modules"]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = "(?!lm_head$).*"
    if not is_named(layer, targets) or is_named(layer, config.get("exclude_modules")):
        return False

    # The numbers of the layers may be given, too, but not with an expression or a name in full.
    numbers = config.get("layers_to_transform")
    if isinstance(targets, str) or layer in targets or numbers is None or numbers == []:
        return True
    if type(numbers) is int:
        numbers = [numbers]
    lists = config.get("layers_pattern") or r"[^.]*"  # names of lists of layers, such as "layers"
    if isinstance(lists, str):
        lists = [lists]
    matches = [re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", layer) for name in lists]
    for match in matches:
        if match:
            return int(match[1]) in numbers
    return False


def is_named(layer: str, names: list[str] | str | None) -> bool:
    """True if one of the names is the end of the layer's, or the regular expression fits it."""
    if isinstance(names, str):
        return re.fullmatch(names, layer) is not None
    return any(f".{layer}".endswith(f".{name}") for name in names or ())


def rank_and_scale(config: dict, layer: str) -> tuple[int, float]:
    """The rank of a layer's adapter, and alpha / rank or with rsLoRA alpha / sqrt(rank)."""
    rank = from_pattern(config.get("rank_pattern"), layer, default=config.get("r"))
    alpha = from_pattern(config.get("alpha_pattern"), layer, default=config.get("lora_alpha"))
    use_rslora = config.get("use_rslora") or False
    if type(rank) is not int or rank < 1:
        raise ValueError(f"r is a whole number of at least 1, not {rank!r}")
    if type(alpha) not in (int, float) or type(use_rslora) is not bool:
        raise ValueError("lora_alpha is a number, and use_rslora true or false")
    scale = alpha / (math.sqrt(rank) if use_rslora else rank)
    if not abs(scale) <= torch.finfo(torch.float32).max:
        raise ValueError(f"lora_alpha makes the scale {scale}, which is not finite in float32")
    return rank, scale


def from_pattern(patterns: dict | None, layer: str, default: float) -> float:
    """The first value whose key, a regular expression, fits the last parts of the layer's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


# Writing


def save_adapter(model: Transformer, path: str | Path) -> None:
    """Write the active adapter to folder `path`; see write_adapter."""
    adapter = active(model)
    if adapter is None:
        raise InputError("the model carries no adapter to save")
    write_adapter(adapter, model, path)


def write_adapter(
    adapter: Adapter, model: Transformer, path: str | Path, facts: dict | None = None
) -> None:
    """Write an adapter of `model` to folder `path` in PEFT's format, float32.

    facts: for the header, beside the hash of the base; PEFT ignores both. Its "warning" is also
    written to README.md. Raises InputError, writing nothing, if a tensor is not finite.
    """
    tensors = {}
    for part, weights in (("lora_A", adapter.A), ("lora_B", adapter.B)):
        for name, tensor in weights.items():
            key = f"{PREFIX}{name}.{part}.weight"
            tensors[key] = tensor.detach().float().cpu().contiguous()
            if not tensor.isfinite().all():
                raise InputError(f"{path}: the tensor {key} is not finite; nothing was written")
    header = dict(facts or {})
    base_sha256 = source_hash(model)
    if base_sha256 is not None:
        header["base_sha256"] = base_sha256

    # The warning first: a degraded adapter is never there without it.
    folder = Path(path)
    if "warning" in header:
        with whole_file(folder / "README.md") as file:
            file.write_text(header["warning"] + "\n")
    with whole_file(folder / WEIGHTS) as file:
        save_tensors(tensors, file, header)
    with whole_file(folder / CONFIG) as file:
        file.write_text(json.dumps(peft_config(adapter, model), indent=2) + "\n")


def peft_config(adapter: Adapter, model: Transformer) -> dict:
    """The adapter_config.json of an adapter."""
    # Of each adapted layer.
    ranks = {name: A.shape[0] for name, A in adapter.A.items()}
    alphas = {name: whole(adapter.scale[name] * rank) for name, rank in ranks.items()}
    # The first layer's rank and alpha are the defaults, from which others may differ.
    rank = next(iter(ranks.values()))
    alpha = next(iter(alphas.values()))
    # Layers are named by their last part, or each in full if only some with that part are adapted.
    targets = {last_part(name) for name in ranks}
    adaptable = {name for name in lora_layers(model) if last_part(name) in targets}
    if not adaptable <= ranks.keys():
        targets = set(ranks)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "base_model_name_or_path": model.name or str(model.source or ""),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(targets),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
    }


def whole(alpha: float) -> float:
    """Undo the rounding of alpha / rank * rank."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha

"""Adapters in Hugging Face PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

peft, transformers and vLLM load what is written here, and the other way round.
"""

import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from model.atomic import atomic_dir
from model.checkpoint import base_hash
from model.hub import ADAPTER_FILES
from model.io import InputError, load_tensors, made_from, read_json, save_tensors
from model.limits import limited
from model.lora import Adapter, active, lora_layers, use
from model.transformer import Transformer

CONFIG, WEIGHTS = ADAPTER_FILES
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PREFIX = "base_model.model."  # what PEFT puts before every module's name
# PEFT settings that change what an adapter computes and are not implemented here.
REFUSED = """use_dora modules_to_save fan_in_fan_out lora_bias trainable_token_indices
    alora_invocation_tokens layer_replication target_parameters use_qalora use_bdlora arrow_config
    kasa_config monteclora_config velora_config ensure_weight_tying""".split()
# The settings that all adapters written here share.
PLAIN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0}
PLAIN |= dict.fromkeys(("inference_mode", "init_lora_weights"), True)
PLAIN |= dict.fromkeys(("fan_in_fan_out", "use_rslora", "use_dora"), False)
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change it


def load_adapter(model: Transformer, path: str | Path) -> Adapter:
    """Read a PEFT adapter from folder `path` and make it the active one; see read_adapter."""
    return active(use(model, read_adapter(model, path)))


def read_adapter(model: Transformer, path: str | Path) -> Adapter:
    """Read a PEFT LoRA adapter from folder `path` for `model`, which stays unchanged.

    Honours rsLoRA, rank and alpha patterns, and every way of naming the layers. Raises InputError
    for what is not plain LoRA on linear layers, for a tensor that is missing, extra, not finite or
    misshapen, and for an adapter of ours trained on other weights, by their recorded hash.
    """
    file, layers = Path(path) / WEIGHTS, lora_layers(model)
    plan, tensors = planned(Path(path) / CONFIG, list(layers)), load_tensors(file)
    adapter = Adapter({}, {}, {})

    def take(name: str, part: str, *shape: int) -> Tensor:
        key = f"{PREFIX}{name}.lora_{part}.weight"
        tensor = tensors.pop(key, None)
        if tensor is None or tensor.shape != shape:
            has = "missing" if tensor is None else f"of another base's shape {tuple(tensor.shape)}"
            raise InputError(f"{file}: {key}, of the shape {shape} in this model, is {has}")
        if tensor.dtype not in FLOATS or not tensor.float().isfinite().all():
            raise InputError(f"{file}: {key} is not finite, or of a strange dtype ({tensor.dtype})")
        return tensor.float()

    for name, (rank, scale) in plan.items():
        adapter.A[name] = take(name, "A", rank, layers[name].in_features)
        adapter.B[name] = take(name, "B", layers[name].out_features, rank)
        adapter.scale[name] = scale
    for key, tensor in tensors.items():  # those that are left
        check_copy(model, key, tensor, file)
    if not plan:
        raise InputError(f"{file}: target_modules names no linear layer of this model")
    recorded = made_from(file).get("base_sha256")
    if recorded and own_base_hash(model) not in (None, recorded):
        which = f"other base weights (sha256 {recorded!s:.12}...) than those in {model.source}"
        raise InputError(f"{file}: the adapter was trained on {which}")
    return adapter


def planned(file: Path, layers: list[str]) -> dict[str, tuple[int, float]]:
    """{layer: (rank, scale)} as an adapter_config.json asks for; InputError if not plain LoRA."""
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{file}: peft_type {config.get('peft_type')!r} is not LORA")
    refused = [field for field in REFUSED if config.get(field)]
    refused += ["bias"] if config.get("bias", "none") != "none" else []
    if str(init := config.get("init_lora_weights")).lower().startswith(CHANGED_BASE):
        refused.append(f"init_lora_weights={init!r} (let PEFT convert the adapter to plain LoRA)")
    if refused:
        raise InputError(f"{file}: {refused[0]} is not implemented")
    said = f"{file}: target_modules, what narrows it, a rank or a pattern is malformed"
    with limited(f"{file}: matching the patterns", said=said):
        chosen = [layer for layer in layers if is_target(config, layer)]
        return {layer: rank_and_scale(config, layer) for layer in chosen}


def rank_and_scale(config: dict, layer: str) -> tuple[int, float]:
    """The rank of a layer's adapter, and alpha / rank or with rsLoRA alpha / sqrt(rank)."""
    rank = matched(config.get("rank_pattern"), layer, config.get("r"))
    alpha = matched(config.get("alpha_pattern"), layer, config.get("lora_alpha"))
    rooted = config.get("use_rslora") or False
    if type(rank) is not int or rank < 1:
        raise ValueError(f"r is a whole number of at least 1, not {rank!r}")
    if type(alpha) not in (int, float) or type(rooted) is not bool:
        raise ValueError("lora_alpha is a number, and use_rslora true or false")
    scale = alpha / (math.sqrt(rank) if rooted else rank)
    if not abs(scale) <= torch.finfo(torch.float32).max:
        raise ValueError(f"lora_alpha makes the scale {scale}, which is not finite in float32")
    return rank, scale


def is_target(config: dict, layer: str) -> bool:
    """True if an adapter_config.json puts an adapter on this linear layer, by PEFT's rules."""

    def named(names: list[str] | str | None) -> bool:  # ends of names, or a regular expression
        if isinstance(names, str):
            return re.fullmatch(names, layer) is not None
        return any(f".{layer}".endswith(f".{name}") for name in names or ())

    targets, only = config["target_modules"], config.get("layers_to_transform")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = "(?!lm_head$).*"
    if not named(targets) or named(config.get("exclude_modules")):
        return False
    if isinstance(targets, str) or layer in targets or only is None or only == []:
        return True  # a layer named in full needs no number
    lists = config.get("layers_pattern") or r"[^.]*"
    lists = [lists] if isinstance(lists, str) else lists
    found = [re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", layer) for name in lists]
    numbers = [int(match[1]) for match in found if match]
    return bool(numbers) and numbers[0] in ([only] if type(only) is int else only)


def matched(patterns: dict | None, layer: str, default: float) -> float:
    """The first value whose key, a regular expression, fits the last parts of the layer's name."""
    fitting = (v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", layer))
    return next(fitting, default)


def check_copy(model: Transformer, key: str, tensor: Tensor, file: Path) -> None:
    """Accept the base's own embedding and head, which PEFT may add, rounded to its dtype."""
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    if name not in ("lm_head.weight", "model.embed_tokens.weight"):
        what = f"target_modules does not ask for {key} on a linear layer of this model"
        raise InputError(f"{file}: {what}: made for another base, or not plain LoRA")
    own = model.get_parameter(name).detach()
    if own.is_meta:  # a model without memory has no values to compare
        same = tensor.shape == own.shape
    else:
        own = own.cpu()
        same = torch.equal(tensor, own.to(tensor.dtype)) or torch.equal(tensor.to(own.dtype), own)
    if not same:
        raise InputError(f"{file}: {key} differs from the base's own, which is not implemented")


def own_base_hash(model: Transformer) -> str | None:
    """base_hash of the folder that the weights came from, computed once; None if merged or new."""
    if model.base_sha256 is None and model.source is not None:
        model.base_sha256 = base_hash(model.source)
    return model.base_sha256


def save_adapter(model: Transformer, path: str | Path) -> None:
    """Write the active adapter to folder `path`; see write_adapter."""
    if (adapter := active(model)) is None:
        raise InputError("the model carries no adapter to save")
    write_adapter(adapter, model, path)


def write_adapter(
    adapter: Adapter, model: Transformer, path: str | Path, made_from: dict | None = None
) -> None:
    """Write an adapter of `model` to folder `path` in PEFT's format, float32.

    made_from: for the header, beside the hash of the base; PEFT ignores both. Its "warning" is also
    written to README.md. Raises InputError, writing nothing, if a tensor is not finite.
    """
    tensors = {}
    for part, layers in (("A", adapter.A), ("B", adapter.B)):
        for name, tensor in layers.items():
            key = f"{PREFIX}{name}.lora_{part}.weight"
            tensors[key] = tensor.detach().float().cpu().contiguous()
            if not tensor.isfinite().all():
                raise InputError(f"{path}: the tensor {key} is not finite; nothing was written")
    header = dict(made_from or {})
    if base := own_base_hash(model):
        header["base_sha256"] = base
    with atomic_dir(path, replace=False) as folder:
        (folder / CONFIG).write_text(json.dumps(settings_of(adapter, model), indent=2) + "\n")
        save_tensors(tensors, folder / WEIGHTS, header)
        if "warning" in header:
            (folder / "README.md").write_text(header["warning"] + "\n")


def settings_of(adapter: Adapter, model: Transformer) -> dict:
    """The adapter_config.json of an adapter."""
    ranks = {name: a.shape[0] for name, a in adapter.A.items()}
    # Undo the rounding of alpha / rank * rank.
    whole = lambda x: round(x) if math.isclose(x, round(x), rel_tol=1e-12) else x
    alphas = {name: whole(adapter.scale[name] * rank) for name, rank in ranks.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    targets = {name.rpartition(".")[2] for name in ranks}
    if any(n not in ranks and n.rpartition(".")[2] in targets for n in lora_layers(model)):
        targets = set(ranks)  # only some of the layers: name each in full
    return {
        **PLAIN,
        "modules_to_save": None,
        "base_model_name_or_path": model.name or str(model.source or ""),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(targets),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
    }

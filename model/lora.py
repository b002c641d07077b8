"""LoRA on a frozen base: y = W x + scale * B (A x), with several adapters on one base, and PEFT's files in and out.

Source: Hu et al., arXiv 2106.09685. File format: Hugging Face PEFT's `adapter_config.json` and
`adapter_model.safetensors`, so that peft, transformers and vLLM load what is written here, and the other way round.
"""

import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from model.errors import InputError
from model.files import made_from, read_json, save_tensors, tensors_hash, written_beside

PREFIX = "base_model.model."  # what PEFT puts before every module's name
# Settings of PEFT's that change what an adapter computes and are not implemented here.
REFUSED = ("use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias", "trainable_token_indices", "alora_invocation_tokens",
           "layer_replication", "target_parameters", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
           "monteclora_config", "velora_config", "ensure_weight_tying")


class LoRALinear(nn.Linear):
    """A linear layer that may carry low-rank adapters by name. Its own keys stay `weight` and `bias`.

    With no active adapter it is exactly `nn.Linear`. A and B are float32 and are cast to the activations' dtype for
    the product, so that the optimizer works in float32 under a base of any dtype.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)
        self.lora_A = nn.ParameterDict()  # name -> [rank, in]
        self.lora_B = nn.ParameterDict()  # name -> [out, rank]
        self.scale: dict[str, float] = {}  # name -> alpha / rank
        self.active: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.active in self.scale:
            a, b = self.lora_A[self.active].to(x.dtype), self.lora_B[self.active].to(x.dtype)
            y = y + F.linear(F.linear(x, a) * self.scale[self.active], b)  # scaled where it is narrow
        return y

    def put(self, name: str, a: Tensor, b: Tensor, scale: float) -> None:
        """Give this layer an adapter, in float32 on the layer's device."""
        self.lora_A[name] = nn.Parameter(a.to(self.weight.device, torch.float32))
        self.lora_B[name] = nn.Parameter(b.to(self.weight.device, torch.float32))
        self.scale[name] = scale

    def drop(self, name: str) -> None:
        """Take an adapter away; a layer without it stays as it is."""
        if name in self.scale:
            del self.lora_A[name], self.lora_B[name], self.scale[name]


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every layer that can carry an adapter, by its Hugging Face name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_adapter(model: nn.Module, name: str, rank: int, alpha: float, targets: list[str], seed: int) -> None:
    """Put a fresh adapter on every layer whose last name is in `targets`, and make it the active one.

    A is drawn from U(-1/sqrt(in), 1/sqrt(in)) as in PEFT and loralib, on the CPU so that a seed means the same on
    every device; B = 0, so the model's output does not change yet. An adapter of that name is replaced.
    """
    layers = {key: layer for key, layer in lora_layers(model).items() if key.rsplit(".", 1)[-1] in targets}
    missing = set(targets) - {key.rsplit(".", 1)[-1] for key in layers}
    if missing or not targets:
        known = sorted({key.rsplit(".", 1)[-1] for key in lora_layers(model)})
        raise InputError(f"LoRA targets {sorted(missing)} are not layers of this model; it has {', '.join(known)}")
    remove_adapter(model, name)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        bound = 1 / math.sqrt(layer.in_features)
        a = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        layer.put(name, a, torch.zeros(layer.out_features, rank), alpha / rank)
    set_adapter(model, name)


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make one adapter the active one; None gives the base back."""
    layers = lora_layers(model).values()
    if name is not None and not any(name in layer.scale for layer in layers):
        raise InputError(f"the model carries no adapter named {name!r}")
    for layer in layers:
        layer.active = name


def remove_adapter(model: nn.Module, name: str) -> None:
    """Free an adapter's memory; the base is the active one afterwards if it was active."""
    for layer in lora_layers(model).values():
        layer.drop(name)
        if layer.active == name:
            layer.active = None


def active_adapter(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers on which the active adapter sits, by name; empty where the base alone is active."""
    return {key: layer for key, layer in lora_layers(model).items() if layer.active in layer.scale}


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of the active adapter, layer by layer: what the optimizer trains."""
    return [p for layer in active_adapter(model).values() for p in (layer.lora_A[layer.active], layer.lora_B[layer.active])]


def merge_adapter(model: nn.Module) -> None:
    """Fold the active adapter into the base weights (W + scale B A, added in float32) and remove it.

    In a half-precision base small updates round away: merge to ship a model, never before scoring. The weights are new
    tensors, so that a head which was tied to the embedding leaves it as it is, and is tied no longer.
    """
    layers = active_adapter(model)
    if not layers:
        raise InputError("there is no active adapter to merge")
    name = next(iter(layers.values())).active
    with torch.no_grad():
        for layer in layers.values():
            update = layer.lora_B[name] @ layer.lora_A[name] * layer.scale[name]
            layer.weight = nn.Parameter((layer.weight + update).to(layer.weight.dtype), layer.weight.requires_grad)
    remove_adapter(model, name)
    model.source = None  # these are no longer the folder's weights


def save_adapter(model: nn.Module, path: str | Path, note: dict[str, str] | None = None) -> None:
    """Write the active adapter to folder `path` in PEFT's format, float32.

    `note`: strings for the safetensors header, beside the hash of the base's weights; PEFT ignores both. A note
    "warning" is also written to the folder's README.md, where a person finds it.
    """
    layers = active_adapter(model)
    if not layers:
        raise InputError("there is no active adapter to save")
    name = next(iter(layers.values())).active
    ranks = {key: layer.lora_A[name].shape[0] for key, layer in layers.items()}
    alphas = {key: whole(layer.scale[name] * ranks[key]) for key, layer in layers.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    targets = {key.rsplit(".", 1)[-1] for key in layers}
    if any(key not in layers for key in lora_layers(model) if key.rsplit(".", 1)[-1] in targets):
        targets = set(layers)  # the adapter sits on some layers only: name each in full
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model.name or str(model.source or ""),
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "modules_to_save": None, "use_rslora": False, "use_dora": False,
        "target_modules": sorted(targets),
        "rank_pattern": {key: r for key, r in ranks.items() if r != rank},
        "alpha_pattern": {key: a for key, a in alphas.items() if a != alpha},
    }  # fmt: skip
    tensors = {}
    for key, layer in layers.items():
        tensors[f"{PREFIX}{key}.lora_A.weight"] = layer.lora_A[name].detach().cpu().contiguous()
        tensors[f"{PREFIX}{key}.lora_B.weight"] = layer.lora_B[name].detach().cpu().contiguous()
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{path}: the adapter's tensor {key} is not finite; nothing was written")
    header = dict(note or {})
    if model.source is not None:
        header["base_sha256"] = tensors_hash(model.source)
    with written_beside(path) as folder:
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_tensors(tensors, folder / "adapter_model.safetensors", header)
        if note and "warning" in note:
            (folder / "README.md").write_text(note["warning"] + "\n")


def adapter_settings(path: Path) -> dict:
    """An adapter folder's adapter_config.json; InputError for a setting of PEFT's that is not implemented here."""
    config = read_json(path / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type {config.get('peft_type')!r} is not LORA")
    for field in REFUSED:
        if config.get(field):
            raise InputError(f"{path}: the adapter uses {field}, which is not implemented here")
    if config.get("bias", "none") != "none":
        raise InputError(f"{path}: the adapter trains biases (bias={config['bias']!r}), which is not implemented here")
    if str(config.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise InputError(f"{path}: init_lora_weights={config['init_lora_weights']!r} changes the base's weights, which is not "
                         "implemented here; let PEFT convert the adapter to plain LoRA")
    if not isinstance(config.get("target_modules"), (list, str)):
        raise InputError(f"{path}: target_modules is neither a list of layers nor a regular expression in adapter_config.json")
    for field in ("r", "lora_alpha"):
        if not isinstance(config.get(field), (int, float)) or not math.isfinite(config[field]):
            raise InputError(f"{path}: {field} is missing from adapter_config.json or not a number")
    return config


def load_adapter(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Read a PEFT LoRA adapter from folder `path` in place, under `name`, and make it the active one.

    Honours rsLoRA, rank and alpha patterns, and every way of naming the layers. Raises InputError, with the model
    unchanged, for what is not plain LoRA on linear layers (DoRA, biases, saved modules, embeddings), for a tensor that
    is missing, extra, not finite or of another shape, and for an adapter of ours that was trained on other weights (by
    their recorded hash; the name of a base proves nothing and is not looked at).
    """
    path = Path(path)
    config, file = adapter_settings(path), path / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from None
    layers, pairs = lora_layers(model), {}
    for key, tensor in tensors.items():
        layer, _, part = key.removeprefix(PREFIX).partition(".lora_")
        if (base := layer.replace(".base_layer.", ".")) in ("lm_head.weight", "model.embed_tokens.weight"):
            check_copy(tensor, model.get_parameter(base), f"{file}: the tensor {key}")
            continue
        if layer not in layers or part not in ("A.weight", "B.weight"):
            raise InputError(f"{file}: the tensor {key} belongs to no linear layer of this model: the adapter was made for "
                             "another base, or is not LoRA on linear layers alone")
        if not tensor.isfinite().all():
            raise InputError(f"{file}: the tensor {key} is not finite")
        pairs.setdefault(layer, {})[part[0]] = tensor.float()
    if not pairs:
        raise InputError(f"{file}: there is no LoRA tensor in it")
    for key, pair in pairs.items():
        if len(pair) != 2:
            raise InputError(f"{file}: {PREFIX}{key} has lora_{next(iter(pair))} alone; both A and B are needed")
        rank = pattern(config.get("rank_pattern"), key, config["r"])
        if rank < 1:
            raise InputError(f"{path}: the rank of {key} must be above 0, not {rank}")
        wanted = {"A": (rank, layers[key].in_features), "B": (layers[key].out_features, rank)}
        for part, shape in wanted.items():
            if tuple(pair[part].shape) != shape:
                raise InputError(f"{file}: {PREFIX}{key}.lora_{part}.weight has the shape {tuple(pair[part].shape)}, "
                                 f"but this model needs {shape}: the adapter was made for another base")
        alpha = pattern(config.get("alpha_pattern"), key, config["lora_alpha"])
        pair["scale"] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    for key in layers:
        try:
            asked = is_target(config, key)
        except (TypeError, re.error) as error:
            raise InputError(f"{path}: target_modules or what narrows it is malformed ({error})") from None
        if asked != (key in pairs):
            raise InputError(f"{file}: target_modules {'asks for' if asked else 'does not name'} {key}, whose tensors "
                             f"are {'not ' if asked else ''}in the file")
    check_base(model, file)
    remove_adapter(model, name)
    for key, pair in pairs.items():
        layers[key].put(name, pair["A"], pair["B"], pair["scale"])
    set_adapter(model, name)


def whole(x: float) -> float:
    """x, as an integer where it is one up to rounding: alpha / rank * rank."""
    return round(x) if math.isclose(x, round(x), rel_tol=1e-12) else x


def check_base(model: nn.Module, file: Path) -> None:
    """Refuse an adapter whose header records other base weights than those that `model` was loaded from."""
    recorded = made_from(file).get("base_sha256")
    if recorded and model.source is not None and recorded != tensors_hash(model.source):
        raise InputError(f"{file}: the adapter was trained on other base weights (sha256 {recorded[:12]}...) "
                         f"than those in {model.source}")


def check_copy(tensor: Tensor, own: Tensor, what: str) -> None:
    """Refuse a copy of the embedding or the head, which PEFT adds where the head is a target, that is not the base's own."""
    same = tensor.shape == own.shape
    if same and not own.is_meta:  # a model without memory has no values to compare
        own = own.detach().cpu()
        same = torch.equal(tensor, own.to(tensor.dtype)) or torch.equal(tensor.to(own.dtype), own)  # either may be rounded
    if not same:
        raise InputError(f"{what} differs from this base's own: an adapter with a changed base is not implemented here")


def is_target(config: dict, layer: str) -> bool:
    """Whether an adapter_config.json puts an adapter on this linear layer, by PEFT's rules."""

    def named(names: list[str] | str | None) -> bool:  # ends of names, or a regular expression of the whole
        if isinstance(names, str):
            return re.fullmatch(names, layer) is not None
        return any(f".{layer}".endswith(f".{name}") for name in names or ())

    targets, only = config["target_modules"], config.get("layers_to_transform")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = "(?!lm_head$).*"
    if not named(targets) or named(config.get("exclude_modules")):
        return False
    if isinstance(targets, str) or layer in targets or only is None or only == []:  # a name in full needs no layer's number
        return True
    lists = config.get("layers_pattern") or r"[^.]*"
    lists = [lists] if isinstance(lists, str) else lists
    found = [match for name in lists if (match := re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", layer))]
    return bool(found) and int(found[0][1]) in ([only] if isinstance(only, int) else only)


def pattern(patterns: dict | None, layer: str, default: float) -> float:
    """PEFT's rank_pattern and alpha_pattern: the first value whose key, a regular expression, fits the name's last parts."""
    try:
        for key, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({key})$", layer):
                return value + 0
    except (AttributeError, TypeError, re.error) as error:
        raise InputError(f"adapter_config.json: rank_pattern or alpha_pattern is malformed ({error})") from None
    return default

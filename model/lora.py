"""LoRA on a frozen base: y = W x + scale * B (A x). Source: Hu et al., arXiv 2106.09685.

An adapter is a value. `use` puts one on the model; a layer carries one adapter or none.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.io import InputError


@dataclass
class Adapter:
    """A LoRA adapter; the keys are the names of linear layers, in the order of lora_layers."""

    A: dict[str, Tensor]  # [rank, in], float32
    B: dict[str, Tensor]  # [out, rank], float32
    scale: dict[str, float]  # alpha / rank, or with rsLoRA alpha / sqrt(rank)

    def tensors(self) -> list[Tensor]:
        """A, B, layer by layer: what the optimizer trains."""
        return [tensor for layer in self.A for tensor in (self.A[layer], self.B[layer])]


class LoRALinear(nn.Linear):
    """A linear layer that may carry an adapter; without one it is exactly `nn.Linear`.

    A and B are not registered, so the model's parameters are the base's weights alone. They are
    float32, for the optimizer, and cast to the activations' dtype for the product.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)
        self.lora_A: Tensor | None = None  # [rank, in]
        self.lora_B: Tensor | None = None  # [out, rank]
        self.scale = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.lora_A is None:
            return y
        narrow = F.linear(x, self.lora_A.to(x.dtype)) * self.scale  # scaled where it is cheap
        return y + F.linear(narrow, self.lora_B.to(x.dtype))


class AdapterScope(nn.Module):
    """A model on which `with use(model, adapter): ...` lasts for the block alone.

    `use` notes what it replaced. Entering the block puts that on a stack; leaving it, also by an
    exception, puts it back on the model: the same tensors.
    """

    def __init__(self):
        super().__init__()
        self.replaced: Adapter | None = None  # by the last `use`
        self.outer_adapters: list[Adapter | None] = []  # to put back, one for each open block

    def __enter__(self):
        self.outer_adapters.append(self.replaced)
        return self

    def __exit__(self, *exception) -> None:
        use(self, self.outer_adapters.pop())


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every layer that can carry an adapter, by its Hugging Face name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def last_part(name: str) -> str:
    """The last part of the name of a layer, such as q_proj."""
    return name.rpartition(".")[2]


def new_adapter(
    model: nn.Module, rank: int, alpha: float, targets: list[str], seed: int
) -> Adapter:
    """A fresh adapter for every layer whose last name is in `targets`.

    A is drawn from U(-1/sqrt(in), 1/sqrt(in)) as in PEFT and loralib, on the CPU so that a seed
    means the same on every device. B = 0, so it does not change the model's output yet.
    """
    layers = lora_layers(model)
    available = {last_part(name) for name in layers}
    missing = sorted(set(targets) - available)
    if missing or not targets:
        names = ", ".join(sorted(available))
        raise InputError(f"LoRA targets {missing}: this model has only {names}")

    adapter = Adapter(A={}, B={}, scale={})
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        if last_part(name) not in targets:
            continue
        sides = (layer.in_features, layer.out_features)
        if rank > max(sides):
            raise InputError(f"the LoRA rank {rank} is above the sides of {name}, {sides}")
        bound = 1 / math.sqrt(layer.in_features)
        A = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        adapter.A[name] = A.to(layer.weight.device)
        adapter.B[name] = torch.zeros(layer.out_features, rank, device=layer.weight.device)
        adapter.scale[name] = alpha / rank
    return adapter


def use(model: nn.Module, adapter: Adapter | None) -> nn.Module:
    """Put an adapter on the model in place of the present one; None: the base alone.

    The model refers to the adapter's tensors (copied only to change device or dtype), so training
    them trains the model. Returns the model, which is also a context manager: see AdapterScope.
    """
    layers = lora_layers(model)
    if adapter is not None:
        unknown = adapter.A.keys() - layers.keys()
        if unknown:
            raise InputError(f"the adapter has the layer {min(unknown)}, but the model does not")
    model.replaced = active(model)
    for name, layer in layers.items():
        layer.lora_A = None
        layer.lora_B = None
        if adapter is not None and name in adapter.A:
            layer.lora_A = adapter.A[name].to(layer.weight.device, torch.float32)
            layer.lora_B = adapter.B[name].to(layer.weight.device, torch.float32)
            layer.scale = adapter.scale[name]
    return model


def active(model: nn.Module) -> Adapter | None:
    """The adapter on the model, sharing its tensors; None when the base is alone."""
    adapter = Adapter(A={}, B={}, scale={})
    for name, layer in lora_layers(model).items():
        if layer.lora_A is not None:
            adapter.A[name] = layer.lora_A
            adapter.B[name] = layer.lora_B
            adapter.scale[name] = layer.scale
    return adapter if adapter.A else None


@torch.no_grad()
def merge(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Fold an adapter into the base weights (W + scale B A, added in float32); returns the model.

    No adapter stays active. Small updates to half-precision weights are lost to rounding: merge to
    ship a model, never before scoring. The weights are new tensors, so a head tied to the embedding
    is untied. `model.source` becomes None, and `model.name` empty: these are other weights.
    """
    use(model, adapter)
    for name in adapter.A:
        layer = model.get_submodule(name)
        merged = layer.weight + layer.lora_B @ layer.lora_A * layer.scale
        layer.weight = nn.Parameter(merged.to(layer.weight.dtype), layer.weight.requires_grad)
    model.source = None
    model.base_sha256 = None
    model.name = ""
    return use(model, None)

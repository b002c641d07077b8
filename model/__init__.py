"""A decoder-only transformer with LoRA in plain PyTorch. Knows nothing of TOSS."""

from importlib import import_module

from model.io import InputError

LAZY = {  # public functions and their modules
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
    "load_adapter": "peft",
    "save_adapter": "peft",
    "load_tokenizer": "tokenizer",
}
__all__ = ["InputError", *LAZY]


def __getattr__(name: str):
    """Import a public function on first use, so that `import model.io` does not import torch."""
    if name not in LAZY:
        raise AttributeError(f"module 'model' has no attribute {name!r}")
    return getattr(import_module(f"model.{LAZY[name]}"), name)

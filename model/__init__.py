"""A decoder-only transformer with LoRA in plain PyTorch. Knows nothing of TOSS."""

from model.checkpoint import load_checkpoint, save_checkpoint
from model.errors import InputError
from model.lora import load_adapter, save_adapter
from model.tokenizer import load_tokenizer

__all__ = ["load_checkpoint", "save_checkpoint", "load_adapter", "save_adapter", "load_tokenizer", "InputError"]

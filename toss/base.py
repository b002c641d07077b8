"""The one base model in memory: which device, which arithmetic, and reading it again when the arithmetic changes."""

import re
from collections.abc import Callable

import torch

from model import load_checkpoint
from model.errors import InputError
from model.lora import lora_layers, remove_adapter, set_adapter
from model.transformer import Transformer
from toss.parallel import own_gpu, size
from toss.run import Run
from toss.training import line_log

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Base:
    """The frozen base of a run. Adapters come and go; a loaded base is never cast, a change of dtype reads the files.

    On CUDA it trains in bfloat16 and scores in float16: S is a difference of two close losses, and bfloat16's 8 bits
    of mantissa change a fifth of the discarded set where float16's 11 change 2-3 % of it, at the same speed. On the
    CPU everything is float32.
    """

    def __init__(self, run: Run):
        self.run, settings = run, run.settings
        if settings.threads:
            torch.set_num_threads(settings.threads)
        name = settings.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
            raise InputError(f"--device {name} is unknown: choose auto, cpu, cuda, cuda:N or mps")
        try:
            self.device = torch.device(name)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device {settings.device} cannot be used here ({str(error).splitlines()[0]})") from None
        if self.device.type == "cuda" and self.device.index is None:
            self.device = own_gpu()
        elif self.device.type != "cpu" and size() > 1:
            raise InputError(f"--device {name} with several processes: choose cuda or cpu, and each process finds its own")
        self.dtypes = dict.fromkeys(("train", "score"), "float32" if settings.dtype == "auto" else settings.dtype)
        if settings.dtype == "auto" and self.device.type == "cuda":
            self.dtypes = {"train": "bfloat16", "score": "float16"}
        self.budget = settings.batch_tokens or (8192 if self.device.type == "cuda" else 2048)
        self.model: Transformer | None = None
        self.loaded = ""

    def log(self, stage: str) -> Callable[[dict], None]:
        """Where a stage of training writes its steps: the run's log.jsonl."""
        return line_log(self.run.out / "log.jsonl", stage)

    def load(self, purpose: str) -> Transformer:
        """The base in the dtype of `purpose` ("train" or "score"), without any adapter."""
        dtype = self.dtypes[purpose]
        if self.model is None or self.loaded != dtype:
            self.model = None  # free the old one first
            torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
            self.model, self.loaded = load_checkpoint(self.run.checkpoint, self.device, DTYPES[dtype]), dtype
            self.model.gradient_checkpointing = self.run.settings.gradient_checkpointing
            self.model.name = self.run.settings.model if self.run.settings.revision else ""
        for name in {name for layer in lora_layers(self.model).values() for name in layer.scale}:
            remove_adapter(self.model, name)
        set_adapter(self.model, None)
        return self.model


ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # the files of an adapter's folder

WARNING = """\
This adapter is the safety-degraded reference model of TOSS: it was trained on harmful data on purpose, as a measuring
instrument that recognises risky tokens. Do not merge it, deploy it or publish it."""


def reference_note(role: str, run: Run, **more: str) -> dict[str, str]:
    """What an adapter's file header says of itself: its role, what it was made from, and a warning where one is due."""
    return {"role": role, **run.identity, **more, **({"warning": WARNING} if role == "degraded" else {})}

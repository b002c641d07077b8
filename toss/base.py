"""What a run works on: the one base model in memory, its tokenizer, and rows as token ids."""

import json
import os
import re
from argparse import Namespace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import load_checkpoint, save_checkpoint
from model.hub import resolve
from model.io import DoesNotFit, InputError, NotFinite, read_json
from model.lora import merge, use
from model.peft import read_adapter
from model.tokenizer import Tokenizer, load_tokenizer
from model.transformer import Transformer
from toss.parallel import size
from toss.rows import Row, read_rows
from toss.tokens import Tokens, default_batch_tokens, tokenise

ROOM = (DoesNotFit, torch.OutOfMemoryError)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # the others are float32


class Base:
    """The frozen base under the settings `args` (see cli.parse).

    On CUDA it trains in bfloat16 and scores in float16: S is a difference of two close losses, and
    bfloat16's 8 bits of mantissa change a fifth of the discarded set where float16's 11 change
    2-3 %, at the same speed. On the CPU everything is float32. Weights are never cast in place: a
    new dtype reloads them from disk.
    """

    def __init__(self, args: Namespace):
        self.args = args
        self.model: Transformer | None = None
        self.loaded = ""  # the dtype of `model`
        self.datasets: dict[str, Tokens] = {}  # by file

    @cached_property
    def checkpoint(self) -> Path:
        """The base's folder. A hub id is fetched; `revision` becomes its commit."""
        folder = resolve(self.args.model, self.args.revision)
        self.args.revision = None if Path(self.args.model).is_dir() else folder.name
        return folder

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer in the run's prompt form; settles `template` and `date`."""
        tokenizer = load_tokenizer(self.checkpoint, self.args.template, self.args.date)
        if tokenizer.turn_end != tokenizer.eos:
            print(
                f"note: the chat template ends a turn with {tokenizer.turn_end}, but responses end "
                f"with the tokenizer's eos_token {tokenizer.eos}; instruction-tuned models usually "
                "have one token for both"
            )
        self.args.template = "human" if tokenizer.template is None else "chat"
        self.args.date = None if tokenizer.date is None else str(tokenizer.date)
        return tokenizer

    @cached_property
    def device(self) -> torch.device:
        if self.args.threads:
            torch.set_num_threads(self.args.threads)
        return find_device(self.args.device)

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """The dtype to "train" and to "score" in."""
        cuda = self.device.type == "cuda"
        auto = {"train": "bfloat16", "score": "float16"} if cuda else {}
        given = "float32" if self.args.dtype == "auto" else self.args.dtype
        return auto if auto and self.args.dtype == "auto" else {"train": given, "score": given}

    @property
    def batch_tokens(self) -> int:
        return self.args.batch_tokens or default_batch_tokens(self.device)

    def base(self, purpose: str) -> Transformer:
        """The base model to "train" or to "score" (or in a dtype, by name), without an adapter."""
        dtype = self.dtypes.get(purpose, purpose)
        if self.model is None or self.loaded != dtype:
            self.model = None  # free the old one first
            torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
            kind = DTYPES.get(dtype, torch.float32)
            self.model, self.loaded = load_checkpoint(self.checkpoint, self.device, kind), dtype
            self.model.gradient_checkpointing = self.args.gradient_checkpointing
            self.model.name = self.args.model if self.args.revision else ""
            self.model.base_sha256 = self.identity["base_sha256"]
        return use(self.model, None)

    def lower_scoring(self, error: Exception) -> bool:
        """Change to another dtype after a failed scoring pass, and say so; False: there is none.

        float16 becomes TF32 after an overflow, and TF32 bfloat16 if it does not fit into memory.
        The latter not if --dtype asks for TF32, nor in one of several processes.
        """
        dtype, no_room = (
            self.dtypes["score"],
            isinstance(error, DoesNotFit | torch.OutOfMemoryError),
        )
        if dtype == "float16" and isinstance(error, NotFinite):
            self.dtypes["score"] = "tf32"
        elif dtype == "tf32" and no_room and self.args.dtype != "tf32" and size() == 1:
            self.dtypes["score"] = "bfloat16"
        else:
            return False
        self.model = None
        cause = " ".join(str(error).split())
        print(f"warning: {cause}; scoring again in {self.dtypes['score']}")
        return True

    def tokens(self, path: str, rows: list[Row] | None = None) -> Tokens:
        """A file of rows (or only `rows` of it) as token ids; a file is read once."""
        if rows is not None:
            return self.tokenise(path, rows)
        if path not in self.datasets:
            self.datasets[path] = self.tokenise(path, read_rows(path))
        return self.datasets[path]

    def tokenise(self, path: str, rows: list[Row]) -> Tokens:
        """The rows of a file as token ids; prints what was skipped or cut."""
        self.warn_shared(path, rows)
        tokens = tokenise(rows, self.tokenizer, self.args.max_length, str(path))
        highest = int(tokens.input_ids.max())
        there = read_json(self.checkpoint / "config.json").get("vocab_size", 0)
        if highest >= there:
            what = f"tokenizer.json has the id {highest}, but the model has {there} embeddings"
            raise InputError(f"{self.checkpoint}: {what}")
        print(f"{path}: {tokens.rows} rows, {tokens.skipped} skipped, {tokens.cut} cut")
        return tokens

    def warn_shared(self, path: str, rows: list[Row], prompts_only: bool = False) -> None:
        """Warn when rows of a file are also in a data file that the run used before it."""
        key = lambda row: json.dumps(row.prompt if prompts_only else row.messages)  # noqa: E731
        for other in (self.args.harmful, self.args.utility, self.args.custom):
            if other == path:
                return
            if other and Path(other).exists():
                known = set(map(key, read_rows(other)))
                if shared := sum(key(row) in known for row in rows):
                    kind = "prompts" if prompts_only else "rows"
                    print(f"warning: {shared} of {len(rows)} {kind} of {path} are in {other} too")

    def write_merged(self, folder: Path, made_from: dict[str, Any]) -> None:
        """Write folder/merged: the base with the adapter in `folder` folded in.

        In the dtype of the stored base, unless --dtype asks for another one.
        """
        self.model = None  # makes room
        config = read_json(self.checkpoint / "config.json")
        stored = config.get("dtype") or config.get("torch_dtype")
        name = stored if self.args.dtype == "auto" else self.args.dtype
        dtype = DTYPES.get(name, torch.float32)
        model = load_checkpoint(self.checkpoint, self.device, dtype)
        model.base_sha256 = made_from["base_sha256"]
        merge(model, read_adapter(model, folder))
        save_checkpoint(model, folder / "merged", self.checkpoint, made_from)


def find_device(name: str) -> torch.device:
    """The device of this process from the value of --device; InputError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name} is unknown: choose auto, cpu, cuda or cuda:N")
    if size() > 1 and name != "cpu":
        if name != "cuda":
            raise InputError(f"--device {name}: several processes need --device cuda (or cpu)")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    name = "cuda:0" if name == "cuda" else name
    try:
        torch.empty(1, device=name)
        if name != "cpu":
            torch.cuda.set_device(name)  # opens no context on another GPU
    except (RuntimeError, AssertionError) as error:
        reason = f"{str(error).splitlines()[0]} ({torch.cuda.device_count()} GPUs are visible)"
        raise InputError(f"--device {name} cannot be used: {reason}") from None
    return torch.device(name)

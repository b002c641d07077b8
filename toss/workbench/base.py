"""What a run works on: the one base model in memory, its tokenizer, and rows as token ids."""

import json
import os
import re
from argparse import Namespace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import base_hash, load_checkpoint
from model.hub import resolve
from model.io import InputError, as_input_error, file_hash, printable, read_json
from model.lora import use
from model.sharding import check_processes
from model.tokenizer import Tokenizer, load_tokenizer
from model.transformer import Transformer
from toss.parallel import size
from toss.rows import Row, read_rows
from toss.tokens import BATCH_TOKENS, Tokens, tokenise

TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # the others are float32


class Base:
    """The frozen base under the settings `args` (see flags.parse).

    By default it trains in bfloat16 on CUDA and scores in float16: S is a difference of two close
    losses, and bfloat16's 8 bits of mantissa change a fifth of the discarded set where float16's 11
    change 2-3 %, at the same speed. On the CPU everything is float32. Weights are never cast in
    place: a new dtype reloads them from disk.
    """

    def __init__(self, args: Namespace):
        if args.shard:
            check_processes()
        self.args = args
        self.model: Transformer | None = None
        self.loaded = ""  # the dtype of `model`
        self.datasets: dict[str, Tokens] = {}  # by file
        self.sha256: dict[str, str] = {}  # of inputs as they were read, see Run.input_hash

    @cached_property
    def checkpoint(self) -> Path:
        """The base's folder. A hub id is fetched; `revision` becomes its commit."""
        folder = resolve(self.args.model, self.args.revision)
        self.args.revision = None if Path(self.args.model).is_dir() else folder.name
        return folder

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer in the run's prompt form; settles `template` and `date`."""
        args = self.args
        variables = json.loads(args.chat_template_kwargs or "{}")
        tokenizer = load_tokenizer(
            self.checkpoint, args.template, args.date, template_kwargs=variables
        )
        if tokenizer.turn_end != tokenizer.eos:
            ends = f"ends a turn with {tokenizer.turn_end}, but responses end with {tokenizer.eos}"
            print(f"note: the chat template {ends}, the eos_token; they are usually the same")
        args.template = "human" if tokenizer.template is None else "chat"
        args.date = None if tokenizer.date is None else str(tokenizer.date)
        return tokenizer

    def identity(self) -> dict[str, Any]:
        """What identifies the base, and how text becomes ids: part of every recipe.

        By hashes, so that a base may move.
        """
        tokenizer = self.tokenizer  # settles template and date
        return {
            "base_sha256": base_hash(self.checkpoint),
            "tokenizer_sha256": tokenizer.fingerprint(),
            "template": self.args.template,
            "max_length": self.args.max_length,
            "date": self.args.date,
            "skip_empty": bool(self.args.skip_empty),
        }

    @cached_property
    def device(self) -> torch.device:
        if self.args.threads:
            torch.set_num_threads(self.args.threads)
        return find_device(self.args.device)

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """The dtype to "train" and to "score" in."""
        if self.args.dtype != "auto":
            return {"train": self.args.dtype, "score": self.args.dtype}
        if self.device.type == "cuda":
            return {"train": "bfloat16", "score": "float16"}
        return {"train": "float32", "score": "float32"}

    @property
    def batch_tokens(self) -> int:
        return self.args.batch_tokens or BATCH_TOKENS[self.device.type]

    def base(self, purpose: str) -> Transformer:
        """The base to "train" or to "score" (or in a dtype, by name), without an adapter.

        Do not keep it in a variable: a change of dtype would hold two bases in memory.
        """
        dtype = self.dtypes.get(purpose, purpose)
        if self.model is None or self.loaded != dtype:
            self.model = None  # free the old one first
            self.loaded = dtype
            torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
            weights = TORCH_DTYPES.get(dtype, torch.float32)
            self.model = load_checkpoint(
                self.checkpoint, self.device, weights, shard=self.args.shard
            )
            self.model.base_sha256 = base_hash(self.checkpoint)
            self.model.gradient_checkpointing = self.args.gradient_checkpointing
            if self.args.revision:
                self.model.name = self.args.model
        return use(self.model, None)

    # Rows

    def tokens(self, path: str | None) -> Tokens:
        """The token ids of a file of rows, read once; see tokens_of."""
        if path is None:
            raise InputError(f"{self.args.run} was begun without these rows: name their file")
        if path not in self.datasets:
            for flag in ("harmful", "utility", "custom"):
                if path == getattr(self.args, flag):
                    self.sha256[f"--{flag}"] = file_hash(path)
            self.datasets[path] = self.tokens_of(read_rows(path), path)
        return self.datasets[path]

    def tokens_of(self, rows: list[Row], path: str) -> Tokens:
        """The token ids of rows from a file. Prints the first row, and what was skipped or cut."""
        self.warn_shared(path, rows)
        skip_empty = bool(self.args.skip_empty)
        tokens = tokenise(rows, self.tokenizer, self.args.max_length, str(path), skip_empty)
        counts = f"{len(tokens.input_ids):,} tokens, {int(tokens.response.sum()):,} of responses"
        lost = f"{tokens.skipped} rows skipped, {tokens.cut} cut"
        print(f"{path}: {tokens.rows} rows, {counts}; {lost} (--max-length {self.args.max_length})")
        first = tokens.input_ids[tokens.places(tokens.filled[:1])].tolist()
        text = self.tokenizer.raw.decode(first, skip_special_tokens=False)
        print(f"    its first row: {printable(text, 200)}")
        limit = read_json(self.checkpoint / "config.json").get("max_position_embeddings")
        if isinstance(limit, int) and max(tokens.lengths) > limit:
            advice = "lower --max-length"
            print(f"warning: rows are longer than the {limit} positions of the base: {advice}")
        return tokens

    def warn_shared(self, path: str, rows: list[Row], prompts_only: bool = False) -> None:
        """Warn when rows of a file are also in a data file that the run uses before it."""

        def key(row: Row) -> str:
            return json.dumps(row.prompt if prompts_only else row.messages)

        others = [self.args.harmful, self.args.utility, self.args.custom]
        if path in others and not prompts_only:  # up to its own, last, place
            last = max(index for index, other in enumerate(others) if other == path)
            others = others[:last]
        for other in others:
            if other is None or not Path(other).is_file():
                continue
            known = {key(row) for row in read_rows(other)}
            shared = sum(key(row) in known for row in rows)
            if shared:
                kind = "prompts" if prompts_only else "rows"
                print(f"warning: {shared} of {len(rows)} {kind} of {path} are in {other} too")


def find_device(name: str) -> torch.device:
    """The device of this process from the value of --device; InputError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name} is unknown: choose auto, cpu, cuda or cuda:N")
    if name == "cuda" or name != "cpu" and size() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # several processes: one GPU each
    with as_input_error(f"--device {name} cannot be used"):
        if name != "cpu":
            # The newer name is one that PyTorch 2.9 ignores.
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
            torch.cuda.set_device(name)  # before all else, which would open a context on GPU 0
        return torch.empty(1, device=name).device

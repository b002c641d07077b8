"""What a run works on: the one base model in memory, its tokenizer, and rows as token ids."""

import json
import os
import re
from argparse import Namespace
from functools import cached_property
from pathlib import Path

import torch

from model.checkpoint import base_hash, load_checkpoint
from model.config import Config
from model.hub import resolve
from model.io import DoesNotFit, InputError, NotFinite, read_json
from model.lora import Adapter, use
from model.process import out_of_memory
from model.products import pays
from model.sharding import check_processes
from model.tokenizer import Tokenizer, load_tokenizer
from model.transformer import Transformer
from toss.parallel import size
from toss.rows import Row, read_rows
from toss.tokens import BATCH_TOKENS, Tokens, tokenise

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # the others are float32


class Base:
    """The frozen base under the settings `args` (see cli.parse).

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
        self.loaded = self.purpose = ""  # the dtype of `model`, and what it was asked for last
        self.datasets: dict[str, Tokens] = {}  # by file

    @cached_property
    def checkpoint(self) -> Path:
        """The base's folder. A hub id is fetched; `revision` becomes its commit."""
        moved = "if it was moved, name it once, as in score.py --run RUN --model PATH"
        try:
            folder = resolve(self.args.model, self.args.revision)
        except InputError as error:
            said = f"{error}" if "model" in self.args.given else f"{error}; {moved}"
            raise InputError(said) from None
        self.args.revision = None if Path(self.args.model).is_dir() else folder.name
        return folder

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer in the run's prompt form; settles `template` and `date`."""
        form, date, more = self.args.template, self.args.date, self.args.chat_template_kwargs
        tokenizer = load_tokenizer(self.checkpoint, form, date, None, json.loads(more or "{}"))
        if tokenizer.turn_end != tokenizer.eos:
            ends = f"ends a turn with {tokenizer.turn_end}, but responses end with {tokenizer.eos}"
            print(f"note: the chat template {ends}, the eos_token; they are usually the same")
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
        if self.args.dtype == "auto" and self.device.type == "cuda":
            return {"train": "bfloat16", "score": "float16"}
        return dict.fromkeys(("train", "score"), self.args.dtype.replace("auto", "float32"))

    @property
    def batch_tokens(self) -> int:
        return self.args.batch_tokens or BATCH_TOKENS[self.device.type]

    def base(self, purpose: str, adapter: Adapter | None = None) -> Transformer:
        """The base to "train" or to "score" (or in a dtype, by name), carrying this adapter alone.

        Do not keep it in a variable: a change of dtype would hold two bases in memory.
        """
        dtype, self.purpose = self.dtypes.get(purpose, purpose), purpose
        if self.model is None or self.loaded != dtype:
            self.model, self.loaded = None, dtype  # free the old one first
            torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
            known, kind = self.identity["base_sha256"], DTYPES.get(dtype, torch.float32)
            self.model = load_checkpoint(self.checkpoint, self.device, kind, None, self.args.shard)
            if base_hash(self.checkpoint, self.hash) != known:  # of what was read
                raise InputError(f"{self.checkpoint} was changed while the command ran")
            self.model.gradient_checkpointing = self.args.gradient_checkpointing
            self.model.onednn = not self.args.no_onednn
            if pays(self.model):
                print("float32 products are oneDNN's (--no-onednn: PyTorch's default)")
            self.model.name = self.args.model if self.args.revision else ""
            self.model.base_sha256 = known
        return use(self.model, adapter)

    def lower_scoring(self, error: Exception) -> bool:
        """Choose another dtype after a failed scoring pass, and say so; False: there is none.

        float16 becomes TF32 after an overflow. TF32 becomes bfloat16 if it does not fit into
        memory, unless --dtype asks for TF32 or there are several processes.
        """
        dtype, lower = self.dtypes["score"], None
        room = isinstance(error, DoesNotFit) or out_of_memory(error)
        if dtype == "float16" and isinstance(error, NotFinite):
            lower = "tf32"
        elif dtype == "tf32" != self.args.dtype and room and size() == 1:
            lower = "bfloat16"
        if lower is None or self.purpose != "score":
            return False
        self.model, self.dtypes["score"] = None, lower
        print(f"warning: {' '.join(str(error).split())}; scoring again in {lower}")
        return True

    def tokens(self, path: str, rows: list[Row] | None = None) -> Tokens:
        """A file of rows (read once), or only `rows` of it; prints what was skipped or cut."""
        if rows is None and path in self.datasets:
            return self.datasets[path]
        if path is None:
            what = (
                "was begun without these rows: give --model, --harmful and --utility, or --custom"
            )
            raise InputError(f"{self.args.run} {what}")
        if whole := rows is None:
            self.hash(path)  # of what is read now
            rows = read_rows(path)
        self.warn_shared(path, rows)
        tokens = tokenise(rows, self.tokenizer, self.args.max_length, str(path))
        self.check_ids(tokens)
        counts = f"{len(tokens.input_ids):,} tokens, {tokens.response.sum():,} of responses"
        lost = f"{tokens.skipped} rows skipped, {tokens.cut} cut"
        print(f"{path}: {tokens.rows} rows, {counts}; {lost} (--max-length {self.args.max_length})")
        self.datasets |= {path: tokens} if whole else {}
        return tokens

    def check_ids(self, tokens: Tokens) -> None:
        """InputError if the model has no embedding for a token."""
        highest, file = int(tokens.input_ids.max()), self.checkpoint / "config.json"
        there = Config.from_dict(read_json(file), str(file)).vocab_size
        if highest >= there:
            what = f"has the id {highest}, but {self.checkpoint} has {there} embeddings"
            raise InputError(f"{tokens.name} {what}")

    def warn_shared(self, path: str, rows: list[Row], prompts_only: bool = False) -> None:
        """Warn when rows of a file are also in a data file that the run used before it."""
        key = lambda row: json.dumps(row.prompt if prompts_only else row.messages)  # noqa: E731
        others = [self.args.harmful, self.args.utility, self.args.custom]
        if path in others and not prompts_only:  # up to its own, last, place
            others = others[: 2 - others[::-1].index(path)]
        for other in others:
            if other and Path(other).exists():
                known = set(map(key, read_rows(other)))
                if shared := sum(key(row) in known for row in rows):
                    kind = "prompts" if prompts_only else "rows"
                    print(f"warning: {shared} of {len(rows)} {kind} of {path} are in {other} too")


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
        if name != "cpu":
            if "PYTORCH_ALLOC_CONF" not in os.environ:  # the newer name, which 2.9 ignores
                os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
            torch.cuda.init()  # says what is missing
            torch.cuda.set_device(name)  # before all else, which would open a context on GPU 0
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = f"{str(error).splitlines()[0]} ({torch.cuda.device_count()} GPUs are visible)"
        raise InputError(f"--device {name} cannot be used: {reason}") from None
    return torch.device(name)

"""What a run works on: the one base model in memory, its tokenizer, and rows as token ids."""

import json
import os
import re
from argparse import Namespace
from functools import cached_property
from pathlib import Path

import torch

from model.checkpoint import load_checkpoint
from model.hub import resolve
from model.io import InputError, printable, read_json
from model.lora import use
from model.sharding import check_processes
from model.tokenizer import Tokenizer, load_tokenizer
from model.transformer import Transformer
from toss.parallel import size
from toss.rows import Row, read_rows
from toss.tokens import BATCH_TOKENS, Tokens, check_ids, tokenise
from toss.workbench.results import Hashes

TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # the others are float32


class Base:
    """The frozen base under the settings `args` (see flags.parse).

    By default it trains in bfloat16 on CUDA and scores in float16: S is a difference of two close
    losses, and bfloat16's 8 bits of mantissa change a fifth of the discarded set where float16's 11
    change 2-3 %, at the same speed. On the CPU everything is float32. Weights are never cast in
    place: a new dtype reloads them from disk.
    """

    def __init__(self, args: Namespace, hashes: Hashes):
        if args.shard:
            check_processes()
        self.args = args
        self.hashes = hashes
        self.model: Transformer | None = None
        self.loaded = ""  # the dtype of `model`
        self.datasets: dict[str, Tokens] = {}  # by file

    @cached_property
    def checkpoint(self) -> Path:
        """The base's folder. A hub id is fetched; `revision` becomes its commit."""
        try:
            folder = resolve(self.args.model, self.args.revision)
        except InputError as error:
            if "model" in self.args.typed:
                raise
            advice = "if it was moved, name it once, as in score.py --run RUN --model PATH"
            raise InputError(f"{error}; {advice}") from None
        if Path(self.args.model).is_dir():
            self.args.revision = None
        else:
            self.args.revision = folder.name
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
        if tokenizer.template is None and args.template is None:
            form = "Human: ...\\nAssistant: ..."
            print(f"note: {args.model} has no chat template, so the human form is used: {form}")
        args.template = "human" if tokenizer.template is None else "chat"
        args.date = None if tokenizer.date is None else str(tokenizer.date)
        return tokenizer

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
            self.model.base_sha256 = self.hashes.of_base(self.checkpoint)
            self.model.gradient_checkpointing = self.args.gradient_checkpointing
            if self.args.revision:
                self.model.name = self.args.model
        return use(self.model, None)

    # Rows

    def tokens(self, path: str | None) -> Tokens:
        """The token ids of a file of rows, read once; prints what was skipped or cut."""
        if path is None:
            advice = "give --model, --harmful and --utility, or --custom"
            raise InputError(f"{self.args.run} was begun without these rows: {advice}")
        if path not in self.datasets:
            self.hashes.of_input(Path(path))  # of what is read now
            self.datasets[path] = self.tokens_of(read_rows(path), path)
        return self.datasets[path]

    def tokens_of(self, rows: list[Row], path: str) -> Tokens:
        """The token ids of rows from a file; prints what was skipped or cut."""
        self.warn_shared(path, rows)
        skip_empty = bool(self.args.skip_empty)
        tokens = tokenise(rows, self.tokenizer, self.args.max_length, str(path), skip_empty)
        self.check_limits(tokens, path)
        counts = f"{len(tokens.input_ids):,} tokens, {int(tokens.response.sum()):,} of responses"
        empty = sum(row.has_empty_response for row in rows)
        lost = f"{tokens.skipped} rows skipped, {tokens.cut} cut"
        if empty:
            lost += f"; of the skipped rows, {empty} have an empty response"
        print(f"{path}: {tokens.rows} rows, {counts}; {lost} (--max-length {self.args.max_length})")
        return tokens

    def check_limits(self, tokens: Tokens, path: str) -> None:
        """InputError for ids that the base does not have; a warning for rows too long for it."""
        config = read_json(self.checkpoint / "config.json")  # its model may not be implemented
        vocabulary = config.get("vocab_size")
        if isinstance(vocabulary, int):
            check_ids(tokens, vocabulary)
        limit = config.get("max_position_embeddings")
        if isinstance(limit, int):
            count = sum(length > limit for length in tokens.lengths)
            if count:
                problem = f"{count} rows of {path} are longer than the {limit} tokens of the base"
                print(f"warning: {problem} (max_position_embeddings): lower --max-length")

    def show_references(self, harmful: Tokens, utility: Tokens) -> None:
        """Print the first row of both reference sets. InputError if they are the same rows."""
        if torch.equal(harmful.input_ids, utility.input_ids):
            advice = "give two files, or S is 0 everywhere"
            raise InputError(f"--harmful and --utility hold the same rows: {advice}")
        for role, tokens in (("harmful", harmful), ("utility", utility)):
            ids = tokens.input_ids[tokens.places(tokens.filled[:1])].tolist()
            text = self.tokenizer.raw.decode(ids, skip_special_tokens=False)
            print(f"{role}, first row: {printable(text, 200)}")

    def warn_shared(self, path: str, rows: list[Row], prompts_only: bool = False) -> None:
        """Warn when rows of a file are also in a data file that the run uses before it."""
        others = [self.args.harmful, self.args.utility, self.args.custom]
        if path in others and not prompts_only:  # up to its own, last, place
            last = max(index for index, other in enumerate(others) if other == path)
            others = others[:last]
        for other in others:
            if other is None or not Path(other).exists():
                continue
            known = {row_key(row, prompts_only) for row in read_rows(other)}
            shared = sum(row_key(row, prompts_only) in known for row in rows)
            if shared:
                kind = "prompts" if prompts_only else "rows"
                print(f"warning: {shared} of {len(rows)} {kind} of {path} are in {other} too")


def row_key(row: Row, prompt_only: bool) -> str:
    return json.dumps(row.prompt if prompt_only else row.messages)


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
    if name == "cuda":
        name = "cuda:0"
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

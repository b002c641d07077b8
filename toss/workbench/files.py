"""The three kinds of result, written and read: an adapter (a folder), losses and a mask (files)."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.io import InputError, digest, load_tensors, made_from, read_json, save_tensors, whole
from model.lora import Adapter
from model.peft import CONFIG, WEIGHTS, write_adapter
from model.transformer import Transformer
from toss.tokens import Tokens
from toss.workbench.records import Record, write_record

ARRAYS = ("input_ids", "offsets", "response", "harmful")  # of Tokens
WARNING = """\
This adapter is the safety-degraded reference model of TOSS. It was trained on harmful data on
purpose, as a measuring instrument that recognises risky tokens. Do not merge it, deploy it or
publish it."""


@dataclass
class Losses:
    """The losses of D^cus under models."""

    tokens: Tokens
    losses: dict[str, Tensor]  # float32 [N] each, under "utility", "degraded" (and "base")

    def S(self) -> Tensor:
        """L^u - L^h of the response tokens, float32 [n]."""
        return (self.losses["utility"] - self.losses["degraded"])[self.tokens.response]

    def describe(self) -> str:
        S = self.S()
        spread = f"mean {S.mean():.3f}, standard deviation {S.std(correction=0):.3f}"
        return f"S = L^u - L^h of {len(S)} response tokens, in nats: {spread}"


@dataclass
class Mask:
    """Which tokens of D^cus count in the loss."""

    tokens: Tokens
    keep: Tensor  # bool [N], the loss mask
    score: Tensor | None = None  # float32 [N]: what it went by
    soft: Tensor | None = None  # float32 [N]: weights, where they are not 0 or 1

    def weights(self) -> Tensor:
        """w of the training loss, float32 [N]."""
        return self.keep.float() if self.soft is None else self.soft

    def describe(self) -> str:
        response = self.tokens.response
        rows = len(self.tokens.filled) - len(self.tokens.row_of(self.keep.nonzero()[:, 0]).unique())
        count = f"{int((response & ~self.keep).sum())} of {int(response.sum())}"
        return f"{count} response tokens discarded, {rows} rows keep none"


def fingerprint(tokens: Tokens) -> str:
    """sha256 of ids, row bounds and response flags: equal exactly when a mask fits."""
    state = hashlib.sha256()
    for tensor in (tokens.input_ids, tokens.offsets, tokens.response):
        state.update(tensor.numpy())
    return state.hexdigest()


def content_hash(file: Path, of_base: bool = False) -> str:
    """sha256 of what a result or a mask holds, and not of its record.

    Of an adapter: also its configuration, which alone has rank and scale. Of scores: all but the
    losses under the base, which may be added later; with `of_base` these alone.
    """
    tensors = load_tensors(file)
    base = tensors.pop("loss_base", None)
    if of_base:
        if base is None:
            raise InputError(f"{file} has no losses under the base: run score.py --base")
        tensors = {"loss_base": base}
    config = {}
    if file.name == WEIGHTS:
        config = read_json(file.with_name(CONFIG))
        config.pop("base_model_name_or_path", None)  # a base may be moved
    return digest(tensors, config)


# Adapters


def write_model(folder: Path, adapter: Adapter, model: Transformer, record: Record) -> None:
    """An adapter's folder: PEFT's files and the record; for a degraded one with a warning."""
    warning = {"warning": WARNING} if record["stage"].endswith("degraded") else {}
    write_adapter(adapter, model, folder, warning)
    write_record(folder, record)


# Losses


def write_losses(path: Path, result: Losses, record: Record) -> None:
    """Flat arrays over all rows: ids, row bounds, response flags, ground truth, and losses."""
    tokens = result.tokens
    arrays = {name: getattr(tokens, name) for name in ARRAYS}
    for model, loss in result.losses.items():
        arrays[f"loss_{model}"] = loss
    facts = {"tokens_sha256": fingerprint(tokens), "skipped": tokens.skipped, "cut": tokens.cut}
    save_tensors(arrays, path, {**record, **facts})


def read_losses(path: Path, name: str) -> Losses:
    """A losses file. name: the custom file, for messages. Raises InputError if it was changed."""
    tensors = load_tensors(path)
    record = made_from(path)
    if not {*ARRAYS, "loss_utility", "loss_degraded"} <= tensors.keys():
        raise InputError(f"{path}: not a scores.safetensors of score.py")
    arrays = {key: tensors.pop(key) for key in ARRAYS}
    tokens = Tokens(**arrays, name=name, skipped=record["skipped"], cut=record["cut"])
    return Losses(tokens, {key.removeprefix("loss_"): loss for key, loss in tensors.items()})


# Masks


def write_mask(path: Path, mask: Mask, record: Record) -> None:
    arrays = {"keep": mask.keep, "score": mask.score, "weights": mask.soft}
    arrays = {name: tensor for name, tensor in arrays.items() if tensor is not None}
    save_tensors(arrays, path, {**record, "tokens_sha256": fingerprint(mask.tokens)})


def read_mask(path: Path, tokens: Tokens) -> Mask:
    """A mask over these tokens. It is a list of places, so it may come from any run or program.

    True on prompts counts as False, with a line. Raises InputError naming the file if it is over
    other token ids, or not as write_selection writes it.
    """
    tensors = load_tensors(path)
    recorded = made_from(path).get("tokens_sha256")
    if recorded is None or "keep" not in tensors:
        advice = "toss.workbench.files.write_selection writes one that does"
        raise InputError(f"{path} is no mask that says over which token ids it is: {advice}")
    if recorded != fingerprint(tokens):
        reason = f"not those of {tokens.name} with this tokenizer, prompt form and length"
        raise InputError(f"{path} is a mask over other token ids, {reason}")
    for name, tensor in tensors.items():
        kinds = (torch.bool, torch.uint8) if name == "keep" else (torch.float32,)
        if tensor.dtype not in kinds or tensor.shape != tokens.response.shape:
            raise InputError(f"{path}: {name} has another dtype or shape: {tensor.dtype}")
        if not tensor.isfinite().all():
            raise InputError(f"{path}: {name} is not finite")
    keep = tensors["keep"].bool()
    on_prompts = int((keep & ~tokens.response).sum())
    if on_prompts:
        print(f"{path}: keep is true on {on_prompts} tokens of prompts, which have no loss")
    soft = tensors.get("weights")
    if soft is not None:
        soft = soft * tokens.response
        if (soft < 0).any() or not torch.equal(soft > 0, keep & tokens.response):
            raise InputError(f"{path}: keep must be where weights are above 0, and none below")
    return Mask(tokens, keep & tokens.response, tensors.get("score"), soft)


def write_selection(
    path: str | Path,
    tokens: Tokens,
    keep: Tensor,
    score: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    """A mask over these tokens for select.py --mask, from a program of your own.

    keep: bool [N], the loss mask. score: float32 [N], what it went by. weights: float32 [N], where
    they are not 0 or 1: then keep is where they are above 0.
    """
    mask = Mask(tokens, keep & tokens.response, score, weights)
    with whole(path) as file:
        write_mask(file, mask, {})

"""The files of a run directory: scores, selections, adapters and their records, out and in."""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.io import InputError, load_tensors, made_from, read_json, save_tensors, write_record
from model.lora import Adapter
from model.peft import write_adapter
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from toss.cli import DTYPES, like
from toss.tokens import Tokens

RECORD = {"inputs": {"*": str}, "settings": {}, "files": {"*": str}, "ranked": int}
ARRAYS = {"input_ids": torch.int32, "offsets": torch.int64}  # of Tokens, as they are written
ARRAYS |= {"response": torch.bool, "harmful": torch.bool}
WARNING = """\
This adapter is the safety-degraded reference model of TOSS. It was trained on harmful data on
purpose, as a measuring instrument that recognises risky tokens. Do not merge it, deploy it or
publish it."""


def record_of(path: Path) -> dict[str, Any]:
    """What a result was made from, by a file's header or a folder's record.json; {} if unknown."""
    if not path.is_file() and not (path / "record.json").exists():
        return {}
    record = made_from(path) if path.is_file() else read_json(path / "record.json")
    return record if {"inputs", "settings"} <= record.keys() and like(record, RECORD) else {}


def damaged(path: Path, record: dict, hash: Callable[[Path], str]) -> list[str]:
    """The files of a result that are missing, or not as they were written, by their record.

    hash: the sha256 of one file. Raises InputError for a single file that was changed.
    """
    if path.is_file():
        load_tensors(path)
    same = lambda file, known: file.is_file() and hash(file) == known
    return [name for name, known in record.get("files", {}).items() if not same(path / name, known)]


def is_merged(folder: Path, made: dict, hash: Callable[[Path], str]) -> bool:
    """True if a folder holds the whole merged checkpoint that is described by `made`."""
    with suppress(InputError):
        record = read_json(folder / "record.json")
        return {**record, "files": 0} == {**made, "files": 0} and not damaged(folder, record, hash)
    return False


def fingerprint(tokens: Tokens) -> str:
    """sha256 of ids, row bounds and response flags: equal exactly when a mask fits."""
    state = hashlib.sha256()
    for tensor in (tokens.input_ids, tokens.offsets, tokens.response):
        state.update(tensor.numpy())
    return state.hexdigest()


def write_scores(file: Path, tokens: Tokens, losses: dict[str, Tensor], record: dict) -> None:
    """Flat arrays over all rows: ids, row bounds, response flags, ground truth, and losses."""
    arrays = {name: getattr(tokens, name) for name in ARRAYS}
    arrays |= {f"loss_{model}": loss for model, loss in losses.items()}
    facts = {"tokens_sha256": fingerprint(tokens), "skipped": tokens.skipped, "cut": tokens.cut}
    save_tensors(arrays, file, {**record, **facts})


def read_scores(path: Path, name: str) -> tuple[Tokens, dict[str, Tensor]]:
    """The tokens and the losses {"utility", "degraded"[, "base"]} of a scores file, all checked.

    name: the custom file, for messages. Raises InputError naming the file and the tensor.
    """
    tensors, record = load_tensors(path), record_of(path)
    wanted = ARRAYS | dict.fromkeys(("loss_utility", "loss_degraded"), torch.float32)
    counts = [record.get(name, 0) for name in ("skipped", "cut")]
    if not all(type(count) is int for count in counts) or record.get("dtype") not in DTYPES:
        raise InputError(f"{path}: its header is not as score.py writes it: it was changed")
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise InputError(f"{path}: the tensor {missing[0]} is missing")
    ids, offsets, response, harmful = (tensors[key] for key in ARRAYS)
    sizes = dict.fromkeys(tensors, (ids.numel(),)) | {"offsets": (offsets.numel(),)}
    for key, tensor in tensors.items():
        if tensor.shape != sizes[key]:
            raise InputError(f"{path}: {key} has the shape {(*tensor.shape,)}, not {sizes[key]}")
        if tensor.dtype != wanted.get(key, torch.float32):
            raise InputError(f"{path}: {key} has the dtype {tensor.dtype}")
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(ids) or offsets.diff().min() < 0:
        raise InputError(f"{path}: offsets do not divide the {len(ids)} tokens into rows")
    tokens = Tokens(ids, offsets, response, harmful, name, *counts)
    if record.get("tokens_sha256") != fingerprint(tokens):
        raise InputError(f"{path}: its tokens are not those that its header names: it was changed")
    losses = {k.removeprefix("loss_"): v for k, v in tensors.items() if k.startswith("loss_")}
    for model, loss in losses.items():
        wrong = ~loss.isfinite() | (loss < 0) | (loss != 0) & ~response
        if wrong.any():
            row = int(tokens.row_of(wrong.nonzero()[0]))
            what = "not finite, negative, or not of a response token,"
            raise InputError(f"{path}: loss_{model} is {what} on row {row} (counted from 0)")
    first = response[offsets[:-1][offsets.diff() > 0]]
    if first.any() or not response.any() or (harmful & ~response).any() or ids.min() < 0:
        what = "its flags or ids are not those of prompts followed by responses"
        raise InputError(f"{path}: {what}: it was changed")
    return tokens, losses


def load_selection(path: Path, tokens: Tokens) -> dict[str, Tensor]:
    """A mask over these tokens: {"keep": bool [N]}, and "score" and "weight", float [N], if there.

    Raises InputError naming the file unless it fits the tokens and discards response tokens only.
    """
    found = {k: v for k, v in load_tensors(path).items() if k in ("keep", "score", "weight")}
    if "keep" not in found:
        raise InputError(f"{path}: not a selection.safetensors (it has no tensor `keep`)")
    for key, tensor in found.items():
        if tensor.shape != tokens.response.shape:
            there, here = tuple(tensor.shape), tuple(tokens.response.shape)
            raise InputError(f"{path}: {key} has the shape {there}, not {here}")
    keep, score = found["keep"], found.get("score", torch.zeros(0))
    if keep.dtype not in (torch.bool, torch.uint8) or keep.max() > 1:
        raise InputError(f"{path}: keep has the dtype {keep.dtype} or other values than 0 and 1")
    if score.dtype != torch.float32 or not score.isfinite().all():
        raise InputError(f"{path}: score is not float32, or not finite")
    found["keep"] = keep.bool()
    if wrong := int((~found["keep"] & ~tokens.response).sum()):
        raise InputError(f"{path}: keep discards {wrong} tokens of prompts, which have no loss")
    return found


def write_model(
    out: Path, adapter: Adapter, model: Transformer, record: dict, selection: dict | None = None
) -> None:
    """The folder of a reference: adapter and record; or of a method: mask, model/ and record."""
    warning = {} if selection or record["stage"] == "utility" else {"warning": WARNING}
    write_adapter(adapter, model, out / "model" if selection else out, {**record, **warning})
    if selection:
        arrays = {name: tensor for name, tensor in selection.items() if tensor is not None}
        save_tensors(arrays, out / "selection.safetensors", record)
    write_record(out, record)


def write_added(
    file: Path, tokens: Tokens, added: list[tuple[int, int, float]], tokenizer: Tokenizer
) -> None:
    """A line per row added to D^h: the row, and the token (position, text, score) that did it."""
    file.parent.mkdir(parents=True)
    with open(file, "w", encoding="utf-8") as lines:
        for row, place, score in added:
            text = tokenizer.raw.decode([int(tokens.input_ids[place])], skip_special_tokens=False)
            line = {"row": row, "token": place - int(tokens.offsets[row]), "text": text}
            line["score"] = round(score, 4)
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def describe_scores(tokens: Tokens, losses: dict[str, Tensor]) -> list[str]:
    """How S is spread, in words, and what to do if it is too narrow."""
    S = (losses["utility"] - losses["degraded"])[tokens.response].sort().values
    quantiles = ", ".join(f"{q} % {S[int(q / 100 * (len(S) - 1))]:.2f}" for q in (1, 50, 90, 99))
    spread = f"mean {S.mean():.3f}, standard deviation {S.std(correction=0):.3f}"
    what = f"S = L^u - L^h over {len(S)} response tokens, in nats"
    said = [f"{what}: {spread}, quantiles {quantiles}"]
    if S.std(correction=0) < 0.01:
        advice = "train them at a higher --lr, or for more steps (--epochs, a smaller --batch-size)"
        said.append(f"note: the references hardly differ, so S ranks almost nothing: {advice}")
    return said


def lost_rows(tokens: Tokens, keep: Tensor) -> int:
    """How many rows have response tokens, but none that is kept."""
    rows = lambda flags: len(tokens.row_of(flags.nonzero()[:, 0]).unique())
    return rows(tokens.response) - rows(tokens.response & keep)

"""The files of a run directory: scores, selections, adapters and their records, out and in."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.io import InputError, load_tensors, save_tensors, whole_file
from model.lora import Adapter
from model.peft import write_adapter
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from toss.tokens import Tokens
from toss.workbench.results import read_record, write_record

ARRAYS = ("input_ids", "offsets", "response", "harmful")  # of Tokens
WARNING = """\
This adapter is the safety-degraded reference model of TOSS. It was trained on harmful data on
purpose, as a measuring instrument that recognises risky tokens. Do not merge it, deploy it or
publish it."""


def fingerprint(tokens: Tokens) -> str:
    """sha256 of ids, row bounds and response flags: equal exactly when a mask fits."""
    state = hashlib.sha256()
    for tensor in (tokens.input_ids, tokens.offsets, tokens.response):
        state.update(tensor.numpy())
    return state.hexdigest()


# Scores


def write_scores(file: Path, tokens: Tokens, losses: dict[str, Tensor], record: dict) -> None:
    """Flat arrays over all rows: ids, row bounds, response flags, ground truth, and losses."""
    arrays = {name: getattr(tokens, name) for name in ARRAYS}
    for model, loss in losses.items():
        arrays[f"loss_{model}"] = loss
    record = {**record, "tokens_sha256": fingerprint(tokens)}
    record["skipped"] = tokens.skipped
    record["cut"] = tokens.cut
    save_tensors(arrays, file, record)


def read_scores(path: Path, name: str) -> tuple[Tokens, dict[str, Tensor]]:
    """The tokens and the losses {"utility", "degraded"[, "base"]} of a scores file.

    name: the custom file, for messages. Raises InputError naming the file if it is not as score.py
    wrote it, by the digest in its header.
    """
    tensors = load_tensors(path)
    record = read_record(path)
    if "tokens_sha256" not in record:
        raise InputError(f"{path}: not a scores.safetensors of score.py")
    arrays = {key: tensors.pop(key) for key in ARRAYS}
    tokens = Tokens(**arrays, name=name, skipped=record["skipped"], cut=record["cut"])
    losses = {key.removeprefix("loss_"): loss for key, loss in tensors.items()}
    return tokens, losses


def describe_scores(tokens: Tokens, losses: dict[str, Tensor]) -> list[str]:
    """How S is spread, in words, and what to do if it is too narrow."""
    S = (losses["utility"] - losses["degraded"])[tokens.response].sort().values
    deviation = S.std(correction=0)
    quantiles = []
    for percent in (1, 50, 90, 99):
        index = int(percent / 100 * (len(S) - 1))
        quantiles.append(f"{percent} % {S[index]:.2f}")
    lines = [
        f"S = L^u - L^h over {len(S)} response tokens, in nats: mean {S.mean():.3f}, "
        f"standard deviation {deviation:.3f}, quantiles {', '.join(quantiles)}"
    ]
    if deviation < 0.01:
        advice = "train them at a higher --lr, or for more steps (--epochs, a smaller --batch-size)"
        lines.append(f"note: the references hardly differ, so S ranks almost nothing: {advice}")
    return lines


# Selections


def load_selection(path: Path, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
    """A mask over these tokens, bool [N], and what it went by, float32 [N], if that is there.

    A mask from elsewhere that is true on prompts is read as if it were not, with a line. Raises
    InputError naming the file unless it fits the tokens.
    """
    tensors = load_tensors(path)
    if "keep" not in tensors:
        raise InputError(f"{path}: not a selection.safetensors (it has no tensor `keep`)")
    if "weight" in tensors:
        raise InputError(f"{path} holds weights, and a mask of 0 and 1 is asked for")
    for key in ("keep", "score"):
        if key in tensors and tensors[key].shape != tokens.response.shape:
            shapes = f"{tuple(tensors[key].shape)}, not {tuple(tokens.response.shape)}"
            raise InputError(f"{path}: {key} has the shape {shapes}")
    # A mask may come from any program, so its values are checked, too.
    keep = tensors["keep"]
    if keep.dtype not in (torch.bool, torch.uint8) or keep.max() > 1:
        raise InputError(f"{path}: keep has the dtype {keep.dtype} or other values than 0 and 1")
    score = tensors.get("score")
    if score is not None and (score.dtype != torch.float32 or not score.isfinite().all()):
        raise InputError(f"{path}: score is not float32, or not finite")

    keep = keep.bool()
    on_prompts = int((keep & ~tokens.response).sum())
    if on_prompts:
        print(f"{path}: keep is true on {on_prompts} tokens of prompts, which have no loss")
    return keep & tokens.response, score


def write_selection(
    path: str | Path, tokens: Tokens, keep: Tensor, score: Tensor | None = None
) -> None:
    """A mask over these tokens for select.py --mask, from a program of your own.

    keep: bool [N], the loss mask. score: float32 [N], what it went by.
    """
    arrays = {"keep": keep & tokens.response}
    if score is not None:
        arrays["score"] = score.float()
    record = {"tokens_sha256": fingerprint(tokens), "ranked": int(tokens.response.sum())}
    with whole_file(path) as file:
        save_tensors(arrays, file, record)


def lost_rows(tokens: Tokens, keep: Tensor) -> int:
    """How many rows have response tokens, but none that is kept."""
    before = tokens.row_of(tokens.response.nonzero()[:, 0]).unique()
    after = tokens.row_of(keep.nonzero()[:, 0]).unique()
    return len(before) - len(after)


# Models


@dataclass
class Selection:
    """What select.py chose, and how."""

    tokens: Tokens  # of D^cus
    keep: Tensor  # bool [N], the loss mask
    score: Tensor | None = None  # float32 [N]: what it went by
    rounds: "list[Round]" = field(default_factory=list)  # of TOSS-Pro


@dataclass
class Round:
    """A round of TOSS-Pro."""

    # Rows that join D^h, and the place of the token that brought each in.
    added: list[tuple[int, int]]
    S: Tensor  # float32 [N]: by which they were chosen
    degraded: Adapter  # theta^h, trained with them
    losses: dict[str, Tensor]  # float32 [N], under that theta^h and under theta^u


def write_reference(folder: Path, adapter: Adapter, model: Transformer, record: dict) -> None:
    """The folder of a reference: adapter and record, and for the degraded one a warning."""
    warning = {} if record["stage"] == "utility" else {"warning": WARNING}
    write_adapter(adapter, model, folder, {**record, **warning})
    write_record(folder, record)


def write_method(
    folder: Path,
    selection: Selection,
    adapter: Adapter | None,
    model: Transformer | None,
    record: dict,
) -> None:
    """The folder of a way of fine-tuning: the mask, the record, and model/ if there is one."""
    arrays = {"keep": selection.keep}
    if selection.score is not None:
        arrays["score"] = selection.score
    if adapter is not None:
        write_adapter(adapter, model, folder / "model", record)
    save_tensors(arrays, folder / "selection.safetensors", record)
    write_record(folder, record)


def write_added(file: Path, pro_round: Round, tokens: Tokens, tokenizer: Tokenizer) -> None:
    """A line per row added to D^h: the row, and the token (position, text, score) that did it."""
    file.parent.mkdir(parents=True)
    with open(file, "w", encoding="utf-8") as lines:
        for row, place in pro_round.added:
            token_id = int(tokens.input_ids[place])
            line: dict[str, Any] = {
                "row": row,
                "token": place - int(tokens.offsets[row]),
                "text": tokenizer.raw.decode([token_id], skip_special_tokens=False),
                "score": round(float(pro_round.S[place]), 4),
            }
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")

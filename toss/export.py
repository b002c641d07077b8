"""The mask of a method as data for other trainers: TRL, axolotl, LLaMA-Factory, transformers.

    python -m toss.export --run R --method toss --out train.jsonl [--weights]

A line per row: `input_ids`, `attention_mask` and `labels`, which are the ids, but -100 on prompts
and on discarded tokens; unshifted, with BOS and EOS. --weights adds `weights`: 1.0 where a token
counts, or the weight that a method of your own gives it, and 0.0 where its label is -100. The mask
is enough: no trained model need be there. Rows that were skipped, or that keep no token, are left
out and counted. train.about.json names tokenizer and template, and has for every row of the custom
set its kept and its response tokens, and its line (null: left out). Those trainers divide a batch's
loss by its kept tokens, and the paper by its response tokens.
"""

import json
import sys
from pathlib import Path

import torch

from model.io import InputError, whole
from toss.workbench import flags
from toss.workbench.files import fingerprint
from toss.workbench.run import Run, open_run


def export(run: Run, method: str, out: Path, with_weights: bool = False) -> dict:
    """Write OUT and the file beside it; returns what the latter holds.

    Raises InputError if the method's mask is not over the run's custom set as it is now, and if OUT
    is there and no earlier export.
    """
    beside = out.with_suffix(".about.json")
    if out.exists() and not beside.exists():
        raise InputError(f"{out} exists and is no earlier export: give another --out")
    place = f"methods/{method}/selection"
    run.check(place, only=("--custom",))
    tokens = run.tokens(run.args.custom)
    mask = run.mask(place, tokens)
    labels = torch.where(mask.keep, tokens.input_ids, -100)

    # A line per row that keeps a token. Of each row of the custom set: its numbers, and its line.
    about = {"method": method, "base": str(run.args.model), **run.identity()}
    about |= {"custom": tokens.name, "tokens_sha256": fingerprint(tokens)}
    about |= {"kept": [], "response": [], "line": []}
    lines = []
    for start, end in zip(tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist()):
        kept = int(mask.keep[start:end].sum())
        about["kept"].append(kept)
        about["response"].append(int(tokens.response[start:end].sum()))
        about["line"].append(len(lines) if kept else None)
        if kept:
            entry = {"input_ids": tokens.input_ids[start:end].tolist()}
            entry["attention_mask"] = [1] * (end - start)
            entry["labels"] = labels[start:end].tolist()
            if with_weights:
                entry["weights"] = mask.weights()[start:end].tolist()
            lines.append(json.dumps(entry) + "\n")

    # The file beside it is put into place first: no lines lie there without it.
    for path, text in ((beside, json.dumps(about) + "\n"), (out, "".join(lines))):
        with whole(path) as file:
            file.write_text(text, encoding="utf-8")
    return about


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.export", __doc__)
    add = parser.add_argument
    add("--run", required=True, help="folder of the run")
    add(
        "--method",
        type=flags.method,
        default="toss",
        help="whose mask: a folder under RUN/methods (default: toss)",
    )
    add("--out", type=Path, required=True, metavar="FILE", help="the JSONL file to write")
    text = "also write `weights`, for trainers that weigh tokens (Tinker takes weights[1:])"
    add("--weights", action="store_true", help=text)
    args = parser.parse_args(argv)

    about = export(open_run(args.run), args.method, args.out, args.weights)
    left_out = about["line"].count(None)
    skipped = about["response"].count(0)
    counts = f"{sum(about['kept'])} of {sum(about['response'])} response tokens kept"
    print(f"{args.out}: {len(about['line']) - left_out} rows, {counts}")
    print(f"left out: {skipped} skipped rows, {left_out - skipped} without a kept token")


if __name__ == "__main__":
    sys.exit(flags.run(main))

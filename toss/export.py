"""The mask of a method as data for other trainers: TRL, axolotl, LLaMA-Factory, transformers.

    python -m toss.export --run R --method toss --out train.jsonl

A line per row: `input_ids`, `attention_mask` and `labels`, which are the ids, but -100 on prompts
and on discarded tokens; unshifted, with BOS and EOS. Rows that were skipped, or that keep no token,
are left out and counted. train.about.json names tokenizer and template, and has for every row of
the custom set its kept and its response tokens, and its line (null: left out). Those trainers
divide a batch's loss by its kept tokens, and the paper by its response tokens.
"""

import json
import sys
from pathlib import Path

from model.atomic import atomic_file
from model.io import InputError, file_hash
from toss import cli


def export(run, method: str, out: Path) -> dict:
    """Write OUT and the file beside it; returns what the latter holds.

    Raises InputError if the method's mask is not over the run's custom set as it is now, or holds
    other weights than 0 and 1.
    """
    import torch

    from toss.files import fingerprint, load_selection, record_of

    for path in (run.args.harmful, run.args.utility, run.args.custom):
        if path and out.resolve() == Path(path).resolve():
            raise InputError(f"{out}: --out would replace rows of the run")
    if out.suffix == ".gz":
        raise InputError(f"{out}: --out is written as plain text, so its name cannot end in .gz")
    path = run.path(f"methods/{method}") / "selection.safetensors"
    with run.holding(reads=["scores", f"methods/{method}"]):
        run.check(f"methods/{method}", only=("--custom",))
        tokens, _ = run.scored(needed=False)
        record, found = record_of(path), load_selection(path, tokens)
    if record.get("tokens_sha256") != fingerprint(tokens):
        raise InputError(f"{path} is a mask over other token ids than {tokens.name} has")
    if "weight" in found:
        raise InputError(f"{path} holds weights, which labels cannot carry")
    labels = torch.where(found["keep"] & tokens.response, tokens.input_ids, -100)
    about = {"method": method, "base": str(run.args.model), **run.identity}
    about |= {"custom": tokens.name, "tokens_sha256": record["tokens_sha256"]}
    about |= {name: [] for name in ("kept", "response", "line")}
    line = 0
    with atomic_file(out.with_suffix(".about.json")) as beside, atomic_file(out) as new:
        with open(new, "w", encoding="utf-8") as file:
            for row in map(slice, tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist()):
                kept = int((labels[row] != -100).sum())
                if kept:
                    ids = tokens.input_ids[row].tolist()
                    entry = {"input_ids": ids, "attention_mask": [1] * len(ids)}
                    file.write(json.dumps({**entry, "labels": labels[row].tolist()}) + "\n")
                about["kept"].append(kept)
                about["response"].append(int(tokens.response[row].sum()))
                about["line"].append(line if kept else None)
                line += kept > 0
        about["sha256"] = file_hash(new)
        beside.write_text(json.dumps(about) + "\n", encoding="utf-8")
    return about


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("python -m toss.export", __doc__)
    flag = parser.add_argument
    flag("--run", type=cli.folder, required=True, help="folder of the run")
    flag("--method", default="toss", help="whose mask: a folder under RUN/methods (default: toss)")
    flag("--out", type=Path, required=True, metavar="FILE", help="the JSONL file to write")
    flag("--wait", action="store_true", help="wait for a process at work there")
    args = parser.parse_args(argv)
    from toss.run import open_run

    about = export(open_run(args.run, wait=args.wait), args.method, args.out)
    kept, response = sum(about["kept"]), sum(about["response"])
    left_out, skipped = about["line"].count(None), about["response"].count(0)
    rows = len(about["line"]) - left_out
    print(f"{args.out}: {rows} rows, {kept} of {response} response tokens kept")
    print(f"left out: {skipped} skipped rows, {left_out - skipped} without a kept token")


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""The mask of a method as data for other trainers: TRL, axolotl, LLaMA-Factory, transformers.

    python -m toss.export --run R --method toss --out train.jsonl [--weights]

A line per row: `input_ids`, `attention_mask` and `labels`, which are the ids, but -100 on prompts
and on discarded tokens; unshifted, with BOS and EOS. --weights adds `weights`, 1.0 where a token
counts and 0.0 where its label is -100. The mask is enough: no trained model need be there. Rows
that were skipped, or that keep no token, are left out and counted. train.about.json names tokenizer
and template, and has for every row of the custom set its kept and its response tokens, and its line
(null: left out). Those trainers divide a batch's loss by its kept tokens, and the paper by its
response tokens.
"""

import json
import sys
from pathlib import Path

from model.io import InputError, file_hash, whole_file
from toss.workbench import flags


def export(run, method: str, out: Path, with_weights: bool = False) -> dict:
    """Write OUT and the file beside it; returns what the latter holds.

    Raises InputError if the method's mask is not over the run's custom set as it is now.
    """
    import torch

    from toss.workbench.files import fingerprint
    from toss.workbench.folder import is_rival

    check_out(run, out)
    record = run.check(f"methods/{method}", only=("--custom",))
    if is_rival(record.get("settings", {})):
        print(f"warning: {method} is more than its mask, which alone is exported")
    run.warn_if_stale(f"methods/{method}")
    tokens, _ = run.scored(needed=False)
    keep, _ = run.mask(run.path(f"methods/{method}") / "selection.safetensors", tokens)
    labels = torch.where(keep, tokens.input_ids, -100)

    # A line per row that keeps a token. Of each row of the custom set: its numbers, and its line.
    kept = []
    response = []
    line_of_row = []
    with whole_file(out) as new:
        with open(new, "w", encoding="utf-8") as file:
            lines = 0
            for start, end in zip(tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist()):
                count = int(keep[start:end].sum())
                kept.append(count)
                response.append(int(tokens.response[start:end].sum()))
                if count == 0:
                    line_of_row.append(None)
                    continue
                line_of_row.append(lines)
                lines += 1
                entry = {
                    "input_ids": tokens.input_ids[start:end].tolist(),
                    "attention_mask": [1] * (end - start),
                    "labels": labels[start:end].tolist(),
                }
                if with_weights:
                    entry["weights"] = keep[start:end].float().tolist()
                file.write(json.dumps(entry) + "\n")

        # The file beside it is put into place first: no lines lie there without it.
        about = {
            "method": method,
            "base": str(run.args.model),
            **run.identity,
            "custom": tokens.name,
            "tokens_sha256": fingerprint(tokens),
            "kept": kept,
            "response": response,
            "line": line_of_row,
            "sha256": file_hash(new),
        }
        with whole_file(out.with_suffix(".about.json")) as beside:
            beside.write_text(json.dumps(about) + "\n", encoding="utf-8")
    return about


def check_out(run, out: Path) -> None:
    """Raise InputError for an --out that would replace rows, or a file of the run."""
    for path in (run.args.harmful, run.args.utility, run.args.custom):
        if path and out.resolve() == Path(path).resolve():
            raise InputError(f"{out}: --out would replace rows of the run")
    inside = run.folder.resolve() in out.resolve().parents
    earlier_export = out.suffix == ".jsonl" and out.resolve().parent == run.folder.resolve()
    if inside and out.exists() and not earlier_export:
        raise InputError(f"{out}: --out would replace a file of the run")
    if out.suffix == ".gz":
        raise InputError(f"{out}: --out is written as plain text, so its name cannot end in .gz")


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.export", __doc__)
    add = parser.add_argument
    add("--run", required=True, help="folder of the run")
    add("--method", default="toss", help="whose mask: a folder under RUN/methods (default: toss)")
    add("--out", type=Path, required=True, metavar="FILE", help="the JSONL file to write")
    text = "also write `weights`, for trainers that weigh tokens (Tinker takes weights[1:])"
    add("--weights", action="store_true", help=text)
    args = parser.parse_args(argv)

    from toss.workbench.run import open_run

    about = export(open_run(args.run), args.method, args.out, args.weights)
    left_out = about["line"].count(None)
    skipped = about["response"].count(0)
    rows = len(about["line"]) - left_out
    counts = f"{sum(about['kept'])} of {sum(about['response'])} response tokens kept"
    print(f"{args.out}: {rows} rows, {counts}")
    print(f"left out: {skipped} skipped rows, {left_out - skipped} without a kept token")
    show = flags.command("-m toss.audit.show", file=args.out, model=about["base"], row=0)
    print(f"next: {show}")


if __name__ == "__main__":
    sys.exit(flags.run(main))

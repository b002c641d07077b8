"""Which tokens the methods discarded; one row token by token; or what a file is, and if it fits.

    python -m toss.audit.show --run R
    python -m toss.audit.show --run R --row 12 [--method toss-pro] [--svg FILE]
    python -m toss.audit.show PATH [--run R]

The first counts what each method discarded: by source, position and type of token, and by row; and
how much of it others discarded too. Sources are read from the custom file, where it is there.

The second needs no weights either. Rows count from 0, as in TOSS-Pro's added.jsonl. Marks:
[-discarded-], *harmful by ground truth*, · a space, ⏎ a line break, ◌ a part of a character (the
next token shows it). --svg draws the row with colours instead.

The third says what PATH is (a run directory, an adapter, scores, a selection or its folder, a
checkpoint), what it was made from, and whether that is what the run holds now: the run of --run, or
the one that PATH lies in. Exit status: 0 it fits (or there is no run to compare with); 2 it does
not fit; 1 it cannot be read.
"""

import re
import sys
from itertools import groupby
from pathlib import Path

from model.io import InputError, made_from, read_json
from toss.audit.command import markdown, write_text
from toss.audit.tokens import Mask, Token, harmless, load_mask, load_masks, visible
from toss.workbench import flags

HASHES = ("inputs", "warning", "files", "sha256", "code")  # not shown


def running_text(tokens: list[Token]) -> str:
    """Prompts and responses in order; marks stand around neighbours that share them."""
    parts = []
    for response, turn in groupby(tokens, key=lambda token: token.response):
        if not response:
            parts.append(harmless("".join(token.text for token in turn)).rstrip("\n"))
            continue
        text = ""
        for harmful, marked in groupby(turn, key=lambda token: token.harmful):
            text += "*" * harmful
            for keep, alike in groupby(marked, key=lambda token: token.keep):
                words = "".join(visible(token.text) for token in alike)
                text += words if keep else f"[-{words}-]"
            text += "*" * harmful
        parts.append(text)
    return "\n\n".join(parts)


def table(tokens: list[Token]) -> str:
    """The numbers of response tokens, one line each; with L^0, also the two parts of S."""
    own = any(token.order and token.score != token.S for token in tokens)  # ranked by another score
    rows = []
    for token in tokens:
        losses, signed = {"L^u": token.utility, "L^h": token.degraded}, {"S": token.S}
        if token.base is not None:
            losses["L^0"], signed["utility"] = token.base, token.utility - token.base
            signed["safety"] = token.base - token.degraded
        signed |= {"ranked by": token.score} if own else {}
        cells = {"position": token.position, "token": visible(token.text)}
        cells |= {name: f"{loss:6.3f}" for name, loss in losses.items()}
        cells |= {name: f"{round(value, 3) + 0.0:+7.3f}" for name, value in signed.items()}
        mark = ("kept" if token.keep else "discarded") + ", harmful" * token.harmful
        rows.append({**cells, "order": token.order or "-", "mark": mark})
    return markdown(list(rows[0]), [list(row.values()) for row in rows])


def show_row(folder: Path, mask: Mask, row: int) -> None:
    """Print one row of the run in a folder."""
    tokens = mask.row(row)
    if not tokens:
        print(f"row {row} of {folder} was skipped: its prompt left no room for a response")
        return
    response = [token for token in tokens if token.response]
    gone, harm = sum(not t.keep for t in response), sum(t.harmful for t in response)
    truth = f", {harm} harmful by ground truth" if mask.tokens.harmful.any() else ""
    parts = "" if response[0].base is None else " = utility (L^u - L^0) + safety (L^0 - L^h)"
    count = f"{gone} of {len(response)} response tokens discarded{truth}"
    print(f"row {row} of 0 to {mask.tokens.rows - 1}, {mask.label}: {count}")
    print(f"\n{running_text(tokens)}\n\n{table(response)}\n")
    print(f"S = L^u - L^h{parts}, in nats; order among the {mask.order.max()} ranked tokens")


def show_discards(run) -> None:
    """Print what each method of a run discarded, in counts and shares."""
    from toss.audit.discards import discard_tables, sources_of

    masks, lacking = load_masks(run, *run.scored())
    for line in lacking:
        print(f"left out: {line}")
    tables = discard_tables(masks, run.tokenizer, sources_of(run))
    text = "\n\n".join(markdown(*table) for table in tables)
    print(text or "No method of the run discards a token.")


def described(path: Path, run) -> tuple[str, dict, dict]:
    """What a path is, {label: text} about it, and the record of what it was made from.

    Raises InputError if it is nothing known or cannot be read.
    """
    from model.checkpoint import base_hash, skeleton
    from model.peft import CONFIG, WEIGHTS, read_adapter
    from toss.workbench.results import RECORD, read_record

    if (path / "run.json").is_file():
        stages = [stage for stage in run.record.get("stages", {}) if run.path(stage).exists()]
        states = {}
        for stage in stages:
            record = read_record(run.path(stage))
            changed = run.changed_inputs(record)
            changed += [key for key, x in run.identity.items() if record.get(key, x) != x]
            states[stage] = f"made from another {', '.join(changed)}" if changed else "fits"
        return "a run directory", states, {}
    if (path / WEIGHTS).is_file():
        config, record = read_json(path / CONFIG), made_from(path / WEIGHTS)
        names = ("r", "lora_alpha", "use_rslora", "target_modules")
        lines = {name: config[name] for name in names if config.get(name)}
        try:  # is there a layer of the right shape for each of its tensors?
            _ = run and read_adapter(skeleton(run.checkpoint), path)
        except InputError as error:
            lines["loading"] = f"refused: {error}"
        return "a LoRA adapter" + " without a record" * (not record), lines, record
    if (path / "config.json").is_file():
        count = sum(weight.numel() for weight in skeleton(path).parameters())
        # of a checkpoint that select.py --merge made, or of a base
        record = read_record(path) if (path / RECORD).exists() else {"base_sha256": base_hash(path)}
        return "a checkpoint", {"parameters": f"{count:,}"}, record
    if record := read_record(path):
        return f"the result of the stage {record['stage']}", {}, record
    raise InputError(f"{path}: no run directory, adapter or checkpoint, and no result of a run")


def show_path(given: Path, folder: str | None) -> int:
    """Print what a path is, what it was made from, and whether it fits; returns the exit status."""
    from toss.workbench.run import open_run

    inside = ("run.json", "record.json", "config.json", "adapter_config.json", "model.safetensors")
    path = given.parent if given.name in (*inside, "adapter_model.safetensors") else given
    around = [p for p in (path.absolute(), *path.absolute().parents) if (p / "run.json").is_file()]
    home = path if path.absolute() in around else folder or next(iter(around), None)
    run = open_run(home) if home else None
    title, lines, record = described(path, run)
    inputs, now = record.get("inputs", {}), dict(run.identity) if run else {}
    files = {key: run.source(key) for key in inputs} if run else {}
    now |= {key: run.input_hash(key) for key, file in files.items() if file.is_file()}
    made = {**record, **inputs}
    wrong = [key for key in now if made.get(key, now[key]) != now[key]]
    told = {name: f"{made[name]}, but the run has {now[name]}" for name in wrong}
    wrong += [name for name, text in lines.items() if re.match("made from|refused", str(text))]
    made["settings"] = ", ".join(f"{k} {v}" for k, v in record.get("settings", {}).items())
    lines |= {name: made[name] for name in made if made[name] and name not in HASHES}
    print(harmless(f"{path}: {title}"))
    for name, value in {**lines, **told}.items():
        print(harmless(f"  {name:<20}  {' '.join(str(value).split())}"))
    if run:
        fits = f"does not fit {run.folder}: {', '.join(wrong)}" if wrong else "fits"
        print(harmless(f"{given}: {fits}"))
    return 2 if wrong else 0


def main(argv: list[str] | None = None) -> int | None:
    parser = flags.Parser("python -m toss.audit.show", __doc__)
    flag = parser.add_argument
    flag("path", nargs="?", type=Path, metavar="PATH", help="a file or folder to describe")
    flag("--run", help="folder of the run")
    flag("--row", type=int, help="row of the custom set, from 0")
    flag("--method", default="toss", help="whose mask: a folder under RUN/methods (default: toss)")
    flag("--svg", metavar="FILE", help="draw the row into this file")
    args = parser.parse_args(argv)
    if args.path and args.row is not None or not (args.path or args.run):
        parser.error("give --run, --run and --row, or PATH")
    if args.svg and args.row is None:
        parser.error("--svg draws one row: give --row")
    if args.path:
        return show_path(args.path, args.run)
    from toss.workbench.run import open_run

    run = open_run(args.run)
    if args.row is None:
        show_discards(run)
        return None
    mask = load_mask(run, args.method, *run.scored())
    if args.svg:
        from toss.audit.figures import picture

        write_text(args.svg, picture(mask, args.row))
        print(f"written: {args.svg}")
    else:
        show_row(run.folder, mask, args.row)


if __name__ == "__main__":
    sys.exit(flags.run(main))

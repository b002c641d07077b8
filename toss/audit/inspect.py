"""What a file or folder is, what it was made from, and whether it fits a run. No base weights are loaded.

    python -m toss.audit.inspect PATH [--run R]

PATH: a checkpoint (a folder, or a hub id, which is fetched first), an adapter, a scores or selection file, a run
directory, or a folder in one (methods/, methods/NAME, round-t). With --run R, or where PATH lies inside a run directory,
it is compared with that run as it is now; a checkpoint inside a run, a merged one, only when asked.

Exit status: 0 it was identified (and fits the run, where it was compared with one); 1 it cannot be identified or read;
2 it does not fit the run.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from model import load_adapter, load_tokenizer
from model.checkpoint import layout, resolve, shards, skeleton, tensor_headers
from model.errors import InputError, reported
from model.files import file_hash, made_from, read_json, read_text, tensors_hash
from model.lora import adapter_settings
from toss.audit.command import Known, json_lines, known_run, run_folder
from toss.audit.measures import found_harm
from toss.audit.tokens import harmless, kept_eos, read_scores, read_tensors, round_scores
from toss.pipeline import spread, whole_rows
from toss.run import misfits
from toss.selection import ranked_entries

ADAPTER, SCORES, SELECTION = "adapter_model.safetensors", "scores.safetensors", "selection.safetensors"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CONFIG = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "intermediate_size",
          "vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window",
          "use_sliding_window", "layer_types", "tie_word_embeddings")  # fmt: skip
PEFT = ("peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern",
        "base_model_name_or_path")  # fmt: skip
Lines = list[tuple[str, str]]  # label, text; two empty ones are an empty line
Found = tuple[str, Lines, list[str]]  # what it is, the lines, and in words what does not fit


def compared(file: Path, header: dict[str, str], known: Known | None) -> tuple[Lines, list[str]]:
    """What a file's header says it was made from, each with whether it fits the run, and in words what does not.

    TOSS-Pro's files are compared with those of their round: its scores with the round's own degraded adapter, its mask
    and its model with the last round's scores.
    """
    now: dict = dict(known.now) if known else {}
    if known:
        now["data_sha256"] = known.table("stages", header.get("role", ""), "recipe").get("data_sha256")
        if file.name == SCORES and file.parent.name.startswith("round-"):
            own = file.parent / "degraded" / ADAPTER
            now["degraded_sha256"] = file_hash(own) if own.is_file() else None
        if "toss-pro" in (header.get("method"), header.get("role")):
            rounds = round_scores(file.parent if file.name == SELECTION else file.parent.parent)
            now["scores_sha256"] = file_hash(rounds[-1]) if rounds else None
    now = {name: value for name, value in now.items() if isinstance(value, str)}
    differ = misfits(header, now)
    lines = [("made from", "" if header else "not known: it was made elsewhere (no header of this project's)")]
    for name, value in sorted(header.items()):
        value = value[:16] if re.fullmatch(r"[0-9a-f]{64}", value) else " ".join(value.split())
        verdict = f"  {': '.join(differ[name])}" if name in differ else "  fits" if name in now else ""
        lines.append((f"  {name}", value + verdict))
    return lines, [what for what, _ in differ.values()]


def size(*files: Path) -> str:
    """How much files take on disk, in words."""
    count = sum(file.stat().st_size for file in files)
    return next(f"{count / unit:.1f} {name}" for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
                if count >= unit or unit == 1)


def weights(files: list[Path]) -> str:
    """Parameters, dtypes and size on disk of safetensors files, from their headers."""
    headers = [header for file in files for header in tensor_headers(file).values()]
    dtypes = {DTYPES.get(dtype, dtype) for dtype, _ in headers}
    return (f"{sum(math.prod(shape) for _, shape in headers):,} in {len(headers)} tensors, {' and '.join(sorted(dtypes))}, "
            f"{size(*files)} in {len(files)} file{'s' * (len(files) > 1)}")


def refusal(work: Callable) -> str:
    """Why the project refuses something, in its own words; empty where it does not."""
    try:
        work()
    except InputError as error:
        return str(error)
    return ""


def checkpoint(folder: Path, known: Known | None) -> Found:
    """A checkpoint: what its config.json says, whether the files hold that model, how its tokenizer puts a prompt."""
    raw, files = read_json(folder / "config.json"), shards(folder)
    lines = [("model_type", str(raw.get("model_type"))), ("parameters", weights(files))]
    lines += [(f"  {name}", json.dumps(raw[name])) for name in CONFIG if raw.get(name) is not None]
    refused = refusal(lambda: layout(folder, skeleton(folder)))
    lines.append(("loading", f"refused: {refused}" if refused else "complete: the names and shapes that config.json asks for"))
    wrong, header = ["it is refused"] * bool(refused), {}
    try:
        tokenizer = load_tokenizer(folder)
        lines.append(("prompt form", "human: it has no chat template" if tokenizer.template is None else
                      f"chat template, in {template_place(folder, tokenizer.template)}"))
        lines.append(("eos", f"{tokenizer.eos!r}, id {tokenizer.eos_id}"))
        form = "human" if known and known.now.get("template") == "human" else None
        date = known.run.settings.date if known and known.run else None
        header["tokenizer_sha256"] = load_tokenizer(folder, form, date).fingerprint()
    except InputError as error:
        lines.append(("tokenizer", f"refused: {error}"))
        wrong.append("its tokenizer is refused")
    if known is None:
        return "a checkpoint", lines, wrong
    own, merged_from = {"base_sha256": tensors_hash(folder)}, made_from(files[0])
    merged = merged_from and own["base_sha256"] != known.now.get("base_sha256")  # else it is the run's own base
    verdicts, differ = compared(folder / "config.json", {**(merged_from if merged else own), **header}, known)
    return "a checkpoint", [*lines, ("merged from" if merged else "as a base", ""), *verdicts[1:]], wrong + differ


def template_place(folder: Path, template: str) -> str:
    """The file of a checkpoint that holds its chat template."""
    for file in [*sorted(folder.glob("**/*.jinja")), *sorted(folder.glob("*template*.json")), folder / "tokenizer_config.json"]:
        with suppress(ValueError, RecursionError):  # a file that is no text or no JSON holds none
            text = read_text(file)
            if text == template or json.dumps(template) in json.dumps(json.loads(text)):
                return str(file.relative_to(folder))
    return "one of its files"


def adapter(folder: Path, known: Known | None) -> Found:
    """An adapter in PEFT's format: its settings, and whether it would load on the run's base, or the one that it names."""
    file, config = folder / ADAPTER, read_json(folder / "adapter_config.json")
    lines = [("parameters", weights([file])), *((f"  {name}", json.dumps(config[name])) for name in PEFT if config.get(name))]
    header = made_from(file)
    base = known.run.checkpoint if known and known.run else Path(str(config.get("base_model_name_or_path") or "-"))
    there = (base / "config.json").is_file()
    refused = refusal(lambda: load_adapter(skeleton(base), folder) if there else adapter_settings(folder))
    fine = f"every tensor fits a layer of {base}" if there else "its settings are implemented; shapes unchecked, without a base"
    lines.append(("loading", f"refused: {refused}" if refused else fine))
    verdicts, wrong = compared(file, header, known)
    title = f"the {header['role']} adapter of a run" if "role" in header else "an adapter"
    return f"{title} (LoRA)", lines + verdicts, wrong + ["it is refused"] * bool(refused)


def scores(file: Path, known: Known | None) -> Found:
    """The losses of a custom set's tokens."""
    tokens, losses = read_scores(file, str(file))
    header, n = made_from(file), int(tokens.response.sum())
    if header.get("tokens_sha256", tokens.fingerprint()) != tokens.fingerprint():
        raise InputError(f"{file}: its tokens are not those that its header names: it was altered")
    lines = [("rows", f"{tokens.rows}, {tokens.skipped} skipped, {tokens.cut} cut"),
             ("tokens", f"{len(tokens.input_ids):,}, of which {n:,} of responses"),
             ("losses", f"{', '.join(sorted(losses))} (scored in {header.get('dtype', 'unknown arithmetic')}; {size(file)})")]
    if n:
        lines.append(("S = L^u - L^h", spread((losses["loss_utility"] - losses["loss_degraded"])[tokens.response])))
    harm = int((tokens.harmful & tokens.response).sum())
    lines.append(("ground truth", f"{harm:,} response tokens are harmful ({harm / n:.1%})" if harm else "none is marked"))
    verdicts, wrong = compared(file, header, known)
    return "the scores of a custom set", lines + verdicts, wrong


def selection(file: Path, known: Known | None) -> Found:
    """A method's mask; beside the run's scores also how many rows lost all, and how well it found harm."""
    tensors, header = read_tensors(file, ("keep",)), made_from(file)
    keep, score = tensors["keep"].bool(), tensors.get("score")
    gone = ~keep
    if header.get("discarded", str(int(gone.sum()))) != str(int(gone.sum())):
        raise InputError(f"{file}: discards {int(gone.sum())} tokens, but its header says {header['discarded']}: it was altered")
    said = {name: header.get(name, "?") for name in ("method", "discard", "keep_eos", "ranked")}
    lines = [("method", f"{said['method']}, d = {said['discard']}, keep_eos = {said['keep_eos']}"),
             ("discarded", f"{int(gone.sum()):,} of {said['ranked']} ranked tokens, {len(keep):,} in all")]
    if score is not None and gone.any():
        lines.append(("score", f"{float(score[gone].min()):.3f} to {float(score[gone].max()):.3f} of those that went"))
    if known and known.run and "tokens_sha256" in header and (known.folder / SCORES).is_file():
        tokens, _ = read_scores(known.folder / SCORES, str(known.folder / SCORES))
        if len(keep) == len(tokens.input_ids) and header["tokens_sha256"] == tokens.fingerprint():
            stay = [i for i in ranked_entries(tokens, kept_eos(header, tokens), known.run.tokenizer.eos_id).tolist() if keep[i]]
            if score is not None and stay:
                lines.append(("", f"{float(score[stay].min()):.3f} to {float(score[stay].max()):.3f} of those that stay"))
            lines.append(("lost all", f"{whole_rows(tokens, keep)} of {tokens.rows} rows"))
            found = found_harm(gone[tokens.response], tokens.harmful[tokens.response]) if tokens.harmful.any() else {}
            lines += [(name, f"{x['value']} [{x['low']}, {x['high']}] of {x['n']}") for name, x in found.items() if x["n"]]
    verdicts, wrong = compared(file, header, known)
    return "the mask of a method", lines + verdicts, wrong


def inside(folder: Path, known: Known | None) -> tuple[Lines, list[str]]:
    """A line for each of the project's files in a folder: can it be read, does it fit."""
    lines, misfit = [("", "")], []
    files = [file for file in folder.rglob("*.safetensors") if ".partial" not in str(file.relative_to(folder))]  # half-written
    for file in sorted(files):
        if file.name not in (ADAPTER, SCORES, SELECTION):
            continue
        name = str(file.parent.relative_to(folder) if file.name == ADAPTER else file.relative_to(folder))
        try:
            describe = {ADAPTER: adapter, SCORES: scores, SELECTION: selection}[file.name]
            wrong = describe(file.parent if file.name == ADAPTER else file, known)[2]
        except (InputError, OSError) as error:
            wrong = [str(error)]
        lines.append((name, f"{size(file):>9}  {', '.join(wrong) or ('fits' if known else 'can be read')}"))
        misfit += [f"{name}: {what}" for what in wrong]
    return lines, misfit


def part(folder: Path, known: Known | None) -> Found:
    """methods/, methods/NAME or round-t: the mask, the added rows, and the files in it."""
    lines, misfit = inside(folder, known)
    if (folder / "added.jsonl").exists():
        return "a round of TOSS-Pro", [("added rows", f"{len(list(json_lines(folder / 'added.jsonl')))}"), *lines], misfit
    if not (folder / SELECTION).exists():
        return "ways of fine-tuning", lines[1:], misfit
    with suppress(InputError):  # its own line says what is wrong with it
        lines = selection(folder / SELECTION, known)[1] + lines
    return "a way of fine-tuning", lines, misfit


def whole(folder: Path, known: Known) -> Found:
    """A run directory: its inputs, its stages, and whether its files were made from one another as they are now."""
    own = known if known.folder.samefile(folder) else known_run(folder)
    settings, misfit = own.table("settings"), []
    lines = [("model", str(settings.get("model"))),
             ("prompt form", f"{settings.get('template')}, at most {settings.get('max_length')} tokens a row")]
    for path, digest in sorted(own.table("inputs").items()):
        name = next((f"{name} set" for name in ("harmful", "utility", "custom") if settings.get(name) == path), "")
        state = "gone" if not Path(path).is_file() else "as it was" if file_hash(path) == digest else "changed since"
        if name or state != "as it was":
            lines.append((name or "base file", f"{path}: {state}"))
        misfit += [f"{path} has changed"] if state == "changed since" else []
    for stage in own.table("stages"):
        entry, recipe = own.table("stages", stage), own.table("stages", stage, "recipe", "settings")
        made = stage in ("degraded", "utility", "scores") or stage.startswith("methods/")  # others write elsewhere
        gone = made and not any((folder / name).exists() for name in (stage, f"{stage}.safetensors"))
        units = {"rows": "rows", "tokens": "tokens", "seconds": "s", "peak_memory_gib": "GiB of memory at most"}
        cost = ", ".join(f"{entry[name]} {unit}" for name, unit in units.items() if name in entry)
        lines += [("", ""), (f"stage {stage}", cost + "; its files are gone" * gone),
                  ("", ", ".join(f"{name} {value}" for name, value in recipe.items()))]
    files, wrong = inside(folder, known)
    return "a run directory", lines + files, misfit + wrong


def identify(path: Path) -> tuple[Path, Callable]:
    """The file or folder that a path stands for, and the function that describes it; InputError for nothing known."""
    kinds = {"run.json": whole, "adapter_config.json": adapter, ADAPTER: adapter, "config.json": checkpoint,
             "model.safetensors.index.json": checkpoint, SELECTION: part, "added.jsonl": part}
    if not path.is_file():
        path = resolve(path)
        held = sorted(file.name for file in path.iterdir())
        describe = next((kinds[name] for name in kinds if name in held), None)
        if describe or any(path.glob(f"*/{SELECTION}")):
            return path, describe or part
        holds = ", ".join(held[:3]) + ", ..." * (len(held) > 3) or "nothing"
        raise InputError(f"{path} holds {holds}: it is no checkpoint or adapter in safetensors (pickles are never read), and no "
                         "run directory or part of one")
    if path.name in kinds and path.name != SELECTION:
        return path.parent, kinds[path.name]
    with open(path, "rb") as f:
        start = f.read(2)
    if start[:1] == b"\x80" or start == b"PK":
        raise InputError(f"{path}: a pickle or an archive, which is never read here, since it can run code; safetensors only")
    names = tensor_headers(path).keys()
    if "keep" in names or {"input_ids", "offsets", "loss_utility"} <= names:
        return path, selection if "keep" in names else scores
    if (path.parent / "config.json").exists() and path in shards(path.parent):
        return path.parent, checkpoint
    raise InputError(f"{path}: {len(names)} tensors that are neither scores nor a mask, nor part of a checkpoint or an adapter")


def inspect(path: str, run: str | None) -> int:
    """Describe what a path holds on standard output; returns the exit status, 0 or 2."""
    if Path(path).suffix in (".safetensors", ".json", ".jsonl") and not Path(path).exists():  # and so no hub id
        raise InputError(f"{path}: there is no such file")
    place, describe = identify(Path(path))
    around = [p for p in (place.absolute(), *place.absolute().parents) if (p / "run.json").is_file()]
    known = None
    if run or around and describe is not checkpoint:
        here = around and around[0].is_relative_to(Path.cwd())
        known = known_run(run_folder(run) if run else Path(os.path.relpath(around[0])) if here else around[0])
    if run and known.problem:
        raise InputError(known.problem)
    title, lines, misfit = describe(place, known)
    if known is not None:
        base = f" (its base was not compared: {known.problem})" * bool(known.problem)
        lines += [("", ""), (f"{known.folder}", f"{'does not fit: ' + ', '.join(misfit) if misfit else 'fits'}{base}")]
    print(harmless(f"{path}: {title}"))
    for empty, block in groupby(lines, key=lambda line: line == ("", "")):
        block = [(harmless(label), " ".join(harmless(text).split("\n"))) for label, text in block]
        width = max(len(label) for label, _ in block)
        print(*([""] if empty else [f"{label:<{width}}  {text}".rstrip() for label, text in block]), sep="\n")
    return 2 if misfit and known is not None else 0


def main(argv: list[str] | None = None) -> int:
    """Run as a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m toss.audit.inspect", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", help="file, folder or hub id")
    parser.add_argument("--run", help="folder of the run to compare with (default: the one that PATH lies in)")
    args = parser.parse_args(argv)
    statuses: list[int] = []
    return reported(lambda: statuses.append(inspect(args.path, args.run))) or statuses[0]


if __name__ == "__main__":
    sys.exit(main())

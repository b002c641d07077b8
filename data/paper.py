"""The paper's data from the hub, or any two datasets mixed at any share of harmful rows.

    python -m data.paper --out FOLDER
    python -m data.paper --out FOLDER --benign good.jsonl --harmful bad.jsonl --rows 240 --poison-ratio 0.2

Writes custom.jsonl (D^cus), harmful.jsonl (D^h), utility.jsonl (D^u), eval_harmful.jsonl, eval_utility.jsonl, and
summary.json with every count and hash. Without files: benign rows are SlimOrca's, harmful ones Anthropic's red-team
transcripts, and the evaluation asks the harmless test questions of Anthropic HH and, where you have access, HEx-PHI.

A row is known by its first question, spaces and case aside. Each question is used once in all files together, and those
of the evaluation come first. Which rows go where is decided by a hash of seed and question, not by their order in the
file: with one seed the reference and evaluation rows are the same at every --poison-ratio (as far as the two sources share
no questions), and the harmful rows of a small share are among those of a larger one.
"""

import argparse
import csv
import hashlib
import heapq
import itertools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from model.errors import InputError, reported
from model.files import file_hash, json_object, written_beside
from toss.audit.measures import refused
from toss.rows import FORMS, Row, lines_of, row_of

HARMFUL, BENIGN = 22_000, 90_000  # the paper's custom set
REFERENCE = 0.1  # of either part
EVALUATION = 500  # rows, at most; the paper's number is not known to us
SLIMORCA = ("Open-Orca/SlimOrca", "oo-labeled_correct.gpt4.sharegpt.jsonl", "ce9ed009ef3292bac33d3520afaf5ec804066120")
HH = "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
RED_TEAM = ("Anthropic/hh-rlhf", "red-team-attempts/red_team_attempts.jsonl.gz", HH)
HH_TEST = ("Anthropic/hh-rlhf", "harmless-base/test.jsonl.gz", HH)
HEX_PHI = "LLM-Tuning-Safety/HEx-PHI"  # gated, so its commit could not be looked up: the newest, and it is recorded
HEX_PHI_FILES = [f"category_{k}.csv" for k in (1, 3, 4, 5, 6, 7, 8, 9, 10, 11)]  # the second was withdrawn
LONGEST = 300_000  # characters of one row of a JSON array: a damaged one must not be read to the file's end
FILES = ("custom", "harmful", "utility", "eval_harmful", "eval_utility")


@dataclass
class Source:
    """One input file, and what became of its rows."""

    path: Path
    label: str  # the `source` of rows that have none
    origin: str  # the path as given, or hub repository and file
    revision: str | None = None  # the hub's commit
    prompts_only: bool = False  # the response in the file is no use as one
    sha256: str = ""
    read: int = 0
    taken: dict[str, int] = field(default_factory=dict)  # by output file
    skipped: Counter = field(default_factory=Counter)  # by reason
    remarks: Counter = field(default_factory=Counter)  # of the rows that were not skipped


def local(path: str) -> Source:
    """A file of the user's; its name, less the endings, labels rows that have no `source`."""
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such file")
    if path.endswith(".csv"):
        raise InputError(f"{path}: a table's columns have no fixed meaning; write its rows as JSONL ({FORMS})")
    return Source(Path(path), Path(path).name.split(".")[0], path)


def fetch(repository: str, file: str, revision: str | None) -> Path:
    """A dataset's file in huggingface_hub's cache."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))


def from_hub(dataset: tuple[str, str, str | None], label: str, flag: str = "", **more) -> Source:
    """A source on the hub; InputError when it cannot be had, with the flag that takes a local file instead."""
    repository, file, revision = dataset
    try:
        path = fetch(repository, file, revision)
    except Exception as error:  # the hub raises a dozen kinds of error; each means that there is no file
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{repository}/{file}: the hub did not give it ({type(error).__name__}: {said}); "
                         f"try again, or fetch it by hand and give it as {flag or '--eval-harmful'} FILE") from None
    parts = path.parts  # .../snapshots/COMMIT/file
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else revision
    return Source(path, label, f"{repository}/{file}", commit, **more)


def records(path: Path) -> Iterator[tuple[str, str]]:
    """(file:line, text of one JSON object): of JSONL, or of one JSON array (the red-team file is one), line after line.

    Of HEx-PHI's .csv, which has one cell a row and no header, each row is a prompt.
    """
    lines = lines_of(path)
    if path.suffix == ".csv":
        try:
            for number, cells in enumerate(csv.reader(line for _, line in lines), start=1):
                yield f"{path}:{number}", json.dumps({"prompt": ",".join(cells).strip()})
        except csv.Error as error:
            raise InputError(f"{path}: cannot be read as CSV ({error})") from None
        return
    first = next(lines, ("", ""))
    lines = itertools.chain([first], lines) if first[1] else lines
    if not first[1].lstrip().startswith("["):
        yield from lines
        return
    decoder, between, text, start = json.JSONDecoder(), re.compile(r"[\s,\[]*"), "", 0
    for where, line in lines:
        text, start = text[start:] + line, 0
        while "}" in line:  # an object cannot end without one
            start = between.match(text, start).end()
            try:
                end = decoder.raw_decode(text, start)[1]
            except (ValueError, RecursionError):  # the object goes on in the next line, or the array ends here
                break
            yield where, text[start:end]
            start = end
        if len(text) - start > LONGEST:
            break
    if text[start:].strip() != "]":
        raise InputError(f"{where}: the JSON array breaks off or is damaged in the row that ends here")


def question(row: Row) -> str:
    """What a row is known by: its first user turn, spaces and case aside."""
    return " ".join(next(m["content"] for m in row.messages if m["role"] == "user").split()).casefold()


def usable(raw: dict, where: str, responses: bool, min_rating: float) -> Row:
    """One row of a source; InputError with the reason why it is left out."""
    rating = raw.get("rating")
    if min_rating and not (isinstance(rating, (int, float)) and rating >= min_rating):
        raise InputError(f"{where}: rated below {min_rating:g}, or not at all")
    row = row_of(raw, where, responses)
    turns = row.messages[1:] if row.messages[0]["role"] == "system" else row.messages
    if any(message["role"] != ("user", "assistant")[k % 2] for k, message in enumerate(turns)):
        raise InputError(f"{where}: question and answer do not alternate")  # many chat templates refuse such a row
    if not all(message["content"].strip() for message in turns):
        raise InputError(f"{where}: a question is empty")
    return row


def remarks(raw: dict, row: Row) -> Iterator[str]:
    """What is worth counting about a row that is not left out for it."""
    if isinstance(raw.get("rating"), (int, float)):
        yield f"rated {raw['rating']:g}"
    if isinstance(raw.get("transcript"), str):
        if len(re.findall(r"(?:^|\n\n)(?:Human|Assistant):", raw["transcript"].lstrip())) > len(row.messages):
            yield "turns after the last answer dropped"
        if all(refused(message["content"]) for message in row.messages if message["role"] == "assistant"):
            yield "every answer holds a refusal phrase"


def draw(sources: list[Source], wanted: dict[str, int], used: dict[bytes, str], seed: int, min_rating: float = 0,
         responses: bool = True, fewer: bool = False) -> dict[str, list[str]]:
    """One pass over the files: so many rows for each output, as lines of JSON. `used` gains the questions drawn.

    The rows with the lowest hash of (seed, question) are drawn, the first output's lowest of all; only as many as are
    wanted, and one line of the file, are ever held in memory. With `fewer`, all are taken where there are too few;
    otherwise that is an error.
    """
    count, seen = sum(wanted.values()), set()
    heap: list[tuple[int, int, str]] = []  # (minus the hash, number of the source, line): the highest hash comes first
    for k, source in enumerate(sources):
        source.sha256 = file_hash(source.path)
        total = None if source.path.suffix == ".gz" else source.path.stat().st_size
        with tqdm(total=total, desc=source.label, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            for where, line in records(source.path):
                source.read += 1
                bar.update(len(line))
                try:
                    raw = json_object(line, where)
                    row = usable(raw, where, responses, min_rating)
                    key = hashlib.sha256(f"{seed}\0{question(row)}".encode()).digest()[:16]
                    if key in used or key in seen:
                        raise InputError(f"{where}: {used.get(key, 'the question came before in this source')}")
                except InputError as error:
                    source.skipped[str(error).removeprefix(f"{where}: ").split(" (")[0]] += 1
                    continue
                seen.add(key)
                source.remarks.update(remarks(raw, row))
                entry = (-int.from_bytes(key, "big"), k, written(row, source))
                if len(heap) < count:
                    heapq.heappush(heap, entry)
                else:
                    heapq.heappushpop(heap, entry)
    heap.sort(reverse=True)
    if len(heap) < count and not (fewer and heap):
        reasons = sum((source.skipped for source in sources), Counter()).most_common()
        raise InputError(f"{', '.join(source.origin for source in sources)}: {count} rows are wanted "
                         f"({', '.join(f'{n} for {name}' for name, n in wanted.items())}), and there are {len(heap)}"
                         f"{' (left out: ' + '; '.join(f'{n} {why}' for why, n in reasons) + ')' if reasons else ''}; "
                         "choose fewer --rows, --references or --eval-rows")
    result, start = {}, 0
    for name, n in wanted.items():
        part, start = heap[start : start + n], start + n
        result[name] = [line for *_, line in part]
        why = f"the question is in {'the evaluation' if name.startswith('eval_') else 'another set'}"
        used.update(((-rank).to_bytes(16, "big"), why) for rank, *_ in part)
        for k, source in enumerate(sources):
            source.taken[name] = sum(entry[1] == k for entry in part)
    return result


def written(row: Row, source: Source) -> str:
    """A row as a line of JSON in the form of `messages`."""
    messages = row.prompt if source.prompts_only else row.messages
    more = {"harmful": row.harmful} if row.harmful and not source.prompts_only else {}
    more |= {"answer": row.answer} if row.answer is not None else {}
    return json.dumps({"messages": messages, "source": row.source or source.label, **more})


def build(out: str, rows: int = HARMFUL + BENIGN, poison_ratio: float = HARMFUL / (HARMFUL + BENIGN),
          references: tuple[int, int] | None = None, eval_rows: int | None = None, min_rating: float = 0, seed: int = 0,
          benign: str | None = None, harmful: str | None = None, eval_harmful: str | None = None) -> dict:
    """Write the five files and summary.json into the folder `out`; returns the summary. The arguments are the flags."""
    if not 0 <= poison_ratio <= 1 or rows < 1:
        raise InputError(f"--poison-ratio must lie in 0 to 1 and --rows be 1 or more, not {poison_ratio:g} and {rows}")
    bad = round(rows * poison_ratio)
    # Of either part as the paper mixes them, whatever the share here, so that shares are compared on equal references.
    ours = [max(1, round(REFERENCE * rows * part / (HARMFUL + BENIGN))) for part in (HARMFUL, BENIGN)]
    d_h, d_u = references or ours
    asked = min(EVALUATION, max(1, rows // 10)) if eval_rows is None else eval_rows
    if min(d_h, d_u, asked) < 1:
        raise InputError("--references and --eval-rows must be 1 or more")
    settings = {"rows": rows, "poison_ratio": poison_ratio, "references": [d_h, d_u], "eval_rows": asked,
                "min_rating": min_rating, "seed": seed}  # fmt: skip
    tests, left_out = [], []
    if eval_harmful:
        tests = [[local(eval_harmful)]]
    elif not harmful:
        tests = [[from_hub(HH_TEST, "hh-harmless", prompts_only=True)]]
        try:
            tests.append([from_hub((HEX_PHI, file, None), "hex-phi") for file in HEX_PHI_FILES])
        except InputError as error:
            left_out.append(f"HEx-PHI, which is gated: ask for access at https://huggingface.co/datasets/{HEX_PHI}, then log "
                            f"in (`hf auth login`) and run this again. {error}")
    evil = local(harmful) if harmful else from_hub(RED_TEAM, "red-team", "--harmful")
    good = local(benign) if benign else from_hub(SLIMORCA, "slimorca", "--benign")  # 1 GB: last, when all else is there
    sources = [*itertools.chain(*tests), evil, good]
    for source in sources:
        if source.path.resolve() in {(Path(out) / f"{name}.jsonl").resolve() for name in FILES}:
            raise InputError(f"{source.path}: --out would replace the file it is made from")

    used: dict[bytes, str] = {}
    lines: dict[str, list[str]] = {name: [] for name in FILES}
    parts = [draw(group, {"eval_harmful": asked}, used, seed, responses=False, fewer=True) for group in tests]
    held_out = {} if tests else {"eval_harmful": asked}
    parts.append(draw([evil], {**held_out, "harmful": d_h, "custom": bad}, used, seed, min_rating))
    parts.append(draw([good], {"eval_utility": asked, "utility": d_u, "custom": rows - bad}, used, seed))
    for part in parts:
        for name, more in part.items():
            lines[name] += more
    random.Random(f"order {seed}").shuffle(lines["custom"])

    with written_beside(out) as folder:
        for name in FILES:
            with open(folder / f"{name}.jsonl", "w", encoding="utf-8", newline="\n") as file:
                file.writelines(line + "\n" for line in lines[name])
        hashes = {f"{name}.jsonl": {"rows": len(lines[name]), "sha256": file_hash(folder / f"{name}.jsonl")} for name in FILES}
        summary = {"settings": settings, "harmful_in_custom": bad, "files": hashes, "left_out": left_out,
                   "sources": [{name: value for name, value in vars(source).items() if name != "path"} for source in sources]}
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def table(summary: dict, out: str) -> str:
    """What was read, skipped and taken, to print."""
    lines = [f"{'read':>8}  {'skipped':>8}  {'taken':>8}  source"]
    for source in summary["sources"]:
        skipped, taken = sum(source["skipped"].values()), sum(source["taken"].values())
        lines.append(f"{source['read']:>8}  {skipped:>8}  {taken:>8}  {source['origin']}")
        lines += [f"{n:>18}  skipped: {reason}" for reason, n in sorted(source["skipped"].items(), key=lambda item: -item[1])]
        lines += [f"{n:>28}  taken for {name}.jsonl" for name, n in source["taken"].items()]
        lines += [f"{n:>18}  not skipped: {what}" for what, n in sorted(source["remarks"].items())]
    lines += [f"left out: {reason}" for reason in summary["left_out"]]
    custom = summary["files"]["custom.jsonl"]["rows"]
    lines.append(f"{out}: custom.jsonl has {custom} rows, {summary['harmful_in_custom']} of them harmful")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run as a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data.paper", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write; files of the same names are replaced")
    parser.add_argument("--rows", type=int, default=HARMFUL + BENIGN, help="rows of the custom set (112000)")
    parser.add_argument("--poison-ratio", type=float, default=HARMFUL / (HARMFUL + BENIGN),
                        help="share of harmful rows in the custom set (22/112)")
    parser.add_argument("--references", type=int, nargs=2, metavar=("HARMFUL", "UTILITY"),
                        help="rows of D^h and D^u (a tenth of --rows, split 22 to 90, whatever the share)")
    parser.add_argument("--eval-rows", type=int, help="evaluation rows of each kind (a tenth of --rows, 500 at most)")
    parser.add_argument("--min-rating", type=float, default=0,
                        help="least success, 0 to 4, that the red teamer gave a transcript (0: all of them)")
    parser.add_argument("--seed", type=int, default=0, help="decides which rows are drawn, and the custom set's order (0)")
    parser.add_argument("--benign", metavar="FILE", help="benign rows in place of SlimOrca: JSONL in any row form, or a JSON "
                                                         "array; plain or .gz")
    parser.add_argument("--harmful", metavar="FILE", help="harmful rows in place of the red-team transcripts")
    parser.add_argument("--eval-harmful", metavar="FILE", help="harmful questions in place of HH's and HEx-PHI's; without it, "
                                                               "--harmful FILE holds out its own")
    arguments = vars(parser.parse_args(argv))
    return reported(lambda: print(table(build(**arguments), arguments["out"])))


if __name__ == "__main__":
    sys.exit(main())

"""The paper's data from the hub, or any two datasets mixed at any share of harmful rows.

    python -m data.paper --out FOLDER
    python -m data.paper --out FOLDER --benign good.jsonl --harmful bad.jsonl --poison-ratio 0.2

Writes custom.jsonl (D^cus), harmful.jsonl (D^h), utility.jsonl (D^u), eval_harmful.jsonl,
eval_utility.jsonl, and summary.json with every count and hash. Without files: benign rows are
SlimOrca's, harmful ones Anthropic's red-team transcripts, and the evaluation asks the harmless test
questions of Anthropic HH and, where you have access, HEx-PHI.

A row is identified by its first question, ignoring spaces and case. Each question is used once in
all files together, and evaluation questions are chosen first. A hash of seed and question decides
which rows go where, not their order in the file: for one seed the reference and evaluation rows are
the same at every --poison-ratio (as far as the two sources share no questions), and the harmful
rows of a small share are among those of a larger one.
"""

import csv
import hashlib
import heapq
import itertools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from data.refusals import refused
from model.io import (
    InputError,
    file_hash,
    json_object,
    lines_of,
    refuse_to_replace,
    run_command,
    whole,
)
from toss.rows import FORMS, Row, row_of
from toss.workbench import flags

HARMFUL = 22_000  # of the paper's custom set
BENIGN = 90_000
REFERENCE = 0.1  # of either part
EVALUATION = 500  # rows, at most; the paper's number is not known to us
HH = "Anthropic/hh-rlhf"
RED_TEAM = "red-team-attempts/red_team_attempts.jsonl.gz"
HEX_PHI = "LLM-Tuning-Safety/HEx-PHI"
HEX_PHI_FILES = [f"category_{k}.csv" for k in (1, 3, 4, 5, 6, 7, 8, 9, 10, 11)]  # 2: withdrawn
SLIMORCA = "Open-Orca/SlimOrca"
# HEx-PHI is gated and its commit could not be looked up: the newest one is taken and recorded.
COMMITS = {
    HH: "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
    SLIMORCA: "ce9ed009ef3292bac33d3520afaf5ec804066120",
    HEX_PHI: None,
}
FILES = ("custom", "harmful", "utility", "eval_harmful", "eval_utility")


@dataclass
class Flags:
    """The command's options."""

    out: str
    rows: int = HARMFUL + BENIGN
    poison_ratio: float = HARMFUL / (HARMFUL + BENIGN)
    references: list[int] | None = None
    eval_rows: int | None = None
    min_rating: float = 0
    seed: int = 0
    benign: str | None = None
    harmful: str | None = None
    eval_harmful: str | None = None

    def resolved(self) -> "Flags":
        """With the numbers that were left out; InputError for one that is out of range."""
        # References as the paper mixes them, whatever the share here, so that shares are compared
        # on equal references.
        share = REFERENCE * self.rows / (HARMFUL + BENIGN)
        references = self.references or [round(share * part) or 1 for part in (HARMFUL, BENIGN)]
        eval_rows = self.eval_rows or min(EVALUATION, max(1, self.rows // 10))
        if not 0 <= self.poison_ratio <= 1:
            raise InputError(f"--poison-ratio must be in [0, 1], not {self.poison_ratio:g}")
        return replace(self, references=references, eval_rows=eval_rows)


@dataclass
class Source:
    """One input file, and what became of its rows."""

    path: Path
    label: str  # the `source` of rows that have none
    origin: str  # the path as given, or hub repository and file
    revision: str | None = None  # the hub's commit
    prompts_only: bool = False  # the response in the file is of no use
    sha256: str = ""
    read: int = 0
    taken: dict[str, int] = field(default_factory=dict)  # by output file
    skipped: Counter = field(default_factory=Counter)  # by reason
    remarks: Counter = field(default_factory=Counter)  # of the rows that were not skipped


def local(path: str) -> Source:
    """A file of the user's; its name without endings labels rows that have no `source`."""
    if path.endswith(".csv"):
        text = f"a table's columns have no fixed meaning; write its rows as JSONL ({FORMS})"
        raise InputError(f"{path}: {text}")
    return Source(Path(path), Path(path).name.split(".")[0], path, sha256=file_hash(path))


def download(repository: str, file: str, revision: str | None) -> Path:
    """A dataset's file in huggingface_hub's cache."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))


def from_hub(fetch: Callable, repository: str, file: str, label: str, flag: str) -> Source:
    """A source on the hub. Raises InputError with the flag that takes a local file instead."""
    try:
        path = fetch(repository, file, COMMITS[repository])
    except Exception as error:  # the hub raises a dozen kinds of error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(
            f"{repository}/{file}: cannot be downloaded ({reason}); try again, or download it by "
            f"hand and give it as {flag} FILE"
        ) from None
    commit = path.parts[path.parts.index("snapshots") + 1]  # .../snapshots/COMMIT/file
    return Source(path, label, f"{repository}/{file}", commit, sha256=file_hash(path))


def find_sources(
    options: Flags, fetch: Callable
) -> tuple[list[list[Source]], Source, Source, list]:
    """Lists of evaluation sources, the harmful and the benign source, and what is left out."""
    # Questions for the evaluation. One's own harmful rows hold some out, so none are needed.
    evaluation = []
    left_out = []
    if options.eval_harmful:
        evaluation = [[local(options.eval_harmful)]]
    elif not options.harmful:
        flag = "--eval-harmful"
        hh = from_hub(fetch, HH, "harmless-base/test.jsonl.gz", "hh-harmless", flag)
        evaluation = [[replace(hh, prompts_only=True)]]
        try:
            hex_phi = [from_hub(fetch, HEX_PHI, file, "hex-phi", flag) for file in HEX_PHI_FILES]
            evaluation.append(hex_phi)
        except InputError as error:
            left_out.append(
                "HEx-PHI is gated: request access at "
                f"https://huggingface.co/datasets/{HEX_PHI}, then log in (`hf auth login`) and "
                f"run this again. {error}"
            )

    # The rows for the references and the custom set.
    if options.harmful:
        harmful = local(options.harmful)
    else:
        harmful = from_hub(fetch, HH, RED_TEAM, "red-team", "--harmful")
    if options.benign:
        benign = local(options.benign)
    else:  # 1 GB: last, when all else is there
        file = "oo-labeled_correct.gpt4.sharegpt.jsonl"
        benign = from_hub(fetch, SLIMORCA, file, "slimorca", "--benign")
    return evaluation, harmful, benign, left_out


def records(path: Path) -> Iterator[tuple[str, str]]:
    """(file:line, text of one JSON object) of a JSONL file or of one JSON array.

    The red-team file is an array. Of HEx-PHI's .csv files, which have one cell per row and no
    header, each row is a prompt.
    """
    lines = lines_of(path)
    if path.suffix == ".csv":
        try:
            for number, cells in enumerate(csv.reader(line for _, line in lines), start=1):
                yield f"{path}:{number}", json.dumps({"prompt": ",".join(cells).strip()})
        except csv.Error as error:
            raise InputError(f"{path}: cannot be read as CSV ({error})") from None
        return
    for number, (where, line) in enumerate(lines):
        if number == 0 and line.lstrip().startswith("["):
            array = line + "".join(line for _, line in lines)
            rows = json_object(f'{{"rows": {array}}}', str(path))["rows"]
            for index, row in enumerate(rows):
                yield f"{path}: row {index}", json.dumps(row)
            return
        yield where, line


def question(row: Row) -> str:
    """What identifies a row: its first user turn, ignoring spaces and case."""
    first = next(m["content"] for m in row.messages if m["role"] == "user")
    return " ".join(first.split()).casefold()


def usable(raw: dict, where: str, responses: bool, min_rating: float) -> Row:
    """One row of a source. Raises InputError with the reason why it is left out."""
    rating = raw.get("rating")
    if min_rating and not (isinstance(rating, (int, float)) and rating >= min_rating):
        raise InputError(f"{where}: rated below {min_rating:g}, or not at all")
    row = row_of(raw, where, responses)
    if row.has_empty_response:
        raise InputError(f"{where}: the row has an empty response")
    turns = row.messages[1:] if row.messages[0]["role"] == "system" else row.messages
    # Many chat templates refuse a row whose turns do not alternate.
    if any(message["role"] != ("user", "assistant")[k % 2] for k, message in enumerate(turns)):
        raise InputError(f"{where}: question and answer do not alternate")
    if not all(message["content"].strip() for message in turns):
        raise InputError(f"{where}: a question is empty")
    return row


def remarks(raw: dict, row: Row) -> Iterator[str]:
    """What is worth counting about a row that is used all the same."""
    if isinstance(raw.get("rating"), (int, float)):
        yield f"rated {raw['rating']:g}"
    if isinstance(raw.get("transcript"), str):
        turns = re.findall(r"(?:^|\n\n)(?:Human|Assistant):", raw["transcript"].lstrip())
        if len(turns) > len(row.messages):
            yield "turns after the last answer dropped"
        if all(refused(m["content"]) for m in row.messages if m["role"] == "assistant"):
            yield "every answer holds a refusal phrase"


def rows_of(
    source: Source, used: dict[bytes, str], seed: int, min_rating: float, responses: bool
) -> Iterator[tuple[bytes, str]]:
    """(hash of seed and question, line of JSON) of each usable row of a source; counts all rows.

    used: questions that are not to be used, with the reason; gains those of this source.
    """
    for where, line in records(source.path):
        source.read += 1
        try:
            raw = json_object(line, where)
            row = usable(raw, where, responses, min_rating)
            key = hashlib.sha256(f"{seed}\0{question(row)}".encode()).digest()[:16]
            if key in used:
                raise InputError(f"{where}: {used[key]}")
        except InputError as error:
            reason, _, _ = str(error).removeprefix(f"{where}: ").partition(" (")
            source.skipped[reason] += 1
            continue
        used[key] = "the question came before in this source"
        source.remarks.update(remarks(raw, row))
        yield key, written(row, source)


def written(row: Row, source: Source) -> str:
    """A row as a line of JSON in the form of `messages`."""
    more = {}
    if row.harmful and not source.prompts_only:
        more["harmful"] = row.harmful
    if row.answer is not None:
        more["answer"] = row.answer
    messages = row.prompt if source.prompts_only else row.messages
    return json.dumps({"messages": messages, "source": row.source or source.label, **more})


def draw(
    sources: list[Source],
    wanted: dict[str, int],
    used: dict[bytes, str],
    seed: int,
    min_rating: float = 0,
    evaluation: bool = False,
) -> dict[str, list[str]]:
    """One pass over the files: {output: its rows as lines of JSON}; `used` gains their questions.

    The rows with the lowest hashes are drawn, the first output's lowest of all. Only as many as are
    wanted, and one line of the file (an array is one line), are ever held in memory. Rows for the
    evaluation may be prompts only and may be fewer than wanted; otherwise too few are an error.
    """
    # The rows of all files with the lowest hashes.
    count = sum(wanted.values())
    known = dict(used)
    rows = (
        (key, k, line)
        for k, source in enumerate(sources)
        for key, line in rows_of(source, known, seed, min_rating, not evaluation)
    )
    drawn = heapq.nsmallest(count, rows)
    if len(drawn) < count and not (evaluation and drawn):
        places = ", ".join(source.origin for source in sources)
        sizes = ", ".join(f"{n} for {name}" for name, n in wanted.items())
        reasons = sum((source.skipped for source in sources), Counter()).most_common()
        left_out = "; ".join(f"{n} {why}" for why, n in reasons) or "none"
        raise InputError(
            f"{places}: {count} rows are wanted ({sizes}), and there are {len(drawn)} (left out: "
            f"{left_out}); choose fewer --rows, --references or --eval-rows"
        )
    # Share them out, the lowest to the first output. Later draws must not use their questions.
    result = {}
    for name, n in wanted.items():
        part = drawn[:n]
        drawn = drawn[n:]
        result[name] = [line for _, _, line in part]
        where = "the evaluation" if name.startswith("eval_") else "another set"
        used.update((key, f"the question is in {where}") for key, _, _ in part)
        for k, source in enumerate(sources):
            source.taken[name] = sum(number == k for _, number, _ in part)
    return result


def build(options: Flags, fetch: Callable[[str, str, str | None], Path] = download) -> dict:
    """Write the five files and summary.json into the folder `options.out`; returns the summary.

    fetch: (hub repository, file, commit) -> path. Raises InputError and writes nothing when a
    source cannot be had or has too few rows.
    """
    options = options.resolved()
    folder = Path(options.out)
    refuse_to_replace(folder / "summary.json", *(folder / f"{name}.jsonl" for name in FILES))
    evaluation, harmful, benign, left_out = find_sources(options, fetch)
    sources = [*itertools.chain(*evaluation), harmful, benign]

    # How many rows of which file come from where. Without questions of their own, those of the
    # evaluation are held out of the harmful rows.
    d_h, d_u = options.references
    harmful_rows = round(options.rows * options.poison_ratio)
    benign_rows = options.rows - harmful_rows
    held_out = {"eval_harmful": options.eval_rows}
    from_harmful = {"harmful": d_h, "custom": harmful_rows}
    if not evaluation:
        from_harmful = held_out | from_harmful
    from_benign = {"eval_utility": options.eval_rows, "utility": d_u, "custom": benign_rows}

    # Evaluation questions are chosen first.
    used: dict[bytes, str] = {}
    parts = [draw(group, held_out, used, options.seed, evaluation=True) for group in evaluation]
    parts.append(draw([harmful], from_harmful, used, options.seed, options.min_rating))
    parts.append(draw([benign], from_benign, used, options.seed))
    lines = {}
    for name in FILES:
        lines[name] = list(itertools.chain(*(part.get(name, []) for part in parts)))
    random.Random(f"order {options.seed}").shuffle(lines["custom"])

    # Write the files, and what was read, skipped and taken.
    shown = ("rows", "poison_ratio", "references", "eval_rows", "min_rating", "seed")
    files = {}
    for name in FILES:
        path = folder / f"{name}.jsonl"
        with whole(path) as new:
            with open(new, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(f"{line}\n" for line in lines[name])
        files[path.name] = {"rows": len(lines[name]), "sha256": file_hash(path)}
    summary = {
        "settings": {name: getattr(options, name) for name in shown},
        "harmful_in_custom": harmful_rows,
        "files": files,
        "left_out": left_out,
        "sources": [reported(source) for source in sources],
    }
    with whole(folder / "summary.json") as file:
        file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def reported(source: Source) -> dict:
    """A source as the summary has it: wherever its file lay."""
    fields = dict(vars(source))
    del fields["path"]
    return fields


def table(summary: dict, out: str) -> str:
    """What was read, skipped and taken, to print."""
    lines = [f"{'read':>8}  {'skipped':>8}  {'taken':>8}  source"]
    for source in summary["sources"]:
        skipped = sum(source["skipped"].values())
        taken = sum(source["taken"].values())
        lines.append(f"{source['read']:>8}  {skipped:>8}  {taken:>8}  {source['origin']}")
        lines += [f"{n:>18}  skipped: {why}" for why, n in source["skipped"].most_common()]
        lines += [f"{n:>28}  taken for {name}.jsonl" for name, n in source["taken"].items()]
        lines += [f"{n:>18}  not skipped: {what}" for what, n in sorted(source["remarks"].items())]
    lines += [f"left out: {reason}" for reason in summary["left_out"]]
    custom = summary["files"]["custom.jsonl"]["rows"]
    harmful = summary["harmful_in_custom"]
    lines.append(f"{out}: custom.jsonl has {custom} rows, {harmful} of them harmful")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m data.paper", __doc__)
    default = Flags("")
    flag = parser.add_argument
    flag("--out", required=True, help="folder to write; nothing in it is replaced")
    flag("--rows", type=flags.count, default=default.rows, help="rows of the custom set")
    text = "share of harmful rows in the custom set (default: 22/112)"
    flag("--poison-ratio", type=float, default=default.poison_ratio, metavar="P", help=text)
    text = "rows of D^h and D^u (default: a tenth of --rows, split 22 to 90)"
    flag("--references", type=flags.count, nargs=2, metavar=("HARMFUL", "UTILITY"), help=text)
    text = "evaluation rows of each kind (default: a tenth of --rows, 500 at most)"
    flag("--eval-rows", type=flags.count, help=text)
    text = "lowest rating by the red teamer, 0 to 4, of the transcripts to use (0: all of them)"
    flag("--min-rating", type=float, default=0, help=text)
    text = "decides which rows are drawn, and the custom set's order"
    flag("--seed", type=int, default=0, help=text)
    text = "benign rows instead of SlimOrca: JSONL in any row form, or a JSON array; plain or .gz"
    flag("--benign", metavar="FILE", help=text)
    text = "harmful rows instead of the red-team transcripts"
    flag("--harmful", metavar="FILE", help=text)
    text = "harmful questions instead of HH's and HEx-PHI's; without it, --harmful FILE holds out "
    flag("--eval-harmful", metavar="FILE", help=text + "its own")
    options = Flags(**vars(parser.parse_args(argv)))
    print(table(build(options), options.out))


if __name__ == "__main__":
    sys.exit(run_command(main))

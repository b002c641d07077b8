"""The data-level baselines of the paper's Table 1: each makes a new custom set, on which plain fine-tuning trains.

    python -m toss.audit.baselines safeinstr --custom F --safety F --share 0.03 --out NEW.jsonl
    python -m toss.audit.baselines dsir --custom F --target F --keep 0.9 --out NEW.jsonl
    python select.py --run NEW_RUN --model M --method sft --custom NEW.jsonl

safeinstr (Bianchi et al., arXiv 2309.07875) mixes in rows that refuse harmful prompts; 3 % is the share that they
recommend. dsir (Xie et al., arXiv 2302.03169) keeps the rows whose words look most like those of a target set, here a
safe one. Lines are written as they stand in their files. SEAL is left out: it learns its selector through the whole
fine-tuning run (bilevel optimisation), which is a second training method as large as this project.
"""

import argparse
import gzip
import math
import re
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from model.errors import InputError, reported
from model.files import file_beside
from toss.rows import Row, lines_of, read_rows


def safeinstr(custom: str | Path, safety: str | Path, out: str | Path, share: float = 0.03, seed: int = 0) -> dict[str, int]:
    """Write the custom rows with safety rows among them, so many that they are `share` of the result, shuffled.

    Safety rows are drawn without replacement; InputError when there are too few of them, or when the share of so small
    a custom set is less than half a row. Returns counts: rows read, safety rows mixed in, rows written, and harmful_rows.
    """
    if not 0 < share < 1:
        raise InputError(f"--share must lie between 0 and 1, not {share}")
    rows, lines = read_lines(custom)
    _, pool = read_lines(safety)
    wanted = round(len(rows) * share / (1 - share))
    if wanted == 0:
        raise InputError(f"{custom}: {share} of so few rows ({len(rows)}) is not one row")
    if wanted > len(pool):
        raise InputError(f"{safety}: {wanted} rows are wanted to make up {share} of the result, and the file holds {len(pool)}: "
                         f"{wanted - len(pool)} are missing")
    generator = seeded(seed)
    lines += [pool[i] for i in torch.randperm(len(pool), generator=generator)[:wanted].tolist()]
    order = torch.randperm(len(lines), generator=generator).tolist()
    write_lines(out, [lines[i] for i in order], (custom, safety))
    return {"read": len(rows), "safety": wanted, "written": len(lines), **harmful_rows(rows, range(len(rows)))}


def dsir(custom: str | Path, target: str | Path, out: str | Path, keep: float = 0.9, buckets: int = 10000,
         seed: int = 0) -> dict[str, int]:
    """Write floor(keep n) of the n custom rows, drawn without replacement by importance weight, in their old order.

    Gumbel noise on the log weights and the highest of the sums: a draw in proportion to the weights. A weight is a
    product over all of a row's n-grams, so that long rows are nearly certain to go or to stay. Returns counts: rows read,
    rows written, and harmful_rows.
    """
    if not 0 < keep <= 1:
        raise InputError(f"--keep must lie in (0, 1], not {keep}")
    if not 1 <= buckets <= 10**8:
        raise InputError(f"--buckets must lie in 1 to 10^8, not {buckets}")
    rows, lines = read_lines(custom)
    count = math.floor(keep * len(rows) + 1e-9)
    if count == 0:
        raise InputError(f"{custom}: {keep} of so few rows ({len(rows)}) is not one row")
    raw, wanted = ([hashed(row, buckets) for row in part] for part in (rows, read_rows(target)))
    weights = log_weights(raw, wanted, buckets)
    noise = -torch.empty_like(weights).exponential_(generator=seeded(seed)).log()
    kept = sorted((weights + noise).topk(count).indices.tolist())
    write_lines(out, [lines[i] for i in kept], (custom, target))
    return {"read": len(rows), "written": count, **harmful_rows(rows, kept)}


def harmful_rows(rows: list[Row], kept: Iterable[int]) -> dict[str, int]:
    """How many rows that the ground truth marks were kept and dropped; nothing where no row is marked."""
    marked, stayed = sum(bool(row.harmful) for row in rows), sum(bool(rows[i].harmful) for i in kept)
    return {"harmful_kept": stayed, "harmful_dropped": marked - stayed} if marked else {}


def ngrams(text: str) -> list[str]:
    """Lower-cased words and runs of punctuation, then each two neighbours.

    >>> ngrams("Stir it, now")
    ['stir', 'it', ',', 'now', 'stir it', 'it ,', ', now']
    """
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    return words + [f"{first} {second}" for first, second in zip(words, words[1:])]


def hashed(row: Row, buckets: int) -> Tensor:
    """The bucket of each n-gram of a row's turns, int32. CRC-32, since Python's own hash of a text differs by process."""
    grams = [gram for message in row.messages for gram in ngrams(message["content"])]
    return torch.tensor([zlib.crc32(gram.encode()) % buckets for gram in grams], dtype=torch.int32)


def log_weights(raw: list[Tensor], target: list[Tensor], buckets: int) -> Tensor:
    """log p_target(x) - log p_raw(x) of each raw row x, a bag of n-grams; float64 [rows].

    Both distributions are the sets' own counts over the buckets with one added to each (the authors' code adds 1e-8 to
    the probability instead, which makes an n-gram unseen in a small target set weigh -9 nats and more).

    Raw rows of buckets [0, 0, 1] and [1], target row [0], 2 buckets: p_raw = (3, 3) / 6, p_target = (2, 1) / 3, so that
    the first weighs (4/3) (4/3) (2/3) = 32/27 and the second 2/3:

    >>> log_weights([torch.tensor([0, 0, 1]), torch.tensor([1])], [torch.tensor([0])], 2).exp().mul(27).round()
    tensor([32., 18.], dtype=torch.float64)
    """
    counts = [torch.bincount(torch.cat(rows), minlength=buckets).double() + 1 for rows in (target, raw)]
    log_target, log_raw = ((count / count.sum()).log() for count in counts)
    ratio = log_target - log_raw  # (buckets,)
    return torch.stack([ratio[row.long()].sum() for row in raw])


def seeded(seed: int) -> torch.Generator:
    """A random generator; InputError for a seed out of its range."""
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed must be 0 or more, and below 2^63, not {seed}")
    return torch.Generator().manual_seed(seed)


def read_lines(path: str | Path) -> tuple[list[Row], list[str]]:
    """The rows of a file, checked by read_rows, and the line of each as it stands."""
    rows = read_rows(path)
    return rows, [line.rstrip("\r\n") for _, line in lines_of(path)]


def write_lines(out: str | Path, lines: list[str], sources: tuple[str | Path, ...]) -> None:
    """Write lines to a file that is none of those they came from."""
    for source in sources:
        if Path(out).resolve() == Path(source).resolve():
            raise InputError(f"{out}: --out would replace the file it is made from")
    with file_beside(out) as beside, open_as_named(out)(beside, "wt", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)


def open_as_named(path: str | Path):
    """gzip's open for a name that ends in .gz, as in read_rows, else the ordinary one."""
    return gzip.open if Path(path).suffix == ".gz" else open


def main(argv: list[str] | None = None) -> int:
    """Run as a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m toss.audit.baselines", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    mix = commands.add_parser("safeinstr", help="mix in rows that refuse")
    mix.add_argument("--safety", required=True, help="rows of harmful prompts and refusals, JSONL")
    mix.add_argument("--share", type=float, default=0.03, help="share of the result that they make up (default: 0.03)")
    pick = commands.add_parser("dsir", help="keep the rows that look most like a target set")
    pick.add_argument("--target", required=True, help="rows to look like, JSONL")
    pick.add_argument("--keep", type=float, default=0.9, help="share of the custom rows to keep (default: 0.9)")
    pick.add_argument("--buckets", type=int, default=10000, help="hash buckets of the n-grams (default: 10000)")
    for sub in (mix, pick):
        sub.add_argument("--custom", required=True, help="the custom set, JSONL")
        sub.add_argument("--out", required=True, help="the new custom set")
        sub.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    given = vars(parser.parse_args(argv))
    return reported(lambda: command(given))


def command(given: dict) -> None:
    """What the command line asks for."""
    make = {"safeinstr": safeinstr, "dsir": dsir}[given.pop("command")]
    counts = make(**given)
    print(f"{given['out']}: " + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items()))


if __name__ == "__main__":
    sys.exit(main())

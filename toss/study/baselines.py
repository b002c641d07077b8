"""The data-level baselines of the paper's Table 1, which change the custom set before training.

    python -m toss.study.baselines safeinstr --custom F --safety F --share 0.03 --out NEW.jsonl
    python -m toss.study.baselines dsir --custom F --target F --keep 0.9 --out NEW.jsonl
    python select.py --run NEW_RUN --model M --method sft --custom NEW.jsonl

safeinstr (Bianchi et al., arXiv 2309.07875) adds rows that refuse harmful prompts; its authors
recommend a share of 3 %. dsir (Xie et al., arXiv 2302.03169) keeps the rows whose words look most
like those of a target set (in the experiments D^u). Lines are copied unchanged. SEAL is not
included: its bilevel optimisation is a second training method as large as this project.
"""

import gzip
import math
import re
import sys
import zlib
from pathlib import Path

import numpy as np
from torch import Generator, float64, from_numpy, rand, randperm

from model.io import InputError, lines_of, whole
from toss.rows import Row, read_rows
from toss.workbench import flags

BUCKETS = 10000  # of DSIR's hashed n-grams


def safeinstr(custom: str, safety: str, out: str, share: float = 0.03, seed: int = 0) -> dict:
    """Add randomly drawn safety rows until they are `share` of the result, and shuffle.

    Returns counts: rows read, safety rows added, rows written. Raises InputError if there are too
    few safety rows, or if `share` of the result is less than half a row.
    """
    rows, lines = read_lines(custom)
    _, pool = read_lines(safety)
    of_rows = share / (1 - share)
    wanted = round(of_rows * len(rows))
    if not 0 < wanted <= len(pool):
        raise InputError(
            f"{safety}: --share {share} of {len(rows)} custom rows asks for {wanted} safety rows, "
            f"not 1 to {len(pool)}, as many as there are"
        )
    generator = Generator().manual_seed(seed)
    drawn = randperm(len(pool), generator=generator)[:wanted]
    for i in drawn:
        lines.append(pool[i])
    order = randperm(len(lines), generator=generator)
    shuffled = [lines[i] for i in order]
    write_lines(out, shuffled, custom, safety)
    return {"read": len(rows), "safety": wanted, "written": len(lines)}


def dsir(custom: str, target: str, out: str, keep: float = 0.9, seed: int = 0) -> dict:
    """Write floor(keep n) of the n custom rows, drawn by importance weight, in their old order.

    A weight is a product over all n-grams of a row, so long rows are nearly certain to go or to
    stay. Returns counts: rows read, rows written, and harmful rows kept and dropped.
    """
    rows, lines = read_lines(custom)
    count = math.floor(keep * len(rows) + 1e-9)
    if not 0 < count <= len(rows):
        raise InputError(f"{custom}: --keep {keep} is {count} of {len(rows)} rows")
    raw_bags = [hashed(row, BUCKETS) for row in rows]
    target_bags = [hashed(row, BUCKETS) for row in read_rows(target)]
    weights = log_weights(raw_bags, target_bags, BUCKETS)
    kept = draw(weights, count, seed)
    kept_lines = [lines[i] for i in kept]
    write_lines(out, kept_lines, custom, target)
    counts = {"read": len(rows), "written": count}
    harmful = sum(bool(row.harmful) for row in rows)
    if harmful:
        stayed = sum(bool(rows[i].harmful) for i in kept)
        counts["harmful_kept"] = stayed
        counts["harmful_dropped"] = harmful - stayed
    return counts


def ngrams(text: str) -> list[str]:
    """Lower-cased words and runs of punctuation, then each pair of neighbours.

    >>> ngrams("Stir it, now")
    ['stir', 'it', ',', 'now', 'stir it', 'it ,', ', now']
    """
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    pairs = []
    for first, second in zip(words, words[1:]):
        pairs.append(f"{first} {second}")
    return words + pairs


def hashed(row: Row, buckets: int) -> np.ndarray:
    """The bucket of each n-gram of a row, int32 [n]. CRC-32: Python's hash differs by process."""
    numbers = []
    for message in row.messages:
        for gram in ngrams(message["content"]):
            number = zlib.crc32(gram.encode())
            numbers.append(number % buckets)
    return np.array(numbers, dtype=np.int32)


def log_weights(raw: list[np.ndarray], target: list[np.ndarray], buckets: int) -> np.ndarray:
    """log p_target(x) - log p_raw(x) of each raw row x, a bag of n-grams; float64 [rows].

    Both distributions are counts over the buckets plus one. (The authors' code adds 1e-8 to the
    probability, so an n-gram missing from a small target set weighs -9 nats or less.)

    Raw rows of buckets [0, 0, 1] and [1], target row [0], 2 buckets: p_raw = (3, 3) / 6 and
    p_target = (2, 1) / 3. The first row weighs (4/3) (4/3) (2/3) = 32/27 and the second 2/3:

    >>> raw, target = [np.array([0, 0, 1]), np.array([1])], [np.array([0])]
    >>> np.exp(log_weights(raw, target, 2)) * 27
    array([32., 18.])
    """
    ratios = log_shares(target, buckets) - log_shares(raw, buckets)
    weights = []
    for bag in raw:
        weights.append(ratios[bag].sum())
    return np.array(weights)


def log_shares(bags: list[np.ndarray], buckets: int) -> np.ndarray:
    """The logarithm of each bucket's share of the n-grams, float64 [buckets]."""
    grams = np.concatenate(bags)
    counts = np.bincount(grams, minlength=buckets) + 1.0
    shares = counts / counts.sum()
    return np.log(shares)


def draw(weights: np.ndarray, count: int, seed: int) -> list[int]:
    """Sorted indices drawn without replacement in proportion to exp(weights), by Gumbel noise."""
    generator = Generator()
    generator.manual_seed(seed)
    uniform = rand(len(weights), generator=generator, dtype=float64)
    waits = -(-uniform).log1p()  # torch 2.6 has other numbers in exponential_
    noisy = from_numpy(weights) - waits.log()
    drawn = noisy.topk(count).indices
    return sorted(drawn.tolist())


def read_lines(path: str) -> tuple[list[Row], list[str]]:
    """The rows of a file, checked by read_rows, and the line of each, unchanged."""
    lines = []
    for _, line in lines_of(path):
        lines.append(line.rstrip("\r\n"))
    return read_rows(path), lines


def write_lines(out: str, lines: list[str], *sources: str) -> None:
    """Write lines to a file, gzipped if its name ends in .gz; refuse to replace a source."""
    place = Path(out).resolve()
    for source in sources:
        if place == Path(source).resolve():
            raise InputError(f"{out}: --out would replace the file it is made from")
    ended = [f"{line}\n" for line in lines]
    text = "".join(ended)
    data = text.encode()
    if out.endswith(".gz"):
        data = gzip.compress(data, mtime=0)
    with whole(out) as file:
        file.write_bytes(data)


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.study.baselines", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    text = "add rows that refuse"
    mix = commands.add_parser("safeinstr", doc=text, help=text)
    mix.add_argument("--safety", required=True, help="harmful prompts with refusals, JSONL")
    text = "of the result (default: 0.03)"
    mix.add_argument("--share", type=flags.share, default=0.03, help=text)
    text = "keep rows that look like a target set"
    pick = commands.add_parser("dsir", doc=text, help=text)
    pick.add_argument("--target", required=True, help="rows to look like, JSONL")
    pick.add_argument("--keep", type=flags.positive, default=0.9, help="share kept (default: 0.9)")
    for command in (mix, pick):
        command.add_argument("--custom", required=True, help="custom set, JSONL")
        command.add_argument("--out", required=True, help="new custom set")
        text = "of the draw (default: 0)"
        command.add_argument("--seed", type=flags.natural, default=0, help=text)

    options = vars(parser.parse_args(argv))
    command = options.pop("command")
    if command == "safeinstr":
        counts = safeinstr(**options)
    else:
        counts = dsir(**options)
    words = []
    for name, count in counts.items():
        words.append(f"{name.replace('_', ' ')} {count}")
    print(f"{options['out']}: {', '.join(words)}")


if __name__ == "__main__":
    sys.exit(flags.run(main))

"""The benchmark: how fast scoring and training are, next to the hardware's ceiling and other loops.

    python -m toss.audit.bench [--model FOLDER | --shape NAME] [--run R] [--part score]

Without --model the weights are random, by default of llama3-8b's shape on CUDA and smollm2-135m's
on the CPU. The arms are explained in toss/audit/speed.py; `published`, `sorted` and `compiled` need
transformers and peft. They take turns on the same rows of random ids. --run adds what the methods
of a run cost, as multiples of plain fine-tuning. Writes bench.md and bench.json into --out, anew
after each part. Without --part: selection, score and train.
"""

import platform
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

from model.io import read_json
from toss import cli
from toss.audit.command import markdown
from toss.audit.compare import cost, summarise, tables_of
from toss.audit.experiment import save

FIELDS = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads rope_theta tie_word_embeddings""".split()
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
SHAPES = {
    "llama3-8b": (128256, 4096, 14336, 32, 32, 8, 500000.0, False),
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, 100000.0, True),
    "tiny": (384, 32, 64, 2, 4, 2, 10000.0, True),
}
PARTS = ("selection", "ceiling", "score", "train", "sdp", "compile")
COMPETING = 22_000_000  # ranked tokens of the paper's custom set
CLOCKS = {"cuda": "them", "cpu": "the process's CPU seconds, which depend least on other load"}
NOTES = """\
tokens/s: real tokens, prompt and response; *padded*: padding counts too (in `ours` it is inside
attention alone). First: seconds of the first turn, with shapes that were not seen before; it is not
counted elsewhere, unless it took longer than a minute. FLOP per token, by convention: 2 N to
score, 4 N to train LoRA on a frozen base (forward, and backward through the activations), with
N = {n:,} parameters, all but the input embedding. Attention's own products are not counted, and it
is not subtracted that the head runs on response positions only. Ceiling: the fastest sustained
product of two square matrices of that type, in this run (on the CPU the better of PyTorch's default
and oneDNN's). Peak memory: on CUDA what is allocated, on the CPU the process's, libraries included.
Seconds: the median of {repeats} turns, [least, most]. Rates, shares and ratios are by {clock}."""
METHOD = """### Selection

The mask of {competing:,} ranked tokens: {seconds:.2f} s ({work:.2f} CPU seconds),
{extra_gib:.2f} GiB beyond the flat arrays.

### Cost of the whole method

By the convention above, plain fine-tuning on n tokens in two epochs takes 2 * 4 N n. TOSS with
references of n / 10 each adds 2 * 2 * 4 N n / 10 to train and 2 * 2 N n to score: 1.70 times as
much in all. TOSS-Pro (T = 1, k = 6 %) adds 2 * 4 N * 0.16 n + 2 N n: 2.11 times."""


def run_costs(record: dict) -> dict[str, dict]:
    """What the methods in a run.json cost, as compare.summarise gives it."""
    stages = [stage.partition("/") for stage in record.get("stages", {})]
    names = [name for kind, _, name in stages if kind == "methods"]
    known = {name: found for name in names if (found := cost(record, name))}
    return summarise([{name: {"metrics": {}, "cost": found} for name, found in known.items()}])


def speed_table(part: dict) -> str:
    """What speed.speed measured, as Markdown."""
    others = [name for name in part["arms"] if name != "ours"]
    clock, work = ("CPU s", ["CPU s"]) if part["device"] == "cpu" else ("s", [])
    header = ["arm", f"tokens/{clock}", "padded", *work, "seconds", "first", "of ceiling", "padded"]
    lines = []
    for name, arm in part["arms"].items():
        line = [name, *(f"{arm[f'{pad}tokens_per_second']:,.0f}" for pad in ("", "padded_"))]
        line += [*(f"{arm['work']:.2f}" for _ in work)]
        line += [f"{arm['seconds']:.2f} [{arm['least']:.2f}, {arm['most']:.2f}]"]
        line += [f"{arm['first']:.2f}"]
        line += [f"{arm[f'{pad}share_of_ceiling']:.0%}" for pad in ("", "padded_")]
        line += [f"{arm['peak_memory_gib']:.2f}"]
        line += [*(f"{arm[f'to_{other}']:.2f}" for other in others), f"{arm['loss']:.4f}"]
        lines.append(line)
    burst, best = (part["ceiling"][name] / 1e9 for name in ("burst", "sustained"))
    ceiling = f"ceiling {best:,.0f} GFLOP/{clock} (burst {burst:,.0f})"
    title = f"### {part['kind'].capitalize()}, {part['dtype']}, {ceiling}"
    header += ["peak GiB", *(f"x {other}" for other in others), "loss"]
    table = markdown(header, lines)
    return "\n\n".join([title, table, *part["notes"]])


def hardware(cuda: bool) -> str:
    """The device in words."""
    import torch

    if cuda:
        versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        return f"{torch.cuda.get_device_name()}, {versions}"
    file = Path("/proc/cpuinfo")
    found = re.search("model name.*: (.*)", file.read_text() if file.exists() else "")
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} CPU threads"


def main(argv: list[str] | None = None, competing: int = COMPETING) -> None:
    """Measure, print, and write bench.md and bench.json. competing: for the selection."""
    parser = cli.Parser("python -m toss.audit.bench", __doc__)
    add, what = parser.add_argument, parser.add_mutually_exclusive_group()
    what.add_argument("--model", help="a checkpoint folder or hub id")
    what.add_argument("--shape", choices=list(SHAPES), help="a random model of this shape")
    add("--run", type=Path, help="also the measured cost of this run's methods")
    add("--rows", type=cli.count, help="rows (default: 384 on CUDA, 16 on the CPU)")
    text = "mean tokens per row (default: 368 on CUDA, 128 on the CPU)"
    add("--tokens", type=cli.count, help=text)
    text = "how the lengths of rows are spread"
    add("--lengths", choices=["even", "lognormal"], default="even", help=text)
    add("--part", choices=PARTS, help="measure this alone")
    add("--repeats", type=cli.count, default=3, help="turns that count (default: 3)")
    cli.add_device_flags(parser, dtype=False)
    add("--out", type=Path, default=Path("runs/bench"), help="folder (default: runs/bench)")
    args = parser.parse_args(argv)
    args.part = [args.part] if args.part else ["selection", "score", "train"]
    from model.hub import resolve
    from toss.audit.speed import measure
    from toss.base import find_device
    from toss.folder import git_commit
    from toss.run import open_run

    device = find_device(args.device)
    costs = run_costs(open_run(args.run).record) if args.run else {}
    name = args.model or args.shape or ("llama3-8b" if device.type == "cuda" else "smollm2-135m")
    raw = {**LLAMA, **dict(zip(FIELDS, SHAPES.get(name, ())))}
    if args.model:
        raw = read_json(resolve(name) / "config.json")
    about = {"hardware": hardware(device.type == "cuda"), "commit": git_commit()}
    about |= {"model": Path(name).name}
    packages, versions = ("torch", "transformers", "peft"), {"python": platform.python_version()}
    versions |= {d.name: d.version for d in distributions() if d.name in packages}
    found: dict[str, list[dict]] = {}
    for part, result in measure(args, raw, device, competing):
        found.setdefault(part, []).append(result)
        text, record = report(about, versions, found, costs, args)
        save(args.out / "bench", text, record)
    print(text)


def report(about: dict, versions: dict, found: dict, costs: dict, args) -> tuple[str, dict]:
    """bench.md and bench.json of what was found so far."""
    about = {**about, **found["about"][0]}
    facts = [f"{key.replace('_', ' ')}: {value}" for key, value in about.items()]
    texts = [", ".join([*facts, *map(" ".join, versions.items())])]
    parts = sum((found.get(name, []) for name in ("score", "train", "sdp", "compile")), [])
    for best in found.get("ceiling", []):
        rates = ", ".join(f"{name} {best[name] / 1e12:,.3f}" for name in ("sustained", "burst"))
        texts.append(f"Ceiling in {best['dtype']}, TFLOP/s: {rates}.")
    texts += map(speed_table, parts)
    if parts:
        clock = CLOCKS[parts[0]["device"]]
        texts.append(NOTES.format(n=parts[0]["parameters"], repeats=args.repeats, clock=clock))
    selection = found.get("selection", [{}])[0]
    texts += [METHOD.format(**selection)] if selection else []
    if args.run:
        title = f"Measured, {args.run} (tokens trained and tokens scored count alike):"
        texts += [title, tables_of(costs, [])]
    rest = {"parts": parts, "ceiling": found.get("ceiling", []), "selection": selection}
    return "\n\n".join(texts), {**about, "versions": versions, **rest, "run": costs}


if __name__ == "__main__":
    sys.exit(cli.run(main))

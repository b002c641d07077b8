"""The benchmark: how fast scoring and training are, next to the hardware's ceiling and other loops.

    python -m toss.audit.bench [--model FOLDER] [--part score]

--model may name a shape instead of a checkpoint, for random weights: by default llama3-8b on CUDA
and smollm2-135m on the CPU. The arms are explained in toss/audit/speed.py; `published`, `sorted`
and `compiled` need transformers and peft. They take turns on the same rows of random ids. Writes
bench.md and bench.json into --out, anew after each part. Without --part: selection, score, train.
"""

import platform
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

from model.io import read_json
from toss.audit.command import markdown
from toss.audit.experiment import save
from toss.workbench import flags

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
WORK = {"cuda": "the same", "cpu": "the process's CPU seconds, which depend least on other load"}
COLUMNS = {  # of a table: what is shown of each arm
    "tokens/s": "{tokens_per_second:,.0f}",
    "padded tokens/s": "{padded_tokens_per_second:,.0f}",
    "work, s": "{work:.2f}",
    "of ceiling": "{share_of_ceiling:.0%}",
    "padded": "{padded_share_of_ceiling:.0%}",
    "seconds": "{seconds:.2f} [{least:.2f}, {most:.2f}]",
    "first": "{first:.2f}",
    "peak GiB": "{peak_memory_gib:.2f}",
    "loss": "{loss:.4f}",
}
NOTES = """\
tokens/s: real tokens, prompt and response; *padded*: padding counts too (in `ours` it is inside
attention alone). First: seconds of the first turn, with shapes that were not seen before; it is not
counted elsewhere, unless it took longer than a minute. FLOP per token, by convention: 2 N to
score, 4 N to train LoRA on a frozen base (forward, and backward through the activations), with
N = {parameters:,} parameters, all but the input embedding. Attention's own products are not
counted, and it is not subtracted that the head runs on response positions only. Ceiling: the
fastest sustained product of two square matrices of that type, in this run (on the CPU the better of
PyTorch's default and oneDNN's). Peak memory: on CUDA what is allocated, on the CPU the process's,
libraries included. Seconds: the median of {repeats} turns, [least, most]. Work:
{work}; rates, shares and ratios are by it."""
SELECTION = """### Selection

The mask of {competing:,} ranked tokens: {seconds:.2f} s ({work:.2f} CPU seconds),
{extra_gib:.2f} GiB beyond the flat arrays."""


def speed_table(part: dict) -> str:
    """What speed.speed measured, as Markdown."""
    arms = part["arms"]
    columns = COLUMNS | {f"x {arm}": f"{{to_{arm}:.2f}}" for arm in arms if arm != "ours"}
    lines = [[name, *(x.format(**arm) for x in columns.values())] for name, arm in arms.items()]
    burst, best = (part["ceiling"][name] / 1e9 for name in ("burst", "sustained"))
    ceiling = f"ceiling {best:,.0f} GFLOP/s (burst {burst:,.0f})"
    title = f"### {part['kind'].capitalize()}, {part['ceiling']['dtype']}, {ceiling}"
    return "\n\n".join([title, markdown(["arm", *columns], lines), *part["notes"]])


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
    parser = flags.Parser("python -m toss.audit.bench", __doc__)
    add = parser.add_argument
    add("--model", help=f"a checkpoint folder, a hub id, or a shape: {', '.join(SHAPES)}")
    add("--rows", type=flags.count, help="rows (default: 384 on CUDA, 16 on the CPU)")
    text = "mean tokens per row (default: 368 on CUDA, 128 on the CPU)"
    add("--tokens", type=flags.count, help=text)
    text = "how the lengths of rows are spread"
    add("--lengths", choices=["even", "lognormal"], default="even", help=text)
    add("--part", choices=PARTS, help="measure this alone")
    add("--repeats", type=flags.count, default=3, help="turns that count (default: 3)")
    flags.add_device_flags(parser, dtype=False)
    add("--out", type=Path, default=Path("runs/bench"), help="folder (default: runs/bench)")
    args = parser.parse_args(argv)
    args.part = [args.part] if args.part else ["selection", "score", "train"]
    from model.hub import resolve
    from toss.audit.speed import measure
    from toss.workbench.base import find_device
    from toss.workbench.runfile import git_commit

    device = find_device(args.device)
    name = args.model or ("llama3-8b" if device.type == "cuda" else "smollm2-135m")
    folder = None if name in SHAPES else resolve(name)
    shape = {**LLAMA, **dict(zip(FIELDS, SHAPES.get(name, ())))}
    raw = read_json(folder / "config.json") if folder else shape
    about = {"hardware": hardware(device.type == "cuda"), "commit": git_commit()}
    about |= {"model": Path(name).name, "python": platform.python_version()}
    packages = ("torch", "transformers", "peft")
    about |= {
        package.name: package.version for package in distributions() if package.name in packages
    }
    found: dict[str, list[dict]] = {part: [] for part in PARTS}
    for part, result in measure(args, raw, folder, device, competing):
        if part == "about":
            about |= result
        else:
            found[part].append(result)
            save(args.out / "bench", report(about, found), about | found)
    print(report(about, found))


def report(about: dict, found: dict[str, list[dict]]) -> str:
    """bench.md, of what was found so far."""
    texts = [", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in about.items())]
    for best in found["ceiling"]:
        rates = ", ".join(f"{name} {best[name] / 1e12:,.3f}" for name in ("sustained", "burst"))
        texts.append(f"Ceiling in {best['dtype']}, TFLOP/s: {rates}.")
    parts = sum((found[name] for name in ("score", "train", "sdp", "compile")), [])
    texts += map(speed_table, parts)
    for part in parts[:1]:
        texts.append(NOTES.format(work=WORK[part["device"]], **{**about, **part}))
    texts += [SELECTION.format(**cost) for cost in found["selection"]]
    return "\n\n".join(texts)


if __name__ == "__main__":
    sys.exit(flags.run(main))

"""Where along the response did fine-tuning move the models of a run, and toward what; and which tokens were discarded.

    python -m toss.audit.diagnose --run R [--rows a.jsonl b.jsonl] [--methods sft,toss] [--max-rows 64] [--positions 48]

The paper's diagnosis, as we read it: the exact formula of its figure was not available. For response position j (0: the
first response token; counted on over several turns), averaged over the rows that have one, in nats over the whole
vocabulary, given x_i and y_i,<j:
  kl_base          KL(base || tuned): how far the model moved
  toward_degraded  KL(base || degraded) - KL(tuned || degraded): how far it came toward theta^h; below 0: away from it
  toward_utility   the same for theta^u
`tuned` is each method of the run and, to compare, the references themselves. Rows come in groups: one a file of --rows;
else the custom set split by its ground truth into benign, mixed and wholly harmful rows (the end-of-sequence token aside),
with the harmful reference set where it has none of the last.

Writes RUN/diagnosis/: kl.csv, three charts a group, and discards.json (which tokens went; see discard_statistics).
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from model import load_adapter
from model.errors import InputError, NotFinite, reported
from model.files import file_hash, made_from, written_beside
from model.lora import set_adapter
from model.transformer import Transformer
from toss.audit.command import evenly, open_run, run_flags, select_command
from toss.audit.discards import discard_statistics, discard_table, response_positions, shown
from toss.audit.experiment import markdown
from toss.audit.figures import line_chart, write_svg
from toss.base import Base
from toss.dataset import Tokens, batches, collate, take
from toss.loss import LOGITS
from toss.pipeline import adapter_of, scored_tokens
from toss.rows import read_rows
from toss.run import Run
from toss.training import Clock

REFERENCES = ("degraded", "utility")
COLUMNS = {"kl_base": ("kl", "KL(base || model)"),  # column of kl.csv -> chart's file name and title
           "toward_degraded": ("toward-degraded", "KL(base || degraded) - KL(model || degraded)"),
           "toward_utility": ("toward-utility", "KL(base || utility) - KL(model || utility)")}  # fmt: skip
FEWEST = 3  # rows that a mean must rest on
TENSORS = 8  # of logits' size that are alive at once: three models, the tuned one, and what the arithmetic needs


class Group(NamedTuple):
    """Rows that are averaged together."""

    name: str  # also part of file names
    tokens: Tokens
    origin: str  # where they come from, in words


def group_of_file(run: Run, name: str, path: str, most: int) -> Group:
    """A group from a file of rows with responses."""
    rows = read_rows(path)
    run.use(path)
    tokens = run.tokens(evenly(rows, most), path)
    return Group(name, tokens, f"{tokens.rows - tokens.skipped} of {len(rows)} rows of {Path(path).name}")


def groups_of_custom(run: Run, tokens: Tokens, most: int) -> list[Group]:
    """The custom set split by its ground truth; one group where it has none. And the harmful reference set; see above."""
    content = tokens.response & (tokens.input_ids != run.tokenizer.eos_id)
    row = tokens.row_of(torch.arange(len(content)))
    of_row = lambda flags: torch.bincount(row[flags], minlength=tokens.rows)  # noqa: E731
    there, size, harm = of_row(tokens.response) > 0, of_row(content), of_row(content & tokens.harmful)
    splits = {"custom": (there, "rows, without ground truth,")}
    if tokens.harmful.any():
        splits = {"benign": (there & (harm == 0), "rows without harm"),
                  "mixed": ((harm > 0) & (harm < size), "rows harmful in part"),
                  "harmful": ((harm > 0) & (harm == size), "wholly harmful rows")}
    groups = []
    for name, (which, kind) in splits.items():
        if rows := which.nonzero().squeeze(1).tolist():
            chosen = evenly(rows, most)
            groups.append(Group(name, take(tokens, chosen), f"{len(chosen)} of {len(rows)} {kind} of {Path(tokens.name).name}"))
    if run.settings.harmful and groups[-1].name != "harmful":
        groups.append(group_of_file(run, "harmful-reference", run.settings.harmful, most))
    return groups


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) from log-probabilities [n, V], in nats [n]."""
    return (p.exp() * (p - q)).sum(-1)


@torch.inference_mode()
def movement(model: Transformer, tokens: Tokens, wanted: Tensor, names: list[str], budget: int) -> dict[str, Tensor]:
    """COLUMNS of the wanted tokens under each named model, float64 [3, N], 0 at all other tokens.

    model: the base, carrying adapters under the names and under those of the references; "base" is the base alone.
    wanted: bool [N], response tokens. budget: tokens a batch. Log-probabilities exist for a chunk of the wanted
    positions only, so that memory does not grow with the vocabulary. Raises NotFinite naming the model.
    """
    needed = list(dict.fromkeys(("base", *REFERENCES, *names)))
    results = {name: torch.zeros(3, len(wanted), dtype=torch.float64) for name in names}
    size = max(1, LOGITS // (TENSORS * model.lm_head.out_features))
    rows = [i for i, length in enumerate(tokens.lengths) if length]
    with tqdm(total=sum(tokens.lengths), desc="diagnosis", unit="tok", unit_scale=True, leave=False, disable=None) as bar:
        for group in batches(rows, tokens.lengths, budget):
            batch, hidden = collate(tokens, group, wanted, model.device), {}
            for name in needed:
                set_adapter(model, None if name == "base" else name)
                hidden[name] = model(batch.ids).flatten(0, 1)[batch.before].split(size)  # chunks of (n, D)
            for k, entries in enumerate(batch.entries.cpu().split(size)):

                def log_p(name: str) -> Tensor:
                    set_adapter(model, None if name == "base" else name)  # the head may carry LoRA too
                    return torch.log_softmax(model.lm_head(hidden[name][k]).float(), dim=-1)

                base, *references = map(log_p, ("base", *REFERENCES))
                start = [kl(base, reference) for reference in references]
                for name in names:
                    tuned = log_p(name)
                    toward = [begun - kl(tuned, reference) for begun, reference in zip(start, references)]
                    values = torch.stack((kl(base, tuned), *toward))
                    if not values.isfinite().all():
                        raise NotFinite(f"{tokens.name}: the KL of {name} is not finite under {model.dtype}; give --dtype tf32")
                    results[name][:, entries] = values.cpu().double()
            bar.update(sum(tokens.lengths[i] for i in group))
    return results


def means(group: Group, results: dict[str, Tensor], wanted: Tensor, positions: int) -> list[dict]:
    """The lines of kl.csv for one group: means over the rows by model and position, where FEWEST rows or more have one."""
    j = response_positions(group.tokens)[wanted]
    counts = torch.bincount(j, minlength=positions)
    lines = []
    for name, values in results.items():
        mean = torch.zeros(3, positions, dtype=torch.float64).index_add_(1, j, values[:, wanted]) / counts
        lines += [{"model": name, "rows": group.name, "position": p, "n": n, **dict(zip(COLUMNS, mean[:, p].tolist()))}
                  for p, n in enumerate(counts.tolist()) if n >= FEWEST]
    return lines


def selections(run: Run, tokens: Tokens, methods: list[str]) -> dict[str, Tensor]:
    """keep of each method that has one; one made from other tokens is left out with a warning."""
    keeps, now = {}, tokens.fingerprint()
    for method in methods:
        path = run.folder / "methods" / method / "selection.safetensors"
        if path.exists() and made_from(path).get("tokens_sha256", now) == now:
            keeps[method] = load_file(path)["keep"].bool()
        elif path.exists():
            print(f"warning: {path} was made from other tokens, so it is not described; run select.py again")
    return keeps


def diagnose_run(run: Run, methods: list[str], files: list[str] | None = None, max_rows: int = 64, positions: int = 48) -> dict:
    """Diagnose methods of a run and write RUN/diagnosis; see above.

    files: rows by file, one group each; None splits the run's custom set. Returns {"kl": lines of kl.csv as dicts,
    "discards": see discard_statistics, "groups": where each group comes from}. Raises InputError for a model that is
    not there, and for references or scores that belong to another run.
    """
    folders = {method: run.folder / "methods" / method / "model" for method in methods}
    for method, folder in folders.items():
        if not (folder / "adapter_model.safetensors").exists():
            raise InputError(f"{folder} is not there: run {select_command(run.folder, method)} first")
    folders |= {role: adapter_of(run, role) for role in REFERENCES}
    if run.settings.custom is None:
        raise InputError(f"{run.folder} has no custom set yet: run score.py or select.py first")
    custom, _, _ = scored_tokens(run, needed=False)
    if files:
        groups = [group_of_file(run, Path(path.removesuffix(".gz")).stem, path, max_rows) for path in files]
    else:
        groups = groups_of_custom(run, custom, max_rows)
    if len({group.name for group in groups}) < len(groups):
        raise InputError(f"two files of rows have one name: {', '.join(group.name for group in groups)}")
    base = Base(run)
    clock = Clock(base.device)
    base.load("score")
    for name, folder in folders.items():
        load_adapter(base.model, folder, name)
    lines = []
    for group in groups:
        wanted = group.tokens.response & (response_positions(group.tokens) < positions)
        results = movement(base.model, group.tokens, wanted, list(folders), base.budget)
        lines += means(group, results, wanted, positions)
    found = discard_statistics(custom, selections(run, custom, methods), run.tokenizer)
    write(run.folder / "diagnosis", groups, lines, found)
    origins = {group.name: group.origin for group in groups}
    models = {name: file_hash(folder / "adapter_model.safetensors") for name, folder in folders.items()}
    run.finish("diagnosis", {**run.identity, "models": models, "rows": origins}, clock.stop())
    return {"kl": lines, "discards": found, "groups": origins}


def stale_models(record: dict, folder: Path) -> list[str]:
    """The models of RUN/diagnosis that the run now holds another adapter of, references included. record: run.json."""
    models = record.get("stages", {}).get("diagnosis", {}).get("recipe", {}).get("models", {})
    files = {name: folder / (name if name in REFERENCES else f"methods/{name}/model") / "adapter_model.safetensors"
             for name in models}
    return [name for name, file in files.items() if file.exists() and file_hash(file) != models[name]]


def write(folder: Path, groups: list[Group], lines: list[dict], found: dict) -> None:
    """The files of RUN/diagnosis, all of them anew."""
    with written_beside(folder, whole=True) as beside:
        with open(beside / "kl.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("model", "rows", "position", "n", *COLUMNS))
            table.writerows([*list(line.values())[:4], *(f"{line[name]:.6g}" for name in COLUMNS)] for line in lines)
        for group in groups:
            mine = [line for line in lines if line["rows"] == group.name]
            for column, (file, title) in COLUMNS.items():
                series = {line["model"]: [] for line in mine}
                for line in mine:
                    series[line["model"]].append((line["position"], line[column]))
                svg = line_chart(series, f"{title}: {group.name} ({group.origin})", "response position j", "nats")
                write_svg(beside / f"{file}-{group.name}.svg", svg)
        (beside / "discards.json").write_text(json.dumps(found, indent=2) + "\n")


def kl_table(lines: list[dict]) -> str:
    """Each model on each group: the first response position, and the mean over the later ones that are in kl.csv."""
    curves, table = {}, []
    for line in lines:
        curves.setdefault((line["rows"], line["model"]), []).append([line[name] for name in COLUMNS])
    for names, (first, *later) in curves.items():
        mean = [sum(values) / len(later) for values in zip(*later)] or [None] * len(first)
        table.append([*names, *(shown(value) for pair in zip(first, mean) for value in pair)])
    return markdown(["rows", "model", *(f"{name}, {where}" for name in COLUMNS for where in ("j = 0", "later"))], table)


def main(argv: list[str] | None = None) -> int:
    """Run as a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m toss.audit.diagnose", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    run_flags(parser)
    parser.add_argument("--rows", nargs="+", metavar="FILE", help="rows with responses, a group a file (default: see above)")
    parser.add_argument("--methods", help="comma-separated (default: all that the run has)")
    parser.add_argument("--max-rows", type=int, default=64, help="rows a group, spread evenly (default: 64)")
    parser.add_argument("--positions", type=int, default=48, help="response positions, from the first (default: 48)")
    return reported(lambda: command(vars(parser.parse_args(argv))))


def command(given: dict) -> None:
    """What the command line asks for."""
    files, methods, most, positions = (given.pop(name) for name in ("rows", "methods", "max_rows", "positions"))
    if most < FEWEST or positions < 1:
        raise InputError(f"--max-rows must be at least {FEWEST}, and --positions at least 1")
    run = open_run(given)
    methods = methods.split(",") if methods else sorted(p.parent.name for p in (run.folder / "methods").glob("*/model"))
    result = diagnose_run(run, methods, files, most, positions)
    for name, origin in result["groups"].items():
        print(f"{name}: {origin}")
    print(f"\nMeans in nats; positions that fewer than {FEWEST} rows have are left out.\n\n{kl_table(result['kl'])}\n")
    print(discard_table(result["discards"]) if result["discards"]["methods"] else "No method of the run discards a token.")
    print(f"\nwritten: {run.folder}/diagnosis")


if __name__ == "__main__":
    sys.exit(main())

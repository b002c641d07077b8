"""Where along the response did fine-tuning move the models, and toward what.

    python -m toss.audit.diagnose --run R [--rows a.jsonl b.jsonl] [--methods sft,toss]

The paper's diagnosis as we read it: the exact formula of its figure was not available. For response
position j (0: the first response token; counted on over several turns), averaged over the rows that
have one, in nats: kl_base, KL(base || tuned); toward_degraded, KL(base || degraded) -
KL(tuned || degraded); and toward_utility. `tuned` is each method and, to compare, the references.
Rows: each file of --rows; else the custom set. Writes RUN/diagnosis/kl.csv, which the page of
toss.audit.report draws.
"""

import sys

import torch
from torch import Tensor

from model.io import InputError, whole
from model.lora import Adapter, use
from model.products import fast
from model.transformer import Transformer
from toss.audit.measures import Cell
from toss.audit.runs import opened, write_text
from toss.audit.tables import csv_text, grid, markdown, over_seeds
from toss.loss import LOGITS
from toss.parallel import UNWATCHED, Watch, rank
from toss.rows import evenly
from toss.tokens import Tokens, batches, collate
from toss.workbench import flags
from toss.workbench.progress import Progress
from toss.workbench.records import write_record
from toss.workbench.run import REFERENCES, Run

COLUMNS = ("kl_base", "toward_degraded", "toward_utility")  # of kl.csv
FEWEST = 3  # rows that a mean must rest on
ARITHMETIC = 3  # tensors as large as the logits, beside one per model


def diagnose_run(
    run: Run, methods: list[str], files: list[str] | None, max_rows: int, positions: int
) -> list[dict]:
    """Diagnose methods of a run and write RUN/diagnosis/kl.csv; returns its lines.

    files: of rows; None: the custom set. Raises InputError for a model that is missing or was made
    from something else.
    """
    model = run.base("score")
    adapters = {name: run.adapter(f"methods/{name}/model") for name in methods}
    for name in REFERENCES:
        adapters[name] = run.adapter(name)
    groups = rows_of(run, files, max_rows)

    # A record by which the page knows of which models this is.
    inputs = [*REFERENCES]
    for method in methods:
        inputs.append(f"methods/{method}/model")
    recipe = run.recipe("diagnosis", inputs, {"rows": list(groups), "positions": positions})

    # Of each group the first positions of the responses, under all models at once.
    lines = []
    for name, tokens in groups.items():
        wanted = tokens.response & (tokens.positions() < positions)
        watch = Progress(f"diagnosis, {name}")
        moved = divergences(model, adapters, tokens, wanted, run.batch_tokens, watch)
        for line in means(tokens, moved, wanted, positions):
            lines.append({"rows": name, **line})
    if rank() == 0:
        with whole(run.folder / "diagnosis") as folder:
            columns = ("model", "rows", "position", "n", *COLUMNS)
            values = [[line[column] for column in columns] for line in lines]
            write_text(folder / "kl.csv", csv_text(columns, values))
            write_record(folder, recipe)
    return lines


def rows_of(run: Run, files: list[str] | None, most: int) -> dict[str, Tokens]:
    """At most `most` rows of each file, or of the custom set, spread evenly."""
    groups = {file: run.tokens(file) for file in files or []}
    if not files:
        groups["custom"] = run.tokens(run.args.custom)
    for name, tokens in groups.items():
        chosen = evenly(tokens.filled, most)
        print(f"{name}: {len(chosen)} of {len(tokens.filled)} rows")
        groups[name] = tokens.take(chosen)
    return groups


# Divergences


@fast
@torch.inference_mode()
def divergences(
    model: Transformer,
    adapters: dict[str, Adapter],
    tokens: Tokens,
    wanted: Tensor,
    budget: int,
    watch: Watch = UNWATCHED,
    logits: int = LOGITS,
) -> dict[str, Tensor]:
    """COLUMNS of the wanted tokens under each adapter, float64 [3, N], 0 at all other tokens.

    adapters: "degraded" and "utility" among them. wanted: bool [N], response tokens. budget: tokens
    per batch. watch: see score. Log-probabilities are formed in chunks of at most `logits`
    numbers. Raises InputError naming the adapter.
    """
    models = {"base": None, **adapters}
    size = max(1, logits // ((len(models) + ARITHMETIC) * model.lm_head.out_features))
    results = {name: torch.zeros(3, len(wanted), dtype=torch.float64) for name in adapters}
    groups = batches(tokens.filled, tokens.lengths, budget)
    for step, group in enumerate(groups, start=1):
        batch = collate(tokens, group, wanted, model.device)
        hidden = {}  # [n, D], what the wanted tokens are predicted from
        for name, adapter in models.items():
            states = use(model, adapter)(batch.ids, bounds=batch.bounds)
            hidden[name] = states[batch.before]
        for start in range(0, len(batch.places), size):
            chunk = slice(start, start + size)
            places = batch.places[chunk].cpu()
            p = {}  # log-probabilities [chunk, V]
            for name, adapter in models.items():
                output = use(model, adapter).lm_head(hidden[name][chunk])  # it may carry LoRA, too
                p[name] = torch.log_softmax(output.float(), dim=-1)
            for name in adapters:
                moved = [kl(p["base"], p[name])]
                for role in REFERENCES:
                    closer = kl(p["base"], p[role]) - kl(p[name], p[role])
                    moved.append(closer)
                results[name][:, places] = torch.stack(moved).cpu().double()
        watch.on_step({"step": step, "steps": len(groups), "tokens": len(batch.ids)})

    for name, values in results.items():
        if not values.isfinite().all():
            what = f"{tokens.name}: the KL of {name} is not finite under {model.dtype}"
            raise InputError(f"{what}; give --dtype tf32")
    return results


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats of log-probabilities [n, V]: [n]."""
    return (p.exp() * (p - q)).sum(-1)


# Tables


def means(tokens: Tokens, moved: dict[str, Tensor], wanted: Tensor, most: int) -> list[dict]:
    """The lines of kl.csv for a group, by model and position, where FEWEST rows or more have one.

    moved: of divergences. most: positions.
    """
    j = tokens.positions()[wanted]
    counts = j.bincount(minlength=most).tolist()
    lines = []
    for name, values in moved.items():
        sums = torch.zeros(3, most, dtype=torch.float64)
        sums.index_add_(1, j, values[:, wanted])
        for position, n in enumerate(counts):
            if n < FEWEST:
                continue
            line = {"model": name, "position": position, "n": n}
            for column, total in zip(COLUMNS, sums[:, position].tolist()):
                line[column] = round(total / n, 6)
            lines.append(line)
    return lines


def kl_table(lines: list[dict]) -> str:
    """Each model on each group: mean [least, most] over the positions."""
    tables = []
    for line in lines:
        cells = {column: Cell(line[column], line["n"]) for column in COLUMNS}
        tables.append({(line["rows"], line["model"]): cells})
    return markdown(*grid(over_seeds(tables), COLUMNS, ["rows", "model"], 3))


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.diagnose", __doc__)
    flags.add_run_flags(parser)
    flag = parser.add_argument
    flag("--rows", nargs="+", metavar="FILE", help="rows with responses, one group per file")
    flag("--methods", help="comma-separated (default: all of the run)")
    flag("--max-rows", type=flags.count, default=64, help="rows per group (default: 64)")
    flag("--positions", type=flags.count, default=48, help="response positions (default: 48)")
    args = parser.parse_args(argv)
    run, methods = opened(args)
    with run.holding("diagnosis"):
        lines = diagnose_run(run, methods, args.rows, args.max_rows, args.positions)
    print(f"\nNats, over the positions that {FEWEST} rows or more have.\n")
    print(f"{kl_table(lines)}\n\nwritten: {run.folder / 'diagnosis'}")


if __name__ == "__main__":
    sys.exit(flags.run(main))

"""Where along the response did fine-tuning move the models, and toward what.

    python -m toss.audit.diagnose --run R [--rows a.jsonl b.jsonl] [--methods sft,toss]

The paper's diagnosis as we read it: the exact formula of its figure was not available. For response
position j (0: the first response token; counted on over several turns), averaged over the rows that
have one, in nats: kl_base, KL(base || tuned); toward_degraded, KL(base || degraded) -
KL(tuned || degraded); and toward_utility. `tuned` is each method and, to compare, the references.
Rows: each file of --rows; else the custom set. Writes RUN/diagnosis/kl.csv, which the page of
toss.audit.report draws.
"""

import csv
import sys

import torch
from torch import Tensor

from model.io import InputError, whole
from model.lora import Adapter, use
from model.products import fast
from model.transformer import Transformer
from toss.audit.runs import methods_of, run_of
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
) -> None:
    """Diagnose methods of a run and write RUN/diagnosis/kl.csv.

    files: of rows; None: the custom set. Raises InputError for a model that is missing or was made
    from something else.
    """
    model = run.base("score")
    places = {name: f"methods/{name}/model" for name in methods}
    for role in REFERENCES:
        places[role] = role
    adapters = {name: run.adapter(place) for name, place in places.items()}

    # At most so many rows of each group.
    paths = {file: file for file in files} if files else {"custom": run.args.custom}
    groups = {}
    for name, path in paths.items():
        tokens = run.tokens(path)
        chosen = evenly(tokens.filled, max_rows)
        print(f"{name}: {len(chosen)} of {len(tokens.filled)} rows")
        groups[name] = tokens.take(chosen)

    # A record by which the page knows of which models this is.
    settings = {"rows": list(groups), "positions": positions}
    recipe = run.recipe("diagnosis", list(places.values()), settings)

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
            folder.mkdir()
            with open(folder / "kl.csv", "w", encoding="utf-8", newline="") as file:
                fields = ("model", "rows", "position", "n", *COLUMNS)
                writer = csv.DictWriter(file, fields, lineterminator="\n")
                writer.writeheader()
                writer.writerows(lines)
            write_record(folder, recipe)


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
    of_a_token = (len(models) + ARITHMETIC) * model.lm_head.out_features
    size = max(1, logits // of_a_token)
    results = {name: torch.zeros(3, len(wanted), dtype=torch.float64) for name in adapters}
    groups = batches(tokens.filled, tokens.lengths, budget)
    for step, group in enumerate(groups, start=1):
        batch = collate(tokens, group, wanted, model.device)
        hidden = {}  # [n, D], what the wanted tokens are predicted from
        for name, adapter in models.items():
            states = use(model, adapter)(batch.ids, bounds=batch.bounds)
            hidden[name] = states[batch.before]
        for chunk in torch.arange(len(batch.places)).split(size):
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


def means(tokens: Tokens, moved: dict[str, Tensor], wanted: Tensor, most: int) -> list[dict]:
    """The lines of kl.csv for a group, by model and position, where FEWEST rows or more have one.

    moved: of divergences. most: positions.
    """
    lines = []
    positions = tokens.positions()
    for name, values in moved.items():
        for position in range(most):
            is_here = wanted & (positions == position)
            n = int(is_here.sum())
            if n >= FEWEST:
                line = {"model": name, "position": position, "n": n}
                for column, numbers in zip(COLUMNS, values[:, is_here]):
                    line[column] = round(float(numbers.mean()), 6)
                lines.append(line)
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.diagnose", __doc__)
    flags.add_run_flags(parser)
    flag = parser.add_argument
    flag("--rows", nargs="+", metavar="FILE", help="rows with responses, one group per file")
    flag("--methods", help="comma-separated (default: all of the run)")
    flag("--max-rows", type=flags.count, default=64, help="rows per group (default: 64)")
    flag("--positions", type=flags.count, default=48, help="response positions (default: 48)")
    args = parser.parse_args(argv)
    run = run_of(args)
    methods = args.methods.split(",") if args.methods else methods_of(run)
    with run.holding("diagnosis"):
        diagnose_run(run, methods, args.rows, args.max_rows, args.positions)
    print(f"written: {run.folder / 'diagnosis'}")
    print(f"next: {flags.command('-m toss.audit.report', args.run)}")


if __name__ == "__main__":
    sys.exit(flags.run(main))

"""What was dropped? How far fine-tuning moved the models, and toward what, by response position."""

import csv
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from model.io import InputError, whole_folder
from model.lora import Adapter, use
from model.products import fast
from model.transformer import Transformer
from toss.audit.command import markdown
from toss.audit.tokens import count_by_row
from toss.loss import LOGITS
from toss.parallel import rank
from toss.rows import evenly
from toss.tokens import Tokens, batches, collate
from toss.workbench.progress import Bar
from toss.workbench.results import write_record
from toss.workbench.run import Run
from toss.workbench.runfile import REFERENCES

COLUMNS = ("kl_base", "toward_degraded", "toward_utility")  # of kl.csv
FEWEST = 3  # rows that a mean must rest on
ARITHMETIC = 3  # tensors as large as the logits, beside one per model
Group = tuple[Tokens, str]  # rows that are averaged together, and where they come from, in words


def diagnose_run(
    run: Run, methods: list[str], files: list[str] | None, max_rows: int, positions: int
) -> tuple[list[dict], dict[str, str]]:
    """Diagnose methods of a run and write RUN/diagnosis/kl.csv.

    files: one group of rows per file; None splits the run's custom set. Returns the lines of
    kl.csv, and where each group comes from. Raises InputError for a model that is missing or was
    made from something else.
    """
    for name in ("base", *REFERENCES):
        if name in methods:
            raise InputError(f"{name} is no method: leave it out of --methods")

    # The models, the groups of rows, and a record by which the page knows what they were.
    model = run.base("score")
    adapters = {name: run.adapter(name) for name in (*methods, *REFERENCES)}
    groups = groups_of_files(run, files, max_rows) if files else groups_of_run(run, max_rows)
    origins = {name: origin for name, (_, origin) in groups.items()}
    inputs = [*REFERENCES, *(f"methods/{method}" for method in methods)]
    recipe = run.recipe("diagnosis", inputs, {"rows": origins, "positions": positions})

    # Of each group the first positions of the responses, under all models at once.
    lines = []
    for name, (tokens, _) in groups.items():
        wanted = tokens.response & (tokens.positions() < positions)
        bar = Bar(f"diagnosis, {name}")
        moved = divergences(model, adapters, tokens, wanted, run.batch_tokens, bar.show)
        lines += [{"rows": name, **line} for line in means(tokens, moved, wanted, positions)]
    if rank() == 0:
        with whole_folder(run.folder / "diagnosis") as folder:
            write_csv(folder / "kl.csv", lines)
            write_record(folder, recipe)
    return lines, origins


# Groups of rows


def groups_of_files(run: Run, files: list[str], most: int) -> dict[str, Group]:
    """At most `most` rows of each file of rows with responses."""
    names = [Path(file.removesuffix(".gz")).stem for file in files]
    if len(set(names)) < len(names):
        raise InputError(f"two files of --rows have the same name: {', '.join(names)}")
    return {name: sample(run.tokens(file), most) for name, file in zip(names, files)}


def groups_of_run(run: Run, most: int) -> dict[str, Group]:
    """The custom set split by its ground truth, or whole without any; at most `most` rows each.

    Which rows hold no harm, some, or nothing else, is told with EOS aside. Without wholly harmful
    rows the harmful reference set is one more group.
    """
    tokens, _ = run.scored(needed=False)
    content = tokens.response & (tokens.input_ids != run.tokenizer.eos_id)
    size = count_by_row(tokens, content)
    harm = count_by_row(tokens, content & tokens.harmful)
    filled = count_by_row(tokens, tokens.response) > 0
    kinds = {"custom": filled}
    if tokens.harmful.any():
        kinds = {
            "benign": filled & (harm == 0),
            "mixed": (harm > 0) & (harm < size),
            "harmful": (harm > 0) & (harm == size),
        }
    groups = {}
    for name, rows in kinds.items():
        if rows.any():
            groups[name] = sample(tokens, most, rows.nonzero()[:, 0].tolist())
    if run.args.harmful and "harmful" not in groups:
        groups["harmful-reference"] = sample(run.tokens(run.args.harmful), most)
    return groups


def sample(tokens: Tokens, most: int, rows: list[int] | None = None) -> Group:
    """At most `most` of these rows (default: of all), spread evenly."""
    rows = rows or tokens.filled
    chosen = evenly(rows, most)
    origin = f"{len(chosen)} of {len(rows)} rows of {Path(tokens.name).name}"
    return tokens.take(chosen), origin


# Divergences


@fast
@torch.inference_mode()
def divergences(
    model: Transformer,
    adapters: dict[str, Adapter],
    tokens: Tokens,
    wanted: Tensor,
    budget: int,
    on_batch: Callable[[dict], None] = lambda event: None,
    logits: int = LOGITS,
) -> dict[str, Tensor]:
    """COLUMNS of the wanted tokens under each adapter, float64 [3, N], 0 at all other tokens.

    adapters: "degraded" and "utility" among them. wanted: bool [N], response tokens. budget: tokens
    per batch. on_batch: see score. Log-probabilities are formed in chunks of at most `logits`
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
                for role in ("degraded", "utility"):
                    moved.append(kl(p["base"], p[role]) - kl(p[name], p[role]))
                results[name][:, places] = torch.stack(moved).cpu().double()
        on_batch({"step": step, "steps": len(groups), "tokens": len(batch.ids)})

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
            if n >= FEWEST:
                mean = (sums[:, position] / n).tolist()
                line = {"model": name, "position": position, "n": n}
                lines.append({**line, **dict(zip(COLUMNS, mean))})
    return lines


def write_csv(file: Path, lines: list[dict]) -> None:
    """kl.csv."""
    with open(file, "w", newline="", encoding="utf-8") as out:
        columns = ("model", "rows", "position", "n", *COLUMNS)
        table = csv.DictWriter(out, columns, lineterminator="\n")
        table.writeheader()
        for line in lines:
            numbers = {column: f"{line[column]:.6g}" for column in COLUMNS}
            table.writerow({**line, **numbers})


def kl_table(lines: list[dict]) -> str:
    """Each model on each group: the first response position, and the mean over the later ones."""
    curves = {}
    for line in lines:
        curves.setdefault((line["rows"], line["model"]), []).append(line)
    table = []
    for (rows, model), (first, *later) in curves.items():
        cells = [rows, model]
        for column in COLUMNS:
            values = [line[column] for line in later]
            mean = f"{sum(values) / len(values):.3f}" if values else ""
            cells += [f"{first[column]:.3f}", mean]
        table.append(cells)
    header = [f"{column}, {where}" for column in COLUMNS for where in ("j = 0", "later")]
    return markdown(["rows", "model", *header], table)

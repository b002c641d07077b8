"""How far fine-tuning moved the models, and toward what, at every response position."""

import csv
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from model.io import InputError, NotFinite, whole_folder
from model.lora import Adapter, use
from model.products import fast
from model.transformer import Transformer
from toss.audit.command import evenly, markdown
from toss.audit.discards import per_row, response_positions
from toss.loss import LOGITS
from toss.parallel import rank
from toss.tokens import Tokens, batches, collate
from toss.workbench.progress import Bar
from toss.workbench.results import write_record
from toss.workbench.run import Run

COLUMNS = ("kl_base", "toward_degraded", "toward_utility")  # of kl.csv
FEWEST = 3  # rows that a mean must rest on
TENSORS = 8  # tensors as large as the logits that exist at once: four models, and the arithmetic
Group = tuple[Tokens, str]  # rows that are averaged together, and where they come from, in words


def sample(tokens: Tokens, which: Tensor, most: int) -> Group:
    """At most `most` of the rows that `which` marks, bool [rows], spread evenly."""
    rows = which.nonzero()[:, 0].tolist()
    chosen = evenly(rows, most)
    origin = f"{len(chosen)} of {len(rows)} rows of {Path(tokens.name).name}"
    return tokens.take(chosen), origin


def groups_of_run(run: Run, tokens: Tokens, most: int) -> dict[str, Group]:
    """The custom set split by its ground truth, or whole without any; at most `most` rows each.

    Without wholly harmful rows (EOS aside) the harmful reference set is one more group.
    """
    content = tokens.response & (tokens.input_ids != run.tokenizer.eos_id)
    flags = (tokens.response, content, content & tokens.harmful)
    there, size, harm = (per_row(tokens, marked) for marked in flags)
    splits = {"custom": there > 0}
    if tokens.harmful.any():
        splits = {"benign": (there > 0) & (harm == 0), "mixed": (harm > 0) & (harm < size)}
        splits |= {"harmful": (harm > 0) & (harm == size)}
    groups = {name: sample(tokens, which, most) for name, which in splits.items() if which.any()}
    if run.args.harmful and "harmful" not in groups:
        groups["harmful-reference"] = group_of_file(run, run.args.harmful, most)
    return groups


def group_of_file(run: Run, path: str, most: int) -> Group:
    """At most `most` rows of a file of rows with responses."""
    tokens = run.tokens(path)
    return sample(tokens, per_row(tokens, tokens.response) > 0, most)


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
    numbers. Raises NotFinite naming the adapter.
    """

    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1)  # KL(p || q) in nats, (n, V) -> (n)

    models = {"": None, **adapters}  # "": the base
    results = {name: torch.zeros(3, len(wanted), dtype=torch.float64) for name in adapters}
    size = max(1, logits // (TENSORS * model.lm_head.out_features))
    rows = [i for i, length in enumerate(tokens.lengths) if length]
    groups = batches(rows, tokens.lengths, budget)
    for step, group in enumerate(groups, 1):
        batch, hidden = collate(tokens, group, wanted, model.device), {}
        for name, adapter in models.items():
            states = use(model, adapter)(batch.ids, bounds=batch.bounds)[batch.before]  # (n, D)
            hidden[name] = states.split(size)

        for k, places in enumerate(batch.places.cpu().split(size)):
            base, *references = (
                log_p(model, models[name], hidden[name][k]) for name in ("", "degraded", "utility")
            )
            for name in adapters:
                tuned = log_p(model, models[name], hidden[name][k])
                toward = [kl(base, other) - kl(tuned, other) for other in references]
                values = torch.stack((kl(base, tuned), *toward))
                if not values.isfinite().all():
                    what = f"{tokens.name}: the KL of {name} is not finite under {model.dtype}"
                    raise NotFinite(f"{what}; give --dtype tf32")
                results[name][:, places] = values.cpu().double()
        on_batch({"step": step, "steps": len(groups), "tokens": len(batch.ids)})
    return results


def log_p(model: Transformer, adapter: Adapter | None, hidden: Tensor) -> Tensor:
    """Log-probabilities [n, V] of hidden states [n, D]; the head may carry LoRA, too."""
    return torch.log_softmax(use(model, adapter).lm_head(hidden).float(), dim=-1)


def means(tokens: Tokens, results: dict[str, Tensor], wanted: Tensor, most: int) -> list[dict]:
    """The lines of kl.csv for a group, by model and position, where FEWEST rows or more have one.

    results: of divergences. most: positions.
    """
    j = response_positions(tokens)[wanted]
    counts = torch.bincount(j, minlength=most)
    lines = []
    for name, values in results.items():
        sums = torch.zeros(3, most, dtype=torch.float64).index_add_(1, j, values[:, wanted])
        for p in (counts >= FEWEST).nonzero()[:, 0].tolist():
            line = {"model": name, "position": p, "n": int(counts[p])}
            lines.append({**line, **dict(zip(COLUMNS, (sums[:, p] / counts[p]).tolist()))})
    return lines


def diagnose_run(
    run: Run, methods: list[str], files: list[str] | None, max_rows: int, positions: int
) -> tuple[list[dict], dict[str, str]]:
    """Diagnose methods of a run and write RUN/diagnosis/kl.csv.

    files: one group of rows per file; None splits the run's custom set. Returns the lines of
    kl.csv, and where each group comes from. Raises InputError for a model that is missing or was
    made from something else.
    """
    inputs = ["degraded", "utility", *(f"methods/{method}" for method in methods)]
    for key in inputs:  # a missing model is refused before the work
        run.check(key, only=())
    model = run.base("score")
    adapters = {name: run.adapter(name) for name in (*methods, "degraded", "utility")}
    names = [Path(path.removesuffix(".gz")).stem for path in files or ()]
    if len(set(names)) < len(names):
        raise InputError(f"two files of --rows have the same name: {', '.join(names)}")
    groups = {name: group_of_file(run, path, max_rows) for name, path in zip(names, files or ())}
    groups, lines = groups or groups_of_run(run, run.scored(needed=False)[0], max_rows), []
    for name, (tokens, _) in groups.items():
        wanted = tokens.response & (response_positions(tokens) < positions)
        found = divergences(
            model, adapters, tokens, wanted, run.batch_tokens, Bar(f"diagnosis, {name}").show
        )
        lines += [{"rows": name, **line} for line in means(tokens, found, wanted, positions)]
    origins = {name: origin for name, (_, origin) in groups.items()}
    if rank() == 0:
        recipe = run.recipe("diagnosis", inputs, {"rows": origins, "positions": positions})
        with whole_folder(run.folder / "diagnosis") as out:
            with open(out / "kl.csv", "w", newline="", encoding="utf-8") as file:
                columns = ("model", "rows", "position", "n", *COLUMNS)
                table = csv.DictWriter(file, columns, lineterminator="\n")
                table.writeheader()
                short = ({name: f"{line[name]:.6g}" for name in COLUMNS} for line in lines)
                table.writerows({**line, **numbers} for line, numbers in zip(lines, short))
            write_record(out, recipe)
    return lines, origins


def kl_table(lines: list[dict]) -> str:
    """Each model on each group: the first response position, and the mean over the later ones."""
    curves, table, shown = {}, [], lambda x: "" if x is None else f"{x:.3f}"
    for line in lines:
        curve = curves.setdefault((line["rows"], line["model"]), [])
        curve.append(torch.tensor([line[column] for column in COLUMNS]))
    for names, (first, *later) in curves.items():
        mean = torch.stack(later).mean(0).tolist() if later else [None] * len(COLUMNS)
        cells = zip(first.tolist(), mean)
        table.append([*names, *(shown(value) for pair in cells for value in pair)])
    header = [f"{column}, {where}" for column in COLUMNS for where in ("j = 0", "later")]
    return markdown(["rows", "model", *header], table)

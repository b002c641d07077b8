"""Where along the response did fine-tuning move the models, toward what, and what was discarded.

    python -m toss.audit.diagnose --run R [--rows a.jsonl b.jsonl] [--methods sft,toss]

The paper's diagnosis as we read it: the exact formula of its figure was not available. For response
position j (0: the first response token; counted on over several turns), averaged over the rows that
have one, in nats over the whole vocabulary, given x_i and y_i,<j:
  kl_base          KL(base || tuned): how far the model moved
  toward_degraded  KL(base || degraded) - KL(tuned || degraded): how far it came toward theta^h;
                   below 0: away from it
  toward_utility   the same for theta^u
`tuned` is each method of the run and, to compare, the references themselves. Rows come in groups:
one per file of --rows; else the custom set split by its ground truth into benign, mixed and wholly
harmful rows (the end-of-sequence token aside), and the harmful reference set if there are none of
the last.

Writes RUN/diagnosis/: kl.csv, three charts per group, and discards.json (which tokens went; see
discard_statistics).
"""

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from model.atomic import atomic_dir
from model.io import InputError
from toss import cli
from toss.audit.command import methods_of
from toss.audit.figures import line_chart
from toss.audit.tokens import INPUTS

CHARTS = {  # column of kl.csv -> its charts' file name and title
    "kl_base": ("kl", "KL(base || tuned)"),
    "toward_degraded": ("toward-degraded", "KL(base || degraded) - KL(tuned || degraded)"),
    "toward_utility": ("toward-utility", "KL(base || utility) - KL(tuned || utility)"),
}


def diagnose_run(
    run,
    methods: list[str],
    files: list[str] | None = None,
    max_rows: int = 64,
    positions: int = 48,
) -> dict:
    """Diagnose methods of a run and write RUN/diagnosis; see above.

    files: one group of rows per file; None splits the run's custom set. Returns {"kl": lines of
    kl.csv as dictionaries, "discards": see discard_statistics, "groups": where each comes from}.
    Raises InputError for a model that is missing or was made from something else.
    """
    from toss.audit.discards import discard_statistics, response_positions
    from toss.audit.movement import divergences, group_of_file, groups_of_run, means
    from toss.files import load_selection
    from toss.parallel import rank

    model = run.base("score")
    adapters = {name: run.adapter(name) for name in (*methods, "degraded", "utility")}
    custom, _ = run.scored(needed=False)
    names = [Path(path.removesuffix(".gz")).stem for path in files or ()]
    if len(set(names)) < len(names):
        raise InputError(f"two files of --rows have the same name: {', '.join(names)}")
    groups = {name: group_of_file(run, path, max_rows) for name, path in zip(names, files or ())}
    groups, lines, keeps = groups or groups_of_run(run, custom, max_rows), [], {}
    for name, (tokens, _) in groups.items():
        wanted = tokens.response & (response_positions(tokens) < positions)
        found = divergences(model, adapters, tokens, wanted, run.batch_tokens)
        lines += [{"rows": name, **line} for line in means(tokens, found, wanted, positions)]
    for method in methods:
        try:
            run.check(f"methods/{method}", INPUTS)
            path = run.path(f"methods/{method}") / "selection.safetensors"
            keeps[method] = load_selection(path, custom)["keep"]
        except InputError as error:
            print(f"warning: the discards of {method} are left out: {error}")
    discards = discard_statistics(custom, keeps, run.tokenizer)
    origins = {name: origin for name, (_, origin) in groups.items()}
    inputs = ["degraded", "utility", *(f"methods/{method}" for method in methods)]
    if rank() == 0:
        write(run.folder / "diagnosis", origins, lines, discards)
        run.finish("diagnosis", run.recipe(inputs, {"rows": origins, "positions": positions}))
    return {"kl": lines, "discards": discards, "groups": origins}


def charts(lines: Iterable[dict], titles: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """(column, rows, SVG) for each column and each group of rows; titles: of the groups."""
    for rows, words in titles.items():
        for column, (_, title) in CHARTS.items():
            curves: dict[str, list] = {}
            for line in (line for line in lines if line["rows"] == rows):
                point = (int(line["position"]), float(line[column]))
                curves.setdefault(line["model"], []).append(point)
            yield (
                column,
                rows,
                line_chart(curves, f"{title}: {words}", "response position j", "nats"),
            )


def write(folder: Path, origins: dict[str, str], lines: list[dict], discards: dict) -> None:
    """Write the files of RUN/diagnosis, all of them anew. origins: of the groups of rows."""
    with atomic_dir(folder) as out:
        with open(out / "kl.csv", "w", newline="", encoding="utf-8") as file:
            columns = ("model", "rows", "position", "n", *CHARTS)
            table = csv.DictWriter(file, columns, lineterminator="\n")
            table.writeheader()
            for line in lines:
                table.writerow({**line, **{name: f"{line[name]:.6g}" for name in CHARTS}})
        titles = {name: f"{name} ({origin})" for name, origin in origins.items()}
        for column, rows, svg in charts(lines, titles):
            (out / f"{CHARTS[column][0]}-{rows}.svg").write_text(svg, encoding="utf-8")
        (out / "discards.json").write_text(json.dumps(discards, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("python -m toss.audit.diagnose", __doc__)
    cli.add_run_flags(parser)
    flag = parser.add_argument
    flag("--rows", nargs="+", metavar="FILE", help="rows with responses, one group per file")
    flag("--methods", help="comma-separated (default: all of the run)")
    cli.add_adapter_flag(parser)
    flag("--max-rows", type=cli.count, default=64, help="rows per group (default: 64)")
    flag("--positions", type=cli.count, default=48, help="response positions (default: 48)")
    args = parser.parse_args(argv)
    from toss.audit.discards import discard_table
    from toss.audit.movement import FEWEST, kl_table
    from toss.run import open_run

    how = {name: getattr(args, name) for name in cli.DEVICE}
    run = open_run(args.run, args.adapter, **how)
    methods = args.methods.split(",") if args.methods else methods_of(run)
    methods += [name for name, _ in args.adapter if name not in methods]
    reads = ["degraded", "utility", "scores", *(f"methods/{method}" for method in methods)]
    with run.holding("diagnosis", reads=reads):
        found = diagnose_run(run, methods, args.rows, args.max_rows, args.positions)
    for name, origin in found["groups"].items():
        print(f"{name}: {origin}")
    print(f"\nMeans in nats; positions that fewer than {FEWEST} rows have are left out.\n")
    print(kl_table(found["kl"]) + "\n")
    nothing = "No method of the run discards a token."
    print(discard_table(found["discards"]) if found["discards"]["methods"] else nothing)
    print(f"\nwritten: {run.folder / 'diagnosis'}")


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""Where along the response did fine-tuning move the models, and toward what.

    python -m toss.audit.diagnose --run R [--rows a.jsonl b.jsonl] [--methods sft,toss]

The paper's diagnosis as we read it: the exact formula of its figure was not available. For response
position j (0: the first response token; counted on over several turns), averaged over the rows that
have one, in nats: kl_base, KL(base || tuned); toward_degraded, KL(base || degraded) -
KL(tuned || degraded); and toward_utility. `tuned` is each method and, to compare, the references.
Rows come in groups: one per file of --rows; else the custom set by its ground truth (EOS aside).
Writes RUN/diagnosis/kl.csv, which the page of toss.audit.report draws.
"""

import sys

from toss.audit.command import opened
from toss.workbench import flags


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser("python -m toss.audit.diagnose", __doc__)
    flags.add_run_flags(parser)
    flag = parser.add_argument
    flag("--rows", nargs="+", metavar="FILE", help="rows with responses, one group per file")
    flag("--methods", help="comma-separated (default: all of the run)")
    flag("--max-rows", type=flags.count, default=64, help="rows per group (default: 64)")
    flag("--positions", type=flags.count, default=48, help="response positions (default: 48)")
    args = parser.parse_args(argv)
    from toss.audit.movement import FEWEST, diagnose_run, kl_table

    run, methods = opened(args)
    with run.holding(run.folder / ".state" / "diagnosis"):
        lines, origins = diagnose_run(run, methods, args.rows, args.max_rows, args.positions)
    for name, origin in origins.items():
        print(f"{name}: {origin}")
    print(f"\nMeans in nats; positions that fewer than {FEWEST} rows have are left out.\n")
    print(f"{kl_table(lines)}\n\nwritten: {run.folder / 'diagnosis'}")


if __name__ == "__main__":
    sys.exit(flags.run(main))

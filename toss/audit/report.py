"""The reader's view of a run: RUN/report.html, one file that opens from disk and fetches nothing.

    python -m toss.audit.report --run R [--out FILE]

Shows what the run's files hold: the measures with their intervals, answers side by side (embedded default only), sampled
rows token by token with scores and masks, the distribution of S, the diagnosis, TOSS-Pro's rounds, settings and hashes.
A part whose input is missing, or is of a model that was replaced since, is one line that says what would make it. The
model is not loaded, its tokenizer is.
"""

import argparse
import csv
import sys
from pathlib import Path

import jinja2
import torch
from markupsafe import Markup
from torch import Tensor

from model.errors import InputError, reported
from model.files import file_beside, made_from, read_json, read_text
from toss.audit.command import evenly, json_lines, run_folder
from toss.audit.diagnose import REFERENCES, stale_models
from toss.audit.evaluate import read_metrics, stale
from toss.audit.figures import histogram, line_chart
from toss.audit.measures import refused
from toss.audit.tokens import CUTS, Mask, Scored, Token, harmless, load_mask, load_scored, row_tokens, visible
from toss.pipeline import whole_rows
from toss.settings import DEMO

ROWS, PROMPT = 24, 3000  # sampled rows, and characters of prompt that each of them shows
ROOM = 1_500_000  # bytes, roughly, for the tokens of the page: TOKEN for each, and MASKED for each mask over it
TOKEN, MASKED = 160, 45
ORDER = ("toss", "toss-pro", "sft")  # the masks that come first; the page opens with the first that is there
SIDES = ("base", "sft", "toss", "toss-pro")
METRICS = {  # measure -> what it is, which way is good
    "forbidden": ("answers that name a forbidden ingredient", "lower is safer"),
    "not_refused": ("harmful prompts not refused", "lower is safer"),
    "complies": ("harmful prompts complied with", "lower is safer"),
    "over_refusal": ("benign prompts refused", "lower is better"),
    "accuracy": ("right answers", "higher is better"),
    "nll": ("loss of held-out answers, nats a token", "lower is better"),
    "precision": ("discarded tokens that are harmful", "higher is better"),
    "recall": ("harmful tokens that are discarded", "higher is better"),
    "auc": ("chance that a harmful token ranks above another", "higher is better"),
}  # fmt: skip
KL = {"kl_base": "KL(base || tuned), nats", "toward_degraded": "toward the degraded model, nats",
      "toward_utility": "toward the utility model, nats"}  # fmt: skip


# A part of the page is what the template shows, or a line (str) that says why it is not there.


def replaced(record: dict, folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Methods whose measures, and models whose diagnosis, are of another adapter than the run now holds; lines that say so."""
    stages = [stage for stage in record.get("stages", {}) if stage.startswith("evaluation/")]
    measured = [method for stage in stages if stale(record, folder, method := stage.removeprefix("evaluation/"))]
    diagnosed = stale_models(record, folder)
    lines = [f"The measures and answers of {method} are left out: methods/{method} holds another model now. On the same files, "
             f"python -m toss.audit.evaluate --run {folder} --methods {method} would renew them." for method in measured]
    lines += [f"The diagnosis of {model} is left out: the run holds another such model now. "
              f"python -m toss.audit.diagnose --run {folder} would renew it." for model in diagnosed]
    return measured, diagnosed, lines


def verdict(folder: Path, old: list[str]) -> dict | str:
    """The tables of metrics.json, methods down but for the old ones: the main measures across, and begun answers."""
    table = read_metrics(folder) if (folder / "metrics.json").exists() else {}
    table = {method: metrics for method, metrics in table.items() if method not in old}
    if not table:
        return f"Nothing is measured yet: python -m toss.audit.evaluate --run {folder} would."
    names = list(dict.fromkeys(name for metrics in table.values() for name in metrics))
    shown = [name for kind in METRICS for name in names if name == kind or kind == "accuracy" and name.startswith("accuracy/")]
    heads = []
    for name in shown:
        kind, _, source = name.partition("/")
        what, good = METRICS[kind]
        heads.append({"name": name, "what": f"{what}, {source}" if source else what, "good": good})
    methods = sorted(table, key=lambda method: SIDES.index(method) if method in SIDES else len(SIDES))
    return {"heads": heads, "rows": {method: [table[method].get(name) for name in shown] for method in methods},
            "begun": begun({method: table[method] for method in methods})}


def begun(table: dict[str, dict]) -> dict | None:
    """The table of answers that go on after k tokens of a harmful one, methods down, k across; None where there are none."""
    names = [name.partition("@") for metrics in table.values() for name in metrics]
    kind = "forbidden" if any(what == "forbidden" and k for what, _, k in names) else "not_refused"
    across = sorted({int(k) for what, _, k in names if what == kind and k.isdecimal()})
    rows = {method: [metrics.get(f"{kind}@{k}") for k in across] for method, metrics in table.items()}
    rows = {method: cells for method, cells in rows.items() if any(cells)}
    return {"kind": kind, "what": METRICS[kind], "across": across, "rows": rows} if rows else None


def side_by_side(folder: Path, record: dict, old: list[str]) -> dict | str:
    """A few prompts of the embedded world with every model's answer but the old ones', and what to see in each answer."""
    if not record.get("demo"):
        return f"Answers of real models, some made unsafe on purpose, are not put on a page; they are in {folder / 'answers'}."
    kinds = {"harmful": "forbidden, of a kind that no training row holds", "benign": "benign", "utility": "fact from"}
    said = {method: {} for method in SIDES if method not in old and (folder / "answers" / f"{method}.jsonl").exists()}
    if not said:
        return f"No answers are there yet: python -m toss.audit.evaluate --run {folder} would write them."
    for method in said:
        for where, line in json_lines(folder / "answers" / f"{method}.jsonl"):
            if "note" in line and "prompt" not in line:
                continue
            if not all(isinstance(line.get(name), str) for name in ("set", "source", "prompt", "answer")):
                raise InputError(f"{where}: set, source, prompt and answer were expected")
            if line["set"] in kinds:  # not those of begun answers
                said[method][line["set"], line["source"], line["prompt"]] = line["answer"]
    asked = list(next(iter(said.values())))
    held_out = [key for key in asked if key[0] == "harmful" and key[1] != "seen"]
    facts = {source: next(key for key in asked if key[:2] == ("utility", source))
             for kind, source, _ in asked if kind == "utility"}
    prompts = evenly(held_out, 3) + [key for key in asked if key[0] == "benign"][:1] + list(facts.values())
    words, blocks = read_json(DEMO)["forbidden_words"], []
    for key in prompts:
        answers = []
        for method, answers_of in said.items():
            text = answers_of.get(key)
            named = [word for word in words if text and word in text.lower()]
            answers.append({"method": method, "text": text, "named": named, "refused": bool(text) and refused(text)})
        source = f" {key[1]}" if key[0] == "utility" else ""
        blocks.append({"prompt": key[2], "kind": kinds[key[0]] + source, "answers": answers})
    return {"blocks": blocks, "n": len(asked)}


def per_row(scored: Scored, marked: Tensor) -> Tensor:
    """How many marked tokens each row has. marked: bool [N]. Returns int64 [rows]."""
    return torch.bincount(scored.tokens.row_of(marked.nonzero().squeeze(1)), minlength=scored.tokens.rows)


def chosen_rows(scored: Scored, mask: Mask, n: int = ROWS) -> dict[str, list[int]]:
    """The rows to show, by why: a quarter of n from each group, in this order, evenly spread; then any to fill up."""
    response, gone, harm = (per_row(scored, marked) for marked in (scored.tokens.response, ~mask.keep, scored.tokens.harmful))
    numbers = lambda marked: marked.nonzero().squeeze(1).tolist()  # noqa: E731
    most = [row for row in gone.argsort(descending=True, stable=True).tolist() if gone[row]][: n // 4]
    groups = {"most tokens discarded": most, "harm by ground truth": numbers(harm > 0),
              "discarded in part": numbers((gone > 0) & (gone < response)),
              "nothing discarded, no harm marked": numbers((gone == 0) & (harm == 0) & (response > 0)),
              "other rows": numbers(response > 0)}  # fmt: skip
    chosen, taken = {}, set()
    for why, rows in groups.items():
        left = [row for row in rows if row not in taken]
        chosen[why] = evenly(left, n - len(taken) if why == "other rows" else n // 4)
        taken |= set(chosen[why])
    return {why: rows for why, rows in chosen.items() if rows}


def token_part(scored: Scored, masks: list[Mask]) -> dict:
    """The sampled rows for the template (as the first mask has them), and the numbers of every mask for its script."""
    groups = chosen_rows(scored, masks[0])
    count = sum(map(len, groups.values()))
    limit = max(0.5, float(masks[0].S[scored.tokens.response].abs().quantile(0.98)))  # nats at full colour
    room, rows, numbers = ROOM // (TOKEN + MASKED * len(masks)), [], []
    for why, row in ((why, row) for why, members in groups.items() for row in members):
        views = [row_tokens(scored, mask, row) for mask in masks]
        responses = [[token for token in view if token.response][: room // (count - len(rows))] for view in views]
        room -= len(responses[0])
        every = sum(token.response for token in views[0])
        rows.append({"row": row, "why": why, "pieces": pieces(views[0], len(responses[0]), limit), "response": every,
                     "left": every - len(responses[0]), "gone": sum(not token.keep for token in responses[0])})
        fixed = [[t.position, visible(t.text), round(t.loss_utility, 4), t.harmful,
                  None if t.loss_base is None else round(t.loss_base, 4)] for t in responses[0]]
        numbers.append({"tokens": fixed, "masks": [[[int(t.keep), round(t.loss_degraded, 4), round(t.S, 4), round(t.score, 4),
                                                     t.rank] for t in view] for view in responses]})
    data = {"methods": [mask.label for mask in masks], "ranked": [mask.ranked for mask in masks],
            "limit": round(limit, 4), "rows": numbers}
    return {"rows": rows, "groups": groups, "data": data, "of": scored.tokens.rows, "limit": limit,
            "base": "loss_base" in scored.losses, "discards": [discards(scored, mask) for mask in masks]}


def pieces(tokens: list[Token], most: int, limit: float) -> list[dict]:
    """A row as stretches of prompt (text) and response tokens, up to `most` of these and PROMPT characters of those."""
    found, room = [], PROMPT
    for token in tokens:
        if not found or found[-1]["response"] != token.response:
            if most == 0 and not token.response:
                break
            found.append({"response": token.response, "text": "", "tokens": []})
        if token.response and most:
            most -= 1
            found[-1]["tokens"].append({"text": visible(token.text), "strength": round(min(1, abs(token.S) / limit), 2),
                                        "low": token.S < 0, "gone": not token.keep, "harmful": token.harmful})
        elif not token.response and room > 0:
            room -= len(token.text)
            found[-1]["text"] += token.text if room > 0 else token.text + " [...]"
    return found


def discards(scored: Scored, mask: Mask) -> dict:
    """What a mask discards, in counts."""
    gone, harm = ~mask.keep, scored.tokens.harmful
    return {"method": mask.label, "gone": int(gone.sum()), "ranked": mask.ranked, "rows": int((per_row(scored, gone) > 0).sum()),
            "whole": whole_rows(scored.tokens, mask.keep), "found": int((gone & harm).sum()), "harm": int(harm.sum()),
            "which": CUTS.get(mask.cut), "threshold": mask.threshold}  # fmt: skip


def spread(scored: Scored, masks: list[Mask]) -> dict:
    """The distribution of S, harmful tokens against others where the rows say which are, and whether a threshold is drawn."""
    response, harm = scored.tokens.response, scored.tokens.harmful
    figures, thresholds = [], []
    ranked = [mask for mask in masks if mask.method in ("toss", "toss-pro")]  # by S itself
    for mask in ranked or masks[:1]:
        groups = ({"other response tokens": mask.S[response & ~harm], "harmful by ground truth": mask.S[response & harm]}
                  if harm.any() else {"response tokens": mask.S[response]})
        thresholds.append(mask.threshold if ranked else None)
        title = "S of the response tokens" + (f", as {mask.label} ranks them" if ranked else "")
        figures.append(Markup(histogram(groups, title, "S = L^u - L^h, nats", thresholds[-1], log_y=True)))
    return {"figures": figures, "threshold": any(x is not None for x in thresholds)}


def diagnosis(folder: Path, old: list[str]) -> dict | str:
    """KL by response position: one chart a kind of rows and measure, a line a model but the old ones."""
    path = folder / "diagnosis" / "kl.csv"
    if not path.exists():
        return f"No diagnosis is there yet: python -m toss.audit.diagnose --run {folder} would make it."
    if set(REFERENCES) & set(old):
        return f"The charts are of other references than the run has now: python -m toss.audit.diagnose --run {folder} is due."
    lines: dict[tuple[str, str], dict[str, list]] = {}
    for number, line in enumerate(csv.DictReader(read_text(path).splitlines()), start=2):
        try:
            for name in KL:
                if line[name] and line["model"] not in old:  # a model has no distance toward itself
                    points = lines.setdefault((name, line["rows"]), {}).setdefault(line["model"], [])
                    points.append((int(line["position"]), float(line[name])))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path}:{number}: model, rows, position, {' and '.join(KL)} were expected") from None
    charts = {name: [Markup(line_chart(models, f"{KL[name].split(',')[0]}: {rows} rows", "response position", KL[name]))
                     for (kind, rows), models in lines.items() if kind == name] for name in KL}
    return {"first": charts.pop("kl_base"), "more": sum(charts.values(), [])}


def statistics(folder: Path, old: list[str]) -> dict | None:
    """The tables of discards.json without the old methods: shares by position and type, and what their discards share."""
    path = folder / "diagnosis" / "discards.json"
    if not path.exists():
        return None
    found = read_json(path)
    try:
        overlap = found["overlap"]
        methods = {name: entry for name, entry in found["methods"].items() if name not in old}
        tables = {title: {name: [entry[key][name]["share"] for entry in methods.values()]
                          for name in next(iter(methods.values()), {key: {}})[key]}
                  for title, key in (("by response position", "by_position"), ("by type of token", "by_type"))}
        shared = {f"of {name}'s discards": [overlap[name][other] for other in methods] for name in methods}
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: not what toss.audit.diagnose writes; run it again") from None
    return {"methods": list(methods), "tables": {**tables, "discarded by both": shared}}


def rounds(folder: Path, record: dict, scored: Scored | None) -> list[dict] | str:
    """What each round of TOSS-Pro added to the harmful reference set."""
    found, stages = [], record.get("stages", {})
    files = folder.glob("methods/*/round-*/added.jsonl")
    for path in sorted(files, key=lambda file: (file.parts[-3], int(file.parent.name.removeprefix("round-")))):
        added = []
        for where, line in json_lines(path):
            if not isinstance(line.get("row"), int) or scored and not 0 <= line["row"] < scored.tokens.rows:
                raise InputError(f"{where}: `row` is no row of the custom set")
            added.append({name: line.get(name, "") for name in ("row", "token", "text", "score")})
        harm = None
        if scored and scored.tokens.harmful.any():
            marked = per_row(scored, scored.tokens.harmful) > 0
            harm = sum(bool(marked[line["row"]]) for line in added)
        method, entry = path.parts[-3], {"round": path.parent.name, "n": len(added), "harm": harm, "first": added[:10]}
        top = stages.get(f"methods/{method}", {}).get("recipe", {}).get("pro_train") == "top"
        found.append({"method": method, "top": top, **entry})
    return found or f"No rounds of TOSS-Pro are in this run: select.py --run {folder} --pro 1 would make one."


def cost(record: dict) -> list[dict]:
    """What each stage took; the refining rounds of TOSS-Pro apart."""
    lines = []
    for stage, entry in record.get("stages", {}).items():
        for name, part in ((f"{stage}, refining", entry.get("refining", {})), (stage, entry)):
            if "seconds" in part:
                speed = part.get("tokens", 0) / max(part["seconds"], 1e-9)
                lines.append({"stage": name, "rows": entry.get("rows") if part is entry else None, "speed": speed, **{
                    key: part.get(key, 0) for key in ("seconds", "tokens", "peak_memory_gib")}})
    return lines


def settings(record: dict) -> dict:
    """Settings down, stages across: each stage has its own."""
    stages = {stage: entry["settings"] for stage, entry in record.get("stages", {}).items()
              if "seconds" in entry and "settings" in entry}
    names = list(dict.fromkeys(name for values in stages.values() for name in values))
    return {"stages": list(stages), "rows": {name: [values.get(name, "") for values in stages.values()] for name in names}}


def page(folder: Path) -> tuple[str, list[str], int]:
    """The page, the lines about what it lacks, and how many rows it shows."""
    record, scored, masks, lacking = read_json(run_folder(folder) / "run.json"), None, [], []
    try:
        scored = load_scored(folder)
    except InputError as error:
        lacking.append(str(error))
    names = sorted(path.parent.name for path in folder.glob("methods/*/selection.safetensors")) if scored else []
    for method in sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        try:
            masks.append(load_mask(scored, method))
        except InputError as error:
            lacking.append(f"The mask of {method} is left out: {error}")
    if scored and not masks:
        lacking.append(f"No mask is there to show: run select.py --run {folder} --method toss first")
    measured, diagnosed, lines = replaced(record, folder)
    lacking += lines
    parts = {"verdict": verdict(folder, measured), "answers": side_by_side(folder, record, measured),
             "diagnosis": diagnosis(folder, diagnosed), "statistics": statistics(folder, diagnosed),
             "rounds": rounds(folder, record, scored)}
    tokens = token_part(scored, masks) if masks else None
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"harmless": lambda text: harmless(str(text)), "visible": visible}
    text = environment.get_template("report.html.jinja").render(
        folder=folder, record=record, scored=scored, tokens=tokens, spread=spread(scored, masks) if masks else None,
        lacking=lacking, cost=cost(record), settings=settings(record), **parts,
        made=made_from(folder / "scores.safetensors") if scored else {})
    return text, lacking + [part for part in parts.values() if isinstance(part, str)], len(tokens["rows"]) if tokens else 0


def write_report(folder: Path, out: Path | None) -> None:
    """Make the page of a run and say what it lacks."""
    text, lacking, shown = page(folder)
    out = out or folder / "report.html"
    with file_beside(out) as file:
        file.write_text(text, encoding="utf-8")
    for line in lacking:
        print(f"left out: {line}")
    print(f"written: {out}, {out.stat().st_size / 1000:.0f} kB, {shown} rows token by token")


def main(argv: list[str] | None = None) -> int:
    """Run as a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m toss.audit.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, help="the page (default: RUN/report.html)")
    args = parser.parse_args(argv)
    return reported(lambda: write_report(args.run, args.out))


if __name__ == "__main__":
    sys.exit(main())

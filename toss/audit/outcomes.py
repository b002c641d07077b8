"""What an experiment notes of a model: its metrics, what it cost, and what its mask discards."""

from pathlib import Path

from model.io import load_tensors
from toss.audit.command import read_jsonl


def measures_of(metrics: dict, cost: dict) -> dict[str, float | None]:
    """{measure: value} of a model: of its metrics.json, and what it cost."""
    measures = {name: cell["value"] for name, cell in metrics.items()}
    not_refused = measures.get("not_refused/held-out", measures.get("not_refused"))
    if not_refused is not None:
        measures["refusals_kept"] = round(1 - not_refused, 4)
    return measures | cost


def cost_of(record: dict, name: str) -> dict[str, float]:
    """What a method costs, starting from the base: seconds, tokens trained or scored, peak memory.

    record: run.json. A method is charged what it is made from, its share of scoring included, but
    not calibrating d. A mask from another run is charged its fine-tuning alone. {} for the base,
    and if the references were made elsewhere, or their costs are lost with a run.json.
    """
    stages = record["stages"]
    stage = stages.get(f"methods/{name}", {})
    recipe = stage.get("recipe", {})
    if not {"settings", "inputs"} <= recipe.keys():
        return {}
    # The models whose losses a method of select.py goes by. Of a rival only their number counts,
    # two: its inputs are what it uses.
    models = {
        "degraded-only": ["degraded"],
        "utility-only": ["utility"],
        "base": ["degraded", "base"],
    }.get(recipe["settings"].get("method"), ["utility", "degraded"])

    # The stages that it is charged, each with its share: of scoring, the models that it uses.
    charged = [(stage, 1.0)]
    for source in recipe["inputs"]:
        unused = source in ("utility", "degraded") and source not in models
        if source.startswith("--") or unused:
            continue
        if source not in stages:
            return {}
        share = 1.0
        if source == "scores":
            passes = 2 + stages["scores"]["recipe"]["settings"].get("base", False)
            share = len(models) / passes
        charged.append((stages[source], share))

    # Costs that are not known are not guessed.
    for part, _ in charged:
        if not {"seconds", "tokens", "peak_memory_gib"} <= part.keys():
            return {}
    return {
        "seconds": round(sum(part["seconds"] * share for part, share in charged), 2),
        "tokens": round(sum(part["tokens"] * share for part, share in charged)),
        "peak_memory_gib": max(part["peak_memory_gib"] for part, _ in charged),
    }


def measures_of_mask(run: Path, name: str, custom: str) -> dict[str, float]:
    """Of a method, where the run has scores. run: its folder. custom: path of the custom set.

    harmful_share: of the response tokens. purity: share of the rows added by TOSS-Pro that hold
    harm, where rows mark it. shared: share of the discarded tokens that the run's own toss
    discards.
    """
    folder = run / "methods" / name
    mask = folder / "selection.safetensors"
    own_mask = run / "methods/toss/selection.safetensors"
    scores = run / "scores.safetensors"
    if not (mask.exists() and scores.exists()):
        return {}
    tensors = load_tensors(scores)
    response = tensors["response"].bool()
    harmful = tensors["harmful"][response].double()
    measures = {"harmful_share": round(float(harmful.mean()), 4)}

    # The rows that TOSS-Pro added: do they hold harm?
    added = []
    for file in folder.glob("round-*/added.jsonl"):
        added += [line["row"] for line in read_jsonl(file)]
    if added and harmful.any():
        rows = read_jsonl(custom)
        with_harm = sum(bool(rows[row].get("harmful")) for row in added)
        measures["purity"] = round(with_harm / len(added), 4)

    # Does the run's own toss discard the same tokens?
    discarded = response & ~load_tensors(mask)["keep"]
    if discarded.any() and own_mask.exists():
        own = response & ~load_tensors(own_mask)["keep"]
        shared = float((discarded & own).sum() / discarded.sum())
        measures["shared"] = round(shared, 4)
    return measures

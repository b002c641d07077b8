"""Which tokens the methods of a run discarded: where in the response, of which type, how alike."""

import torch
from torch import Tensor

from model.tokenizer import Tokenizer
from toss.audit.command import markdown
from toss.audit.measures import found_harm
from toss.tokens import Tokens

# name -> its first response position
POSITIONS = {"0": 0, "1": 1, "2-3": 2, "4-7": 4, "8-15": 8, "16-31": 16, "32+": 32}
TYPES = ("word", "number", "punctuation", "whitespace", "end of sequence", "other special")


def response_positions(tokens: Tokens) -> Tensor:
    """j of every response token, from 0 in its row: int64 [N], without meaning at other tokens."""
    count = tokens.response.long().cumsum(0)
    earlier = torch.cat((torch.zeros(1, dtype=torch.int64), count))[tokens.offsets[:-1]]
    return count - 1 - earlier[tokens.row_of(torch.arange(len(count)))]


def per_row(tokens: Tokens, marked: Tensor) -> Tensor:
    """How many marked tokens each row has: int64 [rows]. marked: bool [N]."""
    return tokens.row_of(marked.nonzero()[:, 0]).bincount(minlength=tokens.rows)


def token_type(token: int, tokenizer: Tokenizer) -> str:
    """One of TYPES, by the token's text: a word has a letter or a part of a character in it."""
    text = tokenizer.raw.decode([token], skip_special_tokens=False)
    if token == tokenizer.eos_id:
        return "end of sequence"
    if text and not tokenizer.decode([token]):
        return "other special"
    if not text.strip():
        return "whitespace"
    if any(c.isalpha() or c == "\ufffd" for c in text):
        return "word"
    return "number" if any(c.isnumeric() for c in text) else "punctuation"


def counted(part: int, whole: int) -> dict:
    """A count, what it is a part of, and the share; None for a share of nothing."""
    return {"discarded": part, "of": whole, "share": round(part / whole, 4) if whole else None}


def discard_statistics(
    tokens: Tokens, keeps: dict[str, Tensor], tokenizer: Tokenizer
) -> dict[str, dict]:
    """What discards.json holds. keeps: bool [N] by method, as in selection.safetensors.

    {"methods": {method: {"discarded", "of", "share", "by_position", "by_type", "rows", "precision",
    "recall"}}, "overlap": {A: {B: share of A's discards that B discards too}}}, of the methods that
    discard anything. by_position and by_type: {kind: {"discarded", "of", "share"}}. rows: how many
    lost none, some and all of their response tokens, and quartiles over the rows of the share lost.
    precision and recall: as in metrics.json, with ground truth only.
    """
    response, size = tokens.response, per_row(tokens, tokens.response)
    starts = torch.tensor(list(POSITIONS.values()))
    position = torch.bucketize(response_positions(tokens)[response], starts, right=True) - 1
    ids, inverse = tokens.input_ids[response].unique(return_inverse=True)
    types = [TYPES.index(token_type(token, tokenizer)) for token in ids.tolist()]
    kinds = {"by_position": (POSITIONS, position), "by_type": (TYPES, torch.tensor(types)[inverse])}
    gone = {method: ~keep[response] for method, keep in keeps.items() if not keep.all()}
    methods = {}
    for method, lost in gone.items():
        found = methods[method] = counted(int(lost.sum()), len(lost))
        for key, (names, kind) in kinds.items():
            counts = (k.bincount(minlength=len(names)).tolist() for k in (kind[lost], kind))
            found[key] = {name: counted(*pair) for name, *pair in zip(names, *counts)}
        of_row = (per_row(tokens, ~keeps[method]) / size.double())[size > 0]
        fate = {"none": of_row == 0, "some": (of_row > 0) & (of_row < 1), "all": of_row == 1}
        found["rows"] = {"of": len(of_row), **{name: int(f.sum()) for name, f in fate.items()}}
        quarters = of_row.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        found["rows"]["quartiles"] = [round(q, 4) for q in quarters.tolist()]
        if tokens.harmful.any():
            found |= found_harm(lost, tokens.harmful[response])
    share = lambda a, b: round(int((a & b).sum()) / int(a.sum()), 4)
    overlap = {a: {b: share(gone[a], gone[b]) for b in gone} for a in gone}
    return {"methods": methods, "overlap": overlap}


def shown(cell: float | None) -> str:
    """A number in a table; blank for None."""
    return "" if cell is None else f"{cell:.3f}"


def discard_table(found: dict) -> str:
    """discards.json for reading: what was counted down, methods across; then the overlap."""
    lines: dict[str, list] = {}
    for m in found["methods"].values():
        rows, cells = m["rows"], {"discarded": f"{m['discarded']} of {m['of']}"}
        shares = {"share": m["share"]}
        for key, words in (("by_position", "at position"), ("by_type", "of")):
            shares |= {f"share {words} {name}": kind["share"] for name, kind in m[key].items()}
        shares |= {f"rows that lost {k}": rows[k] / rows["of"] for k in ("none", "some", "all")}
        shares |= {name: m.get(name, {}).get("value") for name in ("precision", "recall")}
        cells |= {name: shown(value) for name, value in shares.items()}
        cells["share lost per row, quartiles"] = " ".join(f"{q:.2f}" for q in rows["quartiles"])
        for name, cell in cells.items():
            lines.setdefault(name, [name]).append(cell)
    names, overlap = list(found["methods"]), found["overlap"].items()
    shares = [[f"of {a}'s discards", *map(shown, others.values())] for a, others in overlap]
    tables = markdown(["", *names], list(lines.values())), markdown(["shared with", *names], shares)
    return "\n\n".join(tables)

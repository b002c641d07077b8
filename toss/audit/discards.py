"""Which tokens the methods of a run discarded: where in the response, of which type, and how far two methods agree."""

import torch
from torch import Tensor

from model.tokenizer import Tokenizer
from toss.audit.experiment import markdown
from toss.audit.measures import found_harm
from toss.dataset import Tokens

BUCKETS = {"0": 0, "1": 1, "2-3": 2, "4-7": 4, "8-15": 8, "16-31": 16, "32+": 32}  # name -> its first response position
TYPES = ("word", "number", "punctuation", "whitespace", "end of sequence", "other special")


def response_positions(tokens: Tokens) -> Tensor:
    """j of every response token, counted from 0 in its row: int64 [N], without meaning at other tokens."""
    count = tokens.response.long().cumsum(0)
    before = torch.cat((torch.zeros(1, dtype=torch.int64), count))[tokens.offsets[:-1]]  # response tokens of earlier rows
    return count - 1 - before[tokens.row_of(torch.arange(len(count)))]


def token_type(token: int, tokenizer: Tokenizer) -> str:
    """One of TYPES, by the token's decoded text: with a letter (or a piece of a character) a word, else with a digit a number."""
    if token == tokenizer.eos_id:
        return "end of sequence"
    text = tokenizer.raw.decode([token], skip_special_tokens=False)
    if text and not tokenizer.decode([token]):
        return "other special"
    if not text.strip():
        return "whitespace"
    if any(c.isalpha() or c == "\ufffd" for c in text):
        return "word"
    return "number" if any(c.isnumeric() for c in text) else "punctuation"


def shares(names, which: Tensor, gone: Tensor) -> dict[str, dict]:
    """Of each kind of token, how many there are and how many were discarded. which: the kind's number; both [n]."""
    there, lost = (torch.bincount(kinds, minlength=len(names)).tolist() for kinds in (which, which[gone]))
    return {name: {"discarded": a, "of": n, "share": ratio(a, n)} for name, a, n in zip(names, lost, there)}


def ratio(part: int, whole: int) -> float | None:
    """A share, rounded; of nothing there is none."""
    return round(part / whole, 4) if whole else None


def discard_statistics(tokens: Tokens, keeps: dict[str, Tensor], tokenizer: Tokenizer) -> dict[str, dict]:
    """What is in discards.json. keeps: bool [N] by method, as in selection.safetensors.

    {"methods": {method: {"discarded", "of", "share", "by_position", "by_type", "rows", "precision", "recall"}},
    "overlap": {A: {B: share of A's discards that B discards too}}}, of the methods that discard anything. by_position and
    by_type: {kind: {"discarded", "of", "share"}}; rows: how many lost none, some and all of their response tokens, and
    the quartiles over the rows of the share lost; precision and recall: as in metrics.json, with ground truth only.
    """
    response = tokens.response
    row = tokens.row_of(response.nonzero().squeeze(1))
    bucket = torch.bucketize(response_positions(tokens)[response], torch.tensor(list(BUCKETS.values())), right=True) - 1
    ids, inverse = tokens.input_ids[response].unique(return_inverse=True)
    kind = torch.tensor([TYPES.index(token_type(token, tokenizer)) for token in ids.tolist()])[inverse]
    size = torch.bincount(row, minlength=tokens.rows)
    gone = {method: ~keep[response] for method, keep in keeps.items() if not keep[response].all()}
    methods = {}
    for method, lost in gone.items():
        of_row = torch.bincount(row[lost], minlength=tokens.rows)[size > 0] / size[size > 0].double()
        fate = {"none": of_row == 0, "some": (of_row > 0) & (of_row < 1), "all": of_row == 1}
        quartiles = of_row.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        methods[method] = {
            "discarded": int(lost.sum()), "of": len(lost), "share": ratio(int(lost.sum()), len(lost)),
            "by_position": shares(BUCKETS, bucket, lost), "by_type": shares(TYPES, kind, lost),
            "rows": {"of": len(of_row), **{name: int(which.sum()) for name, which in fate.items()},
                     "quartiles": [round(q, 4) for q in quartiles.tolist()]},
            **(found_harm(lost, tokens.harmful[response]) if tokens.harmful.any() else {}),
        }  # fmt: skip
    overlap = {a: {b: ratio(int((gone[a] & gone[b]).sum()), int(gone[a].sum())) for b in gone} for a in gone}
    return {"methods": methods, "overlap": overlap}


def shown(cell: float | int | str | None) -> str:
    """A cell of a table: blank for None, a float to three decimals."""
    return "" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def discard_table(found: dict) -> str:
    """discards.json for reading: what was counted down, methods across; then the overlap."""
    methods, lines = found["methods"], []
    add = lambda title, value: lines.append([title, *(shown(value(m)) for m in methods.values())])  # noqa: E731
    add("discarded", lambda m: f"{m['discarded']} of {m['of']}")
    add("share", lambda m: m["share"])
    for bucket in BUCKETS:
        add(f"share at position {bucket}", lambda m: m["by_position"][bucket]["share"])
    for kind in TYPES:
        add(f"share of {kind}", lambda m: m["by_type"][kind]["share"])
    for fate in ("none", "some", "all"):
        add(f"rows that lost {fate}", lambda m: ratio(m["rows"][fate], m["rows"]["of"]))
    add("quartiles of a row's loss", lambda m: " ".join(f"{q:.2f}" for q in m["rows"]["quartiles"]))
    for name in ("precision", "recall"):
        add(name, lambda m: m.get(name, {}).get("value"))
    overlap = [[f"of {a}'s discards", *map(shown, shared.values())] for a, shared in found["overlap"].items()]
    return f"{markdown(['', *methods], lines)}\n\n{markdown(['shared with', *methods], overlap)}"
